"""Figures, of runs and of activations:

    python -m tools.plot loss RUN…          validation loss against tokens, and its difference to the first RUN's
    python -m tools.plot scalars RUN…       the trained scalars of an activation (αp, αn), by step and by layer
    python -m tools.plot xielu              xIELU and its gradient at several αp and αn
    python -m tools.plot activations        every activation and its gradient

RUN is the folder of a run, as out/compare/demo/xielu-seed=1. Runs that differ by their seed alone are drawn as one
line, the mean, in a band from the lowest to the highest. --out=FILE.png says where; the default is out/plot/NAME.png.
"""

import json
import math
import sys
from pathlib import Path

import torch

import train
from activations import ACTIVATIONS, short_name
from data import UserError
from tools.command import run_command
from xielu import XIELU

# Okabe and Ito's colours, which the colour-blind tell apart; after the seventh they come back, dashed.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
SYMBOLS = {"alpha_p": "αp", "alpha_n": "αn", "alpha_p3": "αp3", "alpha": "α"}


def new_figure(rows, columns, width, height, **options):
    """(figure, array of axes) of a size in inches, on white, so that it reads on a dark page too."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, metadata={"Software": None})


def line_style(number):
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if number < len(COLOURS) else "--"}


# ---------------------------------------------------------------------------------------------------------------
# Runs


def label_of(case):
    """What to call the runs of a case, {key: value} with an activation: that, and what else there is."""
    return " ".join(
        [short_name(case["activation"]), *(f"{name}={value}" for name, value in case.items() if name != "activation")]
    )


def read_groups(folders):
    """{label: {seed: its val records by tokens}} of run folders, those that differ by their seed alone together. The
    label is the activation, and what else differs between groups."""
    runs = []
    for folder in map(Path, folders):
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))["config"]
            records = train.read_log(folder / "log.jsonl", math.inf)
            validations = {r["tokens"]: r | {"loss": float(r["loss"])} for r in records if r["kind"] == "val"}
            runs.append((config, config["seed"], validations))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder} is no folder of a run: it has no config.json that train.py wrote") from None
    if not runs:
        raise UserError("give the folders of runs, as in out/compare/demo/*-seed=*")
    names = [name for name in runs[0][0] if name not in ("activation", "seed", "out", "resume")]
    differing = [name for name in names if len({str(config.get(name)) for config, _, _ in runs}) > 1]
    groups = {}
    for config, seed, validations in runs:
        label = label_of({name: config.get(name) for name in ["activation", *differing]})
        group = groups.setdefault(label, {})
        if seed in group:
            raise UserError(f"{label} with seed {seed} is there twice")
        group[seed] = validations
    return groups


def common_tokens(*groups):
    """The validated token counts that every run of these groups has."""
    return sorted(set.intersection(*(set(run) for group in groups for run in group.values())))


def draw_band(axis, x, values, label, **style):
    """The mean of values (one list a seed) over x, and a band between the seeds."""
    columns = list(zip(*values))
    axis.plot(x, [sum(column) / len(column) for column in columns], label=label, linewidth=1.6, **style)
    if len(values) > 1:
        axis.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.2, lw=0)


def token_unit(most):
    """(tokens in a unit that reads well for up to so many, its name)."""
    for size, name in ((1e9, "billion tokens"), (1e6, "million tokens")):
        if most >= size:
            return size, name
    return 1, "tokens"


def draw_loss(folders, path):
    """Validation loss against tokens; beside it, its difference to the first group's, paired by seed."""
    groups = read_groups(folders)
    first, others = next(iter(groups)), list(groups)[1:]
    figure, axes = new_figure(1, 2 if others else 1, 10 if others else 6, 4)
    left = axes[0, 0]
    tokens_of = {label: common_tokens(group)[1:] for label, group in groups.items()}
    for label, tokens in tokens_of.items():
        if len(tokens) < 2:
            raise UserError(f"{label} has too few validations for a curve: lower eval_every")
    size, unit = token_unit(max(tokens[-1] for tokens in tokens_of.values()))
    late = [0.0]  # what the second half of training shows decides the scale
    for number, (label, group) in enumerate(groups.items()):
        tokens = tokens_of[label]
        x = [count / size for count in tokens]
        curves = [[run[count]["loss"] for count in tokens] for run in group.values()]
        draw_band(left, x, curves, label, marker="o", markersize=3, **line_style(number))
    left.set(xlabel=unit, ylabel="validation loss (nats a token)")
    left.legend(frameon=False)
    if others:
        right = axes[0, 1]
        right.axhline(0, label=first, linewidth=1.6, **line_style(0))
        for number, label in enumerate(others, 1):
            seeds = [seed for seed in groups[label] if seed in groups[first]]
            tokens = common_tokens(groups[label], groups[first])[1:]
            if not seeds or not tokens:
                continue
            pairs = [(groups[label][seed], groups[first][seed]) for seed in seeds]
            curves = [[mine[count]["loss"] - base[count]["loss"] for count in tokens] for mine, base in pairs]
            x = [count / size for count in tokens]
            draw_band(right, x, curves, label, marker="o", markersize=3, **line_style(number))
            late += [value for curve in curves for value in curve[len(curve) // 2 :] if math.isfinite(value)]
        margin = 0.3 * (max(late) - min(late)) or 1e-3
        right.set_ylim(min(late) - margin, max(late) + margin)
        right.set(xlabel=unit, ylabel=f"difference to {first}, same seed (nats)")
    save(figure, path)


def draw_scalars(folders, path):
    """The trained scalars of an activation by step, a line a layer, and at the end by layer."""
    groups = read_groups(folders)
    if len(groups) > 1:
        raise UserError(f"give runs that differ by their seed alone, not {', '.join(groups)}")
    (label, group), tokens = next(iter(groups.items())), common_tokens(*groups.values())
    first = next(iter(group.values()))[tokens[0]] if tokens else {}
    scalars = [name for name, value in first.items() if isinstance(value, list)]
    if not scalars:
        raise UserError(f"the validations of {label} log no trained scalars")
    figure, axes = new_figure(len(scalars), 2, 10, 0.6 + 2.9 * len(scalars), sharex="col", sharey="row")
    size, unit = token_unit(tokens[-1])
    x = [count / size for count in tokens]
    for (left, right), name in zip(axes, scalars):
        values = [[run[count][name] for count in tokens] for run in group.values()]  # (seeds, validations, layers)
        layers = range(1, len(values[0][0]) + 1)
        labelled = {*layers[:: math.ceil(len(layers) / 8)], layers[-1]}
        for layer in layers:
            # from light to dark blue with depth, which reads in grey too
            shade = (layer - 1) / max(1, len(layers) - 1)
            colour = tuple(light + shade * (dark - light) for light, dark in zip((0.55, 0.78, 0.91), (0.0, 0.16, 0.32)))
            curves = [[at[layer - 1] for at in run] for run in values]
            draw_band(left, x, curves, f"layer {layer}" if layer in labelled else None, color=colour)
        draw_band(right, layers, [run[-1] for run in values], None, color="#00294F", marker="o")
        right.xaxis.get_major_locator().set_params(integer=True)
        left.set_ylabel(f"{label}: {SYMBOLS.get(name, name)}")
    axes[-1, 0].set_xlabel(unit)
    axes[-1, 1].set_xlabel(f"layer, after {x[-1]:,.4g} {unit}")
    axes[0, 0].legend(frameon=False, ncols=2, fontsize="small")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------
# Activations


def value_and_gradient(module, x, gated=False):
    """f and f′ at x; for a gated module at y = 1."""
    x = x.clone().requires_grad_()
    y = module(x, torch.ones_like(x)) if gated else module(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


def draw_xielu(path):
    """xIELU and its gradient: αp steepens the positive side, αn deepens the negative one."""
    figure, axes = new_figure(1, 2, 10, 3.8)
    x = torch.linspace(-4, 2, 601, dtype=torch.float64)
    start = XIELU()
    for number, (alpha_p, alpha_n) in enumerate([(0.8, 0.8), (1.4, 1.4), (0.4, 0.65), (0.1, 0.52)]):
        module = XIELU(alpha_p, alpha_n)
        for axis, y in zip(axes[0], value_and_gradient(module, x)):
            label = f"αp = {alpha_p}, αn = {alpha_n}" + (" (start)" if number == 0 else "")
            axis.plot(x, y, label=label, linewidth=1.8, **line_style(number))
    for axis, name in zip(axes[0], ("activation f(x)", "gradient f′(x)")):
        axis.plot(0, 0 if name[0] == "a" else start.beta, "o", color="black", markersize=4)
        axis.set(xlabel="x", ylabel=name)
    axes[0, 1].annotate("β = 0.5", (0, start.beta), xytext=(6, -14), textcoords="offset points")
    axes[0, 0].set_ylim(-1.2, 3)
    axes[0, 1].set_ylim(-1.3, 3)
    axes[0, 0].legend(frameon=False)
    save(figure, path)


def draw_activations(path, expanded=0.25):
    """Every name of activations.py, activation and gradient; gated ones at y = 1, expanded ones at some α."""
    columns = 5
    rows = math.ceil(len(ACTIVATIONS) / columns)
    figure, axes = new_figure(rows, columns, 10, 2 * rows, sharex=True, sharey=True)
    x = torch.linspace(-4, 3, 701, dtype=torch.float64)
    for axis, (name, activation) in zip(axes.flat, ACTIVATIONS.items()):
        module = activation.module()
        conditions = ["y = 1"] if activation.gated else []
        if isinstance(getattr(module, "alpha", None), torch.nn.Parameter):
            torch.nn.init.constant_(module.alpha, expanded)
            conditions.append(f"α = {expanded}")
        value, gradient = value_and_gradient(module, x, activation.gated)
        axis.plot(x, value, color=COLOURS[0], linewidth=1.8, label="activation")
        axis.plot(x, gradient, color=COLOURS[3], linewidth=1.4, linestyle="--", label="gradient")
        axis.set_title(name, fontsize="medium")
        axis.text(0.05, 0.86, ", ".join(conditions), transform=axis.transAxes, fontsize="small")
        axis.set_ylim(-1.2, 3)
    for axis in axes.flat[len(ACTIVATIONS) - columns : len(ACTIVATIONS)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[len(ACTIVATIONS) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel("x")
    save(figure, path)


FIGURES = {"loss": draw_loss, "scalars": draw_scalars, "xielu": draw_xielu, "activations": draw_activations}


def draw(argv):
    """Draw the figure that a command line names."""
    if not argv or argv[0] not in FIGURES:
        raise UserError(f"say what to draw: one of {', '.join(FIGURES)}; see python -m tools.plot --help")
    name, path, folders = argv[0], Path(f"out/plot/{argv[0]}.png"), []
    for argument in argv[1:]:
        if argument.startswith("--out=") and argument.endswith(".png"):
            path = Path(argument.removeprefix("--out="))
        elif argument.startswith("--") or name in ("xielu", "activations"):
            raise UserError(f"{argument} is not understood: see python -m tools.plot --help")
        else:
            folders.append(argument)
    FIGURES[name](folders, path) if name in ("loss", "scalars") else FIGURES[name](path)
    print(f"figure: {path}")


def main(argv):
    return run_command(draw, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
