"""Files that are whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(path.name + ".partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that is given out; at the end it is forced to disk and renamed to `path`.

    A crash at any moment leaves the old file or the new one. Where writing fails the old one stays, and the error goes on.
    """
    temporary = partial(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too, is on disk
    finally:
        os.close(directory)
