//! Tags of the TIFF structure, which EXIF uses as well: numbers by their key, from the first directory.

use crate::data::header::Format;

/// The first directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tags<'a> {
    bytes: &'a [u8],
    is_little: bool,
    /// Entries of 12 bytes.
    entries: &'a [u8],
    /// Where the entries begin.
    at: usize,
}

impl<'a> Tags<'a> {
    /// `bytes` begin with the byte order.
    pub(super) fn of(bytes: &'a [u8]) -> Option<Self> {
        let is_little = match bytes.get(..4)? {
            b"II*\0" => true,
            b"MM\0*" => false,
            _ => return None,
        };
        let tags = Self { bytes, is_little, entries: &[], at: 0 };
        let at = tags.word(bytes.get(4..8)?) as usize;
        let count = tags.word(bytes.get(at..at.checked_add(2)?)?) as usize;
        let all = &bytes[at + 2..];
        // A truncated directory still has its first tags.
        let entries = &all[..(count * 12).min(all.len() / 12 * 12)];
        Some(Self { entries, at: at + 2, ..tags })
    }

    fn word(&self, bytes: &[u8]) -> u64 {
        let join = |n: u64, byte: &u8| n << 8 | u64::from(*byte);
        if self.is_little { bytes.iter().rev().fold(0, join) } else { bytes.iter().fold(0, join) }
    }

    /// Position and size of a tag's first number, and how many there are.
    fn place(&self, tag: u16) -> Option<(usize, usize, usize)> {
        let index =
            self.entries.chunks_exact(12).position(|entry| self.word(&entry[..2]) == u64::from(tag))?;
        let entry = &self.entries[index * 12..][..12];
        let size = match self.word(&entry[2..4]) {
            1 => 1,
            3 => 2,
            4 => 4,
            _ => return None,
        };
        let count = self.word(&entry[4..8]) as usize;
        // Values of up to four bytes are stored in the entry.
        let at = match count * size {
            0 => return None,
            1..=4 => self.at + index * 12 + 8,
            _ => self.word(&entry[8..]) as usize,
        };
        Some((at, size, count))
    }

    /// The first number of a tag.
    pub(super) fn number(&self, tag: u16) -> Option<u64> {
        let (at, size, _) = self.place(tag)?;
        Some(self.word(self.bytes.get(at..at.checked_add(size)?)?))
    }

    /// All numbers of a tag.
    pub(super) fn numbers(&self, tag: u16) -> Option<Vec<u64>> {
        let (at, size, count) = self.place(tag)?;
        let all = self.bytes.get(at..at.checked_add(size.checked_mul(count)?)?)?;
        Some(all.chunks_exact(size).map(|number| self.word(number)).collect())
    }

    /// Position of a tag's first number, and its bytes with `value` in them.
    pub(super) fn encoded(&self, tag: u16, value: u8) -> Option<(usize, Vec<u8>)> {
        let (at, size, _) = self.place(tag)?;
        let mut bytes = vec![0; size];
        bytes[if self.is_little { 0 } else { size - 1 }] = value;
        Some((at, bytes))
    }
}

/// Which of the eight orientations a picture has (EXIF 2.3, tag 0x0112; Pillow's `exif_transpose` reads the
/// same); 1 if the file does not say.
pub(super) fn orientation(format: Format, bytes: &[u8]) -> u8 {
    let tags = match format {
        Format::Jpeg => jpeg_exif(bytes).and_then(Tags::of),
        Format::Png => chunk(bytes, 8, |head| (be32(head) as usize, 8, 4), b"eXIf", 4).and_then(Tags::of),
        Format::WebP => {
            let exif = chunk(bytes, 12, |head| (le32(&head[4..]) as usize, 8, 0), b"EXIF", 0);
            exif.map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif)).and_then(Tags::of)
        }
        Format::Tiff => Tags::of(bytes),
        Format::Gif | Format::Bmp => None,
    };
    tags.and_then(|tags| tags.number(0x0112)).filter(|n| (1..=8).contains(n)).unwrap_or(1) as u8
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The body of the first chunk with a name. Chunks start at `at` and have heads of 8 bytes. `read` gives
/// the lengths of the body, the head and the tail; the name is at `name_at`.
fn chunk<'a>(
    bytes: &'a [u8],
    mut at: usize,
    read: impl Fn(&[u8]) -> (usize, usize, usize),
    name: &[u8],
    name_at: usize,
) -> Option<&'a [u8]> {
    loop {
        let head = bytes.get(at..at.checked_add(8)?)?;
        let (length, before, after) = read(head);
        let start = at + before;
        if head[name_at..].starts_with(name) {
            return bytes.get(start..start.checked_add(length)?);
        }
        // Chunks of WebP begin at even offsets.
        let length = if after == 0 { length.next_multiple_of(2) } else { length };
        at = start.checked_add(length)?.checked_add(after)?;
    }
}

fn jpeg_exif(bytes: &[u8]) -> Option<&[u8]> {
    let mut at = 2;
    loop {
        while bytes.get(at..at + 2)? == [0xFF, 0xFF] {
            at += 1;
        }
        let &[0xFF, marker, high, low] = bytes.get(at..at + 4)? else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if marker == 0xDA {
            return None;
        }
        if marker == 0xE1 {
            let body = bytes.get(at + 4..at + 2 + length)?;
            if let Some(exif) = body.strip_prefix(b"Exif\0\0") {
                return Some(exif);
            }
        }
        at += 2 + length;
    }
}
