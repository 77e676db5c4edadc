// Decoder layers of a Llama with int8 weights on a CPU, all of a stage in one call; and what comes
// behind them on the last stage.
//
// A row's result never depends on the other rows of the call: integer products are exact, every
// float sum runs in one fixed order, and threads share outputs or rows but never a sum. So a draft
// tree, any split and any batch give bit for bit what a single row gives.
//
// Plain C interface, called through ctypes; see native.py for the layouts.

#include "attention.h"
#include "judge.h"
#include "products.h"

namespace {

std::atomic<int64_t> passed{0};

struct Layer {
  const float* input_norm;
  const float* post_norm;
  Linear qkv, o, gate_up, down;
};

struct Model {
  int32_t hidden, inner, heads, kv_heads, head_dim;
  float eps;
  const float* embedding;   // [vocabulary][hidden] on the first stage, else null
  const float* final_norm;  // [hidden] on the last stage, else null
};

// Rows of one sequence in a step, and which older ones are moved before it.
struct Entry {
  float* k;
  float* v;
  int64_t layer, head;  // as in Row
  int32_t start, rows;
  int32_t keep_to, kept;
};

int padded(int outputs) { return (outputs + kPair - 1) / kPair * kPair; }

struct Widths {
  int q, kv, qkv, widest, groups;
  explicit Widths(const Model& m)
      : q(m.heads * m.head_dim),
        kv(m.kv_heads * m.head_dim),
        qkv(padded(q + 2 * kv)),
        widest(std::max({m.inner, m.hidden, q})),
        groups(m.heads / m.kv_heads) {}
};

// What one thread has for itself.
struct Own {
  float *turned, *scores, *queried, *tile;
  Input input;
};

struct Buffers {
  float *qkv, *attended, *gated;
  Input shared;  // of more rows than one pass takes
  int score_room;
  std::vector<Own> own;
  int64_t bytes;

  Buffers(const Model& m, int rows, int keys, int threads, void* start) : own(threads) {
    const Widths w(m);
    Carver carver(start);
    auto input = [&](int count) {
      int8_t* values = carver.take<int8_t>(int64_t(count) * w.widest);
      float* scales = carver.take<float>(count);
      return Input{values, scales, carver.take<int32_t>(count), count};
    };
    qkv = carver.take<float>(int64_t(rows) * w.qkv);
    attended = carver.take<float>(int64_t(rows) * w.q);
    gated = carver.take<float>(int64_t(rows) * m.inner);
    if (rows > kRows) shared = input(rows);
    score_room = keys + 32;
    for (Own& one : own) {
      one.turned = carver.take<float>(w.widest);
      one.scores = carver.take<float>(int64_t(w.groups) * score_room);
      one.queried = carver.take<float>(int64_t(w.groups) * m.head_dim);
      one.tile = carver.take<float>(int64_t(rows) * kPair);
      one.input = input(std::min(rows, kRows));
    }
    bytes = carver.bytes();
  }
};

// The rows of a call, and the rows of their steps that they see.
struct Table {
  std::vector<Row> rows;
  std::vector<int32_t> seen;
  int keys = 0;

  Table(const Entry* entries, int count, const int32_t* parents) {
    for (const Entry* e = entries; e < entries + count; parents += e++->rows) {
      const int first = int(rows.size());
      bool chain = true;
      for (int i = 0; i < e->rows; ++i) chain &= parents[i] == i - 1;
      const int line = int(seen.size());
      for (int i = 0; chain && i < e->rows; ++i) seen.push_back(i);
      for (int i = 0; i < e->rows; ++i) {
        int at = line, ancestors = i;
        if (!chain) {
          at = int(seen.size()), ancestors = 0;
          if (parents[i] >= 0) {
            const Row& parent = rows[first + parents[i]];
            ancestors = parent.count;
            for (int n = 0; n < ancestors; ++n) seen.push_back(seen[parent.seen + n]);
          }
          seen.push_back(i);
        }
        rows.push_back({e->k, e->v, e->layer, e->head, e->start, e->start + i, at, ancestors + 1,
                        e->start + ancestors});
        keys = std::max(keys, e->start + ancestors + 1);
      }
    }
  }
};

struct Call {
  Pool* pool;
  const Model& m;
  const Widths w;
  const Table& table;
  const float *cosine, *sine;  // [positions][head_dim / 2]
  float* x;                    // [rows][hidden]
  int rows;
  Buffers b;

  // Rounded for `w`: by each thread for itself, or a pass by each in turn where there are several.
  Input round(const float* values, const float* norm, const Linear& linear, int thread) {
    const bool together = rows > kRows;
    const Input input = together ? b.shared : b.own[thread].input;
    const int passes = passes_of(rows);
    const Span mine = together ? Span(passes, thread, pool->threads()) : Span(0, passes);
    auto row = [&](int r) { return values + int64_t(r) * linear.in; };
    round_passes(linear, row, norm, m.eps, mine, b.own[thread].turned, input);
    if (together) pool->barrier();
    return input;
  }

  void write_keys(int layer, Span mine) {
    const int d = m.head_dim;
    for (int r = mine.begin; r < mine.end; ++r) {
      const Row& at = table.rows[r];
      const float* from = b.qkv + int64_t(r) * w.qkv + w.q;
      const int64_t turn = int64_t(at.position) * (d / 2);
      for (int h = 0; h < m.kv_heads; ++h) {
        const int64_t place = at.layer * layer + at.head * h + int64_t(at.place) * d;
        rotate(from + h * d, cosine + turn, sine + turn, d, at.k + place);
        std::memcpy(at.v + place, from + w.kv + h * d, d * sizeof(float));
      }
    }
  }

  void attend_layer(int layer, int thread) {
    // The heads of a row that share keys go together; a single row is cut finer, for all threads.
    const int together = rows * m.kv_heads < 4 * pool->threads() ? 1 : w.groups;
    const Span items(rows * m.heads / together, thread, pool->threads());
    const int d = m.head_dim;
    const Own& own = b.own[thread];
    for (int i = items.begin; i < items.end; ++i) {
      const int r = i * together / m.heads, h = i * together % m.heads;
      const Row& at = table.rows[r];
      const int64_t head = at.layer * layer + at.head * (h / w.groups);
      const int64_t turn = int64_t(at.position) * (d / 2);
      Query queries[kGroups];
      for (int a = 0; a < together; ++a) {
        float* q = own.queried + a * d;
        rotate(b.qkv + int64_t(r) * w.qkv + (h + a) * d, cosine + turn, sine + turn, d, q);
        queries[a] = {q, own.scores + int64_t(a) * b.score_room,
                      b.attended + int64_t(r) * w.q + (h + a) * d, &at};
      }
      attend_any(d / 16, queries, together, at.k + head, at.v + head, table.seen.data());
    }
  }

  void pass(const Layer* layers, int count, int thread) {
    const int threads = pool->threads();
    const Span mine(rows, thread, threads);
    float* tile = b.own[thread].tile;
    auto share = [&](const Linear& l) { return Span(l.out / kPair, thread, threads); };
    auto start = [&](const Linear& l) { return weights_of(l, share(l).begin); };
    for (int l = 0; l < count; ++l) {
      if (thread == 0) passed.fetch_add(1, std::memory_order_relaxed);
      const Layer& layer = layers[l];
      const Linear& after = l + 1 < count ? layers[l + 1].qkv : layer.down;
      Input in = round(x, layer.input_norm, layer.qkv, thread);
      product_into<false>(layer.qkv, in, share(layer.qkv), tile, start(layer.o), b.qkv);
      pool->barrier();
      write_keys(l, mine);
      pool->barrier();
      attend_layer(l, thread);
      pool->barrier();
      in = round(b.attended, nullptr, layer.o, thread);
      product_into<true>(layer.o, in, share(layer.o), tile, start(layer.gate_up), x);
      pool->barrier();
      in = round(x, layer.post_norm, layer.gate_up, thread);
      gated_product(layer.gate_up, in, share(layer.gate_up), tile, start(layer.down), b.gated);
      pool->barrier();
      in = round(b.gated, nullptr, layer.down, thread);
      product_into<true>(layer.down, in, share(layer.down), tile, start(after), x);
      pool->barrier();
    }
    if (m.final_norm)
      for (int r = mine.begin; r < mine.end; ++r) {
        float* row = x + int64_t(r) * m.hidden;
        rms_norm(row, m.final_norm, m.eps, m.hidden, row);
      }
  }
};

// Rows of the last step that stay are moved to where they belong; they come in rising order.
void move_rows(const Model& m, const Entry& e, const int32_t* keep, Span layers) {
  for (int64_t l = layers.begin; l < layers.end; ++l)
    for (int h = 0; h < m.kv_heads; ++h)
      for (float* rows : {e.k, e.v}) {
        float* head = rows + e.layer * l + e.head * h;
        for (int i = 0; i < e.kept; ++i)
          std::memmove(head + int64_t(e.keep_to + i) * m.head_dim, head + int64_t(keep[i]) * m.head_dim,
                       m.head_dim * sizeof(float));
      }
}

std::vector<const float*> rows_of(const float* x, int n, int width) {
  std::vector<const float*> rows;
  for (int i = 0; i < n; ++i) rows.push_back(x + int64_t(i) * width);
  return rows;
}

}  // namespace

extern "C" {

Pool* jupiter_pool(int threads) { return new Pool(threads); }
void jupiter_pool_use(Pool* pool, int threads) { pool->use(threads); }
void jupiter_pool_free(Pool* pool) { delete pool; }

// Layers begun so far in this process: what a watch looks at, from another thread.
int64_t jupiter_progress() { return passed.load(std::memory_order_relaxed); }

// Bytes of scratch memory for up to `rows` rows seeing at most `keys` keys.
int64_t jupiter_layers_scratch(Pool* pool, const Model* m, int rows, int keys) {
  return Buffers(*m, rows, keys, pool->most_threads(), nullptr).bytes;
}

// Moves the rows to be kept, then passes new ones through `count` layers: x, float [rows][hidden],
// in place; it comes from `tokens` where that is not null. parents: of each entry's rows, one behind
// the other, -1 for none; keep: likewise. `more`: see Pool.
void jupiter_layers(Pool* pool, const Model* m, const Layer* layers, int count,
                    const Entry* entries, int entry_count, const int32_t* parents,
                    const int32_t* keep, const int32_t* tokens, float* x, const float* cosine,
                    const float* sine, int more, void* scratch) {
  const Table table(entries, entry_count, parents);
  const int rows = int(table.rows.size()), threads = pool->threads();
  Call call{pool, *m, Widths(*m), table, cosine, sine, x, rows,
            Buffers(*m, rows, table.keys, threads, scratch)};
  pool->run(
      [&](int thread) {
        const Span mine(rows, thread, threads);
        for (int r = mine.begin; tokens && r < mine.end; ++r)
          std::memcpy(x + int64_t(r) * m->hidden, m->embedding + int64_t(tokens[r]) * m->hidden,
                      m->hidden * sizeof(float));
        const int32_t* kept = keep;
        for (const Entry* e = entries; e < entries + entry_count; kept += e++->kept)
          move_rows(*m, *e, kept, Span(count, thread, threads));
        pool->barrier();
        call.pass(layers, count, thread);
      },
      more);
}

// out = x W^T (+ b): x float [rows][in], out float [rows][w.out].
void jupiter_linear(Pool* pool, const Linear* w, const float* x, int rows, float* out, int more) {
  pool->run(
      [&](int thread) {
        Rounding own(*w, rows);
        const Input in = own.round(*w, [&](int r) { return x + int64_t(r) * w->in; });
        const Span share(w->out / kPair, thread, pool->threads());
        product_into<false>(*w, in, share, own.tile.data(), weights_of(*w, share.begin), out);
      },
      more);
}

// best[row]: the output with the largest value, the first of equal ones; of `outputs` real ones.
void jupiter_best(Pool* pool, const Linear* w, const float* x, int rows, int outputs, int32_t* best,
                  int more) {
  Best found(*w, outputs, pool->threads());
  pool->run(
      [&](int thread) {
        found.look(rows, [&](int r) { return x + int64_t(r) * w->in; }, thread);
      },
      more);
  for (int r = 0; r < rows; ++r) best[r] = found.of(r);
}

// Greedy acceptance of the trees of some sequences (engine/decoding/accept.py, `_follow`), and
// drafting from the node that each ends with where `k` is not 0. x: normed hidden states of all
// nodes. path: of each tree as many places as it has nodes. drafted: [trees][heads][k], or along a
// tree, where that is not null, [trees][inner nodes][k].
void jupiter_judge(Pool* pool, const Linear* lm_head, int vocabulary, const Heads* heads,
                   int head_count, const Along* along, const float* x, const int32_t* sizes, int trees,
                   const int32_t* tokens, const int32_t* parents, int first_nodes, int k,
                   int32_t* path, int32_t* lengths, int32_t* next, int32_t* drafted) {
  Judging judging(*lm_head, vocabulary, pool->threads(), x, sizes, trees, tokens, parents, first_nodes);
  std::vector<const float*> ends;
  Draft draft(*heads, k && !along ? head_count : 0, trees, k, pool->threads());
  std::unique_ptr<DraftAlong> sequential;
  if (k && along) sequential.reset(new DraftAlong(*heads, *along, trees, k, pool->threads()));
  pool->run([&](int thread) {
    judging.run(*pool, thread);
    if (k == 0) return;
    if (thread == 0) {
      ends = judging.ends();
      judging.results(path, lengths, next);
    }
    pool->barrier();
    if (sequential) sequential->run(*pool, thread, ends.data(), next, drafted);
    else draft.run(*pool, thread, ends.data(), next, drafted);
  });
  if (k == 0) judging.results(path, lengths, next);
}

// Drafting alone: ends float [n][hidden], roots [n] -> drafted as above.
void jupiter_draft(Pool* pool, const Heads* heads, int head_count, const Along* along,
                   const float* ends, const int32_t* roots, int n, int k, int32_t* drafted) {
  const auto rows = rows_of(ends, n, heads->hidden);
  if (along) {
    DraftAlong draft(*heads, *along, n, k, pool->threads());
    pool->run([&](int thread) { draft.run(*pool, thread, rows.data(), roots, drafted); });
    return;
  }
  Draft draft(*heads, head_count, n, k, pool->threads());
  pool->run([&](int thread) { draft.run(*pool, thread, rows.data(), roots, drafted); });
}

// One head behind given tokens: ends float [n][hidden], known [n][tokens that it sees] -> [n][k].
void jupiter_guess(Pool* pool, const Heads* heads, int head, const float* ends,
                   const int32_t* known, int n, int k, int32_t* found) {
  const auto rows = rows_of(ends, n, heads->hidden);
  const OneHead one(*heads, head);
  Draft draft(one.heads(), 1, n, k, pool->threads());
  pool->run([&](int thread) { draft.run(*pool, thread, rows.data(), known, found); });
}
}
