"""Train a small Eso-LM on real text, save it, load it through AutoModel, and sample it: the whole of eso_lm in a file.

python examples/quickstart.py                          # prose that every Python carries, a few minutes on 2 cores
python examples/quickstart.py --text my/folder         # any folder of .txt files
python examples/quickstart.py --max-steps 20000 --hidden-size 512 --num-layers 12   # longer and larger
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from text_data import (
    hold_out_twentieth,
    pack,
    python_documents,
    text_file_documents,
    train_tokenizer,
    vocabulary_of,
    write_texts,
)
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments, set_seed

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoConfig, EsoForMaskedDiffusion

SETTINGS = [  # (alpha_0, num_diffusion_steps): all tokens in a few steps, the mixtures, and left to right
    (1.0, 8),
    (1.0, 32),
    (1.0, None),
    (0.5, 16),
    (0.25, 16),
    (0.0, None),
]


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    documents = text_file_documents(args.text) if args.text else python_documents()
    held_out_documents, train_documents = hold_out_twentieth(documents)
    tokenizer = train_tokenizer(train_documents, args.vocab_size, args.length)
    train_blocks = pack(train_documents, tokenizer, args.length)
    held_out_blocks = pack(held_out_documents, tokenizer, args.length)
    if min(len(train_blocks), len(held_out_blocks)) == 0:
        raise ValueError(
            f"The text is too short for blocks of `--length {args.length}` tokens, held-out ones included."
        )

    config = EsoConfig(
        **vocabulary_of(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=args.length,
        hidden_dropout=args.dropout,
        alpha_0=args.alpha_0,
    )
    model = EsoForMaskedDiffusion(config)
    print(
        f"{len(documents)} documents, {args.length * len(train_blocks):,} tokens to train on, "
        f"{args.length * len(held_out_blocks):,} held out; {model.num_parameters():,} parameters"
    )

    collator = DataCollatorForHybridMaskedDiffusion(tokenizer, config=config)
    training = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, args.max_steps // 10),
        weight_decay=0.01,
        bf16=has_fast_bfloat16(),
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, args.max_steps // 20),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = Trainer(model, training, data_collator=collator, train_dataset=train_blocks)
    # With a seed the noise depends on the batch alone: the two evaluations see the same masks.
    evaluator = Trainer(model, training, data_collator=replace(collator, seed=0), eval_dataset=held_out_blocks)
    before = evaluator.evaluate()["eval_loss"]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = evaluator.evaluate()["eval_loss"]
    print(f"\nTrained {args.max_steps} steps in {seconds:.0f} s.")
    print(f"Held-out NELBO: {before:.3f} nats per token before training, {after:.3f} after.")

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    # For run_evaluation.py and train_draft_head.py.
    write_texts(args.output / "held_out.jsonl", held_out_documents)
    write_texts(args.output / "train.jsonl", train_documents)
    sample(args.output, args.length, args.num_samples, args.temperature)


def sample(path: Path, length: int, num_samples: int, temperature: float) -> None:
    """Loads the model of a folder and prints how it samples at every one of `SETTINGS`."""
    model = AutoModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows, texts = [], []
    for alpha_0, steps in SETTINGS:
        start = time.perf_counter()
        output = model.generate(
            max_new_tokens=length,
            num_return_sequences=num_samples,
            alpha_0=alpha_0,
            num_diffusion_steps=steps,
            temperature=temperature,
            eos_token_id=None,  # the training blocks run over several documents, so the samples may too
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
        nfe = output.num_function_evaluations
        cells = (f"{seconds:.2f}", f"{output.sequences.numel() / seconds:.0f}")
        rows.append((f"{alpha_0:g}", steps or length, nfe, *cells))
        texts.append((alpha_0, nfe, tokenizer.decode(output.sequences[0]).replace(tokenizer.eos_token, "\n")))

    print(f"\nSampling {num_samples} sequences of {length} tokens, temperature {temperature:g}:\n")
    for row in [("alpha_0", "steps", "NFE", "seconds", "tokens/s"), *rows]:
        print("  ".join(f"{cell:>9}" for cell in row))
    for alpha_0, nfe, text in texts:
        print(f"\n--- alpha_0 = {alpha_0:g}, NFE = {nfe} ---\n{text}")


def has_fast_bfloat16() -> bool:
    """Whether mixed precision pays: on CPUs without bfloat16 instructions it is emulated, and slow."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a folder of .txt files to train on instead of Python's own prose")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="where the model is saved")
    parser.add_argument("--max-steps", type=int, default=1400, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks a step")
    parser.add_argument("--length", type=int, default=128, help="tokens a block")
    parser.add_argument("--alpha-0", type=float, default=0.25, help="share of the diffusion phase in training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(parse_args())
