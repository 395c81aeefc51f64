"""Speed and memory:  python -m tools.bench kernel | plan …

    python -m tools.bench kernel                               the activations, alone and inside a layer, measured here
    python -m tools.bench plan configs/xielu_1b.py --gpus=8    memory and hours of a run, without a GPU

`kernel` takes the sizes of configs/xielu_1b.py and measures all candidates in turns, after a warm-up; each time is the
median of the rounds. A whole training step is measured by training: tools.compare --max_steps=60 has a column for speed
and memory, and tools/gpu.sh does all that a GPU can show. Besides --KEY=VALUE of train.py there are

    --rounds=10           (kernel) turns that each candidate gets
    --tokens=20480        (kernel) rows of ffn_dim; default 20480 on a GPU, 1820 on a CPU: 16.8 million elements
    --gpus=8 --gpu=H100 --mfu=0.4    (plan) how many of which, and the share of its peak that they reach
    --json=FILE           where the figures go besides the table; default out/bench/kernel.json, …
"""

import json
import platform
import statistics
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from activations import get_activation
from model import Llama, chunk_rows
from plumbing import machine
from plumbing.command import Parser, UserError, run_command, whole_number
from plumbing.config import ROOT
from plumbing.files import write_atomically
from train import Config

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
        module = get_activation(activation).build(width).to(device)
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
# plan


def kept_by_layer(config, dtype):
    """Bytes that one compiled layer keeps for the backward pass of a micro-batch, including weights that it has cast.
    They are counted in the graph that torch.compile makes of the layer, of tensors with a shape and no content."""
    torch._dynamo.reset()  # a graph that was made with another memory_budget does not count
    torch._functorch.config.activation_memory_budget = config.memory_budget
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
    matrices = sum(w.numel() for w in model.matrices()) if config.optimizer == "muon" else 0
    rows = chunk_rows(config.micro_batch_size * config.seq_len, config.vocab_size, 80e9)  # as on a GPU of 80 GB
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
# Command line

# {name: (function, {option: default})}
COMMANDS = {
    "kernel": (kernel, {"rounds": 10, "tokens": None}),
    "plan": (plan, {"gpus": 8, "gpu": "H100", "mfu": 0.4}),
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
    from_file, keys = Config.read_command(argv)
    return Config(**(from_file | keys))


def bench(argv):
    """Measure what a command line names, and write its options and the figures. Its function returns them, and may call
    save(figures) before, so that an interruption does not lose all of them."""
    options, others = read_options(argv)
    path = vars(options).pop("json")
    path.parent.mkdir(parents=True, exist_ok=True)  # now: not to find out after minutes that it cannot be made

    def save(figures):
        text = json.dumps(vars(options) | figures, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    # every activation is a variant of the same functions, and variants beyond this limit would run uncompiled
    torch._dynamo.config.recompile_limit = 64
    save(COMMANDS[argv[0]][0](others, save, **vars(options)))
    print(f"figures: {path}")


def main(argv):
    return run_command(bench, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
