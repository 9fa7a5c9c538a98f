"""What an encoder attends to, the features of its patches, and where the positions that a method predicts are right.

Shapes: B images, C channels, H x W pixels (of an image) or patches (of its grid), N patches, T tokens, D width, Z heads.
"""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.papers import paper_module
from benchmarks.report.figures import cell_map, image_rows
from common.convert import load_encoder
from common.data import Augmentation, Data, Loader, open_data
from common.picture import as_pixels
from common.randomness import reseed
from common.recipe import Recipe, TrainConfig
from common.vit import ViT

IMAGES = 1000  # test images on which positions are counted; all of ImageNet would take hours on CPU cores


def draw_encoder(folder: Path, data_name: str | None, data_root: Path) -> dict[str, dict[str, Figure]]:
    """The figures of a pre-training in its folder, by heading: Positions, if the method predicts them, and Encoder.

    Raises ValueError where there is no ViT of ours yet, or not its test images.
    """
    if not (folder / "result.json").exists():
        raise ValueError("the pre-training is not finished")
    settings, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("recipe", "result"))
    recipe, data = read_recipe(settings["recipe"]), open_data(data_name or settings["data"]["name"], data_root)
    if differing := [name for name, value in data.identity.items() if value != settings["data"][name]]:
        raise ValueError(f"{', '.join(differing)} of {data.name} are not the images of the run; set DATA= to their folder")
    encoder = recipe.build_encoder(data.channels)
    if not isinstance(encoder, ViT):
        raise ValueError(f"{recipe.backbone} is a model of timm; attention is drawn for the ViT of this project")
    load_encoder(encoder, load_file(folder / "encoder.safetensors"))
    figures: dict[str, dict[str, Figure]] = {}
    if "position_top1" in result and (folder / "checkpoint.pt").exists():
        method = load_method(folder / "checkpoint.pt", settings["paper"], recipe, data)
        right_HW = position_accuracy(method, test_images(recipe, data, IMAGES), settings["seed"])
        figures |= {} if right_HW is None else {"Positions": {"positions": cell_map(right_HW.numpy(), "Positions right, by true cell")}}
    images = next(test_images(recipe, data, 6).epoch(0))[0]
    attention = f"attention of\nthe {'class token' if encoder.prefix_tokens else 'mean patch'}"
    shown = {"image": as_pixels(images, data).permute(0, 2, 3, 1), attention: attention_maps(encoder, images)}
    shown |= {"patch features,\nthree colours": feature_colours(encoder, images)}
    return figures | {"Encoder": {"encoder": image_rows({title: part.numpy() for title, part in shown.items()})}}


def read_recipe(held: dict[str, Any]) -> Recipe:
    """The recipe in a recipe.json, without evaluations."""
    pretrain = held["pretrain"] | {"augmentation": Augmentation(**held["pretrain"]["augmentation"])}
    return Recipe(**held | {"pretrain": TrainConfig(**pretrain), "protocols": ()})


def load_method(checkpoint: Path, paper: str, recipe: Recipe, data: Data) -> nn.Module:
    """The method of a checkpoint.pt, as it was at the end of its pre-training (its EMA if there is one)."""
    method = paper_module(paper).build(recipe, recipe.build_encoder(data.channels), data.classes)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    average = {name.removeprefix("module."): value for name, value in (saved.get("average") or {}).items() if name != "n_averaged"}
    method.load_state_dict(average or saved["model"])
    return method.eval()


def test_images(recipe: Recipe, data: Data, count: int) -> Loader:
    """Batches of at most `count` test images, spread over the classes, as the pre-trained encoder is given them."""
    count = min(count, len(data.val))
    split = data.val.subset([index * len(data.val) // count for index in range(count)])  # the images of a folder are sorted by class
    resize = recipe.pretrain.augmentation.evaluation_resize if split.paths else None
    size, cpu = (recipe.image_size, recipe.image_size), torch.device("cpu")
    return Loader(
        split, data=data, image_size=size, batch_size=min(count, 100), augmentation=None, seed=0, device=cpu, workers=0, resize=resize
    )


def attention_maps(encoder: ViT, images_BCHW: Tensor) -> Tensor:
    """How much the class token attends to each patch in the last block, mean over heads: (B, H, W) of patches.

    Without a class token it is the mean over the attention of all patches.
    """
    weight_BTT = attention_weights(encoder, images_BCHW)
    weight_BT = weight_BTT[:, 0] if encoder.prefix_tokens else weight_BTT.mean(1)
    return weight_BT[:, encoder.prefix_tokens :].unflatten(1, encoder.grid)


@torch.no_grad()
def attention_weights(encoder: ViT, images_BCHW: Tensor) -> Tensor:
    """The attention of each token (dim 1) to each (dim 2) in the last block, mean over heads, (B, T, T)."""
    attention: Any = encoder.blocks[-1].attn
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder.eval()(images_BCHW)
    hook.remove()
    q_BZTD, k_BZTD, _ = attention.qkv(seen[0]).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    score_BZTT = q_BZTD @ k_BZTD.transpose(-1, -2) / q_BZTD.shape[-1] ** 0.5
    if attention.rel_pos is not None:
        score_BZTT = score_BZTT + attention.rel_pos.get_bias()
    return score_BZTT.softmax(-1).mean(1)


@torch.no_grad()
def feature_colours(encoder: ViT, images_BCHW: Tensor) -> Tensor:
    """The three main components of the patch features of all images together, each scaled to 0 .. 1: (B, H, W, 3) of patches."""
    feature_BND = encoder.eval()(images_BCHW)[:, encoder.prefix_tokens :].float()
    centred = (feature_BND - feature_BND.mean((0, 1))).flatten(0, 1)
    component_D3 = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    component_D3 = component_D3 * component_D3.sum(0).sign()  # the sign of a component is arbitrary
    value_P3 = centred @ component_D3
    low, high = value_P3.quantile(torch.tensor([0.01, 0.99]), dim=0)
    return ((value_P3 - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(len(images_BCHW), *encoder.grid, -1)


@torch.no_grad()
def position_accuracy(method: Any, loader: Loader, seed: int) -> Tensor | None:
    """Percent of the patches of each cell whose position is predicted right, (H, W); None if the method does not name its predictions."""
    counts = torch.zeros(2, method.encoder.grid[0] * method.encoder.grid[1])
    for index, (images, targets) in enumerate(loader.epoch(0)):
        reseed(seed, index)
        named = method(images, targets).named
        if "predicted" not in named:
            return None
        asked = named.get("dropped", torch.ones_like(named["cells"], dtype=torch.bool))
        for row, chosen in enumerate((asked & (named["cells"] == named["predicted"]), asked)):
            counts[row] += torch.bincount(named["cells"][chosen], minlength=counts.shape[1])
    return (100 * counts[0] / counts[1]).view(method.encoder.grid)
