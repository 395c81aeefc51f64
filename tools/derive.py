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
import types
from pathlib import Path

import numpy as np
import sympy  # torch needs it too
import torch
from scipy.integrate import fixed_quad
from sympy.codegen.cfunctions import expm1, log1p

if not __package__:
    print("error: start it as  python -m tools.derive", file=sys.stderr)
    sys.exit(2)

import xielu
from activations import ACTIVATIONS, curve
from plumbing.command import Parser, UserError, program, refuse_windows
from plumbing.files import write_atomically
from plumbing.machine import mend_compiler_cache, say
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
# names that the written file, or a line of the log, uses for something else
TAKEN = {*"x p m pi torch rows apply dtype number numbers fused Activation ACTIVATION Integral".split()}
TAKEN |= {*"kind step tokens seconds loss perplexity bits_per_byte".split(), *FUNCTIONS, *keyword.kwlist}


def read_scalars(text, bounds, taken=()):
    """{symbol: (start, bound)} of a text such as "ap=0.8, an=0.8>beta". bounds: {mark behind the number: bound, or None
    for none}. UserError if the text makes no sense."""
    scalars = {}
    marks = "|".join(map(re.escape, bounds)).replace(">", "> *")
    for part in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(rf"([A-Za-z]\w*) *= *([-+]?{NUMBER}) *({marks})", part, re.ASCII)
        if not match:
            hint = "trained are ap=0.8, a=0~ and, above a scalar of --fixed, an=0.8>beta; fixed are beta=0.5"
            raise UserError(f"{part!r} is not understood: {hint}")
        name, start, bound = match[1], float(match[2]), bounds[match[3].replace(" ", "")]
        if name in TAKEN or name in map(str, [*scalars, *taken]):
            raise UserError(f"the name {name} is taken, or given twice: choose another")
        if bound is not None and not bound < start <= bound + 100:
            raise UserError(f"{name} starts at {start}, which must be above {bound}, by 100 at most")
        # to know that a scalar is positive helps to find integrals
        positive = start > 0 and match[3] != "~" and (bound or 0) >= 0
        scalars[sympy.Symbol(name, **{"positive" if positive else "real": True})] = start, bound
    return scalars


def read_gradient(text, option, size, symbols):
    """The text as a sympy expression in `size` and the symbols; UserError if it is not a formula. sympy evaluates what
    it parses, so it only gets to see numbers, operators and the names of this file."""
    names = {"x": X, "pi": sympy.pi} | {str(symbol): symbol for symbol in symbols} | FUNCTIONS
    known = re.match(rf"(?:[ +\-*/()]|{NUMBER}(?![\w.])|(?:{'|'.join(names)})(?!\w))*", text, re.ASCII)
    if unknown := text[known.end() :]:
        raise UserError(f"{option}: {unknown[:30]!r} is not understood: known are {', '.join(names)}, + - * / ** ( )")
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
        integral = SIGN[size] * sympy.integrate(gradient, size)
        at_zero = integral.subs(size, 0)
        integral -= at_zero if at_zero.is_finite else sympy.limit(integral, size, 0, "+")
    in_torch = all(hasattr(torch, call.func.__name__.lower()) for call in integral.atoms(sympy.Function))
    if not in_torch or integral.has(sympy.Integral, sympy.Piecewise, sympy.RootSum, sympy.I, sympy.oo):
        raise UserError(none)
    exponent = sympy.Wild("exponent")
    return integral.replace(sympy.log(1 + sympy.exp(exponent)), -logsigmoid(-exponent))


def collected(formula):
    """The formula as a sum with one term for each scalar."""
    return sympy.collect(sympy.expand_mul(formula), sorted(formula.free_symbols - {P, M}, key=str))


def rows_of(gradients, integrals, trained):
    """{"gradient f′": pair, "integral f": pair, "∂f/∂a": pair for each trained symbol a}."""
    derivatives = {f"∂f/∂{show(symbol)}": [f.diff(symbol) for f in integrals] for symbol in trained}
    rows = {"integral f": integrals, **derivatives}
    return {"gradient f′": gradients} | {name: [*map(collected, pair)] for name, pair in rows.items()}


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


def table(lines):
    """Lines, each a list of texts, as one text in columns."""
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


def file_text(name, command, rows, shown, trained, fixed):
    """The text of a derived file. rows: {name: pair of formulas}; shown: the same as lines for `table`."""
    slope, f, *others = [f"torch.where(p > 0, {code(pair[0], P)}, {code(pair[1], M)})," for pair in rows.values()]
    lines = "\n        ".join([f, slope, *others])
    scalars = {str(symbol): numbers for symbol, numbers in trained.items()}
    names = "".join(f", {name}" for name in scalars)
    constants = [f"{symbol} = {number!r}" for symbol, number in fixed.items()]
    bounds = [f"{name} > {bound}" for name, (_, bound) in scalars.items() if bound is not None]
    _, positive, negative = shown[2]
    # a run knows its activation by this text
    formula = ", ".join([f"{positive} for x > 0", f"{negative} for x ≤ 0", *constants, *bounds])
    tensors = "".join(f"\n    {symbol} = p.new_full((), {number!r})" for symbol, number in fixed.items())
    return f'''"""{name}: the integral of a gradient, written by

    {command}

{table(shown)}
"""

import torch

from activations import Activation, Integral, fused


def rows(x{names}):
    """f(x), f′(x), and ∂f/∂a for each trained scalar a, from p = max(x, 0) and m = max(−x, 0). They are computed in
    float64, so that what cancels near 0 leaves enough digits; for bfloat16, whose own rounding is coarser, and on
    Apple's GPUs, which have no float64, in float32."""
    dtype = torch.float32 if x.dtype.itemsize == 2 or x.device.type == "mps" else torch.float64
    p, m{names} = (number.to(dtype) for number in (torch.relu(x), torch.relu(-x){names})){tensors}
    return (
        {lines}
    )


apply = fused(rows)
ACTIVATION = Activation("{formula}", lambda: Integral(apply, {scalars}))
'''


# ---------------------------------------------------------------------------------------------------------------
# Checking, against the gradient as it was given, computed by NumPy and integrated by SciPy

# Sizes of x that bfloat16 represents, so that they are the same in every dtype
PLACES = [torch.tensor([0, 1e-6, 1e-4, 1e-2]).bfloat16().double(), torch.arange(1, 256) / 16, torch.arange(16, 514, 2)]
PLACES = torch.cat(PLACES).numpy()
# Allowed errors, relative to |result| plus the largest |result| up to this |x| or 1, since its terms may cancel
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 4e-3}


def numeric(formula, size, values):
    """A formula of `size` as a function of an array, with these values of the scalars."""
    compute = sympy.lambdify([size, *values], formula, ["scipy", "numpy"])
    return lambda sizes: compute(sizes, *values.values()) + 0 * sizes  # of the same shape, even if it is constant


def integral_of(formula, size, values):
    """The integrals in x of a formula of `size` from 0 to each of PLACES."""
    function = numeric(formula, size, values)
    parts = [fixed_quad(function, *ends, n=32)[0] for ends in zip(PLACES, PLACES[1:])]
    return SIGN[size] * np.cumsum([0, *parts])


def check_row(name, right, result, size, dtype):
    """UserError unless a tensor of results at PLACES on one side is right."""
    result = result.to(dtype).double().numpy()
    largest = np.fmax.accumulate(np.fmax(abs(right), np.nanmax(abs(right[PLACES <= 1]))))
    # what is right may be NaN, where NumPy overflows
    wrong = ~np.isfinite(result) | (abs(result - right) > TOLERANCE[dtype] * (abs(right) + largest))
    wrong[0] &= size == M  # 0 is on the side of x ≤ 0
    if wrong.any():
        at = wrong.argmax()
        where = f"in {dtype} at x = {SIGN[size] * PLACES[at]:.6g} instead of {right[at]:.9g}"
        raise UserError(f"nothing is written: {name} is {result[at]:.9g} {where}")


@torch.no_grad()
def check_values(draft, gradients, trained, fixed, shift):
    """UserError unless f′, f and each ∂f/∂a are what the gradients say: on both sides, in every dtype, compiled or not,
    with the raw scalars `shift` from their start."""
    module = draft.ACTIVATION.module().double()
    for raw in module.parameters():
        raw += shift
    scalars = module.effective_scalars().values()
    values = fixed | {symbol: scalar.item() for symbol, scalar in zip(trained, scalars)}
    for size, gradient in zip(SIGN, gradients):
        expected = {"f": integral_of(gradient, size, values), "f′": numeric(gradient, size, values)(PLACES)}
        expected |= {f"∂f/∂{symbol}": integral_of(gradient.diff(symbol), size, values) for symbol in trained}
        for dtype in TOLERANCE:
            x = torch.tensor(SIGN[size] * PLACES, dtype=dtype)
            # as it is, and compiled
            for found in (draft.rows(x, *scalars), xielu.in_one_pass(draft.rows, x, *scalars)):
                for (name, right), result in zip(expected.items(), found):
                    check_row(name, right, result, size, dtype)


# ---------------------------------------------------------------------------------------------------------------
# Reporting


def numbers_of(module):
    """f and f′ at some x, as lines for `table`."""
    x = torch.tensor([-100, -10, -3, -1, -0.1, 0, 0.1, 1, 10], dtype=torch.float64)
    rows = zip(("x", "f(x)", "f′(x)"), (x, *curve(module, x)))
    return [[name, *(f"{number:.4g}".replace("-", "−") for number in numbers)] for name, numbers in rows]


def draw(module, title, path):
    """The activation and its gradient."""
    figure, [axes] = new_figure(1, 2, 10, 3.8)
    x = torch.linspace(-4, 2, 1200, dtype=torch.float64)
    for axis, label, y in zip(axes, ("activation f(x)", "gradient f′(x)"), curve(module, x)):
        for side in (x <= 0, x > 0):  # apart, so that a jump is not drawn as a slope
            axis.plot(x[side], y[side], linewidth=1.8, **line_style(0))
        axis.set(xlabel="x", ylabel=label)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")  # what a check computes may overflow
def derive(argv):
    """Derive, check and write what a command line asks for."""
    refuse_windows("tools.derive")
    parser = Parser("python -m tools.derive")
    parser.add_argument("name")
    parser.add_argument("--positive", required=True)
    for option, default in (("--negative", "0"), ("--trained", ""), ("--fixed", "")):
        parser.add_argument(option, default=default)
    parser.add_argument("--allow_jump", action="store_true")
    options = parser.parse_args(argv)
    name, path = options.name, FOLDER / f"{options.name}.py"
    if not re.fullmatch(r"[A-Za-z]\w{,50}", name, re.ASCII) or name in ACTIVATIONS:
        raise UserError(f"{name!r} is taken, or not a name: take letters, digits and _, as in my_xielu")
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or delete it (and the runs made with it)")
    fixed = {symbol: value for symbol, (value, _) in read_scalars(options.fixed, {"": None}).items()}
    bounds = {"": 0.0, "~": None} | {f">{symbol}": value for symbol, value in fixed.items()}
    trained = read_scalars(options.trained, bounds, fixed)
    values = fixed | {symbol: start for symbol, (start, _) in trained.items()}
    positive = read_gradient(options.positive, "--positive", P, values)
    negative = read_gradient(options.negative, "--negative", M, values)
    if unused := {*map(str, trained)} - {*map(str, positive.free_symbols | negative.free_symbols)}:
        raise UserError(f"neither gradient contains {', '.join(sorted(unused))}: use it, or leave it out")
    gradients = [positive, negative]
    for gradient, size in zip(gradients, SIGN):
        wrong = PLACES[~np.isfinite(numeric(gradient, size, values)(PLACES))]
        if len(wrong):
            raise UserError(f"the gradient {show(gradient)} is not a finite number at x = {SIGN[size] * wrong[0]:.6g}")
    say(f"integrating the gradient, for at most {SECONDS} seconds on each side")
    integrals = [integrate(gradient, size) for gradient, size in zip(gradients, SIGN)]
    right, left = positive.subs(P, 0), negative.subs(M, 0)
    with time_limit("the formulas are too large to be written as code: try a simpler gradient"):
        jump = sympy.simplify(right - left)
        rows = rows_of(gradients, integrals, trained)
        shown = [("", "x > 0", "x ≤ 0"), *((row, *map(show, pair)) for row, pair in rows.items())]
        text = file_text(name, f"python -m tools.derive {shlex.join(argv)}", rows, shown, trained, fixed)
    if jump != 0 and not options.allow_jump:
        sides = f"from {show(left)} on the left to {show(right)} on the right"
        raise UserError(f"the gradient jumps at 0, {sides}: let the two sides meet, or say --allow_jump")
    draft = sys.modules["draft"] = types.ModuleType("draft")  # torch.compile looks for the functions' globals there
    exec(text, vars(draft))
    say("checking its code, compiled and not, against numerical integration")
    mend_compiler_cache()
    for shift in (0, -1.2, 1.2):
        check_values(draft, gradients, trained, fixed, shift)
    module = draft.ACTIVATION.module().double()
    start = ", ".join(f"{show(symbol)} = {value:.4g}" for symbol, value in values.items()) or "no scalars"
    say(f"{table(shown)}\nwith {start}:\n{table(numbers_of(module))}")
    draw(module, f"{name}, {start}", path.with_suffix(".png"))
    write_atomically(path, lambda file: file.write(text.encode()))
    say(f"{path} is written, its figure beside it. To train it:")
    say(f"python train.py configs/demo.py --activation={path} --out=out/{name}")


main = program(derive)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
