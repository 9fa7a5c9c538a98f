"""Tests of grids of linear probes: their classifiers, independent training, and the reported results."""

from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from common.data import Augmentation, Loader, open_data
from common.evaluate import FeatureLoader, LinearProbe, accuracies, accuracy, can_cache, features, hold_out
from common.method import Output
from common.optim import Schedule, make_optimizer
from common.recipe import VISSL_LARS, VISSL_SGD, Protocol, RecipeError, TrainConfig
from common.run import Run
from common.train import device_batch, fit, make_fabric
from common.vit import ViT

NO_AUGMENTATION = Augmentation(crop="none", flip=0.0)
STAGE = TrainConfig(
    epochs=2, batch_size=100, base_lr=0.5, lr_batch=100, warmup_epochs=0.5, optimizer="sgd", weight_decay=0.1, augmentation=NO_AUGMENTATION
)
GRID = {"layers": (1, 3), "heads": ("norm", "norm_affine", "linear", "attentive"), "lr_multipliers": (1.0, 0.2), "decays": (0.1, 0.0)}


def encoder() -> ViT:
    torch.manual_seed(0)
    return ViT(image_size=8, patch_size=4, channels=1, width=16, depth=3, heads=2)


def probe(stage: TrainConfig = STAGE, **options) -> LinearProbe:
    model = encoder()
    torch.manual_seed(1)
    return LinearProbe(model, 10, Protocol(name="linear", kind="linear", stage=stage, **options))


def loader(augmentation: Augmentation | None, seed: int = 0, batch: int = 100) -> Loader:
    data = open_data("digits")
    train = data.train.subset(range(400)) if augmentation else data.val.subset(range(90))
    settings = {"seed": seed, "device": torch.device("cpu"), "workers": 0}
    return Loader(train, data=data, image_size=(8, 8), batch_size=batch, augmentation=augmentation, **settings)


def train(model: LinearProbe, directory, batches=None) -> LinearProbe:
    fabric = make_fabric("cpu", "32-true")
    with Run(directory, {}, torch.device("cpu")) as run:
        return fit(run, fabric, model, model.stage, batches or loader(NO_AUGMENTATION), seed=0)[0].eval()


# ---- the grid


def test_the_grid_has_one_classifier_per_combination_of_settings():
    model = probe(**GRID)
    assert len(model.grid) == len(model.heads) == len(set(model.names())) == 32
    assert model(torch.randn(5, 1, 8, 8)).named["logits"].shape == (32, 5, 10)
    for (layers, head, *_), classifier in zip(model.grid, model.heads, strict=True):
        assert classifier[-1].weight.shape == (10, 16 * layers)
        first = {"norm": nn.BatchNorm1d, "norm_affine": nn.BatchNorm1d, "linear": nn.Linear}
        if head in first:
            assert type(classifier[0]) is first[head]
    assert model.names()[0] == "layers=last head=norm lr=0.5 decay=0.1"
    assert model.names()[-1] == "layers=last3 head=attentive lr=0.1 decay=0"


def test_the_batch_norms_have_the_settings_of_mae_and_vissl():
    mae, vissl = (classifier[0] for classifier in probe(heads=("norm", "norm_affine")).heads)
    assert (mae.affine, mae.eps) == (False, 1e-6) and (vissl.affine, vissl.eps, vissl.momentum) == (True, 1e-5, 0.1)


def test_without_decays_the_grid_uses_the_weight_decay_of_the_stage():
    assert [decay for *_, decay in probe().grid] == [0.1]


def test_each_classifier_reads_the_blocks_in_its_name():
    model, images = probe(layers=(1, 2, 3), heads=("linear",)).eval(), torch.randn(4, 1, 8, 8)
    blocks = [tokens[:, 1:].mean(1) for tokens in model.encoder.last_blocks(images, 3)]
    for logits, head, count in zip(model(images).named["logits"], model.heads, (1, 2, 3), strict=True):
        torch.testing.assert_close(logits, head[0](torch.cat(blocks[-count:], 1)), atol=1e-6, rtol=0)


def test_only_an_attentive_head_depends_on_more_than_the_mean_of_the_tokens():
    model, images = probe(heads=("attentive", "linear")).eval(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        model.heads[0][0].latent.mul_(50)  # a sharp query, as after training
    tokens = model.encoder(images)
    spread = torch.tensor([0.0, 3, -3, 3, -3])[:, None] * torch.randn(16)  # keeps the class token and the mean of the patches
    seen = []
    for shown in (tokens, tokens + spread):
        model.encoder.forward = lambda _, shown=shown: shown
        seen.append(model(images).named["logits"])
    (attentive, linear), (attentive_spread, linear_spread) = seen
    torch.testing.assert_close(linear, linear_spread, atol=1e-5, rtol=0)
    assert (attentive - attentive_spread).abs().max() > 1e-3


def test_more_layers_than_the_encoder_has_are_refused():
    with pytest.raises(ValueError, match=r"layers=\(1, 4\): the encoder has 3"):
        probe(layers=(1, 4))


# ---- training


def test_each_classifier_has_its_own_lr_and_decay_and_biases_and_norms_have_no_decay():
    for optimizer in ("sgd", "lars", "adamw"):
        model = probe(replace(STAGE, optimizer=optimizer), **GRID)
        made = make_optimizer(model, model.stage)
        schedule, names = Schedule(made, model.stage, 10), {id(parameter): name for name, parameter in model.named_parameters()}
        schedule.step_update(5)  # the end of the warm-up
        found = {names[id(p)]: (group["lr"], group["weight_decay"], p.ndim) for group in made.param_groups for p in group["params"]}
        assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, (rate, decay, ndim) in found.items():
            *_, multiple, own = model.grid[int(name.split(".")[1])]
            assert rate == pytest.approx(0.5 * multiple) and decay == (own if ndim > 1 else 0)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_a_classifier_trained_in_a_grid_equals_one_trained_alone(optimizer, tmp_path):
    stage = replace(STAGE, optimizer=optimizer, base_lr={"sgd": 0.5, "lars": 20.0, "adamw": 1e-3}[optimizer])
    together = train(probe(stage, **GRID), tmp_path / "all")
    assert len({head[-1].weight.double().square().sum().item() for head in together.heads}) == 32
    for index in (0, 5, 15, 23, 31):
        names = dict(zip(GRID, ((value,) for value in together.grid[index]), strict=True))
        alone = train(probe(stage, **names), tmp_path / str(index))
        for name, value in alone.heads[0].state_dict().items():
            torch.testing.assert_close(together.heads[index].state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_all_classifiers_start_from_the_same_weights_and_the_loss_is_their_sum():
    model = probe(layers=(2,), heads=("norm", "linear"), lr_multipliers=(1.0, 2.0))
    assert all(torch.equal(head[-1].weight, model.heads[0][-1].weight) for head in model.heads)
    images, targets = torch.randn(6, 1, 8, 8), torch.arange(6)
    output = model.train()(images, targets)
    losses = [nn.functional.cross_entropy(logits, targets) for logits in output.named["logits"]]
    assert output.loss.item() == pytest.approx(sum(losses).item()) and len(losses) == 4


def test_only_the_heads_are_trained(tmp_path):
    before, after = probe(**GRID).state_dict(), train(probe(**GRID), tmp_path).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("encoder.")}


# ---- cached features


def test_cached_features_have_the_order_of_the_images_for_every_epoch_and_rank():
    data = loader(NO_AUGMENTATION)
    rows = torch.arange(400.0)[:, None].expand(400, 2)
    for rank, repeats in [(0, 1), (1, 1), (1, 3)]:
        images = Loader(
            data.split, data=data.data, image_size=(8, 8), batch_size=50, augmentation=replace(NO_AUGMENTATION, repeats=repeats), seed=3,
            device=torch.device("cpu"), workers=0, rank=rank, world_size=2, accumulate=2,
        )  # fmt: skip
        cached = FeatureLoader(images, (rows, data.labels))
        assert len(cached) == len(images) == 4
        for epoch, start in [(0, 0), (1, 0), (1, 3)]:
            for (feature, target), (_, label), row in zip(
                cached.epoch(epoch, start), images.epoch(epoch, start), images.indices(epoch)[start:], strict=True
            ):
                assert torch.equal(target, label) and feature[:, 0].tolist() == (row % 400).tolist()


def test_training_on_cached_features_equals_training_on_images(tmp_path):
    options = {name: value for name, value in GRID.items() if name != "heads"} | {"heads": ("norm_affine", "linear")}
    model, shown = probe(**options), loader(NO_AUGMENTATION)
    found = features(make_fabric("cpu", "32-true"), model.encoder, replace(shown, augmentation=None), "mean", 3)
    on_images = train(model, tmp_path / "images", shown)
    on_features = train(probe(**options), tmp_path / "features", FeatureLoader(shown, found))
    for name, value in on_images.state_dict().items():
        torch.testing.assert_close(on_features.state_dict()[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change", [{"crop": "padding"}, {"crop": "resized"}, {"flip": 0.1}, {"randaugment": "rand-m9"}, {"color_jitter": 0.1}, {"erase": 0.1}]
)
def test_features_are_cached_only_without_random_augmentation(change):
    def protocol(**options) -> Protocol:
        return Protocol(name="linear", kind="linear", stage=replace(STAGE, augmentation=replace(NO_AUGMENTATION, **options)))

    assert can_cache(protocol()) and can_cache(protocol(repeats=3, padding=2, scale=(0.5, 1.0), interpolation="bilinear"))
    assert not can_cache(protocol(**change)) and not can_cache(replace(protocol(), heads=("linear", "attentive")))


def test_an_attentive_head_refuses_pooled_features():
    with pytest.raises(ValueError, match="an attentive head needs tokens"):
        probe(heads=("attentive",))(torch.randn(3, 16), torch.arange(3))


# ---- reported results


class Stack(nn.Module):
    def forward(self, images: Tensor) -> Output:
        return Output(torch.zeros(()), named={"logits": torch.stack([images, -images])})


class One(nn.Module):
    def forward(self, images: Tensor) -> Output:
        return Output(torch.zeros(()), named={"logits": images})


class Batches:
    def __init__(self, *batches):
        self.batches = batches

    def epoch(self, epoch: int):
        yield from self.batches


def test_each_classifier_of_a_grid_has_the_accuracy_it_has_alone():
    fabric, g = Fabric(accelerator="cpu", devices=1), torch.Generator().manual_seed(0)
    parts = [(torch.randn(n, 7, generator=g), torch.randint(7, (n,), generator=g)) for n in (5, 5, 2)]
    found = accuracies(fabric, Stack(), Batches(*parts), (2,))
    for place, sign in enumerate((1, -1)):
        alone = accuracy(fabric, One(), Batches(*[(sign * x, y) for x, y in parts]))
        assert found[:, place].tolist() == [alone["top1"], alone["top5"]]


def test_the_best_classifier_is_reported_per_number_of_layers_and_overall():
    model = probe(layers=(1, 3), heads=("norm", "linear"))
    assert model.best([1.0, 5.0, 7.0, 2.0]) == {"_last": 1, "_last3": 2, "_best": 2}
    assert model.best([8.0, 5.0, 7.0, 2.0])["_best"] == 0
    assert probe(heads=("norm", "linear")).best([1.0, 5.0]) == {"": 1}


def test_among_equally_good_classifiers_the_first_of_the_grid_is_chosen():
    assert probe(layers=(1, 3), heads=("norm", "linear")).best([2.0, 5.0, 5.0, 5.0]) == {"_last": 1, "_last3": 2, "_best": 1}


def test_names_end_in_on_test_only_if_test_images_choose_among_several_classifiers():
    every, options = [1.0, 5.0, 7.0, 2.0], {"choose_on": "test"}
    assert probe(layers=(1, 3), heads=("norm", "linear"), **options).best(every) == {
        "_last_on_test": 1,
        "_last3_on_test": 2,
        "_best_on_test": 2,
    }
    assert probe(layers=(1, 3), **options).best([1.0, 5.0]) == {"_last": 0, "_last3": 1, "_best_on_test": 1}
    assert probe(heads=("norm", "linear"), **options).best([1.0, 5.0]) == {"_on_test": 1}
    assert probe(**options).best([1.0]) == probe().best([1.0]) == {"": 0}


# ---- the images that choose a classifier of a grid


def grid_of(count: int, **options) -> Protocol:
    return Protocol(name="linear", kind="linear", stage=STAGE, lr_multipliers=tuple(range(1, count + 1)), **options)


def test_a_tenth_of_each_class_is_held_out_and_the_rest_is_trained_on():
    label_N = torch.arange(1000).repeat_interleave(torch.arange(1000) % 40 + 1) % 40  # classes of 25 to 1,000 images
    label_N = label_N[torch.randperm(len(label_N), generator=torch.Generator().manual_seed(0))]
    train_N, held_N = hold_out(grid_of(2), label_N, 0)
    assert torch.equal(torch.cat([train_N, held_N]).sort().values, torch.arange(len(label_N)))
    assert torch.equal(train_N, train_N.sort().values) and torch.equal(held_N, held_N.sort().values)
    held_K, count_K = torch.bincount(label_N[held_N]), torch.bincount(label_N)
    assert ((10 * held_K - count_K).abs() <= 5).all()


def test_a_small_class_has_one_image_held_out_unless_it_has_only_one():
    label_N = torch.tensor([3, 0, 0, 1, 2, 2, 2, 2, 2, 0, 0, 4, 4])
    train_N, held_N = hold_out(grid_of(2), label_N, 0)
    assert torch.bincount(label_N[held_N]).tolist() == [1, 0, 1, 0, 1] and torch.bincount(label_N[train_N]).tolist() == [3, 1, 4, 1, 1]


def test_the_held_out_images_depend_only_on_the_seed():
    label_N = torch.arange(300) % 10
    first = hold_out(grid_of(2), label_N, 7)
    torch.manual_seed(5)
    torch.rand(3)
    assert all(map(torch.equal, first, hold_out(grid_of(5), label_N, 7)))
    assert not torch.equal(first[1], hold_out(grid_of(2), label_N, 8)[1])


def test_a_grid_of_one_and_a_choice_on_the_test_images_need_no_held_out_images():
    label_N = torch.arange(30) % 10
    for protocol in (grid_of(1), grid_of(3, choose_on="test"), replace(grid_of(3), kind="knn")):
        train_N, held_N = hold_out(protocol, label_N, 0)
        assert torch.equal(train_N, torch.arange(30)) and len(held_N) == 0


def test_a_grid_without_images_to_hold_out_is_refused_with_a_fix():
    message = r"protocol linear: the best of 3 classifiers .* no class has a second image: .* --set linear.choose_on=test"
    with pytest.raises(RecipeError, match=message):
        hold_out(grid_of(3), torch.arange(10), 0)
    assert len(hold_out(grid_of(1), torch.arange(10), 0)[0]) == 10


# ---- protocols


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels_per_class": 5, "label_fraction": 0.1}, r"labels_per_class=5, label_fraction=0.1, label_list=None .*: at most one"),
        ({"label_fraction": 0.1, "label_list": "a.txt"}, "at most one"),
        ({"labels_per_class": 0}, "labels_per_class=0 .* from 1 up"),
        ({"label_fraction": 0.0}, "label_fraction=0.0 .* above 0"),
        ({"label_fraction": 1.5}, "label_fraction=1.5 .* at most 1"),
        ({"layers": ()}, r"layers=\(\) .* from 1 up"),
        ({"layers": (1, 0)}, r"layers=\(1, 0\) .* from 1 up"),
        ({"layers": (4, 4)}, r"layers=\(4, 4\) .* each once"),
        ({"kind": "knn", "layers": (1, 4)}, r"kind='knn', layers=\(1, 4\) .* one number of layers"),
        ({"kind": "finetune", "layers": (4,)}, "fine-tuning reads the last layer"),
        ({"stage": None}, "kind='linear', stage=None .* give it a stage"),
        ({"resize": -1}, "resize=-1 .* from the image size up"),
        ({"l2": 0.0}, "l2=0.0 .* above 0"),
        ({"heads": ()}, r"heads=\(\) .* at least one"),
        ({"lr_multipliers": (1.0, -1.0)}, "lr_multipliers=.* above 0"),
        ({"lr_multipliers": ()}, "lr_multipliers=.* above 0"),
        ({"decays": (-0.1,)}, "decays=.* from 0 up"),
        ({"lr_multipliers": (1.0, 2.0), "stage": replace(STAGE, clip_norm=1.0)}, "stage=.* go without clip_norm"),
        ({"decays": (1.0, 2.0), "stage": replace(STAGE, final_weight_decay=1.0)}, "final_weight_decay"),
    ],
)
def test_invalid_protocols_are_refused_with_value_and_fix(options, message):
    with pytest.raises(RecipeError, match=f"protocol p: .*{message}"):
        Protocol(**{"name": "p", "kind": "linear", "stage": STAGE} | options)


def test_the_vissl_recipes_have_the_published_settings():
    assert (VISSL_SGD.lr, VISSL_SGD.epochs, VISSL_SGD.milestones, VISSL_SGD.weight_decay) == (0.01, 28, (8, 16, 24), 5e-4)
    assert (VISSL_LARS.lr, VISSL_LARS.batch_size, VISSL_LARS.epochs, VISSL_LARS.milestones) == (0.64, 16384, 50, (15, 30, 45))
    assert VISSL_SGD.betas[0] == VISSL_LARS.betas[0] == 0.9 and device_batch(VISSL_LARS, 64) == 256
