"""Token shards on disk, and the training batch as a pure function of (seed, step).

A folder of shards holds NAME_val_000000.bin, NAME_train_000001.bin, … in the format of llm.c and modded-nanogpt:
256 int32 of header (magic, version, number of tokens, zeros), then the tokens, with a delimiter before each
document. prepare_data.py also writes a meta.json beside them that says which tokenizer made them.

Nothing here keeps a position. Training sequences are numbered, and each epoch visits the numbers in an order of its
own, which (seed, epoch) decide. So a resumed run asks for step 1000 and gets the batch that it would have got without
the interruption.
"""

import functools
import hashlib
import json
import math
import os
import re
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbing.command import UserError

HEADER_BYTES = 4 * 256
# (magic number, version) → dtype of a token
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
# How content_hash samples a shard: shards of up to 4096 tokens are covered completely
SAMPLES = 64
SAMPLE_TOKENS = 64
AGAIN = "the data again, in an empty folder"
SMALLER_IDS = "raise vocab_size, or prepare the data with a smaller tokenizer"


# ---------------------------------------------------------------------------------------------------------------
# Shards


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of `tokens` tokens. Two Shards are never equal: a new file may have taken the name of an old one."""

    path: Path
    dtype: np.dtype
    tokens: int

    def read(self, start, count):
        """Tokens start … start + count − 1: (count,) int64."""
        size = self.dtype.itemsize
        if not hasattr(os, "pread"):  # Windows
            return np.fromfile(self.path, self.dtype, count, offset=HEADER_BYTES + start * size).astype(np.int64)
        file = opened(self)
        # One call reads from a place, so that threads can share a file. (A memory map would end the process if the file
        # were cut off.)
        data = os.pread(file.fileno(), count * size, HEADER_BYTES + start * size)
        return np.frombuffer(data, self.dtype, len(data) // size).astype(np.int64)


@functools.lru_cache(256)  # below the 1024 files that a process may usually open
def opened(shard):
    """The file of a Shard, open for reading, the same for each call."""
    return open(shard.path, "rb", buffering=0)


def token_dtype(vocab_size):
    """The narrower of the format's two dtypes (uint16, uint32) if it holds all ids below vocab_size, else the other."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_header(dtype, tokens):
    """The 1024 bytes that precede `tokens` tokens of this dtype."""
    magic, version = next(numbers for numbers, known in FORMATS.items() if known == dtype)
    return np.array([magic, version, tokens], "<i4").tobytes().ljust(HEADER_BYTES, b"\0")


def open_shard(path):
    """The Shard in this file. UserError if its header is not that of a shard or does not fit the size of the file."""
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    if header.nbytes < HEADER_BYTES:
        raise UserError(f"{path} is not a shard: it is shorter than the header; delete it, or prepare {AGAIN}")
    magic, version, tokens = header[:3].tolist()
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        raise UserError(f"{path} is not a shard: magic number {magic} and version {version} are of no known format")
    found = (path.stat().st_size - HEADER_BYTES) / dtype.itemsize
    if found != tokens:
        reason = f"its header says {tokens} tokens, but it holds {found:g}"
        raise UserError(f"{path} is damaged: {reason}; prepare {AGAIN}")
    return Shard(path, dtype, tokens)


def find_shards(folder, split):
    """The Shards of a split ("train" or "val") in a folder, sorted by name. UserError if there are none, or a damaged
    one."""
    named = re.compile(rf".*_{split}(_\d+)?\.bin")
    paths = sorted(path for path in Path(folder).glob("*.bin") if named.fullmatch(path.name) and path.is_file())
    if not paths:
        missing = f"there is no data folder {folder}, or it has no {split} shards"
        raise UserError(f"{missing}: make them with prepare_data.py (the config has the command)")
    return [open_shard(path) for path in paths]


def content_hash(shards):
    """A SHA-256, in hexadecimal, of shards in their order: of each one's dtype, number of tokens, and SAMPLES evenly
    spread samples of its tokens, the first and the last included.

    It costs SAMPLES small reads per shard, whatever its size. Other data, another order or other cuts between shards
    change it; a change between the samples of a large shard does not.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.dtype.str} {shard.tokens} ".encode())
        for start in np.linspace(0, max(0, shard.tokens - SAMPLE_TOKENS), SAMPLES).astype(int):
            digest.update(shard.read(int(start), SAMPLE_TOKENS).astype(shard.dtype).tobytes())
    return digest.hexdigest()


def read_meta(folder):
    """The content of a folder's meta.json, or None if it has none, as for shards that others made. UserError if it is
    malformed or does not describe the shards beside it."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        numbers = [meta["vocab_size"], *(meta["splits"][s][n] for s in ("train", "val") for n in ("tokens", "bytes"))]
        whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not whole or type(meta["tokenizer"]) is not str:
            raise ValueError("tokenizer must be a name; vocab_size, tokens and bytes whole numbers below 2**63")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is malformed ({error!r}): prepare {AGAIN}") from None
    for split in ("train", "val"):
        stated, found = meta["splits"][split]["tokens"], sum(shard.tokens for shard in find_shards(folder, split))
        if stated != found:
            raise UserError(f"{path} says {stated} {split} tokens, but the shards hold {found}: prepare {AGAIN}")
    return meta


def bits_per_byte(loss, meta, shards):
    """Validation loss in nats per token → bits per byte of the text of this number of shards. None if that is not
    known: without meta, or if the text is empty. Exact if all of the split is validated and each shard begins with a
    delimiter, which stands for no bytes, since the first token of a shard is not predicted."""
    if meta is None or not meta["splits"]["val"]["bytes"]:
        return None
    return loss / math.log(2) * (meta["splits"]["val"]["tokens"] - shards) / meta["splits"]["val"]["bytes"]


# ---------------------------------------------------------------------------------------------------------------
# Order


# Raise it whenever the batches of a seed change, so that no run resumes with other batches than it began with
ORDER_VERSION = 2
# Threads that read ahead would each draw the order of an epoch, which takes seconds for a large run
ONE_AT_A_TIME = threading.Lock()


@functools.lru_cache(2)  # a batch may end one epoch and begin the next
def order(n, seed, epoch):
    """The order in which an epoch visits n sequences: a permutation of 0 … n − 1, (n,) int64. numpy has promised never
    to change the numbers of a RandomState (NEP 19)."""
    return np.random.RandomState([*divmod(seed, 2**32), epoch]).permutation(n)


# ---------------------------------------------------------------------------------------------------------------
# Sequences


class Corpus:
    """One split of a folder of shards, as n_sequences numbered sequences of seq_len + 1 tokens: seq_len inputs, and
    the targets, which are the inputs shifted by one. The last token of a sequence is the first of the next, so that
    each target is predicted once per epoch, but for fewer than seq_len at the end of a shard. UserError as for
    find_shards."""

    def __init__(self, folder, split, seq_len, vocab_size):
        self.shards = find_shards(folder, split)
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.ends = np.cumsum([max(0, shard.tokens - 1) // seq_len for shard in self.shards])
        self.n_sequences = int(self.ends[-1])

    def read(self, shard, start, count):
        """Tokens start … start + count − 1 of a shard: (count,) int64. UserError if one is not below vocab_size."""
        try:
            tokens = shard.read(start, count)
        except OSError:
            tokens = []
        if len(tokens) < count:  # a file that ends early raises nothing
            raise UserError(f"{shard.path} cannot be read to its end: it is damaged, or its disk fails")
        largest = tokens.max(initial=0)
        if largest >= self.vocab_size:
            raise UserError(f"{shard.path} holds token {largest}, beyond vocab_size={self.vocab_size}: {SMALLER_IDS}")
        return tokens

    def sequence(self, number):
        """Sequence 0 … n_sequences − 1: (seq_len + 1,) int64."""
        index = int(np.searchsorted(self.ends, number, side="right"))
        first = number - (self.ends[index - 1] if index else 0)
        return self.read(self.shards[index], int(first) * self.seq_len, self.seq_len + 1)

    def batch(self, seed, step, size, rank=0, world=1):
        """The rows of training batch number `step`, of `size` sequences, that are the share of one rank of `world`:
        (size / world, seq_len + 1) int64.

        A run visits positions step·size + row; a position is in epoch position // n_sequences, and each epoch visits
        every sequence once, in its own order. Nothing else matters: not ranks, micro-batches or earlier calls.
        """
        positions = range(step * size + rank * size // world, step * size + (rank + 1) * size // world)
        places = [divmod(position, self.n_sequences) for position in positions]
        with ONE_AT_A_TIME:
            orders = {epoch: order(self.n_sequences, seed, epoch) for epoch in sorted({epoch for epoch, _ in places})}
        return np.stack([self.sequence(orders[epoch][place]) for epoch, place in places])


def prefetched(function, items, workers=1):
    """Yield function(item) for each item, in order. `workers` threads compute ahead, by at most two items each."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def validation_batches(corpus, max_tokens, size, ignore, rank=0, world=1):
    """Yield (inputs, targets), each (size, seq_len) int64, that predict each of the first max_tokens tokens once.

    Each rank of `world` yields its share of the batches. The last sequence of a shard and the last batch are filled up
    with `ignore` as target, so that the split is covered to its last token by batches of one shape.
    """
    spans = []
    for shard in corpus.shards:
        predictable = min(max(0, shard.tokens - 1), max_tokens)
        for start in range(0, predictable, corpus.seq_len):
            spans.append((shard, start, min(corpus.seq_len, predictable - start)))
        max_tokens -= predictable
    for first in range(rank * size, len(spans), world * size):
        inputs = np.zeros((size, corpus.seq_len), np.int64)
        targets = np.full((size, corpus.seq_len), ignore, np.int64)
        for row, (shard, start, length) in enumerate(spans[first : first + size]):
            tokens = corpus.read(shard, start, length + 1)
            inputs[row, :length] = tokens[:-1]
            targets[row, :length] = tokens[1:]
        yield inputs, targets


def open_data(config, say):
    """Open the data of a Config: (training Corpus, validation Corpus, meta or None, facts). `facts` are what must stay
    the same from the beginning of a run to its end; the folder's path is not, so that a run can resume after its data
    have moved. say(text) shows the user a note. UserError if the data do not fit the config."""
    meta = read_meta(config.data)
    if not meta and (part := Path(config.data) / "meta.json.part").exists():
        hint = f"the prepare_data.py command that began it continues it; to train on what is there, delete {part}"
        raise UserError(f"{config.data} is not complete: {hint}")
    if meta and meta["vocab_size"] > config.vocab_size:
        made_with = f"{config.data} was tokenized with {meta['tokenizer']} ({meta['vocab_size']} ids)"
        raise UserError(f"{made_with}, more than vocab_size={config.vocab_size}: {SMALLER_IDS}")
    corpus = Corpus(config.data, "train", config.seq_len, config.vocab_size)
    validation = Corpus(config.data, "val", config.seq_len, config.vocab_size)
    if corpus.n_sequences < 1:
        raise UserError(f"{config.data} is too short for one sequence of {config.seq_len} tokens: lower seq_len")
    if max(shard.tokens for shard in validation.shards) < 2:
        raise UserError(f"{config.data} has no validation tokens to predict: prepare it with a larger --val_tokens")
    if meta is None:
        say(f"note: {config.data} has no meta.json, so bits per byte are not known")
    elif config.eval_tokens < meta["splits"]["val"]["tokens"] and meta["tokenizer"] != "bytes":
        say("note: eval_tokens covers a part of the validation split: bits per byte use its mean bytes per token")
    facts = {"tokenizer": meta["tokenizer"] if meta else None, "order of batches": ORDER_VERSION}
    facts |= {"training shards": content_hash(corpus.shards), "validation shards": content_hash(validation.shards)}
    return corpus, validation, meta, facts
