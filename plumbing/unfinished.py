"""A folder of shards that is being written: it has a meta.json once all of them are there, and until then a
meta.json.part that says how far they are."""

import json
import re

from plumbing.command import UserError
from plumbing.data import open_shard, read_meta
from plumbing.files import write_atomically


def shard_path(out, index):
    """The path of the shard with this number; the first one is for validation."""
    return out / f"{out.name}_{'train' if index else 'val'}_{index:06d}.bin"


def beginning(settings, fingerprint):
    """What meta.json.part says before the first shard. Later, `position` and `used` are the Stream's at the end of the
    last complete shard."""
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("val", "train")}
    about = {"settings": settings, "fingerprint": fingerprint}
    return about | {"shards": 0, "splits": splits, "position": None, "used": 0}


def written(state):
    """The number of tokens in all shards."""
    return sum(counts["tokens"] for counts in state["splits"].values())


def examine(out, settings, fingerprint):
    """(what meta.json.part should say, or None if the folder is complete; what to tell the user about it, or "").

    Changes nothing. The shards of an interrupted run are kept if they are intact and come from the same settings and
    the same source (by its fingerprint), else they will be replaced. UserError if the folder holds something else.
    """
    if meta := read_meta(out):
        if meta.get("settings") != settings:
            raise UserError(f"{out} already holds data of other settings: choose another --out, or delete it")
        return None, "is already complete; delete it to read the source again"
    unfinished = out / "meta.json.part"
    if any(not (is_ours(out, path) and unfinished.exists()) for path in out.glob("*.bin")):
        raise UserError(f"{out} already holds shards from elsewhere: choose another --out, or delete them")
    fresh = beginning(settings, fingerprint)
    left = read_unfinished(unfinished, fresh.keys())
    if not left or not left["shards"]:
        return fresh, ""
    if left["settings"] != settings:
        raise UserError(f"{out} holds unfinished data of other settings: choose another --out, or delete it")
    if left["fingerprint"] != fingerprint:
        return fresh, "was made from files that have changed: starting over"
    if not intact(out, left):
        return fresh, "does not hold the shards that it had: starting over"
    return left, f"has {left['shards']} shards with {written(left):,} tokens: continuing from there"


def read_unfinished(path, keys):
    """The dict in a meta.json.part, or None if it cannot be read or has other keys than these."""
    try:
        state = json.loads(path.read_text("utf-8"))
        return state if state.keys() == keys else None
    except (OSError, ValueError, AttributeError):
        return None


def intact(out, state):
    """Whether the shards that `state` counts are there, with all their tokens."""
    try:
        held = [open_shard(shard_path(out, index)).tokens for index in range(state["shards"])]
    except (OSError, UserError):
        return False
    return sum(held) == written(state)


def write_json(path, content):
    """Write a JSON file atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def is_ours(out, path):
    """Whether a file has the name of a shard, complete or not, that this program writes into `out`."""
    return bool(re.fullmatch(re.escape(out.name) + r"_(val|train)_\d{6}\.bin(\.tmp)?", path.name))


def discard(out, keep=0):
    """Remove the shards, complete or not, that this program wrote into `out`, except for the first `keep`."""
    kept = {shard_path(out, index) for index in range(keep)}
    for path in out.iterdir():
        if is_ours(out, path) and path not in kept:
            path.unlink()
