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
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import Corpus, UserError, bits_per_byte, prefetched, read_meta, validation_batches
from model import IGNORE, Llama, ModelConfig
from xielu import can_compile

ROOT = Path(__file__).resolve().parent
# torchrun tells each process who it is
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

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
    activation: str = key(ModelConfig.activation, "a name from activations.py")
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
    # run
    out: str = key("", "folder of the run; default out/NAME, after the config file")
    eval_every: int = key(100, "steps between validations (also at the first and the last step)", COUNT)
    eval_tokens: int = key(1_000_000, "validation tokens to predict, at most all", COUNT)
    log_every: int = key(10, "steps between lines of the log", COUNT)
    checkpoint_every: int = key(100, "steps between checkpoints (also at the last step)", COUNT)
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
    without AMX does not: with AVX512-BF16 alone, a bf16 matmul takes twice as long as a float32 one."""
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


def be_deterministic(device):
    """On a CPU: the same losses, bit for bit, every time. Compiled code does not give that by itself."""
    if device.type == "cpu":
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
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path):
    """What save_checkpoint saved, or None if there is no file; UserError if it is damaged or something else."""
    if not path.exists():
        return None
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums that torch.save wrote
            raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not {"model", "optimizer", "step", "seconds", "config", "from_file"} <= set(checkpoint):
            raise ValueError("it is no checkpoint of train.py")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path} cannot be read ({reason}): delete it, or start a new run") from None
    return checkpoint


def save_checkpoint(path, model, optimizer, config, from_file, step, seconds):
    """All that must survive a restart. The data order is a function of the step and nothing else is random."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "config": asdict(config),
        "from_file": asdict(from_file),
    }
    write_atomically(path, lambda file: torch.save(state, file))


def read_log(path, step):
    """The lines of a log up to `step`; what is no such line, as a torn last one, is left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["kind"] in ("train", "val") and record["step"] <= step:
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


def train_step(model, optimizer, batch, lr, config):
    """One update on this process's rows (rows, seq_len + 1) of the batch; returns (their mean loss, the norm of the
    whole batch's gradient), as floats. Gradients are exchanged once, in the backward of the last micro-batch."""
    micro_batches = batch.split(config.micro_batch_size)
    mean_loss = torch.zeros((), device=batch.device)
    for number, micro_batch in enumerate(micro_batches, 1):
        if WORLD > 1:  # DDP looks at this in its forward
            model.require_backward_grad_sync = number == len(micro_batches)
        loss = model(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
        loss.backward()
        mean_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=WORLD == 1)  # DDP's gradients are views of its buckets, and stay so
    return mean_loss.item(), norm.item()


@torch.no_grad()
def evaluate(model, corpus, config, device):
    """Mean loss in nats a token over the first eval_tokens validation tokens, each process taking its share."""
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
    batches = validation_batches(corpus, config.eval_tokens, config.micro_batch_size, IGNORE, RANK, WORLD)
    for inputs, targets in batches:
        loss = model(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), reduction="sum")
        total += torch.tensor([loss.item(), (targets != IGNORE).sum()], dtype=torch.float64)
    if WORLD > 1:
        total = total.to(device)
        dist.all_reduce(total)
    loss, tokens = total.tolist()
    return loss / tokens


def mean_over_processes(value, device):
    """The mean of a float over all processes."""
    if WORLD == 1:
        return value
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return total.item() / WORLD


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


def open_log(out, config, device, records):
    """Make the run's folder with its config.json and a log.jsonl of these records, and open that for more."""
    about = {
        "config": asdict(config),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "device": device_name(device),
        "commit": git_commit(),
    }
    lines = "".join(json.dumps(record) + "\n" for record in records)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", lambda file: file.write(json.dumps(about, indent=2).encode()))
    write_atomically(out / "log.jsonl", lambda file: file.write(lines.encode()))
    return open(out / "log.jsonl", "a", buffering=1, encoding="utf-8")


def train(from_file, options):
    """Run, or go on with, the training that a config file and a command line describe."""
    # What to run
    config = replace(from_file, **options)
    out = Path(config.out)
    checkpoint = load_checkpoint(out / "ckpt.pt") if config.resume else None
    if checkpoint:
        config = resumed_config(checkpoint, from_file, options)
    model_config = check(config, WORLD)
    if RANK == 0 and not config.resume and any((out / name).exists() for name in ("ckpt.pt", "log.jsonl")):
        raise UserError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    start = checkpoint["step"] if checkpoint else 0
    seconds = checkpoint["seconds"] if checkpoint else 0.0  # spent in training steps
    if start > config.max_steps:
        raise UserError(f"the run in {out} is at step {start}, beyond max_steps={config.max_steps}: raise it")
    records = read_log(out / "log.jsonl", start) if checkpoint else []
    validated = {record["step"] for record in records if record["kind"] == "val"}
    if start == config.max_steps and start in validated:
        say(f"{out} is finished: step {start} of {config.max_steps}")
        return

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
    if device.type == "cpu" and sizes.num_parameters() > 2e8:
        say("note: no GPU is used, and a model of this size wants several")
    corpus, validation, meta = open_data(config)
    be_deterministic(device)
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    log = open_log(out, config, device, records) if RANK == 0 else None

    def write_log(kind, step, **values):
        if log:
            record = {"kind": kind, "step": step, "tokens": step * config.tokens_per_step, "seconds": seconds, **values}
            log.write(json.dumps(record) + "\n")

    # `step` counts the updates done. Each round saves, evaluates, then updates; the round after the last update
    # only saves and evaluates.
    for step in range(start, config.max_steps + 1):
        last = step == config.max_steps
        if RANK == 0 and step > start and (last or step % config.checkpoint_every == 0):
            save_checkpoint(out / "ckpt.pt", model, optimizer, config, from_file, step, seconds)
        if step not in validated and (step == 0 or last or step % config.eval_every == 0):
            loss = evaluate(model, validation, config, device)
            perplexity = math.exp(min(loss, 700))  # e^709 is the largest float
            bpb = bits_per_byte(loss, meta)
            write_log("val", step, loss=loss, perplexity=perplexity, bits_per_byte=bpb, **model.effective_alphas())
            bpb = "" if bpb is None else f"  bits/byte {bpb:.4f}"
            say(f"step {step}/{config.max_steps}  val loss {loss:.4f}  perplexity {perplexity:.3f}{bpb}")
        if last:
            break

        began = time.perf_counter()
        batch = next(batches).to(device, non_blocking=True)
        lr = learning_rate(config, step)
        loss, grad_norm = train_step(trained, optimizer, batch, lr, config)
        recent.append(time.perf_counter() - began)
        seconds += recent[-1]

        done = step + 1
        if done == 1 or done == config.max_steps or done % config.log_every == 0:
            loss = mean_over_processes(loss, device)
            tokens_per_s = config.tokens_per_step * len(recent) / sum(recent)
            mfu = flops_per_token * tokens_per_s / (peak * WORLD) if peak else None
            write_log("train", done, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=tokens_per_s, mfu=mfu)
            line = f"step {done}/{config.max_steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.3f}"
            if step > start:
                left = (config.max_steps - done) * config.tokens_per_step / tokens_per_s
                line += (
                    f"  {tokens_per_s:,.0f} tokens/s{f'  mfu {mfu:.1%}' if peak else ''}  eta {format_seconds(left)}"
                )
            say(line)
            recent.clear()
        elif step == start:
            recent.clear()  # the first step compiles, and would spoil the rate of those that follow
    say(f"finished in {format_seconds(seconds)} of training: {out}")


def main(argv):
    if "--help" in argv or "-h" in argv:
        print_help()
        return 0
    try:
        train(*read_config(argv))
    except (UserError, OSError) as error:
        if RANK:  # the first process speaks, and torchrun then ends this one; a node where it cannot speaks itself
            time.sleep(5)
        if LOCAL_RANK == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        say("interrupted: --resume goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if WORLD > 1:
        # End without taking the process group apart: its destructor joins gloo's thread while holding Python's
        # global lock, and that thread may be waiting for the lock
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
