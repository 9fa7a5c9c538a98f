"""Attention in which every mask is a visibility window.

All that the five papers hide can be written with three whole numbers: query i sees key j exactly when

    visible_from[j] <= time[i] < visible_until[j]

so a mask costs three integer vectors instead of a tokens x tokens matrix.

Shapes: B images, H heads, Q queries, K keys, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    *,
    time: Tensor | None = None,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that each query may see.

    time (B, Q) and visible_from, visible_until (B, K) are integer tensors, given all three or not at all; without
    them every query sees every key. A query that sees no key gives zeros, and zero gradients.
    Backends: "sdpa" (torch's scaled_dot_product_attention), "auto" (the same today).
    Returns (B, H, Q, D). Raises ValueError for a backend, shape or dtype that does not fit.
    """
    if backend not in ("auto", "sdpa"):
        raise ValueError(f"attention backend {backend!r} is not known; choose 'auto' or 'sdpa'")
    _check_fit(q_BHQD, k_BHKD, v_BHKD)
    mask = _window_mask(q_BHQD, k_BHKD, time, visible_from, visible_until)
    if q_BHQD.device.type == "cpu" and q_BHQD.dtype == torch.bfloat16:
        # torch's bfloat16 backward is 5 to 30 times slower than its float32 one on CPUs; casting both ways costs far less.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q_BHQD.float(), k_BHKD.float(), v_BHKD.float(), attn_mask=mask)
        return out.to(q_BHQD.dtype)
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask)


def attend_reference(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    *,
    time: Tensor | None = None,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
) -> Tensor:
    """`attend` in float64 and in the plainest way: what every backend is tested against."""
    mask = _window_mask(q_BHQD, k_BHKD, time, visible_from, visible_until)
    score_BHQK = q_BHQD.double() @ k_BHKD.double().transpose(-1, -2) / math.sqrt(q_BHQD.shape[-1])
    if mask is not None:
        score_BHQK = score_BHQK.masked_fill(~mask, -math.inf)
    weight_BHQK = score_BHQK.softmax(dim=-1)
    if mask is not None:
        weight_BHQK = weight_BHQK.masked_fill(~mask, 0.0)  # also turns the NaN of a row that sees nothing into zero
    return weight_BHQK @ v_BHKD.double()


def _check_fit(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor) -> None:
    B, H, _, D = q_BHQD.shape
    fits = k_BHKD.shape == v_BHKD.shape == (B, H, k_BHKD.shape[2], D) and q_BHQD.dtype == k_BHKD.dtype == v_BHKD.dtype
    if not fits:
        found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in (("q", q_BHQD), ("k", k_BHKD), ("v", v_BHKD)))
        raise ValueError(f"attention takes q (B, H, Q, D) with k and v (B, H, K, D) of one dtype, got {found}")


def _window_mask(
    q_BHQD: Tensor, k_BHKD: Tensor, time: Tensor | None, visible_from: Tensor | None, visible_until: Tensor | None
) -> Tensor | None:
    """The window as a boolean (B, 1, Q, K) mask, True = visible; None where there is no window."""
    window = {"time": time, "visible_from": visible_from, "visible_until": visible_until}
    missing = [name for name, vector in window.items() if vector is None]
    if len(missing) == 3:
        return None
    if missing:
        raise ValueError(f"a visibility window takes time, visible_from and visible_until together; missing: {', '.join(missing)}")
    for name, vector in window.items():
        expected = (q_BHQD.shape[0], q_BHQD.shape[2] if name == "time" else k_BHKD.shape[2])
        if tuple(vector.shape) != expected or vector.is_floating_point() or vector.dtype == torch.bool:
            raise ValueError(f"{name} must be an integer tensor of shape {expected}, got {vector.dtype} {tuple(vector.shape)}")
        if vector.device != q_BHQD.device:
            raise ValueError(f"{name} is on {vector.device}, the queries are on {q_BHQD.device}")
    time_BQ1 = time[:, :, None]
    return ((visible_from[:, None, :] <= time_BQ1) & (time_BQ1 < visible_until[:, None, :]))[:, None]
