"""A server of a tiny model, in this process, and how to talk to it."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn
from tiny_models import randomized_model, tiny_tokenizer, vocabulary_of
from transformers import PreTrainedTokenizerBase
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from eso_lm import EsoForMaskedDiffusion
from eso_lm.serving_app import Engine, build_app

CHAT_TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}<assistant>"


class TinyServer:
    """A server on a port of its own.

    Args:
        length: Tokens of its longest text.
        max_requests: That take part in its forwards.
    """

    def __init__(self, length: int = 128, max_requests: int = 6, **limits: int):
        self.tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()
        self.tokenizer.chat_template = CHAT_TEMPLATE
        vocabulary = vocabulary_of(self.tokenizer)
        self.model: EsoForMaskedDiffusion = randomized_model(
            dtype=torch.float64, max_position_embeddings=length, **vocabulary
        )
        config = ContinuousBatchingConfig(max_requests_per_batch=max_requests, **limits)
        self.manager = self.model.init_continuous_batching(continuous_batching_config=config)
        self.app = build_app(lambda: Engine(self.manager, self.tokenizer, "tiny"))
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="warning"))

    @contextmanager
    def running(self) -> Iterator["TinyServer"]:
        """Serves in a thread, until the context ends."""
        thread = threading.Thread(target=self.server.run)
        thread.start()
        try:
            while not self.server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield self
        finally:
            self.server.should_exit = True
            thread.join()

    @property
    def url(self) -> str:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def metrics(self) -> dict[str, int]:
        """What the server says of itself."""
        lines = [line for line in httpx.get(f"{self.url}/metrics").text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("eso_"): int(value) for name, value in (line.split() for line in lines)}

    def wait_until(self, **expected: int) -> None:
        """Until the metrics are as expected."""
        for _ in range(1000):
            metrics = self.metrics()
            if all(metrics[name] == value for name, value in expected.items()):
                return
            time.sleep(0.01)
        raise AssertionError(f"{expected} have not come, but {metrics}")

    def alone(self, prompt: list[int], seed: int, **settings) -> list[int]:
        """The text that `generate` writes with these settings."""
        ids = torch.tensor([prompt])
        generator = [torch.Generator().manual_seed(seed)]
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), generator=generator, **settings)
        return output[0].tolist()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(folder: Path | str, *command: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The URL of a server in a process of its own, and the process.

    Args:
        folder: Of the model.
        command: What starts it, for Python.
    """
    port = free_port()
    arguments = [sys.executable, *command, str(folder), "--continuous-batching", "--port", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


def wait_for(url: str, process: subprocess.Popen | None = None) -> None:
    """Until a server answers."""
    for _ in range(600):
        assert process is None or process.poll() is None, "the server has ended"
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")
