"""Tests of the run ledger."""

import csv
import hashlib
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from benchmarks.ledger.rows import GIVEN, TYPES, Row, append, frame, load, record, summary
from benchmarks.papers import ROOT
from common import environment

ROW = Row(
    date="2026-11-20",
    commit="0123456789ab",
    paper="droppos",
    recipe="digits",
    arm="",
    base_arm="",
    overrides="",
    encoder_file="",
    split="",
    data="digits",
    backbone="vit_micro",
    pretrain_epochs=100,
    seed=0,
    protocol="finetune",
    start="pretrained",
    metric="top1",
    value=97.1 + 0.2,  # 97.3 plus a last binary digit that must be kept
    device="2-core Intel Xeon",
    precision="bf16-mixed",
    hours=0.02,
    versions="torch 2.13.0, timm 1.0.31, python 3.11.7",
    settings="layers=last4 pool=mean",
    log="droppos/logs/2026-11-20-digits-seed0.txt",
)


@pytest.mark.parametrize(
    ("folder", "count", "digest"),
    [
        ("droppos", 36, "78059fe10d77ea1d"),
        ("mapet", 36, "269f4ed73f2fca7c"),
        ("mp3", 48, "1a52f0428beec391"),
        ("positional_label", 165, "2aa8e42dd3177c9a"),
        ("stop", 48, "a351f5e9a5c2eae1"),
        ("benchmarks/baselines", 45, "816d910d9f4a66da"),
    ],
)
def test_rows_older_than_the_new_columns_are_unchanged(folder: str, count: int, digest: str) -> None:
    """The digests cover all other columns, as text, from before `recipe` was split. Newer rows follow these rows."""
    with (ROOT / folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:count]
    others = [name for name in TYPES if name not in (*GIVEN, "recipe_sha256")]
    text = "".join(",".join(row[name] for name in others) + "\n" for row in rows)
    assert len(rows) == count and hashlib.sha256(text.encode()).hexdigest().startswith(digest)
    assert all(" " not in row["recipe"] and "+" not in row["recipe"] for row in rows)
    assert all(row["base_arm"] == (row["arm"].partition("+")[0] if "+" in row["arm"] else "") for row in rows)


def test_a_ledger_without_the_new_columns_is_refused_with_a_fix(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(",".join(name for name in TYPES if name == "recipe" or name not in GIVEN) + "\n")
    missing = "missing: arm, base_arm, overrides, encoder_file, split; unexpected: none"
    with pytest.raises(ValueError, match=rf"results\.csv is not a run ledger.*{missing}.*make recipe=digits, arm=vit\+rpl, base_arm=vit"):
        load(path)


def test_rows_of_runs_with_different_settings_are_kept_apart(tmp_path: Path) -> None:
    others = [replace(ROW, **{name: "x"}) for name in GIVEN]
    append(tmp_path / "results.csv", [ROW, *others])
    append(tmp_path / "results.csv", [replace(row, value=1.0) for row in others])
    assert sorted(load(tmp_path / "results.csv")["value"]) == [1.0] * len(GIVEN) + [ROW.value]
    assert len(summary(frame([ROW, *others]))) == 1 + len(GIVEN)


def test_a_summary_lists_the_base_arm_and_the_addition_of_each_arm(tmp_path: Path) -> None:
    arms = [("", ""), ("a+b", ""), ("vit", ""), ("vit+rpl", "vit"), ("vit+rpl+apl", "vit")]
    lines = summary(frame([replace(ROW, arm=arm, base_arm=base) for arm, base in arms]))
    assert lines[["family", "added"]].to_numpy().tolist() == [["", ""], ["a+b", ""], ["vit", ""], ["vit", "rpl"], ["vit", "rpl+apl"]]


def test_a_row_is_read_exactly_as_it_was_written(tmp_path: Path) -> None:
    append(tmp_path / "new folder" / "results.csv", [ROW])
    assert [Row(**row) for row in load(tmp_path / "new folder" / "results.csv").to_dict("records")] == [ROW]


def test_a_row_written_twice_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    append(path, [ROW, replace(ROW, seed=1)])
    append(path, [replace(ROW, value=50.0, date="2026-11-21"), replace(ROW, start="scratch")])
    assert sorted(load(path)[["seed", "start", "value"]].itertuples(index=False, name=None)) == [
        (0, "pretrained", 50.0),
        (0, "scratch", ROW.value),
        (1, "pretrained", ROW.value),
    ]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "results.csv"
    append(path, [ROW])
    before = path.read_bytes()
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left.*results.csv"):
        append(path, [replace(ROW, seed=1)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_another_header_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(",".join([*TYPES, "surprise"]).replace("hours,", "") + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"results\.csv is not a run ledger.*missing: hours; unexpected: surprise"):
        append(path, [ROW])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", ",".join(TYPES) + "\n" + "x," * (len(TYPES) - 1) + "x\n"])
def test_an_empty_file_and_text_instead_of_a_number_are_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ValueError, match=r"results\.csv is not a run ledger"):
        load(tmp_path / "results.csv")


def test_the_log_of_an_earlier_run_with_the_same_name_is_kept(tmp_path: Path) -> None:
    log, run, row = tmp_path / "droppos/logs/a.txt", tmp_path / "run", replace(ROW, log="droppos/logs/a.txt")
    (run / "pretrain").mkdir(parents=True)
    log.parent.parent.mkdir()
    for commit, lines in (("old", "loss 1\n"), ("new", "loss 2\n"), ("new", "loss 2\n"), ("new", "loss 2\nresumed\n")):
        (run / "pretrain" / "log.txt").write_text(lines)
        record([replace(row, commit=commit)], run, tmp_path)
    assert log.read_text() == "# pretrain\nloss 1\n# pretrain\nloss 2\n# pretrain\nloss 2\nresumed\n"
    assert list(load(tmp_path / "droppos/results.csv")["commit"]) == ["old", "new"]


def test_a_number_that_is_not_finite_never_enters_the_ledger(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        append(tmp_path / "results.csv", [ROW, replace(ROW, seed=1, value=math.nan)])
    assert not (tmp_path / "results.csv").exists()


def test_a_missing_file_loads_as_an_empty_ledger_with_all_columns(tmp_path: Path) -> None:
    assert load(tmp_path / "results.csv").dtypes.equals(frame([ROW]).dtypes)
    assert list(summary(load(tmp_path / "results.csv"))) == list(summary(frame([ROW])))


def test_the_standard_deviation_is_over_seeds_of_the_newest_commit() -> None:
    old = [replace(ROW, commit="old", seed=seed, value=10.0, date="2026-11-19") for seed in range(5)]
    new = [replace(ROW, commit="new", seed=seed, value=value, log=f"{seed}.txt") for seed, value in enumerate([90.0, 92.0, 94.0])]
    lines = summary(frame([*new, *old, replace(ROW, commit="old", start="scratch")]))  # older rows last: the date decides
    ours, scratch = lines.itertuples()
    assert (ours.commit, ours.mean, ours.sd, ours.seeds, ours.log) == ("new", 92.0, 2.0, 3, "0.txt 1.txt 2.txt")
    assert (scratch.commit, scratch.seeds) == ("old", 1)
    assert pandas.isna(scratch.sd)


def test_of_two_runs_on_one_day_the_later_row_is_the_newest() -> None:
    assert list(summary(frame([ROW, replace(ROW, commit="later", value=1.0)]))["mean"]) == [1.0]


def test_a_commit_is_dirty_after_code_changes_but_not_after_recorded_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == "unknown"
    git("init")
    (tmp_path / "paper" / "logs").mkdir(parents=True)
    (tmp_path / "benchmarks/speed").mkdir(parents=True)
    (tmp_path / "method.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "one")
    clean = environment.commit()
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "paper" / "results.csv").write_text("date\n")
    (tmp_path / "paper" / "logs" / "run.txt").write_text("log\n")
    (tmp_path / "benchmarks/speed/steps.csv").write_text("seconds\n")
    assert environment.commit() == clean
    (tmp_path / "method.py").write_text("a = 2\n")
    assert environment.commit() == clean + "+dirty"
    monkeypatch.setattr(environment, "ROOT", tmp_path / "paper")
    assert environment.commit() == "unknown", "the commit of a surrounding project is not ours"


def test_the_environment_names_code_versions_and_device_but_not_the_machine() -> None:
    facts = environment.environment(torch.device("cpu"))
    assert set(facts) == {"commit", "python", "torch", "timm", "lightning", "numpy", "versions", "device", "threads", "platform"}
    assert all(facts.values())
    assert "-core " in str(facts["device"]) and str(facts["torch"]) in str(facts["versions"])
    assert not [fact for fact in facts.values() if os.uname().nodename in str(fact)]
