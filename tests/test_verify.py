"""Tests of make verify-results: every recorded number is found again in its log."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compare.scores import load as load_scores
from benchmarks.ledger.rows import Row, append, frame, load
from benchmarks.ledger.verify import main, same, verify, verify_commits
from benchmarks.papers import ROOT
from tests.test_results import ROW

LOG = "droppos/logs/run.txt"
FINETUNE = replace(ROW, value=97.3, hours=0.02, log=LOG)
GRID = "layers={} head=norm lr={} decay=0 pool=mean held_out=145"
LINEAR = replace(FINETUNE, protocol="linear_best", value=91.2, hours=0.5, settings=GRID.format("last4", 2))
TEXT = f"""# finetune-pretrained
2026-11-20 10:00:00 finetune-pretrained step 66/660, loss 1.1, 34 s left
2026-11-20 10:01:00 finetune-pretrained done: top1 97.3, top5 100, hours 0.0200012
# finetune-scratch
2026-11-20 10:01:00 finetune-scratch done: top1 91, top5 100, hours 0.02
# linear-pretrained
2026-11-20 10:02:00 linear-pretrained {GRID.format("last", 1)}: top1 95.5 (80.1 on the 145 images held out)
2026-11-20 10:02:00 linear-pretrained {GRID.format("last", 2)}: top1 90.1 (81.3 on the 145 images held out)
2026-11-20 10:02:00 linear-pretrained {GRID.format("last4", 1)}: top1 92.2 (81.2 on the 145 images held out)
2026-11-20 10:02:00 linear-pretrained {GRID.format("last4", 2)}: top1 91.2 (82.2 on the 145 images held out)
2026-11-20 10:02:00 linear-pretrained {GRID.format("last4", 3)}: top1 99.2 (82.2 on the 145 images held out)
2026-11-20 10:02:00 linear-pretrained done: top1 91.2, top5 99, hours 0.5
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one paper and the log of one run."""
    (tmp_path / "droppos" / "logs").mkdir(parents=True)
    (tmp_path / "droppos" / "recipe.py").touch()
    (tmp_path / LOG).write_text(TEXT)
    return tmp_path


def found(root: Path, *rows: Row) -> list[str]:
    """The faults of a ledger with these rows, without the checks that `append` makes."""
    frame(rows).to_csv(root / "droppos" / "results.csv", index=False)
    return verify(root)[1]


def test_every_committed_number_is_found_in_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    *said, commits = capsys.readouterr().out.splitlines()
    assert re.match(r"commits: (not checked|(\d+) of \2 in the history)", commits)
    rows = sum(len(load(path)) for path in [*ROOT.glob("*/results.csv"), *ROOT.glob("benchmarks/*/results.csv")])
    rows += sum(len(load_scores(path).query("evaluation != 'failed'")) for path in ROOT.glob("benchmarks/compare/*/scores.csv"))
    assert rows == sum(int(line.split(": ")[1].split()[0]) for line in said) > 400


def test_rows_that_agree_with_the_log_are_verified(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [
        replace(LINEAR, protocol="linear_last", value=90.1, settings=GRID.format("last", 2)),
        replace(LINEAR, protocol="linear_last4"),
    ]
    scratch = replace(FINETUNE, start="scratch", value=91.0)
    assert found(root, FINETUNE, scratch, LINEAR, *others) == []
    assert main([], root) == 0 and "droppos: 5 of 5 rows verified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": 97.3001}, "says top1 97.3001, 0.02 hours .*droppos/logs/run.txt says top1 97.3, 0.0200012 hours on 2026-11-20"),
        ({"hours": 0.03}, "0.03 hours"),
        ({"date": "2026-11-25"}, "on 2026-11-25"),
        ({"start": "random"}, "no finished stage with this number"),
        ({"protocol": "finetune_5_per_class"}, "no finished stage with this number"),
        ({"metric": "position_top1"}, "no finished stage with this number"),
        ({"log": "droppos/logs/none.txt"}, "its log 'droppos/logs/none.txt' is missing"),
        ({"commit": ""}, "it has no commit"),
        ({"commit": "unknown"}, "commit 'unknown' is not one"),
        ({"device": "", "versions": ""}, "it has no device, versions"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"recipe_sha256": "0" * 15}, "recipe_sha256 .* is not one"),
        ({"recipe_sha256": "0" * 16, "settings": ""}, "it has no settings"),
    ],
)
def test_a_row_that_does_not_agree_is_named_with_its_line(root: Path, changes: dict, message: str) -> None:
    (fault,) = found(root, LINEAR, replace(FINETUNE, **changes))
    assert fault.startswith("droppos/results.csv:3 (") and re.search(message, fault), fault


@pytest.mark.parametrize(
    "wrong",
    [
        {"value": 99.2, "settings": GRID.format("last4", 3)},  # equally good on the held-out images, but later in the grid
        {"value": 95.5, "settings": GRID.format("last", 1)},  # the best on the test images
        {"settings": GRID.format("last4", 1)},
        {"protocol": "linear_last"},
    ],
)
def test_the_choice_of_a_classifier_is_made_again_from_the_log(root: Path, wrong: dict) -> None:
    assert len(found(root, replace(LINEAR, **wrong))) == 1


def test_a_commit_that_cannot_be_checked_out_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def git(*arguments: str, cwd: Path = root) -> str:
        own = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *own, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()

    def not_checked(folder: Path) -> bool:
        return verify_commits(folder)[0].startswith("commits: not checked") and not verify_commits(folder)[1]

    assert not_checked(root)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "code")
    lost = git("rev-parse", "--short=12", "HEAD")
    git("commit", "-q", "--allow-empty", "--amend", "-m", "the same code, rewritten")  # the first one is still there, but no clone has it
    kept = git("rev-parse", "--short=12", "HEAD")
    assert found(root, replace(FINETUNE, commit=kept)) == [] and main([], root) == 0
    assert "commits: 1 of 1 in the history" in capsys.readouterr().out
    assert found(root, replace(FINETUNE, commit=kept), replace(LINEAR, commit=f"{lost}+dirty")) == [] and main([], root) == 1
    assert f"droppos/results.csv: commit {lost} is not in the history" in capsys.readouterr().err
    git("clone", "-q", "--depth", "1", root.as_uri(), "shallow")
    assert not_checked(root / "shallow")


def test_a_row_that_is_there_twice_is_refused(root: Path) -> None:
    assert "another row is of the same run" in found(root, FINETUNE, replace(FINETUNE, hours=0.0200004))[0]


def test_of_a_run_that_was_recorded_twice_both_are_in_the_log(root: Path) -> None:
    (root / LOG).write_text(TEXT + TEXT.replace("97.3", "96.4").replace("2026-11-20", "2026-11-24"))
    newer = replace(FINETUNE, commit="fedcba987654", date="2026-11-24", value=96.4)
    assert found(root, FINETUNE, newer) == []
    assert len(found(root, replace(FINETUNE, value=96.4))) == 1, "the value of one run with the date of the other"


def test_an_unfinished_stage_verifies_nothing(root: Path) -> None:
    (root / LOG).write_text(TEXT.replace("finetune-pretrained done:", "finetune-pretrained stopped:"))
    assert "no finished stage" in found(root, FINETUNE)[0]


@pytest.mark.parametrize(("recorded", "printed", "right"), [(9.1667, 9.16667, True), (93.1481, 93.1481, True), (93.1482, 93.1481, False)])
def test_numbers_are_compared_with_the_precision_of_both(recorded: float, printed: float, right: bool) -> None:
    assert same(recorded, printed, 4) is right


def test_an_older_ledger_gets_an_empty_recipe_hash_and_a_new_row_keeps_its_own(root: Path) -> None:
    path = root / "droppos" / "results.csv"
    frame([FINETUNE]).drop(columns="recipe_sha256").to_csv(path, index=False)
    append(path, [replace(FINETUNE, seed=1, recipe_sha256="0" * 16)])
    assert list(load(path)["recipe_sha256"]) == ["", "0" * 16]
