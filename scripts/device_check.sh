#!/usr/bin/env bash
# Checks and times the CUDA kernels on a GPU.
#
#   scripts/device_check.sh build    # anywhere: needs a C++ compiler and Python with pip, no GPU
#   scripts/device_check.sh run      # on a machine with a GPU, PyTorch and CuPy, in under eight minutes
#
# `build` fills the folder .device, which git ignores: kernels, programs. `run` needs that folder and the sources of this
# repository, nothing else. DEVICE_ARCH is the compute capability (90). Results go to .device/out; where OUT is set, the
# report and an archive of the logs are copied there.
#
# It ends with a table, with lines of what falls short, and with `N passed, N failed`; report.json has all numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=$PWD/.device
arch=${DEVICE_ARCH:-90}

# The path of a test or bench program that cargo has built: program NAME COMMAND...
program() {
    local name=$1
    shift
    "$@" --no-run --message-format json | grep '"reason":"compiler-artifact"' | grep "\"name\":\"$name\"" |
        grep -o '"executable":"[^"]*"' | cut -d '"' -f 4 | tail -n 1
}

take() {
    local path
    path=$(program "$@")
    [ -n "$path" ] || { printf 'no program %s\n' "$1" >&2; return 1; }
    strip -o "$pack/$1" "$path"
}

build() {
    local toolkit=${CANDLE_NORM_CUDA_TOOLKIT:-${CARGO_TARGET_DIR:-target}/cuda-toolkit} out ptx
    scripts/cuda_toolkit.sh "$toolkit"
    source "$toolkit/env"
    # candle's own kernels.
    export CUDA_COMPUTE_CAP=$arch
    rm -rf "$pack"
    mkdir -p "$pack/kernels"

    out=$(cargo build --package candle-norm-cuda-kernels --features ptx --message-format json |
        grep '"reason":"build-script-executed"' | grep 'cuda-kernels' | grep -o '"out_dir":"[^"]*"' | cut -d '"' -f 4)
    for ptx in "$out"/*.ptx; do
        printf '%s\0' "$ptx"
    done | xargs -0 -P "$(nproc)" -I {} bash -c '"$0/bin/ptxas" -arch "sm_$1" -o "$2/$(basename "$3" .ptx).cubin" "$3"' \
        "$CUDA_HOME" "$arch" "$pack/kernels" {}

    # Tests that run each launch on the emulator and on the GPU.
    take rows cargo test --package candle-norm-cuda-kernels --test rows
    take channels cargo test --package candle-norm-cuda-kernels --test channels
    if [ -z "${KERNELS_ONLY:-}" ]; then
        take conformance cargo test --release --package candle-norm-tests --features cuda --test conformance
        take cuda cargo bench --package candle-norm-peers --features cuda --bench cuda
        # With the kernels bound to candle: a train step in a graph, and what else a device is needed for.
        if [ -e tests/device ]; then
            take device cargo test --release --package candle-norm-tests --features cuda --test device
        fi
    fi
    printf '%s: %s\n' "$pack" "$(du -sh "$pack" | cut -f 1)"
}

start=$SECONDS
# What is left of so many seconds in all. Under eight minutes: a step that would end later is cut off.
limit() {
    local left=$((450 - (SECONDS - start)))
    printf '%s' $(($1 < left ? $1 : left > 5 ? left : 5))
}

# A step that may fail: step NAME SECONDS COMMAND... Its output is NAME.log, its status a line of steps.tsv.
step() {
    local name=$1 seconds from=$SECONDS code=0
    seconds=$(limit "$2")
    shift 2
    timeout "$seconds" "$@" > "$results/$name.log" 2>&1 || code=$?
    printf '%s\t%d\t%d\n' "$name" "$code" $((SECONDS - from)) >> "$results/steps.tsv"
    printf '%-24s %3d s, status %d\n' "$name" $((SECONDS - from)) "$code"
}

results=$pack/out
hand_out() {
    if [ -n "${OUT:-}" ]; then
        mkdir -p "$OUT"
        cp "$results"/report.* "$OUT/" || true
        tar -czf "$OUT/logs.tar.gz" -C "$results" .
    fi
}

run() {
    local python=${PYTHON:-python3} device=crates/cuda-kernels/device folder tool
    rm -rf "$results"
    mkdir -p "$results/bits"
    trap hand_out EXIT
    # The libraries that candle links come with PyTorch.
    folder=$("$python" -c 'import os, nvidia; print(":".join(os.path.join(p, "cu13/lib") for p in nvidia.__path__))' || true)
    export LD_LIBRARY_PATH=$folder:${LD_LIBRARY_PATH:-} PYTHONUNBUFFERED=1 CANDLE_NORM_DEVICE=cuda
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

    for name in rows channels; do
        step "bits-$name" 90 env CANDLE_NORM_GPU="$pack/kernels" CANDLE_NORM_GPU_LOG="$results" "$pack/$name"
    done
    if [ -e "$pack/conformance" ]; then
        step conformance 90 env CANDLE_NORM_CONFORMANCE="$PWD/tests/fixtures/conformance" "$pack/conformance" every_case --nocapture
    fi
    if [ -e "$pack/device" ]; then
        step device 60 "$pack/device" --nocapture
    fi
    export SECONDS_OF_TIMING=45
    step timings-rows 120 "$python" "$device/rows.py" "$pack/kernels" "$results"
    step timings-channels 80 "$python" "$device/channels.py" "$pack/kernels" "$results"
    for tool in memcheck racecheck; do
        for name in rows channels; do
            # Small launches of every kernel's kind; buffers end where they end.
            step "$tool-$name" 40 env CANDLE_NORM_GPU="$pack/kernels" CANDLE_NORM_GPU_LOG="$results/bits" CANDLE_NORM_GPU_EXACT=1 \
                compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
                "$pack/$name" finite sample sum_that parameters batch_norm_along group columns weight elements
        done
    done
    if [ -e "$pack/cuda" ]; then
        step candle-nn 60 "$pack/cuda" --bench
    fi
    "$python" scripts/device_report.py "$results" | tee "$results/report.txt"
    printf '%d s in all\n' $((SECONDS - start))
}

case ${1:-} in
    build) build ;;
    run) run ;;
    *)
        sed -n '2,12s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
