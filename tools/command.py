"""What the tools' command lines share: --help prints the tool's docstring, a mistake is one line and status 2."""

import sys

from data import UserError


def run_command(command, argv, doc):
    """The exit status of command(argv), 0 where that is None."""
    if "--help" in argv or "-h" in argv:
        print(doc.strip())
        return 0
    try:
        return command(argv) or 0
    except (UserError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
