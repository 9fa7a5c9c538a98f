"""Tables of the downstream tasks: our numbers, then published ones of the same data and of others, each with its source."""

from pathlib import Path

import pandas

from benchmarks.ledger.published import PUBLISHED, title
from benchmarks.ledger.rows import GROUP, load, summary
from benchmarks.ledger.tables import log_link, markdown, number

# The metrics of a task with their titles, in percent.
DOWNSTREAM = {
    "segmentation": {"miou": "mean IoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"},
    "detection": {"ap_box": "box AP", "ap50_box": "box AP50", "ap_mask": "mask AP", "ap50_mask": "mask AP50"},
}


def downstream_table(task: str, root: Path) -> str:
    """The ledger of benchmarks/<task>, a row for each training, and the published numbers in its published.csv."""
    home, metrics = root / "benchmarks" / task, DOWNSTREAM[task]
    lines, table = summary(load(home / "results.csv")), []
    for _, group in lines.groupby([name for name in GROUP if name != "metric"], sort=False):
        one, found = next(group.itertuples()), {row.metric: number(row.mean, row.sd) for row in group.itertuples()}
        run = one.encoder_file.rpartition("/")[0]  # of a run's own encoder: two seeds are two encoders
        encoder = " ".join(filter(None, [one.paper, run or one.recipe, one.arm, one.overrides]))
        table.append(
            {
                "Data": title(one.data),
                "Encoder": encoder if one.start == "pretrained" else f"{encoder}, random weights",
                "Backbone": title(one.backbone),
                "Epochs": str(one.pretrain_epochs or ""),
                "Training": one.protocol,
                **{heading: found.get(metric, "") for metric, heading in metrics.items()},
                "Seeds": str(one.seeds),
                "Log": log_link(group["log"], root, home),
            }
        )
    path = home / "published.csv"
    theirs = pandas.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pandas.DataFrame(columns=PUBLISHED)
    for _, group in theirs.groupby([name for name in PUBLISHED if name not in ("metric", "value")], sort=False):
        one, found = next(group.itertuples()), dict(zip(group["metric"], group["value"], strict=True))
        doubt = ", second hand" * (one.confidence != "first_hand")
        table.append(
            {
                "Data": title(one.dataset),
                "Encoder": one.method,
                "Backbone": title(one.backbone.replace("not_stated", "")),
                "Epochs": one.pretrain_epochs,
                "Training": one.setting or one.protocol,
                **{heading: found.get(metric, "") for metric, heading in metrics.items()},
                "Seeds": "",
                "Log": f"published: {one.paper}, {one.table}{doubt}",
            }
        )
    return markdown(pandas.DataFrame(table))
