"""prepare_data.py as a process: text in, shards out."""

import collections
import gzip
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from data import UserError, find_shards, get_tokenizer, read_meta
from runs import ODD_TEXTS

ROOT = Path(__file__).parent.parent


def run(*arguments, status=0, **environment):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result


def error(*arguments, **environment):
    """The one line that a mistake gets."""
    lines = [line for line in run(*arguments, status=2, **environment).stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def tokens(folder):
    """(validation tokens, training tokens) of a folder of shards."""
    return [
        np.concatenate([s.read(0, s.tokens) for s in find_shards(folder, split)]).tolist() for split in ("val", "train")
    ]


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


DOCUMENTS = [f"document {k}: " + "hello wörld 🙂\r\n" * (k % 7) for k in range(200)] + ["", "<|endoftext|> is text"]


def stream_of(documents):
    return [token for text in documents for token in (256, *text.encode())]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def test_split_counts_and_names(jsonl, tmp_path):
    out = tmp_path / "mine"
    run(jsonl, f"--out={out}", "--tokenizer=bytes", "--val_tokens=1e3", "--shard_tokens=5_000")
    val, train = tokens(out)
    stream = stream_of(DOCUMENTS)
    assert val == stream[:1000] and train == stream[1000:]
    count = -(-(len(stream) - 1000) // 5000)
    names = ["mine_val_000000.bin"] + [f"mine_train_{k:06d}.bin" for k in range(1, count + 1)]
    assert sorted(shards(out)) == sorted(names)
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "lock", "meta.json"])
    meta = read_meta(out)
    assert meta["vocab_size"] == 257 and meta["tokenizer"] == "bytes" and meta["source"] == str(jsonl)
    for split, part in (("val", val), ("train", train)):
        documents = part.count(256)
        assert meta["splits"][split] == {"tokens": len(part), "bytes": len(part) - documents, "documents": documents}


def test_every_kind_of_file(jsonl, tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes("first\r\ntext ü".encode())
    with gzip.open(folder / "deep" / "b.txt.gz", "wb") as file:
        file.write(b"second text" * 100)
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "third"}\n')
    (folder / "d.jsonl.zst").write_bytes(pa.compress(b'{"text": "fourth"}\n', "zstd", asbytes=True))
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["fifth", None, "sixth"]}), folder / "e.parquet")
    (folder / "notes.md").write_text("left out")
    expected = ["first\r\ntext ü", "third", "fourth", "second text" * 100, "fifth", "sixth"]
    out = tmp_path / "out"
    result = run(folder, f"--out={out}", "--tokenizer=bytes", "--val_tokens=20")
    assert sum(tokens(out), []) == stream_of(expected)
    assert "skipped 1 parquet rows without a text" in result.stderr
    run(f"{folder}/**/*.txt*", f"--out={out}2", "--tokenizer=bytes", "--val_tokens=20")
    assert sum(tokens(tmp_path / "out2"), []) == stream_of([expected[0], expected[3]])


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
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
    out = tmp_path / "out"
    stderr = run(folder, f"--out={out}", "--tokenizer=bytes", "--val_tokens=5").stderr
    assert sum(tokens(out), []) == stream_of(["good", "?!", "bad \ufffd utf-8 \0 and NUL", "the end"])
    lines = ", ".join(f"{folder}/a.jsonl:{number}" for number in (3, 4, 5, 7))
    assert f'skipped 4 lines that are no JSON object with a "text": {lines}\n' in stderr
    assert f'skipped 1 parquet files without a column "text": {folder}/e.parquet\n' in stderr
    assert f"skipped 2 parquet rows without a text: {folder}/g.parquet" in stderr
    assert f"skipped 1 unreadable files (ArrowInvalid): {folder}/c.parquet\n" in stderr
    assert f"skipped 2 unreadable files (OSError): {folder}/d.txt.gz, {folder}/h.txt\n" in stderr
    assert f"skipped 1 bytes that are no UTF-8, for which U+FFFD stands: {folder}/b.txt\n" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one document of 100 MB", "ten million documents of one byte", "empty documents"])
def test_extreme_documents(tmp_path, kind):
    """In bounded memory: the 100 MB are a single line without a space."""
    source = tmp_path / ("text.txt" if "100 MB" in kind else "text.jsonl")
    with open(source, "wb") as file:
        if "100 MB" in kind:
            file.writelines([b"0123456789" * 10**5] * 100)
        else:
            text, count = (b"x", 10) if "one byte" in kind else (b"", 1)
            for _ in range(count):
                file.write((b'{"text": "' + text + b'"}\n') * 10**6)
    command = [sys.executable, str(ROOT / "prepare_data.py"), str(source), "--tokenizer=bytes", f"--out={tmp_path}/out"]
    assert subprocess.run(command, stderr=subprocess.PIPE, text=True).returncode == 0
    meta = read_meta(tmp_path / "out")
    together = {name: sum(meta["splits"][split][name] for split in ("val", "train")) for name in ("bytes", "documents")}
    expected = {"100 MB": (10**8, 1), "one byte": (10**7, 10**7), "empty": (0, 10**6)}
    assert (together["bytes"], together["documents"]) == next(v for name, v in expected.items() if name in kind)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1.5 * 2**20  # KiB


def test_result_is_the_same_for_any_number_of_workers(tmp_path):
    random.seed(0)
    text = "".join(
        random.choice(["word ", "\n", "\n\n", "x1!\n/", "ünï🙂", "  ", "\t", "\r\n", "a"]) for _ in range(10**6)
    )
    (tmp_path / "long.txt").write_text(text, newline="")
    results = []
    for workers in (1, 3):
        out = tmp_path / str(workers) / "same"
        run(tmp_path / "long.txt", f"--out={out}", "--tokenizer=bytes", "--tokens=2e6", f"--workers={workers}")
        results.append(shards(out))
    assert results[0] == results[1]
    assert sum(tokens(out), []) == stream_of([text])[: 2 * 10**6]


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2", "cl100k_base"])
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tokenizer, monkeypatch):
    try:
        encoding = get_tokenizer(tokenizer)
    except UserError:
        pytest.skip(f"no {tokenizer} tokenizer here: set TIKTOKEN_CACHE_DIR")
    monkeypatch.setattr(prepare_data, "PIECE", 200)
    random.seed(1)
    text = "".join(random.choice(ODD_TEXTS) for _ in range(20_000)) + Path(__file__).read_text()
    pieces = list(prepare_data.document(text, 0))
    assert len(pieces) > 100 and "".join(piece.text for piece in pieces) == text
    assert [piece.starts_document for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    joined = [token for piece in pieces for token in encoding.encode(piece.text, disallowed_special=())]
    assert joined == encoding.encode(text, disallowed_special=())


def test_a_text_without_a_place_to_cut_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(prepare_data, "PIECE", 10)
    pieces = [piece.text for piece in prepare_data.document("x" * 1005, 0)]
    assert "".join(pieces) == "x" * 1005 and max(map(len, pieces)) == 80


def test_wide_tokens(tmp_path):
    try:
        encoding = get_tokenizer("cl100k_base")
    except UserError:
        pytest.skip("no cl100k_base tokenizer here: set TIKTOKEN_CACHE_DIR")
    (tmp_path / "a.txt").write_text("Übergrößenträger " * 200)
    run(tmp_path / "a.txt", f"--out={tmp_path}/out", "--tokenizer=cl100k_base")
    stream = [encoding.eot_token, *encoding.encode("Übergrößenträger " * 200)]
    assert sum(tokens(tmp_path / "out"), []) == stream
    meta = read_meta(tmp_path / "out")
    assert meta["vocab_size"] == 100277 and meta["splits"]["val"]["tokens"] == len(stream) // 10
    assert sum(meta["splits"][s]["bytes"] for s in ("val", "train")) == len(("Übergrößenträger " * 200).encode())


def test_tokens_stops_and_val_defaults_to_a_tenth(jsonl, tmp_path):
    run(jsonl, f"--out={tmp_path}/out", "--tokenizer=bytes", "--tokens=3000")
    val, train = tokens(tmp_path / "out")
    assert len(val) == 300 and val + train == stream_of(DOCUMENTS)[:3000]


def test_stdlib(tmp_path):
    run("stdlib", f"--out={tmp_path}/out", "--tokens=300000")
    val, train = tokens(tmp_path / "out")
    assert len(val) == 30_000 and len(train) == 270_000
    names = [path.as_posix() for path in prepare_data.stdlib_files()]
    assert names and not any("/test/" in name or "/site-packages/" in name for name in names)
    assert names != sorted(names) and names == [path.as_posix() for path in prepare_data.stdlib_files()]
    first = prepare_data.stdlib_files()[0].read_text("utf-8", "replace")
    assert (val + train)[: len(first.encode()) + 1] == stream_of([first])[:300_000]
    assert "stdlib of Python" in read_meta(tmp_path / "out")["source"]


def test_a_folder_that_holds_something_is_not_overwritten(jsonl, tmp_path):
    out = tmp_path / "out"
    line = [jsonl, f"--out={out}", "--tokenizer=bytes"]
    run(*line)
    before = shards(out)
    assert "complete already" in run(*line).stdout
    moved = next(out.glob("*_train_*")).rename(tmp_path / "moved")
    assert "no train shards" in error(*line)
    moved.rename(out / "out_train_000001.bin")
    assert "prepared otherwise" in error(*line, "--val_tokens=100")
    (out / "meta.json").unlink()
    assert "shards from elsewhere" in error(*line)
    assert shards(out) == before


@pytest.mark.parametrize("name", ["out", "o[1]", "*"])
def test_what_an_interrupted_run_left_is_replaced(jsonl, tmp_path, name):
    whole, out = tmp_path / "a" / name, tmp_path / "b" / name
    run(jsonl, f"--out={whole}", "--tokenizer=bytes", "--shard_tokens=1000")
    out.mkdir(parents=True)
    (out / "meta.json.tmp").write_text("{")
    (out / f"{name}_train_000099.bin").write_bytes(b"left over")
    (out / f"{name}_train_000100.tmp").write_bytes(b"left over")
    (out / "my_train_notes.tmp").write_bytes(b"not ours")
    run(jsonl, f"--out={out}", "--tokenizer=bytes", "--shard_tokens=1000")
    assert (out / "my_train_notes.tmp").exists()
    assert shards(out) == shards(whole) and len(list(out.iterdir())) == len(list(whole.iterdir())) + 1


def test_room_is_looked_at_first(jsonl, tmp_path, monkeypatch, capsys):
    free = collections.namedtuple("usage", "free")
    line = [str(jsonl), f"--out={tmp_path}/out", "--tokenizer=bytes", "--tokens=15000"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(29_999))
    assert prepare_data.main(line) == 2
    assert "needs 0.0 GB for 15,000 tokens" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.bin"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(30_000))
    assert prepare_data.main(line) == 0


def stop_after(shards, monkeypatch, *line):
    """Start prepare_data, and interrupt it after so many shards; its exit status."""
    write_shard, written = prepare_data.write_shard, []

    def write_or_stop(path, *arguments):
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(path)
        return write_shard(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "write_shard", write_or_stop)
        return prepare_data.main([str(argument) for argument in line])


def test_a_second_start_goes_on(jsonl, tmp_path, monkeypatch, capsys):
    """Stopped after any number of whole shards, also within a batch, it ends with the bytes of a run never stopped."""
    monkeypatch.setattr(prepare_data, "PIECE", 700)
    line = [jsonl, "--tokenizer=bytes", "--val_tokens=1000", "--shard_tokens=1500", "--workers=2"]
    assert stop_after(99, monkeypatch, *line, f"--out={tmp_path}/whole/out") == 0
    whole = shards(tmp_path / "whole" / "out")
    assert len(whole) > 8
    for number in range(len(whole)):
        out = tmp_path / str(number) / "out"
        assert stop_after(number, monkeypatch, *line, f"--out={out}") == 130
        assert len(shards(out)) == number
        capsys.readouterr()
        assert stop_after(99, monkeypatch, *line, f"--out={out}") == 0
        assert ("going on from there" in capsys.readouterr().out) == (number > 0)
        assert shards(out) == whole and read_meta(out) == read_meta(tmp_path / "whole" / "out")


@pytest.mark.parametrize("change", ["longer", "as long"])
def test_an_input_that_has_changed_is_read_from_its_beginning(jsonl, tmp_path, monkeypatch, capsys, change):
    line = [jsonl, "--tokenizer=bytes", "--val_tokens=1000", "--shard_tokens=1500", f"--out={tmp_path}/out"]
    assert stop_after(4, monkeypatch, *line) == 130
    documents = ["before all others", *DOCUMENTS] if change == "longer" else [t.replace("o", "0") for t in DOCUMENTS]
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert stop_after(99, monkeypatch, *line) == 0
    assert "has changed: starting over" in capsys.readouterr().out
    assert sum(tokens(tmp_path / "out"), []) == stream_of(documents)


def test_stopped_at_any_call_to_the_disk(jsonl, tmp_path, monkeypatch):
    """Whatever the last call was before a kill, the next start makes the bytes of a run that was never stopped."""
    line = [jsonl, "--tokenizer=bytes", "--val_tokens=1000", "--shard_tokens=2500"]
    assert prepare_data.main([*map(str, line), f"--out={tmp_path}/whole/out"]) == 0
    whole = shards(tmp_path / "whole" / "out")

    class Killed(BaseException):
        pass

    def until_killed(function, calls):
        def call(*arguments, **options):
            if next(calls, None) is None:
                raise Killed
            return function(*arguments, **options)

        return call

    def killed_at(number):
        """Start, and stop at call `number` to the disk, before it is done; whether there were so many."""
        calls = iter(range(number))
        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (prepare_data, "open_shard")):
                patch.setattr(owner, name, until_killed(getattr(owner, name), calls))
            try:
                prepare_data.main([*map(str, line), f"--out={tmp_path}/out"])
            except Killed:
                return True
        return False

    number = 0
    while killed_at(number):
        number += 1
        killed_at(number // 2)  # and the start after it as well
        assert prepare_data.main([*map(str, line), f"--out={tmp_path}/out"]) == 0
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert shards(tmp_path / "out") == whole and names == ["lock", "meta.json", *whole]
        shutil.rmtree(tmp_path / "out")
    assert number > 20


def test_a_part_that_is_not_ours_to_replace(jsonl, tmp_path, monkeypatch, capsys):
    line = [jsonl, "--tokenizer=bytes", "--val_tokens=1000", "--shard_tokens=1500"]
    out, renamed = tmp_path / "out", tmp_path / "renamed"
    assert stop_after(4, monkeypatch, *line, f"--out={out}") == 130
    out.rename(renamed)
    assert stop_after(99, monkeypatch, *line, f"--out={renamed}") == 2
    assert "already holds shards from elsewhere" in capsys.readouterr().err
    renamed.rename(out)
    damaged = out / "out_train_000002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    before = shards(out)
    assert stop_after(99, monkeypatch, *line, f"--out={out}", "--val_tokens=900") == 2
    assert "a part of data prepared otherwise" in capsys.readouterr().err and shards(out) == before
    assert stop_after(99, monkeypatch, *line, f"--out={out}") == 0
    assert "does not hold the shards that it had: starting over" in capsys.readouterr().out
    assert sum(tokens(out), []) == stream_of(DOCUMENTS)


def test_mistakes(jsonl, tmp_path):
    assert "no source" in error(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no source" in error(tmp_path / "empty")
    (tmp_path / "a.md").write_text("x")
    assert "holds no .txt, .jsonl, .parquet file" in error(tmp_path / "a.md")
    assert "unknown tokenizer 'gtp2'" in error(jsonl, "--tokenizer=gtp2")
    assert "--tokens" in error(jsonl, "--tokens=many") and "--tokens" in error(jsonl, "--tokens=-5")
    assert "at least 2 and below 2147483648" in error(jsonl, "--shard_tokens=3e9")
    assert "--tokkens" in error(jsonl, "--tokkens=5")
    assert "SOURCE" in error()
    (tmp_path / "file").write_text("x")
    assert "file" in error(jsonl, f"--out={tmp_path}/file/x", "--tokenizer=bytes")


@pytest.mark.parametrize("text, options", [("", []), ("abc", []), ("abcdefgh" * 10, ["--val_tokens=81"])])
def test_too_short_for_two_splits(tmp_path, text, options):
    (tmp_path / "a.txt").write_text(text)
    assert "too short" in error(tmp_path / "a.txt", f"--out={tmp_path}/out", "--tokenizer=bytes", *options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]


def test_fineweb_edu_without_a_network(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    message = error("fineweb-edu", f"--out={tmp_path}/out", "--tokenizer=bytes", "--tokens=1e6", **offline)
    assert "FineWeb-Edu (sample-10BT) could not be read from Hugging Face" in message
