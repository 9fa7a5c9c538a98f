"""Progress of work on many images, on the screen."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress

from common.run import console

SHOW_SECONDS = 20.0  # between two lines


@contextmanager
def progress_bar(title: str, begun: int = 0) -> Iterator[Callable[[int, int], None]]:
    """Yield a function (done, total) that updates a bar on a terminal, and prints a line at most every SHOW_SECONDS and at the end.

    begun: images that were done before; they are excluded from the estimate of the remaining time.
    """
    start = shown = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int) -> None:
            nonlocal shown
            bar.update(task, completed=done, total=total)
            now = time.monotonic()
            if done == total or now - shown >= SHOW_SECONDS:
                shown, left = now, (total - done) * (now - start) / max(1, done - begun)
                console.print(f"{title}: {done} of {total} images, {left:.0f} s left", markup=False)

        yield show
