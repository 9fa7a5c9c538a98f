"""Tests of frozen features, their cache files and logistic regression."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor

from common.data import Loader, open_data
from common.evaluate import features, logistic_accuracy, pool_tokens
from common.evaluate.frozen import fingerprint, fit_logistic, standardise
from common.run import RunError
from common.vit import ViT

CPU = Fabric(accelerator="cpu", devices=1)


def encoder(seed: int = 0, **options) -> ViT:
    torch.manual_seed(seed)
    return ViT(image_size=8, patch_size=4, channels=1, width=16, depth=3, heads=2, **options)


def loader(count: int = 20, **options) -> Loader:
    data = open_data("digits")
    settings = {"batch_size": 8, "augmentation": None, "seed": 0, "device": torch.device("cpu"), "workers": 0}
    return Loader(data.val.subset(range(count)), data=data, image_size=(8, 8), **settings | options)


# ---- layers


@pytest.mark.parametrize("options", [{}, {"class_token": False, "position": "none"}, {"position": "relative"}])
def test_the_last_blocks_equal_encoders_truncated_there_with_the_final_norm(options):
    model, images = encoder(**options).eval(), torch.randn(2, 1, 8, 8)
    found = model.last_blocks(images, 3)
    assert torch.equal(found[-1], model(images)) and len(found) == 3
    assert torch.equal(found[-1], model.last_blocks(images, 1)[0])
    for depth in (1, 2):
        cut = copy.deepcopy(model)
        cut.blocks = cut.blocks[:depth]
        assert torch.equal(found[depth - 1], cut(images))


@pytest.mark.parametrize("count", [0, -1, 4])
def test_a_number_of_blocks_below_1_or_above_the_depth_is_refused(count):
    with pytest.raises(ValueError, match=f"the last {count} blocks were requested; this encoder has 3"):
        encoder().last_blocks(torch.randn(1, 1, 8, 8), count)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_features_of_several_layers_are_concatenated_with_the_last_layer_last(pool):
    model, batches = encoder(), loader()
    found, _ = features(CPU, model, batches, pool, 2)
    images = torch.cat([images for images, _ in batches.epoch(0)])
    expected = torch.cat([pool_tokens(tokens, model, pool) for tokens in model.eval().last_blocks(images, 2)], 1)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert torch.allclose(found[:, 16:], features(CPU, model, batches, pool)[0], atol=1e-6)


# ---- the cache


def test_features_are_computed_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "features" / "random-val"
    first = features(CPU, encoder(), loader(), "mean", 2, cache)
    (file,) = cache.parent.iterdir()
    assert file.name.startswith("random-val-last2-mean-8-bicubic-") and file.suffix == ".safetensors"
    assert torch.equal(load_file(file)["features"], first[0])

    def computed(*_: object):
        raise AssertionError

    monkeypatch.setattr(Loader, "epoch", computed)
    second = features(CPU, encoder().train(), loader(), "mean", 2, cache)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert second[1].tolist() == open_data("digits").val.labels[:20].tolist()


def test_other_images_layers_and_poolings_have_their_own_cache_files(tmp_path):
    cache = tmp_path / "x"
    for count, layers, how in [(20, 1, "mean"), (20, 2, "mean"), (20, 1, "class"), (19, 1, "mean")]:
        assert len(features(CPU, encoder(), loader(count), how, layers, cache)[0]) == count
    features(CPU, encoder(), loader(interpolation="bilinear"), "mean", 1, cache)
    assert len(list(tmp_path.iterdir())) == 5


def other_mean() -> Loader:
    changed = loader()
    changed.data.mean = (0.5,)
    return changed


@pytest.mark.parametrize(
    ("difference", "changed"),
    [
        ("encoder", lambda: (CPU, encoder(seed=1), loader())),
        ("mean", lambda: (CPU, encoder(), other_mean())),
        ("precision", lambda: (Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), encoder(), loader())),
    ],
)
def test_a_cache_of_another_encoder_or_other_settings_is_refused_and_kept(difference, changed, tmp_path):
    features(CPU, encoder(), loader(), "mean", 1, tmp_path / "x")
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    with pytest.raises(RunError, match=f"holds features with another {difference}; delete it"):
        features(*changed(), "mean", 1, tmp_path / "x")  # type: ignore[call-arg]
    assert file.read_bytes() == before


def test_a_damaged_cache_is_refused_and_named(tmp_path):
    features(CPU, encoder(), loader(), "mean", 1, tmp_path / "x")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=f"{file.name} cannot be read .*; delete it"):
        features(CPU, encoder(), loader(), "mean", 1, tmp_path / "x")


def test_a_crash_while_writing_leaves_no_cache(tmp_path, monkeypatch):
    def full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.evaluate.frozen.save_file", full)
    with pytest.raises(OSError):
        features(CPU, encoder(), loader(), "mean", 1, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_only_the_main_process_writes_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(Fabric, "is_global_zero", property(lambda self: False))
    assert len(features(CPU, encoder(), loader(), "mean", 1, tmp_path / "x")[0]) == 20 and not list(tmp_path.iterdir())


def test_a_fingerprint_depends_on_every_value_name_and_shape():
    model = encoder()
    before = fingerprint(model)
    assert before == fingerprint(encoder()) and before != fingerprint(encoder(class_token=False))
    with torch.no_grad():
        model.norm.bias[3] += 1e-6
    assert fingerprint(model) != before


def spoiled(value: float = float("nan")) -> ViT:
    model = encoder()
    with torch.no_grad():
        model.norm.bias[3] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_not_cached(value, tmp_path):
    for cache in (None, tmp_path / "x"):
        with pytest.raises(RunError, match="features of 20 of 20 images are not finite, the first is image 0"):
            features(CPU, spoiled(value), loader(), "mean", 1, cache)
    assert not list(tmp_path.iterdir())


def test_a_cache_of_features_that_are_not_finite_is_refused_with_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr("common.evaluate.frozen.check_finite", lambda *_: None)  # a cache from before this check existed
    features(CPU, spoiled(), loader(), "mean", 1, tmp_path / "x")
    monkeypatch.undo()
    (file,) = tmp_path.iterdir()
    with pytest.raises(RunError, match=f"are not finite.*delete {file}"):
        features(CPU, spoiled(), loader(), "mean", 1, tmp_path / "x")


# ---- logistic regression


def problem(classes: int, count: int = 120, width: int = 6) -> tuple[Tensor, Tensor]:
    """Return correlated features, like those of encoders, of overlapping classes."""
    g = torch.Generator().manual_seed(classes)
    y = torch.arange(count) % classes
    x = torch.randn(classes, width, generator=g)[y] + torch.randn(count, width, generator=g)
    return x @ torch.randn(width, width, generator=g), y


def newton(x_ND: Tensor, y_N: Tensor, classes: int, l2: float) -> Tensor:
    """Minimise mean cross-entropy + l2 / n |W|^2 / 2 by Newton's method with the full Hessian from autograd."""
    x, shape = x_ND.double(), (classes, x_ND.shape[1])

    def objective(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.view(shape).T, y_N) + l2 / len(x) / 2 * w.square().sum()

    w = torch.zeros(shape, dtype=torch.float64).flatten()
    for _ in range(60):
        gradient = torch.func.grad(objective)(w)
        step, size = torch.linalg.solve(torch.func.hessian(objective)(w), gradient), 1.0
        while objective(w - size * step) > objective(w) and size > 1e-4:
            size /= 2
        w = w - size * step
    assert gradient.abs().max() < 1e-10
    return w.view(shape)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("l2", [0.0025, 1.0])
def test_the_weights_minimise_the_papers_objective(classes, l2):
    x, y = problem(classes)
    found, converged = fit_logistic(x, y, classes, l2)
    assert converged and found.shape == (classes, 6)
    torch.testing.assert_close(found, newton(x, y, classes, l2), atol=1e-4, rtol=0)


def test_rotated_features_give_rotated_weights():
    x, y = problem(5)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    plain, rotated = fit_logistic(x, y, 5, 0.0025)[0], fit_logistic(x @ rotation, y, 5, 0.0025)[0]
    torch.testing.assert_close(rotated, plain @ rotation.double(), atol=1e-4, rtol=0)
    assert not torch.allclose(rotated, plain, atol=1e-2)


def test_test_features_are_standardised_with_the_train_statistics_by_default():
    g = torch.Generator().manual_seed(0)
    train, test = 3 + 2 * torch.randn(50, 4, generator=g), 1 + 5 * torch.randn(9, 4, generator=g)
    own_train, seen = standardise(train, test)
    torch.testing.assert_close(own_train, (train - train.mean(0)) / train.std(0))
    torch.testing.assert_close(seen, (test - train.mean(0)) / train.std(0))
    assert torch.equal(standardise(train, test, "own")[0], own_train)
    torch.testing.assert_close(standardise(train, test, "own")[1], (test - test.mean(0)) / test.std(0))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_a_constant_feature_has_no_effect(value):
    x, y = problem(3)
    spoiled = torch.cat([x, torch.full((120, 1), value)], 1)
    for statistics in ("train", "own"):
        standard, seen = standardise(spoiled, spoiled[:7], statistics)
        assert (standard[:, -1].abs() < 1e-6).all() and (seen[:, -1].abs() < 1e-6).all()
    plain = logistic_accuracy(x, y, x, y, classes=3, l2=0.0025)
    assert logistic_accuracy(spoiled, y, spoiled, y, classes=3, l2=0.0025) == plain and 50 < plain["top1"] < 100


def test_a_feature_that_varies_only_by_rounding_is_not_amplified():
    x, y = problem(3)
    rounded = torch.full((120, 1), 1000.0) + 6e-5 * (torch.arange(120) % 2)[:, None]
    assert rounded.std() > 0
    standard, seen = standardise(torch.cat([x, rounded], 1), torch.cat([x, rounded], 1)[:7])
    assert standard[:, -1].abs().max() < 1e-3 and seen[:, -1].abs().max() < 1e-3


def test_own_statistics_help_shifted_test_features_and_are_not_the_default():
    x, y = problem(7)
    shifted = 3 * x + 5
    options = {"classes": 7, "l2": 0.0025}
    plain, own = (logistic_accuracy(x, y, shifted, y, **options, statistics=how) for how in ("train", "own"))
    assert own == logistic_accuracy(x, y, x, y, **options) and own["top1"] > plain["top1"] + 10
    assert logistic_accuracy(x, y, shifted, y, **options) == plain
    assert plain["top1"] < plain["top5"] <= 100


def test_a_class_without_a_label_is_refused():
    x, y = problem(4)
    with pytest.raises(ValueError, match="1 of 5 classes have no label to learn from, the first is class 4"):
        fit_logistic(x, y, 5, 0.0025)


@pytest.mark.parametrize("part", [0, 2])
def test_logistic_regression_refuses_features_that_are_not_finite(part):
    x, y = problem(4)
    given = [x.clone(), y, x.clone(), y]
    given[part][7, 2] = float("inf")
    with pytest.raises(RunError, match="features of 1 of 120 images are not finite, the first is image 7"):
        logistic_accuracy(*given, classes=4, l2=0.0025)
    with pytest.raises(RunError, match="not finite"):
        fit_logistic(given[part], y, 4, 0.0025)


def test_a_fit_without_convergence_is_reported_and_raises_no_warning(monkeypatch):
    monkeypatch.setitem(fit_logistic.__globals__["SOLVER"], "max_iter", 1)
    x, y = problem(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not logistic_accuracy(x, y, x, y, classes=5, l2=0.0025)["converged"]
