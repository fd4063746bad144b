//! A block of coefficients or samples as an array of rows.

/// Rows of coefficients.
#[inline(always)]
pub(super) fn load(coefficients: &[i16; 64]) -> [[i32; 8]; 8] {
    let mut rows = [[0i32; 8]; 8];
    for (row, from) in rows.iter_mut().zip(coefficients.chunks_exact(8)) {
        row.iter_mut().zip(from).for_each(|(to, from)| *to = i32::from(*from));
    }
    rows
}

/// Writes rows of samples, which are centred on zero.
#[inline(always)]
pub(super) fn store<const N: usize>(samples: [[i32; N]; N], out: &mut [u8], stride: usize) {
    for (y, row) in samples.iter().enumerate() {
        let to = &mut out[y * stride..][..N];
        to.iter_mut().zip(row).for_each(|(to, sample)| *to = (sample + 128).clamp(0, 255) as u8);
    }
}

/// Rows become columns.
#[inline(always)]
pub(super) fn transpose<const R: usize, const C: usize>(x: [[i32; C]; R]) -> [[i32; R]; C] {
    std::array::from_fn(|i| std::array::from_fn(|j| x[j][i]))
}
