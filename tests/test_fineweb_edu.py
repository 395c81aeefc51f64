"""prepare_data.py fineweb-edu: the real client of Hugging Face, against a local server."""

import multiprocessing
import random
import shutil
import time

import pytest

from hub import SHA, Hub, prepare_quickly, write_dataset
from plumbing.data import read_meta
from test_prepare_data import contents, stream_of, tokens

RNG = random.Random(0)
DOCUMENTS = [f"document {k}: " + "hello wörld 🙂 " * RNG.randint(0, 60) for k in range(900)]
SIZES = ["--tokenizer=bytes", "--tokens=350000", "--val_tokens=10000", "--shard_tokens=40000"]
FIRST, SECOND, THIRD = (f"GET .*/sample/10BT/00{n}_00000.parquet" for n in range(3))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server, and in its `fork` what starts processes: forks of one that has imported the client, which takes
    seconds, and knows the server's address."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    write_dataset(folder, DOCUMENTS)
    server = Hub(folder)
    server.fork, server.home = multiprocessing.get_context("forkserver"), folder.parent / "home"
    server.fork.set_forkserver_preload(["datasets", "torch"])  # which datasets imports later
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (server.environment | {"HF_HOME": str(server.home)}).items():
            patch.setenv(name, value)
        yield server
    server.shutdown()


@pytest.fixture
def hub(server):
    """The server in good health, and a client that has nothing in its cache."""
    server.faults, server.requests = [], []
    shutil.rmtree(server.home, ignore_errors=True)
    return server


def start(hub, out, *options, **constants):
    arguments = ["fineweb-edu", f"--out={out}", *SIZES, *options]
    process = hub.fork.Process(target=prepare_quickly, args=(arguments, out.with_name("log"), constants))
    process.start()
    return process


def prepare(hub, out, *options, status=0, **constants):
    """What is printed."""
    process = start(hub, out, *options, **constants)
    process.join(120)
    printed = out.with_name("log").read_text()
    assert process.exitcode == status and "Traceback" not in printed, printed
    return printed


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """What a run without trouble leaves: {name: bytes}."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(server, out)
    return contents(out)


def test_the_complete_path(hub, whole, tmp_path):
    """The sample's documents in order, cut at the same token for any number of workers."""
    prepare(hub, tmp_path / "out", "--workers=3")
    assert contents(tmp_path / "out") == whole and len(whole) == 12
    val, train = tokens(tmp_path / "out")
    assert len(val) == 10_000 and val + train == stream_of(DOCUMENTS)[:350_000]
    meta = read_meta(tmp_path / "out")
    assert meta["source"] == "HuggingFaceFW/fineweb-edu sample-10BT" and meta["settings"]["tokens"] == 350_000
    assert not any("CC-MAIN" in request and "resolve" in request for request in hub.requests)
    assert all(SHA in request for request in hub.requests if "resolve" in request)


TROUBLE = {
    "503 for data about it": [("GET /api", 503, 3)],
    "503": [(f"HEAD .*{SHA}", 503, 1), (SECOND, 503, 2)],
    "drop": [("/tree", "drop", 1), (FIRST, "drop", 2)],
    "cut": [(SECOND, "cut", 2), (THIRD, "cut", 1)],
    "drops": [(THIRD, "drop", 130)],  # more than the client itself tries again
    "429": [("GET /api", 429, 2), (SECOND, 429, 2)],
    "503 for the description": [("README.md", 503, 8)],  # which the client reports as a missing file
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_heals(hub, whole, tmp_path, name):
    hub.faults = list(TROUBLE[name])
    printed = prepare(hub, tmp_path / "out")
    assert "trying again in 1 s" in printed or name != "drops"
    assert all(left == 0 for _, _, left in hub.faults)  # it was met
    assert contents(tmp_path / "out") == whole


def test_trouble_that_stays_and_a_second_start(hub, whole, tmp_path):
    """One line, and complete shards stay; the second start requests only what it still needs."""
    out = tmp_path / "out"
    hub.faults = [(THIRD, 503, 10**6)]
    printed = prepare(hub, out, status=2)
    assert printed.count("error: ") == 1 and "FineWeb-Edu (sample-10BT) could not be read" in printed
    written = contents(out, "*.bin")
    assert len(written) >= 7 and all(whole[name] == content for name, content in written.items())

    assert "trying again" not in prepare(hub, out, status=2, HF_HUB_OFFLINE=True)
    hub.faults, hub.requests = [], []
    assert f"has {len(written)} shards" in prepare(hub, out) and contents(out) == whole
    # the client looks at the first file's columns; for its rows it would ask a second time
    assert sum("GET" in request and "000_00000" in request for request in hub.requests) == 1


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(hub, whole, tmp_path, kills):
    out, rng = tmp_path / "out", random.Random(kills)
    for kill in range(kills):
        process = start(hub, out)
        while process.is_alive() and not (out / f"out_train_{2 * kill + 1:06d}.bin").exists():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
    prepare(hub, out)
    assert contents(out) == whole


def test_what_is_not_there(hub, tmp_path):
    for options, faults, constants, message in [
        (["--subset=sample-10bt"], [], {}, "BuilderConfig 'sample-10bt' not found"),
        ([], [("/api/datasets", 404, 9)], {}, "404 Not Found"),
        ([], [("/api/datasets", 401, 9)], {}, "401"),
        ([], [], {"HF_HUB_OFFLINE": True}, "could not be read from Hugging Face"),
        ([], [], {"ENDPOINT": "http://127.0.0.1:9"}, "start again to continue, or give your own texts or stdlib"),
    ]:
        hub.faults = list(faults)
        line = prepare(hub, tmp_path / "out", *options, status=2, **constants).splitlines()[-1]
        assert line.startswith("error: ") and message in line, line
        assert not contents(tmp_path / "out", "*.bin")
