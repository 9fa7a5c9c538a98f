"""Data sets: by name, or any folder in ImageFolder layout.

Shapes: N images, C channels, H x W pixels.
"""

import csv
import difflib
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, extract_archive

from common.data.images import load_images, read_image
from common.data.paths import DataError, Paths
from common.files import locked, replacing
from common.randomness import generator

NAMES = ("digits", "cifar10", "cifar100", "tiny-imagenet", "mini-imagenet")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MINI_CLASSES, MINI_IMAGES, MINI_TRAIN = 100, 600, 500  # Mini-ImageNet: classes, images per class, training images per class
SMALL_SIDE, SMALL_BYTES = 64, 2**30  # images of a folder are loaded into memory up to this many pixels a side and bytes in total
# folders made by operating systems, to be ignored like those whose names begin with a dot
FOREIGN = {"__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass(eq=False)
class Split:
    """Labelled images, in memory or as files. Images in memory that were read from files have both: `paths` are then only their names.

    Raises DataError unless `images` or `paths` are given, with one label per image, and images are uint8 (N, C, H, W).
    """

    labels: Tensor  # (N,) int64
    images: Tensor | None = None  # (N, C, H, W) uint8
    paths: Paths | None = None  # converted to Paths
    class_names: tuple[str, ...] = ()
    skip_corrupt: bool = False  # an unreadable file is replaced by the next readable one instead of ending the run

    def __post_init__(self) -> None:
        if self.images is None and self.paths is None:
            raise DataError("a split holds images or paths")
        if self.paths is not None and type(self.paths) is not Paths:
            self.paths = Paths(self.paths)
        if self.images is not None and (self.images.dtype != torch.uint8 or self.images.ndim != 4):
            given = f"images of shape {tuple(self.images.shape)} and type {self.images.dtype}"
            fix = "convert pixels from 0..1 by (255 * images).round().to(torch.uint8), and NHWC by images.permute(0, 3, 1, 2)"
            raise DataError(f"{given}: a split needs a torch.uint8 tensor (N, C, H, W) of 0 to 255; {fix}")
        for held in (self.images, self.paths):
            if held is not None and len(held) != len(self.labels):
                raise DataError(f"{len(held)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int] | Tensor) -> "Split":
        """Return the images at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = None if self.images is None else self.images[chosen]
        paths = None if self.paths is None else self.paths[chosen.numpy()]
        return Split(self.labels[chosen], images, paths, self.class_names, self.skip_corrupt)

    def per_class(self, n: int, seed: int) -> "Split":
        """Draw `n` labels of each class with `seed`; with the same seed, fewer labels are a subset of more.

        Raises DataError, with the name of the class, if a class has fewer than `n` images.
        """
        return self._draw([n] * self.classes, seed)

    def balanced(self, fraction: float, seed: int) -> "Split":
        """Draw a `fraction` of all labels with `seed`, balanced over classes; the classes with one label more are also drawn.

        On ImageNet 0.01 gives 12,811 images: 13 in each of 811 classes and 12 in each of 189, as in the lists that papers use.
        Raises DataError if this is less than one label per class, or if a class has too few images.
        """
        total = int(fraction * len(self))
        if total < self.classes:
            least = f"{self.classes} of {len(self)} are the least"
            raise DataError(f"a fraction of {fraction} is {total} of {len(self)} labels, for {self.classes} classes: use more, {least}")
        each, rest = divmod(total, self.classes)
        order = torch.randperm(self.classes, generator=generator(seed, self.classes)).tolist()
        return self._draw([each + (place < rest) for place in order], seed)

    def listed(self, path: Path) -> "Split":
        """Return the images listed in a file, one per line, by file name or class/file name: n01440764_10026.JPEG or cat/1.png.

        Raises DataError if the images have no names, and for names that are absent, ambiguous or repeated.
        """
        if self.paths is None:
            raise DataError(f"{path} lists images by name, but the images of this data set have no names: use data in files, or no list")
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")  # as file names are decoded
        names = [line.strip() for line in text.splitlines() if line.strip()]
        known: dict[str, list[int]] = {name: [] for name in names}
        for index, file in enumerate(self.paths):
            folder, _, short = file.rpartition("/")
            for name in (short, f"{folder.rpartition('/')[2]}/{short}"):
                if name in known:
                    known[name].append(index)
        absent = [name for name in names if not known[name]]
        if absent or not names:
            what = f"lists {len(absent)} of {len(names)} images that are absent, the first is {absent[0]!r}" if names else "lists no image"
            raise DataError(f"{path} {what}: use a list of this data set, with one file name, or class/file name, per line")
        for name in names:
            if len(known[name]) > 1:
                raise DataError(f"{path} lists {name!r}, and {len(known[name])} images have this name: write class/file name")
        chosen = sorted(known[name][0] for name in names)
        if len(set(chosen)) < len(chosen):
            twice = next(self.paths[a] for a, b in itertools.pairwise(chosen) if a == b)
            raise DataError(f"{path} lists {twice} twice: delete one of the lines")
        return self.subset(chosen)

    @property
    def classes(self) -> int:
        return max(len(self.class_names), int(self.labels.max()) + 1 if len(self) else 0)

    @property
    def contents(self) -> list[str]:
        """The content of each file, as Paths.contents; empty for images in memory."""
        return self.paths.contents if self.images is None and self.paths is not None else []

    def digest(self) -> str:
        """A hash that identifies this split, in hexadecimal, computed once: from labels, class names, and pixels or files.

        Images in memory are identified by their pixels. Files are identified by their names below their common folder, not by the place of
        this folder or by file times. Up to 20,000 files, the hash includes their contents, or above 512 MiB in total, their sizes. So some
        changes are not detected: with more files, the replacement of a file under the same name; with sizes, the replacement by a file of
        the same size; and any change after the first call.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        found = hashlib.sha256("\0".join(self.class_names).encode(errors="surrogateescape"))
        for tensor in (self.labels, self.images):
            if tensor is not None:
                found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().numpy().reshape(-1).view(numpy.uint8).data)  # without a copy, for any size
        if self.images is None and self.paths is not None:
            found.update(self.paths.digest().encode())
        return found.hexdigest()

    def _draw(self, counts: Sequence[int], seed: int) -> "Split":
        """Draw `counts[k]` labels of each class k."""
        chosen = []
        for number, count in enumerate(counts):
            members = (self.labels == number).nonzero()[:, 0]
            if len(members) < count:
                name = self.class_names[number] if self.class_names else number
                fault = f"class {name} has {len(members)} images, fewer than {count}"
                raise DataError(f"{fault}: use at most {len(members)} labels per class")
            chosen.append(members[torch.randperm(len(members), generator=generator(seed, number))[:count]])
        return self.subset(torch.cat(chosen).sort().values)


@dataclass(eq=False)
class Data:
    """A data set: its name, the format of its images, and its two splits."""

    name: str
    classes: int
    channels: int
    image_size: tuple[int, int] | None  # (height, width) in pixels of every image; None if they differ, or were not all read
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1
    std: tuple[float, ...]
    train: Split
    val: Split
    split: str = ""  # name and digest of the file that defines train and val, if the data set itself does not define them

    def __post_init__(self) -> None:
        for part in (self.train, self.val):
            if part.images is not None and part.images.shape[1] != self.channels:
                shape = tuple(part.images.shape)
                raise DataError(f"{self.name}: images of shape {shape}, but channels={self.channels}: a split needs (N, C, H, W)")

    def limited(self, images: int) -> "Data":
        """The same with at most this many images in each split, rounded up to a number that is equal for all classes: the first ones."""
        each, parts = math.ceil(images / self.classes), {}
        for name in ("train", "val"):
            split = getattr(self, name)
            chosen = [index for label in range(self.classes) for index in (split.labels == label).nonzero()[:each, 0].tolist()]
            parts[name] = split.subset(sorted(chosen))
        return replace(self, name=f"{self.name}-{images}", **parts)

    def hold_out(self, images: int) -> "Data":
        """The same with this many training images in place of the test images: of each class equally many, the last ones.

        Raises DataError if a class has no more than these.
        """
        each, kept, held = math.ceil(images / self.classes), list[int](), list[int]()
        for label in range(self.classes):
            rows = (self.train.labels == label).nonzero()[:, 0].tolist()
            if len(rows) <= each:
                raise DataError(f"{self.name}: {each} of {len(rows)} training images of class {label} cannot be held out: add images")
            kept, held = kept + rows[:-each], held + rows[-each:]
        return replace(self, name=f"{self.name}-held_out", train=self.train.subset(sorted(kept)), val=self.train.subset(sorted(held)))

    @property
    def identity(self) -> dict[str, str]:
        """The content of the data set, independent of its name: for each split a line with its size and Split.digest."""
        return {
            name: f"{len(split)} images, {split.classes} classes, {split.digest()[:16]}"
            for name, split in (("train", self.train), ("val", self.val))
        }


def open_data(name: str, root: Path = Path("data"), skip_corrupt: bool = False) -> Data:
    """Open `digits`, `cifar10`, `cifar100`, `tiny-imagenet` or `mini-imagenet` (stored under `root`), or a folder if `name` is its path.

    A folder contains train/ and val/ (or test/ if there is no val/), each with one folder per class. If all its images have one size of at
    most SMALL_SIDE pixels a side, and SMALL_BYTES of memory hold them, they are loaded into memory, as RGB: then the data set has this
    `image_size` and the mean and std of its own training images, as cifar10 has, instead of ImageNet's. mini-imagenet-split.csv under
    `root` defines the splits of `mini-imagenet`; if it is missing, the split is drawn and written. With `skip_corrupt` an unreadable
    image file is replaced by the next readable one. Raises DataError that says what is missing and how to fix it.
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
        f"{name!r} is neither a data set nor a folder: {guess}use one of {', '.join(NAMES)}, or the path of a folder with train/ and val/"
    )


def _digits() -> Data:
    # imported here because scikit-learn takes a second to load, and only this data set needs it
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
            sets = load(download=False)  # needs no lock, so the folder may be read-only
        except (OSError, RuntimeError):
            # one process downloads and unpacks; the others wait and then find the files, because torchvision checks before it downloads
            with locked(root / f"{name}.lock", wait=True):
                archive, names = root / kind.filename, root / kind.base_folder / kind.meta["filename"]
                if check_integrity(archive, kind.tgz_md5) and not check_integrity(names, kind.meta["md5"]):
                    # a process was killed while unpacking; torchvision itself unpacks again only if images are missing
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
    # counting grey levels is exact and needs no float copy of the images
    frequencies = [torch.bincount(channel.flatten(), minlength=256) / channel.numel() for channel in images.unbind(1)]
    mean = [float((frequency * levels).sum()) for frequency in frequencies]
    deviations = [float((frequency * (levels - m) ** 2).sum().sqrt()) for frequency, m in zip(frequencies, mean, strict=True)]
    std = [deviation if deviation > 1e-6 else 1.0 for deviation in deviations]  # a channel of one value has none
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
            raise DataError(f"{annotations}: the line {line!r} has no class of {folder / 'train'}: unpack the archive again")
        paths.append(str(annotations.parent / "images" / fields[0]))
        labels.append(number[fields[1]])
    lost = next((path for path in paths if not os.path.exists(path)), None)
    if lost or not paths:
        raise DataError(f"{annotations} lists {lost or 'no images'}, which is not there: unpack the archive again")
    val = Split(torch.tensor(labels), paths=Paths(paths), class_names=train.class_names, skip_corrupt=skip_corrupt)
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
            f"{folder} contains {found}; Mini-ImageNet has {MINI_CLASSES} classes of {MINI_IMAGES} images: complete it. "
            "For another selection of images, open it as a folder with train/ and val/"
        )
    assert whole.paths is not None
    paths = [Path(path).relative_to(folder).as_posix() for path in whole.paths]
    if not file.exists():
        # the usual split has different classes in train and val, for few-shot learning; here each class is divided into train and val
        chosen = set(whole.per_class(MINI_TRAIN, seed=0).paths or ())
        parts = {short: "train" if path in chosen else "val" for short, path in zip(paths, whole.paths, strict=True)}
        # all processes of a run may do this at the same time. They write the same content, each in its own folder because `replacing` has
        # a fixed temporary name, and the final rename is atomic
        text: dict = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
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
        return DataError(f"{file} {what}: fix it, or delete it to create it again")

    header, *lines = content.decode("utf-8-sig", errors="surrogateescape").splitlines() or [""]
    if header != "path,split":
        raise fault(f"begins with {header!r} and not with 'path,split'")
    parts, known = {}, set(paths)
    for line in filter(None, lines):
        path, *rest = next(csv.reader([line]))  # line by line, so that an open quotation mark ends with its line
        if rest not in (["train"], ["val"]):
            raise fault(f"has the line {line!r}, which is not a path, a comma and train or val")
        if path not in known or path in parts:
            raise fault(f"lists {path!r} twice" if path in parts else f"lists {path!r}, and there is no such image")
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
    name = folder.resolve().name
    return _small(name, train, val) or Data(name, len(train.class_names), 3, None, IMAGENET_MEAN, IMAGENET_STD, train, val)


def _small(name: str, *splits: Split) -> Data | None:
    """The data set of a folder with its images in memory; None if they are not small, or differ in size."""
    size = _first_size(splits[0])  # one image tells apart most data sets, such as ImageNet
    if size is None or max(size) > SMALL_SIDE or 3 * size[0] * size[1] * sum(map(len, splits)) > SMALL_BYTES:
        return None
    loaded = []
    for split in splits:
        assert split.paths is not None
        found = load_images(split.paths, size, split.skip_corrupt)
        if found is None:
            return None
        images, rows = found
        loaded.append(replace(split, images=images, labels=split.labels[rows]))
    return _in_memory(name, *loaded)


def _first_size(split: Split) -> tuple[int, int] | None:
    """(height, width) of the first image; with skip_corrupt, of the first that can be read, or None. Raises DataError with the file."""
    for path in split.paths or ():
        try:
            image = read_image(path)
            return image.height, image.width
        except DataError:
            if not split.skip_corrupt:
                raise
    return None


def scan_folder(folder: Path, skip_corrupt: bool) -> Split:
    """Find the images of a folder with one folder per class; classes are sorted by name. `skip_corrupt` as in Split.

    Names that begin with a dot and names in FOREIGN are ignored at every level.
    Raises DataError if there are no class folders, or if one has no images or cannot be listed.
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
        raise DataError(f"{folder} has no class folders: put the images of each class into its own folder there")
    root, counts = os.path.join(folder, ""), list[int]()
    paths = Paths(images(), root)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise DataError(f"{folder / name} has no images ({' '.join(IMG_EXTENSIONS)}): fill the folder or delete it")
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(counts))
    return Split(labels, paths=paths, class_names=tuple(names), skip_corrupt=skip_corrupt)


def _foreign(name: str) -> bool:
    return name.startswith(".") or name in FOREIGN
