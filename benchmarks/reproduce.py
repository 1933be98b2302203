"""The paper's claims at small scale, from one command: trains the systems it compares, and measures them.

python benchmarks/reproduce.py --scale minutes     # a small fraction of the next one, to see that all works
python benchmarks/reproduce.py --scale hours       # about an hour on 2 cores: the committed results
python benchmarks/reproduce.py --scale gpu --device cuda
python benchmarks/reproduce.py --scale hours --budgets-only   # of trained systems: exact likelihoods against forwards

AR, masked diffusion, block diffusion and Eso-LMs, on the same layers, rows and optimiser steps. Runs share the cores,
one each, go on where they were killed, and are not repeated when complete: first trainings, then the exact likelihoods
of held-out text under the samplers. At last, samples are timed one system after the other. docs/claims.md says what
came out.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import evaluate
import torch
from datasets import load_from_disk
from measuring import hardware, timed
from ngram import KneserNey
from objectives import Objective
from parallel_runs import parse_with_run, run_in_processes
from reporting import argument_parser, write_results
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from eso_lm import EsoForMaskedDiffusion

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from likelihoods import per_token
from quickstart import has_fast_bfloat16
from reproduction_report import budgets_report, plot_budgets, plot_likelihood, plot_quality, plot_steps, report
from reproduction_systems import SCALES, Scale, alpha_of, new_model, objective_of, samplers, scorers, systems
from resumable_runs import last_whole_checkpoint, train_or_go_on
from text_data import hold_out_twentieth, pack, python_documents, train_tokenizer, without_overlap

METRICS = Path(__file__).parents[1] / "metrics"
RATES = (1e-3, 2e-3, 4e-3)  # learning rates that are tried
TUNED = ("ar", "eso_0.25")  # with these systems


class Corpus:
    """The text of this machine, in rows of equal length: read and tokenised once, then from the folder of the work."""

    def __init__(self, args: argparse.Namespace):
        folder = args.work / "corpus"
        if not folder.exists():
            self._write(folder.with_suffix(".incomplete"), SCALES[args.scale])
            folder.with_suffix(".incomplete").rename(folder)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.train = load_from_disk(folder / "train")
        self.held_out = torch.tensor(load_from_disk(folder / "held_out")["input_ids"][:])

    def _write(self, folder: Path, scale: Scale) -> None:
        held_out, rest = hold_out_twentieth(python_documents(everything=True)[:: scale.every])
        train = without_overlap(rest, held_out)
        tokenizer = train_tokenizer(train, scale.vocab_size, scale.length)
        rows = pack(held_out, tokenizer, scale.length)
        if len(rows) < scale.held_out_rows:
            raise ValueError(f"The text has {len(rows)} held-out rows, {scale.held_out_rows} are needed.")
        tokenizer.save_pretrained(folder)
        pack(train, tokenizer, scale.length).save_to_disk(folder / "train")
        rows.shuffle(seed=0).take(scale.held_out_rows).save_to_disk(folder / "held_out")


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is that of an [`Objective`]."""

    def __init__(self, objective: Objective, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective = objective

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Accumulation is off: the mean over the batch is the mean over its tokens, as rows are equally long.
        return self.objective(model, inputs["input_ids"]).mean()


def train(name: str, rate: float, steps: int, folder: Path, corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Trains a system, or goes on with it, and saves it; returns what was logged."""
    scale = SCALES[args.scale]
    seed = args.seed + (name == "judge")
    set_seed(seed)
    alpha_0 = alpha_of(name)
    model = new_model(corpus.tokenizer, 1.0 if alpha_0 is None else alpha_0, scale)
    training = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=scale.batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 10, 1),
        weight_decay=0.01,
        bf16=has_fast_bfloat16(),
        adam_beta2=0.99,
        use_cpu=args.device == "cpu",
        logging_steps=max(steps // 40, 1),
        save_steps=max(steps // 4, 1),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )
    objective = objective_of(name, corpus.tokenizer)
    trainer = ObjectiveTrainer(
        objective, model, training, data_collator=default_data_collator, train_dataset=corpus.train
    )
    train_or_go_on(trainer, last_whole_checkpoint(folder))
    trainer.save_model()
    return trainer.state.log_history


@torch.no_grad()
def likelihood(
    name: str, model: EsoForMaskedDiffusion, corpus: Corpus, args: argparse.Namespace, with_orders: bool = True
) -> dict:
    """Held-out losses in nats per token, with standard errors over the rows: the NELBO, and what is exact."""
    scale, rows = SCALES[args.scale], corpus.held_out.to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    length = rows.shape[1]
    model.eval()
    if alpha_of(name) is not None:
        nelbo = model.nelbo(rows, num_draws=scale.num_draws, generator=generator).nelbo / length
        losses = {"nelbo": nelbo}
        if with_orders:
            num_orders = 1 if alpha_of(name) == 0 else scale.num_orders
            scored = model.log_likelihood(rows, num_orders=num_orders, generator=generator)
            losses["one_order"] = -scored.log_likelihood_per_order.mean(dim=1) / length
            losses["exact"] = -scored.log_likelihood / length
    else:
        objective, draws = objective_of(name, corpus.tokenizer), 1 if name in ("ar", "judge") else scale.num_draws
        # A draw covers all rows at once, so that its times are spread over them.
        mean = torch.stack([objective(model, rows, generator) for _ in range(draws)]).mean(dim=0)
        losses = {"exact" if name in ("ar", "judge") else "nelbo": mean}
    return {kind: over_rows(row_losses) for kind, row_losses in losses.items()}


def over_rows(values: torch.Tensor) -> dict[str, float]:
    """The mean of values, (rows,), and its standard error."""
    return {"mean": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}


def budgets(name: str, model: EsoForMaskedDiffusion, corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Of a system's sampler at every setting: exact nats per token of held-out text, and the mean of its forwards."""
    points = []
    for setting, score in scorers(name, model, corpus.tokenizer.eos_token_id, SCALES[args.scale]):
        set_seed(args.seed)
        # So many rows at a time as are sampled: in a baseline, those of a call share the number of tokens of a step.
        parts = [score(rows) for rows in corpus.held_out.to(args.device).split(args.sampling_batch)]
        nats, forwards = (torch.cat(values) for values in zip(*parts, strict=True))
        point = {"system": name, "setting": setting, "forwards": forwards.double().mean().item()}
        points.append(point | per_token(nats, torch.full(nats.shape, corpus.held_out.shape[1])))
    return points


def train_and_evaluate(name: str, corpus: Corpus, args: argparse.Namespace) -> dict:
    """Trains a system or the judge, by name, or tries a learning rate, "tune:system:rate"; its losses."""
    scale, folder, is_tuning = SCALES[args.scale], folder_of(name, args), name.startswith("tune:")
    if is_tuning:
        _, system, rate = name.split(":")
        history = train(system, float(rate), scale.tune_steps, folder, corpus, args)
    else:
        system, steps = name, scale.judge_steps if name == "judge" else scale.steps
        history = train(system, learning_rate(args), steps, folder, corpus, args)
    losses = likelihood(system, load(name, args), corpus, args, not is_tuning)
    return {"likelihood": losses, "history": history}


def run(name: str, args: argparse.Namespace) -> None:
    """One run, in this process: a training, or the exact likelihoods of a trained system, "budgets:system"."""
    corpus, file = Corpus(args), result_file(name, args)
    if name.startswith("budgets:"):
        system = name.removeprefix("budgets:")
        record = {"points": budgets(system, load(system, args), corpus, args)}
    else:
        record = train_and_evaluate(name, corpus, args)
    # Renamed once it is written: the file says that the run is complete.
    incomplete = file.with_suffix(".incomplete")
    incomplete.write_text(json.dumps(record, indent=1))
    incomplete.rename(file)


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return args.work / name.replace(":", "_")


def result_file(name: str, args: argparse.Namespace) -> Path:
    """What a run leaves when it is complete; the likelihoods of a model stay with it, and go when it goes."""
    if name.startswith("budgets:"):
        return folder_of(name.removeprefix("budgets:"), args) / "budgets.json"
    return folder_of(name, args) / "result.json"


def result_of(name: str, args: argparse.Namespace) -> dict:
    return json.loads(result_file(name, args).read_text())


def load(name: str, args: argparse.Namespace) -> EsoForMaskedDiffusion:
    """The model of a complete training, in evaluation mode."""
    return EsoForMaskedDiffusion.from_pretrained(folder_of(name, args)).to(args.device)


def tuning_losses(args: argparse.Namespace) -> dict[tuple[str, float], float]:
    """The held-out loss of each system at each learning rate: the NELBO, or the exact loss where there is no other."""
    losses = {}
    for rate in RATES:
        for system in TUNED:
            found = result_of(f"tune:{system}:{rate:g}", args)["likelihood"]
            losses[system, rate] = (found.get("nelbo") or found["exact"])["mean"]
    return losses


def learning_rate(args: argparse.Namespace) -> float:
    """The one of least held-out loss, summed over the systems that were tried: the same for all."""
    losses = tuning_losses(args)
    return min(RATES, key=lambda rate: sum(losses[system, rate] for system in TUNED))


def sample_all(corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Samples of all systems at all settings: forwards, seconds a text, perplexity under the judge, entropy."""
    scale = SCALES[args.scale]
    judge = load("judge", args)
    objective = objective_of("judge", corpus.tokenizer)
    entropy = evaluate.load(str(METRICS / "unigram_entropy"))

    def quality(texts: torch.LongTensor) -> dict:
        with torch.no_grad():
            losses = torch.cat([objective(judge, part) for part in texts.split(64)])
        return {
            "judge_nats": losses.mean().item(),
            "judge_standard_error": (losses.std() / len(texts) ** 0.5).item(),
            "entropy": entropy.compute(predictions=texts.tolist())["unigram_entropy"],
        }

    points = [{"system": "text", "setting": {}, "nfe": None, "seconds": None, **quality(corpus.held_out)}]
    batch = min(args.sampling_batch, scale.num_samples)
    for name in tqdm(systems(), desc="Samples"):
        for setting, sample in samplers(name, load(name, args), corpus.tokenizer.eos_token_id, scale):
            set_seed(args.seed)
            sample(batch)  # warms up
            runs = [timed(partial(sample, batch), args.device) for _ in range(scale.num_samples // batch)]
            milliseconds, samples = zip(*runs, strict=True)
            texts, forwards = zip(*samples, strict=True)
            seconds = sum(milliseconds) / 1e3 / (batch * len(runs))
            point = {"system": name, "setting": setting, "nfe": fmean(forwards), "seconds": seconds}
            points.append(point | quality(torch.cat(texts).to(args.device)))
    return points


def require_same_settings(args: argparse.Namespace) -> None:
    """Notes what the runs of a folder have in common; raises a ValueError when those there were other ones."""
    file, now = args.work / "settings.json", {"scale": args.scale, "seed": args.seed}
    before = json.loads(file.read_text()) if file.exists() else now
    if before != now:
        raise ValueError(f"`--work {args.work}` holds runs with {before}, not {now}: choose another folder.")
    file.write_text(json.dumps(now) + "\n")


def require_trained(args: argparse.Namespace) -> None:
    """Raises a ValueError unless all systems are trained, and the text is there that they were trained on."""
    missing = [name for name in systems() if not result_file(name, args).exists()]
    missing += [] if (args.work / "corpus").exists() else ["corpus"]
    if missing:
        raise ValueError(
            f"`--budgets-only` needs trained systems, but `--work {args.work}` lacks {missing}: run without it first."
        )


def write_budgets(settings: dict, args: argparse.Namespace) -> None:
    """Writes the exact likelihoods of all systems: JSON, a table, and a picture."""
    points = [point for name in systems() for point in result_of(f"budgets:{name}", args)["points"]]
    losses = {name: result_of(name, args)["likelihood"] for name in systems()}
    results = {"settings": settings, "likelihood": losses, "points": points}
    write_results(args.output, "reproduction_budgets", results, budgets_report(results))
    plot_budgets(results, args.output / "reproduction_budgets.png")


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    scale = SCALES[args.scale]
    args.work = args.work or Path("outputs") / f"reproduction_{args.scale}"
    if args.budgets_only:
        require_trained(args)
    args.work.mkdir(parents=True, exist_ok=True)
    require_same_settings(args)
    corpus = Corpus(args)

    def in_processes(names: list[str], description: str) -> None:
        command = [__file__, *args.command, "--work", str(args.work)]
        run_in_processes(
            command,
            names,
            lambda name: result_file(name, args).exists(),
            args.work / "logs",
            args.processes,
            description=description,
        )

    settings = {
        "scale": args.scale,
        "seed": args.seed,
        "hardware": hardware(args.device),
        "parameters": new_model(corpus.tokenizer, 1.0, scale).num_parameters(),
        "train_tokens": len(corpus.train) * scale.length,
        "sampling_batch": min(args.sampling_batch, scale.num_samples),
    } | vars(scale)
    if not args.budgets_only:
        in_processes([f"tune:{system}:{rate:g}" for rate in RATES for system in TUNED], "Learning rates")
        in_processes([*reversed(systems()), "judge"], "Systems")
    in_processes([f"budgets:{name}" for name in systems()], "Exact likelihoods")
    write_budgets(settings, args)
    if args.budgets_only:
        return

    rows, held_out = corpus.train["input_ids"][:], corpus.held_out.tolist()
    ngram = {
        order: fmean(KneserNey(rows, order, len(corpus.tokenizer)).loss(held_out))
        for order in tqdm((1, 3, 5), desc="n-grams")
    }
    points = sample_all(corpus, args)
    tuning = {
        "learning_rate": learning_rate(args),
        "tuning": {f"{system}, {rate:g}": loss for (system, rate), loss in tuning_losses(args).items()},
    }
    results = {
        "settings": settings | tuning,
        "likelihood": {name: result_of(name, args)["likelihood"] for name in systems()},
        "judge": result_of("judge", args)["likelihood"],
        "ngram": ngram,
        "points": points,
        "history": {name: result_of(name, args)["history"] for name in [*systems(), "judge"]},
    }
    write_results(args.output, "reproduction", results, report(results))
    plot_likelihood(results, args.output / "reproduction_likelihood.png")
    plot_quality(results, args.output / "reproduction_quality.png")
    plot_steps(results, args.output / "reproduction_steps.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON, Markdown, PNG go")
    parser.add_argument("--scale", choices=SCALES, default="minutes")
    parser.add_argument("--work", type=Path, help="where the models go; by default outputs/reproduction_<scale>")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument("--sampling-batch", type=int, default=16, help="texts sampled at a time")
    parser.add_argument(
        "--budgets-only", action="store_true", help="of trained systems, exact likelihoods alone: no judge, no samples"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parse_with_run(parser, arguments)


if __name__ == "__main__":
    main(parse_args())
