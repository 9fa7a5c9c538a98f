"""The environment of a result: the commit of the code, the versions of its dependencies, and the device."""

import hashlib
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "timm", "lightning", "numpy")

ROOT = Path(__file__).resolve().parents[1]
COPIED_FROM = "copied_from.txt"  # in a copy of the code: the commit of the checkout
# Changes of recorded results, pictures and READMEs do not change the next run.
NOT_CODE = (":(exclude)*results.csv", ":(exclude)*/speed/*.csv", ":(exclude)*/logs/*", ":(exclude)*.png", ":(exclude)*.md")


def commit() -> str:
    """The commit of this code, with "+dirty" if code is not committed; "unknown" outside a git checkout and a copy of one."""
    if (ROOT / COPIED_FROM).exists():
        return (ROOT / COPIED_FROM).read_text().strip()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        top, head = git("rev-parse", "--show-toplevel", "--short=12", "HEAD").splitlines()
        if Path(top).resolve() != ROOT:  # installed somewhere inside another project's checkout
            return "unknown"
        return head + ("+dirty" if git("status", "--porcelain", "--", ".", *NOT_CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code() -> str:
    """The commit, and a hash of all Python files of the project, which also tells edits that are not committed from each other."""
    found = hashlib.sha256()
    for package in sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"):
        for path in sorted(package.rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{commit()}, files {found.hexdigest()[:12]}"


def versions() -> str:
    """The versions on which results depend most, as one line for a table row."""
    return f"torch {version('torch')}, timm {version('timm')}, python {platform.python_version()}"


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """The device, without the machine's name: NVIDIA H100 80GB HBM3, or 2-core Intel Xeon (AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE))
    model = facts.get("model name") or platform.processor() or platform.machine()
    model = " ".join(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", model, flags=re.IGNORECASE).split())
    cores = available_cores()
    # bf16 is fast only with one of these two, so devices with and without them must have different names.
    extras = [name for name in ("AMX-BF16", "AVX512-BF16") if name.lower().replace("-", "_") in facts.get("flags", "").split()]
    return f"{cores}-core {model}" + (f" ({', '.join(extras)})" if extras else "")


def environment(device: torch.device) -> dict[str, str | int]:
    """The content of environment.json: commit, versions and device."""
    return {
        "commit": commit(),
        "versions": versions(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
