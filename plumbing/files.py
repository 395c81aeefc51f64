"""Files that are never half written, and folders that have one writer."""

import json
import os

from plumbing.command import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_atomically(path, write):
    """Call write(file) on a temporary file and rename it to `path`, so that a file of this name is always complete."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    """Write a JSON file atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def lock_folder(folder, wait=False):
    """Create a folder and lock it. Returns an open file that holds the lock until it is closed or the process dies,
    however it dies. If another process has the lock, say so and wait for it, or raise UserError. NotADirectoryError if
    a file is in the folder's place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        text = f"{folder} cannot be a folder, since a file is in its place: choose another --out"
        raise NotADirectoryError(text) from None
    file = open(folder / "lock", "a")
    if not fcntl:
        print(f"warning: Windows does not lock folders: start one run in {folder} at a time")
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(f"another process writes to {folder}: let it end, or choose another --out") from None
        print(f"another process writes to {folder}: waiting until it ends", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f"warning: {folder} is on a disk without locks ({error.strerror}): start one run in it at a time")
    return file
