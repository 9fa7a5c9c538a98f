"""Tests of the evaluation of an encoder."""

import copy
import math

import numpy
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from common.evaluate import Classifier, LinearProbe, accuracy, features, knn_accuracy, own_metrics, pool_tokens
from common.method import Output
from common.optim import make_optimizer
from common.recipe import Protocol, TrainConfig
from common.run import RunError
from common.train import make_fabric
from common.vit import ViT

CPU = Fabric(accelerator="cpu", devices=1)
STAGE = TrainConfig(epochs=1, batch_size=6, base_lr=1.0)
CLASSES = 7


def encoder(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(image_size=8, patch_size=4, width=16, depth=2, heads=2, **options)


def protocol(kind: str = "finetune", **options) -> Protocol:
    return Protocol(name=kind, kind=kind, stage=STAGE, **options)


def batch(count: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=g), torch.randint(CLASSES, (count,), generator=g)


def classifier(**options) -> Classifier:
    """A classifier whose head already separates the classes, so that the loss is not constant."""
    model = Classifier(encoder(drop_path=options.pop("drop_path", 0.0)), CLASSES, protocol(**options))
    nn.init.normal_(model.head.weight, std=0.5)
    nn.init.normal_(model.head.bias, std=0.5)
    return model


def mean_over_batch(target_BK: Tensor, logits_BK: Tensor) -> float:
    return -(target_BK * logits_BK.log_softmax(1)).sum(1).mean().item()


def one_hot(targets_B: Tensor, smoothing: float) -> Tensor:
    return (1 - smoothing) * torch.eye(CLASSES)[targets_B] + smoothing / CLASSES


class Batches:
    """A loader of the given batches, only for epoch 0."""

    def __init__(self, *batches: tuple[Tensor, Tensor]):
        self.batches = batches

    def epoch(self, epoch: int):
        assert epoch == 0
        yield from self.batches


class ImagesAreLogits(nn.Module):
    def forward(self, images: Tensor) -> Output:
        assert not self.training
        return Output(torch.zeros(()), named={"logits": images})


# ---- nearest neighbours


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (5, 1.0), (1000, 0.2), (20, 0.01)])
def test_knn_equals_counting_votes_one_by_one(neighbours, temperature):
    g = numpy.random.default_rng(0)
    train, test = g.normal(size=(60, 4)), g.normal(size=(40, 4))
    train_class, test_class = g.integers(0, 5, 60), g.integers(0, 5, 40)
    right = 0
    for x, wanted in zip(test, test_class, strict=True):
        similarity = [float(x @ y / (numpy.linalg.norm(x) * numpy.linalg.norm(y))) for y in train]
        votes = [0.0] * 5
        for i in sorted(range(60), key=lambda i: -similarity[i])[:neighbours]:
            votes[train_class[i]] += math.exp(similarity[i] / temperature)
        right += votes.index(max(votes)) == wanted
    tensors = [torch.from_numpy(array) for array in (train, train_class, test, test_class)]
    found = knn_accuracy(
        tensors[0].float(), tensors[1], tensors[2].float(), tensors[3], classes=5, neighbours=neighbours, temperature=temperature
    )
    assert found == pytest.approx(100 * right / 40) and 0 < right < 40


def test_every_image_is_its_own_nearest_neighbour_also_beyond_one_block():
    g = torch.Generator().manual_seed(0)
    feature, target = torch.randn(1030, 8, generator=g), torch.randint(CLASSES, (1030,), generator=g)
    assert knn_accuracy(feature, target, 3 * feature, target, classes=CLASSES, neighbours=1) == 100
    assert knn_accuracy(feature, target, -feature, target, classes=CLASSES, neighbours=1) < 50


# ---- features


def test_features_cover_every_image_in_order_and_leave_the_encoder_unchanged():
    model = encoder(drop_path=0.5).train()
    loader = Batches(batch(4, seed=1), batch(4, seed=2), batch(1, seed=3))
    found, targets = features(CPU, model, loader, "mean")
    assert torch.equal(targets, torch.cat([t for _, t in loader.batches]))
    expected = torch.cat([copy.deepcopy(model).eval()(images)[:, 1:].mean(1) for images, _ in loader.batches])
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert model.training and not found.requires_grad


def test_without_an_encoder_the_features_are_the_pixels():
    images, targets = batch(5)
    found, _ = features(CPU, None, Batches((images[:3], targets[:3]), (images[3:], targets[3:])), "mean")
    assert torch.equal(found, images.flatten(1))


def test_pooling_returns_the_patch_mean_or_the_class_token():
    tokens = torch.randn(2, 5, 16)
    assert torch.equal(pool_tokens(tokens, encoder(), "mean"), tokens[:, 1:].mean(1))
    assert torch.equal(pool_tokens(tokens, encoder(), "class"), tokens[:, 0])
    assert torch.equal(pool_tokens(tokens, encoder(class_token=False), "mean"), tokens.mean(1))
    with pytest.raises(ValueError, match="pool='class' .*pool='mean'"):
        pool_tokens(tokens, encoder(class_token=False), "class")


# ---- fine-tuning


def test_mean_pooling_leaves_out_the_class_token_and_applies_the_norm_afterwards():
    model = classifier().eval()
    assert not any(name.startswith("encoder.norm") for name in model.state_dict())
    assert isinstance(model.fc_norm, nn.LayerNorm) and model.fc_norm.eps == 1e-6
    x = model.encoder.embed(batch()[0]) + model.encoder.patch_positions
    x = model.encoder.blocks(torch.cat([model.encoder.cls_token.expand(6, -1, -1), x], 1))
    expected = model.head(model.fc_norm(x[:, 1:].mean(1)))
    torch.testing.assert_close(model(batch()[0]).named["logits"], expected, atol=1e-5, rtol=0)


def test_class_token_pooling_keeps_the_encoders_norm_and_adds_none():
    plain = encoder().eval()
    model = classifier(pool="class").eval()
    assert isinstance(model.encoder.norm, nn.LayerNorm) and not any(name.startswith("fc_norm") for name in model.state_dict())
    torch.testing.assert_close(model(batch()[0]).named["logits"], model.head(plain(batch()[0])[:, 0]), atol=1e-6, rtol=0)


def test_the_head_starts_near_zero():
    head = Classifier(encoder(), 1000, protocol()).head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.03) and (head.bias == 0).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_in_the_same_ratio_and_the_input_is_unchanged(kind):
    model, (images, targets) = classifier(**{kind: 1.0}, smoothing=0.1), batch()
    shown = []
    model.encoder.register_forward_pre_hook(lambda _, args: shown.append(args[0].clone()))
    numpy.random.seed(0)
    before = images.clone()
    output = model(images, targets)
    assert torch.equal(images, before) and not torch.equal(shown[0], images)
    other, own = images.flip(0), (shown[0] - images.flip(0)).abs() < 1e-6
    if kind == "mixup":
        ratio = ((shown[0] - other) / (images - other)).median().item()
        torch.testing.assert_close(shown[0], ratio * images + (1 - ratio) * other, atol=1e-5, rtol=0)
    else:
        ratio = 1 - own.float().mean().item()
        assert ((shown[0] == images) | (shown[0] == other)).all()
    assert 0.05 < ratio < 0.95
    blended = ratio * one_hot(targets, 0.1) + (1 - ratio) * one_hot(targets.flip(0), 0.1)
    assert output.loss.item() == pytest.approx(mean_over_batch(blended, output.named["logits"]), abs=1e-4)


def test_nothing_is_mixed_outside_training_or_without_mixup_and_cutmix():
    for mode, count, options in ((False, 6, {"mixup": 1.0, "cutmix": 1.0}), (True, 5, {})):
        model, shown, (images, targets) = classifier(**options), [], batch(count)
        model.encoder.register_forward_pre_hook(lambda _, args, shown=shown: shown.append(args[0]))
        loss = model.train(mode)(images, targets).loss
        assert torch.equal(shown[-1], images)
        assert loss.item() == pytest.approx(mean_over_batch(one_hot(targets, 0), model.eval()(images).named["logits"]), abs=1e-5)


def test_mixup_refuses_a_micro_batch_of_one_image():
    with pytest.raises(ValueError, match="a micro-batch has 1: use 2 or more"):
        classifier(mixup=0.8).train()(*batch(1))


def test_label_smoothing_is_applied_in_training():
    model, (images, targets) = classifier(smoothing=0.3), batch(5)
    output = model(images, targets)
    assert output.loss.item() == pytest.approx(mean_over_batch(one_hot(targets, 0.3), output.named["logits"]), abs=1e-5)


def test_label_smoothing_is_not_applied_outside_training():
    model, (images, targets) = classifier(smoothing=0.3).eval(), batch()
    output = model(images, targets)
    assert output.loss.item() == pytest.approx(mean_over_batch(one_hot(targets, 0), output.named["logits"]), abs=1e-5)


# ---- linear probe


def test_a_linear_probe_trains_only_its_head():
    probe = LinearProbe(encoder(drop_path=0.5), CLASSES, protocol("linear")).train()
    before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    images, targets = batch()
    features_before = probe.encoder(images)
    optimizer = make_optimizer(probe, STAGE)
    probe(images, targets).loss.backward()
    assert all(p.grad is None for p in probe.encoder.parameters())
    optimizer.step()
    changed = {name for name, tensor in probe.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"heads.0.{name}" for name in ("1.weight", "1.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked")}
    assert torch.equal(probe.encoder(images), features_before)


def test_the_encoder_of_a_linear_probe_stays_in_evaluation_mode():
    probe = LinearProbe(encoder(drop_path=0.5), CLASSES, protocol("linear"))
    for mode in (True, False, True):
        assert probe.train(mode) is probe
        assert {module.training for module in (probe, *probe.heads.modules())} == {mode}
        assert not any(module.training for module in probe.encoder.modules())


def test_a_linear_probe_is_a_linear_layer_on_batch_normalised_features():
    probe, (images, targets) = LinearProbe(encoder(), CLASSES, protocol("linear", pool="class")).train(), batch()
    feature = probe.encoder(images)[:, 0]
    normed = (feature - feature.mean(0)) / (feature.var(0, correction=0) + 1e-6).sqrt()
    output, (norm, head) = probe(images, targets), probe.heads[0]
    torch.testing.assert_close(output.named["logits"], (normed @ head.weight.T + head.bias)[None], atol=1e-5, rtol=0)
    assert output.loss.item() == pytest.approx(mean_over_batch(one_hot(targets, 0), output.named["logits"][0]), abs=1e-5)
    assert {name for name, _ in norm.named_parameters()} == set()
    wide = LinearProbe(encoder(), 1000, protocol("linear")).heads[0][1]
    assert wide.weight.std().item() == pytest.approx(0.01, rel=0.03) and (wide.bias == 0).all()


# ---- accuracy


def test_accuracy_counts_every_image_once_with_an_uneven_last_batch():
    rank_of_target = torch.tensor([0, 0, 1, 4, 5, 6, 0, 3, 5])  # number of classes with a larger logit than the target
    targets = torch.arange(9) % CLASSES
    logits = torch.zeros(9, CLASSES)
    for image, (rank, target) in enumerate(zip(rank_of_target.tolist(), targets.tolist(), strict=True)):
        others = [k for k in range(CLASSES) if k != target]
        for place, k in enumerate([*others[:rank], target, *others[rank:]]):
            logits[image, k] = -float(place)
    loader = Batches(*zip(logits.split(4), targets.split(4), strict=True))
    assert [len(t) for _, t in loader.batches] == [4, 4, 1]
    assert accuracy(CPU, ImagesAreLogits(), loader) == pytest.approx({"top1": 100 * 3 / 9, "top5": 100 * 6 / 9})


def test_with_fewer_than_five_classes_top5_is_100_percent():
    logits, targets = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
    found = accuracy(CPU, ImagesAreLogits(), Batches((logits, targets)))
    assert found == pytest.approx({"top1": 100 * (logits.argmax(1) == targets).float().mean().item(), "top5": 100})


def test_own_metrics_are_means_over_images_and_repeatable_with_the_same_seed():
    class Draws(nn.Module):
        """The metric is the brightness of the batch, the loss a random number."""

        def forward(self, images, targets):
            return Output(torch.rand(()), {"brightness": images.mean()})

    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2)

    class Batches:
        def epoch(self, epoch):
            yield from ((part, torch.zeros(len(part))) for part in images.split(2))  # the last one is smaller

    first, again, other = (own_metrics(make_fabric("cpu", "32-true"), Draws(), Batches(), seed) for seed in (0, 0, 1))
    assert first["brightness"] == pytest.approx(2.0)
    assert first == again and first["loss"] != other["loss"]


# ---- values that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [0, 2])
def test_k_nn_refuses_features_that_are_not_finite(part, value):
    given = [torch.randn(20, 4), torch.arange(20) % 3, torch.randn(9, 4), torch.arange(9) % 3]
    assert knn_accuracy(*given, classes=3) >= 0
    given[part][7, 2] = value
    with pytest.raises(RunError, match=rf"features of 1 of {len(given[part])} images are not finite, the first is image 7"):
        knn_accuracy(*given, classes=3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_accuracy_refuses_logits_that_are_not_finite(value):
    logits, targets = torch.zeros(6, CLASSES), torch.zeros(6, dtype=torch.long)
    logits[4, 0] = value
    with pytest.raises(RunError, match="the logits of 1 of 6 images are not finite"):
        accuracy(CPU, ImagesAreLogits(), Batches((logits[:3], targets[:3]), (logits[3:], targets[3:])))
