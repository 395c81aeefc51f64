"""prepare_data.py: text in, shards out, whatever interrupts it."""

import collections
import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

import prepare_data
from plumbing import sources, unfinished
from plumbing.command import UserError
from plumbing.data import find_shards, read_meta
from plumbing.tokenizer import get_tokenizer
from runs import ODD_TEXTS, ROOT


def command(*arguments):
    return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]


def run(*arguments, status=0, **options):
    result = subprocess.run(command(*arguments), capture_output=True, text=True, **options)
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr
    return result


def main(*arguments):
    return prepare_data.main([str(argument) for argument in arguments])


def limited(what, most):
    """For preexec_fn: a function that limits a resource."""
    return lambda: resource.setrlimit(what, (most, most))


def error(capsys, *arguments):
    """The one line that a mistake gets, in this process."""
    assert main(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def tokens(folder):
    """(validation tokens, training tokens) of a folder of shards."""
    splits = [find_shards(folder, split) for split in ("val", "train")]
    return [np.concatenate([shard.read(0, shard.tokens) for shard in shards]).tolist() for shards in splits]


def prepared(source, out, *options):
    """Prepare in this process, with a token per byte, and return (validation tokens, training tokens)."""
    assert main(source, f"--out={out}", "--tokenizer=bytes", *options) == 0
    return tokens(out)


def documents_of(splits):
    """The documents in (validation tokens, training tokens) of bytes, whose delimiter is 256."""
    text = "".join("\0END\0" if token == 256 else chr(token) for token in sum(splits, []))
    return [document.encode("latin-1").decode() for document in text.split("\0END\0")[1:]]


def contents(folder, pattern="*"):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def tokenizer_or_skip(name):
    try:
        return get_tokenizer(name)
    except UserError:
        pytest.skip(f"the tokenizer {name} is not here: set TIKTOKEN_CACHE_DIR")


DOCUMENTS = [f"document {k}: " + "hello wörld 🙂\r\n" * (k % 7) for k in range(200)] + ["", "<|endoftext|> is text"]


def write_jsonl(path, documents=DOCUMENTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def stream_of(documents):
    return [token for text in documents for token in (256, *text.encode())]


def write_lines(path, documents=DOCUMENTS):
    path.write_text("".join(text.replace("\r\n", " ") + "\n" for text in documents))
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl")


# ------------------------------------------------------------------------------------------------ text in, shards out


@pytest.mark.parametrize("workers", [1, 3])
def test_split_counts_and_names(jsonl, tmp_path, monkeypatch, capsys, workers):
    """The same for any number of workers, with many batches and documents that are cut."""
    monkeypatch.setattr(sources, "PIECE", 700)
    monkeypatch.setattr(prepare_data, "PIECE", 50)
    out = tmp_path / "mine"
    val, train = prepared(jsonl, out, "--val_tokens=1e3", "--shard_tokens=5_000", f"--workers={workers}")
    stream = stream_of(DOCUMENTS)
    assert val == stream[:1000] and train == stream[1000:]
    count = -(-(len(stream) - 1000) // 5000)
    names = ["mine_val_000000.bin"] + [f"mine_train_{k:06d}.bin" for k in range(1, count + 1)]
    assert sorted(contents(out)) == sorted([*names, "lock", "meta.json"])
    meta = read_meta(out)
    assert meta["vocab_size"] == 257 and meta["tokenizer"] == "bytes" and meta["source"] == str(jsonl)
    for split, part in (("val", val), ("train", train)):
        documents = part.count(256)
        assert meta["splits"][split] == {"tokens": len(part), "bytes": len(part) - documents, "documents": documents}
    printed = capsys.readouterr()
    assert "tok/s" in printed.err and f"train: {len(train):,} tokens" in printed.out


def test_every_kind_of_file(tmp_path, capsys):
    folder, out = tmp_path / "texts", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufefffirst\r\ntext ü".encode())
    (folder / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"second text" * 100))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "third"}\n'))
    (folder / "d.jsonl.zst").write_bytes(pa.compress(b'{"text": "fourth"}\n', "zstd", asbytes=True))
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["fifth", None, "sixth"]}), folder / "e.parquet")
    (folder / "f.TXT.GZ").write_bytes(gzip.compress(b"seventh"))
    (folder / "notes.md").write_text("left out")
    (folder / ".hidden.txt").write_text("left out")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a.txt").write_text("left out")
    (folder / "g.txt").write_text("eighth ü", "utf-16")
    (folder / "circle").symlink_to(".")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h.txt").write_text("ninth")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    expected = [
        "first\r\ntext ü",
        "second text" * 100,
        "third",
        "fourth",
        "fifth",
        "sixth",
        "seventh",
        "eighth ü",
        "ninth",
    ]
    assert sorted(documents_of(prepared(folder, out, "--val_tokens=20"))) == sorted(expected)
    stderr = capsys.readouterr().err
    assert f"skipped parquet rows without a text: 1 ({folder}/e.parquet)\n" in stderr
    assert f"files not read, which do not end in .txt, .jsonl, .parquet: 1 ({folder}/notes.md)\n" in stderr
    only_txt = prepared(f"{folder}/[ad]*/**/*.txt*", tmp_path / "out2", "--val_tokens=20")
    assert documents_of(only_txt) == ["second text" * 100]
    # the same order wherever the folder is
    moved = shutil.copytree(folder, tmp_path / "moved", symlinks=True)
    assert prepared(moved, tmp_path / "out3", "--val_tokens=20") == tokens(out)


def test_the_key_of_the_text_and_the_delimiter_in_a_text(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [json.dumps({"content": f"document {k}"}) for k in range(3)])
    prepared(tmp_path / "a.jsonl", tmp_path / "out", "--text_key=content", "--val_tokens=5")
    assert sorted(documents_of(tokens(tmp_path / "out"))) == [f"document {k}" for k in range(3)]
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo<|endoftext|>three")
    prepared(tmp_path / "a.txt", tmp_path / "cut", "--documents=endoftext", "--val_tokens=5")
    assert sorted(documents_of(tokens(tmp_path / "cut"))) == ["one", "three", "two"]
    assert "ordinary text" not in capsys.readouterr().err
    prepared(tmp_path / "a.txt", tmp_path / "whole", "--val_tokens=5")
    printed = capsys.readouterr()
    assert "texts with <|endoftext|> as ordinary text (--documents=endoftext cuts there): 1" in printed.err
    assert "note: one document fills both splits; --documents=paragraphs" in printed.out


# What a tokenizer may choke on, a million characters of each
REPEATED = [" ", "\n", "\t", "\u00a0", "a", "é", "1", "!", "'s", "漢", "🙂", "\r\n "]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "cl100k_base"])
def test_a_million_characters_of_a_kind(name):
    """They come back, whatever the tokenizer can read in one piece; what is cut is counted."""
    encoding, skipped = tokenizer_or_skip(name), sources.Skipped()
    for repeated in REPEATED:
        text = repeated * (10**6 // len(repeated)) + "end"
        _, joined = prepare_data.encode(encoding, skipped, (0, [text]))
        assert encoding.decode(joined[1:].tolist()) == text, repr(repeated)
    assert name == "bytes" or sum(count for count, _ in skipped.values()) > 0


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_progress_knows_how_many_tokens_there_will_be(tmp_path, monkeypatch, name):
    """After the first half within 5 %, and at the end exactly; with --tokens, no more than that."""
    monkeypatch.setattr(sources, "PIECE", 50_000)
    randomness, path = random.Random(1), tmp_path / name
    documents = [randomness.randbytes(60).hex() for _ in range(40_000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    if name == "a.parquet":  # one row group; its pages, which are read one by one, have a megabyte by default
        pq.write_table(pa.table({"text": documents}), path, data_page_size=10_000, use_dictionary=False)
    elif name.startswith("a.jsonl"):
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    else:
        text = "\n".join(documents).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    cut, in_all = "lines" if name in ("a.txt", "a.txt.gz") else None, 121 * len(documents)
    for most in (math.inf, 700_000):
        source, bar = sources.open_source(str(path), "", cut, sources.Skipped()), tqdm(file=io.StringIO())
        encoded = map(partial(prepare_data.encode, get_tokenizer("bytes"), sources.Skipped()), source.read(None))
        shown = [(bar.n, bar.total) for _ in prepare_data.counted(encoded, source, most, bar)]
        expected = min(in_all, most)
        later = [total for count, total in shown if count > expected / 2]
        assert later and (bar.n, bar.total) == (expected, expected)
        assert all(total == pytest.approx(expected, rel=0.05) for total in later)


def test_progress_over_several_files(tmp_path, jsonl):
    """A file without documents counts when the next one is read; one that has gone since is skipped and named."""
    for name in ("a.jsonl", "c.jsonl"):
        shutil.copy(jsonl, tmp_path / name)
    (tmp_path / "b.jsonl").write_text("no JSON\n" * 1000)
    (tmp_path / "d.jsonl").write_text('{"text": "gone"}')
    skipped = sources.Skipped()
    source = sources.open_source(f"{tmp_path}/[a-d].jsonl", "", None, skipped)
    (tmp_path / "d.jsonl").unlink()
    ((position, documents),) = source.read(None)
    assert len(documents) == 2 * len(DOCUMENTS) and source.share(position) == pytest.approx(1 - 16 / source.size)
    assert skipped["files read only up to an error (FileNotFoundError)"] == (1, [f"{tmp_path}/d.jsonl"])


def test_progress_of_a_preparation_that_continues(jsonl, tmp_path, monkeypatch, capsys):
    """Its bar ends at the number of all tokens, those of before included."""
    monkeypatch.setattr(sources, "PIECE", 700)
    options = ["--tokenizer=bytes", f"--out={tmp_path}/out", "--val_tokens=100", "--shard_tokens=1000"]
    killed_at(9, monkeypatch, jsonl, *options)
    bars = []
    monkeypatch.setattr("tqdm.tqdm", lambda **keys: bars.append(tqdm(**keys)) or bars[0])
    capsys.readouterr()
    assert main(jsonl, *options) == 0
    assert "continuing from there" in capsys.readouterr().out
    assert bars[0].n == bars[0].total == len(stream_of(DOCUMENTS))


def test_what_cannot_be_used_is_counted_and_named(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b'{"text": "good"}\n\nnot json\n{"text": 3}\n[]\n{"text": "\\ud800!"}\r\n{"tex')
    (folder / "b.txt").write_bytes(b"bad \xff utf-8 \0 and NUL")
    (folder / "c.parquet").write_bytes(b"no parquet")
    (folder / "d.txt.gz").write_bytes(b"no gzip")
    pq.write_table(pa.table({"body": ["no text"]}), folder / "e.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "g.parquet")
    (folder / "f.txt").write_text("the end")
    (folder / "h.txt").symlink_to("/proc/self/mem")  # opens, and cannot be read
    write_jsonl(folder / "i.jsonl", [0] * 12)
    texts = documents_of(prepared(folder, tmp_path / "out", "--val_tokens=5"))
    assert sorted(texts) == sorted(["good", "?!", "bad \ufffd utf-8 \0 and NUL", "the end"])
    stderr = capsys.readouterr().err
    lines = [f"{folder}/a.jsonl:{number}" for number in (3, 4, 5, 7)]
    lines += [f"{folder}/i.jsonl:{number}" for number in range(1, 7)]
    assert f'skipped lines that are not a JSON object with a "text": 16 ({", ".join(lines)}, …)\n' in stderr
    assert f'skipped parquet files without a column "text": 1 ({folder}/e.parquet)\n' in stderr
    assert f"skipped parquet rows without a text: 2 ({folder}/g.parquet, …)\n" in stderr
    assert f"files read only up to an error (ArrowInvalid): 1 ({folder}/c.parquet)\n" in stderr
    assert "files read only up to an error (OSError): 2 (" in stderr
    assert f"{folder}/d.txt.gz" in stderr and f"{folder}/h.txt" in stderr
    assert f"U+FFFD replaces bytes that are not UTF-8 in texts: 1 ({folder}/b.txt)\n" in stderr


TEXT = "\ufeff\n\none \r\n two\u2028\n \n\t\r\n three\r\n  \r\n\n\nfour\n\n\n\nfour\nfive\n\nsix ü\n\n"


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "documents, expected",
    [
        ("lines", ["one ", "six ü", "five", " three", "four", " two\u2028", "four"]),
        ("paragraphs", ["six ü", "one \r\n two\u2028\n \n\t\r\n three", "four\nfive", "four"]),
    ],
)
def test_a_text_is_cut_into_documents(tmp_path, monkeypatch, documents, expected, workers):
    """In this order on every machine. An indented paragraph belongs to the one before it."""
    monkeypatch.setattr(sources, "PIECE", 5)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    options = [f"--documents={documents}", f"--workers={workers}", "--val_tokens=10"]
    for out in (tmp_path / "first", tmp_path / "second"):
        assert sum(prepared(tmp_path / "a.txt.gz", out, *options), []) == stream_of(expected)
        assert read_meta(out)["source"] == f"{tmp_path}/a.txt.gz cut into {documents}"


def test_documents_are_shuffled_within_their_file(tmp_path):
    """So that the validation split is not one end of it."""
    (tmp_path / "texts").mkdir()
    for name, first in (("a.txt", 1000), ("b.txt", 2000)):
        write_lines(tmp_path / "texts" / name, [str(first + k) for k in range(1000)])
    val, train = prepared(tmp_path / "texts", tmp_path / "out", "--documents=lines", "--val_tokens=1000")
    numbers = np.array([int(bytes(part)) for part in np.reshape(val + train, (2000, 5))[:, 1:].astype(np.uint8)])
    assert set(numbers[:1000]) == set(range(1000, 2000)) and set(numbers[1000:]) == set(range(2000, 3000))
    assert np.histogram(numbers[:200], 4, (1000, 2000))[0].min() > 30  # the validation tokens are from every quarter
    assert abs(np.corrcoef(numbers[:1000], range(1000))[0, 1]) < 0.1


def test_blank_lines_take_little_time():
    """A million of them, where a time that grows with their square would be days."""
    for text in ("\n" * 10**6, " \n" * 10**6, "\r\n" * 10**6):
        assert sources.parts(f"a{text} b", sources.SEPARATORS["paragraphs"]) == [f"a{text} b"]
        assert sorted(sources.parts(f"a{text}b", sources.SEPARATORS["paragraphs"])) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, line, times, size, documents",
    [
        ("one.txt", b"0123456789" * 10**5, 100, 10**8, 1),  # 100 MB without a space
        ("short.jsonl", b'{"text": "x"}\n' * 10**6, 10, 10**7, 10**7),
        ("empty.jsonl", b'{"text": ""}\n' * 10**6, 1, 0, 10**6),
    ],
)
def test_extreme_documents(tmp_path, name, line, times, size, documents):
    """In bounded memory."""
    with open(tmp_path / name, "wb") as file:
        file.writelines([line] * times)
    run(tmp_path / name, "--tokenizer=bytes", f"--out={tmp_path}/out")
    splits = read_meta(tmp_path / "out")["splits"].values()
    assert [sum(split[key] for split in splits) for key in ("bytes", "documents")] == [size, documents]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1.5 * 2**20  # KiB


def test_a_text_larger_than_memory(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(2**35)
    line = [tmp_path / "large.txt", "--tokenizer=bytes", f"--out={tmp_path}/out"]
    stderr = run(*line, status=2, preexec_fn=limited(resource.RLIMIT_AS, 2**34)).stderr
    assert stderr.splitlines()[-1].startswith(f"error: a text in {tmp_path}/large.txt does not fit in memory")


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2", "cl100k_base"])
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tokenizer, monkeypatch):
    encoding = tokenizer_or_skip(tokenizer)
    monkeypatch.setattr(prepare_data, "PIECE", 200)
    random.seed(1)
    text = "".join(random.choice(ODD_TEXTS) for _ in range(20_000)) + Path(__file__).read_text()
    pieces = list(prepare_data.cut(text))
    assert len(pieces) > 100 and "".join(pieces) == text
    position, joined = prepare_data.encode(encoding, sources.Skipped(), (7, [text, "next"]))
    whole = [[encoding.eot_token, *encoding.encode(part, disallowed_special=())] for part in (text, "next")]
    assert position == 7 and joined.tolist() == sum(whole, [])
    pieces = list(prepare_data.cut("x" * 20_000))  # with no place to cut
    assert "".join(pieces) == "x" * 20_000 and max(map(len, pieces)) == 1600


def test_wide_tokens(tmp_path):
    encoding = tokenizer_or_skip("cl100k_base")
    text = "Übergrößenträger " * 200
    (tmp_path / "a.txt").write_text(text)
    val, train = prepared(tmp_path / "a.txt", tmp_path / "out", "--tokenizer=cl100k_base")
    stream = [encoding.eot_token, *encoding.encode(text)]
    assert val + train == stream and len(val) == len(stream) // 10
    meta = read_meta(tmp_path / "out")
    assert meta["vocab_size"] == 100277
    assert sum(meta["splits"][s]["bytes"] for s in ("val", "train")) == len(text.encode())


@pytest.mark.parametrize("most, expected", [(10**6, 300), (200, 200)])
def test_tokens_stops_and_val_defaults_to_a_tenth(jsonl, tmp_path, monkeypatch, most, expected):
    monkeypatch.setattr(prepare_data, "MOST_VAL_TOKENS", most)
    val, train = prepared(jsonl, tmp_path / "out", "--tokens=3000")
    assert len(val) == expected and val + train == stream_of(DOCUMENTS)[:3000]


def test_stdlib(tmp_path):
    assert main("stdlib", f"--out={tmp_path}/out", "--tokens=300000") == 0
    val, train = tokens(tmp_path / "out")
    assert len(val) == 30_000 and len(train) == 270_000
    files = sources.stdlib_files()
    assert not any("/test/" in str(path) or "/site-packages/" in str(path) for path in files)
    assert files != sorted(files) and files == sources.stdlib_files()
    first = stream_of([files[0].read_text("utf-8", "replace")])[:300_000]
    assert (val + train)[: len(first)] == first
    assert "stdlib of Python" in read_meta(tmp_path / "out")["source"]


# ------------------------------------------------------------------------------------------------ full folders


SMALL = ["--tokenizer=bytes", "--val_tokens=1000", "--shard_tokens=1500", "--workers=2"]


class Killed(BaseException):
    """What ends a process at a call to the disk."""


def killed_at(number, monkeypatch, *line):
    """Start, and stop at call `number` to the disk, before it is done; whether there were so many calls."""
    left = iter(range(number))

    def until_killed(function):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (unfinished, "open_shard")):
            patch.setattr(owner, name, until_killed(getattr(owner, name)))
        main(*line)
        return False
    return True


def test_a_refused_folder_stays_as_it_was(jsonl, tmp_path, monkeypatch, capsys):
    """Name for name and byte for byte: not even a lock is added."""
    out, line = tmp_path / "out", [jsonl, *SMALL]

    def refused(folder, message, *options):
        (folder / "lock").unlink(missing_ok=True)
        before = contents(folder)
        assert message in error(capsys, *line, f"--out={folder}", *options) and contents(folder) == before

    assert killed_at(20, monkeypatch, *line, f"--out={out}")
    damaged = out / "out_train_000002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    refused(out, "unfinished data of other settings", "--val_tokens=900")
    refused(out.rename(tmp_path / "renamed"), "shards from elsewhere")
    (tmp_path / "renamed").rename(out)
    assert sum(prepared(jsonl, out, *SMALL), []) == stream_of(DOCUMENTS)
    assert "does not hold the shards that it had: starting over" in capsys.readouterr().out

    before = contents(out)
    assert main(*line, f"--out={out}") == 0 and "already complete" in capsys.readouterr().out
    assert contents(out) == before
    refused(out, "data of other settings", "--val_tokens=100")
    (out / "out_train_000001.bin").unlink()
    refused(out, "train tokens, but the shards hold")
    (out / "meta.json").write_text("{")
    refused(out, "meta.json is malformed")
    (out / "meta.json").unlink()
    refused(out, "shards from elsewhere")


def test_a_folder_that_fills_before_it_is_locked(jsonl, tmp_path, monkeypatch, capsys):
    lock_folder = prepare_data.lock_folder

    def late(out):
        lock = lock_folder(out)
        (out / "out_train_000001.bin").write_bytes(b"of another process")
        return lock

    monkeypatch.setattr(prepare_data, "lock_folder", late)
    assert "shards from elsewhere" in error(capsys, jsonl, "--tokenizer=bytes", f"--out={tmp_path}/out")
    assert contents(tmp_path / "out", "*.bin") == {"out_train_000001.bin": b"of another process"}


@pytest.mark.parametrize("name", ["out", "o[1]", "*"])
@pytest.mark.parametrize("state", ["{", "[1]", '{"shards": 3}', "\xff"])
def test_what_an_interrupted_run_left_is_replaced(jsonl, tmp_path, name, state):
    whole, out = tmp_path / "a" / name, tmp_path / "b" / name
    assert main(jsonl, f"--out={whole}", *SMALL) == 0
    out.mkdir(parents=True)
    (out / "meta.json.part").write_text(state, "latin-1")
    (out / f"{name}_train_000099.bin").write_bytes(b"left over")
    (out / f"{name}_train_000100.bin.tmp").write_bytes(b"left over")
    (out / "my_train_notes.tmp").write_bytes(b"not ours")
    assert main(jsonl, f"--out={out}", *SMALL) == 0
    assert contents(out) == contents(whole) | {"my_train_notes.tmp": b"not ours"}


@pytest.mark.parametrize("documents", [["before all others", *DOCUMENTS], [t.replace("o", "0") for t in DOCUMENTS]])
def test_an_input_that_has_changed_is_read_from_its_beginning(jsonl, tmp_path, monkeypatch, capsys, documents):
    """Also if it is as long as before."""
    assert killed_at(20, monkeypatch, jsonl, *SMALL, f"--out={tmp_path}/out")
    write_jsonl(jsonl, documents)
    assert sum(prepared(jsonl, tmp_path / "out", *SMALL), []) == stream_of(documents)
    assert "files that have changed: starting over" in capsys.readouterr().out


def test_another_cut_is_refused(tmp_path, monkeypatch, capsys):
    """Both for an unfinished and for a complete folder."""
    line = [write_lines(tmp_path / "a.txt"), *SMALL, f"--out={tmp_path}/out"]
    assert killed_at(20, monkeypatch, *line, "--documents=lines")
    for whose in ("unfinished data of other settings", "data of other settings"):
        for options in (["--documents=paragraphs"], []):
            assert whose in error(capsys, *line, *options)
        assert main(*line, "--documents=lines") == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize("write, options", [(write_jsonl, []), (write_lines, ["--documents=lines"])])
def test_stopped_at_any_call_to_the_disk(tmp_path, monkeypatch, capsys, write, options):
    """Whatever the last call was before a kill, also within a batch, the next start makes the bytes of a run that was
    never stopped, and keeps the shards that are complete."""
    monkeypatch.setattr(sources, "PIECE", 700)
    out, name = tmp_path / "out", "a.jsonl" if write is write_jsonl else "a.txt"
    line = [write(tmp_path / name), *SMALL, *options, f"--out={out}"]
    assert main(*line, f"--out={tmp_path}/whole/out") == 0
    whole = contents(tmp_path / "whole" / "out")
    continued, number = set(), 0
    while killed_at(number, monkeypatch, *line):
        killed_at(number // 2, monkeypatch, *line)  # and the start after it as well
        capsys.readouterr()
        assert main(*line) == 0 and contents(out) == whole
        continued.update(re.findall(r"has \d+ shards with .*: continuing from there", capsys.readouterr().out))
        shutil.rmtree(out)
        number += 1
    assert number > 40 and len(continued) > 8


@pytest.mark.parametrize("name, options", [("a.jsonl", []), ("a.txt", ["--documents=lines"])])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills, name, options):
    """kill -9 of the real process."""
    rng = random.Random(kills)
    write = write_lines if options else write_jsonl
    source = write(tmp_path / name, ["x" * rng.randint(0, 300) for _ in range(40_000)])
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    line = [source, "--tokenizer=bytes", "--shard_tokens=200000", *options]
    assert main(*line, f"--out={whole}") == 0
    for _ in range(kills):
        process = subprocess.Popen(command(*line, f"--out={out}"), stderr=subprocess.DEVNULL)
        while not (out / "meta.json.part").exists() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
    assert main(*line, f"--out={out}") == 0
    assert contents(out) == contents(whole) and len(contents(out)) > 5


def test_two_preparations_in_one_folder_and_ctrl_c(tmp_path, capsys):
    line = ["stdlib", f"--out={tmp_path}/out", "--shard_tokens=2"]  # which takes for ever
    first = subprocess.Popen(command(*line), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "meta.json.part").exists():
        assert first.poll() is None
        time.sleep(0.01)
    assert "another process writes to" in error(capsys, *line)
    first.send_signal(signal.SIGINT)
    stderr = first.communicate(timeout=60)[1]
    assert first.returncode == 130 and "Traceback" not in stderr
    assert stderr.endswith("interrupted: the same command continues from the last whole shard\n")


# ------------------------------------------------------------------------------------------------ room and mistakes


def test_room_is_looked_at_first(jsonl, tmp_path, monkeypatch, capsys):
    def free(bytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("usage", "free")(bytes))

    line = [jsonl, f"--out={tmp_path}/out", "--tokenizer=bytes"]
    free(29_999)
    assert "needs 0.0 GB for 15,000 tokens" in error(capsys, *line, "--tokens=15000")
    assert list(contents(tmp_path / "out")) == ["lock"]
    most = 1000 * jsonl.stat().st_size
    assert f"for {most:,} tokens" in error(capsys, *line, "--tokens=1e15")
    assert "for 50,000,000,000 tokens" in error(capsys, "fineweb-edu", "--tokenizer=bytes", f"--out={tmp_path}/hub")
    free(30_000)
    assert main(*line, "--tokens=15000") == 0


def test_a_full_disk(tmp_path, capsys):
    """One line; what is complete stays, and the next start completes it."""
    source = write_jsonl(tmp_path / "text.jsonl", ["x" * 300] * 1000)
    line = [source, "--tokenizer=bytes", "--val_tokens=20000", "--shard_tokens=100000"]
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    failed = run(*line, f"--out={out}", status=2, preexec_fn=limited(resource.RLIMIT_FSIZE, 150_000))
    assert failed.stderr.splitlines()[-1].startswith("error: ") and "File too large" in failed.stderr
    assert sorted(contents(out)) == ["lock", "meta.json.part", "out_val_000000.bin"]
    assert main(*line, f"--out={out}") == 0 and "has 1 shards" in capsys.readouterr().out
    assert main(*line, f"--out={whole}") == 0
    assert contents(out) == contents(whole) and len(contents(out, "*.bin")) == 4


def test_mistakes(jsonl, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "mixed.txt").write_text("x")
    for message, *line in [
        ("none' there is no text: give stdlib, fineweb-edu, or .txt, .jsonl, .parquet (.gz or .zst", tmp_path / "none"),
        ("at '' there is no text", ""),
        ("empty' there is no text", tmp_path / "empty"),
        ("a.md' there is no file that ends in .txt, .jsonl, .parquet", tmp_path / "a.md"),
        ("--documents: invalid choice: 'words'", tmp_path / "mixed.txt", "--documents=words"),
        (f"only .txt files, and {jsonl} has others", jsonl, "--documents=lines"),
        (f"and {tmp_path} has others: leave it out", tmp_path, "--documents=paragraphs"),
        ("and stdlib has others", "stdlib", "--documents=lines"),
        ("and fineweb-edu has others", "fineweb-edu", "--documents=lines"),
        ("unknown tokenizer 'gtp2'", jsonl, "--tokenizer=gtp2"),
        ("--tokens: must be a whole number of at least 1", jsonl, "--tokens=many"),
        ("--tokens: must be a whole number of at least 1", jsonl, "--tokens=-5"),
        ("at least 2 and below 2147483648", jsonl, "--shard_tokens=3e9"),
        ("at least 2 and below 2147483648", jsonl, "--val_tokens=1"),
        ("--tokkens", jsonl, "--tokkens=5"),
        ("SOURCE",),
        ("a.md/x cannot be a folder", jsonl, f"--out={tmp_path}/a.md/x", "--tokenizer=bytes"),
        ("a.md cannot be a folder", jsonl, f"--out={tmp_path}/a.md", "--tokenizer=bytes"),
    ]:
        assert message in error(capsys, *line)
    result = run(jsonl, "--tokens=many", status=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert main("--help") == 0 and "--val_tokens=N" in capsys.readouterr().out


@pytest.mark.parametrize("text, options", [("", []), ("abc", []), ("abcdefgh" * 10, ["--val_tokens=81"])])
def test_too_short_for_two_splits(tmp_path, capsys, text, options):
    (tmp_path / "a.txt").write_text(text)
    line = [tmp_path / "a.txt", f"--out={tmp_path}/out", "--tokenizer=bytes"]
    assert "is too short" in error(capsys, *line, *options)
    assert list(contents(tmp_path / "out")) == ["lock"]


def test_starts_without_torch():
    program = "import prepare_data, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
