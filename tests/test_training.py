"""The unmodified Trainer and PEFT: training, evaluation, accumulation, workers, adapters."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tiny_models import randomized_model, tiny_config
from transformers import AutoModel, Trainer, TrainerCallback, TrainingArguments

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion

MASK, PAD = 23, 22
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


class RecordGradients(TrainerCallback):
    def __init__(self, gradients: dict):
        self.gradients = gradients

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def counting_dataset(rows: int = 64, length: int = 12) -> Dataset:
    """Each row counts upwards from its own start, modulo 20: learnable from any one token."""
    return Dataset.from_dict({"input_ids": [[(row + i) % 20 for i in range(length)] for row in range(rows)]})


def prompt_dataset(rows: int = 16) -> Dataset:
    """Prompts of 3 tokens (label -100) and completions of different lengths."""
    inputs = [[(row + i) % 20 for i in range(5 + row % 4)] for row in range(rows)]
    labels = [[-100] * 3 + ids[3:] for ids in inputs]
    attention = [[1] * len(ids) for ids in inputs]
    return Dataset.from_dict({"input_ids": inputs, "labels": labels, "attention_mask": attention})


def make_trainer(model, tmp_path, train=None, collator=None, **arguments) -> Trainer:
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    train = counting_dataset() if train is None else train
    collator = collator or DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK, pad_token_id=PAD, alpha_0=0.5)
    return Trainer(
        model,
        TrainingArguments(**defaults | arguments),
        data_collator=collator,
        train_dataset=train,
        eval_dataset=train,
    )


@pytest.mark.slow
def test_training_lowers_the_held_out_nelbo_and_the_model_generates(tmp_path):
    model = EsoForMaskedDiffusion(tiny_config(hidden_dropout=0.0))
    trainer = make_trainer(model, tmp_path, max_steps=150, per_device_train_batch_size=32, learning_rate=1e-2)
    trainer.data_collator = replace(trainer.data_collator, seed=0)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before, "a seeded evaluation repeats itself"
    trainer.data_collator = replace(trainer.data_collator, seed=None)
    trainer.train()
    trainer.data_collator = replace(trainer.data_collator, seed=0)
    after = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(math.log(23), rel=0.15)  # uniform over 23 tokens
    assert after < 0.5 * before
    samples = model.eval().generate(max_new_tokens=12, num_return_sequences=8, alpha_0=0.0)
    steps_up = (samples[:, 1:] - samples[:, :-1]) % 20 == 1
    assert steps_up.float().mean() > 0.7


def test_accumulation_workers_evaluation_and_padding(tmp_path):
    """Prompt-masked examples of several lengths, in two workers, with accumulation, mixed precision, checkpointing."""
    model = EsoForMaskedDiffusion(tiny_config())
    trainer = make_trainer(
        model,
        tmp_path,
        prompt_dataset(),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        dataloader_num_workers=2,
        max_steps=3,
        gradient_checkpointing=True,
        bf16=True,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 8 for loss in losses)
    assert 0 < trainer.evaluate()["eval_loss"] < 8


def test_accumulated_gradients_are_those_of_the_whole(tmp_path):
    """Two half batches, with the valid tokens of both as `num_items_in_batch`, give the gradient of their sum."""
    model = randomized_model(hidden_dropout=0.0).train()
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK, pad_token_id=PAD, alpha_0=0.5, seed=0)
    rows = list(prompt_dataset())
    halves = [collator(rows[:5]), collator(rows[5:16])]
    items = sum((half["labels"] != -100).sum() for half in halves)
    sum(model(**half, num_items_in_batch=items).loss for half in halves).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    trainer = make_trainer(
        model,
        tmp_path,
        collator=lambda examples: halves[examples[0]["index"]],
        train=Dataset.from_dict({"index": [0, 1]}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    recorded = {}
    trainer.add_callback(RecordGradients(recorded))
    trainer.train()
    for name, gradient in expected.items():
        torch.testing.assert_close(recorded[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task_type", [None, TaskType.CAUSAL_LM])
def test_lora_trains_saves_loads_merges_and_generates(tmp_path, task_type):
    base = randomized_model()
    frozen = {name: parameter.clone() for name, parameter in base.state_dict().items()}
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=LORA_TARGETS, task_type=task_type))
    trainer = make_trainer(model, tmp_path, prompt_dataset(), max_steps=4, learning_rate=3e-2)
    trainer.train()
    model.eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert len(trained) == 2 * len(LORA_TARGETS)
    assert all(parameter.any() for parameter in trained.values())
    for name, parameter in model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = torch.arange(10)[None]
    order = torch.tensor([[3, 1, 0, 2, 9, 8, 7, 5, 6, 4]])
    logits = model(input_ids=ids, position_ids=order).logits
    torch.testing.assert_close(loaded(input_ids=ids, position_ids=order).logits, logits)

    torch.manual_seed(0)
    samples = model.generate(input_ids=ids, max_new_tokens=6)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids, position_ids=order).logits, logits, atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(merged.generate(ids, max_new_tokens=6), samples)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_adapters_on_every_linear_layer_and_no_soft_prompts():
    ids = torch.arange(10)[None]
    lora = get_peft_model(randomized_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any("modulation" in name for name, _ in lora.named_modules() if name.endswith("lora_A"))
    torch.testing.assert_close(lora(input_ids=ids).logits, randomized_model()(ids).logits)
    prompts = get_peft_model(randomized_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt learning"):
        prompts.generate(input_ids=ids, max_new_tokens=3)
