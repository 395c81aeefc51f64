"""tools/follow.py: every line of the log once, live and across a resumption, and nothing that was discarded."""

import itertools
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from runs import error
from tools import follow


@pytest.fixture
def wandb(monkeypatch):
    """In place of W&B, a client that notes what it is told: sent = {id of a run: {step: values}}."""
    client = Mock(sent={})
    client.errors.Error = LookupError
    numbers = itertools.count()

    def init(id, **_):
        run = Mock(id=id or f"run{next(numbers)}")
        steps = client.sent.setdefault(run.id, {})
        run.log = lambda values: steps.setdefault(values["step"], {}).update(values)
        return run

    client.init.side_effect = init
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


@pytest.fixture
def grows(fake_run, monkeypatch):
    """(a function that writes logs one after another into a run's folder whenever follow waits, then presses Ctrl-C;
    the lines of the whole log; the same, of a run that went back and continued otherwise)."""
    out, _ = fake_run("xsilu", 1, [5.0, 4.0, 3.0, 2.0], {"alpha": [[0.0, 0.0], [0.1, 0.2], [0.2, 0.3], [0.3, 0.4]]})
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)

    def write(*logs):
        left = iter(logs)

        def wait(seconds=0):
            if (log := next(left, None)) is None:
                raise KeyboardInterrupt
            (out / "log.jsonl").write_text("".join(log))

        monkeypatch.setattr(time, "sleep", wait)
        wait()
        return str(out)

    return write, lines, [*lines[:4], '{"kind": "val", "step": 20, "loss": 3.5}\n', *lines[5:]]


def test_scalars():
    record = {"kind": "val", "step": 5, "loss": 1.5, "bits_per_byte": None, "alpha": [0.25, 0.5]}
    record |= {"spike": True, "grad_norm": "nan"}
    assert follow.scalars(record) == {"val/loss": 1.5, "val/alpha/layer 1": 0.25, "val/alpha/layer 2": 0.5}


def test_tensorboard(grows, capsys):
    """An empty log, a line that is torn, a run that goes back, and a second start: each point is there once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write, lines, changed = grows
    for logs in ([[], lines[:3] + [lines[3][:20]], lines[:5], changed[:3], changed], [changed]):
        out = write(*logs)
        assert follow.main([out, "--to=tensorboard"]) == 0
        events = EventAccumulator(out + "/tensorboard")
        events.Reload()
        points = {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert points["val/loss"] == [(0, 5.0), (10, 4.0), (20, 3.5), (30, 2.0)]
        assert points["val/alpha/layer 2"] == [(0, 0.0), (10, 0.2), (30, 0.4)]
        assert points["train/tokens_per_s"] == [(10, 110.0), (20, 120.0), (30, 130.0)]
    assert "is finished" in capsys.readouterr().out


def test_wandb(grows, wandb):
    """A run of W&B continues after an interruption; where the log says something else about the past, another begins,
    and so it does if wandb.json is damaged."""
    write, lines, changed = grows
    for logs, status in [([lines[:4]], 130), ([lines[:5], changed[:5]], 130), ([changed], 0)]:
        assert follow.main([write(*logs), "--to=wandb"]) == status
    for content in ("", "[1]", "5"):
        out = write(lines)
        Path(out, "wandb.json").write_text(content)
        assert follow.main([out, "--to=wandb"]) == 0
    sent = [{step: values.get("val/loss") for step, values in steps.items()} for steps in wandb.sent.values()]
    first, second, *others = sent
    assert first == {0: 5.0, 10: 4.0, 20: 3.0} and second == {0: 5.0, 10: 4.0, 20: 3.5, 30: 2.0}
    assert others == [{0: 5.0, 10: 4.0, 20: 3.0, 30: 2.0}] * 3


def test_wandb_itself_offline(fake_run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    assert follow.main([str(out), "--to=wandb"]) == 0
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))


MISTAKES = [
    (["run", "--to=mlflow"], "invalid choice: 'mlflow' (choose from"),
    (["none", "--to=tensorboard"], "none is not the folder of a run"),
    (["run", "--to=tensorboard"], "needs an optional package: pip install tensorboard"),
    (["run", "--to=wandb"], "run `wandb login` once"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes(fake_run, wandb, tmp_path, monkeypatch, capsys, arguments, message):
    fake_run("relu2", 1, [5.0, 4.0], folder="run")
    monkeypatch.chdir(tmp_path)
    wandb.init.side_effect = LookupError("no API key configured")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert message in error(capsys, *arguments, main=follow.main)
