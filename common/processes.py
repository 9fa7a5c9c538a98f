"""Communication between the processes of a run. With one process nothing is exchanged.

Shapes: n images of one process, N of all of them.
"""

import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor

from common.run import RunError, differences

T = TypeVar("T")
ROWS = 2**13  # maximum number of rows that each process sends at once; limits the memory of `gather_rows`


def once(fabric: Fabric, compute: Callable[[], T]) -> T:
    """Run `compute` on the main process and return its result on all processes; the others wait for it.

    If it raises, the main process raises this error, and the others exit with the code of its SystemExit, or 2.
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
    reply: tuple[int, Any] = fabric.broadcast((0, None))
    if reply[0]:
        raise SystemExit(reply[0])
    return reply[1]


def require_same(fabric: Fabric, facts: dict[str, Any]) -> None:
    """Raise RunError, as `once`, if the facts (JSON values) of a process differ from those of the main process."""
    if fabric.world_size == 1:
        return
    node, everywhere = platform.node(), [("", facts)] * fabric.world_size
    torch.distributed.all_gather_object(everywhere, (node, facts))

    def compare() -> None:
        for rank, (other_node, others) in enumerate(everywhere):
            if found := differences(facts, others, "in process 0", f"in process {rank}"):
                rest = f", and {len(found) - 5} more" if len(found) > 5 else ""
                where = f"process {rank} on {other_node} differs from process 0 on {node}"
                raise RunError(f"{where} ({'; '.join(found[:5])}{rest}): give all nodes the same code, command and software")

    once(fabric, compare)


def close_connections() -> None:
    """Close the connections to the other processes, if any. If they are open at exit, their threads can abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_over_processes(fabric: Fabric, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place. Fabric's own all_reduce waits for a barrier before each exchange."""
    if fabric.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def on_any_process(fabric: Fabric, value: bool) -> bool:
    """Whether `value` is true on at least one process."""
    return bool(sum_over_processes(fabric, torch.tensor(float(value), device=fabric.device)))


def gather_rows(fabric: Fabric, rows_nX: Tensor | None, count: int) -> Tensor:
    """Gather the rows of all `count` images in order, (N, ...); process r of W has those of images r, r + W, r + 2 W, ... (n, ...).

    rows_nX is None if a process has no images; the main process always has some.
    """
    world, longest = fabric.world_size, -(-count // fabric.world_size)
    firsts: Any = rows_nX
    shape, dtype = once(fabric, lambda: (tuple(firsts.shape[1:]), firsts.dtype))
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
