"""The paper's comparison, at any size:

    python -m tools.compare configs/demo.py --activation=xielu,relu2,swiglu --seed=1,2,3

Any key of train.py may take a list. The runs are all combinations, and each is a plain train.py run in a folder of its
own. The same command again continues where it stopped, and runs nothing twice. Besides train.py's keys there are

    --tune=lr=1e-3,2e-3    values of one key: each activation runs with each of them on the tuning seeds, and is then
                           compared with the one whose mean validation loss was lowest. If that is the first or last
                           value, the list is extended by the ratio to its neighbour, at most twice on each side
    --tune_seeds=101       a list of seeds, none of which may be in --seed
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
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from activations import facts_of, short_name
from model import Llama
from plumbing.command import Parser, UserError, format_seconds, refuse_windows, run_command, whole_number
from plumbing.config import ROOT
from plumbing.data import open_data, read_meta
from plumbing.files import lock_folder
from plumbing.machine import pick_device, pick_dtype
from plumbing.run import check_facts, median_speed
from tools import intervals, plot
from tools.archive import read_archive, read_run, write_archive
from tools.intervals import MOST_SEEDS, half_widths, mean, pooled, seeds_for, smallest_difference, student_interval
from train import BAD_STEPS, Config

# A larger spread of parameters, (most − fewest) / fewest, would make it a comparison of sizes
MATCHED = 0.005
# So often a tuned list is extended on each side
EXTENSIONS = 2
# Nats per token: results.md says how many seeds it takes to find such a difference
TARGET = 0.01

# ---------------------------------------------------------------------------------------------------------------
# The grid


@dataclass(frozen=True)
class Run:
    """One run of the grid. case: {key: value} of what makes its row of the table, all that varies but the seed and a
    tuned key. tuned: {key: value} of that key, or {}. arguments: what train.py is called with."""

    case: dict
    tuned: dict
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

    @property
    def flops(self):
        return self.flops_per_token * self.tokens


def read_grid(argv, out, world, key=None):
    """The Runs that train.py's arguments, with lists for values, describe; UserError if one of them could not be run on
    `world` processes. The seed varies slowest, so that a comparison that is stopped early has whole rounds of
    activations. `key` is the one that is tuned: its value names the folder of a run, but makes no row."""
    lists = {}
    for argument in sorted(argv, key=lambda argument: not argument.startswith("--seed=")):
        name, equals, values = argument.partition("=")
        lists[name] = [f"{name}={value}" for value in values.split(",")] if equals else [name]
    rowless = ("--activation", "--seed", f"--{key}")
    varied = [name[2:] for name, values in lists.items() if len(values) > 1 and name not in rowless]
    runs = {}
    for arguments in itertools.product(*lists.values()):
        from_file, options = Config.read_command(arguments)
        keys = from_file | options
        case = {"activation": short_name(keys["activation"])} | {name: keys[name] for name in varied}
        tuned = {key: keys[key]} if key else {}
        folder = file_name(f"{plot.label_of(case | tuned)} seed={keys['seed']}")
        if folder in runs:
            raise UserError(f"{folder} is given twice: give each value of a list once")
        config = Config(**(keys | {"out": f"{out}/{folder}", "resume": True}))
        config.check_batch(world)
        with torch.device("meta"):
            model = Llama(config)
        arguments = [*arguments, f"--out={config.out}", "--resume"]
        runs[folder] = Run(case, tuned, config, arguments, model.num_parameters(), model.flops_per_token())
    return list(runs.values())


def share_dtype(runs, argv):
    """The arguments with one dtype instead of auto: what it took for one of the runs that has begun, or takes now."""
    auto = [run for run in runs if run.config.dtype == "auto"]
    if not auto:
        return argv
    if len(auto) < len(runs):
        raise UserError("dtype=auto takes one of the other dtypes: leave it out of the list")
    taken = [about["config"]["dtype"] for run in auto if (about := read(run)[0])]
    dtype = taken[0] if taken else str(pick_dtype("auto", pick_device(auto[0].config.device), print))[6:]
    return [*argv, f"--dtype={dtype}"]


def read_tune(text, argv):
    """(key, its values, sorted) of --tune; UserError if it cannot be tuned."""
    key, _, values = text.partition("=")
    if type(Config.defaults().get(key)) not in (int, float) or key == "seed":
        raise UserError(f"--tune={text}: give the values of a key that is a number, as in --tune=lr=1e-3,2e-3,4e-3")
    if any(argument.startswith(f"--{key}=") for argument in argv):
        raise UserError(f"{key} is tuned: leave out --{key}")
    values = sorted(Config.typed({key: value}, "in --tune")[key] for value in values.split(","))
    if len(values) < 2 or len(set(values)) < len(values) or values[0] <= 0:
        raise UserError(f"--tune={text}: give two or more values above 0, each of them once")
    return key, values


def file_name(text):
    """A text as the name of a file or folder."""
    return text.replace(" ", "-").replace("/", "_")


def spread(numbers):
    """(largest − smallest) / smallest."""
    return max(numbers) / min(numbers) - 1


def print_grid(runs):
    """Print the runs and their sizes."""
    width = max(len(run.out.name) for run in runs)
    for run in runs:
        sizes = f"{run.parameters:,} parameters  {run.flops_per_token:,} FLOPs per token  {run.tokens:,} tokens"
        print(f"{run.out.name.ljust(width)}  {sizes}")


def check_matched(runs, unmatched):
    """Print how far the sizes of the runs are apart; UserError if that is too far, unless `unmatched`."""
    parameters = spread([run.parameters for run in runs])
    flops = spread([run.flops_per_token for run in runs])
    print(f"spread: {parameters:.3%} of parameters, {flops:.3%} of FLOPs per token")
    if parameters > MATCHED and not unmatched:
        limit = f"differ by {parameters:.2%}, more than {MATCHED:.1%}"
        raise UserError(f"the parameters of these runs {limit}: add --unmatched to allow it")


# ---------------------------------------------------------------------------------------------------------------
# Running it


def read(run):
    """(what its config.json says, the records of its log) of a run; (None, []) if it has not begun."""
    begun = (run.out / "config.json").exists() or run.out.name in read_archive(run.out.parent)
    return read_run(run.out) if begun else (None, [])


def check_folder(run):
    """UserError if the run's folder holds a run with another config, or of an activation that has changed since."""
    if not (about := read(run)[0]):
        return
    try:
        for name, value in vars(run.config).items():
            saved = about["config"].get(name, value)
            if name not in ("out", "resume") and saved != value:
                raise UserError(f"it has {name}={saved!r}, not {value!r}")
        check_facts(about.get("facts", {}), facts_of(run.config.activation), run.out)
    except UserError as error:
        raise UserError(f"{run.out} cannot continue: {error}: choose another --out, or delete it") from None


def outcome(run):
    """The last validation of a finished run, {"loss", "bits_per_byte", …}, with its "tokens_per_s"; {"loss": inf} if it
    has diverged, and None if it is not finished."""
    records = [record for record in read(run)[1] if record["step"] <= run.config.max_steps]
    final = [record for record in records if record["kind"] == "val" and record["step"] == run.config.max_steps]
    bad = [record["step"] for record in records if record["kind"] == "bad"][-BAD_STEPS:]
    gave_up = len(bad) == BAD_STEPS and bad[-1] - bad[0] == BAD_STEPS - 1 and bad[-1] == records[-1]["step"]
    if gave_up or (final and not math.isfinite(float(final[0]["loss"]))):
        return {"loss": math.inf}
    if not final:
        return None
    memory = [record.get("memory") for record in records if record["kind"] == "train"][-1:]
    return final[0] | {"tokens_per_s": median_speed(records), "memory": memory[0] if memory else None}


def finished(runs):
    """{row: [(run, outcome)]} of the runs that ended with a finite loss."""
    rows = {}
    for run in runs:
        if (result := outcome(run)) and math.isfinite(result["loss"]):
            rows.setdefault(plot.label_of(run.case), []).append((run, result))
    return rows


def execute(run, world, lock, title):
    """Start or resume a run in a process of its own. Returns (exit status, its first error or else its last line). Its
    output goes to output.txt in its folder, and its progress to the screen, after `title`."""
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
                if progress := re.match(r"(step \d+/\d+) .*  (\w+ elapsed, \w+ left)", line):
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


def run_all(runs, world, lock, start, later=()):
    """Run what is not finished, one after another; returns {name of a run that failed or diverged: which}. `start` is
    when the comparison began, and `later` are the runs that come after these."""
    failed = {}
    for run in runs:
        check_folder(run)
    for number, run in enumerate(runs, 1):
        title, times = f"[{number}/{len(runs)}] {run.out.name}", ", finished before"
        if not outcome(run):
            show(f"{title}: starting", passing=True)
            began = time.monotonic()
            status, last = execute(run, world, lock, title)
            took, elapsed = time.monotonic() - began, time.monotonic() - start
            flops = sum(other.flops for other in [*runs[number:], *later] if not outcome(other))
            left = took * flops / run.flops  # as long per FLOP as this one, with its compilation and validations
            times = " in {}; {} elapsed, {} left in all".format(*map(format_seconds, (took, elapsed, left)))
        result = outcome(run)
        if not result:
            failed[run.out.name] = f"failed with status {status}"
            times += f": {last} (its whole output is in {run.out}/output.txt)"
        elif math.isinf(result["loss"]):
            failed[run.out.name] = "diverged"
        show(f"{title}: {failed.get(run.out.name) or 'val loss {:.4f}'.format(result['loss'])}{times}")
    return failed


# ---------------------------------------------------------------------------------------------------------------
# Tuning


def best_value(losses):
    """The value with the lowest mean loss, of {value: losses over the tuning seeds}."""
    return min(sorted(losses), key=lambda value: mean(losses[value]))


def is_edge(losses):
    """Whether the best value is the lowest or the highest."""
    return best_value(losses) in (min(losses), max(losses))


def beyond(key, losses, given):
    """The value of `key` to try after those of {value: losses}, of which the sorted list `given` was asked for. If the
    best is the lowest or the highest, it is the next one by the ratio to the neighbour. None if the best is inside, or
    is a whole number, if that side has been extended EXTENSIONS times, or if the key's limits forbid the next value."""
    best, values = best_value(losses), sorted(losses)
    low = best == values[0]
    added = sum(value < given[0] if low else value > given[-1] for value in values)
    if not is_edge(losses) or isinstance(best, int) or added == EXTENSIONS:
        return None
    value = float(f"{best * best / values[1 if low else -2]:.12g}")  # 0.016, not 0.016000000000000004
    with contextlib.suppress(UserError):
        return getattr(Config(**{key: value}), key)


def runs_with(chosen, key, grid):
    """The Runs of a grid, read with more arguments, in which `key` has the value of their row, {row: value or None}."""
    values = ",".join(str(value) for value in sorted(set(chosen.values()) - {None}))
    runs = grid(f"--{key}={values}") if values else []
    return [run for run in runs if run.tuned[key] == chosen[plot.label_of(run.case)]]


def tune(key, given, runs, grid, train):
    """Train the tuning runs, with the values `given`, and those of the grid that extend them. train(runs) returns {name
    of a run: what is wrong with it}. Returns ({row: {value: losses over the tuning seeds}}, {name: …} of all). A run
    that diverged has an infinite loss; UserError if one failed."""
    tuning, wrong = {}, {}
    while runs:
        wrong |= train(runs)
        for run in runs:
            if not (result := outcome(run)):
                raise UserError(f"no {key} can be chosen, since {run.out.name} {wrong[run.out.name]}: try again")
            tuning.setdefault(plot.label_of(run.case), {}).setdefault(run.tuned[key], []).append(result["loss"])
        runs = runs_with({name: beyond(key, losses, given) for name, losses in tuning.items()}, key, grid)
    return tuning, wrong


# ---------------------------------------------------------------------------------------------------------------
# Results


def summarize(runs):
    """(rows, resolutions): a row of the table for each case with a finished run, as a dict of plain numbers, and for
    each reference a sentence. The reference of a row is that of the first activation, all other keys alike, or the
    first row, if there is one activation."""
    first = runs[0].case
    several = any(run.case["activation"] != first["activation"] for run in runs)
    change = {"activation": first["activation"]} if several else first
    pairs_by_row, groups = finished(runs), {}
    rows = [summarize_row(*zip(*pairs), plot.label_of(pairs[0][0].case | change)) for pairs in pairs_by_row.values()]
    for row in rows:
        groups.setdefault(row["reference"], []).append(row)
    return rows, [resolution for group in groups.values() if (resolution := compare_rows(group))]


def summarize_row(runs, results, reference):
    """The row of finished runs, before it is compared with its reference."""
    losses = [result["loss"] for result in results]
    return {
        "name": plot.label_of(runs[0].case),
        **runs[0].case,
        **runs[0].tuned,
        "parameters": runs[0].parameters,
        "flops_per_token": runs[0].flops_per_token,
        "seeds": [run.config.seed for run in runs],
        "losses": losses,
        "loss": mean(losses),
        "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
        "perplexity": math.exp(min(mean(losses), 700)),  # e^709 is the largest float
        "bits_per_byte": mean([result["bits_per_byte"] for result in results]),
        "reference": reference,
        **dict.fromkeys(["difference", "interval", "paired_difference", "paired_interval"]),
        **{name: mean([result[name] for result in results]) for name in ("memory", "tokens_per_s")},
    }


def compare_rows(rows):
    """Fill in the differences of rows that share a reference to it, if it is one of them: of the means, with Dunnett's
    intervals from the standard deviation pooled over these rows, and paired by seed. Returns in words how small a
    difference they can show; None if there is no difference, or no row has two seeds."""
    rows = sorted(rows, key=lambda row: row["name"] != row["reference"])
    first, *others = rows
    if first["name"] != first["reference"] or not others:
        return None
    sizes, (std, df) = tuple(len(row["losses"]) for row in rows), pooled([row["losses"] for row in rows])
    losses = dict(zip(first["seeds"], first["losses"]))
    for row, half in zip(others, half_widths(sizes, std) if df else itertools.repeat(None)):
        paired = [loss - losses[seed] for seed, loss in zip(row["seeds"], row["losses"]) if seed in losses]
        row["difference"] = difference = row["loss"] - first["loss"]
        row["interval"] = [difference - half, difference + half] if df else None
        row["paired_difference"], row["paired_interval"] = mean(paired), student_interval(paired)
    if not df:
        return None
    return (
        f"{len(rows)} rows, compared with {first['name']}: pooled standard deviation {std:.4f} nats, {df} degrees of "
        f"freedom. These seeds find a difference of {smallest_difference(sizes, std):.4f} nats four times in five. For "
        f"{TARGET} nats, that takes {seeds_for(TARGET, len(rows), std) or f'over {MOST_SEEDS}'} seeds per row."
    )


# ---------------------------------------------------------------------------------------------------------------
# What is written


def verdict(row):
    """What a row's difference to its reference says, in words."""
    text = f"{row['name']} − {row['reference']}: {row['difference']:+.4f} nats per token"
    if row["interval"] is None:
        return f"{text} for one seed, so without an interval."
    if row["paired_interval"] == [0, 0]:
        return f"{text}: the losses are equal for every seed."
    low, high = row["interval"]
    said = f"does not contain zero: its loss is {'lower' if high < 0 else 'higher'}"
    said = "contains zero: the two are not told apart" if low <= 0 <= high else said
    return f"{text}, whose interval [{low:+.4f}, {high:+.4f}] {said}."


def cell(form, *values):
    """The values in this form; nothing if there are none."""
    return "" if None in values else form.format(*values)


def table(rows, key):
    """The rows as a table in Markdown, aligned for a terminal too. `key` is what was tuned, or None."""
    lines = []
    for row in rows:
        either = [cell(" [{:+.4f}, {:+.4f}]", *(row[name] or [None])) for name in ("interval", "paired_interval")]
        line = {
            "activation": row["name"],
            **({key: str(row[key])} if key else {}),
            "parameters": f"{row['parameters']:,}",
            "FLOPs/token": f"{row['flops_per_token']:,}",
            "seeds": f"{len(row['seeds'])}",
            "val loss": f"{row['loss']:.4f}" + cell(" ± {:.4f}", row["loss_std"]),
            "perplexity": f"{row['perplexity']:.3f}",
            "bits/byte": cell("{:.4f}", row["bits_per_byte"]),
            "difference [95 % interval]": cell("{:+.4f}", row["difference"]) + either[0],
            "paired [95 % interval]": cell("{:+.4f}", row["paired_difference"]) + either[1],
            "tokens_per_s": cell("{:,.0f}", row["tokens_per_s"]),
            **({"GB": cell("{:.1f}", row["memory"] and row["memory"] / 1e9)} if row["memory"] else {}),
        }
        lines.append(list(line.values()))
    lines.insert(0, list(line))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in aligned)


def describe_tuning(name, losses, key):
    """What was tried for a row, and what was chosen, in words."""
    tried = ", ".join(f"{mean(losses[value]):.4f} at {value}" for value in sorted(losses))
    edge = ", the edge of what was tried: a better value may lie beyond it" if is_edge(losses) else ""
    return f"{name} was tuned to {key}={best_value(losses)}{edge}. Mean losses on the tuning seeds: {tried}."


def describe_data(folder):
    """The folder, its tokenizer and its numbers of tokens, in words."""
    meta = read_meta(folder)
    counts = [f"{meta['splits'][split]['tokens']:,} tokens in {split}" for split in ("train", "val")] if meta else []
    return "; ".join([folder, f"tokenizer {meta['tokenizer']}" if meta else "no meta.json", *counts])


def describe_origin(runs, argv):
    """[where the results come from], in words. Where runs differ in it, all is said."""
    import scipy

    abouts = [read(run)[0] for run in runs if outcome(run)]
    origins = [about.get("origin", {}) for about in abouts]
    versions = [f"{name} {origin.get(name)}" for origin in origins for name in ("python", "torch", "numpy")]
    lists = {
        "Data": [describe_data(run.config.data) for run in runs],
        "Training": [f"{run.tokens:,} tokens per run" for run in runs],
        "Commit": [origin.get("commit") for origin in origins],
        "Versions": [*versions, f"scipy {scipy.__version__}"],
        "Device": [f"{about.get('origin', {}).get('device')} in {about['config']['dtype']}" for about in abouts],
    }
    texts = [f"{name}: {', '.join(dict.fromkeys(map(str, values)))}" for name, values in lists.items()]
    return [f"Command: `{shlex.join(['python', '-m', 'tools.compare', *argv])}`", *texts]


def report(results, figures=(), origin=()):
    """The text of results.md: the table, what its differences say, the figures of these names, and the origin."""
    key, rows = results["tuned"], results["rows"]
    parts = [
        [verdict(row) for row in rows if row["difference"] is not None] + results["resolutions"],
        [f"{name} {wrong}." for name, wrong in results["failed"].items()],
        [describe_tuning(name, losses, key) for name, losses in results["tuning"].items()],
        origin,
    ]
    lists = ["".join(f"- {line}\n" for line in part) for part in parts if part]
    shown = "".join(f"![{name}]({name})\n" for name in figures)
    return "\n".join([table(rows, key), intervals.__doc__, *lists, shown])


def write_results(results, text, out):
    """results.md, .json and .csv: the same for the same losses, wherever they were computed, but for the speed."""
    (out / "results.md").write_text(text, "utf-8")
    plain = json.loads(json.dumps(results), parse_constant=str)  # JSON has no number for ∞
    (out / "results.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(results["rows"][0]))
        writer.writeheader()
        for row in results["rows"]:
            writer.writerow({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()})


def draw_figures(runs, tuning, key, out):
    """Draw loss.png of the runs that finished, scalars-NAME.png of each row whose activation has trained scalars, and
    tune.png of what was tuned; returns the names of those that could be drawn."""
    folders = {name: [run.out for run, _ in pairs] for name, pairs in finished(runs).items()}
    figures = {"loss.png": partial(plot.draw_loss, [folder for group in folders.values() for folder in group])}
    figures |= {file_name(f"scalars-{name}.png"): partial(plot.draw_scalars, group) for name, group in folders.items()}
    figures |= {"tune.png": partial(plot.draw_tuning, tuning, key)} if tuning else {}
    for name, draw in list(figures.items()):
        try:
            draw(out / name)
        except UserError as error:
            del figures[name]
            if name == "loss.png":  # of the others, some activations have no trained scalars
                print(f"note: there is no figure loss.png: {error}")
    return list(figures)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def compare(argv):
    """Run a comparison; the exit status, 1 if one of its runs failed."""
    parser = Parser("python -m tools.compare")
    parser.add_argument("--out")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--unmatched", action="store_true")
    parser.add_argument("--nproc_per_node", type=whole_number, default=1)
    parser.add_argument("--tune")
    parser.add_argument("--tune_seeds", default="101")
    options, others = parser.parse_known_args(argv)
    refuse_windows("tools.compare")
    name = "".join(Path(argument).stem for argument in others if not argument.startswith("--"))
    out, world = Path(options.out or f"out/compare/{name}"), options.nproc_per_node
    plan = read_grid(others, out, world)
    key, tuned, tuning, failed = None, [], {}, {}
    if options.tune:
        key, values = read_tune(options.tune, others)
        tune_argv = [f"--{key}={','.join(map(str, values))}", f"--seed={options.tune_seeds}"]
        tuned = read_grid([*others, *tune_argv], out, world, key)
        if seeds := {run.config.seed for run in plan} & {run.config.seed for run in tuned}:
            raise UserError(
                f"--seed and --tune_seeds share {min(seeds)}: compare on other seeds than those of the tuning"
            )
        print_grid(tuned)
        print(f"then, each with its best {key}:")
    print_grid(plan)
    check_matched(tuned or plan, options.unmatched)
    if options.dry_run:
        return 0
    for config in {(run.config.data, run.config.device): run.config for run in plan}.values():
        pick_device(config.device)
        open_data(config, print)
    try:
        lock = lock_folder(out)
    except UserError:
        print(f"another comparison writes to {out}: waiting until it ends", flush=True)
        lock = lock_folder(out, wait=True)
    with lock:
        train = partial(run_all, world=world, lock=lock, start=time.monotonic())
        others = share_dtype(tuned or plan, others)
        runs = plan = read_grid(others, out, world)
        if key:

            def grid(*arguments):
                return read_grid([*others, *arguments], out, world, key)

            tuning, failed = tune(
                key, values, grid(*tune_argv), partial(grid, tune_argv[1]), partial(train, later=plan)
            )
            runs = runs_with({name: best_value(losses) for name, losses in tuning.items()}, key, grid)
        failed |= (wrong := train(runs))
        rows, resolutions = summarize(runs)
        if not rows:
            raise UserError(f"none of the runs finished; the first {next(iter(failed.values()))}")
        results = {"rows": rows, "resolutions": resolutions, "failed": failed, "tuned": key, "tuning": tuning}
        text = report(results, draw_figures(runs, tuning, key, out), describe_origin(runs, argv))
        write_results(results, text, out)
        write_archive(out)
        print("\n" + text)
        print(f"results: {out}/results.md, .json, .csv and the figures")
    return 1 if wrong else 0


def main(argv):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    return run_command(compare, argv, __doc__, "interrupted: the same command continues from here")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
