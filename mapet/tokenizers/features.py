"""Features for a tokenizer: one vector per cell, from pixels, from one of our encoders, from timm, or from CLIP.

Shapes: B images, C channels, N cells in row-major order, D width.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from common.convert import load_encoder, load_method, read_checkpoint
from common.positions import Grid
from common.recipe import Recipe, RecipeError, TrainConfig, nearest
from common.vit import ViT, patchify

Channels = tuple[float, ...]
REFUSALS = (AssertionError, AttributeError, IndexError, OSError, RuntimeError, TypeError, ValueError)  # raised by timm and open_clip


class Features(nn.Module):
    """Base class of features. They are never trained. `look` returns tokens (B, N, D) or a map (B, D, rows, columns)."""

    name: str  # distinguishes features that have the same weights
    size: Grid  # (height, width) of the input images, in pixels
    mean: Channels  # normalisation of the input pixels in 0..1
    std: Channels
    grid: Grid  # rows and columns of cells
    look: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map images to (B, N, D) float32. Raises ValueError if the image shape does not fit `mean` and `size`."""
        wanted, given = (len(self.mean), *self.size), tuple(images_BCHW.shape[1:])
        if given != wanted:
            raise ValueError(f"{type(self).__name__} takes images of {wanted}, not {given}: prepare them with its `mean` and `size`")
        seen = self.look(images_BCHW)
        return (seen.flatten(2).transpose(1, 2) if seen.ndim == 4 else seen).float()

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)  # always in evaluation mode, also inside another module

    def settle(self, grid: Grid | None = None) -> None:
        """Freeze the features. Find the grid with an all-zero image if it is not given. Raises RecipeError if `look` gives no map."""
        self.eval().requires_grad_(False)
        try:
            with torch.no_grad():
                _, _, rows, columns = (1, 1, *grid) if grid else self.look(torch.zeros(1, len(self.mean), *self.size)).shape
        except REFUSALS as error:
            raise RecipeError(f"{self.name} gives no grid of features at {self.size[0]} pixels ({error}): choose another") from error
        self.grid = (rows, columns)


class Pixels(Features):
    """The pixels of each patch; `per_patch` normalises each patch like MAE's targets. Raises ValueError if patches do not fit the size."""

    def __init__(self, patch_size: int, size: Grid, mean: Channels, std: Channels, per_patch: bool = False):
        super().__init__()
        if any(side % patch_size or side < patch_size for side in size):
            raise ValueError(f"{size[0]} x {size[1]} pixels are not a multiple of patch_size={patch_size}: choose a divisor of both")
        self.patch_size, self.size, self.mean, self.std, self.per_patch = patch_size, (size[0], size[1]), tuple(mean), tuple(std), per_patch
        self.name = f"patch_size={patch_size}, per_patch={per_patch}"
        self.settle((size[0] // patch_size, size[1] // patch_size))

    def look(self, images_BCHW: Tensor) -> Tensor:
        patch_BND = patchify(images_BCHW, self.patch_size).float()
        if not self.per_patch:
            return patch_BND
        # if all pixels are equal, the variance is 0, and with MAE's 1e-6 the result is 0
        variance_BN1, mean_BN1 = torch.var_mean(patch_BND, dim=-1, keepdim=True)
        return (patch_BND - mean_BN1) * (variance_BN1 + 1e-6).rsqrt()


class Encoder(Features):
    """Patch tokens of an encoder after the final norm, or the last map of a convolutional network.

    source: encoder.safetensors in the directory of one of our runs, or a timm model name. mean, std: of our encoder's training data (its
    file does not contain them); a timm model has its own. size: image size in pixels, instead of the encoder's own; positions are
    interpolated. pretrained: download timm's weights; otherwise the weights are random.
    Raises ConversionError for a file that is missing or does not fit. Raises RecipeError if recipe.json is not beside the file, if its
    pre-training is not finished, if mean and std are missing, for a name or size unknown to timm, unavailable weights, and a model
    without a grid of features.
    """

    def __init__(self, source: str | Path, *, mean: Channels = (), std: Channels = (), size: int | None = None, pretrained: bool = True):
        super().__init__()
        ours = Path(source).suffix == ".safetensors"
        if ours and not (mean and std):
            raise RecipeError(f"{source} does not contain mean and std of its images: give those of its training data")
        self.name, self.network, own = _open_run(Path(source), size, len(mean)) if ours else _open_timm(str(source), size, pretrained)
        self.size, self.mean, self.std = own["size"], tuple(mean or own["mean"]), tuple(std or own["std"])
        self.settle(self.network.grid if isinstance(self.network, ViT) else None)

    def look(self, images_BCHW: Tensor) -> Tensor:
        if isinstance(self.network, ViT):
            return self.network(images_BCHW)[:, self.network.prefix_tokens :]
        look = partial(self.network.forward_intermediates, images_BCHW, indices=1, output_fmt="NCHW", intermediates_only=True)
        try:
            return look(norm=True)[-1]
        except AssertionError:  # raised by Hiera, which has no norm to apply
            return look(norm=False)[-1]


class Clip(Features):
    """A layer of CLIP's image tower, from open_clip. The defaults give the features that MaPeT clusters: (B, 196, 4096), non-negative.

    model, weights: open_clip's model name and weights tag; None: random weights. layer: for a ResNet, 0 is the stem and 1 to 4 the stages;
    for a Transformer, the block, from 0. No norm follows. size: image size in pixels; a Transformer's positions are interpolated.
    Raises RecipeError if open_clip is not installed, for an unknown name, tag or layer, and for unavailable weights.
    """

    def __init__(self, model: str = "RN50x64", weights: str | None = "openai", layer: int = 4, size: int = 448):
        super().__init__()
        try:
            import open_clip  # imported here: only this class needs it, and it is an optional dependency
        except ImportError as error:
            raise RecipeError("CLIP's features need open_clip, which is not installed: pip install -e '.[mapet]'") from error
        if model not in open_clip.list_models():
            raise RecipeError(f"open_clip has no model {model!r}; {nearest(model, open_clip.list_models())}")
        tag, tags = open_clip.get_pretrained_cfg(model, weights or ""), open_clip.list_pretrained_tags_by_model(model)
        if weights is not None and not tag:
            raise RecipeError(f"open_clip has no weights {weights!r} for {model}; {nearest(weights, tags)}")
        resnet = isinstance(open_clip.get_model_config(model)["vision_cfg"].get("layers"), list)
        options = {"force_quick_gelu": tag.get("quick_gelu", False)}  # the activation used with these weights, whatever the name says
        options |= {} if resnet else {"force_image_size": size}  # a ResNet has positions only in its attention pool, which is removed
        try:
            made = open_clip.create_model(model, pretrained=weights, **options)
        except REFUSALS as error:
            raise RecipeError(f"open_clip cannot give {model}, weights {weights!r}, for {size} pixels: {error}") from error
        if resnet:
            made.visual.attnpool = nn.Identity()  # not needed here
        self.name, self.visual, self.size, own = f"{model} at layer={layer}", made.visual, (size, size), made.visual.preprocess_cfg
        self.mean, self.std = tuple(own["mean"]), tuple(own["std"])
        # open_clip 3.3: ResNets stop at the layer only with stop_early=False, Transformers only with stop_early=True
        self.options = {"indices": [layer], "stop_early": not resnet, "intermediates_only": True}
        self.settle()

    def look(self, images_BCHW: Tensor) -> Tensor:
        return self.visual.forward_intermediates(images_BCHW, **self.options)["image_intermediates"][0]


def _open_run(path: Path, size: int | None, channels: int) -> tuple[str, Any, dict]:
    """Build an encoder from the recipe.json beside its file. Returns its timm name, the module, and its image size."""
    state, beside = read_checkpoint(path), path.with_name("recipe.json")
    try:
        recipe = json.loads(beside.read_text())["recipe"]
        sizes: dict = {name: recipe[name] for name in ("size", "image_size", "patch_size", "encoder")}
        sizes |= {"image_size": size} if size else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{beside} does not say what {path.name} is ({error!r}): give the path in its run's directory") from error
    if beside.with_name("progress.json").exists() and not beside.with_name("result.json").exists():
        raise RecipeError(f"the pre-training in {path.parent} is not finished, so {path.name} will change: finish it first")
    found = Recipe(pretrain=TrainConfig(epochs=1, batch_size=1, base_lr=0.0), protocols=(), **sizes)
    network = found.build_encoder(channels)
    load_encoder(network, state, allow_unused=()) if isinstance(network, ViT) else load_method(network, state, {})
    return found.backbone, network, {"size": network.image_size}


def _open_timm(name: str, size: int | None, pretrained: bool) -> tuple[str, Any, dict]:
    """Create a timm model without classifier. Returns its name, the module, and its input configuration."""
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model {name!r}, and it is not a .safetensors file; {nearest(name, timm.list_models())}")
    try:
        known = timm.get_pretrained_cfg(name)
        options: dict = {"img_size": size} if size and known and known.fixed_input_size else {}  # convolutions take any size
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except REFUSALS as error:
        raise RecipeError(f"timm cannot give {name}, pretrained={pretrained}, size={size}: {error}") from error
    own = timm.data.resolve_model_data_config(network)
    return name, network, own | {"size": (size, size) if size else tuple(own["input_size"][1:])}
