"""VQ-KD, the tokenizer of BEiT v2 (Peng et al. 2022, arXiv 2208.06366), for inference: images to the ids of learned codes.

A ViT, trained together with a decoder that predicts CLIP's features. Its tokens are projected to a small width and normalised to length 1;
the id of a cell is its nearest code. Only the modules that compute ids are here; the decoder and other training tensors are skipped.

Shapes: B images, C channels, N cells in row-major order, D width, K codes, E width of a code.
"""

from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.convert import ConversionError, load_method, read_checkpoint
from common.positions import Grid
from common.vit import ViT
from mapet.tokenizers.kmeans import nearest_codes

# Maps name prefixes of the released file to those here; then the tensors that only training needs.
RELEASED_NAMES = {"encoder.fc_norm.": "norm.", "quantize.embedding.weight": "codebook"}
TRAINING: tuple[str, ...] = ("decoder.", "decode_task_layer.", "loss", "teacher", "scaling", "quantize.cluster_size")
TRAINING += ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted")
HEAD_WIDTH = 64  # of all ViTs of BEiT v2; the tensors do not determine it


class VQKD(nn.Module):
    """The tokenizer with random weights; `load_vqkd` loads the released one. Takes images (B, C, H, W) of pixels from -1 to 1.

    Image and patch size are in pixels; the defaults are those of the released file. It is never trained, and its output is deterministic.
    Raises ValueError for sizes that do not fit together, as ViT does.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        codes: int = 8192,
        code_width: int = 32,
    ):
        super().__init__()
        sizes: dict = {"image_size": image_size, "patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
        self.encoder = ViT(**sizes, class_token=True, position="learned")
        self.encoder.norm = nn.Identity()  # the norm is applied outside, to the patch tokens, as in the file
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_width))
        self.codebook = nn.Buffer(F.normalize(torch.randn(codes, code_width), dim=1))
        self.requires_grad_(False)
        self.size, self.mean, self.std = self.encoder.image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        self.grid: Grid = self.encoder.grid
        self.vocabulary = codes

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to ids (B, N) int64 and the Euclidean distances (B, N) float32 from normalised tokens to their codes as stored."""
        token_BND = self.norm(self.encoder(images_BCHW)[:, 1:])
        with torch.autocast(images_BCHW.device.type, enabled=False):
            token_BNE = F.normalize(self.encode_task_layer(token_BND.float()), dim=-1)
        id_M, distance_M = nearest_codes(token_BNE.flatten(0, 1), self.codebook)
        return id_M.view(token_BNE.shape[:2]), distance_M.view(token_BNE.shape[:2])


def load_vqkd(path: Path | str) -> VQKD:
    """Load the tokenizer from a file of BEiT v2's release, such as vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth, with its sizes.

    Raises ConversionError for a file that cannot be read, and if a tensor that gives ids is missing, has another shape, or is unknown.
    """
    state = {name: tensor for name, tensor in read_checkpoint(path).items() if not name.startswith(TRAINING)}
    wanted = {"encoder.pos_embed": 3, "encoder.patch_embed.proj.weight": 4, "encoder.blocks.0.attn.qkv.weight": 2}
    wanted |= {"encoder.fc_norm.weight": 1, "encoder.fc_norm.bias": 1, "quantize.embedding.weight": 2}
    absent = [name for name, dimensions in wanted.items() if name not in state or state[name].ndim != dimensions]
    if absent:
        raise ConversionError(f"{path} is not a VQ-KD tokenizer: no {', '.join(absent)}, or of another shape; use BEiT v2's file")
    _, tokens, width = state["encoder.pos_embed"].shape
    side, patch_size = isqrt(tokens - 1), state["encoder.patch_embed.proj.weight"].shape[-1]
    if side * side != tokens - 1:
        raise ConversionError(f"{path}: encoder.pos_embed has {tokens} tokens, which is not a class token and a square grid")
    codes, code_width = state["quantize.embedding.weight"].shape
    tokenizer = VQKD(
        image_size=side * patch_size,
        patch_size=patch_size,
        width=width,
        depth=sum(name.endswith(".attn.qkv.weight") for name in state),
        heads=max(1, width // HEAD_WIDTH),
        codes=codes,
        code_width=code_width,
    )
    load_method(tokenizer, _join_biases(state, path), RELEASED_NAMES)
    return tokenizer.eval()


def _join_biases(state: dict[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """Return the state with one joint bias of queries, keys and values per block. The file has no key bias; softmax would cancel it.

    Raises ConversionError if a block has only one of q_bias and v_bias, or also a joint bias.
    """
    joined = dict(state)
    for name in state:
        if name.endswith(".attn.qkv.weight"):
            block = name.removesuffix("qkv.weight")
            absent = [block + half for half in ("q_bias", "v_bias") if block + half not in state]
            if absent or block + "qkv.bias" in state:
                what = f"misses {', '.join(absent)}" if absent else f"has {block}qkv.bias beside q_bias and v_bias"
                raise ConversionError(f"{path} {what}, which is not the layout of BEiT v2's release")
            q, v = joined.pop(block + "q_bias"), joined.pop(block + "v_bias")
            joined[block + "qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return joined
