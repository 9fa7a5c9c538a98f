"""Tests of the comparison: what is equal for all methods, what is refused, and that it goes on where it was."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy
import pandas
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.compare import __main__ as program
from benchmarks.compare.__main__ import RECORDS, Options, main, prepare, read_budget
from benchmarks.compare.arena import ARENAS, ARMS, CLAIMS, GAP, TUNED, UNTUNED, choose_arena, enter, entries, trials
from benchmarks.compare.scores import add, load
from benchmarks.compare.table import accuracies, claims, location, tuning
from benchmarks.compare.units import Plan, read_plan, read_scores
from benchmarks.compare.units import run as run_unit
from benchmarks.ledger.verify import verify
from benchmarks.report.comparison import comparison_page
from common.data import open_data
from common.evaluate import labelled_images
from common.files import locked
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
def test_decoders_and_rates_are_those_of_the_papers_recipes_for_an_encoder_of_this_size(name, monkeypatch):
    monkeypatch.setattr("benchmarks.compare.arena.TUNED", {})
    found, fitting = entries(ARENAS[name]), entries(ARENAS["digits"])
    for method in ("mae", "droppos", "stop", "positional_label, mae+rpl"):
        own, other = found[method].recipe, fitting[method].recipe
        assert own.pretrain.lr / own.pretrain.batch_size == other.pretrain.lr / other.pretrain.batch_size
        sizes = [key for key in ("decoder_width", "decoder_depth", "predictor_width", "init_std") if key in other.method]
        assert sizes and all(own.method[key] == other.method[key] for key in sizes)
        assert own.pretrain.augmentation != other.pretrain.augmentation


@pytest.mark.parametrize("plan", sorted(RECORDS.glob("*/plan.json")), ids=lambda path: path.parent.name)
def test_the_arena_of_a_recorded_comparison_is_still_the_same(plan):
    recorded = json.loads(plan.read_text())
    assert ARENAS[recorded["arena"]].hash == recorded["hash"]


def test_methods_are_tuned_with_equally_many_trials_and_without_the_test_images():
    arena, digits = ARENAS["cifar10_tuning"], open_data("digits")
    methods = entries(arena)
    trained = [entry for entry in entries(replace(ARENAS["cifar10"], name="cifar10_gpu")).values() if entry.trains and entry.name != GAP]
    assert [*methods] == ["from scratch", *(trial.name for entry in trained for trial in trials(entry).values())]
    assert {len(trials(entry)) for entry in trained} == {5}
    recipes = {name: enter(arena, entry, 2) for name, entry in methods.items()}
    for entry in trained:
        own = [recipes[trial.name] for trial in trials(entry).values()]
        assert len({str(recipe) for recipe in own}) == 5
        assert {str(replace(recipe, pretrain=own[0].pretrain, method=own[0].method)) for recipe in own} == {str(own[0])}
    small, tuned = replace(ARENAS["cifar10"], limit=400).limited(digits), replace(arena, limit=400, held_out=100).limited(digits)
    assert tuned.train.digest() == small.train.digest()
    images = {name: {image.numpy().tobytes() for image in part.images} for name, part in (("own", tuned.val), ("train", tuned.train))}
    assert len(tuned.val) == 100 and not images["own"] & images["train"]
    assert images["own"] <= {image.numpy().tobytes() for image in digits.train.images}


def test_the_tuned_recipes_are_the_best_trials_of_the_recorded_tuning():
    recorded = tuning(load(RECORDS / "cifar10_tuning" / "scores.csv"))
    best = {row.Method: row.Best for row in recorded.itertuples() if row.Best != "recipe"}
    assert TUNED["cifar10"] == best
    found, own = entries(ARENAS["cifar10"]), entries(replace(ARENAS["cifar10"], name="cifar10_gpu"))
    for method, title in best.items():
        assert found[method].recipe == trials(own[method])[title].recipe != own[method].recipe
    assert found[UNTUNED].recipe == own["mae"].recipe


def test_a_trial_without_a_score_is_a_dash_in_its_own_column_and_seeds_are_averaged():
    scores = load(RECORDS / "cifar10_tuning" / "scores.csv")
    missing = scores[~scores["method"].isin(["mapet, lr x 2", "mapet, context=9"])]
    row = tuning(missing).set_index("Method").loc["mapet"]
    assert [*row] == ["47.4", "43.5", "-", "-", "context=33: 46.5", "recipe", "+0.0"]
    assert tuning(pandas.concat([scores, scores.assign(seed=1)])).equals(tuning(scores))


def test_a_new_paper_takes_part_without_a_change_here(monkeypatch):
    monkeypatch.setattr("benchmarks.compare.arena.papers", lambda: ["droppos"])
    own = ["deit", "drloc, mae+drloc", "ijepa", "jigsaw, mae+jigsaw"]
    assert list(entries(ARENAS["digits"])) == ["from scratch", "mae", *own, "droppos", "mae, half the lr"]


def test_the_arms_of_the_claims_differ_from_their_method_only_in_what_is_claimed():
    arena = ARENAS["cifar10"]
    own, found = entries(arena), entries(arena, claims=True)
    assert found.keys() - own.keys() == {"mp3, none", "mp3, relative", "positional_label, mae+apl", "mapet, masked"}
    assert {method for pair in CLAIMS.values() for method in pair} <= found.keys()
    assert list(entries(arena, ("mapet",), claims=True)) == ["from scratch", "mae", "mapet", "mapet, masked"]
    names = ("positional_label, mae+rpl", "positional_label, mae+apl", "mapet", "mapet, masked", "mp3", "mp3, none", "mp3, relative")
    rpl, apl, mapet, masked, mp3, none, relative = (enter(arena, found[name], 10) for name in names)
    assert apl == replace(rpl, method=rpl.method | {"label": "absolute"})
    assert masked == replace(mapet, method=mapet.method | {"prediction": "masked"})
    tunings = [protocol for protocol in mp3.protocols if protocol.kind == "finetune"]
    for recipe, position in ((none, "none"), (relative, "relative")):
        assert recipe == replace(mp3, protocols=tuple(replace(one, position=position) for one in tunings))
    assert len({(found[name].module.__name__, found[name].arm) for name in names}) == len(names)  # their runs have different folders


def test_a_claim_is_decided_undecided_or_not_measured():
    values = {"stop": [50, 51, 52], "ijepa": [49, 50, 51.1], "mp3": [50, 51, 52], "mp3, none": [50, 52, 51]}
    rows = [{"method": m, "seed": s, "value": v, "evaluation": "finetune"} for m, own in values.items() for s, v in enumerate(own)]
    rows += [{"method": m, "seed": 0, "value": 40.0, "evaluation": "knn"} for m in ("mp3", "stop", "ijepa")]
    found = claims(pandas.DataFrame(rows)).set_index("Claim")
    assert list(found.columns) == ["fine-tuned", "k-NN"] and list(found.index) == list(CLAIMS)
    assert list(found.loc["StoP over I-JEPA"]) == ["+1.0 ± 0.1", "+0.0, undecided"]
    assert list(found.loc["MP3: absolute positions over none"]) == ["+0.0 ± 2.5, undecided", "-"]
    assert list(found.loc["RPL over APL"]) == ["not measured yet", "not measured yet"]


def test_arms_of_claims_change_no_rank_and_no_difference_of_the_methods():
    scores = load(RECORDS / "digits" / "scores.csv")
    scores = scores[~scores["method"].isin(ARMS)]
    arm = scores[scores["method"] == "mapet"].assign(method="mapet, masked")
    before, after = (accuracies(one).set_index("Method") for one in (scores, pandas.concat([scores, arm])))
    assert after.drop(index="mapet, masked").equals(before)
    assert after.loc["mapet, masked", "k-NN"] == before.loc["mapet", "k-NN"].partition("\n")[0].partition(",")[0]


@pytest.mark.slow
def test_an_arm_of_a_claim_runs_and_is_complete(tmp_path, monkeypatch):
    call = [*QUICK[:-2], "finetune", "knn", "--papers", "mp3", "--claims", "--seeds", "1", "--out", str(tmp_path)]
    assert main(call) == 0
    scores = load(tmp_path / "compare" / "digits" / "scores.csv")
    found = {name: set(own["evaluation"]) for name, own in scores.groupby("method")}
    assert found["mp3, none"] == found["mp3, relative"] == found["mp3"] - {"knn"} and "finetune_shuffled" in found["mp3, none"]
    monkeypatch.setattr(program, "side_by_side", lambda commands, *_: pytest.fail("trained again") if commands else None)
    assert main(call) == 0


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


def test_scores_that_a_killed_program_did_not_add_are_added_by_the_next(compared, tmp_path, monkeypatch):
    shutil.copytree(compared / "compare", tmp_path / "compare")
    ledger = tmp_path / "compare" / "digits" / "scores.csv"
    whole = load(ledger)
    whole[(whole["method"] != "mae") | (whole["seed"] != 1)].to_csv(ledger, index=False)
    monkeypatch.setattr(program, "side_by_side", lambda commands, *_: pytest.fail("trained again") if commands else None)
    assert main([*QUICK, "--papers", "droppos", "--seeds", "2", "--out", str(tmp_path)]) == 0
    key = ["method", "evaluation", "seed", "draw"]
    assert load(ledger).sort_values(key, ignore_index=True).equals(whole.sort_values(key, ignore_index=True))


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


def test_a_failure_is_the_exit_code_and_is_printed_as_it_is(compared, tmp_path, monkeypatch, capsys):
    def fails(commands, parallel, done, root):
        for log in commands:
            log.parent.mkdir(exist_ok=True)
            log.write_text("error: checkpoint.pt could not be written ([enforce fail at a.cc:672] . 0 MiB free)\n")
            done(log, 2)

    shutil.copytree(compared / "compare", tmp_path / "compare")
    monkeypatch.setattr(program, "side_by_side", fails)
    assert main([*QUICK, "--papers", "droppos", "--seeds", "2", "--out", str(tmp_path)]) == 0  # nothing is missing
    assert main([*QUICK, "--papers", "droppos", "--seeds", "3", "--out", str(tmp_path)]) == 1
    table = capsys.readouterr().out.rpartition("┏")[2]
    assert "[enforce" in table and len(load(tmp_path / "compare" / "digits" / "scores.csv").query("evaluation == 'failed'")) == 3
    assert main([*QUICK, "--papers", "droppos", "--seeds", "1", "--out", str(tmp_path / "new")]) == 2
    assert "no method has a score" in capsys.readouterr().out


def test_a_folder_in_use_and_seeds_of_another_recipe_are_refused(compared, tmp_path, capsys):
    folder = tmp_path / "compare" / "digits"
    shutil.copytree(compared / "compare", tmp_path / "compare")
    plan, more = (folder / "plan.json").read_text(), [*QUICK, "--papers", "droppos", "mp3", "--seeds", "3", "--out", str(tmp_path)]
    with locked(folder / ".lock"):
        assert main(more) == 2 and "in use by another make compare" in " ".join(capsys.readouterr().out.split())
    assert (folder / "plan.json").read_text() == plan  # the running one reads it
    load(folder / "scores.csv").replace({"recipe": {load(folder / "scores.csv")["recipe"].iloc[0]: "0" * 12}}).to_csv(
        folder / "scores.csv", index=False
    )
    shutil.rmtree(folder / "scores")
    assert main(more) == 2 and "seeds of two recipes are no sample" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_unit_has_no_memory_because_its_process_did_not_run_all_of_it(compared, tmp_path):
    folder = tmp_path / "compare" / "digits"
    shutil.copytree(compared / "compare", tmp_path / "compare")
    costs = {score.evaluation for score in read_scores(folder, "mae", 0)}
    run_unit(folder, "mae", 0)
    assert costs - {score.evaluation for score in read_scores(folder, "mae", 0)} == {"cost_memory_gb"}


def test_location_by_block_is_the_mean_over_seeds():
    scores = load(RECORDS / "digits" / "scores.csv")
    own = scores[(scores["method"] == "mp3") & (scores["evaluation"] == "location_2")]["value"]
    assert len(own) == 5 and location(scores).set_index("Method").loc["mp3", 2] == f"{own.mean():.1f}"


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
    assert not [path for path in record.rglob("*.*") if str(compared) in path.read_text()]
    written = json.loads((record / "plan.json").read_text())
    (record / "plan.json").write_text(json.dumps(written | {"data": str(tmp_path / "photographs")}))
    assert "Comparison on photographs" in comparison_page(record).read_text()
    (record / "plan.json").write_text(json.dumps(written))
    assert main(["--device", "cpu", "--table", "--out", str(tmp_path / "none")]) == 0 and "k-NN" in capsys.readouterr().out
    held = {path: path.read_text() for path in [record / "scores.csv", *record.glob("logs/*")]}
    assert main(["--device", "cpu", "--table", "--record", "--out", str(tmp_path / "none")]) == 0  # copied onto itself
    assert {path: path.read_text() for path in held} == held and read_plan(record).epochs == written["epochs"]
    assert verify(tmp_path)[1] == []
    shutil.copytree(record, tmp_path / "out" / "compare" / "digits")  # a recorded comparison goes on without its runs
    monkeypatch.setattr(program, "side_by_side", lambda commands, *_: pytest.fail("trained again") if commands else None)
    assert main([*QUICK, "--papers", "droppos", "--seeds", "2", "--record", "--out", str(tmp_path / "out")]) == 0
    assert len(list((record / "logs").iterdir())) == 6 and verify(tmp_path)[1] == []
    text = (record / "scores.csv").read_text()
    scores = load(record / "scores.csv")
    assert verify(tmp_path)[0][-1] == f"benchmarks/compare/digits: {len(scores)} of {len(scores)} rows verified"
    scores.loc[scores["evaluation"] == "knn", "value"] += 0.01
    scores.to_csv(record / "scores.csv", index=False)
    assert len(verify(tmp_path)[1]) == 6 and "its log says" in verify(tmp_path)[1][0]
    (record / "scores.csv").write_text(text + text.splitlines()[1] + "\n")
    assert "another row is of the same score" in verify(tmp_path)[1][0]


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """A folder with digits in colour, and one with 17 scenes: the left half of an image is dark, the right half is bright."""
    root, data = tmp_path_factory.mktemp("coloured"), open_data("digits").limited(200)
    for split, part in (("train", data.train), ("val", data.val)):
        for index, (image, label) in enumerate(zip(part.images, part.labels.tolist(), strict=True)):
            (root / "digits" / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).convert("RGB").save(root / "digits" / split / str(label) / f"{index}.png")
    class_HW = (numpy.arange(64) >= 32).astype(numpy.uint8)[None].repeat(48, 0)
    for split, count in (("train", 16), ("val", 1)):
        for kind in ("images", "masks"):
            (root / "scenes" / kind / split).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(200 * class_HW + index).convert("RGB").save(root / "scenes" / "images" / split / f"{index}.png")
            Image.fromarray(class_HW).save(root / "scenes" / "masks" / split / f"{index}.png")
    (root / "scenes" / "classes.json").write_text('{"names": ["left", "right"]}')
    return root


@pytest.mark.slow
def test_segmentation_is_one_more_evaluation_where_scenes_are_given(coloured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "RECORDS", tmp_path / "benchmarks" / "compare")
    call = [*QUICK[:-2], "knn", "--data", str(coloured / "digits"), "--papers", "mae", "--seeds", "1", "--out", str(tmp_path)]
    assert main(call) == 0
    scenes = ["--scenes", str(coloured / "scenes")]
    assert main([*call, *scenes]) == 2  # among the evaluations is only knn
    assert "add it to EVALUATIONS" in " ".join(capsys.readouterr().out.split())
    assert main([*call, "--evaluations", "knn", "segmentation", *scenes, "--record"]) == 0
    scores = load(tmp_path / "compare" / "folder" / "scores.csv")
    found = scores[scores["evaluation"] == "segmentation"].set_index("method")
    stages = found["stage"].str.rpartition("/")[2].to_dict()  # rows are in the order in which the units ended
    assert stages == {"from scratch": "segmentation-random", "mae": "segmentation-pretrained"}
    assert found["value"].between(40, 100).all() and (found["note"].str.contains("epochs=32")).all()
    assert not accuracies(scores)["segmentation"].str.contains("nan").any()
    assert verify(tmp_path)[1] == []
    assert read_plan(tmp_path / "benchmarks" / "compare" / "folder").scenes is None  # a path of this machine
    monkeypatch.setattr(program, "side_by_side", lambda commands, *_: pytest.fail("trained again") if commands else None)
    assert main([*call, "--evaluations", "knn", "segmentation"]) == 0  # a comparison keeps its scenes
    assert main([*call, "--evaluations", "segmentation", "--scenes", str(coloured)]) == 2


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
    assert plan.complete(plan.methods["mae"], [score.evaluation for score in scores]) and {
        score.draw for score in scores if "per_class" in score.evaluation
    } == {0, 1}


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
        (["--papers", "dropos"], "PAPERS='dropos' is not known; did you mean droppos or drloc?"),
        (["--evaluations", "kn"], "EVALUATIONS='kn' is not known; did you mean knn?"),
        (["--budget", "image:5"], "BUDGET='image:5': did you mean images?"),
        (["--budget", "images:many"], "the amount is not a number above 0"),
        (["--budget", "images:150"], "two epochs of 240 images are the least"),
        (["--evaluations", "segmentation"], "EVALUATIONS=segmentation needs images with masks: SCENES=/datasets/streets"),
        (["--scenes", "streets"], "SCENES=streets: digits-240 is grey, but segmentation needs encoders of colour images"),
        (["--arena", "cifar10_tuning", "--claims"], "--claims: cifar10_tuning is for trials of one evaluation; leave it out"),
        (["--arena", "cifar10_tuning", "--scenes", "streets"], "SCENES=: cifar10_tuning is for trials of one evaluation"),
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
