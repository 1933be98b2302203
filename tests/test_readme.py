"""Every Python snippet of the README runs, in order, as a user would type them."""

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def run_example(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a few texts of the user's own."""
    home = tmp_path_factory.mktemp("home")
    (home / "metrics").symlink_to(ROOT / "metrics")
    (home / "my_texts").mkdir()
    for index in range(40):
        text = "\n".join(f"The number {index} is followed by the number {index + step}." for step in range(1, 8))
        (home / "my_texts" / f"{index}.txt").write_text(text, encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def trained(home) -> str:
    """The quickstart, on the user's own texts, for a few steps; what it printed."""
    arguments = ["--text", "my_texts", "--max-steps", "40", "--length", "32", "--vocab-size", "320"]
    arguments += ["--hidden-size", "64", "--num-layers", "2", "--num-samples", "2"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.chdir(home)
        run_example(patch, "quickstart.py", *arguments)
    return output.getvalue()


@pytest.mark.slow
def test_quickstart_and_readme_snippets_run(trained, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before, after = map(float, re.search(r"NELBO: ([\d.]+) .* training, ([\d.]+) after", trained).groups())
    assert after < before - 0.5
    assert len(re.findall(r"^--- alpha_0 = ", trained, flags=re.MULTILINE)) == 6
    assert len(SNIPPETS) == 13
    namespace = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert (home / "outputs" / "mine" / "model.safetensors").exists()
    assert (home / "outputs" / "quickstart" / "held_out.jsonl").read_text().count("\n") == 2
    assert (home / "outputs" / "adapter" / "adapter_model.safetensors").exists()
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.slow
def test_the_picture_is_drawn(trained, home, monkeypatch):
    monkeypatch.chdir(home)
    run_example(monkeypatch, "plot_unmasking.py", "--output", "unmasking.png", "--length", "20")
    assert (home / "unmasking.png").stat().st_size > 5000


def test_quickstart_refuses_a_folder_without_text(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must hold \.txt files"):
        run_example(monkeypatch, "quickstart.py", "--text", str(tmp_path))


def test_readme_names_every_file_of_the_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        assert path.name in readme or path.name in ("__init__.py", "text_data.py"), path.name
