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

import keyword
import math
import re
import sys
import tempfile
from pathlib import Path

import torch

from activations import ACTIVATIONS, load_derived
from data import UserError
from integral import effective_scalar, raw_scalar
from tools import plot
from tools.command import run_command

try:
    import mpmath
    import sympy

    from tools.formula import GREEK, M, P, X, integrate, read_gradient, read_scalars, show, time_limit
    from tools.stable import Writer, fit
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
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or keyword.iskeyword(name):
        raise UserError(f"{name!r} is no name for an activation: take letters, digits and _, as in my_xielu")
    if name in ACTIVATIONS or class_name(name) in ("Integrated", "Activation"):
        raise UserError(f"the name {name} is taken by an activation that is there already: choose another")
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or delete it (and the runs that were made with it)")


def class_name(name):
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


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
    places = [0, *(10.0**k for k in range(-12, 4)), *(k / 8 for k in range(1, 400))]
    for numbers in settings:
        function = gradient.subs(X, sign * size).subs(numbers)
        with time_limit(
            20, f"{option} could not be searched for places where it is not finite: try a simpler gradient"
        ):
            try:
                poles = sympy.singularities(function, size, sympy.Interval(0, sympy.oo))
                places += [float(pole) for pole in poles] if isinstance(poles, sympy.FiniteSet) else []
            except (NotImplementedError, ValueError, TypeError):
                pass  # the places below are looked at all the same
        function = sympy.lambdify(size, function, "mpmath")
        for place in places:
            try:
                value = mpmath.mpmathify(function(mpmath.mpf(place)))
                fine = mpmath.isfinite(value) and mpmath.im(value) == 0
            except (ZeroDivisionError, ValueError, OverflowError):
                fine = False
            if not fine:
                where = ", ".join(f"{symbol} = {float(value):.4g}" for symbol, value in numbers.items())
                raise UserError(
                    f"{option}: the gradient {show(gradient)} is no finite number at "
                    f"x = {sign * place:.6g}{' with ' + where if where else ''}"
                )


# ---------------------------------------------------------------------------------------------------------------
# What is written


def table(positive, negative, trained, symbols):
    """The rows of gradient, integral and the scalars' gradients in x, aligned: a list of lines."""
    rows = [["", "x > 0", "x ≤ 0"]]
    sides = (positive, negative)
    rows.append(["gradient f′", *(show(side.in_x(side.gradient)) for side in sides)])
    rows.append(["integral f", *(show(side.in_x(side.integral), symbols) for side in sides)])
    for scalar in trained:
        formulas = [show(side.in_x(sympy.diff(side.integral, scalar.symbol)), symbols) for side in sides]
        rows.append([f"∂f/∂{GREEK.get(scalar.name, scalar.name)}", *formulas])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["    ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def describe_scalar(scalar):
    """How a scalar is made."""
    if not scalar.trained:
        return f"{scalar.name} = {scalar.start} is fixed"
    if scalar.bound is None:
        return f"{scalar.name} is trained, from {scalar.start}"
    bound = "" if scalar.bound_name == "0" else f"{scalar.bound_name} + "
    return f"{scalar.name} = {bound}softplus(raw) is trained, from {scalar.start}"


def either(texts, formulas, scalars):
    """The code of one text for x > 0, the other for x ≤ 0; those without a tensor are made one."""
    fixed = {scalar.name for scalar in scalars if not scalar.trained}
    for number, formula in enumerate(formulas):
        if {symbol.name for symbol in formula.free_symbols} <= fixed:
            texts[number] = f"torch.full_like(p, {texts[number]})"
    return f"torch.where(p > 0, {', '.join(texts)})"


def value_code(positive, negative, scalars, series, form):
    """The function of f(x): each side is 0 where the other is not, so it is their sum."""
    writer = Writer(scalars, series)
    sides = [side for side in (positive, negative) if side.integral != 0]
    texts = [writer.write(form(side.integral), side.size) for side in sides]
    names = ["positive" if side is positive else "negative" for side in sides]
    lines = [f"{name} = {text}" for name, text in zip(names, texts)]
    return function_code(
        "value", "f(x) of x and the scalars of the table.", scalars, writer.lines + lines, " + ".join(names)
    )


def partials_code(positive, negative, scalars, series, form):
    """The function of f′(x) and the scalars' gradients."""
    writer = Writer(scalars, series)
    gradients = [form(side.gradient) for side in (positive, negative)]
    texts = [writer.write(gradient, side.size) for gradient, side in zip(gradients, (positive, negative))]
    results = [either(texts, gradients, scalars)]
    for scalar in scalars:
        if scalar.trained:
            by_side = [(form(sympy.diff(side.integral, scalar.symbol)), side.size) for side in (positive, negative)]
            parts = [writer.write(formula, size) for formula, size in by_side if formula != 0]
            results.append(" + ".join(parts).replace("+ -", "- "))
    about = "f′(x), and ∂f/∂a for each trained scalar a."
    returned = "(\n" + "".join(f"        {result},\n" for result in results) + "    )"
    return function_code("partials", about, scalars, writer.lines, returned)


def function_code(name, about, scalars, lines, returned):
    arguments = ", ".join(["x", *(scalar.name for scalar in scalars if scalar.trained)])
    body = ["p, m = sides(x)", *lines, f"return {returned}"]
    for number, line in enumerate(body):  # of what a line unpacks, name only what is used
        names, equals, call = line.partition(" = ")
        if ", " in names and equals:
            used = [re.search(rf"\b{name}\b", "\n".join(body[number + 1 :])) for name in names.split(", ")]
            names = ", ".join(name if found else "_" for name, found in zip(names.split(", "), used))
            body[number] = f"{names} = {call}"
    return "\n".join([f"def {name}({arguments}):", f'    """{about}"""', *(f"    {line}" for line in body)])


def series_code(series):
    """The fitted coefficients, each list under what it is of."""
    lines = []
    for (function, order, cut), name in series.items():
        below = f"its Taylor terms below t^{order}" if order > 1 else "its value at 0"
        lines.append(f"# ({show(function)} less {below}) / t^{order} = c₀ + c₁·u + …, u = t − {cut / 2}, for t < {cut}")
        lines.append(f"{name} = {{")
        for dtype, coefficients in fit(function, order, cut).items():
            lines.append(f"    torch.{dtype}: [")
            for first in range(0, len(coefficients), 4):
                lines.append(f"        {', '.join(map(repr, coefficients[first : first + 4]))},")
            lines.append("    ],")
        lines.append("}")
    return "\n".join(lines)


def file_text(name, command, positive, negative, scalars, form):
    """The whole derived file, its formulas in a form that form(formula) gives."""
    trained = [scalar for scalar in scalars if scalar.trained]
    symbols = [scalar.symbol for scalar in scalars]
    rows = table(positive, negative, trained, symbols)
    series = {}
    functions = [code(positive, negative, scalars, series, form) for code in (value_code, partials_code)]
    body = "\n\n\n".join(filter(None, [series_code(series), *functions]))
    helpers = [name for name in ("exp_terms", "near_zero", "sides", "split") if f"{name}(" in body]
    formula = [show(side.in_x(side.integral), symbols) for side in (positive, negative)]
    limits = [f"{scalar.name} {'>' if scalar.trained else '='} {scalar.limit}" for scalar in scalars if scalar.limit]
    formula = [f"{formula[0]} for x > 0", f", {formula[1]} for x ≤ 0", f" ({', '.join(limits)})" if limits else ""]
    imports = ["import math", ""] if "math." in body else []
    imports += ["import torch", ""] if "torch." in body else []
    imports += ["from activations import Activation", f"from integral import {', '.join(['Integrated', *helpers])}"]
    bounds = {scalar.name: scalar.bound_name if scalar.bound_name != "0" else "0.0" for scalar in trained}
    bounds = ", ".join(f'"{key}": {bound or None}' for key, bound in bounds.items())
    starts = ", ".join(f'"{scalar.name}": {scalar.start!r}' for scalar in trained)
    return "\n".join(
        [
            f'"""{name}: the integral of a gradient, written by tools/derive.py.',
            "",
            *(f"    {row}".rstrip() for row in rows),
            "",
            *(f"{describe_scalar(scalar)}." for scalar in scalars),
            "",
            "It comes from",
            "",
            *(f"    {line}" for line in command),
            '"""',
            "",
            *imports,
            "",
            *(f"{scalar.name} = {scalar.start!r}" for scalar in scalars if not scalar.trained),
            "",
            "",
            body,
            "",
            "",
            f"class {class_name(name)}(Integrated):",
            f'    """{name} with its trained scalars."""',
            "",
            f"    start = {{{starts}}}",
            f"    bound = {{{bounds}}}",
            "    value = staticmethod(value)",
            "    partials = staticmethod(partials)",
            "",
            "",
            "FORMULA = (",
            *(f'    "{part}"' for part in formula if part),
            ")",
            f"ACTIVATION = Activation(FORMULA, {class_name(name)})",
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------------------------
# Checking it. Sizes that bfloat16 can represent, so that they are the same in every dtype.

SIZES = torch.tensor(
    [1e-12, 1e-8, 1e-4, 1e-2, 0.1, 0.3, 0.45, 0.498, 0.502, 0.55, 0.8, 1.5, 3.0, 7.5, 8.5, 15.0, 30.0, 100.0, 1000.0]
).bfloat16()
# of the sum of the sizes of a gradient's terms: what the tests of xielu.py allow, and float64 rounding
TOLERANCE = {torch.float64: 2e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}


def integrals(formula, size, places, rough=False):
    """The integrals of a formula of `size` from 0 to each of the rising places, by quadrature."""
    function = sympy.lambdify(size, formula, "mpmath")
    total, low, found = mpmath.mpf(0), mpmath.mpf(0), []
    for high in map(mpmath.mpf, places):
        unit = abs(function((low + high) / 2)) or 1  # quad stops at an absolute error
        scaled = lambda s, unit=unit: function(s) / unit  # noqa: E731
        part, error = mpmath.quad(scaled, [low, high], error=True, maxdegree=3 if rough else 5)
        if error > 1e-18 * abs(part) and not rough:
            part = mpmath.quad(scaled, mpmath.linspace(low, high, 65), maxdegree=5)
        total, low = total + part * unit, high
        found.append(float(total))
    return torch.tensor(found, dtype=torch.float64)


def exact(side, numbers, trained):
    """What the code should give at SIZES, and the sizes of the terms that it is made of: (values, scales), each a list
    of f, f′ and the scalars' gradients."""
    places = SIZES.tolist()
    values, scales = [], []
    for formula in (side.gradient, *(sympy.diff(side.gradient, scalar.symbol) for scalar in trained)):
        size_of_terms = sum(abs(term) for term in sympy.Add.make_args(formula))
        values.append(side.sign * integrals(formula.subs(numbers), side.size, places))
        scales.append(integrals(size_of_terms.subs(numbers), side.size, places, rough=True))
        if formula is side.gradient:
            for found, part in ((values, formula), (scales, size_of_terms)):
                function = sympy.lambdify(side.size, part.subs(numbers), "mpmath")
                found.append(
                    torch.tensor([float(function(mpmath.mpf(place))) for place in places], dtype=torch.float64)
                )
    return values, scales


def check_close(found, values, scales, x, dtype, names, numbers):
    """UserError that names the first point at which the code does not give what it should."""
    for name, actual, expected, scale in zip(names, found, values, scales):
        representable = expected.abs() < 0.9 * torch.finfo(dtype).max
        wrong = ~((actual.double() - expected).abs() <= TOLERANCE[dtype] * scale + torch.finfo(dtype).tiny)
        wrong &= representable & (scale < torch.finfo(dtype).max)
        if wrong.any():
            at = wrong.nonzero()[0].item()
            where = ", ".join([f"x = {x[at].item():.6g}", *(f"{key} = {float(v):.6g}" for key, v in numbers.items())])
            raise UserError(
                f"the code is not accurate, so nothing is written: {name} in {str(dtype)[6:]} at {where} is "
                f"{actual[at].item():.9g} instead of {expected[at].item():.9g}"
            )


def check_code(module, sides, scalars, settings):
    """UserError unless the code gives, in every dtype, the numerical integrals of the gradient."""
    trained = [scalar for scalar in scalars if scalar.trained]
    bounds = [scalar.bound for scalar in trained]
    names = ["f", "f′", *(f"∂f/∂{scalar.name}" for scalar in trained)]
    for numbers in settings:
        raw = [raw_scalar(float(numbers[scalar.symbol]), scalar.bound).detach() for scalar in trained]
        # what they are once they are float32 parameters
        effective = [effective_scalar(value.double(), bound).item() for value, bound in zip(raw, bounds)]
        numbers = numbers | {scalar.symbol: value for scalar, value in zip(trained, effective)}
        for side in sides:
            with mpmath.workdps(50):
                values, scales = exact(side, numbers, trained)
            for dtype in TOLERANCE:
                x = side.sign * SIZES.to(dtype)
                wide = torch.promote_types(dtype, torch.float32)
                own = [effective_scalar(value.to(wide), bound) for value, bound in zip(raw, bounds)]
                found = [module.value(x, *own), *module.partials(x, *own)]
                check_close(found, values, scales, x, dtype, names, numbers)
            check_far(module, side, effective, names)
    places = [-20.0, -3.0, -0.51, -0.3, -1e-3, 1e-3, 0.4, 0.6, 5.0]
    x = torch.tensor(places, dtype=torch.float64, requires_grad=True)
    try:
        torch.autograd.gradcheck(module.apply_to, (x, *(value.double().requires_grad_() for value in raw)))
    except RuntimeError as error:
        raise UserError(f"the code's gradients are not those of its values: {str(error).splitlines()[0]}") from None


def check_far(module, side, scalars, names):
    """UserError if the code overflows in float32 where what it computes is far from doing so: against itself in
    float64."""
    x = side.sign * torch.logspace(3, 37, 69, dtype=torch.float64).float()
    results = []
    for dtype in (torch.float32, torch.float64):
        own = [torch.tensor(value, dtype=dtype) for value in scalars]
        results.append([module.value(x.to(dtype), *own), *module.partials(x.to(dtype), *own)])
    for name, narrow, wide in zip(names, *results):
        fits = ~(wide.abs() > 0.01 * torch.finfo(torch.float32).max)
        wrong = fits & ~((narrow.double() - wide).abs() <= 1e-4 * wide.abs() + 1e-37)
        if wrong.any():
            at = x[wrong][0].item()
            raise UserError(f"the code is not right far out, so nothing is written: {name} in float32 at x = {at:.3g}")


def check_compiled(module):
    """UserError unless the compiled module gives in float32 what its functions give uncompiled, near 0 too."""
    act = module()
    x = torch.cat([SIZES, -SIZES]).float().requires_grad_()
    y = act(x)
    y.sum().backward()
    own = [effective_scalar(getattr(act, name).detach(), bound) for name, bound in act.bound.items()]
    slope, *partials = module.partials(x.detach(), *own)
    pairs = {"f": (y.detach(), module.value(x.detach(), *own)), "f′": (x.grad, slope)}
    for name, partial in zip(act.bound, partials):
        inner = 1 if act.bound[name] is None else torch.sigmoid(getattr(act, name).detach())
        pairs[f"∂f/∂{name}"] = getattr(act, name).grad, (partial.sum() * inner).reshape(1)
    for name, (compiled, plain) in pairs.items():
        wrong = ~((compiled - plain).abs() <= 2e-6 * plain.abs() + 1e-30) & plain.isfinite()
        if wrong.any():
            raise UserError(f"torch.compile computes {name} otherwise than the formulas say: nothing is written")


# ---------------------------------------------------------------------------------------------------------------
# Reporting


def number_text(value):
    return {math.inf: "∞", -math.inf: "−∞"}.get(value, f"{value:.4g}".replace("-", "−"))


def limit_text(formula, side, numbers):
    """The limit of a formula far out on its side, as text."""
    try:
        with time_limit(10, "too long"):
            value = sympy.limit(formula.subs(numbers), side.size, sympy.oo)
            return number_text(float(value))
    except (UserError, TypeError, ValueError, NotImplementedError):
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


def settings_of(scalars):
    """The scalars' values to check with, {symbol: number}: the start, nearer to the bounds, and further from them."""
    settings = []
    for factor in (1, sympy.Rational(3, 10), 3):
        numbers = {}
        for scalar in scalars:
            start = sympy.Rational(str(scalar.start))
            if not scalar.trained:
                numbers[scalar.symbol] = start
            elif scalar.bound is None:
                numbers[scalar.symbol] = start + factor - 1
            else:
                bound = sympy.Rational(str(scalar.bound))
                numbers[scalar.symbol] = bound + factor * (start - bound)
        settings.append(numbers)
    return settings


def command_lines(name, texts, scalars, allow_jump):
    """The command that makes a derived file, from what was read of it."""
    given = [f'--{option}="{text}"' for option, text in texts.items()]
    for option, trained in (("trained", True), ("fixed", False)):
        chosen = ", ".join(scalar.text for scalar in scalars if scalar.trained == trained)
        given += [f'--{option}="{chosen}"'] if chosen else []
    given += ["--allow_jump"] if allow_jump else []
    return (
        [f"python -m tools.derive {name} {' '.join(given[:2])} \\", f"    {' '.join(given[2:])}"]
        if given[2:]
        else [f"python -m tools.derive {name} {' '.join(given)}"]
    )


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
    check_name(name)
    if sympy is None:
        raise UserError("tools.derive needs sympy, which does the mathematics: pip install sympy")
    scalars = read_scalars(options["trained"], options["fixed"])
    sides, texts = [], {}
    for sign, option in ((1, "positive"), (-1, "negative")):
        gradient, texts[option] = read_gradient(options[option], scalars, f"--{option}")
        sides.append((gradient, sign, f"--{option}"))
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
