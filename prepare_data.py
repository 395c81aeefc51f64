"""Text → token shards:  python prepare_data.py SOURCE --out=data/NAME --tokenizer=bytes

SOURCE is `stdlib` (the .py files of your own Python, nothing is downloaded), `fineweb-edu` (streamed from Hugging
Face), or a file, folder or glob of .txt (a document each), .jsonl or .parquet (a document a row, column "text"),
also with .gz or .zst behind.

Documents are cut into pieces, pieces are gathered into batches, threads tokenise batches (tiktoken works outside
Python's global lock), and one writer takes the results in order: memory stays the same for any corpus, and the
shards for any number of workers.
"""

import argparse
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
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from data import HEADER_BYTES, UserError, get_tokenizer, lock_folder, prefetched, read_meta, shard_header, token_dtype

PIECE = 2**20  # characters of text that are tokenised at once
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


def read_fineweb_edu(subset):
    """The Pieces of FineWeb-Edu, streamed from Hugging Face in the order of its files."""
    from datasets import load_dataset

    try:
        for row in load_dataset("HuggingFaceFW/fineweb-edu", name=subset, split="train", streaming=True):
            yield from document(row["text"], len(row["text"]))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"FineWeb-Edu ({subset}) could not be read from Hugging Face: {reason}") from None


def open_source(source, subset, skipped):
    """(Pieces, bytes of input in all or None if unknown, description for meta.json) of a SOURCE argument."""
    if source == "stdlib":
        size = sum(path.stat().st_size for path in stdlib_files())
        return read_stdlib(skipped), size, f"stdlib of Python {platform.python_version()}"
    if source == "fineweb-edu":
        return read_fineweb_edu(subset), None, f"HuggingFaceFW/fineweb-edu {subset}"
    files = find_files(source, skipped)
    return read_files(files, skipped), sum(os.path.getsize(path) for path in files), source


# ---------------------------------------------------------------------------------------------------------------
# Tokens


def batches(pieces):
    """Lists of Pieces with about PIECE characters together."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= PIECE or len(batch) >= 2**14:
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
    """Arrays of tokens, to be taken in exact amounts."""

    def __init__(self, arrays):
        self.arrays = iter(arrays)

    def take(self, count):
        """Arrays of `count` tokens together, or of all that is left."""
        while count > 0 and (array := next(self.arrays, None)) is not None:
            if len(array) > count:
                self.put_back([array[count:]])
                array = array[:count]
            count -= len(array)
            yield array

    def put_back(self, arrays):
        """Make these arrays the next to be taken."""
        self.arrays = chain(arrays, self.arrays)


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


def write_shards(stream, out, encoding, val_tokens, shard_tokens):
    """Write the validation shard, then the training shards; returns meta.json's "splits"."""
    dtype, widths = token_dtype(encoding.n_vocab), token_widths(encoding)
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("val", "train")}

    def counted(arrays, counts):
        for array in arrays:
            counts["tokens"] += len(array)
            counts["bytes"] += int(widths[array].sum())
            counts["documents"] += int((array == encoding.eot_token).sum())
            yield array

    full, index = True, 0
    while full:
        split, size = ("train", shard_tokens) if index else ("val", val_tokens)
        path = out / f"{out.name}_{split}_{index:06d}.bin"
        full = write_shard(path, counted(stream.take(size), splits[split]), dtype) == size
        index += 1
    return splits


def claim(out, settings):
    """Make `out` ready to be written and return its lock, or None if it is complete; UserError if it holds something
    else, or another process writes to it.

    Until all shards are written `out` holds a meta.json.tmp, by which an interrupted run's leftovers are known as
    ours and removed.
    """
    unfinished = out / "meta.json.tmp"
    if meta := read_meta(out):
        if meta.get("settings") == settings:
            return None
        raise UserError(f"{out} already holds data prepared otherwise: choose another --out, or delete it")
    if list(out.glob("*.bin")) and not unfinished.exists():
        raise UserError(f"{out} already holds shards from elsewhere: choose another --out, or delete them")
    lock = lock_folder(out)
    if unfinished.exists():
        discard(out)
    unfinished.write_text(json.dumps(settings), "utf-8")
    return lock


def discard(out):
    """Remove the shards, whole or not, that a run of ours wrote into `out`, and the mark it left."""
    ours = re.compile(re.escape(out.name) + r"_(val|train)_\d{6}\.(bin|tmp)|meta\.json\.tmp")
    for path in out.iterdir():
        if ours.fullmatch(path.name):
            path.unlink()


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


def prepare(args):
    """Write the shards and meta.json that the command line asks for."""
    from tqdm import tqdm

    skipped = {}
    pieces, size, source = open_source(args.source, args.subset, skipped)
    encoding = get_tokenizer(args.tokenizer)
    settings = {key: getattr(args, key) for key in ("tokenizer", "tokens", "val_tokens", "shard_tokens")}
    settings["source"] = source
    lock = claim(args.out, settings)
    if not lock:
        print(f"{args.out} is complete already; delete it to read the source again")
        return

    def tokens():
        with tqdm(total=args.tokens or size, unit="tok" if args.tokens else "B", unit_scale=True) as bar:
            for array, taken in prefetched(lambda batch: encode(encoding, batch), batches(pieces), args.workers):
                bar.update(len(array) if args.tokens else taken)
                yield array

    stream = Stream(tokens())
    if args.tokens:
        stream = Stream(stream.take(args.tokens))
    val_tokens = args.val_tokens
    if val_tokens is None:  # look ahead as far as it takes to know a tenth of a small corpus
        head = list(stream.take(10 * DEFAULT_VAL_TOKENS))
        val_tokens = min(DEFAULT_VAL_TOKENS, sum(map(len, head)) // 10)
        stream.put_back(head)
    splits = write_shards(stream, args.out, encoding, val_tokens, args.shard_tokens)

    for reason, places in skipped.items():
        names = ", ".join(places["where"]) + (", …" if places["times"] > len(places["where"]) else "")
        print(f"skipped {places['times']} {reason}: {names}", file=sys.stderr)
    if min(splits[split]["tokens"] for split in splits) < 2:
        discard(args.out)
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
    (args.out / "meta.json.tmp").write_text(json.dumps(meta, indent=2) + "\n", "utf-8")
    (args.out / "meta.json.tmp").replace(args.out / "meta.json")
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
        print("interrupted: the same command starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
