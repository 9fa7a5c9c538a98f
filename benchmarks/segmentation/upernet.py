"""UPerNet on a plain ViT, as MAE and BEiT are evaluated on ADE20K. Neck and heads are those of mmsegmentation.

Shapes: B images, H x W pixels, h x w patches, D width, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.segmentation.data import IGNORED
from common.evaluate.finetune import Classifier
from common.method import Output
from common.recipe import RecipeError
from common.vit import ViT

AUXILIARY = 0.4  # weight of the loss of the auxiliary head


class UPerNet(nn.Module):
    """An encoder, a neck that makes a pyramid of the tokens of four blocks, UPerNet's head, and in training an auxiliary FCN head.

    As in mmsegmentation's configurations of MAE: the levels are 4, 2, 1 and 1/2 times the grid of patches, after a third, a half, two
    thirds and all of the blocks; both losses are means over all pixels. Raises RecipeError if mmsegmentation is not installed, and for
    fewer than 6 blocks.
    """

    def __init__(self, encoder: ViT, classes: int):
        super().__init__()
        try:
            from mmseg.models.decode_heads import FCNHead, UPerHead
            from mmseg.models.necks import Feature2Pyramid
        except ImportError as error:
            raise RecipeError(f"ENGINE=mmseg needs mmsegmentation ({error}): pip install -e '.[seg]'") from error
        width, depth = encoder.width, len(encoder.blocks)
        if depth < 6:
            raise RecipeError(f"ENGINE=mmseg needs an encoder of at least 6 blocks, and this one has {depth}: use ENGINE=linear")
        self.encoder, self.blocks = encoder, (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1)
        encoder.norm = nn.Identity()
        shared: dict = {"dropout_ratio": 0.1, "num_classes": classes, "align_corners": False, "norm_cfg": {"type": "BN"}}
        self.neck = Feature2Pyramid(width, rescales=[4, 2, 1, 0.5], norm_cfg={"type": "BN"})
        self.head = UPerHead(in_channels=[width] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), channels=width, **shared)
        self.auxiliary = FCNHead(in_channels=width, in_index=2, channels=256, num_convs=1, concat_input=False, **shared)

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Output:
        """images (B, C, H, W) of the encoder's size and, in training, classes (B, H, W) uint8. `named["logits"]` is (B, K, 4 h, 4 w)."""
        tokens = self.encoder.levels(images, self.blocks)
        levels = self.neck([token_BTD[:, self.encoder.prefix_tokens :].mT.unflatten(2, self.encoder.grid) for token_BTD in tokens])
        logits = self.head(levels).float()
        if classes is None:
            return Output(logits.new_zeros(()), named={"logits": logits})
        main, auxiliary = (pixel_loss(found.float(), classes) for found in (logits, self.auxiliary(levels)))
        return Output(main + AUXILIARY * auxiliary, named={"logits": logits})

    no_weight_decay = Classifier.no_weight_decay
    group_matcher = Classifier.group_matcher


def pixel_loss(logits_BKhw: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of logits that are interpolated to the size of the mask; a pixel without a class counts, with loss 0."""
    logits_BKHW = F.interpolate(logits_BKhw, size=classes.shape[1:], mode="bilinear")
    return F.cross_entropy(logits_BKHW, classes.long(), ignore_index=IGNORED, reduction="sum") / classes.numel()
