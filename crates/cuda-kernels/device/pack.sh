#!/bin/bash
# Packs into FOLDER what run.sh needs on a machine with a GPU: pack.sh FOLDER
set -e
to=${1:?folder}
here=$(realpath "$(dirname "$0")")
mkdir -p "$to/kernels" "$to/emulator" "$to/built"
cp "$here"/../kernels/*.cu "$here"/../kernels/*.cuh "$to/kernels/"
cp "$here"/../../cuda-emulator/cuda_host.h "$here"/../../cuda-emulator/emulator.cpp "$to/emulator/"
cp "$here"/*.py "$here/run.sh" "$to/"
