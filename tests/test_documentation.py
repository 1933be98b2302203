"""Front page and documentation: every Python snippet runs, as a user would type it, and every link leads somewhere."""

import re
import runpy
import sys
import tomllib
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from serving_helpers import served

import eso_lm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# What `make docs` copies: pages and pictures elsewhere would be missing on the site.
PUBLISHED = ("LICENSE", "README.md", "docs", "benchmarks/results", "examples/README.md", "tests/*/README.md")
WITH_SNIPPETS = [
    "README.md",
    "docs/quickstart.md",
    "docs/how-it-works.md",
    "docs/training.md",
    "docs/fine-tuning.md",
    "docs/reinforcement.md",
    "docs/adaptation.md",
    "docs/generation.md",
    "docs/lossless-decoding.md",
    "docs/app.md",
    "docs/serving.md",
    "docs/likelihood.md",
    "docs/performance.md",
    "docs/authors-code.md",
]
LINKING = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKING += [ROOT / "examples/README.md", ROOT / "benchmarks/REPRODUCTION.md", *sorted(ROOT.glob("tests/*/README.md"))]


def navigation() -> list[str]:
    """The pages, in the order of the site's navigation."""

    def pages(entry: str | list | dict) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    return pages(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])


def snippets(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def relative_links(path: Path) -> list[str]:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not target.startswith(("http://", "https://", "#"))]


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
def test_quickstart_learns_and_samples_in_six_ways(trained, home):
    before, after = map(float, re.search(r"NELBO: ([\d.]+) .* training, ([\d.]+) after", trained).groups())
    assert after < before - 0.5
    assert len(re.findall(r"^--- alpha_0 = ", trained, flags=re.MULTILINE)) == 6
    assert (home / "outputs" / "quickstart" / "held_out.jsonl").read_text().count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_snippets_run_in_the_order_of_their_page(page, trained, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    namespace = {}
    with ExitStack() as stack:
        url = ""
        if page == "docs/serving.md":
            url, _ = stack.enter_context(served("outputs/quickstart", "-m", "eso_lm.serve"))
        for number, snippet in enumerate(snippets(page), start=1):
            snippet = snippet.replace("http://127.0.0.1:8000", url)
            exec(compile(snippet, f"{page}, snippet {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    if page == "README.md":
        assert (home / "outputs" / "mine" / "model.safetensors").exists()
    elif page == "docs/how-it-works.md":
        assert printed.split() == ["True", "2"]
    elif page == "docs/training.md":
        assert "nats per token" in printed
        assert len(namespace["trainer"].state.log_history) > 2
    elif page == "docs/fine-tuning.md":
        assert (home / "outputs" / "adapter" / "adapter_model.safetensors").exists()
    elif page == "docs/lossless-decoding.md":
        difference = namespace["again"].log_likelihood - namespace["output"].log_probs.sum(dim=-1)
        assert difference.abs().max() < 1e-3


@pytest.mark.slow
def test_the_picture_is_drawn(trained, home, monkeypatch):
    monkeypatch.chdir(home)
    run_example(monkeypatch, "plot_unmasking.py", "--output", "unmasking.png", "--length", "20")
    assert (home / "unmasking.png").stat().st_size > 5000


def test_quickstart_refuses_a_folder_without_text(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must hold \.txt files"):
        run_example(monkeypatch, "quickstart.py", "--text", str(tmp_path))


def test_no_page_is_missing_from_the_navigation_and_no_snippet_from_the_tests():
    pages = navigation()
    assert sorted(pages) == sorted(["README.md", *(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))])
    assert [page for page in pages if snippets(page)] == [page for page in pages if page in WITH_SNIPPETS]
    for page in pages:
        assert (ROOT / page).read_text(encoding="utf-8").count("```python") == len(snippets(page)), page


@pytest.mark.parametrize("path", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_and_pictures_resolve(path):
    for link in relative_links(path):
        target = (path.parent / link.split("#")[0]).resolve()
        assert target.exists(), link
        if path == ROOT / "README.md" or DOCS in path.parents:
            published = [place for pattern in PUBLISHED for place in ROOT.glob(pattern)]
            assert any(place == target or place in target.parents for place in published), f"{link} is not on the site"


def test_front_page_is_read_in_two_minutes():
    assert 150 <= (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 200


def test_drawings_are_those_of_their_script():
    drawings = [draw() for draw in runpy.run_path(str(DOCS / "draw.py"))["DRAWINGS"]]
    assert sorted(path.stem for path in (DOCS / "images").glob("*.svg")) == sorted(d.name for d in drawings)
    for drawing in drawings:
        image = (DOCS / "images" / f"{drawing.name}.svg").read_text(encoding="utf-8")
        assert image == drawing.svg(), "run docs/draw.py"


def test_reference_has_every_public_name_once():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: eso_lm\.(\w+)$", text, flags=re.MULTILINE)) == sorted(eso_lm.__all__)


def test_every_script_is_documented():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    recipes = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    not_to_run = {"adapters.py", "likelihoods.py", "text_data.py", "resumable_runs.py", "plot_unmasking.py"}
    not_to_run |= {"app_view.py", "holes.py"}
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in recipes, path.name
        assert path.name in pages or path.name in not_to_run, path.name
