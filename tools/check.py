"""Check an implementation of xIELU, or the scalars in a checkpoint:

    python -m tools.check MODULE:FUNCTION     such as xielu:xielu_reference or path/to/file.py:function
    python -m tools.check xielu               this repository's
    python -m tools.check transformers        Hugging Face's
    python -m tools.check FOLDER              a Hugging Face checkpoint: config.json and *.safetensors

FUNCTION is called as f(x, alpha_p, alpha_n) and differentiated by autograd, on the CPU or, if that fails, on CUDA. x is
float64, float32 or bfloat16; the scalars are raw, of shape (1,), float64 with float64, else float32. The results are
compared with xielu_vectors.json, within the tolerances of docs/kernels.md, for each x by itself and for 130,000
of them in several shapes. A cause is named only where it gives what was found; everything else is listed by quantity,
region and size.

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

if not __package__:
    print("error: start it as  python -m tools.check", file=sys.stderr)
    sys.exit(2)

from plumbing.command import Parser, UserError, program
from plumbing.machine import mend_compiler_cache
from tools.hf import read_tensors

VECTORS = json.loads(Path(__file__).with_name("xielu_vectors.json").read_text("utf-8"))
BETA, CASES = VECTORS["beta"], VECTORS["cases"]
TOLERANCE = {getattr(torch, name): tolerance for name, tolerance in VECTORS["tolerance"].items()}
NAMES = {"xielu": "xielu:xielu_fused", "transformers": "tools.check:of_transformers"}
RESULTS = ("f", "f′", "∂f/∂alpha_p", "∂f/∂alpha_n")
# For each row of each case: x and the raw scalars, of shape (rows,), and the results, of shape (4, rows)
TABLE = [(row[0], case["raw_p"], case["raw_n"], *row[1:]) for case in CASES for row in case["rows"]]
(X, RAW_P, RAW_N), EXPECTED = torch.tensor(TABLE, dtype=torch.float64).T.split([3, 4])
UNIT = torch.stack([X.abs(), torch.ones_like(X), torch.zeros_like(X), X.abs()])
NEAR_0 = (X >= -1e-6) & (X <= 0)
REGIONS = {"x > 0": X > 0, "x < −1e-6": X < -1e-6, "−1e-6 ≤ x ≤ 0": NEAR_0}
OTHER = 1e99  # none of the results
# ∂L/∂y: of either sign, and not only powers of two, which would survive being rounded. In this order the large sums
# below do not cancel
WEIGHT = torch.tensor([8.0, -1.0, 0.7, -4.0, 0.5, 2.0, -0.25], dtype=torch.float64)[torch.arange(len(X)) % 7]

# ---------------------------------------------------------------------------------------------------------------
# Causes

BF16 = "α is in bfloat16, which near −1 has steps of 0.008: keep it in float32"
EPS = "as if x were clamped to −1e-6 (eps) before expm1"
# Causes, and the arguments of `variant` that stand for them
VARIANTS = [
    ("as if β·x were missing", {"linear": 0}),
    ("as if −αn·x were missing", {"inner": 0}),
    ("as if it had +αn·x instead of −αn·x", {"inner": -1}),
    ("as if αn were softplus(alpha_n), without β", {"bound": 0}),
    ("as if softplus were missing", {"softplus": torch.clone}),
    ("as if softplus were taken twice", {"softplus": lambda raw: F.softplus(F.softplus(raw))}),
    ("as if the branches were swapped", {"most": torch.inf, "swapped": True}),
    (EPS, {"most": -1e-6}),
    (BF16, {"softplus": lambda raw: F.softplus(raw.bfloat16().double())}),
    (BF16, {"softplus": lambda raw: F.softplus(raw.bfloat16())}),
]


def variant(linear=BETA, inner=1, bound=BETA, softplus=F.softplus, expm1=torch.expm1, most=0, swapped=False):
    """The results (4, rows) of xIELU in float64, or of one that differs from it by the arguments. most: what x is
    clamped to before expm1."""
    x, raw_p, raw_n = (column.clone().requires_grad_() for column in (X, RAW_P, RAW_N))
    alpha_p, alpha_n = softplus(raw_p).double(), (bound + softplus(raw_n)).double()
    y = torch.where((x > 0) != swapped, alpha_p * x * x, alpha_n * (expm1(x.clamp(max=most)) - inner * x)) + linear * x
    return torch.stack([y, *torch.autograd.grad(y.sum(), (x, raw_p, raw_n))]).detach()


def suspects(found, weight, dtype, in_float32):
    """Pairs of a cause and the results (4, rows) that it leads to, OTHER where it does not apply. weight: ∂L/∂y, which
    the gradients are multiplied by, and 1 for f. in_float32: which results are right if x is float32."""
    expected, size, wide = EXPECTED * weight, X.abs(), torch.promote_types(dtype, torch.float32)
    steps = "as if eˣ − 1 were exp(x) − 1, which has no digits left near 0: use expm1, or a series"
    for cause, parts in [*VARIANTS, (steps, {"expm1": lambda x: torch.exp(x.to(wide)).double() - 1})]:
        yield cause, (variant(**parts) * weight).to(dtype).double()  # ∞ where that overflows
    slope = torch.stack([torch.ones_like(X), torch.ones_like(X), RAW_P.sigmoid(), RAW_N.sigmoid()])
    yield "as if σ(alpha), the slope of softplus, were missing", expected / slope
    uses = ("ignored", "taken without its sign", "squared", "rounded to bfloat16", "rounded to float16")
    weights = (torch.ones_like(weight), weight.abs(), weight**2, weight.bfloat16(), weight.half())
    for use, used in zip(uses, weights):
        yield f"as if ∂L/∂y were {use} in the backward pass", EXPECTED * used
    at_0 = "wrong at x = 0 alone, where torch.min(x, 0), for one, passes on half of the gradient"
    yield at_0, found.where((X == 0) & (found[0] == expected[0]) & ~found.isnan(), expected)
    overflow = found.isnan() & (size > 80)
    yield "NaN, as 0 · ∞ is where the branch not taken overflows: clamp x there", found.where(overflow, expected)
    if dtype == torch.bfloat16:
        advice = "right if x is float32: convert x to float32 first, and only the result back"
        yield advice, found.where(in_float32, OTHER)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for narrow in (other for other in dtypes if torch.finfo(other).eps > torch.finfo(dtype).eps):
        room = 16 * torch.finfo(narrow).eps * (EXPECTED.abs() + UNIT) * weight.abs()
        close = ((found - expected).abs() <= room) | (size < 1e-3) | (size > 100)
        fits = (found == found.to(narrow)) & close & ~NEAR_0  # near 0 right results have as few digits
        yield f"no more digits than {str(narrow)[6:]}: computed in it, or rounded to it", found.where(fits, OTHER)


def sentences(found, weight, dtype, in_float32):
    """What is wrong, as sentences: the worst result; then in each region each cause, with the results that it explains,
    or else how many of a result are wrong, and by how much. And which are right, (4, rows). See `suspects`."""
    expected, unit = EXPECTED * weight, UNIT * weight.abs()
    errors, scale = (found - expected).abs(), expected.abs() + unit
    wrong = ~(errors <= TOLERANCE[dtype] * scale)
    if not wrong.any():
        return [], ~wrong
    worst = (errors / scale).nan_to_num(torch.inf).where(wrong, 0).argmax()
    value, right, name = *((part / weight).flatten()[worst] for part in (found, expected)), RESULTS[worst // len(X)]
    first = f"{name} is {value:.12g} instead of {right:.12g} at x = {X[worst % len(X)]:.12g}"

    # of each cause: clear, where it gives what was found and the right formula does not; near, where it may do so
    causes, lines = [], {}
    for cause, results in suspects(found, weight, dtype, in_float32):
        rest = (found - results).abs()
        same = (found == results) | (found.isnan() & results.isnan())
        clear = same | (rest < 0.01 * errors) & rest.isfinite()
        causes.append((cause, clear, clear | (rest <= 2 * TOLERANCE[dtype] * (results.abs() + unit))))
    sizes = (errors / torch.maximum(expected.abs(), found.abs())).nan_to_num(1)

    def cause_of(k, region, here, bad):
        """What explains the wrong results `bad` of quantity k in a region, or else how wrong they are."""
        for cause, clear, near in causes:
            # many formulas agree near 0, so there a cause must hold for all x ≤ 0, unless it is one of these x alone
            must_fit = X <= 0 if here is NEAR_0 and cause != EPS else here
            # a wrong formula shows in f: it is named for a gradient only if it was for f
            allowed = k == 0 or (region, cause) in lines or cause not in dict(VARIANTS)
            if allowed and near[k, must_fit].all() and clear[k, bad].double().mean() > 0.5:
                return cause
        extent = f"{bad.sum()} of {here.sum()} rows, x from {X[bad].min():.3g} to {X[bad].max():.3g}"
        return f"wrong in {extent}, by {sizes[k, bad].median():.2g} of their size"

    for (region, here), k in itertools.product(REGIONS.items(), range(4)):
        bad = wrong[k] & here
        if bad.any():
            lines.setdefault((region, cause_of(k, region, here, bad)), []).append(RESULTS[k])
    others = [f"{', '.join(names)} for {region}: {cause}" for (region, cause), names in lines.items()]
    return [first, *others], ~wrong


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
    try:
        module, function = name.rsplit(":", 1)
        names = runpy.run_path(module) if module.endswith(".py") else vars(importlib.import_module(module))
        return names[function]
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} is neither a folder nor a MODULE:FUNCTION that can be loaded ({reason})") from None


def evaluate(function, case, x, weights):
    """y and, for each ∂L/∂y of `weights`, the gradients of x and the raw scalars of a case."""
    dtype, leaf = torch.promote_types(x.dtype, torch.float32), x.clone().requires_grad_()  # it may be overwritten
    raw = [torch.tensor([case[key]], dtype=dtype, device=x.device, requires_grad=True) for key in ("raw_p", "raw_n")]
    y = function(leaf, *raw)
    options = {"retain_graph": True, "materialize_grads": True}
    return y, [torch.autograd.grad(y, (leaf, *raw), weight.to(y), **options) for weight in weights]


def results_of(function, dtype, device):
    """The dtype of f; and of shape (4, rows), in float64: f, f′ and the gradients of both raw scalars for each x by
    itself, times ∂L/∂y, and this ∂L/∂y, which is 1 for f."""
    columns = []
    for case, x, weight in zip(CASES, X.view(len(CASES), -1), WEIGHT.clone().view(len(CASES), -1)):
        y, (together, *single) = evaluate(function, case, x.to(device, dtype), [weight, *torch.diag(weight)])
        by_raw = [torch.cat([gradients[k] for gradients in single]) for k in (1, 2)]
        columns.append(torch.stack([part.double().cpu() for part in (y.detach(), together[0], *by_raw)]))
    weight = WEIGHT.to(y.dtype).double()
    return y.dtype, torch.cat(columns, dim=1), torch.stack([torch.ones_like(weight), weight, weight, weight])


def faults_of_use(function, dtype, device):
    """What first goes wrong in five calls, four of them with 130,000 elements, as a list of at most one sentence."""
    weight = WEIGHT.to(dtype).double()
    some = (X.abs() > 1e-3) & (X.abs() < 8) & (RAW_P == RAW_P[0])
    table = torch.stack([X, EXPECTED[0], *EXPECTED[1:] * weight, weight])[:, some]
    many = table.repeat(1, 1680).view(6, 1638, 80)  # no two rows that follow each other are the same
    layouts = many, many.unflatten(1, (6, 273)), many.transpose(1, 2), many, many[:, :0]
    limits = 10 * TOLERANCE[dtype], 10 * TOLERANCE[dtype], 1e-3, 1e-3
    for number, (x, f, slope, by_p, by_n, weight) in enumerate(layouts, start=1):
        x, weight = x.to(device, dtype), weight.to(device, dtype)
        weight = torch.stack([weight, weight], dim=-1)[..., 0]  # not contiguous
        where = f"in call {number}, x of shape {tuple(x.shape)} and strides {x.stride()}"
        try:
            y, (gradients,) = evaluate(function, CASES[0], x, [weight])
        except (Exception, SystemExit) as error:
            return [f"{where}: {raises(error)}"]
        pairs = zip(RESULTS, (y, *gradients), (f, slope, by_p.sum().view(1), by_n.sum().view(1)), limits)
        wrong = [name for name, a, b, limit in pairs if not torch.allclose(a.double().cpu(), b, limit, limit)]
        if wrong:
            return [f"{where}: {', '.join(wrong)} wrong, though right for each x by itself"]
    return []


def raises(error):
    return f"raises {type(error).__name__}: {' '.join(str(error).split()):.200}"


def check_in(dtype, function, in_float32, device="cpu"):
    """Say how a function fares in a dtype. Return "sound", "faulty", or "error" if it raises one; and which results are
    right, (4, rows). in_float32: the latter for the dtype before."""
    try:
        returned, found, weight = results_of(function, dtype, device)
    except (Exception, SystemExit) as error:
        if device == "cpu" and torch.cuda.is_available():
            return check_in(dtype, function, in_float32, "cuda")
        print(f"{dtype}: {raises(error)}")
        return "error", torch.zeros_like(in_float32)
    lines, right = sentences(found, weight, dtype, in_float32)
    if returned != dtype:
        lines.insert(0, f"the result is in {returned}")
    lines = lines or faults_of_use(function, dtype, device)
    print(f"{dtype}: {'faulty' if lines else 'sound'}", *lines, sep="\n    ")
    return "faulty" if lines else "sound", right


# ---------------------------------------------------------------------------------------------------------------
# A checkpoint


def check_folder(folder):
    """Print the effective scalars of each layer of a Hugging Face checkpoint; the exit status."""
    path, faulty = folder / "config.json", False
    try:
        config = dict(json.loads(path.read_text("utf-8")))
        layers, activation = config["num_hidden_layers"], config.get("hidden_act")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} does not describe a language model: {error!r:.200}") from None
    if activation != "xielu":
        raise UserError(f"the model in {folder} has no xIELU: its hidden_act is {activation!r:.50}")
    if type(layers) is not int or not 1 <= layers <= 10_000:
        raise UserError(f"{path}: num_hidden_layers must be a whole number from 1 to 10,000, not {layers!r:.50}")
    tensors = {name.rpartition("layers.")[2]: tensor for name, tensor in read_tensors(folder).items()}
    names, absent = ("alpha_p", "alpha_n", "beta", "eps"), torch.tensor(torch.nan)
    for layer in range(layers):
        found = [tensors.get(f"{layer}.mlp.act_fn.{name}", absent) for name in names]
        raw_p, raw_n, beta, eps = values = [tensor.double().sum() for tensor in found]
        sane = raw_p.isfinite(), raw_n.isfinite(), beta == BETA, eps.abs() <= 1e-5
        lines = [f"{name} is missing or wrong: {value:.6g}" for name, value, ok in zip(names, values, sane) if not ok]
        lines += [BF16] * (torch.bfloat16 in (found[0].dtype, found[1].dtype))
        outcome = f"{'faulty' if lines else 'sound'}, αp = {F.softplus(raw_p):.4f}, αn = {beta + F.softplus(raw_n):.4f}"
        faulty |= bool(lines)
        if -1e-5 <= eps <= 0:  # as transformers has it
            lines.append(f"note: with eps = {eps:.6g} the gradient at 0 is not β; with 1e-6 it is")
        print(f"layer {layer}: {outcome}", *lines, sep="\n    ")
    return 1 if faulty else 0


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
        return check_folder(Path(target))
    function = load(NAMES.get(target, target))
    mend_compiler_cache()
    outcomes, right = [], torch.zeros_like(EXPECTED, dtype=torch.bool)
    for dtype in TOLERANCE:
        torch.compiler.reset()  # after eight variants of a compiled function, the next would not be compiled
        outcome, right = check_in(dtype, function, right)
        outcomes.append(outcome)
    if set(outcomes) == {"error"}:
        print("faulty: it raises an error in every dtype")
    return 0 if "sound" in outcomes and "faulty" not in outcomes else 1


main = program(check)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
