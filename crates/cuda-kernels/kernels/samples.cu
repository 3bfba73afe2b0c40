// Batch norm with weights of each channel of each sample: a plane of a sample is then a channel of its own to the kernels of
// channels.cu, but has the statistics of its channel in all samples.
#include "planes.cuh"

// out[k][sample][channel] = in[k][channel], for mean, rest and third.
template <class A>
__device__ __forceinline__ void samples_spread(const A *mean, const A *rest, const A *third, A *out, u64 samples,
                                               u64 channels) {
  const u64 i = block_of_list() * blockDim.x + threadIdx.x, all = samples * channels;
  if (i >= all) return;
  const u64 channel = i - divide(i, channels) * channels;
  out[i] = mean[channel];
  out[all + i] = rest ? rest[channel] : A(0);
  out[2 * all + i] = third[channel];
}

// From Σ dy · (x − mean) and Σ dy of each part of each plane, partial[sample][channel][part]: the gradients of weight and
// bias of each plane, and for planes_grad_input, again for each plane, the means over the channel that its dx takes. A warp
// for each channel, a lane for every 32nd sample.
template <class A, class P>
__device__ __forceinline__ void samples_grad_merge(const A *partial, const P *weight, const A *mean, const A *rest,
                                                   const A *third, P *dweight, P *dbias, A *back_mean, A *back_along,
                                                   u64 samples, u64 channels, unsigned parts, double count, int of_var,
                                                   double eps, int center) {
  const u64 channel = block_of_list() * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const Normal<A> normal(mean, rest, third, of_var, eps, channel);
  double mean_g = 0, mean_gh = 0;
  for (u64 sample = threadIdx.x; sample < samples; sample += 32) {
    const u64 plane = sample * channels + channel;
    const A *p = partial + 2 * plane * parts;
    double about = 0, sum = 0;
    for (unsigned i = 0; i < parts; ++i) {
      about += (double)p[2 * i];
      sum += (double)p[2 * i + 1];
    }
    const double along = about_mean(about, (double)normal.rest, sum) * (double)normal.inv_std;
    if (dweight) store(dweight + plane, (Acc<P>)along);
    if (dbias) store(dbias + plane, (Acc<P>)sum);
    const double w = weight ? (double)load(weight + plane) : 1.;
    mean_g += sum * w;
    mean_gh += along * w;
  }
  if (!back_mean) return;
  const A g = center ? (A)(warp_sum(mean_g) / count) : A(0);
  const A gh = (A)(warp_sum(mean_gh) / count * (double)normal.inv_std);
  for (u64 sample = threadIdx.x; sample < samples; sample += 32) {
    back_mean[sample * channels + channel] = g;
    back_along[sample * channels + channel] = gh;
  }
}

#define OF_ACC(A, a)                                                                                                   \
  KERNEL(256, 1, samples_spread_##a, const A *mean, const A *rest, const A *third, A *out, i64 samples,                \
         i64 channels) {                                                                                               \
    samples_spread<A>(mean, rest, third, out, samples, channels);                                                      \
  }
#define OF_PAIR(T, P, t)                                                                                               \
  KERNEL(256, 1, samples_grad_merge_##t, const Acc<T> *partial, const P *weight, const Acc<T> *mean,                   \
         const Acc<T> *rest, const Acc<T> *third, P *dweight, P *dbias, Acc<T> *back_mean, Acc<T> *back_along,         \
         i64 samples, i64 channels, int parts, double count, int of_var, double eps, int center) {                     \
    samples_grad_merge<Acc<T>, P>(partial, weight, mean, rest, third, dweight, dbias, back_mean, back_along, samples,  \
                                  channels, parts, count, of_var, eps, center);                                        \
  }
OF_ACC(float, f32)
OF_ACC(double, f64)
OF_PAIR(float, float, f32_f32)
OF_PAIR(f16, f16, f16_f16)
OF_PAIR(bf16, bf16, bf16_bf16)
OF_PAIR(f16, float, f16_f32)
OF_PAIR(bf16, float, bf16_f32)
OF_PAIR(double, double, f64_f64)
