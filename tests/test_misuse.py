"""What would be silently wrong, or would fail deep in a library, is refused at the door, with what would be right."""

import functools
import types

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_models import backbone_config, random_batch, random_orders, randomized_model, tiny_config
from transformers import DataCollatorForLanguageModeling

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoConfig, EsoForMaskedDiffusion, EsoGenerationConfig

MASK = 23


@pytest.fixture
def model() -> EsoForMaskedDiffusion:
    return randomized_model()


def collated(model: EsoForMaskedDiffusion) -> dict[str, torch.Tensor]:
    collator = DataCollatorForHybridMaskedDiffusion(config=model.config, seed=0)
    return collator([{"input_ids": row} for row in random_batch(model, 2, 8).tolist()])


def test_paged_generation_goes_by_another_name(model):
    with pytest.raises(
        ValueError, match="`cache_implementation='paged'` is continuous batching: call `generate_batch`"
    ):
        model.generate(torch.tensor([[1, 2, 3]]), cache_implementation="paged")


def test_labels_without_masks_would_train_nothing(model):
    ids = random_batch(model, 2, 6)
    for arguments in ({}, {"position_ids": random_orders(2, 6)}, {"attention_mask": torch.ones(2, 6)}):
        with pytest.raises(ValueError, match="`DataCollatorForHybridMaskedDiffusion`, which masks the tokens"):
            model(ids, labels=ids, **arguments)
    masked = ids.clone()
    masked[:, :3] = MASK
    with pytest.raises(
        ValueError, match=r"None of the slots with `labels` holds a mask, .* nothing to predict"
    ):  # the masks are not what the labels speak of
        model(masked, labels=ids.masked_fill(masked == MASK, -100))
    assert model(masked, labels=ids).loss > 0


def test_labels_that_are_no_tokens_have_no_loss(model):
    ids = random_batch(model, 2, 6)
    masked = ids.masked_fill(torch.arange(6) > 2, MASK)
    for label, message in (
        (MASK, "hold the mask id 23"),
        (24, r"ids in \[0, 23\]"),
        (-1, r"ids in \[0, 23\], got ids from -1"),
    ):
        labels = ids.clone()
        labels[0, 4] = label
        with pytest.raises(ValueError, match=f"`labels` .*{message}"):
            model(masked, labels=labels)


def test_the_plain_collator_of_language_models_is_refused(model):
    class Tokenizer:
        pad_token_id, mask_token = 0, None

        def pad(self, examples, **kwargs):
            return {"input_ids": torch.tensor([example["input_ids"] for example in examples])}

    collator = DataCollatorForLanguageModeling(Tokenizer(), mlm=False)
    with pytest.raises(ValueError, match="DataCollatorForHybridMaskedDiffusion"):
        model(**collator([{"input_ids": row} for row in random_batch(model, 2, 6).tolist()]))


def test_the_backbone_refuses_what_it_has_no_use_for(model):
    batch = collated(model)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    for name in ("loss_weights", "sequential_rows", "labels"):
        with pytest.raises(ValueError, match=rf"The backbone has no use for the arguments \['{name}'\]"):
            model.model(**inputs, **{name: batch[name]})
    with pytest.raises(ValueError, match=r"\['temperature'\]"):
        model(**inputs, temperature=0.5)
    with pytest.raises(ValueError, match="`attention_mask` must be 1 at real tokens"):
        model.model(batch["input_ids"], attention_mask=torch.tensor([[0.0] * 7 + [-1e38]] * 2))
    llama = randomized_model(backbone_config=backbone_config("llama"))
    with pytest.raises(ValueError, match=r"\['temperature'\]"):
        llama(**inputs, temperature=0.5)
    assert model(**inputs, token_type_ids=torch.zeros(2, 8)).logits.shape == (2, 8, 24)
    prompt = random_batch(model, 1, 3)
    assert model.generate(prompt, token_type_ids=torch.zeros(1, 3), max_new_tokens=2).shape == (1, 5)


@pytest.mark.parametrize("backbone", [None, "llama"])
def test_a_head_of_its_own_that_shifts_by_a_token_is_refused(backbone):
    """As TRL's trainers put it in place of `forward` when they are made."""
    model = randomized_model(**({} if backbone is None else {"backbone_config": backbone_config(backbone)}))

    @functools.wraps(type(model).forward)
    def fused(self, *args, fused_lm_head=False, labels=None, **kwargs):
        return self.base_model(*args, **kwargs)

    with pytest.raises(ValueError, match="TRL's trainers score the next token"):
        model.forward = types.MethodType(fused, model)
    model.forward = functools.partial(model.forward)  # as accelerate does, to convert outputs


def test_the_collator_takes_alpha_0_from_the_model_or_asks_for_it(model):
    with pytest.raises(ValueError, match=r"`config` .* or `alpha_0` must be given"):
        DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK)
    collator = DataCollatorForHybridMaskedDiffusion(config=tiny_config(alpha_0=0.125, pad_token_id=3))
    assert (collator.alpha_0, collator.mask_token_id, collator.pad_token_id) == (0.125, MASK, 3)
    assert DataCollatorForHybridMaskedDiffusion(config=model.config, alpha_0=0.75).alpha_0 == 0.75
    with pytest.raises(ValueError, match=r"`mask_token_id` is 5, .* and that of the `config` 23"):
        DataCollatorForHybridMaskedDiffusion(config=model.config, mask_token_id=5)
    with pytest.raises(ValueError, match="`input_ids` of example 0 must be ids >= 0, got -4"):
        collator([{"input_ids": [1, -4, 2]}])
    with pytest.raises(ValueError, match="attention_mask of example 0"):
        collator([{"input_ids": [1, 4], "attention_mask": [0.5, 1]}])


@pytest.mark.parametrize(
    "wrong", [torch.tensor([[0.0, 0.0, torch.finfo(torch.float32).min]]), torch.tensor([[1, 1, 0.5]])]
)
def test_masks_are_zeros_and_ones(model, wrong):
    ids = random_batch(model, 1, 3)
    for call in (model, model.generate, model.log_likelihood, model.nelbo):
        with pytest.raises(ValueError, match="`attention_mask` must be 1 at real tokens and 0 elsewhere"):
            call(ids, attention_mask=wrong)
    with pytest.raises(ValueError, match="`context_mask` must be 1 at real tokens"):
        model.log_likelihood(ids, context_mask=wrong)
    with pytest.raises(ValueError, match=r"`attention_mask` .* is 0 everywhere: is it an additive mask"):
        model(ids, attention_mask=torch.zeros(1, 3))
    for right in (torch.tensor([[1, 1, 0]]), torch.tensor([[True, True, False]]), torch.tensor([[1.0, 1.0, 0.0]])):
        assert model(ids, attention_mask=right).logits.shape == (1, 3, 24)


def test_ids_out_of_range_and_empty_rows_are_named(model):
    for ids in (torch.tensor([[1, 24]]), torch.tensor([[-1, 2]])):
        with pytest.raises(ValueError, match=r"`input_ids` must hold ids in \[0, 23\]"):
            model(ids)
    with pytest.raises(ValueError, match=r"at least one slot, got shape \(1, 0\)"):
        model(torch.empty(1, 0, dtype=torch.long))
    for settings in ({"bad_words_ids": [[5000]]}, {"sequence_bias": [[[3, 24], 1.0]]}):
        with pytest.raises(ValueError, match=r"`bad_words_ids` and `sequence_bias` must hold ids in \[0, 23\], got"):
            model.generate(max_new_tokens=3, **settings)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("peft_config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused_with_its_reason(model, peft_config):
    tuned = get_peft_model(model, peft_config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"PEFT's pr.* tuning .* LoRA and its kin work"):
        tuned(**collated(model))


def test_numbers_of_numpy_are_numbers(model, tmp_path):
    config = tiny_config(hidden_size=np.int64(32), alpha_0=np.float32(0.5), hidden_dropout=np.float64(0.0))
    EsoForMaskedDiffusion(config).save_pretrained(tmp_path)
    assert EsoConfig.from_pretrained(tmp_path).alpha_0 == 0.5
    settings = {"num_diffusion_steps": np.int64(2), "alpha_0": np.float32(1.0), "max_new_tokens": np.int32(4)}
    assert model.generate(**settings, lossless=np.bool_(True), do_sample=np.bool_(False)).shape == (1, 4)
    EsoGenerationConfig(**settings).save_pretrained(tmp_path)
    text = random_batch(model, 1, 4)
    assert model.log_likelihood(text, num_orders=np.int64(2), alpha_0=np.float32(0.5)).orders.shape == (1, 2, 4)
    assert DataCollatorForHybridMaskedDiffusion(mask_token_id=np.int64(MASK), alpha_0=np.float32(0.5)).alpha_0 == 0.5


def test_another_default_type_changes_nothing(model):
    text, orders = random_batch(model, 2, 5), random_orders(2, 5)
    expected = model.log_likelihood(text, orders=orders).log_likelihood
    try:
        torch.set_default_dtype(torch.bfloat16)
        scores = model.log_likelihood(text, orders=orders).log_likelihood
        settings = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 4}
        for decoding in ({}, {"lossless": True}):
            assert model.generate(**settings, **decoding).scores.dtype == torch.float32
        assert model.nelbo(text).nelbo.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(scores, expected)


def test_the_mask_cannot_be_cut_off(model):
    with pytest.raises(ValueError, match="`new_num_tokens=23` would cut off the mask, whose id is 23"):
        model.resize_token_embeddings(23)


@pytest.mark.parametrize("kind", [None, "llama"])
def test_the_config_says_whether_generate_uses_the_cache_and_how_large_it_is(kind):
    sizes = {} if kind is None else {"backbone_config": backbone_config(kind)}
    model = randomized_model(use_cache=False, **sizes)
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is False
    assert model.generate(max_new_tokens=3, return_dict_in_generate=True).past_key_values is None
    with pytest.raises(ValueError, match="`use_cache` must be True or False, got 'no'"):
        tiny_config(use_cache="no")
    if kind is not None:
        assert (model.config.num_key_value_heads, model.config.intermediate_size) == (2, 48)
