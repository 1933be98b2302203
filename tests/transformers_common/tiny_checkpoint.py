"""The checkpoint that transformers' tests of pipelines load, in place of those of hf-internal-testing on the Hub."""

import json
from pathlib import Path

from text_data import vocabulary_of
from tiny_models import randomized_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def write_tiny_checkpoint(folder: Path) -> None:
    """Writes a model with its tokenizer to `folder`/eso/EsoForMaskedDiffusion, and the summary that lists it."""
    tokenizer = make_tokenizer()
    model = randomized_model(scale=0.1, **vocabulary_of(tokenizer))
    checkpoint = folder / "eso" / type(model).__name__
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    summary = {type(model).__name__: {"tokenizer_classes": [type(tokenizer).__name__], "processor_classes": []}}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few merges, with a mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(4 * ["This is a test of the tiny tokenizer. This is another test"], trainer)
    # The positions of an Eso-LM have no end: a long text is no error, which one of the tests takes this number for.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=1_000_000, **special
    )
