// Weight norm, unit rows, and lengths: each row of v [rows, len] at a length g of its own, or at one. A row is a team's: a
// warp's, or a block's.
#include "slots.cuh"

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

// What keeps the lengths of short rows from zero; the numbers are those of geometry::weight.
enum {
  // `least` in place of the length of a row that is shorter.
  BELOW = 0,
  // `least` in place of the length of a row that is not longer.
  UP_TO = 1,
  // `least` is added to the sum of the squares.
  INSIDE = 2
};

// w = g · v / ‖v‖, if it is asked for. Saved: ‖scale · v‖ and scale, a power of two that keeps the squares from over- and
// underflow; −1 where the length does not change with the row. `lengths`, if it is asked for, takes ‖v‖.
template <class T, class P>
__device__ __forceinline__ void forward(const T *v, const P *g, T *w, Acc<T> *norm_out, Acc<T> *scale_out, u64 rows,
                                        u64 len, int floor, double least, Acc<T> *lengths) {
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
  const A length = norm / scale, bound = (A)least;
  const bool fixed = floor == BELOW ? length < bound : floor == UP_TO && length <= bound;
  if (fixed) {
    norm = bound;
    scale = 1;
  } else if (floor == INSIDE) {
    // Beside the number, what was scaled up is zero.
    norm = scale > A(1) ? sqrt_(length * length + bound) : sqrt_(norm * norm + bound * scale * scale);
    scale = scale > A(1) ? A(1) : scale;
  }
  // A row of zeros has no direction.
  const A factor = norm == A(0) ? A(0) : (g ? (A)load(g + row) : A(1)) / norm;
  if (threadIdx.x == 0) {
    norm_out[row] = norm;
    scale_out[row] = fixed ? A(-1) : scale;
    if (lengths) lengths[row] = length;
  }
  if (!w) return;
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
  const bool fixed = scales[row] < A(0);
  const A norm = norms[row], scale = fixed ? A(1) : scales[row], unit = norm == A(0) ? A(0) : A(1) / norm;
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
  if (fixed) along = 0;
  const A factor = (g ? (A)load(g + row) : A(1)) * unit;
  for_slots<T, 4>(v, start, len, limit, [&](const A *x, Place<T> place) {
    A d[Lanes<T>::count];
    unpack(load_slot(dw, dw_vectors, place, limit), d, (const T *)0);
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) d[i] = ((d[i] - ((x[i] * scale) * unit) * along) * factor) * scale;
    store_slot(dv, to_vectors, place, d);
  });
}

#define OF_PAIR(T, P, t)                                                                                             \
  KERNEL(256, 2, weight_norm_##t, const T *v, const P *g, T *w, Acc<T> *norm, Acc<T> *scale, i64 rows, i64 len,      \
         int floor, double least, Acc<T> *lengths) {                                                                 \
    forward<T, P>(v, g, w, norm, scale, rows, len, floor, least, lengths);                                           \
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
