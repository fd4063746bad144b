//! Copies rows of pixels, unchanged or mirrored. A row is mirrored sixteen pixels at a time.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::data::picture::View;

/// Copies a view to `out`, `[H, W, 3]`, mirrored left to right if `flip`.
pub fn copy(view: View, flip: bool, out: &mut [u8]) {
    if !flip {
        return view.copy_to(out);
    }
    assert_eq!(out.len(), view.height * view.width * 3);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2: it was just detected.
        return unsafe { turn_avx2(view, out) };
    }
    turn(view, out);
}

fn turn(view: View, out: &mut [u8]) {
    for (y, line) in out.chunks_exact_mut(view.width * 3).enumerate() {
        turn_row(view.row(y), line);
    }
}

#[inline(always)]
fn turn_row(row: &[u8], out: &mut [u8]) {
    for (to, from) in out.chunks_exact_mut(3).zip(row.chunks_exact(3).rev()) {
        to.copy_from_slice(from);
    }
}

/// Bytes that are mirrored at a time: sixteen pixels.
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
fn turn_avx2(view: View, out: &mut [u8]) {
    for (y, line) in out.chunks_exact_mut(view.width * 3).enumerate() {
        let row = view.row(y);
        if row.len() < BLOCK {
            turn_row(row, line);
            continue;
        }
        // The last pixels of the row come first.
        for (out, block) in line.chunks_exact_mut(BLOCK).zip(row.rchunks_exact(BLOCK)) {
            turn_block(block, out);
        }
        // The first pixels come last, some of them a second time.
        if row.len().is_multiple_of(BLOCK) {
            continue;
        }
        let at = line.len() - BLOCK;
        turn_block(&row[..BLOCK], &mut line[at..]);
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

    #[test]
    fn rows_are_turned_pixel_by_pixel() {
        for width in [1, 2, 15, 16, 17, 32, 47, 224] {
            let pixels: Vec<u8> = (0..3 * width * 3).map(|i| (i * 7 % 253) as u8).collect();
            let view = View::new(&pixels, 3, width);
            let (mut out, mut plain) = (vec![0; pixels.len()], vec![0; pixels.len()]);
            copy(view, true, &mut out);
            turn(view, &mut plain);
            for (i, value) in out.iter().enumerate() {
                let (y, x, c) = (i / (width * 3), i / 3 % width, i % 3);
                assert_eq!(*value, pixels[(y * width + width - 1 - x) * 3 + c], "width {width}");
            }
            assert!(out == plain);
            copy(view, false, &mut out);
            assert!(out == pixels);
        }
    }
}
