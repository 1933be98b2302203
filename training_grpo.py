"""GRPO for Eso-LMs, on TRL's trainer (an optional dependency: `pip install ".[trl]"`)."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from .evaluation_trajectories import scores_plans
from .generation_configuration import EsoGenerateOutput, EsoGenerationConfig
from .modeling_inference import evaluation_mode
from .training_rewards import checked_reward
from .training_trl import require_reference, switch_off_dropout

ROLLOUTS_OF_OTHERS = (
    *("use_vllm", "use_transformers_continuous_batching"),
    *("tools", "rollout_func", "environment_factory"),
)
SET_ELSEWHERE = {  # settings of `generate`, and by what they are set in place of `generation_kwargs`
    "temperature": "`temperature`",
    "max_new_tokens": "`max_completion_length`",
    "max_length": "`max_completion_length`",
    "num_return_sequences": "`num_generations`",
    "eos_token_id": "the tokenizer, and the model's generation config",
}


@dataclass
class Rollouts:
    """What `generate` has decided, and how: the fields of a batch that are added to TRL's.

    Args:
        trajectories, orders, groups: (rows, length), as of [`EsoGenerateOutput`].
        is_real: (rows, length), 0 at padding of the prompts.
    """

    trajectories: torch.Tensor
    orders: torch.Tensor
    groups: torch.Tensor
    is_real: torch.Tensor

    def __getitem__(self, rows: slice) -> "Rollouts":
        return Rollouts(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def decided(self, mask_token_id: int) -> torch.Tensor:
        """(rows, length) bool, the columns whose tokens were drawn."""
        is_free = torch.zeros_like(self.groups).scatter(1, self.orders, self.groups) > 0
        return is_free & (self.trajectories != mask_token_id)


class EsoGRPOTrainer(GRPOTrainer):
    """TRL's [`GRPOTrainer`] for an Eso-LM: rollouts by `generate`, judged by the likelihood of their trajectories.

    A rollout keeps its plan, and every later pass scores the same tokens under it, exactly, whatever `generate` was
    told: any `alpha_0`, steps, orders, blocks, `lossless`, holes in the prompts (d2-AnyOrder, arXiv 2509.21474). What
    was decided behind the end of a text counts too, since the rest has seen it. Rewards, advantages, clipping, the KL
    term, logs, PEFT, accumulation and checkpoints are TRL's.

    How rollouts are written is set by `generation_kwargs` of [`GRPOConfig`], with the fields of
    [`EsoGenerationConfig`], for example `{"alpha_0": 0.5, "num_diffusion_steps": 16}`; what is not set is the model's
    generation config's. Prompts may have holes, written as the tokenizer's mask: they are filled in, and with
    `max_completion_length=0`, or None, nothing follows. Of such a prompt, the completion is all from the first hole
    on.

    Reward functions get, besides what TRL gives them, `texts`: whole texts, prompts and what was written. They return
    a number for each, or None where they have nothing to say.

    Filters (`top_k`, `top_p`, `min_p`, `repetition_penalty`) shape the rollouts and not the likelihood, as in TRL;
    `temperature` shapes both. Dropout is off: the policy that is judged has to be the one that wrote. Three more
    metrics are logged: `rollouts/forwards`, `rollouts/tokens`, of a text, and `rollouts/tokens_per_forward`.

    Args:
        model, reward_funcs, args: As of [`GRPOTrainer`].
        arguments, options: Its others.

    Raises:
        ValueError: for a model that is no Eso-LM, for settings whose rollouts have no plan (adaptive unmasking, a
            draft head without `lossless`, vLLM, continuous batching, tools, environments, `rollout_func`), for
            `generation_kwargs` that are no settings, or set elsewhere, for a `beta` without a reference, and, while
            training, for reward functions that fail, or return what is no number.
    """

    _tag_names = ["trl", "grpo", "eso-lm"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *arguments: Any,
        **options: Any,
    ):
        given = options | (vars(args) if args is not None else {})
        for name in ROLLOUTS_OF_OTHERS:
            if given.get(name):
                raise ValueError(f"`{name}` makes rollouts whose plan is not known: leave it unset.")
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if reward_funcs is not None:
            reward_funcs = [checked_reward(function) for function in functions]
        if args is not None:
            _check_settings(args)
            if args.beta != 0:
                require_reference(model, options.get("peft_config"))
        with scores_plans():
            super().__init__(model, reward_funcs, args, *arguments, **options)
        for policy in (self.model, self.ref_model):
            if policy is not None:
                switch_off_dropout(policy)
        self.generation_config = self._rollout_config()
        self._rollouts: Rollouts | None = None

    @property
    def policy(self) -> Any:
        """The Eso-LM itself, without what processes and adapters wrap around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _rollout_config(self) -> EsoGenerationConfig:
        """The settings of `generate`.

        Raises:
            ValueError: for those whose rollouts have no likelihood in one pass.
        """
        model = self.policy
        if model.config.model_type != "eso":
            raise ValueError(f"`model` must be an Eso-LM, got {type(model).__name__}: use TRL's `GRPOTrainer`.")
        settings = {name: value for name, value in self.generation_kwargs.items() if value is not None}
        settings["max_new_tokens"] = self.max_completion_length or 0
        config = EsoGenerationConfig(**settings, return_dict_in_generate=True)
        prepared, _ = model._prepare_generation_config(config)
        if prepared.is_adaptive:
            raise ValueError(
                "Adaptive unmasking (`confidence_threshold`, `entropy_bound`) has no likelihood in one pass: unset "
                "it, in `generation_kwargs` and in the model's generation config."
            )
        if not prepared.do_sample:
            raise ValueError("`do_sample=False` writes the same rollout again and again: unset it.")
        if model.draft_head is not None and not prepared.lossless:
            if config.use_draft_head:
                raise ValueError("`use_draft_head=True` is for `lossless` rollouts here: set that, or unset it.")
            config.use_draft_head = False
        return config

    def _generate_single_turn(  # what TRL calls to have all prompts of a batch completed
        self, prompt_ids: list[list[int]], *arguments: Any, **options: Any
    ) -> tuple[list[list[int]], None]:
        """Writes the rollouts of a batch and keeps their plans.

        Returns:
            The tokens of each completion: behind the prompt, or from its first hole on, and up to the end of the text.
        """
        args: Any = self.args
        device, mask_token_id = self.accelerator.device, self.policy.config.mask_token_id
        rows = [torch.tensor(ids, dtype=torch.long) for ids in prompt_ids]
        prompts = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id, padding_side="left")
        lengths = torch.tensor([len(ids) for ids in prompt_ids])
        firsts = prompts.shape[1] - lengths
        is_real = torch.arange(prompts.shape[1]) >= firsts[:, None]
        has_holes = ((prompts == mask_token_id) & is_real).any()
        if has_holes and any(isinstance(function, nn.Module) for function in self.reward_funcs):
            raise ValueError(
                "Reward models read a prompt and then its completion, which is no text where the prompt has holes: "
                "have a reward function pass them `texts`."
            )
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            evaluation_mode(model),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            output: EsoGenerateOutput = model.generate(
                input_ids=prompts.to(device),
                attention_mask=is_real.long().to(device),
                generation_config=self.generation_config,
            )
        texts = output.sequences.cpu()
        new = (0, texts.shape[1] - prompts.shape[1])
        is_real, is_open = F.pad(is_real, new, value=True), F.pad(prompts == mask_token_id, new, value=True)
        kept: Any = output
        self._rollouts = Rollouts(kept.trajectories, kept.orders, kept.groups, is_real.long().to(device))
        self._note(output)
        starts, ends = bounds_of_completions(texts, is_real & is_open, is_real & ~is_open, self.eos_token_ids)
        if (starts == ends).any():
            raise ValueError("There is nothing to write for a prompt without holes: set `max_completion_length`.")
        self._texts = [text[first:end].tolist() for text, first, end in zip(texts, firsts, ends, strict=True)]
        return [text[start:end].tolist() for text, start, end in zip(texts, starts, ends, strict=True)], None

    def _note(self, output: EsoGenerateOutput) -> None:
        """Adds the numbers of forwards and tokens to the metrics."""
        rollouts = cast(Rollouts, self._rollouts)
        is_decided = rollouts.decided(self.policy.config.mask_token_id)
        forwards, tokens = output.forwards_per_row, is_decided.sum(dim=-1)
        if forwards is None:
            forwards = rollouts.groups.masked_fill(~is_decided.gather(1, rollouts.orders), 0).amax(dim=-1)
        gathered = self.accelerator.gather(torch.stack([forwards, tokens], dim=-1)).float()
        forwards_of_row, tokens_of_row = gathered.unbind(dim=-1)
        metrics = self._metrics["train" if cast(nn.Module, self.model).training else "eval"]
        metrics["rollouts/forwards"].append(forwards_of_row.mean().item())
        metrics["rollouts/tokens"].append(tokens_of_row.mean().item())
        metrics["rollouts/tokens_per_forward"].append((tokens_of_row.sum() / forwards_of_row.sum()).item())

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rollouts = cast(Rollouts, self._rollouts)
        # From here on a completion is a whole trajectory, of which only what was drawn counts. (TRL leaves out
        # completions that were cut off, if told so.)
        is_counted = output["completion_mask"].any(dim=1, keepdim=True)
        mask = (rollouts.decided(self.policy.config.mask_token_id) & is_counted).to(output["completion_mask"].dtype)
        nothing = rollouts.trajectories[:, :0]
        return output | {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": rollouts.trajectories,
            "completion_mask": mask,
            "num_items_in_batch": self.accelerator.gather(mask.sum()).sum(),
            "orders": rollouts.orders,
            "groups": rollouts.groups,
            "is_real": rollouts.is_real,
        }

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._rollouts = Rollouts(inputs["completion_ids"], inputs["orders"], inputs["groups"], inputs["is_real"])
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """(rows, length) log-probabilities and entropies of the rollouts at hand, in nats, by column."""
        rollouts = cast(Rollouts, self._rollouts)
        size = batch_size or len(rollouts.orders)
        log_probs, entropies = [], []
        for start in range(0, len(rollouts.orders), size):
            part = rollouts[start : start + size]
            with self.accelerator.autocast():
                scored = model(
                    input_ids=part.trajectories,
                    attention_mask=part.is_real,
                    orders=part.orders,
                    groups=part.groups,
                    temperature=self.temperature,
                    fused_lm_head=True,
                )
            log_probs.append(scored.log_probs)
            entropies.append(scored.entropy)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *arguments: Any, **options: Any) -> torch.Tensor:
        if "texts" in inputs[0]:
            raise ValueError("Reward functions get whole texts as `texts`: call the column of the dataset otherwise.")
        texts = cast(Any, self.processing_class).batch_decode(self._texts, skip_special_tokens=True)
        inputs = [example | {"texts": text} for example, text in zip(inputs, texts, strict=True)]
        rewards = super()._calculate_rewards(inputs, *arguments, **options)
        for name, function, column in zip(self.reward_func_names, self.reward_funcs, rewards.T, strict=True):
            # Of a function, NaN is a None: its numbers have been looked at.
            is_wrong = ~column.isfinite() if isinstance(function, nn.Module) else column.isinf()
            if is_wrong.any():
                raise ValueError(f"The reward {name!r} is {column[is_wrong][0].item()}, which is no finite number.")
        return rewards


def bounds_of_completions(
    texts: torch.Tensor, is_open: torch.Tensor, is_given: torch.Tensor, eos_token_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where completions begin, with what was open first, and behind which column texts end.

    Args:
        texts: (rows, length), written.
        is_open, is_given: (rows, length) bool, what was to be written, and what stood there before.
        eos_token_ids: Tokens that end a text, behind all that was given.

    Returns:
        (rows,) each; they are the same where nothing was open.
    """
    length = texts.shape[1]
    columns = torch.arange(length).expand_as(texts)
    last_given = torch.where(is_given, columns, -1).amax(dim=-1, keepdim=True)
    is_end = torch.isin(texts, torch.tensor(eos_token_ids)) & (columns > last_given)
    starts = torch.where(is_open, columns, length).amin(dim=-1)
    return starts, torch.where(is_end, columns + 1, length).amin(dim=-1)


def _check_settings(args: GRPOConfig) -> None:
    """Raises a ValueError for settings that do not go together; lengths of 0 become None, as TRL has it."""
    given = args.generation_kwargs if isinstance(args.generation_kwargs, dict) else {}
    for name in given:
        if name in SET_ELSEWHERE:
            raise ValueError(f"`generation_kwargs` must not hold `{name}`, which is set by {SET_ELSEWHERE[name]}.")
    unknown = sorted(given.keys() - vars(EsoGenerationConfig()).keys())
    if unknown:
        raise ValueError(f"`generation_kwargs` must be settings of `generate`, and {unknown} are none.")
    if not all(math.isfinite(weight) for weight in args.reward_weights or ()):
        raise ValueError(f"`reward_weights` must be finite numbers, got {args.reward_weights}.")
    args.max_completion_length = args.max_completion_length or None
    if args.max_completion_length is None:
        for name, value in (("loss_type", "dr_grpo"), ("mask_truncated_completions", True)):
            if getattr(args, name) == value:
                raise ValueError(f"`{name}={value!r}` needs `max_completion_length`: set it.")


__all__ = ["EsoGRPOTrainer"]
