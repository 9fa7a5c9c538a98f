"""Tests of locks, file digests and a terminal that is not UTF-8."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
import torch

from common.environment import ROOT
from common.files import Locked, digest, locked
from common.run import Run, RunError
from mapet.tokenizers.store import making


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_reported_and_the_run_continues(code, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Run(tmp_path / "run", {}, torch.device("cpu")) as run:
        run.finish({"top1": 1.0})
    with making(tmp_path / "store"):
        pass
    assert caplog.text.count("this file system has no locks") == 2 and "another run" not in caplog.text


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_lock_held_by_another_process_is_reported(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match="in use by another run"):
        Run(tmp_path, {}, torch.device("cpu")).__enter__()
    with pytest.raises(Locked), locked(tmp_path / "store.lock"):
        pass


def test_a_run_that_is_refused_leaves_no_lock(tmp_path):
    with Run(tmp_path, {"seed": 0}, torch.device("cpu")) as run:
        run.finish({"top1": 1.0})
    with pytest.raises(RunError, match="other settings .seed: 0 there, 1 requested"):
        Run(tmp_path, {"seed": 1}, torch.device("cpu")).__enter__()
    with locked(tmp_path / ".lock"), pytest.raises(Locked), locked(tmp_path / ".lock"):
        pass


def test_a_digest_depends_on_content_and_not_on_location(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder / "inner").mkdir(parents=True)
        (tmp_path / folder / "inner" / "x").write_bytes(content)
    found = [digest(tmp_path / name) for name in "abc"]
    assert found[0] == found[1] != found[2]
    assert digest(tmp_path / "a" / "inner" / "x") == digest(tmp_path / "b" / "inner" / "x") != digest(tmp_path / "c" / "inner" / "x")


def test_a_terminal_that_is_not_utf8_still_shows_the_table(tmp_path):
    code = "import rich.table, benchmarks.reproduce as r\nfrom common.run import console\n"
    code += "def show(options):\n    table = rich.table.Table('top-1 \\u00b1')\n"
    code += "    table.add_row('99 \\u00b1 1 \\udcff')\n    console.print(table)\n"
    code += "r.reproduce = show\nraise SystemExit(r.main(['droppos']))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "99 " in done.stdout, done.stderr
