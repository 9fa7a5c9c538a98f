"""A wrapper that gives any module (of timm or of a user) the encoder interface that the evaluations use.

Shapes: B images, C channels, H x W pixels, T tokens (class and register tokens, if any, first), D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.data import Data
from common.vit import ViT


class TokenEncoder(nn.Module):
    """An encoder of tokens from a module that returns features (B, D), tokens (B, T, D) or a feature map (B, H, W, D) or (B, D, H, W).

    If the module has `forward_features`, as all timm models do, this is called, so the classifier is not used. If it has
    `num_prefix_tokens`, this is the number of its tokens that are not patches. Images are normalised by mean and std of the data set.
    Raises ValueError if the module does not accept such images or returns something else.
    """

    def __init__(self, module: nn.Module, channels: int, image_size: tuple[int, int]):
        super().__init__()
        self.module: Any = module
        self.channels, self.image_size = channels, image_size
        self.blocks: Any = getattr(module, "blocks", ())
        parameter = next(module.parameters(), torch.empty(0))
        blank = torch.zeros(1, channels, *image_size, device=parameter.device, dtype=parameter.dtype)
        training = module.training
        try:
            with torch.no_grad():
                found = self.eval()(blank)
        except (RuntimeError, AssertionError) as error:  # raised by torch and timm for a wrong shape
            shape = f"{channels} channels and {image_size[0]} x {image_size[1]} pixels"
            raise ValueError(
                f"{type(module).__name__} does not take images of {shape}; set image_size=, or change the encoder: {error}"
            ) from error
        self.train(training)
        self.width = found.shape[2]
        self.prefix_tokens = getattr(module, "num_prefix_tokens", 0) if found.shape[1] > 1 else 0
        self.patch_tokens = found.shape[1] - self.prefix_tokens

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, T, D); features (B, D) become one token."""
        found = getattr(self.module, "forward_features", self.module)(images)
        if not isinstance(found, Tensor) or found.ndim not in (2, 3, 4):
            given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"{type(self.module).__name__} returns {given}; an encoder must return features (B, D), tokens (B, T, D) or a feature map"
            )
        if found.ndim == 2:
            return found[:, None]
        if found.ndim == 4:
            last = found.shape[3] == getattr(self.module, "num_features", found.shape[1])
            return found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)
        return found

    def last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """Return the tokens (B, T, D) after each of the last `count` blocks and the final norm, by timm's `forward_intermediates`."""
        found = self.module.forward_intermediates(
            images, indices=count, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([prefix, patches], 1) if prefix is not None else patches for patches, prefix in found]


def as_encoder(module: nn.Module, channels: int, image_size: tuple[int, int]) -> ViT | TokenEncoder:
    """Return our ViT unchanged, and any other module in a TokenEncoder. Raises ValueError as TokenEncoder does."""
    return module if isinstance(module, ViT | TokenEncoder) else TokenEncoder(module, channels, image_size)


def patch_size(encoder: ViT | TokenEncoder) -> tuple[int, int]:
    """(height, width) in pixels of the patches of an encoder: of a ViT, or as timm's models have it in `patch_embed.patch_size`.

    Raises ValueError if the encoder does not have it, or does not return one token for each patch, as Swin.
    """
    if isinstance(encoder, ViT):
        return (encoder.patch_size, encoder.patch_size)
    name, need = type(encoder.module).__name__, "a shuffle test needs an encoder with one token for each patch, such as a ViT"
    size = getattr(getattr(encoder.module, "patch_embed", None), "patch_size", None)
    if size is None:
        raise ValueError(f"{name} has no `patch_embed.patch_size`: {need}")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    tall, wide = encoder.image_size
    if tall % height or wide % width or encoder.patch_tokens != tall // height * (wide // width):
        what = f"{encoder.patch_tokens} tokens for images of {tall} x {wide} pixels, and its first patches have {height} x {width}"
        raise ValueError(f"{name} returns {what}: {need}")
    return (height, width)


def input_size(module: nn.Module | None, data: Data) -> tuple[int, int]:
    """(height, width) of an encoder's input images: from the module, from timm, or from the data set. Raises ValueError if unknown."""
    settings = getattr(module, "pretrained_cfg", None) or {}
    for size in (
        getattr(module, "image_size", None),
        getattr(getattr(module, "patch_embed", None), "img_size", None),
        settings.get("input_size", ())[1:],
        data.image_size,
    ):
        if size:
            return (size, size) if isinstance(size, int) else tuple(size)
    raise ValueError(f"the encoder has no image size, and the images of {data.name} differ in size: set image_size=")
