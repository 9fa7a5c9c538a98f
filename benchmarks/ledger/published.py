"""Published and measured numbers: where they are read, and which belong together."""

import re
from pathlib import Path

import pandas

from benchmarks.ledger.rows import load, summary
from benchmarks.papers import ROOT, folder
from common.evaluate import ON_TEST

PUBLISHED = "paper table task dataset method backbone pretrain_epochs setting protocol metric value source confidence".split()
REPRODUCTIONS = "paper dataset method backbone pretrain_epochs protocol metric value who setting link".split()
# What an arm has in common with the arm that it is compared with, and with its baselines:
KIN = ["paper", "data", "recipe", "family", "overrides", "encoder_file", "split", "backbone", "protocol", "metric", "device"]
STARTS = {"untrained": ["scratch", "random"], "pixels": ["pixels"]}  # of the baselines in `with_baselines`


def published(paper: str, root: Path = ROOT) -> pandas.DataFrame:
    """The published numbers of a paper, every cell as it was printed; no row where there is no `published.csv`.

    The columns are PUBLISHED, with `data` in the place of `dataset`. Of a method "A + B" `family` is A and `added` is B, as in our summary.
    """
    path, frame = root / folder(paper, root) / "published.csv", pandas.DataFrame(columns=PUBLISHED, dtype=str)
    if path.exists():
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False).query("paper == @paper")
    parts = [method.partition("+") for method in frame["method"]]
    families, added = [part[0].strip() for part in parts], [part[2].strip() for part in parts]
    return frame.rename(columns={"dataset": "data"}).assign(family=families, added=added)


def reproductions(paper: str, root: Path = ROOT) -> pandas.DataFrame:
    """What others report of a paper's method, each with a link; no row where there is no `reproductions.csv`.

    The columns are REPRODUCTIONS, with `data` in the place of `dataset`. Nobody has checked these numbers.
    """
    path, frame = root / folder(paper, root) / "reproductions.csv", pandas.DataFrame(columns=REPRODUCTIONS, dtype=str)
    if path.exists():
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False).query("paper == @paper")
    return frame.rename(columns={"dataset": "data"})


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


def with_baselines(lines: pandas.DataFrame) -> pandas.DataFrame:
    """The summary lines of methods (pre-trained, or supervised), each with its baselines' mean, sd, start and log; NaN where there is none.

    `untrained_mean`, `untrained_sd` and so on are of the same evaluation without pre-training: from scratch or, where the encoder stays
    frozen, of a random one. `pixels_mean`... are of raw pixels. A baseline is run with one arm and belongs to all of its family.
    """
    own = (lines["start"] == "pretrained") | (lines["protocol"] == "scratch")
    pairs = lines[own].reset_index(names="line").merge(lines[~own], on=KIN, suffixes=("", "_base"))
    pairs = pairs.query("pretrain_epochs_base == pretrain_epochs or pretrain_epochs_base == 0")
    found = lines[own].copy()
    for baseline, starts in STARTS.items():
        base = pairs[pairs["start_base"].isin(starts)].drop_duplicates("line").set_index("line")
        for column in ("mean", "sd", "start", "log"):
            found[f"{baseline}_{column}"] = base[f"{column}_base"]
    return found


def matches(rows: pandas.DataFrame, lines: pandas.DataFrame) -> pandas.DataFrame:
    """Published rows beside the summary lines that are the same kind of number: of one protocol and metric, with the same thing added.

    A row per pair, with the columns of both, `_published` behind those of `rows` that both have, and the indices as `row` and `line`.
    Whether the two agree in more is in `same_data`, `same_backbone` (a bare ViT-S is one of any patch) and `same_epochs` (also where
    the paper does not say). The best of a grid is `linear_best` in papers, also of ours where it was chosen on the test images, and
    `finetune_none` is also finetune with the setting position=none.
    """
    kinds = [[*{plain(row.protocol), plain(row.protocol + row.setting.rpartition("=")[2])}] for row in rows.itertuples()]
    rows = rows.assign(row=rows.index, kind=kinds, adds=rows["added"].map(plain)).explode("kind")
    names = [plain(name.removesuffix(ON_TEST)) for name in lines["protocol"]]
    lines = lines.assign(line=lines.index, kind=names, adds=lines["added"].map(plain))
    pairs = rows.merge(lines, on=["metric", "kind", "adds"], suffixes=("_published", ""))
    short = pairs["backbone"].map(title).str.partition("/")[0] if len(pairs) else ""
    printed, epochs = pairs["backbone_published"], pairs["pretrain_epochs_published"]
    return pairs.assign(
        same_data=pairs["data_published"].map(plain) == pairs["data"].map(plain),
        same_backbone=(printed == pairs["backbone"]) | (printed == short),
        same_epochs=(epochs == "") | (epochs == pairs["pretrain_epochs"].astype(str)),
    )


def plain(name: str) -> str:
    """A name without case and punctuation: ImageNet-1k and imagenet1k are one data set."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def title(name: str) -> str:
    """A data set or backbone as papers write it, where that is known."""
    if vit := re.fullmatch(r"vit_(s|b|l|h)(?:mall|ase|arge|uge)_patch(\d+)_\d+", name):
        return f"ViT-{vit[1].upper()}/{vit[2]}"
    names = ["ImageNet-1K", "Mini-ImageNet", "CIFAR-10", "CIFAR-100", "ADE20K", "COCO"]
    return next((known for known in names if plain(known) == plain(name)), name)
