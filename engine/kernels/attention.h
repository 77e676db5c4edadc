// Attention of rows over the keys and values of their sequence, in float32.

#pragma once

#include "rows.h"

constexpr int kGroups = 64;  // most query heads that share a KV head

struct Row {
  float* k;        // of the row's sequence, layer 0: [kv_heads][capacity][head_dim]
  float* v;
  int64_t layer;   // floats from one layer to the next
  int64_t head;    // floats from one KV head to the next
  int32_t start;   // KV rows that every row of the sequence's step sees
  int32_t place;   // where this row's own keys and values go
  int32_t seen;    // first of its numbers in `seen`
  int32_t count;   // how many rows of this step it sees, itself included
  int32_t position;
};

// Four vectors to one: of each four neighbouring lanes one has a part of each one's sum.
inline __m512 fold(const __m512* v) {
  auto pair = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d a = _mm512_castps_pd(pair(v[0], v[1])), b = _mm512_castps_pd(pair(v[2], v[3]));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

// The sums of 16 vectors, folded by fours, side by side: a tree of shuffles, not 16 reductions.
inline __m512 sums_of(const __m512* fours) {
  auto lanes = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return lanes(lanes(fours[0], fours[1]), lanes(fours[2], fours[3]));
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
    __m512 fours[Q][4];
    for (int f = 0; f < 4; ++f) {
      __m512 products[Q][4];
      for (int n = 0; n < 4; ++n) {
        // Behind the last one it is read again; what comes of it is masked.
        const float* other = key(std::min(i + 4 * f + n, count - 1));
        __m512 part = _mm512_loadu_ps(other);
        for (int a = 0; a < Q; ++a) products[a][n] = _mm512_mul_ps(q[a][0], part);
        for (int p = 1; p < PARTS; ++p) {
          part = _mm512_loadu_ps(other + p * 16);
          for (int a = 0; a < Q; ++a) products[a][n] = _mm512_fmadd_ps(q[a][p], part, products[a][n]);
        }
      }
      for (int a = 0; a < Q; ++a) fours[a][f] = fold(products[a]);
    }
    const __mmask16 real = __mmask16((1u << std::min(16, count - i)) - 1);
    for (int a = 0; a < Q; ++a) {
      const __m512 s = _mm512_mul_ps(sums_of(fours[a]), _mm512_set1_ps(scale));
      _mm512_storeu_ps(queries[a].scores + first + i,
                       _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), real, s));
    }
  }
}

// The first `count` lanes, 16 at most.
inline __mmask16 lanes_of(int count) { return __mmask16((1u << std::min(16, count)) - 1); }

// exp(s - max) in place, zero behind `count`; returns one over their sum.
inline float softmax(float* scores, int count) {
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

inline void attend_any(int parts, const Query* queries, int count, const float* k, const float* v,
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
