"""The rooms of the package are those of docs/architecture.md, and imports go the way that it says."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
MAX_LINES = 500


def rows_of_table(first_heading: str) -> list[list[str]]:
    """The cells of a table of the page."""
    table = PAGE.split(f"\n| {first_heading} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def imported_modules(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    if module == "__init__":
        # The callbacks load on first use, by name.
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        imports |= {value[1:] for value in strings if isinstance(value, str) and re.fullmatch(r"\.[a-z_]+", value)}
    return imports


FAMILY_OF = {
    room: family for family, rooms, _ in rows_of_table("family") for room in re.findall(r"`(\w+)\.py`", rooms)
}
ALLOWED = {family: set(filter(None, names.split(", "))) for family, _, names in rows_of_table("family")}


def test_the_page_lists_every_room_once():
    listed = [room for _, rooms, _ in rows_of_table("family") for room in re.findall(r"`(\w+)\.py`", rooms)]
    described = [re.fullmatch(r"`(\w+)\.py`", room)[1] for room, _ in rows_of_table("room")]
    assert sorted(listed) == sorted(described) == MODULES


def test_arrows_go_one_way_between_families():
    seen = set()
    for family, allowed in ALLOWED.items():
        assert allowed <= seen, f"{family} may only import families that stand above it in the table"
        seen.add(family)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_what_its_family_may(module):
    family = FAMILY_OF[module]
    imports = imported_modules(module)
    assert imports <= set(MODULES)
    assert {FAMILY_OF[other] for other in imports} <= ALLOWED[family] | {family}


def test_there_is_no_circle():
    graph = {module: imported_modules(module) for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises a CycleError
    assert sorted(order) == MODULES


def test_what_travels_with_a_checkpoint_needs_torch_and_transformers_only():
    reached, waiting = set(), ["modeling_eso"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imported_modules(module)
    assert not {FAMILY_OF[module] for module in reached} & {"training", "entrances"}
    others = set()
    for module in reached:
        tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        others |= {
            node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if not node.level
        }
        others |= {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
    come_with_transformers = {"torch", "transformers", "huggingface_hub", "numpy"}
    assert others <= come_with_transformers | sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_no_room_is_too_large(module):
    assert len((ROOT / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= MAX_LINES
