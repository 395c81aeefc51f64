"""Formulas in code that neither cancels nor overflows: what tools/derive.py writes for one side of an activation.

A side is a formula of a size m ≥ 0 (|x|) and of the scalars, such as an·(e⁻ᵐ − 1 + m) − β·m. It is taken apart into

    a polynomial in m   +   terms  factor · mʲ · F(t),   t = rate · m,   F free of scalars

Where Taylor terms of the F cancel against each other or against the polynomial (symbolically: their sum is exactly 0),
the sum is written with the remainders of those F near 0, "rest", which are given by a fitted series, and with the F
themselves beyond. The polynomial's coefficients change with that, so it is taken of `within` and `beyond` apart.
"""

import functools
import re

import mpmath
import sympy
from sympy.printing.pycode import PythonCodePrinter

from data import UserError
from xielu import CUT

T = sympy.Symbol("t", positive=True)
DECAY = sympy.exp(-T)  # the exponential of every side that falls off: integral.exp_terms has its remainders
HIGHEST_ORDER = 6  # of a cancellation that is looked for
EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24}
# torch has these to full precision near 0, where they are 0
EXACT_AT_ZERO = {f(T) for f in (sympy.sin, sympy.tanh, sympy.atan, sympy.erf, sympy.asinh, sympy.sinh)} | {
    sympy.log(1 + T)
}
SQUARE_LOG = sympy.log(1 + T**2)
TORCH_NAMES = "exp log sin cos tan tanh sinh cosh atan asinh erf".split()


# ---------------------------------------------------------------------------------------------------------------
# Taking a formula apart


def canonical(formula, m):
    """The same formula with growing exponentials inside a logarithm turned into falling ones, and with polynomials
    in logarithms and powers starting from 1."""

    def logarithm(inside):
        if inside.func is sympy.Add and len(inside.args) == 2 and inside.args[0] == 1:
            other = inside.args[1]
            if other.func is sympy.exp and (other.args[0] / m).is_positive:
                return other.args[0] + sympy.log(1 + sympy.exp(-other.args[0]))
        start = inside.subs(m, 0)
        if inside.is_polynomial(m) and start.is_positive and start != 1:
            return sympy.log(start) + sympy.log(sympy.expand(inside / start))
        return sympy.log(inside)

    def power(base, exponent):
        base = sympy.factor_terms(base)
        if base.is_Mul and not base.is_number:
            return sympy.Mul(*(power(factor, exponent) for factor in base.args))
        if base.is_Add and base.is_polynomial(m):
            if exponent.is_Integer and exponent > 0:
                return sympy.expand_multinomial(base**exponent)
            start = base.subs(m, 0)
            if start.is_positive and start != 1:
                return start**exponent * sympy.expand(base / start) ** exponent
        return base**exponent

    formula = formula.replace(sympy.log, logarithm).replace(sympy.Pow, power)
    # expand_mul would multiply denominators out as well: they are hidden from it
    powers = [part for part in formula.atoms(sympy.Pow) if part.base.is_Add and not part.exp.is_positive]
    hidden = {part: sympy.Dummy(positive=True) for part in powers}
    expanded = sympy.expand_mul(formula.xreplace(hidden))
    return expanded.xreplace({dummy: part for part, dummy in hidden.items()})


def rate_of(function, m):
    """(rate, F) with function(m) = F(rate·m) and F free of scalars; UserError if there is no such rate."""
    rates = [sympy.Integer(1)]
    for part in sympy.preorder_traversal(function):
        factor, power = part.as_coeff_exponent(m)
        if power.is_positive and not factor.has(m):
            rates.append(sympy.powdenest(abs(factor) ** (1 / power), force=True))
    numbers = [rate for rate in rates if rate.is_number]
    for rate in [max(numbers), *rates]:
        scaled = function.subs(m, T / rate)
        scaled = sympy.powdenest(scaled.doit(), force=True)
        if scaled.free_symbols <= {T}:
            return rate, scaled
    raise UserError(f"{function} depends on its scalars in a way that this tool cannot make accurate near 0")


def take_apart(formula, m):
    """(polynomial, {(F, rate, j): factor}) of a formula."""
    polynomial, terms = sympy.Integer(0), {}
    for term in sympy.Add.make_args(canonical(formula, m)):
        factor, rest = term.as_independent(m, as_Add=False)
        order, function = sympy.Integer(0), sympy.Integer(1)
        for part in sympy.Mul.make_args(rest):
            base, exponent = part.as_base_exp()
            if base == m and exponent.is_number:
                order += exponent
            else:
                function *= part
        if function == 1:
            polynomial += term
            continue
        rate, scaled = rate_of(function, m)
        key = scaled, rate, order
        terms[key] = terms.get(key, 0) + factor
    return polynomial, terms


@functools.cache
def taylor(function):
    """The Taylor coefficients of F at 0 up to HIGHEST_ORDER; none if it has none."""
    coefficients, derivative = [], function
    for k in range(HIGHEST_ORDER + 1):
        value = derivative.subs(T, 0)
        if not value.is_finite:
            return []
        coefficients.append(value / sympy.factorial(k))
        derivative = derivative.diff(T)
    return coefficients


def remainder_degrees(polynomial, terms, m):
    """{(F, rate, j): the order up to which the Taylor terms of F must be left out, −1 for none}: all orders at which
    contributions of the terms and of the polynomial add up to exactly 0."""
    degrees = {key: 0 if key[0] == SQUARE_LOG else -1 for key in terms}
    for k in range(HIGHEST_ORDER + 1):
        contributions = [(polynomial.coeff(m, k), None, 0)]
        for key, factor in terms.items():
            function, rate, order = key
            inner = k - order
            if inner.is_Integer and 0 <= inner < len(taylor(function)):
                contributions.append((factor * taylor(function)[inner] * rate**inner, key, inner))
        parts = {}  # by what they have of the scalars
        for value, key, inner in contributions:
            for part in sympy.Add.make_args(sympy.expand(value)):
                if part != 0:
                    number, scalars = part.as_independent(*part.free_symbols, as_Add=False)
                    parts.setdefault(scalars, []).append((number, key, inner))
        for found in parts.values():
            total = sum(number for number, _, _ in found)
            if len(found) > 1 and abs(sympy.N(total, 40)) < 1e-30:
                for _, key, inner in found:
                    if key:
                        degrees[key] = max(degrees[key], int(inner))
    return degrees


def first_order(function, degree):
    """The order of the first Taylor term of F beyond `degree`."""
    return next(k for k, value in enumerate(taylor(function)) if k > degree and value != 0)


@functools.cache
def fit(function, order):
    """{dtype: coefficients c} with F(t) less its Taylor terms below t^order = t^order·(c₀ + c₁·t + …) for 0 ≤ t ≤ CUT,
    to a quarter of an ulp of each dtype: interpolated at Chebyshev nodes."""
    with mpmath.workdps(60):
        exact = sympy.lambdify(T, function, "mpmath")
        known = [mpmath.mpf(sympy.N(value, 60)) for value in taylor(function)[order - 1 :: -1]]

        def remainder(t):
            return (exact(t) - mpmath.polyval(known, t)) / t**order

        smallest = min(abs(remainder(mpmath.mpf(CUT) * k / 8)) for k in range(1, 9))
        found = {}
        for dtype, epsilon in EPSILON.items():
            for count in range(3, 33):
                coefficients, error = mpmath.chebyfit(remainder, [0, CUT], count, error=True)
                if error < epsilon / 2 * smallest:
                    found[dtype] = [float(c) for c in reversed(coefficients)]
                    break
            else:
                raise UserError(f"{function} has no short series near t = 0: this tool cannot make it accurate there")
    return found


# ---------------------------------------------------------------------------------------------------------------
# Writing it down


class TorchPrinter(PythonCodePrinter):
    """Python for tensors and scalars; what holds numbers and fixed names alone goes to the math module."""

    def __init__(self, fixed):
        super().__init__({"fully_qualified_modules": True})
        self.fixed = fixed

    def _print_Function(self, call):
        name = call.func.__name__
        if name not in TORCH_NAMES or len(call.args) != 1:
            raise UserError(f"the integral needs {name}(…), which torch cannot compute and differentiate everywhere")
        inside = call.args[0]
        if {symbol.name for symbol in inside.free_symbols} <= self.fixed:
            return f"math.{name}({self._print(inside)})"
        if name == "log" and (less := inside - 1).could_extract_minus_sign() is False and not less.is_number:
            return f"torch.log1p({self._print(less)})"
        return f"torch.{name}({self._print(inside)})"

    _print_log = _print_exp = _print_sin = _print_cos = _print_tan = _print_Function
    _print_tanh = _print_sinh = _print_cosh = _print_atan = _print_asinh = _print_erf = _print_Function

    def _print_Pow(self, power, rational=False):
        base, exponent = power.as_base_exp()
        if exponent in (sympy.Rational(1, 2), -sympy.Rational(1, 2)) and base.free_symbols:
            square = (base - 1).as_independent(*base.free_symbols)[1] if base.func is sympy.Add else None
            is_fixed = {symbol.name for symbol in base.free_symbols} <= self.fixed
            root = f"{'math' if is_fixed else 'torch'}.sqrt({self._print(base)})"
            if square is not None and square.is_Pow and square.exp == 2 and not is_fixed:
                size = self._print(sympy.sqrt(base - 1))  # √(1 + t²), of a t whose square would overflow
                root = f"torch.hypot({size}, torch.ones_like({size}))"
            return root if exponent > 0 else f"1/{root}"
        return super()._print_Pow(power, rational=rational)


class Writer:
    """Collects the lines of a function of code, and the series that all functions of a file need."""

    def __init__(self, scalars, series):
        self.printer = TorchPrinter({scalar.name for scalar in scalars if not scalar.trained})
        self.series = series  # {(F, degree): name}, shared by all functions of a file
        self.lines = []
        self.names = {}  # {what it is: its name}

    def text(self, formula):
        return re.sub(r"(?<!\*)([*/])(?!\*)", r" \1 ", self.printer.doprint(formula))

    def name(self, what, wish, line=None):
        """The symbol of a line's result; the line is written when it is first needed."""
        if what not in self.names:
            taken = set(self.names.values())
            number = next(n for n in range(1, 99) if (wish if n == 1 else f"{wish}_{n}") not in taken)
            self.names[what] = wish if number == 1 else f"{wish}_{number}"
            if line:
                self.lines.append(f"{self.names[what]} = {line}")
        return sympy.Symbol(self.names[what], positive=True)

    def exp_parts(self, t):
        """The symbols of E, rest, within, beyond of e⁻ᵗ."""
        new = ("expm1", t) not in self.names
        parts = [self.name((wish, t), wish) for wish in ("expm1", "rest", "within", "beyond")]
        if new:
            self.lines.append(f"{', '.join(part.name for part in parts)} = exp_terms({t}, x.dtype)")
        return parts

    def near(self, sizes):
        """What says that all of these t are near 0."""
        return " & ".join(str(self.name(("near", t), "near", f"{t} < CUT")) for t in sizes)

    def halves(self, t, near):
        """The symbols of the part of t that is near 0 and of the part beyond."""
        new = ("within", t, near) not in self.names
        parts = [self.name((wish, t, near), wish) for wish in ("within", "beyond")]
        if new:
            self.lines.append(f"{parts[0]}, {parts[1]} = split({t}, {near})")
        return parts

    def rest(self, function, degree, t, near, whole):
        """The symbol of F(t) less F(0), or if `whole` of F(t); near 0 less its Taylor terms up to `degree`."""
        order = first_order(function, degree)
        series = self.series.setdefault((function, order), f"SERIES_{len(self.series) + 1}")
        text = self.text(function.subs(T, t) - (0 if whole else taylor(function)[0]))
        if function == SQUARE_LOG:  # whose t² would overflow
            text = f"2*torch.log(torch.hypot({t}, torch.ones_like({t})))"
        line = f"torch.where({near}, near_zero({t}, {order}, {series}), {text})"
        return self.name((function, order, t, near, whole), "rest", line)

    def write(self, formula, m):
        """The code of a formula of m; what it needs before is added to the lines."""
        polynomial, terms = take_apart(formula, m)
        degrees = remainder_degrees(polynomial, terms, m)
        sizes = {}
        for _, rate, _ in terms:
            sizes[rate] = m if rate == 1 else self.name(("t", rate, m), "t", self.text(rate * m))
        # the terms for which the polynomial is another one near 0 than beyond
        changing = [key for key, degree in degrees.items() if degree > 0 or (degree == 0 and key[2] > 0)]
        by_exp = len(changing) == 1 and changing[0] == (DECAY, changing[0][1], 0) and degrees[changing[0]] == 1
        near = "" if by_exp else self.near({sizes[rate]: None for _, rate, _ in changing})
        total, within, beyond = 0, polynomial, polynomial
        for key, factor in terms.items():
            (function, rate, order), degree = key, degrees[key]
            t, factor, whole = sizes[rate], factor * m**order, order > 0
            left_out = [value * (rate * m) ** k for k, value in enumerate(taylor(function)[: degree + 1])]
            within += factor * sum(left_out)
            beyond += 0 if whole else factor * sum(left_out[:1])
            if function == DECAY and (degree < 0 or (degree == 0 and not whole) or by_exp):
                expm1, rest, _, _ = self.exp_parts(t)
                total += factor * [expm1 + 1, expm1, rest][degree + 1]
            elif degree < 0 or (degree == 0 and function in EXACT_AT_ZERO):
                total += factor * function.subs(T, t)
            else:
                condition = near if key in changing else self.near([t])
                total += factor * self.rest(function, degree, t, condition, whole)
        common, within, beyond = separate(within, beyond, m)
        formula = total + nested(common, m)
        if within or beyond:
            rate = changing[0][1]
            t = sizes[rate]
            near_part, far_part = self.exp_parts(t)[2:] if by_exp else self.halves(t, near)
            formula += nested(within.subs(m, near_part / rate), near_part)
            formula += nested(beyond.subs(m, far_part / rate), far_part)
        return self.text(formula)


def separate(within, beyond, m):
    """(what two polynomials in m have in common, the rest of the first, the rest of the second), power by power."""
    first, second = (sympy.collect(sympy.expand(part), m, evaluate=False) for part in (within, beyond))
    common = [power for power in first if sympy.expand(first[power] - second.get(power, 0)) == 0]
    parts = [sum((first[power] * power for power in common), sympy.Integer(0))]
    for part in (first, second):
        parts.append(sum((part[power] * power for power in part if power not in common), sympy.Integer(0)))
    return parts


def nested(polynomial, m):
    """A polynomial in Horner's form, so that no power overflows before its coefficient is met."""
    polynomial = sympy.expand(polynomial)
    return sympy.horner(polynomial, wrt=m) if polynomial.has(m) and polynomial.is_polynomial(m) else polynomial
