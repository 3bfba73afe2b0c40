// Group and instance norm, what they do not share with planes: the moments of a group are those of one plane of all its
// elements (channels.cu), the sums of the backward are taken for each channel of each sample.
#include "planes.cuh"

// From Σ dy · (x − mean) and Σ dy of each channel of each sample, partial[sample][channel][part]: in the first blocks, for
// each group, the means that grad_input takes; in the others, for each channel, the gradients of weight and bias. A warp
// each. Without `back_mean` there are only the latter.
template <class A, class P>
__device__ __forceinline__ void groups_grad_merge(const A *partial, const P *weight, const A *mean, const A *rest,
                                                  const A *inv_std, P *dweight, P *dbias, A *back_mean, A *back_along,
                                                  u64 samples, u64 channels, u64 num_groups, unsigned parts,
                                                  double count) {
  const u64 per_group = divide(channels, num_groups), groups = samples * num_groups;
  const u64 group_blocks = back_mean ? (groups + blockDim.y - 1) / blockDim.y : 0;
  const u64 block = block_of_list();
  if (block < group_blocks) {
    const u64 group = block * blockDim.y + threadIdx.y;
    if (group >= groups) return;
    const u64 first = (group - divide(group, num_groups) * num_groups) * per_group, entries = per_group * parts;
    const A *p = partial + 2 * group * entries;
    double along = 0, sum = 0;
    for (u64 e = threadIdx.x; e < entries; e += 32) {
      const double w = weight ? (double)load(weight + first + divide(e, parts)) : 1.;
      along += (double)p[2 * e] * w;
      sum += (double)p[2 * e + 1] * w;
    }
    along = warp_sum(along);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
      const double s = (double)inv_std[group];
      back_mean[group] = (A)(sum / count);
      back_along[group] = (A)(about_mean(along, (double)rest[group], sum) * s / count * s);
    }
    return;
  }
  const u64 channel = (block - group_blocks) * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const u64 in_sample = divide(channel, per_group);
  double along = 0, sum = 0;
  for (u64 e = threadIdx.x; e < samples * parts; e += 32) {
    const u64 sample = divide(e, parts), part = e - sample * parts, group = sample * num_groups + in_sample;
    const A *p = partial + 2 * ((sample * channels + channel) * parts + part);
    along += about_mean((double)p[0], (double)rest[group], (double)p[1]) * (double)inv_std[group];
    sum += (double)p[1];
  }
  along = warp_sum(along);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    if (dweight) store(dweight + channel, (Acc<P>)along);
    if (dbias) store(dbias + channel, (Acc<P>)sum);
  }
}

// The backward of a group that stays in cache, in one launch: a block reads the channels of its group, a run of a channel
// for each warp, then all again. `runs` is how many runs make up a channel. Dynamic shared memory: 2 · per_group · runs.
template <class T, class P, int U>
__device__ __forceinline__ void groups_grad_fit(const T *x, const T *dy, const P *weight, const Acc<T> *mean,
                                                const Acc<T> *rest, const Acc<T> *inv_std, T *dx, Acc<T> *partial,
                                                u64 per_group, u64 inner, u64 num_groups, unsigned runs) {
  typedef Acc<T> A;
  constexpr int SIZE = Lanes<T>::count;
  DYNAMIC_SHARED(A, sums);
  SHARED(A, totals, 2);
  const u64 group = blockIdx.x;
  const bool vectors = aligned(x), dy_vectors = aligned(dy), to_vectors = aligned(dx);
  const Normal<A> normal(mean, rest, inv_std, 0, 0., group);
  const unsigned lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const unsigned items = (unsigned)per_group * runs;
  const u64 limit = gridDim.x * per_group * inner;
  const Planes<T> plane(1, 1, inner, 0);
  const unsigned slots = (unsigned)plane.slots, per = (slots + runs - 1) / runs;
  // Short runs take 8 lanes, long ones all.
  const unsigned width = per <= 16 ? 8 : 32, together = 32 / width;
  for (unsigned base = warp * together; base < items; base += warps * together) {
    const unsigned item = base + lane / width;
    const unsigned c = item / runs, run = item - c * runs;
    const u64 start = (group * per_group + c) * inner;
    const unsigned to = item >= items ? 0 : (run + 1) * per < slots ? (run + 1) * per : slots;
    A along = 0, sum = 0;
    for (unsigned s = run * per + lane % width; s < to; s += width * U) {
      Raw a[U], b[U];
      Place<T> place[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        place[u] = place_in<T>(start, inner, s + width * u);
        if (s + width * u >= to) place[u].high = place[u].low = 0;
        a[u] = load_slot(x, vectors, place[u], limit);
        b[u] = load_slot(dy, dy_vectors, place[u], limit);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) add_products<T>(a[u], b[u], normal.mean, along, sum);
    }
    along = width == 8 ? lane_sum<8>(along) : warp_sum(along);
    sum = width == 8 ? lane_sum<8>(sum) : warp_sum(sum);
    if (lane % width == 0 && item < items) {
      sums[2 * item] = along;
      sums[2 * item + 1] = sum;
    }
  }
  __syncthreads();
  const u64 first = (group - divide(group, num_groups) * num_groups) * per_group;
  // The first warp adds up each channel's runs, in order, and all channels.
  if (warp == 0) {
    A along = 0, sum = 0;
    for (unsigned c = lane; c < (unsigned)per_group; c += 32) {
      A one = 0, two = 0;
      for (unsigned run = 0; run < runs; ++run) {
        one += sums[2 * (c * runs + run)];
        two += sums[2 * (c * runs + run) + 1];
      }
      if (partial) {
        partial[2 * (group * per_group + c)] = one;
        partial[2 * (group * per_group + c) + 1] = two;
      }
      const A w = weight ? (A)load(weight + first + c) : A(1);
      along = fma_(w, one, along);
      sum = fma_(w, two, sum);
    }
    along = warp_sum(along);
    sum = warp_sum(sum);
    if (lane == 0) {
      totals[0] = along;
      totals[1] = sum;
    }
  }
  __syncthreads();
  const A count = (A)(per_group * inner), mean_g = totals[1] / count;
  const Back<A> back(normal, mean_g,
                     about_mean(totals[0], normal.rest, totals[1]) * normal.inv_std / count * normal.inv_std);
  const u64 start = group * per_group * inner;
  const Planes<T> all(1, 1, per_group * inner, 0);
  const Pairs<T, P> pairs(weight, (const P *)0, group, per_group * inner, inner, num_groups);
  for (unsigned s = threadIdx.x; s < (unsigned)all.slots; s += blockDim.x * U) {
    Raw a[U], b[U];
    Place<T> place[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      place[u] = place_in<T>(start, per_group * inner, s + u * blockDim.x);
      a[u] = load_slot(x, vectors, place[u], limit);
      b[u] = load_slot(dy, dy_vectors, place[u], limit);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A v[SIZE], g[SIZE];
      unpack(a[u], v, (const T *)0);
      unpack(b[u], g, (const T *)0);
      pairs.each(place[u], start, [&](int i, A w, A) {
        g[i] = back.of(v[i], g[i], w);
      });
      store_slot(dx, to_vectors, place[u], g);
    }
  }
}

#define OF_PAIR(T, P, t)                                                                                               \
  KERNEL(256, 1, groups_grad_merge_##t, const Acc<T> *partial, const P *weight, const Acc<T> *mean,                    \
         const Acc<T> *rest, const Acc<T> *inv_std, P *dweight, P *dbias, Acc<T> *back_mean, Acc<T> *back_along,       \
         i64 samples, i64 channels, i64 num_groups, int parts, double count) {                                         \
    groups_grad_merge<Acc<T>, P>(partial, weight, mean, rest, inv_std, dweight, dbias, back_mean, back_along, samples, \
                                 channels, num_groups, parts, count);                                                  \
  }                                                                                                                    \
  KERNEL(512, 1, groups_grad_fit_##t, const T *x, const T *dy, const P *weight, const Acc<T> *mean,                    \
         const Acc<T> *rest, const Acc<T> *inv_std, T *dx, Acc<T> *partial, i64 per_group, i64 inner, i64 num_groups,  \
         int runs) {                                                                                                   \
    groups_grad_fit<T, P, 4>(x, dy, weight, mean, rest, inv_std, dx, partial, per_group, inner, num_groups, runs);     \
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
