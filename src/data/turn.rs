//! The eight orientations of a picture, mirrored and turned, as EXIF numbers them.

use super::picture::{Part, View, Window};

/// How a stored picture becomes an upright one: flip rows and columns as stored, then exchange them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turn {
    flips_rows: bool,
    flips_columns: bool,
    transposes: bool,
}

impl Turn {
    /// From EXIF's number; any other number turns nothing.
    pub(super) fn of(orientation: u8) -> Self {
        let (flips_rows, flips_columns, transposes) = match orientation {
            2 => (false, true, false),
            3 => (true, true, false),
            4 => (true, false, false),
            5 => (false, false, true),
            6 => (true, false, true),
            7 => (true, true, true),
            8 => (false, true, true),
            _ => (false, false, false),
        };
        Self { flips_rows, flips_columns, transposes }
    }

    fn swapped<T>(self, (a, b): (T, T)) -> (T, T) {
        if self.transposes { (b, a) } else { (a, b) }
    }

    /// (H, W) of the upright picture that is stored as `of`.
    pub(super) fn size(self, of: (usize, usize)) -> (usize, usize) {
        self.swapped(of)
    }

    /// Position of a window of the upright picture in the stored one of (H, W).
    pub(super) fn stored(self, window: Window, of: (usize, usize)) -> Window {
        let (y, x) = self.swapped((window.y, window.x));
        let (height, width) = self.swapped((window.height, window.width));
        Window {
            y: if self.flips_rows { of.0 - y - height } else { y },
            x: if self.flips_columns { of.1 - x - width } else { x },
            height,
            width,
        }
    }

    /// The upright form of a stored part; `pixels` holds it if anything is turned.
    pub(super) fn upright<'a>(self, part: Part<'a>, pixels: &'a mut Vec<u8>) -> Part<'a> {
        if self == Self::default() {
            return part;
        }
        let view = part.view;
        let (height, width) = self.swapped(view.size());
        pixels.resize(height * width * 3, 0);
        let rows = |a: usize| if self.flips_rows { view.height - 1 - a } else { a };
        let columns = |b: usize| if self.flips_columns { view.width - 1 - b } else { b };
        for (y, line) in pixels.chunks_exact_mut(width * 3).enumerate() {
            for (x, pixel) in line.chunks_exact_mut(3).enumerate() {
                let (row, column) = self.swapped((y, x));
                pixel.copy_from_slice(&view.row(rows(row))[columns(column) * 3..][..3]);
            }
        }
        let corner = (
            if self.flips_rows { view.height as f64 - part.corner.0 - part.size.0 } else { part.corner.0 },
            if self.flips_columns { view.width as f64 - part.corner.1 - part.size.1 } else { part.corner.1 },
        );
        Part {
            view: View::new(pixels, height, width),
            corner: self.swapped(corner),
            size: self.swapped(part.size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pillow's `ImageOps.exif_transpose` of `abc / def`, by its table of methods: mirrored, turned by 180°,
    /// flipped, transposed, turned by 270° (counter-clockwise), transversed, turned by 90°.
    const UPRIGHT: [(u8, &[&str]); 10] = [
        (0, &["abc", "def"]),
        (1, &["abc", "def"]),
        (2, &["cba", "fed"]),
        (3, &["fed", "cba"]),
        (4, &["def", "abc"]),
        (5, &["ad", "be", "cf"]),
        (6, &["da", "eb", "fc"]),
        (7, &["fc", "eb", "da"]),
        (8, &["cf", "be", "ad"]),
        (9, &["abc", "def"]),
    ];

    #[test]
    fn all_orientations_are_exifs() {
        let stored: Vec<u8> = b"abcdef".iter().flat_map(|c| [*c; 3]).collect();
        for (orientation, expected) in UPRIGHT {
            let turn = Turn::of(orientation);
            let size = (expected.len(), expected[0].len());
            assert_eq!(turn.size((2, 3)), size, "{orientation}");
            // A window turned alone equals the window of the turned whole.
            for y in 0..size.0 {
                for x in 0..size.1 {
                    let window = Window { y, x, height: size.0 - y, width: size.1 - x };
                    let from = turn.stored(window, (2, 3));
                    let view = View::new(&stored, 2, 3).window(from.y, from.x, from.height, from.width);
                    let mut pixels = Vec::new();
                    let part = turn.upright(view.into(), &mut pixels);
                    assert_eq!((part.view.size(), part.corner), ((window.height, window.width), (0.0, 0.0)));
                    for (row, text) in expected[y..].iter().enumerate() {
                        let row: Vec<u8> = part.view.row(row).iter().step_by(3).copied().collect();
                        assert_eq!(row, &text.as_bytes()[x..], "{orientation}, from {y}, {x}");
                    }
                }
            }
        }
    }

    #[test]
    fn borders_inside_pixels_turn_with_the_picture() {
        let pixels = [0; 4 * 6 * 3];
        let part = Part { view: View::new(&pixels, 4, 6), corner: (0.25, 0.5), size: (3.0, 5.25) };
        for (orientation, corner, size) in [
            (1, (0.25, 0.5), (3.0, 5.25)),
            (3, (0.75, 0.25), (3.0, 5.25)),
            (6, (0.5, 0.75), (5.25, 3.0)),
            (8, (0.25, 0.25), (5.25, 3.0)),
        ] {
            let mut turned = Vec::new();
            let part = Turn::of(orientation).upright(part, &mut turned);
            assert_eq!((part.corner, part.size), (corner, size), "{orientation}");
        }
    }
}
