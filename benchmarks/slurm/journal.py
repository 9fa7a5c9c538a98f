"""The journal of a task: its events, one line of JSON each. As a program, it runs when the processes of a job have ended, and requeues it.

    python journal.py JOURNAL EXIT_CODE

Imports only the standard library, because Slurm may kill the job before torch is loaded. It runs in the batch script, after the last
process has ended: so there is no race between a requeue and a process that still saves, and a killed process is noticed as well.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STUCK_AFTER = 3  # starts without a new step end a task
FOR_GOOD = 2  # exit code of errors that a restart does not fix
STOPPED = 75  # common.stopping.EXIT_STOPPED


def note(journal: Path, event: str, **facts: object) -> None:
    """Append an event to a journal."""
    with open(journal, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")


def events(journal: Path, name: str = "") -> list[dict]:
    """The events of a journal, or those of one name; a line that was cut off is left out."""
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [event for event in found if not name or event["event"] == name]


def find(patterns: list[str]) -> list[Path]:
    """The folders of stages that match absolute patterns."""
    return [path for pattern in patterns for path in Path("/").glob(pattern.lstrip("/"))]


def progress(journal: Path) -> list[int]:
    """The stages of a task that are finished, and the sum of the steps that are saved."""
    folders = find(events(journal, "submitted")[0]["folders"])
    saved = [json.loads(path.read_text())["saved"] for folder in folders if (path := folder / "progress.json").exists()]
    return [sum((folder / "result.json").exists() for folder in folders), sum(saved)]


def stuck(journal: Path) -> str:
    """Why a task must not be started again; "" if one of its last starts gained a step."""
    starts = events(journal, "start")[-STUCK_AFTER:]
    if len(starts) < STUCK_AFTER or starts[0]["progress"] != progress(journal):
        return ""
    return f"no step gained in {STUCK_AFTER} starts, on {', '.join(start['node'] for start in starts)}"


def ended(journal: Path, code: int) -> int:
    """Note the end of a job's processes and requeue the job if another start can help. Returns the exit code for the job."""
    cause = _first_error(journal)
    why = _words(code) + (f": {cause}" if cause and code != STOPPED else "")
    if code == 0:
        note(journal, "finished")
    elif code == FOR_GOOD:
        note(journal, "failed", why=cause or why)
    elif reason := stuck(journal):
        note(journal, "failed", why=f"{reason}; the last: {why}")
    elif not events(journal, "submitted")[0]["requeue"]:
        note(journal, "stopped", why=f"{why}; the next job of the chain resumes")
    elif (state := _state()) not in ("RUNNING", "TIMEOUT", ""):
        note(journal, "stopped", why=f"{why}; Slurm ended the job ({state})")
    else:
        note(journal, "requeued", why=why)
        if fault := _requeue():
            note(journal, "failed", why=f"{why}; not requeued: {fault}")
    return code


def _first_error(journal: Path) -> str:
    """The first error after the last start; the other processes then fail because they lose the connection to the first."""
    since = events(journal)
    for index in reversed(range(len(since))):
        if since[index]["event"] == "start":
            return next((event["text"] for event in since[index:] if event["event"] == "error"), "")
    return next((event["text"] for event in since if event["event"] == "error"), "it ended before it started: see its log")


def _words(code: int) -> str:
    if code == STOPPED:
        return "stopped by a signal, progress saved"
    if code > 128 and code - 128 in {number.value for number in signal.Signals}:
        return f"a process was killed by {signal.Signals(code - 128).name}"
    return f"a process ended with exit code {code}"


def job_id() -> str:
    """The id of this job, as Slurm's commands take it: of a task of an array, 12_3."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _state() -> str:
    """The state of this job. Slurm ends and requeues some jobs itself, and a cancelled one must not come back. "" if it is not known."""
    try:
        shown = subprocess.run(["scontrol", "-o", "show", "job", job_id()], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return shown.partition("JobState=")[2].partition(" ")[0]


def _requeue() -> str:
    """Requeue this job; the error, or "". Slurm starts to kill the job at once."""
    try:
        subprocess.run(["scontrol", "requeue", job_id()], capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError:
        return f"node {os.environ.get('SLURMD_NODENAME')} has no scontrol: submit again with CHAIN=4"
    except subprocess.CalledProcessError as error:
        return f"{error.stderr.strip()}: submit again with CHAIN=4"
    except subprocess.TimeoutExpired:
        return "scontrol did not answer in 60 s"
    return ""


if __name__ == "__main__":
    sys.exit(ended(Path(sys.argv[1]), int(sys.argv[2])))
