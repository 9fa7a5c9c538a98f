"""Effects of `import common` on the process."""

import subprocess
import sys

import pytest

from common.environment import ROOT

FAULTS = """
import resource, torch
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
images = torch.randn(2**16, 64)  # hidden layers of 64 MB, which is 16,384 pages
for step in range(6):
    if step == 3:  # after three warm-up steps
        begun = faults()
    model(images).square().mean().backward()
    model.zero_grad()
print(faults() - begun)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of glibc's malloc on Linux")
def test_keep_freed_memory_reuses_the_memory_of_the_previous_step():
    def count(before: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS.format(before=before)], cwd=ROOT, capture_output=True, check=True).stdout)

    kept = count("import common; common.keep_freed_memory()")
    for program in ("", "import common"):  # a plain import does not change the allocator; the counts vary by a factor of two
        assert count(program) > 4 * kept


def test_an_unsupported_system_is_refused_with_one_sentence():
    code = "import sys; sys.modules['fcntl'] = None; import common.run"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1 and done.stderr.startswith("position-pretraining runs on Linux and macOS") and "Traceback" not in done.stderr
    )
