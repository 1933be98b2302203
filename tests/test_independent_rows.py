"""Rows of a batch have plans of their own: samples of a call are independent, and no row pays for another's slots."""

import pytest
import torch
from tiny_models import backbone_config, random_batch, randomized_model

from eso_lm import modeling_packing

CALLS, SAMPLES = 60, 64


def frequencies_of_the_likeliest_text(**settings) -> torch.Tensor:
    """(calls,), how often the text that is drawn most is among the samples of each call."""
    model = randomized_model(vocab_size=4, scale=0.5, seed=1)
    settings = {"max_new_tokens": 3, "alpha_0": 0.5, "num_return_sequences": SAMPLES} | settings
    torch.manual_seed(0)
    texts = torch.stack([model.generate(**settings) for _ in range(CALLS)]) @ torch.tensor([9, 3, 1])
    likeliest = texts.flatten().mode().values
    return (texts == likeliest).double().mean(dim=-1)


@pytest.mark.parametrize("settings", [{}, {"lossless": True}, {"entropy_bound": 0.3}], ids=str)
def test_samples_of_a_call_are_independent(settings):
    frequencies = frequencies_of_the_likeliest_text(**settings)
    mean = frequencies.mean()
    independent = mean * (1 - mean) / SAMPLES
    assert frequencies.var() / independent < 1.6  # 5 standard deviations of the variance of 60 values


def test_rows_in_lockstep_are_not():
    frequencies = frequencies_of_the_likeliest_text(lockstep=True)
    mean = frequencies.mean()
    assert frequencies.var() / (mean * (1 - mean) / SAMPLES) > 5


@pytest.mark.parametrize("backbone", [None, "llama"])
def test_no_row_pays_for_the_slots_of_another(backbone):
    model = randomized_model(**({} if backbone is None else {"backbone_config": backbone_config(backbone)}))
    computed, wanted = [], []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _, args, __: computed.append(args[0][..., 0].numel())
    )
    model.lm_head.register_forward_hook(lambda _, args, __: wanted.append(args[0][..., 0].numel()))
    prompts = random_batch(model, 4, 7)
    output = model.generate(
        prompts,
        max_new_tokens=12,
        alpha_0=1.0,
        num_diffusion_steps=4,
        unmasking_order="random",
        return_dict_in_generate=True,
    )
    steps = output.unmasking_steps[:, 7:]
    drawn = [int((steps == step).sum()) for step in range(1, len(wanted) + 1)]
    assert wanted == drawn
    # The prompts, and then what the forward before has drawn; in a row that is done, that too is fed once more.
    assert computed == [fed + masks for fed, masks in zip([prompts.numel(), *drawn[:-1]], drawn, strict=True)]
    assert len({(row == 1).sum().item() for row in steps}) > 1


@pytest.mark.parametrize("backbone", [None, "llama"])
@pytest.mark.parametrize("settings", [{}, {"lossless": True}, {"entropy_bound": 3.0}], ids=str)
def test_packed_rows_that_attend_together_are_those_that_attend_apart(monkeypatch, backbone, settings):
    model = randomized_model(**({} if backbone is None else {"backbone_config": backbone_config(backbone)}))
    prompts = random_batch(model, 3, 8)
    is_real = torch.arange(8) >= torch.tensor([[0], [3], [6]])
    outputs = []
    for padded_work in (0, 1e9):
        monkeypatch.setattr(modeling_packing, "MAX_PADDED_WORK", padded_work)
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                prompts,
                attention_mask=is_real,
                max_new_tokens=70,
                alpha_0=0.5,
                return_dict_in_generate=True,
                output_logits=True,
                **settings,
            )
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=0)


def test_long_prompts_of_different_lengths_are_packed_too():
    model = randomized_model(scale=0.2)
    prompts = random_batch(model, 2, 100)
    is_real = torch.arange(100) >= torch.tensor([[0], [21]])
    settings = {"max_new_tokens": 3, "do_sample": False, "alpha_0": 0.0, "return_dict_in_generate": True}
    together = model.generate(prompts, attention_mask=is_real, output_logits=True, **settings)
    for row, start in enumerate((0, 21)):
        alone = model.generate(prompts[row : row + 1, start:], output_logits=True, **settings)
        torch.testing.assert_close(together.logits[row, 100:], alone.logits[0, 100 - start :], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(25))
def test_a_growing_cache_takes_rows_in_lockstep_or_says_why_not(seed):
    model = randomized_model()
    generator = torch.Generator().manual_seed(seed)
    prompts = random_batch(model, 2, 6, seed=seed)
    prompts[torch.rand(2, 6, generator=generator) < 0.4] = model.config.mask_token_id
    holes = (prompts == model.config.mask_token_id).sum(dim=-1).tolist()
    settings = {"max_new_tokens": 3, "cache_implementation": "dynamic", "num_diffusion_steps": 2}
    if holes[0] == holes[1]:
        assert (model.generate(prompts, lockstep=True, **settings) != model.config.mask_token_id).all()
    else:
        with pytest.raises(ValueError, match="`lockstep=True` is for rows that are alike"):
            model.generate(prompts, lockstep=True, **settings)
        with pytest.raises(ValueError, match="needs rows that advance together: leave it unset, or set `lockstep"):
            model.generate(prompts, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lockstep": 1}, "`lockstep` must be a bool, got 1"),
        ({"lockstep": True, "lossless": True}, "`lossless` lets each row advance"),
        ({"lockstep": True, "entropy_bound": 1.0}, "`entropy_bound` lets each row advance"),
        ({"lockstep": True, "generator": [torch.Generator()]}, "without a generator for each"),
    ],
)
def test_lockstep_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        randomized_model().generate(max_new_tokens=3, **settings)
