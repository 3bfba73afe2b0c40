"""The table of device_check.sh: reads the files of OUT, prints what was measured, what falls short of the goals, and
`N passed, N failed`. Writes OUT/report.json.

    python3 scripts/device_report.py OUT
"""
import collections, json, math, os, re, sys

OUT = sys.argv[1]
checks = []  # (passed, what, text)
report = {"checks": checks}


def check(passed, what, text=""):
    checks.append((bool(passed), what, text))


def text_of(name):
    path = os.path.join(OUT, name)
    return open(path, errors="replace").read() if os.path.exists(path) else ""


def json_of(name):
    text = text_of(name)
    return json.loads(text) if text else {}


def geometric(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


steps = {name: (int(code), int(seconds)) for name, code, seconds in
         (line.split("\t") for line in text_of("steps.tsv").splitlines())}
report["steps"] = steps


def tests(step):
    """The tests of a program, each a check."""
    text = text_of(step + ".log")
    for name, state in re.findall(r"^test (\S+) \.\.\. (ok|FAILED)", text, re.M):
        check(state == "ok", f"{step}: {name}")
    code = steps[step][0]
    if code == 124:
        check(False, step, "ended by its time limit")
    elif code and "FAILED" not in text:
        check(False, step, (text.strip().splitlines() or ["no output"])[-1][:200])


def conformance():
    """The cases that passed, as one check each, and those that did not."""
    text, code = text_of("conformance.log"), steps["conformance"][0]
    counts = re.search(r"^(\d+) passed, (\d+) failed$", text, re.M)
    if not counts:
        return check(False, "conformance", (text.strip().splitlines() or ["no output"])[-1][:200])
    checks.extend([(True, "conformance", "")] * int(counts[1]))
    failed = re.findall(r"^FAILED (.*)$", text, re.M)
    for name in failed:
        check(False, "conformance", name[:200])
    check(code == 0 or failed, "conformance", f"status {code}")
    print(f"Conformance: {counts[0]}")


def bits():
    kernels = collections.defaultdict(collections.Counter)
    first = {}
    for line in text_of("launches.tsv").splitlines():
        state, kernel, text = (line.split("\t") + [""])[:3]
        kernels[kernel][state] += 1
        if state != "same":
            first.setdefault(kernel, f"{state}: {text}")
    report["bits"] = {kernel: dict(count) for kernel, count in kernels.items()}
    for kernel, count in sorted(kernels.items()):
        launches = sum(count.values())
        check(count["same"] == launches, f"bits of {kernel}", f"{launches - count['same']} of {launches} launches; {first.get(kernel, '')}")
    total = sum((c for c in kernels.values()), collections.Counter())
    print(f"Bits of the emulator: {total['same']} launches of {len(kernels)} kernels the same, {total['differs']} differ, {total['failed']} failed")
    if "bits-rows" in steps:
        check(kernels, "bits", "no launch was compared")


def sanitizer(step):
    text, code = text_of(step + ".log"), steps[step][0]
    errors = [l for l in text.splitlines() if re.match(r"=========\s+(Invalid|Error|Program hit|Race|ERROR: Race|Address)", l)]
    summary = re.findall(r"ERROR SUMMARY: (\d+)", text) + re.findall(r"RACECHECK SUMMARY: (\d+)", text)
    if code == 127 or "not supported" in text:
        print(f"SKIPPED {step}: compute-sanitizer does not run here")
    elif code == 124 and not errors:
        print(f"{step}: nothing found until its time was over")
        check(True, step)
    else:
        check(summary and not int(summary[-1]) and not errors, step, (errors or text.strip().splitlines() or ["no output"])[0][:200])


def row(name, what, ours, copy, tensors, others):
    """A line of the table: microseconds, a copy of as many tensors over ours, others over ours."""
    over = {k: v / ours for k, v in others.items() if v}
    return {"name": name, "what": what, "us": ours, "of_copy": tensors / 2 * copy / ours, **over}


def width(name):
    return int(re.search(r"x(\d+)$", name).group(1))


def timings():
    lines = []
    rows = json_of("rows.json")
    if rows.get("captured") is not None:
        check(rows["captured"] is True, "launches captured in a graph", str(rows["captured"]))
    if rows.get("error"):
        check(False, "timings-rows", rows["error"][:200])
    for what in ("left_out", "torch_left_out"):
        if rows.get(what):
            print(f"{rows[what]} shapes were left out for the time ({what})")
    for name, r in rows.get("ours", {}).items():
        t, add = rows.get("torch", {}).get(name, {}), "add_" in name
        for what, tensors in (("forward", 4 if add else 2), ("backward", 5 if add else 3)):
            line = row(name, what, r[what], r["copy"], tensors, {"eager": t.get(f"eager_{what}"), "compiled": t.get(f"compiled_{what}")})
            line["bytes"] = r["bytes"]
            lines.append(line)
        worst = max(r["worst"].values(), key=lambda v: v if v == v else math.inf)
        check(worst <= 2e-6, f"error of {name}", f"{worst:.1e} of the scale")
    channels = json_of("channels.json")
    for r in channels.get("correct", []):
        check(r["ok"], f"error of {r['name']}", str(r["worst"]))
    if channels:
        check(channels.get("beyond 2^31"), "more than 2^31 elements")
    for text in channels.get("failed", []):
        if not any(text.startswith(r["name"]) for r in channels.get("correct", [])):
            check(False, "channels", text)
    for r in channels.get("timed", []) + channels.get("more", []):
        for what, tensors in (("forward", 2), ("backward", 3)):
            if what in r:
                lines.append(row(r["name"], what, 1e3 * r[what], 1e3 * r["copy"], tensors, {"eager": 1e3 * r.get(f"torch_{what}", 0)}))
                lines[-1]["bytes"] = r["bytes"]
    report["timings"] = lines
    return rows, lines


def goals(rows, lines):
    """The table of what the GPU must show."""
    of = {(l["name"], l["what"]): l for l in lines}
    half = 0.999 * (1 << 26)
    for l in lines:
        name, what, share = l["name"], l["what"], l["of_copy"]
        if "norm" not in name:
            if name.startswith(("batch", "group")):
                check(l.get("eager", 0) > 1, f"{what} of {name}", f"{l.get('eager', 0):.2f} of PyTorch, must be above 1")
            continue
        cols, lanes = width(name), 4 if "f32_" in name else 8
        if cols % 8 == 0 and 256 <= cols <= 32768 and l["bytes"] >= half:
            goal = 0.90 if what == "forward" else 0.80
            check(share >= goal, f"{what} of {name}", f"{share:.2f} of a copy, must be {goal:.2f}")
        elif cols % lanes:
            near = [o for o in lines if o["what"] == what and o["name"].split()[:2] == name.split()[:2] and width(o["name"]) % 8 == 0]
            near = min(near, key=lambda o: abs(width(o["name"]) - cols), default=None)
            if near:
                least = 0.75 * near["of_copy"]
                check(share >= least, f"{what} of {name}", f"{share:.2f} of a copy, must be {least:.2f}: 0.75 of {width(near['name'])} columns")
    for other, mean in (("eager", 1.3), ("compiled", 1.0)):
        ratios = {(l["name"], l["what"]): l[other] for l in lines if other in l}
        if not ratios:
            continue
        value = geometric(list(ratios.values()))
        check(value >= mean, f"PyTorch {other}, geometric mean of {len(ratios)}", f"{value:.2f}, must be {mean}")
        for (name, what), ratio in ratios.items():
            check(ratio >= 0.95, f"PyTorch {other}: {what} of {name}", f"{ratio:.2f}, must be 0.95")


def candle_nn():
    """Milliseconds of benches/cuda.rs: ours beside a copy, the composed path and candle-nn, through candle."""
    rows = report["candle_nn"] = json_of("candle-nn.json") or []
    for r in rows:
        for what, goal in (("forward", 1.5), ("step", 3.)):
            theirs = r[f"candle_nn_{what}"]
            if theirs:
                over = theirs / r[what]
                check(over >= goal, f"candle-nn: {what} of {r['name']}", f"{over:.2f}, must be {goal}")


def table(lines):
    print(f"\n{'microseconds; of a copy of as many tensors; PyTorch over ours':62} {'':8} {'us':>8} {'of copy':>8} {'eager':>7} {'compiled':>8}")
    cell = lambda l, k, n: f"{l[k]:{n}.2f}" if k in l else f"{'':{n}}"
    for l in lines:
        print(f"{l['name']:62} {l['what']:8} {l['us']:8.1f} {l['of_copy']:8.2f} {cell(l, 'eager', 7)} {cell(l, 'compiled', 8)}")
    if report["candle_nn"]:
        print(f"\n{'through candle, microseconds; others over ours':44} {'copy':>8}  {'forward':>8} {'composed':>8} {'candle-nn':>9}  {'step':>8} {'composed':>8} {'candle-nn':>9}")
    for r in report["candle_nn"]:
        over = lambda who, what: f"{r[who + what] / r[what]:.2f}" if r[who + what] else "-"
        cells = [f"{1e3 * r[what]:8.1f} {over('composed_', what):>8} {over('candle_nn_', what):>9}" for what in ("forward", "step")]
        print(f"{r['name']:44} {1e3 * r['copy']:8.1f}  {'  '.join(cells)}")


bits()
for name in ("bits-rows", "bits-channels", "device"):
    if name in steps:
        tests(name)
if "conformance" in steps:
    conformance()
for name in steps:
    if name.startswith(("memcheck", "racecheck")):
        sanitizer(name)
    elif name.startswith(("timings", "candle-nn")) and steps[name][0]:
        check(False, name, (text_of(name + ".log").strip().splitlines() or ["no output"])[-1][:200])
rows, lines = timings()
goals(rows, lines)
candle_nn()
table(lines)
report["device"] = rows.get("device") or text_of("device.txt").strip() or "no device"
print("\nWhat falls short:")
for passed, what, text in checks:
    if not passed:
        print(f"  {what}: {text}")
passed = sum(c[0] for c in checks)
print(f"\n{report['device']}: {passed} passed, {len(checks) - passed} failed")
report["passed"], report["failed"] = passed, len(checks) - passed
with open(os.path.join(OUT, "report.json"), "w") as f:
    json.dump(report, f, indent=1)
