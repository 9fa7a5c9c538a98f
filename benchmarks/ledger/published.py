"""Published and measured numbers: where they are read, which belong together, and how a table writes them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas

from benchmarks.ledger.rows import load, summary
from benchmarks.papers import ROOT, folder
from common.evaluate import ON_TEST

PUBLISHED = "paper table task dataset method backbone pretrain_epochs setting protocol metric value source confidence".split()
BESIDE = ["paper", "data", "backbone", "protocol", "metric", "device"]  # what a run shares with its baselines, besides its recipe's stem
STARTS = {"scratch": "", "random": ", random encoder", "pixels": ", raw pixels"}  # of the baselines of a run
NOT_YET = "not measured yet"


def published(paper: str, root: Path = ROOT) -> pandas.DataFrame:
    """The published numbers of a paper, every cell as it was printed; an empty frame where there is no `published.csv`."""
    path = root / folder(paper, root) / "published.csv"
    if not path.exists():
        return pandas.DataFrame(columns=PUBLISHED, dtype=str)
    return pandas.read_csv(path, dtype=str, keep_default_na=False).query("paper == @paper")


def measured(paper: str, root: Path = ROOT) -> pandas.DataFrame:
    """Our numbers of a paper, summarised; a number without its log is left out.

    Raises ValueError where `results.csv` is not a ledger.
    """
    ledger = load(root / folder(paper, root) / "results.csv").query("paper == @paper")
    return summary(ledger.loc[[(root / log).is_file() for log in ledger["log"]]])


def claims(paper: str, root: Path) -> pandas.DataFrame:
    """The numbers that the paper's authors print for their own method: one that has its name, or adds something to another."""
    frame = published(paper, root).query("confidence == 'first_hand'")
    return frame.loc[["+" in method or plain(paper) in plain(method) for method in frame["method"]]]


def of_method(lines: pandas.DataFrame) -> pandas.Series:
    """Of each summary line whether it is a method's, pre-trained or supervised, and not a baseline's."""
    return (lines["start"] == "pretrained") | (lines["protocol"] == "scratch")


def pairs(lines: pandas.DataFrame) -> Iterator[tuple[Any, pandas.DataFrame]]:
    """Each summary line of a pre-trained start, or of a supervised method, with its baselines: scratch first, raw pixels last.

    One of them is the arm without what this one adds. Starts without pre-training are run with one arm and are baselines of all.
    """
    stems, twin = lines["recipe"].map(stem), ["start", "pretrain_epochs", "precision"]
    for line in lines[of_method(lines)].itertuples():
        same = (lines[BESIDE] == [getattr(line, name) for name in BESIDE]).all(axis=1) & (stems == stem(line.recipe))
        starts = lines["start"].isin(STARTS) & lines["pretrain_epochs"].isin([line.pretrain_epochs, 0]) & (lines["protocol"] != "scratch")
        alone = (lines["recipe"] == stems) & (lines[twin] == [getattr(line, name) for name in twin]).all(axis=1)
        yield line, lines[same & (starts | alone) & (lines.index != line.Index)].sort_values("start", ascending=False)


def arm_of(recipe: str) -> str:
    """The arm in a ledger's `recipe`, which is "name arm change=value ..."; empty where it has none."""
    word = [*recipe.split(), "", ""][1]
    return "" if "=" in word else word


def stem(recipe: str) -> str:
    """A ledger's `recipe` without what its arm adds: of "digits vit+rpl" it is "digits vit"."""
    return recipe.replace(arm_of(recipe), arm_of(recipe).partition("+")[0], 1) if "+" in arm_of(recipe) else recipe


def alike(row: Any, line: Any) -> bool:
    """Whether a published row and a summary line are the same kind of number: `finetune_none` is also finetune with position=none.

    What a paper calls the best of a grid is `linear_best`, whether ours is chosen on held-out images or on the test images.
    """
    protocols = {plain(row.protocol), plain(row.protocol + row.setting.rpartition("=")[2])}
    return plain(line.protocol.removesuffix(ON_TEST)) in protocols and row.metric == line.metric


def of_arm(row: Any, line: Any) -> bool:
    """Whether a published row adds to its method what a summary line's arm adds; without an arm, whether it has the paper's name."""
    arm = arm_of(line.recipe)
    return plain(row.method.partition("+")[2]) == plain(arm.partition("+")[2]) if arm else plain(line.paper) in plain(row.method)


def closeness(row: Any, line: Any) -> tuple[bool, bool, bool]:
    """Whether a published row and a summary line agree in data, backbone (a bare ViT-S is one of any patch) and epochs, where printed."""
    backbone = row.backbone in (line.backbone, title(line.backbone).partition("/")[0])
    return plain(row.dataset) == plain(line.data), backbone, row.pretrain_epochs in ("", str(line.pretrain_epochs))


def plain(name: str) -> str:
    """A name without case and punctuation: ImageNet-1k and imagenet1k are one data set."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def title(name: str) -> str:
    """A data set or backbone as papers write it, where that is known."""
    if vit := re.fullmatch(r"vit_(s|b|l|h)(?:mall|ase|arge|uge)_patch(\d+)_\d+", name):
        return f"ViT-{vit[1].upper()}/{vit[2]}"
    names = ["ImageNet-1K", "Mini-ImageNet", "CIFAR-10", "CIFAR-100", "ADE20K", "COCO"]
    return next((known for known in names if plain(known) == plain(name)), name)


def protocol(line: Any) -> str:
    """The protocol in words, with the metric where it is not the usual one."""
    return (line.protocol if line.metric == "top1" else f"{line.protocol} ({line.metric})").replace("_", " ")


def number(line: Any, seeds: bool = True) -> str:
    """A mean with its spread and how many seeds it stands on."""
    spread = f" ± {line.sd:.2f}" if pandas.notna(line.sd) else ""
    return f"{line.mean:.2f}{spread}" + (f" ({counted(line.seeds)})" if seeds else "")


def counted(seeds: int) -> str:
    """How many seeds, in words."""
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def links(logs: str, root: Path, folder: Path, short: bool = False) -> str:
    """Links to logs, as seen from a README in `folder`; the short ones count from 0, as seeds do."""
    paths = [Path(os.path.relpath(root / log, folder)).as_posix() for log in dict.fromkeys(logs.split())]
    if short:
        return ", ".join(f"[{index}]({path})" for index, path in enumerate(paths))
    return ", ".join(f"[log {index}]({path})" for index, path in enumerate(paths, 1)).replace("log 1]", "log]")


def markdown(frame: pandas.DataFrame, nothing: str = NOT_YET) -> str:
    """A data frame of text and whole numbers as a Markdown table, an empty cell as a dash; `nothing` where there is no row."""
    if frame.empty:
        return f"{nothing}\n"
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.replace("", "-").itertuples(index=False)]
    return "".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |\n" for row in rows)
