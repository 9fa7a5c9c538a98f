"""Paths of the files of a split: one array shared with loader workers, and a digest that identifies the files.

Shapes: N files.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy

# the digest includes file sizes up to this number of files, and also file contents up to this number of bytes in total
CONTENT_FILES, CONTENT_BYTES = 20_000, 512 * 2**20


class DataError(ValueError):
    """An error in the data that the user can fix; the message says where and how."""


class Paths(Sequence[str]):
    """The paths of N files as one array of bytes instead of N objects: forked loader workers share it with their parent.

    With a list of str, each worker would in time have a copy, because access to an object writes its reference count. `paths[i]` is a
    str; a slice or an array of int64 selects without copying names. Names that are not UTF-8 are kept, as os.fsdecode decodes them.
    """

    def __init__(self, names: Iterable[str], root: str | None = None) -> None:
        """root: prefix of all names, such as data/train/. By default the common folder of all names."""
        if root is None:
            names = [os.fspath(name) for name in names]
            root = os.path.commonprefix([min(names), max(names)]) if names else ""
            root = root[: root.rfind("/") + 1]
            names = (name[len(root) :] for name in names)
        self.root, names = root, iter(names)
        held, ends = bytearray(), [numpy.empty(0, numpy.int64)]
        while part := [*itertools.islice(names, 2**16)]:  # in parts, so that memory never holds all names as objects
            encoded = os.fsencode("\0".join(part)) + b"\0"
            ends.append((numpy.frombuffer(encoded, numpy.uint8) == 0).nonzero()[0] + len(held))
            if len(ends[-1]) != len(part):
                raise DataError(f"{next(name for name in part if chr(0) in name)!r} is not a path: it contains a zero byte")
            held += encoded
        self._bytes, self._ends = numpy.frombuffer(held, numpy.uint8), numpy.concatenate(ends)  # each name ends with a zero byte
        self._whole: Paths | None = None  # the Paths from which this is a selection
        self._rows: numpy.ndarray | None = None  # indices of the selected names: (N,) int64

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    def __getitem__(self, index):
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"path {index} of {len(self)}")
            row = range(len(self))[index] if self._rows is None else int(self._rows[index])
            begin = int(self._ends[row - 1]) + 1 if row else 0
            return self.root + os.fsdecode(self._bytes[begin : int(self._ends[row])].tobytes())
        if not isinstance(index, slice):
            index = numpy.asarray(index)
            if index.ndim == 0:
                return self[int(index)]
            index = index if index.size else index.astype(numpy.int64)  # numpy converts an empty list to floats
        part = object.__new__(Paths)
        part.__dict__ |= {name: held for name, held in self.__dict__.items() if name != "contents"}
        part._whole = self if self._whole is None else self._whole
        part._rows = (numpy.arange(len(self)) if self._rows is None else self._rows)[index]
        return part

    def __iter__(self) -> Iterator[str]:
        if self._rows is not None:
            yield from (self[index] for index in range(len(self)))
            return
        begin = 0
        for last in range(2**16 - 1, len(self) + 2**16 - 1, 2**16):
            end = int(self._ends[min(last, len(self) - 1)])
            yield from (self.root + name for name in os.fsdecode(self._bytes[begin:end].tobytes()).split("\0"))
            begin = end + 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Paths, list, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    def __add__(self, other: Iterable[str]) -> list[str]:
        return [*self, *other]

    def __repr__(self) -> str:
        return f"<{len(self)} paths below {self.root!r}>"

    @cached_property
    def contents(self) -> list[str]:
        """The content of each file, as text: its size, a hyphen, and a hash of its bytes if the total size is small. Empty for many files.

        Read once. CONTENT_FILES and CONTENT_BYTES are the limits; for a selection they apply to the whole. "-" for a missing file.
        """
        if self._whole is not None and self._rows is not None:
            whole = self._whole.contents
            return [whole[row] for row in self._rows] if whole else []
        if len(self) > CONTENT_FILES:
            return []
        sizes = [_size(path) for path in self]
        hashed = sum(filter(None, sizes)) <= CONTENT_BYTES
        return [f"{'' if size is None else size}-{_hash(path) if hashed else ''}" for path, size in zip(self, sizes, strict=True)]

    def digest(self) -> str:
        """A hash of the names below `root`, in order, and of `contents`; for a selection, of the digest of the whole and the rows."""
        if self._whole is None or self._rows is None:
            found = hashlib.sha256(self._bytes.data)
            found.update("\n".join(self.contents).encode())
        elif numpy.array_equal(self._rows, numpy.arange(len(self._ends))):
            return self._whole.digest()
        else:
            found = hashlib.sha256(self._whole.digest().encode())
            found.update(numpy.ascontiguousarray(self._rows).data)
        return found.hexdigest()


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _hash(path: str) -> str:
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                found.update(part)
    except OSError:  # opening a data set does not decode images: an unreadable file is reported when it is loaded
        return ""
    return found.hexdigest()[:16]
