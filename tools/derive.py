"""Give a gradient, get a trainable activation:

    python -m tools.derive my_xielu --positive="2*ap*x + beta" --negative="an*(exp(x) - 1) + beta" \\
        --trained="ap=0.8, an=0.8>beta" --fixed="beta=0.5"
    torchrun train.py configs/demo.py --activation=derived/my_xielu.py

The gradient is integrated with f(0) = 0 and written as code to derived/my_xielu.py, with a figure beside it, once it
has been checked against numerical integration of the gradient.

    --positive=GRADIENT    f′(x) for x > 0
    --negative=GRADIENT    f′(x) for x ≤ 0; default 0
    --trained=SCALARS      "ap=0.8" is softplus(raw), which stays above 0; "an=0.8>beta" is beta + softplus(raw), where
                           beta is a fixed scalar; "a=0~" is not constrained. Each starts at the value given
    --fixed=SCALARS        "beta=0.5" stays as it is
    --allow_jump           accept two gradients that do not meet at 0

A gradient is made of x, the scalars, numbers, pi, + - * / ** and the functions exp, log, sqrt, abs, sin, cos, atan,
tanh, erf, sigmoid, softplus and softsign. It is read as mathematics, and never run.
"""

import contextlib
import keyword
import math
import re
import sys
import tempfile
from pathlib import Path

import torch

from activations import ACTIVATIONS, load_derived
from data import UserError
from tools import plot
from tools.command import run_command

try:
    import mpmath
    import sympy

    from tools.derived_file import command_lines, file_text, table
    from tools.formula import GREEK, M, P, X, integrate, read_gradient, read_scalars, show, time_limit
    from tools.verify import check_code, check_compiled, settings_of
except ImportError:  # said when it is needed
    sympy = None

FOLDER = Path("derived")

# ---------------------------------------------------------------------------------------------------------------
# What is asked for


def read_options(argv):
    """(NAME, {option: text}) of a command line."""
    options = {"positive": "", "negative": "0", "trained": "", "fixed": "", "allow_jump": False}
    names = []
    for argument in argv:
        option, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            names.append(argument)
        elif option in options and bool(equals) == isinstance(options[option], str):
            options[option] = text if equals else True
        else:
            raise UserError(f"{argument} is not understood: see python -m tools.derive --help")
    if len(names) != 1 or not options["positive"].strip():
        raise UserError("give one name and a gradient, as in my_relu2 --positive='2*a*x' --trained='a=1'")
    return names[0], options


def check_name(name):
    """UserError if a new derived activation cannot be called so."""
    path = FOLDER / f"{name}.py"
    if not re.fullmatch(r"[A-Za-z]\w{,50}", name, re.ASCII) or keyword.iskeyword(name):
        raise UserError(f"{name!r} is no name for an activation: take letters, digits and _, as in my_xielu")
    if name in ACTIVATIONS:
        raise UserError(f"the name {name} is taken by an activation that is there already: choose another")
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or delete it (and the runs that were made with it)")


def check_jump(positive, negative, numbers, allowed):
    """UserError if the two gradients do not meet at 0 for all values of the scalars."""
    right, left = (side.gradient.subs(side.size, 0) for side in (positive, negative))
    jump = sympy.simplify(right - left)
    if jump != 0 and not allowed:
        size = float(jump.subs(numbers))
        raise UserError(
            f"the gradient jumps at 0, by {show(jump)} = {size:.4g}, from {show(left)} on the left to {show(right)} on "
            f"the right: let the two sides meet, or say --allow_jump"
        )


def check_finite(gradient, sign, option, settings):
    """UserError at the first place on its side where a gradient in X is no finite real number."""
    size = P if sign > 0 else M
    for numbers in settings:
        function = gradient.subs(X, sign * size).subs(numbers)
        places = [0, *(10.0**k for k in range(-12, 4)), *(k / 8 for k in range(1, 400))]
        with contextlib.suppress(UserError), time_limit(20, "the places above are looked at all the same"):
            poles = sympy.singularities(function, size, sympy.Interval(0, sympy.oo))
            if isinstance(poles, sympy.FiniteSet):
                places += [pole for pole in poles if sympy.limit(function, size, pole, "+").is_infinite]
        with time_limit(20, f"{option} takes too long to compute: try a simpler gradient"):
            place = place_not_finite(sympy.lambdify(size, function, "mpmath"), places)
        if place is not None:
            where = ", ".join(f"{symbol} = {float(value):.4g}" for symbol, value in numbers.items())
            raise UserError(
                f"{option}: the gradient {show(gradient)} is no finite number at "
                f"x = {sign * place:.6g}{' with ' + where if where else ''}"
            )


def place_not_finite(function, places):
    """The first place where a function gives no finite real number, as a float; a symbolic one is a pole. None if it
    does everywhere."""
    for place in places:
        if isinstance(place, sympy.Basic):
            return float(place)
        try:
            value = mpmath.mpmathify(function(mpmath.mpf(place)))
            fine = mpmath.isfinite(value) and mpmath.im(value) == 0
        except (ZeroDivisionError, ValueError, OverflowError):
            fine = False
        if not fine:
            return place
    return None


# ---------------------------------------------------------------------------------------------------------------
# Reporting


def number_text(value):
    return {math.inf: "∞", -math.inf: "−∞"}.get(value, f"{value:.4g}".replace("-", "−"))


def limit_text(formula, side, numbers):
    """The limit of a formula far out on its side, as text."""
    with contextlib.suppress(UserError), time_limit(10, "no limit was found"):
        return number_text(float(sympy.limit(formula.subs(numbers), side.size, sympy.oo)))
    return "?"


def minimum(module, start):
    """(x, f(x)) at the lowest point of f, or None where there is none: f sinks to the left or to the right."""
    own = [torch.tensor(value, dtype=torch.float64) for value in start]
    sizes = torch.logspace(-4, 4, 8001, dtype=torch.float64)
    x = torch.cat([-sizes.flip(0), sizes])
    if module.value(x, *own).min() >= 0:
        return 0.0, 0.0
    for _ in range(4):
        y = module.value(x, *own)
        at = y.argmin().item()
        if at in (0, len(x) - 1):
            return None
        lowest = x[at].item(), y[at].item()
        x = torch.linspace(x[at - 1].item(), x[at + 1].item(), 1001, dtype=torch.float64)
    return lowest


def report(module, positive, negative, scalars, start):
    """What there is to know of an activation at its starting scalars, a list of lines."""
    given = ", ".join(f"{scalar.name} = {scalar.start}" for scalar in scalars)
    lines = [f"With {given}:" if given else "Of it:"]
    at_zero = [number_text(float(side.gradient.subs(side.size, 0).subs(start))) for side in (negative, positive)]
    slope = at_zero[0] if at_zero[0] == at_zero[1] else f"{at_zero[0]} on the left, {at_zero[1]} on the right"
    lines.append(f"    gradient at 0    {slope}")
    lowest = minimum(module, [scalar.start for scalar in scalars if scalar.trained])
    found = f"f = {number_text(lowest[1])} at x = {number_text(lowest[0])}" if lowest else "none: f goes on sinking"
    lines.append(f"    minimum          {found}")
    for side, place in ((negative, "−∞"), (positive, "∞")):
        limits = [limit_text(formula, side, start) for formula in (side.integral, side.gradient)]
        lines.append(f"    x → {place.ljust(2)}           f → {limits[0]}, f′ → {limits[1]}")
    return lines


def draw(module, name, scalars, path):
    """The activation and its gradient at the starting scalars, as far as both sides can be seen."""
    figure, axes = plot.new_figure(1, 2, 10, 3.8)
    start = [torch.tensor(scalar.start, dtype=torch.float64) for scalar in scalars if scalar.trained]
    halves = [torch.linspace(-5, 0, 501, dtype=torch.float64), torch.linspace(0, 2.5, 251, dtype=torch.float64)[1:]]
    drawn = {"activation f(x)": module.value, "gradient f′(x)": lambda *at: module.partials(*at)[0]}
    for axis, (label, function) in zip(axes[0], drawn.items()):
        curves = [function(x, *start) for x in halves]
        for x, y in zip(halves, curves):  # apart, so that a jump is no slope
            axis.plot(x, y, linewidth=1.8, **plot.line_style(0))
        low, high = max(-3.0, min(y.min().item() for y in curves)), min(3.0, max(y.max().item() for y in curves))
        margin = 0.08 * (high - low) or 1.0
        axis.set_ylim(low - margin, high + margin)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set(xlabel="x", ylabel=label)
    given = ", ".join(f"{GREEK.get(scalar.name, scalar.name)} = {scalar.start:g}" for scalar in scalars)
    figure.suptitle(f"{name} at {given}" if given else name, fontsize="medium")
    plot.save(figure, path)


# ---------------------------------------------------------------------------------------------------------------


def make(name, command, positive, negative, scalars, settings):
    """(text of the file, its module class, bytes of its figure), checked. What sympy finds may lose its digits in code:
    then it is tried once more as sympy simplifies it."""
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for form, attempt in ((lambda formula: formula, "first"), (sympy.simplify, "second")):
            path = Path(folder, attempt, f"{name}.py")
            path.parent.mkdir()
            try:
                with time_limit(60, "the formulas are too large to be made into code: try a simpler gradient"):
                    text = file_text(name, command, positive, negative, scalars, form)
                path.write_text(text, encoding="utf-8")
                module = load_derived(path).module
                check_code(module, (positive, negative), scalars, settings)
                check_compiled(module)
                break
            except UserError as error:
                first = first or error
        else:
            raise first
        draw(module, name, scalars, path.with_suffix(".png"))
        return text, module, path.with_suffix(".png").read_bytes()


def derive(argv):
    """Derive, check and write what a command line asks for."""
    name, options = read_options(argv)
    if sympy is None:
        raise UserError("tools.derive needs sympy, which does the mathematics: pip install sympy")
    check_name(name)
    scalars = read_scalars(options["trained"], options["fixed"])
    sides, texts = [], {}
    for sign, option in ((1, "positive"), (-1, "negative")):
        gradient, texts[option] = read_gradient(options[option], scalars, f"--{option}")
        sides.append((gradient, sign, f"--{option}"))
    if all(gradient == 0 for gradient, _, _ in sides):
        raise UserError("the gradient is 0 everywhere: give one that is not, as in --positive='2*a*x'")
    used = set().union(*(gradient.free_symbols for gradient, _, _ in sides))
    for scalar in scalars:
        if scalar.symbol not in used and scalar.name not in [other.bound_name for other in scalars]:
            raise UserError(f"the scalar {scalar.name} is in neither gradient: use it, or leave it out")
    settings = settings_of(scalars)
    halves = []
    for gradient, sign, option in sides:
        check_finite(gradient, sign, option, settings)
    for gradient, sign, option in sides:
        halves.append(integrate(gradient, sign, option))
    positive, negative = halves
    check_jump(positive, negative, settings[0], options["allow_jump"])
    command = command_lines(name, texts, scalars, options["allow_jump"])
    text, module, figure = make(name, command, positive, negative, scalars, settings)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.png").write_bytes(figure)
    (FOLDER / f"{name}.py").write_text(text, encoding="utf-8")
    trained = [scalar for scalar in scalars if scalar.trained]
    print("\n".join(table(positive, negative, trained, [scalar.symbol for scalar in scalars])))
    print("\n".join(report(module, positive, negative, scalars, settings[0])))
    print(f"checked against numerical integration: {FOLDER}/{name}.py, its figure: {FOLDER}/{name}.png")


def main(argv):
    return run_command(derive, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
