"""A folder of shards that is being written: it has a meta.json once all of them are there, and until then a
meta.json.part that says how far they are."""

import contextlib
import json

from plumbing.command import UserError
from plumbing.data import open_shard, read_meta

REMEDY = "choose another --out, or delete it"


def shard_path(out, index):
    """The path of the shard with this number; the first one is for validation."""
    return out / f"{out.name}_{'train' if index else 'val'}_{index:06d}.bin"


def written(state):
    """The number of tokens in all shards."""
    return sum(counts["tokens"] for counts in state["splits"].values())


def examine(out, settings, fingerprint):
    """What meta.json.part should say, or None if the folder is complete. Changes nothing. UserError if the folder holds
    anything but shards from these settings and from the source with this fingerprint."""
    if meta := read_meta(out):
        if meta.get("settings") != settings:
            raise UserError(f"{out} already holds data of other settings: {REMEDY}")
        return None
    splits = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in ("val", "train")}
    # `position` and `used` are the Stream's at the end of the last complete shard
    fresh = {"settings": settings, "fingerprint": fingerprint}
    fresh |= {"shards": 0, "splits": splits, "position": None, "used": 0}
    unfinished = out / "meta.json.part"
    if not unfinished.exists():
        if any(out.glob("*.bin")):
            raise UserError(f"{out} already holds shards from elsewhere: {REMEDY}")
        return fresh
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # a damaged file
        state = json.loads(unfinished.read_text("utf-8"))
        if not state["shards"]:
            return fresh
        actual_tokens = [open_shard(shard_path(out, index)).tokens for index in range(state["shards"])]
        whole = state.keys() == fresh.keys() and type(state["used"]) is int and sum(actual_tokens) == written(state)
        if whole and all(state[key] == fresh[key] for key in ("settings", "fingerprint")):
            return state
    raise UserError(f"{out} holds unfinished data whose settings, source or shards have changed: {REMEDY}")
