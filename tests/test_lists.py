"""Claims about which training images an evaluation may use the labels of, and how images from files are seen."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from common.data import DataError, Loader, Split, open_data
from common.data.augment import view_size


def split_of(*counts: int) -> Split:
    """So many images of each class, in files that do not exist."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    paths = [f"/data/train/{label}/{label}_{i}.png" for i, label in enumerate(labels.tolist())]
    return Split(labels, paths=paths, class_names=tuple(map(str, range(len(counts)))))


@pytest.fixture
def listing(tmp_path):
    """A function that writes a list file."""

    def write(*lines: str) -> Path:
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / "list.txt"

    return write


def counts(split: Split) -> list[int]:
    return torch.bincount(split.labels, minlength=split.classes).tolist()


# ---- shares


def test_one_percent_of_imagenets_labels_are_as_many_of_each_class_as_the_papers_lists_have():
    imagenet = split_of(*[1282] * 167, *[1281] * 833)
    assert len(imagenet) == 1_281_167
    found = counts(imagenet.balanced(0.01, seed=0))
    assert sum(found) == 12_811 and (found.count(13), found.count(12)) == (811, 189)


def test_a_share_depends_on_the_seed_alone_and_draws_other_images_and_classes_with_another():
    whole = split_of(*[40] * 10)
    first, again, other = (whole.balanced(0.13, seed) for seed in (0, 0, 1))
    assert first.paths == again.paths and len(first) == 52 and sorted(counts(first)) == [5] * 8 + [6] * 2
    assert first.paths != other.paths and counts(first) != counts(other)
    assert len(set(first.paths)) == 52 and first.paths == [path for path in whole.paths if path in first.paths]


def test_a_share_of_everything_is_everything():
    assert split_of(7, 7, 7).balanced(1.0, 0).paths == split_of(7, 7, 7).paths


def test_a_share_that_leaves_a_class_without_a_label_or_asks_for_more_than_it_has_is_refused():
    with pytest.raises(DataError, match="share of 0.1 is 2 of 20 labels, for 4 classes: .* 4 of 20"):
        split_of(5, 5, 5, 5).balanced(0.1, 0)
    with pytest.raises(DataError, match="class 1 has 2 images, fewer than 9: ask for at most 2"):
        split_of(30, 2).balanced(0.6, 0)


# ---- lists


def test_a_list_names_images_with_or_without_their_class_and_keeps_the_order_of_the_data(listing):
    found = split_of(3, 3).listed(listing("1/1_4.png", "", "  0_2.png ", "0/0_0.png"))
    assert [Path(path).name for path in found.paths] == ["0_0.png", "0_2.png", "1_4.png"] and found.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0_0.png", "gone.png", "1/0_0.png"], "names 2 of 3 images that are absent, the first is 'gone.png': give the list of this data"),
        ([], "names no image: give the list"),
        (["0_1.png", "0/0_1.png"], "lists /data/train/0/0_1.png twice: delete"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_with_what_is_wrong(lines, message, listing):
    with pytest.raises(DataError, match=message):
        split_of(3, 3).listed(listing(*lines))


def test_a_name_that_two_classes_have_needs_its_class(listing):
    both = Split(torch.tensor([0, 1]), paths=["/d/cat/1.png", "/d/dog/1.png"])
    assert both.listed(listing("dog/1.png")).labels.tolist() == [1]
    with pytest.raises(DataError, match="names '1.png', and 2 images are called so: write class/file name"):
        both.listed(listing("1.png"))


def test_images_in_memory_have_no_names_to_list(listing):
    with pytest.raises(DataError, match="they are in memory: use data in files, or no list"):
        open_data("digits").train.listed(listing("0.png"))


# ---- what tells one split from another


def test_a_digest_knows_labels_images_and_names_and_not_where_the_folder_is():
    labels, images = torch.tensor([0, 1]), torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    memory = [Split(labels, images), Split(labels.flip(0), images), Split(labels, images.flip(0)), Split(labels, images.view(2, 1, 2, 8))]
    here, there, other = (
        Split(labels, paths=[f"{root}/{name}" for name in names])
        for root, names in [("/a/train", ("c/1.png", "d/2.png")), ("/b/x", ("c/1.png", "d/2.png")), ("/a/train", ("c/1.png", "d/3.png"))]
    )
    assert here.digest() == there.digest() == here.subset([0, 1]).digest()
    assert len({split.digest() for split in (*memory, here, other, here.subset([0]))}) == 7


# ---- the view


def loader(split: Split, **options) -> Loader:
    data = open_data("digits")
    data.image_size, data.channels = None, 3
    settings = {"batch_size": 2, "augmentation": None, "seed": 0, "device": torch.device("cpu"), "workers": 0}
    return Loader(split, data=data, image_size=(96, 96), **settings, **options)


def test_resize_says_how_much_of_a_photo_is_seen_and_interpolation_how(tmp_path):
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


def test_the_default_view_is_the_usual_256_for_224_and_all_of_small_or_equal_images():
    data = open_data("digits")
    assert view_size(data, (224, 224)) == (224, 224) and view_size(data, (224, 224), 256) == (256, 256)
    data.image_size = None
    assert view_size(data, (224, 224)) == (256, 256) and view_size(data, (64, 64)) == (64, 64)
    assert view_size(data, (96, 192), 128) == (128, 256)


def test_a_resize_below_the_models_size_or_of_images_in_memory_is_refused():
    with pytest.raises(DataError, match="resized to 95 pixels, smaller than the 96 pixels of the model: choose a larger"):
        loader(split_of(3), resize=95)
    with pytest.raises(DataError, match="resized to 128 pixels, but these have one size"):
        loader(open_data("digits").train, resize=128)
