"""The programs that run the papers, such as `python -m benchmarks.reproduce`.

OpenMP reads its settings once, when torch is loaded. So the way in which its threads wait is set here, before that. By default they
busy-wait, which occupies a core: a run beside another process, or beside its own loader workers, becomes very slow.
"""

import os

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "300"  # GNU OpenMP: busy-wait iterations before a thread sleeps; default 300,000

import common  # noqa: E402, F401 - before any import of torchvision, see common
