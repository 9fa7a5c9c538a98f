"""Non-maximum suppression and RoIAlign in plain torch, for a torchvision without its compiled operators (with a torch for CPUs only).

`import benchmarks.detection.operators` puts them in their places, and does nothing where the operators load. They are exact, but slow.

Shapes: N boxes, B images, C channels, H x W cells of a map, R regions, P x P bins of a region.
"""

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection import roi_heads

LOADED = hasattr(torch.ops.torchvision, "roi_align")  # common/__init__.py declares only nms and qnms where the library does not load


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The indices of boxes (N, 4) to keep, int64, by falling score: a box goes if its overlap (IoU) with a kept one is above the limit."""
    order, kept = scores.argsort(descending=True, stable=True), []
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        overlap = torchvision.ops.box_iou(boxes[first, None].float(), boxes[order].float())[0]
        order = order[~(overlap > iou_threshold)]
    return torch.stack(kept) if kept else order


@torch.autocast("cpu", enabled=False)  # the compiled operator computes in float32 too
def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign (He et al. 2017, arXiv 1703.06870, section 3), with the arguments of torchvision: maps (B, C, H, W) to regions (R, C, P, P).

    boxes: (R, 5), the first number is the index of the image, or a list of (R_b, 4) for each image. The weights of a sample,
    and so of a mean of samples, are products of one for the row and one for the column: two matrix products give the result.
    With sampling_ratio <= 0 a bin has a sample for each cell that it covers, rounded up.
    """
    if not isinstance(boxes, Tensor):
        boxes = torch.cat([torch.cat([own.new_full((len(own), 1), index), own], 1) for index, own in enumerate(boxes)])
    down, across = (output_size, output_size) if isinstance(output_size, int) else output_size
    left, top, right, bottom = (boxes[:, 1:].float() * spatial_scale - 0.5 * aligned).unbind(1)
    weight_RPH = _weights(top, bottom, down, input.shape[2], sampling_ratio, aligned)
    weight_RPW = _weights(left, right, across, input.shape[3], sampling_ratio, aligned)
    found = input.new_zeros(len(boxes), input.shape[1], down, across, dtype=torch.float32)
    for image in boxes[:, 0].unique().long():
        mine = (boxes[:, 0] == image).nonzero()[:, 0]
        rows = torch.einsum("rph,chw->rcpw", weight_RPH[mine], input[image].float())
        found = found.index_put((mine,), torch.einsum("rcpw,rqw->rcpq", rows, weight_RPW[mine]))
    return found.to(input.dtype)


def _weights(start_R: Tensor, end_R: Tensor, bins: int, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """The weight of each of `size` cells in each bin along one side, (R, P, size)."""
    length_R = end_R - start_R if aligned else (end_R - start_R).clamp(min=1)
    ratio_R = (length_R / bins).ceil().clamp(min=1) if sampling_ratio <= 0 else torch.full_like(length_R, sampling_ratio)
    sample_S = torch.arange(int(ratio_R.max()) if len(ratio_R) else 1, device=start_R.device)
    within_RS = (sample_S + 0.5) / ratio_R[:, None]
    bin_P = torch.arange(bins, device=start_R.device)
    place_RPS = start_R[:, None, None] + (length_R / bins)[:, None, None] * (bin_P[:, None] + within_RS[:, None])
    counted_RPS = (place_RPS >= -1) & (place_RPS <= size) & (within_RS < 1)[:, None]
    cell_n = torch.arange(size, device=start_R.device)
    # bilinear interpolation: the weight falls linearly from 1 at the cell to 0 at its neighbours
    weight_RPSn = (1 - (place_RPS.clamp(0, size - 1)[..., None] - cell_n).abs()).clamp(min=0) * counted_RPS[..., None]
    return weight_RPSn.sum(2) / ratio_R[:, None, None]


if not LOADED:
    torchvision.ops.boxes.nms = torchvision.ops.nms = nms
    torchvision.ops.poolers.roi_align = torchvision.ops.roi_align = roi_heads.roi_align = roi_align
