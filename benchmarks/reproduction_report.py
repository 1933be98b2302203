"""Tables and pictures of what `reproduce.py` measured."""

import math
from pathlib import Path

import matplotlib
from likelihoods import WAYS, curve, describe, frontier, way_of
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from reporting import table
from reproduction_systems import ALPHAS, BLOCKS, alpha_of, systems

COLORS = dict(zip(systems(), matplotlib.colormaps["tab10"].colors, strict=False))
DOT = {"marker": "o", "markersize": 4, "linewidth": 1.3}
DOTS = dict.fromkeys(systems(), DOT) | {"ar": {"marker": "s", "markersize": 9}}  # AR, below the dot of α₀ = 0


def text_point(points: list[dict]) -> dict:
    """The point of held-out text, which samples are compared with."""
    return next(point for point in points if point["system"] == "text")


def is_on_frontier(point: dict, points: list[dict], cost: str) -> bool:
    """Whether none of `points` is better at the same cost or less."""
    return not any(
        other[cost] <= point[cost] and other["judge_nats"] < point["judge_nats"] for other in points if other != point
    )


def fair_points(points: list[dict]) -> list[dict]:
    """Samples about as varied as text: those whose entropy is at most 0.3 nats below."""
    text = text_point(points)
    return [point for point in points if point is not text and point["entropy"] >= text["entropy"] - 0.3]


def split_lossless(points: list[dict]) -> tuple[list[dict], list[dict]]:
    """Those sampled as planned, and the lossless ones."""
    lossless = [point for point in points if point["setting"].get("lossless")]
    return [point for point in points if point not in lossless], lossless


def describe_system(setting: dict) -> str:
    """The setting of any system's sampler."""
    if "alpha_0" in setting:
        return describe(setting)
    if "steps" not in setting:
        return "left to right"
    return "one token a forward" if setting["steps"] == "max" else f"{setting['steps']} steps"


def with_perplexity(nats: dict[str, float]) -> str:
    return f"{nats['mean']:.3f} ± {nats['standard_error']:.3f} ({math.exp(nats['mean']):.1f})"


def what_was_run(settings: dict) -> str:
    return (
        f"{settings['hardware']}; scale `{settings['scale']}`: {settings['parameters']:,} parameters, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['length']} tokens; "
        f"{settings['train_tokens']:,} tokens to train on. `benchmarks/reproduce.py`."
    )


def report(results: dict) -> str:
    """The tables, as Markdown."""
    settings, names, text = results["settings"], systems(), text_point(results["points"])

    def cell(record: dict, kind: str) -> str:
        return with_perplexity(record[kind]) if kind in record else ""

    likelihoods = [
        " | ".join([label, *(cell(results["likelihood"][name], kind) for kind in ("nelbo", "one_order", "exact"))])
        for name, label in names.items()
    ]
    for order, loss in results["ngram"].items():
        likelihoods.append(f"{order}-gram, Kneser-Ney | | | {loss:.3f} ({math.exp(loss):.1f})")
    likelihoods.append(f"the judge (AR, {settings['judge_steps']} steps) | | | {cell(results['judge'], 'exact')}")

    fair, samples = fair_points(results["points"]), []
    for point in results["points"]:
        if point is text:
            continue
        fronts = [
            label
            for cost, label in (("nfe", "forwards"), ("seconds", "time"))
            if point in fair and is_on_frontier(point, fair, cost)
        ]
        perplexity = math.exp(point["judge_nats"])
        samples.append(
            f"{names[point['system']]} | {describe_system(point['setting'])} | {point['nfe']:.1f} | "
            f"{1e3 * point['seconds']:.1f} | {perplexity:.1f} ± {perplexity * point['judge_standard_error']:.1f} | "
            f"{point['entropy']:.2f} | {', '.join(fronts)}"
        )
    lines = [
        f"{what_was_run(settings)} Learning rate {settings['learning_rate']:g}.",
        "",
        *table(
            "held-out, nats per token (perplexity) | NELBO | one order | exact, or its bound by orders", likelihoods
        ),
        "",
        f"Held-out text has a perplexity of {math.exp(text['judge_nats']):.1f} under the judge, and an entropy of "
        f"{text['entropy']:.2f}. Samples with less than {text['entropy'] - 0.3:.2f} are not on a frontier.",
        "",
        *table(
            "samples | | forwards | ms a text | perplexity under the judge | entropy | on the frontier of", samples
        ),
    ]
    return "\n".join(lines) + "\n"


def plot_likelihood(results: dict, path: Path) -> None:
    """Interpolation between AR and masked diffusion; the exact likelihood against the NELBO; the loss curves."""
    figure = Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
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


def plot_quality(results: dict, path: Path) -> None:
    """Perplexity under the judge against forwards and against time, with the frontier."""
    figure = Figure(figsize=(11, 4.4))
    panels = figure.subplots(1, 2, sharey=True)
    fair, names = fair_points(results["points"]), systems()
    text = text_point(results["points"])
    for panel, cost, label in zip(panels, ("nfe", "seconds"), ("forwards", "seconds a text"), strict=True):
        for name in names:
            plain, lossless = split_lossless([point for point in fair if point["system"] == name])
            for some, marker, size in ((plain, "o", 14), (lossless, "*", 70)):
                panel.scatter(
                    [point[cost] for point in some],
                    [math.exp(point["judge_nats"]) for point in some],
                    marker=marker,
                    s=size,
                    color=COLORS[name],
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


def plot_steps(results: dict, path: Path) -> None:
    """Perplexity under the judge against forwards, a line for each system: what few steps cost, and lossless ones."""
    figure = Figure(figsize=(6.4, 4.4))
    panel = figure.subplots()
    points, names = results["points"], systems()
    text = text_point(points)
    lines = [("mdm", None, "--"), *((f"bd{length}", None, ":") for length in BLOCKS)]
    lines += [("eso_1", "random", "--"), ("eso_1", "strided", "-"), ("eso_0.25", "strided", "-")]
    for name, order, style in lines:
        setting = {} if order is None else {"alpha_0": alpha_of(name), "unmasking_order": order}
        label = names[name] if order is None else f"{names[name]}, {order}"
        mine = [p for p in points if p["system"] == name and setting.items() <= p["setting"].items()]
        plain, lossless = split_lossless(mine)
        for some, marker, size, line, note in ((plain, "o", 4, style, ""), (lossless, "*", 12, "", " lossless")):
            curve = sorted((p["nfe"], math.exp(p["judge_nats"])) for p in some)
            if curve:
                looks = {"marker": marker, "ms": size, "color": COLORS[name], "label": label + note}
                panel.plot(*zip(*curve, strict=True), line, **looks)
    panel.axhline(math.exp(text["judge_nats"]), color="gray", linestyle=":", linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel(f"forwards for {results['settings']['length']} tokens")
    panel.set_ylabel("perplexity under the judge (dotted: text)")
    panel.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def by_system_and_way(points: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The points of each system and `way_of` sampling it, if there are several, in their order."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for point in points:
        setting = point["setting"]
        way = way_of(setting) if "unmasking_order" in setting else ""
        groups.setdefault((point["system"], way), []).append(point)
    return groups


def budgets_report(results: dict) -> str:
    """The tables of exact likelihoods, as Markdown: the best of every system at each budget, and all settings."""
    settings, points, names = results["settings"], results["points"], systems()
    losses = results["likelihood"]
    limits = [*sorted({*settings["diffusion_steps"], settings["length"]}), math.inf]

    def best(some: list[dict], limit: int) -> float:
        return min((point["nats_per_token"] for point in some if point["forwards"] <= limit), default=math.inf)

    def nelbo(name: str) -> str:
        return f"{losses[name]['nelbo']['mean']:.2f}" if "nelbo" in losses[name] else ""

    def cell(value: float, best_of_all: float) -> str:
        if value == math.inf:
            return ""
        return f"**{value:.2f}**" if round(value, 2) == round(best_of_all, 2) else f"{value:.2f}"

    lines = [
        what_was_run(settings),
        "",
        f"Exact nats per token of {settings['held_out_rows']} held-out rows: -log p(text | plan) under each sampler, "
        f"a mean over plans. Of the best setting within a number of forwards, for {settings['length']} tokens:",
        "",
        *table(
            " | ".join(["system", "NELBO", "", *(f"≤ {limit}" if limit < math.inf else "any" for limit in limits)]),
            (
                " | ".join(
                    [names[name], nelbo(name), way]
                    + [cell(best(some, limit), best(points, limit)) for limit in limits]
                )
                for (name, way), some in by_system_and_way(points).items()
            ),
        ),
        "",
        "All settings:",
        "",
        *table(
            "system | | forwards | nats per token (perplexity)",
            (
                f"{names[point['system']]} | {describe_system(point['setting'])} | {point['forwards']:.1f} | "
                f"{point['nats_per_token']:.3f} ± {point['standard_error']:.3f} ({point['perplexity']:.1f})"
                for point in points
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def plot_budgets(results: dict, path: Path) -> None:
    """Exact nats per token against forwards: a line for each system, way, and α_0 at sampling."""
    figure = Figure(figsize=(8.4, 4.8))
    panel = figure.subplots()
    points, names = results["points"], systems()
    pale = {"color": "0.88", "linewidth": 7}
    panel.step(*curve(frontier(points)), where="post", zorder=0, **pale)
    groups = by_system_and_way(points)
    for (name, way), some in groups.items():
        for alpha_0 in dict.fromkeys(point["setting"].get("alpha_0") for point in some):
            mine = [point for point in some if point["setting"].get("alpha_0") == alpha_0]
            panel.plot(*curve(mine), color=COLORS[name], **DOTS[name] | WAYS.get(way, {}))
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(f"forwards for {results['settings']['length']} tokens")
    panel.set_ylabel("exact nats per token of held-out text")
    ways = {way for _, way in groups}
    handles = [Line2D([], [], color=COLORS[name], label=label, **DOTS[name]) for name, label in names.items()]
    handles += [Line2D([], [], color="black", label=way, **looks) for way, looks in WAYS.items() if way in ways]
    handles.append(Line2D([], [], label="the best of all", **pale))
    panel.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
