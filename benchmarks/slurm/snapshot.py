"""A copy of the code for the jobs, so that edits after the submission do not change them."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from common.environment import COPIED_FROM, ROOT, commit
from common.run import RunError


def copy_code(out: Path) -> Path:
    """Copy the code as it is now, committed or not, to OUT/code-COMMIT and return that folder.

    These are the files that git tracks, and new Python files. The copy is made beside it and renamed. Raises RunError outside a checkout.
    """
    names = set[str]()
    for which in (["--cached"], ["--others", "--exclude-standard", "*.py"]):
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", *which], capture_output=True, text=True)
        if listed.returncode:
            raise RunError(f"{ROOT} is not a git checkout, so its code cannot be copied for the jobs: {listed.stderr.strip()}")
        names |= {name for name in listed.stdout.split("\0") if (ROOT / name).is_file() and not (ROOT / name).is_relative_to(out)}
    state = commit()
    content = hashlib.sha256(b"".join(name.encode() + (ROOT / name).read_bytes() for name in sorted(names))).hexdigest()
    folder = out / f"code-{state}{'-' + content[:8] if state.endswith('+dirty') else ''}"
    if not folder.exists():
        staged = out / f".{folder.name}.{os.getpid()}"
        for name in names:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, staged / name)
        (staged / COPIED_FROM).write_text(state + "\n")
        os.rename(staged, folder)
    return folder
