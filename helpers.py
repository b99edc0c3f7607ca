"""Two-dimensional density estimation: kernels and coupling flows.

Notation
    x        points, shape (n, 2); z the same points in the flow's prior
    H, h     bandwidth matrix, and the number h of H = h I: lengths
    s, t     log-scale and shift of an affine coupling layer
    K        number of coupling layers
    log_det  log |det| of a map's Jacobian at each point

Conventions
    A *density* has ``log_probability(x)``: (n, 2) -> (n,) in nats, and
    ``sample(n, seed)``: -> (n, 2). Truths, kernel estimates and flows are
    densities, so every score and every plot takes any of them.
    ``forward`` maps z to x (sampling), ``inverse`` x to z (density).
    Randomness is an argument: an int >= 0 or a torch.Generator.
    Truths and kernel estimates compute in float64, flows in their own dtype.
    A bad argument raises ValueError or TypeError before any work is done.
"""

import contextlib
import copy
import inspect
import math
import time
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

LOG_2PI = math.log(2 * math.pi)


# Arguments: each is checked once, where it enters.


def _points(x, name="x", dtype=torch.float64, device=None, members=None):
    """x as finite points (n, 2), or (members, n, 2), or a helpful error."""
    if not isinstance(x, torch.Tensor):
        try:
            x = torch.from_numpy(np.array(x))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be an array of real numbers, got {x!r}"
            ) from error
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    shape = tuple(x.shape)
    batched = members is not None and shape[:-2] == (members,)
    if shape[-1:] != (2,) or not (len(shape) == 2 or batched) or 0 in shape:
        wanted = "(n, 2)" if members is None else f"({members}, n, 2)"
        raise ValueError(
            f"{name} must have shape {wanted} with n >= 1, got {shape}"
        )
    x = x.to(dtype=dtype, device=device)
    if not torch.isfinite(x).all():
        bad = x[~torch.isfinite(x)][0].item()
        raise ValueError(f"{name} must be finite, got {bad}")
    return x


def _integer(value, name, at_least=1):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return int(value)


def check_counts(**counts):
    """Refuse a count that is not an integer >= 1, by its name: TypeError or
    ValueError. The notebooks' parameters pass through here first."""
    for name, value in counts.items():
        _integer(value, name)


def _number(value, name, above=0.0, below=math.inf, or_equal=False):
    real = (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not ((value > above or or_equal and value == above) and value < below):
        sign = ">=" if or_equal else ">"
        raise ValueError(
            f"{name} must be {sign} {above} and < {below}, got {value}"
        )
    return float(value)


def _flag(value, name):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _choice(value, name, known):
    if not (isinstance(value, str) and value in known):
        raise ValueError(
            f"{name} must be one of {', '.join(known)}; got {value!r}"
        )
    return value


# Mixed into a seed, so that data, weights, noise and test points that share
# the seed 0 do not share their random numbers. (Not added above its 32 bits:
# those are all that torch's generator keeps.)
_WEIGHTS, _TRAINING, _SCORING = 1, 2, 3


def _generator(seed, stream=0):
    if isinstance(seed, torch.Generator):
        return seed
    seed = _integer(seed, "seed", at_least=0)
    if seed >= 1 << 32:
        raise ValueError(f"seed must be below 2^32, got {seed}")
    if stream:
        seed = int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def _generators(seed, members, stream):
    """One a member: member i of seed s draws what seed s + i draws alone."""
    if isinstance(seed, torch.Generator):
        seeds = torch.randint(2**31, (members,), generator=seed).tolist()
    else:
        seeds = [
            _integer(seed, "seed", at_least=0) + i for i in range(members)
        ]
    return [_generator(s, stream) for s in seeds]


# Densities


class Density:
    """What truths and kernel estimates share: checks, chunks and images."""

    _chunk = 8192  # points evaluated at once, to bound memory

    def log_probability(self, x):
        """log p(x) in nats. x: (n, 2) -> (n,), float64. ValueError unless
        finite."""
        parts = _points(x).split(self._chunk)
        return torch.cat([self._log_probability(part) for part in parts])

    def sample(self, n, seed=0):
        """n independent points: -> (n, 2), float64. Equal seeds give equal
        points. ValueError for n < 1."""
        return self._sample(_integer(n, "n"), _generator(seed))

    def density(self, grid):
        """p on a Grid: -> (size, size), row i at grid.y[i]; flattened, it is
        in the order of grid.points."""
        points = _grid(grid).points
        return grid.image(self.log_probability(points).exp())


def _normal(n, generator):
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def _uniform(n, generator):
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _on_circle(angle):
    """(cos, sin) of an angle: (...,) -> (..., 2)."""
    return torch.stack([angle.cos(), angle.sin()], -1)


class GaussianMixture(Density):
    """p(x) = mean over k of N(x; means[k], sigma^2 I).

    means: (k, 2). sigma: standard deviation > 0, in the data's unit.
    ValueError otherwise. (Silverman 1986, section 4.2)
    """

    def __init__(self, means, sigma):
        self.means = _points(means, "means")
        self.sigma = _number(sigma, "sigma")

    def _log_probability(self, x):
        u = (x[:, None] - self.means) / self.sigma
        norm = LOG_2PI + math.log(len(self.means)) + 2 * math.log(self.sigma)
        return torch.logsumexp(-u.square().sum(-1) / 2, 1) - norm

    def _sample(self, n, generator):
        k = torch.randint(len(self.means), (n,), generator=generator)
        return self.means[k] + self.sigma * _normal(n, generator)


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
        self.sigma = _number(sigma, "sigma")

    def _log_probability(self, x):
        rho, phi = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
        turn = 2 * math.pi
        out, back = phi.remainder(turn), (phi + math.pi).remainder(turn)
        theta = torch.stack([out, out + turn, back, back + turn], 1)
        r = torch.stack([rho, rho, -rho, -rho], 1)
        u = (r - theta / 2) / self.sigma
        norm = LOG_2PI / 2 + math.log(4 * math.pi * self.sigma)
        return torch.logsumexp(-u.square() / 2, 1) - norm - rho.log()

    def _sample(self, n, generator):
        theta = 4 * math.pi * _uniform(n, generator)
        r = theta / 2 + self.sigma * _normal(n, generator)[:, 0]
        return r[:, None] * _on_circle(theta)


class Circles(Density):
    """Uniform angle on radius 1 or 0.8, equally likely, plus N(0, sigma^2 I).

    sigma > 0. A circle of radius R blurred by a Gaussian has the density
    exp(-(rho^2 + R^2) / 2 sigma^2) I0(rho R / sigma^2) / (2 pi sigma^2),
    with the Bessel function I0. (Rice 1945)
    """

    radii = (1.0, 0.8)

    def __init__(self, sigma=0.1):
        self.sigma = _number(sigma, "sigma")

    def _log_probability(self, x):
        radii, var = x.new_tensor(self.radii), self.sigma**2
        rho = x.square().sum(1, keepdim=True).clamp(min=1e-300).sqrt()
        log_i0 = torch.special.i0e(rho * radii / var).log()  # times e^-...
        log_ring = log_i0 - (rho - radii).square() / (2 * var)
        norm = LOG_2PI + math.log(len(radii) * var)
        return torch.logsumexp(log_ring, 1) - norm

    def _sample(self, n, generator):
        radii = torch.tensor(self.radii, dtype=torch.float64)
        radius = radii[torch.randint(len(radii), (n,), generator=generator)]
        angle = 2 * math.pi * _uniform(n, generator)
        ring = radius[:, None] * _on_circle(angle)
        return ring + self.sigma * _normal(n, generator)


class Moons(Density):
    """(cos t, sin t) or (1 - cos t, 1/2 - sin t), equally likely, with
    t ~ U[0, pi], plus N(0, sigma^2 I).

    sigma > 0. The integral over t is taken by 32 Gauss-Legendre nodes on
    either side of the integrand's peak, over the stretch where it exceeds
    exp(-40) of the peak: exact to rounding at every distance.
    (Press et al., Numerical Recipes, section 4.6)
    """

    _nodes, _weights = map(
        torch.from_numpy, np.polynomial.legendre.leggauss(32)
    )

    def __init__(self, sigma=0.1):
        self.sigma = _number(sigma, "sigma")

    @torch.no_grad()  # where the nodes lie does not change the integral
    def _quadrature(self, x):
        """Nodes t and log-weights for each point: (2, n, 32) each."""
        phi = torch.atan2(x[:, 1], x[:, 0])
        above = phi >= 0
        middle = torch.where(above, phi, phi + math.pi)
        ends = torch.stack([0 * phi, 0 * phi + math.pi])
        peak = torch.where(above, middle, ends)
        toward = torch.where(above, ends, middle) - peak
        cosine = (peak - phi).cos()
        drop = 40 * self.sigma**2 / x.norm(dim=1)
        reach = (cosine - drop).clamp(min=-1).acos()
        reach = (reach - cosine.clamp(-1, 1).acos()).clamp(min=0)
        reach = torch.minimum(reach, toward.abs())[..., None] / 2
        step = toward.sign()[..., None] * reach * (self._nodes + 1)
        return peak[..., None] + step, (reach * self._weights).log()

    def _log_arc(self, x):
        """log of the mean over t of N(x; (cos t, sin t), sigma^2 I)."""
        t, log_weight = self._quadrature(x)
        u = (x[:, None] - _on_circle(t)) / self.sigma
        log_terms = log_weight - u.square().sum(-1) / 2
        norm = LOG_2PI + 2 * math.log(self.sigma) + math.log(math.pi)
        return torch.logsumexp(log_terms, dim=(0, 2)) - norm

    def _log_probability(self, x):
        mirrored = x.new_tensor([1, 0.5]) - x
        both = torch.logaddexp(self._log_arc(x), self._log_arc(mirrored))
        return both - math.log(2)

    def _sample(self, n, generator):
        lower = torch.randint(2, (n, 1), generator=generator) == 1
        arc = _on_circle(math.pi * _uniform(n, generator))
        moon = torch.where(lower, arc.new_tensor([1, 0.5]) - arc, arc)
        return moon + self.sigma * _normal(n, generator)


DISTRIBUTIONS = ("Circles", "Moons", "GaussiansGrid", "GaussiansRot")


def toy_distribution(name, num_gaussians=5):
    """The density called 'Circles', 'Moons', 'GaussiansGrid' (four Gaussians,
    sigma 1/2) or 'GaussiansRot' (num_gaussians of them at equal angles on
    radius 2.5, variance 0.1; the others do not use that number).

    ValueError for an unknown name, which lists the known ones.
    """
    _choice(name, "dist_type", DISTRIBUTIONS)
    k = _integer(num_gaussians, "num_gaussians")
    if name == "Circles":
        return Circles()
    if name == "Moons":
        return Moons()
    if name == "GaussiansGrid":
        return GaussianMixture([(0, 0), (0, 2), (2, 0), (2, 2)], 0.5)
    angles = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
    return GaussianMixture(2.5 * _on_circle(angles), math.sqrt(0.1))


class ToyDataset(torch.utils.data.Dataset):
    """num_samples points of toy_distribution(dist_type, num_gaussians).

    .data: (num_samples, 2) float32. .distribution: the density they were
    drawn from.
    """

    def __init__(self, dist_type, num_samples=1000, seed=0, num_gaussians=5):
        self.distribution = toy_distribution(dist_type, num_gaussians)
        n = _integer(num_samples, "num_samples")
        self.data = self.distribution.sample(n, seed).float()

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
        self.size = _integer(size, "size")
        self.xlim = self._limits(xlim, "xlim")
        self.ylim = self._limits(ylim, "ylim")
        cells = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        self.x, self.y = (
            low + (high - low) * cells for low, high in (self.xlim, self.ylim)
        )
        self.points = torch.cartesian_prod(self.y, self.x).flip(1)
        self.extent = (*self.xlim, *self.ylim)
        x0, x1, y0, y1 = self.extent
        self.cell_area = (x1 - x0) * (y1 - y0) / size**2

    @staticmethod
    def _limits(limits, name):
        try:
            low, high = (float(v) for v in limits)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be two numbers (low, high), got {limits!r}"
            ) from error
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(
                f"{name} must be finite with low < high, got {limits!r}"
            )
        return low, high

    @classmethod
    def around(cls, samples, size=100, margin=0.15):
        """The smallest square that holds the samples (n, 2), widened by
        margin times its side at each end."""
        samples = _points(samples, "samples")
        margin = _number(margin, "margin", or_equal=True)
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


def _grid(grid):
    if not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid, got {grid!r}")
    return grid


# Kernel density estimation


class GaussianKDE(Density):
    """f(x) = 1 / (N |H|) sum over i of K(H^-1 (x_i - x)), K Gaussian.

    samples: (N, 2). H: a number h > 0, meaning h I, or an invertible 2 x 2
    matrix, in the data's unit of length: H = h I is a kernel of standard
    deviation h. ValueError for a singular H. (Silverman 1986, section 4.2)
    """

    def __init__(self, samples, H):
        self.samples = _points(samples, "samples")
        if not isinstance(H, (list, tuple)) and np.ndim(H) == 0:
            h = H.item() if isinstance(H, torch.Tensor) else H
            H = _number(h, "H") * np.eye(2)
        self.H = _points(H, "H")
        if self.H.shape != (2, 2) or not torch.linalg.cond(self.H) < 1e15:
            raise ValueError(
                "H must be a number > 0 or an invertible 2 x 2 matrix, "
                f"got {H!r}"
            )
        self._centre = self.samples.mean(0)  # keeps digits far from 0
        self._scaled = self._scale(self.samples)
        self._chunk = max(1, 2**17 // len(self.samples))

    def _scale(self, x):
        """H^-1 x, from the samples' centre: (n, 2) -> (2, n)."""
        return torch.linalg.solve(self.H, (x - self._centre).T)

    def _log_probability(self, x):
        d2 = _squared_distances(self._scale(x), self._scaled)
        log_det_H = torch.linalg.slogdet(self.H).logabsdet
        norm = LOG_2PI + log_det_H + math.log(len(self.samples))
        return _log_kernel_sum(d2, 1.0) - norm

    def _sample(self, n, generator):
        i = torch.randint(len(self.samples), (n,), generator=generator)
        return self.samples[i] + _normal(n, generator) @ self.H.T

    def density(self, grid):
        """f on a Grid: -> (size, size) as Density.density, exact and fast.

        When H H^T is diagonal the kernel is a product k(x) k(y), and the
        sum over samples is the product of two (size, N) kernel matrices:
        2 size N exponentials in place of size^2 N.
        """
        covariance = self.H @ self.H.T
        if covariance[0, 1] != 0:
            return super().density(grid)
        hx, hy = covariance.diagonal().sqrt()
        total = torch.zeros(_grid(grid).size, grid.size, dtype=torch.float64)
        for part in self.samples.split(max(1, 2**17 // grid.size)):
            along_x = _kernel_matrix(grid.x, part[:, 0], hx)
            along_y = _kernel_matrix(grid.y, part[:, 1], hy)
            total += along_y @ along_x.T
        return total / (2 * math.pi * hx * hy * len(self.samples))


def _kernel_matrix(centres, samples, h):
    """exp(-(c - x)^2 / 2 h^2) for all pairs: (g,), (N,) -> (g, N).

    Under exp(-350) it counts as 0: a product of two such values would be a
    denormal number, which processors handle slowly.
    """
    unit = h * math.sqrt(2)
    exponent = ((centres / unit)[:, None] - samples / unit).square_().neg_()
    return F.threshold_(exponent, -350.0, -math.inf).exp_()


def _squared_distances(a, b):
    """|a_i - b_j|^2 of points given as columns: (2, n), (2, m) -> (n, m)."""
    return sum((u[:, None] - v).square_() for u, v in zip(a, b, strict=True))


def _log_kernel_sum(d2, h):
    """log of the sum over j of exp(-d2[i, j] / 2 h^2): (n, m) -> (n,).

    Relative to the nearest sample, so that far points do not underflow;
    terms below exp(-350) of the nearest one's are raised to that.
    """
    nearest = d2.amin(1, keepdim=True)
    terms = (nearest - d2).div_(2 * h**2).clamp_(min=-350.0).exp_()
    return terms.sum(1).log() - nearest[:, 0] / (2 * h**2)


def reference_bandwidth(samples):
    """Scott's rule h = scale * N^(-1/6): -> float, in the data's unit.

    samples: (N >= 2, 2). In two dimensions Silverman's rule is the same
    number: its factor (4 / (d + 2))^(1 / (d + 4)) is 1 at d = 2. The scale
    of a coordinate is the smaller of its standard deviation and its
    interquartile range / 1.349, so that an outlier does not widen it; both
    coordinates are averaged. ValueError for fewer than two samples, or if
    all are equal. (Silverman 1986, section 4.3.2; Scott 2015, section 6.3)
    """
    samples = _samples(samples)
    low, high = np.quantile(samples.numpy(force=True), [0.25, 0.75], axis=0)
    quartiles = samples.new_tensor((high - low) / 1.349)
    scale = samples.std(0)
    robust = torch.minimum(scale, quartiles)
    scale = torch.where(quartiles > 0, robust, scale).mean().item()
    if not scale > 0:
        point = samples[0].tolist()
        raise ValueError(f"samples must differ, got only the point {point}")
    return scale * len(samples) ** (-1 / 6)


def _samples(samples):
    samples = _points(samples, "samples")
    if len(samples) < 2:
        raise ValueError(
            f"samples must hold at least 2 points, got {len(samples)}"
        )
    return samples


def leave_one_out(samples, candidates):
    """Mean leave-one-out log-likelihood in nats of each bandwidth:
    samples (N >= 2, 2), candidates (k,) > 0 -> (k,).

    For each h the mean over i of log f_-i(x_i), where f_-i is the estimate
    with H = h I from all samples but x_i. ValueError as select_bandwidth.
    (Habbema, Hermans, van den Broek 1974; Duin 1976)
    """
    samples = _samples(samples)
    if np.ndim(candidates) != 1 or not len(candidates):
        raise ValueError(
            "candidates must be a non-empty list of bandwidths, "
            f"got {candidates!r}"
        )
    numbers = [c.item() if hasattr(c, "item") else c for c in candidates]
    widths = [_number(c, "candidates") for c in numbers]
    total = torch.zeros(len(widths), dtype=torch.float64)
    points, n = (samples - samples.mean(0)).T, len(samples)
    for rows in torch.arange(n).split(max(1, 2**18 // n)):
        d2 = _squared_distances(points[:, rows], points)
        d2[torch.arange(len(rows)), rows] = math.inf  # leaves i itself out
        for k, h in enumerate(widths):
            total[k] += _log_kernel_sum(d2, h).sum().item()
    h = torch.tensor(widths, dtype=torch.float64)
    return total / n - LOG_2PI - 2 * h.log() - math.log(n - 1)


def select_bandwidth(samples, candidates=None):
    """The bandwidth h with the best leave-one-out likelihood: -> float.

    samples: (N >= 2, 2). candidates: bandwidths > 0; by default 16 between
    0.1 and 1.2 times reference_bandwidth(samples). ValueError if there are
    fewer than two samples, all are equal, or there is no candidate.
    """
    if candidates is None:
        candidates = reference_bandwidth(samples) * np.geomspace(0.1, 1.2, 16)
    scores = leave_one_out(samples, candidates)
    return float(candidates[int(scores.argmax())])


def sharpen(samples, h, step=1.0):
    """Each sample moved towards the mean of the samples around it:
    (N, 2) -> (N, 2), float64.

    x_i' = x_i + step (m(x_i) - x_i), where m(x) is the mean of the samples
    weighted by K((x_j - x) / h). m(x) - x is h^2 times the gradient of log f,
    so the move undoes the kernel's own spread. step = 1/2 does so as h -> 0:
    the estimate of width h on the moved samples then has a bias of order h^4
    in place of h^2. step = 1 does so for a Gaussian of standard deviation
    1.27 h, which is nearer where an estimate has to be good. h, step > 0.
    (Fukunaga, Hostetler 1975, mean shift; Choi, Hall 1999, data sharpening)
    """
    samples, h = _points(samples, "samples"), _number(h, "h")
    step = _number(step, "step")
    centre = samples.mean(0)
    points, moved = (samples - centre).T, []
    for part in points.split(max(1, 2**17 // len(samples)), dim=1):
        d2 = _squared_distances(part, points).div_(-2 * h**2)
        moved.append(d2.clamp_(min=-350.0).exp_() @ points.T)
        moved[-1] /= d2.sum(1, keepdim=True)
    return samples + step * (torch.cat(moved) + centre - samples)


# Coupling flows


class Linear(nn.Module):
    """W x + b for points as columns: (L, in, n) -> (L, out, n), weights
    (*lead, out, in) with L the product of lead.

    The leading axes count independent networks (the members, and s beside
    t); no other formula in this file mentions them.
    """

    def __init__(self, lead, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(*lead, fan_out, 1))

    def forward(self, x):
        weight, bias = self.weight.flatten(0, -3), self.bias.flatten(0, -3)
        return torch.baddbmm(bias, weight, x)


class Bijection(nn.Module):
    """An invertible map of the plane: checks points, then maps them as a
    pair of coordinates, z1, z2 or x1, x2."""

    def _check(self, points, name):
        like = next(self.parameters())
        return _points(points, name, like.dtype, like.device, self.members)

    def forward(self, z):
        """x = f(z) and log |det dx/dz|: (n, 2) -> (n, 2), (n,).

        With S members: (n, 2) or (S, n, 2) -> (S, n, 2), (S, n).
        ValueError unless finite.
        """
        x, log_det = self._forward(self._check(z, "z").unbind(-1))
        return torch.stack(x, -1), log_det

    def inverse(self, x):
        """z = f^-1(x) and log |det dz/dx|, with shapes as in forward."""
        z, log_det = self._inverse(self._check(x, "x").unbind(-1))
        return torch.stack(z, -1), log_det


class CouplingLayer(Bijection):
    """The coordinate that the mask keeps passes, and shapes the other one.

    mask: [1, 0] keeps the first coordinate, [0, 1] the second. coupling:
    "affine", x2 = exp(s(z1)) z2 + t(z1) with two networks s and t,
    1 -> hidden -> hidden -> 1; or "spline", x2 = a monotone spline of z2
    that one network shapes. members: None, or the number S of independent
    layers in one. options: see AffineCoupling, SplineCoupling, _draw.
    (Dinh et al. 2017, section 3; Durkan et al. 2019, section 3)
    """

    def __init__(
        self, mask, members=None, coupling="affine", seed=0, hidden=32,
        start="spread", **options,
    ):  # fmt: skip
        super().__init__()
        self.kept = _kept(mask)
        self.members = _members(members)
        kind = COUPLINGS[_choice(coupling, "coupling", COUPLINGS)]
        self.coupling = kind(members, **options)
        self.start = _choice(start, "start", ("spread", "uniform"))
        lead = () if members is None else (members,)
        lead, width = (*lead, kind.networks), _integer(hidden, "hidden")
        self.network = nn.Sequential(
            Linear(lead, 1, width), nn.LeakyReLU(inplace=True),
            Linear(lead, width, width), nn.LeakyReLU(inplace=True),
            Linear(lead, width, self.coupling.outputs),
        )  # fmt: skip
        self._draw(_generators(seed, members or 1, _WEIGHTS))

    @torch.no_grad()
    def _draw(self, generators):
        """Initial weights, each member's from its own generator.

        "uniform": within 1 / sqrt(inputs), as torch does. "spread" changes
        three things: the kinks of the first layer's units lie evenly over
        the data, between -2.5 and 2.5; the second layer keeps its inputs'
        size (He et al. 2015); and the last is scaled by 0.05, so that the
        flow starts near the identity.
        """
        for linear in self.network[::2]:
            bound = linear.weight.shape[-1] ** -0.5
            for parameter in (linear.weight, linear.bias):
                own = parameter.reshape(len(generators), -1)  # a view
                for row, generator in zip(own, generators, strict=True):
                    row.uniform_(-bound, bound, generator=generator)
        if self.start == "spread":
            first, second, last = self.network[::2]
            first.weight.copy_(first.weight.sign())
            first.bias *= 2.5
            second.weight *= math.sqrt(6)
            last.weight *= 0.05
            last.bias *= 0.05

    def _forward(self, z):
        kept, changed = self._split(z)
        changed, log_det = self.coupling(changed, self._condition(kept))
        return self._merge(kept, changed), log_det

    def _inverse(self, x):
        kept, changed = self._split(x)
        condition = self._condition(kept)
        changed, log_det = self.coupling.inverse(changed, condition)
        return self._merge(kept, changed), log_det

    def _split(self, pair):
        return pair[self.kept], pair[1 - self.kept]

    def _condition(self, kept):
        """The networks' outputs: (..., n) -> (..., networks, outputs, n)."""
        lead = self.network[0].weight.shape[:-2]
        inputs = kept[..., None, None, :].expand(*lead, 1, -1)
        return self.network(inputs.flatten(0, -3)).unflatten(0, lead)

    def _merge(self, kept, changed):
        pair = kept.expand_as(changed), changed
        return pair if self.kept == 0 else pair[::-1]


def _kept(mask):
    values = mask.tolist() if hasattr(mask, "tolist") else mask
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"mask must be a list, got {mask!r}")
    if list(values) not in ([1, 0], [0, 1]):
        raise ValueError(f"mask must be [1, 0] or [0, 1], got {mask!r}")
    return list(values).index(1)


def _members(members):
    return None if members is None else _integer(members, "members")


class AffineCoupling(nn.Module):
    """y -> exp(s) y + t, with log_det s.

    bound: s = bound tanh(raw / bound), which cannot exceed it; None leaves
    it free, times a learnt number that starts at 0 (the course's layer).
    """

    networks, outputs = 2, 1

    def __init__(self, members, bound=2.5):
        super().__init__()
        self.bound = bound if bound is None else _number(bound, "bound")
        if bound is None:
            shape = (1,) if members is None else (members, 1)
            self.scale = nn.Parameter(torch.zeros(shape))

    def _s_and_t(self, condition):
        s, t = condition.squeeze(-2).unbind(-2)
        if self.bound is None:
            return self.scale * s, t
        return self.bound * torch.tanh(s / self.bound), t

    def forward(self, y, condition):
        s, t = self._s_and_t(condition)
        return s.exp() * y + t, s

    def inverse(self, y, condition):
        s, t = self._s_and_t(condition)
        return (y - t) * (-s).exp(), -s


class SplineCoupling(nn.Module):
    """A monotone spline of `bins` rational-quadratic pieces on [-interval,
    interval], and the identity outside.

    The network gives the pieces' widths and heights (a softmax, none below
    0.16 of an equal share) and the slopes at the inner knots, between
    exp(-2) and exp(2); the slope at both ends is 1. Both bounds keep the
    inverse well conditioned.
    (Durkan et al. 2019, equations 4 to 8)
    """

    networks = 1

    def __init__(self, members, bins=16, interval=5.0):
        super().__init__()
        self.bins = _integer(bins, "bins", at_least=2)
        if bins > 64:
            raise ValueError(f"bins must be at most 64, got {bins}")
        self.interval = _number(interval, "interval")
        self.outputs = 3 * bins - 1

    def _knots(self, raw):
        shares = 0.16 / self.bins + 0.84 * raw.softmax(-1)
        inner = 2 * shares.cumsum(-1)[..., :-1] - 1
        return F.pad(F.pad(inner, (1, 0), value=-1.0), (0, 1), value=1.0)

    def _piece(self, y, condition, inverse):
        """For each y in [-1, 1] its piece: left corner (x0, y0), width,
        height, and the slopes at both ends."""
        sizes = [self.bins, self.bins, self.bins - 1]
        widths, heights, raw = condition.squeeze(-3).mT.split(sizes, -1)
        xs, ys = self._knots(widths), self._knots(heights)
        slopes = F.pad((2 * torch.tanh(raw / 2)).exp(), (1, 1), value=1.0)
        inner = (ys if inverse else xs)[..., 1:-1]
        left = (y[..., None] >= inner).sum(-1, keepdim=True)
        x0, y0, d0 = (_pick(v, left) for v in (xs, ys, slopes))
        x1, y1, d1 = (_pick(v, left + 1) for v in (xs, ys, slopes))
        return x0, y0, x1 - x0, y1 - y0, d0, d1

    def _log_slope(self, u, ratio, d0, d1):
        v, curve = u * (1 - u), d0 + d1 - 2 * ratio
        rise = d1 * u.square() + 2 * ratio * v + d0 * (1 - u).square()
        return 2 * ratio.log() + rise.log() - 2 * (ratio + curve * v).log()

    def _unit(self, y):
        unit = y / self.interval
        return unit.abs() < 1, unit.clamp(-1, 1)

    def forward(self, y, condition):
        inside, unit = self._unit(y)
        x0, y0, width, height, d0, d1 = self._piece(unit, condition, False)
        ratio, u = height / width, ((unit - x0) / width).clamp(0, 1)
        v, curve = u * (1 - u), d0 + d1 - 2 * ratio
        part = (ratio * u.square() + d0 * v) / (ratio + curve * v)
        bent = (y0 + height * part) * self.interval
        log_det = self._log_slope(u, ratio, d0, d1)
        return bent.where(inside, y), log_det.where(inside, 0 * y)

    def inverse(self, y, condition):
        inside, unit = self._unit(y)
        x0, y0, width, height, d0, d1 = self._piece(unit, condition, True)
        ratio, part = height / width, (unit - y0) / height
        curve = part * (d0 + d1 - 2 * ratio)
        a, b, c = ratio - d0 + curve, d0 - curve, -ratio * part
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        # The root in [0, 1], by the form that does not cancel.
        u = torch.where(b < 0, root - b, -2 * c)
        u = (u / torch.where(b < 0, 2 * a, b + root)).clamp(0, 1)
        straight = (x0 + width * u) * self.interval
        log_det = -self._log_slope(u, ratio, d0, d1)
        return straight.where(inside, y), log_det.where(inside, 0 * y)


def _pick(values, index):
    """One value a point: (..., n, k), (..., n, 1) -> (..., n)."""
    return values.gather(-1, index).squeeze(-1)


COUPLINGS = {"affine": AffineCoupling, "spline": SplineCoupling}


class CouplingFlow(Bijection):
    """x = f_K(... f_1(z)), z ~ N(0, I): coupling layers, masks alternating.

    num_layers: K >= 1. members: None for one flow; S for an ensemble, whose
    weights carry a leading axis of S: member i of seed s is the flow of seed
    s + i. coupling: "affine" or "spline". options: hidden, start, and the
    coupling's bound or bins and interval. float32; float64 after .double().
    (Dinh et al. 2017; Papamakarios et al. 2021)
    """

    def __init__(
        self, num_layers, members=None, coupling="affine", seed=0, **options
    ):
        super().__init__()
        K, self.members = _integer(num_layers, "num_layers"), _members(members)
        generators = _generators(seed, members or 1, _WEIGHTS)
        self.layers = nn.ModuleList(
            CouplingLayer(mask, members, coupling, 0, **options)
            for mask in (([1, 0], [0, 1]) * K)[:K]
        )
        for layer in self.layers:
            layer._draw(generators)

    def _forward(self, z):
        total = 0
        for layer in self.layers:
            z, log_det = layer._forward(z)
            total = total + log_det
        return z, total

    def _inverse(self, x):
        total = 0
        for layer in reversed(self.layers):
            x, log_det = layer._inverse(x)
            total = total + log_det
        return x, total

    def _log_probability(self, x):
        (z1, z2), log_det = self._inverse(x.unbind(-1))
        return log_det - (z1.square() + z2.square()) / 2 - LOG_2PI

    def log_probability(self, x):
        """log N(f^-1(x); 0, I) + log |det dz/dx| in nats: (n, 2) -> (n,),
        or (S, n) with members. ValueError unless finite."""
        return self._log_probability(self._check(x, "x"))

    @torch.no_grad()
    def density(self, grid):
        """p on a Grid: -> (size, size), or (S, size, size) with members."""
        points = _grid(grid).points
        return grid.image(self.log_probability(points).exp())

    def sample(self, n, seed=0):
        """n points: -> (n, 2), or (S, n, 2), all members from the same z."""
        return self.sample_x_each_layer(n, seed)[-1]

    @torch.no_grad()
    def sample_x_each_layer(self, n, seed=0):
        """The prior's sample and its image after each layer: a list of
        K + 1 tensors (n, 2), or (S, n, 2)."""
        z = _normal(_integer(n, "n"), _generator(seed))
        z = self._check(z, "z")
        path = [z if self.members is None else z.expand(self.members, n, 2)]
        for layer in self.layers:
            path.append(layer.forward(path[-1])[0])
        return path

    def member(self, i):
        """Member i as a flow of its own, with a copy of its weights."""
        if _integer(i, "i", at_least=0) >= (self.members or 1):
            raise ValueError(
                f"i must be below the {self.members or 1} members, got {i}"
            )
        single = copy.deepcopy(self)
        if self.members is not None:
            for module in (single, *single.layers):
                module.members = None
            for parameter in single.parameters():
                parameter.data = parameter.data[i].clone()
        return single


# Training


@dataclass
class TrainingResult:
    """What train returns; with S members the entries are tensors (S,).

    flow: the flow to use, with the weights of used_epoch. train_losses,
    valid_losses: (epochs[, S]), mean -log p in nats a point, on the noisy
    training points and the clean held-out ones. best_epoch: where, counted
    from 0, valid_losses is lowest, and best_valid_loss its value there.
    used_epoch: the last one no worse than that by more than one standard
    error of the difference, point by point.
    jitter: standard deviation of the noise, in the data's unit. diverged:
    whether a loss stopped being finite. interrupted: whether epochs are
    missing. seconds: CPU time.
    """

    flow: CouplingFlow
    train_losses: torch.Tensor
    valid_losses: torch.Tensor
    best_epoch: int | torch.Tensor
    best_valid_loss: float | torch.Tensor
    used_epoch: int | torch.Tensor
    jitter: float | torch.Tensor
    diverged: bool | torch.Tensor
    interrupted: bool
    seconds: float


@contextlib.contextmanager
def _one_thread():
    """The flows' matrices are too small to share: threads that wait for one
    another cost more than they save, and change the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train(
    flow, data, epochs, *, batch_size=256, learning_rate=1e-2, warmup=0.1,
    cosine=True, beta2=0.99, jitter=1.5, sharpened=True, average=0.99,
    shuffle=True, tolerance=True, valid_fraction=0.1, seed=0, progress=True,
):  # fmt: skip
    """Maximum likelihood by Adam. `flow` is left as it was; the result's
    .flow is the trained one.

    data: a ToyDataset or points (N, 2); for S members one of these, or a
    list of S of one size. The last valid_fraction of it is held out, to
    choose the epoch whose weights are returned. Each switch can be turned
    off:
    jitter: every batch gets fresh N(0, h^2 I) noise, h = jitter times
        select_bandwidth of the training points. This is maximum likelihood
        on their kernel density estimate. 0: none.
    sharpened: the noise is added to sharpen(points, h) in their place.
    warmup: over this share of the steps, learning_rate rises from 0.
    cosine: learning_rate falls to 0 along a cosine.
    beta2: decay of Adam's running mean of the squared gradient.
    average: decay of the running mean of the weights, which is what is
        validated and returned; over the first 1 / (1 - average) steps it is
        their plain mean. 0: none.
    shuffle: a new order in every epoch.
    tolerance: return the last epoch whose held-out loss is within a standard
        error of the best one's: among losses that a small held-out set
        cannot tell apart, the most trained. False: the best one.
    Member i of seed s is trained as a single flow of seed s + i would be.

    A KeyboardInterrupt after the first epoch returns what was reached. A
    member whose loss stops being finite is left out with a warning;
    RuntimeError if none remains. ValueError, TypeError for bad arguments.
    (Kingma, Ba 2015; Loshchilov, Hutter 2017; Izmailov et al. 2018;
    Breiman et al. 1984 for the rule of one standard error)
    """
    if not isinstance(flow, CouplingFlow):
        raise TypeError(f"flow must be a CouplingFlow, got {flow!r}")
    _integer(epochs, "epochs"), _integer(batch_size, "batch_size")
    _number(learning_rate, "learning_rate")
    _number(warmup, "warmup", below=1, or_equal=True)
    _number(beta2, "beta2", below=1, or_equal=True)
    _number(average, "average", below=1, or_equal=True)
    for name in ("cosine", "sharpened", "shuffle", "tolerance", "progress"):
        _flag(locals()[name], name)
    generators = _generators(seed, flow.members or 1, _TRAINING)
    fitted, valid = _hold_out(_training_points(flow, data), valid_fraction)
    fitted, width = _smoothed(fitted, jitter, sharpened)
    n, batches = fitted.shape[-2], math.ceil(fitted.shape[-2] / batch_size)

    def draw(sampler):
        """One draw from each member's generator, where the points are."""
        draws = torch.stack([sampler(generator) for generator in generators])
        return draws.to(fitted.device).reshape(*fitted.shape[:-2], n, -1)

    flow = copy.deepcopy(flow)
    weights, flat = _as_one(flow)
    optimizer = torch.optim.Adam(
        [flat], learning_rate, (0.9, beta2), fused=True
    )
    steps = epochs * batches

    def rate(done):
        """The share of learning_rate after so many steps."""
        rise = min(1, (done + 1) / (warmup * steps)) if warmup else 1
        return rise * (1 + math.cos(math.pi * done / steps * cosine)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    used, mean, step = flow, flat, 0
    if average:
        used = copy.deepcopy(flow)
        _, mean = _as_one(used)
    kept = [p.detach().clone() for p in used.parameters()]
    kept_epoch = fitted.new_zeros(fitted.shape[:-2], dtype=torch.long)
    best = fitted.new_full(valid.shape[:-1], -math.inf)  # log p, each point
    alive = torch.ones_like(kept_epoch, dtype=torch.bool)
    losses, valid_losses, reached = [], [], None
    start = time.process_time()
    bar = tqdm(
        range(epochs), "training", unit="epoch", leave=False,
        disable=not progress,
    )  # fmt: skip
    try:
        for epoch in bar:
            points, loss = fitted, 0
            if shuffle:
                order = draw(lambda g: torch.randperm(n, generator=g))
                points = points.gather(-2, order.expand_as(points))
            if jitter:
                noise = draw(lambda g: torch.randn(n, 2, generator=g))
                points = points + width[..., None, None] * noise.to(points)
            for batch in points.tensor_split(batches, -2):
                batch_loss = -flow._log_probability(batch).mean(-1)
                grads = torch.autograd.grad(batch_loss.sum(), weights)
                flat.grad = torch.cat([grad.flatten() for grad in grads])
                optimizer.step()
                schedule.step()
                step += 1
                if average:
                    mean.lerp_(flat, max(1 - average, 1 / step))
                loss = loss + batch_loss.detach() * batch.shape[-2] / n
            with torch.no_grad():
                log_p = used._log_probability(valid)
            valid_loss = -log_p.mean(-1)
            losses.append(loss)
            valid_losses.append(valid_loss)
            alive = alive & loss.isfinite()
            if not alive.any():
                raise RuntimeError(
                    f"training diverged in epoch {epoch + 1} of {epochs}: "
                    f"the loss is {loss.flatten()[0].item()}; try a "
                    f"learning_rate below {learning_rate}, or a flow with a "
                    "bounded log-scale (bound=2.5)"
                )
            better = valid_loss < -best.mean(-1)  # never where it is NaN
            best = torch.where(better[..., None], log_p, best)
            keep = better | (_no_worse(log_p, best) & tolerance)
            kept_epoch = torch.where(keep, epoch, kept_epoch)
            kept = [
                torch.where(_as_wide(keep, p), p.detach(), k)
                for p, k in zip(used.parameters(), kept, strict=True)
            ]
            reached = epoch + 1, kept, kept_epoch, best, alive
            bar.set_postfix_str(f"validation {valid_loss.mean():.3f} nats")
    except KeyboardInterrupt:
        if reached is None:
            raise
    done, kept, kept_epoch, best, alive = reached
    alive = alive & best.mean(-1).isfinite()
    if not alive.any():
        raise RuntimeError(
            "the held-out loss was never finite: look for an outlier among "
            "the last points of data"
        )
    if done < epochs:
        warnings.warn(
            f"interrupted: returning the best of {done} epochs", stacklevel=2
        )
    if not alive.all():
        lost = (~alive).nonzero().flatten().tolist()
        warnings.warn(f"members {lost} diverged, left out", stacklevel=2)
    trained = copy.deepcopy(flow)
    for parameter, value in zip(trained.parameters(), kept, strict=True):
        parameter.data = value
    losses = torch.stack(losses[:done])
    valid_losses = torch.stack(valid_losses[:done])
    best_epoch = valid_losses.nan_to_num(nan=math.inf).argmin(0)
    entries = best_epoch, -best.mean(-1), kept_epoch, width, ~alive
    if flow.members is None:
        entries = (entry.item() for entry in entries)
    seconds = time.process_time() - start
    return TrainingResult(
        trained, losses, valid_losses, *entries, done < epochs, seconds
    )


def _as_one(flow):
    """A flow's parameters, and one vector that they become views of."""
    weights = list(flow.parameters())
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    nn.utils.vector_to_parameters(flat, weights)
    return weights, flat


def _training_points(flow, data):
    """What train takes as data, as the flow's (n, 2) or (S, n, 2)."""
    many = isinstance(data, (list, tuple)) and data and flow.members
    if many and isinstance(data[0], (ToyDataset, torch.Tensor, np.ndarray)):
        parts = [flow._check(getattr(d, "data", d), "data") for d in data]
        sizes = {part.shape for part in parts}
        if len(parts) != flow.members or len(sizes) > 1:
            raise ValueError(
                f"data must be {flow.members} sets (N, 2) of one size, got "
                f"{len(parts)} of shapes {[tuple(s) for s in sizes]}"
            )
        return torch.stack(parts)
    data = data.data if isinstance(data, ToyDataset) else data
    points = flow._check(data, "data")
    if flow.members is None:
        return points
    return points.expand(flow.members, *points.shape[-2:])


def _hold_out(points, fraction):
    """The first points to fit and the last to validate: (..., n, 2) each."""
    fraction = _number(fraction, "valid_fraction", below=1)
    n = points.shape[-2]
    held_out = max(1, round(fraction * n))
    if n - held_out < 2:
        raise ValueError(
            f"data must leave 2 points or more to fit, got {n} with "
            f"valid_fraction {fraction}"
        )
    return points.split([n - held_out, held_out], -2)


def _smoothed(points, jitter, sharpened):
    """The points that get noise, and its width h, () or (S,)."""
    jitter = _number(jitter, "jitter", or_equal=True)
    sets = points.reshape(-1, *points.shape[-2:])
    widths = [jitter * _bandwidth(p) if jitter else 0.0 for p in sets]
    if jitter and sharpened:
        pairs = zip(sets, widths, strict=True)
        sets = torch.stack([sharpen(p, h).to(p) for p, h in pairs])
    width = points.new_tensor(widths).reshape(points.shape[:-2])
    return sets.reshape(points.shape), width


def _bandwidth(points, at_most=2000):
    """select_bandwidth of at most so many points, h ~ N^(-1/6) beyond."""
    few = points[:at_most]
    return select_bandwidth(few) * (len(points) / len(few)) ** (-1 / 6)


def _no_worse(log_p, best):
    """Whether the mean of log_p, (..., n), is below that of best by less
    than a standard error of their difference; False for a single point."""
    loss = best - log_p
    if loss.shape[-1] == 1:
        return torch.zeros_like(loss[..., 0], dtype=torch.bool)
    return loss.mean(-1) <= loss.std(-1) / loss.shape[-1] ** 0.5


def _as_wide(value, parameter):
    """value, () or (S,), with axes added until it broadcasts."""
    return value.reshape(value.shape + (1,) * (parameter.dim() - value.dim()))


# Scores


class Estimate(NamedTuple):
    """A mean and its standard error: floats, or (S,) tensors."""

    value: float
    standard_error: float


def _density(density, name):
    if not all(hasattr(density, f) for f in ("log_probability", "sample")):
        raise TypeError(
            f"{name} must have log_probability and sample, got {density!r}"
        )


@torch.no_grad()
def _log_ratios(truth, model, n, seed):
    """log truth(x) - log model(x) at n fresh x ~ truth: (n,) or (S, n)."""
    _density(truth, "truth"), _density(model, "model")
    x = truth.sample(_integer(n, "n", at_least=2), _generator(seed, _SCORING))
    ratios = [
        truth.log_probability(part).cpu().double()
        - model.log_probability(part).cpu().double()
        for part in x.split(8192)
    ]
    return torch.cat(ratios, -1)


def _estimate(values):
    mean = values.mean(-1)
    error = values.std(-1) / values.shape[-1] ** 0.5
    if values.dim() == 1:
        return Estimate(mean.item(), error.item())
    return Estimate(mean, error)


def kl_divergence(truth, model, n=100_000, seed=0):
    """KL(truth || model) = E[log truth(x) - log model(x)], x ~ truth, in
    nats: -> Estimate.

    On n fresh points of the truth: a ToyDataset of the same seed shares
    none of them. (Kullback, Leibler 1951)
    """
    return _estimate(_log_ratios(truth, model, n, seed))


def total_variation(truth, model, n=100_000, seed=0):
    """Half the integral of |truth - model|, from 0 to 1: -> Estimate.

    It equals E[max(0, 1 - model(x) / truth(x))], x ~ truth, which needs no
    grid and no care at a pole of the truth. (Devroye, Gyorfi 1985)
    """
    excess = -torch.expm1(-_log_ratios(truth, model, n, seed))
    return _estimate(excess.clamp(min=0))


@torch.no_grad()
def entropy(density, n=100_000, seed=0):
    """E[-log p(x)], x ~ p, in nats: -> Estimate. (Cover, Thomas 2006)"""
    _density(density, "density")
    n = _integer(n, "n", at_least=2)
    x = density.sample(n, _generator(seed, _SCORING))
    return _estimate(-density.log_probability(x).double())


@torch.no_grad()
def grid_entropy(density, size=300):
    """-sum p log p over size^2 cells around a sample, in nats: -> float.

    For a smooth density exact to 0.001; at a pole use `entropy`.
    """
    _density(density, "density")
    grid = Grid.around(density.sample(5000), _integer(size, "size"), 0.3)
    log_p = density.log_probability(grid.points).double()
    return -(log_p.exp() * log_p).sum().item() * grid.cell_area


# Studies


_KNOWN = {
    ToyDataset: {"dist_type", "num_samples", "num_gaussians"},
    CouplingFlow: {
        "num_layers", "coupling", "hidden", "start", "bound", "bins",
        "interval",
    },
    train: set(inspect.signature(train).parameters)
    - {"flow", "data", "seed", "progress"},
}  # fmt: skip


def _run(setting, seeds, points):
    """One ensemble, a member a seed: -> (rows, TrainingResult or None)."""

    def options(of):
        return {k: v for k, v in setting.items() if k in _KNOWN[of]}

    rows = [{**setting, "seed": seed} for seed in seeds]
    try:
        with _one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the row says who diverged
            data = [ToyDataset(seed=s, **options(ToyDataset)) for s in seeds]
            flow = CouplingFlow(
                members=len(seeds), seed=seeds[0], **options(CouplingFlow)
            )
            result = train(
                flow, data, seed=seeds[0], progress=False, **options(train)
            )
            kl = kl_divergence(data[0].distribution, result.flow, points)
    except Exception as error:
        for row in rows:
            row["status"] = f"{type(error).__name__}: {error}"
        return rows, None
    size = sum(p.numel() for p in flow.parameters()) // len(seeds)
    for i, row in enumerate(rows):
        row |= {
            "kl": kl.value[i].item(),
            "kl_se": kl.standard_error[i].item(),
            "valid_loss": result.best_valid_loss[i].item(),
            "best_epoch": result.best_epoch[i].item(),
            "parameters": size,
            "seconds": result.seconds / len(seeds),
            "status": "diverged" if result.diverged[i] else "ok",
        }
    return rows, result


def sweep(
    settings, seeds=8, *, points=100_000, n_jobs=-1, results=False,
    progress=True,
):  # fmt: skip
    """Train an ensemble for every setting: -> DataFrame, a row a run.

    settings: a list of dicts with arguments of ToyDataset (dist_type, ...),
    CouplingFlow (num_layers, ...) and train (epochs, ...). seeds: how many,
    0, 1, ...; each has its own data, weights and noise. Columns: setting
    (its place in the list), the settings, seed, kl and kl_se (nats, on as
    many fresh points of the truth, the same for all), valid_loss (nats),
    best_epoch, parameters, seconds (CPU, one member's share), and status:
    "ok", or what went wrong, so that a failed run does not lose the others.
    results=True: -> (table, list of TrainingResults, None for a failure).

    The settings run in n_jobs processes (-1: one a core), or wherever
    joblib.parallel_config sends them, such as a Dask cluster. A
    KeyboardInterrupt returns the settings that were ready.
    """
    settings = _settings(settings)
    seeds = range(_integer(seeds, "seeds"))
    _integer(points, "points", at_least=2)
    _flag(results, "results"), _flag(progress, "progress")
    _jobs(n_jobs)
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator")
    jobs = parallel(joblib.delayed(_run)(s, seeds, points) for s in settings)
    bar = tqdm(
        jobs, "sweep", len(settings), unit="setting", leave=False,
        disable=not progress,
    )  # fmt: skip
    rows, trained = [], []
    try:
        for k, (of_setting, result) in enumerate(bar):
            rows += [{"setting": k, **row} for row in of_setting]
            trained.append(result)
    except KeyboardInterrupt:
        if not rows:
            raise
        warnings.warn(
            f"interrupted: returning {len(trained)} of {len(settings)} "
            "settings", stacklevel=2,
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return (table, trained) if results else table


def _jobs(n_jobs):
    """What joblib takes: not 0; below 0, counted from all cores."""
    if _integer(n_jobs, "n_jobs", at_least=-math.inf) == 0:
        raise ValueError(f"n_jobs must not be 0, got {n_jobs}")


def _settings(settings):
    dicts = isinstance(settings, (list, tuple)) and len(settings)
    if not (dicts and all(isinstance(s, dict) for s in settings)):
        raise TypeError(
            f"settings must be a non-empty list of dicts, got {settings!r}"
        )
    known = set().union(*_KNOWN.values())
    for setting in settings:
        unknown = setting.keys() - known
        missing = {"dist_type", "num_layers", "epochs"} - setting.keys()
        if unknown or missing:
            raise ValueError(
                f"setting {setting!r} has unknown keys "
                f"{sorted(unknown, key=str)} and lacks {sorted(missing)}; "
                f"known: {', '.join(sorted(known))}"
            )
    return settings


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(values, level=0.95, resamples=10_000, seed=0):
    """Mean of values (n,) and its percentile bootstrap interval.

    For a comparison paired by seed, give the n differences. One value has
    the interval (-inf, inf): it says nothing of its scatter. ValueError
    unless finite. (Efron, Tibshirani 1993, chapter 13)
    """
    level = _number(level, "level", below=1)
    resamples = _integer(resamples, "resamples")
    random = np.random.default_rng(_integer(seed, "seed", at_least=0))
    try:
        values = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"values must be a list of numbers, got {values!r}"
        ) from error
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"values must be a non-empty finite list, got {values!r}"
        )
    if len(values) == 1:
        return Interval(float(values[0]), -math.inf, math.inf)
    picks = random.integers(len(values), size=(resamples, len(values)))
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(values[picks].mean(1), ends)
    return Interval(float(values.mean()), float(low), float(high))


def verdict(claim, interval):
    """A claim that a mean difference is positive, judged by its interval:
    -> "claim: holds", "claim: does not hold" (it is negative), or
    "claim: not decided" where the interval contains 0."""
    if not isinstance(interval, Interval):
        raise TypeError(f"interval must be an Interval, got {interval!r}")
    if interval.low > 0:
        return f"{claim}: holds"
    if interval.high < 0:
        return f"{claim}: does not hold"
    return f"{claim}: not decided"
