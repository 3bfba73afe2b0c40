// What all kernels share: element types, 16-byte vectors, sums over lanes and blocks. Compiled for the device by nvcc,
// and as C++ behind cuda_host.h for tests. Arithmetic is IEEE's on both sides: nothing is fused but what says `fma`.
#pragma once

#if !defined(EMULATED)
// At most `threads` threads in a block, and `blocks` blocks on a multiprocessor at least.
#define KERNEL(threads, blocks, name, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T *const name = reinterpret_cast<T *>(dynamic_shared_)
#endif

// A file that asks HAS(types) becomes one module for each: ONLY says which. Without ONLY it has all.
#define MODULE_f32_f32 1
#define MODULE_f16_f16 2
#define MODULE_bf16_bf16 3
#define MODULE_f16_f32 4
#define MODULE_bf16_f32 5
#define MODULE_f64_f64 6
#define MODULE_OF_(types) MODULE_##types
#define MODULE_OF(types) MODULE_OF_(types)
#if defined(ONLY)
#define HAS(types) (MODULE_OF(ONLY) == MODULE_##types)
#else
#define HAS(types) 1
#endif

// A file that asks IN(part) becomes one module for each part as well: a driver compiles a module whole. PART says which.
#define PART_layer_norm 1
#define PART_rms_norm 2
#define PART_add_layer_norm 3
#define PART_add_rms_norm 4
#define PART_sum 5
#define PART_finish 6
#define PART_NUMBER_(part) PART_##part
#define PART_NUMBER(part) PART_NUMBER_(part)
#if defined(PART)
#define IN(part) (PART_NUMBER(PART) == PART_##part)
#else
#define IN(part) 1
#endif

typedef long long i64;

// Half precision as bits: no header of the toolkit is needed.
struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

#if defined(EMULATED)
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
// To the nearest, ties to even; a NaN becomes the one that the device's conversion gives.
static inline float f16_bits_to_float(unsigned h) {
  const unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float v = float(fraction) * 0x1p-24f;
  return sign ? -v : v;
}
static inline unsigned float_to_f16_bits(float f) {
  const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fffu;
  if (a >= 0x477ff000u) return sign | 0x7c00u;
  if (a < 0x38800000u) {
    // The unit of subnormals is 2^-24: an addition of 0.5 rounds there.
    return sign | (__float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000u);
  }
  return sign | (a - 0x38000000u + 0xfffu + (a >> 13 & 1)) >> 13;
}
static inline unsigned float_to_bf16_bits(float f) {
  const unsigned u = __float_as_uint(f);
  return f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
static inline double words_to_double(unsigned lo, unsigned hi) {
  const uint64_t u = uint64_t(hi) << 32 | lo;
  double d;
  memcpy(&d, &u, 8);
  return d;
}
static inline void double_to_words(double d, unsigned *lo, unsigned *hi) {
  uint64_t u;
  memcpy(&u, &d, 8);
  *lo = unsigned(u);
  *hi = unsigned(u >> 32);
}
#else
__device__ __forceinline__ float f16_bits_to_float(unsigned h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)h));
  return f;
}
__device__ __forceinline__ unsigned float_to_f16_bits(float f) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ unsigned float_to_bf16_bits(float f) {
  unsigned short h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ double words_to_double(unsigned lo, unsigned hi) {
  return __hiloint2double((int)hi, (int)lo);
}
__device__ __forceinline__ void double_to_words(double d, unsigned *lo, unsigned *hi) {
  *lo = (unsigned)__double2loint(d);
  *hi = (unsigned)__double2hiint(d);
}
#endif
__device__ __forceinline__ float bf16_bits_to_float(unsigned h) { return __uint_as_float(h << 16); }

// The type that T's sums and products are taken in.
template <class T> struct Accumulator {
  typedef float type;
};
template <> struct Accumulator<double> {
  typedef double type;
};
template <class T> using Acc = typename Accumulator<T>::type;

__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float sqrt_(float a) { return sqrtf(a); }
__device__ __forceinline__ double sqrt_(double a) { return sqrt(a); }

__device__ __forceinline__ float load(const float *p) { return *p; }
__device__ __forceinline__ float load(const f16 *p) { return f16_bits_to_float(p->bits); }
__device__ __forceinline__ float load(const bf16 *p) { return bf16_bits_to_float(p->bits); }
__device__ __forceinline__ double load(const double *p) { return *p; }
__device__ __forceinline__ void store(float *p, float v) { *p = v; }
__device__ __forceinline__ void store(f16 *p, float v) { p->bits = (unsigned short)float_to_f16_bits(v); }
__device__ __forceinline__ void store(bf16 *p, float v) { p->bits = (unsigned short)float_to_bf16_bits(v); }
__device__ __forceinline__ void store(double *p, double v) { *p = v; }

// v as T would hold it.
__device__ __forceinline__ float rounded(float v, const float *) { return v; }
__device__ __forceinline__ float rounded(float v, const f16 *) { return f16_bits_to_float(float_to_f16_bits(v)); }
__device__ __forceinline__ float rounded(float v, const bf16 *) { return bf16_bits_to_float(float_to_bf16_bits(v)); }
__device__ __forceinline__ double rounded(double v, const double *) { return v; }

// 16 bytes as they lie in memory.
struct Raw {
  unsigned w[4];
};
// Elements of T in 16 bytes.
template <class T> struct Lanes {
  static constexpr int count = 16 / (int)sizeof(T);
};

// p is a multiple of 16 bytes.
__device__ __forceinline__ Raw load_raw(const void *p) {
  const uint4 u = *reinterpret_cast<const uint4 *>(p);
  Raw r = {{u.x, u.y, u.z, u.w}};
  return r;
}
__device__ __forceinline__ void store_raw(void *p, const Raw &r) {
  uint4 u;
  u.x = r.w[0];
  u.y = r.w[1];
  u.z = r.w[2];
  u.w = r.w[3];
  *reinterpret_cast<uint4 *>(p) = u;
}
__device__ __forceinline__ Raw zero_raw() {
  Raw r = {{0, 0, 0, 0}};
  return r;
}

__device__ __forceinline__ void unpack(const Raw &r, float *v, const float *) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __uint_as_float(r.w[i]);
}
__device__ __forceinline__ void unpack(const Raw &r, float *v, const f16 *) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = f16_bits_to_float(r.w[i] & 0xffffu);
    v[2 * i + 1] = f16_bits_to_float(r.w[i] >> 16);
  }
}
__device__ __forceinline__ void unpack(const Raw &r, float *v, const bf16 *) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(r.w[i] << 16);
    v[2 * i + 1] = __uint_as_float(r.w[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const Raw &r, double *v, const double *) {
  v[0] = words_to_double(r.w[0], r.w[1]);
  v[1] = words_to_double(r.w[2], r.w[3]);
}
__device__ __forceinline__ Raw pack(const float *v, const float *) {
  Raw r;
#pragma unroll
  for (int i = 0; i < 4; ++i) r.w[i] = __float_as_uint(v[i]);
  return r;
}
#if defined(EMULATED)
__device__ __forceinline__ unsigned two_f16(float lo, float hi) {
  return float_to_f16_bits(lo) | float_to_f16_bits(hi) << 16;
}
__device__ __forceinline__ unsigned two_bf16(float lo, float hi) {
  return float_to_bf16_bits(lo) | float_to_bf16_bits(hi) << 16;
}
#else
__device__ __forceinline__ unsigned two_f16(float lo, float hi) {
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ unsigned two_bf16(float lo, float hi) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
#endif
__device__ __forceinline__ Raw pack(const float *v, const f16 *) {
  Raw r;
#pragma unroll
  for (int i = 0; i < 4; ++i) r.w[i] = two_f16(v[2 * i], v[2 * i + 1]);
  return r;
}
__device__ __forceinline__ Raw pack(const float *v, const bf16 *) {
  Raw r;
#pragma unroll
  for (int i = 0; i < 4; ++i) r.w[i] = two_bf16(v[2 * i], v[2 * i + 1]);
  return r;
}
__device__ __forceinline__ Raw pack(const double *v, const double *) {
  Raw r;
  double_to_words(v[0], &r.w[0], &r.w[1]);
  double_to_words(v[1], &r.w[2], &r.w[3]);
  return r;
}

// The sum over each run of LANES lanes (a power of two up to 32), on all of them. All 32 lanes of the warp take part.
template <int LANES, class A> __device__ __forceinline__ A lane_sum(A v) {
#pragma unroll
  for (int m = LANES / 2; m > 0; m >>= 1) v += __shfl_xor_sync(0xffffffffu, v, m);
  return v;
}
template <class A> __device__ __forceinline__ A warp_sum(A v) { return lane_sum<32>(v); }

// The least power of two that is not below the warps of a block.
__device__ __forceinline__ int warps_up(int warps) {
  return warps > 16 ? 32 : warps > 8 ? 16 : warps > 4 ? 8 : warps > 2 ? 4 : warps;
}
// The sums of two values over a block of one dimension, on every thread. `part` has 64 places that nothing else uses;
// another call may follow only after a barrier, or with the other half of a pair of buffers.
template <class A> __device__ __forceinline__ void block_sum2(A &a, A &b, A *part) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if (warps == 1) {
    a = warp_sum(a);
    b = warp_sum(b);
    return;
  }
  // One half of the warp adds up a, the other b.
  A mine = lane < 16 ? a : b;
  const A theirs = lane < 16 ? b : a;
  mine += __shfl_xor_sync(0xffffffffu, theirs, 16);
#pragma unroll
  for (int m = 8; m > 0; m >>= 1) mine += __shfl_xor_sync(0xffffffffu, mine, m);
  if ((lane & 15) == 0) part[2 * lane + warp] = mine;
  __syncthreads();
  const int up = warps_up(warps), at = lane & (up - 1);
  a = at < warps ? part[at] : A(0);
  b = at < warps ? part[32 + at] : A(0);
#pragma unroll
  for (int m = 16; m > 0; m >>= 1)
    if (up > m) {
      a += __shfl_xor_sync(0xffffffffu, a, m);
      b += __shfl_xor_sync(0xffffffffu, b, m);
    }
}
// The sum of one value; `part` has 32 places, with the same rule.
template <class A> __device__ __forceinline__ A block_sum(A v, A *part) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_sum(v);
  if (warps == 1) return v;
  if (lane == 0) part[warp] = v;
  __syncthreads();
  const int up = warps_up(warps), at = lane & (up - 1);
  v = at < warps ? part[at] : A(0);
#pragma unroll
  for (int m = 16; m > 0; m >>= 1)
    if (up > m) v += __shfl_xor_sync(0xffffffffu, v, m);
  return v;
}
