//! Reads one scan of any Huffman-coded JPEG into the coefficients of its blocks: sequential or progressive,
//! one component or several, with restarts (ITU-T T.81, annexes F and G).
//!
//! A scan of several components comes in MCUs, and so covers whole MCUs. A scan of one component comes block
//! by block, and covers only blocks that hold samples of the picture.

use super::huffman::{Bits, Huffman, ZIGZAG};

/// Coefficients of a block, row by row, before dequantisation.
pub(super) type Block = [i16; 64];

/// The layout of a component's blocks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Grid {
    /// Blocks of an MCU, down and across: the component's sampling factors.
    pub(super) mcu: (usize, usize),
    /// Blocks that hold samples of the picture.
    pub(super) used: (usize, usize),
    /// Blocks in a row of whole MCUs.
    pub(super) stride: usize,
    /// The component's first block.
    pub(super) start: usize,
}

/// A component in a scan.
pub(super) struct Part<'a> {
    pub(super) grid: Grid,
    pub(super) dc: &'a Huffman,
    pub(super) ac: &'a Huffman,
}

/// Which part of the coefficients a scan has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    Sequential,
    /// Coefficients `from..=to` in zigzag order, down to the bit `low`. `is_first`: none of their bits has
    /// been read before; otherwise the scan adds one bit to each.
    Progressive {
        from: usize,
        to: usize,
        low: u32,
        is_first: bool,
    },
}

/// Reads a scan of `mcus` (down, across) into `blocks`, and returns where in `data` to look for the next
/// marker. Blocks that are missing, or damaged up to the next restart marker, are left unchanged.
pub(super) fn read(
    data: &[u8],
    coding: Coding,
    parts: &[Part],
    mcus: (usize, usize),
    restart: usize,
    blocks: &mut [Block],
) -> usize {
    let (rows, columns) = if let [only] = parts { only.grid.used } else { mcus };
    let mut bits = Bits::new(data);
    let mut state = State::default();
    let (mut mcu, mut restarts) = (0, 0);
    while mcu < rows * columns {
        if restart > 0 && mcu == (restarts + 1) * restart {
            if bits.restart(restarts).or_else(|| bits.find_restart(restarts)).is_none() {
                break;
            }
            restarts += 1;
            state = State::default();
        }
        let place = (mcu / columns, mcu % columns);
        let read = one_mcu(&mut bits, coding, parts, place, &mut state, blocks);
        mcu += 1;
        if read.is_none() || bits.is_overrun() {
            if restart == 0 || bits.find_restart(restarts).is_none() {
                break;
            }
            restarts += 1;
            state = State::default();
            mcu = restarts * restart;
        }
    }
    bits.position()
}

/// State that one block passes to the next.
#[derive(Default)]
struct State {
    /// Mean of the last block of each part.
    means: [i16; 4],
    /// Number of following blocks without further coefficients.
    run: u32,
}

fn one_mcu(
    bits: &mut Bits,
    coding: Coding,
    parts: &[Part],
    (row, column): (usize, usize),
    state: &mut State,
    blocks: &mut [Block],
) -> Option<()> {
    for (i, part) in parts.iter().enumerate() {
        let (down, across) = if parts.len() == 1 { (1, 1) } else { part.grid.mcu };
        for y in row * down..(row + 1) * down {
            for x in column * across..(column + 1) * across {
                let block = &mut blocks[part.grid.start + y * part.grid.stride + x];
                let mean = &mut state.means[i];
                match coding {
                    Coding::Sequential => {
                        bits.block((part.dc, part.ac), &[1; 64], mean, block)?;
                    }
                    Coding::Progressive { from: 0, low, is_first: true, .. } => {
                        let size = bits.symbol(part.dc)?;
                        *mean = mean.wrapping_add(bits.value(u32::from(size)));
                        block[0] = *mean << low;
                    }
                    Coding::Progressive { from: 0, low, .. } => block[0] |= (bits.take(1) as i16) << low,
                    Coding::Progressive { from, to, low, is_first: true } => {
                        first(bits, part.ac, (from, to), low, &mut state.run, block)?;
                    }
                    Coding::Progressive { from, to, low, .. } => {
                        further(bits, part.ac, (from, to), low, &mut state.run, block)?;
                    }
                }
            }
        }
    }
    Some(())
}

/// The first bits of coefficients.
fn first(
    bits: &mut Bits,
    code: &Huffman,
    (from, to): (usize, usize),
    low: u32,
    run: &mut u32,
    block: &mut Block,
) -> Option<()> {
    if *run > 0 {
        *run -= 1;
        return Some(());
    }
    let mut k = from;
    while k <= to {
        let symbol = u32::from(bits.symbol(code)?);
        let (zeros, size) = (symbol >> 4, symbol & 15);
        if size == 0 && zeros < 15 {
            *run = (1 << zeros) - 1 + bits.take(zeros);
            break;
        }
        k += zeros as usize;
        if size > 0 {
            if k > to {
                return None;
            }
            block[usize::from(ZIGZAG[k])] = bits.value(size) << low;
        }
        k += 1;
    }
    Some(())
}

/// One more bit of coefficients. Nonzero coefficients get it directly, between the codes of coefficients that
/// get their first bit.
fn further(
    bits: &mut Bits,
    code: &Huffman,
    (from, to): (usize, usize),
    low: u32,
    run: &mut u32,
    block: &mut Block,
) -> Option<()> {
    let one = 1i16 << low;
    let more = |bits: &mut Bits, coefficient: &mut i16| {
        if bits.take(1) == 1 && *coefficient & one == 0 {
            *coefficient = coefficient.wrapping_add(one * coefficient.signum());
        }
    };
    let mut k = from;
    while *run == 0 && k <= to {
        let symbol = u32::from(bits.symbol(code)?);
        let (mut zeros, size) = (symbol >> 4, symbol & 15);
        let new = match size {
            0 if zeros < 15 => {
                *run = (1 << zeros) + bits.take(zeros);
                break;
            }
            0 => 0,
            1 => one * (2 * bits.take(1) as i16 - 1),
            _ => return None,
        };
        while k <= to {
            let coefficient = &mut block[usize::from(ZIGZAG[k])];
            if *coefficient != 0 {
                more(bits, coefficient);
            } else if zeros == 0 {
                *coefficient = new;
                break;
            } else {
                zeros -= 1;
            }
            k += 1;
        }
        k += 1;
    }
    if *run > 0 {
        for k in k..=to {
            let coefficient = &mut block[usize::from(ZIGZAG[k])];
            if *coefficient != 0 {
                more(bits, coefficient);
            }
        }
        *run -= 1;
    }
    Some(())
}
