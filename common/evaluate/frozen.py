"""Features of a frozen encoder, cached on disk, and evaluations on them: logistic regression and weighted k-NN.

Shapes: N training images, M test images, B images, L concatenated layers, D width (of all of them), K classes or neighbours.
"""

import copy
import hashlib
import warnings
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.data import Loader
from common.evaluate.encoder import TokenEncoder
from common.evaluate.finetune import best_five, pool_tokens, tokens
from common.files import replacing
from common.processes import gather_rows, once
from common.run import RunError
from common.vit import ViT

# tol is the largest entry of the gradient at which the solver stops. With many classes and a weak penalty, scikit-learn's default of 1e-4
# stops far too early. Newton's method, because features are so correlated that L-BFGS does not reach this in a thousand iterations.
SOLVER = {"solver": "newton-cg", "tol": 1e-9, "max_iter": 100}


@torch.no_grad()
def features(
    fabric: Fabric, encoder: ViT | TokenEncoder | None, loader: Loader, pool: str, layers: int = 1, cache: Path | None = None
) -> tuple[Tensor, Tensor]:
    """Pooled features (N, D) after the last blocks of an encoder, and the classes (N,), of all images; raw pixels if encoder is None.

    If the loader divides the images among processes, so is the work; every process returns the features of all images, in order.
    cache: prefix of a file name, such as runs/x/features/pretrained-train; features are read from this file, or written to it.
    Raises RunError if the file holds features of another encoder, other images or another resize, pooling or precision, and for
    features that are not finite.
    """
    if encoder is None:
        return _extract(fabric, None, loader, pool, layers)
    encoder = copy.deepcopy(encoder).to(fabric.device).eval()
    if cache is None:
        return _extract(fabric, encoder, loader, pool, layers)
    options = {"layers": str(layers), "pool": pool, "precision": str(fabric._precision.precision)}
    images = once(fabric, loader.split.digest)
    key = {"encoder": fingerprint(encoder), "data": loader.data.name, "images": images, **loader.view, **options}
    seen = f"{layers_name(layers)}-{pool}-{key['resize']}-{key['interpolation']}-{key['images'][:8]}"
    file = cache.with_name(f"{cache.name}-{seen}.safetensors")
    if once(fabric, file.exists):
        return _read(file, key, fabric.device)
    feature_ND, target_N = _extract(fabric, encoder, loader, pool, layers)
    if fabric.is_global_zero:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file({"features": feature_ND.cpu(), "classes": target_N.cpu()}, temporary, metadata=key)
    return feature_ND, target_N


def _extract(fabric: Fabric, encoder: ViT | TokenEncoder | None, loader: Loader, pool: str, layers: int) -> tuple[Tensor, Tensor]:
    found = []
    for images, targets in loader.epoch(0):
        with fabric.autocast():
            feature = images.flatten(1) if encoder is None else pool_tokens(tokens(encoder, images, layers), encoder, pool)
        found.append((feature.float(), targets))
    parts: list = [torch.cat(part) for part in zip(*found, strict=True)] if found else [None, None]
    if fabric.world_size > 1 and loader.world_size > 1:
        parts = [gather_rows(fabric, part, len(loader.split)) for part in parts]
    feature, target = parts
    check_finite(feature, "check the encoder's weights and the images, or compute the features with --precision 32-true")
    return feature, target


def check_finite(feature_ND: Tensor, advice: str = "they would be ranked as if they were numbers") -> None:
    """Raise RunError for features (N, D) that are not finite, with the number of images and the advice."""
    spoiled_N = ~feature_ND.isfinite().all(1)
    if spoiled_N.any():
        count, first = int(spoiled_N.sum()), int(spoiled_N.nonzero()[0])
        raise RunError(f"features of {count} of {len(feature_ND)} images are not finite, the first is image {first}: {advice}")


def _read(file: Path, key: dict[str, str], device: torch.device) -> tuple[Tensor, Tensor]:
    try:
        with safe_open(file, "pt", str(device)) as held:
            differing = [name for name in key if (held.metadata() or {}).get(name) != key[name]]
            if not differing:
                feature_ND, target_N = held.get_tensor("features"), held.get_tensor("classes")
                check_finite(feature_ND, f"delete {file} to compute them again")
                return feature_ND, target_N
    except SafetensorError as error:
        raise RunError(f"{file} cannot be read ({error}); delete it to compute it again") from error
    raise RunError(f"{file} holds features with another {', '.join(differing)}; delete it to compute them again, or use another OUT=")


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's state dict, in hexadecimal: names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def layers_name(layers: int) -> str:
    """The name of a number of last blocks in file names and results: last, last4."""
    return "last" if layers == 1 else f"last{layers}"


def standardise(train_ND: Tensor, test_MD: Tensor, statistics: str = "train") -> tuple[Tensor, Tensor]:
    """Standardise both by mean and (unbiased) std of the train features; with statistics="own", the test features by their own.

    "own" is what StoP's release does; predictions then depend on the other test images. A constant feature becomes 0.
    """

    def moments(feature_ND: Tensor) -> tuple[Tensor, Tensor]:
        std_D, mean_D = torch.std_mean(feature_ND.double(), 0)
        return mean_D, std_D.where(std_D > 1e-6 * mean_D.abs(), 1.0)  # a smaller std is a rounding error

    mean_D, std_D = moments(train_ND)
    other_mean_D, other_std_D = moments(test_MD) if statistics == "own" else (mean_D, std_D)
    return ((train_ND - mean_D) / std_D).float(), ((test_MD - other_mean_D) / other_std_D).float()


def fit_logistic(train_ND: Tensor, train_N: Tensor, classes: int, l2: float) -> tuple[Tensor, bool]:
    """Weights (K, D), without bias, of multinomial logistic regression, and whether the solver has converged.

    They minimise the mean cross-entropy + l2 / N * |W|^2 / 2, as cyanure does for StoP. StoP first rotates the features to their
    principal axes; the penalty is the same in all directions, so the rotation has no effect and is left out.
    Raises ValueError if a class has no label, RunError for features that are not finite.
    """
    check_finite(train_ND)
    # imported here because scikit-learn takes a second to load, and nothing else needs it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    absent = (torch.bincount(train_N, minlength=classes) == 0).nonzero()[:, 0].tolist()
    if absent:
        raise ValueError(f"{len(absent)} of {classes} classes have no label to learn from, the first is class {absent[0]}: add one of each")
    # for two classes scikit-learn fits the difference w; as two weights -w/2 and w/2 the penalty is |w|^2 / 4
    scale = 2 if classes == 2 else 1
    model = LogisticRegression(C=scale / l2, fit_intercept=False, **SOLVER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_ND.double().cpu().numpy(), train_N.cpu().numpy())
    weights_KD = numpy.concatenate([-model.coef_, model.coef_]) / 2 if scale == 2 else model.coef_
    return torch.from_numpy(weights_KD), not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def logistic_accuracy(
    train_ND: Tensor, train_N: Tensor, test_MD: Tensor, test_M: Tensor, *, classes: int, l2: float, statistics: str = "train"
) -> dict[str, float]:
    """top1 and top5 in percent of logistic regression on standardised features, and whether the solver has `converged`.

    Raises ValueError and RunError as fit_logistic does.
    """
    for feature_ND in (train_ND, test_MD):
        check_finite(feature_ND)
    train_ND, test_MD = standardise(train_ND, test_MD, statistics)
    weights_KD, converged = fit_logistic(train_ND, train_N, classes, l2)
    logits_MK = test_MD @ weights_KD.float().to(test_MD.device).T
    right_M5 = best_five(logits_MK, test_M)
    top1, top5 = (100 * right.double().mean().item() for right in (right_M5[:, 0], right_M5.any(1)))
    return {"top1": top1, "top5": top5, "converged": converged}


def knn_accuracy(
    train_ND: Tensor, train_N: Tensor, test_MD: Tensor, test_M: Tensor, *, classes: int, neighbours: int = 20, temperature: float = 0.07
) -> float:
    """top1 in percent of the weighted nearest-neighbour classifier: a neighbour of cosine similarity s has exp(s / temperature) votes.

    Raises RunError for features that are not finite.
    """
    for feature_ND in (train_ND, test_MD):
        check_finite(feature_ND)
    train_ND, test_MD = F.normalize(train_ND, dim=1), F.normalize(test_MD, dim=1)
    hits = 0
    for block_BD, block_B in zip(test_MD.split(1024), test_M.split(1024), strict=True):
        similarity_BK, index_BK = (block_BD @ train_ND.T).topk(min(neighbours, len(train_ND)), dim=1)
        votes = torch.zeros(len(block_BD), classes, device=train_ND.device)
        votes.scatter_add_(1, train_N[index_BK], ((similarity_BK - 1) / temperature).exp())  # up to a constant factor; -1 avoids overflow
        hits += int((votes.argmax(1) == block_B).sum())
    return 100 * hits / len(test_M)
