"""Optimizers, parameter groups and the learning-rate schedule: timm's, chosen as the papers have them."""

import torch
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from common.recipe import Stage


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW, or LARS with trust coefficient 0.001, on the model's trainable parameters.

    Biases and one-dimensional parameters have no weight decay (nor, with LARS, a trust ratio), and neither has what
    `model.no_weight_decay()` names. Class and mask tokens do have it in pre-training, as in MAE and DropPos. With layer
    decay, group i of the n that `model.group_matcher` defines learns at decay^(n - 1 - i) of the rate.
    """
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if stage.layer_decay is not None:
        groups = param_groups_layer_decay(model, stage.weight_decay, no_weight_decay_list=undecayed, layer_decay=stage.layer_decay)
    else:
        groups = param_groups_weight_decay(model, stage.weight_decay, no_weight_decay_list=undecayed)
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=True)
    # MAE scales every matrix by its trust ratio even without weight decay, and never a bias; timm asks per group.
    groups = [
        {**group, "params": parameters, "always_adapt": matrices}
        for group in groups
        for matrices in (True, False)
        if (parameters := [parameter for parameter in group["params"] if (parameter.ndim > 1) == matrices])
    ]
    return Lars(groups, lr=stage.lr, momentum=stage.betas[0], trust_coeff=0.001)


def make_schedule(optimizer: torch.optim.Optimizer, stage: Stage, steps_per_epoch: int) -> CosineLRScheduler:
    """Per step: linear warm-up from zero, then half a cosine down to min_lr at the last step. Set by `step_update(step)`.

    lr(t) = lr t / w for t < w, else min_lr + (lr - min_lr)(1 + cos(pi (t - w) / (T - w))) / 2, with T steps of which w are
    warm-up: at most half, so that a run shortened for a try still comes down. The rate depends on the step alone, so there
    is nothing to save.
    """
    total = stage.epochs * steps_per_epoch
    warmup = min(int(stage.warmup_epochs * steps_per_epoch), total // 2)
    return CosineLRScheduler(
        optimizer, t_initial=total - warmup, lr_min=stage.min_lr, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
