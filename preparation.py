"""What the points say before the first step of a training: origin and unit of
what the layers see, the noise, and which rows are held out.

`prepare` finds them, for `train`. The unit is chosen by the leave-one-out
likelihood of a kernel estimate (`unit_and_bandwidth`), and with it comes the
bandwidth of which the noise is a multiple (`smooth`).
"""

import contextlib
import copy
import math
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from checks import brief, check_finite, check_points, warn_of_steps
from helpers import (
    FLOW_OF,
    PART,
    AffineMap,
    CouplingFlow,
    GaussianMixture,
    LocalKDE,
    ToyDataset,
    best_left_out,
    random_generator,
    sharpen,
)

LENGTH = 2.5  # root mean square length of the points that the layers see, or
REACH = 5.0  # less where some lie further out, where a spline does not bend
ALIKE, APART = 1.1, 10.0  # ratios of spreads at which no scale is compared
TOGETHER = 0.25  # nats that a Gaussian gains by knowing the correlations
MOST, WORK = 2000, 5 * 10**8  # points and pairs of points looked at


class Prepared(NamedTuple):
    """What the points say, and those held out (valid) with their rows: of one
    member, or with an axis of members in front. Shapes (1, d), of the shear
    (d, d), of points (n, d), (m, d), rows (m,), one Gaussian's log p ()."""

    shift: torch.Tensor
    scale: torch.Tensor
    shear: torch.Tensor
    noise: torch.Tensor
    centres: torch.Tensor
    valid: torch.Tensor
    held_out: torch.Tensor
    gaussian: torch.Tensor


def prepare(flow, sets, recipe, generators):
    """A copy of the flow with its outermost map, and a Prepared of all
    members, whose points and noise are in the unit of the flow's layers.

    sets: points (N, d), one for all members, or one each.
    """
    if columns := sorted(set().union(*map(followers, sets))):
        warnings.warn(
            f"columns {columns} of data (counted from 0) each follow from "
            "those before: leave them out", stacklevel=5,
        )  # fmt: skip
    shares = [[g] for g in generators] if len(sets) > 1 else [generators]
    own = [
        member
        for points, share in zip(sets, shares, strict=True)
        for member in split_and_smooth(points, recipe, share)
    ]
    found = Prepared(*map(torch.stack, zip(*own, strict=True)))
    noise = (found.noise[:, 0] * found.shear.norm(dim=-1)).amin(0)
    if recipe.jitter:
        warn_of_steps(sets[0], noise, "data", stacklevel=5)
    if flow.members is None:
        found = Prepared(*(part[0] for part in found))
    trained = copy.deepcopy(flow)
    outermost = trained.outermost
    if recipe.standardize:
        outermost.set(found.shift, found.scale, found.shear)
    centres, valid = (
        outermost.inverse(x)[0].to(outermost.shift)  # in float64 till then
        for x in (found.centres, found.valid)
    )
    noise = found.noise.to(outermost.shift) / outermost.scale
    return trained, found._replace(centres=centres, valid=valid, noise=noise)


def split_and_smooth(points, recipe, generators):
    """A Prepared for each member that shares the points (N, d).

    Where more than MOST points are left to fit, unit and noise are those of a
    part, the same for all members, of which none is held out.
    """
    N, m = len(points), held_out_count(len(points), recipe.valid_fraction)
    most = min(MOST, WORK // N)
    common, pool = torch.arange(0), torch.arange(N)
    if large := N - m > most:
        pool = torch.randperm(N, generator=random_generator(0, PART))
        common, pool = pool[:most], pool[most:]
        found, centres = smooth(points, points[common], N - m, recipe)
    for generator in generators:
        order = pool[torch.randperm(len(pool), generator=generator)]
        held_out, fitted = order[:m], torch.cat([common, order[m:]])
        x, valid = points[fitted], points[held_out]
        if large:
            own = centres[fitted]
        else:
            found, own = smooth(x, x, N - m, recipe)
        gaussian = one_gaussian(x, valid)
        yield Prepared(*found, own, valid, held_out, gaussian)


def smooth(points, part, n, recipe):
    """(shift, scale, shear, noise), and the centres of the noise: the points
    (N, d), sharpened where the recipe says so. All is found from a part of
    the n that are fitted."""
    unit, h = unit_and_bandwidth(part, recipe)
    d = points.shape[1]
    width = recipe.jitter * h * math.sqrt(2 / d)
    shrink = (n / len(part)) ** (-1 / (d + 4))  # of the best h, with n
    if width and recipe.sharpened:
        u, others = unit.inverse(points)[0], unit.inverse(part)[0]
        points, _ = unit.forward(sharpen(u, width, shrink**2, others))
    noise = shrink * width * unit.scale
    return (unit.shift, unit.scale, unit.shear, noise), points


def unit_and_bandwidth(points, recipe):
    """An AffineMap, float64, and select_bandwidth of the points in its unit:
    one scale for all coordinates, or one for each, where their spreads differ
    by more than a factor of APART or the leave-one-out likelihood is higher
    by more than a standard error, point by point; or the shape of the
    covariance, where that of LocalKDE is, which long tails do not decide."""
    if not recipe.standardize:
        h = best_left_out(points)[0] if recipe.jitter else 0.0
        return AffineMap(points.shape[1]).double(), h
    constant = (points.amax(0) == points.amin(0)).nonzero().flatten()
    if len(constant):
        raise ValueError(
            "data must vary in every column, among the "
            f"{len(points)} rows that are looked at first: leave out "
            f"{constant.tolist()} (counted from 0)"
        )
    near = without_outliers(points)
    one, each, *shape = units(near)
    near = near[near.isfinite().all(1)]

    def left_out(unit):
        u, log_det = unit.inverse(near)
        h, log_p = best_left_out(u)
        return unit, h, log_p + log_det

    def left_out_locally(unit):
        u, log_det = unit.inverse(near)
        return LocalKDE(u).left_out(np.ones(1))[:, 0] + log_det

    *best, log_p = left_out(one)
    ratio = each.scale.max() / each.scale.min()
    if ratio > ALIKE:
        *other, log_p_each = left_out(each)
        if ratio > APART or not no_worse(log_p, log_p_each):
            best = other  # repeated values may hide it from the likelihood
    for unit in shape:
        d = near.shape[1]
        chance = d * (d - 1) / 2 / len(near)  # of so many numbers more
        with contextlib.suppress(ValueError):  # every row is there 30 times
            log_p = left_out_locally(unit) - chance  # (Akaike 1974)
            if not no_worse(left_out_locally(best[0]), log_p):
                best = left_out(unit)[:2]
    return best


def units(near):
    """The units to choose from, of points (n, d), NaN where one is to be
    left out: one scale for all coordinates; one for each; and the shape of
    the covariance, where points are many enough for that and a Gaussian gains
    more than TOGETHER nats by it."""
    d, shift = near.shape[1], near.nanmean(0)
    rms = (near - shift).square().nanmean(0).sqrt()
    shapes = [(rms.norm().expand(d), None), (rms * d**0.5, None)]
    points = near[near.isfinite().all(1)]
    root = root_of_covariance(points)
    if root is not None and len(points) > 3 * d:
        pivots = root.diagonal()  # what the columns before do not tell
        if (rms / pivots).log().sum() > TOGETHER:
            shapes.append((pivots * d**0.5, root / pivots[:, None]))
    for scale, shear in shapes:
        unit = AffineMap(d).double().set(shift, scale / LENGTH, shear)
        furthest = unit.inverse(points)[0].abs().max().item()
        unit.scale *= min(2, max(1, furthest / REACH))
        yield unit


def followers(points):
    """The columns of points (N, d) that those before them determine, to
    within a millionth of their spread; of no more rows than columns, none."""
    x, (n, d) = points - points.mean(0), points.shape
    pivots = torch.linalg.qr(x, mode="r")[1].diagonal().abs()
    follow = pivots < 1e-6 * x.norm(dim=0)[:n]
    return follow.nonzero().flatten().tolist() if n > d else []


def root_of_covariance(points):
    """Its lower triangle; None where a column follows from those before it,
    to within a millionth, as it does where rows are no more than columns."""
    root, failed = torch.linalg.cholesky_ex(points.T.cov(correction=0))
    free = root.diagonal() > 1e-6 * points.std(0)
    return None if failed or not free.all() else root


def one_gaussian(points, x):
    """Mean log p of x under the Gaussian of the points; NaN if there is none,
    since a column follows from the others."""
    if root_of_covariance(points) is None:
        return points.new_tensor(math.nan)
    covariance = points.T.cov(correction=0)
    normal = GaussianMixture(points.mean(0)[None], None, covariance[None])
    return normal.log_probability(x).mean()


def without_outliers(points):
    """NaN in the place of numbers that lie 20 times as far from their
    column's median as 95 % of them do: one would set the unit of all. But
    not where that would leave few rows whole."""
    away = (points - points.quantile(0.5, 0)).abs()
    usual = away.quantile(0.95, 0)
    far = (away > 20 * usual) & (usual > 0)
    if far.any(1).float().mean() > 0.5:
        return points
    return points.masked_fill(far, math.nan)


def no_worse(log_p, best, tolerance=1.0):
    """Whether the mean of log_p, (..., n), is below that of best by no more
    than so many standard errors of their difference."""
    deficit, n = best - log_p, log_p.shape[-1]
    error = deficit.std(-1, correction=int(n > 1)) / n**0.5  # of one: 0
    allowed = tolerance * error if tolerance < math.inf else tolerance
    return deficit.mean(-1) <= allowed


# What train takes as data


def training_sets(flow, data, fraction):
    """What train takes as data: a list of points (N, d), float64, one for
    all members or one each."""
    if not isinstance(flow, CouplingFlow):
        raise TypeError(f"flow must be a CouplingFlow, got {brief(flow)}")
    frozen = not any(p.requires_grad for p in flow.parameters())
    if frozen or torch.is_inference_mode_enabled():
        raise ValueError(
            "flow must have weights that require gradients, got "
            + ("none: see flow.requires_grad_()" if frozen else
               "torch.inference_mode(), which has no gradients")
        )  # fmt: skip
    S, kinds = flow.members, (ToyDataset, torch.Tensor, np.ndarray)
    listed = isinstance(data, (list, tuple)) and data and S
    listed = listed and isinstance(data[0], kinds)
    sets = data if listed else [data]
    sets = [x.data if isinstance(x, ToyDataset) else x for x in sets]
    check = partial(check_points, members=None if listed else S, hint=FLOW_OF)
    sets = [check(x, "data", flow.dim).detach() for x in sets]
    sets = [*sets[0]] if sets[0].dim() == 3 else sets
    [check_finite(x.float(), "data", x) for x in sets]
    spread = min((x.amax(0) - x.amin(0)).max().item() for x in sets)
    if 0 < spread < 1e-30:  # a scale in single precision loses its digits
        raise ValueError(f"data must vary by 1e-30 or more, got {spread:g}")
    sizes = {x.shape for x in sets}
    if listed and (len(sets) != S or len(sizes) > 1):
        raise ValueError(
            f"data must be {S} sets (N, {flow.dim}) of one size, got "
            f"{len(sets)} of shapes {[tuple(s) for s in sizes]}"
        )
    held_out_count(len(sets[0]), fraction)
    return sets


def held_out_count(N, fraction):
    count = max(1, round(fraction * N))
    if N - count < 2:
        raise ValueError(
            f"data must leave 2 points or more to fit, got {N} with "
            f"valid_fraction {fraction}"
        )
    return count
