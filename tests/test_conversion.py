"""The authors' two layouts: conversion both ways, on checkpoints of their shape that the tests make."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from convert_original_checkpoint import convert, convert_back, to_original_config, to_original_weights
from safetensors.torch import load_file, save_file
from tiny_models import random_batch, randomized_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

SETTINGS = {
    "algo": {
        "alpha_0": 0.5,
        "time_conditioning": False,
        "diffusion_attn_mode": "causal",
        "sequential_attn_mode": "causal",
    },
    "model": {"n_heads": 4, "dropout": 0.1, "length": 32, "tie_word_embeddings": False},
}


@pytest.fixture
def model():
    return randomized_model()


@pytest.fixture
def hub_folder(model, tmp_path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(to_original_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_original_config(model.config)))
    return folder


def lightning_checkpoint(model, path: Path, **changes) -> Path:
    """Raw weights that are twice the EMA weights, so that the two can be told apart."""
    averages = to_original_weights(model)
    buffer = "backbone.rotary_emb.inv_freq"
    parameters = [name for name in averages if name != buffer]
    checkpoint = {
        "state_dict": {name: 2 * averages[name] for name in parameters} | {buffer: averages[buffer]},
        "ema": {"decay": 0.9999, "num_updates": 10, "shadow_params": [averages[name] for name in parameters]},
        "hyper_parameters": {"config": SETTINGS, "vocab_size": 24},
    }
    torch.save(checkpoint | changes, path)
    return path


def test_hub_folder_converts_and_converts_back_bit_for_bit(model, hub_folder, tmp_path):
    convert(hub_folder, tmp_path / "ours")
    loaded = AutoModel.from_pretrained(tmp_path / "ours")
    assert loaded.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {
        "_name_or_path": "",
        "architectures": ["EsoForMaskedDiffusion"],
        "auto_map": loaded.config.auto_map,
        "dtype": "float32",
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    convert_back(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == (hub_folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "theirs" / "config.json").read_text()) == json.loads(
        (hub_folder / "config.json").read_text()
    )


@pytest.mark.parametrize("raw", [False, True])
def test_lightning_checkpoint_gives_ema_or_raw_weights(model, tmp_path, raw):
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt")
    converted = convert(checkpoint, tmp_path / "ours", mask_token_id=23, raw_weights=raw)
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], 2 * tensor if raw else tensor), name
    assert (converted.config.alpha_0, converted.config.max_position_embeddings) == (0.5, 32)


def test_arguments_come_before_the_stored_config(hub_folder, tmp_path):
    converted = convert(hub_folder, tmp_path / "ours", alpha_0=0.125, mask_token_id=3, hidden_dropout=0.0)
    config = converted.config
    assert (config.alpha_0, config.mask_token_id, config.hidden_dropout) == (0.125, 3, 0.0)


def test_what_is_missing_is_asked_for_in_one_error(model, hub_folder, tmp_path):
    config = json.loads((hub_folder / "config.json").read_text())
    del config["alpha_0"], config["n_heads"], config["mask_index"]
    (hub_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="give --num-attention-heads VALUE --mask-token-id VALUE --alpha-0 VALUE"):
        convert(hub_folder, tmp_path / "ours")
    convert(hub_folder, tmp_path / "ours", num_attention_heads=4, mask_token_id=23, alpha_0=1.0)


def word_tokenizer(num_words: int, folder: Path) -> Path:
    vocabulary = {f"word{i}": i for i in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="word1", unk_token="word0")
    fast.save_pretrained(folder)
    return folder


def test_tokenizer_gets_a_mask_token_with_the_models_id(model, tmp_path):
    """It also tells the mask id, which Lightning checkpoints do not."""
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt")
    convert(checkpoint, tmp_path / "ours", tokenizer_name=str(word_tokenizer(23, tmp_path / "tokenizer")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    loaded = AutoModel.from_pretrained(tmp_path / "ours")
    assert tokenizer.mask_token_id == loaded.config.mask_token_id == 23
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 1


@pytest.mark.parametrize(
    ("num_words", "mask", "message"), [(20, 23, "mask at id 20, the model at 23"), (30, 30, "mask")]
)
def test_a_tokenizer_that_does_not_fit_is_refused(hub_folder, tmp_path, num_words, mask, message):
    with pytest.raises(ValueError, match=message):
        convert(
            hub_folder,
            tmp_path / "ours",
            tokenizer_name=str(word_tokenizer(num_words, tmp_path / "tokenizer")),
            mask_token_id=mask,
        )
    assert not (tmp_path / "ours").exists()


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_written(hub_folder, tmp_path):
    tensors = load_file(hub_folder / "model.safetensors")
    tensors["backbone.extra"] = torch.zeros(1)
    del tensors["backbone.blocks.1.attn_out.weight"]
    tensors["backbone.blocks.0.norm1.weight"] = torch.zeros(7)
    save_file(tensors, hub_folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        convert(hub_folder, tmp_path / "ours")
    message = str(error.value)
    assert "unexpected: backbone.extra" in message
    assert "missing: backbone.blocks.1.attn_out.weight, shape (32, 32)" in message
    assert "misshapen: backbone.blocks.0.norm1.weight, shape (7,) instead of (32,)" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


class Payload:
    """Runs code when it is unpickled: it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "ran"))


def test_a_pickle_that_could_run_code_is_refused_unless_trusted(model, tmp_path):
    proof = tmp_path / "proof"
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt", callbacks=Payload(proof))
    with pytest.raises(ValueError, match="--trust-pickle"):
        convert(checkpoint, tmp_path / "ours", mask_token_id=23)
    assert not proof.exists()
    assert not (tmp_path / "ours").exists()
    convert(checkpoint, tmp_path / "ours", mask_token_id=23, trust_pickle=True)
    assert proof.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", pickle.dumps({"a": 1}), b"PK\x03\x04 cut off"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "bad.ckpt").write_bytes(content)
    for trust_pickle in (False, True):
        with pytest.raises(ValueError, match="`checkpoint`"):
            convert(tmp_path / "bad.ckpt", tmp_path / "ours", trust_pickle=trust_pickle)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": None}, "--raw-weights"),
        ({"ema": {"shadow_params": [torch.zeros(1)]}}, "1 EMA weights"),
        ({"ema": {"shadow_params": [torch.zeros(3)] * 30}}, "are no matrices"),
        ({"state_dict": {}}, "0 parameters and 30 EMA weights"),
        ({"state_dict": None}, "has no `state_dict`"),
        ({"hyper_parameters": None}, "give --num-attention-heads VALUE --alpha-0 VALUE"),
        (
            {"hyper_parameters": {"config": SETTINGS | {"algo": {"diffusion_attn_mode": "bidirectional"}}}},
            "diffusion_attn_mode=bidirectional",
        ),
    ],
)
def test_checkpoints_of_other_models_are_refused(model, tmp_path, changes, message):
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt", **changes)
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, tmp_path / "ours", mask_token_id=23)
    assert not (tmp_path / "ours").exists()


def test_folders_are_not_overwritten_nor_mistaken(hub_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        convert(hub_folder, tmp_path / "taken")
    with pytest.raises(ValueError, match=r"lacks \['config.json', 'model.safetensors'\]"):
        convert(tmp_path / "taken", tmp_path / "ours")
    with pytest.raises(ValueError, match="found nothing"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    convert(hub_folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="model folder of eso_lm already"):
        convert(tmp_path / "ours", tmp_path / "again")
    (hub_folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="is damaged"):
        convert(hub_folder, tmp_path / "again")


def test_card_has_the_name_of_the_folder(hub_folder, tmp_path):
    convert(hub_folder, tmp_path / "ours")
    assert 'AutoModel.from_pretrained("ours", trust_remote_code=True)' in (tmp_path / "ours/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("backbone.rotary_emb.inv_freq", lambda tensor: tensor * 0.5, "not the rotary frequencies"),
        ("backbone.blocks.0.mlp.0.weight", lambda tensor: tensor.bfloat16(), "of different or integer types"),
        ("backbone.blocks.0.mlp.0.weight", lambda tensor: tensor.int(), "of different or integer types"),
    ],
)
def test_tensors_of_another_kind_are_refused(hub_folder, tmp_path, name, change, message):
    tensors = load_file(hub_folder / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, hub_folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(hub_folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tied_config_over_different_matrices_is_refused(hub_folder, tmp_path):
    config = json.loads((hub_folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (hub_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tied by the config, but different"):
        convert(hub_folder, tmp_path / "ours")


def test_way_back_keeps_the_type_of_the_file(hub_folder, tmp_path):
    convert(hub_folder, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    convert_back(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs/model.safetensors").read_bytes() == (hub_folder / "model.safetensors").read_bytes()


def test_tied_embeddings_stay_tied(tmp_path):
    randomized_model(tie_word_embeddings=True).save_pretrained(tmp_path / "ours")
    convert_back(tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "again")
    loaded = AutoModel.from_pretrained(tmp_path / "again")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, AutoModel.from_pretrained(tmp_path / "ours").lm_head.weight)


def test_back_from_what_is_no_model_of_ours_is_refused(hub_folder, tmp_path):
    for folder in (hub_folder, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a model folder of eso_lm"):
            convert_back(folder, tmp_path / "theirs")
    convert(hub_folder, tmp_path / "ours")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    del weights["lm_head.bias"]
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*lm_head\.bias"):
        convert_back(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_the_arguments_cannot_mean_is_refused(hub_folder, tmp_path):
    with pytest.raises(ValueError, match="`raw_weights` is for Lightning"):
        convert(hub_folder, tmp_path / "ours", raw_weights=True)
    with pytest.raises(ValueError, match="`tokenizer` must be the name or path"):
        convert(hub_folder, tmp_path / "ours", tokenizer_name=str(tmp_path / "nowhere"))
    (hub_folder / "config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no dictionary"):
        convert(hub_folder, tmp_path / "ours")


def test_bfloat16_stays_bfloat16(tmp_path):
    model = randomized_model(dtype=torch.bfloat16)
    checkpoint = lightning_checkpoint(model, tmp_path / "last.ckpt")
    convert(checkpoint, tmp_path / "ours", mask_token_id=23)
    loaded = AutoModel.from_pretrained(tmp_path / "ours")
    assert loaded.dtype == torch.bfloat16
    ids = random_batch(model, 1, 8)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_command_line(hub_folder, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "examples" / "convert_original_checkpoint.py"

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [script.name, *arguments])
        runpy.run_path(str(script), run_name="__main__")

    run("--checkpoint", str(hub_folder), "--output", str(tmp_path / "ours"), "--alpha-0", "0.25")
    assert AutoModel.from_pretrained(tmp_path / "ours").config.alpha_0 == 0.25
    with pytest.raises(SystemExit) as failure:
        run("--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "again"))
    assert failure.value.code == 1
    assert "found nothing" in capsys.readouterr().err
