"""User errors exit with 2, say how to fix them, and lose no data."""

import dataclasses
import json
import resource

import pytest
import torch
from PIL import Image

from benchmarks.reproduce import main
from common.run import Run, RunError
from tests.tiny import STAGE, Tiny, train


def refused(capsys, *arguments: str) -> str:
    """Run the command, check that it exits with 2 and no traceback, and return what it prints."""
    try:
        code = main(list(arguments))
    except SystemExit as stopped:  # from the command-line parser
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2, printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err
    return " ".join((printed.out + printed.err).replace("│", " ").split())


def test_unknown_names_are_refused_with_the_nearest_known_name(capsys, tmp_path):
    assert "PAPER='drpopos' is not known; did you mean droppos or drloc?" in refused(capsys, "drpopos")
    assert "RECIPE='digit' is not known for droppos; did you mean digits?" in refused(capsys, "droppos", "--recipe", "digit")
    assert "did you mean cifar10" in refused(capsys, "droppos", "--data", "cifar1")
    assert "did you mean sigma" in refused(capsys, "droppos", "--set", "method.sgima=1", "--out", str(tmp_path))


@pytest.mark.parametrize("epochs", ["0", "-1", "abc"])
def test_epochs_below_1_or_not_a_number_are_refused_with_their_value(capsys, epochs):
    printed = refused(capsys, "droppos", "--epochs", epochs)
    assert f"EPOCHS={epochs}" in printed or f"'{epochs}'" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["linear.label_fraction=2"], "label_fraction=2.0 makes no sense: give a fraction above 0, at most 1"),
        (["linear.label_fraction=0.005"], "fraction of 0.005 is 7 of 1437 labels, for 10 classes"),
        (["finetune_5_per_class.labels_per_class=500"], "use at most"),
        (["knn.label_list={}"], "list.txt lists images by name, but the images of this data set have no names"),
        (["knn.resize=16"], "resized to 16 pixels, but all have one size"),
        (["linear.layers=[1, 7]"], "protocol linear: layers=(1, 7), and the encoder has 6"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_training(changes, message, capsys, tmp_path):
    (tmp_path / "list.txt").write_text("0.png\n")
    words = [word for change in changes for word in ("--set", change.format(tmp_path / "list.txt"))]
    assert message in refused(capsys, "droppos", "--epochs", "1", "--out", str(tmp_path / "runs"), *words)
    assert not (tmp_path / "runs").exists()


def test_a_missing_cuda_gpu_is_reported_before_anything_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA GPU; use DEVICE=cpu" in refused(capsys, "droppos", "--device", "cuda", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_impossible_sizes_and_ratios_are_refused_with_their_values(capsys, tmp_path):
    out = ("--device", "cpu", "--out", str(tmp_path))
    assert "image size 8 x 8 is not a multiple of the patch size 3" in refused(capsys, "droppos", "--set", "patch_size=3", *out)
    assert "mask_ratio=0.99 leaves none of the 16 tokens" in refused(capsys, "droppos", "--set", "method.mask_ratio=0.99", *out)
    assert "position_mask_ratio=0 drops no position" in refused(capsys, "droppos", "--set", "method.position_mask_ratio=0", *out)
    assert "eta='half' is not a fraction between 0 and 1" in refused(capsys, "mp3", "--set", "method.eta=half", *out)
    assert "eta=1.0 leaves none of the 16 tokens" in refused(capsys, "mp3", "--set", "method.eta=1.0", *out)
    assert "eta=-0.5 is not a fraction between 0 and 1" in refused(capsys, "mp3", "--set", "method.eta=-0.5", *out)
    assert "must not receive them: build it with position=" in refused(capsys, "mp3", "--set", "encoder.position=learned", *out)
    too_large = refused(capsys, "droppos", "--set", "pretrain.batch_size=4096", *out)
    assert "1437" in too_large and "4096" in too_large


def test_an_encoder_without_a_protocol_to_evaluate_it_is_refused(capsys, tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a").mkdir(parents=True)
    for split in ("train", "val"):
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "0.png")
    printed = refused(capsys, "deit", "--data", str(tmp_path), "--encoder", str(tmp_path / "any.pth"))
    assert "the recipe imagenet_vitb16 of deit has no protocol" in printed


def test_a_data_folder_is_refused_with_what_is_wrong_with_it(capsys, tmp_path):
    assert "/nowhere/at/all" in refused(capsys, "droppos", "--data", "/nowhere/at/all")
    images = tmp_path / "images"
    images.mkdir()
    assert "lacks train/ and val/" in refused(capsys, "droppos", "--data", str(images))
    for split in ("train", "val"):
        (images / split / "full").mkdir(parents=True)
        (images / split / "empty").mkdir()
        Image.new("RGB", (8, 8)).save(images / split / "full" / "0.png")
    assert "empty" in refused(capsys, "droppos", "--data", str(images))


def test_a_corrupt_image_is_named_and_stops_the_run_without_skip_corrupt(capsys, tmp_path):
    for split in ("train", "val"):
        for label in ("a", "b"):
            directory = tmp_path / "images" / split / label
            directory.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(directory / f"{index}.png")
    broken = tmp_path / "images" / "train" / "a" / "2.png"
    broken.write_bytes(b"")
    small = [
        f"size=micro image_size=16 patch_size=4 {' '.join(f'{s}batch_size=8' for s in ('pretrain.', 'finetune.stage.', 'linear.stage.'))}"
    ]
    changes = [word for change in small[0].split() for word in ("--set", change)]
    epochs = ["--set", "finetune.stage.epochs=1", "--set", "linear.stage.epochs=1", "--epochs", "1"]
    arguments = [
        "droppos",
        "--data",
        str(tmp_path / "images"),
        "--device",
        "cpu",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "runs"),
        *changes,
        *epochs,
    ]
    assert f"{broken} cannot be read as an image" in refused(capsys, *arguments)
    assert main([*arguments, "--skip-corrupt"]) == 0


def test_a_run_directory_with_other_settings_is_refused_and_kept(tmp_path):
    train(tmp_path, Tiny())
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RunError, match="other settings .epochs: 2 there, 3 requested.*OUT="):
        train(tmp_path, Tiny(), dataclasses.replace(STAGE, epochs=3))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_truncated_checkpoint_is_named_and_not_overwritten(tmp_path):
    train(tmp_path, Tiny())
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="checkpoint.pt .1000 bytes. cannot be resumed from.*Delete it"):
        train(tmp_path, Tiny())
    assert path.stat().st_size == 1000


def test_two_runs_cannot_use_one_directory_at_once(tmp_path):
    with Run(tmp_path, {}, torch.device("cpu")):
        with pytest.raises(RunError, match="in use by another run"):
            Run(tmp_path, {}, torch.device("cpu")).__enter__()
    with Run(tmp_path, {}, torch.device("cpu")):
        pass  # the lock is released when its run ends


def test_a_non_finite_loss_reports_step_rate_and_checkpoint_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"loss is nan at step 4 of 6 .*learning rate 0\.\d+.*last good checkpoint is .*checkpoint.pt"):
        train(tmp_path, Tiny(spoiled_step=4), checkpoint_seconds=-1.0)
    run, _ = train(tmp_path, Tiny())  # resumes from step 4
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == [3, 6]
    assert "resuming from step" in (tmp_path / "log.txt").read_text()


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    train(tmp_path, Tiny(), dataclasses.replace(STAGE, epochs=1))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "recipe.json").unlink()  # so that more epochs do not count as other settings
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))  # writing past this fails as on a full disk
    try:
        with pytest.raises(RunError, match="could not be written .*the previous one is intact. Free some space"):
            train(tmp_path, Tiny(), dataclasses.replace(STAGE, epochs=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole
    assert not list(tmp_path.glob("*.partial"))
    train(tmp_path, Tiny(), dataclasses.replace(STAGE, epochs=2))
