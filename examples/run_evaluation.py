"""Evaluate an Eso-LM on a dataset: NELBO, exact likelihood over more and more orders, and the quality of its samples.

python examples/run_evaluation.py --model outputs/quickstart --data my_texts --output outputs/evaluation
python examples/run_evaluation.py --model my-eso-lm --data wikitext --data_config wikitext-2-raw-v1 --split test
python examples/run_evaluation.py --model my-eso-lm --data held_out.jsonl --num_samples 256 --judge gpt2-large
python examples/run_evaluation.py --model my-eso-lm --data held_out.jsonl --budgets 4 8 16 --entropy_bounds 4 16

`--data` is a file (.txt, .jsonl, .json, .parquet), a folder of .txt files, or the name of a dataset on the Hub. Writes
`evaluation.json`, with all settings, and `bound.png`, the bound on the perplexity against the number of orders; with
`--budgets`, exact nats per token under samplers at so many forwards, also `budgets.md` and `budgets.png`.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import evaluate
import torch
import transformers
from likelihoods import ORDERS, budget_settings, budgets_report, plot_bound, plot_budgets, score_orders, score_samplers
from text_data import load_texts, pack
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
)

from eso_lm import EsoForMaskedDiffusion

METRICS = Path(__file__).parents[1] / "metrics"


@dataclass
class Arguments:
    """What to evaluate on what."""

    model: str = field(metadata={"help": "name or folder of the model"})
    data: str | None = field(default=None, metadata={"help": "file, folder or Hub dataset; unset: samples only"})
    data_config: str | None = field(default=None, metadata={"help": "configuration of a Hub dataset"})
    split: str = field(default="train", metadata={"help": "split of the dataset; files have `train` only"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    output: Path = field(default=Path("outputs/evaluation"), metadata={"help": "folder for the results"})
    per_document: bool = field(
        default=False, metadata={"help": "score documents one by one, cut to `length`; else packed into blocks"}
    )
    length: int | None = field(default=None, metadata={"help": "tokens a block; unset: the model's positions"})
    max_sequences: int = field(default=256, metadata={"help": "blocks or documents to score"})
    alpha_0: float | None = field(default=None, metadata={"help": "of likelihoods and samples; unset: the model's"})
    num_orders: int = field(
        default=16, metadata={"help": "the most orders of a likelihood; 1, 2, 4, ... are reported"}
    )
    num_nelbo_draws: int = field(default=16, metadata={"help": "draws of the noise for each sequence"})
    budgets: list[int] = field(
        default_factory=list,
        metadata={"help": "numbers of diffusion steps of samplers to score the text under"},
    )
    budget_orders: list[str] = field(
        default_factory=lambda: ["random", "strided"], metadata={"help": f"their unmasking orders, of {ORDERS}"}
    )
    budget_alphas: list[float] = field(
        default_factory=list, metadata={"help": "their alpha_0; unset: `alpha_0`, or the model's"}
    )
    entropy_bounds: list[float] = field(
        default_factory=list, metadata={"help": "of adaptive samplers beside them (a forward a group: slower)"}
    )
    num_plans: int = field(default=3, metadata={"help": "plans of a text, for samplers that are not adaptive"})
    num_samples: int = field(default=0, metadata={"help": "texts to generate and judge"})
    sample_length: int | None = field(default=None, metadata={"help": "tokens a sample; unset: `length`"})
    num_diffusion_steps: int | None = None
    unmasking_order: str | None = None
    entropy_bound: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    batch_size: int = field(default=16, metadata={"help": "samples at a time"})
    judge: str | None = field(default=None, metadata={"help": "causal model for generative perplexity and MAUVE"})
    mauve: bool = field(default=False, metadata={"help": "MAUVE against the data (needs `mauve-text` and a judge)"})
    seed: int = 0

    def __post_init__(self):
        if self.data is None and self.num_samples == 0:
            raise ValueError("There is nothing to do: give `--data`, `--num_samples`, or both.")
        if self.num_samples < 0:
            raise ValueError(f"`--num_samples` must not be negative, got {self.num_samples}.")
        if self.judge is not None and self.num_samples == 0:
            raise ValueError("`--judge` judges samples: give `--num_samples` too.")
        for name in ("length", "sample_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("max_sequences", "num_orders", "num_nelbo_draws", "num_plans", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if self.budgets and self.data is None:
            raise ValueError("`--budgets` scores texts: give `--data` too.")
        if (self.entropy_bounds or self.budget_alphas) and not self.budgets:
            raise ValueError("`--entropy_bounds` and `--budget_alphas` add to `--budgets`: give that too.")
        if any(count < 1 for count in self.budgets):
            raise ValueError(f"`--budgets` must be at least 1, got {self.budgets}.")
        if not set(self.budget_orders) <= set(ORDERS):
            raise ValueError(f"`--budget_orders` must be some of {ORDERS}, got {self.budget_orders}.")
        if not all(0 <= alpha_0 <= 1 for alpha_0 in self.budget_alphas):
            raise ValueError(f"`--budget_alphas` must be in [0, 1], got {self.budget_alphas}.")
        if not all(bound >= 0 for bound in self.entropy_bounds):
            raise ValueError(f"`--entropy_bounds` must not be negative, got {self.entropy_bounds}.")
        if self.mauve and (self.data is None or self.judge is None or self.num_samples == 0):
            raise ValueError(
                "`--mauve` compares samples with data by a judge: give `--data`, `--judge`, `--num_samples`."
            )
        if self.mauve and find_spec("mauve") is None:
            raise ValueError("`--mauve` needs the package `mauve-text`: install it, or leave `--mauve` out.")


def sequences(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, args: Arguments
) -> tuple[torch.LongTensor, torch.LongTensor, int]:
    """Ids and attention mask, (sequences, length) each, and the number of bytes of the text that is scored.

    Blocks may cut a character, so bytes are counted as tokens times the bytes a token of the documents; ends of text
    between documents have none.
    """
    if args.per_document:
        rows = [
            tokenizer(text, truncation=True, max_length=length, split_special_tokens=True)["input_ids"]
            for text in texts
        ]
        rows = [row for row in rows if row]
    else:
        blocks = pack(texts, tokenizer, length)
        rows = blocks["input_ids"] if len(blocks) > 0 else []
    rows = list(rows)[: args.max_sequences]
    if not rows:
        raise ValueError(f"`--data {args.data}` does not fill a block of {length} tokens: try `--per_document`.")
    width = max(len(row) for row in rows)
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    bytes_per_token = sum(len(text.encode()) for text in texts) / max(sum(len(ids) for ids in encoded), 1)
    special = set(tokenizer.all_special_ids)
    num_tokens = sum(token not in special for row in rows for token in row)
    return input_ids, attention_mask, round(bytes_per_token * num_tokens)


def generate(model: EsoForMaskedDiffusion, length: int, args: Arguments) -> tuple[torch.LongTensor, float]:
    """Samples, (num_samples, length), and the mean number of forwards."""
    names = ("alpha_0", "num_diffusion_steps", "unmasking_order", "entropy_bound", "temperature", "top_p")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    parts, forwards = [], []
    for start in range(0, args.num_samples, args.batch_size):
        numbers = range(start, min(start + args.batch_size, args.num_samples))
        output = model.generate(
            torch.empty(len(numbers), 0, dtype=torch.long, device=model.device),
            max_new_tokens=length,
            eos_token_id=None,
            generator=[torch.Generator().manual_seed((args.seed << 32) + number) for number in numbers],
            return_dict_in_generate=True,
            **settings,
        )
        parts.append(output.sequences.cpu())
        forwards += output.unmasking_steps.amax(dim=-1).tolist()
    return torch.cat(parts), sum(forwards) / len(forwards)


def sample_quality(samples: torch.LongTensor, texts: list[str], references: list[str], args: Arguments) -> dict:
    """The metrics of `metrics/` on the samples, and MAUVE if asked for."""
    ids = samples.tolist()
    scores = evaluate.load(str(METRICS / "unigram_entropy")).compute(predictions=ids)
    scores |= evaluate.load(str(METRICS / "distinct_n")).compute(predictions=ids, max_n=4)
    if args.judge is not None:
        judge = evaluate.load(str(METRICS / "generative_perplexity"))
        judged = judge.compute(predictions=texts, model_id=args.judge)
        scores |= {
            "generative_perplexity": judged["perplexity"],
            "mean_generative_perplexity": judged["mean_perplexity"],
        }
    if args.mauve:
        scores["mauve"] = mauve_score(texts, references, args)
    return scores


@torch.no_grad()
def mauve_score(texts: list[str], references: list[str], args: Arguments) -> float:
    """MAUVE (Pillutla et al., 2021) between the samples and the data, on the judge's last hidden states."""
    import mauve

    tokenizer = AutoTokenizer.from_pretrained(args.judge)
    judge = AutoModelForCausalLM.from_pretrained(args.judge).eval()

    def features(texts: list[str]) -> torch.Tensor:
        rows = (tokenizer(text, return_tensors="pt", truncation=True, max_length=1024) for text in texts)
        return torch.stack([judge(**row, output_hidden_states=True).hidden_states[-1][0, -1] for row in rows])

    outcome = mauve.compute_mauve(
        p_features=features(references).numpy(), q_features=features(texts).numpy(), verbose=False, seed=args.seed
    )
    return float(outcome.mauve)


def without_nan(value):
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(results: dict, output: Path) -> None:
    """Writes what there is so far."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(results), indent=1, ensure_ascii=False, allow_nan=False)
    (output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    if "likelihood" in results:
        plot_bound(results["likelihood"], output / "bound.png")
    if "budgets" in results:
        (output / "budgets.md").write_text(budgets_report(results["budgets"]), encoding="utf-8")
        plot_budgets(results["budgets"], output / "budgets.png")


def main(args: Arguments) -> dict:
    if args.judge is not None:
        AutoConfig.from_pretrained(args.judge)  # a wrong name should fail now, not at the end
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model).eval()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    length = args.length or model.config.max_position_embeddings
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(args).items()}
    results = {"settings": settings | {"torch": torch.__version__, "transformers": transformers.__version__}}
    references = []
    if args.data is not None:
        texts = load_texts(args.data, args.data_config, args.split, args.text_column)
        input_ids, attention_mask, num_bytes = sequences(texts, tokenizer, length, args)
        references = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        scored = (model, input_ids, attention_mask, num_bytes)
        results["likelihood"] = score_orders(
            *scored, args.alpha_0, args.num_orders, num_nelbo_draws=args.num_nelbo_draws, seed=args.seed
        )
        write(results, args.output)
        if args.budgets:
            alpha_0 = model.config.alpha_0 if args.alpha_0 is None else args.alpha_0
            samplers = budget_settings(
                args.budget_alphas or [alpha_0], args.budget_orders, sorted({*args.budgets}), args.entropy_bounds
            )
            results["budgets"] = score_samplers(*scored, list(samplers), num_plans=args.num_plans, seed=args.seed)
            write(results, args.output)
    if args.num_samples > 0:
        samples, forwards = generate(model, args.sample_length or length, args)
        texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
        results["samples"] = {"forwards": forwards, **sample_quality(samples, texts, references, args)}
        results["texts"] = texts[:8]

    write(results, args.output)
    if args.data is not None:
        nelbo, bounds = results["likelihood"]["nelbo"], results["likelihood"]["bound_by_num_orders"]
        print(f"{'':>14}  nats/token  +- s.e.  perplexity  bits/byte")
        for name, row in [("NELBO", nelbo), *((f"{count} orders", bound) for count, bound in bounds.items())]:
            print(
                f"{name:>14}  {row['nats_per_token']:10.4f}  {row['standard_error']:7.4f}  {row['perplexity']:10.3f}  "
                f"{row['bits_per_byte']:9.4f}"
            )
    if args.budgets:
        print(budgets_report(results["budgets"]))
    for name, value in results.get("samples", {}).items():
        print(f"{name:>28}  {value:.4f}")
    print(f"Wrote {args.output / 'evaluation.json'}")
    return results


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
