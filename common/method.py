"""The interface of a method: a module that maps images to an Output, with the `encoder` that is exported at the end.

    class Method(nn.Module):
        encoder: ViT
        def forward(self, images, targets=None) -> Output
        def at_step(self, step, total_steps) -> None      # before each step, for the method's own schedules; optional
        def after_step(self, step, total_steps) -> None   # after each optimizer step, for example to update an EMA teacher; optional

The training loop, the checkpoints and the evaluations need nothing else. Random draws that a test must be able to
replace are keyword arguments of forward; by default forward draws them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Output:
    """loss: scalar, float32, to be minimised. named: intermediate tensors, for pictures and tests.

    weight: if the loss is a weighted mean over the micro-batch, the sum of the weights, without gradient. The training loop then computes
    the gradient of the weighted mean over the effective batch. None: all micro-batches have the same weight.
    metrics: detached scalars, logged as means over the steps since the last log entry. An expensive metric can be a function without
    arguments that returns the scalar: it is called only in logged steps, and its value is logged for that step alone.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    named: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


@dataclass(frozen=True)
class Source:
    """Where a method comes from, for the model card of an exported encoder. A paper's recipe.py has one as SOURCE."""

    name: str  # of the method, as its paper writes it
    citation: str  # authors, title, where it was published
    arxiv: str  # number at arXiv
    code: str = ""  # the official code: owner/name at GitHub; empty if there is none
    licence: str = ""  # of the official code, if we know it
