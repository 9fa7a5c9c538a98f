"""What a method is: a module that turns images into an Output, with the `encoder` that is kept in the end.

    class Method(nn.Module):
        encoder: ViT
        def forward(self, images, targets=None) -> Output
        def at_step(self, step, total_steps) -> None      # schedules of the method's own; optional
        def after_step(self, step, total_steps) -> None   # what follows the optimizer's step, such as a teacher's average; optional

The training loop, the checkpoints and the evaluations ask for nothing else. Random draws that a test must be able to
replace are keyword arguments of forward that default to drawing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Output:
    """loss: scalar, float32, to be minimised. named: intermediate tensors, for pictures and tests.

    metrics: detached scalars, logged as means over the steps since the last log entry. A costly one is a function without arguments that
    returns the scalar: it is called only in steps that are logged, and logged for that step alone.
    """

    loss: Tensor
    metrics: dict[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)
    named: dict[str, Tensor] = field(default_factory=dict)
