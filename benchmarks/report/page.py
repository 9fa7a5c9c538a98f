"""A page: sections of text, tables, figures, pictures and folded text, in one HTML file that opens without a network."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.report.figures import STYLE
from common.run import write_text


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page. Empty fields are not shown."""

    heading: str
    about: str = ""  # text below the heading
    table: pandas.DataFrame = field(default_factory=pandas.DataFrame)  # of text; the first column names the row
    figures: Mapping[str, Figure] = field(default_factory=dict)  # by the name of the SVG file, without .svg
    pictures: Mapping[str, Path] = field(default_factory=dict)  # PNG files by caption
    folded: Mapping[str, str] = field(default_factory=dict)  # long text by title

    def __bool__(self) -> bool:
        return bool(self.about or len(self.table) or self.figures or self.pictures or self.folded)


def write_page(folder: Path, title: str, about: str, sections: Sequence[Section]) -> Path:
    """Write folder/report.html with the sections that are not empty, and figures/*.svg; return the path of the page."""
    (folder / "figures").mkdir(exist_ok=True)
    templates = Environment(loader=PackageLoader("benchmarks.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters |= {"svg": lambda figure, name: write_svg(figure, folder / "figures" / f"{name}.svg"), "data_url": _data_url}
    shown = [section for section in sections if section]
    write_text(folder / "report.html", templates.get_template("page.html").render(title=title, about=about, sections=shown))
    return folder / "report.html"


def write_svg(figure: Figure, path: Path) -> Markup:
    """Write a figure to an SVG file; return the same as an element of a page."""
    drawn = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": path.stem}):  # names inside the SVG are the same in every call, and differ between figures
        figure.savefig(drawn, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    text = re.sub(r'<g id="[^"]*"', "<g", drawn.getvalue())  # matplotlib's names of groups; they would repeat in a page
    write_text(path, text)
    return Markup(text[text.index("<svg") :])


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
