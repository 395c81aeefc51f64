"""xielu.py and inverted.py against float64 closed forms, in each dtype and wherever the arithmetic could break; the
closed forms against xielu_vectors.json."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from model import MLP, ModelConfig
from plumbing.inverted import pack, unpack, xielu_inverted
from runs import ROOT
from tools.bench import bytes_kept
from xielu import XIELU, raw_parameter, xielu_fused, xielu_reference

VERSIONS = {"reference": xielu_reference, "fused": xielu_fused}
ALL_VERSIONS = VERSIONS | {"inverted": xielu_inverted}  # the inverted one's gradients are not as exact: see below
CASES = json.loads((ROOT / "tools/xielu_vectors.json").read_text("utf-8"))["cases"]
START = CASES[0]["raw_p"], CASES[0]["raw_n"]  # the raw scalars of XIELU()
# of f and f′, relative to their |terms|; of the scalars' gradients
TOLERANCE = {torch.float64: (1e-15, 1e-12), torch.float32: (1e-6, 1e-5), torch.bfloat16: (4e-3, 1e-3)}
SMALL = torch.logspace(-12, -3, 4000)
INPUTS = {
    "random": 3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1)),
    "near zero": torch.cat([SMALL, -SMALL, torch.tensor([0.0, -0.0])]),
    "joints": torch.cat([torch.linspace(-0.51, -0.49, 2001), torch.linspace(-1e-2, 1e-2, 2001)]),
    "huge": torch.cat([torch.logspace(1, 17, 500), -torch.logspace(1, 36, 500)]),
}


def remainder(x):
    """eˣ − 1 − x of a float64 array, by a long series near 0."""
    near = np.clip(x, -1, 1)
    series = np.polyval([1 / math.factorial(k) for k in range(30, 1, -1)], near) * near**2
    return np.where(np.abs(x) < 1, series, np.expm1(x) - x)


def closed_form(x, raw_p, raw_n, beta=0.5):
    """At each x, in float64: the two terms of f, those of f′, ∂f/∂raw_p and ∂f/∂raw_n."""
    x = x.double().numpy()
    positive, negative = np.maximum(x, 0), np.minimum(x, 0)
    alpha_p, alpha_n = np.logaddexp(0, raw_p), beta + np.logaddexp(0, raw_n)
    rest = remainder(negative)
    value = np.where(x > 0, alpha_p * positive**2, alpha_n * rest), beta * x
    slope = np.where(x > 0, 2 * alpha_p * positive, alpha_n * np.expm1(negative)), np.full_like(x, beta)
    return value, slope, positive**2 / (1 + np.exp(-raw_p)), rest / (1 + np.exp(-raw_n))


def computed(function, x, raw=START, beta=0.5, grad=None):
    """y, ∂L/∂x, ∂L/∂raw_p and ∂L/∂raw_n of one of the versions for this ∂L/∂y, or for 1."""
    x = x.detach().clone().requires_grad_()
    dtype = torch.promote_types(x.dtype, torch.float32)
    scalars = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in raw]
    y = function(x, *scalars, beta)
    y.backward(torch.ones_like(y) if grad is None else grad)
    assert y.dtype == x.grad.dtype == x.dtype and y.shape == x.shape
    return y.detach(), x.grad, *(scalar.grad for scalar in scalars)


def close(actual, terms, tolerance):
    """An error is measured by the sizes of the terms that were added."""
    error = np.abs(actual.double().numpy() - sum(terms)) / np.maximum(sum(map(np.abs, terms)), 1e-300)
    assert error.max() <= tolerance, f"error {error.max():.2e} of the terms, above {tolerance}"


def check(function, x, raw=START, beta=0.5):
    """One of the versions computes the closed form."""
    grad = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)).add(0.5).to(x.dtype)
    if x.abs().max() > 1e10:
        grad = grad * 1e-20  # so that the sums over x² stay representable
    y, grad_x, *grads = computed(function, x, raw, beta, grad)
    tolerance, tolerance_of_sums = TOLERANCE[x.dtype]
    value, slope, *by_raw = closed_form(x, *raw, beta)
    weights = grad.double().numpy()
    close(y, value, tolerance)
    close(grad_x, [weights * term for term in slope], tolerance)
    for total, partial in zip(grads, by_raw):
        assert total.item() == pytest.approx((weights * partial).sum(), rel=tolerance_of_sums, abs=1e-37)


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_is_that_of_the_vectors(case):
    x, *expected = torch.tensor(case["rows"], dtype=torch.float64).T
    value, slope, by_p, by_n = closed_form(x, case["raw_p"], case["raw_n"])
    for result, terms in zip(expected, (value, slope, [by_p], [by_n])):
        close(result, terms, 1e-15)


@pytest.mark.parametrize("raw", [START, (-3.0, -4.0), (40.0, 100.0)])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("version", VERSIONS)
def test_closed_form(version, dtype, kind, raw):
    check(VERSIONS[version], INPUTS[kind].to(dtype), raw)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("version", VERSIONS)
def test_near_zero_where_beta_hides_nothing(version, dtype, beta):
    check(VERSIONS[version], INPUTS["near zero"].to(dtype), (0.2, 5.0), beta)


@pytest.mark.parametrize("version", VERSIONS)
def test_many_numbers_other_layouts_and_autocast(version):
    x = torch.randn(2**22, generator=torch.Generator().manual_seed(3))
    check(VERSIONS[version], x)
    check(VERSIONS[version], x[: 33 * 70].view(33, 70).t())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(VERSIONS[version], x[:512].bfloat16())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_exact_at_zero(version, dtype):
    y, grad, *_ = computed(ALL_VERSIONS[version], torch.zeros(5, dtype=dtype))
    assert (y == 0).all() and (grad == 0.5).all()


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_not_finite_and_extreme_inputs(version):
    raw, top = (START[0], math.log(math.expm1(0.7))), torch.finfo(torch.float32).max
    x = torch.tensor([math.nan, math.inf, -math.inf, -top, 1.9e19, -1e30])
    y, *_ = computed(ALL_VERSIONS[version], x, raw)
    assert y[0].isnan() and y[1] == y[2] == math.inf
    assert y[3].item() == pytest.approx(0.7 * top, rel=1e-6)
    assert y[4].item() == pytest.approx(0.8 * 1.9e19**2, rel=1e-5) and y[5].isfinite()
    x, grad = torch.tensor([-top, 1.9e19, -1e30, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    _, *grads = computed(ALL_VERSIONS[version], x, raw, grad=grad)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_at_infinity(version, dtype):
    x, grad = torch.tensor([-math.inf, -3e38, math.inf], dtype=dtype), torch.tensor([1.0, 1.0, 0.0], dtype=dtype)
    y, grad_x, *_ = computed(VERSIONS[version], x, grad=grad)
    assert y[0] == y[2] == math.inf
    assert grad_x[:2].tolist() == pytest.approx([-0.3, -0.3], rel=4e-3)


@pytest.mark.parametrize("version", ALL_VERSIONS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5), (2, 8)])
def test_any_shape(version, shape):
    x, function = torch.randn(shape), ALL_VERSIONS[version]
    y, _, *grads = computed(function, x)
    assert y.shape == shape and all(grad.shape == (1,) for grad in grads)
    assert torch.equal(y, function(x, *map(torch.tensor, START)))
    assert function(x.to("meta"), *torch.empty(2, device="meta")).is_meta


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_inside_a_compiled_model(version):
    x, function = torch.randn(3, 21), ALL_VERSIONS[version]
    for eager, compiled in zip(computed(function, x), computed(torch.compile(function, fullgraph=True), x)):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=5e-4 if version == "inverted" else 1e-5)


def test_fused_keeps_only_x_and_the_scalars():
    assert bytes_kept(XIELU(), [torch.randn(1000, requires_grad=True)]) == 4 * (1000 + 4)


def test_falls_back_with_one_warning_where_nothing_compiles(tmp_path):
    code = """
import torch, warnings
from xielu import XIELU, xielu_reference
act, x = XIELU(), torch.randn(100)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    y = act(x); act(x)
torch.testing.assert_close(y, xielu_reference(x, act.raw_alpha_p, act.raw_alpha_n))
print(sum('running uncompiled' in str(w.message) for w in caught))
"""
    environment = {"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "1", result.stderr


def test_module():
    """test_activations.py has its formula."""
    raw = {name: value.item() for name, value in XIELU().state_dict().items()}
    assert raw == pytest.approx({"raw_alpha_p": START[0], "raw_alpha_n": START[1]})
    with pytest.raises(ValueError, match="above 0.5"):
        XIELU(alpha_n=0.5)


# ---------------------------------------------------------------------------------------------------------------
# Inverted: x from y


def inverted(x, alpha_p, alpha_n):
    """(output, input gradient, both scalars' gradients) for ∂L/∂y = 1 and *effective* alphas, and the same of the
    closed form, in float64."""
    raw = raw_parameter(alpha_p).item(), raw_parameter(alpha_n, bound=0.5).item()
    with np.errstate(over="ignore"):
        value, slope, by_p, by_n = closed_form(x, *raw)
        expected = sum(value), sum(slope), by_p.sum(), by_n.sum()
    return [result.double().numpy() for result in computed(xielu_inverted, x, raw)], expected


# where f is flat, near its minimum, the gradient is less exact
@pytest.mark.parametrize(
    "dtype, anywhere, away, sums", [(torch.float32, 5e-4, 1e-4, 1e-4), (torch.float64, 3e-8, 1e-12, 1e-11)]
)
@pytest.mark.parametrize("alpha_p", [0.01, 0.8, 10.0])
@pytest.mark.parametrize("alpha_n", [0.51, 0.6, 0.8, 1.0, 1.27, 1.5, 2.5, 5.0, 10.0])
def test_inverted(alpha_p, alpha_n, dtype, anywhere, away, sums):
    lowest = math.log((alpha_n - 0.5) / alpha_n)
    near_minimum = [lowest + torch.linspace(-width, width, 4001, dtype=dtype) for width in (1.0, 0.1, 1e-3, 1e-6)]
    everywhere = torch.cat([torch.linspace(-20, 20, 20_001), INPUTS["near zero"], INPUTS["joints"]]).to(dtype)
    x = torch.cat([everywhere, *near_minimum])
    (_, grad, *grads), (_, exact, *exact_grads) = inverted(x, alpha_p, alpha_n)
    error = np.abs(grad - exact)
    assert error.max() < anywhere and error[np.abs(x.numpy() - lowest) > 0.3].max() < away
    assert grads == pytest.approx(exact_grads, rel=sums)


@pytest.mark.parametrize("alphas", [(0.8, 0.8), (0.01, 0.51), (10.0, 10.0), (0.3, 1.5), (0.8, 50.0)])
def test_inverted_on_every_bf16(alphas):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    (_, *grads), _ = inverted(x, *alphas)
    assert not any(np.isnan(grad).any() for grad in grads)
    # rounding y by δ moves the gradient by at most √(2·αn·δ), or for x > 0 by 2⁻⁹ of it; then it is rounded itself
    x = x[x.abs() < 1e18]  # beyond, y is infinite
    (y, grad, *_), (exact_y, exact_grad, *_) = inverted(x, *alphas)
    forced = np.where(x > 0, 2**-9 * np.abs(exact_grad), np.sqrt(2 * alphas[1] * np.abs(y - exact_y)))
    assert (np.abs(grad - exact_grad) <= forced + 2**-8 * np.abs(exact_grad) + 5e-4).all()


def test_inverted_where_alpha_n_has_sunk_to_beta():
    x = torch.linspace(-30, 3, 1001)
    _, grad, *grads = computed(xielu_inverted, x, (0.2, -40.0))
    _, slope, *_ = closed_form(x, 0.2, -40.0)
    np.testing.assert_allclose(grad.numpy(), sum(slope), atol=1e-4)
    assert all(grad.isfinite() for grad in grads)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 1001])
def test_bits(n):
    bits = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    packed = pack(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(n / 8),)
    assert torch.equal(unpack(packed, n), bits)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inverted_keeps_one_wide_tensor_less(dtype, compiled):
    """In an MLP, whose last layer keeps the output anyway."""
    x, kept = torch.randn(4, 32, 64).to(dtype).requires_grad_(), []
    for activation in ("xielu", "xielu_inverted"):
        mlp = MLP(ModelConfig(dim=64, n_heads=4, n_kv_heads=4, ffn_dim=256, activation=activation))
        if compiled:
            mlp.compile()
        kept.append(bytes_kept(mlp, [x]))
    wide = 4 * 32 * 256
    assert kept[0] - kept[1] == wide * dtype.itemsize - wide // 8
