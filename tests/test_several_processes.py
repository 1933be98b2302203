"""Two processes of this machine: the tensor-parallel plan, and generation in step."""

import os
import subprocess
import sys

from tiny_models import randomized_model

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


def run_in_two_processes(script: str, tmp_path) -> None:
    randomized_model().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("agreed") == 2


def test_a_sharded_model_agrees_with_a_whole_one(tmp_path):
    run_in_two_processes(TENSOR_PARALLEL, tmp_path)


def test_processes_that_end_early_keep_step(tmp_path):
    run_in_two_processes(IN_STEP, tmp_path)
