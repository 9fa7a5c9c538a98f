"""Tests of folders of small images of one size, which are loaded into memory."""

import logging
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from common.data import Augmentation, Data, DataError, Loader, open_data, sets

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10.tar.xz"


def draw(path: Path, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> numpy.ndarray:
    """Write an image of noise; return its pixels (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, f"{path.parent.name}/{path.name}"))
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path)
    return numpy.asarray(image.convert("RGB"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with four training and two validation images each, all of 20 x 16 pixels; one is grey."""
    for part, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            for i in range(count):
                draw(tmp_path / part / name / f"{i}.png", mode="L" if (name, i) == ("bee", 1) else "RGB")
    return tmp_path


def batches(data: Data, augmentation: Augmentation | None = None, workers: int = 0) -> list:
    options: dict = {"image_size": (16, 16), "batch_size": 4, "seed": 0, "device": torch.device("cpu"), "workers": workers}
    return list(Loader(data.train, data=data, augmentation=augmentation, **options).epoch(0))


def in_files(folder: Path, skip_corrupt: bool = False) -> Data:
    """The same data set, read from its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "SMALL_BYTES", 0)
        return open_data(str(folder), skip_corrupt=skip_corrupt)


def test_small_images_of_one_size_are_held_in_memory_as_rgb_with_their_own_mean_and_std(folder):
    data, files = open_data(str(folder)), in_files(folder)
    assert data.image_size == (16, 20) and data.channels == 3 and data.name == files.name == folder.name
    assert data.train.images.shape == (8, 3, 16, 20) and data.val.images.shape == (4, 3, 16, 20)
    assert data.train.paths == files.train.paths and torch.equal(data.train.labels, files.train.labels)
    for image, path in zip(data.train.images, data.train.paths, strict=True):
        assert torch.equal(image, torch.from_numpy(numpy.array(Image.open(path).convert("RGB"))).permute(2, 0, 1))
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist()) and data.mean != files.mean
    assert data.std == pytest.approx(pixels.transpose(0, 1).flatten(1).std(1, correction=0).tolist())
    assert files.train.images is None and files.image_size is None


@pytest.mark.parametrize("where", ["train/ant/2.png", "train/bee/3.png", "val/bee/1.png"])
def test_a_folder_with_an_image_of_another_size_is_read_from_its_files(where, folder):
    draw(folder / where, (21, 16))
    data = open_data(str(folder))
    assert data.train.images is None and data.val.images is None and data.image_size is None
    assert data.identity == in_files(folder).identity


def test_larger_images_and_larger_folders_stay_in_files_and_only_the_first_image_is_decoded(folder, monkeypatch):
    read = []
    monkeypatch.setattr(sets, "read_image", lambda path: read.append(path) or Image.new("RGB", (65, 40)))
    monkeypatch.setattr(sets, "load_images", None)
    assert open_data(str(folder)).train.images is None and len(read) == 1
    monkeypatch.undo()
    total = 12 * 3 * 20 * 16
    for limit, held in ((total, True), (total - 1, False)):
        monkeypatch.setattr(sets, "SMALL_BYTES", limit)
        assert (open_data(str(folder)).train.images is not None) == held


@pytest.mark.parametrize("where", ["train/ant/0.png", "train/bee/2.png", "val/bee/1.png"])
def test_an_unreadable_small_image_is_named_when_the_folder_is_opened(where, folder):
    (folder / where).write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{where} cannot be read as an image"):
        open_data(str(folder))


def test_with_skip_corrupt_memory_holds_what_files_would_give(folder, caplog):
    for name in ("ant/0.png", "ant/3.png", "bee/3.png"):
        (folder / "train" / name).write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        data = open_data(str(folder), skip_corrupt=True)
    assert sorted(record.args[0][-9:] for record in caplog.records) == ["ant/0.png", "ant/3.png", "bee/3.png"]
    files = in_files(folder, skip_corrupt=True)
    files = replace(files, mean=data.mean, std=data.std, image_size=data.image_size)
    seen, expected = (batches(data), batches(files))
    assert torch.equal(torch.cat([labels for _, labels in seen]), torch.cat([labels for _, labels in expected]))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]  # the class of the replacement; after the last image comes the first
    assert torch.equal(data.train.images[7], data.train.images[1]) and torch.equal(data.train.images[3], data.train.images[4])


def test_a_folder_in_which_no_image_can_be_read_reports_so_with_skip_corrupt(folder):
    for path in folder.glob("train/*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 8 images can be read"):
        batches(open_data(str(folder), skip_corrupt=True))


def test_lists_of_labels_select_images_in_memory_by_file_name(folder, tmp_path):
    (tmp_path / "list.txt").write_text("bee/2.png\nant/1.png\n")
    data = open_data(str(folder))
    few = data.train.listed(tmp_path / "list.txt")
    assert few.labels.tolist() == [0, 1] and torch.equal(few.images, data.train.images[[1, 6]]) and len(few.paths) == 2


def test_the_identity_of_images_in_memory_is_that_of_their_pixels(folder, tmp_path_factory):
    before = open_data(str(folder)).identity
    elsewhere = tmp_path_factory.mktemp("other") / "name"
    folder.rename(elsewhere)
    assert open_data(str(elsewhere)).identity == before
    Image.open(elsewhere / "train/ant/1.png").save(elsewhere / "train/ant/1.png", compress_level=0)  # another file, the same pixels
    assert open_data(str(elsewhere)).identity == before
    draw(elsewhere / "train" / "ant" / "1.png", mode="L")
    after = open_data(str(elsewhere)).identity
    assert after["train"] != before["train"] and after["val"] == before["val"]


@pytest.mark.parametrize("workers", [0, 2])
def test_randaugment_of_a_small_folder_needs_no_files(workers, folder):
    data = open_data(str(folder))
    for path in folder.glob("*/*/*.png"):
        path.unlink()
    for images, _ in batches(data, Augmentation(randaugment="rand-m9"), workers):
        assert images.shape == (4, 3, 16, 16)


def test_a_channel_of_one_value_is_centred_and_not_divided_by_zero(folder):
    for path in folder.glob("*/*/*.png"):
        Image.new("RGB", (20, 16), (int(path.stem) * 50, 7, 0)).save(path)
    data = open_data(str(folder))
    assert data.std[1:] == (1.0, 1.0) and data.std[0] > 0.1
    assert all(images.isfinite().all() for images, _ in batches(data))


@pytest.mark.skipif(not CIFAR.is_file(), reason="needs cifar10.tar.xz beside the repository, under shared/data")
def test_a_part_of_cifar10_in_files_is_loaded_as_its_pixels(tmp_path):
    with tarfile.open(CIFAR, mode="r|xz") as archive:
        for member in islice((member for member in archive if member.name.endswith(".jpg")), 300):
            part, name, file = Path(member.name).parts[-3:]
            target = tmp_path / "train" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.extractfile(member).read())
    for name in (tmp_path / "train").iterdir():  # the archive may begin with one class
        (tmp_path / "test" / name.name).mkdir(parents=True)
        for file in sorted(name.iterdir())[:5]:
            file.rename(tmp_path / "test" / name.name / file.name)
    data = open_data(str(tmp_path))
    assert data.image_size == (32, 32) and data.train.images.shape[1:] == (3, 32, 32) and len(data.train) + len(data.val) == 300
    assert all(0.3 < mean < 0.7 for mean in data.mean) and all(0.1 < std < 0.4 for std in data.std)
    for index in (0, len(data.val) - 1):
        pixels = numpy.asarray(Image.open(data.val.paths[index]).convert("RGB"))
        assert torch.equal(data.val.images[index], torch.tensor(pixels).permute(2, 0, 1))
