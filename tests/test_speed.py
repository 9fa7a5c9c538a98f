"""Tests of the speed benchmark: FLOPs, memory and attention variants."""

import pandas
import pytest
import torch

from benchmarks.speed import attention, loop, measure, steps
from benchmarks.speed.steps import Step, main, make_steps
from common.optim import make_optimizer
from common.vit import ViT
from stop.method import StoP


@pytest.fixture(scope="module")
def giga_multiply_adds() -> dict[str, float]:
    """Useful multiply-adds of one image's training step, in G, by step."""
    images = torch.zeros(1, 3, 224, 224)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "has_fast_bf16", lambda device: False)  # one precision is enough to count FLOPs
        return {step.name: step.flops(images) / 2e9 for step in make_steps(torch.device("cpu"), ["droppos", "mp3"])}


def test_useful_flops_equal_those_of_the_analytic_table(giga_multiply_adds):
    """See README of DropPos, section Cost. Here, only visible patches are embedded, and the input has no gradient."""
    assert giga_multiply_adds["timm, supervised"] == pytest.approx(52.7, rel=0.01)
    assert giga_multiply_adds["droppos, attentive"] == pytest.approx(31.8, rel=0.02)
    assert giga_multiply_adds["droppos, without attentive reconstruction"] == pytest.approx(14.3, rel=0.03)
    for eta, forward in {0.3: 16.54, 0.5: 15.85, 0.75: 14.98, 0.9: 14.44}.items():  # README of MP3, section Cost
        assert giga_multiply_adds[f"mp3, eta {eta}"] == pytest.approx(3 * forward, rel=0.01)


def test_attentive_reconstruction_costs_one_more_forward_of_the_full_image(giga_multiply_adds):
    extra = giga_multiply_adds["droppos, attentive"] - giga_multiply_adds["droppos, without attentive reconstruction"]
    assert extra == pytest.approx(17.56, rel=0.01)


def test_measuring_the_memory_of_a_step_keeps_the_target_encoder_frozen():
    encoder = ViT(image_size=224, patch_size=16, width=32, depth=1, heads=2, class_token=False)
    model = StoP(encoder, predictor_width=16, predictor_depth=1)
    step = Step("stop", "vit", model, lambda model, images: model(images).loss, "32-true")
    assert step.memory(torch.zeros(2, 3, 224, 224), make_optimizer(model, steps.STAGE)) > 0
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_the_measured_memory_of_a_step_is_that_of_its_largest_tensor():
    """Images (B, 3, 224, 224) through one layer with 1,000 outputs: its gradient is the largest tensor of a step."""

    def loss(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        return model(images[:, 0].flatten(1)).sum()

    step = Step("ours", "vit", torch.nn.Linear(224 * 224, 1000), loss, "32-true")
    images, optimizer = torch.randn(2, 3, 224, 224), torch.optim.SGD(step.model.parameters(), lr=0.1)
    step.run(images, optimizer)
    assert step.memory(images, optimizer) == pytest.approx(4 * 224 * 224 * 1000 / 1e9, rel=0.05)


def test_the_table_keeps_rows_of_other_devices_and_replaces_its_own(tmp_path, monkeypatch, capsys):
    def two_steps(device: torch.device, names: list[str], size: str | None) -> list[Step]:
        def loss(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
            return model(images[:, :, :8, :8].flatten(1)).sum()

        return [Step(name, "vit", torch.nn.Linear(192, 1), loss, "32-true") for name in ("timm, supervised", "ours")]

    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(steps, "make_steps", two_steps)
    (tmp_path / "benchmarks/speed").mkdir(parents=True)
    for device in ("a GPU", "this CPU", "this CPU"):
        monkeypatch.setattr(measure, "device_name", lambda _, name=device: name)
        monkeypatch.setattr(steps, "gemm_rate", lambda *_: 1e11)
        assert main(["--device", "cpu", "--batch", "2", "--rounds", "3", "--paper", "mp3"]) == 0
    table = pandas.read_csv(tmp_path / "benchmarks/speed/steps.csv")
    assert table["device"].tolist() == ["a GPU"] * 2 + ["this CPU"] * 2
    assert (table[table["step"] == "timm, supervised"]["ratio"] == 1).all()
    assert "this CPU" in capsys.readouterr().out


@pytest.fixture(scope="module")
def few_images() -> list[attention.Case]:
    """The cases of the attention table, with one image each, in float32."""
    cases = attention.cases(torch.device("cpu"), torch.float32)
    for case in cases:
        case.q, case.k, case.v = case.q[:1], case.k[:1], case.v[:1]
        case.window = {name: vector[:1] for name, vector in case.window.items()}
        case.context_BM = None if case.context_BM is None else case.context_BM[:1]
    return cases


def test_every_attention_variant_is_correct_and_a_wrong_one_is_detected(few_images):
    for case in few_images:
        gradient = torch.randn(case.q.shape)
        for name, (way, context) in attention.ways(case).items():
            leaves = attention._leaves(case, context)
            attention._check(name, way, leaves, case, gradient)
            with pytest.raises(RuntimeError, match=f"{case.shape}: {name} is off by"):
                attention._check(name, lambda q, k, v, way=way: way(1.01 * q, k, v), leaves, case, gradient)


def test_each_query_of_mapet_attends_to_each_position_once(few_images):
    for case in few_images[3:]:
        assert case.k.shape[2] == 344 and case.q.shape[2] in (344, 147)
        assert (attention._dense(case).sum(-1) == 197).all()


def test_queries_of_mp3_attend_to_the_context_and_the_class_token(few_images):
    for case, keys in zip(few_images, (99, 50, 33), strict=False):
        mask = attention._dense(case)
        assert (mask.sum(-1) == keys).all() and mask[..., 0].all()


def test_attend_uses_the_fastest_backend_for_each_shape():
    line = {"pass": "training", "queries": 197, "keys": 197, "width": 64}
    frame = pandas.DataFrame(
        [
            {**line, "way": "dense mask, SDPA", "milliseconds": 2.0},
            {**line, "way": "ours", "milliseconds": 1.0},
            {**line, "way": "ours", "milliseconds": 0.1, "pass": "forward"},
            {**line, "way": "context first, flash", "milliseconds": 0.5},  # attend has no such backend
            {**line, "way": "context first, SDPA", "milliseconds": 0.7, "keys": 50},
        ]
    )
    chosen = attention.choose(frame, torch.device("cpu"))
    assert [(row["windowed"], row["keys"], row["backend"]) for row in chosen] == [(True, 197, "triton"), (False, 50, "sdpa")]


def test_the_timed_loop_has_all_steps_and_the_table_its_ratios(tmp_path, monkeypatch):
    """The bare step and the loop train the same model on the same images, in one process and in two."""
    monkeypatch.setattr(loop, "ROOT", tmp_path)
    monkeypatch.setattr(loop, "CASES", {"digits": loop.CASES["digits"]})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "benchmarks/speed").mkdir(parents=True)
    assert loop.main(["--device", "cpu", "--rounds", "1", "--steps", "8"]) == 0
    (line,) = pandas.read_csv(tmp_path / "benchmarks/speed/loop.csv").to_dict("records")
    assert line["overhead %"] == pytest.approx(100 * (line["loop ms"] / line["bare ms"] - 1), abs=1)
    assert line["efficiency %"] == pytest.approx(100 * line["loop ms"] / (2 * line["all ms"]), abs=1)
