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
from pathlib import Path

import pytest
import torch
from scipy import stats

from activations import facts_of
from plumbing import machine
from plumbing.command import UserError
from runs import ROOT, TINY, here
from tools import compare
from tools.compare import Run, beyond, read_grid, read_tune, report, summarize, verdict


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
    """What must be the same for the same losses: the three files without tokens per second, and without the command and
    the commit, which differ between the folders of these tests."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert all(row.pop("tokens_per_s") > 0 for row in rows)
    table = re.sub(r",[^,\n]*$", "", (out / "results.csv").read_text(), flags=re.M)
    text = re.sub(r"\|[^|\n]*\|$|^- (Command|Commit): .*$", "|", (out / "results.md").read_text(), flags=re.M)
    return rows, table, text


# ------------------------------------------------------------------------------------------------ table


@pytest.mark.parametrize(
    "difference, interval, words",
    [
        (0.5, None, "one seed"),
        (0.5, [-0.1, 1.1], "[-0.1000, +1.1000] contains zero: the two are not told apart."),
        (0.5, [0.0, 1.0], "contains zero"),
        (0.5, [0.4, 0.6], "does not contain zero: its loss is higher"),
        (-0.5, [-0.6, -0.4], "does not contain zero: its loss is lower"),
    ],
)
def test_verdict(difference, interval, words):
    row = {"name": "b", "reference": "a", "difference": difference, "interval": interval, "paired_interval": interval}
    assert words in verdict(row) and verdict(row).startswith("b − a: ")
    same = row | {"difference": 0.0, "interval": [-0.1, 0.1], "paired_interval": [0.0, 0.0]}
    assert "+0.0000 nats per token: the losses are equal for every seed." in verdict(same)


def report_of(rows, resolutions=(), failed=None):
    return report({"rows": rows, "resolutions": list(resolutions), "failed": failed or {}, "tuned": None, "tuning": {}})


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
        "xielu": {1: 2.0, 2: 3.0, 3: 4.0},
        "relu2": {1: 2.1, 2: 3.3, 3: 4.2},  # differences 0.1, 0.3, 0.2
        "swiglu": {1: 2.5, 3: 3.5},  # a seed is missing: differences 0.5, −0.5
        "gelu": {2: float("nan")},
    }
    (xielu, relu2, swiglu), resolutions = summarize(fake_runs(fake_run, losses))  # what diverged has no row
    assert (xielu["loss"], xielu["loss_std"], xielu["difference"], xielu["interval"]) == (3.0, 1.0, None, None)
    assert xielu["perplexity"] == pytest.approx(math.exp(3)) and xielu["bits_per_byte"] == pytest.approx(1.5)
    assert xielu["tokens_per_s"] == 115.0  # the median of what the log says after the first step
    dunnett = stats.dunnett([2.1, 3.3, 4.2], [2.5, 3.5], control=[2.0, 3.0, 4.0], rng=1).confidence_interval()
    for row, low, high in zip((relu2, swiglu), dunnett.low, dunnett.high):
        assert row["interval"] == pytest.approx([low, high], rel=0.01)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert relu2["difference"] == pytest.approx(0.2)
    assert [relu2["paired_difference"], *relu2["paired_interval"]] == pytest.approx([0.2, 0.2 - half, 0.2 + half])
    assert swiglu["seeds"] == [1, 3] and swiglu["paired_difference"] == pytest.approx(0) == swiglu["difference"]
    assert swiglu["paired_interval"] == pytest.approx([-12.7062 * 0.5, 12.7062 * 0.5], rel=1e-4)
    std = math.sqrt((2 * 1.0 + 2 * relu2["loss_std"] ** 2 + 0.5) / 5)
    assert f"3 rows, compared with xielu: pooled standard deviation {std:.4f} nats, 5 degrees" in resolutions[0]
    assert "that takes over 1000 seeds per row" in resolutions[0]
    text = report_of([xielu, relu2, swiglu], resolutions, {"gelu-seed=2": "diverged"})
    assert "| 3.2000 ± 1.0536 |" in text and "+0.2000 [-0.0484, +0.4484]" in text
    assert "- relu2 − xielu: +0.2000" in text and text.count("contains zero") == 2
    assert "- gelu-seed=2 diverged." in text and resolutions[0] in text and "fixed before the runs" in text
    lengths = {len(line) for line in text.splitlines() if line.startswith("|")}
    assert len(lengths) == 1  # aligned


def test_one_seed_has_no_intervals(fake_run):
    rows, resolutions = summarize(fake_runs(fake_run, {"xielu": {1: 2.0}, "relu2": {1: 2.5}}))
    assert rows[1]["difference"] == rows[1]["paired_difference"] == 0.5 and resolutions == []
    assert rows[1]["interval"] is rows[1]["paired_interval"] is rows[1]["loss_std"] is None
    text = report_of(rows)
    assert "|                    +0.5000 |" in text and "for one seed, so without an interval" in text


def test_without_the_reference_nothing_is_compared(fake_run):
    nan = float("nan")
    rows, resolutions = summarize(fake_runs(fake_run, {"xielu": {1: nan, 2: nan}, "relu2": {1: 2.5, 2: 2.6}}))
    assert [row["name"] for row in rows] == ["relu2"] and rows[0]["difference"] is None and resolutions == []


def test_other_keys_make_rows_and_compare_like_with_like(fake_run):
    runs = fake_runs(fake_run, {"xielu": {1: 2.0, 2: 2.0}, "relu2": {1: 2.5, 2: 2.5}}, lr=0.001)
    runs += fake_runs(fake_run, {"xielu": {1: 1.0, 2: 1.0}, "relu2": {1: 1.25, 2: 1.25}}, lr=0.002)
    rows, resolutions = summarize(runs)
    rows = {row["name"]: row for row in rows}
    assert list(rows) == ["xielu lr=0.001", "relu2 lr=0.001", "xielu lr=0.002", "relu2 lr=0.002"]
    assert rows["relu2 lr=0.001"]["difference"] == 0.5 and rows["relu2 lr=0.002"]["difference"] == 0.25
    assert rows["xielu lr=0.002"]["difference"] is None
    assert [words.split(":")[0] for words in resolutions] == [f"2 rows, compared with xielu lr=0.00{k}" for k in (1, 2)]
    alone = [run for run in runs if run.config.activation == "relu2"]
    rows = {row["name"]: row for row in summarize(alone)[0]}  # with one activation, all are compared with the first row
    assert rows["relu2 lr=0.002"]["difference"] == -1.25 and rows["relu2 lr=0.002"]["reference"] == "relu2 lr=0.001"


def test_what_is_printed_of_each_run(fake_run, monkeypatch, capsys):
    """A final loss counts, whatever the status; the rest is expected to take as long per FLOP as the run that has just
    ended. Here an hour passes from one look at the clock to the next."""
    first, done, last = fake_runs(fake_run, {"relu2": {1: 3.0, 2: 3.0, 3: float("nan")}})
    for run in (first, last):
        (run.out / "log.jsonl").rename(run.out / "hidden")

    def fails_at_the_end(run, *_):
        (run.out / "hidden").rename(run.out / "log.jsonl")
        return 1, "the end"

    clock = itertools.count(0, 3600)
    monkeypatch.setattr(compare, "execute", fails_at_the_end)
    monkeypatch.setattr(compare.time, "monotonic", lambda: next(clock))
    assert compare.run_all([first, done, last], 1, None, -3600, [last]) == {last.out.name: "diverged"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[1/3] {first.out.name}: val loss 3.0000 in 1h00m; 3h00m elapsed, 2h00m left in all"
    assert lines[1] == f"[2/3] {done.out.name}: val loss 3.0000, finished before"
    assert lines[2] == f"[3/3] {last.out.name}: diverged in 1h00m; 6h00m elapsed, 0m00s left in all"


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
    assert compare.main([str(config)]) == 2
    assert "needs Linux, macOS or WSL" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder(config, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compare.main([str(config), f"--out={tmp_path}/file"]) == 2
    printed = capsys.readouterr()
    assert "file cannot be a folder" in printed.err and "another comparison" not in printed.out


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
        (["--tune=lr=1e-3"], "--tune=lr=1e-3: give two or more values above 0, each of them once"),
        (["--tune=lr=1e-3,0.001,2e-3"], "each of them once"),
        (["--tune=lr=0,1e-3"], "above 0"),
        (["--tune=lr=1e-3,two"], "lr must be a number, not 'two'"),
        (["--tune=lr"], "lr must be a number, not ''"),
        (["--tune=ffn_dim=48,50.5"], "ffn_dim must be a whole number"),
        (["--tune=activation=relu2,xielu"], "give the values of a key that is a number, as in --tune=lr=1e-3"),
        (["--tune=seed=1,2"], "give the values of a key that is a number"),
        (["--tune=lr=1e-3,2e-3", "--lr=1e-3"], "lr is tuned: leave out --lr"),
        (["--tune=beta1=0.5,1"], "beta1 must be at least 0 and below 1, not 1.0"),
        (["--tune=lr=1e-3,2e-3", "--seed=1,101"], "--seed and --tune_seeds share 101"),
        (["--tune=lr=1e-3,2e-3", "--tune_seeds=7,7"], "xielu-lr=0.001-seed=7 is given twice"),
        (["--tune=dim=32,64", "--seed=1"], "differ by"),
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
    capsys.readouterr()
    assert compare.main([*grid, "--tune=lr=2e-3,0.001", "--tune_seeds=7,8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["xielu-lr=0.001-seed=7", "xielu-lr=0.002-seed=7"]
    assert len(lines) == 2 * 2 * 3 + 1 + 6 + 1 and lines[12] == "then, each with its best lr:"


def test_a_folder_of_another_run_is_refused(config, tmp_path):
    folder = tmp_path / "xielu-seed=42"
    folder.mkdir()
    (run,) = read_grid([config], tmp_path, 1)
    about = {"config": vars(run.config), "facts": facts_of(run.config.activation)}
    (longer,) = read_grid([config, "--max_steps=50"], tmp_path, 1)
    (folder / "config.json").write_text(json.dumps(about))
    compare.check_folder(run)
    for content, asked, message in [
        (about, longer, "cannot continue: it has max_steps=80, not 50"),
        (about | {"facts": {"the formula of xielu": "max(x, 0)"}}, run, "the formula of xielu changed since the run"),
        (about | {"facts": {"what xielu computes": [0.0]}}, run, "what xielu computes changed since the run"),
        ([], run, "is not the folder of a run"),
    ]:
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{re.escape(str(folder))}.*{re.escape(message)}"):
            compare.check_folder(asked)


# ------------------------------------------------------------------------------------------------ tuning


def test_tuned_values_are_typed_and_sorted():
    assert read_tune("lr=2e-3,0.001", []) == ("lr", [0.001, 0.002])
    assert read_tune("warmup_steps=1e2,50", ["--lr=1"]) == ("warmup_steps", [50, 100])


@pytest.mark.parametrize(
    "key, given, losses, expected",
    [
        ("lr", [0.001, 0.002, 0.004], [3, 2, 3], None),  # inside
        ("lr", [0.001, 0.002, 0.008], [3, 2, 1], 0.032),  # by the ratio to its neighbour, 4
        ("lr", [0.001, 0.002, 0.008], [1, 2, 3], 0.0005),
        ("lr", [0.004, 0.008], [2, 1], 0.016),  # not 0.016000000000000004
        ("lr", [0.001, 0.002], [1, math.inf], 0.0005),
        ("lr", [0.001, 0.002], [math.inf, math.inf], 0.0005),  # lower may converge
        ("beta2", [0.9, 0.95], [2, 1], None),  # 1.003 is not allowed
        ("beta2", [0.9, 0.95], [1, 2], 0.9 * 0.9 / 0.95),
        ("warmup_steps", [2, 4], [2, 1], None),
    ],
)
def test_beyond_the_edge(key, given, losses, expected):
    value = beyond(key, {value: [loss] for value, loss in zip(given, losses)}, given)
    assert value is None if expected is None else value == pytest.approx(expected, rel=1e-11) and len(str(value)) < 16


def test_each_side_is_extended_twice():
    for losses in ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]):
        tried = dict(zip([0.25, 0.5, 1.0, 2.0], ([loss] for loss in losses)))
        assert beyond("lr", tried, [1.0, 2.0]) == (None if losses[0] == 1 else 4.0)
        assert beyond("lr", tried, [0.25, 0.5]) == (None if losses[0] == 4 else 0.125)
        assert beyond("lr", tried, [0.5, 1.0]) == (0.125 if losses[0] == 1 else 4.0)


@pytest.fixture
def pretend(monkeypatch):
    """A function pretend(loss) that lets runs take no time: each gets the final loss(activation, lr, seed); if that is
    a text, it fails with this last line. Returns the list of the folders that were trained."""

    def pretend(loss):
        trained = []

        def execute(run, *_):
            final = loss(run.config.activation, run.config.lr, run.config.seed)
            trained.append(run.out.name)
            if isinstance(final, str):
                return 1, final
            record = {"step": run.config.max_steps, "tokens": run.tokens}
            speed = record | {"kind": "train", "tokens_per_s": 100.0 * len(trained)}
            validation = record | {"kind": "val", "loss": final, "bits_per_byte": 2 * final}
            run.out.mkdir(parents=True)
            (run.out / "config.json").write_text(json.dumps({"config": vars(run.config), "origin": {"device": "none"}}))
            (run.out / "log.jsonl").write_text(f"{json.dumps(speed)}\n{json.dumps(validation)}\n")
            return 0, ""

        monkeypatch.setattr(compare, "execute", execute)
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
    grid = [config, "--activation=xielu,relu2,swiglu,gelu", "--tune=lr=1e-3,2e-3,4e-3", "--seed=1,2", f"--out={out}"]
    assert compare.main(grid) == 0
    tried = {
        "xielu": [0.001, 0.002, 0.004],
        "relu2": [0.001, 0.002, 0.004, 0.0005, 0.00025],
        "swiglu": [0.001, 0.002, 0.004, 0.008, 0.016],
        "gelu": [0.001, 0.002, 0.004, 0.0005],
    }
    best = {"xielu": 0.002, "relu2": 0.0005, "swiglu": 0.016, "gelu": 0.001}
    wanted = [f"{name}-lr={lr}-seed=101" for name in tried for lr in tried[name]]
    wanted += [f"{name}-lr={lr}-seed={seed}" for name, lr in best.items() for seed in (1, 2)]
    assert sorted(trained) == sorted(wanted)
    text, saved = (out / "results.md").read_text(), json.loads((out / "results.json").read_text())
    assert {row["name"]: row["lr"] for row in saved["rows"]} == best
    with open(out / "results.csv", newline="") as file:
        assert [(row["name"], float(row["lr"])) for row in csv.DictReader(file)] == list(best.items())
    assert saved["tuning"]["gelu"]["0.002"] == ["Infinity"] and saved["failed"] == dict.fromkeys(
        ["gelu-lr=0.002-seed=101", "gelu-lr=0.004-seed=101"], "diverged"
    )
    assert (
        "- gelu-lr=0.002-seed=101 diverged." in text
        and "- gelu was tuned to lr=0.001. " in text
        and "inf at 0.004" in text
    )
    assert "- swiglu was tuned to lr=0.016, the edge of what was tried" in text and text.count("the edge of") == 1
    assert "![tune.png](tune.png)" in text and (out / "tune.png").stat().st_size > 1000
    assert re.search(r"^\| activation \| +lr \| parameters", text) and re.search(
        r"^\| swiglu +\| +0.016 \|", text, re.M
    )
    capsys.readouterr()
    assert compare.main(grid) == 0  # nothing is trained twice, what diverged neither
    assert capsys.readouterr().out.count(", finished before") == len(trained) == len(wanted)
    assert (out / "results.md").read_text() == text
    assert compare.main([*grid, "--tune_seeds=102,101"]) == 0
    assert "swiglu-lr=0.016-seed=102" in trained


def test_tuning_that_is_cut_off_chooses_alike(config, tmp_path, pretend):
    grid = [config, "--activation=relu2,swiglu", "--tune=lr=1e-3,2e-3", "--tune_seeds=7,8", "--seed=1,2"]
    wanted = pretend(valley)
    assert compare.main([*grid, f"--out={tmp_path}/whole"]) == 0
    finished, stops = [], {0, 3, 9, 12, 14, len(wanted) - 1}

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
    assert "xielu-weight_decay=0.0-lr=0.002-seed=1" in trained and len(trained) == 2 * (3 + 5) + 4
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["reference"] for row in rows] == ["xielu weight_decay=0.0", "xielu weight_decay=0.1"] * 2


def test_a_tuning_run_that_failed_stops_the_choice(config, tmp_path, pretend, capsys):
    grid = [config, "--activation=xielu,relu2", "--tune=lr=1e-3,2e-3", "--seed=1", f"--out={tmp_path}"]
    trained = pretend(lambda activation, lr, seed: "no memory" if (activation, lr) == ("xielu", 0.002) else 2.0)
    assert compare.main(grid) == 2 and len(trained) == 4
    error = "no lr can be chosen, since xielu-lr=0.002-seed=101 failed with status 1: try again"
    assert error in capsys.readouterr().err and not (tmp_path / "results.md").exists()
    pretend(valley)
    assert compare.main(grid) == 0


def test_the_same_code_under_two_names_tunes_and_trains_alike(config, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "execute", in_this_process)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from activations import ACTIVATIONS\n\nACTIVATION = ACTIVATIONS['xielu']\n"
        )
    names = f"--activation={tmp_path}/one.py,{tmp_path}/two.py"
    out, shorter = tmp_path / "out", ["--max_steps=12", "--seed=1,2", "--tune=lr=1e-2,2e-2"]
    assert compare.main([config, names, *shorter, f"--out={out}"]) == 0
    one, two = without_speed(out)[0]
    assert two["difference"] == two["paired_difference"] == 0.0 and two["paired_interval"] == [0.0, 0.0]
    assert one["lr"] == two["lr"] and one["losses"] == two["losses"]
    assert "two − one: +0.0000 nats per token: the losses are equal for every seed." in (out / "results.md").read_text()


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
    command = f"- Command: `python -m tools.compare {' '.join(grid)} --out={out}`\n"
    text = (out / "results.md").read_text()
    for name in ("results.md", "results.json", "results.csv"):
        assert str(out) not in (out / name).read_text().replace(command, "")
    assert command in text and re.search(
        r"^- Data: .*/bytes; tokenizer bytes; [\d,]+ tokens in train; [\d,]+ tok", text, re.M
    )
    assert "- Training: 20,480 tokens per run\n" in text and re.search(r"^- Commit: .+", text, re.M)
    assert re.search(
        r"^- Versions: python \S+, torch \S+, numpy \S+, scipy \S+\n- Device: cpu .* in float32$", text, re.M
    )
    assert text.endswith("![loss.png](loss.png)\n![scalars-xsilu.png](scalars-xsilu.png)\n")


def test_finished_runs_are_read_from_the_archive(uninterrupted, tmp_path, capsys):
    """runs.jsonl stands for the folders: the same command trains nothing, and writes the same table and archive."""
    grid, whole = uninterrupted
    shutil.copy(whole / "runs.jsonl", tmp_path)
    assert compare.main([*grid, f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.count("finished before") == 4 and not (tmp_path / "swiglu-seed=1").exists()
    assert without_speed(tmp_path) == without_speed(whole)
    assert (tmp_path / "runs.jsonl").read_bytes() == (whole / "runs.jsonl").read_bytes()


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
    run = out / "swiglu-seed=1"
    shutil.rmtree(run)  # the others are finished
    (out / "runs.jsonl").unlink()
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
    assert re.search(
        r"\[2/4\] swiglu-seed=1: failed with status 2 in .* left in all: error: checkpoint .* cannot be read", output
    )
    assert "- swiglu-seed=1 failed with status 2." in output
    passing = (
        r"\r\033\[K\[3/4\] xsilu-seed=2: step 80/80, \w+ elapsed, 0m00s left\r\033\[K\[3/4\] xsilu-seed=2: val loss"
    )
    assert re.search(passing, output)
    rows, _, _ = without_speed(out)
    assert rows[0]["seeds"] == [1, 2] and rows[1]["seeds"] == [2] and rows[1]["paired_interval"] is None


@pytest.mark.slow
def test_two_processes(config, tmp_path, capsys):
    assert compare.main([config, "--max_steps=12", "--nproc_per_node=2", f"--out={tmp_path}"]) == 0
    assert "xielu-seed=42: val loss" in capsys.readouterr().out
    assert "2 process(es)" in (tmp_path / "xielu-seed=42/output.txt").read_text()
