"""What can be set: every key of a run with its default and its meaning, and where its value comes from.

A config is a short Python file of assignments. It is executed, so it can import another one. Its values replace the
defaults, and the command line replaces both. Until they are complete they stay plain dicts, so that every Config is
valid.
"""

import difflib
import math
import runpy
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from activations import get_activation
from command import UserError

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------
# The keys


def key(default, help, low=-math.inf, below=math.inf, most=math.inf, choices=None):
    """A config key. A number must satisfy low ≤ number < below and number ≤ most; a text must be one of the choices."""
    limits = {"low": low, "below": below, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class ModelConfig:
    """The keys that make the model."""

    activation: str = key("xielu", "a name from activations.py, or derived/NAME.py")
    dim: int = key(384, "width of the residual stream", low=1)
    n_layers: int = key(6, "number of blocks", low=1)
    n_heads: int = key(6, "attention heads", low=1)
    n_kv_heads: int = key(6, "key and value heads; fewer than n_heads for grouped queries", low=1)
    ffn_dim: int = key(1536, "width of an ungated MLP; a gated activation gets 2/3 of it", low=1)
    vocab_size: int = key(257, "rows of the embedding; at least the tokenizer's", low=1)
    seq_len: int = key(256, "tokens per sequence", low=1)
    rope_theta: float = key(500000.0, "base of the rotary frequencies", low=1)
    norm_eps: float = key(1e-6, "epsilon of RMSNorm", low=0)
    qk_norm: bool = key(False, "RMSNorm on each head's queries and keys, before they are rotated")
    tie_embeddings: bool = key(True, "one matrix for embedding and output head")
    init_std: float = key(0.025, "standard deviation of the initial weights", low=0)

    def __post_init__(self):
        for item in fields(self):
            check_limits(item.name, getattr(self, item.name), **item.metadata)
        if self.dim % self.n_heads or self.head_dim % 2:
            raise UserError(f"dim={self.dim} over n_heads={self.n_heads} must give an even number for each head")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.gated and self.ffn_dim % 3:
            below = self.ffn_dim // 3 * 3
            raise UserError(
                f"ffn_dim={self.ffn_dim} does not divide by 3, as the gated {self.activation!r} needs "
                f"(it gets 2/3 of the width): the nearest that does is {f'{below} or ' if below else ''}{below + 3}"
            )

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def gated(self):
        return get_activation(self.activation).gated

    @property
    def mlp_dim(self):
        """The width of the MLP that is built: ffn_dim, or 2/3 of it if gated, so that its three matrices have as many
        parameters and cost as many FLOPs as the two of the ungated one."""
        return self.ffn_dim * 2 // 3 if self.gated else self.ffn_dim


@dataclass(frozen=True)
class Config(ModelConfig):
    """Every key of a run."""

    # data
    data: str = key("data/stdlib", "folder of token shards (prepare_data.py)")
    tokens_per_step: int = key(16384, "tokens per update, whatever the number of processes", low=1)
    micro_batch_size: int = key(16, "sequences that a process computes at once; the rest is accumulated", low=1)
    # schedule and optimizer
    max_steps: int = key(1000, "number of updates", low=1)
    optimizer: str = key(
        "adamw", "muon takes the matrices of the layers, and leaves the rest to adamw", choices=("adamw", "muon")
    )
    lr: float = key(1e-3, "peak learning rate", low=0)
    alpha_lr: float = key(1.0, "learning rate of the activation scalars, in multiples of lr", low=0)
    warmup_steps: int = key(100, "updates of linear warm-up", low=0)
    decay_steps: int = key(200, "last updates, in which the learning rate falls to 0 as 1 - sqrt", low=0)
    weight_decay: float = key(0.1, "on everything but the activation scalars", low=0)
    beta1: float = key(0.9, "of AdamW", low=0, below=1)
    beta2: float = key(0.95, "of AdamW", low=0, below=1)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 for no clipping", low=0)
    seed: int = key(42, "of the initial weights and the data order", low=0, below=2**53)
    # machine
    device: str = key("auto", "auto takes the best there is", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "auto takes bfloat16 where it is faster", choices=("auto", "float32", "bfloat16"))
    compile: bool = key(True, "compile the model; the first step takes longer, the others are faster")
    memory_budget: float = key(
        1.0, "share of a compiled layer's saved tensors that stay in memory; the rest is recomputed", low=0, most=1
    )
    deterministic: bool = key(False, "the same losses, bit for bit, on CUDA too, but slower; a CPU always does so")
    # run
    out: str = key("", "folder of the run; default out/NAME, after the config file")
    eval_every: int = key(100, "steps between validations (also at the first and the last step)", low=1)
    eval_tokens: int = key(1_000_000, "validation tokens to predict, at most all", low=1)
    log_every: int = key(10, "steps between lines of the log", low=1)
    checkpoint_every: int = key(100, "steps between checkpoints (also at the last step)", low=1)
    keep_checkpoints: int = key(1, "ckpt.pt is the newest; 3, for example, keeps the two before it as well", low=1)
    resume: bool = key(False, "continue the run in `out`, from scratch if it has no checkpoint")

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_steps + self.decay_steps > self.max_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit into "
                f"max_steps={self.max_steps}: lower them, or raise max_steps"
            )

    def check_batch(self, processes):
        """UserError, with values that would divide, unless tokens_per_step is a whole number of micro-batches on each
        process."""
        sequence = self.seq_len * processes  # tokens of one sequence on every process
        micro_batch = sequence * self.micro_batch_size
        if self.tokens_per_step % micro_batch == 0:
            return
        if self.tokens_per_step % sequence == 0:
            sequences = self.tokens_per_step // sequence
            fits = [str(size) for size in range(1, min(sequences, 256) + 1) if sequences % size == 0]
            hint = f"micro_batch_size may be {', '.join(fits)}"
        else:
            below = self.tokens_per_step // micro_batch * micro_batch
            hint = f"the nearest tokens_per_step is {f'{below} or ' if below else ''}{below + micro_batch}"
        raise UserError(
            f"tokens_per_step={self.tokens_per_step} does not divide into micro_batch_size={self.micro_batch_size} "
            f"sequences of {self.seq_len} on {processes} process(es): {hint}"
        )


def check_limits(name, value, help="", low=-math.inf, below=math.inf, most=math.inf, choices=None):
    """UserError unless a value is within the limits of its key."""
    if choices and value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    if isinstance(value, int | float) and not (low <= value < below and value <= most):
        limits = f"at least {low}"
        limits += f" and below {below}" if below < math.inf else ""
        limits += f" and at most {most}" if most < math.inf else ""
        raise UserError(f"{name} must be {limits}, not {value}")


DEFAULTS = {item.name: item.default for item in fields(Config)}
TYPES = {item.name: item.type for item in fields(Config)}
# Resuming with another model, optimizer or sequence of batches would be another run. (data.py compares the data.)
FIXED = [item.name for item in fields(ModelConfig)] + ["seed", "tokens_per_step", "optimizer"]

# ---------------------------------------------------------------------------------------------------------------
# Reading

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def typed(name, value):
    """A value in the type of its key, from Python or from the text of the command line; UserError if it has none."""
    kind = TYPES[name]
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
    """{key: typed value} of a dict of raw ones; for an unknown key, a UserError that names the nearest known one."""
    for name in values:
        if name not in TYPES:
            nearest = difflib.get_close_matches(name, TYPES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "train.py --help lists all keys"
            raise UserError(f"unknown key {name!r} {where}: {hint}")
    return {name: typed(name, value) for name, value in values.items()}


def read_file(path):
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
    helper = (type(sys), type, type(len), type(key))  # modules, classes and functions that a config may import
    values = {name: value for name, value in values.items() if name[0] != "_" and not isinstance(value, helper)}
    return typed_keys(values, f"in {path}")


def read_command(argv):
    """({key: value} of defaults and file, {key: value} of the command line) of `CONFIG.py --key=value …`."""
    files = [argument for argument in argv if not argument.startswith("--")]
    if len(files) != 1:
        raise UserError(f"give one config file, as in train.py configs/demo.py, not {' '.join(files) or 'none'}")
    pairs = [argument[2:].partition("=") for argument in argv if argument.startswith("--")]
    options = typed_keys({name: value if equals else True for name, equals, value in pairs}, "on the command line")
    if not options.get("out", True):  # --out= means the default
        del options["out"]
    from_file = DEFAULTS | read_file(files[0])
    return from_file | {"out": from_file["out"] or f"out/{Path(files[0]).stem}"}, options


def resumed(saved, from_file, options):
    """The Config to resume with, from {"config": …, "from_file": …} of a checkpoint: the saved config, changed by what
    the config file says now and did not say then, and by the command line. UserError if that changes a FIXED key."""
    then = saved["from_file"]
    changes = {name: value for name, value in from_file.items() if value != then.get(name, value)} | options
    for name in FIXED:
        if name in changes and changes[name] != saved["config"][name]:
            raise UserError(
                f"--resume cannot change {name} from {saved['config'][name]!r} to {changes[name]!r}: "
                f"leave it out, or start a new run with another --out"
            )
    return Config(**(from_file | saved["config"] | changes))


def print_keys():
    print("\nKeys, with their defaults:\n")
    for item in fields(Config):
        print(f"  --{item.name}={item.default}".ljust(34) + item.metadata["help"])
