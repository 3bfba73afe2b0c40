// Runs blocks of fibers: see cuda_host.h.
#include "cuda_host.h"

#include <cstdlib>
#include <map>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#include <sys/mman.h>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {
constexpr size_t STACK = 64 << 10;

struct Context {
#if defined(__x86_64__)
  void *sp = nullptr;
#else
  ucontext_t ucontext;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void *fake = nullptr;
  const void *bottom = nullptr;
  size_t size = 0;
#endif
};
struct Fiber {
  Thread thread;
  Wait wait;
  Context context;
};
struct Pool {
  unsigned char *stacks = nullptr;
  std::vector<Fiber> fibers;
  std::vector<uint64_t> exchange;  // [warp][2][32]
  Context scheduler;
  Fiber *current = nullptr;
  Call call = nullptr;
  void **params = nullptr;
  ~Pool() {
    if (stacks) munmap(stacks, 1024 * STACK);
  }
};
thread_local Pool pool;

#if defined(__x86_64__)
// Saves the registers that a function must preserve on this stack, and takes them from the other.
__attribute__((naked, noinline)) void swap(void **, void *) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

void change(Context &from, Context &to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  swap(&from.sp, to.sp);
#else
  swapcontext(&from.ucontext, &to.ucontext);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &pool.scheduler.bottom, &pool.scheduler.size);
#endif
  pool.call(pool.params);
  wait(Wait::Done);
  abort();
}

void prepare(Fiber &f, unsigned char *stack) {
#if defined(__SANITIZE_ADDRESS__)
  f.context.fake = nullptr;
  f.context.bottom = stack;
  f.context.size = STACK;
#endif
#if defined(__x86_64__)
  void **sp = reinterpret_cast<void **>(stack + STACK);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void *>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.context.sp = sp;
#else
  getcontext(&f.context.ucontext);
  f.context.ucontext.uc_stack.ss_sp = stack;
  f.context.ucontext.uc_stack.ss_size = STACK;
  f.context.ucontext.uc_link = nullptr;
  makecontext(&f.context.ucontext, entry, 0);
#endif
}

// 0 to count - 1: ascending, descending, or shuffled by the seed.
std::vector<unsigned> sequence(unsigned count, unsigned order, uint64_t salt) {
  std::vector<unsigned> s(count);
  for (unsigned i = 0; i < count; ++i) s[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) {
    uint64_t state = order * 0x9e3779b97f4a7c15ull + salt;
    for (unsigned i = count; i > 1; --i) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(s[i - 1], s[(state >> 33) % i]);
    }
  }
  return s;
}

struct Entry {
  Call call;
  unsigned arguments;
};
std::map<std::string, Entry> &kernels() {
  static std::map<std::string, Entry> all;
  return all;
}

enum Fault { NONE = 0, NO_KERNEL = 1, GEOMETRY = 2, BARRIER = 3, SHUFFLE = 4, ARGUMENTS = 5 };

Fault run_block(unsigned threads, unsigned order) {
  auto &fibers = pool.fibers;
  for (unsigned t = 0; t < threads; ++t) {
    const dim3 b = launch.block;
    fibers[t].thread = {{t % b.x, t / b.x % b.y, t / (b.x * b.y)}, t, 0};
    fibers[t].wait = Wait::Nothing;
    prepare(fibers[t], pool.stacks + t * STACK);
  }
  const auto turns = sequence(threads, order, launch.generation);
  for (;;) {
    bool ran = false;
    for (unsigned t : turns) {
      Fiber &f = fibers[t];
      if (f.wait != Wait::Nothing) continue;
      ran = true;
      pool.current = &f;
      thread = &f.thread;
      change(pool.scheduler, f.context);
    }
    // Warps go on alone; a lane that waits elsewhere, or has left, is an error on the device.
    bool moved = false;
    for (unsigned w = 0; w < threads; w += 32) {
      unsigned waits = 0, left = 0;
      for (unsigned t = w; t < w + 32; ++t) {
        waits += fibers[t].wait == Wait::Warp;
        left += fibers[t].wait == Wait::Done;
      }
      if (waits && left) return SHUFFLE;
      if (waits != 32) continue;
      moved = true;
      for (unsigned t = w; t < w + 32; ++t) fibers[t].wait = Wait::Nothing;
    }
    if (moved || ran) continue;
    unsigned done = 0, barrier = 0;
    for (unsigned t = 0; t < threads; ++t) {
      done += fibers[t].wait == Wait::Done;
      barrier += fibers[t].wait == Wait::Block;
    }
    if (done == threads) return NONE;
    if (barrier == threads) {
      for (unsigned t = 0; t < threads; ++t) fibers[t].wait = Wait::Nothing;
      continue;
    }
    return barrier + done == threads ? BARRIER : SHUFFLE;
  }
}
}  // namespace

thread_local Thread *thread = nullptr;
thread_local Launch launch = {};

void wait(Wait what) {
  Fiber *f = pool.current;
  f->wait = what;
  change(f->context, pool.scheduler);
}
uint64_t *exchange() { return &pool.exchange[thread->linear / 32 * 64 + (thread->turn++ & 1) * 32]; }
void add_kernel(const char *name, Call call, unsigned arguments) { kernels()[name] = {call, arguments}; }
}  // namespace emulator

// `order`: 0 ascending, 1 descending, else the seed of a shuffle, of threads and of blocks. `arguments`: how many `params`
// has, or ~0 where the caller does not know.
extern "C" int candle_norm_emulate(const char *name, const unsigned *grid, const unsigned *block, unsigned shared,
                                   void **params, unsigned arguments, unsigned order) {
  using namespace emulator;
  const auto found = kernels().find(name);
  if (found == kernels().end()) return NO_KERNEL;
  if (found->second.arguments != arguments && arguments != ~0u) return ARGUMENTS;
  const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  if (threads == 0 || threads > 1024 || threads % 32 || block[2] > 64 || blocks == 0 || grid[0] > 0x7fffffffu ||
      grid[1] > 65535 || grid[2] > 65535 || blocks > 0xffffffffu || shared > 99 * 1024)
    return GEOMETRY;
  if (!pool.stacks)
    pool.stacks = static_cast<unsigned char *>(
        mmap(nullptr, 1024 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (pool.fibers.size() < threads) pool.fibers.resize(threads);
  pool.exchange.assign(threads / 32 * 64, ~uint64_t(0));
  pool.call = found->second.call;
  pool.params = params;
  launch.grid = {grid[0], grid[1], grid[2]};
  launch.block = {block[0], block[1], block[2]};
  unsigned char *dynamic = nullptr;
  if (shared && posix_memalign(reinterpret_cast<void **>(&dynamic), 128, shared)) return GEOMETRY;
  Fault fault = NONE;
  for (unsigned i : sequence(unsigned(blocks), order, 0)) {
    launch.index = {i % grid[0], unsigned(i / grid[0] % grid[1]), unsigned(i / (uint64_t(grid[0]) * grid[1]))};
    ++launch.generation;
    launch.dynamic = dynamic;
    if (shared) memset(dynamic, 0xff, shared);
    fault = run_block(unsigned(threads), order);
    if (fault) break;
  }
  free(dynamic);
  return fault;
}
