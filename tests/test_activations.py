"""activations.py: each name computes its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

import xielu
from activations import ACTIVATIONS, Activation, check_activation, get_activation
from plumbing.command import UserError

X = torch.linspace(-6, 6, 241, dtype=torch.float64)
Y = torch.linspace(2, -1, 241, dtype=torch.float64)
GATES = {
    "σ": 1 / (1 + torch.exp(-X)),
    "Φ": 0.5 * (1 + torch.erf(X / math.sqrt(2))),
    "arctan": torch.arctan(X) / math.pi + 0.5,
    "softsign": (X / (1 + X.abs()) + 1) / 2,
}
# what a gate multiplies in the activations of these names, which are in the order of GATES
GATED = {"silu gelu atlu ssslu": X, "glu gglu aglu ssglu": Y, "swiglu geglu atglu sssglu": X * Y}


def call(module, name, x=X, y=Y):
    return module(x, y) if ACTIVATIONS[name].gated else module(x)


def test_plain_ones():
    torch.testing.assert_close(ACTIVATIONS["relu"].module()(X), X.clamp(min=0))
    torch.testing.assert_close(ACTIVATIONS["relu2"].module()(X), X.clamp(min=0) ** 2)
    torch.testing.assert_close(ACTIVATIONS["leaky_relu2"].module()(X), torch.where(X > 0, X**2, X**2 / 4))


@pytest.mark.parametrize("alpha", [0.0, 0.3, -0.1])
@pytest.mark.parametrize("names", GATED)
def test_gated_ones(names, alpha):
    for name, gate in zip(names.split(), GATES.values()):
        torch.testing.assert_close(call(ACTIVATIONS[name].module(), name), gate * GATED[names])
        expanded = ACTIVATIONS["x" + name].module().double()
        torch.nn.init.constant_(expanded.alpha, alpha)
        torch.testing.assert_close(call(expanded, name).detach(), (gate * (1 + 2 * alpha) - alpha) * GATED[names])


INTEGRATED = {
    "xielu": lambda x, up, down, p, n: p * up**2 + n * (torch.expm1(down) - down) + 0.5 * x,
    "xiprelu": lambda x, up, down, p, n: p * up**2 + n * down**2 + 0.5 * x,
    "xiep": lambda x, up, down, p, n, p3: p * up**2 + p3 * up**3 + n * (torch.expm1(down) - down) + 0.5 * x,
    "xssslur2": lambda x, up, down, p, n: p * up**2 + n * down**2 / (1 - down) + 0.5 * x,
    "xssslupr": lambda x, up, down, p, n, p3: p * up**2 + p3 * up**3 + n * down**2 / (1 - down) + 0.5 * x,
}


def effective(name, module):
    """The effective scalars of an integrated activation, from its raw ones."""
    bounds = {} if name == "xiprelu" else {"raw_alpha_n": 0.5}
    return [bounds.get(raw, 0) + F.softplus(value) for raw, value in module.named_parameters()]


@pytest.mark.parametrize("shift", [0.0, 0.7, -0.7])
@pytest.mark.parametrize("name", INTEGRATED)
def test_integrated_ones(name, shift):
    """Value and every gradient, at the scalars of the paper and at others."""
    module = ACTIVATIONS[name].module()
    start = {"alpha_p": 0.8, "alpha_n": 0.8} | ({"alpha_p3": 0.4} if name in ("xiep", "xssslupr") else {})
    assert module.effective() == pytest.approx(start)
    module = module.double()
    for raw in module.parameters():
        raw.data += shift
    x = X.clone().requires_grad_()
    results = module(x), INTEGRATED[name](x, x.clamp(min=0), x.clamp(max=0), *effective(name, module))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y, [x, *module.parameters()], Y) for y in results))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "dtype, tolerance, of_sums", [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 4e-3, 1e-3)], ids=["float32", "bf16"]
)
@pytest.mark.parametrize("name", [name for name in INTEGRATED if name != "xielu"])  # test_xielu.py has that one
def test_integrated_ones_from_tiny_to_huge(monkeypatch, name, dtype, tolerance, of_sums, compiled):
    """Against the formula and its autograd in float64. An error is measured by the sizes of the two terms that are
    added, βx and the rest, and for a scalar's gradient, whose terms all have one sign, by the gradient itself."""
    monkeypatch.setattr(xielu, "COMPILE", compiled)
    size = torch.cat([torch.logspace(-30, 12, 4001), torch.linspace(0, 8, 4001)])
    x = torch.cat([size, -size]).to(dtype).requires_grad_()
    weights = (torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    module, exact = ACTIVATIONS[name].module(), ACTIVATIONS[name].module().double()
    y = module(x)
    grad, *by_raw = torch.autograd.grad(y, [x, *module.parameters()], weights)
    z = x.detach().double().requires_grad_()
    expected = INTEGRATED[name](z, z.clamp(min=0), z.clamp(max=0), *effective(name, exact))
    slope, *_ = torch.autograd.grad(expected.sum(), z, retain_graph=True)
    expected_by_raw = torch.autograd.grad(expected, list(exact.parameters()), weights.double())
    with torch.no_grad():
        for actual, total, beta in ((y, expected, 0.5 * z), (grad / weights.double(), slope, torch.full_like(z, 0.5))):
            scale = (total - beta).abs() + beta.abs()
            assert ((actual - total).abs() <= tolerance * scale).all()
    assert torch.equal(grad[x == 0], 0.5 * weights[x == 0])
    for actual, total in zip(by_raw, expected_by_raw):
        assert actual.item() == pytest.approx(total.item(), rel=of_sums)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dtypes_and_gradients(name):
    activation = get_activation(name)
    module = activation.module()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = call(module, name, x, x.detach().flip(-1))
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and y.shape == x.shape and activation.formula
    for scalar in module.parameters():
        assert scalar.shape == (1,) and scalar.dtype == torch.float32 and scalar.grad.abs() > 0
    scalars = list(module.effective().values()) if hasattr(module, "effective") else []
    assert len(scalars) == len(list(module.parameters())) and all(isinstance(value, float) for value in scalars)


@pytest.mark.parametrize(
    "name, x, expected", [("gglu", -10.0, 7.61985e-24), ("sssglu", -1e9, -0.5), ("aglu", -1e8, 1e-8 / math.pi)]
)
def test_gates_keep_their_far_tail(name, x, expected):
    y = ACTIVATIONS[name].module()(torch.tensor([x]), torch.ones(1))
    assert y.item() == pytest.approx(expected, rel=1e-4)


class Wrong(torch.nn.Module):
    """Breaks the contract of an activation in one way."""

    def __init__(self, how):
        super().__init__()
        self.how, self.unused = how, torch.nn.Parameter(torch.zeros(1)) if how == "unused" else None
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        if self.how == "breaks":
            torch._dynamo.graph_break()
        y = self.gain * x
        return y if self.how == "float32" else y.to(x.dtype)

    def effective(self):
        return {"gain": self.gain.sum() if self.how == "tensor" else self.gain.item()}


BROKEN = [
    (torch.nn.GLU, r"wrong in float32: TypeError: it makes \(2, 4\) of \(2, 8\), and must keep the shape"),
    (lambda: torch.tanh, "is not a torch.nn.Module: write a class whose forward calls it"),
    (lambda: Wrong("float32"), r"in bfloat16: .* it returns float32: end its forward with .to\(x.dtype\)"),
    (lambda: Wrong("tensor"), r"effective\(\) has a Tensor as 'gain': return numbers, by .item\(\)"),
    (lambda: Wrong("unused"), "unused gets no gradient: use it in forward, or leave it out"),
    (lambda: Wrong("breaks"), "activation wrong in float32: Unsupported: "),
]


@pytest.mark.parametrize("module, message", BROKEN)
def test_an_activation_that_breaks_its_contract(monkeypatch, module, message):
    monkeypatch.setitem(ACTIVATIONS, "wrong", Activation("wrong", module))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=message) as raised:
        check_activation("wrong", 8, compiles=True)
    assert "\n" not in str(raised.value)
