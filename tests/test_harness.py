"""lm-evaluation-harness: a local task, its numbers worked out again by brute force."""

import json
import math

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tiny_models import save_with_tokenizer

from eso_lm.harness import EsoHarnessLM

TASKS = {
    "eso_choice": """
task: eso_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
""",
    "eso_perplexity": """
task: eso_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
    "eso_writing": """
task: eso_writing
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "fox"
generation_kwargs: {{until: ["dog"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}
DOCUMENTS = [
    {"context": "The quick brown", "choices": [" fox", " dog", " lazy"], "answer": 0},
    {"context": "The lazy", "choices": [" fox jumps", " dog", " over the"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_with_tokenizer(path, scale=0.2)
    return path


@pytest.fixture
def tasks(tmp_path) -> TaskManager:
    (tmp_path / "data.json").write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.format(data=tmp_path / "data.json"))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_harness_runs_local_tasks(folder, tasks, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = lm_eval.simple_evaluate(
        model="eso",
        model_args=f"pretrained={folder},num_orders=3,device=cpu",
        tasks=list(TASKS),
        task_manager=tasks,
        batch_size=2,
        bootstrap_iters=0,
    )
    lm = EsoHarnessLM(str(folder), num_orders=3, device="cpu")
    right = 0
    for document in DOCUMENTS:
        scores = [brute_force(lm, document["context"], choice)[0] for choice in document["choices"]]
        right += scores.index(max(scores)) == document["answer"]
    assert results["results"]["eso_choice"]["acc,none"] == right / 2
    bits = 0.0
    for document in DOCUMENTS:
        ids = lm.tok_encode(document["context"])
        output = lm.model.log_likelihood(
            torch.tensor([[lm.prefix_token_id, *ids]]),
            context_mask=torch.tensor([[1] + [0] * len(ids)]),
            num_orders=3,
            generator=torch.Generator().manual_seed(0),
        )
        bits -= output.log_likelihood.item() / math.log(2)
    bits /= sum(len(document["context"].encode()) for document in DOCUMENTS)
    assert results["results"]["eso_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert "exact_match,none" in results["results"]["eso_writing"]


@torch.no_grad()
def brute_force(lm, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token, each with a forward of its own, in the orders that the seed draws."""
    given, scored = lm._encode_pair(context, continuation)
    text = torch.tensor([given + scored])
    context_mask = torch.tensor([[1] * len(given) + [0] * len(scored)])
    orders = lm.model.log_likelihood(
        text, context_mask=context_mask, num_orders=3, generator=torch.Generator().manual_seed(0)
    ).orders[0]
    totals, first_is_greedy = [], None
    for order in orders.tolist():
        total, is_greedy = 0.0, True
        for slot in range(len(given), len(order)):
            ids = torch.cat([text[0, order[:slot]], torch.tensor([lm.model.config.mask_token_id])])[None]
            logits = lm.model(ids, position_ids=torch.tensor([order[: slot + 1]])).logits[0, -1]
            total += float(logits.log_softmax(dim=-1)[text[0, order[slot]]])
            is_greedy &= bool(logits.argmax() == text[0, order[slot]])
        totals.append(total)
        first_is_greedy = is_greedy if first_is_greedy is None else first_is_greedy
    return float(torch.tensor(totals).logsumexp(0) - math.log(3)), first_is_greedy


def test_likelihoods_of_continuations_are_those_of_brute_force(folder):
    lm = EsoHarnessLM(str(folder), num_orders=3, device="cpu", batch_size=4)
    pairs = [(document["context"], choice) for document in DOCUMENTS for choice in document["choices"]]
    pairs.append(("The", " quick brown fox jumps over"))
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    results = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (log_likelihood, is_greedy) in zip(pairs, results, strict=True):
        expected = brute_force(lm, context, continuation)
        assert log_likelihood == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]
    alone = lm.loglikelihood(requests[-1:], disable_tqdm=True)
    assert alone[0][0] == pytest.approx(results[-1][0], abs=1e-4)


@torch.no_grad()
def brute_force_of_a_sampler(lm, context: str, continuation: str, sampler: dict) -> float:
    """Group by group, each with a forward of its own, under the plans that the seed draws."""
    given, scored = lm._encode_pair(context, continuation)
    text = torch.tensor([given + scored])
    context_mask = torch.tensor([[1] * len(given) + [0] * len(scored)])
    generator = torch.Generator().manual_seed(lm.seed)
    plans = lm.model.log_likelihood(text, None, context_mask, 3, generator=generator, **sampler)
    totals = []
    for order, groups in zip(plans.orders[0].tolist(), plans.groups[0].tolist(), strict=True):
        total = 0.0
        for number in range(1, max(groups) + 1):
            start, stop = groups.index(number), len(groups) - groups[::-1].index(number)
            masks = torch.full((stop - start,), lm.model.config.mask_token_id)
            ids = torch.cat([text[0, order[:start]], masks])[None]
            logits = lm.model(ids, position_ids=torch.tensor([order[:stop]])).logits[0, start:]
            total += float(logits.log_softmax(dim=-1).gather(1, text[0, order[start:stop], None]).sum())
        totals.append(total)
    assert max(groups) < len(scored), "some tokens are drawn together"
    return float(torch.tensor(totals).logsumexp(0) - math.log(3))


@pytest.mark.parametrize(
    "sampler",
    [{"num_diffusion_steps": 2, "unmasking_order": "strided"}, {"num_diffusion_steps": 1, "block_length": 5}],
)
def test_likelihoods_are_those_of_the_sampler(folder, sampler):
    lm = EsoHarnessLM(str(folder), num_orders=3, device="cpu", batch_size=4, alpha_0=1.0, seed=4, **sampler)
    pairs = [("The", " quick brown fox jumps over"), ("The lazy", " dog jumps over the quick brown fox.")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    results = lm.loglikelihood(requests, disable_tqdm=True)
    for pair, (log_likelihood, _) in zip(pairs, results, strict=True):
        expected = brute_force_of_a_sampler(lm, *pair, sampler={"alpha_0": 1.0} | sampler)
        assert log_likelihood == pytest.approx(expected, abs=1e-3)
    one_by_one = EsoHarnessLM(str(folder), num_orders=3, device="cpu", alpha_0=1.0, seed=4)
    assert abs(one_by_one.loglikelihood(requests, disable_tqdm=True)[0][0] - results[0][0]) > 0.01


def test_adaptive_unmasking_is_scored_as_it_decides(folder):
    lm = EsoHarnessLM(str(folder), device="cpu", batch_size=2, alpha_0=1.0, entropy_bound=20.0)
    pairs = [("The", " quick brown fox jumps over"), ("", " dog")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    together = lm.loglikelihood(requests, disable_tqdm=True)
    alone = [lm.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-3)
    given, scored = lm._encode_pair(*pairs[0])
    output = lm.model.log_likelihood(
        torch.tensor([given + scored]),
        context_mask=torch.tensor([[1] * len(given) + [0] * len(scored)]),
        generator=torch.Generator().manual_seed(0),
        alpha_0=1.0,
        entropy_bound=20.0,
    )
    assert together[0][0] == pytest.approx(output.log_likelihood.item(), abs=1e-3)
    assert output.num_function_evaluations.item() < len(scored)


def test_full_windows_keep_a_token_of_context(folder):
    """Rolling windows of max_length tokens, each given the token before it."""
    lm = EsoHarnessLM(str(folder), device="cpu", alpha_0=0.0, max_length=4)
    text = "The quick brown fox jumps over the lazy dog."
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    assert len(ids) > 8
    expected = 0.0
    for start in range(1, len(ids), 4):
        # The harness fills up the last window with what came before it, and counts its own tokens only.
        stop = min(start + 4, len(ids))
        first = max(0, stop - 5) if stop == len(ids) else start - 1
        window = torch.tensor([ids[first:stop]])
        context = torch.zeros_like(window)
        context[:, : start - first] = 1
        expected += lm.model.log_likelihood(window, context_mask=context, alpha_0=0.0).log_likelihood.item()
    result = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert result[0] == pytest.approx(expected, abs=1e-3)


def test_a_temperature_of_zero_is_greedy(folder):
    lm = EsoHarnessLM(str(folder), device="cpu", alpha_0=0.0)
    settings = {"until": ["~"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.0}
    texts = set()
    for seed in range(3):
        torch.manual_seed(seed)
        texts.add(lm.generate_until([Instance("generate_until", {}, ("The", settings), 0)], disable_tqdm=True)[0])
    assert len(texts) == 1


@pytest.mark.parametrize(
    "arguments",
    [{"alpha_0": 2}, {"num_orders": 0}, {"num_orders": "all"}, {"num_diffusion_steps": 0}, {"entropy_bound": -1}],
)
def test_model_arguments_are_checked(folder, arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        EsoHarnessLM(str(folder), device="cpu", **arguments)


def test_text_is_generated_until_a_stop(folder):
    lm = EsoHarnessLM(str(folder), device="cpu", batch_size=2, alpha_0=1.0)
    settings = {"until": ["o"], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, settings), index) for index, text in enumerate(["The", "A fox"])]
    for text in lm.generate_until(requests, disable_tqdm=True):
        assert "o" not in text
