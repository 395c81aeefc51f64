"""The text of a derived file: the table of its formulas, their code, and the class that train.py loads."""

import re

import sympy

from tools.formula import GREEK, show
from tools.stable import Writer, fit


def table(positive, negative, trained, symbols):
    """The rows of gradient, integral and the scalars' gradients in x, aligned: a list of lines."""
    rows = [["", "x > 0", "x ≤ 0"]]
    sides = (positive, negative)
    rows.append(["gradient f′", *(show(side.in_x(side.gradient)) for side in sides)])
    rows.append(["integral f", *(show(side.in_x(side.integral), symbols) for side in sides)])
    for scalar in trained:
        formulas = [show(side.in_x(sympy.diff(side.integral, scalar.symbol)), symbols) for side in sides]
        rows.append([f"∂f/∂{GREEK.get(scalar.name, scalar.name)}", *formulas])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["    ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def describe_scalar(scalar):
    """How a scalar is made."""
    if not scalar.trained:
        return f"{scalar.name} = {scalar.start} is fixed"
    if scalar.bound is None:
        return f"{scalar.name} is trained, from {scalar.start}"
    bound = "" if scalar.bound_name == "0" else f"{scalar.bound_name} + "
    return f"{scalar.name} = {bound}softplus(raw) is trained, from {scalar.start}"


def either(texts, formulas, scalars):
    """The code of one text for x > 0, the other for x ≤ 0; those without a tensor are made one."""
    fixed = {scalar.name for scalar in scalars if not scalar.trained}
    for number, formula in enumerate(formulas):
        if {symbol.name for symbol in formula.free_symbols} <= fixed:
            texts[number] = f"torch.full_like(p, {texts[number]})"
    return f"torch.where(p > 0, {', '.join(texts)})"


def value_code(positive, negative, scalars, series, form):
    """The function of f(x): each side is 0 where the other is not, so it is their sum."""
    writer = Writer(scalars, series)
    sides = [side for side in (positive, negative) if side.integral != 0]
    texts = [writer.write(form(side.integral), side.size) for side in sides]
    names = ["positive" if side is positive else "negative" for side in sides]
    lines = [f"{name} = {text}" for name, text in zip(names, texts)]
    return function_code(
        "value", "f(x) of x and the scalars of the table.", scalars, writer.lines + lines, " + ".join(names)
    )


def partials_code(positive, negative, scalars, series, form):
    """The function of f′(x) and the scalars' gradients."""
    writer = Writer(scalars, series)
    gradients = [form(side.gradient) for side in (positive, negative)]
    texts = [writer.write(gradient, side.size) for gradient, side in zip(gradients, (positive, negative))]
    results = [either(texts, gradients, scalars)]
    for scalar in scalars:
        if scalar.trained:
            by_side = [(form(sympy.diff(side.integral, scalar.symbol)), side.size) for side in (positive, negative)]
            parts = [writer.write(formula, size) for formula, size in by_side if formula != 0]
            results.append(" + ".join(parts).replace("+ -", "- "))
    about = "f′(x), and ∂f/∂a for each trained scalar a."
    returned = "(\n" + "".join(f"        {result},\n" for result in results) + "    )"
    return function_code("partials", about, scalars, writer.lines, returned)


def function_code(name, about, scalars, lines, returned):
    arguments = ", ".join(["x", *(scalar.name for scalar in scalars if scalar.trained)])
    body = ["p, m = sides(x)", *lines, f"return {returned}"]
    for number, line in enumerate(body):  # of what a line unpacks, name only what is used
        names, equals, call = line.partition(" = ")
        if ", " in names and equals:
            used = [re.search(rf"\b{name}\b", "\n".join(body[number + 1 :])) for name in names.split(", ")]
            names = ", ".join(name if found else "_" for name, found in zip(names.split(", "), used))
            body[number] = f"{names} = {call}"
    return "\n".join([f"def {name}({arguments}):", f'    """{about}"""', *(f"    {line}" for line in body)])


def series_code(series):
    """The fitted coefficients, each list under what it is of."""
    lines = []
    for (function, order, cut), name in series.items():
        below = f"its Taylor terms below t^{order}" if order > 1 else "its value at 0"
        lines.append(f"# ({show(function)} less {below}) / t^{order} = c₀ + c₁·u + …, u = t − {cut / 2}, for t < {cut}")
        lines.append(f"{name} = {{")
        for dtype, coefficients in fit(function, order, cut).items():
            lines.append(f"    torch.{dtype}: [")
            for first in range(0, len(coefficients), 4):
                lines.append(f"        {', '.join(map(repr, coefficients[first : first + 4]))},")
            lines.append("    ],")
        lines.append("}")
    return "\n".join(lines)


def file_text(name, command, positive, negative, scalars, form):
    """The whole derived file, its formulas in a form that form(formula) gives."""
    trained = [scalar for scalar in scalars if scalar.trained]
    symbols = [scalar.symbol for scalar in scalars]
    rows = table(positive, negative, trained, symbols)
    series = {}
    functions = [code(positive, negative, scalars, series, form) for code in (value_code, partials_code)]
    body = "\n\n\n".join(filter(None, [series_code(series), *functions]))
    helpers = [name for name in ("exp_terms", "near_zero", "sides", "split") if f"{name}(" in body]
    formula = [show(side.in_x(side.integral), symbols) for side in (positive, negative)]
    limits = [f"{scalar.name} {'>' if scalar.trained else '='} {scalar.limit}" for scalar in scalars if scalar.limit]
    formula = [f"{formula[0]} for x > 0", f", {formula[1]} for x ≤ 0", f" ({', '.join(limits)})" if limits else ""]
    imports = ["import math", ""] if "math." in body else []
    imports += ["import torch", ""] if "torch." in body else []
    imports += ["from activations import Activation", f"from integral import {', '.join(['Integrated', *helpers])}"]
    bounds = {scalar.name: scalar.bound_name if scalar.bound_name != "0" else "0.0" for scalar in trained}
    bounds = ", ".join(f'"{key}": {bound or None}' for key, bound in bounds.items())
    starts = ", ".join(f'"{scalar.name}": {scalar.start!r}' for scalar in trained)
    return "\n".join(
        [
            f'"""{name}: the integral of a gradient, written by tools/derive.py.',
            "",
            *(f"    {row}".rstrip() for row in rows),
            "",
            *(f"{describe_scalar(scalar)}." for scalar in scalars),
            "",
            "In the code p = max(x, 0) and m = max(−x, 0); integral.py says what the other names are. It comes from",
            "",
            *(f"    {line}" for line in command),
            '"""',
            "",
            *imports,
            "",
            *(f"{scalar.name} = {scalar.start!r}" for scalar in scalars if not scalar.trained),
            "",
            "",
            body,
            "",
            "",
            "class Derived(Integrated):",
            f'    """{name} with its trained scalars."""',
            "",
            f"    start = {{{starts}}}",
            f"    bound = {{{bounds}}}",
            "    value = staticmethod(value)",
            "    partials = staticmethod(partials)",
            "",
            "",
            "FORMULA = (",
            *(f'    "{part}"' for part in formula if part),
            ")",
            "ACTIVATION = Activation(FORMULA, Derived)",
            "",
        ]
    )


def command_lines(name, texts, scalars, allow_jump):
    """The command that makes a derived file, from what was read of it."""
    given = [f'--{option}="{text}"' for option, text in texts.items()]
    for option, trained in (("trained", True), ("fixed", False)):
        chosen = ", ".join(scalar.text for scalar in scalars if scalar.trained == trained)
        given += [f'--{option}="{chosen}"'] if chosen else []
    given += ["--allow_jump"] if allow_jump else []
    return (
        [f"python -m tools.derive {name} {' '.join(given[:2])} \\", f"    {' '.join(given[2:])}"]
        if given[2:]
        else [f"python -m tools.derive {name} {' '.join(given)}"]
    )
