"""The card of a saved model, and what would reach the Hub."""

from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import randomized_model
from transformers.utils.hub import PushToHubMixin

from eso_lm.hub import TAGS


def check_card(card: ModelCard, title: str) -> None:
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert set(TAGS) <= set(card.data.tags)
    assert f'AutoModel.from_pretrained("{title}", trust_remote_code=True)' in card.text
    assert "arxiv.org/abs/2506.01928" in card.text
    assert "@inproceedings{" in card.text
    assert "2 x 32 x 4" in card.text


def test_saved_folder_has_a_card_that_is_not_overwritten(tmp_path):
    model = randomized_model()
    model.save_pretrained(tmp_path / "my-model")
    check_card(ModelCard.load(tmp_path / "my-model" / "README.md"), "my-model")
    (tmp_path / "my-model" / "README.md").write_text("My own words.")
    model.save_pretrained(tmp_path / "my-model")
    assert (tmp_path / "my-model" / "README.md").read_text() == "My own words."


def test_push_to_hub_uploads_weights_code_and_card(monkeypatch):
    """With the network taken out: a repository that has no card yet, and an upload that is looked at instead."""
    uploaded = {}

    def no_card(*args, **kwargs):
        raise LocalEntryNotFoundError("no card")

    def look(self, working_dir, repo_id, *args, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()}, repo_id=repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: SimpleNamespace(repo_id="me/tiny-eso"))
    monkeypatch.setattr(ModelCard, "load", no_card)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", look)
    randomized_model().push_to_hub("me/tiny-eso")
    assert uploaded["repo_id"] == "me/tiny-eso"
    assert {"model.safetensors", "config.json", "generation_config.json", "modeling_eso.py"} <= uploaded.keys()
    check_card(ModelCard(uploaded["README.md"].decode()), "me/tiny-eso")
