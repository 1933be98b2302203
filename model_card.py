"""The model card of a saved Eso-LM: the README.md that the Hub shows."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .configuration_eso import EsoConfig

TAGS = ["eso-lm", "masked-diffusion", "diffusion-language-model", "any-order", "parallel-decoding", "custom_code"]

BODY = """# {title}

An Esoteric Language Model (Eso-LM): a hybrid of masked diffusion and autoregression with causal attention over a
shuffled order. It generates tokens in parallel, with an exact KV cache and an exact likelihood
([arXiv 2506.01928](https://arxiv.org/abs/2506.01928)).

| | |
| --- | --- |
| backbone | {backbone} |
| layers x width x heads | {config.num_hidden_layers} x {config.hidden_size} x {config.num_attention_heads} |
| vocabulary | {config.vocab_size}, with the mask at {config.mask_token_id} |
| positions in training | {config.max_position_embeddings} |
| alpha_0 in training | {config.alpha_0:g} (1: masked diffusion, 0: left to right) |

## Usage

The code comes with the weights; with the package `eso-lm` installed and imported, `trust_remote_code` is not needed.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{title}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{title}")
tokens = model.generate(max_new_tokens=128, alpha_0={config.alpha_0:g}, num_diffusion_steps=32)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

## Training data, evaluation, limits

Not written yet.

## Citation

```bibtex
@inproceedings{{esoteric_language_models,
  title = {{Esoteric Language Models}},
  author = {{Sahoo, Subham Sekhar and Yang, Zhihan and others}},
  booktitle = {{International Conference on Machine Learning}},
  year = {{2026}},
  url = {{https://arxiv.org/abs/2506.01928}}
}}
```
"""


def model_card(config: EsoConfig, title: str) -> ModelCard:
    """A card with tags, library name, sizes, a usage snippet and the citation; `title` is a name or a Hub id."""
    own = "the paper's diffusion transformer"
    backbone = own if config.backbone_config is None else f"`{config.backbone_config.model_type}` of transformers"
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BODY.format(config=config, title=title, backbone=backbone)}")


def write_model_card(folder: Path, config: EsoConfig, title: str) -> None:
    """Writes README.md into a model folder, unless somebody has written one; transformers' empty card is no card."""
    path = folder / "README.md"
    if not path.exists() or "has been automatically generated" in path.read_text(encoding="utf-8"):
        model_card(config, title).save(path)
