"""Whole runs of train.py, for the tests that watch them: a tiny config, and how to start it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import train

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


def launch(*arguments, processes=1, threads=1, torchrun=(), **options):
    """A process that trains; `processes` of them through torchrun, with these options of torchrun's."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}", *torchrun]
    command += [str(ROOT / "train.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def run(*arguments, status=0, **options):
    process = launch(*arguments, **options)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == status, stderr
    return stdout + stderr


def error(capsys, *arguments):
    """The one line on standard error that a mistake gets, with status 2."""
    assert train.main([str(argument) for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    return stderr


def log(out, *leave_out):
    """The lines of a log, without what depends on the clock."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_s", "mfu", *leave_out)
    return [{name: value for name, value in record.items() if name not in clock} for record in records]
