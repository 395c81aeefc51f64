"""tools/follow.py: every line of the log once, live and across a resumption."""

import json
import sys
import time
from unittest.mock import Mock

import pytest

from tools import follow


def error(capsys, *arguments):
    """The one line that a mistake prints."""
    assert follow.main(list(map(str, arguments))) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


@pytest.fixture
def wandb(monkeypatch):
    """In place of W&B, a client that notes what it is told."""
    client = Mock()
    client.errors.Error = LookupError
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def test_scalars():
    record = {"kind": "val", "step": 5, "loss": 1.5, "bits_per_byte": None, "alpha": [0.25, 0.5]}
    record |= {"spike": True, "grad_norm": "nan"}
    assert follow.scalars(record) == {"val/loss": 1.5, "val/alpha/layer 1": 0.25, "val/alpha/layer 2": 0.5}


def test_a_run_that_grows_and_is_resumed(fake_run, monkeypatch):
    """Live; the log torn in the middle of a line; then replaced by a shorter one, as a resumption does."""
    out, _ = fake_run("xsilu", 1, [5.0, 4.0, 3.0, 2.0], {"alpha": [[0.0, 0.0], [0.1, 0.2], [0.2, 0.3], [0.3, 0.4]]})
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    logs = [lines[:2] + [lines[2][:20]], lines[:5], lines[:3], lines]
    left = iter(logs)

    def write_next(seconds=0):
        path.write_text("".join(next(left)))

    monkeypatch.setattr(time, "sleep", write_next)  # instead of waiting
    write_next()
    assert list(follow.follow(out)) == [json.loads(line) for line in lines]
    assert next(left, None) is None


def test_tensorboard(fake_run, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = fake_run("xsilu", 1, [5.0, 4.0, 3.0], {"alpha": [[0.0, 0.0], [0.1, 0.2], [0.2, 0.3]]})
    for _ in range(2):  # after the second time, no point is in it twice
        assert follow.main([str(out), "--to=tensorboard"]) == 0
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        points = {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert points["val/loss"] == [(0, 5.0), (10, 4.0), (20, 3.0)]
        assert points["val/alpha/layer 2"] == [(0, 0.0), (10, 0.2), (20, 0.3)]
        assert points["train/tokens_per_s"] == [(10, 110.0), (20, 120.0)]
    assert "is finished" in capsys.readouterr().out


def test_an_empty_log(fake_run, wandb, monkeypatch, capsys):
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text("")
    monkeypatch.setattr(time, "sleep", lambda seconds: (out / "log.jsonl").write_text(log))
    assert follow.main([str(out), "--to=wandb"]) == 0
    assert "nothing is logged yet" in capsys.readouterr().out and wandb.init().log.call_count == 3


def test_wandb(fake_run, wandb, monkeypatch):
    """Each line once, in order, under one id, also when following was interrupted."""
    monkeypatch.setattr(time, "sleep", Mock(side_effect=KeyboardInterrupt))
    out, _ = fake_run("relu2", 1, [5.0, 4.0, 3.0])
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    for written, status in ((lines[:3], 130), (lines, 0)):
        (out / "log.jsonl").write_text("".join(written))
        assert follow.main([str(out), "--to=wandb"]) == status
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] == second["id"] and first["resume"] == "allow"
    sent = [(call.kwargs["step"], call.args[0]) for call in wandb.init().log.call_args_list]
    # the last step is sent again, since W&B adds what has the same step
    assert [step for step, _ in sent] == [0, 10, 10, 10, 10, 20, 20]
    losses = {step: values["val/loss"] for step, values in sent if "val/loss" in values}
    assert losses == {0: 5.0, 10: 4.0, 20: 3.0} and sent[-2][1]["train/tokens_per_s"] == 120.0


def test_wandb_itself_offline(fake_run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    assert follow.main([str(out), "--to=wandb"]) == 0
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "content, message", [("", "cannot be read"), ("[1]", "cannot be read"), (None, "run `wandb login` once")]
)
def test_wandb_that_cannot_start(fake_run, wandb, capsys, content, message):
    wandb.init.side_effect = LookupError("no API key configured")
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    if content is not None:
        (out / "wandb.json").write_text(content)
    assert message in error(capsys, out, "--to=wandb")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"config": "x"}', '{"config": {}}'])
def test_a_folder_that_is_not_a_run(fake_run, capsys, content):
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    (out / "config.json").write_text(content)
    assert "no config.json that train.py wrote" in error(capsys, out, "--to=tensorboard")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: run, --to"),
        (["relu2-seed=1", "--to=mlflow"], "invalid choice: 'mlflow' (choose from"),
        (["none", "--to=tensorboard"], "none is not the folder of a run"),
        (["relu2-seed=1", "--to=tensorboard"], "needs an optional package: pip install tensorboard"),
        (["relu2-seed=1", "--to=wandb"], "needs an optional package: pip install wandb"),
    ],
)
def test_mistakes(fake_run, tmp_path, monkeypatch, capsys, arguments, message):
    fake_run("relu2", 1, [5.0, 4.0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert message in error(capsys, *arguments)
