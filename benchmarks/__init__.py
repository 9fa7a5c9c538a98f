"""What runs the papers: `python -m benchmarks.reproduce` and the like.

OpenMP reads its settings once, when torch is loaded, so how its threads wait for each other is set here, before that. By default they
wait in a loop that keeps a core busy, and a run beside another process, or beside its own loader workers, crawls.
"""

import os

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "300"  # GNU's, turns of the loop before a thread sleeps; by default 300,000

import common  # noqa: E402, F401 - before anything imports torchvision, see there
