"""Checks a wheel, where it is installed: all files of the package are in it, and it transforms and trains a model.

python -I .ci/check_package.py dist/lotion_fx-*.whl
"""

import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = {"lotion_fx": "lotion_fx", "passes": "lotion_fx/passes", "kernels": "lotion_fx/kernels",
         "examples": "lotion_fx/examples"}  # fmt: skip


def expected() -> set[str]:
    """Every file of the repository that belongs to the package, by its place in a wheel."""
    return {
        (Path(inside) / path.relative_to(ROOT / tree)).as_posix()
        for tree, inside in TREES.items()
        for path in (ROOT / tree).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def main() -> None:
    held = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
    if difference := expected() ^ held:
        sys.exit(f"{sys.argv[1]}: in the repository or in the wheel alone: {', '.join(sorted(difference))}")

    import torch

    import lotion_fx

    if not Path(lotion_fx.__file__).is_relative_to(sysconfig.get_path("purelib")):
        sys.exit(f"lotion_fx was imported from {lotion_fx.__file__}, not from the wheel")
    model = lotion_fx.transform(torch.nn.Linear(32, 8), "int4", inner="aot_eager")
    model(torch.randn(4, 32)).square().mean().backward()
    print(f"{len(held)} files; {str(lotion_fx.report(model)).splitlines()[-2]}")


if __name__ == "__main__":
    main()
