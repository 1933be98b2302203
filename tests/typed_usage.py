"""Every public name of `eso_lm` as users write it, for mypy alone: `make lint` checks this file, strictly.

`assert_type` fails where a type has been lost, to Any too, and an ignored error where there is none. What transformers
5.23 leaves untyped is so here: `model(...)`, `model.eval()`, tokenizers and whatever comes from an Auto class. Nor do
checkers know of keywords that its configurations take beside their fields, such as `attn_implementation`.
"""

from dataclasses import replace
from typing import Any, Literal, assert_type

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

import eso_lm
from eso_lm import (
    DataCollatorForDraftHead,
    DataCollatorForHybridMaskedDiffusion,
    EsoBatchingManager,
    EsoBatchingMixin,
    EsoConfig,
    EsoForMaskedDiffusion,
    EsoGenerateOutput,
    EsoGenerationConfig,
    EsoGenerationMixin,
    EsoGenerationStep,
    EsoLikelihoodMixin,
    EsoLikelihoodOutput,
    EsoModel,
    EsoNelboOutput,
    EsoRequestOutput,
    EsoTrajectoryOutput,
    ExponentialMovingAverageCallback,
    HeldOutEvaluationCallback,
    trajectory_log_probs,
)


def configure(backbone: PreTrainedConfig) -> EsoConfig:
    config = EsoConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alpha_0=0.25)
    # Left to their defaults, and worked out.
    assert_type(config.mask_token_id, int)
    assert_type(config.intermediate_size, int)
    assert_type(config.alpha_0, float)
    assert_type(config.eos_token_id, int | list[int] | None)
    EsoConfig(backbone_config=backbone)
    EsoConfig(backbone_config={"model_type": "llama"})
    EsoConfig(mask_token=99)  # type: ignore[call-arg]
    EsoConfig(alpha_0="all")  # type: ignore[arg-type]
    assert_type(EsoConfig.from_pretrained("folder"), EsoConfig)
    return config


def load(config: EsoConfig, causal: PreTrainedModel) -> EsoForMaskedDiffusion:
    model = EsoForMaskedDiffusion(config)
    assert_type(model.config, EsoConfig)
    assert_type(model.generation_config, EsoGenerationConfig)
    assert_type(model.model, PreTrainedModel)
    assert_type(model.lm_head, nn.Linear)
    assert_type(model.get_input_embeddings(), nn.Embedding)
    assert_type(model.max_text_length, int | None)
    assert_type(model.device, torch.device)
    model.save_pretrained("folder", max_shard_size="1GB")
    assert_type(EsoForMaskedDiffusion.from_causal_lm("gpt2", alpha_0=0.5, dtype="auto"), EsoForMaskedDiffusion)
    assert_type(EsoForMaskedDiffusion.from_causal_lm(causal, mask_token_id=7), EsoForMaskedDiffusion)
    loaded = EsoForMaskedDiffusion.from_pretrained("folder", dtype=torch.bfloat16, alpha_0=1.0)
    assert_type(loaded, EsoForMaskedDiffusion)
    return loaded


def run(model: EsoForMaskedDiffusion, input_ids: torch.Tensor) -> torch.Tensor | None:
    output: CausalLMOutputWithPast = model(input_ids=input_ids, labels=input_ids)
    assert_type(model.compute_logits(torch.zeros(1, 64)), torch.Tensor)
    with model.ready_to_decode():
        model(input_ids=input_ids, use_cache=True)
    return output.loss


def run_backbone(config: EsoConfig, input_ids: torch.Tensor) -> Any:
    backbone = EsoModel(config)
    assert_type(backbone.config, EsoConfig)
    assert_type(EsoModel.from_pretrained("folder"), EsoModel)
    return backbone(input_ids).last_hidden_state


def generate_many(model: EsoForMaskedDiffusion) -> EsoBatchingManager:
    mixin: EsoBatchingMixin = model
    results = mixin.generate_batch([[1, 2], []], max_new_tokens=8, alpha_0=0.5, seed=0, num_return_sequences=2)
    assert_type(results, dict[str, EsoRequestOutput])
    assert_type(results["req_0"].sequence, list[int])
    assert_type(results["req_0"].finish_reason, str | None)
    manager = model.init_continuous_batching(EsoGenerationConfig(alpha_0=1.0))
    manager.start()
    assert_type(manager.add_request([1, 2], "name", max_new_tokens=4, streaming=True, seed=1), str | None)
    with manager.pause():
        assert_type(manager.metrics(), dict[str, int])
    return manager


def generate(model: EsoForMaskedDiffusion, prompts: torch.Tensor) -> torch.Tensor:
    settings = EsoGenerationConfig(alpha_0=0.5, num_diffusion_steps="max", max_new_tokens=8)
    assert_type(settings.alpha_0, float | None)
    assert_type(settings.num_diffusion_steps, int | Literal["max"] | None)
    assert_type(settings.is_adaptive, bool)
    assert_type(EsoGenerationConfig.from_model_config(model.config), EsoGenerationConfig)
    settings.lossless = "yes"  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    output = model.generate(prompts, settings, generator=generator, return_dict_in_generate=True)
    assert_type(output, EsoGenerateOutput | torch.Tensor)
    if isinstance(output, torch.Tensor):
        return output
    assert_type(output.num_function_evaluations, int | None)
    assert_type(output.log_probs, torch.Tensor | None)
    assert_type(output.orders, torch.Tensor | None)
    assert_type(output.past_key_values, Cache | None)
    return assert_type(output.sequences, torch.Tensor)


def watch(step: EsoGenerationStep) -> dict[int, int]:
    assert_type(step.tokens, torch.Tensor)
    assert_type(step.number, int)
    return step.drafts | step.refused


def sample(model: EsoGenerationMixin) -> EsoGenerateOutput | torch.Tensor:
    return model.generate(max_new_tokens=8, num_return_sequences=2)


def score(model: EsoLikelihoodMixin, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    likelihood = model.log_likelihood(input_ids, mask, num_orders="all", alpha_0=1.0, batch_size=4)
    assert_type(likelihood, EsoLikelihoodOutput)
    assert_type(likelihood.log_likelihood, torch.Tensor)
    assert_type(likelihood.token_log_probs, torch.Tensor | None)
    assert_type(likelihood.orders, torch.Tensor | None)
    model.log_likelihood(input_ids, num_orders="most")  # type: ignore[arg-type]
    generators = [torch.Generator() for _ in input_ids]
    sampler = model.log_likelihood(input_ids, num_orders=4, generator=generators, num_diffusion_steps=8)
    assert_type(sampler.groups, torch.Tensor | None)
    assert_type(sampler.num_function_evaluations, torch.Tensor | None)
    model.log_likelihood(input_ids, orders=sampler.orders, groups=sampler.groups)
    nelbo = model.nelbo(input_ids, context_mask=mask, num_draws=8, generator=torch.Generator())
    assert_type(nelbo, EsoNelboOutput)
    assert_type(nelbo.nelbo, torch.Tensor)
    assert_type(nelbo.standard_error, torch.Tensor | None)
    return nelbo.nelbo + likelihood.log_likelihood


def reinforce(model: EsoForMaskedDiffusion, output: EsoGenerateOutput) -> torch.Tensor:
    assert_type(output.trajectories, torch.Tensor | None)
    if output.trajectories is None or output.orders is None or output.groups is None:
        raise ValueError
    scored = trajectory_log_probs(model, output.trajectories, output.orders, output.groups, temperature=0.7)
    assert_type(scored, EsoTrajectoryOutput)
    assert_type(scored.entropy, torch.Tensor | None)
    trajectory_log_probs(model, output.trajectories)  # type: ignore[call-arg]
    return output.trajectories if scored.log_probs is None else scored.log_probs


def train(model: EsoForMaskedDiffusion, tokenizer: PreTrainedTokenizerBase, texts: list[dict[str, list[int]]]) -> None:
    collator = DataCollatorForHybridMaskedDiffusion(tokenizer, config=model.config)
    assert_type(collator.mask_token_id, int)
    assert_type(collator.alpha_0, float)
    assert_type(collator(texts), dict[str, torch.Tensor])
    assert_type(replace(collator, loss_type="elbo", seed=0), DataCollatorForHybridMaskedDiffusion)
    assert_type(
        DataCollatorForDraftHead(tokenizer, config=model.config, draft_length=4)(texts), dict[str, torch.Tensor]
    )
    trainer = Trainer(model, TrainingArguments("folder"), data_collator=collator)
    average = ExponentialMovingAverageCallback(trainer, decay=0.999)
    held_out = HeldOutEvaluationCallback(trainer, texts, every=100, tokenizer=tokenizer, average=average)
    HeldOutEvaluationCallback(trainer, texts, samplers={"8_steps": {"num_diffusion_steps": 8}})
    trainer.add_callback(average)
    trainer.add_callback(held_out)
    assert_type(average.averages, dict[str, torch.Tensor])
    assert_type(held_out.evaluate(model), dict[str, float])
    assert_type(held_out.sample(model), list[str])
    with average.applied():
        trainer.save_model("average")


def misspell() -> Any:
    return eso_lm.EsoForMaskedDifusion  # type: ignore[attr-defined]
