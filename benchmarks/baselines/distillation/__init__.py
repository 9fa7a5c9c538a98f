"""Teachers for distillation: frozen timm models that a student asks, and that are no part of the student.

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
    """A timm model by name as a function from images to logits (B, K): in evaluation mode, without gradient, on the images' device.

    A function and no module, so that a student which holds it neither trains, saves nor copies it. weights: a checkpoint of the
    model with these classes, or None for timm's own, which are downloaded. image: channels, height and width of what it will see.
    Raises RecipeError for an unknown name, weights of other classes or out of reach, and a model that does not take such images;
    ConversionError for a checkpoint that is not the model's.
    """
    if not timm.is_model(str(name)):
        close = difflib.get_close_matches(str(name), timm.list_models(), n=3, cutoff=0.0)
        raise RecipeError(f"teacher={name!r} is no model of timm's; did you mean {' or '.join(close)}?")
    try:
        if weights is None and (held := getattr(timm.get_pretrained_cfg(name), "num_classes", None)) != classes:
            raise ValueError(f"timm's weights of it know {held or 'no'} classes, the data have {classes}")
        teacher = timm.create_model(name, pretrained=weights is None, num_classes=classes, in_chans=image[0])
    except Exception as error:  # an unknown tag, or whatever a download can end in
        raise RecipeError(f"the teacher {name} is not to be had ({error}); name a checkpoint of it: teacher_weights=PATH") from error
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
        raise RecipeError(f"the teacher {name} answers with {tuple(answer_BK.shape[1:])}, not with {classes} classes")
    return ask
