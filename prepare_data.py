"""Text → token shards:  python prepare_data.py SOURCE --out=data/NAME --tokenizer=bytes

    SOURCE                 stdlib (the .py files of your own Python, no download), fineweb-edu (streamed from Hugging
                           Face), or a file, folder or glob of .txt (one document each), .jsonl or .parquet (one
                           document per row, in the column "text"); .gz or .zst may follow .txt and .jsonl
    --documents=KIND       lines or paragraphs of each .txt are documents, shuffled by a hash; blank lines end a
                           paragraph, unless an indented line follows. endoftext: <|endoftext|> separates them
    --text_key=text        the column of .jsonl and .parquet that holds the text
    --out=FOLDER           where to write; default: data/NAME, named after the source
    --tokenizer=NAME       bytes, gpt2, tekken or a name that tiktoken knows; default: bytes for stdlib, else gpt2
    --tokens=N             stop after N tokens, validation included; default: all
    --val_tokens=N         in the validation shard; default: a tenth of the tokens, at most 1e6
    --shard_tokens=1e8     in each training shard
    --subset=sample-10BT   of fineweb-edu
    --workers=N            threads that tokenize; default: as many as the machine has cores

Threads tokenize batches of documents (tiktoken releases Python's GIL), and one writer takes the results in
order, so that the shards are the same for any number of workers. Whenever a shard is complete, meta.json.part notes the
position in the source where it ended: after an interruption, the same command continues from there.
"""

import math
import os
import re
import shutil
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from plumbing.command import Parser, UserError, program, whole_number
from plumbing.data import HEADER_BYTES, prefetched, shard_header, token_dtype
from plumbing.files import lock_folder, write_atomically, write_json
from plumbing.sources import PIECE, SEPARATORS, Skipped, open_source
from plumbing.tokenizer import get_tokenizer
from plumbing.unfinished import examine, shard_path, written

MOST_VAL_TOKENS = 1_000_000  # unless --val_tokens says otherwise

# ---------------------------------------------------------------------------------------------------------------
# Tokens

# Where a text may be cut without changing its tokens: between a letter and a space that another letter follows, and
# after a line end between two characters that are not spaces ("/" excepted, since some tokenizers join "\n/" to the
# punctuation before it). No tokenizer here has a token across either.
CUT = re.compile(r"[^\W\d_](?= [^\W\d_])|\S\n(?=[^\s/])")


def cut(text):
    """Yield parts of about PIECE characters, whose tokens together are those of the text. If 8 pieces have no place to
    cut, they are cut at their end, which may split a token."""
    start = 0
    while len(text) - start > PIECE:
        found = CUT.search(text, start + PIECE, start + 8 * PIECE)
        end = found.end() if found else start + 8 * PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def encode(encoding, skipped, batch):
    """(position, documents) → (position, their tokens with a delimiter before each document: (tokens,) uint32)."""
    position, documents = batch
    tokens = []
    for text in documents:
        tokens.append(np.array([encoding.eot_token], np.uint32))
        for part in cut(text):
            # JSON can hold half of a surrogate pair, which is not a character: it becomes "?"
            part = part.encode("utf-8", "replace").decode("utf-8")
            tokens += encode_part(encoding, skipped, part)
    return position, np.concatenate(tokens)


def encode_part(encoding, skipped, part):
    """[tokens of a text]. tiktoken fails on a million spaces in a row, for example; such a text is cut in the middle,
    which may split a token, until it does not."""
    try:
        return [encoding.encode_to_numpy(part, disallowed_special=())]
    except ValueError:
        skipped.note("texts that the tokenizer could not read in one piece, and read in two", f"{part[:20]!r}…")
        middle = len(part) // 2
        return encode_part(encoding, skipped, part[:middle]) + encode_part(encoding, skipped, part[middle:])


class Stream:
    """The tokens of (position, tokens) batches, to be taken in exact amounts. `position` and `used` say how far they
    are taken: the position of the current batch, and how many of its tokens are used."""

    def __init__(self, encoded, used):
        self.encoded, self.used = encoded, used
        self.position, self.tokens = next(encoded, (None, np.array([], np.uint32)))

    def more(self):
        """Whether there are more tokens. Reads the next batch if the current one is used up."""
        if self.used >= len(self.tokens) and (batch := next(self.encoded, None)):
            (self.position, self.tokens), self.used = batch, 0
        return self.used < len(self.tokens)

    def take(self, count):
        """Yield arrays of `count` tokens together, or of all that are left."""
        while count > 0 and self.more():
            array = self.tokens[self.used : self.used + count]
            self.used += len(array)
            count -= len(array)
            yield array


def look_ahead(encoded, count):
    """(the same batches, how many of the first `count` tokens there are)."""
    head, found = [], 0
    while found < count and (batch := next(encoded, None)):
        head.append(batch)
        found += len(batch[1])
    return chain(head, encoded), min(found, count)


# ---------------------------------------------------------------------------------------------------------------
# Shards


def token_widths(encoding):
    """How many bytes of text each token stands for: (n_vocab,) int64. 0 for special tokens like the delimiter."""
    widths = np.zeros(encoding.n_vocab, np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        widths[rank] = len(token)
    return widths


def write_shards(stream, out, encoding, sizes, state, bar):
    """Write the shards that `state` does not have yet; after each, bring `state` and meta.json.part up to date.
    `sizes` are the tokens in a shard of each split, "val" and "train", and in "all" shards together; `bar` shows those
    that are written."""
    dtype, widths = token_dtype(encoding.n_vocab), token_widths(encoding)

    def write_shard(file):
        split = "train" if state["shards"] else "val"
        counts, before = state["splits"][split], written(state)
        file.write(bytes(HEADER_BYTES))  # the header needs the number of tokens, so it is written last
        for array in stream.take(min(sizes[split], sizes["all"] - before)):
            file.write(array.astype(dtype).tobytes())
            bar.update(len(array))
            counts["tokens"] += len(array)
            counts["bytes"] += int(widths[array].sum())
            counts["documents"] += int((array == encoding.eot_token).sum())
        file.seek(0)
        file.write(shard_header(dtype, written(state) - before))

    while written(state) < sizes["all"] and stream.more():
        write_atomically(shard_path(out, state["shards"]), write_shard)
        state |= {"shards": state["shards"] + 1, "position": stream.position, "used": stream.used}
        write_json(out / "meta.json.part", state)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """The command line as a namespace. UserError if it is wrong."""
    parser = Parser("prepare_data.py")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--documents", choices=list(SEPARATORS))
    parser.add_argument("--text_key")
    parser.add_argument("--out")
    parser.add_argument("--tokenizer")
    parser.add_argument("--tokens", type=whole_number)
    parser.add_argument("--val_tokens", type=whole_number)
    parser.add_argument("--shard_tokens", type=whole_number, default=10**8)
    parser.add_argument("--subset")
    parser.add_argument("--workers", type=whole_number, default=os.cpu_count())
    args = parser.parse_args(argv)
    if not all(2 <= size < 2**31 for size in (args.val_tokens or 2, args.shard_tokens)):
        raise UserError(f"--val_tokens and --shard_tokens must be at least 2 and below {2**31}")
    if args.tokens and args.val_tokens and args.tokens < args.val_tokens + 2:
        raise UserError("--tokens is for both splits: make it at least 2 more than --val_tokens")
    args.tokenizer = args.tokenizer or ("bytes" if args.source == "stdlib" else "gpt2")
    stem = re.sub(r"\W+", "-", Path(args.source).name.split(".")[0]).strip("-")
    args.out = Path(args.out or f"data/{stem or 'text'}").resolve()
    return args


def check_room(out, tokens, dtype):
    """UserError if the disk has no room for this many more tokens."""
    needed, free = tokens * dtype.itemsize, shutil.disk_usage(out).free
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free"
        raise UserError(f"{out} needs {sizes}: make room, or start with another --out or fewer --tokens")


def fill(args, read, encoding, state, skipped):
    """Write the shards that are missing, with a progress bar."""
    from tqdm import tqdm

    sizes = {"val": args.val_tokens, "train": args.shard_tokens, "all": args.tokens or math.inf}
    with tqdm(total=args.tokens, initial=written(state), unit="tok", unit_scale=True) as bar:
        encoded = prefetched(partial(encode, encoding, skipped), read(state["position"]), args.workers)
        if sizes["val"] is None and not state["shards"]:
            encoded, found = look_ahead(encoded, min(10 * MOST_VAL_TOKENS, sizes["all"]))
            sizes["val"] = found // 10
        # the stream begins in the batch in which the last complete shard ended
        write_shards(Stream(encoded, state["used"]), args.out, encoding, sizes, state, bar)


def prepare(argv):
    """Write the shards and the meta.json that the command line asks for."""
    args = parse(argv)
    out, skipped = args.out, Skipped()
    source, fingerprint, read = open_source(args.source, args.subset, args.documents, args.text_key, skipped)
    encoding = get_tokenizer(args.tokenizer)
    settings = {key: getattr(args, key) for key in ("tokenizer", "tokens", "val_tokens", "shard_tokens")}
    settings["source"] = source
    examine(out, settings, fingerprint)  # once without the lock, so that a folder that is refused gets none
    with lock_folder(out):
        state = examine(out, settings, fingerprint)
        if state is None:
            (out / "meta.json.part").unlink(missing_ok=True)
            print(f"{out} is already complete; delete it to read the source again")
            return
        if state["shards"]:
            print(f"{out} has {state['shards']} shards with {written(state):,} tokens: continuing from there")
        check_room(out, (args.tokens or 0) - written(state), token_dtype(encoding.n_vocab))
        write_json(out / "meta.json.part", state)
        try:
            fill(args, read, encoding, state, skipped)
        except MemoryError:
            raise UserError(f"a text in {args.source} does not fit in memory: split it into several") from None
        skipped.report()
        splits = state["splits"]
        if min(counts["tokens"] for counts in splits.values()) < 2:
            for index in range(state["shards"] + 1):
                shard_path(out, index).unlink(missing_ok=True)
            (out / "meta.json.part").unlink()
            raise UserError(f"{source} is too short: {written(state)} tokens, where both splits need 2 (--val_tokens)")
        metadata = {"tokenizer": args.tokenizer, "vocab_size": encoding.n_vocab, "splits": splits, "source": source}
        write_json(out / "meta.json", metadata | {"settings": settings})
        (out / "meta.json.part").unlink()
        for split, counts in splits.items():
            print(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items() if number))
        if not splits["train"]["documents"]:
            print("note: one document fills both splits; --documents=paragraphs cuts a .txt into many")
        print(f"written to {out}")


main = program(prepare, interrupted="interrupted: the same command continues from the last whole shard")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
