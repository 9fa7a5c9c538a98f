"""What the processes of a run decide, compute and gather together. With one process nothing is exchanged.

Shapes: n images of one process, N of all of them.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor

T = TypeVar("T")
ROWS = 2**13  # rows that each process sends at once, which bounds the memory of `gather_rows`


def once(fabric: Fabric, compute: Callable[[], T]) -> T:
    """The result of `compute` on the first process, on every process; the others wait for it.

    Where it raises, that error goes on in the first process, which reports it, and the others exit: with its code, or 2.
    """
    if fabric.world_size == 1:
        return compute()
    if fabric.is_global_zero:
        try:
            found = compute()
        except BaseException as error:
            fabric.broadcast((error.code if isinstance(error, SystemExit) else 2, None))
            raise
        return fabric.broadcast((0, found))[1]
    code, found = fabric.broadcast((0, None))
    if code:
        raise SystemExit(code)
    return found


def close_connections() -> None:
    """End the connections to the other processes, if there are any. Left open at exit, their threads can abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_over_processes(fabric: Fabric, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place. Fabric's own all_reduce waits for a barrier before each exchange."""
    if fabric.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def on_any_process(fabric: Fabric, value: bool) -> bool:
    """Whether it is true on one process at least."""
    return bool(sum_over_processes(fabric, torch.tensor(float(value), device=fabric.device)))


def gather_rows(fabric: Fabric, rows_nX: Tensor | None, count: int) -> Tensor:
    """The rows of all `count` images in order, (N, ...), where process r of W has those of images r, r + W, r + 2 W, ... (n, ...).

    None where a process has no images; the first one always has some.
    """
    world, longest = fabric.world_size, -(-count // fabric.world_size)
    shape, dtype = once(fabric, lambda: (tuple(rows_nX.shape[1:]), rows_nX.dtype))
    whole_NX = torch.empty(longest * world, *shape, dtype=dtype, device=fabric.device)
    for start, block in zip(range(0, longest, ROWS), whole_NX.split(ROWS * world), strict=True):
        mine = torch.zeros(len(block) // world, *shape, dtype=dtype, device=fabric.device)
        if rows_nX is not None:
            part = rows_nX[start : start + len(mine)]
            mine[: len(part)] = part
        parts = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(parts, mine)
        torch.stack(parts, 1, out=block.view(-1, world, *shape))
    return whole_NX[:count]
