"""tools/hf.py: what it writes is what transformers loads, and the way back is exact."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from data import get_tokenizer
from runs import TINY, log, run
from tools import hf, sample

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

TEXT = "def f(x):\n    return  x**2 # größe, naïve — 漢字 🙂\r\n\t'don't' 1234567 <|endoftext|> \u0000 a  b   c\n\n"


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A function that trains a little with an activation; its folder."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tiny.py").write_text(TINY + f'data = "{corpus}"\n')

    def trained(activation, *options):
        out = folder / "-".join([activation, *options]).replace("/", "_")
        if not out.exists():
            run(folder / "tiny.py", f"--activation={activation}", f"--out={out}", *options)
        return out

    return trained


def all_digits(model, folder):
    """The model with xIELU's scalars as the file has them, by the lines that tools.hf --help gives."""
    model.float().load_state_dict(safetensors.load_file(folder / "model.safetensors"), strict=False)
    return model


@pytest.mark.parametrize("activation", hf.CLASSES)
def test_logits(runs, tmp_path, activation):
    folder = tmp_path / "folder"
    out = runs(activation, "--n_kv_heads=1", f"--tie_embeddings={activation in ('xielu', 'swiglu')}")
    assert hf.main(["export", str(out), str(folder)]) == 0
    ours, _, _ = sample.load_run(out, "cpu", torch.float32)
    tokens = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == hf.CLASSES[activation][0] and theirs.dtype == torch.float32
    with torch.inference_mode():
        if activation == "xielu":
            # transformers has rounded the scalars to bf16: so it is our model with scalars rounded to bf16 ...
            rounded = copy.deepcopy(ours)
            for scalar in rounded.activation_scalars():
                scalar.copy_(scalar.bfloat16())
            assert torch.allclose(theirs.float()(tokens).logits, rounded(tokens), atol=1e-5)
            theirs = all_digits(theirs, folder)  # ... and ours once they are read again
        assert torch.allclose(theirs(tokens).logits, ours(tokens), atol=1e-5)


def test_xielu_near_zero(runs, tmp_path):
    """The buffers that the file must have, and what they give at 0: our value and gradient."""
    out = runs("xielu", "--n_kv_heads=1", "--tie_embeddings=True")
    assert hf.main(["export", str(out), str(tmp_path / "folder")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    act_fn = all_digits(theirs, tmp_path / "folder").model.layers[1].mlp.act_fn
    ours = sample.load_run(out, "cpu", torch.float32)[0].layers[1].mlp.act_fn
    assert act_fn.beta == 0.5 and act_fn.eps == 0 and act_fn.alpha_p.dtype == torch.float32
    assert torch.equal(act_fn.alpha_p, ours.alpha_p) and torch.equal(act_fn.alpha_n, ours.alpha_n)
    # ±0 apart: at 0 itself both sides of its torch.min have a share in autograd's gradient
    x = torch.tensor([-1e-3, -1e-5, -1e-7, -1e-9, 1e-9, 1e-5], requires_grad=True)
    assert act_fn(torch.zeros(1)) == 0
    (gradient,) = torch.autograd.grad(act_fn(x).sum(), x)
    (expected,) = torch.autograd.grad(ours(x).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-5) and torch.allclose(act_fn(x), ours(x), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("activation", ["xielu", "swiglu"])
def test_the_way_back_is_exact(runs, tmp_path, activation):
    out = runs(activation, "--n_kv_heads=1", "--tie_embeddings=True")
    back = tmp_path / "back"
    assert hf.main(["export", str(out), str(tmp_path / "folder")]) == 0
    assert hf.main(["import", str(tmp_path / "folder"), str(back)]) == 0
    (ours, config, tokenizer), (again, config_again, tokenizer_again) = (
        sample.load_run(folder, "cpu", torch.float32) for folder in (out, back)
    )
    assert ours.config == again.config and tokenizer == tokenizer_again == "bytes"
    state, state_again = ours.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)


def test_an_imported_run_goes_on(runs, tmp_path, corpus):
    out, back = runs("relu2"), tmp_path / "back"
    assert hf.main(["export", str(out), str(tmp_path / "folder")]) == 0
    keys = [f"--data={corpus}", "--tokens_per_step=256", "--micro_batch_size=4", "--eval_tokens=1000", "--max_steps=5"]
    keys += ["--warmup_steps=0", "--decay_steps=0", "--compile=False", "--device=cpu", "--log_every=1"]
    assert hf.main(["import", str(tmp_path / "folder"), str(back), *keys]) == 0
    run(back / "config.py", "--resume")
    assert log(back)[0]["loss"] == pytest.approx(log(out)[-1]["loss"], abs=1e-5)  # where the other one ended
    assert log(back)[-1]["step"] == 5


@pytest.mark.parametrize("name", ["bytes", "gpt2", "cl100k_base", "tekken"])
def test_tokenizer(name, tmp_path):
    from data import UserError

    try:
        encoding = get_tokenizer(name)
    except UserError as error:
        pytest.skip(str(error))
    hf.hf_tokenizer(encoding).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hf.tokenizer_config(encoding, name, 64)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == encoding.encode_ordinary(TEXT)
    assert theirs.decode(encoding.encode_ordinary(TEXT)) == TEXT
    assert theirs.eos_token_id == encoding.eot_token and len(theirs) <= encoding.n_vocab


def test_generate(runs, tmp_path):
    """transformers' greedy generate says what our greedy sample says."""
    out = runs("xielu", "--n_kv_heads=1", "--tie_embeddings=True")
    assert hf.main(["export", str(out), str(tmp_path / "folder")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    prompt = torch.tensor([[256, *tokenizer("def ")["input_ids"]]])
    theirs = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :].tolist()
    ours, _, _ = sample.load_run(out, "cpu", torch.float32)
    assert len(theirs) == 20 and theirs == list(sample.generate(ours, prompt[0].tolist(), 20, 0, 0, None))


def test_mistakes(runs, tmp_path, capsys):
    out = runs("relu2")
    folder = tmp_path / "folder"
    assert hf.main(["export", str(out), str(folder)]) == 0

    def changed(**keys):
        other = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, other)
        config = json.loads((other / "config.json").read_text()) | keys
        (other / "config.json").write_text(json.dumps(config))
        return str(other)

    linear = {"rope_type": "linear", "factor": 2.0}
    for arguments, message in [
        (["export", str(out)], "say export RUN FOLDER"),
        (["export", str(out), str(tmp_path / "x"), "--dtype=float16"], "say export RUN FOLDER"),
        (["export", str(tmp_path), str(tmp_path / "x")], "has no ckpt.pt"),
        (["export", str(runs("xsilu")), str(tmp_path / "x")], "no class for xsilu: it has swiglu, geglu, xielu"),
        (["export", str(out), str(folder)], "is not empty"),
        (["import", str(tmp_path), str(tmp_path / "x")], "has no config.json"),
        (["import", str(folder), str(out)], "is not empty"),
        (["import", changed(model_type="gpt2"), str(tmp_path / "x")], "no model of type gpt2"),
        (["import", changed(model_type="nobody"), str(tmp_path / "x")], "cannot be read"),
        (
            ["import", changed(rope_parameters=linear), str(tmp_path / "x")],
            "positions of type linear",
        ),
        (["import", changed(mlp_bias=True), str(tmp_path / "x")], "has biases"),
        (["import", changed(head_dim=64), str(tmp_path / "x")], "heads of width 64"),
        (["import", changed(hidden_size=64), str(tmp_path / "x")], "it has [257, 32], which should be [257, 64]"),
        (["import", changed(hidden_size=None), str(tmp_path / "x")], "config.json cannot be read"),
        (["import", changed(rms_norm_eps="small"), str(tmp_path / "x")], "config.json cannot be read"),
        (["import", changed(num_attention_heads=0), str(tmp_path / "x")], "config.json"),
        (["import", changed(max_position_embeddings=-1), str(tmp_path / "x")], "config.json does not make a model"),
        (["import", changed(), str(tmp_path / "x"), "--dimm=3"], "did you mean 'dim'"),
        (["import", changed(), str(tmp_path / "x"), "--dim=64"], "--dim=64 cannot be asked for: the model in"),
        (["import", changed(), str(tmp_path / "x"), "--seq_len=64"], "--seq_len=64 cannot be asked for: the model in"),
        (["export", str(out), str(tmp_path / "x"), "--tokenizer"], "give each option a value"),
        (["export", str(out), str(tmp_path / "x"), "--tokenizer=gpt2"], "more than the run's vocab_size"),
    ]:
        capsys.readouterr()
        assert hf.main(arguments) == 2, arguments
        stderr = capsys.readouterr().err
        assert message in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "x").exists()


def test_damaged_weights(runs, tmp_path, capsys):
    folder = tmp_path / "folder"
    assert hf.main(["export", str(runs("relu2")), str(folder)]) == 0
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert hf.main(["import", str(folder), str(tmp_path / "back")]) == 2
    assert "is damaged" in capsys.readouterr().err
    weights.unlink()
    assert hf.main(["import", str(folder), str(tmp_path / "back")]) == 2
    assert "has no .safetensors file" in capsys.readouterr().err


def test_weights_in_several_files_and_in_bf16(runs, tmp_path, capsys):
    folder, back = tmp_path / "folder", tmp_path / "back"
    assert hf.main(["export", str(runs("swiglu")), str(folder)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert hf.main(["import", str(folder), str(back), "--seq_len=16"]) == 0
    ours, config, _ = sample.load_run(back, "cpu", torch.float32)
    assert config.seq_len == 16 and {weight.dtype for weight in ours.parameters()} == {torch.float32}
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(ours(tokens), theirs.float()(tokens).logits, atol=1e-5)
    (tmp_path / "back" / "ckpt.pt").unlink()
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    capsys.readouterr()
    assert hf.main(["import", str(folder), str(tmp_path / "again")]) == 2
    assert "it has none, which should be" in capsys.readouterr().err


def test_a_model_of_others(tmp_path, capsys):
    """A Llama that transformers made, with a tokenizer of its own: imported, sampled from, and exported again."""
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
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(theirs)

    assert hf.main(["import", str(theirs), str(back)]) == 0
    tokens = torch.randint(400, (2, 64), generator=torch.Generator().manual_seed(0))
    ours, _, _ = sample.load_run(back, "cpu", torch.float32)
    with torch.inference_mode():
        assert torch.allclose(model(tokens).logits, ours(tokens), atol=1e-5)
    prompt = tokenizer.encode("def größe").ids
    written = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    capsys.readouterr()
    assert sample.main([str(back), "--prompt=def größe", "--tokens=20", "--temperature=0", "--dtype=float32"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(written).rstrip("\n\ufffd")

    assert hf.main(["export", str(back), str(again)]) == 0
    with torch.inference_mode():
        logits = transformers.AutoModelForCausalLM.from_pretrained(again)(tokens).logits
    assert torch.allclose(logits, model(tokens).logits, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(again)(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
