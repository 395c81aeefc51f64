"""xIELU that keeps its output instead of its input for the backward pass.

A fused activation keeps its input x, and the linear layer after it keeps the activation's output y: two wide tensors.
"Inverted Activations" (Novikov & Oseledets, arXiv 2407.15545) keeps y alone, with one bit that says on which side of
the minimum x was. The paper approximates f′ as a function of y; xIELU can be solved for x.

For x > 0, x is the root of a quadratic. For x ≤ 0 write γ = αn − β, x* for the minimum, y* = f(x*), w = x − x*, and
R(w) = e^w − 1 − w. Then

    e^x* = γ/αn      y* = −γ·R(−x*)      f(x) − y* = γ·R(w)      f′(x) = γ·(e^w − 1)

so w solves R(w) = d with d = (y − y*)/γ, an equation without parameters. Near the minimum a series in √(2d) solves it,
further away a rough solution and one or two of Halley's steps.

What is lost: rounding makes y − y* wrong by some δ, and where f is flat, many x share a y. From d(d)/dv = v/(1 + v)
for v = e^w − 1 = f′/γ, and 1 + v ≤ αn/γ, it follows that f′ is wrong by at most √(2·αn·δ). The largest errors that we
found are 3.0e-4 in float32 and 0.010 in bf16 (results/README.md). For x > 0 the error is below half a unit in the last
place.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from xielu import cast, chain_rule, computed_once, effective_scalar, exp_remainder, in_one_pass, partials, upcast, value

HALLEY_STEPS = {torch.float64: 2, torch.float32: 1}  # one takes an error of 5e-3 in w to 2e-8, two to 5e-16
SERIES_ALONE = {torch.float64: 0.01, torch.float32: 0.5}  # below this √(2d) a step would lose more than it gains


def minimum(alpha_n, beta):
    """(γ, x*, y*), each of shape (), from the effective αn."""
    gamma = (alpha_n - beta).clamp(min=1e-6)  # rounding may have made it 0
    depth = torch.log1p(beta / gamma)  # −x*
    remainder = torch.where(depth < 1, exp_remainder(depth, degree=18), beta / gamma - depth)
    return gamma, -depth, -gamma * remainder


def solve_remainder(d, right):
    """The w with e^w − 1 − w = d, for d ≥ 0: the positive one where `right`, else the negative one. Any shape."""
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
    """The x that became y, above x* where `right`, in at least float32, from effective alphas."""
    z = upcast(y)
    largest = torch.finfo(z.dtype).max
    z = z.clamp(max=largest)  # a y that became infinite
    gamma, x_min, y_min = minimum(alpha_n, beta)
    # the root of αp·x² + β·x = y; 2⁻¹⁶ under the square root and 2⁸ before it keep αp·y from overflowing
    root = 2**8 * torch.sqrt((beta / 2**9) ** 2 + alpha_p / 2**16 * z)
    positive = z / (beta / 2 + root).clamp(min=1e-30)
    negative = x_min + solve_remainder(((z - y_min) / gamma).clamp(0, largest), right)
    return torch.where(right & (z >= 0), positive, negative.clamp(max=0))


def pack(bits):
    """(n,) bools → (⌈n/8⌉,) uint8. Bit k of the bytes holds the k-th eighth of the bools, so that both are read in
    order."""
    eighths = F.pad(bits, (0, -bits.numel() % 8)).view(8, -1)
    return sum(torch.where(eighths[k], 2**k, 0).to(torch.uint8) for k in range(8))


def unpack(packed, n):
    """(⌈n/8⌉,) uint8 → (n,) bools: undo pack."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed >> shifts[:, None]) & 1).view(-1)[:n] != 0


def forward_pass(x, alpha_p, alpha_n, beta):
    """y, and the packed bits of x > x*."""
    _, x_min, _ = minimum(alpha_n, beta)
    return cast(value(x, alpha_p, alpha_n, beta), x.dtype), pack(upcast(x) > x_min)


def backward_pass(y, bits, grad, alpha_p, alpha_n, beta):
    """∂L/∂x, ∂L/∂αp and ∂L/∂αn, from the x that became y."""
    x = invert(y, unpack(bits, y.numel()), alpha_p, alpha_n, beta)
    return chain_rule(grad, y.dtype, *partials(x, alpha_p, alpha_n, beta))


class Inverted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha_p, alpha_n, beta):
        alpha_p, alpha_n = computed_once(alpha_p), computed_once(alpha_n)
        y, bits = in_one_pass(forward_pass, x, alpha_p, alpha_n, beta)
        ctx.save_for_backward(y, bits, alpha_p, alpha_n)
        ctx.beta = beta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, bits, alpha_p, alpha_n = ctx.saved_tensors
        return *in_one_pass(backward_pass, y, bits, grad, alpha_p, alpha_n, ctx.beta), None


def xielu_inverted(x, raw_p, raw_n, beta=0.5):
    """The same function as `xielu_fused`. It keeps its output, which the next layer keeps anyway, and one bit per
    element."""
    alpha_p, alpha_n = effective_scalar(raw_p), effective_scalar(raw_n, bound=beta)
    return Inverted.apply(x.reshape(-1), alpha_p, alpha_n, beta).view(x.shape)
