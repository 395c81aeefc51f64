"""What a run runs on: device, dtype, the processes that torchrun started, and what stops them all together."""

import contextlib
import os
import platform
import signal
import struct
import subprocess
import sys
import timeit
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock  # torch needs it too
from torch.nn.attention import SDPBackend

from plumbing.command import UserError
from plumbing.config import ROOT

# Without huge pages (on Linux), an elementwise pass over fresh memory of a CPU spends half its time on page faults.
# PyTorch reads this once, before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# torchrun tells each process who it is
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

# The processes of a node share its cores, but PyTorch would start a compile worker per core for each of them
if LOCAL_WORLD > 1:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, max(1, (os.cpu_count() or 1) // LOCAL_WORLD))))

# How long a process waits for the others: the first may write or check a checkpoint of 36 GB (the 3B model's)
PATIENCE = timedelta(minutes=30)


def say(text):
    """Print a line, from the first process only."""
    if RANK == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Device


def pick_device(name):
    """The torch.device called `name`, for this process; auto: CUDA, else Apple's GPU, else the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(name for name in available if available[name])
    if not available.get(name):
        raise UserError(f"device={name} is not available here: use --device=cpu, or leave it auto")
    if name == "cuda" and LOCAL_WORLD > torch.cuda.device_count():
        raise UserError(f"{LOCAL_WORLD} processes need as many GPUs, and this node has {torch.cuda.device_count()}")
    if name == "mps" and WORLD > 1:
        raise UserError("device=mps runs one process: start train.py with python, or use --device=cpu")
    return torch.device("cuda", LOCAL_RANK) if name == "cuda" else torch.device(name)


def pick_dtype(name, device, tell=lambda text: None):
    """torch.float32 or torch.bfloat16, the same for all processes. auto: bfloat16 on a GPU that computes in it
    natively, or on a CPU where it is clearly faster. Apple's GPUs have not been measured and get float32. tell(text) is
    called with what auto takes and why."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        choice = faster_dtype()
    elif device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        choice = torch.bfloat16, "this GPU computes in it natively"
    else:
        choice = torch.float32, "this GPU is not known to compute natively in bfloat16"
    dtype, reason = gathered(choice)[0]  # the first process decides
    tell(f"dtype=auto takes {str(dtype)[6:]}: {reason}")
    return dtype


def linear_speed(dtype):
    """FLOP/s of a linear layer on this CPU, timed."""
    x, weight = torch.randn(4096, 384).to(dtype), torch.randn(1536, 384).to(dtype)
    return 2 * x.numel() * len(weight) / min(timeit.repeat(lambda: F.linear(x, weight), repeat=6, number=1))


def faster_dtype():
    """(dtype, reason) by timing a linear layer on this CPU. No flag tells: with AVX512-BF16 alone, bfloat16 is
    several times as fast as float32 on an AMD EPYC, and slower on an Intel Xeon (results/README.md)."""
    speeds = {dtype: linear_speed(dtype) for dtype in (torch.float32, torch.bfloat16)}
    summary = " and ".join(f"{speed / 1e9:.0f} GFLOP/s in {str(dtype)[6:]}" for dtype, speed in speeds.items())
    # if linear layers gain less than this, casts and everything else in a step eat it up
    faster = speeds[torch.bfloat16] >= 1.3 * speeds[torch.float32]
    return torch.bfloat16 if faster else torch.float32, f"a linear layer computes {summary} here"


# Dense bf16 peak in FLOP/s by what the device's name contains (from the makers' data sheets); the first match counts
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,  # GH200 too
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device, dtype):
    """The device's peak in FLOP/s, or None if it is not in the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name(device)), None)


def total_memory(device):
    """Bytes of memory of this device; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def peak_memory(device):
    """Most bytes that tensors on this GPU have taken so far; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def attention_backend(config, device, dtype):
    """PyTorch's kernel for attention of this shape here: "flash", "efficient", "cudnn", "math" or "unknown"."""
    rows, length, width = config.micro_batch_size, config.seq_len, config.head_dim
    q = torch.empty(rows, config.n_heads, length, width, device=device, dtype=dtype, requires_grad=True)
    k = torch.empty(rows, config.n_kv_heads, length, width, device=device, dtype=dtype, requires_grad=True)
    try:
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=config.n_heads != config.n_kv_heads)
    except (AttributeError, NotImplementedError):  # it is private to torch, and not there for every device
        return "unknown"
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def be_deterministic(device, wanted=False):
    """Give the same losses, bit for bit, every time: always on a CPU, where it costs nothing (compiled code does not do
    so by itself), elsewhere if wanted."""
    # bf16 products are added up in float32, even if a sum is split
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if device.type == "cpu" or wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def seed_randomness(device, numbers):
    """Set PyTorch's random streams by a tuple of whole numbers. (torch.manual_seed would load the compiler.)"""
    torch.default_generator.manual_seed(hash(numbers))
    if device.type == "cuda":
        torch.cuda.manual_seed(hash(numbers))


def mend_compiler_cache():
    """Remove the libraries in the compiler's cache that a kill has cut off. PyTorch would take them for whole ones, and
    fail at every later start."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # loads the compiler

    cache = Path(cache_dir())
    for path in cache.glob("*/*.so"):
        with contextlib.suppress(OSError, NotImplementedError):  # it is gone, or another user's; a disk has no locks
            if is_cut_off(path):
                with FileLock(cache / "locks" / f"{path.name.split('.')[0]}.lock"):
                    if is_cut_off(path):
                        path.unlink()


def is_cut_off(library):
    """Whether a file lacks what a linker writes last: its header and, in an ELF file, a table to which that points."""
    with open(library, "rb") as file:
        head = file.read(64)
    if head[:4] != b"\x7fELF":
        return not any(head)
    start, size, count = struct.unpack("<40xQ10xHH2x", head.ljust(64))
    return start + size * count > library.stat().st_size


def git_commit():
    """The commit of this code, followed by "-dirty" if files differ from it; None outside a git checkout."""
    describe = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    with contextlib.suppress(OSError):  # git is not installed
        return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


# ---------------------------------------------------------------------------------------------------------------
# Processes


def join_processes(device, run):
    """Connect to the other processes; UserError unless `run` (folder, dtype, steps) is the same on all.

    torchrun's store survives a restart, with the addresses of dead processes in it, so each attempt gets a part of the
    store to itself. (Each node counts only its own restarts, so docs/running.md has several nodes make a new store each
    time.)
    """
    if WORLD == 1:
        return
    backend, gpu = "gloo", None
    if device.type == "cuda":
        backend, gpu = "nccl", device
        torch.cuda.set_device(gpu)
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"attempt{RESTARTS}", store)
    dist.init_process_group(backend, timeout=PATIENCE, device_id=gpu, store=store, rank=rank, world_size=world)
    if any(other != run for other in gathered(run)):
        raise UserError(f"the processes see different runs in {run[0]}: it must be on a disk that all nodes share")


def gathered(value):
    """The values of all processes, as a list in the order of their ranks."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------------------------
# Stopping, all processes together

# Why this process wants to stop: the number of a signal, or an error that it alone may have met; 0 if it does not. It
# must not end in the middle of an exchange with the others, so it continues until they `agree`.
stop = 0
PARENT = os.getppid()


def note_signal(number, frame):
    """Signal handler: remember the signal; a second one ends a lone process at once."""
    global stop
    if stop and WORLD == 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    stop = number


@contextlib.contextmanager
def errors_noted():
    """An error inside, such as a disk that cannot be read, is left for `agree` to raise."""
    global stop
    try:
        yield
    except (UserError, OSError) as error:
        stop = error


def agree(values, device):
    """(each value summed over all processes, whether a signal told one of them to stop): the same on each. If one has
    noted an error, all raise it."""
    global stop
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT:  # torchrun was killed
        stop = stop or signal.SIGTERM
    error = stop if isinstance(stop, Exception) else None
    total = torch.tensor([*values, bool(stop), error is not None], dtype=torch.float64)
    if WORLD > 1:
        total = total.to(device)
        dist.all_reduce(total)
    *total, stopping, failed = total.tolist()
    if failed:
        stop, messages = 0, gathered(error and (str(error) or type(error).__name__))
        raise UserError(next(filter(None, messages)))
    return total, bool(stopping)


def end_with(main):
    """Run main(arguments of the command line) with signals noted, and end this process with its status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    if WORLD > 1:
        # End without taking the process group apart: its destructor joins gloo's thread while it holds Python's global
        # lock, and that thread may be waiting for the lock
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
