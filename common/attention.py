"""Attention with masks in the form of visibility windows.

Three integers per token describe all masks of the five papers: query i sees key j exactly if

    visible_from[j] <= time[i] < visible_until[j]

so a mask needs three integer vectors instead of a tokens x tokens matrix.

Shapes: B images, H heads, Q queries, K keys, D head width.
"""

import csv
import math
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from common.kernels import DTYPES, WIDTHS

BACKENDS = ("auto", "sdpa", "flex", "triton")
HAS_TRITON = find_spec("triton") is not None
CHOICES_FILE = Path(__file__).parent / "kernels" / "choices.csv"


class Window(NamedTuple):
    """The time of each of T tokens, and when it is visible: integers (B, T), or (1, T) if equal for all images. See `attend`."""

    time: Tensor
    visible_from: Tensor
    visible_until: Tensor


def attend(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    *,
    time: Tensor | None = None,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
    bias_HQK: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over the keys that are visible to each query.

    time (B, Q), visible_from and visible_until (B, K) are integer tensors, or have one row if equal for all images. Each is optional: by
    default, the time of a query is its index, and a key is visible from the beginning and until the end. So `visible_from` = 0, 1, 2, ...
    alone is causal attention, and no argument is full attention. A query that sees no key has output zero, and zero gradients.
    bias_HQK (H, Q, K) is added to the scores, and gets a gradient.

    Backends: "sdpa" (torch's scaled_dot_product_attention; a window becomes a mask; the only one with a bias), "flex" (torch's
    FlexAttention; compiled on CUDA, without gradients elsewhere; its block mask is cached for a window, as long as the tensors keep
    the same memory and content), "triton" (common/kernels, for CUDA), and "auto": the fastest in our measurements for the nearest
    shape on this device (common/kernels/choices.csv), otherwise "sdpa".
    Returns (B, H, Q, D). Raises ValueError for a backend, shape, dtype or device that does not fit, ImportError without Triton.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not known; choose one of {', '.join(map(repr, BACKENDS))}")
    _check_fit(q_BHQD, k_BHKD, v_BHKD, time, visible_from, visible_until, bias_HQK)
    windowed = visible_from is not None or visible_until is not None
    window = {"time": time, "visible_from": visible_from, "visible_until": visible_until} if windowed else {}
    if backend == "auto":
        backend = "sdpa" if bias_HQK is not None else _measured_choice(q_BHQD, k_BHKD, windowed)
    if backend == "sdpa":
        return _attend_sdpa(q_BHQD, k_BHKD, v_BHKD, bias_HQK, **window)
    if bias_HQK is not None:
        raise ValueError(f"the {backend} backend takes no bias; choose 'sdpa' or 'auto'")
    return (_attend_flex if backend == "flex" else _attend_triton)(q_BHQD, k_BHKD, v_BHKD, **window)


def attend_reference(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    *,
    time: Tensor | None = None,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
    bias_HQK: Tensor | None = None,
) -> Tensor:
    """A simple float64 implementation of `attend`, against which all backends are tested."""
    _check_fit(q_BHQD, k_BHKD, v_BHKD, time, visible_from, visible_until, bias_HQK)
    score_BHQK = q_BHQD.double() @ k_BHKD.double().transpose(-1, -2) / math.sqrt(q_BHQD.shape[-1])
    if bias_HQK is not None:
        score_BHQK = score_BHQK + bias_HQK.double()
    mask = window_mask(q_BHQD, time, visible_from, visible_until)
    if mask is not None:
        score_BHQK = score_BHQK.masked_fill(~mask, -math.inf)
    weight_BHQK = score_BHQK.softmax(dim=-1)
    if mask is not None:
        weight_BHQK = weight_BHQK.masked_fill(~mask, 0.0)  # also replaces the NaN of a query that sees no key by zero
    return weight_BHQK @ v_BHKD.double()


def _attend_sdpa(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, bias_HQK: Tensor | None, **window: Tensor | None) -> Tensor:
    mask = window_mask(q_BHQD, **window)
    if q_BHQD.device.type == "cpu" and q_BHQD.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # torch's bfloat16 backward is up to 15 times slower than its float32 one on CPUs; casting costs far less.
        if bias_HQK is None:
            return _Bfloat16OnCPU.apply(q_BHQD, k_BHKD, v_BHKD, mask)
        with torch.autocast("cpu", enabled=False):
            return _attend_sdpa(q_BHQD.float(), k_BHKD.float(), v_BHKD.float(), bias_HQK, **window).to(q_BHQD.dtype)
    if bias_HQK is not None:
        bias_HQK = bias_HQK.to(q_BHQD.dtype)[None]
        mask = bias_HQK if mask is None else bias_HQK.masked_fill(~mask, -math.inf)
    return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=mask)


class _Bfloat16OnCPU(torch.autograd.Function):
    """torch's attention with forward in bfloat16 (twice as fast as float32) and backward in float32."""

    @staticmethod
    def forward(ctx, q_BHQD, k_BHKD, v_BHKD, mask):
        bias = None if mask is None else torch.zeros(mask.shape, dtype=q_BHQD.dtype).masked_fill_(~mask, -math.inf)
        out_BHQD, sum_BHQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BHQD, k_BHKD, v_BHKD, attn_mask=bias)
        ctx.save_for_backward(q_BHQD, k_BHKD, v_BHKD, out_BHQD, sum_BHQ, bias)
        return out_BHQD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, outer_BHQD):
        *tensors, bias = ctx.saved_tensors
        bias = None if bias is None else bias.float()
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = backward(outer_BHQD.float(), *(tensor.float() for tensor in tensors), 0.0, False, attn_mask=bias)
        return *(gradient.to(outer_BHQD.dtype) for gradient in gradients), None


def _attend_flex(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, **window: Tensor | None) -> Tensor:
    if q_BHQD.device.type == "cuda":
        flex = _compiled(flex_attention)
    else:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHQD, k_BHKD, v_BHKD)):
            raise ValueError(f"the flex backend has no gradients on {q_BHQD.device}; choose 'sdpa', or attend under torch.no_grad()")
        q_BHQD, k_BHKD, v_BHKD = q_BHQD.detach(), k_BHKD.detach(), v_BHKD.detach()
        flex = flex_attention

    blocks = None
    if window:
        rows = window["time"], window["visible_from"], window["visible_until"]
        sizes = q_BHQD.shape[0], q_BHQD.shape[2], k_BHKD.shape[2]
        # While the whole model is traced, tensors have no memory to compare. Then the compiler merges equal masks of one step.
        if torch.compiler.is_compiling() or any(row is not None and row.is_inference() for row in rows):
            blocks = _block_mask(*rows, sizes, q_BHQD.device)
        else:
            blocks = _kept_block_mask(tuple(None if row is None else _Row(row) for row in rows), sizes, q_BHQD.device)
    return flex(q_BHQD, k_BHKD, v_BHKD, block_mask=blocks)


def _block_mask(
    time: Tensor | None, visible_from: Tensor | None, visible_until: Tensor | None, sizes: tuple[int, int, int], device: torch.device
) -> BlockMask:
    """The block mask of FlexAttention for a window, for `sizes` (B, Q, K)."""
    B, Q, K = sizes
    time, visible_from, visible_until = (None if x is None else x.expand(B, -1) for x in (time, visible_from, visible_until))

    def visible(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        now = query if time is None else time[image, query]
        return _within(now, *(None if x is None else x[image, key] for x in (visible_from, visible_until)))

    make_mask = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make_mask(visible, B, None, Q, K, device=device)


class _Row:
    """A vector of a window as a cache key: equal to any view of the same memory with the same content. It keeps the memory alive, so that
    no other vector can use it while the key exists."""

    def __init__(self, row: Tensor):
        self.row, self.key = row, (row.data_ptr(), row.device, row.dtype, row.shape, row.stride(), row._version)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Row) and self.key == other.key


@lru_cache(maxsize=8)  # a model has one or two windows at a time
def _kept_block_mask(rows: tuple[_Row | None, ...], sizes: tuple[int, int, int], device: torch.device) -> BlockMask:
    """`_block_mask`, cached for all blocks and steps with the same window."""
    time, visible_from, visible_until = (None if key is None else key.row for key in rows)
    return _block_mask(time, visible_from, visible_until, sizes, device)


@cache
def _compiled(function: Callable) -> Callable:
    """Compile a function once, and only when needed: torch.compile takes seconds to load."""
    return torch.compile(function)


def _attend_triton(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, **window: Tensor | None) -> Tensor:
    if not HAS_TRITON:
        raise ImportError("the triton backend needs Triton; install the extra: pip install -e '.[gpu]'")
    from common.kernels.window_attention import window_attention  # imports triton, which may not be installed

    rows: dict = {name: None if x is None else x.expand(len(q_BHQD), -1) for name, x in window.items()}
    return window_attention(q_BHQD, k_BHKD, v_BHKD, **rows)


def _read_choices(file: Path) -> dict[tuple[str, bool], dict[tuple[int, ...], str]]:
    """The fastest measured backend, by (device, windowed), then by (queries, keys, width)."""
    choices: dict[tuple[str, bool], dict[tuple[int, ...], str]] = {}
    for row in csv.DictReader(file.read_text().splitlines()):
        shapes = choices.setdefault((row["device"], row["windowed"] == "True"), {})
        shapes[tuple(int(row[name]) for name in ("queries", "keys", "width"))] = row["backend"]
    return choices


CHOICES = _read_choices(CHOICES_FILE)


@torch.compiler.assume_constant_result
def device_kind(device: torch.device) -> str:
    """The name of the device in choices.csv: the model of a GPU, else the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _measured_choice(q_BHQD: Tensor, k_BHKD: Tensor, windowed: bool) -> str:
    """The backend of the nearest measured shape; "sdpa" without measurements for this device, or if our kernel lacks q's width or dtype."""
    measured = CHOICES.get((device_kind(q_BHQD.device), windowed))
    if not measured or q_BHQD.shape[3] not in WIDTHS or q_BHQD.dtype not in DTYPES:
        return "sdpa"
    here, nearest, backend = (q_BHQD.shape[2], k_BHKD.shape[2], q_BHQD.shape[3]), math.inf, "sdpa"
    for shape, choice in measured.items():  # a loop, because torch.compile does not support min(key=...) for dynamic shapes
        distance = sum(abs(math.log2(a / b)) for a, b in zip(here, shape, strict=True))
        if distance < nearest:
            nearest, backend = distance, choice
    return backend


def _within(now: Tensor, begin: Tensor | None, end: Tensor | None) -> Tensor:
    """begin <= now < end; one of begin and end may be None."""
    if begin is None:
        assert end is not None
        return now < end
    return begin <= now if end is None else (begin <= now) & (now < end)


def window_mask(
    q_BHQD: Tensor, time: Tensor | None = None, visible_from: Tensor | None = None, visible_until: Tensor | None = None
) -> Tensor | None:
    """The window as a boolean mask that broadcasts to (B, H, Q, K), True = visible; None if every key is visible."""
    if visible_from is None and visible_until is None:
        return None
    now = torch.arange(q_BHQD.shape[2], device=q_BHQD.device)[:, None] if time is None else time[:, None, :, None]
    return _within(now, *(None if x is None else x[:, None, None, :] for x in (visible_from, visible_until)))


def _check_fit(q: Tensor, k: Tensor, v: Tensor, time: Tensor | None, begin: Tensor | None, end: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError, with given and expected values, unless all arguments of `attend` fit together."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3])
    if not (fits and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention takes q (B, H, Q, D) with k and v (B, H, K, D) of one dtype on one device, got {found}")
    (B, H, Q, _), K = q.shape, k.shape[2]
    integers = (torch.int16, torch.int32, torch.int64)
    for name, tensor, shape, dtypes in (
        ("time", time, (B, Q), integers),
        ("visible_from", begin, (B, K), integers),
        ("visible_until", end, (B, K), integers),
        ("bias_HQK", bias, (H, Q, K), (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    ):
        if tensor is None:
            continue
        fits = tuple(tensor.shape) == shape or (name != "bias_HQK" and tuple(tensor.shape) == (1, *shape[1:]))
        if not fits or tensor.dtype not in dtypes or tensor.device != q.device:
            wanted = f"a tensor of shape {shape} on {q.device}, {', '.join(str(dtype)[6:] for dtype in dtypes)}"
            raise ValueError(f"{name} must be {wanted}; got {tuple(tensor.shape)} on {tensor.device}, {tensor.dtype}")
