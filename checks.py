"""What is refused, and in which words: each argument once, where it enters.

A message names the argument, what was expected and, in short, the value.
"""

import difflib
import math
import reprlib
import warnings
from numbers import Real

import numpy as np
import torch

SMALL, LARGE = 1e-150, 1e150  # lengths in between have squares


class Short(reprlib.Repr):
    """repr that leaves out most of a long value; of a large array it gives
    the shape."""

    def repr1(self, x, level):
        if isinstance(x, (torch.Tensor, np.ndarray)):
            if math.prod(x.shape) > 9:
                return f"an array of shape {tuple(x.shape)}, {x.dtype}"
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


def as_tensor(x, name):
    """Anything like an array of real numbers."""
    if np.ma.is_masked(x):
        raise ValueError(f"{name} must have no masked values")
    try:
        if isinstance(x, (list, tuple)) and {*map(type, x)} == {torch.Tensor}:
            x = torch.stack(x)  # keeps their gradients
        array = None if isinstance(x, torch.Tensor) else np.array(x)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged
        raise TypeError(
            f"{name} must be an array of real numbers, got {brief(x)}"
        ) from error
    x = x if array is None else real_array(array, name)
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")
    return x if x.layout == torch.strided else x.to_dense()


def real_array(array, name):
    """An array as a tensor. One of objects, such as a table with columns of
    several kinds, may hold numbers, but no words, dates or flags."""
    kind = array.dtype.kind
    for index, value in np.ndenumerate(array) if kind == "O" else ():
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not real or abs(value) > 1e308:
            where = f" at {list(index)}" if index else ""
            remedy = ": make numbers of that column first" if index else ""
            raise TypeError(
                f"{name} must hold real numbers, got {brief(value)}{where}"
                f"{remedy}"
            )
    if kind not in "biufcO":
        raise TypeError(f"{name} must hold real numbers, got {brief(array)}")
    wide = kind == "O" or array.dtype == np.longdouble
    native = array.dtype.newbyteorder("=")  # torch has no other
    return torch.from_numpy(array.astype(float if wide else native))


def check_points(
    x, name="x", dim=None, dtype=torch.float64, device="cpu", members=None,
    most=LARGE, hint="",
):  # fmt: skip
    """x as finite points (n, d), or (members, n, d), or a helpful error.
    dtype, device: None, as they are, but for integers, which get float64.
    most: how far from 0; hint: what to do about another d."""
    x = as_tensor(x, name)
    shape = tuple(x.shape)
    axes = shape[:-2] in ((), (members,))
    fits = len(shape) > 1 and axes and dim in (None, shape[-1])
    if not fits or 0 in shape:
        d = "d" if dim is None else dim
        wanted = f"(n, {d})" if members is None else f"({members}, n, {d})"
        other = axes and len(shape) > 1 and shape[-1] not in (0, 1, dim)
        if other and shape[-2] == dim:
            hint = f"transpose it, or {hint}" if hint else "transpose it"
        raise ValueError(
            f"{name} must have shape {wanted} with n >= 1, got {shape}"
            + (f": {hint.format(shape[-1])}" if other and hint else "")
            + (": reshape(-1, 1) makes it a column"
               if len(shape) == 1 and dim in (None, 1) else "")
            + (": x[None] makes it a row" if shape == (dim,) != (1,) else "")
        )  # fmt: skip
    if dtype is None:
        dtype = x.dtype if x.dtype == torch.float32 else torch.float64
    # In two steps, since Apple's devices have no float64.
    x = check_finite(x.to(device or x.device).to(dtype), name)
    if most < math.inf and (far := x.detach().abs().max().item()) > most:
        raise ValueError(f"{name} must lie within {most:g} of 0, got {far:g}")
    return x


def check_finite(x, name, given=None):
    """x, if all of it is finite; given: the same with more digits."""
    # One cheap sum settles all but the odd case, such as 1e38 + 1e38.
    if not math.isfinite(x.detach().sum()) and not torch.isfinite(x).all():
        place = (~torch.isfinite(x)).nonzero()[0].tolist()
        bad = (x if given is None else given)[tuple(place)].item()
        beyond = f", which is inf in {x.dtype}," if math.isfinite(bad) else ""
        remedy = ": leave such rows out, or fill them" if bad != bad else ""
        got = f"got {bad}{beyond} at {place}{remedy}"
        raise ValueError(f"{name} must be finite, {got}")
    return x


def warn_of_steps(points, widths, name, stacklevel):
    """Warn where the values of a column of points (N, d) repeat, and lie
    further apart than twice the width of a kernel there: widths (d,)."""
    columns = []
    for k, column in enumerate(points.detach().T):
        values = column.unique()
        repeat = 1 < len(values) < len(column) / 2
        if repeat and values.diff().median() > 2 * widths[k]:
            columns.append(k)
    if columns:
        warnings.warn(
            f"columns {columns} of {name} (counted from 0) have values in "
            "steps, wider than a kernel there: the estimate is a comb, whose "
            "log-probabilities say little; first add uniform noise as wide as "
            "a step", stacklevel=stacklevel + 1,
        )  # fmt: skip


def check_single(points):
    """Points in single precision, which keeps seven digits of each number."""
    single = points.float()
    lost = (single.double() - points).abs().amax(0)
    spread = points.amax(0) - points.amin(0)
    if len(points) > 1 and not (lost <= 1e-3 * spread).all():
        far = points.abs().max().item()
        raise ValueError(
            f"points that lie {far:.3g} from 0 are equal in float32: take "
            "density.sample(n, seed), float64, for a ToyDataset"
        )
    return single


def check_formula(values, shape, name):
    """What a Density's own formula returned: a tensor, of numbers."""
    if not isinstance(values, torch.Tensor) or values.shape != shape:
        got = tuple(np.shape(values))
        kind = type(values).__name__
        raise TypeError(
            f"{name} must return a tensor of shape {tuple(shape)}, got {kind} "
            f"of shape {got}"
        )
    return values


def check_samples(samples):
    samples = check_points(samples, "samples").detach()
    if len(samples) < 2:
        raise ValueError(
            f"samples must hold at least 2 points, got {len(samples)}"
        )
    if not (samples.amax(0) - samples.amin(0)).max() > 1e-140:
        point = brief(samples[0])
        raise ValueError(f"samples must differ, got only the point {point}")
    return samples


def plain(value):
    """The number in an array of none but that."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_integer(value, name, at_least=1):
    value = plain(value)
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


def check_number(value, name, above=SMALL, below=LARGE, or_equal=False):
    value, real = plain(value), (int, float, np.integer, np.floating)
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
            f"{name} must be {sign} {above:g} and < {below:g}, "
            f"got {brief(value)}"
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


def check_names(given, known, kind):
    """Refuse a keyword that nothing reads, and say which may be meant."""
    initials = {"".join(w[0] for w in n.split("_")): n for n in known}
    for name in set(given) - set(known):
        near = difflib.get_close_matches(name, known, 1, 0.75)
        near = [initials[name]] if name in initials else near
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise TypeError(
            f"{name} is no {kind}{meant}: there are {', '.join(known)}"
        )


def check_candidates(candidates):
    if hasattr(candidates, "tolist"):
        candidates = candidates.tolist()
    if not isinstance(candidates, (list, tuple)) or not candidates:
        raise ValueError(
            "candidates must be a non-empty list of bandwidths, "
            f"got {brief(candidates)}"
        )
    return [check_number(c, "candidates") for c in candidates]


def check_bandwidth(H, d):
    """A number h, as h I, or an invertible matrix: -> (d, d), float64."""
    matrix = H
    if not isinstance(H, (list, tuple)) and getattr(H, "ndim", 0) == 0:
        matrix = check_number(H, "H") * np.eye(d)
    if as_tensor(matrix, "H").dim() == 1:
        raise ValueError(
            f"H must be a number > 0 or a {d} x {d} matrix, got {brief(H)}: "
            "with a width for each column it is np.diag(H)"
        )
    matrix = check_points(matrix, "H")
    rows = matrix.norm(dim=1, keepdim=True)
    possible = matrix.shape == (d, d) and SMALL < rows.min() < LARGE
    # Whatever the units of the rows.
    if not possible or not torch.linalg.cond(matrix / rows) < 1e15:
        raise ValueError(
            f"H must be a number > 0 or an invertible {d} x {d} matrix, "
            f"got {brief(H)}"
        )
    return matrix


def check_covariances(covariances, k, d):
    """Their Cholesky factors: (k, d, d) -> (k, d, d)."""
    C = as_tensor(covariances, "covariances").cpu().double()
    shaped = C.shape == (k, d, d)
    if shaped and (C - C.mT).abs().max() <= 1e-5 * C.abs().max():  # no NaN
        roots, failed = torch.linalg.cholesky_ex(C)
        if not failed.any() and torch.isfinite(roots).all():
            return roots
    raise ValueError(
        f"covariances must be ({k}, {d}, {d}), symmetric and positive "
        f"definite, got {brief(covariances)}"
    )


def check_values(values):
    """Finite numbers (n,) as an array."""
    array = as_tensor(values, "values").detach().cpu().double().numpy()
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(
            f"values must be a non-empty finite list, got {brief(array)}"
        )
    return array


def check_limits(limits, name, size):
    try:
        low, high = (float(v) for v in limits)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be two numbers (low, high), got {brief(limits)}"
        ) from error
    if not -LARGE < low < high < LARGE:
        raise ValueError(
            f"{name} must be finite with low < high, got {brief(limits)}"
        )
    if (high - low) / size < 4 * math.ulp(max(abs(low), abs(high))):
        raise ValueError(
            f"{name} must be wide enough for {size} different cells, "
            f"got {brief(limits)}"
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
