"""tools/bench.py: what it counts is right, and every figure is there. No speed is asserted."""

import json

import pytest
import torch

import train
from config import Config
from model import Llama
from runs import settings_restored
from tools import bench

MODEL = "--dim=32 --n_layers=2 --n_heads=2 --n_kv_heads=2 --ffn_dim=48 --vocab_size=64 --seq_len=32".split()
RUN = "--tokens_per_step=128 --micro_batch_size=2 --compile=False --rounds=1".split()


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
    assert memory["optimizer (two float32 moments)"] == 8 * 1_132_537_392
    # 70000 steps of 1,802,240 tokens at 8.6 GFLOP on 8 × 40 % of 989 TFLOP/s
    assert plan["hours"] == pytest.approx(70000 * 1802240 * plan["flops_per_token"] / (8 * 0.4 * 989e12) / 3600)
    assert plan["hours"] == pytest.approx(95, abs=1)
    assert sum(memory.values()) < 80e9
    in_all = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("in all"))
    assert float(in_all.split()[-1]) == pytest.approx(sum(memory.values()) / 2**30, abs=0.01)
    more = run(tmp_path, "plan", "configs/xielu_1b.py", "--gpus=88", "--mfu=0.4")
    assert more["hours"] == pytest.approx(plan["hours"] / 11)


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
    train.set_memory_budget(1.0)


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
    train.set_memory_budget(1.0)


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
        result = run(tmp_path, "kernel", "--device=cpu", "--tokens=8", "--rounds=1")
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        rows = result["dtypes"][dtype]["activations"]
        assert set(rows) == set(bench.CANDIDATES) and set(result["dtypes"][dtype]["ratios"]) == set(bench.RATIOS)
        assert all(row["forward_ms"] > 0 for row in rows.values())
        check_kept(rows, itemsize)
    assert result["about"]["torch"] == str(torch.__version__)
    assert "fused / relu2" in capsys.readouterr().out


def test_compiled_activations():
    rows = bench.measure_activations(torch.device("cpu"), torch.bfloat16, tokens=8, rounds=1)["activations"]
    check_kept(rows, itemsize=2)
    assert rows["xielu reference, compiled"]["bytes_kept_per_element"] == pytest.approx(2, abs=0.01)


def test_step(tmp_path, capsys):
    result = run(tmp_path, "step", "configs/demo.py", *MODEL, *RUN, "--activation=xielu,swiglu")
    rows = result["activations"]
    assert set(rows) == {"xielu", "swiglu"}
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(128 / row["step_s"])
        assert row["mfu"] is None
        parts = {"matmul", "attention", "clipping and optimizer", "aten::_log_softmax", "outside ops"}
        assert parts < set(row["parts_s"]) and all(row["parts_s"][part] > 0 for part in parts)
    assert "aten::where" in rows["xielu"]["parts_s"] and "aten::where" not in rows["swiglu"]["parts_s"]
    assert result["tokens_per_s_over_first"]["xielu"] == 1
    assert "tokens per second over those of xielu" in capsys.readouterr().out


def test_the_parts_add_up_and_have_names(monkeypatch):
    lasted = []
    measured = bench.seconds
    monkeypatch.setattr(bench, "seconds", lambda *job: lasted.append(measured(*job)) or lasted[-1])
    x = torch.randn(64, 64)
    with torch._inductor.config.patch("cpp.enable_kernel_profile", True):
        waves = torch.compile(lambda x: x.sin() + x.exp())
        waves(x)
        parts = bench.time_by_part(lambda: waves(x @ x).sqrt(), torch.device("cpu"), rounds=3)
    assert {"matmul", "cpp_fused_add_exp_sin", "calling compiled code", "aten::sqrt"} <= parts.keys()
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    assert len(lasted) == 3 and parts.total() == pytest.approx(sum(lasted) / 3)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "kernel, step, plan"),
        ("kernels", "kernel, step, plan"),
        ("kernel --round=3", "unknown option --round=3"),
        ("kernel --rounds=many", "--rounds: must be a whole number of at least 1, not 'many'"),
        ("kernel --tokens=-1", "at least 1"),
        ("kernel --device=tpu", "device=tpu is not available here"),
        ("step", "give one config file"),
        ("step configs/demo.py --activation=swigul", "did you mean 'swiglu'"),
        ("plan configs/xielu_1b.py --gpu=H1000", "--gpu: invalid choice: 'H1000'"),
        ("plan configs/xielu_1b.py --gpus=7", "does not divide"),
        ("plan configs/xielu_1b.py --mfu=40", "mfu must be above 0"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert bench.main(argv.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
