//! From pixels to tokens: normalising, mixing and cutting, then bias, extra tokens and positions.

use half::bf16;

use crate::backend::{
    Embed, Erase, Mask, Micro, MixBox, Normalise, PatchGrid, Pixels, SlotLayout, TargetKind, Write,
};
use crate::error::Result;
use crate::rng::{philox, unit};

use super::harness::{Case, ELEMENTWISE, Operand, Trial, accumulated, sum_of};

const IMAGENET: Normalise = Normalise { mean: [123.675, 116.28, 103.53], std: [58.395, 57.12, 57.375] };

/// How the samples of a batch are mixed.
#[derive(Clone, Copy, PartialEq)]
enum Mix {
    None,
    Mixup,
    Cutmix,
    /// Some samples each.
    Both,
}

#[derive(Clone, Copy)]
struct Cut {
    image: (usize, usize),
    patch: (usize, usize),
    extra: usize,
    pixels: Pixels,
    mix: Mix,
    /// A box of every sample is erased, each in another mode.
    erased: bool,
}

pub(super) fn cases() -> Vec<Case> {
    let grids = [((8, 8), (4, 4), 1), ((16, 24), (8, 4), 0), ((13, 11), (4, 3), 2), ((32, 32), (32, 32), 1)];
    let mut cases = Vec::new();
    for pixels in [Pixels::U8, Pixels::F32] {
        for (image, patch, extra) in grids {
            for mix in [Mix::None, Mix::Mixup, Mix::Cutmix, Mix::Both] {
                for erased in if matches!(mix, Mix::None | Mix::Both) { &[false, true][..] } else { &[false] }
                {
                    let cut = Cut { image, patch, extra, pixels, mix, erased: *erased };
                    cases.push(Case::new("patchify", cut.title(), move |t| patchify(t, cut)));
                }
            }
        }
    }
    for join in joins() {
        cases.push(Case::new("embed", join.title(), move |t| embed(t, join)));
    }
    for (i, join) in joins().into_iter().enumerate() {
        let accumulate = i % 2 == 1;
        // If no parameter is trained, this pass only computes the dropout.
        let frozen = i % 5 == 4 && join.dropout;
        let title = join.title() + backward_title(accumulate, frozen);
        cases.push(Case::new("embed_backward", title, move |t| embed_backward(t, join, accumulate, frozen)));
    }
    cases
}

// Patches --------------------------------------------------------------------------------------------------------

impl Cut {
    fn title(&self) -> String {
        let ((h, w), (ph, pw)) = (self.image, self.patch);
        let pixels = if self.pixels == Pixels::U8 { "u8" } else { "f32" };
        let mix = match self.mix {
            Mix::None => "",
            Mix::Mixup => ", mixup",
            Mix::Cutmix => ", cutmix",
            Mix::Both => ", mixup and cutmix",
        };
        let erased = if self.erased { ", erased" } else { "" };
        format!("{h}x{w} {pixels}, patch {ph}x{pw}, {} extra{mix}{erased}", self.extra)
    }

    /// The erased box of a sample.
    fn erase(&self, sample: usize) -> Erase {
        if !self.erased {
            return Erase::default();
        }
        let (h, w) = self.image;
        // Across the borders of patches, to the last pixel of some.
        let [y0, x0] = [1 + sample % 2, (sample + 1) % 3];
        let [y0, x0, y1, x1] = [y0, x0, (y0 + h / 2 + sample).min(h), w - sample % 2].map(|v| v as u16);
        Erase { cut: MixBox { y0, x0, y1, x1 }, seed: 77 + sample as u32, mode: [2, 1, 0, 2, 1][sample] }
    }
}

/// The value at (y, x) of an erased box: a normal draw by Box and Muller, from the words that
/// [`Erase::colour`] names.
fn drawn(erase: Erase, y: usize, x: usize, channel: usize) -> f64 {
    let counter = match erase.mode {
        0 => return 0.0,
        1 => [0; 4],
        _ => [y as u32, x as u32, 0, 0],
    };
    let words = philox(counter, [erase.seed, 0x4572_6173]).map(|word| f64::from(unit(word)));
    let (radius, turn) = if channel < 2 { (words[0], words[1]) } else { (words[2], words[3]) };
    let angle = std::f64::consts::TAU * turn;
    (-2.0 * (1.0 - radius).ln()).sqrt() * if channel == 1 { angle.sin() } else { angle.cos() }
}

/// Samples of the slot; the micro-batch takes the last three.
const SLOT: usize = 5;

fn patchify(t: &mut Trial, cut: Cut) -> Result<()> {
    let grid = PatchGrid { image: cut.image, patch: cut.patch, extra: cut.extra };
    let (first, samples) = (2, 3);
    t.micro(Micro { first, samples, global_first: 10, gradients: Write::Assign, mean_over: SLOT });
    let patches = t.output(samples * grid.tokens(), grid.patch_len());
    let (h, w) = cut.image;

    // Normalised pixels, as stored and in float64.
    let n = SLOT * h * w * 3;
    let mut stream = t.stream();
    let bytes: Vec<u8> = (0..n).map(|_| stream.next_u32() as u8).collect();
    let floats: Vec<f32> = (0..n).map(|_| bf16::from_f32(stream.range(-2.0, 2.0)).to_f32()).collect();
    let pixel = |sample: usize, y: usize, x: usize, channel: usize| {
        let erase = cut.erase(sample);
        let [y0, x0, y1, x1] = [erase.cut.y0, erase.cut.x0, erase.cut.y1, erase.cut.x1].map(usize::from);
        if (y0..y1).contains(&y) && (x0..x1).contains(&x) {
            return drawn(erase, y - y0, x - x0, channel);
        }
        let at = ((sample * h + y) * w + x) * 3 + channel;
        match cut.pixels {
            Pixels::U8 => {
                let (mean, std) = (IMAGENET.mean[channel], IMAGENET.std[channel]);
                (f64::from(bytes[at]) - f64::from(mean)) / f64::from(std)
            }
            Pixels::F32 => f64::from(floats[at]),
        }
    };

    let partner: [u32; SLOT] = [4, 3, 2, 1, 0].map(|p| if cut.mix == Mix::None { 4 - p } else { p });
    let mut lambda = [1.0f32; SLOT];
    let mut boxes = [MixBox::default(); SLOT];
    for sample in 0..SLOT {
        let cutmix = cut.mix == Mix::Cutmix || cut.mix == Mix::Both && sample % 2 == 1;
        if cut.mix != Mix::None {
            lambda[sample] = [0.75, 0.125, 0.3125, 0.59375, 0.5][sample];
        }
        if cutmix {
            // Across the borders of patches, over the whole width, and to the last pixel.
            let [y0, x0] = [h * sample / 8, w * (sample % 3) / 4];
            let [y1, x1] =
                [if sample == 4 { h } else { (y0 + h / 2).min(h) }, if sample == 3 { w } else { x0 + w / 2 }];
            let [y0, x0, y1, x1] = [y0, x0, y1, x1].map(|v| v as u16);
            boxes[sample] = MixBox { y0, x0, y1, x1 };
        }
    }

    let mut expected = Vec::new();
    let (grid_h, grid_w) = grid.grid();
    for sample in first..first + samples {
        expected.resize(expected.len() + cut.extra * grid.patch_len(), 0.0);
        let other = partner[sample] as usize;
        let (own_share, cut_out) = (f64::from(lambda[sample]), boxes[sample]);
        let is_cut = cut_out.y1 > cut_out.y0 && cut_out.x1 > cut_out.x0;
        let mixed = |y: usize, x: usize, channel: usize| {
            let (own, other) = (pixel(sample, y, x, channel), pixel(other, y, x, channel));
            if !is_cut {
                return own_share * own + (1.0 - own_share) * other;
            }
            let inside = (cut_out.y0..cut_out.y1).contains(&(y as u16))
                && (cut_out.x0..cut_out.x1).contains(&(x as u16));
            if inside { other } else { own }
        };
        for (gy, gx) in (0..grid_h).flat_map(|gy| (0..grid_w).map(move |gx| (gy, gx))) {
            for (y, x) in (0..cut.patch.0).flat_map(|y| (0..cut.patch.1).map(move |x| (y, x))) {
                expected.extend((0..3).map(|c| mixed(gy * cut.patch.0 + y, gx * cut.patch.1 + x, c)));
            }
        }
    }

    let backend = t.start()?;
    let layout =
        SlotLayout { samples: SLOT, image: cut.image, pixels: cut.pixels, targets: TargetKind::Labels };
    let mut slot = backend.new_slot(layout)?;
    match cut.pixels {
        Pixels::U8 => slot.images_u8_mut().copy_from_slice(&bytes),
        Pixels::F32 => slot.images_f32_mut().copy_from_slice(&floats),
    }
    slot.partner_mut().copy_from_slice(&partner);
    slot.lambda_mut().copy_from_slice(&lambda);
    slot.boxes_mut().copy_from_slice(&boxes);
    slot.erase_mut().copy_from_slice(&std::array::from_fn::<_, SLOT, _>(|sample| cut.erase(sample)));
    backend.bind_batch(slot)?;
    backend.patchify(grid, IMAGENET, patches.mat)?;
    t.compare("patches", &patches, &expected, ELEMENTWISE)
}

// Tokens ---------------------------------------------------------------------------------------------------------

/// Tokens with a position.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Positions {
    All,
    Patches,
    None,
}

/// Sizes and settings of an [`Embed`].
#[derive(Clone, Copy)]
struct Join {
    samples: usize,
    tokens: usize,
    width: usize,
    extra: usize,
    registers: usize,
    /// Which tokens have a row in the position embedding.
    positions: Positions,
    dropout: bool,
}

fn joins() -> Vec<Join> {
    let mut joins = Vec::new();
    for (samples, tokens, width) in [(3, 5, 60), (5, 65, 192), (1, 197, 60), (1, 257, 20)] {
        for (extra, registers, positions) in [
            (0, 0, Positions::All),
            (1, 0, Positions::All),
            (1, 0, Positions::Patches),
            (2, 0, Positions::All),
            (2, 0, Positions::Patches),
            (0, 3, Positions::All),
            (1, 3, Positions::Patches),
            (1, 1, Positions::None),
        ] {
            for dropout in [false, true] {
                joins.push(Join { samples, tokens, width, extra, registers, positions, dropout });
            }
        }
    }
    let positions = Positions::All;
    joins.push(Join { samples: 5, tokens: 1, width: 60, extra: 0, registers: 0, positions, dropout: true });
    joins
}

impl Join {
    fn title(&self) -> String {
        let positions = match self.positions {
            Positions::All => "",
            Positions::Patches => " without positions",
            Positions::None => ", no positions",
        };
        let registers = match self.registers {
            0 => String::new(),
            n => format!(" and {n} registers"),
        };
        let dropout = if self.dropout { ", dropout" } else { "" };
        format!(
            "B {} T {} D {}, {} extra{registers}{positions}{dropout}",
            self.samples, self.tokens, self.width, self.extra
        )
    }

    fn rows(&self) -> usize {
        self.samples * self.tokens
    }

    /// Tokens in front of the patches.
    fn front(&self) -> usize {
        self.extra + self.registers
    }

    fn posemb_first(&self) -> usize {
        match self.positions {
            Positions::All => 0,
            Positions::Patches => self.front(),
            Positions::None => self.tokens,
        }
    }

    fn mask(&self) -> Mask {
        Mask { rate: if self.dropout { 0.1 } else { 0.0 }, site: 96 }
    }

    /// `[R, D]`: the dropout's factors.
    fn factors(&self, t: &Trial) -> Vec<f64> {
        let (bound, elements) = (t.mask(self.mask()), self.tokens * self.width);
        let factor =
            |i: usize| if self.dropout { f64::from(bound.factor(i / elements, i % elements)) } else { 1.0 };
        (0..self.samples * elements).map(factor).collect()
    }
}

/// Parameters of an [`Embed`], each with its gradient if it is trained.
struct Parts {
    bias: (Operand, Option<Operand>),
    extra: Vec<(Operand, Option<Operand>)>,
    registers: Option<(Operand, Option<Operand>)>,
    posemb: (Operand, Option<Operand>),
}

impl Parts {
    fn new(t: &mut Trial, join: Join, trained: bool, accumulate: bool) -> Self {
        let mut part = |rows: usize| {
            let value = t.param(rows, join.width, 0.0, 1.0);
            let grad = trained.then(|| t.grad(&value, accumulate));
            (value, grad)
        };
        Self {
            bias: part(1),
            extra: (0..join.extra).map(|_| part(1)).collect(),
            registers: (join.registers > 0).then(|| part(join.registers)),
            posemb: part(join.tokens - join.posemb_first()),
        }
    }

    fn embed(&self, join: Join) -> Embed {
        let handles = |part: &(Operand, Option<Operand>)| (part.0.mat, part.1.as_ref().map(|grad| grad.mat));
        Embed {
            tokens: join.tokens,
            extra: join.front(),
            bias: handles(&self.bias),
            extra_tokens: [
                self.extra.first().map(handles),
                self.extra.get(1).map(handles),
                self.registers.as_ref().map(handles),
            ],
            posemb: handles(&self.posemb),
            posemb_first: join.posemb_first(),
            dropout: join.mask(),
        }
    }
}

fn embed(t: &mut Trial, join: Join) -> Result<()> {
    t.samples(join.samples, false);
    let parts = Parts::new(t, join, false, false);
    let x = t.stream_input(join.rows(), join.width, false);
    let factors = join.factors(t);

    let mut expected = x.values.clone();
    for (i, value) in expected.iter_mut().enumerate() {
        let (token, c) = (i / join.width % join.tokens, i % join.width);
        *value += match &parts.registers {
            _ if token < join.extra => parts.extra[token].0.values[c],
            Some((registers, _)) if token < join.front() => registers.row(token - join.extra)[c],
            _ => parts.bias.0.values[c],
        };
        if token >= join.posemb_first() {
            *value += parts.posemb.0.row(token - join.posemb_first())[c];
        }
        *value *= factors[i];
    }

    t.start()?.embed(&parts.embed(join), x.mat)?;
    t.compare("x", &x, &expected, ELEMENTWISE)
}

fn backward_title(accumulate: bool, frozen: bool) -> &'static str {
    match (accumulate, frozen) {
        (false, false) => "",
        (true, false) => ", accumulating",
        (false, true) => ", frozen",
        (true, true) => ", accumulating, frozen",
    }
}

fn embed_backward(t: &mut Trial, join: Join, accumulate: bool, frozen: bool) -> Result<()> {
    t.samples(join.samples, accumulate);
    let parts = Parts::new(t, join, !frozen, accumulate);
    let d_x = t.stream_input(join.rows(), join.width, false);
    let other = t.output(join.rows(), join.width);
    let d_y = if other.mat.dtype == d_x.mat.dtype { &d_x } else { &other };
    let factors = join.factors(t);

    let expected: Vec<f64> = d_x.values.iter().zip(factors).map(|(d, factor)| d * factor).collect();
    let width = join.width;
    let mut tokens = vec![0.0; join.tokens * width];
    for (i, d) in expected.iter().enumerate() {
        tokens[i % (join.tokens * width)] += d;
    }
    let mut bias = vec![0.0; width];
    for (i, d) in tokens.iter().enumerate().skip(join.front() * width) {
        bias[i % width] += d;
    }

    t.start()?.embed_backward(&parts.embed(join), d_x.mat, d_y.mat)?;
    // Without a dropout nothing is written: the caller has the values already.
    if join.dropout || d_y.mat == d_x.mat {
        t.compare("d_y", d_y, &expected, ELEMENTWISE)?;
    }
    let mut check = |name: &str, part: &(Operand, Option<Operand>), sum: &[f64], terms: usize| match &part.1 {
        Some(grad) => t.compare(name, grad, &accumulated(grad, accumulate, sum), sum_of(terms)),
        None => Ok(()),
    };
    check("d_bias", &parts.bias, &bias, join.rows())?;
    for (token, part) in parts.extra.iter().enumerate() {
        check("d_extra_token", part, &tokens[token * width..(token + 1) * width], join.samples)?;
    }
    if let Some(registers) = &parts.registers {
        check("d_registers", registers, &tokens[join.extra * width..join.front() * width], join.samples)?;
    }
    check("d_posemb", &parts.posemb, &tokens[join.posemb_first() * width..], join.samples)
}
