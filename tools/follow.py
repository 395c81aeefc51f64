"""A run's log in TensorBoard or Weights & Biases, while it trains or afterwards:

    python -m tools.follow out/NAME --to=tensorboard      then  tensorboard --logdir out
    python -m tools.follow out/NAME --to=wandb            project nanoxielu, or that of WANDB_PROJECT

It waits for what the run has yet to write, and ends when the run is finished, or with Ctrl-C. Started again, also after
the run was resumed, it goes on with the same record. train.py knows nothing of it: all that is read is config.json and
log.jsonl.
"""

import json
import math
import os
import secrets
import sys
import time
from pathlib import Path

import train
from data import UserError
from tools.command import run_command

POLL_SECONDS = 2


def scalars(record):
    """{name: number} of a line of the log: train/loss, val/bits_per_byte, val/alpha_p/layer 3, …"""
    values = {}
    for name, value in record.items():
        if isinstance(value, list):
            values |= {f"{record['kind']}/{name}/layer {number}": one for number, one in enumerate(value, 1)}
        elif name != "step":
            values[f"{record['kind']}/{name}"] = value
    return {
        name: value for name, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def read_config(out):
    """The config of a run; UserError where there is none."""
    try:
        config = json.loads((out / "config.json").read_text("utf-8"))["config"]
        int(config["max_steps"])
        return config
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} is no run of train.py: it has no config.json that can be read") from None


def follow(out):
    """Yield each record of a run's growing log once, by its kind and step, until the run is finished. A run that is
    resumed replaces its log by one that says the same as far as it goes."""
    seen = set()
    while True:
        for record in train.read_log(out / "log.jsonl", math.inf):
            key = record["kind"], record["step"]
            if key not in seen:
                seen.add(key)
                yield record
        if ("val", read_config(out)["max_steps"]) in seen:
            return
        time.sleep(POLL_SECONDS)


def to_tensorboard(out, config):
    """A function that writes a record into event files. They are made anew: no point is there twice."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--to=tensorboard needs an optional package: pip install tensorboard") from None
    for old in (out / "tensorboard").glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(out / "tensorboard")
    lines = [f"    {name} = {value!r}" for name, value in config.items()]  # indented, it is code to Markdown
    writer.add_text("config", "\n".join(lines))

    def write(record):
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])
        writer.flush()

    return write


def to_wandb(out, config):
    """A function that sends a record to a run of W&B. Its id, and the last step sent, lie in wandb.json."""
    try:
        import wandb
    except ImportError:
        raise UserError("--to=wandb needs an optional package: pip install wandb") from None
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
        raise UserError(
            f"W&B does not begin a record ({error}): say  wandb login  once, or set WANDB_MODE=offline"
        ) from None

    def write(record):
        # W&B gathers what has the same step, and takes no step below the last
        if record["step"] < state["step"]:
            return
        run.log(scalars(record), step=record["step"])
        state["step"] = record["step"]
        train.write_atomically(path, lambda file: file.write(json.dumps(state).encode()))

    return write


TARGETS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def mirror(argv):
    """Follow the run that a command line names to where it says."""
    places = [argument for argument in argv if not argument.startswith("--")]
    options = [argument for argument in argv if argument.startswith("--")]
    target = options[0].removeprefix("--to=") if len(options) == 1 else None
    if len(places) != 1 or target not in TARGETS:
        raise UserError(f"say which run, and --to={' or --to='.join(TARGETS)}: see python -m tools.follow --help")
    out = Path(places[0])
    write = TARGETS[target](out, read_config(out))
    print(f"following {out}; Ctrl-C ends it")
    for record in follow(out):
        write(record)
    print(f"{out} is finished")


def main(argv):
    return run_command(mirror, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
