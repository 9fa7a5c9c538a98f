"""Location probe: how much a frozen encoder's tokens tell about where their patches are.

For each block, one linear classifier predicts the cell of the patch grid from the token of a patch.

Shapes: B images, L blocks, N cells of the grid, R tokens of all images (image by image), D width.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from common.data import Loader, Split
from common.evaluate.encoder import TokenEncoder
from common.evaluate.frozen import check_finite
from common.method import Output
from common.processes import once
from common.randomness import generator
from common.vit import ViT

DRAW = 2**33  # part of the random key in `drawn`
TOLERANCE, ITERATIONS = 1e-4, 1000  # largest entry of the gradient at which the solver stops, and its most iterations


class LocationProbe(nn.Module):
    """A linear classifier of cells for each block of an encoder, on the block's tokens after the final norm.

    The tokens of a block are standardised by mean and std of its training tokens. Before `fit`, all logits are 0.
    Raises ValueError if the encoder has no blocks, if the tokens after each of them cannot be read, or if there is a single cell.
    """

    def __init__(self, encoder: ViT | TokenEncoder):
        super().__init__()
        self.encoder, self.depth = encoder.requires_grad_(False), len(encoder.blocks)
        name = type(getattr(encoder, "module", encoder)).__name__
        need = "a location probe needs the tokens after each block, as of common.vit.ViT and the vit models of timm"
        if not self.depth:
            raise ValueError(f"{name} has no `blocks`, so only its last layer can be read: {need}")
        parameter = next(encoder.parameters(), torch.empty(0))
        blank = torch.zeros(1, encoder.channels, *encoder.image_size, device=parameter.device, dtype=parameter.dtype)
        try:
            with torch.no_grad():
                _, self.cells, width = self.eval().tokens(blank).shape
        except (AttributeError, TypeError, ValueError, AssertionError, RuntimeError) as error:  # what timm raises differs by model
            raise ValueError(f"the blocks of {name} cannot be read as tokens of one shape ({error}): {need}") from error
        if self.cells < 2:
            raise ValueError(f"{name} has a single patch, so there is no location to tell: use smaller patches or larger images")
        self.mean_LD, self.weight_LDN = nn.Buffer(torch.zeros(self.depth, width)), nn.Buffer(torch.zeros(self.depth, width, self.cells))
        self.std_LD = nn.Buffer(torch.ones(self.depth, width))

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the tokens of their patches after each block, (L, B*N, D) float32."""
        blocks = self.encoder.last_blocks(images, self.depth)
        return torch.stack([tokens_BTD[:, self.encoder.prefix_tokens :].flatten(0, 1) for tokens_BTD in blocks]).float()

    def forward(self, images: Tensor) -> Output:
        """Images (B, C, H, W); "logits" of the cells are (L, B*N, N)."""
        token_LRD = self.tokens(images)
        with torch.autocast(images.device.type, enabled=False):
            logits_LRN = (token_LRD - self.mean_LD[:, None]) / self.std_LD[:, None] @ self.weight_LDN
        return Output(logits_LRN.new_zeros(()), named={"logits": logits_LRN})

    def fit(self, fabric: Fabric, open_loader: Callable[[], Loader], l2: float) -> list[bool]:
        """Fit the classifiers to the images of a loader; returns for each block whether the solver has converged.

        The main process does this alone, so that the result does not depend on the number of processes; only there the loader, which must
        yield all images, is opened. Raises RunError for tokens that are not finite.
        """
        self.to(fabric.device)
        fitted, converged = once(fabric, lambda: self._fit(fabric, open_loader(), l2))
        self.load_state_dict(fitted, strict=False)  # without the encoder
        return converged

    def _fit(self, fabric: Fabric, loader: Loader, l2: float) -> tuple[dict[str, Tensor], list[bool]]:
        count = len(loader.split)
        token_LRD = torch.empty(self.depth, count * self.cells, self.mean_LD.shape[1])  # too many for the memory of some GPUs
        done = 0
        for images, _ in loader.epoch(0):
            with torch.no_grad(), fabric.autocast():
                found_LRD = self.eval().tokens(images)
            token_LRD[:, done : done + found_LRD.shape[1]] = found_LRD
            done += found_LRD.shape[1]
        cell_R = torch.arange(self.cells, device=fabric.device).repeat(count)
        fits = []
        for token_RD in token_LRD:
            check_finite(token_RD.view(count, -1), "check the encoder's weights and the images, or use --precision 32-true")
            token_RD = token_RD.to(fabric.device)
            std_D, mean_D = torch.std_mean(token_RD.double(), 0)
            # A smaller std is a rounding error. Dividing by infinity removes the feature: a classifier could read the error of each cell.
            std_D = std_D.where(std_D > 1e-5 * token_RD.double().square().mean().sqrt(), torch.inf)
            weight_DN, converged = fit_cells(((token_RD - mean_D) / std_D).float(), cell_R, self.cells, l2)
            fits.append((mean_D.float().cpu(), std_D.float().cpu(), weight_DN.cpu(), converged))
        mean, std, weight, converged_L = zip(*fits, strict=True)
        return {"mean_LD": torch.stack(mean), "std_LD": torch.stack(std), "weight_LDN": torch.stack(weight)}, list(converged_L)


def fit_cells(token_RD: Tensor, cell_R: Tensor, cells: int, l2: float) -> tuple[Tensor, bool]:
    """Weights (D, N), without bias, that minimise the mean cross-entropy + l2 / R * |W|^2 / 2, and whether the solver has converged.

    The same objective as fit_logistic, whose Newton method takes fifteen times as long for the 196 cells of a ViT-S, on the CPU only.
    This is L-BFGS, in coordinates in which the Hessian at W = 0 is the identity: a third of the steps.
    """
    count, width = token_RD.shape
    hessian_DD = token_RD.T.double() @ token_RD.double() / (count * cells) + l2 / count * torch.eye(width, device=token_RD.device)
    value_D, vector_DD = torch.linalg.eigh(hessian_DD)
    basis_DD = (vector_DD * value_D.rsqrt() @ vector_DD.T).float()
    seen_RD = token_RD @ basis_DD
    own_DN = torch.zeros(width, cells, device=token_RD.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [own_DN], max_iter=ITERATIONS, history_size=20, tolerance_grad=TOLERANCE, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    @torch.enable_grad()
    def objective() -> Tensor:
        solver.zero_grad()
        entropy_R = F.cross_entropy(seen_RD @ own_DN, cell_R, reduction="none")
        value = entropy_R.double().mean() + l2 / count / 2 * (basis_DD @ own_DN).double().square().sum()
        value.backward()
        return value.detach()

    solver.step(objective)
    objective()
    assert own_DN.grad is not None
    return basis_DD @ own_DN.detach(), own_DN.grad.abs().max().item() <= TOLERANCE


class CellLoader:
    """Load the images of a loader, with the cell of each of their patches (B*N,) in place of the class."""

    def __init__(self, loader: Loader, cells: int):
        self.loader, self.cells = loader, cells

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, H, W) and cells (B*N,) from micro-batch `start` of the epoch on."""
        for images, _ in self.loader.epoch(epoch, start):
            yield images, torch.arange(self.cells, device=images.device).repeat(len(images))


def drawn(split: Split, count: int | None, *key: int) -> Split:
    """At most `count` images of a split, drawn with a random key, in their order; None: all."""
    if count is None or count >= len(split):
        return split
    return split.subset(torch.randperm(len(split), generator=generator(*key, DRAW))[:count].sort().values)
