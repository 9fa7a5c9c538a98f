"""What Slurm's commands say of the cluster and of jobs."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "SPECIAL_EXIT")


class ClusterError(ValueError):
    """Slurm refused a command; the message has its words."""


def ask(*command: str) -> str:
    """What a command of Slurm prints. Raises ClusterError with its last line if it fails, is missing, or does not answer in a minute."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except FileNotFoundError:
        raise ClusterError(f"{command[0]} is not on the PATH") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} did not answer in 60 s") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [f"exit code {error.returncode}"]
        raise ClusterError(re.sub(r"^\w+: (error: )?(Batch job submission failed: |allocation failure: )?", "", lines[-1])) from None


@dataclass
class Wanted:
    """What a submission needs of the cluster."""

    partition: str | None
    minutes: int  # time limit of a job
    largest_array: int  # number of tasks
    requeue: bool
    flags: list[str]  # of sbatch


def problems(wanted: Wanted) -> Iterator[str]:
    """What the cluster would refuse, one line each."""
    missing = [name for name in ("sbatch", "squeue", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        yield f"{', '.join(missing)}: not on the PATH, so this is not a machine of a Slurm cluster; without Slurm use make reproduce"
        return
    try:
        config = dict(re.findall(r"^(\w+)\s*= (.*)$", ask("scontrol", "show", "config"), re.MULTILINE))
        partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in ask("scontrol", "-o", "show", "partition").splitlines()]
    except ClusterError as error:
        yield f"Slurm does not answer: {error}"
        return
    named = [one for one in partitions if one["PartitionName"] == wanted.partition or (not wanted.partition and one["Default"] == "YES")]
    if not named:
        known = ", ".join(one["PartitionName"] for one in partitions)
        yield f"PARTITION={wanted.partition or ''}: {'no such partition' if wanted.partition else 'there is no default'}; known: {known}"
    elif (limit := minutes(named[0]["MaxTime"])) is not None and wanted.minutes > limit:
        yield f"HOURS={wanted.minutes / 60:g}: the limit of partition {named[0]['PartitionName']} is {limit / 60:g}"
    if wanted.largest_array > (most := int(config.get("MaxArraySize", 1001)) - 1):
        yield f"an array of {wanted.largest_array} jobs, and the cluster allows {most} (MaxArraySize): use fewer seeds, arms or papers"
    if wanted.requeue and config.get("JobRequeue") == "0":
        yield "the cluster does not requeue jobs (JobRequeue=0): use CHAIN=4, which submits each job four times, one after the other"
    if named:
        try:
            ask("sbatch", "--test-only", *wanted.flags, "--wrap=true")
        except ClusterError as error:
            yield f"sbatch {' '.join(wanted.flags)}: {error}"


def minutes(limit: str) -> int | None:
    """The minutes of a time limit of Slurm: [days-]hours:minutes:seconds; None if unlimited."""
    if not (found := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)):
        return None
    days, hours, rest, _ = (int(number or 0) for number in found.groups())
    return (24 * days + hours) * 60 + rest


@dataclass
class Seen:
    """A job as Slurm sees it."""

    state: str
    nodes: str
    reason: str  # why it waits, or which step ended it


def look(jobs: Sequence[str], since: str) -> dict[str, Seen]:
    """The state of jobs that squeue or, for those it has forgotten, sacct knows; without sacct, those of squeue.

    since: when the first of them was submitted, as sacct takes it: a cluster that was installed anew gives old ids again.
    """
    found: dict[str, Seen] = {}
    numbers = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    try:
        # With its steps (no -X): one that ran out of memory says so, and the job says only FAILED.
        lines = ask("sacct", "-n", "-P", "-S", since, "-j", numbers, "-o", "JobID,State,NodeList").splitlines()
    except ClusterError:
        lines = []
    for line in lines:
        name, state, nodes = line.split("|")
        job, _, step = name.partition(".")
        if not step:
            found[job] = Seen(state.split()[0], nodes, "")
        elif job in found and state.startswith("OUT_OF_ME"):
            found[job].reason = f"step {step} ran out of memory"
    try:
        queue = ask("squeue", "-h", "-r", "-t", "all", "-j", numbers, "-o", "%i|%T|%N|%r").splitlines()
    except ClusterError as error:
        if "Invalid job id" not in str(error):
            raise
        queue = []
    for line in queue:
        job, state, nodes, reason = line.split("|")
        if job not in found or state in LIVE:
            found[job] = Seen(state, nodes, reason if reason != "None" else "")
    return {job: seen for job, seen in found.items() if job in jobs}
