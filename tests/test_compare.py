"""tools/compare.py: its grid, its tuning, its table, and whole comparisons that are cut off, killed and continued."""

import csv
import itertools
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
from types import SimpleNamespace

import pytest
import torch

from activations import facts_of
from plumbing import machine
from plumbing.command import UserError
from runs import ROOT, TINY, error, here, settings_restored
from tools import compare
from tools.compare import Run, places, read_grid, report, summarize, verdict
from tools.intervals import differences


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


def ended(status=0):
    """A process that has ended, as compare.run_all sees it."""
    return SimpleNamespace(returncode=status, poll=lambda: status)


def in_this_process(run, *_):
    """Instead of compare.launch, where nothing is tested of processes."""
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "output.txt").write_text(here(*run.arguments))
    return ended()


def without_speed(out):
    """What must be the same for the same losses: the table without tokens per second, and the text without it and
    without the command and the commit, which differ between the folders of these tests."""
    table = re.sub(r",[^,\n]*$", "", (out / "results.csv").read_text(), flags=re.M)
    text = re.sub(r"\|[^|\n]*\|$|^- (Command|Commit): .*$", "|", (out / "results.md").read_text(), flags=re.M)
    return table, text


def rows_of(out):
    with open(out / "results.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------ table


VERDICTS = [
    (0.5, 0.6, "[-0.1000, +1.1000], 2.5 standard deviations: its loss is not significantly different."),
    (0.5, 0.5, "is not significantly different"),
    (0.5, 0.1, "[+0.4000, +0.6000], 2.5 standard deviations: its loss is higher."),
    (-0.5, 0.1, "its loss is lower."),
]


@pytest.mark.parametrize("difference, half, words", VERDICTS)
def test_verdict(difference, half, words):
    row = {"name": "b", "reference": "a", "difference": difference, "effect": difference / 0.2}
    row["interval"] = [difference - half, difference + half]
    assert words in verdict(row) and verdict(row).startswith("b against a: ")
    row |= {"name": "b lr=1", "reference": "a lr=1"}
    assert verdict(row).startswith("b lr=1 against a: ")


def fake_runs(fake_run, losses, **keys):
    """Runs of {activation: {seed: final loss}}, each in a folder of its own."""
    runs = []
    for activation, by_seed in losses.items():
        for seed, loss in by_seed.items():
            _, config = fake_run(activation, seed, [5.0, 4.0, loss], folder=f"{activation}-{seed}-{keys}", **keys)
            runs.append(Run({"activation": activation, **keys}, {}, config, [], 1000, 6000))
    return runs


def test_table(fake_run):
    losses = {
        "xielu": {1: 2.0, 2: 3.0, 3: 4.0, 4: 9.0},  # the other rows lack seed 4
        "relu2": {1: 2.1, 2: 3.3, 3: 4.2},
        "gelu": {2: float("nan")},
        "swiglu": {1: 2.5, 2: 3.6, 3: 4.4},
    }
    (xielu, relu2, swiglu), notes = summarize(fake_runs(fake_run, losses))  # what diverged has no row
    assert (xielu["loss"], xielu["difference"], xielu["interval"], xielu["seeds"]) == (3.0, None, None, [1, 2, 3])
    assert xielu["perplexity"] == pytest.approx(math.exp(3)) and xielu["bits_per_byte"] == pytest.approx(1.5)
    assert xielu["tokens_per_s"] == 115.0  # the median of what the log says after the first step
    _, half, sd = differences([[2.0, 3.0, 4.0], [2.1, 3.3, 4.2], [2.5, 3.6, 4.4]])
    assert [relu2["difference"], *relu2["interval"]] == pytest.approx([0.2, 0.2 - half, 0.2 + half])
    assert swiglu["effect"] == pytest.approx(0.5 / sd)
    assert notes[0] == "Left out with xielu, since a row lacks them: seeds [4]."
    assert f"3 rows with xielu: residual standard deviation {sd:.4f} nats. 3 seeds find" in notes[1]
    text = report([xielu, relu2, swiglu], notes, {"gelu-seed=2": "diverged"}, None, {})
    assert text.startswith("- relu2 against xielu: +0.2000") and "- gelu-seed=2 diverged." in text
    assert notes[1] in text and "fixed before the runs" in text
    lengths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(lengths) == 1 and max(lengths) <= 120  # aligned, and as wide as a terminal


def test_without_two_seeds_or_the_reference(fake_run):
    rows, notes = summarize(fake_runs(fake_run, {"xielu": {1: 2.0}, "relu2": {1: 2.5}}))
    assert rows[1]["difference"] == 0.5 and rows[1]["interval"] is None and notes == []
    text = report(rows, [], {}, None, {})
    assert "of one seed, so without an interval" in text and re.search(r"\| +\+0.5000 \| +\|", text)
    nan = float("nan")
    rows, notes = summarize(fake_runs(fake_run, {"gelu": {1: nan, 2: nan}, "swiglu": {1: 2.5, 2: 2.6}}))
    assert [row["name"] for row in rows] == ["swiglu"] and rows[0]["difference"] is None and notes == []


def test_other_keys_make_rows_and_compare_like_with_like(fake_run):
    def rows_of(runs):
        return {row["name"]: (row["reference"], row["difference"]) for row in summarize(runs)[0]}

    runs = fake_runs(fake_run, {"xielu": {1: 2.0, 2: 2.0}, "relu2": {1: 2.5, 2: 2.5}}, lr=0.001)
    runs += fake_runs(fake_run, {"xielu": {1: 1.0, 2: 1.0}, "relu2": {1: 1.25, 2: 1.25}}, lr=0.002)
    assert rows_of(runs) == {
        "xielu lr=0.001": ("xielu lr=0.001", None),
        "relu2 lr=0.001": ("xielu lr=0.001", 0.5),
        "xielu lr=0.002": ("xielu lr=0.002", None),
        "relu2 lr=0.002": ("xielu lr=0.002", 0.25),
    }
    alone = [run for run in runs if run.config.activation == "relu2"]
    # one activation: all are compared with the first row, but for the length of a run
    assert rows_of(alone)["relu2 lr=0.002"] == ("relu2 lr=0.001", -1.25)
    longer = [replace(run, case=run.case | {"max_steps": 40}) for run in alone]
    assert rows_of(alone + longer)["relu2 lr=0.002 max_steps=40"] == ("relu2 lr=0.001 max_steps=40", -1.25)


def test_what_is_printed_of_each_run(fake_run, monkeypatch, capsys):
    """A final loss counts, whatever the status; the rest is expected to take as long per FLOP as the run that has just
    ended. Here an hour passes from one look at the clock to the next."""
    first, done, last = fake_runs(fake_run, {"relu2": {1: 3.0, 2: 3.0, 3: float("nan")}})
    for run in (first, last):
        (run.out / "log.jsonl").rename(run.out / "hidden")

    def fails_at_the_end(run, *_):
        (run.out / "output.txt").write_text("the end\n")
        (run.out / "hidden").rename(run.out / "log.jsonl")
        return ended(1)

    clock = itertools.count(0, 3600)
    monkeypatch.setattr(compare, "launch", fails_at_the_end)
    monkeypatch.setattr(compare, "open_data", lambda *_: None)
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    assert compare.run_all([first, done, last], [{}], 1, None, -3600, [last]) == {last.out.name: "diverged"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[2/3] {done.out.name}: val loss 3.0000, finished before"
    assert lines[1] == f"[1/3] {first.out.name}: started; its output goes to {first.out}/output.txt"
    assert lines[2] == f"[1/3] {first.out.name}: val loss 3.0000 in 1h00m; 3h00m elapsed, 2h00m left in all"
    assert lines[4] == f"[3/3] {last.out.name}: diverged in 1h00m; 6h00m elapsed, 0m00s left in all"


def test_a_run_that_gave_up_has_diverged(fake_run):
    (run,) = fake_runs(fake_run, {"relu2": {1: 3.0}})
    log = run.out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)[:3]  # up to step 10
    bad = [json.dumps({"kind": "bad", "step": step, "loss": "nan"}) + "\n" for step in range(11, 21)]
    for content, diverged in [(bad, True), (bad[1:], False), (bad[:5] + bad[6:], False)]:
        log.write_text("".join(lines + content))
        assert compare.outcome(run) == ({"loss": math.inf} if diverged else None)


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
    assert [run.config.seed for run in read_grid([config, "--seed=3-5,9"], tmp_path, 1)] == [3, 4, 5, 9]


def test_places(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert places(None, 1, cpu) == [{"OMP_NUM_THREADS": "8"}] and places(3, 1, cpu) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert places(2, 2, cpu) == [{"OMP_NUM_THREADS": "2"}] * 2  # for each of a run's two processes
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert places(2, 1, cpu) == [{"OMP_NUM_THREADS": "5"}] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(None, 2, cuda)] == ["0,1", "2,3"]
    assert places(1, 5, cuda) == [{"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,1,0,2")
    assert places(2, 1, cuda) == [{"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    for jobs, world in ((3, 2), (None, 6)):
        with pytest.raises(UserError, match="5 GPUs do not fit"):
            places(jobs, world, cuda)


def test_one_dtype_for_all_runs(config, tmp_path, monkeypatch):
    """What dtype=auto takes may change with the load of the machine, but not within a comparison."""
    measured = iter([torch.bfloat16, torch.float32])
    monkeypatch.setattr(machine, "faster_dtype", lambda: (next(measured), "measured"))
    grid = [config, "--dtype=auto", "--activation=relu2,xielu"]
    runs = read_grid(grid, tmp_path, 1)
    assert compare.share_dtype(runs, grid) == [*grid, "--dtype=bfloat16"]
    runs[0].out.mkdir()
    taken = vars(runs[0].config) | {"dtype": "bfloat16"}
    (runs[0].out / "config.json").write_text(json.dumps({"config": taken}))
    assert compare.share_dtype(runs, grid) == [*grid, "--dtype=bfloat16"]
    assert compare.share_dtype(read_grid([config, "--dtype=float32"], tmp_path, 1), ["a"]) == ["a"]
    with pytest.raises(UserError, match="leave it out of the list"):
        compare.share_dtype(read_grid([config, "--dtype=auto,float32"], tmp_path, 1), [])


def test_windows(config, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "needs Linux, macOS or WSL" in error(capsys, config, main=compare.main)


def test_estimate_counts_all_devices(monkeypatch):
    monkeypatch.setattr(compare, "outcome", lambda run: None)
    monkeypatch.setattr(compare, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(compare, "linear_speed", lambda dtype: 1e9)
    hour = 0.4 * 1e9 * 3600  # FLOPs, of one device
    run = SimpleNamespace(flops=hour * 8)
    for runs, hours in ((1, 1), (2, 1), (4, 2)):
        for kind in ("cuda", "cpu"):
            estimate = compare.estimate([run] * runs, 2, 8, torch.device(kind), None)
            assert estimate == f"about {hours}h00m with 2 at once"


MISTAKES = [
    (["--activation=xielu,swigul"], "did you mean 'swiglu'"),
    (["--activation=relu2,relu2"], "relu2-seed=42 is given twice"),
    (["--seed=1,2,01"], "is given twice"),
    (["--nproc_per_node=0"], "--nproc_per_node: must be a whole number of at least 1, not '0'"),
    (["--nproc_per_node=3"], "does not divide"),
    (["--dim=32,64"], "differ by"),
    (["--data=nowhere"], "there is no data folder nowhere"),
    (["--tune=lr=1e-3"], "--tune=lr=1e-3: give two or more values above 0, each of them once"),
    (["--tune=lr=1e-3,0.001,2e-3"], "each of them once"),
    (["--tune=lr=0,1e-3"], "above 0"),
    (["--tune=lr"], "lr must be a number, not ''"),
    (["--tune=activation=relu2,xielu"], "give the values of a key that is a number, as in --tune=lr=1e-3"),
    (["--tune=seed=1,2"], "give the values of a key that is a number"),
    (["--tune=lr=1e-3,2e-3", "--lr=1e-3"], "lr is tuned: leave out --lr"),
    (["--tune=lr=1e-3,2e-3", "--seed=1,101"], "--seed and --tune_seeds share 101"),
    (["--tune=dim=32,64", "--seed=1"], "differ by"),
    (["--tokens_per_parameter=2", "--max_steps=9"], "both set the length of the run: give one of them"),
    (["--tune=lr=1e-3,2e-3", "--tokens_per_parameter=2,4", "--tune_up_to=3"], "--tune_up_to=3 is not one of"),
    (["--tune=lr=1e-3,2e-3", "--tune_up_to=3"], "--tune_up_to=3 is not one of"),  # of the config's length alone
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes(config, tmp_path, capsys, arguments, message):
    assert message in error(capsys, config, *arguments, f"--out={tmp_path}/out", main=compare.main)
    assert {path.name for path in tmp_path.glob("out/*")} <= {"lock"}


def test_dry_run(config, tmp_path, capsys, monkeypatch):
    grid = [config, "--activation=xielu,relu2,swiglu", "--seed=1,2", f"--out={tmp_path}/out", "--dry_run"]
    assert compare.main(grid) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[-2].startswith("spread: 0.0")
    assert re.match(r"6 runs, about \d+m\d\ds with 1 at once$", lines[-1])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(compare, "linear_speed", lambda dtype: threads.append(torch.get_num_threads()) or 1e9)
    threads = []
    with settings_restored():
        torch.set_num_threads(4)
        assert compare.main([*grid, "--jobs=2"]) == 0
    assert threads == [2]  # it is timed with the threads of one process
    capsys.readouterr()
    assert re.match(r"swiglu-seed=2 +[\d,]+ parameters +[\d,]+ FLOPs per token +20,480 tokens$", lines[5])
    assert not (tmp_path / "out").exists()
    assert compare.main([*grid, "--dim=32,64", "--unmatched"]) == 0
    capsys.readouterr()
    assert compare.main([*grid, "--tune=lr=2e-3,0.001", "--tune_seeds=7,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["xielu-lr=0.001-seed=7", "xielu-lr=0.002-seed=7"]
    assert len(lines) == 2 * 2 * 3 + 1 + 6 + 2 and lines[12] == "then, each with its best lr:"


def test_a_folder_of_another_run_is_refused(config, tmp_path):
    folder = tmp_path / "xielu-seed=42"
    folder.mkdir()
    (run,) = read_grid([config], tmp_path, 1)
    about = {"config": dict(vars(run.config)), "facts": facts_of(run.config.activation)}
    (longer,) = read_grid([config, "--max_steps=50"], tmp_path, 1)
    for activation in ("elsewhere/xielu.py", "xielu"):  # a file may move: what it computes is compared
        about["config"]["activation"] = activation
        (folder / "config.json").write_text(json.dumps(about))
        compare.check_folder(run)
    for content, asked, message in [
        (about, longer, "cannot continue: it has max_steps=80, not 50"),
        (about | {"facts": {"what xielu computes": [0.0]}}, run, "what xielu computes changed since the run"),
        ([], run, "is not the folder of a run"),
    ]:
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message) as raised:
            compare.check_folder(asked)
        assert str(folder) in str(raised.value)


# ------------------------------------------------------------------------------------------------ tuning


@pytest.fixture
def pretend(monkeypatch):
    """A function pretend(loss) that lets runs take no time: each gets the final loss(activation, lr, seed); if that is
    a text, it fails with this last line. Returns the list of the folders that were trained."""

    def pretend(loss):
        trained = []

        def launch(run, *_):
            final = loss(run.config.activation, run.config.lr, run.config.seed)
            trained.append(run.out.name)
            run.out.mkdir(parents=True, exist_ok=True)
            if isinstance(final, str):
                (run.out / "output.txt").write_text(f"{final}\n")
                return ended(1)
            record = {"step": run.config.max_steps, "tokens": run.tokens}
            speed = record | {"kind": "train", "tokens_per_s": 100.0 * len(trained)}
            validation = record | {"kind": "val", "loss": final, "bits_per_byte": 2 * final}
            about = {"config": vars(run.config), "facts": {}, "origin": {"device": "none"}}
            (run.out / "config.json").write_text(json.dumps(about))
            (run.out / "log.jsonl").write_text(f"{json.dumps(speed)}\n{json.dumps(validation)}\n")
            return ended()

        monkeypatch.setattr(compare, "launch", launch)
        return trained

    return pretend


def valley(activation, lr, seed):
    """Lowest at another lr for each activation; gelu diverges early, and some seeds are better than others."""
    best = {"xielu": 0.002, "relu2": 0.0005, "swiglu": 0.1, "gelu": 0.001}[activation]
    if activation == "gelu" and lr > 0.001:
        return math.nan
    return 2 + 0.01 * math.log2(lr / best) ** 2 + 0.001 * math.sin(seed)


def test_tuning(config, tmp_path, pretend, capsys):
    out = tmp_path / "out"
    trained = pretend(valley)
    grid = [config, "--activation=xielu,relu2,swiglu,gelu", "--seed=1,2", f"--out={out}"]
    assert compare.main([*grid, "--tune=lr=1e-3,2e-3,4e-3"]) == 0
    best = {"xielu": 0.002, "relu2": 0.001, "swiglu": 0.004, "gelu": 0.001}
    wanted = [f"{name}-lr={lr}-seed=101" for name in best for lr in (0.001, 0.002, 0.004)]
    wanted += [f"{name}-lr={lr}-seed={seed}" for name, lr in best.items() for seed in (1, 2)]
    assert sorted(trained) == sorted(wanted)
    text = (out / "results.md").read_text()
    assert {name: float(row["lr"]) for name, row in rows_of(out).items()} == best
    assert "- gelu-lr=0.002-seed=101 diverged." in text and "inf at 0.004" in text
    assert "- swiglu was tuned to lr=0.004, the edge of the list: a better value may lie beyond it." in text
    assert "- xielu was tuned to lr=0.002. " in text and text.count("the edge of") == 3
    assert "![tune.png](tune.png)" in text and (out / "tune.png").stat().st_size > 1000
    assert re.search(r"^\| activation \| +lr \| seeds", text, re.M)
    assert re.search(r"^\| swiglu +\| +0.004 \|", text, re.M)
    capsys.readouterr()
    assert compare.main([*grid, "--tune=lr=1e-3,2e-3,4e-3"]) == 0  # nothing is trained twice, what diverged neither
    assert capsys.readouterr().out.count(", finished before") == len(trained) == len(wanted)
    assert (out / "results.md").read_text() == text
    # a longer list continues
    assert compare.main([*grid, "--tune=lr=5e-4,1e-3,2e-3,4e-3,8e-3"]) == 0
    assert {name: float(row["lr"]) for name, row in rows_of(out).items()} == best | {"relu2": 0.0005, "swiglu": 0.008}


def test_long_runs_take_the_value_of_shorter_ones(config, tmp_path, pretend, monkeypatch, capsys):
    trained = pretend(lambda activation, lr, seed: 2 + abs(lr - {"xielu": 0.001, "relu2": 0.002}[activation]))
    grid = [config, "--activation=xielu,relu2", "--tokens_per_parameter=2,4,8", "--tune=lr=1e-3,2e-3", "--seed=1,2"]
    assert compare.main([*grid, "--tune_up_to=4", f"--out={tmp_path}"]) == 0
    assert not any("parameter=8" in name and "seed=101" in name for name in trained) and len(trained) == 2 * 2 * 2 + 12
    longest = {row["activation"]: row["lr"] for name, row in rows_of(tmp_path).items() if "_parameter=8" in name}
    assert longest == {"xielu": "0.001", "relu2": "0.002"}
    assert (tmp_path / "budget.png").stat().st_size > 1000
    monkeypatch.setattr(compare, "open_data", None)  # the table again, by which nothing is trained, takes no data
    assert compare.main([*grid, "--tune_up_to=4", f"--out={tmp_path}"]) == 0
    assert compare.main([*grid, "--tune_up_to=4", f"--out={tmp_path}", "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("20 runs, about 0m00s with 1 at once\n")  # all are finished


def test_tuning_that_is_cut_off_chooses_alike(config, tmp_path, pretend):
    grid = [config, "--activation=relu2,swiglu", "--tune=lr=1e-3,2e-3", "--tune_seeds=7,8", "--seed=1,2"]
    wanted = pretend(valley)
    assert compare.main([*grid, f"--out={tmp_path}/whole"]) == 0
    finished, stops = [], {0, 3, 7, 8, 10, len(wanted) - 1}

    def cut_off(activation, lr, seed):
        if len(finished) in stops:
            stops.remove(len(finished))
            raise KeyboardInterrupt
        finished.append(seed)
        return valley(activation, lr, seed)

    pretend(cut_off)
    while stops:
        assert compare.main([*grid, f"--out={tmp_path}/cut"]) == 130
    assert compare.main([*grid, f"--out={tmp_path}/cut"]) == 0
    assert len(finished) == len(wanted) and without_speed(tmp_path / "cut") == without_speed(tmp_path / "whole")


def test_other_keys_are_tuned_by_themselves(config, tmp_path, pretend):
    trained = pretend(valley)
    grid = [config, "--activation=xielu,relu2", "--weight_decay=0,0.1", "--tune=lr=1e-3,2e-3,4e-3", "--seed=1"]
    assert compare.main([*grid, f"--out={tmp_path}"]) == 0
    assert "xielu-weight_decay=0-lr=0.002-seed=1" in trained and len(trained) == 4 * 3 + 4
    references = [row["reference"] for row in rows_of(tmp_path).values()]
    assert references == ["xielu weight_decay=0"] * 2 + ["xielu weight_decay=0.1"] * 2


def test_a_tuning_run_that_failed_stops_the_choice(config, tmp_path, pretend, capsys):
    grid = [config, "--activation=xielu,relu2", "--tune=lr=1e-3,2e-3", "--seed=1", f"--out={tmp_path}"]
    trained = pretend(lambda activation, lr, seed: "no memory" if (activation, lr) == ("xielu", 0.002) else 2.0)
    assert compare.main(grid) == 2 and len(trained) == 4
    message = "no lr can be chosen, since xielu-lr=0.002-seed=101 failed with status 1: try again"
    assert message in capsys.readouterr().err and not (tmp_path / "results.md").exists()
    pretend(valley)
    assert compare.main(grid) == 0


def test_the_same_code_under_two_names_tunes_and_trains_alike(config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "launch", in_this_process)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from activations import ACTIVATIONS\n\nACTIVATION = ACTIVATIONS['xielu']\n"
        )
    names = f"--activation={tmp_path}/one.py,{tmp_path}/two.py"
    out, shorter = tmp_path / "out", ["--max_steps=12", "--seed=1,2", "--tune=lr=1e-2,2e-2"]
    assert compare.main([config, names, *shorter, f"--out={out}"]) == 0
    one, two = rows_of(out).values()
    assert two["difference"] == "0.0" and one["lr"] == two["lr"] and one["losses"] == two["losses"]
    assert "two against one: +0.0000 nats per token [+0.0000, +0.0000]" in (out / "results.md").read_text()


# ------------------------------------------------------------------------------------------------ whole comparisons


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    """(the arguments of a comparison, its folder)"""
    out = tmp_path_factory.mktemp("whole") / "out"
    grid = [config, "--activation=xsilu,swiglu", "--seed=1,2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "launch", in_this_process)
        assert compare.main([*grid, f"--out={out}"]) == 0
    return grid, out


def test_what_a_comparison_leaves(uninterrupted, capsys):
    grid, out = uninterrupted
    assert (out / "loss.png").stat().st_size > 1000 and (out / "scalars-xsilu.png").stat().st_size > 1000
    table, text = without_speed(out)
    assert list(rows_of(out)) == ["xsilu", "swiglu"] and len(table.splitlines()) == 3
    row = rows_of(out)["swiglu"]
    for seed, loss in zip(row["seeds"].split(), map(float, row["losses"].split())):
        log = (out / f"swiglu-seed={seed}" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["loss"] == loss and json.loads(log[-1])["step"] == 80
    assert compare.main([*grid, f"--out={out}"]) == 0
    output = capsys.readouterr().out
    assert output.count("finished before") == 4 and (out / "results.md").read_text() in output
    assert without_speed(out) == (table, text)
    command = f"- Command: `python -m tools.compare {' '.join(grid)} --out={out}`\n"
    text = (out / "results.md").read_text()
    for name in ("results.md", "results.csv"):
        assert str(out) not in (out / name).read_text().replace(command, "")
    assert command in text and re.search(r"^- Data: .*/bytes, tokenizer bytes$", text, re.M)
    assert "- Training: 20,480 tokens per run\n" in text and re.search(r"^- Commit: .+", text, re.M)
    assert re.search(
        r"^- Versions: python \S+, torch \S+, numpy \S+\n- Device: cpu .* threads?.* in float32$", text, re.M
    )
    assert "![budget.png](budget.png)\n![loss.png](loss.png)\n![scalars-xsilu.png](scalars-xsilu.png)\n" in text


def test_finished_runs_are_read_from_the_archive(uninterrupted, tmp_path, capsys):
    """runs.jsonl stands for the folders: the same command trains nothing, and writes the same table and archive."""
    grid, whole = uninterrupted
    shutil.copy(whole / "runs.jsonl", tmp_path)
    assert compare.main([*grid, f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("finished before") == 4 and not (tmp_path / "swiglu-seed=1").exists()
    assert without_speed(tmp_path) == without_speed(whole)
    assert (tmp_path / "runs.jsonl").read_bytes() == (whole / "runs.jsonl").read_bytes()


# Appended to a config, which train.py executes: after step 10, a run waits while a file `hold` is in its folder, until
# a signal arrives or five minutes have passed. So the test below decides how far a run gets, not the machine's speed.
HOLD = """
import time
from plumbing import machine
from plumbing.run import Run

write_log = Run.log

def wait_and_write_log(run, kind, step, **values):
    deadline = time.monotonic() + 300
    while step > 10 and (run.out / "hold").exists() and not machine.stop and time.monotonic() < deadline:
        time.sleep(0.01)
    write_log(run, kind, step, **values)

Run.log = wait_and_write_log
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
    held_runs = [out / "swiglu-seed=1", out / "xsilu-seed=2"]  # two at once; the others are finished
    for run in held_runs:
        shutil.rmtree(run)
        run.mkdir()
        (run / "hold").touch()
    (out / "runs.jsonl").unlink()
    grid = [held, *lists, "--jobs=2", f"--out={out}"]

    process = launch(output, *grid)
    for run in held_runs:
        until("step 10/80", run / "output.txt")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert "the same command continues from here" in output.read_text()
    assert len((out / "runs.jsonl").read_text().splitlines()) == 2  # the finished runs

    process = launch(output, *grid)
    for run in held_runs:
        until("resuming", run / "output.txt")
    process.kill()  # its runs live on, and hold the lock
    process.wait()

    process = launch(output, *grid)
    until("another process writes to .*: waiting", output)
    for run in held_runs:
        (run / "hold").unlink()
    assert process.wait(timeout=300) == 0, output.read_text()
    assert output.read_text().count("finished before") >= 2
    assert all((run / "output.txt").read_text().count("resuming") >= 1 for run in held_runs)
    assert without_speed(out) == without_speed(whole)


def test_a_failed_run_is_reported_and_the_others_continue(uninterrupted, tmp_path, monkeypatch, capsys):
    grid, whole = uninterrupted
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("swiglu-seed=1", "xsilu-seed=2"):
        (out / name / "log.jsonl").unlink()
    (out / "swiglu-seed=1" / "ckpt.pt").write_bytes(b"damaged")
    (out / "xsilu-seed=2" / "ckpt.pt").unlink()
    assert compare.main([*grid, f"--out={out}"]) == 1
    output = capsys.readouterr().out
    assert re.search(
        r"\[2/4\] swiglu-seed=1: failed with status 2 in .* left in all: error: checkpoint .* cannot be read", output
    )
    assert "- swiglu-seed=1 failed with status 2." in output
    # seed 1 is left out, since swiglu lacks it; one seed has no interval
    assert "Left out with xsilu, since a row lacks them: seeds [1]." in output
    assert rows_of(out)["swiglu"]["seeds"] == "2" and not rows_of(out)["swiglu"]["interval"]


@pytest.mark.slow
def test_two_processes(config, tmp_path, capsys):
    assert compare.main([config, "--max_steps=12", "--nproc_per_node=2", f"--out={tmp_path}"]) == 0
    assert "xielu-seed=42: val loss" in capsys.readouterr().out
    assert "2 process(es)" in (tmp_path / "xielu-seed=42/output.txt").read_text()
