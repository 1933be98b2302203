"""DPO on exact likelihoods: both answers of a pair, and the reference, under the same order."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from recipe_runs import QUICK_POST_TRAINING
from tiny_models import save_with_tokenizer
from transformers import AutoModel, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from eso_lm.generation_order import order_probability
from eso_lm.training_dpo import DataCollatorForPairsInOrder, EsoDPOTrainer

PAIRS = {
    "prompt": ["The quick", "jumps", "", "lazy"],
    "chosen": [" brown fox", " over the lazy dog", " a dog", " dog"],
    "rejected": [" dog", " lazy fox", " x", " quick brown fox jumps"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_with_tokenizer(folder, hidden_dropout=0.3)
    return folder


def make_trainer(folder, output_dir, pairs=PAIRS, model=None, peft_config=None, alpha_0=None, **settings):
    defaults = QUICK_POST_TRAINING | {"per_device_train_batch_size": 4, "max_steps": 1}
    return EsoDPOTrainer(
        model or AutoModel.from_pretrained(folder),
        None,
        DPOConfig(str(output_dir), **defaults | settings),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=peft_config,
        alpha_0=alpha_0,
    )


def pairs_of(lengths, alpha_0):
    """A batch of pairs whose answers have these lengths, behind prompts of 2 tokens."""
    examples = [{"prompt_ids": [7, 8], "chosen_ids": [1] * one, "rejected_ids": [2] * other} for one, other in lengths]
    return DataCollatorForPairsInOrder(DataCollatorForPreference(pad_token_id=0), alpha_0, 99)(examples)


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_both_answers_have_the_same_order(alpha_0):
    torch.manual_seed(0)
    batch = pairs_of([(6, 4), (3, 7), (5, 5)] * 20, alpha_0)
    real = batch["attention_mask"].sum(dim=1).tolist()
    orders = [order[2:length] for order, length in zip(batch["orders"].tolist(), real, strict=True)]
    assert all(order[:2] == [0, 1] for order in batch["orders"].tolist())
    assert all(sorted(order) == list(range(2, len(order) + 2)) for order in orders)
    for one, other in zip(orders[:60], orders[60:], strict=True):
        shorter, longer = sorted((one, other), key=len)
        assert [column for column in longer if column in shorter] == shorter
    is_ascending = [order == sorted(order) for order in orders]
    assert all(is_ascending) if alpha_0 == 0 else not all(is_ascending)
    groups = [group[:length] for group, length in zip(batch["groups"].tolist(), real, strict=True)]
    assert all(group == [0, 0, *range(1, len(group) - 1)] for group in groups)


def test_each_answer_alone_has_the_order_of_generation():
    torch.manual_seed(0)
    rows = 6000
    batch = pairs_of([(3, 4)] * rows, 0.4)
    for answers, length in ((batch["orders"][:rows], 3), (batch["orders"][rows:], 4)):
        drawn = [tuple(order) for order in (answers[:, 2 : 2 + length] - 2).tolist()]
        possible = list(itertools.permutations(range(length)))
        expected = [rows * order_probability(list(order), 0.4) for order in possible]
        counts = [drawn.count(order) for order in possible]
        cells = [(count, mean) for count, mean in zip(counts, expected, strict=True) if mean > 0]
        assert sum(count for count, _ in cells) == rows
        statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
        assert statistic < (len(cells) - 1) + 4 * math.sqrt(2 * (len(cells) - 1))


@pytest.mark.parametrize("alpha_0", [0.0, 0.5])
@pytest.mark.parametrize("adapters", [False, True])
def test_answers_have_their_exact_likelihood(folder, tmp_path, alpha_0, adapters):
    lora = LoraConfig(target_modules=["q_proj", "o_proj"], lora_dropout=0.5) if adapters else None
    trainer = make_trainer(folder, tmp_path, peft_config=lora, alpha_0=alpha_0)
    seen = []
    collator = trainer.data_collator
    trainer.data_collator = lambda examples: seen.append(collator(examples)) or seen[-1]
    trainer.train()
    batch, row = seen[0], trainer.state.log_history[0]
    # One of the prompts is empty: a column of padding stands before its answers, which TRL does not look at.
    assert batch["input_ids"].shape[1] == batch["orders"].shape[1]
    assert not batch["attention_mask"][:, 0].any()
    expected = (
        AutoModel.from_pretrained(folder)
        .log_likelihood(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            context_mask=1 - batch["completion_mask"],
            orders=batch["orders"][:, None],
        )
        .log_likelihood
    )
    assert row["logps/chosen"] == pytest.approx(expected[:4].mean().item(), abs=1e-3)
    assert row["logps/rejected"] == pytest.approx(expected[4:].mean().item(), abs=1e-3)
    real = batch["attention_mask"].sum(dim=-1).tolist()
    orders = [order[:count] for order, count in zip(batch["orders"].tolist(), real, strict=True)]
    assert all(order == sorted(order) for order in orders) == (alpha_0 == 0)
    # At first model and reference are one.
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(row["rewards/margins"]) < 1e-5
    assert row["grad_norm"] > 0


def test_preferences_are_learned(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, max_steps=40, learning_rate=3e-4, logging_steps=1)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["loss"] < 0.4
    assert rows[-1]["rewards/margins"] > 0.5
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("settings", [
    {"loss_type": ["ipo"]}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"use_weighting": True},
    {"ld_alpha": 0.5}, {"gradient_checkpointing": True}, {"max_length": 12},
])  # fmt: skip
def test_settings_of_trl_train(folder, tmp_path, settings):
    trainer = make_trainer(folder, tmp_path, max_steps=2, **settings)
    trainer.train()
    row = trainer.state.log_history[0]
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] > 0


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(folder, tmp_path):
    whole, resumed = (
        make_trainer(folder, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-3)
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    others = dict(resumed.model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in whole.model.named_parameters())


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="`precompute_ref_log_probs` scores under other orders"):
        make_trainer(folder, tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="`alpha_0`"):
        make_trainer(folder, tmp_path, alpha_0=2.0)
    with pytest.raises(ValueError, match="train with `EsoGRPOTrainer` or `EsoDPOTrainer`"):
        DPOTrainer(
            AutoModel.from_pretrained(folder),
            args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=Dataset.from_dict(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
    holes = PAIRS | {"chosen": [AutoTokenizer.from_pretrained(folder).mask_token] * 4}
    with pytest.raises(ValueError, match="Pairs must be text without holes"):
        make_trainer(folder, tmp_path, pairs=holes).train()
    made = type(AutoModel.from_pretrained(folder))(AutoModel.from_pretrained(folder).config)
    made.config._name_or_path = ""
    with pytest.raises(ValueError, match="has been made and not loaded"):
        make_trainer(folder, tmp_path, model=made)
    trainer = make_trainer(folder, tmp_path)
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(ValueError, match=r"depends on its plan: the batch lacks \['groups', 'orders'\]"):
        trainer.train()
