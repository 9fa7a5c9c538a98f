"""A copy of a data set with smaller images, which are read faster: `--cache 256`.

    <root>/cache/<name>-short256-<digest of the source>/{train,val}/<class>/<file>      and, when it is complete, complete.json

The short side of each image is resized to that many pixels, by Pillow with antialiasing (bicubic), and stored as JPEG of quality 95. An
image whose short side is not longer is copied as it is. File names are kept, also their endings, so lists of labels name the same images.

Each file is written under another name and renamed, so a process that is stopped or killed leaves only whole files, the next one makes the
rest, and several may make the same copy at the same time.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from common.data.images import read_image
from common.data.paths import DataError, Paths
from common.data.sets import Data, Split
from common.data.workers import make_workers, worker_batches

QUALITY = 95  # of the JPEG files
FILES = 32  # that a worker writes before it reports


@dataclass(frozen=True)
class SmallCopy:
    """The copy of a data set in which the short side of images has at most `side` pixels. Raises DataError for images in memory."""

    source: Data
    side: int
    root: Path  # directory of the named data sets

    def __post_init__(self) -> None:
        if self.source.train.images is not None:
            what = f"the images of {self.source.name} are in memory and not in files"
            raise DataError(f"{what}, so a copy with a short side of {self.side} pixels has no use: leave out --cache")

    @cached_property
    def folder(self) -> Path:
        """Named after the content of the source: other images under the same name have another copy."""
        digests = f"{self.source.train.digest()} {self.source.val.digest()}"
        digest = hashlib.sha256(digests.encode()).hexdigest()[:12]
        return Path(self.root) / "cache" / f"{self.source.name}-short{self.side}-{digest}"

    @cached_property
    def data(self) -> Data:
        """The data set whose images are those of the copy, in the same order. It can be described and checked before the copy is made."""
        train, val = (self._split(part) for part in ("train", "val"))
        return replace(self.source, name=f"{self.source.name}-short{self.side}", train=train, val=val)

    def make(self, workers: int, show: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Write the files that are missing, in `workers` processes. `show` is called with the number of finished files and of all.

        Raises DataError, with the file, if an image cannot be read or written. With skip_corrupt an image that cannot be read becomes an
        empty file, which the loader then replaces as it would replace the image.
        """
        marker = self.folder / "complete.json"
        if marker.exists():
            return
        splits = [(getattr(self.source, part), getattr(self.data, part)) for part in ("train", "val")]
        done, total = 0, sum(len(ours) for _, ours in splits)
        show(0, total)
        for theirs, ours in splits:
            assert theirs.paths is not None and ours.paths is not None
            files = _Files(theirs.paths, ours.paths, self.side, theirs.skip_corrupt)
            for written in worker_batches(make_workers(files, workers, batch_size=FILES)):
                done += len(written)
                show(done, total)
        os.sync()  # so that, after a crash of the machine, a copy that is complete has no empty files
        facts = {"images": total, "short_side": self.side, "quality": QUALITY, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        with _renamed(str(marker)) as temporary:
            Path(temporary).write_text(json.dumps(facts) + "\n")

    def _split(self, part: str) -> Split:
        source: Split = getattr(self.source, part)
        assert source.paths is not None
        root, cut = f"{self.folder / part}/", len(source.paths.root)
        classes = (source.class_names[label] for label in source.labels.tolist())
        names = (f"{name}/{path[cut:].removeprefix(f'{name}/')}" for name, path in zip(classes, source.paths, strict=True))
        paths = Paths(names, root)
        # the files are identified by those that they are made from, so also before they are made
        paths.contents = [f"short side {self.side} of {held}" for held in source.paths.contents]
        return replace(source, paths=paths)


class _Files(Dataset):
    """Item i writes file i of the copy, if it is missing."""

    def __init__(self, sources: Paths, targets: Paths, side: int, skip_corrupt: bool) -> None:
        self.sources, self.targets, self.side, self.skip_corrupt = sources, targets, side, skip_corrupt

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> int:
        source, target = self.sources[index], self.targets[index]
        try:
            if os.path.exists(target) and os.path.getsize(target):  # a crash of the machine may leave an empty file
                return index
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with _renamed(target) as temporary:
                self._write(source, temporary)
        except OSError as error:
            raise DataError(f"{target} cannot be written ({error.strerror or error}): make room, or use another --data-root") from error
        return index

    def _write(self, source: str, target: str) -> None:
        try:
            image = read_image(source)
        except DataError:
            if not self.skip_corrupt:
                raise
            open(target, "wb").close()
            return
        short = min(image.size)
        if short <= self.side:
            shutil.copyfile(source, target)
            return
        # truncated, as torchvision does in the transforms of evaluation
        width, height = (self.side * pixels // short for pixels in image.size)
        image.resize((width, height), Image.Resampling.BICUBIC).save(target, "JPEG", quality=QUALITY)


@contextmanager
def _renamed(path: str) -> Iterator[str]:
    """Yield a path that no other process uses, and rename the file to `path` at the end of the block."""
    temporary = f"{path}.{socket.gethostname()}-{os.getpid()}.partial"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
