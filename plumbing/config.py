"""Where the values of keys come from: defaults, a Python file, the command line; each replaces those before.

The file is executed, so it can import another one. Until the values are complete they stay plain dicts, so that every
object of `Keys` is valid.
"""

import contextlib
import difflib
import math
import runpy
from dataclasses import field, fields
from pathlib import Path

from plumbing.command import UserError, first_line

ROOT = Path(__file__).resolve().parent.parent
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def key(default, help, **limits):
    """A config key with limits as in `check_limits`. A whole number is at most 2^31, unless a limit is given: no size
    or number of steps is larger."""
    if type(default) is int and not limits.keys() & {"below", "most"}:
        limits["most"] = 2**31
    return field(default=default, metadata={"help": help, "limits": limits})


def check_limits(name, value, low=-math.inf, below=math.inf, most=math.inf, choices=None):
    """UserError unless a number satisfies low ≤ number < below and number ≤ most, and a text is one of the choices."""
    if choices and value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    if isinstance(value, int | float) and not (low <= value < below and value <= most):
        limits = f"at least {low}"
        limits += f" and below {below}" if below < math.inf else ""
        limits += f" and at most {most}" if most < math.inf else ""
        raise UserError(f"{name} must be {limits}, not {value}")


class Keys:
    """The base of a frozen dataclass whose fields are made by `key`."""

    FIXED = ()  # names of keys that a resumed run must not change

    def __post_init__(self):
        for item in fields(self):
            check_limits(item.name, getattr(self, item.name), **item.metadata["limits"])

    @classmethod
    def defaults(cls):
        return {item.name: item.default for item in fields(cls)}

    @classmethod
    def typed(cls, values, where):
        """{key: value in its type} of raw ones, from Python or the command line. For an unknown key, a UserError that
        names the nearest known one."""
        kinds = {item.name: item.type for item in fields(cls)}
        for name, value in values.items():
            if name not in kinds:
                words = name.replace("_", " ")  # learning_rate is called lr, "peak learning rate"
                described = [item.name for item in fields(cls) if words in item.metadata["help"]]
                nearest = difflib.get_close_matches(name, kinds, n=1) or described
                hint = f"did you mean {nearest[0]!r}?" if nearest else "train.py --help lists all keys"
                raise UserError(f"unknown key {name!r} {where}: {hint}")
            if "," in str(value) and name not in ("data", "out"):
                raise UserError(f"{name} must be one value, not {value!r}: python -m tools.compare takes lists")
        return {name: typed(name, kinds[name], value) for name, value in values.items()}

    @classmethod
    def read_file(cls, path):
        """{key: value} that a config file assigns. It is looked for here, then beside train.py."""
        if not Path(path).is_file() and (ROOT / path).is_file():
            path = ROOT / path
        if Path(path).suffix != ".py":
            hint = "to continue a run, give its config and --resume"
            raise UserError(f"{path} is not a config file, a Python file that ends in .py; {hint}")
        if not Path(path).is_file():
            nearby = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("[!_]*.py")))
            raise UserError(f"there is no config {path}: there are {nearby}")
        try:
            values = runpy.run_path(str(path))
        except (Exception, SystemExit) as error:
            raise UserError(f"config {path} does not run: {type(error).__name__}: {first_line(error)}") from None
        helper = (type(math), type, type(len), type(key))  # modules, classes and functions that a config may import
        values = {name: value for name, value in values.items() if name[0] != "_" and not isinstance(value, helper)}
        return cls.typed(values, f"in {path}")

    @classmethod
    def read_command(cls, argv):
        """({key: value} of defaults and file, {key: value} of the command line) of `CONFIG.py --key=value …`."""
        files = [argument for argument in argv if not argument.startswith("--")]
        if len(files) != 1:
            example = "train.py configs/demo.py --max_steps=100"
            given = " ".join(files) or "none"
            raise UserError(f"give one config file, and options with =, as in {example}; not {given}")
        pairs = [argument[2:].partition("=") for argument in argv if argument.startswith("--")]
        options = cls.typed({name: value if equals else True for name, equals, value in pairs}, "on the command line")
        if not options.get("out", True):  # --out= means the default
            del options["out"]
        from_file = cls.defaults() | cls.read_file(files[0])
        return from_file | {"out": from_file["out"] or f"out/{Path(files[0]).stem}"}, options

    @classmethod
    def resumed(cls, saved, from_file, options):
        """The object to resume with, from {"config": …, "from_file": …} of a checkpoint: the saved config, changed by
        the keys edited in the config file since the checkpoint, and by the command line. UserError if that changes a
        FIXED key."""
        then = saved["from_file"]
        changes = {name: value for name, value in from_file.items() if value != then.get(name, value)} | options
        for name in cls.FIXED:
            # Of a path, the name alone counts: an activation's file may move. What it computes is compared later.
            if name in changes and Path(str(changes[name])).name != Path(str(saved["config"][name])).name:
                change = f"{name} from {saved['config'][name]!r} to {changes[name]!r}"
                raise UserError(f"--resume cannot change {change}: leave it out, or start a new run with another --out")
        return cls(**(from_file | saved["config"] | changes))

    @classmethod
    def help(cls):
        """A line for each key."""
        lines = [f"  --{item.name}={item.default}".ljust(34) + item.metadata["help"] for item in fields(cls)]
        return "\n".join(["Keys, with their defaults:\n", *lines])


def typed(name, kind, value):
    """A value in the type `kind` of its key; UserError if it has none."""
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        if kind is str and isinstance(value, str) and "\0" not in value:
            return value
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return kind(number)
    raise UserError(f"{name} must be {KINDS[kind]}, not {value!r}")
