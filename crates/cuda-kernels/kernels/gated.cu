// RMS norm of rows that a second input gates: y = rms(x * act(gate)) * w, or y = rms(x) * w * act(gate), each group of
// neighboring columns by its own mean square. A group of a row is a team's: a warp's, or a block's. The weight is of the type
// of sums.
#include "functions.cuh"
#include "slots.cuh"

// The bits of `flags`.
enum {
  // Round the normalized value to T before it is multiplied by the weight.
  ROUND_FIRST = 1,
  // The gate acts before the normalization.
  BEFORE = 2
};

// What is not the group's is zero.
template <class T> __device__ __forceinline__ void slot_values(const T *p, bool vectors, Place<T> place, u64 limit, Acc<T> *v) {
  unpack(load_slot(p, vectors, place, limit), v, (const T *)0);
}
// The same elements of a tensor of a wider type.
template <class T> __device__ __forceinline__ void slot_values(const float *p, bool, Place<T> place, u64, float *v) {
#pragma unroll
  for (int i = 0; i < Lanes<T>::count; ++i) v[i] = place.has(i) ? p[place.at + i] : 0.f;
}
template <class T> __device__ __forceinline__ void store_values(T *p, bool vectors, Place<T> place, const Acc<T> *v) {
  store_slot(p, vectors, place, v);
}
template <class T> __device__ __forceinline__ void store_values(float *p, bool, Place<T> place, const float *v) {
#pragma unroll
  for (int i = 0; i < Lanes<T>::count; ++i)
    if (place.has(i)) p[place.at + i] = v[i];
}
__device__ __forceinline__ void slot_values(const float *p, bool vectors, Place<float> place, u64 limit, float *v) {
  unpack(load_slot(p, vectors, place, limit), v, (const float *)0);
}
__device__ __forceinline__ void store_values(float *p, bool vectors, Place<float> place, const float *v) {
  store_slot(p, vectors, place, v);
}

template <class T> __device__ __forceinline__ Acc<T> rounded_if(Acc<T> v, int flags) {
  return flags & ROUND_FIRST ? rounded(v, (const T *)0) : v;
}

// One group of a row, whose columns begin at `column`.
template <class T, class G> struct Group {
  typedef Acc<T> A;
  u64 start, column, limit;
  const G *gate;
  bool gate_vectors, before;
  int activation;
  A slope;
  __device__ __forceinline__ Group(u64 item, u64 items, u64 len, u64 group, const G *gate_, int flags, int activation_,
                                   double slope_) {
    start = item * group;
    column = start - divide(start, len) * len;
    limit = items * group;
    gate = gate_;
    gate_vectors = aligned(gate_);
    before = gate_ && (flags & BEFORE);
    activation = activation_;
    slope = (A)slope_;
  }
  __device__ __forceinline__ void gates(Place<T> place, A *z) const { slot_values(gate, gate_vectors, place, limit, z); }
  // act(gate), or one.
  __device__ __forceinline__ void opened(Place<T> place, A *a) const {
    if (gate) gates(place, a);
#pragma unroll
    for (int i = 0; i < Lanes<T>::count; ++i) a[i] = gate ? activated(activation, slope, a[i]) : A(1);
  }
  __device__ __forceinline__ A weight_of(const A *weight, Place<T> place, int i) const {
    return weight && place.has(i) ? weight[column + (place.at + i - start)] : A(1);
  }
};

template <class T, class G>
__device__ __forceinline__ void gated(const T *x, const G *gate, const Acc<T> *weight, T *y, Acc<T> *rstds, u64 items,
                                      u64 len, u64 group, double eps, int flags, int activation, double slope) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  SHARED(A, buffer, 32);
  const u64 item = block_of_list() * blockDim.y + threadIdx.y;
  if (item >= items) return;
  const Group<T, G> of(item, items, len, group, gate, flags, activation, slope);
  const bool to_vectors = aligned(y);
  A sum = 0;
  for_slots<T, 2>(x, of.start, group, of.limit, [&](A *v, Place<T> place) {
    A a[SIZE], part = 0;
    if (of.before) of.opened(place, a);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      if (!place.has(i)) continue;
      const A h = of.before ? v[i] * a[i] : v[i];
      part = fma_(h, h, part);
    }
    sum += part;
  });
  const A rstd = A(1) / sqrt_(team_sum(sum, buffer) / (A)group + (A)eps);
  if (threadIdx.x == 0 && rstds) rstds[item] = rstd;
  for_slots<T, 2>(x, of.start, group, of.limit, [&](A *v, Place<T> place) {
    A a[SIZE];
    of.opened(place, a);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const A h = of.before ? v[i] * a[i] : v[i];
      const A u = rounded_if<T>(h * rstd, flags) * of.weight_of(weight, place, i);
      v[i] = of.before ? u : u * a[i];
    }
    store_slot(y, to_vectors, place, v);
  });
}

// `products`, if they are asked for, are what the gradients of the weights are sums over rows of.
template <class T, class G>
__device__ __forceinline__ void gated_grad(const T *x, const G *gate, const Acc<T> *weight, const T *dy,
                                           const Acc<T> *rstds, T *dx, G *dgate, Acc<T> *products, u64 items, u64 len,
                                           u64 group, int flags, int activation, double slope) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  SHARED(A, buffer, 32);
  const u64 item = block_of_list() * blockDim.y + threadIdx.y;
  if (item >= items) return;
  const Group<T, G> of(item, items, len, group, gate, flags, activation, slope);
  const bool dy_vectors = aligned(dy), to_vectors = aligned(dx), gate_vectors = aligned(dgate);
  const A rstd = rstds[item];
  A along = 0;
  for_slots<T, 2>(x, of.start, group, of.limit, [&](A *v, Place<T> place) {
    A a[SIZE], d[SIZE], part = 0;
    of.opened(place, a);
    slot_values(dy, dy_vectors, place, of.limit, d);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      if (!place.has(i)) continue;
      const A h = of.before ? v[i] * a[i] : v[i], g = of.before ? d[i] : d[i] * a[i];
      part = fma_(g * of.weight_of(weight, place, i), h, part);
    }
    along += part;
  });
  along = team_sum(along, buffer) * rstd / (A)group;
  for_slots<T, 2>(x, of.start, group, of.limit, [&](A *v, Place<T> place) {
    A a[SIZE], d[SIZE], z[SIZE];
    of.opened(place, a);
    slot_values(dy, dy_vectors, place, of.limit, d);
    if (gate) of.gates(place, z);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const A h = of.before ? v[i] * a[i] : v[i], g = of.before ? d[i] : d[i] * a[i];
      const A w = of.weight_of(weight, place, i), hat = h * rstd, normal = rounded_if<T>(hat, flags);
      const A dh = (g * w - hat * along) * rstd;
      if (products && place.has(i)) products[place.at + i] = g * normal;
      if (gate) {
        const A rest = slope_of(of.activation, of.slope, z[i]) * (of.before ? v[i] : d[i]);
        z[i] = of.before ? dh * rest : normal * rest * w;
      }
      v[i] = of.before ? dh * a[i] : dh;
    }
    store_slot(dx, to_vectors, place, v);
    if (dgate) store_values(dgate, gate_vectors, place, z);
  });
}

#define OF_PAIR(T, G, t)                                                                                               \
  KERNEL(256, 2, gated_##t, const T *x, const G *gate, const Acc<T> *weight, T *y, Acc<T> *rstd, i64 items, i64 len,   \
         i64 group, double eps, int flags, int activation, double slope) {                                             \
    gated<T, G>(x, gate, weight, y, rstd, items, len, group, eps, flags, activation, slope);                           \
  }                                                                                                                    \
  KERNEL(256, 2, gated_grad_##t, const T *x, const G *gate, const Acc<T> *weight, const T *dy, const Acc<T> *rstd,     \
         T *dx, G *dgate, Acc<T> *products, i64 items, i64 len, i64 group, int flags, int activation, double slope) {  \
    gated_grad<T, G>(x, gate, weight, dy, rstd, dx, dgate, products, items, len, group, flags, activation, slope);     \
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
