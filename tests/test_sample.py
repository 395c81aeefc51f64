"""tools/sample.py: the text is what the model says."""

import os
import sys
from subprocess import PIPE, Popen
from types import SimpleNamespace

import pytest
import torch

import xielu
from model import Llama, ModelConfig
from plumbing.tokenizer import get_tokenizer
from runs import ROOT, TINY, here
from tools import sample
from tools.sample import choose, generate


def tiny(activation="xielu"):
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


def process(*argv, **options):
    """A process that writes, with pipes for its input and output."""
    command = [sys.executable, "-m", "tools.sample", *map(str, argv)]
    return Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE, **options)


def test_command(trained, capsys):
    xielu.compiled.cache_clear()
    options = [trained, "--prompt=def ", "--tokens=30", "--num=2"]
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


def test_a_pipe_that_is_closed(trained):
    writing = process(trained, "--tokens=2000", "--prompt=abcdefghijkl")
    assert writing.stdout.read(10) == b"abcdefghij"
    writing.stdout.close()
    stderr = writing.stderr.read().decode()
    assert writing.wait(timeout=60) == 0 and "Error" not in stderr and "error" not in stderr


def test_prompt_from_a_file_and_from_standard_input(trained, tmp_path, capsys):
    """The latter for a terminal that cannot show all letters."""
    text = "größe <|endoftext|>\n"
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    options = [trained, "--tokens=5", "--temperature=0"]
    from_file = written(capsys, *options, f"--prompt_file={tmp_path}/prompt.txt")
    assert from_file.startswith(text)
    writing = process(*options, "--prompt_file=-", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    stdout, stderr = writing.communicate(text.encode())
    assert writing.returncode == 0 and stdout.startswith(b"gr??e"), stderr
    assert stdout == from_file.encode("ascii", "replace")


def test_it_ends_where_the_model_ends_it(trained, capsys, monkeypatch):
    tokens = iter([65, 0xC3, 0xBC, 66, get_tokenizer("bytes").eot_token, 67])
    monkeypatch.setattr(sample, "choose", lambda *_: next(tokens))
    assert written(capsys, trained, "--prompt=x") == "xAüB\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "RUN"),
        (".", "has no ckpt.pt"),
        ("out --tokens=0", "at least 1"),
        ("out --temperature=-1", "temperature must be at least 0"),
        ("out --temperature=nan", "temperature must be at least 0"),
        ("out --top_k=-1", "top_k must be at least 0"),
        ("out --seed=99999999999999999999", "seed must be"),
        ("out --tokenizer=gpt2", "more than the run's vocab_size=257"),
        ("out --prompt=a --prompt_file=tiny.py", "not allowed with"),
        ("out --prompt_file=none", "No such file"),
        ("out --device=tpu", "invalid choice: 'tpu'"),
    ],
)
def test_mistakes(trained, capsys, monkeypatch, argv, message):
    monkeypatch.setattr(sample, "get_tokenizer", lambda name: SimpleNamespace(n_vocab=50257))  # without a download
    monkeypatch.chdir(trained.parent)
    assert sample.main(argv.split()) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1, stderr
