"""Tests of the generated tables."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ledger import tables
from benchmarks.ledger.__main__ import main, update
from benchmarks.ledger.published import PUBLISHED, REPRODUCTIONS
from benchmarks.ledger.rows import Row, append, frame, summary
from tests.test_results import ROW

HEADER = ",".join(PUBLISHED)
BASE = "vit_base_patch16_224"
DEVICE = f"{ROW.device}, {ROW.precision}"
IMAGENET = replace(ROW, recipe="imagenet-b16", data="imagenet1k", backbone=BASE, pretrain_epochs=200, value=82.75)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one paper, two published results, no measured result, and empty tables."""
    markers = "<!-- table: {} -->\n<!-- /table -->\n"
    for page, names in {"README.md": ("speed",), "RESULTS.md": ("results", "together", "comparisons")}.items():
        (tmp_path / page).write_text("# Title\n\n" + "\nbetween\n\n".join(markers.format(name) for name in names) + "\nend")
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
    """Return the cells of the only table row in a README that contains all the words."""
    (line,) = [line for line in readme.read_text().splitlines() if line.startswith("|") and all(word in line for word in words)]
    return line.strip("| ").split(" | ")


def test_tables_are_generated_only_from_the_csv_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readmes = [root / "README.md", root / "RESULTS.md", root / "droppos" / "README.md"]
    untouched = [readme.read_text() for readme in readmes]
    assert main(["--check"], root) == 1
    out = capsys.readouterr().out
    assert re.findall(r"^(\S+): table '(\w+)' is out of date.*`make table`$", out, re.MULTILINE) == [
        ("README.md:3", "speed"),
        ("RESULTS.md:3", "results"),
        ("RESULTS.md:8", "together"),
        ("RESULTS.md:13", "comparisons"),
        ("droppos/README.md:1", "published"),
        ("droppos/README.md:3", "measured"),
    ]
    assert [readme.read_text() for readme in readmes] == untouched, "--check wrote something"
    assert main([], root) == 0
    assert main(["--check"], root) == 0
    written = readmes[1].read_text()
    assert written.startswith("# Title\n\n<!-- table: results -->\n\nNo published") and written.endswith("<!-- /table -->\n\nend")
    for path, old, new in [
        ("droppos/published.csv", "84.2", "94.2"),
        ("RESULTS.md", "83.0", "99.0"),
        ("droppos/README.md", "42.6", "43.6"),
    ]:
        (root / path).write_text((root / path).read_text().replace(old, new))
        assert main(["--check"], root) == 1
        assert main([], root) == 0
    assert "94.2" in readmes[1].read_text() and "99.0" not in readmes[1].read_text()


def test_published_results_not_measured_yet_are_folded_by_paper(root: Path) -> None:
    update(root)
    text = (root / "RESULTS.md").read_text()
    before, _, fold = text.partition("\n<details><summary>droppos: 2 published numbers, not measured yet</summary>\n\n| Data |")
    assert "84.2" in fold.partition("\n\n</details>\n")[0] and "84.2" not in before and text.count("<details>") == 1
    assert cells(root / "RESULTS.md", "84.2") == ["ImageNet-1K", "DropPos", "ViT-B/16", "-", "800", "finetune", "84.2"]
    assert "\n\nnot measured yet\n\n" in (root / "droppos" / "README.md").read_text()
    record(root, IMAGENET)
    update(root)
    before, _, fold = (root / "RESULTS.md").read_text().partition("\n<details><summary>droppos: 1 published number, not measured yet")
    assert "83.0" in before and "84.2" in fold and "83.0" not in fold.partition("</details>")[0]


def test_reports_of_others_stand_beside_the_published_number_that_they_repeat(root: Path) -> None:
    update(root)
    assert "Others' reproductions" not in (root / "droppos" / "README.md").read_text()
    report = f"droppos,imagenet1k,DropPos,{BASE},{{}},finetune,top1,{{}},{{}},{{}},https://example.org/{{}}\n".format
    (root / "droppos" / "reproductions.csv").write_text(
        ",".join(REPRODUCTIONS) + "\n" + report(200, "82.9", "a user", "own run", 1) + report(200, "82.8", "another", "", 2)
    )
    update(root)
    page = root / "droppos" / "README.md"
    said = "82.9 ([a user](https://example.org/1), own run)<br>82.8 ([another](https://example.org/2))"
    assert cells(page, "83.0")[-1] == said and page.read_text().count("example.org") == 2
    assert cells(page, "84.2")[-1] == "-" and cells(page, "own run", "third party")[-1] == "-"
    with (root / "droppos" / "reproductions.csv").open("a") as file:
        file.write(report(400, "83.7", "a user", "", 3))
    update(root)
    assert cells(page, "83.7") == [
        *["DropPos", BASE, "ImageNet-1K", "400", "-", "finetune", "top1", "-", "-", "-", "83.7 ([a user](https://example.org/3))"]
    ]


def test_results_list_only_measured_baseline_results_and_the_baseline_page_all(root: Path) -> None:
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
    assert update(root)[1] == []
    shown = cells(root / "RESULTS.md", "81.8")
    assert shown[:7] == ["deit", "ImageNet-1K", "DeiT-B", "ViT-B/16", "-", "300", "scratch"]
    assert shown[7:11] == ["81.8", "80.50", "-1.30", "1"] and shown[11:] == ["imagenet-b16", DEVICE, "[logs](benchmarks/baselines/logs)"]
    assert "79.8" not in (root / "RESULTS.md").read_text() and "83.6" not in (folder / "README.md").read_text()
    assert cells(folder / "README.md", "79.8") and cells(folder / "README.md", "80.50")[-1] == "[log](logs/a.txt)"


def test_only_the_authors_results_of_their_own_method_count_as_published(root: Path) -> None:
    update(root)
    assert not re.search(r"83\.1|82\.91|42\.6", (root / "RESULTS.md").read_text())
    assert cells(root / "droppos" / "README.md", "82.91")[-2:] == ["a user", "third party"]


def test_a_measured_result_is_next_to_the_published_result_it_reproduces(root: Path) -> None:
    record(root, IMAGENET, replace(IMAGENET, start="scratch", value=80.0, pretrain_epochs=0, log="droppos/logs/scratch.txt"))
    update(root)
    assert cells(root / "RESULTS.md", "83.0")[5:12] == ["200", "finetune", "83.0", "82.75", "-0.25", "1", "imagenet-b16"]
    assert cells(root / "RESULTS.md", "83.0")[-1] == "[logs](droppos/logs)"
    assert cells(root / "droppos" / "README.md", "pretrained")[-3:] == ["0.02", IMAGENET.commit, "[log](logs/2026-11-20-digits-seed0.txt)"]


@pytest.mark.parametrize("change", [{"data": "digits"}, {"backbone": "vit_micro"}, {"pretrain_epochs": 100}, {"protocol": "linear"}])
def test_no_difference_is_computed_between_results_of_different_settings(root: Path, change: dict) -> None:
    other = replace(IMAGENET, **change)
    record(root, other)
    update(root)
    assert "droppos: 2 published numbers, not measured yet" in (root / "RESULTS.md").read_text()
    assert cells(root / "RESULTS.md", "82.75")[2] == {"backbone": "vit_micro"}.get(*change, "ViT-B/16")
    said = tables.comparison("droppos", frame([other, replace(other, start="scratch", value=80.0)]), root).iloc[0]
    assert said["Difference"] == "+2.75"
    near = other.protocol == "finetune" and other.data == "imagenet1k"
    assert said.get("Published") == ("83.0 (ImageNet-1K, ViT-B/16, 200 ep)" if near else None)


def test_a_run_is_compared_to_its_own_baselines_over_seeds(root: Path) -> None:
    rows = [replace(ROW, seed=seed, value=90.0 + 2 * seed) for seed in range(3)]
    rows += [replace(ROW, seed=seed, value=80.0 + seed, start="scratch", precision="32-true") for seed in range(3)]
    rows += [replace(ROW, recipe="another", start="scratch", value=1.0), replace(ROW, device="another", start="scratch", value=1.0)]
    knn = replace(ROW, protocol="knn", value=95.0)
    rows += [knn, replace(knn, start="random", value=90.0, pretrain_epochs=0), replace(knn, start="pixels", value=97.0)]
    rows += [replace(ROW, protocol="pretrain", metric="position_top1", value=60.0)]
    said = tables.comparison("droppos", frame(rows), root)
    assert said.to_numpy().tolist() == [
        ["finetune", "92.00 ± 2.00", "81.00 ± 1.00", "+11.00"],
        ["knn", "95.00", "90.00", "+5.00"],
        ["knn, raw pixels", "-", "97.00", "-"],
        ["pretrain (position top1)", "60.00", "-", "-"],
    ]
    nearer = tables.comparison("droppos", frame([replace(IMAGENET, pretrain_epochs=800), replace(IMAGENET, protocol="knn")]), root)
    assert nearer.set_index("Protocol")["Published"].to_dict() == {"finetune": "84.2 (ImageNet-1K, ViT-B/16, 800 ep)", "knn": "-"}


def shown(capsys: pytest.CaptureFixture[str], root: Path, *rows: Row) -> str:
    """Return the printed table of a run, in one line."""
    tables.show("droppos", rows, root)
    return " ".join(capsys.readouterr().out.split())


def test_a_published_result_on_other_data_is_printed_below_the_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, root, ROW, replace(ROW, start="scratch", value=80.0))
    table, _, below = said.partition("The paper reports ")
    assert "97.30 │ 80.00 │ +17.30 │" in table and "Published" not in table and "83.0" not in table
    assert below == "finetune 83.0 on ImageNet-1K (ViT-B/16, 200 epochs); all published numbers: droppos/README.md"
    same = shown(capsys, root, IMAGENET)
    assert "Published" in same and "83.0 (ImageNet-1K" in same and "The paper reports" not in same


def test_without_a_published_result_of_the_protocol_the_first_one_is_printed_if_any(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "The paper reports finetune 83.0 on ImageNet-1K" in shown(capsys, root, replace(ROW, protocol="knn"))
    (root / "droppos" / "published.csv").unlink()
    assert shown(capsys, root, ROW).endswith("No published number of droppos is known.")


def test_arms_are_printed_side_by_side_above_published_results_on_other_data(added: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, added, *arms(replace(SWIN, data="digits", overrides="lr=1")))
    assert re.search(r"│ swin │ scratch │ 91.00 ± 1.41 │ 92.00 ± 1.41 │ 93.50 ± 1.41 │ .*\(\+1.00\) │ \(\+2.50\)", said)
    assert "Published" not in said
    assert said.endswith(
        "The paper reports scratch 83.76 on ImageNet-1K (Swin-B + APL, swin_base); all published numbers: droppos/README.md"
    )
    assert "84.09" in shown(capsys, added, *arms(SWIN))


def test_a_result_without_its_log_fails_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(root, ROW, replace(ROW, protocol="linear", value=12.34, log="droppos/logs/lost.txt"))
    (root / "droppos" / "logs" / "lost.txt").unlink()
    assert main([], root) == 1
    assert main(["--check"], root) == 1
    assert "droppos/results.csv: the log 'droppos/logs/lost.txt' is missing" in capsys.readouterr().err
    assert "12.34" not in (root / "RESULTS.md").read_text() + (root / "droppos" / "README.md").read_text()
    assert "97.30" in (root / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "one\n<!-- table: reslts -->\n<!-- /table -->\n",
            "README.md:2: there is no table 'reslts'; the tables here are speed",
        ),
        ("one\n\n<!-- table: speed -->\n", "README.md:3: table 'speed' is not closed by"),
        ("<!-- table: speed -->\n<!-- table: speed -->\n<!-- /table -->\n", "README.md:1: table 'speed' is not closed by"),
        ("x\n  <!--table:speeed-->  \n", "README.md:2: there is no table 'speeed'"),
        ("<!-- table: speed -->\nlong\nold\n<!-- /table -->\n<!-- /table -->\n", "README.md:5: this marker closes a table"),
    ],
)
def test_a_wrong_marker_is_reported_with_its_line(root: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (root / "README.md").write_text(text)
    assert main(["--check"], root) == main([], root) == 1
    assert message in capsys.readouterr().err
    assert (root / "README.md").read_text() == text


def test_a_missing_table_in_a_readme_fails_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    update(root)
    (root / "droppos" / "README.md").unlink()
    assert main(["--check"], root) == 1
    assert "droppos/README.md: table 'published' is missing" in capsys.readouterr().err


def test_a_broken_ledger_is_reported_and_other_tables_are_still_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "droppos" / "results.csv").write_text("date,value\n")
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "README.md").write_text("<!-- table: speed -->\n<!-- /table -->\n")
    (root / "benchmarks/speed").mkdir()
    (root / "benchmarks/speed/steps.csv").write_text("step,ratio to a|b\nDropPos,\n")
    assert main([], root) == 1
    assert "droppos/results.csv is not a run ledger" in capsys.readouterr().err
    assert "| Step | Ratio to a\\|b |\n| --- | --- |\n| DropPos | - |\n" in (root / "benchmarks" / "README.md").read_text()


def test_a_paper_without_published_results_also_has_tables(root: Path) -> None:
    (root / "droppos" / "published.csv").write_text(HEADER + "\n")
    record(root, ROW)
    assert update(root)[1] == []
    assert "\n\nNo published number is measured yet.\n\n<!-- /table -->\n\nbetween" in (root / "RESULTS.md").read_text()
    assert cells(root / "RESULTS.md", "97.30")[1] == "droppos"
    assert "no published number is known" in (root / "droppos" / "README.md").read_text()
    assert "Published" not in tables.comparison("unheard_of", frame([ROW]), root)


# ---- arms: another method with an addition


ARMS = {"": 90.0, "+apl": 91.0, "+rpl": 92.5}
SWIN = replace(ROW, recipe="imagenet_swin", arm="swin", data="imagenet1k", backbone="swin_base", protocol="scratch", start="scratch")
MAE = replace(ROW, recipe="digits_mae", arm="mae")


def arms(row: Row, **changes: object) -> list[Row]:
    """Two seeds of a method alone and with each of two additions."""
    return [
        replace(row, arm=row.arm + added, base_arm=row.arm if added else "", value=value + seed, seed=seed, **changes)
        for added, value in ARMS.items()
        for seed in (0, 2)
    ]


@pytest.fixture
def added(root: Path) -> Path:
    """A repository with a paper that adds APL and RPL to other methods."""
    lines = [HEADER]
    for method, value in [("Swin-B", 83.35), ("Swin-B + APL", 83.76), ("Swin-B + RPL", 84.09)]:
        lines += [
            f"droppos,README,classification,ImageNet-1K,{method},swin_base,,,scratch,{m},{value},README,first_hand"
            for m in ("top1", "top5")
        ]
    (root / "droppos" / "published.csv").write_text("\n".join(lines) + "\n")
    return root


def test_arms_and_published_methods_are_next_to_their_base_method(added: Path) -> None:
    rows = arms(SWIN) + [replace(row, metric="top5") for row in arms(SWIN)] + arms(replace(SWIN, data="digits", metric="top1"))
    rows += [replace(row, data="digits", metric="top5") for row in arms(SWIN)]
    said = tables.side_by_side("droppos", summary(frame(rows)), added)
    ours = ["91.00 ± 1.41", "92.00 ± 1.41 (+1.00)", "93.50 ± 1.41 (+2.50)"]
    theirs = ["83.35", "83.76 (+0.41)", "84.09 (+0.74)"]
    assert list(said)[5:8] + list(said)[9:12] == ["Alone", "+ APL", "+ RPL", "Published alone", "Published + APL", "Published + RPL"]
    found = {(line.Data, line.Protocol): list(line)[6:9] + list(line)[10:13] for line in said.itertuples()}
    # no published result on digits, so the top-5 of ten classes is left out there
    assert found == {
        ("ImageNet-1K", "scratch"): ours + theirs,
        ("ImageNet-1K", "scratch (top5)"): ours + theirs,
        ("digits", "scratch"): ours + ["-"] * 3,
    }
    assert set(said["Family"]) == {"swin"}


def test_missing_results_are_marked_as_not_measured_next_to_the_published_ones(added: Path) -> None:
    said = tables.side_by_side("droppos", summary(frame(arms(SWIN)[:2])), added)
    top1, top5 = said.to_dict("records")
    assert (top1["Alone"], top1["+ APL"], top1["Published + APL"]) == ("91.00 ± 1.41", "not measured yet", "83.76 (+0.41)")
    assert (top5["Alone"], top5["Log"], top5["Published alone"]) == ("not measured yet", "-", "83.35")


def test_the_base_of_an_arm_has_the_same_recipe_backbone_and_precision(added: Path) -> None:
    changes = [{"overrides": "lr=1"}, {"recipe": "other"}, {"arm": "swin_v2"}, {"backbone": "swin_tiny"}, {"precision": "32-true"}]
    for change in [*changes, {"split": "a"}, {"encoder_file": "a.pth"}]:
        rows = arms(SWIN)[-2:] + [replace(row, **change) for row in arms(SWIN)[:2]]
        said = tables.side_by_side("droppos", summary(frame(rows)), added)
        assert [cell for cell in said["+ RPL"] if "93.50" in cell] == ["93.50 ± 1.41"], change
        assert tables.comparison("droppos", frame(rows), added)["Difference"].tolist() == ["-", "-"], change


def test_a_run_without_pre_training_is_the_baseline_of_every_arm(added: Path) -> None:
    rows = arms(MAE) + [replace(MAE, start="scratch", value=80.0, pretrain_epochs=0)]
    said = tables.side_by_side("droppos", summary(frame(rows)), added).iloc[0]
    assert said[["Alone", "+ RPL", "From scratch"]].tolist() == ["91.00 ± 1.41", "93.50 ± 1.41 (+2.50)", "80.00"]
    assert tables.comparison("droppos", frame(rows), added)["Difference"].tolist() == ["+11.00", "+12.00", "+13.50"]
    knn = replace(MAE, protocol="knn")
    rows = [knn, replace(knn, start="random", value=40.0), replace(knn, start="pixels", value=95.0)]
    said = tables.side_by_side("droppos", summary(frame(rows)), added).iloc[0]
    assert said["From scratch"] == "40.00, random encoder; 95.00, raw pixels"


def test_only_papers_with_arms_need_a_side_by_side_table(root: Path) -> None:
    update(root)
    assert update(root)[1] == []
    record(root, *arms(SWIN))
    assert [fault for fault in update(root)[1] if "'side by side' is missing" in fault]


# ---- RESULTS.md


def write_published(root: Path, *lines: str) -> None:
    """Write the paper's published results: each line has the cells from task to value. All are first-hand."""
    (root / "droppos" / "published.csv").write_text("\n".join([HEADER, *(f"droppos,T,{line},paper,first_hand" for line in lines)]) + "\n")


def lines_of(root: Path, name: str, page: str = "RESULTS.md") -> list[dict[str, str]]:
    """Return the rows of the first table after a marker of a page, by heading, also if it is folded."""
    _, found = update(root)
    assert all("is missing" in fault for fault in found), found
    text = (root / page).read_text().partition(f"<!-- table: {name} -->")[2].partition("<!-- /table -->")[0]
    (first, *_) = [part for part in text.split("\n\n") if part.startswith("|")] or ["| |\n| |"]
    heads, _, *rows = [line.strip("| ").split(" | ") for line in first.strip().splitlines()]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_every_published_result_has_exactly_one_row(root: Path) -> None:
    large = "vit_large_patch16_224"
    write_published(
        root,
        f"classification,imagenet1k,DropPos,{BASE},200,,finetune,top1,83.0",
        f"classification,imagenet1k,DropPos,{large},800,,finetune,top1,85.8",
        f"transfer,cifar10,DropPos,{BASE},200,,finetune,top1,97.0",
        f"linear_probe,imagenet1k,DropPos,{BASE},200,last,linear_last,top1,60.1",
        f"linear_probe,imagenet1k,DropPos,{BASE},200,last,linear_last,top1,60.1",
        f"low_shot,imagenet1k,DropPos,{BASE},200,,logistic_1pct,top1,50.2",
    )
    assert [
        (line["Data"], line["Backbone"], line["Epochs"], line["Protocol"], line["Published"]) for line in lines_of(root, "results")
    ] == [
        ("ImageNet-1K", "ViT-B/16", "200", "finetune", "83.0"),
        ("ImageNet-1K", "ViT-L/16", "800", "finetune", "85.8"),
        ("CIFAR-10", "ViT-B/16", "200", "finetune", "97.0"),
        ("ImageNet-1K", "ViT-B/16", "200", "linear last", "60.1"),
        ("ImageNet-1K", "ViT-B/16", "200", "logistic 1pct", "50.2"),
    ]


def test_ablations_gains_and_other_tasks_are_only_on_the_page_of_the_paper(root: Path) -> None:
    kept = f"classification,imagenet1k,DropPos,{BASE},200,,finetune,top1,11.1"
    others = [("ablation", "top1"), ("classification", "top1_gain"), ("classification", "top5"), ("detection", "top1")]
    write_published(root, kept, *(f"{task},imagenet1k,DropPos,{BASE},200,,finetune,{metric},22.2" for task, metric in others))
    assert [line["Published"] for line in lines_of(root, "results")] == ["11.1"]
    assert (root / "droppos" / "README.md").read_text().count("22.2") == len(others)


def test_a_protocol_named_after_a_setting_matches_only_the_result_of_that_setting(root: Path) -> None:
    row = f"classification,cifar10,DropPos,{BASE},200,{{}},finetune,top1,{{}}"
    write_published(root, row.format("position=none", 90.1), row.format("position=2D relative", 90.2), row.format("", 90.3))
    record(root, replace(IMAGENET, data="cifar10", protocol="finetune_2d_relative", value=90.0))
    (line,) = lines_of(root, "results")
    assert [line[name] for name in ("Setting", "Protocol", "Published", "Ours", "Difference")] == [
        "position=2D relative",
        "finetune 2d relative",
        "90.2",
        "90.00",
        "-0.20",
    ]
    assert cells(root / "RESULTS.md", "90.1")[3] == "position=none" and cells(root / "RESULTS.md", "90.3")[3] == "-"


def test_a_published_result_of_an_addition_matches_only_the_arm_with_that_addition(added: Path) -> None:
    others = [replace(SWIN, arm="", value=1.0), replace(SWIN, arm="swin+other", base_arm="swin", value=1.0)]
    record(added, *arms(SWIN), *others)
    found = [[line[name] for name in ("Method", "Epochs", "Published", "Ours", "Difference", "Run")] for line in lines_of(added, "results")]
    assert found == [  # the paper does not state the epochs, so the table shows ours
        ["Swin-B + APL", "100", "83.76", "92.00 ± 1.41", "+8.24", "imagenet_swin swin+apl"],
        ["Swin-B + RPL", "100", "84.09", "93.50 ± 1.41", "+9.41", "imagenet_swin swin+rpl"],
    ]
    assert "<details>" not in (added / "RESULTS.md").read_text()
    alone = tables.comparison("droppos", frame(arms(SWIN)[:2]), added)
    assert "Published" not in alone


def test_runs_of_one_recipe_with_and_without_overrides_have_separate_rows(root: Path) -> None:
    linear = "linear_probe,imagenet1k,{},{},600,last,linear_last,top1,{}"
    write_published(root, *(linear.format(*line) for line in [("I-JEPA", BASE, 70.9), ("I-JEPA + StoP", BASE, 72.6)]))
    base = replace(IMAGENET, recipe="imagenet", arm="ijepa", protocol="linear_last", pretrain_epochs=600, value=71.0)
    stop = replace(base, arm="ijepa+stop", base_arm="ijepa", value=72.5)
    record(root, base, stop, replace(stop, overrides="lr=1 k=2", value=72.0), replace(stop, encoder_file="a.pth", split="b", value=73.0))
    found = [(line["Method"], line["Ours"], line["Difference"], line["Run"]) for line in lines_of(root, "results")]
    assert found == [
        ("I-JEPA + StoP", "72.50", "-0.10", "imagenet ijepa+stop"),
        ("I-JEPA + StoP", "73.00", "+0.40", "imagenet ijepa+stop encoder=a.pth split=b"),
        ("I-JEPA + StoP", "72.00", "-0.60", "imagenet ijepa+stop lr=1 k=2"),
    ]


def test_best_by_held_out_and_best_on_test_are_separate_and_both_compared_to_published(root: Path) -> None:
    write_published(root, f"linear_probe,imagenet1k,DropPos,{BASE},200,,linear_best,top1,72.9")
    held_out = replace(IMAGENET, protocol="linear_best", value=72.0)
    rows = [held_out, replace(held_out, protocol="linear_best_on_test", value=73.0)]
    record(root, *rows)
    assert [(line["Protocol"], line["Ours"], line["Difference"]) for line in lines_of(root, "results")] == [
        ("linear best", "72.00", "-0.90"),
        ("linear best on test", "73.00", "+0.10"),
    ]
    (line,) = lines_of(root, "together")
    assert line["Linear"] == "best: 72.00<br>best on test: 73.00"
    shown = tables.comparison("droppos", frame(rows), root)
    assert dict(zip(shown["Protocol"], shown["Published"], strict=True)) == dict.fromkeys(
        ["linear best", "linear best on test"], "72.9 (ImageNet-1K, ViT-B/16, 200 ep)"
    )
    assert {"linear best", "linear best on test"} <= {cell.strip() for cell in (root / "droppos" / "README.md").read_text().split("|")}


def test_runs_on_two_devices_have_separate_rows_and_devices_are_above_the_table(root: Path) -> None:
    record(root, IMAGENET)
    assert "Device" not in lines_of(root, "together")[0] and f"\n\nDevice: {DEVICE}.\n\n| Data |" in (root / "RESULTS.md").read_text()
    record(root, replace(IMAGENET, device="H100", value=82.9), replace(IMAGENET, device="H100", precision="32-true", value=83.1))
    expected = [(DEVICE, "82.75"), ("H100, 32-true", "83.10"), ("H100, bf16-mixed", "82.90")]
    assert [(line["Device"], line["Ours"]) for line in lines_of(root, "results")] == expected
    assert [(line["Device"], line["All labels"]) for line in lines_of(root, "together")] == [
        (str(number), value) for number, (_, value) in enumerate(expected, 1)
    ]
    above = "; ".join(f"({number}) {device}" for number, (device, _) in enumerate(expected, 1))
    assert f"\n\nDevices: {above}.\n\n| Data |" in (root / "RESULTS.md").read_text()


def test_a_run_has_one_line_and_similar_protocols_have_one_cell(root: Path) -> None:
    values = {"knn": 70, "linear_last": 71, "linear": 72, "linear_last4": 73, "finetune_5_per_class": 74, "finetune": 75, "rotation_2x": 76}
    values |= {"finetune_shuffled": 77, "location_1": 78, "location_2": 79}
    record(root, *(replace(ROW, protocol=name, value=value, seed=seed) for name, value in values.items() for seed in (0, 1)))
    record(root, replace(ROW, protocol="knn", value=70, seed=2), replace(ROW, metric="top5", value=99.0))
    (line,) = lines_of(root, "together")
    headings = ["All labels", "5 per class", "Linear", "k-NN", "Location", "rotation 2x", "Logs"]
    assert list(line) == ["Data", "Method", "Backbone", "Epochs", "Seeds", *headings]
    assert list(line.values())[:6] == ["digits", "droppos", "vit_micro", "100", "2 to 3", "75.00 ± 0.00<br>shuffled: 77.00 ± 0.00"]
    assert line["Location"] == "1: 78.00 ± 0.00<br>2: 79.00 ± 0.00"
    assert line["Linear"] == "72.00 ± 0.00<br>last: 71.00 ± 0.00<br>last4: 73.00 ± 0.00" and line["rotation 2x"] == "76.00 ± 0.00"


def test_a_row_has_one_link_for_any_number_of_logs(root: Path) -> None:
    rows = [replace(ROW, seed=seed, log=f"droppos/logs/{seed}.txt") for seed in range(3)]
    record(root, *rows, *(replace(row, protocol="knn", log=f"droppos/logs/knn-{row.seed}.txt") for row in rows))
    (line,) = lines_of(root, "together")
    assert line["Logs"] == "[logs](droppos/logs)"
    assert cells(root / "droppos" / "README.md", "finetune", "97.30")[-1] == "[log 1 of 3](logs/0.txt)"
    lines = summary(frame([*rows, *(replace(row, start="scratch", log="droppos/logs/scratch.txt") for row in rows)]))
    assert tables.side_by_side("droppos", lines, root)["Log"][0] == "[log 1 of 4](logs/0.txt)"
    pages = [root / "README.md", root / "RESULTS.md", root / "droppos" / "README.md"]
    assert max(line.count("](") for page in pages for line in page.read_text().splitlines()) == 1


def add_papers(root: Path, *names: str) -> None:
    """Add papers without published results."""
    for name in names:
        (root / name).mkdir()
        (root / name / "recipe.py").touch()
        (root / name / "README.md").write_text("".join(f"<!-- table: {mark} -->\n<!-- /table -->\n" for mark in ("published", "measured")))


def baselines_of(row: Row, **changes: float) -> list[Row]:
    """A run of a paper with its baselines; `changes` gives their results by protocol."""
    starts = {"finetune": "scratch", "knn": "random", "linear": "random"}
    rows = [row, replace(row, protocol="knn", value=88.0), replace(row, protocol="knn", start="pixels", value=98.0)]
    return rows + [replace(row, protocol=name, start=starts[name], value=value) for name, value in changes.items()]


def test_results_without_pre_training_are_in_brackets_and_raw_pixels_have_one_row(root: Path) -> None:
    add_papers(root, "mp3", "stop")
    values = {"droppos": {"finetune": 80.0, "knn": 40.0}, "mp3": {"finetune": 80.0, "linear": 50.0}, "stop": {"finetune": 79.0}}
    for paper, changes in values.items():
        rows = baselines_of(replace(ROW, paper=paper, log=f"{paper}/logs/0.txt"), **changes)
        append(root / paper / "results.csv", rows)
        (root / paper / "logs").mkdir()
        (root / rows[0].log).touch()
    names = ["Method", "Backbone", "Epochs", "All labels", "k-NN", "Logs"]
    assert [[line[name] for name in names] for line in lines_of(root, "together")] == [
        ["droppos", "vit_micro", "100", "97.30 (80.00)", "88.00 (40.00)", "[logs](droppos/logs)"],
        ["mp3", "vit_micro", "100", "97.30 (80.00)", "88.00", "[logs](mp3/logs)"],
        ["stop", "vit_micro", "100", "97.30 (79.00)", "88.00", "[logs](stop/logs)"],
        ["raw pixels", "-", "0", "-", "98.00", "[logs](droppos/logs)"],
    ]


@pytest.mark.parametrize(
    "change",
    [{"protocol": "linear"}, {"device": "H100"}, {"recipe": "other"}, {"overrides": "k=5"}, {"split": "a"}, {"encoder_file": "a"}]
    + [{"data": "cifar10"}, {"backbone": "vit_nano"}, {"pretrain_epochs": 50}],
)  # fmt: skip
def test_a_baseline_may_differ_only_in_the_arm(root: Path, change: dict) -> None:
    base = replace(ROW, start="scratch", value=80.0)
    record(root, ROW, replace(base, **change))
    assert [line["All labels"] for line in lines_of(root, "together")] == ["97.30"]
    record(root, replace(base, arm="vit"), replace(ROW, arm="vit+rpl", base_arm="vit", value=98.0))
    assert [(line["Method"], line["All labels"]) for line in lines_of(root, "together")] == [
        ("droppos", "97.30"),
        ("droppos vit+rpl", "98.00 (80.00)"),
    ]


def test_runs_with_different_settings_have_distinguishable_lines(root: Path) -> None:
    record(root, *baselines_of(ROW, finetune=80.0), *baselines_of(replace(ROW, pretrain_epochs=300), finetune=81.0))
    record(root, replace(ROW, overrides="lr=1"), replace(MAE, overrides="lr=1"), replace(ROW, backbone="vit_nano"))
    record(root, replace(ROW, encoder_file="a.pth", split="b"))
    found = [[line[name] for name in ("Method", "Backbone", "Epochs", "All labels")] for line in lines_of(root, "together")]
    assert sorted(found[:-1]) == [
        ["droppos", "vit_micro", "100", "97.30 (80.00)"],
        ["droppos", "vit_micro", "300", "97.30 (81.00)"],
        ["droppos", "vit_nano", "100", "97.30"],
        ["droppos digits_mae mae lr=1", "vit_micro", "100", "97.30"],
        ["droppos encoder=a.pth split=b", "vit_micro", "100", "97.30"],
        ["droppos lr=1", "vit_micro", "100", "97.30"],
    ]
    assert found[-1] == ["raw pixels", "-", "0", "-"]


def test_supervised_methods_are_marked_and_have_one_line_with_their_frozen_features(root: Path) -> None:
    swin = replace(SWIN, recipe="digits", data="digits")
    record(root, *arms(swin), *arms(MAE), replace(swin, protocol="knn", start="pretrained", value=66.0))
    found = [(line["Method"], line["All labels"], line["k-NN"]) for line in lines_of(root, "together")]
    assert sorted(found) == [
        ("droppos digits_mae mae", "91.00 ± 1.41", "-"),
        ("droppos digits_mae mae+apl", "92.00 ± 1.41", "-"),
        ("droppos digits_mae mae+rpl", "93.50 ± 1.41", "-"),
        ("droppos swin+apl, supervised", "92.00 ± 1.41", "-"),
        ("droppos swin+rpl, supervised", "93.50 ± 1.41", "-"),
        ("droppos swin, supervised", "91.00 ± 1.41", "66.00"),
    ]


def test_side_by_side_shows_the_newest_results_of_two_devices(added: Path) -> None:
    new = [replace(row, device="H100", date="2026-11-25", value=row.value + 1) for row in arms(SWIN)]
    both, alone = (tables.side_by_side("droppos", summary(frame(rows)), added) for rows in ([*new, *arms(SWIN)], new))
    assert both.equals(alone)
