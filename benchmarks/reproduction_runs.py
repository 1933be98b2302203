"""What `reproduce.py` does in processes of its own: trainings, what samplers write and how they score, their times.

A run has a name, "what:system:which". Its results are one file, which is there when it is complete.
"""

import argparse
import json
import math
import reprlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import evaluate
import torch
from baselines import MaskedDiffusionSampler, text_positions
from datasets import load_from_disk
from likelihoods import per_token
from measuring import interleaved
from ngram import KneserNey
from objectives import Objective
from parallel_runs import alone_in, run_in_processes
from quickstart import has_fast_bfloat16
from reporting import argument_parser, positive
from reproduction_systems import (
    FIRST,
    HEAD,
    PLATEAU,
    RECIPES,
    SCALES,
    Recipe,
    Scale,
    alpha_of,
    first_objective,
    is_autoregressive,
    measured_systems,
    new_model,
    objective_of,
    samplers,
    settings_of,
)
from resumable_runs import last_whole_checkpoint, train_or_go_on, write_atomically
from text_data import hold_out_twentieth, pack, python_documents, train_tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from eso_lm import DataCollatorForDraftHead, EsoForMaskedDiffusion

METRICS = Path(__file__).parents[1] / "metrics"
JUDGE = "train:judge:100"  # an AR model with a seed of its own
TIMES = "time:all:0"
BATCH = 16  # texts scored and sampled at a time
HEAD_RECIPE = Recipe(1e-2)
HEAD_RANK = 128


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
        held_out, train = hold_out_twentieth(python_documents(everything=True, every=scale.every))
        tokenizer = train_tokenizer(train, scale.vocab_size, scale.length)
        rows = pack(held_out, tokenizer, scale.length)
        if len(rows) < scale.held_out_rows:
            raise ValueError(f"The text has {len(rows)} held-out rows, {scale.held_out_rows} are needed.")
        tokenizer.save_pretrained(folder)
        pack(train, tokenizer, scale.length).save_to_disk(folder / "train")
        rows.shuffle(seed=0).take(scale.held_out_rows).save_to_disk(folder / "held_out")

    def ngram_loss(self, order: int) -> float:
        """Held-out nats per token of an n-gram model."""
        model = KneserNey(self.train["input_ids"][:], order, len(self.tokenizer))
        return fmean(model.loss(self.held_out.tolist()))


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is that of an [`Objective`]; in the first steps that of another one."""

    def __init__(self, objective: Objective, first: Objective | None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.objective, self.first = objective, first or objective

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_first = self.state.global_step < FIRST * self.state.max_steps
        objective = self.first if is_first else self.objective
        # Accumulation is off: the mean over the batch is the mean over its tokens, as rows are equally long.
        return objective(model, inputs["input_ids"]).mean()


def training_arguments(
    folder: Path, recipe: Recipe, steps: int, seed: int, args: argparse.Namespace
) -> TrainingArguments:
    """What all trainings have in common; `steps` are those of whole batches."""
    steps *= recipe.parts
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=SCALES[args.scale].batch_size // recipe.parts,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps * recipe.warm_up),
        weight_decay=0.01,
        bf16=has_fast_bfloat16(),
        adam_beta2=0.99,
        use_cpu=args.device == "cpu",
        logging_steps=max(steps // 40, 1),
        save_steps=max(steps // 8, 10),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )


def train(
    name: str, recipe: Recipe, steps: int, seed: int, folder: Path, corpus: Corpus, args: argparse.Namespace
) -> list[dict]:
    """Trains a system, or goes on with it, and saves it; returns what was logged."""
    set_seed(seed)
    model = new_model(corpus.tokenizer, alpha_of(name), SCALES[args.scale], recipe.fresh)
    trainer = ObjectiveTrainer(
        objective_of(name, corpus.tokenizer, recipe.loss_type),
        first_objective(recipe, name, corpus.tokenizer),
        model,
        training_arguments(folder, recipe, steps, seed, args),
        data_collator=default_data_collator,
        train_dataset=corpus.train,
    )
    train_or_go_on(trainer, last_whole_checkpoint(folder))
    trainer.save_model()
    return trainer.state.log_history


def train_head(name: str, seed: int, folder: Path, corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Trains a draft head for a trained model, or goes on with it; returns what was logged."""
    steps = SCALES[args.scale].head_steps
    base = folder_of(f"train:{name.removesuffix(HEAD)}:{seed}", args)
    set_seed(seed)
    model = EsoForMaskedDiffusion.from_pretrained(base, draft_rank=HEAD_RANK)
    model.requires_grad_(False)
    model.draft_head.requires_grad_(True)
    trainer = Trainer(
        model,
        training_arguments(folder, HEAD_RECIPE, steps, seed, args),
        data_collator=DataCollatorForDraftHead(corpus.tokenizer, config=model.config),
        train_dataset=corpus.train,
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
    generator = torch.Generator().manual_seed(0)
    length = rows.shape[1]
    if alpha_of(name) is not None:
        nelbo = model.nelbo(rows, num_draws=scale.num_draws, generator=generator).nelbo / length
        losses = {"nelbo": nelbo}
        if with_orders:
            num_orders = 1 if alpha_of(name) == 0 else scale.num_orders
            scored = model.log_likelihood(rows, num_orders=num_orders, generator=generator)
            losses["one_order"] = -scored.log_likelihood_per_order.mean(dim=1) / length
            losses["exact"] = -scored.log_likelihood / length
            left_to_right = torch.arange(length)[None]
            losses["left_to_right"] = -model.log_likelihood(rows, orders=left_to_right).log_likelihood / length
    else:
        objective, draws = objective_of(name, corpus.tokenizer), 1 if is_autoregressive(name) else scale.num_draws
        # A draw covers all rows at once, so that its times are spread over them.
        mean = torch.stack([objective(model, rows, generator) for _ in range(draws)]).mean(dim=0)
        losses = {"exact" if is_autoregressive(name) else "nelbo": mean}
        if name == "mdm" and with_orders:
            sampler = MaskedDiffusionSampler(model)
            log_likelihood, _ = sampler.log_likelihood(rows, num_steps="max", unmasking_order="left_to_right")
            losses["left_to_right"] = -log_likelihood / length
    return {kind: over_rows(row_losses) for kind, row_losses in losses.items()}


def over_rows(values: torch.Tensor) -> dict[str, float]:
    """The mean of values, (rows,), and its standard error."""
    return {"mean": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}


class Judge:
    """What an AR model says of texts that others wrote: how probable, how varied, and how far from held-out text."""

    def __init__(self, corpus: Corpus, args: argparse.Namespace):
        self.model = load(JUDGE, args)
        self.objective = objective_of("judge", corpus.tokenizer)
        self.entropy = evaluate.load(str(METRICS / "unigram_entropy"))
        self.mauve = evaluate.load(str(METRICS / "mauve_of_features"))
        self.references = self.features(corpus.held_out)

    @torch.no_grad()
    def features(self, texts: torch.LongTensor) -> list[list[float]]:
        """The last hidden states of each text, a mean over its tokens."""
        parts = texts.to(self.model.device).split(64)
        states = [self.model.model(part, position_ids=text_positions(part)).last_hidden_state for part in parts]
        return torch.cat(states).mean(dim=1).tolist()

    def mauve_of(self, texts: torch.LongTensor) -> float:
        """MAUVE of texts, (texts, length), and held-out text: 0 to 1."""
        return self.mauve.compute(predictions=self.features(texts), references=self.references)["mauve"]

    @torch.no_grad()
    def __call__(self, texts: torch.LongTensor) -> dict[str, float]:
        """Nats per token with their standard error, the entropy, and MAUVE of texts, (texts, length)."""
        parts = texts.to(self.model.device).split(64)
        losses = over_rows(torch.cat([self.objective(self.model, part) for part in parts]))
        return {
            "judge_nats": losses["mean"],
            "judge_standard_error": losses["standard_error"],
            "entropy": self.entropy.compute(predictions=texts.tolist())["unigram_entropy"],
            "mauve": self.mauve_of(texts),
        }


def judged_text(corpus: Corpus, args: argparse.Namespace) -> dict[str, float]:
    """What the judge says of held-out text; its MAUVE is that of as many rows that were trained on."""
    judge = Judge(corpus, args)
    others = corpus.train.shuffle(seed=0).take(len(corpus.held_out))["input_ids"][:]
    return judge(corpus.held_out) | {"mauve": judge.mauve_of(torch.tensor(others))}


def measure(name: str, seed: int, corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Of a system's sampler at every setting: exact nats per token of held-out text, its forwards, and its samples.

    Each setting is noted when it is done, so that a run that was killed goes on with the next one.
    """
    scale, judge, start = SCALES[args.scale], Judge(corpus, args), corpus.tokenizer.eos_token_id
    file = unfinished_file(f"measure:{name}:{seed}", args)
    points = json.loads(file.read_text())["points"] if file.exists() else []
    for setting, sample, score in samplers(name, load(f"train:{name}:{seed}", args), start, scale):
        if any(point["setting"] == setting for point in points):
            continue
        set_seed(seed)
        # So many rows at a time as are sampled: in a baseline, those of a call share the number of tokens of a step.
        parts = [score(rows) for rows in corpus.held_out.to(args.device).split(BATCH)]
        nats, forwards = (torch.cat(values) for values in zip(*parts, strict=True))
        texts = torch.cat([sample(BATCH) for _ in range(scale.num_samples // BATCH)])
        point = {"system": name, "seed": seed, "setting": setting, "forwards": forwards.double().mean().item()}
        point |= per_token(nats, torch.full(nats.shape, scale.length))
        points.append(point | judge(texts))
        write_atomically(file, {"points": points})
    return points


def time_samples(names: list[str], corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Of samplers at every setting: milliseconds of a text, one at a time and in a batch: medians, lows and highs.

    Systems and settings take turns, so that a machine that is slow for a while is so for all of them.
    """
    scale, start = SCALES[args.scale], corpus.tokenizer.eos_token_id
    points: list[dict] = []
    calls = {}
    with ExitStack() as ready, torch.no_grad():
        for name in names:
            model = load(f"train:{name}:0", args)
            ready.enter_context(model.ready_to_decode())
            for setting, sample, _ in samplers(name, model, start, scale):
                calls |= {(len(points), batch): partial(sample, batch) for batch in (1, BATCH)}
                points.append({"system": name, "setting": setting})
        set_seed(0)
        for (index, batch), times in interleaved(calls, scale.num_timed, args.device).items():
            values = {"": median(times), "_low": min(times), "_high": max(times)}
            points[index] |= {f"ms_at_{batch}{end}": time / batch for end, time in values.items()}
    return points


def run(name: str, args: argparse.Namespace) -> None:
    """One run, in this process.

    "tune:system:recipe" tries a recipe for a short while, "control:system:recipe" for as long as systems are trained,
    "train:system:seed" trains a system, the judge or a draft head, with the best recipe; "measure:system:seed" scores
    text under its samplers and judges what they write, "time:all:0" times those of all systems.
    """
    what, system, which = name.split(":")
    scale, corpus = SCALES[args.scale], Corpus(args)
    folder = folder_of(name, args)
    folder.mkdir(parents=True, exist_ok=True)
    if what == "measure":
        record: dict[str, Any] = {"points": measure(system, int(which), corpus, args)}
    elif what == "time":
        record = {"points": time_samples(list(measured_systems()), corpus, args)}
    elif system.endswith(HEAD):
        record = {"history": train_head(system, int(which), folder, corpus, args)}
    else:
        if what in ("tune", "control"):
            steps = scale.tune_steps if what == "tune" else scale.steps
            recipe, seed = PLATEAU[which], 0
        elif system == "judge":
            recipe, steps, seed = RECIPES[best_recipe("ar", args)], scale.judge_steps, int(which)
        else:
            recipe, steps, seed = RECIPES[best_recipe(system, args)], scale.steps, int(which)
        history = train(system, recipe, steps, seed, folder, corpus, args)
        losses = likelihood(system, load(name, args), corpus, args, with_orders=what != "tune")
        record = {"likelihood": losses, "history": history}
        if name == JUDGE:
            record["text"] = judged_text(corpus, args)
    write_atomically(result_file(name, args), record)
    unfinished_file(name, args).unlink(missing_ok=True)


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where a run keeps what it has; what is measured of a model stays with it, and goes when it goes."""
    what, system, which = name.split(":")
    return args.work / "_".join(["train" if what == "measure" else what, system, which])


def result_file(name: str, args: argparse.Namespace) -> Path:
    """What a run leaves when it is complete."""
    return folder_of(name, args) / f"{name.split(':')[0]}.json"


def unfinished_file(name: str, args: argparse.Namespace) -> Path:
    """What a measurement has so far, until it is complete."""
    return result_file(name, args).with_suffix(".incomplete.json")


def result_of(name: str, args: argparse.Namespace) -> dict:
    return json.loads(result_file(name, args).read_text())


def load(name: str, args: argparse.Namespace) -> EsoForMaskedDiffusion:
    """The model of a complete training, in evaluation mode."""
    return EsoForMaskedDiffusion.from_pretrained(folder_of(name, args)).to(args.device)


def tuning_loss(system: str, recipe: str, args: argparse.Namespace) -> float:
    """The held-out loss after a try: the NELBO, or the exact one where there is no other."""
    losses = result_of(f"tune:{system}:{recipe}", args)["likelihood"]
    return (losses.get("nelbo") or losses["exact"])["mean"]


def best_recipe(system: str, args: argparse.Namespace) -> str:
    """The recipe of least held-out loss after a try."""
    return min(RECIPES, key=lambda recipe: tuning_loss(system, recipe, args))


def require_same_settings(args: argparse.Namespace) -> None:
    """Notes what the runs of a folder have in common; raises a ValueError when those there were other ones."""
    scale = {name: value for name, value in vars(SCALES[args.scale]).items() if name != "num_timed"}
    trained = {
        "recipes": {name: vars(recipe) for name, recipe in RECIPES.items()},
        "first": FIRST,
        "head": vars(HEAD_RECIPE),
        "head_rank": HEAD_RANK,
    }
    sampled = {name: settings_of(name, SCALES[args.scale]) for name in measured_systems()}
    now = json.loads(
        json.dumps({"scale": args.scale, "device": args.device} | scale | trained | {"samplers": sampled})
    )
    file = args.work / "settings.json"
    before = json.loads(file.read_text()) if file.exists() else now
    if before != now:
        changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
        told = ", ".join(
            f"{name} ({reprlib.repr(before.get(name))}, {reprlib.repr(now.get(name))})" for name in sorted(changed)
        )
        raise ValueError(
            f"`--work {args.work}` holds runs with other settings (before, now): {told}. Choose another folder."
        )
    write_atomically(file, now)


@contextmanager
def alone_with_corpus(args: argparse.Namespace) -> Iterator[Corpus]:
    """The text in the folder of the work, with its settings noted, which nobody else works in meanwhile."""
    args.work = args.work or Path("outputs") / f"reproduction_{args.scale}"
    with alone_in(args.work / "logs"):
        require_same_settings(args)
        yield Corpus(args)


def run_all(
    script: str,
    names: list[str],
    args: argparse.Namespace,
    description: str,
    processes: int | None = None,
    threads: int = 1,
) -> None:
    """The runs that are not complete, in processes of their own."""
    run_in_processes(
        [script, *args.command, "--work", str(args.work)],
        names,
        lambda name: result_file(name, args).exists(),
        args.work / "logs",
        processes or args.processes,
        description,
        threads,
    )


def parser_of_runs(description: str) -> argparse.ArgumentParser:
    """A parser of the arguments that runs need."""
    parser = argument_parser(description, output="where JSON, Markdown, PNG go")
    parser.add_argument("--scale", choices=SCALES, default="minutes")
    parser.add_argument("--work", type=Path, help="where the models go; by default outputs/reproduction_<scale>")
    parser.add_argument("--processes", type=positive, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument("--device", default="cpu")
    return parser
