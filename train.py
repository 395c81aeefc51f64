"""Train a Llama:  python train.py configs/demo.py --key=value …

    python train.py configs/demo.py                                 one process
    torchrun --nproc_per_node=8 train.py configs/xielu_1b.py        one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py configs/xielu_1b.py

A config is a short Python file of assignments (config.py). The run goes to the folder out/NAME (run.py): config.json,
log.jsonl and ckpt.pt; --resume continues it.

Training is the function `train`. Each round of its loop does four things, in this order:

    1. evaluate    every eval_every steps, the mean loss on the validation split
    2. gradient    of the loss on this step's batch, exchanged between the processes and clipped
    3. save        every checkpoint_every steps; the weights have just shown a finite loss and gradient
    4. update      the weights, if the gradient is finite

The round after the last update has no batch any more: it saves and evaluates.
"""

import math
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import machine
import xielu
from command import UserError, format_seconds
from config import print_keys, read_command
from data import bits_per_byte, open_data, prefetched, validation_batches
from machine import LOCAL_RANK, RANK, WORLD, say
from model import IGNORE, Llama
from run import Folder, begin

BAD_STEPS = 10  # so many steps in a row whose loss or gradient is not finite end the run
SPIKE = 1.5  # a loss this many times its running average is called a spike


def train(from_file, options):
    """Run or resume the training that a config file and a command line describe, {key: value} each.

    Returns the exit status: 0, 3 if the loss or gradient stays not finite, 128 + signal if a signal stopped the run.
    """
    config, state, records, lock = begin(from_file, options)
    start, end = state["step"], config.max_steps
    validated = {record["step"] for record in records if record["kind"] == "val"}
    if start == end and end in validated:
        say(f"{config.out} is finished: step {start} of {end}")
        return 0

    device = machine.pick_device(config.device)
    corpus, validation, meta, state["data"] = open_data(config, state["data"], say)
    machine.be_deterministic(device, config.deterministic)
    machine.join_processes(device, (config.out, config.dtype, start, sorted(validated)))
    dtype = machine.pick_dtype(config.dtype, device, say)
    config = replace(config, dtype=str(dtype)[6:])  # config.json remembers what auto took, for later starts of the run
    model, trained, optimizers = build(config, state, device, dtype)
    folder = Folder(config, state, records, lock, device)
    peak = machine.peak_flops(device, dtype)

    def load_batch(step):
        # (this process's share of the batch, None), or zeros and the error: it must stop all processes, not one alone
        rows = config.tokens_per_step // config.seq_len
        try:
            batch, error = corpus.batch(config.seed, step, rows, RANK, WORLD), None
        except (UserError, OSError) as caught:
            batch, error = np.zeros((rows // WORLD, config.seq_len + 1), np.int64), caught
        batch = torch.from_numpy(batch)
        return batch.pin_memory() if device.type == "cuda" else batch, error

    def save():
        tensors = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        folder.save(state | tensors | {"from_file": from_file})

    batches = prefetched(load_batch, range(start, end))
    recent = []  # seconds of each step since the last one that was logged
    bad = 0  # steps in a row whose loss or gradient was not finite
    for step in range(start, end + 1):  # `step` updates are done
        state["step"] = step
        if step == end and folder.saved != step:
            save()

        # 1. evaluate
        if step not in validated and (step in (0, end) or step % config.eval_every == 0):
            loss = evaluate(model, validation, config, device)
            if loss is not None:
                values = {"perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits_per_byte(loss, meta)}
                report(folder, "val", step, state["seconds"], loss, **values, **model.effective_alphas())
            elif step == end:
                return stopped(folder, step, machine.stop_signal or signal.SIGTERM)
        if step == end:
            break

        # 2. gradient
        began = time.perf_counter()
        batch, error = next(batches)
        loss, grad_norm = compute_gradient(trained, batch.to(device, non_blocking=True), config)
        loss, stop = agree(loss, error, device)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)

        # 3. save
        before_save = time.perf_counter()
        if finite and folder.saved != step and (stop or (step and step % config.checkpoint_every == 0)):
            save()
        if stop:
            return stopped(folder, step, stop)
        after_save = time.perf_counter()

        # 4. update
        lr = learning_rate(config, step)
        if finite:
            update(optimizers, lr)
        model.zero_grad(set_to_none=WORLD == 1)  # DDP's gradients are views of its buckets: None would break them
        recent.append(time.perf_counter() - began - (after_save - before_save))
        state["seconds"] += recent[-1]

        bad = 0 if finite else bad + 1
        if bad:
            report(folder, "bad", step + 1, state["seconds"], loss, grad_norm=grad_norm)
        if bad == BAD_STEPS:
            reason = f"the loss or its gradient was not finite {bad} times in a row"
            say(f"stopped at step {step + 1}: {reason}; {folder.newest}")
            return 3
        if finite:
            average = loss if state["loss_average"] is None else state["loss_average"]
            spike = {"spike": True} if loss > SPIKE * average else {}
            state["loss_average"] = 0.98 * average + 0.02 * loss  # over the last 50 steps or so
            if spike or step in (0, end - 1) or (step + 1) % config.log_every == 0:
                speed = config.tokens_per_step * len(recent) / sum(recent)
                mfu = model.flops_per_token() * speed / (peak * WORLD) if peak else None
                values = {"lr": lr, "grad_norm": grad_norm, "tokens_per_s": speed, "mfu": mfu}
                report(folder, "train", step + 1, state["seconds"], loss, **values, **spike)
                recent.clear()
        if step == start:
            recent.clear()  # the first step compiles, and would spoil the rate of those that follow
    if RANK == 0 and (folder.unwritten or folder.saved != end):
        raise UserError(f"{config.out} is trained, but not all of it is written: make room on the disk, then --resume")
    say(f"finished in {format_seconds(state['seconds'])} of training: {config.out}")
    return 0


def report(folder, kind, step, seconds, loss, **values):
    """Write a record to the log, and print it."""
    folder.write_log(kind, step, seconds, loss=loss, **values)
    end, tokens_per_step = folder.config.max_steps, folder.config.tokens_per_step
    line = f"step {step}/{end}  "
    if kind == "val":
        line += f"val loss {loss:.4f}  perplexity {values['perplexity']:.3f}"
        line += f"  bits/byte {values['bits_per_byte']:.4f}" if values["bits_per_byte"] else ""
    elif kind == "bad":
        line += f"loss {loss:.4f}  grad {values['grad_norm']:.3f}: not finite, update left out"
    else:
        line += f"loss {loss:.4f}  lr {values['lr']:.2e}  grad {values['grad_norm']:.3f}"
        if step > folder.start + 1:  # the first step compiles, so its rate says nothing
            speed = values["tokens_per_s"]
            line += f"  {speed:,.0f} tokens/s" + (f"  mfu {values['mfu']:.1%}" if values["mfu"] else "")
            left = (end - step) * tokens_per_step / speed
            line += f"  {format_seconds(seconds)} elapsed, {format_seconds(left)} left"
        line += "  spike" if "spike" in values else ""
    say(line)


def stopped(folder, step, number):
    """Say where a signal stopped the run; returns the exit status."""
    say(f"stopped at step {step}, " + ("checkpoint saved" if folder.saved == step else folder.newest))
    return 128 + number


# ---------------------------------------------------------------------------------------------------------------
# Building


def build(config, state, device, dtype):
    """(model, the same model as training calls it: compiled, and in DDP if there are several processes, optimizers),
    loaded from a checkpoint's state or initialised from the seed. Says what was built."""
    with torch.device(device):
        model = Llama(config, dtype, None if "model" in state else config.seed)
    say(
        f"{config.activation}: {model.num_parameters():,} parameters, {model.flops_per_token():,} FLOPs per token, "
        f"{config.tokens_per_step:,} tokens per step, {WORLD} process(es) on {machine.device_name(device)} "
        f"in {str(dtype)[6:]}, {machine.attention_backend(config, device, dtype)} attention"
    )
    if device.type == "cpu" and model.num_parameters() > 2e8:
        say("note: no GPU is used, and a model of this size needs several")
    optimizers = make_optimizers(model, config)
    if "model" in state:
        model.load_state_dict(state.pop("model"))
        for optimizer, saved in zip(optimizers, state.pop("optimizers")):  # an imported model has none
            groups = optimizer.state_dict()["param_groups"]  # those of this config, which may have changed
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        say(f"resuming {config.out} at step {state['step']}")
    xielu.COMPILE = config.compile
    if config.compile and xielu.can_compile(device.type):
        set_memory_budget(config.memory_budget)
        model.compile_parts()
        say("compiling: the first step takes longer")
        torch._dynamo.config.optimize_ddp = False  # its DDPOptimizer would split each compiled layer
    elif config.memory_budget < 1:
        raise UserError(f"memory_budget={config.memory_budget} needs a compiled model, and nothing is compiled here")
    if WORLD == 1:
        return model, model, optimizers
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is not in torch 2.11
    for weight in model.parameters():
        # DDP makes its buckets of the gradients it finds. If it found none, the first step would hold each one twice.
        # An expanded zero takes no memory.
        weight.grad = torch.zeros((), device=device).expand_as(weight)
    trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model, trained, optimizers


def set_memory_budget(budget):
    """Let compiled layers keep this share of what they would keep for the backward pass, and recompute the rest."""
    if hasattr(torch._functorch.config, "activation_memory_budget"):  # private to torch, so it may go away
        torch._functorch.config.activation_memory_budget = budget
    elif budget < 1:
        raise UserError("this version of torch has no activation_memory_budget: leave memory_budget at 1.0")


def make_optimizers(model, config):
    """[AdamW in one fused kernel], with weight decay on everything but the activation scalars, as in the paper; or
    [that, Muon], which takes the matrices of the layers and gives their updates the size of AdamW's, so that learning
    rate and weight decay keep their meaning."""
    scalars = model.activation_scalars()
    matrices = [w for w in model.layers.parameters() if w.ndim == 2] if config.optimizer == "muon" else []
    apart = {id(weight) for weight in scalars + matrices}
    others = [weight for weight in model.parameters() if id(weight) not in apart]
    groups = [
        {"params": others, "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": scalars, "weight_decay": 0.0, "lr_factor": config.alpha_lr},
    ]
    optimizers = [torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)]
    if matrices:
        group = {"params": matrices, "weight_decay": config.weight_decay, "lr_factor": 1.0}
        optimizers.append(torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---------------------------------------------------------------------------------------------------------------
# The parts of a round


@torch.no_grad()
def evaluate(model, corpus, config, device):
    """Mean loss in nats per token over the first eval_tokens validation tokens, of which each process computes a share;
    None if a signal to stop arrived in the meantime."""
    loss, tokens, error = 0.0, 0, None
    batches = validation_batches(corpus, config.eval_tokens, config.micro_batch_size, IGNORE, RANK, WORLD)
    try:
        for inputs, targets in batches:
            if machine.stop_signal:
                break
            inputs, targets = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
            loss += model(inputs, targets, reduction="sum").item()
            tokens += (targets != IGNORE).sum().item()
    except (UserError, OSError) as caught:  # summed raises it on all processes
        error = caught
    loss, tokens, stop = machine.summed([loss, tokens, bool(machine.stop_signal)], device, error)
    return None if stop else loss / tokens


def compute_gradient(model, batch, config):
    """Leave the clipped gradient of the whole batch in the model, of which `batch` (rows, seq_len + 1) is the share of
    this process. Returns (mean loss of this share, norm of the gradient before clipping) as floats. The processes
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


def agree(loss, error, device):
    """(mean loss over all processes, signal that told one of them to stop or 0): the same on every process. An error of
    one of them in reading its share of the batch, or None, is raised on all."""
    loss, stop = machine.summed([loss / WORLD, bool(machine.stop_signal)], device, error)
    return loss, (machine.stop_signal or signal.SIGTERM) if stop else 0


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


# ---------------------------------------------------------------------------------------------------------------
# Command line


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        print_keys()
        return 0
    try:
        return train(*read_command(argv))
    except (UserError, OSError) as error:
        # The first process prints, and torchrun then ends the others. If it does not, the first one of each node
        # prints.
        if RANK:
            time.sleep(5)
        if LOCAL_RANK == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    machine.watch_signals()
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
