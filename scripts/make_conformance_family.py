"""Writes tests/fixtures/conformance/family/*.safetensors: cases of the layers beside the norms of rows,
groups and channels, in the format that tests/conformance/case.rs describes.

    pip install numpy
    python scripts/make_conformance_family.py            # rewrites tests/fixtures/conformance/family
    python scripts/make_conformance_family.py some/dir   # writes somewhere else

Every input is rounded to the dtype of its case; the expected values are computed in float64 from the
rounded values, by formulas that are written out here, forward and backward. Each backward is compared
with complex steps of its forward, which have no error of differences. The worked examples of the
literature that this library follows are cases too, and the script stops where a formula misses their
digits.

A case draws from a generator seeded with its own name, so that adding one leaves the others as they are.
"""

import json
import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

DTYPES = ("f64", "f32", "f16", "bf16")
# rtol and atol, as in make_conformance.py.
TOLERANCE = {"f64": 1e-11, "f32": 2e-6, "f16": 6e-4, "bf16": 4.5e-3}
SOURCE = f"numpy {np.__version__} in float64, by hand, checked by complex steps"


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of `dtype`, in float64."""
    values = np.asarray(values, np.float64)
    if dtype == "f64":
        return values
    if dtype == "bf16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = bits + (0x7FFF + ((bits >> 16) & 1))
        return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    return values.astype({"f32": np.float32, "f16": np.float16}[dtype]).astype(np.float64)


def stored(values: np.ndarray, dtype: str) -> bytes:
    values = np.ascontiguousarray(values)
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"f64": "<f8", "f32": "<f4", "f16": "<f2", "u8": "u1", "i64": "<i8"}[dtype]).tobytes()


def save(path: Path, tensors: dict, metadata: dict) -> int:
    """One file of tensors `name: (values, dtype)`, byte for byte the same on every run."""
    names = {"f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "u8": "U8", "i64": "I64"}
    sizes = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i64": 8}
    header = {"__metadata__": dict(sorted(metadata.items()))}
    body = b""
    for name in sorted(tensors, key=lambda n: (-sizes[tensors[n][1]], n)):
        values, dtype = tensors[name]
        start = len(body)
        body += stored(values, dtype)
        shape = list(np.shape(values))
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, len(body)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text + body
    path.write_bytes(data)
    return len(data)


def rms(values) -> float:
    values = np.asarray(values)
    values = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


# ---------------------------------------------------------------------------------------------------
# Formulas. A forward serves complex numbers too, and branches on their real parts. A backward returns
# the gradients, and for those that are differences of larger terms the size of these.
# ---------------------------------------------------------------------------------------------------


def l2_length(x, c):
    squares = (x * x).sum(c["dim"], keepdims=True)
    if c["form"] == "inside":
        return np.sqrt(squares + c["eps"]), None
    short = np.sqrt(np.abs(squares.real)) <= c["eps"]
    return np.where(short, c["eps"], np.sqrt(np.where(short, 1.0, squares))), short


def l2_normalize(t, c):
    return {"y": t["x"] / l2_length(t["x"], c)[0]}


def l2_normalize_backward(t, c):
    length, short = l2_length(t["x"], c)
    y = t["x"] / length
    along = (t["dy"] * y).sum(c["dim"], keepdims=True)
    if short is not None:
        along = np.where(short, 0.0, along)
    return {"dx": (t["dy"] - y * along) / length}, {"dx": rms(t["dy"] / length)}


def softmax(t, c):
    x = t["x"]
    e = np.exp(x - x.real.max(-1, keepdims=True))
    total = e.sum(-1, keepdims=True)
    if c["log"]:
        return {"y": (x - x.real.max(-1, keepdims=True)) - np.log(total)}
    return {"y": e / total}


def softmax_backward(t, c):
    y = softmax(t, c | {"log": False})["y"]
    dy = t["dy"]
    if c["log"]:
        return {"dx": dy - y * dy.sum(-1, keepdims=True)}, {}
    return {"dx": y * (dy - (y * dy).sum(-1, keepdims=True))}, {"dx": rms(y * dy)}


def gate(t, c):
    """The weight as it multiplies x, and its derivative by the weight, in the shape of either."""
    w = t["weight"]
    value, slope = (np.tanh(w), 1 - np.tanh(w) ** 2) if c["tanh"] else (w, np.ones_like(w))
    return [spread(p, t["x"], c) for p in (value, slope)]


def spread(p, x, c):
    """A parameter `[C]` or `[N, C]` with the axes of x."""
    if c["channels_first"]:
        return p.reshape(p.shape + (1,) * (x.ndim - 2)) if p.ndim == 2 else p.reshape((-1,) + (1,) * (x.ndim - 2))
    return p.reshape((p.shape[0],) + (1,) * (x.ndim - 2) + (p.shape[1],)) if p.ndim == 2 else p


def unspread(d, p, x, c):
    """The sum of `d`, like x, over the axes that `p` does not have."""
    axis = 1 if c["channels_first"] else x.ndim - 1
    kept = (axis,) if p.ndim == 1 else (0, axis)
    return d.sum(tuple(a for a in range(x.ndim) if a not in kept)).reshape(p.shape)


def summed_size(d, p, x, c):
    return rms(np.sqrt(unspread(d * d, p, x, c)))


def layer_scale(t, c):
    y = t["x"] * gate(t, c)[0]
    if "bias" in t:
        y = y + spread(t["bias"], t["x"], c)
    return {"y": y + t["residual"] if "residual" in t else y}


def layer_scale_backward(t, c):
    x, dy = t["x"], t["dy"]
    value, slope = gate(t, c)
    of_weight = dy * x * slope
    grads = {"dx": dy * value, "dweight": unspread(of_weight, t["weight"], x, c)}
    sizes = {"dweight": summed_size(of_weight, t["weight"], x, c)}
    if "residual" in t:
        grads["dresidual"] = dy
    if "bias" in t:
        grads["dbias"] = unspread(dy, t["bias"], x, c)
        sizes["dbias"] = summed_size(dy, t["bias"], x, c)
    return grads, sizes


def grn_parts(t, c):
    x = t["x"]
    axis = 1 if c["channels_first"] else x.ndim - 1
    space = tuple(a for a in range(1, x.ndim) if a != axis)
    squares = (x * x).sum(space, keepdims=True) if space else x * x
    zero = np.abs(squares.real) < 1e-50
    g = np.where(zero, 0.0, np.sqrt(np.where(zero, 1.0, squares)))
    e = g.mean(axis, keepdims=True) + c["eps"]
    line = [1] * x.ndim
    line[axis] = -1
    return axis, space, g, e, [t[n].reshape(line) for n in ("weight", "bias")]


def grn(t, c):
    _, _, g, e, (w, b) = grn_parts(t, c)
    return {"y": t["x"] + w * t["x"] * (g / e) + b}


def grn_backward(t, c):
    x, dy = t["x"], t["dy"]
    axis, space, g, e, (w, _) = grn_parts(t, c)
    n = g / e
    a = (dy * x).sum(space, keepdims=True) if space else dy * x
    big_a = w * a
    direction = x / np.where(g == 0, 1.0, g)
    inner = big_a / e - (big_a * g).sum(axis, keepdims=True) / (x.shape[axis] * e**2)
    over = tuple(i for i in range(x.ndim) if i != axis)
    first, second = dy * (1 + w * n), direction * inner
    grads = {"dx": first + second, "dweight": (a * n).sum(over), "dbias": dy.sum(over)}
    sizes = {
        "dx": max(rms(first), rms(second)),
        "dweight": rms(np.sqrt(((dy * x * n) ** 2).sum(over))),
        "dbias": rms(np.sqrt((dy**2).sum(over))),
    }
    return grads, sizes


def standardize(t, c):
    """The standardized rows, one over their deviation, and the factor of each row."""
    w = t["weight"]
    rows = w.reshape(w.shape[0], -1)
    first = rows.real[:, :1]
    d = rows - first
    d = d - d.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((d * d).mean(1, keepdims=True) + c["eps"])
    s = 1.0
    if c["gamma"] is not None:
        s = t["gain"].reshape(-1, 1) * c["gamma"] / np.sqrt(rows.shape[1])
    return d * rstd, rstd, s


def weight_standardization(t, c):
    xhat, _, s = standardize(t, c)
    return {"y": (xhat * s).reshape(t["weight"].shape)}


def weight_standardization_backward(t, c):
    xhat, rstd, s = standardize(t, c)
    dy = t["dy"].reshape(xhat.shape)
    g = dy * s
    dw = (g - g.mean(1, keepdims=True) - xhat * (g * xhat).mean(1, keepdims=True)) * rstd
    grads, sizes = {"dweight": dw.reshape(t["weight"].shape)}, {"dweight": rms(g * rstd)}
    if "gain" in t:
        per = dy * xhat * c["gamma"] / np.sqrt(xhat.shape[1])
        grads["dgain"] = per.sum(1).reshape(t["gain"].shape)
        sizes["dgain"] = rms(np.sqrt((per**2).sum(1)))
    return grads, sizes


def spectral_vectors(t, c):
    """u and v as the weight is divided by them, both constants."""
    w = np.moveaxis(t["weight"].real, c["dim"], 0)
    w = w.reshape(w.shape[0], -1)
    u, v = t["u"], t["v"]
    for _ in range(c["n_power_iterations"] if c["train"] and w.size else 0):
        u = w @ v
        u = u / max(np.linalg.norm(u), c["eps"])
        v = w.T @ u
        v = v / max(np.linalg.norm(v), c["eps"])
    return u, v


def spectral_norm(t, c):
    u, v = spectral_vectors(t, c)
    w = np.moveaxis(t["weight"], c["dim"], 0)
    sigma = u @ w.reshape(w.shape[0], -1) @ v
    y = t["weight"] / sigma if sigma.real != 0 else np.zeros_like(t["weight"])
    return {"y": y, "u": u, "v": v}


def spectral_norm_backward(t, c):
    u, v = spectral_vectors(t, c)
    w = np.moveaxis(t["weight"], c["dim"], 0)
    sigma = u @ w.reshape(w.shape[0], -1) @ v
    if sigma == 0:
        return {"dweight": np.zeros_like(t["weight"])}, {}
    outer = np.moveaxis(np.outer(u, v).reshape(w.shape), 0, c["dim"])
    along = (t["dy"] * t["weight"] / sigma).sum()
    dw = (t["dy"] - along * outer) / sigma
    return {"dweight": dw}, {"dweight": max(rms(t["dy"] / sigma), rms(along * outer / sigma))}


def masked_rows(t, c):
    """For each set of elements that share statistics: where it lies in x, and its channels."""
    x, mask = t["x"], t["mask"] != 0
    n, channels = x.shape[:2]
    if c["norm"] == "batch_norm":
        return [((slice(None), k), [k]) for k in range(channels)], mask
    groups = c["num_groups"] if c["norm"] == "group_norm" else channels
    each = channels // groups
    return [((i, slice(g * each, (g + 1) * each)), list(range(g * each, (g + 1) * each))) for i in range(n) for g in range(groups)], mask


def masked_stats(t, c):
    """Yields for each set: its place, the mask in its shape, x̂ and one over the deviation, mean, variance, count."""
    x = t["x"]
    sets, mask = masked_rows(t, c)
    fixed = c["norm"] != "group_norm" and "running_mean" in t and not c["train"]
    for place, channels in sets:
        part = x[place]
        here = mask if c["norm"] == "batch_norm" else np.broadcast_to(mask[place[0]], part.shape)
        values = part[here]
        count = values.size
        if count == 0:
            yield place, here, None, None, None, None, 0
            continue
        if fixed:
            mean, var = t["running_mean"][channels[0]], t["running_var"][channels[0]]
        else:
            first = values.real[0]
            mean = first + (values - first).mean()
            var = ((values - mean) ** 2).mean()
        rstd = 1 / np.sqrt(var + c["eps"])
        yield place, here, (values - mean) * rstd, rstd, mean, var, count


def masked_params(t, name, place, part_shape, c, default):
    if name not in t:
        return default
    p = t[name]
    if c["norm"] == "batch_norm":
        return p[place[1]]
    p = p[place[1]]
    return np.broadcast_to(p.reshape((-1,) + (1,) * (len(part_shape) - 1)), part_shape)


def at(p, here):
    return p[here] if isinstance(p, np.ndarray) and p.ndim else p


def masked(t, c):
    x = t["x"]
    kind = np.result_type(*(t[n] for n in ("x", "weight", "bias") if n in t))
    y = np.zeros(x.shape, kind)
    for place, here, xhat, *_ in masked_stats(t, c):
        if xhat is None:
            continue
        w = at(masked_params(t, "weight", place, here.shape, c, 1.0), here)
        b = at(masked_params(t, "bias", place, here.shape, c, 0.0), here)
        part = np.zeros(x[place].shape, kind)
        part[here] = xhat * w + b
        y[place] = part
    return {"y": y} | masked_state(t, c)


def masked_state(t, c):
    if "running_mean" not in t:
        return {}
    names = ("running_mean", "running_var", "num_batches_tracked")
    old = {n: np.asarray(t[n], np.float64) for n in names}
    if not c["train"]:
        return old
    sets = [(place, mean, var, n) for place, _, xhat, _, mean, var, n in masked_stats(t, c) if xhat is not None and n > 1]
    if not sets:
        return old
    channels = t["x"].shape[1]
    if c["norm"] == "batch_norm":
        mean = np.array([s[1].real for s in sets])
        var = np.array([s[2].real * s[3] / (s[3] - 1) for s in sets])
    else:
        mean = np.array([s[1].real for s in sets]).reshape(-1, channels).mean(0)
        var = np.array([s[2].real * s[3] / (s[3] - 1) for s in sets]).reshape(-1, channels).mean(0)
    count = old["num_batches_tracked"] + 1
    m = 1 / float(count) if c["momentum"] is None else c["momentum"]
    return {
        "running_mean": (1 - m) * old["running_mean"] + m * mean,
        "running_var": (1 - m) * old["running_var"] + m * var,
        "num_batches_tracked": count,
    }


def masked_backward(t, c):
    x, dy = t["x"], t["dy"]
    fixed = c["norm"] != "group_norm" and "running_mean" in t and not c["train"]
    dx, terms = np.zeros_like(x), np.zeros_like(x)
    dw, db, dw2, db2 = (np.zeros(x.shape[1]) for _ in range(4))
    for place, here, xhat, rstd, _, _, n in masked_stats(t, c):
        if xhat is None:
            continue
        w = at(masked_params(t, "weight", place, here.shape, c, 1.0), here)
        d = dy[place][here]
        g = d * w
        part, term = np.zeros_like(x[place]), np.zeros_like(x[place])
        part[here] = g * rstd if fixed else (g - g.mean() - xhat * (g * xhat).mean()) * rstd
        term[here] = g * rstd
        dx[place], terms[place] = part, term
        full, plain = np.zeros_like(part), np.zeros_like(part)
        full[here], plain[here] = d * xhat, d
        if c["norm"] == "batch_norm":
            k = place[1]
            dw[k], db[k], dw2[k], db2[k] = full.sum(), plain.sum(), (full**2).sum(), (plain**2).sum()
        else:
            over = tuple(range(1, full.ndim))
            dw[place[1]] += full.sum(over)
            db[place[1]] += plain.sum(over)
            dw2[place[1]] += (full**2).sum(over)
            db2[place[1]] += (plain**2).sum(over)
    grads, sizes = {"dx": dx}, {"dx": rms(terms)}
    for name, value, squares in (("weight", dw, dw2), ("bias", db, db2)):
        if name in t:
            grads["d" + name], sizes["d" + name] = value, rms(np.sqrt(squares))
    return grads, sizes


SLOPE_OF_ERF = 2 / np.sqrt(np.pi)


def erf(z):
    """Its value of real parts, and its slope for imaginary ones."""
    real = np.vectorize(math.erf, otypes=[np.float64])(np.real(z))
    return real + 1j * np.imag(z) * SLOPE_OF_ERF * np.exp(-np.real(z) ** 2) if np.iscomplexobj(z) else real


def dynamic_parts(t, c):
    """The argument, the weight and the bias with the axes of x."""
    x = t["x"]
    w, b = t.get("weight", np.ones(1)), t.get("bias", np.zeros(1))
    if c["channels_first"]:
        w, b = (p.reshape((-1,) + (1,) * (x.ndim - 2)) for p in (w, b))
    return t["alpha"] * x + t.get("s", 0.0), w, b


def dynamic(of):
    def forward(t, c):
        u, w, b = dynamic_parts(t, c)
        return {"y": w * of(u) + b}

    return forward


def dynamic_backward(of, slope):
    def backward(t, c):
        x, dy = t["x"], t["dy"]
        u, w, _ = dynamic_parts(t, c)
        g = dy * w * slope(u)
        grads, sizes = {"dx": g * t["alpha"], "dalpha": np.array([(g * x).sum()])}, {"dalpha": rms([np.sqrt(((g * x) ** 2).sum())])}
        if "s" in t:
            grads["ds"], sizes["ds"] = np.array([g.sum()]), rms([np.sqrt((g**2).sum())])
        for name, of_param in (("weight", dy * of(u)), ("bias", dy)):
            if name in t:
                grads["d" + name] = unspread(of_param, t[name], x, c)
                sizes["d" + name] = summed_size(of_param, t[name], x, c)
        return grads, sizes

    return backward


def axes_of_channel(x):
    return tuple(a for a in range(x.ndim) if a != 1)


def on_channels(p, x):
    return p.reshape((1, -1) + (1,) * (x.ndim - 2))


def batch_moments(x):
    """Mean, biased variance and count of each channel, about a first value."""
    axes = axes_of_channel(x)
    first = on_channels(x.real[(0, slice(None)) + (0,) * (x.ndim - 2)], x)
    d = x - first
    mean = d.mean(axes)
    var = ((d - on_channels(mean, x)) ** 2).mean(axes)
    return mean + first.reshape(-1), var, x.size // x.shape[1]


def ghost_parts(x, size):
    """The samples of each part, as torch.chunk has them; none is a single value."""
    n = x.shape[0]
    if n == 0:
        return []
    each = -(-n // -(-n // size))
    starts = list(range(0, n, each))
    if len(starts) > 1 and (n - starts[-1]) * (x.size // n // x.shape[1]) == 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, starts[1:] + [n])]


def running_after(state, mean, var, n, momentum):
    count = state["num_batches_tracked"] + 1
    m = 1 / float(count) if momentum is None else momentum
    return {
        "running_mean": (1 - m) * state["running_mean"] + m * mean,
        "running_var": (1 - m) * state["running_var"] + m * var * n / (n - 1),
        "num_batches_tracked": count,
    }


def running_of(t):
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {n: np.asarray(t[n], np.float64) for n in names}


def standard(x, eps):
    mean, var, _ = batch_moments(x)
    return (x - on_channels(mean, x)) / np.sqrt(on_channels(var, x) + eps)


def through_standard(x, g, eps):
    """The gradient of x, and its terms."""
    _, var, _ = batch_moments(x)
    rstd = 1 / np.sqrt(on_channels(var, x) + eps)
    xhat, axes = standard(x, eps), axes_of_channel(x)
    return (g - g.mean(axes, keepdims=True) - xhat * (g * xhat).mean(axes, keepdims=True)) * rstd, g * rstd


def pair(t, x):
    return [on_channels(t[n], x) if n in t else default for n, default in (("weight", 1.0), ("bias", 0.0))]


def inferred(t, c):
    x, (w, b) = t["x"], pair(t, t["x"])
    rstd = 1 / np.sqrt(on_channels(t["running_var"], x) + c["eps"])
    return (x - on_channels(t["running_mean"], x)) * rstd, rstd, w, b


def ghost_batch_norm(t, c):
    x, (w, b) = t["x"], pair(t, t["x"])
    state = running_of(t)
    if not c["train"]:
        xhat, _, w, b = inferred(t, c)
        return {"y": xhat * w + b} | state
    y = np.zeros(x.shape, np.result_type(*(t[n] for n in ("x", "weight", "bias") if n in t)))
    for part in ghost_parts(x, c["virtual_batch_size"]):
        y[part] = standard(x[part], c["eps"]) * w + b
        mean, var, n = batch_moments(x[part].real)
        state = running_after(state, mean, var, n, c["momentum"])
    return {"y": y} | state


def affine_grads(t, xhat, shift=0.0):
    """Of weight and bias, where the weight multiplies xhat + shift."""
    dy, grads, sizes = t["dy"], {}, {}
    axes = axes_of_channel(dy)
    for name, term in (("weight", dy * (xhat + shift)), ("bias", dy)):
        if name in t:
            grads["d" + name], sizes["d" + name] = term.sum(axes), rms(np.sqrt((term**2).sum(axes)))
    return grads, sizes


def ghost_batch_norm_backward(t, c):
    x, dy = t["x"], t["dy"]
    w, _ = pair(t, x)
    if not c["train"]:
        xhat, rstd, w, _ = inferred(t, c)
        grads, sizes = affine_grads(t, xhat)
        return grads | {"dx": dy * w * rstd}, sizes
    dx, terms, xhat = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for part in ghost_parts(x, c["virtual_batch_size"]):
        dx[part], terms[part] = through_standard(x[part], dy[part] * w, c["eps"])
        xhat[part] = standard(x[part], c["eps"])
    grads, sizes = affine_grads(t, xhat)
    return grads | {"dx": dx}, sizes | {"dx": rms(terms)}


def correction(t, c):
    """r and d, constants; those of batch norm before the warm-up is over."""
    x = t["x"]
    mean, var, _ = batch_moments(x.real)
    if float(t["num_batches_tracked"]) < c["warmup_steps"]:
        return on_channels(np.ones_like(mean), x), on_channels(np.zeros_like(mean), x)
    sigma = np.sqrt(t["running_var"] + c["eps"])
    r = np.clip(np.sqrt(var + c["eps"]) / sigma, 1 / c["rmax"], c["rmax"])
    d = np.clip((mean - t["running_mean"]) / sigma, -c["dmax"], c["dmax"])
    return on_channels(r, x), on_channels(d, x)


def batch_renorm(t, c):
    x, (w, b) = t["x"], pair(t, t["x"])
    state = running_of(t)
    if not c["train"]:
        xhat, _, w, b = inferred(t, c)
        return {"y": xhat * w + b} | state
    if x.size == 0:
        return {"y": x} | state
    r, d = correction(t, c)
    mean, var, n = batch_moments(x.real)
    y = (standard(x, c["eps"]) * r + d) * w + b
    return {"y": y} | running_after(state, mean, var, n, c["momentum"])


def batch_renorm_backward(t, c):
    x, dy = t["x"], t["dy"]
    w, _ = pair(t, x)
    if not c["train"] or x.size == 0:
        return ghost_batch_norm_backward(t, c | {"virtual_batch_size": 1})
    r, d = correction(t, c)
    dx, terms = through_standard(x, dy * w * r, c["eps"])
    grads, sizes = affine_grads(t, standard(x, c["eps"]) * r, d)
    return grads | {"dx": dx}, sizes | {"dx": rms(terms)}


def prefixes(x, eps):
    """The positions of x normalized by those up to them, and for each of these one over the deviation and the count."""
    if x.size == 0:
        return x, np.ones((x.shape[0], 1, x.shape[2])), np.ones(x.shape[2])
    origin = x.real[:, :1, :1]
    d = x - origin
    count = x.shape[1] * np.arange(1, x.shape[2] + 1)
    mean = np.zeros((x.shape[0], 1, x.shape[2]), x.dtype)
    var = np.zeros_like(mean)
    for k in range(x.shape[2]):
        prefix = d[:, :, : k + 1].reshape(x.shape[0], -1)
        mean[:, 0, k] = prefix.mean(1)
        var[:, 0, k] = ((prefix - mean[:, :, k]) ** 2).mean(1)
    rstd = 1 / np.sqrt(var + eps)
    return (d - mean) * rstd, rstd, count


def cumulative_layer_norm(t, c):
    xhat, _, _ = prefixes(t["x"], c["eps"])
    w, b = pair(t, t["x"])
    return {"y": xhat * w + b}


def cumulative_layer_norm_backward(t, c):
    x, dy = t["x"], t["dy"]
    xhat, rstd, count = prefixes(x, c["eps"])
    w, _ = pair(t, x)
    g = dy * w
    dx = g * rstd
    for k in range(x.shape[2]):
        # Of the mean and of the deviation of position k, at all positions up to it.
        of_mean = (rstd[:, :, k] * g[:, :, k].sum(1, keepdims=True) / count[k])[:, :, None]
        along = (rstd[:, :, k] * (g[:, :, k] * xhat[:, :, k]).sum(1, keepdims=True) / count[k])[:, :, None]
        first, here = x[:, :, : k + 1], x[:, :, k : k + 1]
        of_k = xhat[:, :, k : k + 1] + (first - here) * rstd[:, :, k : k + 1]
        # Each channel has its own value at k, of which the differences are taken.
        dx[:, :, : k + 1] -= of_mean + along * of_k
    grads, sizes = affine_grads(t, xhat)
    return grads | {"dx": dx}, sizes | {"dx": rms(g * rstd)}


OPS = {
    "dyt": (dynamic(np.tanh), dynamic_backward(np.tanh, lambda u: 1 / np.cosh(u) ** 2)),
    "derf": (dynamic(erf), dynamic_backward(erf, lambda u: SLOPE_OF_ERF * np.exp(-(u**2)))),
    "ghost_batch_norm": (ghost_batch_norm, ghost_batch_norm_backward),
    "batch_renorm": (batch_renorm, batch_renorm_backward),
    "cumulative_layer_norm": (cumulative_layer_norm, cumulative_layer_norm_backward),
    "weight_standardization": (weight_standardization, weight_standardization_backward),
    "spectral_norm": (spectral_norm, spectral_norm_backward),
    "masked": (masked, masked_backward),
    "l2_normalize": (l2_normalize, l2_normalize_backward),
    "softmax": (softmax, softmax_backward),
    "layer_scale": (layer_scale, layer_scale_backward),
    "grn": (grn, grn_backward),
}


# ---------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------


class Draw:
    def __init__(self, name: str, dtype: str):
        self.rng, self.dtype = np.random.default_rng(zlib.crc32(name.encode())), dtype

    def normal(self, *shape, mean=0.0, sigma=1.0):
        return rounded(mean + sigma * self.rng.standard_normal(shape), self.dtype)


class Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        self.folder, self.count, self.size = folder, 0, 0

    def case(self, slug, op, dtype, config, t, like=None, of=None):
        """Writes the case of the inputs `t`. `like` has digits of a worked example that must come out.
        `of` has dtypes of tensors that are not in that of the case."""
        name, of = f"{op}-{slug}-{dtype}", of or {}
        t = {k: rounded(v, of.get(k, dtype)) if of.get(k) not in ("u8", "i64") else np.asarray(v) for k, v in t.items()}
        forward, backward = OPS[op]
        expected = {k: np.asarray(v, np.float64) for k, v in forward(t, config).items()}
        sizes = {}
        if "dy" in t:
            grads, sizes = backward(t, config)
            self.check(name, forward, t, config, grads, sizes)
            expected |= grads
        for key, digits in (like or {}).items():
            got = expected[key].reshape(-1)
            digits = np.asarray(digits, float).reshape(-1)
            assert np.allclose(got, digits, rtol=2e-9, atol=1e-12), f"{name}: {key} {got} against {digits}"
        scales = {k: v for k, v in sizes.items() if v > 2 * rms(expected[k])}
        for key, want in expected.items():
            # Statistics of a model in f64 are f64, whatever they were stored in.
            kind = "f64" if dtype == "f64" or of.get(key) == "i64" else of.get(key, dtype)
            size, tolerance = scales.get(key) or rms(want) or 1.0, TOLERANCE[dtype]
            error = np.abs(rounded(want, kind) - want)
            assert (error <= 0.9 * tolerance * (size + np.abs(want)))[np.isfinite(want)].all(), f"{name}: {key} range"
        metadata = {
            "op": op,
            "config": json.dumps(config),
            "dtype": dtype,
            "rtol": repr(TOLERANCE[dtype]),
            "atol": repr(TOLERANCE[dtype]),
            "scales": json.dumps(dict(sorted(scales.items()))),
            "source": SOURCE,
        }
        tensors = {k: (v, of.get(k, dtype)) for k, v in t.items()}
        tensors |= {"expected." + k: (v, "f64") for k, v in expected.items()}
        self.size += save(self.folder / f"{name}.safetensors", tensors, metadata)
        self.count += 1

    @staticmethod
    def check(name, forward, t, config, grads, sizes):
        """Complex steps along random directions, of what is finite."""
        hidden = np.broadcast_to(t["mask"][:, None] == 0, t["x"].shape) if "mask" in t else None
        if hidden is not None:
            t = t | {"x": np.where(hidden, 0.0, t["x"])}
        if any(not np.isfinite(v).all() for v in t.values()) or t["dy"].size == 0:
            return
        rng = np.random.default_rng(0)
        for key, grad in grads.items():
            of = key[1:]
            for _ in range(3):
                v = rng.standard_normal(t[of].shape)
                step = 1e-30 * max(1.0, rms(t[of]))
                moved = forward(t | {of: t[of] + 1j * step * v}, config)["y"].imag / step
                want, got = (moved * t["dy"]).sum(), (grad * v).sum()
                size = max(np.abs(grad * v).sum(), np.abs(moved * t["dy"]).sum(), sizes.get(key, 0.0), 1e-300)
                assert abs(want - got) <= 1e-10 * size, f"{name}: {key} by {(want - got) / size:.1e}"


def l2_normalize_cases(w: Writer) -> None:
    op = "l2_normalize"

    def case(slug, dtype, shape, dim, eps, form, change=None, sigma=1.0, dy=1.0):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = {"x": draw.normal(*shape, sigma=sigma), "dy": draw.normal(*shape, sigma=dy)}
        if change:
            change(t["x"])
        w.case(slug, op, dtype, {"dim": dim, "eps": eps, "form": form}, t)

    def zeros(x):
        x[1] = 0.0
        x[:, 2] = 0.0
        x[2] = x[0]

    for dtype in DTYPES:
        for form, eps in (("max", 1e-12), ("inside", 1e-6)):
            for width in (1, 2, 5, 33):
                case(f"{form}_7x{width}", dtype, (7, width), 1, eps, form, sigma=1.5)
            case(f"{form}_rank1", dtype, (19,), 0, eps, form)
            case(f"{form}_last", dtype, (2, 3, 17), 2, eps, form)
            case(f"{form}_channels", dtype, (2, 5, 3, 4), 1, eps, form)
            case(f"{form}_first", dtype, (6, 3, 2), 0, eps, form)
            case(f"{form}_empty", dtype, (0, 5), 1, eps, form)
            if dtype != "f16":
                case(f"{form}_huge", dtype, (4, 33), 1, eps, form, sigma=1e14)
                case(f"{form}_tiny", dtype, (4, 33), 1, 1e-30, form, sigma=1e-8)
        # Rows on both sides of a large epsilon, zeros and equal rows among them.
        case("max_zeros", dtype, (5, 9), 1, 2.0, "max", change=zeros)
        case("max_zeros_channels", dtype, (4, 5, 7), 1, 2.0, "max", change=zeros)
        case("inside_zeros", dtype, (5, 9), 1, 0.25, "inside", change=zeros)
        case("inside_zeros_channels", dtype, (4, 5, 7), 1, 0.25, "inside", change=zeros)
        # The length of the row is epsilon itself.
        t = {"x": [[3.0, 4.0], [3.0, 4.5]], "dy": [[1.0, -1.0], [0.5, 1.0]]}
        w.case("max_tie", op, dtype, {"dim": 1, "eps": 5.0, "form": "max"}, t)
    case("max_1031", "f32", (3, 1031), 1, 1e-12, "max")
    case("max_columns_1031", "f32", (1031, 3), 0, 1e-12, "max")

    def not_finite(x):
        x[1, 3], x[2, 0] = np.nan, np.inf

    with np.errstate(invalid="ignore"):
        case("max_not_finite", "f32", (4, 9), 1, 1e-12, "max", change=not_finite)
        case("inside_not_finite", "f32", (4, 9), 1, 1e-6, "inside", change=not_finite)
    for slug, form, eps, x, dy, y, dx in (
        ("max_3_4", "max", 1e-12, [3, 4], [1, -1], [0.6, 0.8], [0.224, -0.168]),
        ("max_zero", "max", 1e-12, [0, 0], [1, 2], [0, 0], [1e12, 2e12]),
        ("max_short", "max", 1e-12, [3e-13, 4e-13], [1, 0], [0.3, 0.4], [1e12, 0]),
        ("inside_3_4", "inside", 1e-6, [3, 4], [1, -1], [0.599999988, 0.799999984], [0.2239999946, -0.1679999979]),
        ("inside_zero", "inside", 1e-6, [0, 0], [1, 2], [0, 0], [1000, 2000]),
    ):
        for dtype in ("f64", "f32"):
            like = {"y": y, "dx": dx} if dtype == "f64" else None
            t = {"x": np.array([x], float), "dy": np.array([dy], float)}
            w.case(f"example_{slug}", op, dtype, {"dim": 1, "eps": eps, "form": form}, t, like)


def softmax_cases(w: Writer) -> None:
    op = "softmax"
    for log in (False, True):
        kind = "log" if log else "plain"

        def case(slug, dtype, shape, sigma=2.0, mean=0.0, change=None, dy=1.0):
            draw = Draw(f"{op}-{kind}_{slug}-{dtype}", dtype)
            t = {"x": draw.normal(*shape, sigma=sigma, mean=mean), "dy": draw.normal(*shape, sigma=dy)}
            if change:
                change(t["x"])
            w.case(f"{kind}_{slug}", op, dtype, {"log": log}, t)

        def masked(x):
            x[0, 3:] = -np.inf
            x[1, 0] = -np.inf

        def ties(x):
            x[0] = 1.5
            x[1, ::2] = x[1].max()

        for dtype in DTYPES:
            for width in (1, 2, 5, 15, 16, 17, 33):
                case(f"5x{width}", dtype, (5, width))
            case("rank1", dtype, (19,))
            case("rank4", dtype, (2, 3, 4, 7))
            case("far", dtype, (4, 21), mean=-300.0)
            case("ties", dtype, (3, 9), change=ties)
            case("wide", dtype, (4, 21), sigma=30.0)
            case("empty", dtype, (0, 5))
            if not log:
                with np.errstate(invalid="ignore"):
                    case("masked", dtype, (3, 9), change=masked)
        case("1031", "f32", (3, 1031))
        case("4099", "bf16", (1, 4099), dy=30.0)

        def not_finite(x):
            x[0] = -np.inf
            x[1, 4] = np.nan
            x[2, 0] = np.inf

        with np.errstate(invalid="ignore"):
            case("not_finite", "f32", (4, 9), change=not_finite)


def layer_scale_cases(w: Writer) -> None:
    op = "layer_scale"

    def case(slug, dtype, shape, first=False, sample=False, tanh=False, kind="", change=None):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        channels = shape[1] if first else shape[-1]
        of = (shape[0], channels) if sample else (channels,)
        t = {"x": draw.normal(*shape, sigma=1.5), "dy": draw.normal(*shape)}
        t["weight"] = draw.normal(*of, mean=0.5)
        t["weight"].flat[0] = 0.0
        if "r" in kind:
            t["residual"] = draw.normal(*shape)
        if "b" in kind:
            t["bias"] = draw.normal(*((channels,) if "c" in kind else of))
        if change:
            change(t["x"])
        w.case(slug, op, dtype, {"channels_first": first, "tanh": tanh}, t)

    def zeros(x):
        x[0] = 0.0
        x[..., 1] = 0.0

    for dtype in DTYPES:
        for kind, name in (("", "plain"), ("r", "residual"), ("b", "shift"), ("rb", "both")):
            case(f"last_{name}", dtype, (2, 3, 17), kind=kind)
            case(f"first_{name}", dtype, (2, 5, 3, 4), first=True, kind=kind)
            case(f"sample_last_{name}", dtype, (3, 4, 5), sample=True, kind=kind)
            case(f"sample_first_{name}", dtype, (3, 4, 5), first=True, sample=True, kind=kind)
        case("sample_last_common_shift", dtype, (3, 4, 5), sample=True, kind="rbc")
        case("rank1", dtype, (19,), kind="r")
        case("rank2", dtype, (5, 9), kind="r")
        case("rank2_first", dtype, (5, 9), first=True, kind="r")
        case("tanh", dtype, (2, 3, 17), tanh=True)
        case("tanh_sample_residual", dtype, (3, 4, 5), sample=True, tanh=True, kind="r")
        case("zeros", dtype, (3, 4, 5), kind="r", change=zeros)
        case("empty", dtype, (0, 4, 5), kind="r")
        t = {"x": [[3.0, -1.0]], "residual": [[1.0, 2.0]], "weight": [0.5, 2.0], "dy": [[1.0, -1.0]]}
        like = {"y": [2.5, 0], "dx": [0.5, -2], "dweight": [3, 1], "dresidual": [1, -1]}
        w.case("example", op, dtype, {"channels_first": False, "tanh": False}, t, like)
    case("first_1031", "f32", (2, 3, 1031), first=True, kind="r")
    case("last_1031", "f32", (1031, 5), kind="r")


def grn_cases(w: Writer) -> None:
    op = "grn"

    def case(slug, dtype, shape, first, change=None, sigma=1.0, eps=1e-6, dy=1.0):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        channels = shape[1] if first else shape[-1]
        t = {"x": draw.normal(*shape, sigma=sigma, mean=0.3 * sigma), "dy": draw.normal(*shape, sigma=dy)}
        if change:
            change(t["x"])
        t |= {"weight": draw.normal(channels), "bias": draw.normal(channels, sigma=0.7)}
        w.case(slug, op, dtype, {"eps": eps, "channels_first": first}, t)

    def dead(axis):
        def change(x):
            x[(slice(None),) * axis + (1,)] = 0.0
            x[0] = 0.0
            x[(slice(None),) * axis + (2,)] = x[(slice(None),) * axis + (3,)]

        return change

    for dtype in DTYPES:
        case("first", dtype, (2, 5, 3, 4), True)
        case("last", dtype, (2, 3, 4, 5), False)
        case("first_rank3", dtype, (3, 7, 17), True)
        case("last_rank3", dtype, (3, 17, 7), False)
        case("first_rank2", dtype, (4, 9), True)
        case("last_rank2", dtype, (4, 9), False)
        case("first_rank5", dtype, (2, 3, 2, 3, 2), True)
        case("one_channel", dtype, (2, 1, 5), True)
        case("one_position", dtype, (2, 1, 1, 6), False)
        case("dead_first", dtype, (3, 5, 7), True, change=dead(1))
        case("dead_last", dtype, (3, 7, 5), False, change=dead(2))
        case("dead_rank2", dtype, (3, 5), False, change=dead(1))
        case("empty", dtype, (0, 4, 5), False)
        case("eps_large", dtype, (2, 4, 9), True, eps=0.5)
        # Squares exceed 65504 by far.
        case("overflow", dtype, (2, 3, 33), True, sigma=2000.0)
        if dtype != "f16":
            case("huge", dtype, (2, 3, 33), True, sigma=1e14)
            case("tiny", dtype, (2, 3, 33), True, sigma=1e-8, eps=1e-12)
        example = {"x": [[[3.0, 4.0], [1.0, 0.0]]], "weight": [1.0, -1.0], "bias": [0.0, 0.5], "dy": [[[1.0, 0.0], [2.0, -1.0]]]}
        like = {
            "y": [7.999998333, 10.66666444, 1.166666778, 0.5],
            "dx": [2.833332867, 0.2222223407, -0.05555462963, -0.6666667778],
            "dweight": [4.999998333, 0.6666664444],
            "dbias": [1, 1],
        }
        w.case("example_1", op, dtype, {"eps": 1e-6, "channels_first": True}, example, like)
    example = {
        "x": np.array([1, -2, 2, 1, 0, 0, 0, 0, 3, 0, 4, 0], float).reshape(1, 3, 2, 2),
        "weight": [0.5, 2.0, -1.0],
        "bias": [0.1, 0.2, 0.3],
        "dy": np.array([1, 0, -1, 2, 1, 1, 0, 2, 0.5, -1, 0, 1], float).reshape(1, 3, 2, 2),
    }
    like = {
        "y": [1.681138616, -3.062277233, 3.262277233, 1.681138616] + [0.2] * 4 + [-2.213164993, 0.3, -3.050886658, 0.3],
        "dx": [1.723534775, -0.2847923162, -1.2963463, 3.304673391, 1, 1, 0, 2, -0.5897363179, 0.8377216644, -0.2278339809, -0.8377216644],
        "dweight": [1.162277233, 0, 2.756582497],
        "dbias": [2, 4, 0.5],
    }
    w.case("example_2", op, "f64", {"eps": 1e-6, "channels_first": True}, example, like)
    case("last_1031", "f32", (2, 1031, 3), False)


def weight_standardization_cases(w: Writer) -> None:
    op = "weight_standardization"

    def case(slug, dtype, shape, gamma=None, eps=1e-6, change=None, sigma=1.0, dy=1.0):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = {"weight": draw.normal(*shape, sigma=sigma, mean=0.4 * sigma), "dy": draw.normal(*shape, sigma=dy)}
        if change:
            change(t["weight"])
        if gamma is not None:
            t["gain"] = draw.normal(shape[0], *[1] * (len(shape) - 1), mean=1.0, sigma=0.5)
        w.case(slug, op, dtype, {"eps": eps, "gamma": gamma}, t)

    def constant(x):
        x[1] = 0.75
        x[2] = x[0]

    relu = 1.7139588594436646
    for dtype in DTYPES:
        case("conv2d", dtype, (4, 3, 3, 3))
        case("conv1d", dtype, (4, 3, 5), eps=1e-8 if dtype in ("f64", "f32") else 1e-6)
        case("conv2d_gain", dtype, (4, 3, 3, 3), gamma=relu, eps=1e-5)
        case("conv1d_gain", dtype, (4, 3, 5), gamma=1.0)
        case("two_elements", dtype, (5, 1, 2))
        case("one_by_one", dtype, (3, 7, 1, 1), gamma=relu)
        # A large epsilon, since the gradient of a constant row grows with one over its root.
        case("constant", dtype, (4, 3, 2, 2), eps=0.25, change=constant)
        case("constant_gain", dtype, (4, 3, 2, 2), gamma=relu, eps=0.25, change=constant)
        if dtype != "f16":
            case("tiny", dtype, (4, 3, 3, 3), sigma=1e-3, eps=1e-8)
    example = {"weight": np.array([1, 2, 3, 6, 2, 2, 2, 2], float).reshape(2, 2, 1, 2), "dy": np.zeros((2, 2, 1, 2))}
    # The cotangent of the weight under the convolution of x by dy = 1 2.
    example["dy"][:] = np.multiply.outer([1.0, 2.0], np.array([[1.0, 2.0], [-1.0, 1.0]]).reshape(2, 1, 2))
    like = {"dweight": [0.05727027976, 0.6299728483, -0.9354142131, 0.248171085, 500, 2500, -3500, 500]}
    w.case("example_std", op, "f64", {"eps": 1e-6, "gamma": None}, example, like)
    example["gain"] = np.array([2.0, 1.0]).reshape(2, 1, 1, 1)
    like = {"dgain": [-0.458074119, 0]}
    w.case("example_scaled", op, "f64", {"eps": 1e-5, "gamma": relu}, example, like)


def spectral_norm_cases(w: Writer) -> None:
    op = "spectral_norm"

    def case(slug, dtype, shape, dim, train, count=1, zero=False, sigma=1.0):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        state = "f64" if dtype == "f64" else "f32"
        unit = lambda n: (lambda a: a / np.linalg.norm(a))(draw.rng.standard_normal(n))
        rest = int(np.prod(shape)) // shape[dim]
        t = {"weight": draw.normal(*shape, sigma=sigma), "u": unit(shape[dim]), "v": unit(rest), "dy": draw.normal(*shape)}
        if zero:
            t["weight"][...] = 0.0
        if not train:
            # As training would leave them: not orthogonal to the weight.
            c = {"dim": dim, "n_power_iterations": 3, "eps": 1e-12, "train": True}
            t["u"], t["v"] = spectral_vectors(t, c) if not zero else (t["u"], t["v"])
        c = {"dim": dim, "eps": 1e-12, "n_power_iterations": count, "train": train}
        w.case(slug, op, dtype, c, t, of={"u": state, "v": state})

    for dtype in DTYPES:
        for train, mode in ((True, "train"), (False, "eval")):
            case(f"linear_{mode}", dtype, (5, 7), 0, train)
            case(f"linear_wide_{mode}", dtype, (3, 33), 0, train)
            case(f"conv1d_{mode}", dtype, (4, 3, 5), 0, train)
            case(f"conv2d_{mode}", dtype, (4, 3, 3, 3), 0, train)
            case(f"dim1_{mode}", dtype, (4, 3, 2, 2), 1, train)
            case(f"zero_{mode}", dtype, (3, 4), 0, train, zero=True)
        case("linear_three", dtype, (5, 7), 0, True, count=3)
        case("one_row", dtype, (1, 9), 0, True)
    w_ = [[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]]
    # The cotangent of the weight under y = w̄ x, x 1 1 2, dy 1 -2.
    dy = np.outer([1.0, -2.0], [1.0, 1.0, 2.0])
    t = {"weight": w_, "u": [0.6, 0.8], "v": [0.0, 1.0, 0.0], "dy": dy}
    c = {"dim": 0, "eps": 1e-12, "n_power_iterations": 1, "train": False}
    like = {"y": [0.5, 1, 0, 0, 0.5, -0.5], "dweight": [0.5, -0.25, 1, -1, -2, -2]}
    w.case("example_eval", op, "f64", c, t, like, of={"u": "f64", "v": "f64"})
    like = {
        "u": [0.894427191, 0.4472135955],
        "v": [0.3651483717, 0.9128709292, -0.1825741858],
        "dweight": [0.1360827635, -0.272165527, 0.9525793444, -0.9525793444, -1.15670349, -1.56495178],
    }
    w.case("example_train", op, "f64", c | {"train": True}, t, like, of={"u": "f64", "v": "f64"})


def masked_cases(w: Writer) -> None:
    op = "masked"
    of = {"mask": "u8", "running_mean": "f32", "running_var": "f32", "num_batches_tracked": "i64"}

    def case(slug, dtype, shape, norm, train=True, kind="wb", lengths=None, state=None, nan=False, more=None, eps=1e-5):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = {"x": draw.normal(*shape, mean=0.3, sigma=1.5), "dy": draw.normal(*shape)}
        mask = (draw.rng.uniform(size=(shape[0], *shape[2:])) < 0.7).astype(np.uint8)
        if lengths is not None:
            mask = (np.arange(shape[2])[None, :] < np.array(lengths)[:, None]).astype(np.uint8)
        hidden = np.broadcast_to(mask[:, None] == 0, shape)
        t["x"][hidden] = np.nan if nan else 7.0
        t["mask"] = mask
        if "w" in kind:
            t["weight"] = draw.normal(shape[1], mean=1.0, sigma=0.5)
        if "b" in kind:
            t["bias"] = draw.normal(shape[1], sigma=0.7)
        c = {"norm": norm, "eps": eps, "train": train} | (more or {})
        if norm == "batch_norm":
            c["momentum"] = 0.1
        if norm == "instance_norm":
            c["track_running_stats"] = state is not None
            if state is not None:
                c["momentum"] = 0.1
        if state is not None:
            t["running_mean"] = draw.rng.normal(0.3, 0.5, shape[1])
            t["running_var"] = draw.rng.uniform(0.3, 2.0, shape[1])
            t["num_batches_tracked"] = np.array(state)
        w.case(slug, op, dtype, c, t, of=of)

    for dtype in DTYPES:
        for nan, name in ((False, ""), (True, "_nan")):
            case(f"batch_train{name}", dtype, (3, 4, 7), "batch_norm", state=4, lengths=(7, 3, 5), nan=nan)
            case(f"batch_eval{name}", dtype, (3, 4, 7), "batch_norm", train=False, state=4, lengths=(7, 3, 0), nan=nan)
            case(f"group{name}", dtype, (3, 6, 7), "group_norm", lengths=(7, 3, 5), nan=nan, more={"num_groups": 2})
            case(f"instance_train{name}", dtype, (3, 4, 7), "instance_norm", lengths=(7, 3, 5), nan=nan)
        case("batch_maps", dtype, (2, 3, 4, 5), "batch_norm", state=0)
        case("batch_rows", dtype, (9, 5), "batch_norm", state=2)
        case("batch_plain", dtype, (3, 4, 7), "batch_norm", state=2, kind="")
        case("batch_none", dtype, (2, 3, 4), "batch_norm", state=2, lengths=(0, 0))
        case("group_maps", dtype, (2, 6, 4, 5), "group_norm", more={"num_groups": 3})
        case("group_one", dtype, (4, 6, 5), "group_norm", lengths=(1, 0, 5, 2), more={"num_groups": 6})
        case("group_rows", dtype, (5, 8), "group_norm", more={"num_groups": 2})
        case("instance_one", dtype, (4, 3, 5), "instance_norm", lengths=(1, 0, 5, 2))
        case("instance_tracking", dtype, (4, 3, 5), "instance_norm", lengths=(1, 0, 5, 3), state=3)
        case("instance_tracking_eval", dtype, (4, 3, 5), "instance_norm", train=False, lengths=(1, 0, 5, 3), state=3)
        case("instance_maps", dtype, (2, 3, 4, 5), "instance_norm")
    # The example has its channels last.
    x = np.array([[[1, 2], [3, -1], [9, 9]], [[0, 4], [7, 7], [7, 7]]], float).transpose(0, 2, 1)
    dy = np.array([[[1, 0], [-1, 2], [0, 0]], [[0.5, 1], [0, 0], [0, 0]]], float).transpose(0, 2, 1)
    t = {"x": x, "dy": dy, "mask": np.array([[1, 1, 0], [1, 0, 0]], np.uint8)}
    batch = t | {"weight": [2.0, 1.0], "bias": [0.0, 0.5], "running_mean": [0.0, 0.0], "running_var": [1.0, 1.0], "num_batches_tracked": np.array(0)}
    like = {
        "y": np.array([[[-0.5345207657, 0.662221229], [2.672603829, -0.7977698322], [0, 0]], [[-2.138083063, 1.635548603], [0, 0], [0, 0]]]).transpose(0, 2, 1),
        "dx": np.array([[[1.03086344, -0.4482429607], [-0.3436303099, 0.1792978758], [0, 0]], [[-0.6872331304, 0.2689450848], [0, 0], [0, 0]]]).transpose(0, 2, 1),
        "dweight": [-2.138083063, -1.459991061],
        "dbias": [0.5, 3],
        "running_mean": [0.1333333333, 0.1666666667],
        "running_var": [1.133333333, 1.533333333],
    }
    w.case("example_batch", op, "f64", {"norm": "batch_norm", "eps": 1e-5, "train": True, "momentum": 0.1}, batch, like, of=of)
    like = {
        "y": [-0.1690308506, 1.183215954, 0, 0.5070925517, -1.521277655, 0, -0.9999999988, 0, 0, 0.9999999988, 0, 0],
    }
    first = np.array([0.212495927, -0.1352246845, 0.03863562126, -0.1159068638])
    w.case("example_group", op, "f64", {"norm": "group_norm", "num_groups": 1, "eps": 1e-8, "train": True}, t, like, of=of)
    got = masked_backward(t, {"norm": "group_norm", "num_groups": 1, "eps": 1e-8, "train": True})[0]["dx"]
    assert np.allclose(got[0][:, :2].reshape(-1), first, rtol=2e-9), got[0]


def dynamic_cases(w: Writer) -> None:
    for op in ("dyt", "derf"):

        def case(slug, dtype, shape, first=False, kind="wb", alpha=0.5, shift=0.2, change=None, sigma=2.0):
            draw = Draw(f"{op}-{slug}-{dtype}", dtype)
            channels = shape[1] if first else shape[-1]
            t = {"x": draw.normal(*shape, sigma=sigma), "dy": draw.normal(*shape)}
            t["alpha"] = np.array([alpha])
            if op == "derf":
                t["s"] = np.array([shift])
            if "w" in kind:
                t["weight"] = draw.normal(channels, mean=1.0, sigma=0.5)
            if "b" in kind:
                t["bias"] = draw.normal(channels, sigma=0.7)
            if change:
                change(t)
            w.case(slug, op, dtype, {"channels_first": first}, t)

        def zeros(t):
            t["x"][1] = 0.0
            t["x"][:, 2] = 0.0
            t["x"][2] = t["x"][0]

        for dtype in DTYPES:
            for width in (1, 2, 15, 16, 17, 33):
                case(f"5x{width}", dtype, (5, width))
            case("rank1", dtype, (19,))
            case("rank4", dtype, (2, 3, 4, 7))
            case("first_rank2", dtype, (5, 9), first=True)
            case("first_rank3", dtype, (3, 5, 17), first=True)
            case("first_short", dtype, (3, 5, 7), first=True)
            case("first_rank4", dtype, (2, 3, 4, 5), first=True)
            case("weight", dtype, (5, 9), kind="w")
            case("bias_first", dtype, (3, 5, 17), first=True, kind="b")
            case("plain", dtype, (5, 9), kind="")
            case("zeros", dtype, (5, 9), change=zeros)
            case("zeros_first", dtype, (4, 5, 7), first=True, change=zeros)
            case("small", dtype, (5, 9), sigma=1e-3, shift=0.0)
            case("large_alpha", dtype, (5, 9), alpha=4.0, sigma=0.5)
            case("no_alpha", dtype, (5, 9), alpha=0.0)
            case("negative_alpha", dtype, (5, 9), alpha=-1.0)
            case("empty", dtype, (0, 5))
        case("1031", "f32", (3, 1031))
        case("columns_1031", "f32", (1031, 3))
        case("first_1031", "f32", (2, 3, 1031), first=True)
        case("tiny", "f32", (5, 9), sigma=1e-12, shift=0.0)

        t = {"x": np.array([[-2.0, 0.0, 0.5]]), "alpha": [0.5], "weight": [1.0, 2.0, -1.0], "bias": [0.0, 0.1, 0.2], "dy": np.array([[1.0, -1.0, 2.0]])}
        if op == "derf":
            t["s"] = [0.1]
            like = {"y": [-0.7969082124, 0.324925832, -0.1793820536], "dx": [0.2509842871, -1.117151607, -0.9982837121], "dalpha": [-2.002220861], "ds": [-3.728902064]}
        else:
            like = {"y": [-0.761594156, 0.1, -0.0449186624], "dx": [0.2099871708, -1, -0.9400148488], "dalpha": [-1.779963532], "dweight": [-0.761594156, 0, 0.4898373248]}
        w.case("example", op, "f64", {"channels_first": False}, t, like)


STATISTICS = {"running_mean": "f32", "running_var": "f32", "num_batches_tracked": "i64"}


def tracked(draw, shape, kind, count, change=None):
    t = {"x": draw.normal(*shape, mean=0.3, sigma=1.5), "dy": draw.normal(*shape)}
    if change:
        change(t["x"])
    if "w" in kind:
        t["weight"] = draw.normal(shape[1], mean=1.0, sigma=0.5)
    if "b" in kind:
        t["bias"] = draw.normal(shape[1], sigma=0.7)
    t["running_mean"] = draw.rng.normal(0.3, 0.5, shape[1])
    t["running_var"] = draw.rng.uniform(0.5, 4.0, shape[1])
    t["num_batches_tracked"] = np.array(count)
    return t


def ghost_cases(w: Writer) -> None:
    op = "ghost_batch_norm"

    def case(slug, dtype, shape, size, train=True, kind="wb", count=3, momentum=0.1, eps=1e-5, change=None):
        t = tracked(Draw(f"{op}-{slug}-{dtype}", dtype), shape, kind, count, change)
        c = {"eps": eps, "momentum": momentum, "train": train, "virtual_batch_size": size}
        w.case(slug, op, dtype, c, t, of=STATISTICS)

    def dead(x):
        x[:, 1] = 0.75
        x[0] = x[1]

    for dtype in DTYPES:
        case("equal", dtype, (6, 5), 3)
        case("rest", dtype, (10, 3, 2), 4)
        case("single_joins", dtype, (5, 4), 2)
        case("one_part", dtype, (5, 4), 8)
        case("of_samples", dtype, (4, 3, 7), 1)
        case("maps", dtype, (7, 3, 4, 5), 3)
        case("plain", dtype, (7, 3, 5), 3, kind="")
        case("weight", dtype, (7, 3, 5), 3, kind="w")
        case("cumulative", dtype, (7, 3, 5), 2, momentum=None)
        case("eval", dtype, (7, 3, 5), 2, train=False)
        case("empty", dtype, (0, 3, 5), 2)
        case("dead", dtype, (7, 3, 5), 3, eps=0.25, change=dead)
    case("many", "f32", (257, 3), 4)
    t = {
        "x": np.array([1.0, 3, 6, -2, 0, 1]).reshape(6, 1),
        "dy": np.array([1.0, 0, -1, 2, 1, 0.5]).reshape(6, 1),
        "running_mean": [0.0],
        "running_var": [1.0],
        "num_batches_tracked": np.array(0),
    }
    like = {
        "y": [-1.135548603, -0.162221229, 1.297769832, -1.336301914, 0.2672603829, 1.069041531],
        "dx": [0.03842187903, -0.06403454401, 0.02561266498, 4.295228541e-6, -8.590457082e-7, -3.436182833e-6],
        "running_mean": [0.2666666667],
        "running_var": [1.613333333],
        "num_batches_tracked": [2],
    }
    w.case("example", op, "f64", {"eps": 1e-5, "momentum": 0.1, "train": True, "virtual_batch_size": 3}, t, like, of=STATISTICS)


def renorm_cases(w: Writer) -> None:
    op = "batch_renorm"

    def case(slug, dtype, shape, train=True, kind="wb", count=3, momentum=0.01, eps=1e-3, warmup=0, rmax=3.0, dmax=5.0, change=None):
        t = tracked(Draw(f"{op}-{slug}-{dtype}", dtype), shape, kind, count, change)
        c = {"eps": eps, "momentum": momentum, "train": train, "rmax": rmax, "dmax": dmax, "warmup_steps": warmup}
        w.case(slug, op, dtype, c, t, of=STATISTICS)

    def dead(x):
        x[:, 1] = 0.75

    for dtype in DTYPES:
        case("rows", dtype, (9, 5))
        case("two_rows", dtype, (2, 5))
        case("sequences", dtype, (4, 3, 17))
        case("maps", dtype, (3, 4, 3, 5))
        case("one_sample", dtype, (1, 4, 7))
        case("bounded", dtype, (9, 5), rmax=1.1, dmax=0.25)
        case("batch_norm", dtype, (9, 5), rmax=1.0, dmax=0.0)
        case("cold", dtype, (4, 3, 7), warmup=4)
        case("just_warm", dtype, (4, 3, 7), warmup=3)
        case("plain", dtype, (4, 3, 7), kind="")
        case("bias", dtype, (4, 3, 7), kind="b")
        case("cumulative", dtype, (4, 3, 7), momentum=None)
        case("eval", dtype, (4, 3, 7), train=False)
        case("empty", dtype, (0, 3, 7))
        case("dead", dtype, (4, 3, 7), eps=0.25, change=dead)
    case("1031", "f32", (1031, 3))
    case("planes_1031", "f32", (2, 3, 1031))
    t = {
        "x": np.array([1.0, 2, 6, -1]).reshape(4, 1),
        "dy": np.array([1.0, 0, -1, 2]).reshape(4, 1),
        "weight": [2.0],
        "bias": [0.5],
        "running_mean": [0.5],
        "running_var": [4.0],
        "num_batches_tracked": np.array(0),
    }
    c = {"eps": 1e-3, "momentum": 0.01, "train": True, "rmax": 3.0, "dmax": 5.0, "warmup_steps": 0}
    like = {
        "y": [0.9999375117, 1.999812535, 5.999312629, -0.9998125351],
        "dx": [0.07697853395, -0.4999375117, 0.1920233759, 0.2309356019],
        "dweight": [-3.999500094],
    }
    w.case("example_free", op, "f64", c, t, like, of=STATISTICS)
    like = {
        "y": [0.6371553755, 1.5, 4.951378498, -1.088533873],
        "dx": [0.06642881627, -0.4314223122, 0.1657070472, 0.1992864488],
    }
    w.case("example_bounded", op, "f64", c | {"rmax": 1.1, "dmax": 0.5}, t, like, of=STATISTICS)


def cumulative_cases(w: Writer) -> None:
    op = "cumulative_layer_norm"

    def case(slug, dtype, shape, kind="wb", eps=1e-5, mean=0.3, sigma=1.5, change=None):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = {"x": draw.normal(*shape, mean=mean, sigma=sigma), "dy": draw.normal(*shape)}
        if change:
            change(t["x"])
        if "w" in kind:
            t["weight"] = draw.normal(shape[1], mean=1.0, sigma=0.5)
        if "b" in kind:
            t["bias"] = draw.normal(shape[1], sigma=0.7)
        w.case(slug, op, dtype, {"eps": eps}, t)

    def start(x):
        x[0, :, :3] = 0.75
        x[1, 1] = 0.0

    for dtype in DTYPES:
        for length in (1, 2, 5, 16, 17, 33):
            case(f"2x3x{length}", dtype, (2, 3, length))
        case("one_channel", dtype, (3, 1, 9), eps=0.1)
        case("channels", dtype, (2, 33, 7))
        case("plain", dtype, (2, 5, 9), kind="")
        case("weight", dtype, (2, 5, 9), kind="w")
        case("bias", dtype, (2, 5, 9), kind="b")
        case("constant_start", dtype, (2, 5, 9), eps=0.25, change=start)
        case("empty_batch", dtype, (0, 5, 9))
        if dtype != "f16":
            case("large_mean", dtype, (2, 5, 9), mean=30.0, eps=1e-3)
    case("mean300", "f32", (2, 5, 33), mean=450.0)
    case("1031", "f32", (1, 3, 1031))
    x = np.array([[[1.0, 3, 2], [2, 0, 5]]])
    t = {"x": x, "weight": [1.0, 2.0], "bias": [0.0, 0.5], "dy": np.array([[[1.0, 0, -1], [0.5, 2, 1]]])}
    like = {
        "y": [-0.99999998, 1.341640781, -0.1059997878, 2.49999996, -2.183281562, 4.103992785],
        "dx": [-1.245286116, 0.4011154011, -0.7003132049, -0.4220853574, 1.509221875, 0.4573474019],
    }
    w.case("example", op, "f64", {"eps": 1e-8}, t, like)


def main() -> None:
    here = Path(__file__).resolve().parent
    default = here.parent / "tests" / "fixtures" / "conformance" / "family"
    w = Writer(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    l2_normalize_cases(w)
    softmax_cases(w)
    layer_scale_cases(w)
    grn_cases(w)
    weight_standardization_cases(w)
    spectral_norm_cases(w)
    masked_cases(w)
    dynamic_cases(w)
    ghost_cases(w)
    renorm_cases(w)
    cumulative_cases(w)
    print(f"{w.count} cases, {w.size / 1e6:.2f} MB in {w.folder}")


if __name__ == "__main__":
    main()
