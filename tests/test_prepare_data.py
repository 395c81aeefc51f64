"""prepare_data.py: text in, shards out, whatever interrupts it."""

import contextlib
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from plumbing import sources, unfinished
from plumbing.data import find_shards, read_meta
from plumbing.tokenizer import get_tokenizer
from runs import ODD_TEXTS, ROOT, tokenizer_or_skip


def command(*arguments):
    return [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]


def run(*arguments, status=0, **options):
    result = subprocess.run(command(*arguments, "--tokenizer=bytes"), capture_output=True, text=True, **options)
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr
    return result


def main(*arguments):
    return prepare_data.main([str(argument) for argument in arguments])


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
    assert "tok/s" in capsys.readouterr().err


def test_every_kind_of_file(tmp_path, capsys):
    """Each once, whatever links lead to it, and in the same order wherever the folder is."""
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (folder / "deep", folder / ".ipynb_checkpoints", elsewhere):
        path.mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufefffirst\r\ntext ü".encode())
    (folder / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"second text" * 100))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "third"}\n'))
    (folder / "d.jsonl.zst").write_bytes(pa.compress(b'{"text": "fourth"}\n', "zstd", asbytes=True))
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["fifth", None, "sixth"]}), folder / "e.parquet")
    (folder / "f.TXT.GZ").write_bytes(gzip.compress(b"seventh"))
    (folder / "g.txt").write_text("eighth ü", "utf-16")
    (elsewhere / "h.txt").write_text("ninth")
    (folder / "link").symlink_to(elsewhere)
    for link, target in (("circle", "."), ("0.txt", "a.txt"), ("y.txt", "gone"), ("z.txt", elsewhere / "h.txt")):
        (folder / link).symlink_to(target)
    for left_out in ("notes.md", ".hidden.txt", ".ipynb_checkpoints/a.txt", "e.parquet.gz"):
        (folder / left_out).write_text("left out")
    expected = "first\r\ntext ü,third,fourth,fifth,sixth,seventh,eighth ü,ninth".split(",") + ["second text" * 100]
    assert sorted(documents_of(prepared(folder, tmp_path / "out", "--val_tokens=20"))) == sorted(expected)
    stderr = capsys.readouterr().err
    assert f'skipped lines or rows without a text in "text": 1 ({folder}/e.parquet)\n' in stderr
    where = ", ".join(f"{folder}/{name}" for name in ("e.parquet.gz", "notes.md", "y.txt"))
    suffixes = ".txt, .jsonl (.gz or .zst may follow) or .parquet"
    assert f"files not read, which are gone or do not end in {suffixes}: 3 ({where})\n" in stderr
    only_txt = prepared(f"{folder}/[ad]*/**/*.txt*", tmp_path / "out2", "--val_tokens=20")
    assert documents_of(only_txt) == ["second text" * 100]
    moved = shutil.copytree(folder, tmp_path / "moved", symlinks=True)
    assert prepared(moved, tmp_path / "out3", "--val_tokens=20") == tokens(tmp_path / "out")


def test_the_key_of_the_text_and_the_delimiter_in_a_text(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [json.dumps({"content": f"document {k}"}) for k in range(3)])
    prepared(tmp_path / "a.jsonl", tmp_path / "out", "--text_key=content", "--val_tokens=5")
    assert sorted(documents_of(tokens(tmp_path / "out"))) == [f"document {k}" for k in range(3)]
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo<|endoftext|>three")
    prepared(tmp_path / "a.txt", tmp_path / "cut", "--documents=endoftext", "--val_tokens=5")
    assert sorted(documents_of(tokens(tmp_path / "cut"))) == ["one", "three", "two"]
    assert "plain text" not in capsys.readouterr().err
    prepared(tmp_path / "a.txt", tmp_path / "whole", "--val_tokens=5")
    printed = capsys.readouterr()
    assert "texts with <|endoftext|> as plain text (--documents=endoftext cuts there): 1" in printed.err
    assert "note: one document fills both splits; --documents=paragraphs" in printed.out
    assert "train: 35 tokens, 35 bytes\n" in printed.out


@pytest.mark.parametrize(
    "name, repeated",
    [
        ("gpt2", [" ", "\u00a0", "a"]),
        pytest.param("gpt2", ["\n", "\t", "é", "1", "!", "'s", "漢", "🙂", "\r\n "], marks=pytest.mark.slow),
        pytest.param("cl100k_base", [" ", "\n", "\t", "\u00a0", "a", "é", "🙂"], marks=pytest.mark.slow),
    ],
)
def test_a_million_characters_of_a_kind(name, repeated):
    """They come back, whatever the tokenizer can read in one piece; what is cut is counted."""
    encoding, skipped = tokenizer_or_skip(name), sources.Skipped()
    for characters in repeated:
        text = characters * (10**6 // len(characters)) + "end"
        _, joined = prepare_data.encode(encoding, skipped, (0, [text]))
        assert encoding.decode(joined[1:].tolist()) == text, repr(characters)
    assert sum(count for count, _ in skipped.values()) > 0


def test_what_cannot_be_used_is_counted_and_named(tmp_path, capsys):
    numbers = [random.Random(seed).randbytes(16).hex() for seed in range(20_000)]
    half = gzip.compress(write_jsonl(tmp_path / "whole.jsonl", numbers).read_bytes())[:100_000]
    files = {
        "a.jsonl": b'{"text": "good"}\n\nnot json\n{"text": 3}\n[]\n{"text": "\\ud800!"}\r\n{"tex',
        "b.txt": b"bad \xff utf-8 \0 and NUL" + b"." * 100,
        "c.parquet": b"no parquet",
        "d.txt.gz": b"no gzip",
        "f.txt": b"the end",
        "j.txt": "no mark\n".encode("utf-16-le"),
        "k.txt": "о чём это\n".encode("utf-16-be"),
        "l.txt": "four bytes\n".encode("utf-32"),
        "m.jsonl.gz": half,
        "n.txt.gz": half,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"body": ["no text"]}), tmp_path / "e.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "g.parquet")
    (tmp_path / "h.txt").symlink_to("/proc/self/mem")  # opens, and cannot be read
    write_jsonl(tmp_path / "i.jsonl", [0, 0])

    utf_16 = "(UTF-16 without its mark? save them as UTF-8)"
    skipped = sources.Skipped()
    _, _, read = sources.open_source(f"{tmp_path}/[a-n].*", None, None, None, skipped)
    texts = [prepare_data.encode(get_tokenizer("bytes"), skipped, batch)[1] for batch in read(None)]
    texts = documents_of([token.tolist() for token in texts])
    others = {"good", "?!", "bad \ufffd utf-8 \0 and NUL" + "." * 100, "the end"}
    assert set(texts) - set(numbers) == others and 1000 < len(set(texts) & set(numbers)) < 19_000
    lines = [f"a.jsonl:{number}" for number in (3, 4, 5, 7)] + ["e.parquet", "g.parquet", "i.jsonl:1", "i.jsonl:2"]
    found = {reason: (count, sorted(map(os.path.basename, places))) for reason, (count, places) in skipped.items()}
    assert found == {
        'skipped lines or rows without a text in "text"': (9, lines),
        f"skipped texts with many NULs {utf_16}": (3, ["j.txt", "k.txt", "l.txt"]),
        "files not read beyond an error (ArrowInvalid)": (1, ["c.parquet"]),
        "files not read beyond an error (OSError)": (4, ["d.txt.gz", "h.txt", "m.jsonl.gz", "n.txt.gz"]),
        "U+FFFD replaces bytes that are not UTF-8 in texts": (1, ["b.txt"]),
    }
    skipped = sources.Skipped()
    for number in range(12):
        skipped.note("too many", number)
    skipped.report()
    assert capsys.readouterr().err == "too many: 12 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …)\n"


TEXT = "\ufeff\n\none \r\n two\u2028\n \n\t\r\n three\r\n  \r\n\n\nfour\n\n\n\nfour\nfive\n\nsix ü\n\n"


@pytest.mark.parametrize(
    "documents, expected",
    [
        ("lines", ["one ", "six ü", "five", " three", "four", " two\u2028", "four"]),
        ("paragraphs", ["six ü", "one \r\n two\u2028\n \n\t\r\n three", "four\nfive", "four"]),
    ],
)
def test_a_text_is_cut_into_documents(tmp_path, monkeypatch, documents, expected):
    """In this order on every machine. An indented paragraph belongs to the one before it."""
    monkeypatch.setattr(sources, "PIECE", 5)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    splits = prepared(tmp_path / "a.txt.gz", tmp_path / "out", f"--documents={documents}", "--val_tokens=10")
    assert sum(splits, []) == stream_of(expected)
    assert read_meta(tmp_path / "out")["source"] == f"{tmp_path}/a.txt.gz cut into {documents}"


def test_blank_lines_take_little_time():
    """A hundred thousand of them, where a time that grows with their square would be an hour."""
    for text in ("\n" * 10**5, " \n" * 10**5, "\r\n" * 10**5):
        assert sources.parts(f"a{text} b", sources.SEPARATORS["paragraphs"]) == [f"a{text} b"]
        assert sorted(sources.parts(f"a{text}b", sources.SEPARATORS["paragraphs"])) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, line, times, size, documents",
    [
        ("one.txt", b"0123456789" * 10**5, 100, 10**8, 1),  # 100 MB without a space
        ("short.jsonl", b'{"text": "x"}\n' * 10**6, 2, 2 * 10**6, 2 * 10**6),
        ("empty.jsonl", b'{"text": ""}\n' * 10**6, 1, 0, 10**6),
    ],
)
def test_extreme_documents(tmp_path, name, line, times, size, documents):
    """In bounded memory."""
    with open(tmp_path / name, "wb") as file:
        file.writelines([line] * times)
    run(tmp_path / name, f"--out={tmp_path}/out")
    splits = read_meta(tmp_path / "out")["splits"].values()
    assert [sum(split[key] for split in splits) for key in ("bytes", "documents")] == [size, documents]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1.5 * 2**20  # KiB


def test_a_text_larger_than_memory(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(2**35)

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))

    stderr = run(tmp_path / "large.txt", f"--out={tmp_path}/out", status=2, preexec_fn=limited).stderr
    assert stderr.splitlines()[-1].startswith(f"error: a text in {tmp_path}/large.txt does not fit in memory")


@pytest.mark.parametrize("tokenizer", ["gpt2", "cl100k_base"])
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tokenizer, monkeypatch):
    encoding = tokenizer_or_skip(tokenizer)
    monkeypatch.setattr(prepare_data, "PIECE", 200)
    random.seed(1)
    text = "".join(random.choice(ODD_TEXTS) for _ in range(20_000)) + Path(__file__).read_text()
    pieces = list(prepare_data.cut(text))
    assert len(pieces) > 100 and "".join(pieces) == text
    position, joined = prepare_data.encode(encoding, sources.Skipped(), (7, [text, "next"]))
    whole = [[encoding.eot_token, *encoding.encode_ordinary(part)] for part in (text, "next")]
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


def test_stdlib(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 10_000)
    assert main("stdlib", f"--out={tmp_path}/out", "--tokens=30000") == 0
    val, train = tokens(tmp_path / "out")
    files = sources.stdlib_files()
    assert not any("/test/" in str(path) or "/site-packages/" in str(path) for path in files)
    assert files != sorted(files)
    first = stream_of([files[0].read_text("utf-8", "replace")])[:30_000]
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
        patch.setattr(os, "fsync", lambda file: None)
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (unfinished, "open_shard")):
            patch.setattr(owner, name, until_killed(getattr(owner, name)))
        main(*line)
        return False
    return True


def test_a_refused_folder_stays_as_it_was(tmp_path, monkeypatch, capsys):
    """Name for name and byte for byte: not even a lock is added."""
    out, source = tmp_path / "out", write_lines(tmp_path / "a.txt")
    line, unfit = [source, *SMALL, "--documents=lines"], "unfinished data whose settings, source or shards have changed"

    def refused(folder, message, *options):
        (folder / "lock").unlink(missing_ok=True)
        before = contents(folder)
        assert message in error(capsys, *line, f"--out={folder}", *options) and contents(folder) == before

    assert killed_at(20, monkeypatch, *line, f"--out={out}")
    state, first = out / "meta.json.part", out / "out_train_000001.bin"
    refused(out, unfit, "--val_tokens=900")
    refused(out, unfit, "--documents=paragraphs")
    refused(out.rename(tmp_path / "renamed"), unfit)
    (tmp_path / "renamed").rename(out)
    facts, shard = json.loads(state.read_text()), first.read_bytes()
    changes = [json.dumps(facts | {key: 1.5}) for key in ("settings", "fingerprint", "shards", "splits")]
    for changed in ("{", "[1]", "3", "null", "{}", "\xff", *changes):
        state.write_text(changed, "latin-1")
        refused(out, unfit)
    state.write_text(json.dumps(facts))
    first.write_bytes(shard[:-10])
    refused(out, unfit)
    first.write_bytes(shard)
    write_lines(source, [text.replace("o", "0") for text in DOCUMENTS])  # as long as before
    refused(out, unfit)
    state.unlink()
    refused(out, "shards from elsewhere")

    shutil.rmtree(out)
    assert main(*line, f"--out={out}") == 0
    before = contents(out)
    assert main(*line, f"--out={out}") == 0 and "already complete" in capsys.readouterr().out
    assert contents(out) == before
    refused(out, "data of other settings", "--val_tokens=100")
    refused(out, "data of other settings", "--documents=paragraphs")
    first.unlink()
    refused(out, "train tokens, but the shards hold")
    (out / "meta.json").write_text("{")
    refused(out, "meta.json is malformed")


def test_a_folder_that_fills_before_it_is_locked(jsonl, tmp_path, monkeypatch, capsys):
    lock_folder = prepare_data.lock_folder

    def late(out):
        lock = lock_folder(out)
        (out / "out_train_000001.bin").write_bytes(b"of another process")
        return lock

    monkeypatch.setattr(prepare_data, "lock_folder", late)
    assert "shards from elsewhere" in error(capsys, jsonl, "--tokenizer=bytes", f"--out={tmp_path}/out")
    assert contents(tmp_path / "out", "*.bin") == {"out_train_000001.bin": b"of another process"}


def test_stopped_at_any_call_to_the_disk(tmp_path, monkeypatch, capsys):
    """Whatever the last call was before a kill, also within a batch, the next start makes the bytes of a run that was
    never stopped, and keeps the shards that are complete."""
    monkeypatch.setattr(sources, "PIECE", 700)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    out, source = tmp_path / "out", write_lines(tmp_path / "a.txt", DOCUMENTS[:80])
    line = [source, "--tokenizer=bytes", "--val_tokens=1000", "--shard_tokens=900", "--documents=lines", "--workers=2"]
    assert main(*line, f"--out={tmp_path}/whole/out") == 0
    whole = contents(tmp_path / "whole" / "out")
    continued, number, line = set(), 0, [*line, f"--out={out}"]
    while killed_at(number, monkeypatch, *line):
        killed_at(number // 2, monkeypatch, *line)  # and the start after it as well
        capsys.readouterr()
        assert main(*line) == 0 and contents(out) == whole
        continued.update(re.findall(r"has \d+ shards with .*: continuing from there", capsys.readouterr().out))
        shutil.rmtree(out)
        number += 1
    assert number > 20 and len(continued) > 4


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """kill -9 of the real process."""
    rng = random.Random(kills)
    source = write_lines(tmp_path / "a.txt", ["x" * rng.randint(0, 300) for _ in range(40_000)])
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    line = [source, "--tokenizer=bytes", "--shard_tokens=200000", "--documents=lines"]
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


def test_two_preparations_in_one_folder_and_ctrl_c(jsonl, tmp_path, capsys):
    line = [jsonl, "--tokenizer=bytes", f"--out={tmp_path}/out", "--shard_tokens=2"]  # which takes a minute
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
    line = [jsonl, f"--out={tmp_path}/out", "--tokenizer=bytes", "--tokens=15000"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=29_999))
    assert "needs 0.0 GB, and its disk has 0.0 GB free" in error(capsys, *line)
    assert list(contents(tmp_path / "out")) == ["lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    assert main(*line) == 0


def test_a_full_disk(tmp_path, capsys):
    """One line; what is complete stays, and the next start completes it."""
    source = write_jsonl(tmp_path / "text.jsonl", ["x" * 300] * 1000)
    line = [source, "--tokenizer=bytes", "--val_tokens=20000", "--shard_tokens=100000"]
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, most))
    try:
        assert "File too large" in error(capsys, *line, f"--out={out}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert sorted(contents(out)) == ["lock", "meta.json.part", "out_val_000000.bin"]
    assert main(*line, f"--out={out}") == 0 and "has 1 shards" in capsys.readouterr().out
    assert main(*line, f"--out={whole}") == 0
    assert contents(out) == contents(whole) and len(contents(out, "*.bin")) == 4


def test_mistakes(jsonl, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    ends = "ends in .txt, .jsonl (.gz or .zst may follow) or .parquet"
    for message, *line in [
        (f"none' {ends}; other sources are stdlib and fineweb-edu", tmp_path / "none"),
        (f"no file at '' {ends}", ""),
        (f"empty' {ends}", tmp_path / "empty"),
        (f"a.md' {ends}", tmp_path / "a.md"),
        ("--documents: invalid choice: 'words'", tmp_path / "b.txt", "--documents=words"),
        (f"only .txt files, and {jsonl} has others", jsonl, "--documents=lines"),
        (f"and {tmp_path} has others: leave it out", tmp_path, "--documents=paragraphs"),
        ("and fineweb-edu has others", "fineweb-edu", "--documents=lines"),
        ("--text_key is for .jsonl and .parquet, and stdlib has none: leave it out", "stdlib", "--text_key=text"),
        ("b.txt has none", tmp_path / "b.txt", "--text_key=content"),
        ("--subset is for fineweb-edu", jsonl, "--subset=sample-10BT"),
        ("unknown tokenizer 'gtp2'", jsonl, "--tokenizer=gtp2"),
        ("--tokens: must be a whole number of at least 1", jsonl, "--tokens=many"),
        ("at least 2 and below 2147483648", jsonl, "--shard_tokens=3e9"),
        ("at least 2 and below 2147483648", jsonl, "--val_tokens=1"),
        ("make it at least 2 more than --val_tokens", jsonl, "--val_tokens=10", "--tokens=11"),
        ("--tokkens", jsonl, "--tokkens=5"),
        ("a.md/x cannot be a folder", jsonl, f"--out={tmp_path}/a.md/x", "--tokenizer=bytes"),
    ]:
        assert message in error(capsys, *line)
    assert main("--help") == 0 and "--val_tokens=N" in capsys.readouterr().out


@pytest.mark.parametrize("text, options", [("", []), ("abc", []), ("abcdefgh" * 10, ["--val_tokens=81"])])
def test_too_short_for_two_splits(tmp_path, capsys, text, options):
    (tmp_path / "a.txt").write_text(text)
    line = [tmp_path / "a.txt", f"--out={tmp_path}/out", "--tokenizer=bytes"]
    assert "is too short" in error(capsys, *line, *options)
    assert list(contents(tmp_path / "out")) == ["lock"]


def test_bytes_need_no_other_package(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("some words of text")
    program = "import sys\nfor name in ('torch', 'tiktoken', 'pyarrow', 'datasets'):\n    sys.modules[name] = None\n"
    program += "import prepare_data\nsys.exit(prepare_data.main(sys.argv[1:]))"
    options = [tmp_path / "a.txt", "--tokenizer=bytes", "--val_tokens=5", f"--out={out}"]
    subprocess.run([sys.executable, "-c", program, *options], check=True, cwd=ROOT, capture_output=True)
    assert sum(tokens(out), [])[1:] == list(b"some words of text")
