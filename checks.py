"""What is refused, and in which words: each argument once, where it enters.

A message names the argument, what was expected and, in short, the value.
"""

import math
import reprlib

import numpy as np
import torch


class Short(reprlib.Repr):
    """repr that leaves out most of a long value; of a large array it gives
    the shape."""

    def repr1(self, x, level):
        if isinstance(x, (torch.Tensor, np.ndarray)):
            if math.prod(x.shape) > 9:
                return f"an array of shape {tuple(x.shape)}"
            x = x.tolist()
        return super().repr1(x, level)


SHORT = Short()
SHORT.maxother = SHORT.maxstring = SHORT.maxlong = 80


def brief(value):
    """A value as messages show it: one line of at most 120 characters."""
    try:
        text = " ".join(SHORT.repr(value).split())
    except ValueError:  # an integer of thousands of digits
        text = f"one {type(value).__name__} too long to show"
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"


def check_points(
    x, name="x", dim=None, dtype=torch.float64, device="cpu", members=None
):
    """x as finite points (n, d), or (members, n, d), or a helpful error.
    dtype, device: None, as they are, but for integers, which get float64."""
    if not isinstance(x, torch.Tensor):
        if np.ma.is_masked(x):
            raise ValueError(f"{name} must have no masked values")
        try:
            array = np.array(x)
            native = array.dtype.newbyteorder("=")
            wide = array.dtype == np.longdouble
            x = torch.from_numpy(array.astype(float if wide else native))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be an array of real numbers, got {brief(x)} "
                f"of dtype {getattr(x, 'dtype', None)}"
            ) from error
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    shape = tuple(x.shape)
    axes = shape[:-2] == () or members is not None and shape[:-2] == (members,)
    if len(shape) < 2 or not axes or 0 in shape or shape[-1] != (
        dim or shape[-1]
    ):  # fmt: skip
        d = "d" if dim is None else dim
        wanted = f"(n, {d})" if members is None else f"({members}, n, {d})"
        raise ValueError(
            f"{name} must have shape {wanted} with n >= 1, got {shape}"
        )
    if dtype is None:
        dtype = x.dtype if x.dtype == torch.float32 else torch.float64
    return check_finite(x.to(dtype=dtype, device=device or x.device), name)


def check_finite(x, name):
    """x, if all of it is finite."""
    # One cheap sum settles all but the odd case, such as 1e38 + 1e38.
    if not math.isfinite(x.detach().sum()) and not torch.isfinite(x).all():
        bad = x[~torch.isfinite(x)][0].item()
        raise ValueError(f"{name} must be finite, got {bad}")
    return x


def check_samples(samples):
    samples = check_points(samples, "samples").detach()
    if len(samples) < 2:
        raise ValueError(
            f"samples must hold at least 2 points, got {len(samples)}"
        )
    return samples


def check_integer(value, name, at_least=1):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {brief(value)}")
    if value < at_least:
        raise ValueError(
            f"{name} must be at least {at_least}, got {brief(value)}"
        )
    return int(value)


def check_index(value, name, count):
    """One of 0, ..., count - 1: ValueError, TypeError otherwise."""
    if check_integer(value, name, at_least=0) >= count:
        raise ValueError(
            f"{name} must be below {count}, the number of members, got "
            f"{brief(value)}"
        )


def check_counts(**counts):
    """Refuse a count that is not an integer >= 1, by its name: TypeError or
    ValueError. The notebooks' parameters pass through here first."""
    for name, value in counts.items():
        check_integer(value, name)


def check_number(value, name, above=0.0, below=math.inf, or_equal=False):
    real = (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, real):
        raise TypeError(f"{name} must be a number, got {brief(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    low = number > above or or_equal and number == above
    if not (low and number < below):
        sign = ">=" if or_equal else ">"
        raise ValueError(
            f"{name} must be {sign} {above} and < {below}, got {brief(value)}"
        )
    return number


def check_flag(value, name):
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {brief(value)}")


def check_choice(value, name, known):
    if not (isinstance(value, str) and value in known):
        raise ValueError(
            f"{name} must be one of {', '.join(known)}; got {brief(value)}"
        )
    return value


def check_candidates(candidates):
    if np.ndim(candidates) != 1 or not len(candidates):
        raise ValueError(
            "candidates must be a non-empty list of bandwidths, "
            f"got {brief(candidates)}"
        )
    numbers = [c.item() if hasattr(c, "item") else c for c in candidates]
    return [check_number(c, "candidates") for c in numbers]


def check_bandwidth(H, d):
    """A number h, as h I, or an invertible matrix: -> (d, d), float64."""
    matrix = H
    if not isinstance(H, (list, tuple)) and np.ndim(H) == 0:
        h = H.item() if isinstance(H, torch.Tensor) else H
        matrix = check_number(h, "H") * np.eye(d)
    matrix = check_points(matrix, "H")
    rows = matrix / matrix.norm(dim=1, keepdim=True)  # whatever their units
    if matrix.shape != (d, d) or not torch.linalg.cond(rows) < 1e15:
        raise ValueError(
            f"H must be a number > 0 or an invertible {d} x {d} matrix, "
            f"got {brief(H)}"
        )
    return matrix


def check_covariances(covariances, k, d):
    """Their Cholesky factors: (k, d, d) -> (k, d, d)."""
    C = torch.as_tensor(np.array(covariances), dtype=torch.float64)
    roots, failed = None, True
    if C.shape == (k, d, d):
        if (C - C.mT).abs().max() <= 1e-5 * C.abs().max():  # not where NaN
            roots, failed = torch.linalg.cholesky_ex(C)
    if roots is None or failed.any() or not torch.isfinite(roots).all():
        raise ValueError(
            f"covariances must be ({k}, {d}, {d}), symmetric and positive "
            f"definite, got {brief(covariances)}"
        )
    return roots


def check_limits(limits, name):
    try:
        low, high = (float(v) for v in limits)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be two numbers (low, high), got {brief(limits)}"
        ) from error
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            f"{name} must be finite with low < high, got {brief(limits)}"
        )
    return low, high


def check_grid(grid, dim=2):
    if not hasattr(grid, "cell_area"):
        raise TypeError(f"grid must be a Grid, got {brief(grid)}")
    if dim != 2:
        raise ValueError(f"grid is of the plane, the density has dim {dim}")
    return grid


def check_mask(mask):
    """mask as a list of ones, kept, and zeros; the ones first or last."""
    values = mask.tolist() if hasattr(mask, "tolist") else mask
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"mask must be a list, got {brief(mask)}")
    values = list(values)
    zeros_and_ones = all(np.ndim(v) == 0 and v in (0, 1) for v in values)
    ordered = zeros_and_ones and sorted(values) in (values, values[::-1])
    if not ordered or len({*values}) < 2:
        raise ValueError(
            "mask must hold ones and zeros, the ones first or last, such as "
            f"[1, 0], got {brief(mask)}"
        )
    return [int(v) for v in values]


def check_members(members):
    return None if members is None else check_integer(members, "members")


def check_density(density, name):
    if not all(hasattr(density, f) for f in ("log_probability", "sample")):
        raise TypeError(
            f"{name} must have log_probability and sample, "
            f"got {brief(density)}"
        )
    return density
