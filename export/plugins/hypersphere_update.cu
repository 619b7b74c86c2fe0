// out = norm(h + lr * (norm(x, EPS) - h)) for rows of SIZE channels (arXiv:2410.01131, equations 10 and 11).
//
// h, x, out: [rows, SIZE] of the storage type; lr: float32 [SIZE]. Macros: SIZE, EPS and those of rows.cuh.
// h and x are read once and out is written once; between them a row lives in registers.
#include "rows.cuh"

constexpr int WIDTH = 16 / BYTES;  // channels of one access
constexpr int VECTORS = SIZE / WIDTH;
constexpr int PER_THREAD = (VECTORS + ROW_THREADS - 1) / ROW_THREADS;
static_assert(SIZE % 8 == 0, "rows start on a 16-byte boundary");

extern "C" __global__ void __launch_bounds__(ROW_THREADS* ROWS, RESIDENT)
    hypersphere_update(const Element* __restrict__ h, const Element* __restrict__ x, const float* __restrict__ lr, int rows,
                       Element* __restrict__ out) {
  __shared__ float slots[2][2][WARPS];
  const int row = blockIdx.x * ROWS + threadIdx.y;
  const bool live = row < rows;  // rows past the end compute on zeros: their lanes take part in the shuffles
  const long long start = static_cast<long long>(row) * SIZE;

  Chunk<16> point[PER_THREAD], step[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int vector = threadIdx.x + i * ROW_THREADS;
    const bool inside = live && vector < VECTORS;
    point[i] = inside ? load<16>(h + start + vector * WIDTH) : Chunk<16>{};
    step[i] = inside ? load<16>(x + start + vector * WIDTH) : Chunk<16>{};
  }

  float values[PER_THREAD * WIDTH];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    float part[WIDTH];
    unpack<Element>(step[i], part);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[i * WIDTH + j] = part[j];
  }
  const float to_unit = unit_factor(values, EPS, slots[0]);

#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int vector = threadIdx.x + i * ROW_THREADS;
    float from[WIDTH], rate[WIDTH];
    unpack<Element>(point[i], from);
    unpack<float>(vector < VECTORS ? load<4 * WIDTH>(lr + vector * WIDTH) : Chunk<4 * WIDTH>{}, rate);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      float& value = values[i * WIDTH + j];
      value = fmaf(rate[j], fmaf(value, to_unit, -from[j]), from[j]);
    }
  }
  const float to_sphere = unit_factor(values, 0.0f, slots[1]);

#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int vector = threadIdx.x + i * ROW_THREADS;
    float part[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) part[j] = values[i * WIDTH + j] * to_sphere;
    if (live && vector < VECTORS) store(out + start + vector * WIDTH, part);
  }
}
