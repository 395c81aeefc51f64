"""tools/follow.py: every line of the log once, live and across a resumption."""

import json
import sys
import threading
import time
import types

import pytest

from tools import follow


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)


def test_scalars():
    record = {
        "kind": "val",
        "step": 5,
        "loss": 1.5,
        "bits_per_byte": None,
        "alpha": [0.25, 0.5],
        "spike": True,
        "x": "nan",
    }
    assert follow.scalars(record) == {"val/loss": 1.5, "val/alpha/layer 1": 0.25, "val/alpha/layer 2": 0.5}


def test_a_run_that_grows_and_is_resumed(fake_run):
    """Live; the log torn in the middle of a line; then replaced by a shorter one, as a resumption does."""
    out, _ = fake_run("xsilu", 1, [5.0, 4.0, 3.0, 2.0], {"alpha": [[0.0, 0.0], [0.1, 0.2], [0.2, 0.3], [0.3, 0.4]]})
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    found = []
    reader = threading.Thread(target=lambda: found.extend(follow.follow(out)), daemon=True)
    reader.start()
    time.sleep(0.1)
    path.write_text("".join(lines[:5]))
    time.sleep(0.1)
    path.write_text("".join(lines[:3]))
    time.sleep(0.1)
    path.write_text("".join(lines))
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert found == [json.loads(line) for line in lines]


def test_tensorboard(fake_run, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = fake_run("xsilu", 1, [5.0, 4.0, 3.0], {"alpha": [[0.0, 0.0], [0.1, 0.2], [0.2, 0.3]]})
    for _ in range(2):  # the second time, nothing is there twice
        assert follow.main([str(out), "--to=tensorboard"]) == 0
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        points = {tag: [(e.step, round(e.value, 5)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert points["val/loss"] == [(0, 5.0), (10, 4.0), (20, 3.0)]
        assert points["val/alpha/layer 2"] == [(0, 0.0), (10, 0.2), (20, 0.3)]
        expected = [(r["step"], r["tokens_per_s"]) for r in log_of(out) if r["kind"] == "train"]
        assert points["train/tokens_per_s"] == expected and len(expected) == 2
    assert "is finished" in capsys.readouterr().out


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_wandb(fake_run, monkeypatch):
    """What its client is told, by one that writes it down: each line once, in order, under one id."""
    told = []

    class Run:
        def __init__(self, **options):
            self.id = options["id"]
            told.append(("init", options["id"], options["resume"]))

        def log(self, values, step):
            told.append((self.id, step, values))

    wandb = types.SimpleNamespace(init=lambda **options: Run(**options))
    wandb.errors = types.SimpleNamespace(Error=Warning)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out, _ = fake_run("relu2", 1, [5.0, 4.0, 3.0])
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:3]))

    def stop(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", stop)
        assert follow.main([str(out), "--to=wandb"]) == 130
    (out / "log.jsonl").write_text("".join(lines))
    assert follow.main([str(out), "--to=wandb"]) == 0
    (_, first, _), (_, second, resume) = [entry for entry in told if entry[0] == "init"]
    assert first == second and resume == "allow"
    sent = [entry for entry in told if entry[0] == first]
    steps = [step for _, step, _ in sent]
    assert steps == sorted(steps) and set(steps) == {0, 10, 20}
    merged = {}
    for _, step, values in sent:
        merged.setdefault(step, {}).update(values)
    assert [merged[step]["val/loss"] for step in (0, 10, 20)] == [5.0, 4.0, 3.0]
    assert merged[20]["train/tokens_per_s"] == 120.0


def test_wandb_itself_offline(fake_run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    assert follow.main([str(out), "--to=wandb"]) == 0
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_without_a_key(fake_run, monkeypatch, capsys):
    class NoKey(Exception):
        pass

    def init(**options):
        raise NoKey("no API key configured")

    wandb = types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=NoKey))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    for content, message in [("", "cannot be read"), ("[1]", "cannot be read"), (None, "wandb login")]:
        (out / "wandb.json").unlink(missing_ok=True)
        if content is not None:
            (out / "wandb.json").write_text(content)
        assert follow.main([str(out), "--to=wandb"]) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize("content", ["", "[]", "null", '{"config": "x"}', '{"config": {}}'])
def test_a_config_that_is_none(fake_run, capsys, content):
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    (out / "config.json").write_text(content)
    assert follow.main([str(out), "--to=tensorboard"]) == 2
    assert "no config.json that can be read" in capsys.readouterr().err


def test_mistakes(fake_run, tmp_path, monkeypatch, capsys):
    out, _ = fake_run("relu2", 1, [5.0, 4.0])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for arguments, message in [
        ([], "say which run"),
        ([str(out)], "--to=tensorboard or --to=wandb"),
        ([str(out), "--to=mlflow"], "--to=tensorboard or --to=wandb"),
        ([str(tmp_path / "none"), "--to=tensorboard"], "is no run of train.py"),
        ([str(out), "--to=tensorboard"], "needs an optional package: pip install tensorboard"),
        ([str(out), "--to=wandb"], "needs an optional package: pip install wandb"),
    ]:
        assert follow.main(arguments) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and stderr.count("\n") == 1, stderr
