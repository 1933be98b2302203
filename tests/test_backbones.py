"""Causal decoders of transformers as backbones: the invariants of an Eso-LM hold for each, or it is refused."""

import itertools
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import backbone_config, random_batch, random_orders, randomized_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoConfig, EsoForMaskedDiffusion
from eso_lm.modeling_backbone import verify_backbone

KINDS = ["llama", "qwen3", "gpt2", "qwen3_moe", "mixtral", "mistral", "phi", "gpt_neox", "opt", "deepseek_v3"]
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def eso_of(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **fields) -> EsoForMaskedDiffusion:
    sizes = {"vocab_size": fields.pop("vocab_size")} if "vocab_size" in fields else {}
    fields = {"scale": 0.4} | fields
    return randomized_model(attention, dtype, backbone_config=backbone_config(kind, **sizes), **fields)


@torch.no_grad()
def test_slots_are_causal_and_rows_apart(kind, attention):
    model = eso_of(kind, attention)
    assert model.model.config._attn_implementation == attention
    ids, orders = random_batch(model, 3, 9), random_orders(3, 9)
    whole = model(ids, position_ids=orders).logits
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 23
    later = orders.clone()
    later[:, 6:] = orders[:, 6:].flip(1)
    torch.testing.assert_close(model(changed, position_ids=later).logits[:, :6], whole[:, :6], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids[1:2], position_ids=orders[1:2]).logits, whole[1:2], atol=1e-4, rtol=0)
    padding = torch.ones_like(ids)
    padding[:, 6:] = 0
    padded = model(changed, position_ids=later, attention_mask=padding).logits
    torch.testing.assert_close(padded[:, :6], whole[:, :6], atol=1e-4, rtol=0)
    assert (model(ids, position_ids=orders.flip(1)).logits - whole)[..., :-1].abs().max() > 1e-2, "positions matter"


@torch.no_grad()
@pytest.mark.parametrize("cache_implementation", [None, "dynamic"])
def test_cached_and_uncached_generation_agree(kind, attention, cache_implementation):
    model = eso_of(kind, attention)
    outputs = [
        model.generate(
            max_new_tokens=10,
            num_return_sequences=2 if cache_implementation is None else 1,
            num_diffusion_steps=4,
            return_dict_in_generate=True,
            output_logits=True,
            generator=torch.Generator().manual_seed(3),
            **settings,
        )
        for settings in ({"cache_implementation": cache_implementation}, {"use_cache": False})
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"lossless": True}, {"cache_implementation": "static"}])
def test_rows_of_a_ragged_batch_are_what_they_would_be_alone(kind, attention, settings):
    model = eso_of(kind, attention)
    prompts = random_batch(model, 2, 4)
    prompts[1, 2] = 23  # a hole
    attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    settings = settings | {"max_new_tokens": 6, "pad_token_id": 0, "alpha_0": 0.6}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    both = model.generate(prompts, attention_mask=attention_mask, generator=generators, **settings)
    for row in range(2):
        prompt = prompts[row : row + 1][attention_mask[row : row + 1].bool()][None]
        generator = [torch.Generator().manual_seed(row)]
        alone = model.generate(prompt, generator=generator, **settings)
        assert torch.equal(both[row, -alone.shape[1] :], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 4])
@pytest.mark.parametrize("settings", [{"lossless": True}, {"entropy_bound": 4.0}, {"cache_implementation": "static"}])
def test_rows_of_equal_prompts_are_what_they_would_be_alone(attention, length, settings):
    """Their first forward is as wide as the mask that names each row's own slots."""
    model = eso_of("llama", attention)
    prompts = random_batch(model, 2, length)
    settings = settings | {"max_new_tokens": 6, "alpha_0": 1.0}
    both = model.generate(prompts, generator=[torch.Generator().manual_seed(seed) for seed in range(2)], **settings)
    for row in range(2):
        alone = model.generate(prompts[row : row + 1], generator=[torch.Generator().manual_seed(row)], **settings)
        assert torch.equal(both[row], alone[0])


@torch.no_grad()
@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_probabilities_of_all_texts_add_up_to_one(kind, attention, alpha_0):
    model = eso_of(kind, attention, vocab_size=4)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    exact = model.log_likelihood(texts, num_orders="all", alpha_0=alpha_0)
    assert exact.log_likelihood.exp().sum() == pytest.approx(1, abs=1e-5)
    in_chunks = model.log_likelihood(texts, num_orders="all", alpha_0=alpha_0, chunk_length=2)
    torch.testing.assert_close(in_chunks.log_likelihood, exact.log_likelihood, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("settings", [{"num_diffusion_steps": "max"}, {"lossless": True, "draft_length": 3}])
def test_samples_follow_the_likelihood(kind, settings):
    model = eso_of(kind, vocab_size=4, alpha_0=0.5, scale=0.2)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    expected = 4000 * model.log_likelihood(texts, num_orders="all").log_likelihood.exp().double()
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    output = model.generate(
        max_new_tokens=3, num_return_sequences=4000, generator=generators, return_dict_in_generate=True, **settings
    )
    counts = (output.sequences[:, None] == texts).all(dim=-1).sum(dim=0)
    assert ((counts - expected) ** 2 / expected).sum() < 54.1  # 26 degrees of freedom, p = 0.001


def test_log_probs_of_a_sample_are_its_likelihood(kind):
    model = eso_of(kind)
    output = model.generate(max_new_tokens=8, num_diffusion_steps="max", return_dict_in_generate=True)
    assert output.unmasking_steps.max() == 8, "one token a step"
    score = model.log_likelihood(output.sequences, orders=output.unmasking_steps.argsort(dim=1)[:, None])
    torch.testing.assert_close(output.log_probs.sum(1), score.log_likelihood, atol=1e-3, rtol=0)


@torch.no_grad()
def test_static_steps_and_other_caches(kind):
    """A cache of transformers' own, fed in two parts with shuffled positions, equals one pass."""
    model = eso_of(kind)
    ids, orders = random_batch(model, 2, 8), random_orders(2, 8)
    whole = model(ids, position_ids=orders).logits
    cache = DynamicCache()
    parts = [
        model(ids[:, part], position_ids=orders[:, part], past_key_values=cache).logits
        for part in (slice(0, 4), slice(4, 7), slice(7, 8))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_grouped_heads_need_no_copies(monkeypatch):
    """While decoding; the cache of a Llama with two heads of keys for four of queries is read as it is."""
    model = eso_of("llama")
    ids, orders = random_batch(model, 2, 8), random_orders(2, 8)
    expected = model(ids, position_ids=orders).logits
    seen = []

    def attention(query, key, value, **kwargs):
        seen.append((query.shape[1], key.shape[1]))
        return scaled_dot_product_attention(query, key, value, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    with model.ready_to_decode():
        cache = model(ids[:, :5], position_ids=orders[:, :5], use_cache=True).past_key_values
        seen.clear()
        logits = model(ids[:, 5:], position_ids=orders[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[:, 5:], atol=1e-4, rtol=0)
    assert seen == [(2, 2), (2, 2)]
    assert model.model.config._attn_implementation == "sdpa"


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # torch's kernel for CPUs with AVX2 reads memory that it never wrote
def test_flex_attention_agrees_with_sdpa():
    model = eso_of("llama")
    ids, orders = random_batch(model, 2, 8), random_orders(2, 8)
    expected = model(ids, position_ids=orders).logits
    text = model.log_likelihood(ids, orders=orders[:1]).log_likelihood
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids, position_ids=orders).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.log_likelihood(ids, orders=orders[:1]).log_likelihood, text, atol=1e-3, rtol=0)


def collated(model: EsoForMaskedDiffusion, alpha_0: float = 0.5, rows: int = 4, length: int = 8) -> dict:
    collator = DataCollatorForHybridMaskedDiffusion(
        mask_token_id=model.config.mask_token_id, pad_token_id=0, alpha_0=alpha_0, seed=0
    )
    ids = random_batch(model, rows, length).tolist()
    return collator([{"input_ids": row[: length - index % 3]} for index, row in enumerate(ids)])


def test_gradients_reach_the_weights_and_survive_checkpointing(kind):
    model = eso_of(kind).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = collated(model)
    model.config.backbone_config.attention_dropout = 0.0
    model.eval()
    model(**batch).loss.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert sum(gradient.abs().sum() > 0 for gradient in expected.values()) >= 0.8 * len(list(model.parameters()))
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    if kind not in ("gpt2", "opt"):  # whose dropout is not switched off so easily
        for name, gradient in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-3)


def test_saved_models_load_everywhere(kind, tmp_path):
    model = eso_of(kind, alpha_0=0.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is EsoForMaskedDiffusion
    assert loaded.config.alpha_0 == 0.25
    assert type(loaded.model) is type(model.model)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.config.backbone_config.to_dict() == loaded.model.config.to_dict()
    assert kind in (tmp_path / "README.md").read_text()
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.dtype == half.lm_head.weight.dtype == torch.bfloat16
    assert AutoModel.from_pretrained(tmp_path, device_map={"": "cpu"}).generate(max_new_tokens=3).shape == (1, 3)


@pytest.mark.slow
def test_a_folder_loads_without_the_package(tmp_path):
    eso_of("llama").save_pretrained(tmp_path / "model")
    script = f"""
import sys
sys.modules["eso_lm"] = None
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
torch.manual_seed(0)
print(model.generate(max_new_tokens=8, num_diffusion_steps=3)[0].tolist())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    expected = AutoModel.from_pretrained(tmp_path / "model").generate(max_new_tokens=8, num_diffusion_steps=3)
    assert result.stdout.strip() == str(expected[0].tolist())


def causal_model(kind: str, **overrides):
    """A causal model of transformers with random weights that all count."""
    model = AutoModelForCausalLM.from_config(backbone_config(kind, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
            if "norm" in name or "ln_" in name:
                parameter.add_(1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True])
def test_a_causal_model_is_taken_over_whole(kind, by_name, tmp_path):
    """In text order, on clean text, body and head say what the causal model says."""
    causal = causal_model(kind)
    before = {name: weight.clone() for name, weight in causal.state_dict().items()}
    ids = torch.randint(0, 24, (2, 10))
    expected = causal(ids).logits
    if by_name:
        causal.save_pretrained(tmp_path)
    model = EsoForMaskedDiffusion.from_causal_lm(tmp_path if by_name else causal, alpha_0=0.25)
    assert (model.config.alpha_0, model.config.mask_token_id, model.config.vocab_size) == (0.25, 24, 25)
    logits = model(ids, position_ids=torch.arange(10).expand(2, 10)).logits
    torch.testing.assert_close(logits[..., :24], expected, atol=1e-4, rtol=1e-4)
    assert (logits[..., 24] == -torch.inf).all()
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[24], embeddings[:24].mean(0))
    assert all(torch.equal(causal.state_dict()[name], weight) for name, weight in before.items()), "left as it was"
    tied = causal.config.tie_word_embeddings
    assert (model.lm_head.weight is embeddings) == tied
    model.save_pretrained(tmp_path / "eso")
    again = AutoModel.from_pretrained(tmp_path / "eso")
    torch.testing.assert_close(again(ids, position_ids=torch.arange(10).expand(2, 10)).logits, logits)
    assert model.generate(max_new_tokens=4).max() < 24


def test_a_mask_of_the_vocabulary_and_special_tokens():
    causal = causal_model("llama", eos_token_id=3, pad_token_id=4)
    model = EsoForMaskedDiffusion.from_causal_lm(causal, mask_token_id=20)
    assert (model.config.vocab_size, model.config.mask_token_id) == (24, 20)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (3, 4)
    assert EsoForMaskedDiffusion.from_causal_lm(causal, mask_token_id=26).config.vocab_size == 27
    with pytest.raises(ValueError, match="`mask_token_id` must be an id"):
        EsoForMaskedDiffusion.from_causal_lm(causal, mask_token_id=-1)
    with pytest.raises(ValueError, match="`eos_token_id` and `mask_token_id` are both 3"):
        EsoForMaskedDiffusion.from_causal_lm(causal, mask_token_id=3)
    with pytest.raises(ValueError, match="are for loading"):
        EsoForMaskedDiffusion.from_causal_lm(causal, dtype="bfloat16")


def test_adapters_train_on_a_taken_over_model():
    model = EsoForMaskedDiffusion.from_causal_lm(causal_model("llama"), alpha_0=0.5)
    batch = collated(model)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    merged = adapted.merge_and_unload()
    assert merged.generate(max_new_tokens=4).shape == (1, 4)


def test_the_vocabulary_can_grow(tmp_path):
    model = eso_of("llama")
    model.resize_token_embeddings(30)
    assert (model.config.vocab_size, model.config.backbone_config.vocab_size) == (30, 30)
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).lm_head.weight.shape[0] == 30


def test_plans_are_those_of_the_backbone():
    model = eso_of("llama")
    assert model._tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert "LlamaDecoderLayer" in model._no_split_modules


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"lossless": True, "draft_length": 3}])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma2", {"layer_types": ["full_attention"] * 2}),  # whatever `sliding_window` says
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}),
        ("deepseek_v2", {}),  # its rotary embedding needs contiguous states
        ("opt", {"word_embed_proj_dim": 16}),  # its embeddings are narrower than its layers
    ],
)
def test_log_probs_of_particular_decoders(kind, fields, settings):
    """Token by token, left to right, against forwards of the text so far and one mask."""
    model = randomized_model("eager", scale=0.4, backbone_config=backbone_config(kind, **fields))
    prompts = random_batch(model, 3, 2)
    torch.manual_seed(0)
    output = model.generate(prompts, max_new_tokens=8, alpha_0=0.0, return_dict_in_generate=True, **settings)
    for length in range(2, 10):
        text = output.sequences[:, : length + 1].clone()
        text[:, -1] = model.config.mask_token_id
        logits = model(text, position_ids=torch.arange(length + 1)[None].expand(3, -1)).logits[:, -1]
        expected = logits.log_softmax(dim=-1).gather(1, output.sequences[:, length, None])[:, 0]
        torch.testing.assert_close(output.log_probs[:, length], expected, atol=1e-4, rtol=0)


def test_learned_positions_end():
    model = eso_of("gpt2")
    assert (model.max_text_length, eso_of("opt").max_text_length, eso_of("llama").max_text_length) == (32, 32, None)
    assert model.generate(max_new_tokens=32).shape == (1, 32)
    with pytest.raises(ValueError, match="must be at most 32"):
        model.generate(max_new_tokens=33)
    with pytest.raises(ValueError, match="at most 32 tokens, got 33"):
        model.log_likelihood(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mistral", {"sliding_window": 8}, "`sliding_window=8`.*count slots"),
        ("gemma2", {}, "'sliding_attention'.*count slots"),
        ("mamba", {}, "carry a state"),
        ("jamba", {}, "carry a state"),
        ("recurrent_gemma", {}, "cannot be the backbone"),
        ("rwkv", {}, "cannot be the backbone"),
        ("bert", {}, "not causal"),
        ("t5", {}, "an encoder with a decoder"),
        ("bloom", {}, r"does not take \['position_ids'\]"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("falcon", {"alibi": False}, "masks of its own"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2}, "masks of its own"),
        (
            "llama",
            {"rope_parameters": DYNAMIC_ROPE},
            "change with the length",
        ),
        ("gemma3", {}, "pass its `text_config`"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(kind, fields, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        EsoForMaskedDiffusion(EsoConfig(backbone_config=backbone_config(kind, **fields)))


def test_flash_attention_is_refused():
    config = EsoConfig(backbone_config=backbone_config("llama"))
    config.backbone_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="packed sequences"):
        EsoForMaskedDiffusion(config)


def test_backbones_are_tried_out():
    """What a signature does not show: a decoder that ignores positions, one that looks ahead, a head with a cap."""
    decoder = causal_model("llama").base_model
    verify_backbone(decoder)
    rotary = decoder.rotary_emb.forward
    decoder.rotary_emb.forward = lambda states, position_ids: rotary(
        states, torch.arange(position_ids.shape[1]).expand_as(position_ids)
    )
    with pytest.raises(ValueError, match="cannot be the backbone"):
        verify_backbone(decoder)
    with pytest.raises(ValueError, match="more than a linear map"):
        EsoForMaskedDiffusion.from_causal_lm(causal_model("cohere", logit_scale=0.5))
    # A cap does not show in logits far below it.
    layers = {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": 1e4}
    with pytest.raises(ValueError, match="more than a linear map"):
        EsoForMaskedDiffusion.from_causal_lm(causal_model("gemma2", **layers))


@pytest.mark.parametrize(
    ("model", "mask", "message"),
    [
        (3, None, "`model` must be a causal language model, .* got int"),
        (randomized_model(), None, "got EsoForMaskedDiffusion"),
        ("nowhere", "x", "`mask_token_id` must be an id .*, got 'x'"),
    ],
)
def test_what_is_taken_over_is_checked(model, mask, message):
    with pytest.raises(ValueError, match=message):
        EsoForMaskedDiffusion.from_causal_lm(model, mask_token_id=mask)


@pytest.mark.parametrize(
    ("value", "message"),
    [({"hidden_size": 8}, "must have a `model_type`"), (3, "must be the configuration of a model")],
)
def test_configurations_are_checked(value, message):
    with pytest.raises(ValueError, match=message):
        EsoConfig(backbone_config=value)
