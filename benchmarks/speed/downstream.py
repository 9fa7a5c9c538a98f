"""Time training steps of segmentation and detection with ViT-S/16, in turns: `python -m benchmarks.speed.downstream`.

    linear      segmentation with a linear layer at 368 x 480 px, against forward and backward of the bare ViT
    upernet     UPerNet on our ViT at 368 x 480 px, against the same on mmsegmentation's own MAE backbone (needs the extra seg)
    vitdet      ViTDet's backbone with relative positions at 512 px, against detectron2's own ViT (needs detectron2)
    vitdet, no relative positions

A step is forward and backward, without the optimizer, on images that are on the device already.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from benchmarks.detection.vitdet import WindowedViT
from benchmarks.segmentation.linear import Segmenter
from benchmarks.segmentation.upernet import UPerNet
from benchmarks.speed.measure import show, wait
from common import keep_freed_memory
from common.train import make_fabric
from common.vit import ViT, vit

SIZE, CLASSES = (368, 480), 11  # of camvid, in whole patches
SQUARE = (512, 512)  # of detection


class MmsegBackbone(nn.Module):
    """mmsegmentation's MAE backbone of the size of ViT-S/16, with the interface of our ViT that UPerNet uses."""

    prefix_tokens, width, grid = 0, 384, (SIZE[0] // 16, SIZE[1] // 16)

    def __init__(self) -> None:
        from mmseg.models.backbones import MAE

        super().__init__()
        options: dict = {"img_size": SIZE, "patch_size": 16, "embed_dims": 384, "num_layers": 12, "num_heads": 6}
        self.module: Any = MAE(out_indices=[3, 5, 7, 11], init_values=1.0, **options)
        self.blocks = self.module.layers
        self.norm: nn.Module = nn.Identity()

    def levels(self, images: Tensor, _: Sequence[int]) -> list[Tensor]:
        """The tokens (B, T, D) of the four levels."""
        return [level.flatten(2).mT for level in self.module(images)]


def encoder(size: tuple[int, int] = SIZE) -> ViT:
    """ViT-S/16."""
    return vit("small", image_size=size, position="learned")


def vitdet(relative_positions: bool) -> nn.Module:
    """ViTDet's backbone."""
    return WindowedViT(encoder(SQUARE), relative_positions=relative_positions)


def detectron2_vit(relative_positions: bool) -> nn.Module:
    """detectron2's backbone of the same size."""
    from detectron2.modeling.backbone.vit import ViT as Detectron2ViT

    windowed = [number for number in range(12) if number not in (2, 5, 8, 11)]
    own: dict = {"img_size": SQUARE[0], "embed_dim": 384, "depth": 12, "num_heads": 6, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    return Detectron2ViT(**own, window_size=14, window_block_indexes=windowed, use_rel_pos=relative_positions)


def pairs() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
    """What is timed, and what it is compared with."""
    found: dict = {"linear": (lambda: Segmenter(encoder(), CLASSES), encoder)}
    if find_spec("mmseg") is not None:
        found["upernet"] = (lambda: UPerNet(encoder(), CLASSES), lambda: UPerNet(MmsegBackbone(), CLASSES))  # type: ignore[arg-type]
    if find_spec("detectron2") is not None:
        for title, relative in (("vitdet", True), ("vitdet, no relative positions", False)):
            found[title] = (partial(vitdet, relative), partial(detectron2_vit, relative))
    return found


def loss(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The loss of a segmenter; of a backbone, the mean square of what it returns."""
    if isinstance(model, Segmenter | UPerNet):
        return model(images, classes).loss
    found = model(images)
    return (found["last_feat"] if isinstance(found, dict) else found).float().square().mean()


def measure(batch: int, rounds: int) -> pandas.DataFrame:
    """Images/s of both, and the median ratio of the rounds."""
    fabric, lines = make_fabric(), []
    fabric.launch()
    for name, makers in pairs().items():
        size = SQUARE if "vitdet" in name else SIZE
        images = torch.randn(batch, 3, *size, device=fabric.device)
        classes = torch.randint(0, CLASSES, (batch, *size), dtype=torch.uint8, device=fabric.device)
        models = [make().to(fabric.device).train() for make in makers]
        seconds: list[list[float]] = [[], []]
        for turn in range(rounds + 1):
            for model, times in zip(models, seconds, strict=True):
                wait(fabric.device)
                begun = time.perf_counter()
                with fabric.autocast():
                    value = loss(model, images, classes)
                value.backward()
                model.zero_grad(set_to_none=True)
                wait(fabric.device)
                times += [time.perf_counter() - begun] * (turn > 0)  # the first one warms up
        ratio = statistics.median(other / own for own, other in zip(*seconds, strict=True))
        own, other = (f"{batch / statistics.median(times):.3g}" for times in seconds)
        lines.append({"case": name, "images/s": own, "compared with, images/s": other, "ratio": f"{ratio:.3f}"})
    return pandas.DataFrame(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.downstream", description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="images of a step")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each model, in turns")
    options = parser.parse_args(argv)
    keep_freed_memory()
    fabric = make_fabric()
    show(measure(options.batch, options.rounds), "segmentation and detection, ViT-S/16", fabric.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
