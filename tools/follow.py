"""A run's log in TensorBoard or Weights & Biases, while it trains or afterwards:

    python -m tools.follow out/NAME --to=tensorboard      then  tensorboard --logdir out
    python -m tools.follow out/NAME --to=wandb            project nanoxielu, or that of WANDB_PROJECT

It waits for what the run has yet to write, and ends when the run is finished, or with Ctrl-C. Started again, it
continues (W&B) or sends all again (TensorBoard). If the run went back to a checkpoint, so that its log lacks what was
sent, W&B gets a new run, next to the old one; TensorBoard forgets the old points. Of train.py's files this tool
reads config.json and log.jsonl alone; train.py knows nothing of it.
"""

import json
import os
import sys
import time
from pathlib import Path

if not __package__:
    print("error: start it as  python -m tools.follow", file=sys.stderr)
    sys.exit(2)

from plumbing.command import Parser, UserError, program
from plumbing.run import read_about, read_log


def scalars(record):
    """{name: number} of a record of the log: train/loss, val/bits_per_byte, val/alpha_p/layer 3, …"""
    values = {name: value for name, value in record.items() if name != "step"}
    for name in [name for name, value in record.items() if isinstance(value, list)]:
        values |= {f"{name}/layer {layer}": value for layer, value in enumerate(record[name], 1)}
    return {f"{record['kind']}/{name}": value for name, value in values.items() if type(value) in (int, float)}


def to_tensorboard(out, config, records):
    """(a function that sends a record of the log to TensorBoard, how many of the log's records are there already)."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=0)  # so that TensorBoard forgets the points of before
    # indented, it is code to Markdown
    writer.add_text("config", "\n".join(f"    {name} = {value!r}" for name, value in config.items()))

    def send(record):
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send, 0


def to_wandb(out, config, records):
    """The same for W&B. wandb.json holds the id of its run and the last record that was sent to it: if the log still
    has that record, down to its seconds, it has all that were sent before."""
    import wandb

    path = out / "wandb.json"
    try:
        run_id, last = json.loads(path.read_text("utf-8"))
        count = records.index(last) + 1
    except (OSError, ValueError, TypeError):  # there is no such file, or the log no longer holds that record
        run_id, count = None, 0
    os.environ.setdefault("WANDB_PROJECT", "nanoxielu")
    wandb.finish()  # the run that this process has begun, if any
    try:
        run = wandb.init(name=out.resolve().name, id=run_id, resume="allow", config=config, dir=str(out))
    except wandb.errors.Error as error:
        hint = "run `wandb login` once, or set WANDB_MODE=offline"
        raise UserError(f"W&B does not start a run ({error}): {hint}") from None

    # Not as W&B's own step: a run that continues there would refuse the step that was its last
    run.define_metric("*", step_metric="step")

    def send(record):
        run.log(scalars(record) | {"step": record["step"]})
        path.write_text(json.dumps([run.id, record]), "utf-8")

    return send, count


TARGETS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def follow(argv):
    """Send the log of the run that a command line names, until the run is finished."""
    parser = Parser("python -m tools.follow")
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", required=True, choices=TARGETS)
    options = parser.parse_args(argv)
    sent = None
    while True:
        config, records = read_about(options.run)["config"], read_log(options.run / "log.jsonl")
        if sent is None or records[: len(sent)] != sent:
            try:
                send, count = TARGETS[options.to](options.run, config, records)
            except ImportError:
                raise UserError(f"--to={options.to} needs an optional package: pip install {options.to}") from None
            sent = records[:count]
            print(f"following {options.run} from record {count + 1} of its log; Ctrl-C ends it")
        for record in records[len(sent) :]:
            send(record)
        sent = records
        if ("val", config["max_steps"]) in [(record["kind"], record["step"]) for record in records]:
            break
        time.sleep(2)
    print(f"{options.run} is finished")


main = program(follow)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
