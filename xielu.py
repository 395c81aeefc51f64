"""The paper in one file: choose a gradient, integrate it, train its two scalars.

"Deriving Activation Functions Using Integration" (Huang & Schlag, arXiv 2411.13010) starts from the gradient of an
activation function, because the gradient is what training uses:

    ReLU² has a gradient that rises linearly for x > 0, so large inputs keep learning.
    xSiLU has a gradient that falls below zero for some x < 0, so units are pushed both ways.

It joins a half of each kind and integrates them from 0. The result is xIELU:

                    x > 0                 x ≤ 0
    gradient f′     2·αp·x + β            αn·(eˣ − 1) + β
    activation f    αp·x² + β·x           αn·(eˣ − 1 − x) + β·x
    ∂f/∂αp          x²                    0
    ∂f/∂αn          0                     eˣ − 1 − x

β = 0.5 is fixed. αp and αn are trained, one pair per layer, each through a raw number and a softplus: αp =
softplus(raw) stays above 0, and αn = β + softplus(raw) stays above β, so that the gradient does fall below zero. Both
start at 0.8. In this code `raw` is the number that is trained and `alpha` the number in the formula.

This file reads from the table to the module: `value` is its row f, and the reference leaves the rest to autograd;
`partials` writes down the other rows; `xielu_fused` takes f from one and the gradients from the other, and passes over
memory once in the forward pass and once in the backward pass; XIELU adds the trained scalars. It imports nothing but
PyTorch: copy it into your own project and use XIELU().
"""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------
# Numbers


def upcast(x):
    """x in the dtype that formulas are computed in: at least float32. In bf16 errors reach 3 % (docs/kernels.md)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cast(y, dtype):
    """y.to(dtype). In torch 2.11 a compiled autograd.Function that ends in a no-op cast loses its gradient."""
    return y if y.dtype == dtype else y.to(dtype)


def effective_scalar(raw, bound=0.0):
    """The scalar that the formula uses, of shape (): bound + softplus(raw), or raw itself where the bound is None."""
    raw = upcast(raw).reshape(())
    return raw if bound is None else bound + F.softplus(raw)


def raw_parameter(effective, bound=0.0):
    """The float32 parameter of shape (1,) whose effective scalar is `effective`; ValueError if there is none. (In bf16,
    raw_n would move in steps of 0.008 and lose most updates.)"""
    if bound is None:
        return nn.Parameter(torch.tensor([effective], dtype=torch.float32))
    if effective <= bound:
        raise ValueError(f"an effective scalar of {effective} cannot be reached: it must be above {bound}")
    return nn.Parameter(torch.tensor([math.log(math.expm1(effective - bound))], dtype=torch.float32))


# Near 0, eˣ − 1 − x computed as it stands loses all its digits: from −cut up we use its Taylor series instead. A
# smaller cut would lose digits below it, a larger one would need more terms. {dtype of x: (cut, degree of the series)}:
# at −cut the first term left out is below half an epsilon of the sum, in float32 (float16 too) or float64. In bf16 the
# series is right to 2e-5 and eˣ − 1 − x below −cut to 5e-4; rounding y costs 4e-3 anyway.
SERIES = {torch.bfloat16: (2**-6, 3), torch.float16: (0.5, 8), torch.float32: (0.5, 8), torch.float64: (0.5, 15)}


def exp_remainder(x, degree):
    """eˣ − 1 − x near 0 by its Taylor series up to xᵈᵉᵍʳᵉᵉ: x²·(1/2! + x/3! + x²/4! + …)."""
    series = 1 / math.factorial(degree)
    for k in range(degree - 1, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return series * x * x


def expm1_far(x):
    """eˣ − 1 for x ≤ −cut. exp2 is one instruction on a GPU, exp and expm1 are several."""
    return torch.exp2(x * math.log2(math.e)) - 1


# ---------------------------------------------------------------------------------------------------------------
# The table, row by row, for effective scalars


def value(x, alpha_p, alpha_n, beta):
    """f(x), in at least float32. Autograd multiplies the branches that were not taken by 0, and 0 · ∞ is NaN. So each
    branch sees x clamped to its own part of the axis, where it cannot overflow."""
    z, (cut, degree) = upcast(x), SERIES[x.dtype]
    positive, near, far = z.clamp(min=0), z.clamp(-cut, 0), z.clamp(max=-cut)
    of_positive = (alpha_p * positive + beta) * positive
    of_near = alpha_n * exp_remainder(near, degree) + beta * near
    of_far = alpha_n * expm1_far(far) - (alpha_n - beta) * far  # grouped so that no term overflows before f does
    return torch.where(z > 0, of_positive, torch.where(z > -cut, of_near, of_far))


def xielu_reference(x, raw_p, raw_n, beta=0.5):
    """xIELU of x, of any shape and dtype, differentiated by autograd; raw_p and raw_n have shape (1,) or ()."""
    return value(x, effective_scalar(raw_p), effective_scalar(raw_n, bound=beta), beta).to(x.dtype)


def partials(x, alpha_p, alpha_n, beta):
    """f′(x), ∂f/∂αp and ∂f/∂αn, in at least float32."""
    z, (cut, degree) = upcast(x), SERIES[x.dtype]
    near, far = exp_remainder(z, degree), expm1_far(z)
    expm1, remainder = torch.where(z > -cut, near + z, far), torch.where(z > -cut, near, far - z)
    slope = torch.where(z > 0, 2 * alpha_p * z, alpha_n * expm1) + beta
    return slope, torch.where(z > 0, z * z, 0), torch.where(z > 0, 0, remainder)


# ---------------------------------------------------------------------------------------------------------------
# Compiling: one pass over memory

# Whether to compile at all; train.py --compile=False clears it.
COMPILE = True


@functools.cache
def can_compile(device_type):
    """Whether torch.compile works on this kind of device here, found out by trying; warns once if it does not. On
    Apple's GPUs it is a prototype, so it is not used there."""
    if device_type == "mps":
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device_type))
        return True
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work on {device_type} here, running uncompiled ({reason})", stacklevel=2)
        return False


@functools.cache
def compiled(function):
    """torch.compile(function). The option lets a CPU compute a·b + c in one instruction, as a GPU always does."""
    return torch.compile(function, options={"cpp.enable_floating_point_contract_flag": "fast"})


def in_one_pass(function, x, *others):
    """function(x, *others), compiled; left as it is inside a compiled model, which compiles it along with the rest."""
    if torch.compiler.is_compiling() or x.is_meta or not (COMPILE and can_compile(x.device.type)):
        return function(x, *others)
    return compiled(function)(x, *others)


# ---------------------------------------------------------------------------------------------------------------
# Forward and backward, each in one pass


def forward_pass(x, alpha_p, alpha_n, beta):
    """f(x) in the dtype of x."""
    return cast(value(x, alpha_p, alpha_n, beta), x.dtype)


def chain_rule(grad, dtype, slope, *by_alpha):
    """∂L/∂x in that dtype and ∂L/∂α for each alpha, from ∂L/∂y, f′(x) and each ∂f/∂α."""
    grad = upcast(grad)
    # where: a partial may overflow to ∞ at an x whose gradient is 0, and 0 · ∞ is NaN
    return (grad * slope).to(dtype), *(torch.where(grad == 0, 0, grad * partial).sum() for partial in by_alpha)


def backward_pass(x, grad, alpha_p, alpha_n, beta):
    """∂L/∂x, ∂L/∂αp and ∂L/∂αn."""
    return chain_rule(grad, x.dtype, *partials(x, alpha_p, alpha_n, beta))


def computed_once(alpha):
    """alpha itself, stored in memory. Without this, a compiled model would move the softplus into the kernel and
    compute it again for every element; what as_strided reads is stored first."""
    return alpha.as_strided((), ())


class Fused(torch.autograd.Function):
    """xIELU; only x and the scalars are kept for backward."""

    @staticmethod
    def forward(ctx, x, alpha_p, alpha_n, beta):
        alpha_p, alpha_n = computed_once(alpha_p), computed_once(alpha_n)
        ctx.save_for_backward(x, alpha_p, alpha_n)
        ctx.beta = beta
        return in_one_pass(forward_pass, x, alpha_p, alpha_n, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha_p, alpha_n = ctx.saved_tensors
        return *in_one_pass(backward_pass, x, grad, alpha_p, alpha_n, ctx.beta), None


def xielu_fused(x, raw_p, raw_n, beta=0.5):
    """The same function as `xielu_reference`: forward reads x and writes y; backward reads x and ∂L/∂y, writes ∂L/∂x
    and sums the gradients of both scalars on the way."""
    # flat, so that one compilation serves every shape
    y = Fused.apply(x.reshape(-1), effective_scalar(raw_p), effective_scalar(raw_n, bound=beta), beta)
    return y.view(x.shape)


# ---------------------------------------------------------------------------------------------------------------
# The module


class XIELU(nn.Module):
    """xIELU with its two trained scalars. alpha_p and alpha_n are the *effective* values to start at. function:
    `xielu_fused`, `xielu_reference` or inverted.py's `xielu_inverted`, which take the raw scalars, so that each can
    also be called without a module."""

    def __init__(self, alpha_p=0.8, alpha_n=0.8, beta=0.5, function=xielu_fused):
        super().__init__()
        self.raw_alpha_p = raw_parameter(alpha_p)
        self.raw_alpha_n = raw_parameter(alpha_n, bound=beta)
        self.beta, self.function = beta, function

    def forward(self, x):
        return self.function(x, self.raw_alpha_p, self.raw_alpha_n, self.beta)

    def effective(self):
        """{name: effective scalar} as Python floats, for the log."""
        alpha_p, alpha_n = effective_scalar(self.raw_alpha_p), effective_scalar(self.raw_alpha_n, bound=self.beta)
        return {"alpha_p": alpha_p.item(), "alpha_n": alpha_n.item()}
