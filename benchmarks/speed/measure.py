"""Shared parts of the speed measurements: waiting for the device, its matrix products, printing and storing results."""

import datetime
import os
import time
from pathlib import Path

import pandas
import torch
from rich.table import Table

from common.environment import commit, device_name, versions
from common.run import console


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of a few large matrix products; the first two occur in a ViT-B step at batch 16."""
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    rates = []
    for m, k, n in ((3152, 768, 3072), (3152, 3072, 768), (4096, 4096, 4096)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        for _ in range(6):
            wait(device)
            begun = time.perf_counter()
            a @ b
            wait(device)
            rates.append(2 * m * k * n / (time.perf_counter() - begun))
    return max(rates)


def facts(device: torch.device) -> dict[str, str]:
    """The columns that all measurements have: device, versions, commit and date."""
    date = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    return {"device": device_name(device), "versions": versions(), "commit": commit(), "date": date}


def show(frame: pandas.DataFrame, title: str, device: torch.device) -> None:
    """Print a measurement as a table."""
    table = Table(*frame.columns, title=f"{title}, {device_name(device)}\n{versions()}")
    for line in frame.itertuples(index=False):
        table.add_row(*("-" if pandas.isna(cell) else str(cell) for cell in line))
    console.print(table)


def wide(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Attention measurements, one line per shape and way: milliseconds of each pass, and the same as a multiple of the floor."""
    names = ["device", "precision", "shape", "batch", "way"]
    lines = frame.assign(cell=[f"{ms:.3g} ms ({times:.3g})" for ms, times in zip(frame["milliseconds"], frame["floor"], strict=True)])
    lines = lines.set_index([*names, "pass"])["cell"].unstack("pass").reset_index()
    order = frame[names].drop_duplicates()
    return order.merge(lines, on=names)[["shape", "batch", "way", *frame["pass"].unique()]]


def check_kept(path: Path, same: list[str]) -> None:
    """Raise before a measurement what `keep` would raise after it: ValueError if the file lacks these columns, OSError without access."""
    if path.exists():
        missing = set(same) - set(pandas.read_csv(path, nrows=0).columns)
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}: restore the file, or delete it to begin a new one")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"{path} is not writable, but measurements are stored there")


def keep(frame: pandas.DataFrame, path: Path, same: list[str]) -> None:
    """Write lines to a CSV file. They replace old lines with the same values in the columns `same`."""
    if path.exists():
        held = pandas.read_csv(path)
        new = set(frame[same].itertuples(index=False, name=None))
        others = held[[line not in new for line in held[same].itertuples(index=False, name=None)]]
        frame = pandas.concat([others, frame])[list(frame.columns)]
    frame.to_csv(path, index=False)
