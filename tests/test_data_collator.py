"""The collator: layout, statistics, weights, determinism and errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from eso_lm import DataCollatorForHybridMaskedDiffusion
from eso_lm.noise_schedule import EPSILON, keep_probability, nelbo_weight

MASK, PAD = 99, 98


def collator(**overrides) -> DataCollatorForHybridMaskedDiffusion:
    return DataCollatorForHybridMaskedDiffusion(
        **{"mask_token_id": MASK, "pad_token_id": PAD, "alpha_0": 0.5} | overrides
    )


def examples(*lengths: int) -> list[dict]:
    """Tokens that tell their own row and position: 10 x row + position."""
    return [{"input_ids": [10 * row + i for i in range(length)]} for row, length in enumerate(lengths)]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    prompt=st.integers(0, 4),
    left_padding=st.integers(0, 3),
    alpha_0=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_layout_of_a_batch(lengths, prompt, left_padding, alpha_0, seed):
    rows = []
    for row, length in enumerate(lengths):
        tokens = [10 * row + i for i in range(length)]
        rows.append(
            {
                "input_ids": [PAD] * left_padding + tokens,
                "attention_mask": [0] * left_padding + [1] * length,
                "labels": [-100] * left_padding + [-100 if i < prompt else token for i, token in enumerate(tokens)],
            }
        )
    batch = collator(alpha_0=alpha_0, seed=seed)(rows)
    assert batch["input_ids"].shape == (len(lengths), left_padding + max(lengths))
    for row, length in enumerate(lengths):
        columns = {name: values[row].tolist() for name, values in batch.items() if name != "sequential_rows"}
        slots = list(zip(*columns.values(), strict=True))
        real, padding = slots[:length], slots[length:]
        assert all(label == -100 and weight == 0 for _, _, label, weight in padding)
        assert sorted(position for _, position, _, _ in real) == list(range(length))
        prompt_length = min(prompt, length)
        assert [position for _, position, _, _ in real[:prompt_length]] == list(range(prompt_length))
        for slot, (token, position, label, weight) in enumerate(real):
            assert label == (-100 if slot < prompt_length else 10 * row + position)
            assert token in (MASK, 10 * row + position)
            assert (token == MASK) == (weight > 0)
        is_masked = [token == MASK for token, *_ in real]
        assert is_masked == sorted(is_masked), "clean slots come before masked slots"
        if batch["sequential_rows"][row]:
            masked = [position for token, position, _, _ in real if token == MASK]
            assert masked == sorted(masked)


def test_masking_rates_and_weights():
    """At known t, a fraction 1 - α_t is masked in the diffusion rows, and 1 - α_0 in the sequential ones."""
    alpha_0, rows, length = 0.5, 64, 500
    batch = collator(alpha_0=alpha_0, seed=3)([{"input_ids": [i % 90 for i in range(length)]}] * rows)
    is_masked = batch["input_ids"] == MASK
    sequential = batch["sequential_rows"]
    assert sequential.sum() == rows // 2
    rate = is_masked.double().mean(-1)
    assert rate[sequential].mean() == pytest.approx(1 - alpha_0, abs=0.02)
    # Each diffusion row shows its t through its weight, 2 w(t) here (both phases have half of the tokens).
    weights = batch["loss_weights"].double().amax(-1)
    alpha_t = 1 - alpha_0 * (1 - EPSILON) / (weights[~sequential] / 2)
    assert (rate[~sequential] - (1 - alpha_t)).abs().max() < 4 * (0.25 / length) ** 0.5
    t = ((1 - alpha_t / alpha_0) / (1 - EPSILON)).sort().values
    strata = (torch.arange(rows // 2) + 0.5) / (rows // 2)
    assert (t - strata).abs().max() < 1.1 / rows, "t is stratified over the diffusion rows"
    assert torch.equal(batch["loss_weights"][sequential], 2 * is_masked[sequential].float())


def test_orders_are_uniform_but_for_the_sequential_masks():
    batch = collator(alpha_0=0.5, seed=1)([{"input_ids": list(range(8))}] * 4000)
    sequential = batch["sequential_rows"]
    is_masked = batch["input_ids"] == MASK
    last = batch["position_ids"][~sequential & is_masked[:, -1]][:, -1]
    counts = torch.bincount(last, minlength=8).double()
    expected = counts.sum() / 8
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees of freedom, p = 0.001
    first = batch["position_ids"][sequential & ~is_masked[:, 0]][:, 0]
    counts = torch.bincount(first, minlength=8).double()
    assert ((counts - counts.sum() / 8) ** 2 / (counts.sum() / 8)).sum() < 24.3


def test_each_phase_is_normalised_by_its_own_tokens():
    """Rows of different lengths: the weights turn the division by all valid tokens into one by the phase's tokens."""
    batch = collator(alpha_0=0.5, seed=0)(examples(9, 3, 7, 2))
    valid = batch["labels"] != -100
    sequential = batch["sequential_rows"]
    masked = batch["input_ids"] == MASK
    expected = valid.sum() / valid[sequential].sum()
    assert masked[sequential].any()
    torch.testing.assert_close(batch["loss_weights"][sequential], masked[sequential] * expected)


def test_rows_without_valid_tokens_use_up_no_phase():
    """Two rows that count and six that do not: each phase gets one of the two."""
    rows = examples(4, 4) + [row | {"labels": [-100] * 4} for row in examples(4, 4, 4, 4, 4, 4)]
    for seed in range(20):
        sequential = collator(alpha_0=0.5, seed=seed)(rows)["sequential_rows"]
        assert sequential[:2].sum() == 1


def test_phases_of_the_pure_models():
    assert not collator(alpha_0=1.0)(examples(4, 4))["sequential_rows"].any()
    batch = collator(alpha_0=0.0)(examples(4, 4))
    assert batch["sequential_rows"].all()
    assert (batch["input_ids"] == MASK).all()
    assert torch.equal(batch["position_ids"], torch.arange(4).expand(2, 4))


def test_low_variance_loss_has_unit_weights():
    batch = collator(alpha_0=1.0, loss_type="low_var", seed=0)(examples(9, 9, 9, 9))
    assert set(batch["loss_weights"].unique().tolist()) == {0.0, 1.0}
    t = torch.tensor(0.3, dtype=torch.float64)
    assert nelbo_weight(t, 1.0) == pytest.approx((1 - EPSILON) / (1 - float(keep_probability(t, 1.0))))


def test_seeded_noise_is_a_function_of_the_batch():
    seeded = collator(seed=5)
    first, other = examples(8, 8, 8, 8), examples(7, 8, 8, 8)
    batches = [seeded(first), seeded(other), seeded(first), replace(seeded, seed=6)(first)]
    for name in batches[0]:
        assert torch.equal(batches[0][name], batches[2][name])
    assert not torch.equal(batches[0]["position_ids"][1:], batches[1]["position_ids"][1:])
    assert not torch.equal(batches[0]["position_ids"], batches[3]["position_ids"])


def orders_of_an_epoch(loader: DataLoader) -> list[tuple]:
    return [tuple(batch["position_ids"].flatten().tolist()) for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_noise_differs_between_batches_workers_and_epochs(num_workers):
    data = [{"input_ids": list(range(16))}] * 8
    loader = DataLoader(data, batch_size=2, num_workers=num_workers, collate_fn=collator())
    orders = orders_of_an_epoch(loader) + orders_of_an_epoch(loader)
    assert len(set(orders)) == 8
    torch.manual_seed(1)
    again = orders_of_an_epoch(loader)
    torch.manual_seed(1)
    assert orders_of_an_epoch(loader) == again, "torch.manual_seed makes a run reproducible"


def test_noise_differs_between_ranks(monkeypatch):
    batches = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(0)
        batches.append(collator()(examples(9, 9)))
    assert not torch.equal(batches[0]["position_ids"], batches[1]["position_ids"])


def test_pads_to_a_multiple():
    assert collator(pad_to_multiple_of=8)(examples(3, 5))["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token_id": None}, "`mask_token_id` must be given"),
        ({"alpha_0": 1.5}, r"`alpha_0` must be a number in \[0, 1\], got 1.5"),
        ({"diffusion_fraction": 1.0}, r"`diffusion_fraction` must be in \(0, 1\)"),
        ({"alpha_0": 1.0, "diffusion_fraction": 0.5}, "`diffusion_fraction` must be 1 at alpha_0=1"),
        ({"loss_type": "mse"}, "`loss_type` must be"),
        ({"loss_type": "low_var"}, "alpha_0=1 only"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of`"),
        ({"alpha_0": "half"}, "`alpha_0` must be a number"),
        ({"diffusion_fraction": -0.5}, "`diffusion_fraction` must be a number"),
        ({"seed": 1.5}, "`seed` must be None or an integer"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        collator(**settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one token"),
        ([{"input_ids": []}], "at least one token"),
        ([{"text": "no ids"}], "needs `input_ids`"),
        ([{"input_ids": [[1, 2]]}], "must be a list of integer ids"),
        ([{"input_ids": [1.5, 2.5]}], "must be a list of integer ids"),
        ([{"input_ids": [1, MASK]}], "holds the mask id 99"),
        ([{"input_ids": [1, 2], "labels": [1]}], "`labels` of example 0 must be as long"),
        ([{"input_ids": [1, 2], "labels": [2, -100]}], "must equal `input_ids`"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "`attention_mask` of example 0"),
    ],
)
def test_examples_that_cannot_be_masked_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        collator()(rows)


def test_padding_needs_an_id():
    with pytest.raises(ValueError, match=r"lengths \[2, 3\] and need padding"):
        collator(pad_token_id=None)(examples(2, 3))
    assert collator(pad_token_id=None)(examples(3, 3))["input_ids"].shape == (2, 3)
