"""What makes a run the same run: it must end with the config and the activation with which it began. A formula may stay
the same while its code changes, so the code is compared too."""

import ast
import hashlib
import inspect
import sys
import textwrap
from functools import partial
from types import FunctionType

from activations import get_activation
from command import UserError


def is_constant(item):
    """Whether an object is a number or a text, or a list, tuple or dict of such. A switch like xielu.COMPILE is not: it
    changes no formula."""
    if isinstance(item, dict | list | tuple):
        return all(map(is_constant, item.values() if isinstance(item, dict) else item))
    return isinstance(item, int | float | str | None) and not isinstance(item, bool)


def own_source(module):
    """{name: hash} of what an activation's module consists of: its class, the functions and constants that it holds,
    and those that they call by a plain name in turn, but for Python's own and PyTorch. Not followed are cached
    functions and calls through a module (as `helper.f`). Comments and docstrings do not count."""
    found, seen = {}, set()
    held = [pair for part in module.modules() for pair in [("class", type(part)), *vars(part).items()]]
    waiting = [(name, item) for name, item in held if name[0] != "_"]
    for name, item in waiting:  # the list grows meanwhile
        if is_constant(item):
            found.setdefault(name, set()).add(repr(item))
        if isinstance(item, partial):
            waiting += [(name, part) for part in (item.func, *item.args, *item.keywords.values())]
        if not isinstance(item, FunctionType | type) or item in seen:
            continue
        if item.__module__.split(".")[0] in {"torch", *sys.stdlib_module_names}:
            continue
        seen.add(item)
        source = textwrap.dedent(inspect.getsource(item))
        try:
            code = ast.parse(source)
        except SyntaxError:  # a lambda: its lines are not a whole statement, so their text stands for them
            code = ast.parse(repr(source))
        for node in ast.walk(code):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                del node.body[0]
        # unparse, because dump differs between versions of Python
        found.setdefault(item.__qualname__, set()).add(ast.unparse(code))
        known = dict(vars(sys.modules[item.__module__]))
        if isinstance(item, FunctionType):
            known |= inspect.getclosurevars(item).nonlocals  # they hide what the module calls by the same name
        names = {node.id for node in ast.walk(code) if isinstance(node, ast.Name)}
        waiting += [(name, known[name]) for name in names & known.keys()]
    return {name: hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()[:16] for name, texts in found.items()}


def describe(config):
    """What identifies a run: its config, and its activation's formula and source."""
    activation = get_activation(config.activation)
    return {"config": vars(config), "formula": activation.formula, "source": own_source(activation.module())}


def check_activation(about, config):
    """UserError if the activation of this name is no longer the one with which a run began, which `about` describes.
    (An imported run does not say.)"""
    now = describe(config)
    formula, source = about.get("formula", now["formula"]), about.get("source", now["source"])
    changes = sorted(name for name in source | now["source"] if source.get(name) != now["source"].get(name))
    if formula != now["formula"]:
        changes = [f"it was {formula}, now {now['formula']}"]
    if changes:
        raise UserError(
            f"{config.activation} has changed since the run began ({', '.join(changes)}): restore it, or "
            f"start a new run with another --out"
        )
