"""transformers' test files, importable as its own tests import them; what they load; which of them apply."""

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from exclusions import KNOWN_DEFECTS, NOT_APPLICABLE, reason_for
from tiny_checkpoint import write_tiny_checkpoint

HERE = Path(__file__).parent


def pytest_configure(config):
    given = os.environ.get("TRANSFORMERS_TESTS", "")
    folder = Path(given)
    if folder.name != "tests" or not folder.is_dir():
        raise pytest.UsageError(
            f"TRANSFORMERS_TESTS must be the folder `tests` of transformers' repository (see {HERE.name}/README.md), "
            f"got {given!r}."
        )
    # Its files know it as `tests`, by which name pytest knows this project's; so do the processes that they start,
    # which get this path.
    sys.modules.pop("tests", None)
    sys.path.insert(0, str(folder.parent.resolve()))
    # They would import the sources beside them; the transformers to test with is the one installed.
    transformers.utils.direct_transformers_import = lambda *args, **kwargs: transformers

    checkpoints = tempfile.TemporaryDirectory()
    config.add_cleanup(checkpoints.cleanup)
    write_tiny_checkpoint(Path(checkpoints.name))
    os.environ |= {
        "DISABLE_SAFETENSORS_CONVERSION": "true",
        "RUN_SLOW": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_TINY_MODEL_PATH": checkpoints.name,
    }
    # The marks that transformers' files use, which differ between its versions.
    files = Path(transformers.__file__).parent / "testing_utils.py", *folder.glob("*.py"), *folder.glob("*/*.py")
    for mark in {mark for file in files for mark in re.findall(r"\bmark\.(\w+)", file.read_text("utf-8"))}:
        config.addinivalue_line("markers", f"{mark}: of transformers")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE not in item.path.parents or item.cls is None:
            continue
        reason = reason_for(NOT_APPLICABLE, item.cls.__name__, item.name)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"does not apply: {reason}"))
        reason = reason_for(KNOWN_DEFECTS, item.cls.__name__, item.name)
        if reason is not None:
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
