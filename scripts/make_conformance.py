"""Writes tests/fixtures/conformance/*.safetensors, the cases that tests/conformance/main.rs runs.

    pip install torch onnx numpy
    python scripts/make_conformance.py            # rewrites tests/fixtures/conformance
    python scripts/make_conformance.py some/dir   # writes somewhere else

One file is one case: the inputs in the case's dtype, a cotangent `dy`, and what must come out, in
float64. Every input is first rounded to the dtype that it is stored in, and the expected values are
computed in float64 from those rounded values, by the formulas below and torch's autograd. They are
the mathematics, not the rounding of any library. Each result is computed a second time by torch's own
layer functions in float64, and each forward a third time in extended precision; the script stops
where the ways disagree.

The same inputs come out on every run: each case draws from a generator seeded with its own name, so
adding a case leaves the others' files as they are.

The forward values of the onnx package's node tests for these operators are written as cases too.
"""

import importlib
import json
import math
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fixture_io import save

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
HALF = ("f16", "bf16")
ALL = tuple(DTYPES)

# rtol and atol. A single rounding to half precision costs 2^-11 = 4.9e-4 (f16) or 2^-9 = 2.0e-3
# (bf16) of the value.
TOLERANCE = {"f64": 1e-11, "f32": 2e-6, "f16": 6e-4, "bf16": 4.5e-3}
# With `before_weight` the normalized row is rounded to half precision before the weight multiplies it,
# and the product is rounded again. The expected value has neither rounding, so that an error of twice
# 2^-11 (2^-9) of the value is correct: twice the tolerance. Wider inputs are not rounded in between.
TOLERANCE_BEFORE_WEIGHT = TOLERANCE | {"f16": 1.2e-3, "bf16": 9e-3}

# What gradients are taken by.
LEAVES = ("x", "residual", "v", "g", "weight", "bias", "mean_weight", "var_weight")

SOURCE = f"torch {torch.__version__.split('+')[0]} autograd in float64"


# ---------------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------------


def centered(x: torch.Tensor, axes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x - mean(x) and mean(x) over `axes`.

    One element of each group is subtracted first. That changes neither the result nor its derivative,
    and a constant row of 1e14 gives exact zeros, where the rounding of its float64 mean would not.
    """
    first = x.detach()
    for axis in axes:
        first = first.narrow(axis, 0, min(1, first.shape[axis]))
    if first.numel() == 0:
        first = torch.zeros([1 if a in axes else n for a, n in enumerate(x.shape)], dtype=x.dtype)
    d = x - first
    shift = d.mean(axes, keepdim=True)
    return d - shift, first + shift.detach()


def along(t: torch.Tensor | None, x: torch.Tensor, axis: int | None) -> torch.Tensor | None:
    """A parameter of one axis (or, with None, of the trailing axes) shaped to broadcast against x."""
    if t is None or axis is None:
        return t
    return t.reshape([-1 if a == axis else 1 for a in range(x.dim())])


def affine(xhat: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    y = xhat if weight is None else xhat * weight
    return y if bias is None else y + bias


class Result:
    """The output of an oracle, with what the scales of its gradients are made of.

    y      the output
    xhat   the normalized value that the weight multiplies
    slope  what dy is multiplied by in the leading term of dx
    state  running statistics after the call
    sum    what was normalized, where that was added first
    share_terms  what dy is multiplied by in the gradients of shares
    """

    def __init__(self, y, xhat, slope, state=None, mean_terms=None):
        self.y, self.xhat, self.slope = y, xhat, slope
        self.sum = None
        self.share_terms = {}
        self.state = state or {}
        self.mean_terms = mean_terms


def layer_norm(t: dict, c: dict) -> Result:
    x = t["x"]
    first = c.get("channels_first", False)
    axes = [1] if first else list(range(x.dim() - len(c["normalized_shape"]), x.dim()))
    w, b = (along(t.get(n), x, 1 if first else None) for n in ("weight", "bias"))
    d, _ = centered(x, axes)
    rstd = (d.square().mean(axes, keepdim=True) + c["eps"]).rsqrt()
    return Result(affine(d * rstd, w, b), d * rstd, rstd * (1.0 if w is None else w))


def rms_norm(t: dict, c: dict) -> Result:
    x = t["x"]
    axes = list(range(x.dim() - len(c["normalized_shape"]), x.dim()))
    # PyTorch takes the epsilon of the dtype that it computes in, which is f32 for the half dtypes.
    eps = c["eps"] if c["eps"] is not None else (2.0**-52 if c["_dtype"] == "f64" else 2.0**-23)
    rstd = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    w = None if t.get("weight") is None else t["weight"] + c.get("offset", 0.0)
    return Result(affine(x * rstd, w, t.get("bias")), x * rstd, rstd * (1.0 if w is None else w))


def scale_norm(t: dict, c: dict) -> Result:
    x, w = t["x"], t["weight"]
    axes = [1] if c.get("channels_first") else list(range(x.dim() - len(c["normalized_shape"]), x.dim()))
    square = x.square().sum(axes, keepdim=True)
    # A row that is shorter than eps has a fixed length. Both branches of `where` are finite at zero.
    short = square.sqrt() < c["eps"]
    inverse = torch.where(short, 1.0 / c["eps"], torch.where(short, 1.0, square).rsqrt())
    return Result(x * inverse * w, x * inverse, inverse * w)


def of_sum(oracle, t: dict, c: dict) -> Result:
    """The norm of x + residual. The sum is not rounded: it is the mathematics too."""
    total = t["x"] + t["residual"]
    result = oracle(t | {"x": total}, c)
    result.sum = total
    return result


def group_norm(t: dict, c: dict) -> Result:
    x, groups = t["x"], c["num_groups"]
    grouped = x.reshape([x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]])
    axes = list(range(2, grouped.dim()))
    w, b = (along(t.get(n), x, 1) for n in ("weight", "bias"))
    d, _ = centered(grouped, axes)
    rstd = (d.square().mean(axes, keepdim=True) + c["eps"]).rsqrt()
    xhat = (d * rstd).reshape(x.shape)
    slope = rstd.expand_as(grouped).reshape(x.shape) * (1.0 if w is None else w)
    return Result(affine(xhat, w, b), xhat, slope)


def running_norm(t: dict, c: dict, axes: list[int], per_sample: bool) -> Result:
    """Batch norm (statistics over `axes`) and instance norm (the same, for each sample)."""
    x = t["x"]
    w, b = (along(t.get(n), x, 1) for n in ("weight", "bias"))
    tracks = "running_mean" in t
    state = {n: t[n] for n in ("running_mean", "running_var", "num_batches_tracked") if tracks}
    if tracks and not c["train"]:
        mean, var = (along(t[n], x, 1) for n in ("running_mean", "running_var"))
        rstd = (var + c["eps"]).rsqrt()
        xhat = (x - mean) * rstd
        return Result(affine(xhat, w, b), xhat, rstd * (1.0 if w is None else w), state)
    d, mean = centered(x, axes)
    var = d.square().mean(axes, keepdim=True)
    rstd = (var + c["eps"]).rsqrt()
    result = Result(affine(d * rstd, w, b), d * rstd, rstd * (1.0 if w is None else w), state)
    # An empty batch has no statistics and is not counted.
    if tracks and x.numel() > 0:
        n = math.prod(x.shape[a] for a in axes)
        count = t["num_batches_tracked"] + 1
        m = 1.0 / count.item() if c["momentum"] is None else c["momentum"]
        mean, unbiased = mean.detach(), var.detach() * n / (n - 1)
        if per_sample:
            mean, unbiased = mean.mean(0), unbiased.mean(0)
        old, new = (1 - m) * t["running_mean"], m * mean.reshape(-1)
        result.state = {
            "running_mean": old + new,
            "running_var": (1 - m) * t["running_var"] + m * unbiased.reshape(-1),
            "num_batches_tracked": count,
        }
        result.mean_terms = (old, new)
    return result


def batch_norm(t: dict, c: dict) -> Result:
    return running_norm(t, c, [a for a in range(t["x"].dim()) if a != 1], per_sample=False)


def instance_norm(t: dict, c: dict) -> Result:
    return running_norm(t, c, list(range(2, t["x"].dim())), per_sample=True)


def switch_norm(t: dict, c: dict) -> Result:
    """The statistics of the layer and the batch as moments of the union of their planes, about a common shift."""
    x = t["x"]
    w, b = (along(t.get(n), x, 1) for n in ("weight", "bias"))
    space, using_bn = list(range(2, x.dim())), c["using_bn"]
    tracks = "running_mean" in t
    state = {n: t[n] for n in ("running_mean", "running_var", "num_batches_tracked") if tracks}
    if x.numel() == 0:
        zero = 0 * (t["mean_weight"].sum() + t["var_weight"].sum())
        return Result(affine(x, w, b) + zero, x, x, state)
    shift = x.detach().flatten()[0]
    d = x - shift
    values = math.prod(x.shape[2:])
    # Zero-dimensional space: a plane is one value, and the whole is unbiased instead.
    at_planes, at_unions = (c["unbiased"] and c["instance"], c["unbiased"] and not c["instance"])
    mean = d.mean(space, keepdim=True) if space else d
    var = (d - mean).square().mean(space, keepdim=True) if space else torch.zeros_like(d)
    if at_planes:
        var = var * values / (values - 1)

    def union(axis):
        m = mean.mean(axis, keepdim=True)
        v = (var + (mean - m).square()).mean(axis, keepdim=True)
        n = values * x.shape[axis]
        return m, v * n / (n - 1) if at_unions else v

    sources = [(mean, var)] if c["instance"] else []
    sources.append(union(1))
    result_state, mean_terms = state, None
    if using_bn and c["train"]:
        sources.append(union(0))
        m_bn, v_bn = (s.detach().reshape(-1) for s in sources[-1])
        count = t["num_batches_tracked"] + 1
        m = 1.0 / count.item() if c["momentum"] is None else c["momentum"]
        old, new = (1 - m) * t["running_mean"], m * (m_bn + shift)
        result_state = {
            "running_mean": old + new,
            "running_var": (1 - m) * t["running_var"] + m * v_bn,
            "num_batches_tracked": count,
        }
        mean_terms = (old, new)
    elif using_bn:
        sources.append((along(t["running_mean"], x, 1) - shift, along(t["running_var"], x, 1)))
    shares = [torch.softmax(t[n], 0) for n in ("mean_weight", "var_weight")]
    mean, var = (sum(p * s[i] for p, s in zip(shares[i], sources)) for i in (0, 1))
    rstd = (var + c["eps"]).rsqrt()
    xhat = (d - mean) * rstd
    slope = rstd.expand_as(x) * (1.0 if w is None else w)
    result = Result(affine(xhat, w, b), xhat, slope, result_state, mean_terms)
    along_var = -0.5 * xhat * rstd**2 * (1.0 if w is None else w)
    for name, p, i, total, factor in (
        ("mean_weight", shares[0], 0, mean, -slope),
        ("var_weight", shares[1], 1, var, along_var),
    ):
        result.share_terms[name] = [(q * (s[i] - total) * factor).detach() for q, s in zip(p, sources)]
    return result


def weight_norm(t: dict, c: dict) -> Result:
    v, g = t["v"], t["g"]
    axes = [a for a in range(v.dim()) if a != c["dim"]]
    # To torch, no axes at all mean every axis.
    square = v.square().sum(axes, keepdim=True) if axes else v.square()
    # A row of zeros has no direction: its weight and its gradients are 0 by contract. Both branches of
    # `where` are finite, so that autograd gives 0 there as well.
    zero = square == 0
    inverse = torch.where(zero, 0.0, torch.where(zero, 1.0, square).rsqrt())
    vhat = v * inverse
    return Result(g * vhat, vhat, g * inverse)


ORACLES = {
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "scale_norm": scale_norm,
    "add_layer_norm": partial(of_sum, layer_norm),
    "add_rms_norm": partial(of_sum, rms_norm),
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "sync_batch_norm": batch_norm,
    "switch_norm": switch_norm,
    "weight_norm": weight_norm,
}


# ---------------------------------------------------------------------------------------------------
# The second way: torch's own layers, in float64
# ---------------------------------------------------------------------------------------------------


def torch_layer(op: str, t: dict, c: dict) -> tuple[torch.Tensor, dict]:
    if op.startswith("add_"):
        total = torch.add(t["x"], t["residual"])
        y, _ = torch_layer(op.removeprefix("add_"), t | {"x": total}, c)
        return y, {"sum": total}
    x, w, b = t.get("x"), t.get("weight"), t.get("bias")
    if op == "layer_norm" and c.get("channels_first"):
        return F.layer_norm(x.movedim(1, -1), [x.shape[1]], w, b, c["eps"]).movedim(-1, 1), {}
    if op == "layer_norm":
        return F.layer_norm(x, c["normalized_shape"], w, b, c["eps"]), {}
    if op == "rms_norm":
        eps = c["eps"] if c["eps"] is not None or c["_dtype"] == "f64" else torch.finfo(torch.float32).eps
        w = None if w is None else w + c.get("offset", 0.0)
        y = F.rms_norm(x, c["normalized_shape"], w, eps)
        return (y if b is None else y + b), {}
    if op == "scale_norm":
        # The authors' code.
        dims = 1 if c.get("channels_first") else list(range(-len(c["normalized_shape"]), 0))
        return x * (w / torch.linalg.vector_norm(x, dim=dims, keepdim=True).clamp(min=c["eps"])), {}
    if op == "group_norm":
        return F.group_norm(x, c["num_groups"], w, b, c["eps"]), {}
    if op == "weight_norm":
        return torch._weight_norm(t["v"], t["g"], -1 if c["dim"] is None else c["dim"]), {}
    if op == "switch_norm":
        return switched(t, c)
    tracks = "running_mean" in t
    rm, rv = (t[n].clone() if tracks else None for n in ("running_mean", "running_var"))
    count = t["num_batches_tracked"] + c["train"] if tracks else None
    m = 0.0
    if tracks and c["train"]:
        m = 1.0 / count.item() if c["momentum"] is None else c["momentum"]
    from_batch = c["train"] or not tracks
    if op in ("batch_norm", "sync_batch_norm"):
        # torch has a bias only together with a weight, which autograd does not mind.
        y = F.batch_norm(x, rm, rv, w, b, from_batch, m, c["eps"])
    else:
        y = F.instance_norm(x, rm, rv, w, b, from_batch, m, c["eps"])
    return y, {"running_mean": rm, "running_var": rv, "num_batches_tracked": count} if tracks else {}


def switched(t: dict, c: dict) -> tuple[torch.Tensor, dict]:
    """torch.var_mean over the axes of each source. No union of planes: the unbiased variance of a plane enters
    those of the layer and the batch by what it adds to them."""
    x = t["x"]
    space = list(range(2, x.dim()))
    unbiased = int(c["unbiased"])

    def moments(axes, correction):
        var, mean = torch.var_mean(x, axes, correction=correction, keepdim=True)
        return mean, var

    sources, extra = [], 0.0
    if c["instance"]:
        sources.append(moments(space, unbiased))
        extra = sources[0][1] - moments(space, 0)[1]
    correction = 0 if c["instance"] else unbiased

    def whole(axes, mean_axis):
        mean, var = moments(axes, correction)
        return mean, var + (extra.mean(mean_axis, keepdim=True) if c["instance"] else 0.0)

    sources.append(whole([1, *space], 1))
    state = {n: t[n] for n in ("running_mean", "running_var", "num_batches_tracked") if n in t}
    if c["using_bn"] and c["train"]:
        sources.append(whole([0, *space], 0))
        count = t["num_batches_tracked"] + 1
        m = 1.0 / count.item() if c["momentum"] is None else c["momentum"]
        mean, var = (s.detach().reshape(-1) for s in sources[-1])
        state = {
            "running_mean": torch.lerp(t["running_mean"], mean, m),
            "running_var": torch.lerp(t["running_var"], var, m),
            "num_batches_tracked": count,
        }
    elif c["using_bn"]:
        sources.append(tuple(along(t[n], x, 1) for n in ("running_mean", "running_var")))
    shares = [torch.softmax(t[n], 0) for n in ("mean_weight", "var_weight")]
    mean, var = (sum(p * s[i] for p, s in zip(shares[i], sources)) for i in (0, 1))
    w, b = (along(t.get(n), x, 1) for n in ("weight", "bias"))
    return affine((x - mean) / (var + c["eps"]).sqrt(), w, b), state


def gradients(outputs: dict, leaves: dict, t: dict) -> dict:
    """By the leaves, of those outputs whose cotangent `t` has."""
    names = [name for name, y in outputs.items() if y is not None and "d" + name in t]
    if not names:
        return {}
    ys, cotangents = [outputs[name] for name in names], [t["d" + name] for name in names]
    grads = torch.autograd.grad(ys, list(leaves.values()), cotangents, allow_unused=False)
    return {"d" + name: grad for name, grad in zip(leaves, grads)}


def forward_in_extended_precision(op: str, t: dict, c: dict) -> np.ndarray | None:
    """The forward once more, in numpy's 80-bit floats, without the subtraction of a first element."""
    if np.finfo(np.longdouble).eps > 1e-18:
        return None
    n = {k: v.detach().numpy().astype(np.longdouble) for k, v in t.items()}
    if op == "switch_norm":
        return None
    op = op.removeprefix("sync_")
    if op == "weight_norm":
        axes = tuple(a for a in range(n["v"].ndim) if a != c["dim"])
        norm = np.sqrt((n["v"] ** 2).sum(axes, keepdims=True))
        return n["g"] * n["v"] / np.where(norm == 0, 1, norm)
    x = n["x"]
    if op.startswith("add_"):
        op, x = op.removeprefix("add_"), x + n["residual"]
    # An infinity minus itself is the NaN that is expected there.
    np.seterr(invalid="ignore")
    w, b = n.get("weight"), n.get("bias")
    if op == "scale_norm":
        first = c.get("channels_first")
        axes = (1,) if first else tuple(range(x.ndim - len(c["normalized_shape"]), x.ndim))
        norm = np.sqrt((x**2).sum(axes, keepdims=True))
        return x / np.maximum(norm, np.longdouble(c["eps"])) * w
    if op in ("layer_norm", "rms_norm") and not c.get("channels_first"):
        axes = tuple(range(x.ndim - len(c["normalized_shape"]), x.ndim))
    else:
        axes = {
            "layer_norm": (1,),
            "group_norm": tuple(range(2, x.ndim + 1)),
            "batch_norm": (0, *range(2, x.ndim)),
            "instance_norm": tuple(range(2, x.ndim)),
        }[op]
        w, b = (p if p is None else p.reshape([-1] + [1] * (x.ndim - 2)) for p in (w, b))
    shape = x.shape
    if op == "group_norm":
        x = x.reshape([shape[0], c["num_groups"], shape[1] // c["num_groups"], *shape[2:]])
    if op == "rms_norm":
        eps = c["eps"] if c["eps"] is not None else (2.0**-52 if c["_dtype"] == "f64" else 2.0**-23)
        mean, var, w = 0, (x**2).mean(axes, keepdims=True), w if w is None else w + c.get("offset", 0)
    elif "running_mean" in n and not c["train"]:
        eps = c["eps"]
        mean, var = (n[k].reshape([-1] + [1] * (x.ndim - 2)) for k in ("running_mean", "running_var"))
    else:
        eps = c["eps"]
        mean = x.mean(axes, keepdims=True)
        var = ((x - mean) ** 2).mean(axes, keepdims=True)
    y = ((x - mean) / np.sqrt(var + np.longdouble(eps))).reshape(shape)
    y = y if w is None else y * w
    return y if b is None else y + b


# ---------------------------------------------------------------------------------------------------
# A case
# ---------------------------------------------------------------------------------------------------


def rms(t: torch.Tensor) -> float:
    t = t[t.isfinite()]
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def summed(terms: torch.Tensor, like: torch.Tensor, axis: int | None) -> float:
    """Rms, over the elements of a parameter, of the root of the sum of its squared terms: the size
    that a sum of terms of either sign has unless they happen to cancel."""
    if axis is None:
        return rms(terms.square().sum_to_size(like.shape).sqrt())
    other = [a for a in range(terms.dim()) if a != axis]
    return rms(terms.square().sum(other).sqrt())


def scales(op: str, t: dict, c: dict, r: Result, expected: dict) -> dict[str, float]:
    """The rms of the terms, for each tensor that is a difference of terms twice its size or more."""
    terms: dict[str, float] = {}
    if "dy" in t:
        dy = t["dy"]
        leading = rms(dy * r.slope)
        if op == "weight_norm":
            terms["dv"] = leading
            terms["dg"] = rms((dy * r.xhat).square().sum_to_size(t["g"].shape).sqrt())
        else:
            terms["dx"] = leading
            if "dsum" in t:
                terms["dx"] = terms["dresidual"] = math.hypot(leading, rms(t["dsum"]))
            norm = op.removeprefix("add_")
            trailing = norm in ("rms_norm", "scale_norm") or (norm == "layer_norm" and not c.get("channels_first"))
            for name, term in (("weight", dy * r.xhat), ("bias", dy)):
                if name in t:
                    terms["d" + name] = summed(term, t[name], None if trailing else 1)
    for name, factors in r.share_terms.items():
        terms["d" + name] = max((t["dy"] * f).square().sum().sqrt().item() for f in factors)
    if r.mean_terms is not None:
        old, new = r.mean_terms
        terms["running_mean"] = rms((old.square() + new.square()).sqrt())
    return {k: v for k, v in sorted(terms.items()) if v > 2 * rms(expected[k])}


def close(got: torch.Tensor, want: torch.Tensor, bound: float, size: float) -> bool:
    return got.shape == want.shape and torch.allclose(
        got, want, rtol=bound, atol=bound * size, equal_nan=True
    )


class Writer:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.safetensors"):
            old.unlink()
        self.folder, self.count, self.size = folder, 0, 0
        self.names: set[str] = set()

    def write(self, name, op, dtype, config, tensors, expected, scale, tolerance, source):
        assert name not in self.names, f"two cases are called {name}"
        self.names.add(name)
        metadata = {
            "op": op,
            "config": json.dumps({k: v for k, v in config.items() if not k.startswith("_")}),
            "dtype": dtype,
            "rtol": repr(tolerance),
            "atol": repr(tolerance),
            "scales": json.dumps(scale),
            "source": source,
        }
        stored = dict(tensors)
        for key, value in expected.items():
            stored["expected." + key] = value.to(torch.float64)
        self.size += save(self.folder / f"{name}.safetensors", stored, metadata)
        self.count += 1

    def case(self, slug, op, dtype, config, tensors, tolerance=None):
        """Computes what `tensors` (in storage dtypes) must give, in all ways, and writes the case."""
        name = f"{op}-{slug}-{dtype}"
        config = config | {"_dtype": dtype}
        wide = {k: v.to(torch.float64) for k, v in tensors.items()}
        leaves = {k: wide[k].requires_grad_() for k in LEAVES if k in wide}
        r = ORACLES[op](wide, config)
        expected = {"y": r.y.detach()}
        if r.sum is not None:
            expected["sum"] = r.sum.detach()
        expected |= gradients({"y": r.y, "sum": r.sum}, leaves, wide)
        expected |= {k: v.detach() for k, v in r.state.items()}
        scale = scales(op, {k: v.detach() for k, v in wide.items()}, config, r, expected)
        self.cross_check(name, op, wide, config, leaves, expected, scale)
        if tolerance is None:
            tolerance = TOLERANCE[dtype]
        for key, want in expected.items():
            # Rounding alone must leave room: a case that no implementation passes says nothing.
            stored = want.to(torch.float32 if key in r.state and dtype != "f64" else DTYPES[dtype])
            size = scale.get(key) or rms(want) or 1.0
            assert close(stored.double(), want, 0.9 * tolerance, size), f"{name}: {key} out of range"
        self.write(name, op, dtype, config, tensors, expected, scale, tolerance, SOURCE)

    @staticmethod
    def cross_check(name, op, wide, config, leaves, expected, scale):
        main = wide["v" if op == "weight_norm" else "x"]
        extended = forward_in_extended_precision(op, wide, config) if main.numel() else None
        if extended is not None:
            y = torch.from_numpy(extended.astype(np.float64))
            assert close(expected["y"], y, 1e-12, rms(y)), f"{name}: y differs in extended precision"
        # torch refuses an empty batch of some layers, divides 0 by 0 in the zero row of weight norm,
        # and for the mean of a constant row of 1e14 it returns a neighbor of that number.
        zero_norm = op == "weight_norm" and "zero" in name
        if main.numel() == 0 or "constant" in name or zero_norm:
            return
        y, state = torch_layer(op, wide, config)
        outputs = {"y": y, "sum": state.get("sum")}
        other = {"y": y.detach()} | gradients(outputs, leaves, wide) | state
        assert other.keys() == expected.keys(), f"{name}: {sorted(other)} against {sorted(expected)}"
        for key, want in expected.items():
            size = max(scale.get(key, 0.0), rms(want)) or 1.0
            got = other[key].detach().to(torch.float64)
            # torch subtracts nothing first: a mean of 3000 sigma costs it thousands of roundings of 1e-16.
            assert close(got, want, 5e-11, size), (
                f"{name}: {key} differs from torch's layer by {(got - want).abs().max() / size:.1e}"
            )


# ---------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------


class Draw:
    """Random tensors of one case, rounded to its dtype. The seed is the case's name."""

    def __init__(self, name: str, dtype: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.dtype = DTYPES[dtype]

    def normal(self, *shape, mean=0.0, sigma=1.0) -> torch.Tensor:
        values = torch.from_numpy(np.asarray(mean + sigma * self.rng.standard_normal(shape)))
        limit = torch.finfo(self.dtype).max
        return values.clamp(-limit, limit).to(self.dtype)

    def uniform(self, *shape, low, high) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.rng.uniform(low, high, shape))).to(self.dtype)

    def parameters(self, kind: str, *shape, center=1.0) -> dict[str, torch.Tensor]:
        """No parameters, `w` or `b` only, or `wb` both."""
        p = {}
        if "w" in kind:
            p["weight"] = self.normal(*shape, mean=center, sigma=0.5)
        if "b" in kind:
            p["bias"] = self.normal(*shape, sigma=0.7)
        return p

    def state(self, channels: int, count: int, mean=0.3, sigma=0.5) -> dict[str, torch.Tensor]:
        """Running statistics, which are f32 whatever the case's dtype."""
        f32 = torch.float32
        return {
            "running_mean": torch.from_numpy(self.rng.normal(mean, sigma, channels)).to(f32),
            "running_var": torch.from_numpy(self.rng.uniform(0.3, 2.0, channels)).to(f32),
            "num_batches_tracked": torch.tensor(count),
        }


# What x is drawn from, and the sigma of dy. dy is sized so that dx, about dy / sigma, stays a normal
# number of the case's dtype: a subnormal f16 has fewer bits than any tolerance here asks for.
#            mean, sigma, sigma of dy, dtypes
STYLES = {
    "plain": (0.3, 1.5, 1.0, ALL),
    "mean30": (30.0, 1.0, 1.0, ALL),
    "mean300": (-300.0, 1.0, 1.0, ("f64", "f32")),
    "mean3000": (3000.0, 1.0, 1.0, ("f64", "f32")),
    "huge": (0.0, 1e14, 1.0, ("f64", "f32", "bf16")),
    "tiny": (0.0, 1e-4, 1.0, ALL),
    # The squares exceed 65504 by far, and here and there the values are clipped to it.
    "overflow": (1e4, 2.5e4, 2e3, HALF),
}


def styled(draw: Draw, style: str, *shape) -> dict[str, torch.Tensor]:
    mean, sigma, dy, _ = STYLES[style]
    return {"x": draw.normal(*shape, mean=mean, sigma=sigma), "dy": draw.normal(*shape, sigma=dy)}


def styles(dtype: str) -> list[str]:
    return [s for s, spec in STYLES.items() if dtype in spec[3] and s != "plain"]


# ---------------------------------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------------------------------


def layer_norm_cases(w: Writer) -> None:
    op = "layer_norm"

    def case(slug, dtype, shape, normalized, kind="wb", style="plain", eps=1e-5, change=None):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        if change:
            change(t["x"])
        if normalized == "channels_first":
            c = {"channels_first": True, "eps": eps}
            t |= draw.parameters(kind, shape[1])
        else:
            c = {"normalized_shape": normalized, "eps": eps}
            t |= draw.parameters(kind, *normalized)
        w.case(slug, op, dtype, c, t)

    for dtype in ALL:
        for width in range(1, 6):
            case(f"width{width}", dtype, (7, width), [width])
        case("rank1_13", dtype, (13,), [13])
        case("3x5x17_weight", dtype, (3, 5, 17), [17], "w")
        case("2x9x31_plain", dtype, (2, 9, 31), [31], "")
        case("3x5x17_bias", dtype, (3, 5, 17), [17], "b")
        case("shape2d", dtype, (2, 3, 4, 5), [4, 5])
        case("shape3d_weight", dtype, (2, 3, 2, 5), [3, 2, 5], "w")
        case("channels_first_rank2", dtype, (6, 5), "channels_first")
        case("channels_first_rank3_weight", dtype, (2, 5, 7), "channels_first", "w")
        case("channels_first_rank3_bias", dtype, (2, 5, 7), "channels_first", "b")
        case("channels_first_rank4", dtype, (2, 6, 3, 5), "channels_first")
        case("channels_first_rank5_plain", dtype, (1, 3, 2, 3, 2), "channels_first", "")
        for style in styles(dtype):
            case(f"{style}_37", dtype, (5, 37), [37], style=style)
        case("empty_batch", dtype, (0, 8), [8])

        def constant_rows(x):
            x[1] = 0.7
            x[3] = 1e14 if dtype != "f16" else 6e4
            x[4] = 0.0

        case("constant_rows", dtype, (5, 33), [33], change=constant_rows)
        case("constant_rows_plain", dtype, (5, 7), [7], "", change=constant_rows)
    case("rank3_empty_axis", "f32", (3, 0, 8), [8])
    case("channels_first_empty_batch", "f32", (0, 4, 3), "channels_first")
    case("channels_first_mean3000", "f32", (2, 9, 4, 3), "channels_first", style="mean3000")
    case("mean3000_width2", "f32", (9, 2), [2], style="mean3000")
    case("mean3000_1031", "f32", (1, 1031), [1031], style="mean3000")
    case("eps_large", "f32", (4, 11), [11], eps=0.1)
    case("eps_small", "f64", (4, 11), [11], eps=1e-12)
    case("768", "f32", (2, 768), [768])
    case("768", "bf16", (1, 768), [768])
    case("768", "f16", (1, 768), [768])
    case("1031", "f32", (1, 1031), [1031])
    case("4096_plain", "f32", (1, 4096), [4096], "")

    def scales_apart(x):
        x *= torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e6])[:, None]

    case("rows_of_all_sizes", "f32", (5, 19), [19], change=scales_apart)

    def not_a_number(x):
        x[1, 3] = float("nan")

    def infinite(x):
        x[2, 0] = float("inf")

    # A row that holds a NaN or an infinity is NaN throughout, and the other rows do not notice.
    case("nan_row_plain", "f32", (4, 9), [9], "", change=not_a_number)
    case("nan_row", "f16", (4, 9), [9], change=not_a_number)
    case("infinite_row_plain", "f32", (4, 9), [9], "", change=infinite)


def rms_norm_cases(w: Writer) -> None:
    op = "rms_norm"

    def case(slug, dtype, shape, normalized, kind="w", style="plain", eps=1e-6, change=None, **more):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        if change:
            change(t["x"])
        t |= draw.parameters(kind, *normalized, center=0.0 if "offset" in more else 1.0)
        before = more.get("cast") == "before_weight"
        tolerance = TOLERANCE_BEFORE_WEIGHT[dtype] if before else None
        w.case(slug, op, dtype, {"normalized_shape": normalized, "eps": eps} | more, t, tolerance)

    for dtype in ALL:
        for width in range(1, 6):
            case(f"width{width}", dtype, (7, width), [width])
        case("rank1_13", dtype, (13,), [13])
        case("3x5x17_plain", dtype, (3, 5, 17), [17], "")
        case("shape2d", dtype, (2, 3, 4, 5), [4, 5])
        case("shape3d", dtype, (2, 3, 2, 5), [3, 2, 5])
        case("bias", dtype, (4, 6), [6], "wb")
        case("bias_alone", dtype, (4, 6), [6], "b")
        case("offset1", dtype, (3, 2, 21), [21], offset=1.0)
        case("after_weight_offset1_tiny", dtype, (4, 9), [9], style="tiny", offset=1, cast="after_weight")
        case("before_weight", dtype, (5, 23), [23], cast="before_weight")
        case("before_weight_width2", dtype, (6, 2), [2], cast="before_weight")
        # The epsilon decides the result only where the squares are as small as it is.
        case("eps_null", dtype, (5, 12), [12], style="tiny", eps=None)
        case("eps_null_offset1", dtype, (5, 12), [12], eps=None, offset=1.0)
        for style in styles(dtype):
            case(f"{style}_37", dtype, (5, 37), [37], style=style)
        case("empty_batch", dtype, (0, 8), [8])

        def zero_row(x):
            x[2] = 0.0

        case("zero_row", dtype, (4, 10), [10], change=zero_row)
    case("rank3_empty_axis", "f32", (3, 0, 8), [8])
    case("768", "f32", (2, 768), [768])
    case("768_offset1", "bf16", (1, 768), [768], offset=1.0)
    case("768_before_weight", "bf16", (1, 768), [768], cast="before_weight")
    case("768_before_weight", "f16", (1, 768), [768], cast="before_weight")
    case("1031", "f32", (1, 1031), [1031])
    case("4096_plain", "f16", (1, 4096), [4096], "")

    def not_a_number(x):
        x[1, 3] = float("nan")

    case("nan_row_plain", "f32", (4, 9), [9], "", change=not_a_number)


def scale_norm_cases(w: Writer) -> None:
    op = "scale_norm"

    def case(slug, dtype, shape, normalized, style="plain", eps=1e-5, change=None):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        if change:
            change(t["x"])
        first = normalized == "channels_first"
        c = {"channels_first": True} if first else {"normalized_shape": normalized}
        w.case(slug, op, dtype, c | {"eps": eps}, t | draw.parameters("w", 1, center=3.0))

    def short_rows(x):
        x[1] = 0.0
        x[2] *= 1e-3

    for dtype in ALL:
        case("3x5x17", dtype, (3, 5, 17), [17])
        case("short_rows", dtype, (4, 10), [10], eps=0.0625, change=short_rows)
        case("channels_first", dtype, (2, 6, 3), "channels_first")
    case("shape2d", "f32", (2, 3, 4, 5), [4, 5])
    case("width1", "f32", (7, 1), [1])
    case("huge_37", "f32", (5, 37), [37], style="huge")
    case("tiny_37", "f32", (5, 37), [37], style="tiny")


def add_norm_cases(w: Writer) -> None:
    def case(op, slug, dtype, shape, kind, style="plain", change=None, **config):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        t["residual"] = styled(draw, style, *shape)["x"]
        t["dsum"] = draw.normal(*shape)
        if change:
            change(t["x"], t["residual"])
        axis = 1 if config.get("channels_first") else len(shape) - 1
        if "channels_first" not in config:
            config["normalized_shape"] = [shape[-1]]
        t |= draw.parameters(kind, shape[axis], center=0.0 if "offset" in config else 1.0)
        before = config.get("cast") == "before_weight"
        w.case(slug, op, dtype, config, t, TOLERANCE_BEFORE_WEIGHT[dtype] if before else None)

    def opposite_row(x, residual):
        residual[1] = -x[1]

    for dtype in ALL:
        layer, rms = "add_layer_norm", "add_rms_norm"
        for op, eps in ((layer, 1e-5), (rms, 1e-6)):
            case(op, "width1", dtype, (5, 1), "w", eps=eps)
            case(op, "width2", dtype, (5, 2), "w", eps=eps)
            case(op, "3x19", dtype, (3, 19), "wb", eps=eps)
            case(op, "2x3x16_plain", dtype, (2, 3, 16), "", eps=eps)
            case(op, "tiny", dtype, (2, 21), "w", style="tiny", eps=eps)
            case(op, "empty_batch", dtype, (0, 8), "w", eps=eps)
            # A sum of zeros: the gradient by the norm is as large as eps lets it be.
            case(op, "opposite_row", dtype, (3, 5), "w", change=opposite_row, eps=eps)
        case(layer, "channels_first", dtype, (2, 5, 3), "wb", channels_first=True, eps=1e-5)
        case(layer, "bias", dtype, (3, 19), "b", eps=1e-5)
        case(rms, "offset1", dtype, (3, 9), "w", offset=1.0, eps=1e-6)
        case(rms, "before_weight", dtype, (3, 23), "w", cast="before_weight", eps=1e-6)
        case(rms, "eps_null", dtype, (3, 12), "w", style="tiny", eps=None)
    for style in ("mean300", "mean3000"):
        for op, eps in (("add_layer_norm", 1e-5), ("add_rms_norm", 1e-6)):
            case(op, f"{style}_37", "f64", (2, 37), "w", style=style, eps=eps)


def group_norm_cases(w: Writer) -> None:
    op = "group_norm"

    def case(slug, dtype, shape, groups, kind="wb", style="plain", eps=1e-5, change=None):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        if change:
            change(t["x"])
        t |= draw.parameters(kind, shape[1])
        w.case(slug, op, dtype, {"num_groups": groups, "eps": eps}, t)

    for dtype in ALL:
        case("rank2_g2", dtype, (3, 8), 2)
        case("rank2_g1_weight", dtype, (4, 3), 1, "w")
        case("rank3_g3", dtype, (2, 6, 5), 3)
        case("rank3_g6", dtype, (2, 6, 2), 6)
        case("rank3_pixel1", dtype, (3, 6, 1), 3)
        case("rank4_g2_plain", dtype, (2, 6, 3, 5), 2, "")
        case("rank4_g5_weight", dtype, (1, 5, 3, 3), 5, "w")
        case("rank3_g2_bias", dtype, (2, 6, 5), 2, "b")
        case("rank5_g2", dtype, (2, 4, 2, 3, 2), 2)
        for style in styles(dtype):
            case(f"{style}_g2", dtype, (2, 4, 19), 2, style=style)
        case("empty_batch", dtype, (0, 6, 5), 3)

        def constant_group(x):
            x[0, 2:4] = 1e14 if dtype != "f16" else 6e4
            x[1, :2] = 0.1

        case("constant_group", dtype, (2, 6, 3, 3), 3, change=constant_group)
    case("mean3000_pixels", "f32", (1, 2, 23, 21), 1, style="mean3000")
    case("2x33x31", "f32", (1, 2, 33, 31), 1)
    case("1031", "bf16", (1, 2, 1031), 1)
    case("eps_large", "f32", (2, 4, 7), 4, eps=0.1)

    def not_a_number(x):
        x[1, 0, 2] = float("nan")

    case("nan_group_plain", "f32", (2, 4, 5), 2, "", change=not_a_number)


def instance_norm_cases(w: Writer) -> None:
    op = "instance_norm"

    def case(slug, dtype, shape, train, kind="", style="plain", state=None, momentum=0.1, change=None):
        """`state`: the count that the running statistics start at, or None where there are none."""
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        if change:
            change(t["x"])
        t |= draw.parameters(kind, shape[1])
        c = {"eps": 1e-5, "train": train, "track_running_stats": state is not None}
        if state is not None:
            t |= draw.state(shape[1], state, mean=STYLES[style][0])
            c["momentum"] = momentum
        w.case(slug, op, dtype, c, t)

    for dtype in ALL:
        case("rank3_train", dtype, (2, 3, 7), True)
        case("rank3_eval", dtype, (3, 2, 5), False)
        case("rank3_length2", dtype, (2, 3, 2), True, "wb")
        case("rank4_affine_train", dtype, (2, 3, 3, 5), True, "wb")
        case("rank4_affine_eval", dtype, (2, 3, 4, 3), False, "wb")
        case("rank5_weight", dtype, (2, 2, 2, 3, 2), True, "w")
        case("rank3_bias", dtype, (2, 3, 7), True, "b")
        case("tracking_train_bias", dtype, (3, 4, 5), True, "b", state=7)
        case("tracking_eval_bias", dtype, (3, 4, 5), False, "b", state=5)
        case("tracking_train", dtype, (3, 4, 3, 2), True, "wb", state=0)
        case("tracking_train_plain", dtype, (3, 4, 5), True, state=7, momentum=0.3)
        case("tracking_cumulative", dtype, (2, 3, 5), True, "w", state=3, momentum=None)
        case("tracking_eval", dtype, (3, 4, 3, 2), False, "wb", state=5)
        case("tracking_eval_plain", dtype, (2, 3, 1), False, state=5)
        for style in styles(dtype):
            case(f"{style}_train", dtype, (2, 3, 19), True, "wb", style=style)
        case("empty_batch_tracking", dtype, (0, 3, 5), True, "wb", state=2)

        def constant_plane(x):
            x[0, 1] = 1e14 if dtype != "f16" else 6e4
            x[1, 0] = 0.1

        case("constant_plane", dtype, (2, 3, 4, 3), True, "wb", change=constant_plane)
    case("tracking_first_cumulative", "f32", (2, 3, 5), True, "wb", state=0, momentum=None)
    case("tracking_mean3000", "f32", (3, 2, 11), True, "wb", style="mean3000", state=4)
    case("tracking_one_sample", "f32", (1, 3, 9), True, "wb", state=1)
    case("empty_batch_eval", "f32", (0, 3, 5), False, "wb", state=2)
    case("37x29", "f32", (1, 2, 37, 29), True, "wb")


def switch_norm_cases(w: Writer) -> None:
    op = "switch_norm"

    def case(
        slug, dtype, shape, train, kind="wb", style="plain", state=4, momentum=0.1, unbiased=True, bn=True
    ):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        instance = len(shape) > 2
        t = styled(draw, style, *shape) | draw.parameters(kind, shape[1])
        for name in ("mean_weight", "var_weight"):
            t[name] = draw.normal(1 + instance + bn, mean=1.0)
        c = {"eps": 1e-5, "train": train, "unbiased": unbiased, "using_bn": bn, "instance": instance}
        if bn:
            t |= draw.state(shape[1], state, mean=STYLES[style][0])
            c["momentum"] = momentum
        w.case(slug, op, dtype, c, t)

    for dtype in ALL:
        case("rank4_train", dtype, (3, 4, 3, 5), True)
        case("rank4_eval", dtype, (3, 4, 3, 5), False)
        case("rank4_biased_train", dtype, (2, 3, 4, 2), True, unbiased=False)
        case("rank4_cumulative", dtype, (2, 3, 4, 2), True, momentum=None, state=3)
        case("rank4_without_batch", dtype, (2, 3, 4, 5), True, bn=False)
        case("rank3_train", dtype, (4, 3, 7), True, momentum=0.3)
        case("rank5_eval", dtype, (2, 3, 2, 3, 2), False)
        case("rank2_train", dtype, (6, 5), True)
        case("rank2_eval", dtype, (3, 5), False)
        case("one_position_eval", dtype, (2, 4, 1, 1), False, unbiased=False)
        case("rank4_bias_train", dtype, (3, 4, 3, 2), True, "b")
        case("rank3_weight_eval", dtype, (3, 4, 5), False, "w")
        case("rank2_plain_train", dtype, (6, 5), True, "")
    for style in ("mean30", "mean3000"):
        case(f"{style}_train", "f32", (3, 4, 19), True, style=style)
        case(f"{style}_eval", "f32", (3, 4, 19), False, style=style)
    case("empty_batch", "f32", (0, 3, 5), True)


# Samples of each rank, for cases of batch norm.
COUNTS = {
    "rank2_width3_train": [1, 4, 0, 2],
    "rank2_two_rows": [1, 1],
    "rank3_weight_train": [1, 0, 2],
    "rank3_bias_train": [2, 1],
    "rank4_train": [1, 1],
    "rank4_plain_train": [0, 2],
    "rank5_train": [1, 0, 0, 1],
    "one_sample_train": [0, 1, 0],
    "cumulative_first": [1, 3],
    "cumulative_fifth": [1, 1, 1, 1],
    "untracked_train": [2, 2],
    "mean3000_train": [2, 1],
    "mean300_train": [1, 2],
    "tiny_train": [1, 1, 1],
    "huge_train": [0, 1, 2],
    "empty_batch_train": [0, 0],
    "constant_channel": [1, 2],
    "mean3000_tracked": [8, 0, 25],
    "1031x2": [1000, 31],
    "257x4": [17, 40, 200],
    "2x2x37x9": [1, 1],
    "momentum0": [3, 1],
    "nan_channel": [1, 3],
}


def batch_norm_cases(w: Writer) -> None:
    op = "batch_norm"
    NONE = object()

    def case(
        slug, dtype, shape, train, kind="wb", style="plain", state=4, momentum=0.1, eps=1e-5, change=None
    ):
        """`state`: the count that the running statistics start at, or NONE where there are none.

        A case of COUNTS is written once more, for ranks that have so many samples each: the statistics are
        those of all of them, and so are the results.
        """
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        t = styled(draw, style, *shape)
        if change:
            change(t["x"])
        t |= draw.parameters(kind, shape[1])
        c = {"eps": eps, "train": train, "momentum": momentum}
        if state is NONE:
            c["track_running_stats"] = False
        else:
            t |= draw.state(shape[1], state, mean=STYLES[style][0])
        w.case(slug, op, dtype, c, t)
        if slug in COUNTS:
            w.case(slug, f"sync_{op}", dtype, c | {"counts": COUNTS[slug]}, t)

    for dtype in ALL:
        for width in range(1, 6):
            case(f"rank2_width{width}_train", dtype, (7, width), True)
        case("rank2_two_rows", dtype, (2, 5), True)
        case("rank2_eval", dtype, (5, 9), False)
        case("rank2_one_row_eval", dtype, (1, 6), False)
        case("rank3_weight_train", dtype, (3, 4, 5), True, "w")
        case("rank3_weight_eval", dtype, (2, 4, 3), False, "w")
        case("rank2_bias_train", dtype, (7, 5), True, "b")
        case("rank3_bias_train", dtype, (3, 4, 5), True, "b")
        case("rank3_bias_eval", dtype, (2, 4, 3), False, "b")
        case("rank4_train", dtype, (2, 3, 3, 5), True, momentum=0.3)
        case("rank4_eval", dtype, (2, 3, 3, 5), False)
        case("rank4_plain_train", dtype, (2, 3, 2, 3), True, "")
        case("rank4_plain_eval", dtype, (2, 3, 2, 3), False, "")
        case("rank5_train", dtype, (2, 2, 2, 3, 2), True)
        case("rank5_eval", dtype, (1, 2, 2, 3, 2), False)
        case("one_sample_train", dtype, (1, 3, 2, 2), True)
        case("cumulative_first", dtype, (4, 3, 2), True, state=0, momentum=None)
        case("cumulative_fifth", dtype, (4, 3, 2), True, state=4, momentum=None)
        case("untracked_train", dtype, (4, 3, 2), True, state=NONE)
        case("untracked_eval", dtype, (3, 5), False, state=NONE)
        for style in styles(dtype):
            # No running variance reaches 1e28: that one is tested without.
            case(f"{style}_train", dtype, (3, 4, 7), True, style=style, state=NONE if style == "huge" else 2)
        case("tiny_eval", dtype, (3, 4, 5), False, style="tiny")
        case("empty_batch_train", dtype, (0, 3, 4), True)
        case("empty_batch_eval", dtype, (0, 3), False)

        def constant_channel(x):
            x[:, 1] = 1e14 if dtype != "f16" else 6e4
            x[:, 2] = 0.1

        case("constant_channel", dtype, (3, 4, 2, 3), True, change=constant_channel, state=NONE)
    case("mean3000_tracked", "f32", (33, 5), True, style="mean3000")
    case("mean3000_eval", "f32", (5, 3, 4), False, style="mean3000")
    case("momentum0", "f32", (4, 3), True, momentum=0.0)
    case("momentum1", "f32", (4, 3), True, momentum=1.0)
    case("eps_large", "f32", (4, 3, 2), True, eps=0.1)
    case("1031x2", "f32", (1031, 2), True)
    case("257x4", "bf16", (257, 4), True)
    case("2x2x37x9", "f32", (2, 2, 37, 9), True)

    def not_a_number(x):
        x[1, 2] = float("nan")

    # One channel is lost, with its statistics; the others are not.
    case("nan_channel", "f32", (4, 5), True, change=not_a_number)


def weight_norm_cases(w: Writer) -> None:
    op = "weight_norm"

    def case(slug, dtype, shape, dim, sigma=1.0, g_sigma=1.0, dy_sigma=1.0, zero=None):
        draw = Draw(f"{op}-{slug}-{dtype}", dtype)
        v = draw.normal(*shape, sigma=sigma)
        if zero is not None:
            v[zero] = 0.0
        # The norm of the whole tensor is a scalar, as torch's parametrization stores it.
        g_shape = [] if dim is None else [n if a == dim else 1 for a, n in enumerate(shape)]
        g = draw.normal(*g_shape, mean=1.5 * g_sigma, sigma=0.5 * g_sigma)
        w.case(slug, op, dtype, {"dim": dim}, {"v": v, "g": g, "dy": draw.normal(*shape, sigma=dy_sigma)})

    for dtype in ALL:
        for columns in range(1, 6):
            case(f"linear_3x{columns}", dtype, (3, columns), 0)
        case("linear_last", dtype, (5, 7), 1)
        case("linear_whole", dtype, (5, 7), None)
        case("linear_zero_row", dtype, (4, 6), 0, zero=2)
        case("conv1d", dtype, (4, 3, 5), 0)
        case("conv1d_dim1", dtype, (4, 3, 5), 1)
        case("conv1d_last", dtype, (4, 3, 5), 2)
        case("conv1d_whole", dtype, (3, 2, 3), None)
        case("conv2d", dtype, (3, 2, 3, 3), 0)
        case("conv2d_dim1_zero_row", dtype, (3, 2, 2, 2), 1, zero=(slice(None), 1))
        case("conv2d_last", dtype, (2, 3, 3, 3), 3)
        case("conv2d_whole", dtype, (2, 2, 3, 3), None)
        case("conv2d_one_by_one", dtype, (4, 1, 1, 1), 0)
        case("linear_tiny", dtype, (4, 9), 0, sigma=1e-4)
        if dtype != "f16":
            case("linear_huge", dtype, (4, 9), 0, sigma=1e14)
    # Larger g and dy for the reason given at STYLES.
    case("linear_overflow", "f16", (4, 33), 0, sigma=2e4, g_sigma=300.0, dy_sigma=30.0)
    case("linear_overflow_whole", "f16", (5, 31), None, sigma=2e4, g_sigma=300.0, dy_sigma=300.0)
    case("linear_zero_all", "f32", (2, 3), None, zero=slice(None))
    case("rank1", "f32", (7,), None)
    case("rank1_dim0", "f32", (7,), 0)
    case("rank5", "f32", (3, 2, 2, 2, 2), 0)
    case("conv2d_ragged_kernel", "f32", (3, 2, 3, 1), 0)
    case("linear_3x768", "f32", (1, 768), 0)
    case("linear_1031x2_last", "f32", (1031, 2), 1)


def onnx_cases(w: Writer) -> None:
    """The node tests of the onnx package, which generates them when these modules are imported.

    Their outputs are f32 results of onnx's reference implementations. Each is first compared with the
    formulas above in float64; all agree within a quarter of the f32 tolerance, so that the outputs
    are taken as they are, with the usual tolerance. Their gradients do not exist. In training mode
    onnx's running variance is the biased one, which is another definition, and is left out.
    """
    from onnx.backend.test.case import node

    folder = node.__name__
    for module in (
        "layernormalization",
        "rmsnormalization",
        "groupnormalization",
        "instance_normalization",
        "batch_normalization",
    ):
        importlib.import_module(f"{folder}.{module}")
    version = importlib.import_module("onnx").__version__

    for test in node._NodeTestCases:
        # The expanded tests hold the same values for the operator taken apart.
        if "_expanded" in test.name:
            continue
        proto = test.model.graph.node[0]
        attribute = {a.name: a.f if a.name in ("epsilon", "momentum") else a.i for a in proto.attribute}
        inputs, outputs = ([torch.from_numpy(np.array(a)) for a in arrays] for arrays in test.data_sets[0])
        t = dict(zip(("x", "weight", "bias", "running_mean", "running_var"), inputs))
        eps = attribute.get("epsilon", 1e-5)
        train = bool(attribute.get("training_mode", 0))
        if proto.op_type in ("LayerNormalization", "RMSNormalization"):
            op = "layer_norm" if proto.op_type == "LayerNormalization" else "rms_norm"
            axis = attribute.get("axis", -1)
            c = {"normalized_shape": list(t["x"].shape[axis % t["x"].dim() :]), "eps": eps}
        elif proto.op_type == "GroupNormalization":
            op, c = "group_norm", {"num_groups": attribute["num_groups"], "eps": eps}
        elif proto.op_type == "InstanceNormalization":
            op, c = "instance_norm", {"eps": eps, "train": True, "track_running_stats": False}
        elif proto.op_type == "BatchNormalization":
            # onnx's momentum is the share of the old value.
            op, c = "batch_norm", {"eps": eps, "train": train, "momentum": 0.1}
            t["num_batches_tracked"] = torch.tensor(0)
        else:
            raise AssertionError(f"{test.name}: unexpected operator {proto.op_type}")
        r = ORACLES[op]({k: v.double() for k, v in t.items()}, c | {"_dtype": "f32"})
        expected = {"y": outputs[0]} | ({"running_mean": outputs[1]} if train else {})
        mathematics = {"y": r.y} | r.state
        for key, value in expected.items():
            want = mathematics[key]
            assert close(value.double(), want, TOLERANCE["f32"] / 4, rms(want)), f"{test.name}: {key}"
        slug = test.name.removeprefix("test_")
        w.write(
            f"onnx-{slug}", op, "f32", c, t, expected, {}, TOLERANCE["f32"], f"onnx {version} {test.name}"
        )


def main() -> None:
    here = Path(__file__).resolve().parent
    default = here.parent / "tests" / "fixtures" / "conformance"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    # The order of a float64 sum, and so its last bit, may depend on the number of threads.
    torch.set_num_threads(1)
    w = Writer(folder)
    layer_norm_cases(w)
    rms_norm_cases(w)
    scale_norm_cases(w)
    add_norm_cases(w)
    group_norm_cases(w)
    instance_norm_cases(w)
    batch_norm_cases(w)
    switch_norm_cases(w)
    weight_norm_cases(w)
    onnx_cases(w)
    print(f"{w.count} cases, {w.size / 1e6:.2f} MB in {folder}")


if __name__ == "__main__":
    main()
