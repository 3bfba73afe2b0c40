#!/usr/bin/env bash
# Installs what compiling and linking for CUDA needs, from PyPI: `scripts/cuda_toolkit.sh DIR`. It needs Python with pip
# and a C compiler, neither a GPU nor a driver, and downloads 0.7 GB. Nothing happens where DIR has it already.
#
# Afterwards `source DIR/env` sets CUDA_HOME, PATH and what else `cargo build --features cuda` reads. Status 75: the
# registry could not be reached, or did not have the packages.
set -euo pipefail
dir=$(realpath -m "${1:?usage: cuda_toolkit.sh DIR}")
# Registers and spills in spills.tsv are those of this compiler.
wheels=(
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-nvrtc==13.0.88 nvidia-curand==10.4.0.35 nvidia-cublas==13.1.0.3
)
if [ -e "$dir/env" ] && [ -x "$dir/nvidia/cu13/bin/nvcc" ]; then
    exit 0
fi
mkdir -p "$(dirname "$dir")"
# A download that is cut off leaves no folder that looks complete.
new=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$new"' EXIT
if ! python3 -m pip install --quiet --no-deps --no-compile --root-user-action=ignore --target "$new" "${wheels[@]}"; then
    printf 'cuda_toolkit.sh: pip cannot install %s\n' "${wheels[*]}" >&2
    exit 75
fi

home=$new/nvidia/cu13
ln -s lib "$home/lib64"
# The wheels have libraries with their version only; a linker looks for those without.
for library in "$home"/lib/lib*.so.*; do
    name=$(basename "$library")
    case $name in
        *.alt.so.* | *builtins*) ;;
        *) ln -sf "$name" "$home/lib/${name%%.so.*}.so" ;;
    esac
done
# No wheel has the driver's library. The linker is content with one that defines its names.
mkdir -p "$home/lib/stubs"
cc -E -I"$home/include" -x c "$home/include/cuda.h" | grep -oE '\bcu[A-Z][A-Za-z0-9_]*\(' | tr -d '(' | sort -u |
    sed 's/$/(void) { return 100; }/; s/^/int /' |
    cc -shared -fPIC -x c - -o "$home/lib/stubs/libcuda.so" -Wl,-soname,libcuda.so.1

# candle's kernels of quantized matrices and of mixtures of experts take minutes to compile, and no norm calls them:
# they become functions that abort.
cat > "$new/nvcc-quick" << 'EOF'
#!/usr/bin/env bash
set -euo pipefail
source= target= previous=
for argument in "$@"; do
    [ "$previous" = -o ] && target=$argument
    case $argument in *.cu) source=$argument ;; esac
    previous=$argument
done
case $source in
    src/mmvq_gguf.cu)
        {
            echo '#include <stdlib.h>'
            grep -oE '\bfn [A-Za-z0-9_]+' src/ffi.rs | sed -E 's/fn (.*)/void \1(void) { abort(); }/'
        } | cc -fPIC -x c -c - -o "$target"
        ;;
    src/mmq_gguf/* | src/moe/*) cc -fPIC -x c -c /dev/null -o "$target" ;;
    *) exec "${CUDA_HOME:?}/bin/nvcc" "$@" ;;
esac
EOF
chmod +x "$new/nvcc-quick"
cat > "$new/env" << EOF
export CUDA_HOME=$dir/nvidia/cu13
export PATH=\$CUDA_HOME/bin:\$PATH
export NVCC=$dir/nvcc-quick
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-80}
export CUDAFORGE_THREADS=\${CUDAFORGE_THREADS:-$(nproc)}
EOF
rm -rf "$dir"
mv "$new" "$dir"
trap - EXIT
chmod 755 "$dir"
