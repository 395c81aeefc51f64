"""The family xIELU is compared with: one table from name to activation, one line of mathematics each.

An ungated activation maps one projection x of the MLP; a gated one (a gated linear unit) maps two, x and y.
A gate g: ℝ → (0, 1) serves three orders, and each may be expanded to (−α, 1 + α) with one trained scalar α,
G(x) = g(x)·(1 + 2α) − α, from 0 ("Expanded Gating Ranges Improve Activation Functions", arXiv 2405.20768):

    self-gated      x·G(x)          silu, gelu, atlu        expanded: xsilu, xgelu, xatlu
    first order     G(x)·y          glu, gglu, aglu         expanded: xglu, xgglu, xaglu
    second order    x·G(x)·y        swiglu, geglu, atglu    expanded: xswiglu, xgeglu, xatglu

To add one, write a module and a line in ACTIVATIONS below: train.py, the parameter matching and the comparison
need nothing else. Or have tools/derive.py write one from its gradient: the path of that file is its name.
"""

import difflib
import functools
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from xielu import XIELU, XIEP, XIPReLU, upcast


def sigmoid(x):
    """σ(x), the gate of SiLU."""
    return torch.sigmoid(x)


def normal_cdf(x):
    """Φ(x), the gate of GELU; erfc keeps the far negative tail that 1 + erf rounds away."""
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def arctan(x):
    """arctan(x)/π + ½, the gate of ATLU."""
    return torch.atan(x) / math.pi + 0.5


class Gate(nn.Module):
    """G(x) = g(x)·(1 + 2α) − α for a gate function g; α is a trained scalar from 0 if expanded, else 0."""

    def __init__(self, function, expanded=False):
        super().__init__()
        self.function = function
        self.alpha = nn.Parameter(torch.zeros(1, dtype=torch.float32)) if expanded else None

    def forward(self, x):
        gate = self.function(x)
        if self.alpha is None:
            return gate
        alpha = self.alpha.to(x.dtype)
        return gate * (1 + 2 * alpha) - alpha

    def effective(self):
        """{"alpha": α} as a Python float, for the log; {} without one."""
        return {} if self.alpha is None else {"alpha": self.alpha.item()}


class SelfGated(Gate):
    """x·G(x)."""

    def forward(self, x):
        z = upcast(x)
        return (z * super().forward(z)).to(x.dtype)


class FirstOrderGLU(Gate):
    """G(x)·y on two projections x, y."""

    def forward(self, x, y):
        return (super().forward(upcast(x)) * upcast(y)).to(x.dtype)


class SecondOrderGLU(Gate):
    """x·G(x)·y on two projections x, y."""

    def forward(self, x, y):
        z = upcast(x)
        return (z * super().forward(z) * upcast(y)).to(x.dtype)


class ReLUSquared(nn.Module):
    """max(x, 0)² ("Primer", arXiv 2109.08668)."""

    def forward(self, x):
        return torch.relu(x).square()


@dataclass(frozen=True)
class Activation:
    """formula: one line of mathematics. module: makes the nn.Module. gated: it takes two projections (x, y)."""

    formula: str
    module: Callable[[], nn.Module]
    gated: bool = False


ACTIVATIONS = {
    "relu": Activation("max(x, 0)", nn.ReLU),
    "gelu": Activation("x·Φ(x)", nn.GELU),
    "silu": Activation("x·σ(x)", nn.SiLU),
    "relu2": Activation("max(x, 0)²", ReLUSquared),
    # integrated gradients (xielu.py)
    "xielu": Activation("αp·x² + βx for x > 0, αn·(eˣ − 1 − x) + βx for x ≤ 0", XIELU),
    "xiprelu": Activation("αp·x² + βx for x > 0, αn·x² + βx for x ≤ 0", XIPReLU),
    "xiep": Activation("xielu(x) + αp3·max(x, 0)³", XIEP),
    # self-gated
    "atlu": Activation("x·(arctan(x)/π + ½)", lambda: SelfGated(arctan)),
    "xsilu": Activation("x·(σ(x)·(1 + 2α) − α)", lambda: SelfGated(sigmoid, expanded=True)),
    "xgelu": Activation("x·(Φ(x)·(1 + 2α) − α)", lambda: SelfGated(normal_cdf, expanded=True)),
    "xatlu": Activation("x·((arctan(x)/π + ½)·(1 + 2α) − α)", lambda: SelfGated(arctan, expanded=True)),
    # gated linear units of first order
    "glu": Activation("σ(x)·y", lambda: FirstOrderGLU(sigmoid), gated=True),
    "gglu": Activation("Φ(x)·y", lambda: FirstOrderGLU(normal_cdf), gated=True),
    "aglu": Activation("(arctan(x)/π + ½)·y", lambda: FirstOrderGLU(arctan), gated=True),
    "xglu": Activation("(σ(x)·(1 + 2α) − α)·y", lambda: FirstOrderGLU(sigmoid, expanded=True), gated=True),
    "xgglu": Activation("(Φ(x)·(1 + 2α) − α)·y", lambda: FirstOrderGLU(normal_cdf, expanded=True), gated=True),
    "xaglu": Activation("((arctan(x)/π + ½)·(1 + 2α) − α)·y", lambda: FirstOrderGLU(arctan, expanded=True), gated=True),
    # gated linear units of second order
    "swiglu": Activation("x·σ(x)·y", lambda: SecondOrderGLU(sigmoid), gated=True),
    "geglu": Activation("x·Φ(x)·y", lambda: SecondOrderGLU(normal_cdf), gated=True),
    "atglu": Activation("x·(arctan(x)/π + ½)·y", lambda: SecondOrderGLU(arctan), gated=True),
    "xswiglu": Activation("x·(σ(x)·(1 + 2α) − α)·y", lambda: SecondOrderGLU(sigmoid, expanded=True), gated=True),
    "xgeglu": Activation("x·(Φ(x)·(1 + 2α) − α)·y", lambda: SecondOrderGLU(normal_cdf, expanded=True), gated=True),
    "xatglu": Activation(
        "x·((arctan(x)/π + ½)·(1 + 2α) − α)·y", lambda: SecondOrderGLU(arctan, expanded=True), gated=True
    ),
}


@functools.cache
def load_derived(path):
    """The Activation of a file that tools/derive.py wrote; ValueError if it is none. Like a config, it is run."""
    if not path.is_file():
        raise ValueError(f"there is no activation {path}: python -m tools.derive makes one from a gradient")
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", str(path)), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where torch.compile looks for the functions' globals
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"activation {path} does not run: {type(error).__name__}: {reason}") from None
    activation = getattr(module, "ACTIVATION", None)
    if not isinstance(activation, Activation):
        raise ValueError(f"{path} is no activation: it has no ACTIVATION, as what python -m tools.derive writes has")
    return activation


def short_name(name):
    """What to call an activation in tables, figures and folders: its name, of a file without the folder and .py."""
    return Path(name).stem if name.endswith(".py") else name


def get_activation(name):
    """The Activation called `name`, or in the file of that name if it ends in .py; ValueError that lists the known ones
    if there is none."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name.endswith(".py"):
        return load_derived(Path(name).resolve())
    if Path(f"derived/{name}.py").is_file():
        raise ValueError(f"unknown activation {name!r}: did you mean 'derived/{name}.py'?")
    nearest = difflib.get_close_matches(name, ACTIVATIONS, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"unknown activation {name!r}: {hint}known are {', '.join(ACTIVATIONS)}")
