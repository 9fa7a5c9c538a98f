"""Top-1 and top-5 accuracy of a classifier released by MaPeT's authors.

python -m mapet.validate /datasets/imagenet --checkpoint vit_standard_base_patch16_224_KCLIP.tar

They released six ViTs, fine-tuned on ImageNet-1k: vit_standard_{tiny,small,base}_patch16_224_{KCLIP,VQKD}.tar, torch files in spite of
the name. We had no access to the files or the pages about them, so their format is taken from the official code: timm's CheckpointSaver
writes them, and state_dict is read. The tensors determine the network. Images are preprocessed as in the official validate.py: resize
the short side to 1 / 0.9 of the image size (248 for 224 pixels), bicubic, then center crop.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import nn

from common import keep_freed_memory
from common.convert import ConversionError, Coverage, State, load_method, read_checkpoint
from common.data import Data, DataError
from common.data.sets import IMAGENET_MEAN, IMAGENET_STD, scan_folder
from common.data.workers import default_workers
from common.environment import device_name
from common.evaluate import Classifier, evaluate
from common.recipe import Protocol
from common.run import RunError, console
from common.train import make_fabric
from common.vit import SIZES, vit

RELEASED = {SIZES[size][0]: size for size in ("tiny", "small", "base")}  # by width
TOLD_BY = {"patch_embed.proj.weight": 4, "cls_token": 3, "pos_embed": 3, "blocks.0.attn.q.weight": 2, "head.weight": 2}  # dimensions
CROP = 0.9  # center crop / resized short side, in the official validate.py whatever its command line says
PROGRESS_SECONDS = 20.0  # between two progress lines


@dataclass
class Options:
    """Options of the command line."""

    path: Annotated[Path, tyro.conf.Positional]
    """A folder with one folder of images per class, or with such a folder val/. The sorted folder names are the classes of the head."""
    checkpoint: Path
    """One of the six released files."""
    batch_size: int = 256
    """Images per device and batch."""
    workers: int = dataclasses.field(default_factory=default_workers)
    """Loader processes per device; default: the cores divided by the training processes of the machine, at most 8."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto uses a GPU if there is one."""
    precision: Literal["auto", "bf16-mixed", "32-true"] = "32-true"
    """auto is bf16-mixed if the hardware supports it, else 32-true."""
    skip_corrupt: bool = False
    """Replace an unreadable image by the next readable one, instead of stopping."""


def build_classifier(state: State) -> Classifier:
    """Build the network of the official tensors, with new weights. Raises ConversionError if it is not one of the released networks."""
    if "mask_positional_token" in state or "decoder.weight" in state:
        raise ConversionError(
            "this is a pre-training checkpoint: it has mask_positional_token or decoder, but no classifier to evaluate. "
            "Fine-tune it with benchmarks.reproduce --encoder, or use one of the released vit_standard_* files"
        )
    lacking = [name for name, dimensions in TOLD_BY.items() if name not in state or state[name].ndim != dimensions]
    pools: list[Any] = [pool for name, pool in {"fc_norm.weight": "mean", "norm.weight": "class"}.items() if name in state]
    if lacking or len(pools) != 1:
        lacks = f"lacks {', '.join(lacking)}" if lacking else f"has {'both' if pools else 'neither'} of fc_norm and norm"
        raise ConversionError(f"this is not one of MaPeT's classifiers, as it {lacks}; use one of the released vit_standard_* files")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    cells = state["pos_embed"].shape[1] - 1  # without the class token
    if width not in RELEASED or channels != 3 or cells < 1 or isqrt(cells) ** 2 != cells:
        fault = f"this classifier has width {width}, {channels} channels and {cells} patches"
        raise ConversionError(f"{fault}; the released ones have width 192 (tiny), 384 (small) or 768 (base), 3 channels, 14 x 14 patches")
    scale = 0.1 if "blocks.0.ls1.gamma" in state else None  # the file contains the value
    encoder = vit(RELEASED[width], image_size=isqrt(cells) * patch, patch_size=patch, position="learned", layer_scale=scale)
    protocol = Protocol(name="validate", kind="knn", pool=pools[0])  # a kind without training
    return Classifier(encoder, len(state["head.weight"]), protocol)


def load_classifier(path: Path) -> tuple[Classifier, Coverage, int]:
    """Load a released classifier. Returns it, the coverage, and the number of tensors in the file. Raises ConversionError otherwise."""
    state = read_checkpoint(path)
    try:
        model = build_classifier(state)
        return model, load_method(model, state, {"": "encoder.", "fc_norm.": "fc_norm.", "head.": "head."}), len(state)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None


def open_images(path: Path, classes: int, skip_corrupt: bool) -> Data:
    """Open the evaluation images, as `val`. Raises DataError unless there is one folder of images for each class."""
    folder = path / "val" if (path / "val").is_dir() else path
    if not folder.is_dir():
        raise DataError(f"{path} is not a folder: give one with a folder of images per class, or with such a folder val/")
    split = scan_folder(folder, skip_corrupt)
    if len(split.class_names) != classes:
        fault = f"{folder} has {len(split.class_names)} class folders, the first is {split.class_names[0]}"
        raise DataError(f"{fault}, and the classifier has {classes} classes: give the data that it was trained on, with all classes")
    return Data(path.resolve().name, classes, 3, None, IMAGENET_MEAN, IMAGENET_STD, train=split.subset([]), val=split)


def validate(options: Options) -> dict[str, float | None]:
    """Evaluate, print what was loaded and the results, and return top1 and top5 in percent."""
    fabric = make_fabric(options.device, options.precision)
    fabric.launch()
    model, coverage, held = load_classifier(options.checkpoint)
    encoder, classes, side = model.encoder, model.head.out_features, model.encoder.image_size[0]
    data, resize = open_images(options.path, classes, options.skip_corrupt), int(side / CROP)
    protocol = Protocol(name="validate", kind="classify", resize=resize, interpolation="bicubic")
    images, seen, begun = len(data.val), 0, time.perf_counter()
    reported = begun

    def say(line: str) -> None:
        if fabric.is_global_zero:
            console.print(line, markup=False)

    def progress(_: nn.Module, given: tuple, __: object) -> None:
        nonlocal reported, seen
        seen, now = seen + len(given[0]) * fabric.world_size, time.perf_counter()
        if now - reported > PROGRESS_SECONDS and seen < images:
            rate, reported = seen / (now - begun), now
            say(f"{seen} of {images} images, {rate:.1f} images/s, {(images - seen) / rate:.0f} s left")

    scaled = "with" if hasattr(encoder.blocks[0].ls1, "gamma") else "without"
    network = f"ViT-{RELEASED[encoder.width]}/{encoder.patch_size} {scaled} LayerScale, {model.pool} pooling, {classes} classes"
    seeing = f"short side to {resize} px (bicubic), center crop {side} px, ImageNet's mean and std"
    counts, notes = dataclasses.replace(coverage, notes=()), "".join(f"; {note}" for note in coverage.notes)
    say(f"{options.checkpoint.name}: {counts} (of {held} in the file, q and kv fused){notes}; {network}; images: {seeing}")
    model.to(fabric.device).register_forward_hook(progress)
    loading: dict = {"image_size": encoder.image_size, "batch_size": options.batch_size, "workers": options.workers}
    (found,) = evaluate(model, data, protocol, fabric=fabric, **loading)
    spent = f"{time.perf_counter() - begun:.1f} s on {fabric.world_size} x {device_name(fabric.device)}, {fabric._precision.precision}"
    say(f"{images} images of {data.name}: top-1 {found.top1:.3f} %, top-5 {found.top5:.3f} %, {spent}")
    return {"top1": found.top1, "top5": found.top5}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 for a user error."""
    keep_freed_memory()
    try:
        config = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
        validate(tyro.cli(Options, args=arguments, prog="python -m mapet.validate", description=__doc__, config=config))
    except (ValueError, RunError, OSError) as error:  # ConversionError and DataError are ValueErrors
        console.print(f"error: {error}", style="bold red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
