"""tools/compare.py: its grid, its statistics, and whole comparisons that are cut off, killed and continued."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import machine
from command import UserError
from identity import describe
from runs import ROOT, TINY, here
from tools import compare
from tools.compare import Run, interval_of, mean, read_grid, report, summarize, verdict


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "tiny.py"
    changes = {"activation": "xielu", "max_steps": 80, "eval_every": 40, "data": str(corpus)}
    path.write_text(TINY + "".join(f"{name} = {value!r}\n" for name, value in changes.items()))
    return str(path)


def launch(output, *arguments):
    """A comparison in a process of its own, whose output goes to a file."""
    command = [sys.executable, "-m", "tools.compare", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(output, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def in_this_process(run, *_):
    """Instead of compare.execute, where nothing is tested of processes."""
    return 0, here(*run.arguments)


def without_speed(out):
    """What must be the same for the same losses: the three files without tokens per second."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert all(row.pop("tokens_per_s") > 0 for row in rows)
    table = re.sub(r",[^,\n]*$", "", (out / "results.csv").read_text(), flags=re.M)
    text = re.sub(r"\|[^|\n]*\|$", "|", (out / "results.md").read_text(), flags=re.M)
    return rows, table, text


# ------------------------------------------------------------------------------------------------ statistics


def test_interval_is_students():
    for df, t in {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 1000: 1.9623}.items():
        values = np.random.default_rng(df).normal(size=df + 1).tolist()
        half = t * np.std(values, ddof=1) / math.sqrt(df + 1)
        assert interval_of(values) == pytest.approx([np.mean(values) - half, np.mean(values) + half], abs=5e-5)
    assert interval_of([0.0, 0.0]) == [0.0, 0.0]
    assert interval_of([1.5]) is None and interval_of([]) is None and mean([]) is None


@pytest.mark.parametrize(
    "difference, interval, words",
    [
        (0.5, None, "one seed"),
        (0.5, [-0.1, 1.1], "contains zero"),
        (0.5, [0.0, 1.0], "contains zero"),
        (0.5, [0.4, 0.6], "does not contain zero: its loss is higher"),
        (-0.5, [-0.6, -0.4], "does not contain zero: its loss is lower"),
        (0.0, [0.0, 0.0], "equal for every seed"),
    ],
)
def test_verdict(difference, interval, words):
    row = {"name": "b", "reference": "a", "difference": difference, "interval": interval, "paired_seeds": [1, 2]}
    assert words in verdict(row) and verdict(row).startswith("b − a: ")


def fake_runs(fake_run, losses, **keys):
    """Runs of {activation: {seed: final loss}}, each in a folder of its own."""
    runs = []
    for activation, by_seed in losses.items():
        for seed, loss in by_seed.items():
            _, config = fake_run(activation, seed, [5.0, 4.0, loss], folder=f"{activation}-{seed}-{keys}", **keys)
            runs.append(Run({"activation": activation, **keys}, config, [], 1000, 6000))
    return runs


def test_table(fake_run):
    losses = {
        "xielu": {1: 2.0, 2: 3.0, 3: 4.0},
        "relu2": {1: 2.1, 2: 3.3, 3: 4.2},  # differences 0.1, 0.3, 0.2
        "swiglu": {1: 2.5, 3: 3.5},  # a seed is missing: differences 0.5, −0.5
        "gelu": {2: float("nan")},
    }
    xielu, relu2, swiglu = summarize(fake_runs(fake_run, losses))  # what diverged has no row
    assert (xielu["loss"], xielu["loss_std"], xielu["difference"], xielu["interval"]) == (3.0, 1.0, None, None)
    assert xielu["perplexity"] == pytest.approx(math.exp(3)) and xielu["bits_per_byte"] == pytest.approx(1.5)
    assert xielu["tokens_per_s"] == 115.0  # the median of what the log says after the first step
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert [relu2["difference"], *relu2["interval"]] == pytest.approx([0.2, 0.2 - half, 0.2 + half])
    assert swiglu["seeds"] == swiglu["paired_seeds"] == [1, 3] and swiglu["difference"] == pytest.approx(0)
    assert swiglu["interval"] == pytest.approx([-12.7062 * 0.5, 12.7062 * 0.5], rel=1e-4)
    text = report([xielu, relu2, swiglu], {"gelu-seed=2": "its last validation loss is not finite"})
    assert "| 3.2000 ± 1.0536 |" in text and "+0.2000 [-0.0484, +0.4484]" in text
    assert "- relu2 − xielu: +0.2000" in text and text.count("contains zero") == 2
    assert "gelu-seed=2 is not in the table: its last validation loss is not finite" in text
    assert "over 3 seeds" in text and "over 2 seeds" in text
    lengths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(lengths) == 1  # aligned


def test_other_keys_make_rows_and_compare_like_with_like(fake_run):
    runs = fake_runs(fake_run, {"xielu": {1: 2.0, 2: 2.0}, "relu2": {1: 2.5, 2: 2.5}}, lr=0.001)
    runs += fake_runs(fake_run, {"xielu": {1: 1.0, 2: 1.0}, "relu2": {1: 1.25, 2: 1.25}}, lr=0.002)
    rows = {row["name"]: row for row in summarize(runs)}
    assert list(rows) == ["xielu lr=0.001", "relu2 lr=0.001", "xielu lr=0.002", "relu2 lr=0.002"]
    assert rows["relu2 lr=0.001"]["difference"] == 0.5 and rows["relu2 lr=0.002"]["difference"] == 0.25
    assert rows["xielu lr=0.002"]["difference"] is None
    alone = [run for run in runs if run.config.activation == "relu2"]
    rows = {row["name"]: row for row in summarize(alone)}  # with one activation, all are compared with the first row
    assert rows["relu2 lr=0.002"]["difference"] == -1.25 and rows["relu2 lr=0.002"]["reference"] == "relu2 lr=0.001"


def test_what_is_printed_of_each_run(fake_run, monkeypatch, capsys):
    """A final loss counts, whatever the status; the rest is expected to be as fast as the run that has just ended."""
    first, done, last = fake_runs(fake_run, {"relu2": {1: 3.0, 2: 3.0, 3: float("nan")}})
    last = replace(last, flops_per_token=2 * first.flops_per_token)
    for run in (first, last):
        (run.out / "log.jsonl").rename(run.out / "hidden")

    def fails_at_the_end(run, *_):
        (run.out / "hidden").rename(run.out / "log.jsonl")
        return 1, "the end"

    monkeypatch.setattr(compare, "execute", fails_at_the_end)
    assert compare.run_all([first, done, last], 1, None) == {last.out.name: "it failed with status 1"}
    lines = capsys.readouterr().out.splitlines()
    # 2 × 20,000 tokens at 115 per second
    assert lines[0] == f"[1/3] {first.out.name}: val loss 3.0000 after 0m00s, 5m47s left in all"
    assert lines[1] == f"[2/3] {done.out.name}: finished before"
    assert lines[2].startswith(f"[3/3] {last.out.name}: after 0m00s it failed with status 1: the end (its whole")


# ------------------------------------------------------------------------------------------------ grid


def test_grid(config, tmp_path):
    runs = read_grid([config, "--activation=xielu,swiglu", "--lr=1e-3,0.002", "--seed=2,1"], tmp_path, 1)
    activations = ("xielu-lr=0.001", "xielu-lr=0.002", "swiglu-lr=0.001", "swiglu-lr=0.002")
    assert [run.out.name for run in runs] == [f"{name}-seed={seed}" for seed in (2, 1) for name in activations]
    assert runs[3].case == {"activation": "swiglu", "lr": 0.002} and runs[3].config.seed == 2
    assert runs[0].parameters == runs[2].parameters + 4  # two scalars per layer
    assert runs[0].flops_per_token == runs[2].flops_per_token
    (only,) = read_grid([config], tmp_path, 1)
    assert only.out.name == "xielu-seed=42" and only.case == {"activation": "xielu"}


def test_one_dtype_for_all_runs(config, tmp_path, monkeypatch):
    """What dtype=auto takes may change with the load of the machine, but not within a comparison."""
    measured = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr(machine, "faster_dtype", lambda: (next(measured), "measured"))
    grid = [config, "--dtype=auto", "--activation=relu2,xielu"]
    runs = compare.share_dtype(read_grid(grid, tmp_path, 1))
    assert all(run.config.dtype == "bfloat16" and "--dtype=bfloat16" in run.arguments for run in runs)
    runs[0].out.mkdir()
    (runs[0].out / "config.json").write_text(json.dumps({"config": vars(runs[0].config)}))
    assert compare.share_dtype(read_grid(grid, tmp_path, 1)) == runs
    asked = read_grid([config, "--dtype=float32"], tmp_path, 1)
    assert compare.share_dtype(asked) == asked


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--activation=xielu,swigul"], "did you mean 'swiglu'"),
        (["--activation=relu2,relu2"], "relu2-seed=42 is given twice"),
        (["--seed=1,2,01"], "is given twice"),
        (["--activations=relu2"], "unknown key 'activations'"),
        (["--seed=1,"], "seed must be a whole number, not ''"),
        (["--dry_run=yes"], "--dry_run: ignored explicit argument 'yes'"),
        (["--nproc_per_node=0"], "--nproc_per_node: must be a whole number of at least 1, not '0'"),
        (["--nproc_per_node=3"], "does not divide"),
        (["--dim=32,64"], "differ by"),
        (["--ffn_dim=50", "--activation=relu2,swiglu"], "does not divide by 3"),
        (["more.py"], "give one config file"),
        (["--data=nowhere"], "there is no data folder nowhere"),
    ],
)
def test_mistakes(config, tmp_path, capsys, arguments, message):
    assert compare.main([config, *arguments, f"--out={tmp_path}/out"]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()


def test_dry_run(config, tmp_path, capsys):
    grid = [config, "--activation=xielu,relu2,swiglu", "--seed=1,2", f"--out={tmp_path}/out", "--dry_run"]
    assert compare.main(grid) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and lines[-1].startswith("spread: 0.0")
    assert re.match(r"swiglu-seed=2 +[\d,]+ parameters +[\d,]+ FLOPs per token +20,480 tokens$", lines[5])
    assert not (tmp_path / "out").exists()
    assert compare.main([*grid, "--dim=32,64", "--unmatched"]) == 0


def test_a_folder_of_another_run_is_refused(config, tmp_path):
    folder = tmp_path / "xielu-seed=42"
    folder.mkdir()
    (run,) = read_grid([config], tmp_path, 1)
    about = describe(run.config)
    (longer,) = read_grid([config, "--max_steps=50"], tmp_path, 1)
    (folder / "config.json").write_text(json.dumps(about))
    compare.check_folder(run)
    for content, asked, message in [
        (about, longer, "cannot continue: it has max_steps=80, not 50"),
        (about | {"formula": "max(x, 0)"}, run, "has changed since the run began (it was max(x, 0), now"),
        (about | {"source": {"XIELU": "0123"}}, run, "xielu has changed since the run began ("),
        ([], run, "is not the folder of a run"),
    ]:
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{re.escape(str(folder))}.*{re.escape(message)}"):
            compare.check_folder(asked)


# ------------------------------------------------------------------------------------------------ whole comparisons


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """(the arguments of a comparison, its folder)"""
    out = tmp_path_factory.mktemp("whole") / "out"
    grid = [config, "--activation=xsilu,swiglu", "--seed=1,2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "execute", in_this_process)
        assert compare.main([*grid, f"--out={out}"]) == 0
    return grid, out


def test_what_a_comparison_leaves(uninterrupted, capsys):
    grid, out = uninterrupted
    assert (out / "loss.png").stat().st_size > 1000 and (out / "scalars-xsilu.png").stat().st_size > 1000
    rows, table, text = without_speed(out)
    assert [row["activation"] for row in rows] == ["xsilu", "swiglu"] and len(table.splitlines()) == 3
    for seed, loss in zip(rows[1]["seeds"], rows[1]["losses"]):
        log = (out / f"swiglu-seed={seed}" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["loss"] == loss and json.loads(log[-1])["step"] == 80
    assert compare.main([*grid, f"--out={out}"]) == 0
    output = capsys.readouterr().out
    assert output.count("finished before") == 4 and (out / "results.md").read_text() in output
    assert without_speed(out) == (rows, table, text)
    for name in ("results.md", "results.json", "results.csv"):
        assert str(out) not in (out / name).read_text() and str(ROOT) not in (out / name).read_text()


def test_two_implementations_of_an_activation_train_alike(config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "execute", in_this_process)
    out = tmp_path / "out"
    assert compare.main([config, "--activation=xielu,xielu_reference", "--max_steps=12", f"--out={out}"]) == 0
    xielu, reference = without_speed(out)[0]
    assert reference["reference"] == "xielu" and xielu["parameters"] == reference["parameters"]
    assert reference["difference"] == pytest.approx(0, abs=1e-5)
    assert xielu["loss"] < math.log(257) - 0.1  # they did learn


# Appended to a config, which train.py executes: after step 10, a run waits while a file `hold` is in its folder, until
# a signal arrives or five minutes have passed. So the test below decides how far a run gets, not the machine's speed.
HOLD = """
import time
import machine
from run import Folder

write_log = Folder.write_log

def wait_and_write_log(folder, kind, step, *arguments, **values):
    deadline = time.monotonic() + 300
    while step > 10 and (folder.out / "hold").exists() and not machine.stop_signal and time.monotonic() < deadline:
        time.sleep(0.01)
    write_log(folder, kind, step, *arguments, **values)

Folder.write_log = wait_and_write_log
"""


def until(pattern, path):
    """Wait until the text of a file contains a pattern."""
    deadline = time.monotonic() + 300
    while not (path.exists() and re.search(pattern, path.read_text())):
        assert time.monotonic() < deadline, f"{path} has no {pattern}"
        time.sleep(0.01)


def test_interrupted_and_killed_and_started_again(uninterrupted, tmp_path):
    (config, *lists), whole = uninterrupted
    held = tmp_path / "held.py"
    held.write_text(Path(config).read_text() + HOLD)
    out, output = tmp_path / "out", tmp_path / "output.txt"
    shutil.copytree(whole, out)
    run = out / "swiglu-seed=1"
    shutil.rmtree(run)  # the others are finished
    run.mkdir()
    (run / "hold").touch()
    grid = [held, *lists, f"--out={out}"]

    process = launch(output, *grid)
    until("step 10/80", run / "output.txt")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert "the same command continues from here" in output.read_text()

    process = launch(output, *grid)
    until("resuming", run / "output.txt")
    process.kill()  # its run lives on, and holds the lock
    process.wait()

    process = launch(output, *grid)
    until("another comparison writes to .*: waiting", output)
    (run / "hold").unlink()
    assert process.wait(timeout=300) == 0, output.read_text()
    assert output.read_text().count("finished before") == 3
    assert (run / "output.txt").read_text().count("resuming") == 2
    assert without_speed(out) == without_speed(whole)


def test_a_failed_run_is_reported_and_the_others_continue(uninterrupted, tmp_path, monkeypatch, capsys):
    """On a terminal, where the steps of a run are shown too."""
    grid, whole = uninterrupted
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("swiglu-seed=1", "xsilu-seed=2"):
        (out / name / "log.jsonl").unlink()
    (out / "swiglu-seed=1" / "ckpt.pt").write_bytes(b"damaged")
    (out / "xsilu-seed=2" / "ckpt.pt").unlink()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert compare.main([*grid, f"--out={out}"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"\[2/4\] swiglu-seed=1: .* failed with status 2: error: checkpoint .* cannot be read", output)
    assert "\r\033[K[3/4] xsilu-seed=2: step 80/80, eta 0m00s\r\033[K[3/4] xsilu-seed=2: val loss" in output
    assert "- swiglu-seed=1 is not in the table: it failed with status 2." in output
    rows, _, _ = without_speed(out)
    assert rows[0]["seeds"] == [1, 2] and rows[1]["seeds"] == [2] and rows[1]["interval"] is None


@pytest.mark.slow
def test_two_processes(config, tmp_path, capsys):
    assert compare.main([config, "--max_steps=12", "--nproc_per_node=2", f"--out={tmp_path}"]) == 0
    assert "xielu-seed=42: val loss" in capsys.readouterr().out
    assert "2 process(es)" in (tmp_path / "xielu-seed=42/output.txt").read_text()
