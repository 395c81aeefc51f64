"""All activations: one table from name to activation, one line of mathematics each.

An ungated activation maps one projection x of the MLP; a gated one (a gated linear unit) maps two, x and y.
A gate g: ℝ → (0, 1) is used in three ways. Each may be expanded to the range (−α, 1 + α) by one trained scalar α, which
starts at 0: G(x) = g(x)·(1 + 2α) − α ("Expanded Gating Ranges Improve Activation Functions", arXiv 2405.20768).

    self-gated      x·G(x)          silu, gelu, atlu, ssslu        expanded: xsilu, xgelu, xatlu
    first order     G(x)·y          glu, gglu, aglu                expanded: xglu, xgglu, xaglu
    second order    x·G(x)·y        swiglu, geglu, atglu, sssglu   expanded: xswiglu, xgeglu, xatglu

To add an activation, write a module and one line in ACTIVATIONS; nothing else needs to change. Or let tools/derive.py
write it from its gradient: then the name is the path of that file.
"""

import difflib
import functools
import importlib.util
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

import xielu
from plumbing.command import UserError
from plumbing.inverted import xielu_inverted
from xielu import XIELU, Integral, fused, partials, upcast, value, xielu_reference

# ---------------------------------------------------------------------------------------------------------------
# Other gradients, the same integration (from the authors' code; there, the last two train β and take |raw| for α)


def xiprelu_value(x, alpha_p, alpha_n, beta=0.5):
    """The integral of PReLU: αp·x² + β·x for x > 0, αn·x² + β·x for x ≤ 0."""
    z = upcast(x)
    return (torch.where(z > 0, alpha_p, alpha_n) * z + beta) * z


def xiprelu_partials(x, alpha_p, alpha_n, beta=0.5):
    z = upcast(x)
    slope = 2 * torch.where(z > 0, alpha_p, alpha_n) * z + beta
    return slope, torch.where(z > 0, z * z, 0), torch.where(z > 0, 0, z * z)


def xiep_value(x, alpha_p, alpha_n, alpha_p3, beta=0.5):
    """The integral of PolyReLU and ELU: xIELU plus αp3·x³ for x > 0."""
    return value(x, alpha_p, alpha_n, beta) + alpha_p3 * torch.relu(upcast(x)) ** 3


def xiep_partials(x, alpha_p, alpha_n, alpha_p3, beta=0.5):
    positive = torch.relu(upcast(x))
    slope, by_p, by_n = partials(x, alpha_p, alpha_n, beta)
    return slope + 3 * alpha_p3 * positive**2, by_p, by_n, positive**3


def xssslur2_value(x, alpha_p, alpha_n, beta=0.5):
    """xIELU with softsign s(x) = x/(1 + |x|) in place of the exponential: αp·x² + β·x for x > 0, αn·x·s(x) + β·x for
    x ≤ 0. Its gradient falls to β − αn as xIELU's does."""
    z = upcast(x)
    return (torch.where(z > 0, alpha_p * z, alpha_n * F.softsign(z)) + beta) * z


def xssslur2_partials(x, alpha_p, alpha_n, beta=0.5):
    z = upcast(x)
    s = F.softsign(z)
    # the gradient of x·s(x) is x·(2 + |x|)/(1 + |x|)², which for x ≤ 0 is s·(2 + s)
    slope = torch.where(z > 0, 2 * alpha_p * z, alpha_n * s * (2 + s)) + beta
    return slope, torch.where(z > 0, z * z, 0), torch.where(z > 0, 0, z * s)


def xssslupr_value(x, alpha_p, alpha_n, alpha_p3, beta=0.5):
    """xSSSLUR2 plus αp3·x³ for x > 0."""
    return xssslur2_value(x, alpha_p, alpha_n, beta) + alpha_p3 * torch.relu(upcast(x)) ** 3


def xssslupr_partials(x, alpha_p, alpha_n, alpha_p3, beta=0.5):
    positive = torch.relu(upcast(x))
    slope, by_p, by_n = xssslur2_partials(x, alpha_p, alpha_n, beta)
    return slope + 3 * alpha_p3 * positive**2, by_p, by_n, positive**3


xiprelu = fused(xiprelu_value, xiprelu_partials)
xiep = fused(xiep_value, xiep_partials)
xssslur2 = fused(xssslur2_value, xssslur2_partials)
xssslupr = fused(xssslupr_value, xssslupr_partials)

# ---------------------------------------------------------------------------------------------------------------
# Gates


def sigmoid(x):
    """σ(x), the gate of SiLU."""
    return torch.sigmoid(x)


def normal_cdf(x):
    """Φ(x), the gate of GELU. erfc keeps the digits of the far negative tail, where 1 + erf rounds to 0."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def arctan(x):
    """arctan(x)/π + ½, the gate of ATLU."""
    return torch.atan(x) / math.pi + 0.5


def softsign(x):
    """(s(x) + 1)/2 for s(x) = x/(1 + |x|), the gate of SSSLU. 1/(1 − x) keeps the digits of the far negative tail,
    where s + 1 rounds to 0."""
    return torch.where(x >= 0, 0.5 + 0.5 * F.softsign(x), 0.5 / (1 + x.abs()))


class Gate(nn.Module):
    """G(x) = g(x)·(1 + 2α) − α for a gate function g. If expanded, α is trained as it is, without a softplus, and
    starts at 0, where G is g; else it is 0."""

    def __init__(self, function, expanded=False):
        super().__init__()
        self.function = function
        self.alpha = nn.Parameter(torch.zeros(1)) if expanded else None

    def gate(self, x):
        """G(x) in at least float32."""
        g = self.function(upcast(x))
        return g if self.alpha is None else g * (1 + 2 * self.alpha) - self.alpha

    def effective(self):
        """{"alpha": α} as a Python float, for the log; {} if there is none."""
        return {} if self.alpha is None else {"alpha": self.alpha.item()}


class SelfGated(Gate):
    def forward(self, x):
        return (upcast(x) * self.gate(x)).to(x.dtype)


class FirstOrderGLU(Gate):
    def forward(self, x, y):
        return (self.gate(x) * upcast(y)).to(x.dtype)


class SecondOrderGLU(Gate):
    def forward(self, x, y):
        return (upcast(x) * self.gate(x) * upcast(y)).to(x.dtype)


class ReLUSquared(nn.Module):
    """max(x, 0)² ("Primer", arXiv 2109.08668)."""

    def forward(self, x):
        return torch.relu(x).square()


class LeakyReLUSquared(nn.Module):
    """leaky_relu(x, ½)²: x² for x > 0, x²/4 for x ≤ 0, as speedruns use it in 2026. Its gradient is a PReLU's."""

    def forward(self, x):
        return F.leaky_relu(x, 0.5).square()


# ---------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Activation:
    """formula: one line of mathematics. module: called without arguments, makes an nn.Module that keeps shape and dtype
    of x; its parameters take no weight decay. gated: it takes two projections (x, y)."""

    formula: str
    module: Callable[[], nn.Module]
    gated: bool = False


XIELU_FORMULA = "αp·x² + βx for x > 0, αn·(eˣ − 1 − x) + βx for x ≤ 0"
POSITIVE = {"alpha_p": (0.8, 0.0), "alpha_n": (0.8, 0.0)}
ABOVE_BETA = {"alpha_p": (0.8, 0.0), "alpha_n": (0.8, 0.5)}
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
    # self-gated
    "atlu": Activation("x·(arctan(x)/π + ½)", partial(SelfGated, arctan)),
    "ssslu": Activation("x·(s(x) + 1)/2, s(x) = x/(1 + |x|)", partial(SelfGated, softsign)),
    "xsilu": Activation("x·(σ(x)·(1 + 2α) − α)", partial(SelfGated, sigmoid, True)),
    "xgelu": Activation("x·(Φ(x)·(1 + 2α) − α)", partial(SelfGated, normal_cdf, True)),
    "xatlu": Activation("x·((arctan(x)/π + ½)·(1 + 2α) − α)", partial(SelfGated, arctan, True)),
    # gated linear units of first order
    "glu": Activation("σ(x)·y", partial(FirstOrderGLU, sigmoid), gated=True),
    "gglu": Activation("Φ(x)·y", partial(FirstOrderGLU, normal_cdf), gated=True),
    "aglu": Activation("(arctan(x)/π + ½)·y", partial(FirstOrderGLU, arctan), gated=True),
    "xglu": Activation("(σ(x)·(1 + 2α) − α)·y", partial(FirstOrderGLU, sigmoid, True), gated=True),
    "xgglu": Activation("(Φ(x)·(1 + 2α) − α)·y", partial(FirstOrderGLU, normal_cdf, True), gated=True),
    "xaglu": Activation("((arctan(x)/π + ½)·(1 + 2α) − α)·y", partial(FirstOrderGLU, arctan, True), gated=True),
    # gated linear units of second order
    "swiglu": Activation("x·σ(x)·y", partial(SecondOrderGLU, sigmoid), gated=True),
    "geglu": Activation("x·Φ(x)·y", partial(SecondOrderGLU, normal_cdf), gated=True),
    "atglu": Activation("x·(arctan(x)/π + ½)·y", partial(SecondOrderGLU, arctan), gated=True),
    "sssglu": Activation("x·(s(x) + 1)/2·y, s(x) = x/(1 + |x|)", partial(SecondOrderGLU, softsign), gated=True),
    "xswiglu": Activation("x·(σ(x)·(1 + 2α) − α)·y", partial(SecondOrderGLU, sigmoid, True), gated=True),
    "xgeglu": Activation("x·(Φ(x)·(1 + 2α) − α)·y", partial(SecondOrderGLU, normal_cdf, True), gated=True),
    "xatglu": Activation("x·((arctan(x)/π + ½)·(1 + 2α) − α)·y", partial(SecondOrderGLU, arctan, True), gated=True),
}


@functools.cache
def load_derived(path):
    """The Activation in a file that tools/derive.py wrote; UserError if there is none. The file is executed, like a
    config."""
    if not path.is_file():
        raise UserError(f"there is no activation {path}: python -m tools.derive makes one from a gradient")
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", str(path)), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks for the functions' globals there
    try:
        spec.loader.exec_module(module)
        if not isinstance(module.ACTIVATION, Activation):
            raise TypeError("its ACTIVATION is not an Activation")
        return module.ACTIVATION
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"activation {path} does not run: {type(error).__name__}: {reason}") from None


def short_name(name):
    """What tables, figures and folders call an activation: its name, or that of its file without folder and .py."""
    return Path(name).stem if name.endswith(".py") else name


def get_activation(name):
    """The Activation called `name`, or the one in the file `name` if it ends in .py; UserError if there is none."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name.endswith(".py"):
        return load_derived(Path(name).resolve())
    if Path(f"derived/{name}.py").is_file():
        raise UserError(f"unknown activation {name!r}: did you mean 'derived/{name}.py'?")
    nearest = difflib.get_close_matches(name, ACTIVATIONS, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UserError(f"unknown activation {name!r}: {hint}known are {', '.join(ACTIVATIONS)}")


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
    results = curve(activation.module(), x, activation.gated)
    numbers = [float(f"{number:.9g}") for result in results for number in result.flatten().tolist()]
    return {f"the formula of {short_name(name)}": activation.formula, f"what {short_name(name)} computes": numbers}
