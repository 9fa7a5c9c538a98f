"""Atomic writes of files, and locks."""

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def partial(path: Path) -> Path:
    """The temporary path of a file, before it is renamed."""
    return path.with_name(path.name + ".partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block the file is synced to disk and renamed to `path`.

    The file gets the permissions of a new file under the umask, also where the writer (safetensors) chooses others.
    A crash at any moment leaves the old file or the new one. If writing fails, the old file is kept and the error is raised; an OSError
    names the file, which those of a write do not.
    """
    temporary = partial(path)
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # also sync the new name to disk
    finally:
        os.close(directory)


def digest(path: Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file, or of the names and contents of all files in a folder."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as content:
                found.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
                while block := content.read(2**20):
                    found.update(block)
    return found.hexdigest()[:16]


class Locked(RuntimeError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` until the end of the block; the file is created if missing.

    If another process holds the lock, wait for it, or raise Locked. The lock is released when the process ends, in any way. On a file
    system without locks (some network file systems) a warning is logged, and the block runs without a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Locked(f"{path} is locked by another process") from None
            log.warning("%s: this file system has no locks (%s), so make sure that nothing else writes here", path.parent, error.strerror)
        os.register_at_fork(after_in_child=lock.close)  # a worker that outlives its killed parent would keep the lock
        yield
