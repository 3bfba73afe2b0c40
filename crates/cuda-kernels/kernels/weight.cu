// Weight norm: each row of v [rows, len] at its own length g. A row is a team's: a warp's, or a block's.
#include "planes.cuh"

// The power of two by which a row's largest element comes near one.
__device__ __forceinline__ float to_one(float largest) {
  int e = (int)(__float_as_uint(largest) >> 23) - 127;
  e = e < -126 ? -126 : e > 126 ? 126 : e;
  return __uint_as_float((unsigned)(127 - e) << 23);
}
__device__ __forceinline__ double to_one(double largest) {
  unsigned lo, hi;
  double_to_words(largest, &lo, &hi);
  int e = (int)(hi >> 20) - 1023;
  e = e < -1022 ? -1022 : e > 1022 ? 1022 : e;
  return words_to_double(0, (unsigned)(1023 - e) << 20);
}

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

template <class T> __device__ __forceinline__ Acc<T> squares(const T *v, u64 start, u64 len, u64 limit, Acc<T> scale) {
  Acc<T> sum = 0;
  for_slots<T, 4>(v, start, len, limit, [&](const Acc<T> *x, Place<T>) {
    Acc<T> part = 0;
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) part = fma_(x[i] * scale, x[i] * scale, part);
    sum += part;
  });
  return sum;
}

// w = g · v / ‖v‖. Saved: ‖scale · v‖ and scale, a power of two that keeps the squares from over- and underflow.
template <class T, class P>
__device__ __forceinline__ void forward(const T *v, const P *g, T *w, Acc<T> *norm_out, Acc<T> *scale_out, u64 rows,
                                        u64 len) {
  typedef Acc<T> A;
  SHARED(A, buffer, 96);
  const u64 row = block_of_list() * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const u64 start = row * len, limit = rows * len;
  const bool to_vectors = aligned(w);
  A scale = 1, sum = team_sum(squares(v, start, len, limit, A(1)), buffer), norm = sqrt_(sum);
  // Within these bounds no square that counts was lost.
  if (!(sum >= A(1e-24) && sum < A(1e30))) {
    A largest = 0;
    for_slots<T, 4>(v, start, len, limit, [&](const A *x, Place<T>) {
#pragma unroll
      for (int i = 0; i < Lanes<T>::count; ++i) largest = larger(largest, x[i] < A(0) ? -x[i] : x[i]);
    });
    largest = team_max(largest, buffer + 32);
    norm = largest;
    // Neither zero, nor infinite, nor NaN.
    if (largest - largest == A(0) && largest != A(0)) {
      scale = to_one(largest);
      norm = sqrt_(team_sum(squares(v, start, len, limit, scale), buffer + 64));
    }
  }
  // A row of zeros has no direction.
  const A factor = norm == A(0) ? A(0) : (A)load(g + row) / norm;
  if (threadIdx.x == 0) {
    norm_out[row] = norm;
    scale_out[row] = scale;
  }
  for_slots<T, 4>(v, start, len, limit, [&](A *x, Place<T> place) {
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) x[i] = (x[i] * scale) * factor;
    store_slot(w, to_vectors, place, x);
  });
}

// dg = Σ dw · v / ‖v‖ and dv = g / ‖v‖ · (dw − dg · v / ‖v‖).
template <class T, class P>
__device__ __forceinline__ void backward(const T *v, const T *dw, const P *g, const Acc<T> *norms, const Acc<T> *scales,
                                         T *dv, P *dg, u64 rows, u64 len) {
  typedef Acc<T> A;
  SHARED(A, buffer, 32);
  const u64 row = block_of_list() * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const u64 start = row * len, limit = rows * len;
  const bool dw_vectors = aligned(dw), to_vectors = aligned(dv);
  const A norm = norms[row], scale = scales[row], unit = norm == A(0) ? A(0) : A(1) / norm;
  A along = 0;
  for_slots<T, 4>(v, start, len, limit, [&](const A *x, Place<T> place) {
    A d[Lanes<T>::count], part = 0;
    unpack(load_slot(dw, dw_vectors, place, limit), d, (const T *)0);
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) part = place.has(i) ? fma_(d[i], (x[i] * scale) * unit, part) : part;
    along += part;
  });
  along = team_sum(along, buffer);
  if (threadIdx.x == 0 && dg) store(dg + row, along);
  const A factor = (A)load(g + row) * unit;
  for_slots<T, 4>(v, start, len, limit, [&](const A *x, Place<T> place) {
    A d[Lanes<T>::count];
    unpack(load_slot(dw, dw_vectors, place, limit), d, (const T *)0);
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) d[i] = ((d[i] - ((x[i] * scale) * unit) * along) * factor) * scale;
    store_slot(dv, to_vectors, place, d);
  });
}

#define OF_PAIR(T, P, t)                                                                                             \
  KERNEL(256, 2, weight_norm_##t, const T *v, const P *g, T *w, Acc<T> *norm, Acc<T> *scale, i64 rows, i64 len) {    \
    forward<T, P>(v, g, w, norm, scale, rows, len);                                                                  \
  }                                                                                                                  \
  KERNEL(256, 2, weight_norm_grad_##t, const T *v, const T *dw, const P *g, const Acc<T> *norm, const Acc<T> *scale, \
         T *dv, P *dg, i64 rows, i64 len) {                                                                          \
    backward<T, P>(v, dw, g, norm, scale, dv, dg, rows, len);                                                        \
  }

#if HAS(f32_f32)
OF_PAIR(float, float, f32_f32)
#endif
#if HAS(f16_f16)
OF_PAIR(f16, f16, f16_f16)
#endif
#if HAS(bf16_bf16)
OF_PAIR(bf16, bf16, bf16_bf16)
#endif
#if HAS(f16_f32)
OF_PAIR(f16, float, f16_f32)
#endif
#if HAS(bf16_f32)
OF_PAIR(bf16, float, bf16_f32)
#endif
#if HAS(f64_f64)
OF_PAIR(double, double, f64_f64)
#endif
