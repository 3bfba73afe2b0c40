"""Batch, group, instance and weight norm, and transposition, on a device: against torch in float64, and timings beside
torch eager and a copy.

    python3 channels.py MODULES [OUT] [--correct-only]

MODULES has a module for each source and pair of types (channels_f16_f32.cubin or .ptx). Results go to OUT/channels.json;
the table is printed last. SECONDS_OF_TIMING (60) is the time that the whole may take.
"""
import json, math, os, statistics, sys, time
import cupy, numpy as np, torch
import torch.nn.functional as F

i64, i32, f64 = np.int64, np.int32, np.float64
NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}
EPS = 1e-5
cdiv = lambda a, b: -(-a // b)
clamp = lambda v, lo, hi: max(lo, min(v, hi))


class Modules:
    def __init__(self, folder):
        self.folder, self.loaded, self.kernels = folder, {}, {}

    def find(self, name):
        first = name.split("_")[0]
        stem = first if first in ("groups", "weight", "transpose") else "channels"
        types = [t for t in name.split("_") if t in NAMES.values()]
        pair = "_".join(types if len(types) == 2 else 2 * types)
        for file in (f"{stem}_{pair}", stem):
            for kind in ("cubin", "ptx"):
                path = os.path.join(self.folder, f"{file}.{kind}")
                if os.path.exists(path):
                    return path
        raise FileNotFoundError(f"{self.folder} has no module with {name}")

    def get(self, name):
        if name not in self.kernels:
            path = self.find(name)
            if path not in self.loaded:
                self.loaded[path] = cupy.RawModule(path=path)
            self.kernels[name] = self.loaded[path].get_function(name)
        return self.kernels[name]


def pointer(t):
    return np.uint64(0 if t is None else t.data_ptr())


class Plan:
    """Launches with their arguments, made once and run often. Keeps its tensors."""

    def __init__(self, modules):
        self.modules, self.launches, self.kept = modules, [], []

    def add(self, name, grid, block, *args, shared=0):
        self.kept.append(args)
        plain = tuple(pointer(a) if a is None or torch.is_tensor(a) else a for a in args)
        self.launches.append((self.modules.get(name), grid, block, plain, shared))

    def __call__(self):
        for kernel, grid, block, args, shared in self.launches:
            kernel(grid, block, args, shared_mem=shared)


class Planes:
    """The geometry of src/geometry/channels.rs."""

    def __init__(self, outer, channels, inner, size):
        self.outer, self.channels, self.inner, self.size = outer, channels, inner, size
        v = 16 // size
        self.slots = outer * (inner // v if inner % v == 0 else (inner + 2 * v - 2) // v)
        self.parts = clamp(min(cdiv(self.slots, 2048), cdiv(4096, channels)), 1, 1024)
        self.starves = channels < 64 and self.slots > 1024
        self.by_part = ((channels * self.parts, 1, 1), (256, 1, 1))
        self.by_warp = ((cdiv(channels, 8), 1, 1), (32, 8, 1))

    @staticmethod
    def team(slots, per, items):
        threads = max(32, cdiv(cdiv(slots, per), 32) * 32)
        teams = 8 if threads == 32 else 1
        return (cdiv(items, teams), 1, 1), (threads, teams, 1)

    def fit(self):
        if self.slots > 768 * 4 or self.starves:
            return None
        grid, block = self.team(self.slots, 4, self.channels)
        return (768 if block[0] > 256 else 256), grid, block

    def grad_fit(self):
        if self.starves:
            return None
        for most, per in ((256, 4), (1024, 2)):
            if self.slots <= most * per:
                return most, *self.team(self.slots, per, self.channels)

    def grad_sums(self):
        return self.team(min(cdiv(self.slots, self.parts), 1024), 4, self.channels * self.parts)


class Columns:
    def __init__(self, rows, channels, inner, size):
        v, period = 16 // size, channels * inner
        self.elements = rows * period
        together = v // math.gcd(v, period)
        while together * period < 32 * v and together * period < self.elements:
            together *= 2
        self.width, self.period, self.inner, self.channels = together * period, period, inner, channels
        self.rows = cdiv(self.elements, self.width)
        slots = self.width // v
        blocks = cdiv(slots, 32)
        self.across = cdiv(slots, blocks)
        lines = 256 // self.across
        self.parts = min(cdiv(1024, blocks), cdiv(self.rows, 16 * lines), 1024)
        self.matrix = (i64(self.elements), i64(self.width), i64(self.rows), i64(period), i64(inner))
        self.by_part = ((cdiv(slots, self.across), self.parts, 1), (256, 1, 1))
        together = 1 if channels < 512 else 4 if channels < 2048 else 8
        self.by_channel = ((cdiv(channels, together), 1, 1), (512 // together, together, 1))


class Done:
    """Outputs, poisoned."""

    def __init__(self, x, weight, units, channels):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        new = lambda n, t: torch.full((n,), float("nan"), dtype=t, device="cuda")
        self.mean, self.rest, self.inv_std, self.var = (new(units, acc) for _ in range(4))
        self.y = torch.full_like(x, float("nan"))
        self.dx = torch.full_like(x, float("nan"))
        self.dweight, self.dbias = new(channels, weight.dtype), new(channels, weight.dtype)
        self.back_mean, self.back_along = new(units, acc), new(units, acc)
        self.acc = acc

    def scratch(self, n):
        return torch.full((max(1, n),), float("nan"), dtype=self.acc, device="cuda")


def names(x, weight, d):
    return NAMES[x.dtype], NAMES[x.dtype] + "_" + NAMES[weight.dtype], NAMES[d.acc]


def planes_forward(m, p, x, weight, bias, span, period, d, force_split=False):
    xn, pair, acc = names(x, weight, d)
    plan = Plan(m)
    dims = (i64(p.outer), i64(p.channels), i64(p.inner))
    fit = None if force_split else p.fit()
    stats = (d.mean, d.rest, d.inv_std, d.var)
    if fit:
        most, grid, block = fit
        plan.add(f"planes_fit_{pair}_{most}", grid, block, x, weight, bias, d.y, *stats, *dims, i64(span), i64(period),
                 f64(EPS), i32(1))
        return plan
    partial = d.scratch(4 * p.channels * p.parts)
    plan.add(f"planes_moments_{xn}", *p.by_part, x, partial, *dims, i32(p.parts), i32(1))
    plan.add(f"planes_merge_{acc}", *p.by_warp, partial, *stats, i64(p.channels), i32(p.parts), f64(EPS))
    plan.add(f"planes_normalize_{pair}", *p.by_part, x, weight, bias, d.mean, d.rest, d.inv_std, d.y, *dims, i64(span),
             i64(period), i32(p.parts), i32(0), f64(EPS))
    return plan


def grad_input(plan, pair, p, x, dy, weight, span, period, d):
    plan.add(f"planes_grad_input_{pair}", *p.by_part, x, dy, weight, d.mean, d.rest, d.inv_std, d.back_mean, d.back_along,
             d.dx, i64(p.outer), i64(p.channels), i64(p.inner), i64(span), i64(period), i32(p.parts), i32(0), f64(EPS))


def batch_backward(m, p, x, dy, weight, d):
    xn, pair, acc = names(x, weight, d)
    plan = Plan(m)
    dims = (i64(p.outer), i64(p.channels), i64(p.inner))
    fit = p.grad_fit()
    if fit:
        most, grid, block = fit
        plan.add(f"planes_grad_fit_{pair}_{most}", grid, block, x, dy, weight, d.mean, d.rest, d.inv_std, d.dx, d.dweight,
                 d.dbias, None, *dims, i64(p.channels), i32(1))
        return plan
    partial = d.scratch(2 * p.channels * p.parts)
    plan.add(f"planes_grad_sums_{xn}", *p.grad_sums(), x, dy, d.mean, partial, *dims, i64(1), i32(p.parts))
    plan.add(f"planes_grad_merge_{pair}", *p.by_warp, partial, weight, d.mean, d.rest, d.inv_std, d.dweight, d.dbias,
             d.back_mean, d.back_along, i64(p.channels), i32(p.parts), f64(p.outer * p.inner), i32(0), f64(EPS), i32(1))
    grad_input(plan, pair, p, x, dy, weight, p.inner, p.channels, d)
    return plan


def columns_forward(m, c, x, weight, bias, d):
    xn, pair, acc = names(x, weight, d)
    plan = Plan(m)
    partial = d.scratch(3 * c.width * c.parts)
    stats = (d.mean, d.rest, d.inv_std)
    plan.add(f"columns_moments_{xn}", *c.by_part, x, partial, *c.matrix, i32(c.across), i32(1))
    plan.add(f"columns_merge_{acc}", *c.by_channel, partial, *stats, d.var, *c.matrix, i32(c.parts), f64(EPS))
    plan.add(f"columns_normalize_{pair}", *c.by_part, x, weight, bias, *stats, d.y, *c.matrix, i32(c.across), i32(0),
             f64(EPS))
    return plan


def columns_backward(m, c, x, dy, weight, d):
    xn, pair, acc = names(x, weight, d)
    plan = Plan(m)
    partial = d.scratch(2 * c.width * c.parts)
    stats = (d.mean, d.rest, d.inv_std)
    back = (d.back_mean, d.back_along)
    plan.add(f"columns_grad_sums_{xn}", *c.by_part, x, dy, d.mean, partial, *c.matrix, i32(c.across))
    plan.add(f"columns_grad_merge_{pair}", *c.by_channel, partial, weight, *stats, d.dweight, d.dbias, *back, *c.matrix,
             i32(c.parts), f64(c.elements // c.channels), i32(0), f64(EPS), i32(1))
    plan.add(f"columns_grad_input_{pair}", *c.by_part, x, dy, weight, *stats, *back, d.dx, *c.matrix, i32(c.across),
             i32(0), f64(EPS))
    return plan


def groups_backward(m, n, ch, s, groups, size, x, dy, weight, d):
    xn, pair, acc = names(x, weight, d)
    plan = Plan(m)
    per = ch // groups
    p, c = Planes(1, n * groups, per * s, size), Planes(1, n * ch, s, size)
    runs = max(1, min(cdiv(Planes(1, 1, s, size).slots, 128), cdiv(16, per)))
    shared = 2 * per * runs * (8 if size == 8 else 4)
    stats = (d.mean, d.rest, d.inv_std)
    fit = p.slots <= 8192 and shared <= 32 << 10 and not (p.channels < 64 and p.slots > 1024)
    parts = 1 if fit else c.parts
    partial = d.scratch(2 * n * ch * parts)
    if fit:
        threads = clamp(cdiv(cdiv(p.slots, 4), 32) * 32, 64, 512)
        plan.add(f"groups_grad_fit_{pair}", (n * groups, 1, 1), (threads, 1, 1), x, dy, weight, *stats, d.dx, partial,
                 i64(per), i64(s), i64(groups), i32(runs), shared=shared)
    else:
        plan.add(f"planes_grad_sums_{xn}", *c.grad_sums(), x, dy, d.mean, partial, i64(1), i64(n * ch), i64(s), i64(per),
                 i32(parts))
    back = (None, None) if fit else (d.back_mean, d.back_along)
    blocks = cdiv(ch, 8) + (0 if fit else cdiv(n * groups, 8))
    plan.add(f"groups_grad_merge_{pair}", (blocks, 1, 1), (32, 8, 1), partial, weight, *stats, d.dweight, d.dbias, *back,
             i64(n), i64(ch), i64(groups), i32(parts), f64(p.inner))
    if not fit:
        grad_input(plan, pair, p, x, dy, weight, s, groups, d)
    return plan


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


class Case:
    """One layer, shape, dtype and layout: our two plans and torch's two calls."""

    def __init__(self, m, kind, shape, dtype, param=torch.float32, groups=0, channels_last=False, mean=0.5):
        g = torch.Generator(device="cuda").manual_seed(sum(shape))
        new = lambda s, t: torch.randn(s, generator=g, device="cuda", dtype=torch.float32).to(t)
        n, c, s = shape[0], shape[1], math.prod(shape[2:])
        self.x, self.dy = new(shape, torch.float32).add_(mean).to(dtype), new(shape, dtype)
        if channels_last:
            self.x, self.dy = last(self.x), last(self.dy)
        self.weight, self.bias = new((c,), param) + 1, new((c,), param)
        size = self.x.element_size()
        self.kind, self.groups = kind, groups
        self.shape, self.dtype, self.channels_last = shape, dtype, channels_last
        x, dy, w, b = self.x, self.dy, self.weight, self.bias
        if kind == "batch":
            d = self.d = Done(x, w, c, c)
            v = 16 // size
            if channels_last or s < (2 * v if s % v == 0 else 64 * v):
                rows, inner = (n * s, 1) if channels_last else (n, s)
                k = Columns(rows, c, inner, size)
                self.forward, self.backward = columns_forward(m, k, x, w, b, d), columns_backward(m, k, x, dy, w, d)
            else:
                p = Planes(n, c, s, size)
                self.forward = planes_forward(m, p, x, w, b, s, c, d)
                self.backward = batch_backward(m, p, x, dy, w, d)
        else:
            d = self.d = Done(x, w, n * groups, c)
            p = Planes(1, n * groups, c // groups * s, size)
            self.forward = planes_forward(m, p, x, w, b, s, groups, d)
            self.backward = groups_backward(m, n, c, s, groups, size, x, dy, w, d)
        self.name = f"{kind}{groups or ''} {'x'.join(map(str, shape))} {NAMES[dtype]}{' last' if channels_last else ''}"

    def torch_forward(self, x, w, b):
        if self.kind == "batch":
            return F.batch_norm(x, None, None, w, b, True, 0.1, EPS)
        return F.group_norm(x, self.groups, w.to(x.dtype), b.to(x.dtype), EPS)

    def check(self):
        self.forward(), self.backward()
        x, w, b = (t.double().detach().requires_grad_() for t in (self.x, self.weight, self.bias))
        y = self.torch_forward(x, w, b)
        grads = torch.autograd.grad(y, (x, w, b), self.dy.double())
        d, worst = self.d, {}
        for name, got, want in (("y", d.y, y), ("dx", d.dx, grads[0]), ("dweight", d.dweight, grads[1]), ("dbias", d.dbias, grads[2])):
            unit = {torch.float32: 6e-8, torch.float16: 4.9e-4, torch.bfloat16: 3.95e-3, torch.float64: 1.2e-16}[got.dtype]
            scale = want.abs().max()
            off = (got.double() - want).abs() - unit * 1.01 * want.abs()
            worst[name] = float((off / scale).max()) if not torch.isnan(got).any() else float("nan")
        limit = 1e-13 if self.dtype == torch.float64 else 2e-6
        ok = all(v <= limit for v in worst.values())
        if self.dtype == torch.float16:  # subnormal results
            ok = all(v <= limit + 3e-8 for v in worst.values())
        return ok, worst


CORRECT = [
    (kind, shape, dtype, groups, channels_last)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for kind, shape, groups, channels_last in [
        ("batch", (8, 5, 7, 7), 0, False), ("batch", (4, 3, 30, 31), 0, False), ("batch", (16, 128, 14, 14), 0, False),
        ("batch", (9, 70, 56, 57), 0, False), ("batch", (64, 33), 0, False), ("batch", (5, 6, 2, 1), 0, False),
        ("batch", (8, 24, 30, 31), 0, True), ("batch", (3, 5, 7, 9), 0, True), ("batch", (4, 3, 64, 64), 0, True),
        ("group", (4, 32, 14, 14), 8, False), ("group", (3, 12, 7, 7), 3, False), ("group", (2, 64, 128, 128), 32, False),
        ("group", (4, 6, 33, 33), 6, False), ("group", (2, 8, 90, 90), 1, False), ("group", (7, 12), 3, False),
    ]
]
B, S = torch.bfloat16, torch.float32
TIMED = [
    ("batch", (64, 64, 112, 112), B, 0, False), ("batch", (64, 256, 56, 56), B, 0, False),
    ("batch", (64, 1024, 14, 14), B, 0, False), ("batch", (256, 2048, 7, 7), B, 0, False),
    ("batch", (32, 64, 112, 112), S, 0, False), ("batch", (64, 512, 28, 28), S, 0, False),
    ("batch", (64, 64, 112, 112), B, 0, True), ("batch", (64, 256, 56, 56), B, 0, True),
    ("batch", (64, 1024, 14, 14), B, 0, True), ("batch", (32, 64, 112, 112), S, 0, True),
    ("batch", (65536, 1000), B, 0, False), ("batch", (65536, 1001), B, 0, False),
    ("group", (32, 256, 56, 56), B, 32, False), ("group", (16, 320, 64, 64), B, 32, False),
    ("group", (8, 128, 256, 256), B, 32, False), ("group", (64, 512, 28, 28), S, 32, False),
    ("group", (32, 128, 64, 64), B, 128, False), ("group", (256, 512, 7, 7), B, 32, False),
]


def beyond_32_bits(m):
    """A batch norm of more than 2^31 elements: the ends of each channel against float64."""
    inner = (1 << 30) + 8
    x = torch.randn((1, 2, inner), device="cuda", dtype=torch.float16).add_(3)
    w, b = torch.tensor([1.5, 0.5], device="cuda"), torch.tensor([0.25, -1.0], device="cuda")
    dy = x * x
    d = Done(x, w, 2, 2)
    p = Planes(1, 2, inner, 2)
    plans = [planes_forward(m, p, x, w, b, inner, 2, d), batch_backward(m, p, x, dy, w, d)]
    [plan() for plan in plans]
    ok = True
    for c in range(2):
        chunks = [v.double() for v in x[0, c].split(1 << 26)]
        mean = sum(float(v.sum()) for v in chunks) / inner
        var = sum(float(((v - mean) ** 2).sum()) for v in chunks) / inner
        s = (var + EPS) ** -0.5
        grads = [v.double() for v in dy[0, c].split(1 << 26)]
        mean_g = sum(float(g.sum()) for g in grads) / inner
        along = sum(float((g * (v - mean)).sum()) for g, v in zip(grads, chunks)) / inner * s
        for part in (slice(0, 1000), slice(inner - 1000, inner)):
            v = x[0, c, part].double()
            hat = (v - mean) * s
            y = hat * float(w[c]) + float(b[c])
            dx = (dy[0, c, part].double() - mean_g - hat * along) * s * float(w[c])
            ok &= bool(((d.y[0, c, part].double() - y).abs() <= 5e-4 * y.abs() + 1e-5).all())
            ok &= bool(((d.dx[0, c, part].double() - dx).abs() <= 5e-4 * dx.abs() + 2e-5).all())
    return ok


def timed(calls, repeats=5):
    """Milliseconds of one call, the median of `repeats` runs over all of `calls`, which have inputs of their own."""
    for c in calls:
        c()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    all_ms = []
    rounds = max(1, 12 // len(calls))
    for _ in range(repeats):
        start.record()
        for _ in range(rounds):
            for c in calls:
                c()
        end.record()
        end.synchronize()
        all_ms.append(start.elapsed_time(end) / (rounds * len(calls)))
    return statistics.median(all_ms)


def measure(m, spec):
    kind, shape, dtype, groups, channels_last = spec
    nbytes = math.prod(shape) * dtype.itemsize
    sets = clamp(math.ceil(2e8 / nbytes), 2, 6)
    cases = [Case(m, kind, shape, dtype, groups=groups, channels_last=channels_last) for _ in range(sets)]
    row = {"name": cases[0].name, "bytes": nbytes}
    row["copy"] = timed([lambda c=c: c.d.y.copy_(c.x) for c in cases])
    row["forward"] = timed([c.forward for c in cases])
    row["backward"] = timed([c.backward for c in cases])
    graphs = []
    for c in cases:
        x, w, b = (t.detach().requires_grad_() for t in (c.x, c.weight, c.bias))
        graphs.append((c, x, w, b, c.torch_forward(x, w, b)))

    def eager(c, x, w, b, _):
        with torch.no_grad():
            c.torch_forward(x, w, b)

    row["torch_forward"] = timed([lambda g=g: eager(*g) for g in graphs])
    row["torch_backward"] = timed(
        [lambda g=g: torch.autograd.grad(g[4], g[1:4], g[0].dy, retain_graph=True) for g in graphs])
    return row


def weight_plans(m, rows, n, v, dw, g):
    """Forward and backward of weight norm, and their outputs."""
    v_, acc = NAMES[v.dtype], torch.float64 if v.dtype == torch.float64 else torch.float32
    threads = clamp(cdiv(cdiv(cdiv(n, 16 // v.element_size()) + 1, 4), 32) * 32, 32, 256)
    teams = 8 if threads == 32 else 1
    place = ((cdiv(rows, teams), 1, 1), (threads, teams, 1))
    norm, scale = (torch.full((rows,), float("nan"), dtype=acc, device="cuda") for _ in range(2))
    w, dv, dg = torch.full_like(v, float("nan")), torch.full_like(v, float("nan")), torch.full_like(g, float("nan"))
    pair, forward, backward = f"{v_}_{NAMES[g.dtype]}", Plan(m), Plan(m)
    forward.add(f"weight_norm_{pair}", *place, v, g, w, norm, scale, i64(rows), i64(n))
    backward.add(f"weight_norm_grad_{pair}", *place, v, dw, g, norm, scale, dv, dg, i64(rows), i64(n))
    return forward, backward, w, dv, dg


def weight(m, rows, n, dtype):
    """Timings beside torch, and the largest error of a result's scale in float64."""
    new = lambda s: torch.randn(s, device="cuda").to(dtype)
    sets = []
    for _ in range(2):
        v, dw, g = new((rows, n)), new((rows, n)), new((rows, 1)) + 1
        sets.append((v, dw, g, *weight_plans(m, rows, n, v, dw, g)))
    row = {"name": f"weight {rows}x{n} {NAMES[dtype]}", "bytes": rows * n * dtype.itemsize}
    row["copy"] = timed([lambda s=s: s[5].copy_(s[0]) for s in sets])
    row["forward"], row["backward"] = timed([s[3] for s in sets]), timed([s[4] for s in sets])
    graphs = [(v.detach().requires_grad_(), g.detach().requires_grad_(), dw) for v, dw, g, *_ in sets]
    with torch.no_grad():
        row["torch_forward"] = timed([lambda s=s: torch._weight_norm(s[0], s[1], 0) for s in graphs])
    made = [(torch._weight_norm(v, g, 0), (v, g), dw) for v, g, dw in graphs]
    row["torch_backward"] = timed([lambda s=s: torch.autograd.grad(*s, retain_graph=True) for s in made])
    v, dw, g, _, _, w, dv, dg = sets[0]
    V, G = (t.double().detach().requires_grad_() for t in (v, g))
    want = G * V / V.norm(dim=1, keepdim=True)
    unit = {"f32": 6e-8, "f16": 4.9e-4, "bf16": 3.95e-3, "f64": 1.2e-16}[NAMES[dtype]] * 1.01
    row["worst"] = max(float((((a.double() - b).abs() - unit * b.abs()) / b.abs().max()).max())
                       for a, b in zip((w, dv, dg), (want, *torch.autograd.grad(want, (V, G), dw.double()))))
    return row


def transposition(m, outer, rows, columns, dtype):
    sets = [torch.randn((outer, rows, columns), device="cuda").to(dtype) for _ in range(2)]
    outs = [torch.empty((outer, columns, rows), dtype=dtype, device="cuda") for _ in sets]
    tiles = outer * cdiv(rows, 32) * cdiv(columns, 32)
    plans = []
    for x, y in zip(sets, outs):
        plan = Plan(m)
        plan.add(f"transpose_{8 * x.element_size()}", (tiles, 1, 1), (32, 8, 1), x, y, i64(outer), i64(rows), i64(columns))
        plans.append(plan)
    row = {"name": f"transpose {outer}x{rows}x{columns} {NAMES[dtype]}", "bytes": sets[0].numel() * dtype.itemsize}
    row["copy"] = timed([lambda x=x, y=y: y.view(-1).copy_(x.view(-1)) for x, y in zip(sets, outs)])
    row["forward"] = timed(plans)
    row["torch_forward"] = timed([lambda x=x: x.transpose(1, 2).contiguous() for x in sets])
    row["worst"] = 0. if torch.equal(outs[0], sets[0].transpose(1, 2)) else math.inf
    return row


MORE = [lambda m, r=r, n=n, t=t: weight(m, r, n, t) for r, n, t in [(4096, 4096, S), (4096, 4096, B), (50257, 769, B)]]
MORE += [lambda m, s=s, t=t: transposition(m, *s, t) for s, t in [((32, 3136, 256), B), ((32, 3136, 256), S), ((1, 4097, 4097), B)]]


def main(modules, out=".", correct_only=False, seconds=60.):
    m = Modules(modules)
    began, failed, results = time.time(), [], {"device": torch.cuda.get_device_name(), "correct": [], "timed": []}
    for kind, shape, dtype, groups, channels_last in CORRECT:
        for param in {dtype, torch.float32 if dtype != torch.float64 else dtype}:
            case = Case(m, kind, shape, dtype, param, groups, channels_last)
            ok, worst = case.check()
            results["correct"].append({"name": f"{case.name} {NAMES[param]}", "ok": ok, "worst": worst})
            if not ok:
                failed.append(f"{case.name} {NAMES[param]}: {worst}")
    case = Case(m, "batch", (16, 8, 64, 64), S, S, mean=1000.)
    ok, worst = case.check()
    results["correct"].append({"name": "mean 1000: " + case.name, "ok": ok, "worst": worst})
    if not ok:
        failed.append(f"mean 1000: {case.name}: {worst}")
    results["beyond 2^31"] = beyond_32_bits(m)
    if not results["beyond 2^31"]:
        failed.append("more than 2^31 elements")
    torch.cuda.empty_cache()
    correct = time.time() - began
    for spec in [] if correct_only else TIMED:
        if time.time() - began > seconds:
            results["left_out"] = results.get("left_out", 0) + 1
            continue
        try:
            results["timed"].append(measure(m, spec))
        except Exception as e:  # one shape's failure must not hide the others
            failed.append(f"{spec}: {e}")
        torch.cuda.empty_cache()
    results["more"] = []
    for more in [] if correct_only else MORE:
        try:
            row = more(m)
            results["more"].append(row)
            if not row["worst"] <= 2e-6:
                failed.append(f"{row['name']}: {row['worst']}")
        except Exception as e:
            failed.append(f"weight or transposition: {e}")
    results["failed"] = failed
    with open(os.path.join(out, "channels.json"), "w") as f:
        json.dump(results, f, indent=1)
    print(f"{'layer, shape, dtype':42} {'copy µs':>8} {'GB/s':>6} | {'fwd µs':>7} {'/copy':>6} {'torch':>6} | {'bwd µs':>7} {'/copy':>6} {'torch':>6}")
    for r in results["timed"] + [r for r in results["more"] if "backward" in r]:
        us = {k: 1e3 * v for k, v in r.items() if isinstance(v, float)}
        print(f"{r['name']:42} {us['copy']:8.1f} {2 * r['bytes'] / us['copy'] / 1e3:6.0f} | {us['forward']:7.1f} "
              f"{us['copy'] / us['forward']:6.2f} {us['torch_forward'] / us['forward']:6.2f} | {us['backward']:7.1f} "
              f"{1.5 * us['copy'] / us['backward']:6.2f} {us['torch_backward'] / us['backward']:6.2f}")
    for r in [r for r in results["more"] if "backward" not in r]:
        us = {k: 1e3 * v for k, v in r.items() if isinstance(v, float)}
        print(f"{r['name']:42} {us['copy']:8.1f} {2 * r['bytes'] / us['copy'] / 1e3:6.0f} | {us['forward']:7.1f} "
              f"{us['copy'] / us['forward']:6.2f} {us['torch_forward'] / us['forward']:6.2f} |")
    print("/copy: a copy of as many tensors (2 forward, 3 backward) over ours; torch: eager over ours")
    for f in failed:
        print("FAILED", f)
    print(f"channels: {sum(c['ok'] for c in results['correct'])} right, {len(failed)} failed; {correct:.0f} s + {time.time() - began - correct:.0f} s; {results['device']}")
    return results


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if not a.startswith("--")]
    main(args[0], args[1] if len(args) > 1 else os.environ.get("OUT", "."), "--correct-only" in sys.argv,
         float(os.environ.get("SECONDS_OF_TIMING", "60")))
