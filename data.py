"""Token shards on disk, and the training batch as a pure function of (seed, step).

A folder of shards holds NAME_val_000000.bin, NAME_train_000001.bin, … in the format llm.c and modded-nanogpt
share: 256 int32 of header (magic, version, number of tokens, zeros), then the tokens, a delimiter before each
document. prepare_data.py also writes a meta.json beside them that says which tokenizer made them.

Nothing here keeps a position. Training sequences are numbered; each epoch visits the numbers in an order of its
own, computed one by one from (seed, epoch); a resumed run asks for step 1000 and gets what it would have got.
"""

import base64
import importlib.resources
import json
import math
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
# magic number → (version, dtype of a token)
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}


class UserError(Exception):
    """A mistake that the user can mend: its text is one line that says what is wrong and how to fix it."""


def lock_folder(folder, wait=False):
    """Make a folder and keep others out of it: returns an open file that has its lock until it is closed, or
    the process dies, however it dies. UserError if another process has it, or else wait for its end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(f"another process writes to {folder}: wait for its end, or choose another --out") from None
    return file


# ---------------------------------------------------------------------------------------------------------------
# Shards


@dataclass(frozen=True)
class Shard:
    """One file of `tokens` tokens."""

    path: Path
    dtype: np.dtype
    tokens: int

    def read(self, start, count):
        """Tokens start … start + count − 1, as int64."""
        offset = HEADER_BYTES + start * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count, offset=offset).astype(np.int64)


def token_dtype(vocab_size):
    """The narrowest of the format's two token types that holds ids below vocab_size."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_header(dtype, tokens):
    """The 1024 bytes that precede `tokens` tokens of this dtype."""
    magic, version = next((magic, version) for magic, (version, d) in FORMATS.items() if d == dtype)
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = magic, version, tokens
    return header.tobytes()


def open_shard(path):
    """The Shard in this file, its header checked against its size; UserError if it is damaged or none at all."""
    path = Path(path)
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS:
        raise UserError(f"{path} is no token shard: it is shorter than the header; prepare it again or delete it")
    magic, version, tokens = (int(value) for value in header[:3])
    if magic not in FORMATS:
        raise UserError(f"{path} is no token shard: its magic number is {magic}, not {' or '.join(map(str, FORMATS))}")
    expected_version, dtype = FORMATS[magic]
    if version != expected_version:
        raise UserError(f"{path} has version {version} of the shard format; this code reads version {expected_version}")
    held = (path.stat().st_size - HEADER_BYTES) / dtype.itemsize
    if held != tokens:
        raise UserError(f"{path} is damaged: its header says {tokens} tokens, it holds {held:g}; prepare it again")
    return Shard(path, dtype, tokens)


def find_shards(folder, split):
    """The shards of "train" or "val" in a folder, in the order of their names; UserError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no data folder {folder}: make it with prepare_data.py (its line is in the config)")
    named = re.compile(rf".*_{split}(_\d+)?\.bin")
    paths = sorted(path for path in folder.iterdir() if named.fullmatch(path.name) and path.is_file())
    if not paths:
        raise UserError(f"{folder} has no {split} shards (NAME_{split}_000001.bin): make them with prepare_data.py")
    return [open_shard(path) for path in paths]


def read_meta(folder):
    """meta.json of a folder of shards, or None where there is none (shards made by others); UserError if it is
    malformed or does not describe the shards beside it."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        str(meta["tokenizer"])
        numbers = [meta["vocab_size"], *(meta["splits"][s][n] for s in ("train", "val") for n in ("tokens", "bytes"))]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"counts {numbers}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is malformed ({error!r}): prepare the data again, or delete it to train without"
        ) from None
    for split in ("train", "val"):
        shards = find_shards(folder, split)
        if any(shard.dtype != token_dtype(meta["vocab_size"]) for shard in shards):
            raise UserError(f"{path} tells of another tokenizer than made the {split} shards: prepare the data again")
        told, held = meta["splits"][split]["tokens"], sum(shard.tokens for shard in shards)
        if told != held:
            raise UserError(
                f"{path} tells of {told} {split} tokens, but the shards hold {held}: prepare the data again"
            )
    return meta


def bits_per_byte(loss, meta):
    """Validation loss in nats a token → bits a byte of the text that the tokens stand for; None without meta."""
    if meta is None or not meta["splits"]["val"]["bytes"]:
        return None
    return loss / math.log(2) * meta["splits"]["val"]["tokens"] / meta["splits"]["val"]["bytes"]


# ---------------------------------------------------------------------------------------------------------------
# Order


def _mix(x):
    """A uint64 hash of each element of x (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(index, n, seed, epoch):
    """Where each number in `index` (below n) goes in a random permutation of 0 … n−1 fixed by (seed, epoch).

    A Feistel network permutes the numbers of an even count of bits by hashing one half into the other; numbers
    that land at n or beyond go through again until they fall below. So no permutation is ever stored.
    """
    half = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
    mask = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    keys = [_mix(key + np.uint64(k)) for k in range(1, 7)]
    index = np.array(index, np.uint64)
    pending = np.ones(len(index), bool)
    while pending.any():
        left, right = index[pending] >> half, index[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        index[pending] = left << half | right
        pending = index >= n
    return index.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------
# Sequences


class Corpus:
    """One split of a folder of shards, as numbered sequences of seq_len + 1 tokens: seq_len inputs, and the
    targets one further on. Neighbours share a token, so that each target is predicted once an epoch."""

    def __init__(self, folder, split, seq_len, vocab_size):
        self.shards = find_shards(folder, split)
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.ends = np.cumsum([max(0, shard.tokens - 1) // seq_len for shard in self.shards])
        self.n_sequences = int(self.ends[-1])

    def read(self, shard, start, count):
        """Tokens of a shard, as int64, checked to be within the vocabulary."""
        tokens = shard.read(start, count)
        if tokens.max(initial=0) >= self.vocab_size:
            raise UserError(
                f"{shard.path} holds token {tokens.max()}, beyond vocab_size={self.vocab_size}: "
                f"raise vocab_size, or prepare the data with a smaller tokenizer"
            )
        return tokens

    def sequence(self, number):
        """Sequence 0 … n_sequences − 1: (seq_len + 1,) int64."""
        index = int(np.searchsorted(self.ends, number, side="right"))
        first = number - (self.ends[index - 1] if index else 0)
        return self.read(self.shards[index], int(first) * self.seq_len, self.seq_len + 1)

    def batch(self, seed, step, size):
        """Training batch number `step` of `size` sequences: (size, seq_len + 1) int64.

        Position step·size + row of the run falls in epoch position // n_sequences, which visits every sequence
        once in its own order. Depends on nothing else: not on ranks, micro-batches or earlier calls.
        """
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), self.n_sequences)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            numbers[now] = shuffled(places[now], self.n_sequences, seed, int(epoch))
        return np.stack([self.sequence(number) for number in numbers])


def prefetched(function, items, workers=1):
    """function(item) for each item, in order, computed in threads at most two items a thread ahead."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def validation_batches(corpus, max_tokens, size, ignore, rank=0, world=1):
    """(inputs, targets), each (size, seq_len) int64, that predict the first max_tokens validation tokens once each.

    Every rank of `world` gets its share (and reads the rest too, so that a bad token stops all of them alike). What
    does not fill the last sequence or the last batch is padded with `ignore` targets: the set is covered to its last
    token, and every batch has one shape.
    """
    spans = []
    for shard in corpus.shards:
        predictable = min(max(0, shard.tokens - 1), max_tokens)
        for start in range(0, predictable, corpus.seq_len):
            spans.append((shard, start, min(corpus.seq_len, predictable - start)))
        max_tokens -= predictable
    for number, first in enumerate(range(0, len(spans), size)):
        inputs = np.zeros((size, corpus.seq_len), np.int64)
        targets = np.full((size, corpus.seq_len), ignore, np.int64)
        for row, (shard, start, length) in enumerate(spans[first : first + size]):
            tokens = corpus.read(shard, start, length + 1)
            inputs[row, :length] = tokens[:-1]
            targets[row, :length] = tokens[1:]
        if number % world == rank:
            yield inputs, targets


# ---------------------------------------------------------------------------------------------------------------
# Tokenizers


def get_tokenizer(name):
    """The tiktoken.Encoding called `name`: "bytes" (256 bytes and an end-of-text, needs no download), "gpt2",
    "tekken" (the paper's, Mistral-Nemo's), or any of tiktoken's own. Its eot_token delimits documents. UserError if
    there is none of that name or it cannot be loaded."""
    import tiktoken

    if name == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
        special = {"<|endoftext|>": 256}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    if name == "tekken":
        return tekken()
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"unknown tokenizer {name!r}: known are bytes, tekken, {', '.join(known)}")
    try:
        # r50k_base has the ids of GPT-2 and comes as one file
        return tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    except Exception as error:
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}): connect once, set "
            f"TIKTOKEN_CACHE_DIR to a folder that holds it, or use --tokenizer=bytes"
        ) from None


def tekken():
    """Mistral-Nemo's tokenizer, from the data file in the package mistral-common: 131072 ids, the first 1000 special
    (2 is the end of text), then the first 130072 of the file's 150000 ranks."""
    import tiktoken

    try:
        files = importlib.resources.files("mistral_common")
    except ModuleNotFoundError:
        raise UserError("tokenizer 'tekken' is in an optional package: pip install mistral-common") from None
    table = json.loads((files / "data" / "tekken_240718.json").read_text("utf-8"))
    n_special = table["config"]["default_num_special_tokens"]
    n_ranks = table["config"]["default_vocab_size"] - n_special
    ranks = {base64.b64decode(row["token_bytes"]): n_special + row["rank"] for row in table["vocab"][:n_ranks]}
    special = {"<|endoftext|>": 2}
    return tiktoken.Encoding(
        "tekken", pat_str=table["config"]["pattern"], mergeable_ranks=ranks, special_tokens=special
    )
