"""Tests of MaPeT's tokenizers: features, sampling, k-means centroids and nearest codes.

Shapes: B images, C channels, N patches, D width, K codes.
"""

import copy
import json
import shutil
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import export_encoder
from common.convert import ConversionError
from common.data import Augmentation, Data, Loader, Split
from common.recipe import RecipeError
from common.run import RunError
from common.vit import vit
from mapet.tokenizers import kmeans
from mapet.tokenizers.features import Clip, Encoder, Features, Pixels
from mapet.tokenizers.kmeans import NearestCentroid, fit_centroids, nearest_codes, sample_features
from mapet.tokenizers.vqkd import VQKD, load_vqkd

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CPU = torch.device("cpu")
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
RESNET = {"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, "text_cfg": TEXT}
TRANSFORMER = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}


def images(count: int = 2, size: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def split(count: int) -> Split:
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Split(torch.zeros(count, dtype=torch.int64), pixels, class_names=("one",))


def loader(count: int = 23, batch: int = 4, kind: type[Loader] = Loader, **options) -> Loader:
    """Noise images in memory, so that every patch is unique."""
    part = split(count)
    data = Data("noise", 1, 3, (8, 8), MEAN, STD, part, part)
    settings = {"image_size": (8, 8), "batch_size": batch, "augmentation": None, "seed": 0, "device": CPU, "workers": 0}
    return kind(part, data=data, **settings | options)


class Counted(Pixels):
    """Pixels of 16 patches; records the batch size of each call."""

    def __init__(self, **options):
        super().__init__(**{"patch_size": 2, "size": (8, 8), "mean": MEAN, "std": STD} | options)
        self.given = []

    def look(self, images_BCHW: Tensor) -> Tensor:
        self.given.append(len(images_BCHW))
        return super().look(images_BCHW)


def sample(file: Path, loader_: Loader | None = None, features: Features | None = None, n: int = 23, vectors: int = 100, **options):
    return sample_features(features or Counted(), loader_ or loader(), n, vectors, file, **{"seed": 0, "device": CPU} | options)


def save_run(directory: Path, network: nn.Module, **recipe) -> Path:
    """Write the encoder files of a run."""
    directory.mkdir(exist_ok=True)
    export_encoder(network, directory / "encoder.safetensors")
    settings = {"size": "micro", "image_size": 16, "patch_size": 4, "encoder": {}, "data": ["digits"], "method": {}} | recipe
    (directory / "recipe.json").write_text(json.dumps({"paper": "any", "data": "digits", "recipe": settings}))
    return directory / "encoder.safetensors"


@pytest.fixture
def tiny_clip(monkeypatch):
    """Small CLIP models under open_clip names; norms have random weights and real statistics, so that images differ."""
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "resnet", RESNET)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "transformer", {**RESNET, "vision_cfg": TRANSFORMER})
    monkeypatch.setattr(open_clip, "list_models", lambda: ["resnet", "transformer", "RN50x64"])

    def make(*arguments, **options) -> Clip:
        torch.manual_seed(0)
        clip = Clip(*arguments, **{"weights": None} | options)
        for layer in clip.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
                layer.momentum = None
        clip.visual.train()
        with torch.no_grad():
            clip.look(images(16, clip.size[0]))
        clip.visual.eval()
        return clip

    return make


# ---- features: pixels


def test_pixel_features_are_the_pixels_of_each_patch_in_row_major_order():
    x = images(2, 8)
    patch_BND = Pixels(4, (8, 8), MEAN, STD)(x)
    for cell, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(patch_BND[:, cell], x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1))
    assert patch_BND.shape == (2, 4, 48) and Pixels(4, (8, 16), MEAN, STD).grid == (2, 4)


def test_normalised_pixels_have_mean_0_and_std_1_and_a_constant_patch_is_0():
    x = images(2, 8)
    x[0, :, :4, :4] = 0.7
    x[0, :, 4:, 4:] *= 1e-3 / x[0, :, 4:, 4:].std()
    patch_BND = Pixels(4, (8, 8), MEAN, STD, per_patch=True)(x)
    assert patch_BND[0, 0].abs().max() < 1e-3
    assert patch_BND[0, 3].std().item() == pytest.approx(0.5**0.5, rel=1e-4)  # epsilon 1e-6, as in MAE, and a variance of 1e-6
    assert patch_BND[1].mean(-1).abs().max() < 1e-6 and (patch_BND[1].std(-1) - 1).abs().max() < 1e-5
    assert not torch.allclose(Pixels(4, (8, 8), MEAN, STD)(x)[1].std(-1), torch.ones(4), atol=1e-5)


# ---- features: encoders


@pytest.mark.parametrize("options", [{"class_token": True, "position": "learned"}, {"class_token": False, "position": "relative"}])
def test_our_encoder_gives_its_patch_tokens_after_the_norm(tmp_path, options):
    network = vit("micro", image_size=16, patch_size=4, **options)
    nn.init.normal_(network.norm.weight)
    encoder = Encoder(save_run(tmp_path, network, encoder=options), mean=MEAN, std=STD)
    assert (encoder.size, encoder.grid, encoder.mean, encoder.std) == ((16, 16), (4, 4), MEAN, STD)
    with torch.no_grad():
        assert torch.equal(encoder(images(2, 16)), network(images(2, 16))[:, int(options["class_token"]) :])


def test_our_encoder_accepts_another_image_size_and_its_number_of_channels(tmp_path):
    path = save_run(tmp_path, vit("micro", image_size=16, patch_size=4, channels=1, position="learned"), encoder={"position": "learned"})
    encoder = Encoder(path, mean=(0.5,), std=(0.2,), size=24)
    assert encoder.grid == (6, 6) and encoder(images(1, 24, 1)).shape == (1, 36, 96)
    with pytest.raises(ConversionError, match="another architecture: patch_embed"):
        Encoder(path, mean=MEAN, std=STD)


def test_the_encoder_of_a_run_may_be_a_timm_backbone(tmp_path):
    network = timm.create_model("resnet10t", pretrained=False, num_classes=0).eval()
    encoder = Encoder(save_run(tmp_path, network, size="resnet10t", image_size=64, patch_size=None), mean=MEAN, std=STD)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images()), network.forward_features(images()).flatten(2).transpose(1, 2))


def test_a_timm_transformer_gives_its_patch_tokens_after_the_norm():
    encoder = Encoder("vit_tiny_patch16_224", pretrained=False, size=64)
    nn.init.normal_(encoder.network.norm.weight)
    with torch.no_grad():
        expected = encoder.network.forward_features(images())[:, 1:]
    torch.testing.assert_close(encoder(images()), expected)
    assert encoder.grid == (4, 4) and encoder.mean == (0.5, 0.5, 0.5)


def test_a_timm_cnn_gives_its_last_feature_map_at_any_image_size():
    own, other = Encoder("resnet10t", pretrained=False), Encoder("resnet10t", pretrained=False, size=96)
    assert (own.size, own.grid, other.size, other.grid) == ((176, 176), (6, 6), (96, 96), (3, 3))
    with torch.no_grad():
        map_BDHW = other.network.forward_features(images(2, 96))
    torch.testing.assert_close(other(images(2, 96))[:, 5], map_BDHW[:, :, 1, 2])
    assert other.mean == timm.data.IMAGENET_DEFAULT_MEAN


def test_a_network_without_a_final_norm_gives_unnormalised_features(monkeypatch):
    real = timm.models.ResNet.forward_intermediates

    def without(self, x, indices, norm, **options):
        assert not norm, "normalization of features not supported"
        return real(self, x, indices, **options)

    expected = Encoder("resnet10t", pretrained=False, size=64)
    monkeypatch.setattr(timm.models.ResNet, "forward_intermediates", without)
    torch.testing.assert_close(copy.deepcopy(expected)(images()), expected.look(images()).flatten(2).transpose(1, 2))


def test_features_stay_frozen_and_in_evaluation_mode():
    encoder = Encoder("resnet10t", pretrained=False, size=64)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    nn.ModuleList([encoder]).train()
    feature_BND = encoder(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not feature_BND.requires_grad and not any(parameter.requires_grad for parameter in encoder.parameters())


def test_features_are_float32_even_if_the_network_is_not():
    encoder = Encoder("resnet10t", pretrained=False, size=32)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.look(images(1, 32)).dtype == torch.bfloat16 and encoder(images(1, 32)).dtype == torch.float32


@pytest.mark.parametrize(("height", "width", "channels"), [(48, 48, 3), (64, 32, 3), (64, 64, 1)])
def test_images_of_another_shape_are_refused(height, width, channels):
    with pytest.raises(ValueError, match=r"takes images of \(3, 64, 64\), not"):
        Pixels(16, (64, 64), MEAN, STD)(torch.zeros(1, channels, height, width))


def test_an_unusable_encoder_is_refused_with_the_fix(tmp_path, monkeypatch):
    path, given = save_run(tmp_path / "run", vit("micro", image_size=16, patch_size=4)), {"mean": MEAN, "std": STD}
    with pytest.raises(RecipeError, match="does not contain mean and std of its images: give those of its training data"):
        Encoder(path, mean=MEAN)
    with pytest.raises(ConversionError, match="there is no checkpoint at .*nowhere"):
        Encoder(tmp_path / "nowhere.safetensors", **given)
    (path.parent / "progress.json").touch()
    with pytest.raises(RecipeError, match="the pre-training in .*run is not finished, so encoder.safetensors will change: finish it first"):
        Encoder(path, **given)
    alone = shutil.copy(path, tmp_path / "encoder.safetensors")
    with pytest.raises(RecipeError, match="recipe.json does not say what encoder.safetensors is .*FileNotFound.*its run's directory"):
        Encoder(alone, **given)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(RecipeError, match="does not say what encoder.safetensors is .*'recipe'"):
        Encoder(alone, **given)
    with pytest.raises(RecipeError, match="timm has no model 'resnet10'.*did you mean resnet10t"):
        Encoder("resnet10")
    with pytest.raises(RecipeError, match=r"timm cannot give resnet18.nonsense, .*Invalid pretrained tag \(nonsense\)"):
        Encoder("resnet18.nonsense", pretrained=False)
    with pytest.raises(RecipeError, match="timm cannot give botnet50ts_256, pretrained=True.*No pretrained"):
        Encoder("botnet50ts_256")
    monkeypatch.setattr(timm.models.ResNet, "forward_intermediates", lambda self, x, **options: [x.flatten(1)])
    with pytest.raises(RecipeError, match="resnet10t gives no grid of features at 64 pixels"):
        Encoder("resnet10t", pretrained=False, size=64)
    monkeypatch.delattr(timm.models.ResNet, "forward_intermediates")
    with pytest.raises(RecipeError, match="resnet10t gives no grid of features at 64 pixels .*forward_intermediates"):
        Encoder("resnet10t", pretrained=False, size=64)
    with pytest.raises(ValueError, match="8 x 6 pixels are not a multiple of patch_size=4"):
        Pixels(4, (8, 6), MEAN, STD)


# ---- features: CLIP


def test_the_last_stage_of_a_clip_resnet_is_not_negative(tiny_clip):
    clip = tiny_clip("resnet", layer=4, size=64)
    x = clip(images())
    assert x.shape == (2, 4, 256) and (x >= 0).all() and (x == 0).any() and x.std() > 0
    assert (clip.size, clip.grid, clip.mean[0]) == ((64, 64), (2, 2), 0.48145466)


def test_layer_n_of_a_clip_resnet_is_the_stem_plus_n_stages(tiny_clip):
    for layer, grid in enumerate([16, 16, 8, 4, 2]):
        clip = tiny_clip("resnet", layer=layer, size=64)
        visual = clip.visual
        with torch.no_grad():
            x = nn.Sequential(*[visual.layer1, visual.layer2, visual.layer3, visual.layer4][:layer])(visual.stem(images()))
        assert clip.grid == (grid, grid) and torch.equal(clip(images()), x.flatten(2).transpose(1, 2))


def test_a_clip_resnet_computes_nothing_after_its_layer(tiny_clip):
    clip = tiny_clip("resnet", layer=2, size=64)
    clip.visual.layer3 = clip.visual.layer4 = None
    assert clip(images()).shape == (2, 64, 64) and not any("attnpool" in name for name in clip.state_dict())


def test_a_clip_resnet_accepts_another_image_size(tiny_clip):
    assert tiny_clip("resnet", layer=4, size=96)(images(1, 96)).shape == (1, 9, 256)


def test_a_clip_transformer_gives_the_patch_tokens_of_a_block_at_any_image_size(tiny_clip):
    clip = tiny_clip("transformer", layer=1, size=48)
    seen = []
    clip.visual.transformer.resblocks[1].register_forward_hook(lambda *a: seen.append(a[-1]))
    clip.visual.transformer.resblocks[2] = None
    x = clip(images(2, 48))
    assert x.shape == (2, 9, 64) and torch.equal(x, seen[0][:, 1:])


def test_clip_has_the_activation_of_its_weights(tiny_clip, monkeypatch):
    import open_clip

    made = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, **options: made(name, pretrained=None, **options))
    for quick in (True, False):
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_, quick=quick: {"url": "any", "quick_gelu": quick})
        clip = tiny_clip("transformer", weights="any", layer=1, size=32)
        found = any(isinstance(layer, open_clip.transformer.QuickGELU) for layer in clip.modules())
        assert found == quick


def test_unavailable_clip_weights_are_refused_with_the_fix(tiny_clip, monkeypatch):
    with pytest.raises(RecipeError, match="open_clip has no model 'resnett'; did you mean resnet"):
        Clip("resnett")
    with pytest.raises(RecipeError, match="open_clip has no weights 'opennai' for RN50x64; did you mean openai"):
        Clip("RN50x64", "opennai")
    with pytest.raises(RecipeError, match=r"resnet at layer=5 gives no grid of features at 64 pixels .*out of range \(0 to 4\)"):
        Clip("resnet", None, layer=5, size=64)
    import open_clip

    def offline(*_, **__):
        raise RuntimeError("Failed to download")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(RecipeError, match="open_clip cannot give RN50x64, weights 'openai', for 448 pixels: Failed to download"):
        Clip()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RecipeError, match=r"open_clip, which is not installed: pip install -e '\.\[mapet\]'"):
        Clip()


# ---- the sample


@pytest.mark.parametrize("vectors", [5, 23, 100, 23 * 16])
def test_each_image_contributes_its_fraction_of_the_sample_from_distinct_patches(tmp_path, vectors):
    rows = sample(tmp_path / "s.npy", vectors=vectors)
    assert rows.shape == (vectors, 12) and rows.dtype == numpy.float32
    for i, (x, _) in enumerate(loader(batch=1).epoch(0)):
        mine = torch.from_numpy(rows[i * vectors // 23 : (i + 1) * vectors // 23].copy())
        places = (mine[:, None] == Counted()(x)[0]).all(-1).nonzero()
        assert len(places) == len(mine) and len(set(places[:, 1].tolist())) == len(mine)


def test_patches_are_sampled_uniformly_by_seed_and_image(tmp_path):
    def cells(seed: int) -> list[int]:
        rows = torch.from_numpy(sample(tmp_path / f"{seed}.npy", loader(400), n=400, vectors=800, seed=seed).copy())
        known = Counted()(next(loader(400, batch=400).epoch(0))[0])
        return [int((row == known[i // 2]).all(-1).nonzero()) for i, row in enumerate(rows)]

    first, second = cells(0), cells(1)
    assert first != second and first[:2] != first[2:4]
    assert min(Counter(first).values()) > 25 and max(Counter(first).values()) < 80  # 50 of each of 16 patches, std 7


def test_the_sample_does_not_depend_on_the_batch_size(tmp_path):
    one, other = sample(tmp_path / "a.npy", loader(batch=4)), sample(tmp_path / "b.npy", loader(batch=23))
    assert numpy.array_equal(one, other)


def test_sampling_uses_one_batch_at_a_time_and_only_the_requested_images(tmp_path):
    features, reported = Counted(), []
    sample(tmp_path / "s.npy", loader(batch=4), features, n=10, vectors=20, progress=lambda *numbers: reported.append(numbers))
    assert features.given == [1, 4, 4, 2]  # the first gives the width
    assert reported == [(4, 10), (8, 10), (10, 10)]


class Failing(Loader):
    """Fails at a batch as if killed; records the batch it started from."""

    fail_at, starts = None, ()

    def epoch(self, epoch: int, start: int = 0):
        self.starts += (start,)
        for number, batch in enumerate(super().epoch(epoch, start), start):
            if number == self.fail_at:
                raise KeyboardInterrupt
            yield batch


def interrupted(file: Path, at: int = 3, **options) -> Failing:
    batches = loader(kind=Failing)
    batches.fail_at = at
    with pytest.raises(KeyboardInterrupt):
        sample(file, batches, **{"seconds": 0.0} | options)
    batches.fail_at = None
    return batches


def test_an_interrupted_sample_resumes_bit_identically(tmp_path):
    whole = sample(tmp_path / "whole.npy")
    batches = interrupted(tmp_path / "s.npy")
    assert not (tmp_path / "s.npy").exists()
    assert numpy.array_equal(sample(tmp_path / "s.npy", batches), whole)
    assert batches.starts == (0, 3)
    assert sorted(path.name for path in tmp_path.glob("s.*")) == ["s.npy", "s.npy.json"]


def test_an_interrupted_sample_resumes_with_another_batch_size(tmp_path):
    interrupted(tmp_path / "s.npy")
    batches = loader(batch=5, kind=Failing)
    assert numpy.array_equal(sample(tmp_path / "s.npy", batches), sample(tmp_path / "whole.npy"))
    assert batches.starts == (2,)  # 12 images were done; 10 of them are two batches of 5


def test_unsaved_work_is_repeated(tmp_path):
    batches = interrupted(tmp_path / "s.npy", seconds=1e9)
    assert numpy.array_equal(sample(tmp_path / "s.npy", batches), sample(tmp_path / "whole.npy"))
    assert batches.starts == (0, 0)


@pytest.mark.parametrize("fault", ["no map", "torn map", "other map"])
def test_a_progress_file_without_its_memory_map_is_ignored(tmp_path, fault):
    batches, growing = interrupted(tmp_path / "s.npy"), tmp_path / "s.npy.partial"
    if fault == "no map":
        growing.unlink()
    elif fault == "torn map":
        growing.write_bytes(growing.read_bytes()[:1000])
    else:
        numpy.save(tmp_path / "other.npy", numpy.zeros((99, 12), numpy.float32))
        (tmp_path / "other.npy").replace(growing)
    batches.fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "s.npy", batches)
    assert not (tmp_path / "s.npy.json").exists()  # no rows of the new map are saved yet
    batches.fail_at = None
    assert numpy.array_equal(sample(tmp_path / "s.npy", batches), sample(tmp_path / "whole.npy"))
    assert batches.starts == (0, 0, 0)


def test_a_complete_sample_interrupted_before_its_rename_is_renamed(tmp_path):
    whole = sample(tmp_path / "s.npy").copy()
    (tmp_path / "s.npy").rename(tmp_path / "s.npy.partial")
    batches = loader(kind=Failing)
    assert numpy.array_equal(sample(tmp_path / "s.npy", batches), whole) and batches.starts == ()


def test_the_progress_file_is_written_after_its_rows(tmp_path, monkeypatch):
    events = []
    flush, write = numpy.memmap.flush, kmeans.write_text
    monkeypatch.setattr(numpy.memmap, "flush", lambda self: (events.append("rows"), flush(self)))
    monkeypatch.setattr(kmeans, "write_text", lambda *a: (events.append("note"), write(*a)))
    sample(tmp_path / "s.npy", seconds=0.0)
    assert events == ["rows", "note"] * 6


def test_a_complete_sample_is_not_made_again(tmp_path):
    features = Counted()
    whole = sample(tmp_path / "s.npy").copy()
    assert numpy.array_equal(sample(tmp_path / "s.npy", features=features), whole) and not features.given


def transformer(bias: float) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder("vit_tiny_patch16_224", pretrained=False, size=16, mean=MEAN, std=STD)
    nn.init.constant_(encoder.network.norm.bias, bias)
    return encoder


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"vectors": 90}, "vectors: 100 there, 90 requested"),
        ({"n": 22}, "images: 23 there, 22 requested"),
        ({"seed": 1}, "seed: 0 there, 1 requested"),
        ({"features": Counted(per_patch=True)}, "features: .*per_patch=False there, .*per_patch=True requested"),
        ({"loader_": loader(24)}, "split: "),
        ({"loader_": loader(interpolation="bilinear")}, "interpolation: bicubic there, bilinear requested"),
    ],
)
def test_a_file_with_another_sample_is_refused_with_the_differences(tmp_path, options, name):
    for begin in (sample, interrupted):
        file = tmp_path / begin.__name__
        begin(file)
        with pytest.raises(RunError, match=f"holds another sample .*{name}"):
            sample(file, **options)


def test_a_sample_of_other_weights_is_refused(tmp_path):
    size = {"image_size": (16, 16)}
    sample(tmp_path / "s.npy", loader(**size), transformer(0.0), vectors=10)
    with pytest.raises(RunError, match="holds another sample .*weights"):
        sample(tmp_path / "s.npy", loader(**size), transformer(0.1), vectors=10)


def test_an_impossible_sample_is_refused_with_the_fix(tmp_path, monkeypatch):
    file = tmp_path / "s.npy"
    for options, message in {
        "vectors=369 is not possible, 23 images have 368 cells: choose fewer, or more images": {"vectors": 369},
        "vectors=0 is not possible": {"vectors": 0},
        "images=24 is not possible, the split has 23": {"n": 24},
        "images=0 is not possible": {"n": 0},
    }.items():
        with pytest.raises(RecipeError, match=options):
            sample(file, **message)
    for wrong in ({"augmentation": Augmentation()}, {"rank": 0, "world_size": 2}):
        with pytest.raises(ValueError, match="augmentation=None and world_size=1"):
            sample(file, loader(**wrong))
    with pytest.raises(ValueError, match=r"the loader has size=\(16, 16\) and the features want \(8, 8\)"):
        sample(file, loader(image_size=(16, 16)))
    with pytest.raises(ValueError, match="the loader has mean=.*0.4.* and the features want .*0.1"):
        sample(file, features=Counted(mean=(0.1, 0.1, 0.1)))
    with monkeypatch.context() as patch:
        patch.setattr(kmeans.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(4799))
        with pytest.raises(RunError, match="0.0 GiB free, and 100 vectors take 0.0: make room, or sample fewer"):
            sample(file)
        patch.setattr(kmeans.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(4800))
        sample(file)
    (tmp_path / "s.npy.json").unlink()
    with pytest.raises(RunError, match="exists, but s.npy.json does not say that it is complete: delete it"):
        sample(file)


# ---- centroids


def blobs(count: int = 900, seed: int = 0) -> numpy.ndarray:
    """Three clusters with different norms and the same direction."""
    draw = numpy.random.default_rng(seed)
    centres = numpy.float32([1, 10, 20])[:, None] * numpy.ones(4, numpy.float32)
    return centres[numpy.arange(count) % 3] + draw.standard_normal((count, 4), dtype=numpy.float32) / 4


def test_centroids_are_the_unnormalised_means_of_all_vectors_of_their_cluster():
    x = blobs()  # by default, faiss would use 768 of the 900
    found = fit_centroids(x, 3)
    assert found.dtype == torch.float32
    expected = numpy.stack([x[part::3].astype(numpy.float64).mean(0) for part in range(3)])
    torch.testing.assert_close(found[found[:, 0].argsort()].double(), torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_centroids_are_reproducible_and_depend_on_the_seed():
    x = numpy.random.default_rng(0).standard_normal((500, 8), dtype=numpy.float32)
    one, two, other = fit_centroids(x, 20), fit_centroids(x, 20), fit_centroids(x, 20, seed=5)
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_more_iterations_and_more_restarts_reduce_the_error():
    x = numpy.random.default_rng(0).standard_normal((500, 8), dtype=numpy.float32)

    def error(**options) -> float:
        return nearest_codes(torch.from_numpy(x), fit_centroids(x, 20, **options))[1].square().sum().item()

    assert error(iterations=1, redos=1, seed=2) > error(redos=1, seed=2) > error(seed=2)


def test_faiss_gets_the_memory_map_without_a_copy_and_does_not_warn_about_few_vectors(tmp_path, monkeypatch, capfd):
    import faiss

    train, seen = faiss.Kmeans.train, []
    monkeypatch.setattr(faiss.Kmeans, "train", lambda self, x: (seen.append(x), train(self, x)))
    numpy.save(tmp_path / "s.npy", blobs(30))
    x = numpy.load(tmp_path / "s.npy", mmap_mode="r")
    assert fit_centroids(x, 3).shape == (3, 4)
    assert numpy.shares_memory(numpy.ascontiguousarray(seen[0], dtype="float32"), x)
    assert not capfd.readouterr().err


def test_impossible_centroids_are_refused_with_the_fix(monkeypatch):
    with pytest.raises(RecipeError, match="codes=31 is not possible with 30 sampled vectors: sample more"):
        fit_centroids(blobs(30), 31)
    with pytest.raises(RecipeError, match="codes=0 is not possible"):
        fit_centroids(blobs(30), 0)
    monkeypatch.setattr(kmeans, "ENTRIES", 40)  # ten rows at once
    for value in (numpy.nan, numpy.inf):
        x = blobs(35)
        x[34, 3] = value
        with pytest.raises(RecipeError, match="the sample is not finite in the 10 rows from 30 on"):
            fit_centroids(x, 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RecipeError, match=r"faiss, which is not installed: pip install -e '\.\[mapet\]'"):
        fit_centroids(blobs(30), 3)


# ---- nearest codes


@pytest.mark.parametrize("entries", [2**24, 100, 1])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_nearest_code_equals_brute_force_for_any_chunk_size(monkeypatch, entries, precision):
    monkeypatch.setattr(kmeans, "ENTRIES", entries)
    x, codes = torch.randn(301, 16, generator=torch.Generator().manual_seed(0)) + 1, torch.randn(37, 16) + 1
    distance_MK = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    two = distance_MK.topk(2, largest=False)
    clear = two.values[:, 1] - two.values[:, 0] > 1e-4
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        ids, distance = nearest_codes(x, codes)
    assert ids.dtype == torch.int64 and distance.dtype == torch.float32 and clear.float().mean() > 0.9
    assert torch.equal(ids[clear], two.indices[clear, 0])
    torch.testing.assert_close(distance.double(), two.values[:, 0], rtol=1e-4, atol=1e-4)


def test_a_common_offset_of_all_codes_does_not_reduce_precision():
    g = torch.Generator().manual_seed(0)
    x, codes = 300 + torch.randn(200, 16, generator=g), 300 + torch.randn(20, 16, generator=g)
    expected = torch.cdist(x.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    ids, distance = nearest_codes(x, codes)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(distance.double(), expected.values, rtol=1e-4, atol=1e-4)


def test_among_equal_codes_the_first_is_chosen():
    codes = torch.tensor([[3.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    assert nearest_codes(torch.tensor([[1.0, 1.0], [3.0, 0.5]]), codes)[0].tolist() == [1, 0]


def test_the_distance_matrix_has_a_bounded_size(monkeypatch):
    monkeypatch.setattr(kmeans, "ENTRIES", 1000)
    real, seen = torch.addmm, []

    def watched(*arguments, **options):
        seen.append(real(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(torch, "addmm", watched)
    for codes, width in ((50, 4), (4, 50)):
        seen.clear()
        nearest_codes(torch.randn(333, width), torch.randn(codes, width))
        assert all(table.numel() <= 1000 and len(table) * width <= 1000 for table in seen)
        assert sum(map(len, seen)) == 333


def test_the_token_of_a_patch_is_the_nearest_centroid_of_its_features(tiny_clip):
    clip = tiny_clip("resnet", layer=4, size=64)
    feature_BND = clip(images(6))
    tokenizer = NearestCentroid(clip, fit_centroids(feature_BND.flatten(0, 1).numpy(), 7))
    ids, distance = tokenizer(images(6))
    distance_BNK = (feature_BND[:, :, None].double() - tokenizer.centroids.double()).norm(dim=-1)
    assert ids.shape == distance.shape == (6, 4) and ids.dtype == torch.int64 and len(ids.unique()) > 3
    assert torch.equal(ids, distance_BNK.argmin(-1))
    torch.testing.assert_close(distance.double(), distance_BNK.amin(-1), rtol=1e-4, atol=1e-4)
    assert (tokenizer.size, tokenizer.grid, tokenizer.vocabulary) == ((64, 64), (2, 2), 7)
    assert (tokenizer.mean, tokenizer.std) == (clip.mean, clip.std)
    assert torch.equal(tokenizer.state_dict()["centroids"], tokenizer.centroids)


def test_centroids_of_other_features_are_refused():
    with pytest.raises(ValueError, match="features are 12 wide, centroids 10: use a matching pair"):
        NearestCentroid(Counted(), torch.zeros(4, 10))(images(1, 8))


# ---- VQ-KD


def released(width: int = 128, depth: int = 2, side: int = 3, patch: int = 4, codes: int = 50, code_width: int = 8) -> dict[str, Tensor]:
    """Random tensors with exactly the names in BEiT v2's file, including those of training and decoder."""
    g = torch.Generator().manual_seed(0)

    def block(prefix: str) -> dict[str, tuple[int, ...]]:
        sizes = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,)}
        sizes |= {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width)}
        sizes |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        sizes |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
        sizes |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
        return {f"{prefix}.{name}": size for name, size in sizes.items()}

    shapes = {"quantize.embedding.weight": (codes, code_width), "quantize.embedding.embed_avg": (codes, code_width)}
    shapes |= {"quantize.cluster_size": (codes,), "quantize.embedding.cluster_size": (codes,), "quantize.embedding.initted": (1,)}
    for network, channels, side_, blocks in (("encoder", 3, patch, depth), ("decoder", code_width, 1, 1)):
        shapes |= {f"{network}.cls_token": (1, 1, width), f"{network}.pos_embed": (1, side * side + 1, width)}
        shapes |= {f"{network}.patch_embed.proj.weight": (width, channels, side_, side_), f"{network}.patch_embed.proj.bias": (width,)}
        shapes |= {f"{network}.fc_norm.weight": (width,), f"{network}.fc_norm.bias": (width,)}
        for number in range(blocks):
            shapes |= block(f"{network}.blocks.{number}")
    for task, out in (("encode", code_width), ("decode", 512)):
        shapes |= {f"{task}_task_layer.0.weight": (width, width), f"{task}_task_layer.0.bias": (width,)}
        shapes |= {f"{task}_task_layer.2.weight": (out, width), f"{task}_task_layer.2.bias": (out,)}
    state = {name: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return {name: tensor + float("norm" in name and name.endswith("weight")) for name, tensor in state.items()}


def reference(state: dict[str, Tensor], x: Tensor, heads: int = 2) -> tuple[Tensor, Tensor]:
    """BEiT v2's tokenizer in plain torch, in float64: squared distances (B, N, K) and their argmin."""
    s, x = {name: tensor.double() for name, tensor in state.items()}, x.double()
    width = s["encoder.cls_token"].shape[-1]
    kernel = s["encoder.patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, s["encoder.patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([s["encoder.cls_token"].expand(len(x), -1, -1), x], 1) + s["encoder.pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    for number in range(sum(name.startswith("encoder.") and name.endswith("q_bias") for name in s)):
        b = f"encoder.blocks.{number}"
        y = norm(x, f"{b}.norm1")
        q, k, v = (y @ w.T for w in s[f"{b}.attn.qkv.weight"].chunk(3))
        q, v = q + s[f"{b}.attn.q_bias"], v + s[f"{b}.attn.v_bias"]
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = ((q @ k.mT) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    x = norm(x[:, 1:], "encoder.fc_norm")
    z = F.normalize(linear(linear(x, "encode_task_layer.0").tanh(), "encode_task_layer.2"), dim=-1)
    distance_BNK = (z[:, :, None] - s["quantize.embedding.weight"]).square().sum(-1)
    return distance_BNK, distance_BNK.argmin(-1)


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"model": state}, path / "vqkd.pth")
    return path / "vqkd.pth"


def test_a_released_tokenizer_gives_the_same_ids_as_the_reference(tmp_path):
    state = released()
    tokenizer, x = load_vqkd(saved(tmp_path, state)), images(16, 12)
    distance_BNK, expected = reference(state, x)
    ids, distance = tokenizer(x)
    assert ids.shape == (16, 9) and ids.dtype == torch.int64 and len(ids.unique()) > 5
    assert torch.equal(ids, expected)
    torch.testing.assert_close(distance.double(), distance_BNK.amin(-1).sqrt(), rtol=1e-4, atol=1e-5)


def test_vqkd_ids_are_reproducible_and_in_range_and_the_tokenizer_is_unchanged(tmp_path):
    tokenizer, x = load_vqkd(saved(tmp_path, released())), images(4, 12)
    before = copy.deepcopy(tokenizer.state_dict())
    (one, _), (two, distance) = tokenizer(x), tokenizer.train()(x)
    assert torch.equal(one, two) and one.min() >= 0 and one.max() < 50
    assert not distance.requires_grad and not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())


def test_the_default_vqkd_has_the_released_settings():
    with torch.device("meta"):
        tokenizer = VQKD()
    assert (tokenizer.size, tokenizer.grid, tokenizer.vocabulary) == ((224, 224), (14, 14), 8192)
    assert tokenizer.mean == tokenizer.std == (0.5, 0.5, 0.5)  # x * 2 - 1
    assert len(tokenizer.encoder.blocks) == 12 and tokenizer.encoder.blocks[0].attn.heads == 12
    assert tokenizer.codebook.shape == (8192, 32) and tokenizer.encoder.pos_embed.shape == (1, 197, 768)
    assert not any("ls" in name.split(".") or "rel_pos" in name for name in tokenizer.state_dict())


@pytest.mark.parametrize(
    "name", ["encoder.blocks.1.attn.q_bias", "encoder.fc_norm.weight", "encode_task_layer.2.bias", "encoder.pos_embed"]
)
def test_a_file_without_a_tensor_is_refused_by_name(tmp_path, name):
    state = released()
    del state[name]
    with pytest.raises(ConversionError, match=name):
        load_vqkd(saved(tmp_path, state))


@pytest.mark.parametrize(
    "name", ["encoder.norm.weight", "encoder.blocks.0.gamma_1", "encoder.rel_pos_bias", "encoder.blocks.1.attn.qkv.bias", "head.weight"]
)
def test_a_file_with_an_unknown_tensor_is_refused_by_name(tmp_path, name):
    with pytest.raises(ConversionError, match=name):
        load_vqkd(saved(tmp_path, released() | {name: torch.zeros(3 * 128)}))


def test_a_file_of_another_shape_is_refused(tmp_path):
    for change, message in (
        ({"encode_task_layer.0.weight": torch.zeros(5, 128)}, "other shapes: encode_task_layer.0.weight"),
        ({"encoder.pos_embed": torch.zeros(1, 9, 128)}, "9 tokens, which is not a class token and a square grid"),
        ({"encoder.pos_embed": torch.zeros(9, 128)}, "not a VQ-KD tokenizer: no encoder.pos_embed, or of another shape"),
    ):
        with pytest.raises(ConversionError, match=message):
            load_vqkd(saved(tmp_path, released() | change))
    with pytest.raises(ConversionError, match="there is no checkpoint at"):
        load_vqkd(tmp_path / "nowhere.pth")


def test_tensors_used_only_in_training_are_ignored(tmp_path):
    state = released()
    extra = {"loss.weight": torch.ones(1), "teacher_model.conv1.weight": torch.ones(1), "scaling_layer.shift": torch.ones(1)}
    kept = {
        name: tensor for name, tensor in state.items() if not name.startswith(("decode", "quantize")) or name.endswith("embedding.weight")
    }
    for other in (state | extra, kept):
        assert torch.equal(load_vqkd(saved(tmp_path, other))(images(2, 12))[0], reference(state, images(2, 12))[1])
