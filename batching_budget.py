"""What continuous batching may take of a machine: memory, requests at a time, and threads."""

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from .batching_forward import bytes_of_slot
from .generation_pace import MAX_MASKS
from .modeling_interface import EsoLM
from .validation import is_number, require_positive_integer

DEFAULT_MAX_REQUESTS = 32
"""Requests that take part in a forward, unless told otherwise."""

DEFAULT_MAX_PROMPT_SLOTS = 512
"""Slots of prompts that join a forward, unless told otherwise: more would keep the others waiting."""

DEFAULT_LENGTH = 1024
"""Tokens that a text is taken to have at the most, where the model does not say."""

DEFAULT_MEMORY_SHARE = {"cpu": 0.6, "mps": 0.6}
"""Of the free memory of an accelerator, or all memory of the host, what the cache may take; 0.9 elsewhere."""

OMP_PAUSE_SOFT = 1
"""OpenMP's name for letting go of threads, and of nothing else."""


@dataclass(frozen=True)
class Budget:
    """What a manager may take.

    Args:
        num_slots: Of its cache.
        max_requests: That take part in a forward.
        max_prompt_slots: Slots of prompts that join a forward.
    """

    num_slots: int
    max_requests: int
    max_prompt_slots: int

    @staticmethod
    def of(model: EsoLM, config: ContinuousBatchingConfig, hints: WorkloadHints | None) -> "Budget":
        """As a configuration says; where it does not, as the requests need, as far as there is memory.

        Raises:
            ValueError: for numbers out of range, and where there is not enough memory for a slot.
        """
        for name in ("max_requests_per_batch", "max_batch_tokens", "num_blocks"):
            require_positive_integer(name, getattr(config, name), or_none=True)
        share = config.max_memory_percent
        if share is not None and not (is_number(share) and 0 < share <= 1):
            raise ValueError(f"`max_memory_percent` must be None or a number in (0, 1], got {share!r}.")
        max_requests = config.max_requests_per_batch or DEFAULT_MAX_REQUESTS
        return Budget(
            num_slots=_num_slots(model, config, max_requests, hints),
            max_requests=max_requests,
            max_prompt_slots=config.max_batch_tokens or DEFAULT_MAX_PROMPT_SLOTS,
        )


def _num_slots(model: EsoLM, config: ContinuousBatchingConfig, max_requests: int, hints: WorkloadHints | None) -> int:
    if config.num_blocks is not None:
        # Before transformers 5.18 a page was called a block.
        page_size: Any = getattr(config, "page_size", None) or config.block_size
        return int(config.num_blocks * page_size)
    longest = length_of_model(model)
    if hints is not None and hints.num_requests > 0:
        longest = hints.max_prompt_length + hints.max_generated_length
        max_requests = min(hints.num_requests, max_requests)
    wanted = max_requests * (longest + MAX_MASKS)
    if model.device.type == "cuda":
        available = torch.cuda.mem_get_info(model.device)[0]
    elif hasattr(os, "sysconf"):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return wanted
    share = config.max_memory_percent or DEFAULT_MEMORY_SHARE.get(model.device.type, 0.9)
    affordable = int(share * available / bytes_of_slot(model))
    if affordable < 1:
        raise ValueError(
            f"`max_memory_percent={share}` of {available} bytes is not enough for a slot of the cache: ask for more."
        )
    return min(wanted, affordable)


def length_of_model(model: EsoLM) -> int:
    """Tokens that its texts have at the most."""
    return int(getattr(model.model.config, "max_position_embeddings", DEFAULT_LENGTH))


def let_worker_threads_go() -> None:
    """Ends the worker threads of torch's operators that wait for the calling thread, until it needs some again.

    Each thread that runs operators has workers of its own. Where there are more of them than cores, GNU's OpenMP has
    them all fall asleep after every operator, and to wake them takes longer than a small operator: a decoding step
    of one text takes a third more.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError, AttributeError):  # other systems, and other kinds of OpenMP
        ctypes.CDLL(str(library)).omp_pause_resource_all(OMP_PAUSE_SOFT)
