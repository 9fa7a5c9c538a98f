"""Optimizers, parameter groups and the schedules of learning rate and weight decay: from timm, with the settings of the papers."""

import math

import torch
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from common.recipe import TrainConfig


def make_optimizer(model: nn.Module, stage: TrainConfig) -> torch.optim.Optimizer:
    """Create AdamW, SGD with Nesterov momentum, or LARS with trust coefficient 0.001, for the model's trainable parameters.

    Biases and one-dimensional parameters have no weight decay (nor, with LARS, a trust ratio); the parameters named in
    `model.no_weight_decay()` have no weight decay. Class and mask tokens have it in pre-training, as in MAE and DropPos. With
    layer decay, group i of the n groups of `model.group_matcher` has decay^(n - 1 - i) times the learning rate. A model with
    several learning rates defines its groups in `model.parameter_groups()`.
    """
    undecayed = getattr(model, "no_weight_decay", lambda: ())()
    if own_groups := getattr(model, "parameter_groups", None):
        groups = own_groups()
    elif stage.layer_decay is not None:
        groups = param_groups_layer_decay(model, stage.weight_decay, no_weight_decay_list=undecayed, layer_decay=stage.layer_decay)
    else:
        groups = param_groups_weight_decay(model, stage.weight_decay, no_weight_decay_list=undecayed)
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=True)
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=stage.betas[0], nesterov=True)
    # MAE scales every matrix by its trust ratio, even without weight decay, and never a bias; timm has this option per group.
    groups = [
        {**group, "params": parameters, "always_adapt": matrices}
        for group in groups
        for matrices in (True, False)
        if (parameters := [parameter for parameter in group["params"] if (parameter.ndim > 1) == matrices])
    ]
    return Lars(groups, lr=stage.lr, momentum=stage.betas[0], trust_coeff=0.001)


class Schedule:
    """The learning rate and the weight decay of each step, set by `step_update(step)`. They depend only on the step: nothing to save.

    Warm-up: lr(t) = lr0 + (lr - lr0) t / w for t < w steps; w is at most T / 2, so that short test runs also decay. Then
    min_lr + (lr - min_lr)(1 + cos(pi (t - w) / (T - w))) / 2, where T is the number of steps in `epochs`; with `cosine_from_start`,
    timm's default, t / T replaces (t - w) / (T - w). With `linear_decay`, a line of t replaces the cosine; with `milestones`, 0.1x after
    each. The weight decay follows the same
    cosine over T, from its value to the final one. From `freeze_epoch`, or by default from T on, t is constant (cool-down).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stage: TrainConfig, steps_per_epoch: int):
        self.optimizer, self.stage, self.total = optimizer, stage, stage.epochs * steps_per_epoch
        self.last = self.total if stage.freeze_epoch is None else int(stage.freeze_epoch * steps_per_epoch)
        self.decays = [group["weight_decay"] for group in optimizer.param_groups]
        warmup = min(int(stage.warmup_epochs * steps_per_epoch), self.total // 2)
        common: dict = {"warmup_t": warmup, "warmup_lr_init": stage.warmup_lr, "t_in_epochs": False}
        if stage.milestones:  # timm applies milestones one step early
            steps = [epoch * steps_per_epoch + 1 for epoch in stage.milestones]
            self.rate: Scheduler = MultiStepLRScheduler(optimizer, steps, 0.1, **common)
        elif stage.linear_decay:
            self.rate = PolyLRScheduler(optimizer, self.total - warmup, power=1.0, lr_min=stage.min_lr, warmup_prefix=True, **common)
        else:
            start = 0 if stage.cosine_from_start else warmup
            self.rate = CosineLRScheduler(optimizer, self.total - start, lr_min=stage.min_lr, warmup_prefix=start > 0, **common)

    def step_update(self, step: int) -> None:
        step = min(step, self.last)
        self.rate.step_update(step)
        if self.stage.final_weight_decay is not None:
            fraction = (1 + math.cos(math.pi * step / self.total)) / 2
            for group, decay in zip(self.optimizer.param_groups, self.decays, strict=True):
                if decay:  # biases have no weight decay
                    group["weight_decay"] = self.stage.final_weight_decay + (decay - self.stage.final_weight_decay) * fraction
