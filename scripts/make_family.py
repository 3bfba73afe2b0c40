"""Writes the conformance cases of modulation, of activations behind a norm, and of gated RMS norm.

    pip install numpy
    python scripts/make_family.py            # rewrites tests/fixtures/conformance/family
    python scripts/make_family.py some/dir   # writes somewhere else

The cases have the format of make_conformance.py. Every input is first rounded to the dtype that it is
stored in. The expected values are computed from these by the formulas below, in numpy's extended
precision; the gradients by the complex step: the derivative of an analytic function f at x is the
imaginary part of f(x + ih) / h, without any difference of close numbers. Along the branches of an
activation the real part decides. The worked examples at the end are asserted before a file is written.

The same inputs come out on every run: each case draws from a generator seeded with its own name.
"""

import json
import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

REAL, COMPLEX = np.longdouble, np.clongdouble
STEP = REAL(1e-300)
ALL = ("f64", "f32", "f16", "bf16")
TOLERANCE = {"f64": 1e-11, "f32": 2e-6, "f16": 6e-4, "bf16": 4.5e-3}
TOLERANCE_BEFORE_WEIGHT = TOLERANCE | {"f16": 1.2e-3, "bf16": 9e-3}
SOURCE = f"numpy {np.__version__}: formulas in extended precision, gradients by the complex step"


# ---------------------------------------------------------------------------------------------------
# Storage
# ---------------------------------------------------------------------------------------------------


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(np.asarray(values, np.float32)), 0x7FC0, rounded).astype(np.uint16)


def stored(values, dtype: str) -> np.ndarray:
    """In the dtype of a case; bf16 as its bits."""
    values = np.asarray(values, np.float64)
    if dtype == "bf16":
        return bf16_bits(values)
    return values.astype({"f64": np.float64, "f32": np.float32, "f16": np.float16}[dtype])


def wide(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(REAL)


NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}


def save(path: Path, tensors: dict, metadata: dict) -> int:
    """One file, byte for byte the same on every run: wide elements first."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = {"__metadata__": dict(sorted(metadata.items()))}
    body = bytearray()
    for name in order:
        t = np.ascontiguousarray(tensors[name])
        start = len(body)
        body += t.tobytes()
        header[name] = {
            "dtype": NAMES[t.dtype.name],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, len(body)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = struct.pack("<Q", len(text)) + text + bytes(body)
    path.write_bytes(data)
    return len(data)


# ---------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------


def erf(z):
    """By its series, and its derivative for the imaginary part."""
    real = np.real(z).astype(REAL)
    out = np.zeros_like(real)
    for i, x in np.ndenumerate(real):
        if abs(x) > 7:
            out[i] = np.sign(x)
            continue
        term, total, n = x, x, 0
        while abs(term) > 1e-24 * abs(total) and n < 400:
            n += 1
            term = term * 2 * x * x / (2 * n + 1)
            total += term
        out[i] = total * np.exp(-x * x) * 2 / np.sqrt(REAL(np.pi))
    slope = np.exp(-real * real) * 2 / np.sqrt(np.arccos(REAL(-1)))
    return out + 1j * slope * np.imag(z)


def sigmoid(u):
    """From the side that does not overflow."""
    positive = np.real(u) >= 0
    e = np.exp(np.where(positive, -u, u))
    return np.where(positive, 1 / (1 + e), e / (1 + e))


def tanh(u):
    return 2 * sigmoid(2 * u) - 1


def act(name: str, u):
    x = np.real(u)
    if name == "relu":
        return np.where(x > 0, u, np.where(np.isnan(x), u, 0))
    if name == "relu6":
        return np.where((x > 0) & (x < 6), u, np.where(x >= 6, 6, np.where(np.isnan(x), u, 0)))
    if name.startswith("leaky_relu:"):
        return np.where(x > 0, u, REAL(float(name.split(":")[1])) * u)
    if name == "silu":
        return u * sigmoid(u)
    if name == "gelu":
        return u * (1 + erf(u / np.sqrt(REAL(2)))) / 2
    if name == "gelu_tanh":
        return u * sigmoid(2 * np.sqrt(2 / np.arccos(REAL(-1))) * (u + REAL(0.044715) * u**3))
    if name == "hardswish":
        return np.where(x <= -3, 0, np.where(x >= 3, u, u * (u + 3) / 6))
    if name == "sigmoid":
        return sigmoid(u)
    if name == "mish":
        positive = x >= 0
        e = np.exp(np.where(positive, -u, u))
        return u * np.where(positive, (1 + 2 * e) / (1 + 2 * e + 2 * e * e), (e * e + 2 * e) / (e * e + 2 * e + 2))
    raise KeyError(name)


def on_axis(p, rank: int, axis: int):
    return p.reshape([-1 if a == axis else 1 for a in range(rank)])


def standardized(x, axes: tuple, eps: float, center: bool = True):
    """The normalized values, and the factor of each."""
    # One element is taken off first: a constant row of 1e14 gives exact zeros.
    if center:
        first = np.real(x[tuple(slice(0, 1) if a in axes else slice(None) for a in range(x.ndim))])
        x = x - first
        x = x - x.mean(axes, keepdims=True)
    rstd = (np.square(x).mean(axes, keepdims=True) + REAL(eps)) ** REAL(-0.5)
    return x * rstd, np.broadcast_to(rstd, x.shape)


def norm(op: str, t: dict, c: dict):
    """The norm with its affine pair, the factor of dx, and the state after the call."""
    x, state = t["x"], {}
    last = op in ("layer_norm", "rms_norm") and not c.get("channels_first")
    if last:
        axes = tuple(range(x.ndim - len(c["normalized_shape"]), x.ndim))
        normal, rstd = standardized(x, axes, c["eps"], op == "layer_norm")
    elif op == "layer_norm":
        normal, rstd = standardized(x, (1,), c["eps"])
    elif op == "group_norm":
        g = c["num_groups"]
        grouped = x.reshape([x.shape[0], g, x.shape[1] // g, *x.shape[2:]])
        normal, rstd = (v.reshape(x.shape) for v in standardized(grouped, tuple(range(2, grouped.ndim)), c["eps"]))
    else:
        axes = tuple(a for a in range(x.ndim) if a != 1 and (a or op == "batch_norm"))
        tracks = "running_mean" in t
        if tracks and not c["train"]:
            mean, var = (on_axis(t[n], x.ndim, 1) for n in ("running_mean", "running_var"))
            rstd = np.broadcast_to((var + REAL(c["eps"])) ** REAL(-0.5), x.shape)
            normal = (x - mean) * rstd
            state = {n: t[n] for n in ("running_mean", "running_var", "num_batches_tracked")}
        else:
            normal, rstd = standardized(x, axes, c["eps"])
        if tracks and c["train"]:
            real = np.real(x)
            n = math.prod(x.shape[a] for a in axes)
            mean = real.mean(axes)
            var = real.var(axes) * n / (n - 1)
            if op == "instance_norm":
                mean, var = mean.mean(0), var.mean(0)
            m = REAL(c["momentum"])
            state = {
                "running_mean": (1 - m) * t["running_mean"] + m * mean,
                "running_var": (1 - m) * t["running_var"] + m * var,
                "num_batches_tracked": t["num_batches_tracked"] + 1,
            }
    w, b = t.get("weight"), t.get("bias")
    if not last:
        w, b = (p if p is None else on_axis(p, x.ndim, 1) for p in (w, b))
    if w is not None and op == "rms_norm":
        w = w + c.get("offset_of_weight", 0)
    slope = rstd if w is None else rstd * w
    y = normal if w is None else normal * w
    return (y if b is None else y + b), slope, state, last


def outside(value, x, last: bool, features: int):
    """A scale or shift shaped to broadcast against x; `features` trailing axes are features."""
    shape, batch = list(x.shape), x.shape[0]
    if value.ndim == x.ndim:
        return value
    own = shape[x.ndim - features :] if last else [shape[1]]
    lead = [1] * (x.ndim - features) if last else [1] * x.ndim
    if list(value.shape) == own:
        return value.reshape(lead + own) if last else on_axis(value, x.ndim, 1)
    assert value.shape[0] in (1, batch), value.shape
    if last:
        return value.reshape([value.shape[0]] + lead[1:] + own)
    return value.reshape([value.shape[0], shape[1]] + [1] * (x.ndim - 2))


def modulated(t: dict, c: dict):
    op = c["norm"]
    keys = {k: v for k, v in c.items() if k not in ("norm", "offset")}
    y, slope, state, last = norm(op, t, keys)
    features = len(c.get("normalized_shape", [0]))
    factor = REAL(c["offset"])
    if "scale" in t:
        factor = factor + outside(t["scale"], y, last, features)
    y, slope = y * factor, slope * factor
    if "shift" in t:
        y = y + outside(t["shift"], y, last, features)
    return y, slope, state


def gated_rms_norm(t: dict, c: dict):
    x = t["x"]
    size = c["group_size"] or x.shape[-1]
    opened = act(c["activation"], t["gate"]) if "gate" in t else 1
    h = x * opened if c["gate"] == "before" else x
    groups = h.reshape([*x.shape[:-1], -1, size])
    normal, rstd = (v.reshape(x.shape) for v in standardized(groups, (groups.ndim - 1,), c["eps"], False))
    w = t.get("weight", REAL(1))
    y = normal * w
    slope = rstd * w * opened
    return (y * opened if c["gate"] == "after" else y), slope, {}


def forward(op: str, t: dict, c: dict):
    if op == "gated_rms_norm":
        return gated_rms_norm(t, c)
    c = dict(c)
    activation = c.pop("activation", None)
    if op == "modulated":
        y, slope, state = modulated(t, c)
    else:
        y, slope, state, _ = norm(op, t, c)
    return (y if activation is None else act(activation, y)), slope, state


# ---------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------

STATE = ("running_mean", "running_var", "num_batches_tracked")


def rms(values) -> float:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


def expectations(op: str, t: dict, c: dict):
    """What must come out, and the sizes of the terms that gradients are sums of."""
    t = {k: np.asarray(v) for k, v in t.items()}
    y, slope, state = forward(op, {k: v.astype(COMPLEX) if k not in STATE else v for k, v in t.items()}, c)
    expected, terms = {"y": np.real(y)}, {}
    if "dy" in t:
        for name in (n for n in t if n not in STATE and n != "dy"):
            grad, size = np.zeros(t[name].shape, REAL), np.zeros(t[name].shape, REAL)
            for i in np.ndindex(t[name].shape):
                moved = {k: v.astype(COMPLEX) if k not in STATE else v for k, v in t.items()}
                moved[name][i] += 1j * STEP
                each = t["dy"] * np.imag(forward(op, moved, c)[0]) / STEP
                grad[i], size[i] = each.sum(), np.sqrt(np.square(each).sum())
            expected["d" + name], terms["d" + name] = grad, rms(size)
        terms["dx"] = max(terms["dx"], rms(t["dy"] * np.real(slope)))
    expected |= state
    if state and c.get("train"):
        m = REAL(c["momentum"])
        old = (1 - m) * t["running_mean"]
        terms["running_mean"] = rms(np.sqrt(old**2 + (expected["running_mean"] - old) ** 2))
    scales = {k: v for k, v in sorted(terms.items()) if v > 2 * rms(expected[k])}
    return expected, scales


class Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        self.folder, self.count, self.size = folder, 0, 0

    def case(self, op: str, slug: str, dtype: str, config: dict, tensors: dict, tolerance=None):
        name = f"{op}-{slug}-{dtype}"
        assert not any(c in name for c in ":/ "), name
        values = {k: wide(v) if k != "num_batches_tracked" else v for k, v in tensors.items()}
        expected, scales = expectations(op, values, config)
        metadata = {
            "op": op,
            "config": json.dumps({k: v for k, v in config.items() if k != "offset_of_weight"}),
            "dtype": dtype,
            "rtol": repr(tolerance or TOLERANCE[dtype]),
            "atol": repr(tolerance or TOLERANCE[dtype]),
            "scales": json.dumps(scales),
            "source": SOURCE,
        }
        out = dict(tensors)
        for key, value in expected.items():
            out["expected." + key] = np.asarray(value).astype(np.float64)
        self.size += save(self.folder / f"{name}.safetensors", out, metadata)
        self.count += 1


class Draw:
    """Random tensors of one case, with zeros and equal values among them, rounded to its dtype."""

    def __init__(self, name: str, dtype: str):
        self.rng, self.dtype = np.random.default_rng(zlib.crc32(name.encode())), dtype

    def values(self, *shape, mean=0.0, sigma=1.0, special=()):
        v = mean + sigma * self.rng.standard_normal(shape)
        # Every third on a grid of quarters: ties.
        grid = self.rng.uniform(size=shape) < 0.33
        v = np.where(grid, np.round(v * 4) / 4, v)
        for s in (0.0, *special):
            v = np.where(self.rng.uniform(size=shape) < 0.08, s, v)
        return stored(v, self.dtype)

    def state(self, channels: int, count: int):
        return {
            "running_mean": self.rng.normal(0.3, 0.5, channels).astype(np.float32),
            "running_var": self.rng.uniform(0.3, 2.0, channels).astype(np.float32),
            "num_batches_tracked": np.array(count, np.int64),
        }


def dead_channel(x: np.ndarray, axis: int) -> None:
    """All zeros at one index of an axis."""
    index = [slice(None)] * x.ndim
    index[axis] = 1 % x.shape[axis]
    x[tuple(index)] = 0


def modulated_cases(w: Writer) -> None:
    def case(slug, dtype, norm_op, shape, scale, shift, offset=1.0, kind="", config=None, state=None, dead=True):
        draw = Draw(f"modulated-{slug}-{dtype}", dtype)
        last = norm_op in ("layer_norm", "rms_norm") and not (config or {}).get("channels_first")
        c = {"norm": norm_op, "eps": 1e-5, "offset": offset} | (config or {})
        t = {"x": draw.values(*shape, mean=0.3, sigma=1.5), "dy": draw.values(*shape)}
        if dead and not last and norm_op != "layer_norm":
            dead_channel(t["x"], 1)
        features = shape[-1:] if last else shape[1:2]
        if last:
            c["normalized_shape"] = list(features)
        if "w" in kind:
            t["weight"] = draw.values(*features, mean=1.0, sigma=0.5)
        if "b" in kind:
            t["bias"] = draw.values(*features, sigma=0.7)
        if scale is not None:
            t["scale"] = draw.values(*scale, sigma=0.6, special=(-offset,))
        if shift is not None:
            t["shift"] = draw.values(*shift, sigma=0.8)
        if state is not None:
            t |= draw.state(shape[1], state)
        w.case("modulated", slug, dtype, c, t)

    for dtype in ALL:
        case("layer_sample", dtype, "layer_norm", (2, 3, 7), (2, 7), (2, 7))
        case("layer_square", dtype, "layer_norm", (4, 3, 4), (4, 4), (4, 4))
        case("layer_ones_wb", dtype, "layer_norm", (2, 2, 2, 18), (2, 1, 1, 18), (2, 18), kind="wb")
        case("layer_token", dtype, "layer_norm", (2, 3, 17), (2, 3, 17), (17,), kind="w")
        case("layer_shared_tokens", dtype, "layer_norm", (2, 3, 5), (1, 3, 5), (1, 5))
        case("layer_shift", dtype, "layer_norm", (3, 2, 9), None, (3, 9), kind="b")
        case("layer_offset0", dtype, "layer_norm", (3, 2, 9), (3, 9), (3, 9), offset=0.0, kind="wb")
        case("layer_rank2", dtype, "layer_norm", (3, 6), (3, 6), (6,))
        case("layer_channels_first", dtype, "layer_norm", (2, 5, 3, 2), (2, 5), (2, 5, 3, 2), kind="wb",
             config={"channels_first": True})
        case("rms_scale", dtype, "rms_norm", (2, 4, 6), (2, 6), None)
        case("rms_token_w", dtype, "rms_norm", (2, 4, 6), (2, 4, 6), (2, 4, 6), kind="w")
        case("group_sample", dtype, "group_norm", (2, 6, 5), (2, 6), (2, 6), kind="wb", config={"num_groups": 3})
        case("group_planes", dtype, "group_norm", (2, 4, 3, 7), (2, 4), (2, 4, 1, 1), config={"num_groups": 2})
        case("group_element", dtype, "group_norm", (2, 4, 3, 2), (2, 4, 3, 2), (4,), kind="wb", offset=0.0,
             config={"num_groups": 2})
        instance = {"train": True, "track_running_stats": False}
        case("instance_sample", dtype, "instance_norm", (2, 3, 17), (2, 3), (2, 3), config=instance)
        case("instance_shared", dtype, "instance_norm", (2, 3, 2, 3), (1, 3), (3,), kind="wb", config=instance)
        train = {"train": True, "momentum": 0.1}
        case("batch_train", dtype, "batch_norm", (3, 4, 5), (3, 4), (3, 4), config=train, state=2)
        case("batch_train_planes", dtype, "batch_norm", (2, 3, 4, 5), (2, 3, 1, 1), (2, 3), kind="wb",
             config=train, state=0)
        case("batch_rank2", dtype, "batch_norm", (4, 5), (4, 5), (5,), config=train, state=0)
        case("batch_spade", dtype, "batch_norm", (2, 3, 4, 5), (2, 3, 4, 5), (2, 3, 4, 5), config=train, state=1)
        case("batch_eval", dtype, "batch_norm", (3, 4, 5), (3, 4), (3, 4), kind="wb",
             config={"train": False}, state=7)


ACTIVATIONS = ("relu", "relu6", "leaky_relu:0.01", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "mish")


def activation_cases(w: Writer) -> None:
    def case(op, slug, dtype, activation, shape, config, kind="wb", state=None, spread=1.0):
        name = activation.split(":")[0]
        slug = f"{name}_{slug}"
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        last = op in ("layer_norm", "rms_norm") and not config.get("channels_first")
        c = config | {"activation": activation}
        if last:
            c["normalized_shape"] = [shape[-1]]
        t = {"x": draw.values(*shape, mean=0.3, sigma=1.5), "dy": draw.values(*shape)}
        if not last:
            # Pre-activations of exactly the bias, which may be 0 or another kink.
            dead_channel(t["x"], 1)
        features = shape[-1:] if last else shape[1:2]
        # Wide enough for both ends of the activation.
        if "w" in kind:
            t["weight"] = draw.values(*features, mean=spread, sigma=spread)
        if "b" in kind:
            t["bias"] = draw.values(*features, sigma=spread, special=(-3.0, 3.0, 6.0))
            t["bias"][1 % features[0]] = stored(0.0, dtype)
        if state is not None:
            t |= draw.state(shape[1], state)
        w.case(op, slug, dtype, c, t)

    train = {"eps": 1e-5, "train": True, "momentum": 0.1}
    for activation in ACTIVATIONS:
        for dtype in ALL:
            case("layer_norm", "rows", dtype, activation, (3, 4, 18), {"eps": 1e-5}, spread=2.0)
            case("group_norm", "planes", dtype, activation, (2, 4, 3, 6), {"eps": 1e-5, "num_groups": 2}, spread=2.0)
            case("batch_norm", "train", dtype, activation, (3, 4, 5), train, state=0, spread=2.0)
    for dtype in ALL:
        for activation in ("relu", "silu", "gelu"):
            case("rms_norm", "rows", dtype, activation, (2, 3, 7), {"eps": 1e-6}, kind="w")
            case("layer_norm", "no_affine", dtype, activation, (5, 19), {"eps": 1e-5}, kind="")
            case("layer_norm", "channels_first", dtype, activation, (2, 5, 3), {"eps": 1e-5, "channels_first": True})
            case("group_norm", "small", dtype, activation, (2, 6, 5), {"eps": 1e-5, "num_groups": 3})
            case("instance_norm", "planes", dtype, activation, (2, 3, 17),
                 {"eps": 1e-5, "train": True, "track_running_stats": False})
            case("batch_norm", "planes", dtype, activation, (2, 3, 4, 5), train, state=3)
            case("batch_norm", "rank2", dtype, activation, (5, 6), train, kind="b", state=3)
            case("batch_norm", "eval", dtype, activation, (3, 4, 5), {"eps": 1e-5, "train": False}, state=3)

    def both(slug, dtype, op, shape, scale, activation, config):
        draw = Draw(f"modulated-{slug}-{dtype}", dtype)
        c = {"norm": op, "eps": 1e-5, "offset": 1.0, "activation": activation} | config
        t = {
            "x": draw.values(*shape, mean=0.3, sigma=1.5),
            "dy": draw.values(*shape),
            "scale": draw.values(*scale, special=(-1.0,)),
            "shift": draw.values(*scale),
        }
        w.case("modulated", slug, dtype, c, t)

    for dtype in ALL:
        both("silu_group", dtype, "group_norm", (2, 4, 3, 6), (2, 4), "silu", {"num_groups": 2})
        both("gelu_layer", dtype, "layer_norm", (2, 3, 7), (2, 7), "gelu", {"normalized_shape": [7]})
        both("relu_batch", dtype, "batch_norm", (3, 4, 5), (3, 4), "relu",
             {"train": True, "track_running_stats": False})


def gated_cases(w: Writer) -> None:
    def case(slug, dtype, shape, gate, activation="silu", size=None, eps=1e-6, cast="after_weight", kind="wg"):
        draw = Draw(f"gated_rms_norm-{slug}-{dtype}", dtype)
        c = {"eps": eps, "gate": gate, "activation": activation, "group_size": size, "cast": cast}
        t = {"x": draw.values(*shape, sigma=1.5), "dy": draw.values(*shape)}
        if "w" in kind:
            t["weight"] = draw.values(shape[-1], mean=1.0, sigma=0.5)
        if "g" in kind:
            t["gate"] = draw.values(*shape, sigma=1.5)
            # A row that the gate closes.
            t["gate"].reshape(-1, shape[-1])[0] = 0
        tolerance = TOLERANCE_BEFORE_WEIGHT[dtype] if cast == "before_weight" else None
        w.case("gated_rms_norm", slug, dtype, c, t, tolerance)

    for dtype in ALL:
        for gate in ("before", "after"):
            case(f"{gate}_silu", dtype, (2, 3, 8), gate)
            case(f"{gate}_sigmoid", dtype, (3, 19), gate, "sigmoid", eps=1e-5)
            case(f"{gate}_groups", dtype, (2, 3, 12), gate, size=4)
            case(f"{gate}_groups17", dtype, (3, 34), gate, size=17)
            case(f"{gate}_no_gate", dtype, (2, 3, 8), gate, size=4, kind="w")
            case(f"{gate}_no_weight", dtype, (2, 9), gate, "gelu", kind="g")
            case(f"{gate}_before_weight", dtype, (2, 3, 8), gate, size=4, cast="before_weight")


# ---------------------------------------------------------------------------------------------------
# Worked examples
# ---------------------------------------------------------------------------------------------------


def check_examples() -> None:
    def close(got, want):
        got, want = np.asarray(got, np.float64).ravel(), np.asarray(want, np.float64).ravel()
        assert np.allclose(got, want, rtol=2e-9, atol=2e-10), (got, want)

    def array(values, *shape):
        return np.array(values, REAL).reshape(shape)

    t = {
        "x": array([1, 2, 4, 0, -1, 3, 2, 2, 5, 1, 0, -1], 2, 2, 3),
        "scale": array([0.5, -1, 0, 1, 0, 2], 2, 3),
        "shift": array([0.1, 0.2, 0.3, 0, -0.1, 1], 2, 3),
        "dy": array([1, 0, -2, 0.5, 1, 0, 0, 1, 1, -1, 2, 0.5], 2, 2, 3),
    }
    r, _ = expectations("modulated", t, {"norm": "layer_norm", "eps": 1e-6, "normalized_shape": [3], "offset": 1})
    close(r["y"][0, 0], [-1.503566936, 0.2, 1.63630578])
    close(r["dx"][1], [-0.3535535968, 0.3535530076, 5.89255209e-7, -0.9185611796, 1.837115929, -0.9185547497])
    close(r["dscale"], [-1.265160725, -0.980580506, -2.67261156, -1.224743953, -0.7071066044, 0.8018412324])
    t = {"x": array([1, 2, 4], 1, 3), "dy": array([1, 0, -2], 1, 3)}
    r, _ = expectations("layer_norm", t, {"eps": 1e-6, "normalized_shape": [3], "activation": "gelu"})
    close(r["y"], [-0.152365351, -0.1054703514, 1.215069874])
    close(r["dx"], [-0.2808287928, 0.4212441241, -0.1404153313])
    t = {"x": array([1, 3, 2, 0, 5, 5, -1, 1], 1, 4, 2), "weight": array([1, 2, -1, 0.5], 4),
         "bias": array([0, 0.5, 0, -0.5], 4), "dy": array([1, -1, 0, 2, 1, 0.5, -1, 1], 1, 4, 2)}
    r, _ = expectations("group_norm", t, {"eps": 1e-5, "num_groups": 2, "activation": "silu"})
    close(r["dx"][0, 3], [-0.01722008475, 0.0258301812])
    close(r["dweight"], [-1.486159638, 0.2614411922, 0.1211901654, -0.0495980664])
    t = {"x": array([1, -2, 3, 0.5], 1, 4), "gate": array([2, -1, 0, 1], 1, 4),
         "weight": array([1, 0.5, 2, -1], 4), "dy": array([1, -1, 0.5, 2], 1, 4)}
    c = {"eps": 1e-5, "gate": "before", "activation": "silu", "group_size": 2}
    r, _ = expectations("gated_rms_norm", t, c)
    close(r["y"], [1.352563324, 0.2064949533, 0, -1.414107729])
    close(r["dgate"], [0.1883855541, 0.08182059831, 5.802986671, -0.0005371241677])
    r, _ = expectations("gated_rms_norm", t, c | {"eps": 1e-6, "gate": "after", "group_size": None})
    close(r["dx"], [0.904999304, 0.1278762107, -0.08494784655, -0.7888064595])
    for name, slopes in {
        "silu": [-0.08810410602, 0.07232948813, 0.5, 0.9276705119, 1.088104106],
        "gelu": [-0.0119456472, -0.08331547059, 0.5, 1.083315471, 1.011945647],
        "gelu_tanh": [-0.01158416663, -0.08296408385, 0.5, 1.082964084, 1.011584167],
        "hardswish": [0, 0.1666666667, 0.5, 0.8333333333, 1],
        "mish": [-0.09339311453, 0.05921675588, 0.6, 1.04903622, 1.021106911],
        "relu": [0, 0, 0, 1, 1],
    }.items():
        u = array([-3, -1, 0, 1, 3], 5).astype(COMPLEX) + 1j * STEP
        close(np.imag(act(name, u)) / STEP, slopes)


def main() -> None:
    assert np.finfo(REAL).eps < 1e-18, "numpy's extended precision is no wider than float64 here"
    np.seterr(under="ignore")
    check_examples()
    default = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "conformance" / "family"
    w = Writer(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
    modulated_cases(w)
    activation_cases(w)
    gated_cases(w)
    print(f"{w.count} cases, {w.size / 1e6:.2f} MB in {w.folder}")


if __name__ == "__main__":
    main()
