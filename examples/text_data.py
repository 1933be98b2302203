"""Texts, tokenizers and rows of tokens for the examples."""

import ast
import inspect
import json
import sysconfig
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset, IterableDataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, PADDING, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
MIN_DOCUMENT_LENGTH = 80  # characters
LAYOUTS = ("packed", "wrapped", "documents")
AnyDataset = Dataset | IterableDataset  # read before training, or while


@dataclass(kw_only=True)
class TextArguments:
    """Arguments of a recipe: which texts, and how they become rows."""

    dataset: str = field(metadata={"help": "file, folder, dataset on the Hub, or 'python': text of this machine"})
    dataset_config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = field(default=False, metadata={"help": "read the texts while training"})
    layout: str = field(
        default="packed", metadata={"help": f"how documents become rows: one of {LAYOUTS}; see text_data.tokenize"}
    )
    length: int = field(default=1024, metadata={"help": "tokens of a row: the context"})
    held_out_documents: int | None = field(
        default=None, metadata={"help": "first documents, kept for evaluation; unset: 100, or a twentieth; 0: none"}
    )
    held_out_rows: int = field(default=256, metadata={"help": "rows of them that are evaluated, at most"})


def python_documents(everything: bool = False, every: int = 1) -> list[str]:
    """English prose that every Python carries: its language reference and the docstrings of its standard library.

    With `everything` its comments, too, and the library's own tests: about twice as much text, and less polished. Of
    `every` so many topics and files one is read.
    """
    texts = [topics.topics[name] for name in sorted(topics.topics)[::every]]
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
    skipped = {"site-packages"} if everything else {"site-packages"} | skipped
    paths = [path for path in library.rglob("*.py") if not skipped & set(path.relative_to(library).parts)]
    for path in sorted(paths)[::every]:
        texts.extend(_docstrings(path))
        texts.extend(_comments(path) if everything else [])
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


def load_text_dataset(
    name: str, config: str | None = None, split: str = "train", column: str = "text", streaming: bool = False
) -> AnyDataset:
    """Texts in a column `text`: of a file (.txt, .jsonl, .json, .parquet), a folder of .txt files, or the Hub.

    Args:
        name: The file, the folder, the name of the dataset; or "python", for what every Python carries.
        config, split: Of a dataset on the Hub.
        column: Where its texts are.
        streaming: Whether to read while training, rather than before.

    Raises:
        ValueError: when there is no such column, or no text in it.
    """
    path = Path(name)
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if name == "python" or path.is_dir():
        documents = python_documents() if name == "python" else text_file_documents(path)
        data, column = Dataset.from_dict({"text": documents}), "text"
        data = data.to_iterable_dataset() if streaming else data
    elif path.suffix in kinds and not path.is_file():
        raise ValueError(f"There is no file {name}.")
    elif path.is_file():
        if path.suffix not in kinds:
            raise ValueError(f"A file of texts must end in one of {list(kinds)}, got {name}.")
        options = {"sample_by": "document"} if path.suffix == ".txt" else {}
        data = load_dataset(kinds[path.suffix], data_files=str(path), split="train", streaming=streaming, **options)
    else:
        data = load_dataset(name, config, split=split, streaming=streaming)
    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"{name} must hold texts, found none.")
    if column not in first:
        raise ValueError(f"The texts must be in a column of {name}: {list(first)}, got {column!r}.")
    if not isinstance(first[column], str | None):
        raise ValueError(f"The column {column!r} of {name} must hold texts, found {type(first[column]).__name__}.")
    data = data.select_columns([column])
    data = data if column == "text" else data.rename_column(column, "text")
    return data.filter(lambda row: row["text"] is not None and bool(row["text"].strip()))


def load_texts(name: str, config: str | None = None, split: str = "train", column: str = "text") -> list[str]:
    """The texts of a file, a folder or a dataset, as a list; see `load_text_dataset`.

    Raises:
        ValueError: when there is no such column, or no text in it.
    """
    texts = load_text_dataset(name, config, split, column)["text"][:]
    if not texts:
        raise ValueError(f"The column {column!r} of {name} must hold texts, found none.")
    return texts


def load_lines(name: str, *forms: tuple[str, ...]) -> Dataset:
    """The lines of a JSONL file, which have the fields of one of these forms: the first that it has.

    Raises:
        ValueError: for a file that is not there, empty, or of no such form, and for a line that lacks a field.
    """
    if not Path(name).is_file():
        raise ValueError(f"There is no file {name}.")
    if not Path(name).read_text(encoding="utf-8").strip():
        raise ValueError(f"{name} must hold examples, and is empty.")
    data = load_dataset("json", data_files=name, split="train")
    form = next((fields for fields in forms if set(fields) <= set(data.column_names)), None)
    if form is None:
        wanted = ", or ".join(" and ".join(f"`{field}`" for field in fields) for fields in forms)
        raise ValueError(f"{name} must have the fields {wanted}: {data.column_names}.")
    if any(data.data.column(field).null_count for field in form):
        absent = ([field for field in form if row[field] is None] for row in data)
        index, fields = next((index, fields) for index, fields in enumerate(absent) if fields)
        raise ValueError(f"Example {index} of {name} lacks {fields}.")
    return data


def write_texts(path: Path, texts: list[str]) -> None:
    """Writes texts as a file of JSON lines that `load_texts` reads."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def hold_out_twentieth(documents: list[str]) -> tuple[list[str], list[str]]:
    """Every twentieth document, and all others, without the paragraphs that they share with those."""
    held_out = documents[::20]
    return held_out, without_overlap([document for index, document in enumerate(documents) if index % 20], held_out)


def hold_out_first(texts: AnyDataset, count: int | None) -> tuple[AnyDataset | None, AnyDataset]:
    """The first `count` documents, if any are held out, and the others; None: 100, or a twentieth of a few."""
    if count is None:
        count = min(100, len(texts) // 20) if isinstance(texts, Dataset) else 100
    if count == 0:
        return None, texts
    if isinstance(texts, Dataset) and len(texts) <= count:
        raise ValueError(f"`held_out_documents={count}` must be less than the number of documents, {len(texts)}.")
    return texts.take(count), texts.skip(count)


def load_documents(arguments: TextArguments) -> tuple[AnyDataset | None, AnyDataset]:
    """The documents that are held out, if any are, and the others.

    Of what every Python carries, without the paragraphs that they share. Other texts are taken as they are.
    """
    texts = load_text_dataset(
        arguments.dataset,
        arguments.dataset_config,
        arguments.split,
        arguments.text_column,
        streaming=arguments.streaming,
    )
    held_out, others = hold_out_first(texts, arguments.held_out_documents)
    if arguments.dataset == "python" and held_out is not None and not arguments.streaming:
        others = Dataset.from_dict({"text": without_overlap(others["text"][:], held_out["text"][:])})
    return held_out, others


def make_rows(
    held_out: AnyDataset | None, texts: AnyDataset, tokenizer: PreTrainedTokenizerBase, arguments: TextArguments
) -> tuple[list[dict], AnyDataset]:
    """The rows to evaluate, `held_out_rows` at most, and those to train on.

    Raises:
        ValueError: when there is none to train on.
    """
    rows = tokenize(texts, tokenizer, arguments.length, arguments.layout)
    if next(iter(rows), None) is None:
        raise ValueError(f"The texts are too short for rows of `length={arguments.length}` tokens.")
    if held_out is None or arguments.held_out_rows < 1:
        return [], rows
    return list(tokenize(held_out, tokenizer, arguments.length, arguments.layout).take(arguments.held_out_rows)), rows


def without_overlap(documents: list[str], held_out: list[str], num_words: int = 13) -> list[str]:
    """The documents without the paragraphs that share `num_words` words in a row with held-out ones.

    Documentation repeats itself: without this a model is tested on what it was trained on.
    """

    def runs_of_words(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)}

    taken = set().union(*(runs_of_words(paragraph) for document in held_out for paragraph in document.split("\n")))
    kept = (
        "\n".join(paragraph for paragraph in document.split("\n") if taken.isdisjoint(runs_of_words(paragraph)))
        for document in documents
    )
    return [document for document in kept if document]


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


def with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Adds a mask token, and a padding token, if there is none; the embeddings of the model have to grow to fit.

    Where texts begin and end with tokens of other names, as with BERT's [CLS] and [SEP], they are named so too.

    Raises:
        ValueError: when the mask is a token with another meaning.
    """
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:
        tokenizer.eos_token = tokenizer.sep_token
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.cls_token
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    taken = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, token_id in taken.items():
        if token_id == tokenizer.mask_token_id:
            raise ValueError(f"The tokenizer's mask must be a token of its own, but {token_id} is its `{name}` too.")
    return tokenizer


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The size of the vocabulary and the ids of special tokens, by the names that they have in an EsoConfig."""
    names = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Tokenizes `documents`, joins them with the end-of-text token and cuts them into blocks of `length` tokens."""
    return tokenize(Dataset.from_dict({"text": documents}), tokenizer, length, batch_size=None)


def tokenize(
    data: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    layout: str = "packed",
    batch_size: int | None = 1000,
) -> AnyDataset:
    """Turns texts into rows of at most `length` tokens.

    Args:
        data: With a column `text`.
        tokenizer: With an end-of-text token, which also begins a text if there is no beginning-of-text token.
        length: Tokens of a row.
        layout: "packed": documents joined by the end-of-text token and cut into rows; "wrapped": the same, every row
            between the beginning and the end of a text, as is usual for OpenWebText; "documents": a document a row,
            between both, cut off at the length, as is usual for LM1B.
        batch_size: Documents joined at a time, of which the last tokens, too few for a row, are dropped; None: all.

    Raises:
        ValueError: for an unknown layout, and a tokenizer without an end-of-text token.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {layout!r}.")
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("The tokenizer must have an end-of-text token (`eos_token`), which parts documents.")
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def rows_of(batch: dict[str, list]) -> dict[str, list]:
        # What looks like a special token is text: documents about language models are full of them.
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = tokenizer(batch["text"], **plain)["input_ids"]
        if layout == "documents":
            return {"input_ids": [[begin, *ids[: length - 2], end] for ids in encoded]}
        stream = [token for ids in encoded for token in [*ids, end]]
        size = length - 2 if layout == "wrapped" else length
        pieces = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        return {"input_ids": [[begin, *piece, end] for piece in pieces] if layout == "wrapped" else pieces}

    options = {} if isinstance(data, IterableDataset) else {"desc": "Tokenizing"}
    return data.map(rows_of, batched=True, batch_size=batch_size, remove_columns=["text"], **options)


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []  # a few files of the standard library are deliberately odd; they carry no prose
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)]
    return [docstring for docstring in found if docstring]


def _comments(path: Path) -> list[str]:
    """The blocks of comment lines of a file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError:
        return []
    blocks = groupby(lines, key=lambda line: line.startswith("#"))
    return ["\n".join(line.lstrip("# ") for line in block) for is_comment, block in blocks if is_comment]


def _prose(text: str) -> str:
    """The paragraphs of `text` that read like sentences, one a line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))
    return "\n".join(paragraph for paragraph in paragraphs if _reads_like_sentences(paragraph))


def _reads_like_sentences(paragraph: str) -> bool:
    if ">>>" in paragraph or "::=" in paragraph or not paragraph.endswith((".", ":", "!", "?")):
        return False
    return sum(character.isalpha() or character == " " for character in paragraph) > 0.85 * len(paragraph)
