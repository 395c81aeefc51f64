"""What can happen to a run: kills, signals, dead ranks, full disks and NaN, done to real processes; and files that were
damaged or have changed.

The long ones are marked slow. The table of docs/running.md names these tests.
"""

import _ctypes
import contextlib
import errno
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import train
import xielu
from activations import facts_of, load_derived
from plumbing import files, machine
from plumbing.command import UserError
from plumbing.run import Run, check_facts, save_checkpoint
from runs import ROOT, assert_same_losses, error, free_port, here, launch, log, run, settings_restored
from tools.check import check
from tools.sample import load_run


def wait_for(pattern, process, times=1):
    """Read what a process prints until a line matches, `times` times; the text so far."""
    text = ""
    for line in process.stdout:
        text += line
        times -= bool(re.search(pattern, line))
        if not times:
            return text
    raise AssertionError(text + process.stderr.read())


def end(process, timeout=120):
    """(exit status, what it printed from here on)"""
    stdout, stderr = process.communicate(timeout=timeout)
    return process.returncode, stdout + stderr


STOPPED = r"stopped at step (\d+), checkpoint saved: the same command with --resume continues"


def interrupt(process, pattern, number):
    """Send a signal once a process has printed a line that matches; (exit status, what it prints after that line)."""
    wait_for(pattern, process)
    process.send_signal(number)
    return end(process)


def whole(out):
    """A finished run's log has each line once, in order, and its checkpoint can be read."""
    keys = [(record["kind"], record["step"]) for record in log(out)]
    assert len(set(keys)) == len(keys) and [step for _, step in keys] == sorted(step for _, step in keys)
    assert not list(out.glob("*.tmp"))
    return torch.load(out / "ckpt.pt", weights_only=True)


def assert_same(out, other):
    """Two finished runs have the same losses and weights, bit for bit."""
    assert log(out) == log(other)
    ends = [whole(folder)["model"] for folder in (out, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# A config file is Python: it can put a fault into the process that reads it.
FAULT = """
import __main__ as _train, os as _os, time as _time
_number, _original = -1, _train.{function}
def _faulty(*arguments):
    global _number
    _number += 1
    return {result}
_train.{function} = _faulty
"""


def fault(function, result):
    """The lines of a config file by which `function` of train.py returns another result."""
    return FAULT.format(function=function, result=result)


def faulty(config, lines):
    """A second config file of the same run, with these lines."""
    path = config.with_name("faulty.py")
    path.write_text(config.read_text() + lines)
    return path


# Steps that leave the time to send a signal between them, on any machine
SLOW = fault("compute_gradient", "_time.sleep(0.05) or _original(*arguments)")


def kill(number, function, call, rank=0):
    """The lines by which the process of this rank sends itself a signal in its call number 0, 1, … of a function. Once:
    not after a restart."""
    when = f"_number == {call} and _train.RANK == {rank} and not _train.machine.RESTARTS"
    return fault(function, f"({when} and _os.kill(_os.getpid(), {number:d})) or _original(*arguments)")


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(config, tmp_path, out, kills):
    """A checkpoint after every step: a good part of the time is spent in writing one."""
    options = ["--max_steps=60", "--checkpoint_every=1", "--eval_every=10", "--keep_checkpoints=2", "--dim=64"]
    here(config, *options, f"--out={tmp_path}/whole")
    rng, done, moments = random.Random(kills), 0, set()
    while done < kills:
        process = launch(config, *options, "--resume")
        wait_for(r"^step \d+/60  loss", process, times=rng.randint(1, max(1, 90 // kills)))
        time.sleep(rng.random() * 0.02)
        process.kill()
        done += end(process)[0] == -signal.SIGKILL
        moments.add(tuple(sorted(path.name for path in out.glob("*.tmp"))))
        with open(out / "log.jsonl", "a") as file:
            file.write('[]\n"x"\n{"kind": "val"}\n{"kind": "train", "step": 59, "lo')  # torn by the kill
    here(config, *options, "--resume")
    if kills >= 20:
        assert len(moments) > 1  # some of the kills left half a checkpoint behind
    assert_same(out, tmp_path / "whole")


def test_a_leftover_temporary_file_is_no_checkpoint(config, out):
    here(config, "--max_steps=8")
    (out / "ckpt.pt.tmp").write_bytes((out / "ckpt.pt").read_bytes()[:5000])
    assert "resuming" in here(config, "--resume", "--max_steps=12")
    assert whole(out)["step"] == 12


def test_checkpoints_are_kept_where_files_cannot_be_linked_or_were_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError("Operation not permitted")))
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step}, 2, step - 1 or None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_00000002.pt"]
    assert [torch.load(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt_00000002.pt")] == [3, 2]
    (tmp_path / "ckpt.pt").unlink()  # while the run goes on
    save_checkpoint(tmp_path, {"step": 4}, 2, 3)
    assert torch.load(tmp_path / "ckpt.pt")["step"] == 4


def test_killed_while_the_compiler_writes(config, tmp_path, monkeypatch):
    """What is cut off in its cache is removed before anything is compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(xielu, "can_compile", lambda device: False)
    whole = Path(_ctypes.__file__).read_bytes()
    (tmp_path / "ab").mkdir()
    for compile_something in (partial(here, config, "--compile", "--max_steps=7"), partial(check, ["math:gcd"])):
        for number, content in enumerate((whole, whole[:-1], bytes(2000), b"")):
            (tmp_path / "ab" / f"c{number}.main.so").write_bytes(content)
        compile_something()
        assert [path.name for path in (tmp_path / "ab").iterdir()] == ["c0.main.so"]


@pytest.mark.slow
def test_what_was_cut_off_is_compiled_again(config, tmp_path, monkeypatch):
    """Here that is PyTorch's first try, and no part of the model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = faulty(config, "import __main__ as _m\n_m.Llama.compile_parts = lambda self: None\n")
    for steps in (7, 8):
        assert "does not work" not in run(config, "--compile", "--resume", f"--max_steps={steps}")
        libraries = list((tmp_path / "cache").glob("*/*.so"))
        assert libraries and not any(map(machine.is_cut_off, libraries))
        for path, cut in zip(libraries, itertools.cycle((-1, 0))):
            path.write_bytes(path.read_bytes()[:cut])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize("module", ["train", "tools.sample"])
def test_threads_do_not_spin_while_they_wait(module):
    """On a busy machine they would keep each other from computing."""
    command = [sys.executable, "-c", f"import {module}"]
    environment = os.environ | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_WAIT_POLICY", None)
    assert "GOMP_SPINCOUNT = '0'" in subprocess.run(command, env=environment, capture_output=True, text=True).stderr


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_and_saves(config, tmp_path, out, number):
    options = ["--max_steps=60", "--checkpoint_every=1000", "--eval_every=1000"]
    here(config, *options, f"--out={tmp_path}/whole")
    status, text = interrupt(launch(faulty(config, SLOW), *options), "^step 7/60", number)
    assert status == 128 + number
    step = int(re.fullmatch(STOPPED, text.splitlines()[-1])[1])
    assert 7 <= step < 60 and whole(out)["step"] == step
    here(config, *options, "--resume")
    assert log(out) == log(tmp_path / "whole")


def test_a_signal_during_the_validation(config, tmp_path, out):
    """It is cut off, and made after the restart: first that of step 3, then the last."""
    options = ["--max_steps=6", "--decay_steps=2", "--eval_every=3"]
    here(config, *options, f"--out={tmp_path}/whole")
    killed = faulty(config, kill(signal.SIGTERM, "evaluate", call=1))
    for step in (3, 6):
        text = run(killed, *options, "--resume", status=143)
        assert re.fullmatch(STOPPED, text.splitlines()[-1])[1] == str(step)
        assert log(out)[-1]["step"] == step and step not in [r["step"] for r in log(out) if r["kind"] == "val"]
    here(config, *options, "--resume")
    assert log(out) == log(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(config):
    """Even in a step that never ends."""
    process, signals = launch(faulty(config, fault("compute_gradient", "_time.sleep(600)"))), 0
    wait_for("^step 0/", process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        signals += 1
    assert signals >= 2 and process.returncode == -signal.SIGINT
    end(process)


def test_processes_come_and_go_with_the_losses_of_one(config, tmp_path, out):
    """1 → 2 → 2 → 1 processes, which a signal stops: to them, to torchrun, and one that kills torchrun."""
    options = ["--max_steps=60", "--micro_batch_size=2", "--eval_every=1000"]
    here(config, *options, f"--out={tmp_path}/one")
    for processes, stop_at, number, expected in ((1, 10, 15, 143), (2, 20, 15, 1), (2, 30, 9, -9)):
        process = launch(faulty(config, SLOW), *options, "--resume", processes=processes)
        status, text = interrupt(process, f"^step {stop_at}/60", number)
        assert status == expected
        assert len(re.findall(f"^{STOPPED}$", text, re.M)) == 1, text
    here(config, *options, "--resume")
    whole(out)
    assert_same_losses(out, tmp_path / "one", rel=1e-5)


# ------------------------------------------------------------------------------------------------ dead ranks


def test_a_dead_rank_ends_the_group(config):
    killed = faulty(config, kill(signal.SIGKILL, "compute_gradient", call=5, rank=1))
    process = launch(killed, "--max_steps=100000", processes=2)
    wait_for("^step 5/", process)
    status, text = end(process, timeout=60)
    assert status == 1 and re.search(r"rank\s*: 1 ", text) and "exitcode  : -9" in text


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_torchrun_restarts_and_goes_on(config, tmp_path, times):
    """A rank is killed; torchrun --max-restarts starts all again, and they continue from the checkpoint."""
    options = ["--max_steps=40", "--micro_batch_size=2"]
    run(config, *options, f"--out={tmp_path}/whole", processes=2)
    for number in range(times):
        killed = faulty(config, kill(signal.SIGKILL, "compute_gradient", call=10 + number, rank=number % 2))
        out = tmp_path / f"out{number}"
        text = run(killed, *options, f"--out={out}", processes=2, torchrun=["--max-restarts=1"])
        assert f"resuming {out} at step" in text
        assert log(out) == log(tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_restart_together(config, tmp_path, out, monkeypatch):
    """A rank dies while the others hang, as with NCCL. torchrun counts a restart on the node of the dead rank alone."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as in docs/running.md's script
    once = f"""
def _die_or_hang(number):
    mark = "{tmp_path}/rank%d" % _train.RANK
    if number == 5 and not _os.path.exists(mark):
        _os.mkdir(mark)
        _time.sleep(600 if _train.RANK else 2)
        _os.kill(_os.getpid(), 9)
"""
    faults = faulty(config, once + fault("compute_gradient", "_die_or_hang(_number) or _original(*arguments)"))
    endpoint = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    torchrun = ["--nnodes=2", "--rdzv_backend=c10d", endpoint, "--max-restarts=3"]
    nodes = [launch(faults, "--micro_batch_size=2", "--resume", processes=2, torchrun=torchrun) for _ in range(2)]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and f"resuming {out} at step 4" in "".join(texts)
    whole(out)


# ------------------------------------------------------------------------------------------------ NaN


@pytest.fixture
def poison(monkeypatch):
    """poison(change): the gradient number 0, 1, … of this process's next run gives change(number, loss, norm)."""
    gradient = train.compute_gradient

    def apply(change):
        numbers = itertools.count()
        monkeypatch.setattr(train, "compute_gradient", lambda *values: change(next(numbers), *gradient(*values)))

    return apply


def test_one_bad_step_is_left_out(config, tmp_path, out, poison):
    here(config, f"--out={tmp_path}/clean")
    poison(lambda number, loss, norm: (loss, math.inf if number == 5 else norm))
    text = here(config)
    assert "step 6/12  loss" in text and "not finite, update left out" in text
    (bad,) = [record for record in log(out) if record["kind"] == "bad"]
    assert bad["step"] == 6 and bad["grad_norm"] == "inf" and isinstance(bad["loss"], float)
    good, clean = ({(r["kind"], r["step"]): r["loss"] for r in log(f)} for f in (out, tmp_path / "clean"))
    assert all(good["train", step] == clean["train", step] for step in range(1, 6))
    assert ("train", 6) not in good and good["train", 7] != clean["train", 7] and good["val", 12] < good["val", 0]
    # the update that was left out changed nothing: step 7 starts from the weights of step 6
    assert whole(out)["step"] == 12


def test_a_run_that_stays_bad_stops_with_its_last_good_checkpoint(config, out):
    """The learning rate breaks the weights by an update that is itself finite; no checkpoint of them is kept."""
    here(config, "--max_steps=6", "--decay_steps=2", "--warmup_steps=0", "--checkpoint_every=1")
    text = here(config, "--resume", "--max_steps=40", "--lr=1e30", "--checkpoint_every=1", status=3)
    assert "not finite 10 times in a row; the last checkpoint is that of step 6" in text.splitlines()[-1]
    assert len([record for record in log(out) if record["kind"] == "bad"]) == 10
    assert whole(out)["step"] == 6
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    here(config, "--resume", "--max_steps=12", "--lr=1e-3")
    assert all(record["kind"] != "bad" for record in log(out)) and log(out)[-1]["step"] == 12


def test_all_processes_leave_out_the_same_step(config, out):
    """One process alone sees a loss that is not finite."""
    loss = 'float("nan") if _number == 5 and _train.RANK == 1 else loss'
    poisoned = fault("compute_gradient", f"[({loss}, norm) for loss, norm in [_original(*arguments)]][0]")
    run(faulty(config, poisoned), "--micro_batch_size=2", processes=2)
    assert [(r["kind"], r["loss"]) for r in log(out) if r["step"] == 6] == [("bad", "nan")]


def test_a_spike_is_flagged(config, out, poison):
    poison(lambda number, loss, norm: (loss * (1 + (number == 7)), norm))
    text = here(config, "--log_every=5")
    flags = [line.endswith("spike") for line in text.splitlines() if re.match(r"step \d+/12  loss", line)]
    steps = [(r["step"], "spike" in r) for r in log(out) if r["kind"] == "train"]
    assert steps == [(1, False), (5, False), (8, True), (10, False), (12, False)]  # step 8, out of turn
    assert flags == [flag for _, flag in steps]


# ------------------------------------------------------------------------------------------------ full disk


def test_no_room_for_a_checkpoint(config, out):
    here(config, "--max_steps=4", "--decay_steps=1")
    before = (out / "ckpt.pt").read_bytes()

    def limited():  # a quota, as the process meets it
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))

    text = run(config, "--resume", "--max_steps=12", status=2, preexec_fn=limited)
    assert "warning: no checkpoint at step 8 (File too large); the last checkpoint is that of step 4, and" in text
    assert "step 12/12  val loss" in text and text.count("error: ") == 1
    assert text.splitlines()[-1].startswith("error: ") and "make room on the disk, then --resume" in text
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    # in the last validation, after the last checkpoint has failed
    killed = faulty(config, kill(signal.SIGTERM, "evaluate", call=0))
    text = run(killed, "--resume", "--max_steps=12", "--eval_every=1000", status=143, preexec_fn=limited)
    assert "warning: no checkpoint at step 12" in text and "checkpoint saved" not in text
    assert "stopped at step 12, the last checkpoint is that of step 4: the same command with --resume" in text
    here(config, "--resume", "--max_steps=12")
    assert whole(out)["step"] == 12


def test_no_checkpoint_is_ahead_of_the_log(config, out, monkeypatch):
    """A kill would lose the lines between. Here the disk has no room for the line of step 8 until the next one."""
    write = Run.flush

    def flush(run):
        if b'"step": 8,' in run.unwritten and b'"step": 9,' not in run.unwritten:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(run)

    monkeypatch.setattr(Run, "flush", flush)
    text = here(config)
    assert "warning: no checkpoint at step 8 (No space left on device); the last checkpoint is that of step 4" in text
    assert [record["step"] for record in log(out) if record["kind"] == "train"] == list(range(1, 13))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(config, small_disk):
    """It fills while the run goes on, log and all, and has room again before its end."""
    out, ballast = small_disk / "out", small_disk / "ballast"
    process = launch(config, "--max_steps=400", "--checkpoint_every=50", "--eval_every=1000", f"--out={out}")
    text = wait_for("^step 120/", process)
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    text += wait_for("warning: no checkpoint", process)
    last = int(re.search(r"the last checkpoint is that of step (\d+), and", text)[1])
    assert last >= 100 and torch.load(out / "ckpt.pt", weights_only=True)["step"] == last
    ballast.unlink()
    status, rest = end(process)
    assert status == 0, text + rest
    assert "No space left on device" in text
    assert whole(out)["step"] == 400
    assert [r["step"] for r in log(out) if r["kind"] == "train"] == list(range(1, 401))  # nothing is missing


@pytest.mark.slow
def test_a_disk_that_fills_while_the_model_is_compiled(config, small_disk, monkeypatch):
    """There is room for what PyTorch's first try writes, and not for a layer."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(small_disk))
    (small_disk / "ballast").write_bytes(bytes(2**20 - 300_000))
    text = run(config, "--compile", status=2)
    assert "\nerror: OSError: [Errno 28] No space left on device: make room (compiled code is in TORCH" in text
    assert text.count("Error: ") == 1 and "Traceback" not in text


# ------------------------------------------------------------------------------------------------ damaged files


def test_the_checkpoint_before_is_offered(config, out, capsys):
    here(config, "--keep_checkpoints=3")
    names = sorted(path.name for path in out.glob("ckpt*"))
    assert names == ["ckpt.pt", "ckpt_00000004.pt", "ckpt_00000008.pt"]
    assert [torch.load(out / name, weights_only=True)["step"] for name in names] == [12, 4, 8]
    damaged = bytearray((out / "ckpt.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / "ckpt.pt").write_bytes(damaged)
    assert "continue from an older one with --resume_from=8" in error(capsys, config, "--resume")
    (out / "ckpt_00000008.pt").write_bytes(damaged)
    assert "--resume_from=4" in error(capsys, config, "--resume")
    (out / "ckpt.pt").unlink()  # somebody deleted it
    assert "ckpt.pt cannot be read (No such file" in (message := error(capsys, config, "--resume"))
    assert "--resume_from=4" in message
    assert "--resume_from=4" in error(capsys, config, "--resume_from=8")
    assert "choose another --out" in error(capsys, config, "--resume_from=2")
    here(config, "--resume_from=4", "--keep_checkpoints=1")
    assert "leave out --resume_from to continue" in error(capsys, config, "--resume_from=4")


def test_going_back_loses_nothing(config, tmp_path, out):
    """The run continues from the older checkpoint as it did before. What it had written is kept apart, and no
    checkpoint of one line is taken for one of the other."""
    options = ["--keep_checkpoints=3", "--resume"]
    here(config, *options)
    newest, log_before = (out / "ckpt.pt").read_bytes(), log(out)
    text = here(config, *options, "--resume_from=8", "--max_steps=10", "--decay_steps=2")
    assert "going back to step 8" in text and "resuming" in text and whole(out)["step"] == 10
    assert (out / "left_1" / "ckpt.pt").read_bytes() == newest
    assert sorted(path.name for path in out.glob("ckpt*")) == ["ckpt.pt", "ckpt_00000004.pt", "ckpt_00000008.pt"]
    assert [record["step"] for record in log(out) if record["kind"] == "train"] == list(range(1, 11))
    left = [json.loads(line) for line in (out / "left_1" / "log.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in left] == [record["loss"] for record in log_before]
    here(config, *options, "--resume_from=4", "--max_steps=12", "--decay_steps=4")  # past a checkpoint of this line
    assert log(out) == log_before and (out / "left_2" / "ckpt_00000008.pt").exists()
    assert (out / "left_1" / "ckpt.pt").read_bytes() == newest


def test_a_restart_by_torchrun_goes_back_once(config, out, monkeypatch):
    options = ["--keep_checkpoints=3", "--resume_from=4"]
    here(config, "--keep_checkpoints=3")
    here(config, *options, "--max_steps=10", "--decay_steps=2")
    monkeypatch.setattr("plumbing.run.RESTARTS", 1)
    assert "is finished: step 10 of 10" in here(config, *options) and not (out / "left_2").exists()
    monkeypatch.undo()
    here(config, "--resume", "--max_steps=12")
    assert json.loads((out / "config.json").read_text())["config"]["resume_from"] == 0


def test_a_restart_by_torchrun_resumes_what_the_command_began(config, out, monkeypatch, capsys):
    """And not the run because of which the command was refused."""
    here(config, "--max_steps=8")
    monkeypatch.setattr("plumbing.run.RESTARTS", 1)
    for other in ("--lr=1e-4", "--dtype=bfloat16"):
        assert f"{out} already holds a run" in error(capsys, config, "--max_steps=8", other)
    assert "is finished: step 8 of 8" in here(config, "--max_steps=8")


def test_extending_a_run_whose_learning_rate_has_fallen(config, out):
    here(config, "--keep_checkpoints=3")  # it falls from step 8 on
    text = here(config, "--resume", "--max_steps=20", "--keep_checkpoints=3")
    assert "note: the learning rate has fallen since step 8," in text and "go back with  --resume_from=8" in text
    assert "note: the learning rate" not in here(config, "--resume", "--resume_from=16", "--max_steps=24")


def test_a_checkpoint_that_cannot_be_read(config, tmp_path, out, capsys):
    """Damaged, foreign, of another version, or made to run code."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    here(config, "--max_steps=8")
    path = out / "ckpt.pt"
    good, state, before = path.read_bytes(), torch.load(path, weights_only=True), log(out)
    for bad in (good[:1000], b"", pickle.dumps(Evil())):
        path.write_bytes(bad)
        assert "ckpt.pt cannot be read" in error(capsys, config, "--resume")
    older = [state | {"version": version} for version in (None, state["version"] - 1)]
    for foreign in ({}, [1], {"model": {}, "step": 3}, state | {"extra": Evil()}, *older):
        torch.save(foreign, path)
        message = error(capsys, config, "--resume")
        assert "ckpt.pt cannot be read" in message and ("version" in message or foreign not in older)
    assert not (tmp_path / "executed").exists() and log(out) == before


def replaced(tree, path, value):
    """Nested dicts and lists in which what is at a path is another value, or gone if that is GONE."""
    name, *rest = path
    tree = tree.copy()
    tree[name] = replaced(tree[name], rest, value) if rest else value
    if value is GONE and not rest:
        del tree[name]
    return tree


GONE = object()
HOSTILE = ["text", "a\0.py", [1], {"a": 1}, torch.ones(3), torch.zeros(0), math.nan, -1, 10**400, None, GONE]
PLACES = [[name] for name in ("step", "seconds", "loss_average", "config", "from_file", "facts", "model", "optimizers")]
PLACES += [["config", "dim"], ["config", "lr"], ["config", "activation"], ["from_file", "lr"], ["facts", "tokenizer"]]
PLACES += [["facts", "what xielu computes"], ["model", "layers.0.mlp.up_proj.weight"], ["optimizers", 1]]
PLACES += [["optimizers", 0, "state"], ["optimizers", 0, "state", 0], ["optimizers", 0, "state", 0, "step"]]
PLACES += [["optimizers", 0, "state", 0, "exp_avg"], ["optimizers", 1, "state", 0, "momentum_buffer"]]


def test_a_checkpoint_with_anything_in_it(config, out, capsys):
    """One line and status 2 where it cannot be used; never another exception, in train or in sample."""
    options = ["--activation=xielu", "--optimizer=muon", "--resume"]
    here(config, *options, "--max_steps=7")
    state = torch.load(out / "ckpt.pt", weights_only=True)
    used = Counter()
    not_finite = ["model", "norm.weight"], torch.full_like(state["model"]["norm.weight"], math.nan)
    for place, value in (*itertools.product(PLACES, HOSTILE), not_finite):
        torch.save(replaced(state, place, value), out / "ckpt.pt")
        with contextlib.suppress(UserError):
            load_run(out, "cpu", torch.float32)
        with settings_restored():
            status = train.main([str(config), *options, "--max_steps=8"])
        stderr = capsys.readouterr().err
        assert (status, stderr[:7], stderr.count("\n")) in ((2, "error: ", 1), (0, "", 0)), (place, value, stderr)
        used[place[-1]] += not status
    # what need not be there, other facts, and another lr in the config file of then
    assert +used == {"loss_average": 1, "lr": 3, "facts": 1, "tokenizer": 1, "what xielu computes": 1}


# ------------------------------------------------------------------------------------------------ what has changed


def stopped(config, out, *options):
    """A finished run; in `out` is the same one, stopped at step 8."""
    here(config, *options, "--keep_checkpoints=2")
    finished = shutil.copytree(out, out.with_name("finished"))
    (out / "ckpt_00000008.pt").replace(out / "ckpt.pt")
    return finished


def test_data_that_changed_under_a_run(config, tmp_path, out, corpus, capsys, monkeypatch):
    """They are refused, and the run stays as it was; in a folder that was moved, they are the same. (test_data.py has
    all that can change.)"""
    data = shutil.copytree(corpus, tmp_path / "data")
    finished = stopped(config, out, f"--data={data}")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    path = next(data.glob("*_train_*"))
    shard = path.read_bytes()
    path.write_bytes(shard[:1024] + np.frombuffer(shard[1024:], "<u2")[::-1].tobytes())
    message = f"training shards changed since the run in {out} began: restore what it began with"
    assert message in error(capsys, config, "--resume")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    path.write_bytes(shard)
    data.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert "resuming" in here(config, "--resume", "--data=./moved")
    assert_same(out, finished)


def test_a_run_with_dropout_and_muon(config, out, tmp_path):
    """It resumes exactly, whatever the optimizer keeps, and nothing is dropped in validation."""
    path = tmp_path / "dropped.py"
    path.write_text("""
import torch
from activations import Activation, ReLUSquared
ACTIVATION = Activation("relu2, half of it dropped", lambda: torch.nn.Sequential(ReLUSquared(), torch.nn.Dropout(0.5)))
""")
    here(config, "--activation=relu2")
    whole_loss = log(out)[0]
    shutil.rmtree(out)
    finished = stopped(config, out, f"--activation={path}", "--optimizer=muon")
    assert log(finished)[0] == whole_loss
    here(config, "--resume")
    assert_same(out, finished)


# A file of its own that holds xIELU
COPY = (ROOT / "xielu.py").read_text("utf-8").replace("COMPILE = True", "COMPILE = False")
COPY += "\nfrom activations import Activation\nACTIVATION = Activation('the integral', XIELU)\n"


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """edited(old, new): that file with one change, which the next run reads, as another process would."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would hide a change within a second

    def edit(old, new):
        assert old in COPY
        (tmp_path / "copy.py").write_text(COPY.replace(old, new), "utf-8")
        load_derived.cache_clear()
        return tmp_path / "copy.py"

    return edit


def test_an_activation_that_changed_under_a_run(config, out, edited, capsys, monkeypatch):
    evaluate, path = train.evaluate, edited("", "")

    def edited_meanwhile(*arguments):
        edited("2 * alpha_p * z", "3 * alpha_p * z")
        return evaluate(*arguments)

    with monkeypatch.context() as patch:  # what counts is the code that the run began with
        patch.setattr(train, "evaluate", edited_meanwhile)
        finished = stopped(config, out, f"--activation={path}")
    assert "what copy computes changed since the run in" in error(capsys, config, "--resume")
    edited("the integral", "ours")
    assert "the formula of copy changed since the run in" in error(capsys, config, "--resume")
    edited("# The table, row by row", "# So")
    here(config, "--resume")
    assert_same(out, finished)


def test_what_an_activation_computes(edited):
    """Its values and gradients count, and not the code that computes them."""
    began = list(facts_of(str(edited("", ""))).values())
    for old, new, changed in [
        ("def xielu_reference(", "def renamed(", False),
        ("float64: (0.5, 15)", "float64: (0.25, 15)", False),
        ("float32: (0.5, 8)", "float32: (0.5, 9)", False),
        ("math.log2(math.e)", "1.44", True),
        ("2 * alpha_p * z", "3 * alpha_p * z", True),
        ("(alpha_p * positive + beta) * positive", "(alpha_p * positive - beta) * positive", True),
        ("raw_parameter(alpha_p)", "raw_parameter(alpha_p, 0.1)", True),
    ]:
        now = list(facts_of(str(edited(old, new))).values())
        with pytest.raises(UserError) if changed else contextlib.nullcontext():
            check_facts(dict(zip("ab", began)), dict(zip("ab", now)), "out")


# ------------------------------------------------------------------------------------------------ two runs, one folder


def test_a_disk_without_locks(config, out, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    assert f"warning: {out} is on a disk without locks (No locks available)" in here(config)
    assert whole(out)["step"] == 12
    monkeypatch.setattr(files, "fcntl", None)
    assert f"warning: Windows does not lock folders: start one run in {out} at a time" in here(config, "--resume")


def test_two_runs_in_one_folder(config, out, capsys):
    process = launch(config, "--max_steps=100000")
    wait_for("^step 5/", process)
    for options in ([], ["--resume"]):
        assert f"another process writes to {out}" in error(capsys, config, *options)
    process.kill()
    end(process)
    steps = torch.load(out / "ckpt.pt", weights_only=True)["step"] + 4
    assert "resuming" in here(config, "--resume", f"--max_steps={steps}")  # the lock died with its owner


# ------------------------------------------------------------------------------------------------ soak


@pytest.mark.slow
def test_soak(config):
    """SOAK_MINUTES (30) of training: its memory stays flat. It prints little, since nobody reads that meanwhile."""
    options = ["--max_steps=1e9", "--log_every=1e9", "--eval_every=1e4", "--checkpoint_every=1e4"]
    process, memory = launch(config, *options), []
    for _ in range(12 * int(os.environ.get("SOAK_MINUTES", 30))):
        time.sleep(5)
        memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 143
    late = memory[len(memory) // 3 :]
    assert max(late) < 1.05 * min(late)
