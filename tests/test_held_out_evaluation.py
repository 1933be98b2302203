"""The callback: the same texts and noise at each evaluation, and no trace in the training."""

import itertools
import math

import pytest
import torch
from tiny_models import random_batch, randomized_model, tiny_tokenizer
from transformers import Trainer, TrainingArguments

from eso_lm import DataCollatorForHybridMaskedDiffusion, HeldOutEvaluationCallback

MASK = 23


def train(tmp_path, every=None, callback=True, samplers=None, **arguments):
    torch.manual_seed(0)
    model = randomized_model(vocab_size=300, mask_token_id=MASK, hidden_dropout=0.1)
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": row.tolist()} for row in random_batch(model, 16, 6) % MASK]
    held_out = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7], "labels": [-100, 5, 6, 7]}]
    settings = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **settings | arguments),
        data_collator=DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK, alpha_0=0.5),
        train_dataset=rows,
        eval_dataset=rows[:4],
    )
    if callback:
        evaluation = HeldOutEvaluationCallback(
            trainer,
            held_out,
            every=every,
            tokenizer=tokenizer,
            generation_settings={"max_new_tokens": 5},
            samplers=samplers,
        )
        trainer.add_callback(evaluation)
    trainer.train()
    return trainer


def test_reports_are_logged_and_repeat(tmp_path):
    trainer = train(tmp_path, every=2, learning_rate=0.0)
    reports = [entry for entry in trainer.state.log_history if "held_out_nelbo" in entry]
    assert [entry["step"] for entry in reports] == [2, 4]
    assert reports[0]["held_out_nelbo"] == reports[1]["held_out_nelbo"], "nothing was learned, nothing else changes"
    assert reports[0]["held_out_perplexity"] == pytest.approx(math.exp(reports[0]["held_out_nelbo"]))
    samples = [entry["samples"] for entry in trainer.state.log_history if "samples" in entry]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 2
    model = trainer.model
    scores = [
        model.nelbo(torch.tensor([[1, 2, 3]]), num_draws=3000),
        model.nelbo(torch.tensor([[4, 5, 6, 7]]), context_mask=torch.tensor([[1, 0, 0, 0]]), num_draws=3000),
    ]
    expected = sum(score.nelbo.item() for score in scores) / 6
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, HeldOutEvaluationCallback))
    callback.num_draws = 3000
    error = sum(score.standard_error.item() for score in scores) / 6
    assert callback.evaluate(model)["held_out_nelbo"] == pytest.approx(expected, abs=6 * error)


def test_samplers_are_scored_under_the_same_plans(tmp_path):
    """Held-out rows of 3 and, after a prompt of one token, of 3 tokens, against a forward for every group."""
    samplers = {
        "at_once": {"num_diffusion_steps": 1, "alpha_0": 1.0},
        "bounded": {"entropy_bound": 5.0, "alpha_0": 1.0},
        "lossless": {"lossless": True, "alpha_0": 0.0},
    }
    trainer = train(tmp_path, every=2, learning_rate=0.0, samplers=samplers)
    reports = [entry for entry in trainer.state.log_history if "held_out_nelbo" in entry]
    for name in samplers:
        assert reports[0][f"held_out_{name}"] == reports[1][f"held_out_{name}"]
        assert reports[0][f"held_out_{name}_standard_error"] > 0
    report, model = reports[0], trainer.model.eval()
    assert report["held_out_at_once_forwards"] == 1
    assert 1 <= report["held_out_bounded_forwards"] <= 3
    assert "held_out_lossless_forwards" not in report
    # Masks in all orders of 3 tokens, which 4 plans a row sample: between the best and the worst of them.
    lows = highs = left_to_right = 0.0
    for row, given in (([1, 2, 3], 0), ([4, 5, 6, 7], 1)):
        totals = []
        for places in itertools.permutations(range(given, len(row))):
            ids = torch.tensor([row[:given] + [MASK] * len(places)])
            with torch.no_grad():
                logits = model(ids, position_ids=torch.tensor([[*range(given), *places]])).logits[0, given:]
            totals.append(-float(logits.log_softmax(-1)[range(3), [row[place] for place in places]].sum()))
        lows, highs = lows + min(totals), highs + max(totals)
        masks = torch.tensor([[1] * given + [0] * 3])
        left_to_right -= model.log_likelihood(torch.tensor([row]), context_mask=masks, alpha_0=0.0).log_likelihood
    assert lows / 6 < report["held_out_at_once"] < highs / 6
    assert report["held_out_lossless"] == pytest.approx(float(left_to_right) / 6, abs=1e-5)


def test_the_training_does_not_notice(tmp_path):
    with_callback = train(tmp_path, every=1, samplers={"at_once": {"num_diffusion_steps": 1}})
    without = train(tmp_path, callback=False)
    for name, parameter in with_callback.model.state_dict().items():
        assert torch.equal(parameter, without.model.state_dict()[name])
    assert with_callback.model.training


def test_it_follows_the_evaluations_of_the_trainer(tmp_path):
    trainer = train(tmp_path, eval_strategy="steps", eval_steps=3)
    steps = [entry["step"] for entry in trainer.state.log_history if "held_out_nelbo" in entry]
    assert steps == [3, 4]


def test_padding_of_the_examples_is_not_scored(tmp_path):
    trainer = train(tmp_path, callback=False)
    plain = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    padded = [
        {"input_ids": [*row["input_ids"], 0, 0], "attention_mask": [1] * len(row["input_ids"]) + [0, 0]}
        for row in plain
    ]
    reports = [
        HeldOutEvaluationCallback(trainer, rows, num_draws=2000).evaluate(trainer.model) for rows in (plain, padded)
    ]
    assert reports[0]["held_out_nelbo"] == pytest.approx(reports[1]["held_out_nelbo"], abs=0.5)
    assert math.isnan(
        HeldOutEvaluationCallback(trainer, plain[:1]).evaluate(trainer.model)["held_out_nelbo_standard_error"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "at least one t"),
        ({"dataset": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, "not part of a prompt"),
        ({"every": 0}, "`every` must be a positive integer, got 0"),
        ({"samplers": {"few": {"num_diffusion_steps": 0}}}, r"`samplers\['few'\]`: `num_diffusion_steps` must be"),
        ({"samplers": {"few": {"steps": 4}}}, r"`samplers\['few'\]`: \['steps'\] are not settings of `generate`"),
        ({"samplers": {"beams": {"num_beams": 4}}}, r"`samplers\['beams'\]`: .* beam"),
        ({"samplers": {"nelbo": {}}}, "must have names, and those of no other number, got 'nelbo'"),
        ({"samplers": {"few": 4}}, r"`samplers\['few'\]` must be a mapping of settings, got int"),
        ({"samplers": ["few"]}, "`samplers` must be a mapping of names to settings, got list"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeldOutEvaluationCallback(None, **{"dataset": [{"input_ids": [1]}]} | arguments)
