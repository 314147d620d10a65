"""What a release needs to be true of its own files: one version, and every folder in the list of packages."""

import re
import sys
from pathlib import Path

import pytest

import lotion_fx
from tests.conftest import FOLDERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest has it there

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_the_version_is_one() -> None:
    changes = re.findall(r"^## \[(\d.*?)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    told = tuple(re.search(rf"^{key}: (.*)$", citation, re.MULTILINE)[1] for key in ("version", "date-released"))
    assert told == changes[0]
    assert PYPROJECT["project"]["version"] == lotion_fx.__version__ == changes[0][0]


def folder_of(package: str) -> Path:
    """Where a package lies, by the longest entry of ``package-dir``."""
    top = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT / FOLDERS[top] / Path(*package.removeprefix(top).strip(".").split("."))


def test_package_dir_is_what_the_tests_import() -> None:
    assert SETUPTOOLS["package-dir"] == FOLDERS


def test_every_folder_with_python_files_is_a_package_of_the_wheel() -> None:
    held = {folder_of(package) for package in SETUPTOOLS["packages"]}
    there = {path.parent for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")}
    assert held == there


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_every_other_file_is_data_of_the_wheel(folder: str) -> None:
    data = {path for package, globs in SETUPTOOLS["package-data"].items() for each in globs
            for path in folder_of(package).glob(each)}  # fmt: skip
    others = {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others <= data
