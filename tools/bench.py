"""Speed and memory:  python -m tools.bench kernel | step | plan [CONFIG.py] --key=value …

    python -m tools.bench kernel           time the activations alone, forward and backward, beside a copy
    python -m tools.bench step             time a micro-batch and an update, and list what takes longest
    python -m tools.bench plan --gpus=8    compute the memory and hours of a run, without a GPU

The default is configs/xielu_1b.py; keys are those of train.py. On a CPU, `kernel` takes fewer rows: 16.8 million
elements. `step --n_layers=1 --vocab_size=64` times one layer; tools/gpu.sh runs kernel and step on a GPU. Besides the
keys of train.py there are

    --seconds=0.3                    (kernel, step) how long each is called to warm up, and then in each of five turns
    --gpus=8 --gpu=H100 --mfu=0.4    (plan) how many of which, and the share of its peak that they reach; the logits are
                                     divided as on a GPU of 80 GB
"""

import math
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.benchmark import Timer

if not __package__:
    print("error: start it as  python -m tools.bench", file=sys.stderr)
    sys.exit(2)

import xielu
from activations import get_activation
from model import Llama, chunk_rows
from plumbing import machine
from plumbing.command import Parser, UserError, program, whole_number
from train import Config, compile_model, make_optimizers, update

# ---------------------------------------------------------------------------------------------------------------
# Measuring

TURNS = 5


def medians(jobs, seconds):
    """{name: seconds per call} of {name: function}: the median of several turns. Each is called for about `seconds`
    to warm up, and again in each turn; a GPU is waited for before and after, not between calls."""
    threads = torch.get_num_threads()
    timers = {name: Timer("job()", globals={"job": job}, num_threads=threads) for name, job in jobs.items()}
    # blocked_autorange would choose them too, but on a GPU it takes blocks 10,000 times as long as a wait for the GPU
    counts = {name: max(1, round(seconds / timer.timeit(1).mean)) for name, timer in timers.items()}
    _, *turns = [{name: timers[name].timeit(counts[name]).mean for name in jobs} for _ in range(TURNS + 1)]
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


def print_row(name, *cells):
    """Print a row of a table: a name, then texts, or numbers that may be None."""
    texts = [f"{cell:,.2f}" if isinstance(cell, float) else cell or "-" for cell in cells]
    print(name.ljust(31), *(text.rjust(13) for text in texts))


# ---------------------------------------------------------------------------------------------------------------
# kernel

# What is not called compiled is called as it is; xielu and xielu_inverted compile themselves
ALONE = ("xielu", "xielu_inverted", "xielu_reference", "xielu_reference compiled", "relu2 compiled", "gelu compiled")
MOST_ON_CPU = 2**24  # elements


def gradients(module, x, gradient):
    """The gradients of x and of a module's parameters, given that of its output: its forward and backward pass."""
    return torch.autograd.grad(module(x), (x, *module.parameters()), gradient)


def kernel(config, device, dtype, seconds):
    """Time each activation on a micro-batch of ffn_dim columns, beside a copy of it. "of copy" is the rate of what it
    must read and write in the rate of the copy."""
    machine.mend_compiler_cache()
    tokens, columns = config.micro_batch_size * config.seq_len, config.ffn_dim
    if device.type == "cpu":
        tokens = min(tokens, MOST_ON_CPU // columns)
    x = torch.randn(tokens, columns, device=device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    jobs, kept = {"copy": partial(torch.empty_like(gradient).copy_, gradient)}, {}
    for name in ALONE:
        activation, _, compiled = name.partition(" ")
        module = get_activation(activation).build(columns).to(device)
        if compiled and config.compile:
            module.compile(dynamic=False)
        jobs[name, "forward"] = partial(module, x)
        jobs[name, "both"] = partial(gradients, module, x, gradient)
        kept[name] = bytes_kept(module, [x]) / x.numel()
    times = medians(jobs, seconds)
    copy, relu2 = times["copy"], times["relu2 compiled", "both"]
    print(f"{tokens} × {columns} elements in {str(dtype)[6:]}; a copy moves {2 * x.nbytes / copy / 1e9:.1f} GB/s\n")
    print_row("", "forward, ms", "of copy, %", "backward, ms", "of copy, %", "both / relu2", "bytes kept")
    for name in ALONE:
        forward, both = times[name, "forward"], times[name, "both"]
        backward = both - forward
        # the forward pass reads x and writes y, as a copy does; the backward pass also reads ∂L/∂y
        shares = 100 * copy / forward, 100 * 1.5 * copy / backward
        print_row(name, forward * 1e3, shares[0], backward * 1e3, shares[1], both / relu2, kept[name])


# ---------------------------------------------------------------------------------------------------------------
# step


def step(config, device, dtype, seconds):
    """Time a micro-batch, forward and backward, and an update, of the model that train.py makes, on random tokens. MFU
    is the micro-batch's alone; then follows the rate of a whole step on one GPU."""
    config.check_batch(1)
    with torch.device(device):
        model = Llama(config, dtype)
    planned = sum(memory_of(model, machine.total_memory(device) if device.type == "cuda" else None).values())
    optimizers = make_optimizers(model, config)
    compile_model(model, config)
    batch = torch.randint(config.vocab_size, (config.micro_batch_size, config.seq_len + 1), device=device)

    def micro_batch():
        model(batch[:, :-1], batch[:, 1:]).backward()

    def clip_and_update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        update(optimizers, lr=0.0)  # the weights stay as they are

    times = medians({"micro-batch": micro_batch, "update": clip_and_update}, seconds)
    peak_memory, peak = machine.peak_memory(device), machine.peak_flops(device, dtype)
    tokens = config.micro_batch_size * config.seq_len
    count = config.tokens_per_step // tokens
    flops = model.flops_per_token() * tokens / times["micro-batch"]
    x, weight = (torch.randn(rows, config.dim, device=device).to(dtype) for rows in (tokens, config.ffn_dim))
    matmul = medians({"matmul": partial(F.linear, x, weight)}, seconds)["matmul"]
    rate = 2 * x.numel() * config.ffn_dim / matmul
    figures = {
        "micro-batch, ms": times["micro-batch"] * 1e3,
        "tokens per second": tokens / times["micro-batch"],
        "MFU, %": peak and 100 * flops / peak,
        "share of the matmul rate, %": 100 * flops / rate,
        "matmul rate, TFLOP/s": rate / 1e12,
        "update, ms": times["update"] * 1e3,
        f"tokens/s, {count} per update": config.tokens_per_step / (count * times["micro-batch"] + times["update"]),
        "peak memory, GiB": peak_memory and peak_memory / 2**30,
        "planned memory, GiB": planned / 2**30,
    }
    print(f"{config.activation}: {tokens} tokens per micro-batch in {str(dtype)[6:]}\n")
    for name, figure in figures.items():
        print_row(name, figure)
    with torch.profiler.profile() as profile:
        micro_batch()
        clip_and_update()
    by = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    print("\n" + profile.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=80))


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


def memory_of(model, gpu_memory=80 * 10**9):
    """{part: bytes} of a GPU with `gpu_memory` bytes that trains a compiled model."""
    config, dtype = model.config, model.compute_dtype
    parameters, head = model.num_parameters(), model.lm_head.weight.numel()
    # of those that Muon takes it keeps one moment
    matrices = sum(w.numel() for w in model.matrices()) if config.optimizer == "muon" else 0
    rows = chunk_rows(config.micro_batch_size * config.seq_len, config.vocab_size, gpu_memory)
    return {
        "weights (float32)": 4 * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer (float32 moments)": 8 * parameters - 4 * matrices,
        "kept by the layers for backward": config.n_layers * kept_by_layer(config, dtype),
        # a chunk's logits, whose gradient takes their place; the head's weight and gradient, both cast, and the latter
        # in float32
        "logits and loss": rows * config.vocab_size * dtype.itemsize + head * (2 * dtype.itemsize + 4),
    }


def plan(config, gpus, gpu, mfu):
    """Compute memory and hours of a run, from its config alone."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu must be above 0 and at most 1, not {mfu}")
    config.check_batch(gpus)
    with torch.device("meta"):  # every GPU of the table computes in bfloat16
        model = Llama(config, torch.float32 if config.dtype == "float32" else torch.bfloat16)
    tokens, rows = config.max_steps * config.tokens_per_step, config.micro_batch_size
    micro_batches = config.tokens_per_step // (gpus * rows * config.seq_len)
    hours = tokens * model.flops_per_token() / (gpus * machine.PEAK_FLOPS[gpu] * mfu) / 3600
    print(f"{config.activation}: {model.num_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token")
    print(f"{tokens:,} tokens in {config.max_steps:,} steps of {config.tokens_per_step:,}")
    print(f"{gpus} × {gpu}: {rows} × {config.seq_len} tokens per GPU at once, {micro_batches} times per step\n")
    memory = memory_of(model)
    print_row("memory per GPU", "GiB")
    for part, size in (memory | {"in all": sum(memory.values())}).items():
        print_row(part, size / 2**30)
    print(f"\n{hours:,.1f} hours at {mfu:.0%} of {gpus} × {machine.PEAK_FLOPS[gpu] / 1e12:,.0f} TFLOP/s")


# ---------------------------------------------------------------------------------------------------------------
# Command line


def read_options(argv):
    """(options, Config) of a command line; UserError if it is wrong."""
    parser = Parser("python -m tools.bench")
    parser.add_argument("command", choices=("kernel", "step", "plan"))
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--gpus", type=whole_number, default=8)
    parser.add_argument("--gpu", choices=machine.PEAK_FLOPS, default="H100")
    parser.add_argument("--mfu", type=float, default=0.4)
    options, keys = parser.parse_known_args(argv)
    if all(key.startswith("--") for key in keys):
        keys.append("configs/xielu_1b.py")
    from_file, from_line = Config.read_command(keys)
    return options, Config(**(from_file | from_line))


def bench(argv):
    """Compute or measure what a command line names."""
    options, config = read_options(argv)
    if options.command == "plan":
        return plan(config, options.gpus, options.gpu, options.mfu)
    device = machine.pick_device(config.device)
    dtype = machine.pick_dtype(config.dtype, device)
    machine.be_deterministic(device, config.deterministic)
    xielu.COMPILE = config.compile
    # every activation is a variant of the same functions, and variants beyond this limit would run uncompiled
    torch._dynamo.config.recompile_limit = 64
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{time.strftime('%Y-%m-%d')}, {machine.device_name(device)}, {versions}, commit {machine.git_commit()}")
    {"kernel": kernel, "step": step}[options.command](config, device, dtype, options.seconds)


main = program(bench)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
