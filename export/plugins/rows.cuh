// What both kernels share: 16-byte memory accesses, storage types, and the length of a row that does not overflow.
//
// A row (of the residual stream, or a head) belongs to ROW_THREADS threads along threadIdx.x; a block holds ROWS rows
// along threadIdx.y. Macros: STORAGE (FLOAT32, FLOAT16 or BFLOAT16), ROW_THREADS, ROWS, RESIDENT (blocks that must fit one
// multiprocessor). No header is needed: the conversions between 16-bit and 32-bit floats are PTX instructions that every
// supported architecture has.
#pragma once

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

#if STORAGE == FLOAT32
typedef float Element;
#else
typedef unsigned short Element;
#endif

constexpr int BYTES = sizeof(Element);
constexpr int GROUP = ROW_THREADS < 32 ? ROW_THREADS : 32;  // lanes of one warp that share a row
constexpr int WARPS = (ROW_THREADS + 31) / 32;
static_assert(ROW_THREADS % 32 == 0 || (ROW_THREADS < 32 && (ROW_THREADS & (ROW_THREADS - 1)) == 0), "rows fill warps or divide one");
static_assert(ROW_THREADS <= 32 || ROWS == 1, "the block barrier belongs to one row");

#ifndef CUDA_ON_HOST
// A 32-bit word holds two 16-bit values, the first in the lower half.
__device__ __forceinline__ float2 widen_f16(unsigned word) {
  float2 pair;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(pair.x), "=f"(pair.y) : "r"(word));
  return pair;
}

__device__ __forceinline__ unsigned narrow_f16(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(low), "f"(high));
  return word;
}

__device__ __forceinline__ unsigned narrow_bf16(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(low), "f"(high));
  return word;
}
#endif

__device__ __forceinline__ float2 widen(unsigned word) {
#if STORAGE == FLOAT16
  return widen_f16(word);
#else
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#endif
}

__device__ __forceinline__ unsigned narrow(float low, float high) {
#if STORAGE == FLOAT16
  return narrow_f16(low, high);
#else
  return narrow_bf16(low, high);
#endif
}

// N bytes of memory as the bits that are there: one access up to 16 bytes, several beyond.
template <int N>
struct alignas(N < 16 ? N : 16) Chunk {
  unsigned words[N / 4];
};
template <>
struct alignas(2) Chunk<2> {
  unsigned short half;
};

template <int N, class Pointer>
__device__ __forceinline__ Chunk<N> load(const Pointer* from) {
  return *reinterpret_cast<const Chunk<N>*>(from);
}

// COUNT values of a chunk as float32. TYPE is Element, or float for the vectors that are always float32.
template <class TYPE, int COUNT>
__device__ __forceinline__ void unpack(const Chunk<COUNT * sizeof(TYPE)>& chunk, float (&values)[COUNT]) {
  if constexpr (sizeof(TYPE) == 4) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] = __uint_as_float(chunk.words[i]);
  } else if constexpr (COUNT == 1) {
    values[0] = widen(chunk.half).x;
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const float2 pair = widen(chunk.words[i / 2]);
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  }
}

template <class TYPE, int COUNT>
__device__ __forceinline__ void store(TYPE* to, const float (&values)[COUNT]) {
  Chunk<COUNT * sizeof(TYPE)> chunk;
  if constexpr (sizeof(TYPE) == 4) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) chunk.words[i] = __float_as_uint(values[i]);
  } else if constexpr (COUNT == 1) {
    chunk.half = static_cast<unsigned short>(narrow(values[0], 0.0f));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) chunk.words[i / 2] = narrow(values[i], values[i + 1]);
  }
  *reinterpret_cast<Chunk<COUNT * sizeof(TYPE)>*>(to) = chunk;
}

// Adds one value a thread over the row; every thread gets the same sum. `slot` is WARPS floats of shared memory that no
// other reduction of the kernel uses, so that one barrier is enough.
__device__ __forceinline__ float row_sum(float value, float* slot) {
  const int lane = (threadIdx.y * ROW_THREADS + threadIdx.x) % 32;
  // Rows that share a warp may part ways (see `trusted`), so each names its own lanes alone.
  const unsigned mask = GROUP == 32 ? 0xffffffffu : ((1u << (GROUP % 32)) - 1) << (lane - lane % GROUP);
#pragma unroll
  for (int offset = GROUP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
  if constexpr (WARPS > 1) {
    if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = value;
    __syncthreads();
    value = slot[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) value += slot[warp];
  }
  return value;
}

template <int COUNT>
__device__ __forceinline__ float sum_of_squares(const float (&values)[COUNT], float* slot) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum = fmaf(values[i], values[i], sum);
  return row_sum(sum, slot);
}

// Whether a sum of squares can be used as it is. An overflow leaves infinity, or NaN after a rotation. A square that
// underflows, flushed or not, is off by at most 2^-126, so that 2^16 of them vanish in the rounding of a sum of 2^-80 or more.
// All threads of a row get the same answer, because they hold the same sum.
__device__ __forceinline__ bool trusted(float sum) { return sum >= 0x1p-80f && sum <= 0x1.fffffep127f; }

// The power of two that brings a row whose sum is not trusted into range, exactly.
// Overflow: some value is 2^56 or more (2^16 channels), and becomes 2^-24 to 2^48; what underflows then did not count.
// Underflow: all values are below 2^-40, and become 2^-49 (from the smallest float, 2^-149) to 2^60, their sum below 2^120.
__device__ __forceinline__ float rescue(float sum) { return sum < 0x1p-80f ? 0x1p100f : 0x1p-80f; }

// 1 / (length + eps) from a sum of squares and an eps of the same scale; zero for a row of zeros. Both instructions are off
// by 2 units in the last place at most; the exact ones are calls, for which ptxas spills registers on some architectures.
__device__ __forceinline__ float inverse_length(float sum, float eps) {
  if (sum == 0.0f) return 0.0f;
  return eps == 0.0f ? rsqrtf(sum) : __fdividef(1.0f, fmaf(sum, rsqrtf(sum), eps));
}

// norm(v, eps) = values * result, for values that were rescaled in place if they had to be.
template <int COUNT>
__device__ __forceinline__ float unit_factor(float (&values)[COUNT], float eps, float (&slots)[2][WARPS]) {
  const float sum = sum_of_squares(values, slots[0]);
  if (trusted(sum)) return inverse_length(sum, eps);
  const float scale = rescue(sum);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] *= scale;
  return inverse_length(sum_of_squares(values, slots[1]), eps * scale);
}
