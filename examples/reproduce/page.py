"""`Report`: an experiment's tables, curves and circumstances as one HTML file that a browser opens from disk."""

from __future__ import annotations

import base64
import io
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch
from matplotlib.figure import Figure

import lotion_fx

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --paper: #fbfbfa; --card: #fff; --line: #dfe3e6;
  --accent: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8eb; --soft: #9aa5af; --paper: #14171a; --card: #1c2024;
  --line: #333a40; --accent: #7db4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; }
.summary { font-size: 1.1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .4rem 0 1.2rem; }
caption, figcaption { text-align: left; color: var(--soft); font-size: .875rem; max-width: 46rem; }
caption { padding-bottom: .45rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
.number { text-align: right; }
.free { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; margin-bottom: .5rem; }
pre { background: var(--card); border: 1px solid var(--line); border-left: 3px solid var(--accent); border-radius: 4px;
  padding: .7rem .9rem; overflow-x: auto; font-size: .875rem; }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="summary">$summary</p>
<pre><code>$command</code></pre>
</header>
<main>
$body
</main>
</body>
</html>
""")


@dataclass
class Report:
    """A page under construction: its parts appear in the order that they are added.

    All texts are plain and are escaped. The versions of what ran are added at the end, with configuration and seeds.

    Args:
        title: what the experiment shows.
        summary: its outcome in a few sentences.
        command: that makes this report again.
        configuration: every setting by its name.
        seeds: of the runs.
    """

    title: str
    summary: str
    command: str
    configuration: Mapping[str, object]
    seeds: Sequence[int]
    _parts: list[str] = field(default_factory=list, init=False, repr=False)

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, paragraph: str) -> None:
        """Adds a paragraph."""
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """Adds a table; a float is written with four digits, and columns that hold numbers stand to the right.

        Raises:
            ValueError: a row is not as long as ``headers``.
        """
        for i, row in enumerate(rows):
            if len(row) != len(headers):
                raise ValueError(f"rows[{i}] has {len(row)} cells; expected {len(headers)}, one for each header")
        numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
        lines = [_line("th", headers, numeric), *(_line("td", [_shown(cell) for cell in row], numeric) for row in rows)]
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        body = "\n".join(lines[1:])
        self._parts.append(
            f'<div class="wide"><table>{title}\n<thead>{lines[0]}</thead>\n<tbody>{body}</tbody></table></div>'
        )

    def figure(self, figure: Figure, caption: str) -> None:
        """Adds a figure as it is now, with the caption below it."""
        drawn = io.BytesIO()
        # An image of its own rather than inline SVG: two SVGs in one page share the ids of their clips.
        figure.savefig(drawn, format="svg", facecolor="white")
        data = base64.b64encode(drawn.getvalue()).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Writes the page, and makes its folder."""
        closing = Report("", "", "", {}, ())
        closing.heading("How it was made")
        closing.table(["setting", "value"], list(self.configuration.items()), "Configuration")
        closing.table(["", "version"], list(versions().items()), "Versions")
        closing.text(f"Seeds: {', '.join(map(str, self.seeds))}." if self.seeds else "No seeds.")
        path.parent.mkdir(parents=True, exist_ok=True)
        page = _PAGE.substitute(
            title=escape(self.title),
            summary=escape(self.summary),
            command=escape(self.command),
            body="\n".join([*self._parts, *closing._parts]),
        )
        path.write_text(page, encoding="utf-8")


def versions() -> dict[str, str]:
    """What ran: python, torch, lotion_fx, the machine, and the commit where the package lies in a git checkout."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lotion_fx": lotion_fx.__version__,
        "platform": platform.platform(),
    }
    if (commit := _commit()) is not None:
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside one, or without git."""
    here = Path(lotion_fx.__file__).resolve().parent
    try:
        said = [
            subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (["ls-files", "__init__.py"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    tracked, commit, changed = said
    if not tracked:  # installed into somebody else's checkout
        return None
    return f"{commit} with uncommitted changes" if changed else commit


def _is_number(cell: object) -> bool:
    """Whether a cell is a number, or a text that begins as one: ``1.2 ± 0.1``."""
    if isinstance(cell, str):
        first = cell.split(" ")[0].rstrip("%")
        try:
            float(first)
        except ValueError:
            return first in ("", "-")
    return isinstance(cell, (int, float, str))


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _line(tag: str, cells: Sequence[Any], numeric: Sequence[bool]) -> str:
    written = []
    for cell, number in zip(cells, numeric, strict=True):
        text = str(cell)
        kind = "number" if number else "free" if len(text) > 60 else ""
        written.append(f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</{tag}>")
    return f"<tr>{''.join(written)}</tr>"
