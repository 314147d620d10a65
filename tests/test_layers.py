"""The floors of CONTRIBUTING's table, read off the imports: none points up, and no two modules import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # bottom up; the longest name that fits holds
    {f"lotion_fx.private{name}" for name in ("", "_backward", "_packages", "_ranks", "_threads", "_tracing")}
    | {"lotion_fx.numerics"},
    {"lotion_fx.kernels"},
    {"lotion_fx.passes"},
    {"lotion_fx"},
    {"lotion_fx.examples", "lotion_fx.kernels.audit", "lotion_fx.kernels.emit"},
    {"lotion_fx.cli"},
]
LIMITS = {"file": 450, "function": 60}


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("lotion_fx", "passes", "kernels", "examples"):
        prefix = "lotion_fx" if folder == "lotion_fx" else f"lotion_fx.{folder}"
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([prefix, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


MODULES = modules()


def floor_of(name: str) -> int:
    fitting = [(len(top), i) for i, floor in enumerate(FLOORS) for top in floor if f"{name}.".startswith(f"{top}.")]
    return max(fitting)[1]


def imported(source: str, lazily: bool = True) -> set[str]:
    """The modules of ours that a source imports, those for type checkers alone left out."""
    tree = ast.parse(source)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree) if lazily else tree.body:
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in below}
    return {name for name in found if name in MODULES}


def upward(name: str, source: str) -> list[str]:
    return sorted(other for other in imported(source) if floor_of(other) > floor_of(name))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_points_up(name: str) -> None:
    assert not upward(name, MODULES[name].read_text()), f"{name} imports from a floor above its own"


def test_an_import_that_points_up_is_seen() -> None:
    source = "def f():\n    from lotion_fx.passes.attach import attach\n"
    assert upward("lotion_fx.kernels.smooth", source) == ["lotion_fx.passes.attach.attach"]
    assert not upward("lotion_fx.state", source)
    assert upward("lotion_fx.numerics.rounding", "import lotion_fx.state") == ["lotion_fx.state"]
    assert not upward("lotion_fx.passes.ops", "if TYPE_CHECKING:\n    import lotion_fx.state")


def test_no_modules_import_each_other() -> None:
    """Packages left out: importing a module imports those it lies in."""
    graph = {
        name: {other for other in imported(path.read_text(), lazily=False) if MODULES[other].name != "__init__.py"}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


def test_no_module_has_the_name_of_a_public_function() -> None:
    import lotion_fx

    functions = {name for name in lotion_fx.__all__ if callable(getattr(lotion_fx, name))}
    assert not functions & {path.stem for path in (ROOT / "lotion_fx").glob("*.py")}


def lines_of(function: ast.FunctionDef) -> int:
    """Its lines without its docstring, which for a public function may be longer than all else."""
    documented = ast.get_docstring(function) is not None
    start, end = function.body[0].lineno, function.body[0].end_lineno
    return function.end_lineno - function.lineno + 1 - (end - start + 1 if documented else 0)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rooms_are_small(name: str) -> None:
    source = MODULES[name].read_text()
    assert source.count("\n") <= LIMITS["file"]
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert not {node.name: lines_of(node) for node in functions if lines_of(node) > LIMITS["function"]}


# -------------------------------------------------------------------------------------------------- the owner of state


def assigned(tree: ast.AST) -> list[ast.Attribute]:
    """The attributes that a piece of code sets."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            found += [leaf for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Attribute)]
    return [leaf for leaf in found if isinstance(leaf.ctx, ast.Store)]


def written_elsewhere(source: str) -> list[str]:
    """What a source sets of a `Tally` or a `Gathered`."""
    owners = [(ast.unparse(leaf), ast.unparse(leaf.value).split(".")[-1]) for leaf in assigned(ast.parse(source))]
    return [text for text, owner in owners if owner in ("tally", "gathered")]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_where_a_step_stands_is_written_by_one_module(name: str) -> None:
    assert name == "lotion_fx.tally" or not written_elsewhere(MODULES[name].read_text())


def test_a_write_from_outside_is_seen() -> None:
    assert written_elsewhere("def f(weight):\n    weight.gathered.probe = None") == ["weight.gathered.probe"]
    assert written_elsewhere("a, smoothing.tally.loss_count = 1, 2") == ["smoothing.tally.loss_count"]


def set_late(source: str) -> list[str]:
    """Attributes that a class first sets outside of its constructor and its body."""
    found = []
    for each in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        methods = {node.name: node for node in each.body if isinstance(node, ast.FunctionDef)}
        declared = {node.target.id for node in each.body if isinstance(node, ast.AnnAssign)}
        declared |= {leaf.attr for leaf in assigned(methods["__init__"])} if "__init__" in methods else set()
        for name, method in methods.items():
            late = [leaf.attr for leaf in assigned(method) if ast.unparse(leaf.value) == "self"]
            found += [f"{each.name}.{attribute} in {name}" for attribute in late if attribute not in declared]
    return found


@pytest.mark.parametrize("name", sorted(name for name in MODULES if floor_of(name) == 3))
def test_no_attribute_is_first_set_outside_of_a_constructor(name: str) -> None:
    assert not set_late(MODULES[name].read_text())


def test_an_attribute_that_is_set_late_is_seen() -> None:
    source = "class A:\n    x: int = 0\n    def f(self):\n        self.x, self.y = 1, 2"
    assert set_late(source) == ["A.y in f"]
