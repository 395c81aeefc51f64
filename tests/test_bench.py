"""tools/bench.py: what it counts is right, and every figure is there. No speed is asserted."""

import os
import subprocess
import sys

import pytest
import torch

import train
from model import Llama
from runs import ROOT, error, settings_restored
from tools import bench
from train import Config

MODEL = "--dim=32 --n_layers=2 --n_heads=2 --n_kv_heads=2 --ffn_dim=48 --vocab_size=64 --seq_len=32".split()


def run(capsys, *argv):
    """{name of a row: its cells} of what a bench prints that must succeed."""
    with settings_restored():
        assert bench.main([*argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:31].strip(): line[31:].replace(",", "").split() for line in lines}


def test_plan_of_the_paper(capsys, monkeypatch):
    plan = run(capsys, "plan", "--gpus=8", "--mfu=0.4")
    assert plan["weights (float32)"] == plan["gradients (float32)"] == ["4.22"]  # 4 bytes × 1,132,537,392
    assert plan["optimizer (float32 moments)"] == ["8.44"]
    parts = [float(row[0]) for row in list(plan.values())[-7:-2]]  # the five above "in all" and the hours
    assert float(plan["in all"][0]) == pytest.approx(sum(parts), abs=0.03) and sum(parts) * 2**30 < 80e9
    # 70000 steps of 1,802,240 tokens at 8.6 GFLOP on 8 × 40 % of 989 TFLOP/s
    assert "95.3 hours at 40% of 8 × 989 TF" in plan
    monkeypatch.setattr(bench, "kept_by_layer", lambda *_: 0)  # takes seconds
    assert "8.7 hours at 40% of 88 × 989 TF" in run(capsys, "plan", "--gpus=88", "--mfu=0.4")


def test_a_config_that_imports_another_where_a_package_is_called_configs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").touch()
    code = "import runpy; print(runpy.run_path('configs/xielu_3b.py')['dim'])"  # as Config.read_file does
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "2048", result.stderr


def test_memory_of_an_optimizer():
    """The plan against what the optimizers hold after a step."""
    for optimizer in ("adamw", "muon"):
        config = layer_config("xielu", optimizer=optimizer)
        model = Llama(config)
        optimizers = train.make_optimizers(model, config)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        train.update(optimizers, 0.1)
        states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
        held = sum(moment.nbytes for state in states for moment in state if moment.ndim)
        assert bench.memory_of(model)["optimizer (float32 moments)"] == held


def layer_config(activation, **keys):
    """A length at which the CPU's attention is the fused kernel, as a GPU's is, and more tokens than weights."""
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 4, "ffn_dim": 384, "seq_len": 512, "micro_batch_size": 2}
    return Config(**({"activation": activation, "n_kv_heads": 4, "tokens_per_step": 1024} | sizes | keys))


@pytest.mark.parametrize(
    "activation, keys", [("xielu", {"n_kv_heads": 2}), ("xielu_inverted", {}), ("swiglu", {"memory_budget": 0.5})]
)
def test_plan_counts_what_a_compiled_layer_keeps(activation, keys):
    """Against autograd's own count of the layer that is trained."""
    config = layer_config(activation, **keys)
    model = Llama(config)
    block = model.layers[0]
    x = torch.randn(2, 512, 64).bfloat16().requires_grad_()
    expected = bench.kept_by_layer(config, torch.bfloat16)
    torch._dynamo.reset()
    block.compile(dynamic=False)
    own = [model.cos, model.sin, *block.parameters()]
    assert bench.bytes_kept(block, [x, model.cos, model.sin], without=own) == pytest.approx(expected, rel=0.02)
    torch._functorch.config.activation_memory_budget = 1.0


@pytest.mark.parametrize("activation", ["xielu", "swiglu"])
def test_memory_budget(activation):
    """Bytes per token that a layer keeps, in tensors of the width of the model (1) and of the MLP (6, or gated 4)."""
    in_widths = {}
    for budget in (1.0, 0.9, 0.5, 0.0):
        kept = bench.kept_by_layer(layer_config(activation, memory_budget=budget), torch.bfloat16)
        in_widths[budget] = kept / (2 * 512 * 64 * 2)
    wide = 4 if activation == "swiglu" else 6
    assert in_widths[1.0] - in_widths[0.9] >= wide
    assert in_widths[0.9] > in_widths[0.5] > in_widths[0.0] == 1  # at 0, the layer's input is all
    torch._functorch.config.activation_memory_budget = 1.0


def test_bytes_kept_counts_each_memory_once():
    x = torch.randn(8, 8, requires_grad=True)
    kept = bench.bytes_kept(lambda x: x.exp() * x.view(-1).view(8, 8), [x])
    assert kept == 2 * 64 * 4  # x once, and exp(x)


def test_kernel(capsys):
    """Each activation has its times, and what it keeps in bfloat16: fused its input alone, as relu² does; inverted its
    output and a bit; the reference more, unless it is compiled."""
    sizes = ["--ffn_dim=9216", "--micro_batch_size=1", "--seq_len=8"]
    rows = run(capsys, "kernel", *sizes, "--device=cpu", "--seconds=0")
    kept = {name: float(rows[name][-1]) for name in bench.ALONE}
    assert all(float(rows[name][0]) > 0 for name in bench.ALONE) and rows["relu2 compiled"][4] == "1.00"
    assert kept.pop("xielu_reference") > 4 * 2
    assert kept.pop("xielu_inverted") == pytest.approx(2 + 1 / 8, abs=0.01)
    assert all(size == pytest.approx(2, abs=0.01) for size in kept.values())


def test_step(monkeypatch, capsys):
    """A micro-batch of 64 tokens that takes 2 s, and an update of 1 s: eight of them, and one update, are a step."""
    times = {"micro-batch": 2.0, "update": 1.0, "matmul": 1e-6}

    def medians(jobs, *_):
        for job in jobs.values():
            job()
        return {name: times[name] for name in jobs}

    monkeypatch.setattr(bench, "medians", medians)
    keys = [*MODEL, "--micro_batch_size=2", "--tokens_per_step=512", "--device=cpu", "--compile=False"]
    rows = run(capsys, "step", *keys)
    assert rows["micro-batch, ms"] == ["2000.00"] and rows["update, ms"] == ["1000.00"]
    assert rows["tokens per second"] == ["32.00"] and rows["tokens/s, 8 per update"] == [f"{512 / 17:.2f}"]
    rate = 2 * 64 * 32 * 48 / 1e-6
    flops = Llama(Config(**Config.typed(dict(key[2:].split("=") for key in keys), "here"))).flops_per_token() * 64 / 2
    assert rows["matmul rate, TFLOP/s"] == [f"{rate / 1e12:.2f}"]
    assert rows["share of the matmul rate, %"] == [f"{100 * flops / rate:.2f}"]
    assert rows["MFU, %"] == rows["peak memory, GiB"] == ["-"]  # on a CPU
    assert any(name.startswith("Self CPU time total") for name in rows)  # the profile


GPU_PARTS = ["large-xielu", "large-relu2", "large-swiglu", "kernel", "layer-xielu", "layer-relu2", "layer-swiglu"]
GPU_PARTS += ["small-xielu", "small-relu2", "small-swiglu", "small-deterministic"]
GPU_PARTS += ["train-xielu", "train-relu2", "train-swiglu"]


def test_gpu_script(tmp_path):
    """The script with a python that only notes how it is called, and fails once: every part has a command that exists,
    and what has failed is all that runs again."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f"""#!/bin/sh
[ "$1" = - ] || echo "$@" >> {tmp_path}/calls
case "$*" in *kernel*) [ -e {tmp_path}/failed ] || {{ touch {tmp_path}/failed; exit 3; }} ;; esac
""")
    python.chmod(0o755)

    def script(*keys, status, **environment):
        environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "OUT": f"{tmp_path}/out"}
        (tmp_path / "calls").write_text("")
        command = ["bash", str(ROOT / "tools/gpu.sh"), *keys]
        result = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == status, result.stdout + result.stderr
        return [line.split() for line in (tmp_path / "calls").read_text().splitlines()], result.stdout

    calls, text = script(status=1, LIMIT="19")
    assert not calls and all(f"no time left for {name}" in text for name in GPU_PARTS)
    calls, text = script("--lr=1e-4", status=1)
    assert "kernel: exit status 3" in text and {path.stem for path in tmp_path.glob("out/*.txt")} >= set(GPU_PARTS)
    for program, *words in calls:
        if program == "train.py":
            values, options = Config.read_command(words)
            Config(**(values | options)).check_batch(1)
        else:
            options, config = bench.read_options(words[1:])
            assert config.lr == 1e-4
    calls, text = script("--lr=1e-4", status=0)
    assert [words[2] for words in calls] == ["kernel"] and "all parts have finished" in text


MISTAKES = [
    ("kernels", "invalid choice: 'kernels'"),
    ("kernel --round=3", "unknown key 'round'"),
    ("step configs/demo.py --tokens_per_step=100", "tokens_per_step=100 does not divide"),
    ("plan configs/xielu_1b.py --gpu=H1000", "--gpu: invalid choice: 'H1000'"),
    ("plan configs/xielu_1b.py --gpus=7", "does not divide"),
    ("plan configs/xielu_1b.py --gpus=0.5", "--gpus: must be a whole number of at least 1, not '0.5'"),
    ("plan configs/xielu_1b.py --mfu=40", "mfu must be above 0"),
]


@pytest.mark.parametrize("argv, message", MISTAKES)
def test_mistakes(argv, message, capsys):
    assert message in error(capsys, *argv.split(), main=bench.main)
