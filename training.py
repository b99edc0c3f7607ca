"""Maximum likelihood for coupling flows: the recipe and the loop.

A flow is fitted by the mean of -log p over its training points, in nats. The
recipe says how; the loop is `train`. Its pieces, in the order of their use:
`Recipe.kernel` and `Recipe.batches` give an epoch's points, `Recipe.rate` the
learning rate of a step, `update_mean` averages the weights, and `Checkpoint`
keeps the epoch that is returned.
"""

import copy
import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from checks import brief, check_flag, check_integer, check_number
from helpers import (
    TRAINING,
    CouplingFlow,
    ToyDataset,
    one_thread,
    random_generators,
    select_bandwidth,
    sharpen,
)


@dataclass(frozen=True)
class Recipe:
    """How to train: each switch can be turned off by its own.

    batch_size, learning_rate: of Adam, with decay beta2 for its running mean
        of the squared gradient. (Kingma, Ba 2015)
    warmup: over this share of the steps the learning rate rises from 0.
    cosine: it falls to 0 along a cosine. (Loshchilov, Hutter 2017)
    shuffle: a new order of the points in every epoch.
    jitter: every batch gets fresh noise, whose standard deviation is jitter
        times select_bandwidth of the training points. This is maximum
        likelihood on their kernel estimate. 0: none.
    sharpened: the noise is added to sharpen(points, width) in their place.
    average: decay of the running mean of the weights, which is what is
        validated and returned. 0: none. (Izmailov et al. 2018)
    tolerance: return the last epoch whose held-out loss is within a standard
        error of the best one's: among losses that a small held-out set
        cannot tell apart, the most trained, since the rate has fallen
        furthest there. False: the best one. (The rule of one standard error
        is that of Breiman et al. 1984, section 3.4, who take the simplest.)
    valid_fraction: share of the points, from the end, that is held out.
    """

    batch_size: int = 256
    learning_rate: float = 1e-2
    beta2: float = 0.99
    warmup: float = 0.1
    cosine: bool = True
    shuffle: bool = True
    jitter: float = 1.5
    sharpened: bool = True
    average: float = 0.99
    tolerance: bool = True
    valid_fraction: float = 0.1

    def __post_init__(self):
        check_integer(self.batch_size, "batch_size")
        check_number(self.learning_rate, "learning_rate")
        for name in ("beta2", "warmup", "average"):
            check_number(getattr(self, name), name, below=1, or_equal=True)
        for name in ("cosine", "shuffle", "sharpened", "tolerance"):
            check_flag(getattr(self, name), name)
        check_number(self.jitter, "jitter", or_equal=True)
        check_number(self.valid_fraction, "valid_fraction", below=1)

    def kernel(self, points):
        """The kernel estimate that the batches are drawn from: its centres,
        as points (..., n, d), and its width, () or (S,)."""
        sets = points.reshape(-1, *points.shape[-2:])
        widths = [self.jitter and self.jitter * bandwidth(x) for x in sets]
        if self.jitter and self.sharpened:
            pairs = zip(sets, widths, strict=True)
            sets = torch.stack([sharpen(x, h).to(x) for x, h in pairs])
        width = points.new_tensor(widths).reshape(points.shape[:-2])
        return sets.reshape(points.shape), width

    def batches(self, centres, width, generators):
        """An epoch: centres (..., n, d) in a new order, plus width times
        noise, in parts. Each member draws from its own generator."""

        def draw(sampler):
            draws = torch.stack([sampler(g) for g in generators])
            return draws.to(centres.device).reshape(*centres.shape[:-1], -1)

        (n, d), points = centres.shape[-2:], centres
        if self.shuffle:
            order = draw(lambda g: torch.randperm(n, generator=g))
            points = points.gather(-2, order.expand_as(points))
        if self.jitter:
            noise = draw(lambda g: torch.randn(n, d, generator=g))
            points = points + width[..., None, None] * noise.to(points)
        return points.tensor_split(math.ceil(n / self.batch_size), -2)

    def rate(self, step, steps):
        """The learning rate of a step, counted from 0, as a share of
        learning_rate."""
        rise = min(1, (step + 1) / (self.warmup * steps)) if self.warmup else 1
        fall = (1 + math.cos(math.pi * step / steps * self.cosine)) / 2
        return rise * fall


@one_thread()
def train(flow, data, epochs, *, seed=0, progress=True, **recipe):
    """Maximum likelihood by Adam: -> TrainingResult. `flow` is left as it
    was; the result's .flow is the trained one.

    data: a ToyDataset or points (N, d); for S members one of these, or a
    list of S of one size. recipe: what differs from Recipe's defaults.
    Member i of seed s is trained as a single flow of seed s + i would be.
    A KeyboardInterrupt after the first epoch returns what was reached. A
    member whose loss stops being finite keeps its last checkpoint and is
    marked in .diverged, with a warning; RuntimeError if none remains.
    ValueError, TypeError for bad arguments.

    >>> moons = ToyDataset("Moons", 500, seed=0)
    >>> result = train(CouplingFlow(2), moons, epochs=3, progress=False)
    >>> result.valid_losses.shape
    torch.Size([3])
    """
    recipe = Recipe(**recipe)
    points, held_out = split_off(flow, data, recipe.valid_fraction)
    epochs = check_integer(epochs, "epochs")
    check_flag(progress, "progress")
    generators = random_generators(seed, flow.members or 1, TRAINING)
    start = time.process_time()
    centres, width = recipe.kernel(points)
    moving, mean = copy.deepcopy(flow), copy.deepcopy(flow)
    n, step = points.shape[-2], 0
    steps = epochs * math.ceil(n / recipe.batch_size)
    betas = 0.9, recipe.beta2
    adam = torch.optim.Adam(
        moving.parameters(), recipe.learning_rate, betas, fused=True
    )
    schedule = LambdaLR(adam, partial(recipe.rate, steps=steps))
    checkpoint = Checkpoint.before(flow, held_out)
    bar = progress_bar(progress, range(epochs), "training", unit="epoch")
    try:
        for epoch in bar:
            total = 0
            for batch in recipe.batches(centres, width, generators):
                loss = -moving.log_probability(batch).mean(-1)
                adam.zero_grad()
                loss.sum().backward()  # members: each has its own gradient
                adam.step()
                schedule.step()
                step += 1
                update_mean(mean, moving, max(1 - recipe.average, 1 / step))
                total = total + loss.detach() * batch.shape[-2] / n
            with torch.no_grad():
                log_p = mean.log_probability(held_out)
            checkpoint = checkpoint.after(epoch, mean, total, log_p, recipe)
            bar.set_postfix_str(f"held out {-log_p.mean():.3f} nats")
    except KeyboardInterrupt:
        if not checkpoint.losses:
            raise
    seconds = time.process_time() - start
    return checkpoint.result(flow, width, epochs, seconds)


@torch.no_grad()
def update_mean(mean, moving, share):
    """mean + share (moving - mean), weight by weight. With a decay of 0.99
    the shares 1, 1/2, 1/3, ..., 0.01, 0.01, ... give the mean of all steps
    in the beginning, and then of some 100. (After Polyak, Juditsky 1992)"""
    for average, weight in zip(
        mean.parameters(), moving.parameters(), strict=True
    ):
        average.lerp_(weight, share)


class Checkpoint(NamedTuple):
    """The epoch whose weights are returned, and how it came about: a new
    value after every epoch, so that an interrupt always finds a whole one.

    epoch: () or (S,); weights: those of that epoch; best: log p of the
    held-out points at the epoch with the best mean, (..., n); alive: whether
    every loss was finite; losses, valid_losses: one a past epoch.
    """

    epoch: torch.Tensor
    weights: list
    best: torch.Tensor
    alive: torch.Tensor
    losses: tuple = ()
    valid_losses: tuple = ()

    @classmethod
    def before(cls, flow, held_out):
        """Before the first epoch."""
        weights = [p.detach().clone() for p in flow.parameters()]
        best = held_out.new_full(held_out.shape[:-1], -math.inf)
        epoch = torch.zeros_like(best[..., 0], dtype=torch.long)
        return cls(epoch, weights, best, torch.ones_like(epoch).bool())

    def after(self, epoch, flow, loss, log_p, recipe):
        """After one more epoch."""
        alive = self.alive & loss.isfinite()
        if not alive.any():
            raise RuntimeError(
                f"training diverged in epoch {epoch + 1}: the loss is "
                f"{loss.flatten()[0].item()}; try a learning_rate below "
                f"{recipe.learning_rate}, or a flow with a bounded log-scale "
                "(bound=2.5)"
            )
        better = log_p.mean(-1) > self.best.mean(-1)  # never where it is NaN
        best = torch.where(better[..., None], log_p, self.best)
        take = better | (no_worse(log_p, best) & recipe.tolerance)
        weights = [
            torch.where(as_wide(take, p), p.detach(), w)
            for p, w in zip(flow.parameters(), self.weights, strict=True)
        ]
        return Checkpoint(
            torch.where(take, epoch, self.epoch), weights, best, alive,
            (*self.losses, loss), (*self.valid_losses, -log_p.mean(-1)),
        )  # fmt: skip

    def result(self, flow, width, epochs, seconds):
        """A copy of the flow with the weights that were kept, and its
        history."""
        alive = self.alive & self.best.mean(-1).isfinite()
        interrupted = len(self.losses) < epochs
        if not alive.any():
            raise RuntimeError(
                "the held-out loss was never finite: look for an outlier "
                "among the last points of data"
            )
        if interrupted:
            warnings.warn(
                f"interrupted: returning the best of {len(self.losses)} "
                "epochs", stacklevel=4,
            )  # fmt: skip
        if not alive.all():
            lost = (~alive).nonzero().flatten().tolist()
            warnings.warn(
                f"members {lost} diverged, left out", stacklevel=4
            )  # fmt: skip
        trained = copy.deepcopy(flow)
        for p, weight in zip(trained.parameters(), self.weights, strict=True):
            p.data = weight
        valid_losses = torch.stack(self.valid_losses)
        best_epoch = valid_losses.nan_to_num(nan=math.inf).argmin(0)
        entries = best_epoch, -self.best.mean(-1), self.epoch, width, ~alive
        if flow.members is None:
            entries = (entry.item() for entry in entries)
        return TrainingResult(
            trained, torch.stack(self.losses), valid_losses, *entries,
            interrupted, seconds,
        )  # fmt: skip


@dataclass
class TrainingResult:
    """What train returns; with S members the entries are tensors (S,).

    flow: the flow to use, with the weights of used_epoch. train_losses,
    valid_losses: (epochs[, S]), mean -log p in nats a point: of the weights
    on their way, over an epoch's noisy training points, and of the averaged
    weights at its end, on the clean held-out ones; so not to be compared.
    best_epoch: where, counted from 0, valid_losses is lowest, and
    best_valid_loss its value there.
    used_epoch: the last one no worse than that by more than one standard
    error of the difference, point by point.
    noise: its standard deviation, in the data's unit. diverged: whether a
    loss stopped being finite. interrupted: whether epochs are missing.
    seconds: CPU time.
    """

    flow: CouplingFlow
    train_losses: torch.Tensor
    valid_losses: torch.Tensor
    best_epoch: int | torch.Tensor
    best_valid_loss: float | torch.Tensor
    used_epoch: int | torch.Tensor
    noise: float | torch.Tensor
    diverged: bool | torch.Tensor
    interrupted: bool
    seconds: float


# Plumbing


def progress_bar(shown, *args, **options):
    """A bar of tqdm, which TQDM_DISABLE=1 in the environment hides too."""
    hidden = {} if shown else {"disable": True}
    return tqdm(*args, leave=False, **hidden, **options)


def bandwidth(points, at_most=2000):
    """select_bandwidth of at most so many points, scaled as the best h of
    more of them: N^(-1 / (d + 4))."""
    few, d = points[:at_most], points.shape[-1]
    return select_bandwidth(few) * (len(points) / len(few)) ** (-1 / (d + 4))


def no_worse(log_p, best):
    """Whether the mean of log_p, (..., n), is below that of best by no more
    than a standard error of their difference; False for a single point."""
    deficit, n = best - log_p, log_p.shape[-1]
    if n == 1:
        return torch.zeros_like(deficit[..., 0], dtype=torch.bool)
    return deficit.mean(-1) <= deficit.std(-1) / n**0.5


def as_wide(value, parameter):
    """value, () or (S,), with axes added until it broadcasts."""
    return value.reshape(value.shape + (1,) * (parameter.dim() - value.dim()))


def split_off(flow, data, fraction):
    """The first points to fit and the last to validate: (..., n, d) each."""
    if not isinstance(flow, CouplingFlow):
        raise TypeError(f"flow must be a CouplingFlow, got {brief(flow)}")
    points = training_points(flow, data)
    n = points.shape[-2]
    held_out = max(1, round(fraction * n))
    if n - held_out < 2:
        raise ValueError(
            f"data must leave 2 points or more to fit, got {n} with "
            f"valid_fraction {fraction}"
        )
    return points.split([n - held_out, held_out], -2)


def training_points(flow, data):
    """What train takes as data, as the flow's (n, d) or (S, n, d)."""
    many = isinstance(data, (list, tuple)) and data and flow.members
    if many and isinstance(data[0], (ToyDataset, torch.Tensor, np.ndarray)):
        sets = [d.data if isinstance(d, ToyDataset) else d for d in data]
        parts = [flow.check(points, "data") for points in sets]
        sizes = {part.shape for part in parts}
        if len(parts) != flow.members or len(sizes) > 1:
            raise ValueError(
                f"data must be {flow.members} sets (N, {flow.dim}) of one "
                f"size, got {len(parts)} of shapes {[tuple(s) for s in sizes]}"
            )
        return torch.stack(parts)
    data = data.data if isinstance(data, ToyDataset) else data
    points = flow.check(data, "data")
    if flow.members is None:
        return points
    return points.expand(flow.members, *points.shape[-2:])
