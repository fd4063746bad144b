// Pixels of the bound batch → the patch matrix: normalised, mixed (mixup, cutmix), cut into patches.
//
// Math      v = (pixel - mean_c) / std_c for u8 (f32 pixels are normalised already)
//           mixup: λ·own + (1 - λ)·partner   cutmix: λ is pixel_lambda outside the box, 1 - pixel_lambda inside
//           erased: zeros or normal draws, in both images before they are mixed
// Tensors   pixels [samples, H, W, 3]   patches [B·T, patch_h·patch_w·3] with `extra` zero rows in front of
//           each sample; within a patch the order is row, column, channel, so a row of a patch is contiguous
//           on both sides.
// Numerics  f32. bf16 output: one fma with 1/std, then one rounding; f32 output divides, as the CPU does.
// Launch    one thread per 8 values of a patch row (one 16-byte store of bf16), 256 threads per block.
// Bytes     per value 1 read (2 where mixed) and 2 written in bf16. Where rows of a patch are multiples of 8
//           values and the image's too (patch 8, 16, 32) pixels come 8 bytes at a time, else byte by byte
//           through L1 (patch 14).
// Source    Dosovitskiy et al. 2021 (patches); Zhang et al. 2018 (mixup); Yun et al. 2019 (cutmix).
#include "philox.cuh"

struct PatchShape {
  u32 image_height, image_width;
  u32 patch_height, patch_width;
  u32 grid_height, grid_width;  // patches down and across
  u32 extra;                    // zero rows in front of each sample
};
struct Normalise {
  float mean[3], std[3];
};

// Eight values of a patch, starting with value `first`: where they lie in the image.
struct PatchRun {
  u32 corner;       // offset of the patch's first value
  u32 pitch, run;   // values of an image row, of a patch row
  u32 y, x;         // patch row of the first value, and its place in there
  bool contiguous;  // the eight lie side by side
};

__device__ __forceinline__ void step_run(const PatchRun& at, u32& y, u32& x) {
  if (++x == at.run) x = 0, ++y;
}

// The eight raw values; those past the `n` valid ones are 0.
__device__ __forceinline__ void read_pixels(const u8* image, const PatchRun& at, u32 n, float (&v)[VEC]) {
  if (at.contiguous && n == VEC && at.pitch % VEC == 0) {
    vec2 b = ld8(image + at.corner + at.y * at.pitch + at.x);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      v[i] = static_cast<float>(b.x >> (8 * i) & 255u);
      v[i + 4] = static_cast<float>(b.y >> (8 * i) & 255u);
    }
    return;
  }
  u32 y = at.y, x = at.x;
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) {
    v[i] = i < n ? static_cast<float>(image[at.corner + y * at.pitch + x]) : 0.0f;
    step_run(at, y, x);
  }
}
__device__ __forceinline__ void read_pixels(const float* image, const PatchRun& at, u32 n, float (&v)[VEC]) {
  if (at.contiguous) {
    load8(image + at.corner + at.y * at.pitch + at.x, n, v);
    return;
  }
  u32 y = at.y, x = at.x;
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) {
    v[i] = i < n ? image[at.corner + y * at.pitch + x] : 0.0f;
    step_run(at, y, x);
  }
}

template <typename T>
__device__ __forceinline__ float normalised(float pixel, float mean, float std);
template <>
__device__ __forceinline__ float normalised<float>(float pixel, float mean, float std) {
  return (pixel - mean) / std;
}
template <>
__device__ __forceinline__ float normalised<bf16>(float pixel, float mean, float std) {
  float scale = 1.0f / std;
  return fmaf(pixel, scale, -mean * scale);
}

// Channel c mod 3, by selects: indexed arguments would be copied to local memory.
__device__ __forceinline__ float from(u32 c, const float (&v)[3]) {
  return c % 3 == 0 ? v[0] : c % 3 == 1 ? v[1] : v[2];
}

// Values starting at offset `x` of a patch row: channel x % 3 first.
template <typename T>
__device__ __forceinline__ void normalise8(const Normalise& k, u32 x, float (&v)[VEC]) {
  u32 c = x % 3;
  float mean[3] = {from(c, k.mean), from(c + 1, k.mean), from(c + 2, k.mean)};
  float std[3] = {from(c, k.std), from(c + 1, k.std), from(c + 2, k.std)};
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) v[i] = normalised<T>(v[i], mean[i % 3], std[i % 3]);
}

template <typename T>
__device__ __forceinline__ void fetch_values(const u8* image, const PatchRun& at, u32 n, const Normalise& k,
                                             float (&v)[VEC]) {
  read_pixels(image, at, n, v);
  normalise8<T>(k, at.x, v);  // a patch row is a multiple of 3 values: the channels go on in the next one
}
template <typename T>
__device__ __forceinline__ void fetch_values(const float* image, const PatchRun& at, u32 n, const Normalise&,
                                             float (&v)[VEC]) {
  read_pixels(image, at, n, v);
}

// cos(2π·t/2^24), t below 2^24. The nearest quarter turn is removed as an integer; the rest is at most π/4 and goes
// through the polynomials of Cephes (Moshier 1989). The total error is at most 2e-7. cosf and sinf accept any argument,
// and reserve a stack for the largest.
__device__ __forceinline__ float cosine_of_turn(u32 t) {
  constexpr u32 QUARTER = 1u << 22;
  const u32 quarter = (t + QUARTER / 2) / QUARTER;
  const float x = static_cast<float>(static_cast<i32>(t - quarter * QUARTER)) * (6.2831853f / 16777216.0f);
  const float z = x * x;
  const float cosine =
      fmaf(z * z, fmaf(z, fmaf(z, 2.4433157e-5f, -1.3887316e-3f), 4.1666646e-2f), fmaf(-0.5f, z, 1.0f));
  const float sine = fmaf(x * z, fmaf(z, fmaf(z, -1.9515296e-4f, 8.3321609e-3f), -1.6666655e-1f), x);
  const float value = quarter & 1 ? sine : cosine;
  return ((quarter + 1) & 2) != 0 ? -value : value;
}
// The sine: the cosine, three quarter turns further.
__device__ __forceinline__ float sine_of_turn(u32 t) {
  return cosine_of_turn((t + (3u << 22)) & 0xffffffu);
}

// Channel c of the colour at (dy, dx) of an erased box, with the same draws as `Erase::colour` on the CPU: Box and
// Muller (1958) on a Philox block; red and green from its first two words, blue from the others.
__device__ __forceinline__ float erased(const Erase& erase, u32 dy, u32 dx, u32 c) {
  if (erase.mode == 0) return 0.0f;
  constexpr u32 ERASE_KEY = 0x45726173;
  u32 words[4] = {erase.mode == 1 ? 0 : dy, erase.mode == 1 ? 0 : dx, 0, 0};
  philox(words, erase.seed, ERASE_KEY);
  constexpr float UNIT = 1.0f / 16777216.0f;
  float u = static_cast<float>((c < 2 ? words[0] : words[2]) >> 8) * UNIT;
  u32 turn = (c < 2 ? words[1] : words[3]) >> 8;
  return sqrtf(-2.0f * logf(1.0f - u)) * (c == 1 ? sine_of_turn(turn) : cosine_of_turn(turn));
}

__device__ __forceinline__ bool contains(const MixBox& box, u32 y, u32 x) {
  return y >= box.y0 && y < box.y1 && x >= box.x0 && x < box.x1;
}

// Replaces the erased values by the drawn ones. (y0, x0) is the patch's corner.
__device__ __forceinline__ void erase8(const Erase& erase, u32 y0, u32 x0, const PatchRun& place, float (&v)[VEC]) {
  if (erase.cut.y0 >= erase.cut.y1 || erase.cut.x0 >= erase.cut.x1) return;
  u32 y = place.y, x = place.x;
#pragma unroll
  for (u32 i = 0; i < VEC; ++i) {
    u32 down = y0 + y, across = x0 + x / 3;
    if (contains(erase.cut, down, across)) {
      v[i] = erased(erase, down - erase.cut.y0, across - erase.cut.x0, x % 3);
    }
    step_run(place, y, x);
  }
}

template <typename T>
struct PatchifyArgs {
  const StepParams* params;
  PatchShape shape;
  Normalise normalise;
  u32 first;        // index in the slot of the micro-batch's first sample
  View<T> patches;  // [B·T, patch values]
};

template <typename Pixel, typename T>
__device__ __forceinline__ void patchify(const PatchifyArgs<T>& args) {
  const PatchShape& shape = args.shape;
  u32 run = shape.patch_width * 3;
  Place at = place_of_thread(args.patches.rows, shape.patch_height * run);
  if (at.n == 0) return;
  u32 tokens = shape.extra + shape.grid_height * shape.grid_width;
  u32 sample = at.row / tokens, token = at.row % tokens;

  float v[VEC] = {};
  if (token >= shape.extra) {
    SlotView slot = args.params->slot;
    u32 patch = token - shape.extra;
    u32 y0 = patch / shape.grid_width * shape.patch_height, x0 = patch % shape.grid_width * shape.patch_width;
    u32 pitch = shape.image_width * 3;
    PatchRun place = {y0 * pitch + x0 * 3, pitch, run, at.column / run, at.column % run, run % VEC == 0};
    const Pixel* pixels = static_cast<const Pixel*>(slot.pixels);
    u64 image = static_cast<u64>(shape.image_height) * pitch;
    sample += args.first;
    fetch_values<T>(pixels + sample * image, place, at.n, args.normalise, v);
    erase8(slot.erase[sample], y0, x0, place, v);

    MixBox box = slot.boxes[sample];
    bool cut = box.y0 < box.y1 && box.x0 < box.x1;
    float lambda = cut ? slot.pixel_lambda[sample] : slot.lambda[sample];
    if (cut || lambda != 1.0f) {
      float other[VEC];
      u32 partner = slot.partner[sample];
      fetch_values<T>(pixels + partner * image, place, at.n, args.normalise, other);
      erase8(slot.erase[partner], y0, x0, place, other);
      u32 y = place.y, x = place.x;
#pragma unroll
      for (u32 i = 0; i < VEC; ++i) {
        bool inside = cut && contains(box, y0 + y, x0 + x / 3);
        float own = inside ? 1.0f - lambda : lambda;
        // If one of the two has no weight, nothing is added: the other stays bit-identical.
        v[i] = own == 1.0f ? v[i] : own == 0.0f ? other[i] : own * v[i] + (1.0f - own) * other[i];
        step_run(place, y, x);
      }
    }
  }
  store8(at_place(args.patches, at), at.n, v);
}

#define PATCHIFY(name, Pixel, T)                    \
  HOT_KERNEL(name, 256, 4)(ARGS(PatchifyArgs<T>)) { \
    patchify<Pixel, T>(args);                       \
  }

PATCHIFY(patchify_u8_bf16, u8, bf16)
PATCHIFY(patchify_u8_f32, u8, float)
PATCHIFY(patchify_f32_bf16, float, bf16)
PATCHIFY(patchify_f32_f32, float, float)
