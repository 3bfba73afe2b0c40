// Kernels that the emulator is tested with, among them faulty ones.
#include "common.cuh"

KERNEL(256, 1, self_test_reverse, const float *x, float *y, int barrier) {
  SHARED(float, part, 256);
  part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (barrier) __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}
KERNEL(256, 1, self_test_sum, const double *x, double *y) {
  SHARED(double, part, 32);
  const double sum = block_sum(x[threadIdx.x], part);
  y[threadIdx.x] = sum;
}
KERNEL(256, 1, self_test_divergent_barrier, int) {
  if (threadIdx.x < 32) __syncthreads();
}
KERNEL(256, 1, self_test_divergent_shuffle, int) {
  if (threadIdx.x % 32 < 16) __syncwarp();
}
KERNEL(256, 1, self_test_dynamic, float *y) {
  DYNAMIC_SHARED(float, part);
  if (threadIdx.x) part[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = part[threadIdx.x];
}
// Every 16-bit pattern to f32 and back.
KERNEL(256, 1, self_test_half, const float *x, f16 *h, bf16 *b, float *from_h, float *from_b) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  store(h + i, x[i]);
  store(b + i, x[i]);
  from_h[i] = load(h + i);
  from_b[i] = load(b + i);
}
