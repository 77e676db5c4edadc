// What is done to one row of values at a time. Widths are multiples of 16.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

inline float sum_of(__m512 v) { return _mm512_reduce_add_ps(v); }

inline float inverse_rms(const float* x, float eps, int width) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < width; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return 1.0f / std::sqrt(sum_of(sum) / float(width) + eps);
}

// x / rms(x) * weight; without a weight, 1.
inline void rms_norm(const float* x, const float* weight, float eps, int width, float* out) {
  const __m512 scale = _mm512_set1_ps(inverse_rms(x, eps, width));
  for (int i = 0; i < width; i += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
    _mm512_storeu_ps(out + i, weight ? _mm512_mul_ps(v, _mm512_loadu_ps(weight + i)) : v);
  }
}

// One step of the transform within 16 values: each becomes the sum of two, or, where `Upper` has a
// bit, their difference.
template <int Shuffle, int Upper>
inline __m512 mix(__m512 v) {
  const __m512 signs = _mm512_mask_blend_ps(Upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  __m512 other;
  if constexpr (Upper == 0xaaaa || Upper == 0xcccc)
    other = _mm512_castsi512_ps(
        _mm512_shuffle_epi32(_mm512_castps_si512(v), _MM_PERM_ENUM(Shuffle)));
  else
    other = _mm512_shuffle_f32x4(v, v, Shuffle);
  return _mm512_fmadd_ps(v, signs, other);
}

inline __m512 turn16(__m512 v) {
  return mix<0x4e, 0xff00>(mix<0xb1, 0xf0f0>(mix<0x4e, 0xcccc>(mix<0xb1, 0xaaaa>(v))));
}

// Each block of `block` values (a power of two) times the Hadamard matrix of that size, in place.
inline void turn(float* x, int width, int block) {
  for (int i = 0; i < width; i += 16) {
    __m512 v = _mm512_loadu_ps(x + i);
    if (block > 1) v = mix<0xb1, 0xaaaa>(v);
    if (block > 2) v = mix<0x4e, 0xcccc>(v);
    if (block > 4) v = mix<0xb1, 0xf0f0>(v);
    if (block > 8) v = mix<0x4e, 0xff00>(v);
    _mm512_storeu_ps(x + i, v);
  }
  for (int half = 16; half < block; half *= 2)
    for (int i = 0; i < width; i += 16) {
      if (i & half) continue;
      const __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(x + i + half);
      _mm512_storeu_ps(x + i, _mm512_add_ps(a, b));
      _mm512_storeu_ps(x + i + half, _mm512_sub_ps(a, b));
    }
}

// One block of 64, in the same order of sums.
inline void turn64(__m512 (&v)[4]) {
  for (auto& part : v) part = turn16(part);
  const __m512 a = _mm512_add_ps(v[0], v[1]), b = _mm512_sub_ps(v[0], v[1]);
  const __m512 c = _mm512_add_ps(v[2], v[3]), d = _mm512_sub_ps(v[2], v[3]);
  v[0] = _mm512_add_ps(a, c), v[1] = _mm512_add_ps(b, d);
  v[2] = _mm512_sub_ps(a, c), v[3] = _mm512_sub_ps(b, d);
}

struct Rounded {
  float scale;
  int32_t sum;  // of the integers
};

// Norm (where there is a weight for it), turn, and round a row to int8 with one scale, so that
// x = scale * integer. Turned, a peak is spread over its block: otherwise it would leave the rest
// of the row few of the 255 steps. Four integers follow each other, then come those of `step - 1`
// other rows. `turned` has room for the row.
inline Rounded round_row(const float* x, const float* norm, float eps, int width, int block,
                         float* turned, int8_t* out, int step) {
  const __m512 factor = _mm512_set1_ps(norm ? inverse_rms(x, eps, width) : 1.0f);
  auto load = [&](int i) {
    const __m512 v = _mm512_loadu_ps(x + i);
    return norm ? _mm512_mul_ps(_mm512_mul_ps(v, factor), _mm512_loadu_ps(norm + i)) : v;
  };
  __m512 most = _mm512_setzero_ps();
  auto keep = [&](int i, __m512 v) {
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    _mm512_storeu_ps(turned + i, v);
  };
  if (block == 64) {
    for (int i = 0; i < width; i += 64) {
      __m512 v[4] = {load(i), load(i + 16), load(i + 32), load(i + 48)};
      turn64(v);
      for (int p = 0; p < 4; ++p) keep(i + 16 * p, v[p]);
    }
  } else {
    for (int i = 0; i < width; i += 16) _mm512_storeu_ps(turned + i, load(i));
    turn(turned, width, block);
    for (int i = 0; i < width; i += 16) keep(i, _mm512_loadu_ps(turned + i));
  }
  const float peak = _mm512_reduce_max_ps(most), scale = peak > 0.0f ? peak / 127.0f : 1.0f;
  const __m512 inverse = _mm512_set1_ps(1.0f / scale);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < width; i += 16) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(turned + i), inverse));
    sum = _mm512_add_epi32(sum, v);
    const __m128i bytes = _mm512_cvtsepi32_epi8(v);
    int8_t* place = out + int64_t(i) * step;
    if (step == 1) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(place), bytes);
      continue;
    }
    const int32_t fours[4] = {_mm_extract_epi32(bytes, 0), _mm_extract_epi32(bytes, 1),
                              _mm_extract_epi32(bytes, 2), _mm_extract_epi32(bytes, 3)};
    for (int n = 0; n < 4; ++n) std::memcpy(place + 4 * n * step, fours + n, 4);
  }
  return {scale, _mm512_reduce_add_epi32(sum)};
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

// Rotary position embedding of one head.
inline void rotate(const float* x, const float* cosine, const float* sine, int width, float* out) {
  const int half = width / 2;
  for (int i = 0; i < half; ++i) {
    out[i] = x[i] * cosine[i] - x[i + half] * sine[i];
    out[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
  }
}
