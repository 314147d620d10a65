"""Files and folders that are there whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lotion_fx.deploy import writing
from lotion_fx.deploy.writing import MARK, replaced


def write(path, text, is_folder=True):
    with replaced(path, is_folder=is_folder) as place:
        (place / MARK if is_folder else place).write_text(json.dumps({"files": ["more"], "text": text}))


def read(path):
    return json.loads((path / MARK if path.is_dir() else path).read_text())["text"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_the_new_one_takes_the_place_of_the_old(tmp_path, monkeypatch, is_folder, exchange):
    if not exchange:
        monkeypatch.setattr(writing, "_exchanged", lambda place, target: False)
    target = tmp_path / "deep" / "a*[model"
    write(target, "old", is_folder)
    if is_folder:
        (target / "more").write_text("of the old one")
    write(target, "new", is_folder)
    assert read(target) == "new" and os.listdir(target.parent) == [target.name]
    assert not is_folder or os.listdir(target) == [MARK]


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_what_fails_leaves_the_old_one(tmp_path, is_folder):
    target = tmp_path / "model"
    write(target, "old", is_folder)
    with pytest.raises(RuntimeError, match="half way"), replaced(target, is_folder=is_folder) as place:
        (place / MARK if is_folder else place).write_text("half")
        raise RuntimeError("half way")
    assert read(target) == "old" and os.listdir(tmp_path) == ["model"]


def test_a_failed_move_puts_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    monkeypatch.setattr(writing, "_exchanged", lambda place, target: False)
    rename, calls = os.rename, []

    def second_fails(old, new):
        calls.append((old, new))
        if len(calls) == 2:
            raise OSError("no space")
        rename(old, new)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "model", "new")
    assert read(tmp_path / "model") == "old" and os.listdir(tmp_path) == ["model"]


def test_what_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files than an export.*give a new or an empty folder"):
        write(tmp_path / "thesis", "new")
    with pytest.raises(ValueError, match="there is a folder of this name; expected a new file"):
        write(tmp_path / "thesis", "new", is_folder=False)
    with pytest.raises(ValueError, match="there is a file of this name; expected a new folder"):
        write(tmp_path / "thesis" / "chapter1.tex", "new")
    with pytest.raises(ValueError, match="no plain file"):
        write("/dev/null", "new", is_folder=False)
    write(tmp_path / "model", "old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other files than an export, such as 'notes.txt'"):
        write(tmp_path / "model", "new")
    shutil.rmtree(tmp_path / "model")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis"]


def test_an_empty_folder_and_a_link_to_a_folder_are_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real") == "new"


WRITER = """
import runpy, sys
from pathlib import Path
writing = runpy.run_path(sys.argv[2])  # by itself, for the package takes seconds to import
MARK, replaced, target = writing["MARK"], writing["replaced"], Path(sys.argv[1])
for turn in range(1, 1_000_000):
    with replaced(target, is_folder=True) as place:
        for name in ("a", "b", MARK):
            (place / name).write_text('{"files": ["a", "b"], "turn": "' + str(turn) * 1000 + '"}')
    print(turn, flush=True)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_one_whole_export(tmp_path, kills):
    target = tmp_path / "model"
    for kill in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, target, writing.__file__], stdout=subprocess.PIPE
        ) as writer:
            writer.stdout.readline()  # one is there
            time.sleep(0.003 * (kill * 7 % 11))
            writer.send_signal(signal.SIGKILL)
        texts = {(target / name).read_text() for name in ("a", "b", MARK)}
        assert len(texts) == 1 and sorted(os.listdir(target)) == sorted(["a", "b", MARK])
    write(target, "last")
    assert os.listdir(tmp_path) == ["model"], "what killed writers left is removed"


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    with replaced(tmp_path / "model", is_folder=True) as place:
        (place / MARK).write_text('{"files": [], "text": "slow"}')
        write(tmp_path / "model", "fast")
        assert "slow" in Path(place, MARK).read_text()
    assert read(tmp_path / "model") == "slow"


@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_where_nothing_can_be_written_the_path_is_named(tmp_path, is_folder):
    (tmp_path / "file").write_text("no folder")
    target = tmp_path / "file" / "model"
    with pytest.raises(OSError, match=r"path='.*model': nothing can be written there .*writable folder"):
        write(target, "new", is_folder)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "no folder"


def test_the_folder_that_one_is_in_stays(tmp_path, monkeypatch):
    """It was replaced, and the program ran on in one that was deleted."""
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for path in (".", "..", tmp_path / "here"):
        with pytest.raises(ValueError, match="the folder that this program runs in would be replaced"):
            write(Path(path), "new")
    assert Path.cwd().is_dir()
