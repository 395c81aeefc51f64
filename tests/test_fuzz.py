"""Random input to everything that reads input: the config, the shards, the checkpoint. Each gives a correct result or a
UserError; never another exception, a hang or a wrong result."""

import builtins
import contextlib
import io
import json
import math
from dataclasses import fields
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plumbing import sources
from plumbing.command import UserError
from plumbing.data import Corpus, find_shards, read_meta, shard_header
from plumbing.run import VERSION, read_checkpoint
from train import Config

# Every example rewrites the same files
fuzz = settings(max_examples=150, deadline=60_000, suppress_health_check=[HealthCheck.function_scoped_fixture])

KEYS = st.sampled_from(list(Config.defaults()))
NUMBERS = st.integers() | st.floats() | st.integers(-3, 600)
WORDS = st.sampled_from(["True", "false", "swiglu", "inverted", "1e400", "0x10"])
TEXTS = st.text(max_size=12) | NUMBERS.map(str) | WORDS
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
BYTES = st.tuples(st.integers(0, 1100), st.integers(0, 255))  # where, and which
LITERALS = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@contextlib.contextmanager
def refused_or_correct():
    """Ends the block at a UserError that says what is wrong. Any other exception fails the test."""
    try:
        yield
    except UserError as error:
        assert str(error)


def check_config(folder, content, *arguments):
    """The Config of a file and a command line has values that make sense: sizes divide, numbers are finite. Or a
    UserError says what is wrong."""
    path = folder / "config.py"
    path.write_bytes(content)
    with refused_or_correct():
        from_file, options = Config.read_command([str(path), *arguments])
        config = Config(**(from_file | options))
        config.check_batch(1)
        assert config.dim % config.n_heads == 0 and config.n_heads % config.n_kv_heads == 0
        assert config.tokens_per_step % (config.seq_len * config.micro_batch_size) == 0
        assert config.warmup_steps + config.decay_steps <= config.max_steps
        for item in fields(Config):
            value = getattr(config, item.name)
            # shares of steps have become numbers of steps
            kind = int if item.name in ("warmup_steps", "decay_steps", "eval_every") else item.type
            assert type(value) is kind and (kind is not float or np.isfinite(value))


@fuzz
@given(st.lists(st.tuples(KEYS | st.text(max_size=8), TEXTS | st.none()), max_size=4))
def test_command_lines(tmp_path, keys):
    check_config(tmp_path, b"", *(f"--{name}" + ("" if value is None else f"={value}") for name, value in keys))


@fuzz
@given(st.dictionaries(KEYS, LITERALS, max_size=4))
def test_config_files(tmp_path, values):
    lines = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    with patch.multiple(builtins, create=True, inf=math.inf, nan=math.nan):  # as Python writes them
        check_config(tmp_path, lines.encode())


@fuzz
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_files_that_are_no_config(tmp_path, content):
    check_config(tmp_path, b"# " + content)


@fuzz
@given(st.lists(BYTES, max_size=4), st.integers(-600, 600), st.sampled_from([257, 40]))
def test_shards(tmp_path, changes, longer, vocab_size):
    """Bytes changed, cut off or added: if the file is still read, it is with its own tokens, all in the vocabulary."""
    content = bytearray(shard_header(np.dtype("<u2"), 300) + np.arange(300, dtype="<u2").__mod__(50).tobytes())
    for place, value in changes:
        content[place] = value
    content = content[: len(content) + longer] if longer < 0 else content + bytes(longer)
    (tmp_path / "a_train_000001.bin").write_bytes(content)
    with refused_or_correct():
        (shard,) = find_shards(tmp_path, "train")
        assert shard.tokens * shard.dtype.itemsize == len(content) - 1024
        corpus = Corpus(tmp_path, "train", 16, vocab_size)
        if corpus.n_sequences:
            batch = corpus.batch(1, 0, 20)
            assert batch.shape == (20, 17) and batch.min() >= 0 and batch.max() < vocab_size
            held = np.frombuffer(bytes(content[1024:]), shard.dtype)
            assert set(batch.ravel().tolist()) <= set(held.tolist())


@fuzz
@given(LITERALS | st.dictionaries(st.sampled_from(["tokenizer", "vocab_size", "splits", "x"]), LITERALS, max_size=4))
def test_meta(tmp_path, meta):
    """Whole, but with no shards beside it, and cut off."""
    text = json.dumps(meta)
    for content in (text, text[:-1]):
        (tmp_path / "meta.json").write_text(content)
        with pytest.raises(UserError):
            read_meta(tmp_path)


@fuzz
@given(st.lists(st.sampled_from(["a", "b c", " ", "\n", "\n\n", "\r\n", "\t", "\x0c", "ü"]), max_size=40).map("".join))
def test_documents_of_a_text(text):
    """Those that a look at each line finds, but for the white space around them."""
    paragraphs, blank = [""], False
    for line in text.split("\n"):
        if blank and not line[:1].isspace() and line:
            paragraphs.append("")
        blank = not line.strip()
        paragraphs[-1] += line + "\n"
    for kind, documents in (("lines", text.split("\n")), ("paragraphs", paragraphs)):
        found = [part.strip() for part in sources.parts(text, sources.SEPARATORS[kind])]
        assert sorted(found) == sorted(part.strip() for part in documents if part.strip())


PLAIN = {"version": VERSION, "step": 3, "seconds": 1.5, "loss_average": 2.5, "facts": {}}
PLAIN |= {"config": Config.defaults(), "from_file": {}}
MODEL = {"weight": torch.arange(400, dtype=torch.float32)}
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}
torch.save(PLAIN | {"model": MODEL, "optimizers": [OPTIMIZER]}, WHOLE := io.BytesIO())


@fuzz
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3), st.floats(0, 1))
@example([], 1)
def test_checkpoints(tmp_path, changes, kept):
    """Bits flipped or the end cut off: it is refused, or nothing that counts was changed, and it is read as it was."""
    content = bytearray(WHOLE.getvalue())
    for place, bits in changes:
        content[int(place * len(content))] ^= bits
    if kept < 0.5:
        content = content[: int(2 * kept * len(content))]
    path = tmp_path / "fuzzed.pt"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    untouched = content == WHOLE.getvalue()
    with contextlib.nullcontext() if untouched else refused_or_correct():
        state = read_checkpoint(path, Config)
        assert torch.equal(state.pop("model")["weight"], MODEL["weight"])
        assert state.pop("optimizers") == [OPTIMIZER]
        assert state == PLAIN
