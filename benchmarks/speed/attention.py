"""Time all ways to compute attention with visibility windows, and choose the backends of `attend`.

    python -m benchmarks.speed.attention

All ways get the same queries, keys and values, and each is checked against float64 before it is timed. They are timed in turns, with the
L2 cache flushed before each; the median counts. The floor is the time that a copy takes to move the minimum of bytes. Forward: queries,
the keys and values of the context, and the output. Backward: these, the output's gradient and three gradients.

On a CPU, the batches are smaller, and ways that exist only for GPUs are left out.

Shapes: B images, H heads, Q queries, K keys, N tokens, M context tokens, T targets, D head width.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.papers import ROOT
from benchmarks.speed.measure import facts, keep, show, wait, wide
from common.attention import CHOICES_FILE, attend, attend_reference, device_kind, window_mask
from common.masking import gather_tokens, permutation_ranks, random_order
from common.randomness import generator
from common.run import console

Way = Callable[[Tensor, Tensor, Tensor], Tensor]
PASSES = ("forward", "training")  # training: forward and backward
SAME = ["device", "shape", "batch", "way", "pass", "precision"]  # a new measurement replaces old ones with the same values in these columns
# The ways that are backends of `attend`, with a window (True) and without.
BACKENDS = {
    True: {"dense mask, SDPA": "sdpa", "key mask, SDPA": "sdpa", "FlexAttention": "flex", "ours": "triton"},
    False: {"context first, SDPA": "sdpa", "context first, ours": "triton"},
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest difference from float64, of output and gradients


@dataclass
class Case:
    """Queries (B, H, Q, D), keys and values (B, H, K, D), the window, and the context (B, M), if there is one."""

    shape: str
    q: Tensor
    k: Tensor
    v: Tensor
    window: dict[str, Tensor]
    context_BM: Tensor | None = None

    def bytes(self, backward: bool) -> int:
        """The minimum of bytes to move: forward, each needed number once; backward, these and all gradients."""
        keys = self.k.shape[2] if self.context_BM is None else self.context_BM.shape[1]
        rows, columns = (self.q.shape[0] * self.q.shape[1] * self.q.shape[3] * length for length in (self.q.shape[2], keys))
        forward = 2 * rows + 2 * columns
        # backward: q, k, v, output and its gradient are read, three gradients written
        return self.q.element_size() * (forward + (4 * rows + 4 * columns if backward else 0))


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """MP3 at ViT-B/16 and on CIFAR, MaPeT's two streams; on a CPU with 1/32 of the images."""
    fewer = 1 if device.type == "cuda" else 32
    made = []
    for shape, images, H, N, M in (
        ("MP3 ViT-B/16, eta .5", 256, 12, 197, 99),
        ("MP3 ViT-B/16, eta .75", 256, 12, 197, 50),
        ("MP3 ViT-S/4 at 32 px, eta .5", 1024, 6, 65, 33),
    ):
        B = images // fewer
        rank_BN = _ranks(B, N)
        until_BK = torch.where(rank_BN < M, N, 0)
        made.append(_case(shape, (B, H, N, N), {"visible_until": until_BK}, device, dtype, rank_BN.argsort(1)[:, :M]))
    B, N, M = 128 // fewer, 197, 50
    for order, rank_BN in (("raster", _ranks(B, N)), ("visiting", torch.arange(N).expand(B, N))):
        # Keys are all tokens, then a placeholder for each target; `entry` is the time from which a token is visible, e in mapet/method.py.
        target_BT = (rank_BN < M).int().argsort(dim=1, stable=True)[:, : N - M]
        entry_BN, rank_BT = rank_BN.clamp(min=M - 1), rank_BN.gather(1, target_BT)
        key = {
            "visible_from": torch.cat([entry_BN, torch.full_like(rank_BT, -1)], 1),
            "visible_until": torch.cat([torch.full_like(rank_BN, N), rank_BT], 1),
        }
        content_BQ = torch.cat([entry_BN, torch.full_like(rank_BT, M - 1)], 1)
        for stream, time_BQ in (("content", content_BQ), ("query", rank_BT - 1)):
            size = (B, 12, time_BQ.shape[1], 2 * N - M)
            made.append(_case(f"MaPeT {stream} stream, {order} order", size, {"time": time_BQ, **key}, device, dtype))
    return made


def ways(case: Case) -> dict[str, tuple[Way, bool]]:
    """Each way to compute a case, and whether it takes only the keys and values of the context."""
    window, on_gpu = case.window, case.q.device.type == "cuda"
    mask, found = _dense(case), dict[str, tuple[Way, bool]]()
    found["dense mask, SDPA"] = (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), False)
    context_BM = case.context_BM
    if context_BM is not None:

        def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, _context(k, context_BM), _context(v, context_BM), backend="sdpa")

        found["key mask, SDPA"] = (lambda q, k, v: attend(q, k, v, backend="sdpa", **window), False)
        found["gather per layer, SDPA"] = (gathered, False)
        found["context first, SDPA"] = (lambda q, k, v: attend(q, k, v, backend="sdpa"), True)
    if on_gpu:
        # As in training: MaPeT's window is constant, so its block mask is made in the first step, during the warm-up.
        found["FlexAttention"] = (lambda q, k, v: attend(q, k, v, backend="flex", **window), False)
        found["ours"] = (lambda q, k, v: attend(q, k, v, backend="triton", **window), False)
        if context_BM is not None:
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
                found[f"context first, {name}"] = (_through(backend), True)
            found["context first, ours"] = (lambda q, k, v: attend(q, k, v, backend="triton"), True)
    return found


def measure(device: torch.device, rounds: int) -> pandas.DataFrame:
    """One line per case, way and pass. Raises RuntimeError for a way with wrong results."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    flush = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    bandwidth, about, lines = _bandwidth(device), facts(device), []
    for case in cases(device, dtype):
        known, taken = ways(case), dict[tuple[str, str], list[float]]()
        tensors = {name: _leaves(case, context) for name, (_, context) in known.items()}
        gradient = torch.randn(case.q.shape, generator=generator(3), dtype=torch.float32).to(case.q)
        for name, (way, _) in known.items():
            _check(name, way, tensors[name], case, gradient)
        for turn in range(rounds + 3):  # the first three warm up
            for name, (way, _) in known.items():
                for passes in PASSES:
                    milliseconds = _time(way, tensors[name], gradient if passes == PASSES[1] else None, flush)
                    if turn > 2:
                        taken.setdefault((name, passes), []).append(milliseconds)
        for (name, passes), values in taken.items():
            floor = 1e3 * case.bytes(passes == PASSES[1]) / bandwidth
            B, H, Q, D = case.q.shape
            lines.append(
                {
                    "shape": case.shape,
                    "batch": B,
                    "heads": H,
                    "queries": Q,
                    "keys": tensors[name][1].shape[2],
                    "width": D,
                    "way": name,
                    "pass": passes,
                    "precision": str(dtype).removeprefix("torch."),
                    "milliseconds": round(statistics.median(values), 3),
                    "floor": round(statistics.median(values) / floor, 2),
                    "GB/s": round(bandwidth / 1e9),
                    **about,
                }
            )
        console.print(case.shape, style="dim")
    return pandas.DataFrame(lines)


def choose(frame: pandas.DataFrame, device: torch.device) -> list[dict]:
    """Rows of `attend`'s table: the fastest backend in forward plus backward for each shape, with a window and without."""
    rows, names = {}, ("device", "windowed", "queries", "keys", "width")
    for windowed, backends in BACKENDS.items():
        lines = frame[(frame["pass"] == PASSES[1]) & frame["way"].isin(backends)].sort_values("milliseconds", ascending=False)
        for line in lines.itertuples():  # the fastest comes last and overwrites the others
            key = (device_kind(device), windowed, line.queries, line.keys, line.width)
            rows[key] = dict(zip(names, key, strict=True)) | {"backend": backends[line.way]}
    return list(rows.values())


def run(device: torch.device, rounds: int | None = None) -> None:
    """Measure, print, and write benchmarks/speed/attention.csv and `attend`'s table of choices."""
    frame = measure(device, rounds or (100 if device.type == "cuda" else 10))
    show(wide(frame), f"attention, {frame['precision'][0]}", device)
    keep(frame, ROOT / "benchmarks/speed/attention.csv", SAME)
    with CHOICES_FILE.open(newline="") as file:
        others = [row for row in csv.DictReader(file) if row["device"] != device_kind(device)]
    rows = others + choose(frame, device)
    with CHOICES_FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", "windowed", "queries", "keys", "width", "backend"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--rounds", type=int, help="number of timings per way (default: 100, on a CPU 10)")
    options = parser.parse_args(arguments)
    run(torch.device(options.device), options.rounds)
    return 0


def _ranks(B: int, N: int) -> Tensor:
    """A random order of N tokens per image, as ranks (B, N); the class token has rank 0."""
    order_BN = random_order(torch.rand(B, N - 1, generator=generator(1)))
    return torch.cat([torch.zeros(B, 1, dtype=torch.int64), permutation_ranks(order_BN) + 1], 1)


def _case(
    shape: str,
    size: tuple[int, int, int, int],
    window: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    context_BM: Tensor | None = None,
) -> Case:
    """Random queries, keys and values, with the strides that a packed projection gives."""
    B, H, Q, K = size
    draw = generator(2)
    q, k, v = (torch.randn(B, length, H, 64, generator=draw).to(device, dtype).transpose(1, 2) for length in (Q, K, K))
    vectors = {name: vector.int().contiguous().to(device) for name, vector in window.items()}
    return Case(shape, q, k, v, vectors, None if context_BM is None else context_BM.to(device))


def _context(x_BHKD: Tensor, context_BM: Tensor) -> Tensor:
    """The keys of the context, (B, H, M, D)."""
    B, H, K, D = x_BHKD.shape
    packed = gather_tokens(x_BHKD.transpose(1, 2).reshape(B, K, H * D), context_BM)
    return packed.view(B, -1, H, D).transpose(1, 2)


def _leaves(case: Case, context: bool) -> list[Tensor]:
    """Fresh q, k, v that require gradients; with `context`, k and v of the context only."""
    context_BM = case.context_BM if context else None
    tensors = [case.q, *(x if context_BM is None else _context(x, context_BM) for x in (case.k, case.v))]
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _dense(case: Case) -> Tensor:
    """The window as a full boolean mask (B, 1, Q, K)."""
    (B, _, Q, _), K = case.q.shape, case.k.shape[2]
    mask = window_mask(case.q, **case.window)
    assert mask is not None
    return mask.expand(B, 1, Q, K).contiguous()


def _through(backend: SDPBackend) -> Way:
    """SDPA with one of its kernels."""

    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return way


def _check(name: str, way: Way, leaves: list[Tensor], case: Case, gradient: Tensor) -> None:
    """Raise RuntimeError if output or gradients differ from those in float64, for the first images."""
    few = [tensor[:2].detach().requires_grad_() for tensor in leaves]
    window = {} if leaves[1].shape[2] != case.k.shape[2] else {key: vector[:2] for key, vector in case.window.items()}
    exact = attend_reference(*few, **window)
    expected = [exact, *torch.autograd.grad(exact, few, gradient[:2].double())]
    out = way(*leaves)
    for found, wanted in zip([out, *torch.autograd.grad(out, leaves, gradient)], expected, strict=True):
        worst = float((found[:2].double() - wanted).detach().abs().max())
        if not worst <= TOLERANCE[case.q.dtype]:
            raise RuntimeError(f"{case.shape}: {name} is off by {worst:.2g} from float64")


def _time(way: Way, leaves: list[Tensor], gradient: Tensor | None, flush: Tensor) -> float:
    """Milliseconds of a forward pass, or with `gradient` of forward and backward; on a GPU without the launch time."""

    def work() -> None:
        with torch.no_grad() if gradient is None else nullcontext():
            out = way(*leaves)
            if gradient is not None:
                torch.autograd.grad(out, leaves, gradient)

    flush.zero_()
    if flush.device.type == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        wait(flush.device)
        return begun.elapsed_time(ended)
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target, rates = torch.empty_like(source), []
    for _ in range(10):
        wait(device)
        begun = time.perf_counter()
        target.copy_(source)
        wait(device)
        rates.append(2 * source.numel() / (time.perf_counter() - begun))
    return max(rates)


if __name__ == "__main__":
    sys.exit(main())
