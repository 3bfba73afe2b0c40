#!/usr/bin/env bash
# Assembles the kernels for compute capability 8.0 and 9.0, and prints registers, spilled bytes and static shared memory
# of each: `scripts/ptx_report.sh`, with CUDA_HOME as scripts/cuda_toolkit.sh sets it. What is assembled is the PTX of
# the feature `ptx`, which a driver assembles on the user's machine.
#
# crates/cuda-kernels/spills.tsv names the kernels that may spill, how much, and why. A kernel that spills more is an
# error, and so is a line of which nothing spills as much as it says.
set -euo pipefail
cd "$(dirname "$0")/.."
allowed=crates/cuda-kernels/spills.tsv
work=$(realpath -m "${CARGO_TARGET_DIR:-target}")/ptx-report
mkdir -p "$work"

# What was assembled before is not assembled again.
assemble() {
    local ptx=$1 arch=$2 log
    log=$work/$(basename "$ptx" .ptx).$arch
    [ "$log" -nt "$ptx" ] || "$CUDA_HOME/bin/ptxas" -v -arch "$arch" -o /dev/null "$ptx" 2> "$log" || {
        cat "$log" >&2
        rm "$log"
        return 1
    }
}
export -f assemble
export work

# kernel, arch, registers, bytes spilled (stores and loads), bytes of shared memory: a line for each kernel and arch.
numbers() {
    awk -v OFS='\t' '
        /Compiling entry function/ { split($0, quoted, "\047"); kernel = quoted[2]; arch = quoted[4] }
        /bytes spill stores/ { spilled = $5 + $9 }
        /Used [0-9]+ registers/ {
            shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART) + 0 : 0
            print kernel, arch, $5, spilled, shared
        }
    ' "$@"
}

: "${CUDA_HOME:?source the file env of the folder that scripts/cuda_toolkit.sh made}"
cargo build --package candle-norm-cuda-kernels --features ptx --message-format json > "$work/messages"
out=$(grep '"reason":"build-script-executed"' "$work/messages" | grep 'cuda-kernels' |
    grep -o '"out_dir":"[^"]*"' | cut -d '"' -f 4)
for arch in sm_90 sm_80; do
    # The longest first.
    ls -S "$out"/*.ptx | sed "s/\$/ $arch/"
done | xargs -P "$(nproc)" -L 1 bash -c 'assemble "$@"' -
for ptx in "$out"/*.ptx; do
    numbers "$work/$(basename "$ptx" .ptx)".sm_??
done > "$work/numbers"
sort -k 1,2 "$work/numbers" > "$work/sorted"
printf '%-46s %5s %6s %6s  %5s %6s %6s\n' '' sm_80 spills shared sm_90 spills shared
awk -F '\t' '
    $1 != kernel { if (kernel) print ""; printf "%-46s", $1; kernel = $1 }
    { printf " %5d %6s %6d ", $3, $4 ? $4 : ".", $5 }
    END { print "" }
' "$work/sorted"

# Lines of the file: a kernel, or several by `*`; the most bytes of one; why they stay.
awk -F '\t' -v allowed="$allowed" '
    BEGIN {
        while ((getline line < allowed) > 0) {
            if (line ~ /^#/ || line == "") continue
            split(line, field, "\t")
            if (field[3] == "") { printf "%s: no reason in the line of %s\n", allowed, field[1]; wrong = 1 }
            name[++lines] = field[1]
            most[lines] = field[2]
            pattern[lines] = field[1]
            gsub(/\*/, ".*", pattern[lines])
        }
    }
    {
        kernels[$1]
        if ($4 > 0 && $4 > worst[$1] + 0) worst[$1] = $4
        if ($3 > registers) registers = $3
    }
    END {
        for (kernel in worst) {
            room = 0
            for (i = 1; i <= lines; ++i) if (kernel ~ "^" pattern[i] "$") {
                if (worst[kernel] > used[i]) used[i] = worst[kernel]
                if (most[i] > room) room = most[i]
            }
            if (worst[kernel] <= room) continue
            printf "%s spills %d bytes, %s has a line for %d\n", kernel, worst[kernel], allowed, room
            wrong = 1
        }
        for (i = 1; i <= lines; ++i) if (used[i] < most[i]) {
            printf "%s: %s spills %d bytes, not %d\n", allowed, name[i], used[i], most[i]
            wrong = 1
        }
        printf "%d kernels, %d of them spill; at most %d registers\n", size(kernels), size(worst), registers
        exit wrong
    }
    function size(array,  count, key) { for (key in array) ++count; return count + 0 }
' "$work/sorted"
