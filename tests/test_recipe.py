"""Tests of recipes: overrides, refused settings, arms, and the batch size per device."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath

from benchmarks.papers import baselines, choose_recipe, paper_module, papers, recipes
from common.data import Augmentation
from common.recipe import Protocol, Recipe, RecipeError, TrainConfig, as_json, base_arm, check_options, choose_arms, nearest, override
from common.train import device_batch
from common.vit import ViT
from droppos.recipe import build
from positional_label import recipe as positional_label

STAGE = TrainConfig(epochs=10, batch_size=64, base_lr=1e-3)
RECIPE = Recipe(
    size="micro",
    image_size=8,
    patch_size=2,
    pretrain=STAGE,
    protocols=(
        Protocol(name="finetune", kind="finetune", stage=STAGE),
        Protocol(name="finetune_5_per_class", kind="finetune", stage=STAGE, labels_per_class=5),
        Protocol(name="knn", kind="knn"),
    ),
    method={"sigma": 1.0},
)
QUICK = settings(deadline=None, max_examples=100, derandomize=True)


# ---- override


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("image_size=16", replace(RECIPE, image_size=16)),
        ("size=tiny", replace(RECIPE, size="tiny")),
        ('size="tiny"', replace(RECIPE, size="tiny")),
        ("pretrain.base_lr=3e-3", replace(RECIPE, pretrain=replace(STAGE, base_lr=3e-3))),
        ("pretrain.base_lr=1", replace(RECIPE, pretrain=replace(STAGE, base_lr=1.0))),
        ("pretrain.layer_decay=0.75", replace(RECIPE, pretrain=replace(STAGE, layer_decay=0.75))),
        ("pretrain.clip_norm=null", RECIPE),
        ("pretrain.betas=[0.8, 0.99]", replace(RECIPE, pretrain=replace(STAGE, betas=(0.8, 0.99)))),
        ("pretrain.optimizer=lars", replace(RECIPE, pretrain=replace(STAGE, optimizer="lars"))),
        ("pretrain.augmentation.flip=0", replace(RECIPE, pretrain=replace(STAGE, augmentation=Augmentation(flip=0.0)))),
        ("method.sigma=2", replace(RECIPE, method={"sigma": 2})),
        ("method.attentive=false", replace(RECIPE, method={"sigma": 1.0, "attentive": False})),
        ("method.smoothing=released", replace(RECIPE, method={"sigma": 1.0, "smoothing": "released"})),
        ("encoder.layer_scale=0.1", replace(RECIPE, encoder={"layer_scale": 0.1})),
        ("pretrain.milestones=[5, 10]", replace(RECIPE, pretrain=replace(STAGE, milestones=(5, 10)))),
    ],
)
def test_an_assignment_changes_only_the_named_setting(assignment, changed):
    before = asdict(RECIPE)
    assert override(RECIPE, [assignment]) == changed
    assert asdict(RECIPE) == before


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("kind=linear", "linear"),
        ("label_fraction=0.01", 0.01),
        ("label_list=lists/1percent.txt", "lists/1percent.txt"),
        ("layers=[4]", (4,)),
        ("resize=224", 224),
        ("interpolation=bilinear", "bilinear"),
        ("statistics=own", "own"),
        ("l2=1", 1.0),
        ('heads=["linear", "norm_affine"]', ("linear", "norm_affine")),
        ("lr_multipliers=[1, 0.1]", (1.0, 0.1)),
        ("decays=[0]", (0.0,)),
        ("decays=[]", ()),
    ],
)
def test_every_setting_of_a_frozen_evaluation_can_be_changed(assignment, value):
    recipe = replace(RECIPE, protocols=(Protocol(name="frozen", kind="logistic", stage=STAGE, decays=(0.5,)),))
    assert getattr(override(recipe, [f"frozen.{assignment}"]).protocols[0], assignment.partition("=")[0]) == value


def test_integers_become_floats_for_float_settings():
    assert isinstance(override(RECIPE, ["pretrain.base_lr=1"]).pretrain.base_lr, float)


def test_a_protocol_is_addressed_by_its_name():
    changed = override(RECIPE, ["finetune.stage.epochs=50", "finetune_5_per_class.pool=class", "knn.neighbours=10"])
    finetune, few, knn = changed.protocols
    assert (finetune.stage.epochs, few.stage.epochs) == (50, 10)
    assert (finetune.pool, few.pool) == ("mean", "class")
    assert knn == replace(RECIPE.protocols[2], neighbours=10)
    assert changed.pretrain == STAGE


@pytest.mark.parametrize(("value", "expected"), [("learned", "learned"), ("null", None)])
def test_an_optional_choice_accepts_a_value_and_null(value, expected):
    assert override(RECIPE, [f"finetune.position={value}"]).protocols[0].position == expected


def test_later_assignments_build_on_earlier_ones():
    changed = override(RECIPE, ["pretrain.epochs=20", "pretrain.batch_size=32", "pretrain.epochs=30"])
    assert (changed.pretrain.epochs, changed.pretrain.batch_size) == (30, 32)


@pytest.mark.parametrize(
    "assignment",
    [
        "pretrain.epochs=1.5",
        "pretrain.epochs=true",
        "pretrain.epochs=many",
        "pretrain.epochs=null",
        "pretrain.base_lr=fast",
        "pretrain.base_lr=true",
        "pretrain.layer_decay=yes",
        "pretrain.betas=0.9",
        "pretrain.optimizer=adam",
        "pretrain.optimizer=[]",
        "pretrain=5",
        "size=3",
        "method=5",
        "finetune.position=absolute",
        "finetune.pool=max",
        "pretrain.milestones=5",
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_path(assignment):
    path = assignment.partition("=")[0]
    with pytest.raises(RecipeError, match=f"^{path}=.* does not fit; expected"):
        override(RECIPE, [assignment])


@pytest.mark.parametrize(
    ("assignment", "now"),
    [
        ("pretrain.drops=[1]", "milestones"),
        ("pretrain.augmentation.crop=squeezed", "squash"),
        ("finetune.label_share=0.1", "label_fraction"),
        ("finetune.rates=[1]", "lr_multipliers"),
        ("finetune.strength=1", "l2"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(assignment, now):
    with pytest.raises(RecipeError, match=f"it is now called '{now}'"):
        override(RECIPE, [assignment])


def test_an_old_option_of_the_encoder_is_refused_with_the_new_one():
    with pytest.raises(RecipeError, match="no option 'recompute'; it is now called 'grad_checkpointing'"):
        override(RECIPE, ["encoder.recompute=true"]).build_encoder(channels=1)


@pytest.mark.parametrize(
    "assignment", ["pretrain.betas=[0.9]", "pretrain.betas=[0.9, 0.95, 0.99]", 'pretrain.betas=["a", "b"]', 'pretrain.milestones=["a"]']
)
def test_a_list_of_the_wrong_length_or_type_is_refused(assignment):
    with pytest.raises(RecipeError, match="does not fit"):
        override(RECIPE, [assignment])


@pytest.mark.parametrize(
    ("assignment", "suggestion"),
    [
        ("pretrain.epoch=3", "did you mean epochs"),
        ("pretrain.batchsize=3", "did you mean batch_size"),
        ("pretain.epochs=3", "did you mean pretrain"),
        ("finetun.stage.epochs=3", "did you mean finetune"),
        ("finetune.epochs=3", "there is no 'epochs' in a Protocol"),
        ("pretrain.augmentation.flipp=1", "did you mean flip"),
        ("qqqqq=1", "known: .*arms.*finetune.*pretrain"),
        ("=1", "known: .*pretrain"),
    ],
)
def test_an_unknown_path_is_refused_with_the_nearest_name(assignment, suggestion):
    path = assignment.partition("=")[0]
    with pytest.raises(RecipeError, match=f"^{path}: .*{suggestion}"):
        override(RECIPE, [assignment])


@pytest.mark.parametrize("assignment", ["pretrain.epochs", "", "pretrain.epochs 3"])
def test_text_that_is_not_an_assignment_is_refused_with_an_example(assignment):
    with pytest.raises(RecipeError, match="not an assignment; write path=value"):
        override(RECIPE, [assignment])


@pytest.mark.parametrize("assignment", ["pretrain.epochs.more=3", "knn.stage.epochs=3", "image_size.x=1"])
def test_a_path_into_a_value_without_fields_is_refused(assignment):
    with pytest.raises(RecipeError, match="has no fields"):
        override(RECIPE, [assignment])


@pytest.mark.parametrize("assignment", ["protocols.finetune.pool=class", 'protocols=["knn"]', "protocols=3"])
def test_assigning_all_protocols_is_refused_with_their_names(assignment):
    with pytest.raises(RecipeError, match="field by field, such as finetune.pool; known: finetune, finetune_5_per_class, knn"):
        override(RECIPE, [assignment])


@pytest.mark.parametrize("assignment", ["finetune=5", "pretrain.=1", "finetune.stage.=1"])
def test_an_incomplete_path_is_refused(assignment):
    with pytest.raises(RecipeError):
        override(RECIPE, [assignment])


# ---- recipes as JSON, and models built from them


def test_the_recipe_as_json_can_be_saved_and_contains_every_setting():
    written = as_json(RECIPE)
    assert json.loads(json.dumps(written)) == written
    assert written["pretrain"]["betas"] == [0.9, 0.999]
    assert written["pretrain"]["augmentation"]["crop"] == "resized" and written["method"] == {"sigma": 1.0}
    assert [protocol["name"] for protocol in written["protocols"]] == ["finetune", "finetune_5_per_class", "knn"]
    assert written["protocols"][2]["stage"] is None
    assert as_json(STAGE) == written["pretrain"] and as_json(RECIPE.protocols[0]) == written["protocols"][0]


def test_two_recipes_that_differ_anywhere_differ_as_json():
    for assignment in (
        "finetune_5_per_class.labels_per_class=6",
        "pretrain.augmentation.flip=0.4",
        "method.sigma=2",
        "encoder.drop_path=0.1",
    ):
        assert as_json(override(RECIPE, [assignment])) != as_json(RECIPE), assignment


def test_the_encoder_has_the_options_of_the_recipe_overridden_by_the_caller():
    encoder = override(RECIPE, ["encoder.layer_scale=0.1", "encoder.drop_path=0.3"]).build_encoder(1, drop_path=0.0)
    assert (encoder.width, encoder.channels, encoder.grid) == (96, 1, (4, 4))
    assert "blocks.0.ls1.gamma" in encoder.state_dict() and encoder.blocks[-1].drop_path.drop_prob == 0
    assert RECIPE.backbone == "vit_micro_patch2_8"


@pytest.mark.parametrize("assignment", ["encoder.widht=3", "encoder.layerscale=0.1"])
def test_an_unknown_option_of_the_encoder_is_refused_by_name(assignment):
    with pytest.raises(RecipeError, match=f"ViT has no option '{assignment.split('.')[1].split('=')[0]}'"):
        override(RECIPE, [assignment]).build_encoder(1)


def test_an_unknown_option_of_a_method_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="DropPos has no option 'sigmaa'.*did you mean.*sigma"):
        build(override(RECIPE, ["method.sigmaa=2"]), RECIPE.build_encoder(1), 10)


@pytest.mark.parametrize("option", ["encoder", "sigma_epochs"])
def test_an_option_set_by_the_recipe_itself_is_refused(option):
    with pytest.raises(RecipeError, match=option):
        build(override(RECIPE, [f"method.{option}=3"]), RECIPE.build_encoder(1), 10)


def test_check_options_accepts_known_options_and_reports_the_first_unknown_one():
    def method(encoder, *, sigma=1.0, temperature=0.1): ...

    check_options(method, {"sigma": 2, "temperature": 1})
    with pytest.raises(RecipeError, match="method has no option 'temprature'; did you mean temperature"):
        check_options(method, {"sigma": 2, "temprature": 1, "zzz": 0})


def test_without_a_similar_name_all_known_names_are_listed():
    assert nearest("zzzz", ["sigma", "mask_ratio"]) == "known: mask_ratio, sigma"


# ---- arms


@pytest.mark.parametrize("name", recipes(positional_label))
def test_arms_with_and_without_labels_differ_only_in_the_label(name):
    arms = choose_arms(recipes(positional_label)[name]())
    alone = [arm for arm in arms if "+" not in arm]
    assert alone and set(arms) == {f"{arm}{added}" for arm in alone for added in ("", "+apl", "+rpl")}
    for arm in alone:
        assert arms[arm].arms == {} and arms[arm].method["label"] == "none"
        for added, label in (("+apl", "absolute"), ("+rpl", "relative")):
            assert arms[f"{arm}{added}"] == override(arms[arm], [f"method.label={label}"])


def test_arms_keep_the_requested_order_and_a_recipe_without_arms_is_one_arm():
    assert list(choose_arms(positional_label.digits(), ["swin+rpl", "vit"])) == ["swin+rpl", "vit"]
    assert choose_arms(RECIPE) == {"": RECIPE}


def test_the_base_arm_is_the_arm_without_additions_if_the_recipe_has_it():
    bases = {arm: base_arm(positional_label.digits(), arm) for arm in ("vit", "vit+rpl", "swin_released+apl", "swin")}
    assert bases == {"vit": "", "vit+rpl": "vit", "swin_released+apl": "swin_released", "swin": ""}
    assert base_arm(recipes(paper_module("stop"))["imagenet_ablation"](), "ijepa+stop_context") == "ijepa"
    assert base_arm(replace(RECIPE, arms={"a+b": ()}), "a+b") == "" == base_arm(RECIPE, "")


def test_an_unknown_arm_is_refused_with_the_nearest_or_all_known_arms():
    with pytest.raises(RecipeError, match=r"ARMS: 'vit\+alp' is not an arm of the recipe; did you mean vit\+apl"):
        choose_arms(positional_label.digits(), ["vit", "vit+alp"])
    with pytest.raises(RecipeError, match=r"'zzzz' is not an arm of the recipe; known: vit, vit\+apl, vit\+rpl"):
        choose_arms(positional_label.imagenet_vit(), ["zzzz"])
    with pytest.raises(RecipeError, match="'vit' is not an arm of the recipe; it has none"):
        choose_arms(RECIPE, ["vit"])


IMAGENET = {  # backbone, epochs, batch, rate, drop path, CutMix
    "vit": ("vit_base_patch16_224", 150, 512, 5e-4, 0.0, 0.0),
    "deit": ("deit_base_patch16_224", 300, 1024, 1e-3, 0.1, 1.0),
    "swin": ("swin_base_patch4_window7_224", 150, 640, 6.25e-4, 0.5, 1.0),
    "swin_tiny": ("swin_tiny_patch4_window7_224", 150, 640, 6.25e-4, 0.2, 1.0),
    "nest": ("nest_base", 150, 640, 6.25e-4, 0.5, 1.0),
}


@pytest.mark.parametrize("family", IMAGENET)
def test_every_imagenet_arm_has_the_expected_backbone_and_settings(family):
    backbone, epochs, batch, rate, drop_path, cutmix = IMAGENET[family]
    names = [name for name in (f"imagenet_{family}", f"mini_imagenet_{family}") if name in recipes(positional_label)]
    for name in names:
        for arm, own in choose_arms(recipes(positional_label)[name]()).items():
            stage = own.pretrain
            assert (own.backbone, own.image_size, own.supervised) == (backbone, 224, True), (name, arm)
            assert (stage.epochs, stage.batch_size) == (300 if name.startswith("mini") else epochs, batch), (name, arm)
            assert stage.lr == pytest.approx(rate) and stage.min_lr == pytest.approx(rate / 100)
            assert stage.clip_norm == (None if family == "deit" else 5.0)
            assert stage.augmentation.repeats == (3 if family == "deit" else 1)
            assert {key: own.method[key] for key in ("mixup", "cutmix", "smoothing")} == {"mixup": 0.8, "cutmix": cutmix, "smoothing": 0.1}
            with torch.device("meta"):
                encoder = own.build_encoder(3)
            assert max([0.0, *(m.drop_prob for m in encoder.modules() if isinstance(m, DropPath))]) == pytest.approx(drop_path)
            assert (getattr(encoder, "cls_token", None) is not None) == (family == "deit")


@pytest.mark.parametrize(
    ("size", "offered"), [("vit_bse_patch16_224", "vit_base_patch16_224"), ("swin_tiny_patch4_windw7_224", "swin_tiny_patch4_window7_224")]
)
def test_an_unknown_backbone_is_refused_with_the_nearest_timm_name(size, offered):
    with pytest.raises(RecipeError, match=f"size='{size}' is neither a size of ViT nor a model or class of timm; did you mean .*{offered}"):
        override(RECIPE, [f"size={size}"]).build_encoder(3)


def test_a_vit_without_a_patch_size_is_refused_by_name():
    with pytest.raises(RecipeError, match="patch_size=None: a ViT needs its patch size"):
        override(RECIPE, ["patch_size=null"]).build_encoder(1)


# ---- dividing a batch among devices


@QUICK
@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 200))
def test_the_micro_batch_is_the_largest_divisor_within_the_limit(per_device, devices, limit):
    stage = replace(STAGE, batch_size=per_device * devices, device_batch=limit)
    size = max(d for d in range(1, per_device + 1) if per_device % d == 0 and d <= limit)
    if per_device // size > 2 * math.ceil(per_device / limit):
        with pytest.raises(RecipeError, match=f"{per_device // size} micro-batches of {size} images"):
            device_batch(stage, devices)
    else:
        assert device_batch(stage, devices) == size


@pytest.mark.parametrize(("batch", "devices", "expected"), [(4096, 8, 512), (4096, 64, 64), (4096, 1, 512), (100, 1, 100), (1026, 2, 171)])
def test_the_device_batch_divides_the_effective_batch(batch, devices, expected):
    assert device_batch(replace(STAGE, batch_size=batch), devices) == expected


@pytest.mark.parametrize(("batch", "devices"), [(100, 8), (4, 8), (0, 1)])
def test_a_batch_that_cannot_be_divided_among_devices_is_refused(batch, devices):
    with pytest.raises(RecipeError, match=f"a batch of {batch} cannot be divided among {devices} devices"):
        device_batch(replace(STAGE, batch_size=batch), devices)


# ---- the papers' recipes


@pytest.mark.parametrize("paper", [*papers(), *baselines()])
def test_every_paper_has_a_working_recipe_for_the_default_data(paper):
    module = paper_module(paper)
    name, recipe = choose_recipe(module, "digits", None)
    assert name == "digits" and name in recipes(module)
    images, targets = torch.rand(2, 1, recipe.image_size, recipe.image_size), torch.tensor([3, 1])
    for arm, own in choose_arms(recipe).items():
        method = module.build(own, own.build_encoder(1), 10).eval()
        if hasattr(module, "example_targets"):
            targets = module.example_targets(method, images)
        assert method(images, targets).loss.isfinite(), arm
        if isinstance(method.encoder, ViT):
            assert method.encoder.grid[0] == own.image_size // own.patch_size


@pytest.mark.parametrize("paper", [*papers(), *baselines()])
def test_only_the_default_recipe_of_a_data_set_is_created(paper, tmp_path, monkeypatch):
    module, made = paper_module(paper), []
    assert {"digits", "folder"} <= set(module.DEFAULTS) and set(module.DEFAULTS.values()) <= set(recipes(module).values())
    for data, function in module.DEFAULTS.items():
        assert choose_recipe(module, str(tmp_path) if data == "folder" else data, None) == (function.__name__, function())
    monkeypatch.setitem(module.DEFAULTS, "digits", lambda: made.append("digits"))
    choose_recipe(module, "digits", None)
    assert made == ["digits"]


@pytest.mark.parametrize("paper", [*papers(), *baselines()])
def test_every_recipe_has_a_docstring_and_unique_protocol_names(paper):
    for name, function in recipes(paper_module(paper)).items():
        recipe = function()
        assert function.__doc__, name
        protocols = [protocol.name for protocol in recipe.protocols]
        assert len(set(protocols)) == len(protocols) and not set(protocols) & set(asdict(recipe)), name
        for protocol in recipe.protocols:
            assert (protocol.stage is None) == (protocol.kind in ("knn", "logistic")), (name, protocol.name)


def test_an_unknown_paper_recipe_or_data_set_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="PAPER='dropos'.*did you mean droppos"):
        paper_module("dropos")
    module = paper_module("droppos")
    with pytest.raises(RecipeError, match="RECIPE='digit'.*did you mean digits"):
        choose_recipe(module, "digits", "digit")
    with pytest.raises(RecipeError, match="DATA='digit'.*did you mean digits"):
        choose_recipe(module, "digit", None)


EVERY = [(paper, name) for paper in [*papers(), *baselines()] for name in recipes(paper_module(paper))]


@pytest.mark.parametrize(("paper", "name"), EVERY)
def test_every_recipe_builds_its_method_and_documents_its_command(paper, name, monkeypatch):
    module = paper_module(paper)
    monkeypatch.setattr(module, "load_teacher", lambda *_: None, raising=False)  # avoids a download
    function = recipes(module)[name]
    assert "make reproduce" in function.__doc__ or f"RECIPE={name}" in function.__doc__  # the whole command, or its difference from it
    recipe = function()
    for own in choose_arms(recipe).values():
        if own.method.get("swin") == "released":
            continue  # its blocks do not run on the meta device; test_positional_label.py builds them
        with torch.device("meta"):
            method = module.build(own, own.build_encoder(3), 10)
        if isinstance(encoder := method.encoder, ViT):
            images = torch.zeros(2, 3, recipe.image_size, recipe.image_size, device="meta")
            assert encoder.embed(images).shape == (2, encoder.grid[0] * encoder.grid[1], encoder.width)
    assert 0 < recipe.pretrain.warmup_epochs < recipe.pretrain.epochs
    for protocol in recipe.protocols:
        assert (protocol.stage is None) == (protocol.kind in ("knn", "logistic"))


def test_a_vit_with_another_depth_has_the_depth_in_its_name():
    own = Recipe(size="micro", image_size=16, patch_size=4, pretrain=TrainConfig(epochs=1, batch_size=1, base_lr=1.0), protocols=())
    deep = override(own, ["encoder.depth=12"])
    assert (len(own.build_encoder(3).blocks), len(deep.build_encoder(3).blocks)) == (6, 12)
    assert (own.backbone, deep.backbone) == ("vit_micro_patch4_16", "vit_micro_depth12_patch4_16")
    assert override(own, ["encoder.depth=6"]).backbone == own.backbone
    with pytest.raises(RecipeError, match="no option 'width'"):
        override(own, ["encoder.width=12"]).build_encoder(3)
