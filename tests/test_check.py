"""tools/check.py and tools/vectors.py: the vectors are reproducible, what is right is sound, and faults are named."""

import re

import pytest
import torch

import xielu
from model import Llama, ModelConfig
from plumbing.inverted import xielu_inverted
from runs import ROOT, error
from tools import check, hf

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

# The formula written down as it stands
PLAIN = """
import torch
from torch.nn.functional import softplus

def f(x, raw_p, raw_n):
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    alpha_p, alpha_n = softplus(raw_p), 0.5 + softplus(raw_n)
    m = z.clamp(max=0)
    y = torch.where(z > 0, alpha_p * z * z + 0.5 * z, alpha_n * (torch.expm1(m) - m) + 0.5 * m)
    return y.to(x.dtype)
"""
# With a backward pass of its own
BACKWARD = f"""{PLAIN}
plain = f

class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return plain(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, raw_p, raw_n = ctx.saved_tensors
        up = lambda part: part.to(torch.promote_types(x.dtype, torch.float32))
        z, alpha_p, alpha_n, large = up(x), softplus(raw_p), 0.5 + softplus(raw_n), grad.numel() > 10_000
        by_x = by_alpha = up(grad)
        m = z.clamp(max=0)
        slope = torch.where(z > 0, 2 * alpha_p * z, alpha_n * torch.expm1(m)) + 0.5
        p, n = (part.sum() for part in (torch.where(z > 0, z * z, 0) * by_alpha, (torch.expm1(m) - m) * by_alpha))
        return (by_x * slope).to(x.dtype), (p * raw_p.sigmoid()).to(raw_p), (n * raw_n.sigmoid()).to(raw_n)

f = F.apply
"""
ALPHAS = "softplus(raw_p), 0.5 + softplus(raw_n)"
ABOVE, BELOW = "alpha_p * z * z + 0.5 * z", "alpha_n * (torch.expm1(m) - m) + 0.5 * m"
GRADS = "by_x = by_alpha = up(grad)"
UPCAST = "z = x.to(torch.promote_types(x.dtype, torch.float32))"

RIGHT = [
    (PLAIN, "", ""),
    (PLAIN, ABOVE, "z * (alpha_p * z + 0.5)"),
    (PLAIN, BELOW, "alpha_n * torch.expm1(m) + (0.5 - alpha_n) * m"),
    (PLAIN, ALPHAS, "torch.log1p(torch.exp(raw_p)), 0.5 + torch.logaddexp(raw_n, 0 * raw_n)"),
    (PLAIN, UPCAST, "z = x.double()"),
    (BACKWARD, "", ""),
    (BACKWARD, "f = F.apply", "f = lambda x, *raw: F.apply(x.reshape(-1), *raw).view(x.shape)"),
]
# Parts of the sentences that name a cause
CAUSES = ["as if β·x", "as if −αn·x", "+αn·x", "without β", "softplus were missing", "taken twice", "swapped", "(eps)"]
CAUSES += ["α is in bfloat16", "exp(x) − 1", "σ(alpha)", "ignored", "without its sign", "squared", "x = 0 alone", "NaN"]
CAUSES += [f"{how} {narrow}" for how in ("digits than", "∂L/∂y were rounded to") for narrow in ("bfloat16", "float16")]
CAUSES += ["right if x is float32", "right for each x by itself", "raises RuntimeError"]
# A part, by what wrong one it is replaced, and the causes that are named for float32
GRAD = "by_x = by_alpha = "
STRIDES = "as_strided(y.shape, torch.empty(y.shape).stride())"
NARROW = "x.bfloat16(), raw_p.bfloat16(), raw_n.bfloat16()"
HALF = "(alpha_n.half() * (torch.expm1(m.half()) - m.half()) + 0.5 * m.half()).to(z)"
MOVED = "F.apply(x, *raw) if x.dim() < 3 else F.apply(x, *raw).movedim(0, 1).reshape(x.shape)"
SECOND = """
def f(x, *raw, calls=[]):
    calls.append(x.dim())
    return F.apply(x, *raw) if calls.count(2) < 2 else 2 * F.apply(x, *raw)
"""
TWICE = "softplus(softplus(raw_p)), 0.5 + softplus(softplus(raw_n))"
BF16_RAW = "softplus(raw_p.bfloat16().to(z)), 0.5 + softplus(raw_n.bfloat16().to(z))"
WRONG = [
    (PLAIN, ABOVE, "alpha_p * z * z", "as if β·x"),
    (PLAIN, "expm1(m) - m", "expm1(m)", "as if −αn·x"),
    (PLAIN, "expm1(m) - m", "expm1(m) + m", "+αn·x"),
    (PLAIN, "0.5 + softplus(raw_n)", "softplus(raw_n)", "without β"),
    (PLAIN, ALPHAS, "raw_p, 0.5 + raw_n", "softplus were missing"),
    (PLAIN, ALPHAS, TWICE, "taken twice"),
    (PLAIN, "z > 0", "z <= 0", "swapped"),
    (PLAIN, "expm1(m)", "expm1(m.clamp(max=-1e-6))", "(eps)"),
    (PLAIN, ALPHAS, BF16_RAW, "α is in bfloat16, digits than bfloat16"),
    (PLAIN, "torch.expm1(m)", "(torch.exp(m) - 1)", "exp(x) − 1"),
    (PLAIN, "z.clamp(max=0)", "torch.minimum(z, torch.zeros_like(z))", "x = 0 alone"),
    (PLAIN, BELOW, "alpha_n * torch.expm1(z) + 0.5 * z", "as if −αn·x, NaN"),
    (PLAIN, UPCAST, f"z, raw_p, raw_n = {NARROW}", "digits than bfloat16"),
    (PLAIN, "return y", "return y.half()", "digits than float16, ∂L/∂y were rounded to float16"),
    (PLAIN, BELOW, HALF, "digits than float16"),
    (BACKWARD, "(by_x * slope)", "(by_x * slope).bfloat16()", "digits than bfloat16"),
    (BACKWARD, "raw_n.sigmoid()", "raw_n ** 0", "σ(alpha)"),
    (BACKWARD, GRADS, GRAD + "torch.ones_like(up(grad))", "ignored"),
    (BACKWARD, GRADS, GRAD + "up(grad).abs()", "without its sign"),
    (BACKWARD, GRADS, GRAD + "up(grad) ** 2", "squared"),
    (BACKWARD, GRADS, GRAD + "up(grad.bfloat16()).to(z)", "∂L/∂y were rounded to bfloat16"),
    (BACKWARD, GRADS, "by_x, by_alpha = up(grad), up(grad).abs()", "without its sign"),
    # only for many elements, or in other layouts
    (BACKWARD, GRADS, GRAD + "up(grad.bfloat16()).to(z) if large else up(grad)", "right for each x by itself"),
    (BACKWARD, GRADS, "by_x, by_alpha = up(grad), up(grad).abs() if large else up(grad)", "right for each x by itself"),
    (BACKWARD, GRADS, GRAD + "up((y := grad)." + STRIDES + ")", "right for each x by itself"),
    (BACKWARD, "F.apply", f"lambda y, *raw: F.apply(y.{STRIDES}, *raw)", "right for each x by itself"),
    (BACKWARD, "F.apply", "lambda x, *raw: " + MOVED, "right for each x by itself"),
    (BACKWARD, "f = F.apply", SECOND, "right for each x by itself"),
    (BACKWARD, "F.apply", "lambda x, *raw: F.apply(x if x.numel() else x.view(-1), *raw)", "raises RuntimeError"),
    # without a known cause
    (BACKWARD, "part.sum()", "part.bfloat16().cumsum(-1).flatten()[-1].to(part)", ""),
    (PLAIN, "return y", "return 0 * y", ""),
    (PLAIN, "return y", "return 0 * y + 0.5 * x", ""),
    (PLAIN, ABOVE, "1.004 * alpha_p * z * z + 0.5 * z", ""),
    (PLAIN, "expm1(m) - m", "expm1(m) + 0.05 * m", ""),
    (PLAIN, "torch.expm1(m)", "torch.expm1(m.bfloat16()).to(z)", ""),
    (PLAIN, ABOVE, ABOVE + " + 0 * z / z", ""),  # NaN at 0
    (PLAIN, "expm1(m)", "expm1(m.clamp(max=-1e-3))", ""),
    (PLAIN, "z > 0", "z > 0.1", ""),
    (PLAIN, "return y", "return torch.where(z == 0, 1, y)", ""),
    (PLAIN, "softplus(raw_p)", "softplus(raw_p).detach()", ""),
    (PLAIN, ALPHAS, "softplus(raw_n), 0.5 + softplus(raw_p)", ""),
    (BACKWARD, "torch.expm1(m)) + 0.5", "torch.expm1(m))", ""),
    (BACKWARD, GRADS, GRAD + "-up(grad)", ""),
]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(xielu, "COMPILE", False)


def checked(function, capsys, *dtypes):
    """What is said about a function, and {dtype: verdict}."""
    verdicts, right = {}, torch.zeros_like(check.EXPECTED, dtype=torch.bool)
    for dtype in dtypes or check.TOLERANCE:
        verdicts[dtype], right = check.check_in(dtype, function, right)
    return capsys.readouterr().out, verdicts


def function_of(code, old="", new=""):
    assert old in code
    names = {}
    exec(code.replace(old, new) if old else code, names)
    return names["f"]


def test_the_file_is_what_the_script_writes():
    vectors = pytest.importorskip("tools.vectors")
    assert vectors.PATH.read_text("utf-8") == vectors.text() and vectors.PATH.stat().st_size < 200_000
    x = torch.tensor(vectors.inputs(), dtype=torch.float64)
    assert torch.equal(x.bfloat16().double(), x) and x.min() < -1e4 and x.max() > 1e4
    assert 0 < x[x > 0].min() < 1e-12 and (x == 0).sum() == 1


@pytest.mark.parametrize("target", ["xielu", "xielu.py:xielu_reference"])
def test_ours_is_sound(target, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check.main([target]) == 0
    assert capsys.readouterr().out.split() == "torch.float64: sound torch.float32: sound torch.bfloat16: sound".split()


@pytest.mark.parametrize("code, old, new", RIGHT)
def test_right_ones_are_sound(code, old, new, capsys):
    text, verdicts = checked(function_of(code, old, new), capsys)
    assert set(verdicts.values()) == {"sound"}, text


@pytest.mark.parametrize("code, old, new, causes", WRONG)
def test_wrong_ones_are_faulty_and_get_no_wrong_cause(code, old, new, causes, capsys):
    function = function_of(code, old, new)
    text, verdicts = checked(function, capsys, torch.float32)
    assert verdicts == {torch.float32: "faulty"}
    named = [cause for cause in CAUSES if cause in text]
    assert named == (causes.split(", ") if causes else []), text
    assert named or re.search(r": wrong in \d+ of \d+ rows, x from \S+ to \S+, by \S+ of their size\n", text)
    text, _ = checked(function, capsys, torch.bfloat16)  # where rounding hides some
    assert {cause for cause in CAUSES if cause in text} <= {*named, "right for each x by itself"}, text


def test_arithmetic_and_results_in_other_dtypes(capsys):
    text, verdicts = checked(function_of(PLAIN, UPCAST, "z, raw_p, raw_n = x, raw_p.to(x), raw_n.to(x)"), capsys)
    assert list(verdicts.values()) == ["sound", "sound", "faulty"]
    assert "f, f′ for x < −1e-6: right if x is float32: convert x to float32 first, and only the result back" in text
    text, verdicts = checked(function_of(PLAIN, "y.to(x.dtype)", "y.float()"), capsys, torch.float32, torch.bfloat16)
    assert text == "torch.float32: sound\ntorch.bfloat16: faulty\n    the result is in torch.float32\n"


def test_errors_in_the_function(capsys, tmp_path):
    one = function_of(PLAIN, "z = x", "assert x.dtype == torch.float32, 'no\\nother'; z = x")
    text, verdicts = checked(one, capsys)
    assert list(verdicts.values()) == ["error", "sound", "error"]
    assert text.startswith("torch.float64: raises AssertionError: no other\n")
    for code in ("1 / 0", "exit(3)", "return None", "return x.detach()"):
        (tmp_path / "mine.py").write_text(PLAIN.replace("z = x", f"{code}; z = x"))
        assert check.main([f"{tmp_path}/mine.py:f"]) == 1
        assert capsys.readouterr().out.endswith("faulty: it raises an error in every dtype\n")


def test_the_inverted_one_is_less_exact(capsys):
    text, verdicts = checked(xielu_inverted, capsys, torch.float32)
    assert verdicts == {torch.float32: "faulty"} and not re.search(r"\bf(,| for)", text)


def test_transformers(capsys):
    """What the page says of the module in the table, and of that of an Apertus model in float32."""
    assert check.main(["transformers"]) == 1
    text = capsys.readouterr().out
    assert text.count(check.EPS) == 3 and text.count(f"f, f′ for x > 0: {check.BF16}") == 2

    def in_float32(x, raw_p, raw_n):
        module = transformers.activations.XIELUActivation(dtype=torch.float32)
        return torch.func.functional_call(module, {"alpha_p": raw_p, "alpha_n": raw_n}, x)

    text, _ = checked(in_float32, capsys, torch.float32)
    _, _, *faults = text.splitlines()
    assert faults == [f"    f, f′, ∂f/∂alpha_n for −1e-6 ≤ x ≤ 0: {check.EPS}"]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def folder(tmp_path):
    """A function that writes a checkpoint as tools.hf does, with some tensors replaced, or left out if None."""

    def write(tensors=None):
        config = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=48, vocab_size=9, activation="xielu")
        state = hf.to_hf(Llama(config).state_dict(), config)
        state |= {f"model.layers.1.mlp.act_fn.{name}": tensor for name, tensor in (tensors or {}).items()}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        hf.write_json(tmp_path / "config.json", hf.hf_config(config, 0, None))
        return str(tmp_path)

    return write


def test_a_checkpoint_of_ours(folder, capsys):
    assert check.main([folder()]) == 0
    assert capsys.readouterr().out == "".join(f"layer {n}: sound, αp = 0.8000, αn = 0.8000\n" for n in (0, 1))


FAULTY = [
    ({"alpha_p": None}, "alpha_p is missing or wrong: nan"),
    ({"alpha_n": torch.tensor([torch.inf])}, "alpha_n is missing or wrong: inf"),
    ({"beta": torch.tensor(1.0)}, "beta is missing or wrong: 1"),
    ({"eps": torch.tensor(1.1e-5)}, "eps is missing or wrong: 1.1e-05"),
    ({"alpha_n": torch.tensor([-1.0], dtype=torch.bfloat16)}, check.BF16),
]


@pytest.mark.parametrize("tensors, line", FAULTY)
def test_faulty_checkpoints(folder, capsys, tensors, line):
    assert check.main([folder(tensors)]) == 1
    first, second, found = map(str.strip, capsys.readouterr().out.splitlines())
    assert first.startswith("layer 0: sound") and second.startswith("layer 1: faulty") and found.startswith(line)


@pytest.mark.parametrize("eps", [0, -1e-6])
def test_an_eps_that_moves_the_gradient_at_0(folder, capsys, eps):
    assert check.main([folder({"eps": torch.tensor(eps)})]) == 0
    assert f"\n    note: with eps = {eps:g} the gradient at 0 is not β" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------


MISTAKES = [
    (["nowhere"], "nowhere is neither a folder nor a MODULE:FUNCTION that can be loaded"),
    (["nowhere.py:f"], "can be loaded (FileNotFoundError"),
    (["xielu:nothing"], "can be loaded (KeyError: 'nothing')"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(argv, message, capsys):
    assert message in error(capsys, *argv, main=check.main)


LAYERS = "num_hidden_layers must be a whole number from 1 to 10,000, not "


FOLDERS = [(text, "does not describe a language model") for text in ("", "[1]", "[" * 100_000, '{"vocab_size": 2}')]
FOLDERS += [('{"num_hidden_layers": 2, "hidden_act": "relu2"}', 'has no xIELU: its hidden_act is "relu2"')]
FOLDERS += [('{"num_hidden_layers": 2, "hidden_act": "xielu"}', "has no .safetensors file")]
for layers in ("-1", "0", "10001", "1" + "0" * 30, "2.0", '"2"'):
    FOLDERS += [(f'{{"num_hidden_layers": {layers}, "hidden_act": "xielu"}}', LAYERS + layers[:9])]


@pytest.mark.parametrize("config, message", FOLDERS)
def test_folders_that_cannot_be_checked(config, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(config)
    assert message in error(capsys, tmp_path, main=check.main).replace("'", '"')


def test_a_package_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    for target in ("transformers", folder()):
        assert "pip install transformers" in error(capsys, target, main=check.main)


def test_a_function_that_needs_a_gpu(monkeypatch, capsys):
    original = check.results_of

    def results_of(function, dtype, device):
        if device == "cpu":
            raise ValueError("not on a CPU")
        return original(function, dtype, "cpu")

    monkeypatch.setattr(check, "results_of", results_of)
    monkeypatch.setattr(check, "faults_of_use", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main(["xielu:xielu_reference"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check.main(["xielu:xielu_reference"]) == 0
