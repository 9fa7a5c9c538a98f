"""Tests of the timing of loaders: both loaders do the same work."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.speed.input import AUGMENTATION, main, make_loaders, measure
from common.data import open_data

COLOURS = [(200, 30, 90), (0, 255, 128), (77, 77, 77), (255, 255, 0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One colour per class, so that a crop has the colour of its image: four classes of three photographs."""
    for part in ("train", "val"):
        for number, colour in enumerate(COLOURS):
            (tmp_path / part / str(number)).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (100 + i, 80), colour).save(tmp_path / part / str(number) / f"{i}.png")
    return tmp_path


def test_both_loaders_give_the_same_images_in_the_same_format(folder):
    data = open_data(str(folder))
    loaders = make_loaders(str(folder), torch.device("cpu"), workers=1, images=12, batch=4, size=32)
    seen = {}
    for name, epoch in loaders.items():
        batches = list(epoch())
        assert [images.shape for images, _ in batches] == [(4, 3, 32, 32)] * 3
        assert all(images.dtype == torch.float32 and images.is_contiguous() for images, _ in batches)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.bincount(labels).tolist() == [3] * 4
        expected = (torch.tensor(COLOURS) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
        torch.testing.assert_close(images, expected[labels][:, :, None, None].expand_as(images), atol=1e-5, rtol=0)
        seen[name] = labels
    assert seen.keys() == {"ours", "torchvision"} and AUGMENTATION.crop == "resized"


def test_both_loaders_read_the_same_part_of_a_large_folder(folder):
    loaders = make_loaders(str(folder), torch.device("cpu"), workers=0, images=4, batch=4, size=32)
    for epoch in loaders.values():
        ((_, labels),) = epoch()
        assert sorted(labels.tolist()) == [0, 1, 2, 3]


def test_the_loaders_take_turns_over_whole_epochs():
    calls = []

    def epoch(name):
        calls.append(name)
        return [(None, torch.zeros(8))] * 2

    rates = measure({name: lambda name=name: epoch(name) for name in ("a", "b")}, torch.device("cpu"), images=20, turns=2)
    assert calls == ["a", "b"] + ["a", "a", "b", "b"] * 2  # the first turn is not timed
    assert [len(found) for found in rates.values()] == [2, 2] and min(map(min, rates.values())) > 0


def test_the_command_prints_both_loaders_and_refuses_what_cannot_be_timed(folder, capsys):
    fast = ["--turns", "1", "--images", "8", "--batch", "4", "--size", "32"]
    assert main([str(folder), "--workers", "1", *fast]) == 0
    assert "ratio" in capsys.readouterr().out
    for arguments, message in (
        (["no/such/folder"], "neither a data set nor a folder"),
        ([str(folder), "--workers", "0"], "--workers [0]: give whole numbers from 1 up"),
        ([str(folder), "--batch", "64"], "12 training images are fewer than one effective batch of 64"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in " ".join(capsys.readouterr().err.split())
