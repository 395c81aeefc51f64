"""Where documents come from. A source yields (position, documents) in a fixed order: a batch of whole documents, about
PIECE characters together, and where it begins. The position is a value that JSON can hold; given back to the source,
it yields the same batches from there."""

import glob
import hashlib
import io
import json
import os
import platform
import re
import sys
import sysconfig
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

from plumbing.command import UserError, first_line

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

    lock = threading.Lock()  # several threads tokenize

    def note(self, reason, where):
        with self.lock:
            count, places = self.get(reason, (0, []))
            new = str(where) not in places and len(places) < 10
            self[reason] = count + 1, places + [str(where)] * new

    def report(self):
        for reason, (count, places) in self.items():
            more = ", …" if count > len(places) else ""
            print(f"{reason}: {count} ({', '.join(places)}{more})", file=sys.stderr)


def read_txt(file, path, skipped, key):
    """Yield (text of the file, path). It is UTF-8, or UTF-16 if it begins with the mark of that."""
    content = file.read()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        skipped.note("U+FFFD replaces bytes that are not UTF-8 in texts", path)
        text = content.decode(encoding, "replace")
    if text.count("\0") > len(text) / 100:  # as in UTF-16, whose spaces and line ends have one each in any language
        skipped.note("skipped texts with many NULs (UTF-16 without its mark? save them as UTF-8)", path)
    else:
        yield text, path


def read_jsonl(file, path, skipped, key):
    """Yield (the `key` of an object, or None; where) for each line."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                text = json.loads(line)[key]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            yield text, f"{path}:{number}"


def read_parquet(file, path, skipped, key):
    """Yield (what is in the column `key`, or None; path) for each row."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16)  # otherwise all is read before the first text
    for batch in table.iter_batches(batch_size=1024, columns=[key]):
        for row in batch.to_pylist():
            yield row.get(key), path


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
SUFFIXES = ".txt, .jsonl (.gz or .zst may follow) or .parquet"
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
    found = re.search(r"(\.txt|\.jsonl)(\.gz|\.zst)?$|\.parquet$", str(path).lower())
    return found and (found[1] or found[0])


def read_files(files, documents, key, skipped):
    """Yield the documents of files. A text is cut at what SEPARATORS has for `documents`, or left whole for None. If a
    file cannot be read to its end, the rest of it is skipped."""
    for path in files:
        try:
            with open(path, "rb") as file:
                if compression := COMPRESSIONS.get(Path(path).suffix.lower()):
                    import pyarrow

                    file = io.BufferedReader(pyarrow.CompressedInputStream(file, compression))
                for text, place in READERS[kind(path)](file, path, skipped, key):
                    if not isinstance(text, str):
                        skipped.note(f'skipped lines or rows without a text in "{key}"', place)
                        continue
                    if DELIMITER in text and documents != "endoftext":
                        skipped.note(f"texts with {DELIMITER} as plain text (--documents=endoftext cuts there)", path)
                    yield from parts(text, SEPARATORS[documents]) if documents else [text]
        except (OSError, EOFError, ValueError, NotImplementedError) as error:
            skipped.note(f"files not read beyond an error ({type(error).__name__})", path)


def find_files(source, skipped):
    """The text files that a file, a folder or a glob names, each once, however many links lead to it. Their order is
    that of a hash of their names, so that the first million tokens are a fair validation split. UserError if there are
    none."""
    if source and Path(source).is_dir():
        found, folder = list(walk(source, skipped)), source
    else:
        found, folder = [source] if Path(source).is_file() else glob.glob(source, recursive=True), None
    files = {}
    for path in sorted(found):
        if kind(path) and os.path.isfile(path):
            files[os.path.realpath(path)] = path
        elif not os.path.isdir(path):
            skipped.note(f"files not read, which are gone or do not end in {SUFFIXES}", path)
    if not files:
        raise UserError(f"no file at {source!r} ends in {SUFFIXES}; other sources are stdlib and fineweb-edu")

    def order(path):
        name = os.path.relpath(path, folder) if folder else os.path.basename(path)
        return hashlib.sha256(os.fsencode(name)).digest(), path

    return sorted(files.values(), key=order)


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
            yield from (os.path.join(parent, name) for name in names if name[0] != ".")
        seen.add(real)


def stdlib_files():
    """The .py files of this Python's standard library, without its tests. Their order is that of a hash of their names,
    so that the first million bytes are a fair validation split."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not left_out & {*path.relative_to(root).parts}]
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


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
                failure = f"FineWeb-Edu ({subset}) could not be read from Hugging Face ({first_line(error)[:200]})"
                raise UserError(f"{failure}: start again to continue, or give your own texts or stdlib") from None
            print(f"{type(error).__name__}: trying again in {PATIENCE[failures]} s", file=sys.stderr)
            time.sleep(PATIENCE[failures])
            failures += 1


def is_final(error):
    """Whether another try is of no use: the data set or the subset does not exist, or the client is set to offline."""
    from datasets.config import HF_DATASETS_OFFLINE
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return status < 500 and status not in (408, 429)
    if HF_HUB_OFFLINE or HF_DATASETS_OFFLINE:
        return True
    return type(error) is ValueError or isinstance(error, DatasetNotFoundError)


# ---------------------------------------------------------------------------------------------------------------


def open_source(name, subset, documents, key, skipped):
    """What a command line names, as (name for meta.json, fingerprint, read). read(position, or None for the beginning)
    yields (position, documents). The fingerprint changes when files on this machine do. What cannot be used is noted in
    `skipped`. UserError if there is no such source, or an option is of no use for it."""
    files = []
    if name != "fineweb-edu":
        files = stdlib_files() if name == "stdlib" else find_files(name, skipped)
    kinds = {kind(path) for path in files}
    if subset and name != "fineweb-edu":
        raise UserError("--subset is for fineweb-edu: leave it out")
    if documents and kinds != {".txt"}:
        raise UserError(f"--documents cuts only .txt files, and {name} has others: leave it out")
    if key and not kinds & {".jsonl", ".parquet"}:
        raise UserError(f"--text_key is for .jsonl and .parquet, and {name} has none: leave it out")

    if name == "fineweb-edu":
        subset = subset or "sample-10BT"
        return f"{FINEWEB_EDU} {subset}", "", partial(read_fineweb_edu, subset)
    if name == "stdlib":
        name = f"stdlib of Python {platform.python_version()}"
        texts = (path.read_text("utf-8", "replace") for path in files)
    else:
        texts = read_files(files, documents, key or "text", skipped)
        name += (f" cut into {documents}" if documents else "") + (f" of {key}" if key else "")
    facts = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()

    # a position is the number of batches before it
    return name, fingerprint, lambda position: islice(enumerate(batches(texts)), position or 0, None)
