"""Tests of the shuffle test: a fine-tuned classifier on images whose patches have changed places."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from common.data import Augmentation, Data, Loader, Split, open_data
from common.evaluate import TokenEncoder, as_encoder, evaluate, patch_size
from common.evaluate.shuffle import ShuffledPatches, move_patches
from common.recipe import Protocol, RecipeError, TrainConfig
from common.run import Run
from common.stopping import Stopped
from common.train import make_fabric
from common.vit import ViT
from tests.test_processes import finish, launch, script

STAGE = TrainConfig(epochs=15, batch_size=50, base_lr=0.01, lr_batch=50, augmentation=Augmentation(crop="none", flip=0.0))
TUNED = Protocol(name="tuned", kind="finetune", stage=STAGE, shuffle_test=True)


@pytest.fixture(scope="module")
def data() -> Data:
    whole = open_data("digits")
    return replace(whole, train=whole.train.subset(range(400)), val=whole.val.subset(range(101)))


def loader(split: Split, rank: int = 0, world: int = 1, batch: int = 8) -> Loader:
    options: dict = {"augmentation": None, "seed": 0, "device": torch.device("cpu"), "workers": 0, "rank": rank, "world_size": world}
    return Loader(split, data=open_data("digits"), image_size=(8, 8), batch_size=batch, **options)


def encoder(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"image_size": 8, "patch_size": 2, "channels": 1, "width": 32, "depth": 2, "heads": 2} | options)


def patches(images: Tensor, height: int, width: int) -> Tensor:
    """(B, N, C, height, width), row by row, cut one by one."""
    rows, columns = range(0, images.shape[2], height), range(0, images.shape[3], width)
    return torch.stack([images[:, :, y : y + height, x : x + width] for y in rows for x in columns], 1)


# ---- the images


@pytest.mark.parametrize("patch", [(2, 2), (4, 2), (8, 8)])
def test_each_cell_shows_the_patch_that_the_order_gives(patch):
    images = torch.randn(3, 2, 8, 16)
    before = patches(images, *patch)
    order_BN = torch.stack([torch.randperm(before.shape[1]) for _ in range(3)])
    found = patches(move_patches(images, order_BN, patch), *patch)
    for image in range(3):
        assert torch.equal(found[image], before[image][order_BN[image]])


def shuffled(split: Split, **options) -> dict[int, Tensor]:
    """The shuffled images by their index."""
    plain = loader(split, **options)
    both = zip(plain.indices(0), ShuffledPatches(plain, (2, 2)).epoch(0), strict=True)
    return {index: image for index_B, (images, _) in both for index, image in zip(index_B.tolist(), images, strict=True)}


def test_an_image_is_shuffled_alike_in_any_batch_and_any_process(data):
    alone = shuffled(data.val)
    for options in ({"batch": 1}, {"batch": 101}, {"rank": 0, "world": 2}, {"rank": 1, "world": 2, "batch": 3}):
        found = shuffled(data.val, **options)
        assert found and all(torch.equal(image, alone[index]) for index, image in found.items())
    torch.manual_seed(5)
    assert all(torch.equal(image, alone[index]) for index, image in shuffled(data.val).items())


def test_images_have_different_permutations_and_keep_their_patches_and_labels(data):
    same = Split(torch.arange(20) % 10, data.val.images[:1].expand(20, -1, -1, -1).contiguous())
    found = shuffled(same)
    assert len({image.numpy().tobytes() for image in found.values()}) == 20
    (original,) = {tuple(sorted(map(str, patches(images, 2, 2)[0].tolist()))) for images, _ in loader(same.subset([0])).epoch(0)}
    assert all(tuple(sorted(map(str, patches(image[None], 2, 2)[0].tolist()))) == original for image in found.values())
    labels = [label for _, labels in ShuffledPatches(loader(same), (2, 2)).epoch(0) for label in labels.tolist()]
    assert labels == same.labels.tolist()


# ---- the results


def results(model: nn.Module, data: Data, protocol: Protocol = TUNED, **options) -> dict[str, float]:
    torch.manual_seed(0)
    found = evaluate(model, data, protocol, fabric=make_fabric("cpu", "32-true"), **options)
    return {one.protocol: one.top1 for one in found}


def test_a_classifier_that_does_not_use_positions_has_the_same_accuracy_on_shuffled_images(data):
    found = results(encoder(position="none"), data)
    assert found["tuned_shuffled"] == found["tuned"] > 30


def test_a_classifier_that_uses_positions_is_worse_on_shuffled_images(data):
    found = results(encoder(), data)
    assert [*found] == ["tuned_shuffled", "tuned"] and found["tuned_shuffled"] < found["tuned"] - 5


class FirstPatch(nn.Module):
    """An encoder whose only token is the first patch, but which has as many tokens as patches."""

    def __init__(self):
        super().__init__()
        self.patch_embed, self.norm = nn.Identity(), nn.Identity()
        self.patch_embed.patch_size, self.scale = 2, nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images[:, None, 0, :2, :2].flatten(2)
        return self.scale * torch.cat([pixels, -pixels], -1).expand(-1, 16, -1)


def test_a_classifier_of_one_patch_is_right_where_this_patch_stays(data):
    """The grey level of the first patch is the label, and all other patches show the next label."""

    def told(split: Split) -> Split:
        images = ((split.labels + 1) % 2 * 255).to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
        images[:, :, :2, :2] = (split.labels % 2 * 255).to(torch.uint8)[:, None, None, None]
        return Split(split.labels % 2, images, class_names=("0", "1"))

    two = replace(data, classes=2, train=told(data.train), val=told(data.val))
    found = results(FirstPatch(), two)
    stays = [
        torch.equal(image[:, :2, :2], plain[:, :2, :2])
        for image, plain in zip(shuffled(two.val).values(), unshuffled(two.val), strict=True)
    ]
    assert found == {"tuned": 100, "tuned_shuffled": pytest.approx(100 * sum(stays) / len(stays))} and 0 < sum(stays) < 30


def unshuffled(split: Split) -> list[Tensor]:
    return [image for images, _ in loader(split).epoch(0) for image in images]


def test_the_shuffle_test_changes_no_other_result(data):
    with_test, without = results(encoder(), data), results(encoder(), data, replace(TUNED, shuffle_test=False))
    assert without == {"tuned": with_test["tuned"]}


def test_the_settings_of_both_results_are_equal_and_the_last_is_that_of_unchanged_images(data):
    found = evaluate(encoder(), data, TUNED, fabric=make_fabric("cpu", "32-true"))
    assert [(one.protocol, one.settings) for one in found] == [("tuned_shuffled", "pool=mean"), ("tuned", "pool=mean")]


def test_a_run_stopped_in_training_resumes_to_the_same_results(data, tmp_path, monkeypatch):
    def once_more(name: str) -> dict[str, float]:
        with Run(tmp_path / name, {}, torch.device("cpu")) as run:
            return results(encoder(), data, run=run)

    whole = once_more("whole")
    asked = iter([False] * 40 + [True] * 3)
    monkeypatch.setattr("common.train.stop_requested", lambda: next(asked))
    with pytest.raises(Stopped):
        once_more("stopped")
    monkeypatch.undo()
    assert once_more("stopped") == whole == once_more("whole") and whole["tuned"] != whole["tuned_shuffled"]


# In float64 and at a low learning rate: otherwise training amplifies the rounding of gradients that are summed in another order.
PROGRAM = """
import json, sys, torch, common
from dataclasses import replace
from common.data import open_data
from common.evaluate import evaluate
from common.recipe import LOCATION
from common.run import Run
from common.train import make_fabric
from tests.test_shuffle import TUNED, encoder

fabric = make_fabric("cpu", "64-true")
fabric.launch()
whole = open_data("digits")
data = replace(whole, train=whole.train.subset(range(400)), val=whole.val.subset(range(101)))
torch.manual_seed(0)
protocols = replace(TUNED, stage=replace(TUNED.stage, base_lr=0.001)), replace(LOCATION, images=51)
found = []
for number, protocol in enumerate(protocols):
    with Run(f"{sys.argv[1]}/{number}", {}, fabric.device, main=fabric.is_global_zero) as run:
        found += evaluate(encoder(position="none"), data, protocol, fabric=fabric, run=run)
print("found", json.dumps({one.protocol: [one.top1, one.settings] for one in found}), flush=True)
"""


@pytest.mark.slow
def test_two_processes_have_the_results_of_one_in_the_shuffle_test_and_the_location_probe(tmp_path):
    """101 and 51 test images do not divide by two."""
    said = [finish(launch(processes, script(tmp_path, PROGRAM), str(tmp_path / f"{processes}"))) for processes in (1, 2)]
    alone, *both = [json.loads(line.partition("found ")[2]) for text in said for line in text.splitlines() if "found {" in line]
    assert len(both) == 2 and both[0] == both[1] and [*alone] == ["tuned_shuffled", "tuned", "location_1", "location_2"]
    assert both[0] == {name: [pytest.approx(top1, abs=1e-3), settings] for name, (top1, settings) in alone.items()}
    assert both[0]["tuned"][0] == both[0]["tuned_shuffled"][0] > 30


# ---- encoders


def test_the_patch_size_is_that_of_our_vit_and_of_timms_models():
    assert patch_size(encoder(patch_size=4)) == (4, 4)
    for name, options, patch in (
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": (16, 8)}, (16, 8)),
        ("deit3_small_patch16_224", {"img_size": 32}, (16, 16)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, (16, 16)),
    ):
        size = (options["img_size"], options["img_size"])
        assert patch_size(TokenEncoder(timm.create_model(name, **options), 3, size)) == patch


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.flatten(1)


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", in_chans=1, img_size=64, depths=(1, 1)),
            64,
            "64 tokens for images of 64",
        ),
        (lambda: timm.create_model("resnet18", in_chans=1), 64, "ResNet has no `patch_embed.patch_size`"),
        (Plain, 8, "Plain has no `patch_embed.patch_size`: .* one token for each patch"),
    ],
)
def test_an_encoder_without_one_token_for_each_patch_is_refused_before_training(make, size, message, data):
    with pytest.raises(ValueError, match=message):
        patch_size(as_encoder(make(), 1, (size, size)))
    with pytest.raises(ValueError, match=message):
        results(make(), data, image_size=(size, size))


def test_only_fine_tuning_has_a_shuffle_test():
    with pytest.raises(RecipeError, match="kind='knn', shuffle_test=True .* only a fine-tuned classifier"):
        Protocol(name="knn", kind="knn", shuffle_test=True)
