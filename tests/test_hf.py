"""tools/hf.py: what it writes is what transformers loads, and a run comes back exactly."""

import copy
import json
import logging
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from tiktoken import _educational

import xielu
from runs import ODD_TEXTS, TINY, error, here, log, settings_restored, tokenizer_or_skip
from tools import hf, sample

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

TEXT = "def f(x):\n    return  x**2 # größe, naïve — 漢字 🙂\r\n\t'don't' 1234567 <|endoftext|> \u0000 a  b   c\n\n"


@pytest.fixture(autouse=True)
def uncompiled(compile_again):
    """Compiling takes longer than all else here."""
    xielu.COMPILE = False


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A function that trains a little with an activation, with or without qk_norm, and returns the run's folder."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tiny.py").write_text(TINY + f'n_kv_heads = 1\ndata = "{corpus}"\n')

    def trained(activation, qk_norm=False):
        out = folder / f"{activation}-{qk_norm}"
        if not out.exists():
            tied = activation.startswith("xielu") or activation == "swiglu"
            keys = [f"--activation={activation}", f"--qk_norm={qk_norm}", f"--tie_embeddings={tied}"]
            # weights so large that a mistake in one shows in the logits, and that a greedy text is not all spaces; with
            # SwiGLU, 0.3 would enlarge rounding to the tolerance
            keys += [f"--init_std={0.2 if activation == 'swiglu' else 0.3}"] if tied else []
            here(folder / "tiny.py", *keys, f"--out={out}")
        return out

    return trained


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """A function that exports such a run and returns its folder and that of transformers."""
    parent = tmp_path_factory.mktemp("exported")

    def export(activation, qk_norm=False):
        out, folder = runs(activation, qk_norm), parent / f"{activation}-{qk_norm}"
        if not folder.exists():
            assert hf.main(["export", str(out), str(folder)]) == 0
        return out, folder

    return export


def load(out):
    """The model of a run, in float32."""
    return sample.load_run(out, "cpu", torch.float32)[0]


def all_digits(model, folder):
    """The model with xIELU's scalars as the file has them, by the lines that tools.hf --help gives."""
    model.float().load_state_dict(safetensors.load_file(folder / "model.safetensors"), strict=False)
    return model


@pytest.mark.parametrize("activation, qk_norm", hf.CLASSES)
def test_logits(exported, activation, qk_norm):
    out, folder = exported(activation, qk_norm)
    ours = load(out)
    tokens = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    with torch.inference_mode():
        if type(theirs) is transformers.ArceeForCausalLM and activation.startswith("xielu"):
            # transformers has rounded the scalars to bf16: so it is our model with scalars rounded to bf16 ...
            rounded = copy.deepcopy(ours)
            for scalar in rounded.activation_parameters():
                scalar.copy_(scalar.bfloat16())
            assert torch.allclose(theirs.float()(tokens).logits, rounded(tokens), atol=1e-5)
            theirs = all_digits(theirs, folder)  # ... and ours once they are read again
        assert torch.allclose(theirs(tokens).logits, ours(tokens), atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_xielu_near_zero(exported, qk_norm):
    """The buffers that the file must have, and what they give at 0: our value and gradient."""
    out, folder = exported("xielu", qk_norm)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    act_fn = (theirs if qk_norm else all_digits(theirs, folder)).model.layers[1].mlp.act_fn
    ours = load(out).layers[1].mlp.act_fn
    assert act_fn.beta == 0.5 and act_fn.eps == torch.tensor(1e-6) and act_fn.alpha_p.dtype == torch.float32
    assert torch.equal(act_fn.alpha_p, ours.raw_alpha_p) and torch.equal(act_fn.alpha_n, ours.raw_alpha_n)
    # with eps = 0, the gradient at 0 would be β − αn/2, since both sides of its torch.min would have a share in it
    x = torch.tensor([-1e-3, -1e-5, -1e-6, -1e-7, -1e-9, 0.0, 1e-9, 1e-5], requires_grad=True)
    assert act_fn(torch.zeros(1)) == 0
    (gradient,) = torch.autograd.grad(act_fn(x).sum(), x)
    (expected,) = torch.autograd.grad(ours(x).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-5) and torch.allclose(act_fn(x), ours(x), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("activation, qk_norm", [("relu2", False), ("swiglu", False), ("xielu", True)])
def test_an_imported_run_continues(exported, tmp_path, activation, qk_norm):
    """With its weights and its keys but for its data, from where the other one ended, and in its own folder, even if
    that was moved."""
    (out, folder), back = exported(activation, qk_norm), tmp_path / "back"
    ours, config, tokenizer = sample.load_run(out, "cpu", torch.float32)
    assert config.data not in (folder / "config.json").read_text()
    assert hf.main(["import", str(folder), str(back), f"--data={config.data}"]) == 0
    again, config_again, tokenizer_again = sample.load_run(back, "cpu", torch.float32)
    assert tokenizer == tokenizer_again == "bytes"
    assert vars(config_again) == vars(config) | {"out": str(back)}
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
    moved = back.rename(tmp_path / "moved")
    here(moved / "config.py", "--resume", "--max_steps=5", "--warmup_steps=0", "--decay_steps=0")
    assert log(moved)[0]["loss"] == pytest.approx(log(out)[-1]["loss"], abs=1e-5)
    assert log(moved)[-1]["step"] == 5 and not back.exists()


def any_encoding(name):
    """The encoding of this name; "trained" is GPT-2's pattern with a few hundred merges, which needs no download."""
    if name != "trained":
        return tokenizer_or_skip(name)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = _educational.bpe_train(TEXT * 3 + Path(__file__).read_text()[:8000], 500, pattern)
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 500})


@pytest.mark.parametrize("name", ["bytes", "trained", "gpt2", "cl100k_base", "tekken"])
def test_tokenizer(name, tmp_path):
    encoding = any_encoding(name)
    hf.write_tokenizer(tmp_path, encoding, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "".join(ODD_TEXTS), "return" * 3 + "e" * 50, Path(__file__).read_text()):
        assert theirs(text)["input_ids"] == encoding.encode_ordinary(text)
        assert theirs.decode(encoding.encode_ordinary(text)) == text
    assert theirs.eos_token_id == encoding.eot_token and len(theirs) <= encoding.n_vocab


def greedy(out, prompt):
    """20 tokens of our greedy sample after a prompt, a list of tokens."""
    return list(sample.generate(load(out), prompt, 20, 0, 0, None))


def test_mlx(exported):
    """mlx-lm runs an Apertus folder: its logits and its greedy tokens are ours. (pip install 'mlx[cpu]' mlx-lm)"""
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    from mlx_lm.generate import generate_step

    out, folder = exported("xielu", qk_norm=True)
    model, _ = mlx_lm.load(str(folder))
    tokens = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = torch.tensor(model(mx.array(tokens.tolist())).tolist())
        assert torch.allclose(logits, load(out)(tokens), atol=1e-4)
    written = [int(token) for token, _ in generate_step(mx.array([256, *b"def "]), model, max_tokens=20)]
    assert written == greedy(out, [256, *b"def "])


NOTES = [
    ("xielu", False, "arcee with xielu runs in transformers alone, its scalars in bf16"),
    ("xielu", True, "apertus with xielu runs in transformers, vLLM, SGLang, llama.cpp and mlx-lm"),
    ("geglu", False, "llama with gelu runs in transformers alone: llama.cpp and mlx-lm would silently compute"),
    ("gelu", False, "arcee with gelu runs in transformers alone: llama.cpp would silently compute ReLU²"),
]


@pytest.mark.parametrize("activation, qk_norm, runs_in", NOTES)
def test_what_is_written(runs, tmp_path, capsys, activation, qk_norm, runs_in):
    assert hf.main(["export", str(runs(activation, qk_norm)), str(tmp_path / "new")]) == 0
    note = capsys.readouterr().out.splitlines()[-2]
    assert note.startswith(f"note: {runs_in}")
    # llama.cpp refuses an Apertus model without a head of its own, even a tied one
    tied = activation == "xielu" and not qk_norm
    assert ("lm_head.weight" in safetensors.load_file(tmp_path / "new" / "model.safetensors")) != tied
    (tmp_path / "usual").touch()
    assert {file.stat().st_mode for file in (tmp_path / "new").iterdir()} == {(tmp_path / "usual").stat().st_mode}


MISTAKES = [
    ("exports RUN NEW", "invalid choice: 'exports'"),
    ("export RUN NEW --dtype=float16", "the only option of export is --tokenizer=NAME"),
    ("export NOTHING NEW", "has no ckpt.pt"),
    ("export XSILU NEW", "model with xsilu and qk_norm=False: with this qk_norm it has swiglu, geglu, xielu"),
    ("export RELU2 NEW", "model with relu2 and qk_norm=True: with this qk_norm it has xielu, xielu_reference"),
    ("export RUN FOLDER", "is not empty"),
    ("export RUN NEW --tokenizer", "give options as --KEY=VALUE, not --tokenizer"),
    ("export RUN NEW --tokenizer=gpt2", "more than the run's vocab_size"),
    ("import NOTHING NEW", "has no config.json"),
    ("import FOLDER NEW --dim=64", "--dim=64 cannot be set: the model in"),
    ("import FOLDER NEW --seq_len=64", "--seq_len=64 cannot be set: the model in"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(runs, exported, tmp_path, capsys, monkeypatch, argv, message):
    (run, folder), nothing = exported("relu2"), tmp_path / "nothing"
    nothing.mkdir()
    places = {"RUN": run, "FOLDER": folder, "NOTHING": nothing, "NEW": tmp_path / "new"}
    places |= {"XSILU": runs("xsilu"), "RELU2": runs("relu2", qk_norm=True)}
    monkeypatch.setattr(sample, "get_tokenizer", lambda name: SimpleNamespace(n_vocab=50257))  # without a download
    assert message in error(capsys, *(places.get(word, word) for word in argv.split()), main=hf.main)
    assert not (tmp_path / "new").exists()


SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")


OTHER_MODELS = [
    ({"model_type": "gpt2"}, "no model of type gpt2"),
    ({"model_type": "nobody"}, "config.json does not make a model"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "positions of type linear"),
    ({"model_type": "llama", "hidden_act": "silu", "intermediate_size": 49}, "intermediate_size is odd"),
    ({"hidden_size": 64}, "torch.Size([257, 32]) from checkpoint"),
    ({"hidden_size": 2**31}, "the weights do not fit config.json"),
    ({"num_hidden_layers": 10_000}, "config.json has 10000 layers, and the weights have 2"),
    ({"vocab_size": -1}, "config.json does not make a model"),  # of which transformers has more to say
    ({"nanoxielu_config": {"lr": "fast"}}, "config.json does not make a model: lr must be a number"),
    *(({key: value}, "config.json ") for key in SIZES for value in (10**30, -1, "3", None, 2.5, [])),
]


@pytest.mark.parametrize("keys, message", OTHER_MODELS)
def test_folders_of_other_models(exported, tmp_path, capsys, caplog, monkeypatch, keys, message):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    changed = shutil.copytree(exported("relu2")[1], tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text()) | keys
    (changed / "config.json").write_text(json.dumps(config))
    assert message in error(capsys, "import", changed, tmp_path / "new", main=hf.main)
    assert not (tmp_path / "new").exists() and not caplog.records


def test_damaged_and_other_weights(exported, tmp_path, capsys):
    folder = shutil.copytree(exported("relu2")[1], tmp_path / "folder")
    weights = folder / "model.safetensors"
    tensors = safetensors.load_file(weights)
    mistake = partial(error, capsys, "import", folder, tmp_path / "back", main=hf.main)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged" in mistake()
    weights.unlink()
    assert "has no .safetensors file" in mistake()
    for name, shape, message in (
        ("layers.0.mlp.act_fn.beta", (2, 1), "is [[1.0], [1.0]], and this code's β is 0.5"),
        ("layers.0.mlp.up_proj.bias", 48, 'Unexpected key(s) in state_dict: "layers.0.mlp.up_proj.bias"'),
        ("layers.0.self_attn.q_proj.weight", (128, 32), "size mismatch for layers.0.self_attn.q_proj.weight"),
    ):
        safetensors.save_file(tensors | {f"model.{name}": torch.ones(shape)}, weights)
        assert message in mistake()
    del tensors["model.norm.weight"]
    safetensors.save_file(tensors, weights)
    assert 'Missing key(s) in state_dict: "norm.weight"' in mistake()


def test_a_model_of_others(tmp_path, capsys):
    """A Llama that transformers made, in bf16 and several files, with a tokenizer of its own: imported, sampled from,
    and exported again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs, back, again = tmp_path / "theirs", tmp_path / "back", tmp_path / "again"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT * 20, Path(__file__).read_text()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(theirs)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads, initializer_range=0.3, eos_token_id=0, rope_theta=1e4)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(theirs, max_shard_size="20KB")
    assert len(list(theirs.glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()

    assert hf.main(["import", str(theirs), str(back), "--seq_len=48"]) == 0
    ours = load(back)
    assert ours.config.seq_len == 48 and {weight.dtype for weight in ours.parameters()} == {torch.float32}
    tokens = torch.randint(400, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(model(tokens).logits, ours(tokens), atol=1e-5)
    prompt = tokenizer.encode("def größe").ids
    written = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    capsys.readouterr()
    with settings_restored():
        assert sample.main([str(back), "--prompt=def größe", "--tokens=20", "--temperature=0", "--dtype=float32"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(written).rstrip("\n\ufffd")

    assert hf.main(["export", str(back), str(again)]) == 0
    with torch.inference_mode():
        logits = transformers.AutoModelForCausalLM.from_pretrained(again)(tokens).logits
    assert torch.allclose(logits, model(tokens).logits, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(again)(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
    exported = json.loads((again / "config.json").read_text())
    assert exported["eos_token_id"] == 0 and exported["bos_token_id"] is None  # which theirs may not be
