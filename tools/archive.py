"""The runs of a folder without their weights, in one file: runs.jsonl, a run per line. It keeps the evidence of a
comparison beside its table, and tools.compare and tools.plot read it as they read the folders."""

import functools
import json

from plumbing.files import write_atomically
from plumbing.run import read_about, read_log


def read_run(out):
    """(what config.json says, the records of the log) of a run, from its folder or else from the archive beside it;
    (None, []) if it is in neither."""
    if (out / "config.json").exists():
        return read_about(out), read_log(out / "log.jsonl")
    return read_archive(out.parent).get(out.name, (None, []))


@functools.cache
def read_archive(folder):
    """{name of a run: (about, records)}; {} if the folder has no archive."""
    path = folder / "runs.jsonl"
    runs = map(json.loads, path.read_text("utf-8").splitlines() if path.exists() else [])
    return {run["run"]: (run["about"], run["log"]) for run in runs}


def write_archive(folder, names):
    """Write the archive of the runs of these names in a folder; those that are in its archive already stay."""
    runs = {name: read_run(folder / name) for name in sorted(names | read_archive(folder).keys())}
    lines = [json.dumps({"run": name, "about": about, "log": log}) + "\n" for name, (about, log) in runs.items()]
    if lines:
        write_atomically(folder / "runs.jsonl", lambda file: file.write("".join(lines).encode()))
        read_archive.cache_clear()
