"""The report of an experiment: one file that needs nothing else, whose texts are texts."""

import re
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.figure import Figure

from lotion_fx.examples.reproduce.page import Report, versions


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.texts, self.images = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def written(path, title="A < B & C", cell="<script>alert(1)</script>") -> tuple[str, Reader]:
    report = Report(title, "What it shows.", "python x.py --to 'a & b'", {"rate": 0.1, "fmt": "<int4>"}, (3, 4))
    report.heading("Losses & more")
    report.text("a < b")
    report.table(["method", "loss"], [["ptq", 1.23456], [cell, "1.2 ± 0.1"]], "of <all>")
    figure = Figure()
    figure.subplots().plot([1, 2])
    report.figure(figure, 'a "curve"')
    report.write(path / "new" / "report.html")
    text = (path / "new" / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    return text, reader


def test_it_needs_nothing_but_itself(tmp_path) -> None:
    text, reader = written(tmp_path)
    assert not re.findall(r"https?://", text)
    assert not re.findall(r"<(?:script|link|iframe)|@import|url\(", text)
    assert [image["src"].startswith("data:image/svg+xml;base64,") for image in reader.images] == [True]


def test_texts_are_escaped_and_tags_closed(tmp_path) -> None:
    _, reader = written(tmp_path)
    assert reader.open == []
    for said in ("A < B & C", "Losses & more", "a < b", "<script>alert(1)</script>", "of <all>", "<int4>"):
        assert said in reader.texts, said
    assert reader.images[0]["alt"] == 'a "curve"'


def test_it_says_how_it_was_made(tmp_path) -> None:
    _, reader = written(tmp_path)
    for said in ("python x.py --to 'a & b'", "Seeds: 3, 4.", torch.__version__, *versions().values(), "1.235"):
        assert said in reader.texts, said


def test_numbers_stand_to_the_right(tmp_path) -> None:
    text, _ = written(tmp_path)
    assert '<td class="number">1.235</td>' in text and "<td>ptq</td>" in text


def test_a_short_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells; expected 2, one for each header"):
        Report("t", "s", "c", {}, ()).table(["a", "b"], [[1, 2], [3]])
