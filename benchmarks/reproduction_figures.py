"""Pictures of what `reproduce.py` measured: a line for each system, in the same colour everywhere."""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from likelihoods import frontier
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reproduction_report import COSTS, averaged, takes_steps
from reproduction_systems import ALPHAS, HEAD, measured_systems, systems

COLORS = dict(
    zip(
        systems(),
        ("black", "tab:red", "tab:orange", "tab:brown", "tab:purple", "tab:blue", "tab:cyan", "tab:green"),
        strict=True,
    )
)


def plot_all(results: dict, folder: Path) -> None:
    """All pictures, as reproduction_*.png."""
    pictures: dict[str, Callable[[dict], Figure]] = {
        "likelihood": plot_likelihood,
        "training": plot_training,
        "budgets": plot_budgets,
        "steps": plot_steps,
        "heads": plot_heads,
        "judge": plot_judge,
    }
    for name, plot in pictures.items():
        plot(results).savefig(folder / f"reproduction_{name}.png", dpi=130)


def looks_of(name: str) -> dict[str, Any]:
    """Colour and line of a system; those with draft heads are dashed."""
    style = "--" if name.endswith(HEAD) else "-"
    return {"color": COLORS[name.removesuffix(HEAD)], "linestyle": style, "marker": "o", "markersize": 3.5}


def new_figure(width: float, panels: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side, with room for a legend to their right."""
    figure = Figure(figsize=(width, 3.9), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def finish(figure: Figure, panels: list[Axes], ylabel: str) -> Figure:
    """Names the ordinate, and puts one legend beside the panels, over none of the points."""
    panels[0].set_ylabel(ylabel)
    for panel in panels:
        panel.grid(color="0.92", linewidth=0.6)
        panel.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, handlelength=3.5)
    return figure


def on_costs(panel: Axes, cost: str, results: dict) -> None:
    """A logarithmic abscissa of a cost, by powers of two."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.3g}")
    panel.set_xlabel(COSTS[cost].format(length=results["settings"]["length"]))


def draw_line(panel: Axes, points: Iterable[dict], cost: str, value: Callable[[dict], float], **looks: Any) -> None:
    points = sorted(points, key=lambda point: point[cost])
    if points:
        panel.plot([point[cost] for point in points], [value(point) for point in points], **looks)


def plot_budgets(results: dict) -> Figure:
    """Exact nats against forwards and seconds: of each system the best sampler at each cost or less."""
    figure, panels = new_figure(12, len(COSTS))
    # What says less than unigrams would only press the rest together.
    points = [point for point in averaged(results["points"]) if point["nats_per_token"] < results["ngram"]["1"]]
    for panel, cost in zip(panels, COSTS, strict=True):
        for name, title in measured_systems().items():
            mine = frontier([point for point in points if point["system"] == name], cost=cost)
            looks = looks_of(name) | {"label": title, "drawstyle": "steps-post"}  # the best for this cost or less
            draw_line(panel, mine, cost, lambda point: point["nats_per_token"], **looks)
        on_costs(panel, cost, results)
    return finish(figure, panels, "exact nats per token of held-out text")


def plot_steps(results: dict) -> Figure:
    """Exact nats against forwards where more and more tokens share one: what few steps cost each system."""
    figure, panels = new_figure(8.5, 1)
    points = averaged(results["points"])
    names = ("mdm", "bd4", "bd16", "eso_1", "eso_0.5", "eso_0.25")
    for name, order in itertools.product(names, ("strided", "random")):
        mine = [point for point in points if point["system"] == name and takes_steps(point["setting"], order)]
        style = {"linestyle": ":" if order == "random" else "-", "label": f"{systems()[name]}, {order}"}
        looks = looks_of(name) | style
        draw_line(panels[0], mine, "forwards", lambda point: point["nats_per_token"], **looks)
    on_costs(panels[0], "forwards", results)
    return finish(figure, panels, "exact nats per token of held-out text")


def plot_heads(results: dict) -> Figure:
    """Exact nats against forwards and seconds from left to right: with a draft head, and the same model without."""
    figure, panels = new_figure(11, 2)
    points = averaged(results["points"])
    names = [name for name in measured_systems() if f"{name}{HEAD}" in measured_systems() or name.endswith(HEAD)]
    for panel, cost in zip(panels, ("forwards", "ms_at_1"), strict=True):
        for name in ("ar", *names):
            mine = [point for point in points if point["system"] == name and is_plain_left_to_right(point["setting"])]
            looks = looks_of(name) | {"label": measured_systems()[name]}
            draw_line(panel, mine, cost, lambda point: point["nats_per_token"], **looks)
        on_costs(panel, cost, results)
    return finish(figure, panels, "exact nats per token of held-out text")


def is_plain_left_to_right(setting: dict[str, Any]) -> bool:
    """Whether a setting writes from left to right: some steps, or one token a forward, which AR does."""
    return not setting or (setting["unmasking_order"] == "left_to_right" and "lossless" not in setting)


def plot_judge(results: dict) -> Figure:
    """What the judge says of the samplers of `plot_budgets`, which are chosen without it: perplexity and MAUVE."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = list(figure.subplots(1, 2))
    points = averaged(results["points"])
    for name, title in measured_systems().items():
        best = frontier([point for point in points if point["system"] == name])
        looks = looks_of(name) | {"label": title}
        draw_line(panels[0], best, "forwards", lambda point: math.exp(point["judge_nats"]), **looks)
        draw_line(panels[1], best, "forwards", lambda point: point["mauve"], **looks)
    panels[0].axhline(math.exp(results["text"]["judge_nats"]), color="gray", linestyle=":", linewidth=1)
    panels[1].axhline(results["text"]["mauve"], color="gray", linestyle=":", linewidth=1)
    panels[0].set_yscale("log")
    panels[1].set_ylabel("MAUVE on the judge's features")
    for panel in panels:
        on_costs(panel, "forwards", results)
    return finish(figure, panels, "perplexity under the judge (dotted: text)")


def plot_likelihood(results: dict) -> Figure:
    """Interpolation between AR and masked diffusion, and the exact likelihood against the NELBO."""
    figure, panels = new_figure(7.5, 1)
    panel = panels[0]
    kinds = (
        ("nelbo", "NELBO", "-", "o"),
        ("exact", "bound by orders", "--", "s"),
        ("left_to_right", "from left to right", ":", "^"),
    )
    for kind, label, style, marker in kinds:
        values = [results["likelihood"][f"eso_{alpha_0:g}"] for alpha_0 in ALPHAS]
        means = [fmean(seed[kind]["mean"] for seed in seeds) for seeds in values]
        errors = [seeds[0][kind]["standard_error"] for seeds in values]
        looks = {"color": "0.4", "linestyle": style, "marker": marker, "capsize": 2, "label": f"Eso-LM, {label}"}
        panel.errorbar(ALPHAS, means, errors, **looks)
    for name in ("ar", "mdm", "bd4", "bd16"):
        loss = fmean((seed.get("nelbo") or seed["exact"])["mean"] for seed in results["likelihood"][name])
        label = systems()[name] + ("" if name == "ar" else ", NELBO")
        panel.axhline(loss, linestyle="-.", color=COLORS[name], linewidth=1.2, label=label)
    panel.set_xlabel("α₀")
    return finish(figure, panels, "held-out nats per token")


def plot_training(results: dict) -> Figure:
    """Training losses against optimiser steps, averaged over what is logged at a time."""
    figure, panels = new_figure(8.5, 1)
    lines = [(name, label, results["history"][name], "-") for name, label in systems().items()]
    for name, run in results["unaided"].items():
        lines.append((name, f"{systems()[name]}, no other start", run["history"], ":"))
    for name, label, history, style in lines:
        curve = [(row["step"], row["loss"]) for row in history if "loss" in row]
        panels[0].plot(*zip(*curve, strict=True), label=label, linewidth=1.2, color=COLORS[name], linestyle=style)
    panels[0].set_xlabel("optimiser steps")
    return finish(figure, panels, "training loss, nats per token")
