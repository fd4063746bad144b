//! The optimiser step over the flat buffers: global norm, clip, rule, weights, EMA.
//!
//! All of it is limited by memory, so each value is read once and written once: a chunk of every stream fits
//! into the core's cache between the rule and the EMA. Chunks are fixed and the norm's partial sums are added
//! in order, so neither threads nor instruction sets change a bit (no multiply is fused with an add here).

mod adafactor;
#[cfg(test)]
mod tests;

use half::bf16;

use super::compute::{Compute, Isa};
use crate::backend::shards::{BLOCK, Piece};
use crate::backend::{GroupScalars, Rule, Update};

/// The arenas that an update touches. Without ranks, `params` and `ema` share one layout, `grads` and the
/// moments another. A rank with a shard has the moments and the average of that only.
pub struct Buffers<'a> {
    pub params: &'a mut [f32],
    pub grads: &'a [f32],
    pub moment1: Moment1<'a>,
    /// Adam's second moments or Adafactor's statistics; empty for rules without second moments.
    pub moment2: &'a mut [f32],
    pub ema: Option<&'a mut [f32]>,
}

/// First moments in their stored type, which the rule determines.
pub enum Moment1<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

/// The result of an update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// The norm or the loss was not finite, so nothing was changed.
    pub skipped: bool,
    /// The signal that some rank got, or 0.
    pub signal: i32,
}

/// Elements that one thread processes at a time: five f32 streams of them fit into an L2 cache of 512 KiB.
const CHUNK: usize = BLOCK;

/// `√Σ g²` over the whole arena (padding is zero), in f64.
pub fn grad_norm(c: &Compute, grads: &[f32]) -> f64 {
    norm_of_blocks(&squares_of_blocks(c, grads))
}

/// `Σ g²` of every block of [`BLOCK`] gradients; the last one may be shorter.
pub fn squares_of_blocks(c: &Compute, grads: &[f32]) -> Vec<f64> {
    let mut squares = vec![0.0; grads.len().div_ceil(BLOCK)];
    let isa = c.isa;
    c.for_each_item(grads.chunks(BLOCK).zip(&mut squares).collect(), |(grads, sum)| {
        on_isa(isa, SumOfSquares { grads, sum });
    });
    squares
}

/// The norm from [`squares_of_blocks`], added in order.
pub fn norm_of_blocks(squares: &[f64]) -> f64 {
    squares.iter().sum::<f64>().sqrt()
}

/// One update. If the norm or the loss is not finite, nothing changes, not even moments.
///
/// # Panics
/// If the segments do not lie in the buffers in ascending order, or the moments have another type than the rule says.
pub fn update(c: &Compute, update: &Update, buffers: Buffers, loss_is_finite: bool) -> Outcome {
    let norm = grad_norm(c, buffers.grads);
    update_pieces(c, update, &Piece::whole(update.segments), buffers, norm, loss_is_finite)
}

/// The same for some of the elements, with the norm of all gradients.
pub fn update_pieces(
    c: &Compute,
    update: &Update,
    pieces: &[Piece],
    buffers: Buffers,
    norm: f64,
    loss_is_finite: bool,
) -> Outcome {
    let skipped = !(norm.is_finite() && loss_is_finite);
    if !skipped {
        let Buffers { params, grads, moment1, moment2, ema } = buffers;
        let clip = clip_factor(update, norm);
        match moment1 {
            Moment1::F32(moment1) => {
                apply(c, update, pieces, clip, Streams { params, grads, moment1, moment2, ema })
            }
            Moment1::Bf16(moment1) => {
                apply(c, update, pieces, clip, Streams { params, grads, moment1, moment2, ema })
            }
        }
    }
    Outcome { grad_norm: norm, skipped, signal: 0 }
}

/// The factor that limits the gradient's norm.
fn clip_factor(update: &Update, norm: f64) -> f32 {
    let Some(max) = update.clip.map(f64::from) else { return 1.0 };
    let factor = if update.clip_torch {
        (max / (norm + 1e-6)).min(1.0)
    } else if norm < max {
        1.0
    } else {
        max / norm
    };
    factor as f32
}

/// [`Buffers`] with the moments' type known.
struct Streams<'a, M> {
    params: &'a mut [f32],
    grads: &'a [f32],
    moment1: &'a mut [M],
    moment2: &'a mut [f32],
    ema: Option<&'a mut [f32]>,
}

fn apply<M: Moment>(c: &Compute, update: &Update, pieces: &[Piece], clip: f32, streams: Streams<M>) {
    let ema = update.ema_decay.map(|d| Ema { keep: d as f32, add: (1.0 - d) as f32 });
    assert_eq!(ema.is_some(), streams.ema.is_some(), "an EMA needs its decay and its arena");
    let isa = c.isa;
    match Elementwise::new::<M>(&update.rule, clip, update.t) {
        Some(rule) => c.for_each_item(chunks(update, pieces, streams, &rule), |chunk| {
            on_isa(isa, RuleOnChunk { rule: &rule, chunk, ema });
        }),
        None => adafactor::apply(c, update, clip, streams, ema),
    }
}

// The rules that treat every element alike -----------------------------------------------------------------------

/// A rule with its constants for this update; `clip` multiplies the gradient.
enum Elementwise {
    Sgd { clip: f32, momentum: f32, nesterov: bool },
    Adam { clip: f32, keep1: f32, add1: f32, keep2: f32, add2: f32, correct1: f32, correct2: f32, eps: f32 },
    Lion { clip: f32, keep1: f32, add1: f32, keep2: f32, add2: f32 },
}

impl Elementwise {
    /// `None` for Adafactor, which needs whole tensors.
    fn new<M: Moment>(rule: &Rule, clip: f32, t: u64) -> Option<Elementwise> {
        let t = t as f64;
        let (bf16, elementwise) = match *rule {
            Rule::Sgd { momentum, nesterov, bf16 } => {
                (bf16, Some(Elementwise::Sgd { clip, momentum: M::constant(momentum), nesterov }))
            }
            // The constants that multiply the gradient or correct the bias are exact, whatever the moment's
            // type.
            Rule::Adam { beta1, beta2, eps, bf16 } => {
                let adam = Elementwise::Adam {
                    clip,
                    keep1: M::constant(beta1),
                    add1: (1.0 - beta1) as f32,
                    keep2: beta2 as f32,
                    add2: (1.0 - beta2) as f32,
                    correct1: (1.0 / (1.0 - beta1.powf(t))) as f32,
                    correct2: (1.0 / (1.0 - beta2.powf(t)).sqrt()) as f32,
                    eps: eps as f32,
                };
                (bf16, Some(adam))
            }
            Rule::Lion { beta1, beta2, bf16 } => {
                let lion = Elementwise::Lion {
                    clip,
                    keep1: M::constant(beta1),
                    add1: (1.0 - beta1) as f32,
                    keep2: M::constant(beta2),
                    add2: (1.0 - beta2) as f32,
                };
                (bf16, Some(lion))
            }
            Rule::Adafactor { bf16, .. } => (bf16, None),
        };
        assert_eq!(bf16, M::IS_BF16, "the first moments have another type than the rule says");
        elementwise
    }

    fn has_second_moment(&self) -> bool {
        matches!(self, Elementwise::Adam { .. })
    }
}

/// A run of neighbouring elements of one segment, from every stream.
struct Chunk<'a, M> {
    theta: &'a mut [f32],
    grad: &'a [f32],
    m: &'a mut [M],
    v: &'a mut [f32],
    ema: Option<&'a mut [f32]>,
    scalars: GroupScalars,
}

/// Cuts all pieces into chunks.
fn chunks<'a, M>(
    update: &Update,
    pieces: &[Piece],
    streams: Streams<'a, M>,
    rule: &Elementwise,
) -> Vec<Chunk<'a, M>> {
    let mut params = Carver::new(streams.params);
    let mut moment1 = Carver::new(streams.moment1);
    let mut moment2 = Carver::new(streams.moment2);
    let mut ema = streams.ema.map(Carver::new);
    let mut chunks = Vec::with_capacity(pieces.iter().map(|piece| piece.len.div_ceil(CHUNK)).sum());
    for piece in pieces {
        let scalars = update.groups[update.segments[piece.segment].group];
        for start in (0..piece.len).step_by(CHUNK) {
            let len = CHUNK.min(piece.len - start);
            let (grad, moment) = (piece.grad + start, piece.moment + start);
            chunks.push(Chunk {
                theta: params.take(piece.param + start, len),
                grad: &streams.grads[grad..grad + len],
                m: moment1.take(moment, len),
                v: if rule.has_second_moment() { moment2.take(moment, len) } else { &mut [] },
                ema: ema.as_mut().map(|ema| ema.take(piece.ema + start, len)),
                scalars,
            });
        }
    }
    chunks
}

/// Hands out disjoint pieces of a buffer in ascending order.
struct Carver<'a, T> {
    rest: &'a mut [T],
    at: usize,
}

impl<'a, T> Carver<'a, T> {
    fn new(buffer: &'a mut [T]) -> Self {
        Self { rest: buffer, at: 0 }
    }

    fn take(&mut self, start: usize, len: usize) -> &'a mut [T] {
        let skip = start.checked_sub(self.at).expect("segments are in ascending order and do not overlap");
        let (piece, rest) = std::mem::take(&mut self.rest)[skip..].split_at_mut(len);
        (self.rest, self.at) = (rest, start + len);
        piece
    }
}

struct RuleOnChunk<'a, 'r, M> {
    rule: &'r Elementwise,
    chunk: Chunk<'a, M>,
    ema: Option<Ema>,
}

impl<M: Moment> Job for RuleOnChunk<'_, '_, M> {
    #[inline(always)]
    fn run(self) {
        let Chunk { theta, grad, m, v, ema, scalars } = self.chunk;
        match *self.rule {
            Elementwise::Sgd { clip, momentum, nesterov: false } => sweep(scalars, theta, grad, m, |g, m| {
                let m = g * clip + momentum * m;
                (m, m)
            }),
            Elementwise::Sgd { clip, momentum, nesterov: true } => sweep(scalars, theta, grad, m, |g, m| {
                let g = g * clip;
                let m = g + momentum * m;
                (g + momentum * m, m)
            }),
            Elementwise::Adam { clip, keep1, add1, keep2, add2, correct1, correct2, eps } => {
                sweep2(scalars, theta, grad, m, v, |g, m, v| {
                    let g = g * clip;
                    let m = keep1 * m + add1 * g;
                    let v = keep2 * v + add2 * (g * g);
                    ((m * correct1) / (v.sqrt() * correct2 + eps), m, v)
                })
            }
            Elementwise::Lion { clip, keep1, add1, keep2, add2 } => sweep(scalars, theta, grad, m, |g, m| {
                let g = g * clip;
                (sign(keep1 * m + add1 * g), keep2 * m + add2 * g)
            }),
        }
        if let (Some(decay), Some(ema)) = (self.ema, ema) {
            decay.step(ema, theta);
        }
    }
}

/// Applies `rule: (g, m) → (u, m)` to every element.
#[inline(always)]
fn sweep<M: Moment>(
    scalars: GroupScalars,
    theta: &mut [f32],
    grad: &[f32],
    m: &mut [M],
    rule: impl Fn(f32, f32) -> (f32, f32),
) {
    let n = theta.len();
    let (grad, m) = (&grad[..n], &mut m[..n]);
    for i in 0..n {
        let (u, new_m) = rule(grad[i], m[i].load());
        m[i] = M::store(new_m);
        theta[i] = moved(theta[i], u, scalars);
    }
}

/// Applies `rule: (g, m, v) → (u, m, v)` to every element.
#[inline(always)]
fn sweep2<M: Moment>(
    scalars: GroupScalars,
    theta: &mut [f32],
    grad: &[f32],
    m: &mut [M],
    v: &mut [f32],
    rule: impl Fn(f32, f32, f32) -> (f32, f32, f32),
) {
    let n = theta.len();
    let (grad, m, v) = (&grad[..n], &mut m[..n], &mut v[..n]);
    for i in 0..n {
        let (u, new_m, new_v) = rule(grad[i], m[i].load(), v[i]);
        m[i] = M::store(new_m);
        v[i] = new_v;
        theta[i] = moved(theta[i], u, scalars);
    }
}

/// `θ - lr·u - decay·θ`
#[inline(always)]
fn moved(theta: f32, u: f32, scalars: GroupScalars) -> f32 {
    theta - scalars.lr * u - scalars.decay * theta
}

/// -1, 0 or 1. `f32::signum` has no 0, and padding has to stay zero.
#[inline(always)]
fn sign(x: f32) -> f32 {
    f32::from(u8::from(x > 0.0)) - f32::from(u8::from(x < 0.0))
}

/// `e ← keep·e + add·θ`
#[derive(Clone, Copy)]
struct Ema {
    keep: f32,
    add: f32,
}

impl Ema {
    #[inline(always)]
    fn step(self, ema: &mut [f32], theta: &[f32]) {
        for (e, theta) in ema.iter_mut().zip(theta) {
            *e = self.keep * *e + self.add * theta;
        }
    }
}

// Types of the stored moment -------------------------------------------------------------------------------------

/// A stored first moment. Arithmetic is f32 in both cases.
trait Moment: Copy + Send + Sync {
    const IS_BF16: bool;
    fn load(self) -> f32;
    fn store(value: f32) -> Self;
    /// A constant that multiplies the stored moment. JAX converts it to the moment's type first: 0.9 becomes
    /// 0.8984375 with a bf16 moment. Without this, trajectories differ in the third digit.
    fn constant(value: f64) -> f32;
}

impl Moment for f32 {
    const IS_BF16: bool = false;
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(value: f32) -> f32 {
        value
    }
    fn constant(value: f64) -> f32 {
        value as f32
    }
}

impl Moment for bf16 {
    const IS_BF16: bool = true;
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Rounds to nearest, ties to even. Unlike `bf16::from_f32` it has no branch for NaN, which would prevent
    /// vectorisation: gradients are finite here.
    #[inline(always)]
    fn store(value: f32) -> bf16 {
        let bits = value.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16)
    }
    fn constant(value: f64) -> f32 {
        bf16::from_f64(value).to_f32()
    }
}

// Norm -----------------------------------------------------------------------------------------------------------

struct SumOfSquares<'a> {
    grads: &'a [f32],
    sum: &'a mut f64,
}

impl Job for SumOfSquares<'_> {
    #[inline(always)]
    fn run(self) {
        *self.sum = sum_of_squares(self.grads);
    }
}

/// Sixteen sums in parallel, then those in order: the same bits for any vector width.
#[inline(always)]
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (lane, x) in lanes.iter_mut().zip(block) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*x) * f64::from(*x);
    }
    lanes.iter().sum()
}

// Instruction sets -----------------------------------------------------------------------------------------------

/// Work that is compiled once per instruction set. `run` must be `#[inline(always)]`.
trait Job {
    fn run(self);
}

/// Runs a job with the widest vectors that `isa` and the machine have.
fn on_isa<J: Job>(isa: Isa, job: J) {
    match isa.min(Isa::best()) {
        // SAFETY: `Isa::best` found these features on this machine.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { run_avx512(job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { run_avx2(job) },
        _ => job.run(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2<J: Job>(job: J) {
    job.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512<J: Job>(job: J) {
    job.run();
}
