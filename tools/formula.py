"""Gradients as a reader writes them: read as mathematics and never run, integrated, and shown again.

Needs sympy, which does the mathematics. What it is given has been checked here name by name, and what it does is cut
off after a while, since an integral that it cannot find it may seek for ever.
"""

import ast
import builtins
import contextlib
import keyword
import math
import re
import signal
from dataclasses import dataclass

import sympy
from sympy.printing.str import StrPrinter
from torch import nn

from data import UserError
from integral import Integrated

X = sympy.Symbol("x", real=True)
P = sympy.Symbol("p", positive=True)  # x where it is above 0
M = sympy.Symbol("m", positive=True)  # −x where it is not

FUNCTIONS = {
    "exp": sympy.exp,
    "log": sympy.log,
    "sqrt": sympy.sqrt,
    "abs": sympy.Abs,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "atan": sympy.atan,
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "softplus": lambda x: sympy.log(1 + sympy.exp(x)),
    "softsign": lambda x: x / (1 + sympy.Abs(x)),
}
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
LONGEST, DEEPEST, LARGEST, HIGHEST_POWER = 400, 40, 1e6, 12
RANGE = "they go from 1e-6 to 1e6"
# names that the code of a derived file, a module of torch or a line of the log has for other things
TAKEN = set("x p m t torch math value partials positive negative sides split near_zero exp_terms CUT near root".split())
TAKEN |= set("ratio rest within beyond expm1 Integrated Activation ACTIVATION FORMULA Derived start bound".split())
TAKEN |= {*dir(builtins), *dir(Integrated), *vars(nn.Module())}
TAKEN |= set("kind step tokens seconds loss perplexity bits_per_byte".split())


class OutOfTime(BaseException):
    """No Exception, which sympy might catch."""


@contextlib.contextmanager
def time_limit(seconds, message):
    """A UserError with this message if what sympy does inside takes longer, or is more than it can do."""

    def stop(number, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except UserError:
        raise
    except OutOfTime:
        raise UserError(message) from None
    except Exception as error:  # sympy's own faults are of every kind
        raise UserError(f"{message} (sympy says {type(error).__name__})") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Scalar:
    """A trained or fixed scalar. start: its value, or the one it starts from. bound: what a trained one stays above, a
    number, or None; bound_name: that as it was given, "0" or the name of a fixed scalar."""

    name: str
    start: float
    trained: bool = False
    bound: float | None = None
    bound_name: str = ""

    @property
    def symbol(self):
        low = self.bound if self.trained else self.start
        positive = low is not None and (low > 0 or (low == 0 and self.trained))
        return sympy.Symbol(self.name, positive=True) if positive else sympy.Symbol(self.name, real=True)

    @property
    def limit(self):
        """What a trained scalar stays above, what a fixed one is, as text; "" if nothing."""
        return self.bound_name if self.trained else str(self.start)

    @property
    def text(self):
        """As it is given on the command line."""
        if not self.trained:
            return f"{self.name}={self.start!r}"
        return f"{self.name}={self.start!r}" + {"": "~", "0": ""}.get(self.bound_name, f">{self.bound_name}")


def read_name(name):
    """The name of a scalar; UserError if the code could not use it."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError(f"{name!r} is no name for a scalar: take letters, digits and _, as in ap or alpha_n")
    numbered = re.fullmatch(r"(t|near|rest|part|within|beyond|expm1|root|ratio|SERIES)_\d+", name)
    if numbered or name in TAKEN or name in FUNCTIONS:
        raise UserError(f"the name {name!r} is taken by the code that is written: choose another, as a_{name}")
    return name


def read_scalars(trained, fixed):
    """The Scalars of the texts of --trained and --fixed, fixed ones first."""
    scalars = {}
    for is_trained, text in ((False, fixed), (True, trained)):
        for part in filter(None, map(str.strip, text.split(","))):
            name, _, rest = map(str.strip, part.partition("="))
            number, mark, bound_name = re.fullmatch(r"([^>~]*)([>~]?)(.*)", rest, re.S).groups()
            name, bound_name = read_name(name), bound_name.strip()
            try:
                start = float(number)
            except ValueError:
                start = math.nan
            option = "--trained" if is_trained else "--fixed"
            mark, bound_name = ("", "") if bound_name == "0" else (mark, bound_name)
            if not abs(start) <= LARGEST or (mark and not is_trained) or (mark == "~" and bound_name):
                example = "ap=0.8, an=0.8>beta, a=0~" if is_trained else "beta=0.5"
                raise UserError(f"{part!r} in {option} is not understood: it takes scalars as in {example}")
            if name in scalars:
                raise UserError(f"the scalar {name} is there twice")
            if mark == ">" and (bound_name not in scalars or scalars[bound_name].trained):
                raise UserError(f"{part!r}: the bound of {name} must be a scalar of --fixed, not {bound_name!r}")
            if not is_trained:
                scalars[name] = Scalar(name, start)
                continue
            bound = None if mark == "~" else scalars[bound_name].start if mark else 0.0
            if bound is not None and start <= bound:
                shown = f"its bound, {bound_name} = {bound}" if mark else "0"
                raise UserError(f"{name} starts at {start}, which must be above {shown}: softplus is never 0")
            if bound is not None and start > bound + 100:
                raise UserError(f"{name} starts at {start}, more than 100 above its bound: scale the gradient instead")
            scalars[name] = Scalar(name, start, True, bound, "" if mark == "~" else bound_name or "0")
    return list(scalars.values())


def read_gradient(text, scalars, option):
    """(the gradient as a sympy expression in X and the scalars' symbols, its text in Python's spelling)."""
    if len(text) > LONGEST:
        raise UserError(f"{option} has {len(text)} characters: write a formula of at most {LONGEST}")
    if "^" in text:
        raise UserError(f"{option}={text}: write a power with **, as in x**2, not with ^")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{option}={text!r} is no formula, as an*(exp(x) - 1) + beta is") from None
    symbols = {"x": X, "pi": sympy.pi} | {scalar.name: scalar.symbol for scalar in scalars}

    def number(node):
        if type(node.value) not in (int, float) or not 1 / LARGEST <= abs(node.value) <= LARGEST and node.value != 0:
            raise UserError(f"{option}: {ast.unparse(node)} is no number that can be used: {RANGE}")
        return sympy.Rational(str(node.value))

    def read(node, depth):
        if depth > DEEPEST:
            raise UserError(f"{option} is nested more than {DEEPEST} deep: write it shorter")
        match node:
            case ast.Constant():
                return number(node)
            case ast.Name() if node.id in symbols:
                return symbols[node.id]
            case ast.Name():
                function = ": it is a function, write " + node.id + "(x)" if node.id in FUNCTIONS else ""
                known = ", ".join(symbols)
                raise UserError(f"{option}: unknown name {node.id!r}{function or f': known are {known}'}")
            case ast.UnaryOp(op=ast.USub()):
                return -read(node.operand, depth + 1)
            case ast.UnaryOp(op=ast.UAdd()):
                return read(node.operand, depth + 1)
            case ast.BinOp() if type(node.op) in OPERATORS:
                left, right = read(node.left, depth + 1), read(node.right, depth + 1)
                if isinstance(node.op, ast.Pow) and not (right.is_Rational and abs(right) <= HIGHEST_POWER):
                    raise UserError(f"{option}: an exponent must be a number up to {HIGHEST_POWER}; exp(…) has others")
                if isinstance(node.op, ast.Div) and right == 0:
                    raise UserError(f"{option}: {ast.unparse(node)} divides by 0")
                result = OPERATORS[type(node.op)](left, right)
                if result.is_Rational and result != 0 and not 1 / LARGEST <= abs(result) <= LARGEST:
                    raise UserError(f"{option}: {ast.unparse(node)} is no number that can be used: {RANGE}")
                return result
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](read(argument, depth + 1))
            case ast.Call():
                called = ast.unparse(node.func)
                raise UserError(f"{option}: {called!r} is no function of one x: known are {', '.join(FUNCTIONS)}")
        raise UserError(f"{option}: {ast.unparse(node)!r} is not understood: a formula has x, scalars, + - * / **")

    with time_limit(10, f"{option} is too large a formula: write it shorter"):
        gradient = read(tree, 0)
        if gradient.has(sympy.nan, sympy.zoo, sympy.oo, sympy.I):
            raise UserError(f"{option}={text} is not a finite real number anywhere")
        return gradient, ast.unparse(tree)


# ---------------------------------------------------------------------------------------------------------------
# Integrating


@dataclass(frozen=True)
class Side:
    """One half of an activation as formulas of its size (P or M): gradient f′, integral f. sign: +1 for x > 0."""

    sign: int
    size: sympy.Symbol
    gradient: sympy.Expr
    integral: sympy.Expr

    def in_x(self, formula):
        return formula.subs(self.size, self.sign * X)


def integrate(gradient, sign, option):
    """The Side of a gradient in X; UserError where no closed form is found in time."""
    size = P if sign > 0 else M
    gradient = gradient.subs(X, sign * size)
    none = f"{option} has no closed-form integral that could be found: try a simpler gradient"
    with time_limit(30, none):
        for form in (gradient, sympy.expand(gradient)):
            integral = sign * sympy.integrate(form, size)
            unknown = (sympy.Integral, sympy.Piecewise, sympy.RootSum, sympy.I)
            if not integral.has(*unknown):
                at_zero = integral.subs(size, 0)
                integral -= at_zero if at_zero.is_finite else sympy.limit(integral, size, 0, "+")
                known = {sympy.exp, sympy.log, *FUNCTIONS.values(), sympy.asinh, sympy.sinh, sympy.cosh, sympy.tan}
                if all(call.func in known for call in integral.atoms(sympy.Function)):
                    return Side(sign, size, gradient, integral)
    raise UserError(none)


# ---------------------------------------------------------------------------------------------------------------
# Showing

SUPERSCRIPTS = str.maketrans("0123456789-x", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ˣ")
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "pi": "π"}


class LinePrinter(StrPrinter):
    """sympy's text of a formula, with a sum's terms that are subtracted behind the others."""

    def _as_ordered_terms(self, formula, order=None):
        terms = super()._as_ordered_terms(formula, order="grlex")
        return sorted(terms, key=lambda term: term.could_extract_minus_sign())


def show(formula, scalars=()):
    """A formula in one line, as it is written by hand; collected by these symbols."""
    if scalars:
        formula = sympy.collect(sympy.expand_mul(formula), scalars)
    text = LinePrinter().doprint(formula)
    text = re.sub(r"\bexp\((-?x)\)", lambda match: "e" + match[1].translate(SUPERSCRIPTS), text)
    text = re.sub(r"\*\*(\d+)", lambda match: match[1].translate(SUPERSCRIPTS), text)
    text = re.sub(r"\b(" + "|".join(GREEK) + r")\b", lambda match: GREEK[match[1]], text)
    return text.replace("sqrt(", "√(").replace("**", "^").replace("*", "·").replace("-", "−")
