"""Tests of MP3: equality with tests/golden/mp3.json, and the properties of the method.

No official code exists. The golden values come from the attention of an unofficial fork, with one context for all layers, the
class token always a key, and a correct cross-entropy. A test below shows that the fork's own loss differs.

Shapes: B images, N cells, M context patches, T tokens (class token first), D width.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import common.vit
from common.attention import attend
from common.convert import load_method, rename
from common.masking import gather_tokens, permutation_ranks
from common.vit import ViT, patchify, vit
from mp3.method import MP3, OFFICIAL_NAMES, UNUSED_NAMES
from tests import parity
from tests.test_vit import redraw

B, N, M, T, D = 5, 16, 8, 17, 32  # M at eta .5
SHAPE = {"image_size": 16, "patch_size": 4, "width": D, "depth": 3, "heads": 2}
TIMM_SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": 3, "num_heads": 2, "num_classes": 0}
ETAS = (0.3, 0.5, 0.75, 0.9)  # Table 2's


def build(eta: float = 0.5, **encoder) -> MP3:
    return redraw(MP3(ViT(**SHAPE, **{"position": "none", **encoder}), eta=eta))


def draw(seed: int = 0) -> dict[str, Tensor]:
    """Images, and the noise that decides what is context."""
    g = torch.Generator().manual_seed(seed)
    return {"images": torch.randn(B, 3, 16, 16, generator=g), "noise": torch.rand(B, N, generator=g)}


def raster(x_BND: Tensor, cell_BN: Tensor) -> Tensor:
    """Return the output for each token in row-major order of the patches."""
    return gather_tokens(x_BND, permutation_ranks(cell_BN))


def context_of(noise_BN: Tensor, size: int = M) -> Tensor:
    """Whether each patch is context, (B, N), without sorting: fewer than `size` others have lower noise."""
    return (noise_BN[:, None, :] < noise_BN[:, :, None]).sum(-1) < size


def cross_entropy(logit_BNN: Tensor) -> Tensor:
    """Cross-entropy of logits in row-major order; the target of each token is its own position."""
    return F.cross_entropy(logit_BNN.flatten(0, 1), torch.arange(logit_BNN.shape[1]).repeat(len(logit_BNN)))


class FixedLogits(nn.Module):
    """Replaces the head: returns the given logits (B, N, N) for any input, and stores the input."""

    def __init__(self, logit_BNN: Tensor):
        super().__init__()
        self.logit_BNN = logit_BNN

    def forward(self, x_BND: Tensor) -> Tensor:
        self.shown = x_BND
        return self.logit_BNN


def additive(q: Tensor, k: Tensor, v: Tensor, key_BT: Tensor) -> Tensor:
    """Softmax attention with minus infinity added to the columns of tokens that are not keys."""
    hidden_B11T = torch.zeros(key_BT.shape).masked_fill(~key_BT, -math.inf)[:, None, None]
    return (q @ k.mT / math.sqrt(q.shape[-1]) + hidden_B11T).softmax(-1) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor, key_BT: Tensor) -> Tensor:
    """The same with an attention window: tokens that are not keys are never visible."""
    return attend(q, k, v, visible_until=torch.where(key_BT, key_BT.shape[1], 0))


def by_masking(model: MP3, images: Tensor, context_BN: Tensor, attention=additive, class_is_key: bool = True) -> Tensor:
    """Logits (B, N, N) in row-major order; computes keys and values of all tokens, and masks those outside the context."""
    encoder, heads = model.encoder, model.encoder.blocks[0].attn.heads
    x, key_BT = encoder.embed(images), context_BN
    if encoder.prefix_tokens:
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], 1)
        key_BT = torch.cat([torch.full((len(x), 1), class_is_key), key_BT], 1)
    for block in encoder.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + block.attn.proj(attention(q, k, v, key_BT).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.head(encoder.norm(x)[:, encoder.prefix_tokens :])


# ---- the golden values

GOLDEN = parity.golden("mp3")
CONFIG = GOLDEN.pop("config")
# Not in the golden file: values without the class token as a key; the fork's own loss.
WITHOUT_CLASS_TOKEN = {"eta0.0": (2.7987297, 205.562702), "eta0.5": (2.8002310, 200.904728), "eta0.75": (2.8075278, 200.386709)}
FORK_LOSS = {"eta0.0": 2.7710207, "eta0.5": 2.7710936, "eta0.75": 2.7714407}


def build_golden(name: str) -> MP3:
    shape = {"image_size": CONFIG["img"], "patch_size": CONFIG["patch"], "width": CONFIG["dim"]}
    encoder = ViT(**shape, depth=CONFIG["depth"], heads=CONFIG["heads"], position="none")
    model = MP3(encoder, eta=float(name.removeprefix("eta")))
    official = rename(model.state_dict(), {ours: official for official, ours in OFFICIAL_NAMES.items()})
    # The fork has a position embedding that it never uses; it is one of the sorted names.
    official["pos_embed"] = torch.zeros(1, T, CONFIG["dim"])
    load_method(model, parity.weights(official, untouched=()), OFFICIAL_NAMES, UNUSED_NAMES)
    return model.eval()


def golden_inputs() -> dict[str, Tensor]:
    return {
        "images": parity.images(CONFIG["batch"], 3, CONFIG["img"], CONFIG["img"]),
        "noise": parity.noise(CONFIG["batch"], N, s=CONFIG["noise_s"]),
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_loss_accuracy_and_logits_equal_the_golden_values(name):
    case, output = GOLDEN[name], build_golden(name)(**golden_inputs())
    logits = raster(output.named["logits"], output.named["cells"])
    assert output.loss.item() == pytest.approx(case["ce"], abs=1e-5)
    assert output.metrics["position_top1"].item() == pytest.approx(100 * case["acc"], abs=1e-4)
    assert logits.double().abs().sum().item() == pytest.approx(case["abs_sum"], abs=1e-3)
    assert logits[0, 0, :4].tolist() == pytest.approx(case["first"], abs=1e-5)
    assert output.named["cells"][0, :8].tolist() == [9, 3, 14, 12, 15, 2, 6, 8]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_masking_reference_equals_the_golden_values_with_or_without_class_key(name):
    model, inputs = build_golden(name), golden_inputs()
    context = context_of(inputs["noise"], model.context)
    for class_is_key, (loss, total) in ((True, (GOLDEN[name]["ce"], GOLDEN[name]["abs_sum"])), (False, WITHOUT_CLASS_TOKEN[name])):
        logits = by_masking(model, inputs["images"], context, class_is_key=class_is_key)
        assert cross_entropy(logits).item() == pytest.approx(loss, abs=1e-5)
        assert logits.double().abs().sum().item() == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_forks_double_softmax_over_the_wrong_axis_is_another_loss(name):
    named = build_golden(name)(**golden_inputs()).named
    logits = raster(named["logits"], named["cells"])
    fork = F.cross_entropy(logits.softmax(-1), torch.arange(N).expand(len(logits), -1))
    assert fork.item() == pytest.approx(FORK_LOSS[name], abs=1e-5) and abs(fork.item() - GOLDEN[name]["ce"]) > 0.05


def test_exchanging_tokens_and_positions_in_the_golden_logits_changes_the_loss():
    output = build_golden("eta0.5")(**golden_inputs())
    logits = raster(output.named["logits"], output.named["cells"])
    assert output.loss.item() == pytest.approx(2.8411942, abs=1e-5)
    assert cross_entropy(logits.mT).item() == pytest.approx(2.7877643, abs=1e-5)


def test_the_official_names_and_parameter_count_are_those_of_the_fork():
    with torch.device("meta"):
        method = MP3(vit("small", image_size=32, patch_size=4, position="none"), eta=0.5)
        official = rename(method.state_dict(), {ours: official for official, ours in OFFICIAL_NAMES.items()})
        official["pos_embed"] = torch.zeros(1, 65, 384)
    assert round(sum(tensor.numel() for tensor in official.values()) / 1e6, 2) == 21.36
    shapes = {"cls_token": (1, 1, 384), "patch_embed.proj.weight": (384, 3, 4, 4), "blocks.11.attn.qkv.weight": (1152, 384)}
    shapes |= {"norm.bias": (384,), "head.weight": (64, 384), "head.bias": (64,)}
    assert {name: tuple(official[name].shape) for name in shapes} == shapes


# ---- 1. without masking, the model is a ViT


def test_at_eta_0_the_model_equals_a_vit_without_positions():
    model, inputs = build(eta=0), draw()
    named = model(**inputs).named
    expected = model.encoder(inputs["images"])
    assert model.context == N
    torch.testing.assert_close(named["encoded"][:, :1], expected[:, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(raster(named["encoded"][:, 1:], named["cells"]), expected[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["zeroed", "none"])
def test_at_eta_0_the_model_equals_timms_vit_with_zero_positions(position):
    model, inputs = build(eta=0), draw()
    theirs = VisionTransformer(**TIMM_SHAPE, pos_embed="learn" if position == "zeroed" else "none").eval()
    zeroed = {"pos_embed": torch.zeros(1, T, D)} if position == "zeroed" else {}
    theirs.load_state_dict(model.encoder.state_dict() | zeroed)
    named = model(**inputs).named
    encoded = torch.cat([named["encoded"][:, :1], raster(named["encoded"][:, 1:], named["cells"])], 1)
    torch.testing.assert_close(encoded, theirs.forward_features(inputs["images"]), atol=1e-5, rtol=0)


# ---- 2. tokens attend only to the context


@pytest.mark.parametrize("eta", ETAS)
def test_pixels_outside_the_context_change_neither_context_nor_class_token(eta):
    model, inputs = build(eta), draw()
    outside = ~context_of(inputs["noise"], model.context)
    pixels = outside.view(B, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = model(**inputs).named["encoded"]
    after = model(**inputs | {"images": torch.where(pixels, 9.0, inputs["images"])}).named["encoded"]
    seen = 1 + model.context
    torch.testing.assert_close(after[:, :seen], before[:, :seen], atol=1e-6, rtol=0)
    assert ((after - before)[:, seen:].abs().amax(-1) > 1e-2).all()


def test_a_patch_outside_the_context_changes_only_its_own_token():
    model, inputs = build(), draw()
    before = model(**inputs).named
    last = torch.arange(N) == before["cells"][:, -1:]
    pixels = last.view(B, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    after = model(**inputs | {"images": torch.where(pixels, 9.0, inputs["images"])}).named["encoded"]
    torch.testing.assert_close(after[:, :-1], before["encoded"][:, :-1], atol=1e-6, rtol=0)
    assert ((after - before["encoded"])[:, -1].abs().amax(-1) > 1e-2).all()


def test_a_patch_of_the_context_changes_every_token():
    model, inputs = build(), draw()
    before = model(**inputs).named
    first = torch.arange(N) == before["cells"][:, :1]
    pixels = first.view(B, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    after = model(**inputs | {"images": torch.where(pixels, 9.0, inputs["images"])}).named["encoded"]
    assert ((after - before["encoded"]).abs().amax(-1) > 1e-3).all()


# ---- 3. predictions depend only on content


def test_permuting_the_patches_and_the_context_permutes_the_tokens():
    model, inputs = build(), draw()
    permutation = torch.randperm(N, generator=torch.Generator().manual_seed(7))  # the new cell j holds the old patch permutation[j]
    patches = patchify(inputs["images"], 4)[:, permutation]
    moved = patches.view(B, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, 16, 16)
    # The same context in another order: new noise that is still lowest in the context.
    again = draw(seed=1)["noise"] / 2 + (~context_of(inputs["noise"])) / 2
    plain, permuted = model(**inputs).named, model(moved, noise=again[:, permutation]).named
    assert not torch.equal(permutation[permuted["cells"]], plain["cells"])
    torch.testing.assert_close(permuted["encoded"][:, 0], plain["encoded"][:, 0], atol=1e-5, rtol=0)
    for name, first in (("logits", 0), ("encoded", 1)):
        old = raster(plain[name][:, first:], plain["cells"])
        new = raster(permuted[name][:, first:], permuted["cells"])
        assert (old - new).abs().max() > 1e-2  # the permutation does something
        torch.testing.assert_close(new, old[:, permutation], atol=1e-5, rtol=0)


# ---- 4. context keys equal masked attention


@pytest.mark.parametrize("attention", [additive, windowed])
@pytest.mark.parametrize(("eta", "class_token"), [(0, True), *((eta, True) for eta in ETAS), (0.5, False)])
def test_context_keys_equal_masked_attention_in_logits_loss_and_gradients(attention, eta, class_token):
    model, inputs = build(eta, class_token=class_token), draw()
    output = model(**inputs)
    output.loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = by_masking(model, inputs["images"], context_of(inputs["noise"], model.context), attention)
    torch.testing.assert_close(raster(output.named["logits"], output.named["cells"]), logits, atol=1e-5, rtol=0)
    loss = cross_entropy(logits)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, found[name], atol=1e-6, rtol=1e-4, msg=name)


# ---- 5. the context


def uniformity_p_value(context_SM: Tensor) -> float:
    """p-value of the hypothesis that all N patches are equally likely among the M context patches, from S draws."""
    draws, size = context_SM.shape
    fraction = size / N
    counts = torch.bincount(context_SM.flatten(), minlength=N).double()
    # The patches of a draw are distinct, so the counts have correlation -1 / (N - 1).
    statistic = (counts - draws * fraction).square().sum() / (draws * fraction * (1 - fraction)) * (N - 1) / N
    return float(chi2.sf(statistic.item(), N - 1))


@pytest.mark.parametrize("eta", [0.3, 0.75])
def test_the_context_is_a_uniform_sample_without_replacement(eta):
    torch.manual_seed(0)
    model = MP3(ViT(image_size=4, patch_size=1, channels=1, width=4, depth=1, heads=1, position="none"), eta=eta)
    with torch.no_grad():
        cells = torch.cat([model(torch.zeros(25_000, 1, 4, 4)).named["cells"] for _ in range(4)])
    assert torch.equal(cells.sort(1).values, torch.arange(N).expand(100_000, -1))
    assert uniformity_p_value(cells[:, : model.context]) > 1e-3
    # The fork indexes a permutation by itself; this number of draws detects that.
    assert uniformity_p_value(cells.gather(1, cells[:, : model.context])) < 1e-6


class Draws(TorchDispatchMode):
    """Counts random operations while active, except attention, which is random only with dropout."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name()
        return func(*args, **(kwargs or {}))


def test_each_forward_draws_one_context_per_image_for_all_layers(monkeypatch):
    model, (images, noise) = build(), draw().values()
    keys = []
    monkeypatch.setattr(common.vit, "attend", lambda q, k, v, **_: keys.append(k) or attend(q, k, v))
    with Draws() as draws:
        first = model(images).named["cells"]
    assert draws.count == 1 and len(keys) == len(model.encoder.blocks)
    second = model(images).named["cells"]
    contexts = {tuple(sorted(context)) for context in torch.cat([first, second])[:, :M].tolist()}
    assert len(contexts) == 2 * B  # of 12,870 possible ones
    with Draws() as draws:
        model(images, noise=noise)
    assert draws.count == 0


def test_the_context_is_the_patches_with_the_lowest_noise_in_ascending_order():
    inputs = draw()
    cells = build()(**inputs).named["cells"]
    assert torch.equal(cells, inputs["noise"].sort(1).indices)
    assert torch.equal(torch.zeros(B, N, dtype=torch.bool).scatter(1, cells[:, :M], True), context_of(inputs["noise"]))


# ---- 6. no position input; every patch is in the loss


def test_the_model_has_no_position_parameters():
    assert not [name for name in build().state_dict() if "pos" in name]


@pytest.mark.parametrize("eta", [0, 0.5, 0.9])
def test_every_weight_gets_a_gradient_in_float32_and_in_bf16(eta):
    gradients = {}
    for precision, enabled in (("float32", False), ("bf16", True)):
        model = build(eta)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**draw())
        assert output.loss.dtype == torch.float32
        output.loss.backward()
        gradients[precision] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["float32"].items():
        assert gradient is not None and (gradient != 0).any(), name
        assert F.cosine_similarity(gradient.flatten(), gradients["bf16"][name].flatten(), dim=0) > 0.98, name


def test_the_loss_is_the_mean_over_all_patches_without_the_class_token():
    model, inputs = build(), draw()
    logits = torch.randn(B, N, N, generator=torch.Generator().manual_seed(3)).requires_grad_()
    model.head = FixedLogits(logits)
    output = model(**inputs)
    output.loss.backward()
    cells = output.named["cells"]
    assert torch.equal(model.head.shown, output.named["encoded"][:, 1:])
    expected = -logits.double().log_softmax(-1).gather(2, cells[..., None]).sum() / (B * N)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - F.one_hot(cells, N)).detach() / (B * N), atol=1e-7, rtol=1e-5)


def test_uniform_logits_give_the_loss_log_n():
    model = build()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert model(**draw()).loss.item() == pytest.approx(math.log(N), abs=1e-6)


@pytest.mark.parametrize("size", ["micro", "small"])
def test_the_initial_loss_exceeds_log_n_by_half_the_variance_of_the_logits(size):
    torch.manual_seed(0)
    model = MP3(vit(size, position="none"), eta=0.75)
    width = model.encoder.width
    with torch.no_grad():  # Xavier-uniform weights on normed features: logits of variance 2 width / (width + 196)
        assert model(torch.randn(8, 3, 224, 224)).loss.item() == pytest.approx(math.log(196) + width / (width + 196), abs=0.3)


# ---- 7. perfect predictions


def test_perfect_logits_give_zero_loss_and_full_accuracy():
    model, inputs = build(), draw()
    cells = model(**inputs).named["cells"]
    model.head = FixedLogits(30 * F.one_hot(cells, N).float())
    output = model(**inputs)
    assert output.loss.item() < 1e-6 and output.metrics["position_top1"].item() == 100
    # With the fork's second softmax, a perfect prediction has the loss ln(1 + 63 / e); chance is ln 64.
    certain = F.one_hot(torch.arange(64), 64).float()
    assert F.cross_entropy(certain, torch.arange(64)).item() == pytest.approx(3.18538, abs=1e-5)


def test_position_top1_is_the_accuracy_over_all_patches():
    model, inputs = build(), draw()
    cells = model(**inputs).named["cells"]
    right = F.one_hot(cells, N).float()
    for mask, expected in (
        (torch.ones(B, N, dtype=torch.bool), 100),
        (torch.zeros(B, N, dtype=torch.bool), 0),
        ((torch.arange(N) < M).expand(B, -1), 50),  # the context alone
        ((torch.arange(B) < 2)[:, None].expand(-1, N), 40),
    ):
        model.head = FixedLogits(torch.where(mask[..., None], right, right.roll(1, -1)))
        output = model(**inputs)
        assert output.metrics["position_top1"].item() == pytest.approx(expected)
        assert torch.equal(output.named["predicted"] == cells, mask)


# ---- 8. eta changes only the number of keys


def test_eta_changes_no_weight():
    states = [build(eta).state_dict() for eta in (0, *ETAS)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


@pytest.mark.parametrize(("eta", "context"), [(0, 16), (0.3, 11), (0.5, 8), (0.75, 4), (0.9, 1)])
def test_in_every_layer_all_tokens_attend_to_the_class_token_and_the_context(eta, context, monkeypatch):
    model, shapes = build(eta), []
    monkeypatch.setattr(common.vit, "attend", lambda q, k, v, **_: shapes.append((q.shape[2], k.shape[2], v.shape[2])) or attend(q, k, v))
    model(**draw())
    assert model.context == context and shapes == [(T, 1 + context, 1 + context)] * 3


@pytest.mark.parametrize(
    ("size", "eta", "giga", "reference"),
    [
        ("base", 0, 17.59, 17.59),
        ("base", 0.3, 16.54, 16.54),
        ("base", 0.5, 15.85, 15.83),
        ("base", 0.75, 14.98, 14.96),
        ("base", 0.9, 14.44, 14.44),
        ("large", 0, 61.59, 61.59),
        ("large", 0.3, 58.05, 58.05),
        ("large", 0.5, 55.71, 55.65),
        ("large", 0.75, 52.77, 52.71),
        ("large", 0.9, 50.97, 50.97),
    ],
)
def test_multiply_adds_of_a_forward_match_the_expected_costs(size, eta, giga, reference):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = MP3(vit(size, position="none"), eta=eta)
        model(torch.zeros(1, 3, 224, 224))
    found = counter.get_total_flops() / 2e9
    assert found == pytest.approx(giga, abs=0.005)
    # The expected costs round 197 (1 - eta) keys, class token included; the model has 1 + int(196 (1 - eta)): at most one more.
    width, depth = model.encoder.width, len(model.encoder.blocks)
    one_key = depth * (2 * width**2 + 2 * 197 * width) / 1e9
    assert found - reference == pytest.approx((1 + model.context - round(197 * (1 - eta))) * one_key, abs=0.006)


# ---- refused settings


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_an_eta_outside_0_to_1_is_refused_by_value(eta):
    with pytest.raises(ValueError, match=f"^eta={eta} "):
        build(eta)


@pytest.mark.parametrize("eta", [1.0, 0.95])
def test_an_eta_that_leaves_no_context_is_refused_by_value(eta):
    with pytest.raises(ValueError, match=f"^eta={eta} leaves none of the 16"):
        build(eta)


@pytest.mark.parametrize("position", ["sincos", "learned", "relative"])
def test_an_encoder_with_positions_is_refused(position):
    with pytest.raises(ValueError, match="must not receive them: build it with position='none'"):
        build(position=position)


def test_images_of_another_size_are_refused_by_their_size():
    with pytest.raises(ValueError, match=r"\(3, 16, 16\), got \(3, 16, 20\)"):
        build()(torch.zeros(B, 3, 16, 20))
