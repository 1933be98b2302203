"""Puts transformers' test files together, of a release whose repository is not at hand.

    python assemble.py --sdist transformers-5.23.0 --repository transformers --output transformers_files

The source distribution of a release has the files of the folder `tests` and none of its subfolders: those, and what
else it lacks, come from a checkout of the repository at the nearest commit. `transformers_files/tests` is then one for
TRANSFORMERS_TESTS. Of a checkout at the release itself, the folder `tests` will do as it is.
"""

import argparse
import shutil
from pathlib import Path

FOLDERS = ("tests/exporters", "tests/generation", "tests/pipelines", "tests/utils", "utils/test_module")
STAND_IN = Path(__file__).parent / "distributed_testing_utils.py"


def assemble(sdist: Path, repository: Path, output: Path) -> list[str]:
    """Copies the files to a new folder.

    Args:
        sdist: An unpacked source distribution.
        repository: A checkout of the repository.
        output: The folder to make.

    Returns:
        The files and folders that are not those of the release.
    """
    for folder in FOLDERS:
        shutil.copytree(repository / folder, output / folder)
    released = {file.name: file for file in (sdist / "tests").glob("*.py")}
    others = {STAND_IN.name: STAND_IN} | {file.name: file for file in (repository / "tests").glob("*.py")}
    for name, file in (others | released).items():
        shutil.copy(file, output / "tests" / name)
    return [*FOLDERS, *(f"tests/{name}" for name in sorted(others.keys() - released.keys()))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sdist", type=Path, required=True, help="an unpacked source distribution of transformers")
    parser.add_argument("--repository", type=Path, required=True, help="a checkout at the nearest commit")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    arguments = parser.parse_args()
    print("Not of the release:", ", ".join(assemble(**vars(arguments))))
