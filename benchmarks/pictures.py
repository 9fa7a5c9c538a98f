"""Draw what an encoder attends to on a few images, and the features of their patches.

python -m benchmarks.pictures --checkpoint runs/droppos/... --images photographs
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks.pretrained import find_pretrained
from benchmarks.report.encoder import attention_maps, attention_weights, feature_colours
from benchmarks.report.figures import image_rows
from benchmarks.reproduce import TYRO, USER_ERRORS
from common.data import DataError
from common.data.augment import normalize
from common.data.images import read_image
from common.randomness import reseed
from common.recipe import RecipeError
from common.run import console
from common.vit import ViT

PLACES = ((1 / 4, 1 / 4), (1 / 2, 1 / 2), (3 / 4, 3 / 4))  # of the patches whose attention is drawn, as shares of height and width


@dataclass
class Options:
    """Draw the attention of the class token and of chosen patches in the last block, and the main components of the patch features."""

    images: Path
    """A folder of images, or one image."""
    paper: str | None = None
    """The folder of a paper or a baseline; not needed with the folder of a run."""
    checkpoint: Path | None = None
    """The folder of a run, or a file with an encoder; by default random weights."""
    recipe: str | None = None
    """Recipe of the paper that says how the encoder is built; by default that for ImageNet."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Override a setting of that recipe; repeatable: --set encoder.depth=24."""
    size: tuple[int, int] | None = None
    """Height and width in pixels to which images are cropped and resized; by default those of the recipe."""
    most: int = 6
    """At most so many images, spread over the folder."""
    out: Path = Path("pictures.png")
    """The file that is written: PNG, SVG or PDF."""

    def __post_init__(self) -> None:
        if self.most < 1:
            raise RecipeError(f"--most {self.most} is less than 1")


def draw(options: Options) -> Path:
    """Write the picture. Raises DataError where there is no image, and as find_pretrained."""
    pretrained = find_pretrained(options.checkpoint, options.paper, options.recipe, options.set)
    files = find_images(options.images, options.most)
    size = options.size or (pretrained.recipe.image_size,) * 2
    reseed(0)
    encoder, loaded = pretrained.encoder(size)
    console.print(f"{len(files)} images of {size[0]} x {size[1]} px: {loaded}", markup=False, soft_wrap=True)
    fitted = [ImageOps.fit(read_image(str(path)), size[::-1], Image.Resampling.BICUBIC) for path in files]
    shown = numpy.stack([numpy.asarray(image if len(pretrained.mean) == 3 else image.convert("L")) for image in fitted])
    pixels = torch.from_numpy(shown).permute(0, 3, 1, 2) if shown.ndim == 4 else torch.from_numpy(shown)[:, None]
    images = normalize(pixels, pretrained.mean, pretrained.std)
    columns = {"image": shown, **panels(encoder, images)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    image_rows(columns, width=1.5 * len(columns)).savefig(options.out, dpi=120)
    return options.out


def panels(encoder: ViT, images_BCHW: Tensor) -> dict[str, numpy.ndarray]:
    """The columns of the picture besides the images, by title: maps (B, h, w) of attention, and colours (B, h, w, 3) of features."""
    weight_BTT, (rows, columns) = attention_weights(encoder, images_BCHW), encoder.grid
    found = {f"attention of\nthe {'class token' if encoder.prefix_tokens else 'mean patch'}": attention_maps(encoder, images_BCHW)}
    for down, across in PLACES:
        row, column = int(down * rows), int(across * columns)
        token = encoder.prefix_tokens + row * columns + column
        found[f"of the patch\nat {row}, {column}"] = weight_BTT[:, token, encoder.prefix_tokens :].unflatten(1, encoder.grid)
    found["features,\nthree colours"] = feature_colours(encoder, images_BCHW)
    return {title: shown.numpy() for title, shown in found.items()}


def find_images(path: Path, most: int) -> list[Path]:
    """At most so many images of a folder and the folders in it, spread evenly, or a single file. Raises DataError if there is none."""
    if not path.exists():
        raise DataError(f"IMAGES={path} does not exist")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise DataError(f"IMAGES={path} has no image ({', '.join(IMG_EXTENSIONS)})")
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error."""
    try:
        written = draw(tyro.cli(Options, args=arguments, prog="python -m benchmarks.pictures", description=__doc__, config=TYRO))
    except USER_ERRORS as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2
    console.print(f"written: {written}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
