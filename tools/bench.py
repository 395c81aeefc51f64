"""Speed and memory, measured here:  python -m tools.bench kernel | step | plan | gpu …

    python -m tools.bench kernel                                          the activations, alone and inside a layer
    python -m tools.bench step configs/demo.py --activation=xielu,relu2   a whole training step, and its ops
    python -m tools.bench plan configs/xielu_1b.py --gpus=8               memory and hours, without a GPU
    python -m tools.bench gpu                                             all that a GPU can show, in nine minutes

All candidates are measured in one run, in turns, after a warm-up; each time is the median of the rounds. `step` builds
and runs the model as train.py does, on random tokens. `kernel` takes the sizes of configs/xielu_1b.py; `gpu` is a
process for each measurement, so that one that fails leaves the others alone. Besides --KEY=VALUE of train.py there are

    --rounds=10           turns that each candidate gets; default 10 for kernel, 5 for step
    --tokens=20480        (kernel) rows of ffn_dim; default 20480 on a GPU, 1820 on a CPU: 16.8 million elements
    --activation=A,B      (step) the activations to compare; default: the config's
    --gpus=8 --gpu=H100 --mfu=0.4    (plan) how many of which, and the share of its peak that they reach
    --seconds=60          (gpu) of training with each activation; less if the other parts have taken long
    --json=FILE           where the figures go besides the table; default out/bench/kernel.json, …; gpu also writes
                          the tables beside it, as out/bench/gpu.md
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
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
from config import ROOT, Config, read_command
from files import write_atomically
from model import Llama, chunk_rows
from run import median_speed, read_log

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


def device_seconds(job, device, once):
    """Seconds per call of job(), of which one alone took `once`. On CUDA by the device's own clock, of as many calls as
    fill 20 ms, queued one behind the other: starting a call and waiting for it can take as long as its kernel."""
    if device.type != "cuda":
        return seconds(job, device)
    calls = max(3, round(0.02 / once))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    job()  # otherwise the device would wait for the first call while its clock runs
    start.record()
    for _ in range(calls):
        job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def medians(jobs, device, rounds):
    """{name: median seconds} of {name: function}, run in turns after two rounds of warm-up."""
    _, once = ({name: seconds(job, device) for name, job in jobs.items()} for _ in range(2))
    turns = [{name: device_seconds(job, device, once[name]) for name, job in jobs.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in jobs}


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
    """A figure as text: whole from 1000 on, else with three decimals; "-" for None. A text stays as it is."""
    if figure is None or isinstance(figure, str):
        return figure or "-"
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

MODEL = str(ROOT / "configs/xielu_1b.py")  # whose sizes are measured
COMPARED = "xielu,relu2,swiglu"

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


def gradients(module, inputs, gradient):
    """The gradients of a module's parameters, and of the inputs that need one, given that of its output: its forward
    and backward pass."""
    wanted = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
    return torch.autograd.grad(module(*inputs), wanted, gradient)


def measure_activations(device, dtype, tokens, width, rounds):
    """{"copy_gb_per_s": …, "activations": {name: figures}} of the candidates on (tokens, width); a gated one gets two
    inputs of 2/3 of the width."""
    source = torch.randn(tokens, width, device=device).to(dtype)
    target = torch.empty_like(source)
    jobs, moved, figures = {"copy": lambda: target.copy_(source)}, {}, {}
    for name, (activation, compiled) in CANDIDATES.items():
        module = get_activation(activation).module().to(device)
        if compiled:
            module.compile(dynamic=False)
        gated = get_activation(activation).gated
        shape = (tokens, width * 2 // 3 if gated else width)
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
        figures[name]["both_over_relu2"] = times[name, "both"] / times["relu2, compiled", "both"]
    return {"copy_gb_per_s": copy_rate / 1e9, "activations": figures}


def measure_layers(device, dtype, tokens, config, rounds, bytes_per_s):
    """{activation: figures} of a layer of the model, compiled as train.py compiles it: there, part of an activation's
    backward pass may go to memory and back, which does not show where it is alone. What a layer takes longer than that
    with relu2 is also given as the bytes that a copy moves in that time, per element of the activation."""
    length = min(tokens, config.seq_len)
    x = torch.randn(tokens // length, length, config.dim, device=device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    names, jobs = COMPARED.split(","), {}
    for name in names:
        with torch.device(device):
            model = Llama(replace(config, activation=name, n_layers=1, vocab_size=1), dtype)
        model.compile_parts()
        inputs = (x, model.cos[:length], model.sin[:length])
        jobs[name, "forward"] = partial(model.layers[0], *inputs)
        jobs[name, "both"] = partial(gradients, model.layers[0], inputs, gradient)
    times, figures = medians(jobs, device, rounds), {}
    for name in names:
        over = times[name, "both"] - times["relu2", "both"]
        figures[name] = {
            "forward_ms": times[name, "forward"] * 1e3,
            "backward_ms": (times[name, "both"] - times[name, "forward"]) * 1e3,
            "over_relu2_ms": over * 1e3,
            "over_relu2_bytes_per_element": over * bytes_per_s / (x.numel() / config.dim * config.ffn_dim),
        }
    return figures


def kernel(keys, save, rounds, tokens):
    """Measure the activations, alone and inside a layer, in float32 and bfloat16."""
    config = read_config([MODEL, *keys])
    device, width = machine.pick_device(config.device), config.ffn_dim
    tokens = tokens or (20480 if device.type == "cuda" else 1820)
    in_layer = tokens if device.type == "cuda" else max(1, tokens // 4)  # a CPU's matmuls take seconds
    result = {"about": about(device), "tokens": tokens, "tokens_in_layer": in_layer, "width": width, "dtypes": {}}
    for dtype in (torch.bfloat16, torch.float32):  # in the order of their value, should time run out
        name = str(dtype)[6:]
        figures = result["dtypes"][name] = measure_activations(device, dtype, tokens, width, rounds)
        save(result)
        copy_rate = figures["copy_gb_per_s"]
        print(f"{name}, {tokens} × {width}, copy {copy_rate:.1f} GB/s, {device}")
        print_table("activation", figures["activations"])
        figures["layers"] = measure_layers(device, dtype, in_layer, config, rounds, copy_rate * 1e9)
        save(result)
        print(f"{name}, inside a layer, {in_layer} × {config.dim}")
        print_table("activation", figures["layers"])
    return result


# ---------------------------------------------------------------------------------------------------------------
# step


class Candidate:
    """A model with its optimizers, built as train.py builds them, and the times that its steps on a batch took.

    Between its turns it is on the CPU, so that each candidate has the GPU's memory to itself.
    """

    def __init__(self, config, batch, dtype):
        self.config, self.batch, self.device = config, batch, batch.device
        self.model, _, self.optimizers = train.build(config, {}, self.device, dtype)
        self.first_step = seconds(self.step, self.device)
        self.times = []
        self.move("cpu")

    def step(self):
        train.compute_gradient(self.model, self.batch, self.config)
        train.update(self.optimizers, self.config.lr)
        self.model.zero_grad()

    def move(self, device):
        """Move model and optimizers to a device."""
        self.model.to(device)
        for optimizer in self.optimizers:
            optimizer.load_state_dict(optimizer.state_dict())  # which puts it where the weights are

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


def matmul_flops(device, dtype):
    """FLOP/s of a matmul here, as wide as one of a large model."""
    rows, width = (4096, 1024) if device.type == "cpu" else (8192, 8192)
    inputs = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    times = [seconds(lambda: inputs @ weight.T, device) for _ in range(3)]
    return 2 * rows * width**2 / statistics.median(times)


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
def step(argv, save, rounds):
    """Measure training steps with each activation."""
    from_file, keys = read_command(argv)
    values = from_file | keys
    names = values["activation"].split(",")
    configs = {name: Config(**(values | {"activation": name})) for name in names}
    config = configs[names[0]]
    config.check_batch(1)
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    machine.be_deterministic(device, config.deterministic)

    # before the models are compiled, since planning resets the compiler; the plan is for a compiled model
    planned = {name: sum(memory_of(model_of(configs[name], dtype)).values()) for name in names if config.compile}
    candidates, matmuls, parts = {}, [], {}
    sequences = config.tokens_per_step // config.seq_len
    batch = torch.randint(config.vocab_size, (sequences, config.seq_len + 1), device=device)
    for name in names:
        candidates[name] = Candidate(configs[name], batch, dtype)
        print(f"{name}: first step {candidates[name].first_step:.1f} s", flush=True)
    result = {"about": about(device), "config": vars(config), "dtype": str(dtype)[6:]}
    for number in range(rounds):
        matmuls.append(matmul_flops(device, dtype))
        for name, candidate in candidates.items():
            candidate.move(device)
            candidate.take_turn()
            if number == rounds - 1:
                parts[name] = time_by_part(candidate.step, device, rounds)
            candidate.move("cpu")
        own_flops, peak_flops = statistics.median(matmuls), machine.peak_flops(device, dtype)
        figures = {
            name: candidate.figures(own_flops, peak_flops) | {"planned_memory_bytes": planned.get(name)}
            for name, candidate in candidates.items()
        }
        rates = {name: figures[name]["tokens_per_s"] / figures[names[0]]["tokens_per_s"] for name in names}
        rows = {name: figures[name] | {"parts_s": parts.get(name)} for name in names}
        result |= {"own_matmul_flops": own_flops, "activations": rows, "tokens_per_s_over_first": rates}
        save(result)

    print(f"\n{str(dtype)[6:]} on {machine.device_name(device)}, own matmul {own_flops / 1e9:,.0f} GFLOP/s")
    print_table("activation", figures)
    print_parts(parts)
    ratios = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
    print(f"tokens per second over those of {names[0]}: {ratios}\n")
    return result


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


def model_of(config, dtype):
    """A model on the meta device, which has shapes and no content."""
    with torch.device("meta"):
        return Llama(config, dtype)


def memory_of(model):
    """{part: bytes} of one GPU that trains a compiled model."""
    config, dtype = model.config, model.compute_dtype
    parameters, head = model.num_parameters(), model.lm_head.weight.numel()
    # of those that Muon takes it keeps one moment
    matrices = sum(w.numel() for w in model.layers.parameters() if w.ndim == 2) if config.optimizer == "muon" else 0
    rows = min(config.micro_batch_size * config.seq_len, chunk_rows(config.vocab_size))
    return {
        "weights (float32)": 4 * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer (float32 moments)": 8 * parameters - 4 * matrices,
        "kept by the layers for backward": config.n_layers * kept_by_layer(config, dtype),
        # a chunk's logits, whose gradient takes their place; the head's weight and gradient, both cast, and their sum
        "logits and loss": rows * config.vocab_size * dtype.itemsize + head * (2 * dtype.itemsize + 4),
    }


def plan(argv, _, gpus, gpu, mfu):
    """Compute memory and hours of a run, from its config alone."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must be above 0 and at most 1, not {mfu}")
    config = read_config(argv)
    config.check_batch(gpus)
    # every GPU of the table computes in bfloat16
    model = model_of(config, torch.float32 if config.dtype == "float32" else torch.bfloat16)
    memory = memory_of(model)
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
# gpu

WHOLE = 520  # seconds for all parts: nine minutes, less what this process takes to start
LIMIT = 180  # seconds for one part, so that one that hangs leaves time for the others
START = 25  # seconds of a training that are not training: to start, compile, validate and write a checkpoint
COLUMNS = ("tokens_per_s", "mfu", "peak_memory_bytes", "planned_memory_bytes", "val_loss")


def run_part(command, limit, log):
    """Run a Python command of this repository for at most `limit` seconds; `log` gets what it prints. Returns what went
    wrong, or None. (Through a pipe, processes that the command leaves behind would keep this one waiting.)"""
    with open(log, "wb") as file:
        try:
            python = [sys.executable, "-u", *command]
            status = subprocess.run(python, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    last = log.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    return f"exit status {status}: {last}" if status else None


def figures_at(path):
    """The figures of a part, from the JSON file or the folder of a run that it has left at a path; {} if it has not."""
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    records = read_log(path / "log.jsonl")
    if not (speed := median_speed(records)):
        return {}
    last = [record for record in records if record["kind"] == "train"][-1] | {"tokens_per_s": speed}
    last["val_loss"] = records[-1]["loss"] if records[-1]["kind"] == "val" else None  # None if the run was stopped
    return {"activations": {path.name: last}}


def markdown(parts):
    """The machine, a table of all parts so far, and what each has printed. A speed is compared with the first of its
    kind, which is what stands before the comma in a part's name."""
    noted = next((part["figures"]["about"] for part in parts.values() if "about" in part["figures"]), {})
    text = ", ".join(f"{name} {value}" for name, value in noted.items() if name != "command") + "\n\n"
    heads = " | ".join(["part", "activation", "seconds", *COLUMNS, "tokens_per_s_over_first", "error"])
    text += f"| {heads.replace('_', ' ')} |\n" + "|---" * (len(COLUMNS) + 5) + "|\n"
    firsts = {}
    for name, part in parts.items():
        for activation, figures in part["figures"].get("activations", {"": {}}).items():
            speed = figures.get("tokens_per_s")
            over = speed / firsts.setdefault(name.partition(",")[0], speed) if speed else None
            cells = [name, activation, part["seconds"], *map(figures.get, COLUMNS), over, part["error"]]
            text += "| " + " | ".join(map(written, cells)) + " |\n"
    return text + "".join(f"\n## {name}\n\n```\n{part['output']}\n```\n" for name, part in parts.items())


def gpu(keys, save, seconds):
    """Run all that needs a GPU, each part in a process of its own, in the order of their value. Figures and table are
    written after each part. A part that fails is noted with its error, and the next one follows."""
    small, few, compared = str(ROOT / "configs/xielu_124m.py"), "--tokens_per_step=65536", f"--activation={COMPARED}"
    for file in (small, MODEL):
        config = read_config([file, *keys])
    if config.device == "auto" and machine.pick_device("auto").type == "cpu":
        raise UserError("there is no GPU here: to try this on a CPU, add --device=cpu and small sizes (--dim=96 …)")
    parts, ends = {}, time.monotonic() + WHOLE
    result = {"keys": keys, "parts": parts}

    def measure(name, command, path, share=1.0):
        print(f"{name} …", end=" ", flush=True)
        began, log = time.monotonic(), folder / "log.txt"
        error = run_part(command, max(0, min(LIMIT, (ends - began) * share)), log)
        elapsed, output = time.monotonic() - began, log.read_text("utf-8", "replace").strip()
        parts[name] = {"seconds": elapsed, "error": error, "output": output[-10_000:], "figures": figures_at(path)}
        print(f"{elapsed:.0f} s" + (f", {error}" if error else ""), flush=True)
        save(result, markdown(parts))

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        benches = {
            "step 1.1B": ["step", MODEL, "--tokens_per_step=40960", *keys, compared, "--rounds=2"],
            "kernel": ["kernel", *keys, "--rounds=5"],
            "step 124M": ["step", small, few, *keys, compared, "--rounds=3"],
            "step 124M, deterministic": ["step", small, few, *keys, "--activation=xielu", "--deterministic=True"],
        }
        for name, command in benches.items():
            path = folder / f"{name}.json"
            measure(name, ["-m", "tools.bench", *command, f"--json={path}"], path)

        data, steps = folder / "data", 100
        measure("data", ["prepare_data.py", "stdlib", f"--out={data}"], data)
        if step := parts["step 124M"]["figures"]:
            each = min(seconds, (ends - time.monotonic()) / 3 - START)
            speed = step["activations"]["xielu"]["tokens_per_s"] / step["config"]["tokens_per_step"]
            steps = max(2, round(each * speed))  # as many for all three, so that one can compare their losses
        own = [f"--data={data}", f"--max_steps={steps}", f"--eval_every={steps}", f"--checkpoint_every={steps}"]
        own += [f"--warmup_steps={steps // 10}", f"--decay_steps={steps // 5}", f"--log_every={max(1, steps // 10)}"]
        names = COMPARED.split(",")
        for number, name in enumerate(names):  # each has the same share of the time that is left
            run = ["train.py", small, few, "--eval_tokens=100000", *keys, *own, f"--activation={name}"]
            measure(f"training, {name}", [*run, f"--out={folder / name}"], folder / name, 1 / (len(names) - number))
    print("\n" + markdown(parts).partition("\n\n##")[0])
    return result


# ---------------------------------------------------------------------------------------------------------------
# Command line

# {name: (function, {option: default})}
COMMANDS = {
    "kernel": (kernel, {"rounds": 10, "tokens": None}),
    "step": (step, {"rounds": 5}),
    "plan": (plan, {"gpus": 8, "gpu": "H100", "mfu": 0.4}),
    "gpu": (gpu, {"seconds": 60}),
}


def read_options(argv):
    """(options of a command line as a namespace, arguments that are train.py's); UserError if it is wrong."""
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"say what to measure, one of {', '.join(COMMANDS)}: see python -m tools.bench --help")
    command, parser = argv[0], Parser("python -m tools.bench")
    parser.add_argument("--json", type=Path, default=Path(f"out/bench/{command}.json"))
    for name, default in COMMANDS[command][1].items():
        kind = type(default) if isinstance(default, str | float) else whole_number
        choices = machine.PEAK_FLOPS if name == "gpu" else None
        parser.add_argument(f"--{name}", type=kind, default=default, choices=choices)
    options, others = parser.parse_known_args(argv[1:])
    if options.json.exists() and not options.json.is_file():
        raise UserError(f"--json={options.json} is not a file: name one, such as out/bench/{command}.json")
    return options, others


def read_config(argv):
    """The Config of a command line like train.py's."""
    from_file, keys = read_command(argv)
    return Config(**(from_file | keys))


def bench(argv):
    """Measure what a command line names, and write its options and the figures. Its function returns them, and may call
    save(figures, tables) before, so that an interruption does not lose all of them."""
    options, others = read_options(argv)
    path = vars(options).pop("json")
    path.parent.mkdir(parents=True, exist_ok=True)  # now: not to find out after nine minutes that it cannot be made

    def save(figures, tables=None):
        text = json.dumps(vars(options) | figures, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
        if tables:
            write_atomically(path.with_suffix(".md"), lambda file: file.write(tables.encode()))

    # every activation is a variant of the same functions, and variants beyond this limit would run uncompiled
    torch._dynamo.config.recompile_limit = 64
    save(COMMANDS[argv[0]][0](others, save, **vars(options)))
    print(f"figures: {path}")


def main(argv):
    return run_command(bench, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
