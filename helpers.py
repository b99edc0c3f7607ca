"""Density estimation in any dimension: kernels and coupling flows.

Notation
    x        points, shape (n, d); z the same points in the flow's prior
    S        number of flows in an ensemble, its *members*: (S, n, d). At
             first read with members = None, and drop every S
    H, h     bandwidth matrix, and the number h of H = h I: lengths
    s, t     log-scale and shift of an affine coupling
    K        number of coupling layers; of an estimate, its kernel
    log_det  log |det| of a map's Jacobian at each point

Conventions
    A *density* has ``log_probability(x)``: (n, d) -> (n,) in nats, and
    ``sample(n, seed)``: -> (n, d). Truths, kernel estimates and flows are
    densities, so every score and every plot takes any of them.
    ``forward`` maps z to x (sampling), ``inverse`` x to z (density).
    Randomness is an argument: an int >= 0 or a torch.Generator.
    Truths and kernel estimates compute in float64, flows in their own dtype.
    A bad argument raises ValueError or TypeError before any work is done.
"""

import contextlib
import copy
import math
import os
import platform
from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checks import (
    brief,
    check_bandwidth,
    check_candidates,
    check_choice,
    check_covariances,
    check_finite,
    check_formula,
    check_grid,
    check_index,
    check_integer,
    check_limits,
    check_mask,
    check_members,
    check_names,
    check_number,
    check_points,
    check_samples,
    check_single,
    warn_of_steps,
)

# The same digits on every x86-64 processor: a training amplifies the last
# bit of its sums, and the libraries add in another order on each kind of
# processor unless they are told not to. Set before the first operation; MKL's
# products are slower so. MKL_CBWR=AUTO in the environment has the fast ones.
if platform.machine().lower() in ("x86_64", "amd64"):
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")

LOG_2PI = math.log(2 * math.pi)
PAIRS = 2**16  # of a point and a sample at once, so that they fit the cache
BLOCK = 512  # points drawn at once
SIZES = 1e-6, 1e6  # of what a coupling computes with, in single precision
FLOW_OF = "take CouplingFlow(..., dim={})"  # for points of another dim


# Densities


class Density:
    """What truths and kernel estimates share. A subclass has two formulas,
    ``log_p(x)`` and ``draw(n, generator)``; users call the methods below,
    which check their arguments and bound the memory, once for all."""

    dim = 2
    _chunk = 8192  # points evaluated at once

    def log_probability(self, x):
        """log p(x) in nats. x: (n, d) -> (n,), float64. ValueError unless
        finite."""
        x = check_points(x, dim=self.dim, most=math.inf)
        log_p = in_parts(
            lambda x: check_formula(self.log_p(x), (len(x),), "log_p(x)"),
            x, self._chunk,
        )  # fmt: skip
        # inf - inf, so far away that a squared distance is no number.
        return log_p.where(~log_p.isnan(), -math.inf)

    def sample(self, n, seed=0):
        """n independent points: -> (n, d), float64. Equal seeds give equal
        points, and the first n of a larger sample. ValueError for n < 1."""
        n, generator = check_integer(n, "n"), random_generator(seed)
        return in_blocks(n, lambda size: check_formula(
            self.draw(size, generator), (size, self.dim), "draw(n, generator)"
        ))  # fmt: skip

    def density(self, grid):
        """p on a Grid, in the plane: -> (size, size), row i at grid.y[i];
        flattened, it is in the order of grid.points."""
        points = check_grid(grid, self.dim).points
        return grid.image(self.log_probability(points).exp())


class GaussianMixture(Density):
    """p(x) = mean over k of N(x; means[k], C_k), with C_k = sigma^2 I, or
    covariances[k].

    means: (k, d). Either sigma, a standard deviation > 0 in the data's unit,
    or covariances (k, d, d), positive definite. ValueError otherwise.
    (Silverman 1986, section 4.2)
    """

    def __init__(self, means, sigma=None, covariances=None):
        self.means = check_points(means, "means").clone()
        self.dim, self.sigma = self.means.shape[1], sigma
        self._chunk = max(1, PAIRS // len(self.means))
        if (sigma is None) == (covariances is None):
            raise ValueError(
                "give either sigma or covariances, "
                f"got {brief(sigma)} and {brief(covariances)}"
            )
        if covariances is None:
            one = torch.eye(self.dim, dtype=torch.float64)
            self.roots = check_number(sigma, "sigma") * one.expand(
                len(self.means), -1, -1
            )
        else:
            self.roots = check_covariances(covariances, *self.means.shape)

    def log_p(self, x):
        away = (x - self.means[:, None]).mT  # (k, d, n)
        u = torch.linalg.solve_triangular(self.roots, away, upper=False)
        log_det = self.roots.diagonal(dim1=1, dim2=2).log().sum(1)
        log_k = -u.square().sum(1) / 2 - log_det[:, None]
        norm = self.dim / 2 * LOG_2PI + math.log(len(self.means))
        return torch.logsumexp(log_k, 0) - norm

    def draw(self, n, generator):
        k = torch.randint(len(self.means), (n,), generator=generator)
        noise = normal(n, self.dim, generator)
        return self.means[k] + (self.roots[k] @ noise[..., None])[..., 0]


class Spiral(Density):
    """theta ~ U[0, 4 pi], r ~ N(theta / 2, sigma^2),
    x = r (cos theta, sin theta).

    sigma: standard deviation of r, > 0; the homework's 0.25 is its square.
    A point at radius rho and angle phi is reached from theta = phi + 2 pi k
    with r = rho and from theta = phi + pi + 2 pi k with r = -rho; the polar
    Jacobian divides by rho, so the log-density is +inf at the origin.
    (Change of variables; derived in notebook 01)
    """

    def __init__(self, sigma=0.5):
        self.sigma = check_number(sigma, "sigma")

    def log_p(self, x):
        rho, phi = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
        turn = 2 * math.pi
        out, back = phi.remainder(turn), (phi + math.pi).remainder(turn)
        theta = torch.stack([out, out + turn, back, back + turn], 1)
        r = torch.stack([rho, rho, -rho, -rho], 1)
        u = (r - theta / 2) / self.sigma
        norm = LOG_2PI / 2 + math.log(4 * math.pi * self.sigma)
        return torch.logsumexp(-u.square() / 2, 1) - norm - rho.log()

    def draw(self, n, generator):
        theta = 4 * math.pi * uniform(n, generator)
        r = theta / 2 + self.sigma * normal(n, 2, generator)[:, 0]
        return r[:, None] * on_circle(theta)


class Circles(Density):
    """Uniform angle on radius 1 or 0.8, equally likely, plus N(0, sigma^2 I).

    sigma > 0. A circle of radius R blurred by a Gaussian has the density
    exp(-(rho^2 + R^2) / 2 sigma^2) I0(rho R / sigma^2) / (2 pi sigma^2),
    with the Bessel function I0. (Rice 1945)
    """

    radii = (1.0, 0.8)

    def __init__(self, sigma=0.1):
        self.sigma = check_number(sigma, "sigma")

    def log_p(self, x):
        radii, var = x.new_tensor(self.radii), self.sigma**2
        rho = x.square().sum(1, keepdim=True).clamp(min=1e-300).sqrt()
        log_i0 = torch.special.i0e(rho * radii / var).log()  # times e^-...
        log_ring = log_i0 - (rho - radii).square() / (2 * var)
        norm = LOG_2PI + math.log(len(radii) * var)
        return torch.logsumexp(log_ring, 1) - norm

    def draw(self, n, generator):
        radii = torch.tensor(self.radii, dtype=torch.float64)
        radius = radii[torch.randint(len(radii), (n,), generator=generator)]
        ring = radius[:, None] * on_circle(2 * math.pi * uniform(n, generator))
        return ring + self.sigma * normal(n, 2, generator)


class Moons(Density):
    """(cos t, sin t) or (1 - cos t, 1/2 - sin t), equally likely, with
    t ~ U[0, pi], plus N(0, sigma^2 I).

    sigma > 0. The integral over t is taken by Gauss-Legendre quadrature on
    panels of 64 nodes, 0.2 / sigma of them: 2 at the homework's sigma of 0.1.
    Its relative error is below 1e-11 on [-3, 4] x [-3, 3]; at a distance R
    the integrand is sigma / sqrt(R) wide, so that log p is good to 2e-5 of
    its size everywhere. (Press et al., Numerical Recipes, section 4.6)
    """

    def __init__(self, sigma=0.1):
        self.sigma = check_number(sigma, "sigma", above=1e-5)  # memory
        panels = math.ceil(0.2 / self.sigma)
        u, weights = np.polynomial.legendre.leggauss(64)
        share = (np.arange(panels)[:, None] + (u + 1) / 2).ravel() / panels
        self._arc = on_circle(torch.from_numpy(math.pi * share))
        weights = np.tile(weights / 2 / panels, panels)
        self._log_weights = torch.from_numpy(np.log(weights))
        self._chunk = max(1, 4 * PAIRS // len(weights))

    def log_arc(self, x):
        """log of the mean over t of N(x; (cos t, sin t), sigma^2 I)."""
        d2 = squared_distances(x.T, self._arc.T)
        log_terms = self._log_weights - d2 / (2 * self.sigma**2)
        norm = LOG_2PI + 2 * math.log(self.sigma)
        return torch.logsumexp(log_terms, 1) - norm

    def log_p(self, x):
        mirrored = x.new_tensor([1, 0.5]) - x
        both = torch.logaddexp(self.log_arc(x), self.log_arc(mirrored))
        return both - math.log(2)

    def draw(self, n, generator):
        lower = torch.randint(2, (n, 1), generator=generator) == 1
        arc = on_circle(math.pi * uniform(n, generator))
        moon = torch.where(lower, arc.new_tensor([1, 0.5]) - arc, arc)
        return moon + self.sigma * normal(n, 2, generator)


def on_circle(angle):
    """(cos, sin) of an angle: (...,) -> (..., 2)."""
    return torch.stack([angle.cos(), angle.sin()], -1)


DISTRIBUTIONS = {  # name: the density with k = num_gaussians
    "Circles": lambda k: Circles(),
    "Moons": lambda k: Moons(),
    "GaussiansGrid": lambda k: GaussianMixture(
        [(0, 0), (0, 2), (2, 0), (2, 2)], sigma=0.5
    ),
    "GaussiansRot": lambda k: GaussianMixture(
        2.5 * on_circle(2 * math.pi * torch.arange(k).double() / k),
        sigma=math.sqrt(0.1),
    ),
}


def toy_distribution(name, num_gaussians=5):
    """The density called 'Circles', 'Moons', 'GaussiansGrid' (four Gaussians,
    sigma 1/2) or 'GaussiansRot' (num_gaussians of them at equal angles on
    radius 2.5, variance 0.1; the others do not use that number).

    ValueError for an unknown name, which lists the known ones.
    """
    check_choice(name, "dist_type", DISTRIBUTIONS)
    return DISTRIBUTIONS[name](check_integer(num_gaussians, "num_gaussians"))


class ToyDataset(torch.utils.data.Dataset):
    """num_samples points of toy_distribution(dist_type, num_gaussians), or
    of dist_type itself where that is a Density.

    .data: (num_samples, d) float32. .distribution: the density they were
    drawn from.
    """

    def __init__(self, dist_type, num_samples=1000, seed=0, num_gaussians=5):
        own = isinstance(dist_type, Density)
        self.distribution = (
            dist_type if own else toy_distribution(dist_type, num_gaussians)
        )
        n = check_integer(num_samples, "num_samples")
        self.data = check_single(self.distribution.sample(n, seed))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Grid:
    """size x size cells on xlim x ylim, known by their centres.

    xlim, ylim: (low, high) with low < high. .x, .y: (size,) centres.
    .points: (size^2, 2), x running fastest. .cell_area: p.sum() * cell_area
    approximates a mass. .extent: for imshow with origin="lower".
    """

    def __init__(self, xlim, ylim, size=100):
        self.size = size = check_integer(size, "size")
        self.xlim = check_limits(xlim, "xlim", size)
        self.ylim = check_limits(ylim, "ylim", size)
        cells = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        self.x, self.y = (
            low + (high - low) * cells for low, high in (self.xlim, self.ylim)
        )
        self.points = torch.cartesian_prod(self.y, self.x).flip(1)
        self.extent = (*self.xlim, *self.ylim)
        x0, x1, y0, y1 = self.extent
        self.cell_area = (x1 - x0) * (y1 - y0) / size**2

    @classmethod
    def around(cls, samples, size=100, margin=0.15):
        """The smallest square that holds the samples (n, 2), widened by
        margin times its side at each end."""
        samples = check_points(samples, "samples", 2)
        margin = check_number(margin, "margin", 0, or_equal=True)
        low, high = samples.amin(0), samples.amax(0)
        half = (high - low).amax().item() * (0.5 + margin) or 1.0
        cx, cy = ((low + high) / 2).tolist()
        return cls((cx - half, cx + half), (cy - half, cy + half), size)

    def image(self, values):
        """Values at .points, (..., size^2) -> (..., size, size): row i lies
        at y[i]. ValueError for another number of values."""
        if np.shape(values)[-1:] != (self.size**2,):
            raise ValueError(
                f"values must have shape (..., {self.size**2}), "
                f"got {tuple(np.shape(values))}"
            )
        return values.reshape(*values.shape[:-1], self.size, self.size)


# Kernel density estimation


class GaussianKDE(Density):
    """f(x) = 1 / (N |H|) sum over i of K(H^-1 (x_i - x)), K Gaussian.

    samples: (N, d). H: a number h > 0, meaning h I, or an invertible d x d
    matrix, in the data's unit of length: H = h I is a kernel of standard
    deviation h. ValueError for a singular H. (Silverman 1986, section 4.2)

    >>> samples = toy_distribution("Moons").sample(1000, seed=0)
    >>> kde = GaussianKDE(samples, H=0.1)
    >>> kde.log_probability([(0, 1), (0, 0)]).shape
    torch.Size([2])
    >>> kde.density(Grid((-2, 3), (-2, 2.5))).shape
    torch.Size([100, 100])
    """

    def __init__(self, samples, H):
        self.samples = check_points(samples, "samples").clone()
        self.dim = self.samples.shape[1]
        self.H = check_bandwidth(H, self.dim)
        self._centre = self.samples.mean(0)  # keeps digits far from 0
        self._scaled = self.scale(self.samples)
        log_det_H = torch.linalg.slogdet(self.H).logabsdet
        log_N = math.log(len(self.samples))
        self._log_norm = self.dim / 2 * LOG_2PI + log_det_H + log_N
        self._chunk = max(1, PAIRS // len(self.samples))

    def scale(self, x):
        """H^-1 x, from the samples' centre: (n, d) -> (d, n)."""
        return torch.linalg.solve(self.H, (x - self._centre).T)

    def log_p(self, x):
        d2 = squared_distances(self.scale(x), self._scaled)
        return log_kernel_sum(d2) - self._log_norm

    def draw(self, n, generator):
        i = torch.randint(len(self.samples), (n,), generator=generator)
        return self.samples[i] + normal(n, self.dim, generator) @ self.H.T

    def density(self, grid):
        """f on a Grid: -> (size, size) as Density.density, exact and fast.

        When H H^T is diagonal the kernel is a product k(x) k(y), and the
        sum over samples is the product of two (size, N) kernel matrices:
        2 size N exponentials in place of size^2 N.
        """
        check_grid(grid, self.dim)
        covariance = self.H @ self.H.T
        if covariance[0, 1] != 0:
            return super().density(grid)
        hx, hy = covariance.diagonal().sqrt()
        cx, cy = self._centre
        total = torch.zeros(grid.size, grid.size, dtype=torch.float64)
        with one_thread():
            for part in self.samples.split(max(1, PAIRS // grid.size)):
                along_x = kernel_matrix(grid.x - cx, part[:, 0] - cx, hx)
                along_y = kernel_matrix(grid.y - cy, part[:, 1] - cy, hy)
                total += along_y @ along_x.T
        return total / (2 * math.pi * hx * hy * len(self.samples))


def kernel_matrix(centres, samples, h):
    """exp(-(c - x)^2 / 2 h^2) for all pairs: (g,), (N,) -> (g, N).

    Under exp(-350) it counts as 0: a product of two such values would be a
    denormal number, which processors handle slowly.
    """
    unit = h * math.sqrt(2)
    exponent = ((centres / unit)[:, None] - samples / unit).square_().neg_()
    return F.threshold_(exponent, -350.0, -math.inf).exp_()


def squared_distances(a, b):
    """|a_i - b_j|^2 of points given as columns: (d, n), (d, m) -> (n, m)."""
    total = 0
    for u, v in zip(a, b, strict=True):
        total = (u[:, None] - v).square_().add_(total)
    return total


def log_kernel_sum(d2):
    """log of the sum over j of exp(-d2[i, j] / 2): (n, m) -> (n,).

    Relative to the nearest sample, so that far points do not underflow;
    terms below exp(-350) of the nearest one's are raised to that.
    """
    nearest = d2.amin(1, keepdim=True)
    terms = torch.sub(nearest / 2, d2, alpha=0.5).clamp_(min=-350.0).exp_()
    return terms.sum(1).log() - nearest[:, 0] / 2


def reference_bandwidth(samples):
    """Silverman's rule h = scale (4 / ((d + 2) N))^(1 / (d + 4)): -> float,
    in the data's unit.

    samples: (N >= 2, d). In the plane it is Scott's rule, scale N^(-1/6).
    The scale of a coordinate is the smaller of its standard deviation and
    its interquartile range / 1.349, so that an outlier does not widen it;
    all coordinates are averaged. ValueError for fewer than two samples, or
    if all are equal. (Silverman 1986, section 4.3.2; Scott 2015, section 6.3)
    """
    samples = check_samples(samples)
    low, high = np.quantile(samples.numpy(), [0.25, 0.75], axis=0)
    quartiles = samples.new_tensor((high - low) / 1.349)
    scale = samples.std(0)
    robust = torch.minimum(scale, quartiles)
    scale = torch.where(quartiles > 0, robust, scale).mean().item()
    N, d = samples.shape
    return scale * (4 / (d + 2)) ** (1 / (d + 4)) * N ** (-1 / (d + 4))


def leave_one_out(samples, candidates):
    """Mean leave-one-out log-likelihood in nats of each bandwidth:
    samples (N >= 2, d), candidates (k,) > 0 -> (k,).

    For each h the mean over i of log f_-i(x_i), where f_-i is the estimate
    with H = h I from all samples but x_i. ValueError as select_bandwidth.
    (Habbema, Hermans, van den Broek 1974; Duin 1976)
    """
    return left_out_log_p(samples, candidates).mean(1)


def left_out_log_p(samples, candidates, most=None):
    """log f_-i(x_i) in nats: samples (N, d), candidates (k,) -> (k, N); or
    of so many i at most, drawn at random, the same ones in every call.

    A sample that equals x_i, as in rounded tables, is left out with it, as if
    it gave 0: else h -> 0 would win.
    """
    samples = check_samples(samples)
    widths = check_candidates(candidates)
    points, (N, d) = samples - samples.mean(0), samples.shape

    def sums(part):
        """Of its kernels, relative to the nearest sample's, and how far that
        is: (n, d) -> (n, k + 1)."""
        d2 = squared_distances(part.T, points.T)
        d2[d2 == 0] = math.inf  # leaves i itself out
        nearest = d2.amin(1, keepdim=True)
        kernels = kernels_of(widths, d2.sub_(nearest).div_(-2))
        return torch.stack([*(K.sum(1) for K in kernels), nearest[:, 0]], 1)

    some = points[some_of(N, most or N)]
    *own, nearest = in_parts(sums, some, max(1, PAIRS // N)).T.contiguous()
    h = torch.tensor(widths, dtype=torch.float64)[:, None]
    log_sum = torch.stack(own).log() - nearest / (2 * h**2)
    return log_sum - d * h.log() - (d / 2 * LOG_2PI + math.log(N - 1))


def kernels_of(widths, exponent):
    """exp(exponent / h^2), or exp(-350) where it is less, for each h in turn:
    where h is the one two before divided by sqrt(2), the square of that one's,
    in its place, so that no exponential is taken."""
    kernels = []
    for k, h in enumerate(widths):
        two_before = widths[k - 2] if k > 1 else math.inf
        if math.isclose(two_before, h * math.sqrt(2), rel_tol=1e-14):
            kernels.append(kernels.pop(0).square_())
        else:
            own = (exponent / h**2).clamp_(min=-350.0).exp_()
            kernels = [*kernels[-1:], own]
        yield kernels[-1]


def some_of(N, most):
    """At most so many of the integers below N, drawn at random: rows may
    come in turns, so that every tenth is of one kind."""
    order = torch.randperm(N, generator=random_generator(0, PART))
    return order[:most] if N > most else torch.arange(N)


def select_bandwidth(samples, candidates=None):
    """The bandwidth h with the best leave-one-out likelihood: -> float.

    samples: (N >= 2, d), in columns of like units, since one h serves all;
    of more than 2000 the likelihood is that of 2000, drawn at random, under
    the estimate from all others. candidates: bandwidths > 0; by default 16 of
    ratio 2^(1/4), downwards from 1.2 times reference_bandwidth(samples), and
    more where the smallest or the largest is best.
    ValueError if there are fewer than two samples, all are equal, or there
    is no candidate.
    """
    samples = check_samples(samples)
    h = best_left_out(samples, candidates)[0]
    warn_of_steps(samples, [h] * samples.shape[1], "samples", stacklevel=2)
    return h


def best_left_out(samples, candidates=None):
    """select_bandwidth(...), and log f_-i(x_i) with it."""
    if candidates is not None:
        candidates = check_candidates(candidates)
        log_p = left_out_log_p(samples, candidates, 2000)
        best = log_p.mean(1).argmax()
        return candidates[best], log_p[best]
    ladder = 1.2 * 2.0 ** (-np.arange(16) / 4) * reference_bandwidth(samples)
    way = 0
    for _ in range(4):  # the ladder goes on, up or down, where its end is best
        log_p = left_out_log_p(samples, ladder, 2000)
        best = int(log_p.mean(1).argmax())
        h, onwards = float(ladder[best]), {0: 1, 15: -1}.get(best, 0)
        if onwards in (0, -way):
            break
        way, ladder = onwards, ladder * 2.0 ** (onwards * 15 / 4)
    return h, log_p[best]


def sharpen(samples, h, step=1.0, around=None):
    """Each sample moved towards the mean of the samples around it:
    (N, d) -> (N, d), float64.

    x_i' = x_i + step (m(x_i) - x_i), where m(x) is the mean of the samples
    x_j, or of the points `around`, weighted by K((x_j - x) / h). m(x) - x is
    h^2 times the gradient of log f, so the move undoes the kernel's own
    spread. step = 1/2 does so as h -> 0: the estimate of width h on the moved
    samples then has a bias of order h^4 in place of h^2. step = 1 does so
    for a Gaussian of standard deviation 1.27 h, which is nearer where an
    estimate has to be good. h, step > 0.
    (Fukunaga, Hostetler 1975, mean shift; Choi, Hall 1999, data sharpening)
    """
    samples, h = check_points(samples, "samples"), check_number(h, "h")
    step = check_number(step, "step")
    d = samples.shape[1]
    others = samples if around is None else check_points(around, "around", d)
    centre, size = others.mean(0), max(1, PAIRS // len(others))
    points = (others - centre).T

    def mean_around(part):
        exponent = squared_distances(part.T, points).div_(-2 * h**2)
        weights = exponent.clamp_(min=-350.0).exp_()
        return weights @ points.T / weights.sum(1, keepdim=True)

    mean = in_parts(mean_around, samples - centre, size)
    return samples + step * (mean + centre - samples)


class LocalKDE(Density):
    """A kernel estimate with a width of its own on each sample: h_i is c
    times the distance of x_i to its k-th neighbour, H_i = h_i I.

    samples: (N >= 2, d), in columns of like units. neighbours: k >= 1, at
    most N - 1. c: the one of 17 from 1/8 to 2 with the best leave-one-out
    likelihood, on 2000 samples at most. The work of finding neighbours grows
    with N^2. ValueError as GaussianKDE. (Breiman, Meisel, Purcell 1977;
    Abramson 1982)
    """

    def __init__(self, samples, neighbours=30):
        self.samples = check_samples(samples).clone()
        N, self.dim = self.samples.shape
        k = min(check_integer(neighbours, "neighbours"), N - 1)
        self._chunk = max(1, PAIRS // N)
        self._log_norm = self.dim / 2 * LOG_2PI + math.log(N)
        self._centre = self.samples.mean(0)
        with one_thread():
            d2 = in_parts(
                lambda x: self.d2(x).kthvalue(k + 1).values,
                self.samples, self._chunk,
            )  # fmt: skip
            if not d2.max() > 0:
                raise ValueError(
                    f"samples must differ, got all equal to {k} others: take "
                    "more neighbours"
                )
            self.widths = d2.clamp(min=d2[d2 > 0].min()).sqrt()
            ladder = 2.0 ** (1 - np.arange(17) / 4)
            best = self.left_out(ladder).sum(0).argmax()
            self.widths *= ladder[best].item()

    def left_out(self, factors):
        """log f_-i(x_i), less what all have, of 2000 samples at most, with
        widths so many times as wide: (k,) -> (n, k)."""
        least = self.widths.min()
        weights = (self.widths / least) ** -self.dim

        def log_sums(x):
            d2 = self.d2(x)
            d2[d2 == 0] = math.inf  # leaves i itself out
            exponent = d2.div_(-2 * self.widths**2)
            top = exponent.amax(1, keepdim=True)
            kernels, own = kernels_of(factors, exponent - top), []
            for c, kernel in zip(factors, kernels, strict=True):
                log_sum = (kernel @ weights).log() + top[:, 0] / c**2
                own.append(log_sum - self.dim * math.log(c * least))
            return torch.stack(own, 1)

        some = self.samples[some_of(len(self.samples), 2000)]
        return in_parts(log_sums, some, self._chunk)

    def d2(self, x):
        """Squared distances from x to the samples: (n, d) -> (n, N)."""
        ends = (x - self._centre).T, (self.samples - self._centre).T
        return squared_distances(*ends)

    def log_p(self, x):
        d2 = self.d2(x).div_(self.widths**2)
        d2 += 2 * self.dim * self.widths.log()
        return log_kernel_sum(d2) - self._log_norm

    def draw(self, n, generator):
        i = torch.randint(len(self.samples), (n,), generator=generator)
        noise = normal(n, self.dim, generator)
        return self.samples[i] + self.widths[i, None] * noise


# Coupling flows


class CouplingLayer(nn.Module):
    """x1 = z1, x2 = g(z2; network(z1)), with g increasing in each coordinate:
    what the mask keeps passes, and shapes the rest.

    mask: d ones (kept) and zeros, the ones first or last: [1, 0] keeps the
    first of two coordinates. coupling: "affine", g = exp(s) z2 + t with both
    s and t from the network, or "spline". members: None, or S independent
    layers in one. seed: an int, or generators to go on drawing from. hidden,
    start: see make_network. options: bound, or bins and interval, of the
    coupling. (Dinh et al. 2017, section 3; Durkan et al. 2019)"""

    def __init__(
        self, mask, members=None, coupling="affine", seed=0, hidden=32,
        start="spread", **options,
    ):  # fmt: skip
        super().__init__()
        self.mask, members = check_mask(mask), check_members(members)
        self.coupling = make_coupling(coupling, members, options)
        kept, moved = self.mask.count(1), self.mask.count(0)
        sizes = kept, hidden, moved * self.coupling.outputs
        self.network = make_network(*sizes, members, seed, start)

    def forward(self, z):
        """x and log |det dx/dz|: (..., n, d) -> (..., n, d), (..., n)."""
        z1, z2 = self.split(z)
        x2, log_slope = self.coupling.forward(z2, self.network(z1))
        return self.merge(z1, x2), log_slope.sum(-1)

    def inverse(self, x):
        """z and log |det dz/dx|, likewise."""
        x1, x2 = self.split(x)
        z2, log_slope = self.coupling.inverse(x2, self.network(x1))
        return self.merge(x1, z2), log_slope.sum(-1)

    def split(self, x):
        """What passes and what moves, cut where the mask changes:
        (..., d) -> (..., j), (..., d - j)."""
        parts = x.tensor_split([self.mask.index(1 - self.mask[0])], -1)
        return parts if self.mask[0] else parts[::-1]

    def merge(self, x1, x2):
        x1 = x1.expand(*x2.shape[:-1], -1)
        return torch.cat((x1, x2) if self.mask[0] else (x2, x1), -1)


class Coupling(nn.Module):
    """What a coordinate goes through. Made with members and its options, its
    learnt numbers by per_member. If it has a number that is not learnt, `size`
    is its name: it is saved with a flow's weights, which without it mean
    another density."""

    size = None

    def get_extra_state(self):
        number = getattr(self, self.size) if self.size else None
        return torch.tensor(number or 0.0).double()

    def set_extra_state(self, state):
        if self.size:
            setattr(self, self.size, state.item() or None)


class AffineCoupling(Coupling):
    """z -> exp(s) z + t, whose log-slope is s, for each coordinate alone.

    bound: s = bound tanh(raw / bound), which cannot exceed it; None leaves
    it free, times a learnt number that starts at 0 (the course's layer)."""

    outputs, size = 2, "bound"  # for each coordinate s and t

    def __init__(self, members=None, bound=2.5):
        super().__init__()
        self.bound = bound
        if bound is not None:
            check_number(bound, "bound", *SIZES)
        else:
            self.gain = per_member(members, 1, 1)

    def forward(self, z, outputs):
        s, t = self.s_and_t(outputs)
        return s.exp() * z + t, s

    def inverse(self, x, outputs):
        s, t = self.s_and_t(outputs)
        return (x - t) * (-s).exp(), -s

    def s_and_t(self, outputs):
        raw, t = outputs.chunk(2, -1)
        if self.bound is None:
            return self.gain * raw, t
        return self.bound * torch.tanh(raw / self.bound), t


class Linear(nn.Module):
    """x W + b, a point a row: (..., n, in) -> (..., n, out).

    The one place where members change what is computed: W is (in, out), or
    (S, in, out), and then x is (n, in), for all alike, or (S, n, in)."""

    def __init__(self, fan_in, fan_out, members=None):
        super().__init__()
        self.weight = per_member(members, fan_in, fan_out)
        self.bias = per_member(members, 1, fan_out)

    def forward(self, x):
        if self.weight.dim() == 2:
            return x @ self.weight + self.bias
        x = x.expand(len(self.weight), -1, -1)
        return torch.baddbmm(self.bias, x, self.weight)


def per_member(members, *shape):
    lead = () if members is None else (members,)
    return nn.Parameter(torch.zeros(*lead, *shape))


def make_network(inputs, hidden, outputs, members, seed, start):
    """inputs -> hidden -> hidden -> outputs, with LeakyReLU in between.

    start: "uniform", weights within 1 / sqrt(inputs), as torch does; "spread"
    changes three things: the kinks of the first map's units lie evenly over
    the data, up to 2.5 from the origin; the second map keeps its inputs' size
    (He et al. 2015); and the last is scaled by 0.05, so that a flow starts
    near the identity. Each member draws from its own generator.
    """
    check_integer(hidden, "hidden")
    check_choice(start, "start", ("spread", "uniform"))
    first = Linear(inputs, hidden, members)
    second = Linear(hidden, hidden, members)
    last = Linear(hidden, outputs, members)
    generators = random_generators(seed, members or 1, WEIGHTS)
    for linear in (first, second, last):
        limit = linear.weight.shape[-2] ** -0.5
        for p in (linear.weight, linear.bias):
            rows = p.data.view(len(generators), -1)
            for row, generator in zip(rows, generators, strict=True):
                row.uniform_(-limit, limit, generator=generator)
    if start == "spread":
        first.weight.data.sign_().mul_(inputs**-0.5)  # columns of length 1
        first.bias.data *= 2.5 * inputs**0.5  # within 2.5
        second.weight.data *= math.sqrt(6)  # within sqrt(6 / hidden)
        last.weight.data *= 0.05
        last.bias.data *= 0.05
    act = nn.LeakyReLU(inplace=True)
    return nn.Sequential(first, act, second, act, last)


class AffineMap(nn.Module):
    """x = shift + scale (shear u), and what a flow's layers work in is u. The
    shear is a lower triangle with ones on its diagonal: the identity, unless
    columns go together. Nothing is learnt: `train` sets all, from the data.
    rest is what rounding to the dtype of the weights takes from the shift."""

    def __init__(self, dim, members=None):
        super().__init__()
        lead = () if members is None else (members,)
        for name, value in (("shift", 0.0), ("rest", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((*lead, 1, dim), value))
        self.register_buffer("shear", torch.eye(dim).repeat(*lead, 1, 1))

    def set(self, shift, scale, shear=None):
        self.set_shift(torch.as_tensor(shift, dtype=torch.float64))
        self.scale.copy_(torch.as_tensor(scale))
        one = torch.eye(self.scale.shape[-1])
        self.shear.copy_(one if shear is None else shear)
        return self

    def set_shift(self, shift):  # in float64
        self.shift.copy_(shift)
        self.rest.copy_(shift - self.shift.cpu().double())

    def _apply(self, *to, **options):  # .float() and the like
        shift = self.shift.cpu().double() + self.rest.cpu().double()
        super()._apply(*to, **options).set_shift(shift)
        return self

    def _load_from_state_dict(self, state, prefix, *about):
        super()._load_from_state_dict(state, prefix, *about)
        parts = [state.get(prefix + name) for name in ("shift", "rest")]
        if None not in parts and parts[0].shape == self.shift.shape:
            self.set_shift(sum(part.cpu().double() for part in parts))

    def forward(self, u):
        """x and log |det dx/du|: (..., n, d) -> (..., n, d), (..., n)."""
        x = self.shift + (self.rest + self.scale * (u @ self.shear.mT))
        return x, self.scale.log().sum(-1).expand(x.shape[:-1])

    def inverse(self, x):
        """u and log |det du/dx|, likewise; in the precision of x, since far
        from 0 the digits that count are lost once x is rounded."""
        x = x.to(torch.promote_types(x.dtype, self.shift.dtype))
        scale = self.scale.to(x)
        u = (x - self.shift.to(x) - self.rest.to(x)) / scale
        u = torch.linalg.solve_triangular(
            self.shear.to(x).mT, u, upper=True, left=False, unitriangular=True
        )
        return u, -scale.log().sum(-1).expand(u.shape[:-1])


class CouplingFlow(nn.Module):
    """x = a(f_K(... f_1(z))), z ~ N(0, I): coupling layers, of which the first
    keeps the first half of the coordinates, the next the rest, and so on; and
    an affine map, a, which does nothing until `train` sets it.

    members: S flows at once; member i of seed s is the flow of seed s + i.
    dim: d >= 2. options: as CouplingLayer's. float32; after .double() float64,
    which samples need where data lie a million times their spread from 0.
    Points: (n, d) or (S, n, d), finite or ValueError. (Dinh et al. 2017)

    >>> flow = CouplingFlow(4, coupling="spline", seed=0)
    >>> z, log_det = flow.inverse(flow.sample(5, seed=1))
    >>> flow.log_probability(flow.forward(z)[0]).shape
    torch.Size([5])
    """

    def __init__(
        self, num_layers, members=None, coupling="affine", seed=0, dim=2,
        **options,
    ):  # fmt: skip
        super().__init__()
        K = check_integer(num_layers, "num_layers")
        self.members = check_members(members)
        self.dim, j = check_integer(dim, "dim", at_least=2), dim // 2
        masks = [[1] * j + [0] * (dim - j), [0] * j + [1] * (dim - j)]
        generators = random_generators(seed, members or 1, WEIGHTS)
        self.layers = nn.ModuleList(
            CouplingLayer(mask, members, coupling, generators, **options)
            for mask in (masks * K)[:K]
        )
        self.outermost = AffineMap(dim, members)

    def forward(self, z):
        """x and log |det dx/dz|: (n, d) -> (n, d), (n,). With members (n, d)
        or (S, n, d) -> (S, n, d), (S, n)."""
        x, log_det = self.cast(self.check(z, "z"), "z"), 0
        with one_thread():
            for f in (*self.layers, self.outermost):
                x, own = f.forward(x)
                log_det = log_det + own
        return x, log_det

    def inverse(self, x):
        """z = f^-1(x) and log |det dz/dx|, with shapes as in forward."""
        with one_thread():
            u, log_det = self.outermost.inverse(self.check(x, "x"))
            z, log_det = self.cast(u, "x"), log_det.to(self.outermost.shift)
            for layer in reversed(self.layers):
                z, own = layer.inverse(z)
                log_det = log_det + own
        return z, log_det

    def log_probability(self, x):
        """log N(f^-1(x); 0, I) + log |det dz/dx| in nats: -> (n,), (S, n)."""
        z, log_det = self.inverse(x)
        return log_det - z.square().sum(-1) / 2 - self.dim / 2 * LOG_2PI

    @torch.no_grad()
    def density(self, grid):
        """p on a Grid, in the plane: -> (size, size), or (S, size, size)."""
        points = check_grid(grid, self.dim).points
        return grid.image(self.log_probability(points).exp())

    def sample(self, n, seed=0):
        """n points: -> (n, d), or (S, n, d), all members from the same z."""
        return self.sample_x_each_layer(n, seed)[-1]

    @torch.no_grad()
    def sample_x_each_layer(self, n, seed=0):
        """The prior's sample and its image after each layer, the last one in
        the data's unit: a list of K + 1 tensors (n, d), or (S, n, d)."""
        n, generator = check_integer(n, "n"), random_generator(seed)
        z = in_blocks(n, lambda size: normal(size, self.dim, generator))
        z = self.cast(z, "z")
        path = [z if self.members is None else z.expand(self.members, -1, -1)]
        with one_thread():
            for layer in self.layers:
                path.append(layer.forward(path[-1])[0])
            path[-1] = self.outermost.forward(path[-1])[0]
        return path

    def member(self, i):
        """Member i as a flow of its own, with a copy of its weights."""
        check_index(i, "i", self.members or 1)
        single = copy.deepcopy(self)
        if self.members is not None:
            single.members = None
            for tensor in (*single.parameters(), *single.buffers()):
                tensor.data = tensor.data[i].clone()
        return single

    def check(self, points, name):  # as they are: shifted, then rounded
        return check_points(points, name, self.dim, None, None, self.members,
                            hint=FLOW_OF)  # fmt: skip

    def cast(self, points, name):  # to the dtype and device of the weights
        return check_finite(points.to(self.outermost.shift), name, points)


class SplineCoupling(Coupling):
    """A monotone spline of `bins` rational-quadratic pieces on [-interval,
    interval], and the identity outside, for each coordinate alone. Within a
    piece u is the share of its width, part that of its height.

    The network gives the pieces' widths and heights (a softmax) and the
    slopes at the inner knots; the slope at both ends is 1. Every width and
    height is MIN_SHARE of an equal share or more, and every slope at a knot
    between exp(-MAX_LOG_SLOPE) and exp(MAX_LOG_SLOPE), which keeps the inverse
    well conditioned; within a piece the slope may lie outside. (Durkan et al.
    2019, equations 4 to 8)
    """

    MIN_SHARE, MAX_LOG_SLOPE = 0.16, 2.0
    size = "interval"

    def __init__(self, members=None, bins=16, interval=5.0):
        super().__init__()
        self.bins = bins = check_integer(bins, "bins", at_least=2)
        if bins > 64:
            raise ValueError(f"bins must be at most 64, got {bins}")
        self.interval = check_number(interval, "interval", *SIZES)
        self.outputs = 3 * bins - 1

    def forward(self, z, outputs):
        inside, unit = self.unit(z)
        x0, y0, width, height, d0, d1 = self.piece(unit, outputs, False)
        ratio, u = height / width, ((unit - x0) / width).clamp(0, 1)
        v, curve = u * (1 - u), d0 + d1 - 2 * ratio
        part = (ratio * u.square() + d0 * v) / (ratio + curve * v)  # (4)
        bent = (y0 + height * part) * self.interval
        log_slope = self.log_slope(u, ratio, d0, d1)
        return bent.where(inside, z), log_slope.where(inside, 0 * z)

    def inverse(self, x, outputs):
        inside, unit = self.unit(x)
        x0, y0, width, height, d0, d1 = self.piece(unit, outputs, True)
        ratio, part = height / width, (unit - y0) / height
        curve = part * (d0 + d1 - 2 * ratio)
        a, b, c = ratio - d0 + curve, d0 - curve, -ratio * part  # (6) to (8)
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        # The root in [0, 1], by the form that does not cancel.
        u = torch.where(b < 0, root - b, -2 * c)
        u = (u / torch.where(b < 0, 2 * a, b + root)).clamp(0, 1)
        straight = (x0 + width * u) * self.interval
        log_slope = -self.log_slope(u, ratio, d0, d1)
        return straight.where(inside, x), log_slope.where(inside, 0 * x)

    def log_slope(self, u, ratio, d0, d1):  # (5)
        v, curve = u * (1 - u), d0 + d1 - 2 * ratio
        rise = d1 * u.square() + 2 * ratio * v + d0 * (1 - u).square()
        return 2 * ratio.log() + rise.log() - 2 * (ratio + curve * v).log()

    def unit(self, x):
        unit = x / self.interval
        return unit.abs() < 1, unit.clamp(-1, 1)

    def piece(self, unit, outputs, inverse):
        """For each point in [-1, 1] its piece: left corner (x0, y0), width,
        height, and the slopes at both ends."""
        raw = outputs.unflatten(-1, (-1, self.outputs))
        sizes = [self.bins, self.bins, self.bins - 1]
        widths, heights, raw_slopes = raw.split(sizes, -1)
        xs, ys = self.knots(widths), self.knots(heights)
        most = self.MAX_LOG_SLOPE
        slopes = (most * torch.tanh(raw_slopes / most)).exp()
        slopes = F.pad(slopes, (1, 1), value=1.0)
        inner = (ys if inverse else xs)[..., 1:-1]
        left = (unit[..., None] >= inner).sum(-1, keepdim=True)
        x0, y0, d0 = (pick(v, left) for v in (xs, ys, slopes))
        x1, y1, d1 = (pick(v, left + 1) for v in (xs, ys, slopes))
        return x0, y0, x1 - x0, y1 - y0, d0, d1

    def knots(self, raw):
        least = self.MIN_SHARE
        shares = least / self.bins + (1 - least) * raw.softmax(-1)
        inner = 2 * shares.cumsum(-1)[..., :-1] - 1
        return F.pad(F.pad(inner, (1, 0), value=-1.0), (0, 1), value=1.0)


def pick(values, index):
    """One value a point: (..., n, k), (..., n, 1) -> (..., n)."""
    return values.gather(-1, index).squeeze(-1)


# A coupling has a number of `outputs`, which it wants from the network for
# each coordinate that moves, and forward and inverse, which take coordinates
# (..., n, d - j) and those outputs to their images and log-slopes.
COUPLINGS = {"affine": AffineCoupling, "spline": SplineCoupling}


def make_coupling(name, members, options):
    """Whose options are checked first."""
    kind = COUPLINGS[check_choice(name, "coupling", COUPLINGS)]
    known = "hidden", "start", *list(signature(kind).parameters)[1:]
    check_names(options, known, f"option of the {name} coupling")
    return kind(members, **options)


# Randomness, memory and threads

# Mixed into a seed, so that data, weights, noise and test points that share
# the seed 0 do not share their random numbers. (Not added above its 32 bits:
# those are all that torch's generator keeps.)
WEIGHTS, TRAINING, SCORING, PART = 1, 2, 3, 4


def random_generator(seed, stream=0):
    """seed: an int in [0, 2^32), or a torch.Generator, which is returned."""
    if isinstance(seed, torch.Generator):
        return seed
    seed = check_integer(seed, "seed", at_least=0)
    if seed >= 1 << 32:
        raise ValueError(f"seed must be below 2^32, got {seed}")
    if stream:
        seed = int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def random_generators(seed, members, stream):
    """One a member: member i of seed s draws what seed s + i draws alone.
    seed: an int, a torch.Generator, or a list of them, one a member."""
    given = [torch.Generator] * members
    if isinstance(seed, list) and [*map(type, seed)] == given:
        return seed
    if isinstance(seed, torch.Generator):
        seeds = torch.randint(2**31, (members,), generator=seed).tolist()
    else:
        first = check_integer(seed, "seed", at_least=0)
        seeds = range(first, first + members)
    return [random_generator(s, stream) for s in seeds]


def in_blocks(n, draw):
    """n rows of draw(BLOCK), draw(BLOCK), ...: with whole blocks, the first n
    of a larger sample are the sample of n."""
    blocks = [draw(BLOCK) for _ in range(math.ceil(n / BLOCK))]
    return torch.cat(blocks)[:n]


def normal(n, d, generator):
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def uniform(n, generator):
    return torch.rand(n, generator=generator, dtype=torch.float64)


def in_parts(formula, x, size):
    """formula(x), so many rows at a time: (n, ...) -> (n, ...). The results
    go where they stay: many small ones among large ones that come and go
    would break up the memory, which then grows with n^2."""
    whole = None
    with one_thread():
        for k in range(0, len(x), size):
            part = formula(x[k : k + size])
            if whole is None:
                whole = part.new_empty(len(x), *part.shape[1:])
            whole[k : k + size] = part
    return whole


@contextlib.contextmanager
def one_thread():
    """The matrices here are too small to share: threads that wait for one
    another cost more than they save, above all where another process keeps
    the processor busy, and change the last digits."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
