"""The directory of one training: settings, environment, logs, results, and a lock against a second process.

recipe.json        all settings; a directory with other settings is refused
environment.json   commit, versions and device, one entry per start that contributed to the run
metrics.jsonl      a line per logged step, bit-identical for any number of interruptions
progress.json      the step that is trained and the step that is saved, for those who watch the run; replaced every ten seconds
log.txt            the messages on the screen
checkpoint.pt      the checkpoint for resuming
result.json        the results; this file exists only if the training is complete
card.json          (pre-training) the method's paper and the format of the images, for the model card of an export
encoder.safetensors (pre-training) is written with each checkpoint, from the EMA if the stage has one. Evaluations wait for result.json.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from common.environment import environment
from common.files import Locked, locked, replacing

REPORT_SECONDS = 10.0  # between two versions of progress.json

console = Console(highlight=False, soft_wrap=True)


class RunError(RuntimeError):
    """A run that cannot start or continue; the message says how to fix it."""


@contextmanager
def sole_use(folder: Path, program: str) -> Iterator[None]:
    """Hold the lock of a folder within the block. Raises RunError if another `program` holds it."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock"))
        except Locked:
            raise RunError(f"{folder} is in use by another {program}; wait for it, or set another folder with OUT=") from None
        yield


class Run:
    """An open run directory. Use as a context manager; `main` is True only on the main process, and other processes write nothing.

    checkpoint: the file, relative to the directory, that is there as soon as the training can be resumed.
    Raises RunError if another process has locked the directory, or if it contains a run with other settings.
    """

    def __init__(
        self, directory: Path, settings: dict[str, Any], device: torch.device, main: bool = True, checkpoint: str = "checkpoint.pt"
    ):
        self.directory, self.settings, self.main, self.device = Path(directory), settings, main, device
        self.checkpoint = self.directory / checkpoint
        self.metrics = self.directory / "metrics.jsonl"
        self._reported = 0.0

    def __enter__(self) -> "Run":
        with ExitStack() as held:
            if self.main:
                held.enter_context(sole_use(self.directory, "run"))
                self._start()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json, or None if the training is not complete."""
        path = self.directory / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """Log the results and write them to result.json, with date, environment, and the start of the SHA-256 of recipe.json.

        If the commit changed during the run, "+mixed" follows it.
        Returns the content of result.json.
        """
        if self.main:
            numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
            self.say(f"{self.directory.name} done: {', '.join(f'{name} {value:.6g}' for name, value in numbers.items())}")
            starts = json.loads((self.directory / "environment.json").read_text())
            came_from = starts[0]
            if len({start["commit"] for start in starts}) > 1:
                came_from["commit"] += "+mixed"
            settings = hashlib.sha256((self.directory / "recipe.json").read_bytes()).hexdigest()[:16]
            facts = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "environment": came_from, "recipe_sha256": settings}
            write_text(self.directory / "result.json", json.dumps(result | facts, indent=1) + "\n")
        return self.result

    def say(self, line: str) -> None:
        """Print a line to the screen and to log.txt."""
        if self.main:
            console.print(line, markup=False)
            with open(self.directory / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append a line to metrics.jsonl."""
        if self.main:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def report(self, step: int, total: int, epoch: float, saved: int, now: bool = False) -> None:
        """Write progress.json: the step of `total`, its epoch and the last saved step; `now` or if the last one is REPORT_SECONDS old."""
        if self.main and (now or time.monotonic() - self._reported > REPORT_SECONDS):
            self._reported = time.monotonic()
            facts = {"time": time.time(), "step": step, "total": total, "epoch": round(epoch, 3), "saved": saved}
            write_text(self.directory / "progress.json", json.dumps(facts) + "\n")

    def forget_after(self, step: int) -> None:
        """Remove the lines of metrics.jsonl that were written after the checkpoint of this step, and an incomplete last line."""
        if not self.main or not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    @property
    def _begun(self) -> bool:
        """Whether there is a checkpoint to resume from, or a result; other files of earlier starts do not count."""
        return self.checkpoint.exists() or self.result is not None

    def check_settings(self) -> None:
        """Raise RunError if the directory contains a run with other settings. Writes nothing."""
        recipe = self.directory / "recipe.json"
        if self._begun and recipe.exists() and (held := json.loads(recipe.read_text())) != self.settings:
            differing = ", ".join(differences(held, self.settings, "there", "requested"))
            raise RunError(f"{self.directory} holds a run with other settings ({differing}); set another folder with OUT=, or delete it")

    def _start(self) -> None:
        """Write settings and environment."""
        self.check_settings()
        recipe, starts = self.directory / "recipe.json", self.directory / "environment.json"
        write_text(recipe, json.dumps(self.settings, indent=1) + "\n")
        if self.result is None:
            earlier = json.loads(starts.read_text()) if self._begun and starts.exists() else []
            write_text(starts, json.dumps([*earlier, environment(self.device)], indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically: a crash leaves the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def differences(one: Any, other: Any, where: str, elsewhere: str, path: str = "") -> list[str]:
    """The differences of two JSON values, as "path: 1 where, 2 elsewhere"."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [d for key in keys for d in differences(one.get(key), other.get(key), where, elsewhere, f"{path}.{key}" if path else key)]
    return [] if one == other else [f"{path}: {one} {where}, {other} {elsewhere}"]
