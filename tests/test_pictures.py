"""Tests of the pictures of an encoder: what is drawn, and what is refused."""

import pytest
import torch
from PIL import Image

from benchmarks.pictures import find_images, main, panels
from common.data import DataError
from common.vit import vit


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_sums_to_one_over_all_tokens_and_maps_have_the_shape_of_the_grid(class_token):
    torch.manual_seed(0)
    encoder = vit("micro", image_size=(32, 48), patch_size=8, depth=2, class_token=class_token)
    shown = panels(encoder, torch.randn(2, 3, 32, 48))
    assert len(shown) == 5
    maps = [value for value in shown.values() if value.ndim == 3]
    assert len(maps) == 4 and all(value.shape == (2, 4, 6) for value in maps)
    for value in maps:
        total = value.sum((1, 2))
        assert (total <= 1 + 1e-5).all() and ((total < 1) if class_token else (abs(total - 1) < 1e-5)).all()
    assert list(shown.values())[-1].shape == (2, 4, 6, 3)


def test_the_attention_of_a_patch_is_drawn_at_its_own_place():
    torch.manual_seed(0)
    encoder = vit("micro", image_size=64, patch_size=8, depth=1, position="learned")
    with torch.no_grad():  # queries and keys are the position: each patch attends to itself
        encoder.pos_embed.normal_(std=3)
        weight = torch.cat([torch.eye(96) * 9, torch.eye(96) * 9, torch.eye(96)])
        encoder.blocks[0].attn.qkv.weight.copy_(weight)
    shown = panels(encoder, torch.zeros(1, 3, 64, 64))
    for row in (2, 4, 6):
        (found,) = (value for title, value in shown.items() if f"at {row}, {row}" in title)
        assert found[0].argmax() == row * 8 + row and found.max() > 0.9


def test_pictures_are_written_for_a_folder_and_wrong_input_is_named(tmp_path, capsys):
    for index in range(9):
        (tmp_path / f"class{index % 2}").mkdir(exist_ok=True)
        Image.new("RGB", (40 + index, 30), (index, 90, 200)).save(tmp_path / f"class{index % 2}" / f"{index}.png")
    assert len(find_images(tmp_path, 4)) == 4 and len(find_images(tmp_path, 40)) == 9
    given = [
        "--paper",
        "mae",
        "--recipe",
        "cifar10",
        "--set",
        "size=micro",
        "--images",
        str(tmp_path),
        "--out",
        str(tmp_path / "new" / "a.png"),
    ]
    assert main(given) == 0
    assert Image.open(tmp_path / "new" / "a.png").width > 700
    assert main([*given, "--size", "30", "32"]) == 2
    assert "30 x 32 pixels are not a multiple of the encoder's patch size 4" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match="does not exist"):
        find_images(tmp_path / "nowhere", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no image"):
        find_images(tmp_path / "empty", 1)
