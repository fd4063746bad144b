// Conversions between types, rounded exactly as their names say.
#include <fenv.h>
#include <math.h>

#include <limits>

#include "warp.h"

namespace standin {
namespace ptx {
namespace {

// ---- bf16 -------------------------------------------------------------------------------------------------

uint32_t nearest_bf16(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
uint32_t cut_bf16(float x) {
  return x != x ? 0x7fffu : __builtin_bit_cast(uint32_t, x) >> 16;
}
// cvt.….bf16x2.f32 d, a, b: a becomes the upper half.
struct PairNearest {
  static uint32_t of(float a, float b) { return nearest_bf16(a) << 16 | nearest_bf16(b); }
};
struct PairCut {
  static uint32_t of(float a, float b) { return cut_bf16(a) << 16 | cut_bf16(b); }
};
struct Nearest16 {
  static uint16_t of(float a) { return static_cast<uint16_t>(nearest_bf16(a)); }
};
struct Cut16 {
  static uint16_t of(float a) { return static_cast<uint16_t>(cut_bf16(a)); }
};
struct From16 {
  static float of(uint16_t a) { return __builtin_bit_cast(float, uint32_t{a} << 16); }
};

// ---- numbers ----------------------------------------------------------------------------------------------

// Integers are cut or extended; integers to floats round to the nearest, as do f64 to f32.
template <class D>
struct To {
  template <class A>
  static D of(A a) {
    return static_cast<D>(a);
  }
};
struct Saturate {
  static float of(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
};

struct ToNearest {
  template <class A>
  static A of(A a) {
    return nearbyint(a);
  }
};
struct ToZero {
  template <class A>
  static A of(A a) {
    return trunc(a);
  }
};
struct Down {
  template <class A>
  static A of(A a) {
    return floor(a);
  }
};
struct Up {
  template <class A>
  static A of(A a) {
    return ceil(a);
  }
};

// A float to an integer: rounded, then the nearest value of the type; a NaN becomes 0.
template <class D, class Round>
struct ToInteger {
  template <class A>
  static D of(A a) {
    A x = Round::of(a);
    constexpr D least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
    if (x != x) return 0;
    if (x <= static_cast<A>(least)) return least;
    if (x >= static_cast<A>(most)) return most;
    return static_cast<D>(x);
  }
};

// The processor's rounding mode decides.
template <class D, class A, int mode>
void rounded(WarpState& w, const Instruction& i) {
  int before = fegetround();
  fesetround(mode);
  Held<D> r[32];
  for (int l = 0; l < 32; ++l) {
    volatile A a = value_of<A>(w.at<Held<A>>(i.s[0])[l]);
    volatile D d = static_cast<D>(a);
    r[l] = bits_of<D>(d);
  }
  fesetround(before);
  keep(w, i.d[0], r);
}

#define INTEGER(to, to_type, to_letter, from, from_type, from_letter) \
  {"cvt." to "." from, to_letter " " from_letter, unary<to_type, from_type, To<to_type>>}
#define FROM_INTEGERS(to, type, letter)                                                                \
  INTEGER(to, type, letter, "u8", uint8_t, "w"), INTEGER(to, type, letter, "s8", int8_t, "w"),         \
      INTEGER(to, type, letter, "u16", uint16_t, "w"), INTEGER(to, type, letter, "s16", int16_t, "w"), \
      INTEGER(to, type, letter, "u32", uint32_t, "w"), INTEGER(to, type, letter, "s32", int32_t, "w"), \
      INTEGER(to, type, letter, "u64", uint64_t, "l"), INTEGER(to, type, letter, "s64", int64_t, "l")
#define FLOAT_TO(mode, round, from, from_type, letter)                                                 \
  {"cvt." mode ".s32." from, "W " letter, unary<int32_t, from_type, ToInteger<int32_t, round>>},       \
      {"cvt." mode ".u32." from, "W " letter, unary<uint32_t, from_type, ToInteger<uint32_t, round>>}, \
      {"cvt." mode ".s64." from, "L " letter, unary<int64_t, from_type, ToInteger<int64_t, round>>}, { \
    "cvt." mode ".u64." from, "L " letter, unary<uint64_t, from_type, ToInteger<uint64_t, round>>      \
  }
#define WHOLE(mode, round)                                                             \
  FLOAT_TO(mode, round, "f32", float, "w"), FLOAT_TO(mode, round, "f64", double, "l"), \
      {"cvt." mode ".f32.f32", "W w", unary<float, float, round>}, {                   \
    "cvt." mode ".f64.f64", "L l", unary<double, double, round>                        \
  }
#define ROUNDED(suffix, mode)                                              \
  {"cvt." suffix ".f32.f64", "W l", rounded<float, double, mode>},         \
      {"cvt." suffix ".f32.u32", "W w", rounded<float, uint32_t, mode>},   \
      {"cvt." suffix ".f32.s32", "W w", rounded<float, int32_t, mode>},    \
      {"cvt." suffix ".f32.u64", "W l", rounded<float, uint64_t, mode>}, { \
    "cvt." suffix ".f32.s64", "W l", rounded<float, int64_t, mode>         \
  }

const Form kForms[] = {
    FROM_INTEGERS("u8", uint8_t, "W"),
    FROM_INTEGERS("s8", int8_t, "W"),
    FROM_INTEGERS("u16", uint16_t, "W"),
    FROM_INTEGERS("s16", int16_t, "W"),
    FROM_INTEGERS("u32", uint32_t, "W"),
    FROM_INTEGERS("s32", int32_t, "W"),
    FROM_INTEGERS("u64", uint64_t, "L"),
    FROM_INTEGERS("s64", int64_t, "L"),
    FROM_INTEGERS("rn.f32", float, "W"),
    FROM_INTEGERS("rn.f64", double, "L"),
    {"cvt.f64.f32", "L w", unary<double, float, To<double>>},
    {"cvt.rn.f32.f64", "W l", unary<float, double, To<float>>},
    {"cvt.sat.f32.f32", "W w", unary<float, float, Saturate>},
    ROUNDED("rz", FE_TOWARDZERO),
    ROUNDED("rm", FE_DOWNWARD),
    ROUNDED("rp", FE_UPWARD),
    WHOLE("rni", ToNearest),
    WHOLE("rzi", ToZero),
    WHOLE("rmi", Down),
    WHOLE("rpi", Up),
    {"cvt.rn.bf16x2.f32", "W w w", binary<uint32_t, float, float, PairNearest>},
    {"cvt.rz.bf16x2.f32", "W w w", binary<uint32_t, float, float, PairCut>},
    {"cvt.rn.bf16.f32", "W w", unary<uint16_t, float, Nearest16>},
    {"cvt.rz.bf16.f32", "W w", unary<uint16_t, float, Cut16>},
    {"cvt.f32.bf16", "W w", unary<float, uint16_t, From16>},
};

}  // namespace

Forms conversion_forms() {
  return {kForms, sizeof kForms / sizeof *kForms};
}

}  // namespace ptx
}  // namespace standin
