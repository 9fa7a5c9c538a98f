"""A page from a template: one HTML file that opens without a network. Its figures also become SVG files."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.report.figures import STYLE
from common.run import write_text


def write_page(template: str, folder: Path, **content: Any) -> Path:
    """Write folder/report.html from a template, and the figures in it to folder/figures; return the path of the page."""
    templates = Environment(loader=PackageLoader("benchmarks.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters["svg"] = lambda figure, name: write_svg(figure, folder / "figures" / f"{name}.svg")
    templates.filters["png"] = lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    templates.filters["json"] = lambda value: json.dumps(value, indent=1)
    write_text(folder / "report.html", templates.get_template(template).render(content))
    return folder / "report.html"


def write_svg(figure: Figure, path: Path) -> Markup:
    """Write a figure to an SVG file, in a folder that is made if needed; return the same as an element of a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": path.stem}):  # names inside the SVG are the same in every call, and differ between figures
        figure.savefig(drawn, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    text = re.sub(r'<g id="[^"]*"', "<g", drawn.getvalue())  # matplotlib's names of groups; they would repeat in a page
    write_text(path, text)
    return Markup(text[text.index("<svg") :])
