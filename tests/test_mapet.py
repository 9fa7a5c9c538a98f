"""Tests of MaPeT's method: attention window, predictions, random permutations. Parity is in test_mapet_matches_the_release.py."""

import pytest
import timm
import torch
from torch import Tensor, nn

from common import attention, heads
from common.attention import Window, window_mask
from common.data import open_data
from common.heads import TokenHead
from common.masking import gather_tokens
from common.optim import make_optimizer
from common.recipe import RecipeError, TrainConfig, override
from common.vit import ViT
from mapet.method import MaPeT, visibility
from mapet.recipe import build, digits, imagenet_vitb16

PAIRS = [(197, 50), (17, 5), (17, 1), (50, 49), (37, 12)]  # number of tokens, number of context tokens


def mapet(depth: int = 3, drop_path: float = 0.0, **options) -> MaPeT:
    """A small model on 4 x 4 patches."""
    torch.manual_seed(0)
    encoder = ViT(image_size=16, patch_size=4, channels=1, width=32, depth=depth, heads=4, position="learned", drop_path=drop_path)
    return MaPeT(encoder, **({"context": 5, "vocabulary": 20, "initialise": "mae"} | options))


def inputs(images: int = 2, cells: int = 16, vocabulary: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens, orders."""
    g = torch.Generator().manual_seed(1)
    pixels, noise = torch.randn(images, 1, 16, 16, generator=g), torch.rand(images, cells, generator=g)
    return pixels, torch.randint(vocabulary, (images, cells), generator=g), noise.argsort(1)


def seen(window: Window) -> Tensor:
    """Return the window as a matrix: entry (i, j) is True if query i attends to key j."""
    return window_mask(torch.empty(1, 1, window.time.shape[1], 1), *window)[0, 0]


def dense(order: list[int], context: int) -> Tensor:
    """Attention mask from the rule in the paper. Rows: all content tokens, the placeholders, the query tokens. Columns: the content
    tokens and the placeholders. `order` lists all tokens; the first `context` are context. Our code numbers tokens by rank."""
    first, targets = order[:context], order[context:]
    columns = [("content", token) for token in order] + [("placeholder", token) for token in targets]
    rows = []
    rows += [{("content", c) for c in first} | {("placeholder", t) for t in targets} for _ in first]
    for place in range(len(targets)):  # sees itself, the tokens before it, and the positions of the later ones
        rows.append({("content", c) for c in [*first, *targets[: place + 1]]} | {("placeholder", t) for t in targets[place + 1 :]})
    rows += [{("content", c) for c in first} | {("placeholder", t) for t in targets} for _ in targets]
    for place in range(len(targets)):  # does not see itself, but its position
        rows.append({("content", c) for c in [*first, *targets[:place]]} | {("placeholder", t) for t in targets[place:]})
    return torch.tensor([[column in row for column in columns] for row in rows])


# ---- attention window


@pytest.mark.parametrize(("tokens", "context"), PAIRS)
def test_the_attention_window_follows_the_rule_of_the_paper(tokens, context):
    order = [0, *(1 + torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))).tolist()]
    whole, ours = dense(order, context), seen(visibility(tokens, context, tokens - 1, tokens - 1))
    # No token that affects the loss sees the content of the last target, so our code leaves it out.
    rows = [row for row in range(len(whole)) if row != tokens - 1]
    columns = [column for column in range(whole.shape[1]) if column != tokens - 1]
    assert torch.equal(ours, whole[rows][:, columns])
    assert not whole[[row for row in rows], tokens - 1].any()


@pytest.mark.parametrize(("tokens", "context"), PAIRS)
def test_each_token_sees_every_position_once(tokens, context):
    window = visibility(tokens, context, tokens - 1, tokens - 1)
    visible = seen(window)
    assert (visible.sum(1) == tokens - torch.cat([torch.zeros(tokens - 1), torch.zeros(2 * (tokens - context))])).all()
    content, hidden = visible[:, : tokens - 1], visible[:, tokens - 1 :]
    targets = slice(context, tokens - 1)
    assert (content[:, :context]).all()
    assert ((content[:, targets].int() + hidden[:, :-1].int()) == 1).all()
    assert hidden[:, -1].all()


def test_the_papers_worked_example():
    """Nine tokens without class token in the order 1 8 4 2 7 6 | 3 5 9: query rows by token, then the placeholders of 3, 5, 9."""
    order, targets = [1, 8, 4, 2, 7, 6, 3, 5, 9], [3, 5, 9]
    visible = seen(visibility(9, 6, 8, 8))
    column = {("content", token): index for index, token in enumerate(order[:-1])}
    column |= {("placeholder", token): 8 + index for index, token in enumerate(targets)}

    def row(index: int) -> str:
        marks = [
            "".join(str(int(visible[index, column[kind, t]])) if (kind, t) in column else "0" for t in which)
            for kind, which in (("content", range(1, 10)), ("placeholder", targets))
        ]
        return "|".join(marks)

    assert [row(11 + index) for index in range(3)] == ["110101110|111", "111101110|011", "111111110|001"]
    assert {row(index) for index in range(6)} == {"110101110|111"}
    assert [row(6), row(7)] == ["111101110|011", "111111110|001"]
    assert {row(8 + index) for index in range(3)} == {"110101110|111"}


def test_a_quarter_of_the_patches_is_context_and_the_class_token_is_never_predicted():
    with torch.device("meta"):
        recipe = imagenet_vitb16()
        model = build(recipe, recipe.build_encoder(3), 1000)
        output = model(torch.empty(2, 3, 224, 224), torch.empty(2, 196, dtype=torch.int16))
    assert output.named["features"].shape == (2, 147, 768)
    assert output.named["context"].shape == (2, 49)  # plus the class token
    assert model.time.shape == (1, 196 + 147 + 147)


def features_by_cell(model: MaPeT, images: Tensor, order: Tensor) -> Tensor:
    named = model(images, torch.zeros_like(order), order=order).named
    empty = torch.full((len(images), 16, 32), torch.nan)
    return empty.scatter(1, named["cells"][..., None].expand(-1, -1, 32), named["features"])


@pytest.mark.parametrize("limit", [None, 9])
def test_a_masked_prediction_is_that_of_a_plain_encoder_with_placeholders(limit):
    model, (images, tokens, order) = mapet(prediction="masked", target_limit=limit).eval(), inputs()
    output = model(images, tokens, order=order)
    position, hidden = model.encoder.patch_positions.expand(2, -1, -1), order[:, 4:]
    seen = model.encoder.embed(images, order[:, :4]) + gather_tokens(position, order[:, :4])
    x = torch.cat([model.encoder.first_token.expand(2, -1, -1), seen, model.placeholder + gather_tokens(position, hidden)], 1)
    for block in model.encoder.blocks:
        x = block(x)
    count = (limit or 16) - 4
    assert torch.equal(output.named["cells"], hidden[:, :count])
    torch.testing.assert_close(output.named["features"], model.encoder.norm(x)[:, 5 : 5 + count])


def test_a_prediction_depends_only_on_the_patches_before_it():
    model, (images, _, order) = mapet().eval(), inputs(images=1)
    before = features_by_cell(model, images, order)
    for place, cell in enumerate(order[0].tolist()):
        changed = images.clone()
        top, left = cell // 4 * 4, cell % 4 * 4
        changed[:, :, top : top + 4, left : left + 4] += 1.0
        moved = (features_by_cell(model, changed, order) - before)[0].abs().amax(-1) > 1e-6
        later = set(order[0, max(place + 1, 4) :].tolist())
        assert {c for c in range(16) if moved[c]} == later


def test_predictions_depend_on_all_positions():
    model, (images, _, order) = mapet().eval(), inputs(images=1)
    before, table = features_by_cell(model, images, order), model.encoder.pos_embed.detach().clone()
    for cell in range(16):
        with torch.no_grad():
            model.encoder.pos_embed.copy_(table)[0, 1 + cell] += torch.randn(32)
            moved = (features_by_cell(model, images, order) - before)[0].abs().amax(-1) > 1e-6
        assert {c for c in range(16) if moved[c]} == set(order[0, 4:].tolist())


# ---- the loss


def test_the_loss_is_the_cross_entropy_of_each_patchs_own_token():
    model, (images, tokens, order) = mapet(), inputs()
    output = model(images, tokens, order=order)
    logits, cells = model.head(output.named["features"]), output.named["cells"]
    assert torch.equal(cells, order[:, 4:])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.gather(1, cells).flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    right = (logits.argmax(-1) == tokens.gather(1, cells)).float().mean().item()
    assert output.metrics["token_top1"].item() == pytest.approx(100 * right)


def test_computing_the_logits_in_chunks_changes_neither_loss_nor_gradients(monkeypatch):
    monkeypatch.setattr("common.heads.LOGITS", 60)  # three rows at a time
    model, (images, tokens, order) = mapet(), inputs()
    model(images, tokens, order=order).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    named = model(images, tokens, order=order).named
    target = tokens.gather(1, named["cells"]).flatten()
    torch.nn.functional.cross_entropy(model.head(named["features"]).flatten(0, 1), target).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-5)
        assert parameter.grad.abs().max() > 0 or name == "encoder.cls_token", name


@pytest.mark.parametrize(("limit", "count"), [(16, 12), (8, 4), (5, 1)])
def test_a_target_limit_drops_the_last_targets_and_changes_nothing_else(limit, count):
    whole, part, (images, tokens, order) = mapet().eval(), mapet(target_limit=limit).eval(), inputs()
    part.load_state_dict(whole.state_dict())
    full, limited = (model(images, tokens, order=order).named for model in (whole, part))
    assert limited["features"].shape[1] == count
    assert torch.equal(limited["cells"], full["cells"][:, :count])
    torch.testing.assert_close(limited["features"], full["features"][:, :count], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("limit", "count"), [(147, 98), (99, 50), (None, 147)])
def test_target_limits_give_the_official_number_of_targets(limit, count):
    assert visibility(197, 50, limit or 196, limit or 196).time.shape[1] == (limit or 196) + 147 + count


# ---- random permutations


def test_permutations_are_drawn_per_image_from_the_global_generator():
    model, (images, tokens, _) = mapet(), inputs(images=8)

    def cells(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(images, tokens).named["cells"]

    assert torch.equal(cells(0), cells(0)) and not torch.equal(cells(0), cells(1))
    assert len(set(map(tuple, cells(0).tolist()))) == 8


def test_each_patch_is_a_target_equally_often():
    model, (images, tokens, _) = mapet(depth=1), inputs(images=2000)
    counts = torch.bincount(model(images, tokens).named["cells"].flatten(), minlength=16) / 2000
    assert ((counts - 12 / 16).abs() < 4 * (12 / 16 * 4 / 16 / 2000) ** 0.5).all()


def test_drop_path_drops_both_streams_of_the_same_images():
    model, (images, tokens, order) = mapet(depth=2, drop_path=1.0).train(), inputs(images=64)
    inside = {}

    def keep(module, given, made):
        inside["moved"] = (made - given[0]).abs().amax(-1) > 1e-7

    blocks = model.encoder.blocks
    blocks[0].drop_path.drop_prob = 0.5
    blocks[0].register_forward_hook(keep)
    torch.manual_seed(0)
    model(images, tokens, order=order)
    content, query = inside["moved"].split([15 + 1 + 12, 12], dim=1)
    assert content.any() and not content.all()
    assert torch.equal(content.any(1), content.all(1)) and torch.equal(query.any(1), query.all(1))
    assert torch.equal(content.any(1), query.any(1))


def test_the_last_block_computes_only_the_query_stream():
    model, (images, tokens, order) = mapet(), inputs()
    shapes = {}
    last = model.encoder.blocks[-1]
    for name, module in {"mlp.fc1": last.mlp.fc1, "norm2": last.norm2}.items():
        module.register_forward_hook(lambda _, given, made, name=name: shapes.update({name: made.shape[1]}))
    last.register_forward_hook(lambda _, given, made: shapes.update({"out": made.shape[1]}))
    model(images, tokens, order=order)
    assert shapes == {"mlp.fc1": 12, "norm2": 12, "out": 12}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_with_equal_logits_token_top1_counts_only_the_argmax(precision):
    head, token_M = TokenHead(32, 20), torch.arange(60) % 20
    nn.init.zeros_(head.weight)
    for bias, expected in ((torch.zeros(20), 5.0), (torch.tensor([0.0] * 18 + [1.0] * 2), 5.0), (torch.full((20,), torch.nan), 5.0)):
        with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            head.bias.copy_(bias)
            assert 100 * head.loss(torch.randn(60, 32), token_M)[1].item() == pytest.approx(expected)


@pytest.mark.parametrize("logits", [1, 64, 2**22])
def test_token_top1_equals_the_accuracy_of_argmax_when_logits_are_tied(monkeypatch, logits):
    monkeypatch.setattr(heads, "LOGITS", logits)  # logits per chunk
    head, x_MD = TokenHead(8, 6), torch.randint(-1, 2, (400, 8)).float()
    token_M = torch.randint(6, (400,))
    with torch.no_grad():
        head.weight.copy_(torch.randint(-1, 2, (6, 8)))
        head.bias.zero_()
        logit_MV = head(x_MD)
        assert ((logit_MV == logit_MV.amax(1, keepdim=True)).sum(1) > 1).float().mean() > 0.2
        assert head.loss(x_MD, token_M)[1] == (logit_MV.argmax(1) == token_M).float().mean()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_makes_each_block_mask_once_for_all_blocks_and_steps(monkeypatch):
    model, made, make = mapet(depth=4).eval(), [], attention.create_block_mask
    monkeypatch.setattr(
        attention, "create_block_mask", lambda *arguments, **options: (made.append(arguments[1:]), make(*arguments, **options))[1]
    )
    monkeypatch.setattr(attention, "_measured_choice", lambda *arguments: "flex")
    images, tokens, order = inputs()
    with torch.no_grad():
        found = [model(images, tokens, order=order).loss for _ in range(3)]
        assert made == [(2, None, 40, 28), (2, None, 12, 28)]  # all blocks but the last; the last computes only the queries
        monkeypatch.undo()
        torch.testing.assert_close(found, 3 * [model(images, tokens, order=order).loss])


# ---- the exported encoder and the optimizer


def test_the_content_stream_with_everything_visible_is_the_exported_encoder():
    encoder, (images, _, _) = mapet().eval().encoder, inputs()
    class_B1D = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    x_BTD = torch.cat([class_B1D, encoder.embed(images) + encoder.patch_positions], dim=1)
    window = visibility(17, context=17, last=17, content=17)
    assert seen(window).all() and seen(window).shape == (17, 17)
    for block in encoder.blocks:
        x_BTD = block(x_BTD, keys=17, window=window)
    assert torch.equal(encoder.norm(x_BTD), encoder(images))


def test_placeholders_hidden_from_all_tokens_do_not_change_the_content_stream():
    model, (images, _, _) = mapet().eval(), inputs()
    encoder = model.encoder
    class_B1D = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    patch_BND, hidden_BND = encoder.embed(images) + encoder.patch_positions, (model.placeholder + encoder.patch_positions).expand(2, -1, -1)
    x_BTD = torch.cat([class_B1D, patch_BND, hidden_BND], dim=1)
    visible_until = torch.tensor([[1] * 17 + [0] * 16])
    for block in encoder.blocks:
        x_BTD = block(x_BTD, window=Window(torch.zeros_like(visible_until), torch.zeros_like(visible_until), visible_until))
    torch.testing.assert_close(encoder.norm(x_BTD)[:, :17], encoder(images), atol=2e-6, rtol=0)


def test_timm_loads_the_exported_encoder_with_every_key():
    encoder = build(recipe := digits(), recipe.build_encoder(1), 10).encoder
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 0}
    other = timm.create_model("vit_tiny_patch16_224", **shape, init_values=recipe.encoder.get("layer_scale"))
    other.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(other.eval().forward_features(images), encoder.eval()(images), atol=1e-5, rtol=0)


def test_weight_decay_skips_positions_and_class_token_but_not_the_placeholder():
    model = mapet()
    groups = make_optimizer(model, TrainConfig(epochs=1, batch_size=1, base_lr=1e-3, weight_decay=0.05)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "placeholder" in names and "head.weight" in names
    assert not names & {"encoder.pos_embed", "encoder.cls_token", "head.bias"}


def test_weights_are_initialised_as_in_the_official_code():
    torch.manual_seed(0)
    encoder = ViT(image_size=64, patch_size=16, width=192, depth=2, heads=3, position="learned", layer_scale=0.1)
    model = MaPeT(encoder, context=5, vocabulary=512)
    for name, std in {"blocks.0.attn.qkv.weight": 0.02, "pos_embed": 0.02, "patch_embed.proj.weight": (1 / 3 / 768) ** 0.5}.items():
        assert encoder.get_parameter(name).std().item() == pytest.approx(std, rel=0.05)
    assert encoder.patch_embed.proj.bias.abs().max() > 0 and not model.head.bias.any()
    assert encoder.cls_token.abs().max() < 1e-5
    assert model.placeholder.std().item() == pytest.approx(0.02, rel=0.2)
    assert (encoder.blocks[0].ls1.gamma == 0.1).all()


# ---- options and bad input


def test_options_reach_the_model():
    changes = ["method.context=3", "method.target_limit=9", "method.vocabulary=50", "encoder.layer_scale=0.3"]
    recipe = override(digits(), changes)
    model = build(recipe, recipe.build_encoder(1), 10)
    assert (model.context, model.last, model.head.out_features) == (3, 9, 50)
    assert model.encoder.blocks[0].ls1.gamma.unique().item() == pytest.approx(0.3)
    with pytest.raises(RecipeError, match="least_number"):
        build(override(digits(), ["method.least_number=3"]), digits().build_encoder(1), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 17}, "context=17 .* use 1 to 16"),
        ({"context": 0}, "context=0"),
        ({"target_limit": 4}, "target_limit=4 .* use 5 .* to 16"),
        ({"target_limit": 17}, "target_limit=17"),
        ({"vocabulary": 1}, "vocabulary=1"),
        ({"prediction": "causal"}, "prediction='causal' is not known"),
        ({"initialise": "xavier"}, "initialise='xavier' is not known"),
    ],
)
def test_impossible_settings_are_refused_with_the_allowed_range(options, message):
    with pytest.raises(ValueError, match=message):
        mapet(**options)


@pytest.mark.parametrize("options", [{"class_token": False}, {"position": "none"}, {"position": "relative"}])
def test_an_encoder_without_class_token_or_positions_is_refused(options):
    with pytest.raises(ValueError, match="class_token and positions"):
        MaPeT(ViT(image_size=16, patch_size=4, width=32, depth=1, heads=4, **options))


def test_tokens_of_another_grid_are_refused_with_both_shapes():
    model, (images, _, _) = mapet(), inputs()
    with pytest.raises(ValueError, match=r"16 patches: give targets \(2, 16\), got targets \(2, 9\)"):
        model(images, torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got targets \(2,\)"):
        model(images, open_data("digits").val.labels[:2])
    with pytest.raises(ValueError, match="got none"):
        model(images)
