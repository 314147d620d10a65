"""Evidence on disk: found again by the same kernel alone, and never in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import triton

from lotion_fx.kernels.audit import aot
from lotion_fx.kernels.audit.kept import Kept, default_folder
from lotion_fx.kernels.audit.weight_works import smooth
from lotion_fx.kernels.config import Config
from tests.harness.samples import doubled

SMALL = Config({"SIZE": 64}, 1, 1)


@pytest.fixture
def forgetful(monkeypatch):
    """As in a process that has compiled nothing yet."""
    monkeypatch.setattr(aot, "_known", {})


def test_what_was_found_is_found_again(tmp_path, forgetful, monkeypatch):
    kept, kernel = Kept(tmp_path / "new"), (doubled(), SMALL, 80)
    aot.compile_all([kernel], kept)
    found = aot.audit(*kernel)
    monkeypatch.setattr(aot, "_known", {})
    monkeypatch.setattr(aot, "_compiled", None)
    aot.compile_all([kernel], kept)
    assert aot.audit(*kernel) == found
    assert not list(tmp_path.rglob("*.part"))


def test_a_refusal_is_kept_too(tmp_path, forgetful, monkeypatch):
    kernel = replace(doubled(), signature={"x": "*fp8e4nv", "y": "*fp8e4nv", "n": "i32"}), SMALL, 80
    aot.compile_all([kernel], Kept(tmp_path))
    monkeypatch.setattr(aot, "_known", {})
    monkeypatch.setattr(aot, "_compiled", None)
    aot.compile_all([kernel], Kept(tmp_path))
    with pytest.raises(aot.Refused, match="type fp8e4nv not supported"):
        aot.audit(*kernel)


def damaged(path: Path) -> None:
    path.write_text(path.read_text()[:50])


def of_other_fields(path: Path) -> None:
    path.write_text(path.read_text().replace('"registers"', '"register"'))


def of_another_key(path: Path) -> None:
    path.write_text(path.read_text().replace(path.stem, path.stem[::-1]))


def a_list(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize("spoil", [damaged, of_other_fields, of_another_key, a_list])
def test_what_cannot_be_read_is_made_anew(tmp_path, forgetful, monkeypatch, spoil):
    kept, kernel = Kept(tmp_path), (doubled(), SMALL, 80)
    aot.compile_all([kernel], kept)
    (path,) = tmp_path.iterdir()
    before = path.read_text()
    spoil(path)
    assert path.read_text() != before
    monkeypatch.setattr(aot, "_known", {})
    aot.compile_all([kernel], kept)
    assert path.read_text() == before


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "folder")
    kept.write("key", {})
    assert kept.read("key") is None


@triton.jit
def tripled_kernel(x, y, n, SIZE: triton.language.constexpr):
    i = triton.language.program_id(0) * SIZE + triton.language.arange(0, SIZE)
    triton.language.store(y + i, triton.language.load(x + i, mask=i < n) * 3, mask=i < n)


def test_the_key_is_of_all_that_decides_the_code(monkeypatch):
    def key(work=None, config=SMALL, arch=80):
        return aot._compilation(work or doubled(), config, arch).key()

    others = [
        key(config=replace(SMALL, num_warps=2)),
        key(config=replace(SMALL, num_stages=2)),
        key(config=replace(SMALL, constants={"SIZE": 128})),
        key(arch=86),
        key(replace(doubled(), aligned=())),
        key(replace(doubled(), signature={"x": "*fp32", "y": "*fp32", "n": "i32"})),
        key(replace(doubled(), fn=tripled_kernel)),
    ]
    # Specialized kernels have one source and differ in the functions and numbers that are bound to them.
    specialized = [smooth(80, (64, 64), -1, name, "rtn", "bf16") for name in ("nvfp4", "mxfp4", "int4", "fp4")]
    others += [key(work, work.configs[0]) for work in specialized]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(doubled(2**25)), "a shape decides nothing"
    before = key()
    aot._versions.cache_clear()
    monkeypatch.setattr(triton, "__version__", "0")
    assert key() != before
    aot._versions.cache_clear()


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/lotion_fx/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "lotion_fx" / "kernels"
