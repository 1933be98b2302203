"""GRPO on the exact likelihood of trajectories: what TRL makes of rollouts that keep their plans."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from policies import (
    END,
    MODES,
    arguments,
    length_reward,
    make_trainer,
    rolled_out,
    table_reward,
    tiny_language,
)
from tiny_models import backbone_config, random_batch, randomized_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)
from trl import GRPOTrainer

import eso_lm.evaluation_trajectories
from eso_lm.training_grpo import EsoGRPOTrainer, Rollouts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapters", [False, True])
def test_at_first_the_ratio_is_one_and_the_divergence_zero(policy, tmp_path, mode, adapters):
    lora = LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], lora_dropout=0.5) if adapters else None
    trainer = make_trainer(
        policy, tmp_path, peft_config=lora, beta=0.1, num_iterations=2, generation_kwargs=MODES[mode]
    )
    recorded = []
    note = trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    batch, log_probs, _ = rolled_out(trainer)
    mask = batch["completion_mask"].bool()
    assert mask.any(dim=1).all()
    assert log_probs.requires_grad
    ratio = (log_probs - batch["old_per_token_logps"])[mask].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    difference = (batch["ref_per_token_logps"] - log_probs)[mask]
    assert (difference.exp() - difference - 1).abs().max() <= 1e-5
    # And so it is against what `generate` itself says of its draws.
    is_written = recorded[0].unmasking_steps > 0
    assert is_written[~mask].sum() == 0
    torch.testing.assert_close(log_probs[is_written], recorded[0].log_probs[is_written], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_after_training_rollouts_are_still_those_of_the_policy(policy, tmp_path, adapters):
    """What decoding keeps of the weights, for speed, is that of the weights as they are now."""
    lora = LoraConfig(target_modules="all-linear") if adapters else None
    trainer = make_trainer(
        policy, tmp_path, peft_config=lora, learning_rate=3e-2, max_steps=3, generation_kwargs=MODES["parallel"]
    )
    recorded, note = [], trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    _, before, _ = rolled_out(trainer)
    trainer.train()
    _, log_probs, _ = rolled_out(trainer)
    is_written = recorded[-1].unmasking_steps > 0
    torch.testing.assert_close(log_probs[is_written], recorded[-1].log_probs[is_written], atol=2e-5, rtol=1e-4)
    rollouts = trainer._rollouts
    trainer._rollouts = Rollouts(recorded[0].trajectories, recorded[0].orders, recorded[0].groups, rollouts.is_real)
    moved, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, None)
    assert (moved - before).abs().max() > 0.1


def test_rollouts_are_written_in_evaluation_mode(policy, tmp_path, monkeypatch):
    """Without it none of them goes by the fast decoding step."""
    trainer, seen = make_trainer(policy, tmp_path), []
    generate = type(trainer.policy).generate

    def noted(model, *arguments, **settings):
        seen.append(model.training)
        return generate(model, *arguments, **settings)

    monkeypatch.setattr(type(trainer.policy), "generate", noted)
    rolled_out(trainer)
    assert seen == [False]
    assert trainer.model.training


def test_half_precision_trains(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, bf16=True, num_iterations=2, generation_kwargs=MODES["parallel"])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)


def test_the_temperature_is_that_of_the_rollouts(policy, tmp_path):
    model, tokenizer, data = policy
    trainer = make_trainer(
        (model, tokenizer, data.select([0, 2])), tmp_path, temperature=0.5, max_completion_length=4,
        generation_kwargs=MODES["parallel"],
    )  # fmt: skip
    assert trainer.generation_config.temperature == 0.5
    batch, log_probs, entropies = rolled_out(trainer)
    rollouts = trainer._rollouts
    scored = model.log_likelihood(
        rollouts.trajectories,
        attention_mask=rollouts.is_real,
        context_mask=1 - batch["completion_mask"],
        orders=rollouts.orders[:, None],
        groups=rollouts.groups[:, None],
        temperature=0.5,
        num_diffusion_steps=3,
    )
    torch.testing.assert_close(log_probs, scored.token_log_probs[:, 0], atol=2e-5, rtol=1e-4)
    assert (entropies[batch["completion_mask"] == 1] > 0).all()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox"])
def test_dropout_that_layers_hold_as_a_number_is_off_too(policy, tmp_path, kind):
    _, tokenizer, data = policy
    dropout = {"dropout": 0.3} if kind == "opt" else {"attention_dropout": 0.3}
    vocabulary = {"vocab_size": policy[0].config.vocab_size, "mask_token_id": policy[0].config.mask_token_id}
    config = backbone_config(kind, **dropout, vocab_size=vocabulary["vocab_size"])
    randomized_model(backbone_config=config, **vocabulary).save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    trainer = make_trainer((model, tokenizer, data), tmp_path, beta=0.1, num_iterations=2)
    batch, log_probs, _ = rolled_out(trainer)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(log_probs[mask], batch["old_per_token_logps"][mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs[mask], batch["ref_per_token_logps"][mask], atol=1e-5, rtol=0)


def test_a_copy_of_a_trained_policy_is_a_model_of_its_own(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path)
    make_trainer(policy, tmp_path)  # a second trainer of the same model
    copied = copy.deepcopy(trainer.policy)
    ids = random_batch(copied, 2, 5)
    torch.testing.assert_close(copied(ids).logits, trainer.policy(ids).logits, atol=1e-4, rtol=0)
    with torch.no_grad():
        copied.lm_head.bias.add_(torch.arange(len(copied.lm_head.bias)))
    assert (copied(ids).logits - trainer.policy(ids).logits)[..., 7].min() > 6
    copied(ids, labels=ids, loss_weights=torch.ones(2, 5)).loss.backward()
    assert copied.lm_head.bias.grad is not None
    assert trainer.policy.lm_head.bias.grad is None


def test_a_reference_needs_a_model_that_was_loaded(policy, tmp_path):
    _, tokenizer, data = policy
    vocabulary = {"vocab_size": policy[0].config.vocab_size, "mask_token_id": policy[0].config.mask_token_id}
    made = (randomized_model(**vocabulary), tokenizer, data)
    with pytest.raises(ValueError, match="has been made and not loaded, so that TRL finds no reference"):
        make_trainer(made, tmp_path, beta=0.1)
    make_trainer(made, tmp_path)
    make_trainer(made, tmp_path, beta=0.1, peft_config=LoraConfig(target_modules=["q_proj"]))


def test_dropout_is_off_in_the_policy_and_in_its_reference(policy, tmp_path):
    assert policy[0].config.hidden_dropout == 0.3
    trainer = make_trainer(policy, tmp_path, beta=0.1)
    rates = [
        module.p for model in (trainer.model, trainer.ref_model) for module in model.modules() if hasattr(module, "p")
    ]
    assert rates
    assert set(rates) == {0.0}


def test_a_broken_group_horizon_is_seen(policy, tmp_path, monkeypatch):
    trainer = make_trainer(policy, tmp_path, generation_kwargs=MODES["parallel"])
    batch, right, _ = rolled_out(trainer)
    states_at = eso_lm.evaluation_trajectories.states_at
    monkeypatch.setattr(eso_lm.evaluation_trajectories, "states_at", lambda *inputs: states_at(*inputs[:8], None))
    broken, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, None)
    assert (broken - right)[batch["completion_mask"].bool()].abs().max() > 1e-2


@pytest.mark.parametrize("length", [None, 0])
def test_holes_alone_are_filled_in(policy, tmp_path, length):
    model, tokenizer, data = policy
    trainer = make_trainer((model, tokenizer, data.select([1, 3])), tmp_path, max_completion_length=length)
    batch, log_probs, _ = rolled_out(trainer)
    assert batch["completion_mask"].sum(dim=1).tolist() == [3] * 8
    assert (log_probs[batch["completion_mask"] == 0] == 0).all()
    plain = make_trainer(policy, tmp_path, max_completion_length=length)
    for rows in ([1, 0], [0]):
        with pytest.raises(ValueError, match="nothing to write for a prompt without holes"):
            rolled_out(plain, [policy[2][row] for row in rows])


def test_forwards_are_counted(policy, tmp_path):
    model, tokenizer, data = policy
    trainer = make_trainer(
        (model, tokenizer, data.select([0, 2])), tmp_path, max_completion_length=12,
        generation_kwargs={"alpha_0": 1.0, "num_diffusion_steps": 3, "unmasking_order": "strided"},
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rollouts/forwards"] == 3
    assert row["rollouts/tokens"] == 12
    assert row["rollouts/tokens_per_forward"] == pytest.approx(4)


def test_forwards_of_lossless_rollouts_are_counted(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    trainer = EsoGRPOTrainer(
        model, table_reward,
        arguments(tmp_path, max_completion_length=12, generation_kwargs={"lossless": True, "draft_length": 4}),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer,
    )  # fmt: skip
    recorded, note = [], trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    rolled_out(trainer)
    assert trainer._metrics["train"]["rollouts/forwards"] == [recorded[0].forwards_per_row.float().mean().item()]
    assert trainer._metrics["train"]["rollouts/tokens_per_forward"][0] > 1


def test_tokens_behind_the_end_count_and_texts_end_there(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    trainer = EsoGRPOTrainer(
        model, table_reward, arguments(tmp_path, max_completion_length=6, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b a"]}), processing_class=tokenizer,
    )  # fmt: skip
    seen = []
    trainer.reward_funcs = [
        lambda completion_ids, **columns: seen.extend(completion_ids) or [0.0] * len(completion_ids)
    ]
    batch, *_ = rolled_out(trainer, [row for row in trainer.train_dataset for _ in range(8)])
    assert all(ids.index(END) == len(ids) - 1 for ids in seen if END in ids)
    lengths = torch.tensor([len(ids) for ids in seen])
    counted = batch["completion_mask"].sum(dim=1)
    assert (counted >= lengths).all()
    assert (counted > lengths).any()
    assert batch["num_items_in_batch"] == counted.sum()
    # What was never decided, since the text had ended, counts nothing.
    is_open = batch["completion_ids"] == 3
    assert is_open.any()
    assert not batch["completion_mask"][is_open].any()


def test_texts_end_where_the_tokenizer_says_if_the_model_says_nothing(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0, eos_token_id=None)
    trainer = EsoGRPOTrainer(
        model, table_reward, arguments(tmp_path, max_completion_length=6, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer,
    )  # fmt: skip
    batch, *_ = rolled_out(trainer, [trainer.train_dataset[0]] * 16)
    assert (batch["completion_ids"] == 3).any()


def test_an_end_in_a_hole_before_what_is_given_ends_nothing(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    seen = []

    def reward(completion_ids, **columns):
        seen.extend(completion_ids)
        return [0.0] * len(completion_ids)

    trainer = EsoGRPOTrainer(
        model, reward, arguments(tmp_path, max_completion_length=None, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["b m a m"]}), processing_class=tokenizer,
    )  # fmt: skip
    rolled_out(trainer, [trainer.train_dataset[0]] * 32)
    assert {len(ids) for ids in seen} == {3}
    assert any(ids[0] == END for ids in seen)
    assert all(ids[1] == 0 for ids in seen)


def test_padding_of_prompts_is_told_to_a_model_with_learned_positions(tmp_path):
    model = randomized_model(backbone_config=backbone_config("opt", vocab_size=4), vocab_size=4)
    _, tokenizer = tiny_language()
    trainer = EsoGRPOTrainer(
        model, table_reward, arguments(tmp_path, max_completion_length=4, num_generations=2, num_iterations=2),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b a a b"]}), processing_class=tokenizer,
    )  # fmt: skip
    recorded, note = [], trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    _, log_probs, _ = rolled_out(trainer)
    is_written = recorded[0].unmasking_steps > 0
    torch.testing.assert_close(log_probs[is_written], recorded[0].log_probs[is_written], atol=2e-5, rtol=1e-4)


def test_completions_that_were_cut_off_are_left_out_if_asked(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    trainer = EsoGRPOTrainer(
        model, table_reward,
        arguments(tmp_path, max_completion_length=2, num_generations=2, mask_truncated_completions=True),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer,
    )  # fmt: skip
    batch, *_ = rolled_out(trainer, [trainer.train_dataset[0]] * 32)
    has_end = (batch["completion_ids"][:, 1:] == END).any(dim=1)
    assert has_end.any()
    assert not has_end.all()
    assert torch.equal(batch["completion_mask"].any(dim=1), has_end)


@pytest.mark.parametrize("settings", [
    {"loss_type": "grpo", "num_iterations": 2, "beta": 0.05},
    {"loss_type": "bnpo", "steps_per_generation": 2, "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.5},
    {"loss_type": "cispo", "entropy_coef": 0.01, "epsilon_high": 5.0},
    {"loss_type": "grpo", "gradient_checkpointing": True},
])  # fmt: skip
def test_settings_of_trl_train(policy, tmp_path, settings):
    trainer = make_trainer(policy, tmp_path, generation_kwargs=MODES["parallel"], max_steps=3, **settings)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in logged)
    assert any((weight != before[name]).any() for name, weight in trainer.model.named_parameters())


def test_a_reward_is_learned(tmp_path):
    model, tokenizer = tiny_language(alpha_0=0.5)

    def likes_b(completion_ids, **columns):
        return [ids.count(1) / 4 for ids in completion_ids]

    trainer = EsoGRPOTrainer(
        model, likes_b,
        arguments(tmp_path, per_device_train_batch_size=32, num_generations=16, max_completion_length=4, max_steps=30,
                  learning_rate=1e-3, generation_kwargs={"num_diffusion_steps": 2}),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9


def test_evaluation_has_rollouts_of_its_own(policy, tmp_path):
    model, tokenizer, data = policy
    trainer = EsoGRPOTrainer(
        model, length_reward, arguments(tmp_path, per_device_eval_batch_size=4, num_generations_eval=2),
        train_dataset=data, eval_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] > 0
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_rollouts/forwards" in metrics


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(policy_folder, policy, tmp_path, adapters):
    def run(where, **settings):
        lora = LoraConfig(target_modules=["q_proj", "o_proj"]) if adapters else None
        fresh = (AutoModel.from_pretrained(policy_folder), *policy[1:])
        return make_trainer(
            fresh, where, peft_config=lora, max_steps=4, save_strategy="steps", save_steps=2, beta=0.05,
            generation_kwargs=MODES["parallel"], **settings,
        )  # fmt: skip

    whole, resumed = run(tmp_path / "run"), run(tmp_path / "run")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    others = dict(resumed.model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in whole.model.named_parameters())
    rewards = [[row["reward"] for row in run.state.log_history if "reward" in row] for run in (whole, resumed)]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 4


def test_a_trained_policy_is_saved_and_loaded_by_name(policy_folder, policy, tmp_path):
    trainer = EsoGRPOTrainer(
        str(policy_folder), length_reward, arguments(tmp_path), train_dataset=policy[2], processing_class=policy[1]
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_batch(loaded, 2, 5)
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize(("settings", "message"), [
    ({"generation_kwargs": {"entropy_bound": 0.5}}, "Adaptive unmasking .* has no likelihood in one pass"),
    ({"generation_kwargs": {"do_sample": False}}, "`do_sample=False` writes the same rollout"),
    ({"generation_kwargs": {"alpha_0": 1.5}}, "`alpha_0`"),
    ({"use_vllm": True}, "`use_vllm` makes rollouts whose plan is not known"),
    ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching` makes rollouts"),
    ({"max_completion_length": None, "loss_type": "dr_grpo"}, "`loss_type='dr_grpo'` needs `max_completion_length`"),
    ({"max_completion_length": 0, "mask_truncated_completions": True}, "`mask_truncated_completions=True` needs"),
    ({"generation_kwargs": {"num_difusion_steps": 3}}, r"\['num_difusion_steps'\] are none"),
    ({"generation_kwargs": {"temperature": 0.3}}, "must not hold `temperature`, which is set by `temperature`"),
    ({"generation_kwargs": {"max_new_tokens": 3}}, "which is set by `max_completion_length`"),
    ({"generation_kwargs": {"num_return_sequences": 2}}, "which is set by `num_generations`"),
    ({"reward_weights": [math.nan]}, "`reward_weights` must be finite numbers"),
])  # fmt: skip
def test_rollouts_without_a_plan_are_refused(policy, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(policy, tmp_path, **settings)


def test_more_that_is_refused(policy, tmp_path):
    model, tokenizer, data = policy
    with pytest.raises(ValueError, match="`rollout_func` makes rollouts whose plan is not known"):
        EsoGRPOTrainer(
            model, length_reward, arguments(tmp_path), train_dataset=data, processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: {},
        )  # fmt: skip
    with pytest.raises(ValueError, match="call the column of the dataset otherwise"):
        make_trainer((model, tokenizer, data.add_column("texts", [""] * 4)), tmp_path).train()
    model.generation_config.confidence_threshold = 0.5
    with pytest.raises(ValueError, match="Adaptive unmasking"):
        make_trainer(policy, tmp_path)
    llama = AutoModelForCausalLM.from_config(backbone_config("llama", vocab_size=300))
    with pytest.raises(ValueError, match="`model` must be an Eso-LM, got LlamaForCausalLM"):
        make_trainer((llama, tokenizer, data), tmp_path)


def test_trls_own_trainer_is_refused_before_it_trains(policy, tmp_path):
    model, tokenizer, data = policy
    with pytest.raises(ValueError, match="train with `EsoGRPOTrainer` or `EsoDPOTrainer` in place of TRL's own"):
        GRPOTrainer(model, length_reward, arguments(tmp_path), train_dataset=data, processing_class=tokenizer)
    make_trainer(policy, tmp_path)  # and ours may follow
    with pytest.raises(ValueError, match="in place of TRL's own"):
        GRPOTrainer(model, length_reward, arguments(tmp_path), train_dataset=data, processing_class=tokenizer)


def test_draft_heads_write_rollouts_only_where_they_do_not_change_what_is_drawn(policy, tmp_path):
    model, tokenizer, data = policy
    headed = randomized_model(
        draft_rank=4, **{"vocab_size": model.config.vocab_size, "mask_token_id": model.config.mask_token_id}
    )
    policy = (headed, tokenizer, data)
    with pytest.raises(ValueError, match="`use_draft_head=True` is for `lossless` rollouts"):
        make_trainer(policy, tmp_path, generation_kwargs={"use_draft_head": True, "num_diffusion_steps": 2})
    for settings, uses in (({"num_diffusion_steps": 2}, False), ({"lossless": True}, None)):
        trainer = make_trainer(policy, tmp_path, generation_kwargs=settings, num_iterations=2)
        assert trainer.generation_config.use_draft_head is uses
        batch, log_probs, _ = rolled_out(trainer)
        mask = batch["completion_mask"].bool()
        torch.testing.assert_close(log_probs[mask], batch["old_per_token_logps"][mask], atol=1e-5, rtol=0)


def test_chats_are_rolled_out(policy, tmp_path):
    model, tokenizer, _ = policy
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "The quick?"}]] * 4})
    seen = []

    def reward(prompts, completions, texts, **columns):
        seen.extend(zip(prompts, completions, texts, strict=True))
        return [float(len(text)) for text in texts]

    make_trainer((model, tokenizer, chats), tmp_path, reward, max_steps=1).train()
    prompt, completion, text = seen[0]
    assert prompt[0]["content"] == "The quick?"
    assert completion[0]["role"] == "assistant"
    assert text == "user: The quick?\nassistant:" + completion[0]["content"]


def test_logs_are_json(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, beta=0.1)
    trainer.train()
    row = json.loads(json.dumps(trainer.state.log_history))[0]
    assert abs(row["kl"]) <= 1e-5
