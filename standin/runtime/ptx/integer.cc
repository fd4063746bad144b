// Integers, bits, comparisons, selections and moves.
#include "warp.h"

namespace standin {
namespace ptx {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

#define OPERATION1(name, expression)     \
  struct name {                          \
    template <class A>                   \
    static auto of(A a) {                \
      return static_cast<A>(expression); \
    }                                    \
  };
#define OPERATION2(name, expression)     \
  struct name {                          \
    template <class A>                   \
    static A of(A a, A b) {              \
      return static_cast<A>(expression); \
    }                                    \
  };
OPERATION2(Add, a + b)
OPERATION2(Subtract, a - b)
OPERATION2(Multiply, a* b)
// By zero: any value; lanes that do not execute may well divide by it.
OPERATION2(Divide, b == 0 ? static_cast<A>(~A{0}) : a / b)
OPERATION2(Remainder, b == 0 ? a : a % b)
OPERATION2(Least, a < b ? a : b)
OPERATION2(Greatest, a > b ? a : b)
OPERATION2(And, a& b)
OPERATION2(Or, a | b)
OPERATION2(Xor, a ^ b)
OPERATION1(Not, ~a)
OPERATION1(Negate, 0 - static_cast<std::make_unsigned_t<A>>(a))
OPERATION1(Absolute,
           a < 0 ? 0 - static_cast<std::make_unsigned_t<A>>(a) : static_cast<std::make_unsigned_t<A>>(a))
OPERATION1(Move, a)

// Signed division of the least value by −1 overflows on the host.
template <class T>
struct SignedDivide {
  static T of(T a, T b) {
    return b == 0 ? T{-1} : b == -1 ? static_cast<T>(0 - static_cast<u64>(a)) : static_cast<T>(a / b);
  }
};
template <class T>
struct SignedRemainder {
  static T of(T a, T b) { return b == 0 ? a : b == -1 ? T{0} : static_cast<T>(a % b); }
};

struct ShiftLeft {
  template <class A>
  static A of(A a, u32 by) {
    return by >= 8 * sizeof(A) ? A{0} : static_cast<A>(a << by);
  }
};
// Fills with the sign where A is signed.
struct ShiftRight {
  template <class A>
  static A of(A a, u32 by) {
    u32 most = 8 * sizeof(A) - 1;
    if (std::is_signed_v<A>) return static_cast<A>(a >> (by > most ? most : by));
    return by > most ? A{0} : static_cast<A>(a >> by);
  }
};
template <class Wide>
struct MultiplyWide {
  template <class A>
  static Wide of(A a, A b) {
    return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b));
  }
};
struct MultiplyHigh {
  static u32 of(u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); }
  static s32 of(s32 a, s32 b) { return static_cast<s32>(s64{a} * b >> 32); }
  static u64 of(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
  static s64 of(s64 a, s64 b) { return static_cast<s64>(static_cast<__int128>(a) * b >> 64); }
};
struct MultiplyAdd {
  template <class A, class C>
  static C of(A a, A b, C c) {
    return static_cast<C>(static_cast<C>(a) * static_cast<C>(b) + c);
  }
};
struct CountOnes {
  template <class A>
  static u32 of(A a) {
    return static_cast<u32>(__builtin_popcountll(a));
  }
};
struct LeadingZeros {
  static u32 of(u32 a) { return a ? static_cast<u32>(__builtin_clz(a)) : 32; }
  static u32 of(u64 a) { return a ? static_cast<u32>(__builtin_clzll(a)) : 64; }
};
struct Reverse {
  template <class A>
  static A of(A a) {
    A r = 0;
    for (size_t b = 0; b < 8 * sizeof(A); ++b)
      r = static_cast<A>(r | (a >> b & 1) << (8 * sizeof(A) - 1 - b));
    return r;
  }
};

// bfi d, a, b, c, n: b with its n bits from bit c on replaced by the low bits of a.
template <class T>
void insert_bits(WarpState& w, const Instruction& i) {
  const T *a = w.at<T>(i.s[0]), *b = w.at<T>(i.s[1]);
  const u32 *from = w.at<u32>(i.s[2]), *count = w.at<u32>(i.s[3]);
  T r[32];
  for (int l = 0; l < 32; ++l) {
    u32 at = from[l] & 255, n = count[l] & 255, width = 8 * sizeof(T);
    T ones = n >= width ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << n) - 1);
    r[l] = at >= width ? b[l] : static_cast<T>((b[l] & ~(ones << at)) | ((a[l] & ones) << at));
  }
  keep(w, i.d[0], r);
}
// bfe d, a, b, n: the n bits of a from bit b on.
void extract_bits(WarpState& w, const Instruction& i) {
  const u32 *a = w.at<u32>(i.s[0]), *from = w.at<u32>(i.s[1]), *count = w.at<u32>(i.s[2]);
  u32 r[32];
  for (int l = 0; l < 32; ++l) {
    u32 at = from[l] & 255, n = count[l] & 255;
    u64 ones = n >= 32 ? ~u64{0} : (u64{1} << n) - 1;
    r[l] = at >= 32 ? 0 : static_cast<u32>((a[l] >> at) & ones);
  }
  keep(w, i.d[0], r);
}
// lop3: bit by bit, the table's entry for the three inputs.
void logic3(WarpState& w, const Instruction& i) {
  const u32 *a = w.at<u32>(i.s[0]), *b = w.at<u32>(i.s[1]), *c = w.at<u32>(i.s[2]);
  u32 r[32];
  for (int l = 0; l < 32; ++l) {
    r[l] = 0;
    for (int entry = 0; entry < 8; ++entry) {
      if (i.literals[0] >> entry & 1)
        r[l] |= (entry & 4 ? a[l] : ~a[l]) & (entry & 2 ? b[l] : ~b[l]) & (entry & 1 ? c[l] : ~c[l]);
    }
  }
  keep(w, i.d[0], r);
}
// prmt: each byte of the result is one of the eight of a and b, or its sign.
void permute_bytes(WarpState& w, const Instruction& i) {
  const u32 *a = w.at<u32>(i.s[0]), *b = w.at<u32>(i.s[1]), *selector = w.at<u32>(i.s[2]);
  u32 r[32];
  for (int l = 0; l < 32; ++l) {
    u64 bytes = a[l] | u64{b[l]} << 32;
    r[l] = 0;
    for (int k = 0; k < 4; ++k) {
      u32 which = selector[l] >> (4 * k) & 15, byte = bytes >> (8 * (which & 7)) & 255;
      if (which & 8) byte = byte & 128 ? 255 : 0;
      r[l] |= byte << (8 * k);
    }
  }
  keep(w, i.d[0], r);
}
// shf: the 64 bits of a (low) and b, shifted by up to 32.
template <bool left>
void funnel_shift(WarpState& w, const Instruction& i) {
  const u32 *a = w.at<u32>(i.s[0]), *b = w.at<u32>(i.s[1]), *by = w.at<u32>(i.s[2]);
  u32 r[32];
  for (int l = 0; l < 32; ++l) {
    u64 both = a[l] | u64{b[l]} << 32;
    r[l] = left ? static_cast<u32>(both << (by[l] & 31) >> 32) : static_cast<u32>(both >> (by[l] & 31));
  }
  keep(w, i.d[0], r);
}

// ---- comparisons ------------------------------------------------------------------------------------------

// With a NaN, those without u are false and those with it are true.
#define COMPARISON(name, expression) \
  struct name {                      \
    template <class A>               \
    static bool of(A a, A b) {       \
      return expression;             \
    }                                \
  };
COMPARISON(Equal, a == b)
COMPARISON(Unequal, a<b || a> b)
COMPARISON(Less, a < b)
COMPARISON(LessEqual, a <= b)
COMPARISON(Greater, a > b)
COMPARISON(GreaterEqual, a >= b)
COMPARISON(EqualOrNan, !(a < b || a > b))
COMPARISON(UnequalOrNan, !(a == b))
COMPARISON(LessOrNan, !(a >= b))
COMPARISON(LessEqualOrNan, !(a > b))
COMPARISON(GreaterOrNan, !(a <= b))
COMPARISON(GreaterEqualOrNan, !(a < b))
COMPARISON(Ordered, a == a && b == b)
COMPARISON(Unordered, a != a || b != b)

template <class A, class F>
u32 compared(WarpState& w, const Instruction& i) {
  const Held<A>*a = w.at<Held<A>>(i.s[0]), *b = w.at<Held<A>>(i.s[1]);
  u32 lanes = 0;
  for (u32 l = 0; l < 32; ++l) lanes |= u32{F::of(value_of<A>(a[l]), value_of<A>(b[l]))} << l;
  return lanes;
}
template <class A, class F>
void compare(WarpState& w, const Instruction& i) {
  w.set_predicate(i.d[0], compared<A, F>(w, i));
}
// setp.lt.and p, a, b, c: with a third predicate.
template <class A, class F, class With>
void compare_with(WarpState& w, const Instruction& i) {
  w.set_predicate(i.d[0], With::of(compared<A, F>(w, i), w.predicate(i.s[2])));
}

template <class T>
void select(WarpState& w, const Instruction& i) {
  const T *a = w.at<T>(i.s[0]), *b = w.at<T>(i.s[1]);
  u32 chosen = w.predicate(i.s[2]);
  T r[32];
  for (int l = 0; l < 32; ++l) r[l] = chosen >> l & 1 ? a[l] : b[l];
  keep(w, i.d[0], r);
}

// ---- predicates, moves ------------------------------------------------------------------------------------

template <class F>
void predicates(WarpState& w, const Instruction& i) {
  w.set_predicate(i.d[0], F::of(w.predicate(i.s[0]), w.predicate(i.s[1])));
}
void not_predicate(WarpState& w, const Instruction& i) {
  w.set_predicate(i.d[0], ~w.predicate(i.s[0]));
}
void move_predicate(WarpState& w, const Instruction& i) {
  w.set_predicate(i.d[0], w.predicate(i.s[0]));
}
template <class T>
void move(WarpState& w, const Instruction& i) {
  if (w.mask == kAllLanes) memmove(w.at<T>(i.d[0]), w.at<T>(i.s[0]), 32 * sizeof(T));
  else unary<T, T, Move>(w, i);
}
template <class Whole, class Part>
void pack(WarpState& w, const Instruction& i) {
  constexpr size_t n = sizeof(Whole) / sizeof(Part);
  Held<Whole> r[32] = {};
  for (size_t k = 0; k < n; ++k) {
    const u32* part = w.at<u32>(i.s[k]);
    for (int l = 0; l < 32; ++l)
      r[l] |= static_cast<Held<Whole>>(static_cast<Held<Whole>>(static_cast<Part>(part[l]))
                                       << (8 * sizeof(Part) * k));
  }
  keep(w, i.d[0], r);
}
template <class Whole, class Part>
void unpack(WarpState& w, const Instruction& i) {
  constexpr size_t n = sizeof(Whole) / sizeof(Part);
  Held<Whole> whole[32];  // a part may be written where the whole is read
  memcpy(whole, w.at<Held<Whole>>(i.s[0]), sizeof whole);
  for (size_t k = 0; k < n; ++k) {
    u32 r[32];
    for (int l = 0; l < 32; ++l) r[l] = static_cast<Part>(whole[l] >> (8 * sizeof(Part) * k));
    keep(w, i.d[k], r);
  }
}

#define TYPE2(name, type, letters, step) {name, letters, binary<type, type, type, step>}
// The signs do not matter.
#define RING(name, step)                                                              \
  TYPE2(name ".s16", u16, "W w w", step), TYPE2(name ".u16", u16, "W w w", step),     \
      TYPE2(name ".s32", u32, "W w w", step), TYPE2(name ".u32", u32, "W w w", step), \
      TYPE2(name ".s64", u64, "L l l", step), TYPE2(name ".u64", u64, "L l l", step)
#define ORDER(name, step)                                                             \
  TYPE2(name ".s16", s16, "W w w", step), TYPE2(name ".u16", u16, "W w w", step),     \
      TYPE2(name ".s32", s32, "W w w", step), TYPE2(name ".u32", u32, "W w w", step), \
      TYPE2(name ".s64", s64, "L l l", step), TYPE2(name ".u64", u64, "L l l", step)
#define BITS(name, step)                                                          \
  TYPE2(name ".b16", u16, "W w w", step), TYPE2(name ".b32", u32, "W w w", step), \
      TYPE2(name ".b64", u64, "L l l", step), {                                   \
    name ".pred", "P p p", predicates<step>                                       \
  }
#define SHIFT(name, type, letters, step) {name, letters, binary<type, type, u32, step>}
#define COMPARE1(test, name, type, letters, step)                                                  \
  {"setp." test "." name, "P " letters " " letters, compare<type, step>},                          \
      {"setp." test ".and." name, "P " letters " " letters " p", compare_with<type, step, And>}, { \
    "setp." test ".or." name, "P " letters " " letters " p", compare_with<type, step, Or>          \
  }
#define COMPARE_ALL(test, step)                                                     \
  COMPARE1(test, "s16", s16, "w", step), COMPARE1(test, "u16", u16, "w", step),     \
      COMPARE1(test, "s32", s32, "w", step), COMPARE1(test, "u32", u32, "w", step), \
      COMPARE1(test, "s64", s64, "l", step), COMPARE1(test, "u64", u64, "l", step), \
      COMPARE1(test, "f32", float, "w", step), COMPARE1(test, "f64", double, "l", step)
#define COMPARE_BITS(test, step)                                                \
  COMPARE1(test, "b16", u16, "w", step), COMPARE1(test, "b32", u32, "w", step), \
      COMPARE1(test, "b64", u64, "l", step)
#define COMPARE_FLOATS(test, step) \
  COMPARE1(test, "f32", float, "w", step), COMPARE1(test, "f64", double, "l", step)
#define SELECT(name, letters, type) {"selp." name, letters, select<type>}
#define MOVE(name, letters, type) {"mov." name, letters, move<type>}

const Form kForms[] = {
    RING("add", Add),
    RING("sub", Subtract),
    RING("mul.lo", Multiply),
    ORDER("min", Least),
    ORDER("max", Greatest),
    TYPE2("mul.hi.u32", u32, "W w w", MultiplyHigh),
    TYPE2("mul.hi.s32", s32, "W w w", MultiplyHigh),
    TYPE2("mul.hi.u64", u64, "L l l", MultiplyHigh),
    TYPE2("mul.hi.s64", s64, "L l l", MultiplyHigh),
    {"mul.wide.u16", "W w w", binary<u32, u16, u16, MultiplyWide<u32>>},
    {"mul.wide.s16", "W w w", binary<s32, s16, s16, MultiplyWide<s32>>},
    {"mul.wide.u32", "L w w", binary<u64, u32, u32, MultiplyWide<u64>>},
    {"mul.wide.s32", "L w w", binary<s64, s32, s32, MultiplyWide<s64>>},
    {"mad.lo.s32", "W w w w", ternary<u32, u32, u32, u32, MultiplyAdd>},
    {"mad.lo.u32", "W w w w", ternary<u32, u32, u32, u32, MultiplyAdd>},
    {"mad.lo.s64", "L l l l", ternary<u64, u64, u64, u64, MultiplyAdd>},
    {"mad.lo.u64", "L l l l", ternary<u64, u64, u64, u64, MultiplyAdd>},
    {"mad.lo.s16", "W w w w", ternary<u16, u16, u16, u16, MultiplyAdd>},
    {"mad.wide.u32", "L w w l", ternary<u64, u32, u32, u64, MultiplyAdd>},
    {"mad.wide.s32", "L w w l", ternary<s64, s32, s32, s64, MultiplyAdd>},
    TYPE2("div.u16", u16, "W w w", Divide),
    TYPE2("div.u32", u32, "W w w", Divide),
    TYPE2("div.u64", u64, "L l l", Divide),
    TYPE2("div.s32", s32, "W w w", SignedDivide<s32>),
    TYPE2("div.s64", s64, "L l l", SignedDivide<s64>),
    TYPE2("rem.u16", u16, "W w w", Remainder),
    TYPE2("rem.u32", u32, "W w w", Remainder),
    TYPE2("rem.u64", u64, "L l l", Remainder),
    TYPE2("rem.s32", s32, "W w w", SignedRemainder<s32>),
    TYPE2("rem.s64", s64, "L l l", SignedRemainder<s64>),
    BITS("and", And),
    BITS("or", Or),
    BITS("xor", Xor),
    {"not.b16", "W w", unary<u16, u16, Not>},
    {"not.b32", "W w", unary<u32, u32, Not>},
    {"not.b64", "L l", unary<u64, u64, Not>},
    {"not.pred", "P p", not_predicate},
    {"neg.s16", "W w", unary<s16, s16, Negate>},
    {"neg.s32", "W w", unary<s32, s32, Negate>},
    {"neg.s64", "L l", unary<s64, s64, Negate>},
    {"abs.s32", "W w", unary<s32, s32, Absolute>},
    {"abs.s64", "L l", unary<s64, s64, Absolute>},
    SHIFT("shl.b16", u16, "W w w", ShiftLeft),
    SHIFT("shl.b32", u32, "W w w", ShiftLeft),
    SHIFT("shl.b64", u64, "L l w", ShiftLeft),
    SHIFT("shr.u16", u16, "W w w", ShiftRight),
    SHIFT("shr.s16", s16, "W w w", ShiftRight),
    SHIFT("shr.u32", u32, "W w w", ShiftRight),
    SHIFT("shr.b32", u32, "W w w", ShiftRight),
    SHIFT("shr.s32", s32, "W w w", ShiftRight),
    SHIFT("shr.u64", u64, "L l w", ShiftRight),
    SHIFT("shr.b64", u64, "L l w", ShiftRight),
    SHIFT("shr.s64", s64, "L l w", ShiftRight),
    {"shf.l.wrap.b32", "W w w w", funnel_shift<true>},
    {"shf.r.wrap.b32", "W w w w", funnel_shift<false>},
    {"popc.b32", "W w", unary<u32, u32, CountOnes>},
    {"popc.b64", "W l", unary<u32, u64, CountOnes>},
    {"clz.b32", "W w", unary<u32, u32, LeadingZeros>},
    {"clz.b64", "W l", unary<u32, u64, LeadingZeros>},
    {"brev.b32", "W w", unary<u32, u32, Reverse>},
    {"brev.b64", "L l", unary<u64, u64, Reverse>},
    {"bfi.b32", "W w w w w", insert_bits<u32>},
    {"bfi.b64", "L l l w w", insert_bits<u64>},
    {"bfe.u32", "W w w w", extract_bits},
    {"lop3.b32", "W w w w i", logic3},
    {"prmt.b32", "W w w w", permute_bytes},
    COMPARE_ALL("eq", Equal),
    COMPARE_ALL("ne", Unequal),
    COMPARE_ALL("lt", Less),
    COMPARE_ALL("le", LessEqual),
    COMPARE_ALL("gt", Greater),
    COMPARE_ALL("ge", GreaterEqual),
    COMPARE_BITS("eq", Equal),
    COMPARE_BITS("ne", Unequal),
    COMPARE_FLOATS("equ", EqualOrNan),
    COMPARE_FLOATS("neu", UnequalOrNan),
    COMPARE_FLOATS("ltu", LessOrNan),
    COMPARE_FLOATS("leu", LessEqualOrNan),
    COMPARE_FLOATS("gtu", GreaterOrNan),
    COMPARE_FLOATS("geu", GreaterEqualOrNan),
    COMPARE_FLOATS("num", Ordered),
    COMPARE_FLOATS("nan", Unordered),
    SELECT("b16", "W w w p", u32),
    SELECT("u16", "W w w p", u32),
    SELECT("s16", "W w w p", u32),
    SELECT("b32", "W w w p", u32),
    SELECT("u32", "W w w p", u32),
    SELECT("s32", "W w w p", u32),
    SELECT("f32", "W w w p", u32),
    SELECT("b64", "L l l p", u64),
    SELECT("u64", "L l l p", u64),
    SELECT("s64", "L l l p", u64),
    SELECT("f64", "L l l p", u64),
    MOVE("b16", "W w", u32),
    MOVE("u16", "W w", u32),
    MOVE("s16", "W w", u32),
    MOVE("b32", "W w", u32),
    MOVE("u32", "W w", u32),
    MOVE("s32", "W w", u32),
    MOVE("f32", "W w", u32),
    MOVE("b64", "L l", u64),
    MOVE("u64", "L l", u64),
    MOVE("s64", "L l", u64),
    MOVE("f64", "L l", u64),
    {"mov.pred", "P p", move_predicate},
    {"mov.b32", "W 2w", pack<u32, u16>},
    {"mov.b32", "2W w", unpack<u32, u16>},
    {"mov.b64", "L 2w", pack<u64, u32>},
    {"mov.b64", "2W l", unpack<u64, u32>},
    {"mov.b64", "L 4w", pack<u64, u16>},
    {"mov.b64", "4W l", unpack<u64, u16>},
};

}  // namespace

Forms integer_forms() {
  return {kForms, sizeof kForms / sizeof *kForms};
}

}  // namespace ptx
}  // namespace standin
