// Reductions: f32, f64, bf16 and integers, in the order of ranks. bf16 is rounded after each addition, as on a ring.
#include <string.h>

#include <algorithm>

#include "comm.h"

namespace standin {
namespace {

struct Bf16 {
  uint16_t bits;
  Bf16() = default;
  Bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    bool nan = (u & 0x7fffffff) > 0x7f800000;
    bits = static_cast<uint16_t>(nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};

template <class T, class Wide>
void all(const Segment& shared, int ranks, int op, size_t bytes, char* out) {
  for (size_t i = 0; i < bytes / sizeof(T); ++i) {
    T sum;
    memcpy(&sum, shared.data[0] + i * sizeof(T), sizeof(T));
    for (int r = 1; r < ranks; ++r) {
      T next;
      memcpy(&next, shared.data[r] + i * sizeof(T), sizeof(T));
      Wide a = sum, b = next;
      switch (op) {
        case 1: sum = static_cast<T>(a * b); break;
        case 2: sum = b > a ? next : sum; break;
        case 3: sum = b < a ? next : sum; break;
        default: sum = static_cast<T>(a + b);
      }
    }
    if (op == 4) sum = static_cast<T>(static_cast<Wide>(sum) / static_cast<Wide>(ranks));
    memcpy(out + i * sizeof(T), &sum, sizeof(T));
  }
}

}  // namespace

size_t size_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 0, 4, 8, 2};  // f16 is not known
  return type >= 0 && type < 10 ? sizes[type] : 0;
}

void reduce(const Segment& shared, int ranks, int type, int op, size_t bytes, char* out) {
  switch (type) {
    case 0: return all<int8_t, int>(shared, ranks, op, bytes, out);
    case 1: return all<uint8_t, int>(shared, ranks, op, bytes, out);
    case 2: return all<int32_t, int64_t>(shared, ranks, op, bytes, out);
    case 3: return all<uint32_t, int64_t>(shared, ranks, op, bytes, out);
    case 4: return all<int64_t, int64_t>(shared, ranks, op, bytes, out);
    case 5: return all<uint64_t, uint64_t>(shared, ranks, op, bytes, out);
    case 7: return all<float, float>(shared, ranks, op, bytes, out);
    case 8: return all<double, double>(shared, ranks, op, bytes, out);
    case 9: return all<Bf16, float>(shared, ranks, op, bytes, out);
  }
}

}  // namespace standin
