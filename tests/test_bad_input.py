"""Every public name refuses what it cannot use: at once, by the argument's
name and value, and without a change to it."""

import inspect
import math
import re
import time

import numpy as np
import pytest
import torch

import helpers
from helpers import (
    Circles,
    CouplingFlow,
    CouplingLayer,
    GaussianKDE,
    GaussianMixture,
    Grid,
    Linear,
    Moons,
    Spiral,
    SplineCoupling,
    ToyDataset,
    bootstrap_interval,
    check_counts,
    entropy,
    grid_entropy,
    kl_divergence,
    leave_one_out,
    reference_bandwidth,
    select_bandwidth,
    sharpen,
    sweep,
    total_variation,
    toy_distribution,
    train,
    verdict,
)

NAN, INF = math.nan, math.inf
POINTS = torch.randn(
    20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
ONE_NAN, ONE_INF = POINTS.clone(), POINTS.clone()
ONE_NAN[3, 1], ONE_INF[4, 0] = NAN, INF
FLAT, WIDE = torch.zeros(20), torch.zeros(20, 3)
EMPTY, NUMPY = torch.zeros(0, 2), POINTS.numpy().copy()
COMPLEX, BOOLS = POINTS.to(torch.complex128), POINTS > 0
SINGULAR = np.array([[1.0, 2.0], [2.0, 4.0]])
THREE = np.eye(3)
ARRAYS = [POINTS, ONE_NAN, ONE_INF, FLAT, WIDE, EMPTY, COMPLEX, BOOLS,
          SINGULAR, THREE, NUMPY]  # fmt: skip

TRUTH, KDE = Circles(), GaussianKDE(POINTS, 0.3)
FLOW, MANY = CouplingFlow(1), CouplingFlow(1, 3)
LAYER, GRID = CouplingLayer([1, 0]), Grid((0, 1), (0, 1), 4)
CASES = []


def case(call, *patterns):
    """A case: its call, and what its message must match: the name of the
    argument, then the value."""
    CASES.append((call, patterns))


def case_each(call, name, *values):
    for value in values:
        text = value if isinstance(value, str) else repr(value)
        case(lambda v=value: call(v), name, re.escape(text))


COUNT = 0, -3, 2.5, True, "7", None, NAN
WIDTH = 0, -0.5, NAN, INF, True, "1", None
POINTS_CASES = [
    (FLAT, r"shape .*\(20,\)"), (WIDE, r"\(20, 3\)"), (EMPTY, r"\(0, 2\)"),
    (ONE_NAN, "nan"), (ONE_INF, "inf"), (COMPLEX, "complex"),
    (BOOLS, "bool"), ([[1, 2], [3]], r"\[3\]"), ("points", "points"),
    (None, "None"), (7, r"\(\)"),
]  # fmt: skip


def point_cases(call, name):
    for value, pattern in POINTS_CASES:
        case(lambda v=value: call(v), name, pattern)


# Counts and seeds
case_each(lambda n: check_counts(epochs=n), "epochs", *COUNT)
case_each(lambda n: TRUTH.sample(n), "n", *COUNT)
case_each(lambda n: KDE.sample(n), "n", *COUNT)
case_each(lambda n: FLOW.sample(n), "n", *COUNT)
case_each(lambda n: FLOW.sample_x_each_layer(n), "n", 0, 1.5)
case_each(lambda n: ToyDataset("Moons", n), "num_samples", *COUNT)
case_each(
    lambda k: toy_distribution("GaussiansRot", k), "num_gaussians", *COUNT
)
case_each(lambda k: toy_distribution("Moons", k), "num_gaussians", 0)
SEED = -1, 0.5, True, "0", None, 1 << 32
case_each(lambda s: TRUTH.sample(3, s), "seed", *SEED)
case_each(lambda s: KDE.sample(3, s), "seed", *SEED)
case_each(lambda s: FLOW.sample(3, s), "seed", *SEED)
case_each(lambda s: ToyDataset("Moons", 3, s), "seed", *SEED)
case_each(lambda s: CouplingFlow(1, seed=s), "seed", *SEED)
case_each(lambda s: CouplingLayer([1, 0], seed=s), "seed", *SEED)
case_each(
    lambda s: train(FLOW, POINTS, 1, seed=s, progress=False), "seed", *SEED
)
case_each(lambda s: kl_divergence(TRUTH, KDE, 9, s), "seed", *SEED)
case_each(lambda s: bootstrap_interval([1, 2], seed=s), "seed", -1, 0.5, None)

# Densities
for family in (Circles, Moons, Spiral, lambda s: GaussianMixture(POINTS, s)):
    case_each(family, "sigma", *WIDTH)
point_cases(lambda x: GaussianMixture(x, 1.0), "means")
for model in (TRUTH, Moons(), Spiral(), KDE, FLOW, MANY):
    point_cases(model.log_probability, "x")
for model in (TRUTH, KDE, FLOW, GaussianKDE(POINTS, np.eye(2) + 0.1)):
    case_each(model.density, "grid", None, 100, "grid")
    case(lambda m=model: m.density(POINTS), "grid", "tensor")  # fmt: skip
for maker in (toy_distribution, ToyDataset):
    case_each(maker, "dist_type.*Circles, Moons, GaussiansGrid, GaussiansRot",
              "Moon", "circles", "", None, 3)  # fmt: skip
case(lambda: toy_distribution(["Moons"]), "dist_type", r"\['Moons'\]")

# Grid
for name in ("xlim", "ylim"):
    for limits in ((1, 0), (1, 1), (0, NAN), (-INF, INF), (0, INF), (1,),
                   (0, 1, 2), "ab", None, 3, (None, 1)):  # fmt: skip
        args = {"xlim": (0, 1), "ylim": (0, 1)} | {name: limits}
        case(lambda a=args: Grid(**a), name, re.escape(repr(limits)))
case_each(lambda n: Grid((0, 1), (0, 1), n), "size", *COUNT)
point_cases(Grid.around, "samples")
case_each(lambda m: Grid.around(POINTS, margin=m), "margin",
          -0.1, NAN, INF, True, "0", None)  # fmt: skip
case_each(lambda n: Grid.around(POINTS, n), "size", *COUNT)
case(lambda: GRID.image(np.zeros(15)), "values", r"\(15,\)")
case(lambda: GRID.image(None), "values", r"\(\)")

# Kernel estimation
point_cases(lambda x: GaussianKDE(x, 0.3), "samples")
case_each(lambda h: GaussianKDE(POINTS, h), "H", *WIDTH)
case(lambda: GaussianKDE(POINTS, SINGULAR), "H", r"\[2\., 4\.\]")
case(lambda: GaussianKDE(POINTS, THREE), "H", r"\(3, 3\)")
case(lambda: GaussianKDE(POINTS, np.zeros((2, 2))), "H", r"\[0\., 0\.\]")
case(lambda: GaussianKDE(POINTS, np.ones((3, 2))), "H", r"\[1\., 1\.\]")
case(lambda: GaussianKDE(POINTS, [[NAN, 0], [0, 1]]), "H", "nan")
case(lambda: GaussianKDE(POINTS, [1.0, 1.0]), "H", r"\(2,\)")
case(lambda: GaussianKDE(POINTS, [[1, 2], [3]]), "H", r"\[3\]")
for rule in (reference_bandwidth, select_bandwidth,
             lambda x: leave_one_out(x, [0.1])):  # fmt: skip
    point_cases(rule, "samples")
    case(lambda r=rule: r(POINTS[:1]), "samples", "1$")
for rule in (reference_bandwidth, select_bandwidth):
    case(lambda r=rule: r(torch.ones(5, 2)), "samples", r"\[1.0, 1.0\]")
for rule in (select_bandwidth, leave_one_out):
    case_each(lambda c, r=rule: r(POINTS, c), "candidates", [], 0.3)
    for bad in (0.0, -1.0, NAN, INF):
        case(lambda b=bad, r=rule: r(POINTS, [0.1, b]), "candidates",
             re.escape(repr(bad)))  # fmt: skip
    case(lambda r=rule: r(POINTS, [[0.1]]), "candidates", r"\[\[0.1\]\]")
    case(lambda r=rule: r(POINTS, ["a"]), "candidates", "a")
    case(lambda r=rule: r(POINTS, [None]), "candidates", "None")
    case(lambda r=rule: r(POINTS, "ab"), "candidates", "ab")
    case(lambda r=rule: r(POINTS, [True]), "candidates", "True")
case(lambda: leave_one_out(POINTS, None), "candidates", "None")
point_cases(lambda x: sharpen(x, 0.1), "samples")
case_each(lambda h: sharpen(POINTS, h), "h", *WIDTH)

# Flows
for maker in (lambda n: CouplingFlow(n), lambda n: CouplingFlow(n, 2)):
    case_each(maker, "num_layers", *COUNT)
COUNT_OR_NONE = [v for v in COUNT if v is not None]
case_each(lambda n: CouplingFlow(1, n), "members", *COUNT_OR_NONE)
case_each(lambda n: CouplingLayer([1, 0], n), "members", *COUNT_OR_NONE)
for maker in (
    lambda **o: CouplingFlow(1, **o), lambda **o: CouplingLayer([1, 0], **o)
):  # fmt: skip
    for name, known, values in (
        ("coupling", "affine, spline", ("cubic", None, 1)),
        ("start", "spread, uniform", ("zero", None, 1)),
    ):
        case_each(lambda v, n=name, m=maker: m(**{n: v}),
                  f"{name}.*{known}", *values)  # fmt: skip
    case_each(lambda v, m=maker: m(hidden=v), "hidden", *COUNT)
    case_each(lambda v, m=maker: m(bound=v), "bound",
              *[v for v in WIDTH if v is not None])  # fmt: skip
    case_each(lambda v, m=maker: m(coupling="spline", bins=v), "bins",
              1, 65, 0, -1, 2.5, True, "8", None)  # fmt: skip
    case_each(lambda v, m=maker: m(coupling="spline", interval=v),
              "interval", *WIDTH)  # fmt: skip
    case(lambda m=maker: m(coupling="spline", bound=1.0), "bound")
    case(lambda m=maker: m(bins=8), "bins")
    case(lambda m=maker: m(wings=8), "wings")
case_each(lambda v: SplineCoupling(None, bins=v), "bins", 1, 65, True)
case_each(CouplingLayer, "mask", [1, 1], [0, 0], [1, 0, 0], [], "10", None,
          3, (2, 0), [[1, 0]])  # fmt: skip
for model in (FLOW, MANY, LAYER):
    point_cases(model.forward, "z")
    point_cases(model.inverse, "x")
case(lambda: FLOW.inverse(POINTS.expand(3, 20, 2)), "x", r"\(3, 20, 2\)")
for wrong in (1, 2, 4):
    case(lambda w=wrong: MANY.inverse(POINTS.expand(w, 20, 2)), "x",
         rf"\(3, n, 2\).*\({wrong}, 20, 2\)")  # fmt: skip
    case(lambda w=wrong: train(MANY, POINTS.expand(w, 20, 2), 1), "data",
         rf"\({wrong}, 20, 2\)")  # fmt: skip
case_each(FLOW.member, "i", 1, -1, 0.5, True, None, "0")
case_each(MANY.member, "i", 3, -1, 99)

# Training


def fit(flow=FLOW, data=POINTS, epochs=1, **options):
    return train(flow, data, epochs, **{"progress": False} | options)


case_each(lambda f: fit(flow=f), "flow", None, "flow", 3)
case(lambda: fit(flow=KDE), "flow", "GaussianKDE")
case(lambda: fit(flow=LAYER), "flow", "CouplingLayer")
point_cases(lambda d: fit(data=d), "data")
point_cases(lambda d: fit(MANY, data=d), "data")
case_each(lambda n: fit(epochs=n), "epochs", *COUNT)
case_each(lambda n: fit(batch_size=n), "batch_size", *COUNT)
case_each(lambda v: fit(learning_rate=v), "learning_rate", *WIDTH)
case_each(lambda v: fit(jitter=v), "jitter",
          -0.1, NAN, INF, True, "1", None)  # fmt: skip
case_each(lambda v: fit(warmup=v), "warmup",
          -0.1, 1, NAN, True, "0.1", None)  # fmt: skip
case_each(lambda v: fit(beta2=v), "beta2",
          -0.1, 1, NAN, True, "0.1", None)  # fmt: skip
case_each(lambda s: sharpen(POINTS, 0.1, s), "step", *WIDTH)
case_each(lambda v: fit(average=v), "average",
          -0.1, 1, 1.5, NAN, True, False, "0", None)  # fmt: skip
case_each(lambda v: fit(valid_fraction=v), "valid_fraction",
          0, 1, -0.1, 1.5, NAN, True, "0.1", None)  # fmt: skip
for name in ("cosine", "sharpened", "shuffle", "tolerance", "progress"):
    case_each(lambda v, n=name: fit(**{n: v}), name, 0, 1, None, "yes")
case(lambda: fit(data=POINTS[:2]), "data", "2 with valid_fraction 0.1")
case(lambda: fit(data=POINTS, valid_fraction=0.95), "data", "20 .*0.95")
case(lambda: fit(MANY, [POINTS, POINTS]), "data", "2 of shapes")
case(lambda: fit(MANY, [POINTS] * 4), "data", "3 sets.*4 of shapes")
case(lambda: fit(MANY, [POINTS, POINTS, POINTS[:9]]), "data",
     r"one size.*\(9, 2\)")  # fmt: skip
case(lambda: fit(MANY, [POINTS, POINTS, ONE_NAN]), "data", "nan")
case(lambda: fit(FLOW, [POINTS, POINTS]), "data", r"\(2, 20, 2\)")
case(lambda: fit(MANY, []), "data", r"\[\]|\(0,\)")
case(lambda: fit(MANY, [POINTS, None, POINTS]), "data", "None")
case(lambda: fit(MANY, [None, POINTS, POINTS]), "data", "None")
case(lambda: fit(FLOW, torch.full((20, 2), 1e300, dtype=torch.float64)),
     "data", "inf")  # fmt: skip

# Scores
for score in (kl_divergence, total_variation):
    for bad in (None, 3, "Moons", POINTS[0].tolist()):
        text = re.escape(repr(bad))
        case(lambda b=bad, s=score: s(b, KDE), "truth", text)
        case(lambda b=bad, s=score: s(TRUTH, b), "model", text)
    case_each(lambda n, s=score: s(TRUTH, KDE, n), "n", 1, *COUNT)
case_each(entropy, "density", None, 3, "Moons")
case_each(lambda n: entropy(TRUTH, n), "n", 1, *COUNT)
case_each(grid_entropy, "density", None, 3, "Moons")
case_each(lambda n: grid_entropy(TRUTH, n), "size", *COUNT)
case_each(lambda s: entropy(TRUTH, 9, s), "seed", *SEED)

# Studies
GOOD = dict(dist_type="Moons", num_layers=1, epochs=1, num_samples=9)


def study(settings=(GOOD,), seeds=1, **options):
    options = dict(points=2, n_jobs=1, progress=False) | options
    return sweep(settings, seeds, **options)


case_each(study, "settings", None, [], "ab", 3, [3], [GOOD, None], GOOD)
case(lambda: study([{**GOOD, "epoch": 3}]), "epoch.*known: .*epochs", "3")
case(lambda: study([GOOD, {"dist_type": "Moons"}]),
     r"lacks \['epochs', 'num_layers'\]", "Moons")  # fmt: skip
case(lambda: study([{**GOOD, 3: 1}]), "setting", "3")
case(lambda: study([{**GOOD, 3: 1, "epoch": 1}]), "setting", "3")
case(lambda: study([{**GOOD, "seed": 1}]), "seed", "unknown")
case_each(lambda n: study(seeds=n), "seeds", *COUNT)
case_each(lambda n: study(points=n), "points", 1, *COUNT)
for name in ("results", "progress"):
    case_each(lambda v, n=name: study(**{n: v}), name, 2, None, "yes")
case_each(lambda v: study(n_jobs=v), "n_jobs", 0)
case_each(lambda v: study(n_jobs=v), "n_jobs", 1.5, "two", True)
case_each(lambda v: bootstrap_interval([1, 2], v), "level", 0, 1, -0.5,
          1.5, NAN, True, "0.9", None)  # fmt: skip
case_each(lambda n: bootstrap_interval([1, 2], resamples=n), "resamples",
          *COUNT)  # fmt: skip
case_each(bootstrap_interval, "values", "abc", 3)
case(lambda: bootstrap_interval(None), "values", "nan")  # as numpy reads it
case(lambda: bootstrap_interval([None]), "values", "nan")
case(lambda: bootstrap_interval([]), "values", r"\[\]")
case(lambda: bootstrap_interval([1, NAN]), "values", "nan")
case(lambda: bootstrap_interval([1, INF]), "values", "inf")
case(lambda: bootstrap_interval([[1, 2]]), "values", r"\[1\., 2\.\]")
case(lambda: bootstrap_interval([1, [2]]), "values", r"\[1, \[2\]\]")
case(lambda: bootstrap_interval([1], seed=-1), "seed", "-1")
case_each(lambda i: verdict("claim", i), "interval", None, 0.3,
          (0.1, 0.0, 0.2))  # fmt: skip


def check(call, patterns):
    held = [np.asarray(array).tobytes() for array in ARRAYS]
    start = time.process_time()
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert time.process_time() - start < 1
    name, *values = patterns
    message = str(error.value)
    assert re.search(rf"\b{name}", message, re.DOTALL), message
    for value in values:
        assert re.search(value, message, re.DOTALL), (value, message)
    for array, before in zip(ARRAYS, held, strict=True):
        assert np.asarray(array).tobytes() == before


def numbered(cases):
    return [
        pytest.param(*c, id=f"{k} {' '.join(c[1])}"[:50])
        for k, c in enumerate(cases)
    ]


@pytest.mark.parametrize("call, patterns", numbered(CASES))
def test_bad_argument_is_refused_by_name_and_value(call, patterns):
    check(call, patterns)


def test_table_covers_every_public_name():
    """But those that only hold values or are called by others."""
    held = {"Density", "Bijection", "Estimate", "Interval", "TrainingResult",
            "AffineCoupling", "Linear"}  # fmt: skip
    assert issubclass(Linear, torch.nn.Module)
    public = {
        name for name, value in vars(helpers).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == "helpers"
        and (inspect.isclass(value) or inspect.isfunction(value))
    }  # fmt: skip
    source = inspect.getsource(inspect.getmodule(check))
    table = source[source.index("# Counts and seeds") :]
    missing = {n for n in public - held if not re.search(rf"\b{n}\b", table)}
    assert not missing
