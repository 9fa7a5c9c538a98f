"""A finished result is never reused for other images, labels or weights of the same name."""

import shutil

import numpy
import pytest
from PIL import Image

from benchmarks.reproduce import main

SMALL = "size=micro image_size=16 patch_size=4 pretrain.batch_size=8 finetune.stage.batch_size=8 linear.stage.batch_size=8"
SMALL += " finetune.stage.epochs=1 linear.stage.epochs=1"


def picture(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)).save(path)


def run(data, out, *options: str) -> int:
    words = [word for change in SMALL.split() for word in ("--set", change)]
    return main(["droppos", "--data", str(data), "--device", "cpu", "--workers", "0", "--epochs", "1", "--out", str(out), *words, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of 32 images per split with a finished run, fine-tuned with the labels of a list."""
    root = tmp_path_factory.mktemp("identity")
    for index in range(16):
        for part, offset in (("train", 0), ("val", 100)):
            for label in "ab":
                picture(root / "images" / part / label / f"{index}.png", index + offset + 50 * (label == "b"))
    (root / "list.txt").write_text("".join(f"{label}/{index}.png\n" for label in "ab" for index in range(8)))
    assert run(root / "images", root / "runs", "--set", f"finetune.label_list={root / 'list.txt'}") == 0
    return root


def grown(folder) -> str:
    picture(folder / "images" / "train" / "a" / "more.png", 1)
    return "data.train: 32 images"


def shrunk(folder) -> str:
    (folder / "images" / "val" / "a" / "3.png").unlink()
    return "data.val: 32 images"


def replaced(folder) -> str:
    picture(folder / "images" / "val" / "a" / "3.png", 999)  # noise, so the file size stays the same
    return "data.val: 32 images"


def relabelled(folder) -> str:
    (folder / "images" / "train" / "a" / "1.png").rename(folder / "images" / "train" / "b" / "new.png")
    return "data.train: 32 images"


def listed(folder) -> str:
    (folder / "list.txt").write_text("".join(f"{label}/{index}.png\n" for label in "ab" for index in range(8, 16)))
    return "label_list: list.txt"


def encoder(folder) -> str:
    file = next(folder.glob("runs/*/*/pretrain/encoder.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "pretrained: encoder.safetensors"


@pytest.mark.parametrize("change", [grown, shrunk, replaced, relabelled, listed, encoder])
def test_a_finished_run_is_not_reused_after_its_inputs_changed(change, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    options = ["--set", f"finetune.label_list={finished / 'list.txt'}"]
    if change is listed:  # the path of the list is a setting, so change it in place
        kept = (finished / "list.txt").read_text()
        differing = change(finished)
    else:
        differing = change(tmp_path)
    try:
        assert run(tmp_path / "images", tmp_path / "runs", *options) == 2
    finally:
        if change is listed:
            (finished / "list.txt").write_text(kept)
    assert differing in " ".join(capsys.readouterr().out.split())


def test_a_copy_of_the_data_in_another_folder_counts_as_the_same_data(finished, tmp_path, capsys):
    shutil.copytree(finished / "images", tmp_path / "images", copy_function=shutil.copyfile)  # with other modification times
    assert run(tmp_path / "images", finished / "runs", "--set", f"finetune.label_list={finished / 'list.txt'}") == 0
    assert "pretrain done" not in capsys.readouterr().out
