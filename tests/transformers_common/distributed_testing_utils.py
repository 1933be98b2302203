"""Starts the processes of transformers' tests of tensor parallelism and FSDP.

A stand-in for `tests/distributed_testing_utils.py` of transformers' repository, for versions whose tests import it
and whose sources at hand do not have it: `assemble.py` puts it beside them.
"""

import functools
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers.testing_utils import torch_device

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def _get_distributed_device_type() -> str:
    return torch.device(torch_device).type


def _get_distributed_backend() -> str:
    return BACKENDS[_get_distributed_device_type()]


def _get_rank_device(rank: int) -> torch.device:
    device_type = _get_distributed_device_type()
    return torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)


def _set_rank_device(rank: int) -> None:
    if _get_distributed_device_type() == "cuda":
        torch.cuda.set_device(rank)


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """Calls `function(rank, *args)` in `nprocs` new processes and waits for them; an error of one is raised here."""
    mp.spawn(function, args=args, nprocs=nprocs)


def run_distributed(world_size: int) -> Callable:
    """Decorates `function(rank, ...)`: it then runs, without the rank, in `world_size` processes of one group."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args, **kwargs) -> None:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_run_rank, (function, world_size, port, args, kwargs), nprocs=world_size)

        return run

    return decorate


def _run_rank(rank: int, function: Callable, world_size: int, port: int, args: tuple, kwargs: dict) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    _set_rank_device(rank)
    dist.init_process_group(_get_distributed_backend(), rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
    finally:
        dist.destroy_process_group()
