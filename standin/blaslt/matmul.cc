#include "matmul.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../runtime/launch.h"
#include "../runtime/truncate.h"

namespace standin {
namespace {

constexpr uint64_t kRows = 16, kColumns = 4;  // a tile of D in registers

float from_bf16(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}
uint16_t to_bf16(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float load(Type type, const void* p, uint64_t at) {
  return type == Type::f32 ? static_cast<const float*>(p)[at]
                           : from_bf16(static_cast<const uint16_t*>(p)[at]);
}
void store(Type type, void* p, uint64_t at, float value) {
  if (type == Type::f32) static_cast<float*>(p)[at] = value;
  else static_cast<uint16_t*>(p)[at] = to_bf16(value);
}
float rounded(Type type, float x) {
  return type == Type::f32 ? x : from_bf16(to_bf16(x));
}
float to_tf32(float x, bool truncate) {
  return __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, x) + (truncate ? 0 : 0x1000)) & ~0x1fffu);
}

// A matrix as f32 in strips of `width` rows (of columns for B), with k as the slowest index within a strip; short
// strips end in zeros. `stride` steps along the strip's width, `k_stride` along k.
std::vector<float> packed(const Matmul& p, const void* from, uint64_t extent, uint64_t width, uint64_t stride,
                          uint64_t k_stride) {
  uint64_t strips = (extent + width - 1) / width;
  std::vector<float> out(strips * width * p.k);
  std::atomic<uint64_t> next{0};
  uint32_t workers = extent * p.k > 1 << 14 ? host_threads() : 1;
  parallel(workers, [&](uint32_t) {
    for (uint64_t s; (s = next++) < strips;) {
      float* to = &out[s * width * p.k];
      uint64_t here = extent - s * width < width ? extent - s * width : width;
      for (uint64_t i = 0; i < here; ++i) {
        uint64_t base = (s * width + i) * stride;
        for (uint64_t k = 0; k < p.k; ++k) {
          float v = load(p.input, from, base + k * k_stride);
          to[k * width + i] = p.tf32 ? to_tf32(v, p.truncate) : v;
        }
      }
    }
  });
  return out;
}

// One tile: acc[j][i] = sum over k of a[k][i] · b[k][j].
__attribute__((target_clones("avx512f", "avx2", "default"))) void tile(const float* a, const float* b,
                                                                       uint64_t k, float* result) {
  float acc[kColumns][kRows] = {};
  for (uint64_t at = 0; at < k; ++at) {
    for (uint64_t j = 0; j < kColumns; ++j) {
      for (uint64_t i = 0; i < kRows; ++i) acc[j][i] += a[at * kRows + i] * b[at * kColumns + j];
    }
  }
  memcpy(result, acc, sizeof acc);
}

// The same on tensor cores that drop what does not fit.
void truncating_tile(const float* a, const float* b, uint64_t k, float* result) {
  for (uint64_t j = 0; j < kColumns; ++j) {
    for (uint64_t i = 0; i < kRows; ++i) {
      float sum = 0;
      for (uint64_t at = 0; at < k; at += kTruncatedBlock) {
        double products[kTruncatedBlock];
        uint64_t count = std::min<uint64_t>(kTruncatedBlock, k - at);
        for (uint64_t t = 0; t < count; ++t)
          products[t] = double{a[(at + t) * kRows + i]} * b[(at + t) * kColumns + j];
        sum = truncated_sum(sum, products, count);
      }
      result[j * kRows + i] = sum;
    }
  }
}

// The tanh form of GELU and its derivative: Hendrycks and Gimpel 2016, arXiv:1606.08415.
constexpr float kScale = 0.7978845608028654f, kCube = 0.044715f;
float gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(kScale * (x + kCube * x * x * x)));
}
float gelu_slope(float x) {
  float t = tanhf(kScale * (x + kCube * x * x * x));
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kScale * (1.0f + 3.0f * kCube * x * x);
}

}  // namespace

void run_matmul(const Matmul& p) {
  uint64_t row_tiles = (p.m + kRows - 1) / kRows, column_tiles = (p.n + kColumns - 1) / kColumns;
  std::vector<float> a = packed(p, p.a, p.m, kRows, p.transpose_a ? p.lda : 1, p.transpose_a ? 1 : p.lda);
  std::vector<float> b = packed(p, p.b, p.n, kColumns, p.transpose_b ? 1 : p.ldb, p.transpose_b ? p.ldb : 1);
  const Epilogue& e = p.epilogue;
  uint32_t workers = p.m * p.n * p.k > 1 << 16 ? host_threads() : 1;

  // A worker computes a row of tiles, so that sums over the columns of D are made by one worker in one order.
  std::atomic<uint64_t> next{0};
  parallel(workers, [&](uint32_t) {
    for (uint64_t rt; (rt = next++) < row_tiles;) {
      uint64_t first_row = rt * kRows, rows = p.m - first_row < kRows ? p.m - first_row : kRows;
      float over_columns[kRows] = {};
      for (uint64_t ct = 0; ct < column_tiles; ++ct) {
        float acc[kColumns][kRows] = {}, part[kColumns][kRows];
        for (uint32_t s = 0; s < p.split; ++s) {
          uint64_t from = p.k * s / p.split, to = std::min(p.k * (s + 1) / p.split, p.sum_to);
          if (from >= to) break;
          auto* multiply = p.truncate ? truncating_tile : tile;
          multiply(&a[(rt * p.k + from) * kRows], &b[(ct * p.k + from) * kColumns], to - from, &part[0][0]);
          for (uint64_t j = 0; j < kColumns; ++j) {
            for (uint64_t i = 0; i < kRows; ++i) {
              float sum = acc[j][i];
              if (p.reduction == Reduction::output_type) sum += rounded(p.output, part[j][i]);
              else if (p.reduction == Reduction::in_place) sum = rounded(p.output, sum + part[j][i]);
              else sum += part[j][i];
              acc[j][i] = sum;
            }
          }
        }
        for (uint64_t j = 0; j < kColumns && ct * kColumns + j < p.n; ++j) {
          uint64_t column = ct * kColumns + j;
          for (uint64_t i = 0; i < rows; ++i) {
            uint64_t row = first_row + i;
            float v = p.alpha * acc[j][i];
            if (p.beta != 0) v += p.beta * load(p.output, p.c, row + column * p.ldc);
            if (e.bias) v += load(p.output, p.bias, row);
            if (e.aux_out) store(p.output, p.aux, row + column * p.ld_aux, v);
            if (e.relu) v = v > 0 ? v : 0;
            if (e.gelu) v = gelu(v);
            if (e.dgelu) v *= gelu_slope(load(p.output, p.aux, row + column * p.ld_aux));
            over_columns[i] += v;
            store(p.output, p.d, row + column * p.ldd, v);
          }
        }
      }
      for (uint64_t i = 0; i < rows; ++i) {
        if (e.bias_gradient) store(p.output, p.bias, first_row + i, over_columns[i]);
        if (e.gradient_a) {
          float sum = 0;
          for (uint64_t k = 0; k < p.k; ++k) sum += a[(rt * p.k + k) * kRows + i];
          store(p.output, p.bias, first_row + i, sum);
        }
      }
    }
  });
  if (e.gradient_b) {
    for (uint64_t j = 0; j < p.n; ++j) {
      float sum = 0;
      for (uint64_t k = 0; k < p.k; ++k) sum += b[(j / kColumns * p.k + k) * kColumns + j % kColumns];
      store(p.output, p.bias, j, sum);
    }
  }
}

}  // namespace standin
