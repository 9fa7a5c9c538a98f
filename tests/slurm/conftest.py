"""The cluster of the tests in this folder."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).parent / "cluster.sh"
    started = subprocess.run([script, "start", folder], env=os.environ | {"PATH": PATH}, capture_output=True, text=True, timeout=120)
    if started.returncode:
        subprocess.run([script, "stop", folder], env=os.environ | {"PATH": PATH}, capture_output=True, timeout=120)
        pytest.skip(f"Slurm could not be started: {started.stderr}")
    yield Cluster(folder)
    subprocess.run([script, "stop", folder], env=os.environ | {"PATH": PATH}, capture_output=True, timeout=120)
