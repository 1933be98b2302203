"""An n-gram model with interpolated Kneser-Ney smoothing: what any language model has to beat."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence


class KneserNey:
    """Interpolated Kneser-Ney with one absolute discount, over token ids.

    Args:
        texts: To count in; contexts do not cross their borders.
        order: Tokens of an n-gram.
        vocab_size: Ids that may occur; the unigrams are mixed with the uniform distribution over them.
        discount: Taken from every count.
    """

    def __init__(self, texts: Sequence[Sequence[int]], order: int, vocab_size: int, discount: float = 0.75):
        if order < 1 or not 0 < discount < 1:
            raise ValueError(f"`order` must be positive and `discount` in (0, 1), got {order} and {discount}.")
        self.order, self.vocab_size, self.discount = order, vocab_size, discount
        counts: list[Counter] = [Counter() for _ in range(order + 1)]
        for text in texts:
            text = tuple(text)
            for length in range(1, order + 1):
                counts[length].update(text[end - length : end] for end in range(length, len(text) + 1))
        # Below the highest order an n-gram counts once for each different token before it.
        for length in range(1, order):
            before = Counter(gram[1:] for gram in counts[length + 1])
            # The beginnings of texts have none before them, and keep their counts.
            counts[length] = Counter({gram: before.get(gram) or counts[length][gram] for gram in counts[length]})
        self.counts = counts
        self.totals: defaultdict = defaultdict(int)
        self.followers: defaultdict = defaultdict(int)
        for length in range(1, order + 1):
            for gram, count in counts[length].items():
                self.totals[gram[:-1]] += count
                self.followers[gram[:-1]] += 1

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        """p(token | context), of which the last `order` - 1 tokens count."""
        context = context[len(context) - min(len(context), self.order - 1) :]
        probability = 1 / self.vocab_size
        for length in range(len(context) + 1):
            history = context[len(context) - length :]
            total = self.totals.get(history, 0)
            if total == 0:
                break
            count = self.counts[length + 1].get((*history, token), 0)
            backed_off = self.discount * self.followers[history] / total
            probability = max(count - self.discount, 0) / total + backed_off * probability
        return probability

    def loss(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Nats per token of each text."""
        losses = []
        for text in texts:
            text = tuple(text)
            logs = [math.log(self.probability(token, text[:place])) for place, token in enumerate(text)]
            losses.append(-sum(logs) / len(text))
        return losses
