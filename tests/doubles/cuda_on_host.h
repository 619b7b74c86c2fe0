// TEST DOUBLE of a CUDA device: enough of CUDA C++ to run the kernels of export/plugins on the CPU, unchanged.
//
// A block's threads are fibers on one host thread. A fiber runs until it meets a barrier or a shuffle and waits there for
// the threads named in it; a block in which no fiber can go on (a thread missed a barrier others wait at) ends the launch
// with a message. Shared memory is filled with NaN before each block, so that a value read before it was written shows.
// It says nothing about speed, memory ordering within a warp, or the PTX conversions, which it replaces by the host's.
#pragma once
#include <math.h>
#include <string.h>
#include <ucontext.h>

#define CUDA_ON_HOST 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("cuda_shared"))) static

struct float2 { float x, y; };
struct Index { int x, y, z; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

static inline float widen_half(unsigned short bits) { _Float16 half; memcpy(&half, &bits, 2); return half; }
static inline unsigned narrow_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
}
static inline float2 widen_f16(unsigned word) { return {widen_half(word & 0xffff), widen_half(word >> 16)}; }
static inline unsigned narrow_f16(float low, float high) { return narrow_half(low) | narrow_half(high) << 16; }
static inline unsigned round_bf16(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
static inline unsigned narrow_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

namespace host {
enum { MOST_THREADS = 1024, STACK = 64 * 1024 };
struct Fiber {
  ucontext_t context;
  Index thread;
  unsigned long steps;  // shuffles met so far
  unsigned long barriers;
  float sent[2];
  bool done;
};
inline Fiber fibers[MOST_THREADS];
inline char stacks[MOST_THREADS][STACK];
inline ucontext_t scheduler;
inline int count, current;
inline Index block, block_size;
inline void (*body)();
inline const char* failure;

static inline void pause() { swapcontext(&fibers[current].context, &scheduler); }
static inline void fail(const char* what) {
  failure = what;
  pause();  // for good: the launch ends
}
static inline void run() {
  body();
  fibers[current].done = true;
  pause();
}
static inline bool at_barrier(unsigned long number) {
  for (int i = 0; i < count; ++i)
    if (fibers[i].barriers < number) return false;
  return true;
}
static inline bool warp_sent(unsigned mask, unsigned long number) {
  const int first = current / 32 * 32;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && (first + lane >= count || fibers[first + lane].steps < number)) return false;
  return true;
}
}  // namespace host

#define threadIdx host::fibers[host::current].thread
#define blockIdx host::block
#define blockDim host::block_size

static inline void __syncthreads() {
  const unsigned long number = ++host::fibers[host::current].barriers;
  while (!host::at_barrier(number)) host::pause();
}

static inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  const int self = host::current, partner = self ^ offset;
  host::Fiber& fiber = host::fibers[self];
  if (!(mask >> self % 32 & 1) || !(mask >> partner % 32 & 1)) host::fail("a shuffle outside its mask");
  const unsigned long number = ++fiber.steps;
  fiber.sent[number % 2] = value;  // nobody is two shuffles ahead: each waits for the others
  while (!host::warp_sent(mask, number)) host::pause();
  return host::fibers[partner].sent[number % 2];
}

extern "C" char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

namespace host {
// An argument as the driver API passes it: by its address, typed by the parameter that receives it.
struct Argument {
  void* address;
  template <class T>
  operator T() const { return *static_cast<T*>(address); }
};

// Runs `kernel` for every thread of `blocks` blocks of x * y threads; returns what went wrong, or null.
static inline const char* launch(int blocks, int x, int y, void (*kernel)()) {
  count = x * y, body = kernel, block_size = {x, y, 1}, failure = nullptr;
  if (count > MOST_THREADS) return "too many threads in a block";
  for (block = {0, 0, 0}; block.x < blocks; ++block.x) {
    if (__start_cuda_shared) memset(__start_cuda_shared, 0xff, __stop_cuda_shared - __start_cuda_shared);
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers[i];
      fiber = {};
      fiber.thread = {i % x, i / x, 0};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[i], fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, run, 0);
    }
    unsigned long progress = 0;  // of the round before: shuffles and barriers met, threads that ended
    for (int left = count; left > 0;) {
      for (current = 0; current < count && !failure; ++current) {
        if (fibers[current].done) continue;
        swapcontext(&scheduler, &fibers[current].context);
        left -= fibers[current].done;
      }
      if (failure) return failure;
      unsigned long reached = count - left;
      for (int i = 0; i < count; ++i) reached += fibers[i].steps + fibers[i].barriers;
      if (reached == progress) return "a barrier or a shuffle was not met by every thread it waits for";
      progress = reached;
    }
  }
  return nullptr;
}
}  // namespace host
