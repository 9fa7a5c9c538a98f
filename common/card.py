"""The model card of an exported encoder: method, recipe, data, numbers, licence, citation.

Numbers are means over the seeds of the same run that lie beside it (...-seed0, ...-seed1), with 95 % intervals by Student's t distribution.
"""

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

LOADING = {
    "timm.create_model": """import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # DIR: this folder
tokens = model.forward_features(images)""",
    "transformers.ViTModel": """from transformers import ViTModel

model = ViTModel.from_pretrained("DIR", add_pooling_layer=False).eval()  # DIR: this folder
tokens = model(images).last_hidden_state""",
    "transformers.TimmWrapperModel": """from transformers import TimmWrapperModel  # needs timm

model = TimmWrapperModel.from_pretrained("DIR").eval()  # DIR: this folder
tokens = model(images).last_hidden_state""",
}


def model_card(run: Path, settings: dict[str, Any], card: dict[str, Any], kind: str, reading: str) -> str:
    """The README.md of an exported encoder, in Markdown.

    run: the folder of the run. settings, card: recipe.json and card.json of its pre-training. kind: what loads the export, a key of
    LOADING. reading: sentences about how the evaluations get one feature per image.
    """
    source, recipe = card["source"], settings["recipe"]
    name = " ".join(filter(None, [card["recipe"], card["arm"], *card["overrides"]]))
    side = recipe["image_size"]
    origin = f"from the file `{card['encoder_file']}`" if card["encoder_file"] else f"trained for {recipe['pretrain']['epochs']} epochs"
    facts = [
        f"- Method: {source['name']}" + ", supervised" * recipe["supervised"],
        f"- Encoder: {card['backbone']}, {origin}",
        f"- Recipe: `{name}`; all settings are in [recipe.json](recipe.json)",
        f"- Data: {settings['data']['name']} ({settings['data']['train']}), seed {settings['seed']}, precision {settings['precision']}",
        f"- Code: {_code(run)}",
    ]
    view = f"{card['channels']} x {side} x {side}, pixels in 0..1 normalized by mean {_list(card['mean'])} and std {_list(card['std'])}"
    resized = "" if card["resize"] == [side, side] else f" Images are resized to {min(card['resize'])} pixels (short side) and cropped."
    library = kind.partition(".")[0]
    tag = source["name"].lower().replace(" ", "-")
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\ntags:\n- vision\n- {tag}\n---",
        f"# {source['name']}: {card['backbone']} on {settings['data']['name']}",
        "\n".join(facts),
        f"## Use\n\n```python\n{LOADING[kind]}\n```\n\n`images` are (B, {card['channels']}, {side}, {side}): {view}.{resized} {reading}",
        f"## Numbers\n\n{_numbers(run)}",
        f"## Licence\n\n{_licence(card)}",
        f"## Citation\n\n{_citation(source)}",
    ]
    return "\n\n".join(parts) + "\n"


def _code(run: Path) -> str:
    """The commit and device of the pre-training, and how far it is."""
    folder = run / "pretrain"
    starts = json.loads((folder / "environment.json").read_text())
    text = f"position-pretraining, commit {starts[0]['commit']}, {starts[0]['device']}, {starts[0]['versions']}"
    if (folder / "result.json").exists():
        return text
    progress = json.loads((folder / "progress.json").read_text())
    return f"{text}. **The training is not finished: step {progress['saved']} of {progress['total']}.**"


def _numbers(run: Path) -> str:
    """A table of the accuracies of this encoder; or a sentence, where there is none yet."""
    rows = []
    for stage in [run / "pretrain", *sorted(run.glob("*-pretrained"))]:
        seeds = _seeds(stage)
        for name, (_, settings) in _accuracies(stage).items():
            values = [found[name][0] for seed in seeds if name in (found := _accuracies(seed))]
            rows.append(f"| {name.replace('_', ' ')} | {_interval(values)} | {settings or '-'} |")
    if not rows:
        return "No evaluation is finished."
    head = f"In percent of the test images. Settings are those of {run.name}.\n\n| Evaluation | Top-1 | Settings |\n| --- | --- | --- |\n"
    return head + "\n".join(rows)


def _accuracies(stage: Path) -> dict[str, tuple[float, str]]:
    """The top-1 accuracies of a stage in percent, with their settings, by protocol; none if it is not finished."""
    path = stage / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if "results" in result:
        return {one["protocol"]: (one["top1"], one["settings"]) for one in result["results"]}
    return {f"pretrain {name}": (value, "") for name, value in result.items() if name.endswith("top1")}


def _seeds(stage: Path) -> list[Path]:
    """A stage and the same stage of the other seeds: those with the same settings and commit."""

    def identity(folder: Path) -> Any:
        settings, result = (folder / name for name in ("recipe.json", "result.json"))
        if not (settings.exists() and result.exists()):
            return None
        own = {name: value for name, value in json.loads(settings.read_text()).items() if name not in ("seed", "pretrained")}
        return own, json.loads(result.read_text())["environment"]["commit"]

    run = stage.parent
    others = [folder / stage.name for folder in run.parent.glob(re.sub(r"\d+$", "*", run.name))]
    return [folder for folder in others if identity(folder) == identity(stage)]


def _interval(values: list[float]) -> str:
    """The mean of one number per seed, with half the width of its 95 % interval by Student's t distribution."""
    if len(values) == 1:
        return f"{values[0]:.2f} (one seed)"
    from scipy.stats import t  # imported here, because it takes a second to load

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.2f} ± {half:.2f} (95 % t interval, {len(values)} seeds)"


def _licence(card: dict[str, Any]) -> str:
    source = card["source"]
    code = f"[official code](https://github.com/{source['code']})"
    if card["encoder_file"]:
        terms = f" The {code} of {source['name']} is {source['licence']}." if source["licence"] else ""
        return f"The weights come from `{card['encoder_file']}`: the licence of that file applies.{terms}"
    official = f" The {code} of {source['name']} is {source['licence']}; no part of it was used." if source["licence"] else ""
    return f"The encoder was trained by the code of position-pretraining, which is Apache-2.0.{official} The data have their own terms."


def _citation(source: dict[str, Any]) -> str:
    if not source["citation"]:
        return f"Cite the paper of {source['name']}."
    return f"{source['citation']}, [arXiv {source['arxiv']}](https://arxiv.org/abs/{source['arxiv']})."


def _list(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
