"""Tests of the reports: one page of a run or a comparison, which opens without a network, on phones and in the dark."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import reproduce
from benchmarks.compare.scores import Score, add, load
from benchmarks.compare.units import Plan
from benchmarks.report.__main__ import main
from benchmarks.report.comparison import draw_curves
from benchmarks.report.encoder import attention_maps, feature_colours, position_accuracy, read_recipe
from benchmarks.report.figures import GREY, interval_plot
from benchmarks.report.page import write_svg
from benchmarks.report.run import read_metrics
from common.method import Output
from common.recipe import Recipe, as_json
from common.vit import ViT
from droppos.recipe import digits

METHODS = ("from scratch", "mae", "droppos", "stop, <b>bold</b> & $x$")
RUNS = {"mae": "mae/digits-30ep", "droppos": "droppos/digits-30ep"}
ACCURACIES = {
    "finetune": 95,
    "finetune_5_per_class": 60,
    "finetune_20_per_class": 80,
    "knn": 85,
    **{f"location_{n}": 20 * n for n in (1, 2, 3, 4)},
}
SCRIPT = "<script>alert('loss is nan')</script>"
WIDTHS = (360, 1280)  # pixels, of a phone and of a desktop


def made_up_scores() -> list[Score]:
    """Four methods, five seeds, draws of labels, costs, and one failed unit."""
    draw, scores = numpy.random.default_rng(0), []
    about = {"arena": "digits", "hash": "0123", "budget": "images:43000", "epochs": 30, "recipe": "r", "commit": "c", "date": "2026-11-25"}
    about |= {"device": "cpu", "precision": "32-true", "versions": "torch", "hours": 0.1}
    for number, method in enumerate(METHODS):
        for seed in range(5):
            own = about | {
                "method": method,
                "seed": seed,
                "draw": 0,
                "note": "",
                "stage": f"{RUNS.get(method, method)}-seed{seed}/pretrain",
            }
            if number == 3 and seed == 4:
                scores.append(Score(**own | {"evaluation": "failed", "value": float("nan"), "note": SCRIPT}))
                continue
            for name, value in ACCURACIES.items():
                for label_draw in range(2 if "per_class" in name else 1):
                    scores.append(Score(**own | {"evaluation": name, "draw": label_draw, "value": value + number + draw.normal()}))
            scores += [Score(**own | {"evaluation": f"cost_{name}", "value": 2.0}) for name in ("minutes", "images_per_second")]
    return scores


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """The folder of a comparison, with a report."""
    folder = tmp_path_factory.mktemp("compare") / "digits"
    add(folder / "scores.csv", made_up_scores())
    plan = {
        "arena": "digits",
        "hash": "0123",
        "limit": None,
        "data": "digits",
        "budget": "images:43000",
        "device": "cpu",
        "data_root": "data",
        "cells": 36,
        "conditions": {method: {"Positions": "sincos"} for method in METHODS},
    }
    epochs = dict.fromkeys(METHODS, 30)
    plan = Plan(**plan, papers=(), encoder_file=None, epochs=epochs, evaluations=())
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    runs = ("mae/digits-30ep-seed0/pretrain/log.txt", "droppos/digits-30ep-seed0/pretrain/log.txt", "logs/mae-seed1.txt")  # one is recorded
    for path in map(folder.joinpath, runs):
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"pretrain step {step}/30, 9 images/s, loss {1 / step:.3g}, 0 s left\n" for step in (3, 15, 9, 15, 30)))
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a tiny run, with a report."""
    out = tmp_path_factory.mktemp("runs")
    short = ["--set", "finetune_5_per_class.stage.epochs=2", "--set", "finetune_20_per_class.stage.epochs=2"]
    stages = ["--stages", "pretrain", "knn", "finetune_5_per_class", "finetune_20_per_class"]
    assert reproduce.main(["droppos", "--device", "cpu", "--epochs", "2", *stages, *short, "--out", str(out)]) == 0
    assert main([str(out / "droppos" / "digits-2ep-seed0")]) == 0
    return out / "droppos" / "digits-2ep-seed0"


class Page(HTMLParser):
    """What a page shows and loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.headings: list[str] = []
        self.figures: list[str] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.figures += [given["aria-label"]] if tag == "figure" and "aria-label" in given else []
        self.loaded += [given[name] for name in ("src", "href", "xlink:href") if given.get(name)]

    def handle_data(self, data):
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data)


def test_learning_curves_are_from_the_logs_of_runs_and_of_recorded_runs(comparison):
    axes = draw_curves(comparison, load(comparison / "scores.csv"))["loss, mae"].axes[0]
    assert axes.get_legend_handles_labels()[1] == ["seed 0", "seed 1"]
    for line in axes.lines:
        assert [*zip(*line.get_data(), strict=True)] == [(3, 0.333), (9, 0.111), (15, 0.0667), (30, 0.0333)]


def test_the_page_of_a_comparison_has_all_parts(comparison):
    page = Page(comparison / "report.html")
    parts = ["Results", "Means with 95 % intervals", "Differences from the references", "Accuracy against labels", "Location by depth"]
    assert page.headings == [*parts, "Learning curves", "What differs, and costs", "Failures"]
    shown = ["finetune", "finetune_20_per_class", "finetune_5_per_class", "knn", "location_4"]
    curves = ["loss, mae", "loss, droppos"]
    assert page.figures == [*(f"{kind}_{name}" for kind in ("mean", "difference") for name in shown), "labels", "location", *curves]
    assert {path.stem for path in (comparison / "figures").glob("*.svg")} == {*page.figures}
    assert "seed 4" not in page.text and "undecided" in page.text and "chance" in page.text


@pytest.mark.slow
def test_the_page_of_a_run_has_all_parts(run):
    page = Page(run / "report.html")
    parts = ["Results", "Accuracy against labels", "Learning curves", "Pictures", "Positions", "Encoder", "Settings", "Environment", "Log"]
    assert page.headings == parts
    losses = ["pretrain_loss", "pretrain_position_top1", "finetune_20_per_class_loss", "finetune_5_per_class_loss"]
    assert page.figures == ["labels", *losses, "positions", "encoder"]
    assert page.tags.count("img") == 1  # positions.png
    for result in run.glob("*/result.json"):
        assert result.parent.name == "pretrain" or f"{json.loads(result.read_text())['top1']:.2f}" in page.text
    assert page.text.count("step 22/22") == 1 and "&#34;mask_ratio&#34;: 0.25" in page.text


@pytest.mark.slow
def test_the_accuracies_by_cell_agree_with_the_accuracy_of_the_run(run):
    cells = [float(value) for value in re.findall(r">(\d+)</text>", (run / "figures" / "positions.svg").read_text())[:16]]
    top1 = json.loads((run / "pretrain" / "result.json").read_text())["position_top1"]
    assert abs(numpy.mean(cells) - top1) < 2.5  # other random masks


@pytest.mark.parametrize("kind", ["comparison", pytest.param("run", marks=pytest.mark.slow)])
def test_a_page_loads_nothing(kind, request):
    page = Page(request.getfixturevalue(kind) / "report.html")
    assert all(address.startswith(("data:", "#")) for address in page.loaded) and "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text) and "script" not in page.tags


def test_text_from_the_results_is_escaped(comparison):
    page = Page(comparison / "report.html")
    assert SCRIPT not in page.text and "&lt;script&gt;alert" in page.text
    assert "b" not in page.tags and page.text.count("&lt;b&gt;bold&lt;/b&gt; &amp; $x$") > 10  # in tables and figures


def test_a_second_report_is_the_same(comparison):
    before = {path.name: path.read_bytes() for path in [comparison / "report.html", *(comparison / "figures").iterdir()]}
    assert main([str(comparison)]) == 0
    assert before == {path.name: path.read_bytes() for path in [comparison / "report.html", *(comparison / "figures").iterdir()]}


def test_figures_have_no_background_and_their_text_is_legible_on_white_and_black(comparison):
    drawn = (comparison / "figures" / "mean_knn.svg").read_text()
    assert "#ffffff" not in drawn and "fill: #000000" not in drawn
    assert drawn.count("<text") == len(re.findall(rf"<text style=\"[^\"]*fill: {GREY}", drawn)) > 0
    assert f'[style*="{GREY}"]' in (comparison / "report.html").read_text()  # a page gives this text its own colour

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert 1.05 / (luminance(GREY) + 0.05) > 3 and (luminance(GREY) + 0.05) / (luminance("#14171b") + 0.05) > 3  # WCAG's contrast


def test_an_interval_that_is_not_known_is_drawn_as_a_point(tmp_path):
    means = pandas.DataFrame({"value": [50.0, float("nan")], "half": [float("nan"), 2.0], "full": True}, index=["a", "b"])
    drawn = write_svg(interval_plot({"k-NN": {"": means}}, "percent"), tmp_path / "a.svg")
    assert "nan" not in drawn.lower() and all(f">{text}</text>" in drawn for text in ("a", "b", "k-NN", "percent"))


def test_a_comparison_in_which_all_has_failed_shows_why(tmp_path, comparison):
    shutil.copy(comparison / "plan.json", tmp_path)
    add(tmp_path / "scores.csv", [score for score in made_up_scores() if score.evaluation == "failed"])
    assert main([str(tmp_path)]) == 0
    assert Page(tmp_path / "report.html").headings[-1] == "Failures"


def test_other_folders_are_refused_with_what_to_give(tmp_path, comparison, capsys):
    def refused(folder: Path) -> str:
        assert main([str(folder)]) == 2 and not (folder / "report.html").exists()
        return " ".join(capsys.readouterr().out.split())

    assert "is no folder: give a folder such as" in refused(tmp_path / "absent")
    assert "neither the stages of a run (pretrain/recipe.json) nor the plan.json of a comparison" in refused(tmp_path)
    stage = tmp_path / "run" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "recipe.json").write_text("{}")
    (stage / "environment.json").write_text("[]")
    assert "has no finished stage yet (begun: pretrain)" in refused(stage.parent)
    assert f"is one stage of a run: give the run, {stage.parent}" in refused(stage)
    (tmp_path / "compare").mkdir()
    shutil.copy(comparison / "plan.json", tmp_path / "compare")
    assert "has no scores yet" in refused(tmp_path / "compare")
    (tmp_path / "compare" / "plan.json").write_text('{"arena": "digits"}')
    assert "is not the plan of a comparison" in refused(tmp_path / "compare")


@pytest.mark.slow
def test_a_run_on_other_images_is_reported_without_attention_maps(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    settings = json.loads((folder / "pretrain" / "recipe.json").read_text())
    settings["data"]["val"] = "360 images, 10 classes, others"
    (folder / "pretrain" / "recipe.json").write_text(json.dumps(settings))
    (folder / "knn-random" / "result.json").unlink()
    assert main([str(folder)]) == 0
    page = Page(folder / "report.html")
    assert "val of digits are not the images of the run; set DATA= to their folder" in page.text and "encoder" not in page.figures
    assert "not finished" in page.text


def test_an_incomplete_last_line_of_the_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0}\n{"step": 2, "ep')
    assert read_metrics(tmp_path / "metrics.jsonl")["step"].tolist() == [1] and read_metrics(tmp_path / "absent.jsonl").empty


def test_the_recipe_of_a_run_is_read_back():
    held = {name: value for name, value in as_json(digits()).items() if name not in ("protocols", "arms")}
    again = as_json(read_recipe(held))
    assert {name: again[name] for name in held} == held and isinstance(read_recipe(held), Recipe)


@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"position": "relative"}], ids=str)
def test_attention_maps_are_the_weights_of_the_last_block(options):
    torch.manual_seed(0)
    encoder = ViT(image_size=12, patch_size=4, channels=1, width=24, depth=2, heads=2, **options).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, last, first = torch.randn(2, 1, 12, 12), encoder.blocks[-1].attn, encoder.prefix_tokens
    maps = attention_maps(encoder, images)
    assert maps.shape == (2, 3, 3)
    asked = []
    last.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0]))
    encoder(images)
    q, k, _ = last.qkv(asked[0]).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    bias = last.rel_pos.get_bias() if last.rel_pos is not None else None
    weights = scaled_dot_product_attention(q, k, torch.eye(9 + first).expand(2, 2, -1, -1), attn_mask=bias).mean(1)
    expected = weights[:, 0, 1:] if first else weights.mean(1)
    torch.testing.assert_close(maps.flatten(1), expected)


def test_equal_patches_have_equal_colours():
    torch.manual_seed(0)
    encoder = ViT(image_size=12, patch_size=4, channels=1, width=24, depth=2, heads=2, position="none")
    image = torch.randn(1, 1, 12, 12)
    image[..., 8:, 8:] = image[..., :4, :4]
    colours = feature_colours(encoder, torch.cat([image, image]))
    assert colours.shape == (2, 3, 3, 3) and 0 <= colours.min() and colours.max() <= 1
    torch.testing.assert_close(colours[0], colours[1])
    torch.testing.assert_close(colours[0, 0, 0], colours[0, 2, 2])
    assert (colours[0, 0, 0] - colours[0, 0, 1]).abs().max() > 0.1


def test_positions_are_counted_only_where_they_were_dropped():
    class Placed(torch.nn.Module):
        encoder = ViT(image_size=8, patch_size=4, channels=1, width=24, depth=1, heads=2)

        def forward(self, images, targets):
            cells, dropped = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[True, True, False, True]])
            return Output(torch.zeros(()), named={"cells": cells, "predicted": torch.tensor([[0, 3, 2, 3]]), "dropped": dropped})

    class Batches:
        def epoch(self, epoch):
            return iter([(torch.zeros(1, 1, 8, 8), torch.zeros(1))] * 2)

    found = position_accuracy(Placed(), Batches(), seed=0)
    assert found[0].tolist() == [100, 0] and found[1, 0].isnan() and found[1, 1] == 100


MEASURE = """<script>addEventListener("load", () => parent.postMessage({width: innerWidth, scroll: document.scrollingElement.scrollWidth,
figures: [...document.querySelectorAll("figure svg, figure img")].map(one => [one.clientWidth, one.clientHeight]),
broken: [...document.images].filter(one => !one.naturalWidth).length}, "*"))</script>"""
# Chromium's windows have a least width, frames have not
FRAMES = "<pre></pre><script>onmessage = event => document.querySelector('pre').append(JSON.stringify(event.data) + '\\n')</script>"


def measured(page: Path, folder: Path) -> tuple[list[dict], str]:
    """The sizes of a page in Chromium at all WIDTHS, and what it wrote to the console."""
    (folder / "page.html").write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    frames = "".join(f'<iframe src="page.html" style="width:{width}px; height:800px; border:0"></iframe>' for width in WIDTHS)
    (folder / "frames.html").write_text(f'<!doctype html><link rel="icon" href="data:,">{FRAMES}{frames}')
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    command = ["chromium", *flags, f"--user-data-dir={folder / 'profile'}", (folder / "frames.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    sizes = [json.loads(line) for line in re.findall(r"^(?:.*<pre>)?(\{.*\})$", shown.stdout, re.MULTILINE)]
    return sizes, "\n".join(line for line in shown.stderr.splitlines() if "CONSOLE" in line)


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_a_page_fits_phones_and_desktops_without_errors(kind, request, tmp_path):
    page = request.getfixturevalue(kind) / "report.html"
    sizes, console = measured(page, tmp_path)
    assert console == ""
    assert sorted(one["width"] for one in sizes) == sorted(WIDTHS)
    for one in sizes:
        assert one["scroll"] <= one["width"] and one["broken"] == 0
        assert len(one["figures"]) == Page(page).tags.count("figure") > 5
        assert all(width > 100 and height > 50 for width, height in one["figures"])


@needs_chromium
@pytest.mark.slow
def test_the_check_in_chromium_sees_a_wide_page_an_error_and_a_broken_picture(comparison, tmp_path):
    faults = '<div style="width: 900px">wide</div><img src="data:image/png;base64,AAAA"><script>console.error("a fault")</script>'
    (tmp_path / "faulty.html").write_text((comparison / "report.html").read_text().replace("</body>", f"{faults}</body>"))
    sizes, console = measured(tmp_path / "faulty.html", tmp_path)
    assert "a fault" in console
    assert {one["width"]: one["scroll"] > one["width"] for one in sizes} == {360: True, 1280: False}
    assert all(one["broken"] == 1 for one in sizes)
