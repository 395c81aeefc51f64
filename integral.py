"""What every activation that tools/derive.py writes shares: a module made of two formulas, and their parts near 0.

A derived file gives `value`, f(x) of x and its scalars, and `partials`, f'(x) and ∂f/∂a for each of them, as integrals
and derivatives of the gradient that was asked for. Both are elementwise and meant to be read beside the table at the
file's top. Here they become one compiled pass over memory each way that keeps only x and the scalars, as in xielu.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from xielu import CUT, DEGREE, bf16_terms, call_compiled, can_compile, exp_remainder, trained_scalar, upcast

# ---------------------------------------------------------------------------------------------------------------
# Parts of formulas. A side is a formula of a size: p for x > 0, m for x ≤ 0, each 0 on the other side, so that no
# branch that is not taken can overflow.


def sides(x):
    """p = max(x, 0) and m = max(−x, 0), in at least float32."""
    z = upcast(x)
    return torch.relu(z), torch.relu(-z)


def split(size, near):
    """(`size` where near 0, else 0; `size` beyond, else 0). What multiplies them can differ: beyond, a sum is grouped
    so that a large x does not overflow before its terms meet; near 0, so that nothing cancels."""
    return torch.where(near, size, 0), torch.where(near, 0, size)


def exp_terms(t, dtype):
    """e⁻ᵗ for t ≥ 0 in parts that do not cancel, (E, rest, within, beyond), with

        E = e⁻ᵗ − 1          rest + beyond = e⁻ᵗ − 1 + t          within + beyond = t

    to full precision, or for an activation in bfloat16 to 3e-4 of themselves, without a call of exp (`bf16_terms`).
    """
    if dtype == torch.bfloat16:
        _, rest, beyond = bf16_terms(t)
        rest = torch.where(t < 2**-9, 0.5 * t * t, rest)  # there it rounds t off
        within = t - beyond
        return rest - within, rest, within, beyond
    near = t < CUT
    expm1 = torch.exp(-t) - 1
    series = exp_remainder(-t, DEGREE[t.dtype])
    return torch.where(near, series - t, expm1), torch.where(near, series, expm1), *split(t, near)


def near_zero(t, order, series, cut):
    """t^order · (c₀ + c₁·u + …) with u = t − cut/2 and c = series[dtype of t]: for t < cut, a function less its Taylor
    terms below that order, which would cancel if it were computed with them."""
    total, u = 0.0, t - cut / 2
    for coefficient in reversed(series[t.dtype]):
        total = total * u + coefficient
    for _ in range(order):
        total = total * t
    return total


# ---------------------------------------------------------------------------------------------------------------
# The module


def effective_scalar(raw, bound):
    """The scalar of the formulas, of shape (): bound + softplus(raw), or raw itself where the bound is None."""
    return (raw if bound is None else bound + F.softplus(raw)).reshape(())


def raw_scalar(start, bound):
    """The trained parameter whose effective scalar is `start`."""
    if bound is None:
        return nn.Parameter(torch.tensor([start], dtype=torch.float32))
    return trained_scalar(start, bound)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, run, forward, backward, *raw):
        ctx.save_for_backward(x, *raw)
        ctx.run, ctx.backward_pass = run, backward
        return run(forward, x, *raw)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_x, *grads = ctx.run(ctx.backward_pass, grad, *ctx.saved_tensors)
        return grad_x, None, None, None, *grads


def passes(value, partials, bounds):
    """(forward, backward) of an activation, functions of x and raw scalars, and of ∂L/∂y, x and raw scalars."""

    def effective(x, raw):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return [effective_scalar(scalar.to(dtype), bound) for scalar, bound in zip(raw, bounds)]

    def forward(x, *raw):
        y = value(x, *effective(x, raw))
        # torch 2.11 loses the gradient of a compiled Function whose forward ends in a cast that changes nothing
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def backward(grad, x, *raw):
        g = upcast(grad)
        slope, *by_scalar = partials(x, *effective(x, raw))
        grads = []
        for scalar, bound, partial in zip(raw, bounds, by_scalar):
            by_raw = 1 if bound is None else torch.sigmoid(scalar)
            grads.append(((g * partial).sum() * by_raw).to(scalar.dtype).reshape(scalar.shape))
        return (g * slope).to(x.dtype), *grads

    return forward, backward


def uncompiled(function, *arguments):
    return function(*arguments)


class Integrated(nn.Module):
    """A derived activation with its trained scalars, kept in float32 as raw values of shape (1,).

    A subclass has `start`, {name: effective starting value}, `bound`, {name: what the scalar stays above, or None}, and
    the functions `value` and `partials`.
    """

    def __init__(self):
        super().__init__()
        for name, start in self.start.items():
            setattr(self, name, raw_scalar(start, self.bound[name]))

    def __init_subclass__(cls):
        cls.passes = passes(cls.value, cls.partials, tuple(cls.bound.values()))

    @classmethod
    def apply_to(cls, x, *raw, run=uncompiled):
        """f(x) by raw scalars, differentiable once; run: how its passes are called."""
        return _Fused.apply(x, run, *cls.passes, *raw)

    def forward(self, x):
        raw = [getattr(self, name) for name in self.start]
        if torch.compiler.is_compiling():  # inside a compiled model, it becomes part of the model's own graph
            return self.apply_to(x, *raw, run=call_compiled)
        run = call_compiled if not x.is_meta and can_compile(x.device.type) else uncompiled
        # flat, so that one compilation serves all shapes
        return self.apply_to(x.reshape(-1), *raw, run=run).view(x.shape)

    def effective(self):
        """{name: effective scalar} as Python floats, for the log."""
        return {name: effective_scalar(getattr(self, name).detach(), self.bound[name]).item() for name in self.start}
