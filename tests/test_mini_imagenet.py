"""Tests of Mini-ImageNet, which has no official training and validation split."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.data import Data, DataError, Split, open_data, sets

CLASSES = ("ant", "ant-lion", "bee, honey")  # "ant-lion/" sorts before "ant/" as a path, but not as a name; a comma needs quoting
SPLIT = "mini-imagenet-split.csv"


def fill(root: Path, classes: tuple[str, ...] = CLASSES, images: int = 6) -> Path:
    for name in classes:
        (root / "mini-imagenet" / name).mkdir(parents=True)
        for i in range(images):
            (root / "mini-imagenet" / name / f"{i}.jpg").touch()  # opening a data set decodes no image
    return root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of six images, five of them for training; creating 60,000 files would be slow."""
    for name, count in (("CLASSES", 3), ("IMAGES", 6), ("TRAIN", 5)):
        monkeypatch.setattr(sets, f"MINI_{name}", count)
    return fill(tmp_path / "one")


def open_mini(root: Path, **options) -> Data:
    return open_data("mini-imagenet", root=root, **options)


def members(root: Path, split: Split) -> list[str]:
    return [Path(path).relative_to(root / "mini-imagenet").as_posix() for path in split.paths]


def test_each_class_is_split_into_500_training_and_100_validation_images(tmp_path, monkeypatch):
    (tmp_path / "mini-imagenet").mkdir()
    names = tuple(f"n{number:08d}" for number in range(100))
    paths = [str(tmp_path / "mini-imagenet" / name / f"{name}{i:08d}.jpg") for name in names for i in range(600)]
    whole = Split(torch.arange(100).repeat_interleave(600), paths=paths, class_names=names)
    monkeypatch.setattr(sets, "scan_folder", lambda folder, skip_corrupt: whole)
    data = open_mini(tmp_path)
    assert torch.bincount(data.train.labels).tolist() == [500] * 100 and torch.bincount(data.val.labels).tolist() == [100] * 100
    assert sorted(data.train.paths + data.val.paths) == paths
    numbers = [int(path[-7:-4]) for path in data.val.paths]
    assert len(set(numbers)) > 590 and numbers[:100] != numbers[100:200]  # drawn separately for each class, from all its images


def test_the_two_parts_are_disjoint_and_complete_and_folders_name_the_classes(root):
    data = open_mini(root, skip_corrupt=True)
    assert (data.name, data.classes, data.channels, data.image_size) == ("mini-imagenet", 3, 3, None)
    assert (data.mean, data.std) == (sets.IMAGENET_MEAN, sets.IMAGENET_STD)
    every = sorted(f"{name}/{i}.jpg" for name in CLASSES for i in range(6))
    assert sorted(members(root, data.train) + members(root, data.val)) == every
    for part, count in ((data.train, 5), (data.val, 1)):
        assert torch.bincount(part.labels).tolist() == [count] * 3 and part.class_names == CLASSES and part.skip_corrupt
        assert [path.split("/")[0] for path in members(root, part)] == [CLASSES[label] for label in part.labels]
    assert not open_mini(root).train.skip_corrupt


def test_the_split_file_lists_every_image_by_path(root):
    data = open_mini(root)
    content = (root / SPLIT).read_bytes()
    header, *lines = content.decode().split("\n")
    assert header == "path,split" and lines.pop() == "" and lines[-1] in ('"bee, honey/5.jpg",train', '"bee, honey/5.jpg",val')
    paths, parts = zip(*(line.rsplit(",", 1) for line in lines), strict=True)
    paths = [path.strip('"') for path in paths]
    assert paths == sorted(members(root, data.train) + members(root, data.val)) and paths[0] == "ant-lion/0.jpg"
    assert [path for path, part in zip(paths, parts, strict=True) if part == "val"] == sorted(members(root, data.val))
    assert data.split == f"{SPLIT}@{hashlib.sha256(content).hexdigest()[:8]}"
    assert [path.name for path in sorted(root.iterdir())] == ["mini-imagenet", SPLIT]  # no temporary file is left


def test_the_split_is_reproducible_also_on_another_machine(root, tmp_path, monkeypatch):
    first, again = open_mini(root), open_mini(root)
    walk, iterate = os.walk, Path.iterdir
    with monkeypatch.context() as patch:  # a file system may list its entries in any order
        patch.setattr(os, "walk", lambda *a, **k: reversed([(top, dirs[::-1], files[::-1]) for top, dirs, files in walk(*a, **k)]))
        patch.setattr(Path, "iterdir", lambda self: reversed(sorted(iterate(self))))
        other = open_mini(fill(tmp_path / "two", CLASSES[::-1]))
    for ours, theirs in ((first.train, again.train), (first.val, again.val)):
        assert ours.paths == theirs.paths and torch.equal(ours.labels, theirs.labels)
    assert members(tmp_path / "two", other.train) == members(root, first.train)
    # a fixed digest: another random generator in torch would give another split of the same images
    assert first.split == again.split == other.split == f"{SPLIT}@761604bf"


def test_a_split_changed_by_the_user_is_used_and_gets_another_name(root):
    before = open_mini(root)
    lines = [f'"{name}/{i}.jpg",{"train" if i < 2 else "val"}' for name in CLASSES for i in range(6)]
    content = "\ufeff" + "\r\n".join(["path,split", *reversed(lines), "", ""])  # in another order, as a spreadsheet writes it
    (root / SPLIT).write_bytes(content.encode())
    after = open_mini(root)
    assert members(root, after.train) == [f"{name}/{i}.jpg" for name in CLASSES for i in (0, 1)]
    assert after.val.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (root / SPLIT).read_bytes() == content.encode()
    assert after.split != before.split and after.split == f"{SPLIT}@{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    (root / SPLIT).unlink()
    assert open_mini(root).split == before.split


def test_a_data_set_with_a_given_split_has_an_empty_split_name():
    assert open_data("digits").split == ""


def test_two_processes_may_open_the_data_set_at_the_same_time(root, monkeypatch):
    together, fsync = threading.Barrier(2, timeout=10), os.fsync

    def fsync_together(file):  # both have started writing before either has finished
        together.wait()
        fsync(file)

    monkeypatch.setattr(os, "fsync", fsync_together)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(open_mini, [root, root])
    assert one.split == other.split and one.train.paths == other.train.paths
    assert len(list(root.iterdir())) == 2


def test_an_existing_split_file_is_not_rewritten_and_a_failed_write_is_reported(root, monkeypatch):
    def denied(**options):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(sets, "TemporaryDirectory", denied)
        refused(root, f"{root / SPLIT} is missing and cannot be written (Read-only file system): make {root} writable once")
    open_mini(root)
    monkeypatch.setattr(sets, "TemporaryDirectory", denied)
    assert len(open_mini(root).val) == 3


def refused(root: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        open_mini(root)
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)


def test_a_missing_folder_is_reported_with_the_expected_layout(root, tmp_path):
    refused(tmp_path, f"{tmp_path / 'mini-imagenet'} not found", "mini-imagenet/<class>/*.jpg", "3 folders of 6 images")


FIX = "3 classes of 6 images: complete it. For another selection of images, open it as a folder with train/ and val/"


@pytest.mark.parametrize("images", [5, 7])
def test_a_class_with_too_few_or_too_many_images_is_reported(images, root):
    bee = root / "mini-imagenet" / CLASSES[2]
    (bee / "6.jpg").touch() if images == 7 else (bee / "0.jpg").unlink()
    refused(root, "mini-imagenet contains 3 classes", f"{images} images in {CLASSES[2]}", FIX)
    assert not (root / SPLIT).exists()


def test_a_wrong_number_of_classes_is_refused(root, tmp_path):
    refused(fill(tmp_path / "two", ("train", "val"), 9), "contains 2 classes (train, val), 9 images in train, 9 images in val;", FIX)
    fill(root, ("cat",))
    refused(root, "contains 4 classes (ant, ant-lion, bee, honey, ...);", FIX)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("path,split\n", "", "begins with 'ant-lion/0.jpg,train' and not with 'path,split'"),
        ("path,split", "file,part", "begins with 'file,part' and not"),
        ("ant/0.jpg,train", "ant/9.jpg,train", "lists 'ant/9.jpg', and there is no such image"),
        ("ant/0.jpg,train", "ant/0.jpg,train\nant/0.jpg,val", "lists 'ant/0.jpg' twice"),
        ("ant/0.jpg,train\n", "", "misses 1 of 18 images, the first is 'ant/0.jpg'"),
        ("ant/0.jpg,train", "ant/0.jpg,test", "has the line 'ant/0.jpg,test', which is not a path, a comma and train or val"),
        ("ant/0.jpg,train", "ant/0.jpg", "has the line 'ant/0.jpg', which"),
        ("ant/0.jpg,train", "ant/0.jpg,train,0", "has the line 'ant/0.jpg,train,0', which"),
        ("ant/0.jpg,train", '"ant/0.jpg,train', "has the line '\"ant/0.jpg,train', which"),
        (",val", ",train", "leaves class 'ant' without val images"),
        (",train", ",val", "leaves class 'ant' without train images"),
    ],
)
def test_an_error_in_the_split_file_is_reported_with_its_fix(old, new, fault, root):
    open_mini(root)
    content = (root / SPLIT).read_text()
    assert old in content
    (root / SPLIT).write_text(content.replace(old, new))
    refused(root, f"{root / SPLIT} {fault}", "fix it, or delete it to create it again")
    (root / SPLIT).unlink()
    assert len(open_mini(root).val) == 3


@pytest.mark.parametrize("content", [b"", "path,split\nant/0.jpg,train\n".encode("utf-16"), b"\xff\xfe\x00"])
def test_a_split_file_that_is_not_text_is_reported(content, root):
    (root / SPLIT).write_bytes(content)
    refused(root, f"{root / SPLIT} begins with", "delete it to create it again")
