"""The state of all jobs of an output folder, from their journals, the runs, squeue and sacct; and how to cancel them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.slurm import journal
from benchmarks.slurm.cluster import LIVE, Seen, ask, look
from common.run import RunError, console

ENDS = {"finished": "finished", "failed": "failed", "cancelled": "cancelled"}


@dataclass
class Job:
    """One job of a task, as Slurm sees it; a task of a chain has several."""

    id: str
    task: dict  # an entry of jobs.json
    log: Path  # the journal of the task
    seen: Seen | None

    @property
    def live(self) -> bool:
        return self.seen is not None and self.seen.state in LIVE


def read_jobs(out: Path) -> list[Job]:
    """All jobs that were submitted for an output folder, in order; tasks that were submitted again only with their last jobs."""
    latest: dict[str, tuple[dict, Path]] = {}
    for listed in sorted((out / "slurm").glob("*/jobs.json")):
        for task in json.loads(listed.read_text()):
            latest[task["name"]] = (task, listed.parent)
    ids = [job for task, _ in latest.values() for job in task["jobs"]]
    since = min((folder.name for _, folder in latest.values()), default="")
    seen = look(ids, since) if ids else {}
    return [Job(job, task, folder / f"{task['name']}.jsonl", seen.get(job)) for task, folder in latest.values() for job in task["jobs"]]


def status(out: Path) -> None:
    """Print a line for each task. Raises RunError if nothing was submitted for the folder."""
    out = out.absolute()
    jobs = read_jobs(out)
    if not jobs:
        raise RunError(f"no jobs were submitted for OUT={out}; make submit does")
    head = ("task", "job", "state", "node", "step", "starts", "last sign", "why")
    names = dict.fromkeys(job.task["name"] for job in jobs)
    table = [head, *(line([job for job in jobs if job.task["name"] == name]) for name in names)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    for row in table:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), markup=False)


def line(jobs: list[Job]) -> tuple[str, ...]:
    """The cells of one task, from its jobs."""
    job = next((job for job in jobs if job.live), jobs[-1])
    noted = journal.events(job.log)
    starts = [event for event in noted if event["event"] == "start"]
    state, why = verdict(job, noted)
    node = (job.seen.nodes if job.seen and job.live else "") or (starts[-1]["node"] if starts else "")
    reports = [json.loads(path.read_text()) for folder in journal.find(job.task["folders"]) if (path := folder / "progress.json").exists()]
    newest = max(reports, key=lambda report: report["time"], default=None)
    step = f"{newest['step']}/{newest['total']} (epoch {newest['epoch']:.4g})" if newest else ""
    last = max([newest["time"] if newest else 0.0, noted[-1]["time"]])
    return noted[0]["label"], job.id, state, node, step, str(len(starts)), f"{age(time.time() - last)} ago", why


def verdict(job: Job, noted: list[dict]) -> tuple[str, str]:
    """The state of a task and why: what its journal says has precedence if it ended; what Slurm says if it still has the job."""
    last = next((event for event in reversed(noted) if event["event"] not in ("start", "error")), noted[0])
    starts = [event for event in noted if event["event"] == "start"]
    if last["event"] == "finished" and not job.live:
        return "finished", ""
    if job.live and job.seen is not None:
        if job.seen.state == "PENDING":
            return ("requeued" if starts else "waiting"), "; ".join(filter(None, [last.get("why", ""), job.seen.reason]))
        return job.seen.state.lower(), last.get("why", "") if last["event"] == "requeued" else ""
    if last["event"] in ENDS:
        return ENDS[last["event"]], last.get("why", "")
    if job.seen is None:
        return "lost", "neither squeue nor sacct knows the job, and its journal has no end"
    if job.seen.state == "CANCELLED" and not starts:
        return "cancelled", "a job that it depends on has failed, or scancel"
    started = "" if starts else "it never started: see its log; does the node see OUT?"
    return job.seen.state.lower(), "; ".join(filter(None, [last.get("why", ""), job.seen.reason, started]))


def cancel(out: Path) -> None:
    """Cancel all jobs of an output folder that have not ended."""
    out = out.absolute()
    live = [job for job in read_jobs(out) if job.live]
    for job in live:
        journal.note(job.log, "cancelled", why="make cancel")
    if live:
        ask("scancel", *[job.id for job in live])
    console.print(f"{len(live)} jobs cancelled")


def age(seconds: float) -> str:
    """A duration in its largest unit: 12 s, 3 min, 5 h, 2 d."""
    for unit, size in {"d": 86_400, "h": 3_600, "min": 60}.items():
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
