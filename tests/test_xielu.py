"""xielu.py and inverted.py against float64 closed forms, in each dtype and wherever the arithmetic could break."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from activations import ACTIVATIONS, xiep, xiprelu
from inverted import pack, unpack, xielu_inverted
from model import MLP, ModelConfig
from xielu import XIELU, raw_parameter, xielu_fused, xielu_reference

VERSIONS = {"reference": xielu_reference, "fused": xielu_fused}
ALL_VERSIONS = VERSIONS | {"inverted": xielu_inverted}  # the inverted one's gradients are not as exact: see below
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def remainder(x):
    """eˣ − 1 − x of a float64 array, by a long series near 0."""
    series = np.zeros_like(x)
    near = np.clip(x, -1, 1)
    for k in range(30, 1, -1):
        series = series * near + 1 / math.factorial(k)
    return np.where(np.abs(x) < 1, series * near * near, np.expm1(x) - x)


def closed_form(x, grad, raw_p, raw_n, beta=0.5):
    """Value, input gradient, both alpha gradients and the sizes of the terms summed, in float64."""
    alpha_p, alpha_n = np.logaddexp(0, raw_p), beta + np.logaddexp(0, raw_n)
    sigma_p, sigma_n = 1 / (1 + np.exp(-raw_p)), 1 / (1 + np.exp(-raw_n))
    negative, positive = np.minimum(x, 0), np.maximum(x, 0)
    y = np.where(x > 0, alpha_p * positive**2, alpha_n * remainder(negative)) + beta * x
    y_size = np.where(x > 0, alpha_p * positive**2, np.abs(alpha_n * remainder(negative))) + np.abs(beta * x)
    slope = np.where(x > 0, 2 * alpha_p * positive, alpha_n * np.expm1(negative))
    grad_p = (grad * positive**2).sum() * sigma_p
    grad_n = (grad * remainder(negative)).sum() * sigma_n
    return y, grad * (slope + beta), grad_p, grad_n, y_size, np.abs(grad) * (np.abs(slope) + beta)


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "random":
        return 3 * torch.randn(20_000, generator=generator)
    if kind == "tiny":
        sizes = torch.logspace(-12, -3, 4000)
        return torch.cat([sizes, -sizes])
    if kind == "tiny negative":
        return -torch.logspace(-12, -3, 4000)
    if kind == "joints":
        return torch.cat([torch.linspace(-0.51, -0.49, 2001), torch.linspace(-1e-2, 1e-2, 2001)])
    if kind == "huge":
        return torch.cat([torch.logspace(1, 17, 500), -torch.logspace(1, 36, 500)])
    assert kind == "zero"
    return torch.tensor([0.0, -0.0, 0.0])


def close(actual, expected, scale, tolerance):
    worst = (np.abs(actual - expected) / np.maximum(scale, 1e-300)).max()
    assert worst <= tolerance, f"error {worst:.2e} of the terms, above {tolerance}"


@pytest.mark.parametrize("raw", [(0.2034, -1.0502), (-3.0, -4.0), (40.0, 100.0)])
@pytest.mark.parametrize("kind", ["random", "tiny", "tiny negative", "joints", "huge", "zero"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("version", VERSIONS)
def test_closed_form(version, dtype, kind, raw):
    x = inputs(kind).to(dtype).requires_grad_()
    alpha_p, alpha_n = (torch.tensor([value], requires_grad=True) for value in raw)
    grad = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).add(0.5).to(dtype)
    if kind == "huge":
        grad = grad * 1e-20  # so that the sums over x² stay representable
    y = VERSIONS[version](x, alpha_p, alpha_n)
    y.backward(grad)
    raw_p, raw_n = float(alpha_p.detach()), float(alpha_n.detach())
    expected = closed_form(x.detach().double().numpy(), grad.double().numpy(), raw_p, raw_n)
    value, grad_x, grad_p, grad_n, value_scale, grad_scale = expected
    assert y.dtype == x.grad.dtype == dtype and alpha_p.grad.dtype == torch.float32
    close(y.detach().double().numpy(), value, value_scale, TOLERANCE[dtype])
    close(x.grad.double().numpy(), grad_x, grad_scale, TOLERANCE[dtype])
    assert alpha_p.grad.item() == pytest.approx(grad_p, rel=1e-3, abs=1e-37)
    assert alpha_n.grad.item() == pytest.approx(grad_n, rel=1e-3, abs=1e-37)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradient_near_zero_where_beta_hides_nothing(version, beta):
    x = inputs("tiny").requires_grad_()
    alphas = [torch.tensor([value]) for value in (0.2, 5.0)]
    y = VERSIONS[version](x, *alphas, beta)
    y.sum().backward()
    _, expected, _, _, _, scale = closed_form(x.detach().double().numpy(), np.ones(len(x)), *map(float, alphas), beta)
    close(x.grad.double().numpy(), expected, scale, 1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_large_sums_of_alpha_gradients(version):
    x = torch.randn(2**22, generator=torch.Generator().manual_seed(3), requires_grad=True)
    alphas = [torch.tensor([value], requires_grad=True) for value in (0.2, -1.0)]
    VERSIONS[version](x, *alphas).sum().backward()
    _, _, grad_p, grad_n, _, _ = closed_form(x.detach().double().numpy(), np.ones(2**22), *map(float, (0.2, -1.0)))
    assert alphas[0].grad.item() == pytest.approx(grad_p, rel=1e-5)
    assert alphas[1].grad.item() == pytest.approx(grad_n, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_exact_at_zero(version, dtype):
    act = XIELU()
    x = torch.zeros(5, dtype=dtype, requires_grad=True)
    y = ALL_VERSIONS[version](x, act.raw_alpha_p, act.raw_alpha_n, 0.5)
    y.sum().backward()
    assert (y == 0).all() and (x.grad == 0.5).all()


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_gradcheck(version):
    x = torch.tensor([-30.0, -3.0, -0.51, -0.3, -1e-3, 1e-3, 0.4, 5.0], dtype=torch.float64, requires_grad=True)
    alphas = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.2, -1.0)]
    assert torch.autograd.gradcheck(ALL_VERSIONS[version], (x, *alphas))


@pytest.mark.parametrize("version", VERSIONS)
def test_float64_is_computed_in_float64(version):
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64, requires_grad=True)
    alphas = [torch.tensor([value], dtype=torch.float64) for value in (0.2, -1.0)]
    y = VERSIONS[version](x, *alphas)
    y.sum().backward()
    value, grad_x, _, _, value_scale, grad_scale = closed_form(x.detach().numpy(), np.ones(1001), 0.2, -1.0)
    close(y.detach().numpy(), value, value_scale, 1e-15)
    close(x.grad.numpy(), grad_x, grad_scale, 1e-15)


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_not_finite_and_extreme_inputs(version):
    act = XIELU(alpha_n=1.2)
    top = torch.finfo(torch.float32).max
    x = torch.tensor([math.nan, math.inf, -math.inf, -top, 1.9e19, -1e30], requires_grad=True)
    y = ALL_VERSIONS[version](x, act.raw_alpha_p, act.raw_alpha_n, 0.5)
    assert y[0].isnan() and y[1] == y[2] == math.inf
    assert y[3:].isfinite().all()
    assert y[3].item() == pytest.approx(0.7 * top, rel=1e-6)
    assert y[4].item() == pytest.approx(0.8 * 1.9e19**2, rel=1e-5)
    finite = torch.tensor([-top, 1.9e19, -1e30, 0.0], requires_grad=True)
    y = ALL_VERSIONS[version](finite, act.raw_alpha_p, act.raw_alpha_n, 0.5)
    y.backward(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert finite.grad.isfinite().all() and act.raw_alpha_p.grad.isfinite() and act.raw_alpha_n.grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_at_infinity(version, dtype):
    act = XIELU()
    x = torch.tensor([-math.inf, -3e38, math.inf], dtype=dtype, requires_grad=True)
    y = VERSIONS[version](x, act.raw_alpha_p, act.raw_alpha_n, 0.5)
    y.backward(torch.tensor([1.0, 1.0, 0.0], dtype=dtype))
    assert y[0] == y[2] == math.inf
    assert x.grad[:2].tolist() == pytest.approx([-0.3, -0.3], rel=4e-3)


@pytest.mark.parametrize("version", ALL_VERSIONS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5), (2, 8)])
def test_any_shape(version, shape):
    act = XIELU()
    x = torch.randn(shape, requires_grad=True)
    y = ALL_VERSIONS[version](x, act.raw_alpha_p, act.raw_alpha_n, 0.5)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and act.raw_alpha_p.grad.shape == (1,)
    scalar = ALL_VERSIONS[version](x, act.raw_alpha_p[0], act.raw_alpha_n[0], 0.5)
    assert torch.equal(y, scalar)


def both(x):
    """Outputs and gradients of the two versions on one input."""
    results = []
    for version in VERSIONS.values():
        act = XIELU()
        leaf = x.detach().clone().requires_grad_()
        y = version(leaf.t() if leaf.ndim == 2 else leaf, act.raw_alpha_p, act.raw_alpha_n, 0.5)
        y.float().square().sum().backward()
        results.append((y.detach(), leaf.grad, act.raw_alpha_p.grad, act.raw_alpha_n.grad))
    return zip(*results)


def test_not_contiguous():
    for reference, fused in both(torch.randn(33, 70)):
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-6)


def test_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for reference, fused in both(torch.randn(512).bfloat16()):
            torch.testing.assert_close(fused, reference, rtol=1e-2, atol=1e-3)


def test_inside_a_compiled_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), XIELU(), torch.nn.Linear(64, 16))
    x = torch.randn(8, 16)
    model(x).square().sum().backward()
    eager = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    compiled(x).square().sum().backward()
    for expected, parameter in zip(eager, model.parameters()):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_fused_keeps_only_x_and_the_scalars():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        act = XIELU()
        act(torch.randn(1000, requires_grad=True))
    *scalars, wide = sorted(tensor.numel() for tensor in kept)
    assert wide == 1000 and set(scalars) == {1}


def test_falls_back_with_one_warning_where_nothing_compiles(tmp_path):
    code = (
        "import torch, warnings\n"
        "from xielu import XIELU, xielu_reference\n"
        "act, x = XIELU(), torch.randn(100)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    y = act(x); act(x)\n"
        "torch.testing.assert_close(y, xielu_reference(x, act.raw_alpha_p, act.raw_alpha_n))\n"
        "print(sum('running uncompiled' in str(w.message) for w in caught))\n"
    )
    environment = {"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "1", result.stderr


# ---------------------------------------------------------------------------------------------------------------
# Inverted: x from y


def inverted(x, alpha_p, alpha_n):
    """Its output, input gradient and alpha gradients for ∂L/∂y = 1 and *effective* alphas, with the closed form's
    and the place of the minimum: two tuples of float64, and x*."""
    raw = [raw_parameter(alpha_p), raw_parameter(alpha_n, bound=0.5)]
    raw = [scalar.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_() for scalar in raw]
    leaf = x.detach().clone().requires_grad_()
    y = xielu_inverted(leaf, *raw)
    y.sum().backward()
    assert y.dtype == leaf.grad.dtype == x.dtype
    actual = (y.detach().double().numpy(), leaf.grad.double().numpy(), raw[0].grad.item(), raw[1].grad.item())
    with np.errstate(over="ignore"):
        expected = closed_form(x.double().numpy(), np.ones(len(x)), raw[0].item(), raw[1].item())
    return actual, expected, math.log((alpha_n - 0.5) / alpha_n)


@pytest.mark.parametrize("alpha_p", [0.01, 0.8, 10.0])
@pytest.mark.parametrize("alpha_n", [0.51, 0.6, 0.8, 1.0, 1.27, 1.5, 2.5, 5.0, 10.0])
def test_inverted_in_float32(alpha_p, alpha_n):
    lowest = math.log((alpha_n - 0.5) / alpha_n)
    near_zero = torch.cat([inputs("tiny"), torch.linspace(-0.01, 0.01, 2001)])
    near_minimum = lowest + torch.cat([torch.linspace(-width, width, 4001) for width in (1.0, 0.05, 1e-3)])
    x = torch.cat([torch.linspace(-20, 20, 20_001), near_zero, near_minimum])
    actual, expected, _ = inverted(x, alpha_p, alpha_n)
    error = np.abs(actual[1] - expected[1])
    assert error.max() < 5e-4
    assert error[np.abs(x.numpy() - lowest) > 0.3].max() < 1e-4  # where f is not flat
    assert actual[2:] == pytest.approx(expected[2:4], rel=1e-4)


@pytest.mark.parametrize("alpha_n", [0.51, 0.8, 1.3, 10.0])
def test_inverted_in_float64(alpha_n):
    lowest = math.log((alpha_n - 0.5) / alpha_n)
    x = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    x = torch.cat([x, lowest + torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64)])
    actual, expected, _ = inverted(x, 0.8, alpha_n)
    error = np.abs(actual[1] - expected[1])
    assert error.max() < 3e-8 and error[np.abs(x.numpy() - lowest) > 0.3].max() < 1e-12
    assert actual[2:] == pytest.approx(expected[2:4], rel=1e-11)


@pytest.mark.parametrize("alphas", [(0.8, 0.8), (0.01, 0.51), (10.0, 10.0), (0.3, 1.5), (0.8, 50.0)])
def test_inverted_on_every_bf16(alphas):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    actual, _, _ = inverted(x, *alphas)
    assert not np.isnan(actual[1]).any() and not np.isnan(actual[2:]).any()
    # rounding y by δ moves the gradient by at most √(2·αn·δ), or for x > 0 by 2⁻⁹ of it; then it is rounded itself
    x = x[x.abs() < 1e18]  # beyond, y is infinite
    (y, grad, *_), (exact_y, exact_grad, *_), _ = inverted(x, *alphas)
    forced = np.where(x > 0, 2**-9 * np.abs(exact_grad), np.sqrt(2 * alphas[1] * np.abs(y - exact_y)))
    close(grad, exact_grad, forced + 2**-8 * np.abs(exact_grad) + 5e-4, 1.0)


def test_inverted_where_alpha_n_has_sunk_to_beta():
    x = torch.linspace(-30, 3, 1001, requires_grad=True)
    alphas = [torch.tensor([value], requires_grad=True) for value in (0.2, -40.0)]
    xielu_inverted(x, *alphas).sum().backward()
    expected = closed_form(x.detach().double().numpy(), np.ones(1001), 0.2, -40.0)
    np.testing.assert_allclose(x.grad.numpy(), expected[1], atol=1e-4)
    assert alphas[0].grad.isfinite() and alphas[1].grad.isfinite()


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 1001])
def test_bits(n):
    bits = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    packed = pack(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(n / 8),)
    assert torch.equal(unpack(packed, n), bits)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverted_keeps_one_wide_tensor_less(dtype, compiled):
    x = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    wide = x.numel() // 64 * 256
    kept, results, states = {}, {}, {}
    for name in ("xielu", "xielu_inverted"):
        mlp = MLP(ModelConfig(dim=64, n_heads=4, n_kv_heads=4, ffn_dim=256, activation=name))
        generator = torch.Generator().manual_seed(5)
        for layer in (mlp.up_proj, mlp.down_proj):
            torch.nn.init.normal_(layer.weight, std=0.1, generator=generator)
        states[name] = mlp.state_dict()
        weights = {parameter.data_ptr() for parameter in mlp.parameters()}
        if compiled:
            mlp.compile()
        storages = {}

        def keep(tensor, storages=storages, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = mlp(leaf)
        kept[name] = sum(storages.values())
        y.sum().backward()
        results[name] = [y.detach(), leaf.grad, *(parameter.grad for parameter in mlp.parameters())]
    assert kept["xielu"] - kept["xielu_inverted"] == wide * dtype.itemsize - wide // 8
    assert states["xielu"].keys() == states["xielu_inverted"].keys()
    assert all(torch.equal(states["xielu"][name], states["xielu_inverted"][name]) for name in states["xielu"])
    for standard, inverse in zip(results["xielu"], results["xielu_inverted"]):
        scale = standard.abs().max()
        torch.testing.assert_close(
            inverse / scale, standard / scale, rtol=0, atol=1e-4 if dtype.itemsize == 4 else 0.02
        )


def test_inverted_inside_a_compiled_model_and_on_meta():
    act = XIELU(function=xielu_inverted)
    x = torch.randn(3, 21, requires_grad=True)
    act(x).sum().backward()
    eager = x.grad.clone()
    x.grad = None
    torch.compile(act, fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, eager, rtol=0, atol=5e-4)
    assert xielu_inverted(torch.empty(2, 3, device="meta"), *(torch.empty(1, device="meta") for _ in "pn")).is_meta


def test_module():
    act = XIELU()
    assert act.raw_alpha_p.shape == act.raw_alpha_n.shape == (1,) and act.raw_alpha_p.dtype == torch.float32
    assert act.raw_alpha_p.item() == pytest.approx(0.2034, abs=1e-4)
    assert act.raw_alpha_n.item() == pytest.approx(-1.0502, abs=1e-4)
    assert act.effective() == pytest.approx({"alpha_p": 0.8, "alpha_n": 0.8})
    assert list(act.state_dict()) == ["raw_alpha_p", "raw_alpha_n"]
    with pytest.raises(ValueError, match="above 0.5"):
        XIELU(alpha_n=0.5)


def test_minimum_of_the_function():
    act = XIELU()
    x = torch.linspace(-2, 0, 20001)
    lowest = x[act(x).argmin()].item()
    assert lowest == pytest.approx(math.log((0.8 - 0.5) / 0.8), abs=1e-3)


@pytest.mark.parametrize("name", ["xiprelu", "xiep"])
def test_siblings_are_integrals_of_their_gradients(name):
    x = (torch.arange(-400, 401, dtype=torch.float64) / 100).requires_grad_()
    alpha_p, alpha_n, alpha_p3 = (torch.tensor(value, dtype=torch.float64) for value in (0.85, 0.81, 0.6))
    if name == "xiprelu":
        y = xiprelu(x, alpha_p, alpha_n)
        gradient = 2 * torch.where(x > 0, alpha_p, alpha_n) * x + 0.5
    else:
        y = xiep(x, alpha_p, alpha_n, alpha_p3)
        rising = 2 * alpha_p * x + 3 * alpha_p3 * x**2 + 0.5
        gradient = torch.where(x > 0, rising, alpha_n * torch.expm1(x) + 0.5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, gradient.detach())
    assert y[400] == 0
    integral = torch.cumulative_trapezoid(gradient, x)
    torch.testing.assert_close(y[1:] - y[0], integral, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name, starts", [("xiprelu", [0.8, 0.8]), ("xiep", [0.8, 0.8, 0.4])])
def test_siblings_as_modules(name, starts):
    act = ACTIVATIONS[name].module()
    assert list(act.effective()) == ["alpha_p", "alpha_n", "alpha_p3"][: len(starts)]
    assert list(act.effective().values()) == pytest.approx(starts)
    x = torch.tensor([-1e12, 0.0, 1e12], requires_grad=True)
    act(x)[1].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in (x, *act.parameters()))
    assert x.grad[1] == 0.5
