"""`benchmarks/` on the path, as it is for the commands in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
