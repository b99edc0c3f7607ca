"""What every test shares: the path to the modules, one thread, no memory of
earlier sweeps, fixed examples."""

import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["RUNS"] = ""  # every sweep trains
os.environ.pop("TQDM_DISABLE", None)
# A job in the background ignores Ctrl-C, and what it starts does too.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

import helpers  # noqa: E402, F401  sets the kernels before the first operation

torch.set_num_threads(1)
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def global_generators_stay_untouched():
    """A law of every test: randomness is an argument."""
    held, numpy_held = torch.get_rng_state(), repr(np.random.get_state())
    yield
    assert torch.equal(held, torch.get_rng_state())
    assert numpy_held == repr(np.random.get_state())


@pytest.fixture
def random():
    return np.random.default_rng(0)
