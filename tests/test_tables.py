"""Claims about the generated tables."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ledger import tables
from benchmarks.ledger.published import PUBLISHED
from benchmarks.ledger.rows import Row, append, frame, summary
from tests.test_results import ROW

HEADER = ",".join(PUBLISHED)
BASE = "vit_base_patch16_224"
IMAGENET = replace(ROW, recipe="imagenet-b16", data="imagenet1k", backbone=BASE, pretrain_epochs=200, value=82.75)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one paper, two published numbers, no result, and tables not written yet."""
    markers = "<!-- table: {} -->\n<!-- /table -->\n"
    parts = [markers.format(name) for name in ("results", "together", "speed")]
    (tmp_path / "README.md").write_text("# Title\n\n" + "\nbetween\n\n".join(parts) + "\nend")
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "recipe.py").touch()
    (tmp_path / "droppos").mkdir()
    (tmp_path / "droppos" / "recipe.py").touch()
    (tmp_path / "droppos" / "README.md").write_text(markers.format("published") + markers.format("measured"))
    (tmp_path / "droppos" / "published.csv").write_text(
        f"{HEADER}\n"
        f"droppos,README,classification,imagenet1k,DropPos,{BASE},200,,finetune,top1,83.0,README,first_hand\n"
        f"droppos,README,classification,imagenet1k,DropPos,{BASE},800,,finetune,top1,84.2,README,first_hand\n"
        f"droppos,README,classification,imagenet1k,MAE,{BASE},800,,finetune,top1,83.1,README,first_hand\n"
        f"droppos,issue,classification,imagenet1k,DropPos,{BASE},200,own run,finetune,top1,82.91,a user,third_party\n"
        "droppos,listing,detection,coco,DropPos,not_stated,,best,finetune,ap_mask,42.6,aggregator,second_hand\n"
    )
    return tmp_path


def record(root: Path, *rows: Row) -> None:
    """Add rows to the paper's ledger, with their logs."""
    append(root / "droppos" / "results.csv", rows)
    for row in rows:
        (root / row.log).parent.mkdir(exist_ok=True)
        (root / row.log).touch()


def cells(readme: Path, *words: str) -> list[str]:
    """The cells of the only table row in a README that holds all the words."""
    (line,) = [line for line in readme.read_text().splitlines() if line.startswith("|") and all(word in line for word in words)]
    return line.strip("| ").split(" | ")


def test_tables_are_made_from_the_csv_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readmes = [root / "README.md", root / "droppos" / "README.md"]
    untouched = [readme.read_text() for readme in readmes]
    assert tables.main(["--check"], root) == 1
    out = capsys.readouterr().out
    assert re.findall(r"^(\S+): table '(\w+)' is stale.*`make table`$", out, re.MULTILINE) == [
        ("README.md:3", "results"),
        ("README.md:8", "together"),
        ("README.md:13", "speed"),
        ("droppos/README.md:1", "published"),
        ("droppos/README.md:3", "measured"),
    ]
    assert [readme.read_text() for readme in readmes] == untouched, "--check wrote something"
    assert tables.main([], root) == 0
    assert tables.main(["--check"], root) == 0
    written = readmes[0].read_text()
    assert written.startswith("# Title\n\n<!-- table: results -->\n\n| Paper |") and written.endswith("<!-- /table -->\n\nend")
    for path, old, new in [("droppos/published.csv", "84.2", "94.2"), ("README.md", "83.0", "99.0"), ("droppos/README.md", "42.6", "43.6")]:
        (root / path).write_text((root / path).read_text().replace(old, new))
        assert tables.main(["--check"], root) == 1
        assert tables.main([], root) == 0
    assert "94.2" in readmes[0].read_text() and "99.0" not in readmes[0].read_text()


def test_an_unmeasured_published_number_says_not_measured_yet(root: Path) -> None:
    tables.update(root)
    printed = "ViT-B/16 83.0 (200 ep), 84.2 (800 ep)"
    assert cells(root / "README.md", "84.2") == ["droppos", "ImageNet-1K", "finetune", printed, "not measured yet", "-"]
    assert "\n\nnot measured yet\n\n" in (root / "droppos" / "README.md").read_text()


def test_of_a_baseline_the_root_readme_has_what_was_measured_and_its_own_page_all(root: Path) -> None:
    folder = root / "benchmarks" / "baselines"
    folder.mkdir(parents=True)
    (folder / "deit.py").touch()
    (folder / "README.md").write_text("".join(f"<!-- table: {name} deit -->\n<!-- /table -->\n" for name in ("published", "measured")))
    numbers = [("DeiT-B", BASE, "81.8"), ("DeiT-S", "vit_small_patch16_224", "79.8")]
    lines = "".join(
        f"deit,Table 5,classification,imagenet1k,{name},{model},300,,scratch,top1,{n},paper,first_hand\n" for name, model, n in numbers
    )
    (folder / "published.csv").write_text(
        f"{HEADER}\n{lines}mae,Table 3,classification,imagenet1k,MAE,{BASE},1600,,finetune,top1,83.6,paper,first_hand\n"
    )
    row = replace(
        IMAGENET, paper="deit", protocol="scratch", start="scratch", pretrain_epochs=300, value=80.5, log="benchmarks/baselines/logs/a.txt"
    )
    append(folder / "results.csv", [row])
    (folder / "logs").mkdir()
    (root / row.log).touch()
    assert tables.update(root)[1] == []
    ours = "ViT-B/16 DeiT-B 80.50 (-1.30) (300 ep, 1 seed, imagenet-b16)"
    assert cells(root / "README.md", "81.8") == ["deit", "ImageNet-1K", "scratch", "ViT-B/16 DeiT-B 81.8 (300 ep)", ours, f"[0]({row.log})"]
    assert "79.8" not in (root / "README.md").read_text() and "83.6" not in (folder / "README.md").read_text()
    assert cells(folder / "README.md", "79.8") and cells(folder / "README.md", "80.50")[-1] == "[log](logs/a.txt)"


def test_only_what_the_authors_say_of_their_own_method_counts_as_published(root: Path) -> None:
    tables.update(root)
    assert not re.search(r"83\.1|82\.91|42\.6", (root / "README.md").read_text())
    assert cells(root / "droppos" / "README.md", "82.91")[-2:] == ["a user", "third party"]


def test_a_measured_number_stands_beside_the_published_one_it_repeats(root: Path) -> None:
    record(root, IMAGENET, replace(IMAGENET, start="scratch", value=80.0, pretrain_epochs=0, log="droppos/logs/scratch.txt"))
    tables.update(root)
    assert cells(root / "README.md", "83.0")[3:] == [
        "ViT-B/16 83.0 (200 ep), 84.2 (800 ep)",
        "ViT-B/16 82.75 (-0.25) (200 ep, 1 seed, imagenet-b16)",
        f"[0]({IMAGENET.log})",
    ]
    assert cells(root / "droppos" / "README.md", "pretrained")[-3:] == ["0.02", IMAGENET.commit, "[log](logs/2026-11-20-digits-seed0.txt)"]


@pytest.mark.parametrize("change", [{"data": "digits"}, {"backbone": "vit_micro"}, {"pretrain_epochs": 100}, {"protocol": "linear"}])
def test_numbers_of_different_data_are_never_subtracted(root: Path, change: dict) -> None:
    other = replace(IMAGENET, **change)
    record(root, other)
    tables.update(root)
    assert cells(root / "README.md", "83.0")[4] == "not measured yet"
    assert cells(root / "README.md", "82.75")[2] == {"backbone": "vit_micro"}.get(*change, "ViT-B/16")
    said = tables.comparison("droppos", frame([other, replace(other, start="scratch", value=80.0)]), root).iloc[0]
    assert said["Difference"] == "+2.75"
    assert said["Published"] == ("-" if other.protocol == "linear" else "83.0 (ImageNet-1K, ViT-B/16, 200 ep)")


def test_a_run_is_compared_with_its_own_baselines_over_seeds(root: Path) -> None:
    rows = [replace(ROW, seed=seed, value=90.0 + 2 * seed) for seed in range(3)]
    rows += [replace(ROW, seed=seed, value=80.0 + seed, start="scratch", precision="32-true") for seed in range(3)]
    rows += [replace(ROW, recipe="another", start="scratch", value=1.0), replace(ROW, device="another", start="scratch", value=1.0)]
    knn = replace(ROW, protocol="knn", value=95.0)
    rows += [knn, replace(knn, start="random", value=90.0, pretrain_epochs=0), replace(knn, start="pixels", value=97.0)]
    rows += [replace(ROW, protocol="pretrain", metric="position_top1", value=60.0)]
    said = tables.comparison("droppos", frame(rows), root)
    assert said.drop(columns="Published").to_numpy().tolist() == [
        ["finetune", "92.00 ± 2.00", "81.00 ± 1.00", "+11.00"],
        ["knn", "95.00", "90.00", "+5.00"],
        ["knn, raw pixels", "-", "97.00", "-"],
        ["pretrain (position top1)", "60.00", "-", "-"],
    ]
    assert said["Published"].tolist() == ["83.0 (ImageNet-1K, ViT-B/16, 200 ep)", "-", "-", "-"]
    nearer = tables.comparison("droppos", frame([replace(IMAGENET, pretrain_epochs=800)]), root)
    assert nearer["Published"].tolist() == ["84.2 (ImageNet-1K, ViT-B/16, 800 ep)"]


def test_a_number_without_its_log_fails_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(root, ROW, replace(ROW, protocol="linear", value=12.34, log="droppos/logs/lost.txt"))
    (root / "droppos" / "logs" / "lost.txt").unlink()
    assert tables.main([], root) == 1
    assert tables.main(["--check"], root) == 1
    assert "droppos/results.csv: the log 'droppos/logs/lost.txt' is missing" in capsys.readouterr().err
    assert "12.34" not in (root / "README.md").read_text() + (root / "droppos" / "README.md").read_text()
    assert "97.30" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "one\n<!-- table: reslts -->\n<!-- /table -->\n",
            "README.md:2: there is no table 'reslts'; the tables here are results, together",
        ),
        ("one\n\n<!-- table: speed -->\n", "README.md:3: table 'speed' is not closed by"),
        ("<!-- table: speed -->\n<!-- table: results -->\n<!-- /table -->\n", "README.md:1: table 'speed' is not closed by"),
        ("x\n  <!--table:speeed-->  \n", "README.md:2: there is no table 'speeed'"),
        ("<!-- table: speed -->\nlong\nold\n<!-- /table -->\n<!-- /table -->\n", "README.md:5: this marker closes a table"),
    ],
)
def test_unknown_marker_is_named_with_its_line(root: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (root / "README.md").write_text(text)
    assert tables.main(["--check"], root) == tables.main([], root) == 1
    assert message in capsys.readouterr().err
    assert (root / "README.md").read_text() == text


def test_a_readme_that_lost_its_table_fails_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables.update(root)
    (root / "droppos" / "README.md").unlink()
    assert tables.main(["--check"], root) == 1
    assert "droppos/README.md: table 'published' is missing" in capsys.readouterr().err


def test_a_broken_ledger_is_named_and_stops_no_other_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "droppos" / "results.csv").write_text("date,value\n")
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "README.md").write_text("<!-- table: speed -->\n<!-- /table -->\n")
    (root / "benchmarks/speed").mkdir()
    (root / "benchmarks/speed/steps.csv").write_text("step,ratio to a|b\nDropPos,\n")
    assert tables.main([], root) == 1
    assert "droppos/results.csv is not a run ledger" in capsys.readouterr().err
    assert "| Step | Ratio to a\\|b |\n| --- | --- |\n| DropPos | - |\n" in (root / "benchmarks" / "README.md").read_text()


def test_a_paper_of_which_nothing_was_published_has_tables_too(root: Path) -> None:
    (root / "droppos" / "published.csv").write_text(HEADER + "\n")
    record(root, ROW)
    assert tables.update(root)[1] == []
    assert "\n\nnot measured yet\n\n<!-- /table -->\n\nbetween" in (root / "README.md").read_text()
    assert cells(root / "README.md", "97.30")[1] == "droppos"
    assert "no published number is known" in (root / "droppos" / "README.md").read_text()
    assert tables.comparison("unheard_of", frame([ROW]), root)["Published"].tolist() == ["-"]


# ---- arms, which add something to another method


ARMS = {"": 90.0, "+apl": 91.0, "+rpl": 92.5}
SWIN = replace(
    ROW, paper="droppos", recipe="imagenet_swin swin", data="imagenet1k", backbone="swin_base", protocol="scratch", start="scratch"
)


def arms(row: Row, **changes: object) -> list[Row]:
    """Two seeds of a method alone and with two things added."""
    return [
        replace(row, recipe=row.recipe + added, value=value + seed, seed=seed, **changes)
        for added, value in ARMS.items()
        for seed in (0, 2)
    ]


@pytest.fixture
def added(root: Path) -> Path:
    """A repository whose paper adds APL and RPL to others' methods."""
    lines = [HEADER]
    for method, value in [("Swin-B", 83.35), ("Swin-B + APL", 83.76), ("Swin-B + RPL", 84.09)]:
        lines += [
            f"droppos,README,classification,ImageNet-1K,{method},swin_base,,,scratch,{m},{value},README,first_hand"
            for m in ("top1", "top5")
        ]
    (root / "droppos" / "published.csv").write_text("\n".join(lines) + "\n")
    return root


def test_arms_and_published_methods_stand_beside_what_they_are_added_to(added: Path) -> None:
    rows = arms(SWIN) + [replace(row, metric="top5") for row in arms(SWIN)] + arms(replace(SWIN, data="digits", metric="top1"))
    rows += [replace(row, data="digits", metric="top5") for row in arms(SWIN)]
    said = tables.side_by_side("droppos", summary(frame(rows)), added)
    ours = ["91.00 ± 1.41", "92.00 ± 1.41 (+1.00)", "93.50 ± 1.41 (+2.50)"]
    theirs = ["83.35", "83.76 (+0.41)", "84.09 (+0.74)"]
    assert list(said)[5:8] + list(said)[9:12] == ["Alone", "+ APL", "+ RPL", "Published alone", "Published + APL", "Published + RPL"]
    found = {(line.Data, line.Protocol): list(line)[6:9] + list(line)[10:13] for line in said.itertuples()}
    # nobody published of digits, so there the top-5 of ten classes is left out
    assert found == {
        ("ImageNet-1K", "scratch"): ours + theirs,
        ("ImageNet-1K", "scratch (top5)"): ours + theirs,
        ("digits", "scratch"): ours + ["-"] * 3,
    }
    assert set(said["Family"]) == {"swin"}


def test_what_nobody_measured_stands_beside_the_published_numbers_as_such(added: Path) -> None:
    said = tables.side_by_side("droppos", summary(frame(arms(SWIN)[:2])), added)
    top1, top5 = said.to_dict("records")
    assert (top1["Alone"], top1["+ APL"], top1["Published + APL"]) == ("91.00 ± 1.41", "not measured yet", "83.76 (+0.41)")
    assert (top5["Alone"], top5["Log"], top5["Published alone"]) == ("not measured yet", "-", "83.35")


def test_another_recipe_backbone_or_precision_is_never_taken_for_the_method_alone(added: Path) -> None:
    for change in ({"recipe": "imagenet_swin swin lr=1"}, {"recipe": "other swin"}, {"backbone": "swin_tiny"}, {"precision": "32-true"}):
        rows = arms(SWIN)[-2:] + [replace(row, **change) for row in arms(SWIN)[:2]]
        said = tables.side_by_side("droppos", summary(frame(rows)), added)
        assert [cell for cell in said["+ RPL"] if "93.50" in cell] == ["93.50 ± 1.41"], change
        assert tables.comparison("droppos", frame(rows), added)["Difference"].tolist() == ["-", "-"], change


def test_a_start_without_pretraining_is_the_baseline_of_every_arm(added: Path) -> None:
    mae = replace(ROW, recipe="digits_mae mae", protocol="finetune")
    rows = arms(mae) + [replace(mae, start="scratch", value=80.0, pretrain_epochs=0)]
    said = tables.side_by_side("droppos", summary(frame(rows)), added).iloc[0]
    assert said[["Alone", "+ RPL", "From scratch"]].tolist() == ["91.00 ± 1.41", "93.50 ± 1.41 (+2.50)", "80.00"]
    assert tables.comparison("droppos", frame(rows), added)["Difference"].tolist() == ["+11.00", "+12.00", "+13.50"]
    knn = replace(mae, protocol="knn")
    rows = [knn, replace(knn, start="random", value=40.0), replace(knn, start="pixels", value=95.0)]
    said = tables.side_by_side("droppos", summary(frame(rows)), added).iloc[0]
    assert said["From scratch"] == "40.00, random encoder; 95.00, raw pixels"


def test_a_paper_that_adds_nothing_to_others_needs_no_side_by_side_table(root: Path) -> None:
    tables.update(root)
    assert tables.update(root)[1] == []
    record(root, *arms(SWIN))
    assert [fault for fault in tables.update(root)[1] if "'side by side' is missing" in fault]


# ---- the root README's two tables


def print_numbers(root: Path, *lines: str) -> None:
    """Make the paper's published numbers anew: of each the cells from task to value. All are first-hand."""
    (root / "droppos" / "published.csv").write_text("\n".join([HEADER, *(f"droppos,T,{line},paper,first_hand" for line in lines)]) + "\n")


def lines_of(root: Path, name: str) -> list[dict[str, str]]:
    """The lines of a table of the root README, by its headings."""
    _, found = tables.update(root)
    assert all("is missing" in fault for fault in found), found
    text = (root / "README.md").read_text().partition(f"<!-- table: {name} -->")[2].partition("<!-- /table -->")[0]
    heads, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")] or [[], []]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_numbers_of_one_paper_data_set_and_protocol_share_a_line_and_one_printed_twice_is_told_once(root: Path) -> None:
    large = "vit_large_patch16_224"
    print_numbers(
        root,
        f"classification,imagenet1k,DropPos,{BASE},200,,finetune,top1,83.0",
        f"classification,imagenet1k,DropPos,{large},800,,finetune,top1,85.8",
        f"transfer,cifar10,DropPos,{BASE},200,,finetune,top1,97.0",
        f"linear_probe,imagenet1k,DropPos,{BASE},200,last,linear_last,top1,60.1",
        f"linear_probe,imagenet1k,DropPos,{BASE},200,last,linear_last,top1,60.1",
        f"low_shot,imagenet1k,DropPos,{BASE},200,,logistic_1pct,top1,50.2",
        f"classification,imagenet1k,DropPos,{BASE},800,,finetune,top1,84.2",
    )
    assert [(line["Data"], line["Protocol"], line["Published"]) for line in lines_of(root, "results")] == [
        ("ImageNet-1K", "finetune", "ViT-B/16 83.0 (200 ep), 84.2 (800 ep); ViT-L/16 85.8 (800 ep)"),
        ("ImageNet-1K", "linear last", "ViT-B/16 60.1 (200 ep)"),
        ("ImageNet-1K", "logistic 1pct", "ViT-B/16 50.2 (200 ep)"),
        ("CIFAR-10", "finetune", "ViT-B/16 97.0 (200 ep)"),
    ]


def test_ablations_gains_and_other_tasks_stay_on_the_papers_page(root: Path) -> None:
    kept = f"classification,imagenet1k,DropPos,{BASE},200,,finetune,top1,11.1"
    others = [("ablation", "top1"), ("classification", "top1_gain"), ("classification", "top5"), ("detection", "top1")]
    print_numbers(root, kept, *(f"{task},imagenet1k,DropPos,{BASE},200,,finetune,{metric},22.2" for task, metric in others))
    assert [line["Published"] for line in lines_of(root, "results")] == ["ViT-B/16 11.1 (200 ep)"]
    assert (root / "droppos" / "README.md").read_text().count("22.2") == len(others)


def test_what_sets_the_numbers_of_a_line_apart_is_told_and_what_they_share_is_not(root: Path) -> None:
    row = f"{BASE},200,{{}},finetune,top1,{{}}"
    many = [("cifar10", "position=none", 90.1), ("cifar10", "position=2D relative", 90.2), ("cifar100", "best of two", 70.1)]
    many += [("tiny-imagenet", "", 60.1), ("tiny-imagenet", "longer", 60.2)]
    print_numbers(root, *(f"classification,{data},DropPos," + row.format(setting, value) for data, setting, value in many))
    record(root, replace(IMAGENET, data="cifar10", protocol="finetune_2d_relative", value=90.0))
    assert [(line["Protocol"], line["Published"]) for line in lines_of(root, "results")] == [
        ("finetune, by position", "ViT-B/16 90.1 (200 ep, none), 90.2 (200 ep, 2D relative)"),
        ("finetune", "ViT-B/16 70.1 (200 ep)"),
        ("finetune", "ViT-B/16 60.1 (200 ep), 60.2 (200 ep, longer)"),
    ]
    assert lines_of(root, "results")[0]["Ours"] == "ViT-B/16 90.00 (-0.20) (200 ep, 2D relative, 1 seed, imagenet-b16)"


def test_a_published_number_of_something_added_stands_beside_that_arm_and_no_other(added: Path) -> None:
    others = [replace(SWIN, recipe=recipe, value=1.0) for recipe in ("imagenet_swin", "imagenet_swin swin+other")]
    record(added, *arms(SWIN), *others)
    (line,) = lines_of(added, "results")
    assert line["Published"] == "Swin-B + APL 83.76, + RPL 84.09"
    told = "(100 ep, 2 seeds, imagenet_swin swin+"  # the paper does not say how many epochs
    assert line["Ours"] == f"Swin-B + APL 92.00 ± 1.41 (+8.24) {told}apl), + RPL 93.50 ± 1.41 (+9.41) {told}rpl)"
    alone = tables.comparison("droppos", frame(arms(SWIN)[:2]), added)
    assert alone["Published"].tolist() == ["-"]


def test_a_method_that_does_not_name_its_backbone_is_told_with_it(root: Path) -> None:
    large = "vit_large_patch16_224"
    linear = "linear_probe,imagenet1k,{},{},600,last,linear_last,top1,{}"
    lines = [("I-JEPA", BASE, 70.9), ("I-JEPA + StoP", BASE, 72.6), ("I-JEPA + StoP", large, 77.1)]
    print_numbers(root, *(linear.format(*line) for line in lines))
    stop = replace(IMAGENET, recipe="imagenet ijepa+stop", protocol="linear_last", pretrain_epochs=600, value=72.5)
    record(root, stop, replace(stop, recipe="imagenet ijepa", value=71.0), replace(stop, recipe="imagenet ijepa+stop lr=1", value=72.0))
    (line,) = lines_of(root, "results")
    assert line["Published"] == "ViT-B/16 I-JEPA + StoP 72.6 (600 ep); ViT-L/16 I-JEPA + StoP 77.1 (600 ep)"
    assert line["Ours"] == (
        "ViT-B/16 I-JEPA + StoP 72.50 (-0.10) (600 ep, 1 seed, imagenet ijepa+stop), "
        "+ StoP 72.00 (-0.60) (600 ep, 1 seed, imagenet ijepa+stop lr=1)"
    )


def test_the_best_by_the_test_images_stands_apart_from_that_by_held_out_ones_and_both_beside_what_was_published(root: Path) -> None:
    print_numbers(root, f"linear_probe,imagenet1k,DropPos,{BASE},200,,linear_best,top1,72.9")
    held_out = replace(IMAGENET, protocol="linear_best", value=72.0)
    rows = [held_out, replace(held_out, protocol="linear_best_on_test", value=73.0)]
    record(root, *rows)
    (line,) = lines_of(root, "results")
    assert line["Ours"] == (
        "ViT-B/16 72.00 (-0.90) (200 ep, 1 seed, imagenet-b16), 73.00 (+0.10) (200 ep, chosen on test, 1 seed, imagenet-b16)"
    )
    (line,) = lines_of(root, "together")
    assert line["Linear"] == "72.00 (best), 73.00 (best on test)"
    shown = tables.comparison("droppos", frame(rows), root)
    assert dict(zip(shown["Protocol"], shown["Published"], strict=True)) == dict.fromkeys(
        ["linear best", "linear best on test"], "72.9 (ImageNet-1K, ViT-B/16, 200 ep)"
    )
    assert {"linear best", "linear best on test"} <= {cell.strip() for cell in (root / "droppos" / "README.md").read_text().split("|")}


def test_runs_of_one_recipe_on_two_devices_are_told_apart(root: Path) -> None:
    record(root, IMAGENET, replace(IMAGENET, device="H100", value=82.9), replace(IMAGENET, device="H100", precision="32-true", value=83.1))
    (line,) = lines_of(root, "results")
    shared = "(200 ep, 1 seed, imagenet-b16"
    assert line["Ours"].count(shared) == 3 and f"82.90 (-0.10) {shared}, H100, bf16-mixed)" in line["Ours"]
    measured = [(line["Device"], line["Fine-tuned"]) for line in lines_of(root, "together")]
    assert measured == [("2-core Intel Xeon, bf16-mixed", "82.75"), ("H100, 32-true", "83.10"), ("H100, bf16-mixed", "82.90")]


def test_protocols_stand_in_one_line_per_run_and_those_of_a_kind_in_one_cell(root: Path) -> None:
    values = {"knn": 70, "linear_last": 71, "linear": 72, "linear_last4": 73, "finetune_5_per_class": 74, "finetune": 75, "rotation_2x": 76}
    record(root, *(replace(ROW, protocol=name, value=value, seed=seed) for name, value in values.items() for seed in (0, 1)))
    record(root, replace(ROW, protocol="knn", value=70, seed=2), replace(ROW, metric="top5", value=99.0))
    (line,) = lines_of(root, "together")
    assert list(line) == "Data Method Backbone Epochs Seeds Fine-tuned".split() + ["5 per class", "Linear", "k-NN", "rotation 2x", "Log"]
    assert list(line.values())[:6] == ["digits", "droppos", "vit_micro", "100", "2 to 3", "75.00 ± 0.00"]
    assert line["Linear"] == "72.00 ± 0.00, 71.00 ± 0.00 (last), 73.00 ± 0.00 (last4)" and line["rotation 2x"] == "76.00 ± 0.00"


def papers_that_measured(root: Path, *names: str) -> None:
    """More papers, of which nothing was published."""
    for name in names:
        (root / name).mkdir()
        (root / name / "recipe.py").touch()
        (root / name / "README.md").write_text("".join(f"<!-- table: {mark} -->\n<!-- /table -->\n" for mark in ("published", "measured")))


def baselines_of(row: Row, **changes: float) -> list[Row]:
    """A run of a paper with its baselines, whose numbers are given by protocol."""
    starts = {"finetune": "scratch", "knn": "random", "linear": "random"}
    rows = [row, replace(row, protocol="knn", value=88.0), replace(row, protocol="knn", start="pixels", value=98.0)]
    return rows + [replace(row, protocol=name, start=starts[name], value=value) for name, value in changes.items()]


def test_baselines_on_which_methods_agree_are_told_once_and_the_others_by_name(root: Path) -> None:
    papers_that_measured(root, "mp3", "stop")
    values = {"droppos": {"finetune": 80.0, "knn": 40.0}, "mp3": {"finetune": 80.0, "linear": 50.0}, "stop": {"finetune": 79.0}}
    for paper, changes in values.items():
        rows = baselines_of(replace(ROW, paper=paper, log=f"{paper}/logs/0.txt"), **changes)
        append(root / paper / "results.csv", rows)
        (root / paper / "logs").mkdir()
        (root / rows[0].log).touch()
    names = ["Method", "Epochs", "Fine-tuned", "Linear", "k-NN", "Log"]
    logs = {paper: f"[0]({paper}/logs/0.txt)" for paper in values}
    assert [[line[name] for name in names] for line in lines_of(root, "together")] == [
        *([paper, "100", "97.30", "-", "88.00", logs[paper]] for paper in values),
        ["no pre-training: droppos, mp3", "0", "80.00", "50.00", "40.00", "[0](droppos/logs/0.txt), [1](mp3/logs/0.txt)"],
        ["no pre-training: stop", "0", "79.00", "-", "-", logs["stop"]],
        ["raw pixels", "0", "-", "-", "98.00", logs["droppos"]],
    ]


def test_baselines_without_a_protocol_or_a_device_in_common_stay_apart(root: Path) -> None:
    record(root, replace(ROW, start="scratch", value=80.0), replace(ROW, start="scratch", value=80.0, device="H100"))
    record(root, replace(ROW, recipe="other", protocol="linear", start="random", value=80.0))
    record(root, *(replace(ROW, protocol="knn", start="pixels", recipe=recipe, value=len(recipe)) for recipe in ("digits", "digits k=5")))
    found = [(line["Method"], line["Device"].split(",")[0], line["Fine-tuned"], line["Linear"]) for line in lines_of(root, "together")]
    assert found == [
        ("no pre-training: droppos", "2-core Intel Xeon", "80.00", "-"),
        ("no pre-training: droppos", "H100", "80.00", "-"),
        ("no pre-training: droppos other", "2-core Intel Xeon", "-", "80.00"),
        ("raw pixels: droppos", "2-core Intel Xeon", "-", "-"),
        ("raw pixels: droppos k=5", "2-core Intel Xeon", "-", "-"),
    ]


def test_changes_epochs_backbones_and_recipes_are_lines_that_can_be_told_apart(root: Path) -> None:
    record(root, *baselines_of(ROW, finetune=80.0), *baselines_of(replace(ROW, pretrain_epochs=300), finetune=81.0))
    record(root, replace(ROW, recipe="digits lr=1"), replace(ROW, recipe="digits_mae mae lr=1"), replace(ROW, backbone="vit_nano"))
    assert [(line["Method"], line["Backbone"], line["Epochs"]) for line in lines_of(root, "together")] == [
        ("droppos", "vit_micro", "100"),
        ("droppos", "vit_micro", "300"),
        ("droppos lr=1", "vit_micro", "100"),
        ("droppos digits_mae mae lr=1", "vit_micro", "100"),
        ("no pre-training: droppos 100 ep", "vit_micro", "0"),
        ("no pre-training: droppos 300 ep", "vit_micro", "0"),
        ("droppos", "vit_nano", "100"),
        ("raw pixels", "-", "0"),
    ]


def test_supervised_methods_are_marked_and_have_a_line_for_all_that_is_added(root: Path) -> None:
    record(root, *arms(replace(SWIN, recipe="digits swin", data="digits")), *arms(replace(ROW, recipe="digits_mae mae")))
    record(root, replace(SWIN, recipe="digits swin", data="digits", protocol="knn", start="pretrained", value=66.0))
    found = [(line["Method"], line["Fine-tuned"], line["k-NN"]) for line in lines_of(root, "together")]
    swin = "91.00 ± 1.41, 92.00 ± 1.41 (+apl), 93.50 ± 1.41 (+rpl)"
    assert sorted(found) == [
        ("droppos digits_mae mae", "91.00 ± 1.41", "-"),
        ("droppos digits_mae mae+apl", "92.00 ± 1.41", "-"),
        ("droppos digits_mae mae+rpl", "93.50 ± 1.41", "-"),
        ("droppos swin, supervised", swin, "66.00"),
    ]
