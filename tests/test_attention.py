"""Tests of attention with visibility windows: every backend equals the plain float64 reference."""

import csv
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common import attention
from common.attention import BACKENDS as KNOWN
from common.attention import attend, attend_reference
from common.kernels import WIDTHS
from common.masking import permutation_ranks

BACKENDS = ["auto", "sdpa"]  # these have gradients on every device; flex has them on CUDA only; triton is in test_kernels.py
QUICK = settings(deadline=None, max_examples=40, derandomize=True)
CASES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "H": st.integers(1, 3),
        "Q": st.integers(1, 9),
        "K": st.integers(1, 9),
        "D": st.sampled_from([1, 4, 8]),
        "seed": st.integers(0, 999),
    }
)


def draw(B: int, H: int, Q: int, K: int, D: int, seed: int) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Return q, k, v; a random window; the incoming gradient."""
    g = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(B, H, length, D, generator=g) for length in (Q, K, K)]
    window = {"time": (B, Q), "visible_from": (B, K), "visible_until": (B, K)}
    return qkv, {name: torch.randint(-3, 5, shape, generator=g) for name, shape in window.items()}, torch.randn(B, H, Q, D, generator=g)


def run(function, qkv: list[Tensor], gradient: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of q, k and v."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    out = function(*leaves, **options)
    out.backward(gradient.to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


def visible(time: Tensor, visible_from: Tensor, visible_until: Tensor) -> list[list[str]]:
    """Return the mask of a window as rows of 0 and 1 per image, found by attention with equal scores to one-hot values."""
    (B, Q), K = time.shape, visible_from.shape[1]
    out = attend(
        torch.zeros(B, 1, Q, K),
        torch.zeros(B, 1, K, K),
        torch.eye(K).expand(B, 1, K, K),
        time=time,
        visible_from=visible_from,
        visible_until=visible_until,
    )
    return [["".join(str(int(weight > 0)) for weight in row) for row in image[0]] for image in out]


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(CASES)
def test_output_and_gradients_under_any_window_equal_the_reference(backend, case):
    qkv, window, gradient = draw(**case)
    out, grads = run(attend, qkv, gradient, backend=backend, **window)
    expected, expected_grads = run(attend_reference, qkv, gradient, **window)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(QUICK, max_examples=15)
@given(CASES, st.sets(st.sampled_from(["time", "visible_from", "visible_until"])))
def test_flex_gives_what_the_reference_gives(case, absent):
    qkv, window, _ = draw(**case)
    window = {name: vector for name, vector in window.items() if name not in absent}
    expected = attend_reference(*qkv, **window)
    torch.testing.assert_close(attend(*qkv, backend="flex", **window).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(CASES, st.sets(st.sampled_from(["time", "visible_from", "visible_until"])), st.booleans())
def test_a_bias_is_added_to_the_scores_and_gets_its_gradient_under_any_window(backend, case, absent, bfloat16):
    qkv, window, gradient = draw(**case)
    window = {name: vector for name, vector in window.items() if name not in absent}
    bias = torch.randn(case["H"], case["Q"], case["K"], generator=torch.Generator().manual_seed(case["seed"]))
    if bfloat16:
        bias = bias.bfloat16()
    out, grads = run(lambda q, k, v, bias: attend(q, k, v, bias_HQK=bias, backend=backend, **window), [*qkv, bias], gradient)
    expected, expected_grads = run(lambda q, k, v, bias: attend_reference(q, k, v, bias_HQK=bias, **window), [*qkv, bias], gradient)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=2**-7 if bfloat16 else 0)


def test_the_reference_attends_to_exactly_the_keys_inside_the_window():
    qkv, window, _ = draw(B=3, H=2, Q=7, K=8, D=4, seed=5)
    q, k, v = (tensor.double() for tensor in qkv)
    expected = torch.zeros(3, 2, 7, 4, dtype=torch.float64)
    seen = []
    for b in range(3):
        for i in range(7):
            keys = [j for j in range(8) if window["visible_from"][b, j] <= window["time"][b, i] < window["visible_until"][b, j]]
            seen.append(len(keys))
            for h in range(2 if keys else 0):
                weight = [math.exp(q[b, h, i] @ k[b, h, j] / 2) for j in keys]
                expected[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weight, keys, strict=True)) / sum(weight)
    assert min(seen) == 0 and max(seen) > 2
    torch.testing.assert_close(attend_reference(*qkv, **window), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_visible_keys_outputs_zeros_and_gets_zero_gradients(backend):
    qkv, window, gradient = draw(B=2, H=2, Q=5, K=6, D=8, seed=1)
    window["visible_until"][0] = window["visible_from"][0]  # image 0 has no visible keys
    window["time"][1, 2] = -100  # nor has one query of image 1
    window["visible_from"][1], window["visible_until"][1, :5], window["visible_until"][1, 5] = -3, 9, -3  # key 5 of image 1 is never seen
    out, (grad_q, grad_k, grad_v) = run(attend, qkv, gradient, backend=backend, **window)
    for tensor in (out, grad_q):
        assert (tensor[0] == 0).all() and (tensor[1, :, 2] == 0).all() and (tensor[1, :, [0, 1, 3, 4]] != 0).all()
    for tensor in (grad_k, grad_v):
        assert (tensor[0] == 0).all() and (tensor[1, :, 5] == 0).all() and (tensor[1, :, :5] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(CASES)
def test_without_a_window_it_is_softmax_attention_over_all_keys(backend, case):
    qkv, _, gradient = draw(**case)
    out, grads = run(attend, qkv, gradient, backend=backend)
    expected, expected_grads = run(lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v, qkv, gradient)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=0)
    torch.testing.assert_close(attend_reference(*qkv).float(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("windowed", [True, False])
def test_bfloat16_on_the_cpu_equals_torchs_sdpa_and_its_gradients_match_the_reference(windowed):
    qkv, window, gradient = draw(B=2, H=2, Q=16, K=32, D=8, seed=2)
    qkv, window = [tensor.bfloat16() for tensor in qkv], window if windowed else {}
    out, grads = run(attend, qkv, gradient.bfloat16(), **window)
    mask = attention.window_mask(qkv[0], **window) if windowed else None
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask))
    expected, expected_grads = run(attend_reference, [tensor.float() for tensor in qkv], gradient.bfloat16(), **window)
    for found, wanted in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted.double()).abs().max() < 2**-7 * wanted.abs().max()  # the rounding to 8 bits, as on GPUs


@pytest.mark.parametrize("alike", [("time",), ("visible_from", "visible_until"), ("time", "visible_from", "visible_until")], ids="-".join)
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_window_vector_with_one_row_applies_to_all_images(backend, alike):
    qkv, window, _ = draw(B=3, H=2, Q=5, K=7, D=4, seed=3)
    short = {name: vector[:1] if name in alike else vector for name, vector in window.items()}
    whole = {name: vector.expand(3, -1) for name, vector in short.items()}
    with torch.no_grad():
        torch.testing.assert_close(attend(*qkv, backend=backend, **short), attend(*qkv, backend="sdpa", **whole))


def test_windows_reproduce_mapets_worked_example():
    """Nine tokens in the order 1 8 4 2 7 6 | 3 5 9; the first six are context (papers' figure; no class token)."""
    context = 6
    rank_N = permutation_ranks(torch.tensor([[1, 8, 4, 2, 7, 6, 3, 5, 9]]) - 1)[0]
    entry_N = rank_N.clamp(min=context - 1)
    target = [2, 4, 8]  # x3, x5, x9; their placeholders m follow the nine real keys
    visible_from = torch.cat([entry_N, torch.full((3,), -1)])[None]
    visible_until = torch.cat([torch.full((9,), 99), entry_N[target]])[None]
    query_time = rank_N[target] - 1
    content_time = torch.cat([entry_N, torch.full((3,), context - 1)])
    rows = visible(torch.cat([query_time, content_time])[None], visible_from, visible_until)[0]
    assert rows[:3] == ["110101110111", "111101110011", "111111110001"]
    seen_by_context = "110101110111"
    targets = {2: "111101110011", 4: "111111110001", 8: "111111111000"}
    assert rows[3:] == [targets.get(token, seen_by_context) for token in range(9)] + [seen_by_context] * 3


@pytest.mark.parametrize("function", [attend, attend_reference], ids=["attend", "reference"])
def test_missing_window_vectors_mean_time_by_index_and_keys_always_visible(function):
    qkv, window, _ = draw(B=2, H=2, Q=5, K=6, D=4, seed=3)
    whole = {"time": torch.arange(5).expand(2, 5), "visible_from": torch.full((2, 6), -99), "visible_until": torch.full((2, 6), 99)}
    for names in itertools.chain.from_iterable(itertools.combinations(window, size) for size in range(4)):
        given_part = {name: window[name] for name in names}
        torch.testing.assert_close(function(*qkv, **given_part), function(*qkv, **(whole | given_part)))


def test_visible_from_alone_can_express_causal_attention():
    qkv, _, _ = draw(B=2, H=2, Q=7, K=7, D=4, seed=4)
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    torch.testing.assert_close(attend(*qkv, visible_from=torch.arange(7).expand(2, 7)), expected)


@pytest.mark.parametrize("name", ["time", "visible_from", "visible_until"])
@pytest.mark.parametrize(
    "spoil",
    [lambda x: x[:, :-1], lambda x: x[0], lambda x: x.float(), lambda x: x.bool(), lambda x: x.expand(2, -1), lambda x: x.to("meta")],
    ids=["short", "no batch", "float", "bool", "other batch", "other device"],
)
def test_a_window_vector_that_does_not_fit_is_refused_and_named(name, spoil):
    qkv, window, _ = draw(B=1, H=1, Q=2, K=3, D=4, seed=0)
    with pytest.raises(ValueError, match=f"^{name} "):
        attend(*qkv, **{**window, name: spoil(window[name])})


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("values of another length", (1, 2, 7, 4), torch.float32),
        ("values of another batch", (2, 2, 6, 4), torch.float32),
        ("values of other heads", (1, 1, 6, 4), torch.float32),
        ("values of another dtype", (1, 2, 6, 4), torch.float64),
    ],
)
def test_values_that_do_not_fit_the_keys_are_refused(name, shape, dtype, windowed):
    (q, k, _), window, _ = draw(B=1, H=2, Q=3, K=6, D=4, seed=0)
    with pytest.raises(ValueError, match=r"\b(v|v_BHKD|values?)\b"):
        attend(q, k, torch.ones(shape, dtype=dtype), **(window if windowed else {}))


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 6, 8), (3, 2, 6, 4), (1, 1, 6, 4)], ids=["width", "batch", "heads"])
def test_keys_that_do_not_fit_the_queries_are_refused(shape, windowed):
    (q, _, _), window, _ = draw(B=1, H=2, Q=3, K=6, D=4, seed=0)
    if windowed:
        window = {name: vector if name == "time" else vector.expand(shape[0], -1) for name, vector in window.items()}
    with pytest.raises(ValueError, match=r"\b(k|k_BHKD|keys?)\b"):
        attend(q, torch.ones(shape), torch.ones(shape), **(window if windowed else {}))


def test_an_unknown_backend_is_refused_and_the_known_ones_are_listed():
    qkv, _, _ = draw(B=1, H=1, Q=2, K=3, D=4, seed=0)
    with pytest.raises(ValueError, match="'flash3'.*'auto', 'sdpa', 'flex', 'triton'"):
        attend(*qkv, backend="flash3")


def test_a_bias_that_does_not_fit_is_refused_and_named():
    qkv, _, _ = draw(B=1, H=2, Q=3, K=4, D=4, seed=0)
    for bias in (torch.zeros(2, 4, 3), torch.zeros(1, 3, 4), torch.zeros(2, 3, 4).int(), torch.zeros(2, 3, 4, device="meta")):
        with pytest.raises(ValueError, match=r"^bias_HQK must be a tensor of shape \(2, 3, 4\) on cpu, float"):
            attend(*qkv, bias_HQK=bias)


@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_a_bias_is_refused_by_the_backends_that_do_not_support_it(backend):
    qkv, _, _ = draw(B=1, H=2, Q=3, K=4, D=4, seed=0)
    with pytest.raises(ValueError, match=f"{backend} backend takes no bias; choose 'sdpa' or 'auto'"):
        attend(*qkv, bias_HQK=torch.zeros(2, 3, 4), backend=backend)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_on_two_devices_or_without_four_axes_are_refused(name):
    qkv, _, _ = draw(B=1, H=2, Q=4, K=4, D=4, seed=0)
    position = "qkv".index(name)
    for spoilt in (qkv[position].to("meta"), qkv[position][0]):
        with pytest.raises(ValueError, match=rf"one dtype on one device, got .*{name} \({'1, 2' if spoilt.ndim == 4 else 2}, 4, 4\)"):
            attend(*[*qkv[:position], spoilt, *qkv[position + 1 :]])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_on_the_cpu_refuses_gradients_and_names_a_backend_that_has_them():
    qkv, window, _ = draw(B=1, H=2, Q=4, K=4, D=4, seed=0)
    qkv[1].requires_grad_()
    with pytest.raises(ValueError, match="flex backend has no gradients on cpu; choose 'sdpa'"):
        attend(*qkv, backend="flex", **window)
    with torch.no_grad():
        torch.testing.assert_close(attend(*qkv, backend="flex", **window), attend(*qkv, **window))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_rebuilds_its_block_mask_only_when_the_window_changes(monkeypatch):
    qkv, window, _ = draw(B=2, H=2, Q=4, K=4, D=4, seed=0)
    made, make = [], attention.create_block_mask
    monkeypatch.setattr(attention, "create_block_mask", lambda *arguments, **options: (made.append(1), make(*arguments, **options))[1])

    def count(seen: dict[str, Tensor], q: Tensor = qkv[0]) -> int:
        made.clear()
        torch.testing.assert_close(attend(q, *qkv[1:], backend="flex", **seen), attend(q, *qkv[1:], backend="sdpa", **seen))
        return len(made)

    assert [count(window), count(window), count({name: vector[:, :] for name, vector in window.items()})] == [1, 0, 0]
    assert count({name: vector.clone() for name, vector in window.items()}) == 1  # a copy in other memory
    window["visible_until"][0, 1] = -9
    assert [count(window), count(window)] == [1, 0]  # changed in place
    assert count({name: vector for name, vector in window.items() if name != "time"}) == 1
    window["time"] = window["time"][:, 1:]
    assert [count(window, qkv[0][:, :, 1:]), count(window, qkv[0][:, :, 1:])] == [1, 0]
    for seed in range(20):  # discarded windows, whose memory the next one may reuse
        _, other, _ = draw(B=2, H=2, Q=4, K=4, D=4, seed=seed)
        assert count(other) == 1
    with torch.inference_mode():
        vectors = {name: vector.clone() for name, vector in other.items()}
        assert [count(vectors), count(vectors)] == [1, 1]  # changes of inference tensors cannot be detected


def test_without_triton_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    qkv, _, _ = draw(B=1, H=1, Q=2, K=3, D=32, seed=0)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[gpu\]'"):
        attend(*qkv, backend="triton")


MEASURED = """device,windowed,queries,keys,width,backend
cpu,True,100,100,64,triton
cpu,True,400,400,64,flex
cpu,True,400,50,64,sdpa
other,False,400,400,64,flex
"""


@pytest.mark.parametrize(
    ("shape", "dtype", "windowed", "expected"),
    [
        ((400, 400, 64), torch.float32, True, "flex"),
        ((201, 201, 64), torch.float32, True, "flex"),
        ((199, 199, 64), torch.float32, True, "triton"),
        ((400, 60, 64), torch.bfloat16, True, "sdpa"),
        ((400, 400, 64), torch.float32, False, "sdpa"),
        ((100, 100, 48), torch.float32, True, "sdpa"),
        ((100, 100, 64), torch.float64, True, "sdpa"),
    ],
    ids=["as measured", "nearer to the larger", "nearer to the smaller", "fewer keys", "other device", "width", "dtype"],
)
def test_auto_uses_the_backend_measured_for_the_nearest_shape(tmp_path, monkeypatch, shape, dtype, windowed, expected):
    (tmp_path / "choices.csv").write_text(MEASURED)
    monkeypatch.setattr(attention, "CHOICES", attention._read_choices(tmp_path / "choices.csv"))
    Q, K, D = shape
    assert attention._measured_choice(torch.zeros(1, 1, Q, D, dtype=dtype), torch.zeros(1, 1, K, D, dtype=dtype), windowed) == expected


def test_auto_runs_the_measured_backend(monkeypatch):
    qkv, window, _ = draw(B=1, H=1, Q=4, K=4, D=32, seed=0)
    qkv[0].requires_grad_()
    monkeypatch.setattr(attention, "CHOICES", {("cpu", True): {(4, 4, 32): "flex"}})
    with pytest.raises(ValueError, match="flex backend"):
        attend(*qkv, **window)
    attend(*qkv)


def test_the_committed_choices_name_known_backends_and_list_each_shape_once():
    rows = list(csv.DictReader(attention.CHOICES_FILE.read_text().splitlines()))
    assert all(row["backend"] in KNOWN[1:] and row["windowed"] in ("True", "False") and int(row["width"]) in WIDTHS for row in rows)
    shapes = [tuple(value for name, value in row.items() if name != "backend") for row in rows]
    assert len(shapes) == len(set(shapes))


@pytest.mark.parametrize("measured", [{}, {("cpu", True): {(4, 8, 32): "sdpa", (64, 64, 32): "triton"}}], ids=["no table", "table"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attend_compiles_into_one_graph(backend, measured, monkeypatch):
    monkeypatch.setattr(attention, "CHOICES", measured)
    torch._dynamo.reset()
    qkv, window, gradient = draw(B=2, H=2, Q=5, K=6, D=32, seed=6)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for options in ({}, window, {"bias_HQK": torch.randn(2, 5, 6)}):
        out, grads = run(compiled, qkv, gradient, backend=backend, **options)
        expected, expected_grads = run(attend, qkv, gradient, backend=backend, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, expected_grads)
