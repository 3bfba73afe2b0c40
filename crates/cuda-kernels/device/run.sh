#!/bin/bash
# On a machine with a GPU, nvcc, PyTorch and CuPy: compiles the kernels that built/ has not, compares and measures. pack.sh
# packs what it needs. OUT is where results go. PTX is of compute_80, as it is shipped; the driver's part is done by ptxas here.
cd "$(dirname "$0")" || exit 1
OUT=${OUT:-out}
mkdir -p "$OUT" built
start=$SECONDS
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
flags="-cubin -gencode arch=compute_80,code=sm_$arch -std=c++17 -fmad=false -O3 -diag-suppress 128 -Xptxas -v"
host="-std=c++17 -O1 -fPIC -mfma -ffunction-sections -fdata-sections -ffp-contract=off -fno-strict-aliasing -w -Iemulator -Ikernels"
build() {
    for stem in rows channels groups weight transpose; do
        for types in bf16_bf16 f32_f32 f16_f16 f16_f32 bf16_f32 f64_f64; do
            [ -f "built/${stem}_$types.cubin" ] || [ -f "built/$stem.cubin" ] ||
                nvcc $flags --split-compile=3 -DONLY=$types -o "built/${stem}_$types.cubin" kernels/$stem.cu >"built/$stem.$types.txt" 2>&1 &
        done
    done
    # The emulator, to compare bits with.
    for stem in rows channels groups weight transpose; do
        for types in bf16_bf16 f32_f32 f16_f16 f16_f32 bf16_f32 f64_f64; do
            printf '#define ONLY %s\n#include "cuda_host.h"\n#include "%s.cu"\n' $types $stem >"built/emulated_${stem}_$types.cpp"
            g++ $host -c "built/emulated_${stem}_$types.cpp" -o "built/emulated_${stem}_$types.o" &
        done
    done
    g++ $host -c emulator/emulator.cpp -o built/emulator.o &
    wait
    g++ -shared built/*.o -o built/libemulated.so
    touch built/done
}
build &
export PYTHONUNBUFFERED=1
WAIT_FOR=built/done python3 rows.py built emulated "$OUT" 2>&1
echo "rows: $((SECONDS - start)) s in all"
wait
cat built/*.txt >"$OUT/nvcc.log"
grep -n "error" "$OUT/nvcc.log" | head
tar -cf "$OUT/objects.tar" built/*.o built/*.cpp
timeout 100 python3 channels.py built "$OUT" 2>&1
echo "all: $((SECONDS - start)) s"
