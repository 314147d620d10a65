"""A run that would mix two clones is refused in one sentence."""

import logging
from pathlib import Path

import pytest

import lotion_fx
from tests.conftest import FOLDERS, from_elsewhere


@pytest.fixture
def clones(tmp_path):
    """The folders of two clones, by package."""
    return [{name: tmp_path / clone / folder for name, folder in FOLDERS.items()} for clone in ("here", "there")]


def test_one_clone_runs(clones, tmp_path):
    assert from_elsewhere(clones[0], tmp_path / "here") == ""


def test_links_to_the_clone_s_own_folders_run(clones, tmp_path):
    """As type checking and copies lay the package out: passes/ by a link inside lotion_fx/."""
    clones[0]["lotion_fx.passes"].mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(clones[0]["lotion_fx.passes"])
    assert from_elsewhere(clones[0] | {"lotion_fx.passes": link}, tmp_path / "here") == ""


@pytest.mark.parametrize(
    "strangers", [["lotion_fx.passes", "lotion_fx.kernels"], ["lotion_fx"], list(FOLDERS)], ids=str
)
def test_folders_of_another_clone_are_named_with_the_way_out(clones, tmp_path, strangers):
    found = clones[0] | {name: clones[1][name] for name in strangers}
    where = ", ".join(f"{name} from {clones[1][name]}" for name in strangers)
    here = tmp_path / "here"
    assert from_elsewhere(found, here) == f"the tests of {here} would run {where}; run `pip install -e .` in {here}"


def test_a_package_that_is_nowhere_is_named(clones):
    assert "lotion_fx.examples from nowhere;" in from_elsewhere(
        clones[0] | {"lotion_fx.examples": None}, clones[0]["lotion_fx"].parent
    )


def test_this_run_is_of_one_clone(request):
    from lotion_fx import passes

    assert Path(passes.__path__[0]).resolve() == Path(__file__).parents[1] / "passes"


def test_a_format_is_registered_for_the_test_alone():
    from lotion_fx.numerics.formats import codebook, register_format

    register_format("of_one_test", codebook([-1, 0, 1]))


def test_the_format_of_the_test_before_is_gone():
    assert "of_one_test" not in lotion_fx.formats()


@pytest.mark.parametrize("time", ["first", "second"])
def test_what_a_test_silences_is_loud_again(time):
    """Whichever of the two runs first, the other sees nothing of it."""
    logger = logging.getLogger("lotion_fx")
    assert logger.level == logging.NOTSET
    logger.setLevel(logging.CRITICAL)
