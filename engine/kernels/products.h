// Products of int8 rows and int8 weights. Sums of integers are exact.

#pragma once

#include "pool.h"
#include "rows.h"

constexpr int kCols = 16;  // outputs of one vector
constexpr int kPair = 32;  // outputs that are computed together
constexpr int kRows = 12;  // rows that share one pass over a block of weights

struct Linear {
  const uint8_t* weight;  // int8 + 128: [out/32][in/4][32][4]
  const float* scale;     // [out]
  const float* bias;      // [out], or null
  int32_t in, out;        // `out` is padded to 32
  int32_t block;          // inputs that are turned together; 1 for none
};

inline int passes_of(int rows) { return (rows + kRows - 1) / kRows; }

// Where a pass begins; evenly, as a last one of a single row would cost as much as one of several.
inline int pass_start(int rows, int pass) { return rows * pass / passes_of(rows); }

// Rounded rows. The rows of a pass lie side by side: [in/4][rows of the pass][4].
struct Input {
  int8_t* values;
  float* scales;     // [rows]
  int32_t* offsets;  // [rows]: -128 times the sum of a row, as weights have 128 added
  int rows;
};

// Round the rows of some passes: row(r) is where the r-th of them is.
template <class Row>
void round_passes(const Linear& w, Row&& row, const float* norm, float eps, Span passes,
                  float* turned, const Input& out) {
  for (int pass = passes.begin; pass < passes.end; ++pass) {
    const int first = pass_start(out.rows, pass), count = pass_start(out.rows, pass + 1) - first;
    for (int r = 0; r < count; ++r) {
      int8_t* place = out.values + int64_t(first) * w.in + 4 * r;
      const Rounded done = round_row(row(first + r), norm, eps, w.in, w.block, turned, place, count);
      out.scales[first + r] = done.scale;
      out.offsets[first + r] = -128 * done.sum;
    }
  }
}

// What is read next, and is asked for from memory while this is computed.
struct Ahead {
  const uint8_t* weights;
  int lines;  // pairs of cache lines
  void fetch(int i) const {
    if (i >= lines) return;
    _mm_prefetch(weights + i * 128, _MM_HINT_T1);
    _mm_prefetch(weights + i * 128 + 64, _MM_HINT_T1);
  }
};

// sum + weights . x, the same four inputs for all 16 outputs; by hand because compilers copy the
// sums of the intrinsic back and forth, and load the inputs into registers first.
inline __m512i multiply_add(__m512i sum, __m512i weights, const int32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*x));
  return sum;
}

// R rows, from the `first` on, times 32 outputs, into the tile [rows][32]. Unrolled, the sums stay in
// registers.
template <int R>
void some_rows(const Linear& w, int pair, const Input& in, int first, float* tile, Ahead ahead) {
  const int steps = w.in / 4;
  const uint8_t* weights = w.weight + int64_t(pair) * w.in * kPair;
  const int32_t* x = reinterpret_cast<const int32_t*>(in.values + int64_t(first) * w.in);
  __m512i sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_set1_epi32(in.offsets[first + r]);
  for (int k = 0; k < steps; ++k, x += R, weights += 128) {
    ahead.fetch(k);
    const __m512i a = _mm512_loadu_si512(weights), b = _mm512_loadu_si512(weights + 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sums[r][0] = multiply_add(sums[r][0], a, x + r);
      sums[r][1] = multiply_add(sums[r][1], b, x + r);
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const int at = pair * kPair + c * kCols;
    const __m512 scale = _mm512_loadu_ps(w.scale + at);
    const __m512 bias = w.bias ? _mm512_loadu_ps(w.bias + at) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in.scales[first + r]));
      _mm512_storeu_ps(tile + (first + r) * kPair + c * kCols,
                       _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][c]), both, bias));
    }
  }
}

// All rows times 32 outputs: the weights come from memory once.
inline void all_rows(const Linear& w, int pair, const Input& in, float* tile, const uint8_t* next) {
  const int passes = passes_of(in.rows), lines = w.in / 4;
  for (int pass = 0; pass < passes; ++pass) {
    const int first = pass_start(in.rows, pass);
    const int done = lines * pass / passes;
    const Ahead ahead{next + done * 128, lines * (pass + 1) / passes - done};
    switch (pass_start(in.rows, pass + 1) - first) {
      case 1: some_rows<1>(w, pair, in, first, tile, ahead); break;
      case 2: some_rows<2>(w, pair, in, first, tile, ahead); break;
      case 3: some_rows<3>(w, pair, in, first, tile, ahead); break;
      case 4: some_rows<4>(w, pair, in, first, tile, ahead); break;
      case 5: some_rows<5>(w, pair, in, first, tile, ahead); break;
      case 6: some_rows<6>(w, pair, in, first, tile, ahead); break;
      case 7: some_rows<7>(w, pair, in, first, tile, ahead); break;
      case 8: some_rows<8>(w, pair, in, first, tile, ahead); break;
      case 9: some_rows<9>(w, pair, in, first, tile, ahead); break;
      case 10: some_rows<10>(w, pair, in, first, tile, ahead); break;
      case 11: some_rows<11>(w, pair, in, first, tile, ahead); break;
      default: some_rows<12>(w, pair, in, first, tile, ahead); break;
    }
  }
}

inline const uint8_t* weights_of(const Linear& w, int pair) {
  return w.weight + int64_t(pair) * w.in * kPair;
}

// The thread's share of the outputs, 32 at a time: use(pair) finds them in the tile. `next` is what
// this thread reads after that.
template <class Use>
void product(const Linear& w, const Input& in, Span pairs, float* tile, const uint8_t* next,
             Use&& use) {
  for (int pair = pairs.begin; pair < pairs.end; ++pair) {
    all_rows(w, pair, in, tile, pair + 1 < pairs.end ? weights_of(w, pair + 1) : next);
    use(pair);
  }
}

// put(row, column, 16 values) for the thread's share of the outputs.
template <class Put>
void each_vector(const Linear& w, const Input& in, Span pairs, float* tile, const uint8_t* next,
                 Put&& put) {
  product(w, in, pairs, tile, next, [&](int pair) {
    for (int r = 0; r < in.rows; ++r)
      for (int c = 0; c < kPair; c += kCols)
        put(r, pair * kPair + c, _mm512_loadu_ps(tile + r * kPair + c));
  });
}

// out[row][col] = or += product.
template <bool Add>
void product_into(const Linear& w, const Input& in, Span pairs, float* tile, const uint8_t* next,
                  float* out) {
  each_vector(w, in, pairs, tile, next, [&](int r, int column, __m512 v) {
    float* place = out + int64_t(r) * w.out + column;
    _mm512_storeu_ps(place, Add ? _mm512_add_ps(_mm512_loadu_ps(place), v) : v);
  });
}

// A pair is 16 gates and their 16 ups: out[row][col] = silu(gate) * up.
inline void gated_product(const Linear& w, const Input& in, Span pairs, float* tile,
                          const uint8_t* next, float* out) {
  product(w, in, pairs, tile, next, [&](int pair) {
    for (int r = 0; r < in.rows; ++r) {
      const __m512 gate = _mm512_loadu_ps(tile + r * kPair);
      const __m512 up = _mm512_loadu_ps(tile + r * kPair + kCols);
      _mm512_storeu_ps(out + int64_t(r) * (w.out / 2) + pair * kCols, _mm512_mul_ps(silu(gate), up));
    }
  });
}
