// What the lanes of a warp do together. The interpreter calls these when all 32 have arrived.
#include "warp.h"

namespace standin {
namespace ptx {
namespace {

// The last operand of a collective: the lanes that take part.
void need_all(WarpState& w, const Instruction& i, uint32_t lanes) {
  if (lanes == kAllLanes) return;
  w.block->become(w.index * kLanes);
  w.block->fail(kLaunchFailed, format("%s at %s names the lanes %08x: kernels use whole warps",
                                      i.form->called, place(i.site).c_str(), lanes));
}

enum class Shuffle : uint8_t { butterfly, index, up, down };

// Lane l gets the value of lane j, which c (a bound, and bits that stay) may replace by itself.
template <Shuffle how>
void shuffle(WarpState& w, const Instruction& i) {
  const uint32_t *value = w.at<uint32_t>(i.s[0]), *b = w.at<uint32_t>(i.s[1]), *c = w.at<uint32_t>(i.s[2]);
  need_all(w, i, w.at<uint32_t>(i.s[3])[0]);
  uint32_t r[32], inside = 0;
  for (uint32_t l = 0; l < 32; ++l) {
    uint32_t by = b[l] & 31, bound = c[l] & 31, fixed = c[l] >> 8 & 31;
    uint32_t most = (l & fixed) | (bound & ~fixed), least = l & fixed;
    int32_t lane = static_cast<int32_t>(l), step = static_cast<int32_t>(by), from = lane;
    bool valid = true;
    switch (how) {
      case Shuffle::butterfly:
        from = lane ^ step;
        valid = from <= static_cast<int32_t>(most);
        break;
      case Shuffle::index:
        from = static_cast<int32_t>(least | (by & ~fixed));
        valid = from <= static_cast<int32_t>(most);
        break;
      case Shuffle::up:
        from = lane - step;
        valid = from >= static_cast<int32_t>(most);
        break;
      case Shuffle::down:
        from = lane + step;
        valid = from <= static_cast<int32_t>(most);
        break;
    }
    r[l] = value[valid ? from : lane];
    inside |= uint32_t{valid} << l;
  }
  keep(w, i.d[0], r);
  if (i.d[1] != kNoRegister) w.set_predicate(i.d[1], inside);
}

void ballot(WarpState& w, const Instruction& i) {
  need_all(w, i, w.at<uint32_t>(i.s[1])[0]);
  uint32_t r[32];
  for (uint32_t& lane : r) lane = w.predicate(i.s[0]);
  keep(w, i.d[0], r);
}
template <bool all>
void vote(WarpState& w, const Instruction& i) {
  need_all(w, i, w.at<uint32_t>(i.s[1])[0]);
  uint32_t votes = w.predicate(i.s[0]);
  w.set_predicate(i.d[0], (all ? votes == kAllLanes : votes != 0) ? kAllLanes : 0);
}
void sync_warp(WarpState& w, const Instruction& i) {
  need_all(w, i, w.at<uint32_t>(i.s[0])[0]);
}

// Row i of matrix m lies where lane 8 m + i says.
template <int n, bool transposed>
void load_matrices(WarpState& w, const Instruction& i) {
  uint32_t r[n][32];
  const uint32_t* address = w.at<uint32_t>(i.s[0]);
  for (uint32_t m = 0; m < n; ++m) {
    const uint8_t* rows[8];
    for (uint32_t row = 0; row < 8; ++row) {
      uint32_t lane = 8 * m + row;
      int64_t offset = int64_t{static_cast<int32_t>(address[lane])} + i.offset[0];
      rows[row] = w.block->shared + offset;
      w.block->become(w.index * kLanes + lane);
      w.block->check_matrix_row(rows[row], i.site);
    }
    for (uint32_t l = 0; l < 32; ++l) {
      uint32_t g = l / 4, q = l % 4;
      if (transposed) {
        uint16_t low, high;
        memcpy(&low, rows[2 * q] + 2 * g, 2);
        memcpy(&high, rows[2 * q + 1] + 2 * g, 2);
        r[m][l] = low | uint32_t{high} << 16;
      } else {
        memcpy(&r[m][l], rows[g] + 4 * q, 4);
      }
    }
  }
  for (int m = 0; m < n; ++m) keep(w, i.d[m], r[m]);
}

// The inverse: row i of matrix m is written where lane 8 m + i says.
template <int n, bool transposed>
void store_matrices(WarpState& w, const Instruction& i) {
  const uint32_t* address = w.at<uint32_t>(i.s[0]);
  for (uint32_t m = 0; m < n; ++m) {
    uint16_t rows[8][8];
    for (uint32_t l = 0; l < 32; ++l) {
      uint32_t g = l / 4, q = l % 4, pair = w.at<uint32_t>(i.s[1 + m])[l];
      (transposed ? rows[2 * q][g] : rows[g][2 * q]) = static_cast<uint16_t>(pair);
      (transposed ? rows[2 * q + 1][g] : rows[g][2 * q + 1]) = static_cast<uint16_t>(pair >> 16);
    }
    for (uint32_t row = 0; row < 8; ++row) {
      uint32_t lane = 8 * m + row;
      uint8_t* to = w.block->shared + int64_t{static_cast<int32_t>(address[lane])} + i.offset[0];
      w.block->become(w.index * kLanes + lane);
      if (w.block->watching) w.block->access(reinterpret_cast<uint64_t>(to), 16, true, nullptr, i.site);
      memcpy(to, rows[row], sizeof rows[row]);
    }
  }
}

// One lane of the warp is told that it is the one; its number is the same everywhere.
void elect(WarpState& w, const Instruction& i) {
  need_all(w, i, w.at<uint32_t>(i.s[0])[0]);
  uint32_t r[32] = {};
  keep(w, i.d[0], r);
  if (i.d[1] != kNoRegister) w.set_predicate(i.d[1], 1);
}

// The products are added to d one after the other, each rounded to f32; a GPU sums in an order of its own.
void multiply_matrices(WarpState& w, const Instruction& i) {
  float a[16][16], b[16][8], d[16][8];
  auto low = [](uint32_t v) { return __builtin_bit_cast(float, v << 16); };
  auto high = [](uint32_t v) { return __builtin_bit_cast(float, v & 0xffff0000u); };
  for (uint32_t l = 0; l < 32; ++l) {
    uint32_t g = l / 4, q = l % 4;
    for (uint32_t r = 0; r < 4; ++r) {
      uint32_t pair = w.at<uint32_t>(i.s[r])[l];
      a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1)] = low(pair);
      a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1) + 1] = high(pair);
      d[g + 8 * (r >> 1)][2 * q + (r & 1)] = w.at<float>(i.s[6 + r])[l];
    }
    for (uint32_t r = 0; r < 2; ++r) {
      uint32_t pair = w.at<uint32_t>(i.s[4 + r])[l];
      b[2 * q + 8 * r][g] = low(pair);
      b[2 * q + 8 * r + 1][g] = high(pair);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (uint32_t r = 0; r < 4; ++r) {
    float* to = w.at<float>(i.d[r]);
    for (uint32_t l = 0; l < 32; ++l) to[l] = d[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)];
  }
}

void nothing(WarpState&, const Instruction&) {}

#define SHUFFLE(name, how, called)                                                  \
  {"shfl.sync." name ".b32",                                                        \
   "Q w w w w",                                                                     \
   shuffle<how>,                                                                    \
   Flow::collective,                                                                \
   how == Shuffle::butterfly ? Collective::shuffle_xor : Collective::shuffle_index, \
   called}
#define MATRICES(name, operands, n, transposed) \
  {"ldmatrix.sync.aligned.m8n8." name ".b16",   \
   operands,                                    \
   load_matrices<n, transposed>,                \
   Flow::collective,                            \
   Collective::ldmatrix,                        \
   "ldmatrix"}

#define STORE_MATRICES(name, operands, n, transposed) \
  {"stmatrix.sync.aligned.m8n8." name ".b16",         \
   operands,                                          \
   store_matrices<n, transposed>,                     \
   Flow::collective,                                  \
   Collective::other,                                 \
   "stmatrix"}

const Form kForms[] = {
    {"bra", "t", nothing, Flow::branch},
    {"bra.uni", "t", nothing, Flow::branch},
    {"ret", "", nothing, Flow::exit},
    {"exit", "", nothing, Flow::exit},
    {"bar.sync", "w", nothing, Flow::barrier},
    {"bar.sync", "w w", nothing, Flow::barrier},
    {"barrier.sync", "w", nothing, Flow::barrier},
    {"barrier.sync", "w w", nothing, Flow::barrier},
    {"bar.warp.sync", "w", sync_warp, Flow::collective, Collective::sync, "warp_sync"},
    SHUFFLE("bfly", Shuffle::butterfly, "shfl_xor"),
    SHUFFLE("idx", Shuffle::index, "shfl_idx"),
    SHUFFLE("up", Shuffle::up, "shfl_up"),
    SHUFFLE("down", Shuffle::down, "shfl_down"),
    {"vote.sync.ballot.b32", "W p w", ballot, Flow::collective, Collective::vote, "ballot"},
    {"vote.sync.all.pred", "P p w", vote<true>, Flow::collective, Collective::vote, "vote_all"},
    {"vote.sync.any.pred", "P p w", vote<false>, Flow::collective, Collective::vote, "vote_any"},
    MATRICES("x1.shared", "1W m", 1, false),
    MATRICES("x1.trans.shared", "1W m", 1, true),
    MATRICES("x2.shared", "2W m", 2, false),
    MATRICES("x2.trans.shared", "2W m", 2, true),
    MATRICES("x4.shared", "4W m", 4, false),
    MATRICES("x4.trans.shared", "4W m", 4, true),
    STORE_MATRICES("x1.shared", "m 1w", 1, false),
    STORE_MATRICES("x1.trans.shared", "m 1w", 1, true),
    STORE_MATRICES("x2.shared", "m 2w", 2, false),
    STORE_MATRICES("x2.trans.shared", "m 2w", 2, true),
    STORE_MATRICES("x4.shared", "m 4w", 4, false),
    STORE_MATRICES("x4.trans.shared", "m 4w", 4, true),
    {"elect.sync", "Q w", elect, Flow::collective, Collective::other, "elect"},
    {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "4W 4w 2w 4w", multiply_matrices,
     Flow::collective, Collective::mma, "mma"},
};

}  // namespace

Forms warp_forms() {
  return {kForms, sizeof kForms / sizeof *kForms};
}

const std::vector<const Form*>* find_forms(const std::string& name) {
  static const auto* all = [] {
    auto* table = new std::map<std::string, std::vector<const Form*>>;
    for (Forms forms : {arithmetic_forms(), integer_forms(), conversion_forms(), bulk_forms(),
                        product_forms(), bulk_forms(), product_forms(), memory_forms(), warp_forms()}) {
      for (size_t i = 0; i < forms.count; ++i) (*table)[forms.first[i].name].push_back(&forms.first[i]);
    }
    return table;
  }();
  auto at = all->find(name);
  return at == all->end() ? nullptr : &at->second;
}

}  // namespace ptx
}  // namespace standin
