"""A store of tokens: what a tokenizer makes of every image of a data set, made once, and found again by the images' names.

manifest.json   what made the tokens, how images were seen, how many there are; it is written last
tokens.npy      ids (images, cells) int16, cells in row-major order, read as a memory map
images.txt      a name per row: train/ or val/ and the path below the split's folder; of images in memory the hash of their pixels
codewords.png   patches that are nearest to some of the codes
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from rich.progress import Progress
from torch import Tensor, nn

from common.data import DataError, Loader, Split
from common.run import RunError, console, write_text

VERSION = 1
SAVE_SECONDS = 20.0  # between two moments to which a killed process goes back


class TokenStore:
    """A finished store, opened. Raises DataError, with the mend, where it is missing, of another version, truncated or damaged."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
        except FileNotFoundError:
            raise DataError(f"there is no token store in {folder}: make it with `make tokens`, or name the folder that holds one") from None
        except json.JSONDecodeError as error:
            raise self._fault(f"its manifest.json cannot be read ({error})") from error
        if self.manifest.get("version") != VERSION:
            raise self._fault(f"it has version {self.manifest.get('version')}, and this code reads version {VERSION}")
        try:
            # copy-on-write, as torch has no tensors that cannot be written to
            self.tokens = torch.from_numpy(numpy.load(self.folder / "tokens.npy", mmap_mode="c"))
            self.names = (self.folder / "images.txt").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except (OSError, ValueError, EOFError) as error:
            raise self._fault(f"it is truncated or damaged ({error})") from error
        self.grid, vocabulary = tuple(self.manifest["grid"]), self.manifest["vocabulary"]
        wanted = (len(self.names), self.grid[0] * self.grid[1])
        if tuple(self.tokens.shape) != wanted or self.tokens.dtype != torch.int16 or len(self.names) != self.manifest["images"]:
            held = f"{tuple(self.tokens.shape)} {self.tokens.dtype} for {len(self.names)} names"
            raise self._fault(f"it holds {held}, and its manifest speaks of {self.manifest['images']} images of {wanted[1]} cells")
        low, high = (int(bound) for bound in self.tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise self._fault(f"it holds ids from {low} to {high}, and the vocabulary has 0 to {vocabulary - 1}")

    def check(self, **wanted: object) -> None:
        """Raise DataError where the manifest says otherwise than what is wanted, by the first thing that differs."""
        for name, value in wanted.items():
            held, value = self.manifest.get(name), json.loads(json.dumps(value))
            if held != value:
                raise DataError(
                    f"the tokens in {self.folder} were made with {name}={held}, and the recipe wants {name}={value}: "
                    "change the recipe, or have other tokens made"
                )

    def of(self, split: Split, part: str) -> Tensor:
        """The tokens (N, cells) int16 of a split's images; `part` is "train" or "val".

        Raises DataError naming the first image that the store does not know.
        """
        names = image_names(split, part)
        first = self.names.index(names[0]) if names[0] in self.names else 0
        if self.names[first : first + len(names)] == names:
            return self.tokens[first : first + len(names)]  # stays on disk
        row = {name: index for index, name in enumerate(self.names)}
        absent = [name for name in names if name not in row]
        if absent:
            raise DataError(
                f"{self.folder} has no tokens for {len(absent)} of {len(names)} images, the first is {absent[0]}: these are not the images "
                "it was made from; give those, or delete the folder to have it made again"
            )
        return self.tokens[torch.tensor([row[name] for name in names])]

    def _fault(self, what: str) -> DataError:
        return DataError(f"the token store {self.folder} cannot be used: {what}; delete it to have it made again")


def image_names(split: Split, part: str) -> list[str]:
    """What images are called in a store: their path below the split's folder, or where they are in memory the hash of their pixels."""
    if split.paths is None:
        return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:32] for image in split.images]
    root = os.path.commonpath(os.path.dirname(path) for path in split.paths)
    # folders hold one folder per class; where there is one class only, the folder that they have in common is its
    root = os.path.dirname(root) if all(os.path.dirname(path) == root for path in split.paths) else root
    return [f"{part}/{os.path.relpath(path, root)}" for path in split.paths]


def write_store(
    folder: Path, tokenizer: nn.Module, loaders: dict[str, Loader], device: torch.device, manifest: dict, draw: Callable
) -> None:
    """Fill the folder `folder`.partial, then give it its name. What a killed process has done is kept, and the next goes on from there.

    loaders: of "train" and "val", evaluation, of images as the tokenizer wants them. draw(folder, tokens): leaves the picture.
    """
    partial = partial_folder(folder)
    names = [name for part, loader in loaders.items() for name in image_names(loader.split, part)]
    text, listed = "".join(f"{name}\n" for name in names), partial / "images.txt"
    cells = tokenizer.grid[0] * tokenizer.grid[1]
    progress, tokens_file = partial / "progress.json", partial / "tokens.npy"
    held = json.loads(progress.read_text()) if progress.exists() else {}
    if held.get("manifest") == manifest and listed.read_bytes() == text.encode(errors="surrogateescape"):
        done, tokens = held["done"], numpy.load(tokens_file, mmap_mode="r+")
    else:
        progress.unlink(missing_ok=True)
        listed.write_bytes(text.encode(errors="surrogateescape"))
        done, tokens = 0, numpy.lib.format.open_memmap(tokens_file, "w+", numpy.int16, (len(names), cells))
    saved, begin = time.monotonic(), 0
    with progress_bar("tokens") as show:
        for loader in loaders.values():
            # batches are begun again from where the last one that was saved ended
            position = begin + min(max(done - begin, 0) // loader.batch_size * loader.batch_size, len(loader.split))
            batches = loader.epoch(0, (position - begin) // loader.batch_size) if done < begin + len(loader.split) else ()
            for images_BCHW, _ in batches:
                id_BN, _ = tokenizer(images_BCHW.to(device))
                tokens[position : position + len(id_BN)] = id_BN.to(torch.int16).cpu().numpy()
                position += len(id_BN)
                show(position, len(names))
                if time.monotonic() - saved >= SAVE_SECONDS:
                    tokens.flush()  # first the rows, then the note that they are there
                    write_text(progress, json.dumps({"manifest": manifest, "done": position}) + "\n")
                    saved = time.monotonic()
            begin += len(loader.split)
    tokens.flush()
    draw(partial, torch.from_numpy(numpy.asarray(tokens)))
    progress.unlink(missing_ok=True)
    write_text(partial / "manifest.json", json.dumps({"version": VERSION, "images": len(names), **manifest}, indent=1) + "\n")
    partial.rename(folder)


def partial_folder(folder: Path) -> Path:
    """Where a store is while it is made."""
    return folder.with_name(f"{folder.name}.partial")


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold a store while it is made. Raises RunError where another process makes it."""
    partial_folder(folder).mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder} is being made by another process; wait for it") from None
        yield


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that keeps a bar on a terminal, and elsewhere says a line at most every so many seconds, and at the end."""
    begun = told = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            if done == total or now - told >= SAVE_SECONDS:
                told = now
                console.print(f"{title}: {done} of {total} images, {(total - done) * (now - begun) / done:.0f} s left", markup=False)

        yield show
