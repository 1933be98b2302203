"""Lets `eso_lm`, and the examples, be imported from this checkout where the package is not installed.

Importing this module is all; its name comes before the others.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

for folder in (ROOT / "examples", ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

if importlib.util.find_spec("eso_lm") is None:
    # Whatever the checkout is called, it is the package.
    spec = importlib.util.spec_from_file_location(
        "eso_lm", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["eso_lm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["eso_lm"])
