"""What study.py has computed, kept in a folder: runs/, or $RUNS."""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import joblib
import numpy as np
import torch

from checks import brief
from helpers import Density

HERE = Path(__file__).parent


def digest_of_sources():
    names = "checks", "helpers", "preparation", "training", "study"
    paths = [HERE / f"{name}.py" for name in names]
    # A worker of a cluster, which keeps nothing, may not have them all.
    sources = [path.read_bytes() for path in paths if path.exists()]
    return hashlib.sha256(b"".join(sources)).hexdigest()


IMPORTED = digest_of_sources()


class Memory:
    """By joblib.Memory: a result is read again only for the same setting,
    about (seeds, points), sources, torch and kernels."""

    def __init__(self, *about):
        folder = os.environ.get("RUNS", "runs")
        self.on = bool(folder)
        try:
            if self.on:
                (HERE / folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=HERE / folder).close()
        except (OSError, ValueError) as error:
            self.on = False
            warnings.warn(
                f"RUNS must be a folder to write to, got {brief(folder)}, so "
                f"this sweep is not remembered: {error}", stacklevel=3,
            )  # fmt: skip
        if self.on and digest_of_sources() != IMPORTED:
            self.on = False
            warnings.warn(
                "a module has changed since it was imported, so this sweep is "
                "not remembered: restart the kernel", stacklevel=3,
            )  # fmt: skip
        memory = joblib.Memory(HERE / folder if self.on else None, verbose=0)
        self.cached = memory.cache(stored, ignore=["run"])
        kernels = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
        self.about = (
            *about, IMPORTED, torch.__version__,
            [os.environ.get(name) for name in kernels],
        )  # fmt: skip

    def key(self, setting):
        """Of a density its class and numbers: tensors have no fixed hash.
        None for one whose class is not in helpers.py: it may change."""
        kinds = setting["dist_type"]
        listed = kinds if isinstance(kinds, list) else [kinds]
        truths = [of for of in listed if isinstance(of, Density)]
        if any(type(of).__module__ != Density.__module__ for of in truths):
            return None
        setting = {**setting, "dist_type": [*map(plain, listed)]}
        return joblib.hash((setting, self.about))

    def recall(self, settings):
        """{index: run} of those that are there. One that cannot be read is
        left out, with a warning."""
        keys = {k: self.key(s) for k, s in enumerate(settings) if self.on}
        found = {}
        for k, key in keys.items():
            if key and self.cached.check_call_in_cache(key, None):
                try:
                    found[k] = self.cached.call_and_shelve(key, None).get()
                except Exception as error:  # whatever a damaged pickle raises
                    warnings.warn(
                        f"training setting {k} again: what was kept of it "
                        f"cannot be read ({type(error).__name__})",
                        stacklevel=4,
                    )
        return found

    def keep(self, setting, run):
        """But for a failure, whose result is None."""
        if self.on and None not in run and (key := self.key(setting)):
            self.cached.call(key, run)


def plain(kind):
    if not isinstance(kind, Density):
        return kind
    numbers = {name: np.asarray(value) for name, value in vars(kind).items()}
    return type(kind).__name__, numbers


def stored(key, run):
    """What joblib keeps under a key: the run that it is given."""
    return run
