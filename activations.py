"""All activations: one table from name to activation, one line of mathematics each.

An ungated activation maps one projection x of the MLP; a gated one (a gated linear unit) maps two, x and y.
A gate g: ℝ → (0, 1) is used in three ways. Each may be expanded to the range (−α, 1 + α) by one trained scalar α, which
starts at 0: G(x) = g(x)·(1 + 2α) − α ("Expanded Gating Ranges Improve Activation Functions", arXiv 2405.20768).

    self-gated      x·G(x)          silu, gelu, atlu, ssslu            expanded: xsilu, xgelu, xatlu, xssslu
    first order     G(x)·y          glu, gglu, aglu, ssglu             expanded: xglu, xgglu, xaglu, xssglu
    second order    x·G(x)·y        swiglu, geglu, atglu, sssglu       expanded: xswiglu, xgeglu, xatglu, xsssglu

To add an activation, write a module and one line in ACTIVATIONS; nothing else needs to change. Or let tools/derive.py
write it from its gradient: then the name is the path of that file.
"""

import difflib
import functools
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import xielu
from plumbing.command import UserError, first_line
from plumbing.inverted import xielu_inverted
from xielu import XIELU, cast, chain_rule, computed_once, effective_scalar, raw_parameter, upcast, xielu_reference

# ---------------------------------------------------------------------------------------------------------------
# Integrated gradients


def fused(rows):
    """Make an activation f that passes over memory once each way, as `xielu_fused` does, from the rows of its table: a
    function of (x, *alphas) that returns f(x), f′(x) and ∂f/∂α for each alpha. Compiled, each pass computes only the
    rows that it needs.

    Returns apply(x, *alphas) → f(x), of any shape, differentiable once. alphas: effective scalars, tensors of shape (),
    through which gradients reach the raw ones.
    """

    def forward_pass(x, *alphas):
        return cast(rows(x, *alphas)[0], x.dtype)

    def backward_pass(x, grad, *alphas):
        return chain_rule(grad, x.dtype, *rows(x, *alphas)[1:])

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *alphas):
            alphas = [computed_once(alpha) for alpha in alphas]
            ctx.save_for_backward(x, *alphas)
            return xielu.in_one_pass(forward_pass, x, *alphas)

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            x, *alphas = ctx.saved_tensors
            return xielu.in_one_pass(backward_pass, x, grad, *alphas)

    def apply(x, *alphas):
        x_flat = x.reshape(-1)  # so that one compilation serves every shape
        # Without gradients, torch.compile takes x for ctx where a call has as many arguments as forward has parameters.
        call = Fused.apply if torch.is_grad_enabled() else partial(xielu.in_one_pass, forward_pass)
        return call(x_flat, *alphas).view(x.shape)

    return apply


class Integral(nn.Module):
    """An activation with trained scalars. function(x, *effective scalars) → f(x), as `fused` makes it; scalars: {name:
    (effective value at the start, bound that it stays above; None: it is trained as it is, without a softplus)}. The
    parameter of a scalar is called raw_NAME."""

    def __init__(self, function, scalars):
        super().__init__()
        self.function = function
        self.bounds = {name: bound for name, (_, bound) in scalars.items()}
        for name, (start, bound) in scalars.items():
            setattr(self, f"raw_{name}", raw_parameter(start, bound))

    def effective_scalars(self):
        """{name: effective scalar}, each a tensor of shape ()."""
        return {name: effective_scalar(getattr(self, f"raw_{name}"), bound) for name, bound in self.bounds.items()}

    def forward(self, x):
        return self.function(x, *self.effective_scalars().values())

    def effective(self):
        """{name: effective scalar} as Python floats, for the log."""
        return {name: scalar.item() for name, scalar in self.effective_scalars().items()}


# The rows of four of the authors' activations; theirs train β too, and take |raw| for α.
BETA = 0.5


def xiprelu_rows(x, alpha_p, alpha_n):
    """The integral of PReLU: αp·x² + β·x for x > 0, αn·x² + β·x for x ≤ 0."""
    z = upcast(x)
    alpha_z = torch.where(z > 0, alpha_p, alpha_n) * z
    return (alpha_z + BETA) * z, 2 * alpha_z + BETA, torch.where(z > 0, z * z, 0), torch.where(z > 0, 0, z * z)


def xssslur2_rows(x, alpha_p, alpha_n):
    """xIELU with softsign s(x) = x/(1 + |x|) in place of the exponential: αp·x² + β·x for x > 0, αn·x·s(x) + β·x for
    x ≤ 0. Its gradient falls to β − αn as xIELU's does."""
    z = upcast(x)
    s = F.softsign(z)
    f = (torch.where(z > 0, alpha_p * z, alpha_n * s) + BETA) * z
    # the gradient of x·s(x) is x·(2 + |x|)/(1 + |x|)², which for x ≤ 0 is s·(2 + s)
    slope = torch.where(z > 0, 2 * alpha_p * z, alpha_n * s * (2 + s)) + BETA
    return f, slope, torch.where(z > 0, z * z, 0), torch.where(z > 0, 0, z * s)


def xielu_rows(x, alpha_p, alpha_n):
    """xIELU, as xielu.py computes it."""
    return xielu.value(x, alpha_p, alpha_n, BETA), *xielu.partials(x, alpha_p, alpha_n, BETA)


def plus_cubic(rows):
    """The rows of f(x) + αp3·max(x, 0)³, from those of f."""

    def rows_of(x, alpha_p, alpha_n, alpha_p3):
        f, slope, *others = rows(x, alpha_p, alpha_n)
        positive = torch.relu(upcast(x))
        return f + alpha_p3 * positive**3, slope + 3 * alpha_p3 * positive**2, *others, positive**3

    return rows_of


xiprelu, xssslur2 = fused(xiprelu_rows), fused(xssslur2_rows)
xiep = fused(plus_cubic(xielu_rows))  # the integral of PolyReLU and ELU
xssslupr = fused(plus_cubic(xssslur2_rows))

# ---------------------------------------------------------------------------------------------------------------
# Gates


def normal_cdf(x):
    """Φ(x), the gate of GELU. erfc keeps the digits of the far negative tail, where 1 + erf rounds to 0."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def arctan(x):
    """arctan(x)/π + ½, the gate of ATLU. As the angle of (−x, 1), it keeps the digits of the far negative tail."""
    return torch.atan2(torch.ones_like(x), -x) / math.pi


def softsign(x):
    """(x/(1 + |x|) + 1)/2, the gate of SSSLU. 1/(1 − x) keeps the digits of the far negative tail, where the sum rounds
    to 0."""
    return torch.where(x >= 0, 0.5 + 0.5 * F.softsign(x), 0.5 / (1 + x.abs()))


class Gated(nn.Module):
    """form(x, G(x)), or form(x, G(x), y) for a gated linear unit, with G(x) = g(x)·(1 + 2α) − α for a gate function g.
    If expanded, α is trained as it is, without a softplus, and starts at 0, where G is g; else it is 0."""

    def __init__(self, gate, form, expanded=False):
        super().__init__()
        self.gate, self.form = gate, form
        self.alpha = nn.Parameter(torch.zeros(1)) if expanded else None

    def forward(self, x, *y):
        g = self.gate(upcast(x))
        if self.alpha is not None:
            g = g * (1 + 2 * self.alpha) - self.alpha
        return self.form(upcast(x), g, *map(upcast, y)).to(x.dtype)

    def effective(self):
        """{"alpha": α} as a Python float, for the log; {} if there is none."""
        return {} if self.alpha is None else {"alpha": self.alpha.item()}


class ReLUSquared(nn.Module):
    """max(x, 0)² ("Primer", arXiv 2109.08668)."""

    def forward(self, x):
        return torch.relu(x).square()


class LeakyReLUSquared(nn.Module):
    """leaky_relu(x, ½)²: x² for x > 0, x²/4 for x ≤ 0, as in parameter-golf (2026). Its gradient is a PReLU's."""

    def forward(self, x):
        return F.leaky_relu(x, 0.5).square()


# ---------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Activation:
    """formula: one line of mathematics. module: called without arguments, or with the MLP's width if it has a parameter
    `width`, makes an nn.Module that keeps shape and dtype of x; its parameters get no weight decay. gated: it takes
    two projections (x, y)."""

    formula: str
    module: Callable[..., nn.Module]
    gated: bool = False

    def build(self, width):
        """The module for this MLP width; UserError if it is not one."""
        module = self.module(width) if "width" in inspect.signature(self.module).parameters else self.module()
        if not isinstance(module, nn.Module):
            what = f"{type(module).__name__} is not a torch.nn.Module"
            raise UserError(f"the activation {self.formula}: {what}: write a class whose forward calls it")
        return module


XIELU_FORMULA = "αp·x² + βx for x > 0, αn·(eˣ − 1 − x) + βx for x ≤ 0"
POSITIVE = {"alpha_p": (0.8, 0.0), "alpha_n": (0.8, 0.0)}
ABOVE_BETA = {"alpha_p": (0.8, 0.0), "alpha_n": (0.8, BETA)}
CUBIC = {"alpha_p3": (0.4, 0.0)}

ACTIVATIONS = {
    "relu": Activation("max(x, 0)", nn.ReLU),
    "gelu": Activation("x·Φ(x)", nn.GELU),
    "silu": Activation("x·σ(x)", nn.SiLU),
    "relu2": Activation("max(x, 0)²", ReLUSquared),
    "leaky_relu2": Activation("max(x, x/2)²", LeakyReLUSquared),
    # integrated gradients
    "xielu": Activation(XIELU_FORMULA, XIELU),
    "xielu_reference": Activation(XIELU_FORMULA, partial(XIELU, function=xielu_reference)),
    "xielu_inverted": Activation(XIELU_FORMULA, partial(XIELU, function=xielu_inverted)),
    "xiprelu": Activation("αp·x² + βx for x > 0, αn·x² + βx for x ≤ 0", partial(Integral, xiprelu, POSITIVE)),
    "xiep": Activation("xielu(x) + αp3·max(x, 0)³", partial(Integral, xiep, ABOVE_BETA | CUBIC)),
    "xssslur2": Activation(
        "αp·x² + βx for x > 0, αn·x·s(x) + βx for x ≤ 0, s(x) = x/(1 + |x|)", partial(Integral, xssslur2, ABOVE_BETA)
    ),
    "xssslupr": Activation("xssslur2(x) + αp3·max(x, 0)³", partial(Integral, xssslupr, ABOVE_BETA | CUBIC)),
}

# {g(x): (g, names of the self-gated activation and of the linear units of first and second order)}
GATES = {
    "σ(x)": (torch.sigmoid, ("silu", "glu", "swiglu")),
    "Φ(x)": (normal_cdf, ("gelu", "gglu", "geglu")),
    "(arctan(x)/π + ½)": (arctan, ("atlu", "aglu", "atglu")),
    "(x/(1 + |x|) + 1)/2": (softsign, ("ssslu", "ssglu", "sssglu")),
}
FORMS = {"x·{}": lambda x, g: x * g, "{}·y": lambda x, g, y: g * y, "x·{}·y": lambda x, g, y: x * g * y}
for g, (gate, names) in GATES.items():
    for name, (formula, form) in zip(names, FORMS.items()):
        # silu and gelu are there already, as PyTorch computes them
        ACTIVATIONS.setdefault(name, Activation(formula.format(g), partial(Gated, gate, form), "y" in formula))
        expanded = formula.format(f"({g}·(1 + 2α) − α)")
        ACTIVATIONS["x" + name] = Activation(expanded, partial(Gated, gate, form, expanded=True), "y" in formula)


@functools.cache
def load_derived(path):
    """The Activation in a file that tools/derive.py wrote; UserError if there is none. The file is executed, like a
    config."""
    if not path.is_file():
        hint = "python -m tools.derive makes one from a gradient; if a run's has moved, say  --activation=PATH"
        raise UserError(f"there is no activation {path}: {hint}")
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", str(path)), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks for the functions' globals there
    try:
        spec.loader.exec_module(module)
        if not isinstance(module.ACTIVATION, Activation):
            raise TypeError("its ACTIVATION is not an Activation")
        return module.ACTIVATION
    except (Exception, SystemExit) as error:
        raise UserError(f"activation {path} does not run: {type(error).__name__}: {first_line(error)}") from None


def short_name(name):
    """What tables, figures and folders call an activation: its name, or that of its file without folder and .py."""
    return Path(name).stem if name.endswith(".py") else name


def get_activation(name):
    """The Activation called `name`, or the one in the file `name` if it ends in .py, which is looked for here, then
    beside this file; UserError if there is none."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name.endswith(".py"):
        path = Path(name) if Path(name).is_file() else Path(__file__).parent / name
        return load_derived(path.resolve())
    if Path(f"derived/{name}.py").is_file():
        raise UserError(f"unknown activation {name!r}: did you mean 'derived/{name}.py'?")
    nearest = difflib.get_close_matches(name, ACTIVATIONS, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(f"unknown activation {name!r}: {hint}known are {', '.join(ACTIVATIONS)}")


def check_activation(name, width, compiles):
    """Try an activation once, forward and backward, in float32 and bfloat16: UserError if it breaks its contract."""
    activation, at = get_activation(name), ""
    try:
        module = activation.build(width)
        f = torch.compile(module, backend="eager", fullgraph=True) if compiles else module
        for dtype in (torch.float32, torch.bfloat16):
            at = f" in {str(dtype)[6:]}"
            inputs = [torch.randn(2, width, dtype=dtype).requires_grad_() for _ in range(2 if activation.gated else 1)]
            y = f(*inputs)
            if y.shape != inputs[0].shape:
                raise TypeError(f"it makes {tuple(y.shape)} of {tuple(inputs[0].shape)}, and must keep the shape")
            if y.dtype != dtype:
                raise TypeError(f"it returns {str(y.dtype)[6:]}: end its forward with .to(x.dtype)")
            trained = dict(module.named_parameters())
            grads = torch.autograd.grad(y.sum(), (*inputs, *trained.values()), allow_unused=True)
            for label, grad in zip(("x", "y")[: len(inputs)] + (*trained,), grads):
                if grad is None:
                    raise TypeError(f"{label} gets no gradient: use it in forward, or leave it out")
        for label, value in getattr(module, "effective", dict)().items():
            if not isinstance(value, int | float):
                raise TypeError(f"effective() has a {type(value).__name__} as {label!r}: return numbers, by .item()")
    except Exception as error:
        raise UserError(f"activation {short_name(name)}{at}: {type(error).__name__}: {first_line(error)}") from None


def curve(module, x, gated=False):
    """f, f′ and the gradients of the parameters, each summed over x, of an activation at x, uncompiled; for a gated one
    at y = 1."""
    compiles, xielu.COMPILE = xielu.COMPILE, False
    x = x.clone().requires_grad_()
    y = module(x, torch.ones_like(x)) if gated else module(x)
    slope, *by_parameter = torch.autograd.grad(y.sum(), (x, *module.parameters()))
    xielu.COMPILE = compiles
    return y.detach(), slope, *by_parameter


def facts_of(name):
    """What must not change about an activation while a run is under way: its formula, and what it computes."""
    activation = get_activation(name)
    x = torch.tensor([-9.0, -3.0, -1.0, -0.3, -0.01, 0.01, 0.3, 1.0, 3.0, 9.0], dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for a module that draws its weights; what it draws in training is not seen here
        results = curve(activation.build(len(x)).eval(), x, activation.gated)
    numbers = [float(f"{number:.9g}") for result in results for number in result.flatten().tolist()]
    return {f"the formula of {short_name(name)}": activation.formula, f"what {short_name(name)} computes": numbers}
