"""Draw how a sequence fills up, forward by forward, under different alpha_0.

python examples/plot_unmasking.py --model outputs/quickstart --output docs/unmasking.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import AutoModel, set_seed

import eso_lm  # noqa: F401  (registers the model with AutoModel)

STATES = {
    "masked": "#e9e6df",
    "decoded before": "#8fb3c9",
    "decoded now, in parallel": "#0b5d8a",
    "decoded now, alone": "#d1602d",
}


def states(unmasking_steps: torch.Tensor, num_forwards: int) -> torch.Tensor:
    """State of every position after every forward, (forwards, length), as an index into STATES."""
    step = torch.arange(1, num_forwards + 1)[:, None]
    is_alone = (unmasking_steps[None] == step).sum(dim=-1, keepdim=True) == 1
    now = torch.where(is_alone, 3, 2)
    return torch.where(unmasking_steps < step, 1, torch.where(unmasking_steps == step, now, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart"), help="a folder of save_pretrained")
    parser.add_argument("--output", type=Path, default=Path("docs/unmasking.png"))
    parser.add_argument("--alpha-0", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.0])
    parser.add_argument("--length", type=int, default=64, help="tokens")
    parser.add_argument("--num-diffusion-steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    model = AutoModel.from_pretrained(args.model)
    colors = ListedColormap(list(STATES.values()))
    boundaries = BoundaryNorm(range(len(STATES) + 1), colors.N)
    figure = Figure(figsize=(3.4 * len(args.alpha_0), 4.2))
    panels = figure.subplots(1, len(args.alpha_0), sharey=True, squeeze=False)[0]
    for panel, alpha_0 in zip(panels, args.alpha_0, strict=True):
        output = model.generate(
            max_new_tokens=args.length,
            alpha_0=alpha_0,
            num_diffusion_steps=args.num_diffusion_steps,
            unmasking_order="random",
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        filled = states(output.unmasking_steps[0], output.num_function_evaluations)
        panel.imshow(filled, aspect="auto", cmap=colors, norm=boundaries, interpolation="none")
        panel.set_ylim(args.length - 0.5, -0.5)
        panel.set_title(f"$\\alpha_0$ = {alpha_0:g}   (NFE = {output.num_function_evaluations})", fontsize=11)
        panel.set_xlabel("text position")
        panel.spines[:].set_visible(False)
    panels[0].set_ylabel("forward")
    legend = [Patch(color=color, label=label) for label, color in STATES.items()]
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
