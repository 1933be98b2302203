"""Two processes of this machine: tensor parallelism, fully sharded training, and generation in step."""

import pytest
from tiny_models import randomized_model, save_with_tokenizer
from two_processes import run_on_two_processes

pytestmark = pytest.mark.slow

TENSOR_PARALLEL = """
import sys
import torch
from transformers import AutoModel
import eso_lm

torch.set_num_threads(1)
sharded = AutoModel.from_pretrained(sys.argv[1], tp_plan="auto")
whole = AutoModel.from_pretrained(sys.argv[1])
assert sharded.model.layers[0].mlp.up_proj.weight.to_local().shape[0] == 64, "half of 128 rows"
assert sharded.lm_head.weight.to_local().shape[0] == 12, "half of 24 rows"
ids = torch.arange(10).expand(2, 10)
order = torch.tensor([[3, 1, 0, 2, 9, 8, 7, 5, 6, 4]]).expand(2, 10)
batch = {"position_ids": order, "labels": ids, "loss_weights": torch.ones(2, 10)}
batch["sequential_rows"] = torch.tensor([True, False])
with torch.no_grad():
    logits, expected = (model(ids, position_ids=order).logits[..., :23] for model in (sharded, whole))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(sharded(ids, **batch).loss, whole(ids, **batch).loss, atol=1e-4, rtol=0)
    samples = []
    for model in (sharded, whole):
        torch.manual_seed(0)
        samples.append(model.generate(max_new_tokens=8, num_diffusion_steps=3))
    assert torch.equal(*samples)
print("agreed")
"""


IN_STEP = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModel
import eso_lm

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = AutoModel.from_pretrained(sys.argv[1])
expected = model.generate(max_new_tokens=4 + 5 * dist.get_rank(), generator=torch.Generator())
# Weights that are sharded over the processes, as with FSDP: each forward needs them all.
model.register_forward_pre_hook(lambda *_: dist.all_reduce(torch.ones(1)))
sample = model.generate(max_new_tokens=4 + 5 * dist.get_rank(), generator=torch.Generator(), synced_gpus=True)
assert torch.equal(sample, expected)
dist.barrier()
print("agreed")
"""


FULLY_SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModel, Trainer, TrainingArguments
from eso_lm import DataCollatorForHybridMaskedDiffusion, ExponentialMovingAverageCallback

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
sharded, whole = (AutoModel.from_pretrained(sys.argv[1]).train() for _ in range(2))
for model in (sharded, whole):
    for layer in model.model.layers:
        layer.dropout.p = 0.0
for layer in sharded.model.layers:
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
assert isinstance(next(sharded.parameters()), DTensor)

trainer = Trainer(sharded, TrainingArguments(sys.argv[1], use_cpu=True, report_to="none"))
average = ExponentialMovingAverageCallback(trainer, decay=0.5)
collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=23, alpha_0=0.4, seed=0)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (sharded, whole)]
average.on_train_begin(None, trainer.state, None, model=sharded)
reference = whole.lm_head.weight.detach().clone()
text = torch.randint(0, 23, (6, 8, 12), generator=torch.Generator().manual_seed(0))
for step, rows in enumerate(text, 1):
    batch = collator([{"input_ids": row} for row in rows])
    # One process has rows of both phases, the other of one: their calls must not part.
    order = batch["sequential_rows"].long().argsort(stable=True)
    mine = order[[0, 1, 2, 3, 4, 5]] if rank == 0 else order[[6, 7]]
    losses = []
    for model, part, optimizer in zip((sharded, whole), (mine, order), optimizers):
        optimizer.zero_grad()
        loss = model(**{name: value[part] for name, value in batch.items()}, num_items_in_batch=96).loss
        (loss * (2 if model is sharded else 1)).backward()  # gradients are averaged over two processes
        optimizer.step()
        losses.append(loss.detach())
    dist.all_reduce(losses[0])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-4)
    trainer.state.global_step = step
    average.on_step_end(None, trainer.state, None, model=sharded)
    decay = min(0.5, (1 + step) / (10 + step))
    reference = decay * reference + (1 - decay) * whole.lm_head.weight.detach()
torch.testing.assert_close(sharded.lm_head.weight.full_tensor(), whole.lm_head.weight, atol=1e-5, rtol=1e-4)
trainer.model_wrapped = sharded
with average.applied():
    torch.testing.assert_close(sharded.lm_head.weight.full_tensor(), reference, atol=1e-5, rtol=1e-4)
torch.testing.assert_close(sharded.lm_head.weight.full_tensor(), whole.lm_head.weight, atol=1e-5, rtol=1e-4)
dist.barrier()
print("agreed")
"""


REINFORCED = """
import sys
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer
from trl import GRPOConfig
from eso_lm.training_grpo import EsoGRPOTrainer

torch.set_num_threads(1)
written = []

def reward(completions, **columns):
    written.append(completions)
    return [float(len(set(text))) for text in completions]

arguments = GRPOConfig(
    sys.argv[1] + "/run", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4, num_generations=4,
    max_completion_length=6, max_steps=3, learning_rate=1e-3, beta=0.1, save_strategy="no", logging_steps=1,
    gradient_checkpointing=False, generation_kwargs={"alpha_0": 0.5, "num_diffusion_steps": 3},
)
trainer = EsoGRPOTrainer(
    AutoModel.from_pretrained(sys.argv[1]), reward, arguments,
    train_dataset=Dataset.from_dict({"prompt": ["The quick", "fox"]}),
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
)
trainer.train()
weights = torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()])
others = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(others, weights)
assert torch.equal(*others), "one policy"
gathered = [None, None]
dist.all_gather_object(gathered, written)
assert gathered[0] != gathered[1], "rollouts of their own"
assert all(len(texts) == 4 for texts in written)
if dist.get_rank() == 0:
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert abs(rows[0]["kl"]) < 1e-5 and rows[0]["grad_norm"] > 0
    everything = [float(len(set(text))) for process in gathered for text in process[0]]
    assert abs(rows[0]["reward"] - sum(everything) / 8) < 1e-4, "rewards of both"
dist.barrier()
print("agreed")
"""


def agree_on_two_processes(script: str, tmp_path) -> None:
    randomized_model().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(script)
    assert run_on_two_processes(tmp_path / "script.py", tmp_path / "model").stdout.count("agreed") == 2


def test_a_sharded_model_agrees_with_a_whole_one(tmp_path):
    agree_on_two_processes(TENSOR_PARALLEL, tmp_path)


def test_a_fully_sharded_model_learns_like_a_whole_one(tmp_path):
    agree_on_two_processes(FULLY_SHARDED, tmp_path)


def test_processes_that_end_early_keep_step(tmp_path):
    agree_on_two_processes(IN_STEP, tmp_path)


def test_rollouts_of_two_processes_train_one_policy(tmp_path):
    save_with_tokenizer(tmp_path / "model")
    (tmp_path / "script.py").write_text(REINFORCED)
    assert run_on_two_processes(tmp_path / "script.py", tmp_path / "model").stdout.count("agreed") == 2
