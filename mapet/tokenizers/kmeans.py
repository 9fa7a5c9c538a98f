"""k-means tokenizers: a sample of feature vectors on disk, the centroids that faiss computes from it, and the nearest one to each cell.

Shapes: B images, C channels, N cells in row-major order, D width of a feature, K centroids, V vectors of the sample, M vectors.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from common.data import Loader
from common.evaluate.frozen import fingerprint
from common.files import partial
from common.randomness import generator
from common.recipe import RecipeError
from common.run import RunError, write_text
from mapet.tokenizers.features import Features

ENTRIES = 2**24  # largest number of values processed at once, 64 MiB


@torch.no_grad()
def sample_features(
    features: Features,
    loader: Loader,
    images: int,
    vectors: int,
    file: Path,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seconds: float = 20.0,
) -> numpy.ndarray:
    """Sample feature vectors (V, D) float32 of the first `images` of an evaluation loader into a .npy `file`; return it memory-mapped.

    Of n images, image i gives rows floor(i V / n) to floor((i + 1) V / n): some of its cells, drawn without replacement by (seed, i).
    So memory holds the features of one micro-batch, for any number of images and vectors. The sample is saved at most every `seconds`;
    a killed run resumes from there and gives the same bits. `file` gets its name when it is complete, and `file`.json describes it.
    `progress` is called with the images done and their total. If the data are sorted by class, pass a random subset.
    Raises ValueError for a loader that augments or divides the images, or that has another size or normalisation than the features;
    RecipeError for more images or vectors than there are; RunError if the file holds another sample, or the disk is too full.
    """
    if loader.augmentation is not None or loader.world_size != 1:
        raise ValueError("a sample needs all images, in order and not augmented: use a loader with augmentation=None and world_size=1")
    for name, seen in {"size": loader.image_size, "mean": loader.data.mean, "std": loader.data.std}.items():
        if tuple(seen) != tuple(wanted := getattr(features, name)):
            raise ValueError(f"the loader has {name}={tuple(seen)} and the features want {tuple(wanted)}: set the loader's {name} to this")
    if not 0 < images <= len(loader.split):
        raise RecipeError(f"images={images} is not possible, the split has {len(loader.split)}: choose 1 to this number")
    cells = features.grid[0] * features.grid[1]
    if not 0 < vectors <= images * cells:
        raise RecipeError(f"vectors={vectors} is not possible, {images} images have {images * cells} cells: choose fewer, or more images")
    asked = {"images": images, "vectors": vectors, "seed": seed, "features": features.name, "weights": fingerprint(features)}
    asked |= {"data": loader.data.name, "split": loader.split.digest(), **loader.view}
    file, note, features = Path(file), Path(f"{file}.json"), features.to(device)
    done = _read_note(note, asked, file)
    if file.exists():
        if done < images:
            raise RunError(f"{file} exists, but {note.name} does not say that it is complete: delete it to have it made again")
        return numpy.load(file, mmap_mode="r")
    width = features(torch.zeros(1, len(features.mean), *features.size, device=device)).shape[-1]
    sample, done = _open_map(partial(file), note, done, (vectors, width))

    batches, saved = loader.epoch(0, done // loader.batch_size) if done < images else (), time.monotonic()
    done -= done % loader.batch_size
    for images_BCHW, _ in batches:
        first, done = done, min(done + len(images_BCHW), images)
        row = [i * vectors // images for i in range(first, done + 1)]
        if row[0] < row[-1]:
            feature_MD = features(images_BCHW[: done - first].to(device)).flatten(0, 1)
            orders = (torch.randperm(cells, generator=generator(seed, i)) for i in range(first, done))
            drawn = [order[: row[b + 1] - row[b]] + b * cells for b, order in enumerate(orders)]
            sample[row[0] : row[-1]] = feature_MD[torch.cat(drawn).to(device)].float().cpu().numpy()
        if done == images or time.monotonic() - saved >= seconds:
            sample.flush()  # first the rows, then the note about them
            write_text(note, json.dumps(asked | {"done": done}) + "\n")
            saved = time.monotonic()
        progress(done, images)
        if done == images:
            break
    partial(file).replace(file)
    return numpy.load(file, mmap_mode="r")


def fit_centroids(sample: numpy.ndarray, codes: int, iterations: int = 20, redos: int = 5, seed: int = 1234) -> Tensor:
    """Centroids (K, D) float32 of a sample (V, D), by faiss: Euclidean k-means on all vectors, unchanged; the best of `redos` starts.

    A float32 memory map is read in place, in each of iterations x redos passes: faiss copies no vectors. A map larger than the memory is
    read from disk again in each pass. Runs on all GPUs that faiss supports; the extra installs faiss-cpu, which uses none.
    Raises RecipeError if faiss is not installed, for fewer vectors than codes, and for features that are not finite.
    """
    try:
        import faiss  # imported here: only this function needs it, and it is an optional dependency
    except ImportError as error:
        raise RecipeError("k-means needs faiss, which is not installed: pip install -e '.[mapet]'") from error
    if not 0 < codes <= len(sample):
        raise RecipeError(f"codes={codes} is not possible with {len(sample)} sampled vectors: sample more, or choose 1 to this number")
    for start in range(0, len(sample), rows := max(1, ENTRIES // sample.shape[1])):
        if not numpy.isfinite(sample[start : start + rows]).all():
            raise RecipeError(f"the sample is not finite in the {rows} rows from {start} on: make a new sample, of finite features")
    most = -(-len(sample) // codes)  # vectors per code; with a lower maximum, faiss would use only a part of them
    options = {"niter": iterations, "nredo": redos, "seed": seed, "max_points_per_centroid": most, "min_points_per_centroid": 1}
    clustering = faiss.Kmeans(sample.shape[1], codes, gpu=True, **options)
    clustering.train(sample)
    return torch.from_numpy(numpy.array(clustering.centroids))


@torch.no_grad()
def nearest_codes(vector_MD: Tensor, code_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Index (M,) int64 of the code nearest to each vector (in a tie the first), and the Euclidean distance to it (M,) float32.

    Computed in float32, also under autocast; ENTRIES distances are in memory at once.
    """
    ids, distances, middle_D = [], [], code_KD.float().mean(0)
    with torch.autocast(vector_MD.device.type, enabled=False):
        code_KD = code_KD.float() - middle_D  # the mean of all codes changes no distance, but costs precision
        square_K = code_KD.square().sum(1)
        for part_MD in vector_MD.split(max(1, ENTRIES // max(code_KD.shape))):
            part_MD = part_MD.float() - middle_D
            ids.append(torch.addmm(square_K, part_MD, code_KD.T, alpha=-2).argmin(1))  # |x - c|^2 without |x|^2
            distances.append((part_MD - code_KD[ids[-1]]).norm(dim=1))
    return torch.cat(ids), torch.cat(distances)


class NearestCentroid(nn.Module):
    """A tokenizer: the id of a cell is that of the centroid (K, D) nearest to its features. Takes the same images as its features."""

    def __init__(self, features: Features, centroid_KD: Tensor):
        super().__init__()
        self.features, self.vocabulary = features, len(centroid_KD)
        self.size, self.mean, self.std, self.grid = features.size, features.mean, features.std, features.grid
        self.centroids = nn.Buffer(centroid_KD.float())

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to ids (B, N) int64 and distances (B, N) float32. Raises ValueError if features and centroids differ in width."""
        feature_BND = self.features(images_BCHW)
        if feature_BND.shape[-1] != self.centroids.shape[1]:
            raise ValueError(f"features are {feature_BND.shape[-1]} wide, centroids {self.centroids.shape[1]}: use a matching pair")
        id_M, distance_M = nearest_codes(feature_BND.flatten(0, 1), self.centroids)
        return id_M.view(feature_BND.shape[:2]), distance_M.view(feature_BND.shape[:2])


def _read_note(note: Path, asked: dict, file: Path) -> int:
    """How many images are done. Raises RunError if the note describes another sample."""
    try:
        held = json.loads(note.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    differing = [f"{name}: {held.get(name)} there, {asked[name]} requested" for name in asked if held.get(name) != asked[name]]
    if differing:
        raise RunError(f"{file} holds another sample ({', '.join(differing)}): use another file, or delete it and {note.name}")
    return held["done"]


def _open_map(path: Path, note: Path, done: int, shape: tuple[int, int]) -> tuple[numpy.memmap, int]:
    """Open the map of an earlier run, or a new one. Returns it and the number of images done. Raises RunError if the disk is too full."""
    try:
        # read-only first: "r+" would fill the missing part of a truncated file with zeros
        if done and (found := numpy.load(path, mmap_mode="r")).shape == shape and found.dtype == numpy.float32:
            return numpy.load(path, mmap_mode="r+"), done
    except (OSError, ValueError, EOFError):  # missing or incomplete
        pass
    note.unlink(missing_ok=True)  # before a new map exists, because it does not describe that
    path.parent.mkdir(parents=True, exist_ok=True)
    need, free = 4 * shape[0] * shape[1] / 2**30, shutil.disk_usage(path.parent).free / 2**30
    if need > free:  # otherwise a signal would kill the process when the disk is full
        raise RunError(f"{path.parent} has {free:.1f} GiB free, and {shape[0]} vectors take {need:.1f}: make room, or sample fewer")
    return numpy.lib.format.open_memmap(path, "w+", numpy.float32, shape), 0
