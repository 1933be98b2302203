"""Draft heads: what tokens drawn together know of one another, how that is learned, and that nothing else changes."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import backbone_config, random_batch, random_orders, randomized_model, tiny_config
from transformers import AutoModelForMaskedLM, LlamaForCausalLM, Trainer, TrainingArguments

from eso_lm import DataCollatorForDraftHead, DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion
from eso_lm.generation_decoding import Outputs
from eso_lm.generation_drafting import DrawingTurns, _neighbours_in_rows
from eso_lm.modeling_drafting import MAX_DISTANCE, find_neighbours

RANK = 8


def nearest(positions: list[int], group_starts: list[int], is_drawn: list[bool], slot: int) -> list[tuple[int, int]]:
    """The neighbours of a slot, left and right, (slot, distance), by looking at every other one."""
    found = []
    for side in (-1, 1):
        candidates = [
            (side * (positions[other] - positions[slot]), other)
            for other in range(group_starts[slot], slot)
            if is_drawn[slot] and is_drawn[other]
        ]
        near = [(distance, other) for distance, other in candidates if 0 < distance <= MAX_DISTANCE]
        distance, other = min(near, default=(0, -1))
        found.append((other, distance))
    return found


@st.composite
def layouts(draw):
    slots = draw(st.integers(1, 12))
    positions = draw(st.permutations(range(slots + draw(st.integers(0, 6)))))[:slots]
    begins = [True, *draw(st.lists(st.booleans(), min_size=slots - 1, max_size=slots - 1))]
    starts = list(itertools.accumulate(range(slots), lambda start, slot: slot if begins[slot] else start))
    return positions, starts, draw(st.lists(st.booleans(), min_size=slots, max_size=slots))


@settings(max_examples=150, deadline=None)
@given(st.lists(layouts(), min_size=1, max_size=3))
def test_neighbours_are_the_nearest_that_are_drawn_before(rows):
    width = max(len(positions) for positions, _, _ in rows)

    def padded(values, filler):
        return torch.tensor([list(value) + [filler] * (width - len(value)) for value in values])

    positions, starts, is_drawn = zip(*rows, strict=True)
    found = find_neighbours(padded(positions, 0), padded(starts, 0), padded(is_drawn, False))
    for row, layout in enumerate(rows):
        for slot in range(len(layout[0])):
            pairs = list(zip(found.slots[row, slot].tolist(), found.distances[row, slot].tolist(), strict=True))
            assert pairs == nearest(*layout, slot)


def test_turns_give_each_slot_what_stands_beside_it():
    """Neighbours in turn, rows apart, and slots without neighbours as they are."""
    model = randomized_model(draft_rank=RANK)
    head, generator = model.draft_head, torch.Generator().manual_seed(0)
    logits, states = (torch.randn(7, size, generator=generator) for size in (24, 32))
    positions, widths = torch.tensor([3, 4, 9, 2, 4, 0, 5]), [4, 3]
    turns = DrawingTurns(head, Outputs(logits, states), positions, widths)
    drawn = torch.tensor([5, 6, 7, 8, 9, 10, 11])
    order = []
    for slots in turns:
        order.append(slots.tolist())
        turns.tokens[slots] = drawn[slots]
    # 4 stands beside 3, 2 beside 3; of the other row 0 and 5 both have 4 within reach.
    assert order == [[0, 2, 4], [1, 3, 5, 6]]
    expected = logits.clone()
    corrected = ((1, [5, 0], [1, 0]), (3, [0, 5], [0, 1]), (5, [0, 9], [0, 4]), (6, [9, 0], [1, 0]))
    for slot, tokens, distances in corrected:
        expected[slot] += head(states[slot, None], torch.tensor([tokens]), torch.tensor([distances]))[0]
    torch.testing.assert_close(turns.logits, expected)
    torch.testing.assert_close(turns.assemble([logits[slots] for slots in order]), logits)


@torch.no_grad()
def log_conditionals(model, text, order, starts, correct: bool = True) -> torch.Tensor:
    """log q of every token of each slot, (length, vocab): a forward for each slot, and the head by hand."""
    found = []
    for slot, start in enumerate(starts):
        group = order[start : slot + 1]
        ids = torch.tensor([[*text[order[:start]].tolist(), *[model.config.mask_token_id] * len(group)]])
        output = model(ids, position_ids=torch.tensor([[*order[:start], *group]]))
        logits = output.logits[0, -1]
        beside = nearest(order, starts, [True] * len(order), slot)
        if correct and any(distance for _, distance in beside):
            tokens = torch.tensor([[int(text[order[other]]) for other, _ in beside]])
            distances = torch.tensor([[distance for _, distance in beside]])
            logits = logits + model.draft_head(output.draft_states[0, -1:], tokens, distances)[0]
        found.append(logits.log_softmax(dim=-1))
    return torch.stack(found)


@pytest.mark.parametrize("draft_length", [2, 3, 10])
def test_loss_is_the_divergence_from_exact_conditionals(draft_length):
    """Against plain forwards, one for each slot; prompt and padding count for nothing."""
    model = randomized_model(draft_rank=RANK)
    text, order = random_batch(model, 1, 10)[0], random_orders(1, 10)[0].tolist()
    starts = [slot // draft_length * draft_length for slot in range(10)]
    q = log_conditionals(model, text, order, starts)
    p = log_conditionals(model, text, order, list(range(10)))
    divergences = (p.exp() * (p - q).nan_to_num()).sum(dim=-1)
    has_neighbour = [any(d for _, d in nearest(order, starts, [True] * 10, slot)) for slot in range(10)]
    expected = divergences[has_neighbour].sum()

    ids, positions = text[order][None], torch.tensor([order])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids, "draft_starts": torch.tensor([starts])}
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected / 10, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**batch, num_items_in_batch=5).loss, expected / 5, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None} == {
        "draft_head"
    }

    # Two tokens more at either end, which are not drawn, move all places by two.
    longer = {"input_ids": torch.cat([ids[:, :2], ids, ids[:, :1]], dim=1)}
    longer["position_ids"] = torch.cat([torch.tensor([[0, 1]]), positions + 2, torch.tensor([[0]])], dim=1)
    longer["labels"] = torch.nn.functional.pad(ids, (2, 1), value=-100)
    longer["draft_starts"] = torch.nn.functional.pad(batch["draft_starts"] + 2, (2, 1))
    changed = [{}, {"input_ids": longer["input_ids"].clone()}]
    changed[1]["input_ids"][0, -1] = 5
    losses = [model(**longer | change).loss for change in changed]
    assert torch.equal(*losses)
    assert losses[0] > 0


def test_loss_joins_that_of_the_hybrid_objective():
    model = randomized_model(draft_rank=RANK)
    examples = [{"input_ids": row} for row in random_batch(model, 6, 12)]
    collator = DataCollatorForHybridMaskedDiffusion(config=model.config, draft_length=4, seed=0)
    batch = collator(examples)
    both = model(**batch).loss
    starts, weights = batch.pop("draft_starts"), batch.pop("loss_weights")
    hybrid = model(**batch, loss_weights=weights).loss
    assert starts.shape == weights.shape
    torch.testing.assert_close(both, hybrid + model(**batch, draft_starts=starts).loss)
    plain = DataCollatorForHybridMaskedDiffusion(config=model.config, seed=0)(examples)
    assert all(torch.equal(plain[name], batch[name]) for name in batch), "the drafts leave the rest as it is"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    draft_length=st.integers(2, 9),
    given_tokens=st.integers(0, 6),
    seed=st.integers(0, 9),
)
def test_collator_cuts_what_is_drawn_into_drafts(lengths, draft_length, given_tokens, seed):
    collator = DataCollatorForDraftHead(
        mask_token_id=23, pad_token_id=0, alpha_0=0.5, draft_length=draft_length, seed=seed
    )
    examples = []
    for length in lengths:
        ids = torch.arange(1, length + 1)
        examples.append({"input_ids": ids, "labels": ids.masked_fill(ids <= given_tokens, -100)})
    batch = collator(examples)
    for row, length in enumerate(lengths):
        num_given = min(given_tokens, length)
        ids, starts = batch["input_ids"][row].tolist(), batch["draft_starts"][row].tolist()
        assert ids[:num_given] == list(range(1, num_given + 1))
        assert sorted(ids[:length]) == list(range(1, length + 1))
        assert batch["position_ids"][row, :length].tolist() == [token - 1 for token in ids[:length]]
        assert (batch["labels"][row] != -100).sum() == length - num_given
        drawn = range(num_given, length)
        sizes = [len(list(group)) for _, group in itertools.groupby(starts[slot] for slot in drawn)]
        assert all(num_given <= starts[slot] <= slot for slot in drawn)
        assert all(starts[starts[slot]] == starts[slot] for slot in drawn)
        assert all(size == draft_length for size in sizes[1:-1])
        assert all(size <= draft_length for size in sizes)


def test_collator_writes_half_the_rows_from_left_to_right():
    collator = DataCollatorForDraftHead(mask_token_id=63, seed=0)
    batch = collator([{"input_ids": torch.arange(60)} for _ in range(400)])
    in_order = (batch["position_ids"].diff(dim=-1) == 1).all(dim=-1).float().mean().item()
    assert in_order == pytest.approx(0.5, abs=4 * 0.025)


def rows_to_train_on(model, count: int = 32) -> list[dict]:
    """Text in which each token depends on the one before, and on little else."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(0, 20, (count, 1), generator=generator)
    return [{"input_ids": (row + 3 * torch.arange(16)) % 23} for row in first]


def train(model, folder, steps: int = 30, **changes) -> list[float]:
    collator = DataCollatorForDraftHead(config=model.config, draft_length=4)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **changes,
    )
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows_to_train_on(model))
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("backbone", [None, "llama"])
def test_trainer_trains_the_head_alone(tmp_path, backbone):
    """The model stays as it is to the last digit: its weights, its likelihood, its NELBO."""
    config = {} if backbone is None else {"backbone_config": backbone_config(backbone)}
    model = randomized_model(scale=0.15, draft_rank=RANK, hidden_dropout=0.1, **config)
    torch.nn.init.zeros_(model.draft_head.vocab_proj.weight)
    model.requires_grad_(False)
    model.draft_head.requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    texts = random_batch(model, 3, 12)

    def measures():
        source = torch.Generator().manual_seed(0)
        exact = model.log_likelihood(texts, num_orders=3, generator=source).log_likelihood
        return torch.stack([exact, model.nelbo(texts, num_draws=2, generator=source).nelbo])

    measured = measures()
    losses = train(model, tmp_path)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name.split(".")[0] for name in changed} == {"draft_head"}
    assert torch.equal(measures(), measured)


def test_adapters_and_a_head_are_trained_together(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = randomized_model(scale=0.15, draft_rank=RANK)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["draft_head"])
    tuned = get_peft_model(model, lora)
    train(tuned, tmp_path / "run", steps=3)
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(randomized_model(scale=0.15, draft_rank=RANK), tmp_path / "adapter")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, tuned.state_dict()[name]), name
    merged = again.merge_and_unload().eval()
    torch.manual_seed(0)
    text = merged.generate(max_new_tokens=12, lossless=True, draft_length=3, alpha_0=0.0)
    torch.manual_seed(0)
    assert torch.equal(tuned.eval().generate(max_new_tokens=12, lossless=True, draft_length=3, alpha_0=0.0), text)


def test_saved_and_loaded(tmp_path):
    model = randomized_model(draft_rank=RANK)
    model.save_pretrained(tmp_path / "head")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "head")
    assert loaded.config.draft_rank == RANK
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_head_is_added_to_a_model_that_has_none(tmp_path):
    """It changes nothing until it is trained; and a model without one neither has nor saves anything of it."""
    model = randomized_model()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("draft_rank") is None
    assert not any("draft" in name for name in model.state_dict())
    loaded, missing = EsoForMaskedDiffusion.from_pretrained(tmp_path, draft_rank=4, output_loading_info=True)
    assert all(name.startswith("draft_head.") for name in missing["missing_keys"])
    for settings_ in ({"num_diffusion_steps": 2}, {"lossless": True, "draft_length": 4}):
        texts = []
        for which in (model, loaded.eval()):
            torch.manual_seed(0)
            texts.append(which.generate(max_new_tokens=12, unmasking_order="left_to_right", alpha_0=1.0, **settings_))
        assert torch.equal(*texts)


def test_vocabulary_is_resized(tmp_path):
    model = randomized_model(draft_rank=RANK)
    old = model.draft_head.vocab_proj.weight.clone()
    model.resize_token_embeddings(30)
    head = model.draft_head
    assert head.vocab_proj.weight.shape == head.left_embedding.weight.shape == (30, RANK)
    assert torch.equal(head.vocab_proj.weight[:24], old)
    assert not head.vocab_proj.weight[24:].any()
    assert model.generate(max_new_tokens=8, lossless=True, draft_length=4, alpha_0=0.0).shape == (1, 8)
    model.save_pretrained(tmp_path)
    assert torch.equal(EsoForMaskedDiffusion.from_pretrained(tmp_path).draft_head.vocab_proj.weight[:24], old)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 5}, {"do_sample": False}])
def test_tokens_of_a_parallel_step_know_their_neighbours(sampling):
    """Scored as by plain forwards with the head applied by hand; without the head as without it."""
    model = randomized_model(draft_rank=RANK)
    settings_ = {"alpha_0": 1.0, "num_diffusion_steps": 4, "unmasking_order": "left_to_right"} | sampling
    output = model.generate(max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **settings_)
    order, groups = output.orders[0].tolist(), output.groups[0].tolist()
    starts = [groups.index(group) for group in groups]
    text = output.sequences[0]
    expected = log_conditionals(model, text, order, starts)
    columns = output.logits[0, order].log_softmax(dim=-1)
    torch.testing.assert_close(columns, expected, atol=1e-4, rtol=0)
    log_probs = expected.gather(1, text[order, None])[:, 0]
    torch.testing.assert_close(output.log_probs[0, order], log_probs, atol=1e-4, rtol=0)
    plan = {"orders": output.orders, "groups": output.groups}
    for chunk_length in (None, 1, 5):
        scored = model.log_likelihood(text[None], **plan, chunk_length=chunk_length)
        torch.testing.assert_close(scored.token_log_probs[0, 0, order], log_probs, atol=1e-4, rtol=0)
    without = model.log_likelihood(text[None], **plan, generation_config=None, use_draft_head=False)
    plain = log_conditionals(model, text, order, starts, correct=False).gather(1, text[order, None])[:, 0]
    torch.testing.assert_close(without.token_log_probs[0, 0, order], plain, atol=1e-4, rtol=0)
    assert (log_probs - plain).abs().max() > 0.1


def test_a_head_that_is_not_there_cannot_be_asked_for():
    model = randomized_model()
    with pytest.raises(ValueError, match="`use_draft_head=True`, given or of the generation config, asks for"):
        model.generate(max_new_tokens=4, use_draft_head=True)
    batch = DataCollatorForDraftHead(config=tiny_config(draft_rank=2))([{"input_ids": torch.arange(12)}])
    with pytest.raises(ValueError, match="has no draft head"):
        model(**batch)
    with pytest.raises(ValueError, match="`draft_starts` must be slots"):
        randomized_model(draft_rank=2)(**batch | {"draft_starts": batch["draft_starts"] - 9})
    with pytest.raises(ValueError, match="`use_draft_head` must be a bool"):
        model.generate(max_new_tokens=4, use_draft_head="yes")
    with pytest.raises(ValueError, match="`draft_rank`"):
        tiny_config(draft_rank=0)
    with pytest.raises(ValueError, match="`draft_starts` need `input_ids` and `position_ids`"):
        randomized_model(draft_rank=2)(**{name: batch[name] for name in ("input_ids", "labels", "draft_starts")})
    with pytest.raises(ValueError, match="`draft_length` must be a positive integer"):
        DataCollatorForDraftHead(config=tiny_config(draft_rank=2), draft_length=None)
    for collator in (DataCollatorForDraftHead, DataCollatorForHybridMaskedDiffusion):
        with pytest.raises(ValueError, match="`draft_length=8` trains a draft head, and the `config` has none"):
            collator(config=model.config, draft_length=8)
        with pytest.raises(ValueError, match="`draft_length` must be at least 2, got 1"):
            collator(config=tiny_config(draft_rank=2), draft_length=1)


def test_a_head_of_another_type_than_the_body():
    model = randomized_model(draft_rank=RANK, scale=0.05).to(torch.bfloat16)
    model.draft_head.float()
    batch = DataCollatorForDraftHead(config=model.config, seed=0)([{"input_ids": torch.arange(12)}])
    model(**batch).loss.backward()
    assert model.draft_head.state_proj.weight.grad.dtype == torch.float32
    assert model.draft_head.vocab_proj.weight.grad.abs().max() > 0
    for options in ({"lossless": True}, {"num_diffusion_steps": 2, "unmasking_order": "left_to_right"}):
        assert model.generate(max_new_tokens=9, alpha_0=1.0, **options).shape == (1, 9)


def test_a_causal_model_is_taken_over_with_a_head():
    torch.manual_seed(0)
    causal = LlamaForCausalLM(backbone_config("llama")).to(torch.bfloat16)
    model = EsoForMaskedDiffusion.from_causal_lm(causal, draft_rank=RANK)
    without = EsoForMaskedDiffusion.from_causal_lm(causal)
    assert without.draft_head is None
    assert model.config.draft_rank == RANK
    assert {parameter.dtype for parameter in model.draft_head.parameters()} == {torch.bfloat16}
    # It is a fresh head as any, and changes nothing.
    fresh = dict(EsoForMaskedDiffusion(model.config).draft_head.named_parameters())
    for name, parameter in model.draft_head.named_parameters():
        deviation = parameter.detach().float().std().item()
        assert deviation == pytest.approx(fresh[name].detach().float().std().item(), rel=0.2)
    texts = []
    for one in (model, without):
        torch.manual_seed(1)
        texts.append(one.generate(max_new_tokens=9, num_diffusion_steps=2, unmasking_order="left_to_right"))
    assert torch.equal(*texts)


@settings(max_examples=100, deadline=None)
@given(st.lists(layouts(), min_size=1, max_size=3))
def test_turns_go_by_the_same_neighbours_as_training(rows):
    """Rows whose slots are one group each, on the host one by one, and by `find_neighbours`."""
    rows = [(positions, is_drawn) for positions, _, is_drawn in rows]
    found, start = [], 0
    for positions, is_drawn in rows:
        count = len(positions)
        group = find_neighbours(
            torch.tensor([positions]), torch.zeros(1, count, dtype=torch.long), torch.tensor([is_drawn])
        )
        slots = torch.where(group.slots[0] >= 0, group.slots[0] + start, -1)
        found += zip(map(tuple, slots.tolist()), map(tuple, group.distances[0].tolist()), strict=True)
        start += count
    flat = [[value for row in rows for value in row[part]] for part in (0, 1)]
    assert _neighbours_in_rows(flat[0], [len(positions) for positions, _ in rows], flat[1]) == found
