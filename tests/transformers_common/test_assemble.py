"""The files of a release win over those of another commit, which win over our stand-in."""

from assemble import FOLDERS, STAND_IN, assemble


def write(folder, **texts):
    for name, text in texts.items():
        file = folder / "tests" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_assemble(tmp_path):
    sdist, repository, output = tmp_path / "sdist", tmp_path / "repository", tmp_path / "output"
    write(sdist, test_modeling_common="released")
    write(repository, test_modeling_common="other", causal_lm_tester="other")
    for folder in FOLDERS:
        (repository / folder).mkdir()

    borrowed = assemble(sdist, repository, output)
    assert borrowed == [*FOLDERS, "tests/causal_lm_tester.py", "tests/distributed_testing_utils.py"]
    assert (output / "tests" / "test_modeling_common.py").read_text() == "released"
    assert (output / "tests" / "causal_lm_tester.py").read_text() == "other"
    assert (output / "tests" / STAND_IN.name).read_text() == STAND_IN.read_text()
    assert all((output / folder).is_dir() for folder in FOLDERS)

    write(repository, distributed_testing_utils="theirs")
    assemble(sdist, repository, tmp_path / "again")
    assert (tmp_path / "again" / "tests" / STAND_IN.name).read_text() == "theirs"
