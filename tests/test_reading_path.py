"""Number of files from the command to the loss, and from the last result to the table."""

import sys
from pathlib import Path
from types import FrameType

import pytest

from benchmarks.ledger.tables import show
from benchmarks.reproduce import main
from common.environment import ROOT
from common.run import Run
from stop.method import StoP


def file_of(frame: FrameType) -> str:
    """Return the file of a frame, relative to the root; "" outside the project's own code."""
    path = Path(frame.f_code.co_filename)
    inside = ROOT in path.parents and not {".venv", "tests"} & {*path.relative_to(ROOT).parts}
    return path.relative_to(ROOT).as_posix() if inside else ""


@pytest.mark.slow
def test_a_reader_opens_at_most_ten_files_to_the_loss_and_six_to_the_table(tmp_path, monkeypatch, capsys):
    forward, close, to_loss, to_table = StoP.forward, Run.__exit__, ["Makefile"], []

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and (file := file_of(frame)) and file not in to_table:
            to_table.append(file)

    def first_loss(self, *inputs, **options):
        frames = [sys._getframe()]
        while frames[-1].f_back is not None:
            frames.append(frames[-1].f_back)
        if self.training and len(to_loss) == 1 and not next(self.parameters()).is_meta:
            to_loss.extend(dict.fromkeys(filter(None, map(file_of, reversed(frames)))))
        return forward(self, *inputs, **options)

    def last_number(self, *error):
        close(self, *error)
        sys.setprofile(watch if self.directory.name == "knn-pixels" else None)

    def table(*rows):
        show(*rows)
        sys.setprofile(None)

    monkeypatch.setattr("benchmarks.reproduce.show", table)
    monkeypatch.setattr(StoP, "forward", first_loss)
    monkeypatch.setattr(Run, "__exit__", last_number)
    short = ["--arms", "ijepa+stop", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path), "--set", "linear.stage.epochs=1"]
    try:
        assert main(["stop", *short]) == 0
    finally:
        sys.setprofile(None)
    to_loss.append("stop/method.py")
    with capsys.disabled():
        print(f"\nto the loss, {len(to_loss)}: {', '.join(to_loss)}\nto the table, {len(to_table)}: {', '.join(to_table)}")
    assert len(to_loss) <= 10 and len(to_table) <= 6
