// Behind the layers: the likeliest tokens, greedy acceptance, and drafting.

#pragma once

#include <memory>

#include "products.h"

// Room to round some rows of one thread's own.
struct Rounding {
  std::vector<float> turned, scales, tile;
  std::vector<int32_t> offsets;
  std::vector<int8_t> values;

  Rounding(const Linear& w, int rows)
      : turned(w.in), scales(rows), tile(size_t(rows) * kPair), offsets(rows),
        values(size_t(rows) * w.in) {}
  template <class Row>
  Input round(const Linear& w, Row&& row) {
    const Input in{values.data(), scales.data(), offsets.data(), int(scales.size())};
    round_passes(w, row, nullptr, 0.0f, Span(0, passes_of(in.rows)), turned.data(), in);
    return in;
  }
};

// The largest output of each row; the values themselves are never stored.
class Best {
 public:
  Best(const Linear& w, int outputs, int threads) : w_(w), outputs_(outputs), found_(threads) {}

  // Called by all threads; afterwards, and behind a barrier, `of` tells.
  template <class Row>
  void look(int rows, Row&& row, int thread) {
    Rounding own(w_, rows);
    const Input in = own.round(w_, row);
    std::vector<float> values(size_t(rows) * kCols, -INFINITY);
    std::vector<int32_t> places(size_t(rows) * kCols, 0);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i end = _mm512_set1_epi32(outputs_);
    const Span share(w_.out / kPair, thread, int(found_.size()));
    each_vector(w_, in, share, own.tile.data(), weights_of(w_, share.begin),
                [&](int r, int column, __m512 v) {
                  const __m512i place = _mm512_add_epi32(lanes, _mm512_set1_epi32(column));
                  const __mmask16 real = _mm512_cmplt_epi32_mask(place, end);
                  float* top = values.data() + r * kCols;
                  const __mmask16 more =
                      _mm512_mask_cmp_ps_mask(real, v, _mm512_loadu_ps(top), _CMP_GT_OQ);
                  _mm512_mask_storeu_ps(top, more, v);
                  _mm512_mask_storeu_epi32(places.data() + r * kCols, more, place);
                });
    auto& found = found_[thread];
    found.clear();
    for (int r = 0; r < rows; ++r) {
      int at = r * kCols;
      for (int i = at; i < (r + 1) * kCols; ++i)
        if (values[i] > values[at] || (values[i] == values[at] && places[i] < places[at])) at = i;
      found.push_back({values[at], places[at]});
    }
  }
  int32_t of(int row) const {
    Top best = found_[0][row];  // threads have rising outputs: the first of equal ones stays
    for (const auto& found : found_)
      if (found[row].value > best.value) best = found[row];
    return best.place;
  }

 private:
  struct Top {
    float value;
    int32_t place;
  };
  const Linear& w_;
  const int outputs_;
  std::vector<std::vector<Top>> found_;
};

// Greedy acceptance. First the likeliest tokens after some nodes of every tree, for the price of
// one, then those that turn out to be needed.
class Judging {
 public:
  Judging(const Linear& lm_head, int vocabulary, int threads, const float* x, const int32_t* sizes,
          int trees, const int32_t* tokens, const int32_t* parents, int first_nodes)
      : width_(lm_head.in), best_(lm_head, vocabulary, threads), x_(x) {
    for (int t = 0; t < trees; ++t) {
      trees_.push_back({tokens, parents, sizes[t], int(known_.size()), {0}});
      look_first(trees_.back(), first_nodes);
      known_.insert(known_.end(), sizes[t], -1);
      tokens += sizes[t], parents += sizes[t];
    }
  }
  void run(Pool& pool, int thread) {
    while (!wanted_.empty()) {
      auto row = [&](int i) { return x_ + int64_t(wanted_[i]) * width_; };
      best_.look(int(wanted_.size()), row, thread);
      pool.barrier();
      if (thread == 0) follow();
      pool.barrier();
    }
  }
  std::vector<const float*> ends() const {
    std::vector<const float*> found;
    for (const Tree& tree : trees_)
      found.push_back(x_ + int64_t(tree.first + tree.path.back()) * width_);
    return found;
  }
  void results(int32_t* path, int32_t* lengths, int32_t* next) const {
    for (const Tree& tree : trees_) {
      std::copy(tree.path.begin(), tree.path.end(), path);
      path += tree.size;
      *lengths++ = int32_t(tree.path.size());
      *next++ = known_[tree.first + tree.path.back()];
    }
  }

 private:
  struct Tree {
    const int32_t* tokens;
    const int32_t* parents;
    int size, first;  // of all nodes
    std::vector<int32_t> path;
  };

  // The likeliest line, then the first others: nodes come by depth, the likelier ones first.
  void look_first(const Tree& tree, int most) {
    std::vector<bool> taken(tree.size);
    auto take = [&](int node) {
      if (most-- > 0) wanted_.push_back(tree.first + node), taken[node] = true;
    };
    for (int node = 0, line = -1; node < tree.size; ++node)
      if (tree.parents[node] == line) take(line = node);
    for (int node = 0; node < tree.size; ++node)
      if (!taken[node]) take(node);
  }
  void follow() {
    for (size_t i = 0; i < wanted_.size(); ++i) known_[wanted_[i]] = best_.of(int(i));
    wanted_.clear();
    for (Tree& tree : trees_) {
      for (int node = tree.path.back();;) {
        const int32_t token = known_[tree.first + node];
        if (token < 0) {
          wanted_.push_back(tree.first + node);
          break;
        }
        int child = node + 1;
        while (child < tree.size && (tree.parents[child] != node || tree.tokens[child] != token))
          ++child;
        if (child == tree.size) break;
        tree.path.push_back(node = child);
      }
    }
  }
  const int width_;
  Best best_;
  const float* x_;
  std::vector<Tree> trees_;
  std::vector<int32_t> known_;  // likeliest token after each node, or -1
  std::vector<int> wanted_;
};

struct Heads {
  int32_t hidden, count, blocks;  // blocks: ResBlocks, behind one that sees tokens where there is one
  int32_t width;                  // tokens that are drafted from
  const Linear* fc1;              // [count] of the blocks that see tokens, or null
  const Linear* fc2;              // [count]
  const Linear* linear;           // [blocks][count]
  const Linear* output;           // [count], or one for all
  int32_t own_output;
  const int32_t* tokens;          // [width] where these are not all tokens in order, else null
  const float* embedding;         // [vocabulary][hidden], or null: the rows of `tied`
  const Linear* tied;
};

// For a row the places of its k largest of `width` values, falling; of equal ones the first.
inline void top_of(const float* row, int width, int k, int32_t* places) {
  std::vector<float> values(k);
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

// The tree that sequential heads draft along: its inner nodes, level by level from the root on.
struct Along {
  int32_t levels, nodes;   // nodes: of all levels
  const int32_t* sizes;    // [levels]
  const int32_t* parents;  // [nodes] place in the level before
  const int32_t* ranks;    // [nodes] among the parent's candidates
};

// All heads at one position of each of n sequences.
class Draft {
 public:
  Draft(const Heads& heads, int count, int n, int k, int threads)
      : h_(heads), count_(count), n_(n), k_(k), threads_(threads) {
    if (count == 0) return;
    x_.resize(size_t(count) * n * h_.hidden);
    y_.resize(x_.size());
    if (h_.fc1) inner_.resize(size_t(count) * n * h_.fc1->out);
    logits_.reset(new float[size_t(count) * n * h_.output->out]);
  }

  // By all threads. ends: normed hidden states [hidden] of each; known: the tokens behind each that
  // the heads see, [n][seen]; out: [n][count][k].
  void run(Pool& pool, int thread, const float* const* ends, const int32_t* known, int32_t* out) {
    auto end = [&](int, int i) { return ends[i]; };
    auto row = [&](int head, int i) { return x_.data() + at(head, i) * h_.hidden; };
    if (h_.fc1) {
      token_block(pool, thread, ends, known);
    } else if (h_.blocks == 0) {
      if (thread == 0)
        for (int i = 0; i < count_ * n_; ++i) copy(ends[i % n_], x_.data() + i * int64_t(h_.hidden));
      pool.barrier();
    }
    for (int block = 0; block < h_.blocks; ++block) {
      const Linear* linear = h_.linear + int64_t(block) * h_.count;
      if (block == 0 && !h_.fc1) res_block(pool, thread, linear, end);
      else res_block(pool, thread, linear, row);
    }
    const int width = h_.output->out;
    if (h_.own_output) {
      products(thread, h_.output, row, [&](int head, int i, int column, __m512 v) {
        _mm512_storeu_ps(logits_.get() + at(head, i) * width + column, v);
      });
    } else {
      Rounding own(*h_.output, count_ * n_);
      const Input in = own.round(*h_.output, [&](int i) { return row(i / n_, i % n_); });
      const Span share(width / kPair, thread, threads_);
      product_into<false>(*h_.output, in, share, own.tile.data(),
                          weights_of(*h_.output, share.begin), logits_.get());
    }
    pool.barrier();
    const Span mine(count_ * n_, thread, threads_);
    for (int i = mine.begin; i < mine.end; ++i) {
      int32_t* places = out + (int64_t(i % n_) * count_ + i / n_) * k_;
      top_of(logits_.get() + int64_t(i) * width, h_.width, k_, places);
      for (int c = 0; h_.tokens && c < k_; ++c) places[c] = h_.tokens[places[c]];
    }
  }

 private:
  int64_t at(int head, int i) const { return int64_t(head) * n_ + i; }
  void copy(const float* from, float* to) const { std::copy(from, from + h_.hidden, to); }

  // A product of each head: put(head, i, column, 16 values) for this thread's share of all.
  template <class Row, class Put>
  void products(int thread, const Linear* w, Row&& row, Put&& put) {
    const int pairs = w->out / kPair;
    const Span all(pairs * count_, thread, threads_);
    Rounding own(*w, n_);
    for (int head = all.begin / pairs; head * pairs < all.end; ++head) {
      const Span part(std::max(all.begin - head * pairs, 0), std::min(all.end - head * pairs, pairs));
      const Input in = own.round(w[head], [&](int i) { return row(head, i); });
      each_vector(w[head], in, part, own.tile.data(), weights_of(w[std::min(head + 1, count_ - 1)], 0),
                  [&](int i, int column, __m512 v) { put(head, i, column, v); });
    }
  }

  // x = y + silu(linear(y)), y = row(head, i)
  template <class Row>
  void res_block(Pool& pool, int thread, const Linear* linear, Row&& row) {
    products(thread, linear, row, [&](int head, int i, int column, __m512 v) {
      const __m512 before = _mm512_loadu_ps(row(head, i) + column);
      _mm512_storeu_ps(y_.data() + at(head, i) * h_.hidden + column, _mm512_add_ps(before, silu(v)));
    });
    pool.barrier();
    if (thread == 0) std::swap(x_, y_);
    pool.barrier();
  }

  // x = end + fc2(silu(fc1([norm(end); norm(embedding of each token)])))
  void token_block(Pool& pool, int thread, const float* const* ends, const int32_t* known) {
    const int hidden = h_.hidden, inner = h_.fc1->out, width = h_.fc1->in;
    std::vector<float> seen(size_t(n_) * width), embedded(hidden);
    for (int i = 0; i < n_; ++i) {
      float* place = seen.data() + int64_t(i) * width;
      rms_norm(ends[i], nullptr, 1e-6f, hidden, place);
      for (float* end = place + width; (place += hidden) < end;) {
        embed(*known++, embedded.data());
        rms_norm(embedded.data(), nullptr, 1e-6f, hidden, place);
      }
    }
    products(thread, h_.fc1, [&](int, int i) { return seen.data() + int64_t(i) * width; },
             [&](int head, int i, int column, __m512 v) {
               _mm512_storeu_ps(inner_.data() + at(head, i) * inner + column, silu(v));
             });
    pool.barrier();
    products(thread, h_.fc2, [&](int head, int i) { return inner_.data() + at(head, i) * inner; },
             [&](int head, int i, int column, __m512 v) {
               const __m512 before = _mm512_loadu_ps(ends[i] + column);
               _mm512_storeu_ps(x_.data() + at(head, i) * hidden + column, _mm512_add_ps(before, v));
             });
    pool.barrier();
  }

  void embed(int32_t token, float* out) const {
    if (h_.embedding) return copy(h_.embedding + int64_t(token) * h_.hidden, out);
    const Linear& w = *h_.tied;
    const uint8_t* from = weights_of(w, token / kPair) + token % kPair * 4;
    for (int i = 0; i < w.in; ++i)
      out[i] = (int(from[int64_t(i / 4) * kPair * 4 + i % 4]) - 128) * w.scale[token];
    turn(out, w.in, w.block);
  }

  const Heads& h_;
  const int count_, n_, k_, threads_;
  std::vector<float> x_, y_, inner_;
  std::unique_ptr<float[]> logits_;
};

// One of the heads by itself.
class OneHead {
 public:
  OneHead(const Heads& heads, int head) : one_(heads) {
    for (int block = 0; block < heads.blocks; ++block)
      linear_.push_back(heads.linear[int64_t(block) * heads.count + head]);
    one_.count = 1;
    if (heads.fc1) one_.fc1 += head, one_.fc2 += head;
    if (heads.own_output) one_.output += head;
    one_.linear = linear_.data();
  }
  OneHead(const OneHead&) = delete;
  const Heads& heads() const { return one_; }

 private:
  Heads one_;
  std::vector<Linear> linear_;
};

// Sequential heads at one position of each of n sequences: head d at every inner node of depth d,
// behind the tokens that lead there.
class DraftAlong {
 public:
  DraftAlong(const Heads& heads, const Along& tree, int n, int k, int threads)
      : tree_(tree), n_(n), k_(k) {
    for (int depth = 0; depth < tree.levels; ++depth) {
      const int rows = n * tree.sizes[depth];
      heads_.emplace_back(new OneHead(heads, depth));
      levels_.emplace_back(new Level{Draft(heads_.back()->heads(), 1, rows, k, threads)});
      Level& level = *levels_.back();
      level.ends.resize(rows);
      level.known.resize(size_t(rows) * (depth + 1));
      level.found.resize(size_t(rows) * k);
    }
  }

  // By all threads. out: [n][inner nodes][k].
  void run(Pool& pool, int thread, const float* const* ends, const int32_t* roots, int32_t* out) {
    const int32_t *parents = tree_.parents, *ranks = tree_.ranks;
    for (int depth = 0; depth < tree_.levels; ++depth) {
      Level& level = *levels_[depth];
      const int size = tree_.sizes[depth];
      if (thread == 0)
        for (int i = 0; i < n_; ++i)
          for (int node = 0; node < size; ++node) {
            const int row = i * size + node;
            level.ends[row] = ends[i];
            int32_t* known = level.known.data() + int64_t(row) * (depth + 1);
            if (depth == 0) *known = roots[i];
            else lead(depth, i, parents[node], ranks[node], known);
          }
      pool.barrier();
      level.draft.run(pool, thread, level.ends.data(), level.known.data(), level.found.data());
      pool.barrier();
      parents += size, ranks += size;
    }
    if (thread == 0) gather(out);
  }

 private:
  struct Level {
    Draft draft;
    std::vector<const float*> ends;
    std::vector<int32_t> known, found;
  };
  // The tokens behind which a node of this depth drafts: its parent's, and its own.
  void lead(int depth, int i, int parent, int rank, int32_t* known) const {
    const Level& before = *levels_[depth - 1];
    const int64_t row = int64_t(i) * tree_.sizes[depth - 1] + parent;
    std::copy_n(before.known.data() + row * depth, depth, known);
    known[depth] = before.found[row * k_ + rank];
  }
  void gather(int32_t* out) const {
    for (int i = 0; i < n_; ++i)
      for (int depth = 0; depth < tree_.levels; ++depth) {
        const int64_t share = int64_t(tree_.sizes[depth]) * k_;
        out = std::copy_n(levels_[depth]->found.data() + i * share, share, out);
      }
  }
  const Along& tree_;
  const int n_, k_;
  std::vector<std::unique_ptr<OneHead>> heads_;
  std::vector<std::unique_ptr<Level>> levels_;
};
