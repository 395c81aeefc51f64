"""tools/sample.py: the text is what the model says."""

import os
import sys
from subprocess import PIPE, Popen
from types import SimpleNamespace

import pytest
import torch

import xielu
from activations import ACTIVATIONS, Activation
from model import Llama, ModelConfig
from plumbing.run import save_checkpoint
from plumbing.tokenizer import get_tokenizer
from runs import ROOT, TINY, error, here
from test_model import Mixed
from tools import sample
from tools.sample import choose, generate
from train import Config


def tiny(activation="relu2"):
    """A model whose weights are large, so that the logits differ between tokens."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "seq_len": 24}
    return Llama(ModelConfig(activation, init_std=0.2, **sizes), seed=3).eval()


def test_choose():
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, 0, 50, generator) == 1 and choose(logits, 1.0, 1, generator) == 1
    drawn = [choose(logits, 0.5, 2, generator) for _ in range(2000)]
    assert set(drawn) == {1, 2}
    assert drawn.count(1) / 2000 == pytest.approx(1 / (1 + torch.tensor(-2.0).exp().item()), abs=0.03)
    for top_k in (0, 4, 50):  # all, more than there are included
        assert set(choose(logits, 5.0, top_k, generator) for _ in range(500)) == {0, 1, 2, 3}
    assert choose(logits, 1e-40, 50, generator) == 1 and choose(logits, 1e300, 50, generator) in range(4)


@torch.inference_mode()
def test_past_seq_len():
    """The last seq_len tokens are read, as if the text began there."""
    model = tiny()
    text = [256, 5, 6, 7]
    for token in generate(model, text, 60, 0, 0, None):
        expected = model(torch.tensor([text[-24:]]))[0, -1].argmax()
        assert token == expected, len(text)
        text.append(token)
    long = list(range(100))
    assert next(generate(model, long, 1, 0, 0, None)) == model(torch.tensor([long[-24:]]))[0, -1].argmax()


def test_dtypes(tmp_path, monkeypatch):
    """What multiplies every token is cast once; norms, and what an activation trains, keep their digits."""
    monkeypatch.setitem(ACTIVATIONS, "mixed", Activation("a mixture", Mixed))
    model = tiny("mixed")
    keys = vars(Config(**vars(model.config)))
    checkpoint = {"step": 0, "seconds": 0.0, "loss_average": None, "facts": {}, "optimizers": []}
    save_checkpoint(tmp_path, checkpoint | {"config": keys, "from_file": keys, "model": model.state_dict()})
    loaded, _, _ = sample.load_run(tmp_path, "cpu", torch.bfloat16)
    for name, weight in loaded.named_parameters():
        assert weight.dtype == (torch.float32 if "norm" in name or "act_fn" in name else torch.bfloat16), name
    assert list(generate(loaded, [1, 2], 3, 0, 0, None))


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "tiny.py").write_text(TINY + f'data = "{corpus}"\nout = "{folder}/out"\n')
    here(folder / "tiny.py", "--activation=xielu")
    return folder / "out"


def written(capsys, *argv):
    """What a command that must succeed prints on standard output."""
    capsys.readouterr()
    assert sample.main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def test_command(trained, capsys):
    xielu.compiled.cache_clear()
    options = [trained, "--prompt=def ", "--tokens=30", "--num=2", "--dtype=float32"]  # auto times this machine
    first = written(capsys, *options, "--seed=1")
    assert first.startswith("def ") and first.count("-" * 40) == 1 and first.count("def ") >= 2
    assert written(capsys, *options, "--seed=1") == first != written(capsys, *options, "--seed=2")
    assert xielu.compiled.cache_info().currsize == 0  # which takes longer than writing


def test_the_text_is_what_follows_a_beginning(trained, capsys):
    """The prompt stands at the start of a document: the delimiter is before it."""
    text = written(capsys, trained, "--prompt=def ", "--tokens=30", "--temperature=0", "--dtype=float32")
    model, _, _ = sample.load_run(trained, "cpu", torch.float32)
    tokens = list(generate(model, [256, *b"def "], 30, 0, 0, None))
    tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
    assert text == "def " + bytes(tokens).decode("utf-8", "replace").rstrip("\ufffd") + "\n"


def test_pipes(trained, tmp_path, capsys):
    """A prompt from a file, then from standard input, for a terminal that cannot show all letters and closes early."""
    text = "größe <|endoftext|>\n"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    assert written(capsys, trained, "--tokens=5", f"--prompt_file={tmp_path}/prompt.txt").startswith(text)
    command = [sys.executable, "-m", "tools.sample", trained, "--tokens=2000", "--prompt_file=-"]
    with Popen(
        command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    ) as writing:
        writing.stdin.write(text.encode())
        writing.stdin.close()
        assert writing.stdout.read(len(text)) == text.encode("ascii", "replace")
        writing.stdout.close()
        stderr = writing.stderr.read().decode()
    assert writing.returncode == 0 and "error" not in stderr.lower()


def test_it_ends_where_the_model_ends_it(trained, capsys, monkeypatch):
    tokens = iter([65, 0xC3, 0xBC, 66, get_tokenizer("bytes").eot_token, 67])
    monkeypatch.setattr(sample, "choose", lambda *_: next(tokens))
    assert written(capsys, trained, "--prompt=x") == "xAüB\n"


def test_a_tokenizer_that_drops_a_first_space(tmp_path, capsys, monkeypatch):
    """As Llama 2's does, of whatever it decodes."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"▁Once": 0, "▁upon": 1, "▁a": 2, "▁time": 3}, "▁a")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.save(f"{tmp_path}/tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model = tiny()
    monkeypatch.setattr(sample, "load_run", lambda *_: (model, model.config, None))
    monkeypatch.setattr(sample, "choose", lambda *_: 3)
    assert written(capsys, tmp_path, "--prompt=Once upon a", "--tokens=1") == "Once upon a time\n"


MISTAKES = [
    (".", "has no ckpt.pt"),
    ("out --tokens=0", "at least 1"),
    ("out --temperature=-1", "temperature must be at least 0"),
    ("out --top_k=-1", "top_k must be at least 0"),
    ("out --seed=99999999999999999999", "seed must be"),
    ("out --tokenizer=gpt2", "more than the run's vocab_size=257"),
    ("out --prompt=a --prompt_file=tiny.py", "not allowed with"),
    ("out --prompt_file=none", "No such file"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(trained, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(sample, "get_tokenizer", lambda name: SimpleNamespace(n_vocab=50257))  # without a download
    monkeypatch.chdir(trained.parent)
    assert message in error(capsys, *argv.split(), main=sample.main)
