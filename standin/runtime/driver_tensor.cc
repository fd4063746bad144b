// Tensor maps: what a bulk copy of a box of a tensor needs to know, in 128 bytes.
#include <string.h>

#include "api.h"
#include "ptx/async.h"

using namespace standin;

namespace {

// CUtensorMapDataType: bytes of an element.
uint32_t bytes_of_type(int type) {
  switch (type) {
    case 0: return 1;  // u8
    case 1:
    case 6:
    case 9: return 2;  // u16, f16, bf16
    case 2:
    case 3:
    case 7:
    case 10:
    case 11:
    case 12: return 4;  // u32, s32, f32, and f32 cut or flushed
    case 4:
    case 5:
    case 8: return 8;  // u64, s64, f64
    default: return 0;
  }
}

}  // namespace

// Refuses what the driver's manual says it refuses. Elements lie one after the other (strides of 1), nothing
// is interleaved.
API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* size,
                           const uint64_t* strides, const unsigned* box, const unsigned* steps,
                           int interleave, int swizzle, int promotion, int outside) {
  ENTER_INITIALIZED;
  (void)promotion;
  uint64_t address = reinterpret_cast<uint64_t>(base);
  uint32_t element = bytes_of_type(type);
  if (!map || reinterpret_cast<uint64_t>(map) % 64 || !element || rank < 1 || rank > 5 || !base ||
      address % 16 || !size || (rank > 1 && !strides) || !box || !steps || swizzle < 0 || swizzle > 3)
    return kInvalidValue;
  if (interleave || outside) return kNotSupported;  // zeros outside, as kernels use it
  ptx::TensorMap t{};
  t.magic = ptx::TensorMap::kMagic;
  t.rank = rank;
  t.element = element;
  t.swizzle = static_cast<uint32_t>(swizzle);
  t.base = address;
  for (unsigned d = 0; d < rank; ++d) {
    if (size[d] == 0 || size[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 || steps[d] != 1)
      return kInvalidValue;
    t.size[d] = static_cast<uint32_t>(size[d]);
    t.box[d] = box[d];
    if (d == 0) continue;
    t.stride[d] = strides[d - 1];
    if (t.stride[d] % 16 || t.stride[d] >= uint64_t{1} << 40) return kInvalidValue;
  }
  uint32_t row = box[0] * element, widest = swizzle ? 16u << swizzle : 0;
  if (row % 16 || (widest && row > widest)) return kInvalidValue;
  memset(map, 0, 128);
  memcpy(map, &t, sizeof t);
  return 0;
}
