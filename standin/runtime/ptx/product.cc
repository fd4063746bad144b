// Products of a warpgroup (wgmma): each warp computes 16 of the 64 rows, when it waits for them.
#include <string.h>

#include "async.h"

namespace standin {
namespace ptx {
namespace {

constexpr int kDepth = 16;

// What a matrix descriptor says: where the tile starts and how its 8×8 cores follow each other.
struct Descriptor {
  uint32_t start, leading, stride, mode;  // mode: 0 plain, 1 to 3: swizzled by 128, 64, 32 bytes
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        mode(static_cast<uint32_t>(bits >> 62)) {}
  uint32_t row_bytes() const { return mode == 0 ? 16 : 256u >> mode; }
  uint32_t swizzled(uint32_t at) const {
    uint32_t bits = mode == 0 ? 0 : 4 - mode;  // 3, 2, 1
    return at ^ ((at >> 7 & ((1u << bits) - 1)) << 4);
  }
};

// Calls `f(mn, k, offset)` for each 16 bytes of rows (or columns) `first` to `first + count - 1`: eight
// elements along k, or, transposed, along the rows.
template <class F>
void each_chunk(uint64_t bits, bool transposed, uint32_t first, uint32_t count, F f) {
  Descriptor d(bits);
  uint32_t row = d.row_bytes();
  if (!transposed) {
    for (uint32_t mn = first; mn < first + count; ++mn) {
      for (uint32_t k = 0; k < kDepth; k += 8) {
        uint32_t at = d.start + mn / 8 * d.stride + mn % 8 * row + (d.mode ? 2 * k : k / 8 * d.leading);
        f(mn, k, d.swizzled(at));
      }
    }
    return;
  }
  uint32_t across = row / 2;  // elements side by side in a core's row
  for (uint32_t k = 0; k < kDepth; ++k) {
    for (uint32_t mn = first; mn < first + count; mn += 8) {
      uint32_t at = d.start + k % 8 * row;
      at += d.mode ? mn / across * d.leading + mn % across * 2 + k / 8 * d.stride
                   : mn / 8 * d.stride + k / 8 * d.leading;
      f(mn, k, d.swizzled(at));
    }
  }
}

struct Shape {
  uint32_t columns, accumulators;
  bool a_in_registers, a_transposed, b_transposed;
  explicit Shape(const Instruction& i)
      : columns(2 * i.written), accumulators(i.written), a_in_registers(i.read == i.written + 6) {
    // scale-a, scale-b, then the transpositions of those operands that are in memory.
    a_transposed = !a_in_registers && i.literals[2];
    b_transposed = i.literals[a_in_registers ? 2 : 3] != 0;
  }
};

[[noreturn]] void fail(WarpState& w, const Instruction& i, const std::string& what) {
  w.block->become(w.index * kLanes);
  w.block->fail(kLaunchFailed, format("warp %u: %s, at %s", w.index, what.c_str(), place(i.site).c_str()));
}

uint64_t uniform(WarpState& w, const Instruction& i, uint32_t where) {
  const uint64_t* lanes = w.at<uint64_t>(where);
  for (int l = 1; l < 32; ++l) {
    if (lanes[l] != lanes[0]) fail(w, i, "the lanes give different descriptors of a matrix");
  }
  if (lanes[0] >> 49 & 7) fail(w, i, "a descriptor with a base offset, which the stand-in does not know");
  return lanes[0];
}

void start(WarpState& w, const Instruction& i) {
  WarpProducts& all = w.products;
  Shape shape(i);
  if (i.literals[0] != 1 || i.literals[1] != 1)
    fail(w, i, "a product of negated operands, which the stand-in does not know");
  Product p{};
  p.instruction = &i;
  p.group = all.group;
  p.time = ++all.started;
  if (all.fences == 0) fail(w, i, "the warp's first product has no wgmma.fence before it");
  // Accumulators, and operands in registers.
  for (uint32_t r = 0; r < shape.accumulators + (shape.a_in_registers ? 4 : 0); ++r) {
    uint32_t which = i.s[r] / 128;
    if (all.written[which] == all.fences + 1)
      fail(w, i,
           format("a product uses a register that was written after the last wgmma.fence (operand %u)", r));
    if (r < shape.accumulators && all.busy[which] && all.busy[which] != i.d[0] + 1)
      fail(w, i, "a product's sum is in registers of another one that is under way");
  }
  uint32_t next = shape.accumulators;
  if (shape.a_in_registers) {
    for (int r = 0; r < 4; ++r) memcpy(p.registers[r], w.at<uint32_t>(i.s[next++]), sizeof p.registers[r]);
  } else {
    p.a = uniform(w, i, i.s[next++]);
  }
  p.b = uniform(w, i, i.s[next++]);
  uint32_t accumulates = w.predicate(i.s[next]);
  if (accumulates != 0 && accumulates != kAllLanes) fail(w, i, "the lanes disagree whether a product adds");
  p.accumulates = accumulates != 0;

  w.block->become(w.index * kLanes);
  uint32_t agent = w.block->agent(Agent::product, w.index);
  auto check = [&](uint32_t, uint32_t, uint32_t at) {
    w.block->access_as(agent, p.time, at, 16, false, i.site);
  };
  // Of a, too, all 64 rows: which warp reads which is not documented.
  if (!shape.a_in_registers) each_chunk(p.a, shape.a_transposed, 0, 64, check);
  each_chunk(p.b, shape.b_transposed, 0, shape.columns, check);

  for (uint32_t r = 0; r < shape.accumulators + (shape.a_in_registers ? 4 : 0); ++r)
    all.busy[i.s[r] / 128] = i.d[0] + 1;
  all.pending.push_back(p);
}

float number(uint16_t bits) {
  return __builtin_bit_cast(float, uint32_t{bits} << 16);
}

void compute(WarpState& w, const Product& p) {
  const Instruction& i = *p.instruction;
  Shape shape(i);
  float a[16][kDepth], b[kDepth][256];
  uint16_t chunk[8];
  auto fetch = [&](uint32_t at) { memcpy(chunk, w.block->shared + at, sizeof chunk); };
  uint32_t first = 16 * (w.index % 4);
  if (shape.a_in_registers) {
    for (uint32_t l = 0; l < 32; ++l) {
      for (uint32_t r = 0; r < 4; ++r) {
        uint32_t row = l / 4 + 8 * (r & 1), k = 2 * (l % 4) + 8 * (r >> 1);
        a[row][k] = number(static_cast<uint16_t>(p.registers[r][l]));
        a[row][k + 1] = number(static_cast<uint16_t>(p.registers[r][l] >> 16));
      }
    }
  } else {
    each_chunk(p.a, shape.a_transposed, first, 16, [&](uint32_t mn, uint32_t k, uint32_t at) {
      fetch(at);
      for (uint32_t e = 0; e < 8; ++e)
        (shape.a_transposed ? a[mn - first + e][k] : a[mn - first][k + e]) = number(chunk[e]);
    });
  }
  each_chunk(p.b, shape.b_transposed, 0, shape.columns, [&](uint32_t mn, uint32_t k, uint32_t at) {
    fetch(at);
    for (uint32_t e = 0; e < 8; ++e) (shape.b_transposed ? b[k][mn + e] : b[k + e][mn]) = number(chunk[e]);
  });
  for (uint32_t row = 0; row < 16; ++row) {
    float sum[256] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (uint32_t n = 0; n < shape.columns; ++n) sum[n] += a[row][k] * b[k][n];
    }
    for (uint32_t n = 0; n < shape.columns; ++n) {
      uint32_t lane = row % 8 * 4 + n % 8 / 2, which = n / 8 * 4 + row / 8 * 2 + n % 2;
      float& d = w.at<float>(i.d[which])[lane];
      d = (p.accumulates ? d : 0) + sum[n];
    }
  }
}

void fence(WarpState& w, const Instruction&) {
  ++w.products.fences;
}
void commit(WarpState& w, const Instruction&) {
  ++w.products.group;
}
// Of the warp's groups, at most the newest `literal` may still be under way.
void wait(WarpState& w, const Instruction& i) {
  WarpProducts& all = w.products;
  uint32_t done = 0;
  while (!all.pending.empty() &&
         all.pending.front().group + static_cast<uint32_t>(i.literals[0]) < all.group) {
    compute(w, all.pending.front());
    done = all.pending.front().time;
    all.pending.pop_front();
  }
  if (!done) return;
  std::fill(all.busy.begin(), all.busy.end(), 0u);
  for (const Product& p : all.pending) {
    const Instruction& product = *p.instruction;
    Shape shape(product);
    for (uint32_t r = 0; r < shape.accumulators + (shape.a_in_registers ? 4 : 0); ++r)
      all.busy[product.s[r] / 128] = product.d[0] + 1;
  }
  uint32_t agent = w.block->agent(Agent::product, w.index);
  for (uint32_t l = 0; l < kLanes; ++l) w.block->learn(w.index * kLanes + l, agent, done);
}

// A form for every width: the sum in n / 2 registers, a by its descriptor or in registers, b by its
// descriptor.
class ProductForms {
 public:
  ProductForms() {
    auto other = [&](const char* name, const char* operands, Step step) {
      forms.push_back({name, operands, step, Flow::collective, Collective::other, name});
    };
    other("wgmma.fence.sync.aligned", "", fence);
    other("wgmma.commit_group.sync.aligned", "", commit);
    other("wgmma.wait_group.sync.aligned", "i", wait);
    for (int n = 8; n <= 256; n += 8) {
      std::string sum = std::to_string(n / 2) + "A ";
      std::string name = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32.bf16.bf16";
      for (const char* rest : {"l l p i i i i", "4w l p i i i"}) {
        names_.push_back(name);
        const char* kept = names_.back().c_str();
        names_.push_back(sum + rest);
        forms.push_back({kept, names_.back().c_str(), start, Flow::collective, Collective::other, "wgmma"});
      }
    }
  }
  std::vector<Form> forms;

 private:
  std::deque<std::string> names_;
};

}  // namespace

Forms product_forms() {
  static const ProductForms* all = new ProductForms;
  return {all->forms.data(), all->forms.size()};
}

void watch_registers(WarpState& w, const Instruction& i) {
  WarpProducts& all = w.products;
  if (i.step == start) return;
  if (!all.pending.empty()) {
    for (const auto& [list, count, does] :
         {std::tuple{i.s, i.read, "reads"}, std::tuple{i.d, i.written, "writes"}}) {
      for (uint32_t k = 0; k < count; ++k) {
        if (list[k] == kNoRegister || !all.busy[list[k] / 128]) continue;
        fail(w, i,
             format(
                 "register in flight: an instruction %s a register of a product before its wgmma.wait_group",
                 does));
      }
    }
  }
  for (uint32_t k = 0; k < i.written; ++k) {
    if (i.d[k] != kNoRegister) all.written[i.d[k] / 128] = all.fences + 1;
  }
}

}  // namespace ptx
}  // namespace standin
