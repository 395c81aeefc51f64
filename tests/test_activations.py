"""activations.py: each name computes its formula, and the table is whole."""

import math

import pytest
import torch
import torch.nn.functional as F

from activations import ACTIVATIONS, get_activation

X = torch.linspace(-6, 6, 241, dtype=torch.float64)
Y = torch.linspace(2, -1, 241, dtype=torch.float64)
GATES = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "normal": lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "arctan": lambda x: torch.arctan(x) / math.pi + 0.5,
}
SELF_GATED = {"silu": "sigmoid", "gelu": "normal", "atlu": "arctan"}
FIRST_ORDER = {"glu": "sigmoid", "gglu": "normal", "aglu": "arctan"}
SECOND_ORDER = {"swiglu": "sigmoid", "geglu": "normal", "atglu": "arctan"}


def make(name, alpha=None):
    module = ACTIVATIONS[name].module().double()
    if alpha is not None:
        with torch.no_grad():
            module.alpha.fill_(alpha)
    return module


def test_the_table_has_every_name():
    ungated = "relu gelu silu relu2 xielu xiprelu xiep atlu xsilu xgelu xatlu".split()
    gated = "swiglu geglu atglu glu gglu aglu".split()
    gated += ["x" + name for name in gated]
    assert set(ACTIVATIONS) >= {*ungated, *gated}  # a reader may have added one
    assert all(ACTIVATIONS[name].gated == (name in gated) for name in [*ungated, *gated])
    assert all(ACTIVATIONS[name].formula for name in ACTIVATIONS)


def test_plain_ones():
    torch.testing.assert_close(make("relu")(X), X.clamp(min=0))
    torch.testing.assert_close(make("relu2")(X), X.clamp(min=0) ** 2)
    torch.testing.assert_close(make("silu")(X), F.silu(X))
    torch.testing.assert_close(make("gelu")(X), F.gelu(X))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_integrated_ones_start_at_the_papers_values(name):
    if name in ("xielu", "xiprelu", "xiep"):
        negative, positive = X.clamp(max=0), X.clamp(min=0)
        value = 0.8 * positive**2 + 0.5 * X
        value += 0.8 * negative**2 if name == "xiprelu" else 0.8 * (torch.expm1(negative) - negative)
        value += 0.4 * positive**3 if name == "xiep" else 0
        torch.testing.assert_close(make(name)(X).detach(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.1])
def test_gated_ones(alpha):
    def expanded(gate):
        return GATES[gate](X) * (1 + 2 * alpha) - alpha

    for name, gate in SELF_GATED.items():
        torch.testing.assert_close(make("x" + name, alpha)(X).detach(), X * expanded(gate))
        torch.testing.assert_close(make(name)(X), X * GATES[gate](X))
    for name, gate in FIRST_ORDER.items():
        torch.testing.assert_close(make("x" + name, alpha)(X, Y).detach(), expanded(gate) * Y)
        torch.testing.assert_close(make(name)(X, Y), GATES[gate](X) * Y)
    for name, gate in SECOND_ORDER.items():
        torch.testing.assert_close(make("x" + name, alpha)(X, Y).detach(), X * expanded(gate) * Y)
        torch.testing.assert_close(make(name)(X, Y), X * GATES[gate](X) * Y)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtypes_and_gradients(name):
    activation = get_activation(name)
    module = activation.module()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    arguments = (x, x.detach().flip(-1)) if activation.gated else (x,)
    y = module(*arguments)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and y.shape == x.shape
    for scalar in module.parameters():
        assert scalar.shape == (1,) and scalar.dtype == torch.float32 and scalar.grad.abs() > 0
    scalars = list(module.effective().values()) if hasattr(module, "effective") else []
    assert len(scalars) == len(list(module.parameters())) and all(isinstance(value, float) for value in scalars)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ("xielu", "xiep")])
def test_gradcheck(name):
    activation = ACTIVATIONS[name]
    module = activation.module().double()
    x = torch.tensor([-3.0, -0.7, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x, y) if activation.gated else (x,))


def test_the_normal_gate_keeps_its_far_tail():
    x = torch.tensor([-10.0])
    assert make("gglu").float()(x, torch.ones(1)).item() == pytest.approx(7.61985e-24, rel=1e-4)


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown activation 'xelu': did you mean 'xielu'.*known are relu, gelu"):
        get_activation("xelu")
