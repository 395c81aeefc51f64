"""data.py: the shard format, the batch as a pure function of (seed, step), and what must not change under a run.
tokenizer.py: the ids of each tokenizer."""

import importlib.resources
import json
import random
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from plumbing import data
from plumbing.command import UserError
from plumbing.data import Corpus, bits_per_byte, content_hash, find_shards, open_data, order, read_meta
from plumbing.run import check_facts
from plumbing.tokenizer import get_tokenizer
from runs import ODD_TEXTS, ROOT, tokenizer_or_skip


def write(path, tokens, vocab_size=1000):
    dtype = data.token_dtype(vocab_size)
    path.write_bytes(data.shard_header(dtype, len(tokens)) + np.asarray(tokens).astype(dtype).tobytes())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "x_val_000000.bin", np.arange(50))
    write(tmp_path / "x_train_000001.bin", np.arange(100))
    write(tmp_path / "x_train_000002.bin", 100 + np.arange(57))
    write(tmp_path / "x_train_000003.bin", 200 + np.arange(3))  # shorter than a sequence
    return tmp_path


SPLITS = {"val": {"tokens": 50, "bytes": 40}, "train": {"tokens": 160, "bytes": 100}}
META = {"tokenizer": "bytes", "vocab_size": 257, "splits": SPLITS}


# ------------------------------------------------------------------------------------------------ format


@pytest.mark.parametrize("vocab_size, magic, version, itemsize", [(65536, 20240520, 1, 2), (65537, 20240801, 7, 4)])
def test_format(tmp_path, vocab_size, magic, version, itemsize):
    """That of llm.c and modded-nanogpt, written and read."""
    path = tmp_path / "x_val_000000.bin"
    write(path, [1, 2, vocab_size - 1], vocab_size)
    header = np.array([magic, version, 3, *[0] * 253], "<i4")
    assert path.read_bytes() == header.tobytes() + np.array([1, 2, vocab_size - 1], f"<u{itemsize}").tobytes()
    assert data.open_shard(path).read(1, 2).tolist() == [2, vocab_size - 1]


def test_a_name_that_speaks_of_the_other_split(tmp_path):
    write(tmp_path / "my_train_data_val_000000.bin", [1, 2])
    write(tmp_path / "my_train_data_train_000001.bin", [3, 4])
    write(tmp_path / "other_train.bin", [5, 6])
    assert [shard.read(0, 1).item() for shard in find_shards(tmp_path, "train")] == [3, 5]
    assert [shard.read(0, 1).item() for shard in find_shards(tmp_path, "val")] == [1]


def raised(raw, place):
    """With one header number larger by 1."""
    return raw[: 4 * place] + bytes([raw[4 * place] + 1]) + raw[4 * place + 1 :]


DAMAGES = [
    (lambda raw: raw[:-3], "header says 50 tokens, but it holds 48.5"),
    (lambda raw: b"", "shorter than the header"),
    (lambda raw: raised(raw, 0), "magic number 20240521 and version 1 are of no known format"),
    (lambda raw: raised(raw, 1), "magic number 20240520 and version 2 are of no known format"),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_damaged_shards(folder, damage, message):
    path = folder / "x_val_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        Corpus(folder, "val", 8, 1000)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_meta(folder):
    assert read_meta(folder) is None and bits_per_byte(1.0, None, 1) is None
    path, text = folder / "meta.json", json.dumps(META)
    path.write_text(text)
    assert read_meta(folder) == META
    assert bits_per_byte(np.log(2), META, 2) == pytest.approx(48 / 40)  # the first token of a shard is not predicted
    assert bits_per_byte(1.0, json.loads(text.replace("40", "0")), 1) is None
    changes = [("splits", "split"), ('"bytes"', '"bites"'), ('"tokenizer": "bytes"', '"tokenizer": ["bytes"]')]
    changes += [("257", wrong) for wrong in ('"257"', "true", "null", "NaN", "Infinity", "[257]", "1e400", "9" * 5000)]
    changes += [("40", wrong) for wrong in ("-1", "0.5", "{}", "1" + "0" * 400)]
    malformed = ["", "{", "[]", "3", "null", "NaN", '"splits"', "{}", "\xff", "[" * 10**5]
    malformed += [text.replace(*change) for change in changes]
    refused = [(bad, "meta.json is malformed") for bad in malformed]
    refused += [(text.replace("50", "51"), "says 51 val tokens, but the shards hold 50")]
    for bad, message in refused:
        path.write_text(bad, encoding="latin-1")
        with pytest.raises(UserError, match=message) as caught:
            read_meta(folder)
        assert len(str(caught.value)) < 300 + len(str(path))


# ------------------------------------------------------------------------------------------------ order


def test_order():
    """If one of these numbers changes, ORDER_VERSION must."""
    assert data.ORDER_VERSION == 2
    assert order(10, 42, 0).tolist() == [3, 2, 6, 5, 8, 9, 7, 0, 4, 1]
    assert order(10, 2**53 - 1, 7).tolist() == [7, 4, 5, 3, 2, 9, 6, 1, 0, 8]
    orders = [order(1000, seed, epoch).tolist() for seed in (0, 1, 2**32, 2**53 - 1) for epoch in (0, 1)]
    assert all(sorted(numbers) == list(range(1000)) for numbers in orders) and len(set(map(tuple, orders))) == 8


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
    stream = np.concatenate([corpus.batch(7, step, 1) for step in range(40)])
    for size in (2, 5, 8, 40):  # an epoch has 19
        for step in reversed(range(40 // size)):
            expected = stream[step * size : (step + 1) * size]
            assert np.array_equal(corpus.batch(7, step, size), expected)
            shares = [corpus.batch(7, step, size, rank, size) for rank in range(size)]
            assert np.array_equal(np.concatenate(shares), expected)
    assert not np.array_equal(corpus.batch(8, 3, 6), corpus.batch(7, 3, 6))


def test_a_shard_that_is_replaced(folder):
    """The next Corpus reads the new file, although the old one is still open."""
    before = Corpus(folder, "val", 8, 1000).sequence(0)
    write(folder / "new", 500 + np.arange(50))
    (folder / "new").rename(folder / "x_val_000000.bin")
    assert np.array_equal(Corpus(folder, "val", 8, 1000).sequence(0), before + 500)


def test_a_shard_that_ends_early_is_named(folder, monkeypatch):
    corpus = Corpus(folder, "train", 8, 1000)
    path = corpus.shards[0].path
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"{path} cannot be read to its end"):
        corpus.batch(0, 0, 19)
    monkeypatch.setattr("os.pread", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(UserError, match="cannot be read to its end"):
        corpus.batch(0, 0, 1)


@pytest.mark.parametrize("max_tokens", [10**6, 49, 48, 40, 17, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_covers_its_tokens_once(folder, max_tokens, world):
    write(folder / "x_val_000001.bin", 100 + np.arange(20))
    corpus = Corpus(folder, "val", 8, 1000)
    predicted = []
    for rank in range(world):
        for inputs, targets in data.validation_batches(corpus, max_tokens, 3, -1, rank, world):
            assert inputs.shape == targets.shape == (3, 8)
            real = targets >= 0
            assert (targets[real] == inputs[real] + 1).all()
            predicted += targets[real].tolist()
    expected = [*range(1, 50), *range(101, 120)][:max_tokens]
    assert sorted(predicted) == expected


# ------------------------------------------------------------------------------------------------ under a run


def test_content_hash(tmp_path):
    """Other tokens, order, cuts or dtype change it; the names of files do not."""
    tokens = np.random.default_rng(0).integers(0, 1000, 20_000)

    def hash_of(*parts, vocab_size=1000):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for number, part in enumerate(parts):
            write(folder / f"{folder.name}_train_{number:06d}.bin", part, vocab_size)
        return content_hash(find_shards(folder, "train"))

    def changed(tokens, place):
        return tokens + (np.arange(len(tokens)) == place)

    hashes = [hash_of(tokens), hash_of(tokens, vocab_size=10**5), hash_of(tokens[::-1])]
    hashes += [hash_of(changed(tokens, 0)), hash_of(changed(tokens, 19_999))]
    hashes += [hash_of(tokens[:n], tokens[n:]) for n in (10_000, 10_001, 5)] + [hash_of(tokens[5:], tokens[:5])]
    hashes += [hash_of(tokens[:0]), hash_of(tokens[:0], tokens[:0])]
    small = tokens[:4096]  # of a shard this small, every token counts
    hashes += [hash_of(small), *(hash_of(changed(small, 210 * k)) for k in range(20))]
    assert len(set(hashes)) == len(hashes) and hash_of(tokens) == hashes[0]


def config_of(folder, **keys):
    return SimpleNamespace(**{"data": str(folder), "seq_len": 8, "vocab_size": 1000, "eval_tokens": 10} | keys)


def test_data_that_changed_under_a_run(folder, tmp_path):
    """The same tokens in other shards, or in another order, are other data; a moved folder has the same."""
    (folder / "meta.json").write_text(json.dumps(META))
    corpus, validation, meta, facts = open_data(config_of(folder), print)
    assert corpus.n_sequences == 19 and validation.shards[0].tokens == 50 and meta == META
    assert json.loads(json.dumps(facts)) == facts and len(facts) == 4
    moved = folder.rename(tmp_path.with_name("moved"))

    def refused(*changed, began=facts):
        with pytest.raises(UserError, match=f"^{', '.join(changed)} changed since the run in out began"):
            check_facts(began, open_data(config_of(moved), print)[3], "out")

    for began in (facts, {}, {"tokenizer": "bytes"}):
        check_facts(began, open_data(config_of(moved), print)[3], "out")
    refused("order of batches", began=facts | {"order of batches": 0})
    refused("tokenizer", began={"tokenizer": "gpt2"})
    tokens = np.arange(157)
    for parts in [(tokens[:57], tokens[57:]), (tokens[57:], tokens[:57]), (tokens[99::-1], tokens[100:])]:
        for number, part in enumerate(parts, 1):
            write(moved / f"x_train_00000{number}.bin", part)
        refused("training shards")
    write(moved / "x_val_000000.bin", np.arange(50)[::-1])
    (moved / "meta.json").unlink()
    refused("tokenizer", "training shards", "validation shards")


def test_data_that_do_not_fit_the_config(folder):
    """test_train.py::test_mistakes_get_one_line_and_leave_nothing has data that are not there, or of more ids."""
    notes = []
    open_data(config_of(folder), notes.append)
    assert notes.pop() == f"note: {folder} has no meta.json, so bits per byte are not known"
    for name, eval_tokens, noted in [("bytes", 10, False), ("gpt2", 10, True), ("gpt2", 50, False)]:
        (folder / "meta.json").write_text(json.dumps(META | {"tokenizer": name}))
        open_data(config_of(folder, eval_tokens=eval_tokens), notes.append)
        assert noted == ("eval_tokens covers a part" in "".join(notes))
        notes.clear()
    with pytest.raises(UserError, match="too short for one sequence of 100 tokens"):
        open_data(config_of(folder, seq_len=100), print)
    (folder / "meta.json").unlink()
    (folder / "meta.json.part").touch()
    with pytest.raises(UserError, match="is not complete: the prepare_data.py command that began it continues it"):
        open_data(config_of(folder), print)
    (folder / "meta.json.part").unlink()
    write(folder / "x_val_000000.bin", [1])
    with pytest.raises(UserError, match="no validation tokens to predict"):
        open_data(config_of(folder), print)


# ------------------------------------------------------------------------------------------------ tokenizers


def test_gpt2_tokenizer():
    encoding = tokenizer_or_skip("gpt2")
    assert encoding.encode_ordinary("Hello world") == [15496, 995] and encoding.eot_token == 50256


def test_tekken_has_the_ids_of_its_makers():
    tekken = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    theirs = tekken.Tekkenizer.from_file(importlib.resources.files("mistral_common") / "data" / "tekken_240718.json")
    ours = get_tokenizer("tekken")
    assert theirs.n_words == ours.n_vocab == 131072 and theirs.eos_id == ours.eot_token == 2
    rng = random.Random(0)
    parts = [*ODD_TEXTS, "العربية", "कि", "<|endoftext|>", "</s>", "[INST]", "CamelCase"]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 60))) for _ in range(1000)]
    texts += [path.read_text("utf-8") for path in ROOT.glob("*.*") if path.suffix in (".py", ".md")]
    for text in texts:
        ids = ours.encode(text, disallowed_special=())
        assert ids == theirs.encode(text, bos=False, eos=False) and min(ids) >= 1000 and ours.decode(ids) == text


def test_tokenizers_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with pytest.raises(UserError, match="pip install mistral-common"):
        get_tokenizer("tekken")
    with pytest.raises(UserError, match="unknown tokenizer 'gpt5': known are bytes, tekken, gpt2"):
        get_tokenizer("gpt5")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="'p50k_base' could not be downloaded .*TIKTOKEN_CACHE_DIR"):
        get_tokenizer("p50k_base")
