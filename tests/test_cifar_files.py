"""Tests of the files of CIFAR: which process downloads and extracts them, and what happens after a process was killed."""

import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy
import pytest
from torchvision import datasets

from common.data import DataError, open_data, sets

FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
IMAGES = 300


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def small() -> tuple[dict, bytes]:
    """Attributes of a CIFAR-10 of 300 images, and its archive, which ends with the class names."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (IMAGES, 3072), dtype=numpy.uint8)
    batch = pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(IMAGES)]})
    files = {"data_batch_1": batch, "test_batch": batch, "batches.meta": pickle.dumps({"label_names": list("abcdefghij")})}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(files["batches.meta"])}
    lists = {"train_list": [["data_batch_1", md5(batch)]], "test_list": [["test_batch", md5(batch)]]}
    return {**lists, "meta": meta, "tgz_md5": md5(packed.getvalue())}, packed.getvalue()


@pytest.fixture
def address(small, monkeypatch):
    """The URL of a server that takes one second to send the archive."""

    class Slow(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(small[1])))
            self.end_headers()
            step = len(small[1]) // 20 + 1
            for start in range(0, len(small[1]), step):
                self.wfile.write(small[1][start : start + step])
                time.sleep(0.05)

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_) -> None:  # a client that follows redirects stops reading
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Quiet(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{ARCHIVE}"
    server.shutdown()


@pytest.fixture
def cifar(small, monkeypatch):
    """torchvision's class with the small data set and without a network."""
    for name, value in small[0].items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/none")


def fill(root: Path, archive: bytes) -> Path:
    (root / ARCHIVE).write_bytes(archive)
    with tarfile.open(root / ARCHIVE) as packed:
        packed.extractall(root, filter="data")
    return root / FOLDER


def test_processes_started_together_without_the_files_all_get_complete_files(small, address, tmp_path):
    code = f"""
import common, sys, time
from pathlib import Path
from torchvision import datasets
from common.data import open_data
for name, value in {small[0]!r}.items():
    setattr(datasets.CIFAR10, name, value)
datasets.CIFAR10.url = {address!r}
Path("ready" + sys.argv[1]).touch()
while len(list(Path().glob("ready*"))) < 2:
    time.sleep(0.01)
time.sleep(0.7 * int(sys.argv[1]))  # the second process starts when the first has most of the archive
data = open_data("cifar10", Path("data"))
assert len(data.train) == len(data.val) == {IMAGES}
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    call = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(number)], **call) for number in range(2)]
    errors = [process.communicate(timeout=100)[1][-500:] for process in processes]
    assert [process.returncode for process in processes] == [0] * 2, errors
    assert (tmp_path / "data" / ARCHIVE).read_bytes() == small[1]


@pytest.mark.parametrize(
    "left",
    [
        lambda folder: (folder / "data_batch_1").write_bytes((folder / "data_batch_1").read_bytes()[:1000]),
        lambda folder: (folder / "test_batch").unlink(),
        lambda folder: (folder / "batches.meta").write_bytes(b"\x80"),
        lambda folder: (folder / "batches.meta").unlink(),
    ],
)
def test_an_interrupted_extraction_is_completed_from_the_archive(left, small, cifar, tmp_path):
    left(fill(tmp_path, small[1]))
    data = open_data("cifar10", tmp_path)
    assert len(data.train) == IMAGES and data.train.class_names == tuple("abcdefghij")


def test_a_truncated_archive_is_not_used(small, cifar, tmp_path, address, monkeypatch):
    (tmp_path / ARCHIVE).write_bytes(small[1][: len(small[1]) // 2])
    with pytest.raises(DataError, match=f"cifar10 is not in {tmp_path} and cannot be downloaded .*: put {ARCHIVE} from"):
        open_data("cifar10", tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "url", address)
    assert len(open_data("cifar10", tmp_path).train) == IMAGES


def test_existing_files_need_no_lock_and_nothing_is_written(small, cifar, tmp_path, monkeypatch):
    fill(tmp_path, small[1])
    (tmp_path / ARCHIVE).unlink()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sets, "locked", None)
    assert len(open_data("cifar10", tmp_path).val) == IMAGES
    assert sorted(tmp_path.rglob("*")) == before


def test_if_files_are_missing_a_folder_that_cannot_be_written_is_named(cifar, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"cifar10 is not in {tmp_path / 'file' / 'data'} and cannot be downloaded"):
        open_data("cifar10", tmp_path / "file" / "data")
