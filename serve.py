"""`transformers serve` for Eso-LMs (an optional dependency: `pip install ".[serving]"`).

python -m eso_lm.serve outputs/quickstart --continuous-batching

The options are those of `transformers serve`, which has no plugin path: it looks the architecture up inside the
transformers module, and what it serves are next tokens. Here the model is known to it, and its application is ours.
"""

from typing import Any

import transformers
import typer
from fastapi import FastAPI
from transformers import ContinuousBatchingConfig
from transformers.cli import serve
from transformers.cli.serving import server
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerationState

from .modeling_eso import EsoForMaskedDiffusion
from .serving_app import Engine, build_app


def build_server(
    model_manager: ModelManager,
    *handlers: Any,
    generation_state: GenerationState,
    enable_cors: bool = False,
    **other_handlers: Any,
) -> FastAPI:
    """In the place of transformers' function of this name: the application for what its command has been told."""
    if model_manager.force_model is None:
        raise typer.BadParameter("name the model to serve, a folder or a name on the Hub", param_hint="MODEL")
    name = model_manager.force_model
    model, processor = model_manager.load_model_and_processor(model_manager.process_model_name(name))
    if not isinstance(model, EsoForMaskedDiffusion):
        raise typer.BadParameter(f"{name} is a {type(model).__name__}, not an Eso-LM", param_hint="MODEL")
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    config = generation_state._cb_config or ContinuousBatchingConfig()
    if not generation_state._continuous_batching:
        config.max_requests_per_batch = 1
    return build_app(
        lambda: Engine(model.init_continuous_batching(continuous_batching_config=config), tokenizer, name), enable_cors
    )


def main() -> None:
    """The command."""
    vars(transformers)[EsoForMaskedDiffusion.__name__] = EsoForMaskedDiffusion  # where it looks the architecture up
    vars(server)["build_server"] = build_server  # which it imports when it starts
    command = typer.Typer(add_completion=False)
    command.command()(serve.Serve)
    command()


if __name__ == "__main__":
    main()
