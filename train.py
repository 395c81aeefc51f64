"""Train a Llama:  python train.py configs/demo.py --key=value …

    python train.py configs/demo.py                                 one process
    torchrun --nproc_per_node=8 train.py configs/xielu_1b.py        one node
    torchrun --nnodes=11 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py configs/xielu_1b.py

A config is a short Python file that assigns keys. The run goes to the folder out/NAME: config.json, log.jsonl and
ckpt.pt; --resume continues it.

This file is the keys, the training (`train`), and its parts in the order in which it uses them.
"""

import math
import os
import time
import warnings
from dataclasses import dataclass, fields
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads that spin slow a busy machine

import torch
from torch.nn.parallel import DistributedDataParallel

import xielu
from activations import check_activation, facts_of
from model import IGNORE, Llama, ModelConfig
from plumbing import machine
from plumbing.command import UserError, format_seconds, program
from plumbing.config import key
from plumbing.data import bits_per_byte, open_data, prefetched, validation_batches
from plumbing.machine import RANK, WORLD, say
from plumbing.run import Run

READERS = 4  # threads that read batches ahead, since a shared disk takes milliseconds per read
BAD_STEPS = 10  # stop after this many consecutive steps whose loss or gradient is not finite


@dataclass(frozen=True)
class Config(ModelConfig):
    """Every key of a run; those of the model are in model.py."""

    # data
    data: str = key("data/stdlib", "folder of token shards (prepare_data.py)")
    tokens_per_step: int = key(16384, "tokens per update, whatever the number of processes", low=1)
    micro_batch_size: int = key(16, "sequences that a process computes at once; the rest is accumulated", low=1)
    # schedule and optimizer
    max_steps: int = key(1000, "number of updates", low=1)
    tokens_per_parameter: float = key(0.0, "sets max_steps by the size of the model", low=0, most=1e6)
    optimizer: str = key("adamw", "muon takes the layers' matrices, adamw the rest", choices=("adamw", "muon"))
    lr: float = key(1e-3, "peak learning rate", low=0)
    alpha_lr: float = key(1.0, "learning rate of the activation scalars, in multiples of lr", low=0)
    warmup_steps: float = key(100, "updates of linear warm-up; below 1, a share of max_steps", low=0)
    decay_steps: float = key(200, "last updates (or share) in which lr falls to 0 as 1 - sqrt", low=0)
    weight_decay: float = key(0.1, "on everything but the activation scalars", low=0)
    beta1: float = key(0.9, "of AdamW", low=0, below=1)
    beta2: float = key(0.95, "of AdamW", low=0, below=1)
    grad_clip: float = key(1.0, "largest norm of the gradient; 0 for no clipping", low=0)
    seed: int = key(42, "of the initial weights and the data order", low=0, below=2**53)
    # machine
    device: str = key("auto", "auto takes the best there is", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = key("auto", "auto takes bfloat16 where it is faster", choices=("auto", "float32", "bfloat16"))
    compile: bool = key(True, "compile the model; the first step takes longer, the others are faster")
    memory_budget: float = key(1.0, "share of a compiled layer's tensors to keep, not recompute", low=0, most=1)
    deterministic: bool = key(False, "the same losses, bit for bit, on CUDA too, but slower; a CPU always does so")
    # run
    out: str = key("", "folder of the run; default out/NAME, after the config file")
    eval_every: float = key(100, "steps (or share) between validations; also at the first and last step", low=1e-9)
    eval_tokens: int = key(1_000_000, "validation tokens to predict, at most all", low=1)
    log_every: int = key(10, "steps between lines of the log", low=1)
    checkpoint_every: int = key(100, "steps between checkpoints (also at the last step)", low=1)
    keep_checkpoints: int = key(1, "ckpt.pt is the newest; 3, for example, keeps the two before it as well", low=1)
    resume: bool = key(False, "continue the run in `out`; from scratch if it has no checkpoint")
    resume_from: int = key(0, "go back to the kept checkpoint of this step and continue from there", low=0)

    # Resuming with another model, optimizer or sequence of batches would be another run
    FIXED = (*(item.name for item in fields(ModelConfig)), "seed", "tokens_per_step", "optimizer")

    def __post_init__(self):
        """Replace what depends on the model's size or on max_steps by numbers of steps, and check them. The config that
        is saved holds these numbers."""
        super().__post_init__()
        steps = {"max_steps": self.max_steps, "tokens_per_parameter": 0.0}
        if self.tokens_per_parameter:
            with torch.device("meta"):
                model = Llama(self)
            parameters = model.num_parameters() - sum(p.numel() for p in model.activation_parameters())
            steps["max_steps"] = max(1, round(self.tokens_per_parameter * parameters / self.tokens_per_step))
        for name, least in (("warmup_steps", 0), ("decay_steps", 0), ("eval_every", 1)):
            value = getattr(self, name)
            steps[name] = max(least, round(value * steps["max_steps"] if value < 1 else value))
        vars(self).update(steps)  # the way to set fields of a frozen dataclass
        if self.warmup_steps + self.decay_steps > self.max_steps:
            phases = f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps}"
            raise UserError(f"{phases} do not fit into max_steps={self.max_steps}: lower them, or raise max_steps")

    @classmethod
    def read_command(cls, argv):
        from_file, options = super().read_command(argv)
        if "max_steps" in options:  # it replaces the file's tokens_per_parameter
            if options.setdefault("tokens_per_parameter", 0.0):
                raise UserError("max_steps and tokens_per_parameter both set the length of the run: give one of them")
        return from_file, options

    def check_batch(self, processes):
        """UserError, with an option that helps, unless tokens_per_step is whole micro-batches on each process."""
        sequences, rest = divmod(self.tokens_per_step, self.seq_len * processes)  # sequences on each process
        if rest:
            micro_batch = self.seq_len * processes * self.micro_batch_size
            hint = f"--tokens_per_step={micro_batch * max(1, round(self.tokens_per_step / micro_batch))}"
        elif sequences % self.micro_batch_size:
            fits = next(size for size in range(min(self.micro_batch_size, 1024), 0, -1) if sequences % size == 0)
            hint = f"--micro_batch_size={fits}"
        else:
            return
        batches = f"micro_batch_size={self.micro_batch_size} sequences of {self.seq_len} on {processes} process(es)"
        raise UserError(f"tokens_per_step={self.tokens_per_step} does not divide into {batches}: use {hint}")


def train(argv):
    """Begin or resume a run. Returns the exit status: 0, 3 if the loss or gradient stays not finite, 128 + signal if a
    signal stopped it."""
    # The run: its config, and how far it is. A run refused before `run.open` leaves nothing behind.
    run = Run(Config, *Config.read_command(argv))
    config, end = run.config, run.config.max_steps
    if run.start == end and end in run.validated:
        say(f"{config.out} is finished: step {end} of {end}")
        return 0

    # The data, the machine, and whether model and activation can be trained on it
    corpus, validation, meta, facts = open_data(config, say)
    device = machine.pick_device(config.device)
    check_memory(config, device)
    xielu.COMPILE = config.compile
    check_activation(config.activation, config.mlp_dim, config.compile)
    run.keep(facts | facts_of(config.activation))  # they must be those that the run began with
    machine.be_deterministic(device, config.deterministic)
    machine.join_processes(device, (config.out, config.dtype, run.start, sorted(run.validated)))
    dtype = machine.pick_dtype(config.dtype, device, say)
    peak = machine.peak_flops(device, dtype)

    # The model, and the same model as it is trained: compiled, and in DDP if there are several processes
    with torch.device(device):
        model = Llama(config, dtype, seed=None if run.loaded else config.seed)
    introduce(model, config, device, dtype)
    optimizers = make_optimizers(model, config)
    run.restore(model, optimizers)
    compile_model(model, config)
    ddp_model = model if WORLD == 1 else distribute(model)
    run.open(device, dtype)

    # The loop. Each round evaluates, takes the gradient, saves and updates, in this order, so that the weights that are
    # saved have just shown a finite loss and gradient. `step` updates are done when it begins.
    batch_of_step = batches(corpus, config, range(run.start, end), device)
    recent = []  # seconds of each step since the last one that was logged
    bad = 0  # steps in a row whose loss or gradient was not finite
    for step in range(run.start, end):
        # 1. once in a while: the mean loss on the validation split
        if step % config.eval_every == 0 and step not in run.validated:
            if values := evaluate(model, validation, meta, config, device):
                run.log("val", step, **values)

        # 2. the gradient of this step's batch
        began = time.perf_counter()
        machine.seed_randomness(device, (config.seed, step, RANK))  # of a dropout, say: a resumed run draws the same
        loss, grad_norm = compute_gradient(ddp_model, next(batch_of_step), config)
        [loss], stopping = machine.agree([loss / WORLD], device)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)

        # 3. once in a while, and before stopping: a checkpoint
        if finite and step != run.saved and (stopping or (step and step % config.checkpoint_every == 0)):
            began += run.save(step, model, optimizers)
        if stopping:
            return run.stopped(step)

        # 4. the update, if the gradient is finite
        lr = learning_rate(config, step)
        if finite:
            update(optimizers, lr)
        model.zero_grad(set_to_none=WORLD == 1)  # DDP's gradients are views of its buckets: None would break them
        if step == run.start + 1:
            recent.clear()  # the first step compiles, and would spoil the rate of those that follow
        recent.append(time.perf_counter() - began)
        run.seconds += recent[-1]

        # what to say about it
        bad = 0 if finite else bad + 1
        if bad:
            run.log("bad", step + 1, loss=loss, grad_norm=grad_norm)
            if bad == BAD_STEPS:
                reason = f"the loss or its gradient was not finite {bad} times in a row"
                say(f"stopped at step {step + 1}: {reason}; {run.newest}")
                return 3
            continue
        spike = {"spike": True} if run.is_spike(loss) else {}
        if spike or step in (0, end - 1) or (step + 1) % config.log_every == 0:
            speed = config.tokens_per_step * len(recent) / sum(recent)
            mfu = model.flops_per_token() * speed / (peak * WORLD) if peak else None
            rates = {"tokens_per_s": speed, "mfu": mfu, "memory": machine.peak_memory(device)}
            run.log("train", step + 1, loss=loss, lr=lr, grad_norm=grad_norm, **rates, **spike)
            recent.clear()

    # The last weights: save them, then evaluate
    if run.saved != end:
        run.save(end, model, optimizers)
    if not (values := evaluate(model, validation, meta, config, device)):
        return run.stopped(end)
    run.log("val", end, **values)
    if RANK == 0 and (run.unwritten or run.saved != end):
        raise UserError(f"{config.out} is trained, but not all of it is written: make room on the disk, then --resume")
    say(f"finished in {format_seconds(run.seconds)} of training: {config.out}")
    say(f"its curve and its text:  python -m tools.plot loss {config.out}  and  python -m tools.sample {config.out}")
    return 0


# ---------------------------------------------------------------------------------------------------------------
# Setting up


def check_memory(config, device):
    """UserError if the device has less memory than float32 weights, gradients and AdamW's two moments take."""
    with torch.device("meta"):
        parameters = Llama(config).num_parameters()
    memory = machine.total_memory(device)
    if memory and 16 * parameters > memory:
        sizes = f"{16 * parameters / 1e9:,.0f} GB, and {machine.device_name(device)} has {memory / 1e9:,.0f} GB"
        raise UserError(f"to train {parameters:,} parameters takes {sizes}: lower dim, n_layers, ffn_dim or vocab_size")


def introduce(model, config, device, dtype):
    """Say what is trained on what."""
    size = f"{config.activation}: {model.num_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token"
    work = f"{config.tokens_per_step:,} tokens per step, {WORLD} process(es) on {machine.device_name(device)}"
    say(f"{size}, {work} in {str(dtype)[6:]}, {machine.attention_backend(config, device, dtype)} attention")


def make_optimizers(model, config):
    """[AdamW in one fused kernel], with weight decay on everything but what the activations train, as in the paper; or
    [that, Muon], which takes the weights of the layers' linear modules and gives their updates the size of AdamW's, so
    that learning rate and weight decay keep their meaning."""
    scalars = model.activation_parameters()
    matrices = model.matrices() if config.optimizer == "muon" else []
    apart = {id(weight) for weight in scalars + matrices}
    others = [weight for weight in model.parameters() if id(weight) not in apart]
    decayed = {"params": others, "weight_decay": config.weight_decay, "lr_factor": 1.0}
    undecayed = {"params": scalars, "weight_decay": 0.0, "lr_factor": config.alpha_lr}
    optimizers = [torch.optim.AdamW([decayed, undecayed], betas=(config.beta1, config.beta2), eps=1e-8, fused=True)]
    if matrices:
        group = {"params": matrices, "weight_decay": config.weight_decay, "lr_factor": 1.0}
        optimizers.append(torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw"))
    return optimizers


def compile_model(model, config):
    """Compile the model's parts in place, where that is asked for and works."""
    if config.compile:
        say("compiling: the first step takes longer")
        machine.mend_compiler_cache()
    if config.compile and xielu.can_compile(model.cos.device.type):
        # of what a compiled layer would keep for the backward pass, this share is kept, and the rest recomputed
        torch._functorch.config.activation_memory_budget = config.memory_budget
        model.compile_parts()
        torch._dynamo.config.optimize_ddp = False  # its DDPOptimizer would split each compiled layer
    elif config.memory_budget < 1:
        raise UserError(f"memory_budget={config.memory_budget} needs a compiled model, and nothing is compiled here")


def distribute(model):
    """The model in DDP, which averages the gradients of all processes in the backward pass."""
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is not in torch 2.11
    for weight in model.parameters():
        # DDP makes its buckets of the gradients it finds. If it found none, the first step would hold each one twice.
        # An expanded zero takes no memory.
        weight.grad = torch.zeros((), device=weight.device).expand_as(weight)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


# ---------------------------------------------------------------------------------------------------------------
# The parts of a round


def batches(corpus, config, steps, device):
    """Yield this process's rows (rows, seq_len + 1) of the batch of each step. If they cannot be read, zeros,
    to get to `agree`, where all processes stop."""
    rows = config.tokens_per_step // config.seq_len
    read = partial(corpus.batch, config.seed, size=rows, rank=RANK, world=WORLD)
    with machine.errors_noted():
        for batch in map(torch.from_numpy, prefetched(read, steps, READERS)):
            yield (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
        return
    yield torch.zeros(rows // WORLD, config.seq_len + 1, dtype=torch.int64, device=device)


@torch.no_grad()
def evaluate(model, corpus, meta, config, device):
    """{"loss": mean loss in nats per token over the first eval_tokens validation tokens, …}; the processes share
    the work. None if a signal to stop arrived in the meantime."""
    model.eval()
    loss, tokens = 0.0, 0
    shares = validation_batches(corpus, config.eval_tokens, config.micro_batch_size, IGNORE, RANK, WORLD)
    with machine.errors_noted():
        for inputs, targets in shares:
            if machine.stop:
                break
            inputs, targets = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
            loss += model(inputs, targets, reduction="sum").item()
            tokens += (targets != IGNORE).sum().item()
    model.train()
    (loss, tokens), stopping = machine.agree([loss, tokens], device)
    if stopping:
        return None
    loss /= tokens
    bits = bits_per_byte(loss, meta, len(corpus.shards))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits} | model.effective_alphas()


def compute_gradient(model, batch, config):
    """Leave the clipped gradient of the whole batch in the model; `batch` (rows, seq_len + 1) is this process's share
    of it. Returns (mean loss of this share, norm of the gradient before clipping) as floats. The processes
    exchange gradients once, in the backward pass of the last micro-batch."""
    micro_batches = batch.split(config.micro_batch_size)
    mean_loss = torch.zeros((), device=batch.device)
    for number, micro_batch in enumerate(micro_batches, 1):
        if WORLD > 1:  # DDP reads this in its forward pass
            model.require_backward_grad_sync = number == len(micro_batches)
        loss = model(micro_batch[:, :-1], micro_batch[:, 1:]) / len(micro_batches)
        loss.backward()
        mean_loss += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    return mean_loss.item(), norm.item()


def learning_rate(config, update):
    """Of update 0 … max_steps − 1: linear warm-up, constant, then 1 − sqrt down to 0. The first update
    has lr / warmup_steps and the last one is just above 0, so that no update has a learning rate of 0."""
    warmup = min(1.0, (update + 1) / max(1, config.warmup_steps))
    decayed = max(0, update - (config.max_steps - config.decay_steps))
    return config.lr * warmup * (1 - math.sqrt(decayed / max(1, config.decay_steps)))


def update(optimizers, lr):
    """One step of each optimizer with the gradient that is in the model."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step()


main = program(train, f"{__doc__}\n{Config.help()}")

if __name__ == "__main__":
    machine.end_with(main)
