"""How the page of app.py shows texts: as HTML, a span for each token."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:  # a Space has the model's code, and not the package
    from eso_lm import EsoGenerationStep

COLORINGS = ("forward", "probability")
# Gradio's themes color spans themselves, light on dark: what is on white stays dark.
STYLE = """
.text { font-family: ui-monospace, monospace; font-size: 0.95rem; line-height: 1.75; white-space: pre-wrap;
        overflow-wrap: anywhere; min-height: 4rem; background: #fff; padding: 0.6rem;
        border: 1px solid #d8d8d8; border-radius: 6px; }
.text span { border-radius: 3px; padding: 1px 0; color: #1a1a1a !important; }
.text .open { color: #a0a0a0 !important; }
.text .draft { outline: 1px dashed #888; color: #666 !important; font-style: italic; }
.text .refused { text-decoration: line-through; color: #b00020 !important; opacity: 0.75; }
.orders { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0.6rem; }
.counts { font-variant-numeric: tabular-nums; margin: 0.3rem 0; }
.legend span { display: inline-block; width: 1.1rem; height: 0.8rem; border: solid #bbb; border-width: 1px 0; }
"""
OPEN, NEWLINE = "·", "⏎\n"


def color_of_share(share: float) -> str:
    """From the first tokens to be decided, cool, to the last, warm; light enough to read black text on."""
    return f"hsl({225 - 205 * share:.0f} 85% {86 - 8 * math.sin(math.pi * share):.0f}%)"


def color_of_probability(log_prob: float) -> str:
    """From improbable, red, to certain, white."""
    return f"hsl(8 85% {60 + 40 * math.exp(log_prob):.0f}%)"


def text_of(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token by itself, with its blanks, as HTML."""
    return escape(tokenizer.decode([token])).replace("\n", NEWLINE)


def show_step(step: "EsoGenerationStep", tokenizer: PreTrainedTokenizerBase) -> str:
    """A text after a forward: what has been decided, drafts and refusals, and what is open.

    Of the two colors of a token, `legend` says which one is shown.
    """
    mask, padding = tokenizer.mask_token_id, tokenizer.pad_token_id
    is_new, shares = step.unmasking_steps > 0, shares_decided_before(step, mask)
    last = max([column for column, token in enumerate(step.tokens.tolist()) if token != padding], default=-1)
    spans = []
    for column, token in enumerate(step.tokens[: last + 1].tolist()):
        if column in step.refused:
            spans.append(
                f'<span class="refused" title="a draft, refused">{text_of(step.refused[column], tokenizer)}</span>'
            )
        if token == mask:
            drafted = step.drafts.get(column)
            spans.append(
                f'<span class="open" title="open">{OPEN}</span>'
                if drafted is None
                else f'<span class="draft" title="a draft, to be judged">{text_of(drafted, tokenizer)}</span>'
            )
        elif not is_new[column]:
            spans.append(f'<span class="given">{text_of(token, tokenizer)}</span>')
        else:
            number, log_prob = int(step.unmasking_steps[column]), float(step.log_probs[column])
            colors = f"--forward:{color_of_share(shares[number])};--probability:{color_of_probability(log_prob)}"
            title = f"forward {number}, probability {math.exp(log_prob):.3f}"
            spans.append(f'<span class="new" style="{colors}" title="{title}">{text_of(token, tokenizer)}</span>')
    return f'<div class="text">{"".join(spans)}</div>'


def shares_decided_before(step: "EsoGenerationStep", mask_token_id: int) -> dict[int, float]:
    """Of the tokens to be written, the share that had been decided before each forward."""
    num_open = int((step.tokens == mask_token_id).sum())
    numbers = step.unmasking_steps[step.unmasking_steps > 0].tolist()
    total = max(len(numbers) + num_open - 1, 1)
    return {number: sum(other < number for other in numbers) / total for number in set(numbers)}


def show_counts(step: "EsoGenerationStep", seconds: float, mask_token_id: int, state: str) -> str:
    """How far a text is: forwards, tokens up to its end, tokens a forward, seconds."""
    decided, num_open = int((step.unmasking_steps > 0).sum()), int((step.tokens == mask_token_id).sum())
    rate = decided / step.number if step.number else 0.0
    return (
        f'<div class="counts"><b>{step.number}</b> forwards, <b>{decided}</b> of {decided + num_open} tokens, '
        f"<b>{rate:.1f}</b> a forward, {seconds:.2f} s <i>{state}</i></div>"
    )


def show_scores(
    tokens: Sequence[int], log_probs: Sequence[float], ranks: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    """A text whose tokens have the color of their probability under an order."""
    spans = [
        f'<span style="background:{color_of_probability(log_prob)}" title="number {rank} in the order, '
        f'{log_prob:.2f} nats">{text_of(token, tokenizer)}</span>'
        for token, log_prob, rank in zip(tokens, log_probs, ranks, strict=True)
    ]
    return f'<div class="counts"><b>{-sum(log_probs):.2f}</b> nats</div><div class="text">{"".join(spans)}</div>'


def legend(coloring: str) -> str:
    """What the colors say, and which ones the tokens on the page have."""
    shares = [number / 12 for number in range(13)]
    if coloring == "probability":
        colors = [color_of_probability(math.log(max(share, 1e-3))) for share in shares]
        ends = "improbable", "certain"
    else:
        colors, ends = [color_of_share(share) for share in shares], ("decided first", "last")
    patches = "".join(f'<span style="background:{color}"></span>' for color in colors)
    choice = f"<style>.text .new {{ background: var(--{coloring}); }}</style>"
    return f'{choice}<div class="legend">{ends[0]} {patches} {ends[1]}</div>'


def bound(log_likelihoods: torch.Tensor) -> list[float]:
    """Of log-likelihoods under orders (K,): the bound of log p(x) that the first k of them give, for every k."""
    count = torch.arange(1, len(log_likelihoods) + 1, dtype=torch.float64)
    return (torch.logcumsumexp(log_likelihoods.double(), dim=0) - count.log()).tolist()
