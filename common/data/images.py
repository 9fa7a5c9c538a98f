"""Reading images from files of any format that Pillow supports.

Shapes: N files, C = 3 channels (RGB), H x W pixels.
"""

import logging
import os
import threading
from bisect import bisect
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from common.data.paths import DataError
from common.environment import available_cores

log = logging.getLogger(__name__)
REPLACED = "%s cannot be read as an image: the next readable image replaces it"  # logged with --skip-corrupt

_limits = threading.Lock()
_unlimited = 0  # number of open any_size blocks
_guards: tuple[int | None, int, int]  # Pillow's own


@contextmanager
def any_size() -> Iterator[None]:
    """Within the block Pillow opens and crops images of any size, and reads any text in them, without a warning.

    Pillow's limits protect against untrusted files, but these are the user's own. They are global: the last thread to exit restores them.
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
    """Decode a file of any format and size that Pillow supports to 8-bit RGB. Raises DataError, with the file name, if this fails.

    Transparency is dropped, as in ImageNet pipelines. Grey values of 16 bits (0 to 65535) and floats (0 to 1) are scaled to 8 bits;
    others raise an error with their range, because clipping would make them black or white.
    """
    try:
        with any_size(), Image.open(path) as image:
            if 4 * image.width * image.height > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
                raise MemoryError  # before the kernel kills the process; the size may come from a broken header
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return Image.fromarray(_to_bytes(path, numpy.asarray(image))).convert("RGB")
            if image.mode == "RGB":
                image.load()  # without the copy of a conversion
                return image
            # Pillow converts a palette with transparent entries to RGB only via RGBA
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} has more pixels than fit into memory: use a smaller copy, or pass --skip-corrupt") from error
    except Exception as error:  # decoders raise a dozen kinds of exceptions on broken files
        if isinstance(error, OSError) and error.errno is not None:  # from the file system, not from a decoder
            raise DataError(f"{path} cannot be opened ({error.strerror}): make it readable, or pass --skip-corrupt") from error
        fix = "if other programs can open it, save it again as PNG or JPEG; otherwise delete it, or pass --skip-corrupt"
        raise DataError(f"{path} cannot be read as an image ({error}): {fix}") from error


def _to_bytes(path: str, values: numpy.ndarray) -> numpy.ndarray:
    """Convert grey pixels of 16 or 32 bits, integers or floats, to uint8. Raises DataError for an unusual range."""
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if low >= 0 and high <= 1:
            return (values * 255).round().astype(numpy.uint8)
        what, wanted = "float pixels", "the supported range is 0 to 1"
    elif 0 <= low and high <= 65535 and not 0 < high < 257:
        return (values.astype(numpy.int64) // 257).astype(numpy.uint8)
    else:
        what, wanted = "pixels of more than 8 bits", "the supported range is 0 to 65535"
        wanted += ", in which they would all be black" if 0 <= low and high <= 65535 else ""
    raise DataError(f"{path} has {what} from {low} to {high}, and {wanted}: save it with 8 bits, or pass --skip-corrupt")


def load_images(paths: Sequence[str], size: tuple[int, int], skip_corrupt: bool) -> tuple[Tensor, Tensor] | None:
    """Decode all images of `size` (height, width), in threads: (N, C, H, W) uint8, and the index of the file of each, (N,) int64.

    Returns None at the first image of another size. Raises DataError, with the file name, if a file cannot be read; with `skip_corrupt`
    the next readable file, after the last one the first, replaces it, and a warning is logged.
    """
    images_NCHW = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
    pixels_NHWC = images_NCHW.permute(0, 2, 3, 1).numpy()

    def load(rows: range) -> list[int] | None:
        lost = []
        for row in rows:
            try:
                image = read_image(paths[row])
            except DataError:
                if not skip_corrupt:
                    raise
                lost.append(row)
                continue
            if (image.height, image.width) != size:
                return None
            pixels_NHWC[row] = image
        return lost

    pool, lost = ThreadPoolExecutor(available_cores()), list[int]()
    try:
        for found in pool.map(load, [range(row, min(row + 256, len(paths))) for row in range(0, len(paths), 256)]):
            if found is None:
                return None
            lost += found
    finally:
        pool.shutdown(cancel_futures=True)
    rows = torch.arange(len(paths))
    if lost:
        readable = sorted({*range(len(paths))} - {*lost})
        if not readable:
            return None  # the loader reports it
        for row in lost:
            log.warning(REPLACED, paths[row])
            rows[row] = readable[bisect(readable, row) % len(readable)]
        images_NCHW[lost] = images_NCHW[rows[lost]]
    return images_NCHW, rows
