"""Serving: tokens a second and latency with several requests at a time, of ragged prompts and lengths.

python benchmarks/serving.py          # a quarter of an hour on 2 cores

An Eso-LM with alpha_0 = 1, at one and at four tokens a forward, with fresh weights of the paper's small size:
continuous batching against static batches of `generate` (whose texts are all as long as the longest; or, as holes to
fill in, as long as they are meant to be), and transformers' continuous batching of a Llama of the same size. As many
clients as there are requests at a time, each of which sends its next request when it has its answer.

And where keys and values are kept: the time of a decoding step of ragged texts, in one piece each, as continuous
batching keeps them; in pages; and in rows of the same length, as `generate` does.
"""

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from fresh_models import add_sizes, fresh_eso_lm, similar_llama
from measuring import hardware, interleaved, summary
from reporting import argument_parser, table, write_results
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from eso_lm import EsoForMaskedDiffusion
from eso_lm.batching_forward import SharedForward
from eso_lm.batching_memory import Lease, Stretch, prompt_key
from eso_lm.generation_cache import PreallocatedCache
from eso_lm.generation_decoding import Decoder, Feed

Request = tuple[list[int], int]
"""A prompt, and how many tokens are to follow it."""


def ragged_requests(count: int, shortest: int, longest: int, vocab_size: int) -> list[Request]:
    """Prompts and lengths, each between two numbers of tokens; the first ones are the same for any count."""
    rng = random.Random(0)
    requests = []
    for _ in range(count):
        prompt = [rng.randrange(vocab_size - 1) for _ in range(rng.randint(shortest, longest))]
        requests.append((prompt, rng.randint(shortest, longest)))
    return requests


def settings(new_tokens: int, tokens_a_forward: int) -> dict:
    """Those of `generate` for so many tokens a forward on average."""
    steps = "max" if tokens_a_forward == 1 else max(1, round(new_tokens / tokens_a_forward))
    return {"alpha_0": 1.0, "num_diffusion_steps": steps}


def serve(
    model: PreTrainedModel, requests: list[Request], at_a_time: int, ask: Callable, **setup: object
) -> list[float]:
    """Seconds from the first request to the last answer, and then those of each request, in a closed loop."""
    manager = model.init_continuous_batching(**setup)
    manager.start()
    waiting, began, latencies = list(enumerate(requests)), {}, []

    def send() -> None:
        number, (prompt, new_tokens) = waiting.pop(0)
        began[str(number)] = time.perf_counter()
        ask(manager, prompt, str(number), new_tokens)

    start = time.perf_counter()
    for _ in range(min(at_a_time, len(requests))):
        send()
    while len(latencies) < len(requests):
        result = manager.get_result()
        if result.error is not None:
            raise RuntimeError(result.error)
        if result.is_finished():
            latencies.append(time.perf_counter() - began[result.request_id])
            if waiting:
                send()
    seconds = time.perf_counter() - start
    manager.stop()
    return [seconds, *latencies]


def serve_eso(
    model: EsoForMaskedDiffusion, requests: list[Request], at_a_time: int, tokens_a_forward: int
) -> list[float]:
    """Continuous batching of an Eso-LM."""

    def ask(manager, prompt, name, new_tokens) -> None:
        own = settings(new_tokens, tokens_a_forward)
        manager.add_request(prompt, name, max_new_tokens=new_tokens, seed=int(name), **own)

    config = ContinuousBatchingConfig(max_requests_per_batch=at_a_time)
    return serve(model, requests, at_a_time, ask, continuous_batching_config=config)


def serve_llama(model: PreTrainedModel, requests: list[Request], at_a_time: int) -> list[float]:
    """transformers' continuous batching of a Llama."""

    def ask(manager, prompt, name, new_tokens) -> None:
        manager.add_request(prompt, name, max_new_tokens=new_tokens)

    needed = max(len(prompt) + new_tokens for prompt, new_tokens in requests)
    config = ContinuousBatchingConfig(num_blocks=2 * at_a_time * (needed // 256 + 1), max_requests_per_batch=at_a_time)
    own = GenerationConfig(do_sample=True, eos_token_id=-1)
    return serve(model, requests, at_a_time, ask, generation_config=own, continuous_batching_config=config)


def static_batches(
    model: EsoForMaskedDiffusion, requests: list[Request], at_a_time: int, tokens_a_forward: int, as_holes: bool
) -> list[float]:
    """`generate` on one batch after the other."""
    start, latencies = time.perf_counter(), []
    for first in range(0, len(requests), at_a_time):
        batch = requests[first : first + at_a_time]
        began = time.perf_counter()
        longest = max(new_tokens for _, new_tokens in batch)
        rows = [prompt + [model.config.mask_token_id] * new_tokens * as_holes for prompt, new_tokens in batch]
        width = max(map(len, rows))
        model.generate(
            torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            max_new_tokens=0 if as_holes else longest,
            pad_token_id=0,
            **settings(longest, tokens_a_forward),
        )
        latencies += [time.perf_counter() - began] * len(batch)
    return [time.perf_counter() - start, *latencies]


def measure_serving(args: argparse.Namespace) -> list[dict]:
    """Every system, with so many requests at a time."""
    model = fresh_eso_lm(args)
    llama = similar_llama(model, max_length=2 * args.longest)
    rows = []
    with model.ready_to_decode():
        static_batches(model, ragged_requests(1, 80, 80, args.vocab_size), 1, 1, as_holes=False)  # packs the weights
        for at_a_time in args.at_a_time:
            count = max(args.least_requests, args.turns * at_a_time)
            requests = ragged_requests(count, args.shortest, args.longest, args.vocab_size)
            systems = {("Llama, continuous", 1): partial(serve_llama, llama, requests, at_a_time)}
            for tokens in (1, 4):
                own = (model, requests, at_a_time, tokens)
                systems |= {
                    ("continuous", tokens): partial(serve_eso, *own),
                    ("static", tokens): partial(static_batches, *own, as_holes=False),
                    ("static, own lengths", tokens): partial(static_batches, *own, as_holes=True),
                }
            for (system, tokens), run in systems.items():
                seconds, *latencies = run()
                latencies.sort()
                row = {
                    "at_a_time": at_a_time,
                    "system": system,
                    "tokens_a_forward": tokens,
                    "requests": count,
                    "tokens_a_second": sum(new_tokens for _, new_tokens in requests) / seconds,
                    "p50": median(latencies),
                    "p95": latencies[round(0.95 * (len(latencies) - 1))],
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def lease_in_pages(lengths: list[int], page: int | None) -> list[Lease]:
    """Slots of texts: of each in one piece, or in pages that are dealt out in turn."""
    nothing = prompt_key(torch.empty(0), torch.empty(0))
    pieces: list[list] = [[] for _ in lengths]
    start = 0
    while any(sum(count for _, count in own) < length for own, length in zip(pieces, lengths, strict=True)):
        for own, length in zip(pieces, lengths, strict=True):
            left = length - sum(count for _, count in own)
            if left > 0:
                size = left if page is None else page
                own.append((Stretch(start, size), min(left, size)))
                start += size
    return [Lease(own, 0, nothing) for own in pieces]


@torch.no_grad()
def measure_layouts(args: argparse.Namespace) -> list[dict]:
    """Milliseconds of a step of one token of each of some ragged texts, by where their keys and values are."""
    model = fresh_eso_lm(args)
    rng = random.Random(1)
    lengths = [rng.randint(args.shortest, 2 * args.longest) for _ in range(max(args.at_a_time))]

    def feed_of(cached: list[int]) -> Feed:
        ids = torch.zeros(len(cached), 2, dtype=torch.long)
        ids[:, 1] = model.config.mask_token_id
        positions = torch.tensor(cached)[:, None] + torch.arange(2)
        return Feed(list(cached), ids, positions, [2] * len(cached), [range(1, 2)] * len(cached))

    cached = [length - 2 for length in lengths]
    steps, slots = {}, {}
    for name, page in {"one piece": None, "pages of 256": 256, "pages of 16": 16}.items():
        leases = lease_in_pages(lengths, page)
        slots[name] = sum(stretch.length for lease in leases for stretch, _ in lease.pieces)
        forward = SharedForward(model, slots[name])
        steps[name] = partial(forward, [feed_of([length]) for length in cached], leases)
    cache = PreallocatedCache(args.num_layers, max(lengths))
    rows = Decoder(model, cache)
    rows(feed_of([0] * len(lengths)))  # the memory is there from now on
    steps["rows"] = partial(rows, feed_of(cached))
    slots["rows"] = len(lengths) * max(lengths)
    with model.ready_to_decode():
        for _ in range(args.warm_up):
            steps["rows"]()
        times = interleaved(steps, args.repeats, args.device)
    return [{"layout": name, "slots": slots[name], **summary(times[name])} for name in steps]


def report_of(results: dict) -> str:
    """The tables. Each system stands beside continuous batching at as many tokens a forward; a Llama beside both."""
    rows = {(row["at_a_time"], row["system"], row["tokens_a_forward"]): row for row in results["serving"]}
    lines = []
    for (at_a_time, system, tokens), row in rows.items():
        beside = (1, 4) if system == "Llama, continuous" else (tokens,)
        ratios = [rows[at_a_time, "continuous", n]["tokens_a_second"] / row["tokens_a_second"] for n in beside]
        numbers = [f"{row['tokens_a_second']:.0f}", f"{row['p50']:.2f}", f"{row['p95']:.2f}"]
        numbers.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append(" | ".join([str(at_a_time), system, str(tokens), *numbers]))
    header = "at a time | system | tokens a forward | tokens a second | p50 (s) | p95 (s) | continuous against it"
    layouts = [
        f"{row['layout']} | {row['slots']} | {row['median']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
        for row in results["layouts"]
    ]
    setup = f"{results['settings']['hardware']}; torch {torch.__version__}. `benchmarks/serving.py`"
    return "\n".join([setup, "", *table(header, lines), "", *table("layout | slots | a step (ms)", layouts)]) + "\n"


def main(args: argparse.Namespace) -> None:
    results = {"layouts": measure_layouts(args), "serving": measure_serving(args)}
    results["settings"] = {name: value for name, value in vars(args).items() if name != "output"}
    results["settings"] |= {"hardware": hardware(args.device), "torch": torch.__version__}
    write_results(args.output, "serving", results, report_of(results))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON and Markdown go")
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 4, 16], help="requests at a time")
    parser.add_argument("--turns", type=int, default=4, help="requests of each client")
    parser.add_argument("--least-requests", type=int, default=12, help="requests, where there are few clients")
    parser.add_argument("--shortest", type=int, default=16, help="tokens of a prompt, and of what follows it")
    parser.add_argument("--longest", type=int, default=256, help="the same")
    parser.add_argument("--repeats", type=int, default=25, help="steps of each layout")
    parser.add_argument("--warm-up", type=int, default=40, help="steps before they are measured")
    parser.add_argument("--device", default="cpu")
    add_sizes(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
