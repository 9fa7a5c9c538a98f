"""Claims about what happens to an image between the data set and the model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data import Augmentation, Data, Loader, Split
from common.data.augment import (
    BOX,
    DRAWS,
    augment,
    erase,
    jitter_colors,
    normalize,
    padding_crop,
    random_boxes,
    resize,
    resized_crop,
    worker_transform,
)

CPU = torch.device("cpu")


def uniforms(rows: int, columns: int = DRAWS) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


def pictures(count: int, size: int = 12, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def in_memory(images: torch.Tensor) -> Data:
    split = Split(torch.arange(len(images)), images)
    channels = images.shape[1]
    return Data("test", len(images), channels, tuple(images.shape[-2:]), (0.5,) * channels, (0.25,) * channels, split, split)


@pytest.mark.parametrize("crop", ["padding", "resized"])
def test_every_image_of_a_batch_gets_its_own_crop(crop):
    same = pictures(1).expand(64, -1, -1, -1)
    cropped = augment(same, uniforms(64), Augmentation(crop=crop, flip=0.0), (12, 12))
    distinct = len(torch.unique(cropped.flatten(1), dim=0))
    assert distinct == 64 if crop == "resized" else distinct > 30  # of 81 whole-pixel offsets


def test_padding_crop_moves_whole_pixels():
    images = pictures(200) | 1  # no black pixel of their own
    padding, seen = 2, set()
    for before, after in zip(images, padding_crop(images, uniforms(200, 2), padding), strict=True):
        framed = F.pad(before, (padding,) * 4)
        matches = [(y, x) for y in range(5) for x in range(5) if torch.equal(framed[:, y : y + 12, x : x + 12], after)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 25  # every offset comes up, the border ones too


def test_a_box_of_whole_pixels_at_its_own_size_is_copied_exactly():
    images = pictures(2)
    boxes = torch.tensor([[3.0, 5.0, 4.0, 6.0], [8.0, 0.0, 4.0, 6.0]])
    for mode in ("bilinear", "bicubic"):
        cropped = resized_crop(images, boxes, (4, 6), mode)
        expected = torch.stack([images[0, :, 3:7, 5:11], images[1, :, 8:12, 0:6]]).float()
        torch.testing.assert_close(cropped, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_box_around_the_whole_image_is_ordinary_resizing(mode):
    images = pictures(3)
    whole = torch.tensor([[0.0, 0.0, 12.0, 12.0]]).expand(3, 4)
    expected = F.interpolate(images.float(), (30, 20), mode=mode, align_corners=False).clamp(0, 255)
    torch.testing.assert_close(resized_crop(images, whole, (30, 20), mode), expected, atol=1e-2, rtol=0)


def test_random_boxes_lie_inside_and_keep_to_area_and_ratio():
    height, width = 20, 30
    top, left, h, w = random_boxes(uniforms(5000, BOX), (0.2, 1.0), (3 / 4, 4 / 3), height, width).unbind(1)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + h).max() <= height + 1e-4 and (left + w).max() <= width + 1e-4
    area, ratio = h * w / (height * width), w / h
    assert 0.2 - 1e-4 <= area.min() < 0.21
    assert 3 / 4 - 1e-4 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3 + 1e-4


def test_box_areas_follow_torchvision():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    canvas = torch.empty(3, 64, 64)
    theirs = [RandomResizedCrop.get_params(canvas, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    their_area = torch.tensor([h * w / 64**2 for _, _, h, w in theirs])
    _, _, h, w = random_boxes(uniforms(3000, BOX), (0.2, 1.0), (3 / 4, 4 / 3), 64, 64).unbind(1)
    shares = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close((h * w / 64**2).quantile(shares), their_area.quantile(shares), atol=0.03, rtol=0)


def test_impossible_boxes_are_cut_to_the_image():
    boxes = random_boxes(uniforms(10, BOX), (1.0, 1.0), (1.0, 1.0), 10, 40)
    torch.testing.assert_close(boxes[:, 2:], torch.tensor([[10.0, 20.0]]).expand(10, 2))


def test_flip_mirrors_left_and_right_at_its_rate():
    images = pictures(1).expand(400, -1, -1, -1)
    flipped = augment(images, uniforms(400), Augmentation(crop="none", flip=0.25), (12, 12))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    assert 0.18 < mirrored.float().mean() < 0.32


def test_jitter_leaves_images_alone_at_the_middle_draw():
    images = pictures(4).float()
    torch.testing.assert_close(jitter_colors(images, torch.full((3, 4), 0.5), 0.4), images, atol=1e-3, rtol=0)


def test_jitter_changes_brightness_contrast_and_saturation_as_torchvision_does():
    from torchvision.transforms import functional

    image = pictures(1).float()
    draws = torch.tensor([[0.25], [1.0], [0.0]])  # factors 0.8, 1.4, 0.6
    expected = functional.adjust_brightness(image / 255, 0.8)
    expected = functional.adjust_saturation(functional.adjust_contrast(expected, 1.4), 0.6) * 255
    torch.testing.assert_close(jitter_colors(image, draws, 0.4), expected, atol=0.2, rtol=0)


def test_jitter_accepts_grey_images():
    images = pictures(4, channels=1).float()
    assert jitter_colors(images, uniforms(4, 3).T, 0.4).shape == images.shape


def test_erasing_fills_one_box_with_noise_in_its_share_of_images():
    erased = erase(torch.full((400, 3, 32, 32), 9.0), uniforms(400), 0.25)
    changed = (erased != 9).any(1)
    touched = changed.flatten(1).any(1)
    assert 0.18 < touched.float().mean() < 0.32
    noise = erased[erased != 9]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    for mask in changed[touched]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)  # a full rectangle


def test_what_an_image_gets_does_not_depend_on_its_batch():
    images, draws = pictures(10), uniforms(10)
    everything = Augmentation(color_jitter=0.4, erase=0.5)

    def run(part):
        return erase(normalize(augment(images[part], draws[part], everything, (12, 12)), (0.5,) * 3, (0.2,) * 3), draws[part], 0.5)

    torch.testing.assert_close(run(slice(0, 10)), torch.cat([run(slice(0, 3)), run(slice(3, 10))]), atol=1e-5, rtol=0)


def test_normalised_pixels_undo_to_the_originals():
    images = pictures(2)
    normal = normalize(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert normal.dtype == torch.float32
    restored = (normal * torch.tensor([0.2, 0.3, 0.4])[:, None, None] + torch.tensor([0.4, 0.5, 0.6])[:, None, None]) * 255
    assert torch.equal(restored.round().byte(), images)


def test_resizing_to_the_same_size_changes_nothing():
    images = pictures(2)
    assert torch.equal(resize(images, (12, 12)), images.float())
    assert resize(images, (24, 16)).shape == (2, 3, 24, 16)


@pytest.mark.parametrize(
    "options", [{"crop": "resize"}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"randaugment": "9"}, {"repeats": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["none", "padding", "resized"])
def test_randaugment_serves_images_in_memory_too(crop, channels):
    data = in_memory(pictures(16, channels=channels))
    augmentation = Augmentation(crop=crop, randaugment="rand-m9-mstd0.5-inc1", erase=0.25, color_jitter=0.1)
    batches = Loader(data.train, data=data, image_size=(16, 16), batch_size=8, augmentation=augmentation, seed=0, device=CPU, workers=0)
    images, labels = next(batches.epoch(0))
    assert images.shape == (8, channels, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_randaugment_survives_its_strongest_draws():
    # magnitude 10 keeps no bit of a colour, which Pillow 13 refuses unless it is told otherwise
    data = in_memory(pictures(1))
    transform = worker_transform(Augmentation(randaugment="rand-m10-n6-p1-inc1"), data, (12, 12))
    picture = Image.new("RGB", (12, 12), (90, 120, 200))
    for _ in range(60):
        assert transform(picture).shape == (3, 12, 12)


def test_evaluation_cuts_the_centre_out_of_photos_but_nothing_off_small_images():
    photos = replace(in_memory(pictures(1)), image_size=None)
    photo = Image.new("RGB", (256, 256))
    photo.paste((255, 255, 255), (16, 16, 240, 240))  # the central 224 pixels
    assert (worker_transform(None, photos, (224, 224))(photo) == 255).all()
    small = Image.fromarray(pictures(1, 64)[0].permute(1, 2, 0).numpy())
    assert torch.equal(worker_transform(None, photos, (64, 64))(small), pictures(1, 64)[0])
    assert worker_transform(None, photos, (96, 160))(photo).shape == (3, 96, 160)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_what_the_cpu_sees():
    data = in_memory(pictures(32))
    options = {
        "data": data,
        "image_size": (16, 16),
        "batch_size": 16,
        "augmentation": Augmentation(color_jitter=0.4),
        "seed": 0,
        "workers": 0,
    }
    here, there = (next(Loader(data.train, device=torch.device(name), **options).epoch(0)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-3, rtol=0)
    assert torch.equal(there[1].cpu(), here[1])
