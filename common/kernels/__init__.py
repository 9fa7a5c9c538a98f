"""GPU kernels of `common.attention.attend`, and the fastest measured backends (choices.csv).

Importing this package imports no kernel, so it works without Triton.
"""

import torch

WIDTHS = (32, 64, 80, 128)  # head widths that window_attention supports
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
