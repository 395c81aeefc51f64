"""data.py: the shard format, and the batch as a pure function of (seed, step)."""

import importlib.resources
import json
import os
import random
import sys

import numpy as np
import pytest

from data import (
    Corpus,
    UserError,
    bits_per_byte,
    find_shards,
    get_tokenizer,
    open_shard,
    prefetched,
    read_meta,
    shard_header,
    shuffled,
    token_dtype,
    validation_batches,
)
from runs import ODD_TEXTS, ROOT


def write(path, tokens, vocab_size=1000):
    dtype = token_dtype(vocab_size)
    path.write_bytes(shard_header(dtype, len(tokens)) + np.asarray(tokens).astype(dtype).tobytes())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "x_val_000000.bin", np.arange(50))
    write(tmp_path / "x_train_000001.bin", np.arange(100))
    write(tmp_path / "x_train_000002.bin", 100 + np.arange(57))
    write(tmp_path / "x_train_000003.bin", 200 + np.arange(3))  # shorter than a sequence
    return tmp_path


# ------------------------------------------------------------------------------------------------ format


@pytest.mark.parametrize("vocab_size, magic, version, itemsize", [(65536, 20240520, 1, 2), (65537, 20240801, 7, 4)])
def test_format(tmp_path, vocab_size, magic, version, itemsize):
    path = tmp_path / "x_val_000000.bin"
    write(path, [1, 2, vocab_size - 1], vocab_size)
    raw = path.read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [magic, version, 3] + [0] * 253
    assert len(raw) == 1024 + 3 * itemsize
    assert open_shard(path).read(1, 2).tolist() == [2, vocab_size - 1]


def test_reads_what_others_write(tmp_path):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 4
    with open(tmp_path / "fineweb_train_000001.bin", "wb") as file:
        file.write(header.tobytes())
        file.write(np.array([50256, 7, 8, 9], np.uint16).tobytes())
    assert find_shards(tmp_path, "train")[0].read(0, 4).tolist() == [50256, 7, 8, 9]


def test_a_name_that_speaks_of_the_other_split(tmp_path):
    write(tmp_path / "my_train_data_val_000000.bin", [1, 2])
    write(tmp_path / "my_train_data_train_000001.bin", [3, 4])
    write(tmp_path / "other_train.bin", [5, 6])
    assert [shard.read(0, 1).item() for shard in find_shards(tmp_path, "train")] == [3, 5]
    assert [shard.read(0, 1).item() for shard in find_shards(tmp_path, "val")] == [1]


def damage(raw, kind):
    header = np.frombuffer(raw[:1024], "<i4").copy()
    if kind == "truncated":
        return raw[:-3]
    if kind == "longer":
        return raw + b"12"
    if kind == "empty":
        return b""
    if kind == "header only in part":
        return raw[:500]
    header[{"magic": 0, "version": 1, "count": 2}[kind]] += 1
    return header.tobytes() + raw[1024:]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "header says 50 tokens, it holds 48.5"),
        ("longer", "header says 50 tokens, it holds 51"),
        ("count", "header says 51 tokens, it holds 50"),
        ("empty", "shorter than the header"),
        ("header only in part", "shorter than the header"),
        ("magic", "its magic number is 20240521"),
        ("version", "version 2 of the shard format"),
    ],
)
def test_damaged_shards(folder, kind, message):
    path = folder / "x_val_000000.bin"
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(UserError, match=message) as caught:
        Corpus(folder, "val", 8, 1000)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder_and_shards(tmp_path):
    with pytest.raises(UserError, match="no data folder"):
        find_shards(tmp_path / "none", "train")
    with pytest.raises(UserError, match="no train shards"):
        find_shards(tmp_path, "train")


def test_meta(folder):
    assert read_meta(folder) is None
    splits = {"val": {"tokens": 50, "bytes": 40}, "train": {"tokens": 160, "bytes": 100}}
    good = {"tokenizer": "bytes", "vocab_size": 257, "splits": splits}
    path = folder / "meta.json"
    path.write_text(json.dumps(good))
    assert read_meta(folder) == good
    assert bits_per_byte(np.log(2), good) == pytest.approx(50 / 40)
    assert bits_per_byte(1.0, None) is None
    empty = {"val": {"tokens": 50, "bytes": 0}, "train": splits["train"]}
    assert bits_per_byte(1.0, good | {"splits": empty}) is None
    bad = ["{", "[]", "3", "{}", "\xff", "[" * 10**5]
    bad += [json.dumps(good | change) for change in ({"splits": {}}, {"vocab_size": "257"}, {"vocab_size": True})]
    bad += [json.dumps(good | {"splits": splits | {"val": {"tokens": 50, "bytes": value}}}) for value in (-1, 0.5)]
    for text in bad:
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="meta.json is malformed"):
            read_meta(folder)
    path.write_text(json.dumps(good | {"splits": splits | {"val": {"tokens": 51, "bytes": 40}}}))
    with pytest.raises(UserError, match="tells of 51 val tokens, but the shards hold 50"):
        read_meta(folder)


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    for seed, epoch in [(0, 0), (0, 1), (42, 0), (2**40, 3)]:
        assert sorted(shuffled(np.arange(n), n, seed, epoch)) == list(range(n))


def test_shuffled_looks_random():
    n = 10_000
    orders = [shuffled(np.arange(n), n, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1)]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        assert np.mean(np.abs(np.diff(order))) == pytest.approx(n / 3, rel=0.03)
        counts = np.histogram2d(np.arange(n), order, bins=10)[0]
        assert 40 < ((counts - 100) ** 2 / 100).sum() < 150  # chi-square of about 81 degrees of freedom
        for other in orders[:number]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05


def test_shuffled_needs_no_room_for_large_n():
    n = 10**13
    places = shuffled(np.arange(1000), n, 1, 0)
    assert len(set(places.tolist())) == 1000 and places.min() >= 0 and places.max() < n


# ------------------------------------------------------------------------------------------------ sequences


def test_an_epoch_has_every_sequence_once(folder):
    corpus = Corpus(folder, "train", 8, 1000)
    assert corpus.n_sequences == 12 + 7
    starts = [corpus.batch(7, step, 1)[0] for step in range(2 * 19)]
    expected = sorted([8 * k for k in range(12)] + [100 + 8 * k for k in range(7)])
    for epoch in (starts[:19], starts[19:]):
        assert sorted(row[0] for row in epoch) == expected
        assert all(row.tolist() == list(range(row[0], row[0] + 9)) for row in epoch)
    assert [row[0] for row in starts[:19]] != [row[0] for row in starts[19:]]


def test_the_batch_does_not_depend_on_how_it_is_asked_for(folder):
    corpus = Corpus(folder, "train", 8, 1000)
    stream = np.concatenate([corpus.batch(7, step, 1) for step in range(30)])
    for size in (2, 5, 6):
        for step in reversed(range(30 // size)):
            assert np.array_equal(corpus.batch(7, step, size), stream[step * size : (step + 1) * size])
    assert np.array_equal(Corpus(folder, "train", 8, 1000).batch(7, 3, 6), corpus.batch(7, 3, 6))
    assert not np.array_equal(corpus.batch(8, 3, 6), corpus.batch(7, 3, 6))


def test_batch_larger_than_an_epoch(folder):
    rows = Corpus(folder, "train", 8, 1000).batch(0, 0, 38)
    starts, times = np.unique(rows[:, 0], return_counts=True)
    assert len(starts) == 19 and (times == 2).all()


def test_tokens_beyond_the_vocabulary(folder):
    with pytest.raises(UserError, match=r"x_train_00000[12].bin holds token \d+, beyond vocab_size=10"):
        Corpus(folder, "train", 8, 10).batch(0, 0, 19)


@pytest.mark.parametrize("max_tokens", [10**6, 49, 48, 40, 17, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_covers_its_tokens_once(folder, max_tokens, world):
    write(folder / "x_val_000001.bin", 100 + np.arange(20))
    corpus = Corpus(folder, "val", 8, 1000)
    predicted = []
    for rank in range(world):
        for inputs, targets in validation_batches(corpus, max_tokens, 3, -1, rank, world):
            assert inputs.shape == targets.shape == (3, 8)
            real = targets >= 0
            assert (targets[real] == inputs[real] + 1).all()
            predicted += targets[real].tolist()
    expected = [*range(1, 50), *range(101, 120)][:max_tokens]
    assert sorted(predicted) == expected


def test_prefetched_keeps_order_and_raises():
    assert list(prefetched(lambda k: k * k, range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetched(lambda k: k, [])) == []

    def fail(k):
        if k == 2:
            raise UserError("bad token")
        return k

    results = prefetched(fail, range(5))
    assert next(results) == 0 and next(results) == 1
    with pytest.raises(UserError, match="bad token"):
        next(results)


# ------------------------------------------------------------------------------------------------ tokenizers


def test_bytes_tokenizer():
    encoding = get_tokenizer("bytes")
    text = "naïve 🙂\r\n\0<|endoftext|>"
    ids = encoding.encode_to_numpy(text, disallowed_special=()).tolist()
    assert ids == list(text.encode()) and encoding.decode(ids) == text
    assert encoding.n_vocab == 257 and encoding.eot_token == 256


def test_gpt2_tokenizer():
    try:
        encoding = get_tokenizer("gpt2")
    except UserError:
        pytest.skip("no gpt2 tokenizer here: set TIKTOKEN_CACHE_DIR")
    assert encoding.encode_ordinary("Hello world") == [15496, 995] and encoding.eot_token == 50256


def test_tekken_tokenizer():
    pytest.importorskip("mistral_common")
    encoding = get_tokenizer("tekken")
    assert encoding.n_vocab == 131072 and encoding.eot_token == 2
    ids = encoding.encode("naïve <|endoftext|></s>", disallowed_special=())
    assert min(ids) >= 1000 and encoding.decode(ids) == "naïve <|endoftext|></s>"


def test_tekken_has_the_ids_of_its_makers():
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    theirs = tekken.Tekkenizer.from_file(importlib.resources.files("mistral_common") / "data" / "tekken_240718.json")
    ours = get_tokenizer("tekken")
    assert theirs.n_words == ours.n_vocab and theirs.eos_id == ours.eot_token
    rng = random.Random(0)
    parts = [*ODD_TEXTS, "العربية", "कि", "<|endoftext|>", "</s>", "[INST]", "CamelCase"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 60))) for _ in range(1000)]
    texts += [path.read_text("utf-8") for path in ROOT.glob("*.*") if path.suffix in (".py", ".md")]
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode(text, bos=False, eos=False)


def test_tokenizers_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with pytest.raises(UserError, match="pip install mistral-common"):
        get_tokenizer("tekken")
    with pytest.raises(UserError, match="unknown tokenizer 'gpt5': known are bytes, tekken, gpt2"):
        get_tokenizer("gpt5")
    monkeypatch.setitem(os.environ, "TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(os.environ, "HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="'p50k_base' could not be downloaded .*TIKTOKEN_CACHE_DIR"):
        get_tokenizer("p50k_base")
