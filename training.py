"""Maximum likelihood for coupling flows: the recipe and the loop.

A flow is fitted by the mean of -log p over its training points, in nats. The
recipe says how; the loop is `train`. Its pieces, in the order of their use:
`prepare` (preparation.py) holds points out and finds the unit and the noise,
`Recipe.batches` gives an epoch's points, `Recipe.rate` the learning rate of a
step, `Recipe.update` averages the weights, and `Checkpoint` keeps the epoch
that is returned.
"""

import contextlib
import copy
import math
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from checks import check_flag, check_integer, check_names, check_number
from helpers import (
    TRAINING,
    CouplingFlow,
    GaussianKDE,
    one_thread,
    random_generators,
)
from preparation import no_worse, prepare, training_sets


@dataclass(frozen=True)
class Recipe:
    """How to train: each switch can be turned off on its own.

    batch_size: at most so many points a batch, in equal parts.
    learning_rate: of Adam, with decay beta2 for its running mean of the
        squared gradient. (Kingma, Ba 2015)
    warmup, cosine: factors of the learning rate. One rises from 0 to 1 over
        this share of the steps, and the other falls from 1 to 0 over all of
        them, along half a cosine. (Loshchilov, Hutter 2017)
    shuffle: a new order of the points in every epoch.
    standardize: the layers see the points less their mean, divided by what
        makes their root mean square length 2.5, or less: one number for all
        coordinates, one for each, or a root of the covariance, whichever the
        points ask for. (unit_and_bandwidth and units, in preparation.py)
    jitter: every batch gets fresh noise of standard deviation jitter times
        h sqrt(2 / d), with h = select_bandwidth of the training points, so
        that the length of a noise vector does not grow with d. This is
        maximum likelihood on their kernel estimate. 0: none.
    sharpened: the noise is added to sharpen(points, its width) in their place.
    average: decay of the running mean of the weights, which is what is
        validated and returned. 0: none. (Equal shares: Polyak, Juditsky 1992;
        Izmailov et al. 2018)
    tolerance: return the last epoch whose held-out loss is within so many
        standard errors of the best one's: among losses that a small held-out
        set cannot tell apart, the most trained, since the rate has fallen
        furthest there. 0: the best one; math.inf: the last. (The rule of one
        standard error is that of Breiman et al. 1984, section 3.4, who take
        the simplest.)
    valid_fraction: share of the points, drawn by the seed, that is held out.
    """

    batch_size: int = 256
    learning_rate: float = 1e-2
    beta2: float = 0.99
    warmup: float = 0.1
    cosine: bool = True
    shuffle: bool = True
    standardize: bool = True
    jitter: float = 1.5
    sharpened: bool = True
    average: float = 0.99
    tolerance: float = 1.0
    valid_fraction: float = 0.1

    def __new__(cls, **switches):
        """Whose names are checked first."""
        check_names(switches, cls.__dataclass_fields__, "switch of train")
        return super().__new__(cls)

    def __post_init__(self):
        check_integer(self.batch_size, "batch_size")
        check_number(self.learning_rate, "learning_rate")
        for name in ("beta2", "warmup", "average"):
            check_number(getattr(self, name), name, 0, 1, or_equal=True)
        for name in ("cosine", "shuffle", "standardize", "sharpened"):
            check_flag(getattr(self, name), name)
        if self.tolerance != math.inf:
            check_number(self.tolerance, "tolerance", 0, or_equal=True)
        check_number(self.jitter, "jitter", 0, or_equal=True)
        check_number(self.valid_fraction, "valid_fraction", 0, 1)

    def descent(self, flow, epochs, centres):
        """Adam, and the schedule of its learning rate."""
        steps = epochs * math.ceil(centres.shape[-2] / self.batch_size)
        rate, betas = self.learning_rate, (0.9, self.beta2)
        adam = torch.optim.Adam(flow.parameters(), rate, betas, fused=True)
        return adam, LambdaLR(adam, partial(self.rate, steps=steps))

    def batches(self, points, generators):
        """An epoch: the centres (..., n, d) in a new order, plus noise, in
        parts. Each member draws from its own generator."""
        centres = points.centres

        def draw(sampler):
            draws = torch.stack([sampler(g) for g in generators])
            return draws.to(centres.device).reshape(*centres.shape[:-1], -1)

        (n, d), drawn = centres.shape[-2:], centres
        if self.shuffle:
            order = draw(lambda g: torch.randperm(n, generator=g))
            drawn = drawn.gather(-2, order.expand_as(drawn))
        if self.jitter:
            noise = draw(lambda g: torch.randn(n, d, generator=g))
            drawn = drawn + points.noise * noise.to(drawn)
        return drawn.tensor_split(math.ceil(n / self.batch_size), -2)

    def rate(self, step, steps):
        """The learning rate of a step, counted from 0, as a share of
        learning_rate."""
        rise = min(1, (step + 1) / (self.warmup * steps)) if self.warmup else 1
        half = (1 + math.cos(math.pi * step / steps)) / 2
        return rise * (half if self.cosine else 1)

    @torch.no_grad()
    def update(self, mean, moving, step):
        """mean + share (moving - mean), for lists of weights, after the
        step-th step. With a decay of 0.99 the shares 1, 1/2, 1/3, ..., 0.01,
        0.01, ... give the mean of all steps in the beginning, and then of
        some 100. (After Polyak, Juditsky 1992)"""
        torch._foreach_lerp_(mean, moving, max(1 - self.average, 1 / step))


@one_thread()
@torch.enable_grad()
def train(flow, data, epochs, *, seed=0, progress=True, **recipe):
    """Maximum likelihood by Adam: -> TrainingResult. `flow` is left as it
    was; the result's .flow is the trained one.

    data: a ToyDataset or points (N, d), rows in any order, in any unit; for S
    members one of these, or a list of S of one size. recipe: what differs
    from Recipe's defaults. Member i of seed s is trained as a single flow of
    seed s + i would be. A KeyboardInterrupt after the first epoch returns
    what was reached, and so does a loss that stops being finite, with a
    warning; RuntimeError if nothing was. ValueError, TypeError for bad input.

    >>> from helpers import CouplingFlow, ToyDataset
    >>> moons = ToyDataset("Moons", 500, seed=0)
    >>> result = train(CouplingFlow(2), moons, epochs=3, progress=False)
    >>> result.valid_losses.shape
    torch.Size([3])
    """
    recipe, start = Recipe(**recipe), time.process_time()
    sets = training_sets(flow, data, recipe.valid_fraction)
    epochs = check_integer(epochs, "epochs")
    bar = progress_bar(progress, range(epochs), "training", unit="epoch")
    generators = random_generators(seed, flow.members or 1, TRAINING)
    trained, points = prepare(flow, sets, recipe, generators)
    moving, mean = inner(trained), inner(trained)  # copies: the layers alone
    checkpoint = Checkpoint.before(moving, points.valid)
    adam, schedule = recipe.descent(moving, epochs, points.centres)
    weights = [*mean.parameters()], [*moving.parameters()]
    with interrupts() as pressed:
        try:
            for _ in bar:
                total = 0
                for batch in recipe.batches(points, generators):
                    loss = -moving.log_probability(batch).mean(-1)
                    adam.zero_grad()
                    loss.sum().backward()  # each member's own gradient
                    adam.step()
                    schedule.step()
                    recipe.update(*weights, step=schedule.last_epoch)
                    part = batch.shape[-2] / points.centres.shape[-2]
                    total = total + part * loss.detach()
                    if pressed:
                        raise KeyboardInterrupt
                checkpoint = checkpoint.after(mean, total, points, recipe)
                bar.set_postfix_str(checkpoint.summary(trained))
                if not checkpoint.alive.any():
                    break
        except KeyboardInterrupt:
            pressed.append(True)
        bar.close()
        return checkpoint.result(trained, points, bool(pressed), recipe, start)


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
    def before(cls, flow, valid):
        """Before the first epoch."""
        weights = [p.detach().clone() for p in flow.parameters()]
        best = valid.new_full(valid.shape[:-1], -math.inf)
        epoch = torch.zeros_like(best[..., 0], dtype=torch.long)
        return cls(epoch, weights, best, torch.ones_like(epoch).bool())

    @torch.no_grad()
    def after(self, flow, loss, points, recipe):
        """After one more epoch."""
        log_p = flow.log_probability(points.valid)
        alive = self.alive & loss.isfinite()
        better = alive & (log_p.mean(-1) > self.best.mean(-1))  # not if NaN
        best = torch.where(better[..., None], log_p, self.best)
        take = better | (alive & no_worse(log_p, best, recipe.tolerance))
        weights = [
            torch.where(take.view(-1, *[1] * (p.dim() - 1)), p.detach(), w)
            for p, w in zip(flow.parameters(), self.weights, strict=True)
        ]
        return Checkpoint(
            torch.where(take, len(self.losses), self.epoch),
            weights, best, alive,
            (*self.losses, loss), (*self.valid_losses, -log_p.mean(-1)),
        )  # fmt: skip

    def summary(self, trained):
        """For the progress bar."""
        loss = self.valid_losses[-1].mean() + log_volume(trained).mean()
        return f"held out {loss:.3f} nats"

    @property
    def diverged(self):
        """Whether a loss stopped being finite, or none ever was."""
        return ~(self.alive & self.best.mean(-1).isfinite())

    def troubles(self, flow, interrupted, recipe):
        """What went wrong, in words; RuntimeError if nothing was reached."""
        kept, count = self.best.mean(-1).isfinite(), len(self.losses)
        bound = getattr(flow.layers[0].coupling, "bound", 0)
        bounded = "" if bound is not None else ", or a flow with bound=2.5"
        remedy = (
            f"try a learning_rate below {recipe.learning_rate}{bounded}, and "
            "look for an outlier in data"
        )
        if not kept.any() and not self.alive.any():
            raise RuntimeError(
                f"training diverged in epoch {count}: the loss is "
                f"{self.losses[-1].flatten()[0].item()}; {remedy}"
            )
        if not kept.any():
            raise RuntimeError(
                "the held-out loss was never finite: look for an outlier in "
                "data"
            )
        if interrupted:
            yield f"interrupted: returning the best of {count} epochs"
        if flow.members is None and self.diverged:
            yield (
                f"training diverged in epoch {count}: returning the best of "
                f"the {count - 1} before; {remedy}"
            )
        elif self.diverged.any():
            lost = self.diverged.nonzero().flatten().tolist()
            yield (
                f"members {lost} diverged: they keep their last checkpoint, "
                f"if any; {remedy}"
            )

    def result(self, trained, points, interrupted, recipe, start):
        """The flow with the weights that were kept, and its history."""
        if not self.losses:
            raise KeyboardInterrupt  # nothing to return yet
        for trouble in self.troubles(trained, interrupted, recipe):
            warn(trouble)
        for p, weight in zip(trained.parameters(), self.weights, strict=True):
            p.data = weight
        volume = log_volume(trained)  # from nats of u to nats of x
        losses, valid_losses = (
            torch.stack(own) + volume
            for own in (self.losses, self.valid_losses)
        )
        best_epoch = valid_losses.nan_to_num(nan=math.inf).argmin(0)
        best_loss = volume - self.best.mean(-1)
        for remark in remarks(points, self, losses[-1] - volume, trained):
            warn(remark)
        entries = best_epoch, best_loss, self.epoch, self.diverged
        if trained.members is None:
            entries = (entry.item() for entry in entries)
        noise = (points.noise * trained.outermost.scale)[..., 0, :]
        noise = noise * trained.outermost.shear.norm(dim=-1)
        return TrainingResult(
            trained, losses, valid_losses, *entries, noise, points.held_out,
            interrupted, time.process_time() - start,
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
    used_epoch: the last one no worse than that by more than the recipe's
    tolerance, in standard errors of the difference, point by point.
    diverged: whether a loss stopped being finite. noise: its standard
    deviation for each coordinate, (d,) or (S, d), in the data's unit.
    held_out: the rows of the data that were held out, (m,) or (S, m).
    interrupted: whether epochs are missing. seconds: CPU time.
    """

    flow: CouplingFlow
    train_losses: torch.Tensor
    valid_losses: torch.Tensor
    best_epoch: int | torch.Tensor
    best_valid_loss: float | torch.Tensor
    used_epoch: int | torch.Tensor
    diverged: bool | torch.Tensor
    noise: torch.Tensor
    held_out: torch.Tensor
    interrupted: bool
    seconds: float


# Plumbing


@contextlib.contextmanager
def interrupts():
    """Ctrl-C is noted in the list that is given, for what is inside to end
    where all is whole. The second one raises KeyboardInterrupt at once."""
    pressed, usual = [], signal.default_int_handler

    def note(*_):
        pressed.append(True)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGINT) is usual
    try:
        if ours:
            signal.signal(signal.SIGINT, note)
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, usual)


def progress_bar(shown, *args, **options):
    """A bar of tqdm, which TQDM_DISABLE=1 in the environment hides too."""
    check_flag(shown, "progress")
    hidden = {} if shown else {"disable": True}
    return tqdm(*args, leave=False, **hidden, **options)


def warn(message):
    """As from the line that called train."""
    warnings.warn(message, stacklevel=6)


def inner(flow):
    """A copy of the flow's layers alone, without its outermost map."""
    flow = copy.deepcopy(flow)
    flow.outermost.set(0, 1)
    return flow


def log_volume(flow):
    """log |det dx/du| of a flow's outermost map: () or (S,)."""
    return flow.outermost.scale.log().sum((-2, -1))


def remarks(points, kept, loss, trained):
    """What the user should know of a fit: of a Checkpoint, and the loss at
    the training points at the end, () or (S,), in the layers' unit."""
    best, loss, volume = (
        x.cpu() for x in (kept.best, loss, log_volume(trained))
    )
    log_p = best.mean(-1)
    if (most := largest(points.gaussian - log_p + volume)) > 0.1:
        yield (
            "on the held-out points one Gaussian is better than the flow, by "
            f"{most:.2g} nats a point: look for outliers, and for codes such "
            "as -999, take logarithms of columns with long tails, or train "
            "longer"
        )
    few = points._replace(valid=points.valid[..., :200, :])
    target = target_log_p(few) - best[..., :200].mean(-1)
    if (most := largest(target)) > 0.5:
        yield (
            "on the held-out points the kernel estimate that the flow is "
            f"fitted to is better than the flow, by {most:.2g} nats a point: "
            "take a kernel estimate, or more layers, splines, more epochs"
        )
    epoch, count = kept.epoch.min().item() + 1, len(kept.losses)
    if epoch < count / 10:
        yield (
            f"on the held-out points the weights of epoch {epoch} of {count} "
            "were the best, when training had hardly begun: hold out more "
            "rows (valid_fraction), or take a kernel estimate"
        )
    if (most := largest(loss + log_p)) > 15:
        yield (
            "the loss at the points that are fitted is higher than at those "
            f"held out, by {most:.2g} nats a point: some of them are "
            "outliers, which the flow does not fit"
        )
    unit = trained.outermost
    digits = torch.finfo(unit.shift.dtype).eps * unit.shift.abs() / unit.scale
    if (most := largest(digits)) > 1e-3:
        yield (
            "the data lie so far from 0, for their spread in some direction, "
            f"that samples of the flow are rounded to {most:.1g} of it: take "
            "flow.double()"
        )


def target_log_p(points):
    """Mean log p of the held-out points under the kernel estimate that the
    flow is fitted to, in the layers' unit: () or (S,). NaN without noise."""
    lead = points.noise.shape[:-2]
    if not (points.noise > 0).all():
        return torch.full(lead, math.nan)
    parts = (
        x.cpu().reshape(-1, *x.shape[-2:])
        for x in (points.noise, points.centres, points.valid)
    )
    log_p = [
        GaussianKDE(x, torch.diag(h[0])).log_probability(v).mean()
        for h, x, v in zip(*parts, strict=True)
    ]
    return torch.stack(log_p).reshape(lead)


def largest(values):
    """Of those that are finite; 0 if there is none."""
    values = values.cpu().flatten()
    return max(values[values.isfinite()].tolist(), default=0)
