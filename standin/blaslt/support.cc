#include "support.h"

namespace standin {
namespace {

// The cuBLAS of CUDA 11.4, the first with bias gradients, 11.5, 11.6, 11.8, 12.0, 12.2, 12.8 and 13.0.
constexpr uint32_t kFirst = 110502, k11_5 = 110703, k11_6 = 110801, k11_8 = 111103, k12_0 = 120000, k12_2 = 120201,
                   k12_8 = 120803, k13_0 = 130000;

constexpr Attribute kDescription[] = {
    {0, 4, 0, kFirst, kEver, kAny},        // COMPUTE_TYPE, set by cublasLtMatmulDescCreate
    {1, 4, 0, kFirst, kEver, kAny},        // SCALE_TYPE, the same
    {2, 4, 0, kFirst, kEver, kAny},        // POINTER_MODE
    {3, 4, 0, kFirst, kEver, kAny},        // TRANSA
    {4, 4, 0, kFirst, kEver, kAny},        // TRANSB
    {5, 4, 0, kFirst, kEver, 0},           // TRANSC
    {6, 4, 2, kFirst, kEver, 2},           // FILL_MODE: full
    {7, 4, 1, kFirst, kEver, kAny},        // EPILOGUE
    {8, 8, 0, kFirst, kEver, kAny},        // BIAS_POINTER
    {10, 8, 0, kFirst, kEver, kAny},       // BIAS_BATCH_STRIDE: without meaning for one product
    {11, 8, 0, kFirst, kEver, kAny},       // EPILOGUE_AUX_POINTER
    {12, 8, 0, kFirst, kEver, kAny},       // EPILOGUE_AUX_LD
    {13, 8, 0, kFirst, kEver, kAny},       // EPILOGUE_AUX_BATCH_STRIDE
    {14, 8, 0, kFirst, kEver, kAny},       // ALPHA_VECTOR_BATCH_STRIDE
    {15, 4, 0, k11_5, kEver, kAny},        // SM_COUNT_TARGET: a matter of speed
    {17, 8, 0, k11_8, kEver, 0},           // A, B, C, D_SCALE_POINTER, AMAX_D_POINTER: only with FP8
    {18, 8, 0, k11_8, kEver, 0},           //
    {19, 8, 0, k11_8, kEver, 0},           //
    {20, 8, 0, k11_8, kEver, 0},           //
    {21, 8, 0, k11_8, kEver, 0},           //
    {22, 4, -1, k11_8, kEver, kAny},       // EPILOGUE_AUX_DATA_TYPE
    {23, 8, 0, k11_8, kEver, 0},           // EPILOGUE_AUX_SCALE_POINTER, EPILOGUE_AUX_AMAX_POINTER: only with FP8
    {24, 8, 0, k11_8, kEver, 0},           //
    {25, 1, 0, k11_8, kEver, kAny},        // FAST_ACCUM: without meaning but for FP8
    {26, 4, -1, k11_8, kEver, kAny},       // BIAS_DATA_TYPE
    {27, 4, 0, k12_2, k13_0, 0},           // ATOMIC_SYNC_…
    {28, 4, 0, k12_2, k13_0, 0},           //
    {29, 8, 0, k12_2, k13_0, 0},           //
    {30, 8, 0, k12_2, k13_0, 0},           //
    {31, 4, 0, k12_8, kEver, 0},           // A, B, C, D_SCALE_MODE, EPILOGUE_AUX_SCALE_MODE, D_OUT_SCALE_…: only with FP8
    {32, 4, 0, k12_8, kEver, 0},           //
    {33, 4, 0, k12_8, kEver, 0},           //
    {34, 4, 0, k12_8, kEver, 0},           //
    {35, 4, 0, k12_8, kEver, 0},           //
    {36, 8, 0, k12_8, kEver, 0},           //
    {37, 4, 0, k12_8, kEver, 0},           //
};

struct Preferred {
  int number;
  uint32_t bytes;
  uint32_t before;
};
constexpr Preferred kPreferences[] = {
    {0, 4, kEver},   // SEARCH_MODE
    {1, 8, kEver},   // MAX_WORKSPACE_BYTES
    {2, 4, k12_0},   // MATH_MODE_MASK
    {3, 4, kEver},   // REDUCTION_SCHEME_MASK
    {4, 4, k12_0},   // GAUSSIAN_MODE_MASK
    {5, 4, kEver},   // MIN_ALIGNMENT_A, B, C, D_BYTES
    {6, 4, kEver},   //
    {7, 4, kEver},   //
    {8, 4, kEver},   //
    {9, 4, kEver},   // MAX_WAVES_COUNT
    {10, 4, k12_0},  // POINTER_MODE_MASK
    {11, 4, k12_0},  // EPILOGUE_MASK
    {12, 8, kEver},  // IMPL_MASK
};

struct EpilogueRow {
  uint32_t number, since;
  Epilogue parts;
};
constexpr Epilogue parts(bool bias, bool relu, bool gelu, bool aux_out, bool dgelu, bool bias_gradient, bool gradient_a,
                         bool gradient_b) {
  return {bias, relu, gelu, aux_out, dgelu, bias_gradient, gradient_a, gradient_b};
}
constexpr EpilogueRow kEpilogues[] = {
    {1, kFirst, parts(0, 0, 0, 0, 0, 0, 0, 0)},    // DEFAULT
    {2, kFirst, parts(0, 1, 0, 0, 0, 0, 0, 0)},    // RELU
    {4, kFirst, parts(1, 0, 0, 0, 0, 0, 0, 0)},    // BIAS
    {6, kFirst, parts(1, 1, 0, 0, 0, 0, 0, 0)},    // RELU_BIAS
    {32, kFirst, parts(0, 0, 1, 0, 0, 0, 0, 0)},   // GELU
    {36, kFirst, parts(1, 0, 1, 0, 0, 0, 0, 0)},   // GELU_BIAS
    {160, kFirst, parts(0, 0, 1, 1, 0, 0, 0, 0)},  // GELU_AUX
    {164, kFirst, parts(1, 0, 1, 1, 0, 0, 0, 0)},  // GELU_AUX_BIAS
    {192, k11_6, parts(0, 0, 0, 0, 1, 0, 0, 0)},   // DGELU
    {208, kFirst, parts(0, 0, 0, 0, 1, 1, 0, 0)},  // DGELU_BGRAD
    {256, kFirst, parts(0, 0, 0, 0, 0, 0, 1, 0)},  // BGRADA
    {512, kFirst, parts(0, 0, 0, 0, 0, 0, 0, 1)},  // BGRADB
};

constexpr int kF32 = 0, kBf16 = 14;                         // cudaDataType_t
constexpr int kIn32 = 68, kPedantic = 69, kFastTf32 = 77;  // cublasComputeType_t
constexpr Types kTypes[] = {
    {kIn32, kF32, kBf16, kBf16, 80},
    {kPedantic, kF32, kBf16, kBf16, 80},
    {kIn32, kF32, kBf16, kF32, 80},
    {kPedantic, kF32, kBf16, kF32, 80},
    {kIn32, kF32, kF32, kF32, 0},
    {kPedantic, kF32, kF32, kF32, 0},
    {kFastTf32, kF32, kF32, kF32, 0},
};

}  // namespace

uint32_t version_of(uint64_t reported) {
  if (reported >= 100000) return static_cast<uint32_t>(reported);
  uint64_t after_11 = reported < 11000 ? 0 : reported - 11000;
  return static_cast<uint32_t>(110000 + after_11);
}

const Attribute* attribute(int number, uint32_t version) {
  for (const Attribute& a : kDescription) {
    if (a.number == number) return version >= a.since && version < a.before ? &a : nullptr;
  }
  return nullptr;
}

int64_t initial_value(int number) {
  for (const Attribute& a : kDescription) {
    if (a.number == number) return a.initial;
  }
  return 0;
}

uint32_t preference_bytes(int number, uint32_t version) {
  for (const Preferred& p : kPreferences) {
    if (p.number == number) return version < p.before ? p.bytes : 0;
  }
  return 0;
}

bool epilogue_of(uint32_t number, uint32_t version, Epilogue* e) {
  for (const EpilogueRow& row : kEpilogues) {
    if (row.number != number) continue;
    *e = row.parts;
    return version >= row.since;
  }
  return false;
}

const Types* types_of(int compute, int scale, int input, int output) {
  for (const Types& t : kTypes) {
    if (t.compute == compute && t.scale == scale && t.input == input && t.output == output) return &t;
  }
  return nullptr;
}

}  // namespace standin
