"""What mypy (`make lint`) cannot see to itself: that all is checked, and what it is told to overlook."""

import re
from pathlib import Path

import eso_lm
from eso_lm import modeling_interface

ROOT = Path(eso_lm.__file__).parent


def test_every_public_name_is_in_the_view_of_a_user():
    words = set(re.findall(r"\w+", (ROOT / "tests" / "typed_usage.py").read_text(encoding="utf-8")))
    assert set(eso_lm.__all__) <= words


def test_ignored_errors_are_few_named_and_explained():
    lines = [line for path in ROOT.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    ignored = [line for line in lines if "type: ignore" in line]
    assert len(ignored) < 15
    assert all(re.search(r"  # type: ignore\[[a-z-]+\]  # \w", line) for line in ignored)


def test_what_checkers_are_told_of_the_whole_model_is_nowhere_at_run_time():
    assert modeling_interface.EsoLM is modeling_interface.EsoNetwork is object
    assert all(cls.__module__ != modeling_interface.__name__ for cls in eso_lm.EsoForMaskedDiffusion.__mro__)
