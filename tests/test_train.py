"""train.py: its config, its schedule, and whole runs of it, alone and under torchrun."""

import json
import math
import shutil
import signal
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

import train
from data import UserError, shard_header
from model import Llama, ModelConfig
from runs import ROOT, error, launch, log, run
from train import Config, check, learning_rate, make_optimizer, peak_flops, pick_dtype, read_config, resumed_config

# ------------------------------------------------------------------------------------------------ config


def test_defaults_file_and_command_line(tmp_path):
    (tmp_path / "parent_for_test.py").write_text("dim = 64\nlr = 1\nlog_every = 1e2\n")
    child = tmp_path / "child.py"
    child.write_text("import math\nfrom math import sqrt\nfrom configs.xielu_1b import *\nlr = 2\n_hidden = 3\n")
    from_file, options = read_config([str(child), "--dim=128", "--resume", "--compile=false", "--max_steps=1_000"])
    assert from_file.dim == 1536 and from_file.lr == 2.0 and isinstance(from_file.lr, float)
    assert from_file.out == "out/child"
    assert options == {"dim": 128, "resume": True, "compile": False, "max_steps": 1000}
    assert read_config([str(child), "--tokens_per_step=1e6"])[1] == {"tokens_per_step": 1_000_000}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dmi=3"], "unknown key 'dmi' on the command line: did you mean 'dim'"),
        (["--zzzzz=3"], "train.py --help lists all keys"),
        (["--dim=many"], "dim must be a whole number, not 'many'"),
        (["--dim=1.5"], "dim must be a whole number"),
        (["--dim"], "dim must be a whole number"),
        (["--dim="], "dim must be a whole number"),
        (["--dim=inf"], "dim must be a whole number"),
        (["--lr=nan"], "lr must be a number"),
        (["--compile=maybe"], "compile must be True or False"),
        (["--out"], "out must be text"),
        (["more.py"], "give one config file"),
    ],
)
def test_bad_command_lines(tmp_path, arguments, message):
    (tmp_path / "a.py").write_text("")
    with pytest.raises(UserError, match=message):
        read_config([str(tmp_path / "a.py"), *arguments])


@pytest.mark.parametrize(
    "text, message",
    [
        ("dmi = 3", "unknown key 'dmi' in .*a.py: did you mean 'dim'"),
        ("dim = '64x'", "dim must be a whole number"),
        ("dim = True", "dim must be a whole number"),
        ("resume = 1", "resume must be True or False"),
        ("activation = None", "activation must be text"),
        ("dim = ", "does not run: SyntaxError"),
        ("from configs.nothing import *", "does not run: ModuleNotFoundError"),
        ("raise SystemError", "does not run: SystemError"),
        ("exit(0)", "does not run: SystemExit: 0"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config([str(tmp_path / "a.py")])


def test_no_config():
    with pytest.raises(UserError, match="give one config file.*none"):
        read_config([])
    with pytest.raises(UserError, match="no config nowhere.py: there are configs/compare_cpu.py, configs/demo.py"):
        read_config(["nowhere.py"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens_per_step=100), "nearest tokens_per_step is 256$"),
        (dict(tokens_per_step=1000), "nearest tokens_per_step is 768 or 1024$"),
        (dict(tokens_per_step=384), "micro_batch_size may be 1, 2, 3, 6$"),
        (dict(activation="relu3"), "unknown activation 'relu3'"),
        (
            dict(activation="relu2", activation_memory="inverted"),
            "inverted' is for activation xielu alone, not 'relu2'",
        ),
        (dict(activation_memory="none"), "activation_memory must be one of standard, inverted"),
        (dict(activation="swiglu", ffn_dim=50), "nearest that does is 48 or 51"),
        (dict(warmup_steps=10), "warmup_steps=10 and decay_steps=4 do not fit into max_steps=12"),
        (dict(n_heads=3), "n_heads=3"),
        (dict(max_steps=0), "max_steps must be at least 1"),
        (dict(lr=-1.0), "lr must be at least 0, not -1.0"),
        (dict(beta2=1.0), "beta2 must be at least 0 and below 1, not 1.0"),
        (dict(dtype="float16"), "dtype must be one of auto, float32, bfloat16"),
        (dict(device="tpu"), "device must be one of"),
    ],
)
def test_values_that_make_no_run(config, change, message):
    values = train.asdict(read_config([str(config)])[0]) | change
    with pytest.raises(UserError, match=message):
        check(Config(**values), world=2 if "tokens_per_step" in change else 1)


def test_help_lists_every_key(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for item in fields(Config):
        assert f"--{item.name}={item.default} " in text and item.metadata["help"] in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configs(path):
    config, _ = read_config([str(path)])
    assert config.out == f"out/{path.stem}"
    worlds = {"3b": (1, 8, 64, 640), "1b": (1, 8, 88), "124m": (1, 2, 8, 32)}.get(path.stem.split("_")[-1], (1,))
    with torch.device("meta"):
        models = [Llama(check(config, world)) for world in worlds]
    activation = path.stem.split("_")[0]
    if path.stem not in ("demo", "compare_cpu"):
        assert config.activation == activation
    paper = {"1b": (1_132_537_344, 126.16e9), "3b": (3_020_048_384, 125.83e9)}.get(path.stem.split("_")[-1])
    if paper:
        parameters, tokens = paper
        assert models[0].num_parameters() == parameters + (2 * config.n_layers if activation == "xielu" else 0)
        assert config.max_steps * config.tokens_per_step == pytest.approx(tokens, rel=1e-4)
        assert config.max_steps - config.decay_steps == {"1b": 55500, "3b": 38000}[path.stem.split("_")[-1]]


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


def test_everything_decays_but_the_activation_scalars():
    model = Llama(ModelConfig(dim=32, n_layers=3, n_heads=2, n_kv_heads=2, ffn_dim=48))
    decayed, scalars = make_optimizer(model, Config(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and scalars["weight_decay"] == 0.0
    assert len(scalars["params"]) == 6 and all(scalar.shape == (1,) for scalar in scalars["params"])
    assert len(decayed["params"]) + 6 == len(list(model.parameters()))
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.95), 1e-8)


def test_auto_dtype(monkeypatch):
    for amx, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert pick_dtype("auto", torch.device("cpu")) == expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert pick_dtype("auto", torch.device("cuda")) == expected
    assert pick_dtype("auto", torch.device("mps")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_auto_says_what_it_takes(config, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    options = ["--dtype=auto", "--max_steps=1", "--warmup_steps=0", "--decay_steps=0"]
    assert train.main([str(config), *options]) == 0
    assert "dtype=auto takes float32: cpu does not compute in bf16" in capsys.readouterr().out


def test_peaks(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Other": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_resumed_config():
    then = Config(max_steps=10, dim=64)
    saved = {"config": train.asdict(then) | {"lr": 0.5}, "from_file": train.asdict(then)}
    assert resumed_config(saved, then, {}).lr == 0.5  # given on the first command line, not on this one
    assert resumed_config(saved, then, {"lr": 0.1}).lr == 0.1
    longer = Config(max_steps=20, dim=64)
    assert resumed_config(saved, longer, {}).max_steps == 20  # the file has changed since
    assert resumed_config(saved, longer, {"max_steps": 30}).max_steps == 30
    with pytest.raises(UserError, match="cannot change dim from 64 to 32"):
        resumed_config(saved, Config(max_steps=10, dim=32), {})
    for name in ("activation", "seed", "data", "seq_len", "tokens_per_step"):
        changed = {"activation": "relu2", "data": "elsewhere"}.get(name, 7)
        with pytest.raises(UserError, match=f"cannot change {name} "):
            resumed_config(saved, then, {name: changed})


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_and_what_it_leaves(config, tmp_path):
    output = run(config, "--activation=xielu")
    out = tmp_path / "out" / "tiny"
    assert sorted(path.name for path in out.iterdir()) == ["ckpt.pt", "config.json", "lock", "log.jsonl"]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    training = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "val"]
    assert [record["step"] for record in training] == list(range(1, 13))
    assert [record["step"] for record in validation] == [0, 5, 10, 12]
    keys = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "seconds"}
    resolved = read_config([str(config)])[0]
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
    assert validation[0]["alpha_p"] == pytest.approx([0.8, 0.8])
    saved = json.loads((out / "config.json").read_text())
    assert set(saved) == {"config", "formula", "versions", "device", "commit"}
    assert set(saved["config"]) == {item.name for item in fields(Config)} and saved["config"]["dim"] == 32
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 12 and not any("_orig_mod" in name for name in checkpoint["model"])
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=48, seq_len=32))
    model.load_state_dict(checkpoint["model"])
    assert "step 12/12  loss" in output and "step 12/12  val loss" in output and "eta" in output


def test_the_validation_loss_is_the_mean_over_its_tokens(config, tmp_path, corpus):
    run(config, "--activation=xielu", "--eval_tokens=777")
    checkpoint = torch.load(tmp_path / "out/tiny/ckpt.pt", weights_only=True)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=48, seq_len=32))
    model.load_state_dict(checkpoint["model"])
    stream = torch.from_numpy(np.fromfile(next(corpus.glob("*_val_*")), "<u2", 778, offset=1024).astype(np.int64))
    losses = []
    for start in range(0, 777, 32):
        span = stream[start : min(start + 33, 778)][None]
        losses.append(model(span[:, :-1], span[:, 1:], reduction="sum").item())
    assert log(tmp_path / "out/tiny")[-1]["loss"] == pytest.approx(sum(losses) / 777, rel=1e-6)


def test_the_same_command_twice(config, tmp_path):
    run(config, f"--out={tmp_path}/a")
    run(config, f"--out={tmp_path}/b")
    assert log(tmp_path / "a") == log(tmp_path / "b")
    run(config, f"--out={tmp_path}/c", "--seed=43")
    assert log(tmp_path / "a") != log(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_same_command_twice_compiled(config, tmp_path, dtype):
    # at this size and two threads compiled code differs from run to run unless it is told not to
    size = ["--dim=128", "--ffn_dim=576", "--n_layers=1", "--seq_len=256", "--tokens_per_step=2048", "--max_steps=12"]
    size += ["--activation=xielu"]
    for name in "ab":
        run(config, f"--out={tmp_path}/{name}", "--compile", f"--dtype={dtype}", *size, threads=2)
    assert log(tmp_path / "a") == log(tmp_path / "b")
    run(config, f"--out={tmp_path}/eager", f"--dtype={dtype}", *size, threads=2)
    for compiled, eager in zip(log(tmp_path / "a"), log(tmp_path / "eager")):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-2 if dtype == "bfloat16" else 1e-4)


def test_kill_and_resume_give_the_losses_of_the_run_that_was_never_stopped(config, tmp_path):
    options = ["--max_steps=150", "--checkpoint_every=10", "--eval_every=25", "--activation=xsilu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(config, *options, f"--out={whole}")
    process = launch(config, *options, f"--out={killed}")
    while not (killed / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(killed / "log.jsonl", "a") as file:
        file.write('[]\n"x"\n{"kind": "val"}\n{"kind": "train", "step": 149, "lo')  # torn by the kill
    assert "resuming" in run(config, *options, f"--out={killed}", "--resume")
    assert log(killed) == log(whole)
    ends = [torch.load(out / "ckpt.pt", weights_only=True)["model"] for out in (whole, killed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resume_of_a_finished_run_and_of_none(config, tmp_path, capsys):
    out = tmp_path / "out" / "tiny"
    assert "resuming" not in run(config, "--resume")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "is finished: step 12 of 12" in run(config, "--resume")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert "already holds a run: continue it with --resume" in error(capsys, config)
    assert "cannot change dim from 32 to 64" in error(capsys, config, "--resume", "--dim=64")
    assert "cannot change seed" in error(capsys, config, "--resume", "--seed=1")
    assert "step 12, beyond max_steps=10" in error(capsys, config, "--resume", "--max_steps=10")
    config.write_text(config.read_text().replace("n_layers = 2", "n_layers = 3"))
    assert "cannot change n_layers from 2 to 3" in error(capsys, config, "--resume")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "ckpt.pt").unlink()
    config.write_text(config.read_text().replace("n_layers = 3", "n_layers = 2"))
    run(config, "--resume")
    assert log(out) == [json.loads(json.dumps(record)) for record in log(out)] and log(out)[0]["step"] == 0


def test_resume_may_change_schedule_logging_and_micro_batches(config, tmp_path):
    out = tmp_path / "out" / "tiny"
    run(config, "--activation=relu2", "--lr=0.002")
    run(config, "--resume", "--max_steps=16", "--log_every=2", "--micro_batch_size=8", "--eval_every=8")
    steps = [(record["kind"], record["step"]) for record in log(out)]
    assert len(set(steps)) == len(steps)
    assert [step for kind, step in steps if kind == "train"] == [*range(1, 13), 14, 16]
    assert [step for kind, step in steps if kind == "val"] == [0, 5, 10, 12, 16]
    assert json.loads((out / "config.json").read_text())["config"]["lr"] == 0.002
    changed = read_config([str(config), "--max_steps=16"])
    expected = learning_rate(train.replace(changed[0], lr=0.002, max_steps=16), 13)
    assert [record["lr"] for record in log(out) if record["step"] == 14] == [expected]


@pytest.mark.slow
def test_resume_may_change_the_memory_of_the_activation(config, tmp_path):
    out, other = tmp_path / "out" / "tiny", tmp_path / "other"
    # batches of one shape, one compilation
    options = ["--activation=xielu", "--eval_tokens=1024", "--eval_every=12"]
    run(config, "--max_steps=8", *options)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    for saved in ("config", "from_file"):  # as in a checkpoint from before the key
        del checkpoint[saved]["activation_memory"]
    torch.save(checkpoint, out / "ckpt.pt")
    shutil.copytree(out, other)
    run(config, "--resume", "--max_steps=12", *options)
    run(config, "--resume", "--max_steps=12", *options, f"--out={other}", "--activation_memory=inverted")
    for folder, memory in ((out, "standard"), (other, "inverted")):
        assert json.loads((folder / "config.json").read_text())["config"]["activation_memory"] == memory
    assert log(out)[-1]["step"] == 12
    for standard, inverted in zip(log(out), log(other), strict=True):
        assert inverted["loss"] == pytest.approx(standard["loss"], rel=1e-4)


def test_two_processes_give_the_losses_of_one(config, tmp_path):
    run(config, f"--out={tmp_path}/one", "--micro_batch_size=2", "--activation=xsilu")
    output = run(config, f"--out={tmp_path}/two", "--micro_batch_size=2", "--activation=xsilu", processes=2)
    assert output.count("step 12/12  loss") == 1
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two)
    for single, double in zip(one, two):
        assert (single["kind"], single["step"], single["tokens"]) == (double["kind"], double["step"], double["tokens"])
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-5)
        if single["kind"] == "train":
            assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    # and the run can go on with another number of processes
    run(config, f"--out={tmp_path}/two", "--resume", "--max_steps=14", "--micro_batch_size=4")
    assert log(tmp_path / "two")[-1]["step"] == 14


def test_micro_batches_do_not_change_the_losses(config, tmp_path):
    for size in (1, 8):
        run(config, f"--out={tmp_path}/{size}", f"--micro_batch_size={size}", "--activation=relu2")
    for small, large in zip(log(tmp_path / "1"), log(tmp_path / "8")):
        assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)


def test_two_processes_compiled(config, tmp_path):
    run(config, f"--out={tmp_path}/one", "--max_steps=7", "--activation=xielu")
    run(config, f"--out={tmp_path}/two", "--max_steps=7", "--activation=xielu", "--compile", processes=2)
    for single, double in zip(log(tmp_path / "one"), log(tmp_path / "two")):
        assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "xgelu", "xiep", "xaglu"])
def test_other_activations_train(config, tmp_path, activation):
    run(config, f"--activation={activation}", "--max_steps=7")
    records = log(tmp_path / "out" / "tiny")
    assert records[-1]["loss"] < records[0]["loss"]
    assert ("alpha" in records[0]) == (activation in ("xgelu", "xaglu"))


# ------------------------------------------------------------------------------------------------ mistakes


def test_the_paper_run_without_its_data():
    output = run("configs/xielu_1b.py", status=2, cwd=ROOT)
    lines = output.splitlines()
    assert lines[-1].startswith("error: there is no data folder data/fineweb-edu-tekken")
    assert "Traceback" not in output and "1,132,537,392 parameters" in output


def test_missing_and_damaged_data(config, tmp_path, corpus, capsys):
    assert "no data folder" in error(capsys, config, f"--data={tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "has no train shards" in error(capsys, config, f"--data={tmp_path}/empty")
    for name, change in {
        "is damaged: its header says": lambda raw: raw[:-7],
        "its magic number is 0": lambda raw: bytes(4) + raw[4:],
        "shorter than the header": lambda raw: b"",
    }.items():
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(corpus, tmp_path / "bad")
        path = next((tmp_path / "bad").glob("*train*"))
        path.write_bytes(change(path.read_bytes()))
        assert name in error(capsys, config, f"--data={tmp_path}/bad")
    assert not (tmp_path / "out").exists()


def test_tokens_beyond_the_vocabulary(config, tmp_path, corpus, capsys):
    assert "bytes (257 ids), more than vocab_size=200" in error(capsys, config, "--vocab_size=200")
    shutil.copytree(corpus, tmp_path / "plain")
    (tmp_path / "plain" / "meta.json").unlink()
    assert "holds token 256, beyond vocab_size=256" in error(
        capsys, config, f"--data={tmp_path}/plain", "--vocab_size=256", "--tokens_per_step=4096"
    )


def test_tokens_beyond_the_vocabulary_under_torchrun(config, tmp_path, corpus):
    shutil.copytree(corpus, tmp_path / "plain")
    (tmp_path / "plain" / "meta.json").unlink()
    options = [f"--data={tmp_path}/plain", "--vocab_size=256", "--activation=relu2", "--max_steps=900"]
    output = run(config, *options, processes=2, status=1)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "holds token 256" in lines[0]
    assert output.count("Traceback") == 1  # torchrun's own, behind the line
    assert output.index(lines[0]) < output.index("Traceback")


def test_data_without_meta(config, tmp_path, corpus):
    shutil.copytree(corpus, tmp_path / "plain")
    (tmp_path / "plain" / "meta.json").unlink()
    output = run(config, f"--data={tmp_path}/plain", "--max_steps=7")
    assert output.count("no meta.json") == 1
    values = [record["bits_per_byte"] for record in log(tmp_path / "out" / "tiny") if record["kind"] == "val"]
    assert values == [None] * 3


def test_too_short_a_corpus(config, tmp_path, capsys):
    folder = tmp_path / "short"
    folder.mkdir()
    for split in ("val", "train"):
        (folder / f"a_{split}_000000.bin").write_bytes(shard_header(np.dtype("<u2"), 32) + bytes(64))
    assert "too short for one sequence of 32 tokens" in error(capsys, config, f"--data={folder}")


def test_a_checkpoint_that_cannot_be_read(config, tmp_path, capsys):
    run(config, "--max_steps=7", "--activation=relu2")
    path = tmp_path / "out" / "tiny" / "ckpt.pt"
    good, log_before = path.read_bytes(), log(path.parent)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (good[:1000], b"", bytes(flipped)):
        path.write_bytes(bad)
        assert "ckpt.pt cannot be read" in error(capsys, config, "--resume", "--activation=relu2")
    for foreign in ({}, [1], {"model": {}, "step": 3}):
        torch.save(foreign, path)
        assert "ckpt.pt cannot be read" in error(capsys, config, "--resume", "--activation=relu2")
    assert log(path.parent) == log_before


def test_folders_that_cannot_be_used(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in error(capsys, config, f"--out={tmp_path}/file/x")
    assert "no data folder" in error(capsys, config, f"--data={tmp_path}/a\nb")


def test_under_torchrun_the_first_process_speaks(config):
    output = run(config, "--tokens_per_step=100", processes=2, status=1)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "tokens_per_step=100 does not divide" in lines[0]
    assert output.index(lines[0]) < output.index("ChildFailedError") and "exitcode  : 2" in output
