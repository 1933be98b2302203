"""The backbone and the head: what a slot sees, in which layout, and what the loss is."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import backbone_config, random_batch, random_orders, randomized_model, tiny_config
from transformers import DynamicCache

from eso_lm import EsoForMaskedDiffusion, EsoModel

MASK = 23  # the last id of the tiny vocabulary


@pytest.fixture
def slots(model):
    """Tokens in generation order with masks in the last five of twelve slots, and the order: (3, 12) each."""
    input_ids = random_batch(model, 3, 12)
    input_ids[:, 7:] = MASK
    return input_ids, random_orders(3, 12)


def plain_logits(model: EsoForMaskedDiffusion, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The network of one sequence, written out in float64 with a dense causal mask."""
    weights = {name: parameter.double() for name, parameter in model.state_dict().items()}
    config = model.config
    sinusoid = torch.cat([torch.ones(128), torch.zeros(128)]).double()
    hidden = F.silu(
        weights["model.timestep_embedding.in_proj.weight"] @ sinusoid
        + weights["model.timestep_embedding.in_proj.bias"]
    )
    conditioning = F.silu(
        weights["model.timestep_embedding.out_proj.weight"] @ hidden
        + weights["model.timestep_embedding.out_proj.bias"]
    )

    def modulation(prefix, parts):
        return (weights[f"{prefix}.weight"] @ conditioning + weights[f"{prefix}.bias"]).view(parts, -1)

    def norm(x, prefix, shift, scale):
        centered = x - x.mean(-1, keepdim=True)
        normed = centered / (centered.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return normed * weights[f"{prefix}.weight"] * (1 + scale) + shift

    def rotate(x):  # (slots, heads, width)
        half = x.shape[-1] // 2
        angles = position_ids.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    x = weights["model.embed_tokens.weight"][input_ids]
    slots = len(input_ids)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(f"{prefix}.modulation", 6)
        h = norm(x, f"{prefix}.input_layernorm", shift1, scale1)
        q, k, v = (
            (h @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T).view(slots, config.num_attention_heads, -1)
            for name in "qkv"
        )
        scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(slots, slots).triu(1).bool(), -torch.inf)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(slots, -1)
        x = x + gate1 * (attended @ weights[f"{prefix}.self_attn.o_proj.weight"].T)
        h = norm(x, f"{prefix}.post_attention_layernorm", shift2, scale2)
        h = F.gelu(
            h @ weights[f"{prefix}.mlp.up_proj.weight"].T + weights[f"{prefix}.mlp.up_proj.bias"], approximate="tanh"
        )
        x = x + gate2 * (h @ weights[f"{prefix}.mlp.down_proj.weight"].T + weights[f"{prefix}.mlp.down_proj.bias"])
    x = norm(x, "model.norm", *modulation("model.modulation", 2))
    logits = x @ weights["lm_head.weight"].T + weights["lm_head.bias"]
    logits[:, config.mask_token_id] = -torch.inf
    return logits


def without_mask_id(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., :MASK].float()


@torch.no_grad()
def test_forward_is_the_network_of_the_design(attention):
    model = randomized_model(attention)
    input_ids, order = random_batch(model, 2, 10), random_orders(2, 10)
    input_ids[:, 6:] = MASK
    logits = model(input_ids, position_ids=order).logits
    for row in range(2):
        expected = plain_logits(model, input_ids[row], order[row])
        torch.testing.assert_close(logits[row].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_logits_of_the_mask_id_are_minus_infinity(model, slots):
    logits = model(slots[0], position_ids=slots[1]).logits
    assert (logits[..., MASK] == -torch.inf).all()
    assert logits[..., :MASK].isfinite().all()


@torch.no_grad()
def test_a_slot_does_not_depend_on_later_slots(model, slots, tolerance):
    input_ids, order = slots
    full = without_mask_id(model(input_ids, position_ids=order).logits)
    for end in (1, 5, 9):
        part = without_mask_id(model(input_ids[:, :end], position_ids=order[:, :end]).logits)
        torch.testing.assert_close(full[:, :end], part, atol=tolerance, rtol=0)
    changed = input_ids.clone()
    changed[:, 9:] = 5
    assert not torch.allclose(full[:, 9:], without_mask_id(model(changed, position_ids=order).logits)[:, 9:])


@torch.no_grad()
def test_a_row_does_not_depend_on_the_other_rows(model, slots, tolerance):
    input_ids, order = slots
    together = without_mask_id(model(input_ids, position_ids=order).logits)
    alone = without_mask_id(model(input_ids[1:2], position_ids=order[1:2]).logits)
    torch.testing.assert_close(together[1:2], alone, atol=tolerance, rtol=0)


@torch.no_grad()
def test_positions_matter_and_are_no_borders_of_packed_sequences(model, slots, tolerance):
    """transformers reads jumps of position_ids as packed sequences; every slot must still see all before it."""
    input_ids, order = slots
    jumping = without_mask_id(model(input_ids, position_ids=order).logits)
    shifted = without_mask_id(model(input_ids, position_ids=order + 7).logits)
    torch.testing.assert_close(jumping, shifted, atol=3 * tolerance, rtol=0)  # rotary angles are relative
    changed = input_ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % MASK
    moved = (without_mask_id(model(changed, position_ids=order).logits) - jumping).abs().amax(-1)
    assert (moved > 1e-3).all(), "every slot must see slot 0"
    assert not torch.allclose(jumping, without_mask_id(model(input_ids).logits), atol=0.01)


@pytest.mark.parametrize("make_cache", [DynamicCache, None], ids=["dynamic", "preallocated"])
@torch.no_grad()
def test_cached_steps_equal_one_pass(model, slots, tolerance, make_cache):
    """Feeds masks, drops their keys and values, feeds the tokens: the logits are those of a pass from scratch."""
    from eso_lm.generation_cache import PreallocatedCache

    clean, order = random_batch(model, 3, 12), slots[1]
    cache = DynamicCache() if make_cache else PreallocatedCache(model.config.num_hidden_layers, 12)
    decided = cached = 0
    for count in (3, 1, 4, 2):
        fed = torch.cat([clean[:, cached:decided], torch.full((3, count), MASK)], dim=-1)
        positions = order[:, cached : decided + count]
        logits = model(fed, position_ids=positions, past_key_values=cache).logits[:, -count:]
        cache.crop(-count)
        cached = decided
        scratch = torch.cat([clean[:, :decided], torch.full((3, count), MASK)], dim=-1)
        expected = model(scratch, position_ids=order[:, : decided + count]).logits[:, -count:]
        torch.testing.assert_close(without_mask_id(logits), without_mask_id(expected), atol=tolerance, rtol=0)
        decided += count


@torch.no_grad()
def test_text_order_puts_clean_tokens_first(model, tolerance):
    input_ids = torch.tensor([[MASK, 3, 4, MASK, 5]])
    expected = model(torch.tensor([[3, 4, 5, MASK, MASK]]), position_ids=torch.tensor([[1, 2, 4, 0, 3]])).logits[
        :, [3, 0, 1, 4, 2]
    ]
    logits = model(input_ids).logits
    torch.testing.assert_close(without_mask_id(logits), without_mask_id(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_text_order_ignores_padding(model, tolerance, side):
    text = torch.tensor([[MASK, 3, 4, MASK, 5]])
    padding, real = torch.tensor([[9, 9, 9]]), torch.tensor([[1] * 5])
    parts = [(text, real), (padding, torch.zeros_like(padding))]
    if side == "left":
        parts.reverse()
    padded, attention_mask = (torch.cat(column, dim=-1) for column in zip(*parts, strict=True))
    logits = model(padded, attention_mask=attention_mask).logits[:, attention_mask[0].bool()]
    torch.testing.assert_close(without_mask_id(logits), without_mask_id(model(text).logits), atol=tolerance, rtol=0)


@torch.no_grad()
def test_logits_to_keep(model, slots, tolerance):
    input_ids, order = slots
    full = without_mask_id(model(input_ids, position_ids=order).logits)
    last = without_mask_id(model(input_ids, position_ids=order, logits_to_keep=4).logits)
    torch.testing.assert_close(last, full[:, -4:], atol=tolerance, rtol=0)
    chosen = without_mask_id(model(input_ids, position_ids=order, logits_to_keep=torch.tensor([0, 5])).logits)
    torch.testing.assert_close(chosen, full[:, [0, 5]], atol=tolerance, rtol=0)


@torch.no_grad()
def test_a_four_dimensional_mask_passes_through(model, slots, tolerance):
    input_ids, order = slots
    causal = torch.ones(12, 12).tril().bool()
    without_slot_0 = causal.clone()
    without_slot_0[1:, 0] = False
    plain = without_mask_id(model(input_ids, position_ids=order).logits)
    same = without_mask_id(model(input_ids, position_ids=order, attention_mask=causal.expand(3, 1, 12, 12)).logits)
    torch.testing.assert_close(same, plain, atol=tolerance, rtol=0)
    blind = model(input_ids, position_ids=order, attention_mask=without_slot_0.expand(3, 1, 12, 12)).logits[:, 1:]
    alone = model(input_ids[:, 1:], position_ids=order[:, 1:]).logits
    torch.testing.assert_close(without_mask_id(blind), without_mask_id(alone), atol=tolerance, rtol=0)


@torch.no_grad()
def test_embeddings_stand_in_for_ids(model, slots, tolerance):
    input_ids, order = slots
    embeds = model.get_input_embeddings()(input_ids)
    expected = without_mask_id(model(input_ids, position_ids=order).logits)
    logits = without_mask_id(model(inputs_embeds=embeds, position_ids=order).logits)
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_hidden_states_and_attentions_come_in_the_layout_of_the_input():
    model = randomized_model("eager")
    text = torch.tensor([[MASK, 3, 4, MASK, 5]])
    order = torch.tensor([[1, 2, 4, 0, 3]])
    outputs = model(text, output_hidden_states=True, output_attentions=True)
    in_order = model(text.gather(1, order), position_ids=order, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for states, expected in zip(outputs.hidden_states, in_order.hidden_states, strict=True):
        torch.testing.assert_close(states[:, order[0]], expected)
    for weights, expected in zip(outputs.attentions, in_order.attentions, strict=True):
        torch.testing.assert_close(weights[:, :, order[0]][..., order[0]], expected)
    torch.testing.assert_close(outputs.logits, model.compute_logits(outputs.hidden_states[-1]))


def brute_force_sequential_nll(model, clean, order, is_queried) -> torch.Tensor:
    """-log p of each queried slot from a pass of its own: the content before it, then one mask."""
    nll = torch.zeros(clean.shape)
    for row, slot in is_queried.nonzero().tolist():
        fed = torch.cat([clean[row, :slot], torch.tensor([MASK])])[None]
        logits = model(fed, position_ids=order[row : row + 1, : slot + 1]).logits[0, -1].float()
        nll[row, slot] = -logits.log_softmax(-1)[clean[row, slot]]
    return nll


@torch.no_grad()
def test_sequential_rows_equal_a_pass_for_each_query(model, tolerance):
    clean, order = random_batch(model, 3, 9), random_orders(3, 9)
    is_queried = torch.zeros(3, 9, dtype=torch.bool)
    is_queried[0, 3:] = is_queried[1, 8:] = is_queried[2] = True
    weights = is_queried * torch.rand(3, 9)
    nll = brute_force_sequential_nll(model, clean, order, is_queried)
    loss = model(
        clean.masked_fill(is_queried, MASK),
        position_ids=order,
        labels=clean,
        loss_weights=weights,
        sequential_rows=torch.ones(3, dtype=torch.bool),
        num_items_in_batch=1,
    ).loss
    torch.testing.assert_close(loss, (weights * nll).sum(), atol=20 * tolerance, rtol=0)


@torch.no_grad()
def test_content_comes_from_input_ids_where_there_is_no_label(model, tolerance):
    """A prompt has no labels, and is content all the same."""
    clean, order = random_batch(model, 2, 8), random_orders(2, 8)
    is_queried = torch.arange(8).expand(2, 8) >= 5
    labels = clean.masked_fill(torch.arange(8) < 3, -100)
    nll = brute_force_sequential_nll(model, clean, order, is_queried)
    loss = model(
        clean.masked_fill(is_queried, MASK),
        position_ids=order,
        labels=labels,
        sequential_rows=torch.ones(2, dtype=torch.bool),
    ).loss
    torch.testing.assert_close(loss, nll.sum() / 10, atol=10 * tolerance, rtol=0)


@torch.no_grad()
def test_mixed_batch_is_the_sum_of_its_rows(model, slots, tolerance):
    input_ids, order = slots
    clean = random_batch(model, 3, 12)
    fed = torch.where(input_ids == MASK, input_ids, clean)
    sequential = torch.tensor([True, False, True])
    common = {"position_ids": order, "labels": clean, "num_items_in_batch": 1}
    mixed = model(fed, sequential_rows=sequential, **common).loss
    parts = [
        model(
            fed[row : row + 1],
            position_ids=order[row : row + 1],
            labels=clean[row : row + 1],
            sequential_rows=sequential[row : row + 1],
            num_items_in_batch=1,
        ).loss
        for row in range(3)
    ]
    torch.testing.assert_close(mixed, sum(parts), atol=20 * tolerance, rtol=0)
    assert not torch.allclose(mixed, model(fed, **common).loss, atol=0.1), "the phases must differ"


@torch.no_grad()
def test_loss_is_the_weighted_cross_entropy_per_valid_token(model, slots, tolerance):
    input_ids, order = slots
    clean = random_batch(model, 3, 12)
    fed = torch.where(input_ids == MASK, input_ids, clean)
    labels = clean.masked_fill(torch.arange(12) < 2, -100)
    weights = torch.rand(3, 12)
    log_probs = model(fed, position_ids=order).logits.float().log_softmax(-1)
    nll = -log_probs.gather(-1, clean[..., None])[..., 0].masked_fill(labels == -100, 0)
    loss = model(fed, position_ids=order, labels=labels, loss_weights=weights).loss
    torch.testing.assert_close(loss, (weights * nll).sum() / 30, atol=tolerance, rtol=0)
    default = model(fed, position_ids=order, labels=labels).loss
    torch.testing.assert_close(default, nll[:, 7:].sum() / 30, atol=tolerance, rtol=0)
    given = model(fed, position_ids=order, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(given, nll[:, 7:].sum() / 7, atol=10 * tolerance, rtol=0)


@torch.no_grad()
def test_labels_in_text_order(model, tolerance):
    text, labels = torch.tensor([[MASK, 3, 4, MASK, 5]]), torch.tensor([[1, 3, 4, 2, 5]])
    order = torch.tensor([[1, 2, 4, 0, 3]])
    expected = model(text.gather(1, order), position_ids=order, labels=labels.gather(1, order)).loss
    torch.testing.assert_close(model(text, labels=labels).loss, expected, atol=tolerance, rtol=0)


def test_a_batch_without_masks_has_a_loss_of_zero_and_gradients():
    model = randomized_model().train()
    ids = random_batch(model, 2, 6)
    loss = model(
        ids,
        position_ids=random_orders(2, 6),
        labels=ids,
        loss_weights=torch.zeros(2, 6),
        sequential_rows=torch.tensor([True, False]),
    ).loss
    loss.backward()
    assert loss == 0


def test_gradients_reach_every_parameter_and_survive_checkpointing():
    gradients = {}
    for checkpointing in (False, True):
        model = randomized_model().train()
        model.config.hidden_dropout = 0.0
        for layer in model.model.layers:
            layer.dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, order = random_batch(model, 4, 8), random_orders(4, 8)
        fed = ids.masked_fill(torch.arange(8) >= 4, MASK)
        model(fed, position_ids=order, labels=ids, sequential_rows=torch.arange(4) < 2).loss.backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[False].items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, gradients[True][name])


def test_fresh_model_predicts_the_uniform_distribution():
    model = EsoForMaskedDiffusion(tiny_config()).eval()
    logits = model(random_batch(model, 2, 6), position_ids=random_orders(2, 6)).logits
    assert torch.equal(logits[..., :MASK], torch.zeros(2, 6, MASK))
    weight = model.model.embed_tokens.weight.detach()
    assert weight.abs().max() <= 32**-0.5
    assert weight.std() == pytest.approx((1 / 3 / 32) ** 0.5, rel=0.1)
    for layer in model.model.layers:
        assert not layer.modulation.weight.any()
        assert layer.self_attn.q_proj.weight.detach().std() == pytest.approx((1 / 3 / 32) ** 0.5, rel=0.1)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_exact_when_the_model_is_cast(cast):
    model = randomized_model()
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(cast)
    assert model.dtype == cast
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_trains_and_generates_far_beyond_its_positions():
    """No table is sized by max_position_embeddings: 32 in training, ten times as many here."""
    model = randomized_model().train()
    ids, order = random_batch(model, 2, 320), random_orders(2, 320)
    fed = ids.masked_fill(torch.arange(320) >= 200, MASK)
    loss = model(fed, position_ids=order, labels=ids, sequential_rows=torch.tensor([True, False])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    far = random_orders(1, 40) + 280
    logits = model(ids[:1, :40], position_ids=far).logits[0].double()
    torch.testing.assert_close(logits, plain_logits(model, ids[0, :40], far[0]), atol=1e-3, rtol=1e-3)
    assert model.generate(max_new_tokens=320, num_diffusion_steps=8, alpha_0=1.0).shape == (1, 320)


def test_tied_head_shares_the_embedding():
    model = EsoForMaskedDiffusion(tiny_config(tie_word_embeddings=True)).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.any()


def test_backbone_is_a_decoder_of_its_own(tmp_path):
    model = randomized_model()
    model.save_pretrained(tmp_path)
    backbone = EsoModel.from_pretrained(tmp_path).eval()
    ids, order = random_batch(model, 2, 6), random_orders(2, 6)
    states = backbone(ids, position_ids=order).last_hidden_state
    torch.testing.assert_close(model.compute_logits(states), model(ids, position_ids=order).logits)
    cached = backbone(ids[:, :4], use_cache=True)
    rest = backbone(ids[:, 4:], past_key_values=cached.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, backbone(ids).last_hidden_state[:, 4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # torch's kernel for CPUs with AVX2 reads memory that it never wrote
def test_flex_attention_agrees_with_sdpa():
    sdpa, flex = randomized_model("sdpa"), randomized_model("flex_attention")
    ids, order = random_batch(sdpa, 2, 8), random_orders(2, 8)
    fed = ids.masked_fill(torch.arange(8) >= 4, MASK)
    torch.testing.assert_close(
        flex(fed, position_ids=order).logits, sdpa(fed, position_ids=order).logits, atol=1e-4, rtol=0
    )
    batch = {"position_ids": order, "labels": ids, "sequential_rows": torch.tensor([True, False])}
    torch.testing.assert_close(flex(fed, **batch).loss, sdpa(fed, **batch).loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of `input_ids` and `inputs_embeds`"),
        ({"input_ids": torch.ones(1, 4).long(), "inputs_embeds": torch.ones(1, 4, 32)}, "got both"),
        ({"input_ids": torch.ones(1, 4).long(), "position_ids": torch.arange(3)[None]}, "each of the 4 slots"),
        ({"input_ids": torch.ones(1, 4).long(), "loss_weights": torch.ones(1, 4)}, "need `labels`"),
        ({"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long(), "use_cache": True}, "no cache"),
        ({"input_ids": torch.ones(4).long()}, r"`input_ids` must have the shape \(batch, slots\), got \(4,\)"),
        ({"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 3).long()}, "`labels` must have the shape"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)}, "`attention_mask` must have"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        randomized_model()(**arguments)


@pytest.mark.parametrize("backbone", [None, "llama"])
@pytest.mark.parametrize("attention_mask", [None, torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])])
def test_what_is_handed_out_in_text_order_is_part_of_the_graph(backbone, attention_mask):
    sizes = {} if backbone is None else {"backbone_config": backbone_config(backbone)}
    model = randomized_model("eager", **sizes)
    ids = random_batch(model, 2, 6)
    ids[:, 1::2] = MASK
    output = model(ids, attention_mask=attention_mask, output_hidden_states=True, output_attentions=True)
    for states in (*output.hidden_states, *output.attentions):
        states.retain_grad()
    output.logits[..., :MASK].sum().backward()
    assert all(states.grad.any() for states in (*output.hidden_states, *output.attentions))
    one = model(ids, attention_mask=attention_mask, output_hidden_states=[1])
    (chosen,) = (states for states in one.hidden_states if states is not None)
    # Versions of transformers count the states before the first layer, or do not.
    assert any(torch.allclose(chosen, states, atol=1e-5) for states in output.hidden_states[1:])


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])])
def test_text_order_sees_what_the_order_clean_then_masked_shows(attention, mask):
    """Slot by slot, against a forward in generation order of what the slot should see, and itself."""
    model = randomized_model(attention)
    ids = random_batch(model, 2, 7)
    ids[0, [2, 5]] = ids[1, [0, 1, 3]] = MASK
    logits = model(ids, attention_mask=mask).logits
    for row in range(2):
        real = [slot for slot in range(7) if mask is None or mask[row, slot]]
        clean, masked = ([slot for slot in real if (ids[row, slot] == MASK) == is_it] for is_it in (False, True))
        order = torch.tensor(clean + masked)
        positions = order - real[0]
        expected = model(ids[row, order][None], position_ids=positions[None]).logits[0]
        torch.testing.assert_close(logits[row, order], expected, atol=1e-4, rtol=0)


def test_logits_are_not_written_into_what_the_head_gave():
    """A view that autograd keeps, as tensor parallelism gathers the vocabulary's parts, must not be changed."""

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.view_as(logits)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    model = randomized_model()
    model.lm_head.register_forward_hook(lambda _, __, logits: Gather.apply(logits))
    model(random_batch(model, 1, 4)).logits[..., :MASK].sum().backward()
    assert model.lm_head.weight.grad.any()
