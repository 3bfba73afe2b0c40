// Rows of any length, a slot at a time, each a team's: a warp's, or a block's.
#pragma once
#include "planes.cuh"

template <class A> __device__ __forceinline__ A larger(A a, A b) { return b > a || b != b ? b : a; }
template <class A> __device__ __forceinline__ A warp_max(A v) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) v = larger(v, __shfl_xor_sync(0xffffffffu, v, m));
  return v;
}
// NaN is the largest. `part` has 32 places that nothing else uses.
template <class A> __device__ __forceinline__ A team_max(A v, A *part) {
  v = warp_max(v);
  if (blockDim.x == 32) return v;
  const unsigned lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  if (lane == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  return warp_max(lane < warps ? part[lane] : A(0));
}

// f(values, place) for each slot of the row that the thread has, U of them in flight.
template <class T, int U, class F>
__device__ __forceinline__ void for_slots(const T *v, u64 start, u64 len, u64 limit, F f) {
  const bool vectors = aligned(v);
  const u64 slots = (len + 2 * Lanes<T>::count - 2) / Lanes<T>::count;
  for (u64 s = threadIdx.x; s < slots; s += U * blockDim.x) {
    Raw raw[U];
    Place<T> place[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      place[u] = place_in<T>(start, len, s + u * blockDim.x);
      raw[u] = load_slot(v, vectors, place[u], limit);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Acc<T> x[Lanes<T>::count];
      unpack(raw[u], x, (const T *)0);
      f(x, place[u]);
    }
  }
}

// Below all numbers.
__device__ __forceinline__ float least_of(float) { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ double least_of(double) { return words_to_double(0, 0xfff00000u); }
template <class A> __device__ __forceinline__ A warp_largest(A v) {
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) {
    const A other = __shfl_xor_sync(0xffffffffu, v, m);
    v = other > v ? other : v;
  }
  return v;
}
// The largest number of a team, NaN being none. `part` has 32 places that nothing else uses.
template <class A> __device__ __forceinline__ A team_largest(A v, A *part) {
  v = warp_largest(v);
  if (blockDim.x == 32) return v;
  const unsigned lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  if (lane == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  return warp_largest(lane < warps ? part[lane] : least_of(v));
}
