//! The embedded demo: ten shapes on busy backgrounds, drawn on first use, so that a fresh clone trains
//! without a download.
//!
//! The classes differ only in shape. Size, position, rotation, aspect and all colours are drawn independently
//! of the class, and half of the shapes are partly hidden. So a linear model on the pixels or on the colours
//! learns little, and a small Vision Transformer nearly everything. A shape is brighter than the background
//! and than what hides it. Picture `index` of a split is a function of (seed, split, index), in whatever
//! order and by whichever thread it is drawn.

use std::f32::consts::{FRAC_PI_4, PI, TAU};

use rayon::prelude::*;

use crate::error::{At, Result};
use crate::rng::{Domain, Stream};

use super::split::Split;

/// Pixels on a side.
pub const SIDE: usize = 32;

/// Class names in the order of their labels.
pub const CLASSES: [&str; 10] =
    ["disc", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "arrow", "house"];

/// Changes whenever the pictures change: the cache folder keeps one data set per version.
pub const VERSION: u32 = 2;

/// Supersamples along each axis of a pixel.
const SAMPLES: usize = 4;
/// Least difference in brightness (0 to 1) between a shape and the darker background or occluder.
const CONTRAST: f32 = 0.3;
/// Largest value of a channel of background and occluder.
const DIM: f32 = 0.6;
const SEED: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Shapes are rotated by at most 45°.
    Demo,
    /// Shapes are rotated by any angle.
    Hard,
}

impl Variant {
    /// The variant of this name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "demo" => Some(Variant::Demo),
            "demo-hard" => Some(Variant::Hard),
            _ => None,
        }
    }

    /// `demo` or `demo-hard`.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Demo => "demo",
            Variant::Hard => "demo-hard",
        }
    }

    fn largest_turn(self) -> f32 {
        match self {
            Variant::Demo => FRAC_PI_4,
            Variant::Hard => PI,
        }
    }
}

/// Pictures in a split.
pub fn len(split: Split) -> usize {
    match split {
        Split::Train => 20_000,
        // There is no test split, and no caller asks for one.
        Split::Val | Split::Test => 2_000,
    }
}

/// The class of picture `index`.
pub fn label(index: usize) -> usize {
    index % CLASSES.len()
}

/// Draws a whole split in parallel: `[len, SIDE, SIDE, 3]`.
pub fn draw_all(variant: Variant, split: Split) -> Vec<u8> {
    let mut pixels = vec![0; len(split) * SIDE * SIDE * 3];
    pixels
        .par_chunks_exact_mut(SIDE * SIDE * 3)
        .enumerate()
        .for_each(|(index, out)| draw(variant, split, index, out));
    pixels
}

/// Draws picture `index` of a split into `out`, `[SIDE, SIDE, 3]`.
pub fn draw(variant: Variant, split: Split, index: usize, out: &mut [u8]) {
    assert_eq!(out.len(), SIDE * SIDE * 3);
    let stream = (variant as u64) << 8 | split as u64;
    let mut draws = Stream::new(SEED, Domain::Demo, stream, index as u64);
    let scene = Scene::draw(variant, label(index), &mut draws);
    for (i, pixel) in out.chunks_exact_mut(3).enumerate() {
        let colour = scene.pixel(i / SIDE, i % SIDE);
        for (value, c) in pixel.iter_mut().zip(colour) {
            let noise = draws.range(-0.03, 0.03);
            *value = ((c + noise) * 255.0 + 0.5) as u8; // `as` saturates
        }
    }
}

/// PNG bytes of a sheet with one row per class and `columns` validation pictures in each, enlarged `zoom`
/// times.
pub fn contact_sheet(variant: Variant, columns: usize, zoom: usize) -> Result<Vec<u8>> {
    let (tile, gap) = (SIDE * zoom, zoom);
    let (height, width) = (CLASSES.len() * (tile + gap) + gap, columns * (tile + gap) + gap);
    let mut sheet = vec![255; height * width * 3];
    let mut picture = [0; SIDE * SIDE * 3];
    for class in 0..CLASSES.len() {
        for column in 0..columns {
            draw(variant, Split::Val, column * CLASSES.len() + class, &mut picture);
            let (top, left) = (gap + class * (tile + gap), gap + column * (tile + gap));
            for y in 0..tile {
                for x in 0..tile {
                    let from = (y / zoom * SIDE + x / zoom) * 3;
                    let to = ((top + y) * width + left + x) * 3;
                    sheet[to..to + 3].copy_from_slice(&picture[from..from + 3]);
                }
            }
        }
    }
    encode_png(&sheet, height, width)
}

fn encode_png(pixels: &[u8], height: usize, width: usize) -> Result<Vec<u8>> {
    use image::ImageEncoder as _;
    use image::codecs::png::{CompressionType, FilterType, PngEncoder};
    let mut png = Vec::new();
    PngEncoder::new_with_quality(&mut png, CompressionType::Best, FilterType::Adaptive)
        .write_image(pixels, width as u32, height as u32, image::ExtendedColorType::Rgb8)
        .at("contact sheet")?;
    Ok(png)
}

type Colour = [f32; 3];

/// All random properties of one picture except the noise.
struct Scene {
    class: usize,
    centre: [f32; 2],
    /// Maps pixels relative to the centre to the shape's own unit circle.
    to_shape: [[f32; 2]; 2],
    /// No part of the shape is farther from the centre.
    reach: f32,
    colour: Colour,
    ground: Ground,
    grounds: [Colour; 2],
    occluder: Option<(Occluder, Colour)>,
}

impl Scene {
    fn draw(variant: Variant, class: usize, draws: &mut Stream) -> Self {
        let radius = draws.range(8.0, 13.0);
        let turn = draws.range(-1.0, 1.0) * variant.largest_turn();
        let stretch = 1.15f32.powf(draws.range(-1.0, 1.0));
        let room = SIDE as f32 - 2.0 * radius;
        let centre = [radius + room * draws.uniform(), radius + room * draws.uniform()];
        let (sin, cos) = turn.sin_cos();
        let (sx, sy) = (1.0 / (radius * stretch), stretch / radius);
        let to_shape = [[cos * sx, sin * sx], [-sin * sy, cos * sy]];

        let grounds = [dim_colour(draws), dim_colour(draws)];
        let ground = Ground::draw(draws);
        let colour = brighter(draws, brightness(grounds[0]).max(brightness(grounds[1])) + CONTRAST);
        let occluder = draws.chance(0.5).then(|| {
            let occluder = Occluder::draw(draws, centre, radius);
            (occluder, dim_colour(draws))
        });
        let reach = radius * stretch.max(1.0 / stretch) * 1.1 + 1.0;
        Self { class, centre, to_shape, reach, colour, ground, grounds, occluder }
    }

    /// The colour of a pixel: background, shape and occluder, blended by their coverage.
    fn pixel(&self, row: usize, column: usize) -> Colour {
        let (x, y) = (column as f32 + 0.5, row as f32 + 0.5);
        let mut colour = lerp(self.grounds[0], self.grounds[1], self.ground.blend(x, y));
        colour = lerp(colour, self.colour, self.coverage(column as f32, row as f32));
        if let Some((occluder, paint)) = &self.occluder {
            colour = lerp(colour, *paint, (0.5 - occluder.outside(x, y)).clamp(0.0, 1.0));
        }
        colour
    }

    /// Share of the pixel with top left corner `(left, top)` that the shape covers.
    fn coverage(&self, left: f32, top: f32) -> f32 {
        let (dx, dy) = (left + 0.5 - self.centre[0], top + 0.5 - self.centre[1]);
        if dx * dx + dy * dy > self.reach * self.reach {
            return 0.0;
        }
        let mut inside = 0;
        for i in 0..SAMPLES * SAMPLES {
            let step = |k: usize| (k as f32 + 0.5) / SAMPLES as f32 - 0.5;
            let (px, py) = (dx + step(i % SAMPLES), dy + step(i / SAMPLES));
            let [[a, b], [c, d]] = self.to_shape;
            inside += usize::from(contains(self.class, a * px + b * py, c * px + d * py));
        }
        inside as f32 / (SAMPLES * SAMPLES) as f32
    }
}

/// Whether a point lies in the shape of `class`, upright around the origin with a radius of about 1; y points
/// down.
fn contains(class: usize, x: f32, y: f32) -> bool {
    let r2 = x * x + y * y;
    match CLASSES[class] {
        "disc" => r2 < 0.95 * 0.95,
        "ring" => r2 < 1.0 && r2 > 0.58 * 0.58,
        "square" => x.abs().max(y.abs()) < 0.82,
        "triangle" => y < 0.62 && x.abs() * 1.732 < y + 1.05,
        "star" => in_star(x, y),
        "cross" => x.abs().min(y.abs()) < 0.3 && x.abs().max(y.abs()) < 1.0,
        "heart" => {
            let (u, v) = (x * 1.15, 0.1 - y * 1.15);
            let s = u * u + v * v - 1.0;
            s * s * s < u * u * v * v * v
        }
        "crescent" => r2 < 1.0 && (x - 0.5) * (x - 0.5) + y * y > 0.78 * 0.78,
        "arrow" => (y < 0.0 && x.abs() < y + 1.0) || ((0.0..1.0).contains(&y) && x.abs() < 0.32),
        "house" => (y < 0.0 && x.abs() < (y + 1.0) * 0.95) || ((0.0..0.85).contains(&y) && x.abs() < 0.76),
        _ => unreachable!("every class has a shape"),
    }
}

/// A five-pointed star: one edge, by tenfold symmetry.
fn in_star(x: f32, y: f32) -> bool {
    const INNER: f32 = 0.45;
    let sector = TAU / 5.0;
    // The angle from the nearest tip, 0 to half a sector.
    let angle = ((x.atan2(-y)).rem_euclid(sector) - sector / 2.0).abs();
    let from_tip = sector / 2.0 - angle;
    let r = (x * x + y * y).sqrt();
    let (px, py) = (r * from_tip.cos(), r * from_tip.sin());
    // The edge runs from the tip (1, 0) to the notch at half a sector.
    let (nx, ny) = (INNER * (sector / 2.0).cos(), INNER * (sector / 2.0).sin());
    (nx - 1.0) * py - ny * (px - 1.0) > 0.0
}

/// How the two background colours are blended over the picture.
enum Ground {
    /// Along one direction.
    Gradient {
        along: Direction,
    },
    Stripes {
        along: Direction,
    },
    Checks {
        across: [Direction; 2],
    },
    /// A few soft spots: centre and inverse variance.
    Blobs([[f32; 3]; 4]),
    /// Wavy stripes.
    Waves {
        along: Direction,
        bend: Direction,
        height: f32,
    },
}

/// A plane wave's phase: `x·p[0] + y·p[1] + p[2]`.
type Direction = [f32; 3];

fn phase(d: &Direction, x: f32, y: f32) -> f32 {
    d[0] * x + d[1] * y + d[2]
}

impl Ground {
    fn draw(draws: &mut Stream) -> Self {
        let mut direction = |low: f32, high: f32| {
            let (sin, cos) = draws.range(0.0, TAU).sin_cos();
            let frequency = TAU / draws.range(low, high);
            [cos * frequency, sin * frequency, draws.range(0.0, TAU)]
        };
        let (gradient, stripes) = (direction(60.0, 100.0), direction(5.0, 14.0));
        let across = direction(8.0, 20.0);
        let waves = [direction(7.0, 16.0), direction(12.0, 30.0)];
        let side = SIDE as f32;
        match draws.below(5) {
            0 => Ground::Gradient { along: gradient },
            1 => Ground::Stripes { along: stripes },
            2 => Ground::Checks { across: [across, [-across[1], across[0], across[2]]] },
            3 => Ground::Blobs(std::array::from_fn(|_| {
                let spread = draws.range(3.0, 9.0);
                [draws.range(0.0, side), draws.range(0.0, side), 0.5 / (spread * spread)]
            })),
            _ => Ground::Waves { along: waves[0], bend: waves[1], height: draws.range(0.5, 2.5) },
        }
    }

    /// Weight of the second background colour, 0 to 1.
    fn blend(&self, x: f32, y: f32) -> f32 {
        // A sine, steepened to an edge of about a pixel.
        let edge = |phase: f32| (0.5 + 2.0 * phase.sin()).clamp(0.0, 1.0);
        match self {
            Ground::Gradient { along } => 0.5 + 0.5 * phase(along, x, y).sin(),
            Ground::Stripes { along } => edge(phase(along, x, y)),
            Ground::Checks { across: [u, v] } => {
                let (a, b) = (edge(phase(u, x, y)), edge(phase(v, x, y)));
                a + b - 2.0 * a * b
            }
            Ground::Blobs(blobs) => blobs
                .iter()
                .map(|[cx, cy, k]| (-k * ((x - cx) * (x - cx) + (y - cy) * (y - cy))).exp())
                .sum::<f32>()
                .min(1.0),
            Ground::Waves { along, bend, height } => {
                0.5 + 0.5 * (phase(along, x, y) + height * phase(bend, x, y).sin()).sin()
            }
        }
    }
}

/// What covers part of a shape.
enum Occluder {
    /// A strip across the whole picture: normal, offset along it, half width.
    Bar([f32; 2], f32, f32),
    /// Centre and radius.
    Disc([f32; 2], f32),
}

impl Occluder {
    fn draw(draws: &mut Stream, centre: [f32; 2], radius: f32) -> Self {
        let (sin, cos) = draws.range(0.0, TAU).sin_cos();
        if draws.chance(0.5) {
            let through = draws.range(-0.8, 0.8) * radius;
            let offset = centre[0] * cos + centre[1] * sin + through;
            Occluder::Bar([cos, sin], offset, draws.range(0.11, 0.2) * radius)
        } else {
            let away = draws.range(0.5, 1.0) * radius;
            Occluder::Disc([centre[0] + away * cos, centre[1] + away * sin], draws.range(0.3, 0.5) * radius)
        }
    }

    /// Distance in pixels from the edge; negative inside.
    fn outside(&self, x: f32, y: f32) -> f32 {
        match self {
            Occluder::Bar(normal, offset, half) => (normal[0] * x + normal[1] * y - offset).abs() - half,
            Occluder::Disc(centre, radius) => {
                ((x - centre[0]).powi(2) + (y - centre[1]).powi(2)).sqrt() - radius
            }
        }
    }
}

/// A colour of a background or an occluder.
fn dim_colour(draws: &mut Stream) -> Colour {
    std::array::from_fn(|_| draws.range(0.0, DIM))
}

/// A colour of at least this brightness.
fn brighter(draws: &mut Stream, least: f32) -> Colour {
    loop {
        let colour = std::array::from_fn(|_| draws.uniform());
        if brightness(colour) >= least {
            return colour;
        }
    }
}

/// Luma (Rec. 601).
fn brightness([r, g, b]: Colour) -> f32 {
    0.299 * r + 0.587 * g + 0.114 * b
}

fn lerp(a: Colour, b: Colour, t: f32) -> Colour {
    std::array::from_fn(|i| a[i] + (b[i] - a[i]) * t)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pictures(variant: Variant, split: Split, count: usize) -> Vec<Vec<u8>> {
        let draw_one = |index| {
            let mut out = vec![0; SIDE * SIDE * 3];
            draw(variant, split, index, &mut out);
            out
        };
        (0..count).into_par_iter().map(draw_one).collect()
    }

    #[test]
    fn a_picture_depends_on_variant_split_and_index_only() {
        let a = pictures(Variant::Demo, Split::Train, 30);
        assert_eq!(a, pictures(Variant::Demo, Split::Train, 30));
        let b = pictures(Variant::Demo, Split::Val, 30);
        let c = pictures(Variant::Hard, Split::Train, 30);
        for i in 0..30 {
            assert!(a[i] != b[i] && a[i] != c[i] && a[i] != a[(i + 10) % 30], "picture {i}");
        }
    }

    #[test]
    fn every_shape_covers_a_fair_part_of_its_circle() {
        for (class, name) in CLASSES.iter().enumerate() {
            let at = |i: usize| (i as f32 + 0.5) / 100.0 - 1.0;
            let cells = 200 * 200;
            let inside = (0..cells).filter(|i| contains(class, at(i % 200), at(i / 200))).count();
            let share = inside as f32 / cells as f32;
            assert!((0.2..0.75).contains(&share), "{name} covers {share}");
        }
    }

    /// Top-1 of ridge regression on one-hot targets, fitted on `train` and counted on `val`.
    fn ridge_accuracy(train: &[Vec<f64>], val: &[Vec<f64>], penalty: f64) -> f64 {
        let features = train[0].len() + 1;
        let with_one = |x: &[f64]| x.iter().copied().chain([1.0]).collect::<Vec<_>>();
        let train: Vec<_> = train.iter().map(|x| with_one(x)).collect();
        // Normal equations, one row of the lower triangle at a time.
        let mut gram: Vec<Vec<f64>> = (0..features)
            .into_par_iter()
            .map(|i| {
                let mut row = vec![0.0; i + 1];
                for x in &train {
                    let xi = x[i];
                    row.iter_mut().zip(x).for_each(|(sum, xj)| *sum += xi * xj);
                }
                row[i] += penalty;
                row
            })
            .collect();
        let mut weights = vec![vec![0.0; features]; CLASSES.len()];
        for (index, x) in train.iter().enumerate() {
            weights[label(index)].iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
        }
        // Cholesky in place, then two triangular solves per class.
        for i in 0..features {
            for j in 0..=i {
                let dot: f64 = gram[i][..j].iter().zip(&gram[j][..j]).map(|(a, b)| a * b).sum();
                let rest = gram[i][j] - dot;
                gram[i][j] = if i == j { rest.sqrt() } else { rest / gram[j][j] };
            }
        }
        for w in &mut weights {
            for i in 0..features {
                let dot: f64 = gram[i][..i].iter().zip(&w[..i]).map(|(a, b)| a * b).sum();
                w[i] = (w[i] - dot) / gram[i][i];
            }
            for i in (0..features).rev() {
                let dot: f64 = (i + 1..features).map(|k| gram[k][i] * w[k]).sum();
                w[i] = (w[i] - dot) / gram[i][i];
            }
        }
        let correct = val.iter().enumerate().filter(|(index, x)| {
            let x = with_one(x);
            let score = |w: &[f64]| w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>();
            let best = (0..CLASSES.len()).max_by(|a, b| score(&weights[*a]).total_cmp(&score(&weights[*b])));
            best == Some(label(*index))
        });
        correct.count() as f64 / val.len() as f64
    }

    #[test]
    fn neither_pixels_nor_colours_tell_the_class_to_a_linear_model() {
        let train = pictures(Variant::Demo, Split::Train, 4000);
        let val = pictures(Variant::Demo, Split::Val, 2000);
        // Means of 2×2 pixels: 768 features, on which a linear model over-fits less than on 3,072.
        let pooled = |picture: &Vec<u8>| -> Vec<f64> {
            let at = |y: usize, x: usize, c: usize| f64::from(picture[(y * SIDE + x) * 3 + c]);
            let half = SIDE / 2;
            (0..half * half * 3)
                .map(|i| {
                    let (y, x, c) = (i / 3 / half * 2, i / 3 % half * 2, i % 3);
                    (at(y, x, c) + at(y, x + 1, c) + at(y + 1, x, c) + at(y + 1, x + 1, c)) / 1020.0 - 0.5
                })
                .collect()
        };
        // Share of the pixels in each of 6×6×6 colours.
        let histogram = |picture: &Vec<u8>| -> Vec<f64> {
            let mut bins = vec![0.0; 216];
            for pixel in picture.chunks_exact(3) {
                let bin = pixel.iter().fold(0, |bin, c| bin * 6 + usize::from(*c) * 6 / 256);
                bins[bin] += 1.0 / (SIDE * SIDE) as f64;
            }
            bins
        };
        let accuracy = |features: &dyn Fn(&Vec<u8>) -> Vec<f64>, penalty| {
            let train: Vec<_> = train.iter().map(features).collect();
            let val: Vec<_> = val.iter().map(features).collect();
            ridge_accuracy(&train, &val, penalty)
        };
        // Checks the method itself: a linear model that gets the label as input learns it.
        let told = |split: &[Vec<u8>]| -> Vec<Vec<f64>> {
            let label_too = |(index, picture)| {
                let one_hot = (0..CLASSES.len()).map(move |class| f64::from(u8::from(class == label(index))));
                pooled(picture).into_iter().chain(one_hot).collect()
            };
            split.iter().enumerate().map(label_too).collect()
        };
        assert!(ridge_accuracy(&told(&train), &told(&val), 10.0) > 0.95);
        for penalty in [10.0, 1000.0] {
            let top1 = accuracy(&pooled, penalty);
            println!("ridge on pixels, penalty {penalty}: {:.1} %", 100.0 * top1);
            assert!(top1 <= 0.4, "ridge regression on pixels reaches {top1}");
        }
        for penalty in [0.001, 0.1] {
            let top1 = accuracy(&histogram, penalty);
            println!("ridge on colours, penalty {penalty}: {:.1} %", 100.0 * top1);
            assert!(top1 <= 0.3, "ridge regression on colour histograms reaches {top1}");
        }
    }

    #[test]
    fn the_picture_in_the_readme_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/demo.png");
        if std::env::var_os("VITRUM_BLESS").is_some() {
            std::fs::write(path, contact_sheet(Variant::Demo, 12, 2).unwrap()).unwrap();
        }
        let pixels = |bytes: &[u8]| image::load_from_memory(bytes).unwrap().into_rgb8().into_raw();
        let kept = pixels(&std::fs::read(path).expect("docs/demo.png, written by VITRUM_BLESS=1"));
        let drawn = pixels(&contact_sheet(Variant::Demo, 12, 2).unwrap());
        assert_eq!(kept.len(), drawn.len());
        // Another C library may round a sine differently.
        let far = kept.iter().zip(&drawn).filter(|(a, b)| a.abs_diff(**b) > 2).count();
        assert!(far * 1000 < kept.len(), "{far} values differ: run the test with VITRUM_BLESS=1");
    }
}
