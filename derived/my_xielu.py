"""my_xielu: the integral of a gradient, written by tools/derive.py.

                   x > 0          x ≤ 0
    gradient f′    2·ap·x + β     an·(eˣ − 1) + β
    integral f     ap·x² + β·x    an·(−x + eˣ − 1) + β·x
    ∂f/∂ap         x²             0
    ∂f/∂an         0              −x + eˣ − 1

beta = 0.5 is fixed.
ap = softplus(raw) is trained, from 0.8.
an = beta + softplus(raw) is trained, from 0.8.

It comes from

    python -m tools.derive my_xielu --positive="2 * ap * x + beta" --negative="an * (exp(x) - 1) + beta" \
        --trained="ap=0.8, an=0.8>beta" --fixed="beta=0.5"
"""

import torch

from activations import Activation
from integral import Integrated, exp_terms, sides

beta = 0.5

def value(x, ap, an):
    """f(x) of x and the scalars of the table."""
    p, m = sides(x)
    expm1, rest, within, beyond = exp_terms(m, x.dtype)
    positive = p * (ap * p + beta)
    negative = an * rest - beta * within + beyond * (an - beta)
    return positive + negative


def partials(x, ap, an):
    """f′(x), and ∂f/∂a for each trained scalar a."""
    p, m = sides(x)
    expm1, rest, within, beyond = exp_terms(m, x.dtype)
    return (
        torch.where(p > 0, 2 * ap * p + beta, an * expm1 + beta),
        p**2,
        beyond + rest,
    )


class MyXielu(Integrated):
    """my_xielu with its trained scalars."""

    start = {"ap": 0.8, "an": 0.8}
    bound = {"ap": 0.0, "an": beta}
    value = staticmethod(value)
    partials = staticmethod(partials)


ACTIVATION = Activation(
    "ap·x² + β·x for x > 0, an·(−x + eˣ − 1) + β·x for x ≤ 0; beta = 0.5 is fixed; ap = softplus(raw) is trained, from 0.8; an = beta + softplus(raw) is trained, from 0.8",
    MyXielu,
)
