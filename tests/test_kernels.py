"""Tests of the Triton kernel: what it computes, reads, keeps and refuses, checked against float64 autograd.

Without a GPU, Triton's interpreter runs it on the CPU (see conftest.py): this checks the numbers, not the speed. The interpreter is
faster with larger tiles, so most tests use 128 x 128 there; on a GPU they use the default tiles.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.attention import attend, attend_reference
from common.kernels import DTYPES, WIDTHS
from common.masking import permutation_ranks

pytest.importorskip("triton")
from common.kernels import window_attention as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"
TILE = (128, 128) if kernels.INTERPRETED else None
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not kernels.INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1")

# In units of the dtype's eps, for values near one. Half precision: 4, since the weights or their gradients and the result are rounded,
# the rounded result enters delta, and the interpreter truncates to bfloat16. float32: 32, since sums over up to 344 terms differ.
TOLERANCE = {dtype: (32 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps for dtype in DTYPES}


def draw(B: int, H: int, Q: int, K: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Return q, k, v as a layer gives them (views of (B, tokens, H, D)) and the incoming gradient."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, tokens, H, D, generator=g).to(DEVICE, dtype).transpose(1, 2) for tokens in (Q, K, K, Q)]


def draw_window(B: int, Q: int, K: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"time": (B, Q), "visible_from": (B, K), "visible_until": (B, K)}
    return {name: torch.randint(-3, 5, shape, generator=g).to(DEVICE) for name, shape in shapes.items()}


def run(function, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, **options) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def assert_equal_to_reference(tensors: list[Tensor], window: dict[str, Tensor], tile: tuple[int, int] | None = TILE) -> None:
    found = run(kernels.window_attention, *tensors, tile=tile, **window)
    expected = run(attend_reference, *tensors, **window)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert ours.dtype == tensors[0].dtype and ours.shape == theirs.shape
        atol = TOLERANCE[ours.dtype] * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def mapet(stream: str) -> tuple[int, int, dict[str, Tensor]]:
    """MaPeT at 224 pixels: class token and 196 patches, of which 50 are context, then placeholders for the 147 others."""
    tokens, context = 197, 50
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(196, generator=torch.Generator().manual_seed(0))])
    rank_N = permutation_ranks(order[None])[0]
    entry_N = rank_N.clamp(min=context - 1)
    target = (rank_N >= context).nonzero()[:, 0]
    vectors = {
        "time": {"query": rank_N[target] - 1, "content": torch.cat([entry_N, torch.full((147,), context - 1)])}[stream],
        "visible_from": torch.cat([entry_N, torch.full((147,), -1)]),
        "visible_until": torch.cat([torch.full((tokens,), tokens), entry_N[target]]),
    }
    time, begin, end = vectors.values()
    sees = ((begin <= time[:, None]) & (time[:, None] < end)).sum(1)
    assert (sees == tokens).all()  # every position once, as content or as placeholder
    return len(time), len(begin), {name: vector[None].int().to(DEVICE) for name, vector in vectors.items()}


def counted(Q: int, K: int, **vectors: Tensor) -> tuple[int, int, dict[str, Tensor]]:
    return Q, K, {name: vector[None].to(DEVICE) for name, vector in vectors.items()}


PACK = torch.tensor([0] * 60 + [1] * 100 + [2] * 37)
CHOSEN = torch.randperm(197, generator=torch.Generator().manual_seed(1)) < 50
CASES = {
    "no window, 65": counted(65, 65),
    "no window, 197 to MP3's first 50": counted(197, 50),
    "no window, 197 to MP3's first 99": counted(197, 99),
    "no window, 344": counted(344, 344),
    "MP3's 50 anywhere": counted(197, 197, time=torch.zeros(197).int(), visible_until=CHOSEN.int()),
    "MaPeT's content stream": mapet("content"),
    "MaPeT's query stream": mapet("query"),
    "three packed images": counted(197, 197, time=PACK, visible_from=PACK, visible_until=PACK + 1),
    "causal": counted(197, 197, visible_from=torch.arange(197)),
    "last 20": counted(197, 197, visible_from=torch.arange(197), visible_until=torch.arange(197) + 20),
    "only the end of visibility": counted(65, 197, visible_until=torch.arange(197) % 40),
    "random": (197, 65, draw_window(1, 197, 65)),
    "one query": (1, 65, draw_window(1, 1, 65)),
    "one key": (65, 1, draw_window(1, 65, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_under_every_window_of_the_papers_equal_the_reference(case):
    Q, K, window = CASES[case]
    assert_equal_to_reference(draw(1, 1, Q, K, 64), window)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("windowed", [True, False])
def test_every_width_and_dtype_equals_the_reference_to_its_precision(width, dtype, windowed):
    assert_equal_to_reference(draw(2, 2, 65, 50, width, dtype), draw_window(2, 65, 50) if windowed else {})


@pytest.mark.parametrize("K", [50, 150], ids=["one key tile", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_the_default_tiles_equal_the_reference(dtype, K):
    assert_equal_to_reference(draw(1, 1, 150, K, 32, dtype), draw_window(1, 150, K), tile=None)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    st.fixed_dictionaries({name: st.integers(1, most) for name, most in (("B", 3), ("H", 3), ("Q", 40), ("K", 40))}),
    st.sampled_from(WIDTHS[:2]),
    st.sampled_from([(16, 16), (16, 32), (32, 16), (64, 64)]),
    st.sets(st.sampled_from(["time", "visible_from", "visible_until"])),
    st.integers(0, 999),
)
def test_any_shape_tile_and_window_with_any_vector_absent_equals_the_reference(shape, width, tile, absent, seed):
    window = draw_window(shape["B"], shape["Q"], shape["K"], seed)
    assert_equal_to_reference(draw(**shape, D=width, seed=seed), {name: x for name, x in window.items() if name not in absent}, tile)


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16), (32, 128)], ids=str)
def test_many_tiles_equal_one_tile(tile, windowed):
    tensors, window = draw(1, 1, 100, 90, 32), draw_window(1, 100, 90) if windowed else {}
    many, one = (run(kernels.window_attention, *tensors, tile=size, **window) for size in (tile, (128, 128)))
    torch.testing.assert_close(many, one, atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("layout", ["packed qkv", "heads first", "width not last", "repeated", "every other token"])
def test_any_strides_equal_contiguous_tensors_bit_for_bit(layout):
    B, H, T, D = 2, 3, 20, 32
    g = torch.Generator().manual_seed(0)
    q, k, v, gradient = {
        "packed qkv": lambda: [*torch.randn(B, T, 3, H, D, generator=g).permute(2, 0, 3, 1, 4), torch.randn(B, H, T, D, generator=g)],
        "heads first": lambda: [torch.randn(H, B, T, D, generator=g).transpose(0, 1) for _ in range(4)],
        "width not last": lambda: [torch.randn(B, H, D, T, generator=g).mT for _ in range(4)],
        "repeated": lambda: [torch.randn(1, H, 1, D, generator=g).expand(B, H, T, D) for _ in range(4)],
        "every other token": lambda: [torch.randn(B, 2 * T, H, D, generator=g).transpose(1, 2)[:, :, ::2] for _ in range(4)],
    }[layout]()
    tensors, window = [tensor.to(DEVICE) for tensor in (q, k, v, gradient)], draw_window(B, T, T)
    window["time"] = window["time"][:1].expand(B, T)
    window["visible_from"] = window["visible_from"].repeat_interleave(2, dim=1)[:, ::2]
    found = run(kernels.window_attention, *tensors, **window)
    plain = {name: vector.contiguous() for name, vector in window.items()}
    expected = run(kernels.window_attention, *(tensor.contiguous() for tensor in tensors), **plain)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_results_have_a_layout_that_joins_the_heads_without_a_copy():
    for result in run(kernels.window_attention, *draw(2, 3, 20, 30, 32)):
        assert result.transpose(1, 2).is_contiguous()


def test_window_vectors_of_any_integer_type_give_identical_results():
    tensors, window = draw(1, 1, 20, 30, 32), draw_window(1, 20, 30)
    expected = run(kernels.window_attention, *tensors, **window)
    for dtypes in ((torch.int16,) * 3, (torch.int32,) * 3, (torch.int16, torch.int32, torch.int64)):
        narrowed = {name: vector.to(dtype) for (name, vector), dtype in zip(window.items(), dtypes, strict=True)}
        found = run(kernels.window_attention, *tensors, **narrowed)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("tile", [(16, 16), (16, 64)], ids=["key tiles", "one key tile"])
def test_queries_without_keys_output_zeros_and_unseen_keys_get_zero_gradients(tile):
    tensors, window = draw(2, 1, 40, 50, 32), draw_window(2, 40, 50)
    window["visible_until"][0] = window["visible_from"][0]  # image 0 has no visible keys
    window["time"][1, 2] = -100  # nor has one query of image 1
    window["visible_from"][1, 5] = 100  # key 5 of image 1 is never visible
    out, dq, dk, dv = run(kernels.window_attention, *tensors, tile=tile, **window)
    for tensor, row in ((out, 2), (dq, 2), (dk, 5), (dv, 5)):
        assert (tensor[0] == 0).all() and (tensor[1, :, row] == 0).all() and (tensor[1] != 0).any() and tensor.isfinite().all()
    assert_equal_to_reference(tensors, window, tile)


@pytest.mark.parametrize("tile", [(16, 16), (16, 64)], ids=["key tiles", "one key tile"])
def test_two_backward_passes_are_equal_bit_for_bit(tile):
    tensors, window = draw(1, 1, 60, 50, 32, torch.float16), draw_window(1, 60, 50)
    first, second = (run(kernels.window_attention, *tensors, tile=tile, **window) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_tile_of_keys_that_is_never_visible_is_not_read():
    q, k, v, gradient = draw(1, 1, 40, 48, 32)
    window = {"time": torch.arange(40), "visible_from": torch.zeros(48).int(), "visible_until": torch.full((48,), 99)}
    window["visible_from"][16:32] = 40  # the keys of the second of three tiles never become visible
    window = {name: vector[None].to(DEVICE) for name, vector in window.items()}
    k[:, :, 16:32], v[:, :, 16:32] = torch.nan, torch.inf
    out, dq, dk, dv = run(kernels.window_attention, q, k, v, gradient, tile=(16, 16), **window)
    assert all(tensor.isfinite().all() for tensor in (out, dq, dk, dv))
    assert all((tensor[:, :, 16:32] == 0).all() for tensor in (dk, dv))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("tile", [(16, 16), (16, 64)], ids=["key tiles", "one key tile"])
def test_a_tile_of_queries_without_visible_keys_does_not_affect_keys_and_values(tile):
    q, k, v, gradient = draw(1, 1, 48, 40, 32)
    time = torch.zeros(1, 48, device=DEVICE).int()
    time[:, 16:32] = 1
    q[:, :, 16:32], gradient[:, :, 16:32] = torch.nan, torch.inf
    visible_until = torch.ones(1, 40, device=DEVICE).int()
    out, dq, dk, dv = run(kernels.window_attention, q, k, v, gradient, tile=tile, time=time, visible_until=visible_until)
    assert all(tensor.isfinite().all() for tensor in (out, dq, dk, dv))


def test_no_matrix_of_queries_times_keys_is_kept_for_the_backward_pass():
    q, k, v, _ = (tensor.requires_grad_() for tensor in draw(1, 1, 300, 300, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        kernels.window_attention(q, k, v, tile=TILE, **draw_window(1, 300, 300))
    assert len(kept) == 8 and max(kept) == 300 * 32


@pytest.mark.parametrize("absent", [(), ("time",), ("time", "visible_from", "visible_until")], ids=["all", "no time", "none"])
def test_the_operators_pass_torchs_opcheck(absent):
    q, k, v, gradient = draw(1, 2, 20, 30, 32)
    window = [None if name in absent else vector for name, vector in draw_window(1, 20, 30).items()]
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    torch.library.opcheck(kernels._forward, (q, k, v, *window, 0, 0))
    with torch.no_grad():
        out, lse = kernels._forward(q, k, v, *window, 0, 0)
    torch.library.opcheck(kernels._backward, (gradient, q.detach(), k.detach(), v.detach(), out, lse, *window, 0, 0))


def test_a_layer_with_the_kernel_compiles_into_one_graph_with_the_same_gradients():
    torch._dynamo.reset()
    weight, x = torch.randn(192, 64, device=DEVICE) / 8, torch.randn(2, 20, 64, device=DEVICE, requires_grad=True)

    def layer(x: Tensor, **window: Tensor) -> Tensor:
        q, k, v = (x @ weight.T).view(2, 20, 3, 2, 32).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, backend="triton", **window).transpose(1, 2).reshape(2, 20, 64).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if kernels.INTERPRETED else "inductor")
    for window in ({}, draw_window(2, 20, 20), draw_window(1, 20, 20)):
        results = [(out := function(x, **window), *torch.autograd.grad(out.sum(), x)) for function in (compiled, layer)]
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_attend_refuses_unsupported_widths_and_dtypes_and_lists_the_supported_ones():
    q, k, v, _ = draw(1, 1, 4, 4, 48)
    with pytest.raises(ValueError, match=r"width 32, 64, 80, 128, got q of shape \(1, 1, 4, 48\)"):
        attend(q, k, v, backend="triton")
    q, k, v = (tensor[..., :32].double() for tensor in (q, k, v))
    with pytest.raises(ValueError, match=r"takes torch.bfloat16, torch.float16, torch.float32, got q of torch.float64"):
        attend(q, k, v, backend="triton")


def test_on_the_cpu_the_error_asks_for_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    q, k, v = torch.zeros(3, 1, 1, 4, 32)
    with pytest.raises(ValueError, match="takes CUDA tensors, or TRITON_INTERPRET=1 set before Python starts; q is on cpu"):
        attend(q, k, v, backend="triton")


def test_a_failing_kernel_is_not_replaced_by_another_backend(monkeypatch):
    def fail(*_):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(kernels, "_run", fail)
    with pytest.raises(RuntimeError, match="out of resources"):
        attend(*draw(1, 1, 4, 4, 32)[:3], backend="triton")


def compile_for_h100(cases: list[tuple[int, int, int, torch.dtype, tuple[torch.dtype | None, ...]]]) -> None:
    """Compile every kernel of the cases (Q, K, D, dtype, dtypes of the vectors) for an H100; no H100 is needed and no kernel runs.

    This finds code that the interpreter accepts and the compiler refuses, and tiles that do not fit into shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    class H100:
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def only_compile(kernel, programs, arguments):
        compiled = kernel.warmup(grid=(programs,), **arguments)
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 227 * 1024, (compiled.metadata.shared, arguments)
        print(kernel.__name__)

    triton.runtime.driver.set_active(H100())
    kernels._run = only_compile
    for Q, K, D, dtype, vectors in cases:
        q, k, v, dout = (torch.empty(2, tokens, 6, D, dtype=dtype).transpose(1, 2) for tokens in (Q, K, K, Q))
        window = [None if x is None else torch.zeros(2, tokens, dtype=x) for x, tokens in zip(vectors, (Q, K, K), strict=True)]
        out, lse = kernels._forward(q, k, v, *window, 0, 0)
        kernels._backward(dout, q, k, v, out, lse, *window, 0, 0)


ALL, NONE, CAUSAL = (torch.int32,) * 3, (None,) * 3, (None, torch.int16, None)


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100_and_fits_its_shared_memory(tmp_path):
    cases = [(197, 197, width, torch.bfloat16, ALL) for width in WIDTHS]
    cases += [(197, 99, 128, dtype, CAUSAL) for dtype in (torch.float16, torch.float32)]
    cases += [(Q, K, 64, torch.bfloat16, NONE) for Q, K in ((1, 1), (197, 50), (147, 344))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    code = f"import torch; from tests.test_kernels import compile_for_h100; compile_for_h100({cases})"
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    assert set(child.stdout.split()) >= {"_forward_kernel", "_backward_queries_kernel", "_backward_keys_kernel"}
