"""Tokens for MaPeT: the tokenizer, its input images, and the store of its tokens."""

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.data import Augmentation, Data, Loader, Split
from common.data.augment import view_size
from common.files import replacing
from common.picture import draw_codewords
from common.progress import progress_bar
from common.recipe import RecipeError
from common.run import console
from mapet.tokenizers.features import Clip, Encoder, Features, Pixels
from mapet.tokenizers.kmeans import NearestCentroid, fit_centroids, sample_features
from mapet.tokenizers.store import SAVE_SECONDS, Tokenizer, TokenStore, image_names, making, unfinished, write_tokens
from mapet.tokenizers.vqkd import VQKD, load_vqkd

PARTS = ("train", "val")  # splits of the data, in the row order of a store
BATCH = 64  # images per batch of a tokenizer
PER_CODE = 512  # feature vectors to cluster per code, if there are enough (the paper's number)
SEED = 1234  # faiss' default; the tokens do not depend on the seed of a run
MOST = 2**15  # number of ids that fit int16
CODEWORDS, PATCHES, LOOKED_AT = 16, 10, 2048  # of codewords.png: codes, patches per code, and images searched for these
PIXELS = ("pixels", "normalised_pixels")  # features of the model's own patches
CLIP_SIZE = 448  # pixels; RN50x64 gives 14 x 14 cells


@dataclass(frozen=True)
class Tokenization:
    """How images become tokens: the `targets` of a recipe. Raises RecipeError for invalid values."""

    tokenizer: Literal["kmeans", "kclip", "vqkd"] = "kmeans"  # k-means on pixels or encoder features; on CLIP's; BEiT v2's VQ-KD
    features: str = "pixels"  # kmeans: pixels, normalised_pixels (per patch), encoder.safetensors of a run, or a timm model
    model: str = "RN50x64"  # kclip: model name in open_clip
    weights: str | None = "openai"  # kclip: name of the weights in open_clip; None: random weights
    layer: int = 4  # kclip: stage of a ResNet (4: before the attention pool), or block of a Transformer, from 0
    size: int | None = None  # image size in pixels for kclip (None: 448) and for encoder features (None: the encoder's own)
    sample: int | None = None  # k-means: feature vectors to cluster; None: all, at most 512 per code
    iterations: int = 20  # k-means: iterations per start
    redos: int = 5  # k-means: number of starts; the best one is used
    checkpoint: str | None = None  # vqkd: path of BEiT v2's vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth
    store: str | None = None  # path of a finished store; None: make a store if it is missing

    def __post_init__(self) -> None:
        if self.tokenizer not in ("kmeans", "kclip", "vqkd"):
            raise RecipeError(f"targets.tokenizer={self.tokenizer!r} is not known; choose kmeans, kclip or vqkd")
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if name != "tokenizer" and not isinstance(value, kind):
                raise RecipeError(f"targets.{name}={value!r} does not fit; expected {getattr(kind, '__name__', kind)}")
            if name in ("size", "sample", "iterations", "redos") and value is not None and value < 1:
                raise RecipeError(f"targets.{name}={value}: give a whole number from 1 up")
        if self.tokenizer == "vqkd" and self.checkpoint is None and self.store is None:
            file = "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"
            raise RecipeError(f"targets.tokenizer=vqkd needs BEiT v2's tokenizer: download {file} and set targets.checkpoint to its path")

    def settings(self, image_size: int) -> dict:
        """What the tokens depend on: the options that the tokenizer reads, with content hashes instead of file names."""
        if self.tokenizer == "vqkd":
            return {"tokenizer": "vqkd", "checkpoint": _content(self.checkpoint or "")}
        read = {"kmeans": ("features",), "kclip": ("model", "weights", "layer")}[self.tokenizer]
        found = {name: getattr(self, name) for name in ("tokenizer", *read, "sample", "iterations", "redos")}
        if self.tokenizer == "kclip":
            return found | {"size": self.size or CLIP_SIZE}
        if self.features in PIXELS:
            return found | {"size": image_size}
        recipe = Path(self.features).with_name("recipe.json")  # describes the encoder of the weights
        own = {"features": _content(self.features, recipe)} if self.features.endswith(".safetensors") else {}
        return found | own | {"size": self.size}


def prepare_tokens(
    tokenization: Tokenization,
    data: Data,
    *,
    image_size: int,
    patch_size: int | None,
    vocabulary: int,
    augmentation: Augmentation,
    folder: Path,
    device: torch.device,
    workers: int,
    make: bool,
    check: bool = False,
) -> Data:
    """Return the data with tokens (N, cells) as labels, from a store below `folder`. If the store is missing, it is made if `make` is true.

    check: make no store; if it is missing, only load the tokenizer, and return the data unchanged.

    Raises RecipeError if training images are cropped or flipped at random, because tokens of whole images would belong to other patches,
    or if the tokenizer has another grid or vocabulary; DataError if a store does not belong to the images or to the recipe.
    """
    if type(vocabulary) is not int or not 2 <= vocabulary <= MOST:
        raise RecipeError(f"method.vocabulary={vocabulary!r}: give a whole number from 2 to {MOST}, as ids are kept in 16 bits")
    if patch_size is None:
        raise RecipeError("patch_size=None: there is one token per patch, so give the patch size in pixels")
    grid = (image_size // patch_size, image_size // patch_size)
    wanted = {"vocabulary": vocabulary, "grid": grid, "short_side": _short_side(data, augmentation, image_size)}
    if tokenization.store is not None:
        store = TokenStore(Path(tokenization.store))
    else:
        manifest = json.loads(json.dumps({"data": data.name, "settings": tokenization.settings(image_size), **wanted}))
        digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()[:8]
        place = Path(folder) / f"{data.name}-{tokenization.tokenizer}-{digest}"
        if not place.exists():
            if not make:
                fix = "run `make tokens PAPER=mapet` with the same DATA, RECIPE and ARGS first"
                raise RecipeError(f"there are no tokens in {place}, and several processes cannot make them: {fix}")
            if check:
                _tokenizer(tokenization, data, manifest, image_size, patch_size)
                return data
            with making(place):
                if not place.exists():  # another process may just have made it
                    _make(place, tokenization, data, manifest, (image_size, patch_size), device, workers)
        store = TokenStore(place)
    store.check(**wanted)
    console.print(f"tokens: {store.folder}, {vocabulary} codes, {len(store.names)} images; see codewords.png there", markup=False)
    splits = {part: getattr(data, part) for part in PARTS}
    return dataclasses.replace(data, **{part: dataclasses.replace(split, labels=store.of(split, part)) for part, split in splits.items()})


def _content(*paths: str | Path) -> str:
    """Hash of the file contents; the name itself if it is not a file."""
    files = [Path(path).read_bytes() for path in paths if Path(path).is_file()]
    return f"sha256 {hashlib.sha256(b''.join(files)).hexdigest()[:16]}" if files else str(paths[0])


def _short_side(data: Data, augmentation: Augmentation, image_size: int) -> float:
    """The part of an image that model and tokenizer see: short side after the resize / image size, before the center crop; 0: the whole
    image, stretched. Raises RecipeError if the augmentation changes the part at random."""
    cut = augmentation.crop in ("resized", "padding")
    randomly = augmentation.randaugment is not None
    for name, moves, fit in (("crop", cut, "none or squash"), ("flip", augmentation.flip > 0, "0"), ("randaugment", randomly, "null")):
        if moves:
            raise RecipeError(
                f"pretrain.augmentation.{name}={getattr(augmentation, name)}: tokens are made once, without augmentation, and would "
                f"not belong to the patches that the model sees; set it to {fit}"
            )
    if data.train.images is not None or augmentation.crop == "squash":
        return 0.0
    return view_size(data, (image_size, image_size), augmentation.resize)[0] / image_size


def _make(
    place: Path, tokenization: Tokenization, data: Data, manifest: dict, sizes: tuple[int, int], device: torch.device, workers: int
) -> None:
    """Sample features, cluster them, tokenise, and draw codewords.png. After a kill, finished steps are not repeated."""
    seeing = _tokenizer(tokenization, data, manifest, *sizes)
    loaders = {part: _loader(data, getattr(data, part), seeing, manifest["short_side"], workers) for part in PARTS}
    train = loaders["train"]
    splits = {part: loaders[part].split for part in PARTS}
    contents = [held for split in splits.values() for held in split.contents or [""] * len(split)]
    manifest = manifest | ({"contents": contents} if any(contents) else {})
    partial = unfinished(place, [name for part in PARTS for name in image_names(splits[part], part)], manifest)
    tokenizer: Tokenizer
    if isinstance(seeing, Features):
        tokenizer = NearestCentroid(seeing, _centroids(partial, seeing, tokenization, train, manifest["vocabulary"], device))
    else:
        tokenizer = seeing
    tokenizer = tokenizer.to(device).eval()

    def draw(tokens: Tensor) -> None:
        draw_codewords(nearest_patches(tokenizer, train, tokens, device), PATCHES, train.data, partial / "codewords.png")

    write_tokens(partial, tokenizer, loaders, device, draw)


def _tokenizer(tokenization: Tokenization, data: Data, manifest: dict, image_size: int, patch_size: int) -> VQKD | Features:
    """VQ-KD, or the features to cluster. Raises RecipeError if their tokens do not fit the method."""
    vqkd = tokenization.tokenizer == "vqkd"
    found = load_vqkd(tokenization.checkpoint or "") if vqkd else _features(tokenization, data, image_size, patch_size)
    _check(manifest, found)
    if isinstance(found, Features):
        _sample(tokenization, found, len(data.train), manifest["vocabulary"])
    return found


def _sample(tokenization: Tokenization, features: Features, images: int, codes: int) -> int:
    """How many vectors to cluster. Raises RecipeError if there are fewer vectors than clusters."""
    vectors = tokenization.sample or min(PER_CODE * codes, images * math.prod(features.grid))
    if vectors < codes:
        raise RecipeError(f"{vectors} vectors cannot form {codes} clusters: set targets.sample or method.vocabulary to fit")
    return vectors


def _features(tokenization: Tokenization, data: Data, image_size: int, patch_size: int) -> Features:
    if tokenization.tokenizer == "kclip":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)  # with weights=None, a resumed process needs the same random weights
            return Clip(tokenization.model, tokenization.weights, tokenization.layer, tokenization.size or CLIP_SIZE)
    if tokenization.features in PIXELS:
        return Pixels(patch_size, (image_size, image_size), data.mean, data.std, tokenization.features == "normalised_pixels")
    own: dict = {"mean": data.mean, "std": data.std} if tokenization.features.endswith(".safetensors") else {}
    return Encoder(tokenization.features, size=tokenization.size, **own)


def _check(manifest: dict, tokenizer: VQKD | Features) -> None:
    """Raise RecipeError if the tokenizer has another grid or vocabulary than the method."""
    if list(tokenizer.grid) != manifest["grid"]:
        theirs, ours = (f"{rows} x {columns}" for rows, columns in (tokenizer.grid, manifest["grid"]))
        fix = "set targets.size to fit" if isinstance(tokenizer, Features) else "set image_size or patch_size to fit"
        raise RecipeError(f"the tokenizer gives {theirs} tokens for an image, and the encoder has {ours} patches: {fix}")
    vocabulary = getattr(tokenizer, "vocabulary", manifest["vocabulary"])  # features have none before clustering
    if vocabulary != manifest["vocabulary"]:
        raise RecipeError(f"the tokenizer has {vocabulary} tokens: set method.vocabulary={vocabulary}, not {manifest['vocabulary']}")


def _loader(data: Data, split: Split, tokenizer: VQKD | Features, short_side: float, workers: int) -> Loader:
    """A loader with the tokenizer's image size and normalisation, and the part of each image that the model sees."""
    return Loader(
        split,
        data=dataclasses.replace(data, mean=tokenizer.mean, std=tokenizer.std),
        image_size=tokenizer.size,
        batch_size=BATCH,
        augmentation=None,
        seed=0,
        device=torch.device("cpu"),
        workers=workers,
        resize=None if split.images is not None else round(short_side * min(tokenizer.size)),
    )


def _centroids(folder: Path, features: Features, tokenization: Tokenization, loader: Loader, codes: int, device: torch.device) -> Tensor:
    """Load the centroids from the codebook in the folder; if missing, compute them from a sample."""
    codebook, sample, images = folder / "codebook.safetensors", folder / "sample.npy", len(loader.split)
    vectors = _sample(tokenization, features, images, codes)
    if not codebook.exists():
        with progress_bar("features to cluster") as show:
            found = sample_features(features, loader, images, vectors, sample, SEED, device, show, SAVE_SECONDS)
        centroids = fit_centroids(found, codes, tokenization.iterations, tokenization.redos, SEED)
        with replacing(codebook) as temporary:
            save_file({"centroids": centroids.contiguous()}, temporary)
    for file in (sample, Path(f"{sample}.json")):  # always, because a process may have been killed before this line
        file.unlink(missing_ok=True)
    return load_file(codebook)["centroids"]


@torch.no_grad()
def nearest_patches(tokenizer: Tokenizer, loader: Loader, tokens: Tensor, device: torch.device) -> dict[str, list[Tensor]]:
    """Some codes, from the most frequent to the rarest, and the patches (C, P, P) nearest to each, found in up to LOOKED_AT images.

    tokens (N, cells): those of the loader's images come first. The name of each code includes its frequency.
    """
    split, (rows, columns) = loader.split, tokenizer.grid
    spread = torch.arange(min(LOOKED_AT, len(split))) * len(split) // min(LOOKED_AT, len(split))
    counts = torch.bincount(tokens[spread].flatten().long(), minlength=tokenizer.vocabulary)
    frequent = counts.argsort(descending=True, stable=True)[: (counts > 0).sum()]
    chosen = frequent[torch.linspace(0, len(frequent) - 1, min(CODEWORDS, len(frequent))).round().long()].tolist()
    height, width = tokenizer.size[0] // rows, tokenizer.size[1] // columns
    best: dict[int, list[tuple[float, Tensor]]] = {code: [] for code in chosen}
    for images_BCHW, _ in dataclasses.replace(loader, split=split.subset(spread)).epoch(0):
        id_BN, distance_BN = (found.cpu() for found in tokenizer(images_BCHW.to(device)))
        for code, found in best.items():
            places = (id_BN == code).flatten().nonzero()[:, 0]
            distances, order = distance_BN.flatten()[places].sort(stable=True)
            for distance, place in zip(distances[:PATCHES].tolist(), places[order].tolist(), strict=False):
                image, cell = divmod(place, rows * columns)
                top, left = cell // columns * tokenizer.size[0] // rows, cell % columns * tokenizer.size[1] // columns
                # a copy: a view would keep the whole batch in memory
                found.append((distance, images_BCHW[image, :, top : top + height, left : left + width].clone()))
            found.sort(key=lambda pair: pair[0])
            del found[PATCHES:]
    return {f"token {code}: {counts[code]:,} of {counts.sum():,} patches": [patch for _, patch in best[code]] for code in chosen}
