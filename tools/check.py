"""Check an implementation of xIELU, or the scalars in a checkpoint:

    python -m tools.check MODULE:FUNCTION     such as xielu:xielu_reference or path/to/file.py:function
    python -m tools.check xielu               this repository's
    python -m tools.check transformers        Hugging Face's
    python -m tools.check FOLDER              a Hugging Face checkpoint: config.json and *.safetensors

FUNCTION is called as f(x, alpha_p, alpha_n) and differentiated by autograd, on the CPU or, if that fails, on CUDA. x is
float64, float32 or bfloat16; the scalars are raw, of shape (1,), float64 with float64, else float32. The results are
compared with xielu_vectors.json, within the errors that docs/vectors.md justifies. Wrong ones are explained if up to
three known faults together give the same.

The exit status is 0 for sound, 1 for faulty, 2 for a mistake in the command.
"""

import importlib.util
import itertools
import json
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from plumbing.command import Parser, UserError, run_command
from tools.hf import read_tensors

VECTORS = json.loads(Path(__file__).with_name("xielu_vectors.json").read_text("utf-8"))
BETA, CASES = VECTORS["beta"], VECTORS["cases"]
TOLERANCE = {getattr(torch, name): tolerance for name, tolerance in VECTORS["tolerance"].items()}
RESULTS = ("f", "f′", "∂f/∂alpha_p", "∂f/∂alpha_n")
NAMES = {"xielu": "xielu:xielu_fused", "transformers": "tools.check:of_transformers"}
# For each row of each case: x and the raw scalars, of shape (rows,), and the results, of shape (4, rows)
TABLE = [(row[0], case["raw_p"], case["raw_n"], *row[1:]) for case in CASES for row in case["rows"]]
(X, RAW_P, RAW_N), EXPECTED = torch.tensor(TABLE, dtype=torch.float64).T.split([3, 4])
UNIT = torch.stack([X.abs(), torch.ones_like(X), torch.zeros_like(X), X.abs()])

# ---------------------------------------------------------------------------------------------------------------
# Known faults

BF16 = "α is in bfloat16, which near −1 has steps of 0.008: keep it in float32"
FAULTS = {
    "β above": "for x > 0 the result lacks β·x",
    "β below": "for x ≤ 0 the result lacks β·x",
    "α·x": "for x ≤ 0 the result lacks −αn·x",
    "sign": "for x ≤ 0 the result has +αn·x instead of −αn·x",
    "bound": "αn lacks β: it is softplus(alpha_n) alone",
    "softplus": "softplus is missing: alpha_p and alpha_n are raw",
    "eps": "x is clamped to −1e-6 (eps) before expm1: f(0) is not 0, and the gradient at 0 is β − αn instead of β",
    "at 0": "the gradient at exactly 0 is not β; torch.min(x, 0), for one, passes half of it on there",
    "stored": BF16,
    "alpha": BF16,
    "exp": "exp(x) − 1 has no digits left near 0: use expm1, or a series",
    "coarse": "its errors are those of arithmetic in bfloat16: convert x to float32 first, and only the result back",
}


def faulty(faults, dtype):
    """What xIELU with these of FAULTS gives, and how far from that it may be if it has no other: each (4, rows)."""
    x, raw_p, raw_n = (column.clone().requires_grad_() for column in (X, RAW_P, RAW_N))
    computed = torch.bfloat16 if "alpha" in faults else torch.float64
    stored = torch.bfloat16 if "stored" in faults else computed
    softplus = torch.clone if "softplus" in faults else F.softplus
    alpha_p = softplus(raw_p.to(stored).to(computed)).double()
    alpha_n = (softplus(raw_n.to(stored).to(computed)) + BETA * ("bound" not in faults)).double()
    linear = x * (1 - ("α·x" in faults) - 2 * ("sign" in faults))
    positive = alpha_p * x * x + BETA * x * ("β above" not in faults)
    negative = alpha_n * (torch.expm1(x.clamp(max=-1e-6 * ("eps" in faults))) - linear)
    y = torch.where(x > 0, positive, negative + BETA * x * ("β below" not in faults))
    results = torch.stack([y, *torch.autograd.grad(y.sum(), (x, raw_p, raw_n))]).detach()

    scale, alpha_n = results.abs() + UNIT, alpha_n.detach()
    room = scale * TOLERANCE[dtype]
    if "coarse" in faults and dtype == torch.bfloat16:
        room = 16 * alpha_n * (room + TOLERANCE[dtype])
    # near 0 the errors of float32 for 1, or of bfloat16 for eps
    room[0] += alpha_n * (X <= 0) * (5e-7 * ("exp" in faults) + 5e-8 * ("eps" in faults))
    room[1, (X == 0) & ("at 0" in faults)] = torch.inf
    room[2:] = 0.06 * scale[2:] + room[0]  # these gradients may be rounded to the dtype of the scalars
    return results, room


def explanation(found, dtype):
    """Sentences about the NaNs in wrong results (4, rows), and the fewest faults, at most three, that give the rest."""
    nan = found.isnan()
    lines = ["it gives NaN, as 0 · ∞ is where the branch not taken overflows: clamp x there"] * nan.any().item()
    for count in range(4):
        for faults in itertools.combinations(FAULTS, count):
            results, room = faulty(faults, dtype)
            if (nan | ((found - results).abs() <= room)).all():
                lines += [FAULTS[fault] for fault in faults]
                return lines or ["f and f′ are right, and the gradients of the scalars roughly"]
    return [*lines, "no known faults explain this"]


# ---------------------------------------------------------------------------------------------------------------
# A function


def of_transformers(x, raw_p, raw_n):
    """The module in transformers' table of activations, with the scalars in the dtype that it keeps them in."""
    from transformers.activations import ACT2FN

    module = ACT2FN["xielu"]
    scalars = {"alpha_p": raw_p.to(module.alpha_p.dtype), "alpha_n": raw_n.to(module.alpha_n.dtype)}
    return torch.func.functional_call(module, scalars, x)


def load(name):
    """The function called MODULE:FUNCTION; UserError if there is none."""
    module, colon, function = name.rpartition(":")
    if not colon:
        raise UserError(f"{name} is neither MODULE:FUNCTION nor a folder (python -m tools.check --help)")
    try:
        if module.endswith(".py"):
            return runpy.run_path(module)[function]
        return getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from None


def results_of(function, dtype, device):
    """f, f′ and the gradients of both raw scalars for each x, (4, rows) in float64, and the dtype of f."""
    columns, wide = [], torch.promote_types(dtype, torch.float32)
    for case in CASES:
        x = torch.tensor([row[0] for row in case["rows"]], dtype=dtype, device=device).requires_grad_()
        raw = [torch.tensor([case[key]], dtype=wide, device=device).requires_grad_() for key in ("raw_p", "raw_n")]
        y = function(x, *raw)
        each = torch.eye(len(x), dtype=y.dtype, device=device)
        (slope,) = torch.autograd.grad(y, x, each.sum(0), retain_graph=True)
        by_raw = [torch.autograd.grad(y, raw, one, retain_graph=True, materialize_grads=True) for one in each]
        columns.append([part.detach().double().cpu() for part in (y, slope, *map(torch.cat, zip(*by_raw)))])
    return torch.stack([torch.cat(parts) for parts in zip(*columns)]), y.dtype


def check_in(dtype, function, device="cpu"):
    """Say how a function fares in a dtype: True if it is sound, False if it is faulty, None if it raises an error."""
    try:
        found, returned = results_of(function, dtype, device)
    except (Exception, SystemExit) as error:
        if device == "cpu" and torch.cuda.is_available():
            return check_in(dtype, function, "cuda")
        print(f"{dtype}: raises {type(error).__name__}: {' '.join(str(error).split()):.200}")
        return None
    error, room = (found - EXPECTED).abs(), TOLERANCE[dtype] * (EXPECTED.abs() + UNIT)
    excess = torch.where(error <= room, 0, error / room).nan_to_num(torch.inf)
    lines = [] if returned == dtype else [f"the result is in {returned}"]
    if excess.any():
        which, row = divmod(excess.argmax().item(), len(X))
        values = f"{found[which, row]:.12g} instead of {EXPECTED[which, row]:.12g} at x = {X[row]:.12g}"
        lines += [f"{RESULTS[which]} is {values}", *explanation(found, dtype)]
    print(f"{dtype}: {'faulty' if lines else 'sound'}", *lines, sep="\n    ")
    return not lines


# ---------------------------------------------------------------------------------------------------------------
# A checkpoint


def check_folder(folder):
    """Print the effective scalars of each layer of a Hugging Face checkpoint; whether all are sound."""
    try:
        config = dict(json.loads((folder / "config.json").read_text("utf-8")))
        layers = range(config["num_hidden_layers"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'} does not describe a language model: {error!r}") from None
    if config.get("hidden_act") != "xielu":
        raise UserError(f"the model in {folder} has no xIELU: its hidden_act is {config.get('hidden_act')}")
    tensors = {name.rpartition("layers.")[2]: tensor for name, tensor in read_tensors(folder).items()}
    names, absent, sound = ("alpha_p", "alpha_n", "beta", "eps"), torch.tensor(torch.nan), True
    for layer in layers:
        found = [tensors.get(f"{layer}.mlp.act_fn.{name}", absent) for name in names]
        raw_p, raw_n, beta, eps = (tensor.double().sum() for tensor in found)
        sane = raw_p.isfinite(), raw_n.isfinite(), beta == BETA, -1e-5 <= eps <= 0
        lines = [f"{name} is missing or wrong: {one.tolist()}" for name, one, ok in zip(names, found, sane) if not ok]
        lines += [BF16] * (torch.bfloat16 in (found[0].dtype, found[1].dtype))
        values = f"αp = {F.softplus(raw_p):.4f}, αn = {beta + F.softplus(raw_n):.4f}"
        print(f"layer {layer}: {'faulty' if lines else 'sound'}, {values}", *lines, sep="\n    ")
        sound = sound and not lines
    return sound


# ---------------------------------------------------------------------------------------------------------------


def check(argv):
    """Check what a command line names; the exit status."""
    parser = Parser("python -m tools.check")
    parser.add_argument("target")
    target = parser.parse_args(argv).target
    is_folder = target not in NAMES and Path(target).is_dir()
    if importlib.util.find_spec("transformers") is None and (is_folder or target == "transformers"):
        raise UserError("this check needs an optional package: pip install transformers")
    if is_folder:
        return 0 if check_folder(Path(target)) else 1
    function = load(NAMES.get(target, target))
    outcomes = [check_in(dtype, function) for dtype in TOLERANCE]
    if set(outcomes) == {None}:
        print("faulty: it raises an error in every dtype")
    return 0 if True in outcomes and False not in outcomes else 1


def main(argv):
    return run_command(check, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
