"""Check an implementation of xIELU, or the scalars in a checkpoint:

    python -m tools.check MODULE:FUNCTION     such as xielu:xielu_reference or path/to/file.py:function
    python -m tools.check xielu               this repository's
    python -m tools.check transformers        Hugging Face's
    python -m tools.check FOLDER              a Hugging Face checkpoint: config.json and *.safetensors

FUNCTION is called as f(x, alpha_p, alpha_n) and differentiated by autograd, on the CPU or, if that fails, on CUDA. x is
float64, float32 or bfloat16; the scalars are raw, of shape (1,), float64 with float64, else float32. The results are
compared with xielu_vectors.json, within the errors that docs/vectors.md justifies, for each x by itself and for 130,000
of them in several shapes. Wrong ones are explained if up to three known faults together give the same; else it is said
which of them are wrong where, and by how much.

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
# What each f′ and ∂f/∂α is multiplied by on the way back: powers of two, which no rounding touches
ROWS = len(CASES[0]["rows"])
WEIGHT = (
    torch.tensor([-4.0, 0.5, 2.0, -0.25, 8.0, -1.0, 0.125], dtype=torch.float64).repeat(ROWS)[:ROWS].repeat(len(CASES))
)
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
    "twice": "softplus is taken twice: alpha_p and alpha_n are raw, and its result is taken for raw again",
    "σ": "the gradients of alpha_p and alpha_n lack the factor σ(alpha), the slope of softplus",
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
    if "twice" in faults:
        softplus = lambda raw: F.softplus(F.softplus(raw))  # noqa: E731
    alpha_p = softplus(raw_p.to(stored).to(computed)).double()
    alpha_n = (softplus(raw_n.to(stored).to(computed)) + BETA * ("bound" not in faults)).double()
    linear = x * (1 - ("α·x" in faults) - 2 * ("sign" in faults))
    positive = alpha_p * x * x + BETA * x * ("β above" not in faults)
    negative = alpha_n * (torch.expm1(x.clamp(max=-1e-6 * ("eps" in faults))) - linear)
    y = torch.where(x > 0, positive, negative + BETA * x * ("β below" not in faults))
    results = torch.stack([y, *torch.autograd.grad(y.sum(), (x, raw_p, raw_n))]).detach()
    if "σ" in faults:
        results[2:] /= torch.stack([RAW_P, RAW_N]).sigmoid()

    scale, alpha_n = results.abs() + UNIT, alpha_n.detach()
    room = scale * TOLERANCE[dtype]
    if "coarse" in faults and dtype == torch.bfloat16:
        room = 16 * alpha_n * (room + TOLERANCE[dtype])
    # near 0 the errors of float32 for 1, or of bfloat16 for eps
    room[0] += alpha_n * (X <= 0) * (5e-7 * ("exp" in faults) + 5e-8 * ("eps" in faults))
    room[1, (X == 0) & ("at 0" in faults)] = torch.inf
    room[2:] = 0.06 * scale[2:] + room[0]  # these gradients may be rounded to the dtype of the scalars
    return results, room


def explanation(found, excess, dtype, coarse):
    """(sentences about wrong results (4, rows), whether they explain them): what is done with ∂L/∂y; NaNs; and the
    fewest faults, at most three, that give the rest, or else where it is wrong. `coarse`: whether arithmetic in
    bfloat16 may be to blame."""
    room = TOLERANCE[dtype] * (EXPECTED.abs() + UNIT)
    for what, weight in {"is ignored": 1 / WEIGHT, "loses its sign": WEIGHT.sign(), "is squared": WEIGHT}.items():
        right = torch.stack([EXPECTED[0], EXPECTED[1] * weight])
        if ((found[:2] - right).abs() <= 20 * room[:2]).all():
            return [f"∂L/∂y {what} in the backward pass"], True
    above = F.softplus(RAW_P) * X * X + BETA * X
    if ((found[0] - above).abs() <= 2 * TOLERANCE[dtype] * (above.abs() + X.abs()))[X < 0].all():
        return ["for x ≤ 0 it gives αp·x² + β·x, which is the branch for x > 0"], True
    for narrow in (torch.bfloat16, torch.float16):
        if dtype != narrow and torch.equal(found[0], found[0].to(narrow).double()):
            line = (
                f"f has no more digits than {str(narrow)[6:]}, in which it is computed: convert x to float32 at least"
            )
            return [line], True
    nan = found.isnan()
    lines = ["it gives NaN, as 0 · ∞ is where the branch not taken overflows: clamp x there"] * nan.any().item()
    for count in range(4):
        for faults in itertools.combinations(FAULTS, count):
            if "coarse" in faults and not coarse:
                continue
            results, room = faulty(faults, dtype)
            if (nan | (found == results) | ((found - results).abs() <= room)).all():
                lines += [FAULTS[fault] for fault in faults]
                return lines or ["f and f′ are right, and the gradients of the scalars roughly"], True
    return [*lines, *regions(found, excess)], False


def regions(found, excess):
    """For each quantity that is wrong, (4, rows), where it is and by how much."""
    for name, values, right, unit, wrong in zip(RESULTS, found, EXPECTED, UNIT, excess > 0):
        for side, here in (("x > 0", wrong & (X > 0)), ("x ≤ 0", wrong & (X <= 0))):
            if here.any():
                error = ((values - right).abs() / (right.abs() + unit))[here].median().item()
                places = f"{side}, from {X[here].min():.3g} to {X[here].max():.3g}"
                yield f"{name} is wrong for {here.sum()} of the x with {places}, by {error:.2g} of its size"


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
        weight = WEIGHT[: len(x)].to(device)
        each = torch.diag(weight.to(y.dtype))
        (slope,) = torch.autograd.grad(y, x, each.sum(0), retain_graph=True)
        by_raw = [torch.autograd.grad(y, raw, one, retain_graph=True, materialize_grads=True) for one in each]
        parts = [y.double(), *(part.double() / weight for part in (slope, *map(torch.cat, zip(*by_raw))))]
        columns.append([part.detach().cpu() for part in parts])
    return torch.stack([torch.cat(parts) for parts in zip(*columns)]), y.dtype


def faults_of_use(function, dtype, device):
    """What goes wrong with 130,000 elements in other shapes and layouts than a vector, as sentences."""
    case, wide = CASES[0], torch.promote_types(dtype, torch.float32)
    rows = torch.tensor([row for row in case["rows"] if 1e-3 < abs(row[0]) < 8], dtype=torch.float64)
    n, weight = len(rows), WEIGHT[: len(rows)]
    many = 4 * (2**15 // n)
    f, slope = rows[:, 1], rows[:, 2] * weight
    totals = many * (rows[:, 3:] * weight.abs().unsqueeze(1)).sum(0)  # of either sign, they would cancel

    def wrong(layout, sums=False):
        x = layout(rows[:, 0].to(dtype).to(device).repeat(many, 1)).requires_grad_()
        y = function(
            x, *(raw := [torch.tensor([case[k]], dtype=wide, device=device, requires_grad=True) for k in keys])
        )
        by = weight.abs() if sums else weight
        grad = layout(by.to(y.dtype).to(device).expand(many, n))  # not contiguous
        grads = torch.autograd.grad(y, (x, *raw), grad, materialize_grads=True)
        if sums:
            return [abs(total.item() - right) > 1e-3 * abs(right) for total, right in zip(grads[1:], totals.tolist())]
        right = [layout(part.expand(many, n)) for part in (f, slope)]
        found = [part.detach().double().cpu() for part in (y, grads[0])]
        rooms = [10 * TOLERANCE[dtype] * (part.abs() + layout(weight.abs().expand(many, n))) for part in right]
        return [a.shape != b.shape or ((a - b).abs() > room).any() for a, b, room in zip(found, right, rooms)]

    keys, lines = ("raw_p", "raw_n"), []
    layouts = {
        "of two dimensions": lambda part: part,
        "of three dimensions": lambda part: part.unflatten(0, (4, -1)),
        "that are not contiguous": lambda part: part.t(),
        "in a second call": lambda part: part,
    }
    try:
        for name, layout in layouts.items():
            if any(wrong(layout)):
                lines.append(f"f or f′ is wrong for {many * n:,} elements {name}, and right for a vector")
        if any(wrong(layouts["of two dimensions"], sums=True)):
            lines.append(
                f"the gradients of the scalars are wrong by over 0.1 % of their sum over {many * n:,} elements"
            )
        empty = torch.zeros(0, 3, dtype=dtype, device=device, requires_grad=True)
        if function(empty, *(torch.tensor([case[key]], dtype=wide, device=device) for key in keys)).shape != (0, 3):
            lines.append("an empty input loses its shape")
    except (Exception, SystemExit) as error:
        lines.append(f"other shapes raise {type(error).__name__}: {' '.join(str(error).split()):.200}")
    return lines


def check_in(dtype, function, coarse, device="cpu"):
    """Say how a function fares in a dtype, and return it: "sound", "explained", "unexplained", or "error" if it raises
    one. `coarse`: whether arithmetic in bfloat16 may be to blame, since nothing in wider dtypes is unexplained."""
    try:
        found, returned = results_of(function, dtype, device)
    except (Exception, SystemExit) as error:
        if device == "cpu" and torch.cuda.is_available():
            return check_in(dtype, function, coarse, "cuda")
        print(f"{dtype}: raises {type(error).__name__}: {' '.join(str(error).split()):.200}")
        return "error"
    error, room = (found - EXPECTED).abs(), TOLERANCE[dtype] * (EXPECTED.abs() + UNIT)
    excess = torch.where(error <= room, 0, error / room).nan_to_num(torch.inf)
    lines, known = [] if returned == dtype else [f"the result is in {returned}"], True
    if excess.any():
        which, row = divmod(excess.argmax().item(), len(X))
        values = f"{found[which, row]:.12g} instead of {EXPECTED[which, row]:.12g} at x = {X[row]:.12g}"
        sentences, known = explanation(found, excess, dtype, coarse)
        lines += [f"{RESULTS[which]} is {values}", *sentences]
    else:
        lines += faults_of_use(function, dtype, device)
    print(f"{dtype}: {'faulty' if lines else 'sound'}", *lines, sep="\n    ")
    return ("explained" if known else "unexplained") if lines else "sound"


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
        sane = raw_p.isfinite(), raw_n.isfinite(), beta == BETA, -1e-5 <= eps <= 1e-5
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
    outcomes = []
    for dtype in TOLERANCE:
        outcomes.append(check_in(dtype, function, coarse="unexplained" not in outcomes))
    if set(outcomes) == {"error"}:
        print("faulty: it raises an error in every dtype")
    return 0 if "sound" in outcomes and set(outcomes) <= {"sound", "error"} else 1


def main(argv):
    return run_command(check, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
