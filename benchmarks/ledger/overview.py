"""The tables of RESULTS.md and of the root README: published numbers beside ours, and what was measured here; top-1 of classification."""

from pathlib import Path, PurePosixPath
from typing import Any

import pandas

from benchmarks.ledger.published import claims, counted, markdown, matches, measured, number, protocol, run_name, title, with_baselines
from benchmarks.ledger.rows import GIVEN
from benchmarks.papers import baselines, papers

TASKS = ["classification", "low_shot", "linear_probe", "transfer"]
HEADINGS = {  # of protocols, in order; scratch is supervised training
    "finetune": "All labels",
    "scratch": "All labels",
    "finetune_20_per_class": "20 per class",
    "finetune_5_per_class": "5 per class",
    "linear": "Linear",
    "logistic": "Logistic",
    "knn": "k-NN",
}
DIGITS = {"5 per class": "5 per class (scratch)", "20 per class": "20 per class (scratch)", "k-NN": "k-NN (random)"}
PIXELS = "raw pixels"
RUN = ["Data", "Method", "Backbone", "Epochs", "Device"]


def results_table(root: Path) -> str:
    """Published numbers with ours beside them, a row each; below, folded by paper, those not measured yet. Of baselines what we measured."""
    table, folds = [], ""
    for paper in [*papers(root), *baselines(root)]:
        rows = claims(paper, root).query("task in @TASKS and metric == 'top1'")
        rows = rows.drop_duplicates(["dataset", "method", "backbone", "pretrain_epochs", "setting", "protocol", "value"])
        pairs = matches(rows, with_baselines(measured(paper, root))).query("same_data and same_backbone and same_epochs")
        for pair in pairs.itertuples():
            ours = {
                "Epochs": pair.pretrain_epochs,
                "Protocol": protocol(pair),
                "Ours": number(pair.mean, pair.sd),
                "Difference": f"{pair.mean - float(pair.value):+.2f}",
                "Seeds": pair.seeds,
                "Run": run_name(pair),
                "Device": f"{pair.device}, {pair.precision}",
                "Logs": logs_link(pair.log),
            }
            table.append({"Paper": paper} | printed(rows.loc[pair.row]) | ours)
        missing = [printed(row) for index, row in rows.iterrows() if index not in {*pairs["row"]}]
        if missing and paper in papers(root):
            summary = f"{paper}: {counted(len(missing), 'published number')}, not measured yet"
            folds += f"\n<details><summary>{summary}</summary>\n\n{markdown(pandas.DataFrame(missing))}\n</details>\n"
    return markdown(pandas.DataFrame(table), nothing="No published number is measured yet.") + folds


def printed(row: Any) -> dict[str, str]:
    """The cells of a published number."""
    return {
        "Data": title(row.dataset),
        "Method": row.method,
        "Backbone": title(row.backbone),
        "Setting": row.setting,
        "Epochs": row.pretrain_epochs,
        "Protocol": protocol(row),
        "Published": row.value,
    }


def together_table(root: Path) -> str:
    """Measured numbers side by side: a row per run over its seeds, a column per kind of protocol."""
    return by_run(measured_lines(root))


def digits_table(root: Path) -> str:
    """The smoke test: few labels and k-NN on digits, a row per recipe as it stands; arms only with what the paper adds."""
    lines = measured_lines(root)
    key, base = ["paper", "recipe", "arm"], ["paper", "recipe", "base_arm"]
    added_to = pandas.MultiIndex.from_frame(lines[key]).isin(pandas.MultiIndex.from_frame(lines.query("base_arm != ''")[base]))
    lines = lines[~added_to | (lines["Method"] == PIXELS)].query("data == 'digits' and overrides == '' and encoder_file == '' and split == '' and heading in @DIGITS")
    return by_run(lines.replace({"heading": DIGITS}), [*DIGITS.values()])


def measured_lines(root: Path) -> pandas.DataFrame:
    """Summary lines with a top-1: of methods, those of raw pixels at the end of each data set. Columns of RUN, `heading` and `cell` too.

    A cell has the number in percent, in brackets that without pre-training, and before it what sets protocols of one heading apart.
    """
    parts = []
    for paper in [*papers(root), *baselines(root)]:
        lines = measured(paper, root).query("metric == 'top1'")
        own = with_baselines(lines)
        supervised = own["protocol"].eq("scratch").groupby([own[name] for name in GIVEN]).transform("any")
        names = [run_name(line).removeprefix(line.data).strip() if line.recipe == line.data else run_name(line) for line in own.itertuples()]
        own["Method"] = [f"{paper} {name}".strip() + ", supervised" * own for name, own in zip(names, supervised, strict=True)]
        pixels = lines.query("start == 'pixels'").assign(Method=PIXELS, backbone="", pretrain_epochs=0)
        parts += [own, pixels]
    lines = pandas.concat(parts, ignore_index=True)
    lines["Data"], lines["Backbone"] = lines["data"].map(title), lines["backbone"].map(title)
    lines["Epochs"], lines["Device"] = lines["pretrain_epochs"], lines["device"] + ", " + lines["precision"]
    lines[["heading", "detail"]] = [heading(name) for name in lines["protocol"]] or pandas.DataFrame(columns=["heading", "detail"])
    lines["cell"] = [
        f"{line.detail}: " * bool(line.detail) + number(line.mean, line.sd)
        + f" ({number(line.untrained_mean, line.untrained_sd)})" * pandas.notna(line.untrained_mean)
        for line in lines.itertuples()
    ]  # fmt: skip
    order = lines["data"].factorize()[0] * 2 + (lines["Method"] == PIXELS)
    return lines.iloc[order.argsort(kind="stable")]


def by_run(lines: pandas.DataFrame, headings: list[str] | None = None) -> str:
    """A table of `measured_lines`: a row per run, a column per heading. One device is said once, several in a column."""
    if lines.empty:
        return markdown(lines)
    known = headings or [name for name in dict.fromkeys([*HEADINGS.values(), *lines["heading"]]) if name in {*lines["heading"]}]
    runs = lines.groupby(RUN, sort=False).agg(fewest=("seeds", "min"), most=("seeds", "max"), log=("log", "first"))
    cells = lines.groupby([*RUN, "heading"], sort=False)["cell"].agg(lambda cells: "<br>".join(dict.fromkeys(cells))).unstack("heading")
    table = runs.join(cells.reindex(columns=known)).fillna("").reset_index()
    table["Seeds"] = [str(low) if low == high else f"{low} to {high}" for low, high in zip(table["fewest"], table["most"], strict=True)]
    table["Logs"] = table["log"].map(logs_link)
    devices = table["Device"].unique()
    shown = [*RUN[:-1], *(["Device"] if len(devices) > 1 else []), "Seeds", *known, "Logs"]
    return f"Device: {devices[0]}.\n\n" * (len(devices) == 1) + markdown(table[shown])


def heading(protocol: str) -> tuple[str, str]:
    """Where a protocol's numbers stand: the heading, and what is said in the cell. Of finetune_none these are All labels and none."""
    known = max((known for known in HEADINGS if f"{protocol}_".startswith(f"{known}_")), key=len, default=protocol)
    return HEADINGS.get(known, known.replace("_", " ")), protocol.removeprefix(known).replace("_", " ").strip()


def logs_link(logs: str) -> str:
    """A link from a page at the root to the folder of a run's logs."""
    return f"[logs]({PurePosixPath(logs.split()[0]).parent})"
