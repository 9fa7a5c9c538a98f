"""Tests of the processing of an image between the data set and the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from common.data import Augmentation, Data, Loader, Split, open_data
from common.data.augment import (
    BLUR_RADIUS,
    BOX,
    DRAWS,
    augment,
    blur,
    erase,
    jitter_colors,
    normalize,
    padding_crop,
    random_boxes,
    resize,
    resized_crop,
    worker_transform,
)
from common.data.images import read_image

IMAGENETTE = Path(__file__).parents[2] / "shared" / "data" / "imagenette"
CPU = torch.device("cpu")


def uniforms(rows: int, columns: int = DRAWS) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))


def pictures(count: int, size: int = 12, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def photo(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def copies(image: torch.Tensor, augmentation: Augmentation, path: str, count: int = 400) -> torch.Tensor:
    """Augment an image of the right size `count` times: float 0..255, from a batch in memory or from a worker."""
    if path == "memory":
        return augment(image.expand(count, -1, -1, -1), uniforms(count), augmentation, image.shape[-2:])
    torch.manual_seed(0)
    transform = worker_transform(augmentation, in_memory(image[None]), image.shape[-2:])
    return torch.stack([transform(photo(image)) for _ in range(count)]).float()


def luma(images: torch.Tensor) -> torch.Tensor:
    red, green, blue = images.float().unbind(-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def high_frequencies(images: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of neighbouring pixels, horizontally plus vertically, per image."""
    return images.diff(dim=-1).square().mean((-3, -2, -1)) + images.diff(dim=-2).square().mean((-3, -2, -1))


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
    images = pictures(200) | 1  # no pixel is black, unlike the padding
    padding, seen = 2, set()
    for before, after in zip(images, padding_crop(images, uniforms(200, 2), padding), strict=True):
        framed = F.pad(before, (padding,) * 4)
        matches = [(y, x) for y in range(5) for x in range(5) if torch.equal(framed[:, y : y + 12, x : x + 12], after)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 25  # every offset occurs, including those at the border


def test_a_crop_box_of_whole_pixels_without_resizing_is_copied_exactly():
    images = pictures(2)
    boxes = torch.tensor([[3.0, 5.0, 4.0, 6.0], [8.0, 0.0, 4.0, 6.0]])
    for mode in ("bilinear", "bicubic"):
        cropped = resized_crop(images, boxes, (4, 6), mode)
        expected = torch.stack([images[0, :, 3:7, 5:11], images[1, :, 8:12, 0:6]]).float()
        torch.testing.assert_close(cropped, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_crop_box_around_the_whole_image_equals_plain_resizing(mode):
    images = pictures(3)
    whole = torch.tensor([[0.0, 0.0, 12.0, 12.0]]).expand(3, 4)
    expected = F.interpolate(images.float(), (30, 20), mode=mode, align_corners=False).clamp(0, 255)
    torch.testing.assert_close(resized_crop(images, whole, (30, 20), mode), expected, atol=1e-2, rtol=0)


def test_random_boxes_stay_inside_the_image_and_in_the_range_of_area_and_ratio():
    height, width = 20, 30
    top, left, h, w = random_boxes(uniforms(5000, BOX), (0.2, 1.0), (3 / 4, 4 / 3), height, width).unbind(1)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + h).max() <= height + 1e-4 and (left + w).max() <= width + 1e-4
    area, ratio = h * w / (height * width), w / h
    assert 0.2 - 1e-4 <= area.min() < 0.21
    assert 3 / 4 - 1e-4 <= ratio.min() < 0.76 and 1.32 < ratio.max() <= 4 / 3 + 1e-4


def test_box_areas_have_torchvisions_distribution():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    canvas = torch.empty(3, 64, 64)
    theirs = [RandomResizedCrop.get_params(canvas, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    their_area = torch.tensor([h * w / 64**2 for _, _, h, w in theirs])
    _, _, h, w = random_boxes(uniforms(3000, BOX), (0.2, 1.0), (3 / 4, 4 / 3), 64, 64).unbind(1)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close((h * w / 64**2).quantile(quantiles), their_area.quantile(quantiles), atol=0.03, rtol=0)


def levels_from_pillow(image: Image.Image, augmentation: Augmentation, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Absolute differences (3, H, W) between the crop of a worker and Pillow's, from the same random numbers."""
    torch.manual_seed(seed)
    ours = worker_transform(augmentation, replace(in_memory(pictures(1)), image_size=None), size)(image)
    ours_next = torch.rand(1)
    torch.manual_seed(seed)
    top, left, height, width = transforms.RandomResizedCrop.get_params(image, augmentation.scale, augmentation.ratio)
    mode = Image.Resampling[augmentation.interpolation.upper()]
    theirs = image.crop((left, top, left + width, top + height)).resize((size[1], height), mode).resize((size[1], size[0]), mode)
    theirs = transforms.RandomHorizontalFlip(augmentation.flip)(theirs)
    assert torch.equal(ours_next, torch.rand(1))  # later random numbers are the same too
    return (ours.int() - pil_to_tensor(theirs).int()).abs()


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (224, 224)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["noise", "black and white", "smooth"])
def test_training_crops_are_within_four_levels_of_pillows(kind, interpolation, size):
    noise = torch.randint(0, 256, (3, 150, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    waves = torch.sin(torch.arange(150)[:, None] / 9) * torch.cos(torch.arange(200) / 14)
    smooth = (127 + 120 * waves).round().byte().expand(3, -1, -1)
    image = photo({"noise": noise, "black and white": (noise > 127).byte() * 255, "smooth": smooth}[kind])
    found = [levels_from_pillow(image, Augmentation(scale=(0.05, 1.0), interpolation=interpolation), size, seed) for seed in range(20)]
    assert max(levels.max() for levels in found) <= 4
    assert torch.stack(found).float().mean() < 0.1


@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="needs the photos of shared/data/imagenette beside the repository")
def test_training_crops_of_photographs_are_within_four_levels_of_pillows():
    paths = open_data(str(IMAGENETTE)).train.paths[::20]
    found = [levels_from_pillow(read_image(path), Augmentation(), (size, size), size) for path in paths for size in (96, 224)]
    assert max(levels.max() for levels in found) <= 4
    assert max(levels.float().mean() for levels in found) < 0.1


@pytest.mark.parametrize("options", [{"randaugment": "rand-m9-n1-p0"}, {"color_jitter": 1e-9}, {"grey": 1e-9}, {"blur": 1e-9}])
def test_steps_that_need_pillow_follow_the_same_crop(options):
    """The options add a step without effect."""
    for seed in range(5):
        crops = []
        for augmentation in (Augmentation(), Augmentation(**options)):
            torch.manual_seed(seed)
            crops.append(worker_transform(augmentation, in_memory(pictures(1)), (24, 24))(photo(pictures(1, 40)[0])))
        assert torch.equal(*crops)


def test_impossible_boxes_are_clipped_to_the_image():
    boxes = random_boxes(uniforms(10, BOX), (1.0, 1.0), (1.0, 1.0), 10, 40)
    torch.testing.assert_close(boxes[:, 2:], torch.tensor([[10.0, 20.0]]).expand(10, 2))


def test_squash_keeps_the_whole_image_in_training_and_evaluation_for_any_shape():
    """The other views cut off the red column at the left of a wide image."""
    image = Image.new("RGB", (60, 20))
    image.paste((255, 0, 0), (0, 0, 6, 20))
    data = replace(open_data("digits"), image_size=None)
    for crop, side, kept in (("squash", 0, True), ("none", None, False)):
        for augmentation in (Augmentation(crop=crop, flip=0.0), None):
            seen = worker_transform(augmentation, data, (20, 20), side)(image)
            assert seen.shape == (3, 20, 20) and (seen[0, :, 0] > 200).all().item() == kept


@pytest.mark.parametrize(
    "options", [{"crop": "none"}, {"crop": "none", "resize": 112}, {"crop": "none", "resize": 150}, {"crop": "squash"}]
)
@pytest.mark.parametrize("shape", [(300, 200), (201, 333)])
def test_evaluation_can_use_the_same_view_of_a_whole_image_as_training(options, shape):
    image = Image.fromarray(pictures(1, 64)[0].permute(1, 2, 0).numpy()).resize(shape)
    photos, augmentation = replace(in_memory(pictures(1)), image_size=None), Augmentation(flip=0.0, **options)
    trained = worker_transform(augmentation, photos, (112, 112))(image)
    assert torch.equal(worker_transform(None, photos, (112, 112), augmentation.evaluation_resize)(image), trained)
    assert not torch.equal(worker_transform(None, photos, (112, 112), 200)(image), trained)
    assert Augmentation(resize=150).evaluation_resize is None  # evaluation cannot show a random crop


def test_flip_mirrors_left_and_right_with_its_probability():
    images = pictures(1).expand(400, -1, -1, -1)
    flipped = augment(images, uniforms(400), Augmentation(crop="none", flip=0.25), (12, 12))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    assert 0.18 < mirrored.float().mean() < 0.32


def test_jitter_with_the_middle_draw_leaves_images_unchanged():
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


@pytest.mark.parametrize("path", ["memory", "worker"])
def test_grey_converts_its_fraction_of_images_to_luma_in_three_equal_channels(path):
    image = pictures(1)[0]
    results = copies(image, Augmentation(crop="none", flip=0.0, grey=0.2), path)
    greyed = (results != image).flatten(1).any(1)
    assert 0.14 < greyed.float().mean() < 0.26
    rounding = 1e-3 if path == "memory" else 0.51  # Pillow rounds to integers
    torch.testing.assert_close(results[greyed], luma(image).expand_as(results[greyed]), atol=rounding, rtol=0)
    assert (results[greyed] == results[greyed][:, :1]).all()


@pytest.mark.parametrize("path", ["memory", "worker"])
def test_blur_smooths_its_fraction_of_images_and_keeps_their_mean(path):
    image = pictures(1, 24)[0]
    results = copies(image, Augmentation(crop="none", flip=0.0, blur=0.3), path)
    blurred = (results != image).flatten(1).any(1)
    assert 0.23 < blurred.float().mean() < 0.37
    sharpness = high_frequencies(results[blurred]) / high_frequencies(image.float())
    assert sharpness.max() < 1 and sharpness.min() < 0.02
    torch.testing.assert_close(results[blurred].mean((2, 3)), image.float().mean((1, 2)).expand(blurred.sum(), 3), atol=1.5, rtol=0)


@pytest.mark.parametrize("path", ["memory", "worker"])
def test_blur_radii_are_uniform_between_a_tenth_and_two_pixels(path):
    dot = torch.zeros(3, 31, 31, dtype=torch.uint8)
    dot[:, 15, 15] = 255
    heights = copies(dot, Augmentation(crop="none", flip=0.0, blur=1.0), path)[:, 0, 15, 15]
    expected = blur(dot.expand(2000, -1, -1, -1).float(), torch.linspace(0.1, 2.0, 2000))[:, 0, 15, 15]
    quantiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(heights.quantile(quantiles), expected.quantile(quantiles), atol=3, rtol=0.2)


@pytest.mark.parametrize("radius", [BLUR_RADIUS[0], 0.3, 0.6, 1.0, 1.5, BLUR_RADIUS[1]])
@pytest.mark.parametrize("image", ["smooth", "noisy"])
def test_batch_blur_matches_pillows_gaussian_blur(image, radius):
    # Both apply three box filters per axis. Pillow rounds to integers after each of the six, by half a level each time: the difference was
    # 3.0 at most and 1.04 on average (191 radii). A sampled Gaussian of this radius differs by up to 33 levels on noise, 27 at a border.
    ramp = torch.arange(48.0)
    smooth = (127 + 100 * torch.sin(ramp / 7) * torch.cos(ramp / 5)[:, None]).expand(3, -1, -1)
    before = smooth.round().byte() if image == "smooth" else pictures(1, 48)[0]
    theirs = pil_to_tensor(photo(before).filter(ImageFilter.GaussianBlur(radius))).float()
    difference = (blur(before[None].float(), torch.tensor([radius]))[0] - theirs).abs()
    assert difference.max() < 3.2 and difference.mean() < 1.1


def test_the_blur_radius_is_the_standard_deviation_of_a_blurred_dot():
    dots, radii, place = torch.zeros(4, 1, 41, 41), torch.tensor([0.1, 0.7, 1.3, 2.4]), torch.arange(41.0) - 20
    dots[:, :, 20, 20] = 1
    for axis in (2, 3):
        profiles = blur(dots, radii).sum((1, axis))
        torch.testing.assert_close(profiles.sum(1), torch.ones(4))
        torch.testing.assert_close((profiles * place**2).sum(1).sqrt(), radii)


def test_grey_and_blur_come_after_jitter_in_both_paths():
    asked = Augmentation(color_jitter=0.4, grey=0.2, blur=0.5)
    worker = [type(step).__name__ for step in worker_transform(asked, in_memory(pictures(1)), (12, 12)).transforms]
    assert worker[1:-1] == ["RandomHorizontalFlip", "ToPILImage", "ColorJitter", "RandomGrayscale", "RandomApply"]
    images, draws = pictures(8), uniforms(8)
    before = augment(images, draws, Augmentation(color_jitter=0.4), (12, 12))
    after = augment(images, draws, replace(asked, grey=1.0, blur=1.0), (12, 12))
    expected = blur(luma(before)[:, None].expand(-1, 3, -1, -1), 0.1 + 1.9 * draws[:, -3])
    torch.testing.assert_close(after, expected, atol=1e-2, rtol=0)


def test_one_channel_images_are_blurred_and_not_changed_by_grey():
    images = pictures(4, channels=1)
    plain, draws = Augmentation(crop="none"), uniforms(4)
    assert torch.equal(augment(images, draws, replace(plain, grey=1.0), (12, 12)), augment(images, draws, plain, (12, 12)))
    assert (high_frequencies(augment(images, draws, replace(plain, blur=1.0), (12, 12))) < high_frequencies(images.float())).all()


def test_erasing_fills_one_box_with_noise_in_its_fraction_of_images():
    erased = erase(torch.full((400, 3, 32, 32), 9.0), uniforms(400), 0.25)
    changed = (erased != 9).any(1)
    touched = changed.flatten(1).any(1)
    assert 0.18 < touched.float().mean() < 0.32
    noise = erased[erased != 9]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    for mask in changed[touched]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)  # a full rectangle


def test_the_augmentation_of_an_image_does_not_depend_on_its_batch():
    images, draws = pictures(10), uniforms(10)
    everything = Augmentation(color_jitter=0.4, grey=0.5, blur=0.5, erase=0.5)

    def run(part):
        return erase(normalize(augment(images[part], draws[part], everything, (12, 12)), (0.5,) * 3, (0.2,) * 3), draws[part], 0.5)

    torch.testing.assert_close(run(slice(0, 10)), torch.cat([run(slice(i, i + 1)) for i in range(10)]), atol=1e-5, rtol=0)


def test_normalisation_can_be_undone_exactly():
    images = pictures(2)
    normal = normalize(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert normal.dtype == torch.float32
    restored = (normal * torch.tensor([0.2, 0.3, 0.4])[:, None, None] + torch.tensor([0.4, 0.5, 0.6])[:, None, None]) * 255
    assert torch.equal(restored.round().byte(), images)


def test_grey_images_get_the_channels_of_the_mean():
    grey, mean, std = pictures(2, channels=1), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    assert torch.equal(normalize(grey, mean, std), normalize(grey.expand(-1, 3, -1, -1), mean, std))


def test_normalisation_leaves_its_input_unchanged():
    floats = pictures(2).float()
    before = floats.clone()
    normalize(floats, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert torch.equal(floats, before)


def test_resizing_to_the_same_size_changes_nothing():
    images = pictures(2)
    assert torch.equal(resize(images, (12, 12)), images.float())
    assert resize(images, (24, 16)).shape == (2, 3, 24, 16)


@pytest.mark.parametrize(
    "options", [{"crop": "resize"}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"randaugment": "9"}, {"repeats": 0}, {"resize": 0}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)


@pytest.mark.parametrize("option", ["grey", "blur"])
@pytest.mark.parametrize("value", [-0.1, 1.5, 20, float("nan")])
def test_a_value_that_is_no_probability_is_refused_with_the_name_of_the_option(option, value):
    with pytest.raises(ValueError, match=rf"^{option}={value}: .*0\.\.1$"):
        Augmentation(**{option: value})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["none", "padding", "resized"])
def test_randaugment_works_for_images_in_memory(crop, channels):
    data = in_memory(pictures(16, channels=channels))
    augmentation = Augmentation(crop=crop, randaugment="rand-m9-mstd0.5-inc1", erase=0.25, color_jitter=0.1)
    batches = Loader(data.train, data=data, image_size=(16, 16), batch_size=8, augmentation=augmentation, seed=0, device=CPU, workers=0)
    images, labels = next(batches.epoch(0))
    assert images.shape == (8, channels, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64


def test_randaugment_works_at_its_strongest_magnitude():
    # magnitude 10 keeps zero bits of a colour, which Pillow 13 refuses by default
    data = in_memory(pictures(1))
    transform = worker_transform(Augmentation(randaugment="rand-m10-n6-p1-inc1"), data, (12, 12))
    picture = Image.new("RGB", (12, 12), (90, 120, 200))
    for _ in range(60):
        assert transform(picture).shape == (3, 12, 12)


def test_evaluation_center_crops_photos_and_keeps_small_images_whole():
    photos = replace(in_memory(pictures(1)), image_size=None)
    photo = Image.new("RGB", (256, 256))
    photo.paste((255, 255, 255), (16, 16, 240, 240))  # the central 224 pixels
    assert (worker_transform(None, photos, (224, 224))(photo) == 255).all()
    small = Image.fromarray(pictures(1, 64)[0].permute(1, 2, 0).numpy())
    assert torch.equal(worker_transform(None, photos, (64, 64))(small), pictures(1, 64)[0])
    assert worker_transform(None, photos, (96, 160))(photo).shape == (3, 96, 160)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_the_gpu_equal_those_on_the_cpu():
    data = in_memory(pictures(32))
    options = {
        "data": data,
        "image_size": (16, 16),
        "batch_size": 16,
        "augmentation": Augmentation(color_jitter=0.4, grey=0.2, blur=0.5),
        "seed": 0,
        "workers": 0,
    }
    here, there = (next(Loader(data.train, device=torch.device(name), **options).epoch(0)) for name in ("cpu", "cuda"))
    torch.testing.assert_close(there[0].cpu(), here[0], atol=1e-3, rtol=0)
    assert torch.equal(there[1].cpu(), here[1])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"flip": 2}, "flip=2: a probability is in 0..1"),
        ({"erase": -0.1}, "erase=-0.1: a probability"),
        ({"interpolation": "nearest"}, "interpolation='nearest': choose bilinear or bicubic"),
        ({"padding": -1}, "padding=-1: must be 0 or more"),
        ({"color_jitter": -0.4}, "color_jitter=-0.4: must be 0 or more"),
    ],
)
def test_an_option_out_of_its_range_is_refused_and_named(option, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**option)
