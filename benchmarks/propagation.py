"""Judge an encoder by label propagation: the objects of a video's first frame are found in the others from frozen features alone.

python -m benchmarks.propagation --checkpoint runs/stop/... --data /datasets/DAVIS

The protocol of DINO (Caron et al. 2021, arXiv 2104.14294, section 4.2.2) on DAVIS 2017, which StoP reports in its Table 3.

Shapes: H x W pixels, h x w patches, N = h w, D width, K objects with the background, C frames of the context.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from rich.table import Table
from scipy import ndimage
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks.downstream import run_command
from benchmarks.pretrained import find_pretrained
from benchmarks.reproduce import TYRO
from common.data import DataError
from common.data.augment import normalize
from common.data.images import read_image
from common.randomness import reseed
from common.recipe import RecipeError
from common.run import console
from common.train import make_fabric
from common.vit import ViT

TOLERANCE = 0.008  # of the image's diagonal: so far apart two boundaries may be (Perazzi et al. 2016, DAVIS)


@dataclass
class Options:
    """Find the objects of a video's first frame in the others by frozen features, and print region (J) and boundary (F) scores."""

    data: Path
    """DAVIS 2017 (JPEGImages/480p, Annotations/480p), or a folder with frames/ and masks/ (index PNG files; the first is needed)."""
    paper: str | None = None
    """The folder of a paper or a baseline; not needed with the folder of a run."""
    checkpoint: Path | None = None
    """The folder of a run, or a file with an encoder; by default random weights."""
    recipe: str | None = None
    """Recipe of the paper that says how the encoder is built; by default that for ImageNet."""
    set: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Override a setting of that recipe; repeatable."""
    short_side: int = 480
    """Pixels of the short side of a frame; both sides are then rounded down to whole patches."""
    context: int = 7
    """Frames before the current one that are looked at, besides the first."""
    radius: int = 12
    """How many patches an object may move, in rows and in columns."""
    neighbours: int = 5
    """Number of patches of the context from which a patch takes its object."""
    temperature: float = 0.1
    """Of their weights, softmax(similarity / temperature)."""
    out: Path | None = None
    """Folder for the masks that are found; by default none are written."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name, least in {"short_side": 1, "context": 0, "radius": 0, "neighbours": 1}.items():
            if getattr(self, name) < least:
                raise RecipeError(f"--{name.replace('_', '-')} {getattr(self, name)} is less than {least}")
        if self.temperature <= 0:
            raise RecipeError(f"--temperature {self.temperature} is not above 0")


@dataclass(frozen=True)
class Video:
    """The frames of a video, and the masks of some of them, by the name of the frame; the first frame has one."""

    name: str
    frames: tuple[Path, ...]
    masks: dict[str, Path]


def find_videos(folder: Path) -> list[Video]:
    """The videos of a folder; of DAVIS those of ImageSets/2017/val.txt, if it is there. Raises DataError that says what is missing."""
    images, masks, listed = folder / "JPEGImages" / "480p", folder / "Annotations" / "480p", folder / "ImageSets" / "2017" / "val.txt"
    if images.is_dir():
        names = listed.read_text().split() if listed.exists() else sorted(path.name for path in images.iterdir() if path.is_dir())
        if absent := [name for name in names if not (images / name).is_dir()]:
            raise DataError(f"{listed} names {len(names)} videos, and {len(absent)} are not in {images}, the first is {absent[0]}")
        places = [(name, images / name, masks / name) for name in names]
    elif (folder / "frames").is_dir():
        places = [(folder.resolve().name, folder / "frames", folder / "masks")]
    else:
        raise DataError(f"DATA={folder} has neither JPEGImages/480p (DAVIS 2017) nor frames/ and masks/")
    found = []
    for name, home, drawn in places:
        frames = tuple(sorted(path for path in home.iterdir() if path.suffix.lower() in IMG_EXTENSIONS))
        known = {path.stem: path for path in drawn.glob("*.png")}
        if len(frames) < 2:
            raise DataError(f"{home} has {len(frames)} frames: 2 or more are needed")
        if frames[0].stem not in known:
            raise DataError(f"{drawn / frames[0].stem}.png is missing: the first frame needs a mask")
        found.append(Video(name, frames, known))
    if not found:
        raise DataError(f"DATA={folder} has no video: {listed if listed.exists() else images} is empty")
    return found


def read_objects(path: Path) -> numpy.ndarray:
    """The object at each pixel (H, W) uint8, 0 for the background. Raises DataError for a file that is no index mask."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise DataError(f"{path} has colours ({image.mode}), not the number of an object at each pixel")
        return numpy.asarray(image).astype(numpy.uint8)


def propagate(features: Iterable[Tensor], first_NK: Tensor, grid: tuple[int, int], options: Options) -> Iterator[Tensor]:
    """The share of each object in each patch, (N, K), for each frame after the first. features: (N, D) of each frame, of length 1."""
    places = [torch.arange(side, device=first_NK.device) for side in grid]
    far_hh, far_ww = ((place[:, None] - place).abs() > options.radius for place in places)
    far_NN = (far_hh[:, None, :, None] | far_ww[None, :, None, :]).view(len(first_NK), len(first_NK))
    seen: list[tuple[Tensor, Tensor]] = []  # features and shares of the first frame and the last ones
    for feature_ND in features:
        if not seen:
            seen.append((feature_ND, first_NK))
            continue
        similar = [(feature_ND @ own_ND.T).masked_fill(far_NN, -torch.inf) for own_ND, _ in seen]
        near = torch.cat(similar, 1).topk(min(options.neighbours, len(seen) * len(feature_ND)), dim=1)
        weight_NM = (near.values / options.temperature).softmax(1)
        share_NK = (weight_NM[:, None] @ torch.cat([own_NK for _, own_NK in seen])[near.indices])[:, 0]
        yield share_NK
        seen = [seen[0], *[*seen[1:], (feature_ND, share_NK)][-options.context :]] if options.context else seen


def first_shares(objects_HW: numpy.ndarray, numbers: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """(N, K) of 0 and 1: the object at the middle of each patch, of those with these numbers."""
    small_hw = torch.from_numpy(numpy.array(Image.fromarray(objects_HW).resize(grid[::-1], Image.Resampling.NEAREST)))
    return torch.stack([small_hw.flatten() == number for number in numbers], 1).float()


def decided(share_KHW: Tensor) -> Tensor:
    """The place of the object at each pixel (H, W): the largest share after each object's map is scaled to 0..1. A constant map stays."""
    least_K11, most_K11 = share_KHW.amin((1, 2), keepdim=True), share_KHW.amax((1, 2), keepdim=True)
    return ((share_KHW - least_K11) / (most_K11 - least_K11)).where(most_K11 > least_K11, share_KHW).argmax(0)


def region(found_HW: numpy.ndarray, true_HW: numpy.ndarray) -> float:
    """J: intersection over union of two masks of an object; 1 if both are empty."""
    union = (found_HW | true_HW).sum()
    return float((found_HW & true_HW).sum() / union) if union else 1.0


def boundary(found_HW: numpy.ndarray, true_HW: numpy.ndarray) -> float:
    """F: harmonic mean of precision and recall of the boundary pixels, which may be TOLERANCE apart; 1 if there is no boundary in both."""
    found, true = outline(found_HW), outline(true_HW)
    if not found.any() or not true.any():
        return float(not found.any() and not true.any())
    reach = math.ceil(TOLERANCE * math.hypot(*true.shape))
    down, across = numpy.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = down**2 + across**2 <= reach**2
    precision = (found & ndimage.binary_dilation(true, disk)).sum() / found.sum()
    recall = (true & ndimage.binary_dilation(found, disk)).sum() / true.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def outline(mask_HW: numpy.ndarray) -> numpy.ndarray:
    """The pixels of a mask's boundary: those that differ from the next one to the right, below, or diagonally."""
    next_HW = numpy.pad(mask_HW, ((0, 1), (0, 1)), mode="edge")
    return (mask_HW ^ next_HW[:-1, 1:]) | (mask_HW ^ next_HW[1:, :-1]) | (mask_HW ^ next_HW[1:, 1:])


@torch.no_grad()
def run(options: Options) -> dict[str, tuple[float, float]]:
    """J and F of each video in percent: means over its objects, and over the frames after the first that have a mask."""
    fabric = make_fabric(options.device)
    fabric.launch()
    pretrained = find_pretrained(options.checkpoint, options.paper, options.recipe, options.set)
    pretrained.check_colour("label propagation")
    videos, patch = find_videos(options.data), pretrained.recipe.patch_size or 1
    scores: dict[str, tuple[float, float]] = {}
    for video in videos:
        objects_HW = read_objects(video.masks[video.frames[0].stem])
        numbers = [int(number) for number in numpy.unique(objects_HW) if number]
        if not numbers:
            raise DataError(f"{video.masks[video.frames[0].stem]} has no object: all pixels are 0")
        height, width = objects_HW.shape
        scale = options.short_side / min(height, width)
        size = (int(scale * height) // patch * patch, int(scale * width) // patch * patch)
        if not min(size):
            raise RecipeError(f"--short-side {options.short_side} is less than a patch of {patch} pixels")
        reseed(0)
        encoder, loaded = pretrained.encoder(size)
        encoder.eval().to(fabric.device)
        first_NK = first_shares(objects_HW, [0, *numbers], encoder.grid).to(fabric.device)

        def features(video: Video = video, encoder: ViT = encoder, size: tuple[int, int] = size) -> Iterator[Tensor]:
            for path in video.frames:
                pixels = numpy.array(read_image(str(path)).resize(size[::-1], Image.Resampling.BICUBIC))
                images = normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(fabric.device), pretrained.mean, pretrained.std)
                with fabric.autocast():
                    token_ND = encoder(images)[0, encoder.prefix_tokens :]
                yield F.normalize(token_ND.float(), dim=-1)

        if not scores:
            console.print(f"{len(videos)} videos, frames of {size[0]} x {size[1]} px: {loaded}", markup=False, soft_wrap=True)
        values = []
        for path, share_NK in zip(video.frames[1:], propagate(features(), first_NK, encoder.grid, options), strict=True):
            share_KHW = F.interpolate(share_NK.T.unflatten(1, encoder.grid)[None], (height, width), mode="bilinear")[0]
            found_HW = numpy.array([0, *numbers], numpy.uint8)[decided(share_KHW).cpu().numpy()]
            if options.out is not None:
                (options.out / video.name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(found_HW).save(options.out / video.name / f"{path.stem}.png")
            if path.stem in video.masks:
                true_HW = read_objects(video.masks[path.stem])
                if true_HW.shape != found_HW.shape:
                    raise DataError(f"{video.masks[path.stem]} has another size than the mask of the first frame")
                values += [measure(found_HW == k, true_HW == k) for k in numbers]
        j, f = 100 * numpy.mean(values, 0) if values else (math.nan, math.nan)
        scores[video.name] = (float(j), float(f))
    return scores


def measure(found_HW: numpy.ndarray, true_HW: numpy.ndarray) -> tuple[float, float]:
    """J and F of an object in a frame."""
    return region(found_HW, true_HW), boundary(found_HW, true_HW)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a user error."""

    def work() -> None:
        show(run(tyro.cli(Options, args=arguments, prog="python -m benchmarks.propagation", description=__doc__, config=TYRO)))

    return run_command(work, "lower --short-side")


def show(scores: dict[str, tuple[float, float]]) -> None:
    """Print the scores."""
    table = Table("Video", "J", "F", "J and F", title="label propagation", caption="percent; the mean is over videos")
    for name, (j, f) in (scores | {"mean": tuple(numpy.nanmean([*scores.values()], 0))}).items():
        table.add_row(name, f"{j:.1f}", f"{f:.1f}", f"{(j + f) / 2:.1f}")
    console.print(table, soft_wrap=False)


if __name__ == "__main__":
    sys.exit(main())
