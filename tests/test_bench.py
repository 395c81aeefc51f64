"""tools/bench.py: what it counts is right, and every figure is there. No speed is asserted."""

import json
import os
import subprocess
import sys

import pytest
import torch

import train
from model import Llama
from runs import ROOT, settings_restored
from tools import bench
from train import Config

MODEL = "--dim=32 --n_layers=2 --n_heads=2 --n_kv_heads=2 --ffn_dim=48 --vocab_size=64 --seq_len=32".split()


def run(tmp_path, *argv):
    """The figures of a bench that must succeed."""
    path = tmp_path / "deep" / "figures.json"
    with settings_restored():
        assert bench.main([*argv, f"--json={path}"]) == 0
    return json.loads(path.read_text())


def test_plan_of_the_paper(tmp_path, capsys):
    plan = run(tmp_path, "plan", "configs/xielu_1b.py", "--gpus=8", "--mfu=0.4")
    memory = plan["memory_bytes"]
    assert plan["parameters"] == 1_132_537_392
    assert memory["weights (float32)"] == 4 * 1_132_537_392
    assert memory["optimizer (float32 moments)"] == 8 * 1_132_537_392
    # 70000 steps of 1,802,240 tokens at 8.6 GFLOP on 8 × 40 % of 989 TFLOP/s
    assert plan["hours"] == pytest.approx(70000 * 1802240 * plan["flops_per_token"] / (8 * 0.4 * 989e12) / 3600)
    assert plan["hours"] == pytest.approx(95, abs=1)
    assert sum(memory.values()) < 80e9
    in_all = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("in all"))
    assert float(in_all.split()[-1]) == pytest.approx(sum(memory.values()) / 2**30, abs=0.01)
    more = run(tmp_path, "plan", "configs/xielu_1b.py", "--gpus=88", "--mfu=0.4")
    assert more["hours"] == pytest.approx(plan["hours"] / 11)


def test_a_config_that_imports_another_where_a_package_is_called_configs(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").touch()
    code = "from train import Config; print(Config(**Config.read_file('configs/xielu_3b.py')).dim)"
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
    """Against autograd's own count of the layer that is trained, whose gradients do not depend on the budget."""
    config = layer_config(activation, **keys)
    model = Llama(config)
    block = model.layers[0]
    x = torch.randn(2, 512, 64).bfloat16().requires_grad_()
    block(x, model.cos, model.sin).sum().backward()
    eager = x.grad.clone()
    expected = bench.kept_by_layer(config, torch.bfloat16)
    torch._dynamo.reset()
    block.compile(dynamic=False)
    own = [model.cos, model.sin, *block.parameters()]
    assert bench.bytes_kept(block, [x, model.cos, model.sin], without=own) == pytest.approx(expected, rel=0.02)
    x.grad = None
    block(x, model.cos, model.sin).sum().backward()
    assert (x.grad - eager).norm() < 0.02 * eager.norm()
    torch._functorch.config.activation_memory_budget = 1.0


@pytest.mark.parametrize("activation", ["xielu", "relu2", "swiglu"])
def test_memory_budget(activation):
    """Bytes per token that a layer keeps, in tensors of the width of the model (1) and of the MLP (6, or gated 4)."""
    budgets = {
        budget: bench.kept_by_layer(layer_config(activation, memory_budget=budget), torch.bfloat16)
        for budget in (1.0, 0.9, 0.5, 0.0)
    }
    in_widths = {budget: kept / (2 * 512 * 64 * 2) for budget, kept in budgets.items()}
    wide = 4 if activation == "swiglu" else 6
    assert in_widths[1.0] - in_widths[0.9] >= wide
    assert in_widths[0.9] > in_widths[0.5] > in_widths[0.0] == 1  # at 0, the layer's input is all
    torch._functorch.config.activation_memory_budget = 1.0


def test_bytes_kept_counts_each_memory_once():
    x = torch.randn(8, 8, requires_grad=True)
    kept = bench.bytes_kept(lambda x: x.exp() * x.view(-1).view(8, 8), [x])
    assert kept == 2 * 64 * 4  # x once, and exp(x)


def check_kept(rows, itemsize):
    """fused keeps its input alone, and so does relu²; inverted its output and a bit; the reference more."""
    kept = {name: row["bytes_kept_per_element"] for name, row in rows.items()}
    assert kept["xielu fused"] == pytest.approx(itemsize, abs=0.01)
    assert kept["relu2, compiled"] == pytest.approx(itemsize, abs=0.01)
    assert kept["xielu inverted"] == pytest.approx(itemsize + 1 / 8, abs=0.01)
    assert kept["xielu reference, eager"] > 4 * itemsize


def test_kernel(tmp_path, capsys):
    with torch.compiler.set_stance("force_eager"):  # compiling all of it takes most of a minute
        result = run(tmp_path, "kernel", *MODEL, "--device=cpu", "--tokens=80", "--rounds=1")
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        figures = result["dtypes"][dtype]
        assert set(figures["activations"]) == set(bench.CANDIDATES)
        assert all(row["forward_ms"] > 0 for row in figures["activations"].values())
        assert figures["activations"]["relu2, compiled"]["both_over_relu2"] == 1
        check_kept(figures["activations"], itemsize)
        layers = figures["layers"]
        assert list(layers) == ["xielu", "relu2", "swiglu"] and layers["relu2"]["over_relu2_ms"] == 0
        for row in layers.values():
            assert row["forward_ms"] > 0
            # 20 tokens, a quarter; what is not a whole sequence of them does not count
            moved = row["over_relu2_ms"] / 1e3 * figures["copy_gb_per_s"] * 1e9
            assert row["over_relu2_bytes_per_element"] == pytest.approx(moved / (20 * 48))
    assert result["about"]["torch"] == str(torch.__version__) and result["width"] == 48
    assert "bfloat16, inside a layer, 20 × 32" in capsys.readouterr().out


def test_compiled_activations():
    rows = bench.measure_activations(torch.device("cpu"), torch.bfloat16, 8, 9216, rounds=1)["activations"]
    check_kept(rows, itemsize=2)
    assert rows["xielu reference, compiled"]["bytes_kept_per_element"] == pytest.approx(2, abs=0.01)


def test_layers_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(Llama, "compile_parts", lambda model: compiled.append(model.config.activation))
    bench.measure_layers(torch.device("cpu"), torch.float32, 8, layer_config("relu2"), rounds=1, bytes_per_s=1e9)
    assert compiled == ["xielu", "relu2", "swiglu"]


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    """Between two events are many calls, and before the first one, the call that keeps the device busy."""
    called, marks = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.calls = len(called)
            marks.append(self.calls)

        def synchronize(self):
            marks.append("synchronized")

        def elapsed_time(self, end):
            return 0.5 * (end.calls - self.calls)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    took = bench.device_seconds(lambda: called.append(1), torch.device("cuda"), once=0.001)
    assert took == pytest.approx(0.0005) and marks == [1, 21, "synchronized"]
    assert bench.device_seconds(lambda: called.append(1), torch.device("cuda"), once=10) > 0 and len(called) == 21 + 4


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "kernel, plan"),
        ("kernels", "kernel, plan"),
        ("kernel --round=3", "unknown key 'round'"),
        ("kernel --json=tests", "--json=tests is not a file: name one, such as out/bench/kernel.json"),
        ("kernel --rounds=many", "--rounds: must be a whole number of at least 1, not 'many'"),
        ("kernel --tokens=-1", "at least 1"),
        ("kernel --device=tpu", "device must be one of auto, cpu, cuda, mps"),
        ("plan configs/xielu_1b.py --gpu=H1000", "--gpu: invalid choice: 'H1000'"),
        ("plan configs/xielu_1b.py --gpus=7", "does not divide"),
        ("plan configs/xielu_1b.py --mfu=40", "mfu must be above 0"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert bench.main(argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
