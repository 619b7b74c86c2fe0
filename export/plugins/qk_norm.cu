// Rotary embedding (rotate-half, the first ROTARY of HEAD_DIM channels), l2 norm of each head, a scale on q alone.
//
// qk: [tokens, (HEADS + KV_HEADS) * HEAD_DIM], q heads first; cos, sin: float32 [length, ROTARY / 2]; positions: int32
// [tokens]; q_scale: float32 [HEADS * HEAD_DIM]; q: [batch, HEADS, sequence, HEAD_DIM]; k: [batch, KV_HEADS, sequence,
// HEAD_DIM]; tokens = batch * sequence, and tokens * (HEADS + KV_HEADS) fits 32 bits. Positions outside [0, length) read
// the nearest row of the tables. Macros: HEADS, KV_HEADS, HEAD_DIM, ROTARY, WIDTH and those of rows.cuh; here a row is one
// head of one token.
//
// A thread holds units of two vectors of WIDTH channels. In the rotated part they are the two halves of the same pairs, so
// that the rotation needs no other thread's data; WIDTH is the widest access that both halves allow.
#include "rows.cuh"

constexpr int PAIRS = ROTARY / 2 / WIDTH;    // units that are rotated
constexpr int VECTORS = HEAD_DIM / WIDTH;
constexpr int UNITS = (VECTORS + 1) / 2;
constexpr int PER_THREAD = (UNITS + ROW_THREADS - 1) / ROW_THREADS;
static_assert(ROTARY % (2 * WIDTH) == 0 && HEAD_DIM % WIDTH == 0 && ROTARY <= HEAD_DIM, "halves are whole vectors");
static_assert(ROW_THREADS <= 32, "a head fits a warp");

struct Unit {
  int first, second;  // vectors of the head
  bool turned, has_first, has_second;
};

__device__ __forceinline__ Unit unit(int i) {
  const int index = threadIdx.x + i * ROW_THREADS;
  const bool turned = index < PAIRS;
  const int first = turned ? index : 2 * index;  // past the pairs, neighbours: 2 * PAIRS + 2 * (index - PAIRS)
  const int second = turned ? index + PAIRS : first + 1;
  return {first, second, turned, index < UNITS, index < UNITS && second < VECTORS};
}

using Row = float[PER_THREAD * 2 * WIDTH];

// The thread's part of the head at `from`, times a power of two; zeros outside it.
__device__ __forceinline__ void read(const Element* from, bool live, float scale, Row& values) {
#pragma unroll
  for (int i = 0; i < 2 * PER_THREAD; ++i) {
    const Unit at = unit(i / 2);
    const bool inside = live && (i % 2 ? at.has_second : at.has_first);
    float part[WIDTH];
    unpack<Element>(inside ? load<WIDTH * BYTES>(from + (i % 2 ? at.second : at.first) * WIDTH) : Chunk<WIDTH * BYTES>{}, part);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[i * WIDTH + j] = part[j] * scale;
  }
}

// Rotates the pairs by the angles of one position, whose rows of the tables are given.
__device__ __forceinline__ void rotate(const float* cosines, const float* sines, Row& values) {
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const Unit at = unit(i);
    if (!at.turned) continue;
    float c[WIDTH], s[WIDTH];
    unpack<float>(load<4 * WIDTH>(cosines + at.first * WIDTH), c);
    unpack<float>(load<4 * WIDTH>(sines + at.first * WIDTH), s);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      float &a = values[2 * i * WIDTH + j], &b = values[(2 * i + 1) * WIDTH + j];
      const float turned = fmaf(a, c[j], -(b * s[j]));
      b = fmaf(b, c[j], a * s[j]);
      a = turned;
    }
  }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS* ROWS, RESIDENT)
    qk_norm(const Element* __restrict__ qk, const float* __restrict__ cos, const float* __restrict__ sin,
            const int* __restrict__ positions, const float* __restrict__ q_scale, int tokens, int sequence, int length,
            Element* __restrict__ q, Element* __restrict__ k) {
  constexpr int ALL = HEADS + KV_HEADS;
  const unsigned row = blockIdx.x * ROWS + threadIdx.y;
  const bool live = row < static_cast<unsigned>(tokens) * ALL;
  const int token = live ? row / ALL : 0;
  const int head = row % ALL;
  const long long angle = static_cast<long long>(min(max(positions[token], 0), length - 1)) * (ROTARY / 2);
  const Element* from = qk + static_cast<long long>(row) * HEAD_DIM;

  Row values;
  read(from, live, 1.0f, values);
  rotate(cos + angle, sin + angle, values);
  float sum = sum_of_squares(values, nullptr);
  if (!trusted(sum)) {  // the rotation itself may have overflowed: start again from memory
    read(from, live, rescue(sum), values);
    rotate(cos + angle, sin + angle, values);
    sum = sum_of_squares(values, nullptr);
  }
  const float to_unit = inverse_length(sum, 0.0f);

  const int batch = token / sequence, place = token % sequence;
  const bool is_query = head < HEADS;
  Element* to = is_query ? q + ((static_cast<long long>(batch) * HEADS + head) * sequence + place) * HEAD_DIM
                         : k + ((static_cast<long long>(batch) * KV_HEADS + head - HEADS) * sequence + place) * HEAD_DIM;
#pragma unroll
  for (int i = 0; i < 2 * PER_THREAD; ++i) {
    const Unit at = unit(i / 2);
    const int vector = i % 2 ? at.second : at.first;
    if (!live || !(i % 2 ? at.has_second : at.has_first)) continue;
    float part[WIDTH], scale[WIDTH];
    if (is_query) unpack<float>(load<4 * WIDTH>(q_scale + head * HEAD_DIM + vector * WIDTH), scale);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      part[j] = values[i * WIDTH + j] * to_unit;
      if (is_query) part[j] *= scale[j];
    }
    store(to + vector * WIDTH, part);
  }
}
