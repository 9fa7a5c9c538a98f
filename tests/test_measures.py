"""Tests of accuracy with ties, non-finite features, feature metrics, and reuse of block masks."""

import pytest
import torch

import common.attention as attention
import stop.method
from common.attention import attend
from common.evaluate import best_five
from common.heads import TokenHead
from common.run import RunError
from common.vit import ViT
from stop.method import StoP
from tests.tiny import STAGE, train


def test_equal_logits_count_only_the_first_class_as_the_prediction():
    """With equal logits, the first class is the prediction, as in argmax."""
    head = TokenHead(8, 5)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    _, right = head.loss(torch.randn(50, 8), torch.arange(50) % 5)
    assert right.item() == pytest.approx(0.2)
    assert best_five(torch.zeros(50, 10), torch.arange(50) % 10)[:, 0].float().mean() == pytest.approx(0.1)


def stop_method() -> StoP:
    torch.manual_seed(0)
    encoder = ViT(image_size=8, patch_size=2, channels=1, width=16, depth=1, heads=2, class_token=False)
    sizes = {"target_scale": (0.2, 0.3), "min_keep": 1, "predictor_width": 16, "predictor_depth": 1}
    return StoP(encoder, **sizes)


def test_non_finite_features_stop_the_training(tmp_path):
    class Spoiled(StoP):
        def at_step(self, step: int, total_steps: int) -> None:
            super().at_step(step, total_steps)
            if step == 4:
                self.encoder.norm.weight.data.fill_(float("nan"))

    method = stop_method()
    method.__class__ = Spoiled
    with pytest.raises(RunError, match="the loss is nan at step 4 of 6"):
        train(tmp_path, method, STAGE)


def test_feature_std_and_rankme_are_computed_in_logged_steps_only(tmp_path, monkeypatch):
    def count(name: str, measure):
        def counted(feature_BND):
            calls.append(name)
            return measure(feature_BND)

        return counted

    calls: list[str] = []
    monkeypatch.setattr(stop.method, "SPREAD", {name: count(name, measure) for name, measure in stop.method.SPREAD.items()})
    run, _ = train(tmp_path, stop_method(), STAGE)
    assert calls == ["feature_std", "rankme"] * 2  # two epochs of three steps, logged once each
    assert all("rankme" in line for line in run.metrics.read_text().splitlines())


def test_the_block_mask_of_a_window_is_created_once_for_all_blocks_and_steps(monkeypatch):
    made, make = [], attention.create_block_mask
    monkeypatch.setattr(attention, "create_block_mask", lambda *given, **options: made.append(1) or make(*given, **options))
    time, begin, end = torch.arange(24)[None], torch.arange(24)[None], torch.full((1, 24), 99)
    q, k, v = (torch.randn(2, 2, 24, 16) for _ in range(3))
    with torch.no_grad():
        for _ in range(3):  # each block takes slices of the same rows
            window = {"time": time[:, -16:], "visible_from": begin[:, :20], "visible_until": end[:, :20]}
            found = attend(q[:, :, -16:], k[:, :, :20], v[:, :, :20], **window, backend="flex")
        assert len(made) == 1
        torch.testing.assert_close(found, attend(q[:, :, -16:], k[:, :, :20], v[:, :, :20], **window, backend="sdpa"), atol=1e-4, rtol=1e-4)
        begin += 1  # changed in place: another window
        attend(q[:, :, -16:], k[:, :, :20], v[:, :, :20], **window, backend="flex")
        assert len(made) == 2
