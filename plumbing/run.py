"""The folder of a run: config.json, log.jsonl, and ckpt.pt, the newest checkpoint. One process writes to it. Nothing
but the last line of the log is ever half written."""

import contextlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from plumbing import machine
from plumbing.command import UserError, first_line, format_seconds
from plumbing.files import lock_folder, write_atomically, write_json
from plumbing.machine import LOCAL_RANK, RANK, RESTARTS, WORLD, device_name, git_commit, say

# To be increased when older checkpoints no longer load
VERSION = 4
# What else a checkpoint holds
PARTS = {"step": int, "seconds": float, "loss_average": float | None, "facts": dict}
PARTS |= {"config": dict, "from_file": dict, "model": dict, "optimizers": list}
# What the optimizers keep for each weight: a step count, and tensors of the weight's shape
STEP = torch.tensor(0.0)
KEPT = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}
SPIKE = 1.5  # a loss this many times its running average is called a spike
# How the numbers of a record are shown
SHOWN = {
    "loss": "loss {:.4f}",
    "perplexity": "perplexity {:.3f}",
    "bits_per_byte": "bits/byte {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
}

# ---------------------------------------------------------------------------------------------------------------
# Reading


def read_checkpoint(path, Config):
    """What save_checkpoint wrote; UserError with a reason if it is damaged or something else. (The tensors in it are
    looked at by `fill`.)"""
    try:
        # torch.load does not look at the checksums that torch.save wrote. One process per node does.
        if LOCAL_RANK == 0 and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if checkpoint.get("version") != VERSION:
            raise ValueError("it was written by another version of train.py, with which it can be resumed")
        for name, kind in PARTS.items():
            part = checkpoint.get(name, "nothing")
            if not isinstance(part, kind) or (isinstance(part, int | float) and not 0 <= part < 1e300):
                raise ValueError(f"its {name} is missing, or not one that a run can have")
        for name in ("config", "from_file"):
            checkpoint[name] = Config.typed(checkpoint[name], "in it")
        if missing := [name for name in Config.FIXED if name not in checkpoint["config"]]:
            raise ValueError(f"its config lacks {missing[0]}")
        return checkpoint
    except Exception as error:
        raise UserError(getattr(error, "strerror", None) or first_line(error)) from None


def fill(checkpoint, out, model, optimizers=()):
    """Load the checkpoint of the run in `out` into its model and, if they are given, its optimizers. UserError if its
    tensors have other names, shapes or dtypes than theirs."""
    try:
        check_tensors(checkpoint["model"], model.state_dict())
        if not all(weight.isfinite().all() for weight in checkpoint["model"].values()):
            raise ValueError("one of its weights is not finite")
        model.load_state_dict(checkpoint["model"])
        states = checkpoint["optimizers"] if optimizers else []
        for optimizer, saved in zip(optimizers, states, strict=bool(states)):  # an imported model has none
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            kept = dict(saved)["state"]
            if kept.keys() not in (set(), set(range(len(weights)))):  # an optimizer that has made no update has none
                raise ValueError("an optimizer lacks the state of some weights")
            for number, state in kept.items():
                like = {name: STEP if name == "step" else weights[number] for name in KEPT[type(optimizer)]}
                check_tensors(state, like)
            # the parameter groups stay those of this config, which may have changed
            optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
    except Exception as error:
        hint = "choose another --out to start over"
        raise UserError(f"the checkpoint in {out} does not fit its config ({first_line(error)}): {hint}") from None


def check_tensors(saved, expected):
    """ValueError unless two {name: tensor} have the same names, shapes and dtypes."""

    def kind(value):
        return (value.is_meta, value.layout, value.dtype, *value.shape) if isinstance(value, torch.Tensor) else None

    if saved.keys() != expected.keys():
        raise ValueError(f"{min(saved.keys() ^ expected.keys(), key=str)} is missing, or does not belong there")
    if wrong := [name for name in expected if kind(saved[name]) != kind(expected[name])]:
        raise ValueError(f"{wrong[0]} is of another kind")


def numbered(out, step):
    """The name of an older checkpoint, which --keep_checkpoints keeps."""
    return out / f"ckpt_{step:08d}.pt"


def kept_steps(out):
    """The steps of the older checkpoints in a run's folder, newest first."""
    return sorted((int(path.stem[5:]) for path in out.glob("ckpt_" + "[0-9]" * 8 + ".pt")), reverse=True)


def load_checkpoint(out, Config, step=0):
    """The checkpoint of a run: the newest, or that of a step; None if the run has none. If it is missing or damaged, a
    UserError offers an older one."""
    path = numbered(out, step) if step else out / "ckpt.pt"
    older = [kept for kept in kept_steps(out) if not step or kept < step]
    if not (path.exists() or step or older):
        return None
    try:
        return read_checkpoint(path, Config)
    except UserError as error:
        hint = "choose another --out to start over"
        if older:
            hint = "continue from an older one with  " + " or ".join(f"--resume_from={kept}" for kept in older)
        elif step and (out / "ckpt.pt").exists():
            hint = "leave out --resume_from to continue from the newest"
        raise UserError(f"checkpoint {path} cannot be read ({error}): {hint}") from None


def read_log(path, step=math.inf):
    """The records of a log up to `step`. Lines that are not records, such as a torn last one, are left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(line)
            if record["kind"] in ("train", "val", "bad") and record["step"] <= step:
                records.append(record)
    return records


def median_speed(records):
    """The median tokens per second of a log, without the first step, which compiles; None if there is no other. The
    median, because the machine may have been busy with something else for a while."""
    speeds = [record["tokens_per_s"] for record in records if record["kind"] == "train" and record["step"] > 1]
    return statistics.median(speeds) if speeds else None


def read_about(out):
    """What config.json of a run says: {"config": …, "facts": …, …}; UserError if there is none."""
    try:
        about = json.loads((out / "config.json").read_text("utf-8"))
        int(about["config"]["max_steps"])
        return about
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{out} is not the folder of a run: it has no config.json that train.py wrote") from None


def dtype_taken(out, saved):
    """What dtype=auto took when a run began, as config.json or else its checkpoint says; "auto" if neither does. The
    machine may be busier now, and decide otherwise."""
    try:
        return read_about(out)["config"]["dtype"]
    except (UserError, KeyError):
        return saved["config"].get("dtype", "auto") if saved else "auto"


def check_facts(began, now, out):
    """UserError if one of the facts {name: value} with which a run began has changed. Numbers may differ by
    rounding; a fact that the run does not have is not compared."""

    def same(a, b):
        try:
            return np.allclose(a, b, rtol=1e-5, atol=1e-8) if isinstance(a, list) and len(a) == len(b) else bool(a == b)
        except (TypeError, ValueError, RuntimeError):  # b is something else altogether
            return False

    if changed := [name for name, fact in now.items() if not same(fact, began.get(name, fact))]:
        hint = "restore what it began with, or start a new run with another --out"
        raise UserError(f"{', '.join(changed)} changed since the run in {out} began: {hint}")


# ---------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(out, checkpoint, keep=1, before=None):
    """Write ckpt.pt. To keep several, the one that it replaces, of step `before`, stays under its number, unless it has
    seen no update; those beyond `keep` are removed."""
    if keep > 1 and before and (out / "ckpt.pt").exists():
        numbered(out, before).unlink(missing_ok=True)
        try:  # a second name, which costs no room, until another file takes the place of ckpt.pt
            os.link(out / "ckpt.pt", numbered(out, before))
        except OSError:  # a file system without links
            shutil.copy(out / "ckpt.pt", numbered(out, before))
    write_atomically(out / "ckpt.pt", lambda file: torch.save(checkpoint | {"version": VERSION}, file))
    for step in kept_steps(out)[keep - 1 :]:
        numbered(out, step).unlink()


def go_back(out, step):
    """Make the checkpoint of a step the newest. What the run wrote after it goes to a folder left_1, left_2, …"""
    left = next(path for number in itertools.count(1) if not (path := out / f"left_{number}").exists())
    left.mkdir()
    later = [numbered(out, kept) for kept in kept_steps(out) if kept > step]
    for path in [*later, out / "log.jsonl", out / "ckpt.pt"]:
        if path.exists():
            path.replace(left / path.name)
    numbered(out, step).replace(out / "ckpt.pt")
    say(f"going back to step {step}: what was written after it is kept in {left}, which you may delete")


class Run:
    """A run and its folder, to which the first process writes; the others only keep track of `saved`. A full disk does
    not end the run: the old checkpoint stays, and lines of the log wait in memory.

    config: the Config. start: the step at which it begins or resumes. saved: the step of the newest checkpoint, or
    None. seconds: of training so far. facts: what must not change before the run ends. records: those of the log.
    validated: the steps that have a validation. loaded: the checkpoint, until `restore` has loaded it."""

    def __init__(self, Config, from_file, options):
        """Start or resume the run that a config file and a command line describe. Nothing is written yet, so that a run
        that is refused leaves nothing behind."""
        keys = from_file | options
        self.out, self.from_file = Path(keys["out"]), from_file
        self.lock = lock_folder(self.out) if RANK == 0 and self.out.exists() else None
        resume = keys["resume"] or keys["resume_from"] or (RESTARTS and self.was_begun_by(Config(**keys)))
        self.back_to = keys["resume_from"]
        if self.back_to and RESTARTS and read_about(self.out)["config"].get("resume_from") == self.back_to:
            self.back_to = 0  # torchrun has restarted a run that has gone back already
        saved = load_checkpoint(self.out, Config, self.back_to) if resume else None
        if resume and keys["dtype"] == "auto":
            options = options | {"dtype": dtype_taken(self.out, saved)}
        if saved:
            of_folder = {name: keys[name] for name in ("out", "resume", "resume_from")}
            self.config = Config.resumed(saved, from_file, options | of_folder)
        else:
            self.config = Config(**(from_file | options))
        self.config.check_batch(WORLD)
        self.loaded = saved
        state = saved or {"step": 0, "seconds": 0.0, "loss_average": None, "facts": {}}
        self.start, self.seconds = state["step"], state["seconds"]
        self.loss_average, self.facts = state["loss_average"], state["facts"]
        self.saved = self.start if saved else None
        self.records = read_log(self.out / "log.jsonl", self.start) if saved else []
        self.validated = {record["step"] for record in self.records if record["kind"] == "val"}
        if self.start > self.config.max_steps:
            limit = f"max_steps={self.config.max_steps}"
            raise UserError(f"the run in {self.out} is at step {self.start}, beyond {limit}: raise it")
        if RANK == 0 and not resume and any((self.out / name).exists() for name in ("ckpt.pt", "log.jsonl")):
            raise UserError(f"{self.out} already holds a run: add --resume to continue it, or choose another --out")
        if saved:
            self.note_extension(saved["config"])
        elif resume:
            say(f"{self.out} has no checkpoint: starting from scratch")

    def was_begun_by(self, config):
        """Whether the run in this folder has this config. If not, torchrun has restarted a command that was refused."""
        try:
            began = read_about(self.out)["config"]
        except UserError:
            return False
        taken = {"dtype": began.get("dtype")} if config.dtype == "auto" else {}
        return began == vars(config) | taken

    def note_extension(self, before):
        """Say so if a run is extended whose learning rate had begun to fall, as the config `before` says."""
        before = self.config.defaults() | before
        fall = round(before["max_steps"] - before["decay_steps"])
        if self.config.max_steps > before["max_steps"] and self.start > fall:
            earlier = next((f", or go back with  --resume_from={s}" for s in kept_steps(self.out) if s <= fall), "")
            say(f"note: the learning rate has fallen since step {fall}, and rises again now{earlier}")

    def keep(self, facts):
        """Check that these facts are those with which the run began, and keep them in each checkpoint."""
        check_facts(self.facts, facts, self.out)
        self.facts = facts

    def restore(self, model, optimizers):
        """Load what the checkpoint holds, if there is one."""
        if self.loaded:
            fill(self.loaded, self.out, model, optimizers)
            say(f"resuming {self.out} at step {self.start}")
        self.loaded = None

    def open(self, device, dtype):
        """Go back where that is asked for, write config.json and the log so far, and open the log for more."""
        # config.json says what auto took, and what the activation was before somebody edits it during the run
        self.about = {"config": vars(self.config) | {"dtype": str(dtype)[6:]}, "facts": self.facts}
        self.unwritten = bytearray()
        if RANK == 0:
            self.lock = self.lock or lock_folder(self.out)
            if self.back_to:
                go_back(self.out, self.back_to)
            origin = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
            origin |= {"device": device_name(device), "commit": git_commit()}
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            write_json(self.out / "config.json", self.about | {"origin": origin})
            write_atomically(self.out / "log.jsonl", lambda file: file.write(lines.encode()))
            self.log_file = open(self.out / "log.jsonl", "ab", buffering=0)

    def save(self, step, model, optimizers):
        """Write a checkpoint, if it can be written; `saved` tells. Returns the seconds that it took."""
        began = time.perf_counter()
        checkpoint = {"step": step, "seconds": self.seconds, "loss_average": self.loss_average}
        checkpoint |= {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        try:
            if RANK == 0:
                self.flush()  # the log has all lines up to this step
                os.fsync(self.log_file.fileno())
                checkpoint |= self.about | {"from_file": self.from_file}
                save_checkpoint(self.out, checkpoint, self.config.keep_checkpoints, self.saved)
            self.saved = step
        except (OSError, RuntimeError) as error:
            # torch raises an error of its own on top of the system's
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or first_line(error)
            say(f"warning: no checkpoint at step {step} ({reason}); {self.newest}, and training continues")
        return time.perf_counter() - began

    @property
    def newest(self):
        """Which checkpoint there is, in words."""
        return "there is no checkpoint" if self.saved is None else f"the last checkpoint is that of step {self.saved}"

    def is_spike(self, loss):
        """Whether a loss is far above the average of the last 50 or so, of which it becomes a part."""
        average = loss if self.loss_average is None else self.loss_average
        self.loss_average = 0.98 * average + 0.02 * loss
        return loss > SPIKE * average

    def log(self, kind, step, **values):
        """Print a record, and append it to the log."""
        say(f"step {step}/{self.config.max_steps}  " + self.shown(kind, step, values))
        if RANK:
            return
        # JSON has no number for ∞ and NaN
        values = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        tokens = step * self.config.tokens_per_step
        record = {"kind": kind, "step": step, "tokens": tokens, "seconds": self.seconds, **values}
        self.unwritten += json.dumps(record).encode() + b"\n"
        try:
            self.flush()
        except OSError as error:
            say(f"warning: {self.out}/log.jsonl cannot be written ({error.strerror}); its lines are kept for later")

    def flush(self):
        """Write the lines of the log that wait."""
        while self.unwritten:
            del self.unwritten[: self.log_file.write(self.unwritten)]

    def shown(self, kind, step, values):
        """A record in words."""
        if kind == "train" and step <= self.start + 1:  # the first step compiles, so its rate says nothing
            values = values | {"tokens_per_s": None, "mfu": None}
        words = [form.format(values[name]) for name, form in SHOWN.items() if values.get(name) is not None]
        if speed := values.get("tokens_per_s"):
            left = (self.config.max_steps - step) * self.config.tokens_per_step / speed
            words.append(f"{format_seconds(self.seconds)} elapsed, {format_seconds(left)} left")
        words += ["spike"] if "spike" in values else []
        text = "  ".join(words)
        return {"train": text, "val": f"val {text}", "bad": f"{text}: not finite, update left out"}[kind]

    def stopped(self, step):
        """Say where a signal stopped the run; returns the exit status."""
        machine.gathered(None)  # the others wait until the first has saved: once they end, torchrun kills it
        state = "checkpoint saved" if self.saved == step else self.newest
        instead = " instead of --resume_from" if self.config.resume_from else ""
        say(f"stopped at step {step}, {state}: the same command with --resume{instead} continues")
        return 128 + (machine.stop or signal.SIGTERM)
