"""Tests of label propagation: scores of known masks, a shape that moves, and what is refused."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from benchmarks import propagation
from benchmarks.propagation import (
    Options,
    boundary,
    decided,
    find_videos,
    first_shares,
    main,
    measure,
    outline,
    propagate,
    region,
    run,
)
from common.data import DataError

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
SMALL = ["--paper", "mae", "--recipe", "cifar10", "--set", "size=micro", "--set", "encoder.depth=2", "--device", "cpu"]


def square(top: int, left: int, side: int = 20, size: tuple[int, int] = (100, 120)) -> numpy.ndarray:
    mask = numpy.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_region_and_boundary_of_known_masks():
    one, moved, empty = square(10, 10), square(10, 20), square(0, 0, 0)
    assert region(one, one) == boundary(one, one) == 1 and region(empty, empty) == boundary(empty, empty) == 1
    assert region(one, moved) == pytest.approx(200 / 600)
    assert region(one, empty) == boundary(one, empty) == boundary(empty, one) == 0
    assert boundary(one, square(10, 12)) == 1  # the tolerance is 2 pixels: 0.008 of a diagonal of 156
    far = boundary(one, square(13, 13))
    assert 0 < far < 1 and far == boundary(square(13, 13), one)
    assert boundary(one, square(60, 60)) == 0
    assert outline(one).sum() == 80  # a ring of one pixel: the last row and column of the square, and those before its first ones


def test_objects_follow_their_features_and_do_not_jump_beyond_the_radius():
    grid, options = (6, 8), Options(data=Path(), radius=2, neighbours=1)
    torch.manual_seed(0)
    feature_ND = torch.nn.functional.normalize(torch.randn(48, 32), dim=1)
    first_NK = torch.nn.functional.one_hot(torch.arange(48) % 3, 3).float()
    rolled = feature_ND.view(*grid, -1).roll(1, 1).flatten(0, 1)  # all patches move one to the right
    (found,) = propagate([feature_ND, rolled], first_NK, grid, options)
    wanted = first_NK.view(*grid, -1).roll(1, 1)
    assert torch.equal(found.view(*grid, -1)[:, 1:], wanted[:, 1:])  # the first column comes from the other side: too far
    assert not torch.equal(found.view(*grid, -1)[:, 0], wanted[:, 0])


def test_a_patch_of_the_first_frame_has_the_object_at_its_middle():
    objects_HW = numpy.zeros((12, 12), numpy.uint8)
    objects_HW[:4, :] = 7  # the middle of the upper patches is at 3
    objects_HW[:, 10:] = 3  # the middle of the right patches is at 9
    assert first_shares(objects_HW, [0, 3, 7], (2, 2)).tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0], [1, 0, 0]]


def test_the_map_of_each_object_is_scaled_to_one_before_they_are_compared():
    share_KHW = torch.tensor([[[0.9, 0.8, 0.6]], [[0.1, 0.2, 0.4]], [[0.0, 0.0, 0.0]]])
    assert decided(share_KHW).tolist() == [[0, 0, 1]]  # of 0.6 against 0.4 remain 0 and 1
    assert decided(torch.tensor([[[0.7, 0.7]], [[0.3, 0.3]]])).tolist() == [[0, 0]]  # constant maps stay


def test_the_videos_of_davis_are_those_of_its_list(tmp_path):
    for name in ("bear", "cows", "dog"):
        for kind, ending in (("JPEGImages", "jpg"), ("Annotations", "png")):
            (tmp_path / kind / "480p" / name).mkdir(parents=True)
            for index in range(2):
                Image.new("L", (8, 8)).save(tmp_path / kind / "480p" / name / f"{index}.{ending}")
    assert [video.name for video in find_videos(tmp_path)] == ["bear", "cows", "dog"]
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("dog\nbear\n")
    assert [video.name for video in find_videos(tmp_path)] == ["dog", "bear"]
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("dog\nlost\n")
    with pytest.raises(DataError, match="val.txt names 2 videos, and 1 are not in .*, the first is lost"):
        find_videos(tmp_path)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("")
    with pytest.raises(DataError, match="has no video: .*val.txt is empty"):
        find_videos(tmp_path)


def test_too_little_memory_says_what_to_lower(monkeypatch, capsys):
    monkeypatch.setattr(propagation, "run", lambda _: torch.empty(10**15))
    assert main([*SMALL, "--data", "."]) == 2
    assert "lower --short-side" in " ".join(capsys.readouterr().out.split())


def test_the_context_is_the_first_frame_and_the_last_ones():
    grid, feature_ND = (2, 2), torch.eye(4)
    first_NK = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    for context in (0, 1, 7):
        found = list(propagate([feature_ND] * 4, first_NK, grid, Options(data=Path(), context=context, neighbours=1)))
        assert len(found) == 3 and all(torch.equal(one, first_NK) for one in found)


@pytest.fixture
def video(tmp_path):
    """A red and a blue shape that move over a textured background, on six frames of 96 x 128 pixels."""
    noise = numpy.random.default_rng(0).integers(0, 60, (96, 128, 3)).astype(numpy.uint8)
    for kind in ("frames", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(6):
        pixels, mask = noise.copy(), numpy.zeros((96, 128), numpy.uint8)
        for number, (top, left, colour) in enumerate([(16, 8 + 8 * index, (255, 30, 30)), (56, 88 - 8 * index, (40, 60, 255))], 1):
            mask[top : top + 24, left : left + 24] = number
            pixels[top : top + 24, left : left + 24] = colour
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{index:03}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index:03}.png")
    return tmp_path


def test_two_moving_shapes_are_followed_by_an_encoder_that_was_never_trained(video, tmp_path, capsys):
    given = [*SMALL, "--data", str(video), "--short-side", "96", "--out", str(tmp_path / "found")]
    assert main(given) == 0
    last = numpy.asarray(Image.open(tmp_path / "found" / video.name / "005.png"))
    true = numpy.asarray(Image.open(video / "masks" / "005.png"))
    assert set(numpy.unique(last)) == {0, 1, 2} and all(region(last == k, true == k) > 0.6 for k in (1, 2))
    still = numpy.asarray(Image.open(video / "masks" / "000.png"))
    assert region(still == 1, true == 1) == 0  # a mask that stays where it was would be wrong
    assert "J and F" in capsys.readouterr().out


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"{CAMVID} is not there")
def test_objects_are_followed_in_frames_that_are_cut_from_a_photograph(tmp_path):
    name = sorted((CAMVID / "masks" / "val").iterdir())[0].stem
    image = Image.open(next((CAMVID / "images" / "val").glob(f"{name}.*")))
    classes = numpy.asarray(Image.open(CAMVID / "masks" / "val" / f"{name}.png"))
    mask = Image.fromarray(((classes == 1) + 2 * (classes == 5) + 3 * (classes == 0)).astype(numpy.uint8))  # building, tree, sky
    for kind in ("frames", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(5):  # the camera turns by 8 pixels a frame
        box = (100 + 8 * index, 100, 356 + 8 * index, 292)
        image.crop(box).save(tmp_path / "frames" / f"{index}.png")
        mask.crop(box).save(tmp_path / "masks" / f"{index}.png")
    small = ["size=micro", "encoder.depth=2", "patch_size=8"]
    ((j, f),) = run(Options(data=tmp_path, paper="mae", recipe="cifar10", set=small, device="cpu", short_side=192)).values()
    masks = [numpy.asarray(Image.open(tmp_path / "masks" / f"{index}.png")) for index in range(5)]
    still = 100 * numpy.mean([measure(masks[0] == k, true == k) for true in masks[1:] for k in (1, 2, 3)], 0)
    assert j > still[0] + 15 and f > still[1] + 15


def test_wrong_input_is_named(video, capsys):
    with pytest.raises(DataError, match="has neither JPEGImages/480p"):
        run(Options(data=video / "frames", paper="mae"))
    Image.new("L", (128, 96)).save(video / "masks" / "000.png")
    with pytest.raises(DataError, match="000.png has no object: all pixels are 0"):
        run(Options(data=video, paper="mae", recipe="cifar10", device="cpu"))
    (video / "masks" / "000.png").unlink()
    with pytest.raises(DataError, match="000.png is missing: the first frame needs a mask"):
        run(Options(data=video, paper="mae", recipe="cifar10", device="cpu"))
    assert main([*SMALL, "--data", str(video), "--short-side", "2"]) == 2
