"""Tests of position embeddings and position targets."""

import math
from decimal import Decimal

import pytest
import torch
from timm.models.swin_transformer import get_relative_position_index

from common.positions import absolute_targets, relative_targets, resize_positions, sincos_2d, smoothed_targets

GRIDS = [(14, 14), (4, 4), (2, 3), (5, 1), (1, 1)]

# 224/16, printed by the official formulas: sigma, variant, S at CELLS, then the sums of row 0 and row 195.
CELLS = [(0, 0), (0, 1), (0, 14), (0, 16), (77, 77), (77, 91), (77, 93), (195, 195)]
VARIANTS = {
    "released": {"normalise": "columns", "assumed_side": 16},
    "columns": {"normalise": "columns"},
    "paper": {},
}
GOLDEN = """
1.0 released .520324 .151274 0 .151274 .318266 .00214431 .117084 .318244 .886331 .659234
1.0 columns .520324 .151274 .151274 .002167 .318244 .117075 .00214431 .520324 .886331 .886331
1.0 paper .520324 .191417 .191417 .00350592 .318244 .117075 .00214431 .520324 1 1
0.5 released .964351 .017351 0 .0173506 .930575 1.92e-9 .0170441 .930575 .999364 .965287
0.5 paper .964351 .017663 .0176627 1.99e-9 .930575 .0170441 1.92e-9 .964351 1 1
"""


def printed(digits: str) -> object:
    """Match values that round to the printed digits, within two float32 units; a 0 or 1 without a point must match exactly."""
    half_digit = 0.5 * 10 ** Decimal(digits).as_tuple().exponent if "." in digits else 0
    return pytest.approx(float(digits), rel=0, abs=half_digit + 2 * 2**-23 * float(digits))


# ---- embeddings


def test_sine_cosine_at_row_0_column_1_has_the_known_values():
    expected = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01), 0, 0, 1, 1]
    assert sincos_2d((2, 3), 8)[1].tolist() == pytest.approx(expected, abs=1e-7)


def test_sine_cosine_encodes_the_column_then_the_row_with_decreasing_frequencies():
    table = sincos_2d((3, 5), 16)
    assert table.shape == (15, 16) and table.dtype == torch.float32
    for cell in range(15):
        row, column = divmod(cell, 5)
        expected = [f(axis / 10_000 ** (k / 4)) for axis in (column, row) for f in (math.sin, math.cos) for k in range(4)]
        assert table[cell].tolist() == pytest.approx(expected, abs=1e-6), cell


def test_every_position_has_a_distinct_sine_cosine_embedding():
    table = sincos_2d((14, 14), 768).double()
    distance = torch.cdist(table, table).fill_diagonal_(math.inf)
    assert distance.min() > 1


def test_a_width_that_is_not_a_multiple_of_four_is_refused():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_2d((2, 2), 6)


def test_resizing_to_the_same_grid_changes_nothing():
    table = torch.randn(1, 1 + 6, 8)
    assert torch.equal(resize_positions(table, (2, 3), (2, 3), prefix_tokens=1), table)


def test_resizing_keeps_the_prefix_and_interpolates_the_grid():
    table = torch.randn(1, 2 + 16, 8)
    resized = resize_positions(table, (4, 4), (6, 8), prefix_tokens=2)
    assert resized.shape == (1, 2 + 48, 8)
    assert torch.equal(resized[:, :2], table[:, :2])
    assert resized[:, 2:].mean((0, 1)).tolist() == pytest.approx(table[:, 2:].mean((0, 1)).tolist(), abs=0.1)


def test_resizing_does_not_exchange_rows_and_columns():
    row, column = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).unbind(1)
    resized = resize_positions(torch.stack([row, column], 1)[None], (4, 4), (3, 8), prefix_tokens=0)[0].view(3, 8, 2)
    assert (resized[1:, :, 0] > resized[:-1, :, 0]).all() and torch.allclose(resized[:, :1, 0], resized[..., 0], atol=1e-5)
    assert (resized[:, 1:, 1] > resized[:, :-1, 1]).all() and torch.allclose(resized[:1, :, 1], resized[..., 1], atol=1e-5)


# ---- absolute and relative targets


def test_absolute_targets_number_the_patches_in_row_major_order():
    assert absolute_targets((2, 3)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("grid", GRIDS)
def test_relative_targets_equal_those_of_timms_swin(grid):
    assert torch.equal(relative_targets(grid), get_relative_position_index(*grid))


@pytest.mark.parametrize("grid", [(14, 14), (2, 3), (5, 1)])
def test_two_pairs_have_the_same_relative_target_if_and_only_if_the_offset_is_equal(grid):
    height, width = grid
    classes = relative_targets(grid)
    class_of_offset = {}
    for i in range(height * width):
        for j in range(height * width):
            offset = (i // width - j // width, i % width - j % width)
            class_of_offset.setdefault(offset, set()).add(int(classes[i, j]))
    assert all(len(found) == 1 for found in class_of_offset.values())
    assert set.union(*class_of_offset.values()) == set(range((2 * height - 1) * (2 * width - 1)))


# ---- smoothed targets


@pytest.mark.parametrize("line", GOLDEN.split("\n")[1:-1], ids=lambda line: "-".join(line.split()[:2]))
def test_smoothed_targets_equal_the_values_of_the_official_formulas(line):
    sigma, variant, *values = line.split()
    table = smoothed_targets((14, 14), float(sigma), **VARIANTS[variant])
    found = [table[cell].item() for cell in CELLS] + table.sum(1)[[0, 195]].tolist()
    assert table.shape == (196, 196)
    assert found == [printed(value) for value in values]


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (5, 1)])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_smoothed_targets_equal_the_closed_form_on_the_true_grid(grid, sigma, distance):
    cells = [divmod(cell, grid[1]) for cell in range(grid[0] * grid[1])]
    power = 1 if distance == "squared" else 0.5
    for y, (row, column) in enumerate(cells):
        weight = [math.exp(-(((row - r) ** 2 + (column - c) ** 2) ** power) / sigma**2) for r, c in cells]
        expected = [w / sum(weight) for w in weight]
        assert smoothed_targets(grid, sigma, distance=distance)[y].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("distance", ["squared", "euclidean"])
def test_every_smoothed_target_is_a_distribution_with_its_maximum_at_the_true_position(grid, sigma, distance):
    table = smoothed_targets(grid, sigma, distance=distance)
    torch.testing.assert_close(table.sum(1), torch.ones(len(table)), atol=1e-6, rtol=0)
    assert torch.equal(table.argmax(1), torch.arange(len(table))) and (table >= 0).all()


@pytest.mark.parametrize("options", [{}, {"distance": "euclidean"}, *VARIANTS.values()])
def test_without_smoothing_every_target_is_one_hot(options):
    assert torch.equal(smoothed_targets((14, 14), 0.0, **options), torch.eye(196))


def test_a_negative_sigma_is_refused():
    with pytest.raises(ValueError, match="sigma=-0.5 .*negative"):
        smoothed_targets((4, 4), -0.5)


def test_an_assumed_grid_with_too_few_cells_is_refused():
    with pytest.raises(ValueError, match="assumed_side=3 .* 4 x 4"):
        smoothed_targets((4, 4), 1.0, assumed_side=3)
