"""Give a gradient, get a trainable activation:

    python -m tools.derive my_xielu --positive="2*ap*x + beta" --negative="an*(exp(x) - 1) + beta" \\
        --trained="ap=0.8, an=0.8>beta" --fixed="beta=0.5"
    python train.py configs/demo.py --activation=derived/my_xielu.py

The gradient is integrated with f(0) = 0 and written as code to derived/my_xielu.py, with a figure beside it, once it
has been checked against numerical integration of the gradient.

    --positive=GRADIENT    f′(x) for x > 0
    --negative=GRADIENT    f′(x) for x ≤ 0; default 0
    --trained=SCALARS      "ap=0.8" is softplus(raw), which stays above 0; "an=0.8>beta" is beta + softplus(raw), where
                           beta is a fixed scalar; "a=0~" is not constrained. Each starts at the value given
    --fixed=SCALARS        "beta=0.5" stays as it is
    --allow_jump           accept two gradients that do not meet at 0

A gradient is made of x, the scalars, numbers, pi, + - * / ** and the functions exp, log, sqrt, abs, sin, cos, atan,
tanh, erf, sigmoid, softplus and softsign. Nothing else is let through to sympy, which reads it. The code computes in
float64; for bfloat16, and on Apple's GPUs, which have no float64, in float32.
"""

import contextlib
import keyword
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import sympy
import torch
from scipy.integrate import quad
from sympy.codegen.cfunctions import expm1, log1p

import xielu
from activations import ACTIVATIONS, load_derived
from plumbing.command import Parser, UserError, refuse_windows, run_command
from plumbing.files import write_atomically
from tools.plot import line_style, new_figure, save

FOLDER = Path("derived")
SECONDS = 30  # for each thing that sympy does: it may look for an integral without end


class OutOfTime(BaseException):
    """Not an Exception, which sympy might catch."""


@contextlib.contextmanager
def time_limit(message):
    """Raise UserError(message) if what sympy does inside takes longer than SECONDS, or fails."""

    def stop(number, frame):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except (OutOfTime, Exception) as error:  # sympy's own faults are of every kind
        raise UserError(f"{message} ({type(error).__name__})") from None
    finally:
        signal.alarm(0)


# ---------------------------------------------------------------------------------------------------------------
# Reading

X = sympy.Symbol("x", real=True)
P, M = sympy.Symbol("p", positive=True), sympy.Symbol("m", positive=True)  # the size of x where x > 0, where x ≤ 0
SIGN = {P: 1, M: -1}  # x = SIGN[size] * size
FUNCTIONS = {name: getattr(sympy, name) for name in ("exp", "log", "sqrt", "sin", "cos", "atan", "tanh", "erf")}
FUNCTIONS |= {
    "abs": sympy.Abs,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "softplus": lambda x: sympy.log(1 + sympy.exp(x)),
    "softsign": lambda x: x / (1 + sympy.Abs(x)),
}
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
SCALAR = re.compile(rf"([A-Za-z]\w*) *= *([-+]?{NUMBER}) *(~|> *\w+)?", re.ASCII)
# names that the written file, or a line of the log, uses for something else
TAKEN = set("x p m pi torch value partials partial inside fused Activation ACTIVATION Integral".split())
TAKEN |= {"kind", "step", "tokens", "seconds", "loss", "perplexity", "bits_per_byte", *FUNCTIONS, *keyword.kwlist}


def read_scalars(trained_text, fixed_text):
    """({trained symbol: (start, bound or None)}, {fixed symbol: value}); UserError if the texts make no sense."""
    trained, fixed = {}, {}
    for text, group in ((fixed_text, fixed), (trained_text, trained)):
        for part in filter(None, map(str.strip, text.split(","))):
            match = SCALAR.fullmatch(part)
            if not match or (match[3] and group is fixed):
                raise UserError(f"{part!r} is not understood: fixed are beta=0.5, trained ap=0.8, an=0.8>beta, a=0~")
            name, start, mark = match[1], float(match[2]), (match[3] or ">0").replace(" ", "")
            if name in TAKEN or name in map(str, fixed | trained):
                raise UserError(f"the name {name} is taken, or given twice: choose another")
            bounds = {"~": None, ">0": 0.0} | {f">{symbol}": value for symbol, value in fixed.items()}
            if mark not in bounds:
                raise UserError(f"{part!r}: the bound must be a scalar of --fixed")
            low = start if group is fixed else bounds[mark]
            if group is trained and low is not None and not low < start <= low + 100:
                raise UserError(f"{name} starts at {start}, which must be above {low}, by 100 at most")
            # to know that a scalar is positive helps to find integrals
            kind = "positive" if start > 0 and low is not None and low >= 0 else "real"
            group[sympy.Symbol(name, **{kind: True})] = start if group is fixed else (start, low)
    return trained, fixed


def read_gradient(text, option, size, symbols):
    """The text as a sympy expression in `size` and the symbols; UserError if it is not a formula. sympy evaluates what
    it parses, so it only gets to see numbers, operators and the names of this file."""
    names = {"x": X, "pi": sympy.pi} | {str(symbol): symbol for symbol in symbols} | FUNCTIONS
    known = re.match(rf"(?:[ +\-*/()]|{NUMBER}(?![\w.])|(?:{'|'.join(names)})(?!\w))*", text, re.ASCII)
    if known.end() < len(text):
        unknown = text[known.end() :][:30]
        raise UserError(f"{option}: {unknown!r} is not understood: known are {', '.join(names)}, + - * / ** ( )")
    # the time limit could not stop 9**9**9
    if re.search(r"\*\*(?!-?(\d|1[0-2])(\.\d+)?(?![\w.]|\*\*))", text.replace(" ", "")):
        raise UserError(f"{option}: an exponent must be a number up to 12, as in x**2; for others use exp(…)")
    with time_limit(f"{option}={text[:100]} is not a formula"):
        gradient = sympy.nsimplify(sympy.parse_expr(text, names), rational=True).subs(X, SIGN[size] * size)
        wrong = gradient.has(sympy.nan, sympy.zoo, sympy.I) or any(abs(n) > 1e6 for n in gradient.atoms(sympy.Rational))
    if wrong:
        raise UserError(f"{option}={text} is not a finite real number, or contains a number beyond 1e6")
    return gradient


# ---------------------------------------------------------------------------------------------------------------
# Integrating. Formulas come in pairs: one of P for x > 0, one of M for x ≤ 0.


class logsigmoid(sympy.Function):
    """−log(1 + e⁻ˣ). A class, since the derivative that sympy would find overflows."""

    def fdiff(self, argindex=1):
        return 1 / (1 + sympy.exp(self.args[0]))


def integrate(gradient, size):
    """f on one side, of its gradient; UserError where no closed form is found in time."""
    none = f"{show(gradient)} has no integral from 0 in a closed form that could be found: try a simpler gradient"
    with time_limit(none):
        for form in (gradient, sympy.expand(gradient)):
            integral = SIGN[size] * sympy.integrate(form, size)
            at_zero = integral.subs(size, 0)
            integral -= at_zero if at_zero.is_finite else sympy.limit(integral, size, 0, "+")
            in_torch = all(hasattr(torch, call.func.__name__.lower()) for call in integral.atoms(sympy.Function))
            if in_torch and not integral.has(sympy.Integral, sympy.Piecewise, sympy.RootSum, sympy.I, sympy.oo):
                exponent = sympy.Wild("exponent")
                return integral.replace(sympy.log(1 + sympy.exp(exponent)), -logsigmoid(-exponent))
    raise UserError(none)


def check_jump(right, left):
    """UserError if the gradients at 0 are not equal for all values of the scalars."""
    jump = sympy.simplify(right - left)
    if jump != 0:
        sides = f"by {show(jump)}, from {show(left)} on the left to {show(right)} on the right"
        raise UserError(f"the gradient jumps at 0, {sides}: let the two sides meet, or say --allow_jump")


def collected(formula):
    """The formula as a sum with one term for each scalar."""
    return sympy.collect(sympy.expand_mul(formula), formula.free_symbols - {P, M})


def rows_of(gradients, integrals, trained):
    """{"gradient f′": pair, "integral f": pair, "∂f/∂a": pair for each trained symbol a}."""
    rows = {"gradient f′": gradients, "integral f": [collected(integral) for integral in integrals]}
    for symbol in trained:
        rows[f"∂f/∂{show(symbol)}"] = [collected(integral.diff(symbol)) for integral in integrals]
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Writing

SUPERSCRIPTS = str.maketrans("0123456789-x", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ˣ")
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "pi": "π"}


def show(formula):
    """A formula in one line, as it is written by hand."""
    text = sympy.sstr(formula.subs(P, X).subs(M, -X))
    text = re.sub(r"\bexp\((-?x)\)", lambda match: "e" + match[1].translate(SUPERSCRIPTS), text)
    text = re.sub(r"\*\*(\d+)", lambda match: match[1].translate(SUPERSCRIPTS), text)
    text = re.sub(r"\b(" + "|".join(GREEK) + r")\b", lambda match: GREEK[match[1]], text)
    return text.replace("sqrt(", "√(").replace("**", "^").replace("*", "·").replace("-", "−")


def table(rows):
    """{row: pair} as aligned lines of text."""
    lines = [("", "x > 0", "x ≤ 0"), *((name, *map(show, pair)) for name, pair in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("    ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def code(formula, size):
    """PyTorch code of a formula. Near 0, eʷ − 1 and log(1 + w) as they stand lose their digits: so eʷ becomes
    expm1(w) + 1 where that lets a constant cancel, and log(1 + w) becomes log1p(w)."""
    by_expm1 = collected(formula.replace(sympy.exp, lambda power: expm1(power) + 1))
    formula = min(formula, by_expm1, key=lambda form: len(sympy.Add.make_args(sympy.expand(form))))
    formula = formula.replace(sympy.log, lambda of: log1p(of - 1) if 1 in of.args else sympy.log(of))
    formula = formula.replace(lambda part: part.is_number and not part.is_Rational, lambda part: part.evalf(17))
    text = re.sub(r"[A-Za-z]\w*(?=\()", lambda name: f"torch.{name[0].lower()}", str(formula))
    text = text.replace("torch.logsigmoid", "torch.nn.functional.logsigmoid")
    return text if formula.has(size) else f"{text} + 0*{size}"  # a tensor that is NaN where x is NaN


def file_text(name, command, rows, trained, fixed):
    """The text of a derived file."""
    lines = [f"torch.where(p > 0, {code(positive, P)}, {code(negative, M)})" for positive, negative in rows.values()]
    value = lines.pop(1)
    partials = ",\n        ".join(lines)
    scalars = {str(symbol): numbers for symbol, numbers in trained.items()}
    arguments = ", ".join(["x", *scalars])
    sizes = ", ".join(["p", "m", *scalars])
    constants = [f"{symbol} = {number!r}" for symbol, number in fixed.items()]
    bounds = [f"{name} > {bound}" for name, (_, bound) in scalars.items() if bound is not None]
    positive, negative = map(show, rows["integral f"])
    # a run knows its activation by this text
    formula = ", ".join([f"{positive} for x > 0", f"{negative} for x ≤ 0", *constants, *bounds])
    constants = "\n".join(constants)
    return f'''"""{name}: the integral of a gradient, written by

    {command}

{table(rows)}
"""

from functools import partial

import torch

from activations import Activation, Integral, fused

{constants}


def inside(x, *scalars):
    """p = max(x, 0), m = max(−x, 0) and the scalars, in float64, so that what cancels near 0 leaves enough digits; for
    bfloat16, whose own rounding is coarser, and on Apple's GPUs, which have no float64, in float32."""
    dtype = torch.float32 if x.dtype.itemsize == 2 or x.device.type == "mps" else torch.float64
    return [number.to(dtype) for number in (torch.relu(x), torch.relu(-x), *scalars)]


def value({arguments}):
    """f(x)."""
    {sizes} = inside({arguments})
    return {value}


def partials({arguments}):
    """f′(x), and ∂f/∂a for each trained scalar a."""
    {sizes} = inside({arguments})
    return (
        {partials},
    )


ACTIVATION = Activation("{formula}", partial(Integral, fused(value, partials), {scalars}))
'''


# ---------------------------------------------------------------------------------------------------------------
# Checking, against the gradient as it was given, computed by NumPy and integrated by SciPy

# sizes of x that bfloat16 represents, so that they are the same in every dtype
PLACES = torch.tensor([0, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 3.0, 7.5, 15.0, 30.0, 100.0, 512.0])
PLACES = PLACES.bfloat16().double().numpy()
# Allowed errors: of the result, and of the largest result from 0 to this x (at least to 1), whose terms may cancel.
TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-6, 1e-9), torch.bfloat16: (4e-3, 4e-3)}


def values_of(trained, fixed, factor):
    """{symbol: value} to check with: fixed scalars as they are, trained ones `factor` times as far from their bound."""
    values = dict(fixed)
    for symbol, (start, bound) in trained.items():
        distance = 1 if bound is None else start - bound
        values[symbol] = float(np.float32(start + (factor - 1) * distance))  # parameters are float32
    return values


def alphas_of(trained, values, dtype=torch.float64):
    """The trained scalars as tensors."""
    return [torch.tensor(values[symbol], dtype=dtype, requires_grad=True) for symbol in trained]


def results(function, x, alphas):
    """(f, f′, *∂f/∂a) of an activation at x, each ∂f/∂a summed over x."""
    y = function(x.requires_grad_(), *alphas)
    return y.detach(), *torch.autograd.grad(y.sum(), (x, *alphas))


def numeric(formula, size, values):
    """A formula of `size` as a function of an array, with these values of the scalars."""
    compute = sympy.lambdify([size, *values], formula, ["scipy", "numpy"])
    return lambda sizes: compute(sizes, *values.values()) + 0 * sizes  # of the same shape, even if it is constant


def integrals(formula, size, values):
    """The integrals in x of a formula of `size` from 0 to each of PLACES."""
    settings = {"epsabs": 1e-15, "epsrel": 1e-11, "limit": 5000, "full_output": True}
    parts = [quad(numeric(formula, size, values), low, high, **settings)[0] for low, high in zip(PLACES, PLACES[1:])]
    return SIGN[size] * np.cumsum([0, *parts])


def check_finite(gradient, size, values):
    """UserError at the first place on its side where a gradient is not a finite number."""
    places = np.concatenate([PLACES, np.arange(1, 800) / 16])
    wrong = places[~np.isfinite(numeric(gradient, size, values)(places))]
    if len(wrong):
        raise UserError(f"the gradient {show(gradient)} is not a finite number at x = {SIGN[size] * wrong[0]:.6g}")


def check_side(function, gradient, size, trained, values):
    """UserError unless f, f′ and each ∂f/∂a of a side are what its gradient says, in every dtype."""
    expected = {"f": integrals(gradient, size, values), "f′": numeric(gradient, size, values)(PLACES)}
    for symbol in trained:
        expected[f"∂f/∂{symbol}"] = integrals(gradient.diff(symbol), size, values)
    for dtype, (of_result, of_largest) in TOLERANCE.items():
        alphas = alphas_of(trained, values, torch.promote_types(dtype, torch.float32))
        for at in range(size == P, len(PLACES)):  # 0 is on the side of x ≤ 0
            found = results(function, torch.tensor(SIGN[size] * PLACES[at], dtype=dtype), alphas)
            for (name, right), result in zip(expected.items(), found):
                largest = np.abs(right[: max(at + 1, np.sum(PLACES <= 1))]).max()
                # what is right may be NaN, where NumPy overflows
                if not result.isfinite() or abs(result - right[at]) > of_result * abs(right[at]) + of_largest * largest:
                    where = f"in {dtype} at x = {SIGN[size] * PLACES[at]:.6g} instead of {right[at]:.9g}"
                    raise UserError(f"nothing is written: {name} is {result.item():.9g} {where}")


def check_derivatives(function, alphas):
    """UserError unless the gradients are those of the values, and compiling the function changes nothing."""
    x = torch.tensor([-20.0, -3.0, -0.3, -1e-3, 1e-3, 0.4, 5.0], dtype=torch.float64)
    compiled = results(function, x, alphas)
    xielu.COMPILE = False
    try:
        torch.testing.assert_close(compiled, results(function, x, alphas), rtol=1e-6, atol=1e-6)
        torch.autograd.gradcheck(function, (x, *alphas))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"nothing is written: compiled code or gradient: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------------------------
# Reporting


def number_text(number):
    return f"{float(number):.4g}".replace("inf", "∞").replace("-", "−")


def limit_text(formula, size):
    """The limit of a formula far out, as text."""
    with contextlib.suppress(UserError), time_limit("no limit was found"):
        return number_text(sympy.limit(formula, size, sympy.oo))
    return "?"


def report(function, rows, values, alphas):
    """What there is to know of an activation at these values of its scalars, as lines of text."""
    x = torch.arange(-100_000, 100_001, dtype=torch.float64) / 1000
    x = x[x.abs().argsort(stable=True)]
    y = function(x, *alphas).detach()
    lowest = x[y.argmin()]
    minimum = f"f = {number_text(y.min())} at x = {number_text(lowest)}" if abs(lowest) < 100 else "none"
    (right, left), (up, down) = ([formula.subs(values) for formula in pair] for pair in list(rows.values())[:2])
    slopes = dict.fromkeys((number_text(left.subs(M, 0)), number_text(right.subs(P, 0))))  # one, unless it jumps
    return [
        f"With {', '.join(f'{symbol} = {value:.4g}' for symbol, value in values.items()) or 'no scalars'}:",
        f"    gradient at 0    {' on the left, on the right '.join(slopes)}",
        f"    minimum          {minimum}",
        f"    x → −∞           f → {limit_text(down, M)}, f′ → {limit_text(left, M)}",
        f"    x → ∞            f → {limit_text(up, P)}, f′ → {limit_text(right, P)}",
    ]


def draw(function, title, alphas, path):
    """The activation and its gradient at the starting scalars, as far as both sides can be seen."""
    figure, [axes] = new_figure(1, 2, 10, 3.8)
    for low, high in ((-5, 0), (1e-9, 2.5)):  # apart, so that a jump is not drawn as a slope
        x = torch.linspace(low, high, 501, dtype=torch.float64)
        for axis, curve in zip(axes, results(function, x, alphas)):
            axis.plot(x.detach(), curve, linewidth=1.8, **line_style(0))
    for axis, label in zip(axes, ("activation f(x)", "gradient f′(x)")):
        low, high = axis.get_ylim()
        axis.set(xlabel="x", ylabel=label, ylim=(max(low, -3.2), min(high, 3.2)))
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.axvline(0, color="#888888", linewidth=0.8)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------


def read_options(argv):
    """The options of a command line; UserError if a new activation cannot have this name."""
    parser = Parser("python -m tools.derive")
    parser.add_argument("name")
    parser.add_argument("--positive", required=True)
    for option, default in (("--negative", "0"), ("--trained", ""), ("--fixed", "")):
        parser.add_argument(option, default=default)
    parser.add_argument("--allow_jump", action="store_true")
    options = parser.parse_args(argv)
    options.path = FOLDER / f"{options.name}.py"
    if not re.fullmatch(r"[A-Za-z]\w{,50}", options.name, re.ASCII) or options.name in ACTIVATIONS:
        raise UserError(f"{options.name!r} is taken, or not a name: take letters, digits and _, as in my_xielu")
    if options.path.exists():
        raise UserError(f"{options.path} exists: choose another name, or delete it (and the runs made with it)")
    return options


@np.errstate(all="ignore")  # what a check computes may overflow
def derive(argv):
    """Derive, check and write what a command line asks for."""
    options = read_options(argv)
    refuse_windows("tools.derive")
    trained, fixed = read_scalars(options.trained, options.fixed)
    symbols = [*fixed, *trained]
    positive = read_gradient(options.positive, "--positive", P, symbols)
    negative = read_gradient(options.negative, "--negative", M, symbols)
    gradients = [positive, negative]
    used = positive.free_symbols | negative.free_symbols
    bounds = [bound for _, bound in trained.values()]
    unused = [str(symbol) for symbol in symbols if symbol not in used and fixed.get(symbol) not in bounds]
    if unused or gradients == [0, 0]:
        raise UserError(f"neither gradient contains {', '.join(unused) or 'anything but 0'}: use it, or leave it out")
    start = values_of(trained, fixed, 1)
    for gradient, size in zip(gradients, SIGN):
        check_finite(gradient, size, start)
    integrals = [integrate(gradient, size) for gradient, size in zip(gradients, SIGN)]
    if not options.allow_jump:
        check_jump(positive.subs(P, 0), negative.subs(M, 0))
    command = f"python -m tools.derive {shlex.join(argv)}"
    with time_limit("the formulas are too large to be written as code: try a simpler gradient"):
        rows = rows_of(gradients, integrals, trained)
        text = file_text(options.name, command, rows, trained, fixed)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "draft.py")
        draft.write_text(text, "utf-8")
        function = load_derived(draft).module().function
    alphas = alphas_of(trained, start)
    check_derivatives(function, alphas)
    for values in (start, values_of(trained, fixed, 0.3), values_of(trained, fixed, 3)):
        for gradient, size in zip(gradients, SIGN):
            check_side(function, gradient, size, trained, values)
    print(table(rows), *report(function, rows, start, alphas), sep="\n")
    title = ", ".join([options.name, *(f"{show(symbol)} = {value:.4g}" for symbol, value in start.items())])
    picture = options.path.with_suffix(".png")
    draw(function, title, alphas, picture)
    write_atomically(options.path, lambda file: file.write(text.encode()))
    print(f"checked against numerical integration: {options.path}, its figure: {picture}")


def main(argv):
    return run_command(derive, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
