"""What must hold on a device that it was not written on: checks that need nothing but torch and transformers.

`gpu.py` runs them all before it measures anything. Each returns numbers worth keeping; one that cannot be run here
says why. With `--tensor-parallel FOLDER`, this file is what each of two processes runs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkout
import torch
import torch.distributed as dist
from convert_original_checkpoint import convert
from safetensors.torch import load_file
from transformers import AutoModel, CompileConfig
from transformers.utils import is_flash_attn_2_available

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoConfig, EsoForMaskedDiffusion


class NotHereError(Exception):
    """A check that this machine has not got what it takes for."""


@dataclass
class Machine:
    """Where checks run.

    Args:
        device: "cuda", "cpu", ...
        backend: Of `torch.compile`; None: its own.
    """

    device: str
    backend: str | None = None

    @property
    def is_gpu(self) -> bool:
        return self.device != "cpu"

    def compiled_steps(self) -> dict:
        """Settings of `generate` whose steps are compiled, and on CUDA replayed as graphs."""
        options = {} if self.backend is None else {"backend": self.backend, "mode": None}
        config = CompileConfig(fullgraph=True, **options)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": config}


def random_model(
    machine: Machine, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> EsoForMaskedDiffusion:
    """A small model with random weights everywhere: a fresh one has a zero head and zero gates."""
    config = EsoConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 64, as flash attention and FlexAttention want them
        cond_dim=16,
        hidden_dropout=0.0,
        alpha_0=0.5,
    )
    model, generator = EsoForMaskedDiffusion(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name:
                parameter.add_(1)
    model.set_attn_implementation(attention)
    return model.to(machine.device, dtype).eval()


def training_batch(model: EsoForMaskedDiffusion, length: int = 64) -> dict[str, torch.Tensor]:
    """A batch of both phases."""
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=model.config.mask_token_id, alpha_0=0.5, seed=0)
    text = torch.randint(0, 63, (8, length), generator=torch.Generator().manual_seed(1))
    return {name: value.to(model.device) for name, value in collator([{"input_ids": row} for row in text]).items()}


def loss_and_gradients(model: EsoForMaskedDiffusion, call: Callable | None = None) -> tuple[float, torch.Tensor]:
    """Of a training batch: the loss in nats, and all gradients in a row, in float32."""
    model.zero_grad()
    loss = (model if call is None else call)(**training_batch(model)).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients]).cpu()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def require(name: str, value: float, bound: float) -> dict[str, float]:
    """A number that must not be larger than a bound; NaN is."""
    if not value <= bound:
        raise AssertionError(f"{name} is {value:.3g}, and must be at most {bound:.3g}")
    return {name: value}


@torch.no_grad()
def check_reference(machine: Machine) -> dict[str, float]:
    """The authors' own tensors: float32 within 1e-4, and bfloat16 as close as its digits allow."""
    folder, numbers = checkout.ROOT / "tests" / "reference", {}
    expected = {name: value.to(machine.device) for name, value in load_file(folder / "expected.safetensors").items()}
    batch = {name: expected[f"diffusion.{name}"] for name in ("input_ids", "position_ids")}
    wanted = expected["diffusion.logits"][..., :-1]
    with tempfile.TemporaryDirectory() as temporary:
        convert(folder / "original_hub", Path(temporary) / "model", alpha_0=0.5)
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.02)):
            model = AutoModel.from_pretrained(Path(temporary) / "model", dtype=dtype).to(machine.device)
            logits = model(**batch).logits[..., :-1].float()
            name = str(dtype).removeprefix("torch.")
            if dtype == torch.float32:
                numbers |= require(f"logits_{name}_largest_error", (logits - wanted).abs().max().item(), bound)
            numbers |= require(f"logits_{name}_relative_error", relative_error(logits, wanted), bound)
            scores = model.log_likelihood(expected["x0"], orders=expected["likelihood.orders"])
            error = scores.log_likelihood_per_order.float() - expected["likelihood.log_p_given_order"]
            numbers |= require(f"likelihood_{name}_error_nats_per_token", error.abs().max().item() / 24, bound)
    return numbers


def check_attention(machine: Machine, attention: str) -> dict[str, float]:
    """An attention against eager attention in float32: the loss of a batch of both phases, and all gradients."""
    if attention == "flash_attention_2" and not (machine.is_gpu and is_flash_attn_2_available()):
        raise NotHereError("flash-attn 2 is not installed, or there is no GPU")
    if attention == "flex_attention" and not machine.is_gpu:
        raise NotHereError("FlexAttention has no backward on the CPU")
    expected_loss, expected = loss_and_gradients(random_model(machine, attention="eager"))
    numbers = {}
    dtypes = [torch.bfloat16] if attention == "flash_attention_2" else [torch.float32, torch.bfloat16]
    for dtype in dtypes:
        loss, gradients = loss_and_gradients(random_model(machine, dtype, attention))
        name, bound = str(dtype).removeprefix("torch."), 0.05 if dtype == torch.bfloat16 else 1e-3
        numbers |= require(f"loss_{name}_error", abs(loss - expected_loss), bound)
        numbers |= require(f"gradients_{name}_relative_error", relative_error(gradients, expected), bound)
    return numbers


@torch.no_grad()
def check_cache(machine: Machine) -> dict[str, float]:
    """One token a step: what was drawn from adds up to the exact likelihood, which takes one pass without a cache."""
    model = random_model(machine)
    torch.manual_seed(0)
    settings = {"num_return_sequences": 4, "return_dict_in_generate": True, "eos_token_id": None}
    output = model.generate(max_new_tokens=40, num_diffusion_steps=40, unmasking_order="strided", **settings)
    scores = model.log_likelihood(output.sequences, orders=output.orders[:, None])
    error = (output.log_probs.sum(dim=-1) - scores.log_likelihood).abs().max().item()
    return require("log_likelihood_error_nats", error, 1e-2)


@torch.no_grad()
def check_static_steps(machine: Machine, attention: str) -> dict[str, float]:
    """Compiled steps of static shape, replayed as CUDA graphs, draw the same tokens; prompts are of two lengths."""
    if attention == "flex_attention" and not machine.is_gpu:
        raise NotHereError("FlexAttention's kernel for the CPU is compiled for a while")
    model = random_model(machine, attention=attention)
    prompts = torch.randint(0, 63, (3, 9), generator=torch.Generator().manual_seed(2)).to(machine.device)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :4] = 0
    torch._dynamo.reset()
    outputs = []
    for settings in ({}, machine.compiled_steps(), machine.compiled_steps()):
        outputs.append(
            model.generate(
                prompts,
                attention_mask=attention_mask,
                generator=[torch.Generator().manual_seed(row) for row in range(3)],
                max_new_tokens=40,
                num_diffusion_steps=10,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
                **settings,
            )
        )
    numbers = {}
    for name, output in zip(("first", "second"), outputs[1:], strict=True):
        is_finite = outputs[0].logits.isfinite()
        error = (output.logits[is_finite] - outputs[0].logits[is_finite]).abs().max().item()
        numbers |= require(f"logits_{name}_largest_error", error, 1e-3)
        numbers |= require(f"tokens_{name}_that_differ", (output.sequences != outputs[0].sequences).sum().item(), 0)
    return numbers


def check_lossless(machine: Machine) -> dict[str, float]:
    """Lossless decoding reports the exact log-probabilities of what it drew, at fewer forwards than tokens."""
    model = random_model(machine)
    torch.manual_seed(0)
    output = model.generate(
        max_new_tokens=48, lossless=True, draft_length=4, alpha_0=1.0, return_dict_in_generate=True, eos_token_id=None
    )
    scores = model.log_likelihood(output.sequences, orders=output.orders[:, None])
    error = (output.log_probs.sum(dim=-1) - scores.log_likelihood).abs().max().item()
    forwards = require("forwards", output.num_function_evaluations, 60)
    return require("log_likelihood_error_nats", error, 1e-2) | forwards


def check_compiled_training(machine: Machine) -> dict[str, float]:
    """`torch.compile(model)`: loss and gradients of a training batch are those of the model."""
    torch._dynamo.reset()
    model = random_model(machine).train()
    expected_loss, expected = loss_and_gradients(model)
    options = {} if machine.backend is None else {"backend": machine.backend}
    loss, gradients = loss_and_gradients(model, torch.compile(model, **options))
    error = require("loss_error", abs(loss - expected_loss), 1e-3)
    return error | require("gradients_relative_error", relative_error(gradients, expected), 1e-3)


def check_tensor_parallel(machine: Machine) -> dict[str, float]:
    """Two processes that share the weights give the logits of one."""
    if machine.is_gpu and torch.cuda.device_count() < 2:
        raise NotHereError("there are not two GPUs")
    with tempfile.TemporaryDirectory() as folder:
        random_model(Machine("cpu")).save_pretrained(folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        run = subprocess.run(
            [*command, "--device", machine.device, "--tensor-parallel", folder],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
        )
    if run.returncode != 0:
        raise AssertionError(run.stderr[-2000:])
    return require("logits_largest_error", float(run.stdout.split()[-1]), 1e-3)


@torch.no_grad()
def run_tensor_parallel(folder: Path, device: str) -> None:
    """A process of `check_tensor_parallel`: prints the largest error of its logits."""
    sharded = AutoModel.from_pretrained(folder, tp_plan="auto")
    whole = AutoModel.from_pretrained(folder).to(sharded.device)
    ids = torch.arange(10, device=sharded.device).expand(2, 10)
    logits, expected = (model(ids, position_ids=ids.flip(-1)).logits[..., :-1] for model in (sharded, whole))
    if dist.get_rank() == 0:
        print((logits - expected).abs().max().item())
    dist.destroy_process_group()


CHECKS: dict[str, Callable[[Machine], dict[str, float]]] = {
    "the authors' tensors": check_reference,
    "sdpa": lambda machine: check_attention(machine, "sdpa"),
    "FlexAttention, forward and backward": lambda machine: check_attention(machine, "flex_attention"),
    "flash attention 2": lambda machine: check_attention(machine, "flash_attention_2"),
    "the cache is exact": check_cache,
    "lossless decoding": check_lossless,
    "static steps, sdpa": lambda machine: check_static_steps(machine, "sdpa"),
    "static steps, FlexAttention": lambda machine: check_static_steps(machine, "flex_attention"),
    "compiled training": check_compiled_training,
    "tensor parallelism": check_tensor_parallel,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--tensor-parallel", type=Path, required=True)
    arguments = parser.parse_args()
    run_tensor_parallel(arguments.tensor_parallel, arguments.device)
