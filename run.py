"""The folder of a run: config.json, log.jsonl, and ckpt.pt, the newest checkpoint. One process writes to it, and none
of its files is ever half written."""

import json
import math
import os
import platform
import shutil
import statistics
import zipfile
from pathlib import Path

import numpy as np
import torch

from command import UserError
from config import Config, resumed
from files import lock_folder, write_atomically
from identity import check_activation, describe
from machine import LOCAL_RANK, RANK, RESTARTS, WORLD, device_name, git_commit, say

# To be increased when older checkpoints no longer load
VERSION = 3

# ---------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(path):
    """What Folder.save wrote; UserError with a reason if it is damaged or something else."""
    try:
        # torch.load does not look at the checksums that torch.save wrote. One process per node does.
        if LOCAL_RANK == 0 and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        version = checkpoint.get("version")
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(reason[0]) from None
    if version != VERSION:
        raise UserError("it was written by another version of train.py, with which it can be resumed")
    return checkpoint


def kept_checkpoints(out):
    """The numbered checkpoints in a run's folder, newest first; ckpt.pt is another name of the first."""
    return sorted(out.glob("ckpt_" + "[0-9]" * 8 + ".pt"), reverse=True)


def load_checkpoint(out):
    """The newest checkpoint of a run, or None if it has none. If it is damaged, a UserError offers the one before."""
    path = out / "ckpt.pt"
    if not path.exists():
        return None
    try:
        return read_checkpoint(path)
    except UserError as error:
        hint = "choose another --out to start over"
        for older in kept_checkpoints(out):
            try:
                read_checkpoint(older)
                hint = f"continue from the one before with  cp {older} {path}"
                break
            except UserError:
                continue
        raise UserError(f"checkpoint {path} cannot be read ({error}): {hint}") from None


def read_log(path, step=math.inf):
    """The records of a log up to `step`. Lines that are not records, such as a torn last one, are left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["kind"] in ("train", "val", "bad") and record["step"] <= step:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


def median_speed(records):
    """The median tokens per second of a log, without the first step, which compiles; None if there is no other. The
    median, because the machine may have been busy with something else for a while."""
    speeds = [record["tokens_per_s"] for record in records if record["kind"] == "train" and record["step"] > 1]
    return statistics.median(speeds) if speeds else None


def read_about(out):
    """What config.json of a run says: {"config": …, "formula": …, "source": …, …}; UserError if there is none."""
    try:
        about = json.loads((out / "config.json").read_text("utf-8"))
        int(about["config"]["max_steps"])
        return about
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{out} is not the folder of a run: it has no config.json that train.py wrote") from None


def dtype_taken(out, state=None):
    """What dtype=auto took when a run began, as config.json or else its checkpoint says; "auto" if neither does. The
    machine may be busier now, and decide otherwise."""
    try:
        return read_about(out)["config"]["dtype"]
    except (UserError, KeyError):
        return state["config"]["dtype"] if state else "auto"


def begin(from_file, options):
    """(Config, state, records of the log, lock or None) of the run that a config file and a command line describe. The
    state of a resumed run is its checkpoint."""
    asked = from_file | options
    out, resume = Path(asked["out"]), asked["resume"] or RESTARTS > 0
    lock = lock_folder(out) if RANK == 0 and out.exists() else None  # a run that is refused creates no folder
    state = load_checkpoint(out) if resume else None
    if resume and asked["dtype"] == "auto":
        options = options | {"dtype": dtype_taken(out, state)}
        asked = from_file | options
    config = resumed(state, from_file, options | {"out": asked["out"]}) if state else Config(**asked)
    config.check_batch(WORLD)
    if not state:
        if RANK == 0 and not resume and any((out / name).exists() for name in ("ckpt.pt", "log.jsonl")):
            raise UserError(f"{out} already holds a run: continue it with --resume, or choose another --out")
        if resume:
            say(f"{out} has no checkpoint: starting from scratch")
        return config, {"step": 0, "seconds": 0.0, "loss_average": None, "data": {}}, [], lock
    check_activation(state, config)
    if state["step"] > config.max_steps:
        raise UserError(f"the run in {out} is at step {state['step']}, beyond max_steps={config.max_steps}: raise it")
    return config, state, read_log(out / "log.jsonl", state["step"]), lock


# ---------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(out, state, keep=1):
    """Write ckpt.pt and, to keep several, another name for it by its step; remove those beyond `keep`."""
    write_atomically(out / "ckpt.pt", lambda file: torch.save(state | {"version": VERSION}, file))
    if keep > 1:
        numbered = out / f"ckpt_{state['step']:08d}.pt"
        numbered.unlink(missing_ok=True)
        try:
            os.link(out / "ckpt.pt", numbered)
        except OSError:  # a file system without links
            shutil.copy(out / "ckpt.pt", numbered)
    for old in kept_checkpoints(out)[keep if keep > 1 else 0 :]:
        old.unlink()


class Folder:
    """A run's folder, to which the first process writes; the others only keep track of `saved`. A full disk does not
    end the run: the old checkpoint stays, and lines of the log wait in memory."""

    def __init__(self, config, state, records, lock, device):
        """Write config.json and a log of these records, and open the log for more."""
        self.out, self.config, self.start = Path(config.out), config, state["step"]
        self.saved = state["step"] if "version" in state else None  # the step of the newest checkpoint
        self.about = describe(config)  # once, since the source of an activation may be edited during the run
        self.unwritten = bytearray()
        if RANK == 0:
            self.lock = lock or lock_folder(self.out)
            versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
            about = self.about | {"versions": versions, "device": device_name(device), "commit": git_commit()}
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(self.out / "config.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
            write_atomically(self.out / "log.jsonl", lambda file: file.write(lines.encode()))
            self.log = open(self.out / "log.jsonl", "ab", buffering=0)

    def write_log(self, kind, step, seconds, **values):
        """Append a record to the log."""
        if RANK:
            return
        # JSON has no number for ∞ and NaN
        values = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        tokens = step * self.config.tokens_per_step
        record = {"kind": kind, "step": step, "tokens": tokens, "seconds": seconds, **values}
        self.unwritten += json.dumps(record).encode() + b"\n"
        try:
            while self.unwritten:
                del self.unwritten[: self.log.write(self.unwritten)]
        except OSError as error:
            say(f"warning: {self.out}/log.jsonl cannot be written ({error.strerror}); its lines are kept for later")

    def save(self, state):
        """Write a checkpoint, if it can be written; `saved` tells."""
        try:
            if RANK == 0:
                os.fsync(self.log.fileno())  # the log has all lines up to this step
                save_checkpoint(self.out, state | self.about, self.config.keep_checkpoints)
            self.saved = state["step"]
        except (OSError, RuntimeError) as error:
            # torch raises an error of its own on top of the system's
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
            say(f"warning: no checkpoint at step {state['step']} ({reason}); {self.newest}, and training continues")

    @property
    def newest(self):
        """Which checkpoint there is, in words."""
        return "there is no checkpoint" if self.saved is None else f"the last checkpoint is that of step {self.saved}"
