"""What a run shows on the screen at its end: its numbers beside their baselines', and what the paper reports."""

from collections.abc import Sequence
from pathlib import Path

import pandas
from rich.table import Table

from benchmarks.ledger.cells import counted, number, protocol
from benchmarks.ledger.published import claims, matches, title, with_baselines
from benchmarks.ledger.rows import Row, frame, summary
from benchmarks.ledger.tables import side_by_side
from benchmarks.papers import ROOT, folder
from common.run import console


def show(paper: str, rows: Sequence[Row], root: Path = ROOT) -> None:
    """Print a run's numbers, in percent, with their baselines; arms side by side.

    Published numbers stand in the table only where they are of the same data. Else a line below it says what the paper reports.
    """
    ledger, first = frame(rows), rows[0]
    lines = summary(ledger)
    backbones = [name for name in ledger["backbone"].unique() if ledger["backbone"].nunique() == 1]
    training = "training" if first.protocol == "scratch" else "pre-training"
    what = [paper, first.data, *backbones, f"{first.pretrain_epochs} epochs of {training}", counted(ledger["seed"].nunique(), "seed")]
    heading = ", ".join(what)
    scratch = "; from scratch: the same training without pre-training, for linear and knn a random encoder"
    if lines["arm"].nunique() > 1 or any(lines["base_arm"] != ""):
        table = side_by_side(paper, lines, root).query("Log != '-'").drop(columns=["Data", "Backbone", "Epochs", "Log"])
        table = table.loc[:, (table != "-").any()].assign(Family=table["Family"].str.partition(" ")[0])  # all share what --set changes
        caption = "in percent; in brackets the difference to alone" + (scratch if "From scratch" in table else "")
    else:
        table, caption = comparison(paper, ledger, root), f"top-1 in percent{scratch}"
    screen = Table(title=heading, caption=caption, min_width=min(len(heading), console.width))  # so that the title stays on one line
    for column in table.columns:
        screen.add_column(column, justify="left" if column in ("Family", "Protocol", "Published") else "right")
    for cells in table.itertuples(index=False):
        screen.add_row(*cells)
    console.print(screen, soft_wrap=False)
    if not any(column.startswith("Published") for column in table.columns):
        console.print(reported(paper, lines, root), markup=False, highlight=False)


def comparison(paper: str, rows: pandas.DataFrame, root: Path = ROOT) -> pandas.DataFrame:
    """Each protocol's number beside its baseline's and a published one of the same data and protocol; raw pixels in rows of their own.

    `rows` is a ledger. The published number is the nearest (same backbone, then same epochs), in a column that is absent where there is
    none. The difference is between our own two numbers.
    """
    lines, table = with_baselines(summary(rows)), []
    near = matches(claims(paper, root), lines).query("same_data")
    near = near.sort_values(["same_backbone", "same_epochs"], kind="stable", ascending=False).drop_duplicates("line").set_index("line")
    for line in lines.itertuples():
        scratch = number(line.untrained_mean, line.untrained_sd)
        cells = {
            "Protocol": protocol(line),
            "Ours": number(line.mean, line.sd),
            "From scratch": scratch or "-",
            "Difference": f"{line.mean - line.untrained_mean:+.2f}" if scratch else "-",
        }
        if len(near):
            cells["Published"] = printed(near.loc[line.Index]) if line.Index in near.index else "-"
        table.append(cells)
        if pixels := number(line.pixels_mean, line.pixels_sd):
            table.append(dict.fromkeys(cells, "-") | {"Protocol": f"{protocol(line)}, raw pixels", "From scratch": pixels})
    return pandas.DataFrame(table)


def printed(pair: pandas.Series) -> str:
    """A published number of `matches` with what it is of: 83.0 (ImageNet-1K, ViT-B/16, 200 ep)."""
    epochs = pair["pretrain_epochs_published"] or "?"
    return f"{pair['value']} ({title(pair['data_published'])}, {title(pair['backbone_published'])}, {epochs} ep)"


def reported(paper: str, lines: pandas.DataFrame, root: Path = ROOT) -> str:
    """A sentence on what the paper reports, on whatever data: of a protocol of ours where it has one, else its first number."""
    own = claims(paper, root).query("metric == 'top1'")
    if own.empty:
        return f"No published number of {paper} is known."
    pairs = matches(own, lines)
    row = own.loc[pairs["row"].iloc[0] if len(pairs) else own.index[0]]
    epochs = f"{row['pretrain_epochs']} epochs" * (row["pretrain_epochs"] != "")
    of = [row["method"] * (row["added"] != ""), title(row["backbone"]), epochs, row["setting"]]
    what = f"{protocol(row)} {row['value']} on {title(row['data'])} ({', '.join(filter(None, of))})"
    return f"The paper reports {what}; all published numbers: {(folder(paper, root) / 'README.md').as_posix()}"
