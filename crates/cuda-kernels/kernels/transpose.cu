// [outer, rows, columns] as [outer, columns, rows], by tiles of 32 by 32: what is read along rows is written along columns.
#include "common.cuh"

typedef unsigned long long u64;

template <class T>
__device__ __forceinline__ void transpose(const T *x, T *y, u64 outer, u64 rows, u64 columns) {
  // One more place a line, so that neither lines nor columns of a tile meet in a bank.
  SHARED(T, tile, 32 * 33);
  const u64 down = (rows + 31) / 32, across = (columns + 31) / 32;
  for (u64 item = blockIdx.x; item < outer * down * across; item += gridDim.x) {
    const u64 matrix = item / (down * across), place = item - matrix * (down * across);
    const u64 row = place / across * 32, column = place % across * 32, base = matrix * rows * columns;
    for (unsigned i = threadIdx.y; i < 32; i += blockDim.y)
      if (row + i < rows && column + threadIdx.x < columns)
        tile[i * 33 + threadIdx.x] = x[base + (row + i) * columns + column + threadIdx.x];
    __syncthreads();
    for (unsigned i = threadIdx.y; i < 32; i += blockDim.y)
      if (column + i < columns && row + threadIdx.x < rows)
        y[base + (column + i) * rows + row + threadIdx.x] = tile[threadIdx.x * 33 + i];
    __syncthreads();
  }
}

#define OF_BITS(T, bits)                                                                       \
  KERNEL(256, 4, transpose_##bits, const T *x, T *y, i64 outer, i64 rows, i64 columns) {       \
    transpose(x, y, outer, rows, columns);                                                     \
  }
OF_BITS(unsigned short, 16)
OF_BITS(unsigned, 32)
OF_BITS(u64, 64)
