"""Convert the authors' Eso-LM checkpoints into a model folder of eso_lm, and back.

    python examples/convert_original_checkpoint.py --checkpoint eso-lm.ckpt --output my-eso-lm --tokenizer gpt2
    python examples/convert_original_checkpoint.py --checkpoint hub-folder --output my-eso-lm --alpha-0 1.0
    python examples/convert_original_checkpoint.py --checkpoint my-eso-lm --output hub-folder --to-original

The two published layouts are told apart by themselves: a Lightning checkpoint (one file, with EMA weights) and a Hub
folder (config.json and model.safetensors). Nothing is written unless every tensor fits.
"""

import argparse
import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from eso_lm import EsoConfig, EsoForMaskedDiffusion
from eso_lm.hub import model_card
from eso_lm.modeling_eso import EsoRotaryEmbedding

Tensors = dict[str, torch.Tensor]

PREFIX = "backbone."
ROTARY_BUFFER = f"{PREFIX}rotary_emb.inv_freq"
# The authors' module, and ours; "{}" is the number of a layer.
MODULES = {
    "vocab_embed.embedding": ["model.embed_tokens.weight"],
    "sigma_map.mlp.0": ["model.timestep_embedding.in_proj"],
    "sigma_map.mlp.2": ["model.timestep_embedding.out_proj"],
    "blocks.{}.norm1": ["model.layers.{}.input_layernorm"],
    "blocks.{}.attn_qkv": [f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"],
    "blocks.{}.attn_out": ["model.layers.{}.self_attn.o_proj"],
    "blocks.{}.norm2": ["model.layers.{}.post_attention_layernorm"],
    "blocks.{}.mlp.0": ["model.layers.{}.mlp.up_proj"],
    "blocks.{}.mlp.2": ["model.layers.{}.mlp.down_proj"],
    "blocks.{}.adaLN_modulation": ["model.layers.{}.modulation"],
    "output_layer.norm_final": ["model.norm"],
    "output_layer.linear": ["lm_head"],
    "output_layer.adaLN_modulation": ["model.modulation"],
}


def read_checkpoint(path: Path, raw_weights: bool = False, trust_pickle: bool = False) -> tuple[Tensors, dict]:
    """Reads either layout: tensors under the authors' names, and the stored config in the names of EsoConfig's fields.

    Raises:
        ValueError: when the file is of neither layout, unsafe to load, or has no EMA weights and they were asked for.
    """
    if path.is_dir():
        if raw_weights:
            raise ValueError("`raw_weights` is for Lightning checkpoints: a Hub folder holds one set of weights.")
        return _read_hub_folder(path)
    if not path.is_file():
        raise ValueError(f"`checkpoint` must be a Lightning checkpoint or a Hub folder, found nothing at {path}.")
    return _read_lightning_checkpoint(path, raw_weights, trust_pickle)


def infer_config(tensors: Tensors, stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> EsoConfig:
    """Sizes from the tensors, the rest from the stored config; `overrides` that are not None come before both.

    Raises:
        ValueError: naming every field that is still missing, or every tensor that the sizes are read from and that
            is missing.
    """
    size_from = {
        "vocab_size": ("vocab_embed.embedding", 0),
        "hidden_size": ("vocab_embed.embedding", 1),
        "cond_dim": ("sigma_map.mlp.0.weight", 0),
        "intermediate_size": ("blocks.0.mlp.0.weight", 0),
    }
    missing = sorted({PREFIX + name for name, _ in size_from.values()} - tensors.keys())
    if missing:
        raise ValueError(f"`checkpoint` does not look like an Eso-LM: it lacks the tensors {missing}.")
    flat = sorted(PREFIX + name for name, dim in size_from.values() if tensors[PREFIX + name].dim() != 2)
    if flat:
        raise ValueError(f"`checkpoint` does not look like an Eso-LM: the tensors {flat} are no matrices.")
    fields = {field: tensors[PREFIX + name].shape[dim] for field, (name, dim) in size_from.items()}
    layers = re.compile(rf"{re.escape(PREFIX)}blocks\.(\d+)\.")
    fields["num_hidden_layers"] = 1 + max(int(match[1]) for match in map(layers.match, tensors) if match)
    fields |= {field: value for field, value in [*stored.items(), *overrides.items()] if value is not None}

    needed = ("num_attention_heads", "mask_token_id", "alpha_0", "hidden_dropout", "max_position_embeddings")
    unknown = [field for field in needed if field not in fields]
    if unknown:
        arguments = " ".join(f"--{field.replace('_', '-')} VALUE" for field in unknown)
        raise ValueError(f"The checkpoint does not say {', '.join(unknown)}: give {arguments}.")
    return EsoConfig(**fields)


def to_eso_weights(tensors: Tensors, config: EsoConfig) -> Tensors:
    """Renames the authors' tensors, and splits query, key and value.

    Raises:
        ValueError: listing the unexpected, missing and misshapen tensors.
    """
    layout = _layout(config)
    problems = [f"unexpected: {name}" for name in sorted(tensors.keys() - layout.keys() - {ROTARY_BUFFER})]
    for name, shapes in layout.items():
        rows = sum(shape[0] for shape in shapes.values())
        expected = (rows, *next(iter(shapes.values()))[1:])
        if name not in tensors:
            problems.append(f"missing: {name}, shape {expected}")
        elif tuple(tensors[name].shape) != expected:
            problems.append(f"misshapen: {name}, shape {tuple(tensors[name].shape)} instead of {expected}")
    dtypes = {str(tensor.dtype) for name, tensor in tensors.items() if name != ROTARY_BUFFER}
    if len(dtypes) > 1 or not all(tensors[name].is_floating_point() for name in layout.keys() & tensors.keys()):
        problems.append(f"of different or integer types: {sorted(dtypes)}; one floating-point type is needed")
    head, embedding = (tensors.get(PREFIX + name) for name in ("output_layer.linear.weight", "vocab_embed.embedding"))
    if config.tie_word_embeddings and not (head is None or embedding is None or torch.equal(head, embedding)):
        problems.append("tied by the config, but different: embedding and head")
    if ROTARY_BUFFER in tensors:
        frequencies = EsoRotaryEmbedding(config).inv_freq
        stored = tensors[ROTARY_BUFFER].float()
        if stored.shape != frequencies.shape or not torch.allclose(stored, frequencies, rtol=1e-2):
            problems.append(f"not the rotary frequencies of base 10000: {ROTARY_BUFFER}")
    if problems:
        raise ValueError("`checkpoint` does not fit the model that its sizes describe:\n  " + "\n  ".join(problems))
    weights = {}
    for name, shapes in layout.items():
        parts = tensors[name].split([shape[0] for shape in shapes.values()])
        weights |= {ours: part.clone() for ours, part in zip(shapes, parts, strict=True)}
    return weights


def to_original_weights(model: EsoForMaskedDiffusion) -> Tensors:
    """The inverse of `to_eso_weights`, with the rotary buffer that the authors' folder holds."""
    weights = model.state_dict()
    tensors = {name: torch.cat([weights[ours] for ours in shapes]) for name, shapes in _layout(model.config).items()}
    return tensors | {ROTARY_BUFFER: model.model.rotary_emb.inv_freq.clone()}


def to_original_config(config: EsoConfig) -> dict[str, Any]:
    """The config.json of the authors' Hub folder, in which `alpha_0` and `tie_word_embeddings` ride along."""
    if config.rope_parameters != {"rope_type": "default", "rope_theta": 10000.0} or config.layer_norm_eps != 1e-5:
        raise ValueError("The authors' layout has no place for `rope_parameters` and `layer_norm_eps` of one's own.")
    return {
        "architectures": ["EsoLM"],
        "model_type": "EsoLM",
        "vocab_size": config.vocab_size,
        "mask_index": config.mask_token_id,
        "model_length": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "cond_dim": config.cond_dim,
        "n_blocks": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "dropout": config.hidden_dropout,
        "alpha_0": config.alpha_0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name or path; it gets a mask token, at the next free id, if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`tokenizer` must be the name or path of a tokenizer, got {name!r}: {reason}") from error
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


def convert(
    checkpoint: Path,
    output: Path,
    tokenizer_name: str | None = None,
    raw_weights: bool = False,
    trust_pickle: bool = False,
    **overrides: Any,
) -> EsoForMaskedDiffusion:
    """Converts a checkpoint of either layout into a model folder, and returns the model.

    Args:
        checkpoint: A Lightning checkpoint or a Hub folder.
        output: The folder to write; it must not exist, or be empty.
        tokenizer_name: Name or path of a tokenizer to save beside the model.
        raw_weights: Take the raw weights of a Lightning checkpoint instead of their moving average.
        trust_pickle: Load a file that holds more than tensors and plain containers, which can run any code.
        overrides: Fields of EsoConfig, before what the checkpoint says.

    Raises:
        ValueError: when anything is missing or does not fit; nothing is written then.
    """
    _require_free(output)
    tensors, stored = read_checkpoint(checkpoint, raw_weights, trust_pickle)
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else None
    if tokenizer is not None:
        stored = {"mask_token_id": tokenizer.mask_token_id} | {k: v for k, v in stored.items() if v is not None}
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            stored[field] = getattr(tokenizer, field)
    config = infer_config(tensors, stored, overrides)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, config)
    dtype = tensors[f"{PREFIX}vocab_embed.embedding"].dtype
    model = EsoForMaskedDiffusion(config).to(dtype)
    model.load_state_dict(to_eso_weights(tensors, config))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        model_card(config, title=output.name).save(folder / "README.md")  # not the temporary name
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    _write_whole(output, write)
    return model.eval()


def convert_back(folder: Path, output: Path) -> None:
    """Writes a model folder of eso_lm in the authors' Hub layout, bit for bit.

    Raises:
        ValueError: when the model has settings that the layout cannot express; nothing is written then.
    """
    _require_free(output)
    if not (folder / "config.json").is_file() or _read_json(folder).get("model_type") != EsoConfig.model_type:
        raise ValueError(f"`checkpoint` {folder} is not a model folder of eso_lm, which --to-original converts.")
    try:
        weights_path = folder / "model.safetensors"
        dtypes = {tensor.dtype for tensor in load_file(weights_path).values()} if weights_path.is_file() else {"auto"}
        if len(dtypes) != 1:
            raise ValueError(f"`checkpoint` {folder} mixes the types {sorted(map(str, dtypes))}; one is needed.")
        # The type of the file, whatever the config says: the way back is exact to the bit.
        model, loaded = EsoForMaskedDiffusion.from_pretrained(folder, dtype=dtypes.pop(), output_loading_info=True)
    except (RuntimeError, SafetensorError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`checkpoint` {folder} cannot be loaded: {reason}") from error
    problems = {kind: sorted(map(str, names)) for kind, names in loaded.items() if names}
    if problems:
        raise ValueError(f"`checkpoint` {folder} does not hold the whole model: {problems}.")
    tensors = {name: tensor.contiguous() for name, tensor in to_original_weights(model).items()}
    config = to_original_config(model.config)

    def write(target: Path) -> None:
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})

    _write_whole(output, write)


def _layout(config: EsoConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """The authors' tensors: name -> our tensors that make it up, stacked along the rows, with their shapes."""
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in EsoForMaskedDiffusion(config).state_dict().items()}
    layout = {}
    for theirs, modules in MODULES.items():
        for index in range(config.num_hidden_layers if "{}" in theirs else 1):
            for suffix in ("", ".weight", ".bias"):
                names = [module.format(index) + suffix for module in modules]
                if names[0] in ours:
                    layout[PREFIX + theirs.format(index) + suffix] = {name: ours[name] for name in names}
    return layout


def _read_hub_folder(folder: Path) -> tuple[Tensors, dict]:
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    absent = [path.name for path in (config_path, weights_path) if not path.is_file()]
    if absent:
        raise ValueError(
            f"`checkpoint` folder {folder} must hold config.json and model.safetensors, it lacks {absent}."
        )
    config = _read_json(folder)
    try:
        tensors = load_file(weights_path)
    except SafetensorError as error:
        raise ValueError(f"`checkpoint` folder {folder} is damaged: {error}.") from error
    if config.get("model_type") == EsoConfig.model_type:
        raise ValueError(f"{folder} is a model folder of eso_lm already; --to-original converts it back.")
    stored = {
        "num_attention_heads": config.get("n_heads"),
        "mask_token_id": config.get("mask_index"),
        "max_position_embeddings": config.get("model_length"),
        "hidden_dropout": config.get("dropout"),
        "alpha_0": config.get("alpha_0"),
        "tie_word_embeddings": config.get("tie_word_embeddings"),
    }
    return tensors, stored


def _read_json(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`checkpoint` folder {folder} has a damaged config.json: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"`checkpoint` folder {folder} has a config.json that is no dictionary: {config!r}.")
    return config


def _read_lightning_checkpoint(path: Path, raw_weights: bool, trust_pickle: bool) -> tuple[Tensors, dict]:
    checkpoint = _load_pickle(path, trust_pickle)
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"`checkpoint` {path} is not a Lightning checkpoint: it has no `state_dict`.")
    state = checkpoint["state_dict"]
    tensors = {name: tensor for name, tensor in state.items() if str(name).startswith(PREFIX)}
    if not raw_weights:
        tensors |= _ema_weights(checkpoint, [name for name in tensors if name != ROTARY_BUFFER])

    settings = (checkpoint.get("hyper_parameters") or {}).get("config") or {}
    algorithm, model = settings.get("algo") or {}, settings.get("model") or {}
    for field, supported in (
        ("time_conditioning", False),
        ("diffusion_attn_mode", "causal"),
        ("sequential_attn_mode", "causal"),
    ):
        if algorithm.get(field, supported) != supported:
            raise ValueError(
                f"The checkpoint was trained with `{field}={algorithm[field]}`; this package implements "
                f"{supported!r}, the variant whose KV cache is exact."
            )
    stored = {
        "num_attention_heads": model.get("n_heads"),
        "max_position_embeddings": model.get("length"),
        "hidden_dropout": model.get("dropout"),
        "tie_word_embeddings": model.get("tie_word_embeddings"),
        "alpha_0": algorithm.get("alpha_0"),
    }
    return tensors, stored


def _load_pickle(path: Path, trust_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"`checkpoint` {path} holds more than tensors and plain containers, and loading it could run any code "
                f"({reason}). If you trust where it comes from, pass --trust-pickle."
            ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"`checkpoint` {path} cannot be read as a PyTorch file: {error}.") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except ModuleNotFoundError as error:
        raise ValueError(f"`checkpoint` {path} needs the Python package {error.name!r} to be loaded.") from error
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError, KeyError) as error:
        raise ValueError(f"`checkpoint` {path} cannot be read as a PyTorch file: {error}.") from error


def _ema_weights(checkpoint: Mapping[str, Any], names: list[str]) -> Tensors:
    """The moving averages, a list in the order of the parameters, under the parameters' names."""
    averages = (checkpoint.get("ema") or {}).get("shadow_params")
    if averages is None:
        raise ValueError("`checkpoint` has no EMA weights (`ema.shadow_params`): pass --raw-weights for its own.")
    if len(averages) != len(names):
        raise ValueError(f"`checkpoint` has {len(names)} parameters and {len(averages)} EMA weights: they must match.")
    return dict(zip(names, averages, strict=True))


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: EsoConfig) -> None:
    if tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"`tokenizer` has its mask at id {tokenizer.mask_token_id}, the model at {config.mask_token_id}: "
            f"this is not the tokenizer that the checkpoint was trained with."
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` must have at most the model's {config.vocab_size} tokens, got {len(tokenizer)}."
        )


def _require_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"`output` {output} exists already: name a new folder, nothing is overwritten.")


def _write_whole(output: Path, write) -> None:
    """Writes a folder under a temporary name and moves it into place, so that no half of it is ever left behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        temporary.chmod(0o755)
        write(temporary)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Lightning .ckpt, or a folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; must be new")
    parser.add_argument("--to-original", action="store_true", help="from a model folder of eso_lm to the Hub layout")
    parser.add_argument("--tokenizer", help="name or path of a tokenizer to save beside the model; gets a mask token")
    parser.add_argument("--raw-weights", action="store_true", help="the raw weights of a .ckpt instead of the EMA")
    parser.add_argument("--trust-pickle", action="store_true", help="load a .ckpt even if that can run any code")
    overrides = parser.add_argument_group("what the checkpoint does not say, or says wrongly")
    overrides.add_argument("--num-attention-heads", type=int)
    overrides.add_argument("--mask-token-id", type=int)
    overrides.add_argument("--alpha-0", type=float)
    overrides.add_argument("--hidden-dropout", type=float)
    overrides.add_argument("--max-position-embeddings", type=int)
    args = vars(parser.parse_args())
    checkpoint, output = args.pop("checkpoint"), args.pop("output")
    try:
        if args.pop("to_original"):
            if any(value is not None and value is not False for value in args.values()):
                raise ValueError("--to-original takes --checkpoint and --output alone.")
            convert_back(checkpoint, output)
        else:
            convert(checkpoint, output, tokenizer_name=args.pop("tokenizer"), **args)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
