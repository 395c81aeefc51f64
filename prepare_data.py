"""Text → token shards:  python prepare_data.py SOURCE --out=data/NAME --tokenizer=bytes

SOURCE is `stdlib` (the .py files of your own Python, nothing is downloaded), `fineweb-edu` (streamed from Hugging
Face), or a file, folder or glob of .txt (a document each), .jsonl or .parquet (a document a row, column "text"),
also with .gz or .zst behind.

Documents are cut into pieces, pieces are gathered into batches, threads tokenise batches (tiktoken works outside
Python's global lock), and one writer takes the results in order: memory stays the same for any corpus, and the
shards for any number of workers. Each batch knows its position in the source, and each finished shard writes down where
it ended: stopped at any moment, the same command goes on from there.
"""

import argparse
import codecs
import copy
import glob
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data import (
    HEADER_BYTES,
    UserError,
    get_tokenizer,
    lock_folder,
    open_shard,
    prefetched,
    read_meta,
    shard_header,
    token_dtype,
)

PIECE = 2**20  # characters of text that are tokenised at once
MOST_PIECES = 2**14  # and documents, however short
DEFAULT_VAL_TOKENS = 1_000_000


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one. size: the bytes of input it took, for the progress bar."""

    text: str
    starts_document: bool
    size: float


# ---------------------------------------------------------------------------------------------------------------
# Sources: each yields Pieces in a fixed order

# A text may be cut here without changing its tokens, since no tokenizer's pattern runs on from a letter into a
# space and another letter, or from a line end after a character that is no space into a next line that begins
# with one (some let punctuation take "\n/").
CUT = re.compile(r"[^\W\d_](?= [^\W\d_])|\S\n(?=[^\s/])")


def cut(read):
    """Texts of about PIECE characters whose tokens, joined, are those of the whole; read(n) gives the next n. A text
    without a place to cut is cut anyway every 8 pieces, which may split a token there."""
    text = ""
    while more := read(PIECE):
        searched = max(PIECE, len(text) - 2)
        text += more
        if found := CUT.search(text, searched):
            yield text[: found.end()]
            text = text[found.end() :]
        elif len(text) >= 8 * PIECE:
            yield text
            text = ""
    if text:
        yield text


def document(text, size):
    """The Pieces of one document held in memory."""
    if len(text) <= PIECE:
        yield Piece(text, True, size)
        return
    for number, part in enumerate(cut(io.StringIO(text).read)):
        yield Piece(part, number == 0, size * len(part) / len(text))


def read_txt(path, skipped):
    """One document, read piece by piece, since it may be larger than memory."""

    def replace(error):
        skip(skipped, "bytes that are no UTF-8, for which U+FFFD stands", str(path))
        return "\ufffd", error.end

    codecs.register_error("replaced", replace)
    raw, stream = open_input(path)
    before = 0
    for number, part in enumerate(cut(io.TextIOWrapper(stream, "utf-8-sig", "replaced", newline="").read)):
        yield Piece(part, number == 0, raw.tell() - before)
        before = raw.tell()


def read_jsonl(path, skipped):
    """A document a line: {"text": …}."""
    raw, stream = open_input(path)
    before = 0
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if isinstance(text, str):
            yield from document(text, raw.tell() - before)
            before = raw.tell()
        else:
            skip(skipped, 'lines that are no JSON object with a "text"', f"{path}:{number}")


def read_parquet(path, skipped):
    """A document a row of the column "text"."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path)
    if "text" not in table.schema_arrow.names:
        skip(skipped, 'parquet files without a column "text"', str(path))
        return
    size = os.path.getsize(path) / max(1, table.metadata.num_rows)
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        for text in batch.column(0).to_pylist():
            if isinstance(text, str):
                yield from document(text, size)
            else:
                skip(skipped, "parquet rows without a text", str(path))


def open_input(path):
    """(the file as it lies on disk, the same decompressed by its suffix), both binary and buffered."""
    raw = open(path, "rb")
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    if compression is None:
        return raw, raw
    import pyarrow

    return raw, io.BufferedReader(pyarrow.CompressedInputStream(raw, compression))


def skip(skipped, reason, where):
    """Count an input that cannot be used under its reason, and keep where the first few were."""
    places = skipped.setdefault(reason, {"times": 0, "where": []})
    places["times"] += 1
    if len(places["where"]) < 10:
        places["where"].append(where)


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def kind(path):
    """.txt, .jsonl or .parquet, whatever compression follows; None for any other file."""
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".zst")]
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def read_files(paths, skipped):
    """The Pieces of these files; a file that cannot be read, or the rest of it, is skipped."""
    for path in paths:
        try:
            yield from READERS[kind(path)](path, skipped)
        except (OSError, EOFError, ValueError) as error:
            skip(skipped, f"unreadable files ({type(error).__name__})", str(path))


def find_files(source, skipped):
    """The text files that a file, a folder or a glob names, sorted; UserError if there are none."""
    if source and Path(source).is_dir():
        walk = os.walk(source, onerror=lambda error: skip(skipped, "unreadable folders", error.filename))
        found = [os.path.join(folder, name) for folder, _, names in walk for name in names]
    else:
        found = [source] if Path(source).is_file() else glob.glob(source, recursive=True)
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UserError(f"there is no source {source!r}: give stdlib, fineweb-edu, or a file, folder or glob")
    files = sorted(path for path in found if kind(path))
    if not files:
        raise UserError(f"{source} holds no {', '.join(READERS)} file (.gz or .zst may follow)")
    return files


def stdlib_files():
    """The .py files of this Python's standard library without its test suites, in an order set by their names."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if not left_out & set(name.split("/"))]
    return [root / name for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())]


def read_stdlib(skipped):
    """The Pieces of the standard library, a document a file."""
    for path in stdlib_files():
        yield from document(path.read_text("utf-8", "replace"), path.stat().st_size)


FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# How long to wait after each failure in a row, before giving up
PATIENCE = [1, 2, 5, 15, 30, 60, 60, 60, 60, 60]


def fineweb_edu_batches(subset, start):
    """(position, Pieces) of FineWeb-Edu, streamed from Hugging Face in the order of its files, from a position on
    (None: the beginning). A batch is of whole documents, so that a failure has it read again, from its position."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    position, rows, failures = start, None, 0
    while True:
        try:
            if position is None:  # the data may be changed while we read: keep to what they are now
                position = {"revision": HfApi().dataset_info(FINEWEB_EDU).sha, "state": None}
            if rows is None:
                dataset = load_dataset(
                    FINEWEB_EDU, subset, split="train", streaming=True, revision=position["revision"], columns=["text"]
                )
                if position["state"]:
                    dataset.load_state_dict(position["state"])
                rows = iter(dataset)
            batch = whole_documents(rows)
        except Exception as error:
            if is_final(error) or failures == len(PATIENCE):
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise UserError(f"FineWeb-Edu ({subset}) could not be read from Hugging Face: {reason}") from None
            print(f"{type(error).__name__}: trying again in {PATIENCE[failures]} s", file=sys.stderr)
            time.sleep(PATIENCE[failures])
            rows, failures = None, failures + 1
            continue
        if not batch:
            return
        yield position, batch
        position, failures = position | {"state": dataset.state_dict()}, 0


def whole_documents(rows):
    """The Pieces of the next rows of a data set, with about PIECE characters together."""
    batch, characters = [], 0
    for row in rows:
        batch += document(row["text"], len(row["text"]))
        characters += len(row["text"])
        if characters >= PIECE or len(batch) >= MOST_PIECES:
            break
    return batch


def is_final(error):
    """Whether asking Hugging Face again is of no use: there is no such data set or subset, or no network is wanted."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    response = getattr(error, "response", None)
    if isinstance(error, HfHubHTTPError) and response is not None:
        return response.status_code < 500 and response.status_code not in (408, 429)
    return type(error) is ValueError or isinstance(error, DatasetNotFoundError | OfflineModeIsEnabled)


def file_batches(pieces, start):
    """(position, Pieces) of files, from a position on: there, it is the number of batches before."""
    return islice(enumerate(batches(pieces)), start or 0, None)


def open_source(source, subset, skipped):
    """(function that gives (position, Pieces) from a position on, its files or None if they are not here, description
    for meta.json) of a SOURCE argument."""
    if source == "fineweb-edu":
        return partial(fineweb_edu_batches, subset), None, f"{FINEWEB_EDU} {subset}"
    if source == "stdlib":
        return (
            partial(file_batches, read_stdlib(skipped)),
            stdlib_files(),
            f"stdlib of Python {platform.python_version()}",
        )
    files = find_files(source, skipped)
    return partial(file_batches, read_files(files, skipped)), files, source


def fingerprint(files):
    """A hash of the files' names, sizes and times, by which it shows that they have changed."""
    facts = [(str(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files or ()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Tokens


def batches(pieces):
    """Lists of Pieces with about PIECE characters together."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= PIECE or len(batch) >= MOST_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(encoding, batch):
    """(tokens of a batch, a delimiter before each document; the bytes of input it took)."""
    delimiter = np.array([encoding.eot_token], np.uint32)
    tokens = []
    for piece in batch:
        if piece.starts_document:
            tokens.append(delimiter)
        # half a surrogate pair, which JSON can hold, is no text: "?" stands for it
        text = piece.text.encode("utf-8", "replace").decode("utf-8")
        tokens.append(encoding.encode_to_numpy(text, disallowed_special=()))
    return np.concatenate(tokens), sum(piece.size for piece in batch)


class Stream:
    """The tokens of (position, tokens) batches, to be taken in exact amounts; knows the batch where it stands, and how
    many of its tokens are taken."""

    def __init__(self, encoded):
        self.encoded = encoded
        self.position, self.used = None, 0
        self.rest = np.array([], np.uint32)

    def take(self, count):
        """Arrays of `count` tokens together, or of all that is left."""
        while count > 0:
            while not len(self.rest):
                batch = next(self.encoded, None)
                if batch is None:
                    return
                self.position, self.rest = batch
                self.used = 0
            array, self.rest = self.rest[:count], self.rest[count:]
            self.used += len(array)
            count -= len(array)
            yield array


# ---------------------------------------------------------------------------------------------------------------
# Shards


def write_shard(path, arrays, dtype):
    """Write one shard under a temporary name, then rename it; returns its number of tokens (0: no file is made)."""
    temporary = path.with_suffix(".tmp")
    tokens = 0
    with open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for array in arrays:
            file.write(array.astype(dtype).tobytes())
            tokens += len(array)
        file.seek(0)
        file.write(shard_header(dtype, tokens))
        file.flush()
        os.fsync(file.fileno())
    if tokens:
        temporary.replace(path)
    else:
        temporary.unlink()
    return tokens


def token_widths(encoding):
    """(n_vocab,) how many bytes of text each token stands for; special tokens, like the delimiter, for none."""
    widths = np.zeros(encoding.n_vocab, np.int64)
    for token in encoding.token_byte_values():
        widths[encoding.encode_single_token(token)] = len(token)
    return widths


def shard_path(out, index):
    """Of the shard with this number; the first is for validation."""
    return out / f"{out.name}_{'train' if index else 'val'}_{index:06d}.bin"


def write_shards(stream, out, encoding, sizes, progress, save):
    """Write the shards that `progress` does not have yet, of these sizes, {"val": tokens, "train": tokens, "all":
    tokens together}; call save() after each full one. Brings progress["splits"] up to date, which is meta.json's."""
    dtype, widths = token_dtype(encoding.n_vocab), token_widths(encoding)

    def counted(arrays, counts):
        for array in arrays:
            counts["tokens"] += len(array)
            counts["bytes"] += int(widths[array].sum())
            counts["documents"] += int((array == encoding.eot_token).sum())
            yield array

    full = True
    while full:
        split = "train" if progress["shards"] else "val"
        left = sizes["all"] - sum(counts["tokens"] for counts in progress["splits"].values())
        arrays = counted(stream.take(min(sizes[split], left)), progress["splits"][split])
        full = write_shard(shard_path(out, progress["shards"]), arrays, dtype) == sizes[split]
        if full:
            progress |= {"shards": progress["shards"] + 1, "position": stream.position, "used": stream.used}
            save()


# ---------------------------------------------------------------------------------------------------------------
# The folder: meta.json once all shards are written, until then a meta.json.tmp that says how far they are

BEGINNING = {
    "shards": 0,
    "splits": {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("val", "train")},
    "position": None,  # of the batch in which the last full shard ended
    "used": 0,  # of its tokens, by then
    "shown": 0,  # by the progress bar, by then
}


def claim(out, settings, inputs):
    """(lock, content of meta.json.tmp) of a folder that is to be written, or None if it is complete; UserError if it
    holds something else, or another process writes to it.

    What an interrupted run of ours left is gone on with; what cannot be, since its input (a fingerprint) is no longer
    the same, or its shards are not whole, is replaced. At every moment meta.json.tmp tells of no more than is there.
    """
    unfinished = out / "meta.json.tmp"
    lock = lock_folder(out)
    if meta := read_meta(out):
        unfinished.unlink(missing_ok=True)
        if meta.get("settings") == settings:
            return None
        raise UserError(f"{out} already holds data prepared otherwise: choose another --out, or delete it")
    if any(not (is_ours(out, path) and unfinished.exists()) for path in out.glob("*.bin")):
        raise UserError(f"{out} already holds shards from elsewhere: choose another --out, or delete them")
    state = {"settings": settings, "inputs": inputs, "progress": copy.deepcopy(BEGINNING)}
    left = read_unfinished(unfinished)
    if left and left["progress"]["shards"]:
        if left["settings"] != settings:
            raise UserError(f"{out} holds a part of data prepared otherwise: choose another --out, or delete it")
        if left["inputs"] != inputs:
            print(f"the input of {out} has changed: starting over")
        elif not holds(out, left["progress"]):
            print(f"{out} does not hold the shards that it had: starting over")
        else:
            state = left
    write_json(unfinished, state)
    discard(out, keep=state["progress"]["shards"])
    return lock, state


def read_unfinished(path):
    """The content of a meta.json.tmp, or None if it cannot be read."""
    try:
        state = json.loads(path.read_text("utf-8"))
        known = state.keys() == {"settings", "inputs", "progress"} and state["progress"].keys() == BEGINNING.keys()
        return state if known else None
    except (OSError, ValueError, AttributeError):
        return None


def holds(out, progress):
    """Whether the shards are there, whole, of which `progress` tells."""
    try:
        held = [open_shard(shard_path(out, index)).tokens for index in range(progress["shards"])]
    except (OSError, UserError):
        return False
    return sum(held) == sum(counts["tokens"] for counts in progress["splits"].values())


def write_json(path, content):
    """Write a file, whole or not at all."""
    new = path.with_name("meta.json.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def is_ours(out, path):
    """Whether a file in `out` has the name of a shard, whole or not, that we write there."""
    return bool(re.fullmatch(re.escape(out.name) + r"_(val|train)_\d{6}\.(bin|tmp)", path.name))


def discard(out, keep=0):
    """Remove the shards that a run of ours wrote into `out`, whole or not, but for the first `keep`."""
    kept = {shard_path(out, index) for index in range(keep)}
    for path in out.iterdir():
        if is_ours(out, path) and path not in kept:
            path.unlink()


def check_room(out, tokens, dtype):
    """UserError if the disk does not have room for so many tokens more."""
    needed, free = tokens * dtype.itemsize, shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out} needs {needed / 1e9:.1f} GB for {tokens:,} tokens, and its disk has {free / 1e9:.1f} GB free: "
            f"make room, or start with another --out or fewer --tokens"
        )


# ---------------------------------------------------------------------------------------------------------------
# Command line


def count(text):
    """A whole number, at least 1: 1000000, 1_000_000 or 1e6."""
    try:
        value = float(text)
        if value >= 1 and value.is_integer():
            return int(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")


def shard_size(text):
    """A number of tokens that makes a shard: two at least, and what the header's int32 can count."""
    if 2 <= count(text) < 2**31:
        return count(text)
    raise argparse.ArgumentTypeError(f"must be at least 2 and below {2**31}, not {text}")


class Parser(argparse.ArgumentParser):
    """One whose mistakes are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def parse(argv):
    """The command line as a namespace; UserError where it is wrong."""
    parser = Parser(
        prog="python prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="stdlib, fineweb-edu, or a file, folder or glob")
    parser.add_argument("--out", help="folder to write (default: data/NAME, after the source)")
    parser.add_argument("--tokenizer", help="bytes, gpt2, or a tiktoken name (default: bytes for stdlib, else gpt2)")
    parser.add_argument("--tokens", type=count, help="stop after this many, validation included (default: all)")
    parser.add_argument(
        "--val_tokens",
        type=shard_size,
        help=f"in the validation shard (default: a tenth of the corpus, at most {DEFAULT_VAL_TOKENS:,})",
    )
    parser.add_argument("--shard_tokens", type=shard_size, default=10**8, help="in a training shard (default: 1e8)")
    parser.add_argument("--subset", default="sample-10BT", help="of fineweb-edu (default: sample-10BT)")
    parser.add_argument("--workers", type=count, default=os.cpu_count(), help="threads (default: all cores)")
    args = parser.parse_args(argv)
    args.tokenizer = args.tokenizer or ("bytes" if args.source == "stdlib" else "gpt2")
    stem = re.sub(r"\W+", "-", Path(args.source).name.split(".")[0]).strip("-")
    args.out = Path(args.out or f"data/{stem or 'text'}").resolve()
    return args


def most_tokens(args, input_bytes):
    """How many tokens there may be, roughly, or None where that is not known."""
    if args.source == "fineweb-edu":
        sample = re.fullmatch(r"sample-(\d+)BT", args.subset)  # that many billions of gpt2's tokens
        known = int(sample[1]) * 10**9 * (5 if args.tokenizer == "bytes" else 1) if sample else None
    else:
        known = 1000 * input_bytes if args.tokens else None  # no text is compressed to less than that
    return min(filter(None, (args.tokens, known)), default=None)


def encode_ahead(read, encoding, workers, bar):
    """(position, tokens) of (position, Pieces) batches, in their order, while threads tokenise the next ones."""
    results = prefetched(lambda batch: (batch[0], *encode(encoding, batch[1])), read, workers)
    for position, tokens, taken in results:
        step = taken if bar.unit == "B" else len(tokens)
        bar.update(min(step, bar.total - bar.n) if bar.total else step)
        yield position, tokens


def look_ahead(encoded, tokens):
    """(the same batches, how many of the first `tokens` tokens there are)."""
    head, found = [], 0
    for batch in encoded:
        head.append(batch)
        found += len(batch[1])
        if found >= tokens:
            break
    return chain(head, encoded), min(found, tokens)


def prepare(args):
    """Write the shards and meta.json that the command line asks for."""
    from tqdm import tqdm

    skipped = {}
    read, files, source = open_source(args.source, args.subset, skipped)
    input_bytes = sum(map(os.path.getsize, files)) if files else None
    encoding = get_tokenizer(args.tokenizer)
    settings = {key: getattr(args, key) for key in ("tokenizer", "tokens", "val_tokens", "shard_tokens")}
    settings["source"] = source
    claimed = claim(args.out, settings, fingerprint(files))
    if not claimed:
        print(f"{args.out} is complete already; delete it to read the source again")
        return
    lock, state = claimed
    progress, splits = state["progress"], state["progress"]["splits"]
    written = sum(counts["tokens"] for counts in splits.values())
    if progress["shards"]:
        print(f"{args.out} has {progress['shards']} shards with {written:,} tokens: going on from there")
    if expected := most_tokens(args, input_bytes):
        check_room(args.out, expected - written, token_dtype(encoding.n_vocab))

    sizes = {"val": args.val_tokens, "train": args.shard_tokens, "all": args.tokens or math.inf}
    unit = "tok" if args.tokens else "B"
    with tqdm(total=args.tokens or input_bytes, initial=progress["shown"], unit=unit, unit_scale=True) as bar:

        def save():
            progress["shown"] = bar.n
            write_json(args.out / "meta.json.tmp", state)

        encoded = encode_ahead(read(progress["position"]), encoding, args.workers, bar)
        if sizes["val"] is None and not progress["shards"]:  # is the corpus a small one?
            encoded, found = look_ahead(encoded, min(10 * DEFAULT_VAL_TOKENS, sizes["all"]))
            sizes["val"] = min(DEFAULT_VAL_TOKENS, found // 10)
        stream = Stream(encoded)
        for _ in stream.take(progress["used"]):
            pass
        write_shards(stream, args.out, encoding, sizes, progress, save)

    for reason, places in skipped.items():
        names = ", ".join(places["where"]) + (", …" if places["times"] > len(places["where"]) else "")
        print(f"skipped {places['times']} {reason}: {names}", file=sys.stderr)
    if min(counts["tokens"] for counts in splits.values()) < 2:
        discard(args.out)
        (args.out / "meta.json.tmp").unlink()
        total = splits["val"]["tokens"] + splits["train"]["tokens"]
        raise UserError(
            f"{source} is too short: its {total} tokens do not make a validation split"
            f"{f' of {args.val_tokens}' if args.val_tokens else ''} and a training split"
        )
    meta = {
        "tokenizer": args.tokenizer,
        "vocab_size": encoding.n_vocab,
        "splits": splits,
        "source": source,
        "settings": settings,
    }
    write_json(args.out / "meta.json", meta)
    (args.out / "meta.json.tmp").unlink()
    for split, counts in splits.items():
        print(f"{split}: {counts['tokens']:,} tokens, {counts['bytes']:,} bytes, {counts['documents']:,} documents")
    lock.close()
    print(f"written to {args.out}")


def main(argv):
    try:
        prepare(parse(argv))
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
