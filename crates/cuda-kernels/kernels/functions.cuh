// Functions of a number: exponentials, a logarithm, and activations. They are made of additions, products and divisions,
// so that the device has the bits of the emulator.
#pragma once
#include "common.cuh"

// exp of x, which is not above zero by more than a rounding; zero where it is far below.
__device__ __forceinline__ float exp_(float x) {
  const float least = -87.f, shift = 12582912.f;
  const float bounded = x < least ? least : x;
  const float n = (bounded * 1.44269504088896340736f + shift) - shift;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float sum = 1.98756915e-4f;
  sum = fma_(sum, r, 1.3981999507e-3f);
  sum = fma_(sum, r, 8.3334519073e-3f);
  sum = fma_(sum, r, 4.1665795894e-2f);
  sum = fma_(sum, r, 1.6666665459e-1f);
  sum = fma_(sum, r, 5.0000001201e-1f);
  const float power = fma_(sum, r * r, r) + 1.f;
  // NaN has no power of two, and stays.
  if (x != x) return x;
  const float two = __uint_as_float((unsigned)((int)n + 127) << 23);
  return x < least ? 0.f : power * two;
}
__device__ __forceinline__ double exp_(double x) {
  const double least = -708., shift = 6755399441055744.;
  const double bounded = x < least ? least : x;
  const double n = (bounded * 1.44269504088896340736 + shift) - shift;
  const double r = (bounded - n * 6.93145751953125e-1) - n * 1.4286068203094172e-6;
  double sum = 1. / 6227020800.;
  sum = fma_(sum, r, 1. / 479001600.);
  sum = fma_(sum, r, 1. / 39916800.);
  sum = fma_(sum, r, 1. / 3628800.);
  sum = fma_(sum, r, 1. / 362880.);
  sum = fma_(sum, r, 1. / 40320.);
  sum = fma_(sum, r, 1. / 5040.);
  sum = fma_(sum, r, 1. / 720.);
  sum = fma_(sum, r, 1. / 120.);
  sum = fma_(sum, r, 1. / 24.);
  sum = fma_(sum, r, 1. / 6.);
  sum = fma_(sum, r, 1. / 2.);
  const double power = fma_(sum, r * r, r) + 1.;
  if (x != x) return x;
  const double two = words_to_double(0, (unsigned)((int)n + 1023) << 20);
  return x < least ? 0. : power * two;
}

// The logarithm of x, which is a usual number of at least one; NaN stays.
__device__ __forceinline__ double log_(double x) {
  if (!(x >= 1.) || x - x != 0.) return x;
  unsigned lo, hi;
  double_to_words(x, &lo, &hi);
  int e = (int)(hi >> 20) - 1023;
  double m = words_to_double(lo, (hi & 0xfffffu) | 0x3ff00000u);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    e += 1;
  }
  // ln m = 2 artanh(s).
  const double s = (m - 1.) / (m + 1.), s2 = s * s;
  double sum = 1. / 23.;
#pragma unroll
  for (int k = 21; k > 1; k -= 2) sum = fma_(sum, s2, 1. / k);
  const double low = 2. * fma_(s * s2, sum, s);
  return fma_((double)e, 6.93145751953125e-1, fma_((double)e, 1.4286068203094172e-6, low));
}

// Functions behind a normalization; the numbers are those of geometry::pointwise.
enum {
  IDENTITY = 0,
  RELU = 1,
  RELU6 = 2,
  LEAKY_RELU = 3,
  SILU = 4,
  GELU = 5,
  GELU_TANH = 6,
  HARD_SWISH = 7,
  SIGMOID = 8,
  MISH = 9
};

// e^-|u|.
template <class A> __device__ __forceinline__ A decay(A u) { return exp_(u > A(0) ? -u : u); }

// The logistic function of u, and what it is short of one.
template <class A> __device__ __forceinline__ void logistic(A u, A &value, A &rest) {
  const A e = decay(u), large = A(1) / (A(1) + e), small = e * large;
  value = u > A(0) ? large : small;
  rest = u > A(0) ? small : large;
}

// Chebyshev coefficients of ln(erfc(z) / t) + z^2 in 2t - 1, with t = 2 / (2 + z) and z >= 0 (Press et al., Numerical
// Recipes, third edition, 6.2.2). Those of the first N count in a type.
template <class A> struct Terms {
  static constexpr int count = 12;
};
template <> struct Terms<double> {
  static constexpr int count = 28;
};
template <class A> __device__ __forceinline__ A normal_distribution(A u) {
  const double c[28] = {
      -1.3026537197817094, 6.419697923564902e-1,  1.9476473204185836e-2, -9.561514786808631e-3, -9.46595344482036e-4,
      3.66839497852761e-4, 4.2523324806907e-5,    -2.0278578112534e-5,   -1.624290004647e-6,    1.303655835580e-6,
      1.5626441722e-8,     -8.5238095915e-8,      6.529054439e-9,        5.059343495e-9,        -9.91364156e-10,
      -2.27365122e-10,     9.6467911e-11,         2.394038e-12,          -6.886027e-12,         8.94487e-13,
      3.13092e-13,         -1.12708e-13,          3.81e-16,              7.106e-15,             -1.523e-15,
      -9.4e-17,            1.21e-16,              -2.8e-17};
  const A z = (u > A(0) ? u : -u) * A(0.70710678118654752440);
  const A t = A(2) / (A(2) + z), x2 = A(4) * t - A(2);
  A d = 0, before = 0;
#pragma unroll
  for (int k = Terms<A>::count - 1; k > 0; --k) {
    const A next = (x2 * d - before) + A(c[k]);
    before = d;
    d = next;
  }
  const A series = A(0.5) * (A(c[0]) + x2 * d) - before;
  const A tail = A(0.5) * (t * exp_(series - z * z));
  return u > A(0) ? A(1) - tail : tail;
}

// The argument of the logistic function that GELU by a hyperbolic tangent is u times. Beyond 30 that function is 0 or 1,
// and the cube would overflow.
template <class A> __device__ __forceinline__ A tanh_argument(A u) {
  const A v = u <= A(-30) ? A(-30) : u >= A(30) ? A(30) : u;
  return A(2 * 0.7978845608028654) * (v + A(0.044715) * (v * v) * v);
}

// tanh(ln(1 + e^u)) as a fraction, and e^-|u|.
template <class A> __device__ __forceinline__ void mish(A u, A &above, A &below, A &e) {
  e = decay(u);
  const A twice = A(2) * e, square = e * e;
  const bool positive = u > A(0);
  above = positive ? A(1) + twice : square + twice;
  below = positive ? (A(1) + twice) + A(2) * square : (square + twice) + A(2);
}

// The value of an activation. `slope` is that of LEAKY_RELU below zero.
template <class A> __device__ __forceinline__ A activated(int kind, A slope, A u) {
  A s, rest, e;
  switch (kind) {
    case RELU: return u <= A(0) ? A(0) : u;
    case RELU6: return u <= A(0) ? A(0) : u >= A(6) ? A(6) : u;
    case LEAKY_RELU: return u <= A(0) ? u * slope : u;
    case SILU: logistic(u, s, rest); return u * s;
    case GELU: return u * normal_distribution(u);
    case GELU_TANH: logistic(tanh_argument(u), s, rest); return u * s;
    case HARD_SWISH: return u <= A(-3) ? A(0) : u >= A(3) ? u : u * (u + A(3)) / A(6);
    case SIGMOID: logistic(u, s, rest); return s;
    case MISH: mish(u, s, rest, e); return u * (s / rest);
    default: return u;
  }
}

// The slope of an activation.
template <class A> __device__ __forceinline__ A slope_of(int kind, A slope, A u) {
  A s, rest, e;
  switch (kind) {
    case RELU: return u > A(0) ? A(1) : A(0);
    case RELU6: return u <= A(0) || u >= A(6) ? A(0) : A(1);
    case LEAKY_RELU: return u > A(0) ? A(1) : slope;
    case SILU: logistic(u, s, rest); return s * (A(1) + u * rest);
    case GELU: return normal_distribution(u) + u * (A(0.3989422804014327) * exp_(A(-0.5) * u * u));
    case GELU_TANH: {
      const A v = u <= A(-30) ? A(-30) : u >= A(30) ? A(30) : u;
      logistic(tanh_argument(v), s, rest);
      const A inner = A(2 * 0.7978845608028654) * (A(1) + A(3 * 0.044715) * (v * v));
      return s + v * (s * rest) * inner;
    }
    case HARD_SWISH: return u <= A(-3) ? A(0) : u >= A(3) ? A(1) : (u + u + A(3)) / A(6);
    case SIGMOID: logistic(u, s, rest); return s * rest;
    case MISH: {
      mish(u, s, rest, e);
      const A large = A(1) / (A(1) + e), logistic_of_u = u > A(0) ? large : e * large;
      const A short_of = (u > A(0) ? A(2) * (e * e) : A(2)) * (rest + s);
      return s / rest + u * (short_of / (rest * rest)) * logistic_of_u;
    }
    default: return A(1);
  }
}
