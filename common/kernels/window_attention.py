"""Attention with visibility windows in Triton, forward and backward: the implementation of `attend(backend="triton")`.

Query i sees key j exactly if visible_from[j] <= time[i] < visible_until[j]. The kernels read the three vectors tile by tile and never
build a mask. For a tile of keys that no query of a tile can see, only the windows are read, not the keys and values.

The method is FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691): only one tile of scores exists at a time, a running maximum
and sum give an exact float32 softmax, and the backward recomputes the scores. No atomics, so gradients are bit-identical in each run.
q, k and v may have any strides; results are laid out as (B, tokens, H, D), the layout that the caller needs next.
Float32 is multiplied exactly, or as TF32 if torch.set_float32_matmul_precision allows it. H, Q, K and D are compile-time constants: the
first call with a new shape takes some seconds, but loops of one step and bounds checks are removed.

Shapes: B images, H heads, Q queries, K keys, D head width. In the kernels a tile has BLOCK_Q queries, BLOCK_K keys and
BLOCK_D >= D columns, and the suffix of a name gives its axes: p_QK; d before a name is the gradient of the loss for it.
Scores are in units of log2(e), because the hardware computes powers of two; so is `lse_BHQ`, the log of the softmax's sum.
"""
# mypy: allow-incomplete-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels import DTYPES, WIDTHS

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(pointer, strides, image, head, rows, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head's (length, D) matrix; zeros past its end. 64-bit offsets, for tensors of more than 2^31 elements."""
    columns = tl.arange(0, BLOCK_D)
    pointer += image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    return tl.load(pointer + rows[:, None].to(tl.int64) * strides[2] + columns[None, :] * strides[3], mask=inside, other=0.0)


@triton.jit
def _store(pointer, x, image, head, rows, length, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows of one head into a result laid out as (B, length, H, D)."""
    columns = tl.arange(0, BLOCK_D)
    pointer += (image.to(tl.int64) * length * H + head) * D
    inside = (rows < length)[:, None] & (columns < D)[None, :]
    tl.store(pointer + rows[:, None].to(tl.int64) * H * D + columns[None, :], x.to(pointer.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_load, triton.JITFunction)
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums. Triton's interpreter silently multiplies bfloat16 wrongly, so there the inputs are float32."""
    if _UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _times(time, image, stride, queries, Q):
    """The time of each query. Past the end the last query is repeated, which does not change a tile's earliest and latest time."""
    queries = tl.minimum(queries, Q - 1)
    if time is not None:
        queries = tl.load(time + image.to(tl.int64) * stride + queries)
    return queries


@triton.jit
def _visible(times, visible_from, visible_until, image, strides, keys, K):
    """Whether each key is visible at each time; times and keys are a row and a column, in either order."""
    last = tl.minimum(keys, K - 1)
    seen = keys < K
    if visible_from is not None:
        seen = seen & (tl.load(visible_from + image.to(tl.int64) * strides[1] + last) <= times)
    if visible_until is not None:
        seen = seen & (times < tl.load(visible_until + image.to(tl.int64) * strides[2] + last))
    return seen


@triton.jit
def _any_visible(times, visible_from, visible_until, image, strides, keys, K):
    """False only if no query of a tile sees a key of a tile, decided by the tile's earliest and latest time alone."""
    last = tl.minimum(keys, K - 1)
    seen = last >= 0
    if visible_from is not None:
        seen = seen & (tl.load(visible_from + image.to(tl.int64) * strides[1] + last) <= tl.max(times))
    if visible_until is not None:
        seen = seen & (tl.min(times) < tl.load(visible_until + image.to(tl.int64) * strides[2] + last))
    return tl.max(seen.to(tl.int32)) > 0


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, time, visible_from, visible_until,
    q_strides, k_strides, v_strides, window_strides, scale,
    H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one head, over all keys. Writes `out` and `lse`."""
    tiles = tl.cdiv(Q, BLOCK_Q)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    image, head = row // H, row % H
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    times = _times(time, image, window_strides[0], queries, Q)
    q_QD = _load(q, q_strides, image, head, queries, Q, D, BLOCK_D)

    top_Q = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    sum_Q = tl.zeros([BLOCK_Q], tl.float32)
    out_QD = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        needed = True
        if visible_from is not None or visible_until is not None:
            needed = _any_visible(times, visible_from, visible_until, image, window_strides, keys, K)
        if needed:
            k_KD = _load(k, k_strides, image, head, keys, K, D, BLOCK_D)
            v_KD = _load(v, v_strides, image, head, keys, K, D, BLOCK_D)
            seen_QK = _visible(times[:, None], visible_from, visible_until, image, window_strides, keys[None, :], K)
            s_QK = tl.where(seen_QK, _dot(q_QD, tl.trans(k_KD), PRECISION) * (scale * LOG2_E), float("-inf"))
            new_top_Q = tl.maximum(top_Q, tl.max(s_QK, 1))
            finite_top_Q = tl.where(new_top_Q == float("-inf"), 0.0, new_top_Q)  # nothing seen so far: all weights are exp2(-inf) = 0
            p_QK = tl.exp2(s_QK - finite_top_Q[:, None])
            shrink_Q = tl.exp2(top_Q - finite_top_Q)
            sum_Q = sum_Q * shrink_Q + tl.sum(p_QK, 1)
            out_QD = out_QD * shrink_Q[:, None] + _dot(p_QK.to(v_KD.dtype), v_KD, PRECISION)
            top_Q = new_top_Q

    # A query that sees no key has output zero; its lse = +inf makes all weights exp2(s - lse) of the backward zero.
    blind_Q = sum_Q == 0
    sum_Q = tl.where(blind_Q, 1.0, sum_Q)
    _store(out, out_QD / sum_Q[:, None], image, head, queries, Q, H, D, BLOCK_D)
    lse_Q = tl.where(blind_Q, float("inf"), top_Q + tl.log2(sum_Q))
    tl.store(lse + row.to(tl.int64) * Q + queries, lse_Q, mask=queries < Q)


@triton.jit
def _backward_tile(a, b, da, db, seen, lse, delta, scale, PRECISION: tl.constexpr):
    """Softmax weights p and the gradients of the scores for one tile: queries x keys, or keys x queries if a has the keys."""
    s = tl.where(seen, _dot(a, tl.trans(b), PRECISION) * (scale * LOG2_E), float("-inf"))
    p = tl.exp2(s - lse)
    return p, p * (_dot(da, tl.trans(db), PRECISION) - delta)


@triton.jit
def _backward_queries_kernel(
    q, k, v, out, lse, dout, dq, delta, time, visible_from, visible_until,
    q_strides, k_strides, v_strides, out_strides, dout_strides, window_strides, scale,
    H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one head, over all keys. Writes `dq`, and `delta`, the sum of out * dout of each query."""
    tiles = tl.cdiv(Q, BLOCK_Q)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    image, head = row // H, row % H
    queries = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    times = _times(time, image, window_strides[0], queries, Q)
    q_QD = _load(q, q_strides, image, head, queries, Q, D, BLOCK_D)
    dout_QD = _load(dout, dout_strides, image, head, queries, Q, D, BLOCK_D)
    out_QD = _load(out, out_strides, image, head, queries, Q, D, BLOCK_D)
    delta_Q = tl.sum(out_QD.to(tl.float32) * dout_QD.to(tl.float32), 1)
    tl.store(delta + row.to(tl.int64) * Q + queries, delta_Q, mask=queries < Q)
    lse_Q = tl.load(lse + row.to(tl.int64) * Q + queries, mask=queries < Q, other=float("inf"))

    dq_QD = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        needed = True
        if visible_from is not None or visible_until is not None:
            needed = _any_visible(times, visible_from, visible_until, image, window_strides, keys, K)
        if needed:
            k_KD = _load(k, k_strides, image, head, keys, K, D, BLOCK_D)
            v_KD = _load(v, v_strides, image, head, keys, K, D, BLOCK_D)
            seen_QK = _visible(times[:, None], visible_from, visible_until, image, window_strides, keys[None, :], K)
            _, ds_QK = _backward_tile(q_QD, k_KD, dout_QD, v_KD, seen_QK, lse_Q[:, None], delta_Q[:, None], scale, PRECISION)
            dq_QD += _dot(ds_QK.to(k_KD.dtype), k_KD, PRECISION)
    _store(dq, dq_QD * scale, image, head, queries, Q, H, D, BLOCK_D)


@triton.jit
def _backward_keys_kernel(
    q, k, v, out, lse, dout, dq, dk, dv, delta, time, visible_from, visible_until,
    q_strides, k_strides, v_strides, out_strides, dout_strides, window_strides, scale,
    H: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One program: one key tile of one head, over all queries. Writes `dk` and `dv`, and with ONE_TILE (the tile has all keys) also `dq`.

    Uses transposed scores, keys x queries: in this order two of the next products read them from registers.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    image, head = row // H, row % H
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_KD = _load(k, k_strides, image, head, keys, K, D, BLOCK_D)
    v_KD = _load(v, v_strides, image, head, keys, K, D, BLOCK_D)

    dk_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_KD = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, Q, BLOCK_Q):
        queries = start + tl.arange(0, BLOCK_Q)
        times = _times(time, image, window_strides[0], queries, Q)
        if ONE_TILE:
            dq_QD = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        needed = True
        if visible_from is not None or visible_until is not None:
            needed = _any_visible(times, visible_from, visible_until, image, window_strides, keys, K)
        if needed:
            q_QD = _load(q, q_strides, image, head, queries, Q, D, BLOCK_D)
            dout_QD = _load(dout, dout_strides, image, head, queries, Q, D, BLOCK_D)
            lse_Q = tl.load(lse + row.to(tl.int64) * Q + queries, mask=queries < Q, other=float("inf"))
            if ONE_TILE:
                out_QD = _load(out, out_strides, image, head, queries, Q, D, BLOCK_D)
                delta_Q = tl.sum(out_QD.to(tl.float32) * dout_QD.to(tl.float32), 1)
            else:
                delta_Q = tl.load(delta + row.to(tl.int64) * Q + queries, mask=queries < Q, other=0.0)
            seen_KQ = _visible(times[None, :], visible_from, visible_until, image, window_strides, keys[:, None], K)
            p_KQ, ds_KQ = _backward_tile(k_KD, q_QD, v_KD, dout_QD, seen_KQ, lse_Q[None, :], delta_Q[None, :], scale, PRECISION)
            dv_KD += _dot(p_KQ.to(dout_QD.dtype), dout_QD, PRECISION)
            dk_KD += _dot(ds_KQ.to(q_QD.dtype), q_QD, PRECISION)
            if ONE_TILE:
                dq_QD = _dot(tl.trans(ds_KQ.to(k_KD.dtype)), k_KD, PRECISION)
        if ONE_TILE:
            _store(dq, dq_QD * scale, image, head, queries, Q, H, D, BLOCK_D)
    _store(dk, dk_KD * scale, image, head, keys, K, H, D, BLOCK_D)
    _store(dv, dv_KD, image, head, keys, K, H, D, BLOCK_D)


def window_attention(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    *,
    time: Tensor | None = None,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """`attend` with these kernels, differentiable in q, k and v; the arguments must fit together, which `attend` checks.

    `tile` (queries, keys; powers of two from 16) replaces `_tiles` in tests. Returns (B, H, Q, D), laid out as (B, Q, H, D).
    Raises ValueError for a width or dtype outside WIDTHS and DTYPES, and for tensors not on a GPU, except with Triton's interpreter.
    """
    if q_BHQD.shape[-1] not in WIDTHS:
        raise ValueError(f"the triton backend takes heads of width {', '.join(map(str, WIDTHS))}, got q of shape {tuple(q_BHQD.shape)}")
    if q_BHQD.dtype not in DTYPES:
        raise ValueError(f"the triton backend takes {', '.join(map(str, DTYPES))}, got q of {q_BHQD.dtype}")
    if q_BHQD.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the triton backend takes CUDA tensors, or TRITON_INTERPRET=1 set before Python starts; q is on {q_BHQD.device}")
    return _forward(q_BHQD, k_BHKD, v_BHKD, time, visible_from, visible_until, *(tile or (0, 0)))[0]


def _tiles(D: int, Q: int, K: int, dtype: torch.dtype, backward: bool) -> tuple[int, int, dict[str, int]]:
    """Queries and keys per tile, and the launch options. Derived from the H100's registers and shared memory, not yet measured.

    64 x 64 is the smallest tile that fills the tensor cores' 64-row instruction. The forward uses 128 queries if this needs no
    more padding than 64 (197 and 344 do, 147 does not): keys are then read half as often. The backward uses up to 128 keys
    if one tile then has all keys, because it then reads and writes everything once. Float32 tiles are smaller: exact products
    run outside the tensor cores. Larger tiles, wide heads and float32 use twice the warps, to keep their sums in registers:
    compiled for sm_90, no 64-wide bfloat16 kernel spills registers, and none needs more than 144 of the 227 KB of shared memory.
    """
    largest = 64 if dtype.itemsize < 4 else 32
    queries = keys = largest
    if backward and largest < K <= 2 * largest:
        keys = 2 * largest
    if not backward and -(-Q // (2 * largest)) * 2 == -(-Q // largest):
        queries = 2 * largest
    warps = 8 if D > 64 or dtype.itemsize == 4 or max(queries, keys) > 64 else 4
    return min(queries, _tile_of(Q)), min(keys, _tile_of(K)), {"num_warps": warps, "num_stages": 2}


def _tile_of(length: int) -> int:
    return max(16, triton.next_power_of_2(length))


def _empty(x_BHND: Tensor) -> Tensor:
    """An empty tensor with the shape of x and the memory layout (B, N, H, D)."""
    B, H, N, D = x_BHND.shape
    return x_BHND.new_empty(B, N, H, D).transpose(1, 2)


def _arguments(q: Tensor, k: Tensor, v: Tensor, vectors: tuple, tile: tuple[int, int], backward: bool) -> dict:
    """The arguments of all kernels, by name."""
    (_, H, Q, D), K = q.shape, k.shape[2]
    block_q, block_k, launch = _tiles(D, Q, K, q.dtype, backward)
    vectors = tuple(x if x is None or x.stride(1) == 1 else x.contiguous() for x in vectors)
    return {
        **{"q": q, "k": k, "v": v, "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride()},
        **dict(zip(("time", "visible_from", "visible_until"), vectors, strict=True)),
        "window_strides": tuple(0 if x is None else x.stride(0) for x in vectors),
        **{"H": H, "Q": Q, "K": K, "scale": 1 / math.sqrt(D), "D": D, "BLOCK_D": triton.next_power_of_2(D)},
        **{"BLOCK_Q": tile[0] or block_q, "BLOCK_K": tile[1] or block_k, **launch},
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def _run(kernel, programs_per_head: int, arguments: dict) -> None:
    """Launch a kernel. All programs are on one axis of the grid, which has no practical limit; neighbours read the same head."""
    B, H = arguments["q"].shape[:2]
    with torch.cuda.device_of(arguments["q"]):
        kernel[(B * H * programs_per_head,)](**arguments)


@torch.library.custom_op("position_pretraining::window_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    time: Tensor | None,
    visible_from: Tensor | None,
    visible_until: Tensor | None,
    tile_q: int,
    tile_k: int,
) -> tuple[Tensor, Tensor]:
    """The output, and the log of the softmax's sum of each query."""
    out, lse = _forward_shapes(q, k, v, time, visible_from, visible_until, tile_q, tile_k)
    arguments = _arguments(q, k, v, (time, visible_from, visible_until), (tile_q, tile_k), backward=False)
    _run(_forward_kernel, triton.cdiv(q.shape[2], arguments["BLOCK_Q"]), arguments | {"out": out, "lse": lse})
    return out, lse


@_forward.register_fake
def _forward_shapes(q, k, v, time, visible_from, visible_until, tile_q, tile_k):
    return _empty(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("position_pretraining::window_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    time: Tensor | None, visible_from: Tensor | None, visible_until: Tensor | None, tile_q: int, tile_k: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v: by one kernel if one tile has all keys, otherwise by one for q and then one for k and v."""
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    arguments = _arguments(q, k, v, (time, visible_from, visible_until), (tile_q, tile_k), backward=True)
    arguments |= {"out": out, "lse": lse, "dout": dout, "dq": dq, "out_strides": out.stride(), "dout_strides": dout.stride()}
    one_tile = k.shape[2] <= arguments["BLOCK_K"]
    arguments["delta"] = None if one_tile else torch.empty_like(lse)
    if not one_tile:
        _run(_backward_queries_kernel, triton.cdiv(q.shape[2], arguments["BLOCK_Q"]), arguments)
    arguments |= {"dk": dk, "dv": dv, "ONE_TILE": one_tile}
    _run(_backward_keys_kernel, triton.cdiv(k.shape[2], arguments["BLOCK_K"]), arguments)
    return dq, dk, dv


@_backward.register_fake
def _backward_shapes(dout, q, k, v, out, lse, time, visible_from, visible_until, tile_q, tile_k):
    return _empty(q), _empty(k), _empty(v)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.tile_q, ctx.tile_k = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout, _dlse):
    return *_backward(dout, *ctx.saved_tensors, ctx.tile_q, ctx.tile_k), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
