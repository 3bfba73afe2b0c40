// Softmax of the rows of x [rows, len], and its logarithm. A row is a team's: a warp's, or a block's.
#include "functions.cuh"
#include "slots.cuh"

// exp(x) / sum(exp(x)), or the logarithm of that. Saved: the largest element, and the sum of the exponentials less it.
template <class T>
__device__ __forceinline__ void softmax(const T *x, T *y, Acc<T> *largest_out, Acc<T> *sum_out, u64 rows, u64 len,
                                        int log) {
  typedef Acc<T> A;
  SHARED(A, buffer, 64);
  const u64 row = block_of_list() * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const u64 start = row * len, limit = rows * len;
  const bool to_vectors = aligned(y);
  // NaN is not the largest, and shows in the sum.
  A largest = least_of((A)0);
  for_slots<T, 4>(x, start, len, limit, [&](const A *v, Place<T> place) {
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) largest = place.has(i) && v[i] > largest ? v[i] : largest;
  });
  largest = team_largest(largest, buffer);
  A sum = 0;
  for_slots<T, 4>(x, start, len, limit, [&](const A *v, Place<T> place) {
    A part = 0;
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) part += place.has(i) ? exp_(v[i] - largest) : A(0);
    sum += part;
  });
  sum = team_sum(sum, buffer + 32);
  if (threadIdx.x == 0) {
    largest_out[row] = largest;
    sum_out[row] = sum;
  }
  const A last = log ? (A)log_((double)sum) : A(1) / sum;
  for_slots<T, 4>(x, start, len, limit, [&](A *v, Place<T> place) {
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) v[i] = log ? (v[i] - largest) - last : exp_(v[i] - largest) * last;
    store_slot(y, to_vectors, place, v);
  });
}

// y * (dy - sum(dy * y)), or of the logarithm dy - y * sum(dy).
template <class T>
__device__ __forceinline__ void softmax_grad(const T *x, const T *dy, const Acc<T> *largests, const Acc<T> *sums, T *dx,
                                             u64 rows, u64 len, int log) {
  typedef Acc<T> A;
  SHARED(A, buffer, 32);
  const u64 row = block_of_list() * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const u64 start = row * len, limit = rows * len;
  const bool dy_vectors = aligned(dy), to_vectors = aligned(dx);
  const A largest = largests[row], inverse = A(1) / sums[row];
  A along = 0;
  for_slots<T, 4>(x, start, len, limit, [&](const A *v, Place<T> place) {
    A d[Lanes<T>::count], part = 0;
    unpack(load_slot(dy, dy_vectors, place, limit), d, (const T *)0);
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i)
      if (place.has(i)) part += log ? d[i] : d[i] * (exp_(v[i] - largest) * inverse);
    along += part;
  });
  along = team_sum(along, buffer);
  for_slots<T, 4>(x, start, len, limit, [&](const A *v, Place<T> place) {
    A d[Lanes<T>::count];
    unpack(load_slot(dy, dy_vectors, place, limit), d, (const T *)0);
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) {
      const A y = exp_(v[i] - largest) * inverse;
      d[i] = log ? d[i] - y * along : y * (d[i] - along);
    }
    store_slot(dx, to_vectors, place, d);
  });
}

#define OF_X(T, t)                                                                                                    \
  KERNEL(256, 2, softmax_##t, const T *x, T *y, Acc<T> *largest, Acc<T> *sum, i64 rows, i64 len, int log) {           \
    softmax<T>(x, y, largest, sum, rows, len, log);                                                                   \
  }                                                                                                                   \
  KERNEL(256, 2, softmax_grad_##t, const T *x, const T *dy, const Acc<T> *largest, const Acc<T> *sum, T *dx, i64 rows, \
         i64 len, int log) {                                                                                          \
    softmax_grad<T>(x, dy, largest, sum, dx, rows, len, log);                                                         \
  }

OF_X(float, f32)
OF_X(f16, f16)
OF_X(bf16, bf16)
OF_X(double, f64)
