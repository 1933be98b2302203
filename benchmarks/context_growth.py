"""How the time of a decoding step grows with the context: it should grow by reading the cache, and by nothing else.

Decodes on top of caches of growing length, a few tokens a step. In the same run: what it takes to read the weights of
the linear layers and what is cached, once; and what sdpa alone takes longer than at the shortest context.

python benchmarks/context_growth.py          # about a minute on 2 cores
"""

import argparse
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from baselines import filled_cache, text_positions
from fresh_models import add_sizes, fresh_eso_lm, weights_of_a_step
from measuring import interleaved, warm_up
from reporting import argument_parser, table, write_results


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    model = fresh_eso_lm(args, args.dtype)
    longest = max(args.contexts) + 2 * args.tokens
    cache = filled_cache(model, 1, longest, longest)
    step_ids = torch.full((1, 2 * args.tokens), model.config.mask_token_id, device=args.device)
    queries = torch.randn_like(cache.layers[0].keys[:, :, : 2 * args.tokens])

    def step(context: int) -> None:
        cache.keep(context)
        positions = text_positions(step_ids, context)
        model(step_ids, position_ids=positions, past_key_values=cache, logits_to_keep=args.tokens)

    def attention(context: int) -> None:
        for layer in cache.layers:
            F.scaled_dot_product_attention(queries, layer.keys[:, :, :context], layer.values[:, :, :context])

    weights = weights_of_a_step(model)

    def read(context: int) -> None:
        for weight in weights:
            weight.sum()
        for layer in cache.layers:
            # As many bytes as are cached, one after the other.
            for states in (layer.keys, layer.values):
                states.view(-1)[: states.numel() * context // longest].sum()

    functions = {
        (name, context): partial(function, context)
        for context in args.contexts
        for name, function in (("step", step), ("attention", attention), ("read", read))
    }
    with model.ready_to_decode():  # as `generate` does
        warm_up(partial(step, min(args.contexts)))
        times = interleaved(functions, args.repeats, args.device)
    medians = {key: median(values) for key, values in times.items()}

    shortest = min(args.contexts)
    rows = [
        {
            "context": context,
            "step_ms": medians["step", context],
            "growth_ms": medians["step", context] - medians["step", shortest],
            "attention_growth_ms": medians["attention", context] - medians["attention", shortest],
            "read_ms": medians["read", context],
            "against_reading": medians["step", context] / medians["read", context],
        }
        for context in args.contexts
    ]
    print(f"{args.tokens} tokens a step, {model.num_parameters():,} parameters, {args.dtype}, {args.device}")
    lines = (f"{row['context']} | " + " | ".join(f"{value:.2f}" for value in list(row.values())[1:]) for row in rows)
    header = "context | step (ms) | growth of the step (ms) | growth of sdpa alone (ms) | reading (ms) | against it"
    print("\n".join(table(header, lines)))
    settings = {name: str(value) for name, value in vars(args).items()} | {"torch": torch.__version__}
    write_results(args.output, "context_growth", {"settings": settings, "results": rows})


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where the JSON goes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=1, help="tokens decoded a step")
    add_sizes(parser)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
