"""activations.py: each name computes its formula, and the table is whole."""

import math

import pytest
import torch

from activations import ACTIVATIONS, get_activation

X = torch.linspace(-6, 6, 241, dtype=torch.float64)
Y = torch.linspace(2, -1, 241, dtype=torch.float64)
GATES = [1 / (1 + torch.exp(-X)), 0.5 * (1 + torch.erf(X / math.sqrt(2))), torch.arctan(X) / math.pi + 0.5]
# what the three gates multiply in the activations of these names
GATED = {"silu gelu atlu": X, "glu gglu aglu": Y, "swiglu geglu atglu": X * Y}


def call(module, name, x=X, y=Y):
    return module(x, y) if ACTIVATIONS[name].gated else module(x)


def test_the_table_has_every_name():
    ungated = "relu gelu silu relu2 leaky_relu2 xielu xiprelu xiep atlu xsilu xgelu xatlu".split()
    gated = "swiglu geglu atglu glu gglu aglu".split()
    gated += ["x" + name for name in gated]
    assert set(ACTIVATIONS) >= {*ungated, *gated}  # a reader may have added one
    assert all(ACTIVATIONS[name].gated == (name in gated) for name in [*ungated, *gated])
    assert all(ACTIVATIONS[name].formula for name in ACTIVATIONS)


def test_plain_ones():
    torch.testing.assert_close(ACTIVATIONS["relu"].module()(X), X.clamp(min=0))
    torch.testing.assert_close(ACTIVATIONS["relu2"].module()(X), X.clamp(min=0) ** 2)
    torch.testing.assert_close(ACTIVATIONS["leaky_relu2"].module()(X), torch.where(X > 0, X**2, X**2 / 4))


@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.1])
@pytest.mark.parametrize("names", GATED)
def test_gated_ones(names, alpha):
    for name, gate in zip(names.split(), GATES):
        torch.testing.assert_close(call(ACTIVATIONS[name].module(), name), gate * GATED[names])
        expanded = ACTIVATIONS["x" + name].module().double()
        torch.nn.init.constant_(expanded.alpha, alpha)
        torch.testing.assert_close(call(expanded, name).detach(), (gate * (1 + 2 * alpha) - alpha) * GATED[names])


INTEGRATED = {
    "xielu": lambda x, up, down, p, n: p * up**2 + n * (torch.expm1(down) - down) + 0.5 * x,
    "xiprelu": lambda x, up, down, p, n: p * up**2 + n * down**2 + 0.5 * x,
    "xiep": lambda x, up, down, p, n, p3: p * up**2 + p3 * up**3 + n * (torch.expm1(down) - down) + 0.5 * x,
}


@pytest.mark.parametrize("shift", [0.0, 0.7, -0.7])
@pytest.mark.parametrize("name", INTEGRATED)
def test_integrated_ones(name, shift):
    """Value and every gradient, at the scalars of the paper and at others; and none that is not finite far out."""
    module = ACTIVATIONS[name].module()
    start = {"alpha_p": 0.8, "alpha_n": 0.8} | ({"alpha_p3": 0.4} if name == "xiep" else {})
    assert module.effective() == pytest.approx(start)
    far = torch.tensor([-1e12, 0.0, 1e12], requires_grad=True)
    module(far)[1].backward()
    assert far.grad[1] == 0.5 and all(weight.grad.isfinite().all() for weight in (far, *module.parameters()))
    module = module.double()
    for raw in module.parameters():
        raw.data += shift
    x = X.clone().requires_grad_()
    results = module(x), INTEGRATED[name](x, x.clamp(min=0), x.clamp(max=0), *module.effective_scalars().values())
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y, [x, *module.parameters()], Y) for y in results))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtypes_and_gradients(name):
    module = get_activation(name).module()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = call(module, name, x, x.detach().flip(-1))
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and y.shape == x.shape
    for scalar in module.parameters():
        assert scalar.shape == (1,) and scalar.dtype == torch.float32 and scalar.grad.abs() > 0
    scalars = list(module.effective().values()) if hasattr(module, "effective") else []
    assert len(scalars) == len(list(module.parameters())) and all(isinstance(value, float) for value in scalars)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in INTEGRATED])
def test_gradcheck(name):
    x = torch.tensor([-3.0, -0.7, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    module = ACTIVATIONS[name].module().double()
    assert torch.autograd.gradcheck(module, (x, y) if ACTIVATIONS[name].gated else (x,))


def test_the_normal_gate_keeps_its_far_tail():
    y = ACTIVATIONS["gglu"].module()(torch.tensor([-10.0]), torch.ones(1))
    assert y.item() == pytest.approx(7.61985e-24, rel=1e-4)


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown activation 'xelu': did you mean 'xielu'.*known are relu, gelu"):
        get_activation("xelu")
