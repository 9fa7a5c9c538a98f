"""Tests of the comparison: what is equal for all methods, what is refused, and that it goes on where it was."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.compare import __main__ as program
from benchmarks.compare.__main__ import RECORDS, Options, main, prepare, read_budget
from benchmarks.compare.arena import ARENAS, choose_arena, enter, entries
from benchmarks.compare.scores import add, load
from benchmarks.compare.table import accuracies
from benchmarks.compare.units import Plan, read_plan, read_scores
from benchmarks.compare.units import run as run_unit
from benchmarks.ledger.verify import verify
from common.data import open_data
from common.evaluate import labelled_images
from common.recipe import RecipeError
from common.run import RunError, console

QUICK = ["--device", "cpu", "--limit", "240", "--budget", "images:480", "--evaluations", "knn", "linear"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of three methods and two seeds."""
    out = tmp_path_factory.mktemp("compared")
    assert main([*QUICK, "--papers", "droppos", "--seeds", "2", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("data", ["digits", "cifar10", "folder"])
def test_all_methods_have_the_same_encoder_evaluations_and_epochs(data):
    arena = choose_arena(data, "cpu")
    methods = entries(arena)
    assert {"from scratch", "mae", "deit", "ijepa", "droppos", "mp3", "stop", "mapet", "positional_label, mae+rpl"} <= methods.keys()
    recipes = {name: enter(arena, entry, 10) for name, entry in methods.items()}
    assert len({(recipe.backbone, recipe.pretrain.epochs) for recipe in recipes.values()}) == 1
    for recipe in recipes.values():
        encoder = recipe.build_encoder(3 if data != "digits" else 1)
        assert (encoder.width, len(encoder.blocks)) == (96, 4) and encoder.grid == (arena.image_size // arena.patch_size,) * 2
        stages = [protocol.stage for protocol in recipe.protocols]
        assert stages == [protocol.stage for protocol in recipes["mae"].protocols]
        assert recipe.pretrain.warmup_epochs < 10


def test_a_folder_takes_part_in_a_named_arena_with_the_recipes_of_its_data(tmp_path):
    digits = open_data("digits").limited(240)
    for split, part in (("train", digits.train), ("val", digits.val)):
        for index, (image, label) in enumerate(zip(part.images, part.labels.tolist(), strict=True)):
            (tmp_path / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).convert("RGB").save(tmp_path / split / str(label) / f"{index}.png")
    _, plan = prepare(Options(data=str(tmp_path), arena="digits", device="cpu", budget="images:480", limit=240, out=tmp_path / "runs"))
    assert plan.arena == "digits" and plan.epochs["droppos"] == 2
    assert plan.methods["droppos"].recipe == entries(ARENAS["digits"])["droppos"].recipe != entries(ARENAS["folder"])["droppos"].recipe


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_decoders_and_rates_are_those_of_the_papers_recipes_for_an_encoder_of_this_size(name):
    found, fitting = entries(ARENAS[name]), entries(ARENAS["digits"])
    for method in ("mae", "droppos", "stop", "positional_label, mae+rpl"):
        own, other = found[method].recipe, fitting[method].recipe
        assert own.pretrain.lr / own.pretrain.batch_size == other.pretrain.lr / other.pretrain.batch_size
        sizes = [key for key in ("decoder_width", "decoder_depth", "predictor_width", "init_std") if key in other.method]
        assert sizes and all(own.method[key] == other.method[key] for key in sizes)
        assert own.pretrain.augmentation != other.pretrain.augmentation


def test_the_arena_of_the_recorded_comparison_is_still_the_same():
    recorded = json.loads((RECORDS / "digits" / "plan.json").read_text())
    assert ARENAS["digits"].hash == recorded["hash"]


def test_a_new_paper_takes_part_without_a_change_here(monkeypatch):
    monkeypatch.setattr("benchmarks.compare.arena.papers", lambda: ["droppos"])
    assert list(entries(ARENAS["digits"])) == ["from scratch", "mae", "deit", "ijepa", "droppos", "mae, half the lr"]


def test_draws_of_labels_are_nested_and_the_same_for_all_seeds_and_methods():
    data, arena = open_data("digits"), ARENAS["digits"]
    drawn = {}
    for protocol in arena.protocols("mean", None):
        if protocol.labels_per_class:
            few = labelled_images(protocol, data.train, seed=7)
            assert few.digest() == labelled_images(protocol, data.train, seed=8).digest()
            drawn[protocol.name] = {image.numpy().tobytes() for image in few.images}
    assert len(drawn) == 4
    for draw in (0, 1):
        assert drawn[f"finetune_5_per_class_draw{draw}"] < drawn[f"finetune_20_per_class_draw{draw}"]
    assert drawn["finetune_5_per_class_draw0"] != drawn["finetune_5_per_class_draw1"]


def test_every_score_has_what_is_needed_to_doubt_it(compared):
    scores = load(compared / "compare" / "digits" / "scores.csv")
    assert set(scores["method"]) == {"from scratch", "mae", "droppos"} and set(scores["seed"]) == {0, 1}
    assert {"knn", "linear"} <= set(scores["evaluation"])
    assert (scores[["commit", "date", "device", "precision", "versions", "hash", "recipe"]] != "").all(axis=None)
    assert scores["hash"].nunique() == 1 and scores.groupby("method")["recipe"].nunique().eq(1).all()
    costs = scores[scores["evaluation"] == "cost_images_per_second"]
    assert set(costs["method"]) == {"mae", "droppos"} and (costs["value"] > 0).all()


def test_a_second_call_trains_nothing_and_more_seeds_train_only_these(compared, monkeypatch, capsys):
    ran = []
    real = program.side_by_side
    monkeypatch.setattr(program, "side_by_side", lambda commands, *rest: ran.append(list(commands)) or real(commands, *rest))
    assert main([*QUICK, "--papers", "droppos", "--seeds", "2", "--out", str(compared)]) == 0
    assert ran == [[]] and "k-NN" in capsys.readouterr().out
    monkeypatch.setattr(program, "side_by_side", lambda commands, *rest: ran.append([path.stem for path in commands]))
    assert main([*QUICK, "--papers", "droppos", "--seeds", "3", "--out", str(compared)]) == 0
    assert ran[1] == ["from_scratch-seed2", "mae-seed2", "droppos-seed2"]


def test_a_method_that_fails_is_a_row_that_says_so_until_it_succeeds(compared, tmp_path):
    path = tmp_path / "scores.csv"
    folder = compared / "compare" / "digits"
    plan = read_plan(folder)
    add(path, read_scores(folder, "mae", 0))
    add(path, [program.failure(plan, "droppos", 0, "error: the loss is nan")])
    table = accuracies(load(path)).set_index("Method")
    assert table.loc["droppos", "failed"] == "seed 0: error: the loss is nan"
    add(path, read_scores(folder, "droppos", 0))
    assert "failed" not in accuracies(load(path))


def test_a_narrow_terminal_shows_whole_cells(compared, monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 60)
    assert main(["--device", "cpu", "--limit", "240", "--table", "--out", str(compared)]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown[: shown.index("Percent of")].splitlines())) <= 60
    assert (
        shown.count("undecided ") == 8 and "undecided (" not in shown and "Fewer than 3 seeds decide nothing" in " ".join(shown.split())
    )  # 3 methods, 2 references, 2 evaluations


def test_table_and_plot_are_made_again_from_the_ledger_without_training(compared, monkeypatch, capsys):
    folder = compared / "compare" / "digits"
    drawn = (folder / "figures" / "intervals.svg").read_text()
    (folder / "figures" / "intervals.svg").unlink()
    monkeypatch.setattr(program, "side_by_side", lambda *_: pytest.fail("something is trained"))
    assert main(["--device", "cpu", "--limit", "240", "--table", "--out", str(compared)]) == 0
    assert (folder / "figures" / "intervals.svg").read_text() == drawn and "k-NN" in capsys.readouterr().out


def test_a_recorded_comparison_has_its_logs_and_is_found_again_in_them(compared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "RECORDS", tmp_path / "benchmarks" / "compare")
    assert main([*QUICK, "--papers", "droppos", "--seeds", "2", "--record", "--out", str(compared)]) == 0
    record = tmp_path / "benchmarks" / "compare" / "digits"
    assert {"plan.json", "scores.csv", "report.html"} < {path.name for path in record.iterdir()} and len(
        list((record / "logs").iterdir())
    ) == 6
    assert str(compared) not in (record / "plan.json").read_text()
    assert main(["--device", "cpu", "--table", "--out", str(tmp_path / "none")]) == 0 and "k-NN" in capsys.readouterr().out
    assert verify(tmp_path)[1] == []
    text = (record / "scores.csv").read_text()
    scores = load(record / "scores.csv")
    assert verify(tmp_path)[0][-1] == f"benchmarks/compare/digits: {len(scores)} of {len(scores)} rows verified"
    scores.loc[scores["evaluation"] == "knn", "value"] += 0.01
    scores.to_csv(record / "scores.csv", index=False)
    assert len(verify(tmp_path)[1]) == 6 and "its log says" in verify(tmp_path)[1][0]
    (record / "scores.csv").write_text(text + text.splitlines()[1] + "\n")
    assert "another row is of the same score" in verify(tmp_path)[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("arena", ["digits", "cifar10", "cifar10_gpu", "folder"])
def test_each_arena_runs_to_its_end_on_a_few_images(arena, tmp_path, monkeypatch):
    short = {
        "finetune": replace(ARENAS[arena].finetune, epochs=2, warmup_epochs=1),
        "few": replace(ARENAS[arena].few, epochs=1, warmup_epochs=0),
    }
    short["few"] = replace(short["few"], milestones=())
    data = open_data("digits").limited(200)
    side = ARENAS[arena].image_size
    colour = {name: replace(part, images=part.images.repeat(1, 3, 1, 1)) for name, part in (("train", data.train), ("val", data.val))}
    if arena != "digits":
        data = replace(data, channels=3, mean=data.mean * 3, std=data.std * 3, **colour)
    monkeypatch.setitem(ARENAS, arena, replace(ARENAS[arena], **short))
    monkeypatch.setattr("benchmarks.compare.units.open_data", lambda *_: data)
    chosen = choose_arena(arena, "cpu", 200)
    own = {"arena": chosen.name, "hash": chosen.hash, "limit": 200, "data": "mine", "budget": "images:400", "device": "cpu"}
    plan = Plan(
        **own,
        data_root=str(tmp_path),
        papers=(),
        encoder_file=None,
        epochs={"mae": 2},
        evaluations=(),
        cells=(side // chosen.patch_size) ** 2,
        conditions={},
    )
    (tmp_path / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)))
    run_unit(tmp_path, "mae", 0)
    scores = read_scores(tmp_path, "mae", 0)
    assert plan.complete(scores) and {score.draw for score in scores if "per_class" in score.evaluation} == {0, 1}


def test_a_signal_stops_all_units_and_the_same_command_goes_on(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "benchmarks.compare", "--device", "cpu", "--budget", "images:30000", "--evaluations", "knn"]
    command += ["--papers", "droppos", "--seeds", "1", "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 90
    while not list(tmp_path.glob("compare/digits/*/*/pretrain/progress.json")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    saved = [json.loads(path.read_text())["saved"] for path in tmp_path.glob("compare/digits/*/*/pretrain/progress.json")]
    assert max(saved) > 0 and not list(tmp_path.glob("compare/digits/scores/mae*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--papers", "dropos"], "PAPERS='dropos' is not known; did you mean droppos?"),
        (["--evaluations", "kn"], "EVALUATIONS='kn' is not known; did you mean knn?"),
        (["--budget", "image:5"], "BUDGET='image:5': did you mean images?"),
        (["--budget", "images:many"], "the amount is not a number above 0"),
        (["--budget", "images:150"], "two epochs of 240 images are the least"),
        (["--limit", "50"], "a class of digits-50 has 5 training images, but 20 labels per class are used"),
    ],
)
def test_bad_input_is_refused_before_anything_is_started(arguments, message, tmp_path, capsys):
    assert main(["--device", "cpu", "--limit", "240", *arguments, "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_an_unknown_arena_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="--arena cifar is not known; did you mean cifar10"):
        Options(arena="cifar")


def test_an_encoder_of_another_size_is_refused_before_anything_is_started(tmp_path, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "mine.safetensors")
    assert main(["--device", "cpu", "--encoder", str(tmp_path / "mine.safetensors"), "--out", str(tmp_path / "runs")]) == 2
    assert "the checkpoint has another architecture: width 192 in the file, 96 here" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_another_budget_or_arena_in_the_same_folder_is_refused(compared, capsys):
    assert main([*QUICK, "--budget", "images:600", "--out", str(compared)]) == 2
    assert "holds another comparison (budget: images:480 there): use another OUT" in " ".join(capsys.readouterr().out.split())


def test_scores_of_two_arenas_are_not_mixed(compared, tmp_path):
    scores = read_scores(compared / "compare" / "digits", "mae", 0)
    add(tmp_path / "scores.csv", scores)
    with pytest.raises(RunError, match="holds another arena"):
        add(tmp_path / "scores.csv", [dataclasses.replace(score, hash="0" * 12) for score in scores])
    table = pandas.read_csv(tmp_path / "scores.csv")
    pandas.concat([table, table.assign(hash="1" * 12)]).to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(RunError, match="has scores of several arenas"):
        load(tmp_path / "two.csv")


def test_budgets_are_read():
    assert read_budget("flops:1e15") == ("flops", 1e15)
    with pytest.raises(RecipeError, match="write images:500000, flops:1e15 or minutes:8"):
        read_budget("500000")
