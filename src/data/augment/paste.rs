//! Putting a part of a picture where it belongs in a sample: black around it, mirrored left to right or not, each byte
//! written once. Rows go by 63 bytes where the processor can move bytes at will (AVX-512 VBMI), else by 48 when they are
//! turned (AVX2).

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::data::picture::View;

/// Copies a view to `out`, `[H, W, 3]`, mirrored left to right if `flip`.
pub fn copy(view: View, flip: bool, out: &mut [u8]) {
    paste(view, view.size(), (0, 0), flip, out);
}

/// Writes a sample of `size` (H, W) that shows `part` at `at` (y, x) and is black elsewhere; the whole of it mirrored left to
/// right if `flip`. The part lies inside.
pub fn paste(part: View, size: (usize, usize), at: (usize, usize), flip: bool, out: &mut [u8]) {
    assert!(at.0 + part.height <= size.0 && at.1 + part.width <= size.1, "the part lies inside the sample");
    assert_eq!(out.len(), size.0 * size.1 * 3);
    if part.height * part.width == 0 {
        return out.fill(0);
    }
    if part.size() == size && !flip {
        return part.copy_to(out);
    }
    let line = size.1 * 3;
    let (above, rows) = out.split_at_mut(at.0 * line);
    let (rows, below) = rows.split_at_mut(part.height * line);
    above.fill(0);
    below.fill(0);
    let first = 3 * if flip { size.1 - at.1 - part.width } else { at.1 };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512bw") {
        // SAFETY: the processor has the features that the function is compiled for: they were just detected.
        return unsafe { paste_avx512(part, line, first, flip, rows) };
    }
    if flip { paste_turned(part, line, first, rows) } else { paste_straight(part, line, first, rows) }
}

/// Rows of `line` bytes that show the part's from byte `first` on, and are black elsewhere.
fn paste_straight(part: View, line: usize, first: usize, out: &mut [u8]) {
    let len = part.width * 3;
    for (y, out) in out.chunks_exact_mut(line).enumerate() {
        out[..first].fill(0);
        out[first..first + len].copy_from_slice(part.row(y));
        out[first + len..].fill(0);
    }
}

/// The same with the part's rows from right to left.
fn paste_turned(part: View, line: usize, first: usize, out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    let is_wide = is_x86_feature_detected!("avx2");
    for (y, out) in out.chunks_exact_mut(line).enumerate() {
        out[..first].fill(0);
        let (to, behind) = out[first..].split_at_mut(part.width * 3);
        behind.fill(0);
        #[cfg(target_arch = "x86_64")]
        if is_wide {
            // SAFETY: the processor has AVX2: it was just detected.
            unsafe { turn_avx2(part.row(y), to) };
            continue;
        }
        turn(part.row(y), to);
    }
}

#[inline(always)]
fn turn(row: &[u8], out: &mut [u8]) {
    for (to, from) in out.chunks_exact_mut(3).zip(row.chunks_exact(3).rev()) {
        to.copy_from_slice(from);
    }
}

/// Pixels that a turned row takes at a time, in bytes: 21 in a register of 64.
#[cfg(target_arch = "x86_64")]
const STRIP: usize = 63;

/// Which byte of a strip goes where when it is turned.
#[cfg(target_arch = "x86_64")]
const TURN_STRIP: [u8; 64] = {
    let mut table = [0; 64];
    let mut at = 0;
    while at < STRIP {
        table[at] = (STRIP - 3 - at / 3 * 3 + at % 3) as u8;
        at += 1;
    }
    table
};

/// Both, by strips of the rows: what of a strip is not the part's is never read, and comes as zeros.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn paste_avx512(part: View, line: usize, first: usize, flip: bool, out: &mut [u8]) {
    /// Bytes `from..to` of a register.
    fn bytes(from: usize, to: usize) -> __mmask64 {
        if from < to { (u64::MAX >> (64 - (to - from))) << from } else { 0 }
    }
    let len = part.width * 3;
    // SAFETY: the table is as long as a register.
    let table = unsafe { _mm512_loadu_epi8(TURN_STRIP.as_ptr().cast()) };
    for (y, out) in out.chunks_exact_mut(line).enumerate() {
        let row = part.row(y).as_ptr();
        for start in (0..line).step_by(STRIP) {
            let strip = (line - start).min(STRIP);
            let within = |place: usize| place.clamp(start, start + strip) - start;
            let (from, to) = (within(first), within(first + len));
            // The part's byte that is the strip's first, straight; or that is the last but 62, turned.
            let (read, begin) = match flip {
                false => (bytes(from, to), start as isize - first as isize),
                true => (bytes(STRIP - to, STRIP - from), (first + len) as isize - (start + STRIP) as isize),
            };
            // SAFETY: `read` masks what is outside the row, `bytes(0, strip)` what is outside the strip, and a masked byte is
            // not touched.
            unsafe {
                let pixels = _mm512_maskz_loadu_epi8(read, row.wrapping_offset(begin).cast());
                let pixels = if flip { _mm512_permutexvar_epi8(table, pixels) } else { pixels };
                _mm512_mask_storeu_epi8(out[start..].as_mut_ptr().cast(), bytes(0, strip), pixels);
            }
        }
    }
}

/// Bytes that are turned at a time: sixteen pixels.
#[cfg(target_arch = "x86_64")]
const BLOCK: usize = 48;

/// For each of the three vectors of output, which byte of each vector of input goes where; 255 puts a zero.
#[cfg(target_arch = "x86_64")]
const TURN: [[[u8; 16]; 3]; 3] = {
    let mut tables = [[[255; 16]; 3]; 3];
    let mut at = 0;
    while at < 48 {
        let from = 45 - at / 3 * 3 + at % 3;
        tables[at / 16][from / 16][at % 16] = (from % 16) as u8;
        at += 1;
    }
    tables
};

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn turn_avx2(row: &[u8], out: &mut [u8]) {
    if row.len() < BLOCK {
        return turn(row, out);
    }
    // The last pixels of the row come first.
    for (out, block) in out.chunks_exact_mut(BLOCK).zip(row.rchunks_exact(BLOCK)) {
        turn_block(block, out);
    }
    // The first ones come last, some of them a second time.
    if !row.len().is_multiple_of(BLOCK) {
        let at = out.len() - BLOCK;
        turn_block(&row[..BLOCK], &mut out[at..]);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn turn_block(block: &[u8], out: &mut [u8]) {
    let block: [__m128i; 3] = bytemuck::cast::<[u8; BLOCK], _>(block.try_into().unwrap());
    let mut turned = [_mm_setzero_si128(); 3];
    for (turned, tables) in turned.iter_mut().zip(&TURN) {
        for (from, table) in block.iter().zip(tables) {
            *turned = _mm_or_si128(*turned, _mm_shuffle_epi8(*from, bytemuck::cast(*table)));
        }
    }
    out.copy_from_slice(&bytemuck::cast::<_, [u8; BLOCK]>(turned));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way to paste, on parts of every width inside pictures that are wider.
    #[test]
    fn parts_are_pasted_pixel_by_pixel() {
        for (width, left, right) in [1, 2, 15, 16, 17, 21, 22, 32, 47, 64, 224]
            .into_iter()
            .flat_map(|w| [(w, 0, 0), (w, 3, 1), (w, 40, 70)])
        {
            let pixels: Vec<u8> = (0..5 * (width + 2) * 3).map(|i| (i * 7 % 253) as u8 + 1).collect();
            let part = View::new(&pixels, 5, width + 2).window(1, 2, 3, width);
            let size = (6, left + width + right);
            for flip in [false, true] {
                let mut out = vec![99; size.0 * size.1 * 3];
                paste(part, size, (2, left), flip, &mut out);
                let mut plain = vec![99; 3 * size.1 * 3];
                let first = 3 * if flip { right } else { left };
                match flip {
                    true => paste_turned(part, size.1 * 3, first, &mut plain),
                    false => paste_straight(part, size.1 * 3, first, &mut plain),
                }
                assert!(out[2 * size.1 * 3..5 * size.1 * 3] == plain, "{width} {left} {right} {flip}");
                for (i, value) in out.iter().enumerate() {
                    let (y, x, c) = (i / (size.1 * 3), i / 3 % size.1, i % 3);
                    let x = if flip { size.1 - 1 - x } else { x };
                    let inside = (2..5).contains(&y) && (left..left + width).contains(&x);
                    let expected = if inside { part.row(y - 2)[(x - left) * 3 + c] } else { 0 };
                    assert_eq!(*value, expected, "{width} {left} {right} {flip}: {y} {x} {c}");
                }
            }
            let (mut turned, mut copied) = (vec![0; width * 3], vec![0; 3 * width * 3]);
            turn(part.row(2), &mut turned);
            copy(part, true, &mut copied);
            assert!(copied[2 * width * 3..] == turned);
        }
        let mut out = vec![9; 2 * 2 * 3];
        let pixels = [7; 12];
        paste(View::new(&pixels, 2, 2).window(2, 0, 0, 2), (2, 2), (0, 0), true, &mut out);
        assert_eq!(out, [0; 12]);
    }
}
