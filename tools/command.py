"""What the tools' command lines share: --help prints the tool's docstring, a mistake is one line and status 2, Ctrl-C
one line and status 130."""

import sys

from data import UserError


def run_command(command, argv, doc, interrupted="interrupted"):
    """The exit status of command(argv), 0 where that is None; `interrupted` is what Ctrl-C says."""
    if "--help" in argv or "-h" in argv:
        print(doc.strip())
        return 0
    try:
        return command(argv) or 0
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
