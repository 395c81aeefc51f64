"""Command lines: how options are read, and how a mistake becomes one line and a status."""

import argparse
import contextlib
import os
import sys
import time


class UserError(ValueError):
    """A mistake that the user can correct. Its text is one line that says what is wrong and how to fix it."""


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors. --help is left to `program`."""

    def __init__(self, prog):
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def whole_number(text):
    """A whole number of at least 1 from 1000000, 1_000_000 or 1e6."""
    with contextlib.suppress(ValueError):
        if (value := float(text)) >= 1 and value.is_integer():
            return int(value)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")


def format_seconds(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def refuse_windows(program):
    """UserError on Windows, which lacks the signals that a program uses."""
    if sys.platform == "win32":
        raise UserError(f"{program} needs Linux, macOS or WSL: it uses signals that Windows lacks")


def program(command, doc=None, interrupted="interrupted"):
    """The main(argv) of a program, which does command(argv) and returns the exit status: what the command returns, or 0
    for None; 2 after a UserError, an OSError or a full disk, with one line about it; 130 after Ctrl-C, which prints
    `interrupted`. --help prints `doc` instead; None: that of the command's file."""

    def main(argv):
        if "--help" in argv or "-h" in argv:
            print((doc or sys.modules[command.__module__].__doc__).strip())
            return 0
        try:
            return command(argv) or 0
        except Exception as error:
            text = str(error)
            if not isinstance(error, UserError | OSError):
                if "No space left on device" not in text:
                    raise
                # which PyTorch's compiler and safetensors raise as errors of their own
                text = f"{first_line(error)}: make room (compiled code is in TORCHINDUCTOR_CACHE_DIR, or in TMPDIR)"
            # Of processes that torchrun started, the first prints, and torchrun ends the others. If it does not, the
            # first one of each node prints.
            if os.environ.get("RANK", "0") != "0":
                time.sleep(5)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("error:", " ".join(text.split()), file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            return 130

    return main
