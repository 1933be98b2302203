"""The tensor-parallel plan, on two processes of this machine."""

import os
import subprocess
import sys

from tiny_models import randomized_model

SCRIPT = """
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


def test_two_processes_agree_with_one(tmp_path):
    randomized_model().save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("agreed") == 2
