"""`make table`."""

import sys

from benchmarks.ledger.tables import main

sys.exit(main())
