"""Holes in prompts, as they are typed: `<mask:3>` stands for three masks."""

import re

HOLE = re.compile(r"<mask:([0-9]+)>")


def fill_in_masks(text: str, mask_token: str | None) -> str:
    """Replaces every `<mask:n>` of `text` by n mask tokens.

    Raises:
        ValueError: when there are holes and the tokenizer has no mask token.
    """
    if mask_token is None and HOLE.search(text):
        raise ValueError(f"The tokenizer has no mask token to fill into the holes of {text!r}.")
    return HOLE.sub(lambda hole: int(hole[1]) * mask_token, text)
