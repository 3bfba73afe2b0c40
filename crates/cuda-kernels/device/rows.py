"""LayerNorm and RmsNorm on a device: errors against torch in float64, and timings beside a copy, torch eager and
torch.compile.

    python3 rows.py MODULES [OUT]

MODULES has rows_NORM_TYPES.cubin or .ptx. Results go to OUT/rows.json; the table is printed last. SECONDS_OF_TIMING (60) is the time
that torch may take, and as much again that the kernels may.
"""
import json, math, os, statistics, sys, time
import cupy, numpy as np, torch
import torch.nn.functional as F

TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
UNIT = {"f32": 6e-8, "f16": 4.9e-4, "bf16": 3.95e-3, "f64": 1.2e-16}
SIZE = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8}
NORMS = [("layer_norm", True, False), ("rms_norm", False, False), ("add_layer_norm", True, True), ("add_rms_norm", False, True)]
cdiv = lambda a, b: -(-a // b)
up = lambda a, b: cdiv(a, b) * b
power = lambda n: 1 << max(0, n - 1).bit_length()


class Geometry:
    """The launches of src/geometry/rows.rs: [kernel, grid, block, shared]."""

    def __init__(self, norm, types, rows, cols, aligned=True):
        name, _, add = NORMS[norm]
        size = SIZE[types.split("_")[0]]
        v, plain = 16 // size, size == 8
        even = aligned and cols % v == 0
        vectors = cols // v if cols % v == 0 else (cols + 2 * v - 2) // v

        def launch(what, team, gx, gy, bx, by):
            odd = "" if team == "long" or even else "_odd"
            return [f"{name}_{what}_{types}_{team}{odd}", [gx, gy, 1], [bx, by, 1], 0]

        def small(choices):
            for per, team in choices:
                if vectors <= 32 * per and not (plain and per > 1):
                    lanes = max(4, power(cdiv(vectors, per)))
                    return team, lanes, 256 // lanes

        blocks = lambda room: 132 * room if even else 132 * room // 8 * 8
        self.forward = None
        team = small([(1, "w1"), (2, "w2")])
        if team:
            room = 2 if not even else {"w1": 4, "w2": 2 if add else 3}[team[0]]
            self.forward = launch("forward", team[0], min(cdiv(rows, team[2]), 132 * room), 1, team[1], team[2])
        elif not plain:
            b2, b4 = ((512, 1024), (1024, 1024)) if even and not add else ((512, 512), (512, 512))
            for per, name_, (most, room) in ((2, "b2", b2), (4, "b4", b4)):
                if vectors <= per * most:
                    threads = up(cdiv(vectors, per), 32)
                    self.forward = launch("forward", name_, min(rows, blocks(room // threads)), 1, threads, 1)
                    break
        if not self.forward:
            if not plain and vectors <= 8 * 1024 and even and not add:
                self.forward = launch("forward", "b8", rows, 1, up(cdiv(vectors, 8), 32), 1)
            else:
                self.forward = launch("forward", "long", rows, 1, 512, 1)
        self.columns = None
        block = None if plain else next((b for b in [(2, "b2"), (4, "b4")] if vectors <= b[0] * 512), None)
        if team:
            room = 3 if team[0] == "w1" and even and not add else 2
            self.parts = min(cdiv(rows, team[2]), 132 * room)
            self.dx = launch("backward", team[0], self.parts, 1, team[1], team[2])
        elif block:
            threads = up(cdiv(vectors, block[0]), 32)
            self.parts = min(rows, blocks(512 // threads))
            self.dx = launch("backward", block[1], self.parts, 1, threads, 1)
        else:
            tiles = cdiv(vectors, 256)
            self.dx = launch("backward", "long", rows, 1, 512, 1)
            self.parts = min(rows, up(cdiv(4 * 132, tiles), 8))
            self.columns = [f"{name}_columns_{types}", [tiles, self.parts, 1], [256, 1, 1], 0]
        self.finish = [f"rows_finish_{types}", [cdiv(2 * cols, 32), 1, 1], [32, 16, 1], 0]


class Kernels:
    def __init__(self, folder):
        self.folder, self.modules, self.found = folder, {}, {}

    def get(self, types, name):
        if name not in self.found:
            part = name.split("_forward_")[0].split("_backward_")[0].split("_columns_")[0]
            part = "finish" if part.startswith("rows_finish") else "sum" if part.startswith("sum_") else part
            module = f"rows_{part}_{types}"
            if module not in self.modules:
                path = os.path.join(self.folder, f"{module}.cubin")
                self.modules[module] = cupy.RawModule(path=path if os.path.exists(path) else path[:-5] + "ptx")
            self.found[name] = self.modules[module].get_function(name)
        return self.found[name]


def pointer(t):
    return np.uint64(0 if t is None else t.data_ptr())


def empty(n, dtype, device="cuda"):
    return torch.full((n,), float("nan"), dtype=dtype, device=device)


MODULES = ["f32_f32", "f16_f16", "bf16_bf16", "f16_f32", "bf16_f32", "f64_f64"]


class Case:
    """Inputs, poisoned outputs and launches."""

    def __init__(self, kernels, norm, types, rows, cols, plan, x, dy, w, b, residual=None, dsum=None, offset=0., flags=0):
        name, center, add = NORMS[norm]
        tx, tp = types.split("_")
        acc = torch.float64 if tx == "f64" else torch.float32
        self.args = (x, dy, w, b, residual, dsum)
        self.norm, self.types, self.rows, self.cols, self.offset = norm, types, rows, cols, offset
        new = lambda n, t: empty(n, t, x.device)
        self.y, self.sum, self.dx = new(rows * cols, TORCH[tx]), new(rows * cols if add else 0, TORCH[tx]), new(rows * cols, TORCH[tx])
        self.stats = new(rows * (3 if center else 1), acc)
        self.dweight, self.dbias = new(cols, TORCH[tp]), new(cols, TORCH[tp])
        self.partial = new(plan.parts * 2 * cols, acc)
        self.kernels, self.plan = kernels, plan
        i64, f64, i32 = np.int64, np.float64, np.int32
        shape = (i64(rows), i64(cols))
        p = pointer
        sum_ = self.sum if add else None
        forward = (p(x), p(residual), p(w), p(b), p(self.y), p(sum_), p(self.stats), *shape, f64(1e-5), f64(offset), i32(flags))
        # The unrounded sum is not asked for.
        self.forward_launches = [(plan.forward, (*forward, p(None)) if add else forward)]
        start = (p(x), p(residual), p(w), p(dy), p(dsum), p(self.stats), p(self.dx))
        if plan.columns:
            self.backward_launches = [(plan.dx, (*start, *shape, f64(offset))),
                                      (plan.columns, (p(x), p(residual), p(dy), p(self.stats), p(self.partial), *shape, i32(flags)))]
        else:
            self.backward_launches = [(plan.dx, (*start, p(self.partial), *shape, f64(offset), i32(flags)))]
        self.backward_launches.append((plan.finish, (p(self.partial), p(self.dweight), p(self.dbias), i64(plan.parts), i64(cols))))
        self.ready = {id(l): kernels.get(types, l[0][0]) for l in self.forward_launches + self.backward_launches}

    def run(self, launches):
        for l in launches:
            (_, grid, block, shared), args = l
            self.ready[id(l)](tuple(grid), tuple(block), args, shared_mem=shared)

    def forward(self):
        self.run(self.forward_launches)

    def backward(self):
        self.run(self.backward_launches)


def timed(calls, repeats=7, least=24):
    for c in calls:
        c()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    rounds, times = max(1, least // len(calls)), []
    for _ in range(repeats):
        start.record()
        for _ in range(rounds):
            for c in calls:
                c()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / rounds / len(calls))
    return statistics.median(times)


def inputs(norm, types, rows, cols, seed):
    tx, tp = types.split("_")
    g = torch.Generator(device="cuda").manual_seed(seed)
    new = lambda n, t, m=0.: (torch.randn(n, generator=g, device="cuda") + m).to(TORCH[t])
    add = NORMS[norm][2]
    x, dy, w, b = new(rows * cols, tx, 0.5), new(rows * cols, tx), new(cols, tp, 1.), new(cols, tp)
    return x, dy, w, b, new(rows * cols, tx) if add else None, new(rows * cols, tx) if add else None


def check(case):
    x, dy, w, b, residual, dsum = case.args
    _, center, add = NORMS[case.norm]
    tx, tp = case.types.split("_")
    rows, cols = case.rows, case.cols
    X = x.double().view(rows, cols)
    if add:
        X = (x.float() + residual.float()).double().view(rows, cols)
    W, B, D = w.double(), b.double(), dy.double().view(rows, cols)
    m = X.mean(1, keepdim=True) if center else 0.
    rstd = ((X - m).square().mean(1, keepdim=True) + 1e-5).rsqrt()
    H = (X - m) * rstd
    G = D * W
    dx = rstd * (G - (G.mean(1, keepdim=True) if center else 0.) - H * (G * H).mean(1, keepdim=True))
    if dsum is not None:
        dx += dsum.double().view(rows, cols)
    worst = {}
    for what, got, want, unit in (("y", case.y, H * W + B, tx), ("dx", case.dx, dx, tx), ("dweight", case.dweight, (D * H).sum(0), tp), ("dbias", case.dbias, D.sum(0), tp)):
        want = want.reshape(-1)
        off = (got.double() - want).abs() - 1.01 * UNIT[unit] * want.abs()
        worst[what] = float(off.max() / want.abs().max())
        if torch.isnan(got).any():
            worst[what] = float("nan")
    return worst


M = 1 << 25  # elements of 64 MiB in 16 bits
TIMED = (
    [(0, "bf16_bf16", M // c, c) for c in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)]
    + [(0, "bf16_bf16", M // c, c) for c in (48, 49, 100, 104, 768, 769, 1000, 1001, 5000, 5001)]
    + [(0, "f32_f32", M // 2 // c, c) for c in (256, 1024, 4096, 8192, 16384, 32768, 768, 769, 1000, 1001, 5000, 5001)]
    + [(1, "bf16_bf16", M // c, c) for c in (1024, 4096, 8192)]
    + [(0, "bf16_f32", M // 4096, 4096), (0, "f16_f32", M // 5001, 5001), (2, "bf16_bf16", M // 4096, 4096), (3, "bf16_bf16", M // 4096, 4096)]
    + [(0, "bf16_bf16", 32768, 4096), (0, "bf16_bf16", 64, 1024), (0, "f64_f64", 4096, 1024)]
)
COMPILED = [(0, "bf16_bf16", 8192, 4096), (0, "f32_f32", 4096, 4096), (0, "bf16_bf16", M // 1001, 1001), (1, "bf16_bf16", 8192, 4096)]
key = lambda s: f"{NORMS[s[0]][0]} {s[1]} {s[2]}x{s[3]}"


def torch_norm(norm, cols, x, w, b):
    return F.layer_norm(x, (cols,), w, b, 1e-5) if NORMS[norm][1] else F.rms_norm(x, (cols,), w, 1e-5)


def graphs_of(spec):
    """Three sets of inputs as torch differentiates them, and their cotangents."""
    norm, types, rows, cols = spec
    graphs = []
    for x, dy, w, b, _, _ in (inputs(norm, types, rows, cols, s) for s in range(3)):
        x, w, b = (t.detach().requires_grad_() for t in (x.view(rows, cols), w, b))
        graphs.append((x, w, b, dy.view(rows, cols)))
    return graphs


def time_torch(spec, f, row, name):
    graphs, taken = graphs_of(spec), 3 if NORMS[spec[0]][1] else 2
    with torch.no_grad():
        row[f"{name}_forward"] = timed([lambda g=g: f(*g[:3]) for g in graphs])
    made = [(f(*g[:3]), g[:taken], g[3]) for g in graphs]
    row[f"{name}_backward"] = timed([lambda m=m: torch.autograd.grad(m[0], m[1], m[2], retain_graph=True) for m in made], repeats=5, least=9)


def baselines(report, until, save):
    """torch eager on all shapes, then torch.compile on some, while there is time."""
    out = report["torch"] = {}
    for name, specs in (("eager", TIMED), ("compiled", COMPILED)):
        for spec in specs:
            norm, types, _, cols = spec
            tx, tp = types.split("_")
            if tx != tp or NORMS[norm][2]:
                continue
            if time.time() > until:
                report["torch_left_out"] = report.get("torch_left_out", 0) + 1
                continue
            f = lambda x, w, b: torch_norm(norm, cols, x, w, b)
            if name == "compiled":
                torch._dynamo.reset()
                f = torch.compile(f, dynamic=False)
            time_torch(spec, f, out.setdefault(key(spec), {}), name)
            torch.cuda.empty_cache()
        save()


def ours(kernels, report, until):
    out = report["ours"] = {}
    for spec in TIMED:
        if time.time() > until:
            report["left_out"] = report.get("left_out", 0) + 1
            continue
        norm, types, rows, cols = spec
        sets = [inputs(norm, types, rows, cols, s) for s in range(3)]
        cases = [Case(kernels, norm, types, rows, cols, Geometry(norm, types, rows, cols), *s) for s in sets]
        row = out[key(spec)] = {"bytes": sets[0][0].numel() * sets[0][0].element_size(), "kernels": [cases[0].plan.forward[0], cases[0].plan.dx[0]]}
        row["copy"] = timed([lambda c=c: c.y.copy_(c.args[0]) for c in cases])
        for c in cases:
            c.y.fill_(float("nan"))
        row["forward"] = timed([c.forward for c in cases])
        row["backward"] = timed([c.backward for c in cases])
        row["finish"] = timed([lambda c=c: c.run(c.backward_launches[-1:]) for c in cases])
        row["worst"] = check(cases[-1])
        del sets, cases


def explore(kernels, report):
    """Other numbers of blocks, for the next version of the geometry."""
    out = report["explored"] = {}
    for spec in [(0, "bf16_bf16", M // c, c) for c in (256, 512, 1024, 2048, 4096, 8192, 16384, 5001)] + [(0, "f32_f32", 4096, 4096)]:
        norm, types, rows, cols = spec
        sets = [inputs(norm, types, rows, cols, s) for s in range(3)]
        line = []
        for what in ("forward", "dx"):
            for room in (1, 2, 3, 4, 5, 6, 8, 12, 16):
                plan = Geometry(norm, types, rows, cols)
                launch = getattr(plan, what)
                teams = launch[2][1]
                if launch[0].endswith(("b8", "long")) or room * launch[2][0] * teams > 2048:
                    continue
                launch[1][0] = min(132 * room // 8 * 8, cdiv(rows, teams))
                plan.parts = plan.dx[1][0]
                cases = [Case(kernels, norm, types, rows, cols, plan, *s) for s in sets]
                t = timed([c.forward if what == "forward" else (lambda c=c: c.run(c.backward_launches[:1])) for c in cases], repeats=5)
                line.append(f"{'f' if what == 'forward' else 'b'}{room}:{t:.1f}")
                del cases
        out[key(spec)] = line
        print(f"{key(spec):38}", *line)


def table(report):
    print(f"\n{report['device']}; microseconds; /copy: the time of a copy of as many bytes over ours; x torch: torch over ours")
    print(f"{'':38} {'copy':>7} {'GB/s':>5} | {'fwd':>7} {'/copy':>5} {'eager':>5} {'compl':>5} | {'bwd':>7} {'fin':>5} {'/copy':>5} {'eager':>5} {'compl':>5} | worst")
    for name, r in report["ours"].items():
        t = report.get("torch", {}).get(name, {})
        over = lambda k, v: f"{t[k] / v:5.2f}" if k in t else "    -"
        add = "add_" in name
        # The bytes of a forward and of a backward, in tensors of x's size: a copy moves two.
        forward, backward = (4, 5) if add else (2, 3)
        worst = max(r["worst"].values(), key=lambda v: v if v == v else math.inf)
        print(f"{name:38} {r['copy']:7.1f} {2 * r['bytes'] / r['copy'] / 1e3:5.0f} | {r['forward']:7.1f} {forward / 2 * r['copy'] / r['forward']:5.2f} "
              f"{over('eager_forward', r['forward'])} {over('compiled_forward', r['forward'])} | {r['backward']:7.1f} {r['finish']:5.1f} "
              f"{backward / 2 * r['copy'] / r['backward']:5.2f} {over('eager_backward', r['backward'])} {over('compiled_backward', r['backward'])} | {worst:.1e}"
              f"{'' if worst <= 2e-6 else '  TOO FAR'}")


def capture(kernels):
    """A forward and a backward in a graph of torch: replayed on other inputs, the bits of the same launches without one."""
    spec = (0, "bf16_bf16", 300, 1000)
    norm, types, rows, cols = spec
    sets = [inputs(norm, types, rows, cols, s) for s in range(2)]
    captured, direct = (Case(kernels, norm, types, rows, cols, Geometry(norm, types, rows, cols), *(t.clone() if t is not None else None for t in s)) for s in sets)
    graph = torch.cuda.CUDAGraph()
    captured.forward(), captured.backward()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            captured.forward(), captured.backward()
    for to, of in zip(captured.args, sets[1]):
        if to is not None:
            to.copy_(of)
    graph.replay()
    direct.forward(), direct.backward()
    torch.cuda.synchronize()
    return all(torch.equal(getattr(captured, n), getattr(direct, n)) for n in ("y", "stats", "dx", "dweight", "dbias"))


def main(modules, out, seconds=60.):
    report = {"device": torch.cuda.get_device_name(), "torch_version": torch.__version__}
    begin = time.time()
    kernels = Kernels(modules)
    try:
        report["captured"] = capture(kernels)
    except Exception as e:
        report["captured"] = repr(e)
    print("captured in a graph:", report["captured"])
    def save():
        with open(os.path.join(out, "rows.json"), "w") as f:
            json.dump(report, f, indent=1)

    # What is saved early outlives a time limit.
    try:
        ours(kernels, report, time.time() + seconds)
        save()
        baselines(report, time.time() + seconds, save)
    except Exception as e:
        report["error"] = repr(e)
        print("failed:", repr(e)[:300])
    save()
    table(report)
    print(f"{time.time() - begin:.0f} s")
    if os.environ.get("EXPLORE") == "1":
        explore(kernels, report)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else os.environ.get("OUT", "."), float(os.environ.get("SECONDS_OF_TIMING", "60")))
