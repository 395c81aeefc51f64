"""Whether a derived activation gives what its gradient says: in each dtype, near 0 and far out, compiled or not.

The reference is numerical integration of the gradient as it was given, in 50 digits, with which the code has nothing in
common but that gradient. A failure is a UserError that shows the point.
"""

import mpmath
import sympy
import torch

from data import UserError
from integral import effective_scalar, raw_scalar

# that bfloat16 can represent, so that they are the same in every dtype
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


def scale_of(formula, scalars, size):
    """What a formula's rounding is measured by: the sizes of its terms, and of what the rounding of x and of the
    scalars themselves does to it."""
    terms = sum(abs(term) for term in sympy.Add.make_args(formula))
    return terms + sum(abs(symbol * formula.diff(symbol)) for symbol in (size, *scalars))


def exact(side, numbers, trained):
    """What the code should give at SIZES, and what its rounding is measured by: (values, scales), each a list of f, f′
    and the scalars' gradients."""
    places, symbols = SIZES.tolist(), [scalar.symbol for scalar in trained]

    def at_places(formula):
        function = sympy.lambdify(side.size, formula.subs(numbers), "mpmath")
        return torch.tensor([float(function(mpmath.mpf(place))) for place in places], dtype=torch.float64)

    values, scales = [], []
    for formula in (side.gradient, *(side.gradient.diff(symbol) for symbol in symbols)):
        scale = scale_of(formula, symbols, side.size)
        values.append(side.sign * integrals(formula.subs(numbers), side.size, places))
        scales.append(integrals(scale.subs(numbers), side.size, places, rough=True))
        if formula is side.gradient:
            values.append(at_places(formula))
            scales.append(at_places(scale))
    return values, scales


def check_close(found, values, scales, x, dtype, names, numbers):
    """UserError that names the first point at which the code does not give what it should."""
    largest = 0.01 * torch.finfo(dtype).max  # beyond, what is on the way to a number may overflow
    for name, actual, expected, scale in zip(names, found, values, scales):
        wrong = ~((actual.double() - expected).abs() <= TOLERANCE[dtype] * scale + torch.finfo(dtype).tiny)
        wrong &= (expected.abs() < largest) & (scale < largest)
        if wrong.any():
            at = wrong.nonzero()[0].item()
            where = ", ".join([f"x = {x[at].item():.6g}", *(f"{key} = {float(v):.6g}" for key, v in numbers.items())])
            error = (actual[at].item() - expected[at].item()) / scale[at].item()
            raise UserError(
                f"the code is not accurate, so nothing is written: {name} in {str(dtype)[6:]} at {where} is "
                f"{actual[at].item():.17g} instead of {expected[at].item():.17g}, an error of {error:.2g} of its "
                f"terms: try the gradient in another form, or a simpler one"
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
    """UserError if the code overflows in float32 where what it computes, in float64, is far from doing so."""
    x = side.sign * torch.logspace(3, 37, 69, dtype=torch.float64).float()
    results = []
    for dtype in (torch.float32, torch.float64):
        own = [torch.tensor(value, dtype=dtype) for value in scalars]
        results.append([module.value(x.to(dtype), *own), *module.partials(x.to(dtype), *own)])
    for name, narrow, wide in zip(names, *results):
        wrong = (wide.abs() < 0.01 * torch.finfo(torch.float32).max) & ~narrow.isfinite()
        if wrong.any():
            at = x[wrong][0].item()
            raise UserError(f"the code overflows far out, so nothing is written: {name} in float32 at x = {at:.3g}")


def check_compiled(module):
    """UserError unless the compiled module gives in float32 what its functions give uncompiled, near 0 too."""
    act = module()
    x = torch.cat([SIZES, -SIZES]).float().requires_grad_()
    y = act(x)
    y.sum().backward()
    own = [effective_scalar(getattr(act, name).detach(), bound) for name, bound in act.bound.items()]
    slope, *partials = module.partials(x.detach(), *own)
    pairs = {"f": (y.detach(), module.value(x.detach(), *own), None), "f′": (x.grad, slope, None)}
    for name, partial in zip(act.bound, partials):
        inner = 1 if act.bound[name] is None else torch.sigmoid(getattr(act, name).detach())
        terms = (partial * inner).reshape(-1)  # which may cancel in their sum
        pairs[f"∂f/∂{name}"] = getattr(act, name).grad, terms.sum().reshape(1), terms.abs().sum()
    for name, (compiled, plain, scale) in pairs.items():
        scale = plain.abs() if scale is None else scale
        wrong = ~((compiled - plain).abs() <= 2e-6 * scale + 1e-30) & plain.isfinite()
        if wrong.any():
            raise UserError(f"torch.compile computes {name} otherwise than the formulas say: nothing is written")


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
