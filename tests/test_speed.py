"""What the speed table counts."""

import pandas
import pytest
import torch

from benchmarks import speed
from benchmarks.speed import Step, main, make_steps


@pytest.fixture(scope="module")
def giga_multiply_adds() -> dict[str, float]:
    """Useful multiply-adds of one image's training step, in G, by step."""
    images = torch.zeros(1, 3, 224, 224)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "has_fast_bf16", lambda device: False)  # one precision is enough to count in
        return {step.name: step.flops(images) / 2e9 for step in make_steps(torch.device("cpu"))}


def test_useful_flops_are_those_of_the_analytic_table(giga_multiply_adds):
    """README of DropPos, section Cost; here only visible patches are embedded, and the input gets no gradient."""
    assert giga_multiply_adds["timm, supervised"] == pytest.approx(52.7, rel=0.01)
    assert giga_multiply_adds["droppos, attentive"] == pytest.approx(31.8, rel=0.02)
    assert giga_multiply_adds["droppos, without attentive reconstruction"] == pytest.approx(14.3, rel=0.03)


def test_attentive_reconstruction_costs_one_forward_of_the_whole_image(giga_multiply_adds):
    extra = giga_multiply_adds["droppos, attentive"] - giga_multiply_adds["droppos, without attentive reconstruction"]
    assert extra == pytest.approx(17.56, rel=0.01)


def test_the_table_keeps_other_devices_and_replaces_its_own(tmp_path, monkeypatch, capsys):
    def steps(device: torch.device) -> list[Step]:
        def loss(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
            return model(images[:, :, :8, :8].flatten(1)).sum()

        return [Step(name, "vit", torch.nn.Linear(192, 1), loss, "32-true") for name in ("timm, supervised", "ours")]

    monkeypatch.setattr(speed, "ROOT", tmp_path)
    monkeypatch.setattr(speed, "make_steps", steps)
    (tmp_path / "benchmarks").mkdir()
    for device in ("a GPU", "this CPU", "this CPU"):
        monkeypatch.setattr(speed, "device_name", lambda _, name=device: name)
        assert main(["--device", "cpu", "--batch", "2", "--rounds", "3"]) == 0
    table = pandas.read_csv(tmp_path / "benchmarks" / "speed.csv")
    assert table["device"].tolist() == ["a GPU"] * 2 + ["this CPU"] * 2
    assert (table[table["step"] == "timm, supervised"]["ratio"] == 1).all()
    assert "this CPU" in capsys.readouterr().out
