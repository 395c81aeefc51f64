"""Figures, of runs and of activations:

    python -m tools.plot loss RUN…          validation loss against tokens, and its difference from the first RUN's
    python -m tools.plot scalars RUN…       the trained scalars of an activation (αp, αn), by tokens and layer
    python -m tools.plot xielu              xIELU and its gradient at several αp and αn
    python -m tools.plot activations        every activation and its gradient

RUN is the folder of a run, such as out/compare/demo/xielu-seed=1. Runs that differ only in their seed make one line,
their mean, with thin lines for each (loss) or a band from lowest to highest (scalars). --out=FILE.png says where; the
default is out/plot/NAME.png.
"""

import math
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

if not __package__:
    print("error: start it as  python -m tools.plot", file=sys.stderr)
    sys.exit(2)

import xielu
from activations import ACTIVATIONS, curve, short_name
from plumbing.command import Parser, UserError, program
from tools.archive import read_run
from tools.intervals import differences

# Okabe and Ito's colours, which colour-blind people can tell apart; after the seventh they come again, dashed
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
# Keys that set the length of a run: an activation is compared with another at the same length
BUDGETS = ("tokens_per_parameter", "max_steps")
SYMBOLS = {"alpha_p": "αp", "alpha_n": "αn", "alpha_p3": "αp3", "alpha": "α"}


def new_figure(rows, columns, width, height, **options):
    """(figure, array of axes) of a size in inches, on white, so that it can be read on a dark page too; `options` are
    those of matplotlib's Figure.subplots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"axisbelow": True}, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
    return figure, axes


def save(figure, path):
    """Write a figure as a PNG. The same figure is the same file, since matplotlib's version is left out of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def line_style(number):
    """The colour and dashes of line 0, 1, 2, …"""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if number < len(COLOURS) else "--"}


# ---------------------------------------------------------------------------------------------------------------
# Runs


def label_of(case):
    """What to call the runs of a case, {key: value} with an activation: its name, then the other keys and values."""
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in case.items()}
    others = [f"{name}={value}" for name, value in shown.items() if name != "activation"]
    return " ".join([short_name(case["activation"]), *others])


def read_groups(folders):
    """{label: {seed: {tokens: record of the validation}}} of run folders. Runs that differ only in their seed make a
    group. Its label is the activation, and what else differs between groups."""
    runs = []
    for folder in map(Path, folders):
        about, log = read_run(folder)
        validations = {line["tokens"]: line | {"loss": float(line["loss"])} for line in log if line["kind"] == "val"}
        if not validations:
            raise UserError(f"{folder} is not the folder of a run, or it has no validation in its log yet")
        runs.append((about["config"], validations))
    if not runs:
        raise UserError("give the folders of runs, as in out/compare/demo/*-seed=*")
    names = [name for name in runs[0][0] if name not in ("activation", "seed", "out", "resume")]
    differing = [name for name in names if len({str(config.get(name)) for config, _ in runs}) > 1]
    groups = {}
    for config, validations in runs:
        label = label_of({name: config.get(name) for name in ["activation", *differing]})
        group = groups.setdefault(label, {})
        if config["seed"] in group:
            raise UserError(f"{label} with seed {config['seed']} is given twice")
        group[config["seed"]] = validations
    return groups


def common_tokens(*groups):
    """The validated token counts that all runs of these groups share."""
    return sorted(set.intersection(*(set(run) for group in groups for run in group.values())))


def logged(group, name, tokens, seeds):
    """What runs of a group logged under a name: an array (seeds, token counts), or (seeds, token counts, layers)."""
    return np.array([[group[seed][count][name] for count in tokens] for seed in seeds])


def draw_band(axis, x, values, label, **style):
    """The mean over seeds of values (seeds, x), and a band from the lowest to the highest."""
    axis.plot(x, values.mean(axis=0), label=label, linewidth=1.6, marker="o", markersize=3, **style)
    if len(values) > 1:
        axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.2, lw=0)


def label_tokens(axis):
    """Label an x axis of tokens, whose numbers are written as 500k, 1.5M, 2G."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_loss(folders, path):
    """Validation loss against tokens, a thin line for each seed and a thick one for their mean; beside it, the
    differences from the first group over the seeds that all have, with their intervals as bands."""
    groups = read_groups(folders)
    columns = min(len(groups), 2)
    figure, [axes] = new_figure(1, columns, 2 + 4.5 * columns, 4.5 + 0.1 * len(groups))
    late = []
    for number, (label, group) in enumerate(groups.items()):
        tokens = common_tokens(group)[1:]  # without the untrained model
        if len(tokens) < 2:
            raise UserError(f"{label} has too few validations for a curve yet: wait for more, or lower eval_every")
        style, losses = line_style(number), logged(group, "loss", tokens, group)
        axes[0].plot(tokens, losses.T, linewidth=0.7, alpha=0.5, **style)
        axes[0].plot(tokens, losses.mean(axis=0), label=label, linewidth=2, **style)
        late.extend(losses[:, len(tokens) // 2 - 1 :].flat)  # early losses are far larger
    axes[0].set(ylabel="validation loss (nats per token)", ylim=limits(late))
    columns = max(1, 110 // (6 + max(map(len, groups))))  # as many as fit below the figure
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    if len(groups) > 1:
        draw_differences(axes[1], groups)
    for axis in axes:
        label_tokens(axis)
    save(figure, path)


def limits(values):
    """The limits of an axis that shows those of these values that are finite."""
    values = [value for value in values if math.isfinite(value)]
    margin = 0.15 * (max(values) - min(values)) or 1e-3
    return min(values) - margin, max(values) + margin


def draw_differences(axis, groups):
    """The difference of each group's mean loss from the first group's, against tokens, with the intervals of
    tools.intervals at each of them."""
    first, *others = groups
    seeds = set.intersection(*(set(group) for group in groups.values()))
    tokens = common_tokens(*groups.values())[1:]
    if not seeds or not tokens:
        raise UserError(f"the runs of {', '.join(groups)} share no seed and number of tokens to compare them at")
    losses = np.array([logged(group, "loss", tokens, seeds) for group in groups.values()])  # (groups, seeds, tokens)
    compared = [differences(losses[:, :, index]) for index in range(len(tokens))]
    means = np.array([difference for difference, _, _ in compared]).T  # (others, tokens)
    halves = np.array([half or 0 for _, half, _ in compared])
    axis.axhline(0, **line_style(0))
    for number, (label, mean) in enumerate(zip(others, means), 1):
        axis.plot(tokens, mean, label=label, linewidth=2, **line_style(number))
        axis.fill_between(tokens, mean - halves, mean + halves, color=line_style(number)["color"], alpha=0.15, lw=0)
    late = slice(len(tokens) // 2, None)
    shown = [0, *(means + halves)[:, late].flat, *(means - halves)[:, late].flat]
    axis.set(ylim=limits(shown))
    axis.set_ylabel(textwrap.fill(f"loss − loss of {first}, seeds: {len(seeds)} (nats)", 40))


def draw_budget(rows, path):
    """The difference of each row of a comparison from its reference, a dot with its interval, against tokens per
    parameter. Where a line crosses zero, the order of the two changes."""

    def label(name):  # without the length
        return re.sub(rf" ({'|'.join(BUDGETS)})=\S+", "", name)

    lines = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["difference"] is not None:
            lines.setdefault(label(row["name"]), []).append(row)
    if not lines:
        raise UserError("there is no difference to draw: none of the rows has a reference with the same seeds")
    reference = ", ".join(dict.fromkeys(label(row["reference"]) for row in rows))
    figure, [[axis]] = new_figure(1, 1, 8, 4.8)
    axis.axhline(0, linewidth=2, label=reference, **line_style(0))
    for number, (name, its_rows) in enumerate(lines.items(), 1):
        shift = 1.03 ** (number - (len(lines) + 1) / 2)  # so that bars do not hide each other
        places = [shift * row["tokens"] / row["parameters"] for row in its_rows]
        differences = [row["difference"] for row in its_rows]
        halves = [row["interval"][1] - row["difference"] if row["interval"] else 0 for row in its_rows]
        style = line_style(number) | {"marker": "o", "markersize": 7, "linewidth": 1.6, "elinewidth": 2, "capsize": 4}
        axis.errorbar(places, differences, halves, label=name, **style)
    ticks = sorted({row["tokens"] / row["parameters"] for row in rows})
    axis.set(xscale="log", xlabel="tokens per parameter")
    axis.set_xticks(ticks, [f"{tick:.1f}".removesuffix(".0") for tick in ticks])
    axis.minorticks_off()
    axis.set_ylabel(f"loss − loss of {reference}\n(nats; above 0, {reference} is better)")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def draw_tuning(tuning, key, path):
    """Validation loss against the values of a tuned key: a line for each of {row: {value: losses over the seeds}}, with
    a ring around its lowest mean. Where a run diverged, there is a cross at the upper edge instead."""
    figure, [[axis]] = new_figure(1, 1, 8, 4.5)
    shown = []
    for number, (label, losses) in enumerate(tuning.items()):
        style, values = line_style(number), np.array(sorted(losses))
        lines = np.array([losses[value] for value in values]).T  # (seeds, values)
        diverged = ~np.isfinite(lines.sum(axis=0))
        lines[:, diverged] = math.nan
        draw_band(axis, values, lines, label, **style)
        means = lines.mean(axis=0)
        best = np.where(diverged, math.inf, means).argmin()
        axis.plot(values[best], means[best], "o", markersize=11, fillstyle="none", color=style["color"])
        for value in values[diverged]:
            axis.plot(value, 0.98 - 0.04 * number, "x", color=style["color"], transform=axis.get_xaxis_transform())
        shown.extend(means[~diverged])
    if shown:  # a run that nearly diverged would flatten the rest: its line leaves the figure at the upper edge
        height = max(shown) - min(shown)
        height = min(height, 4 * (np.median(shown) - min(shown))) or height or 1e-3
        axis.set_ylim(min(shown) - 0.1 * height, min(shown) + 1.1 * height)
    values = sorted(set().union(*tuning.values()))
    axis.set(xscale="log", xlabel=f"{key} (ring: chosen, cross: diverged)", ylabel="validation loss (nats per token)")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def draw_scalars(folders, path):
    """The trained scalars of an activation: against tokens, one line per layer, and at the end by layer."""
    groups = read_groups(folders)
    if len(groups) > 1:
        raise UserError(f"give runs that differ only in their seed, not {', '.join(groups)}")
    [(label, group)] = groups.items()
    tokens = common_tokens(group)
    record = next(iter(group.values()))[tokens[0]] if tokens else {}
    names = [name for name, value in record.items() if isinstance(value, list)]
    if not names:
        raise UserError(f"the validations of {label} log no trained scalars")
    figure, axes = new_figure(len(names), 2, 10, 0.6 + 2.9 * len(names), sharex="col", sharey="row")
    for (left, right), name in zip(axes, names):
        values = logged(group, name, tokens, group)
        layers = range(1, values.shape[2] + 1)
        # from light to dark blue with depth, which can be told apart in grey too
        colours = np.linspace((0.55, 0.78, 0.91), (0.0, 0.16, 0.32), len(layers))
        for layer, colour in zip(layers, colours):
            draw_band(left, tokens, values[:, :, layer - 1], f"layer {layer}", color=colour)
        draw_band(right, layers, values[:, -1], None, color=colours[-1])
        right.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel(f"{label}: {SYMBOLS.get(name, name)}")
    label_tokens(axes[-1, 0])
    axes[-1, 1].set_xlabel(f"layer, after {tokens[-1]:,} tokens")
    shown = axes[0, 0].get_lines()[:: math.ceil(len(layers) / 8)]  # as many as fit into the legend
    axes[0, 0].legend(handles=shown, frameon=False, ncols=2, fontsize="small")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------
# Activations


def draw_xielu(path):
    """xIELU and its gradient: αp steepens the positive side, αn deepens the negative one."""
    figure, [[left, right]] = new_figure(1, 2, 10, 3.8)
    x = torch.linspace(-4, 2, 601, dtype=torch.float64)
    for number, (alpha_p, alpha_n) in enumerate([(0.8, 0.8), (1.4, 1.4), (0.4, 0.65), (0.1, 0.52)]):
        module = xielu.XIELU(alpha_p, alpha_n)
        for axis, y in zip((left, right), curve(module, x)):
            label = f"αp = {alpha_p}, αn = {alpha_n}" + (" (start)" if number == 0 else "")
            axis.plot(x, y, label=label, linewidth=1.8, **line_style(number))
    left.plot(0, 0, "o", color="black", markersize=4)
    right.plot(0, module.beta, "o", color="black", markersize=4)
    right.annotate(f"β = {module.beta}", (0, module.beta), xytext=(6, -14), textcoords="offset points")
    left.set(xlabel="x", ylabel="activation f(x)", ylim=(-1.2, 3))
    right.set(xlabel="x", ylabel="gradient f′(x)", ylim=(-1.3, 3))
    left.legend(frameon=False)
    save(figure, path)


def draw_activations(path):
    """Every activation of activations.py and its gradient: gated ones at y = 1, expanded ones at α = 0.25. The other
    implementations of xIELU, called xielu_…, have its curves and are left out."""
    drawn = {name: activation for name, activation in ACTIVATIONS.items() if not name.startswith("xielu_")}
    rows = math.ceil(len(drawn) / 4)
    figure, axes = new_figure(rows, 4, 10, 2 * rows, sharey=True)
    x = torch.linspace(-4, 3, 701, dtype=torch.float64)
    for axis, (name, activation) in zip(axes.flat, drawn.items()):
        module = activation.build(len(x))
        conditions = ["y = 1"] if activation.gated else []
        if isinstance(getattr(module, "alpha", None), torch.nn.Parameter):
            torch.nn.init.constant_(module.alpha, 0.25)
            conditions.append("α = 0.25")
        value, gradient, *_ = curve(module, x, activation.gated)
        axis.plot(x, value, color=COLOURS[0], linewidth=1.8, label="activation")
        axis.plot(x, gradient, color=COLOURS[3], linewidth=1.4, linestyle="--", label="gradient")
        axis.set_title(name, fontsize="medium")
        axis.text(0.05, 0.86, ", ".join(conditions), transform=axis.transAxes, fontsize="small")
        axis.set_ylim(-1.2, 3)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.legend(handles=axes[0, 0].get_lines(), loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("x")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------
# Command line

OF_RUNS = {"loss": draw_loss, "scalars": draw_scalars}
OF_ACTIVATIONS = {"xielu": draw_xielu, "activations": draw_activations}


def draw(argv):
    """Draw the figure that a command line names."""
    parser = Parser("python -m tools.plot")
    parser.add_argument("figure", choices=[*OF_RUNS, *OF_ACTIVATIONS])
    parser.add_argument("runs", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args(argv)
    path = options.out or Path(f"out/plot/{options.figure}.png")
    if path.suffix != ".png":
        raise UserError(f"--out={path} is not the name of a .png file")
    if options.figure in OF_RUNS:
        OF_RUNS[options.figure](options.runs, path)
    elif options.runs:
        raise UserError(f"{options.figure} is not drawn from runs: leave out {' '.join(options.runs)}")
    else:
        OF_ACTIVATIONS[options.figure](path)
    print(f"figure: {path}")


main = program(draw)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
