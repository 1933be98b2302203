"""The hybrid objective of an Eso-LM as a data collator: all that is random about a training batch happens here."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .configuration_eso import DERIVED, EsoConfig
from .generation_order import order_of_slots, plan_generation, text_positions
from .modeling_objective import IGNORED_LABEL
from .noise_schedule import keep_probability, nelbo_weight, sample_times
from .validation import is_integer, require_fraction, require_positive_integer, require_zeros_and_ones


@dataclass
class DataCollatorForHybridMaskedDiffusion:
    """Masks, reorders and weighs a batch, so that the model's loss on it estimates the NELBO per token.

    Part of the rows feed the diffusion term (masked at a random time t, in uniform order, weight w(t)), the others
    the sequential term (masked at t = 0, the masks left to right, weight 1). Each term is normalised by the valid
    tokens of its own rows, so the loss, in nats per token, is the sum of both (arXiv 2506.01928, section 3). A batch
    too small to split draws the phase of each row at random, with weights that keep the sum unbiased. Rows of equal
    length (packed blocks) make the estimate exact in the mean; where lengths differ, it is a ratio of sums, which
    approaches the NELBO per token as the batch grows.

    Args:
        tokenizer: Where `mask_token_id` and `pad_token_id` come from when they are not given.
        mask_token_id: Id of the mask.
        pad_token_id: Id to pad with; needed when the examples of a batch differ in length.
        alpha_0: Expected fraction of tokens of the diffusion phase, in [0, 1]; None: that of `config`. One of the two
            must be given.
        diffusion_fraction: Fraction of the rows that feed the diffusion term. `None`: 1 at α_0 = 1, 0 at α_0 = 0, else
            0.5.
        loss_type: "elbo", or, at α_0 = 1 and for training only, "low_var", which sets w(t) to 1.
        seed: `None`: new noise for every batch, different between workers, ranks and epochs, drawn from torch's global
            random state. A number: the noise is a function of the seed and the batch alone, for evaluation.
        pad_to_multiple_of: Rounds the padded length up.
        draft_length: Tokens of a draft, for a model with a draft head, which is then trained beside the rest; `None`:
            it is not. To train it alone: [`DataCollatorForDraftHead`].
        config: The model's `config`, from which `alpha_0` and the ids come that are given neither by themselves nor by
            the tokenizer; a tokenizer with another mask is refused.

    Each example has "input_ids", and may have "attention_mask" (0 at padding, on either side) and "labels" (-100 at
    the prompt, which stays clean and comes first; elsewhere equal to `input_ids`). A batch has, in generation order:
    `input_ids`, `position_ids`, `labels` (batch, slots), `loss_weights` (batch, slots), `sequential_rows` (batch,);
    and, with a `draft_length`, `draft_starts` (batch, slots).

    Evaluate with `dataclasses.replace(collator, loss_type="elbo", seed=0)`.

    Raises:
        ValueError: for settings out of range, and for examples that cannot be masked.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    mask_token_id: int = DERIVED
    pad_token_id: int | None = None
    alpha_0: float = DERIVED
    diffusion_fraction: float = DERIVED
    loss_type: str = "elbo"
    seed: int | None = None
    pad_to_multiple_of: int | None = None
    draft_length: int | None = None
    config: EsoConfig | None = None

    def __post_init__(self) -> None:
        for name in ("mask_token_id", "pad_token_id"):
            for source in (self.tokenizer, self.config):
                if getattr(self, name) is None:
                    setattr(self, name, getattr(source, name, None))
        if self.mask_token_id is None:
            raise ValueError("`mask_token_id` must be given, or a `tokenizer` that has a mask token, or a `config`.")
        if self.config is not None and self.mask_token_id != self.config.mask_token_id:
            raise ValueError(
                f"`mask_token_id` is {self.mask_token_id}, by itself or of the `tokenizer`, and that of the `config` "
                f"{self.config.mask_token_id}: the model must know the masks for what they are."
            )
        if self.alpha_0 is None:
            self.alpha_0 = getattr(self.config, "alpha_0", None)
        if self.alpha_0 is None:
            raise ValueError(
                "`config` (the model's, from which `alpha_0` is taken) or `alpha_0` must be given: a model should be "
                "trained on the mixture that it samples with."
            )
        require_fraction("alpha_0", self.alpha_0)
        if self.diffusion_fraction is None:
            self.diffusion_fraction = float(self.alpha_0) if self.alpha_0 in (0, 1) else 0.5
        require_fraction("diffusion_fraction", self.diffusion_fraction)
        if self.alpha_0 in (0, 1):
            if self.diffusion_fraction != self.alpha_0:
                raise ValueError(
                    f"`diffusion_fraction` must be {self.alpha_0:g} at alpha_0={self.alpha_0:g}, where the other "
                    f"phase has no tokens, got {self.diffusion_fraction}."
                )
        elif not 0 < self.diffusion_fraction < 1:
            raise ValueError(
                f"`diffusion_fraction` must be in (0, 1) at alpha_0={self.alpha_0:g}, or a term of the objective "
                f"would be missing, got {self.diffusion_fraction}."
            )
        if self.loss_type not in ("elbo", "low_var"):
            raise ValueError(f"`loss_type` must be 'elbo' or 'low_var', got {self.loss_type!r}.")
        if self.loss_type == "low_var" and self.alpha_0 != 1:
            raise ValueError(f"`loss_type='low_var'` is defined at alpha_0=1 only, got alpha_0={self.alpha_0}.")
        require_positive_integer("pad_to_multiple_of", self.pad_to_multiple_of, or_none=True)
        require_positive_integer("draft_length", self.draft_length, or_none=True)
        if self.draft_length == 1:
            raise ValueError("`draft_length` must be at least 2, got 1: a token alone has no others to know.")
        if self.draft_length is not None and self.config is not None and self.config.draft_rank is None:
            raise ValueError(
                f"`draft_length={self.draft_length}` trains a draft head, and the `config` has none: load the model "
                f"with `draft_rank=128`."
            )
        if self.seed is not None and not (is_integer(self.seed) and self.seed >= 0):
            raise ValueError(f"`seed` must be None or an integer >= 0, got {self.seed!r}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, is_real, labels = self.stack(examples)
        generator = self._generator(input_ids)
        counts = labels != IGNORED_LABEL  # the valid tokens: they may be masked, and the loss is per one of them

        sequential_rows, row_weights = self._split(counts, generator)
        diffusion_rows = ~sequential_rows
        keep = torch.full((len(input_ids),), self.alpha_0, dtype=torch.float64)
        t = sample_times(int(diffusion_rows.sum()), generator)
        keep[diffusion_rows] = keep_probability(t, self.alpha_0)
        if self.loss_type == "elbo":
            row_weights[diffusion_rows] *= nelbo_weight(t, self.alpha_0)

        noise = torch.rand(input_ids.shape, dtype=torch.float64, generator=generator)
        is_masked = counts & (noise >= keep[:, None])
        positions = text_positions(is_real)
        order = self._order(is_real, counts, is_masked, positions, sequential_rows, generator)
        batch = {
            "input_ids": input_ids.masked_fill(is_masked, self.mask_token_id).gather(1, order),
            "position_ids": positions.gather(1, order),
            "labels": labels.gather(1, order),
            "loss_weights": (is_masked * row_weights[:, None]).float().gather(1, order),
            "sequential_rows": sequential_rows,
        }
        if self.draft_length is not None:
            batch["draft_starts"] = self._draw_drafts(batch["labels"], self.draft_length, generator)
        return batch

    def stack(self, examples: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pads the examples to `input_ids`, `is_real` and `labels`, (batch, length) each, in text order."""
        rows = [self._row(example, index) for index, example in enumerate(examples)]
        lengths = {len(input_ids) for input_ids, _, _ in rows}
        if not rows or lengths == {0}:
            raise ValueError("`examples` must hold at least one token.")
        multiple = self.pad_to_multiple_of or 1
        missing = -max(lengths) % multiple
        if self.pad_token_id is None and (len(lengths) > 1 or missing):
            raise ValueError(
                f"`pad_token_id` must be given, by itself or by the `tokenizer`: the examples have the lengths "
                f"{sorted(lengths)} and need padding."
            )
        fill_values = (self.pad_token_id or 0, False, IGNORED_LABEL)
        columns = []
        for column, fill_value in zip(zip(*rows, strict=True), fill_values, strict=True):
            padded = pad_sequence(list(column), batch_first=True, padding_value=fill_value)
            columns.append(torch.nn.functional.pad(padded, (0, missing), value=fill_value))
        input_ids, is_real, labels = columns
        return input_ids, is_real, labels

    def _row(self, example: Mapping[str, Any], index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, their reality and their labels of one example, (length,) each, checked."""
        if "input_ids" not in example:
            raise ValueError(f"Every example needs `input_ids`; example {index} has {sorted(example)}.")
        input_ids = torch.as_tensor(example["input_ids"])
        if input_ids.dim() != 1 or (input_ids.is_floating_point() and len(input_ids) > 0):
            raise ValueError(
                f"`input_ids` of example {index} must be a list of integer ids, got shape {tuple(input_ids.shape)} "
                f"and dtype {input_ids.dtype}."
            )
        input_ids = input_ids.long()
        if len(input_ids) > 0 and input_ids.min() < 0:
            raise ValueError(f"`input_ids` of example {index} must be ids >= 0, got {int(input_ids.min())}.")
        attention_mask = example.get("attention_mask")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else torch.as_tensor(attention_mask)
        require_zeros_and_ones(f"attention_mask of example {index}", attention_mask)
        is_real = attention_mask.bool()
        labels = example.get("labels")
        labels = input_ids if labels is None else torch.as_tensor(labels, dtype=torch.long)
        for name, values in (("attention_mask", is_real), ("labels", labels)):
            if values.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` of example {index} must be as long as its `input_ids` ({len(input_ids)}), "
                    f"got shape {tuple(values.shape)}."
                )
        labels = labels.masked_fill(~is_real, IGNORED_LABEL)
        if (input_ids[is_real] == self.mask_token_id).any():
            raise ValueError(
                f"Example {index} holds the mask id {self.mask_token_id}: the collator draws the masks itself."
            )
        if ((labels != input_ids) & (labels != IGNORED_LABEL)).any():
            raise ValueError(
                f"`labels` of example {index} must equal `input_ids`, or {IGNORED_LABEL} at the prompt: "
                f"an Eso-LM predicts the token at its own slot."
            )
        return input_ids, is_real, labels

    def _split(self, counts: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws which rows are sequential, (batch,) bool, and each row's weight for its phase, (batch,) float64.

        The model divides by all valid tokens of the batch; the weights turn that into the valid tokens of the phase.
        """
        num_rows, fraction = len(counts), self.diffusion_fraction
        if fraction in (0, 1):
            return torch.full((num_rows,), fraction == 0), torch.ones(num_rows, dtype=torch.float64)
        num_tokens = counts.sum(dim=-1).double()
        candidates = num_tokens.nonzero()[:, 0]  # a row without valid tokens must not use up a phase
        num_diffusion = round(fraction * len(candidates))
        if num_diffusion in (0, len(candidates)):
            sequential_rows = torch.rand(num_rows, dtype=torch.float64, generator=generator) >= fraction
            return sequential_rows, torch.where(sequential_rows, 1 / (1 - fraction), 1 / fraction).double()
        sequential_rows = torch.ones(num_rows, dtype=torch.bool)
        shuffled = candidates[torch.randperm(len(candidates), generator=generator)]
        sequential_rows[shuffled[:num_diffusion]] = False
        row_weights = torch.empty(num_rows, dtype=torch.float64)
        for phase in (sequential_rows, ~sequential_rows):
            row_weights[phase] = num_tokens.sum() / num_tokens[phase].sum()
        return sequential_rows, row_weights

    def _order(
        self,
        is_real: torch.Tensor,
        counts: torch.Tensor,
        is_masked: torch.Tensor,
        positions: torch.Tensor,
        sequential_rows: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Prompt left to right, clean tokens in uniform order, masks in the order of their phase, then padding."""
        group = torch.ones_like(positions)
        group[is_real & ~counts] = 0
        group[is_masked] = 2
        group[~is_real] = 3
        is_left_to_right = (group == 0) | (is_masked & sequential_rows[:, None])
        noise = torch.rand(positions.shape, dtype=torch.float64, generator=generator)
        return order_of_slots(group, torch.where(is_left_to_right, positions.double(), noise))

    def _draw_drafts(self, labels: torch.Tensor, draft_length: int, generator: torch.Generator) -> torch.Tensor:
        """(batch, slots), the first slot of the draft of each slot that counts; the first draft may be a short one."""
        slots = torch.arange(labels.shape[1])
        missing = torch.randint(draft_length, (len(labels), 1), generator=generator)
        first = (labels != IGNORED_LABEL).long().argmax(dim=-1, keepdim=True)  # behind the prompt
        behind = slots - first + missing
        return (behind // draft_length * draft_length - missing + first).maximum(first)

    def _generator(self, input_ids: torch.Tensor) -> torch.Generator:
        if self.seed is None:
            # torch seeds its global state differently in every dataloader worker and epoch, but alike on every rank.
            entropy = f"{int(torch.randint(2**62, ()))} {os.environ.get('RANK', 0)}".encode()
        else:
            entropy = f"{self.seed} ".encode() + input_ids.numpy().tobytes()
        digest = hashlib.blake2b(entropy, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


@dataclass
class DataCollatorForDraftHead(DataCollatorForHybridMaskedDiffusion):
    """Draws orders and drafts for the draft head of a model that is trained already; the loss is the head's alone.

    Half the rows are written from left to right, as all text is at α_0 = 0. In the others, any number of tokens comes
    first, in a random order or in strides of 2 to 9, and the rest from left to right, as at any α_0. The tokens
    behind the prompt are cut into drafts, of which the head learns to draw each token, given those in it that stand
    nearest.

    Args:
        As for [`DataCollatorForHybridMaskedDiffusion`], whose mixture and weights have no meaning here; `draft_length`
        defaults to 8. A batch has `input_ids` (clean), `position_ids`, `labels` and `draft_starts`, (batch, slots),
        in generation order.
    """

    alpha_0: float = 0.0
    draft_length: int | None = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_integer("draft_length", self.draft_length)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, is_real, labels = self.stack(examples)
        generator = self._generator(input_ids)
        is_drawn, positions = labels != IGNORED_LABEL, text_positions(is_real)
        # Given, generated, padding.
        group = torch.where(is_drawn, 1, torch.where(is_real, 0, 2))
        rank = positions.double()
        for row, count in enumerate(is_drawn.sum(dim=-1).tolist()):
            alpha_0, which = torch.rand(2, generator=generator).tolist()
            if which < 0.5:
                continue
            # Strides so small that the tokens of one are neighbours, too.
            kind, num_steps = ("random", None) if which < 0.75 else ("strided", 2 + int(8 * (which - 0.75) / 0.25))
            order, _ = plan_generation(1, count, alpha_0, num_steps, kind, generator=generator)
            rank[row, is_drawn[row]] = order[0].argsort().double()
        order = order_of_slots(group, rank)
        labels = labels.gather(1, order)
        return {
            "input_ids": input_ids.gather(1, order),
            "position_ids": positions.gather(1, order),
            "labels": labels,
            "draft_starts": self._draw_drafts(labels, cast(int, self.draft_length), generator),
        }


__all__ = ["DataCollatorForDraftHead", "DataCollatorForHybridMaskedDiffusion"]
