"""The paper's comparison, at any size:

    python -m tools.compare configs/demo.py --activation=xielu,relu2,swiglu --seed=1,2,3

Any key of train.py may take a list. The runs are all combinations, and each is a plain train.py run in a folder of its
own. The same command again continues where it stopped, and runs nothing twice. Besides train.py's keys there are

    --out=FOLDER           of the runs, of results.md, .json and .csv, and of the figures; default out/compare/NAME
    --dry_run              print the runs and their sizes, and stop
    --unmatched            allow runs whose parameters differ by more than 0.5 %
    --nproc_per_node=1     processes per run, started by torchrun if more than one
"""

import contextlib
import csv
import itertools
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from activations import short_name
from command import Parser, UserError, format_seconds, run_command, whole_number
from config import ROOT, Config, read_command
from data import open_data
from files import lock_folder
from identity import check_activation
from machine import pick_device, pick_dtype
from model import Llama
from run import dtype_taken, read_about, read_log
from tools import plot

# A larger spread of parameters, (most − fewest) / fewest, would make it a comparison of sizes
MATCHED = 0.005

# ---------------------------------------------------------------------------------------------------------------
# The grid


@dataclass(frozen=True)
class Run:
    """One run of the grid. case: {key: value} of what makes its row of the table, all that varies but the seed.
    arguments: what train.py is called with."""

    case: dict
    config: Config
    arguments: list
    parameters: int
    flops_per_token: int

    @property
    def out(self):
        return Path(self.config.out)

    @property
    def tokens(self):
        return self.config.max_steps * self.config.tokens_per_step


def read_grid(argv, out, world):
    """The Runs that train.py's arguments, with lists for values, describe; UserError if one of them could not be run on
    `world` processes. The seed varies slowest, so that a comparison that is stopped early has whole rounds of
    activations."""
    lists = {}
    for argument in sorted(argv, key=lambda argument: not argument.startswith("--seed=")):
        name, equals, values = argument.partition("=")
        lists[name] = [f"{name}={value}" for value in values.split(",")] if equals else [name]
    varied = [name[2:] for name, values in lists.items() if len(values) > 1 and name not in ("--activation", "--seed")]
    runs = {}
    for arguments in itertools.product(*lists.values()):
        from_file, options = read_command(arguments)
        keys = from_file | options
        case = {"activation": short_name(keys["activation"])} | {name: keys[name] for name in varied}
        folder = file_name(f"{plot.label_of(case)} seed={keys['seed']}")
        if folder in runs:
            raise UserError(f"{folder} is given twice: give each value of a list once")
        config = Config(**(keys | {"out": f"{out}/{folder}", "resume": True}))
        config.check_batch(world)
        with torch.device("meta"):
            model = Llama(config)
        arguments = [*arguments, f"--out={config.out}", "--resume"]
        runs[folder] = Run(case, config, arguments, model.num_parameters(), model.flops_per_token())
    return list(runs.values())


def share_dtype(runs):
    """The runs with one dtype where they ask for auto: what it took for one of them that has begun, or takes now."""
    auto = [run for run in runs if run.config.dtype == "auto"]
    if not auto:
        return runs
    taken = [dtype for run in auto if (dtype := dtype_taken(run.out)) != "auto"]
    dtype = taken[0] if taken else str(pick_dtype("auto", pick_device(auto[0].config.device), print))[6:]
    return [
        replace(run, config=replace(run.config, dtype=dtype), arguments=[*run.arguments, f"--dtype={dtype}"])
        if run.config.dtype == "auto"
        else run
        for run in runs
    ]


def file_name(text):
    """A text as the name of a file or folder."""
    return text.replace(" ", "-").replace("/", "_")


def spread(numbers):
    """(largest − smallest) / smallest."""
    return max(numbers) / min(numbers) - 1


def print_grid(runs):
    """Print the runs and their sizes; returns the spread of their parameters."""
    width = max(len(run.out.name) for run in runs)
    for run in runs:
        sizes = f"{run.parameters:,} parameters  {run.flops_per_token:,} FLOPs per token  {run.tokens:,} tokens"
        print(f"{run.out.name.ljust(width)}  {sizes}")
    parameters = spread([run.parameters for run in runs])
    flops = spread([run.flops_per_token for run in runs])
    print(f"spread: {parameters:.3%} of parameters, {flops:.3%} of FLOPs per token")
    return parameters


# ---------------------------------------------------------------------------------------------------------------
# Running it


def check_folder(run):
    """UserError if the run's folder holds a run with another config, or of an activation that has changed since."""
    if not (run.out / "config.json").exists():
        return
    about = read_about(run.out)
    try:
        for name, value in vars(run.config).items():
            saved = about["config"].get(name, value)
            if name not in ("out", "resume") and saved != value:
                raise UserError(f"it has {name}={saved!r}, not {value!r}")
        check_activation(about, run.config)
    except UserError as error:
        raise UserError(f"{run.out} cannot continue: {error}: choose another --out, or delete it") from None


def outcome(run):
    """The last validation of a finished run, {"loss", "bits_per_byte", …}, with its "tokens_per_s"; None if it is not
    finished, or has diverged."""
    records = read_log(run.out / "log.jsonl", run.config.max_steps)
    final = [record for record in records if record["kind"] == "val" and record["step"] == run.config.max_steps]
    if not final or not math.isfinite(float(final[0]["loss"])):
        return None
    # The first step compiles. The median, because the machine may have been busy with something else for a while.
    speeds = [record["tokens_per_s"] for record in records if record["kind"] == "train" and record["step"] > 1]
    return final[0] | {"tokens_per_s": statistics.median(speeds) if speeds else None}


def execute(run, world, lock, title):
    """Start or resume a run in a process of its own. Returns (exit status, its first error or else its last line). Its
    output goes to output.txt in its folder, and how far it is to the screen, after `title`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    run.out.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *run.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock.fileno()],  # if this process dies alone, the lock is held until the run has ended too
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
    )
    last = ""
    try:
        with open(run.out / "output.txt", "a", buffering=1, encoding="utf-8") as output:  # line by line
            for line in process.stdout:
                output.write(line)
                if line.strip() and not last.startswith("error:"):
                    last = line.strip()
                if progress := re.match(r"(step \d+/\d+) .*  (eta \w+)", line):
                    show(f"{title}: {progress[1]}, {progress[2]}", passing=True)
        return process.wait(), last
    finally:  # after Ctrl-C, the run saves a checkpoint first
        process.terminate()
        process.communicate()


def show(text, passing=False):
    """Print a line. A passing one is overwritten by the next, and left out where the output is not a terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="" if passing else "\n", flush=True)
    elif not passing:
        print(text, flush=True)


def run_all(runs, world, lock):
    """Run what is not finished, one after another; returns {name of a failed run: why}."""
    failed = {}
    for number, run in enumerate(runs, 1):
        title = f"[{number}/{len(runs)}] {run.out.name}"
        if outcome(run):
            show(f"{title}: finished before")
            continue
        show(f"{title}: starting", passing=True)
        began = time.monotonic()
        status, last = execute(run, world, lock, title)
        took = format_seconds(time.monotonic() - began)
        if result := outcome(run):
            flops = sum(other.flops_per_token * other.tokens for other in runs[number:] if not outcome(other))
            speed = run.flops_per_token * (result["tokens_per_s"] or math.inf)  # not measured in a run of one step
            left = format_seconds(flops / speed)
            show(f"{title}: val loss {result['loss']:.4f} after {took}, {left} left in all")
        else:
            reason = f"it failed with status {status}" if status else "its last validation loss is not finite"
            failed[run.out.name] = reason
            show(f"{title}: after {took} {reason}: {last} (its whole output is in {run.out}/output.txt)")
    return failed


# ---------------------------------------------------------------------------------------------------------------
# Results


def mean(values):
    """The mean of a list; None if it is empty, or lacks a value (None)."""
    return statistics.fmean(values) if values and None not in values else None


def interval_of(values):
    """[low, high]: the 95 % confidence interval of the mean of some numbers by Student's t; None for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return [mean(values) + float(t) * error for t in stats.t.interval(0.95, df=len(values) - 1)]


def summarize(runs):
    """The rows of the table, one for each case with a finished run, as dicts of plain numbers. A difference is to the
    first activation, all other keys alike (or to the first row, if there is one activation), and paired by seed: two
    runs of a seed saw the same batches in the same order."""
    first = runs[0].case
    several = any(run.case["activation"] != first["activation"] for run in runs)
    cases = {plot.label_of(run.case): run for run in runs}
    finished = {name: {} for name in cases}
    for run in runs:
        if result := outcome(run):
            finished[plot.label_of(run.case)][run.config.seed] = result
    rows = []
    for name, run in cases.items():
        results = finished[name]
        if not results:
            continue
        losses = {seed: result["loss"] for seed, result in results.items()}
        loss = mean(list(losses.values()))
        reference = plot.label_of(run.case | {"activation": first["activation"]} if several else first)
        compared = finished[reference] if name != reference else {}
        paired = {seed: losses[seed] - compared[seed]["loss"] for seed in losses if seed in compared}
        row = {
            "name": name,
            **run.case,
            "parameters": run.parameters,
            "flops_per_token": run.flops_per_token,
            "seeds": list(losses),
            "losses": list(losses.values()),
            "loss": loss,
            "loss_std": statistics.stdev(losses.values()) if len(losses) > 1 else None,
            "perplexity": math.exp(min(loss, 700)),  # e^709 is the largest float
            "bits_per_byte": mean([result["bits_per_byte"] for result in results.values()]),
            "reference": reference,
            "paired_seeds": list(paired),
            "difference": mean(list(paired.values())),
            "interval": interval_of(list(paired.values())),
            "tokens_per_s": mean([result["tokens_per_s"] for result in results.values()]),
        }
        rows.append(row)
    return rows


def verdict(row):
    """What a row's difference to its reference says, in words."""
    text = f"{row['name']} − {row['reference']}: {row['difference']:+.4f} nats per token"
    if row["interval"] is None:
        return f"{text} for one seed, so without an interval."
    low, high = row["interval"]
    text += f" over {len(row['paired_seeds'])} seeds, its 95 % interval [{low:+.4f}, {high:+.4f}]"
    if low == high == 0:
        return f"{text}: the losses are equal for every seed."
    if low <= 0 <= high:
        return f"{text} contains zero: the two are not told apart."
    return f"{text} does not contain zero: its loss is {'lower' if high < 0 else 'higher'}."


def table(rows):
    """The rows as a table in Markdown, aligned for a terminal too."""
    lines = []
    for row in rows:
        std = "" if row["loss_std"] is None else f" ± {row['loss_std']:.4f}"
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        interval = "" if row["interval"] is None else " [{:+.4f}, {:+.4f}]".format(*row["interval"])
        line = {
            "activation": row["name"],
            "parameters": f"{row['parameters']:,}",
            "FLOPs/token": f"{row['flops_per_token']:,}",
            "seeds": f"{len(row['seeds'])}",
            "val loss": f"{row['loss']:.4f}{std}",
            "perplexity": f"{row['perplexity']:.3f}",
            "bits/byte": "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
            "difference [95 % interval]": difference + interval,
            "tokens/s": "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
        }
        lines.append(list(line.values()))
    lines.insert(0, list(line))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in aligned)


def report(rows, failed):
    """The text of results.md: the table, and what its differences say."""
    readings = [f"- {verdict(row)}\n" for row in rows if row["difference"] is not None]
    readings += [f"- {name} is not in the table: {reason}.\n" for name, reason in failed.items()]
    return (
        f"{table(rows)}\n"
        "Validation loss in nats per token, mean ± standard deviation over the seeds; perplexity and bits per byte\n"
        "are those of the mean. Differences are paired by seed; their 95 % interval is Student's.\n\n"
        + "".join(readings)
    )


def write_results(rows, failed, out):
    """results.md, .json and .csv: the same for the same losses, wherever they were computed, but for the speed."""
    (out / "results.md").write_text(report(rows, failed), "utf-8")
    (out / "results.json").write_text(json.dumps({"rows": rows, "failed": failed}, indent=2) + "\n", "utf-8")
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()})


def draw_figures(rows, out):
    """loss.png of the runs that finished, and scalars-NAME.png of each row whose activation has trained scalars."""
    folders = {row["name"]: [out / file_name(f"{row['name']} seed={seed}") for seed in row["seeds"]] for row in rows}
    try:
        plot.draw_loss(itertools.chain(*folders.values()), out / "loss.png")
    except UserError as error:
        print(f"note: there is no figure loss.png: {error}")
    for name in folders:
        with contextlib.suppress(UserError):  # an activation without trained scalars has no such figure
            plot.draw_scalars(folders[name], out / file_name(f"scalars-{name}.png"))


# ---------------------------------------------------------------------------------------------------------------
# Command line


def compare(argv):
    """Run a comparison; the exit status, 1 if one of its runs failed."""
    parser = Parser("python -m tools.compare")
    parser.add_argument("--out")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--unmatched", action="store_true")
    parser.add_argument("--nproc_per_node", type=whole_number, default=1)
    options, others = parser.parse_known_args(argv)
    name = "".join(Path(argument).stem for argument in others if not argument.startswith("--"))
    out, world = Path(options.out or f"out/compare/{name}"), options.nproc_per_node
    runs = read_grid(others, out, world)
    differ = print_grid(runs)
    if differ > MATCHED and not options.unmatched:
        raise UserError(
            f"the parameters of these runs differ by {differ:.2%}, more than {MATCHED:.1%}: add --unmatched to allow it"
        )
    if options.dry_run:
        return 0
    for config in {(run.config.data, run.config.device): run.config for run in runs}.values():
        pick_device(config.device)
        open_data(config, {}, print)
    try:
        lock = lock_folder(out)
    except UserError:
        print(f"another comparison writes to {out}: waiting until it ends", flush=True)
        lock = lock_folder(out, wait=True)
    with lock:
        runs = share_dtype(runs)
        for run in runs:
            check_folder(run)
        failed = run_all(runs, world, lock)
        rows = summarize(runs)
        if not rows:
            raise UserError(f"none of the runs finished; of the first, {next(iter(failed.values()))}")
        write_results(rows, failed, out)
        print("\n" + report(rows, failed))
        draw_figures(rows, out)
        print(f"results: {out}/results.md, .json, .csv and the figures")
    return 1 if failed else 0


def main(argv):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    return run_command(compare, argv, __doc__, "interrupted: the same command continues from here")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
