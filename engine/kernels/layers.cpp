// Decoder layers of a Llama with int8 weights on a CPU, all of a stage in one call.
//
// A row's result never depends on the other rows of the call: integer products are exact, every
// float sum runs in one fixed order, and threads share outputs or rows but never a sum. So a draft
// tree, any split and any batch give bit for bit what a single row gives.
//
// Plain C interface, called through ctypes; see native.py for the layouts.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace {

std::atomic<int64_t> passed{0};

constexpr int kCols = 16;  // outputs of one vector
constexpr int kPair = 32;  // outputs that are computed together
constexpr int kRows = 12;  // rows that share one pass over a block of weights
constexpr int kGroups = 64;  // most query heads that share a KV head

struct Linear {
  const void* weight;     // int8 [out/32][in/4][32][4], or float [out/32][in][32]
  const float* scale;     // [out]; null for float weights
  const int32_t* offset;  // [out]: -128 times the sum of the output's weights
  const float* bias;      // [out], or null
  int32_t in, out;        // `out` is padded to 32
  int32_t block;          // inputs that `turn` mixes; 1 for none
};

struct Layer {
  const float* input_norm;
  const float* post_norm;
  Linear qkv, o, gate_up, down;
};

struct Model {
  int32_t hidden, inner, heads, kv_heads, head_dim;
  float eps;
};

struct Row {
  float* k;        // of the row's sequence, layer 0: [kv_heads][capacity][head_dim]
  float* v;
  int64_t layer;   // floats from one layer to the next
  int64_t head;    // floats from one KV head to the next
  int32_t start;   // KV rows that every row of the sequence's step sees
  int32_t place;   // where this row's own keys and values go
  int32_t seen;    // first of its numbers in `seen`
  int32_t count;   // how many rows of this step it sees, itself included
};

// --- threads: woken once a call, spinning only between the phases of a layer -------------------

class Pool {
 public:
  explicit Pool(int threads) : all_(threads), wanted_(threads), threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      ++round_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  template <class F>
  void run(F work) {
    auto call = [](void* data, int thread) { (*static_cast<F*>(data))(thread); };
    {
      std::lock_guard<std::mutex> lock(mutex_);
      threads_ = wanted_;  // with the round: a worker that wakes late sees both or neither
      call_ = call;
      data_ = &work;
      busy_ = threads_ - 1;
      ++round_;
    }
    if (threads_ > 1) wake_.notify_all();
    work(0);
    for (int spins = 0; busy_.load(std::memory_order_acquire); ++spins) pause(spins);
  }
  void barrier() {
    if (threads_ == 1) return;
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) pause(spins);
  }
  int threads() const { return wanted_; }
  // From the next call on.
  void use(int threads) { wanted_ = std::max(1, std::min(threads, all_)); }

 private:
  static void pause(int spins) {
    // Another process may have our core: do not burn its time for long.
    if (spins < 4000) _mm_pause(); else std::this_thread::yield();
  }
  void serve(int thread) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (stop_) return;
        if (thread >= threads_) continue;
      }
      call_(data_, thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }
  const int all_;
  int wanted_, threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  uint64_t round_ = 0;
  bool stop_ = false;
  void (*call_)(void*, int) = nullptr;
  void* data_ = nullptr;
  std::atomic<int> busy_{0}, arrived_{0}, turn_{0};
};

struct Span {
  int begin, end;  // of `count` things, those of one thread
  Span(int count, int thread, int threads)
      : begin(int(int64_t(count) * thread / threads)),
        end(int(int64_t(count) * (thread + 1) / threads)) {}
  Span(int begin, int end) : begin(begin), end(end) {}
};

// --- one row -----------------------------------------------------------------------------------

inline float sum_of(__m512 v) { return _mm512_reduce_add_ps(v); }

// x / rms(x) * weight; width is a multiple of 16.
void rms_norm(const float* x, const float* weight, float eps, int width, float* out) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(sum_of(sum) / float(width) + eps));
  for (int i = 0; i < width; i += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)));
  }
}

float peak_of(const float* x, int width) {
  __m512 most = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  return _mm512_reduce_max_ps(most);
}

// Round to int8 with one scale for the row, stored with 128 added; returns the scale.
float quantize(const float* x, int width, uint8_t* out) {
  const float most = peak_of(x, width), scale = most > 0.0f ? most / 127.0f : 1.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / scale);
  const __m512i middle = _mm512_set1_epi32(128);
  for (int i = 0; i < width; i += 16) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    const __m512i shifted = _mm512_add_epi32(v, middle);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtusepi32_epi8(shifted));
  }
  return scale;
}

// One step of the transform within 16 values: each becomes the sum of two, or their difference.
template <int Shuffle, int Upper>
inline __m512 mix(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  __m512 other;
  if constexpr (Upper == 0xaaaa || Upper == 0xcccc)
    other = _mm512_castsi512_ps(_mm512_shuffle_epi32(bits, _MM_PERM_ENUM(Shuffle)));
  else
    other = _mm512_shuffle_f32x4(v, v, Shuffle);
  return _mm512_mask_sub_ps(_mm512_add_ps(v, other), Upper, other, v);
}

// Each block of `block` values (a power of two) times the Hadamard matrix of that size.
void turn(const float* x, int width, int block, float* out) {
  for (int i = 0; i < width; i += 16) {
    __m512 v = _mm512_loadu_ps(x + i);
    if (block > 1) v = mix<0xb1, 0xaaaa>(v);
    if (block > 2) v = mix<0x4e, 0xcccc>(v);
    if (block > 4) v = mix<0xb1, 0xf0f0>(v);
    if (block > 8) v = mix<0x4e, 0xff00>(v);
    _mm512_storeu_ps(out + i, v);
  }
  for (int half = 16; half < block; half *= 2)
    for (int i = 0; i < width; i += 16) {
      if (i & half) continue;
      const __m512 a = _mm512_loadu_ps(out + i), b = _mm512_loadu_ps(out + i + half);
      _mm512_storeu_ps(out + i, _mm512_add_ps(a, b));
      _mm512_storeu_ps(out + i + half, _mm512_sub_ps(a, b));
    }
}

inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                        5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 low = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(87.0f));
  return _mm512_div_ps(x, _mm512_add_ps(one, exp_of(low)));
}

// --- products ----------------------------------------------------------------------------------

// sum + a . b; by hand because compilers copy the sums of the intrinsic back and forth.
inline __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

struct Input {
  const float* values;     // [rows][stride]
  const uint8_t* rounded;  // [rows][stride]
  const float* scales;     // [rows]
  int stride;
  int rows;
};

// What is read next, and is asked for from memory while this is computed.
struct Ahead {
  const char* weights;
  int lines;  // pairs of cache lines
  void fetch(int i) const {
    if (i >= lines) return;
    _mm_prefetch(weights + i * 128, _MM_HINT_T1);
    _mm_prefetch(weights + i * 128 + 64, _MM_HINT_T1);
  }
};

// R rows, from the `first` on, times 32 outputs, into the tile [rows][32].
template <int R>
void int8_pair(const Linear& w, int pair, const Input& in, int first, float* tile, Ahead ahead) {
  const int steps = w.in / 4;
  const char* weights = static_cast<const char*>(w.weight) + int64_t(pair) * w.in * kPair;
  __m512i sums[R][2];
  for (int c = 0; c < 2; ++c) {
    const __m512i offset = _mm512_loadu_si512(w.offset + pair * kPair + c * kCols);
    for (int r = 0; r < R; ++r) sums[r][c] = offset;
  }
  const int32_t* rows[R];
  for (int r = 0; r < R; ++r)
    rows[r] = reinterpret_cast<const int32_t*>(in.rounded + int64_t(first + r) * in.stride);
  for (int k = 0; k < steps; ++k) {
    ahead.fetch(k);
    const __m512i a = _mm512_loadu_si512(weights + int64_t(k) * 128);
    const __m512i b = _mm512_loadu_si512(weights + int64_t(k) * 128 + 64);
    for (int r = 0; r < R; ++r) {
      const __m512i four = _mm512_set1_epi32(rows[r][k]);
      sums[r][0] = multiply_add(sums[r][0], four, a);
      sums[r][1] = multiply_add(sums[r][1], four, b);
    }
  }
  for (int c = 0; c < 2; ++c) {
    const int at = pair * kPair + c * kCols;
    const __m512 scale = _mm512_loadu_ps(w.scale + at);
    const __m512 bias = w.bias ? _mm512_loadu_ps(w.bias + at) : _mm512_setzero_ps();
    for (int r = 0; r < R; ++r) {
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(in.scales[first + r]));
      _mm512_storeu_ps(tile + (first + r) * kPair + c * kCols,
                       _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][c]), both, bias));
    }
  }
}

template <int R>
void float_pair(const Linear& w, int pair, const Input& in, int first, float* tile) {
  const float* weights = static_cast<const float*>(w.weight) + int64_t(pair) * w.in * kPair;
  const float* x = in.values + int64_t(first) * in.stride;
  __m512 sums[R][2];
  for (int c = 0; c < 2; ++c)
    for (int r = 0; r < R; ++r)
      sums[r][c] = w.bias ? _mm512_loadu_ps(w.bias + pair * kPair + c * kCols) : _mm512_setzero_ps();
  for (int k = 0; k < w.in; ++k)
    for (int c = 0; c < 2; ++c) {
      const __m512 part = _mm512_loadu_ps(weights + int64_t(k) * kPair + c * kCols);
      for (int r = 0; r < R; ++r)
        sums[r][c] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * in.stride + k]), part, sums[r][c]);
    }
  for (int c = 0; c < 2; ++c)
    for (int r = 0; r < R; ++r)
      _mm512_storeu_ps(tile + (first + r) * kPair + c * kCols, sums[r][c]);
}

// Round some rows for `w`. Turned, a peak is spread over its block: otherwise it would leave the rest
// of the row few of the 255 steps. `turned` has room for one row.
void round_rows(const Linear& w, const float* x, Span mine, uint8_t* rounded, float* scales,
                float* turned) {
  if (!w.scale) return;
  const int64_t in = w.in;
  for (int r = mine.begin; r < mine.end; ++r) {
    turn(x + r * in, w.in, w.block, turned);
    scales[r] = quantize(turned, w.in, rounded + r * in);
  }
}

template <int R>
void some_rows(const Linear& w, int pair, const Input& in, int first, float* tile, Ahead ahead) {
  if (w.scale)
    int8_pair<R>(w, pair, in, first, tile, ahead);
  else
    float_pair<R>(w, pair, in, first, tile);
}

// All rows times 32 outputs: the weights come from memory once.
void all_rows(const Linear& w, int pair, const Input& in, float* tile, const char* next) {
  // Evenly: a last pass for a single row would cost as much as one for several.
  const int passes = (in.rows + kRows - 1) / kRows, lines = w.in / 4;
  for (int pass = 0; pass < passes; ++pass) {
    const int first = in.rows * pass / passes;
    const int done = lines * pass / passes;
    const Ahead ahead{next + done * 128, lines * (pass + 1) / passes - done};
    switch (in.rows * (pass + 1) / passes - first) {
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

const char* weights_of(const Linear& w, int pair) {
  return static_cast<const char*>(w.weight) + int64_t(pair) * w.in * kPair * (w.scale ? 1 : 4);
}

// The thread's share of the outputs, 32 at a time: use(pair) finds them in the tile. `next` is what
// this thread reads after that.
template <class Use>
void product(const Linear& w, const Input& in, Span pairs, float* tile, const char* next, Use&& use) {
  for (int pair = pairs.begin; pair < pairs.end; ++pair) {
    all_rows(w, pair, in, tile, pair + 1 < pairs.end ? weights_of(w, pair + 1) : next);
    use(pair);
  }
}

// out[row][col] = or += product.
template <bool Add>
void product_into(const Linear& w, const Input& in, Span pairs, float* tile, const char* next,
                  float* out) {
  product(w, in, pairs, tile, next, [&](int pair) {
    for (int r = 0; r < in.rows; ++r)
      for (int c = 0; c < 2; ++c) {
        float* place = out + int64_t(r) * w.out + pair * kPair + c * kCols;
        __m512 v = _mm512_loadu_ps(tile + r * kPair + c * kCols);
        if (Add) v = _mm512_add_ps(_mm512_loadu_ps(place), v);
        _mm512_storeu_ps(place, v);
      }
  });
}

// A pair is 16 gates and their 16 ups: out[row][col] = silu(gate) * up.
void gated_product(const Linear& w, const Input& in, Span pairs, float* tile, const char* next,
                   float* out) {
  product(w, in, pairs, tile, next, [&](int pair) {
    for (int r = 0; r < in.rows; ++r) {
      const __m512 gate = _mm512_loadu_ps(tile + r * kPair);
      const __m512 up = _mm512_loadu_ps(tile + r * kPair + kCols);
      _mm512_storeu_ps(out + int64_t(r) * (w.out / 2) + pair * kCols, _mm512_mul_ps(silu(gate), up));
    }
  });
}

// --- attention ---------------------------------------------------------------------------------

// The sums of 16 vectors, side by side: a tree of shuffles in place of 16 reductions.
inline __m512 sums_of(const __m512* v) {
  __m512 pairs[8], fours[4];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  auto lanes = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return lanes(lanes(fours[0], fours[1]), lanes(fours[2], fours[3]));
}

void rotate(const float* x, const float* cosine, const float* sine, int width, float* out) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    out[i] = x[i] * cosine[i] - x[i + half] * sine[i];
    out[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
  }
}

// A query, its room for scores (all keys and 32 more), and where its result goes.
struct Query {
  const float* q;
  float* scores;
  float* out;
  const Row* row;
};

// Scores against `count` keys; `key(i)` is where the i-th is. Keys are read once for Q queries.
template <int Q, int PARTS, class Key>
void score(const Query* queries, int first, int count, float scale, Key&& key) {
  __m512 q[Q][PARTS];
  for (int a = 0; a < Q; ++a)
    for (int p = 0; p < PARTS; ++p) q[a][p] = _mm512_loadu_ps(queries[a].q + p * 16);
  for (int i = 0; i < count; i += 16) {
    const int here = std::min(16, count - i);
    __m512 products[Q][16];
    for (int n = 0; n < here; ++n) {
      const float* other = key(i + n);
      __m512 part = _mm512_loadu_ps(other);
      for (int a = 0; a < Q; ++a) products[a][n] = _mm512_mul_ps(q[a][0], part);
      for (int p = 1; p < PARTS; ++p) {
        part = _mm512_loadu_ps(other + p * 16);
        for (int a = 0; a < Q; ++a) products[a][n] = _mm512_fmadd_ps(q[a][p], part, products[a][n]);
      }
    }
    for (int n = here; n < 16; ++n)
      for (int a = 0; a < Q; ++a) products[a][n] = _mm512_setzero_ps();
    const __mmask16 real = __mmask16((1u << here) - 1);
    for (int a = 0; a < Q; ++a) {
      const __m512 s = _mm512_mul_ps(sums_of(products[a]), _mm512_set1_ps(scale));
      _mm512_storeu_ps(queries[a].scores + first + i,
                       _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), real, s));
    }
  }
}

// The first `count` lanes, 16 at most.
inline __mmask16 lanes_of(int count) { return __mmask16((1u << std::min(16, count)) - 1); }

// exp(s - max) in place, zero behind `count`; returns one over their sum.
float softmax(float* scores, int count) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < count; i += 16) {
    const __mmask16 real = lanes_of(count - i);
    most = _mm512_mask_max_ps(most, real, most, _mm512_loadu_ps(scores + i));
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < count; i += 16) {
    const __mmask16 real = lanes_of(count - i);
    const __m512 e =
        _mm512_maskz_mov_ps(real, exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top)));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(scores + i, e);
  }
  return 1.0f / sum_of(sum);
}

template <int Q, int PARTS, class Key>
void add_values(const Query* queries, int first, int count, Key&& value, __m512 (*total)[PARTS]) {
  for (int i = 0; i < count; ++i) {
    const float* other = value(i);
    __m512 weight[Q];
    for (int a = 0; a < Q; ++a) weight[a] = _mm512_set1_ps(queries[a].scores[first + i]);
    for (int p = 0; p < PARTS; ++p) {
      const __m512 part = _mm512_loadu_ps(other + p * 16);
      for (int a = 0; a < Q; ++a) total[a][p] = _mm512_fmadd_ps(weight[a], part, total[a][p]);
    }
  }
}

// Q queries of one sequence and one KV head. What stands before the step is read once for all,
// then each query looks at the rows of the step that it sees.
template <int Q, int PARTS>
void attend(const Query* queries, const float* k, const float* v, const int32_t* seen) {
  constexpr int width = PARTS * 16;
  const int start = queries[0].row->start;
  const float scale = 1.0f / std::sqrt(float(width));
  score<Q, PARTS>(queries, 0, start, scale, [=](int i) { return k + int64_t(i) * width; });
  float shares[Q];
  for (int a = 0; a < Q; ++a) {
    const Row& row = *queries[a].row;
    const int32_t* rows = seen + row.seen;
    score<1, PARTS>(queries + a, start, row.count, scale,
                    [=](int i) { return k + int64_t(start + rows[i]) * width; });
    shares[a] = softmax(queries[a].scores, start + row.count);
  }
  __m512 total[Q][PARTS];
  for (int a = 0; a < Q; ++a)
    for (int p = 0; p < PARTS; ++p) total[a][p] = _mm512_setzero_ps();
  add_values<Q, PARTS>(queries, 0, start, [=](int i) { return v + int64_t(i) * width; }, total);
  for (int a = 0; a < Q; ++a) {
    const Row& row = *queries[a].row;
    const int32_t* rows = seen + row.seen;
    add_values<1, PARTS>(queries + a, start, row.count,
                         [=](int i) { return v + int64_t(start + rows[i]) * width; }, total + a);
    const __m512 share = _mm512_set1_ps(shares[a]);
    for (int p = 0; p < PARTS; ++p)
      _mm512_storeu_ps(queries[a].out + p * 16, _mm512_mul_ps(total[a][p], share));
  }
}

template <int PARTS>
void attend_some(const Query* queries, int count, const float* k, const float* v,
                 const int32_t* seen) {
  constexpr int most = PARTS <= 4 ? 4 : PARTS <= 8 ? 2 : 1;  // what the registers hold
  while (count) {
    const int q = std::min(count, most);
    if (q >= 4) attend<most >= 4 ? 4 : 1, PARTS>(queries, k, v, seen);
    else if (q == 3) attend<most >= 4 ? 3 : 1, PARTS>(queries, k, v, seen);
    else if (q == 2) attend<most >= 2 ? 2 : 1, PARTS>(queries, k, v, seen);
    else attend<1, PARTS>(queries, k, v, seen);
    queries += q;
    count -= q;
  }
}

void attend_any(int parts, const Query* queries, int count, const float* k, const float* v,
                const int32_t* seen) {
  switch (parts) {
    case 1: return attend_some<1>(queries, count, k, v, seen);
    case 2: return attend_some<2>(queries, count, k, v, seen);
    case 4: return attend_some<4>(queries, count, k, v, seen);
    case 5: return attend_some<5>(queries, count, k, v, seen);
    case 6: return attend_some<6>(queries, count, k, v, seen);
    case 8: return attend_some<8>(queries, count, k, v, seen);
    case 16: return attend_some<16>(queries, count, k, v, seen);
  }
}

int padded(int outputs) { return (outputs + kPair - 1) / kPair * kPair; }

struct Buffers {
  float *normed, *qkv, *attended, *gated, *scales, *turned, *scores, *tiles;
  uint8_t* rounded;
  int score_room;
};

}  // namespace

extern "C" {

Pool* jupiter_pool(int threads) { return new Pool(threads); }
void jupiter_pool_use(Pool* pool, int threads) { pool->use(threads); }
void jupiter_pool_free(Pool* pool) { delete pool; }

// Layers begun so far in this process: what a watch looks at, from another thread.
int64_t jupiter_progress() { return passed.load(std::memory_order_relaxed); }

// Bytes of scratch memory that `rows` rows seeing at most `keys` keys need.
int64_t jupiter_scratch(const Model* m, int rows, int keys, int threads) {
  const int64_t width = padded((m->heads + 2 * m->kv_heads) * m->head_dim);
  const int64_t widest = std::max(m->inner, std::max(m->hidden, int(width)));
  const int64_t row = m->hidden + width + m->heads * m->head_dim + m->inner + 1;
  const int64_t thread = (m->heads / m->kv_heads) * (keys + 32 + m->head_dim) + widest + rows * kPair;
  return 4 * (rows * row + threads * thread) + rows * widest + 4096;
}

// x: float [rows][hidden], in place. cosine, sine: float [rows][head_dim / 2].
void jupiter_layers(Pool* pool, const Model* m, const Layer* layers, int count, float* x, int rows,
                    const float* cosine, const float* sine, const Row* at, const int32_t* seen,
                    int keys, float* scratch) {
  const int d = m->head_dim, q_width = m->heads * d, kv_width = m->kv_heads * d;
  const int width = padded(q_width + 2 * kv_width), groups = m->heads / m->kv_heads;
  const int widest = std::max(m->inner, std::max(m->hidden, width));
  float* next = scratch;
  auto take = [&](int64_t floats) { float* p = next; next += (floats + 15) / 16 * 16; return p; };
  Buffers b;
  b.normed = take(int64_t(rows) * m->hidden);
  b.qkv = take(int64_t(rows) * width);
  b.attended = take(int64_t(rows) * q_width);
  b.gated = take(int64_t(rows) * m->inner);
  b.scales = take(rows);
  b.turned = take(int64_t(pool->threads()) * widest);
  b.score_room = keys + 32;
  b.scores = take(int64_t(pool->threads()) * groups * (b.score_room + d));
  b.tiles = take(int64_t(pool->threads()) * rows * kPair);
  b.rounded = reinterpret_cast<uint8_t*>(take(0));

  pool->run([&](int thread) {
    const int threads = pool->threads();
    const Span mine(rows, thread, threads);
    float* scores = b.scores + int64_t(thread) * groups * (b.score_room + d);
    float* queried = scores + int64_t(groups) * b.score_room;
    float* tile = b.tiles + int64_t(thread) * rows * kPair;
    auto round = [&](const float* values, const Linear& w) {
      round_rows(w, values, mine, b.rounded, b.scales, b.turned + int64_t(thread) * widest);
      pool->barrier();
      return Input{values, b.rounded, b.scales, w.in, rows};
    };
    auto share = [&](const Linear& w) { return Span(w.out / kPair, thread, threads); };
    auto start = [&](const Linear& w) { return weights_of(w, share(w).begin); };
    auto norm = [&](const float* weight) {
      for (int r = mine.begin; r < mine.end; ++r)
        rms_norm(x + int64_t(r) * m->hidden, weight, m->eps, m->hidden, b.normed + int64_t(r) * m->hidden);
    };
    for (int l = 0; l < count; ++l) {
      if (thread == 0) passed.fetch_add(1, std::memory_order_relaxed);
      const Layer& layer = layers[l];
      norm(layer.input_norm);
      product_into<false>(layer.qkv, round(b.normed, layer.qkv), share(layer.qkv), tile, start(layer.o), b.qkv);
      pool->barrier();
      for (int r = mine.begin; r < mine.end; ++r) {
        const float* row = b.qkv + int64_t(r) * width;
        const float *c = cosine + int64_t(r) * (d / 2), *s = sine + int64_t(r) * (d / 2);
        for (int h = 0; h < m->kv_heads; ++h) {
          const int64_t place = at[r].layer * l + at[r].head * h + int64_t(at[r].place) * d;
          rotate(row + q_width + h * d, c, s, d, at[r].k + place);
          std::memcpy(at[r].v + place, row + q_width + kv_width + h * d, d * sizeof(float));
        }
      }
      pool->barrier();
      // The heads of a row that share keys go together; a single row is cut finer, for all threads.
      const int together = rows * m->kv_heads < 4 * threads ? 1 : groups;
      const Span items(rows * m->heads / together, thread, threads);
      for (int i = items.begin; i < items.end; ++i) {
        const int r = i * together / m->heads, h = i * together % m->heads;
        const int64_t head = at[r].layer * l + at[r].head * (h / groups);
        Query queries[kGroups];
        for (int a = 0; a < together; ++a) {
          float* q = queried + a * d;
          rotate(b.qkv + int64_t(r) * width + (h + a) * d, cosine + int64_t(r) * (d / 2),
                 sine + int64_t(r) * (d / 2), d, q);
          queries[a] = {q, scores + int64_t(a) * b.score_room,
                        b.attended + int64_t(r) * q_width + (h + a) * d, at + r};
        }
        attend_any(d / 16, queries, together, at[r].k + head, at[r].v + head, seen);
      }
      pool->barrier();
      product_into<true>(layer.o, round(b.attended, layer.o), share(layer.o), tile, start(layer.gate_up), x);
      pool->barrier();
      norm(layer.post_norm);
      gated_product(layer.gate_up, round(b.normed, layer.gate_up), share(layer.gate_up), tile, start(layer.down), b.gated);
      pool->barrier();
      const Linear& after = l + 1 < count ? layers[l + 1].qkv : layer.down;
      product_into<true>(layer.down, round(b.gated, layer.down), share(layer.down), tile, start(after), x);
      pool->barrier();
    }
  });
}

// out = norm(x) * weight, float [rows][width].
void jupiter_norm(const float* x, const float* weight, float eps, int rows, int width, float* out) {
  for (int r = 0; r < rows; ++r)
    rms_norm(x + int64_t(r) * width, weight, eps, width, out + int64_t(r) * width);
}

// Several products at once, each with its own input: out[i] = x[i] W[i]^T (+ b), where x[i] is
// float [rows][w[i].in] and out[i] float [rows][w[i].out], one behind the other; so are the rounded
// inputs and their scales, rows * in bytes and rows floats for each. All W are float, or none.
void jupiter_linears(Pool* pool, const Linear* w, int count, const float* x, int rows, float* out,
                     uint8_t* rounded, float* scales) {
  pool->run([&](int thread) {
    const Span mine(rows * count, thread, pool->threads());
    const int in = w->in, width = w->out;
    std::vector<float> turned(in), tile(rows * kPair);
    for (int i = mine.begin / rows; i * rows < mine.end; ++i) {
      const Span part(std::max(mine.begin - i * rows, 0), std::min(mine.end - i * rows, rows));
      const int64_t at = int64_t(i) * rows;
      round_rows(w[i], x + at * in, part, rounded + at * in, scales + at, turned.data());
    }
    pool->barrier();
    const int pairs = width / kPair;
    const Span all(pairs * count, thread, pool->threads());
    for (int i = all.begin / pairs; i * pairs < all.end; ++i) {
      const Span part(std::max(all.begin - i * pairs, 0), std::min(all.end - i * pairs, pairs));
      const int64_t at = int64_t(i) * rows;
      const Input input{x + at * in, rounded + at * in, scales + at, in, rows};
      const char* next = weights_of(w[std::min(i + 1, count - 1)], 0);
      product_into<false>(w[i], input, part, tile.data(), next, out + at * width);
    }
  });
}

// For each row the output with the largest value, the first of equal ones; the values themselves are
// never stored. `outputs`: how many are real, not padding. `rounded`, `scales` as above.
void jupiter_best(Pool* pool, const Linear* w, const float* x, int rows, int outputs, int32_t* best,
                  uint8_t* rounded, float* scales) {
  const int threads = pool->threads();
  std::vector<float> tops(threads * rows);
  std::vector<int32_t> places(threads * rows);
  pool->run([&](int thread) {
    std::vector<float> turned(w->in), tile(rows * kPair), values(rows * kCols, -INFINITY);
    std::vector<int32_t> found(rows * kCols, 0);
    round_rows(*w, x, Span(rows, thread, threads), rounded, scales, turned.data());
    pool->barrier();
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i end = _mm512_set1_epi32(outputs);
    const Input input{x, rounded, scales, w->in, rows};
    const Span share(w->out / kPair, thread, threads);
    product(*w, input, share, tile.data(), weights_of(*w, share.begin), [&](int pair) {
      for (int c = 0; c < 2; ++c) {
        const __m512i place = _mm512_add_epi32(lanes, _mm512_set1_epi32(pair * kPair + c * kCols));
        const __mmask16 real = _mm512_cmplt_epi32_mask(place, end);
        for (int r = 0; r < rows; ++r) {
          const __m512 v = _mm512_loadu_ps(tile.data() + r * kPair + c * kCols);
          float* top = values.data() + r * kCols;
          const __mmask16 more =
              _mm512_mask_cmp_ps_mask(real, v, _mm512_loadu_ps(top), _CMP_GT_OQ);
          _mm512_mask_storeu_ps(top, more, v);
          _mm512_mask_storeu_epi32(found.data() + r * kCols, more, place);
        }
      }
    });
    for (int r = 0; r < rows; ++r) {
      int at = r * kCols;
      for (int i = r * kCols; i < (r + 1) * kCols; ++i)
        if (values[i] > values[at] || (values[i] == values[at] && found[i] < found[at])) at = i;
      tops[thread * rows + r] = values[at];
      places[thread * rows + r] = found[at];
    }
  });
  for (int r = 0; r < rows; ++r) {
    int at = r;  // threads have rising outputs: the first of equal ones stays
    for (int t = 1; t < threads; ++t)
      if (tops[t * rows + r] > tops[at]) at = t * rows + r;
    best[r] = places[at];
  }
}

// For each row of float [rows][stride] the places of its k largest of `width` values, falling; of
// equal ones the first comes first.
void jupiter_top(const float* x, int rows, int width, int stride, int k, int32_t* out) {
  std::vector<float> values(k);
  for (int r = 0; r < rows; ++r) {
    const float* row = x + int64_t(r) * stride;
    int32_t* places = out + int64_t(r) * k;
    int count = 0;
    auto insert = [&](int place) {
      int at = count < k ? count++ : k - 1;
      for (; at > 0 && row[place] > values[at - 1]; --at) {
        values[at] = values[at - 1];
        places[at] = places[at - 1];
      }
      values[at] = row[place];
      places[at] = place;
    };
    const int filled = std::min(width, k);
    for (int i = 0; i < filled; ++i) insert(i);
    for (int i = filled; i < width; i += 16) {
      const __mmask16 real = width - i < 16 ? __mmask16((1u << (width - i)) - 1) : __mmask16(-1);
      const __m512 v = _mm512_maskz_loadu_ps(real, row + i);
      unsigned more = _mm512_mask_cmp_ps_mask(real, v, _mm512_set1_ps(values[k - 1]), _CMP_GT_OQ);
      for (; more; more &= more - 1) {
        const int place = i + __builtin_ctz(more);
        if (row[place] > values[k - 1]) insert(place);
      }
    }
  }
}
}
