"""examples/train_draft_head.py: the head is trained and nothing else, killed runs go on, adapters are merged."""

import shutil

import pytest
import torch
import train_draft_head
from recipe_runs import options
from tiny_models import save_with_tokenizer
from transformers import AutoModelForMaskedLM

LINES = [f"the {animal} sat on the {place} and the {animal} ran. " * 6 for animal in ("cat", "dog") for place in "ab"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    save_with_tokenizer(folder, LINES * 5, scale=0.15)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(LINES[number % 4])

    def run(output: str, **changes):
        settings = {
            "model": trained,
            "dataset": texts,
            "output_dir": tmp_path / output,
            "held_out_documents": 2,
            "length": 16,
            "draft_rank": 4,
            "draft_length": 4,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "save_steps": 4,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        train_draft_head.main(*train_draft_head.parse_args(options(settings | changes)))
        return AutoModelForMaskedLM.from_pretrained(tmp_path / output)

    return run


@pytest.mark.slow
def test_only_the_head_is_trained_and_a_killed_run_goes_on(trained, run, tmp_path, capsys):
    through = run("through")
    before = AutoModelForMaskedLM.from_pretrained(trained).state_dict()
    after = through.state_dict()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    assert after["draft_head.vocab_proj.weight"].abs().max() > 0
    assert "nats per token before training" in capsys.readouterr().out

    # As if it had been killed behind its first checkpoint.
    shutil.rmtree(tmp_path / "through" / "checkpoint-8")
    (tmp_path / "through" / "model.safetensors").unlink()
    gone_on = run("through").state_dict()
    for name, weight in after.items():
        assert torch.equal(gone_on[name], weight), name

    # A head that is there is trained further, at its own width.
    assert run("further", model=tmp_path / "through", draft_rank=None, max_steps=2).config.draft_rank == 4


@pytest.mark.slow
def test_adapters_are_merged(trained, run, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        AutoModelForMaskedLM.from_pretrained(trained),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_bytes((trained / name).read_bytes())
    model = run("merged", model=tmp_path / "adapter", max_steps=2)
    merged = adapted.merge_and_unload()
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
    assert model.draft_head is not None
