"""Tests of the training labels that an evaluation may use, of data digests, and of the view of images from files."""

import os
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from common.data import DataError, Loader, Split, open_data, sets
from common.data.augment import view_size
from common.data.sets import Paths


def split_of(*counts: int) -> Split:
    """Return a split with the given number of images per class, in files that do not exist."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    paths = [f"/data/train/{label}/{label}_{i}.png" for i, label in enumerate(labels.tolist())]
    return Split(labels, paths=paths, class_names=tuple(map(str, range(len(counts)))))


@pytest.fixture
def listing(tmp_path):
    """Return a function that writes a list file."""

    def write(*lines: str) -> Path:
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / "list.txt"

    return write


def counts(split: Split) -> list[int]:
    return torch.bincount(split.labels, minlength=split.classes).tolist()


# ---- fractions


def test_one_percent_of_imagenet_has_the_class_counts_of_the_papers_lists():
    imagenet = split_of(*[1282] * 167, *[1281] * 833)
    assert len(imagenet) == 1_281_167
    found = counts(imagenet.balanced(0.01, seed=0))
    assert sum(found) == 12_811 and (found.count(13), found.count(12)) == (811, 189)


def test_a_fraction_depends_only_on_the_seed_and_another_seed_draws_other_images():
    whole = split_of(*[40] * 10)
    first, again, other = (whole.balanced(0.13, seed) for seed in (0, 0, 1))
    assert first.paths == again.paths and len(first) == 52 and sorted(counts(first)) == [5] * 8 + [6] * 2
    assert first.paths != other.paths and counts(first) != counts(other)
    assert len(set(first.paths)) == 52 and first.paths == [path for path in whole.paths if path in first.paths]


def test_a_fraction_of_1_is_the_whole_split():
    assert split_of(7, 7, 7).balanced(1.0, 0).paths == split_of(7, 7, 7).paths


def test_a_fraction_too_small_or_too_large_for_a_class_is_refused():
    with pytest.raises(DataError, match="fraction of 0.1 is 2 of 20 labels, for 4 classes: .* 4 of 20"):
        split_of(5, 5, 5, 5).balanced(0.1, 0)
    with pytest.raises(DataError, match="class 1 has 2 images, fewer than 9: use at most 2"):
        split_of(30, 2).balanced(0.6, 0)


# ---- lists


def test_a_list_may_omit_the_class_and_keeps_the_order_of_the_data(listing):
    found = split_of(3, 3).listed(listing("1/1_4.png", "", "  0_2.png ", "0/0_0.png"))
    assert [Path(path).name for path in found.paths] == ["0_0.png", "0_2.png", "1_4.png"] and found.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0_0.png", "gone.png", "1/0_0.png"], "lists 2 of 3 images that are absent, the first is 'gone.png': use a list of this data"),
        ([], "lists no image: use a list"),
        (["0_1.png", "0/0_1.png"], "lists /data/train/0/0_1.png twice: delete"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_with_the_reason(lines, message, listing):
    with pytest.raises(DataError, match=message):
        split_of(3, 3).listed(listing(*lines))


def test_a_file_name_in_two_classes_must_be_listed_with_its_class(listing):
    both = Split(torch.tensor([0, 1]), paths=["/d/cat/1.png", "/d/dog/1.png"])
    assert both.listed(listing("dog/1.png")).labels.tolist() == [1]
    with pytest.raises(DataError, match="lists '1.png', and 2 images have this name: write class/file name"):
        both.listed(listing("1.png"))


def test_a_list_is_refused_for_images_without_names(listing):
    with pytest.raises(DataError, match="images of this data set have no names: use data in files, or no list"):
        open_data("digits").train.listed(listing("0.png"))


# ---- digests and identity


def test_a_digest_depends_on_labels_images_and_names_and_not_on_the_location():
    labels, images = torch.tensor([0, 1]), torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    memory = [Split(labels, images), Split(labels.flip(0), images), Split(labels, images.flip(0)), Split(labels, images.view(2, 1, 2, 8))]
    here, there, other = (
        Split(labels, paths=[f"{root}/{name}" for name in names])
        for root, names in [("/a/train", ("c/1.png", "d/2.png")), ("/b/x", ("c/1.png", "d/2.png")), ("/a/train", ("c/1.png", "d/3.png"))]
    )
    assert here.digest() == there.digest() == here.subset([0, 1]).digest()
    assert len({split.digest() for split in (*memory, here, other, here.subset([0]))}) == 7


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes with three training files and one validation file each; opening a data set decodes only the first one."""
    for part, count in (("train", 3), ("val", 1)):
        for name in ("ant", "bee"):
            (tmp_path / "one" / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "one" / part / name / f"{i}.png").write_bytes(f"{part} {name} {i}".encode() * 10)
    Image.new("RGB", (65, 65)).save(tmp_path / "one" / "train" / "ant" / "0.png")
    return tmp_path / "one"


def test_the_identity_of_data_does_not_depend_on_location_or_file_times(folder, tmp_path):
    found = open_data(str(folder)).identity
    assert {name: line.rsplit(", ", 1)[0] for name, line in found.items()} == {"train": "6 images, 2 classes", "val": "2 images, 2 classes"}
    assert all(len(line.rsplit(", ", 1)[1]) == 16 for line in found.values())
    copy = shutil.copytree(folder, tmp_path / "deep" / "er" / "two", copy_function=shutil.copyfile)
    os.utime(copy / "train" / "ant" / "0.png", (1, 1))
    assert open_data(str(copy)).identity == found
    assert open_data(os.path.relpath(copy)).identity == found


def replaced(folder: Path) -> None:
    (folder / "train" / "bee" / "1.png").write_bytes(b"train bee 2" * 10)  # of the same length


def longer(folder: Path) -> None:
    (folder / "train" / "bee" / "1.png").write_bytes(b"another image")


def renamed(folder: Path) -> None:
    (folder / "train" / "bee" / "1.png").rename(folder / "train" / "bee" / "9.png")


def grown(folder: Path) -> None:
    (folder / "train" / "bee" / "9.png").touch()


def moved(folder: Path) -> None:
    (folder / "train" / "bee" / "0.png").rename(folder / "train" / "ant" / "3.png")


def other_classes(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part / "bee").rename(folder / part / "cat")


@pytest.mark.parametrize(
    ("change", "limits", "noticed"),
    [
        *((change, {}, True) for change in (replaced, longer, renamed, grown, moved, other_classes)),
        (replaced, {"CONTENT_BYTES": 400}, False),
        (longer, {"CONTENT_BYTES": 400}, True),
        (longer, {"CONTENT_FILES": 5}, False),
        (renamed, {"CONTENT_FILES": 5}, True),
        (other_classes, {"CONTENT_FILES": 5}, True),
    ],
)
def test_a_change_of_the_training_images_changes_their_identity_as_documented(change, limits, noticed, folder, monkeypatch):
    for name, value in limits.items():
        monkeypatch.setattr(f"common.data.paths.{name}", value)
    before = open_data(str(folder)).identity
    change(folder)
    after = open_data(str(folder)).identity
    assert (before["train"] != after["train"]) == noticed
    assert (before["val"] != after["val"]) == (change is other_classes)


def test_a_subset_has_its_own_digest_that_depends_on_the_whole_split(folder):
    whole = open_data(str(folder)).train
    parts = [whole, whole.subset([0, 1]), whole.subset([1, 0]), whole.subset([0, 2]), replace(whole, labels=whole.labels.flip(0))]
    assert len({part.digest() for part in parts}) == 5
    assert whole.subset([4, 0, 1]).subset([1, 2]).digest() == parts[1].digest()
    before = parts[1].digest()
    replaced(folder)  # not in the subset, but the digest also depends on the whole split
    assert open_data(str(folder)).train.subset([0, 1]).digest() != before


def test_a_digest_includes_class_names_and_pixels():
    digits = open_data("digits")
    assert open_data("digits").identity == digits.identity
    renamed = replace(digits.train, class_names=tuple("abcdefghij"))
    changed = digits.train.images.clone()
    changed[700, 0, 3, 3] += 1
    assert len({split.digest() for split in (digits.train, renamed, replace(digits.train, images=changed), digits.val)}) == 4


def test_the_digest_of_imagenets_paths_takes_under_two_seconds_and_100_megabytes():
    split = split_of(*[1281] * 1000)
    tracemalloc.start()
    before = time.perf_counter()
    first = split.digest()
    taken, (_, peak) = time.perf_counter() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 2 and peak < 100e6
    before = time.perf_counter()
    assert split.digest() == first and time.perf_counter() - before < 0.01  # computed once


# ---- paths in one array


def test_paths_in_one_array_behave_like_a_list():
    names = [f"/data/train/{'ab'[i % 2]}/{i}.png" for i in range(70_000)]  # more than are encoded at once
    paths = Paths(names)
    assert len(paths) == 70_000 and paths.root == "/data/train/" and paths == names and [*paths] == names
    assert (paths[0], paths[65_536], paths[-1], paths[numpy.int64(5)]) == (names[0], names[65_536], names[-1], names[5])
    assert paths[10:70_000:7] == names[10::7] and paths[::-1][:3] == names[:-4:-1]
    chosen = torch.randperm(70_000)[:100]
    part = paths[chosen]
    assert part == [names[i] for i in chosen.tolist()] and part[numpy.array([3, 3])] == [part[3]] * 2
    assert part[-1] == names[chosen[-1]] and part + ["x"] == [*part, "x"] and names[7] in paths and paths.index(names[7]) == 7
    assert paths != names[:-1] and paths != [*names[:-1], "other"] and not paths[[]] and len(paths[[]]) == 0
    for index in (70_000, -70_001):
        with pytest.raises(IndexError):
            paths[index]
    with pytest.raises(IndexError):
        part[100]


@pytest.mark.parametrize("names", [[], ["a.png"], ["", "a"], ["/a", "/b"], ["a/b/c.png"], ["a/x y\n.png", "b/\u2028\x85"]])
def test_few_or_unusual_paths_are_kept_unchanged(names):
    assert Paths(names) == names and [*Paths(names)] == names
    assert len(Paths(names)) == len(names) and Paths(names).digest() == Paths(names)[:].digest()


def test_file_names_that_are_not_utf8_are_kept(tmp_path):
    odd = [os.fsdecode(name) for name in (b"\xff\xfe.png", "grün.png".encode(), "grün.png".encode("latin-1"))]
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name in odd:
        (tmp_path / "train" / "a" / name).touch()
    found = sets.scan_folder(tmp_path / "train", False)
    assert sorted(found.paths) == sorted(str(tmp_path / "train" / "a" / name) for name in odd)
    assert all(map(os.path.exists, found.paths))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe.png\n")
    assert found.listed(tmp_path / "list.txt").paths == [str(tmp_path / "train" / "a" / odd[0])]


def test_a_path_with_a_zero_byte_is_refused():
    with pytest.raises(DataError, match="is not a path: it contains a zero byte"):
        Split(torch.zeros(2), paths=["/d/a", "/d/b\0c"])


# ---- the view


def loader(split: Split, **options) -> Loader:
    data = open_data("digits")
    data.image_size, data.channels = None, 3
    settings = {"batch_size": 2, "augmentation": None, "seed": 0, "device": torch.device("cpu"), "workers": 0}
    return Loader(split, data=data, image_size=(96, 96), **settings, **options)


def test_resize_and_interpolation_determine_the_view_of_a_photo(tmp_path):
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (200, 300, 3), generator=g, dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "a.png")
    photo = Split(torch.tensor([0]), paths=[str(tmp_path / "a.png")])
    seen = {}
    for resize, mode in [(None, "bicubic"), (110, "bicubic"), (96, "bicubic"), (96, "bilinear"), (192, "bicubic")]:
        sees = loader(photo, resize=resize, interpolation=mode)
        assert (sees.view["resize"], sees.view["interpolation"]) == (str(resize or 109), mode)
        image = Image.fromarray(noise).resize((300 * (resize or 109) // 200, resize or 109), Image.Resampling[mode.upper()])
        left, top = round((image.width - 96) / 2), round((image.height - 96) / 2)
        pixels = torch.tensor(list(image.crop((left, top, left + 96, top + 96)).get_flattened_data())) / 255
        seen[resize, mode] = next(sees.epoch(0))[0] * sees.data.std[0] + sees.data.mean[0]
        torch.testing.assert_close(seen[resize, mode][0].permute(1, 2, 0).reshape(-1, 3), pixels, atol=1e-5, rtol=0)
    assert len({value.sum().item() for value in seen.values()}) == 5


def test_the_default_view_is_256_for_224_and_whole_for_small_or_equal_images():
    data = open_data("digits")
    assert view_size(data, (224, 224)) == (224, 224) and view_size(data, (224, 224), 256) == (256, 256)
    data.image_size = None
    assert view_size(data, (224, 224)) == (256, 256) and view_size(data, (64, 64)) == (64, 64)
    assert view_size(data, (96, 192), 128) == (128, 256)


def test_a_resize_below_the_models_size_or_of_images_in_memory_is_refused():
    with pytest.raises(DataError, match="resized to 95 pixels, smaller than the 96 pixels of the model: choose a larger"):
        loader(split_of(3), resize=95)
    with pytest.raises(DataError, match="resized to 128 pixels, but all have one size"):
        loader(open_data("digits").train, resize=128)
