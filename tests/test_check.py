"""tools/check.py and tools/vectors.py: the vectors are reproducible, what is right is sound, and faults are named."""

import re

import pytest
import torch

import xielu
from model import Llama, ModelConfig
from runs import ROOT
from tools import check, hf

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

PAGE = (ROOT / "docs/vectors.md").read_text("utf-8")
# The formula written down as it stands; FAULTS replaces parts of it
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
BF16 = "α is in bfloat16"
EVERYWHERE = ("float64", "float32", "bfloat16")
FAULTS = [
    (["z * z + 0.5 * z", "z * z"], ["for x > 0 the result lacks β·x"]),
    ([" + 0.5 * m", ""], ["for x ≤ 0 the result lacks β·x"]),
    (["expm1(m) - m", "expm1(m)"], ["for x ≤ 0 the result lacks −αn·x"]),
    (["expm1(m) - m", "expm1(m) + m"], ["for x ≤ 0 the result has +αn·x instead of −αn·x"]),
    (["0.5 + softplus(raw_n)", "softplus(raw_n)"], ["αn lacks β: it is softplus(alpha_n) alone"]),
    (["softplus(raw_p), 0.5 + softplus(raw_n)", "raw_p, 0.5 + raw_n"], ["softplus is missing"]),
    (["expm1(m)", "expm1(m.clamp(max=-1e-6))"], ["x is clamped to −1e-6 (eps) before expm1"]),
    (["m = z.clamp(max=0)", "m = torch.minimum(z, torch.zeros_like(z))"], ["the gradient at exactly 0 is not β"]),
    (["raw_p), 0.5 + softplus(raw_n)", "raw_p.bfloat16()).to(z), (0.5 + softplus(raw_n.bfloat16())).to(z)"], [BF16]),
    (["raw_p), 0.5 + softplus(raw_n)", "raw_p.bfloat16().to(z)), 0.5 + softplus(raw_n.bfloat16().to(z))"], [BF16]),
    (["torch.expm1(m)", "(torch.exp(m) - 1)"], ["exp(x) − 1 has no digits left near 0"]),
    (["expm1(m) - m", "expm1(z) - z", "0.5 * m", "0.5 * z"], ["it gives NaN"]),
    # several at once
    (
        ["expm1(m) - m", "expm1(m)", "(raw_p)", "(raw_p.bfloat16().to(z))", "(raw_n)", "(raw_n.bfloat16().to(z))"],
        ["for x ≤ 0 the result lacks −αn·x", BF16],
    ),
    (
        ["z * z + 0.5 * z", "z * z", "torch.expm1(m)", "(torch.exp(m.clamp(max=-1e-6)) - 1)"],
        ["for x > 0 the result lacks β·x", "x is clamped to −1e-6 (eps)"],
    ),
    (["expm1(m) - m", "expm1(z)", "0.5 * m", "0.5 * z"], ["it gives NaN", "for x ≤ 0 the result lacks −αn·x"]),
    (
        ["softplus(raw_p), 0.5 + softplus(raw_n)", "softplus(softplus(raw_p)), 0.5 + softplus(softplus(raw_n))"],
        ["softplus is taken twice"],
    ),
    (
        ["z > 0", "z <= 0", "m = z.clamp(max=0)", "m = z.clamp(max=80)"],
        ["for x ≤ 0 it gives αp·x² + β·x, which is the branch for x > 0"],
    ),
]
# A backward pass of one's own: what replaces grad, the factor of the gradients of the scalars, and sum
BACKWARD = """
import torch
from torch.nn.functional import softplus

def up(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))

class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, raw_p, raw_n):
        ctx.save_for_backward(x, raw_p, raw_n)
        z, alpha_p, alpha_n = up(x), softplus(raw_p), 0.5 + softplus(raw_n)
        m = z.clamp(max=0)
        return torch.where(z > 0, alpha_p * z * z + 0.5 * z, alpha_n * (torch.expm1(m) - m) + 0.5 * m).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, raw_p, raw_n = ctx.saved_tensors
        z, grad, alpha_p, alpha_n = up(x), up(GRAD), softplus(raw_p), 0.5 + softplus(raw_n)
        m = z.clamp(max=0)
        slope = torch.where(z > 0, 2 * alpha_p * z, alpha_n * torch.expm1(m)) + 0.5
        by_p, by_n = torch.where(z > 0, z * z, 0) * grad, (torch.expm1(m) - m) * grad
        sums = [(part SUM).to(raw_p).reshape(1) for part in (by_p, by_n)]
        return (grad * slope).to(x.dtype), sums[0] * torch.sigmoid(raw_p), sums[1] * torch.sigmoid(raw_n)

f = F.apply
"""


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(xielu, "COMPILE", False)


@pytest.fixture
def checked(tmp_path, capsys):
    """A function that checks the formula with parts of it replaced: the status, and {dtype: the lines about it}."""

    def run(*replacements):
        code = PLAIN
        for old, new in zip(replacements[::2], replacements[1::2]):
            assert old in code
            code = code.replace(old, new)
        (tmp_path / "mine.py").write_text(code)
        status = check.main([f"{tmp_path}/mine.py:f"])
        parts = re.split(r"^torch\.(\w+): ", capsys.readouterr().out, flags=re.M)[1:]
        return status, {dtype: text.strip().split("\n    ") for dtype, text in zip(parts[::2], parts[1::2])}

    return run


def test_the_file_is_what_the_script_writes():
    vectors = pytest.importorskip("tools.vectors")
    assert vectors.PATH.read_text("utf-8") == vectors.text() and vectors.PATH.stat().st_size < 200_000
    x = torch.tensor(vectors.inputs(), dtype=torch.float64)
    assert torch.equal(x.bfloat16().double(), x) and x.min() < -1e4 and x.max() > 1e4
    assert 0 < x[x > 0].min() < 1e-12 and (x == 0).sum() == 1


@pytest.mark.parametrize("target", ["xielu", "xielu:xielu_reference", "xielu.py:xielu_fused"])
def test_ours_is_sound(target, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check.main([target]) == 0
    assert capsys.readouterr().out.split() == "torch.float64: sound torch.float32: sound torch.bfloat16: sound".split()


def test_the_plain_formula_is_sound(checked):
    assert checked() == (0, dict.fromkeys(EVERYWHERE, ["sound"]))


@pytest.mark.parametrize("replacements, sentences", FAULTS)
def test_faults_are_named(checked, replacements, sentences):
    status, lines = checked(*replacements)
    assert status == 1 and list(lines) == list(EVERYWHERE)
    for dtype, (verdict, numbers, *found) in lines.items():
        assert verdict == "faulty" and " instead of " in numbers
        assert len(found) == len(sentences) and all(map(str.startswith, found, sentences)), (dtype, found)


@pytest.mark.parametrize(
    "replacements",
    [
        ["alpha_p * z * z", "alpha_p * 1.01 * z * z"],
        ["torch.expm1(m) - m", "1.02 * torch.expm1(m) - m"],
        ["0.5 * z", "0.49 * z"],
        ["0.5 * m", "0.5 * m - 0.01 * m * m"],
        ["z > 0", "z > 0.1"],
        ["m = z.clamp(max=0)", "m = z.clamp(-20, 0)"],
        ["softplus(raw_p)", "torch.exp(raw_p)"],
        ["softplus(raw_p)", "softplus(raw_p).detach()"],
    ],
)
def test_other_faults_get_no_wrong_cause(checked, replacements):
    """But which quantity is wrong, where and by how much."""
    status, lines = checked(*replacements)
    assert status == 1
    for verdict, numbers, *found in lines.values():
        assert verdict == "faulty" and " instead of " in numbers
        assert found and all(
            re.match(r"(f|f′|∂f/∂alpha_[pn]) is wrong for \d+ of the x with x [>≤] 0, from", line) for line in found
        )


@pytest.mark.parametrize(
    "grad, total, sentence",
    [
        ("grad", ".sum()", None),  # right
        ("grad.contiguous()", ".sum()", None),
        ("torch.ones_like(grad)", ".sum()", "∂L/∂y is ignored in the backward pass"),
        ("grad.abs()", ".sum()", "∂L/∂y loses its sign in the backward pass"),
        ("grad * grad", ".sum()", "∂L/∂y is squared in the backward pass"),
        ("grad", ".bfloat16().cumsum(-1).flatten()[-1]", "the gradients of the scalars"),
        ("grad", ".flatten()[:1000].sum()", "the gradients of the scalars are wrong by over 0.1 % of their sum over"),
        ("grad.as_strided(grad.shape, torch.empty(grad.shape).stride())", ".sum()", "other shapes raise RuntimeError"),
        ("grad", ".sum(-1)", "other shapes raise"),
    ],
)
def test_a_backward_pass_of_ones_own(grad, total, sentence, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(BACKWARD.replace("GRAD", grad).replace(" SUM", total))
    status = check.main([f"{tmp_path}/mine.py:f"])
    text = capsys.readouterr().out
    assert status == (0 if sentence is None else 1) and (sentence is None or sentence in text), text
    assert sentence is not None or text.count("sound") == 3
    causes = [line for line in check.FAULTS.values() if line in text]
    assert not causes, text


def test_arithmetic_of_a_narrower_dtype_inside(checked):
    for narrow in ("bfloat16", "float16"):
        to = f".to(torch.{narrow})"
        scalars = "softplus(raw_p), 0.5 + softplus(raw_n)", f"softplus(raw_p){to}, (0.5 + softplus(raw_n)){to}"
        status, lines = checked("x.to(torch.promote_types(x.dtype, torch.float32))", f"x{to}", *scalars)
        line = f"f has no more digits than {narrow}, in which it is computed: convert x to float32 at least"
        assert status == 1 and lines["float32"][2:] == [line]


def test_arithmetic_and_results_in_other_dtypes(checked):
    upcast = "z = x.to(torch.promote_types(x.dtype, torch.float32))"
    status, lines = checked(upcast, "z, raw_p, raw_n = x, raw_p.to(x), raw_n.to(x)")
    assert status == 1 and lines.pop("bfloat16")[2].startswith("its errors are those of arithmetic in bfloat16")
    assert lines == {"float64": ["sound"], "float32": ["sound"]}
    status, lines = checked("y.to(x.dtype)", "y.float()")
    assert (
        status == 1
        and lines["float32"] == ["sound"]
        and lines["bfloat16"] == ["faulty", "the result is in torch.float32"]
    )


def test_gradients_of_the_scalars_alone(checked):
    _, lines = checked("softplus(raw_p)", "softplus(raw_p.detach())")
    assert lines["float32"][1].startswith("∂f/∂alpha_p is 0 instead of")
    assert [line.split(" for")[0] for line in lines["float32"][2:]] == ["∂f/∂alpha_p is wrong"]
    _, lines = checked("softplus(raw_p)", "1.01 * softplus(raw_p) - 0.01 * softplus(raw_p).detach()")
    assert lines["float32"][2:] == ["f and f′ are right, and the gradients of the scalars roughly"]


def test_errors_in_the_function(checked):
    first = "z = x.to("
    status, lines = checked(first, "assert x.dtype == torch.float32, 'no\\nother'; z = x.to(")
    assert status == 0 and lines["float32"] == ["sound"] and lines["float64"] == ["raises AssertionError: no other"]
    for code in ("1 / 0; z = x.to(", "exit(3); z = x.to(", "return None; z = x.to(", "return x.detach(); z = x.to("):
        status, lines = checked(first, code)
        assert status == 1 and all(text[0].startswith("raises ") for text in lines.values())
        assert "faulty: it raises an error in every dtype" in lines["bfloat16"][0]


def test_the_inverted_one_is_less_exact(capsys):
    assert check.main(["plumbing.inverted:xielu_inverted"]) == 1
    assert "f is" not in capsys.readouterr().out


def test_transformers(capsys):
    """The page has the verdict, and says which faults an Apertus model in float32 has."""
    assert check.main(["transformers"]) == 1
    assert f"```\n{capsys.readouterr().out}```" in PAGE

    def in_float32(x, raw_p, raw_n):
        module = transformers.activations.XIELUActivation(dtype=torch.float32)
        return torch.func.functional_call(module, {"alpha_p": raw_p, "alpha_n": raw_n}, x)

    check.check_in(torch.float32, in_float32, False)
    _, _, *faults = capsys.readouterr().out.strip().split("\n    ")
    assert faults == [check.FAULTS["eps"]]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def folder(tmp_path):
    """A function that writes a checkpoint as tools.hf does, with some of its tensors and keys replaced, or left out
    where they are None."""

    def write(tensors=None, **keys):
        config = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=48, vocab_size=9, activation="xielu")
        state = hf.to_hf(Llama(config).state_dict(), config)
        state |= {f"model.layers.1.mlp.act_fn.{name}": tensor for name, tensor in (tensors or {}).items()}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        hf.write_json(tmp_path / "config.json", hf.hf_config(config, 0, None) | keys)
        return str(tmp_path)

    return write


def test_a_checkpoint_of_ours(folder, capsys):
    assert check.main([folder()]) == 0
    assert capsys.readouterr().out == "".join(f"layer {n}: sound, αp = 0.8000, αn = 0.8000\n" for n in (0, 1))


@pytest.mark.parametrize(
    "tensors, line",
    [
        ({"alpha_p": None}, "alpha_p is missing or wrong: nan"),
        ({"alpha_n": torch.tensor([torch.inf])}, "alpha_n is missing or wrong: [inf]"),
        ({"beta": None}, "beta is missing or wrong: nan"),
        ({"beta": torch.tensor(1.0)}, "beta is missing or wrong: 1.0"),
        ({"eps": None}, "eps is missing or wrong: nan"),
        ({"eps": torch.tensor(1e-4)}, "eps is missing or wrong: 9.99"),
        ({"alpha_n": torch.tensor([-1.0], dtype=torch.bfloat16)}, BF16),
    ],
)
def test_faulty_checkpoints(folder, capsys, tensors, line):
    assert check.main([folder(tensors)]) == 1
    first, second, found = capsys.readouterr().out.splitlines()
    assert (
        first.startswith("layer 0: sound") and second.startswith("layer 1: faulty") and found.strip().startswith(line)
    )


@pytest.mark.parametrize("model_type, rounded", [("Arcee", 0.8004), ("Apertus", 0.7999)])
def test_checkpoints_of_transformers(tmp_path, capsys, model_type, rounded):
    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_act": "xielu"}
    config = getattr(transformers, f"{model_type}Config")(**sizes, **heads)
    getattr(transformers, f"{model_type}ForCausalLM")(config).bfloat16().save_pretrained(tmp_path)
    capsys.readouterr()
    assert check.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.count(f": faulty, αp = {rounded}, αn = 0.8009\n    {BF16}") == 3


# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: target"),
        (["xielu", "inverted"], "unrecognized arguments: inverted"),
        (["nowhere"], "nowhere is neither MODULE:FUNCTION nor a folder"),
        (["nowhere:f"], "nowhere:f cannot be loaded: ModuleNotFoundError"),
        (["nowhere.py:f"], "nowhere.py:f cannot be loaded: FileNotFoundError"),
        (["xielu:nothing"], "xielu:nothing cannot be loaded: AttributeError"),
        ([f"{ROOT}/xielu.py:nothing"], "cannot be loaded: KeyError: 'nothing'"),
        (["EMPTY"], "config.json"),
        (["RELU2"], "has no xIELU: its hidden_act is relu2"),
        (["NO_LAYERS"], "does not describe a language model"),
        (["NO_WEIGHTS"], "has no .safetensors file"),
    ],
)
def test_mistakes(argv, message, folder, tmp_path, capsys):
    keys = {"RELU2": {"hidden_act": "relu2"}, "NO_LAYERS": {"num_hidden_layers": None}, "NO_WEIGHTS": {}}
    if argv and argv[0] in keys:
        argv = [folder(**keys[argv[0]])]
    if message == "has no .safetensors file":
        (tmp_path / "model.safetensors").unlink()
    assert check.main([str(tmp_path) if word == "EMPTY" else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_package_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    for target in ("transformers", folder()):
        assert check.main([target]) == 2
        assert "pip install transformers" in capsys.readouterr().err


def test_a_function_that_needs_a_gpu(monkeypatch, capsys):
    original = check.results_of

    def results_of(function, dtype, device):
        if device == "cpu":
            raise ValueError("not on a CPU")
        return original(function, dtype, "cpu")

    monkeypatch.setattr(check, "results_of", results_of)
    monkeypatch.setattr(check, "faults_of_use", lambda *_: [])
    assert check.main(["xielu:xielu_reference"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check.main(["xielu:xielu_reference"]) == 0
