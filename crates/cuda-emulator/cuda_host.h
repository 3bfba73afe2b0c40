// What a `.cu` file needs to be compiled as C++17 and run on the CPU: one block at a time, its threads as fibers on one
// system thread, which barriers and shuffles switch. State is per system thread, so that tests run side by side.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#define EMULATED 1
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};

namespace emulator {

// What a thread waits for.
enum class Wait : uint8_t { Nothing, Warp, Block, Done };

// The thread that runs.
struct Thread {
  dim3 index;
  unsigned linear;
  unsigned turn;  // shuffles so far: two buffers alternate
};
struct Launch {
  dim3 grid, block, index;
  uint64_t generation;  // one for each block that ever ran on this system thread
  unsigned char *dynamic;
};
extern thread_local Thread *thread;
extern thread_local Launch launch;

void wait(Wait what);
// The exchange buffer of the thread's warp: 32 places of 8 bytes.
uint64_t *exchange();

// A shared array: one for each block, filled with NaN before the block's first access.
template <class T> struct Shared {
  std::unique_ptr<T[]> data;
  uint64_t generation = 0;
  T *get(size_t count) {
    if (generation != launch.generation) {
      data.reset(new T[count]);
      memset(static_cast<void *>(data.get()), 0xff, count * sizeof(T));
      generation = launch.generation;
    }
    return data.get();
  }
};

using Call = void (*)(void **);
void add_kernel(const char *name, Call call, unsigned arguments);
template <class... A, size_t... I>
void unpack(void (*kernel)(A...), void **p, std::index_sequence<I...>) {
  kernel(*static_cast<A *>(p[I])...);
}
template <auto K> struct Caller;
template <class... A, void (*K)(A...)> struct Caller<K> {
  static void call(void **p) { unpack(K, p, std::index_sequence_for<A...>{}); }
  static constexpr unsigned arguments = sizeof...(A);
};
struct Registration {
  Registration(const char *name, Call call, unsigned arguments) { add_kernel(name, call, arguments); }
};

template <class T> T shuffle(T v, unsigned from) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t *places = exchange();
  memcpy(&places[thread->linear % 32], &v, sizeof v);
  wait(Wait::Warp);
  T r;
  memcpy(&r, &places[from % 32], sizeof r);
  return r;
}
}  // namespace emulator

#define KERNEL(threads, blocks, name, ...)                                                          \
  extern "C" void name(__VA_ARGS__);                                                                \
  static emulator::Registration register_##name(#name, emulator::Caller<name>::call,                \
                                                emulator::Caller<name>::arguments);                 \
  extern "C" void name(__VA_ARGS__)
#define SHARED(T, name, count)                                                                      \
  static thread_local emulator::Shared<T> name##_slot;                                              \
  T *const name = name##_slot.get(count)
#define DYNAMIC_SHARED(T, name) T *const name = reinterpret_cast<T *>(emulator::launch.dynamic)

#define threadIdx (emulator::thread->index)
#define blockIdx (emulator::launch.index)
#define blockDim (emulator::launch.block)
#define gridDim (emulator::launch.grid)

static inline void __syncthreads() { emulator::wait(emulator::Wait::Block); }
static inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::Wait::Warp); }
template <class T> static inline T __shfl_xor_sync(unsigned, T v, int mask) {
  return emulator::shuffle(v, (emulator::thread->linear % 32) ^ unsigned(mask));
}
template <class T> static inline T __shfl_sync(unsigned, T v, int lane) {
  return emulator::shuffle(v, unsigned(lane));
}
template <class T> static inline T __shfl_down_sync(unsigned, T v, unsigned by) {
  const unsigned lane = emulator::thread->linear % 32;
  return emulator::shuffle(v, lane + by < 32 ? lane + by : lane);
}

static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
// The 32 bits of hi:lo that begin at bit `by` (0 to 31).
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
  const uint64_t both = uint64_t(hi) << 32 | lo;
  return unsigned(both >> (by & 31));
}
