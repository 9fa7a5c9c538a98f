"""A store of tokens: the tokens of every image of a data set, made once, and found again by image names.

manifest.json   what made the tokens, how images were preprocessed, number of images, and file contents of small sets (Paths.contents);
                while the store is made, also the number of images done
tokens.npy      ids (images, cells) int16, cells in row-major order, read as a memory map
images.json     a name per row: train/ or val/ and the path below the split's folder; for images in memory, the hash of their pixels
codewords.png   the patches nearest to some of the codes
codebook.safetensors   k-means only: the centroids

A file is identified by its path below the split's folder; the location of the data set and the file date do not matter. If a file is
replaced under the same name, this is detected in sets of up to 20,000 files (by contents up to 512 MiB, else by file sizes). In larger
sets, delete the store after such a change. The folder is called .partial until it is complete; after a kill, the next process resumes it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy
import torch
from torch import Tensor

from common.data import DataError, Loader, Split
from common.files import Locked, locked
from common.progress import progress_bar
from common.run import console, write_text
from mapet.tokenizers.kmeans import NearestCentroid
from mapet.tokenizers.vqkd import VQKD

Tokenizer = NearestCentroid | VQKD
VERSION = 1
SAVE_SECONDS = 20.0  # between two saves; a killed process resumes from the last one


class TokenStore:
    """A finished store, opened. Raises DataError, with a fix, if it is missing, unfinished, of another version, or damaged."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
            version, unfinished = self.manifest["version"], "done" in self.manifest
        except FileNotFoundError:
            fix = "make it with `make tokens PAPER=mapet`, or name the folder that holds one"
            raise DataError(f"there is no token store in {folder}: {fix}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._fault(f"its manifest.json cannot be read ({type(error).__name__}: {error})") from error
        if version != VERSION or unfinished:
            raise self._fault("it is not finished" if unfinished else f"it has version {version}, and this code reads version {VERSION}")
        try:
            # copy-on-write, because torch has no read-only tensors
            self.tokens = torch.from_numpy(numpy.load(self.folder / "tokens.npy", mmap_mode="c"))
            self.names = json.loads((self.folder / "images.json").read_text())
            (rows, columns), vocabulary = self.manifest["grid"], int(self.manifest["vocabulary"])
            wanted = (len(self.names), rows * columns)
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise self._fault(f"it is truncated or damaged ({type(error).__name__}: {error})") from error
        if tuple(self.tokens.shape) != wanted or self.tokens.dtype != torch.int16 or not self.names:
            held = f"tokens.npy holds {tuple(self.tokens.shape)} {self.tokens.dtype}"
            raise self._fault(f"{held}, but {wanted[0]} names, of {wanted[1]} cells each, need {wanted} torch.int16")
        low, high = (int(bound) for bound in self.tokens.aminmax())
        if low < 0 or high >= vocabulary:
            raise self._fault(f"it holds ids from {low} to {high}, and the vocabulary has 0 to {vocabulary - 1}")

    def check(self, **wanted: object) -> None:
        """Raise DataError if the manifest differs from the wanted values; the error names the first difference."""
        for name, value in wanted.items():
            held, value = self.manifest.get(name), json.loads(json.dumps(value))
            if held != value:
                raise DataError(
                    f"the tokens in {self.folder} were made with {name}={held}, and the recipe wants {name}={value}: "
                    "change the recipe, or make other tokens"
                )

    def of(self, split: Split, part: str) -> Tensor:
        """The tokens (N, cells) int16 of the images of a split, or of a part of it; `part` is "train" or "val".

        Raises DataError, with the first such image, if images are missing from the store or were replaced by others.
        """
        names = image_names(split, part, self.names)
        first = self.names.index(names[0]) if names[0] in self.names else 0
        if self.names[first : first + len(names)] == names:
            self._compare(split, names, range(first, first + len(names)))
            return self.tokens[first : first + len(names)]  # stays on disk
        row = {name: index for index, name in enumerate(self.names)}
        absent = [name for name in names if name not in row]
        if absent:
            raise DataError(
                f"{self.folder} has no tokens for {len(absent)} of {len(names)} images, the first is {absent[0]}: these are not the images "
                "it was made from; use those, or delete the folder to have it made again"
            )
        rows = [row[name] for name in names]
        self._compare(split, names, rows)
        return self.tokens[torch.tensor(rows)]

    def _compare(self, split: Split, names: list[str], rows: Sequence[int]) -> None:
        """Raise DataError if the image files have other contents than those that the tokens were made from."""
        held = self.manifest.get("contents")
        if not held:
            return
        pairs = zip(names, split.contents, (held[row] for row in rows), strict=False)  # no contents: in memory, or a large set
        # for large sets only file sizes are known, for the largest ones nothing: compare what both have
        other = [name for name, now, then in pairs if then and not now.startswith(then) and not then.startswith(now)]
        if other:
            raise DataError(
                f"{self.folder} was made from other images than {len(other)} of these {len(names)}, the first is {other[0]}; the names are "
                "the same: use the original images, or delete the folder to have it made again"
            )

    def _fault(self, what: str) -> DataError:
        return DataError(f"the token store {self.folder} cannot be used: {what}; delete it to have it made again")


def image_names(split: Split, part: str, known: Container[str] = ()) -> list[str]:
    """Names of images in a store: the path below the split's folder, or for images in memory the hash of their pixels.

    known: the names of a store; they determine the split's folder if a part of its images shares a deeper one.
    """
    if split.images is not None:
        return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:32] for image in split.images]
    paths = [os.path.abspath(path) for path in split.paths or ()]
    # the common folder of all paths is that of the first and last by name; for ImageNet's million this takes a twentieth of the time
    root = os.path.commonpath([os.path.dirname(min(paths)), os.path.dirname(max(paths))])
    above = [root, *map(str, Path(root).parents)]
    # with only one class, the common folder is the class folder
    own = above[1] if all(os.path.dirname(path) == root for path in paths) else root
    root = next((folder for folder in reversed(above) if f"{part}/{os.path.relpath(paths[0], folder)}" in known), own)
    return [f"{part}/{path[len(root) + 1 :]}" for path in paths]


def unfinished(folder: Path, names: list[str], manifest: dict) -> Path:
    """The folder in which a store is made, as a killed process left it; without tokens if images or settings differ."""
    partial = folder.with_name(f"{folder.name}.partial")
    note, listed = partial / "manifest.json", partial / "images.json"
    begun = {"version": VERSION, "images": len(names), **manifest}
    if not note.exists() or json.loads(note.read_text()) | {"done": 0} != begun | {"done": 0} or json.loads(listed.read_text()) != names:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_text(listed, json.dumps(names, indent=0))
        write_text(note, json.dumps(begun | {"done": 0}, indent=1) + "\n")  # after the names: if it exists, they exist
    return partial


def write_tokens(partial: Path, tokenizer: Tokenizer, loaders: dict[str, Loader], device: torch.device, draw: Callable) -> None:
    """Fill the rest of tokens.npy of an unfinished store, make the picture with draw(tokens), and give the folder its final name.

    loaders: evaluation loaders of "train" and "val", with the tokenizer's image size and normalisation.
    """
    file, note = partial / "tokens.npy", partial / "manifest.json"
    manifest = json.loads(note.read_text())
    total, cells = manifest["images"], tokenizer.grid[0] * tokenizer.grid[1]
    done = manifest.get("done", total)  # missing if a process was killed between its last two steps
    tokens = numpy.load(file, mmap_mode="r+") if done else numpy.lib.format.open_memmap(file, "w+", numpy.int16, (total, cells))

    def save(done: int) -> None:
        tokens.flush()  # first the rows, then the note about them
        write_text(note, json.dumps(manifest | {"done": done}, indent=1) + "\n")

    begin, saved = 0, time.monotonic()
    with progress_bar("tokens", done) as show:
        for loader in loaders.values():
            end = begin + len(loader.split)
            start = max(done - begin, 0) // loader.batch_size  # a partly saved batch is computed again
            position = begin + start * loader.batch_size
            for images_BCHW, _ in loader.epoch(0, start) if done < end else ():
                id_BN, _ = tokenizer(images_BCHW.to(device))
                tokens[position : position + len(id_BN)] = id_BN.to(torch.int16).cpu().numpy()
                position += len(id_BN)
                show(position, total)
                if position == total or time.monotonic() - saved >= SAVE_SECONDS:
                    save(position)
                    saved = time.monotonic()
            begin = end
    draw(torch.from_numpy(tokens))
    manifest.pop("done", None)
    write_text(note, json.dumps(manifest, indent=1) + "\n")
    partial.rename(partial.with_suffix(""))


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold the lock of a store while it is made. While another process makes it, wait; a signal to stop ends the waiting with Stopped."""
    lock = folder.with_name(f"{folder.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except Locked:
            console.print(f"waiting for {folder}: another process is making it", markup=False)
            held.enter_context(locked(lock, wait=True))
        yield
