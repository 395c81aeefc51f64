"""A run's log in TensorBoard or Weights & Biases, while it trains or afterwards:

    python -m tools.follow out/NAME --to=tensorboard      then  tensorboard --logdir out
    python -m tools.follow out/NAME --to=wandb            project nanoxielu, or that of WANDB_PROJECT

It waits for what the run has yet to write, and ends when the run is finished, or with Ctrl-C. If it is started again,
also after the run was resumed, it continues the same record. train.py does not know about it: it reads config.json and
log.jsonl, and nothing else.
"""

import json
import os
import secrets
import sys
import time
from pathlib import Path

from plumbing.command import Parser, UserError, run_command
from plumbing.files import write_atomically
from plumbing.run import read_about, read_log

POLL_SECONDS = 2


def scalars(record):
    """{name: number} of a record of the log: train/loss, val/bits_per_byte, val/alpha_p/layer 3, …"""
    values = {name: value for name, value in record.items() if name != "step"}
    for name, layers in record.items():
        if isinstance(layers, list):
            values |= {f"{name}/layer {number}": value for number, value in enumerate(layers, 1)}
    return {f"{record['kind']}/{name}": value for name, value in values.items() if type(value) in (int, float)}


def follow(out):
    """Yield each record of a run's growing log once, until the run is finished. A run that is resumed replaces its log
    by one that says the same up to where it resumes, so a record is known by its kind and step."""
    seen = set()
    while True:
        for record in read_log(out / "log.jsonl"):
            key = record["kind"], record["step"]
            if key not in seen:
                seen.add(key)
                yield record
        if ("val", read_about(out)["config"]["max_steps"]) in seen:
            return
        time.sleep(POLL_SECONDS)


def to_tensorboard(out, config):
    """A function that writes a record into an event file. Each time the record begins anew."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=0)  # so that TensorBoard forgets the points of before
    lines = [f"    {name} = {value!r}" for name, value in config.items()]  # indented, it is code to Markdown
    writer.add_text("config", "\n".join(lines))

    def write(record):
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def to_wandb(out, config):
    """A function that sends a record to a run of W&B. The run's id and the last step that was sent are in
    wandb.json."""
    import wandb

    path = out / "wandb.json"
    try:
        state = {"id": secrets.token_hex(4), "step": 0}
        state |= json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{path} cannot be read: delete it to begin a new record") from None
    project = os.environ.get("WANDB_PROJECT", "nanoxielu")
    name = out.resolve().name
    try:
        run = wandb.init(project=project, id=state["id"], resume="allow", name=name, config=config, dir=str(out))
    except wandb.errors.Error as error:
        hint = "run `wandb login` once, or set WANDB_MODE=offline"
        raise UserError(f"W&B does not start a record ({error}): {hint}") from None

    def write(record):
        # W&B adds what has the same step, and refuses a step below the last
        if record["step"] >= state["step"]:
            run.log(scalars(record), step=record["step"])
            state["step"] = record["step"]
            write_atomically(path, lambda file: file.write(json.dumps(state).encode()))

    return write


TARGETS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def mirror(argv):
    """Follow the run that a command line names."""
    parser = Parser("python -m tools.follow")
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", required=True, choices=TARGETS)
    options = parser.parse_args(argv)
    try:
        write = TARGETS[options.to](options.run, read_about(options.run)["config"])
    except ImportError:
        raise UserError(f"--to={options.to} needs an optional package: pip install {options.to}") from None
    print(f"following {options.run}; Ctrl-C ends it")
    if not read_log(options.run / "log.jsonl"):
        print("nothing is logged yet: waiting for train.py to write; start or resume the run if it is not running")
    for record in follow(options.run):
        write(record)
    print(f"{options.run} is finished")


def main(argv):
    return run_command(mirror, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
