"""The paper's claims at small scale, from one command: trains the systems it compares, and measures them.

python benchmarks/reproduce.py --scale minutes     # a small fraction of the next one, to see that all works
python benchmarks/reproduce.py --scale hours       # about an hour on 2 cores: the committed results
python benchmarks/reproduce.py --scale gpu --device cuda

AR, masked diffusion, block diffusion and Eso-LMs, on the same layers, rows and optimiser steps. Runs share the cores,
one each, go on where they were killed, and are not repeated when complete; then samples are timed one system after the
other. docs/claims.md says what came out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import evaluate
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler
from datasets import load_from_disk
from ngram import KneserNey
from objectives import Autoregressive, BlockDiffusion, Esoteric, MaskedDiffusion, Objective
from parallel_runs import run_in_processes
from speed import hardware, synchronize
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from eso_lm import EsoConfig, EsoForMaskedDiffusion

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from quickstart import has_fast_bfloat16
from text_data import pack, python_documents, train_tokenizer, without_overlap
from trainer_callbacks import last_whole_checkpoint, train_or_go_on

METRICS = Path(__file__).parents[1] / "metrics"
ALPHAS = (1.0, 0.5, 0.25, 0.125, 0.0)
BLOCKS = (4, 16)
RATES = (1e-3, 2e-3, 4e-3)
ORDER_STYLES = {"random": "--", "strided": "-"}


@dataclass
class Scale:
    """How much of everything."""

    hidden_size: int
    num_layers: int
    length: int
    vocab_size: int
    batch_size: int
    steps: int
    judge_steps: int
    tune_steps: int
    held_out_rows: int
    num_draws: int
    num_orders: int
    num_samples: int
    diffusion_steps: tuple[int, ...]
    every: int = 1  # one document of so many


SCALES = {
    "smoke": Scale(32, 1, 16, 300, 8, 6, 6, 2, 16, 8, 2, 4, (4, 16), every=60),
    "minutes": Scale(128, 3, 128, 2048, 16, 400, 500, 100, 64, 8, 8, 32, (8, 32, 128)),
    "hours": Scale(128, 4, 128, 2048, 16, 2400, 3000, 300, 128, 16, 16, 64, (4, 8, 16, 32, 64, 128)),
    "gpu": Scale(768, 12, 1024, 16384, 64, 50_000, 60_000, 2000, 512, 16, 16, 64, (8, 16, 64, 256, 1024)),
}


def systems() -> dict[str, str]:
    """Short names of the systems and what they are called."""
    blocks = {f"bd{length}": f"block diffusion, {length}" for length in BLOCKS}
    eso = {f"eso_{alpha_0:g}": f"Eso-LM, α₀ = {alpha_0:g}" for alpha_0 in ALPHAS}
    return {"ar": "AR", "mdm": "masked diffusion"} | blocks | eso


def alpha_of(name: str) -> float | None:
    """α_0 of an Eso-LM; None for the other systems."""
    return float(name.removeprefix("eso_")) if name.startswith("eso_") else None


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
        documents = python_documents(everything=True)[:: scale.every]
        held_out = documents[::20]
        train = without_overlap([document for index, document in enumerate(documents) if index % 20], held_out)
        tokenizer = train_tokenizer(train, scale.vocab_size, scale.length)
        rows = pack(held_out, tokenizer, scale.length)
        if len(rows) < scale.held_out_rows:
            raise ValueError(f"The text has {len(rows)} held-out rows, {scale.held_out_rows} are needed.")
        tokenizer.save_pretrained(folder)
        pack(train, tokenizer, scale.length).save_to_disk(folder / "train")
        rows.shuffle(seed=0).take(scale.held_out_rows).save_to_disk(folder / "held_out")


def new_model(tokenizer: PreTrainedTokenizerBase, alpha_0: float, scale: Scale) -> EsoForMaskedDiffusion:
    """The layers that all systems share, with fresh weights."""
    return EsoForMaskedDiffusion(
        EsoConfig(
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            hidden_size=scale.hidden_size,
            num_hidden_layers=scale.num_layers,
            num_attention_heads=max(scale.hidden_size // 64, 4),
            max_position_embeddings=scale.length,
            hidden_dropout=0.0,
            alpha_0=alpha_0,
        )
    )


def objective_of(name: str, tokenizer: PreTrainedTokenizerBase) -> Objective:
    if name in ("ar", "judge"):
        return Autoregressive(tokenizer.eos_token_id)
    if name == "mdm":
        return MaskedDiffusion()
    if name.startswith("bd"):
        return BlockDiffusion(int(name.removeprefix("bd")))
    return Esoteric(alpha_of(name), tokenizer.mask_token_id)


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
    model = new_model(corpus.tokenizer, alpha_of(name) if alpha_of(name) is not None else 1.0, scale)
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
    return {
        kind: {"mean": row_losses.mean().item(), "standard_error": (row_losses.std() / len(rows) ** 0.5).item()}
        for kind, row_losses in losses.items()
    }


def run(name: str, args: argparse.Namespace) -> None:
    """One run, in this process: training and likelihoods of a system, or a try of a learning rate ("tune:...")."""
    corpus, scale = Corpus(args), SCALES[args.scale]
    is_tuning = name.startswith("tune:")
    if is_tuning:
        _, system, rate = name.split(":")
        folder = args.work / f"tune_{system}_{rate}"
        history = train(system, float(rate), scale.tune_steps, folder, corpus, args)
    else:
        system, folder = name, args.work / name
        steps = scale.judge_steps if name == "judge" else scale.steps
        history = train(system, learning_rate(args), steps, folder, corpus, args)
    model = EsoForMaskedDiffusion.from_pretrained(folder).to(args.device)
    record = {"likelihood": likelihood(system, model, corpus, args, not is_tuning), "history": history}
    # Renamed once it is written: the file says that the run is complete.
    (folder / "result.incomplete").write_text(json.dumps(record, indent=1))
    (folder / "result.incomplete").rename(folder / "result.json")


def result_of(name: str, args: argparse.Namespace) -> dict:
    return json.loads((args.work / name / "result.json").read_text())


def held_out_loss(record: dict) -> float:
    """What compares systems: the NELBO, or the exact loss where there is no other."""
    return next(record["likelihood"][kind]["mean"] for kind in ("nelbo", "exact") if kind in record["likelihood"])


def learning_rate(args: argparse.Namespace) -> float:
    """The one of least held-out loss, summed over the systems that were tried: the same for all."""
    losses = {
        rate: sum(held_out_loss(result_of(f"tune_{system}_{rate:g}", args)) for system in ("ar", "eso_0.25"))
        for rate in RATES
    }
    return min(losses, key=losses.get)


@torch.no_grad()
def collect(steps: Iterator[torch.LongTensor]) -> tuple[torch.LongTensor, int]:
    """The last tokens of a sampler, and the number of its forwards."""
    states = [tokens.clone() for tokens in steps]
    return states[-1], len(states)


def samplers(name: str, model: EsoForMaskedDiffusion, corpus: Corpus, scale: Scale) -> Iterator[tuple[dict, Callable]]:
    """The settings to sample a system with, and functions of the batch size to tokens and forwards."""
    length = scale.length
    if name == "ar":
        sampler = AutoregressiveSampler(model, corpus.tokenizer.eos_token_id)
        yield {}, lambda batch: collect(sampler.steps(batch, length))
    elif name == "mdm":
        for steps in scale.diffusion_steps:
            yield (
                {"steps": steps},
                lambda batch, steps=steps: collect(MaskedDiffusionSampler(model).steps(batch, length, steps)),
            )
    elif name.startswith("bd"):
        block = int(name.removeprefix("bd"))
        for steps in (1, 2, 4, 8, 16):
            if steps <= block:
                yield (
                    {"steps": steps},
                    lambda batch, steps=steps: collect(
                        BlockDiffusionSampler(model, block).steps(batch, length, steps)
                    ),
                )
    else:
        alpha_0 = alpha_of(name)
        for setting in eso_settings(alpha_0, scale):

            def sample(batch: int, setting: dict = setting) -> tuple[torch.LongTensor, int]:
                output = model.generate(
                    max_new_tokens=length,
                    num_return_sequences=batch,
                    eos_token_id=None,
                    return_dict_in_generate=True,
                    **setting,
                )
                return output.sequences, output.num_function_evaluations

            yield setting, sample


def eso_settings(alpha_0: float, scale: Scale) -> list[dict]:
    """Grids of α_0 at sampling and steps, in random and strided order; and lossless decoding."""
    if alpha_0 == 0:
        return [{"alpha_0": 0.0}]
    alphas = sorted({1.0, 0.5, alpha_0}, reverse=True)
    fixed = [
        {"alpha_0": alpha, "num_diffusion_steps": steps, "unmasking_order": order}
        for alpha in alphas
        for order in ("random", "strided")
        for steps in scale.diffusion_steps
    ]
    return fixed + [{"alpha_0": alpha, "lossless": True, "unmasking_order": "strided"} for alpha in alphas]


def sample_all(corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """Samples of all systems at all settings: forwards, seconds a text, perplexity under the judge, entropy."""
    scale = SCALES[args.scale]
    judge = EsoForMaskedDiffusion.from_pretrained(args.work / "judge").to(args.device).eval()
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
    for name in tqdm(systems(), desc="Samples"):
        model = EsoForMaskedDiffusion.from_pretrained(args.work / name).to(args.device).eval()
        for setting, sample in samplers(name, model, corpus, scale):
            set_seed(args.seed)
            batch = min(args.sampling_batch, scale.num_samples)
            sample(batch)  # warms up
            texts, forwards = [], []
            synchronize(args.device)
            start = time.perf_counter()
            for _ in range(scale.num_samples // batch):
                tokens, count = sample(batch)
                texts.append(tokens)
                forwards.append(count)
            synchronize(args.device)
            seconds = (time.perf_counter() - start) / (batch * len(texts))
            nfe = sum(forwards) / len(forwards)
            point = {"system": name, "setting": setting, "nfe": nfe, "seconds": seconds}
            points.append(point | quality(torch.cat(texts).to(args.device)))
    return points


def is_on_frontier(point: dict, points: list[dict], cost: str) -> bool:
    """Whether no other point is cheaper and better at once, among those with the entropy of text (see `report`)."""
    return not any(
        other[cost] <= point[cost] and other["judge_nats"] < point["judge_nats"] for other in points if other != point
    )


def fair_points(points: list[dict]) -> list[dict]:
    """Samples about as varied as text: those whose entropy is at most 0.3 nats below."""
    text = next(point for point in points if point["system"] == "text")
    return [point for point in points if point is not text and point["entropy"] >= text["entropy"] - 0.3]


def describe(setting: dict) -> str:
    if setting.get("lossless"):
        return f"α₀ = {setting['alpha_0']:g}, lossless, strided"
    if "num_diffusion_steps" in setting:
        order = setting["unmasking_order"]
        return f"α₀ = {setting['alpha_0']:g}, {setting['num_diffusion_steps']} steps, {order}"
    return f"{setting['steps']} steps" if "steps" in setting else "left to right"


def report(results: dict) -> str:
    """The tables, as Markdown."""
    settings, names = results["settings"], systems()
    lines = [
        f"{settings['hardware']}; scale `{settings['scale']}`: {settings['parameters']:,} parameters, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['length']} tokens, learning rate "
        f"{settings['learning_rate']:g}; {settings['train_tokens']:,} tokens to train on. `benchmarks/reproduce.py`",
        "",
        "| held-out, nats per token (perplexity) | NELBO | one order | exact, or its bound by orders |",
        "| --- | --- | --- | --- |",
    ]

    def cell(record: dict, kind: str) -> str:
        if kind not in record:
            return ""
        value = record[kind]
        return f"{value['mean']:.3f} ± {value['standard_error']:.3f} ({math.exp(value['mean']):.1f})"

    for name, label in names.items():
        record = results["likelihood"][name]
        lines.append(
            f"| {label} | " + " | ".join(cell(record, kind) for kind in ("nelbo", "one_order", "exact")) + " |"
        )
    for order, loss in results["ngram"].items():
        lines.append(f"| {order}-gram, Kneser-Ney | | | {loss:.3f} ({math.exp(loss):.1f}) |")
    lines.append(f"| the judge (AR, {settings['judge_steps']} steps) | | | {cell(results['judge'], 'exact')} |")

    fair = fair_points(results["points"])
    text = next(point for point in results["points"] if point["system"] == "text")
    lines += [
        "",
        f"Held-out text has a perplexity of {math.exp(text['judge_nats']):.1f} under the judge, and an entropy of "
        f"{text['entropy']:.2f}. Samples with less than {text['entropy'] - 0.3:.2f} are not on a frontier.",
        "",
        "| samples | | forwards | ms a text | perplexity under the judge | entropy | on the frontier of |",
        "| --- " * 7 + "|",
    ]
    for point in results["points"]:
        if point["system"] == "text":
            continue
        fronts = [
            label
            for cost, label in (("nfe", "forwards"), ("seconds", "time"))
            if point in fair and is_on_frontier(point, fair, cost)
        ]
        error = math.exp(point["judge_nats"]) * point["judge_standard_error"]
        lines.append(
            f"| {names[point['system']]} | {describe(point['setting'])} | {point['nfe']:.1f} | "
            f"{1e3 * point['seconds']:.1f} | {math.exp(point['judge_nats']):.1f} ± {error:.1f} | "
            f"{point['entropy']:.2f} | {', '.join(fronts)} |"
        )
    return "\n".join(lines) + "\n"


def plot_likelihood(results: dict, path: Path) -> None:
    """Interpolation between AR and masked diffusion; the exact likelihood against the NELBO; the loss curves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for kind, label in (("nelbo", "NELBO"), ("one_order", "one order"), ("exact", "bound by orders")):
        values = [results["likelihood"][f"eso_{alpha_0:g}"][kind] for alpha_0 in ALPHAS]
        means, errors = [value["mean"] for value in values], [value["standard_error"] for value in values]
        left.errorbar(ALPHAS, means, errors, marker="o", capsize=2, label=f"Eso-LM, {label}")
    for name, style in (("ar", ":"), ("mdm", "--"), ("bd4", "-."), ("bd16", "-.")):
        record = results["likelihood"][name]
        loss = record.get("nelbo", record.get("exact"))["mean"]
        left.axhline(loss, linestyle=style, color="gray", linewidth=1)
        left.annotate(systems()[name], (1.0, loss), fontsize=7, ha="right", va="bottom")
    left.set_xlabel("α₀")
    left.set_ylabel("held-out nats per token")
    left.legend(frameon=False, fontsize=7)
    for name, label in systems().items():
        curve = [(row["step"], row["loss"]) for row in results["history"][name] if "loss" in row]
        right.plot(*zip(*curve, strict=True), label=label, linewidth=1)
    right.set_xlabel("optimiser steps")
    right.set_ylabel("training loss, nats per token")
    right.legend(frameon=False, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_quality(results: dict, path: Path) -> None:
    """Perplexity under the judge against forwards and against time, with the frontier."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    fair, names = fair_points(results["points"]), systems()
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    text = next(point for point in results["points"] if point["system"] == "text")
    for panel, cost, label in zip(panels, ("nfe", "seconds"), ("forwards", "seconds a text"), strict=True):
        for name in names:
            points = [point for point in fair if point["system"] == name]
            plain = [point for point in points if not point["setting"].get("lossless")]
            lossless = [point for point in points if point["setting"].get("lossless")]
            for some, marker, size in ((plain, "o", 14), (lossless, "*", 70)):
                panel.scatter(
                    [point[cost] for point in some],
                    [math.exp(point["judge_nats"]) for point in some],
                    marker=marker,
                    s=size,
                    color=colors[name],
                    label=names[name] if marker == "o" else None,
                )
        front = sorted((p[cost], math.exp(p["judge_nats"])) for p in fair if is_on_frontier(p, fair, cost))
        if front:
            panel.step(*zip(*front, strict=True), where="post", color="gray", linewidth=1)
        panel.axhline(math.exp(text["judge_nats"]), color="gray", linestyle=":", linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(label)
    panels[0].set_ylabel("perplexity under the judge (★ lossless; dotted: text)")
    panels[0].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_steps(results: dict, path: Path) -> None:
    """Perplexity under the judge against forwards, a line for each system: what few steps cost, and lossless ones."""
    figure, panel = plt.subplots(figsize=(6.4, 4.4))
    points, names = results["points"], systems()
    text = next(point for point in points if point["system"] == "text")
    colors = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    lines = [("mdm", {}, "--"), *((f"bd{length}", {}, ":") for length in BLOCKS)]
    lines += [("eso_1", {"alpha_0": 1.0, "unmasking_order": order}, style) for order, style in ORDER_STYLES.items()]
    lines += [("eso_0.25", {"alpha_0": 0.25, "unmasking_order": "strided"}, "-")]
    for name, setting, style in lines:
        mine = [p for p in points if p["system"] == name and setting.items() <= p["setting"].items()]
        for some, marker, line in (
            ([p for p in mine if not p["setting"].get("lossless")], "o", style),
            ([p for p in mine if p["setting"].get("lossless")], "*", ""),
        ):
            curve = sorted((p["nfe"], math.exp(p["judge_nats"])) for p in some)
            if curve:
                label = ", ".join([names[name], *map(str, list(setting.values())[1:])]) + (" lossless" * (line == ""))
                size = 12 if line == "" else 4
                panel.plot(*zip(*curve, strict=True), line, marker=marker, ms=size, color=colors[name], label=label)
    panel.axhline(math.exp(text["judge_nats"]), color="gray", linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(f"forwards for {results['settings']['length']} tokens")
    panel.set_ylabel("perplexity under the judge (dotted: text)")
    panel.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def require_same_settings(args: argparse.Namespace) -> None:
    """Notes what the runs of a folder have in common; raises a ValueError when those there were other ones."""
    file, now = args.work / "settings.json", {"scale": args.scale, "seed": args.seed}
    before = json.loads(file.read_text()) if file.exists() else now
    if before != now:
        raise ValueError(f"`--work {args.work}` holds runs with {before}, not {now}: choose another folder.")
    file.write_text(json.dumps(now) + "\n")


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    scale = SCALES[args.scale]
    args.work = args.work or Path("outputs") / f"reproduction_{args.scale}"
    args.work.mkdir(parents=True, exist_ok=True)
    require_same_settings(args)
    corpus = Corpus(args)

    def in_processes(names: list[str], description: str) -> None:
        command = [__file__, *args.command, "--work", str(args.work)]
        run_in_processes(
            command,
            names,
            lambda name: (args.work / name.replace(":", "_") / "result.json").exists(),
            args.work / "logs",
            args.processes,
            description=description,
        )

    in_processes([f"tune:{system}:{rate:g}" for rate in RATES for system in ("ar", "eso_0.25")], "Learning rates")
    in_processes([*reversed(systems()), "judge"], "Systems")

    orders = (1, 3, 5)
    rows, held_out = corpus.train["input_ids"][:], corpus.held_out.tolist()
    ngram = {}
    for order in tqdm(orders, desc="n-grams"):
        losses = KneserNey(rows, order, len(corpus.tokenizer)).loss(held_out)
        ngram[order] = sum(losses) / len(losses)
    points = sample_all(corpus, args)
    settings = {
        "scale": args.scale,
        "seed": args.seed,
        "hardware": hardware(args.device),
        "learning_rate": learning_rate(args),
        "tuning": {
            f"{system}, {rate:g}": held_out_loss(result_of(f"tune_{system}_{rate:g}", args))
            for rate in RATES
            for system in ("ar", "eso_0.25")
        },
        "parameters": new_model(corpus.tokenizer, 1.0, scale).num_parameters(),
        "train_tokens": len(rows) * scale.length,
        "sampling_batch": min(args.sampling_batch, scale.num_samples),
    } | vars(scale)
    results = {
        "settings": settings,
        "likelihood": {name: result_of(name, args)["likelihood"] for name in systems()},
        "judge": result_of("judge", args)["likelihood"],
        "ngram": ngram,
        "points": points,
        "history": {name: result_of(name, args)["history"] for name in [*systems(), "judge"]},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "reproduction.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "reproduction.md").write_text(report(results))
    plot_likelihood(results, args.output / "reproduction_likelihood.png")
    plot_quality(results, args.output / "reproduction_quality.png")
    plot_steps(results, args.output / "reproduction_steps.png")
    print(report(results))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="minutes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where JSON, Markdown, PNG go")
    parser.add_argument("--work", type=Path, help="where the models go; by default outputs/reproduction_<scale>")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument("--sampling-batch", type=int, default=16, help="texts sampled at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.command = sys.argv[1:] if arguments is None else arguments
    return args


if __name__ == "__main__":
    main(parse_args())
