"""tools/derive.py: known activations come out of it, new ones are what they promise, and mistakes get one line."""

import contextlib
import functools
import io
import math
import re
import shlex
import shutil
import sys
import time

import pytest
import sympy
import torch

import activations
import xielu
from activations import ACTIVATIONS, curve, get_activation, load_derived, short_name
from runs import error, here, log
from tools import derive

BETA = ["--fixed=beta=0.5"]
POSITIVE = "--positive=2*ap*x + beta"
ABOVE_BETA = "--trained=ap=0.8, an=0.8>beta"
KNOWN = {
    "xielu": [POSITIVE, "--negative=an*(exp(x) - 1) + beta", ABOVE_BETA, *BETA],
    "xiprelu": [POSITIVE, "--negative=2*an*x + beta", "--trained=ap=0.8,an=0.8", *BETA],
    "leaky_relu2": ["--positive=2*x", "--negative=x/2"],
    "xiep": [f"{POSITIVE} + 3*ap3*x**2", "--negative=an*(exp(x) - 1) + beta", f"{ABOVE_BETA}, ap3=0.4", *BETA],
}
# in no paper: a dip that fades as slowly as 1/x, and one that returns to a gradient of 0
NEW = {
    "soft_dip": [POSITIVE, "--negative=an*softsign(x) + beta", ABOVE_BETA, *BETA],
    "short_dip": [POSITIVE, "--negative=(an*x + beta)*exp(x)", "--trained=ap=0.8, an=0.8", *BETA],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: (path, what was printed)} of all of the above, derived in one folder; one of them is compiled."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, arguments in (KNOWN | NEW).items():
            patch.setattr(xielu, "can_compile", lambda kind, name=name: name == "leaky_relu2")
            patch.setattr(xielu, "COMPILE", True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert derive.main([f"my_{name}", *arguments]) == 0
            found[name] = folder / f"derived/my_{name}.py", printed.getvalue()
            assert found[name][0].with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((folder / "derived").iterdir())) == 2 * len(found)
    return found


@pytest.fixture(autouse=True)
def uncompiled(tmp_path, monkeypatch):
    """Nothing is compiled, which takes a while, and files are written to a folder of the test's own."""
    monkeypatch.setattr(xielu, "can_compile", lambda kind: False)
    monkeypatch.setattr(xielu, "COMPILE", True)
    monkeypatch.chdir(tmp_path)


def results(module, x):
    """(f, f′, {scalar: ∂f/∂raw}) of a module, at each x by itself."""
    columns = zip(*(curve(module, part) for part in x.split(1)))
    y, slope, *by_scalar = (torch.cat(column).double() for column in columns)
    return y, slope, dict(zip(dict(module.named_parameters()), by_scalar))


PLACES = torch.cat([torch.logspace(-12, 3, 40), torch.linspace(0.45, 0.55, 11)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KNOWN)
def test_known_ones_are_the_hand_written_ones(made, name, dtype):
    """Value, gradient and every scalar's gradient, near 0, at the joints and far out, at the start and elsewhere."""
    x = torch.cat([PLACES, -PLACES, torch.zeros(1)]).to(dtype)
    for shift in (0.0, 1.5, -3.0):
        mine, theirs = load_derived(made[name][0]).module(), ACTIVATIONS[name].module().double()
        mine = mine.double() if dtype == torch.float64 else mine  # and its scalars
        for raw in (*mine.parameters(), *theirs.parameters()):
            raw.data += shift
        (y, slope, by_scalar), right = results(mine, x), results(theirs, x.double())
        tolerance, x64 = TOLERANCE[dtype], x.double()
        assert ((y - right[0]).abs() <= tolerance * (right[0].abs() + x64.abs())).all()
        assert ((slope - right[1]).abs() <= tolerance * (right[1].abs() + 1)).all()
        for key, partial in by_scalar.items():
            other = right[2][key.replace("ap", "alpha_p").replace("an", "alpha_n")]
            assert ((partial - other).abs() <= tolerance * (other.abs() + x64.abs())).all()


@pytest.mark.parametrize("name", ["xielu", *NEW])
def test_extreme_inputs(made, name):
    module, top = load_derived(made[name][0]).module(), torch.finfo(torch.float32).max
    y = module(torch.tensor([math.nan, math.inf, -top, -1e30, 1e18, 0.0, -0.0]))
    assert y[0].isnan() and y[1] == math.inf and y[2:].isfinite().all() and (y[5:] == 0).all()
    assert y[2].item() == pytest.approx(0.3 if name == "short_dip" else 0.3 * top, rel=1e-5)
    x = torch.tensor([-top, -1e30, 0.0], requires_grad=True)
    module(x).backward(torch.tensor([0.0, 1.0, 1.0]))
    assert x.grad[2] == 0.5 and x.grad.isfinite().all()
    assert all(scalar.grad.isfinite() for scalar in module.parameters())
    assert module(torch.empty(2, 3, device="meta")).shape == (2, 3)


def test_compiled_alone_and_inside_a_model(made, monkeypatch):
    monkeypatch.setattr(xielu, "can_compile", lambda kind: True)
    torch.manual_seed(0)
    activation = load_derived(made["soft_dip"][0]).module()
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), activation, torch.nn.Linear(64, 16))
    x, found = torch.randn(8, 16), []
    for function in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        function(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_report(made):
    text = made["xielu"][1]
    assert re.search(r"gradient f′ +2·ap·x \+ β +an·\(eˣ − 1\) \+ β\n", text)
    assert re.search(r"integral f +ap·x² \+ β·x +an·\(−x \+ eˣ − 1\) \+ β·x\n", text)
    assert re.search(r"\nf′\(x\) +−0\.3 +−0\.3 +−0\.2602 +−0\.005696 +0\.4239 +0\.5 +0\.66 ", text)
    assert text.endswith("python train.py configs/demo.py --activation=derived/my_xielu.py --out=out/my_xielu\n")


def test_a_file_says_how_it_was_made(made, capsys):
    """Its command makes the same file again, and leaves one that exists as it is."""
    path = made["short_dip"][0]
    command = re.search(r"^    python -m tools\.derive (.*)$", path.read_text("utf-8"), re.M)[1]
    again = derive.FOLDER / path.name
    assert derive.main(shlex.split(command)) == 0
    assert again.read_bytes() == path.read_bytes()
    again.write_text("mine")
    assert derive.main(shlex.split(command)) == 2
    assert "my_short_dip.py exists: choose another name" in capsys.readouterr().err and again.read_text() == "mine"


OTHER_KINDS = [
    ["--positive=a*tanh(x)", "--negative=b*atan(x)"],
    ["--positive=a*(sigmoid(x) - 1/2)", "--negative=b*erf(x)"],
    ["--positive=sigmoid(a*x) + b", "--negative=sigmoid(a*x) + b"],
    ["--positive=a*log(1 + x)", "--negative=b*a*x/(1 - a*x)"],
    ["--positive=1 + a*sin(9*b*x)", "--negative=+1 + a*sin(9*b*x)"],
]


@pytest.mark.parametrize("gradients", OTHER_KINDS)
def test_gradients_of_other_kinds(gradients):
    """The tool's own checks pass, by quadrature in each dtype."""
    assert derive.main(["other", *gradients, "--trained=a=0.7, b=0.6"]) == 0


def test_few_scalars():
    assert derive.main(["half_relu2", "--positive=x + 1", "--allow_jump"]) == 0
    module = get_activation("derived/half_relu2.py").module()
    x = torch.tensor([-2.0, 0.0, 3.0, math.nan], requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.tolist()[:3] == [0.0, 0.0, 7.5] and x.grad.tolist()[:3] == [0.0, 0.0, 4.0] and y[3].isnan()
    assert derive.main(["logarithm", "--positive=1/(x + c)", "--negative=1/c", "--fixed=c=2"]) == 0
    y = get_activation("derived/logarithm.py").module()(torch.tensor([-2.0, 0.0, 2.0]))
    assert y.tolist() == pytest.approx([-1.0, 0.0, math.log(2)])
    assert derive.main(["free", "--positive=2*a*x + b", "--negative=b*exp(x)", "--trained=a=0~,b=-0.5~"]) == 0
    module = get_activation("derived/free.py").module()
    assert module.effective() == {"a": 0.0, "b": -0.5}
    module(torch.tensor([2.0, 3.0])).sum().backward()
    assert module.raw_a.grad.item() == pytest.approx(13.0) and module.raw_b.grad.item() == pytest.approx(5.0)


# ------------------------------------------------------------------------------------------------ the checks


def refused(capsys, *arguments):
    """The line that a mistake gets, with status 2; no file is left."""
    stderr = error(capsys, *arguments, main=derive.main)
    assert not list(derive.FOLDER.glob("*"))
    return stderr


NOT_RIGHT = [
    (derive, "integrate", lambda do, *at: do(*at) * sympy.Rational(1000001, 1000000), "f is .* in torch.float64"),
    (derive, "rows_of", lambda do, *at: do(*at) | {"∂f/∂an": [derive.P, derive.M]}, "∂f/∂an is .*"),
    (derive, "rows_of", lambda do, *at: do(*at) | {"gradient f′": [derive.P, derive.M]}, "f′ is .*"),
    (xielu, "in_one_pass", lambda do, f, x, *at: do(f, x + 1e-3, *at), "f is .* in torch.float64"),
]


@pytest.mark.parametrize("owner, name, wrong, message", NOT_RIGHT)
def test_what_is_not_right_is_not_written(monkeypatch, capsys, owner, name, wrong, message):
    """wrong(function, *its arguments) does what the function called `name` should not."""
    monkeypatch.setattr(owner, name, functools.partial(wrong, getattr(owner, name)))
    assert re.search(f"nothing is written: {message}", refused(capsys, "new", *NEW["soft_dip"]))


OTHER = "--positive=x"  # of mistakes that have nothing to do with it


MISTAKES = [
    (["new", OTHER, "--negativ=x"], "unrecognized arguments: --negativ=x"),
    (["9new", OTHER], "'9new' is taken, or not a name"),
    (["xielu", OTHER], "'xielu' is taken"),
    (["new", "--positive=a*x", "--trained=a=1,b=2"], "neither gradient contains b"),
    (["new", "--positive=y*x"], "'y*x' is not understood: known are x"),
    (["new", "--positive=exp"], "is not a formula"),
    (["new", "--positive=9**9**9"], "an exponent must be a number up to 12"),
    (["new", "--positive=1/x"], "1/x is not a finite number at x = 0"),
    (["new", "--positive=x", "--negative=sqrt(x)"], "is not a finite real number"),
    (["new", "--positive=1/(x - 2.03)**2", "--allow_jump"], "nothing is written: f is"),  # its pole is at no place
    (["new", "--positive=exp(sin(x)) - 1"], "has no integral from 0 in a closed form"),
    (["new", "--positive=x + 0.3"], "jumps at 0, from 0 on the left to 3/10 on the right"),
    (["new", "--positive=a*x+b", "--trained=a=0.4>b", "--fixed=b=0.5"], "must be above 0.5"),
    (["new", "--positive=a*x", "--trained=a=0.4>c"], "'a=0.4>c' is not understood"),
    (["new", "--positive=a*x", "--trained=a=1,a=2"], "the name a is taken, or given twice"),
    (["new", "--positive=x", "--trained=loss=1"], "the name loss is taken"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_windows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "tools.derive needs Linux, macOS or WSL" in refused(capsys, "new", "--positive=2*x")


@pytest.mark.parametrize("text", ["__import__('pathlib').Path('hacked').touch()", "x\nimport pathlib", "1if 1else 1"])
def test_input_is_never_run(tmp_path, capsys, text):
    for option in ("--positive=", "--negative=", "--fixed=a=", "--trained="):
        refused(capsys, "new", OTHER, option + text)
    assert not list(tmp_path.iterdir())


def test_time_that_runs_out(monkeypatch, capsys):
    monkeypatch.setattr(derive, "SECONDS", 1)
    monkeypatch.setattr(sympy, "integrate", lambda *at: time.sleep(60))
    assert "has no integral from 0" in refused(capsys, "new", OTHER)


# ------------------------------------------------------------------------------------------------ in training


def test_train_and_resume(made, config, tmp_path, monkeypatch, capsys):
    """The scalars are trained and logged, also in a run that resumes, from wherever the file is by then.
    (test_faults.py has a formula that changes in between.)"""
    out, path = tmp_path / "out", tmp_path / "elsewhere/my_soft_dip.py"
    derived = shutil.copytree(made["soft_dip"][0].parent, "derived")
    here(config, "--activation=derived/my_soft_dip.py", f"--out={out}", "--max_steps=8")
    shutil.move(derived, path.parent)
    assert "--activation=PATH" in error(capsys, config, f"--out={out}", "--max_steps=12", "--resume")
    here(config, f"--activation={path}", f"--out={out}", "--max_steps=12", "--resume")
    first, *_, last = [record for record in log(out) if record["kind"] == "val"]
    assert first["ap"] == pytest.approx([0.8, 0.8]) and last["ap"] != first["ap"] and last["loss"] < first["loss"]
    assert last["step"] == 12


def test_names(made, monkeypatch):
    path = str(made["soft_dip"][0])
    monkeypatch.setattr(activations, "__file__", str(made["soft_dip"][0].parent.parent / "activations.py"))
    assert get_activation("derived/my_soft_dip.py") is get_activation(path)  # beside activations.py, if not here
    assert get_activation(path) is get_activation(path) and not get_activation(path).gated
    expected = "ap·x² + β·x for x > 0, an·(−x − log(1 − x)) + β·x for x ≤ 0, beta = 0.5, ap > 0.0, an > 0.5"
    assert get_activation(path).formula == expected
    assert short_name(path) == "my_soft_dip" and all(short_name(name) == name for name in ACTIVATIONS)
