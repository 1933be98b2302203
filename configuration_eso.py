"""Configuration of an Esoteric Language Model (Eso-LM)."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .validation import is_integer, is_number, require_fraction, require_positive_integer, to_python

LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")
"""Rotary angles that change with the length of the text: keys in a cache would not be those of a longer text."""

DERIVED: Any = None
"""The default of fields that are worked out from others: None until the object is made, and never after."""


class EsoConfig(PreTrainedConfig):
    r"""Sizes, special tokens and phase mixture of an Eso-LM (arXiv 2506.01928).

    The defaults are the paper's small model: GPT-2's vocabulary plus a mask token, 1024 positions.

    Args:
        vocab_size (`int`, defaults to 50258): Number of token ids, the mask included.
        mask_token_id (`int`, *optional*): Id of the mask m. `None`: the last id of the vocabulary.
        hidden_size (`int`, defaults to 768): Width of the residual stream.
        num_hidden_layers (`int`, defaults to 12): Number of layers.
        num_attention_heads (`int`, defaults to 12): Number of heads; their width must be even (rotary halves).
        intermediate_size (`int`, *optional*): Width inside the MLP. `None`: 4 x `hidden_size`.
        cond_dim (`int`, defaults to 128): Width of the conditioning vector behind every shift, scale and gate.
        max_position_embeddings (`int`, defaults to 1024): Positions seen in training. Nothing is sized by it:
            rotary angles are computed for any position.
        hidden_dropout (`float`, defaults to 0.1): Dropout of the attention and MLP outputs, in training.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        rope_parameters (`dict`, *optional*): Rotary parameters as in every transformers model.
            `None`: `{"rope_type": "default", "rope_theta": 10000.0}`.
        alpha_0 (`float`, defaults to 1.0): Expected fraction of the tokens that the diffusion phase decodes:
            1 is a pure masked diffusion model, 0 a pure left-to-right AR model. Generation and likelihood
            take it from here unless told otherwise.
        pad_token_id, bos_token_id (`int`, *optional*): Padding and beginning-of-text ids.
        eos_token_id (`int` or `list[int]`, *optional*): End-of-text id or ids.
        use_cache (`bool`, defaults to `True`): Whether `generate` uses its KV cache, unless told otherwise. A plain
            forward makes a cache only when it is asked to by its own `use_cache`: its slots then stay as given.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the head shares the embedding's weight.
        draft_rank (`int`, *optional*): Rank of the draft head, which lets tokens that are drawn together know one
            another; 128 will do. `None`: no such head.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Of a causal decoder of transformers that takes the
            place of `EsoModel`: Llama, Qwen, GPT-2, ... The sizes above are then read from it, whatever is given
            here, and the other fields of the architecture have no meaning.

    Raises:
        ValueError: when a field is out of its range; the message names the field, its value and what would do.
    """

    model_type = "eso"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50258
    mask_token_id: int = DERIVED
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = DERIVED
    cond_dim: int = 128
    max_position_embeddings: int = 1024
    hidden_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict = DERIVED
    alpha_0: float = 1.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    draft_rank: int | None = None
    backbone_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in vars(self).items():
            setattr(self, name, to_python(value))
        if self.backbone_config is not None:
            self._take_sizes_from_backbone()
        if self.intermediate_size is None and is_integer(self.hidden_size):
            self.intermediate_size = 4 * self.hidden_size
        if self.mask_token_id is None and is_integer(self.vocab_size):
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate(self) -> None:
        """Checks every field again, as `save_pretrained` does before it writes."""
        self.validate_architecture()
        super().validate()  # type: ignore[misc]  # a decorator of transformers' class has added it

    def validate_architecture(self) -> None:
        """Raises a ValueError for the first field that is out of its range."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "cond_dim",
            "max_position_embeddings",
        ):
            require_positive_integer(name, getattr(self, name))
        require_positive_integer("draft_rank", self.draft_rank, or_none=True)
        if self.backbone_config is None:
            self._validate_attention_heads()
            self._validate_rope_parameters()
        for name in ("alpha_0", "hidden_dropout"):
            require_fraction(name, getattr(self, name))
        if not is_number(self.layer_norm_eps) or not self.layer_norm_eps > 0:
            raise ValueError(f"`layer_norm_eps` must be a positive number, got {self.layer_norm_eps!r}.")
        for name in ("use_cache", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")

        if not self._is_token_id(self.mask_token_id):
            raise ValueError(
                f"`mask_token_id` must be an id of the vocabulary, in [0, {self.vocab_size - 1}], "
                f"got {self.mask_token_id!r}."
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, (list, tuple)) else [value]:
                if token_id is None:
                    continue
                if not self._is_token_id(token_id):
                    raise ValueError(
                        f"`{name}` must be None or an id of the vocabulary, in [0, {self.vocab_size - 1}], "
                        f"got {value!r}."
                    )
                if token_id == self.mask_token_id:
                    raise ValueError(
                        f"`{name}` and `mask_token_id` are both {token_id}: the mask is never a token of a text, "
                        f"so it needs an id of its own."
                    )

    def _take_sizes_from_backbone(self) -> None:
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            if "model_type" not in fields:
                raise ValueError(f"`backbone_config` must have a `model_type`, got the fields {sorted(fields)}.")
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if not isinstance(self.backbone_config, PreTrainedConfig):
            raise ValueError(
                f"`backbone_config` must be the configuration of a model, got {type(self.backbone_config).__name__}."
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if hasattr(self.backbone_config, name):
                setattr(self, name, getattr(self.backbone_config, name))

    def _validate_attention_heads(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads) != 0:
            raise ValueError(
                f"`hidden_size` must be a multiple of 2 x `num_attention_heads`, so that every head has an even "
                f"width (rotary embeddings turn pairs), got hidden_size={self.hidden_size} and "
                f"num_attention_heads={self.num_attention_heads}."
            )

    def _validate_rope_parameters(self) -> None:
        rope_types = {"default", *ROPE_INIT_FUNCTIONS} - set(LENGTH_DEPENDENT_ROPE_TYPES)
        given = self.rope_parameters if isinstance(self.rope_parameters, dict) else {}
        rope_type, rope_theta = given.get("rope_type"), given.get("rope_theta")
        if rope_type not in rope_types or not is_number(rope_theta) or not rope_theta > 0:
            raise ValueError(
                f"`rope_parameters` must have a `rope_type` out of {sorted(rope_types)}, whose angles do not change "
                f"with the length, and a positive `rope_theta`, got {self.rope_parameters!r}."
            )
        if rope_type != "default":
            try:
                ROPE_INIT_FUNCTIONS[rope_type](self, "cpu")
            except KeyError as error:
                raise ValueError(f"`rope_parameters` of type {rope_type!r} must have the key {error}.") from error
        head_dim = getattr(self, "head_dim", None)
        if head_dim not in (None, self.hidden_size // self.num_attention_heads):
            raise ValueError(
                f"`head_dim` is always hidden_size / num_attention_heads, got {head_dim!r}: leave it unset."
            )

    def _is_token_id(self, value: object) -> bool:
        return is_integer(value) and 0 <= value < self.vocab_size


EsoConfig.register_for_auto_class()

__all__ = ["EsoConfig"]
