"""Measure this repository beside other libraries, on one thread.

make bench, or python benchmarks/run.py [--quick]: prints the tables and
writes them to benchmarks/RESULTS.md. --quick only tries everything once, on
little data, and writes nothing.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fits  # noqa: E402
import kde  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

if __name__ == "__main__":
    quick = "--quick" in sys.argv[1:]
    torch.set_num_threads(1)
    parts = [
        f"# Benchmarks\n\nWritten by `make bench`. {timing.machine()}\n\n"
        "CPU time of one process; contenders take turns. Cells are the "
        "median (lowest–highest) over the turns."
    ]
    print(parts[0])
    with threadpool_limits(1):
        for topic in (fits, kde):
            parts.append(topic.report(quick))
            print("\n" + parts[-1], flush=True)
    if not quick:
        (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
