"""Laws of the closed-form densities, their samplers and the grid."""

import functools
import math
import os
import platform
import runpy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special, stats
from truths import assert_mass_and_moments, cell_masses, follow

import helpers
from helpers import (
    Circles,
    CouplingFlow,
    GaussianKDE,
    GaussianMixture,
    LocalKDE,
    Moons,
    Spiral,
    toy_distribution,
)
from study import entropy

DENSITIES = {
    **{name: toy_distribution(name) for name in helpers.DISTRIBUTIONS},
    "GaussiansRot 3": toy_distribution("GaussiansRot", 3),
    "wide mixture": GaussianMixture([(0, 0), (0, 2), (2, 2)], 1.0),
    "Spiral": Spiral(),
    "wide Spiral": Spiral(1.0),
}
NATS = {"Circles": 1.175, "Moons": 1.008, "GaussiansGrid": 2.717,
        "GaussiansRot": 2.145, "GaussiansRot 3": 1.634, "Spiral": 4.085,
}  # fmt: skip
each = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
# Where something could go wrong: centres, ends of the arcs, poles, far away.
SPECIAL = torch.tensor([
    (0, 0), (1, 0), (-1, 0), (0, 1), (0.8, 0), (0.6, 0.8), (1, 0.5),
    (0, 0.5), (2, 0.5), (1, -0.5), (0.5, 0.25), (1e-9, 0), (0, -1e-9),
    (1e-150, 1e-150), (1e3, 0), (-1e3, 1e3), (0, 1e3), (2.5, 0), (1, 1),
], dtype=torch.float64)  # fmt: skip


def mass_grid(density, margin=0.3):
    return helpers.Grid.around(density.sample(2000, seed=1), 40, margin)


@each
def test_density_has_unit_mass(density):
    grid = mass_grid(density, 1.0)  # for long tails, bent ones too
    mass = cell_masses(density, grid, 24).sum()
    # The spiral's 1/rho at the origin costs the midpoint rule 1e-3.
    tolerance = 3e-3 if isinstance(density, Spiral) else 1e-5
    assert mass == pytest.approx(1, abs=tolerance)


@each
def test_sampler_follows_the_closed_form(density):
    grid = mass_grid(density)
    masses = cell_masses(density, grid, 8)
    if isinstance(density, Spiral):  # the pole's cells join the rest
        masses[grid.image(grid.points.norm(dim=1) < 0.7)] = 0
    assert follow(density.sample(40_000, seed=2), masses, grid)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_mixture_is_a_mean_of_normals(d, random):
    means, x = random.normal(size=(3, d)), random.normal(size=(50, d)) * 3
    roots = np.tril(random.normal(size=(3, d, d))) + 2 * np.eye(d)
    many = roots @ roots.transpose(0, 2, 1)
    whole = np.rint(9 * many).astype(int)
    for mixture, covariances in (
        (GaussianMixture(means, 0.7), [0.49 * np.eye(d)] * 3),
        (GaussianMixture(means, covariances=many), many),
        (GaussianMixture(means, covariances=whole), whole),
    ):
        pairs = list(zip(means, covariances, strict=True))
        truths = [stats.multivariate_normal(m, C) for m, C in pairs]
        expected = np.mean([truth.pdf(x) for truth in truths], 0)
        actual = mixture.log_probability(x).exp()
        np.testing.assert_allclose(actual, expected, rtol=1e-11)
        assert_mass_and_moments(mixture)
    one, tensor = mixture.log_probability(x), torch.tensor(whole)
    for same in (whole.astype(">f8"), tensor.float().requires_grad_(),
                 list(tensor), np.ma.masked_array(whole)):  # fmt: skip
        same = GaussianMixture(torch.tensor(means), covariances=same)
        assert torch.equal(same.log_probability(x), one)
    data = helpers.ToyDataset(mixture, 30, seed=4)
    assert data.distribution is mixture and data.data.shape == (30, d)


def test_rotated_gaussians_lie_at_equal_angles():
    means = toy_distribution("GaussiansRot", 4).means
    corners = [(2.5, 0), (0, 2.5), (-2.5, 0), (0, -2.5)]
    np.testing.assert_allclose(means, corners, atol=1e-15)
    assert toy_distribution("GaussiansRot").sigma ** 2 == pytest.approx(0.1)


@pytest.mark.parametrize("name", NATS)
def test_entropy_is_that_of_the_homeworks_parameters(name):
    value, error = entropy(DENSITIES[name], 40_000)
    assert abs(value - NATS[name]) < 5 * error + 0.001


@functools.cache
def legendre(n):
    return special.roots_legendre(n)


def quadrature(name, sigma, x):
    """log p as a mean over the angles: (n, 2) -> (n,). Both rules converge
    exponentially, the trapezoidal one on a circle, Gauss's on an arc."""
    if name == "Circles":
        angle, weight = np.arange(2000) * np.pi / 1000, np.full(2000, 1 / 4000)
    else:
        node, weight = legendre(2000)
        angle, weight = (node + 1) * np.pi / 2, weight / 4
    arc = np.stack([np.cos(angle), np.sin(angle)], 1)
    both = arc, 0.8 * arc if name == "Circles" else (1, 0.5) - arc
    d2 = ((x[:, None] - np.vstack(both)) ** 2).sum(-1)
    terms = np.concatenate([weight, weight])
    log_sum = special.logsumexp(-d2 / (2 * sigma**2), 1, terms)
    return log_sum - math.log(2 * np.pi * sigma**2)


@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("make", [Circles, Moons])
def test_circles_and_moons_agree_with_quadrature(make, sigma, random):
    """Also at centres and at ends of arcs; far away, where the density
    underflows, Moons are good to a few digits."""
    x = np.vstack([random.uniform(-3, 4, size=(60, 2)), SPECIAL[:13]])
    expected = quadrature(make.__name__, sigma, x)
    seen = expected > -600
    actual = make(sigma).log_probability(x)[seen]
    np.testing.assert_allclose(actual, expected[seen], rtol=0, atol=1e-9)
    turn = np.linspace(0.1, 6.2, 15)[:, None]
    turn = np.hstack([np.cos(turn), np.sin(turn)])
    for distance in (10, 100, 1e4):
        actual = make(sigma).log_probability(distance * turn)
        expected = quadrature(make.__name__, sigma, distance * turn)
        np.testing.assert_allclose(actual, expected, rtol=2e-5)


@each
def test_log_density_is_finite_wherever_the_density_is(density):
    far = 1e3 * torch.tensor([(1, 1), (-1, 0), (0.3, -1), (1e3, 1e3)])
    values = density.log_probability(torch.cat([SPECIAL, far]))
    pole = isinstance(density, Spiral)
    assert torch.isfinite(values[pole:]).all()
    assert (values[0] == math.inf) == pole
    # Far away the density underflows, its logarithm does not.
    assert (values[-4:] < -1e4).all()


@pytest.mark.parametrize("density", [
    *DENSITIES.values(), GaussianKDE([(1, 2), (3, 5)], 0.1),
    GaussianKDE([(1, 2), (3, 5)], [[1, 0.5], [0.5, 1]]),
    LocalKDE([(1, 2), (3, 4)]),
    GaussianMixture([(1, 2)], covariances=[[[2, 1], [1, 2]]]),
], ids=lambda density: type(density).__name__)  # fmt: skip
def test_where_a_square_overflows_the_density_is_0(density):
    far = [(1e160, 0), (1e300, 1e300), (-1e308, 1e308), (0, -1e200)]
    assert (density.log_probability(far) == -math.inf).all()
    assert density.log_probability([(1, 1)]).isfinite().all()


@each
def test_sampler_is_pure(density):
    first = density.sample(10, seed=3)
    density.sample(5, seed=4)
    assert torch.equal(first, density.sample(10, seed=3))
    assert not torch.equal(first, density.sample(10, seed=4))
    assert first.shape == (10, 2) and first.dtype == torch.float64
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, density.sample(10, generator))
    assert not torch.equal(first, density.sample(10, generator))


class Largest(torch.overrides.TorchFunctionMode):
    """Notes the most numbers that one operation gives."""

    most = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.numel())
        return out


CENTRES = 3 * torch.rand(
    1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)


@pytest.mark.parametrize("density", [
    GaussianKDE(CENTRES, 0.1), GaussianKDE(CENTRES, [[0.1, 0.05], [0, 0.1]]),
    LocalKDE(CENTRES), GaussianMixture(CENTRES, 0.1), Moons(), Moons(0.02),
    Spiral(), Circles(),
], ids=lambda density: type(density).__name__)  # fmt: skip
def test_memory_does_not_grow_with_points_times_samples(density):
    """Which would be 1e7 numbers here."""
    x = density.sample(10_000)
    with Largest() as largest:
        assert density.log_probability(x).isfinite().all()
    assert largest.most <= 5 * helpers.PAIRS


def test_nor_does_that_of_a_bandwidth():
    samples = CENTRES.repeat(3, 1) * torch.linspace(1, 2, 3000)[:, None]
    with Largest() as largest:
        h = helpers.select_bandwidth(samples)
        helpers.sharpen(samples, h)
        GaussianKDE(samples, h).density(helpers.Grid((0, 6), (0, 6), 200))
    assert largest.most <= 2 * helpers.PAIRS


@pytest.mark.parametrize("density", [
    *DENSITIES.values(), CouplingFlow(2, 3, "spline"),
    GaussianMixture([(0, 0, 0), (1, 2, 3)], 1.0), GaussianKDE([(1, 2)], 1.0),
    LocalKDE([(1, 2), (3, 4)]),
], ids=lambda density: type(density).__name__)  # fmt: skip
def test_samples_are_nested(density):
    """Of one seed the first n of a larger sample are the sample of n."""
    whole = density.sample(1600, seed=6)
    for n in (1, 15, 17, 511, 512, 513, 1500):
        own = density.sample(n, seed=6)
        if isinstance(density, CouplingFlow):  # products of other sizes
            torch.testing.assert_close(own, whole[..., :n, :])
        else:
            assert torch.equal(own, whole[:n])
    if isinstance(density, helpers.Density):
        data = [helpers.ToyDataset(density, n, 6).data for n in (700, 1600)]
        assert torch.equal(data[0], data[1][:700])


@each
def test_log_probability_takes_anything_like_an_array(density):
    x = [[0.5, 1.5], [2.0, -1.0]]
    expected = density.log_probability(torch.tensor(x))
    for same in (x, tuple(map(tuple, x)), np.array(x), np.float32(x)):
        assert torch.equal(density.log_probability(same), expected)
    half = np.float16(x)
    table = pd.DataFrame({"a": [0.5, 2], "b": pd.array([1.5, -1], "Float64")})
    sparse = torch.tensor(x).to_sparse()
    for same in (sparse, sparse.to_sparse_csr(), half, half.astype(">f8"),
                 half[::-1][::-1], table, half.astype(object),
                 np.ma.masked_array(half),
                 [torch.tensor(row, requires_grad=True) for row in x],
    ):  # fmt: skip
        assert torch.equal(density.log_probability(same), expected)
    ones = density.log_probability(np.ones((3, 2), dtype=int))
    assert torch.equal(ones, density.log_probability(np.ones((3, 2))))


@pytest.mark.parametrize("name", helpers.DISTRIBUTIONS)
def test_dataset_holds_samples_of_its_distribution(name):
    data = helpers.ToyDataset(name, 300, seed=2, num_gaussians=3)
    assert len(data) == 300 and torch.equal(data[5], data.data[5])
    assert data.data.dtype == torch.float32
    expected = toy_distribution(name, 3).sample(300, seed=2).float()
    assert torch.equal(data.data, expected)


def test_data_weights_training_and_scores_share_no_numbers():
    """Of one seed; each draws from a stream of its own."""
    streams = [0, helpers.WEIGHTS, helpers.TRAINING, helpers.SCORING]
    drawn = [
        torch.rand(999, generator=helpers.random_generator(7, stream))
        for stream in (*streams, helpers.PART)
    ]
    assert len(torch.cat(drawn).unique()) > 4990  # of 2^24
    flow = CouplingFlow(1, seed=7, start="uniform", hidden=128)
    weights = (flow.layers[0].network[0].weight.detach().flatten() + 1) / 2
    own, other = drawn.pop(1)[:128], torch.cat(drawn)
    torch.testing.assert_close(weights, own)
    assert not torch.isin(other, weights).any()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="of x86-64 alone"
)
@pytest.mark.parametrize("given", [{}, {"MKL_CBWR": "AUTO"}])
def test_importing_chooses_the_kernels_that_were_not_chosen(
    monkeypatch, given
):
    names = ("MKL_CBWR", "ATEN_CPU_CAPABILITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(helpers.__file__)
    chosen = [os.environ.get(name) for name in names]
    assert chosen == [given.get("MKL_CBWR", "COMPATIBLE"), "avx2"]


def test_grid_runs_along_x_first():
    grid = helpers.Grid((0, 3), (10, 16), size=3)
    assert grid.x.tolist() == [0.5, 1.5, 2.5]
    assert grid.y.tolist() == [11, 13, 15]
    assert grid.points[:4].tolist() == [
        [0.5, 11], [1.5, 11], [2.5, 11], [0.5, 13]
    ]  # fmt: skip
    assert grid.cell_area == 2 and grid.extent == (0, 3, 10, 16)
    x, y = grid.image(grid.points.T)
    assert (x == grid.x).all() and (y == grid.y[:, None]).all()


@pytest.mark.parametrize("kind", ["truth", "diagonal", "full"])
def test_density_image_is_upright(kind):
    """With origin="lower" row i lies at grid.y[i], column j at grid.x[j]."""
    peak = (1.5, -2.5)
    density = {
        "truth": GaussianMixture([peak], 0.3),
        "diagonal": helpers.GaussianKDE([peak], 0.3),
        "full": helpers.GaussianKDE([peak], [[0.3, 0.1], [0, 0.3]]),
    }[kind]
    grid = helpers.Grid((-4, 4), (-5, 5), 80)
    image = density.density(grid)
    row, column = divmod(image.argmax().item(), 80)
    assert abs(grid.y[row] - peak[1]) <= 5 / 80 + 1e-9
    assert abs(grid.x[column] - peak[0]) <= 4 / 80 + 1e-9


def test_grid_around_is_the_smallest_square_with_its_margin(random):
    samples = random.normal(size=(100, 2)) * (1, 3) + (5, -2)
    grid = helpers.Grid.around(samples, size=10, margin=0.25)
    assert grid.size == 10
    assert helpers.Grid.around([(3, 4)]).extent == (2, 4, 3, 5)
    (x0, x1), (y0, y1) = grid.xlim, grid.ylim
    low, high = samples.min(0), samples.max(0)
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert y1 - y0 == pytest.approx(1.5 * (high - low)[1])
    assert (x0 + x1) / 2 == pytest.approx((low + high)[0] / 2)
    assert (y0 + y1) / 2 == pytest.approx((low + high)[1] / 2)
    tight = helpers.Grid.around(samples, margin=0)
    assert tight.ylim == pytest.approx((low[1], high[1]))


@pytest.mark.parametrize("log_p, drawn, words", [
    (lambda x: x.square().sum(1, keepdim=True), 1, r"log_p\(x\) .* \(5, 1\)"),
    (lambda x: x.sum(), 1, r"log_p\(x\) must return a tensor of shape \(5,\)"),
    (lambda x: x.sum(1).numpy(), 1, "log_p.*got ndarray"),
    (lambda x: x.sum(1), 2, r"draw\(n, generator\) must return .*\(512, 2\)"),
])  # fmt: skip
def test_formulas_of_an_own_density_are_checked(log_p, drawn, words):
    own = helpers.Density()
    own.log_p = log_p
    own.draw = lambda n, generator: torch.zeros(n // drawn, 2).double()
    with pytest.raises(TypeError, match=words):
        own.log_probability(torch.zeros(5, 2))
        own.sample(5)


def test_dataset_is_not_rounded_until_points_are_equal():
    far = helpers.GaussianMixture([[1.7e9, 0]], sigma=300.0)
    with pytest.raises(ValueError, match="float32: take density.sample"):
        helpers.ToyDataset(far, 100)
    assert len(helpers.ToyDataset(far, 1)) == 1
    near = helpers.GaussianMixture([[1.7e3, 0]], sigma=300.0)
    assert helpers.ToyDataset(near, 100).data.dtype == torch.float32
