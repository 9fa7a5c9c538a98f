"""Teachers for distillation: frozen timm models that are not part of the student.

Shapes: B images, K classes.
"""

import difflib
from collections.abc import Callable

import timm
import torch
from torch import Tensor

from common.convert import load_method, read_checkpoint
from common.recipe import RecipeError


def load_teacher(name: str, weights: str | None, classes: int, image: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
    """Load a timm model as a function from images to logits (B, K): in evaluation mode, without gradient, on the images' device.

    It is a function and not a module, so that the student does not train, save or copy it. weights: a checkpoint of the model with
    these classes, or None to download timm's weights. image: channels, height and width of its input images.
    Raises RecipeError for an unknown name, weights that are unavailable or have other classes, and a model that does not take such
    images; ConversionError for a checkpoint of another model.
    """
    if not timm.is_model(str(name)):
        close = difflib.get_close_matches(str(name), timm.list_models(), n=3, cutoff=0.0)
        raise RecipeError(f"teacher={name!r} is not a timm model; did you mean {' or '.join(close)}?")
    try:
        if weights is None and (held := getattr(timm.get_pretrained_cfg(name), "num_classes", None)) != classes:
            raise ValueError(f"timm's weights of it have {held or 'no'} classes, the data have {classes}")
        teacher = timm.create_model(name, pretrained=weights is None, num_classes=classes, in_chans=image[0])
    except Exception as error:  # an unknown tag, or any download error
        raise RecipeError(f"the teacher {name} cannot be loaded ({error}); give a checkpoint of it: teacher_weights=PATH") from error
    if weights is not None:
        load_method(teacher, read_checkpoint(weights), {})
    teacher.eval().requires_grad_(False)

    @torch.compiler.disable
    @torch.no_grad()
    def ask(images: Tensor) -> Tensor:
        if next(teacher.parameters()).device != images.device:
            teacher.to(images.device)
        return teacher(images)

    try:
        answer_BK = ask(torch.zeros(1, *image))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RecipeError(f"the teacher {name} does not take images of {image[1]} x {image[2]} pixels: {error}") from error
    if answer_BK.shape != (1, classes):
        raise RecipeError(f"the teacher {name} outputs {tuple(answer_BK.shape[1:])}, not {classes} classes")
    return ask
