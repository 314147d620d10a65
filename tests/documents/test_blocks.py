"""Every block of Python in the README and the docs runs, in the order of its page, as a reader would paste it."""

from __future__ import annotations

import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lotion_fx
from tests.documents import setups
from tests.documents.markdown import PAGES, Block, blocks, name_of

LANGUAGES = {"python", "bash", "text"}  # the last one for pictures, which nothing runs
NOT_RUN: dict[str, int] = {}  # how many blocks of a page need what is not here; each says what, in the line above


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language == "python"]


WITH_PYTHON = [page for page in PAGES if python_of(page)]


def run(found: list[Block], page: str) -> None:
    """Runs blocks in one namespace, which has what every page takes as imported. Tracebacks name the page's lines."""
    names = {"lotion_fx": lotion_fx, "torch": torch, "nn": nn, "F": F}
    for block in found:
        for setup in block.setup:
            names |= getattr(setups, setup)()
        if block.not_run is None:
            exec(compile("\n" * block.line + block.text, page, "exec"), names)


@pytest.fixture(autouse=True)
def graph_alone(monkeypatch, tmp_path):
    """No C++ is compiled, and nothing is written but under ``tmp_path``."""
    monkeypatch.setattr(lotion_fx, "transform", partial(lotion_fx.transform, inner="aot_eager"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_blocks_of_a_page_run(page: Path) -> None:
    run(python_of(page), str(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_left_out_in_silence(page: Path) -> None:
    """A fence with another language, or none, would be run by nobody."""
    text = page.read_text()
    assert {block.language for block in blocks(text)} <= LANGUAGES
    assert text.count("\n```") == 2 * len(blocks(text))
    assert sum(block.not_run is not None for block in blocks(text)) == NOT_RUN.get(name_of(page), 0)


def test_a_wrong_block_is_seen_with_its_line() -> None:
    text = "# Page\n\n<!-- setup: perceptron -->\n```python\nmodel\n```\n\n```python\nmodel.no_such_thing\n```\n"
    with pytest.raises(AttributeError, match="no_such_thing") as caught:
        run(blocks(text), "page.md")
    *_, block, _ = traceback.extract_tb(caught.tb)
    assert (block.filename, block.lineno) == ("page.md", 9)


def test_a_comment_that_belongs_to_no_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="in the line above the fence"):
        blocks("<!-- setup: llama -->\n\n```python\nx = 1\n```\n")
