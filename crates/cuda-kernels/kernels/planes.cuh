// Slots, walks over planes, and moments, for channels.cu and groups.cu.
#pragma once
#include "common.cuh"

typedef unsigned long long u64;

__device__ __forceinline__ u64 divide(u64 a, u64 b) {
  return ((a | b) >> 32) == 0 ? (u64)((unsigned)a / (unsigned)b) : a / b;
}

// The block's place in a list of blocks, which has several lines where it is longer than a grid is wide. The last line may
// have blocks beyond the list's end.
__device__ __forceinline__ u64 block_of_list() { return (u64)blockIdx.y * gridDim.x + blockIdx.x; }
// The same where blockIdx.y counts something else.
__device__ __forceinline__ u64 block_across() { return (u64)blockIdx.z * gridDim.x + blockIdx.x; }

// A slot: the 16 bytes at a multiple of 16 bytes from a tensor's start. Of a slot at the end of a plane only the elements
// from `low` on and before `high` are the plane's.
template <class T> struct Place {
  u64 at;
  int low, high;
  static constexpr int SIZE = 16 / sizeof(T);
  __device__ __forceinline__ bool whole() const { return high - low == SIZE; }
  __device__ __forceinline__ bool has(int i) const { return i >= low && i < high; }
};

__device__ __forceinline__ bool aligned(const void *p) { return ((u64)p & 15) == 0; }

// Element `i` of what `r` has, which was zero.
__device__ __forceinline__ void put(Raw &r, int i, const f16 *p) { r.w[i / 2] |= (unsigned)p->bits << 16 * (i % 2); }
__device__ __forceinline__ void put(Raw &r, int i, const bf16 *p) { r.w[i / 2] |= (unsigned)p->bits << 16 * (i % 2); }
__device__ __forceinline__ void put(Raw &r, int i, const float *p) { r.w[i] = __float_as_uint(*p); }
__device__ __forceinline__ void put(Raw &r, int i, const double *p) { double_to_words(*p, &r.w[2 * i], &r.w[2 * i + 1]); }

// Makes zero of what is not the plane's.
template <class T> __device__ __forceinline__ void keep(Raw &r, Place<T> place) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (sizeof(T) == 2) {
      r.w[j] &= (place.has(2 * j) ? 0xffffu : 0u) | (place.has(2 * j + 1) ? 0xffff0000u : 0u);
    } else {
      r.w[j] = place.has(sizeof(T) == 4 ? j : j / 2) ? r.w[j] : 0u;
    }
  }
}

// What is not the plane's is zero. `vectors`: the tensor's start is a multiple of 16 bytes. All 16 bytes are read where the
// tensor, which has `limit` elements, has them.
template <class T> __device__ __forceinline__ Raw load_slot(const T *p, bool vectors, Place<T> place, u64 limit) {
  if (vectors && place.high > place.low && place.at + Place<T>::SIZE <= limit) {
    Raw r = load_raw(p + place.at);
    if (!place.whole()) keep(r, place);
    return r;
  }
  Raw r = zero_raw();
#pragma unroll
  for (int i = 0; i < Place<T>::SIZE; ++i)
    if (place.has(i)) put(r, i, p + place.at + i);
  return r;
}

template <class T> __device__ __forceinline__ void store_slot(T *p, bool vectors, Place<T> place, const Acc<T> *v) {
  if (vectors && place.whole()) {
    store_raw(p + place.at, pack(v, (const T *)0));
    return;
  }
#pragma unroll
  for (int i = 0; i < Place<T>::SIZE; ++i)
    if (place.has(i)) store(p + place.at + i, v[i]);
}

// The planes of a channel, one in each of `outer` samples.
template <class T> struct Planes {
  static constexpr int SIZE = 16 / sizeof(T);
  u64 start, stride, inner, slots, total;
  __device__ __forceinline__ Planes(u64 outer, u64 channels, u64 inner_, u64 channel) {
    start = channel * inner_;
    stride = channels * inner_;
    inner = inner_;
    // A plane that begins within a slot can touch one more.
    slots = inner_ % SIZE == 0 ? inner_ / SIZE : (inner_ + 2 * SIZE - 2) / SIZE;
    total = outer * slots;
  }
};

// Slot `slot` of the plane of `inner` elements that begins at `start`: nothing where it has no such slot.
template <class T> __device__ __forceinline__ Place<T> place_in(u64 start, u64 inner, u64 slot) {
  constexpr int SIZE = 16 / sizeof(T);
  Place<T> r;
  r.at = (start & ~(u64)(SIZE - 1)) + slot * SIZE;
  const u64 end = start + inner;
  r.low = r.at < start ? (int)(start - r.at) : 0;
  r.high = end <= r.at ? 0 : end - r.at < SIZE ? (int)(end - r.at) : SIZE;
  if (r.high < r.low) r.high = r.low;
  return r;
}

// The slots of a channel from one on, `step` apart.
template <class T> struct Walk {
  static constexpr int SIZE = 16 / sizeof(T);
  u64 start, plane_step, stride, inner;
  unsigned slot, slots, slot_step;
  // Of the current plane: where it begins in its first slot, how many slots end before its end, what is left then.
  unsigned head, full, tail;
  __device__ __forceinline__ Walk(const Planes<T> &p, u64 first, unsigned step) {
    const u64 sample = divide(first, p.slots);
    slots = (unsigned)p.slots;
    slot = (unsigned)(first - sample * p.slots);
    start = p.start + sample * p.stride;
    stride = p.stride;
    inner = p.inner;
    const unsigned samples = step / slots;
    slot_step = step - samples * slots;
    plane_step = samples * p.stride;
    enter();
  }
  __device__ __forceinline__ void enter() {
    head = (unsigned)start & (SIZE - 1);
    const u64 end = head + inner;
    full = (unsigned)(end / SIZE);
    tail = (unsigned)end & (SIZE - 1);
  }
  __device__ __forceinline__ Place<T> place() const {
    Place<T> r;
    r.at = start - head + (u64)slot * SIZE;
    r.low = slot == 0 ? (int)head : 0;
    r.high = slot < full ? SIZE : slot == full ? (int)tail : 0;
    return r;
  }
  __device__ __forceinline__ void advance() {
    slot += slot_step;
    start += plane_step;
    bool other = plane_step != 0;
    if (slot >= slots) {
      slot -= slots;
      start += stride;
      other = true;
    }
    if (other) enter();
  }
};

// a + b, and in `low` what it was rounded by.
template <class A> __device__ __forceinline__ A two_sum(A a, A b, A &low) {
  const A high = a + b, back = high - a;
  low = (a - (high - back)) + (b - back);
  return high;
}

// How many values, their mean in two numbers, and the sum of their squared distances from it.
template <class A> struct Moments {
  A count, mean, rest, m2;
  __device__ __forceinline__ Moments() : count(0), mean(0), rest(0), m2(0) {}
  // Of values whose distances from `about` sum up to `first`, their squares to `second`.
  __device__ __forceinline__ Moments(A count_, A about, A first, A second) {
    count = count_;
    const A off = first / count;
    mean = two_sum(about, off, rest);
    m2 = second - first * off;
  }
  // As Chan, Golub and LeVeque do.
  __device__ __forceinline__ void merge(const Moments &o) {
    if (count == A(0)) {
      *this = o;
      return;
    }
    const A all = count + o.count, share = o.count / all;
    const A d = (o.mean - mean) + (o.rest - rest);
    m2 = m2 + o.m2 + d * d * (count * share);
    A low;
    mean = two_sum(mean, rest + d * share, low);
    rest = low;
    count = all;
  }
};

// Adds what a slot's elements are beyond `about`, and the squares of that.
template <class T>
__device__ __forceinline__ void add_squares(const Raw &x, Place<T> place, Acc<T> about, Acc<T> &first, Acc<T> &second) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  A v[SIZE], one = 0, two = 0;
  unpack(x, v, (const T *)0);
  if (place.whole()) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const A d = v[i] - about;
      one += d;
      two = fma_(d, d, two);
    }
  } else {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const A d = place.has(i) ? v[i] - about : A(0);
      one += d;
      two = fma_(d, d, two);
    }
  }
  first += one;
  second += two;
}

template <class A> __device__ __forceinline__ Moments<A> about_zero(A count, A second) {
  Moments<A> m;
  m.count = count;
  m.m2 = second;
  return m;
}

// Merges moments into those of `count` values, `share` being the part that the new ones have of all.
template <class A>
__device__ __forceinline__ void merge_shared(A &mean, A &rest, A &m2, A count, A o_mean, A o_rest, A o_m2, A share) {
  // Nothing to merge with: the sum below would round the two parts of the mean to one.
  if (count == A(0)) {
    mean = o_mean;
    rest = o_rest;
    m2 = o_m2;
    return;
  }
  const A d = (o_mean - mean) + (o_rest - rest);
  m2 = m2 + o_m2 + d * d * (count * share);
  A low;
  mean = two_sum(mean, rest + d * share, low);
  rest = low;
}

// The mean of a few slots of one thread; zero of none.
template <class T, int U> __device__ __forceinline__ Acc<T> mean_of(const Raw *x, const Place<T> *place) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  A sum = 0;
  int count = 0;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    A v[SIZE], part = 0;
    unpack(x[u], v, (const T *)0);
    count += place[u].high - place[u].low;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) part += v[i];  // zero where there is nothing
    sum += part;
  }
  return count ? sum / (A)count : A(0);
}

// The sum over the threads of a team: the warp where blockDim.x is 32, else the block, which then has one row of threads.
template <class A> __device__ __forceinline__ A team_sum(A v, A *buffer) {
  return blockDim.x == 32 ? warp_sum(v) : block_sum(v, buffer);
}

// The moments of a team, on every thread, of those of its threads. `buffer` has 4 · 32 places.
template <class A> __device__ __forceinline__ Moments<A> team_moments(const Moments<A> &m, A *buffer, bool center) {
  const A count = team_sum(m.count, buffer);
  Moments<A> all;
  all.count = count;
  if (!center) {
    all.m2 = team_sum(m.m2, buffer + 32);
    return all;
  }
  // A thread without values counts for nothing.
  const A about = team_sum(m.count * m.mean, buffer + 32) / count;
  const A d = m.count == A(0) ? A(0) : (m.mean - about) + m.rest;
  const A first = team_sum(m.count * d, buffer + 64);
  const A second = team_sum(fma_(m.count * d, d, m.m2), buffer + 96);
  return Moments<A>(count, about, first, second);
}

// The biased variance; NaN stays.
template <class A> __device__ __forceinline__ A variance(A m2, A count) {
  const A v = m2 / count;
  return v < A(0) ? A(0) : v;
}
template <class A> __device__ __forceinline__ A inverse_root(A var, double eps) { return A(1) / sqrt_(var + (A)eps); }

// What a channel is normalized by, as it is saved: mean, what it was rounded by, 1/σ, and the biased variance.
template <class A> struct Statistics {
  A *mean, *rest, *inv_std, *var;
  __device__ __forceinline__ void write(u64 i, A m, A r, A s, A v) const {
    mean[i] = m;
    rest[i] = r;
    inv_std[i] = s;
    var[i] = v;
  }
};

// The weight and bias of the elements of a row: one pair for each `span` of them.
template <class T, class P> struct Pairs {
  typedef Acc<T> A;
  static constexpr int SIZE = Lanes<T>::count;
  const P *weight, *bias;
  u64 first, span;
  bool one;  // the whole row has one pair
  A w, b;
  // Row `row` has `inner / span` pairs and is followed by `period - 1` others before the pairs repeat.
  __device__ __forceinline__ Pairs(const P *weight_, const P *bias_, u64 row, u64 inner, u64 span_, u64 period) {
    weight = weight_;
    bias = bias_;
    span = span_;
    one = span == inner;
    first = (row - divide(row, period) * period) * (one ? 1 : divide(inner, span));
    w = 1;
    b = 0;
    if (one) get(first, w, b);
  }
  __device__ __forceinline__ void get(u64 i, A &w_, A &b_) const {
    w_ = weight ? (A)load(weight + i) : A(1);
    b_ = bias ? (A)load(bias + i) : A(0);
  }
  // For the elements of a slot, the row beginning at `start`: f(i, weight, bias).
  template <class F> __device__ __forceinline__ void each(Place<T> place, u64 start, F f) const {
    if (one) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) f(i, w, b);
      return;
    }
    if (place.high <= place.low) return;
    const u64 from = place.at + place.low - start;
    u64 k = divide(from, span);
    u64 left = (k + 1) * span - from;  // elements until the next pair
    A w_, b_;
    get(first + k, w_, b_);
    if (left >= (u64)(place.high - place.low)) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) f(i, w_, b_);
      return;
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      if (!place.has(i)) {
        f(i, A(0), A(0));
        continue;
      }
      if (left == 0) {
        get(first + ++k, w_, b_);
        left = span;
      }
      --left;
      f(i, w_, b_);
    }
  }
};

// What a channel is normalized by. Without a mean it is zero, without a third statistic 1/σ is one: y = x · weight + bias.
template <class A> struct Normal {
  A mean, rest, inv_std;
  // `third` has 1/σ, or the variance where `of_var` is set.
  __device__ __forceinline__ Normal(const A *mean_, const A *rest_, const A *third, int of_var, double eps, u64 i) {
    mean = mean_ ? mean_[i] : A(0);
    rest = rest_ ? rest_[i] : A(0);
    inv_std = !third ? A(1) : of_var ? inverse_root(third[i], eps) : third[i];
  }
  __device__ __forceinline__ Normal(A m, A r, A s) : mean(m), rest(r), inv_std(s) {}
  __device__ __forceinline__ A distance(A v) const { return (v - mean) - rest; }
  // The second number of the mean is small: it goes into the bias.
  __device__ __forceinline__ A of(A v, A weight, A bias) const {
    const A scale = inv_std * weight;
    return fma_(v - mean, scale, fma_(-rest, scale, bias));
  }
};

// dx = 1/σ · (dy · w − mean(dy · w) − x̂ · mean(dy · w · x̂)), `along` being the last mean times 1/σ.
template <class A> struct Back {
  A mean, inv_std, slope, shift;
  __device__ __forceinline__ Back(const Normal<A> &n, A mean_g, A along) {
    mean = n.mean;
    inv_std = n.inv_std;
    slope = along * inv_std;
    shift = fma_(-n.rest, slope, mean_g * inv_std);
  }
  __device__ __forceinline__ A of(A v, A dy, A weight) const {
    return fma_(dy, inv_std * weight, -fma_(v - mean, slope, shift));
  }
};

template <class A> __device__ __forceinline__ void write_statistics(Statistics<A> out, u64 i, const Moments<double> &m, double eps) {
  const A mean = (A)m.mean, var = (A)variance(m.m2, m.count);
  out.write(i, mean, (A)((m.mean - (double)mean) + m.rest), inverse_root(var, eps), var);
}

// Adds dy · (x − high) and dy over a slot.
template <class T>
__device__ __forceinline__ void add_products(const Raw &x, const Raw &dy, Acc<T> high, Acc<T> &along, Acc<T> &sum) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  A v[SIZE], g[SIZE], one = 0, two = 0;
  unpack(x, v, (const T *)0);
  unpack(dy, g, (const T *)0);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    one = fma_(g[i], v[i] - high, one);  // dy is zero where there is nothing
    two += g[i];
  }
  along += one;
  sum += two;
}

// Σ w · (x − mean) from Σ w · (x − high) and Σ w, `rest` being what `high` leaves of the mean. Not where it is zero and
// the sum infinite.
template <class A> __device__ __forceinline__ A about_mean(A about_high, A rest, A sum) {
  return rest == A(0) ? about_high : about_high - rest * sum;
}

template <class A, class P>
__device__ __forceinline__ void write_grads(const Normal<A> &normal, double about_high, double sum, const P *weight,
                                            P *dweight, P *dbias, A *back_mean, A *back_along, u64 channel, double count,
                                            int center) {
  const double along = about_mean(about_high, (double)normal.rest, sum) * (double)normal.inv_std;
  if (dweight) store(dweight + channel, (Acc<P>)along);
  if (dbias) store(dbias + channel, (Acc<P>)sum);
  if (back_mean) {
    const double w = weight ? (double)load(weight + channel) : 1.;
    back_mean[channel] = center ? (A)(sum * w / count) : A(0);
    back_along[channel] = (A)(along * w / count * (double)normal.inv_std);
  }
}
