"""Tests of multi-block masks: possible blocks, their sizes, and that `released` equals the official code, including its quirks."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from common.masking import MultiBlock

GRID, CELLS = (14, 14), 196


def draw(masks: MultiBlock, images: int, steps: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [masks(images, step) for step in range(steps)]


def size(block_T: Tensor, columns: int) -> tuple[int, int]:
    """Return height and width of a block; it must be a full rectangle in row-major order."""
    rows, cols = block_T // columns, block_T % columns
    height, width = int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1
    rectangle = [(int(rows[0]) + i) * columns + int(cols[0]) + j for i in range(height) for j in range(width)]
    assert block_T.tolist() == rectangle
    return height, width


# ---- uniform


def test_uniform_every_patch_is_context_and_target_of_some_image():
    drawn = draw(MultiBlock(GRID), 64, 60)
    contexts = torch.cat([context.flatten() for context, _ in drawn]).bincount(minlength=CELLS)
    targets = torch.cat([blocks.flatten() for _, blocks in drawn]).bincount(minlength=CELLS)
    assert contexts.min() > 100 and targets.min() > 100
    first, last = (contexts.view(GRID)[row].float().mean().item() for row in (0, -1))
    assert last == pytest.approx(first, rel=0.1)


@pytest.mark.parametrize("images", [1, 2, 64])
def test_uniform_contexts_are_a_quarter_of_the_patches_at_any_batch_size(images):
    for context, blocks in draw(MultiBlock(GRID), images, 20):
        assert context.shape == (images, 49) and blocks.shape[:2] == (4, images)
        assert (context.diff(dim=1) > 0).all()


def test_uniform_contexts_and_targets_are_disjoint():
    for context, blocks in draw(MultiBlock(GRID), 64, 60):
        assert not (context[:, :, None] == blocks.transpose(0, 1).flatten(1)[:, None]).any()


def test_the_context_overlaps_the_targets_only_as_much_as_its_size_requires():
    masks = MultiBlock((6, 6), context_ratio=0.7)  # 25 of 36 patches, and four blocks of six
    for context, blocks in draw(masks, 32, 10):
        for cells, targets in zip(context, blocks.transpose(0, 1), strict=True):
            taken = set(targets.flatten().tolist())
            assert len(set(cells.tolist()) & taken) == max(0, 25 - (36 - len(taken)))


def test_uniform_targets_have_exactly_the_sizes_that_scale_and_aspect_allow():
    sizes = Counter(size(block, 14) for _, blocks in draw(MultiBlock(GRID), 1, 80) for block in blocks[:, 0])
    allowed = {(h, w) for h, w in itertools.product(range(1, 15), repeat=2) if 0.15 <= h * w / 196 <= 0.2 and 0.75 <= h / w <= 1.5}
    assert set(sizes) == allowed == {(5, 6), (6, 5), (6, 6), (7, 5)}


def test_block_sizes_depend_on_the_step_and_block_positions_on_the_generator():
    masks = MultiBlock(GRID)
    first, second = draw(masks, 8, 12, seed=0), draw(masks, 8, 12, seed=1)
    assert [blocks.shape for _, blocks in first] == [blocks.shape for _, blocks in second]
    assert len({blocks.shape[2] for _, blocks in first}) > 1
    assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_blocks_of_a_grid_that_is_not_square_have_the_aspect_of_the_grid():
    for context, blocks in draw(MultiBlock((8, 16), context_ratio=0.2), 4, 20):
        assert context.max() < 128 and context.shape == (4, 25)
        height, width = size(blocks[0, 0], 16)
        assert 0.15 <= height * width / 128 <= 0.2 and 0.75 <= height / width * 2 <= 1.5


# ---- released


def official(grid: tuple[int, int], images: int, counter: int, min_keep: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The official rule, image by image: return the contexts and the four target blocks of each image."""
    own = torch.Generator().manual_seed(counter)
    sizes = []
    for scale, aspect in (((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))):
        draw = torch.rand(1, generator=own).item()
        area, ratio = int(math.prod(grid) * (scale[0] + draw * (scale[1] - scale[0]))), aspect[0] + draw * (aspect[1] - aspect[0])
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        sizes.append((min(height, grid[0] - 1), min(width, grid[1] - 1)))

    def block(height: int, width: int) -> list[int]:
        top = int(torch.randint(0, grid[0] - height, (1,)))
        left = int(torch.randint(0, grid[1] - width, (1,)))
        return [row * grid[1] + column for row in range(top, top + height) for column in range(left, left + width)]

    contexts, targets = [], []
    for _ in range(images):
        blocks = [block(*sizes[0]) for _ in range(4)]
        tries = 0
        while True:
            avoided = set(sum(blocks[: max(4 - tries // 20, 0)], []))
            context = [cell for cell in block(*sizes[1]) if cell not in avoided]
            if len(context) > min_keep:
                break
            tries += 1
        contexts.append(context)
        targets.append(blocks)
    shortest = min(map(len, contexts))
    return [context[:shortest] for context in contexts], targets


@pytest.mark.parametrize(("grid", "min_keep", "images"), [((14, 14), 10, 5), ((14, 14), 60, 7), ((8, 8), 8, 40), ((12, 9), 12, 16)])
def test_released_masks_follow_the_official_rule_including_redraws(grid, min_keep, images):
    masks = MultiBlock(grid, sampling="released", min_keep=min(min_keep, 10))
    masks.min_keep = min_keep  # larger than a target: contexts are redrawn, and some targets are no longer avoided
    for step in range(6):
        torch.manual_seed(step)
        contexts, targets = official(grid, images, step, min_keep)
        after = torch.rand(1)
        torch.manual_seed(step)
        context, blocks = masks(images, step)
        assert context.tolist() == contexts and blocks.transpose(0, 1).tolist() == targets
        assert torch.equal(torch.rand(1), after)  # the generator ends in the same state as in the official code


def test_released_masks_never_touch_the_last_row_and_column():
    for context, blocks in draw(MultiBlock(GRID, sampling="released"), 64, 60):
        for cells in (context, blocks):
            assert cells.max() < 182 and (cells % 14).max() < 13


@pytest.mark.parametrize(("images", "mean", "low", "high"), [(64, 53.6, 34, 67), (1, 81.6, 45, 118)])
def test_released_contexts_get_shorter_with_a_larger_batch(images, mean, low, high):
    lengths = [context.shape[1] for context, _ in draw(MultiBlock(GRID, sampling="released"), images, 60 if images > 1 else 600)]
    assert sum(lengths) / len(lengths) == pytest.approx(mean, abs=1.5)
    assert low - 4 <= min(lengths) and max(lengths) <= high + 4


def test_released_target_sizes_have_the_official_frequencies():
    masks = MultiBlock(GRID, sampling="released")
    sizes = Counter(size(masks(1, step)[1][0, 0], 14) for step in range(2000))
    percentages = {(5, 6): 26.8, (6, 5): 12.8, (6, 6): 21.4, (7, 5): 36.5, (8, 5): 2.6}
    assert set(sizes) == set(percentages)
    assert all(100 * sizes[key] / 2000 == pytest.approx(percent, abs=3) for key, percent in percentages.items())


# ---- impossible grids and values


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ((4, 4), {}, r"target_scale=\(0.15, 0.2\): a grid of 4 x 4 .* nearest is 2 x 2: .* target_scale=\(0.15, 0.25\)"),
        ((14, 14), {"context_scale": (0.88, 0.9)}, r"context_scale=\(0.88, 0.9\).* nearest is 13 x 13: .*context_scale=\(0.862, 0.9\)"),
        ((14, 14), {"context_ratio": 0.9}, r"context_ratio=0.9 of 196 cells, of which one target takes up to 36: use 0.0051 to 0.816"),
        ((14, 14), {"context_ratio": 0.001}, "context_ratio=0.001"),
        ((14, 14), {"target_scale": (0.2, 0.15)}, r"target_scale=\(0.2, 0.15\) is not a range"),
        ((14, 14), {"target_scale": (0.2, 1.5)}, r"target_scale=\(0.2, 1.5\) is not a range"),
        ((14, 14), {"sampling": "random"}, "masks='random' is not known"),
        ((8, 8), {"sampling": "released"}, "min_keep=10: on a grid of 8 x 8 cells some blocks have only 3 x 3.* use min_keep=8 or less"),
        ((4, 4), {"sampling": "released"}, "min_keep=10: on a grid of 4 x 4 .* use min_keep=0 or less, or masks='uniform'"),
    ],
)
def test_an_impossible_grid_or_value_is_refused_with_values_that_fit(grid, options, message):
    with pytest.raises(ValueError, match=message):
        MultiBlock(grid, **options)


def test_the_values_suggested_by_an_error_message_work():
    assert MultiBlock((4, 4), target_scale=(0.15, 0.25))(3, 0)[1].shape == (4, 3, 4)
    assert MultiBlock((8, 8), sampling="released", min_keep=8)(3, 0)[1].shape[:2] == (4, 3)
