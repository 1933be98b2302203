"""What `import eso_lm` does, and what it leaves for later."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eso_lm

LIGHT_IMPORT = """
import sys
sys.modules["torchao"] = None  # which transformers imports where it is installed, and which is not silent
import eso_lm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

heavy = {"transformers.trainer", "peft", "bitsandbytes", "datasets"} & sys.modules.keys()
assert not heavy, heavy
config = AutoConfig.for_model("eso", vocab_size=8, mask_token_id=7, hidden_size=8, num_attention_heads=2)
assert type(config) is eso_lm.EsoConfig
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    assert type(auto_class.from_config(config)) is eso_lm.EsoForMaskedDiffusion
assert set(eso_lm.__all__) <= set(dir(eso_lm))
"""


@pytest.mark.slow
def test_importing_is_silent_and_registers_without_the_trainer():
    run = subprocess.run([sys.executable, "-c", LIGHT_IMPORT], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_public_name_is_there_at_run_time_and_for_type_checkers():
    for name in eso_lm.__all__:
        assert getattr(eso_lm, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'eso_lm' has no attribute 'EsoTrainer'"):
        _ = eso_lm.EsoTrainer
    tree = ast.parse(Path(eso_lm.__file__).read_text())
    own_imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    assert {alias.name for node in own_imports for alias in node.names} == set(eso_lm.__all__)
