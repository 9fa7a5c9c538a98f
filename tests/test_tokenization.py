"""Tests of tokenization: the crop that a tokenizer gets, the effect of each option, and the figure of codes."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from common.convert import ConversionError
from common.data import Augmentation, Data, DataError, Loader, Split, open_data
from common.picture import draw_codewords
from common.recipe import RecipeError
from common.vit import vit
from mapet import tokenizers
from mapet.tokenizers import nearest_patches
from mapet.tokenizers.features import Pixels
from mapet.tokenizers.kmeans import NearestCentroid, nearest_codes
from tests.test_tokenizers import RESNET, released, save_run, saved
from tests.test_tokens import CODES, CPU, NO_AUG, SIZE, digits, draw_pictures, only_dir, prepare, reproduction, small_steps  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_steps")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


# ---- the crop


def draw_coordinates(folder: Path) -> Data:
    """Images of several shapes: red and green encode the position of a pixel, blue the image number."""
    for part in ("train", "val"):
        (folder / part / "a").mkdir(parents=True)
        for number, (width, height) in enumerate([(300, 200), (201, 333), (112, 112), (130, 129)]):
            down, across = numpy.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
            pixels = numpy.stack([255 * down, 255 * across, 0 * down + 40 * number], -1).round().astype(numpy.uint8)
            Image.fromarray(pixels).save(folder / part / "a" / f"{number}.png")
    return open_data(str(folder))


@pytest.mark.parametrize("view", [{"resize": None}, {"resize": 112}, {"resize": 150}, {"crop": "squash"}], ids=str)
@pytest.mark.parametrize("zoom", [1, 2])
def test_the_tokenizer_gets_the_same_crop_of_an_image_as_the_model(tmp_path, monkeypatch, view, zoom):
    """In training and in validation, also for a tokenizer with larger images."""
    data, real, seen = draw_coordinates(tmp_path / "pictures"), tokenizers.write_tokens, {}

    def watched(partial, tokenizer, loaders, *others):
        seen.update({part: next(loader.epoch(0))[0] for part, loader in loaders.items()})
        return real(partial, tokenizer, loaders, *others)

    monkeypatch.setattr(tokenizers, "write_tokens", watched)
    monkeypatch.setattr(tokenizers, "_features", lambda *_: Pixels(zoom * 8, (zoom * 112,) * 2, data.mean, data.std))
    run = reproduction(tmp_path, data, 112, 8, **view)
    run.prepare()
    stage = run.recipe.pretrain
    loader = run.loader(data.train, stage.augmentation)
    trained, validated = next(loader.epoch(0))[0], next(run.loader(data.val).epoch(0))[0]
    trained = trained[loader.indices(0)[0].argsort()]
    assert torch.equal(trained, validated) and len(trained[:, 2, 0, 0].unique()) == 4
    across = trained[0, 1, 50].max() - trained[0, 1, 50].min()  # of an image that is 1.5 times as wide as high
    assert (across > 0.9 / data.std[1]) == (view == {"crop": "squash"})
    for part in ("train", "val"):
        if zoom == 1:
            assert torch.equal(seen[part], trained)
        else:
            assert (F.avg_pool2d(seen[part], 2) - trained).abs().max() < 3 / 255 / min(data.std)


def test_images_in_memory_are_never_resized_or_cropped(tmp_path, monkeypatch):
    data, names = digits(), set()
    for resize in (None, 224):
        run = reproduction(tmp_path, data, 8, 2, resize=resize)
        names |= {path.name for path in (tmp_path / "tokens").glob("*[!k]")} if run.prepare() else set()
        assert next(run.loader(data.val).epoch(0))[0].shape == (4, 1, 8, 8)
    assert len(names) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 0.5}, "pretrain.augmentation.flip=0.5: .* set it to 0"),
        ({"crop": "resized"}, "pretrain.augmentation.crop=resized: .* set it to none or squash"),
        ({"crop": "padding"}, "pretrain.augmentation.crop=padding: .* set it to none or squash"),
        ({"randaugment": "rand-m9"}, "pretrain.augmentation.randaugment=rand-m9: .* set it to null"),
    ],
)
def test_augmentation_that_moves_patches_is_refused_by_name_before_tokens_are_made(folder, tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        prepare(open_data(str(folder)), tmp_path / "tokens", augmentation=replace(NO_AUG, **change))
    assert not (tmp_path / "tokens").exists()


def test_images_smaller_than_the_crop_are_refused_by_tokenizer_and_training(folder, tmp_path):
    data, small = open_data(str(folder)), replace(NO_AUG, resize=12)
    options = {"data": data, "image_size": (16, 16), "batch_size": 4, "seed": 0, "device": CPU, "workers": 0}
    for make in (lambda: prepare(data, tmp_path / "tokens", augmentation=small), lambda: Loader(data.train, augmentation=small, **options)):
        with pytest.raises(DataError, match="resized to 12 pixels, smaller than the 16 pixels of the model"):
            make()
    Loader(data.train, augmentation=replace(small, crop="resized"), **options)  # does not use resize


# ---- tokenizers


def test_clip_tokens_of_files_and_grey_images_do_not_depend_on_the_global_seed(folder, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "resnet", RESNET)
    monkeypatch.setattr(open_clip, "list_models", lambda: ["resnet"])
    targets, fit = {"tokenizer": "kclip", "model": "resnet", "weights": None, "size": 64}, {"image_size": 16, "patch_size": 8}
    for data in (open_data(str(folder)), digits()):
        found = []
        for number in range(2):
            torch.manual_seed(number)
            found.append(prepare(data, tmp_path / f"{data.name}{number}", targets, **fit).train.labels)
            assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(number))  # the global random state is unchanged
        assert torch.equal(*found) and found[0].shape == (len(data.train), 4) and len(found[0].unique()) > 3
    with pytest.raises(RecipeError, match="gives 3 x 3 tokens for an image, and the encoder has 2 x 2 patches: set targets.size to fit"):
        prepare(digits(), tmp_path / "other", targets | {"size": 96}, **fit)


def test_vqkd_tokenises_files_and_grey_images(folder, tmp_path):
    targets = {"tokenizer": "vqkd", "checkpoint": str(saved(tmp_path, released()))}
    fit = {"image_size": 12, "patch_size": 4, "vocabulary": 50}
    for data in (open_data(str(folder)), digits()):
        found = prepare(data, tmp_path / f"{data.name}s", targets, **fit)
        assert found.train.labels.shape == (len(data.train), 9) and len(found.train.labels.unique()) > 3
        assert not (only_dir(tmp_path / f"{data.name}s") / "codebook.safetensors").exists()
    for changed, options, message in (
        ({}, {"vocabulary": 8}, "the tokenizer has 50 tokens: set method.vocabulary=50, not 8"),
        ({}, {"image_size": 8}, "gives 3 x 3 tokens .* has 2 x 2 patches: set image_size or patch_size to fit"),
        ({"checkpoint": "nowhere.pth"}, {}, "there is no checkpoint at"),
    ):
        with pytest.raises((RecipeError, ConversionError), match=message):
            prepare(digits(), tmp_path / "other", targets | changed, **fit | options)


def test_an_encoder_of_a_run_can_make_tokens(folder, tmp_path):
    path = save_run(tmp_path / "run", vit("micro", image_size=16, patch_size=4))
    found = prepare(open_data(str(folder)), tmp_path / "tokens", {"features": str(path)})
    assert found.train.labels.shape == (10, 16) and len(found.train.labels.unique()) > 3


# ---- the figure


def test_the_figure_shows_codes_with_their_nearest_patches(tmp_path, monkeypatch):
    for name, value in {"CODEWORDS": 4, "PATCHES": 5, "LOOKED_AT": 20, "draw_codewords": draw_codewords}.items():
        monkeypatch.setattr(tokenizers, name, value)
    data = digits()
    found = prepare(data, tmp_path)
    assert Image.open(only_dir(tmp_path) / "codewords.png").width > 300
    tokenizer = NearestCentroid(Pixels(2, (8, 8), data.mean, data.std), load_file(only_dir(tmp_path) / "codebook.safetensors")["centroids"])
    options = {"data": data, "image_size": (8, 8), "augmentation": None, "seed": 0, "device": CPU, "workers": 0}
    shown = nearest_patches(tokenizer, Loader(data.train, batch_size=4, **options), found.train.labels, CPU)
    subset = data.train.subset(range(0, 40, 2))
    ids, distances = tokenizer(next(Loader(subset, batch_size=20, **options).epoch(0))[0])
    counts = torch.bincount(ids.flatten(), minlength=CODES).tolist()
    titles = [tuple(map(int, re.fullmatch(r"token (\d+): (\d+) of 320 patches", name).groups())) for name in shown]
    often = [count for _, count in titles]
    assert len(shown) == 4 and all(counts[code] == count for code, count in titles)
    assert often == sorted(often, reverse=True) and (often[0], often[-1]) == (max(counts), min(filter(None, counts)))
    for (code, count), patches in zip(titles, shown.values(), strict=True):
        assert len(patches) == min(5, count) and {tuple(patch.shape) for patch in patches} == {(1, 2, 2)}
        own, distance = nearest_codes(torch.stack(patches).flatten(1), tokenizer.centroids)
        assert set(own.tolist()) == {code}
        torch.testing.assert_close(distance, distances[ids == code].sort().values[:5])


def test_patches_of_the_figure_come_from_the_positions_of_their_tokens():
    """Also in a grid that does not divide the image, as in a convolutional network."""

    class Cells(torch.nn.Module):
        vocabulary, grid, size = 9, (3, 3), (11, 11)

        def forward(self, images):
            return torch.arange(9).expand(len(images), 9), torch.zeros(len(images), 9)

    split = Split(torch.zeros(1), torch.arange(121, dtype=torch.uint8).view(1, 1, 11, 11))
    data = Data("one", 1, 1, (11, 11), (0.0,), (1.0,), split, split)
    loader = Loader(split, data=data, image_size=(11, 11), batch_size=1, augmentation=None, seed=0, device=CPU, workers=0)
    shown = nearest_patches(Cells(), loader, torch.arange(9)[None], CPU)
    assert len(shown) == 9
    for name, (patch,) in shown.items():
        row, column = divmod(int(re.search(r"\d+", name)[0]), 3)
        assert round(255 * patch[0, 0, 0].item()) == 11 * (row * 11 // 3) + column * 11 // 3


# ---- one store per setting


def store_name(tmp_path: Path, data: Data, targets: dict | None = None, **options) -> str:
    """Return the name of the folder that the tokens would have."""
    with pytest.raises(RecipeError, match="there are no tokens in") as caught:
        prepare(data, tmp_path / "tokens", targets, make=False, **options)
    return re.search(r"tokens/(\S+),", str(caught.value))[1]


def test_options_that_change_tokens_and_only_these_have_a_separate_store(folder, tmp_path):
    data = open_data(str(folder))
    clip, network = {"tokenizer": "kclip"}, {"features": "resnet50"}
    checkpoint = {"tokenizer": "vqkd", "checkpoint": str(saved(tmp_path, released()))}
    run = {"features": str(save_run(tmp_path / "pixels", vit("micro", image_size=16, patch_size=4)))}
    changes = [{}, {"features": "normalised_pixels"}, {"sample": 100}, {"iterations": 3}, {"redos": 2}, network, network | {"size": 96}]
    changes += [clip, *(clip | more for more in ({"model": "RN50"}, {"weights": None}, {"layer": 3}, {"size": 224}, {"redos": 2}))]
    changes += [checkpoint, run, run | {"size": 32}]
    options = [{"vocabulary": 9}, {"image_size": 32}, {"image_size": 32, "patch_size": 8}]
    options += [{"augmentation": replace(NO_AUG, **view)} for view in ({"resize": 20}, {"crop": "squash"})]
    names = [store_name(tmp_path, data, change) for change in changes] + [store_name(tmp_path, data, **option) for option in options]
    assert len(set(names)) == len(names)
    assert store_name(tmp_path, replace(data, name="others")) not in names

    def same(one: dict, other: dict, **options) -> bool:
        return store_name(tmp_path, data, one) == store_name(tmp_path, data, other, **options)

    assert same({}, {"model": "RN50", "weights": None, "layer": 3, "size": 96, "checkpoint": checkpoint["checkpoint"]})
    assert same(clip, clip | {"features": "normalised_pixels", "size": 448}) and same(checkpoint, checkpoint | {"redos": 2, "size": 5})
    changed = Augmentation(crop="none", flip=0.0, color_jitter=0.4, grey=0.1, blur=0.1, erase=0.5, repeats=2, resize=SIZE)
    assert same({}, {}, workers=3, device=torch.device("cuda"), augmentation=changed)


def test_a_file_is_identified_by_its_content(folder, tmp_path):
    data, path = open_data(str(folder)), saved(tmp_path, released())
    run = save_run(tmp_path / "run", vit("micro", image_size=16, patch_size=4))

    def vqkd(path: Path) -> str:
        return store_name(tmp_path, data, {"tokenizer": "vqkd", "checkpoint": str(path)})

    first, encoder = vqkd(path), store_name(tmp_path, data, {"features": str(run)})
    moved = shutil.copy(path, tmp_path / "other.pth")
    (tmp_path / "recipe.json").write_text("is of something else")
    assert vqkd(moved) == first
    moved.write_bytes(moved.read_bytes() + b" ")
    assert vqkd(moved) != first
    shutil.copytree(run.parent, tmp_path / "copy")
    assert store_name(tmp_path, data, {"features": str(tmp_path / "copy" / run.name)}) == encoder
    recipe = run.with_name("recipe.json")
    recipe.write_text(recipe.read_text().replace('"image_size": 16', '"image_size": 32'))
    assert store_name(tmp_path, data, {"features": str(run)}) != encoder
