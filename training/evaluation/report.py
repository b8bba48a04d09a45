"""The report of an evaluation, from its folder's results.json and arrays.npz: Markdown, plots, one HTML page, tables
of a model card. `python training/evaluation/report.py FOLDER` writes it again.
"""

import base64
import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
from markdown import Markdown  # noqa: E402

from training.evaluation.plots import plot  # noqa: E402
from training.evaluation.tables import (  # noqa: E402, F401
    NAMES,
    about,
    data_notes,
    interval,
    labels_kept,
    markdown_tables,
    table,
)
from training.evaluation.task import EvaluationError  # noqa: E402
from uscl_hub.files import write_text  # noqa: E402


def write(folder: Path):
    """report.md, report.html and figures/*.png beside results.json."""
    folder = Path(folder)
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with np.load(folder / "arrays.npz") as saved:
        arrays = dict(saved)
    figures = plot(result, arrays, folder / "figures")
    pictures = "\n\n".join(f"![{caption}](figures/{path.name})" for path, caption in figures)
    text = "\n\n".join(
        ["# Evaluation of ultrasound backbones", about(result), markdown_tables(result), data_notes(result)]
    )
    write_text(folder / "report.md", f"{text}\n\n## Plots\n\n{pictures}\n")
    write_text(folder / "report.html", page(text, figures))


def update_model_card(path: Path, result: dict, section: str = ""):
    """Replace a section's tables in a model card; see `replace_section`. Results by class are left to the report."""
    tables = markdown_tables(result, by_class=False).replace("## ", "### ")  # the section has a heading of its own
    replace_section(path, section, f"{about(result)}\n\n{tables}")


def replace_section(path: Path, section: str, body: str):
    """Replace what stands between the markers of a section of a model card; a missing card is made.

    Raises EvaluationError if the card lacks the markers.
    """
    name = f"results:{section}" if section else "results"
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# Model card\n\n{begin}\n{end}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise EvaluationError(f"{path}: needs one line {begin} and after it one line {end}, around its result tables")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    note = "*Written by the command below; changes by hand are lost.*"
    text = f"{before}{begin}\n{note}\n\n{body}\n{end}{after}"
    write_text(path, text)


# ---------------------------------------------------------------------------------------------------------- HTML

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;margin:1em 0;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:3px 9px;text-align:left;white-space:nowrap}th{background:#f4f4f4}
figure{margin:1.5em 0}img{max-width:100%}figcaption{color:#555;font-size:13px}
code{background:#f4f4f4;overflow-wrap:anywhere}"""


def page(text: str, figures: list[tuple[Path, str]]) -> str:
    """One HTML file without any outside reference: the plots are in it."""
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>\n'
        for path, caption in figures
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation of ultrasound backbones'
        f"</title><style>{STYLE}</style></head><body>\n{to_html(text)}\n<h2>Plots</h2>\n{pictures}</body></html>\n"
    )


def to_html(text: str) -> str:
    """Markdown without HTML, links and pictures: these stay text."""
    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    for name in ("html", "link", "image_link", "reference", "image_reference", "short_reference", "short_image_ref"):
        converter.inlinePatterns.deregister(name)
    for name in ("autolink", "automail"):
        converter.inlinePatterns.deregister(name)
    return converter.convert(text)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "results.json").is_file():
        sys.exit("usage: python training/evaluation/report.py FOLDER (with results.json and arrays.npz)")
    write(Path(sys.argv[1]))
