"""Write xielu_vectors.json, against which any implementation of xIELU can be tested (docs/kernels.md):

    python -m tools.vectors

mpmath (PyTorch brings it) computes with 50 digits; each result is written as the nearest float64.
"""

import json
import random
import sys
from pathlib import Path

import torch
from mpmath import exp, expm1, log, log1p, mpf, workdps

if not __package__:
    print("error: start it as  python -m tools.vectors", file=sys.stderr)
    sys.exit(2)

from plumbing.command import Parser, program

PATH = Path(__file__).with_name("xielu_vectors.json")
BETA = 0.5
# The effective scalars: the start; a small αp, and αn just above β; both large; two pairs in between
ALPHAS = [(0.8, 0.8), (0.01, 0.501), (10, 10), (0.3, 1.5), (2.5, 0.6)]
# float64, float32: more than twice the largest error of the formula as it stands, with expm1(x) − x (7.5e-16 and
# 4.3e-7); xielu.py has 5e-16 and 1.4e-7. bfloat16: what one rounding of the result may lose, 2⁻⁸
TOLERANCE = {"float64": 2e-15, "float32": 1e-6, "bfloat16": 4e-3}
ABOUT = "xIELU. |error| <= tolerance * (|expected| + unit); unit: 1 for df_dx, 0 for df_draw_p, |x| for the others"


def exact(values, dtype):
    """The numbers of `dtype` nearest to these, as floats."""
    return torch.tensor([float(value) for value in values], dtype=torch.float64).to(dtype).tolist()


def inputs():
    """The x of each case, exact in bfloat16: 0, half powers of 10, and random ones. (A whole power, −1e-6, is the eps
    that some implementations compare x with. At the tie, autograd gives half of either gradient.)"""
    draw = random.Random(0)
    values = [sign * 10 ** (k + 0.5) for sign in (-1, 1) for k in range(-13, 5)]
    values += [draw.uniform(-8, 8) for _ in range(40)] + [(-1) ** k * 10 ** draw.uniform(-3, 2) for k in range(40)]
    return sorted({0.0, *exact(values, torch.bfloat16)})


def case(raw_p, raw_n):
    """One case: the scalars, and for each x its results."""
    p, n, rows = mpf(raw_p), mpf(raw_n), []
    alpha_p, alpha_n = log1p(exp(p)), BETA + log1p(exp(n))
    for x in map(mpf, inputs()):
        above, below = (x, 0) if x > 0 else (0, x)  # each on its own side of the axis
        f = alpha_p * above**2 + alpha_n * (expm1(below) - below) + BETA * x
        slope = 2 * alpha_p * above + alpha_n * expm1(below) + BETA
        by_raw = above**2 / (1 + exp(-p)), (expm1(below) - below) / (1 + exp(-n))
        rows.append([float(value) for value in (x, f, slope, *by_raw)])
    return {"raw_p": raw_p, "raw_n": raw_n, "alpha_p": float(alpha_p), "alpha_n": float(alpha_n), "rows": rows}


@workdps(50)
def text():
    """The content of the file, with one line per x. The raw scalars are exact in float32."""
    raw = [exact([log(expm1(p)), log(expm1(n - BETA))], torch.float32) for p, n in ALPHAS]
    columns = ["x", "f", "df_dx", "df_draw_p", "df_draw_n"]
    content = {"about": ABOUT, "beta": BETA, "tolerance": TOLERANCE, "columns": columns}
    lines = json.dumps(content | {"cases": [case(*pair) for pair in raw]})
    return lines.replace("[[", "[\n[").replace("], [", "],\n[").replace("]]", "]\n]") + "\n"


def write(argv):
    """Write the file; the command takes no arguments."""
    Parser("python -m tools.vectors").parse_args(argv)
    PATH.write_text(text(), "utf-8")


main = program(write)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
