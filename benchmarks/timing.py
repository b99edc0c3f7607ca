"""CPU time, and the tables that show it."""

import time

import numpy as np


def timed(run):
    """run() and the CPU seconds that it took, over all threads."""
    start = time.process_time()
    return run(), time.process_time() - start


def rounds(contenders, repeats):
    """{name: function} -> {name: CPU seconds (repeats,)}, in turns, so that
    a busy machine slows all alike, after one turn unmeasured."""
    turns = [
        [timed(run)[1] for run in contenders.values()]
        for _ in range(1 + repeats)
    ]
    return dict(zip(contenders, np.transpose(turns[1:]), strict=True))


def spread(values):
    """Median (lowest to highest), in three digits."""
    low, middle, high = (
        f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")
        for value in np.quantile(values, [0, 0.5, 1])
    )
    return f"{middle} ({low}–{high})"


def markdown(head, rows):
    """A table: its head with | between the columns, and lists of cells."""
    lines = [head.split(" | "), ["---"] * len(rows[0]), *rows]
    return "\n".join(
        "| " + " | ".join(map(str, line)) + " |" for line in lines
    )
