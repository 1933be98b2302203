"""Configuration, saving and loading: every Auto class, with the package and without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_batch, random_orders, randomized_model, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from eso_lm import EsoConfig, EsoForMaskedDiffusion, EsoGenerationConfig, EsoModel

AUTO_CLASSES = [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM]


@pytest.fixture
def folder(tmp_path):
    model = randomized_model()
    model.generation_config.alpha_0 = 0.25
    model.generation_config.num_diffusion_steps = 4
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("auto_class", [*AUTO_CLASSES, EsoForMaskedDiffusion])
def test_round_trip_is_bit_exact(folder, auto_class):
    original, loaded = randomized_model(), auto_class.from_pretrained(folder)
    assert type(loaded) is EsoForMaskedDiffusion
    assert not loaded.training
    for (name, expected), (_, parameter) in zip(
        original.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    ids, order = random_batch(original, 2, 8), random_orders(2, 8)
    # The weights are equal bit for bit; products may round differently where the memory is aligned differently.
    torch.testing.assert_close(loaded(ids, position_ids=order).logits, original(ids, position_ids=order).logits)


def test_generation_config_keeps_its_own_fields(folder):
    config = AutoModel.from_pretrained(folder).generation_config
    assert isinstance(config, EsoGenerationConfig)
    assert (config.alpha_0, config.num_diffusion_steps, config.do_sample) == (0.25, 4, True)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_0": 7}))
    with pytest.raises(ValueError, match="`alpha_0` must be"):
        AutoModel.from_pretrained(folder)
    path.unlink()
    assert isinstance(AutoModel.from_pretrained(folder).generation_config, EsoGenerationConfig)


def test_folder_holds_safetensors_code_and_every_auto_class(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "modeling_eso.py", "configuration_eso.py", "generation.py"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}


@pytest.mark.parametrize("kind", ["eso", "llama"])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_folders_saved_by_an_earlier_version_load_and_are_as_they_were(kind, auto_class):
    folder = Path(__file__).parent / "saved_folders" / kind
    model, expected = auto_class.from_pretrained(folder), load_file(folder / "expected.safetensors")
    assert type(model) is EsoForMaskedDiffusion
    assert model.generation_config.temperature == pytest.approx(0.9)
    assert model.generation_config.num_diffusion_steps == (4 if kind == "llama" else None)
    torch.testing.assert_close(model(expected["holes"]).logits, expected["logits"], rtol=0, atol=1e-4)
    scores = model.log_likelihood(expected["text"], orders=expected["orders"])
    torch.testing.assert_close(scores.log_likelihood_per_order, expected["log_likelihoods"], rtol=0, atol=1e-4)
    text = model.generate(expected["holes"], max_new_tokens=4, do_sample=False, alpha_0=0.0)
    assert torch.equal(text, expected["greedy_text"])


@pytest.mark.slow
def test_folder_loads_and_generates_without_the_package(folder, tmp_path):
    """In a process where `import eso_lm` fails, and whose weights and samples must be the same; saved again, too."""
    script = f"""
import sys
sys.modules["eso_lm"] = None  # importing it raises ImportError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
assert AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True).alpha_0 == 0.5
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    model = auto_class.from_pretrained({str(folder)!r}, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    torch.manual_seed(0)
    print(model.generate(max_new_tokens=8, num_diffusion_steps=3)[0].tolist())
model.save_pretrained({str(tmp_path / "again")!r})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    expected = AutoModel.from_pretrained(folder).generate(max_new_tokens=8, num_diffusion_steps=3)[0].tolist()
    assert result.stdout.splitlines() == [str(expected)] * 3
    again = EsoForMaskedDiffusion.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, randomized_model().lm_head.weight)
    assert (tmp_path / "again" / "modeling_eso.py").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(tmp_path, dtype):
    randomized_model(dtype=dtype).save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == dtype


def test_tied_weights_round_trip(tmp_path):
    model = randomized_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_vocabulary_can_grow():
    model = randomized_model()
    ids = random_batch(model, 1, 6)
    before = model(ids).logits
    model.resize_token_embeddings(30)
    logits = model(ids).logits
    assert logits.shape[-1] == 30
    torch.testing.assert_close(logits[..., :24], before)


def test_config_round_trip(tmp_path):
    config = tiny_config(eos_token_id=[1, 2], rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, EsoConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_config_defaults_are_the_small_model():
    config = EsoConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.vocab_size, config.mask_token_id, config.intermediate_size) == (50258, 50257, 3072)
    assert config.rope_parameters["rope_theta"] == 10000.0
    with torch.device("meta"):
        model = EsoForMaskedDiffusion(config)
    width, vocabulary, conditioning = 768, 50258, 128
    time = (256 + 1) * conditioning + (conditioning + 1) * conditioning
    mlp = (width + 1) * 4 * width + (4 * width + 1) * width
    layer = 4 * width**2 + mlp + 2 * width + (conditioning + 1) * 6 * width  # attention, MLP, norms, modulation
    final = width + (conditioning + 1) * 2 * width + (width + 1) * vocabulary  # norm, modulation, head
    assert vocabulary * width + time + 12 * layer + final == 169_627_218
    assert model.num_parameters() == 169_627_218


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, "`hidden_size` must be a multiple of 2 x `num_attention_heads`"),
        ({"hidden_size": 12}, "even width"),
        ({"alpha_0": -0.1}, r"`alpha_0` must be a number in \[0, 1\], got -0.1"),
        ({"alpha_0": "half"}, "`alpha_0` must be a number"),
        ({"alpha_0": True}, "`alpha_0` must be a number"),
        ({"mask_token_id": 24}, r"`mask_token_id` must be an id of the vocabulary, in \[0, 23\], got 24"),
        ({"mask_token_id": -1}, "`mask_token_id`"),
        ({"vocab_size": 0}, "`vocab_size` must be a positive integer, got 0"),
        ({"vocab_size": 24.5}, "`vocab_size` must be a positive integer"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers`"),
        ({"num_attention_heads": 0}, "`num_attention_heads`"),
        ({"intermediate_size": -4}, "`intermediate_size`"),
        ({"cond_dim": 0}, "`cond_dim`"),
        ({"max_position_embeddings": None}, "`max_position_embeddings`"),
        ({"hidden_dropout": 1.5}, "`hidden_dropout`"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps`"),
        ({"eos_token_id": 99}, "`eos_token_id` must be None or an id"),
        ({"eos_token_id": [1, 99]}, "`eos_token_id`"),
        ({"pad_token_id": 23}, "`pad_token_id` and `mask_token_id` are both 23"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings`"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "do not change"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "must have the key 'factor'"),
        ({"head_dim": 16}, "`head_dim` is always"),
    ],
)
def test_config_refuses_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


def test_settings_are_checked_again_where_they_are_used(folder):
    with pytest.raises(ValueError, match="`alpha_0` must be"):
        AutoModel.from_pretrained(folder, alpha_0=9.0)
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="`new_num_tokens=23` would cut off the mask, whose id is 23"):
        model.resize_token_embeddings(23)
    assert model.resize_token_embeddings(30).num_embeddings == 30
    assert model.generate(max_new_tokens=3).shape == (1, 3)


def test_backbone_folder_holds_its_own_code(folder, tmp_path):
    EsoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")
    auto_map = json.loads((tmp_path / "backbone" / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoConfig": "configuration_eso.EsoConfig", "AutoModel": "modeling_eso.EsoModel"}
    assert (tmp_path / "backbone" / "modeling_eso.py").exists()


def test_an_invalid_config_is_not_saved(tmp_path):
    config = tiny_config()
    config.alpha_0 = 2.0
    with pytest.raises(ValueError, match="`alpha_0`"):
        config.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder" / "config.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha_0": 2}, "`alpha_0`"),
        ({"alpha_0": "1"}, "`alpha_0`"),
        ({"num_diffusion_steps": 1.5}, "`num_diffusion_steps`"),
    ],
)
def test_generation_config_refuses_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        EsoGenerationConfig(**fields)
