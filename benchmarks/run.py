"""Measure this repository beside other libraries, on one thread.

make bench, or python benchmarks/run.py [--quick]: prints the tables, and
writes them to benchmarks/RESULTS.md and figures/benchmark_growth.svg.
--quick only tries everything once, on little data, and writes nothing.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fits  # noqa: E402
import growth  # noqa: E402
import kde  # noqa: E402
import threadpoolctl  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")  # of the libraries that are measured
    torch.set_num_threads(1)
    start = time.perf_counter()

    def log(text):
        elapsed = time.perf_counter() - start
        print(f"[{elapsed:4.0f} s] {text}", file=sys.stderr, flush=True)

    parts = [
        "# Benchmarks\n\nWritten by `make bench`. " + timing.machine(),
        "CPU time of one process; contenders take turns. Cells are the "
        "median (lowest to highest) over the turns.",
    ]
    print("\n\n".join(parts))
    with threadpoolctl.threadpool_limits(1):
        for topic in (fits, kde, growth):
            parts.append(topic.report(quick, log))
            print("\n" + parts[-1], flush=True)
    if not quick:
        text = "\n\n".join(parts) + "\n"
        timing.write(ROOT / "benchmarks" / "RESULTS.md", text)
    log("done")


if __name__ == "__main__":
    main()
