// The mixture of switchable norm: the moments of planes, samples and channels, mixed by learned shares, in double. The input is
// the mean and the variance of each plane, [2, samples, channels]; a few numbers for each plane, so that a plane is a
// thread's, and a sample or channel a warp's.
//
// Means are less an offset, that of equal means being zero: the mean of the first plane, or of the first of each sample where
// samples do not see each other.
#include "functions.cuh"
#include "planes.cuh"

// The bits of `flags`.
enum {
  // The moments of planes are among those that are mixed.
  INSTANCE = 1,
  // Those of channels are, and formed of the planes.
  OWN = 2,
  // Those of channels are, and the caller's.
  GIVEN = 4
};

struct Mixed {
  const double *moments, *logits;
  // Moments of samples [2, samples] and of channels [2, channels].
  const double *layers, *batch;
  u64 samples, channels;
  double plane_factor;
  int flags;

  __device__ __forceinline__ bool has_batch() const { return flags & (OWN | GIVEN); }
  __device__ __forceinline__ int sources() const { return 1 + (flags & INSTANCE ? 1 : 0) + (has_batch() ? 1 : 0); }
  __device__ __forceinline__ double offset(u64 sample) const {
    const double v = moments[flags & OWN ? 0 : sample * channels];
    return v - v == 0. ? v : 0.;
  }
  __device__ __forceinline__ double mean(u64 plane, u64 sample) const { return moments[plane] - offset(sample); }
  __device__ __forceinline__ double var(u64 plane) const { return moments[samples * channels + plane] * plane_factor; }
  // The shares of the means, or of the variances.
  __device__ __forceinline__ void shares(int of_vars, double *s) const {
    const int n = sources();
    const double *p = logits + of_vars * n;
    double highest = p[0];
    for (int k = 1; k < n; ++k) highest = p[k] > highest ? p[k] : highest;
    double sum = 0;
    for (int k = 0; k < n; ++k) {
      s[k] = exp_(p[k] - highest);
      sum += s[k];
    }
    for (int k = 0; k < n; ++k) s[k] /= sum;
  }
  // The moments that are mixed for a plane, in the order of the shares; how many.
  __device__ __forceinline__ int terms(u64 plane, double *m, double *v) const {
    const u64 sample = divide(plane, channels), channel = plane - sample * channels;
    int k = 0;
    if (flags & INSTANCE) {
      m[k] = mean(plane, sample);
      v[k++] = var(plane);
    }
    m[k] = layers[sample];
    v[k++] = layers[samples + sample];
    if (has_batch()) {
      m[k] = batch[channel] - (flags & GIVEN ? offset(sample) : 0.);
      v[k++] = batch[channels + channel];
    }
    return k;
  }
};

// The moments of the union of the planes of a sample, or of a channel, by a warp; the variance times `factor`.
__device__ __forceinline__ void union_of(const Mixed &of, u64 first, u64 step, u64 count, double factor, double *out_mean,
                                         double *out_var) {
  double sum = 0;
  for (u64 i = threadIdx.x; i < count; i += 32) {
    const u64 plane = first + i * step;
    sum += of.mean(plane, divide(plane, of.channels));
  }
  const double mean = warp_sum(sum) / (double)count;
  double var = 0;
  for (u64 i = threadIdx.x; i < count; i += 32) {
    const u64 plane = first + i * step;
    const double d = of.mean(plane, divide(plane, of.channels)) - mean;
    var += of.var(plane) + d * d;
  }
  var = warp_sum(var) / (double)count * factor;
  if (threadIdx.x == 0) {
    *out_mean = mean;
    *out_var = var;
  }
}

KERNEL(256, 1, mixture_unions, const double *moments, double *layers, double *batch, double *mean, double *rest,
       double *inv_std, double *var, i64 samples, i64 channels, double plane_factor, double layer_factor,
       double batch_factor, double eps, int flags) {
  const Mixed of = {moments, nullptr, nullptr, nullptr, (u64)samples, (u64)channels, plane_factor, flags};
  const u64 item = block_of_list() * blockDim.y + threadIdx.y;
  if (item < of.samples) {
    union_of(of, item * of.channels, 1, of.channels, layer_factor, layers + item, layers + of.samples + item);
    return;
  }
  const u64 channel = item - of.samples;
  if (channel >= of.channels || !(flags & OWN)) return;
  double *const to_mean = batch + channel, *const to_var = batch + of.channels + channel;
  union_of(of, channel, of.channels, of.samples, batch_factor, to_mean, to_var);
  if (threadIdx.x) return;
  const double whole = *to_mean + of.offset(0);
  mean[channel] = whole;
  rest[channel] = 0;
  inv_std[channel] = inverse_root(*to_var, eps);
  var[channel] = *to_var;
}

// The coefficients of planes, and the mixed mean, the mixed variance and one over its root, [3, planes].
KERNEL(256, 1, mixture_forward, const double *moments, const double *weight, const double *logits, const double *layers,
       const double *batch, double *y, double *normal, i64 samples, i64 channels, double plane_factor, double eps,
       int flags) {
  const Mixed of = {moments, logits, layers, batch, (u64)samples, (u64)channels, plane_factor, flags};
  const u64 planes = of.samples * of.channels, plane = block_of_list() * blockDim.x + threadIdx.x;
  if (plane >= planes) return;
  double m[3], v[3], of_means[3], of_vars[3], mean = 0, var = 0;
  const int n = of.terms(plane, m, v);
  of.shares(0, of_means);
  of.shares(1, of_vars);
  for (int k = 0; k < n; ++k) {
    mean += of_means[k] * m[k];
    var += of_vars[k] * v[k];
  }
  const u64 sample = divide(plane, of.channels);
  const double inv_std = inverse_root(var, eps);
  const double scale = inv_std * (weight ? weight[plane - sample * of.channels] : 1.);
  normal[plane] = mean;
  normal[planes + plane] = var;
  normal[2 * planes + plane] = inv_std;
  y[plane] = scale;
  // About the mean of its own plane, which cancels: large means cost no digits.
  y[planes + plane] = (of.mean(plane, sample) - mean) * scale;
  y[2 * planes + plane] = moments[plane];
}

// The gradients of the mixed mean and variance of a plane, and that of 1/σ over the weight.
struct MixedGrads {
  double mean, var, scale;
  __device__ __forceinline__ MixedGrads(const Mixed &of, const double *weight, const double *normal, const double *dy, u64 plane) {
    const u64 planes = of.samples * of.channels, sample = divide(plane, of.channels);
    const double w = weight ? weight[plane - sample * of.channels] : 1., inv_std = normal[2 * planes + plane];
    const double dshift = dy[planes + plane];
    scale = dy[plane] + dshift * (of.mean(plane, sample) - normal[plane]);
    mean = -(dshift * (inv_std * w));
    var = scale * w * (-0.5 * (inv_std * inv_std * inv_std));
  }
};

// The sums over samples [2, samples] and channels [2, channels] of the gradients of mixed means and variances; those of the
// weights; and for each sample what its planes add to the gradients of the logits, [samples, 6].
KERNEL(256, 1, mixture_sums, const double *moments, const double *weight, const double *layers, const double *batch,
       const double *normal, const double *dy, double *by_sample, double *by_channel, double *dweight, double *partial,
       i64 samples, i64 channels, double plane_factor, int flags) {
  const Mixed of = {moments, nullptr, layers, batch, (u64)samples, (u64)channels, plane_factor, flags};
  const u64 planes = of.samples * of.channels, item = block_of_list() * blockDim.y + threadIdx.y;
  const bool is_sample = item < of.samples;
  const u64 channel = item - of.samples;
  if (!is_sample && channel >= of.channels) return;
  double mean = 0, var = 0, along = 0, away[6] = {0, 0, 0, 0, 0, 0};
  if (is_sample) {
    for (u64 c = threadIdx.x; c < of.channels; c += 32) {
      const u64 plane = item * of.channels + c;
      const MixedGrads back(of, weight, normal, dy, plane);
      mean += back.mean;
      var += back.var;
      double m[3], v[3];
      const int n = of.terms(plane, m, v);
      for (int k = 0; k < n; ++k) {
        away[k] += back.mean * (m[k] - normal[plane]);
        away[3 + k] += back.var * (v[k] - normal[planes + plane]);
      }
    }
  } else {
    for (u64 s = threadIdx.x; s < of.samples; s += 32) {
      const u64 plane = s * of.channels + channel;
      const MixedGrads back(of, weight, normal, dy, plane);
      mean += back.mean;
      var += back.var;
      along += back.scale * normal[2 * planes + plane];
    }
  }
  mean = warp_sum(mean);
  var = warp_sum(var);
  if (is_sample) {
#pragma unroll
    for (int k = 0; k < 6; ++k) away[k] = warp_sum(away[k]);
    if (threadIdx.x) return;
    by_sample[item] = mean;
    by_sample[of.samples + item] = var;
    for (int k = 0; k < 6; ++k) partial[6 * item + k] = away[k];
    return;
  }
  along = warp_sum(along);
  if (threadIdx.x) return;
  by_channel[channel] = mean;
  by_channel[of.channels + channel] = var;
  dweight[channel] = along;
}

// The gradients of the moments of planes; the first block's last step is that of the logits, [2, sources].
KERNEL(256, 1, mixture_backward, const double *moments, const double *weight, const double *logits, const double *layers,
       const double *batch, const double *normal, const double *dy, const double *by_sample, const double *by_channel,
       const double *partial, double *dx, double *dlogits, i64 samples, i64 channels, double plane_factor,
       double layer_factor, double batch_factor, int flags) {
  const Mixed of = {moments, logits, layers, batch, (u64)samples, (u64)channels, plane_factor, flags};
  const u64 planes = of.samples * of.channels, plane = block_of_list() * blockDim.x + threadIdx.x;
  double of_means[3], of_vars[3];
  of.shares(0, of_means);
  of.shares(1, of_vars);
  const int n = of.sources(), layer = flags & INSTANCE ? 1 : 0;
  if (plane < 2 * n) {
    const int of_var = plane >= n, k = (int)plane - of_var * n;
    double sum = 0;
    for (u64 s = 0; s < of.samples; ++s) sum += partial[6 * s + 3 * of_var + k];
    dlogits[plane] = sum * (of_var ? of_vars : of_means)[k];
  }
  if (plane >= planes) return;
  const u64 sample = divide(plane, of.channels), channel = plane - sample * of.channels;
  const MixedGrads back(of, weight, normal, dy, plane);
  const double mean = of.mean(plane, sample), rows = (double)of.channels, columns = (double)of.samples;
  double dvar = of_vars[layer] / rows * layer_factor * by_sample[of.samples + sample];
  double dmean = of_means[layer] / rows * by_sample[sample] + 2. * dvar * (mean - layers[sample]);
  if (flags & OWN) {
    const double more = of_vars[layer + 1] / columns * batch_factor * by_channel[of.channels + channel];
    dmean += of_means[layer + 1] / columns * by_channel[channel] + 2. * more * (mean - batch[channel]);
    dvar += more;
  }
  if (flags & INSTANCE) {
    dmean += of_means[0] * back.mean;
    dvar += of_vars[0] * back.var;
  }
  dx[plane] = dmean;
  dx[planes + plane] = dvar * plane_factor;
}
