"""The hybrid objective of an Eso-LM on a batch in generation order: what training, likelihood and drafting share.

A row is in one of two phases (arXiv 2506.01928, section 3). In the *diffusion* phase one stream will do: clean slots,
then masks, each of which sees the slots before it, other masks among them. In the *sequential* phase the mask of slot
s sees the clean slots before s, and no other mask: two streams, content and query, pass through the network together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .modeling_attention import is_padding_mask, make_attention_mask
from .modeling_interface import EsoLM
from .validation import require_ids_of_vocabulary, require_shape

IGNORED_LABEL = -100
"""The label of slots that do not count, as everywhere in transformers."""


def require_loss_arguments(
    labels: torch.Tensor | None,
    loss_weights: torch.Tensor | None,
    sequential_rows: torch.Tensor | None,
    draft_starts: torch.Tensor | None,
    batch: int,
    slots: int,
    has_embeddings: bool,
) -> None:
    """Raises a ValueError unless the arguments of a training loss go together and have the shape of the input.

    Args:
        labels, loss_weights, sequential_rows, draft_starts: As for `EsoForMaskedDiffusion.forward`.
        batch, slots: The shape of the input.
        has_embeddings: Whether that is `inputs_embeds`.
    """
    if labels is None and any(given is not None for given in (loss_weights, sequential_rows, draft_starts)):
        raise ValueError(
            "`loss_weights`, `sequential_rows` and `draft_starts` describe a loss and need `labels` (which Trainer "
            "takes away when `label_smoothing_factor` is not 0)."
        )
    if has_embeddings and loss_weights is not None and loss_weights.shape[1] < slots:
        raise ValueError(
            f"`loss_weights` are those of {loss_weights.shape[1]} slots, and `inputs_embeds` has {slots}: PEFT's "
            f"prompt tuning puts slots in front and drops `position_ids`, the generation order. LoRA and its kin work."
        )
    require_shape("labels", labels, (batch, slots))
    require_shape("loss_weights", loss_weights, (batch, slots))
    require_shape("sequential_rows", sequential_rows, (batch,))
    require_shape("draft_starts", draft_starts, (batch, slots))


# Which slots count is data: to torch.compile this is a frame to leave alone, around a backbone to compile.
@torch.compiler.disable(recursive=False)
def hybrid_loss(
    model: EsoLM,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    loss_weights: torch.Tensor | None,
    sequential_rows: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Weighted cross entropy, in nats, of a batch whose rows are in the diffusion or in the sequential phase.

    Args:
        model: An `EsoForMaskedDiffusion`.
        kwargs: For its backbone.
        Others as for its `forward`, in generation order.

    Raises:
        ValueError: for labels and weights that leave nothing to predict, or ask for the mask.
    """
    is_label = labels != IGNORED_LABEL
    if loss_weights is None:
        if input_ids is None:
            raise ValueError("`loss_weights` must be given with `inputs_embeds`, which do not show the masks.")
        loss_weights = (input_ids == model.config.mask_token_id).float()
        if not loss_weights[is_label].any():
            raise ValueError(
                "None of the slots with `labels` holds a mask, so that there is nothing to predict: take "
                "`DataCollatorForHybridMaskedDiffusion`, which masks the tokens and weighs the loss."
            )
    loss_weights = loss_weights.masked_fill(~is_label, 0)
    require_ids_of_vocabulary("labels", labels[is_label], model.config.vocab_size)
    if (labels[is_label] == model.config.mask_token_id).any():
        raise ValueError(
            f"`labels` must be clean tokens, or {IGNORED_LABEL}, and hold the mask id {model.config.mask_token_id}, "
            f"which has no probability."
        )
    states, rows, slots = states_at(
        model,
        loss_weights != 0,
        input_ids,
        inputs_embeds,
        position_ids,
        attention_mask,
        labels,
        sequential_rows,
        **kwargs,
    )
    logits = model.compute_logits(states).float()  # (weighted slots, vocab)
    cross_entropy = F.cross_entropy(logits, labels[rows, slots], reduction="none")
    total = (cross_entropy * loss_weights[rows, slots]).sum()
    if num_items_in_batch is None:
        num_items_in_batch = is_label.sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


@torch.compiler.disable(recursive=False)
def states_at(
    model: EsoLM,
    is_wanted: torch.Tensor,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor,
    sequential_rows: torch.Tensor | None,
    group_starts: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states that predict the slots `is_wanted`, (batch, slots), each row in its own phase.

    Args:
        model, kwargs: As for `hybrid_loss`.
        group_starts: (batch, slots), for rows of the sequential phase: the first slot of the group of each one, which
            are drawn together; all of a group are wanted, or none. None: each slot is a group.
        Others as for `forward` of the model, in generation order.

    Returns:
        The states, (wanted, hidden), and their rows and slots, (wanted,) each.

    Raises:
        ValueError: for rows of the sequential phase without `input_ids`, or with a mask of slots.
    """
    if sequential_rows is None:
        sequential_rows = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    # The phases run one after the other, each at its own width: the second stream costs only its own rows.
    diffusion = (~sequential_rows).nonzero()[:, 0]
    sequential = sequential_rows.nonzero()[:, 0]
    states, idle = [], _idle_forwards(model, len(diffusion), len(sequential), labels.device)
    if len(diffusion) > 0:
        outputs = model.run_backbone(
            input_ids=_take_rows(input_ids, diffusion),
            inputs_embeds=_take_rows(inputs_embeds, diffusion),
            position_ids=_take_rows(position_ids, diffusion),
            attention_mask=_take_rows(attention_mask, diffusion),
            **kwargs,
        )
        states.append(outputs.last_hidden_state[is_wanted[diffusion]])
    if len(sequential) > 0:
        if input_ids is None or not (attention_mask is None or is_padding_mask(attention_mask)):
            raise ValueError("`sequential_rows` need `input_ids`, and at most a 2D `attention_mask`.")
        states.append(
            _query_states(
                model,
                input_ids[sequential],
                labels[sequential],
                _take_rows(position_ids, sequential),
                _take_rows(attention_mask, sequential),
                is_wanted[sequential],
                _take_rows(group_starts, sequential),
                **kwargs,
            )
        )
    order = torch.cat([diffusion, sequential])
    rows, slots = is_wanted[order].nonzero().unbind(dim=-1)
    return torch.cat(states) + idle, order[rows], slots


@torch.compiler.disable(recursive=False)
def _query_states(
    model: EsoLM,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    is_queried: torch.Tensor,
    group_starts: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Hidden states of the queries of two streams.

    Content: the clean tokens in generation order, causal among itself. Query: one mask for each queried slot, which
    attends to the content before its group, and to the queries of its group up to itself. A group is what a forward of
    `generate` would reveal. Groups of one are those of the sequential phase, and of the exact likelihood; all masks in
    one group are a row of the diffusion phase.

    Returns:
        (queried slots of all rows, hidden), row by row, slots ascending.
    """
    batch, slots = input_ids.shape
    device = input_ids.device
    every_slot = torch.arange(slots, device=device).expand(batch, slots)
    if position_ids is None:
        position_ids = every_slot
    if group_starts is None:
        group_starts = every_slot
    num_queries = is_queried.sum(dim=-1)
    # No query sees what stands behind the first slot of the last group.
    sizes = torch.stack([num_queries.max(), group_starts.masked_fill(~is_queried, 0).max()])
    width, num_content = sizes.tolist()
    if width == 0:
        num_content = slots  # a loss of zero has gradients, too
    content = torch.where(labels == IGNORED_LABEL, input_ids, labels)[:, :num_content]
    # Rows with fewer queries fill up with queries of other slots, whose states are dropped at the end.
    query_slots = (~is_queried).long().argsort(dim=-1, stable=True)[:, :width]
    is_query = torch.arange(width, device=device) < num_queries[:, None]
    starts = group_starts.gather(1, query_slots)

    # Each slot sees the content slots below its horizon, and the queries from the first of its group to itself.
    own = torch.arange(num_content + width, device=device).expand(batch, -1)
    horizon = torch.cat([own[:, :num_content], starts.clamp(max=num_content)], dim=-1)
    query_of_slot = num_content + is_queried.long().cumsum(dim=-1) - 1
    first_query = torch.where(is_query, query_of_slot.gather(1, starts), own[:, num_content:])
    first = torch.cat([own[:, :num_content], first_query], dim=-1)
    is_visible = torch.ones_like(own, dtype=torch.bool)
    if attention_mask is not None:
        is_visible[:, :num_content] = attention_mask[:, :num_content].bool()

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_past = (key < horizon[row, query]) & is_visible[row, key]
        return is_past | ((first[row, query] <= key) & (key <= query))

    num_slots = num_content + width
    two_stream_mask = make_attention_mask(
        model.model.config, sees, batch, num_slots, num_slots, model.model.dtype, device
    )
    masks = torch.full_like(query_slots, model.config.mask_token_id)
    outputs = model.run_backbone(
        input_ids=torch.cat([content, masks], dim=-1),
        position_ids=torch.cat([position_ids[:, :num_content], position_ids.gather(1, query_slots)], dim=-1),
        attention_mask=two_stream_mask,
        **kwargs,
    )
    return outputs.last_hidden_state[:, num_content:][is_query]


def _idle_forwards(model: EsoLM, num_diffusion: int, num_sequential: int, device: torch.device) -> torch.Tensor | int:
    """Zero, after the forwards that other processes need this one to take part in.

    Where weights are sharded, every call of the backbone gathers them from all processes, so that these have to make
    the same calls, whatever phases their own rows are in.
    """
    if not _is_sharded(model):
        return 0
    has_phase = torch.tensor([num_diffusion, num_sequential], device=device).clamp(max=1)
    is_anywhere = has_phase.clone()
    torch.distributed.all_reduce(is_anywhere, op=torch.distributed.ReduceOp.MAX)
    idle: torch.Tensor | int = 0
    for _ in range(int((is_anywhere - has_phase).sum())):
        mask = torch.full((1, 1), model.config.mask_token_id, device=device)
        idle = idle + 0 * model.run_backbone(input_ids=mask).last_hidden_state.sum()
    return idle


def _is_sharded(model: nn.Module) -> bool:
    """Whether weights are gathered from other processes by each call: FSDP, or DeepSpeed's ZeRO-3."""
    is_fsdp = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return is_fsdp or any(hasattr(weight, "ds_id") for weight in model.parameters())


def _take_rows(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """`tensor[rows]`; tensors that are None or broadcast over the batch stay as they are."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]
