"""Tests of --cache: the copy of a folder with smaller images, how it is made, and the runs that read it."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from benchmarks.reproduce import Options, main, plan
from benchmarks.slurm.tasks import groups
from common.data import Augmentation, Data, DataError, Loader, SmallCopy, copies, open_data
from common.recipe import RecipeError
from common.train import make_fabric

ROOT = Path(__file__).parents[1]
SMALL = "size=micro image_size=64 patch_size=32 pretrain.batch_size=8 finetune.stage.batch_size=8 linear.stage.batch_size=8"
SMALL += " finetune.stage.epochs=1 linear.stage.epochs=1"


def draw(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, f"{path.parent.name}/{path.name}"))
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with four training and two validation images each: wide and high ones, a small one, and one in a folder below."""
    home = tmp_path / "photos"
    for part, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            for i in range(count):
                draw(home / part / name / f"{i}.{'jpg' if i % 2 else 'png'}", (200 - 30 * i, 120 + 40 * i))
    draw(home / "train" / "bee" / "0.png", (60, 90))
    draw(home / "train" / "ant" / "ant" / "9.png", (150, 100))
    return home


def copied(folder: Path, root: Path, side: int = 80, workers: int = 0, **options) -> SmallCopy:
    copy = SmallCopy(open_data(str(folder), **options), side, root)
    copy.make(workers)
    return copy


def names(data: Data) -> list[str]:
    return [path.removeprefix(str(Path(split.paths.root).parent)) for split in (data.train, data.val) for path in split.paths]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_has_the_same_names_order_and_labels_and_the_wanted_short_side(workers, folder, tmp_path):
    copy = copied(folder, tmp_path / "data", workers=workers)
    source, data = copy.source, copy.data
    assert data.name == "photos-short80" and copy.folder.parent == tmp_path / "data" / "cache"
    assert copy.folder.name.startswith("photos-short80-") and len(copy.folder.name.rpartition("-")[2]) == 12
    assert names(data) == names(source) and torch.equal(data.train.labels, source.train.labels)
    assert data.train.class_names == source.train.class_names and (data.mean, data.image_size) == (source.mean, None)
    for ours, theirs in zip([*data.train.paths, *data.val.paths], [*source.train.paths, *source.val.paths], strict=True):
        original, small = Image.open(theirs).convert("RGB"), Image.open(ours)
        if min(original.size) <= 80:
            assert Path(ours).read_bytes() == Path(theirs).read_bytes()
            continue
        assert min(small.size) == 80 and small.format == "JPEG"
        size = tuple(int(80 * pixels / min(original.size)) for pixels in original.size)
        expected = numpy.asarray(original.resize(size, Image.Resampling.BICUBIC).convert("L")).astype(int)
        assert abs(numpy.asarray(small.convert("L")).astype(int) - expected).mean() < 3  # JPEG, quality 95
    assert open_data(str(copy.folder)).train.paths == data.train.paths  # it is a folder like any other


def test_a_complete_copy_is_not_made_again_and_an_unfinished_one_is_completed(folder, tmp_path, monkeypatch):
    copy = copied(folder, tmp_path)
    files = sorted(path for path in copy.folder.rglob("*") if path.is_file())
    assert len(files) == 14 and not [path for path in files if path.suffix == ".partial"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    monkeypatch.setattr(copies, "make_workers", None)
    copy.make(0)
    monkeypatch.undo()
    lost, empty = copy.folder / "train/bee/1.jpg", copy.folder / "val/ant/0.png"
    lost.unlink()
    empty.write_bytes(b"")  # as after a power failure
    (copy.folder / "complete.json").unlink()
    copy.make(0)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert {path for path in files if after[path][0] != before[path][0]} == {lost, empty, copy.folder / "complete.json"}
    assert after[lost][1] == before[lost][1] and after[empty][1] == before[empty][1]


def test_other_images_under_the_same_name_get_another_copy(folder, tmp_path):
    first = copied(folder, tmp_path)
    draw(folder / "train" / "ant" / "1.jpg", (300, 200))
    second = copied(folder, tmp_path)
    assert first.folder != second.folder and first.data.identity["train"] != second.data.identity["train"]
    assert copied(folder, tmp_path, side=90).folder not in (first.folder, second.folder)


def test_the_identity_of_a_copy_is_known_before_it_is_made_and_is_not_that_of_its_source(folder, tmp_path):
    copy = SmallCopy(open_data(str(folder)), 80, tmp_path)
    before = copy.data.identity
    copy.make(0)
    again = SmallCopy(open_data(str(folder)), 80, tmp_path / "elsewhere").data
    assert before == copy.data.identity == again.identity != copy.source.identity
    assert copy.data.identity != SmallCopy(open_data(str(folder)), 90, tmp_path).data.identity


def test_an_image_that_cannot_be_read_is_named_or_with_skip_corrupt_replaced_later(folder, tmp_path):
    (folder / "train/ant/2.png").write_bytes(b"no image")
    for workers in (0, 1):
        message = ""
        try:  # pytest.raises would keep the traceback and with it the worker, which then takes five seconds to stop
            copied(folder, tmp_path, workers=workers)
        except DataError as error:
            message = str(error)
        assert message.startswith(f"{folder}/train/ant/2.png cannot be read as an image")
    copy = copied(folder, tmp_path, skip_corrupt=True)
    settings = {"image_size": (64, 64), "batch_size": 9, "seed": 0, "device": torch.device("cpu"), "workers": 0, "augmentation": None}
    seen = [next(Loader(data.train, data=data, **settings).epoch(0)) for data in (copy.source, copy.data)]
    assert torch.equal(seen[0][1], seen[1][1]) and torch.equal(seen[1][0][2], seen[1][0][3])


def test_a_full_disk_is_an_error_with_the_file_and_leaves_no_part_of_it(folder, tmp_path, monkeypatch):
    def full(self, target, *_, **__):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match=r"\S+ cannot be written \(No space left on device\): make room, or use another --data-root"):
        copied(folder, tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_images_in_memory_have_no_copy():
    with pytest.raises(DataError, match="the images of digits are in memory and not in files, .*leave out --cache"):
        SmallCopy(open_data("digits"), 256, Path("data"))


def test_mini_imagenets_copy_follows_its_own_split(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.sets.MINI_CLASSES", 2)
    monkeypatch.setattr("common.data.sets.MINI_IMAGES", 6)
    monkeypatch.setattr("common.data.sets.MINI_TRAIN", 4)
    for name in ("n01", "n02"):
        for i in range(6):
            draw(tmp_path / "mini-imagenet" / name / f"{i}.jpg", (120, 100))
    copy = SmallCopy(open_data("mini-imagenet", tmp_path), 80, tmp_path)
    copy.make(0)
    rows = list(csv.DictReader((tmp_path / "mini-imagenet-split.csv").open()))
    assert sorted(names(copy.data)) == sorted(f"/{row['split']}/{row['path']}" for row in rows)
    assert copy.data.split == copy.source.split and all(map(os.path.exists, [*copy.data.train.paths, *copy.data.val.paths]))


def test_processes_that_make_the_same_copy_at_once_all_finish_it(folder, tmp_path):
    code = f"""
import common, sys
from pathlib import Path
from common.data import SmallCopy, open_data
SmallCopy(open_data({str(folder)!r}), 80, Path({str(tmp_path)!r})).make(1)
"""
    call = {"env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **call) for _ in range(3)]
    errors = [process.communicate(timeout=100)[1][-500:] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    copy = SmallCopy(open_data(str(folder)), 80, tmp_path)
    files = [path for path in copy.folder.rglob("*") if path.is_file()]
    assert len(files) == 14
    for path in [*copy.data.train.paths, *copy.data.val.paths]:
        Image.open(path).load()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_or_killed_while_it_copies_loses_no_file(number, code, tmp_path):
    for part in ("train", "val"):
        for i in range(150):
            draw(tmp_path / "many" / part / "ab"[i % 2] / f"{i}.jpg", (1200, 800))
    command = [sys.executable, "-m", "benchmarks.reproduce", *arguments(tmp_path / "many", tmp_path, "--workers", "1", "--prepare")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    copy = SmallCopy(open_data(str(tmp_path / "many")), 80, tmp_path / "data")
    deadline = time.monotonic() + 60
    while not list(copy.folder.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    time.sleep(6 if number == signal.SIGKILL else 0)  # a worker checks for its parent every five seconds
    kept = {path: path.stat().st_mtime_ns for path in copy.folder.rglob("*.jpg")}
    assert 0 < len(kept) < 300 and not (copy.folder / "complete.json").exists()
    for path in kept:
        Image.open(path).load()
    assert main(command[3:]) == 0
    assert len(list(copy.folder.rglob("*.jpg"))) == 300 and (copy.folder / "complete.json").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# ---- runs


def arguments(folder: Path, root: Path, *options: str, cache: int = 80) -> list[str]:
    words = [word for change in SMALL.split() for word in ("--set", change)]
    own = ["--data", str(folder), "--data-root", str(root / "data"), "--out", str(root / "runs"), "--cache", str(cache)]
    return ["droppos", *own, "--device", "cpu", "--workers", "0", "--epochs", "1", *words, *options]


def test_a_run_on_a_copy_names_it_in_its_folder_settings_and_table(folder, tmp_path, capsys):
    for i in range(8):
        draw(folder / "train" / "ant" / f"more{i}.png", (120, 100))
        draw(folder / "train" / "bee" / f"more{i}.png", (120, 100))
    assert main(arguments(folder, tmp_path, "--data-name", "birds", "--stages", "pretrain")) == 0
    assert "birds-short80" in capsys.readouterr().out
    (run,) = (tmp_path / "runs" / "droppos").iterdir()
    assert "-birds-short80-1ep-seed0" in run.name
    assert json.loads((run / "pretrain" / "recipe.json").read_text())["data"]["name"] == "birds-short80"
    (copy,) = (tmp_path / "data" / "cache").iterdir()
    assert copy.name.startswith("birds-short80-") and (copy / "complete.json").exists()


def test_prepare_makes_only_the_copy(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path, "--prepare")) == 0
    assert not (tmp_path / "runs").exists() and list((tmp_path / "data" / "cache").glob("photos-short80-*/complete.json"))
    assert "13 of 13 images" in " ".join(capsys.readouterr().out.split())
    assert main(["droppos", "--prepare"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "droppos has nothing to make before training; PAPER=mapet has tokens, CACHE=256 a copy of the images" in said


@pytest.mark.parametrize(
    ("cache", "changes", "message"),
    [
        (63, (), "CACHE=63 is less than the 64 pixels of the short side to which the recipe .* resizes images; use CACHE=64 or more"),
        (100, ("linear.resize=112",), "CACHE=100 is less than the 112 pixels"),
        (100, ("image_size=96",), "CACHE=100 is less than the 109 pixels"),
        (0, (), "CACHE=0 is less than 1"),
    ],
)
def test_a_copy_smaller_than_the_images_that_a_stage_reads_is_refused(cache, changes, message, folder, tmp_path, capsys):
    words = [word for change in changes for word in ("--set", change)]
    try:
        code = main(arguments(folder, tmp_path, *words, cache=cache))
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2
    assert re.search(message, " ".join((printed.out + printed.err).replace("│", " ").split()))
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


def test_data_in_memory_and_a_wrong_recipe_are_refused_before_anything_is_copied(folder, tmp_path, capsys):
    assert main(["droppos", "--cache", "256", "--data-root", str(tmp_path / "data")]) == 2
    assert "the images of digits are in memory" in " ".join(capsys.readouterr().out.split())
    assert main(arguments(folder, tmp_path, "--set", "pretrain.batch_size=4096")) == 2
    assert "4096" in capsys.readouterr().out and not (tmp_path / "data").exists()


def test_a_plan_makes_no_copy_and_a_cluster_makes_it_in_one_job_before_all_trainings(folder, tmp_path):
    words = ["--data", str(folder), "--data-root", str(tmp_path / "data"), "--device", "cpu", "--cache", "256"]

    def options(paper: str, cache: int | None = 256) -> Options:
        return Options(paper, data=str(folder), data_root=tmp_path / "data", device="cpu", cache=cache)

    assert plan(options("droppos"), make_fabric("cpu"))[0].data.name == "photos-short256"
    first, trainings, *_ = groups([(options(paper), [paper, *words]) for paper in ("droppos", "mp3")], 1)
    assert [(task.name, task.arguments) for task in first.tasks] == [("copy-droppos", ["droppos", *words, "--prepare"])]
    assert first.alone and not first.after and trainings.after == first.tasks
    assert {task.name.split("-")[1] for task in trainings.tasks} == {"droppos", "mp3"}
    without, *_ = groups([(options("droppos", None), ["droppos", *words[:-2]])], 1)
    assert not any(task.name.startswith("copy") for task in without.tasks)
    assert not (tmp_path / "data").exists()
    with pytest.raises(RecipeError, match="CACHE=224 is less than the 256 pixels"):
        groups([(options("droppos", 224), ["droppos", *words])], 1)


def test_with_tokens_their_job_also_makes_the_copy(folder, tmp_path):
    options = Options("mapet", data=str(folder), data_root=tmp_path, device="cpu", cache=256)
    first, trainings, *_ = groups([(options, ["mapet", "--cache", "256"])], 1)
    assert [task.arguments for task in first.tasks] == [["mapet", "--cache", "256", "--prepare"]]
    assert trainings.after == first.tasks


def test_training_crops_of_a_copy_show_the_same_images(folder, tmp_path):
    """The relative box of a random crop is the same for the same random numbers, up to whole pixels."""
    copy = copied(folder, tmp_path)
    settings = {"image_size": (64, 64), "batch_size": 9, "seed": 0, "device": torch.device("cpu"), "workers": 0}
    plain = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    seen = [next(Loader(data.train, data=data, augmentation=plain, **settings).epoch(0)) for data in (copy.source, copy.data)]
    assert torch.equal(seen[0][1], seen[1][1])
    difference = (seen[0][0] - seen[1][0]).abs().mean() / (seen[0][0] - seen[0][0].roll(1, 0)).abs().mean()
    assert difference < 0.5
