"""Tests of the token store: tokens of each image, interrupted runs, and refused stores."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.papers import choose_recipe, paper_module
from benchmarks.reproduce import main
from benchmarks.stages import Stages
from common.data import Augmentation, Data, DataError, Loader, open_data
from common.recipe import RecipeError
from common.stopping import Stopped, stop_on_signals
from common.train import make_fabric
from mapet import tokenizers
from mapet.tokenizers import Tokenization, prepare_tokens, store
from mapet.tokenizers.features import Pixels
from mapet.tokenizers.kmeans import NearestCentroid
from mapet.tokenizers.store import TokenStore, image_names, making

SIZE, PATCH, CODES = 16, 4, 8
CPU = torch.device("cpu")
NO_AUG = Augmentation(crop="none", flip=0.0)


def draw(path: Path, size: tuple[int, int] = (96, 72), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(seed).integers(0, 256, (size[1] // 12, size[0] // 12, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)


def draw_pictures(folder: Path) -> Path:
    """Two classes with five training and three validation images each."""
    for part, count in (("train", 5), ("val", 3)):
        for number, name in enumerate(("ant", "bee")):
            for i in range(count):
                draw(folder / part / name / f"{i}.png", seed=100 * number + 10 * i + count)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Small batches, saved one by one, and no figure."""
    monkeypatch.setattr(tokenizers, "BATCH", 4)
    monkeypatch.setattr(tokenizers, "draw_codewords", lambda patches, most, data, path: path.write_text(str(list(patches))))
    for module in (tokenizers, store):
        monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)


def prepare(data: Data, folder: Path, targets: dict | None = None, **options) -> Data:
    """Make or open a store: digits have 8 x 8 pixels, files 16 x 16; both have 4 x 4 patches."""
    size = SIZE if data.image_size is None else 8
    settings = {"image_size": size, "patch_size": size // 4, "vocabulary": CODES, "augmentation": NO_AUG, "device": CPU, "workers": 0}
    tokenization = Tokenization(**{"iterations": 2, "redos": 1} | (targets or {}))
    return prepare_tokens(tokenization, data, folder=folder, **settings | {"make": True} | options)


def only_dir(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def by_path(folder: Path, place: Path) -> dict[str, Tensor]:
    """Compute the tokens of each image in a folder from the codebook, one by one, without loader and store."""
    centroids, found = load_file(place / "codebook.safetensors")["centroids"], {}
    data = open_data(str(folder))
    tokenizer = NearestCentroid(Pixels(PATCH, (SIZE, SIZE), data.mean, data.std), centroids)
    for file in folder.rglob("*.png"):
        image = Image.open(file).convert("RGB")
        short = min(image.size)
        image = image.resize([int(side * SIZE / short) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - SIZE) / 2) for side in image.size)
        pixels = torch.from_numpy(numpy.array(image.crop((left, top, left + SIZE, top + SIZE)))).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        found[file.relative_to(folder).as_posix()] = tokenizer(((pixels - mean) / std)[None])[0][0].short()
    return found


def digits(train: int = 40, val: int = 10) -> Data:
    data = open_data("digits")
    return replace(data, train=data.train.subset(range(train)), val=data.val.subset(range(val)))


def reproduction(tmp_path: Path, data: Data, image_size: int, patch_size: int, **augmentation) -> Stages:
    """A pre-training of one epoch, with its tokens and runs in tmp_path."""
    module = paper_module("mapet")
    name, recipe = choose_recipe(module, "digits", None)
    stage = replace(recipe.pretrain, epochs=1, batch_size=4, augmentation=replace(NO_AUG, **augmentation))
    method = {"context": 5, "vocabulary": CODES}
    recipe = replace(recipe, image_size=image_size, patch_size=patch_size, pretrain=stage, protocols=(), method=method)
    where = {"out": tmp_path / "runs", "data_root": tmp_path, "workers": 0}
    return Stages(module, name, recipe, data, make_fabric("cpu", "32-true"), seed=0, **where)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the tokens of each image


def test_an_image_gets_its_own_tokens_for_any_order_and_time_of_the_files(folder, tmp_path):
    data = open_data(str(folder))
    prepare(data, tmp_path / "tokens")
    expected = by_path(folder, only_dir(tmp_path / "tokens"))
    assert len({bytes(ids.numpy()) for ids in expected.values()}) == 16
    for number, file in enumerate(sorted(folder.rglob("*.png"), reverse=True)):
        os.utime(file, (number, number))
    shuffled = replace(data, train=data.train.subset(torch.randperm(10)), val=data.val.subset([5, 4, 3, 2, 1, 0]))
    few = replace(data, train=data.train.subset([7, 1]), val=data.val.subset([3, 4]))  # one class only
    for given in (data, shuffled, few):
        found = prepare(given, tmp_path / "tokens", make=False)
        for part in (found.train, found.val):
            assert all(
                torch.equal(ids, expected[Path(p).relative_to(folder).as_posix()]) for p, ids in zip(part.paths, part.labels, strict=True)
            )


def test_a_copied_data_set_gets_the_same_tokens(folder, tmp_path, monkeypatch):
    expected = prepare(open_data(str(folder)), tmp_path / "tokens")
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "pictures", copy_function=shutil.copy)
    shutil.rmtree(folder)
    monkeypatch.chdir(copy.parent)
    for name in (str(copy), "pictures", "../elsewhere/./pictures"):
        found = prepare(open_data(name), tmp_path / "tokens", make=False)
        assert torch.equal(found.train.labels, expected.train.labels) and torch.equal(found.val.labels, expected.val.labels)
    odd = replace(found.train, paths=[path.replace("/train/", "//train/./") for path in found.train.paths])
    assert image_names(odd, "train") == image_names(found.train, "train")


def test_subfolders_of_a_class_are_not_confused_with_classes(tmp_path):
    """train/a/x/0.png is not train/x/0.png, even if it is the only requested image."""
    for name in ("a/x/0", "a/x/1", "a/y/0", "x/0", "x/1", "b/0"):
        draw(tmp_path / "pictures" / "train" / f"{name}.png", seed=int.from_bytes(name.encode(), "big") % 2**32)
        draw(tmp_path / "pictures" / "val" / f"{name}.png", seed=len(name))
    data = open_data(str(tmp_path / "pictures"))
    prepare(data, tmp_path / "tokens")
    expected = by_path(tmp_path / "pictures", only_dir(tmp_path / "tokens"))
    assert not torch.equal(expected["train/a/x/0.png"], expected["train/x/0.png"])
    for chosen in ("a/x", "a/y", "a", "x"):
        part = data.train.subset([i for i, path in enumerate(data.train.paths) if f"train/{chosen}/" in path])
        found = TokenStore(only_dir(tmp_path / "tokens")).of(part, "train")
        names = [path.partition("pictures/")[2] for path in part.paths]
        assert torch.equal(found, torch.stack([expected[name] for name in names]))


def test_images_with_unusual_file_names_get_their_tokens(folder, tmp_path):
    odd = [b"a\nb.png", "a\u2028b\x85.png".encode(), b"\xff\xfe.png", b' "quoted".png']
    for number, name in enumerate(odd):
        draw(folder / "train" / "ant" / os.fsdecode(name), seed=number)
    data = open_data(str(folder))
    assert prepare(data, tmp_path / "tokens").train.labels.shape == (14, 16)
    assert torch.equal(prepare(data, tmp_path / "tokens").train.labels.short(), TokenStore(only_dir(tmp_path / "tokens")).tokens[:14])


def test_images_in_memory_are_identified_by_their_pixels(tmp_path):
    data = digits()
    first, order = prepare(data, tmp_path), torch.randperm(40)
    shuffled = prepare(replace(data, train=data.train.subset(order)), tmp_path, make=False)
    assert torch.equal(shuffled.train.labels, first.train.labels[order])
    swapped = prepare(replace(data, train=data.val, val=data.train), tmp_path, make=False)
    assert torch.equal(swapped.train.labels, first.val.labels)
    changed = replace(data, train=data.train.subset(range(40)))
    changed.train.images[3, 0, 0, 0] += 1
    changed.train.images[5, 0, 0, 0] += 1
    name = image_names(changed.train, "train")[3]
    with pytest.raises(DataError, match=f"no tokens for 2 of 40 images, the first is {name}"):
        prepare(changed, tmp_path)


def test_unknown_images_are_refused_with_their_number_and_the_first_name(folder, tmp_path):
    prepare(open_data(str(folder)), tmp_path / "tokens")
    for name in ("bee/2x", "bee/9"):
        draw(folder / "train" / f"{name}.png")
    said = "tokens for 2 of 12 images, the first is train/bee/2x.png: these are not the images it was made from; use those, or delete the"
    with pytest.raises(DataError, match=re.escape(said)):
        prepare(open_data(str(folder)), tmp_path / "tokens")


@pytest.mark.parametrize("files", [20_000, 5])
def test_replaced_images_with_the_same_names_are_refused_in_a_small_data_set(files, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.paths.CONTENT_FILES", files)
    tokens = tmp_path / "tokens"
    prepare(open_data(str(folder)), tokens)
    draw(folder / "train" / "bee" / "1.png", seed=1000)
    other = draw_pictures(tmp_path / "other" / "pictures")  # the same images, so the same tokens
    assert prepare(open_data(str(other)), tokens).train.labels.shape == (10, 16)
    data = open_data(str(folder))
    if files == 5:
        prepare(data, tokens)
        return
    for given, count in ((data, 10), (replace(data, train=data.train.subset([9, 6])), 2)):
        said = f"made from other images than 1 of these {count}, the first is train/bee/1.png; the names are the same: use the original"
        with pytest.raises(DataError, match=said):
            prepare(given, tokens)
    assert len(prepare(replace(data, train=data.train.subset([0, 9])), tokens).train) == 2


# ---- refused stores and options


@pytest.fixture(scope="module")
def digits_store(tmp_path_factory) -> Path:
    """A store of digits."""
    place = tmp_path_factory.mktemp("whole")
    prepare(digits(), place)
    return only_dir(place)


def manifest(**changes):
    def change(place: Path) -> None:
        held = json.loads((place / "manifest.json").read_text()) | changes
        (place / "manifest.json").write_text(json.dumps({name: value for name, value in held.items() if value is not None}))

    return change


def tokens(change):
    return lambda place: numpy.save(place / "tokens.npy", change(numpy.load(place / "tokens.npy")))


def cut(name: str, kept: int):
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:kept])


DAMAGES = [
    (lambda place: shutil.rmtree(place), "there is no token store in .*: make it with `make tokens PAPER=mapet`, or name the folder"),
    (lambda place: (place / "manifest.json").unlink(), "there is no token store"),
    (cut("manifest.json", 100), "manifest.json cannot be read"),
    (lambda place: (place / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    (lambda place: (place / "manifest.json").write_bytes(b"\xff"), "manifest.json cannot be read"),
    (manifest(version=None), "manifest.json cannot be read .KeyError: 'version'"),
    (manifest(version=0), "it has version 0, and this code reads version 1; delete it to have it made again"),
    (manifest(done=12), "it is not finished; delete it"),
    (manifest(grid=None), "truncated or damaged .KeyError: 'grid'"),
    (manifest(vocabulary="many"), "truncated or damaged"),
    (cut("tokens.npy", 1000), "truncated or damaged .*mmap length is greater than file size"),
    (cut("tokens.npy", 0), "truncated or damaged"),
    (lambda place: (place / "tokens.npy").unlink(), "truncated or damaged .*tokens.npy"),
    (cut("images.json", 1000), "truncated or damaged"),
    (tokens(lambda ids: ids.astype(numpy.int32)), r"holds \(50, 16\) torch.int32, .* 50 names, of 16 cells each, .* torch.int16"),
    (tokens(lambda ids: ids.astype("U3")), "truncated or damaged"),
    (tokens(lambda ids: ids[:-1]), r"holds \(49, 16\) torch.int16, but 50 names"),
    (tokens(lambda ids: ids[:, :-1]), r"holds \(50, 15\) torch.int16"),
    (tokens(lambda ids: numpy.int16(-1) - ids), "it holds ids from -8 to -1, and the vocabulary has 0 to 7"),
    (tokens(lambda ids: ids + numpy.int16(8)), "it holds ids from 8 to 15, and the vocabulary has 0 to 7; delete it"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_store_is_refused_with_the_reason_and_the_fix(digits_store, tmp_path, damage, message):
    place = shutil.copytree(digits_store, tmp_path / "copy")
    assert prepare(digits(), tmp_path, {"store": str(place)}).train.labels.shape == (40, 16)
    damage(place)
    with pytest.raises(DataError, match=message):
        prepare(digits(), tmp_path, {"store": str(place)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 9}, "made with vocabulary=8, and the recipe wants vocabulary=9: change the recipe, or make other tokens"),
        ({"patch_size": 4}, r"made with grid=\[4, 4\], and the recipe wants grid=\[2, 2\]"),
    ],
)
def test_a_store_with_other_settings_is_refused_with_the_differences(digits_store, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        prepare(digits(), tmp_path, {"store": str(digits_store)}, **options)


def test_a_store_of_another_crop_is_refused(folder, tmp_path):
    data = open_data(str(folder))
    prepare(data, tmp_path / "tokens")
    targets = {"store": str(only_dir(tmp_path / "tokens"))}
    for augmentation, wanted in ((replace(NO_AUG, crop="squash"), 0.0), (replace(NO_AUG, resize=20), 1.25)):
        with pytest.raises(DataError, match=f"made with short_side=1.0, and the recipe wants short_side={wanted}"):
            prepare(data, tmp_path / "tokens", targets, augmentation=augmentation)
    prepare(data, tmp_path / "tokens", targets, augmentation=replace(NO_AUG, resize=SIZE, color_jitter=0.4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": {"tokenizer": "vqgan"}}, "targets.tokenizer='vqgan' is not known; choose kmeans, kclip or vqkd"),
        ({"targets": {"tokenizer": "vqkd"}}, "download vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth and set targets.checkpoint"),
        ({"targets": {"redos": 0}}, "targets.redos=0: give a whole number from 1 up"),
        ({"targets": {"sample": "all"}}, r"targets.sample='all' does not fit; expected int \| None"),
        ({"targets": {"features": 3}}, "targets.features=3 does not fit; expected str"),
        ({"targets": {"sample": 7}}, "7 vectors cannot form 8 clusters: set targets.sample or method.vocabulary to fit"),
        ({"vocabulary": 2**15 + 1}, "method.vocabulary=32769: give a whole number from 2 to 32768"),
        ({"vocabulary": "many"}, "method.vocabulary='many': give a whole number"),
    ],
)
def test_invalid_options_are_refused_before_an_image_is_read(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(Pixels, "look", None)
    with pytest.raises(RecipeError, match=message):
        prepare(digits(), tmp_path, **options)


def test_the_command_prints_the_error_and_exits_with_2(digits_store, tmp_path, capsys):
    def refused(*changes: str) -> str:
        words = [word for change in changes for word in ("--set", change)]
        assert main(["mapet", "--device", "cpu", "--data-root", str(tmp_path), "--out", str(tmp_path / "runs"), *words]) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return " ".join(said.out.split())

    assert "there is no token store in" in refused("targets.store=nowhere")
    assert "made with vocabulary=8, and the recipe wants vocabulary=64" in refused(f"targets.store={digits_store}")
    assert "no tokens for 1397 of 1437 images" in refused(f"targets.store={digits_store}", "method.vocabulary=8")
    assert "targets.iterations='few' does not fit" in refused("targets.iterations=few")
    assert "pretrain.augmentation.flip=0.5: tokens are made once" in refused("pretrain.augmentation.flip=0.5")
    place = shutil.copytree(digits_store, tmp_path / "copy")
    cut("tokens.npy", 1000)(place)
    assert "truncated or damaged" in refused(f"targets.store={place}", "method.vocabulary=8")
    assert not (tmp_path / "tokens").exists()


# ---- interrupted runs


class Killed(BaseException):
    pass


class Actions:
    """Counts the actions that make a store; before action number `last`, raises Killed or calls `die`."""

    def __init__(self, monkeypatch, die=None):
        self.done, self.last, self.die = [], math.inf, die
        for owner, name in (
            (Pixels, "look"),
            (tokenizers, "fit_centroids"),
            (tokenizers, "save_file"),
            (tokenizers, "draw_codewords"),
            (store, "write_text"),
            (Path, "rename"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self.counted(name, getattr(owner, name)))

    def counted(self, name: str, function):
        def wrapped(*arguments, **options):
            if len(self.done) == self.last:
                self.die() if self.die else None
                raise Killed
            self.done.append(name)
            return function(*arguments, **options)

        return wrapped


def test_after_a_kill_at_any_time_there_is_no_store_and_the_next_call_completes_it(folder, tmp_path, monkeypatch):
    data, actions = open_data(str(folder)), Actions(monkeypatch)
    prepare(data, tmp_path / "undisturbed")
    name, expected, all_actions = only_dir(tmp_path / "undisturbed").name, contents(only_dir(tmp_path / "undisturbed")), actions.done
    assert set(expected) == {"manifest.json", "tokens.npy", "images.json", "codewords.png", "codebook.safetensors"}
    assert all_actions.count("look") == 4 + 3 + 2 + 3  # black image + sampling; tokenization of train and val; figure
    for last in range(len(all_actions)):
        place = tmp_path / f"{last}"
        actions.done, actions.last = [], last
        with pytest.raises(Killed):
            prepare(data, place)
        assert not (place / name).exists(), all_actions[last]
        actions.done, actions.last = [], math.inf
        prepare(data, place)
        assert contents(place / name) == expected, (last, all_actions[:last])
        assert {path.name for path in place.iterdir()} == {name, f"{name}.lock"}
        # saved work is not repeated, except the black image, the current batch and those of the figure
        looks = all_actions[:last].count("look")
        assert actions.done.count("look") <= 12 - looks + (2 if looks <= 4 else 1 + max(0, looks - 9))


def test_a_store_resumes_after_its_process_was_killed_with_active_workers(folder, tmp_path, monkeypatch):
    data = open_data(str(folder))
    prepare(data, tmp_path / "undisturbed")
    code = f"""
import common, os, signal, pytest
from tests import test_tokens as t
with pytest.MonkeyPatch.context() as patch:
    t.tokenizers.BATCH, t.tokenizers.SAVE_SECONDS, t.store.SAVE_SECONDS = 4, 0.0, 0.0
    actions = t.Actions(patch, die=lambda: os.kill(os.getpid(), signal.SIGKILL))
    actions.last = 33
    t.prepare(t.open_data({str(folder)!r}), t.Path({str(tmp_path / "killed")!r}), workers=2)
"""
    with open(tmp_path / "said", "w") as said:  # no pipe: reading it would wait until the workers have ended
        ended = subprocess.run([sys.executable, "-c", code], stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": "."})
    assert ended.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
    partial = only_dir(tmp_path / "killed")
    assert partial.suffix == ".partial" and 0 < json.loads((partial / "manifest.json").read_text())["done"] < 16
    actions = Actions(monkeypatch)  # at once: workers of the killed process may still run
    prepare(data, tmp_path / "killed")
    assert contents(only_dir(tmp_path / "killed")) == contents(only_dir(tmp_path / "undisturbed"))
    assert "fit_centroids" not in actions.done


def test_a_process_waits_while_another_makes_the_same_store(folder, tmp_path, capsys):
    """As two seeds of a comparison do that run side by side."""
    data = open_data(str(folder))
    prepare(data, tmp_path / "other")
    place = tmp_path / "tokens" / only_dir(tmp_path / "other").name
    waiting = threading.Thread(target=prepare, args=(data, tmp_path / "tokens"))
    with making(place):
        waiting.start()
        waiting.join(1.5)
        assert waiting.is_alive() and not place.exists()
    waiting.join(60)
    assert TokenStore(place).names and f"waiting for {place}: another process is making it" in capsys.readouterr().out.replace("\n", "")


def test_a_signal_ends_the_waiting_for_a_store(tmp_path):
    with making(tmp_path / "store"), pytest.raises(Stopped), stop_on_signals():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with making(tmp_path / "store"):
            pass


def test_a_store_just_made_by_another_process_is_not_made_again(folder, tmp_path, monkeypatch):
    """The store appears after the check for it and before the lock."""
    data = open_data(str(folder))
    prepare(data, tmp_path / "other")
    real = tokenizers.making

    def late(place):
        shutil.copytree(only_dir(tmp_path / "other"), place)
        return real(place)

    monkeypatch.setattr(tokenizers, "making", late)
    monkeypatch.setattr(Pixels, "look", None)
    assert prepare(data, tmp_path / "tokens").train.labels.shape == (10, 16)


@pytest.mark.parametrize("action", ["fit_centroids", "save_file", "draw_codewords", "rename"])
def test_partial_results_of_other_images_are_not_used(folder, tmp_path, monkeypatch, action):
    """If the images change after a kill, the old sample, codebook and tokens are not used."""
    actions = Actions(monkeypatch)
    prepare(open_data(str(folder)), tmp_path / "first")
    actions.last, actions.done = actions.done.index(action), []
    with pytest.raises(Killed):
        prepare(open_data(str(folder)), tmp_path / "killed")
    actions.last = math.inf
    (folder / "train" / "ant" / "0.png").rename(folder / "train" / "ant" / "00.png")
    draw(folder / "train" / "ant" / "00.png", seed=77)
    prepare(open_data(str(folder)), tmp_path / "killed")
    prepare(open_data(str(folder)), tmp_path / "undisturbed")
    assert contents(only_dir(tmp_path / "killed")) == contents(only_dir(tmp_path / "undisturbed"))
    codebooks = [(only_dir(tmp_path / name) / "codebook.safetensors").read_bytes() for name in ("first", "killed")]
    assert codebooks[0] != codebooks[1]


# ---- tokens reach the method


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_contain_the_tokens_of_their_images(folder, tmp_path, workers):
    memory, files = digits(), open_data(str(folder))
    for data, size, patch in ((memory, 8, 2), (files, SIZE, PATCH)):
        found = prepare(data, tmp_path / "tokens", image_size=size, patch_size=patch, workers=workers)
        (place,) = (tmp_path / "tokens").glob(f"{data.name}-*[!k]")  # excludes the lock
        features = Pixels(patch, (size, size), data.mean, data.std)
        tokenizer = NearestCentroid(features, load_file(place / "codebook.safetensors")["centroids"])
        options = {"data": found, "image_size": (size, size), "batch_size": 5, "seed": 0, "device": CPU, "workers": workers}
        for split, augmentation in ((found.train, replace(NO_AUG, repeats=2)), (found.val, None)):
            for images, targets in Loader(split, augmentation=augmentation, **options).epoch(0):
                assert targets.dtype == torch.int16 and torch.equal(tokenizer(images)[0].short(), targets)


def test_a_store_takes_two_bytes_per_patch_and_is_memory_mapped(tmp_path):
    found = prepare(digits(), tmp_path, image_size=56, patch_size=4)
    place = only_dir(tmp_path)
    assert (place / "tokens.npy").stat().st_size == 128 + 50 * 392
    assert (place / "tokens.npy").stat().st_size + (place / "images.json").stat().st_size < 50 * 1000
    opened = TokenStore(place)
    for split, part, first in ((found.train, "train", 0), (found.val, "val", 40)):
        labels = opened.of(split, part)
        assert labels.shape == (len(split), 196) and labels.data_ptr() == opened.tokens[first:].data_ptr()
        options = {"data": found, "image_size": (8, 8), "batch_size": 5, "augmentation": None, "seed": 0, "device": CPU, "workers": 0}
        assert Loader(replace(split, labels=labels), **options).labels.data_ptr() == labels.data_ptr()
    mapped = [line.split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f"{place / 'tokens.npy'}")]
    assert any(int(start, 16) <= found.train.labels.data_ptr() < int(rest[0].split()[0], 16) for start, *rest in mapped)


def test_pre_training_uses_the_tokens(tmp_path):
    (run := reproduction(tmp_path, digits(), 8, 2)).pretrain()
    result = json.loads((run.root / "pretrain" / "result.json").read_text())
    assert only_dir(tmp_path / "tokens").name.startswith("digits-kmeans-") and 0 <= result["token_top1"] <= 100


# ---- the command


def test_prepare_only_makes_the_store_and_a_second_call_prints_its_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizers, "BATCH", 512)
    arguments = ["mapet", "--device", "cpu", "--data-root", str(tmp_path), "--out", str(tmp_path / "runs")]
    few = ["--set", "method.vocabulary=8", "--set", "targets.redos=1"]
    assert main([*arguments, "--prepare", *few]) == 0
    said, place = capsys.readouterr().out, only_dir(tmp_path / "tokens")
    assert "tokens: 1797 of 1797 images" in said and f"tokens: {place}, 8 codes, 1797 images" in said.replace("\n", "")
    assert not (tmp_path / "runs").exists()
    before = contents(place)
    monkeypatch.setattr(Pixels, "look", None)
    assert main([*arguments, "--prepare", *few]) == 0
    said = capsys.readouterr().out
    assert f"tokens: {place}" in said and "of 1797 images" not in said and contents(place) == before
    assert main(["droppos", *arguments[1:], "--prepare"]) == 2
    assert "droppos has nothing to make before training" in capsys.readouterr().out


def test_a_run_that_may_not_make_tokens_fails_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(RecipeError, match="no tokens in .*digits-kmeans-.*: run `make tokens PAPER=mapet` with the same DATA"):
        prepare(digits(), tmp_path, make=False)
    assert not list(tmp_path.iterdir())
