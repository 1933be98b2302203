"""DPO for Eso-LMs, on TRL's trainer (an optional dependency: `pip install ".[trl]"`)."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from trl import DPOConfig, DPOTrainer

from .evaluation_trajectories import scores_plans
from .generation_order import order_of_slots
from .generation_plan import one_by_one
from .training_trl import require_reference, switch_off_dropout
from .validation import require_fraction


class EsoDPOTrainer(DPOTrainer):
    """TRL's [`DPOTrainer`] for an Eso-LM: answers are compared by their exact likelihood under an order.

    Every step draws an order for each pair, as `generate` does at one token a forward, and scores both answers, under
    the model and under its reference, in that same order: what an order makes likely or not is no difference between
    answers. At `alpha_0=0` there is one order, and this is DPO as everywhere. Losses, logs, PEFT and checkpoints are
    TRL's.

    Args:
        model, ref_model, args: As of [`DPOTrainer`].
        arguments: Its others.
        alpha_0: In [0, 1], of the orders; None: the model config's.
        options: Its others.

    Without `ref_model`, and without adapters, the reference is read from where the model was loaded from, as in TRL.

    Raises:
        ValueError: for a model that is no Eso-LM, for one that was not loaded and has no reference, for
            `precompute_ref_log_probs`, which would compare answers under different orders, and for pairs with masks.
    """

    _tag_names = ["trl", "dpo", "eso-lm"]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *arguments: Any,
        alpha_0: float | None = None,
        **options: Any,
    ):
        require_fraction("alpha_0", alpha_0, or_none=True)
        if args is not None and args.precompute_ref_log_probs:
            raise ValueError("`precompute_ref_log_probs` scores under other orders than those of the steps: unset it.")
        if ref_model is None:
            require_reference(model, options.get("peft_config"))
        with scores_plans():
            super().__init__(model, ref_model, args, *arguments, **options)
        config = cast(Any, self.model).config
        if config.model_type != "eso":
            raise ValueError(f"`model` must be an Eso-LM, got {type(model).__name__}: use TRL's `DPOTrainer`.")
        for scored in (self.model, self.ref_model):
            if scored is not None and cast(Any, self.args).disable_dropout:
                switch_off_dropout(scored)
        self.data_collator = DataCollatorForPairsInOrder(
            self.data_collator, config.alpha_0 if alpha_0 is None else alpha_0, config.mask_token_id
        )


class DataCollatorForPairsInOrder:
    """Adds an order of generation to batches of pairs: both answers of a pair are written in the same.

    Token i of an answer has the same phase and the same rank in both, as far as both are that long. Alone, each has
    the order that `generate` would draw for its length: every token is of the diffusion phase with probability
    alpha_0, those in uniform order, then the others from left to right.

    Args:
        collator: TRL's, whose batches hold the preferred answers and then the others.
        alpha_0: In [0, 1].
        mask_token_id: The mask.

    Raises:
        ValueError: for masks in a batch: only text without holes can be preferred.
    """

    def __init__(self, collator: Any, alpha_0: float, mask_token_id: int):
        self.collator, self.alpha_0, self.mask_token_id = collator, alpha_0, mask_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if ((batch["input_ids"] == self.mask_token_id) & batch["attention_mask"].bool()).any():
            raise ValueError(f"Pairs must be text without holes, and one of them holds the mask {self.mask_token_id}.")
        if batch["completion_mask"][:, 0].any():
            # TRL does not look at the first column, whose token has none before it; here it may well be scored.
            for name in ("input_ids", "attention_mask", "completion_mask"):
                batch[name] = F.pad(batch[name], (1, 0))
        is_scored, is_real = batch["completion_mask"].bool(), batch["attention_mask"].bool()
        rows, length = is_scored.shape
        # Both answers begin in the same column, behind the same prompt.
        phase, rank = torch.rand(2, rows // 2, length, dtype=torch.float64).repeat(1, 2, 1)
        columns = torch.arange(length, dtype=torch.float64).expand(rows, -1)
        kind = torch.where(is_scored, torch.where(phase < self.alpha_0, 1, 2), torch.where(is_real, 0, 3))
        orders = order_of_slots(kind, torch.where(kind == 1, rank, columns))
        return batch | {"orders": orders, "groups": one_by_one(is_scored.gather(1, orders))}


__all__ = ["EsoDPOTrainer"]
