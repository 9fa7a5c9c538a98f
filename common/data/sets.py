"""Where images come from: data sets by name, or any folder in ImageFolder layout.

Shapes: N images, C channels, H x W pixels.
"""

import csv
import difflib
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, extract_archive

from common.data.paths import DataError, Paths
from common.files import locked, replacing
from common.randomness import generator

NAMES = ("digits", "cifar10", "cifar100", "tiny-imagenet", "mini-imagenet")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MINI_CLASSES, MINI_IMAGES, MINI_TRAIN = 100, 600, 500  # of Mini-ImageNet: classes, images of each, and how many of these train
# folders that systems and not people make, beside those whose names begin with a dot
FOREIGN = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass(eq=False)
class Split:
    """Labelled images, either in memory or as files.

    Raises DataError unless it is exactly one of the two, one label per image, and images are uint8 (N, C, H, W).
    """

    labels: Tensor  # (N,) int64
    images: Tensor | None = None  # (N, C, H, W) uint8
    paths: Sequence[str] | None = None  # kept as Paths
    class_names: tuple[str, ...] = ()
    skip_corrupt: bool = False  # an unreadable file is replaced by the next readable one instead of ending the run

    def __post_init__(self) -> None:
        if (self.images is None) == (self.paths is None):
            raise DataError("a split holds either images or paths")
        if self.paths is not None and not isinstance(self.paths, Paths):
            self.paths = Paths(self.paths)
        if self.images is not None and (self.images.dtype != torch.uint8 or self.images.ndim != 4):
            given = f"images of shape {tuple(self.images.shape)} and type {self.images.dtype}"
            mend = "convert pixels from 0..1 by (255 * images).round().to(torch.uint8), and NHWC by images.permute(0, 3, 1, 2)"
            raise DataError(f"{given}: a split holds a torch.uint8 tensor (N, C, H, W) of 0 to 255; {mend}")
        count = len(self.images if self.paths is None else self.paths)
        if count != len(self.labels):
            raise DataError(f"{count} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | Tensor) -> "Split":
        """The images at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = None if self.images is None else self.images[chosen]
        paths = None if self.paths is None else self.paths[chosen.numpy()]
        return Split(self.labels[chosen], images, paths, self.class_names, self.skip_corrupt)

    def per_class(self, n: int, seed: int) -> "Split":
        """`n` labels of each class, drawn with `seed`; fewer labels of the same seed are a subset of more.

        Raises DataError naming the class where one has fewer than `n` images.
        """
        return self._draw([n] * self.classes, seed)

    def balanced(self, fraction: float, seed: int) -> "Split":
        """The `fraction` of all labels, as many of each class as can be, drawn with `seed`; which classes give one more is drawn too.

        On ImageNet 0.01 gives 12,811 images: 13 of 811 classes and 12 of 189, as in the lists that papers use.
        Raises DataError where that is less than one label per class, or a class has too few.
        """
        total = int(fraction * len(self))
        if total < self.classes:
            least = f"{self.classes} of {len(self)} are the least"
            raise DataError(f"a fraction of {fraction} is {total} of {len(self)} labels, for {self.classes} classes: ask for more, {least}")
        each, rest = divmod(total, self.classes)
        order = torch.randperm(self.classes, generator=generator(seed, self.classes)).tolist()
        return self._draw([each + (place < rest) for place in order], seed)

    def listed(self, path: Path) -> "Split":
        """The images that a file names, one on each line, by file name or by class and file name: n01440764_10026.JPEG or cat/1.png.

        Raises DataError where the images are not files, and for names that are absent, stand for several images, or come twice.
        """
        if self.paths is None:
            raise DataError(f"{path} lists images by name, and these have none, they are in memory: use data in files, or no list")
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")  # as names of files are decoded
        names = [line.strip() for line in text.splitlines() if line.strip()]
        known: dict[str, list[int]] = {name: [] for name in names}
        for index, file in enumerate(self.paths):
            folder, _, short = file.rpartition("/")
            for name in (short, f"{folder.rpartition('/')[2]}/{short}"):
                if name in known:
                    known[name].append(index)
        absent = [name for name in names if not known[name]]
        if absent or not names:
            what = f"names {len(absent)} of {len(names)} images that are absent, the first is {absent[0]!r}" if names else "names no image"
            raise DataError(f"{path} {what}: give the list of this data set, with one file name, or class/file name, on each line")
        for name in names:
            if len(known[name]) > 1:
                raise DataError(f"{path} names {name!r}, and {len(known[name])} images are called so: write class/file name")
        chosen = sorted(known[name][0] for name in names)
        if len(set(chosen)) < len(chosen):
            twice = next(self.paths[a] for a, b in itertools.pairwise(chosen) if a == b)
            raise DataError(f"{path} lists {twice} twice: delete one of the lines")
        return self.subset(chosen)

    @property
    def classes(self) -> int:
        return max(len(self.class_names), int(self.labels.max()) + 1 if len(self) else 0)

    def digest(self) -> str:
        """What tells this split from others, in hexadecimal, computed once: labels, class names, and pixels or files.

        Files are known by their names below the folder that they share, so not by where that lies, nor by their times. Of a set of up to
        20,000 files and 512 MiB the contents count too, of a larger one of so many files the sizes. What is not noticed: in sets of more
        files that one is replaced under its name; in those that are known by sizes, that it is replaced by one of the same size; and
        whatever happens after the first call.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
        for tensor in (self.labels, self.images):
            if tensor is not None:
                found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().numpy().reshape(-1).view(numpy.uint8))  # in place, however large it is
        if self.paths is not None:
            found.update(self.paths.digest().encode())
        return found.hexdigest()

    def _draw(self, counts: Sequence[int], seed: int) -> "Split":
        """So many labels of each class."""
        chosen = []
        for number, count in enumerate(counts):
            members = (self.labels == number).nonzero()[:, 0]
            if len(members) < count:
                name = self.class_names[number] if self.class_names else number
                fault = f"class {name} has {len(members)} images, fewer than {count}"
                raise DataError(f"{fault}: ask for at most {len(members)} labels per class")
            chosen.append(members[torch.randperm(len(members), generator=generator(seed, number))[:count]])
        return self.subset(torch.cat(chosen).sort().values)


@dataclass(eq=False)
class Data:
    """A data set: what it is called, what its images look like, and its two splits."""

    name: str
    classes: int
    channels: int
    image_size: tuple[int, int] | None  # (height, width) in pixels; None where images differ in size
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    train: Split
    val: Split
    split: str = ""  # what tells train from val where the data set itself does not: name and digest of the file

    def __post_init__(self) -> None:
        for part in (self.train, self.val):
            if part.images is not None and part.images.shape[1] != self.channels:
                shape = tuple(part.images.shape)
                raise DataError(f"{self.name}: images of shape {shape}, and channels={self.channels}: a split holds (N, C, H, W)")

    @property
    def identity(self) -> dict[str, str]:
        """What was opened, whatever it is called: a line for each split, of how much it holds and Split.digest."""
        return {
            name: f"{len(split)} images, {split.classes} classes, {split.digest()[:16]}"
            for name, split in (("train", self.train), ("val", self.val))
        }


def open_data(name: str, root: Path = Path("data"), skip_corrupt: bool = False) -> Data:
    """Open `digits`, `cifar10`, `cifar100`, `tiny-imagenet`, `mini-imagenet` (kept under `root`), or the folder that `name` is the path of.

    A folder holds train/ and val/ (or test/ where there is no val/), each with one folder per class. `mini-imagenet` is divided as
    mini-imagenet-split.csv under `root` says; where that is missing it is drawn and written. With `skip_corrupt` an unreadable image
    file is replaced by the next readable one. Raises DataError that says what is missing and how to mend it.
    """
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, Path(root))
    if name == "tiny-imagenet":
        return _tiny_imagenet(Path(root) / "tiny-imagenet-200", skip_corrupt)
    if name == "mini-imagenet":
        return _mini_imagenet(Path(root) / "mini-imagenet", Path(root) / "mini-imagenet-split.csv", skip_corrupt)
    if Path(name).is_dir():
        return _folder(Path(name), skip_corrupt)
    nearest = difflib.get_close_matches(name.lower(), NAMES, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise DataError(
        f"{name!r} is neither a data set nor a folder: {guess}give one of {', '.join(NAMES)}, or the path of a folder with train/ and val/"
    )


_limits = threading.Lock()
_unlimited = 0  # how many blocks of any_size are open


@contextmanager
def any_size() -> Iterator[None]:
    """Within the block Pillow opens and cuts images of any size, and reads any text in them, without a warning.

    Its guards are against strangers' files, and these are the user's own. They are global: the last thread to leave restores them.
    """
    global _unlimited, _guards
    with _limits:
        if _unlimited == 0:
            _guards = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = None, 2**31 - 1, 2**31 - 1
        _unlimited += 1
    try:
        yield
    finally:
        with _limits:
            _unlimited -= 1
            if _unlimited == 0:
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = _guards


def read_image(path: str) -> Image.Image:
    """Decode a file of any kind and size that Pillow knows to 8-bit RGB. Raises DataError naming the file where that fails.

    Transparency is dropped, as ImageNet pipelines do. Grey values of 16 bits (0 to 65535) and floats (0 to 1) are scaled to 8 bits;
    others are refused with their range, as clipping would make them black or white.
    """
    try:
        with any_size(), Image.open(path) as image:
            if 4 * image.width * image.height > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
                raise MemoryError  # before the kernel kills a process, for what may be a broken header
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return Image.fromarray(_to_bytes(path, numpy.asarray(image))).convert("RGB")
            # Pillow turns a palette with transparent entries into RGB only by way of RGBA
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} has more pixels than fit into memory: give a smaller copy of it, or pass --skip-corrupt") from error
    except Exception as error:  # decoders raise a dozen kinds of exceptions on broken files
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, and not of a decoder
            raise DataError(f"{path} cannot be opened ({error.strerror}): make it readable, or pass --skip-corrupt") from error
        mend = "if other programs show it, save it anew as PNG or JPEG; otherwise delete it, or pass --skip-corrupt"
        raise DataError(f"{path} cannot be read as an image ({error}): {mend}") from error


def _to_bytes(path: str, values: numpy.ndarray) -> numpy.ndarray:
    """Grey pixels of 16 or 32 bits, integers or floats, as uint8. Raises DataError for a range that has no usual meaning."""
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if low >= 0 and high <= 1:
            return (values * 255).round().astype(numpy.uint8)
        what, wanted = "float pixels", "floats are read from 0 to 1"
    elif 0 <= low and high <= 65535 and not 0 < high < 257:
        return (values.astype(numpy.int64) // 257).astype(numpy.uint8)
    else:
        what, wanted = "pixels of more than 8 bits", "these are read from 0 to 65535"
        wanted += ", where they would all be black" if 0 <= low and high <= 65535 else ""
    raise DataError(f"{path} has {what} from {low} to {high}, and {wanted}: save it with 8 bits, or pass --skip-corrupt")


def _digits() -> Data:
    # imported here because scikit-learn takes a second to load, and only this set needs it
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    train, val = train_test_split(numpy.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    everything = Split(labels, images, class_names=tuple("0123456789"))
    return _in_memory("digits", everything.subset(train), everything.subset(val))


def _cifar(name: str, root: Path) -> Data:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]

    def load(download: bool) -> list:
        return [kind(root, train=train, download=download) for train in (True, False)]

    try:
        try:
            sets = load(download=False)  # needs no lock, and so no folder that can be written to
        except (OSError, RuntimeError):
            # one process downloads and unpacks; those that wait for it find everything there, as torchvision looks before it downloads
            with locked(root / f"{name}.lock", wait=True):
                archive, names = root / kind.filename, root / kind.base_folder / kind.meta["filename"]
                if check_integrity(archive, kind.tgz_md5) and not check_integrity(names, kind.meta["md5"]):
                    # a process was killed while it unpacked; torchvision itself unpacks again only where images are missing
                    extract_archive(archive, root)
                sets = load(download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} is not in {root} and cannot be downloaded ({error}): put {kind.filename} from {kind.url} there") from error
    splits = [
        Split(torch.tensor(part.targets), torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), class_names=tuple(part.classes))
        for part in sets
    ]
    return _in_memory(name, *splits)


def _in_memory(name: str, train: Split, val: Split) -> Data:
    images = train.images
    assert images is not None
    levels = torch.arange(256, dtype=torch.float64) / 255
    # counting grey levels is exact and needs no float copy of the set
    frequencies = [torch.bincount(channel.flatten(), minlength=256) / channel.numel() for channel in images.unbind(1)]
    mean = [float((frequency * levels).sum()) for frequency in frequencies]
    std = [float((frequency * (levels - m) ** 2).sum().sqrt()) for frequency, m in zip(frequencies, mean, strict=True)]
    size = (images.shape[2], images.shape[3])
    return Data(name, len(train.class_names), images.shape[1], size, tuple(mean), tuple(std), train, val)


def _tiny_imagenet(folder: Path, skip_corrupt: bool) -> Data:
    annotations = folder / "val" / "val_annotations.txt"
    if not (folder / "train").is_dir() or not annotations.is_file():
        missing = annotations if (folder / "train").is_dir() else folder / "train"
        url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        raise DataError(f"{missing} not found: download {url} and unpack it so that {folder} holds train/ and val/val_annotations.txt")
    train = scan_folder(folder / "train", skip_corrupt)
    number = {name: i for i, name in enumerate(train.class_names)}
    paths, labels = [], []
    for line in annotations.read_text().splitlines():
        fields = line.split("\t")  # file, class, and a bounding box
        if len(fields) < 2 or fields[1] not in number:
            raise DataError(f"{annotations}: the line {line!r} names no class of {folder / 'train'}: unpack the archive again")
        paths.append(str(annotations.parent / "images" / fields[0]))
        labels.append(number[fields[1]])
    missing = next((path for path in paths if not os.path.exists(path)), None)
    if missing or not paths:
        raise DataError(f"{annotations} names {missing or 'no images'}, which is not there: unpack the archive again")
    val = Split(torch.tensor(labels), paths=paths, class_names=train.class_names, skip_corrupt=skip_corrupt)
    return Data("tiny-imagenet", len(number), 3, (64, 64), IMAGENET_MEAN, IMAGENET_STD, train, val)


def _mini_imagenet(folder: Path, file: Path, skip_corrupt: bool) -> Data:
    if not folder.is_dir():
        layout = f"{MINI_CLASSES} folders of {MINI_IMAGES} images, one for each class"
        raise DataError(f"{folder} not found: put Mini-ImageNet there as {folder / '<class>' / '*.jpg'}, {layout}")
    whole = scan_folder(folder, skip_corrupt)
    counts = dict(zip(whole.class_names, torch.bincount(whole.labels).tolist(), strict=True))
    odd = [f"{count} images in {name}" for name, count in counts.items() if count != MINI_IMAGES]
    if len(counts) != MINI_CLASSES or odd:
        found = ", ".join([f"{len(counts)} classes ({', '.join([*counts][:3])}{', ...' if len(counts) > 3 else ''})", *odd[:3]])
        raise DataError(
            f"{folder} holds {found}; Mini-ImageNet has {MINI_CLASSES} classes of {MINI_IMAGES} images: complete it. "
            "Another selection is another data set: open it as a folder with train/ and val/"
        )
    paths = [Path(path).relative_to(folder).as_posix() for path in whole.paths]
    if not file.exists():
        # the usual split gives train and val classes of their own, as few-shot learning wants it, so each class is divided here
        chosen = set(whole.per_class(MINI_TRAIN, seed=0).paths)
        parts = {short: "train" if path in chosen else "val" for short, path in zip(paths, whole.paths, strict=True)}
        # the processes of a run may all get here at once: what they write is the same, each in a folder of its own as `replacing` has one
        # temporary name, and the file is whole from the moment it has its name
        text = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
        try:
            with TemporaryDirectory(dir=file.parent, prefix=f"{file.name}.") as own:
                with replacing(Path(own) / file.name) as temporary, open(temporary, "w", **text) as out:
                    csv.writer(out, lineterminator="\n").writerows([("path", "split"), *sorted(parts.items())])
                os.replace(Path(own) / file.name, file)
        except OSError as error:
            raise DataError(f"{file} is missing and cannot be written ({error.strerror}): make {file.parent} writable once") from error
    content = file.read_bytes()
    parts = _read_split(file, content, paths)
    train, val = (whole.subset([i for i, path in enumerate(paths) if parts[path] == part]) for part in ("train", "val"))
    digest = hashlib.sha256(content).hexdigest()[:8]
    return Data("mini-imagenet", len(counts), 3, None, IMAGENET_MEAN, IMAGENET_STD, train, val, f"{file.name}@{digest}")


def _read_split(file: Path, content: bytes, paths: Sequence[str]) -> dict[str, str]:
    def fault(what: str) -> DataError:
        return DataError(f"{file} {what}: mend it, or delete it to have it made again")

    header, *lines = content.decode("utf-8-sig", errors="surrogateescape").splitlines() or [""]
    if header != "path,split":
        raise fault(f"begins with {header!r} and not with 'path,split'")
    parts, known = {}, set(paths)
    for line in filter(None, lines):
        path, *rest = next(csv.reader([line]))  # line by line, so that a quotation mark left open ends there
        if rest not in (["train"], ["val"]):
            raise fault(f"has the line {line!r}, which is not a path, a comma and train or val")
        if path not in known or path in parts:
            raise fault(f"lists {path!r} twice" if path in parts else f"names {path!r}, and there is no such image")
        parts[path] = rest[0]
    missing = [path for path in paths if path not in parts]
    if missing:
        raise fault(f"misses {len(missing)} of {len(paths)} images, the first is {missing[0]!r}")
    filled = {(path.split("/")[0], part) for path, part in parts.items()}
    empty = sorted({(name, part) for name, _ in filled for part in ("train", "val")} - filled)
    if empty:
        raise fault(f"leaves class {empty[0][0]!r} without {empty[0][1]} images")
    return parts


def _folder(folder: Path, skip_corrupt: bool) -> Data:
    held_out = folder / "val" if (folder / "val").is_dir() else folder / "test"
    if not (folder / "train").is_dir() or not held_out.is_dir():
        missing = "train/" if held_out.is_dir() else "val/" if (folder / "train").is_dir() else "train/ and val/"
        entries = sorted(entry.name for entry in folder.iterdir() if not _foreign(entry.name))
        found = ", ".join(entries[:5]) + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
        raise DataError(f"{folder} lacks {missing}; found: {found or 'nothing'}. It needs train/ and val/, each with one folder per class")
    train, val = scan_folder(folder / "train", skip_corrupt), scan_folder(held_out, skip_corrupt)
    if train.class_names != val.class_names:
        odd = sorted(set(train.class_names) ^ set(val.class_names))
        raise DataError(
            f"{folder / 'train'} has {len(train.class_names)} classes and {held_out} has {len(val.class_names)}: "
            f"{', '.join(odd[:5])} is in one only; give both the same class folders"
        )
    return Data(folder.resolve().name, len(train.class_names), 3, None, IMAGENET_MEAN, IMAGENET_STD, train, val)


def scan_folder(folder: Path, skip_corrupt: bool) -> Split:
    """The images of a folder that holds one folder per class, classes in the order of their names; `skip_corrupt` as in Split.

    At every level, what systems leave beside people's files is passed over: names that begin with a dot, and FOREIGN.
    Raises DataError where there are no class folders, one holds no images, or one cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror}): make it readable")

    def images() -> Iterator[str]:
        for name in names:
            found = []
            for top, inner, files in os.walk(os.path.join(folder, name), onerror=refuse, followlinks=True):
                inner[:] = [entry for entry in inner if not _foreign(entry)]
                found.append((top[len(root) :], [file for file in files if not _foreign(file) and file.lower().endswith(IMG_EXTENSIONS)]))
            counts.append(sum(len(files) for _, files in found))
            yield from (f"{top}/{file}" for top, files in sorted(found) for file in sorted(files))

    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _foreign(entry.name))
    except OSError as error:
        refuse(error)
    if not names:
        raise DataError(f"{folder} holds no class folders: put the images of each class into a folder of its own there")
    root, counts = os.path.join(folder, ""), list[int]()
    paths = Paths(images(), root)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise DataError(f"{folder / name} holds no images ({' '.join(IMG_EXTENSIONS)}): fill the folder or delete it")
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(counts))
    return Split(labels, paths=paths, class_names=tuple(names), skip_corrupt=skip_corrupt)


def _foreign(name: str) -> bool:
    return name.startswith(".") or name in FOREIGN
