"""Tokenizers and rows of the recipes."""

import sysconfig
from pydoc_data import topics

import pytest
from datasets import Dataset
from text_data import (
    LAYOUTS,
    hold_out_first,
    hold_out_twentieth,
    python_documents,
    tokenize,
    train_tokenizer,
    with_special_tokens,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def test_a_mask_that_means_something_else_is_refused(tmp_path):
    tokenizer = train_tokenizer(["some text to learn from"], 300, 16)
    tokenizer.mask_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="must be a token of its own"):
        with_special_tokens(tokenizer)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert with_special_tokens(plain).mask_token_id == 3
    assert plain.pad_token_id == plain.eos_token_id == 2
    assert len(plain) == 4


def test_beginnings_and_ends_of_other_names():
    """BERT's tokenizer, which the paper's LM1B needs, has [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel({"a": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "[PAD]": 4}, unk_token="a"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=words, **special))
    rows = tokenize(Dataset.from_dict({"text": ["a", "[MASK]"]}), tokenizer, 8, "documents")["input_ids"]
    assert [(row[0], row[-1]) for row in rows] == [(1, 2), (1, 2)]
    assert 3 not in rows[1], "what looks like a mask is text"


def test_a_few_documents_are_held_out():
    few, many = (Dataset.from_dict({"text": ["a"] * count}) for count in (40, 5000))
    assert [len(part) for part in hold_out_first(few, None)] == [2, 38]
    assert [len(part) for part in hold_out_first(many, None)] == [100, 4900]
    assert hold_out_first(few.take(1), None)[0] is None


def test_rows_of_each_layout():
    tokenizer = train_tokenizer(["abc " * 20], 270, 8)
    end = tokenizer.eos_token_id
    documents = ["abcdefghij", "k", "lmnopqrstuvw"]
    stream = [t for d in documents for t in [*tokenizer(d)["input_ids"], end]]
    for streaming in (False, True):
        data = Dataset.from_dict({"text": documents})
        data = data.to_iterable_dataset() if streaming else data
        rows = {layout: [r["input_ids"] for r in tokenize(data, tokenizer, 8, layout)] for layout in LAYOUTS}
        assert rows["packed"] == [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
        assert [row[1:-1] for row in rows["wrapped"]] == [stream[i : i + 6] for i in range(0, len(stream) - 5, 6)]
        assert all(row[0] == row[-1] == end for row in rows["wrapped"] + rows["documents"])
        assert [row[1:-1] for row in rows["documents"]] == [tokenizer(d)["input_ids"][:6] for d in documents]


def test_documents_of_a_small_python(monkeypatch, tmp_path):
    def prose(kind: str) -> str:
        return (
            f"This is the {kind}, in words enough to be taken for a document of its own, as short ones are left out."
        )

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(topics, "topics", {name: prose(f"topic {name}") for name in "badc"})
    for name in ("one.py", "two.py", "test/three.py", "site-packages/four.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'"""{prose(f"docstring of {path.stem}")}"""\n# {prose(f"comment of {path.stem}")}\n"Short."\n'
        )
    (tmp_path / "odd.py").write_text("this is no Python")
    topic_texts = [prose(f"topic {name}") for name in "abcd"]
    of_files = [prose(f"docstring of {name}") for name in ("one", "two")]
    assert python_documents() == topic_texts + of_files
    assert python_documents(every=2) == [*topic_texts[::2], of_files[1]]  # the files: odd, one, two
    everything = python_documents(everything=True)
    assert sorted(set(everything) - set(topic_texts + of_files)) == [
        *(prose(f"comment of {name}") for name in ("one", "three", "two")),
        prose("docstring of three"),
    ]


def test_what_is_held_out_is_not_trained_on():
    """Documents of two paragraphs, of which the first is that of one that is held out."""
    shared = " ".join(f"word{index}" for index in range(13))
    documents = [f"{shared}\nmine {index}" for index in range(41)]
    held_out, others = hold_out_twentieth(documents)
    assert held_out == [documents[0], documents[20], documents[40]]
    assert others == [f"mine {index}" for index in range(41) if index % 20]
