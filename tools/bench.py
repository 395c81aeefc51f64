"""Speed and memory, measured here:  python -m tools.bench kernel | step | plan …

    python -m tools.bench kernel                                          the activations alone
    python -m tools.bench step configs/demo.py --activation=xielu,relu2   a whole training step, and its parts
    python -m tools.bench plan configs/xielu_1b.py --gpus=8               memory and hours, without a GPU

Everything that is compared is measured in one run, in turns, after a warm-up; the figure is the median of the rounds.
Besides --KEY=VALUE of train.py (`step`, `plan`), there are

    --rounds=10           turns that each candidate gets
    --tokens=20480        (kernel) rows of 9216; default 20480 on a GPU, 1820 on a CPU: 16.8 million elements
    --gpus=8 --gpu=H100 --mfu=0.4    (plan) how many of which, and the share of its peak that they reach
    --json=FILE           where the figures go besides the table; default out/bench/kernel.json, …
"""

import functools
import json
import math
import platform
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train
from activations import get_activation
from data import Corpus, UserError
from model import LOGITS_AT_ONCE, Linear, Llama, apply_rope, causal_attention
from tools.command import run_command
from xielu import XIELU, xielu_fused, xielu_inverted, xielu_reference

# ---------------------------------------------------------------------------------------------------------------
# Measuring


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(function, device):
    """(time that function takes until the device is done, what it returns)."""
    synchronize(device)
    began = time.perf_counter()
    result = function()
    synchronize(device)
    return time.perf_counter() - began, result


def medians(jobs, device, rounds):
    """{name: median seconds} of {name: function}, taken in turns after two rounds of warm-up."""
    times = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            elapsed, _ = seconds(job, device)
            if number >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def forward_backward(function, inputs, gradient):
    """Two functions of no argument: function(*inputs), and that with the gradient of all that is trained in it."""

    def both():
        y = function(*inputs)
        torch.autograd.grad(y, [*inputs, *getattr(function, "scalars", [])], gradient)

    return lambda: function(*inputs), both


def bytes_kept(function, inputs):
    """Bytes that autograd keeps for the backward pass, each memory counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(*inputs)
    return sum(kept.values()), y


def matmul_rate(device, dtype):
    """A function that multiplies two matrices, and its FLOPs."""
    size = (4096, 1024, 1024) if device.type == "cpu" else (8192, 8192, 8192)
    a = torch.randn(size[0], size[1], device=device, dtype=dtype)
    b = torch.randn(size[2], size[1], device=device, dtype=dtype)
    return lambda: a @ b.T, 2 * math.prod(size)


def about(device):
    """What a figure needs to be believed: machine, versions, commit, date."""
    return {
        "device": train.device_name(device),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": train.git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
    }


def print_table(rows):
    """Print a list of dicts of text, all with the same keys, as aligned columns."""
    lines = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        first, *others = (text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths)))
        print("  ".join([first, *others]).rstrip())
    print()


# ---------------------------------------------------------------------------------------------------------------
# kernel


def with_scalars(function, device):
    """function(x) of an xIELU formula on the scalars of a fresh module."""
    module = XIELU().to(device)

    def apply(x):
        return function(x, module.alpha_p, module.alpha_n)

    apply.scalars = [module.alpha_p, module.alpha_n]
    return apply


def kernel_candidates(device):
    """{name: function}: the versions of xIELU, and the compiled others."""
    candidates = {
        "xielu reference, eager": with_scalars(xielu_reference, device),
        "xielu reference, compiled": with_scalars(torch.compile(xielu_reference, dynamic=False), device),
        "xielu fused": with_scalars(xielu_fused, device),
        "xielu inverted": with_scalars(xielu_inverted, device),
    }
    for name in ("relu2", "gelu", "swiglu"):
        module = get_activation(name).module()
        module.compile(dynamic=False)
        candidates[f"{name}, compiled"] = module
    return candidates


def kernel(options):
    device = train.pick_device(options["device"])
    tokens = options["tokens"] or (20480 if device.type == "cuda" else 1820)
    width = 9216
    result = {"about": about(device), "tokens": tokens, "width": width, "dtypes": {}}
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(tokens, width, device=device).to(dtype)
        target = torch.empty_like(source)
        jobs, moved, kept = {"copy": functools.partial(target.copy_, source)}, {}, {}
        for name, function in kernel_candidates(device).items():
            gated = name.startswith("swiglu")
            shape = (tokens, width * 2 // 3 if gated else width)
            inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2 if gated else 1)]
            gradient = torch.randn(shape, device=device).to(dtype)
            jobs[name, "forward"], jobs[name, "both"] = forward_backward(function, inputs, gradient)
            size = gradient.numel() * dtype.itemsize
            moved[name] = size * (len(inputs) + 1), size * (2 * len(inputs) + 1)  # read and written, each way
            kept[name] = bytes_kept(function, inputs)[0] / (tokens * width)
        times = medians(jobs, device, options["rounds"])
        copied = 2 * source.numel() * dtype.itemsize / times["copy"]
        rows = {}
        for name in moved:
            forward, both = times[name, "forward"], times[name, "both"]
            rates = moved[name][0] / forward, moved[name][1] / (both - forward)
            rows[name] = {
                "forward_ms": forward * 1e3,
                "backward_ms": (both - forward) * 1e3,
                "forward_gb_per_s": rates[0] / 1e9,
                "backward_gb_per_s": rates[1] / 1e9,
                "forward_share_of_copy": rates[0] / copied,
                "backward_share_of_copy": rates[1] / copied,
                "bytes_kept_per_element": kept[name],
            }
        both = {name: times[name, "both"] for name in moved}
        ratios = {
            "eager reference / fused": both["xielu reference, eager"] / both["xielu fused"],
            "compiled reference / fused": both["xielu reference, compiled"] / both["xielu fused"],
            "fused / relu2": both["xielu fused"] / both["relu2, compiled"],
            "fused / swiglu": both["xielu fused"] / both["swiglu, compiled"],
            "inverted / fused": both["xielu inverted"] / both["xielu fused"],
        }
        key = str(dtype)[6:]
        result["dtypes"][key] = {"copy_gb_per_s": copied / 1e9, "activations": rows, "ratios": ratios}
        print(f"{key}, {tokens} × {width}, copy {copied / 1e9:.1f} GB/s, {device}")
        print_table(
            [
                {
                    "activation": name,
                    "forward ms": f"{row['forward_ms']:.2f}",
                    "GB/s": f"{row['forward_gb_per_s']:.1f}",
                    "of copy": f"{row['forward_share_of_copy']:.0%}",
                    "backward ms": f"{row['backward_ms']:.2f}",
                    "GB/s ": f"{row['backward_gb_per_s']:.1f}",
                    "of copy ": f"{row['backward_share_of_copy']:.0%}",
                    "kept B/element": f"{row['bytes_kept_per_element']:.2f}",
                }
                for name, row in rows.items()
            ]
        )
        print("forward + backward: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), "\n")
    return result


# ---------------------------------------------------------------------------------------------------------------
# step


class Candidate:
    """A model with its optimizer and batch, ready to take training steps."""

    def __init__(self, config, device, dtype):
        self.config, self.device = config, device
        with torch.device(device):
            self.model = Llama(train.check(config, 1), dtype, config.seed)
        self.model.to(device)
        if config.compile and train.can_compile(device.type):
            self.model.compile_parts()
        self.optimizer = train.make_optimizer(self.model, config)
        rows = config.tokens_per_step // config.seq_len
        self.corpus = None
        if Path(config.data).is_dir():
            self.corpus = Corpus(config.data, "train", config.seq_len, config.vocab_size)
            batch = torch.from_numpy(self.corpus.batch(config.seed, 0, rows))
        else:
            batch = torch.randint(config.vocab_size, (rows, config.seq_len + 1))
        self.batch = batch.to(device)

    def step(self):
        train.compute_gradient(self.model, self.batch, self.config)
        train.update(self.optimizer, self.config.lr)
        self.optimizer.zero_grad()

    def move(self, device):
        """Off the GPU while another one is measured, and back on it."""
        self.model.to(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                state[name] = value.to(device)


def parts_of_step(candidate, dtype, rounds):
    """{part: seconds of a step}: each part of the model timed on its own, compiled as the step is, at its shapes,
    times how often a step needs it. What the parts overlap or leave out is the step's rest."""
    model, config, device = candidate.model, candidate.config, candidate.device
    B, T, C = config.micro_batch_size, config.seq_len, config.dim
    compiled = config.compile and train.can_compile(device.type)

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def job(function, *inputs, compiled=compiled, scalars=()):
        call = torch.compile(function, dynamic=False) if compiled else function
        gradient = torch.randn_like(call(*inputs))
        return lambda: torch.autograd.grad(call(*inputs), [*inputs, *scalars], gradient)

    layer = model.layers[0]
    D = layer.self_attn.head_dim
    cos, sin = model.cos[:T], model.sin[:T]
    q, k = random(B, config.n_heads, T, D), random(B, config.n_kv_heads, T, D)
    hidden = [random(B, T, layer.mlp.up_proj.weight.shape[0]) for _ in range(2 if layer.mlp.gate_proj else 1)]
    x = random(B, T, C)
    targets = torch.zeros(B, T, dtype=torch.long, device=device)
    micro = len(candidate.batch) // B
    L = config.n_layers * micro
    mlp, norm = layer.mlp, layer.input_layernorm
    # {name: (part, how often a step calls it, function)}
    jobs = {
        "attention": ("attention", L, job(causal_attention, q, k, random(*k.shape))),
        "act_fn": ("activation", L, job(mlp.act_fn, *hidden, scalars=list(mlp.act_fn.parameters()))),
        "norm": ("norm and rope", 2 * L + micro, job(norm, x, scalars=[norm.weight])),
        "rope of q": ("norm and rope", L, job(lambda q: apply_rope(q, cos, sin), q)),
        "rope of k": ("norm and rope", L, job(lambda k: apply_rope(k, cos, sin), k)),
    }
    linears = [module for module in model.layers.modules() if isinstance(module, Linear)]
    by_shape = {tuple(linear.weight.shape): linear for linear in linears}
    for shape, linear in by_shape.items():
        count = sum(tuple(other.weight.shape) == shape for other in linears)
        call = job(linear, random(B, T, shape[1]), compiled=False, scalars=[linear.weight])
        jobs[f"matmul {shape}"] = ("matmul", count * micro, call)

    def loss():
        torch.autograd.grad(model.loss(x, targets, "mean"), [x, model.lm_head.weight])

    def optimizer():
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        candidate.optimizer.step()

    jobs["loss"] = ("loss", micro, loss)
    jobs["optimizer"] = ("optimizer", 1, optimizer)
    if candidate.corpus:
        jobs["data"] = ("data (hidden)", 1, lambda: candidate.corpus.batch(config.seed, 1, len(candidate.batch)))
    times = medians({name: function for name, (_, _, function) in jobs.items()}, device, rounds)
    parts = Counter()
    for name, (part, count, _) in jobs.items():
        parts[part] += count * times[name]
    return dict(parts)


def peak_memory(device, reset=False):
    """Most bytes used since the last reset: of the GPU, or of this whole process on Linux; else None."""
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


def step(options, argv):
    from_file, keys = train.read_config(argv)
    base = replace(from_file, **keys)
    names = options["activation"].split(",") if options["activation"] else [base.activation]
    device = train.pick_device(base.device)
    dtype = train.pick_dtype(base.dtype, device)
    train.be_deterministic(device)
    swap = device.type != "cpu" and len(names) > 1  # a GPU holds the one that is measured alone
    candidates, first_step = {}, {}
    for name in names:
        candidates[name] = Candidate(replace(base, activation=name), device, dtype)
        first_step[name], _ = seconds(candidates[name].step, device)
        print(f"{name}: first step {first_step[name]:.1f} s" + (", compiling" if base.compile else ""), flush=True)
        if swap:
            candidates[name].move("cpu")
    multiply, flops = matmul_rate(device, dtype)
    times, peaks, matmul = {name: [] for name in names}, {}, []
    for _ in range(options["rounds"]):
        matmul.append(medians({"matmul": multiply}, device, 3)["matmul"])
        for name, candidate in candidates.items():
            candidate.move(device)
            candidate.step()
            peak_memory(device, reset=True)
            times[name] += [seconds(candidate.step, device)[0] for _ in range(2)]
            peaks[name] = peak_memory(device)
            if swap:
                candidate.optimizer.zero_grad()
                candidate.move("cpu")
    own = flops / statistics.median(matmul)
    peak = train.peak_flops(device, dtype)
    result = {"about": about(device), "config": asdict(base), "dtype": str(dtype)[6:], "own_matmul_flops": own}
    rows, result["activations"] = [], {}
    for name, candidate in candidates.items():
        median = statistics.median(times[name])
        achieved = candidate.model.flops_per_token() * base.tokens_per_step / median
        row = {
            "parameters": candidate.model.num_parameters(),
            "step_s": median,
            "first_step_s": first_step[name],
            "tokens_per_s": base.tokens_per_step / median,
            "model_flops": achieved,
            "share_of_own_matmul": achieved / own,
            "mfu": achieved / peak if peak else None,
            "peak_memory_bytes": peaks[name],
        }
        candidate.move(device)
        row["parts_s"] = parts_of_step(candidate, dtype, options["rounds"])
        row["parts_s"]["rest"] = median - sum(s for part, s in row["parts_s"].items() if "hidden" not in part)
        if swap:
            candidate.move("cpu")
        result["activations"][name] = row
        rows.append(
            {
                "activation": name,
                "s/step": f"{median:.3f}",
                "tokens/s": f"{row['tokens_per_s']:,.0f}",
                "GFLOP/s": f"{achieved / 1e9:,.0f}",
                "of own matmul": f"{row['share_of_own_matmul']:.1%}",
                "mfu": f"{row['mfu']:.1%}" if peak else "-",
                "peak memory": f"{peaks[name] / 2**20:,.0f} MiB" if peaks[name] else "-",
            }
        )
    print(f"\n{result['dtype']} on {train.device_name(device)}, own matmul {own / 1e9:,.0f} GFLOP/s")
    print_table(rows)
    print("where the time goes, each part timed on its own, as a share of the step:")
    shares = [
        {"model": name} | {part: f"{s / row['step_s']:.1%}" for part, s in row["parts_s"].items()}
        for name, row in result["activations"].items()
    ]
    print_table(shares)
    if len(names) > 1:
        first = result["activations"][names[0]]["tokens_per_s"]
        result["tokens_per_s_over_first"] = {n: result["activations"][n]["tokens_per_s"] / first for n in names}
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in result["tokens_per_s_over_first"].items())
        print(f"tokens per second over those of {names[0]}: {ratios}\n")
    return result


# ---------------------------------------------------------------------------------------------------------------
# plan


def kept_per_token(config, itemsize):
    """Bytes that one compiled layer keeps for its backward pass, a token; a test holds it against autograd's count."""
    C, M = config.dim, config.mlp_dim
    qkv = C + 2 * config.n_kv_heads * config.head_dim
    # the layer's input, both norms' outputs, what attention adds to the residual, and attention's output twice: as
    # its kernel and as o_proj want it
    narrow = 6 * C
    if config.activation_memory == "inverted":
        wide = M * itemsize + M / 8  # the output and the bits
    else:
        wide = (3 if config.gated else 2) * M * itemsize  # the activation's inputs and its output
    return (narrow + qkv) * itemsize + wide + 4 * (config.n_heads + 2)  # attention's log-sums, norms' 1/rms


def plan(options, argv):
    gpus, gpu, mfu = options["gpus"], options["gpu"], options["mfu"]
    if gpu not in train.PEAK_FLOPS:
        raise UserError(f"gpu must be one of {', '.join(train.PEAK_FLOPS)}, not {gpu!r}")
    if gpus < 1 or not 0 < mfu <= 1:
        raise UserError("gpus must be at least 1, and mfu above 0 and at most 1")
    from_file, keys = train.read_config(argv)
    config = replace(from_file, **keys)
    model_config = train.check(config, gpus)
    with torch.device("meta"):
        model = Llama(model_config)
    itemsize = 4 if config.dtype == "float32" else 2  # every GPU of the table computes in bf16
    parameters, flops = model.num_parameters(), model.flops_per_token()
    tokens = config.micro_batch_size * config.seq_len  # on a GPU at once
    linear = sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, Linear))
    logits = min(tokens * config.vocab_size, max(LOGITS_AT_ONCE, config.vocab_size))
    head = model.lm_head.weight.numel()
    chunked = tokens * config.vocab_size > LOGITS_AT_ONCE
    memory = {
        "weights (float32)": 4 * parameters,
        "gradients (float32)": 4 * parameters,
        "optimizer (two float32 moments)": 8 * parameters,
        "weights cast for the matmuls": linear * itemsize if itemsize < 4 else 0,
        "activations kept for backward": tokens * config.n_layers * kept_per_token(model_config, itemsize),
        # a chunk's logits and their gradient, in float32 and in the compute dtype; the head's summed gradient
        "logits and loss": logits * (4 + 2 * itemsize) + (8 if chunked else 4) * head,
    }
    total_tokens = config.max_steps * config.tokens_per_step
    hours = total_tokens * flops / (gpus * train.PEAK_FLOPS[gpu] * mfu) / 3600
    print(f"{config.activation}: {parameters:,} parameters, {flops:,} FLOPs a token")
    print(f"{total_tokens:,} tokens in {config.max_steps:,} steps of {config.tokens_per_step:,}")
    rounds = config.tokens_per_step // (gpus * tokens)
    print(f"{gpus} × {gpu}: {config.micro_batch_size} × {config.seq_len} tokens a GPU at once, {rounds} times a step\n")
    rows = [{"memory of a GPU": part, "GiB": f"{size / 2**30:.2f}"} for part, size in memory.items()]
    print_table([*rows, {"memory of a GPU": "in all", "GiB": f"{sum(memory.values()) / 2**30:.2f}"}])
    print(f"{hours:,.1f} hours at {mfu:.0%} of {gpus} × {train.PEAK_FLOPS[gpu] / 1e12:,.0f} TFLOP/s")
    return {
        "config": asdict(config),
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "parameters": parameters,
        "flops_per_token": flops,
        "flops": total_tokens * flops,
        "memory_bytes": memory,
        "hours": hours,
    }


# ---------------------------------------------------------------------------------------------------------------


# {command: {option: default}}, besides --json
OPTIONS = {
    "kernel": {"device": "auto", "tokens": 0, "rounds": 10},
    "step": {"activation": "", "rounds": 5},
    "plan": {"gpus": 8, "gpu": "H100", "mfu": 0.4},
}


def read_options(command, argv):
    """({option: value} of the command, the other arguments, the path for the figures)."""
    options, others = dict(OPTIONS[command]), []
    path = f"out/bench/{command}.json"
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if name == "json" and value:
            path = value
        elif name in options:
            kind = type(options[name])
            try:
                options[name] = kind(value)
            except ValueError:
                raise UserError(f"{name} must be {train.KINDS[kind]}, not {value!r}") from None
        else:
            others.append(argument)
    if options.get("rounds", 1) < 1 or options.get("tokens", 0) < 0:
        raise UserError("rounds and tokens must be at least 1")
    if command == "kernel" and others:
        raise UserError(f"unknown option {others[0]}: see python -m tools.bench --help")
    return options, others, Path(path)


def bench(argv):
    """Measure what a command line names, and write the figures."""
    if not argv or argv[0] not in OPTIONS:
        raise UserError(f"say what to measure: one of {', '.join(OPTIONS)}; see python -m tools.bench --help")
    options, others, path = read_options(argv[0], argv[1:])
    if argv[0] == "kernel":
        result = kernel(options)
    elif argv[0] == "step":
        result = step(options, others)
    else:
        result = plan(options, others)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"figures: {path}")


def main(argv):
    return run_command(bench, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
