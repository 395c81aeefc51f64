"""train.py: its config, its schedule, and whole runs of it, alone and under torchrun."""

import json
import math
import re
import shutil
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch

import train
from model import Llama, ModelConfig
from plumbing import machine
from plumbing.command import UserError
from plumbing.data import Corpus
from plumbing.machine import peak_flops, pick_dtype
from runs import ROOT, assert_same_losses, error, here, launch, log, run
from test_data import write
from train import Config, learning_rate, make_optimizers

# ------------------------------------------------------------------------------------------------ config


def test_defaults_file_and_command_line(tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import math\nfrom math import sqrt\nfrom configs.xielu_1b import *\nlr = 2\n_hidden = 3\n")
    line = [str(child), "--dim=128", "--resume", "--compile=false", "--max_steps=1_000"]
    from_file, options = Config.read_command(line)
    assert from_file.keys() == Config.defaults().keys()
    assert from_file["dim"] == 1536 and from_file["lr"] == 2.0 and isinstance(from_file["lr"], float)
    assert from_file["out"] == "out/child"
    expected = {"dim": 128, "resume": True, "compile": False, "max_steps": 1000}
    assert options == expected | {"tokens_per_parameter": 0.0}  # max_steps replaces what a file may say
    assert Config.read_command([str(child), "--tokens_per_step=1e6"])[1] == {"tokens_per_step": 1_000_000}


def test_steps_follow_the_size_of_the_model_and_the_length_of_the_run():
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 48, "seq_len": 32}
    keys = sizes | {"tokens_per_step": 256, "tokens_per_parameter": 20, "decay_steps": 0.25, "eval_every": 0.05}
    parameters = 257 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 48 + 2 * 32) + 32
    for activation in ("relu2", "xielu", "swiglu"):  # two scalars per layer make no run longer
        config = Config(activation=activation, warmup_steps=0.001, **keys)
        assert config.max_steps == round(20 * parameters / 256)
        assert (config.warmup_steps, config.decay_steps) == (2, round(config.max_steps / 4))
        assert config.eval_every == round(config.max_steps / 20) and config.tokens_per_parameter == 0
        assert Config(**vars(config)) == config  # what is saved holds the numbers
    assert Config(max_steps=10, warmup_steps=2, decay_steps=0.5, eval_every=0.01).eval_every == 1


# (line of the config file, option, message)
MISTAKES = [
    ("", "--dim=1e12", "dim must be at least 1 and at most 2147483648, not 1000000000000"),
    ("", "--n_layers=1e6", "n_layers must be at least 1 and at most 10000"),
    ("", "--ffn_dim=2147483646", "to train 274,877,.* parameters takes 4,398 GB, and cpu .* has [0-9]+ GB: lower dim"),
    ("", "--learning_rate=3", "did you mean 'lr'"),
    ("", "--activation=relu2,xielu", "activation must be one value, .*: python -m tools.compare takes lists"),
    ("", "--max_steps 40", "give one config file, and options with ="),
    ("", "a.txt b.txt c.txt", "not .*a.txt b.txt c.txt"),
    ("", "--dmi=3", "unknown key 'dmi' on the command line: did you mean 'dim'"),
    ("", "--zzzzz=3", "train.py --help lists all keys"),
    ("", "--dim=many", "dim must be a whole number, not 'many'"),
    ("", "--dim=1.5", "dim must be a whole number"),
    ("", "--dim", "dim must be a whole number"),
    ("", "--lr=nan", "lr must be a number"),
    ("", "--compile=maybe", "compile must be True or False"),
    ("", "--out", "out must be text"),
    ("dmi = 3", "", "unknown key 'dmi' in .*tiny.py: did you mean 'dim'"),
    ("dim = ", "", "does not run: SyntaxError"),
    ("exit(0)", "", "does not run: SystemExit: 0"),
    ("", "--activation=relu3", "unknown activation 'relu3'"),
    ("activation = 'swiglu'", "--ffn_dim=50", "take 51"),
    ("", "--warmup_steps=10", "warmup_steps=10 and decay_steps=4 do not fit into max_steps=12"),
    ("", "--n_heads=3", "n_heads=3"),
    ("", "--max_steps=0", "max_steps must be at least 1"),
    ("", "--lr=-1", "lr must be at least 0, not -1.0"),
    ("", "--beta2=1", "beta2 must be at least 0 and below 1, not 1.0"),
    ("", "--dtype=float16", "dtype must be one of auto, float32, bfloat16"),
    ("", "--tokens_per_step=100", "use --tokens_per_step=128$"),
    ("", "--tokens_per_step=1000", "use --tokens_per_step=1024$"),
    ("", "--tokens_per_step=192", "use --micro_batch_size=3$"),
    ("", "--n_kv_heads=3", "n_heads=2 is not a multiple of n_kv_heads=3"),
    ("", "--dim=30", "dim=30 over n_heads=2 must give an even number"),
    ("", "--out={tmp}/tiny.py/x", "tiny.py/x cannot be a folder"),
    ("", "--data={tmp}/a\nb", "no data folder .*/a b"),
    ("", "--data={tmp}", "has no train shards"),
    ("", "--vocab_size=256", r"was tokenized with bytes \(257 ids\), more than vocab_size=256"),
    ("", "--memory_budget=0.5", "memory_budget=0.5 needs a compiled model"),
]


def test_mistakes_get_one_line_and_leave_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = config.read_text()
    for line, option, message in MISTAKES:
        config.write_text(f"{text}\n{line}\n")
        arguments = option.format(tmp=tmp_path).split(" ") if option else []
        assert re.search(message, error(capsys, config, *arguments)[:-1])
    assert "give one config file" in error(capsys)
    assert "no config nowhere.py: there are configs/compare_124m.py" in error(capsys, "nowhere.py")
    message = "config.json is not a config file, a Python file that ends in .py; to continue"
    assert message in error(capsys, "out/x/config.json")
    assert "there is no data folder data/fineweb-edu-tekken" in error(capsys, "configs/xielu_1b.py")
    assert f"there is no data folder {config}" in error(capsys, config, f"--data={config}")
    assert f"{config} cannot be a folder, since a file is in its place" in error(capsys, config, f"--out={config}")
    assert list(tmp_path.iterdir()) == [config]


def test_an_activation_that_breaks_its_contract(config, tmp_path, capsys):
    """Whatever it breaks; test_activations.py has the others."""
    unused = "def make():\n    m = torch.nn.ReLU()\n    m.unused = torch.nn.Parameter(torch.ones(1))\n    return m\n"
    for name, code, message in (
        ("tanh", "make = lambda: torch.tanh\n", "is not a torch.nn.Module: write a class"),
        ("unused", unused, "unused gets no gradient: use it in forward"),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(f"import torch\nfrom activations import Activation\n{code}ACTIVATION = Activation('x', make)\n")
        for options in ([], ["--tokens_per_parameter=1"]):
            assert message in error(capsys, config, f"--activation={path}", *options)


def test_help_lists_every_key(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for item in fields(Config):
        assert f"--{item.name}={item.default} " in text and item.metadata["help"] in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_shipped_configs(path):
    config = Config(**Config.read_command([str(path)])[0])
    activation, size = path.stem.split("_")[0], path.stem.split("_")[-1]
    assert config.out == f"out/{path.stem}"
    assert activation in ("demo", "compare") or config.activation == activation
    for processes in {"3b": (1, 8, 64, 320), "1b": (1, 8, 88), "124m": (1, 2, 8, 32)}.get(size, (1,)):
        config.check_batch(processes)
    if size in ("1b", "3b"):
        parameters, tokens, constant = {
            "1b": (1_132_537_344, 126.16e9, 55500),
            "3b": (3_020_048_384, 125.83e9, 38000),
        }[size]
        assert config.max_steps * config.tokens_per_step == pytest.approx(tokens, rel=1e-4)
        assert config.max_steps - config.decay_steps == constant
        with torch.device("meta"):
            model = Llama(config)
        scalars = 2 * config.n_layers if activation == "xielu" else 0
        assert model.num_parameters() == parameters + scalars
        # q, k, v, o and the MLP of each layer, the head, and attention
        matrices = config.n_layers * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim) + 147456 * config.dim
        assert model.flops_per_token() == 6 * matrices + 12 * config.n_layers * config.dim * 4096
        assert size == "3b" or model.flops_per_token() == pytest.approx(8.6e9, rel=0.01)


def test_what_resuming_may_change():
    then = Config.defaults() | {"max_steps": 400, "dim": 96}
    saved = {"config": then | {"lr": 0.5}, "from_file": then}
    assert Config.resumed(saved, then, {}).lr == 0.5  # given on the first command line, not on this one
    assert Config.resumed(saved, then, {"lr": 0.1}).lr == 0.1
    assert Config.resumed(saved, then, {"data": "elsewhere"}).data == "elsewhere"
    longer = then | {"max_steps": 500}
    assert Config.resumed(saved, longer, {}).max_steps == 500  # the file has changed since
    assert Config.resumed(saved, longer, {"max_steps": 600}).max_steps == 600
    with pytest.raises(UserError, match="cannot change dim from 96 to 192"):
        Config.resumed(saved, then | {"dim": 192}, {})
    for name, value in {"activation": "xielu_inverted", "seed": 7, "seq_len": 7, "tokens_per_step": 7}.items():
        with pytest.raises(UserError, match=f"cannot change {name} "):
            Config.resumed(saved, then, {name: value})


# ------------------------------------------------------------------------------------------------ parts


def test_learning_rate():
    config = Config(lr=8e-4, warmup_steps=2000, decay_steps=14500, max_steps=70000)
    assert learning_rate(config, 0) == pytest.approx(8e-4 / 2000)
    assert learning_rate(config, 999) == pytest.approx(4e-4)
    assert learning_rate(config, 1999) == learning_rate(config, 55500) == 8e-4
    assert learning_rate(config, 55501) == pytest.approx(8e-4 * (1 - math.sqrt(1 / 14500)))
    assert learning_rate(config, 69999) == pytest.approx(8e-4 * (1 - math.sqrt(14499 / 14500)))
    plain = Config(lr=1.0, warmup_steps=0, decay_steps=0, max_steps=3)
    assert [learning_rate(plain, update) for update in range(3)] == [1.0] * 3


def test_muon_takes_the_matrices_of_the_layers():
    """Its updates are 0.2 in root mean square for every shape, as AdamW's are about."""
    model = Llama(ModelConfig(dim=32, n_layers=3, n_heads=2, n_kv_heads=2, ffn_dim=48))
    config = Config(optimizer="muon", weight_decay=0.0, alpha_lr=0.5)
    adamw, muon = make_optimizers(model, config)
    assert [len(group["params"]) for group in adamw.param_groups] == [1 + 2 * 3 + 1, 6]
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.9, 0.95), 1e-8)
    assert len(muon.param_groups[0]["params"]) == 6 * 3
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(1))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    train.update([adamw, muon], 1e-3)
    for name, weight in model.named_parameters():
        change = (weight.detach() - before[name]).square().mean().sqrt().item() / 1e-3
        expected = {True: 0.2, False: 1.0}[name.startswith("layers") and weight.ndim == 2]
        expected *= 0.5 if "alpha" in name else 1
        assert change == pytest.approx(expected, rel=0.3), name


def test_auto_dtype(monkeypatch):
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert pick_dtype("auto", torch.device("cuda")) == expected
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("ratio, expected", [(1.31, torch.bfloat16), (1.29, torch.float32)])
def test_auto_dtype_on_a_cpu(monkeypatch, ratio, expected):
    """A linear layer that takes `ratio` s in float32 and 1 s in bfloat16."""
    times = iter([[ratio] * 6, [1.0] * 6])
    monkeypatch.setattr(machine.timeit, "repeat", lambda *_, **__: next(times))
    dtype, reason = machine.faster_dtype()
    assert dtype == expected and re.search(r"\d GFLOP/s in float32 and \d+ GFLOP/s in bfloat16", reason)


def test_what_auto_took_holds(config, out, monkeypatch):
    """Also for a run that was killed before its first checkpoint, and on a machine that would now decide otherwise."""
    options = ["--dtype=auto", "--warmup_steps=0", "--decay_steps=0", "--max_steps=1"]
    monkeypatch.setattr(machine, "faster_dtype", lambda: (torch.bfloat16, "measured"))
    assert "dtype=auto takes bfloat16: measured" in here(config, *options)
    monkeypatch.setattr(machine, "faster_dtype", lambda: (torch.float32, "measured"))
    assert "dtype=auto" not in here(config, *options, "--max_steps=2", "--resume")
    (out / "ckpt.pt").unlink()
    assert "in bfloat16" in here(config, *options, "--resume")
    assert json.loads((out / "config.json").read_text())["config"]["dtype"] == "bfloat16"
    (out / "config.json").write_text("[" * 100_000)  # damaged, and the checkpoint still tells
    assert "in bfloat16" in here(config, *options, "--max_steps=3", "--resume")


def test_peaks(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200 NVL": 835e12, "Other": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_and_what_it_leaves(config, out, corpus):
    output = here(config, "--activation=xielu", "--eval_tokens=777")
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "config.json", "lock", "log.jsonl"]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    training = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "val"]
    assert [record["step"] for record in training] == list(range(1, 13))
    assert [record["step"] for record in validation] == [0, 5, 10, 12]
    keys = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "memory", "seconds"}
    resolved = Config(**Config.read_command([str(config)])[0])
    for record in training:
        assert set(record) == keys and record["tokens"] == 256 * record["step"] and record["mfu"] is None
        assert record["lr"] == learning_rate(resolved, record["step"] - 1) and record["tokens_per_s"] > 0
    assert [r["seconds"] for r in training] == sorted(r["seconds"] for r in training)
    assert validation[0]["loss"] == pytest.approx(math.log(257), rel=0.02)
    assert validation[-1]["loss"] < validation[0]["loss"] - 0.2
    for record in validation:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2), rel=0.01)
        assert len(record["alpha_p"]) == len(record["alpha_n"]) == 2
    assert validation[0]["alpha_p"] + validation[0]["alpha_n"] == pytest.approx([0.8] * 4)
    assert "step 12/12  val loss" in output
    assert re.search(r"step 11/12 .* tokens/s  0m\d\ds elapsed, 0m00s left", output)
    saved = json.loads((out / "config.json").read_text())
    assert set(saved) == {"config", "facts", "origin"}
    assert saved["config"] == asdict(resolved) | {"activation": "xielu", "eval_tokens": 777}

    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 12 and not any("_orig_mod" in name for name in checkpoint["model"])
    assert {"layers.0.mlp.act_fn.raw_alpha_p", "layers.1.mlp.act_fn.raw_alpha_n"} <= checkpoint["model"].keys()
    assert all(checkpoint[name] == saved[name] for name in ("config", "facts"))
    # the validation loss is the mean over its tokens, by the model in the checkpoint
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=48, seq_len=32))
    model.load_state_dict(checkpoint["model"])
    stream = torch.from_numpy(np.fromfile(next(corpus.glob("*_val_*")), "<u2", 778, offset=1024).astype(np.int64))
    spans = [stream[None, start : start + 33] for start in range(0, 777, 32)]
    losses = [model(span[:, :-1], span[:, 1:], reduction="sum").item() for span in spans]
    assert validation[-1]["loss"] == pytest.approx(sum(losses) / 777, rel=1e-6)


def test_the_same_command_twice_and_nothing_compiled_without_compile(config, tmp_path, monkeypatch):
    here(config, "--activation=xielu", f"--out={tmp_path}/a")
    here(config, "--activation=xielu", f"--out={tmp_path}/c", "--seed=43")
    assert log(tmp_path / "a") != log(tmp_path / "c")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    at_exit = "lambda: print('compiler loaded:', 'torch._inductor.compile_fx' in sys.modules)"
    config.write_text(config.read_text() + f"import atexit, sys\natexit.register({at_exit})\n")
    text = run(config, "--activation=xielu", f"--out={tmp_path}/b")
    assert "compiler loaded: False" in text and "compiling: " not in text
    assert not any(path.is_file() for path in (tmp_path / "compiled").rglob("*"))
    assert log(tmp_path / "a") == log(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_same_command_twice_compiled(config, tmp_path, dtype):
    # at this size and two threads compiled code differs from run to run unless it is told not to
    size = ["--dim=128", "--ffn_dim=576", "--n_layers=1", "--seq_len=256", "--tokens_per_step=2048", "--max_steps=12"]
    size += ["--activation=xielu", f"--dtype={dtype}"]
    for name in "ab":
        assert "compiling: " in run(config, f"--out={tmp_path}/{name}", "--compile", *size, threads=2)
    assert log(tmp_path / "a") == log(tmp_path / "b")


def test_resume_of_a_finished_run_and_of_none(config, out, capsys):
    assert "resuming" not in here(config, "--resume")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "is finished: step 12 of 12" in here(config, "--resume")
    assert "already holds a run: add --resume to continue it" in error(capsys, config)
    assert "cannot change dim from 32 to 64" in error(capsys, config, "--resume", "--dim=64")
    assert "step 12, beyond max_steps=10" in error(capsys, config, "--resume", "--max_steps=10")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "ckpt.pt").unlink()
    here(config, "--resume")
    assert log(out)[0]["step"] == 0 and log(out)[-1]["step"] == 12


def test_resume_may_change_schedule_logging_and_micro_batches(config, out):
    here(config, "--lr=0.002")
    here(config, "--resume", "--max_steps=16", "--log_every=2", "--micro_batch_size=8", "--eval_every=8")
    steps = [(record["kind"], record["step"]) for record in log(out)]
    assert len(set(steps)) == len(steps)
    assert [step for kind, step in steps if kind == "train"] == [*range(1, 13), 14, 16]
    assert [step for kind, step in steps if kind == "val"] == [0, 5, 10, 12, 16]
    changed = json.loads((out / "config.json").read_text())["config"]
    assert changed["lr"] == 0.002 and changed["max_steps"] == 16
    expected = learning_rate(Config(**changed), 13)
    assert [record["lr"] for record in log(out) if record["step"] == 14] == [expected]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_give_the_losses_of_one(config, tmp_path, optimizer):
    """Whatever the micro-batches of either."""
    options, compiles = ["--activation=xielu", f"--optimizer={optimizer}"], optimizer == "adamw"
    here(config, f"--out={tmp_path}/one", "--micro_batch_size=8", *options)
    options += ["--micro_batch_size=1", f"--compile={compiles}"]
    output = run(config, f"--out={tmp_path}/two", *options, processes=2)
    assert output.count("compiling: ") == compiles and output.count("step 12/12  loss") == 1
    assert_same_losses(tmp_path / "two", tmp_path / "one", rel=1e-5)
    norms = [[record.get("grad_norm", 0) for record in log(tmp_path / name)] for name in ("two", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_ddp_never_holds_gradients_twice(monkeypatch):
    """From the first backward pass on, also where it is not yet exchanged, they lie in DDP's buckets."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(train, "WORLD", 2)
    config = Config(dim=48, n_heads=6, compile=False)
    try:
        model = Llama(config)
        trained = train.distribute(model)
        storages = {(held := weight.grad.untyped_storage()).data_ptr(): held for weight in model.parameters()}
        assert sum(storage.nbytes() for storage in storages.values()) == 4 * model.num_parameters()
        tokens = torch.randint(257, (1, 33))
        for trained.require_backward_grad_sync in (False, True):
            trained(tokens[:, :-1], tokens[:, 1:]).backward()
            assert {weight.grad.untyped_storage().data_ptr() for weight in model.parameters()} == set(storages)
        whole = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad(set_to_none=True)
        (2 * model(tokens[:, :-1], tokens[:, 1:])).backward()
        torch.testing.assert_close(whole, [weight.grad for weight in model.parameters()])
    finally:
        torch.distributed.barrier()  # a group that is destroyed while DDP still exchanges may hang
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("activation", ["swiglu", "xgelu", "xiep", "xaglu"])
def test_other_activations_train(config, out, activation):
    here(config, f"--activation={activation}", "--max_steps=7")
    records = log(out)
    assert records[-1]["loss"] < records[0]["loss"]
    assert ("alpha" in records[0]) == (activation in ("xgelu", "xaglu"))


# ------------------------------------------------------------------------------------------------ data


def test_data_without_meta(config, out, corpus, tmp_path):
    without_meta = shutil.copytree(corpus, tmp_path / "plain", ignore=shutil.ignore_patterns("meta.json"))
    assert here(config, f"--data={without_meta}", "--max_steps=7").count("no meta.json") == 1
    values = [record["bits_per_byte"] for record in log(out) if record["kind"] == "val"]
    assert values == [None] * 3


def write_with_a_bad_token(folder, bad):
    """A folder of data whose one bad token, in this split, is read by the second of two processes alone."""
    folder.mkdir()
    for split, last in {"train": 255, "val": 33 * 4 + 1}.items():
        tokens = np.random.default_rng(0).integers(256, size=32 * last + 1)
        write(folder / f"x_{split}_000000.bin", tokens)
        if split == bad:
            rows = Corpus(folder, split, 32, 256)
            row = rows.batch(42, 3, 8, rank=1, world=2)[2] if split == "train" else rows.sequence(5)
            place = next(n for n in range(len(tokens)) if np.array_equal(tokens[n : n + 33], row))
            tokens[place + 16] = 300
            write(folder / f"x_{split}_000000.bin", tokens)


def test_under_torchrun_the_first_process_speaks(config, tmp_path, monkeypatch, capsys):
    """About a mistake, and about a token beyond the vocabulary, which goes unnoticed until a batch holds it."""
    with monkeypatch.context() as patch:
        patch.setattr("plumbing.run.WORLD", 2)
        assert "use --tokens_per_step=256" in error(capsys, config, "--tokens_per_step=100")
    processes = {}
    for split, expected in {"train": 3, "val": 0}.items():
        write_with_a_bad_token(tmp_path / split, split)
        options, message = [config, f"--data={tmp_path}/{split}"], f"x_{split}_000000.bin holds token 300, beyond"
        assert f"{message} vocab_size=257" in error(capsys, *options, f"--out={tmp_path}/one_{split}")
        assert len([record for record in log(tmp_path / f"one_{split}") if record["kind"] == "train"]) == expected
        processes[message] = launch(*options, f"--out={tmp_path}/two_{split}", processes=2)
    for message, process in processes.items():
        output = "".join(process.communicate(timeout=300))
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        assert process.returncode == 1 and len(lines) == 1 and message in lines[0]
        assert output.count("Traceback") == 1  # torchrun's own, behind the line
        assert output.index(lines[0]) < output.index("Traceback")
        assert output.index(lines[0]) < output.index("ChildFailedError") and "exitcode  : 2" in output
