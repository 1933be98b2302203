"""What benchmarks measure with: the clock and the spread of what it reads, memory, and the name of the machine."""

import platform
import resource
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from eso_lm.modeling_products import MIN_ROWS, ROWS_TO_PACK


def synchronize(device: str) -> None:
    """Waits for the accelerator, so that a clock can be read."""
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Milliseconds that a call takes, with all that it leaves to the accelerator, and what it returns."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), result


def interleaved(
    functions: dict[Hashable, Callable[[], Any]], repeats: int, device: str
) -> dict[Hashable, list[float]]:
    """Milliseconds of `repeats` calls of each function, which take turns, after one of each that warms up."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            spent, _ = timed(function, device)
            if repeat > 0:
                times[name].append(spent)
    return times


def warm_up(step: Callable[[], Any]) -> None:
    """As many decoding steps as it takes until the model has packed its weights, where it does."""
    for _ in range(ROWS_TO_PACK // MIN_ROWS + 2):
        step()


def repeated(function: Callable[[], Any], repeats: int, device: str) -> list[float]:
    """Milliseconds of `repeats` calls, after one that warms up."""
    return interleaved({"": function}, repeats, device)[""]


def replayable(function: Callable[[], Any], device: str) -> Callable[[], Any]:
    """On CUDA, a replay of what a call leaves to the device; elsewhere the function itself."""
    if not device.startswith("cuda"):
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done once, is done before
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low": low, "high": high}


class Intervals:
    """Times between the forwards of a model, whatever calls it: all the cost of a decoding step."""

    def __init__(self, model: torch.nn.Module, device: str):
        self.device, self.moments = device, []
        self.hook = model.register_forward_pre_hook(lambda *_: self.mark())

    def mark(self) -> None:
        synchronize(self.device)
        self.moments.append(time.perf_counter())

    def close(self) -> list[float]:
        """Milliseconds between forwards, but for the first, which holds the prompt."""
        self.hook.remove()
        self.mark()
        return [1e3 * (b - a) for a, b in zip(self.moments[1:], self.moments[2:], strict=False)]


def peak_memory(device: str) -> float:
    """Gigabytes: the most that was allocated since the last call on an accelerator, by this process on a CPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def hardware(device: str) -> str:
    """The name of what was measured."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"
