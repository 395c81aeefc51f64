"""Where documents come from. A source yields (position, documents) in a fixed order: a batch of whole documents, about
PIECE characters together, and where it begins. The position is a value that JSON can hold; given back to the source,
it yields the same batches from there."""

import codecs
import glob
import hashlib
import io
import json
import os
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from plumbing.command import UserError

PIECE = 2**20  # characters that are tokenized at once
MOST_DOCUMENTS = 2**14  # in a batch, however short they are


def batches(documents):
    """Yield lists of consecutive documents that have at least PIECE characters together, or MOST_DOCUMENTS."""
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= PIECE or len(batch) >= MOST_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------
# Files on this machine


class Skipped(dict):
    """What could not be used: {reason: (how often, where the first ten times)}."""

    def note(self, reason, where):
        count, places = self.get(reason, (0, []))
        new = str(where) not in places and len(places) < 10
        self[reason] = count + 1, places + [str(where)] * new

    def report(self):
        for reason, (count, places) in self.items():
            more = ", …" if count > len(places) else ""
            print(f"{reason}: {count} ({', '.join(places)}{more})", file=sys.stderr)


def read_txt(file, path, skipped, key):
    """The file as one document. It is UTF-8, or UTF-16 if it begins with the mark of that."""
    content = file.read()
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        yield content.decode(encoding)
    except UnicodeDecodeError:
        skipped.note("U+FFFD replaces bytes that are not UTF-8 in texts", path)
        yield content.decode(encoding, "replace")


def read_jsonl(file, path, skipped, key):
    """One document per line: {key: text, …}."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if isinstance(text, str):
            yield text
        else:
            skipped.note(f'skipped lines that are not a JSON object with a "{key}"', f"{path}:{number}")


def read_parquet(file, path, skipped, key):
    """One document per row of the column `key`."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16)  # otherwise all is read before the first text
    if key not in table.schema_arrow.names:
        skipped.note(f'skipped parquet files without a column "{key}"', path)
        return
    for batch in table.iter_batches(batch_size=1024, columns=[key]):
        for text in batch.column(0).to_pylist():
            if isinstance(text, str):
                yield text
            else:
                skipped.note("skipped parquet rows without a text", path)


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of .txt and .jsonl; .parquet has its own, and is not read in order
DELIMITER = "<|endoftext|>"
# What separates the documents in a text, by the value of --documents. A paragraph ends at blank lines, unless an
# indented line follows: otherwise an entry of a dictionary would be cut into its parts. A match can begin only where
# white space begins: otherwise the time would grow with the square of the number of blank lines in a row.
SEPARATORS = {"lines": r"\n", "paragraphs": r"(?<!\s)(?:[^\S\n]*\n){2,}(?=\S)", "endoftext": re.escape(DELIMITER)}


def parts(text, separator):
    """The documents in a text, without blank ones. Their order is that of a hash of their numbers and texts, so that
    the first million tokens are a fair validation split."""
    found = enumerate(part.strip("\r\n") for part in re.split(separator, text) if part.strip())
    return [part for _, part in sorted(found, key=lambda pair: hashlib.sha256("{} {}".format(*pair).encode()).digest())]


def kind(path):
    """The suffix that READERS knows, in small letters, whatever compression follows; None for any other file."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-1 - compressed] if len(suffixes) > compressed else None
    return suffix if suffix in READERS and not (compressed and suffix == ".parquet") else None


def read_files(files, separator, skipped, key):
    """Yield (document, bytes of the files that were read for it) of files, given as (path, size in bytes); with a
    separator, the parts of each text. If a file cannot be read to its end, the rest of it is skipped."""
    import pyarrow

    before, start = 0, 0  # in bytes of all files: what the documents so far account for, and where a file begins
    for path, size in files:
        try:
            with open(path, "rb") as stored:
                file = stored
                if compression := COMPRESSIONS.get(Path(path).suffix.lower()):
                    file = io.BufferedReader(pyarrow.CompressedInputStream(stored, compression))
                for text in READERS[kind(path)](file, path, skipped, key):
                    if DELIMITER in text and separator != SEPARATORS["endoftext"]:
                        skipped.note(
                            f"texts with {DELIMITER} as ordinary text (--documents=endoftext cuts there)", path
                        )
                    documents = parts(text, separator) if separator else [text]
                    here = start + stored.tell()
                    for document in documents:
                        yield document, (here - before) / len(documents)
                    before = here
        except (OSError, EOFError, ValueError) as error:
            skipped.note(f"files read only up to an error ({type(error).__name__})", path)
        start += size


def find_files(source, skipped):
    """The text files that a file, a folder or a glob names. Their order is that of a hash of their names, so that the
    first million tokens are a fair validation split. UserError if there are none."""
    if source and Path(source).is_dir():
        found, folder = list(walk(source, skipped)), source
    else:
        found, folder = [source] if Path(source).is_file() else glob.glob(source, recursive=True), None
    found = [path for path in found if os.path.isfile(path)]
    for path in found:
        if not kind(path):
            skipped.note(f"files not read, which do not end in {', '.join(READERS)}", path)
    files = [path for path in found if kind(path)]
    if not files:
        there = "no file that ends in" if found else "no text: give stdlib, fineweb-edu, or"
        raise UserError(
            f"at {source!r} there is {there} {', '.join(READERS)} "
            f"({' or '.join(COMPRESSIONS)} may follow the first two)"
        )

    def order(path):
        name = os.path.relpath(path, folder) if folder else os.path.basename(path)
        return hashlib.sha256(os.fsencode(name)).digest(), path

    return sorted(files, key=order)


def walk(folder, skipped):
    """Yield the files below a folder, also behind links, but for hidden ones; each folder once, so that links in a
    circle end."""
    seen = set()
    for parent, folders, names in os.walk(
        folder, followlinks=True, onerror=lambda error: skipped.note("skipped unreadable folders", error.filename)
    ):
        real = os.path.realpath(parent)
        folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen)
        if real not in seen:
            yield from (os.path.join(parent, name) for name in sorted(names) if name[0] != ".")
        seen.add(real)


def read_stdlib(files):
    """Yield (document, its bytes) of files, given as (path, size in bytes), each a document as a whole."""
    for path, size in files:
        yield path.read_text("utf-8", "replace"), size


def stdlib_files():
    """The .py files of this Python's standard library, without its tests. Their order is that of a hash of their names,
    so that the first million bytes are a fair validation split."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if not left_out & set(name.split("/"))]
    return [root / name for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())]


# ---------------------------------------------------------------------------------------------------------------
# FineWeb-Edu

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# Seconds to wait after each failure in a row: about six minutes, then give up
PATIENCE = [1, 2, 5, 15, 30, 60, 60, 60, 60, 60]


def read_fineweb_edu(subset, position):
    """Yield (position, documents) of FineWeb-Edu from a position (None: the beginning), streamed from Hugging Face in
    the order of its files. After a failure the current batch is read again."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    load = partial(load_dataset, FINEWEB_EDU, subset, split="train", streaming=True, columns=["text"])
    failures = 0
    while True:
        try:
            if position is None:  # keep to today's revision, since the data set may change while it is read
                position = {"revision": HfApi().dataset_info(FINEWEB_EDU).sha, "state": None}
            dataset = load(revision=position["revision"])
            if position["state"]:
                dataset.load_state_dict(position["state"])
            for batch in batches(row["text"] for row in dataset):
                start, position = position, position | {"state": dataset.state_dict()}
                failures = 0
                yield start, batch
            return
        except Exception as error:
            if is_final(error) or failures == len(PATIENCE):
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                alternative = "start again to continue, or give your own texts or stdlib instead"
                raise UserError(
                    f"FineWeb-Edu ({subset}) could not be read from Hugging Face ({reason}): {alternative}"
                ) from None
            print(f"{type(error).__name__}: trying again in {PATIENCE[failures]} s", file=sys.stderr)
            time.sleep(PATIENCE[failures])
            failures += 1


def is_final(error):
    """Whether another try is of no use: the data set or the subset does not exist, or the client is set to offline."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return status < 500 and status not in (408, 429)
    return type(error) is ValueError or isinstance(error, DatasetNotFoundError | OfflineModeIsEnabled)


# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """read(position, or None for the beginning) yields (position, documents). `name` is for meta.json. `fingerprint`
    changes when files on this machine do. `size` is their bytes, and share(position) says which share of them has been
    read at the end of a batch; both are None for a source that is elsewhere."""

    name: str
    read: Callable
    fingerprint: str = ""
    size: int | None = None
    share: Callable | None = None


def open_source(name, subset, documents, skipped, key="text"):
    """The Source that a command line names. Its texts are cut into `documents`, a key of SEPARATORS, or left whole for
    None; in .jsonl and .parquet they are the values of `key`. What cannot be used is noted in `skipped`. UserError if
    there is no such source, or nothing in it to cut."""
    refusal = UserError(f"--documents cuts only .txt files, and {name} has others: leave it out")
    if name == "fineweb-edu":
        if documents:
            raise refusal
        return Source(f"{FINEWEB_EDU} {subset}", partial(read_fineweb_edu, subset))
    if name == "stdlib":
        files, read_texts = stdlib_files(), read_stdlib
        name = f"stdlib of Python {platform.python_version()}"
    else:
        files = find_files(name, skipped)
        read_texts = partial(read_files, separator=SEPARATORS.get(documents), skipped=skipped, key=key)
        name += (f" cut into {documents}" if documents else "") + (f" of {key}" if key != "text" else "")
    if documents and any(READERS.get(kind(path)) is not read_txt for path in files):
        raise refusal

    facts = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
    sizes = [size for _, size, _ in facts]
    texts, ends = read_texts(zip(files, sizes)), [0]  # the bytes that are read at the end of each batch

    def counted_texts():
        for text, its_bytes in texts:
            ends[-1] += its_bytes
            yield text

    def read(position):  # which is the number of batches before it
        for number, batch in enumerate(batches(counted_texts())):
            ends.append(ends[-1])
            if number >= (position or 0):
                yield number, batch

    return Source(name, read, fingerprint, sum(sizes), lambda position: ends[position] / max(1, sum(sizes)))
