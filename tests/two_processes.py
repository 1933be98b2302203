"""Scripts on two processes of this machine, by torch's own launcher."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_on_two_processes(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs a script, which may import from the examples, and returns what both processes printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run
