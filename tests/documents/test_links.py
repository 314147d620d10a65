"""What the README and the docs point at is there: files, headings, public names."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

import lotion_fx
from tests.documents.markdown import PAGES, ROOT, anchors, code, links, name_of

FOLDERS = (ROOT, ROOT / "lotion_fx", ROOT / "docs")  # where a path in backticks may begin
_PATH = re.compile(r"[\w./*<>-]+/[\w.*<>-]+\.(?:py|md|jsonl?|cpp)\b")
_NAME = re.compile(r"lotion_fx\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
_PLANNED = re.compile(r"<\w+>")  # a file that the reader is to write
MADE = {"lotion_fx.json"}  # by our code, where it is asked for


def missing_links(page: Path, text: str) -> list[str]:
    """The relative targets of a page's links that lead nowhere."""
    return [
        target for target in links(text) if not re.match(r"\w+:", target) and not _leads(page, text, unquote(target))
    ]


def _leads(page: Path, text: str, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve()
    if name and not (file.exists() and file.is_relative_to(ROOT)):
        return False
    return not anchor or anchor in anchors(file.read_text() if name else text)


def missing_paths(text: str) -> list[str]:
    """The paths in backticks that no file has."""
    told = {path for each in code(text) for path in _PATH.findall(each) if not _PLANNED.search(path)}
    return sorted(path for path in told if not any(any(folder.glob(path)) for folder in FOLDERS))


def missing_names(text: str) -> list[str]:
    """The names under ``lotion_fx.`` in backticks that are no attribute, module or file."""
    found = []
    for name in sorted({name for each in code(text) for name in _NAME.findall(each)}):
        at = lotion_fx
        for part in name.split("."):
            at = getattr(at, part, None)
        if at is None and not _is_module(name) and f"lotion_fx.{name}" not in MADE:
            found.append(name)
    return found


def _is_module(name: str) -> bool:
    """Of this name, or a name in the module before its last dot."""
    from importlib import import_module

    for module, attribute in ((name, None), name.rpartition(".")[::2]):
        try:
            found = import_module(f"lotion_fx.{module}" if module else "lotion_fx")
        except ImportError:
            continue
        if attribute is None or hasattr(found, attribute):
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert not missing_links(page, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_are_files(page: Path) -> None:
    assert not missing_paths(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_are_there(page: Path) -> None:
    assert not missing_names(page.read_text())


def test_what_is_missing_is_seen() -> None:
    page = ROOT / "docs" / "page.md"
    text = "# A `b`: c_d\n[x](noise.md) [x](noise.md#what-a-law-is) [x](#a-b-c_d) [x](https://example.org/no)"
    assert not missing_links(page, text)
    wrong = ["no.md", "noise.md#no-such", "#no", "../../../etc/passwd"]
    assert missing_links(page, " ".join(f"[x]({target})" for target in wrong)) == wrong
    assert missing_paths("`passes/lower.py` `passes/lower/lower.py` `kernels/*.json` `passes/<name>.py`") == [
        "passes/lower.py"
    ]
    assert missing_names("`lotion_fx.transform(m)`, `lotion_fx.numerics.formats`, `lotion_fx.optim.AdamW`") == []
    assert missing_names("`lotion_fx.tranform(m)`, `lotion_fx.numerics.format`") == ["numerics.format", "tranform"]
