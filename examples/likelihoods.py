"""Held-out likelihoods of an Eso-LM, as tables and plots: over more and more orders, and under samplers."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

from eso_lm import EsoForMaskedDiffusion

STAR = {"linestyle": "", "marker": "*", "markersize": 12}
WAYS = {  # how a sampler chooses what a forward decides, see `way_of`
    "strided": {"linestyle": "-"},
    "random": {"linestyle": "--"},
    "left to right": {"linestyle": "-."},
    "entropy bound, strided": {"linestyle": ":"},
    "entropy bound, random": {"linestyle": (0, (1, 3))},
    "entropy bound, left to right": {"linestyle": (0, (4, 1, 1, 1, 1, 1))},
    "lossless, strided": STAR,
    "lossless, random": STAR | {"markerfacecolor": "white"},
    "lossless, left to right": STAR | {"markerfacecolor": "gray"},
}
ORDERS = ("random", "strided", "left_to_right")


def way_of(setting: dict[str, Any]) -> str:
    """The sampler of some settings of `generate`, but for numbers."""
    kinds = [kind for kind in ("lossless", "entropy_bound") if setting.get(kind)]
    return ", ".join([*kinds, setting.get("unmasking_order", "left_to_right")]).replace("_", " ")


def describe(setting: dict[str, Any]) -> str:
    """The sampler of some settings of `generate`, with its numbers."""
    if setting.get("lossless"):
        how = "lossless"
    elif "entropy_bound" in setting:
        how = f"entropy bound {setting['entropy_bound']:g}"
    elif setting.get("num_diffusion_steps", "max") == "max":
        how = "one token a forward"
    else:
        count = setting["num_diffusion_steps"]
        how = f"{count} step{'s' if count > 1 else ''}"
    order = setting.get("unmasking_order", "left_to_right").replace("_", " ")
    return f"α₀ = {setting['alpha_0']:g}, {how}, {order}"


def per_token(nats: torch.Tensor, tokens: torch.Tensor, num_bytes: int | None = None) -> dict[str, float]:
    """A ratio of sums over sequences, with its standard error: nats (sequences,) over tokens (sequences,)."""
    nats, tokens = nats.double().cpu(), tokens.double().cpu()
    mean = float(nats.sum() / tokens.sum())
    count = len(nats)
    deviation = (nats - mean * tokens).square().sum().sqrt() / tokens.sum()
    error = float(deviation) * math.sqrt(count / (count - 1)) if count > 1 else math.nan
    per_byte = {} if num_bytes is None else {"bits_per_byte": float(nats.sum()) / math.log(2) / max(num_bytes, 1)}
    return {
        "nats_per_token": mean,
        "standard_error": error,
        "bits_per_token": mean / math.log(2),
        **per_byte,
        "perplexity": math.exp(mean),
    }


def score_orders(
    model: EsoForMaskedDiffusion,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_bytes: int,
    alpha_0: float | None,
    num_orders: int,
    num_nelbo_draws: int,
    seed: int,
) -> dict[str, Any]:
    """NELBO and the bounds of 1, 2, 4, ... orders, all per token, of texts (sequences, length)."""
    tokens = attention_mask.sum(dim=-1)
    arguments = {"attention_mask": attention_mask, "alpha_0": alpha_0}
    generator = torch.Generator().manual_seed(seed)
    nelbo = model.nelbo(input_ids, num_draws=num_nelbo_draws, generator=generator, **arguments)
    output = model.log_likelihood(input_ids, num_orders=num_orders, generator=generator, **arguments)
    bound_by_num_orders, count = {}, 1
    while count <= num_orders:
        # Each sequence has as many estimates as fit into its orders; they all count.
        groups = output.log_likelihood_per_order[:, : num_orders // count * count]
        groups = groups.double().unflatten(1, (-1, count)).logsumexp(dim=-1) - math.log(count)
        bound_by_num_orders[count] = per_token(-groups.mean(dim=-1), tokens, num_bytes)
        count *= 2
    return {
        "sequences": len(input_ids),
        "tokens": int(tokens.sum()),
        "bytes": num_bytes,
        "nelbo": per_token(nelbo.nelbo, tokens, num_bytes),
        "bound_by_num_orders": bound_by_num_orders,
    }


def budget_settings(
    alphas: list[float], orders: list[str], steps: list[int], entropy_bounds: list[float]
) -> Iterator[dict[str, Any]]:
    """Samplers of few forwards to many, for each α_0 and order: fixed steps, one token a forward, adaptive, lossless.

    Those of α_0 = 0 are all one, from left to right, and lossless decoding of it.
    """
    for alpha_0, order in product(alphas, orders):
        common = {"alpha_0": alpha_0, "unmasking_order": order}
        if alpha_0 == 0:
            if order == orders[0]:
                yield {"alpha_0": 0.0}
                yield {"alpha_0": 0.0, "lossless": True}
            continue
        for count in [*steps, "max"]:
            yield common | {"num_diffusion_steps": count}
        for bound in entropy_bounds:
            yield common | {"entropy_bound": bound}
        yield common | {"lossless": True}


def score_sampler(
    model: EsoForMaskedDiffusion,
    input_ids: torch.Tensor,
    setting: dict[str, Any],
    num_plans: int,
    attention_mask: torch.Tensor | None = None,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well a sampler, of settings of `generate`, does on texts (sequences, length), and in how many forwards.

    Args:
        num_plans: Plans of each text; adaptive samplers, which cost a forward a group, get one: texts differ by more.
        seed: Of plans that are the same for every setting, as far as they go; None: torch's global one.

    Returns:
        The mean over plans of -log p(text | plan), in nats, and of the forwards, (sequences,) each. With `lossless`,
        the likelihood is that of one token a forward in its order; the forwards, which depend on chance, are those of
        as many samples of the same lengths.
    """

    def generators() -> list[torch.Generator] | None:
        if seed is None:
            return None
        return [torch.Generator().manual_seed((seed << 32) + row) for row in range(len(input_ids))]

    input_ids = input_ids.to(model.device)
    attention_mask = None if attention_mask is None else attention_mask.to(model.device)
    num_plans = 1 if "entropy_bound" in setting else num_plans
    output = model.log_likelihood(input_ids, attention_mask, num_orders=num_plans, generator=generators(), **setting)
    if output.num_function_evaluations is None:
        samples = model.generate(
            torch.full_like(input_ids, model.config.mask_token_id),  # as many holes as the text has tokens
            attention_mask=attention_mask,
            eos_token_id=None,
            generator=generators(),
            return_dict_in_generate=True,
            **setting,
        )
        forwards = samples.forwards_per_row.double()
    else:
        forwards = output.num_function_evaluations.double().mean(dim=1)
    return -output.log_likelihood_per_order.double().mean(dim=1), forwards


def score_samplers(
    model: EsoForMaskedDiffusion,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_bytes: int,
    settings: list[dict[str, Any]],
    num_plans: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Exact nats per token, `per_token`, under each sampler, with its forwards."""
    points = []
    for setting in tqdm(settings, desc="Samplers"):
        nats, forwards = score_sampler(model, input_ids, setting, num_plans, attention_mask, seed)
        point = {"setting": setting, "forwards": float(forwards.mean())}
        points.append(point | per_token(nats, attention_mask.sum(dim=-1), num_bytes))
    return points


def frontier(
    points: list[dict[str, Any]], cost: str = "forwards", loss: str = "nats_per_token"
) -> list[dict[str, Any]]:
    """The points that no other one of the same cost or less beats, by ascending cost."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (point[cost], point[loss])):
        if not best or point[loss] < best[-1][loss]:
            best.append(point)
    return best


def budgets_report(points: list[dict[str, Any]]) -> str:
    """All samplers, as a Markdown table; the best ones for their forwards are in bold."""
    best = frontier(points)
    lines = ["| sampler | forwards | nats per token | perplexity |", "| --- | --- | --- | --- |"]
    for point in points:
        nats = f"{point['nats_per_token']:.3f}"
        nats = f"**{nats}**" if point in best else nats
        cells = [describe(point["setting"]), f"{point['forwards']:.1f}"]
        cells += [f"{nats} ± {point['standard_error']:.3f}", f"{point['perplexity']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_bound(results: dict[str, Any], path: Path) -> None:
    """Draws the bound on the perplexity against the number of orders, with the NELBO's above it."""
    bounds = results["bound_by_num_orders"]
    figure = Figure(figsize=(5, 3.6))
    axes = figure.subplots()
    axes.errorbar(
        list(bounds),
        [bound["nats_per_token"] for bound in bounds.values()],
        yerr=[bound["standard_error"] for bound in bounds.values()],
        marker="o",
        capsize=3,
        label="exact likelihood over K orders",
    )
    axes.axhline(results["nelbo"]["nats_per_token"], linestyle="--", color="grey", label="NELBO")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("orders K")
    axes.set_ylabel("negative log-likelihood (nats per token)")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_budgets(points: list[dict[str, Any]], path: Path) -> None:
    """Draws exact nats per token against forwards: a line for each α_0 and way of the samplers."""
    figure = Figure(figsize=(8, 4.4))
    axes = figure.subplots()
    best = frontier(points)
    pale = {"color": "0.88", "linewidth": 7}
    axes.step(*curve(best), where="post", zorder=0, **pale)
    alphas = dict.fromkeys(point["setting"]["alpha_0"] for point in points)
    colors = dict(zip(alphas, matplotlib.colormaps["tab10"].colors, strict=False))
    ways = dict.fromkeys(way_of(point["setting"]) for point in points)
    for alpha_0, way in product(alphas, ways):
        mine = [p for p in points if p["setting"]["alpha_0"] == alpha_0 and way_of(p["setting"]) == way]
        looks = {"marker": "o", "markersize": 4, "linewidth": 1.3} | WAYS[way]
        axes.plot(*curve(mine), color=colors[alpha_0], **looks)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("forwards for a text")
    axes.set_ylabel("exact nats per token")
    handles = [Line2D([], [], color=color, label=f"α₀ = {alpha_0:g}") for alpha_0, color in colors.items()]
    handles += [Line2D([], [], color="black", label=way, **WAYS[way]) for way in ways]
    handles.append(Line2D([], [], label="the best of all", **pale))
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def curve(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Forwards and nats per token, by ascending forwards."""
    points = sorted(points, key=lambda point: point["forwards"])
    return [point["forwards"] for point in points], [point["nats_per_token"] for point in points]
