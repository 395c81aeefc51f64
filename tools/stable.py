"""Formulas in code that neither cancels nor overflows: what tools/derive.py writes for one side of an activation.

A side is a formula of a size m ≥ 0 (|x|) and of the scalars, such as an·(e⁻ᵐ − 1 + m) − β·m. It is taken apart into

    a polynomial in m   +   parts  factor · G(t),   t = rate · m,   G free of scalars, as e⁻ᵗ

Where the lowest Taylor terms of a G cancel against the polynomial (or those of its own summands against each other),
the part is written as `rest`: near 0, G without those terms, from a fitted series; beyond, G itself. What the
polynomial has to make up for differs then, so it is written of `within` (m near 0, else 0) and of `beyond` (m beyond,
else 0).
"""

import functools
import re
from dataclasses import dataclass

import mpmath
import sympy
from sympy.printing.pycode import PythonCodePrinter

from data import UserError
from xielu import CUT  # below it, eˣ − 1 − x is taken from a series; so is what cancels as little here

T = sympy.Symbol("t", positive=True)
DECAY = sympy.exp(-T)  # integral.exp_terms has its parts
SQUARE_LOG = sympy.log(1 + T**2)  # whose t² overflows
ROOTS = {1 + T: 1, 1 + T**2: 2}  # and their degrees
# torch has these to full precision near 0, where they are 0
EXACT_AT_ZERO = {f(T) for f in (sympy.sin, sympy.tanh, sympy.atan, sympy.erf, sympy.sinh, sympy.asinh)}
EXACT_AT_ZERO |= {sympy.log(1 + T)}
TORCH_NAMES = "exp log sin cos tan tanh sinh cosh atan asinh erf".split()
HIGHEST_ORDER = 8  # of a cancellation that can be mended
EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24}

# ---------------------------------------------------------------------------------------------------------------
# Taking a formula apart


@dataclass(frozen=True)
class Part:
    """factor · G(rate · m). summands: those of G, as (number, order, F) each for number · t^order · F(t). degree: up to
    which its Taylor terms are left out near 0, −1 for none. whole: beyond, it is G, else G − G(0)."""

    factor: sympy.Expr
    rate: sympy.Expr
    summands: tuple
    degree: int = -1
    whole: bool = True

    @property
    def function(self):
        return sum(number * T**order * function for number, order, function in self.summands)

    @property
    def is_(self):
        """The F of a G that is just that; else None."""
        (number, order, function), *others = self.summands
        return function if not others and number == 1 and order == 0 else None

    def left_out(self, m):
        """What is left out near 0, and beyond, as polynomials in m."""
        terms = [taylor(self.function, k) * (self.rate * m) ** k for k in range(self.degree + 1)]
        return self.factor * sum(terms), 0 if self.whole else self.factor * sum(terms[:1])

    @property
    def order(self):
        """The order of the first Taylor term that is not left out."""
        return next(k for k in range(self.degree + 1, HIGHEST_ORDER + 4) if taylor(self.function, k) != 0)

    @property
    def cut(self):
        """Where t is near 0: the more orders cancel, the further it reaches."""
        return {1: CUT, 2: CUT, 3: 2 * CUT}.get(self.order, 4 * CUT)


def canonical(formula, m):
    """The same formula with growing exponentials inside a logarithm turned into falling ones, and with polynomials
    in logarithms and powers starting from 1."""

    def logarithm(inside):
        if inside.is_Add and len(inside.args) == 2 and inside.args[0] == 1:
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
        scaled = falling(sympy.powdenest(function.subs(m, T / rate), force=True))
        if scaled.free_symbols <= {T}:
            return rate, scaled
    raise UserError(f"{function} depends on its scalars in a way that this tool cannot make accurate near 0")


def falling(function):
    """F with eᵗ, which may overflow, written by e⁻ᵗ where F is rational in it and does not grow."""
    e = sympy.Dummy()
    by_decay = function.subs(sympy.exp(T), 1 / e).subs(DECAY, e)
    if not function.has(sympy.exp(T)) or by_decay.has(T):
        return function
    above, below = sympy.fraction(sympy.cancel(by_decay))
    return (above / sympy.factor(below)).subs(e, DECAY) if below.subs(e, 0) != 0 else function


def take_apart(formula, m):
    """(polynomial, list of Parts) of a formula."""
    polynomial, found = sympy.Integer(0), []
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
        for piece in sympy.Add.make_args(sympy.expand(factor / rate**order)):
            number, symbols = piece.as_independent(*piece.free_symbols, as_Add=False)
            found.append((symbols, rate, number, order, scaled))
    groups = {}
    for symbols, rate, number, order, function in found:
        rates = {other[1] for other in found if other[0] == symbols}
        if len(rates) > 1 and all(other.is_number for other in rates):  # e⁻ᵐ and e⁻²ᵐ are one G of m
            number, function, rate = number * rate**order, function.subs(T, rate * T), sympy.Integer(1)
        summands = groups.setdefault((symbols, rate), {})
        summands[order, function] = summands.get((order, function), 0) + number
    parts = []
    for (symbols, rate), summands in groups.items():
        by_order = {}
        for (order, function), number in summands.items():
            by_order.setdefault(order, []).append(number * function)
        summands = []
        for order, functions in by_order.items():
            if any(function.has(sympy.tanh) for function in functions):  # of which sympy leaves more than there is
                functions = [sympy.simplify(sum(functions))]
            for function in functions:
                number, function = function.as_independent(T, as_Add=False)
                summands += [(number, order, function)] if number != 0 else []
        if len(summands) == 1:  # its number belongs to the factor
            symbols, summands = symbols * summands[0][0], [(sympy.Integer(1), *summands[0][1:])]
        if summands:
            parts.append(with_degree(Part(symbols, rate, tuple(summands)), polynomial, m))
    return polynomial, parts


@functools.cache
def derivative(function, k):
    return derivative(function, k - 1).diff(T) if k else function


@functools.cache
def taylor(function, k):
    """The k-th Taylor coefficient of G at 0; None if it has none."""
    value = derivative(function, k).subs(T, 0)
    if not value.is_finite:
        return None
    return sympy.Integer(0) if abs(sympy.N(value, 40)) < 1e-30 else value / sympy.factorial(k)


def with_degree(part, polynomial, m):
    """The part with the degree up to which it must be left out near 0: all orders, from the lowest, at which its Taylor
    term and the polynomial's add up to exactly 0, or the terms of its summands do."""
    degree = 0 if any(function == SQUARE_LOG for _, _, function in part.summands) else -1
    whole = True
    for k in range(HIGHEST_ORDER):
        own = taylor(part.function, k)
        if own is None:
            return part
        summands = [taylor(f, k - n) for _, n, f in part.summands if n.is_Integer and n <= k]
        if not any(summands):
            continue
        scale = part.factor * part.rate**k
        given = [term for term in sympy.Add.make_args(sympy.expand(polynomial.coeff(m, k))) if is_multiple(term, scale)]
        if abs(sympy.N(sum(given) / scale + own, 40)) > 1e-30:
            return Part(part.factor, part.rate, part.summands, degree, whole)
        degree = k
        whole = whole and not (k == 0 and given)
    raise UserError("the terms of the integral cancel near 0 to a high order: try a simpler gradient")


def is_multiple(term, other):
    """Whether a term of a polynomial is a number times another."""
    return term != 0 and sympy.powdenest(term / other, force=True).is_number


@functools.cache
def fit(function, order, cut):
    """{dtype: coefficients c} with G(t) less its Taylor terms below t^order = t^order·(c₀ + c₁·u + …), u = t − cut/2,
    for 0 ≤ t ≤ cut, to a quarter of an ulp of each dtype: interpolated at Chebyshev nodes."""
    with mpmath.workdps(60):
        exact = sympy.lambdify(T, function, "mpmath")
        known = [mpmath.mpf(sympy.N(taylor(function, k), 60)) for k in reversed(range(order))]
        middle = mpmath.mpf(cut) / 2

        def remainder(u):
            t = u + middle
            return (exact(t) - mpmath.polyval(known, t)) / t**order

        smallest = min(abs(remainder(middle * k / 8)) for k in range(-7, 9))
        found = {}
        for dtype, epsilon in EPSILON.items():
            for count in range(3, 37):
                coefficients, error = mpmath.chebyfit(remainder, [-middle, middle], count, error=True)
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

    def __init__(self, scalars):
        super().__init__({"fully_qualified_modules": True})
        self.scalars = {scalar.name for scalar in scalars}
        self.fixed = {scalar.name for scalar in scalars if not scalar.trained}

    def _as_ordered_terms(self, formula, order=None):
        terms = super()._as_ordered_terms(formula, order=order)
        return sorted(terms, key=lambda term: term.could_extract_minus_sign())

    def is_fixed(self, formula):
        return {symbol.name for symbol in formula.free_symbols} <= self.fixed

    def _print_Function(self, call):
        name = call.func.__name__
        if name not in TORCH_NAMES or len(call.args) != 1:
            raise UserError(f"the integral needs {name}(…), which torch cannot compute and differentiate everywhere")
        inside = call.args[0]
        if self.is_fixed(inside):
            return f"math.{name}({self._print(inside)})"
        if name == "log" and inside.is_Add and 1 in inside.args:
            return f"torch.log1p({self._print(inside - 1)})"
        return f"torch.{name}({self._print(inside)})"

    _print_log = _print_exp = _print_sin = _print_cos = _print_tan = _print_Function
    _print_tanh = _print_sinh = _print_cosh = _print_atan = _print_asinh = _print_erf = _print_Function

    def _print_Pow(self, power, rational=False):
        base, exponent = power.as_base_exp()
        if base.is_Symbol and base.name not in self.scalars and exponent in (2, 3):
            # a·p·p from the left: p² may overflow where a·p² does not
            return "*".join([base.name] * int(exponent))
        if abs(exponent) == sympy.Rational(1, 2) and not self.is_fixed(base):
            square = base - 1
            root = f"torch.sqrt({self._print(base)})"
            if square.is_Pow and square.exp == 2:  # √(1 + t²), of a t² that would overflow
                root = hypotenuse(self._print(square.base))
            return root if exponent > 0 else f"1/{root}"
        return super()._print_Pow(power, rational=rational)


def hypotenuse(t):
    """The code of √(t² + 1)."""
    return f"torch.hypot({t}, torch.ones_like({t}))"


class Writer:
    """Collects the lines of a function of code, and the series that all functions of a file need."""

    def __init__(self, scalars, series):
        self.printer = TorchPrinter(scalars)
        self.series = series  # {(G, order, cut): name}, shared by all functions of a file
        self.lines = []
        self.names = {}  # {what it is: its name}

    def text(self, formula):
        return re.sub(r"(?<!\*)([*/])(?!\*)", r" \1 ", self.printer.doprint(formula))

    def name(self, what, wish, line=None):
        """The symbol of a line's result; the line is written when it is first needed."""
        if what not in self.names:
            taken = set(self.names.values())
            self.names[what] = next(n for n in (wish, *(f"{wish}_{k}" for k in range(2, 99))) if n not in taken)
            if line:
                self.lines.append(f"{self.names[what]} = {line}")
        return sympy.Symbol(self.names[what], positive=True)

    def unpack(self, wishes, what, line):
        """The symbols of a line with several results."""
        new = (wishes[0], what) not in self.names
        symbols = [self.name((wish, what), wish) for wish in wishes]
        if new:
            self.lines.append(f"{', '.join(map(str, symbols))} = {line}")
        return symbols

    def exp_parts(self, t):
        """The symbols of E, rest, within, beyond of e⁻ᵗ."""
        return self.unpack(("expm1", "rest", "within", "beyond"), t, f"exp_terms({t}, x.dtype)")

    def near(self, sizes, cut):
        """What says that all of these t are near 0."""
        return " & ".join(str(self.name(("near", t, cut), "near", f"{t} < {cut}")) for t in sizes)

    def summand(self, number, order, function, t):
        """The code of number · t^order · F(t). Powers of t come last, so that what falls has met what grows."""
        if (
            function.is_Pow
            and function.exp.is_negative
            and function.base in ROOTS
            and (order or function.base != 1 + T)
        ):
            text = self.by_root(function, order, t)
        else:
            text = f"2 * torch.log({hypotenuse(t)})" if function == SQUARE_LOG else self.text(function.subs(T, t))
            text = f"({text})" if function.is_Add or " / " in text else text
            text += f" * {t}" * order if order.is_Integer else f" * {t}**({self.text(order)})"
        return text if number == 1 else f"-{text}" if number == -1 else f"{self.text(number)} * {text}"

    def by_root(self, function, order, t):
        """The code of t^order times a negative power of 1 + t or 1 + t², by t/(1 + t) or t/√(1 + t²)."""
        line = f"{t} + 1" if function.base == 1 + T else hypotenuse(t)
        root = self.name(("root", function.base, t), "root", line)
        power = -function.exp * ROOTS[function.base]
        shared = min(order, power)
        ratio = self.name(("ratio", root, t), "ratio", f"{t} / {root}") if shared else 1
        return self.text(ratio**shared * root ** (shared - power)) + f" * {t}" * (order - shared)

    def function(self, part, t):
        """The code of G(t), or of G(t) − G(0)."""
        start = 0 if part.whole else taylor(part.function, 0)
        summands = [self.summand(*summand, t) for summand in part.summands]
        summands += [self.text(-start)] if start != 0 else []
        return " + ".join(summands).replace("+ -", "- ")

    def rest(self, part, t, near, cut):
        """The symbol of G(t) less what is left out of it."""
        series = self.series.setdefault((part.function, part.order, cut), f"SERIES_{len(self.series) + 1}")
        line = f"torch.where({near}, near_zero({t}, {part.order}, {series}, {cut}), {self.function(part, t)})"
        return self.name((part.function, part.order, t, near, part.whole), "rest", line)

    def write(self, formula, m):
        """The code of a formula of m; what it needs before is added to the lines."""
        polynomial, parts = take_apart(formula, m)
        sizes = {}
        for part in parts:
            t = m if part.rate == 1 else self.name(("t", part.rate, m), "t", self.text(part.rate * m))
            sizes[part.rate] = t
        # those for which the polynomial is another one near 0 than beyond
        changing = [part for part in parts if sympy.expand(part.left_out(m)[0] - part.left_out(m)[1]) != 0]
        by_exp = len(changing) == 1 and changing[0].is_ == DECAY and changing[0].degree == 1 and not changing[0].whole
        cut = max((part.cut for part in changing), default=CUT)
        joint = "" if by_exp else self.near({sizes[part.rate]: None for part in changing}, cut)
        total, within, beyond = 0, polynomial, polynomial
        for part in parts:
            t, degree = sizes[part.rate], part.degree
            within, beyond = (sum(pair) for pair in zip((within, beyond), part.left_out(m)))
            if part.is_ == DECAY and not part.whole and (degree == 0 or by_exp):
                code = self.exp_parts(t)[degree]
            elif degree < 0 or (degree == 0 and part.is_ in EXACT_AT_ZERO):
                text = self.function(part, t)
                plain = part.is_ is not None and " / " not in text
                if plain:
                    code = part.is_.subs(T, t)
                else:
                    named = text in self.names.values()
                    code = sympy.Symbol(text, positive=True) if named else self.name((part.function, t), "part", text)
            elif part in changing:
                code = self.rest(part, t, joint, cut)
            else:
                code = self.rest(part, t, self.near([t], part.cut), part.cut)
            total += part.factor * code
        common, within, beyond = separate(within, beyond, m)
        formula = total + nested(common, m)
        if within or beyond:
            rate = changing[0].rate
            t = sizes[rate]
            halves = (
                self.exp_parts(t)[2:]
                if by_exp
                else self.unpack(("within", "beyond"), (t, joint), f"split({t}, {joint})")
            )
            for polynomial, half in zip((within, beyond), halves):
                formula += nested(polynomial.subs(m, half / rate), half)
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
