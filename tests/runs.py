"""Whole runs of train.py, for the tests that watch them: a tiny config, and how to start it."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
import xielu
from plumbing.command import UserError
from plumbing.tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent
# Pieces of text at whose seams tokenizers differ
ODD_TEXTS = ["word", " word", "Δ", " ²", "e\u0301", " ", "\n", "\n\n", "!\n/", "ünï", "  ", "\t", "\r\n", "'s", "12"]
ODD_TEXTS += ["=", "\u00a0", "\x1c", "\u2028", "🙂", "漢字"]
TINY = """
activation = "relu2"
dim = 32
n_layers = 2
n_heads = 2
n_kv_heads = 2
ffn_dim = 48
vocab_size = 257
seq_len = 32
tokens_per_step = 256
micro_batch_size = 4
max_steps = 12
warmup_steps = 3
decay_steps = 4
eval_every = 5
eval_tokens = 1000
log_every = 1
checkpoint_every = 4
compile = False
device = "cpu"
dtype = "float32"
"""


def free_port():
    """A port of this machine that no program uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(*arguments, processes=1, threads=1, torchrun=(), **options):
    """A process that trains; `processes` of them through torchrun, with these options of torchrun's."""
    command = [sys.executable]
    if processes > 1:
        port = f"--master_port={free_port()}"
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", port, *torchrun]
    command += [str(ROOT / "train.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def run(*arguments, status=0, **options):
    """The text that a process which trains has printed, on either stream, until it ended with this status."""
    process = launch(*arguments, **options)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stderr
    return stdout + stderr


@contextlib.contextmanager
def settings_restored():
    """Undo what a run sets for its whole process. Inside, one thread, as `run` has: the same losses, bit for bit."""
    threads, compiles = torch.get_num_threads(), xielu.COMPILE
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        xielu.COMPILE = compiles


def here(*arguments, status=0):
    """run() in this process, without the seconds that a new one takes to start: the text on standard output."""
    with settings_restored(), contextlib.redirect_stdout(io.StringIO()) as text:
        assert train.main([str(argument) for argument in arguments]) == status, text.getvalue()
    return text.getvalue()


def error(capsys, *arguments, main=train.main):
    """The one line on standard error that a mistake gets, from train.py or another program, with status 2."""
    capsys.readouterr()
    with settings_restored():
        assert main([str(argument) for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


def tokenizer_or_skip(name):
    """The tokenizer of this name; the test is skipped where it cannot be had."""
    try:
        return get_tokenizer(name)
    except UserError as missing:
        pytest.skip(str(missing))


def log(out):
    """The lines of a log, without what depends on the clock."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_s", "mfu")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def assert_same_losses(out, other, rel):
    """Two logs have the same lines, and their losses differ by rounding alone."""
    for record, expected in zip(log(out), log(other), strict=True):
        expected["loss"] = pytest.approx(expected["loss"], rel=rel)
        assert all(record[name] == expected[name] for name in ("kind", "step", "tokens", "loss"))
