"""GPU kernels behind `common.attention.attend`, and the choices between backends that were measured (choices.csv).

Importing this package imports no kernel, so that it works where Triton is not installed.
"""

import torch

WIDTHS = (32, 64, 80, 128)  # of the heads that window_attention takes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
