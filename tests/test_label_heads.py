"""Tests of the heads of Positional Label: labels, logits, losses, gradients, memory and refused arguments.

The reference is the released method: a double loop that concatenates queries and keys, and autograd.

Shapes: B images, M tokens of N cells, D width, R relative positions.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.heads import AbsoluteLabelHead, RelativeLabelHead
from common.masking import gather_tokens, random_order
from common.positions import Grid
from tests.test_vit import redraw

B, GRID, D = 3, (3, 4), 16
ROW = B * 12 * 35  # logits of one query of each image with all keys
CHUNKS = (1, 2 * ROW, 5 * ROW, 2**24)  # one query at a time; chunks without a remainder; with a remainder; all at once


def relative(**options) -> RelativeLabelHead:
    return redraw(RelativeLabelHead(D, GRID, **options))


def tokens(visible: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens (B, M, D) and their cells (B, M): all in order, or a subset in a different order per image."""
    generator = torch.Generator().manual_seed(seed)
    cell_BM = torch.arange(12).expand(B, -1) if visible == 12 else random_order(torch.rand(B, 12, generator=generator))[:, :visible]
    return torch.randn(B, visible, D, generator=generator), cell_BM


def loop_logits(head: RelativeLabelHead, x_BMD: Tensor) -> Tensor:
    """Return (B, M * M, R), one pair of query and key at a time, as released."""
    half, count = x_BMD.shape[-1] // 2, range(x_BMD.shape[1])
    pairs = [torch.cat([x_BMD[:, i, :half], x_BMD[:, j, half:]], -1) for i in count for j in count]
    return head.classify(head.fc2(F.gelu(head.fc1(torch.stack(pairs, 1)))))


def loop_labels(grid: Grid, cell_BM: Tensor) -> Tensor:
    """Return the labels (B, M * M): row and column offset from the key to the query."""
    (h, w), labels = grid, []
    for cells in cell_BM.tolist():
        places = [(cell // w, cell % w) for cell in cells]
        labels.append([(r - s + h - 1) * (2 * w - 1) + (c - d + w - 1) for r, c in places for s, d in places])
    return torch.tensor(labels)


def loop_loss(head: RelativeLabelHead, x_BMD: Tensor, cell_BM: Tensor, grid: Grid = GRID) -> Tensor:
    return F.cross_entropy(loop_logits(head, x_BMD).flatten(0, 1), loop_labels(grid, cell_BM).flatten())


def gradients(loss: Tensor, head: nn.Module, x_BMD: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*head.named_parameters(), strict=True)
    return dict(zip(("tokens", *names), torch.autograd.grad(loss, (x_BMD, *parameters)), strict=True))


def exact(head: RelativeLabelHead, x_BMD: Tensor, cell_BM: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reference's loss and gradients in float64."""
    head, x_BMD = copy.deepcopy(head).double(), x_BMD.detach().double().requires_grad_()
    loss = loop_loss(head, x_BMD, cell_BM)
    return loss.detach(), gradients(loss, head, x_BMD)


# ---- labels


def test_relative_labels_of_7_by_7_equal_swins_index_of_query_minus_key():
    table = RelativeLabelHead(8, (7, 7)).targets
    assert table.shape == (49, 49) and table.min() == 0 and table.max() == 168
    assert table[0, :3].tolist() == [84, 83, 82] and table[24, :7].tolist() == [126, 125, 124, 123, 122, 121, 120]
    assert torch.equal(table, get_relative_position_index(7, 7))


def test_relative_labels_of_3_by_3_equal_the_papers_figure():
    assert RelativeLabelHead(8, (3, 3)).targets[4].view(3, 3).tolist() == [[18, 17, 16], [13, 12, 11], [8, 7, 6]]


@pytest.mark.parametrize("grid", [(2, 3), (1, 5), (4, 4)])
def test_relative_labels_follow_the_formula_on_any_grid(grid):
    head, cells = RelativeLabelHead(8, grid), grid[0] * grid[1]
    assert head.targets.flatten().tolist() == loop_labels(grid, torch.arange(cells)[None])[0].tolist()
    assert head.targets.unique().numel() == head.classify.out_features == (2 * grid[0] - 1) * (2 * grid[1] - 1)


# ---- the released heads


def test_logits_of_all_pairs_equal_the_released_loop_over_concatenated_queries_and_keys():
    torch.manual_seed(0)
    head, x = RelativeLabelHead(768, (7, 7)), F.layer_norm(torch.randn(2, 49, 768), (768,))
    logits = head(x)
    assert logits.shape == (2, 49, 49, 169)
    torch.testing.assert_close(logits.flatten(1, 2), loop_logits(head, x), atol=1e-6, rtol=0)


def test_logits_use_the_first_half_of_the_query_and_the_second_half_of_the_key():
    head, (x, _) = relative(), tokens()
    before = head(x)
    moved = x.clone()
    moved[:, 2, : D // 2] += 1
    query_changed = (head(moved) != before).any(-1)
    assert query_changed[:, 2].all() and not query_changed[:, [row for row in range(12) if row != 2]].any()
    moved = x.clone()
    moved[:, 2, D // 2 :] += 1
    key_changed = (head(moved) != before).any(-1)
    assert key_changed[:, :, 2].all() and not key_changed[:, :, [row for row in range(12) if row != 2]].any()


def test_absolute_logits_are_three_layers_on_the_first_half_of_the_channels():
    head, (x, cells) = redraw(AbsoluteLabelHead(D, GRID)), tokens(visible=5)
    logits = head.classify(head.fc2(F.gelu(head.fc1(x[:, :, : D // 2]))))
    assert torch.equal(head(x), logits) and logits.shape == (B, 5, 12)
    picked = [-logits[b, m].log_softmax(-1)[cells[b, m]] for b in range(B) for m in range(5)]
    assert head.loss(x, cells).item() == pytest.approx(torch.stack(picked).mean().item(), rel=1e-6)
    right = [logits[b, m].argmax() == cells[b, m] for b in range(B) for m in range(5)]
    assert head.accuracy(x, cells).item() == pytest.approx(sum(right).item() / 15)
    assert head.accuracy(x, logits.argmax(-1)) == 1


def test_the_heads_have_the_released_sizes():
    absolute, pairs = AbsoluteLabelHead(768, (14, 14)), RelativeLabelHead(768, (7, 7))
    assert [(layer.in_features, layer.out_features) for layer in absolute.children()] == [(384, 384), (384, 192), (192, 196)]
    assert [(layer.in_features, layer.out_features) for layer in pairs.children()] == [(768, 384), (384, 384), (384, 169)]
    assert [sum(p.numel() for p in head.parameters()) for head in (absolute, pairs)] == [259_588, 508_201]
    assert set(pairs.state_dict()) == {f"{layer}.{kind}" for layer in ("fc1", "fc2", "classify") for kind in ("weight", "bias")}


@pytest.mark.parametrize(("head", "grid", "classes"), [(AbsoluteLabelHead, (14, 14), 196), (RelativeLabelHead, (7, 7), 169)])
def test_the_initial_loss_is_at_chance_level(head, grid, classes):
    torch.manual_seed(0)
    head, cells = head(768, grid), torch.arange(grid[0] * grid[1]).expand(2, -1)
    x = F.layer_norm(torch.randn(*cells.shape, 768), (768,))
    assert head.loss(x, cells).item() == pytest.approx(math.log(classes), abs=0.005)
    for layer in head.children():
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()


# ---- the loss over pairs


@pytest.mark.parametrize("visible", [12, 5])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_equal_float64_autograd_of_the_loop_with_any_chunk(chunk, visible):
    head, (x, cells) = relative(chunk=chunk), tokens(visible)
    loss, expected = exact(head, x, cells)
    found = head.loss(x.requires_grad_(), cells)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(loss.item(), abs=1e-6)
    for name, gradient in gradients(0.5 * found, head, x).items():
        torch.testing.assert_close(gradient.double(), 0.5 * expected[name], atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_in_bf16_differ_by_a_few_roundings_with_any_chunk(chunk):
    """A gradient passes through eight rounded tensors, each with a relative error of at most 2^-8: sqrt(8) 2^-8 together, since the
    errors are uncorrelated. The errors of the loss are averaged over 432 pairs, so they are at least 2^4 times smaller."""
    head, (x, cells) = relative(chunk=chunk), tokens()
    loss, expected = exact(head, x, cells)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.loss(x.requires_grad_(), cells)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(loss.item(), rel=2**-12)
    for name, gradient in gradients(found, head, x).items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < math.sqrt(8) * 2**-8 * expected[name].norm(), name


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_grad_gives_the_same_loss_and_computes_no_gradients(chunk):
    head, (x, cells) = relative(chunk=chunk), tokens()
    expected = head.loss(x, cells)
    with Watch() as trained:
        head.loss(x, cells)
    with Watch() as watch, torch.no_grad():
        assert torch.equal(head.loss(x, cells), expected)
    assert torch.ops.aten.gelu_backward.default in trained.seen and torch.ops.aten.gelu_backward.default not in watch.seen


@pytest.mark.parametrize("frozen", ["tokens", "head"])
def test_frozen_tokens_or_heads_get_no_gradient_and_the_others_the_usual_one(frozen):
    head, (x, cells) = relative(), tokens()
    expected = exact(head, x, cells)[1]
    head.requires_grad_(frozen != "head")
    x.requires_grad_(frozen != "tokens")
    head.loss(x, cells).backward()
    for name, tensor in {"tokens": x, **dict(head.named_parameters())}.items():
        if (name == "tokens") == (frozen == "tokens"):
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad.double(), expected[name], atol=1e-7, rtol=1e-5, msg=name)


def test_one_sgd_step_gives_the_weights_of_the_released_loop():
    torch.manual_seed(0)
    head, cells = RelativeLabelHead(768, (7, 7)), torch.arange(49)[None]
    x, other = F.layer_norm(torch.randn(1, 49, 768), (768,)), copy.deepcopy(head)
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    for model, loss in ((head, head.loss(x, cells)), (other, loop_loss(other, x, cells, (7, 7)))):
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    for name, parameter in other.named_parameters():
        assert (parameter - before[name]).abs().max() > 1e-5, name
        torch.testing.assert_close(head.get_parameter(name), parameter, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("visible", [12, 5])
def test_accuracy_is_the_fraction_of_pairs_classified_correctly(visible):
    head, (x, cells) = relative(), tokens(visible)
    right = loop_logits(head, x).argmax(-1) == loop_labels(GRID, cells)
    assert 0 < right.float().mean() < 1
    assert head.accuracy(x, cells).item() == pytest.approx(right.double().mean().item(), abs=1e-7)


def test_a_subset_of_the_tokens_keeps_the_labels_of_the_whole_grid():
    head, (x, every), (_, cells) = relative(), tokens(), tokens(visible=5)
    loss_P = F.cross_entropy(head(x).flatten(0, 2), loop_labels(GRID, every).flatten(), reduction="none")
    seen = loss_P.view(B, 12, 12)[torch.arange(B)[:, None, None], cells[:, :, None], cells[:, None]].mean().item()
    assert head.loss(gather_tokens(x, cells), cells).item() == pytest.approx(seen, abs=1e-6)
    assert abs(head.loss(gather_tokens(x, cells), torch.arange(5).expand(B, -1)).item() - seen) > 1e-3


# ---- a random subset of queries


@pytest.mark.parametrize("queries", [1, 4])
def test_a_subset_of_queries_gives_an_unbiased_estimate_of_loss_and_gradient(queries):
    head, (x, cells) = relative(queries=queries).train(), tokens(visible=8)
    full, expected = exact(head, x, cells)
    torch.manual_seed(0)
    drawn = [head.loss(x, cells).item() for _ in range(1000)]
    mean, std = torch.tensor(drawn).double().mean(), torch.tensor(drawn).double().std()
    assert std > 0.001 * full and abs(mean - full) < 4 * std / math.sqrt(1000)
    x.requires_grad_()
    rows = torch.stack([gradients(head.loss(x, cells), head, x)["fc1.bias"] for _ in range(1000)]).double()
    off = (rows.mean(0) - expected["fc1.bias"]) / (rows.std(0) / math.sqrt(1000))
    assert off.abs().max() < 4.5 and rows.std(0).min() > 0  # over eight values


def test_queries_are_drawn_per_image_and_paired_with_every_token():
    head, (x, cells) = relative(queries=2).train(), tokens()
    torch.manual_seed(0)
    head.loss(x.requires_grad_(), cells).backward()
    query_seen, key_seen = (half.any(-1) for half in (x.grad != 0).split(D // 2, -1))
    assert query_seen.sum(1).tolist() == [2] * B and key_seen.all()
    assert len({tuple(row) for row in query_seen.tolist()}) > 1


def test_queries_apply_only_in_training_and_all_of_them_give_the_full_loss():
    (x, cells), plain = tokens(), relative()
    expected = plain.loss(x, cells)
    assert torch.equal(relative(queries=2).eval().loss(x, cells), expected)
    assert not torch.equal(relative(queries=2).train().loss(x, cells), expected)
    for queries in (12, 99):
        assert torch.equal(relative(queries=queries).train().loss(x, cells), expected)


# ---- memory


class Watch(TorchDispatchMode):
    """Record the operators that run and the largest tensor that any of them returns."""

    def __init__(self):
        super().__init__()
        self.seen, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.add(function)
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


PAIRS = 2 * 196 * 196  # for two images of 14 x 14 cells


@pytest.mark.parametrize("chunk", [2**20, 2**24])
def test_no_tensor_is_larger_than_a_chunk(chunk):
    head = RelativeLabelHead(768, (14, 14), chunk=chunk)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:  # shapes without data
        x, cells = torch.zeros(2, 196, 768, requires_grad=True), torch.zeros(2, 196, dtype=torch.long)
        torch.autograd.grad(head.loss(x, cells), x)
        head.accuracy(x, cells)
    assert torch.ops.aten.gelu_backward.default in watch.seen
    assert chunk / 2 < watch.largest <= chunk < PAIRS * 768


def test_tensors_saved_for_the_backward_pass_do_not_grow_with_the_pairs():
    head, kept = RelativeLabelHead(768, (14, 14)), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with FakeTensorMode(allow_non_fake_inputs=True), hooks:
        head.loss(torch.zeros(2, 196, 768, requires_grad=True), torch.zeros(2, 196, dtype=torch.long))
    assert 0 < max(kept) <= 2 * 196 * 768
    assert sum(kept) < PAIRS * 768 / 20


def test_the_reference_of_these_tests_does_store_the_concatenated_pairs():
    head, (x, cells) = relative(), tokens()
    with Watch() as watch:
        loop_loss(head, x, cells)
    assert watch.largest >= B * 12 * 12 * D


# ---- what makes no sense is refused


@pytest.mark.parametrize("head", [AbsoluteLabelHead, RelativeLabelHead])
def test_one_cell_or_a_width_that_is_no_multiple_of_4_is_refused(head):
    with pytest.raises(ValueError, match="a grid of 1 x 1 cells has no positions to classify; use larger images or smaller patches"):
        head(16, (1, 1))
    for width in (18, 7):
        with pytest.raises(ValueError, match=f"must be a multiple of 4, got {width}"):
            head(width, (2, 2))


@pytest.mark.parametrize("queries", [0, -3])
def test_fewer_than_one_query_is_refused_with_its_value(queries):
    with pytest.raises(ValueError, match=f"queries={queries} is less than 1"):
        RelativeLabelHead(16, (2, 2), queries=queries)
