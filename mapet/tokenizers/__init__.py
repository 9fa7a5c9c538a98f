"""Tokens for MaPeT: which tokenizer, how it sees images, and where what it made is kept."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.data import Augmentation, Data, Loader, Split
from common.data.augment import view_size
from common.files import replacing
from common.picture import draw_codewords
from common.positions import Grid
from common.recipe import RecipeError
from common.run import console
from mapet.tokenizers.features import Clip, Encoder, Features, Pixels
from mapet.tokenizers.kmeans import NearestCentroid, fit_centroids, sample_features
from mapet.tokenizers.store import TokenStore, making, partial_folder, progress_bar, write_store
from mapet.tokenizers.vqkd import load_vqkd

BATCH = 64  # images that a tokenizer sees at once
PER_CODE = 512  # feature vectors that are clustered for each code, where there are so many (the paper's)
SEED = 1234  # faiss' own; tokens are the same for all seeds of a run
CODEWORDS, PATCHES, LOOKED_AT = 16, 10, 2048  # of the picture: codes, patches of each, and images among which these are found


@dataclass(frozen=True)
class Tokenization:
    """How images become tokens: a recipe's `targets`. Raises RecipeError for values that make no sense."""

    tokenizer: Literal["kmeans", "kclip", "vqkd"] = "kmeans"  # k-means on pixels or an encoder's features; on CLIP's; BEiT v2's VQ-KD
    features: str = "pixels"  # kmeans: pixels, normalised_pixels (each patch by itself), encoder.safetensors of a run, or a timm model
    model: str = "RN50x64"  # kclip: open_clip's name of a model
    weights: str | None = "openai"  # kclip: open_clip's name of its weights; None: random ones
    layer: int = 4  # kclip: stage of a ResNet (4: before the attention pool), or block of a Transformer from 0
    size: int | None = None  # kclip (None: 448) and features: pixels of a side, in place of the encoder's own
    sample: int | None = None  # k-means: feature vectors to cluster; None: all, at most 512 for each code
    iterations: int = 20  # k-means: of each start
    redos: int = 5  # k-means: starts, of which the best counts
    checkpoint: str | None = None  # vqkd: BEiT v2's file vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth
    store: str | None = None  # a finished store, in place of one that is made where it is missing

    def __post_init__(self) -> None:
        if self.tokenizer not in ("kmeans", "kclip", "vqkd"):
            raise RecipeError(f"targets.tokenizer={self.tokenizer!r} is not known; choose kmeans, kclip or vqkd")
        if self.tokenizer == "vqkd" and self.checkpoint is None and self.store is None:
            file = "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"
            raise RecipeError(f"targets.tokenizer=vqkd needs BEiT v2's tokenizer: download {file} and set targets.checkpoint to its path")
        for name in ("sample", "iterations", "redos"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"targets.{name}={value}: give a whole number from 1 up")

    def settings(self) -> dict:
        """What the tokens depend on: the options that the tokenizer reads, with the content of files in the place of their names."""
        clustering = ("sample", "iterations", "redos")
        read = {
            "kmeans": ("features", "size", *clustering) if "pixels" not in self.features else ("features", *clustering),
            "kclip": ("model", "weights", "layer", "size", *clustering),
            "vqkd": ("checkpoint",),
        }[self.tokenizer]
        found = {"tokenizer": self.tokenizer, **{name: getattr(self, name) for name in read}}
        for name, value in found.items():
            if isinstance(value, str) and Path(value).is_file():
                found[name] = f"{Path(value).name} sha256 {hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]}"
        return found


def prepare_tokens(
    tokenization: Tokenization,
    data: Data,
    *,
    image_size: int,
    patch_size: int,
    vocabulary: int,
    augmentation: Augmentation,
    folder: Path,
    device: torch.device,
    workers: int,
    make: bool,
) -> Data:
    """The data with tokens (N, cells) in the place of labels, from a store below `folder`, which is made where it is missing and `make`.

    Raises RecipeError where training images are cut or mirrored, so that tokens of whole images would be those of other patches, or where
    the tokenizer has another grid or vocabulary; DataError where a store does not belong to the images or to the recipe.
    """
    view = _view(data, augmentation, image_size)
    grid = (image_size // patch_size, image_size // patch_size)
    wanted = {"vocabulary": vocabulary, "grid": grid, "view": view}
    if tokenization.store is not None:
        store = TokenStore(Path(tokenization.store))
    else:
        made_by = {"settings": tokenization.settings(), **wanted}
        manifest = json.loads(json.dumps({"data": data.name, **made_by}))
        digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:8]
        place = Path(folder) / f"{data.name}-{tokenization.tokenizer}-{digest}"
        if not (place / "manifest.json").exists():
            if not make:
                raise RecipeError(f"there are no tokens in {place}, and several processes do not make them: run `make tokens` first")
            with making(place):
                _make(place, tokenization, data, manifest, image_size, patch_size, device, workers)
        store = TokenStore(place)
    store.check(**wanted)
    console.print(f"tokens: {store.folder}, {vocabulary} codes, {len(store.names)} images; codewords.png there shows some", markup=False)
    return dataclasses.replace(
        data, **{part: dataclasses.replace(split, labels=store.of(split, part)) for part, split in _parts(data).items()}
    )


def _parts(data: Data) -> dict[str, Split]:
    return {"train": data.train, "val": data.val}


def _view(data: Data, augmentation: Augmentation, image_size: int) -> dict:
    """What of an image the model sees, which the tokenizer must see too. Raises RecipeError where that is another part each time."""
    breaking = {"crop": augmentation.crop in ("resized", "padding"), "flip": augmentation.flip > 0}
    breaking["randaugment"] = augmentation.randaugment is not None
    for name, broken in breaking.items():
        if broken:
            fit = {"crop": "none or squeezed", "flip": "0", "randaugment": "null"}[name]
            raise RecipeError(
                f"pretrain.augmentation.{name}={getattr(augmentation, name)}: tokens are made once, of images as they are, and would not "
                f"be those of the patches that the model sees; set it to {fit}"
            )
    if augmentation.crop == "squeezed":
        return {"crop": "squeezed"}
    return {"crop": "centre", "short_side": view_size(data, (image_size, image_size), augmentation.resize)[0] / image_size}


def _make(
    place: Path,
    tokenization: Tokenization,
    data: Data,
    manifest: dict,
    image_size: int,
    patch_size: int,
    device: torch.device,
    workers: int,
) -> None:
    partial = partial_folder(place)
    if tokenization.tokenizer == "vqkd":
        tokenizer = load_vqkd(tokenization.checkpoint)
        _check(manifest, tokenizer.grid, tokenizer.vocabulary)
    else:
        features = _features(tokenization, data, image_size, patch_size)
        _check(manifest, features.grid)
        codebook = partial / "codebook.safetensors"
        if not codebook.exists():
            _cluster(codebook, features, tokenization, _loader(data, data.train, features, manifest["view"], workers), manifest, device)
        tokenizer = NearestCentroid(features, load_file(codebook)["centroids"])
    tokenizer = tokenizer.to(device).eval()
    loaders = {part: _loader(data, split, tokenizer, manifest["view"], workers) for part, split in _parts(data).items()}

    def draw(folder: Path, tokens: torch.Tensor) -> None:
        _draw(folder / "codewords.png", tokenizer, loaders["train"], tokens, device)

    write_store(place, tokenizer, loaders, device, manifest, draw)


def _features(tokenization: Tokenization, data: Data, image_size: int, patch_size: int) -> Features:
    if tokenization.tokenizer == "kclip":
        return Clip(tokenization.model, tokenization.weights, tokenization.layer, tokenization.size or 448)
    if tokenization.features in ("pixels", "normalised_pixels"):
        per_patch = tokenization.features == "normalised_pixels"
        return Pixels(patch_size, (image_size, image_size), data.mean, data.std, per_patch)
    if tokenization.features.endswith(".safetensors"):
        return Encoder(tokenization.features, mean=data.mean, std=data.std, size=tokenization.size)
    return Encoder(tokenization.features, size=tokenization.size)


def _check(manifest: dict, grid: Grid, vocabulary: int | None = None) -> None:
    if list(grid) != manifest["grid"]:
        theirs, ours = (f"{rows} x {columns}" for rows, columns in (grid, manifest["grid"]))
        raise RecipeError(f"the tokenizer gives {theirs} tokens for an image, and the encoder has {ours} patches: set targets.size to fit")
    if vocabulary not in (None, manifest["vocabulary"]):
        raise RecipeError(f"the tokenizer has {vocabulary} tokens: set method.vocabulary={vocabulary}, not {manifest['vocabulary']}")


def _loader(data: Data, split: Split, tokenizer: nn.Module, view: dict, workers: int) -> Loader:
    """The images as the tokenizer wants them, showing what the model sees of each."""
    resize = 0 if view["crop"] == "squeezed" else round(view["short_side"] * min(tokenizer.size))
    return Loader(
        split,
        data=dataclasses.replace(data, mean=tokenizer.mean, std=tokenizer.std),
        image_size=tokenizer.size,
        batch_size=BATCH,
        augmentation=None,
        seed=0,
        device=torch.device("cpu"),
        workers=workers,
        resize=None if split.paths is None else resize,
    )


def _cluster(codebook: Path, features: Features, tokenization: Tokenization, loader: Loader, manifest: dict, device: torch.device) -> None:
    """Sample, cluster, keep the centroids."""
    images, codes = len(loader.split), manifest["vocabulary"]
    vectors = tokenization.sample or min(PER_CODE * codes, images * math.prod(features.grid))
    sample = codebook.with_name("sample.npy")
    with progress_bar("features to cluster") as show:
        found = sample_features(features, loader, images, vectors, sample, SEED, device, show)
    centroids = fit_centroids(found, codes, tokenization.iterations, tokenization.redos, SEED)
    with replacing(codebook) as temporary:
        save_file({"centroids": centroids.contiguous()}, temporary)
    for file in (sample, Path(f"{sample}.json")):
        file.unlink()


@torch.no_grad()
def _draw(path: Path, tokenizer: nn.Module, loader: Loader, tokens: torch.Tensor, device: torch.device) -> None:
    """Some codes, from the most frequent to the rarest, and the patches nearest to each, among some thousand images."""
    split = loader.split
    spread = torch.arange(min(LOOKED_AT, len(split))) * len(split) // min(LOOKED_AT, len(split))
    counts = torch.bincount(tokens[spread].flatten().long(), minlength=tokenizer.vocabulary)
    frequent = [code for code in counts.argsort(descending=True).tolist() if counts[code]]
    chosen = [
        frequent[place * (len(frequent) - 1) // max(1, min(CODEWORDS, len(frequent)) - 1)] for place in range(min(CODEWORDS, len(frequent)))
    ]
    chosen = list(dict.fromkeys(chosen))
    rows, columns = tokenizer.grid
    height, width = tokenizer.size[0] // rows, tokenizer.size[1] // columns
    best: dict[int, list] = {code: [] for code in chosen}
    looked = dataclasses.replace(loader, split=split.subset(spread))
    for images_BCHW, _ in looked.epoch(0):
        id_BN, distance_BN = (found.cpu() for found in tokenizer(images_BCHW.to(device)))
        for code in chosen:
            for image, cell in (id_BN == code).nonzero().tolist():
                top, left = cell // columns * height, cell % columns * width
                best[code].append((float(distance_BN[image, cell]), images_BCHW[image, :, top : top + height, left : left + width].cpu()))
            best[code] = sorted(best[code], key=lambda found: found[0])[:PATCHES]
    patches = {f"{code}: {int(counts[code])}": [patch for _, patch in best[code]] for code in chosen}
    draw_codewords(patches, PATCHES, looked.data, path)
