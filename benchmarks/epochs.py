"""How an encoder changes during pre-training: the evaluations after each so many epochs (`--every`), in one file per paper."""

import json
from collections.abc import Sequence

import pandas
from rich.table import Table

from benchmarks.ledger.tables import counted
from benchmarks.stages import Stages
from common.run import console, write_text


def by_epoch(runs: Sequence[Stages]) -> pandas.DataFrame:
    """The evaluations that are finished, top-1 in percent of the test images; the last epoch of a run is its pre-trained encoder."""
    found = []
    for run in runs:
        starts = {epoch: f"{epoch}ep" for epoch in run.kept_epochs} | {run.recipe.pretrain.epochs: "pretrained"}
        for protocol in run.recipe.protocols:
            for epoch, start in starts.items():
                path = run.root / f"{protocol.name}-{start}" / "result.json"
                if not path.exists():
                    continue
                result = json.loads(path.read_text())
                facts = {"commit": result["environment"]["commit"], "date": result["date"], "device": result["environment"]["device"]}
                for one in result["results"]:
                    values = {"protocol": one["protocol"], "top1": round(one["top1"], 4), "settings": one["settings"]}
                    found.append({"recipe": run.name, "arm": run.arm, "seed": run.seed, "epoch": epoch, **values, **facts})
    return pandas.DataFrame(found)


def show_by_epoch(runs: Sequence[Stages]) -> None:
    """Write OUT/<paper>/epochs.csv, and print the means over seeds: a line for each arm and protocol, a column for each epoch."""
    table, path = by_epoch(runs), runs[0].root.parent / "epochs.csv"
    if table.empty:
        return
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
    means = table.pivot_table("top1", ["arm", "protocol"], "epoch", sort=False).sort_index(axis=1)
    heading = f"top-1 in percent after some epochs, {counted(table['seed'].nunique(), 'seed')}"
    screen = Table(title=heading, caption="the learning rate decays until the last one", min_width=len(heading))
    for column in ("Protocol", *map(str, means.columns)):
        screen.add_column(column, justify="left" if column == "Protocol" else "right")
    for (arm, protocol), values in means.iterrows():
        screen.add_row(" ".join(filter(None, [arm, protocol])), *("-" if pandas.isna(value) else f"{value:.2f}" for value in values))
    console.print(screen, soft_wrap=False)
    console.print(f"also in {path}", markup=False)
