"""k-means tokenizers: a sample of feature vectors on disk, the centroids that faiss finds in it, and the nearest one to each cell.

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

ENTRIES = 2**24  # most numbers that are looked through at once, 64 MiB


@torch.no_grad()
def sample_features(
    features: nn.Module,
    loader: Loader,
    images: int,
    vectors: int,
    file: Path,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seconds: float = 20.0,
) -> numpy.ndarray:
    """Feature vectors (V, D) float32 of the first `images` that an evaluation loader gives, in a .npy `file`, which is returned mapped.

    Of n images, image i gives rows floor(i V / n) to floor((i + 1) V / n): some of its cells, drawn without replacement by (seed, i).
    So memory holds the features of one micro-batch, however many images and vectors there are. What is done is put on disk at most
    every so many `seconds`; a run that was killed goes on from there, to the same bits. `file` has its name once it is whole, and
    `file`.json says of what it is. `progress` is told of images done and of all. Of data sorted by class give a random subset.
    Raises ValueError for a loader that trains, divides the images, or shows them otherwise than the features want; RecipeError for more
    images or vectors than there are; RunError where the file holds another sample, or the disk lacks the room.
    """
    if loader.augmentation is not None or loader.world_size != 1:
        raise ValueError("a sample needs all images in order, as they are: give a loader with augmentation=None and world_size=1")
    for name, seen in {"size": loader.image_size, "mean": loader.data.mean, "std": loader.data.std}.items():
        if tuple(seen) != tuple(wanted := getattr(features, name)):
            raise ValueError(f"the loader has {name}={tuple(seen)} and the features want {tuple(wanted)}: make it as they want it")
    if not 0 < images <= len(loader.split):
        raise RecipeError(f"images={images} cannot be had, the split has {len(loader.split)}: choose 1 to so many")
    cells = features.grid[0] * features.grid[1]
    if not 0 < vectors <= images * cells:
        raise RecipeError(f"vectors={vectors} cannot be had, {images} images have {images * cells} cells: choose fewer, or more images")
    asked = {"images": images, "vectors": vectors, "seed": seed, "features": features.name, "weights": fingerprint(features)}
    asked |= {"data": loader.data.name, "split": loader.split.digest(), **loader.view}
    file, note, features = Path(file), Path(f"{file}.json"), features.to(device)
    done = _read_note(note, asked, file)
    if file.exists():
        if done < images:
            raise RunError(f"{file} is there, but {note.name} does not say that it is whole: delete it to have it made again")
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
            sample.flush()  # first the rows, then the note that they are there
            write_text(note, json.dumps(asked | {"done": done}) + "\n")
            saved = time.monotonic()
        progress(done, images)
        if done == images:
            break
    partial(file).replace(file)
    return numpy.load(file, mmap_mode="r")


def fit_centroids(sample: numpy.ndarray, codes: int, iterations: int = 20, redos: int = 5, seed: int = 1234) -> Tensor:
    """Centroids (K, D) float32 of a sample (V, D), by faiss: Euclidean k-means on all vectors as they are, the best of `redos` starts.

    A float32 map is read where it lies, in each of iterations x redos passes: faiss copies no vectors, and a map larger than the memory is
    read from the disk again in each pass. Runs on all GPUs that faiss sees; faiss-cpu of the extra sees none.
    Raises RecipeError where faiss is not installed, for fewer vectors than codes, and for features that are not finite.
    """
    try:
        import faiss  # here because only this function needs it, and it belongs to an extra
    except ImportError as error:
        raise RecipeError("k-means needs faiss, which is not installed: pip install -e '.[mapet]'") from error
    if not 0 < codes <= len(sample):
        raise RecipeError(f"codes={codes} cannot be found in {len(sample)} sampled vectors: sample more, or choose 1 to so many")
    for start in range(0, len(sample), rows := max(1, ENTRIES // sample.shape[1])):
        if not numpy.isfinite(sample[start : start + rows]).all():
            raise RecipeError(f"the sample is not finite in the {rows} rows from {start} on: sample anew, with features that are")
    most = -(-len(sample) // codes)  # of vectors per code, from which on faiss would take a part of them
    options = {"niter": iterations, "nredo": redos, "seed": seed, "max_points_per_centroid": most, "min_points_per_centroid": 1}
    clustering = faiss.Kmeans(sample.shape[1], codes, gpu=True, **options)
    clustering.train(sample)
    return torch.from_numpy(clustering.centroids.copy())


@torch.no_grad()
def nearest_codes(vector_MD: Tensor, code_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The index (M,) int64 of the code nearest to each vector, the first of equals, and the Euclidean distance to it (M,) float32.

    In float32 whatever is computed in around; ENTRIES distances are in memory at once.
    """
    ids, distances, middle_D = [], [], code_KD.float().mean(0)
    with torch.autocast(vector_MD.device.type, enabled=False):
        code_KD = code_KD.float() - middle_D  # what all codes have in common says nothing, and costs digits
        square_K = code_KD.square().sum(1)
        for part_MD in vector_MD.split(max(1, ENTRIES // max(code_KD.shape))):
            part_MD = part_MD.float() - middle_D
            ids.append(torch.addmm(square_K, part_MD, code_KD.T, alpha=-2).argmin(1))  # |x - c|^2 without |x|^2
            distances.append((part_MD - code_KD[ids[-1]]).norm(dim=1))
    return torch.cat(ids), torch.cat(distances)


class NearestCentroid(nn.Module):
    """A tokenizer: each cell's id is that of the centroid (K, D) nearest to its features. Takes images as its features do."""

    def __init__(self, features: nn.Module, centroid_KD: Tensor):
        super().__init__()
        self.features, self.vocabulary = features, len(centroid_KD)
        self.size, self.mean, self.std, self.grid = features.size, features.mean, features.std, features.grid
        self.register_buffer("centroids", centroid_KD.float())

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images to ids (B, N) int64 and distances (B, N) float32. Raises ValueError for features of another width than the centroids'."""
        feature_BND = self.features(images_BCHW)
        if feature_BND.shape[-1] != self.centroids.shape[1]:
            raise ValueError(f"features are {feature_BND.shape[-1]} wide, centroids {self.centroids.shape[1]}: take what belongs together")
        return tuple(found_M.view(feature_BND.shape[:2]) for found_M in nearest_codes(feature_BND.flatten(0, 1), self.centroids))


def _read_note(note: Path, asked: dict, file: Path) -> int:
    """How many images are done. Raises RunError where the note speaks of another sample."""
    try:
        held = json.loads(note.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    differing = [f"{name}: {held.get(name)} there, {asked[name]} asked" for name in asked if held.get(name) != asked[name]]
    if differing:
        raise RunError(f"{file} holds another sample ({', '.join(differing)}): name another file, or delete it and {note.name}")
    return held["done"]


def _open_map(path: Path, note: Path, done: int, shape: tuple[int, int]) -> tuple[numpy.memmap, int]:
    """The map that an earlier run left and how many images are done, or a new one and none. Raises RunError for a disk without room."""
    try:
        # read first: "r+" would fill what is missing of a torn file with zeros
        if done and (found := numpy.load(path, mmap_mode="r")).shape == shape and found.dtype == numpy.float32:
            return numpy.load(path, mmap_mode="r+"), done
    except (OSError, ValueError, EOFError):  # it is gone, or never was whole
        pass
    note.unlink(missing_ok=True)  # before there is a new map, of which it does not speak
    path.parent.mkdir(parents=True, exist_ok=True)
    need, free = 4 * shape[0] * shape[1] / 2**30, shutil.disk_usage(path.parent).free / 2**30
    if need > free:  # a map without room would end the process by a signal
        raise RunError(f"{path.parent} has {free:.1f} GiB free, and {shape[0]} vectors take {need:.1f}: make room, or sample fewer")
    return numpy.lib.format.open_memmap(path, "w+", numpy.float32, shape), 0
