"""CPU time, and the tables that show it."""

import os
import platform
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
    """Contenders in turn, so that a busy machine slows all of them alike:
    {name: function}, each called once unmeasured and then `repeats` times
    -> {name: CPU seconds (repeats,)}."""
    for run in contenders.values():
        run()
    turns = [
        [cpu_seconds(run) for run in contenders.values()]
        for _ in range(repeats)
    ]
    return dict(zip(contenders, np.transpose(turns), strict=True))


def spread(values):
    """Median (lowest to highest), in three digits."""
    low, middle, high = (
        f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
        for value in np.quantile(values, [0, 0.5, 1])
    )
    return f"{middle} ({low}–{high})"


def markdown(rows):
    """A list of dicts with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[str(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine():
    """One line that says what was measured on."""
    model, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return (
        f"{model}, {os.cpu_count()} cores, one thread used; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"numpy {np.__version__}."
    )
