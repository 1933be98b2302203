"""Tables of what `reproduce.py` measured."""

import json
import math
from statistics import fmean, median
from typing import Any

from likelihoods import describe
from reporting import table
from reproduction_systems import measured_systems, systems

COSTS = {
    "forwards": "forwards for {length} tokens",
    "ms_at_1": "milliseconds a text, one at a time",
    "ms_at_16": "milliseconds a text, 16 at a time",
}


def averaged(points: list[dict]) -> list[dict]:
    """The points of each system and setting as one, the mean over seeds, with `spread`: of the nats, max - min."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for point in points:
        groups.setdefault((point["system"], json.dumps(point["setting"])), []).append(point)
    return [
        some[0]
        | {name: fmean(point[name] for point in some) for name, value in some[0].items() if isinstance(value, float)}
        | {"spread": max(p["nats_per_token"] for p in some) - min(p["nats_per_token"] for p in some)}
        for some in groups.values()
    ]


def takes_steps(setting: dict[str, Any], order: str) -> bool:
    """Whether a setting is a fixed number of steps in this order, of an Eso-LM with all tokens in parallel."""
    steps = setting.get("num_steps", setting.get("num_diffusion_steps"))
    return setting.get("alpha_0", 1.0) == 1 and setting.get("unmasking_order") == order and isinstance(steps, int)


def describe_system(setting: dict[str, Any]) -> str:
    """The setting of any system's sampler."""
    if not setting:
        return "left to right"
    if "alpha_0" in setting:
        return describe(setting)
    steps = {"max": "one token a forward", 1: "1 step"}.get(setting["num_steps"], f"{setting['num_steps']} steps")
    return f"{steps}, {setting['unmasking_order'].replace('_', ' ')}"


def over_seeds(records: list[dict], kind: str) -> str:
    """A mean over seeds, with the standard error over held-out rows of the first, the perplexity, and every seed."""
    if kind not in records[0]:
        return ""
    means = [record[kind]["mean"] for record in records]
    every = f"; {', '.join(f'{mean:.3f}' for mean in means)}" if len(means) > 1 else ""
    mean = fmean(means)
    return f"{mean:.3f} ± {records[0][kind]['standard_error']:.3f} ({math.exp(mean):.1f}{every})"


def likelihood_table(results: dict) -> list[str]:
    kinds = {
        "nelbo": "NELBO",
        "one_order": "one order",
        "exact": "exact, or its bound",
        "left_to_right": "from left to right",
    }
    records = {systems()[name]: losses for name, losses in results["likelihood"].items()}
    records |= {f"{systems()[name]}, no other start": [run["likelihood"]] for name, run in results["unaided"].items()}
    rows = [" | ".join([label, *(over_seeds(losses, kind) for kind in kinds)]) for label, losses in records.items()]
    rows += [f"{n}-gram, Kneser-Ney | | | {loss:.3f} ({math.exp(loss):.1f}) |" for n, loss in results["ngram"].items()]
    rows.append(f"the judge (AR) | | | {over_seeds([results['judge']], 'exact')} |")
    return table(" | ".join(["held-out, nats per token (perplexity; seeds)", *kinds.values()]), rows)


def recipes_table(results: dict) -> list[str]:
    rows = []
    for name, losses in results["tuning"].items():
        best = results["recipes"][name]
        cells = (f"**{loss:.3f}**" if recipe == best else f"{loss:.3f}" for recipe, loss in losses.items())
        rows.append(" | ".join([systems()[name], *cells]))
    header = " | ".join(["held-out, nats per token, after a try", *next(iter(results["tuning"].values()))])
    return table(header, rows)


def budgets_table(results: dict) -> list[str]:
    """The best of every system within a number of forwards; the best of all is bold."""
    settings, points = results["settings"], averaged(results["points"])
    limits = [*sorted({*settings["diffusion_steps"], settings["length"]}), math.inf]

    def best(some: list[dict], limit: float) -> float:
        return min((point["nats_per_token"] for point in some if point["forwards"] <= limit), default=math.inf)

    def cell(value: float, best_of_all: float) -> str:
        if value == math.inf:
            return ""
        return f"**{value:.2f}**" if round(value, 2) == round(best_of_all, 2) else f"{value:.2f}"

    rows = []
    for name, label in measured_systems().items():
        mine = [point for point in points if point["system"] == name]
        rows.append(" | ".join([label, *(cell(best(mine, limit), best(points, limit)) for limit in limits)]))
    columns = (f"≤ {limit}" if limit < math.inf else "any" for limit in limits)
    return table(" | ".join(["exact nats per token, forwards", *columns]), rows)


def samplers_table(results: dict) -> list[str]:
    rows = []
    for point in averaged(results["points"]):
        perplexity = math.exp(point["judge_nats"])
        error = max(point["standard_error"], point["spread"] / 2)
        cells = [
            measured_systems()[point["system"]],
            describe_system(point["setting"]),
            f"{point['forwards']:.1f}",
            *(f"{point[f'ms_at_{batch}']:.1f}" for batch in (1, 16)),
            f"{point['nats_per_token']:.3f} ± {error:.3f}",
            f"{perplexity:.0f} ± {perplexity * point['judge_standard_error']:.0f}",
            f"{point['entropy']:.2f}",
            f"{point['mauve']:.2f}",
        ]
        rows.append(" | ".join(cells))
    header = "system | sampler | forwards | ms a text, one at a time | 16 at a time | exact nats per token"
    return table(f"{header} | judge's perplexity | entropy | MAUVE", rows)


def spread_of_times(results: dict) -> float:
    """How far the lowest and the highest time of a call are apart, as a share of their median; of most settings."""
    points = results["points"]
    return median(
        (p[f"ms_at_{batch}_high"] - p[f"ms_at_{batch}_low"]) / p[f"ms_at_{batch}"] for p in points for batch in (1, 16)
    )


def report(results: dict) -> str:
    """All tables, as Markdown."""
    settings, text = results["settings"], results["text"]
    lines = [
        f"{settings['hardware']}; scale `{settings['scale']}`: {settings['parameters']:,} parameters, "
        f"{settings['steps']} steps of {settings['batch_size']} x {settings['length']} tokens; "
        f"{settings['train_tokens']:,} tokens to train on. Draft heads: {settings['head_parameters']:,} parameters "
        f"more, {settings['head_steps']} steps more. `benchmarks/reproduce.py`.",
        "",
        *likelihood_table(results),
        "",
        "Of the best sampler of a system within a number of forwards:",
        "",
        *budgets_table(results),
        "",
        f"All samplers. ± is the standard error over {settings['held_out_rows']} held-out rows, or half of what seeds "
        f"differ by where that is more. Under the judge held-out text has a perplexity of "
        f"{math.exp(text['judge_nats']):.1f}; its entropy is {text['entropy']:.2f}, and its MAUVE, with other text, "
        f"{text['mauve']:.2f}. Times are medians of {settings['num_timed']} calls, all systems in turns; of half the "
        f"settings the slowest and the fastest call are up to {spread_of_times(results):.0%} of it apart.",
        "",
        *samplers_table(results),
        "",
        f"Recipes, each tried for {settings['tune_steps']} steps:",
        "",
        *recipes_table(results),
    ]
    return "\n".join(lines) + "\n"
