"""Measures of collapse, for methods that predict features.

Shapes: B images, N patches, D width.
"""

import math

import torch
from torch import Tensor


def feature_std(feature_BND: Tensor) -> Tensor:
    """Standard deviation over the images of each patch's features, averaged: 0 if they do not depend on the image, about 1 at best."""
    return (feature_BND - feature_BND.mean(0)).square_().mean(0).sqrt().mean()


def rankme(feature_BND: Tensor) -> Tensor:
    """The effective rank of the images' mean features, 1 to min(B, D): the exponential of the entropy of their singular values (Garrido
    et al. 2023). NaN for features that are not finite, for which torch.linalg.svdvals would raise an error."""
    mean_BD = feature_BND.mean(1)
    singular = torch.linalg.svdvals(mean_BD.nan_to_num(0.0, 0.0, 0.0))
    fraction = singular / singular.sum()
    return torch.special.entr(fraction).sum().exp().where(mean_BD.isfinite().all(), math.nan)


SPREAD = {"feature_std": feature_std, "rankme": rankme}


def spread(feature_BND: Tensor) -> dict[str, Tensor]:
    """All measures of collapse, by name."""
    return {name: measure(feature_BND) for name, measure in SPREAD.items()}
