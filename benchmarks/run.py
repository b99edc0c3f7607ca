"""Measure this repository beside other libraries, on one thread.

`make bench` prints the tables and writes them to benchmarks/RESULTS.md;
--quick tries everything once, on little data, and writes nothing.
"""

import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
if __name__ == "__main__":  # a process that this one starts inherits its own
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}

import fits  # noqa: E402
import kde  # noqa: E402
import tables  # noqa: E402


def machine():
    """One line that says what was measured on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8") if info.exists() else ""
    model = re.search(r"model name\s*: (.*)|$", text)[1] or platform.machine()
    return f"""{model}, {os.cpu_count()} cores, one thread used; Python
{platform.python_version()}, torch {version("torch")}."""


if __name__ == "__main__":
    quick = "--quick" in sys.argv[1:]
    text = f"""# Benchmarks

Written by `make bench`. {machine()}

CPU time of one process; contenders take turns. Cells are the median
(lowest–highest) over the turns.

{fits.report(quick)}

{kde.report(quick)}

{tables.report(quick)}
"""
    print(text)
    if not quick:
        (HERE / "RESULTS.md").write_text(text, "utf-8")
