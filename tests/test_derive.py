"""tools/derive.py: known activations come out of it, new ones hold what they promise, mistakes get a line."""

import json
import math
import re
import shlex
import shutil

import mpmath
import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import integral
import train
from activations import ACTIVATIONS, get_activation, load_derived, short_name
from data import UserError
from runs import error, log
from tools import bench, compare, derive, derived_file, formula, plot, sample, stable
from xielu import XIELU, XIEP, XIPReLU

BETA = ["--fixed=beta=0.5"]
KNOWN = {
    "my_xielu": (
        ["--positive=2*ap*x + beta", "--negative=an*(exp(x) - 1) + beta", "--trained=ap=0.8, an=0.8>beta", *BETA],
        XIELU,
        {"ap": "alpha_p", "an": "alpha_n"},
    ),
    "my_xiprelu": (
        ["--positive=2*ap*x + beta", "--negative=2*an*x + beta", "--trained=ap=0.8,an=0.8", *BETA],
        XIPReLU,
        {"ap": "alpha_p", "an": "alpha_n"},
    ),
    "my_xiep": (
        [
            "--positive=3*ap3*x**2 + 2*ap*x + beta",
            "--negative=an*(exp(x) - 1) + beta",
            "--trained=ap=0.8, ap3=0.4, an=0.8>beta",
            *BETA,
        ],
        XIEP,
        {"ap": "alpha_p", "an": "alpha_n", "ap3": "alpha_p3"},
    ),
}
# in no paper: a dip that fades as slowly as 1/x, and one that goes back to a gradient of 0
NEW = {
    "soft_dip": [
        "--positive=2*ap*x + beta",
        "--negative=an*softsign(x) + beta",
        "--trained=ap=0.8, an=0.8>beta",
        *BETA,
    ],
    "short_dip": ["--positive=2*ap*x + beta", "--negative=(an*x + beta)*exp(x)", "--trained=ap=0.8, an=0.8", *BETA],
}


def soft_dip(x, ap, an, beta=0.5):
    """f, f′, ∂f/∂ap, ∂f/∂an and the size of f's terms, by hand."""
    if x > 0:
        return ap * x**2 + beta * x, 2 * ap * x + beta, x**2, 0 * x, ap * x**2 + beta * x
    m = -x
    bend = m - mpmath.log(1 + m)
    return an * bend - beta * m, -an * m / (1 + m) + beta, 0 * x, bend, an * bend + beta * m


def short_dip(x, ap, an, beta=0.5):
    if x > 0:
        return soft_dip(x, ap, an, beta)
    e = mpmath.exp(x)
    bend = (x - 1) * e + 1
    return an * bend + beta * (e - 1), (an * x + beta) * e, 0 * x, bend, an * bend + beta * (1 - e)


BY_HAND = {"soft_dip": soft_dip, "short_dip": short_dip}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: (path, what was printed)} of all of the above, derived in one folder."""
    folder = tmp_path_factory.mktemp("made")
    found, check_compiled = {}, derive.check_compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arguments in ({name: known[0] for name, known in KNOWN.items()} | NEW).items():
            printed = []
            patch.setattr("builtins.print", lambda *words, into=printed, **_: into.append(" ".join(map(str, words))))
            compiles = name == "soft_dip"  # once, since it takes a while
            patch.setattr(derive, "check_compiled", check_compiled if compiles else lambda module: None)
            assert derive.main([name, *arguments]) == 0, printed
            found[name] = folder / "derived" / f"{name}.py", "\n".join(printed)
            assert (folder / "derived" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return found


@pytest.fixture
def uncompiled(monkeypatch):
    """Nothing is compiled, which takes a while."""
    monkeypatch.setattr(integral, "can_compile", lambda device: False)
    monkeypatch.setattr(derive, "check_compiled", lambda module: None)


def module_of(made, name):
    return load_derived(made[name][0]).module()


def pass_through(module, x, grad):
    """Output, input gradient and {scalar: gradient} of a module."""
    module.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    y.backward(grad)
    return y.detach(), leaf.grad, {name: scalar.grad for name, scalar in module.named_parameters()}


# ------------------------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("name", KNOWN)
def test_known_ones_are_the_hand_written_ones(made, name, uncompiled):
    """To float64 rounding, near 0, at the joints and far out, at the start and elsewhere."""
    _, hand_written, names = KNOWN[name]
    sizes = torch.cat([torch.logspace(-12, 3, 400, dtype=torch.float64), torch.linspace(0.49, 0.51, 201).double()])
    x = torch.cat([sizes, -sizes, torch.zeros(1, dtype=torch.float64)])
    grad = 0.5 + torch.rand(len(x), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine, theirs = module_of(made, name).double(), hand_written().double()  # their scalars' gradients too
    assert {names[key]: value for key, value in mine.effective().items()} == pytest.approx(theirs.effective(), abs=1e-7)
    for shift in (0.0, 1.5, -3.0):
        for key, other in names.items():
            scalar = getattr(theirs, other)
            scalar.data += shift
            getattr(mine, key).data.copy_(scalar.data)
        (y, grad_x, by_scalar), expected = pass_through(mine, x, grad), pass_through(theirs, x, grad)
        # of the terms that each is the sum of
        assert ((y - expected[0]).abs() <= 1e-15 * (y.abs() + x.abs())).all()
        assert ((grad_x - expected[1]).abs() <= 1e-15 * (grad_x.abs() + 1)).all()
        for key, other in names.items():
            assert by_scalar[key].item() == pytest.approx(expected[2][other].item(), rel=1e-14)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_new_ones_against_the_formulas_in_many_digits(made, name, dtype, uncompiled):
    tolerance = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    sizes = torch.cat([torch.logspace(-12, 4, 150), torch.linspace(0.45, 0.55, 60)])
    x = torch.cat([sizes, -sizes]).to(dtype)
    module = module_of(made, name)
    scalars = {key: value.detach().double() for key, value in module.named_parameters()}
    effective = [integral.effective_scalar(value, module.bound[key]).item() for key, value in scalars.items()]
    with mpmath.workdps(60):
        exact = [[float(part) for part in BY_HAND[name](mpmath.mpf(at), *effective)] for at in x.tolist()]
    value, slope, by_p, by_n, scale = np.array(exact).T
    y, grad_x, by_scalar = pass_through(module, x, torch.ones_like(x))
    assert (np.abs(y.double().numpy() - value) <= tolerance * scale).all()
    assert (np.abs(grad_x.double().numpy() - slope) <= tolerance * (np.abs(slope) + 1)).all()
    for key, partial in zip(("ap", "an"), (by_p, by_n)):
        inner = torch.sigmoid(scalars[key]).item()
        assert by_scalar[key].item() == pytest.approx(
            partial.sum() * inner, rel=1e-3 if dtype == torch.bfloat16 else 1e-5
        )


def test_they_are_the_integrals_of_their_gradients(made, uncompiled):
    """Independently of sympy and mpmath."""
    gradients = {"soft_dip": lambda x: 0.8 * x / (1 - x) + 0.5, "short_dip": lambda x: (0.8 * x + 0.5) * math.exp(x)}
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for name, gradient in gradients.items():
        for place in (-0.01, -0.3, -0.6, -2.0, -9.0):
            value = module_of(made, name)(torch.tensor([place], dtype=torch.float64)).item()
            expected = sum(w * gradient(place * (1 + node) / 2) for w, node in zip(weights, nodes)) * place / 2
            assert value == pytest.approx(expected, rel=1e-7, abs=1e-12)  # its scalars are float32


def test_tiny_inputs_where_nothing_hides_what_cancels(tmp_path, monkeypatch, uncompiled):
    """Without β·x beside it, f is as small as x², and still exact; in bf16 too."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--positive=a*(exp(-x) - 1 + x)", "--negative=b*(exp(x) - 1)", "--trained=a=1, b=1"]
    assert derive.main(["bare", *arguments]) == 0
    module = load_derived(tmp_path / "derived/bare.py").module
    one = torch.ones(())
    x = torch.tensor([-1e-9, -1e-6, 1e-9, 1e-6])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        z = x.to(dtype)
        y, slope = module.value(z, one, one).double(), module.partials(z, one, one)[0].double()
        z = z.double()
        torch.testing.assert_close(y, torch.where(z > 0, z**3 / 6, z**2 / 2), rtol=tolerance, atol=0)
        torch.testing.assert_close(slope, torch.where(z > 0, z**2 / 2, z), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["my_xielu", *NEW])
def test_extreme_inputs(made, name, uncompiled):
    module, top = module_of(made, name), torch.finfo(torch.float32).max
    x = torch.tensor([math.nan, math.inf, -top, -1e30, 1e18, 0.0, -0.0])
    y = module(x)
    assert y[0].isnan() and y[1] == math.inf and y[2:].isfinite().all() and (y[5:] == 0).all()
    far = {"my_xielu": 0.3 * top, "soft_dip": 0.3 * top, "short_dip": 0.3}[name]
    assert y[2].item() == pytest.approx(far, rel=1e-5)
    x = torch.tensor([-top, -1e30, 0.0], requires_grad=True)
    module(x).backward(torch.tensor([0.0, 1.0, 1.0]))
    assert x.grad[2] == 0.5 and x.grad.isfinite().all()
    assert all(scalar.grad.isfinite() for scalar in module.parameters())


def test_module(made, uncompiled):
    module = module_of(made, "soft_dip")
    assert type(module).__name__ == "Derived" and list(module.state_dict()) == ["ap", "an"]
    assert all(scalar.shape == (1,) and scalar.dtype == torch.float32 for scalar in module.parameters())
    assert module.effective() == pytest.approx({"ap": 0.8, "an": 0.8})
    assert module(torch.empty(2, 3, device="meta")).shape == (2, 3)
    for shape in [(), (0,), (2, 3, 4)]:
        x = torch.randn(shape, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.shape == shape
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(torch.randn(1000, requires_grad=True))
    assert sorted(tensor.numel() for tensor in kept) == [1, 1, 1000]


def test_compiled_inside_a_model_or_not_at_all(made, monkeypatch):
    torch.manual_seed(0)
    module = module_of(made, "soft_dip")
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), module, torch.nn.Linear(64, 16))
    x = torch.randn(8, 16)

    def gradients(function):
        model.zero_grad()
        function(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients(model)
    for found in (gradients(torch.compile(model, fullgraph=True)), ...):
        if found is ...:
            monkeypatch.setattr(integral, "can_compile", lambda device: False)
            monkeypatch.setattr(integral, "call_compiled", None)
            found = gradients(model)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_report(made):
    text = made["my_xielu"][1]
    assert re.search(r"gradient f′ +2·ap·x \+ β +an·\(eˣ − 1\) \+ β\n", text)
    assert re.search(r"integral f +ap·x² \+ β·x +an·\(eˣ − x − 1\) \+ β·x\n", text)
    assert re.search(r"∂f/∂an +0 +eˣ − x − 1\n", text)
    lowest = math.log(0.3 / 0.8)
    depth = 0.8 * (math.exp(lowest) - 1 - lowest) + 0.5 * lowest
    assert f"minimum          f = −{-depth:.4g} at x = −{-lowest:.4g}\n" in text
    assert re.search(r"gradient at 0 +0.5\n", text) and "f → ∞, f′ → −0.3\n" in text
    assert "x → −∞           f → 0.3, f′ → 0\n" in made["short_dip"][1]


def test_a_file_says_how_it_was_made(made, tmp_path, monkeypatch, uncompiled):
    """Its docstring's command makes the same file again, whatever it was written like."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_xielu", "short_dip"):
        text = made[name][0].read_text("utf-8")
        command = re.search(r"^    python -m tools\.derive (.*?)\n\"\"\"", text, re.M | re.S)[1].replace("\\\n", " ")
        assert derive.main(shlex.split(command)) == 0
        assert (tmp_path / "derived" / f"{name}.py").read_text("utf-8") == text
    assert "an·(eˣ − x − 1) + β·x" in made["my_xielu"][0].read_text("utf-8").split('"""')[1]


@pytest.mark.parametrize(
    "gradients",
    [
        ["--positive=a*tanh(x)", "--negative=b*atan(x)"],
        ["--positive=a*(sigmoid(x) - 1/2)", "--negative=b*erf(x)"],
        ["--positive=a*x/sqrt(1 + x**2)", "--negative=b*(exp(a*x) - 1)"],
        ["--positive=a*log(1 + x)", "--negative=b*a*x/(1 - a*x)"],
        ["--positive=a*sqrt(x)", "--negative=b*x**3/(1 - x)**2"],
        ["--positive=a*(1 - exp(-x**2))", "--negative=b*tanh(a*x)"],
        ["--positive=2*a", "--negative=0.1*b", "--allow_jump"],
    ],
)
def test_gradients_of_other_kinds(tmp_path, monkeypatch, gradients, uncompiled):
    """The tool's own checks pass: value and gradients by quadrature in each dtype, and gradcheck."""
    monkeypatch.chdir(tmp_path)
    assert derive.main(["other", *gradients, "--trained=a=0.7, b=0.6"]) == 0


def test_no_scalars_and_no_negative_side(tmp_path, monkeypatch, capsys, uncompiled):
    monkeypatch.chdir(tmp_path)
    assert derive.main(["half_relu2", "--positive=x"]) == 0
    assert "f = 0 at x = 0" in capsys.readouterr().out
    module = load_derived(tmp_path / "derived/half_relu2.py").module()
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0, 4.5] and x.grad.tolist() == [0.0, 0.0, 3.0] and module.effective() == {}


def test_free_scalars(tmp_path, monkeypatch, uncompiled):
    monkeypatch.chdir(tmp_path)
    assert derive.main(["free", "--positive=2*a*x + b", "--negative=b*exp(x)", "--trained=a=0~,b=-0.5~"]) == 0
    module = load_derived(tmp_path / "derived/free.py").module()
    assert module.effective() == {"a": 0.0, "b": -0.5}
    module(torch.tensor([2.0, 3.0])).sum().backward()
    assert module.a.grad.item() == pytest.approx(13.0) and module.b.grad.item() == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------ the checks


def refused(capsys, *arguments):
    """The line that a mistake gets, with status 2; no file is left."""
    assert derive.main([*arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert not list(derive.FOLDER.glob("*"))
    return stderr


@pytest.mark.parametrize(
    "fault, message",
    [
        ("integral", r"f in float64 at x = 1.00187e-12.* instead of 5.0\d+e-13"),
        ("series", r"f in float64 at x = -1.0\d+e-08.*, an error of \d.\d?e-1\d of its terms"),
        ("cancellation", r"∂f/∂an in float64 at x = -1.0\d+e-12.* instead of"),
        ("gradcheck", "gradients are not those of its values"),
        ("compiled", "torch.compile computes f otherwise"),
    ],
)
def test_what_is_not_right_is_not_written(tmp_path, monkeypatch, capsys, fault, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["wrong", "--positive=2*ap*x + beta", "--negative=an*softsign(x) + beta", "--trained=ap=1,an=1", *BETA]
    if fault == "integral":
        integrate = derive.integrate

        def wrong(gradient, sign, option):
            side = integrate(gradient, sign, option)
            return formula.Side(sign, side.size, side.gradient, side.integral * sympy.Rational(1000001, 1000000))

        monkeypatch.setattr(derive, "integrate", wrong)
    if fault == "series":
        fit = stable.fit
        changed = lambda *key: {d: [c[0] * (1 + 1e-5), *c[1:]] for d, c in fit(*key).items()}  # noqa: E731
        monkeypatch.setattr(derived_file, "fit", changed)
    if fault == "cancellation":
        monkeypatch.setattr(stable, "with_degree", lambda part, *_: part)
    if fault == "gradcheck":
        monkeypatch.setattr(integral.torch, "sigmoid", lambda x: 1.1 * x.sigmoid())
    if fault == "compiled":
        monkeypatch.setattr(
            integral, "call_compiled", lambda function, *at: function(*at) if len(at) > 3 else function(*at) + 1e-4
        )
    else:
        monkeypatch.setattr(derive, "check_compiled", lambda module: None)
    assert re.search(message, refused(capsys, *arguments))


def test_a_gradient_that_takes_for_ever_to_compute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(derive, "time_limit", lambda seconds, message: formula.time_limit(0.3, message))
    assert "takes too long to compute" in refused(capsys, "new", "--positive=sin(exp(exp(x)))*x")


@pytest.mark.parametrize(
    "positive, negative, trained",
    [
        ("2*alpha*x + beta", "gamma*(exp(x) - 1) + beta", "alpha=1, beta=0.5, gamma=0.5"),  # β on both sides; γ at β
        ("2*a*x + b", "b*exp(r*x)", "a=1, b=0.5, r=1.5"),
        ("a*x*exp(-b*x**2)", "c*x*exp(-x**2/2)", "a=1, b=1, c=1>0"),
        pytest.param("1 + a*sin(r*x)", "+1 + a*sin(r*x)", "a=0.5, r=2", marks=pytest.mark.slow),
        ("a*x**12", "0", "a=1"),
    ],
)
def test_gradients_that_round_as_they_must(tmp_path, monkeypatch, capsys, uncompiled, positive, negative, trained):
    """What the rounding of x and the scalars does to a steep gradient is no fault of the code."""
    monkeypatch.chdir(tmp_path)
    options = [f"--positive={positive}", f"--negative={negative}", f"--trained={trained}"]
    assert derive.main(["new", *options]) == 0, capsys.readouterr().err


def test_a_scalar_of_both_sides_compiled(tmp_path, monkeypatch, capsys):
    """Whose gradient over x and −x cancels."""
    monkeypatch.chdir(tmp_path)
    assert derive.main(["new", "--positive=2*a*x + b", "--negative=b", "--trained=a=1, b=0.5"]) == 0
    message = "did you mean 'derived/new.py'"
    with pytest.raises(ValueError, match=message):
        get_activation("new")


OTHER = "--positive=x"  # of mistakes that have nothing to do with it


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one name and a gradient"),
        (["a", "b", OTHER], "give one name and a gradient"),
        (["new"], "give one name and a gradient"),
        (["new", OTHER, "--negativ=x"], "--negativ=x is not understood"),
        (["new", OTHER, "--allow_jump=yes"], "is not understood"),
        (["9new", OTHER], "'9new' is no name for an activation"),
        (["../new", OTHER], "is no name for an activation"),
        (["class", OTHER], "is no name for an activation"),
        (["xielu", OTHER], "the name xielu is taken"),
        (["none", "--positive=0"], "the gradient is 0 everywhere"),
        (["new", "--positive=0*log(x)"], "the gradient is 0 everywhere"),
        (["a" * 300, OTHER], "is no name for an activation"),
        (["new", "--positive=(((2**12)**12)**12)**12*x"], "they go from 1e-6 to 1e6"),
        (["new", "--positive=x*1e-7"], "they go from 1e-6 to 1e6"),
        (["new", "--positive=x/(x**2 - 2)"], "is no finite number at x = 1.41421"),
        (["new", "--positive=a*x", "--trained=a=800"], "more than 100 above its bound"),
        (["new", "--positive=FORMULA*x", "--fixed=FORMULA=2"], "the name 'FORMULA' is taken"),
        (["new", "--positive=loss*x", "--trained=loss=2"], "the name 'loss' is taken"),
        (["new", "--positive=training*x", "--trained=training=2"], "the name 'training' is taken"),
        (["new", "--positive=staticmethod*x", "--fixed=staticmethod=2"], "the name 'staticmethod' is taken"),
        (["new", "--positive=x^2"], "write a power with **"),
        (["new", "--positive=2x"], "is no formula"),
        (["new", "--positive=x +"], "is no formula"),
        (["new", "--positive=y*x"], "unknown name 'y': known are x"),
        (["new", "--positive=exp"], "it is a function, write exp(x)"),
        (["new", "--positive=gamma(x)"], "'gamma' is no function of one x: known are exp, log"),
        (["new", "--positive=exp(x, x)"], "is no function of one x"),
        (["new", "--positive=x**x"], "an exponent must be a number up to 12"),
        (["new", "--positive=x**99"], "an exponent must be a number up to 12"),
        (["new", "--positive=1/0"], "divides by 0"),
        (["new", "--positive=x*1e999"], "is no number that can be used"),
        (["new", "--positive=x*True"], "is no number that can be used"),
        (["new", "--positive=x*2j"], "is no number that can be used"),
        (["new", "--positive=" + "(" * 300 + "x" + ")" * 300], "write a formula of at most 400"),
        (["new", "--positive=" + "exp(" * 60 + "x" + ")" * 60], "nested more than 40 deep"),
        (["new", "--positive=" + "-" * 300 + "x"], "nested more than 40 deep"),
        (["new", "--positive=x/(x - 2)"], "is no finite number at x = 2"),
        (["new", "--positive=1/x"], "is no finite number at x = 0"),
        (["new", "--positive=log(x)"], "is no finite number at x = 0"),
        (["new", "--positive=x", "--negative=sqrt(x)"], "is no finite number at x = -1e-12"),
        (["new", "--positive=tan(x)"], "'tan' is no function"),
        (["new", "--positive=x/(x - 3*a)", "--trained=a=1"], "is no finite number at x = 3 with a = 1"),
        (["new", "--positive=exp(sin(x)) - 1"], "has no closed-form integral"),
        (["new", "--positive=softplus(x)", "--negative=softplus(x)"], "has no closed-form integral"),
        (["new", "--positive=x + 0.3"], "jumps at 0, by 3/10 = 0.3, from 0 on the left to 3/10 on the right"),
        (["new", "--positive=a", "--negative=b", "--trained=a=1,b=1"], "jumps at 0, by a − b = 0, from b"),
        (["new", "--positive=a*x", "--trained=a=0"], "a starts at 0.0, which must be above 0"),
        (["new", "--positive=a*x+b", "--trained=a=0.4>b", "--fixed=b=0.5"], "must be above its bound, b = 0.5"),
        (["new", "--positive=a*x", "--trained=a=0.4>c"], "must be a scalar of --fixed, not 'c'"),
        (["new", "--positive=a*x", "--trained=a"], "'a' in --trained is not understood"),
        (["new", "--positive=a*x", "--trained=a=nan"], "is not understood"),
        (["new", "--positive=a*x", "--fixed=a=1~"], "is not understood"),
        (["new", "--positive=a*x", "--trained=a=1,a=2"], "the scalar a is there twice"),
        (["new", "--positive=a*x", "--trained=a=1,b=2"], "the scalar b is in neither gradient"),
        (["new", "--positive=x", "--trained=x=1"], "the name 'x' is taken"),
        (["new", "--positive=x", "--trained=forward=1"], "the name 'forward' is taken"),
        (["new", "--positive=x", "--trained=rest_2=1"], "the name 'rest_2' is taken"),
        (["new", "--positive=x", "--trained=torch=1"], "the name 'torch' is taken"),
        (["new", "--positive=x", "--trained=__class__=1"], "is no name for a scalar"),
        (["new", "--positive=x", "--trained=ä=1"], "is no name for a scalar"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('pathlib').Path('hacked').touch()",
        "open('hacked', 'w')",
        "().__class__.__base__.__subclasses__()",
        "exp.__globals__",
        "(lambda: open('hacked', 'w'))()",
        "[open('hacked', 'w') for y in (1,)]",
        "x if open('hacked', 'w') else x",
        "f\"{open('hacked', 'w')}\"",
        "'x'",
        "x == x",
        "x and x",
        "x[0]",
        "(y := x)",
        "exp(*[x])",
        "exp(x, evaluate=open('hacked', 'w'))",
        "x\nimport pathlib",
        "x; import pathlib",
        "x\0",
        "9**9**9",
    ],
)
def test_input_is_never_run(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    for option in ("positive", "negative"):
        refused(capsys, "new", OTHER, f"--{option}={text}")
    refused(capsys, "new", OTHER, f"--trained={text}=1")
    refused(capsys, "new", OTHER, f"--fixed=a={text}")
    assert not list(tmp_path.iterdir())


def test_what_python_ignores_does_not_get_into_the_file(tmp_path, monkeypatch, uncompiled):
    monkeypatch.chdir(tmp_path)
    assert derive.main(["new", '--positive=2 * x  # """\nopen("hacked", "w")#', "--negative=0"]) == 2
    assert derive.main(["new", '--positive=2 * x  # """; open("hacked", "w")']) == 0
    assert "hacked" not in (tmp_path / "derived/new.py").read_text("utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"derived"}


@settings(max_examples=150, deadline=10_000)
@given(
    st.lists(st.sampled_from("x a 2 0.5 + - * / ** ( ) exp( log( sqrt( , . [ ' ; = lambda \n".split(" ")), max_size=12)
)
def test_any_text_is_a_formula_or_a_line(words):
    scalars = formula.read_scalars("a=1", "")
    try:
        gradient, text = formula.read_gradient(" ".join(words), scalars, "--positive")
    except UserError as error:
        assert str(error)
        return
    assert gradient.free_symbols <= {formula.X, scalars[0].symbol}
    assert formula.read_gradient(text, scalars, "--positive")[0] == gradient


def test_a_file_that_exists_stays(made, monkeypatch, capsys):
    path = made["soft_dip"][0]
    monkeypatch.chdir(path.parent.parent)
    before = path.read_bytes()
    assert derive.main(["soft_dip", *NEW["short_dip"]]) == 2
    assert "derived/soft_dip.py exists: choose another name" in capsys.readouterr().err and path.read_bytes() == before


def test_time_that_runs_out():
    with pytest.raises(UserError, match="too long"):
        with formula.time_limit(0.05, "too long"):
            while True:
                pass


def test_without_sympy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(derive, "sympy", None)
    assert "pip install sympy" in refused(capsys, "new", OTHER)


# ------------------------------------------------------------------------------------------------ in training


def test_files_that_are_none(tmp_path, config, capsys):
    empty, broken = tmp_path / "empty.py", tmp_path / "broken.py"
    empty.write_text("ACTIVATION = 3\n")
    broken.write_text("1 / 0\n")
    for path, message in (
        (tmp_path / "nowhere.py", "there is no activation"),
        (empty, "has no ACTIVATION"),
        (broken, "does not run: ZeroDivisionError"),
    ):
        assert message in error(capsys, config, f"--activation={path}")
        for main, before in ((compare.main, []), (bench.main, ["step"]), (bench.main, ["plan"])):
            assert main([*before, str(config), f"--activation={path}"]) == 2
            stderr = capsys.readouterr().err
            assert message in stderr and stderr.count("\n") == 1
    assert "is for activation xielu alone" in error(
        capsys, config, f"--activation={tmp_path / 'nowhere.py'}", "--activation_memory=inverted"
    )


def test_train_and_resume(made, config, tmp_path, capsys, uncompiled):
    """The run that was stopped is the run that was not; the formula may not change meanwhile."""
    path = tmp_path / "derived" / "soft_dip.py"
    path.parent.mkdir()
    shutil.copy(made["soft_dip"][0], path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train.main([str(config), f"--activation={path}", f"--out={whole}"]) == 0
    assert train.main([str(config), f"--activation={path}", f"--out={out}", "--max_steps=8"]) == 0
    assert train.main([str(config), f"--out={out}", "--max_steps=12", "--resume"]) == 0
    validations = [record for record in log(whole) if record["kind"] == "val"]
    assert validations[0]["ap"] == pytest.approx([0.8, 0.8]) and validations[-1]["ap"] != validations[0]["ap"]
    assert validations[-1]["loss"] < validations[0]["loss"]
    assert [record for record in log(out) if record["step"] <= 4] == [r for r in log(whole) if r["step"] <= 4]
    assert log(out)[-1]["step"] == 12
    path.write_text(path.read_text("utf-8").replace("(beta = 0.5", "(beta = 0.6"), "utf-8")
    load_derived.cache_clear()  # another process
    message = error(capsys, config, f"--out={out}", "--max_steps=14", "--resume")
    assert "has changed since the run began" in message and "(beta = 0.5" in message and "(beta = 0.6" in message
    assert sample.main([str(out), "--tokenizer=bytes"]) == 2
    assert "has changed since the run began" in capsys.readouterr().err


def test_compare(made, config, tmp_path, monkeypatch, capsys, uncompiled):
    """Rows, folders and figures are called by the file's name alone."""
    monkeypatch.setattr(compare, "execute", lambda run, *_: (train.main(run.arguments), ""))
    path = made["short_dip"][0]
    line = [str(config), f"--activation=relu2,{path}", "--max_steps=8", "--eval_every=2", f"--out={tmp_path}/grid"]
    assert compare.main(line) == 0
    assert "| short_dip " in capsys.readouterr().out
    out = tmp_path / "grid"
    assert {"relu2-seed=42", "short_dip-seed=42", "scalars-short_dip.png"} <= {entry.name for entry in out.iterdir()}
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["relu2", "short_dip"] and rows[1]["parameters"] == rows[0][
        "parameters"
    ] + 4
    assert plot.read_groups([out / "short_dip-seed=42"]).keys() == {"short_dip"}
    assert compare.main([*line[:1], f"--activation={path},{path}", "--dry_run"]) == 2
    assert "short_dip-seed=42 is there twice" in capsys.readouterr().err


def test_names(made):
    path = made["soft_dip"][0]
    assert get_activation(str(path)) is get_activation(str(path)) and not get_activation(str(path)).gated
    assert get_activation(str(path)).formula.startswith("ap·x² + β·x for x > 0, an·(−x − log(1 − x)) + β·x for x ≤ 0")
    assert short_name(str(path)) == "soft_dip" and all(short_name(name) == name for name in ACTIVATIONS)
