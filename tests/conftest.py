"""What every test shares: the path to helpers, one thread, fixed examples."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)
settings.register_profile("fixed", derandomize=True, deadline=None)
# For tests that are expected to fail: the first case will do.
settings.register_profile(
    "mutants", settings.get_profile("fixed"), phases=[Phase.generate]
)
settings.load_profile("fixed")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(autouse=True)
def global_generators_stay_untouched():
    """A law of every test: randomness is an argument."""
    held, numpy_held = torch.get_rng_state(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(held, torch.get_rng_state())
    assert np.array_equal(numpy_held, np.random.get_state()[1])


@pytest.fixture
def random():
    return np.random.default_rng(0)
