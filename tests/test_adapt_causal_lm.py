"""examples/adapt_causal_lm.py: a causal model becomes an Eso-LM."""

import json
from pathlib import Path

import adapt_causal_lm
import pytest
from recipe_runs import options
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerState

from eso_lm import DataCollatorForHybridMaskedDiffusion


@pytest.fixture
def causal_folder(tmp_path) -> Path:
    """A tiny Llama with a tokenizer that knows no mask and no padding."""
    trained = tiny_tokenizer()
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str().replace(trained.mask_token, "<|other|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=trained.eos_token)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def adapt(model: Path, texts: Path, output: Path, **changes) -> None:
    settings = {"model": model, "dataset": texts, "text_column": "body", "output_dir": output, "length": 24}
    settings |= {"held_out_documents": 5, "held_out_rows": 4, "evaluate_every": 2, "max_steps": 4, "save_steps": 2}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    adapt_causal_lm.main(*adapt_causal_lm.parse_args(options(settings | changes)))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"anneal": 0, "alpha_0": 1.0}, {"lora_rank": 4}])
def test_a_causal_model_becomes_an_eso_lm(texts, causal_folder, tmp_path, changes):
    adapt(causal_folder, texts, tmp_path / "eso", **changes)
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "eso"), AutoTokenizer.from_pretrained(tmp_path / "eso")
    assert model.config.backbone_config.model_type == "llama"
    assert model.config.alpha_0 == changes.get("alpha_0", 0.25)
    assert model.config.mask_token_id == tokenizer.mask_token_id == len(tokenizer) - 1
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    history = json.loads((tmp_path / "eso" / "metrics.json").read_text())
    assert [row["step"] for row in history if "held_out_nelbo" in row] == [2, 4]


def test_alpha_0_grows_with_the_steps():
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=9, alpha_0=0.5)
    annealed = adapt_causal_lm.AnnealedCollator(collator, 0.5)
    rows = [{"input_ids": list(range(8))} for _ in range(8)]
    in_diffusion = []
    for step in (0, 1, 25, 50, 100):
        annealed.on_step_begin(None, TrainerState(global_step=step, max_steps=100), None)
        assert annealed.progress == min(1, step / 50)
        in_diffusion.append(int((~annealed(rows)["sequential_rows"]).sum()))
    assert in_diffusion == [0, 4, 4, 4, 4]
    assert adapt_causal_lm.AnnealedCollator(collator, 0).progress == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anneal": 1.5}, "`anneal` must be a share"),
        ({"dataloader_num_workers": 1}, "set it to 0"),
        ({"alpha_0": -1}, "`alpha_0` must be"),
        ({"length": 10**6}, "too short for rows"),
    ],
)
def test_misfits_of_adaptation_are_refused(texts, causal_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(causal_folder, texts, tmp_path / "eso", **changes)
    assert not (tmp_path / "eso" / "model.safetensors").exists()
