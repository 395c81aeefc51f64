"""Speed and memory, measured here:  python -m tools.bench kernel | step | plan …

    python -m tools.bench kernel                                          the activations alone
    python -m tools.bench step configs/demo.py --activation=xielu,relu2   a whole training step, and its ops
    python -m tools.bench plan configs/xielu_1b.py --gpus=8               memory and hours, without a GPU

All candidates are measured in one run, in turns, after a warm-up; each time is the median of the rounds. `step` builds
and runs the model as train.py does. Besides --KEY=VALUE of train.py (`step`, `plan`), there are

    --rounds=10           turns that each candidate gets; default 10 for kernel, 5 for step
    --tokens=20480        (kernel) rows of 9216; default 20480 on a GPU, 1820 on a CPU: 16.8 million elements
    --device=auto         (kernel) as in train.py
    --activation=A,B      (step) the activations to compare; default: the config's
    --gpus=8 --gpu=H100 --mfu=0.4    (plan) how many of which, and the share of its peak that they reach
    --json=FILE           where the figures go besides the table; default out/bench/kernel.json, …
"""

import json
import math
import os
import platform
import re
import statistics
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

import machine
import train
from activations import get_activation
from command import Parser, UserError, run_command, whole_number
from config import Config, read_command
from data import Corpus
from model import LOGITS_AT_ONCE, Linear, Llama

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler prints a line when it starts and stops

# ---------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(job, device):
    """Seconds from calling job() until the device has finished it."""
    synchronize(device)
    began = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - began


def medians(jobs, device, rounds):
    """{name: median seconds} of {name: function}, run in turns after two rounds of warm-up."""
    times = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            elapsed = seconds(job, device)
            if number >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def bytes_kept(function, inputs):
    """Bytes that autograd keeps of function(*inputs) for the backward pass; tensors that share memory count once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)  # held until all are counted, so that no memory is used twice
    del result
    return sum(kept.values())


def peak_memory(device, reset=False):
    """Most bytes in use since the last reset: on the GPU, or by this whole process on Linux; else None."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
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


# How a table writes a figure whose name ends like this; all others are shares
FORMATS = {
    "_ms": "{:.2f}".format,
    "_gb_per_s": "{:.1f}".format,
    "_per_element": "{:.2f}".format,
    "step_s": "{:.3f}".format,
    "tokens_per_s": "{:,.0f}".format,
    "parameters": "{:,}".format,
    "flops": lambda rate: f"{rate / 1e9:,.0f} GFLOP/s",
    "memory_bytes": lambda size: f"{size / 2**20:,.0f} MiB",
    "GiB": "{:.2f}".format,
}


def written(name, value):
    """A figure as text; "-" for None."""
    if value is None:
        return "-"
    return next((form for end, form in FORMATS.items() if name.endswith(end)), "{:.1%}".format)(value)


def print_table(corner, rows):
    """Print {row: {column: figure}} in aligned columns under their names; `corner` is the name of the first."""
    columns = [corner, *next(iter(rows.values()))]
    heads = [textwrap.wrap(column.replace("_", " "), 11) for column in columns]
    height = max(map(len, heads))
    lines = list(zip(*([""] * (height - len(head)) + head for head in heads)))
    lines += [(row, *(written(*figure) for figure in figures.items())) for row, figures in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        cells = [first.ljust(widths[0])] + [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join(cells).rstrip())
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


def forward_and_both(module, inputs, gradient):
    """Two jobs: the module's forward pass, and forward with the gradients of inputs and scalars."""

    def forward():
        return module(*inputs)

    def both():
        torch.autograd.grad(module(*inputs), [*inputs, *module.parameters()], gradient)

    return forward, both


def measure_activations(device, dtype, tokens, rounds):
    """{"copy_gb_per_s": …, "activations": {name: figures}, "ratios": {…}} of the candidates on (tokens, WIDTH); a gated
    one gets two inputs of 2/3 of the width."""
    source = torch.randn(tokens, WIDTH, device=device).to(dtype)
    target = torch.empty_like(source)
    jobs, moved, kept = {"copy": lambda: target.copy_(source)}, {}, {}
    for name, (activation, compiled) in CANDIDATES.items():
        module = get_activation(activation).module().to(device)
        if compiled:
            module.compile(dynamic=False)
        gated = get_activation(activation).gated
        shape = (tokens, WIDTH * 2 // 3 if gated else WIDTH)
        inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2 if gated else 1)]
        gradient = torch.randn(shape, device=device).to(dtype)
        jobs[name, "forward"], jobs[name, "both"] = forward_and_both(module, inputs, gradient)
        size = gradient.numel() * dtype.itemsize
        moved[name] = size * (len(inputs) + 1), size * (2 * len(inputs) + 1)  # read and written, each way
        kept[name] = bytes_kept(module, inputs) / (tokens * WIDTH)
    times = medians(jobs, device, rounds)
    copy_rate = 2 * source.numel() * dtype.itemsize / times["copy"]
    figures = {}
    for name, sizes in moved.items():
        forward = times[name, "forward"]
        backward = times[name, "both"] - forward
        figures[name] = {"bytes_kept_per_element": kept[name]}
        for way, elapsed, size in zip(("forward", "backward"), (forward, backward), sizes):
            figures[name] |= {
                f"{way}_ms": elapsed * 1e3,
                f"{way}_gb_per_s": size / elapsed / 1e9,
                f"{way}_share_of_copy": size / elapsed / copy_rate,
            }
    ratios = {ratio: times[above, "both"] / times[below, "both"] for ratio, (above, below) in RATIOS.items()}
    return {"copy_gb_per_s": copy_rate / 1e9, "activations": figures, "ratios": ratios}


def kernel(options, _):
    """Measure the activations alone, in float32 and bfloat16; returns the figures."""
    device = machine.pick_device(options.device)
    tokens = options.tokens or (20480 if device.type == "cuda" else 1820)
    result = {"about": about(device), "tokens": tokens, "width": WIDTH, "dtypes": {}}
    for dtype in (torch.float32, torch.bfloat16):
        figures = measure_activations(device, dtype, tokens, options.rounds)
        result["dtypes"][str(dtype)[6:]] = figures
        print(f"{str(dtype)[6:]}, {tokens} × {WIDTH}, copy {figures['copy_gb_per_s']:.1f} GB/s, {device}")
        print_table("activation", figures["activations"])
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in figures["ratios"].items())
        print(f"forward + backward: {ratios}\n")
    return result


# ---------------------------------------------------------------------------------------------------------------
# step


class Candidate:
    """A model with its optimizer and a batch, built as train.py builds them, and the times that it took."""

    def __init__(self, config, device, dtype):
        self.config, self.device = config, device
        self.model, _, self.optimizer = train.build(config, {}, device, dtype)
        rows = config.tokens_per_step // config.seq_len
        if Path(config.data).is_dir():
            corpus = Corpus(config.data, "train", config.seq_len, config.vocab_size)
            batch = torch.from_numpy(corpus.batch(config.seed, 0, rows))
        else:
            batch = torch.randint(config.vocab_size, (rows, config.seq_len + 1))
        self.batch = batch.to(device)
        self.first_step = seconds(self.step, device)
        self.times = []

    def step(self):
        train.compute_gradient(self.model, self.batch, self.config)
        train.update(self.optimizer, self.config.lr)
        self.optimizer.zero_grad()

    def move(self, device):
        """Move model and optimizer to a device."""
        self.model.to(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.to(device)

    def take_turn(self):
        """Time two steps, after one of warm-up."""
        self.step()
        peak_memory(self.device, reset=True)
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
    """{part: seconds} of one call of job(), longest first, the mean of `rounds` calls; they add up to the whole call.

    The time of an op does not include the ops that it calls. On a GPU it is the time of the kernels that it launches;
    the profiler does not see those of Apple's GPUs. A compiled kernel is named after the ops that it fuses.
    """
    with profile() as profiler:  # of the CPU, and of CUDA where it is available
        total = sum(seconds(job, device) for _ in range(rounds))
    times = Counter()
    for op in profiler.key_averages():
        if op.device_type == DeviceType.CPU:  # the kernels of a GPU are listed once more on their own
            name = re.sub(r"^graph_\d+_|_\d+$", "", op.key)
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), name)
            microseconds = op.self_device_time_total if device.type == "cuda" else op.self_cpu_time_total
            times[part] += microseconds / 1e6
    times["outside ops"] = total - sum(times.values())  # in Python; on a GPU, idle
    return {part: elapsed / rounds for part, elapsed in times.most_common()}


def print_parts(parts):
    """Print {name: {part: seconds}} as shares of a step, one column per name, for the parts that take longest."""
    shares, largest = {}, Counter()
    for name, times in parts.items():
        total = sum(times.values())
        shares[name] = {part: elapsed / total for part, elapsed in times.items()}
        largest |= Counter(shares[name])  # for each part, the larger of both
    rows = {part: {name: shares[name].get(part) for name in shares} for part, _ in largest.most_common(12)}
    print("where the time goes, by torch.profiler:")
    print_table("part", rows)


def matmul_job(device, dtype):
    """(a job that multiplies two large matrices, its FLOPs)."""
    size = (4096, 1024, 1024) if device.type == "cpu" else (8192, 8192, 8192)
    a = torch.randn(size[0], size[1], device=device, dtype=dtype)
    b = torch.randn(size[2], size[1], device=device, dtype=dtype)
    return lambda: a @ b.T, 2 * math.prod(size)


@torch._inductor.config.patch("cpp.enable_kernel_profile", True)  # otherwise a CPU's compiled kernels have no names
def step(options, argv):
    """Measure training steps with each activation; returns the figures."""
    from_file, keys = read_command(argv)
    values = from_file | keys
    names = (options.activation or values["activation"]).split(",")
    configs = {name: Config(**(values | {"activation": name})) for name in names}
    config = configs[names[0]]
    config.check_batch(1)
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    machine.be_deterministic(device, config.deterministic)
    # Each of several candidates is on the GPU only in its turn, so that it has the memory to itself.
    parked = torch.device("cpu") if len(names) > 1 else device

    candidates, matmul, parts = {}, [], {}
    for name in names:
        candidates[name] = Candidate(configs[name], device, dtype)
        print(f"{name}: first step {candidates[name].first_step:.1f} s", flush=True)
        candidates[name].move(parked)
    multiply, flops = matmul_job(device, dtype)
    for number in range(options.rounds):
        matmul.append(medians({"matmul": multiply}, device, 3)["matmul"])
        for name, candidate in candidates.items():
            candidate.move(device)
            candidate.take_turn()
            if number == options.rounds - 1:
                parts[name] = time_by_part(candidate.step, device, options.rounds)
            candidate.move(parked)

    own_flops, peak_flops = flops / statistics.median(matmul), machine.peak_flops(device, dtype)
    figures = {name: candidate.figures(own_flops, peak_flops) for name, candidate in candidates.items()}
    rates = {name: figures[name]["tokens_per_s"] / figures[names[0]]["tokens_per_s"] for name in names}
    print(f"\n{str(dtype)[6:]} on {machine.device_name(device)}, own matmul {own_flops / 1e9:,.0f} GFLOP/s")
    print_table("activation", figures)
    print_parts(parts)
    if len(names) > 1:
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


def kept_per_token(config, itemsize):
    """Bytes per token that one compiled layer keeps for its backward pass (a test compares it with autograd's count).
    itemsize: bytes per number of the compute dtype."""
    qkv = config.dim + 2 * config.n_kv_heads * config.head_dim
    # the layer's input, both norms' outputs, what attention adds to the residual, and attention's output twice: as
    # its kernel and as o_proj want it
    narrow = 6 * config.dim
    hidden = config.mlp_dim * itemsize
    if config.activation == "xielu_inverted":
        wide = hidden + config.mlp_dim / 8  # the activation's output and one bit per element
    else:
        wide = (3 if config.gated else 2) * hidden  # the activation's inputs and its output
    return (narrow + qkv) * itemsize + wide + 4 * (config.n_heads + 2)  # attention's log-sums, norms' 1/rms


def memory_of(model, itemsize):
    """{part: bytes} of one GPU that trains a model. itemsize: bytes per number of the compute dtype."""
    config, parameters = model.config, model.num_parameters()
    tokens = config.micro_batch_size * config.seq_len
    linear = sum(module.weight.numel() for module in model.layers.modules() if isinstance(module, Linear))
    head = model.lm_head.weight.numel()
    logits = min(tokens * config.vocab_size, max(LOGITS_AT_ONCE, config.vocab_size))
    chunked = tokens * config.vocab_size > LOGITS_AT_ONCE
    return {
        "weights (float32)": 4 * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer (two float32 moments)": 8 * parameters,
        "weights cast for the matmuls": linear * itemsize if itemsize < 4 else 0,
        "activations kept for backward": tokens * config.n_layers * kept_per_token(config, itemsize),
        # a chunk's logits and their gradient, in float32 and in the compute dtype; the head's summed gradient
        "logits and loss": logits * (4 + 2 * itemsize) + (8 if chunked else 4) * head,
    }


def plan(options, argv):
    """Compute memory and hours of a run, from its config alone; returns the figures."""
    gpus, gpu, mfu = options.gpus, options.gpu, options.mfu
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must be above 0 and at most 1, not {mfu}")
    from_file, keys = read_command(argv)
    config = Config(**(from_file | keys))
    config.check_batch(gpus)
    with torch.device("meta"):
        model = Llama(config)
    memory = memory_of(model, 4 if config.dtype == "float32" else 2)  # every GPU of the table computes in bf16
    peak, flops = machine.PEAK_FLOPS[gpu], model.flops_per_token()
    tokens = config.max_steps * config.tokens_per_step
    hours = tokens * flops / (gpus * peak * mfu) / 3600
    micro_batches = config.tokens_per_step // (gpus * config.micro_batch_size * config.seq_len)
    print(f"{config.activation}: {model.num_parameters():,} parameters, {flops:,} FLOPs per token")
    print(f"{tokens:,} tokens in {config.max_steps:,} steps of {config.tokens_per_step:,}")
    print(
        f"{gpus} × {gpu}: {config.micro_batch_size} × {config.seq_len} tokens per GPU at once, "
        f"{micro_batches} times per step\n"
    )
    in_all = memory | {"in all": sum(memory.values())}
    print_table("memory per GPU", {part: {"GiB": size / 2**30} for part, size in in_all.items()})
    print(f"{hours:,.1f} hours at {mfu:.0%} of {gpus} × {peak / 1e12:,.0f} TFLOP/s")
    return {
        "config": vars(config),
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "parameters": model.num_parameters(),
        "flops_per_token": flops,
        "flops": tokens * flops,
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
        parser.add_argument("--activation")
    else:
        parser.add_argument("--gpus", type=whole_number, default=8)
        parser.add_argument("--gpu", default="H100", choices=machine.PEAK_FLOPS)
        parser.add_argument("--mfu", type=float, default=0.4)
    options, others = parser.parse_known_args(argv[1:])
    if command == "kernel" and others:
        parser.error(f"unknown option {others[0]}")
    return options, others


def bench(argv):
    """Measure what a command line names, and write the figures."""
    options, others = read_options(argv)
    result = COMMANDS[argv[0]](options, others)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"figures: {options.json}")


def main(argv):
    return run_command(bench, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
