"""Random input to what reads input: the config, the shards, the checkpoint. Each gives a right result or a UserError;
never another exception, a hang or a wrong result."""

import builtins
import json
import math
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from data import Corpus, UserError, find_shards, read_meta, shard_header
from train import Config, check, read_checkpoint, read_config

# Files are rewritten by each example, in a folder that all of them share
fuzz = settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])

KEYS = st.sampled_from([item.name for item in fields(Config)]) | st.text(max_size=8)
NUMBERS = st.integers() | st.floats() | st.integers(-3, 600)
TEXTS = (
    st.text(max_size=12) | NUMBERS.map(str) | st.sampled_from(["True", "false", "swiglu", "inverted", "1e400", "0x10"])
)
LITERALS = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


def is_a_run(config):
    """Its checked values make sense: sizes divide, numbers are finite."""
    model = check(config, 1)
    assert model.dim % model.n_heads == 0 and model.n_heads % model.n_kv_heads == 0
    assert config.tokens_per_step % (config.seq_len * config.micro_batch_size) == 0
    assert config.warmup_steps + config.decay_steps <= config.max_steps
    for item in fields(Config):
        value = getattr(config, item.name)
        assert type(value) is item.type and (item.type is not float or np.isfinite(value))


@fuzz
@given(st.lists(st.tuples(KEYS, TEXTS | st.none()), max_size=4))
def test_command_lines(tmp_path, keys):
    path = tmp_path / "config.py"
    path.write_text("")
    arguments = [f"--{name}" + ("" if value is None else f"={value}") for name, value in keys]
    try:
        from_file, options = read_config([str(path), *arguments])
        is_a_run(train.replace(from_file, **options))
    except UserError as error:
        assert str(error)


@fuzz
@given(st.dictionaries(st.sampled_from([item.name for item in fields(Config)]), LITERALS, max_size=4))
def test_config_files(tmp_path, values):
    vars(builtins).update(inf=math.inf, nan=math.nan)  # as Python writes them
    path = tmp_path / "config.py"
    text = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    path.write_text(text)
    try:
        from_file, options = read_config([str(path)])
        is_a_run(train.replace(from_file, **options))
    except UserError as error:
        assert str(error)


@fuzz
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_files_that_are_no_config(tmp_path, content):
    path = tmp_path / "config.py"
    path.write_bytes(b"# " + content)
    try:
        assert isinstance(read_config([str(path)])[0], Config)
    except UserError as error:
        assert str(error)


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 255)), max_size=4),
    st.integers(-600, 600),
    st.sampled_from([257, 40]),
)
def test_shards(tmp_path, changes, longer, vocab_size):
    """Bytes changed, cut off or added: what is still read has the tokens that the file holds, all in the vocabulary."""
    content = bytearray(shard_header(np.dtype("<u2"), 300) + np.arange(300, dtype="<u2").__mod__(50).tobytes())
    for place, value in changes:
        content[place] = value
    content = content[: len(content) + longer] if longer < 0 else content + bytes(longer)
    path = tmp_path / "a_train_000001.bin"
    path.write_bytes(content)
    try:
        (shard,) = find_shards(tmp_path, "train")
        assert shard.tokens * shard.dtype.itemsize == len(content) - 1024
        corpus = Corpus(tmp_path, "train", 16, vocab_size)
        if corpus.n_sequences:
            batch = corpus.batch(1, 0, 20)
            assert batch.shape == (20, 17) and batch.min() >= 0 and batch.max() < vocab_size
            held = np.frombuffer(bytes(content[1024:]), shard.dtype)
            assert set(batch.ravel().tolist()) <= set(held.tolist())
    except UserError as error:
        assert str(error)


@fuzz
@given(LITERALS | st.dictionaries(st.sampled_from(["tokenizer", "vocab_size", "splits", "x"]), LITERALS, max_size=4))
def test_meta(tmp_path, meta):
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError):  # there are no shards beside it
        read_meta(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(meta)[:-1])
    with pytest.raises(UserError):
        read_meta(tmp_path)


STATE = {
    "model": {"weight": torch.arange(400, dtype=torch.float32)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []},
    "step": 3,
    "seconds": 1.5,
    "loss_average": 2.5,
    "config": {"dim": 3},
    "from_file": {},
    "data": {},
}


@fuzz
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3), st.floats(0, 1))
def test_checkpoints(tmp_path_factory, changes, kept):
    """Bits flipped or the end cut off: refused, or, where that changed nothing that counts, read as it was."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    whole = path.with_name("whole.pt")
    if not whole.exists():
        torch.save(STATE, whole)
    content = bytearray(whole.read_bytes())
    for place, bits in changes:
        content[int(place * len(content))] ^= bits
    if kept < 0.5:
        content = content[: int(2 * kept * len(content))]
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        assert str(error)
        return
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])
    assert state["optimizer"]["state"][0]["step"] == 3
    assert {name: state[name] for name in STATE if name not in ("model", "optimizer")} == {
        name: STATE[name] for name in STATE if name not in ("model", "optimizer")
    }


def test_the_whole_checkpoint_is_read(tmp_path):
    torch.save(STATE, tmp_path / "whole.pt")
    shutil.copy(tmp_path / "whole.pt", tmp_path / "copy.pt")
    assert read_checkpoint(tmp_path / "copy.pt")["step"] == 3
