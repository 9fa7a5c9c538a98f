"""Paths of a split's files: one array that loader workers share, and what identifies the files.

Shapes: N files.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy

# sets of at most so many files are known by the sizes of these too, and of at most so many bytes in all by their contents
CONTENT_FILES, CONTENT_BYTES = 20_000, 512 * 2**20


class DataError(ValueError):
    """A fault in the data that the user can mend; the message says where and how."""


class Paths(Sequence):
    """The paths of N files as one array of bytes instead of N objects: loader workers, which are forked, share it with their parent.

    Of a list of str each would in time have a copy, because looking at an object writes its reference count. `paths[i]` makes a str;
    a slice or an array of int64 selects, and copies no name. Names that are not UTF-8 survive as os.fsdecode writes them.
    """

    def __init__(self, names: Iterable[str], root: str | None = None) -> None:
        """root: what stands before every name, such as data/train/. Left out, it is the folder that all have in common."""
        if root is None:
            names = [os.fspath(name) for name in names]
            root = os.path.commonprefix([min(names), max(names)]) if names else ""
            root = root[: root.rfind("/") + 1]
            names = (name[len(root) :] for name in names)
        self.root, names = root, iter(names)
        held, ends = bytearray(), [numpy.empty(0, numpy.int64)]
        while part := [*itertools.islice(names, 2**16)]:  # not all at once, so that memory never holds the names as objects
            encoded = os.fsencode("\0".join(part)) + b"\0"
            ends.append((numpy.frombuffer(encoded, numpy.uint8) == 0).nonzero()[0] + len(held))
            if len(ends[-1]) != len(part):
                raise DataError(f"{next(name for name in part if chr(0) in name)!r} is no path: it holds a zero byte")
            held += encoded
        self._bytes, self._ends = numpy.frombuffer(held, numpy.uint8), numpy.concatenate(ends)  # each name ends with a zero byte
        self._whole: Paths | None = None  # that this is a selection of
        self._rows: numpy.ndarray | None = None  # which of its names these are: (N,) int64

    def __len__(self) -> int:
        return len(self._ends if self._rows is None else self._rows)

    def __getitem__(self, index):  # type: ignore[override]
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
            index = index if index.size else index.astype(numpy.int64)  # of an empty list numpy makes floats
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

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[str]) -> list[str]:
        return [*self, *other]

    def __repr__(self) -> str:
        return f"<{len(self)} paths below {self.root!r}>"

    @cached_property
    def contents(self) -> list[str]:
        """What each file holds, as text: its size, a hyphen, and where all are small a hash of its bytes. Empty where there are too many.

        Read once; see CONTENT_FILES and CONTENT_BYTES, which count the set that this is a selection of. Of a file that is not there: "-".
        """
        if self._whole is not None:
            whole = self._whole.contents
            return [whole[row] for row in self._rows] if whole else []
        if len(self) > CONTENT_FILES:
            return []
        sizes = [_size(path) for path in self]
        hashed = sum(filter(None, sizes)) <= CONTENT_BYTES
        return [f"{'' if size is None else size}-{_hash(path) if hashed else ''}" for path, size in zip(self, sizes, strict=True)]

    def digest(self) -> str:
        """A hash of the names below `root` in their order, and of `contents`; of a selection, of the whole's digest and its rows."""
        if self._whole is None:
            found = hashlib.sha256(self._bytes)
            found.update("\n".join(self.contents).encode())
        elif numpy.array_equal(self._rows, numpy.arange(len(self._ends))):
            return self._whole.digest()
        else:
            found = hashlib.sha256(self._whole.digest().encode())
            found.update(numpy.ascontiguousarray(self._rows))
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
    except OSError:  # opening a data set reads no image: a fault in one is reported when it is its turn
        return ""
    return found.hexdigest()[:16]
