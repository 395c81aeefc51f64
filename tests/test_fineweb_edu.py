"""prepare_data.py fineweb-edu: the real client of Hugging Face, against a local server."""

import os
import random
import sys
import time
from subprocess import PIPE, Popen

import numpy as np
import pytest

from hub import SHA, Hub, write_dataset
from plumbing.data import find_shards, read_meta
from runs import ROOT

# The same program with small batches, and with short waits instead of those that a real network needs
QUICK = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
import prepare_data
from plumbing import sources
sources.PIECE = 5_000
sys.exit(prepare_data.main(sys.argv[1:]))
"""
RNG = random.Random(0)
DOCUMENTS = [f"document {k}: " + "hello wörld 🙂 " * RNG.randint(0, 60) for k in range(900)]
SIZES = ["--tokenizer=bytes", "--tokens=350000", "--val_tokens=10000", "--shard_tokens=40000"]
FIRST, SECOND, THIRD = (f"GET .*/sample/10BT/00{n}_00000.parquet" for n in range(3))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    write_dataset(folder, DOCUMENTS)
    server = Hub(folder)
    yield server
    server.shutdown()


@pytest.fixture
def hub(server):
    """The server in good health."""
    server.faults, server.requests = [], []
    return server


def start(hub, out, *options, **environment):
    environment = os.environ | hub.environment | {"HF_HOME": str(out.parent / "home")} | environment
    command = [sys.executable, "-c", QUICK, "fineweb-edu", f"--out={out}", *SIZES, *options]
    return Popen(command, cwd=ROOT, env=environment, stdout=PIPE, stderr=PIPE, text=True)


def prepare(hub, out, *options, status=0, **environment):
    process = start(hub, out, *options, **environment)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in stderr, stderr
    return stdout, stderr


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What a run without trouble leaves: {name: bytes}."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(server, out)
    return files(out)


def test_the_complete_path(hub, whole, tmp_path):
    """The sample's documents in order, cut at the same token for any number of workers."""
    prepare(hub, tmp_path / "out", "--workers=3")
    assert files(tmp_path / "out") == whole and len(whole) == 11
    shards = [*find_shards(tmp_path / "out", "val"), *find_shards(tmp_path / "out", "train")]
    tokens = np.concatenate([shard.read(0, shard.tokens) for shard in shards])
    expected = b"".join(b"\xff" + text.encode() for text in DOCUMENTS)[:350_000]  # 0xff is in no UTF-8
    assert bytes(np.where(tokens == 256, 255, tokens).astype(np.uint8)) == expected
    meta = read_meta(tmp_path / "out")
    assert meta["source"] == "HuggingFaceFW/fineweb-edu sample-10BT" and meta["settings"]["tokens"] == 350_000
    assert [meta["splits"][split]["tokens"] for split in ("val", "train")] == [10_000, 340_000]
    assert not any("CC-MAIN" in request and "resolve" in request for request in hub.requests)
    assert all(SHA in request for request in hub.requests if "resolve" in request)


TROUBLE = {
    "503 for data about it": [("GET /api", 503, 3)],
    "503": [(f"HEAD .*{SHA}", 503, 1), (SECOND, 503, 2)],
    "drop": [("/tree", "drop", 1), (FIRST, "drop", 2)],
    "cut": [(SECOND, "cut", 2), (THIRD, "cut", 1)],
    "drops": [(THIRD, "drop", 40)],  # more than the client itself tries again
    "429": [("GET /api", 429, 2), (SECOND, 429, 2)],
    "503 for the description": [("README.md", 503, 8)],  # which the client reports as a missing file
}
SLOW = ("503", "429")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TROUBLE])
def test_trouble_that_heals(hub, whole, tmp_path, name):
    hub.faults = list(TROUBLE[name])
    prepare(hub, tmp_path / "out")
    assert all(left == 0 for _, _, left in hub.faults)  # it was met
    assert files(tmp_path / "out") == whole


def test_trouble_that_stays_and_a_second_start(hub, whole, tmp_path):
    """One line, and complete shards stay; the second start requests only what it still needs."""
    out = tmp_path / "out"
    hub.faults = [(THIRD, 503, 10**6)]
    _, stderr = prepare(hub, out, status=2)
    assert stderr.count("error: ") == 1 and "FineWeb-Edu (sample-10BT) could not be read" in stderr
    written = {name: content for name, content in files(out).items() if name.endswith(".bin")}
    assert len(written) >= 7 and all(whole[name] == content for name, content in written.items())

    hub.faults, hub.requests = [], []
    stdout, _ = prepare(hub, out)
    assert f"has {len(written)} shards" in stdout and files(out) == whole
    # the client looks at the first file's columns; for its rows it would ask a second time
    assert sum("GET" in request and "000_00000" in request for request in hub.requests) == 1


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(hub, whole, tmp_path, kills):
    out, rng = tmp_path / "out", random.Random(kills)
    for kill in range(kills):
        process = start(hub, out)
        while process.poll() is None and not (out / f"out_train_{2 * kill + 1:06d}.bin").exists():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.communicate()
    prepare(hub, out)
    assert files(out) == whole


def test_what_is_not_there(hub, tmp_path):
    for options, faults, environment, message in [
        (["--subset=sample-10bt"], [], {}, "BuilderConfig 'sample-10bt' not found"),
        ([], [("/api/datasets", 404, 9)], {}, "404 Not Found"),
        ([], [("/api/datasets", 401, 9)], {}, "401"),
        ([], [], {"HF_HUB_OFFLINE": "1"}, "could not be read from Hugging Face"),
        ([], [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be read from Hugging Face"),
    ]:
        hub.faults = list(faults)
        _, stderr = prepare(hub, tmp_path / "out", *options, status=2, **environment)
        line = stderr.splitlines()[-1]
        assert line.startswith("error: ") and message in line, stderr
        assert not list((tmp_path / "out").glob("*.bin"))
