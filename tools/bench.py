"""Speed and memory, measured here:  python -m tools.bench kernel | step | plan …

    python -m tools.bench kernel                                          the activations alone
    python -m tools.bench step configs/demo.py --activation=xielu,relu2   a whole training step, and its ops
    python -m tools.bench plan configs/xielu_1b.py --gpus=8               memory and hours, without a GPU

All candidates are measured in one run, in turns, after a warm-up; each time is the median of the rounds. `step` builds
and runs the model as train.py does, on random tokens. Besides --KEY=VALUE of train.py (`step`, `plan`), there are

    --rounds=10           turns that each candidate gets; default 10 for kernel, 5 for step
    --tokens=20480        (kernel) rows of 9216; default 20480 on a GPU, 1820 on a CPU: 16.8 million elements
    --device=auto         (kernel) as in train.py
    --activation=A,B      (step) the activations to compare; default: the config's
    --gpus=8 --gpu=H100 --mfu=0.4    (plan) how many of which, and the share of its peak that they reach
    --json=FILE           where the figures go besides the table; default out/bench/kernel.json, …
"""

import json
import os
import platform
import re
import statistics
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

import machine
import train
from activations import get_activation
from command import Parser, UserError, run_command, whole_number
from config import Config, read_command
from model import Llama, chunk_rows

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler prints a line when it starts and stops

# ---------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(job, device):
    """Seconds from calling job() until the device has finished it."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    job()
    synchronize()
    return time.perf_counter() - began


def medians(jobs, device, rounds):
    """{name: median seconds} of {name: function}, run in turns after two rounds of warm-up."""
    turns = [{name: seconds(job, device) for name, job in jobs.items()} for _ in range(rounds + 2)]
    return {name: statistics.median(turn[name] for turn in turns[2:]) for name in jobs}


def bytes_kept(function, inputs, without=()):
    """Bytes that autograd keeps of function(*inputs) for the backward pass, without those of some tensors. Tensors that
    share memory count once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    for tensor in without:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())


def peak_memory(device):
    """Most bytes in use since the last call: on the GPU, or by this whole process on Linux; else None."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def about(device):
    """What a reader needs to know to believe a figure: machine, versions, commit, date."""
    return {
        "device": machine.device_name(device),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": machine.git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
    }


def written(figure):
    """A figure as text: whole from 1000 on, else with three decimals; "-" for None."""
    if figure is None:
        return "-"
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3f}"


def print_table(corner, rows):
    """Print {row: {column: figure}} in aligned columns under their names; `corner` is the name of the first."""
    columns = [corner, *next(iter(rows.values()))]
    heads = [textwrap.wrap(column.replace("_", " "), 11) for column in columns]
    lines = list(zip_longest(*heads, fillvalue=""))
    lines += [(row, *map(written, figures.values())) for row, figures in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for name, *figures in lines:
        print(name.ljust(widths[0]), *map(str.rjust, figures, widths[1:]), sep="  ")
    print()


# ---------------------------------------------------------------------------------------------------------------
# kernel

WIDTH = 9216  # elements per token, as in configs/xielu_1b.py

# {name: (activation, whether to compile it: the fused ones compile themselves)}
CANDIDATES = {
    "xielu reference, eager": ("xielu_reference", False),
    "xielu reference, compiled": ("xielu_reference", True),
    "xielu fused": ("xielu", False),
    "xielu inverted": ("xielu_inverted", False),
    "relu2, compiled": ("relu2", True),
    "gelu, compiled": ("gelu", True),
    "swiglu, compiled": ("swiglu", True),
}
RATIOS = {
    "eager reference / fused": ("xielu reference, eager", "xielu fused"),
    "compiled reference / fused": ("xielu reference, compiled", "xielu fused"),
    "fused / relu2": ("xielu fused", "relu2, compiled"),
    "fused / swiglu": ("xielu fused", "swiglu, compiled"),
    "inverted / fused": ("xielu inverted", "xielu fused"),
}


def gradients(module, inputs, gradient):
    """The gradients of a module's inputs and scalars, given that of its output: its forward and backward pass."""
    return torch.autograd.grad(module(*inputs), [*inputs, *module.parameters()], gradient)


def measure_activations(device, dtype, tokens, rounds):
    """{"copy_gb_per_s": …, "activations": {name: figures}, "ratios": {…}} of the candidates on (tokens, WIDTH); a gated
    one gets two inputs of 2/3 of the width."""
    source = torch.randn(tokens, WIDTH, device=device).to(dtype)
    target = torch.empty_like(source)
    jobs, moved, figures = {"copy": lambda: target.copy_(source)}, {}, {}
    for name, (activation, compiled) in CANDIDATES.items():
        module = get_activation(activation).module().to(device)
        if compiled:
            module.compile(dynamic=False)
        gated = get_activation(activation).gated
        shape = (tokens, WIDTH * 2 // 3 if gated else WIDTH)
        inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2 if gated else 1)]
        gradient = torch.randn(shape, device=device).to(dtype)
        jobs[name, "forward"] = partial(module, *inputs)
        jobs[name, "both"] = partial(gradients, module, inputs, gradient)
        # read and written, each way
        moved[name, "forward"] = gradient.nbytes * (len(inputs) + 1)
        moved[name, "backward"] = gradient.nbytes * (2 * len(inputs) + 1)
        figures[name] = {"bytes_kept_per_element": bytes_kept(module, inputs) / source.numel()}
    times = medians(jobs, device, rounds)
    copy_rate = 2 * source.nbytes / times["copy"]
    for name in CANDIDATES:
        times[name, "backward"] = times[name, "both"] - times[name, "forward"]
        for way in ("forward", "backward"):
            rate = moved[name, way] / times[name, way]
            figures[name] |= {
                f"{way}_ms": times[name, way] * 1e3,
                f"{way}_gb_per_s": rate / 1e9,
                f"{way}_share_of_copy": rate / copy_rate,
            }
    ratios = {ratio: times[above, "both"] / times[below, "both"] for ratio, (above, below) in RATIOS.items()}
    return {"copy_gb_per_s": copy_rate / 1e9, "activations": figures, "ratios": ratios}


def kernel(_, rounds, tokens, device):
    """Measure the activations alone, in float32 and bfloat16; returns the figures."""
    device = machine.pick_device(device)
    tokens = tokens or (20480 if device.type == "cuda" else 1820)
    result = {"about": about(device), "tokens": tokens, "width": WIDTH, "dtypes": {}}
    for dtype in (torch.float32, torch.bfloat16):
        figures = measure_activations(device, dtype, tokens, rounds)
        result["dtypes"][str(dtype)[6:]] = figures
        print(f"{str(dtype)[6:]}, {tokens} × {WIDTH}, copy {figures['copy_gb_per_s']:.1f} GB/s, {device}")
        print_table("activation", figures["activations"])
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in figures["ratios"].items())
        print(f"forward + backward: {ratios}\n")
    return result


# ---------------------------------------------------------------------------------------------------------------
# step


class Candidate:
    """A model with its optimizer, built as train.py builds them, and the times that its steps on a batch took.

    Between its turns it is on the CPU, so that each candidate has the GPU's memory to itself.
    """

    def __init__(self, config, batch, dtype):
        self.config, self.batch, self.device = config, batch, batch.device
        self.model, _, self.optimizer = train.build(config, {}, self.device, dtype)
        self.first_step = seconds(self.step, self.device)
        self.times = []
        self.move("cpu")

    def step(self):
        train.compute_gradient(self.model, self.batch, self.config)
        train.update(self.optimizer, self.config.lr)
        self.optimizer.zero_grad()

    def move(self, device):
        """Move model and optimizer to a device."""
        self.model.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # which puts it where the weights are

    def take_turn(self):
        """Time two steps, after one of warm-up."""
        self.step()
        peak_memory(self.device)  # that of the warm-up and of the others does not count
        self.times += [seconds(self.step, self.device) for _ in range(2)]
        self.peak_memory = peak_memory(self.device)

    def figures(self, own_flops, peak_flops):
        """{name: figure} of all turns, given the FLOP/s of a matmul here, and those of the data sheet or None."""
        step_s = statistics.median(self.times)
        tokens_per_s = self.config.tokens_per_step / step_s
        model_flops = self.model.flops_per_token() * tokens_per_s
        return {
            "parameters": self.model.num_parameters(),
            "step_s": step_s,
            "first_step_s": self.first_step,
            "tokens_per_s": tokens_per_s,
            "model_flops": model_flops,
            "share_of_own_matmul": model_flops / own_flops,
            "mfu": model_flops / peak_flops if peak_flops else None,
            "peak_memory_bytes": self.peak_memory,
        }


# {part of a step: what the names of its ops contain}; an op that is in none of them is a part of its own
PARTS = {
    "matmul": r"aten::(add|b)?mm$",
    "attention": "attention",
    "clipping and optimizer": "linalg_vector_norm|_foreach_|adamw|AdamW",
    "calling compiled code": "[Cc]ompiled|Dynamo|AOTDispatcher|Pregraph",
}


def time_by_part(job, device, rounds):
    """Counter {part: seconds} of one call of job(), the mean of `rounds` calls; they add up to the whole call.

    The time of an op does not include the ops that it calls. On a GPU it is the time of the kernels that it launches;
    the profiler does not see those of Apple's GPUs. A compiled kernel is named after the ops that it fuses.
    """
    with torch.profiler.profile() as profiler:  # of the CPU, and of CUDA where it is available
        total = sum(seconds(job, device) for _ in range(rounds))
    times = Counter()
    for op in profiler.key_averages():
        if op.device_type.name == "CPU":  # the kernels of a GPU are listed once more on their own
            name = re.sub(r"^graph_\d+_|_\d+$", "", op.key)
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), name)
            microseconds = op.self_device_time_total if device.type == "cuda" else op.self_cpu_time_total
            times[part] += microseconds / 1e6
    times["outside ops"] = total - times.total()  # in Python; on a GPU, idle
    return Counter({part: elapsed / rounds for part, elapsed in times.most_common()})


def print_parts(parts):
    """Print {name: Counter {part: seconds}} as shares of a step, for the parts that take longest."""
    longest = sum(parts.values(), Counter()).most_common(12)
    rows = {part: {name: times[part] / times.total() for name, times in parts.items()} for part, _ in longest}
    print("where the time goes, as shares of a step, by torch.profiler:")
    print_table("part", rows)


@torch._inductor.config.patch("cpp.enable_kernel_profile", True)  # otherwise a CPU's compiled kernels have no names
def step(argv, rounds):
    """Measure training steps with each activation; returns the figures."""
    from_file, keys = read_command(argv)
    values = from_file | keys
    names = values["activation"].split(",")
    configs = {name: Config(**(values | {"activation": name})) for name in names}
    config = configs[names[0]]
    config.check_batch(1)
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    machine.be_deterministic(device, config.deterministic)

    # every activation is a variant of the same functions, and variants beyond this limit would run uncompiled
    torch._dynamo.config.recompile_limit = 64
    candidates, matmul_times, parts = {}, [], {}
    sequences = config.tokens_per_step // config.seq_len
    batch = torch.randint(config.vocab_size, (sequences, config.seq_len + 1), device=device)
    for name in names:
        candidates[name] = Candidate(configs[name], batch, dtype)
        print(f"{name}: first step {candidates[name].first_step:.1f} s", flush=True)
    rows, width = (4096, 1024) if device.type == "cpu" else (8192, 8192)
    inputs = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    for number in range(rounds):
        matmul_times += [seconds(lambda: inputs @ weight.T, device) for _ in range(3)]
        for name, candidate in candidates.items():
            candidate.move(device)
            candidate.take_turn()
            if number == rounds - 1:
                parts[name] = time_by_part(candidate.step, device, rounds)
            candidate.move("cpu")

    own_flops = 2 * rows * width**2 / statistics.median(matmul_times)
    peak_flops = machine.peak_flops(device, dtype)
    figures = {name: candidate.figures(own_flops, peak_flops) for name, candidate in candidates.items()}
    rates = {name: figures[name]["tokens_per_s"] / figures[names[0]]["tokens_per_s"] for name in names}
    print(f"\n{str(dtype)[6:]} on {machine.device_name(device)}, own matmul {own_flops / 1e9:,.0f} GFLOP/s")
    print_table("activation", figures)
    print_parts(parts)
    ratios = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
    print(f"tokens per second over those of {names[0]}: {ratios}\n")
    return {
        "about": about(device),
        "config": vars(config),
        "dtype": str(dtype)[6:],
        "own_matmul_flops": own_flops,
        "activations": {name: figures[name] | {"parts_s": parts[name]} for name in names},
        "tokens_per_s_over_first": rates,
    }


# ---------------------------------------------------------------------------------------------------------------
# plan


def kept_by_layer(config, dtype):
    """Bytes that one compiled layer keeps for the backward pass of a micro-batch, including weights that it has cast.
    They are counted in the graph that torch.compile makes of the layer, of tensors with a shape and no content."""
    torch._dynamo.reset()  # a graph that was made with another memory_budget does not count
    train.set_memory_budget(config.memory_budget)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(replace(config, n_layers=1, vocab_size=1), dtype, seed=None)
        x = torch.empty(config.micro_batch_size, config.seq_len, config.dim, dtype=dtype, requires_grad=True)
    layer = torch.compile(model.layers[0], backend="aot_eager_decomp_partition")
    return bytes_kept(layer, [x, model.cos, model.sin], without=[model.cos, model.sin, *model.parameters()])


def memory_of(model, dtype):
    """{part: bytes} of one GPU that trains a compiled model."""
    config, parameters, head = model.config, model.num_parameters(), model.lm_head.weight.numel()
    rows = min(config.micro_batch_size * config.seq_len, chunk_rows(config.vocab_size))
    return {
        "weights (float32)": 4 * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer (two float32 moments)": 8 * parameters,
        "kept by the layers for backward": config.n_layers * kept_by_layer(config, dtype),
        # a chunk's logits, whose gradient takes their place; the head's weight and gradient, both cast, and their sum
        "logits and loss": rows * config.vocab_size * dtype.itemsize + head * (2 * dtype.itemsize + 4),
    }


def plan(argv, gpus, gpu, mfu):
    """Compute memory and hours of a run, from its config alone; returns the figures."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must be above 0 and at most 1, not {mfu}")
    from_file, keys = read_command(argv)
    config = Config(**(from_file | keys))
    config.check_batch(gpus)
    with torch.device("meta"):
        model = Llama(config)
    # every GPU of the table computes in bfloat16
    memory = memory_of(model, torch.float32 if config.dtype == "float32" else torch.bfloat16)
    parameters, flops_per_token = model.num_parameters(), model.flops_per_token()
    tokens = config.max_steps * config.tokens_per_step
    flops = tokens * flops_per_token
    peak = machine.PEAK_FLOPS[gpu]
    hours = flops / (gpus * peak * mfu) / 3600
    rows, length = config.micro_batch_size, config.seq_len
    micro_batches = config.tokens_per_step // (gpus * rows * length)
    print(f"{config.activation}: {parameters:,} parameters, {flops_per_token:,} FLOPs per token")
    print(f"{tokens:,} tokens in {config.max_steps:,} steps of {config.tokens_per_step:,}")
    print(f"{gpus} × {gpu}: {rows} × {length} tokens per GPU at once, {micro_batches} times per step\n")
    in_all = memory | {"in all": sum(memory.values())}
    print_table("memory per GPU", {part: {"GiB": size / 2**30} for part, size in in_all.items()})
    print(f"{hours:,.1f} hours at {mfu:.0%} of {gpus} × {peak / 1e12:,.0f} TFLOP/s")
    return {
        "config": vars(config),
        "parameters": parameters,
        "flops_per_token": flops_per_token,
        "flops": flops,
        "memory_bytes": memory,
        "hours": hours,
    }


# ---------------------------------------------------------------------------------------------------------------
# Command line

COMMANDS = {"kernel": kernel, "step": step, "plan": plan}


def read_options(argv):
    """(options of a command line as a namespace, arguments that are train.py's); UserError if it is wrong."""
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to measure, one of {', '.join(COMMANDS)}: see python -m tools.bench --help")
    command = argv[0]
    parser = Parser("python -m tools.bench")
    parser.add_argument("--json", type=Path, default=Path(f"out/bench/{command}.json"))
    if command == "kernel":
        parser.add_argument("--rounds", type=whole_number, default=10)
        parser.add_argument("--tokens", type=whole_number)
        parser.add_argument("--device", default="auto")
    elif command == "step":
        parser.add_argument("--rounds", type=whole_number, default=5)
    else:
        parser.add_argument("--gpus", type=whole_number, default=8)
        parser.add_argument("--gpu", default="H100", choices=machine.PEAK_FLOPS)
        parser.add_argument("--mfu", type=float, default=0.4)
    options, others = parser.parse_known_args(argv[1:])
    if command == "kernel" and others:
        parser.error(f"unknown option {others[0]}")
    return options, others


def bench(argv):
    """Measure what a command line names, and write its options and the figures."""
    options, others = read_options(argv)
    path = vars(options).pop("json")
    figures = COMMANDS[argv[0]](others, **vars(options))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(vars(options) | figures, indent=2) + "\n", encoding="utf-8")
    print(f"figures: {path}")


def main(argv):
    return run_command(bench, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
