// Batch norm: each channel of [outer, channels, inner] by its own statistics or by given ones.
//
// Two layouts. A plane is the `inner` neighbors that a channel has in one sample: long planes are read along it, and a
// channel's slots are cut into `parts`, one for a block. Where a channel has few neighbors (channels last, [N, C], short
// planes) the tensor is a matrix whose columns belong to channels, and sums run down the rows. A channel that fits into
// the registers of one team is done in one launch; else partial moments are merged by a second kernel, in one order.
//
// The kernels of planes do group and instance norm too: a group is a channel of one plane, with a weight for each `span`
// elements of it. groups.cu has what is the groups' alone.
#include "planes.cuh"

// So many tiles have their squares taken about the mean of the first.
constexpr int TILES = 8;

// The moments of one part of a channel: partial[channel][part] = count, mean, rest, m2.
template <class T, int U>
__device__ __forceinline__ void planes_moments(const T *x, Acc<T> *partial, u64 outer, u64 channels, u64 inner,
                                               unsigned parts, int center) {
  typedef Acc<T> A;
  SHARED(A, buffer, 128);
  const u64 block = block_of_list(), channel = divide(block, parts), part = block - channel * parts;
  if (channel >= channels) return;
  const bool vectors = aligned(x);
  const Planes<T> planes(outer, channels, inner, channel);
  const u64 per = (planes.total + parts - 1) / parts, from = part * per;
  const u64 to = from + per < planes.total ? from + per : planes.total;
  Moments<A> m;
  if (from + threadIdx.x < to) {
    const u64 limit = outer * planes.stride;
    Walk<T> walk(planes, from + threadIdx.x, blockDim.x);
    u64 s = from + threadIdx.x;
    while (s < to) {
      // Distances from a number that is near the mean of some tiles, since it is that of the first: were that one unlike the
      // others, their distance would lose no more than their number of the variance's digits.
      A about = 0, first = 0, second = 0;
      unsigned count = 0;
      for (int tile = 0; tile < TILES && s < to; ++tile, s += U * blockDim.x) {
        Raw raw[U];
        Place<T> place[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          place[u] = walk.place();
          if (s + u * blockDim.x >= to) place[u].high = place[u].low = 0;
          raw[u] = load_slot(x, vectors, place[u], limit);
          walk.advance();
        }
        if (tile == 0 && center) about = mean_of<T, U>(raw, place);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          count += place[u].high - place[u].low;
          add_squares<T>(raw[u], place[u], about, first, second);
        }
      }
      if (count) m.merge(center ? Moments<A>((A)count, about, first, second) : about_zero((A)count, second));
    }
  }
  m = team_moments(m, buffer, center);
  if (threadIdx.x == 0) {
    A *out = partial + 4 * block;
    out[0] = m.count;
    out[1] = m.count == A(0) ? A(0) : m.mean;
    out[2] = m.count == A(0) ? A(0) : m.rest;
    out[3] = m.count == A(0) ? A(0) : m.m2;
  }
}

// Merges the parts of a channel, a warp for each: in double, whose rounding does not show.
template <class A>
__device__ __forceinline__ void planes_merge(const A *partial, Statistics<A> out, u64 channels, unsigned parts,
                                             double eps) {
  const u64 channel = block_of_list() * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const A *p = partial + 4 * channel * parts;
  double count = 0, sum = 0;
  for (unsigned i = threadIdx.x; i < parts; i += 32) {
    count += (double)p[4 * i];
    sum += (double)p[4 * i] * ((double)p[4 * i + 1] + (double)p[4 * i + 2]);
  }
  count = warp_sum(count);
  const double about = warp_sum(sum) / count;
  double first = 0, second = 0;
  for (unsigned i = threadIdx.x; i < parts; i += 32) {
    const double n = (double)p[4 * i], d = ((double)p[4 * i + 1] - about) + (double)p[4 * i + 2];
    first += n * d;
    second += (double)p[4 * i + 3] + n * d * d;
  }
  const Moments<double> m(count, about, warp_sum(first), warp_sum(second));
  if (threadIdx.x == 0) write_statistics(out, channel, m, eps);
}

// One channel of a team in one launch: read once, kept in registers, PER slots a thread.
template <class T, class P, int PER>
__device__ __forceinline__ void planes_fit(const T *x, const P *weight, const P *bias, T *y, Statistics<Acc<T>> out,
                                           u64 outer, u64 channels, u64 inner, u64 span, u64 period, double eps,
                                           int center) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  SHARED(A, buffer, 96);
  const u64 channel = block_of_list() * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const bool vectors = aligned(x), to_vectors = aligned(y);
  const Planes<T> planes(outer, channels, inner, channel);
  const Walk<T> start(planes, threadIdx.x, blockDim.x);
  Raw raw[PER];
  A sum = 0;
  Walk<T> walk = start;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total) raw[k] = load_slot(x, vectors, walk.place(), outer * planes.stride);
    walk.advance();
  }
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total) {
      A v[SIZE], part = 0;
      unpack(raw[k], v, (const T *)0);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) part += v[i];
      sum += part;
    }
  }
  const A count = (A)(outer * inner);
  const A about = center ? team_sum(sum, buffer) / count : A(0);
  A first = 0, second = 0;
  walk = start;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total) add_squares<T>(raw[k], walk.place(), about, first, second);
    walk.advance();
  }
  second = team_sum(second, buffer + 32);
  Moments<A> m;
  if (center) {
    m = Moments<A>(count, about, team_sum(first, buffer + 64), second);
  } else {
    m.m2 = second;
  }
  const A var = variance(m.m2, count);
  const Normal<A> normal(m.mean, m.rest, inverse_root(var, eps));
  if (threadIdx.x == 0) out.write(channel, normal.mean, normal.rest, normal.inv_std, var);
  const Pairs<T, P> pairs(weight, bias, channel, inner, span, period);
  walk = start;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total) {
      A v[SIZE];
      unpack(raw[k], v, (const T *)0);
      const Place<T> place = walk.place();
      pairs.each(place, walk.start, [&](int i, A w, A b) { v[i] = normal.of(v[i], w, b); });
      store_slot(y, to_vectors, place, v);
    }
    walk.advance();
  }
}

// y of one part of a channel. Blocks go from the last part to the first, since the last that the moments read is still
// in the second-level cache.
template <class T, class P, int U>
__device__ __forceinline__ void planes_normalize(const T *x, const P *weight, const P *bias, const Acc<T> *mean,
                                                 const Acc<T> *rest, const Acc<T> *third, T *y, u64 outer, u64 channels,
                                                 u64 inner, u64 span, u64 period, unsigned parts, int of_var,
                                                 double eps) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  const u64 index = block_of_list(), blocks = channels * parts;
  if (index >= blocks) return;
  const u64 block = blocks - 1 - index, channel = divide(block, parts), part = block - channel * parts;
  const bool vectors = aligned(x), to_vectors = aligned(y);
  const Planes<T> planes(outer, channels, inner, channel);
  const u64 per = (planes.total + parts - 1) / parts, from = part * per;
  const u64 to = from + per < planes.total ? from + per : planes.total;
  if (from + threadIdx.x >= to) return;
  const Normal<A> normal(mean, rest, third, of_var, eps, channel);
  const Pairs<T, P> pairs(weight, bias, channel, inner, span, period);
  Walk<T> walk(planes, from + threadIdx.x, blockDim.x);
  for (u64 s = from + threadIdx.x; s < to; s += U * blockDim.x) {
    Raw raw[U];
    Place<T> place[U];
    u64 start[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      place[u] = walk.place();
      start[u] = walk.start;
      if (s + u * blockDim.x >= to) place[u].high = place[u].low = 0;
      raw[u] = load_slot(x, vectors, place[u], outer * planes.stride);
      walk.advance();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A v[SIZE];
      unpack(raw[u], v, (const T *)0);
      pairs.each(place[u], start[u], [&](int i, A w, A b) { v[i] = normal.of(v[i], w, b); });
      store_slot(y, to_vectors, place[u], v);
    }
  }
}

// Σ dy · (x − mean) and Σ dy of one part: partial[channel][part]. `mean` has one number for each `per_mean` channels.
template <class T, int U>
__device__ __forceinline__ void planes_grad_sums(const T *x, const T *dy, const Acc<T> *mean, Acc<T> *partial, u64 outer,
                                                 u64 channels, u64 inner, u64 per_mean, unsigned parts) {
  typedef Acc<T> A;
  SHARED(A, buffer, 64);
  // A team of a warp takes a channel alone, several of them make a block.
  const u64 item = block_of_list() * blockDim.y + threadIdx.y;
  const u64 channel = divide(item, parts), part = item - channel * parts;
  if (channel >= channels) return;
  const bool vectors = aligned(x), dy_vectors = aligned(dy);
  const Planes<T> planes(outer, channels, inner, channel);
  const u64 per = (planes.total + parts - 1) / parts, from = part * per;
  const u64 to = from + per < planes.total ? from + per : planes.total;
  const A high = mean ? mean[divide(channel, per_mean)] : A(0);
  A along = 0, sum = 0;
  if (from + threadIdx.x < to) {
    Walk<T> walk(planes, from + threadIdx.x, blockDim.x);
    for (u64 s = from + threadIdx.x; s < to; s += U * blockDim.x) {
      Raw a[U], b[U];
      Place<T> place[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        place[u] = walk.place();
        if (s + u * blockDim.x >= to) place[u].high = place[u].low = 0;
        a[u] = load_slot(x, vectors, place[u], outer * planes.stride);
        b[u] = load_slot(dy, dy_vectors, place[u], outer * planes.stride);
        walk.advance();
      }
#pragma unroll
      for (int u = 0; u < U; ++u) add_products<T>(a[u], b[u], high, along, sum);
    }
  }
  along = team_sum(along, buffer);
  sum = team_sum(sum, buffer + 32);
  if (threadIdx.x == 0) {
    partial[2 * item] = along;
    partial[2 * item + 1] = sum;
  }
}

// The gradients of weight and bias of a channel, and for grad_input the means of dy · w and of dy · w · x̂ over it, the
// latter times 1/σ. A warp for each channel. `fixed`: the statistics do not depend on x.
template <class A, class P>
__device__ __forceinline__ void planes_grad_merge(const A *partial, const P *weight, const A *mean, const A *rest,
                                                  const A *third, P *dweight, P *dbias, A *back_mean, A *back_along,
                                                  u64 channels, unsigned parts, double count, int of_var, double eps,
                                                  int center) {
  const u64 channel = block_of_list() * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const A *p = partial + 2 * channel * parts;
  double along = 0, sum = 0;
  for (unsigned i = threadIdx.x; i < parts; i += 32) {
    along += (double)p[2 * i];
    sum += (double)p[2 * i + 1];
  }
  along = warp_sum(along);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    const Normal<A> normal(mean, rest, third, of_var, eps, channel);
    write_grads(normal, along, sum, weight, dweight, dbias, back_mean, back_along, channel, count, center);
  }
}

// dx of one part of a channel, in the order of planes_normalize.
template <class T, class P, int U>
__device__ __forceinline__ void planes_grad_input(const T *x, const T *dy, const P *weight, const Acc<T> *mean,
                                                  const Acc<T> *rest, const Acc<T> *third, const Acc<T> *back_mean,
                                                  const Acc<T> *back_along, T *dx, u64 outer, u64 channels, u64 inner,
                                                  u64 span, u64 period, unsigned parts, int of_var, double eps) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  const u64 index = block_of_list(), blocks = channels * parts;
  if (index >= blocks) return;
  const u64 block = blocks - 1 - index, channel = divide(block, parts), part = block - channel * parts;
  const bool vectors = aligned(x), dy_vectors = aligned(dy), to_vectors = aligned(dx);
  const Planes<T> planes(outer, channels, inner, channel);
  const u64 per = (planes.total + parts - 1) / parts, from = part * per;
  const u64 to = from + per < planes.total ? from + per : planes.total;
  if (from + threadIdx.x >= to) return;
  const Normal<A> normal(mean, rest, third, of_var, eps, channel);
  const bool own = back_mean != 0;
  const Back<A> back(normal, own ? back_mean[channel] : A(0), own ? back_along[channel] : A(0));
  const Pairs<T, P> pairs(weight, (const P *)0, channel, inner, span, period);
  Walk<T> walk(planes, from + threadIdx.x, blockDim.x);
  for (u64 s = from + threadIdx.x; s < to; s += U * blockDim.x) {
    Raw a[U], b[U];
    Place<T> place[U];
    u64 start[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      place[u] = walk.place();
      start[u] = walk.start;
      if (s + u * blockDim.x >= to) place[u].high = place[u].low = 0;
      a[u] = own ? load_slot(x, vectors, place[u], outer * planes.stride) : zero_raw();
      b[u] = load_slot(dy, dy_vectors, place[u], outer * planes.stride);
      walk.advance();
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A v[SIZE], g[SIZE];
      unpack(a[u], v, (const T *)0);
      unpack(b[u], g, (const T *)0);
      pairs.each(place[u], start[u], [&](int i, A w, A) {
        g[i] = own ? back.of(v[i], g[i], w) : g[i] * (normal.inv_std * w);
      });
      store_slot(dx, to_vectors, place[u], g);
    }
  }
}

// The whole backward of one channel of a team in one launch. Where `partial` is given it takes Σ dy · (x − mean) and Σ dy
// of the channel instead of the gradients of weight and bias.
template <class T, class P, int PER>
__device__ __forceinline__ void planes_grad_fit(const T *x, const T *dy, const P *weight, const Acc<T> *mean,
                                                const Acc<T> *rest, const Acc<T> *inv_std, T *dx, P *dweight, P *dbias,
                                                Acc<T> *partial, u64 outer, u64 channels, u64 inner, u64 period,
                                                int center) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  SHARED(A, buffer, 64);
  const u64 channel = block_of_list() * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const bool vectors = aligned(x), dy_vectors = aligned(dy), to_vectors = aligned(dx);
  const Planes<T> planes(outer, channels, inner, channel);
  const Walk<T> start(planes, threadIdx.x, blockDim.x);
  const Normal<A> normal(mean, rest, inv_std, 0, 0., channel);
  Raw a[PER], b[PER];
  Walk<T> walk = start;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total) {
      a[k] = load_slot(x, vectors, walk.place(), outer * planes.stride);
      b[k] = load_slot(dy, dy_vectors, walk.place(), outer * planes.stride);
    }
    walk.advance();
  }
  A along = 0, sum = 0;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total)
      add_products<T>(a[k], b[k], normal.mean, along, sum);
  }
  along = team_sum(along, buffer);
  sum = team_sum(sum, buffer + 32);
  if (threadIdx.x == 0 && partial) {
    partial[2 * channel] = along;
    partial[2 * channel + 1] = sum;
  }
  const A about = about_mean(along, normal.rest, sum) * normal.inv_std;
  if (threadIdx.x == 0 && dweight) store(dweight + channel, about);
  if (threadIdx.x == 0 && dbias) store(dbias + channel, sum);
  const A w = weight ? (A)load(weight + (channel - divide(channel, period) * period)) : A(1);
  const A count = (A)(outer * inner);
  const Back<A> back(normal, center ? w * sum / count : A(0), w * about / count * normal.inv_std);
  walk = start;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (threadIdx.x + k * blockDim.x < planes.total) {
      A v[SIZE], g[SIZE];
      unpack(a[k], v, (const T *)0);
      unpack(b[k], g, (const T *)0);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) g[i] = back.of(v[i], g[i], w);
      store_slot(dx, to_vectors, walk.place(), g);
    }
    walk.advance();
  }
}

// A tensor as a matrix whose columns belong to channels: `width` columns, a multiple of a slot's elements, of which `period`
// after each other are one row of [rows, channels · inner]. Several of those make up one row of the matrix where a row is
// no multiple of 16 bytes, or is short: the last row of the matrix may then be cut off by the end of the tensor.
struct Columns {
  u64 elements, width, rows, period, inner;
  __device__ __forceinline__ u64 channel(u64 column) const {
    return divide(column - divide(column, period) * period, inner);
  }
  // How many rows have this column.
  __device__ __forceinline__ u64 rows_of(u64 column) const {
    return column < elements ? divide(elements - column + width - 1, width) : 0;
  }
};

// What a thread takes: the slot `slot` of every `lines`-th row from `first + line` on. A block is `across` slots wide.
template <class T> struct Stripe {
  static constexpr int SIZE = Lanes<T>::count;
  u64 slot, first, last, whole;  // rows before `whole` have all of the slot
  unsigned line, lines, left, across;
  int part;  // what row `whole` has of it
  bool mine;
  __device__ __forceinline__ Stripe(const Columns &m, unsigned across_, u64 block, u64 index, u64 parts) {
    across = across_;
    lines = blockDim.x / across;
    line = threadIdx.x / across;
    left = threadIdx.x - line * across;
    slot = block * across + left;
    const u64 per = (m.rows + parts - 1) / parts;
    first = index * per;
    last = first + per < m.rows ? first + per : m.rows;
    mine = line < lines && slot * SIZE < m.width;
    whole = last;
    part = 0;
    const u64 end = (m.rows - 1) * m.width + (slot + 1) * SIZE;  // of the last row's
    if (last == m.rows && end > m.elements && first < last) {
      whole = last - 1;
      part = end - m.elements < SIZE ? SIZE - (int)(end - m.elements) : 0;
    }
  }
  __device__ __forceinline__ u64 at(const Columns &m, u64 row) const { return row * m.width + slot * SIZE; }
  __device__ __forceinline__ Place<T> place(u64 row, u64 at) const {
    Place<T> r;
    r.at = at;
    r.low = 0;
    r.high = row < whole ? SIZE : row < last ? part : 0;
    return r;
  }
  // How many values of a column lie in the rows of `line`, of those before `last`.
  __device__ __forceinline__ u64 count(const Columns &m, unsigned line_, u64 column) const {
    const u64 rows = m.rows_of(column), end = last < rows ? last : rows, begin = first + line_;
    return begin < end ? divide(end - begin + lines - 1, lines) : 0;
  }
};

// The moments of the columns of one part: partial[part][mean, rest, m2][column]. How many values there are follows from
// the shape.
template <class T, int U>
__device__ __forceinline__ void columns_moments(const T *x, Acc<T> *partial, Columns m, unsigned across, int center) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  SHARED(A, lines_mean, 256 * SIZE);
  SHARED(A, lines_rest, 256 * SIZE);
  SHARED(A, lines_m2, 256 * SIZE);
  const Stripe<T> stripe(m, across, block_across(), blockIdx.y, gridDim.y);
  const bool vectors = aligned(x);
  A mean[SIZE], rest[SIZE], m2[SIZE];
#pragma unroll
  for (int i = 0; i < SIZE; ++i) mean[i] = rest[i] = m2[i] = 0;
  if (stripe.mine) {
    A rows = 0;  // so far
    u64 row = stripe.first + stripe.line, at = stripe.at(m, row);
    const u64 step = stripe.lines * m.width;
    while (row < stripe.whole) {
      // As in planes_moments, for each column.
      A about[SIZE], one[SIZE], two[SIZE], n = 0;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) about[i] = one[i] = two[i] = 0;
      for (int tile = 0; tile < TILES && row < stripe.whole; ++tile, row += U * stripe.lines, at += U * step) {
        Raw raw[U];
        bool has[U];
        A count = 0;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          has[u] = row + u * stripe.lines < stripe.whole;
          raw[u] = zero_raw();
          if (has[u]) raw[u] = load_slot(x, vectors, stripe.place(row + u * stripe.lines, at + u * step), m.elements);
          count += has[u] ? A(1) : A(0);
        }
        if (tile == 0 && center) {
#pragma unroll
          for (int u = 0; u < U; ++u) {
            A v[SIZE];
            unpack(raw[u], v, (const T *)0);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) about[i] += v[i];
          }
#pragma unroll
          for (int i = 0; i < SIZE; ++i) about[i] = count == A(U) ? about[i] / A(U) : about[i] / count;
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          A v[SIZE];
          unpack(raw[u], v, (const T *)0);
          if (has[u]) {
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
              const A d = v[i] - about[i];
              one[i] += d;
              two[i] = fma_(d, d, two[i]);
            }
          }
        }
        n += count;
      }
      const A all = rows + n, share = n / all;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const Moments<A> o = center ? Moments<A>(n, about[i], one[i], two[i]) : about_zero(n, two[i]);
        merge_shared(mean[i], rest[i], m2[i], rows, o.mean, o.rest, o.m2, share);
      }
      rows = all;
    }
    // The row that the end of the tensor cuts off.
    if (stripe.whole < stripe.last && (stripe.whole - stripe.first) % stripe.lines == stripe.line) {
      const Place<T> place = stripe.place(stripe.whole, stripe.at(m, stripe.whole));
      A v[SIZE];
      unpack(load_slot(x, vectors, place, m.elements), v, (const T *)0);
      const A share = A(1) / (rows + A(1));
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (i < stripe.part) {
          if (center) merge_shared(mean[i], rest[i], m2[i], rows, v[i], A(0), A(0), share);
          else m2[i] = fma_(v[i], v[i], m2[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const unsigned at = (stripe.line * across + stripe.left) * SIZE + i;
      lines_mean[at] = mean[i];
      lines_rest[at] = rest[i];
      lines_m2[at] = m2[i];
    }
  }
  __syncthreads();
  // The lines of a column, by one thread, in order.
  const unsigned columns = across * SIZE;
  for (unsigned c = threadIdx.x; c < columns; c += blockDim.x) {
    const u64 column = block_across() * columns + c;
    if (column >= m.width) break;
    A sum = 0, count = 0;
    for (unsigned l = 0; l < stripe.lines; ++l) {
      const A n = (A)stripe.count(m, l, column);
      count += n;
      sum += n * lines_mean[l * columns + c];
    }
    Moments<A> all;
    if (count > A(0)) {
      const A about = sum / count;
      A first = 0, second = 0;
      for (unsigned l = 0; l < stripe.lines; ++l) {
        const A n = (A)stripe.count(m, l, column);
        const A d = (lines_mean[l * columns + c] - about) + lines_rest[l * columns + c];
        if (n == A(0)) continue;
        first += n * d;
        second += fma_(n * d, d, lines_m2[l * columns + c]);
      }
      all = Moments<A>(count, about, first, second);
    }
    A *out = partial + (u64)blockIdx.y * 3 * m.width + column;
    out[0] = all.mean;
    out[m.width] = all.rest;
    out[2 * m.width] = all.m2;
  }
}

// How many values of a column lie in a part.
struct Counts {
  u64 per, rows, cut;  // columns from `cut` on have one row less
  __device__ __forceinline__ Counts(const Columns &m, unsigned parts) {
    per = (m.rows + parts - 1) / parts;
    rows = m.rows;
    cut = m.elements - (m.rows - 1) * m.width;
  }
  __device__ __forceinline__ double of(u64 column, u64 part) const {
    const u64 end = column < cut ? rows : rows - 1, first = part * per;
    return first >= end ? 0. : (double)(first + per < end ? per : end - first);
  }
};

// The entries that a channel has in the partial sums: its columns in every part.
struct Entries {
  u64 channel, count, columns, inner, period, width;
  __device__ __forceinline__ Entries(const Columns &m, u64 channel_, unsigned parts) {
    channel = channel_;
    inner = m.inner;
    period = m.period;
    width = m.width;
    columns = divide(m.width, m.period) * m.inner;
    count = columns * parts;
  }
  __device__ __forceinline__ void at(u64 entry, u64 &part, u64 &column) const {
    part = divide(entry, columns);
    const u64 k = entry - part * columns, repeat = divide(k, inner);
    column = repeat * period + channel * inner + (k - repeat * inner);
  }
};

// A thread of a block of `blockDim.y` channels by `blockDim.x` lines, a power of two. Neighboring threads take what lies side
// by side: columns of one channel, or one column of several.
struct Line {
  u64 channel;
  unsigned line, lines, in_block;
  __device__ __forceinline__ Line(const Columns &m) {
    const unsigned t = threadIdx.y * blockDim.x + threadIdx.x, channels = blockDim.y;
    lines = blockDim.x;
    line = m.inner >= 8 ? threadIdx.x : t / channels;
    in_block = m.inner >= 8 ? threadIdx.y : t - line * channels;
    channel = block_of_list() * channels + in_block;
  }
  // The sum over the lines, on each of them.
  __device__ __forceinline__ double sum(double v, double *buffer) const {
    double *const mine = buffer + in_block;
    const unsigned step = blockDim.y;
    mine[line * step] = v;
    __syncthreads();
    for (unsigned half = lines / 2; half > 0; half /= 2) {
      if (line < half) mine[line * step] += mine[(line + half) * step];
      __syncthreads();
    }
    v = mine[0];
    __syncthreads();
    return v;
  }
};

template <class A>
__device__ __forceinline__ void columns_merge(const A *partial, Statistics<A> out, Columns m, unsigned parts, double eps) {
  SHARED(double, buffer, 512);
  const Line thread(m);
  const u64 channel = thread.channel;
  const unsigned line = thread.line, lines = thread.lines;
  const bool mine = channel < divide(m.period, m.inner);
  const Entries entries(m, channel, parts);
  const Counts counts(m, parts);
  double count = 0, sum = 0;
  if (mine)
    for (u64 e = line; e < entries.count; e += lines) {
      u64 part, column;
      entries.at(e, part, column);
      const A *p = partial + part * 3 * m.width + column;
      const double n = counts.of(column, part);
      count += n;
      sum += n * ((double)p[0] + (double)p[m.width]);
    }
  count = thread.sum(count, buffer);
  const double about = thread.sum(sum, buffer) / count;
  double first = 0, second = 0;
  if (mine)
    for (u64 e = line; e < entries.count; e += lines) {
      u64 part, column;
      entries.at(e, part, column);
      const A *p = partial + part * 3 * m.width + column;
      const double n = counts.of(column, part), d = ((double)p[0] - about) + (double)p[m.width];
      first += n * d;
      second += (double)p[2 * m.width] + n * d * d;
    }
  first = thread.sum(first, buffer);
  second = thread.sum(second, buffer);
  if (mine && line == 0) write_statistics(out, channel, Moments<double>(count, about, first, second), eps);
}

template <class T, class P, int U>
__device__ __forceinline__ void columns_normalize(const T *x, const P *weight, const P *bias, const Acc<T> *mean,
                                                  const Acc<T> *rest, const Acc<T> *third, T *y, Columns m,
                                                  unsigned across, int of_var, double eps) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  // From the last block to the first: see planes_normalize.
  const Stripe<T> stripe(m, across, block_across(), gridDim.y - 1 - blockIdx.y, gridDim.y);
  if (!stripe.mine) return;
  const bool vectors = aligned(x), to_vectors = aligned(y);
  A high[SIZE], scale[SIZE], shift[SIZE];
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    const u64 channel = m.channel(stripe.slot * SIZE + i);
    const Normal<A> normal(mean, rest, third, of_var, eps, channel);
    high[i] = normal.mean;
    scale[i] = normal.inv_std * (weight ? (A)load(weight + channel) : A(1));
    shift[i] = fma_(-normal.rest, scale[i], bias ? (A)load(bias + channel) : A(0));
  }
  const u64 step = stripe.lines * m.width;
  u64 row = stripe.first + stripe.line, at = stripe.at(m, row);
  for (; row < stripe.last; row += U * stripe.lines, at += U * step) {
    Raw raw[U];
    Place<T> place[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      place[u] = stripe.place(row + u * stripe.lines, at + u * step);
      raw[u] = load_slot(x, vectors, place[u], m.elements);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A v[SIZE];
      unpack(raw[u], v, (const T *)0);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) v[i] = fma_(v[i] - high[i], scale[i], shift[i]);
      store_slot(y, to_vectors, place[u], v);
    }
  }
}

// Σ dy · (x − mean) and Σ dy of the columns of one part: partial[part][two][column].
template <class T, int U>
__device__ __forceinline__ void columns_grad_sums(const T *x, const T *dy, const Acc<T> *mean, Acc<T> *partial, Columns m,
                                                  unsigned across) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  SHARED(A, lines_along, 256 * SIZE);
  SHARED(A, lines_sum, 256 * SIZE);
  const Stripe<T> stripe(m, across, block_across(), blockIdx.y, gridDim.y);
  const bool vectors = aligned(x), dy_vectors = aligned(dy);
  if (stripe.mine) {
    A high[SIZE], along[SIZE], sum[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      high[i] = mean ? mean[m.channel(stripe.slot * SIZE + i)] : A(0);
      along[i] = sum[i] = 0;
    }
    const u64 step = stripe.lines * m.width;
  u64 row = stripe.first + stripe.line, at = stripe.at(m, row);
  for (; row < stripe.last; row += U * stripe.lines, at += U * step) {
      Raw a[U], b[U];
      Place<T> place[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        place[u] = stripe.place(row + u * stripe.lines, at + u * step);
        a[u] = load_slot(x, vectors, place[u], m.elements);
        b[u] = load_slot(dy, dy_vectors, place[u], m.elements);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        A v[SIZE], g[SIZE];
        unpack(a[u], v, (const T *)0);
        unpack(b[u], g, (const T *)0);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
          along[i] = fma_(g[i], v[i] - high[i], along[i]);  // dy is zero where there is nothing
          sum[i] += g[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const unsigned at = (stripe.line * across + stripe.left) * SIZE + i;
      lines_along[at] = along[i];
      lines_sum[at] = sum[i];
    }
  }
  __syncthreads();
  const unsigned columns = across * SIZE;
  for (unsigned c = threadIdx.x; c < columns; c += blockDim.x) {
    const u64 column = block_across() * columns + c;
    if (column >= m.width) break;
    A along = 0, sum = 0;
    for (unsigned l = 0; l < stripe.lines; ++l) {
      along += lines_along[l * columns + c];
      sum += lines_sum[l * columns + c];
    }
    A *out = partial + (u64)blockIdx.y * 2 * m.width + column;
    out[0] = along;
    out[m.width] = sum;
  }
}

template <class A, class P>
__device__ __forceinline__ void columns_grad_merge(const A *partial, const P *weight, const A *mean, const A *rest,
                                                   const A *third, P *dweight, P *dbias, A *back_mean, A *back_along,
                                                   Columns m, unsigned parts, double count, int of_var, double eps,
                                                   int center) {
  SHARED(double, buffer, 512);
  const Line thread(m);
  const u64 channel = thread.channel;
  const unsigned line = thread.line, lines = thread.lines;
  const bool mine = channel < divide(m.period, m.inner);
  const Entries entries(m, channel, parts);
  double along = 0, sum = 0;
  if (mine)
    for (u64 e = line; e < entries.count; e += lines) {
      u64 part, column;
      entries.at(e, part, column);
      const A *p = partial + part * 2 * m.width + column;
      along += (double)p[0];
      sum += (double)p[m.width];
    }
  along = thread.sum(along, buffer);
  sum = thread.sum(sum, buffer);
  if (mine && line == 0) {
    const Normal<A> normal(mean, rest, third, of_var, eps, channel);
    write_grads(normal, along, sum, weight, dweight, dbias, back_mean, back_along, channel, count, center);
  }
}

template <class T, class P, int U>
__device__ __forceinline__ void columns_grad_input(const T *x, const T *dy, const P *weight, const Acc<T> *mean,
                                                   const Acc<T> *rest, const Acc<T> *third, const Acc<T> *back_mean,
                                                   const Acc<T> *back_along, T *dx, Columns m, unsigned across,
                                                   int of_var, double eps) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  const Stripe<T> stripe(m, across, block_across(), gridDim.y - 1 - blockIdx.y, gridDim.y);
  if (!stripe.mine) return;
  const bool vectors = aligned(x), dy_vectors = aligned(dy), to_vectors = aligned(dx), own = back_mean != 0;
  A high[SIZE], scale[SIZE], slope[SIZE], shift[SIZE];
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    const u64 channel = m.channel(stripe.slot * SIZE + i);
    const Normal<A> normal(mean, rest, third, of_var, eps, channel);
    const Back<A> back(normal, own ? back_mean[channel] : A(0), own ? back_along[channel] : A(0));
    high[i] = normal.mean;
    scale[i] = normal.inv_std * (weight ? (A)load(weight + channel) : A(1));
    slope[i] = back.slope;
    shift[i] = back.shift;
  }
  const u64 step = stripe.lines * m.width;
  u64 row = stripe.first + stripe.line, at = stripe.at(m, row);
  for (; row < stripe.last; row += U * stripe.lines, at += U * step) {
    Raw a[U], b[U];
    Place<T> place[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      place[u] = stripe.place(row + u * stripe.lines, at + u * step);
      a[u] = own ? load_slot(x, vectors, place[u], m.elements) : zero_raw();
      b[u] = load_slot(dy, dy_vectors, place[u], m.elements);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A v[SIZE], g[SIZE];
      unpack(a[u], v, (const T *)0);
      unpack(b[u], g, (const T *)0);
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        g[i] = own ? fma_(g[i], scale[i], -fma_(v[i] - high[i], slope[i], shift[i])) : g[i] * scale[i];
      store_slot(dx, to_vectors, place[u], g);
    }
  }
}

// running ← (1 − momentum) · running + momentum · batch, the batch variance times n / (n − 1). Of several samples, each with
// statistics of its own, the mean counts. `tracked`, if given, is one more afterwards, and a momentum below zero stands for
// one over that: there must then be one block.
template <class R, class A>
__device__ __forceinline__ void update_running(const A *mean, const A *rest, const A *var, R *running_mean, R *running_var,
                                               i64 *tracked, u64 channels, u64 samples, double momentum,
                                               double unbiased) {
  const i64 batches = tracked ? *tracked + 1 : 0;
  __syncthreads();
  if (tracked && blockIdx.x == 0 && threadIdx.x == 0) *tracked = batches;
  const double m = momentum < 0. ? 1. / (double)batches : momentum, keep = 1. - m;
  for (u64 c = (u64)blockIdx.x * blockDim.x + threadIdx.x; c < channels; c += (u64)gridDim.x * blockDim.x) {
    double sum = 0, sum_var = 0;
    for (u64 i = c; i < samples * channels; i += channels) {
      sum += (double)mean[i] + (double)rest[i];
      sum_var += (double)var[i];
    }
    running_mean[c] = (R)(keep * (double)running_mean[c] + m * (sum / (double)samples));
    running_var[c] = (R)(keep * (double)running_var[c] + m * (sum_var / (double)samples * unbiased));
  }
}

#define STATISTICS(A) A *mean, A *rest, A *inv_std, A *var
#define COLUMNS i64 elements, i64 width, i64 rows, i64 period, i64 inner
#define MATRIX (Columns{(u64)elements, (u64)width, (u64)rows, (u64)period, (u64)inner})

#define OF_X(T, t, blocks)                                                                                             \
  KERNEL(256, blocks, planes_moments_##t, const T *x, Acc<T> *partial, i64 outer, i64 channels, i64 inner, int parts,  \
         int center) {                                                                                                 \
    planes_moments<T, 4>(x, partial, outer, channels, inner, parts, center);                                           \
  }                                                                                                                    \
  KERNEL(256, 3, planes_grad_sums_##t, const T *x, const T *dy, const Acc<T> *mean, Acc<T> *partial, i64 outer,        \
         i64 channels, i64 inner, i64 per_mean, int parts) {                                                           \
    planes_grad_sums<T, 4>(x, dy, mean, partial, outer, channels, inner, per_mean, parts);                             \
  }                                                                                                                    \
  KERNEL(256, 2, columns_moments_##t, const T *x, Acc<T> *partial, COLUMNS, int across, int center) {                  \
    columns_moments<T, 4>(x, partial, MATRIX, across, center);                                                         \
  }                                                                                                                    \
  KERNEL(256, 2, columns_grad_sums_##t, const T *x, const T *dy, const Acc<T> *mean, Acc<T> *partial, COLUMNS,         \
         int across) {                                                                                                 \
    columns_grad_sums<T, 4>(x, dy, mean, partial, MATRIX, across);                                                     \
  }
#define OF_ACC(A, a)                                                                                                   \
  KERNEL(256, 1, planes_merge_##a, const A *partial, STATISTICS(A), i64 channels, int parts, double eps) {             \
    planes_merge<A>(partial, Statistics<A>{mean, rest, inv_std, var}, channels, parts, eps);                           \
  }                                                                                                                    \
  KERNEL(512, 1, columns_merge_##a, const A *partial, STATISTICS(A), COLUMNS, int parts, double eps) {                 \
    columns_merge<A>(partial, Statistics<A>{mean, rest, inv_std, var}, MATRIX, parts, eps);                            \
  }                                                                                                                    \
  KERNEL(1024, 1, update_running_##a, const A *mean, const A *rest, const A *var, A *running_mean, A *running_var,      \
         i64 *tracked, i64 channels, i64 samples, double momentum, double unbiased) {                                  \
    update_running(mean, rest, var, running_mean, running_var, tracked, channels, samples, momentum, unbiased);        \
  }
#define FIT(T, P, t, threads, blocks)                                                                                  \
  KERNEL(threads, blocks, planes_fit_##t##_##threads, const T *x, const P *weight, const P *bias, T *y,                \
         STATISTICS(Acc<T>), i64 outer, i64 channels, i64 inner, i64 span, i64 period, double eps, int center) {       \
    planes_fit<T, P, 4>(x, weight, bias, y, Statistics<Acc<T>>{mean, rest, inv_std, var}, outer, channels, inner,      \
                        span, period, eps, center);                                                                    \
  }
#define GRAD_FIT(T, P, t, threads, blocks, slots)                                                                      \
  KERNEL(threads, blocks, planes_grad_fit_##t##_##threads, const T *x, const T *dy, const P *weight,                   \
         const Acc<T> *mean, const Acc<T> *rest, const Acc<T> *inv_std, T *dx, P *dweight, P *dbias, Acc<T> *partial,  \
         i64 outer, i64 channels, i64 inner, i64 period, int center) {                                                 \
    planes_grad_fit<T, P, slots>(x, dy, weight, mean, rest, inv_std, dx, dweight, dbias, partial, outer, channels,     \
                                 inner, period, center);                                                               \
  }
#define OF_PAIR(T, P, t, blocks)                                                                                       \
  FIT(T, P, t, 256, blocks)                                                                                            \
  FIT(T, P, t, 768, 1)                                                                                                 \
  GRAD_FIT(T, P, t, 256, 2, 4)                                                                                         \
  GRAD_FIT(T, P, t, 1024, 1, 2)                                                                                        \
  KERNEL(256, blocks, planes_normalize_##t, const T *x, const P *weight, const P *bias, const Acc<T> *mean,                 \
         const Acc<T> *rest, const Acc<T> *third, T *y, i64 outer, i64 channels, i64 inner, i64 span, i64 period,      \
         int parts, int of_var, double eps) {                                                                          \
    planes_normalize<T, P, 4>(x, weight, bias, mean, rest, third, y, outer, channels, inner, span, period, parts,      \
                              of_var, eps);                                                                            \
  }                                                                                                                    \
  KERNEL(256, 2, planes_grad_input_##t, const T *x, const T *dy, const P *weight, const Acc<T> *mean,                  \
         const Acc<T> *rest, const Acc<T> *third, const Acc<T> *back_mean, const Acc<T> *back_along, T *dx, i64 outer, \
         i64 channels, i64 inner, i64 span, i64 period, int parts, int of_var, double eps) {                           \
    planes_grad_input<T, P, 4>(x, dy, weight, mean, rest, third, back_mean, back_along, dx, outer, channels, inner,    \
                               span, period, parts, of_var, eps);                                                      \
  }                                                                                                                    \
  KERNEL(256, 2, columns_normalize_##t, const T *x, const P *weight, const P *bias, const Acc<T> *mean,                \
         const Acc<T> *rest, const Acc<T> *third, T *y, COLUMNS, int across, int of_var, double eps) {                 \
    columns_normalize<T, P, 4>(x, weight, bias, mean, rest, third, y, MATRIX, across, of_var, eps);                    \
  }                                                                                                                    \
  KERNEL(256, 2, columns_grad_input_##t, const T *x, const T *dy, const P *weight, const Acc<T> *mean,                 \
         const Acc<T> *rest, const Acc<T> *third, const Acc<T> *back_mean, const Acc<T> *back_along, T *dx, COLUMNS,   \
         int across, int of_var, double eps) {                                                                         \
    columns_grad_input<T, P, 4>(x, dy, weight, mean, rest, third, back_mean, back_along, dx, MATRIX, across, of_var,   \
                                eps);                                                                                  \
  }                                                                                                                    \
  KERNEL(256, 1, planes_grad_merge_##t, const Acc<T> *partial, const P *weight, const Acc<T> *mean,                    \
         const Acc<T> *rest, const Acc<T> *third, P *dweight, P *dbias, Acc<T> *back_mean, Acc<T> *back_along,         \
         i64 channels, int parts, double count, int of_var, double eps, int center) {                                  \
    planes_grad_merge<Acc<T>, P>(partial, weight, mean, rest, third, dweight, dbias, back_mean, back_along, channels,  \
                                 parts, count, of_var, eps, center);                                                   \
  }                                                                                                                    \
  KERNEL(512, 1, columns_grad_merge_##t, const Acc<T> *partial, const P *weight, const Acc<T> *mean,                   \
         const Acc<T> *rest, const Acc<T> *third, P *dweight, P *dbias, Acc<T> *back_mean, Acc<T> *back_along,         \
         COLUMNS, int parts, double count, int of_var, double eps, int center) {                                       \
    columns_grad_merge<Acc<T>, P>(partial, weight, mean, rest, third, dweight, dbias, back_mean, back_along, MATRIX,   \
                                  parts, count, of_var, eps, center);                                                  \
  }

// Kernels that x's type alone makes are in the module of parameters of the same type, those of statistics in f32_f32's and
// f64_f64's.
#if HAS(f32_f32)
OF_ACC(float, f32)
OF_X(float, f32, 3)
OF_PAIR(float, float, f32_f32, 3)
#endif
#if HAS(f16_f16)
OF_X(f16, f16, 3)
OF_PAIR(f16, f16, f16_f16, 3)
#endif
#if HAS(bf16_bf16)
OF_X(bf16, bf16, 3)
OF_PAIR(bf16, bf16, bf16_bf16, 3)
#endif
#if HAS(f16_f32)
OF_PAIR(f16, float, f16_f32, 3)
#endif
#if HAS(bf16_f32)
OF_PAIR(bf16, float, bf16_f32, 3)
#endif
#if HAS(f64_f64)
OF_ACC(double, f64)
OF_X(double, f64, 2)
OF_PAIR(double, double, f64_f64, 2)
#endif
