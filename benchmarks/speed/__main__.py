"""`make speed`."""

import sys

from benchmarks.speed.steps import main

sys.exit(main())
