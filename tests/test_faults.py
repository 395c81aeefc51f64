"""What can happen to a run, done to real processes: kills, signals, dead ranks, full disks, damaged files, NaN.

The long ones are marked slow. README's table of faults names these tests.
"""

import contextlib
import json
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

import numpy as np
import pytest
import torch

import train
from data import shard_header
from runs import ROOT, error, launch, log, run


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


def whole(out):
    """A finished run's log has each line once, in order, and its checkpoint can be read."""
    steps = [(record["step"], record["kind"] == "train") for record in log(out)]
    keys = [(record["kind"], record["step"]) for record in log(out)]
    assert len(set(keys)) == len(keys) and [step for step, _ in steps] == sorted(step for step, _ in steps)
    assert not list(out.glob("*.tmp"))
    return torch.load(out / "ckpt.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(config, tmp_path, kills):
    """A checkpoint after every step: a good part of the time is spent in writing one."""
    options = ["--max_steps=60", "--checkpoint_every=1", "--eval_every=10", "--keep_checkpoints=2", "--dim=64"]
    run(config, *options, f"--out={tmp_path}/whole")
    out, rng, done, moments = tmp_path / "killed", random.Random(kills), 0, set()
    while True:
        process = launch(config, *options, f"--out={out}", "--resume")
        if done < kills:
            wait_for(r"^step \d+/60  loss", process, times=rng.randint(1, max(1, 90 // kills)))
            time.sleep(rng.random() * 0.02)
            process.kill()
            status, text = end(process)
            done += status == -signal.SIGKILL
            moments.add(tuple(sorted(path.name for path in out.glob("*.tmp"))))
        else:
            status, text = end(process)
            assert status == 0, text
            break
    assert done == kills
    if kills >= 20:
        assert len(moments) > 1  # some of the kills left half a checkpoint behind
    assert log(out) == log(tmp_path / "whole")
    ends = [whole(folder)["model"] for folder in (out, tmp_path / "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_leftover_temporary_file_is_no_checkpoint(config, tmp_path):
    out = tmp_path / "out" / "tiny"
    run(config, "--max_steps=8")
    (out / "ckpt.pt.tmp").write_bytes((out / "ckpt.pt").read_bytes()[:5000])
    assert "resuming" in run(config, "--resume", "--max_steps=12")
    assert whole(out)["step"] == 12


def test_checkpoints_that_are_kept(config, tmp_path):
    out = tmp_path / "out" / "tiny"
    run(config, "--max_steps=10", "--checkpoint_every=2", "--keep_checkpoints=3")
    names = sorted(path.name for path in out.glob("ckpt*"))
    assert names == ["ckpt.pt", "ckpt_00000006.pt", "ckpt_00000008.pt", "ckpt_00000010.pt"]
    steps = [torch.load(out / name, weights_only=True)["step"] for name in names]
    assert steps == [10, 6, 8, 10]
    assert (out / "ckpt.pt").samefile(out / "ckpt_00000010.pt")  # no more room than three


def test_checkpoints_are_kept_where_files_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        train.save_checkpoint(tmp_path, {"step": step}, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_00000002.pt", "ckpt_00000003.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == (tmp_path / "ckpt_00000003.pt").read_bytes()


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_and_saves(config, tmp_path, number):
    options = ["--max_steps=60", "--checkpoint_every=1000", "--eval_every=1000"]
    run(config, *options, f"--out={tmp_path}/whole")
    out = tmp_path / "stopped"
    process = launch(config, *options, f"--out={out}")
    wait_for("^step 7/60", process)
    process.send_signal(number)
    status, text = end(process)
    assert status == 128 + number
    last = text.splitlines()[-1]
    stopped = int(re.fullmatch(r"stopped at step (\d+), checkpoint saved", last)[1])
    assert 7 <= stopped < 60 and whole(out)["step"] == stopped
    run(config, *options, f"--out={out}", "--resume")
    assert log(out) == log(tmp_path / "whole")


def test_a_signal_during_the_validation(config, tmp_path):
    """It is cut off, and made after the restart."""
    options = ["--max_steps=6", "--decay_steps=2", "--eval_every=3", "--eval_tokens=20000", "--micro_batch_size=1"]
    run(config, *options, f"--out={tmp_path}/whole")
    process = launch(config, *options, f"--out={tmp_path}/out")
    wait_for("^step 6/6  loss", process)
    process.send_signal(signal.SIGTERM)
    status, text = end(process)
    assert status == 143 and "stopped at step 6, checkpoint saved" in text, text
    run(config, *options, f"--out={tmp_path}/out", "--resume")
    assert log(tmp_path / "out") == log(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(config, tmp_path):
    process = launch(config, "--dim=512", "--ffn_dim=6144", "--tokens_per_step=65536", "--micro_batch_size=64")
    wait_for("^step 0/", process)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    status, text = end(process)
    assert status == -signal.SIGINT and time.monotonic() - began < 3


def test_processes_come_and_go_with_the_losses_of_one(config, tmp_path):
    """1 → 2 → 1 processes, each but the last ended by SIGTERM."""
    options = ["--max_steps=60", "--micro_batch_size=2", "--eval_every=1000"]
    run(config, *options, f"--out={tmp_path}/one")
    out = tmp_path / "changing"
    for processes, stop_at in ((1, 10), (2, 30)):
        process = launch(config, *options, f"--out={out}", "--resume", processes=processes)
        wait_for(f"^step {stop_at}/60", process)
        process.send_signal(signal.SIGTERM)
        status, text = end(process)
        assert status == (143 if processes == 1 else 1)  # torchrun's own status
        assert len(re.findall(r"^stopped at step \d+, checkpoint saved$", text, re.M)) == 1, text
    run(config, *options, f"--out={out}", "--resume")
    whole(out)
    for single, changing in zip(log(tmp_path / "one"), log(out), strict=True):
        assert (single["kind"], single["step"]) == (changing["kind"], changing["step"])
        assert changing["loss"] == pytest.approx(single["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------------------ dead ranks


def workers(torchrun):
    """{rank: process number} of a torchrun's train.py processes."""
    found = {}
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{number}/stat") as stat, open(f"/proc/{number}/environ") as environ:
                if int(stat.read().rpartition(")")[2].split()[1]) == torchrun.pid:
                    if rank := re.search(r"\0RANK=(\d+)", "\0" + environ.read()):
                        found[int(rank[1])] = int(number)
    return found


def test_a_dead_rank_ends_the_group(config, tmp_path):
    process = launch(config, "--max_steps=100000", processes=2)
    wait_for("^step 5/", process)
    began = time.monotonic()
    os.kill(workers(process)[1], signal.SIGKILL)
    status, text = end(process, timeout=60)
    assert status == 1 and time.monotonic() - began < 60
    assert re.search(r"rank\s*: 1 ", text) and "exitcode  : -9" in text


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_torchrun_restarts_and_goes_on(config, tmp_path, times):
    """A rank is killed; torchrun --max-restarts starts all again, and they go on from the checkpoint by themselves."""
    run(config, "--max_steps=40", "--micro_batch_size=2", f"--out={tmp_path}/whole", processes=2)
    for number in range(times):
        out = tmp_path / f"out{number}"
        options = ["--max_steps=40", "--micro_batch_size=2", f"--out={out}"]
        process = launch(config, *options, processes=2, torchrun=["--max-restarts=1"])
        wait_for("^step 10/40", process)
        os.kill(workers(process)[number % 2], signal.SIGKILL)
        status, text = end(process, timeout=120)
        assert status == 0 and "resuming" in text, text
        assert log(out) == log(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ NaN

# A config file is Python: it can put a fault into the run that reads it.
POISON = """
import __main__ as _train
_gradient = _train.compute_gradient
_number = -1
def _poisoned(*arguments):
    global _number
    _number += 1
    loss, norm = _gradient(*arguments)
    return {poison}
_train.compute_gradient = _poisoned
"""


def test_one_bad_step_is_left_out(config, tmp_path):
    clean = config.read_text()
    run(config, f"--out={tmp_path}/clean")
    config.write_text(clean + POISON.format(poison='loss, float("inf") if _number == 5 else norm'))
    out = tmp_path / "bad"
    text = run(config, f"--out={out}")
    assert "step 6/12  loss" in text and "not finite, update left out" in text
    records = log(out)
    (bad,) = [record for record in records if record["kind"] == "bad"]
    assert bad["step"] == 6 and bad["grad_norm"] == "inf" and isinstance(bad["loss"], float)
    good, clean = ({(r["kind"], r["step"]): r["loss"] for r in log(f)} for f in (out, tmp_path / "clean"))
    assert all(good["train", step] == clean["train", step] for step in range(1, 6))
    assert ("train", 6) not in good and good["train", 7] != clean["train", 7] and good["val", 12] < good["val", 0]
    # the update that was left out changed nothing: step 7 starts from the weights of step 6
    assert whole(out)["step"] == 12


def test_a_run_that_stays_bad_stops_with_its_last_good_checkpoint(config, tmp_path):
    """The learning rate breaks the weights by an update that is itself finite; no checkpoint of them is kept."""
    out = tmp_path / "out" / "tiny"
    run(config, "--max_steps=6", "--decay_steps=2", "--warmup_steps=0", "--checkpoint_every=1")
    text = run(config, "--resume", "--max_steps=40", "--lr=1e30", "--checkpoint_every=1", status=3)
    assert "not finite 10 times in a row; the last checkpoint is that of step 6" in text.splitlines()[-1]
    assert len([record for record in log(out) if record["kind"] == "bad"]) == 10
    assert whole(out)["step"] == 6
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    run(config, "--resume", "--max_steps=12", "--lr=1e-3")
    assert all(record["kind"] != "bad" for record in log(out)) and log(out)[-1]["step"] == 12


def test_all_processes_leave_out_the_same_step(config, tmp_path):
    """One process alone sees a loss that is not finite."""
    poison = 'float("nan") if _number == 5 and _train.RANK == 1 else loss, norm'
    config.write_text(config.read_text() + POISON.format(poison=poison))
    run(config, "--micro_batch_size=2", f"--out={tmp_path}/two", processes=2)
    assert [(r["kind"], r["loss"]) for r in log(tmp_path / "two") if r["step"] == 6] == [("bad", "nan")]


def test_a_spike_is_flagged(config, tmp_path):
    config.write_text(config.read_text() + POISON.format(poison="loss * (1 + (_number == 7)), norm"))
    text = run(config, "--log_every=5")
    assert [line.endswith("spike") for line in text.splitlines() if re.match(r"step \d+/12  loss", line)] == [
        False,
        False,
        True,  # step 8, out of turn
        False,
        False,
    ]
    records = [record for record in log(tmp_path / "out" / "tiny") if record["kind"] == "train"]
    assert [(record["step"], "spike" in record) for record in records] == [
        (1, False),
        (5, False),
        (8, True),
        (10, False),
        (12, False),
    ]


# ------------------------------------------------------------------------------------------------ full disk


def small_files(size):
    """Lets a process write files of at most `size` bytes: a quota, as it meets it."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_no_room_for_a_checkpoint(config, tmp_path):
    out = tmp_path / "out" / "tiny"
    run(config, "--max_steps=4", "--decay_steps=1")
    before = (out / "ckpt.pt").read_bytes()
    text = run(config, "--resume", "--max_steps=12", status=2, preexec_fn=small_files(len(before) // 2))
    assert "warning: no checkpoint at step 8 (File too large); the last checkpoint is that of step 4, and" in text
    assert "step 12/12  val loss" in text and text.count("error: ") == 1
    assert text.splitlines()[-1].startswith("error: ") and "make room on the disk, then --resume" in text
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    run(config, "--resume", "--max_steps=12")
    assert whole(out)["step"] == 12


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
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == 100
    ballast.unlink()
    status, rest = end(process)
    assert status == 0, text + rest
    assert "No space left on device" in text
    assert whole(out)["step"] == 400
    assert [r["step"] for r in log(out) if r["kind"] == "train"] == list(range(1, 401))  # nothing is missing


def test_no_room_for_shards(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("All work and no play. " * 20000)
    line = [sys.executable, ROOT / "prepare_data.py", source, "--tokenizer=bytes", f"--out={tmp_path}/out"]
    line += ["--shard_tokens=100000"]
    failed = subprocess.run(line, capture_output=True, text=True, preexec_fn=small_files(150_000))
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith("error: "), failed.stderr
    assert "File too large" in failed.stderr and not list((tmp_path / "out").glob("*.tmp.bin"))
    subprocess.run(line, check=True, capture_output=True)
    fresh = [*line[:-2], f"--out={tmp_path}/fresh/out", line[-1]]
    subprocess.run(fresh, check=True, capture_output=True)
    shards = sorted((tmp_path / "out").glob("*.bin"))
    assert len(shards) > 3
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "fresh" / "out" / shard.name).read_bytes()


# ------------------------------------------------------------------------------------------------ damaged files


def test_the_checkpoint_before_is_offered(config, tmp_path, capsys):
    out = tmp_path / "out" / "tiny"
    run(config, "--keep_checkpoints=2")
    damaged = bytearray((out / "ckpt.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / "ckpt.pt").write_bytes(damaged)  # and so ckpt_00000012.pt, which is the same file
    message = error(capsys, config, "--resume", "--keep_checkpoints=2")
    assert f"cp {out}/ckpt_00000008.pt {out}/ckpt.pt" in message
    (out / "ckpt.pt").unlink()
    shutil.copy(out / "ckpt_00000008.pt", out / "ckpt.pt")
    assert "resuming" in run(config, "--resume", "--keep_checkpoints=2")
    assert whole(out)["step"] == 12


def test_a_checkpoint_that_would_run_code_is_refused(config, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    out = tmp_path / "out" / "tiny"
    run(config, "--max_steps=8")
    state = torch.load(out / "ckpt.pt", weights_only=True)
    torch.save(state | {"extra": Evil()}, out / "ckpt.pt")
    assert "ckpt.pt cannot be read" in error(capsys, config, "--resume")
    (out / "ckpt.pt").write_bytes(pickle.dumps(Evil()))
    assert "ckpt.pt cannot be read" in error(capsys, config, "--resume")
    assert not (tmp_path / "executed").exists()


def test_data_that_changed_under_a_run(config, tmp_path, corpus, capsys):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    run(config, "--max_steps=8", f"--data={data}")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    message = error(capsys, config, "--resume", "--max_steps=12", f"--data={data}")
    assert "has changed since the run began: tokenizer were bytes, now gpt2" in message
    (data / "meta.json").unlink()
    assert "has changed since" in error(capsys, config, "--resume", "--max_steps=12", f"--data={data}")
    (data / "meta.json").write_text(json.dumps(meta | {"vocab_size": 100_000}))
    fresh = [config, f"--out={tmp_path}/fresh", f"--data={data}", "--vocab_size=100000"]
    assert "tells of another tokenizer" in error(capsys, *fresh)
    shard = next(data.glob("*_train_*.bin"))
    shard.write_bytes(shard_header(np.dtype("<u2"), 3000) + shard.read_bytes()[1024:7024])
    (data / "meta.json").unlink()
    assert "has changed since" in error(capsys, config, "--resume", "--max_steps=12", f"--data={data}")


# ------------------------------------------------------------------------------------------------ two runs, one folder


def test_two_runs_in_one_folder(config, tmp_path, capsys):
    out = tmp_path / "out" / "tiny"
    process = launch(config, "--max_steps=100000")
    wait_for("^step 5/", process)
    for options in ([], ["--resume"]):
        assert f"another process writes to {out}" in error(capsys, config, *options)
    process.kill()
    end(process)
    assert "resuming" in run(config, "--resume", "--max_steps=100")  # the lock died with its owner


def test_two_preparations_in_one_folder(tmp_path):
    line = [sys.executable, ROOT / "prepare_data.py", "stdlib", f"--out={tmp_path}/out"]
    first = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "out" / "meta.json.tmp").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run(line, capture_output=True, text=True)
    assert second.returncode == 2 and "another process writes to" in second.stderr, second.stderr
    first.kill()
    first.wait()


# ------------------------------------------------------------------------------------------------ preparing


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_prepare_data_killed_at_random_moments(tmp_path, kills):
    """What a rerun writes is byte for byte what an uninterrupted one does."""
    source = tmp_path / "text.jsonl"
    lines = random.Random(0)
    source.write_text("".join(json.dumps({"text": "x" * lines.randint(0, 300)}) + "\n" for _ in range(40_000)))
    line = [sys.executable, str(ROOT / "prepare_data.py"), str(source), "--tokenizer=bytes", "--shard_tokens=200000"]
    subprocess.run([*line, f"--out={tmp_path}/whole/out"], check=True, capture_output=True)
    rng = random.Random(kills)
    out = tmp_path / "out"
    for _ in range(kills):
        process = subprocess.Popen([*line, f"--out={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (out / "meta.json.tmp").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
    subprocess.run([*line, f"--out={out}"], check=True, capture_output=True)
    for folder in (out, tmp_path / "whole" / "out"):
        (folder / "lock").unlink(missing_ok=True)
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole" / "out").iterdir()) and len(names) > 5
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()


# ------------------------------------------------------------------------------------------------ soak


@pytest.mark.slow
def test_soak(config, tmp_path):
    """SOAK_MINUTES (30) of training: memory and speed stay flat, and the log keeps to its size."""
    minutes = float(os.environ.get("SOAK_MINUTES", 30))
    out = tmp_path / "out"
    options = ["--data=" + str(ROOT / "data/stdlib"), "--max_steps=1000000", f"--out={out}", "--eval_every=500"]
    process = launch(ROOT / "configs" / "demo.py", *options, "--eval_tokens=20000", "--log_every=10", threads=2)
    memory = []
    began = time.monotonic()
    while time.monotonic() - began < 60 * minutes:
        assert process.poll() is None, process.stderr.read()
        with open(f"/proc/{process.pid}/statm") as file:
            memory.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)
        time.sleep(5)
    process.send_signal(signal.SIGTERM)
    status, _ = end(process)
    assert status == 143
    speeds = [record["tokens_per_s"] for record in map(json.loads, open(out / "log.jsonl")) if "tokens_per_s" in record]
    third = len(memory) // 3
    print(f"memory {memory[third]:.0f} → {memory[-1]:.0f} MiB; speed by thirds", end=" ")
    parts = np.array_split(np.array(speeds[1:]), 3)
    print([round(float(np.median(part))) for part in parts])
    assert max(memory[third:]) < 1.05 * min(memory[third:])
    assert np.median(parts[2]) > 0.8 * np.median(parts[1])
    assert (out / "log.jsonl").stat().st_size < 400 * len(speeds)
