// Weights and biases that are spread wider than channels, residuals, and activations: y = act(x_hat * w + b) for each
// element of a tensor [outer, middle, inner], by statistics that other kernels have formed, or by none.
#include "functions.cuh"
#include "planes.cuh"

// The bits of `flags`.
enum {
  // Round the normalized value to T before it is multiplied by the weight.
  ROUND_FIRST = 1,
  // `grad` is the gradient of the normalized value, not that of the value before the activation.
  TIMES_WEIGHT = 2
};

// Where the weight of element (o, m, i) is: at o * outer + m * middle + i * inner. Where its statistics are: at
// (o * outer + m * middle) / per.
struct Layout {
  u64 total, middle, inner;
  u64 w_outer, w_middle, w_inner;
  u64 s_outer, s_middle, s_per;
};

template <class T, class P> struct Element {
  typedef Acc<T> A;
  static constexpr int SIZE = Lanes<T>::count;
  Layout at;
  const P *weight, *bias;
  const A *mean, *rest, *third;
  int of_var;
  double eps;
  A offset;

  // f(k, normal, weight, bias) for the elements of a slot.
  template <class F> __device__ __forceinline__ void each(Place<T> place, F f) const {
    const u64 row = divide(place.at, at.inner);
    u64 o = divide(row, at.middle), m = row - o * at.middle, i = place.at - row * at.inner;
    u64 base = o * at.w_outer + m * at.w_middle;
    Normal<A> normal(mean, rest, third, of_var, eps, divide(o * at.s_outer + m * at.s_middle, at.s_per));
    A w, b;
    get(base + i * at.w_inner, w, b);
#pragma unroll
    for (int k = 0; k < SIZE; ++k) {
      if (!place.has(k)) continue;
      if (k) {
        if (++i == at.inner) {
          i = 0;
          if (++m == at.middle) {
            m = 0;
            ++o;
          }
          base = o * at.w_outer + m * at.w_middle;
          normal = Normal<A>(mean, rest, third, of_var, eps, divide(o * at.s_outer + m * at.s_middle, at.s_per));
          get(base, w, b);
        } else if (at.w_inner) {
          get(base + i * at.w_inner, w, b);
        }
      }
      f(k, normal, w, b);
    }
  }
  __device__ __forceinline__ void get(u64 i, A &w, A &b) const {
    w = weight ? (A)load(weight + i) + offset : A(1);
    b = bias ? (A)load(bias + i) : A(0);
  }
};

template <class T> __device__ __forceinline__ Place<T> slot_of(u64 slot, u64 total) {
  constexpr int SIZE = Lanes<T>::count;
  Place<T> place;
  place.at = slot * SIZE;
  place.low = 0;
  place.high = total <= place.at ? 0 : total - place.at < SIZE ? (int)(total - place.at) : SIZE;
  return place;
}

template <class T> __device__ __forceinline__ Acc<T> standardized(const Normal<Acc<T>> &n, Acc<T> v, int flags) {
  const Acc<T> h = n.distance(v) * n.inv_std;
  return flags & ROUND_FIRST ? rounded(h, (const T *)0) : h;
}

// `residual`, of the type of x, is added in place of a bias.
template <class T, class P>
__device__ __forceinline__ void pointwise_forward(const T *x, const T *residual, T *y, const Element<T, P> &element,
                                                  int flags, int activation, double slope) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  const u64 total = element.at.total;
  const Place<T> place = slot_of<T>(block_of_list() * blockDim.x + threadIdx.x, total);
  if (place.high == 0) return;
  A v[SIZE], r[SIZE];
  unpack(load_slot(x, aligned(x), place, total), v, (const T *)0);
  if (residual) unpack(load_slot(residual, aligned(residual), place, total), r, (const T *)0);
  element.each(place, [&](int k, const Normal<A> &normal, A w, A b) {
    const A u = fma_(standardized<T>(normal, v[k], flags), w, residual ? r[k] : b);
    v[k] = activated(activation, (A)slope, u);
  });
  store_slot(y, aligned(y), place, v);
}

// With d = dy * act'(u), any of: `grad`, d or d * w; `wide`, x in the type of sums; dx of statistics that do not depend on
// x; and the gradients of weights and biases that have one element each, d * x_hat and d.
template <class T, class P>
__device__ __forceinline__ void pointwise_backward(const T *x, const T *dy, Acc<T> *grad, Acc<T> *wide, T *dx, P *dweight,
                                                   P *dbias, const Element<T, P> &element, int flags, int activation,
                                                   double slope) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  const u64 total = element.at.total;
  const Place<T> place = slot_of<T>(block_of_list() * blockDim.x + threadIdx.x, total);
  if (place.high == 0) return;
  A v[SIZE], d[SIZE];
  unpack(load_slot(x, aligned(x), place, total), v, (const T *)0);
  unpack(load_slot(dy, aligned(dy), place, total), d, (const T *)0);
  A through[SIZE];
  element.each(place, [&](int k, const Normal<A> &normal, A w, A b) {
    const u64 i = place.at + k;
    const A h = standardized<T>(normal, v[k], flags);
    const A g = activation == IDENTITY ? d[k] : d[k] * slope_of(activation, (A)slope, fma_(h, w, b));
    if (dweight) store(dweight + i, (Acc<P>)(g * h));
    if (dbias) store(dbias + i, (Acc<P>)g);
    if (grad) grad[i] = flags & TIMES_WEIGHT ? g * w : g;
    if (wide) wide[i] = v[k];
    through[k] = (g * w) * normal.inv_std;
  });
  if (dx) store_slot(dx, aligned(dx), place, through);
}

#define LAYOUT                                                                                                          \
  i64 total, i64 middle, i64 inner, i64 w_outer, i64 w_middle, i64 w_inner, i64 s_outer, i64 s_middle, i64 s_per
#define ELEMENT(T, P)                                                                                                   \
  (Element<T, P>{Layout{(u64)total, (u64)middle, (u64)inner, (u64)w_outer, (u64)w_middle, (u64)w_inner, (u64)s_outer,   \
                        (u64)s_middle, (u64)s_per},                                                                     \
                 weight, bias, mean, rest, third, of_var, eps, (Acc<T>)offset})
#define ARGUMENTS(T, P)                                                                                                 \
  const P *weight, const P *bias, const Acc<T> *mean, const Acc<T> *rest, const Acc<T> *third, LAYOUT, int of_var,      \
      double eps, double offset, int flags, int activation, double slope
#define OF_PAIR(T, P, t)                                                                                                \
  KERNEL(256, 2, pointwise_forward_##t, const T *x, const T *residual, T *y, ARGUMENTS(T, P)) {                         \
    pointwise_forward<T, P>(x, residual, y, ELEMENT(T, P), flags, activation, slope);                                   \
  }                                                                                                                     \
  KERNEL(256, 2, pointwise_backward_##t, const T *x, const T *dy, Acc<T> *grad, Acc<T> *wide, T *dx, P *dweight,        \
         P *dbias, ARGUMENTS(T, P)) {                                                                                   \
    pointwise_backward<T, P>(x, dy, grad, wide, dx, dweight, dbias, ELEMENT(T, P), flags, activation, slope);           \
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
