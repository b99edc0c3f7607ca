"""Side-by-side CPU time, and the tables that show it."""

import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch


def cpu_seconds(run):
    """CPU seconds of run(), over all threads of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def rounds(contenders, repeats):
    """Contenders in turn, so that a busy machine slows all of them alike.

    contenders: {name: function -> CPU seconds}, called once unmeasured,
    then `repeats` times: -> {name: array (repeats,)}.
    """
    seconds = {name: [] for name in contenders}
    for k in range(repeats + 1):
        for name, run in contenders.items():
            taken = run()
            if k > 0:
                seconds[name].append(taken)
    return {name: np.array(taken) for name, taken in seconds.items()}


def spread(values, scale=1.0):
    """Median (lowest to highest), in three digits."""
    values = np.sort(np.atleast_1d(values)) * scale
    middle, low, high = np.median(values), values[0], values[-1]
    middle, low, high = (
        f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
        for value in (middle, low, high)
    )
    return f"{middle} ({low}–{high})"


def markdown(rows):
    """A list of dicts with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def matrix_speed(size=1024, repeats=7):
    """FLOP per second of a large float32 matrix product, the best of some:
    what the processor can do."""
    a = torch.rand(size, size)
    seconds = [cpu_seconds(lambda: a @ a) for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


def machine():
    """One line that says what was measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, one thread used; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}."
    )


def write(path, text):
    """Beside it and renamed, so that no reader meets half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)
