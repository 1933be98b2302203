"""Text, tokenizer and packed blocks for the examples: nothing here needs a network."""

import ast
import inspect
import re
import sysconfig
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, PADDING, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
MIN_DOCUMENT_LENGTH = 80  # characters
HOLE = re.compile(r"<mask:(\d+)>")


def python_documents() -> list[str]:
    """English prose that every Python carries: its language reference and the docstrings of its standard library."""
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    for path in sorted(library.rglob("*.py")):
        if not skipped & set(path.relative_to(library).parts):
            texts.extend(_docstrings(path))
    documents = (_prose(text) for text in texts)
    return list(dict.fromkeys(document for document in documents if len(document) >= MIN_DOCUMENT_LENGTH))


def text_file_documents(folder: str | Path) -> list[str]:
    """The documents of a folder: one for each .txt file below it.

    Raises:
        ValueError: when `folder` holds no text.
    """
    paths = sorted(Path(folder).rglob("*.txt"))
    documents = [text for text in (path.read_text(encoding="utf-8") for path in paths) if text.strip()]
    if not documents:
        raise ValueError(f"`folder` must hold .txt files with text in them, found {len(paths)} files in {folder}.")
    return documents


def load_texts(name: str, config: str | None = None, split: str = "train", column: str = "text") -> list[str]:
    """The texts of a file (.txt, .jsonl, .json, .parquet), of a folder of .txt files, or of a dataset on the Hub.

    Raises:
        ValueError: when there is no such column, or no text in it.
    """
    path = Path(name)
    if path.is_dir():
        return text_file_documents(path)
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if path.suffix in kinds and not path.is_file():
        raise ValueError(f"There is no file {name}.")
    if path.is_file():
        if path.suffix not in kinds:
            raise ValueError(f"A file of texts must end in one of {list(kinds)}, got {name}.")
        options = {"sample_by": "document"} if path.suffix == ".txt" else {}
        data = load_dataset(kinds[path.suffix], data_files=str(path), split=split, **options)
    else:
        data = load_dataset(name, config, split=split)
    if column not in data.column_names:
        raise ValueError(f"The texts must be in a column of {name}: {data.column_names}, got {column!r}.")
    texts = [text for text in data[column] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The column {column!r} of {name} must hold texts, found {type(texts[0]).__name__}.")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"The column {column!r} of {name} must hold texts, found none.")
    return texts


def train_tokenizer(documents: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with an end-of-text, a padding and a mask token on `documents`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        mask_token=MASK,
        model_max_length=length,
    )


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Tokenizes `documents`, joins them with the end-of-text token and cuts them into blocks of `length` tokens."""

    def join_and_cut(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        stream = [token for ids in encoded for token in [*ids, tokenizer.eos_token_id]]
        starts = range(0, len(stream) - length + 1, length)
        return {"input_ids": [stream[start : start + length] for start in starts]}

    texts = Dataset.from_dict({"text": documents})
    return texts.map(join_and_cut, batched=True, batch_size=None, remove_columns=["text"], desc="Packing")


def fill_in_masks(text: str, mask_token: str | None) -> str:
    """Replaces every `<mask:n>` of `text` by n mask tokens.

    Raises:
        ValueError: when there are holes and the tokenizer has no mask token.
    """
    if mask_token is None and HOLE.search(text):
        raise ValueError(f"The tokenizer has no mask token to fill into the holes of {text!r}.")
    return HOLE.sub(lambda hole: int(hole[1]) * mask_token, text)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []  # a few files of the standard library are deliberately odd; they carry no prose
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)]
    return [docstring for docstring in found if docstring]


def _prose(text: str) -> str:
    """The paragraphs of `text` that read like sentences, one a line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))
    return "\n".join(paragraph for paragraph in paragraphs if _reads_like_sentences(paragraph))


def _reads_like_sentences(paragraph: str) -> bool:
    if ">>>" in paragraph or "::=" in paragraph or not paragraph.endswith((".", ":", "!", "?")):
        return False
    return sum(character.isalpha() or character == " " for character in paragraph) > 0.85 * len(paragraph)
