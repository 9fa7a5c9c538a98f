"""Any module as an encoder of tokens, so that the evaluations ask no more of timm's or a user's models than of ours.

Shapes: B images, C channels, H x W pixels, T tokens (class and register tokens, if any, first), D width.
"""

import torch
from torch import Tensor, nn

from common.data import Data
from common.vit import ViT


class TokenEncoder(nn.Module):
    """A module that gives features (B, D), tokens (B, T, D) or a feature map (B, H, W, D) or (B, D, H, W), as an encoder of tokens.

    Of a module with `forward_features`, as all of timm's have, this is what is called, and not its classifier. `num_prefix_tokens`, where
    the module has it, says how many of its tokens are no patches. Images are normalised by the mean and std of the data set.
    Raises ValueError where the module does not take such images or gives something else.
    """

    def __init__(self, module: nn.Module, channels: int, image_size: tuple[int, int]):
        super().__init__()
        self.module, self.channels, self.image_size = module, channels, image_size
        self.blocks = getattr(module, "blocks", ())
        parameter = next(module.parameters(), torch.empty(0))
        blank = torch.zeros(1, channels, *image_size, device=parameter.device, dtype=parameter.dtype)
        training = module.training
        try:
            with torch.no_grad():
                found = self.eval()(blank)
        except (RuntimeError, AssertionError) as error:  # how torch and timm refuse a shape
            shape = f"{channels} channels and {image_size[0]} x {image_size[1]} pixels"
            raise ValueError(
                f"{type(module).__name__} does not take images of {shape}; set image_size=, or change the encoder: {error}"
            ) from error
        self.train(training)
        self.width = found.shape[2]
        self.prefix_tokens = getattr(module, "num_prefix_tokens", 0) if found.shape[1] > 1 else 0

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, T, D); features (B, D) are one token."""
        found = getattr(self.module, "forward_features", self.module)(images)
        if not isinstance(found, Tensor) or found.ndim not in (2, 3, 4):
            given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"{type(self.module).__name__} gives {given}; an encoder gives features (B, D), tokens (B, T, D) or a feature map"
            )
        if found.ndim == 2:
            return found[:, None]
        if found.ndim == 4:
            last = found.shape[3] == getattr(self.module, "num_features", found.shape[1])
            return found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)
        return found

    def last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """The tokens (B, T, D) after each of the last `count` blocks, with the final norm: timm's `forward_intermediates`."""
        found = self.module.forward_intermediates(
            images, indices=count, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([prefix, patches], 1) if prefix is not None else patches for patches, prefix in found]


def as_encoder(module: nn.Module, channels: int, image_size: tuple[int, int]) -> ViT | TokenEncoder:
    """Our ViT as it is, any other module in a TokenEncoder. Raises ValueError as TokenEncoder does."""
    return module if isinstance(module, ViT | TokenEncoder) else TokenEncoder(module, channels, image_size)


def input_size(module: nn.Module | None, data: Data) -> tuple[int, int]:
    """(height, width) of the images that an encoder takes: its own, timm's, or that of the data set. Raises ValueError for none."""
    settings = getattr(module, "pretrained_cfg", None) or {}
    for size in (
        getattr(module, "image_size", None),
        getattr(getattr(module, "patch_embed", None), "img_size", None),
        settings.get("input_size", ())[1:],
        data.image_size,
    ):
        if size:
            return (size, size) if isinstance(size, int) else tuple(size)
    raise ValueError(f"the encoder does not say which image size it takes, and images of {data.name} differ in size: give image_size=")
