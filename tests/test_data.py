"""Tests of the data sets, the reading of images and their order."""

import logging
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy
import pytest
import torch
from PIL import Image, PngImagePlugin

from common.data import Augmentation, Data, DataError, Loader, Split, open_data
from common.data.augment import DRAWS, augment, erase, normalize, worker_transform
from common.data.images import read_image
from common.randomness import generator, reseed

IMAGENETTE = Path(__file__).parents[2] / "shared" / "data" / "imagenette"
CPU = torch.device("cpu")
STRONG = Augmentation(randaugment="rand-m9-mstd0.5-inc1", color_jitter=0.2, grey=0.3, blur=0.5, erase=0.5)
PLAIN = replace(STRONG, randaugment=None)  # possible for images in memory without workers


def draw(path: Path, size: tuple[int, int] = (20, 16), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with four training and two validation images each, of several sizes from 20 x 16 pixels on."""
    for part, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                draw(tmp_path / part / name / f"{i}.png", (20 + i, 16), seed=10 * number + i)
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> Data:
    return open_data("digits")


def batches(split: Split, data: Data, augmentation: Augmentation | None = STRONG, size: int = 16, **options):
    defaults = {"batch_size": 4, "seed": 0, "device": CPU, "workers": 0}
    return Loader(split, data=data, image_size=(size, size), augmentation=augmentation, **defaults | options)


def same(ours, theirs) -> bool:
    ours, theirs = list(ours), list(theirs)
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=False) for a, b in zip(x, y, strict=True)]
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in pairs)


# ---- sets


def test_digits_split_is_stratified_and_disjoint(digits):
    assert (len(digits.train), len(digits.val)) == (1437, 360)
    assert (digits.classes, digits.channels, digits.image_size) == (10, 1, (8, 8))
    assert digits.train.images.dtype == torch.uint8 and digits.train.images.max() == 255
    train_fraction, val_fraction = (torch.bincount(part.labels) / len(part) for part in (digits.train, digits.val))
    torch.testing.assert_close(train_fraction, val_fraction, atol=0.005, rtol=0)

    from sklearn.datasets import load_digits

    def rows(images):
        return sorted(map(bytes, images.reshape(len(images), -1)))

    everything = numpy.rint(load_digits().images * 255 / 16).astype(numpy.uint8)
    assert rows(torch.cat([digits.train.images, digits.val.images]).numpy()) == rows(everything)


def test_digits_are_the_same_every_time(digits):
    assert torch.equal(digits.train.images, open_data("digits").train.images)


def test_mean_and_std_are_those_of_the_training_images(digits):
    pixels = digits.train.images.double() / 255
    assert digits.mean[0] == pytest.approx(pixels.mean().item()) and digits.std[0] == pytest.approx(pixels.std(correction=0).item())


def test_per_class_draws_the_given_number_of_images_per_class(digits):
    few, more = digits.train.per_class(5, seed=3), digits.train.per_class(20, seed=3)
    assert torch.bincount(few.labels).tolist() == [5] * 10
    images_of_more = {bytes(image) for image in more.images.flatten(1).numpy()}
    assert {bytes(image) for image in few.images.flatten(1).numpy()} <= images_of_more
    assert torch.equal(few.images, digits.train.per_class(5, seed=3).images)
    assert not torch.equal(few.images, digits.train.per_class(5, seed=4).images)


def test_per_class_names_the_class_with_too_few_images(folder):
    (folder / "train" / "bee" / "3.png").unlink()
    train = open_data(str(folder)).train
    assert len(train.per_class(3, seed=0)) == 9
    with pytest.raises(DataError, match="bee has 3 images, fewer than 4"):
        train.per_class(4, seed=0)


def test_subset_keeps_the_requested_order(folder):
    train = open_data(str(folder)).train
    part = train.subset([7, 0])
    assert part.paths == [train.paths[7], train.paths[0]] and part.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar", "cifar10"), ("digit", "digits"), ("tinyimagenet", "tiny-imagenet"), ("miniimagenet", "mini-imagenet")],
)
def test_unknown_data_offers_the_nearest_name(name, nearest):
    with pytest.raises(DataError, match=f"{name}.*did you mean.*{nearest}"):
        open_data(name)


def test_a_missing_folder_is_named():
    with pytest.raises(DataError, match="no/such/folder.*train/ and val/"):
        open_data("no/such/folder")


@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_without_a_network_the_error_says_where_to_put_the_cifar_archive(name, archive, tmp_path, monkeypatch):
    def offline(self):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    with pytest.raises(DataError, match=f"no network.*put {archive} from https?://.*there") as caught:
        open_data(name, root=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_cifar_images_are_channels_first_uint8(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data = numpy.full((20 if train else 10, 32, 32, 3), 7, dtype=numpy.uint8)
            self.data[..., 2] = 51
            self.targets, self.classes = [i % 10 for i in range(len(self.data))], [str(i) for i in range(10)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    data = open_data("cifar10", root=tmp_path)
    assert data.train.images.shape == (20, 3, 32, 32) and len(data.val) == 10 and data.classes == 10
    assert data.train.images[0, :, 0, 0].tolist() == [7, 7, 51] and data.mean[2] == pytest.approx(0.2)


def test_tiny_imagenet_is_read_in_its_own_folder_layout(tmp_path):
    home = tmp_path / "tiny-imagenet-200"
    with pytest.raises(DataError, match="tiny-imagenet-200/train not found: download http.*unpack"):
        open_data("tiny-imagenet", root=tmp_path)
    for name in ("n01", "n02"):
        for i in range(2):
            draw(home / "train" / name / "images" / f"{name}_{i}.JPEG", (64, 64))
        (home / "train" / name / f"{name}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t63\t63\n")
    with pytest.raises(DataError, match="val_annotations.txt not found"):
        open_data("tiny-imagenet", root=tmp_path)
    for i in range(3):
        draw(home / "val" / "images" / f"val_{i}.JPEG", (64, 64))
    lines = [f"val_{i}.JPEG\t{name}\t0\t0\t63\t63" for i, name in enumerate(("n02", "n01", "n02"))]
    (home / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    data = open_data("tiny-imagenet", root=tmp_path)
    assert (data.classes, data.image_size, len(data.train)) == (2, (64, 64), 4)
    assert data.val.labels.tolist() == [1, 0, 1] and data.val.paths[1].endswith("val_1.JPEG")
    (images, _), *_ = batches(data.val, data, None, size=64).epoch(0)
    assert images.shape == (3, 3, 64, 64)


def test_a_folder_is_read_class_by_class(folder):
    data = open_data(str(folder))
    assert (data.name, data.classes, data.image_size) == (folder.name, 3, None)
    assert data.train.class_names == ("ant", "bee", "cat")
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert all(f"/{data.train.class_names[label]}/" in path for path, label in zip(data.train.paths, data.train.labels, strict=True))


def test_the_test_folder_replaces_a_missing_val_folder(folder):
    (folder / "val").rename(folder / "test")
    assert len(open_data(str(folder)).val) == 6


def test_a_missing_split_is_named_with_what_was_found(folder):
    (folder / "val").rename(folder / "validation")
    with pytest.raises(DataError, match="lacks val/; found: train, validation"):
        open_data(str(folder))
    (folder / "train").rename(folder / "training")
    with pytest.raises(DataError, match="lacks train/ and val/; found: training, validation"):
        open_data(str(folder))


def test_empty_class_folder_is_named(folder):
    (folder / "val" / "bee" / "0.png").unlink()
    (folder / "val" / "bee" / "1.png").rename(folder / "val" / "bee" / "notes.txt")
    with pytest.raises(DataError, match="val/bee has no images"):
        open_data(str(folder))


def test_images_outside_class_folders_are_refused(tmp_path):
    draw(tmp_path / "train" / "0.png")
    draw(tmp_path / "val" / "0.png")
    with pytest.raises(DataError, match="train has no class folders"):
        open_data(str(tmp_path))


def test_classes_must_agree_between_train_and_val(folder):
    draw(folder / "val" / "dog" / "0.png")
    with pytest.raises(DataError, match="3 classes and .* has 4: dog"):
        open_data(str(folder))
    (folder / "val" / "ant").rename(folder / "ant")  # the same number of classes, but other ones
    with pytest.raises(DataError, match="ant, dog"):
        open_data(str(folder))


FOREIGN = [
    "._1.png",
    ".hidden.png",
    ".ipynb_checkpoints/1-checkpoint.png",
    "@eaDir/1.png",
    "deep/.Trashes/1.png",
    "deep/__MACOSX/1.png",
    "__MACOSX/._1.png",
]


@pytest.mark.parametrize("level", ["train", "train/bee", "train/bee/deep/er", "val/cat"])
def test_hidden_and_system_files_are_ignored_at_every_level(level, folder):
    draw(folder / "train" / "bee" / "deep" / "er" / "9.png")
    before = open_data(str(folder))
    for name in FOREIGN if level != "train" else [name for name in FOREIGN if not name.startswith("deep")]:
        draw(folder / level / name)
    (folder / level / "Thumbs.db").touch()
    (folder / level / ".DS_Store").touch()
    after = open_data(str(folder))
    assert after.train.paths == before.train.paths and after.val.paths == before.val.paths
    assert after.identity == before.identity and len(after.train) == 13


def test_a_class_folder_with_only_hidden_files_counts_as_empty(folder):
    for path in (folder / "train" / "bee").iterdir():
        path.rename(path.with_name(f"._{path.name}"))
    with pytest.raises(DataError, match="train/bee has no images"):
        open_data(str(folder))


def test_a_data_set_inside_hidden_folders_is_read(folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("home") / ".cache" / "@eaDir" / "set"
    home.parent.mkdir(parents=True)
    folder.rename(home)
    assert len(open_data(str(home)).train) == 12


def test_class_folders_may_be_links(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "bees"
    (folder / "train" / "bee").rename(elsewhere)
    (folder / "train" / "bee").symlink_to(elsewhere)
    data = open_data(str(folder))
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and "/train/bee/" in data.train.paths[5]


def test_a_folder_that_cannot_be_listed_is_named_and_not_skipped(folder, monkeypatch):
    (folder / "train" / "bee" / "deep").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="train/bee/deep cannot be listed .Permission denied.: make it readable"):
        open_data(str(folder))


def test_tiny_imagenet_names_a_missing_validation_image(tmp_path):
    home = tmp_path / "tiny-imagenet-200"
    draw(home / "train" / "n01" / "images" / "n01_0.JPEG", (64, 64))
    draw(home / "train" / "n01" / "images" / "._n01_0.JPEG", (64, 64))
    draw(home / "val" / "images" / "val_0.JPEG", (64, 64))
    (home / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t63\t63\n")
    assert len(open_data("tiny-imagenet", root=tmp_path).train) == 1
    (home / "val" / "images" / "val_0.JPEG").unlink()
    with pytest.raises(DataError, match="val/images/val_0.JPEG, which is not there: unpack the archive again"):
        open_data("tiny-imagenet", root=tmp_path)


# ---- images in memory


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 1, 8, 8), r"type torch.float32: .*torch.uint8 tensor .*\(255 \* images\).round\(\).to\(torch.uint8\)"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.int64), "type torch.int64"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"shape \(3, 8, 8\)"),
    ],
)
def test_images_in_memory_that_are_not_uint8_are_refused_with_the_conversion(images, message):
    with pytest.raises(DataError, match=message):
        Split(torch.zeros(3, dtype=torch.int64), images)


def test_images_in_memory_must_have_the_channels_of_their_data_set(digits):
    rows_last = Split(torch.zeros(8, dtype=torch.int64), torch.zeros(8, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"\(8, 32, 32, 3\) for digits with channels=1: use a split of \(N, 1, H, W\)"):
        batches(rows_last, digits, None)
    with pytest.raises(DataError, match=r"\(8, 32, 32, 3\), but channels=1"):
        replace(digits, train=rows_last)


# ---- images


def read(tmp_path: Path, image: Image.Image, name: str = "image.tiff") -> tuple[int, int, int]:
    image.save(tmp_path / name)
    found = read_image(str(tmp_path / name))
    assert found.mode == "RGB" and found.size == image.size
    return found.getpixel((0, 0))


@pytest.mark.parametrize("name", ["image.tiff", "image.pfm"])
def test_float_pixels_from_0_to_1_are_scaled_and_others_refused(name, tmp_path):
    floats = numpy.array([[0.5, 1.0], [0.0, 0.25]], dtype=numpy.float32)
    assert read(tmp_path, Image.fromarray(floats), name) == (128, 128, 128)
    assert read(tmp_path, Image.fromarray(floats * 0), name) == (0, 0, 0)
    for pixels, low, high in ((floats * 200, 0.0, 200.0), (floats - 0.5, -0.5, 0.5), (floats * numpy.float32("nan"), "nan", "nan")):
        with pytest.raises(
            DataError, match=f"image.* has float pixels from {low} to {high}, .* range is 0 to 1: save it with 8 bits"
        ) as caught:
            read(tmp_path, Image.fromarray(pixels), name)
        assert "delete" not in str(caught.value).rpartition(" has ")[2]


def test_integers_of_16_and_32_bits_are_scaled_or_refused_and_never_black(tmp_path):
    for dtype in (numpy.uint16, ">u2", numpy.int32):
        pixels = numpy.array([[40_000, 65_535]]).astype(dtype)
        assert read(tmp_path, Image.fromarray(pixels)) == (155, 155, 155)
        assert read(tmp_path, Image.fromarray(pixels * 0)) == (0, 0, 0)
        with pytest.raises(DataError, match="from 0 to 200, .*, in which they would all be black: save it with 8 bits"):
            read(tmp_path, Image.fromarray(numpy.array([[0, 200]]).astype(dtype)))
    for low, high in ((-5, 300), (0, 2**20)):
        with pytest.raises(DataError, match=f"from {low} to {high}, and the supported range is 0 to 65535: save"):
            read(tmp_path, Image.fromarray(numpy.array([[low, high]], dtype=numpy.int32)))


@pytest.mark.parametrize(
    ("mode", "value"), [("PA", (1, 7)), ("YCbCr", (200, 128, 128)), ("LAB", (200, 128, 128)), ("CMYK", (55, 55, 55, 0))]
)
def test_other_image_modes_are_converted_to_the_right_colours(mode, value, tmp_path):
    image = Image.new(mode, (3, 2), value)
    if mode == "PA":
        image.putpalette([0, 0, 0, 200, 200, 200])
    assert all(abs(level - 200) < 10 for level in read(tmp_path, image))


def test_colours_of_16_bits_keep_their_high_byte(tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"\0" + struct.pack(">3H", 200 * 257, 100 * 257, 7))
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert read_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (200, 100, 0)


@pytest.mark.parametrize("limit", [60, 100])  # for 160 pixels, Pillow alone would raise an error, or warn
def test_a_valid_image_above_pillows_limit_is_read_silently_and_the_limit_is_kept(limit, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    Image.new("RGB", (16, 10), (1, 2, 3)).save(tmp_path / "a.png")
    with ThreadPoolExecutor(4) as pool:
        for image in pool.map(read_image, [str(tmp_path / "a.png")] * 40):
            assert image.getpixel((0, 0)) == (1, 2, 3)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == limit


def test_a_valid_image_with_a_long_text_chunk_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "x" * 3 * 2**20, zip=True)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=text)
    assert read_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (1, 2, 3)


def test_no_error_advises_to_delete_an_image_that_may_be_valid(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="gone.png cannot be opened .No such file") as absent:
        read_image(str(tmp_path / "gone.png"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: 4)
        with pytest.raises(DataError, match="a.png has more pixels than fit into memory: use a smaller copy") as large:
            read_image(str(tmp_path / "a.png"))
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(DataError, match="a.png cannot be opened .Input/output error") as system:
        read_image(str(tmp_path / "a.png"))
    assert not [caught for caught in (absent, large, system) if "delete" in str(caught.value).rpartition(".png ")[2]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 200, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
        ("LA", (200, 10), (200, 200, 200)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("I;16", 200 * 257, (200, 200, 200)),
    ],
)
def test_grey_rgba_and_16bit_images_become_rgb(mode, value, expected, tmp_path):
    path = tmp_path / "image.png"
    Image.new(mode, (5, 4), value).save(path)
    image = read_image(str(path))
    assert (image.mode, image.size, image.getpixel((2, 2))) == ("RGB", (5, 4), expected)


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128])])
def test_palette_images_become_rgb(transparency, tmp_path, recwarn):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.save(tmp_path / "image.png", **({} if transparency is None else {"transparency": transparency}))
    assert read_image(str(tmp_path / "image.png")).getpixel((2, 2)) == (40, 50, 60)
    assert not recwarn.list


def test_cmyk_photos_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "image.jpg", quality=100)
    red, green, blue = read_image(str(tmp_path / "image.jpg")).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"zero-byte": b"", "truncated": content[: len(content) // 2], "no image": b"hello, I am text"}[how])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["zero-byte", "truncated", "no image"])
def test_a_corrupt_image_is_named(how, workers, folder):
    victim = folder / "train" / "bee" / "2.png"
    spoil(victim, how)
    data = open_data(str(folder))
    message = ""
    try:  # pytest.raises would keep the traceback and with it the worker, which then takes five seconds to stop
        list(batches(data.train, data, None, workers=workers).epoch(0))
    except DataError as error:
        message = str(error)
    assert message.startswith(str(victim)) and message.endswith("delete it, or pass --skip-corrupt")
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_corrupt_uses_the_next_readable_image_and_warns_once(workers, folder, caplog):
    for number in (2, 3):
        spoil(folder / "train" / "cat" / f"{number}.png", "zero-byte")
    data = open_data(str(folder), skip_corrupt=True)
    batch = batches(data.train, data, None, workers=workers)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            images, labels = map(torch.cat, zip(*batch.epoch(epoch), strict=True))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2, 2, 0, 0]  # after the last image it continues with the first
    assert torch.equal(images[10], images[0]) and torch.equal(images[11], images[0])
    assert sorted(record.args[0][-9:] for record in caplog.records) == ["cat/2.png", "cat/3.png"]


def test_a_data_set_of_only_corrupt_images_raises_an_error(folder):
    for path in folder.glob("train/*/*.png"):
        spoil(path, "zero-byte")
    data = open_data(str(folder), skip_corrupt=True)
    with pytest.raises(DataError, match="none of 12 images can be read, .* the first: .*png cannot be read as an image"):
        next(batches(data.train, data).epoch(0))


# ---- order


@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="needs the photos of shared/data/imagenette beside the repository")
def test_photos_do_not_depend_on_the_number_of_workers():
    data = open_data(str(IMAGENETTE))
    few = data.train.subset(range(0, 800, 50))
    alone, helped = (batches(few, data, size=64, workers=workers) for workers in (0, 2))
    assert same(alone.epoch(1), helped.epoch(1))
    assert not same(alone.epoch(1), alone.epoch(2))


def test_the_order_depends_only_on_seed_and_epoch(folder, digits):
    for data, augmentation, workers in ((open_data(str(folder)), STRONG, 2), (digits, STRONG, 2), (digits, PLAIN, 0)):
        split = data.train.subset(range(12))
        undisturbed, other = batches(split, data, augmentation), batches(split, data, augmentation, workers=workers)
        next(other.epoch(0))  # an unfinished epoch has no effect on later ones
        torch.rand(7)
        assert same(other.epoch(3), undisturbed.epoch(3))
        assert same(other.epoch(1), undisturbed.epoch(1))
        assert not torch.equal(undisturbed.indices(3)[0], undisturbed.indices(1)[0])
        assert not torch.equal(undisturbed.indices(3)[0], batches(split, data, augmentation, seed=1).indices(3)[0])


@pytest.mark.parametrize("augmentation", [STRONG, replace(STRONG, repeats=3), None])
@pytest.mark.parametrize("source", ["files", "memory"])
def test_starting_in_the_middle_of_an_epoch_gives_the_same_batches(source, augmentation, folder, digits):
    data = open_data(str(folder)) if source == "files" else digits
    plain = replace(augmentation, randaugment=None) if source == "memory" and augmentation else augmentation
    split = data.train.subset(range(12))
    whole = list(batches(split, data, plain).epoch(2))
    assert len(whole) == 3
    for start in range(3):
        assert same(batches(split, data, plain).epoch(2, start), whole[start:])
    assert list(batches(split, data, plain).epoch(2, 3)) == []
    with pytest.raises(ValueError, match="start=4: the epoch has 3"):
        batches(split, data, plain).epoch(2, 4)


@pytest.mark.parametrize("repeats", [1, 3])
def test_effective_batches_do_not_depend_on_accumulation_or_world_size(repeats, digits):
    def effective(batch_size, accumulate, world_size):
        options = {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
        repeated = replace(PLAIN, repeats=repeats)
        ranks = [batches(digits.train, digits, repeated, **options, rank=rank).indices(5) for rank in range(world_size)]
        steps = len(ranks[0]) // accumulate
        parts = [[rank[step * accumulate : (step + 1) * accumulate] for rank in ranks] for step in range(steps)]
        return [sorted(torch.cat([micro for rank in step for micro in rank]).tolist()) for step in parts]

    reference = effective(48, 1, 1)
    assert len(reference) == 1437 // 48
    for division in ((24, 2, 1), (24, 1, 2), (6, 4, 2), (2, 3, 8)):
        assert effective(*division) == reference
    # an effective batch is a multiple of the repeats, so it contains all copies of its images and no others
    assert all(len({row % 1437 for row in rows}) == 48 // repeats for rows in reference)


@pytest.mark.parametrize("augmentation", [PLAIN, replace(PLAIN, repeats=3), replace(STRONG, repeats=3)])
def test_the_augmentation_of_an_image_does_not_depend_on_accumulation_or_world_size(augmentation, digits):
    split = Split(torch.arange(48), digits.train.images[:48])

    def by_row(used=augmentation, **division):
        batch = batches(split, digits, used, size=8, **division)
        seen = {}
        for rows, (images, labels) in zip(batch.indices(0), batch.epoch(0), strict=True):
            assert labels.tolist() == [row % 48 for row in rows.tolist()]
            seen |= dict(zip(rows.tolist(), images, strict=True))
        return seen

    whole = by_row(batch_size=48)
    halves = by_row(batch_size=4, accumulate=6, world_size=2, rank=0) | by_row(batch_size=4, accumulate=6, world_size=2, rank=1)
    assert whole.keys() == halves.keys() and len(whole) == 48
    for row, image in whole.items():
        torch.testing.assert_close(halves[row], image, atol=1e-5, rtol=0)
    once = by_row(replace(augmentation, repeats=1), batch_size=48)  # the first copy equals the image without repeats
    for row in whole.keys() & once.keys():
        torch.testing.assert_close(once[row], whole[row], atol=1e-5, rtol=0)


def test_an_epoch_repeats_each_of_its_images_except_at_the_truncated_end(digits):
    once, repeated = (batches(digits.train, digits, replace(PLAIN, repeats=repeats), batch_size=50) for repeats in (1, 3))
    assert len(repeated) == len(repeated.indices(0)) == len(once) == 28
    images, copies = torch.cat(repeated.indices(0)) % 1437, torch.cat(repeated.indices(0)) // 1437
    assert torch.equal(images, torch.cat(once.indices(0))[:467].repeat_interleave(3)[:1400])  # 466 images three times and one twice
    assert torch.equal(copies, torch.arange(1400) % 3)
    others = set((torch.cat(repeated.indices(1)) % 1437).tolist())
    assert len(others) == 467 and len(others & set(images.tolist())) < 467 / 2  # the shuffle selects the images: a third on average


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["files", "memory", "memory by workers"])
def test_copies_of_an_image_are_augmented_differently(source, workers, folder, digits):
    data = open_data(str(folder)) if source == "files" else digits
    split = replace(data.train.subset(range(12)), labels=torch.arange(12))
    repeated = replace(PLAIN if source == "memory" else STRONG, repeats=3)
    for images, labels in batches(split, data, repeated, batch_size=6, workers=workers).epoch(0):
        assert (labels.unique(return_counts=True)[1] == 3).all()
        assert len(images.flatten(1).unique(dim=0)) == 6


def test_one_repeat_in_memory_equals_loading_without_repeats(digits):
    order = torch.randperm(1437, generator=generator(7, 4, 1))
    draws = torch.rand(1437, DRAWS, generator=generator(7, 4, 2))
    batch = batches(digits.train, digits, PLAIN, seed=7, batch_size=100)
    assert len(batch) == 14
    for chosen, (images, labels) in zip(order[:1400].split(100), batch.epoch(4), strict=True):
        expected = normalize(augment(digits.train.images[chosen], draws[chosen], PLAIN, (16, 16)), digits.mean, digits.std)
        assert torch.equal(images, erase(expected, draws[chosen], PLAIN.erase))
        assert torch.equal(labels, digits.train.labels[chosen])


@pytest.mark.parametrize("workers", [0, 2])
def test_one_repeat_with_workers_equals_loading_without_repeats(workers, folder):
    data = open_data(str(folder))
    transform = worker_transform(STRONG, data, (16, 16))
    order = torch.randperm(12, generator=generator(7, 4, 1))
    for chosen, (images, labels) in zip(order.split(4), batches(data.train, data, seed=7, workers=workers).epoch(4), strict=True):
        for index, image, label in zip(chosen.tolist(), images, labels, strict=True):
            reseed(7, 4, index, 2)
            pixels = transform(read_image(data.train.paths[index]))
            # contiguous like a batch, since the noise is written in memory order
            expected = normalize(pixels[None].contiguous(), data.mean, data.std)
            assert torch.equal(image, erase(expected, torch.rand(1, DRAWS), STRONG.erase)[0])
            assert label == data.train.labels[index]


def test_training_drops_the_incomplete_effective_batch_and_repeats_nothing(digits):
    batch = batches(digits.train, digits, batch_size=50, accumulate=2)
    indices = torch.cat(batch.indices(0))
    assert len(batch) == len(batch.indices(0)) == 28
    assert len(indices) == len(indices.unique()) == 1400


@pytest.mark.parametrize(("count", "world_size"), [(12, 1), (11, 2), (5, 3), (2, 3)])
def test_evaluation_sees_every_image_once_over_all_ranks(count, world_size, digits):
    seen = []
    for rank in range(world_size):
        split = Split(torch.arange(count), digits.train.images[:count])
        batch = batches(split, digits, None, size=8, world_size=world_size, rank=rank)
        labels = [labels for _, labels in batch.epoch(0)]
        assert len(labels) == len(batch)
        seen += torch.cat(labels).tolist() if labels else []
    assert sorted(seen) == list(range(count))


def test_evaluation_images_in_memory_are_normalised_and_in_order(digits):
    images, labels = next(batches(digits.val, digits, None, size=8, batch_size=360).epoch(0))
    assert torch.equal(labels, digits.val.labels) and images.dtype == torch.float32
    torch.testing.assert_close(images * digits.std[0] + digits.mean[0], digits.val.images / 255)


def test_fewer_images_than_one_effective_batch_are_refused(digits):
    with pytest.raises(ValueError, match="1437 training images are fewer than one effective batch of 2048 .*at most 1437"):
        batches(digits.train, digits, batch_size=512, accumulate=2, world_size=2)
    batches(digits.val, digits, None, batch_size=512)  # evaluation accepts any number of images


def test_loading_with_workers_does_not_change_the_callers_random_state(folder):
    data = open_data(str(folder))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    list(batches(data.train, data, workers=1).epoch(0))
    list(batches(data.val, data, None).epoch(0))
    assert torch.equal(torch.rand(3), expected)


def test_held_out_images_are_the_last_training_images_of_each_class_and_replace_the_test_images(folder):
    data = open_data(str(folder))
    held = data.hold_out(5)  # rounded up to two of each of the three classes
    assert (len(held.train), len(held.val)) == (6, 6)
    kept = [*(held.train.paths or ()), *(held.val.paths or ())] if held.train.images is None else [*held.train.images, *held.val.images]
    assert len({str(one) for one in kept}) == len(kept)
    for label in range(3):
        rows = (data.train.labels == label).nonzero()[:, 0]
        assert (
            held.val.subset((held.val.labels == label).nonzero()[:, 0].tolist()).digest() == data.train.subset(rows[-2:].tolist()).digest()
        )
    with pytest.raises(DataError, match="4 of 4 training images of class 0 cannot be held out: add images"):
        data.hold_out(12)
