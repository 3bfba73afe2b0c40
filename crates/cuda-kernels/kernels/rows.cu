// LayerNorm and RmsNorm over the rows of x [rows, cols], each with or without a residual that is added first.
//
// A row is cut at the multiples of 16 bytes of memory, so that every access but those at its ends is 16 bytes wide
// whatever the number of columns. A vector that a row shares with its neighbor is loaded whole and what belongs to the
// neighbor is masked. Weights and biases, which begin with the row and not with the vector, are shifted into place.
//
// A team works on a row: a part of a warp, a warp, or a block. x, residual, y, sums, dy, dsum and dx begin at multiples
// of 16 bytes; parameters may begin anywhere.
//
// The rows of a sample share a row of weights and biases: gridDim.z samples follow each other, and a block has rows of
// one of them. Usually there is one sample.
#include "common.cuh"

// The bits of `flags`.
enum {
  // Round the normalized value to T before it is multiplied by the weight.
  ROUND_FIRST = 1
};

// The vectors of a row; I counts them.
template <class T, class I> struct Row {
  static constexpr int V = Lanes<T>::count;
  i64 base;  // the element that the first vector begins with: at the row's first element or before
  i64 end;   // of the tensor
  I vectors; // 0 where there is no row
  I whole;   // those that end before the tensor does
  int first; // the place of the row's first element in the first vector
  int last;  // the places of the last vector that are the row's
  __device__ __forceinline__ Row(i64 row, i64 rows, i64 cols, bool exists = true) {
    const i64 start = row * cols;
    first = (int)start & (V - 1);
    base = start - first;
    end = rows * cols;
    vectors = (I)((first + cols + V - 1) / V);
    last = (int)(first + cols - (i64)(vectors - 1) * V);
    limit(exists && row < rows);
  }
  __device__ __forceinline__ void limit(bool exists) {
    if (!exists) vectors = 0;
    const i64 left = (end - base) / V;
    whole = left < vectors ? (I)left : vectors;
  }
  // The row that begins `step` elements later, at the same place of a vector.
  __device__ __forceinline__ Row later(i64 step, bool exists) const {
    Row row = *this;
    row.base += step;
    row.limit(exists);
    return row;
  }
  // The places of vector g that are the row's: from lo to hi.
  __device__ __forceinline__ int lo(I g) const { return g == 0 ? first : 0; }
  __device__ __forceinline__ int hi(I g) const { return g >= vectors ? 0 : g == vectors - 1 ? last : V; }
  // The column of the first place of vector g; negative before the row.
  __device__ __forceinline__ i64 column(I g) const { return (i64)g * V - first; }
};

// The rows of the block's sample, and the weights that they share. Kernels without a register left (not MANY) have one
// sample.
template <bool MANY> struct Sample {
  i64 first, rows;
  __device__ __forceinline__ Sample(i64 all) : first(0), rows(all) {
    if (!MANY || gridDim.z == 1) return;
    rows = all / gridDim.z;
    first = blockIdx.z * rows;
  }
  template <class P> __device__ __forceinline__ P *of(P *p, i64 cols) const {
    return MANY && p && gridDim.z > 1 ? p + blockIdx.z * cols : p;
  }
};

// Elements outside lo..hi become zero.
template <class T> __device__ __forceinline__ void keep(Raw &r, int lo, int hi) {
  constexpr int size = (int)sizeof(T);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if (size >= 4) {
      const int i = w * 4 / size;
      if (i < lo || i >= hi) r.w[w] = 0;
    } else {
      if (2 * w < lo || 2 * w >= hi) r.w[w] &= 0xffff0000u;
      if (2 * w + 1 < lo || 2 * w + 1 >= hi) r.w[w] &= 0x0000ffffu;
    }
  }
}

// X is T, or what T is accumulated in: a vector of T has as many elements as N of X.
template <class X, class T> struct Wide {
  static constexpr int V = Lanes<T>::count, VX = Lanes<X>::count, N = V / VX;
};

// The vectors lane, lane + lanes, ... of the row from vector g0 on, N times 16 bytes each; zero where the row has no
// element.
template <class T, int PER, bool EVEN, class X, class I>
__device__ __forceinline__ void load_row(Raw *raw, const X *x, const Row<T, I> &row, I g0, int lanes) {
  constexpr int V = Lanes<T>::count, VX = Lanes<X>::count, N = Wide<X, T>::N;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const I g = g0 + k * lanes;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      raw[k * N + n] = zero_raw();
      if (g < (EVEN ? row.vectors : row.whole)) raw[k * N + n] = load_raw(x + row.base + (i64)g * V + n * VX);
    }
  }
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (EVEN) continue;
    const I g = g0 + k * lanes;
    const int lo = row.lo(g), hi = row.hi(g);
    if (lo == 0 && hi == V) continue;
    if (g >= row.whole && g < row.vectors) {
      // The tensor ends within the vector.
      Acc<X> v[V];
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = i >= lo && i < hi ? load(x + row.base + (i64)g * V + i) : Acc<X>(0);
#pragma unroll
      for (int n = 0; n < N; ++n) raw[k * N + n] = pack(v + n * VX, (const X *)nullptr);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) keep<X>(raw[k * N + n], lo - n * VX, hi - n * VX);
  }
}

// The values of a vector of T that lie as N of X.
template <class T, class X> __device__ __forceinline__ void values_of(const Raw *raw, Acc<T> *v, const X *) {
#pragma unroll
  for (int n = 0; n < Wide<X, T>::N; ++n) unpack(raw[n], v + n * Lanes<X>::count, (const X *)nullptr);
}

template <class T, bool EVEN, class X, class I>
__device__ __forceinline__ void store_vector(X *y, const Row<T, I> &row, I g, const Acc<T> *v) {
  constexpr int V = Lanes<T>::count, VX = Lanes<X>::count;
  X *const at = y + row.base + (i64)g * V;
  const int lo = row.lo(g), hi = row.hi(g);
  if (EVEN ? g < row.vectors : lo == 0 && hi == V) {
#pragma unroll
    for (int n = 0; n < Wide<X, T>::N; ++n) store_raw(at + n * VX, pack(v + n * VX, (const X *)nullptr));
  } else if (!EVEN) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i >= lo && i < hi) store(at + i, v[i]);
  }
}

// The parameters P of a vector of T: as many, in one or two vectors of their own.
template <class T, class P> struct Param {
  static constexpr int V = Lanes<T>::count, VP = Lanes<P>::count, N = V / VP;
  Raw r[N];
  // Those from column c on; columns that do not exist give anything. EVEN: c and p are multiples of a vector.
  template <bool EVEN> __device__ __forceinline__ void load_from(const P *p, i64 c, i64 cols) {
    if (EVEN) {
#pragma unroll
      for (int n = 0; n < N; ++n) r[n] = c < cols ? load_raw(p + c + n * VP) : zero_raw();
      return;
    }
    const int shift = (int)((i64)(reinterpret_cast<unsigned long long>(p) / sizeof(P)) + c) & (VP - 1);
    const i64 from = c - shift;
    if (from >= 0 && from + (N + (shift != 0)) * VP <= cols) {
      unsigned w[4 * N + 4];
#pragma unroll
      for (int n = 0; n <= N; ++n) {
        const Raw one = n < N || shift ? load_raw(p + from + n * VP) : zero_raw();
#pragma unroll
        for (int i = 0; i < 4; ++i) w[4 * n + i] = one.w[i];
      }
      const unsigned bytes = (unsigned)shift * (unsigned)sizeof(P);
#pragma unroll
      for (int i = 0; i < 4 * N + 2; ++i) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
      for (int i = 0; i < 4 * N + 1; ++i) w[i] = bytes & 4 ? w[i + 1] : w[i];
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) r[i / 4].w[i % 4] = __funnelshift_r(w[i], w[i + 1], bytes & 2 ? 16 : 0);
    } else {
      Acc<P> v[V];
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = c + i >= 0 && c + i < cols ? load(p + c + i) : Acc<P>(0);
#pragma unroll
      for (int n = 0; n < N; ++n) r[n] = pack(v + n * VP, (const P *)nullptr);
    }
  }
  // The same, or ones where p is null.
  template <bool EVEN> __device__ __forceinline__ void of(const P *p, i64 c, i64 cols) {
    if (p) return load_from<EVEN>(p, c, cols);
    Acc<P> v[VP];
#pragma unroll
    for (int i = 0; i < VP; ++i) v[i] = 1;
#pragma unroll
    for (int n = 0; n < N; ++n) r[n] = pack(v, (const P *)nullptr);
  }
  __device__ __forceinline__ void values(Acc<T> *v) {
#if !defined(EMULATED)
    // Unpacked once, before a loop over rows, they would take twice the registers: the compiler is not to know that they
    // stay the same.
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+r"(r[n].w[0]), "+r"(r[n].w[1]), "+r"(r[n].w[2]), "+r"(r[n].w[3]));
#endif
#pragma unroll
    for (int n = 0; n < N; ++n) unpack(r[n], v + n * VP, (const P *)nullptr);
  }
};

// Where the sums of x and residual are written; nowhere by a null pointer.
template <class T> struct Sums {
  T *rounded;
  Acc<T> *unrounded;
};

// Values that a thread holds of a row: as they lie in memory, or, where a residual is added, the unrounded sums.
template <class T, int PER, bool ADD> struct Held {
  static constexpr int V = Lanes<T>::count;
  Raw raw[PER];
  template <bool EVEN, class I>
  __device__ __forceinline__ void load_all(const T *x, const T *, Sums<T>, const Row<T, I> &row, I g0, int lanes) {
    load_row<T, PER, EVEN>(raw, x, row, g0, lanes);
  }
  template <bool EVEN, class I>
  __device__ __forceinline__ void take(const Raw *x, const Raw *, Sums<T>, const Row<T, I> &, I, int) {
#pragma unroll
    for (int k = 0; k < PER; ++k) raw[k] = x[k];
  }
  __device__ __forceinline__ void get(int k, Acc<T> *v) const { unpack(raw[k], v, (const T *)nullptr); }
};
template <class T, int PER> struct Held<T, PER, true> {
  static constexpr int V = Lanes<T>::count;
  Acc<T> sum[PER][V];
  template <bool EVEN, class I>
  __device__ __forceinline__ void load_all(const T *x, const T *residual, Sums<T> out, const Row<T, I> &row, I g0,
                                           int lanes) {
    Raw a[PER], b[PER];
    load_row<T, PER, EVEN>(a, x, row, g0, lanes);
    load_row<T, PER, EVEN>(b, residual, row, g0, lanes);
    take<EVEN>(a, b, out, row, g0, lanes);
  }
  template <bool EVEN, class I>
  __device__ __forceinline__ void take(const Raw *a, const Raw *b, Sums<T> out, const Row<T, I> &row, I g0, int lanes) {
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      Acc<T> v[V];
      unpack(a[k], sum[k], (const T *)nullptr);
      unpack(b[k], v, (const T *)nullptr);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[k][i] += v[i];
      if (out.rounded) store_vector<T, EVEN>(out.rounded, row, g0 + k * lanes, sum[k]);
      if (out.unrounded) store_vector<T, EVEN>(out.unrounded, row, g0 + k * lanes, sum[k]);
    }
  }
  __device__ __forceinline__ void get(int k, Acc<T> *v) const {
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = sum[k][i];
  }
};

// Sums over a team, on all of its threads. A team of a warp or less has blockDim.x lanes, a power of two; a team of a
// block calls with another half of `part` every time.
template <bool WARP, class A> __device__ __forceinline__ void team_sum2(A &a, A &b, A *part) {
  if (WARP) {
#pragma unroll
    for (int m = 16; m > 0; m >>= 1)
      if (blockDim.x > m) {
        a += __shfl_xor_sync(0xffffffffu, a, m);
        b += __shfl_xor_sync(0xffffffffu, b, m);
      }
  } else {
    block_sum2(a, b, part);
  }
}
template <bool WARP, class A> __device__ __forceinline__ A team_sum(A a, A *part) {
  if (WARP) {
#pragma unroll
    for (int m = 16; m > 0; m >>= 1)
      if (blockDim.x > m) a += __shfl_xor_sync(0xffffffffu, a, m);
    return a;
  }
  return block_sum(a, part);
}

template <class T, int PER, bool ADD>
__device__ __forceinline__ Acc<T> sum_of(const Held<T, PER, ADD> &held) {
  constexpr int V = Lanes<T>::count;
  Acc<T> sum = 0;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    Acc<T> v[V];
    held.get(k, v);
#pragma unroll
    for (int i = 0; i < V; ++i) sum += v[i];
  }
  return sum;
}
// The sums of the distances from `mean` and of their squares.
template <bool EVEN, class T, int PER, bool ADD, class I>
__device__ __forceinline__ void distances(const Held<T, PER, ADD> &held, const Row<T, I> &row, I g0, int lanes,
                                          Acc<T> mean, Acc<T> &first, Acc<T> &second) {
  constexpr int V = Lanes<T>::count;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const I g = g0 + k * lanes;
    if (g >= row.vectors) continue;
    const int lo = row.lo(g), hi = row.hi(g);
    const bool ends = lo > 0 || hi < V;
    Acc<T> v[V];
    held.get(k, v);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Acc<T> d = v[i] - mean;
      if (!EVEN) d = ends && (i < lo || i >= hi) ? Acc<T>(0) : d;
      first += d;
      second = fma_(d, d, second);
    }
  }
}
template <class T, int PER, bool ADD> __device__ __forceinline__ Acc<T> squares_of(const Held<T, PER, ADD> &held) {
  constexpr int V = Lanes<T>::count;
  Acc<T> sum = 0;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    Acc<T> v[V];
    held.get(k, v);
#pragma unroll
    for (int i = 0; i < V; ++i) sum = fma_(v[i], v[i], sum);
  }
  return sum;
}

// What a row is normalized by: the mean in two numbers, and one over the standard deviation.
template <class A> struct Stats {
  A mean, low, rstd;
  // `stats` is [3, rows], or [1, rows] without means.
  template <bool CENTER> __device__ __forceinline__ void write(A *stats, i64 row, i64 rows) const {
    if (CENTER) {
      stats[row] = mean;
      stats[rows + row] = low;
      stats[2 * rows + row] = rstd;
    } else {
      stats[row] = rstd;
    }
  }
  template <bool CENTER> __device__ __forceinline__ void read(const A *stats, i64 row, i64 rows) {
    if (row >= rows) {
      mean = low = rstd = 0;
    } else if (CENTER) {
      mean = stats[row];
      low = stats[rows + row];
      rstd = stats[2 * rows + row];
    } else {
      mean = low = 0;
      rstd = stats[row];
    }
  }
};

// (v - mean - low) * rstd: zero for all of a constant row.
template <bool CENTER, class A> __device__ __forceinline__ A normal_of(const Stats<A> &s, A v) {
  return CENTER ? ((v - s.mean) - s.low) * s.rstd : v * s.rstd;
}
// The same in fewer operations, with low * rstd taken once.
template <class A, bool CENTER> struct Normal {
  A mean, rest, rstd;
  __device__ __forceinline__ Normal(const Stats<A> &s) : mean(s.mean), rest(-(s.low * s.rstd)), rstd(s.rstd) {}
  __device__ __forceinline__ A operator()(A v) const { return CENTER ? fma_(v - mean, rstd, rest) : v * rstd; }
};

// Weight and bias of a thread's columns. HOLD: loaded once and kept, else loaded for every vector.
template <class T, class P, int PER, bool HOLD, bool EVEN> struct Affine {
  const P *weight, *bias;
  i64 cols;
  Param<T, P> w[HOLD ? PER : 1], b[HOLD ? PER : 1];
  template <class I>
  __device__ __forceinline__ Affine(const P *weight, const P *bias, const Row<T, I> &row, I g0, int lanes, i64 cols)
      : weight(weight), bias(bias), cols(cols) {
    if (!HOLD) return;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const i64 c = row.column(g0 + k * lanes);
      if (weight) w[HOLD ? k : 0].template load_from<EVEN>(weight, c, cols);
      if (bias) b[HOLD ? k : 0].template load_from<EVEN>(bias, c, cols);
    }
  }
  // v * (weight + offset) + bias for vector k, whose first column is c. Only RmsNorm has an offset.
  template <bool CENTER> __device__ __forceinline__ void apply(int k, i64 c, Acc<T> *v, Acc<T> offset) {
    constexpr int V = Lanes<T>::count;
    Acc<T> ws[V], bs[V];
    if (weight) {
      if (!HOLD) w[0].template load_from<EVEN>(weight, c, cols);
      w[HOLD ? k : 0].values(ws);
      if (!CENTER) {
#pragma unroll
        for (int i = 0; i < V; ++i) ws[i] += offset;
      }
    }
    if (bias) {
      if (!HOLD) b[0].template load_from<EVEN>(bias, c, cols);
      b[HOLD ? k : 0].values(bs);
    }
    if (weight && bias) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = fma_(v[i], ws[i], bs[i]);
    } else if (weight) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = v[i] * ws[i];
    } else if (bias) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = v[i] + bs[i];
    }
  }
};

template <bool CENTER, bool EVEN, class T, class P, int PER, bool ADD, bool HOLD, class I>
__device__ __forceinline__ void write_row(const Held<T, PER, ADD> &held, const Row<T, I> &row, I g0, int lanes,
                                          const Stats<Acc<T>> &stats, Affine<T, P, PER, HOLD, EVEN> &affine, T *y,
                                          Acc<T> offset, int flags) {
  constexpr int V = Lanes<T>::count;
  // Statistics alone are asked for.
  if (!y) return;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const I g = g0 + k * lanes;
    if (g >= row.vectors) continue;
    Acc<T> v[V];
    held.get(k, v);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] = normal_of<CENTER>(stats, v[i]);
    if (!CENTER && (flags & ROUND_FIRST)) {
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = rounded(v[i], (const T *)nullptr);
    }
    affine.template apply<CENTER>(k, row.column(g), v, offset);
    store_vector<T, EVEN>(y, row, g, v);
  }
}

template <class T, class P, bool CENTER, bool ADD, int PER, bool WARP, bool EVEN>
__device__ __forceinline__ void forward_row(const T *x, const T *residual, const P *weight, const P *bias, T *y,
                                            Sums<T> sums, Acc<T> *stats_out, i64 rows, i64 cols, double eps,
                                            double offset, int flags) {
  typedef Acc<T> A;
  constexpr int ADDED = ADD ? PER : 1;
  // What the registers have room for: the next row while this one is worked on, and the parameters.
  constexpr bool AHEAD = PER <= (ADD ? 2 : 4), HOLD = PER <= (sizeof(P) > sizeof(T) ? 1 : 2);
  SHARED(A, part, 192);
  const int lanes = (int)blockDim.x, lane = (int)threadIdx.x;
  const i64 slots = WARP ? (i64)gridDim.x * blockDim.y : (i64)gridDim.x;
  const i64 slot = WARP ? (i64)blockIdx.x * blockDim.y + threadIdx.y : (i64)blockIdx.x;
  const Sample<PER <= 2> sample(rows);
  const Row<T, int> home(sample.first + slot, rows, cols, slot < sample.rows);
  Affine<T, P, PER, HOLD, EVEN> affine(sample.of(weight, cols), sample.of(bias, cols), home, lane, lanes, cols);
  Raw next_x[PER], next_r[ADDED];
  if (AHEAD) {
    load_row<T, PER, EVEN>(next_x, x, home, lane, lanes);
    if (ADD) load_row<T, ADDED, EVEN>(next_r, residual, home, lane, lanes);
  }
  const i64 turns = (sample.rows + slots - 1) / slots, step = slots * cols;
  const A share = A(1) / A(cols);
  for (i64 turn = 0; turn < turns; ++turn) {
    const i64 index = slot + turn * slots;
    const Row<T, int> row = home.later(turn * step, index < sample.rows);
    Held<T, PER, ADD> held;
    if (AHEAD) {
      held.template take<EVEN>(next_x, next_r, sums, row, lane, lanes);
      if (turn + 1 < turns) {
        const Row<T, int> coming = home.later((turn + 1) * step, index + slots < sample.rows);
        load_row<T, PER, EVEN>(next_x, x, coming, lane, lanes);
        if (ADD) load_row<T, ADDED, EVEN>(next_r, residual, coming, lane, lanes);
      }
    } else {
      held.template load_all<EVEN>(x, residual, sums, row, lane, lanes);
    }
    Stats<A> stats;
    stats.mean = stats.low = 0;
    A var;
    if (CENTER) {
      // Between two uses of one place of `part` there is always the other barrier.
      stats.mean = team_sum<WARP>(sum_of<T, PER, ADD>(held), part) * share;
      A first = 0, second = 0;
      distances<EVEN>(held, row, lane, lanes, stats.mean, first, second);
      team_sum2<WARP>(first, second, part + 64);
      // A division: of a constant row nothing is to be left.
      stats.low = first / A(cols);
      var = fma_(-stats.low, stats.low, second * share);
    } else {
      var = team_sum<WARP>(squares_of<T, PER, ADD>(held), part + (turn & 1) * 32) * share;
    }
    stats.rstd = A(1) / sqrt_(var + A(eps));
    write_row<CENTER, EVEN>(held, row, lane, lanes, stats, affine, y, A(offset), flags);
    if (stats_out && lane == 0 && row.vectors) stats.template write<CENTER>(stats_out, sample.first + index, rows);
  }
}

// A row of any length: read again for each step, from the cache as far as it holds the row. A thread adds up a step's
// few values before it adds them to its total.
template <class T, class P, bool CENTER, bool ADD>
__device__ __forceinline__ void forward_long(const T *x, const T *residual, const P *weight, const P *bias, T *y,
                                             Sums<T> sums, Acc<T> *stats_out, i64 rows, i64 cols, double eps,
                                             double offset, int flags) {
  typedef Acc<T> A;
  constexpr int PER = 4;
  SHARED(A, part, 128);
  const int lanes = (int)blockDim.x;
  const i64 step = (i64)PER * lanes;
  const Sample<true> sample(rows);
  const i64 index = sample.first + blockIdx.x;
  const Row<T, i64> row(index, rows, cols);
  Affine<T, P, PER, false, false> affine(sample.of(weight, cols), sample.of(bias, cols), row, (i64)threadIdx.x, lanes,
                                         cols);
  Held<T, PER, ADD> held;
  Stats<A> stats;
  stats.mean = stats.low = 0;
  A var;
  A total = 0;
  for (i64 g = threadIdx.x; g < row.vectors; g += step) {
    held.template load_all<false>(x, residual, sums, row, g, lanes);
    total += CENTER ? sum_of<T, PER, ADD>(held) : squares_of<T, PER, ADD>(held);
  }
  total = team_sum<false>(total, part) / A(cols);
  if (CENTER) {
    stats.mean = total;
    A first = 0, second = 0;
    for (i64 g = threadIdx.x; g < row.vectors; g += step) {
      A few = 0, few_squares = 0;
      held.template load_all<false>(x, residual, Sums<T>{nullptr, nullptr}, row, g, lanes);
      distances<false>(held, row, g, lanes, stats.mean, few, few_squares);
      first += few;
      second += few_squares;
    }
    team_sum2<false>(first, second, part + 64);
    stats.low = first / A(cols);
    var = fma_(-stats.low, stats.low, second / A(cols));
  } else {
    var = total;
  }
  stats.rstd = A(1) / sqrt_(var + A(eps));
  for (i64 g = threadIdx.x; g < row.vectors; g += step) {
    held.template load_all<false>(x, residual, Sums<T>{nullptr, nullptr}, row, g, lanes);
    write_row<CENTER, false>(held, row, g, lanes, stats, affine, y, A(offset), flags);
  }
  if (stats_out && threadIdx.x == 0) stats.template write<CENTER>(stats_out, index, rows);
}

// dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) with g = dy * weight, and sums over rows of dy * x_hat and of dy.
//
// A team takes the rows slot, slot + slots, ...: where a team has more than one row, `slots` is a multiple of the
// elements of a vector, so that all its rows begin at the same place of a vector and a thread's columns stay the same.
// It keeps their sums in registers. `partial` is [samples, gridDim.x, 2, cols], or null where no parameter's gradient is wanted.
//
// X, the type of x and dx, is T, or its accumulator's where x is an unrounded sum.
template <class X, class T, class P, bool CENTER, bool ADD, int PER, bool WARP, bool EVEN>
__device__ __forceinline__ void backward_rows(const X *x, const T *residual, const P *weight, const T *dy,
                                              const T *dsum, const Acc<T> *stats_in, X *dx, Acc<T> *partial, i64 rows,
                                              i64 cols, double offset, int flags) {
  typedef Acc<T> A;
  constexpr int V = Lanes<T>::count, N = Wide<X, T>::N;
  constexpr int ADDED = ADD ? PER : 1;
  // What the registers have room for: the next row while this one is worked on, and the weights.
  constexpr bool AHEAD = (N + (ADD ? 2 : 1)) * PER <= 4, KEEP_WEIGHT = PER <= 2;
  // The sums of a row, twice; after the last row, the sums of all teams of the block for each column.
  SHARED(A, part, WARP ? 256 * PER * V * 2 : 128);
  const int lanes = (int)blockDim.x, lane = (int)threadIdx.x;
  const i64 slots = WARP ? (i64)gridDim.x * blockDim.y : (i64)gridDim.x;
  const i64 slot = WARP ? (i64)blockIdx.x * blockDim.y + threadIdx.y : (i64)blockIdx.x;
  const Sample<PER <= 2> sample(rows);
  const Row<T, int> home(sample.first + slot, rows, cols, slot < sample.rows);
  weight = sample.of(weight, cols);

  Param<T, P> w[KEEP_WEIGHT ? PER : 1];
  A dweight[PER][V], dbias[PER][V];
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (KEEP_WEIGHT) w[k].template of<EVEN>(weight, home.column(lane + k * lanes), cols);
#pragma unroll
    for (int i = 0; i < V; ++i) dweight[k][i] = dbias[k][i] = 0;
  }
  const A shift = weight ? A(offset) : A(0), share = A(1) / A(cols);
  const i64 step = slots * cols;

  Raw next_x[PER * N], next_dy[PER], next_r[ADDED];
  Stats<A> next;
  if (AHEAD) {
    load_row<T, PER, EVEN>(next_x, x, home, lane, lanes);
    load_row<T, PER, EVEN>(next_dy, dy, home, lane, lanes);
    if (ADD) load_row<T, ADDED, EVEN>(next_r, residual, home, lane, lanes);
    next.template read<CENTER>(stats_in, sample.first + slot, rows);
  }
  const i64 turns = (sample.rows + slots - 1) / slots;
  for (i64 turn = 0; turn < turns; ++turn) {
    const i64 index = slot + turn * slots;
    const Row<T, int> row = home.later(turn * step, index < sample.rows);
    Raw now_x[PER * N], now_dy[PER], now_r[ADDED];
    Stats<A> stats;
    if (AHEAD) {
#pragma unroll
      for (int k = 0; k < PER; ++k) {
#pragma unroll
        for (int n = 0; n < N; ++n) now_x[k * N + n] = next_x[k * N + n];
        now_dy[k] = next_dy[k];
        if (ADD) now_r[k] = next_r[k];
      }
      stats = next;
      if (turn + 1 < turns) {
        const Row<T, int> coming = home.later((turn + 1) * step, index + slots < sample.rows);
        load_row<T, PER, EVEN>(next_x, x, coming, lane, lanes);
        load_row<T, PER, EVEN>(next_dy, dy, coming, lane, lanes);
        if (ADD) load_row<T, ADDED, EVEN>(next_r, residual, coming, lane, lanes);
        next.template read<CENTER>(stats_in, sample.first + index + slots, rows);
      }
    } else {
      load_row<T, PER, EVEN>(now_x, x, row, lane, lanes);
      load_row<T, PER, EVEN>(now_dy, dy, row, lane, lanes);
      if (ADD) load_row<T, ADDED, EVEN>(now_r, residual, row, lane, lanes);
      stats.template read<CENTER>(stats_in, sample.first + index, rows);
    }
    const Normal<A, CENTER> normal(stats);
    A sum_g = 0, sum_gh = 0;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      A v[V], g[V], weights[V];
      values_of<T>(now_x + k * N, v, (const X *)nullptr);
      if (ADD) {
        unpack(now_r[k], g, (const T *)nullptr);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += g[i];
      }
      unpack(now_dy[k], g, (const T *)nullptr);
      if (!KEEP_WEIGHT) w[0].template of<EVEN>(weight, home.column(lane + k * lanes), cols);
      w[KEEP_WEIGHT ? k : 0].values(weights);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        v[i] = normal(v[i]);
        dbias[k][i] += g[i];
      }
      if (!CENTER && (flags & ROUND_FIRST)) {
#pragma unroll
        for (int i = 0; i < V; ++i) dweight[k][i] = fma_(g[i], rounded(v[i], (const T *)nullptr), dweight[k][i]);
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) dweight[k][i] = fma_(g[i], v[i], dweight[k][i]);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        g[i] = g[i] * (CENTER ? weights[i] : weights[i] + shift);
        if (CENTER) sum_g += g[i];
        sum_gh = fma_(g[i], v[i], sum_gh);
      }
    }
    if (CENTER)
      team_sum2<WARP>(sum_g, sum_gh, part + (turn & 1) * 64);
    else
      sum_gh = team_sum<WARP>(sum_gh, part + (turn & 1) * 64);
    // dx = rstd * g - a - x_hat * b
    const A a = stats.rstd * (sum_g * share), b = stats.rstd * (sum_gh * share);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int at = lane + k * lanes;
      if (at >= row.vectors) continue;
      A v[V], g[V], weights[V];
      values_of<T>(now_x + k * N, v, (const X *)nullptr);
      if (ADD) {
        unpack(now_r[k], g, (const T *)nullptr);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += g[i];
      }
      unpack(now_dy[k], g, (const T *)nullptr);
      if (!KEEP_WEIGHT) w[0].template of<EVEN>(weight, home.column(lane + k * lanes), cols);
      w[KEEP_WEIGHT ? k : 0].values(weights);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A hat = normal(v[i]);
        g[i] = g[i] * (CENTER ? weights[i] : weights[i] + shift);
        const A rest = CENTER ? fma_(g[i], stats.rstd, -a) : g[i] * stats.rstd;
        v[i] = fma_(-hat, b, rest);
      }
      if (ADD && dsum) {
        Raw more;
        load_row<T, 1, EVEN>(&more, dsum, row, at, lanes);
        unpack(more, g, (const T *)nullptr);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] += g[i];
      }
      store_vector<T, EVEN>(dx, row, at, v);
    }
  }
  if (!partial) return;
  A *const out = partial + ((i64)blockIdx.z * gridDim.x + blockIdx.x) * 2 * cols;
  if (WARP) {
    // The teams of a block are added in their order.
    const int width = (int)cols, teams = (int)blockDim.y;
    A *const mine = part + (int)threadIdx.y * 2 * width;
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int g = lane + k * lanes, c = (int)home.column(g), lo = home.lo(g), hi = home.hi(g);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (i >= lo && i < hi) {
          mine[c + i] = dweight[k][i];
          mine[width + c + i] = dbias[k][i];
        }
    }
    __syncthreads();
    const i64 rest = sample.rows - (i64)blockIdx.x * teams;
    const int used = (int)(rest < teams ? rest : teams);
    for (int c = (int)threadIdx.y * lanes + lane; c < 2 * width; c += lanes * teams) {
      A total = 0;
      for (int t = 0; t < used; ++t) total += part[t * 2 * width + c];
      out[c] = total;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const int g = lane + k * lanes, lo = home.lo(g), hi = home.hi(g);
    const i64 c = home.column(g);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i >= lo && i < hi) {
        out[c + i] = dweight[k][i];
        out[cols + c + i] = dbias[k][i];
      }
  }
}

// dx of rows of any length, one to a block. The parameters' gradients are those of `backward_columns`.
template <class X, class T, class P, bool CENTER, bool ADD>
__device__ __forceinline__ void backward_long(const X *x, const T *residual, const P *weight, const T *dy,
                                              const T *dsum, const Acc<T> *stats_in, X *dx, i64 rows, i64 cols,
                                              double offset) {
  typedef Acc<T> A;
  constexpr int V = Lanes<T>::count, PER = 2, N = Wide<X, T>::N;
  SHARED(A, part, 64);
  const int lanes = (int)blockDim.x;
  const Sample<true> sample(rows);
  const Row<T, i64> row(sample.first + blockIdx.x, rows, cols);
  weight = sample.of(weight, cols);
  Stats<A> stats;
  stats.template read<CENTER>(stats_in, sample.first + blockIdx.x, rows);
  const A shift = weight ? A(offset) : A(0);
  const Normal<A, CENTER> normal(stats);
  A mean_g = 0, mean_gh = 0;
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    for (i64 g0 = threadIdx.x; g0 < row.vectors; g0 += PER * lanes) {
      Raw in_x[PER * N], in_dy[PER], in_r[PER];
      load_row<T, PER, false>(in_x, x, row, g0, lanes);
      load_row<T, PER, false>(in_dy, dy, row, g0, lanes);
      if (ADD) load_row<T, PER, false>(in_r, residual, row, g0, lanes);
      A few_g = 0, few_gh = 0;
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        const i64 at = g0 + k * lanes;
        if (at >= row.vectors) continue;
        A v[V], g[V], weights[V];
        values_of<T>(in_x + k * N, v, (const X *)nullptr);
        if (ADD) {
          unpack(in_r[k], g, (const T *)nullptr);
#pragma unroll
          for (int i = 0; i < V; ++i) v[i] += g[i];
        }
        unpack(in_dy[k], g, (const T *)nullptr);
        Param<T, P> w;
        w.template of<false>(weight, row.column(at), cols);
        w.values(weights);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A hat = normal(v[i]);
          g[i] = g[i] * (CENTER ? weights[i] : weights[i] + shift);
          if (pass == 0) {
            if (CENTER) few_g += g[i];
            few_gh = fma_(g[i], hat, few_gh);
          } else {
            v[i] = fma_(-hat, mean_gh, CENTER ? fma_(g[i], stats.rstd, -mean_g) : g[i] * stats.rstd);
          }
        }
        if (pass == 1) {
          if (ADD && dsum) {
            Raw more;
            load_row<T, 1, false>(&more, dsum, row, at, lanes);
            unpack(more, g, (const T *)nullptr);
#pragma unroll
            for (int i = 0; i < V; ++i) v[i] += g[i];
          }
          store_vector<T, false>(dx, row, at, v);
        }
      }
      mean_g += pass == 0 ? few_g : A(0);
      mean_gh += pass == 0 ? few_gh : A(0);
    }
    if (pass == 0) {
      block_sum2(mean_g, mean_gh, part);
      mean_g = stats.rstd * (mean_g / A(cols));
      mean_gh = stats.rstd * (mean_gh / A(cols));
    }
  }
}

// Sums over rows of dy * x_hat and of dy, a vector of columns to a thread. Block (i, j) takes the rows j, j + gridDim.y,
// ... of a sample; gridDim.y is a multiple of the elements of a vector, or at least the number of its rows. `partial` is
// [samples, gridDim.y, 2, cols].
template <class X, class T, bool CENTER, bool ADD>
__device__ __forceinline__ void backward_columns(const X *x, const T *residual, const T *dy, const Acc<T> *stats_in,
                                                 Acc<T> *partial, i64 rows, i64 cols, int flags) {
  typedef Acc<T> A;
  constexpr int V = Lanes<T>::count, N = Wide<X, T>::N;
  const i64 g = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const Sample<true> sample(rows);
  const Row<T, i64> home(sample.first + blockIdx.y, rows, cols);
  if (g >= home.vectors) return;
  A dweight[V], dbias[V];
#pragma unroll
  for (int i = 0; i < V; ++i) dweight[i] = dbias[i] = 0;
#pragma unroll 4
  for (i64 r = sample.first + blockIdx.y; r < sample.first + sample.rows; r += gridDim.y) {
    const Row<T, i64> row(r, rows, cols);
    Stats<A> stats;
    stats.template read<CENTER>(stats_in, r, rows);
    const Normal<A, CENTER> normal(stats);
    Raw in_x[N], in_dy, in_r;
    load_row<T, 1, false>(in_x, x, row, g, 0);
    load_row<T, 1, false>(&in_dy, dy, row, g, 0);
    if (ADD) load_row<T, 1, false>(&in_r, residual, row, g, 0);
    A v[V], d[V];
    values_of<T>(in_x, v, (const X *)nullptr);
    if (ADD) {
      unpack(in_r, d, (const T *)nullptr);
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] += d[i];
    }
    unpack(in_dy, d, (const T *)nullptr);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      A hat = normal(v[i]);
      if (!CENTER && (flags & ROUND_FIRST)) hat = rounded(hat, (const T *)nullptr);
      dweight[i] = fma_(d[i], hat, dweight[i]);
      dbias[i] += d[i];
    }
  }
  A *const out = partial + ((i64)blockIdx.z * gridDim.y + blockIdx.y) * 2 * cols;
  const i64 c = home.column(g);
  const int lo = home.lo(g), hi = home.hi(g);
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i >= lo && i < hi) {
      out[c + i] = dweight[i];
      out[cols + c + i] = dbias[i];
    }
}

// The sums of `partial` [samples, parts, 2, cols] over parts, in one order: line j of 16 adds the parts j, j + 16, ..., and the
// lines are added in theirs. Blocks of 32 columns by 16 lines over 2 * cols. dweight and dbias may be null.
template <class P, class A>
__device__ __forceinline__ void finish_columns(const A *partial, P *dweight, P *dbias, i64 parts, i64 cols) {
  SHARED(A, lines, 16 * 33);
  const i64 c = (i64)blockIdx.x * 32 + threadIdx.x, before = blockIdx.z * cols;
  partial += 2 * parts * before;
  A sum = 0;
  if (c < 2 * cols) {
#pragma unroll 8
    for (i64 p = threadIdx.y; p < parts; p += 16) sum += partial[p * 2 * cols + c];
  }
  lines[threadIdx.y * 33 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || c >= 2 * cols) return;
#pragma unroll
  for (int j = 1; j < 16; ++j) sum += lines[j * 33 + threadIdx.x];
  if (c < cols && dweight) store(dweight + before + c, sum);
  if (c >= cols && dbias) store(dbias + before + c - cols, sum);
}

#define FORWARD_ARGUMENTS(T, P)                                                                                   \
  const T *x, const T *residual, const P *weight, const P *bias, T *y, T *sum, Acc<T> *stats, i64 rows, i64 cols, \
      double eps, double offset, int flags
// EVEN: all rows begin at multiples of 16 bytes, as the parameters do. They need no mask and no shift.
#define FORWARD(THREADS, BLOCKS, name, T, P, CENTER, PER, WARP, EVEN)                                              \
  KERNEL(THREADS, BLOCKS, name, FORWARD_ARGUMENTS(T, P)) {                                                         \
    forward_row<T, P, CENTER, false, PER, WARP, EVEN>(x, nullptr, weight, bias, y, Sums<T>{nullptr, nullptr},      \
                                                      stats, rows, cols, eps, offset, flags);                      \
  }
#define FORWARD_LONG(name, T, P, CENTER)                                                                           \
  KERNEL(512, 1, name, FORWARD_ARGUMENTS(T, P)) {                                                                  \
    forward_long<T, P, CENTER, false>(x, nullptr, weight, bias, y, Sums<T>{nullptr, nullptr}, stats, rows, cols,   \
                                      eps, offset, flags);                                                         \
  }
#define ADD_FORWARD(THREADS, BLOCKS, name, T, P, CENTER, PER, WARP, EVEN)                                          \
  KERNEL(THREADS, BLOCKS, name, FORWARD_ARGUMENTS(T, P), Acc<T> *unrounded) {                                      \
    forward_row<T, P, CENTER, true, PER, WARP, EVEN>(x, residual, weight, bias, y, Sums<T>{sum, unrounded}, stats, \
                                                     rows, cols, eps, offset, flags);                              \
  }
#define ADD_FORWARD_LONG(name, T, P, CENTER)                                                                       \
  KERNEL(512, 1, name, FORWARD_ARGUMENTS(T, P), Acc<T> *unrounded) {                                               \
    forward_long<T, P, CENTER, true>(x, residual, weight, bias, y, Sums<T>{sum, unrounded}, stats, rows, cols,     \
                                     eps, offset, flags);                                                          \
  }
#define BACKWARD(THREADS, BLOCKS, name, X, T, P, CENTER, ADD, PER, WARP, EVEN)                                     \
  KERNEL(THREADS, BLOCKS, name, const X *x, const T *residual, const P *weight, const T *dy, const T *dsum,        \
         const Acc<T> *stats, X *dx, Acc<T> *partial, i64 rows, i64 cols, double offset, int flags) {              \
    backward_rows<X, T, P, CENTER, ADD, PER, WARP, EVEN>(x, residual, weight, dy, dsum, stats, dx, partial, rows,  \
                                                         cols, offset, flags);                                     \
  }
#define BACKWARD_LONG(name, X, T, P, CENTER, ADD)                                                                  \
  KERNEL(512, 2, name, const X *x, const T *residual, const P *weight, const T *dy, const T *dsum,                 \
         const Acc<T> *stats, X *dx, i64 rows, i64 cols, double offset) {                                          \
    backward_long<X, T, P, CENTER, ADD>(x, residual, weight, dy, dsum, stats, dx, rows, cols, offset);             \
  }
#define BACKWARD_COLUMNS(name, X, T, CENTER, ADD)                                                                  \
  KERNEL(256, 4, name, const X *x, const T *residual, const T *dy, const Acc<T> *stats, Acc<T> *partial, i64 rows, \
         i64 cols, int flags) {                                                                                    \
    backward_columns<X, T, CENTER, ADD>(x, residual, dy, stats, partial, rows, cols, flags);                       \
  }
#define FINISH(name, P, A)                                                                                         \
  KERNEL(512, 2, name, const A *partial, P *dweight, P *dbias, i64 parts, i64 cols) {                              \
    finish_columns<P>(partial, dweight, dbias, parts, cols);                                                       \
  }

// Names: norm, what is done, T, P, team and vectors of a thread; `odd` where rows do not begin at multiples of 16 bytes.
#define FORWARDS(norm, t, p, T, P, CENTER)                                              \
  FORWARD(256, 4, norm##_forward_##t##_##p##_w1, T, P, CENTER, 1, true, true)           \
  FORWARD(256, 3, norm##_forward_##t##_##p##_w2, T, P, CENTER, 2, true, true)           \
  FORWARD(512, 2, norm##_forward_##t##_##p##_b2, T, P, CENTER, 2, false, true)          \
  FORWARD(1024, 1, norm##_forward_##t##_##p##_b4, T, P, CENTER, 4, false, true)         \
  FORWARD(1024, 1, norm##_forward_##t##_##p##_b8, T, P, CENTER, 8, false, true)         \
  FORWARD(256, 3, norm##_forward_##t##_##p##_w1_odd, T, P, CENTER, 1, true, false)      \
  FORWARD(256, 2, norm##_forward_##t##_##p##_w2_odd, T, P, CENTER, 2, true, false)      \
  FORWARD(512, 1, norm##_forward_##t##_##p##_b2_odd, T, P, CENTER, 2, false, false)     \
  FORWARD(512, 1, norm##_forward_##t##_##p##_b4_odd, T, P, CENTER, 4, false, false)     \
  FORWARD_LONG(norm##_forward_##t##_##p##_long, T, P, CENTER)
#define ADD_FORWARDS(norm, t, p, T, P, CENTER)                                          \
  ADD_FORWARD(256, 4, norm##_forward_##t##_##p##_w1, T, P, CENTER, 1, true, true)       \
  ADD_FORWARD(256, 2, norm##_forward_##t##_##p##_w2, T, P, CENTER, 2, true, true)       \
  ADD_FORWARD(512, 1, norm##_forward_##t##_##p##_b2, T, P, CENTER, 2, false, true)      \
  ADD_FORWARD(512, 1, norm##_forward_##t##_##p##_b4, T, P, CENTER, 4, false, true)      \
  ADD_FORWARD(256, 3, norm##_forward_##t##_##p##_w1_odd, T, P, CENTER, 1, true, false)  \
  ADD_FORWARD(256, 2, norm##_forward_##t##_##p##_w2_odd, T, P, CENTER, 2, true, false)  \
  ADD_FORWARD(512, 1, norm##_forward_##t##_##p##_b2_odd, T, P, CENTER, 2, false, false) \
  ADD_FORWARD(512, 1, norm##_forward_##t##_##p##_b4_odd, T, P, CENTER, 4, false, false) \
  ADD_FORWARD_LONG(norm##_forward_##t##_##p##_long, T, P, CENTER)
#define BACKWARDS(norm, t, p, X, T, P, CENTER, ADD)                                         \
  BACKWARD(256, 2, norm##_backward_##t##_##p##_w1, X, T, P, CENTER, ADD, 1, true, true)     \
  BACKWARD(256, 2, norm##_backward_##t##_##p##_w2, X, T, P, CENTER, ADD, 2, true, true)     \
  BACKWARD(512, 1, norm##_backward_##t##_##p##_b2, X, T, P, CENTER, ADD, 2, false, true)    \
  BACKWARD(512, 1, norm##_backward_##t##_##p##_b4, X, T, P, CENTER, ADD, 4, false, true)    \
  BACKWARD(256, 2, norm##_backward_##t##_##p##_w1_odd, X, T, P, CENTER, ADD, 1, true, false) \
  BACKWARD(256, 2, norm##_backward_##t##_##p##_w2_odd, X, T, P, CENTER, ADD, 2, true, false) \
  BACKWARD(512, 1, norm##_backward_##t##_##p##_b2_odd, X, T, P, CENTER, ADD, 2, false, false) \
  BACKWARD(512, 1, norm##_backward_##t##_##p##_b4_odd, X, T, P, CENTER, ADD, 4, false, false) \
  BACKWARD_LONG(norm##_backward_##t##_##p##_long, X, T, P, CENTER, ADD)                     \
  BACKWARD_COLUMNS(norm##_columns_##t##_##p, X, T, CENTER, ADD)
#define PLAIN(norm, KIND, CENTER, ADD)                                                                \
  KIND(256, 2, norm##_forward_f64_f64_w1, double, double, CENTER, 1, true, true)                      \
  KIND(256, 2, norm##_forward_f64_f64_w1_odd, double, double, CENTER, 1, true, false)                 \
  KIND##_LONG(norm##_forward_f64_f64_long, double, double, CENTER)                                    \
  BACKWARD(256, 1, norm##_backward_f64_f64_w1, double, double, double, CENTER, ADD, 1, true, true)     \
  BACKWARD(256, 1, norm##_backward_f64_f64_w1_odd, double, double, double, CENTER, ADD, 1, true, false) \
  BACKWARD_LONG(norm##_backward_f64_f64_long, double, double, double, CENTER, ADD)                     \
  BACKWARD_COLUMNS(norm##_columns_f64_f64, double, double, CENTER, ADD)

// ALL of types that have teams of several vectors, HALF of half precision, DOUBLE of double.
#if IN(layer_norm)
#define ALL_LAYER_NORM(t, p, T, P)       \
  FORWARDS(layer_norm, t, p, T, P, true) \
  BACKWARDS(layer_norm, t, p, T, T, P, true, false)
#define DOUBLE_LAYER_NORM PLAIN(layer_norm, FORWARD, true, false)
#else
#define ALL_LAYER_NORM(t, p, T, P)
#define DOUBLE_LAYER_NORM
#endif
#if IN(rms_norm)
#define ALL_RMS_NORM(t, p, T, P)        \
  FORWARDS(rms_norm, t, p, T, P, false) \
  BACKWARDS(rms_norm, t, p, T, T, P, false, false)
#define DOUBLE_RMS_NORM PLAIN(rms_norm, FORWARD, false, false)
#else
#define ALL_RMS_NORM(t, p, T, P)
#define DOUBLE_RMS_NORM
#endif
#if IN(add_layer_norm)
#define ALL_ADD_LAYER_NORM(t, p, T, P)           \
  ADD_FORWARDS(add_layer_norm, t, p, T, P, true) \
  BACKWARDS(add_layer_norm, t, p, T, T, P, true, true)
#define DOUBLE_ADD_LAYER_NORM PLAIN(add_layer_norm, ADD_FORWARD, true, true)
#else
#define ALL_ADD_LAYER_NORM(t, p, T, P)
#define DOUBLE_ADD_LAYER_NORM
#endif
#if IN(add_rms_norm)
#define ALL_ADD_RMS_NORM(t, p, T, P)            \
  ADD_FORWARDS(add_rms_norm, t, p, T, P, false) \
  BACKWARDS(add_rms_norm, t, p, T, T, P, false, true)
#define DOUBLE_ADD_RMS_NORM PLAIN(add_rms_norm, ADD_FORWARD, false, true)
#else
#define ALL_ADD_RMS_NORM(t, p, T, P)
#define DOUBLE_ADD_RMS_NORM
#endif
#if IN(sum)
// x is the unrounded sum that a forward with a residual wrote, dx the gradient of it.
#define HALF_SUM(t, p, T, P)                                 \
  BACKWARDS(sum_layer_norm, t, p, Acc<T>, T, P, true, false) \
  BACKWARDS(sum_rms_norm, t, p, Acc<T>, T, P, false, false)
#else
#define HALF_SUM(t, p, T, P)
#endif
#if IN(finish)
#define ALL_FINISH(t, p, T, P) FINISH(rows_finish_##t##_##p, P, Acc<T>)
#else
#define ALL_FINISH(t, p, T, P)
#endif
#define ALL(t, p, T, P)          \
  ALL_LAYER_NORM(t, p, T, P)     \
  ALL_RMS_NORM(t, p, T, P)       \
  ALL_ADD_LAYER_NORM(t, p, T, P) \
  ALL_ADD_RMS_NORM(t, p, T, P)   \
  ALL_FINISH(t, p, T, P)

#if HAS(f32_f32)
ALL(f32, f32, float, float)
#endif
#if HAS(f16_f16)
ALL(f16, f16, f16, f16)
HALF_SUM(f16, f16, f16, f16)
#endif
#if HAS(bf16_bf16)
ALL(bf16, bf16, bf16, bf16)
HALF_SUM(bf16, bf16, bf16, bf16)
#endif
#if HAS(f16_f32)
ALL(f16, f32, f16, float)
HALF_SUM(f16, f32, f16, float)
#endif
#if HAS(bf16_f32)
ALL(bf16, f32, bf16, float)
HALF_SUM(bf16, f32, bf16, float)
#endif
#if HAS(f64_f64)
DOUBLE_LAYER_NORM
DOUBLE_RMS_NORM
DOUBLE_ADD_LAYER_NORM
DOUBLE_ADD_RMS_NORM
ALL_FINISH(f64, f64, double, double)
#endif
