#!/usr/bin/env bash
# Checks and times the CUDA kernels on a GPU.
#
#   scripts/device_check.sh build    # anywhere: needs a C++ compiler and Python with pip, no GPU
#   scripts/device_check.sh run      # on a machine with a GPU, PyTorch and CuPy, in under eight minutes
#
# `build` fills the folder .device, which git ignores: two programs, kernels, conformance cases. `run` needs that folder
# and the sources of this repository, nothing else. DEVICE_ARCH is the compute capability (90). Results go to
# .device/out; where OUT is set, the report and an archive of the logs are copied there.
#
# It ends with a table, with lines of what falls short, and with `N passed, N failed`; report.json has all numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
pack=$PWD/.device
arch=${DEVICE_ARCH:-90}
# The most that the folder may hold, in KiB.
limit=65536

die() {
    printf 'device_check.sh: %s\n' "$1" >&2
    exit 1
}

# `"KEY":"VALUE"` of the messages of cargo that have all of the given texts.
field() {
    local key=$1 text
    shift
    local lines
    lines=$(cat "$messages")
    for text in "$@"; do
        lines=$(grep -F "$text" <<< "$lines")
    done
    grep -o "\"$key\":\"[^\"]*\"" <<< "$lines" | cut -d '"' -f 4 | tail -n 1
}

build() {
    local toolkit=${CANDLE_NORM_CUDA_TOOLKIT:-${CARGO_TARGET_DIR:-target}/cuda-toolkit} name path out size
    scripts/cuda_toolkit.sh "$toolkit"
    source "$toolkit/env"
    # candle's own kernels.
    export CUDA_COMPUTE_CAP=$arch
    rm -rf "$pack"
    mkdir -p "$pack/kernels"
    messages=$(mktemp)
    trap 'rm -f "$messages"' EXIT

    # One command, so that both programs have the same features and nothing is built twice.
    cargo test --release --no-run --message-format json-render-diagnostics --package candle-norm-tests --package candle-norm-peers \
        --features candle-norm-tests/cuda,candle-norm-peers/cuda --test device --bench cuda > "$messages"
    for name in device cuda; do
        path=$(field executable '"reason":"compiler-artifact"' "\"name\":\"$name\"") || true
        [ -n "$path" ] || die "cargo has built no program $name"
        strip -o "$pack/$name" "$path"
        # They have the kernels as text in them.
        gzip -9 "$pack/$name"
    done

    out=$(field out_dir '"reason":"build-script-executed"' 'crates/cuda-kernels') || true
    [ -n "$out" ] || die "cargo has made no PTX"
    for path in "$out"/*.ptx; do
        printf '%s\0' "$path"
    done | xargs -0 -P "$(nproc)" -I {} bash -c '"$0/bin/ptxas" -arch "sm_$1" -o "$2/$(basename "$3" .ptx).cubin" "$3"' \
        "$CUDA_HOME" "$arch" "$pack/kernels" {}
    cp -r tests/fixtures/conformance "$pack/cases"

    size=$(du -sk "$pack" | cut -f 1)
    printf '%s: %d KiB\n' "$pack" "$size"
    [ "$size" -le "$limit" ] || die "the folder must have at most $limit KiB"
}

start=$SECONDS
# What is left of so many seconds in all. Under eight minutes: a step that would end later is cut off.
seconds() {
    local left=$((450 - (SECONDS - start)))
    printf '%s' $(($1 < left ? $1 : left > 5 ? left : 5))
}

# A step that may fail: step NAME SECONDS COMMAND... Its output is NAME.log, its status a line of steps.tsv.
step() {
    local name=$1 most from=$SECONDS code=0
    most=$(seconds "$2")
    shift 2
    timeout "$most" "$@" > "$results/$name.log" 2>&1 || code=$?
    printf '%s\t%d\t%d\n' "$name" "$code" $((SECONDS - from)) >> "$results/steps.tsv"
    printf '%-24s %3d s, status %d\n' "$name" $((SECONDS - from)) "$code"
}

results=$pack/out
hand_out() {
    rm -rf "$results/bin"
    if [ -n "${OUT:-}" ]; then
        mkdir -p "$OUT"
        cp "$results"/report.* "$OUT/" || true
        tar -czf "$OUT/logs.tar.gz" -C "$results" .
    fi
}

run() {
    local python=${PYTHON:-python3} scripts=crates/cuda-kernels/device folder gpu name tool
    local device=$results/bin/device
    for name in device.gz cuda.gz kernels cases; do
        [ -e "$pack/$name" ] || die "there is no $pack/$name: run \`scripts/device_check.sh build\` first, and bring the folder here"
    done
    gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null) ||
        die "this machine has no NVIDIA GPU, or no driver for it: nvidia-smi does not run"
    rm -rf "$results"
    mkdir -p "$results/bits" "$results/bin"
    printf '%s\n' "$gpu" | tee "$results/device.txt"
    trap hand_out EXIT
    for name in device cuda; do
        gzip -dc "$pack/$name.gz" > "$results/bin/$name"
        chmod +x "$results/bin/$name"
    done
    # The libraries that candle links come with PyTorch.
    folder=$("$python" -c 'import os, nvidia; print(":".join(os.path.join(p, "cu13/lib") for p in nvidia.__path__))' || true)
    export LD_LIBRARY_PATH=$folder:${LD_LIBRARY_PATH:-} PYTHONUNBUFFERED=1
    # Tests without which the others say little: whether the program starts at all.
    "$device" --list > "$results/list.log" 2>&1 || die "the tests do not start: $(tail -n 1 "$results/list.log")"

    step conformance 120 env CANDLE_NORM_CONFORMANCE="$pack/cases" "$device" conformance:: --nocapture
    step device 90 "$device" bits:: edges:: graph::
    for name in rows channels; do
        step "bits-$name" 60 env CANDLE_NORM_GPU="$pack/kernels" CANDLE_NORM_GPU_LOG="$results" "$device" "$name::"
    done
    step candle-nn 60 "$results/bin/cuda" --bench --json="$results/candle-nn.json"
    export SECONDS_OF_TIMING=45
    step timings-rows 120 "$python" "$scripts/rows.py" "$pack/kernels" "$results"
    step timings-channels 80 "$python" "$scripts/channels.py" "$pack/kernels" "$results"
    # Small launches of every kernel's kind; buffers end where they end.
    for tool in memcheck racecheck; do
        sanitized "$tool" rows what_is large weights a_sum parameters f16_with bf16_with
        sanitized "$tool" channels batch_norm group weights rows_of every_element
    done
    "$python" scripts/device_report.py "$results" | tee "$results/report.txt"
    printf '%d s in all\n' $((SECONDS - start))
}

# Tests of a module whose names begin with the words, under a tool of compute-sanitizer.
sanitized() {
    local tool=$1 module=$2
    shift 2
    step "$tool-$module" 40 env CANDLE_NORM_GPU="$pack/kernels" CANDLE_NORM_GPU_LOG="$results/bits" CANDLE_NORM_GPU_EXACT=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$device" "${@/#/$module::}"
}

case ${1:-} in
    build) build ;;
    run) run ;;
    *)
        sed -n '2,11s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
