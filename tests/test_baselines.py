"""Tests of the baselines: DeiT and its teacher, and the baselines in the reproduce command. MAE's own tests are in test_mae.py."""

import copy
import json
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import reproduce
from benchmarks.baselines import deit as deit_module
from benchmarks.baselines import distillation, drloc, jigsaw, mae
from benchmarks.baselines.deit import DeiT
from benchmarks.ledger.rows import load
from benchmarks.papers import BASELINES, ROOT, baselines, paper_module, recipes
from benchmarks.reproduce import main
from common.convert import ConversionError
from common.evaluate import Classifier
from common.randomness import reseed
from common.recipe import DEIT, Protocol, RecipeError, choose_arms, override
from common.vit import ViT

TEACHER, CLASSES = "test_efficientnet", 5


def encoder(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "position": "learned", **options})


def deit(**options) -> DeiT:
    torch.manual_seed(1)
    return DeiT(encoder(), CLASSES, **options)


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def make_teacher() -> nn.Module:
    """An untrained teacher whose batch norms are not the identity, so that its output depends on its mode."""
    torch.manual_seed(3)
    teacher = timm.create_model(TEACHER, num_classes=CLASSES)
    with torch.no_grad():
        for _ in range(3):
            teacher.train()(torch.randn(8, 3, 32, 32) + 1)
    return teacher.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": make_teacher().state_dict()}, path)  # the format of the official code
    return str(path)


@pytest.fixture
def teacher_options(weights) -> dict[str, str]:
    return {"teacher": TEACHER, "teacher_weights": weights}


def step_by_step(model: DeiT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return both heads' logits from tokens concatenated by hand: class, distillation, patches."""
    vit = model.encoder
    patches = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed[:, 1:]
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([first, model.distillation_token.expand(len(images), -1, -1), patches], 1)
    x = vit.norm(vit.blocks(x))
    return model.head(x[:, 0]), model.distillation_head(x[:, 1])


# ---- DeiT's losses


def test_the_hard_loss_averages_the_label_loss_and_the_loss_for_the_teachers_class(teacher_options):
    model, (images, targets) = deit(distillation="hard", smoothing=0.1, **teacher_options), batch()
    student, distilled = (logits.double().log_softmax(1) for logits in step_by_step(model, images))
    smooth = torch.full((6, CLASSES), 0.1 / CLASSES).double().scatter_add_(1, targets[:, None], torch.full((6, 1), 0.9).double())
    decision = make_teacher()(images).argmax(1)
    labels, teacher = -(smooth * student).sum(1), torch.stack([-row[c] for row, c in zip(distilled, decision, strict=True)])
    assert model.train()(images, targets).loss.item() == pytest.approx((labels / 2 + teacher / 2).mean().item(), abs=1e-5)


@pytest.mark.parametrize(("options", "alpha", "tau"), [({}, 0.1, 3.0), ({"alpha": 0.7, "temperature": 1.5}, 0.7, 1.5)])
def test_the_soft_loss_adds_tau_squared_times_the_divergence_of_the_softened_outputs(teacher_options, options, alpha, tau):
    model, (images, targets) = deit(distillation="soft", **options, **teacher_options), batch()
    student, distilled = step_by_step(model, images)
    total = 0.0
    for logits, distilled_K, teacher_K, target in zip(student, distilled, make_teacher()(images), targets, strict=True):
        own, soft = ((x / tau).double().exp() / (x / tau).double().exp().sum() for x in (distilled_K, teacher_K))
        divergence = sum(t * (t / o).log() for t, o in zip(soft, own, strict=True))
        label = -(logits.double().exp()[target] / logits.double().exp().sum()).log()
        total += (1 - alpha) * label + alpha * tau**2 * divergence
    assert model.train()(images, targets).loss.item() == pytest.approx((total / len(images)).item(), rel=1e-5)


@pytest.mark.parametrize("labels", [{}, {"smoothing": 0.1}, {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}])
def test_without_distillation_the_loss_is_that_of_fine_tuning_the_class_token(labels):
    model, (images, targets) = deit(**labels), batch()
    classifier = Classifier(model.encoder, CLASSES, Protocol(name="finetune", kind="finetune", stage=DEIT, pool="class", **labels))
    classifier.head.load_state_dict(model.head.state_dict())
    for mode in (True, False):
        losses = []
        for each in (model, classifier):
            reseed(5)
            losses.append(each.train(mode)(images, targets))
        assert torch.equal(losses[0].loss, losses[1].loss)
        assert torch.equal(losses[0].named["logits"], losses[1].named["logits"])


def test_the_teacher_gets_the_same_mixed_images_as_the_student(teacher_options):
    model, (images, targets) = deit(distillation="hard", mixup=0.8, cutmix=1.0, **teacher_options), batch()
    inputs, embed, teacher = [], model.encoder.embed, model.teacher
    model.encoder.embed = lambda x: inputs.append(x) or embed(x)
    model.teacher = lambda x: inputs.append(x) or teacher(x)
    model.train()(images, targets)
    student_input, teacher_input = inputs
    assert torch.equal(student_input, teacher_input) and not torch.equal(student_input, images)
    assert torch.equal(images, batch()[0])


def test_the_teacher_is_neither_trained_nor_saved_nor_copied(teacher_options, monkeypatch):
    made, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *words, **options: made.append(create(*words, **options)) or made[-1])
    model, (images, targets) = deit(distillation="hard", **teacher_options), batch()
    (teacher,) = made
    before = copy.deepcopy(teacher.state_dict())
    assert set(model.state_dict()) - set(deit().state_dict()) == {
        "distillation_token",
        "distillation_head.weight",
        "distillation_head.bias",
    }
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}
    model.train()(images, targets).loss.backward()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())  # batch norms included
    assert all(p.grad is not None for p in model.parameters())
    assert copy.deepcopy(model).teacher is model.teacher
    assert not model.teacher(images).requires_grad


def test_the_teacher_moves_to_the_device_of_the_images(teacher_options):
    model = deit(distillation="hard", **teacher_options)
    assert model.teacher(torch.zeros(2, 3, 32, 32, device="meta")).device.type == "meta"


def test_evaluation_averages_both_heads_and_does_not_run_the_teacher(teacher_options):
    model, (images, targets) = deit(distillation="hard", smoothing=0.1, mixup=0.8, **teacher_options).eval(), batch(5)
    student, distilled = step_by_step(model, images)
    model.teacher = None
    output = model(images, targets)
    torch.testing.assert_close(output.named["logits"], (student + distilled) / 2)
    assert output.loss.item() == pytest.approx(F.cross_entropy((student + distilled) / 2, targets).item(), rel=1e-5)
    assert torch.equal(model(images).named["logits"], output.named["logits"])


def test_the_distillation_token_has_its_own_head_and_influences_the_class_token(teacher_options):
    model, (images, targets) = deit(distillation="hard", alpha=1.0, **teacher_options).train(), batch()
    model(images, targets).loss.backward()
    assert not model.head.weight.grad.any()
    assert model.distillation_head.weight.grad.any() and model.distillation_token.grad.any()
    before = model(images, targets).named["logits"]
    with torch.no_grad():
        model.distillation_head.weight.add_(1)
        assert torch.equal(model(images, targets).named["logits"], before)  # in training, only the class token's head is used
        model.distillation_token.normal_()
        assert not torch.allclose(model(images, targets).named["logits"], before)  # but the tokens attend to each other


def test_top1_is_reported_only_for_images_that_are_not_mixed():
    model, (images, targets) = deit(), batch()
    for mode in (True, False):
        output = model.train(mode)(images, targets)
        assert output.metrics["top1"].item() == pytest.approx(100 * (output.named["logits"].argmax(1) == targets).float().mean().item())
        assert not output.metrics["top1"].requires_grad
    blending = deit(mixup=0.8)
    assert blending.train()(images, targets).metrics == blending.train()(images[:5], targets[:5]).metrics == {}
    assert set(blending.eval()(images, targets).metrics) == {"top1"}
    assert blending.eval()(images).metrics == {}


@pytest.mark.parametrize("options", [{}, {"distillation": "hard"}])
def test_the_encoder_is_timms_vit_without_the_distillation_token(options, teacher_options):
    model = deit(**options, **(teacher_options if options else {})).eval()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    reference = timm.models.VisionTransformer(**shape).eval()
    reference.load_state_dict(model.encoder.state_dict())  # strict
    images, _ = batch()
    torch.testing.assert_close(model.encoder(images), reference.forward_features(images), rtol=1e-4, atol=1e-5)


def test_tokens_and_positions_get_no_weight_decay_and_heads_are_initialised_as_in_deit(teacher_options):
    model = deit(distillation="hard", **teacher_options)
    assert model.no_weight_decay() == {"encoder.cls_token", "encoder.pos_embed", "distillation_token"}
    large = DeiT(ViT(image_size=32, patch_size=8, width=768, depth=1, position="learned"), 1000)
    assert large.head.weight.std().item() == pytest.approx(0.02, rel=0.01) and not large.head.bias.any()
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), encoder().parameters(), strict=True))


def test_relative_and_no_positions_work_but_distillation_refuses_relative_ones(teacher_options):
    images, targets = batch()
    for position in ("relative", "none"):
        assert DeiT(encoder(position=position), CLASSES)(images, targets).loss.isfinite()
    assert DeiT(encoder(position="none"), CLASSES, distillation="hard", **teacher_options)(images, targets).loss.isfinite()
    with pytest.raises(ValueError, match="does not support relative positions"):
        DeiT(encoder(position="relative"), CLASSES, distillation="hard", **teacher_options)
    with pytest.raises(ValueError, match="reads a class token"):
        DeiT(encoder(class_token=False), CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation": "firm"}, "distillation='firm' is not known; choose 'none', 'hard' or 'soft'"),
        ({"distillation": "hard", "alpha": 1.5}, "alpha=1.5 is not a number from 0 to 1"),
        ({"distillation": "hard", "alpha": "half"}, "alpha='half' is not a number"),
        ({"distillation": "soft", "temperature": 0}, "temperature=0 is not a number from 0.01"),
        ({"smoothing": 1}, "smoothing=1 is not a number"),
        ({"mixup": -0.8}, "mixup=-0.8 is not a number"),
        ({"cutmix": float("nan")}, "cutmix=nan is not a number"),
        ({"alpha": 0.3}, "have no effect without a teacher: add distillation=hard"),
        ({"teacher_weights": "teacher.pth"}, "have no effect without a teacher"),
    ],
)
def test_an_option_out_of_range_or_without_effect_is_refused_with_its_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        deit(**options)


def test_an_unknown_deit_option_is_refused_with_the_nearest_known_one():
    recipe = override(deit_module.digits(), ["method.distilation=hard"])
    with pytest.raises(RecipeError, match="DeiT has no option 'distilation'.*did you mean distillation"):
        deit_module.build(recipe, recipe.build_encoder(1), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "regnety160"}, "teacher='regnety160' is not a timm model; did you mean regnety_160"),
        ({"teacher": 160}, "teacher=160 is not a timm model"),
        ({"teacher": f"{TEACHER}.nobody"}, "Invalid pretrained tag .nobody.*teacher_weights=PATH"),
        ({"teacher": "regnety_160.deit_in1k"}, "timm's weights of it have 1000 classes, the data have 5.*teacher_weights=PATH"),
        ({"teacher": TEACHER, "teacher_weights": "nowhere.pth"}, "there is no checkpoint at nowhere.pth"),
    ],
)
def test_an_unavailable_teacher_is_refused_and_named(options, message):
    with pytest.raises(ValueError, match=message):
        deit(distillation="hard", **options)


def test_a_teacher_with_other_weights_classes_or_image_sizes_is_refused(weights, tmp_path):
    with pytest.raises(ConversionError, match="another method or another configuration"):
        deit(distillation="hard", teacher="test_resnet", teacher_weights=weights)
    with pytest.raises(ConversionError, match="other shapes: classifier.bias, classifier.weight"):
        DeiT(encoder(), CLASSES + 1, distillation="hard", teacher=TEACHER, teacher_weights=weights)
    vit = "vit_tiny_patch16_224"
    torch.save(timm.create_model(vit, num_classes=CLASSES).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(RecipeError, match="does not take images of 32 x 32 pixels"):
        deit(distillation="hard", teacher=vit, teacher_weights=str(tmp_path / "vit.pth"))


def test_without_a_file_timms_weights_are_loaded_and_a_failed_download_is_reported(monkeypatch):
    asked, create = [], timm.create_model

    def pretrained(name: str, pretrained: bool, **options):
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", pretrained)
    assert distillation.load_teacher(TEACHER, None, 1000, (3, 32, 32))(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)
    assert asked == [True]

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RecipeError, match="cannot be loaded .no network.; give a checkpoint of it: teacher_weights=PATH"):
        distillation.load_teacher(TEACHER, None, 1000, (3, 32, 32))


def test_the_distilled_recipe_uses_the_papers_teacher(monkeypatch):
    asked = []
    monkeypatch.setattr(deit_module, "load_teacher", lambda *words: asked.append(words))
    recipe = deit_module.imagenet_vitb16_distilled()
    with torch.device("meta"):
        model = deit_module.build(recipe, recipe.build_encoder(3), 1000)
    assert asked == [("regnety_160.deit_in1k", None, 1000, (3, 224, 224))]
    assert (model.distillation, model.alpha, recipe.supervised) == ("hard", 0.5, True)
    assert sum(p.numel() for p in model.parameters()) == 87_338_192 - 768  # timm's deit_base_distilled also has a position for its token


# ---- in the reproduce command


def test_the_baselines_are_these_five_and_each_is_one_file():
    assert baselines() == ["deit", "drloc", "ijepa", "jigsaw", "mae"]
    for name in baselines():
        relative = name in ("drloc", "jigsaw")  # two methods each, as a paper has in two files
        assert len((ROOT / BASELINES / f"{name}.py").read_text().splitlines()) <= (470 if relative else 160)


def test_deit_reports_its_own_accuracy_as_training_from_scratch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / BASELINES).mkdir(parents=True)
    assert main(["deit", "--device", "cpu", "--epochs", "2", "--out", str(tmp_path / "runs"), "--record"]) == 0
    printed = capsys.readouterr().out
    assert "deit, recipe digits" in printed and "scratch" in printed
    ledger = load(tmp_path / BASELINES / "results.csv")
    assert set(ledger["paper"]) == {"deit"} and set(ledger["log"]) == {"benchmarks/baselines/logs/deit-digits-2ep-seed0.txt"}
    kinds = set(zip(ledger["protocol"], ledger["start"], ledger["metric"], strict=True))
    assert kinds == {("scratch", "scratch", "top1"), *(("knn", start, "top1") for start in ("pretrained", "random", "pixels"))}
    assert "top1" in (tmp_path / ledger["log"][0]).read_text()
    directory = tmp_path / "runs" / "deit" / "digits-2ep-seed0" / "pretrain"
    assert json.loads((directory / "recipe.json").read_text())["recipe"]["supervised"] is True
    result = json.loads((directory / "result.json").read_text())
    assert ledger.query("protocol == 'scratch'")["value"].item() == pytest.approx(result["top1"], abs=1e-4)
    assert not [name for name in load_file(directory / "encoder.safetensors") if "distillation" in name or "head" in name]


def test_a_distilled_run_needs_only_a_teacher_name_and_a_checkpoint(tmp_path):
    teacher = timm.create_model(TEACHER, num_classes=10, in_chans=1)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    changes = ["distillation=soft", f"teacher={TEACHER}", f"teacher_weights={tmp_path / 'teacher.pth'}", "mixup=0.8"]
    arguments = [word for change in changes for word in ("--set", f"method.{change}")]
    assert main(["deit", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path), *arguments]) == 0
    saved = torch.load(tmp_path / "deit" / "digits-1ep-seed0" / "pretrain" / "checkpoint.pt", weights_only=True)["model"]
    assert "distillation_token" in saved and not [name for name in saved if "teacher" in name]
    assert "top1" in json.loads((tmp_path / "deit" / "digits-1ep-seed0" / "pretrain" / "result.json").read_text())


def test_mae_runs_all_its_protocols_and_saves_a_reconstruction(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / BASELINES).mkdir(parents=True)
    names = [protocol.name for protocol in mae.digits().protocols if protocol.stage]
    short = [word for name in names for word in ("--set", f"{name}.stage.epochs=1")]
    assert main(["mae", "--device", "cpu", "--epochs", "2", "--out", str(tmp_path / "runs"), "--record", *short]) == 0
    assert (tmp_path / "runs" / "mae" / "digits-2ep-seed0" / "pretrain" / "reconstruction.png").stat().st_size > 0
    ledger = load(tmp_path / BASELINES / "results.csv")
    starts = set(zip(ledger["protocol"], ledger["start"], strict=True))
    tuned = {(name, start) for name in names if name != "linear" for start in ("pretrained", "scratch")}
    frozen = {(name, start) for name in ("linear", "knn") for start in ("pretrained", "random")}
    assert starts == tuned | frozen | {("knn", "pixels")}
    assert "# finetune-scratch" in (tmp_path / "benchmarks/baselines/logs/mae-digits-2ep-seed0.txt").read_text()


def test_the_imagenet_recipes_of_the_baselines_equal_the_papers_tables():
    """MAE: Tables 8 to 10. DeiT: Table 9."""
    recipe = recipes(paper_module("mae"))["imagenet_vitb16_800"]()
    stage, (tune, probe) = recipe.pretrain, recipe.protocols
    assert (stage.epochs, stage.batch_size, stage.base_lr, stage.warmup_epochs) == (800, 4096, 1.5e-4, 40)
    assert (stage.betas, stage.weight_decay, stage.layer_decay, stage.lr_batch) == ((0.9, 0.95), 0.05, None, 256)
    assert (stage.augmentation.scale, stage.augmentation.flip, stage.augmentation.randaugment) == ((0.2, 1.0), 0.5, None)
    assert (tune.stage.epochs, tune.stage.batch_size, tune.stage.base_lr, tune.stage.lr_batch) == (100, 1024, 1e-3, 256)
    assert (tune.stage.warmup_epochs, tune.stage.layer_decay, tune.stage.betas, tune.stage.weight_decay) == (5, 0.75, (0.9, 0.999), 0.05)
    assert (tune.drop_path, tune.mixup, tune.cutmix, tune.smoothing) == (0.1, 0.8, 1.0, 0.1)
    assert (tune.pool, tune.position, tune.stage.augmentation.repeats, tune.stage.augmentation.erase) == ("mean", "learned", 1, 0.25)
    assert (probe.stage.optimizer, probe.stage.lr, probe.stage.weight_decay, probe.pool) == ("lars", 6.4, 0.0, "class")
    assert (probe.stage.epochs, probe.stage.warmup_epochs, probe.stage.augmentation.scale) == (90, 10, (0.08, 1.0))
    assert recipes(paper_module("mae"))["imagenet_vitb16_1600"]().pretrain.epochs == 1600
    deit_b = recipes(paper_module("deit"))["imagenet_vitb16"]()
    assert (deit_b.pretrain.epochs, deit_b.pretrain.batch_size, deit_b.pretrain.lr) == (300, 1024, 1e-3)
    assert deit_b.method == {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1} and deit_b.encoder == {"position": "learned", "drop_path": 0.1}
    assert deit_b.pretrain.augmentation.repeats == 3 and recipes(paper_module("deit"))["imagenet_vits16"]().size == "small"


@pytest.mark.parametrize("module", [jigsaw, drloc])
@pytest.mark.parametrize("recipe", ["digits", "digits_mae"])
def test_the_arms_of_a_relative_start_from_the_same_encoder(module, recipe):
    arms, starts = choose_arms(recipes(module)[recipe]()), {}
    for arm, own in arms.items():
        reseed(0)
        starts[arm] = module.build(own, own.build_encoder(1), 10).encoder.state_dict()
        assert own.pretrain == arms[arm.partition("+")[0]].pretrain
    for arm, state in starts.items():
        assert all(torch.equal(value, state[name]) for name, value in starts[arm.partition("+")[0]].items())
