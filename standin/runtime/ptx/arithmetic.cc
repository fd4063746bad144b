// Floating-point arithmetic, each operation rounded as its name says. Nothing is fused that PTX does not
// fuse.
//
// The approximations (`ex2.approx`, …) are the exact functions rounded to f32: a GPU may differ by the ulps
// that the manual allows. A NaN that an operation makes has the processor's bits, not the GPU's.
#include <fenv.h>
#include <math.h>

#include "warp.h"

namespace standin {
namespace ptx {
namespace {

// Subnormals become zero, as `.ftz` says.
float flushed(float x) {
  return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}
// The low word of a double is not read and not written by `.approx.ftz.f64`.
double high_word(double x) {
  return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, x) & 0xffffffff00000000ull);
}

#define OPERATION2(name, expression) \
  struct name {                      \
    template <class T>               \
    static T of(T a, T b) {          \
      return expression;             \
    }                                \
  };
#define OPERATION1(name, expression) \
  struct name {                      \
    template <class T>               \
    static T of(T a) {               \
      return expression;             \
    }                                \
  };
OPERATION2(Add, a + b)
OPERATION2(Subtract, a - b)
OPERATION2(Multiply, a* b)
OPERATION2(Divide, a / b)
// Of a number and a NaN: the number. −0 is less than +0.
OPERATION2(Least, a != a ? b : b != b ? a : a == b ? (signbit(a) ? a : b) : a < b ? a : b)
OPERATION2(Greatest, a != a ? b : b != b ? a : a == b ? (signbit(a) ? b : a) : a > b ? a : b)
// copysign.f32 d, a, b: the sign of a, the value of b.
OPERATION2(CopySign, copysign(b, a))
OPERATION1(Negate, -a)
OPERATION1(Absolute, a < 0 || signbit(a) ? -a : a)
OPERATION1(Reciprocal, 1 / a)
OPERATION1(Root, sqrt(a))

struct ApproximateReciprocal {
  static float of(float a) { return flushed(1.0f / flushed(a)); }
  static double of(double a) {
    double r = 1.0 / high_word(fabs(a) < 0x1p-1022 ? copysign(0.0, a) : a);
    return high_word(fabs(r) < 0x1p-1022 ? copysign(0.0, r) : r);
  }
};
struct Exponential {
  static float of(float a) { return flushed(exp2f(flushed(a))); }
};
struct Logarithm {
  static float of(float a) { return flushed(log2f(flushed(a))); }
};
struct WholeExponential {
  static float of(float a) { return exp2f(a); }
};
struct WholeLogarithm {
  static float of(float a) { return log2f(a); }
};
struct ReciprocalRoot {
  static float of(float a) { return flushed(1.0f / sqrtf(flushed(a))); }
};
struct ApproximateRoot {
  static float of(float a) { return flushed(sqrtf(flushed(a))); }
};
struct Tangent {
  static float of(float a) { return tanhf(a); }
};

// Processors since 2013 do this in one instruction; others call the library.
#if defined(__x86_64__) && !defined(__clang__)
#define WITH_FMA __attribute__((target_clones("arch=haswell", "default")))
#else
#define WITH_FMA
#endif
WITH_FMA void fused(float* r, const float* a, const float* b, const float* c) {
  for (int l = 0; l < 32; ++l) r[l] = __builtin_fmaf(a[l], b[l], c[l]);
}
WITH_FMA void fused(double* r, const double* a, const double* b, const double* c) {
  for (int l = 0; l < 32; ++l) r[l] = __builtin_fma(a[l], b[l], c[l]);
}

template <class T>
void fma_nearest(WarpState& w, const Instruction& i) {
  T r[32];
  Held<T> bits[32];
  fused(r, w.at<T>(i.s[0]), w.at<T>(i.s[1]), w.at<T>(i.s[2]));
  memcpy(bits, r, sizeof r);
  keep(w, i.d[0], bits);
}

// The processor's rounding mode while this lives.
class Rounding {
 public:
  explicit Rounding(int mode) : before_(fegetround()) { fesetround(mode); }
  ~Rounding() { fesetround(before_); }

 private:
  int before_;
};

template <class T, int mode>
void fma_rounded(WarpState& w, const Instruction& i) {
  Rounding rounding(mode);
  Held<T> r[32];
  for (int l = 0; l < 32; ++l) {
    // The compiler does not know of the mode, and must not move the operation.
    volatile T a = w.at<T>(i.s[0])[l], b = w.at<T>(i.s[1])[l], c = w.at<T>(i.s[2])[l];
    volatile T sum = std::is_same_v<T, float> ? static_cast<T>(fmaf(a, b, c)) : static_cast<T>(fma(a, b, c));
    r[l] = bits_of<T>(sum);
  }
  keep(w, i.d[0], r);
}
template <class T, class F, int mode>
void binary_rounded(WarpState& w, const Instruction& i) {
  Rounding rounding(mode);
  Held<T> r[32];
  for (int l = 0; l < 32; ++l) {
    volatile T a = w.at<T>(i.s[0])[l], b = w.at<T>(i.s[1])[l];
    T x = a, y = b;
    volatile T result = F::of(x, y);
    r[l] = bits_of<T>(result);
  }
  keep(w, i.d[0], r);
}

#define BOTH(name, step)                                       \
  {name ".f32", "W w w", binary<float, float, float, step>}, { \
    name ".f64", "L l l", binary<double, double, double, step> \
  }
#define ROUNDED(name, suffix, mode, step)                             \
  {name suffix ".f32", "W w w", binary_rounded<float, step, mode>}, { \
    name suffix ".f64", "L l l", binary_rounded<double, step, mode>   \
  }
#define FUSED(suffix, mode)                                     \
  {"fma" suffix ".f32", "W w w w", fma_rounded<float, mode>}, { \
    "fma" suffix ".f64", "L l l l", fma_rounded<double, mode>   \
  }
#define ONE(name, step)                              \
  {name ".f32", "W w", unary<float, float, step>}, { \
    name ".f64", "L l", unary<double, double, step>  \
  }

const Form kForms[] = {
    BOTH("add", Add),
    BOTH("add.rn", Add),
    ROUNDED("add", ".rz", FE_TOWARDZERO, Add),
    ROUNDED("add", ".rm", FE_DOWNWARD, Add),
    ROUNDED("add", ".rp", FE_UPWARD, Add),
    BOTH("sub", Subtract),
    BOTH("sub.rn", Subtract),
    ROUNDED("sub", ".rz", FE_TOWARDZERO, Subtract),
    ROUNDED("sub", ".rm", FE_DOWNWARD, Subtract),
    ROUNDED("sub", ".rp", FE_UPWARD, Subtract),
    BOTH("mul", Multiply),
    BOTH("mul.rn", Multiply),
    ROUNDED("mul", ".rz", FE_TOWARDZERO, Multiply),
    ROUNDED("mul", ".rm", FE_DOWNWARD, Multiply),
    ROUNDED("mul", ".rp", FE_UPWARD, Multiply),
    BOTH("div.rn", Divide),
    BOTH("min", Least),
    BOTH("max", Greatest),
    BOTH("copysign", CopySign),
    ONE("neg", Negate),
    ONE("abs", Absolute),
    ONE("rcp.rn", Reciprocal),
    ONE("sqrt.rn", Root),
    ONE("rcp.approx.ftz", ApproximateReciprocal),
    {"fma.rn.f32", "W w w w", fma_nearest<float>},
    {"fma.rn.f64", "L l l l", fma_nearest<double>},
    FUSED(".rz", FE_TOWARDZERO),
    FUSED(".rm", FE_DOWNWARD),
    FUSED(".rp", FE_UPWARD),
    {"ex2.approx.ftz.f32", "W w", unary<float, float, Exponential>},
    {"lg2.approx.ftz.f32", "W w", unary<float, float, Logarithm>},
    {"ex2.approx.f32", "W w", unary<float, float, WholeExponential>},
    {"lg2.approx.f32", "W w", unary<float, float, WholeLogarithm>},
    {"rsqrt.approx.ftz.f32", "W w", unary<float, float, ReciprocalRoot>},
    {"sqrt.approx.ftz.f32", "W w", unary<float, float, ApproximateRoot>},
    {"tanh.approx.f32", "W w", unary<float, float, Tangent>},
};

}  // namespace

Forms arithmetic_forms() {
  return {kForms, sizeof kForms / sizeof *kForms};
}

}  // namespace ptx
}  // namespace standin
