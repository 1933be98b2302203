"""Saved folders of an Eso-LM: they hold the code, and a model card, the README.md that the Hub shows."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .configuration_eso import EsoConfig
from .generation_configuration import EsoGenerationConfig
from .modeling_interface import EsoNetwork

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
    other = config.backbone_config
    backbone = f"`{other.model_type}` of transformers" if isinstance(other, PreTrainedConfig) else own
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BODY.format(config=config, title=title, backbone=backbone)}")


def write_model_card(folder: Path, config: EsoConfig, title: str) -> None:
    """Writes README.md into a model folder, unless somebody has written one; transformers' empty card is no card."""
    path = folder / "README.md"
    if not path.exists() or "has been automatically generated" in path.read_text(encoding="utf-8"):
        model_card(config, title).save(path)


class EsoHubMixin(EsoNetwork):
    """Saves a model so that its folder loads anywhere, and is ready for `push_to_hub`."""

    _auto_classes: tuple[str, ...] = ("AutoModel",)
    """The Auto classes that a saved folder loads through with `trust_remote_code=True`."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves weights, configurations and the code, so that the folder loads with `trust_remote_code=True`.

        Args:
            save_directory: The folder.
            args, kwargs: As for every model of transformers.

        Raises:
            ValueError: for a `generation_config` that could not be loaded again.
        """
        settings = getattr(self, "generation_config", None)
        if isinstance(settings, EsoGenerationConfig):
            settings.check_loadable()
        # transformers records the one Auto class that a model class is registered for; users come through several.
        self.config.auto_map = {"AutoConfig": _module_and_name(type(self.config))} | {
            auto_class: _module_and_name(type(self)) for auto_class in self._auto_classes
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        write_model_card(Path(save_directory), self.config, title=Path(save_directory).name)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # For a repository without a card transformers has just written an empty one.
        write_model_card(Path(working_dir), self.config, title=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _module_and_name(cls: type) -> str:
    """A class as transformers' `auto_map` names it: module.Class, the module without its packages."""
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"
