//! The pseudo-inverse of a small matrix, by one-sided Jacobi rotations (Hestenes 1958).

/// Singular values below this share of the largest count as zero.
const CUTOFF: f64 = 1e-10;
/// Convergence is quadratic; small matrices need about eight sweeps.
const MAX_SWEEPS: usize = 60;

/// Moore-Penrose inverse of `a`, row-major `[rows, cols]`; the result is `[cols, rows]`.
pub(super) fn pinv(a: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    assert_eq!(a.len(), rows * cols);
    if rows < cols {
        return transpose(&pinv(&transpose(a, rows, cols), cols, rows), rows, cols);
    }
    // Columns of `u` are rotated until they are orthogonal. Then a = u vᵀ, and their lengths are the singular
    // values.
    let mut u: Vec<Vec<f64>> = (0..cols).map(|j| (0..rows).map(|i| a[i * cols + j]).collect()).collect();
    let mut v: Vec<Vec<f64>> = (0..cols).map(|j| (0..cols).map(|i| f64::from(i == j)).collect()).collect();
    for _ in 0..MAX_SWEEPS {
        let mut rotated = false;
        for p in 0..cols {
            for q in p + 1..cols {
                let (pp, qq, pq) = (dot(&u[p], &u[p]), dot(&u[q], &u[q]), dot(&u[p], &u[q]));
                if pq.abs() <= 1e-15 * (pp * qq).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (qq - pp) / (2.0 * pq);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut u, p, q, c, c * t);
                rotate(&mut v, p, q, c, c * t);
            }
        }
        if !rotated {
            break;
        }
    }
    let squares: Vec<f64> = u.iter().map(|column| dot(column, column)).collect();
    let least = squares.iter().fold(0.0, |m: f64, s| m.max(*s)) * CUTOFF * CUTOFF;
    let mut out = vec![0.0; cols * rows];
    for k in (0..cols).filter(|k| squares[*k] > least) {
        for i in 0..cols {
            for j in 0..rows {
                out[i * rows + j] += v[k][i] * u[k][j] / squares[k];
            }
        }
    }
    out
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Rotates columns p and q by the angle with cosine `c` and sine `s`.
fn rotate(columns: &mut [Vec<f64>], p: usize, q: usize, c: f64, s: f64) {
    let (left, right) = columns.split_at_mut(q);
    for (x, y) in left[p].iter_mut().zip(&mut right[0]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

fn transpose(a: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    (0..cols).flat_map(|j| (0..rows).map(move |i| a[i * cols + j])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(a: &[f64], b: &[f64], rows: usize, inner: usize, cols: usize) -> Vec<f64> {
        let cell = |i: usize, j: usize| (0..inner).map(|k| a[i * inner + k] * b[k * cols + j]).sum();
        (0..rows * cols).map(|at| cell(at / cols, at % cols)).collect()
    }

    #[test]
    fn it_meets_the_four_conditions_of_penrose() {
        // The third column is the sum of the others: the rank is 2.
        let deficient = [1.0, 2.0, 3.0, 0.5, -1.0, -0.5, 2.0, 0.0, 2.0, 4.0, 1.0, 5.0];
        let full: Vec<f64> = (0..12).map(|v| f64::from(v * v % 7) - 2.0).collect();
        for (a, rows, cols) in [(&deficient[..], 4, 3), (&full, 4, 3), (&full, 3, 4)] {
            let x = pinv(a, rows, cols);
            let (ax, xa) = (product(a, &x, rows, cols, rows), product(&x, a, cols, rows, cols));
            let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
            assert!(near(&product(&ax, a, rows, rows, cols), a));
            assert!(near(&product(&xa, &x, cols, cols, rows), &x));
            assert!(near(&transpose(&ax, rows, rows), &ax));
            assert!(near(&transpose(&xa, cols, cols), &xa));
        }
    }
}
