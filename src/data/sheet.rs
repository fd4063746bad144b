//! A contact sheet: training samples as the model sees them, erased and mixed, with their labels.

use std::sync::Arc;

use crate::backend::batch::PlainMemory;
use crate::backend::{MixBox, Normalise, Pixels, Slot, SlotLayout, TargetKind};
use crate::error::{Error, Result};
use crate::recipe::Recipe;

use super::picture::{Picture, View};
use super::{Dataset, Loader, LoaderSpec, Mode};

/// Pixels between tiles.
const GAP: usize = 4;
/// Height of a line of text, and size of one of its dots.
const LINE: usize = 14;
const DOT: usize = 2;
/// Least width of a tile, so that a label has room.
const LEAST: usize = 96;

/// Loads `samples` training samples as a run of `recipe` does, and draws them. `batch`: which batch of that many.
/// Returns the sheet, and how many samples it shows.
pub fn of_run(
    dataset: Arc<Dataset>,
    recipe: &Recipe,
    samples: usize,
    batch: u64,
    columns: usize,
) -> Result<(Picture, usize)> {
    let classes = dataset.classes().to_vec();
    let layout = SlotLayout {
        samples,
        image: (recipe.model.image.height, recipe.model.image.width),
        pixels: Pixels::U8,
        targets: match dataset.is_multi_label() {
            true => TargetKind::Dense { classes: classes.len() },
            false => TargetKind::Labels,
        },
    };
    let slot = Slot::new(Box::new(PlainMemory::new(layout.bytes())?), layout);
    let spec = LoaderSpec {
        batch: samples,
        image: layout.image,
        mode: Mode::Train { augment: recipe.augment.clone(), seed: recipe.train.seed },
        start_batch: batch,
        workers: recipe.data.workers,
        on_bad_record: recipe.data.on_bad_record,
        exif: recipe.data.exif,
    };
    let mut loader = Loader::new(dataset, spec, vec![slot]);
    let slot = loader.next()?.ok_or_else(|| Error::new("the data set gave no batch"))?;
    Ok((draw(&slot, &classes, Normalise::INCEPTION, columns.min(samples)), slot.count))
}

/// Draws the samples of a slot in rows of `columns`. `names` are the classes. A mixed sample has both labels
/// below it, the one with the larger share first.
pub fn draw(slot: &Slot, names: &[String], normalise: Normalise, columns: usize) -> Picture {
    let (height, width) = slot.layout().image;
    let scale = LEAST.div_ceil(width).max(1);
    let tile = (height * scale + LINE, width * scale);
    let rows = slot.count.div_ceil(columns);
    let (total_h, total_w) = (rows * (tile.0 + GAP) + GAP, columns * (tile.1 + GAP) + GAP);
    let mut sheet = Picture { height: total_h, width: total_w, pixels: vec![24; total_h * total_w * 3] };
    for i in 0..slot.count {
        let (y, x) = (GAP + i / columns * (tile.0 + GAP), GAP + i % columns * (tile.1 + GAP));
        let pixels = seen(slot, i, normalise);
        let view = View::new(&pixels, height, width);
        for (dy, dx) in (0..height * scale).flat_map(|dy| (0..width * scale).map(move |dx| (dy, dx))) {
            let from = &view.row(dy / scale)[dx / scale * 3..][..3];
            put(&mut sheet, y + dy, x + dx, from);
        }
        let room = tile.1 / (4 * DOT);
        text(&mut sheet, (y + height * scale + 2, x), &label(slot, i, names, room));
    }
    sheet
}

/// One picture, `[H, W, 3]`, enlarged if it is small, with lines of text below it.
pub fn captioned(pixels: &[u8], (height, width): (usize, usize), lines: &[String]) -> Picture {
    let scale = (2 * LEAST).div_ceil(width).max(1);
    let (tall, wide) = (height * scale, width * scale);
    let total = tall + lines.len() * LINE + GAP;
    let mut sheet = Picture { height: total, width: wide, pixels: vec![24; total * wide * 3] };
    let view = View::new(pixels, height, width);
    for (y, x) in (0..tall).flat_map(|y| (0..wide).map(move |x| (y, x))) {
        put(&mut sheet, y, x, &view.row(y / scale)[x / scale * 3..][..3]);
    }
    for (i, line) in lines.iter().enumerate() {
        text(&mut sheet, (tall + GAP + i * LINE, 2), line);
    }
    sheet
}

/// A sample after erasing and mixing, as the patch embedding sees it.
fn seen(slot: &Slot, sample: usize, normalise: Normalise) -> Vec<u8> {
    let (height, width) = slot.layout().image;
    let (own, partner) =
        (erased(slot, sample, normalise), erased(slot, slot.partner()[sample] as usize, normalise));
    let cut = slot.boxes()[sample];
    let is_cut = cut.y1 > cut.y0 && cut.x1 > cut.x0;
    let outside = if is_cut { slot.pixel_lambda()[sample] } else { slot.lambda()[sample] };
    (0..height * width * 3)
        .map(|i| {
            let share =
                if is_cut && inside(cut, i / 3 / width, i / 3 % width) { 1.0 - outside } else { outside };
            let value = share * own[i] + (1.0 - share) * partner[i];
            (value * normalise.std[i % 3] + normalise.mean[i % 3]).round() as u8
        })
        .collect()
}

fn inside(cut: MixBox, y: usize, x: usize) -> bool {
    (usize::from(cut.y0)..usize::from(cut.y1)).contains(&y)
        && (usize::from(cut.x0)..usize::from(cut.x1)).contains(&x)
}

/// Normalised values of a sample after erasing.
fn erased(slot: &Slot, sample: usize, normalise: Normalise) -> Vec<f32> {
    let (len, width) = (slot.layout().image_len(), slot.layout().image.1);
    let mut values: Vec<f32> = match slot.layout().pixels {
        Pixels::U8 => {
            let pixels = &slot.images_u8()[sample * len..][..len];
            let normal =
                |(i, p): (usize, &u8)| (f32::from(*p) - normalise.mean[i % 3]) / normalise.std[i % 3];
            pixels.iter().enumerate().map(normal).collect()
        }
        Pixels::F32 => slot.images_f32()[sample * len..][..len].to_vec(),
    };
    let erase = slot.erase()[sample];
    for y in usize::from(erase.cut.y0)..usize::from(erase.cut.y1) {
        for x in usize::from(erase.cut.x0)..usize::from(erase.cut.x1) {
            let colour = erase.colour(y - usize::from(erase.cut.y0), x - usize::from(erase.cut.x0));
            values[(y * width + x) * 3..][..3].copy_from_slice(&colour);
        }
    }
    values
}

/// The names of a sample's classes, and of its partner's, with the shares.
fn label(slot: &Slot, sample: usize, names: &[String], room: usize) -> String {
    let own = |i: usize| match slot.layout().targets {
        TargetKind::Labels => short_name(&names[slot.labels()[i] as usize]).to_owned(),
        TargetKind::Dense { classes } => {
            let row = &slot.targets()[i * classes..][..classes];
            let has: Vec<&str> =
                row.iter().zip(names).filter(|(t, _)| **t > 0.0).map(|(_, n)| n.as_str()).collect();
            if has.is_empty() { "-".into() } else { has.join(",") }
        }
    };
    let (lambda, partner) = (slot.lambda()[sample], slot.partner()[sample] as usize);
    let mut parts = vec![(lambda, own(sample)), (1.0 - lambda, own(partner))];
    if lambda == 1.0 || parts[0].1 == parts[1].1 {
        parts.truncate(1);
        return parts.remove(0).1.chars().take(room).collect();
    }
    parts.sort_by(|a, b| b.0.total_cmp(&a.0));
    // Each name gets half of the room, less the digits of its share.
    let each = (room / 2).saturating_sub(5).max(2);
    let short = |(share, name): &(f32, String)| {
        format!("{} {:02.0}", name.chars().take(each).collect::<String>(), share * 100.0)
    };
    format!("{} {}", short(&parts[0]), short(&parts[1]))
}

/// A name without its WordNet id.
fn short_name(name: &str) -> &str {
    let rest = name.split_once('_').filter(|(number, _)| {
        number.len() == 9 && number.starts_with('n') && number[1..].bytes().all(|b| b.is_ascii_digit())
    });
    rest.map_or(name, |(_, rest)| rest)
}

fn put(sheet: &mut Picture, y: usize, x: usize, colour: &[u8]) {
    if y < sheet.height && x < sheet.width {
        sheet.pixels[(y * sheet.width + x) * 3..][..3].copy_from_slice(colour);
    }
}

/// Writes a line in capitals of 3×5 dots.
fn text(sheet: &mut Picture, (y, x): (usize, usize), line: &str) {
    for (i, c) in line.chars().enumerate() {
        let rows =
            FONT.iter().find(|(glyph, _)| *glyph == c.to_ascii_uppercase()).map_or([0; 5], |(_, rows)| *rows);
        for (dy, dx) in (0..5 * DOT).flat_map(|dy| (0..3 * DOT).map(move |dx| (dy, dx))) {
            if rows[dy / DOT] >> (2 - dx / DOT) & 1 == 1 {
                put(sheet, y + dy, x + i * 4 * DOT + dx, &[235; 3]);
            }
        }
    }
}

/// Dots of each row; the left one has the value 4. Other characters are blank.
#[rustfmt::skip]
const FONT: [(char, [u8; 5]); 45] = [
    ('A', [2, 5, 7, 5, 5]), ('B', [6, 5, 6, 5, 6]), ('C', [3, 4, 4, 4, 3]), ('D', [6, 5, 5, 5, 6]),
    ('E', [7, 4, 6, 4, 7]), ('F', [7, 4, 6, 4, 4]), ('G', [3, 4, 5, 5, 3]), ('H', [5, 5, 7, 5, 5]),
    ('I', [7, 2, 2, 2, 7]), ('J', [1, 1, 1, 5, 2]), ('K', [5, 5, 6, 5, 5]), ('L', [4, 4, 4, 4, 7]),
    ('M', [5, 7, 7, 5, 5]), ('N', [6, 5, 5, 5, 5]), ('O', [2, 5, 5, 5, 2]), ('P', [6, 5, 6, 4, 4]),
    ('Q', [2, 5, 5, 6, 3]), ('R', [6, 5, 6, 5, 5]), ('S', [3, 4, 2, 1, 6]), ('T', [7, 2, 2, 2, 2]),
    ('U', [5, 5, 5, 5, 7]), ('V', [5, 5, 5, 5, 2]), ('W', [5, 5, 7, 7, 5]), ('X', [5, 5, 2, 5, 5]),
    ('Y', [5, 5, 2, 2, 2]), ('Z', [7, 1, 2, 4, 7]), ('0', [7, 5, 5, 5, 7]), ('1', [2, 6, 2, 2, 7]),
    ('2', [6, 1, 2, 4, 7]), ('3', [6, 1, 2, 1, 6]), ('4', [5, 5, 7, 1, 1]), ('5', [7, 4, 6, 1, 6]),
    ('6', [3, 4, 7, 5, 7]), ('7', [7, 1, 2, 2, 2]), ('8', [7, 5, 7, 5, 7]), ('9', [7, 5, 7, 1, 6]),
    ('-', [0, 0, 7, 0, 0]), ('_', [0, 0, 0, 0, 7]), ('.', [0, 0, 0, 0, 2]), (',', [0, 0, 0, 2, 4]),
    ('%', [5, 1, 2, 4, 5]), ('\'', [2, 2, 0, 0, 0]), ('/', [1, 1, 2, 4, 4]), ('+', [0, 2, 7, 2, 0]), ('(', [2, 4, 4, 4, 2]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_show_the_samples_mixed_and_cut() {
        let layout =
            SlotLayout { samples: 3, image: (8, 8), pixels: Pixels::U8, targets: TargetKind::Labels };
        let mut slot = Slot::new(Box::new(PlainMemory::new(layout.bytes()).unwrap()), layout);
        for (i, value) in [10, 100, 200].into_iter().enumerate() {
            slot.images_u8_mut()[i * 192..(i + 1) * 192].fill(value);
            slot.labels_mut()[i] = i as i32;
        }
        slot.partner_mut().copy_from_slice(&[2, 0, 0]);
        slot.lambda_mut().copy_from_slice(&[0.5, 1.0, 0.9]);
        slot.boxes_mut()[2] = MixBox { y0: 0, x0: 0, y1: 2, x1: 8 };
        let names = ["ant", "bee", "cat"].map(String::from);
        let sheet = draw(&slot, &names, Normalise::INCEPTION, 2);
        let scale = 12;
        assert_eq!((sheet.height, sheet.width), (2 * (8 * scale + LINE + GAP) + GAP, 2 * (96 + GAP) + GAP));
        let at = |y: usize, x: usize| sheet.pixels[(y * sheet.width + x) * 3];
        assert_eq!(at(GAP, GAP), 105, "half of 10, half of 200");
        assert_eq!(at(GAP, GAP + 96 + GAP), 100);
        let second = GAP + 8 * scale + LINE + GAP;
        assert_eq!((at(second, GAP), at(second + 3 * scale, GAP)), (10, 200), "cut in above");
        assert_eq!(label(&slot, 0, &names, 24), "ant 50 cat 50");
        assert_eq!(label(&slot, 2, &names, 24), "cat 90 ant 10");
        assert_eq!(label(&slot, 1, &names, 2), "be");
    }

    #[test]
    fn a_caption_lies_below_its_picture() {
        let picture = captioned(&[200; 4 * 8 * 3], (4, 8), &["A".into(), "B".into()]);
        assert_eq!((picture.height, picture.width), (4 * 24 + 2 * LINE + GAP, 8 * 24));
        let row = |y: usize| &picture.pixels[y * picture.width * 3..][..picture.width * 3];
        assert!(row(95).iter().all(|value| *value == 200) && row(97).iter().all(|value| *value == 24));
        assert!(row(4 * 24 + GAP + 1).contains(&235) && row(4 * 24 + GAP + LINE + 1).contains(&235));
    }
}
