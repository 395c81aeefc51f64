"""The paper in one file: choose a gradient, integrate it, train its slopes.

"Deriving Activation Functions Using Integration" (Huang & Schlag, arXiv 2411.13010) turns the usual order
round. A good activation has a good *gradient*, so write the gradient first:

    ReLU² has a gradient that rises linearly for x > 0: large inputs keep learning.      2·αp·x + β
    xSiLU has a gradient that dips below zero for x < 0: units can be pushed both ways.  αn·(eˣ − 1) + β

and take its integral as the activation. With both sides through the origin this is xIELU:

                    x > 0                 x ≤ 0
    gradient f'     2·αp·x + β            αn·(eˣ − 1) + β
    activation f    αp·x² + β·x           αn·(eˣ − 1 − x) + β·x

The gradient is continuous (β at 0 from both sides) and the two slopes are trained, one pair a layer, through
a softplus that keeps them positive and αn above β, so that the gradient does go below zero:

    αp = softplus(alpha_p)          αn = β + softplus(alpha_n)          β = 0.5, fixed

    ∂f/∂alpha_p = x²·σ(alpha_p)     for x > 0, else 0
    ∂f/∂alpha_n = (eˣ − 1 − x)·σ(alpha_n)     for x ≤ 0, else 0

Everything below is this table in PyTorch: a reference that reads like it, a fused version that makes one pass
over memory each way, and an inverted one that keeps its output instead of its input. Two siblings, xIPReLU and
xIEP, come from other gradients by the same integration.
"""

import functools
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------------------------
# Arithmetic


def upcast(x):
    """x in the dtype we compute in: float32, or float64 if x is. bf16 inside would cost 1.5 % of mean error."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Below |x| = CUT the difference eˣ − 1 − x cancels, and the Taylor series takes over, up to the degree at which the
# first term left out is below half an ulp.
CUT = 0.5
DEGREE = {torch.float64: 15, torch.float32: 8}


def exp_remainder(x, degree):
    """eˣ − 1 − x for −CUT ≤ x ≤ 0, to full relative precision: x²·(1/2! + x/3! + x²/4! + …)."""
    series = 1 / math.factorial(degree)
    for k in range(degree - 1, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return series * x * x


def effective_alphas(alpha_p, alpha_n, beta):
    """The αp and αn of the formulas, each of shape (), from the raw trained scalars."""
    return F.softplus(alpha_p).reshape(()), beta + F.softplus(alpha_n).reshape(())


def trained_scalar(effective, bound=0.0):
    """The raw parameter, float32 of shape (1,), with bound + softplus(raw) = effective: ln(e^(effective − bound) − 1).
    ValueError if no raw value gives that."""
    if effective <= bound:
        raise ValueError(f"an effective alpha of {effective} is out of reach: it must be above {bound}")
    return nn.Parameter(torch.tensor([math.log(math.expm1(effective - bound))], dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------------------
# Reference: the formulas, differentiated by autograd


def xielu_reference(x, alpha_p, alpha_n, beta=0.5):
    """xIELU of x, any shape, by the formulas above (arXiv 2411.13010).

    alpha_p, alpha_n: raw (pre-softplus) scalars, shape (1,) or (). Computes in at least float32 and returns
    x's dtype. Each side sees x clamped to its own half, since a branch that overflows would turn the other's
    gradient into 0·inf = NaN.
    """
    z = upcast(x)
    alpha_p, alpha_n = effective_alphas(alpha_p.to(z.dtype), alpha_n.to(z.dtype), beta)
    positive = z.clamp(min=0)
    near = z.clamp(-CUT, 0)
    far = z.clamp(max=-CUT)
    y = torch.where(
        z > 0,
        alpha_p * positive * positive + beta * positive,
        torch.where(
            z > -CUT,
            alpha_n * exp_remainder(near, DEGREE[z.dtype]) + beta * near,
            # the same sum, grouped so that a large |x| does not overflow before αn and β meet
            alpha_n * torch.expm1(far) - (alpha_n - beta) * far,
        ),
    )
    return y.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Fused: the same in one compiled pass forward and one backward, keeping only x and the two scalars


def bf16_terms(m):
    """E = e⁻ᵐ − 1, R = e⁻ᵐ − 1 + m for m ≥ 0, each to 3e-4 of itself (a sixth of what bf16 rounds off), and what of
    m lies beyond 8, where R grows by that. A CPU computes no faster than this: no call of exp, and no masks.

    A cubic (through the Chebyshev nodes of [−1, 0]) gives R(t)/t² at t = −m/8 to 3e-5, and doubling t leads back,
    with nothing that cancels: E(2t) = R(2t) + 2t and

        R(2t) = e²ᵗ − 1 − 2t = (eᵗ − 1)² + 2·(eᵗ − 1 − t) = E(t)² + 2·R(t)
    """
    t = torch.relu(1 - 0.125 * m) - 1
    remainder = (0.499992 + t * (0.166402 + t * (0.0403124 + t * 0.00602944))) * t * t
    for _ in range(3):
        remainder = 2 * remainder + (remainder + t).square()
        t = 2 * t
    return remainder + t, remainder, torch.relu(m - 8)


def _forward(x, alpha_p, alpha_n, beta):
    z = upcast(x)
    alpha_p, alpha_n = effective_alphas(alpha_p.to(z.dtype), alpha_n.to(z.dtype), beta)
    if x.dtype == torch.bfloat16:
        positive, m = torch.relu(z), torch.relu(-z)
        _, remainder, beyond = bf16_terms(m)
        y = (alpha_p * positive + beta) * positive
        y = y + alpha_n * remainder + (alpha_n - beta) * beyond - beta * (m - beyond)
        return y.to(x.dtype)
    expm1 = torch.exp(z) - 1  # a function call on a CPU: first, before there is any vector to save across it
    positive = (alpha_p * z + beta) * z
    near = alpha_n * exp_remainder(z, DEGREE[z.dtype]) + beta * z
    far = alpha_n * expm1 - (alpha_n - beta) * z
    y = torch.where(z > 0, positive, torch.where(z > -CUT, near, far))
    # torch 2.11 loses the gradient of a compiled Function whose forward ends in a cast that changes nothing
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _backward(grad, x, alpha_p, alpha_n, beta):
    z, g = upcast(x), upcast(grad)
    slope_p, slope_n = effective_alphas(alpha_p.to(z.dtype), alpha_n.to(z.dtype), beta)
    if x.dtype == torch.bfloat16:
        positive = torch.relu(z)
        expm1, remainder, beyond = bf16_terms(torch.relu(-z))
        grad_x = g * (2 * slope_p * positive + beta + slope_n * expm1)
        grad_p = (g * positive * positive).sum() * torch.sigmoid(alpha_p)
        grad_n = (g * (remainder + beyond)).sum() * torch.sigmoid(alpha_n)
        return grad_x.to(x.dtype), grad_p.to(alpha_p.dtype), grad_n.to(alpha_n.dtype)
    expm1 = torch.exp(z) - 1
    near = exp_remainder(z, DEGREE[z.dtype])
    remainder = torch.where(z > -CUT, near, expm1 - z)
    expm1 = torch.where(z > -CUT, near + z, expm1)
    grad_x = g * (torch.where(z > 0, 2 * slope_p * z, slope_n * expm1) + beta)
    grad_p = torch.where(z > 0, g * z * z, 0).sum() * torch.sigmoid(alpha_p)
    grad_n = torch.where(z > 0, 0, g * remainder).sum() * torch.sigmoid(alpha_n)
    return grad_x.to(x.dtype), grad_p.to(alpha_p.dtype), grad_n.to(alpha_n.dtype)


@functools.cache
def compiled(function):
    """torch.compile(function), with a·b + c in one instruction on a CPU, as a GPU does anyway. Not before it is needed:
    loading the compiler takes longer than loading PyTorch."""
    return torch.compile(function, options={"cpp.enable_floating_point_contract_flag": "fast"})


def call_compiled(function, *arguments):
    """function(*arguments), compiled, or as a part of the compiled model that calls it."""
    if torch.compiler.is_compiling():
        return function(*arguments)
    return compiled(function)(*arguments)


class _FusedXIELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha_p, alpha_n, beta):
        ctx.save_for_backward(x, alpha_p, alpha_n)
        ctx.beta = beta
        return call_compiled(_forward, x, alpha_p, alpha_n, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *call_compiled(_backward, grad, *ctx.saved_tensors, ctx.beta), None


@functools.cache
def can_compile(device_type):
    """Whether torch.compile works on this kind of device here, found out by trying; warns once if it does not. On
    Apple's GPUs it is a prototype, and not used."""
    if device_type == "mps":
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device_type))
        return True
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"torch.compile does not work on {device_type} here, running uncompiled ({reason})", stacklevel=2)
        return False


def xielu_fused(x, alpha_p, alpha_n, beta=0.5):
    """The same function as `xielu_reference`, in one compiled pass each way; differentiable once.

    Reads x and writes y forward; reads x and ∂L/∂y and writes ∂L/∂x backward, both alpha gradients summed on the
    way. Where nothing can be compiled it is the reference.
    """
    if torch.compiler.is_compiling():  # inside a compiled model, it becomes part of the model's own graph
        return _FusedXIELU.apply(x, alpha_p, alpha_n, beta)
    if x.is_meta or not can_compile(x.device.type):
        return xielu_reference(x, alpha_p, alpha_n, beta)
    # flat, so that one compilation serves all shapes
    return _FusedXIELU.apply(x.reshape(-1), alpha_p, alpha_n, beta).view(x.shape)


# ---------------------------------------------------------------------------------------------------------------
# Inverted: fused, and it keeps y instead of x. The next linear layer keeps y anyway, so that x is not kept at all;
# one bit says on which side of the minimum it lay ("Inverted Activations", arXiv 2407.15545, which fits f'(y) where
# we solve for x). For x > 0, x is the root of a quadratic. For x ≤ 0, with γ = αn − β, y* = f(x*) the minimum and
# w = x − x*,
#
#     e^x* = γ/αn     y* = −γ·R(−x*)     f(x) − y* = γ·R(w)     f'(x) = γ·(e^w − 1)     R(w) = e^w − 1 − w
#
# so that w solves R(w) = d for d = (y − y*)/γ, an equation without parameters: by its series in ±√(2d) near the
# minimum, else by a rough solution and Halley's steps from there.

HALLEY_STEPS = {torch.float64: 2, torch.float32: 1}  # from an error of 5e-3 in w to 2e-8 with one, 5e-16 with two
SERIES_ALONE = {torch.float64: 0.01, torch.float32: 0.5}  # up to this √(2d) a step would lose more than it gains


def turning_point(alpha_n, beta):
    """γ = αn − β, the minimum's place x* and its value y*, each of shape (), from the effective αn."""
    gamma = (alpha_n - beta).clamp(min=1e-6)  # it may have been rounded to 0
    depth = torch.log1p(beta / gamma)
    below = torch.where(depth < 1, exp_remainder(depth, degree=15), beta / gamma - depth)
    return gamma, -depth, -gamma * below


def solve_remainder(d, right):
    """w with e^w − 1 − w = d ≥ 0: the one above 0 where `right`, else the one below. All of one shape."""
    size = torch.sqrt(2 * d)
    s = torch.where(right, size, -size)
    near = s * (1 + s * (-1 / 6 + s * (1 / 36 + s * (-1 / 270 + s * (1 / 4320)))))
    far = torch.where(right, torch.log(1 + size + d * (4 + size) / (6 + size)), -1 - d)
    w = torch.where(size < 2.5, near, far)
    for _ in range(HALLEY_STEPS[d.dtype]):
        slope = torch.exp(w) - 1
        excess = slope - w - d
        w = w - 2 * excess * slope / (2 * slope * slope - excess * (slope + 1))
    return torch.where(size < SERIES_ALONE[d.dtype], near, w)


def invert(y, right, alpha_p, alpha_n, beta):
    """The x that became y on that side of the minimum, in at least float32, from effective alphas."""
    z = upcast(y)
    top = torch.finfo(z.dtype).max  # for a y that became infinite
    z = z.clamp(max=top)
    gamma, x_min, y_min = turning_point(alpha_n, beta)
    # 2⁻¹⁶ under the root and 2⁸ before it keep αp·y from overflowing
    root = 2**8 * torch.sqrt((beta / 2**9) ** 2 + alpha_p / 2**16 * z)
    positive = z / (beta / 2 + root).clamp(min=1e-30)
    negative = x_min + solve_remainder(((z - y_min) / gamma).clamp(0, top), right)
    return torch.where(right & (z >= 0), positive, negative.clamp(max=0))


def pack(bits):
    """(n,) bools → (⌈n/8⌉,) uint8. Bit k of all bytes holds the k-th eighth of them, in order: plain vector loads."""
    eighths = F.pad(bits, (0, -bits.numel() % 8)).view(8, -1)
    return sum(torch.where(eighths[k], 2**k, 0).to(torch.uint8) for k in range(8))


def unpack(packed, n):
    """(⌈n/8⌉,) uint8 → (n,) bools, as they were packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed >> shifts[:, None]) & 1).view(-1)[:n] != 0


def _inverted_forward(x, alpha_p, alpha_n, beta):
    z = upcast(x)
    _, slope_n = effective_alphas(alpha_p.to(z.dtype), alpha_n.to(z.dtype), beta)
    _, x_min, _ = turning_point(slope_n, beta)
    return _forward(x, alpha_p, alpha_n, beta), pack(z > x_min)


def _inverted_backward(grad, y, bits, alpha_p, alpha_n, beta):
    dtype = torch.promote_types(y.dtype, torch.float32)
    slopes = effective_alphas(alpha_p.to(dtype), alpha_n.to(dtype), beta)
    x = invert(y, unpack(bits, y.numel()), *slopes, beta)
    grad_x, grad_p, grad_n = _backward(grad, x, alpha_p, alpha_n, beta)
    return grad_x.to(y.dtype), grad_p, grad_n


class _InvertedXIELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha_p, alpha_n, beta):
        y, bits = call_compiled(_inverted_forward, x, alpha_p, alpha_n, beta)
        ctx.save_for_backward(y, bits, alpha_p, alpha_n)
        ctx.beta = beta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *call_compiled(_inverted_backward, grad, *ctx.saved_tensors, ctx.beta), None


def xielu_inverted(x, alpha_p, alpha_n, beta=0.5):
    """The same function as `xielu_fused`, of any shape, that keeps its output and one bit an element for backward.

    Where f is flat, y forgets x: at the minimum a y that was rounded by δ gives f' to within √(2·γ·δ), and for all
    x ≤ 0 to within √(2·αn·δ), since v = f'/γ = e^w − 1 makes dd = v/(1 + v)·dv with 1 + v ≤ αn/γ, so that
    (Δv)² ≤ 2·(αn/γ)·δ/γ. That is below 5e-4 of ∂L/∂y in float32 for αn ≤ 10, and for αn = 0.8 in bf16 0.02 at the
    minimum. For x > 0 the error is below half an ulp of f'.
    """
    if x.is_meta or not (torch.compiler.is_compiling() or can_compile(x.device.type)):
        return xielu_reference(x, alpha_p, alpha_n, beta)
    return _InvertedXIELU.apply(x.reshape(-1), alpha_p, alpha_n, beta).view(x.shape)


class XIELU(nn.Module):
    """xIELU with its two trained scalars, kept in float32 (a bf16 alpha_n moves in steps of 0.008).

    alpha_p_init, alpha_n_init: *effective* starting values; alpha_n_init must exceed beta. memory: "standard" keeps
    x for the backward pass, "inverted" the output and a bit (`xielu_inverted`).
    """

    def __init__(self, alpha_p_init=0.8, alpha_n_init=0.8, beta=0.5, memory="standard"):
        super().__init__()
        self.beta = beta
        self.memory = memory
        self.alpha_p = trained_scalar(alpha_p_init)
        self.alpha_n = trained_scalar(alpha_n_init, bound=beta)

    def forward(self, x):
        version = xielu_inverted if self.memory == "inverted" else xielu_fused
        return version(x, self.alpha_p, self.alpha_n, self.beta)

    def effective(self):
        """{"alpha_p": αp, "alpha_n": αn} as Python floats, for the log."""
        alpha_p, alpha_n = effective_alphas(self.alpha_p.detach(), self.alpha_n.detach(), self.beta)
        return {"alpha_p": alpha_p.item(), "alpha_n": alpha_n.item()}


# ---------------------------------------------------------------------------------------------------------------
# Siblings: other gradients, the same integration (from the authors' code; no fused version, a compiled model
# fuses them by itself)


def xiprelu(x, alpha_p, alpha_n, beta=0.5):
    """The integral of PReLU: αp·x² + βx for x > 0, αn·x² + βx for x ≤ 0, both α = softplus(raw). Any shape."""
    z = upcast(x)
    slope_p, slope_n = effective_alphas(alpha_p.to(z.dtype), alpha_n.to(z.dtype), beta=0)
    slope = torch.where(z > 0, slope_p, slope_n)
    return (slope * z * z + beta * z).to(x.dtype)


def xiep(x, alpha_p, alpha_p3, alpha_n, beta=0.5):
    """The integral of PolyReLU and ELU: xIELU plus αp3·x³ for x > 0, αp3 = softplus(alpha_p3). Any shape."""
    z = upcast(x)
    positive = z.clamp(min=0)
    cubic = F.softplus(alpha_p3.to(z.dtype)).reshape(()) * positive * positive * positive
    return (xielu_fused(z, alpha_p, alpha_n, beta) + cubic).to(x.dtype)


class XIPReLU(nn.Module):
    """xIPReLU with its two trained scalars; the arguments are effective starting values."""

    def __init__(self, alpha_p_init=0.8, alpha_n_init=0.8, beta=0.5):
        super().__init__()
        self.beta = beta
        self.alpha_p = trained_scalar(alpha_p_init)
        self.alpha_n = trained_scalar(alpha_n_init)

    def forward(self, x):
        return xiprelu(x, self.alpha_p, self.alpha_n, self.beta)

    def effective(self):
        """{"alpha_p": αp, "alpha_n": αn} as Python floats, for the log."""
        return {"alpha_p": F.softplus(self.alpha_p).item(), "alpha_n": F.softplus(self.alpha_n).item()}


class XIEP(XIELU):
    """xIEP: xIELU with a third trained scalar for the cubic term."""

    def __init__(self, alpha_p_init=0.8, alpha_p3_init=0.4, alpha_n_init=0.8, beta=0.5):
        super().__init__(alpha_p_init, alpha_n_init, beta)
        self.alpha_p3 = trained_scalar(alpha_p3_init)

    def forward(self, x):
        return xiep(x, self.alpha_p, self.alpha_p3, self.alpha_n, self.beta)

    def effective(self):
        """As XIELU's, with alpha_p3."""
        return super().effective() | {"alpha_p3": F.softplus(self.alpha_p3).item()}
