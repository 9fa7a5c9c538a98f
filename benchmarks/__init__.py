"""Running the papers: reproduce, compare, tables, speed. The only floor that knows them by name."""

import common  # noqa: F401  (declares torchvision's operators before anything imports torchvision)
