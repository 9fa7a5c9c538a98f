"""A cheap method for tests of the training loop: logistic regression on the pixels of digits."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from common.data import Augmentation, Loader, open_data
from common.method import Output
from common.recipe import TrainConfig
from common.run import Run
from common.train import device_batch, fit, make_fabric

# 1,437 images: three steps an epoch
STAGE = TrainConfig(epochs=2, batch_size=400, base_lr=1e-3, augmentation=Augmentation(crop="none", flip=0.0))


class Tiny(nn.Module):
    """The loss is NaN at `spoiled_step`; `at` lists the arguments of every call of `at_step`."""

    def __init__(self, spoiled_step: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.at, self.spoiled_step = [], spoiled_step

    def at_step(self, step: int, total_steps: int) -> None:
        self.at.append((step, total_steps))

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> Output:
        loss = nn.functional.cross_entropy(self.layer(images.flatten(1)), targets)
        return Output(loss * float("nan") if self.at[-1][0] == self.spoiled_step else loss)


def train(directory: Path, model: nn.Module, stage: TrainConfig = STAGE, **options) -> tuple[Run, nn.Module]:
    """Train in a run directory; the only setting of the run is the number of epochs."""
    data, fabric, batch = open_data("digits"), make_fabric("cpu", "32-true"), device_batch(stage, 1)
    batches = Loader(
        data.train,
        data=data,
        image_size=(8, 8),
        batch_size=batch,
        augmentation=stage.augmentation,
        seed=0,
        device=torch.device("cpu"),
        workers=0,
        accumulate=stage.batch_size // batch,
    )
    with Run(directory, {"epochs": dataclasses.asdict(stage)["epochs"]}, torch.device("cpu")) as run:
        trained, _ = fit(run, fabric, model, stage, batches, seed=0, **options)
    return run, trained
