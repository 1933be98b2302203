"""Averaged weights are what they say."""

import pytest
import torch
from tiny_models import randomized_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion, ExponentialMovingAverageCallback


class RecordWeights(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.lm_head.weight.detach().clone())


def test_averages_are_what_they_say(tmp_path):
    model = randomized_model().train()
    rows = [{"input_ids": torch.randint(0, 23, (12,))} for _ in range(16)]
    arguments = TrainingArguments(str(tmp_path), max_steps=12, learning_rate=1e-2, use_cpu=True, report_to="none")
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=23, alpha_0=0.5)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
    record, average = RecordWeights(), ExponentialMovingAverageCallback(trainer, decay=0.6)
    trainer.add_callback(average)
    trainer.add_callback(record)
    trainer.train()
    expected = record.weights[0].double()
    for step, weight in enumerate(record.weights[1:], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.double()
    trained = model.lm_head.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.lm_head.weight.double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.lm_head.weight, trained)
    average.save(tmp_path / "average")
    saved = EsoForMaskedDiffusion.from_pretrained(tmp_path / "average").lm_head.weight
    torch.testing.assert_close(saved.double(), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="`resume_from` must be a checkpoint with averaged weights"):
        ExponentialMovingAverageCallback(trainer, resume_from=tmp_path)
