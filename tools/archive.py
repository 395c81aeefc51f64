"""The runs of a folder without their weights, in one file: runs.jsonl. Its first line is what they share; each other
line is a run, with what is its own and its log by columns. So the evidence of a comparison is kept beside its table,
and tools.compare and tools.plot read it as they read the folders."""

import functools
import json

from plumbing.files import write_atomically
from plumbing.run import read_about, read_log


def read_run(out):
    """(what config.json says, the records of the log) of a run, from its folder or else from the archive beside it;
    UserError if it is in neither."""
    if (out / "config.json").exists() or out.name not in (archive := read_archive(out.parent)):
        return read_about(out), read_log(out / "log.jsonl")
    return archive[out.name]


@functools.cache
def read_archive(folder):
    """{name of a run: (about, records)}; {} if the folder has no archive."""
    try:
        lines = (folder / "runs.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return {}
    shared, *runs = map(json.loads, lines)
    archive = {}
    for run in runs:
        about = {part: values | run["about"].get(part, {}) for part, values in shared.items()}
        records = [
            {"kind": kind} | dict(zip(columns, row))
            for kind, columns in run["log"].items()
            for row in zip(*columns.values())
        ]
        archive[run["run"]] = about, sorted(records, key=lambda record: (record["step"], record["kind"] == "val"))
    return archive


def write_archive(folder, names):
    """Write the archive of the runs of these names in a folder; those that are in its archive already stay."""
    runs = {name: read_run(folder / name) for name in sorted(names | read_archive(folder).keys())}
    if not runs:
        return
    abouts = [about for about, _ in runs.values()]
    shared = {
        part: {name: value for name, value in values.items() if all(a[part].get(name) == value for a in abouts)}
        for part, values in abouts[0].items()
    }
    lines = [shared]
    for name, (about, records) in runs.items():
        log = {}
        for kind in dict.fromkeys(record["kind"] for record in records):
            own = [record for record in records if record["kind"] == kind]
            names = dict.fromkeys(name for record in own for name in record if name != "kind")
            log[kind] = {name: [record.get(name) for record in own] for name in names}
        own = {part: {n: v for n, v in about[part].items() if n not in shared[part]} for part in shared}
        lines.append({"run": name, "about": own, "log": log})
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(folder / "runs.jsonl", lambda file: file.write(text.encode()))
    read_archive.cache_clear()
