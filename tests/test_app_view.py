"""What the page of examples/app.py makes of a text: spans, colors, counts, bounds."""

import math
import re
from html import unescape

import pytest
import torch
from app_view import (
    bound,
    color_of_probability,
    color_of_share,
    legend,
    shares_decided_before,
    show_counts,
    show_scores,
)
from app_view import show_step as show
from tiny_models import tiny_tokenizer

from eso_lm import EsoGenerationStep

TOKENIZER = tiny_tokenizer(["The quick <b>brown</b> fox & the lazy dog.\nIt sleeps. " * 9])
MASK, PADDING = TOKENIZER.mask_token_id, TOKENIZER.pad_token_id


def step_of(text, decided, log_prob=-0.5, drafts=None, refused=None, number=None):
    """A step whose text is that of these tokens (None: open), decided by these forwards."""
    tokens = torch.tensor([MASK if token is None else token for token in text])
    steps = torch.tensor(decided)
    return EsoGenerationStep(
        number=int(steps.max()) if number is None else number,
        tokens=tokens,
        unmasking_steps=steps,
        log_probs=torch.full((len(text),), log_prob) * (steps > 0),
        drafts=drafts or {},
        refused=refused or {},
    )


def words(text):
    return TOKENIZER(text)["input_ids"]


def spans_of(html):
    """Classes and texts of all tokens."""
    return [(kind, unescape(text)) for kind, text in re.findall(r'<span class="(\w+)"[^>]*>(.*?)</span>', html, re.S)]


def test_tokens_are_shown_as_what_they_are():
    one, two, three, four = (words(word)[0] for word in "abcd")
    step = step_of([one, two, None, None], [0, 1, 0, 0], drafts={2: three}, refused={1: four})
    html = show(step, TOKENIZER)
    assert spans_of(html) == [("given", "a"), ("refused", "d"), ("new", "b"), ("draft", "c"), ("open", "·")]
    assert f"forward 1, probability {math.exp(-0.5):.3f}" in html


def test_text_cannot_be_markup():
    ids = words("<b>&\n")
    html = show(step_of(ids, [1] * len(ids)), TOKENIZER)
    assert "<b>" not in html
    assert "".join(text for _, text in spans_of(html)) == "<b>&⏎\n"


def test_padding_behind_the_end_is_not_shown():
    ids = words("ab")
    html = show(step_of([*ids, PADDING, PADDING], [1] * len(ids) + [0, 0]), TOKENIZER)
    assert len(spans_of(html)) == len(ids)


def test_colors_go_by_the_share_that_was_decided_before():
    ids = words("abcd")
    step = step_of([*ids, None], [1, 1, 2, 3] + [0] * (len(ids) - 3))
    assert shares_decided_before(step, MASK) == {1: 0.0, 2: 0.5, 3: 0.75}
    html = show(step, TOKENIZER)
    for share, count in ((0.0, 2), (0.5, 1), (0.75, 1)):
        assert html.count(f"--forward:{color_of_share(share)};") == count
    assert html.count(f"--probability:{color_of_probability(-0.5)}") == 4
    assert color_of_probability(0) == "hsl(8 85% 100%)"
    assert "background: var(--forward)" in legend("forward")
    assert "background: var(--probability)" in legend("probability")


@pytest.mark.parametrize(("decided", "said"), [([0, 0, 0], ("0", "0", "0.0")), ([1, 2, 2], ("2", "3", "1.5"))])
def test_counts(decided, said):
    text = [None if step == 0 else 5 for step in decided]
    html = show_counts(step_of(text, decided), 1.25, MASK, "writes")
    assert tuple(re.findall(r"<b>(.*?)</b>", html)) == said
    assert "of 3 tokens" in html
    assert "1.25 s <i>writes</i>" in html


def test_scores_add_up_and_say_where_tokens_stand():
    html = show_scores(words("ab"), [-1.0, -2.5], [2, 1], TOKENIZER)
    assert "<b>3.50</b> nats" in html
    assert "number 2 in the order, -1.00 nats" in html


def test_the_bound_is_that_of_the_first_orders():
    values = torch.tensor([-3.0, -2.0, -7.0])
    expected = [math.log(sum(math.exp(v) for v in values[:k].tolist()) / k) for k in (1, 2, 3)]
    assert bound(values) == pytest.approx(expected)
