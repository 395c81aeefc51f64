"""What all tests share. It imports torch late: pytest-xdist loads this file once more, before it starts its workers."""

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# A shell that starts the tests in the background has them, and all programs that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def compile_again():
    """train.main --compile=False clears a switch of this process, which the next test must not inherit."""
    import torch

    import xielu

    xielu.COMPILE = True
    # Beyond this many variants of one function torch.compile runs it uncompiled, and a test of compiled code tests
    # nothing
    torch._dynamo.config.recompile_limit = 100


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of shards: train.py, byte by byte."""
    import prepare_data

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text((ROOT / "train.py").read_text())
    assert prepare_data.main([f"{folder}/text.txt", "--tokenizer=bytes", f"--out={folder}/bytes"]) == 0
    return folder / "bytes"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "tiny"


@pytest.fixture
def config(tmp_path, corpus, out):
    """A config file of a tiny run, whose folder is `out`."""
    from runs import TINY

    path = tmp_path / "tiny.py"
    path.write_text(TINY + f'data = "{corpus}"\nout = "{out}"\n')
    return path


@pytest.fixture
def fake_run(tmp_path):
    """A function that writes the folder of a finished run, as train.py would have, with these validation losses."""
    from train import Config

    def write(activation, seed, losses, scalars=None, folder=None, **keys):
        folder = tmp_path / (folder or f"{activation}-seed={seed}")
        steps = {"max_steps": 10 * (len(losses) - 1), "warmup_steps": 0, "decay_steps": 0, "tokens_per_step": 1000}
        config = Config(activation=activation, seed=seed, out=str(folder), resume=True, **steps, **keys)
        records = []
        for step, loss in zip(range(0, 10 * len(losses), 10), losses):
            speed = {"kind": "train", "step": step, "tokens": 1000 * step, "tokens_per_s": 100.0 + step}
            validation = {"kind": "val", "step": step, "tokens": 1000 * step, "loss": loss, "bits_per_byte": loss / 2}
            records += [speed] if step else []
            records += [validation | {name: values[step // 10] for name, values in (scalars or {}).items()}]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"config": asdict(config)}))
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder, config

    return write
