//! Elementary functions: `exp`, `tanh` and the two forms of GELU with their derivatives.
//!
//! Vector versions are generic over the instruction set; a scalar version runs the same code on the portable
//! one. The polynomials are our own minimax fits (Remez, in double precision). `exp` and `tanh` are accurate
//! to a few units in the last place. GELU's error far in its negative tail is that of the exponent's
//! rounding, as in any f32 code.

use super::compute::Isa;
use super::simd::{Simd, Task};
use crate::backend::Gelu;

/// `e^x`; 0 below -104, infinite above 88.73, NaN for NaN.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // ln 2 in two parts: n·LN2_HIGH is exact enough for the fused subtraction.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.nfma(n, s.splat(LN2_LOW), s.nfma(n, s.splat(LN2_HIGH), x));
    // e^r = 1 + r + r²·q(r) on [-ln2/2, ln2/2], relative error 3.1e-9.
    let mut q = s.splat(0.001_381_446_8);
    q = s.fma(q, r, s.splat(0.008_368_781));
    q = s.fma(q, r, s.splat(0.041_668_393));
    q = s.fma(q, r, s.splat(0.166_665_2));
    q = s.fma(q, r, s.splat(0.499_999_94));
    let e = s.fma(s.fma(q, r, s.splat(1.0)), r, s.splat(1.0));
    s.scale2(e, n)
}

/// `2^x` for x at most 127: accurate to two units in the last place, at half the cost of [`exp`]. Callers
/// fold log2 e into the computation of x; its rounding then adds |x|·2^-24 to the relative error.
#[expect(clippy::approx_constant, reason = "a coefficient of the fit, three units from ln 2")]
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let x = s.max(s.splat(-150.0), x);
    let n = s.round(x);
    let f = s.sub(x, n);
    // 2^f = 1 + f·q(f) on [-1/2, 1/2], relative error 9.2e-8.
    let mut q = s.splat(0.001_326_464_6);
    q = s.fma(q, f, s.splat(0.009_671_576));
    q = s.fma(q, f, s.splat(0.055_507_347));
    q = s.fma(q, f, s.splat(0.240_222_41));
    q = s.fma(q, f, s.splat(0.693_147));
    s.scale2(s.fma(q, f, s.splat(1.0)), n)
}

/// The natural logarithm of normal positive numbers.
#[inline(always)]
pub fn ln<S: Simd>(s: S, x: S::V) -> S::V {
    let (m, e) = s.split_exponent(x);
    // To [√½, √2), which avoids cancellation around 1.
    let (root, half, one) = (s.splat(std::f32::consts::SQRT_2), s.splat(0.5), s.splat(1.0));
    let small = s.select_less(m, root, m, s.mul(m, half));
    let e = s.select_less(m, root, e, s.add(e, one));
    // ln m = 2z + z³·q(z²), z = (m - 1)/(m + 1)
    let z = s.div(s.sub(small, one), s.add(small, one));
    let z2 = s.mul(z, z);
    let mut q = s.splat(0.298_837_4);
    q = s.fma(q, z2, s.splat(0.399_771_3));
    q = s.fma(q, z2, s.splat(0.666_667_8));
    let ln_m = s.fma(s.mul(q, z2), z, s.add(z, z));
    s.fma(e, s.splat(std::f32::consts::LN_2), ln_m)
}

/// The hyperbolic tangent.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    // Near zero x + x³·q(x²), relative error 5.4e-9 up to 0.64: there 1 - 2/(e^2x + 1) would cancel.
    let z = s.mul(x, x);
    let mut q = s.splat(-0.005_603_914_6);
    q = s.fma(q, z, s.splat(0.020_551_72));
    q = s.fma(q, z, s.splat(-0.053_714_108));
    q = s.fma(q, z, s.splat(0.133_311_52));
    q = s.fma(q, z, s.splat(-0.333_332_72));
    let near = s.fma(s.mul(q, z), x, x);
    let one = s.splat(1.0);
    let e = exp(s, s.add(x, x));
    let far = s.nfma(s.splat(2.0), s.div(one, s.add(e, one)), one);
    s.select_less(s.abs(x), s.splat(0.625), near, far)
}

/// A form of GELU: `x·weight(x)`, where the weight goes from 0 to 1.
pub trait Curve {
    /// `gelu(x)`
    fn value<S: Simd>(s: S, x: S::V) -> S::V;
    /// `gelu'(x)`
    fn slope<S: Simd>(s: S, x: S::V) -> S::V;
}

/// [`Gelu::Tanh`]: the weight is `½(1 + tanh u) = 1/(1 + e^-2u)`, `u = √(2/π)·(x + 0.044715·x³)`.
pub struct TanhForm;

/// [`Gelu::Erf`]: the weight is the normal distribution Φ.
pub struct ErfForm;

/// [`Gelu::Quick`]: the weight is `σ(1.702·x)`.
pub struct QuickForm;

/// `x·σ(x)`: the gate of a SwiGLU.
pub struct Silu;

/// `2√(2/π)`
const TWO_C: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

impl TanhForm {
    #[inline(always)]
    fn weight<S: Simd>(s: S, x: S::V, x2: S::V) -> S::V {
        let exponent = s.mul(x, s.fma(x2, s.splat(-LOG2_E * TWO_C * CUBIC), s.splat(-LOG2_E * TWO_C)));
        // Bounded, so that the reciprocal's argument is bounded: the smallest weight is 2^-125, at the end of
        // f32's range.
        let exponent = s.min(s.splat(125.0), exponent);
        s.recip(s.add(s.splat(1.0), exp2(s, exponent)))
    }
}

impl Curve for TanhForm {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::V) -> S::V {
        s.mul(x, TanhForm::weight(s, x, s.mul(x, x)))
    }
    #[inline(always)]
    fn slope<S: Simd>(s: S, x: S::V) -> S::V {
        // w + x·w·(1 - w)·2u'
        let x2 = s.mul(x, x);
        let w = TanhForm::weight(s, x, x2);
        let two_du = s.fma(x2, s.splat(3.0 * TWO_C * CUBIC), s.splat(TWO_C));
        let bend = s.mul(s.nfma(w, w, w), two_du);
        s.fma(x, bend, w)
    }
}

/// `σ(k·x)`
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V, k: f32) -> S::V {
    // Bounded as in `TanhForm::weight`.
    let exponent = s.min(s.splat(125.0), s.mul(x, s.splat(-LOG2_E * k)));
    s.recip(s.add(s.splat(1.0), exp2(s, exponent)))
}

/// The slope of `x·σ(k·x)`: `w + k·x·w·(1 - w)`.
#[inline(always)]
fn sigmoid_slope<S: Simd>(s: S, x: S::V, k: f32) -> S::V {
    let w = sigmoid(s, x, k);
    s.fma(s.mul(x, s.splat(k)), s.nfma(w, w, w), w)
}

impl Curve for QuickForm {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::V) -> S::V {
        s.mul(x, sigmoid(s, x, 1.702))
    }
    #[inline(always)]
    fn slope<S: Simd>(s: S, x: S::V) -> S::V {
        sigmoid_slope(s, x, 1.702)
    }
}

impl Curve for Silu {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::V) -> S::V {
        s.mul(x, sigmoid(s, x, 1.0))
    }
    #[inline(always)]
    fn slope<S: Simd>(s: S, x: S::V) -> S::V {
        sigmoid_slope(s, x, 1.0)
    }
}

impl ErfForm {
    /// `e^(-x²/2)` and Φ(-|x|).
    #[inline(always)]
    fn tail<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
        let bell = exp2(s, s.mul(s.mul(x, x), s.splat(-0.5 * LOG2_E)));
        // Φ(-|x|)·e^(x²/2) = t·q(t), t = 1/(1 + 0.27·|x|): relative error 2.4e-8 up to |x| = 14.5, the end of
        // f32's range.
        let t = s.recip(s.fma(s.abs(x), s.splat(0.27), s.splat(1.0)));
        let mut q = s.splat(0.028_961_098);
        q = s.fma(q, t, s.splat(-0.126_485_85));
        q = s.fma(q, t, s.splat(0.169_786_13));
        q = s.fma(q, t, s.splat(-0.069_210_716));
        q = s.fma(q, t, s.splat(0.107_825_59));
        q = s.fma(q, t, s.splat(0.072_049_63));
        q = s.fma(q, t, s.splat(0.101_810_604));
        q = s.fma(q, t, s.splat(0.107_542_87));
        q = s.fma(q, t, s.splat(0.107_720_66));
        (bell, s.mul(s.mul(q, t), bell))
    }
}

impl Curve for ErfForm {
    #[inline(always)]
    fn value<S: Simd>(s: S, x: S::V) -> S::V {
        // x·Φ(x), and Φ(x) = 1 - Φ(-x): the tail keeps its relative accuracy on the negative side.
        let (_, tail) = ErfForm::tail(s, x);
        let zero = s.splat(0.0);
        let positive = s.nfma(x, tail, x);
        s.select_less(x, zero, s.mul(x, tail), positive)
    }
    #[inline(always)]
    fn slope<S: Simd>(s: S, x: S::V) -> S::V {
        // Φ(x) + x·φ(x)
        let (bell, tail) = ErfForm::tail(s, x);
        let phi = s.select_less(x, s.splat(0.0), tail, s.sub(s.splat(1.0), tail));
        s.fma(s.mul(x, s.splat(0.398_942_3)), bell, phi)
    }
}

/// The functions of this module over a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    Exp,
    Exp2,
    Ln,
    Tanh,
    Gelu(Gelu),
    GeluSlope(Gelu),
}

/// `values ← function(values)`
pub fn map(isa: Isa, function: Function, values: &mut [f32]) {
    isa.run(Map { function, values });
}

/// One value, by the portable path.
pub fn scalar(function: Function, x: f32) -> f32 {
    let mut value = [x];
    map(Isa::Scalar, function, &mut value);
    value[0]
}

struct Map<'a> {
    function: Function,
    values: &'a mut [f32],
}

impl Task for Map<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.values.len() {
            let n = S::LANES.min(self.values.len() - i);
            // SAFETY: n values from i on lie in the slice.
            unsafe {
                let at = self.values.as_mut_ptr().add(i);
                let x = s.load_head(at, n);
                let y = match self.function {
                    Function::Exp => exp(s, x),
                    Function::Exp2 => exp2(s, x),
                    Function::Ln => ln(s, x),
                    Function::Tanh => tanh(s, x),
                    Function::Gelu(Gelu::Tanh) => TanhForm::value(s, x),
                    Function::Gelu(Gelu::Erf) => ErfForm::value(s, x),
                    Function::Gelu(Gelu::Quick) => QuickForm::value(s, x),
                    Function::GeluSlope(Gelu::Tanh) => TanhForm::slope(s, x),
                    Function::GeluSlope(Gelu::Erf) => ErfForm::slope(s, x),
                    Function::GeluSlope(Gelu::Quick) => QuickForm::slope(s, x),
                };
                s.store_head(at, y, n);
            }
            i += n;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::backend::cpu::testing::{Tensors, reference, rel_l2};

    const EPS: f64 = 1.0 / (1u32 << 24) as f64;

    /// No relative accuracy is possible below this.
    const LAST_DENORMAL: f64 = 1.5e-45;
    /// GELU's tail may flush to zero where its weight is not a normal number.
    const DENORMAL: f64 = 400.0 * f32::MIN_POSITIVE as f64;

    /// Φ(x) in f64: a series near zero, a continued fraction in the tails.
    pub(crate) fn normal64(x: f64) -> f64 {
        let a = x.abs();
        let bell = (-0.5 * a * a).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if a < 3.0 {
            // Φ = 1/2 + φ·(x + x³/3 + x⁵/(3·5) + ...)
            let (mut term, mut sum, mut n) = (a, a, 1.0);
            while term > 1e-18 * sum {
                n += 2.0;
                term *= a * a / n;
                sum += term;
            }
            let half = bell * sum;
            return if x < 0.0 { 0.5 - half } else { 0.5 + half };
        }
        // Φ(-a) = φ/(a + 1/(a + 2/(a + ...)))
        let tail = bell / (1..200).rev().fold(a, |f, k| a + k as f64 / f);
        if x < 0.0 { tail } else { 1.0 - tail }
    }

    fn gelu64(form: Gelu, x: f64) -> (f64, f64) {
        match form {
            Gelu::Tanh => {
                let two_c = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
                let two_u = two_c * (x + 0.044715 * x * x * x);
                let w = 1.0 / (1.0 + (-two_u).exp());
                (x * w, w + x * w * (1.0 / (1.0 + two_u.exp())) * two_c * (1.0 + 3.0 * 0.044715 * x * x))
            }
            Gelu::Erf => {
                let bell = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                (x * normal64(x), normal64(x) + x * bell)
            }
            Gelu::Quick => {
                let w = 1.0 / (1.0 + (-1.702 * x).exp());
                (x * w, w + 1.702 * x * w * (1.0 / (1.0 + (1.702 * x).exp())))
            }
        }
    }

    /// From -100 to 100, dense near zero, with both zeros, denormals and the smallest normal.
    fn points() -> Vec<f32> {
        let mut x: Vec<f32> = (-200_000..=200_000).map(|i| i as f32 * 5e-4).collect();
        x.extend((-40_000..=40_000).map(|i| i as f32 * 1e-4 + 3e-5));
        for p in [0.0, 1e-45, 3e-42, 1.2e-38, 1e-30, 1e-20, 1e-10, 1e-7, 1e-5] {
            x.extend([p, -p]);
        }
        x
    }

    /// Largest error of a function in units of `size(x, f(x))·2^-24`, on every instruction set.
    /// Results below `floor` may be wrong by as much. Skips results that f32 cannot hold.
    fn worst(function: Function, floor: f64, f: impl Fn(f64) -> f64, size: impl Fn(f64, f64) -> f64) -> f64 {
        let (mut worst, mut at) = (0.0, 0.0);
        for isa in Isa::available() {
            let x = points();
            let mut y = x.clone();
            map(isa, function, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let want = f(*x as f64);
                if want > f32::MAX as f64 {
                    continue;
                }
                let error = ((*y as f64 - want).abs() - floor).max(0.0);
                let units = error / (size(*x as f64, want).abs() * EPS);
                assert!(y.is_finite(), "{function:?}({x}) = {y}, not {want}");
                if units > worst {
                    (worst, at) = (units, *x);
                }
            }
        }
        println!("{function:?}: {worst:.2} at {at:e}");
        worst
    }

    #[test]
    fn exp_is_right_to_three_units() {
        let worst = worst(Function::Exp, LAST_DENORMAL, f64::exp, |_, y| y);
        assert!(worst < 3.0, "{worst}");
        for isa in Isa::available() {
            let mut x = [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, 89.0, -105.0, -1e30, 1e30];
            map(isa, Function::Exp, &mut x);
            assert_eq!(x[0], 0.0);
            assert_eq!(x[1], f32::INFINITY);
            assert!(x[2].is_nan());
            assert_eq!(x[3..], [f32::INFINITY, 0.0, 0.0, f32::INFINITY]);
        }
    }

    #[test]
    fn exp2_and_ln_are_right_to_four_units() {
        // exp2 is used for results below 2^127.
        let f = |x: f64| if x > 127.0 { f64::MAX } else { x.exp2() };
        assert!(worst(Function::Exp2, LAST_DENORMAL, f, |_, y| y) < 4.0);
        for isa in Isa::available() {
            let mut x = [f32::NEG_INFINITY, f32::NAN, -1e30];
            map(isa, Function::Exp2, &mut x);
            assert!(x[0] == 0.0 && x[1].is_nan() && x[2] == 0.0);
            let x: Vec<f32> = points().iter().map(|x| x.abs()).filter(|x| x.is_normal()).collect();
            let mut y = x.clone();
            map(isa, Function::Ln, &mut y);
            for (x, y) in x.iter().zip(y) {
                let want = (*x as f64).ln();
                assert!(
                    (y as f64 - want).abs() <= 3.0 * EPS * want.abs(),
                    "{isa:?}: ln {x} = {y}, not {want}"
                );
            }
        }
    }

    #[test]
    fn tanh_is_right_to_six_units() {
        assert!(worst(Function::Tanh, LAST_DENORMAL, f64::tanh, |_, y| y) < 6.0);
        assert!(scalar(Function::Tanh, f32::NAN).is_nan());
    }

    /// The exponent's rounding error grows with the exponent: that is the condition of the problem, not an
    /// error of the method. Relative to the value it is `|x|·2^-24·(exponent)`.
    #[test]
    fn gelu_is_right_to_a_few_units() {
        let exponent = |form, x: f64| match form {
            Gelu::Tanh => 1.6 * (x + 0.044715 * x * x * x).abs(),
            Gelu::Erf => 0.5 * x * x,
            Gelu::Quick => 1.702 * x.abs(),
        };
        for form in [Gelu::Tanh, Gelu::Erf, Gelu::Quick] {
            let value = worst(
                Function::Gelu(form),
                DENORMAL,
                |x| gelu64(form, x).0,
                |x, y| y.abs() * (1.0 + if x < 0.0 { exponent(form, x) } else { 0.0 }),
            );
            assert!(value < 8.0, "{form:?}: {value}");
            // The derivative crosses zero, so the error is relative to the sizes of its two terms.
            let slope = worst(
                Function::GeluSlope(form),
                // The smallest weight, 2^-125, times the slope of the exponent at -100.
                1e-32,
                |x| gelu64(form, x).1,
                |x, y| {
                    let w = if x == 0.0 { 0.5 } else { gelu64(form, x).0 / x };
                    (w.abs() + (y - w).abs()) * (1.0 + exponent(form, x).min(100.0))
                },
            );
            assert!(slope < 8.0, "{form:?}: {slope}");
        }
    }

    #[test]
    fn gelu_equals_the_reference() {
        let Some(folder) = reference("kernels") else { return };
        let file = Tensors::open(&folder.join("gelu.safetensors"));
        let ((_, x), (_, dy)) = (file.get("x"), file.get("dy"));
        for isa in Isa::available() {
            for (form, name) in [(Gelu::Tanh, "tanh"), (Gelu::Erf, "erf")] {
                let (mut y, mut dx) = (x.clone(), x.clone());
                map(isa, Function::Gelu(form), &mut y);
                map(isa, Function::GeluSlope(form), &mut dx);
                dx.iter_mut().zip(&dy).for_each(|(d, dy)| *d *= dy);
                for (part, got) in [("y", y), ("dx", dx)] {
                    let want = file.get(&format!("{name}.{part}")).1;
                    let error = rel_l2(&got, want.into_iter().map(|v| v as f64));
                    assert!(error < 1e-6, "{isa:?} {name}.{part}: {error:e}");
                }
            }
        }
    }
}
