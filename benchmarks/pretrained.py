"""The encoder that a downstream training starts from: of a run, of a file, or with random weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.papers import choose_recipe, paper_module
from common.convert import load_encoder, read_checkpoint
from common.data.sets import IMAGENET_MEAN, IMAGENET_STD
from common.files import digest
from common.recipe import Recipe, RecipeError, TrainConfig, override
from common.run import RunError
from common.vit import SIZES, ViT

ENCODER = "encoder.safetensors"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Where the encoder is from, and how it is built at another image size."""

    paper: str
    name: str  # of the recipe
    recipe: Recipe  # of the pre-training; only the encoder's fields are used
    file: Path | None  # of the weights; None: random weights
    arm: str = ""
    overrides: str = ""  # what --set changed, space separated
    epochs: int = 0  # of the pre-training; 0 where they are not known
    mean: tuple[float, ...] = IMAGENET_MEAN  # of the channels of the images that the encoder was trained on
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def run(self) -> str:
        """The name of the run's folder whose own encoder this is, "" for other files and random weights."""
        return self.file.parent.resolve().parent.name if self.file is not None and self.file.name == ENCODER else ""

    @property
    def given(self) -> str:
        """The name of the file, "" for random weights; of a run's own encoder also the run: digits-200ep-seed0/encoder.safetensors."""
        return "" if self.file is None else f"{self.run}/{self.file.name}".lstrip("/")

    @property
    def start(self) -> str:
        """As in the ledger, of an encoder that is trained: pretrained, or scratch."""
        return "scratch" if self.file is None else "pretrained"

    @property
    def identity(self) -> dict[str, str]:
        """Settings that identify the encoder, with the digest of its weights."""
        weights = "random" if self.file is None else f"{self.file.name}, sha256 {digest(self.file)}"
        return {"paper": self.paper, "recipe": self.name, "arm": self.arm, "overrides": self.overrides, "weights": weights}

    @property
    def trained_positions(self) -> dict[str, str]:
        """Options of an encoder that is trained: one without positions (MP3) gets learned ones."""
        return {"position": "learned"} if self.recipe.encoder.get("position") == "none" else {}

    @property
    def label(self) -> str:
        """A name for the folder of a downstream run: paper and run, file or recipe."""
        return f"{self.paper}-{self.run or (self.name if self.file is None else self.file.stem)}"

    @property
    def source(self) -> str:
        """The weights in words."""
        return "random weights" if self.file is None else str(self.file)

    def check_colour(self, task: str) -> None:
        """Raise RecipeError if the encoder was trained on grey images, which the images of a task are not."""
        if len(self.mean) != 3:
            raise RecipeError(f"{self.source} was trained on grey images: {task} needs an encoder of colour images (3 channels)")

    def encoder(self, image_size: tuple[int, int], **changes: Any) -> tuple[ViT, str]:
        """The encoder for images of (height, width) pixels, and a line that says what was loaded.

        Positions are interpolated to the grid of these images. `changes` are options of ViT. An encoder that was trained without positions
        can get them here (position="learned"): they start with random values. Raises RecipeError for a backbone that is no ViT of
        this project and for sizes that do not fit, and ConversionError if the file does not cover the encoder.
        """
        patch = self.recipe.patch_size
        if patch is not None and any(side % patch for side in image_size):
            raise RecipeError(f"{image_size[0]} x {image_size[1]} pixels are not a multiple of the encoder's patch size {patch}")
        channels = len(self.mean)
        encoder = self.recipe.build_encoder(channels, image_size=image_size, **changes) if self.recipe.size in SIZES else None
        if not isinstance(encoder, ViT):
            what = "a map of one feature per patch is needed, as of the ViT of this project (size: micro to huge)"
            raise RecipeError(f"{self.recipe.backbone} of {self.paper}, {self.name} is a model of timm: {what}")
        if self.file is None:
            return encoder, "random weights"
        added = ("pos_embed",) if self.recipe.encoder.get("position") == "none" else ()
        coverage = load_encoder(encoder, read_checkpoint(self.file), allow_missing=added, allow_unused=("cls_token",))
        return encoder, f"{self.label}, {self.file.name}: {coverage}"  # no path: logs are recorded


def find_pretrained(
    checkpoint: Path | None, paper: str | None, recipe: str | None = None, changes: Sequence[str] = (), data: str = "folder"
) -> Pretrained:
    """The encoder of a run (its folder, or encoder.safetensors in it), of a file of this project, of an official code or of timm, or None.

    A run knows its own recipe. A file needs a paper and takes its recipe of this name, or else its default one for `data`, as
    `make reproduce` does with --encoder; changes: as of --set. Raises RunError for a path that does not exist or has no encoder, and
    RecipeError for names that are not known or contradict the run, and for a recipe or changes beside a run.
    """
    if checkpoint is not None and not checkpoint.exists():
        raise RunError(f"CKPT={checkpoint} does not exist: give the folder of a run, or a file with an encoder")
    if checkpoint is not None and checkpoint.is_dir():
        found = [path for path in (checkpoint / "pretrain" / ENCODER, checkpoint / ENCODER) if path.exists()]
        if not found:
            raise RunError(
                f"CKPT={checkpoint} has no pretrain/{ENCODER}: give the folder of a run, such as runs/droppos/digits-200ep-seed0"
            )
        checkpoint = found[0]
    if checkpoint is not None and (checkpoint.parent / "card.json").exists():
        if recipe is not None or changes:
            raise RecipeError(f"CKPT={checkpoint} is a run and knows its recipe: leave RECIPE= and --set out")
        return _of_run(checkpoint, paper)
    if paper is None:
        raise RecipeError("PAPER= is missing: its recipe says how the encoder is built (with the folder of a run as CKPT it is not needed)")
    name, chosen = choose_recipe(paper_module(paper), data, recipe)
    return Pretrained(paper=paper, name=name, recipe=override(chosen, changes), file=checkpoint, overrides=" ".join(changes))


def _of_run(file: Path, paper: str | None) -> Pretrained:
    settings, card = (json.loads((file.parent / name).read_text()) for name in ("recipe.json", "card.json"))
    if paper not in (None, settings["paper"]):
        raise RecipeError(f"CKPT={file} is of {settings['paper']}, not of PAPER={paper}: leave PAPER= out")
    sizes = {name: settings["recipe"][name] for name in ("size", "image_size", "patch_size", "encoder")}
    return Pretrained(
        paper=settings["paper"],
        name=card["recipe"],
        recipe=Recipe(pretrain=TrainConfig(epochs=1, batch_size=1, base_lr=0.0), protocols=(), **sizes),
        file=file,
        arm=card["arm"],
        overrides=" ".join(card["overrides"]),
        epochs=settings["recipe"]["pretrain"]["epochs"],
        mean=tuple(card["mean"]),
        std=tuple(card["std"]),
    )
