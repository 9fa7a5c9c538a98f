"""What images look like to a tokenizer: one vector per cell, from pixels, from an encoder of ours or of timm's, or from CLIP.

Shapes: B images, C channels, N cells in row-major order, D width.
"""

import json
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from common.convert import load_encoder, load_method, read_checkpoint
from common.positions import Grid
from common.recipe import Recipe, RecipeError, TrainConfig, nearest
from common.vit import ViT, patchify

Channels = tuple[float, ...]
REFUSALS = (AssertionError, AttributeError, IndexError, OSError, RuntimeError, TypeError, ValueError)  # timm's and open_clip's


class Features(nn.Module):
    """What features have in common. They never train; `look` gives tokens (B, N, D) or a map (B, D, rows, columns)."""

    name: str  # what tells them from other features with the same weights
    size: Grid  # (height, width) in pixels of the images that they take
    mean: Channels  # by which pixels in 0..1 are normalised before
    std: Channels
    grid: Grid  # rows and columns of cells

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images to (B, N, D) float32. Raises ValueError for images of another shape than `mean` and `size` say."""
        wanted, given = (len(self.mean), *self.size), tuple(images_BCHW.shape[1:])
        if given != wanted:
            raise ValueError(f"{type(self).__name__} takes images of {wanted}, not {given}: make them as its `mean` and `size` say")
        seen = self.look(images_BCHW)
        return (seen.flatten(2).transpose(1, 2) if seen.ndim == 4 else seen).float()

    def train(self, mode: bool = True) -> "Features":
        return super().train(False)  # whatever it is a part of

    def settle(self, grid: Grid | None = None) -> None:
        """Freeze, and find the grid by a black image where it is not given. Raises RecipeError where `look` gives no map."""
        self.eval().requires_grad_(False)
        try:
            with torch.no_grad():
                _, _, rows, columns = (1, 1, *grid) if grid else self.look(torch.zeros(1, len(self.mean), *self.size)).shape
        except REFUSALS as error:
            raise RecipeError(f"{self.name} gives no grid of features at {self.size[0]} pixels ({error}): choose another") from error
        self.grid = (rows, columns)


class Pixels(Features):
    """The pixels of each patch, with `per_patch` of mean 0 and std 1 like MAE's targets. Raises ValueError where none fit."""

    def __init__(self, patch_size: int, size: Grid, mean: Channels, std: Channels, per_patch: bool = False):
        super().__init__()
        if any(side % patch_size or side < patch_size for side in size):
            raise ValueError(f"{size[0]} x {size[1]} pixels are no multiple of patch_size={patch_size}: choose a divisor of both")
        self.patch_size, self.size, self.mean, self.std, self.per_patch = patch_size, tuple(size), tuple(mean), tuple(std), per_patch
        self.name = f"patch_size={patch_size}, per_patch={per_patch}"
        self.settle((size[0] // patch_size, size[1] // patch_size))

    def look(self, images_BCHW: Tensor) -> Tensor:
        patch_BND = patchify(images_BCHW, self.patch_size).float()
        if not self.per_patch:
            return patch_BND
        # where all pixels are equal the variance is 0, and MAE's 1e-6 makes the patch 0
        variance_BN1, mean_BN1 = torch.var_mean(patch_BND, dim=-1, keepdim=True)
        return (patch_BND - mean_BN1) * (variance_BN1 + 1e-6).rsqrt()


class Encoder(Features):
    """Patch tokens after the final norm of an encoder, or the last map of a convolutional one.

    source: encoder.safetensors in the directory of a run of ours, or timm's name of a model. mean, std: of the data that an encoder of
    ours learned from, which its file does not tell; a timm model has its own. size: pixels of a side in place of the encoder's own;
    positions are interpolated. pretrained: timm's weights, downloaded, or else random ones.
    Raises ConversionError for a file that is absent or does not fit, RecipeError where recipe.json is not beside it or mean and std are
    not given, for a name or a size that timm does not know, weights that it cannot get, and a model without a grid of features.
    """

    def __init__(self, source: str | Path, *, mean: Channels = (), std: Channels = (), size: int | None = None, pretrained: bool = True):
        super().__init__()
        ours = Path(source).suffix == ".safetensors"
        if ours and not (mean and std):
            raise RecipeError(f"{source} does not tell how its images were normalised: give mean and std of the data it learned from")
        self.name, self.network, own = _open_run(Path(source), size, len(mean)) if ours else _open_timm(str(source), size, pretrained)
        self.size, self.mean, self.std = own["size"], tuple(mean or own["mean"]), tuple(std or own["std"])
        self.settle(self.network.grid if isinstance(self.network, ViT) else None)

    def look(self, images_BCHW: Tensor) -> Tensor:
        if isinstance(self.network, ViT):
            return self.network(images_BCHW)[:, self.network.prefix_tokens :]
        look = partial(self.network.forward_intermediates, images_BCHW, indices=1, output_fmt="NCHW", intermediates_only=True)
        try:
            return look(norm=True)[-1]
        except AssertionError:  # how Hiera says that it has no norm to apply
            return look(norm=False)[-1]


class Clip(Features):
    """A layer of CLIP's image tower, as open_clip has it. The defaults are the features that MaPeT clusters: (B, 196, 4096), not negative.

    model, weights: open_clip's name and tag; without weights they are random. layer: of a ResNet 0 is the stem and 1 to 4 its stages, of a
    Transformer the block, from 0; nothing is normalised after it. size: pixels of a side; a Transformer's positions are interpolated.
    Raises RecipeError where open_clip is not installed, for a name, tag or layer that there is not, and weights that it cannot get.
    """

    def __init__(self, model: str = "RN50x64", weights: str | None = "openai", layer: int = 4, size: int = 448):
        super().__init__()
        try:
            import open_clip  # here because only this class needs it, and it belongs to an extra
        except ImportError as error:
            raise RecipeError("CLIP's features need open_clip, which is not installed: pip install -e '.[mapet]'") from error
        if model not in open_clip.list_models():
            raise RecipeError(f"open_clip has no model {model!r}; {nearest(model, open_clip.list_models())}")
        tag, tags = open_clip.get_pretrained_cfg(model, weights or ""), open_clip.list_pretrained_tags_by_model(model)
        if weights is not None and not tag:
            raise RecipeError(f"open_clip has no weights {weights!r} for {model}; {nearest(weights, tags)}")
        resnet = isinstance(open_clip.get_model_config(model)["vision_cfg"].get("layers"), list)
        options = {"force_quick_gelu": tag.get("quick_gelu", False)}  # the activation of the weights, whatever the name says
        options |= {} if resnet else {"force_image_size": size}  # a ResNet's only positions are in its attention pool, which is left out
        try:
            made = open_clip.create_model(model, pretrained=weights, **options)
        except REFUSALS as error:
            raise RecipeError(f"open_clip cannot give {model}, weights {weights!r}, for {size} pixels: {error}") from error
        if resnet:
            made.visual.attnpool = nn.Identity()  # nothing here needs it
        self.name, self.visual, self.size, own = f"{model} at layer={layer}", made.visual, (size, size), made.visual.preprocess_cfg
        self.mean, self.std = tuple(own["mean"]), tuple(own["std"])
        # open_clip's ResNets end at the layer unless they are told to, its Transformers only then (3.3)
        self.options = {"indices": [layer], "stop_early": not resnet, "intermediates_only": True}
        self.settle()

    def look(self, images_BCHW: Tensor) -> Tensor:
        return self.visual.forward_intermediates(images_BCHW, **self.options)["image_intermediates"][0]


def _open_run(path: Path, size: int | None, channels: int) -> tuple[str, nn.Module, dict]:
    """An encoder as the recipe.json beside it builds it: its timm name, itself, and the size of its images."""
    state, beside = read_checkpoint(path), path.with_name("recipe.json")
    try:
        recipe = json.loads(beside.read_text())["recipe"]
        sizes = {name: recipe[name] for name in ("size", "image_size", "patch_size", "encoder")} | ({"image_size": size} if size else {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{beside} does not say what {path.name} is ({error!r}): name the file in its run's directory") from error
    recipe = Recipe(pretrain=TrainConfig(epochs=1, batch_size=1, base_lr=0.0), protocols=(), **sizes)
    network = recipe.build_encoder(channels)
    load_encoder(network, state, allow_unused=()) if isinstance(network, ViT) else load_method(network, state, {})
    return recipe.backbone, network, {"size": network.image_size}


def _open_timm(name: str, size: int | None, pretrained: bool) -> tuple[str, nn.Module, dict]:
    """A timm model without classifier: its name, itself, and how it wants its images."""
    if not timm.is_model(name):
        raise RecipeError(f"timm has no model {name!r}, and it is no .safetensors file; {nearest(name, timm.list_models())}")
    try:
        known = timm.get_pretrained_cfg(name)
        options = {"img_size": size} if size and known and known.fixed_input_size else {}  # convolutions take any size
        network = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except REFUSALS as error:
        raise RecipeError(f"timm cannot give {name}, pretrained={pretrained}, size={size}: {error}") from error
    own = timm.data.resolve_model_data_config(network)
    return name, network, own | {"size": (size, size) if size else tuple(own["input_size"][1:])}
