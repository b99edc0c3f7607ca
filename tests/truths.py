"""Independent truths that several tests compare with."""

import numpy as np
import torch
from scipy import stats

from helpers import CouplingFlow, Grid


def make_flow(K, members=None, coupling="affine", seed=0, size=0.4,
              dtype=torch.float64, **options):  # fmt: skip
    """A flow far from the identity: every parameter plus size * N(0, 1), and
    an outermost map as training sets it."""
    flow = CouplingFlow(K, members, coupling, seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size * noise
        g = flow.outermost
        g.shift += torch.randn(g.shift.shape, generator=generator)
        g.scale *= (torch.randn(g.scale.shape, generator=generator) / 3).exp()
        g.shear += torch.randn(g.shear.shape, generator=generator).tril(-1) / 3
    return flow.to(dtype)


def normal_points(*shape, d=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, d, generator=generator, dtype=dtype)


class Elsewhere(torch.Tensor):
    """A tensor as of Apple's GPU: no float64, unknown to numpy until .cpu()
    is called, and never in one operation with points of the processor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name, leaves = function.__name__, [*args, *(kwargs or {}).values()]
        if name == "cpu":
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].detach().as_subclass(torch.Tensor)
        own = [type(v) is not torch.Tensor or v.dim() == 0 for v in leaves]
        if name in ("double", "numpy", "__array__"):
            raise TypeError(f"no {name} on this device")
        if name != "to" and not all(own):
            raise RuntimeError("expected all tensors on the same device")
        return super().__torch_function__(function, types, args, kwargs)


def jacobian(function, z):
    """y = f(z) and dy/dz by autograd: (..., d) -> (..., d), (..., d, d)."""
    z = z.detach().requires_grad_()
    y = function(z)
    rows = [
        torch.autograd.grad(y[..., i].sum(), z, retain_graph=True)[0]
        for i in range(z.shape[-1])
    ]
    return y.detach(), torch.stack(rows, -2)


def assert_mass_and_moments(density, n=40_000):
    """In any dimension, by importance sampling from a wide Student's t: the
    density's mass is one, and its first and second moments are those of its
    samples, within five standard errors."""
    x = density.sample(n, seed=1).double().numpy()
    d = x.shape[1]
    wide = stats.multivariate_t(x.mean(0), 1.5 * np.cov(x.T), df=5)
    y = wide.rvs(n, random_state=0).reshape(n, d)
    with torch.no_grad():
        p = density.log_probability(y).double().exp().numpy()

    def moments(x):
        pairs = [x[:, i] * x[:, j] for i in range(d) for j in range(i, d)]
        return np.column_stack([np.ones(n), x, *pairs])

    weighted, drawn = moments(y) * (p / wide.pdf(y))[:, None], moments(x)
    error = np.sqrt((weighted.var(0) + drawn.var(0)) / n)
    assert error[0] < 0.03
    assert (abs(weighted.mean(0) - drawn.mean(0)) < 5 * error + 1e-9).all()


def cell_masses(density, grid, fine):
    """The mass of each cell of a grid, by fine x fine midpoints a cell."""
    finer = Grid(grid.xlim, grid.ylim, grid.size * fine)
    p = torch.cat([density.log_probability(x).exp().detach()
                   for x in finer.points.split(2**16)])  # fmt: skip
    blocks = p.double().reshape(grid.size, fine, grid.size, fine)
    return blocks.sum((1, 3)).numpy() * finer.cell_area


def follow(samples, masses, grid):
    """Pearson's chi-square: do samples (n, 2) fall into the grid's cells as
    the masses (size, size) say? Cells that expect fewer than 10, and all
    that lies outside the grid, count as one. It is wrong about a correct
    program once in a million seeds; the seeds are fixed."""
    x, y = np.asarray(samples, dtype=float).T
    counts, _, _ = np.histogram2d(
        y, x, bins=grid.size, range=[grid.ylim, grid.xlim]
    )
    kept = len(x) * masses >= 10
    observed, expected = counts[kept], len(x) * masses[kept]
    statistic = ((observed - expected) ** 2 / expected).sum()
    rest = len(x) - expected.sum()
    if rest >= 10:
        statistic += (len(x) - observed.sum() - rest) ** 2 / rest
    return stats.chi2.sf(statistic, kept.sum()) > 1e-6
