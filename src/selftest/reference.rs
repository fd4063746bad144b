//! Scalar functions in float64.

use crate::backend::Gelu;

/// `2/√π · e^(-x²) · Σ 2ⁿ·x^(2n+1) / (2n+1)!!`: all terms have one sign, so nothing cancels.
pub(super) fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;

pub(super) fn gelu(x: f64, form: Gelu) -> f64 {
    match form {
        Gelu::Tanh => 0.5 * x * (1.0 + (SQRT_2_OVER_PI * (x + 0.044715 * x.powi(3))).tanh()),
        Gelu::Erf => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Gelu::Quick => x / (1.0 + (-1.702 * x).exp()),
    }
}

pub(super) fn gelu_grad(x: f64, form: Gelu) -> f64 {
    match form {
        Gelu::Tanh => {
            let t = (SQRT_2_OVER_PI * (x + 0.044715 * x.powi(3))).tanh();
            let slope = SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * x * x);
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope
        }
        Gelu::Erf => {
            let density = (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
            0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2)) + x * density
        }
        Gelu::Quick => {
            let w = 1.0 / (1.0 + (-1.702 * x).exp());
            w + 1.702 * x * w * (1.0 - w)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_has_its_tabulated_values() {
        let table =
            [(0.0, 0.0), (0.5, 0.5204998778130465), (1.0, 0.8427007929497149), (2.0, 0.9953222650189527)];
        for (x, y) in table {
            assert!((erf(x) - y).abs() < 1e-15 && (erf(-x) + y).abs() < 1e-15, "{x}");
        }
        assert!((erf(5.9) - 1.0).abs() < 1e-15);
    }

    #[test]
    fn the_slopes_of_all_forms_are_those_of_their_curves() {
        for form in [Gelu::Tanh, Gelu::Erf, Gelu::Quick] {
            for i in -40..=40 {
                let (x, h) = (f64::from(i) * 0.2, 1e-5);
                let slope = (gelu(x + h, form) - gelu(x - h, form)) / (2.0 * h);
                assert!((slope - gelu_grad(x, form)).abs() < 1e-9, "{form:?} at {x}");
            }
        }
    }
}
