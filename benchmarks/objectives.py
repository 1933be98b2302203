"""The objectives of the systems that the paper compares Eso-LMs with, for the layers of an Eso-LM.

Each gives the loss of every row, (batch,), in nats per token: exact for the autoregressive one, an unbiased draw of
the NELBO for the others. `baselines.py` has the samplers that belong to them.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from baselines import bidirectional, text_positions

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion
from eso_lm.noise_schedule import keep_probability, nelbo_weight, sample_times


class Objective(Protocol):
    """Losses of the rows of `input_ids` (batch, length), with noise from `generator` (None: torch's global one)."""

    def __call__(
        self, model: EsoForMaskedDiffusion, input_ids: torch.LongTensor, generator: torch.Generator | None = None
    ) -> torch.Tensor: ...


class Autoregressive:
    """Left to right, the next token from those before it; the first one from a start token."""

    def __init__(self, start_token_id: int):
        self.start_token_id = start_token_id

    def __call__(self, model, input_ids, generator=None):
        shifted = F.pad(input_ids[:, :-1], (1, 0), value=self.start_token_id)
        states = model.model(shifted, position_ids=text_positions(shifted)).last_hidden_state
        return mean_loss(model, states, input_ids, torch.ones(input_ids.shape, device=states.device))


class MaskedDiffusion:
    """Every token may see every other (MDLM): a time for each row, spread evenly over the batch.

    With `loss_type="low_var"` all masks weigh the same, as in the collator: no NELBO, to train with.
    """

    def __init__(self, loss_type: str = "elbo"):
        self.loss_type = loss_type

    def __call__(self, model, input_ids, generator=None):
        batch, length = input_ids.shape
        times = sample_times(batch, generator)[:, None].expand(batch, length)
        noisy, weights = add_noise(input_ids, times, model.config.mask_token_id, generator)
        weights = (weights > 0).to(weights.dtype) if self.loss_type == "low_var" else weights
        with bidirectional(model):
            states = model.model(noisy, position_ids=text_positions(noisy)).last_hidden_state
        return mean_loss(model, states, input_ids, weights)


class BlockDiffusion:
    """Blocks from left to right, each by masked diffusion given the clean ones before it (BD3-LM).

    The clean text and the noisy one run side by side. A time for each block, spread evenly over all of the batch.
    """

    def __init__(self, block_length: int):
        self.block_length = block_length

    def __call__(self, model, input_ids, generator=None):
        batch, length = input_ids.shape
        if length % self.block_length != 0:
            raise ValueError(f"The length must be a multiple of {self.block_length}, got {length}.")
        times = sample_times(batch * length // self.block_length, generator)
        times = times[torch.randperm(len(times), generator=generator)].view(batch, -1)
        times = times.repeat_interleave(self.block_length, dim=1)
        noisy, weights = add_noise(input_ids, times, model.config.mask_token_id, generator)
        return mean_loss(model, self.states(model, input_ids, noisy), input_ids, weights)

    def states(self, model: EsoForMaskedDiffusion, clean: torch.LongTensor, noisy: torch.LongTensor) -> torch.Tensor:
        """Hidden states of the noisy text (batch, length, hidden), each block given the clean ones before it."""
        length = clean.shape[1]
        block = torch.arange(length, device=clean.device) // self.block_length
        earlier, same = block[None] < block[:, None], block[None] == block[:, None]
        is_visible = torch.cat([torch.cat([earlier | same, torch.zeros_like(same)], 1), torch.cat([earlier, same], 1)])
        states = model.model(
            torch.cat([clean, noisy], dim=1),
            position_ids=text_positions(clean).repeat(1, 2),
            attention_mask=is_visible[None, None],
        ).last_hidden_state
        return states[:, length:]


class Esoteric:
    """The hybrid objective, through the project's own collator: of a batch, so all rows have the batch's loss."""

    def __init__(self, alpha_0: float, mask_token_id: int, loss_type: str = "elbo"):
        self.collator = DataCollatorForHybridMaskedDiffusion(
            mask_token_id=mask_token_id, alpha_0=alpha_0, loss_type=loss_type
        )

    def __call__(self, model, input_ids, generator=None):
        batch = self.collator([{"input_ids": row} for row in input_ids.tolist()])
        loss = model(**{name: value.to(input_ids.device) for name, value in batch.items()}).loss
        return loss.expand(len(input_ids))


class InPieces:
    """An objective of rows that are cut into pieces, each a row of its own."""

    def __init__(self, objective: Objective, length: int):
        self.objective, self.length = objective, length

    def __call__(self, model, input_ids, generator=None):
        pieces = input_ids.reshape(-1, self.length)
        return self.objective(model, pieces, generator).view(len(input_ids), -1).mean(dim=1)


def mean_loss(
    model: EsoForMaskedDiffusion, states: torch.Tensor, input_ids: torch.LongTensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted cross entropies of the tokens of each row, over their number, (batch,).

    Logits, the largest part of a small model's step, are computed where there is a weight.
    """
    counts = weights > 0
    losses = F.cross_entropy(model.compute_logits(states[counts]).float(), input_ids[counts], reduction="none")
    return torch.zeros_like(weights).masked_scatter(counts, weights[counts] * losses).mean(dim=1)


def add_noise(
    input_ids: torch.LongTensor, times: torch.Tensor, mask_token_id: int, generator: torch.Generator | None
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Masks each token with the probability of its time; the noisy text and the weights of the losses of its masks."""
    draws = torch.rand(input_ids.shape, dtype=torch.float64, generator=generator)
    is_masked = (draws >= keep_probability(times, 1.0)).to(input_ids.device)
    weights = nelbo_weight(times, 1.0).to(input_ids.device, torch.float32) * is_masked
    return input_ids.masked_fill(is_masked, mask_token_id), weights
