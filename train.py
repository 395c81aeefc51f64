"""Train a Llama:  python train.py configs/demo.py --key=value …

One process, or N on one node, or many nodes:

    python train.py configs/demo.py
    torchrun --nproc_per_node=8 train.py configs/xielu_1b.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py configs/xielu_1b.py

A config is a short Python file of assignments (it is run: it can import another, and anything else). Defaults <
config file < command line. The run goes to out/NAME: config.json, log.jsonl and ckpt.pt; --resume continues it.
"""

import difflib
import json
import math
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from activations import get_activation
from data import Corpus, UserError, bits_per_byte, lock_folder, prefetched, read_meta, validation_batches
from model import IGNORE, Llama, ModelConfig
from xielu import can_compile

ROOT = Path(__file__).resolve().parent
# torchrun tells each process who it is
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

# A step whose loss or gradient is not finite is skipped; after this many in a row the run stops.
BAD_STEPS = 10
# A loss this many times its running average is called a spike.
SPIKE = 1.5

# ---------------------------------------------------------------------------------------------------------------
# Config


def key(default, help, within=(-math.inf, math.inf), choices=None):
    """A config key; its number must lie in low ≤ number < high, or its text among the choices."""
    return field(default=default, metadata={"help": help, "within": within, "choices": choices})


COUNT = (1, math.inf)
NOT_NEGATIVE = (0, math.inf)


@dataclass(frozen=True)
class Config:
    """Every key of a run, its default and what it means."""

    # model
    activation: str = key(ModelConfig.activation, "a name from activations.py, or derived/NAME.py")
    activation_memory: str = key(
        ModelConfig.activation_memory,
        "inverted: xielu keeps its output for the backward pass, which the next layer keeps anyway, not its input",
        choices=("standard", "inverted"),
    )
    dim: int = key(ModelConfig.dim, "width of the residual stream", COUNT)
    n_layers: int = key(ModelConfig.n_layers, "number of blocks", COUNT)
    n_heads: int = key(ModelConfig.n_heads, "attention heads", COUNT)
    n_kv_heads: int = key(ModelConfig.n_kv_heads, "key and value heads; fewer than n_heads for grouped queries", COUNT)
    ffn_dim: int = key(ModelConfig.ffn_dim, "width of an ungated MLP; a gated activation gets 2/3 of it", COUNT)
    vocab_size: int = key(ModelConfig.vocab_size, "rows of the embedding; at least the tokenizer's", COUNT)
    rope_theta: float = key(ModelConfig.rope_theta, "base of the rotary frequencies", COUNT)
    norm_eps: float = key(ModelConfig.norm_eps, "epsilon of RMSNorm", NOT_NEGATIVE)
    tie_embeddings: bool = key(ModelConfig.tie_embeddings, "one matrix for embedding and output head")
    init_std: float = key(ModelConfig.init_std, "standard deviation of the initial weights", NOT_NEGATIVE)
    # data
    data: str = key("data/stdlib", "folder of token shards (prepare_data.py)")
    seq_len: int = key(ModelConfig.seq_len, "tokens in a sequence", COUNT)
    tokens_per_step: int = key(16384, "tokens in an update, whatever the number of processes", COUNT)
    micro_batch_size: int = key(16, "sequences a process computes at once; the rest is accumulated", COUNT)
    # schedule and optimizer
    max_steps: int = key(1000, "updates in all", COUNT)
    lr: float = key(1e-3, "peak learning rate", NOT_NEGATIVE)
    warmup_steps: int = key(100, "updates of linear warm-up", NOT_NEGATIVE)
    decay_steps: int = key(200, "last updates, decaying by 1 - sqrt to 0", NOT_NEGATIVE)
    weight_decay: float = key(0.1, "of AdamW, on everything but the activation scalars", NOT_NEGATIVE)
    beta1: float = key(0.9, "of AdamW", (0, 1))
    beta2: float = key(0.95, "of AdamW", (0, 1))
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 for no clipping", NOT_NEGATIVE)
    seed: int = key(42, "of the initial weights and the data order", (0, 2**53))
    # machine
    device: str = key("auto", "auto takes the best there is", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = key(
        "auto", "auto takes bfloat16 where the hardware computes in it", choices=("auto", "float32", "bfloat16")
    )
    compile: bool = key(True, "compile the model; the first step takes longer, the others are faster")
    deterministic: bool = key(False, "the same losses, bit for bit, on CUDA too, and slower; a CPU always does so")
    # run
    out: str = key("", "folder of the run; default out/NAME, after the config file")
    eval_every: int = key(100, "steps between validations (also at the first and the last step)", COUNT)
    eval_tokens: int = key(1_000_000, "validation tokens to predict, at most all", COUNT)
    log_every: int = key(10, "steps between lines of the log", COUNT)
    checkpoint_every: int = key(100, "steps between checkpoints (also at the last step)", COUNT)
    keep_checkpoints: int = key(1, "ckpt.pt is the newest; with 3, say, the two before it are kept as well", COUNT)
    resume: bool = key(False, "continue the run in `out`, from scratch if it has no checkpoint")


# What --resume may not change: another model, or another sequence of batches, is another run. (The activation's
# memory is how the same model is computed.)
FIXED = [item.name for item in fields(ModelConfig) if item.name != "activation_memory"]
FIXED += ["data", "seed", "tokens_per_step"]

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def typed(name, value):
    """A config value in the type of its key, from Python or from the text of the command line; or UserError."""
    kind = Config.__dataclass_fields__[name].type
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return kind(number)
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise UserError(f"{name} must be {KINDS[kind]}, not {value!r}")


def typed_keys(values, where):
    """{key: typed value} of a dict of raw ones; an unknown key is a UserError that names the nearest."""
    known = [item.name for item in fields(Config)]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "train.py --help lists all keys"
            raise UserError(f"unknown key {name!r} {where}: {hint}")
    return {name: typed(name, value) for name, value in values.items()}


def run_config_file(path):
    """{key: value} that a config file assigns."""
    if not Path(path).is_file():
        nearby = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py")))
        raise UserError(f"there is no config {path}: there are {nearby}")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        values = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(f"config {path} does not run: {type(error).__name__}: {reason[0]}") from None
    helper = (type(sys), type, type(len), type(typed))  # modules, classes and functions that a config may import
    values = {name: value for name, value in values.items() if name[0] != "_" and not isinstance(value, helper)}
    return typed_keys(values, f"in {path}")


def read_config(argv):
    """(Config of defaults and file, {key: value} of the command line) of `CONFIG.py --key=value …`."""
    files = [argument for argument in argv if not argument.startswith("--")]
    options = {}
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            options[name] = value if equals else True
    options = typed_keys(options, "on the command line")
    if not options.get("out", True):
        del options["out"]
    if len(files) != 1:
        raise UserError(f"give one config file, as in train.py configs/demo.py, not {' '.join(files) or 'none'}")
    config = replace(Config(out=f"out/{Path(files[0]).stem}"), **run_config_file(files[0]))
    return config, options


def resumed_config(saved, from_file, options):
    """The config to resume with: the saved one, changed by what the config file says now and did not say then, and
    by the command line. UserError if that changes a FIXED key."""
    now = asdict(from_file)
    changes = {name: value for name, value in now.items() if value != saved["from_file"].get(name, value)} | options
    for name in FIXED:
        if name in changes and changes[name] != saved["config"][name]:
            raise UserError(
                f"--resume cannot change {name} from {saved['config'][name]!r} to {changes[name]!r}: "
                f"leave it, or start a new run with another --out"
            )
    return Config(**(now | saved["config"] | changes))


def check(config, world):
    """The ModelConfig of a config; UserError if its values cannot make a run on `world` processes."""
    for item in fields(Config):
        value, choices = getattr(config, item.name), item.metadata["choices"]
        low, high = item.metadata["within"]
        if choices and value not in choices:
            raise UserError(f"{item.name} must be one of {', '.join(choices)}, not {value!r}")
        if item.type in (int, float) and not low <= value < high:
            limits = f"at least {low}" + (f" and below {high}" if high < math.inf else "")
            raise UserError(f"{item.name} must be {limits}, not {value}")
    if config.warmup_steps + config.decay_steps > config.max_steps:
        raise UserError(
            f"warmup_steps={config.warmup_steps} and decay_steps={config.decay_steps} do not fit into "
            f"max_steps={config.max_steps}: lower them, or raise max_steps"
        )
    try:
        model_config = ModelConfig(**{item.name: getattr(config, item.name) for item in fields(ModelConfig)})
    except ValueError as error:
        raise UserError(str(error)) from None
    check_batch(config, world)
    return model_config


def check_formula(checkpoint, config):
    """UserError if the activation of this name is no longer the one with which a run began."""
    formula = get_activation(config.activation).formula
    began = checkpoint.get("formula", formula)  # which imported runs do not have
    if began != formula:
        raise UserError(f"{config.activation} has changed since the run began: it was {began}, now {formula}")


def check_batch(config, world):
    """UserError, with what would divide, unless tokens_per_step is a whole number of micro-batches on each process."""
    share = config.seq_len * world  # tokens of one sequence on every process
    if config.tokens_per_step % (share * config.micro_batch_size) == 0:
        return
    if config.tokens_per_step % share == 0:
        sequences = config.tokens_per_step // share
        fits = [size for size in range(1, min(sequences, 256) + 1) if sequences % size == 0]
        hint = f"micro_batch_size may be {', '.join(map(str, fits))}"
    else:
        unit = share * config.micro_batch_size
        below = config.tokens_per_step // unit * unit
        hint = f"the nearest tokens_per_step is {f'{below} or ' if below else ''}{below + unit}"
    raise UserError(
        f"tokens_per_step={config.tokens_per_step} does not divide into micro_batch_size={config.micro_batch_size} "
        f"sequences of {config.seq_len} on {world} process(es): {hint}"
    )


def print_help():
    print(__doc__.strip())
    print("\nKeys, with their defaults:\n")
    for item in fields(Config):
        print(f"  --{item.name}={item.default}".ljust(34) + item.metadata["help"])


# ---------------------------------------------------------------------------------------------------------------
# Machine


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


def pick_dtype(name, device):
    """torch.float32 or torch.bfloat16; auto: bfloat16 where the hardware computes in it at full speed. A CPU
    without AMX does not: with AVX512-BF16 alone, a bf16 matmul takes twice as long as a float32 one. Nor do GPUs
    before Ampere, and Apple's nobody has measured here: they get float32, and never float16, which would need its
    loss scaled."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


# Dense bf16 peak in FLOP/s by what the device's name contains (the makers' data sheets); the first match counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,  # GH200 too
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def be_deterministic(device, wanted=False):
    """The same losses, bit for bit, every time: always on a CPU, where it costs nothing (though compiled code does
    not give it by itself), elsewhere if wanted."""
    if device.type == "cpu" or wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_flops(device, dtype):
    """The device's peak in FLOP/s, or None where it is not in the table."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name(device)), None)


def git_commit():
    """The commit of this code, "-dirty" behind it if files differ from it; None outside a git checkout."""

    def git(*arguments):
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------------------------
# Files of a run


def write_atomically(path, write):
    """write(file) under a temporary name, then rename: the file at `path` is always a whole one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


CHECKPOINT_KEYS = {"model", "optimizer", "step", "seconds", "loss_average", "config", "from_file", "data"}


def read_checkpoint(path):
    """What save_checkpoint saved; ValueError with a reason if it is damaged or something else."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums that torch.save wrote
            raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not CHECKPOINT_KEYS <= set(checkpoint):
            raise ValueError("it is no checkpoint of train.py")
        return checkpoint
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(reason[0]) from None


def kept_checkpoints(out):
    """The numbered checkpoints in a run's folder, newest first; ckpt.pt is another name of the first."""
    return sorted(out.glob("ckpt_" + "[0-9]" * 8 + ".pt"), reverse=True)


def load_checkpoint(out):
    """The newest checkpoint of a run, or None if it has none. If it is damaged, a UserError offers the one before."""
    path = out / "ckpt.pt"
    if not path.exists():
        return None
    try:
        return read_checkpoint(path)
    except ValueError as error:
        hint = "delete it to start over"
        for older in kept_checkpoints(out):
            try:
                read_checkpoint(older)
                hint = f"go on from the one before with  cp {older} {path}"
                break
            except ValueError:
                continue
        raise UserError(f"checkpoint {path} cannot be read ({error}): {hint}") from None


def save_checkpoint(out, state, keep):
    """Write ckpt.pt and, to keep several, another name for it by its step; remove those beyond `keep`."""
    write_atomically(out / "ckpt.pt", lambda file: torch.save(state, file))
    if keep > 1:
        numbered = out / f"ckpt_{state['step']:08d}.pt"
        numbered.unlink(missing_ok=True)
        try:
            os.link(out / "ckpt.pt", numbered)
        except OSError:  # a file system without links
            shutil.copy(out / "ckpt.pt", numbered)
    for old in kept_checkpoints(out)[keep if keep > 1 else 0 :]:
        old.unlink()


def read_log(path, step):
    """The lines of a log up to `step`; what is no such line, as a torn last one, is left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["kind"] in ("train", "val", "bad") and record["step"] <= step:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


# ---------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(config, update):
    """Of update 0 … max_steps − 1: linear warm-up, constant, then 1 − sqrt down towards 0. None is wasted at 0."""
    warmup = min(1.0, (update + 1) / max(1, config.warmup_steps))
    decayed = max(0, update - (config.max_steps - config.decay_steps))
    return config.lr * warmup * (1 - math.sqrt(decayed / max(1, config.decay_steps)))


def make_optimizer(model, config):
    """AdamW in one fused kernel; weight decay on everything but the activation scalars, as in the paper."""
    scalars = model.activation_scalars()
    others = [weight for weight in model.parameters() if not any(weight is scalar for scalar in scalars)]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": scalars, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def compute_gradient(model, batch, config):
    """Leave the clipped gradient of the whole batch in the model, from this process's rows (rows, seq_len + 1) of it;
    returns (their mean loss, the norm of the gradient), as floats. Gradients are exchanged once, in the backward of
    the last micro-batch."""
    micro_batches = batch.split(config.micro_batch_size)
    mean_loss = torch.zeros((), device=batch.device)
    for number, micro_batch in enumerate(micro_batches, 1):
        if WORLD > 1:  # DDP looks at this in its forward
            model.require_backward_grad_sync = number == len(micro_batches)
        loss = model(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
        loss.backward()
        mean_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    return mean_loss.item(), norm.item()


def update(optimizer, lr):
    """One step of the optimizer with the gradient that is there."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


@torch.no_grad()
def evaluate(model, corpus, config, device):
    """Mean loss in nats a token over the first eval_tokens validation tokens, each process taking its share; None if a
    signal to stop came meanwhile."""
    total = torch.zeros(3, dtype=torch.float64)  # summed loss, tokens, processes that were told to stop
    batches = validation_batches(corpus, config.eval_tokens, config.micro_batch_size, IGNORE, RANK, WORLD)
    for inputs, targets in batches:
        if stop_signal:
            break
        loss = model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), reduction="sum")
        total += torch.tensor([loss.item(), (targets != IGNORE).sum(), 0], dtype=torch.float64)
    total[2] = bool(stop_signal)
    if WORLD > 1:
        total = total.to(device)
        dist.all_reduce(total)
    loss, tokens, stopped = total.tolist()
    return None if stopped else loss / tokens


def agree(loss, device):
    """(the loss meaned over all processes, the signal that told one of them to stop, or 0), the same on each."""
    if WORLD == 1:
        return loss, stop_signal
    total = torch.tensor([loss / WORLD, bool(stop_signal)], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    loss, stopped = total.tolist()
    return loss, (stop_signal or signal.SIGTERM) if stopped else 0


# The signal that told this process to stop, or 0: the loop looks at it between steps, since it must not end in the
# middle of an exchange with the others.
stop_signal = 0


def ask_to_stop(number, frame):
    """Signal handler: note the signal; a second one ends a lone process at once."""
    global stop_signal
    if stop_signal and WORLD == 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    stop_signal = number


def join_processes(device):
    """Meet the other processes. torchrun's store outlives a restart, with the addresses of the dead in it: so each
    attempt gets a corner of its own."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.PrefixStore(f"attempt{RESTARTS}", dist.TCPStore(address, port, WORLD, is_master=False))
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)


def say(text):
    """Print a line, from the first process alone."""
    if RANK == 0:
        print(text, flush=True)


def format_seconds(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def open_data(config):
    """(training Corpus, validation Corpus, meta or None), checked against the config."""
    meta = read_meta(config.data)
    if meta and meta["vocab_size"] > config.vocab_size:
        raise UserError(
            f"{config.data} was tokenised with {meta['tokenizer']} ({meta['vocab_size']} ids), more than "
            f"vocab_size={config.vocab_size}: raise vocab_size, or prepare the data with a smaller tokenizer"
        )
    corpus = Corpus(config.data, "train", config.seq_len, config.vocab_size)
    validation = Corpus(config.data, "val", config.seq_len, config.vocab_size)
    if corpus.n_sequences < 1:
        raise UserError(f"{config.data} is too short for one sequence of {config.seq_len} tokens: lower seq_len")
    if max(shard.tokens for shard in validation.shards) < 2:
        raise UserError(f"{config.data} has no validation tokens to predict: prepare it with more --val_tokens")
    if meta is None:
        say(f"note: {config.data} has no meta.json, so bits per byte are not known")
    elif config.eval_tokens < meta["splits"]["val"]["tokens"] and meta["tokenizer"] != "bytes":
        say("note: eval_tokens covers a part of the validation split: bits per byte take its mean bytes a token")
    return corpus, validation, meta


def describe_data(corpus, validation, meta):
    """What must not change under a run."""
    tokens = [sum(shard.tokens for shard in split.shards) for split in (corpus, validation)]
    return {"tokenizer": meta["tokenizer"] if meta else None, "train tokens": tokens[0], "val tokens": tokens[1]}


def open_log(out, config, device, records):
    """Write config.json and a log.jsonl of these records into the run's folder, and open that, unbuffered, for more."""
    about = {
        "config": asdict(config),
        "formula": get_activation(config.activation).formula,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "device": device_name(device),
        "commit": git_commit(),
    }
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(out / "config.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
    write_atomically(out / "log.jsonl", lambda file: file.write(lines.encode()))
    return open(out / "log.jsonl", "ab", buffering=0)


def train(from_file, options):
    """Run, or go on with, the training that a config file and a command line describe. Returns the exit status: 0, 3
    where the loss stays other than finite, 128 + signal where a signal stopped it."""
    # What to run
    config = replace(from_file, **options)
    out, resume = Path(config.out), config.resume or RESTARTS > 0
    lock = lock_folder(out) if RANK == 0 and out.exists() else None
    checkpoint = load_checkpoint(out) if resume else None
    if checkpoint:
        config = resumed_config(checkpoint, from_file, options)
    model_config = check(config, WORLD)
    if checkpoint:
        check_formula(checkpoint, config)
    if RANK == 0 and not resume and any((out / name).exists() for name in ("ckpt.pt", "log.jsonl")):
        raise UserError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    start = checkpoint["step"] if checkpoint else 0
    seconds = checkpoint["seconds"] if checkpoint else 0.0  # spent in training steps
    average = checkpoint["loss_average"] if checkpoint else None  # of the loss, over the last 50 steps or so
    saved = checkpoint["step"] if checkpoint else None  # the step of the newest checkpoint
    if start > config.max_steps:
        raise UserError(f"the run in {out} is at step {start}, beyond max_steps={config.max_steps}: raise it")
    records = read_log(out / "log.jsonl", start) if checkpoint else []
    validated = {record["step"] for record in records if record["kind"] == "val"}
    if start == config.max_steps and start in validated:
        say(f"{out} is finished: step {start} of {config.max_steps}")
        return 0

    # What to run it on
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    with torch.device("meta"):
        sizes = Llama(model_config)
    flops_per_token = sizes.flops_per_token()
    say(
        f"{config.activation}: {sizes.num_parameters():,} parameters, {flops_per_token:,} FLOPs a token, "
        f"{config.tokens_per_step:,} tokens a step, {WORLD} process(es) on {device_name(device)} in {str(dtype)[6:]}"
    )
    if config.dtype == "auto":
        reason = "computes" if dtype == torch.bfloat16 else "does not compute"
        say(f"dtype=auto takes {str(dtype)[6:]}: {device.type} {reason} in bf16 at full speed here")
    if device.type == "cpu" and sizes.num_parameters() > 2e8:
        say("note: no GPU is used, and a model of this size wants several")
    corpus, validation, meta = open_data(config)
    data = describe_data(corpus, validation, meta)
    for name, then in (checkpoint["data"] if checkpoint else {}).items():
        if data[name] != then:
            raise UserError(f"{config.data} has changed since the run began: {name} were {then}, now {data[name]}")
    be_deterministic(device, config.deterministic)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        join_processes(device)
        states = [None] * WORLD
        dist.all_gather_object(states, (start, sorted(validated)))
        if states != states[:1] * WORLD:
            raise UserError(f"the processes see different runs in {out}: it must lie on a disk that all nodes share")

    # The model: training goes through `trained`, evaluation and checkpoints use the raw one
    with torch.device(device):
        model = Llama(model_config, dtype, config.seed)
    model.to(device)  # the rotary table, which is made on the CPU
    optimizer = make_optimizer(model, config)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        groups = optimizer.state_dict()["param_groups"]  # of this config, which may have changed
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        del checkpoint
        say(f"resuming {out} at step {start}")
    if config.compile and can_compile(device.type):
        model.compile_parts()
        say("compiling: the first step takes longer")
    trained = model
    if WORLD > 1:
        torch._dynamo.config.optimize_ddp = False  # it would cut each compiled layer up; layers are small enough
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is not in torch 2.11
        trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    # The batches: this process's rows of each, the next one read while a step runs. Every process reads them all,
    # so that a bad token stops all of them alike.
    sequences = config.tokens_per_step // config.seq_len
    rows = slice(RANK * sequences // WORLD, (RANK + 1) * sequences // WORLD)

    def load_batch(step):
        batch = torch.from_numpy(corpus.batch(config.seed, step, sequences)[rows])
        return batch.pin_memory() if device.type == "cuda" else batch

    batches = prefetched(load_batch, range(start, config.max_steps))
    peak = peak_flops(device, dtype)
    recent = []  # seconds of the steps since the last line of the log
    if RANK == 0:
        lock = lock or lock_folder(out)
        log = open_log(out, config, device, records)
    unwritten = bytearray()  # lines of the log that wait for room on the disk

    def write_log(kind, step, **values):
        if RANK:
            return
        # what is not finite is no number in JSON
        values = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        record = {"kind": kind, "step": step, "tokens": step * config.tokens_per_step, "seconds": seconds, **values}
        unwritten.extend(json.dumps(record).encode() + b"\n")
        try:
            while unwritten:
                del unwritten[: log.write(unwritten)]
        except OSError as error:
            say(f"warning: {out}/log.jsonl cannot be written ({error.strerror}); its lines are kept for later")

    def save(step):
        """Write a checkpoint; whether it could be written (processes other than the first believe so)."""
        nonlocal saved
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "loss_average": average,
            "config": asdict(config),
            "from_file": asdict(from_file),
            "data": data,
            "formula": get_activation(config.activation).formula,
        }
        try:
            if RANK == 0:
                os.fsync(log.fileno())  # the log has all lines up to this step
                save_checkpoint(out, state, config.keep_checkpoints)
        except (OSError, RuntimeError) as error:
            # torch puts an error of its own before the system's
            cause = error if isinstance(error, OSError) else error.__context__
            reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
            say(f"warning: no checkpoint at step {step} ({reason}); {newest()}, and training goes on")
            return False
        saved = step
        return True

    def newest():
        return "there is no checkpoint" if saved is None else f"the last checkpoint is that of step {saved}"

    # `step` counts the updates done. Each round evaluates, computes a gradient, saves, then updates: what is saved has
    # shown a finite loss and gradient. The round after the last update only saves and evaluates.
    bad = 0  # steps in a row whose loss or gradient was not finite
    for step in range(start, config.max_steps + 1):
        last = step == config.max_steps
        complete = last and (saved == step or save(step))
        if step not in validated and (step == 0 or last or step % config.eval_every == 0):
            loss = evaluate(model, validation, config, device)
            if loss is not None:
                validated.add(step)
                perplexity = math.exp(min(loss, 700))  # e^709 is the largest float
                bpb = bits_per_byte(loss, meta)
                write_log("val", step, loss=loss, perplexity=perplexity, bits_per_byte=bpb, **model.effective_alphas())
                bpb = "" if bpb is None else f"  bits/byte {bpb:.4f}"
                say(f"step {step}/{config.max_steps}  val loss {loss:.4f}  perplexity {perplexity:.3f}{bpb}")
        if last and step not in validated:
            say(f"stopped at step {step}, checkpoint saved")
            return 128 + (stop_signal or signal.SIGTERM)
        if last:
            break

        began = time.perf_counter()
        batch = next(batches).to(device, non_blocking=True)
        loss, grad_norm = compute_gradient(trained, batch, config)
        loss, stop = agree(loss, device)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and saved != step and (stop or (step > 0 and step % config.checkpoint_every == 0)):
            saving = time.perf_counter()
            save(step)
            began += time.perf_counter() - saving
        if stop:
            say(f"stopped at step {step}, " + ("checkpoint saved" if saved == step else newest()))
            return 128 + stop
        lr = learning_rate(config, step)
        if finite:
            update(optimizer, lr)
        optimizer.zero_grad(set_to_none=WORLD == 1)  # DDP's gradients are views of its buckets, and stay so
        recent.append(time.perf_counter() - began)
        seconds += recent[-1]

        done = step + 1
        bad = 0 if finite else bad + 1
        spike = finite and average is not None and loss > SPIKE * average
        if finite:
            average = loss if average is None else 0.98 * average + 0.02 * loss
        else:
            write_log("bad", done, loss=loss, grad_norm=grad_norm)
            say(f"step {done}/{config.max_steps}  loss {loss:.4f}  grad {grad_norm:.3f}: not finite, update left out")
        if bad == BAD_STEPS:
            say(f"stopped at step {done}: the loss or its gradient was not finite {bad} times in a row; {newest()}")
            return 3
        if finite and (spike or done == 1 or done == config.max_steps or done % config.log_every == 0):
            tokens_per_s = config.tokens_per_step * len(recent) / sum(recent)
            mfu = flops_per_token * tokens_per_s / (peak * WORLD) if peak else None
            values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_s": tokens_per_s, "mfu": mfu}
            write_log("train", done, **values, **({"spike": True} if spike else {}))
            line = f"step {done}/{config.max_steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.3f}"
            if step > start:
                left = (config.max_steps - done) * config.tokens_per_step / tokens_per_s
                line += (
                    f"  {tokens_per_s:,.0f} tokens/s{f'  mfu {mfu:.1%}' if peak else ''}  eta {format_seconds(left)}"
                )
            say(line + ("  spike" if spike else ""))
            recent.clear()
        elif step == start:
            recent.clear()  # the first step compiles, and would spoil the rate of those that follow
    if RANK == 0 and (unwritten or not complete):
        raise UserError(f"{out} is trained, but not all of it is written: make room on the disk, then --resume")
    say(f"finished in {format_seconds(seconds)} of training: {out}")
    return 0


def main(argv):
    if "--help" in argv or "-h" in argv:
        print_help()
        return 0
    try:
        return train(*read_config(argv))
    except (UserError, OSError) as error:
        if RANK:  # the first process speaks, and torchrun then ends this one; a node where it cannot speaks itself
            time.sleep(5)
        if LOCAL_RANK == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    if WORLD > 1:
        # End without taking the process group apart: its destructor joins gloo's thread while holding Python's
        # global lock, and that thread may be waiting for the lock
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
