//! Bits and Huffman codes of an entropy-coded JPEG scan.
//!
//! One look-up of [`LOOKUP`] bits usually yields a whole coefficient: how many zeros precede it, its value,
//! and how many bits code and value take together. Longer codes are found by their position in the canonical
//! order. The reader keeps 64 bits, and is filled eight bytes at a time as long as none of them is `FF`
//! (Giesen 2018, "Reading bits in far too many ways").

/// Bits of the fast look-up.
const LOOKUP: u32 = 10;

/// A symbol and its step and value, packed: bits 0-4 length of code and value, 5-11 step to the coefficient
/// after this one ([`END`]: none), 12-15 bits of a value that the entry does not hold, 16-31 the value. 0:
/// the code is longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry(u32);

/// Step of the end of a block.
const END: u32 = 64;

impl Entry {
    fn new(length: u32, step: u32, size: u32, value: i16) -> Self {
        Self(length | step << 5 | size << 12 | u32::from(value as u16) << 16)
    }

    /// A code of `length` bits for `symbol`: zeros in the high half, bits of the value in the low half.
    fn of_symbol(length: u32, symbol: u8) -> Self {
        let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
        match (run, size) {
            (15, 0) => Self::new(length, 16, 0, 0),
            (_, 0) => Self::new(length, END, 0, 0),
            _ => Self::new(length + size, run + 1, size, 0),
        }
    }

    #[inline(always)]
    fn length(self) -> u32 {
        self.0 & 31
    }

    #[inline(always)]
    fn step(self) -> u32 {
        self.0 >> 5 & 127
    }

    #[inline(always)]
    fn size(self) -> u32 {
        self.0 >> 12 & 15
    }

    #[inline(always)]
    fn value(self) -> i16 {
        (self.0 >> 16) as i16
    }
}

/// One Huffman code.
#[derive(Debug)]
pub(super) struct Huffman {
    fast: Box<[Entry; 1 << LOOKUP]>,
    /// The same as length and symbol, for scans in which symbols have another meaning; length 0: the code is
    /// longer.
    plain: Box<[(u8, u8); 1 << LOOKUP]>,
    /// For each length: one past the largest code, as the first of 16 bits.
    limit: [u32; 17],
    /// For each length: index of its first symbol, minus its first code.
    first: [i32; 17],
    symbols: [u8; 256],
    /// A DC code has only sizes: no symbol means the end.
    defined: bool,
}

impl Default for Huffman {
    fn default() -> Self {
        Self {
            fast: Box::new([Entry(0); 1 << LOOKUP]),
            plain: Box::new([(0, 0); 1 << LOOKUP]),
            limit: [0; 17],
            first: [0; 17],
            symbols: [0; 256],
            defined: false,
        }
    }
}

impl Huffman {
    pub(super) fn is_defined(&self) -> bool {
        self.defined
    }

    pub(super) fn clear(&mut self) {
        self.defined = false;
    }

    /// From the numbers of codes of each length, 1 to 16, and the symbols in the order of their codes. `None`
    /// if this is not a code.
    pub(super) fn define(&mut self, counts: &[u8; 16], symbols: &[u8], is_dc: bool) -> Option<()> {
        self.defined = false;
        self.fast.fill(Entry(0));
        self.plain.fill((0, 0));
        self.symbols[..symbols.len()].copy_from_slice(symbols);
        let (mut code, mut index) = (0u32, 0usize);
        for length in 1..=16u32 {
            self.first[length as usize] = index as i32 - code as i32;
            for _ in 0..counts[length as usize - 1] {
                if code >> length != 0 {
                    return None;
                }
                let symbol = symbols[index];
                if is_dc && symbol > 15 {
                    return None;
                }
                if length <= LOOKUP {
                    self.enter(code, length, symbol, is_dc);
                }
                code += 1;
                index += 1;
            }
            if code > 1 << length {
                return None;
            }
            self.limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        self.defined = true;
        Some(())
    }

    fn enter(&mut self, code: u32, length: u32, symbol: u8, is_dc: bool) {
        let entry = Self::entry(length, symbol, is_dc);
        let free = LOOKUP - length;
        self.plain[(code << free) as usize..][..1 << free].fill((length as u8, symbol));
        let all = &mut self.fast[(code << free) as usize..][..1 << free];
        let size = entry.size();
        if size > free || size == 0 {
            all.fill(entry);
            return;
        }
        // The value's bits are in the look-up, too.
        let rest = free - size;
        for (bits, same) in (0u32..).zip(all.chunks_exact_mut(1 << rest)) {
            same.fill(Entry::new(length + size, entry.step(), 0, extend(bits, size)));
        }
    }

    fn entry(length: u32, symbol: u8, is_dc: bool) -> Entry {
        match (is_dc, symbol) {
            (true, 0) => Entry::new(length, 1, 0, 0),
            _ => Entry::of_symbol(length, symbol),
        }
    }

    /// The entry of a code that is longer than the look-up.
    #[cold]
    #[inline(never)]
    fn long(&self, bits: u64, is_dc: bool) -> Option<Entry> {
        let (length, symbol) = self.long_symbol(bits)?;
        Some(Self::entry(length, symbol, is_dc))
    }

    fn long_symbol(&self, bits: u64) -> Option<(u32, u8)> {
        let top = (bits >> 48) as u32;
        let length = (LOOKUP + 1..=16).find(|l| top < self.limit[*l as usize])?;
        let index = (top >> (16 - length)) as i32 + self.first[length as usize];
        Some((length, *self.symbols.get(usize::try_from(index).ok()?)?))
    }
}

/// The signed value that `size` bits stand for: negative below the middle of their range.
#[inline(always)]
fn extend(bits: u32, size: u32) -> i16 {
    let negative = bits >> (size - 1) == 0;
    (bits as i32 - if negative { (1 << size) - 1 } else { 0 }) as i16
}

/// Reads a scan bit by bit; past its end it reads zeros and remembers that.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    /// The next bits, the first one at the top; the lowest may be ahead of `count`.
    bits: u64,
    /// How many of `bits` are valid.
    count: u32,
    /// Zeros that were added after the end.
    made_up: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, bits: 0, count: 0, made_up: 0 }
    }

    /// Makes sure that 48 bits are available, if the scan has them.
    #[inline(always)]
    fn fill(&mut self) {
        if let Some(next) = self.data.get(self.at..self.at + 8) {
            let word = u64::from_be_bytes(next.try_into().unwrap());
            // A byte of FF becomes 0 and borrows.
            let inverted = !word;
            let has_ff = inverted.wrapping_sub(0x0101_0101_0101_0101) & !inverted & 0x8080_8080_8080_8080;
            if has_ff == 0 {
                self.bits |= word >> self.count;
                let bytes = (63 - self.count) >> 3;
                self.at += bytes as usize;
                self.count += bytes * 8;
                return;
            }
        }
        self.fill_bytewise();
    }

    #[inline(never)]
    fn fill_bytewise(&mut self) {
        // Bits ahead of the count are read again.
        self.bits &= !(u64::MAX.checked_shr(self.count).unwrap_or(0));
        while self.count <= 56 {
            let byte = match (self.data.get(self.at), self.data.get(self.at + 1)) {
                (Some(0xFF), Some(0)) => {
                    self.at += 2;
                    0xFF
                }
                // A marker, or the end.
                (Some(0xFF) | None, _) => {
                    self.made_up += 8;
                    0
                }
                (Some(byte), _) => {
                    self.at += 1;
                    *byte
                }
            };
            self.bits |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline(always)]
    fn drop(&mut self, count: u32) {
        self.bits <<= count;
        self.count -= count;
    }

    /// Whether bits beyond the scan's end were read.
    pub(super) fn is_overrun(&self) -> bool {
        self.made_up > self.count
    }

    /// Continues after the restart marker, which must come next.
    pub(super) fn restart(&mut self, index: usize) -> Option<()> {
        if self.is_overrun() {
            return None;
        }
        while self.data.get(self.at..self.at + 2) == Some(&[0xFF, 0xFF]) {
            self.at += 1;
        }
        let marker = [0xFF, 0xD0 + (index % 8) as u8];
        if self.data.get(self.at..self.at + 2) != Some(&marker) {
            return None;
        }
        *self = Self { at: self.at + 2, ..Self::new(self.data) };
        Some(())
    }

    /// Where to look for the next marker: there is none before this position.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// After damage: continues after the next restart marker if it has this number.
    pub(super) fn find_restart(&mut self, index: usize) -> Option<()> {
        let rest = self.data.get(self.at..)?;
        let is_marker = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0 | 0xFF);
        let at = self.at + rest.windows(2).position(is_marker)?;
        *self = Self { at, ..Self::new(self.data) };
        self.restart(index)
    }

    /// The next `count` bits, at most 16.
    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) -> u32 {
        if self.count < 32 {
            self.fill();
        }
        // In two steps, because a shift by 64 is undefined.
        let value = (self.bits >> 1 >> (63 - count)) as u32;
        self.drop(count);
        value
    }

    /// The next symbol, unchanged.
    #[inline(always)]
    pub(super) fn symbol(&mut self, code: &Huffman) -> Option<u8> {
        if self.count < 32 {
            self.fill();
        }
        let (mut length, mut symbol) = code.plain[(self.bits >> (64 - LOOKUP)) as usize];
        if length == 0 {
            let (long, found) = code.long_symbol(self.bits)?;
            (length, symbol) = (long as u8, found);
        }
        self.drop(length.into());
        Some(symbol)
    }

    /// A value of `size` bits; 0 bits stand for 0.
    #[inline(always)]
    pub(super) fn value(&mut self, size: u32) -> i16 {
        if size == 0 { 0 } else { extend(self.take(size), size) }
    }

    /// The next entry of a code, and its value.
    #[inline(always)]
    fn next(&mut self, code: &Huffman, is_dc: bool) -> Option<(u32, i16)> {
        if self.count < 32 {
            self.fill();
        }
        let mut entry = code.fast[(self.bits >> (64 - LOOKUP)) as usize];
        if entry.length() == 0 {
            entry = code.long(self.bits, is_dc)?;
        }
        let (length, size) = (entry.length(), entry.size());
        let mut value = entry.value();
        if size != 0 {
            value = extend((self.bits << (length - size) >> (64 - size)) as u32, size);
        }
        self.drop(length);
        Some((entry.step(), value))
    }

    /// Decodes a block into zeroed `coefficients` (row by row), multiplied by `quant` (in zigzag order, as in
    /// the file), and returns whether it has more than its mean. `dc` is the previous block's mean, and
    /// becomes this block's.
    #[inline(always)]
    pub(super) fn block(
        &mut self,
        codes: (&Huffman, &Huffman),
        quant: &[i16; 64],
        dc: &mut i16,
        coefficients: &mut [i16; 64],
    ) -> Option<bool> {
        let (_, difference) = self.next(codes.0, true)?;
        *dc = dc.wrapping_add(difference);
        coefficients[0] = dc.wrapping_mul(quant[0]);
        let mut k = 0;
        loop {
            let (step, value) = self.next(codes.1, false)?;
            if step == END {
                break;
            }
            k += step as usize;
            if k > 63 {
                return None;
            }
            coefficients[usize::from(ZIGZAG[k]) & 63] = value.wrapping_mul(quant[k]);
            if k == 63 {
                break;
            }
        }
        Some(k > 0)
    }

    /// Skips a block.
    #[inline(always)]
    pub(super) fn skip_block(&mut self, codes: (&Huffman, &Huffman), dc: &mut i16) -> Option<()> {
        let (_, difference) = self.next(codes.0, true)?;
        *dc = dc.wrapping_add(difference);
        let mut k = 0;
        while k < 63 {
            if self.count < 32 {
                self.fill();
            }
            let mut entry = codes.1.fast[(self.bits >> (64 - LOOKUP)) as usize];
            if entry.length() == 0 {
                entry = codes.1.long(self.bits, false)?;
            }
            self.drop(entry.length());
            let step = entry.step();
            if step == END {
                return Some(());
            }
            k += step;
        }
        (k == 63).then_some(())
    }
}

/// Row-by-row index of each coefficient, in the order of the file.
#[rustfmt::skip]
pub(super) const ZIGZAG: [u8; 64] = [
     0,  1,  8, 16,  9,  2,  3, 10,
    17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34,
    27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36,
    29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46,
    53, 60, 61, 54, 47, 55, 62, 63,
];
