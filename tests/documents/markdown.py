"""What is read of the README and the pages in docs/: blocks of code, commands, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>setup|not run): (?P<told>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
_COMMENT = re.compile(r"^<!-- (?:setup|not run): .* -->$", re.M)
_FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_RUN = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python3?|pip|pytest|lotion-fx|ruff|\.ci/run) ")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        language: after the fence.
        text: between the fences.
        line: of the page where the text begins, from 0.
        setup: names in `setups`, of what the block's names stand for.
        not_run: why nothing runs it; None where it is run.
    """

    language: str
    text: str
    line: int
    setup: tuple[str, ...] = ()
    not_run: str | None = None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        ValueError: a comment for a block stands before none.
    """
    found = []
    for match in _BLOCK.finditer(text):
        kind, told = match["kind"], match["told"]
        setup = tuple(told.split(", ")) if kind == "setup" else ()
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(match["language"], match["text"], line, setup, told if kind == "not run" else None))
    if len(_COMMENT.findall(text)) != sum(bool(block.setup or block.not_run) for block in found):
        raise ValueError("a comment for a block stands before none: it belongs in the line above the fence")
    return found


def _lines(block: str) -> Iterator[str]:
    yield from block.replace("\\\n", " ").splitlines()


def commands(text: str) -> list[list[str]]:
    """Every command of a page, in words: of bash blocks, of indented blocks, and in the running text.

    Comments and ``NAME=value`` before a command are left out, and commands joined by ``&&`` are several.
    """
    lines = [line for block in blocks(text) if block.language == "bash" for line in _lines(block.text)]
    prose = _FENCED.sub("", text)
    lines += [line.strip() for line in prose.splitlines() if line.startswith("    ") and _RUN.match(line.strip())]
    inline = [" ".join(code.split()) for code in _INLINE.findall(prose)]
    lines += [code for code in inline if _RUN.match(code)]
    words = [shlex.split(part.strip(" ()"), comments=True) for line in lines for part in line.split("&&")]
    return [list(_without_assignments(each)) for each in words if each]


def _without_assignments(words: list[str]) -> Iterator[str]:
    begun = False
    for word in words:
        begun = begun or not re.match(r"[A-Z_]+=", word)
        if begun:
            yield word


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures, outside of code."""
    prose = _INLINE.sub("", _FENCED.sub("", text))
    return [link or picture for link, picture in _LINK.findall(prose)]


def code(text: str) -> list[str]:
    """What a page's running text has in backticks, line breaks taken for spaces."""
    return [" ".join(found.split()) for found in _INLINE.findall(_FENCED.sub("", text))]


def anchors(text: str) -> set[str]:
    """The names that a forge gives a page's headings: lower case, punctuation dropped, a dash for each space."""
    headings = re.findall(r"^#+ (.*?)#*$", _FENCED.sub("", text), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
