//! Tests with files that no camera writes: any sampling, order of scans, restarts, tables. [`Plan`] writes
//! them from random coefficients, and [`Plan::exact`] computes their pixels in f64, from the definitions.

use std::f64::consts::PI;

use super::huffman::ZIGZAG;
use super::*;
use crate::data::reference::seeded;
use crate::rng::Stream;

type Coefficients = [i32; 64];

#[derive(Clone, Debug)]
struct Scan {
    components: Vec<usize>,
    /// `from..=to` in zigzag order; of these, bits from `high` (exclusive; 0: all) down to `low`.
    range: (usize, usize),
    high: u32,
    low: u32,
}

#[derive(Clone, Debug)]
struct Plan {
    size: (usize, usize),
    /// Down, across.
    sampling: Vec<(usize, usize)>,
    ids: Vec<u8>,
    scans: Vec<Scan>,
    is_progressive: bool,
    /// For each scan; later scans use the last entry.
    restarts: Vec<usize>,
    /// Segments after the start-of-image marker.
    segments: Vec<u8>,
    wide_factors: bool,
    /// Fill bytes before each marker that allows them.
    fill: Vec<u8>,
    end: Vec<u8>,
    /// Coefficients of each component, in zigzag order, block by block.
    blocks: Vec<Vec<Coefficients>>,
}

fn sequential(components: Vec<Vec<usize>>) -> Vec<Scan> {
    components.into_iter().map(|components| Scan { components, range: (0, 63), high: 0, low: 0 }).collect()
}

/// Factor of coefficient `k` of component `c`.
fn factor(c: usize, k: usize) -> i32 {
    (3 + c + k / 3) as i32
}

impl Plan {
    fn new(size: (usize, usize), sampling: &[(usize, usize)], scans: Vec<Scan>, draws: &mut Stream) -> Self {
        let mut plan = Self {
            size,
            sampling: sampling.to_vec(),
            ids: (1..=sampling.len() as u8).collect(),
            scans,
            is_progressive: false,
            restarts: vec![0],
            segments: vec![],
            wide_factors: false,
            fill: vec![],
            end: vec![0xFF, 0xD9],
            blocks: vec![],
        };
        for c in 0..sampling.len() {
            let (mcus, (down, across)) = (plan.mcus(), plan.sampling[c]);
            let block = |_| {
                let mut block = [0; 64];
                let mut set = |k: usize, most: usize, draws: &mut Stream| {
                    block[k] = (draws.below(2 * most + 1) as i32 - most as i32) * 8 / factor(c, k);
                };
                set(0, 90, draws);
                for _ in 0..draws.below(6) {
                    let among = if draws.chance(0.7) { 8 } else { 63 };
                    let k = 1 + draws.below(among);
                    set(k, 30, draws);
                }
                block
            };
            plan.blocks.push((0..mcus.0 * down * mcus.1 * across).map(block).collect());
        }
        plan
    }

    fn most(&self) -> (usize, usize) {
        let most = |f: fn(&(usize, usize)) -> usize| self.sampling.iter().map(f).max().unwrap();
        // The factors of a single component have no effect.
        if self.sampling.len() == 1 { self.sampling[0] } else { (most(|s| s.0), most(|s| s.1)) }
    }

    fn mcus(&self) -> (usize, usize) {
        let most = self.most();
        (self.size.0.div_ceil(8 * most.0), self.size.1.div_ceil(8 * most.1))
    }

    /// (H, W) in samples of component `c`.
    fn samples(&self, c: usize) -> (usize, usize) {
        let most = self.most();
        let (down, across) = self.sampling[c];
        ((self.size.0 * down).div_ceil(most.0), (self.size.1 * across).div_ceil(most.1))
    }

    fn progressive(mut self, is_interleaved: bool) -> Self {
        let all: Vec<usize> = (0..self.sampling.len()).collect();
        let groups = if is_interleaved { vec![all.clone()] } else { all.iter().map(|c| vec![*c]).collect() };
        let mut scans = vec![];
        let mut add = |groups: &[Vec<usize>], range, high, low| {
            scans.extend(groups.iter().map(|g| Scan { components: g.clone(), range, high, low }));
        };
        let each: Vec<Vec<usize>> = all.iter().map(|c| vec![*c]).collect();
        add(&groups, (0, 0), 0, 1);
        add(&each, (1, 5), 0, 2);
        add(&each, (6, 63), 0, 2);
        add(&each, (1, 63), 2, 1);
        add(&groups, (0, 0), 1, 0);
        add(&each, (1, 63), 1, 0);
        (self.scans, self.is_progressive) = (scans, true);
        self
    }

    fn written(&self) -> Vec<u8> {
        let mut out = vec![0xFF, 0xD8];
        out.extend(&self.segments);
        let segment = |out: &mut Vec<u8>, marker: u8, body: &[u8]| {
            out.extend(&self.fill);
            out.extend([0xFF, marker]);
            out.extend((body.len() as u16 + 2).to_be_bytes());
            out.extend(body);
        };
        let count = self.sampling.len();
        let (height, width) = (self.size.0 as u16, self.size.1 as u16);
        let mut frame = vec![8];
        frame.extend(height.to_be_bytes().into_iter().chain(width.to_be_bytes()));
        frame.push(count as u8);
        for (c, (down, across)) in self.sampling.iter().enumerate() {
            frame.extend([self.ids[c], (across << 4 | down) as u8, c as u8]);
        }
        segment(&mut out, if self.is_progressive { 0xC2 } else { 0xC1 }, &frame);
        // DC sizes have 5 bits, and every other symbol 8.
        let mut codes = vec![0; 17];
        (codes[5], codes[0]) = (12, 0);
        codes.extend(0..12);
        codes.extend([0x10, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
        codes.extend(0..255);
        segment(&mut out, 0xC4, &codes);
        let mut known = [false; 4];
        for (i, scan) in self.scans.iter().enumerate() {
            // Each table is written before the first scan that needs it, and overwritten with nonsense
            // afterwards.
            for c in &scan.components {
                let mut table = vec![*c as u8 | if self.wide_factors { 0x10 } else { 0 }];
                for k in 0..64 {
                    let factor = if known[*c] { 77 } else { factor(*c, k) as u16 };
                    table.extend(&factor.to_be_bytes()[usize::from(!self.wide_factors)..]);
                }
                known[*c] = true;
                segment(&mut out, 0xDB, &table);
            }
            let restart = *self.restarts.get(i).or(self.restarts.last()).unwrap();
            segment(&mut out, 0xDD, &(restart as u16).to_be_bytes());
            let mut head = vec![scan.components.len() as u8];
            scan.components.iter().for_each(|c| head.extend([self.ids[*c], 0]));
            head.extend([scan.range.0 as u8, scan.range.1 as u8, (scan.high << 4 | scan.low) as u8]);
            segment(&mut out, 0xDA, &head);
            self.code(scan, restart, &mut out);
        }
        out.extend(&self.end);
        out
    }

    fn code(&self, scan: &Scan, restart: usize, out: &mut Vec<u8>) {
        let mut bits = BitWriter { out, held: 0, count: 0 };
        let is_alone = scan.components.len() == 1;
        let (rows, columns) = if is_alone {
            let (height, width) = self.samples(scan.components[0]);
            (height.div_ceil(8), width.div_ceil(8))
        } else {
            self.mcus()
        };
        let (mut means, mut run) = ([0; 4], 0);
        for mcu in 0..rows * columns {
            if restart > 0 && mcu > 0 && mcu % restart == 0 {
                bits.end_run(&mut run);
                bits.flush();
                bits.out.extend([0xFF, 0xD0 + ((mcu / restart - 1) % 8) as u8]);
                means = [0; 4];
            }
            for c in &scan.components {
                let (down, across) = if is_alone { (1, 1) } else { self.sampling[*c] };
                for y in (mcu / columns) * down..(mcu / columns + 1) * down {
                    for x in (mcu % columns) * across..(mcu % columns + 1) * across {
                        let stride = self.mcus().1 * self.sampling[*c].1;
                        let block = &self.blocks[*c][y * stride + x];
                        if scan.range.0 == 0 {
                            let value = block[0] >> scan.low;
                            if scan.high > 0 {
                                bits.put(value as u32 & 1, 1);
                            } else {
                                bits.dc(value - means[*c]);
                                means[*c] = value;
                            }
                        }
                        match (self.is_progressive, scan.range.1, scan.high) {
                            (_, 0, _) => {}
                            (false, ..) => bits.first(block, (1, 63), 0, None),
                            (true, _, 0) => bits.first(block, scan.range, scan.low, Some(&mut run)),
                            _ => bits.further(block, scan.range, scan.low),
                        }
                    }
                }
            }
        }
        bits.end_run(&mut run);
        bits.flush();
    }

    /// Pixels at a scale by the definitions: cosines; upsampling by three quarters and one quarter for a
    /// component with half of the pixels, and by copying otherwise; colours of BT.601. `[H, W, 3]`
    fn exact(&self, scale: Scale) -> Vec<f64> {
        let (height, width) = scale.size(self.size);
        let planes: Vec<Vec<f64>> = (0..self.sampling.len()).map(|c| self.plane(c, scale)).collect();
        let mut out = vec![];
        for i in 0..height * width {
            let sample = |c: usize| planes[c][i];
            let (y, cb, cr) = match planes.len() {
                1 => (sample(0), 128.0, 128.0),
                _ => (sample(0), sample(1), sample(2)),
            };
            let colours = [
                y + 1.402 * (cr - 128.0),
                y - 0.344_136_286 * (cb - 128.0) - 0.714_136_286 * (cr - 128.0),
                y + 1.772 * (cb - 128.0),
            ];
            out.extend(colours.map(|c| c.clamp(0.0, 255.0)));
        }
        out
    }

    /// A component at the picture's size.
    fn plane(&self, c: usize, scale: Scale) -> Vec<f64> {
        let (most, own) = (self.most(), self.sampling[c]);
        let ratio = (most.0 / own.0, most.1 / own.1);
        // At a smaller scale, a block gives as many samples as upsampling in both directions would make of
        // it.
        let least = 8 / scale.divisor();
        let mut side = least;
        while side < 8
            && (ratio.0 * least).is_multiple_of(2 * side)
            && (ratio.1 * least).is_multiple_of(2 * side)
        {
            side *= 2;
        }
        let (down, across) = (ratio.0 * least / side, ratio.1 * least / side);
        let (height, width) = scale.size(self.size);
        let (rows, columns) = (height.div_ceil(down), width.div_ceil(across));
        let stride = self.mcus().1 * own.1;
        let blocks: Vec<Vec<f64>> = self.blocks[c].iter().map(|b| inverse(c, b, side)).collect();
        let sample = |y: usize, x: usize| blocks[y / side * stride + x / side][y % side * side + x % side];
        let is_smooth = least > 1 && down.max(across) == 2 && !(across == 2 && columns <= 2);
        let mut out = vec![];
        for y in 0..height {
            for x in 0..width {
                let pair = |at: usize, ratio: usize, end: usize| {
                    let own = at / ratio;
                    let other =
                        if at.is_multiple_of(2) { own.saturating_sub(1) } else { (own + 1).min(end - 1) };
                    if is_smooth && ratio == 2 {
                        [(own, 0.75), (other, 0.25)]
                    } else {
                        [(own, 1.0), (own, 0.0)]
                    }
                };
                let mut sum = 0.0;
                for (row, down) in pair(y, down, rows) {
                    for (column, across) in pair(x, across, columns) {
                        sum += sample(row, column) * down * across;
                    }
                }
                out.push(sum);
            }
        }
        out
    }
}

/// `side` × `side` samples of a block: means of the samples of the full transform.
fn inverse(c: usize, block: &Coefficients, side: usize) -> Vec<f64> {
    let scale = |k: usize| if k == 0 { 0.125f64.sqrt() } else { 0.5 };
    let basis: Vec<[f64; 8]> = (0..8)
        .map(|k| std::array::from_fn(|x| scale(k) * ((2 * x + 1) as f64 * k as f64 * PI / 16.0).cos()))
        .collect();
    let group = 8 / side;
    let mean = |k: usize, x: usize| basis[k][x * group..(x + 1) * group].iter().sum::<f64>() / group as f64;
    let mut out = vec![0.0; side * side];
    for (k, place) in ZIGZAG.iter().enumerate().filter(|(k, _)| block[*k] != 0) {
        let (v, u) = (usize::from(place / 8), usize::from(place % 8));
        let value = f64::from(block[k] * factor(c, k));
        for y in 0..side {
            for x in 0..side {
                out[y * side + x] += value * mean(v, y) * mean(u, x);
            }
        }
    }
    out.into_iter().map(|sample| (sample + 128.0).clamp(0.0, 255.0)).collect()
}

struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl BitWriter<'_> {
    fn put(&mut self, value: u32, count: u32) {
        self.held = self.held << count | u64::from(value) & ((1 << count) - 1);
        self.count += count;
        while self.count >= 8 {
            self.count -= 8;
            let byte = (self.held >> self.count) as u8;
            self.out.push(byte);
            if byte == 0xFF {
                self.out.push(0);
            }
        }
    }

    fn flush(&mut self) {
        if self.count > 0 {
            self.put(0xFF, 8 - self.count);
        }
    }

    fn value(&mut self, value: i32, size: u32) {
        self.put((if value < 0 { value - 1 } else { value }) as u32, size);
    }

    fn dc(&mut self, difference: i32) {
        let size = 32 - difference.unsigned_abs().leading_zeros();
        self.put(size, 5);
        self.value(difference, size);
    }

    /// Blocks without further coefficients.
    fn end_run(&mut self, run: &mut u32) {
        if *run > 0 {
            let size = run.ilog2();
            self.put(size << 4, 8);
            self.put(*run, size);
            *run = 0;
        }
    }

    fn first(&mut self, block: &Coefficients, range: (usize, usize), low: u32, mut run: Option<&mut u32>) {
        let mut zeros = 0;
        for k in range.0..=range.1 {
            let size = 32 - (block[k].unsigned_abs() >> low).leading_zeros();
            if size == 0 {
                zeros += 1;
                continue;
            }
            if let Some(run) = &mut run {
                self.end_run(run);
            }
            while zeros > 15 {
                self.put(0xF0, 8);
                zeros -= 16;
            }
            self.put(zeros << 4 | size, 8);
            self.value((block[k].abs() >> low) * block[k].signum(), size);
            zeros = 0;
        }
        match run {
            _ if zeros == 0 => {}
            None => self.put(0, 8),
            Some(run) => {
                *run += 1;
                if *run == 0x7FFF {
                    self.end_run(run);
                }
            }
        }
    }

    fn further(&mut self, block: &Coefficients, range: (usize, usize), low: u32) {
        let (mut zeros, mut more) = (0, vec![]);
        let bits = |k: usize| block[k].unsigned_abs() >> low;
        let last = (range.0..=range.1).rev().find(|k| bits(*k) == 1).unwrap_or(0);
        for k in range.0..=range.1 {
            match bits(k) {
                0 => zeros += 1,
                1 => {
                    self.put(zeros << 4 | 1, 8);
                    self.put(u32::from(block[k] > 0), 1);
                    more.drain(..).for_each(|bit| self.put(bit, 1));
                    zeros = 0;
                }
                value => more.push(value & 1),
            }
            if zeros == 16 && k < last {
                self.put(0xF0, 8);
                more.drain(..).for_each(|bit| self.put(bit, 1));
                zeros = 0;
            }
        }
        if zeros > 0 || !more.is_empty() {
            self.put(0, 8);
            more.drain(..).for_each(|bit| self.put(bit, 1));
        }
    }
}

fn decoded(bytes: &[u8], size: (usize, usize), scale: Scale, scratch: &mut JpegScratch) -> Result<Vec<u8>> {
    let picture = collect(bytes, size, scratch)?;
    let window = Window::whole(scale.size(size));
    let mut out = vec![1; window.height * window.width * 3];
    picture.decode(scale, window, scratch, &mut out);
    Ok(out)
}

/// Rounding of samples (0.6 with the integers of the transform), of upsampling and of colours, times the
/// factor of blue.
const MOST: f64 = (0.6 + 0.6) * 1.772 + 0.6 + 0.5;

#[track_caller]
fn is_exact(plan: &Plan, scale: Scale, pixels: &[u8]) {
    let exact = plan.exact(scale);
    let off = pixels.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(
        pixels.len() == exact.len() && off < MOST,
        "{scale:?}: off by {off}: {:?}",
        Plan { blocks: vec![], ..plan.clone() }
    );
}

/// For `tests/interop/jpeg.py`: writes the file, and our pixels (none if it is refused), into the folder
/// `VITRUM_JPEGS`.
fn hand_over(plan: &Plan, scale: Scale, pixels: &[u8]) {
    let Some(dir) = std::env::var_os("VITRUM_JPEGS") else { return };
    let sampling: Vec<String> =
        plan.sampling.iter().map(|(down, across)| format!("{across}x{down}")).collect();
    let scans: Vec<String> =
        plan.scans.iter().map(|s| s.components.iter().map(usize::to_string).collect()).collect();
    let kind = if plan.is_progressive { "progressive".into() } else { scans.join("+") };
    let restarts: Vec<String> = plan.restarts.iter().map(usize::to_string).collect();
    let (height, width) = plan.size;
    let name = [
        sampling.join(","),
        kind,
        restarts.join(","),
        format!("{width}x{height}"),
        scale.divisor().to_string(),
    ];
    let path = std::path::Path::new(&dir).join(name.join("_"));
    std::fs::write(path.with_extension("jpg"), plan.written()).unwrap();
    std::fs::write(path.with_extension("rgb"), pixels).unwrap();
}

const SCALES: [Scale; 4] = [Scale::Full, Scale::Half, Scale::Quarter, Scale::Eighth];

/// All three samplings from 1×1 to 4×4: whole ratios are decoded correctly, in one scan or several, in any
/// order, with or without restarts, whole and in windows, at all scales; the others are refused by name.
#[test]
fn every_sampling_is_decoded_right_or_refused() {
    let mut draws = seeded(21);
    let mut scratch = JpegScratch::default();
    let factors: Vec<(usize, usize)> = (0..16).map(|i| (1 + i / 4, 1 + i % 4)).collect();
    let (mut right, mut refused) = (0, 0);
    for case in 0..4096 {
        let sampling = [case / 256, case / 16 % 16, case % 16].map(|i| factors[i]);
        let most = (sampling.iter().map(|s| s.0).max().unwrap(), sampling.iter().map(|s| s.1).max().unwrap());
        let divides = sampling.iter().all(|s| most.0 % s.0 == 0 && most.1 % s.1 == 0);
        let blocks: usize = sampling.iter().map(|s| s.0 * s.1).sum();
        let order = [[0, 1, 2], [2, 0, 1], [1, 2, 0]][draws.below(3)];
        let mut scans = vec![sequential(order.iter().map(|c| vec![*c]).collect())];
        if blocks <= 10 {
            scans.push(sequential(vec![order.to_vec()]));
        }
        if blocks - sampling[order[0]].0 * sampling[order[0]].1 <= 10 {
            scans.push(sequential(vec![vec![order[0]], vec![order[1], order[2]]]));
        }
        for scans in scans {
            let size = (1 + draws.below(60), 1 + draws.below(60));
            let mut plan = Plan::new(size, &sampling, scans, &mut draws);
            plan.restarts = vec![draws.below(5), draws.below(5), draws.below(3)];
            plan.segments = [b"\xFF\xE0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0".to_vec(), vec![]]
                [draws.below(2)]
            .clone();
            let bytes = plan.written();
            let scale = SCALES[draws.below(4)];
            let whole = decoded(&bytes, size, scale, &mut scratch);
            if !divides {
                let error = whole.expect_err("not whole").to_string();
                assert!(error.contains("fractional sampling"), "{sampling:?}: {error}");
                hand_over(&plan, scale, &[]);
                refused += 1;
                continue;
            }
            let whole = whole.unwrap_or_else(|e| panic!("{sampling:?}: {e}"));
            is_exact(&plan, scale, &whole);
            hand_over(&plan, scale, &whole);
            // The fast path, if it supports the picture, gives the same bits.
            let of = scale.size(size);
            if let Some(frame) = parse(&bytes, &mut scratch) {
                let mut out = vec![0; whole.len()];
                if frame.decode(scale, Window::whole(of), &mut scratch, &mut out).is_some() {
                    assert_eq!(out, whole, "{sampling:?} {scale:?}");
                }
            }
            let (y, x) = (draws.below(of.0), draws.below(of.1));
            let window = Window { y, x, height: 1 + draws.below(of.0 - y), width: 1 + draws.below(of.1 - x) };
            let mut out = vec![0; window.height * window.width * 3];
            collect(&bytes, size, &mut scratch).unwrap().decode(scale, window, &mut scratch, &mut out);
            for (row, ours) in out.chunks_exact(window.width * 3).enumerate() {
                assert_eq!(
                    ours,
                    &whole[((y + row) * of.1 + x) * 3..][..ours.len()],
                    "{sampling:?} {window:?}"
                );
            }
            right += 1;
        }
    }
    println!("{right} decoded, {refused} refused");
    assert!(right > 1000 && refused > 300);
}

#[test]
fn progressive_scans_add_up_to_the_pixels_of_one() {
    let mut draws = seeded(22);
    let mut scratch = JpegScratch::default();
    let samplings: [&[(usize, usize)]; 7] = [
        &[(1, 1)],
        &[(1, 1); 3],
        &[(2, 2), (1, 1), (1, 1)],
        &[(1, 2), (1, 1), (1, 1)],
        &[(1, 1), (2, 1), (2, 2)],
        &[(1, 4), (1, 1), (1, 2)],
        &[(4, 2), (1, 1), (1, 1)],
    ];
    for round in 0..12 {
        for sampling in samplings {
            let size = (1 + draws.below(70), 1 + draws.below(70));
            let each = sequential((0..sampling.len()).map(|c| vec![c]).collect());
            let plan = Plan::new(size, sampling, each, &mut draws);
            let scale = SCALES[round % 4];
            let expected = decoded(&plan.written(), size, scale, &mut scratch).unwrap();
            is_exact(&plan, scale, &expected);
            let mut plan = plan.progressive(draws.chance(0.5));
            plan.restarts = vec![draws.below(4), draws.below(9)];
            let pixels = decoded(&plan.written(), size, scale, &mut scratch).unwrap();
            assert!(pixels == expected, "{sampling:?} {size:?} {scale:?}");
            hand_over(&plan, scale, &pixels);
        }
    }
}

/// Everything that may stand between and after scans.
#[test]
fn marker_and_table_habits_change_nothing() {
    let mut draws = seeded(23);
    let mut scratch = JpegScratch::default();
    let sampling = [(2, 2), (1, 1), (1, 1)];
    let scans = sequential(vec![vec![2], vec![0], vec![1]]);
    let plan = Plan::new((37, 51), &sampling, scans, &mut draws);
    let expected = decoded(&plan.written(), plan.size, Scale::Full, &mut scratch).unwrap();
    is_exact(&plan, Scale::Full, &expected);
    let same = |plan: Plan, what: &str| {
        let pixels = decoded(&plan.written(), plan.size, Scale::Full, &mut JpegScratch::default());
        assert!(pixels.unwrap_or_else(|e| panic!("{what}: {e}")) == expected, "{what}");
    };
    same(Plan { restarts: vec![1, 0, 5], ..plan.clone() }, "restarts that change between scans");
    same(Plan { wide_factors: true, ..plan.clone() }, "factors of 16 bits");
    same(Plan { fill: vec![0xFF; 3], ..plan.clone() }, "fill bytes");
    same(Plan { ids: vec![200, 0, 7], ..plan.clone() }, "odd numbers of components");
    same(Plan { end: vec![], ..plan.clone() }, "no end");
    same(Plan { end: b"\xFF\xD9\xFF\xC4\0 and more".to_vec(), ..plan.clone() }, "something behind the end");
    same(
        Plan { segments: b"\xFF\xFE\0\x06\xFF\xDA\xFF\xD9\xFF\xE5\0\x02".to_vec(), ..plan.clone() },
        "comments",
    );
    same(plan.clone().progressive(true), "progressive");
}

#[test]
fn colours_are_what_the_markers_say() {
    let mut draws = seeded(24);
    let adobe = |transform: u8| [b"\xFF\xEE\0\x0EAdobe\0\x64\0\0\0\0".as_slice(), &[transform]].concat();
    let jfif = b"\xFF\xE0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0".to_vec();
    let planes = |plan: &Plan| -> Vec<Vec<f64>> {
        (0..plan.sampling.len()).map(|c| plan.plane(c, Scale::Full)).collect()
    };
    let all = |n: usize| sequential(vec![(0..n).collect()]);
    for (segments, ids, is_rgb) in [
        (adobe(0), b"\x01\x02\x03", true),
        (vec![], b"RGB", true),
        ([jfif.clone(), adobe(0)].concat(), b"\x01\x02\x03", false),
        (jfif, b"RGB", false),
        (adobe(1), b"RGB", false),
        (adobe(9), b"\x01\x02\x03", false),
    ] {
        let plan = Plan::new((20, 30), &[(1, 1); 3], all(3), &mut draws);
        let plan = Plan { segments, ids: ids.to_vec(), ..plan };
        let pixels = decoded(&plan.written(), plan.size, Scale::Full, &mut JpegScratch::default()).unwrap();
        if !is_rgb {
            is_exact(&plan, Scale::Full, &pixels);
            continue;
        }
        let planes = planes(&plan);
        for (i, value) in pixels.iter().enumerate() {
            assert!((f64::from(*value) - planes[i % 3][i / 3]).abs() < 0.7, "RGB");
        }
    }
    for (segments, is_ycc) in [(vec![], false), (adobe(0), false), (adobe(2), true)] {
        let plan = Plan::new((20, 30), &[(1, 2), (1, 1), (1, 1), (1, 2)], all(4), &mut draws);
        let plan = Plan { segments, ..plan };
        let pixels = decoded(&plan.written(), plan.size, Scale::Full, &mut JpegScratch::default()).unwrap();
        let (planes, exact) = (planes(&plan), plan.exact(Scale::Full));
        for (i, value) in pixels.iter().enumerate() {
            let ink = if is_ycc { exact[i] } else { 255.0 - planes[i % 3][i / 3] };
            let light = planes[3][i / 3];
            let expected = light - ink * light / 255.0;
            assert!((f64::from(*value) - expected).abs() < MOST + 1.5, "{is_ycc} {value} {expected}");
        }
    }
}

#[test]
fn what_cannot_be_decoded_is_refused_by_name() {
    let mut draws = seeded(25);
    let each = |n: usize| sequential((0..n).map(|c| vec![c]).collect());
    let mut plan =
        |sampling: &[(usize, usize)], scans: Vec<Scan>| Plan::new((9, 9), sampling, scans, &mut draws);
    let three = plan(&[(1, 1); 3], each(3));
    let two_frames = [&three.written()[..2], &three.written()[2..21], &three.written()[2..]].concat();
    let mut five = plan(&[(1, 1); 4], each(4)).written();
    five[11] = 5;
    let twice = each(3).into_iter().chain(each(1)).collect();
    let cases = [
        (plan(&[(1, 1); 2], each(2)).written(), "2 components"),
        (five, "5 components"),
        (plan(&[(3, 1), (2, 1), (1, 1)], each(3)).written(), "fractional sampling"),
        (plan(&[(2, 2); 3], sequential(vec![vec![0, 1, 2]])).written(), "12 blocks in an MCU"),
        (Plan { ids: vec![1, 2, 2], ..three.clone() }.written(), "two of the JPEG's components"),
        (plan(&[(1, 1); 3], each(2)).written(), "ends before component 3 of 3"),
        (Plan { end: vec![], ..plan(&[(1, 1); 3], vec![]) }.written(), "ends before component 1 of 3"),
        (two_frames, "two frame headers"),
        (
            Plan { is_progressive: true, ..plan(&[(1, 1); 3], twice) }.written(),
            "a scan of coefficients 0 to 63",
        ),
    ];
    for (bytes, reason) in cases {
        let error =
            decoded(&bytes, (9, 9), Scale::Full, &mut JpegScratch::default()).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}, not {reason}");
        println!("{error}");
    }
}

/// Every prefix and many damaged forms give a picture or an error, and use memory in proportion to the file's
/// length.
#[test]
fn damage_of_odd_files_is_a_picture_or_an_error() {
    let mut draws = seeded(26);
    let mut scratch = JpegScratch::default();
    let sampling = [(1, 2), (1, 1), (2, 1)];
    for is_progressive in [false, true] {
        let plan = Plan::new((40, 33), &sampling, sequential(vec![vec![0], vec![1, 2]]), &mut draws);
        let plan = if is_progressive { plan.progressive(true) } else { plan };
        let bytes = Plan { restarts: vec![3], ..plan }.written();
        for case in 0..2000 {
            let mut bytes = bytes.clone();
            if case % 2 == 0 {
                bytes.truncate(draws.below(bytes.len()));
            }
            for _ in 0..draws.below(4) {
                let at = draws.below(bytes.len().max(1));
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = draws.next_u32() as u8;
                }
            }
            let Ok(header) = crate::data::header::header(&bytes) else { continue };
            let size = (header.height, header.width);
            if let Ok(picture) = collect(&bytes, size, &mut scratch) {
                let scale = SCALES[draws.below(4)];
                let of = scale.size(size);
                let window = Window { y: of.0 / 2, x: of.1 / 2, height: 1, width: of.1 - of.1 / 2 };
                let mut out = vec![0; window.width * 3];
                picture.decode(scale, window, &mut scratch, &mut out);
            }
        }
        assert!(scratch.memory() < bytes.len() * 8 * 128 * 4);
    }
}
