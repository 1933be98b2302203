"""Generative perplexity: the perplexity of generated texts under another, autoregressive model."""

import datasets
import evaluate
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

DESCRIPTION = """\
The perplexity of texts under a judge, any causal language model of transformers, given by name or path. Report it with
an entropy of the texts beside it: repetitive text has a low perplexity.
"""
INPUTS_DESCRIPTION = """\
Args:
    predictions: Texts.
    model_id: Name or path of the judge, with its tokenizer.
    batch_size: Texts at a time, 8 by default.
    max_length: Tokens of each text that count; by default as many as the judge has positions for.
    device: Where the judge runs; by default the accelerator if there is one.
Returns:
    perplexity: exp of the mean negative log-likelihood of all tokens together; perplexities: of each text (NaN for a
    text without a token to predict); mean_perplexity: their mean. A judge with a token for the beginning (or else the
    end) of text predicts the first token from it.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS_DESCRIPTION)
class GenerativePerplexity(evaluate.Metric):
    """Generative perplexity as an evaluate module: `evaluate.load("metrics/generative_perplexity")`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    @torch.no_grad()
    def _compute(
        self,
        predictions: list[str],
        model_id: str,
        batch_size: int = 8,
        max_length: int | None = None,
        device: str | None = None,
    ) -> dict[str, float | list[float]]:
        if len(predictions) == 0:
            raise ValueError("`predictions` must hold at least one text.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if device is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(model_id).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        max_length = max_length or getattr(model.config, "max_position_embeddings", None)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        prefix = [] if start is None else [start]
        rows = [(prefix + tokenizer(text, add_special_tokens=False)["input_ids"])[:max_length] for text in predictions]
        losses, counts = [], []
        for first in tqdm(range(0, len(rows), batch_size), desc="Judging", delay=10):
            batch = rows[first : first + batch_size]
            width = max(1, *(len(row) for row in batch))
            input_ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=device)
            logits = model(input_ids, attention_mask=mask).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
            losses.append((loss * mask[:, 1:]).sum(dim=-1).double().cpu())
            counts.append(mask[:, 1:].sum(dim=-1).cpu())
        losses, counts = torch.cat(losses), torch.cat(counts)
        perplexities = (losses / counts).exp()  # 0 / 0 is NaN
        return {
            "perplexity": float((losses.sum() / counts.sum()).exp()),
            "mean_perplexity": float(perplexities.nanmean()),
            "perplexities": perplexities.tolist(),
        }
