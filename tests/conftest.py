import json
import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, here and in the processes that tests start: for models this small more of them only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from datasets import Dataset
from holes import fill_in_masks
from tiny_models import randomized_model, save_with_tokenizer
from transformers import AutoModel, AutoTokenizer

# transformers' own tests run where its files are at hand: see transformers_common/README.md.
collect_ignore = [] if "TRANSFORMERS_TESTS" in os.environ else ["transformers_common"]


def pytest_sessionfinish() -> None:
    """Ends the workers that a snippet has started: a process of xdist ends without asking Ray to."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=["sdpa", "eager"])
def attention(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def tolerance(dtype) -> float:
    """How far two evaluations of the same logits may lie apart."""
    return 1e-4 if dtype == torch.float32 else 0.1


@pytest.fixture
def model(attention, dtype):
    return randomized_model(attention=attention, dtype=dtype)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Real text, two hundred paragraphs of Python's language reference, as JSONL."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    paragraphs = [text for name in sorted(topics) for text in topics[name].split("\n\n") if len(text) > 100]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in paragraphs[:200]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config")
    (path / "config.json").write_text(
        json.dumps(
            {"model_type": "eso", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "cond_dim": 16}
        )
    )
    return path


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A saved model, with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    save_with_tokenizer(folder, hidden_dropout=0.3)
    return folder


@pytest.fixture
def policy(policy_folder):
    """The model, its tokenizer from the folder, and prompts: with holes, without, of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    prompts = ["The quick", "jumps <mask:3> the dog", "lazy", "<mask:2>fox<mask:1> the quick brown"]
    data = Dataset.from_dict({"prompt": [fill_in_masks(prompt, tokenizer.mask_token) for prompt in prompts]})
    return AutoModel.from_pretrained(policy_folder), tokenizer, data
