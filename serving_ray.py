"""Eso-LMs on Ray (an optional dependency: `pip install ".[ray]"`), where one machine is not enough.

serve run eso_lm.serving_ray:build model=outputs/quickstart min_replicas=2 max_replicas=8

Every replica is the server of `eso_lm.serve`, around a manager of its own; Ray starts and stops replicas, sends
requests to those that have the least to do, and replaces those that die. `EsoPredictor` writes whole datasets with Ray
Data.
"""

from functools import partial
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

from .batching_budget import DEFAULT_MAX_REQUESTS
from .configuration_eso import EsoConfig
from .modeling_eso import EsoForMaskedDiffusion
from .serving_app import GRACE_SECONDS, Engine, build_app
from .serving_protocol import decode


class Deployment(BaseModel):
    """What `serve run` and a file for `serve deploy` may say.

    Args:
        model: Name or folder of the model, readable on every machine.
        name: By which clients ask for it. None: `model`.
        dtype, device, attn_implementation: How it is loaded.
        min_replicas, max_replicas: Between which Ray chooses by how many requests there are.
        max_requests: That take part in the forwards of a replica.
        num_blocks: Of its cache, 256 slots each. None: as many as `max_requests` texts need, or memory has room for.
        num_cpus, num_gpus: Of a replica.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    name: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    attn_implementation: str = "sdpa"
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    max_requests: int = Field(DEFAULT_MAX_REQUESTS, ge=1)
    num_blocks: int | None = Field(None, ge=1)
    num_cpus: float = Field(1, ge=0)
    num_gpus: float = Field(0, ge=0)


def build(arguments: Deployment) -> serve.Application:
    """The application, for `serve run` and `serve deploy`; its arguments are those of [`Deployment`]."""

    class EsoReplica:
        """A replica of the server."""

        app: FastAPI  # what Ray makes of this class has it

        def check_health(self) -> None:
            """Has Ray replace a replica whose forwards have failed."""
            if not self.app.state.engine.is_alive:
                raise RuntimeError("The forwards of continuous batching have failed.")

    def application() -> Any:
        return build_app(partial(make_engine, arguments))

    deployment: Any = serve.deployment(
        serve.ingress(application)(EsoReplica),
        name="eso",
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        # What cannot take part at once waits in the replica, in order, rather than in the proxies.
        max_ongoing_requests=4 * arguments.max_requests,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": max(arguments.max_replicas, arguments.min_replicas),
            "target_ongoing_requests": arguments.max_requests,
        },
        graceful_shutdown_timeout_s=GRACE_SECONDS,
    )
    return deployment.bind()


def load(model: str, dtype: str = "auto", device: str = "cpu", attn_implementation: str = "sdpa") -> Any:
    """A model, ready to be asked, and its tokenizer."""
    AutoModelForCausalLM.register(EsoConfig, EsoForMaskedDiffusion, exist_ok=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attn_implementation)
    return loaded.to(device).eval(), AutoTokenizer.from_pretrained(model)


def make_engine(arguments: Deployment) -> Engine:
    """What answers in a replica."""
    settings = arguments.model_dump(include={"model", "dtype", "device", "attn_implementation"})
    model, tokenizer = load(**settings)
    config = ContinuousBatchingConfig(
        num_blocks=arguments.num_blocks,
        max_requests_per_batch=arguments.max_requests,
    )
    manager = model.init_continuous_batching(continuous_batching_config=config)
    return Engine(manager, tokenizer, arguments.name or arguments.model)


class EsoPredictor:
    """Writes the texts of a dataset: `dataset.map_batches(EsoPredictor, fn_constructor_kwargs={"model": ...})`.

    Rows have a column `prompt`, and may have a column `seed`; a column `text` joins them, what was written. A row with
    a seed does not depend on its batch, nor on the machine that it comes to (but for the rounding of floating-point
    numbers).

    Args:
        model, dtype, device, attn_implementation: As for [`Deployment`].
        settings: Those of `generate`.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        device: str = "cpu",
        attn_implementation: str = "sdpa",
        **settings: Any,
    ):
        self.model, self.tokenizer = load(model, dtype, device, attn_implementation)
        self.settings = settings
        self.manager = self.model.init_continuous_batching()
        self.manager.start()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Writes the texts of a batch of rows."""
        prompts = [self.tokenizer(str(prompt))["input_ids"] for prompt in batch["prompt"]]
        seeds = [int(seed) for seed in batch["seed"]] if "seed" in batch else [None] * len(prompts)
        names = [
            self.manager.add_request(prompt, seed=seed, **self.settings)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        outputs = list(self.manager.wait_for(names))
        failed = [output.error for output in outputs if output.error is not None]
        if failed:
            raise RuntimeError(f"A row could not be written: {failed[0]}")
        return batch | {"text": [decode(self.tokenizer, output.generated_tokens) for output in outputs]}
