"""The paper's comparison, at any size:

    python -m tools.compare configs/demo.py --activation=xielu,relu2,swiglu --seed=1,2,3

The first activation is the one that the others are compared with. Any key of train.py may take a list, and --seed a
range such as 1-12. The runs are all combinations, and each is a plain train.py run in a folder of its own. The same
command continues where it stopped, and runs nothing twice. Besides train.py's keys there are

    --jobs=N               runs at once. On a CPU each gets an N-th of the threads, unless OMP_NUM_THREADS is set; the
                           default is 1. On GPUs each gets the next free ones; the default is as many as fit
    --nproc_per_node=1     processes (GPUs) per run, started by torchrun if more than one
    --tune=lr=1e-3,2e-3    values of one key: each row runs with each of them on the tuning seeds, and then keeps the
                           one whose mean validation loss was lowest. If that is the first or last value, the
                           report says so, and the same command with a longer list continues
    --tune_seeds=101       a list of seeds, none of which may be in --seed
    --tune_up_to=N         do not tune runs of more than N tokens per parameter: they take the values of those with N
    --out=FOLDER           of the runs, results.md and .csv, the figures, and runs.jsonl, from which the same command
                           makes the report again without training; default out/compare/NAME
    --dry_run              print the runs, their sizes and an estimate of their hours, and stop
    --unmatched            allow runs whose parameters differ by more than 0.5 %
"""

import csv
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

if not __package__:
    print("error: start it as  python -m tools.compare", file=sys.stderr)
    sys.exit(2)

from activations import facts_of, short_name
from model import Llama
from plumbing.command import Parser, UserError, format_seconds, program, refuse_windows, whole_number
from plumbing.config import ROOT
from plumbing.data import open_data
from plumbing.files import lock_folder
from plumbing.machine import linear_speed, peak_flops, pick_device, pick_dtype
from plumbing.run import check_facts, median_speed
from tools import intervals, plot
from tools.archive import read_run, write_archive
from tools.intervals import MOST_SEEDS, seeds_for, smallest_difference
from train import BAD_STEPS, Config

# A larger spread of parameters, (most − fewest) / fewest, would make it a comparison of sizes
MATCHED = 0.005
# Nats per token: results.md says how many seeds it takes to find such a difference
TARGET = 0.01

# ---------------------------------------------------------------------------------------------------------------
# The grid


@dataclass(frozen=True, eq=False)
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
    def row(self):
        return plot.label_of(self.case)

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
        values = [value for each in values.split(",") for value in (seeds_of(each) if name == "--seed" else [each])]
        lists[name] = [f"{name}={value}" for value in values] if equals else [name]
    # The length names a run even if there is one, so that a comparison can grow by another length
    names = [name[2:] for name, values in lists.items() if len(values) > 1 or name == "--tokens_per_parameter"]
    varied = [name for name in names if name not in ("activation", "seed", key)]
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


def seeds_of(text):
    """["1", "2", "3"] for "1-3"; any other text as it is, in a list."""
    first, dash, last = text.partition("-")
    return [str(seed) for seed in range(int(first), int(last) + 1)] if first.isdigit() and last.isdigit() else [text]


def share_dtype(runs, argv):
    """The arguments with one dtype instead of auto: what it took for one of the runs that has begun, or takes now."""
    auto = [run for run in runs if run.config.dtype == "auto"]
    if not auto:
        return argv
    if len(auto) < len(runs):
        raise UserError("dtype=auto takes one of the other dtypes: leave it out of the list")
    taken = [about["config"]["dtype"] for run in auto if (about := read_run(run.out)[0])]
    dtype = taken[0] if taken else str(pick_dtype("auto", pick_device(auto[0].config.device), print))[6:]
    return [*argv, f"--dtype={dtype}"]


def read_tune(text, argv):
    """(key, [the argument that gives its values, sorted]) of --tune; UserError if it cannot be tuned."""
    key, _, values = text.partition("=")
    if type(Config.defaults().get(key)) not in (int, float) or key == "seed":
        raise UserError(f"--tune={text}: give the values of a key that is a number, as in --tune=lr=1e-3,2e-3,4e-3")
    if any(argument.startswith(f"--{key}=") for argument in argv):
        raise UserError(f"{key} is tuned: leave out --{key}")
    values = sorted(Config.typed({key: value}, "in --tune")[key] for value in values.split(","))
    if len(values) < 2 or len(set(values)) < len(values) or values[0] <= 0:
        raise UserError(f"--tune={text}: give two or more values above 0, each of them once")
    return key, [f"--{key}={','.join(map(str, values))}"]


def file_name(text):
    """A text as the name of a file or folder."""
    return text.replace(" ", "-").replace("/", "_")


def print_grid(runs):
    """Print the runs and their sizes."""
    width = max(len(run.out.name) for run in runs)
    for run in runs:
        sizes = f"{run.parameters:,} parameters  {run.flops_per_token:,} FLOPs per token  {run.tokens:,} tokens"
        print(f"{run.out.name.ljust(width)}  {sizes}")


def check_matched(runs, unmatched):
    """Print how far the sizes of the runs are apart; UserError if that is too far, unless `unmatched`."""
    sizes = zip(*((run.parameters, run.flops_per_token) for run in runs))
    parameters, flops = (max(size) / min(size) - 1 for size in sizes)
    print(f"spread: {parameters:.3%} of parameters, {flops:.3%} of FLOPs per token")
    if parameters > MATCHED and not unmatched:
        limit = f"differ by {parameters:.2%}, more than {MATCHED:.1%}"
        raise UserError(f"the parameters of these runs {limit}: add --unmatched to allow it")


# ---------------------------------------------------------------------------------------------------------------
# Running it


def check_folder(run):
    """UserError if the run's folder holds a run with another config, or of an activation that has changed since."""
    if not (about := read_run(run.out)[0]):
        return
    for name, value in vars(run.config).items():
        saved = about["config"].get(name, value)
        if name == "activation":  # whose file may have moved
            saved, value = short_name(saved), short_name(value)
        if name not in ("out", "resume") and saved != value:
            reason = f"it has {name}={saved!r}, not {value!r}"
            raise UserError(f"{run.out} cannot continue: {reason}: choose another --out, or delete it")
    check_facts(about.get("facts", {}), facts_of(run.config.activation), run.out)


def outcome(run):
    """The last validation of a finished run, {"loss", "bits_per_byte", …}, with its "tokens_per_s" and "memory";
    {"loss": inf} if it has diverged, and None if it is not finished."""
    records = read_run(run.out)[1]
    final = [record for record in records if record["kind"] == "val" and record["step"] == run.config.max_steps]
    bad = [record["step"] for record in records if record["kind"] == "bad"][-BAD_STEPS:]
    gave_up = len(bad) == BAD_STEPS and bad[-1] - bad[0] == BAD_STEPS - 1  # a run that does so ends there
    if gave_up or (final and not math.isfinite(float(final[0]["loss"]))):
        return {"loss": math.inf}
    if not final:
        return None
    memory = max((record["memory"] for record in records if record.get("memory")), default=None)
    return final[0] | {"tokens_per_s": median_speed(records), "memory": memory}


def places(jobs, world, device):
    """The environment of each run that may run at the same time: its GPUs, or each process's threads on a CPU."""
    if device.type != "cuda":
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, torch.get_num_threads() // ((jobs or 1) * world))
        return [{"OMP_NUM_THREADS": str(threads)}] * (jobs or 1)
    count = torch.cuda.device_count()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    groups = [gpus[first : first + world] for first in range(0, count - world + 1, world)]
    if len(groups) < (jobs or 1):
        raise UserError(f"{count} GPUs do not fit {jobs or 1} runs on {world} each: lower --jobs or --nproc_per_node")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs]]


def launch(run, world, place, lock):
    """Start or resume a run in a process of its own, whose output goes to output.txt in its folder."""
    # 150 seconds to stop: a step and a checkpoint of a large model take more than torchrun's 30
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=150", f"--nproc_per_node={world}"]
    launcher = torchrun if world > 1 else []
    run.out.mkdir(parents=True, exist_ok=True)
    with open(run.out / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "train.py"), *run.arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | place | {"PYTHONUNBUFFERED": "1"},
            pass_fds=[lock.fileno()],  # if this process dies alone, the lock is held until the run has ended too
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        )


def run_all(runs, places, world, lock, start, later=()):
    """Run what is not finished, as many at once as there are places; UserError if their data cannot be used. Returns
    {name: "failed …" or "diverged"} of the runs that did so. `start` is when the comparison began, and `later` are the
    runs that come after these. After Ctrl-C, each run saves a checkpoint first."""
    titles = {run: f"[{number}/{len(runs)}] {run.out.name}" for number, run in enumerate(runs, 1)}
    waiting, free, running, failed = [], list(places), {}, {}
    for run in runs:
        check_folder(run)
        if outcome(run):
            note_outcome(run, titles[run], ", finished before", failed)
        else:
            waiting.append(run)
    for config in {(run.config.data, run.config.device): run.config for run in waiting}.values():
        pick_device(config.device)
        open_data(config, print)
    try:
        while waiting or running:
            while waiting and free:
                run, place = waiting.pop(0), free.pop(0)
                running[run] = launch(run, world, place, lock), place, time.monotonic()
                print(f"{titles[run]}: started; its output goes to {run.out}/output.txt", flush=True)
            time.sleep(0.1)
            for run in [run for run, (process, *_) in running.items() if process.poll() is not None]:
                process, place, began = running.pop(run)
                free.append(place)
                took, elapsed = time.monotonic() - began, time.monotonic() - start
                flops = sum(other.flops for other in [*waiting, *running, *later] if not outcome(other))
                left = took * flops / run.flops / len(places)  # as long per FLOP as this one
                times = " in {}; {} elapsed, {} left in all".format(*map(format_seconds, (took, elapsed, left)))
                note_outcome(run, titles[run], times, failed, process.returncode)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
    return failed


def note_outcome(run, title, times, failed, status=None):
    """Print how a run ended, and note it in {name: …} if it failed or diverged."""
    result = outcome(run)
    if not result:
        failed[run.out.name] = f"failed with status {status}"
        lines = (run.out / "output.txt").read_text("utf-8", "replace").split("\n")
        errors = [line for line in lines if line.startswith("error:")] or [line for line in lines if line.strip()]
        times += f": {errors[-1].strip() if errors else ''} (its whole output is in {run.out}/output.txt)"
    elif math.isinf(result["loss"]):
        failed[run.out.name] = "diverged"
    print(f"{title}: {failed.get(run.out.name) or 'val loss {:.4f}'.format(result['loss'])}{times}", flush=True)


def estimate(runs, jobs, world, device, dtype):
    """How long these runs take, `jobs` at once with `world` processes each, in words, at 40 % of the speed of this
    device's matrix products (40 to 50 % is what the models of configs/ reach). Finished ones take none."""
    flops = [run.flops for run in runs if not outcome(run)]
    speed = peak_flops(device, dtype) if device.type == "cuda" else linear_speed(dtype)
    if not speed:
        return "the speed of this device is not known"
    flops_in_turn = max([sum(flops) / jobs, *flops])  # a run takes one place, however many are free
    return f"about {format_seconds(flops_in_turn / (0.4 * speed * world))} with {jobs} at once"


# ---------------------------------------------------------------------------------------------------------------
# Tuning


def best_value(losses):
    """The value with the lowest mean loss, of {value: losses over the tuning seeds}."""
    return min(sorted(losses), key=lambda value: mean(losses[value]))


def tuned_losses(key, runs, failed):
    """{row: {value of the tuned key: losses over the tuning seeds}}; a run that diverged has an infinite loss.
    UserError if one failed."""
    tuning = {}
    for run in runs:
        if not (result := outcome(run)):
            raise UserError(f"no {key} can be chosen, since {run.out.name} {failed[run.out.name]}: try again")
        tuning.setdefault(run.row, {}).setdefault(run.tuned[key], []).append(result["loss"])
    return tuning


def tuned_row(run, up_to):
    """The name of the row whose tuned value a run takes: its own, or that of the longest run that is tuned."""
    length = run.case.get("tokens_per_parameter", math.inf)
    return plot.label_of(run.case | {"tokens_per_parameter": up_to}) if up_to and length > up_to else run.row


# ---------------------------------------------------------------------------------------------------------------
# Results


def mean(values):
    """The mean of a list; None if it lacks a value (None)."""
    return None if None in values else sum(values) / len(values)


def summarize(runs):
    """(rows, notes): a row of the table for each case with a finished run, as a dict of plain numbers, below its
    reference, and sentences on each reference. The reference of a row is that of the first activation, all other keys
    alike; if there is one activation, it has the first value of each key but the length."""
    first = runs[0].case
    several = any(run.case["activation"] != first["activation"] for run in runs)
    replaced = {"activation"} if several else first.keys() - set(plot.BUDGETS)
    of_reference = {name: first[name] for name in replaced}
    groups = {}
    for run in runs:
        if (result := outcome(run)) and math.isfinite(result["loss"]):
            group = groups.setdefault(plot.label_of(run.case | of_reference), {})
            group.setdefault(run.row, {})[run.config.seed] = run, result
    rows, notes = [], []
    for reference, group in groups.items():
        compared, of_group = compare_rows(reference, group)
        rows += compared
        notes += of_group
    order = [run.row for run in runs]
    return sorted(rows, key=lambda row: (order.index(row["reference"]), order.index(row["name"]))), notes


def compare_rows(reference, group):
    """(the rows of a group, {row: {seed: (run, outcome)}}, that share a reference, [what can be said of all])."""
    group = dict(sorted(group.items(), key=lambda item: item[0] != reference))  # stable: the reference comes first
    everywhere = set.intersection(*(set(row) for row in group.values()))
    compared = everywhere and reference in group and len(group) > 1
    rows = []
    for name, by_seed in group.items():
        seeds = [seed for seed in by_seed if seed in everywhere or not compared]
        runs, results = zip(*(by_seed[seed] for seed in seeds))
        losses = [result["loss"] for result in results]
        row = {
            "name": name,
            **(runs[0].case | runs[0].tuned),
            **{key: getattr(runs[0], key) for key in ("tokens", "parameters", "flops_per_token")},
            "seeds": seeds,
            "losses": losses,
            "loss": mean(losses),
            "perplexity": math.exp(min(mean(losses), 700)),  # e^709 is the largest float
            "bits_per_byte": mean([result["bits_per_byte"] for result in results]),
            "reference": reference,
            **dict.fromkeys(["difference", "interval", "effect"]),
            **{key: mean([result[key] for result in results]) for key in ("memory", "tokens_per_s")},
        }
        rows.append(row)
    if not compared:
        return rows, []
    differences, half, sd = intervals.differences([row["losses"] for row in rows])  # their seeds are in one order
    for row, difference in zip(rows[1:], map(float, differences)):
        row["difference"] = difference
        if half is not None:
            row["interval"], row["effect"] = [difference - half, difference + half], difference / sd if sd else 0.0
    missing = sorted(set().union(*group.values()) - everywhere)
    notes = [f"Left out with {reference}, since a row lacks them: seeds {missing}."] if missing else []
    if half is not None:
        found, enough = smallest_difference(len(rows), len(everywhere), sd), seeds_for(TARGET, len(rows), sd)
        notes.append(
            f"{len(rows)} rows with {reference}: residual standard deviation {sd:.4f} nats. {len(everywhere)} "
            f"seeds find a difference of {found:.4f} nats four times in five; for {TARGET} nats it takes "
            f"{enough or f'over {MOST_SEEDS}'} seeds."
        )
    return rows, notes


# ---------------------------------------------------------------------------------------------------------------
# What is written


def verdict(row):
    """What a row's difference from its reference says, in words."""
    _, space, keys = row["name"].partition(" ")
    reference = row["reference"].removesuffix(space + keys)  # keys that both have are said once
    text = f"{row['name']} against {reference}: {row['difference']:+.4f} nats per token"
    if row["interval"] is None:
        return f"{text}, of one seed, so without an interval."
    low, high = row["interval"]
    better = "is lower" if high < 0 else "is higher" if low > 0 else "is not significantly different"
    return f"{text} [{low:+.4f}, {high:+.4f}], {abs(row['effect']):.1f} standard deviations: its loss {better}."


def cell(form, *values):
    """The values in this form; nothing if there are none."""
    return "" if None in values else form.format(*values)


def table(rows, key):
    """The rows as a table in Markdown, aligned for a terminal too. `key` is what was tuned, or None."""
    lines = []
    for row in rows:
        line = {
            "activation": row["name"],
            **({key: str(row[key])} if key else {}),
            "seeds": f"{len(row['seeds'])}",
            "val loss": f"{row['loss']:.4f}",
            "bits/byte": cell("{:.4f}", row["bits_per_byte"]),
            "difference [95 % interval]": cell("{:+.4f}", row["difference"])
            + cell(" [{:+.4f}, {:+.4f}]", *(row["interval"] or [None])),
            "effect": cell("{:+.1f}", row["effect"]),
            **({"memory": cell("{:.1f} GB", row["memory"] / 1e9)} if row["memory"] else {}),
            "tokens/s": cell("{:,.0f}", row["tokens_per_s"]),
        }
        lines.append(list(line.values()))
    lines.insert(0, list(line))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in aligned)


def describe_tuning(name, losses, key):
    """What was tried for a row, and what was chosen, in words."""
    tried, best = ", ".join(f"{mean(losses[value]):.4f} at {value}" for value in sorted(losses)), best_value(losses)
    edge = ", the edge of the list: a better value may lie beyond it" if best in (min(losses), max(losses)) else ""
    return f"{name} was tuned to {key}={best}{edge}. Mean losses on the tuning seeds: {tried}."


def describe_origin(runs, argv):
    """[where the results come from], in words. Where runs differ in it, all is said."""
    abouts = [read_run(run.out)[0] for run in runs if outcome(run)]
    lists = {
        "Data": [f"{about['config']['data']}, tokenizer {about['facts'].get('tokenizer')}" for about in abouts],
        "Training": [f"{run.tokens:,} tokens per run" for run in runs],
        "Commit": [about["origin"].get("commit") for about in abouts],
        "Versions": [f"{key} {about['origin'].get(key)}" for about in abouts for key in ("python", "torch", "numpy")],
        "Device": [f"{about['origin'].get('device')} in {about['config']['dtype']}" for about in abouts],
    }
    texts = [f"{name}: {', '.join(dict.fromkeys(map(str, values)))}" for name, values in lists.items()]
    return [f"Command: `{shlex.join(['python', '-m', 'tools.compare', *argv])}`", *texts]


def report(rows, notes, failed, key, tuning, figures=(), origin=()):
    """The text of results.md: what the differences say, the table, the figures of these names, and how it was made."""
    verdicts = [verdict(row) for row in rows if row["difference"] is not None]
    made = [*notes, *(f"{name} {what}." for name, what in failed.items())]
    made += [describe_tuning(name, losses, key) for name, losses in tuning.items()]
    lists = ["".join(f"- {line}\n" for line in lines) for lines in (verdicts, [*made, *origin])]
    shown = "".join(f"![{name}]({name})\n" for name in figures)
    return "\n".join([lists[0], table(rows, key), shown, intervals.__doc__, lists[1]])


def write_results(rows, text, out):
    """results.md and .csv: the same for the same losses, wherever they were computed, but for the speed."""
    (out / "results.md").write_text(text, "utf-8")
    lines = [[" ".join(map(str, item)) if isinstance(item, list) else item for item in row.values()] for row in rows]
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(rows[0]), *lines])


def draw_figures(runs, rows, tuning, key, out):
    """Draw what can be drawn: budget.png; loss.png; scalars-NAME.png of each row of the longest runs whose activation
    has trained scalars; tune.png. Returns the names."""
    most = max(row["tokens"] for row in rows)
    groups = {row["name"]: [] for row in rows if row["tokens"] == most}  # the reference first
    for run in runs:
        if run.row in groups and (result := outcome(run)) and math.isfinite(result["loss"]):
            groups[run.row].append(run.out)
    figures = {"budget.png": partial(plot.draw_budget, rows)}
    figures["loss.png"] = partial(plot.draw_loss, [folder for group in groups.values() for folder in group])
    figures |= {file_name(f"scalars-{name}.png"): partial(plot.draw_scalars, group) for name, group in groups.items()}
    figures |= {"tune.png": partial(plot.draw_tuning, tuning, key)} if tuning else {}
    for name, draw in list(figures.items()):
        try:
            draw(out / name)
        except UserError as error:
            del figures[name]
            if not name.startswith("scalars"):  # some activations have no trained scalars
                print(f"note: there is no figure {name}: {error}")
    return list(figures)


# ---------------------------------------------------------------------------------------------------------------
# Command line


def compare(argv):
    """Run a comparison; the exit status, 1 if one of its runs failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    parser = Parser("python -m tools.compare")
    parser.add_argument("--out")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--unmatched", action="store_true")
    parser.add_argument("--nproc_per_node", type=whole_number, default=1)
    parser.add_argument("--jobs", type=whole_number)
    parser.add_argument("--tune")
    parser.add_argument("--tune_seeds", default="101")
    parser.add_argument("--tune_up_to", type=float)
    options, others = parser.parse_known_args(argv)
    refuse_windows("tools.compare")
    name = "".join(Path(argument).stem for argument in others if not argument.startswith("--"))
    out, world, up_to = Path(options.out or f"out/compare/{name}"), options.nproc_per_node, options.tune_up_to
    key, tried = read_tune(options.tune, others) if options.tune else (None, [])

    def grid(arguments):
        """(the tuning runs, the candidates: the runs that may be compared, with each value of the tuned key)."""
        tuning = read_grid([*arguments, *tried, f"--seed={options.tune_seeds}"], out, world, key) if key else []
        tuning = [run for run in tuning if tuned_row(run, up_to) == run.row]
        return tuning, read_grid([*arguments, *tried], out, world, key)

    def one_of_each(candidates):
        """As many runs as will be compared, before their tuned values are known: finished ones if there are any."""
        alike = {}
        for run in candidates:
            alike.setdefault((run.row, run.config.seed), []).append(run)
        return [min(runs, key=lambda run: outcome(run) is None) for runs in alike.values()]

    tuning, candidates = grid(others)
    if seeds := {run.config.seed for run in candidates} & {run.config.seed for run in tuning}:
        raise UserError(f"--seed and --tune_seeds share {min(seeds)}: compare on other seeds than those of the tuning")
    if unknown := {tuned_row(run, up_to) for run in candidates} - {run.row for run in candidates}:
        raise UserError(f"--tune_up_to={up_to:g} is not one of the lengths: there is no {min(unknown)}")
    plan = one_of_each(candidates)
    device = pick_device(plan[0].config.device)
    at_once = places(options.jobs, world, device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(at_once[0]["OMP_NUM_THREADS"]))  # what is timed here has the threads of one process
    if tuning:
        print_grid(tuning)
        print(f"then, each with its best {key}:")
    print_grid(plan)
    check_matched(tuning + plan, options.unmatched)
    if options.dry_run:
        dtype = pick_dtype(plan[0].config.dtype, device)
        print(f"{len(tuning + plan)} runs, {estimate(tuning + plan, len(at_once), world, device, dtype)}")
        return 0
    with lock_folder(out, wait=True) as lock:
        tuning, candidates = grid(share_dtype(tuning + candidates, others))
        train = partial(run_all, places=at_once, world=world, lock=lock, start=time.monotonic())
        try:
            failed = train(tuning, later=one_of_each(candidates))
            losses = tuned_losses(key, tuning, failed)
            chosen = {name: best_value(tried) for name, tried in losses.items()}
            runs = [run for run in candidates if not key or run.tuned[key] == chosen[tuned_row(run, up_to)]]
            failed |= (wrong := train(runs))
        finally:
            write_archive(out, {run.out.name for run in tuning + candidates if outcome(run)})
        rows, notes = summarize(runs)
        if not rows:
            raise UserError(f"none of the runs finished; the first {next(iter(failed.values()))}")
        figures = draw_figures(runs, rows, losses, key, out)
        text = report(rows, notes, failed, key, losses, figures, describe_origin(runs, argv))
        write_results(rows, text, out)
        print(f"\n{text}\nresults: {out}/results.md, .csv, runs.jsonl and the figures")
    return 1 if wrong else 0


main = program(compare, interrupted="interrupted: the same command continues from here")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
