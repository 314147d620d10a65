"""What the compile caches are keyed by."""

import types
from pathlib import Path

from lotion_fx import compiling, kernels, numerics, passes, private


def test_every_source_of_compiled_code_is_in_the_key():
    folders = [Path(package.__path__[0]) for package in (numerics, passes, kernels)]
    sources = set(compiling.source_files())
    assert {str(path) for folder in folders for path in folder.rglob("*.py")} <= sources
    assert str(Path(kernels.__path__[0]) / "tuning.json") in sources


def test_a_new_file_changes_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "passes", types.SimpleNamespace(__path__=[str(tmp_path)]))
    (tmp_path / "deep").mkdir()

    def key():
        private.get_hash_for_files.cache_clear()  # as a new process would find it
        return private.get_hash_for_files(compiling.source_files())

    keys = [key()]
    for name, text in (("one.py", "a = 1"), ("deep/two.py", "a = 1"), ("one.py", "a = 2"), ("notes.txt", "none")):
        (tmp_path / name).write_text(text)
        keys.append(key())
    assert len(set(keys[:4])) == 4 and keys[4] == keys[3]
