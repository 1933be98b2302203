"""How the time of a decoding step grows with the context: it should grow by reading the cache, and by nothing else.

Decodes on top of caches of growing length, a few tokens a step, and fits time = overhead + slope x cached tokens. The
slope is compared with the time that attention alone takes for the additional tokens, in the same run.

python benchmarks/context_growth.py          # about a minute on 2 cores
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from eso_lm import EsoConfig, EsoForMaskedDiffusion
from eso_lm.generation_cache import PreallocatedCache


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden_size, "num_hidden_layers": args.num_layers}
    config = EsoConfig(vocab_size=args.vocab_size, num_attention_heads=args.num_heads, **sizes)
    model = EsoForMaskedDiffusion(config).eval().to(args.device, getattr(torch, args.dtype))
    longest = max(args.contexts) + 2 * args.tokens
    cache = PreallocatedCache(config.num_hidden_layers, longest)
    step_ids = torch.full((1, 2 * args.tokens), config.mask_token_id, device=args.device)
    states = torch.randn(
        1,
        config.num_attention_heads,
        longest,
        config.hidden_size // config.num_attention_heads,
        device=args.device,
        dtype=model.dtype,
    )
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
        layer.keys.normal_()
        layer.values.normal_()

    def step(context: int) -> None:
        cache.keep(context)
        positions = torch.arange(context, context + 2 * args.tokens, device=args.device)[None]
        model(step_ids, position_ids=positions, past_key_values=cache, logits_to_keep=args.tokens)

    def attention(context: int) -> None:
        for layer in cache.layers:
            query = states[:, :, : 2 * args.tokens]
            F.scaled_dot_product_attention(query, layer.keys[:, :, :context], layer.values[:, :, :context])

    times = {(name, context): [] for name in ("step", "attention") for context in args.contexts}
    with model.ready_to_decode():  # as `generate` does
        for repeat in range(args.repeats + 1):
            for context in args.contexts:
                for name, function in (("step", step), ("attention", attention)):
                    start = time.perf_counter()
                    function(context)
                    if args.device != "cpu":
                        torch.cuda.synchronize()
                    if repeat > 0:
                        times[name, context].append(1e3 * (time.perf_counter() - start))
    medians = {key: median(values) for key, values in times.items()}

    shortest = min(args.contexts)
    rows = [
        {
            "context": context,
            "step_ms": medians["step", context],
            "growth_ms": medians["step", context] - medians["step", shortest],
            "attention_growth_ms": medians["attention", context] - medians["attention", shortest],
        }
        for context in args.contexts
    ]
    print(f"{args.tokens} tokens a step, {model.num_parameters():,} parameters, {args.dtype}, {args.device}")
    print("| context | step (ms) | growth of the step (ms) | growth of attention alone (ms) |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['context']} | " + " | ".join(f"{value:.2f}" for value in list(row.values())[1:]) + " |")
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items()} | {"torch": torch.__version__}
    record = {"settings": settings, "results": rows}
    (args.output / "context_growth.json").write_text(json.dumps(record, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the JSON goes")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=1, help="tokens decoded a step")
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=50258)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
