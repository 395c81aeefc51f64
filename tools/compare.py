"""The paper's comparison, at any size:

    python -m tools.compare configs/demo.py --activation=xielu,relu2,swiglu --seed=1,2,3

Any key of train.py may take a list; the runs are all combinations, each a plain train.py run in a folder of its own.
The same command again goes on where it stopped, and runs nothing twice. Besides train.py's keys there are

    --out=FOLDER           of the runs, of results.md, .json and .csv, and of the figures; default out/compare/NAME
    --dry_run              print the runs and their sizes, and stop
    --unmatched            allow runs whose parameters differ by more than 0.5 %
    --nproc_per_node=1     processes of a run, started by torchrun if more than one
"""

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import train
from activations import get_activation, short_name
from data import UserError, lock_folder
from model import Llama
from tools import plot
from tools.command import run_command

# A larger spread of parameters, (most − fewest) / fewest, would make it a comparison of sizes
MATCHED = 0.005

# ---------------------------------------------------------------------------------------------------------------
# The grid


@dataclass(frozen=True)
class Run:
    """One run of the grid. case: {key: value} of what makes its row of the table, all that varies but the seed.
    arguments: what train.py is called with."""

    case: dict
    config: train.Config
    arguments: list
    parameters: int
    flops_per_token: int

    @property
    def out(self):
        return Path(self.config.out)

    @property
    def flops(self):
        return self.flops_per_token * self.config.tokens_per_step * self.config.max_steps


def read_options(argv):
    """({own option: value}, the other arguments)."""
    own = {"out": "", "dry_run": False, "unmatched": False, "nproc_per_node": 1}
    others = []
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in own:
            others.append(argument)
        elif own[name] is False and not equals:
            own[name] = True
        elif name == "out" and value:
            own[name] = value
        elif name == "nproc_per_node" and value.isdecimal() and int(value) > 0:
            own[name] = int(value)
        else:
            raise UserError(f"{argument} is not understood: see python -m tools.compare --help")
    if not own["out"]:
        own["out"] = "out/compare/" + "".join(Path(argument).stem for argument in others if argument[:2] != "--")
    return own, others


def read_grid(argv, out, world):
    """The Runs of a command line; UserError if one of them could not be run on `world` processes. The seed varies
    slowest, so that a comparison that is stopped early has whole rounds of activations."""
    files = [argument for argument in argv if not argument.startswith("--")]
    lists = {"seed": None}
    for argument in argv:
        name, equals, values = argument.removeprefix("--").partition("=")
        if name == "resume":
            raise UserError("leave --resume away: a comparison resumes by itself")
        if argument.startswith("--"):
            lists[name] = values.split(",") if equals else ["True"]
    from_file, _ = train.read_config(files)
    lists["seed"] = lists["seed"] or [str(from_file.seed)]
    varied = [name for name, values in lists.items() if len(values) > 1 and name not in ("activation", "seed")]
    runs = {}
    for values in itertools.product(*lists.values()):
        arguments = [*files, *(f"--{name}={value}" for name, value in zip(lists, values))]
        config = replace(from_file, **train.read_config(arguments)[1])
        with torch.device("meta"):
            model = Llama(train.check(config, world))
        case = {"activation": short_name(config.activation)} | {name: getattr(config, name) for name in varied}
        words = [f"{name}={value}" for name, value in case.items() if name != "activation"]
        folder = "-".join([case["activation"], *words, f"seed={config.seed}"]).replace("/", "_")
        if folder in runs:
            raise UserError(f"{folder} is there twice: give each value of a list once")
        config = replace(config, out=f"{out}/{folder}", resume=True)
        arguments += [f"--out={config.out}", "--resume"]
        runs[folder] = Run(case, config, arguments, model.num_parameters(), model.flops_per_token())
    return list(runs.values())


def print_grid(runs):
    """The runs and their sizes; returns the spread of their parameters, (most − fewest) / fewest."""
    width = max(len(run.out.name) for run in runs)
    for run in runs:
        tokens = run.config.max_steps * run.config.tokens_per_step
        sizes = f"{run.parameters:,} parameters  {run.flops_per_token:,} FLOPs a token  {tokens:,} tokens"
        print(f"{run.out.name.ljust(width)}  {sizes}")
    spread = {}
    for name in ("parameters", "flops_per_token"):
        numbers = [getattr(run, name) for run in runs]
        spread[name] = max(numbers) / min(numbers) - 1
    print(f"spread: {spread['parameters']:.3%} of parameters, {spread['flops_per_token']:.3%} of FLOPs a token")
    return spread["parameters"]


# ---------------------------------------------------------------------------------------------------------------
# Running it


def check_folder(run):
    """UserError if the run's folder holds a run with another config, or another formula of its activation."""
    path = run.out / "config.json"
    try:
        about = json.loads(path.read_text("utf-8")) if path.exists() else {"config": {}}
        saved = about["config"] | {name: about[name] for name in about if name == "formula"}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {run.out}") from None
    asked = asdict(run.config) | {"formula": get_activation(run.config.activation).formula}
    for name, value in asked.items():
        if name not in ("out", "resume") and saved.get(name, value) != value:
            raise UserError(
                f"{run.out} holds a run with {name}={saved[name]!r}, not {value!r}: choose another --out, or delete it"
            )


def outcome(run):
    """What a finished run came to: {"loss", "bits_per_byte", "tokens_per_s"}; None if it is not finished, or has
    diverged."""
    records = train.read_log(run.out / "log.jsonl", run.config.max_steps)
    final = [record for record in records if record["kind"] == "val" and record["step"] == run.config.max_steps]
    if not final or not math.isfinite(float(final[0]["loss"])):
        return None
    # The first step compiles. The median, because the machine may have been busy with something else for a while.
    speeds = [record["tokens_per_s"] for record in records if record["kind"] == "train" and record["step"] > 1]
    speed = statistics.median(speeds) if speeds else None
    return {"loss": final[0]["loss"], "bits_per_byte": final[0]["bits_per_byte"], "tokens_per_s": speed}


def flops_left(run):
    """What is still to be computed of a run, as its log tells."""
    records = train.read_log(run.out / "log.jsonl", run.config.max_steps)
    done = max((record["step"] for record in records), default=0)
    return run.flops * (1 - done / run.config.max_steps)


def execute(run, world, lock, on_step):
    """Start or resume a run in a process of its own; (exit status, its error or else its last line). What it prints
    goes to output.txt in its folder; on_step(step) is called for each line about a step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    run.out.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, *launcher, str(train.ROOT / "train.py"), *run.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock.fileno()],  # should this process die alone, the lock is held until the run has ended too
        start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on once
    )
    error = last = ""
    try:
        with open(run.out / "output.txt", "a", encoding="utf-8") as output:
            for line in process.stdout:
                output.write(line)
                output.flush()
                last = line.strip() or last
                error = last if last.startswith("error:") else error
                if step := re.match(r"step (\d+)/", line):
                    on_step(int(step[1]))
        return process.wait(), error or last
    except BaseException:
        process.terminate()
        process.communicate()
        raise


def show(text, passing=False):
    """Print a line. A passing one is overwritten by the next, and left out where the output is no terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="" if passing else "\n", flush=True)
    elif not passing:
        print(text, flush=True)


def run_all(runs, world, lock):
    """Run what is not finished, one after another; returns {name of a failed run: why}."""
    left = {run.out.name: flops_left(run) for run in runs if outcome(run) is None}
    began, done = time.monotonic(), 0.0
    failed = {}

    def remaining():
        if done == 0:
            return "starting"
        return f"{train.format_seconds((time.monotonic() - began) * sum(left.values()) / done)} left of all"

    for number, run in enumerate(runs, 1):
        name, title = run.out.name, f"[{number}/{len(runs)}] {run.out.name}"
        if name not in left:
            show(f"{title}: finished before")
            continue

        reached = None  # where it starts is known from its first line

        def on_step(step, run=run, title=title):
            nonlocal done, reached
            steps = run.config.max_steps
            if reached is not None:
                done += run.flops * (step - reached) / steps
            reached = step
            left[run.out.name] = run.flops * (1 - step / steps)
            show(f"{title}: step {step}/{steps}, {remaining()}", passing=True)

        show(f"{title}: {remaining()}", passing=True)
        run_began = time.monotonic()
        status, last = execute(run, world, lock, on_step)
        took = train.format_seconds(time.monotonic() - run_began)
        result = outcome(run)
        left.pop(name)
        if result:
            show(f"{title}: val loss {result['loss']:.4f} after {took}, {remaining()}")
        else:
            failed[name] = f"it failed with status {status}" if status else "its last validation loss is not finite"
            show(f"{title}: after {took} {failed[name]}: {last} (all it said is in {run.out}/output.txt)")
    return failed


# ---------------------------------------------------------------------------------------------------------------
# What came of it


def student_t(confidence, df):
    """The t with P(|T| ≤ t) = confidence for Student's T with a whole number df of degrees of freedom: 12.71 for 95 %
    and 1, 4.30 for 2. Bisection on the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""

    def probability(t):
        angle = math.atan(t / math.sqrt(df))
        odd = df % 2
        term, total = math.cos(angle) if odd else 1.0, 0.0
        for k in range(2 + odd, df + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, 1.0
    while probability(high) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < confidence else (low, middle)
    return high


def mean_interval(values, confidence=0.95):
    """(mean, [low, high]) of a few numbers, the interval by Student's t with n − 1 degrees of freedom; None for the
    interval of a single number."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = student_t(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, [mean - half, mean + half]


def finished_rows(runs):
    """{name of a row: {seed: (run, its outcome)}} of the finished runs."""
    rows = {plot.label_of(run.case): {} for run in runs}
    for run in runs:
        if result := outcome(run):
            rows[plot.label_of(run.case)][run.config.seed] = run, result
    return rows


def summarize(runs):
    """The rows of the table, one for each case, as dicts of plain numbers. A difference is to the first activation,
    all other keys alike (or to the first row, if there is one activation), and paired by seed: two runs of a seed saw
    the same batches in the same order."""
    first = runs[0].case
    several = any(run.case["activation"] != first["activation"] for run in runs)
    finished = finished_rows(runs)
    rows = []
    for name, by_seed in finished.items():
        if not by_seed:
            continue
        run, _ = next(iter(by_seed.values()))
        losses = {seed: result["loss"] for seed, (_, result) in by_seed.items()}
        bits = [result["bits_per_byte"] for _, result in by_seed.values()]
        speeds = [result["tokens_per_s"] for _, result in by_seed.values()]
        mean = statistics.fmean(losses.values())
        row = {
            "name": name,
            **run.case,
            "parameters": run.parameters,
            "flops_per_token": run.flops_per_token,
            "seeds": list(losses),
            "losses": list(losses.values()),
            "loss": mean,
            "loss_std": statistics.stdev(losses.values()) if len(losses) > 1 else None,
            "perplexity": math.exp(min(mean, 700)),  # e^709 is the largest float
            "bits_per_byte": None if None in bits else statistics.fmean(bits),
            "reference": plot.label_of(run.case | {"activation": first["activation"]} if several else first),
            "paired_seeds": [],
            "difference": None,
            "interval": None,
            "tokens_per_s": None if None in speeds else statistics.fmean(speeds),
        }
        reference = finished[row["reference"]]
        paired = {seed: loss - reference[seed][1]["loss"] for seed, loss in losses.items() if seed in reference}
        if paired and name != row["reference"]:
            row["paired_seeds"] = list(paired)
            row["difference"], row["interval"] = mean_interval(list(paired.values()))
        rows.append(row)
    return rows


def verdict(row):
    """What a row's difference to the first tells, in words."""
    text = f"{row['name']} − {row['reference']}: {row['difference']:+.4f} nats a token"
    if row["interval"] is None:
        return f"{text}, of one seed, so without an interval."
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
    """The text of results.md: the table, and what its differences tell."""
    readings = [f"- {verdict(row)}\n" for row in rows if row["difference"] is not None]
    readings += [f"- {name} is not in the table: {reason}.\n" for name, reason in failed.items()]
    return (
        f"{table(rows)}\n"
        "Validation loss in nats a token, mean ± standard deviation over the seeds; perplexity and bits a byte are\n"
        "those of the mean. Differences are paired by seed; their 95 % interval is Student's.\n\n" + "".join(readings)
    )


def write_results(rows, failed, out):
    """results.md, .json and .csv: the same for the same losses, wherever they were computed, but for the speed."""
    (out / "results.md").write_text(report(rows, failed), encoding="utf-8")
    figures = json.dumps({"rows": rows, "failed": failed}, indent=2)
    (out / "results.json").write_text(figures + "\n", encoding="utf-8")
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: " ".join(map(str, v)) if isinstance(v, list) else v for name, v in row.items()})


def compare(argv):
    """Run a comparison; the exit status, 1 if a run of it failed."""
    own, others = read_options(argv)
    out, world = Path(own["out"]), own["nproc_per_node"]
    runs = read_grid(others, out, world)
    spread = print_grid(runs)
    if spread > MATCHED and not own["unmatched"]:
        raise UserError(
            f"the parameters of these runs differ by {spread:.2%}, more than {MATCHED:.1%}, so the comparison "
            f"would be one of sizes: make them alike, or say --unmatched"
        )
    for run in runs:
        check_folder(run)
    if own["dry_run"]:
        return 0
    for config in {(run.config.data, run.config.device): run.config for run in runs}.values():
        train.pick_device(config.device)
        train.open_data(config)
    try:
        lock = lock_folder(out)
    except UserError:
        print(f"another comparison writes to {out}: waiting for its end", flush=True)
        lock = lock_folder(out, wait=True)
        for run in runs:
            check_folder(run)
    with lock:
        failed = run_all(runs, world, lock)
        rows = summarize(runs)
        if not rows:
            raise UserError(f"none of the runs finished; of the first, {next(iter(failed.values()))}")
        write_results(rows, failed, out)
        print("\n" + report(rows, failed))
        print(f"results: {out}/results.md, .json and .csv")
        draw_figures(runs, out)
    return 1 if failed else 0


def draw_figures(runs, out):
    """loss.png of the runs that finished, and scalars-NAME.png of each row whose activation has trained scalars."""
    rows = {name: [run for run, _ in by_seed.values()] for name, by_seed in finished_rows(runs).items() if by_seed}
    figures = [(plot.draw_loss, [run.out for row in rows.values() for run in row], "loss")]
    for name, row in rows.items():
        if list(get_activation(row[0].config.activation).module().parameters()):
            file_name = f"scalars-{name}".replace(" ", "-").replace("/", "_")
            figures.append((plot.draw_scalars, [run.out for run in row], file_name))
    for draw, folders, name in figures:
        try:
            draw(folders, out / f"{name}.png")
            print(f"figure: {out}/{name}.png")
        except UserError as error:
            print(f"note: there is no figure {name}.png: {error}")


def main(argv):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    return run_command(compare, argv, __doc__, "interrupted: the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
