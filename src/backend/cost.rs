//! The minimum cost of an operation: floating-point operations, and bytes that have to move.
//!
//! FLOPs are those of matrix products, including attention's: two per multiply-add, as papers count them.
//! Elementwise work is limited by memory and counts as bytes. Bytes are the minimum for a device whose caches
//! keep no operand between operations: every operand is read once and every result written once, in its
//! storage type. What is both an operand and a result counts twice. Masks are drawn, not stored, and cost
//! nothing. Statistics are operands like any other. Partial sums, scratch and padding depend on the device
//! and are left out.

use std::iter::Sum;
use std::ops::AddAssign;

use super::ops::{self, Op};
use super::{
    Arena, Dtype, Epilogue, InputGrad, Join, Mat, Pixels, Pool, SlotLayout, Storage, TargetKind, Update,
    Write,
};

/// The least work that has to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Floating-point operations of matrix products.
    pub flops: u64,
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
}

impl Cost {
    /// Bytes read and written.
    pub fn bytes(&self) -> u64 {
        self.read + self.written
    }

    /// The least time in seconds on a device that does `flops_per_s` in large products and moves
    /// `bytes_per_s` in large copies, both at full speed at the same time.
    pub fn floor(&self, flops_per_s: f64, bytes_per_s: f64) -> f64 {
        (self.flops as f64 / flops_per_s).max(self.bytes() as f64 / bytes_per_s)
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.flops += other.flops;
        self.read += other.read;
        self.written += other.written;
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), |mut sum, cost| {
            sum += cost;
            sum
        })
    }
}

/// What costs depend on, besides the operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Where products read a bf16 copy of the weights, an update writes it.
    pub storage: Storage,
    /// The bound batch: the type of its pixels and targets.
    pub pixels: Pixels,
    /// The type of the bound batch's targets.
    pub targets: TargetKind,
    /// Gradients of parameters are added to: true in every micro-batch but the first.
    pub gradients: Write,
}

impl Setting {
    /// The first micro-batch of such a slot.
    pub fn new(storage: Storage, layout: SlotLayout) -> Self {
        Self { storage, pixels: layout.pixels, targets: layout.targets, gradients: Write::Assign }
    }
}

impl Op<'_> {
    /// The minimum cost of the operation: see the module.
    pub fn cost(&self, setting: &Setting) -> Cost {
        let mut count = Count { cost: Cost::default(), setting };
        match *self {
            Op::Patchify(op) => count.patchify(op),
            Op::Embed(op) => count.embed(op),
            Op::EmbedBackward(op) => count.embed_backward(op),
            Op::Matmul(op) => count.matmul(op),
            Op::MatmulBackward(op) => count.matmul_backward(op),
            Op::Gelu(op) => {
                count.reads(op.pre);
                count.writes(op.y);
            }
            Op::Swiglu(op) => {
                count.reads(op.pre);
                count.writes(op.y);
            }
            Op::SwigluBackward(op) => {
                count.reads(op.d_y);
                count.reads(op.pre);
                count.writes(op.d_pre);
            }
            Op::LayerNorm(op) => count.layernorm(op),
            Op::LayerNormBackward(op) => count.layernorm_backward(op),
            Op::Residual(op) => {
                if let Join::Branch { sum, .. } = *op.join {
                    count.join(op.join);
                    count.writes(sum);
                }
            }
            Op::ResidualBackward(op) => {
                if count.hands_on(&op) {
                    count.reads(op.d_sum);
                }
            }
            Op::Rotate(op) => {
                let samples = op.x.rows / op.heads.tokens;
                count.changes(Mat { rows: samples * op.rope.table.rows, ..op.x });
                count.reads(op.rope.table);
            }
            Op::Attention(op) => {
                count.reads(op.qkv);
                count.writes(op.o);
                count.writes(op.lse);
                count.products(2, op.o, op.heads.tokens);
            }
            Op::AttentionBackward(op) => {
                [op.qkv, op.o, op.lse, op.d_o].into_iter().for_each(|mat| count.reads(mat));
                count.writes(op.d_qkv);
                // The probabilities were not kept: QKᵀ is computed once more.
                count.products(5, op.o, op.heads.tokens);
            }
            Op::QueryAttention(op) => {
                count.reads(op.q);
                count.reads(op.kv);
                count.writes(op.p);
                count.writes(op.o);
                count.products(2, op.o, op.heads.tokens);
            }
            Op::QueryAttentionBackward(op) => {
                [op.q, op.kv, op.p, op.d_o].into_iter().for_each(|mat| count.reads(mat));
                count.writes(op.d_q);
                count.writes(op.d_kv);
                count.products(4, op.d_o, op.heads.tokens);
            }
            Op::Pool(op) => {
                count.reads(Mat { rows: op.y.rows * pooled_rows(op.pool), ..op.x });
                count.writes(op.y);
            }
            Op::PoolBackward(op) => {
                count.reads(op.d_y);
                let touched = Mat { rows: op.d_y.rows * pooled_rows(op.pool), ..op.d_x };
                if op.write.adds() { count.changes(touched) } else { count.writes(op.d_x) }
            }
            Op::Scale(op) => count.changes(op.x),
            Op::Loss(op) => count.loss(op),
            Op::BeginReport => {}
            Op::AddToReport(op) => count.reads(op.samples),
            Op::Update(update) => count.update(update),
        }
        count.cost
    }
}

/// Rows of a sample that a pool reads.
fn pooled_rows(pool: Pool) -> usize {
    match pool {
        Pool::Token { .. } => 1,
        Pool::Mean { tokens, first } => tokens - first,
    }
}

fn bytes(mat: Mat) -> u64 {
    (mat.rows * mat.cols * mat.dtype.bytes()) as u64
}

/// Adds up the cost of one operation.
struct Count<'a> {
    cost: Cost,
    setting: &'a Setting,
}

impl Count<'_> {
    fn reads(&mut self, mat: Mat) {
        self.cost.read += bytes(mat);
    }

    fn writes(&mut self, mat: Mat) {
        self.cost.written += bytes(mat);
    }

    /// Counts a matrix that is changed in place.
    fn changes(&mut self, mat: Mat) {
        self.reads(mat);
        self.writes(mat);
    }

    /// The gradient of a parameter, if the parameter is trained.
    fn gradient(&mut self, d: Option<Mat>) {
        match d {
            None => {}
            Some(d) if self.setting.gradients.adds() => self.changes(d),
            Some(d) => self.writes(d),
        }
    }

    /// A parameter that a matrix product reads.
    fn reads_operand(&mut self, mat: Mat) {
        let copied = mat.arena == Arena::Params && self.setting.storage.has_working_copy();
        self.reads(Mat { dtype: if copied { Dtype::Bf16 } else { mat.dtype }, ..mat });
    }

    /// `count` products of each row of `rows` with the rows of `tokens` tokens, all heads together.
    fn products(&mut self, count: u64, rows: Mat, tokens: usize) {
        self.cost.flops += 2 * count * (rows.rows * rows.cols * tokens) as u64;
    }

    fn patchify(&mut self, op: ops::Patchify) {
        let pixel = match self.setting.pixels {
            Pixels::U8 => 1,
            Pixels::F32 => 4,
        };
        // Pixels left over at the right and bottom are not read.
        let samples = op.patches.rows / op.grid.tokens();
        self.cost.read += (samples * op.grid.patches() * op.grid.patch_len() * pixel) as u64;
        self.writes(op.patches);
    }

    fn embed(&mut self, op: ops::Embed) {
        let extra = op.embed.extra_tokens.iter().flatten();
        let added = [op.embed.bias, op.embed.posemb];
        extra.chain(&added).for_each(|(value, _)| self.reads(*value));
        self.changes(op.x);
    }

    fn embed_backward(&mut self, op: ops::EmbedBackward) {
        let extra = op.embed.extra_tokens.iter().flatten();
        let gradients: Vec<Mat> =
            extra.chain(&[op.embed.bias, op.embed.posemb]).filter_map(|(_, d)| *d).collect();
        let stored = op.embed.dropout.rate > 0.0 || op.d_y != op.d_x;
        if stored {
            self.writes(op.d_y);
        }
        if stored || !gradients.is_empty() {
            self.reads(op.d_x);
        }
        gradients.into_iter().for_each(|d| self.gradient(Some(d)));
    }

    fn matmul(&mut self, op: ops::Matmul) {
        self.reads(op.x);
        self.reads_operand(op.w.weight);
        self.products(1, op.x, op.w.weight.rows);
        if !matches!(op.epilogue, Epilogue::None) {
            self.reads_operand(op.w.bias);
        }
        match op.epilogue {
            Epilogue::None | Epilogue::Bias | Epilogue::BiasTanh => {}
            Epilogue::BiasResidual(residual) => self.reads(residual),
            Epilogue::BiasGelu { pre, .. } => pre.into_iter().for_each(|pre| self.writes(pre)),
        }
        self.writes(op.y);
    }

    fn matmul_backward(&mut self, op: ops::MatmulBackward) {
        let wants_input = !matches!(op.d_x, InputGrad::None);
        if wants_input || op.w.d_weight.is_some() || op.w.d_bias.is_some() {
            self.reads(op.d_y);
        }
        if op.w.d_weight.is_some() {
            self.reads(op.x);
            self.products(1, op.x, op.w.weight.rows);
        }
        self.gradient(op.w.d_weight);
        self.gradient(op.w.d_bias);
        if wants_input {
            self.reads_operand(op.w.weight);
            self.products(1, op.x, op.w.weight.rows);
        }
        match op.d_x {
            InputGrad::None => {}
            InputGrad::Plain(d) => self.writes(d),
            InputGrad::Add(d) => self.changes(d),
            InputGrad::Gelu { d_pre: d, pre: of, .. } | InputGrad::Tanh { d, y: of } => {
                self.reads(of);
                self.writes(d);
            }
        }
    }

    /// What a join reads, if it adds a branch.
    fn join(&mut self, join: &Join) {
        if let Join::Branch { branch, .. } = join {
            self.reads(branch.base);
            self.reads(branch.branch);
            branch.layer_scale.into_iter().for_each(|(scale, _)| self.reads(scale));
        }
    }

    fn layernorm(&mut self, op: ops::LayerNorm) {
        match *op.join {
            Join::Ready(sum) => self.reads(sum),
            Join::Branch { sum, .. } => {
                self.join(op.join);
                self.writes(sum);
            }
        }
        self.reads(op.norm.gamma);
        self.reads(op.norm.beta);
        [op.y, op.stats.mean, op.stats.rstd].into_iter().for_each(|mat| self.writes(mat));
    }

    fn layernorm_backward(&mut self, op: ops::LayerNormBackward) {
        let read = [op.d_y, op.join.sum(), op.norm.gamma, op.stats.mean, op.stats.rstd];
        read.into_iter().for_each(|mat| self.reads(mat));
        if !op.write.adds() {
            self.writes(op.d_sum)
        } else {
            self.changes(op.d_sum)
        }
        self.gradient(op.norm.d_gamma);
        self.gradient(op.norm.d_beta);
        // `d_sum` was just computed and is not read again.
        self.hands_on(&op.residual());
    }

    /// Counts `d_branch` and its inputs besides `d_sum`. Returns false where there is nothing to do. The bias
    /// gradient is counted with its product.
    fn hands_on(&mut self, op: &ops::ResidualBackward) -> bool {
        let layer_scale = match op.join {
            Join::Ready(_) if op.d_branch.dtype == op.d_sum.dtype => return false,
            Join::Ready(_) => None,
            Join::Branch { branch, .. } => branch.layer_scale.map(|scale| (branch.branch, scale)),
        };
        self.writes(op.d_branch);
        if let Some((branch, (scale, d_scale))) = layer_scale {
            self.reads(scale);
            self.gradient(d_scale);
            d_scale.into_iter().for_each(|_| self.reads(branch));
        }
        true
    }

    fn loss(&mut self, op: ops::Loss) {
        let samples = op.samples.rows as u64;
        self.cost.read += match self.setting.targets {
            // A label, and the λ of a mixed image.
            TargetKind::Labels => 8 * samples,
            TargetKind::Dense { classes } => 4 * samples * classes as u64,
        };
        op.loss.class_weights.into_iter().for_each(|weights| self.reads(weights));
        self.reads(op.logits);
        self.writes(op.d_logits);
        self.writes(op.samples);
    }

    fn update(&mut self, update: &Update) {
        let (second, copied) =
            (update.rule.second_moments(update.segments), self.setting.storage.has_working_copy());
        let values: usize = update.segments.iter().map(|segment| segment.len).sum();
        let first = values * update.rule.first_moment().bytes();
        let average = if update.ema_decay.is_some() { 4 * values } else { 0 };
        let state = 4 * values + first + 4 * second + average;
        // Gradients are read twice: the global norm must be known before the first gradient is used.
        self.cost.read += (state + 8 * values) as u64;
        self.cost.written += (state + if copied { 2 * values } else { 0 }) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Linear, MemoryPlan, Precision, Residual, Write, cuda::Cuda};

    const ROWS: usize = 6;
    const IN: usize = 16;
    const OUT: usize = 24;

    /// `x`, `y`, and a layer whose parameters are trained.
    fn layer(storage: Storage) -> (Mat, Mat, Linear) {
        let mut plan = MemoryPlan::new(storage);
        let (x, y) = (plan.activation("x", ROWS, IN), plan.activation("y", ROWS, OUT));
        let weight = Mat { arena: Arena::Params, offset: 0, rows: OUT, cols: IN, ld: IN, dtype: Dtype::F32 };
        let bias = Mat { rows: 1, cols: OUT, ld: OUT, ..weight };
        let [d_weight, d_bias] = [weight, bias].map(|mat| Some(Mat { arena: Arena::Grads, ..mat }));
        (x, y, Linear { weight, bias, d_weight, d_bias })
    }

    fn setting(storage: Storage) -> Setting {
        Setting { storage, pixels: Pixels::U8, targets: TargetKind::Labels, gradients: Write::Assign }
    }

    #[test]
    fn a_product_moves_its_operands_once_in_the_type_that_it_reads() {
        let gpu = Cuda::storage_of(Precision::Bf16, Residual::Auto);
        for (storage, size) in [(Storage::CPU, 4), (gpu, 2)] {
            let (x, y, w) = layer(storage);
            let cost = |epilogue| Op::Matmul(ops::Matmul { x, w: &w, epilogue, y }).cost(&setting(storage));
            let flops = 2 * (ROWS * IN * OUT) as u64;
            let read = size * (ROWS * IN + OUT * IN) as u64;
            let written = size * (ROWS * OUT) as u64;
            assert_eq!(cost(Epilogue::None), Cost { flops, read, written });
            let bias = size * OUT as u64;
            assert_eq!(cost(Epilogue::Bias), Cost { flops, read: read + bias, written });
            // In place or not, the sum reads the old values.
            assert_eq!(cost(Epilogue::BiasResidual(y)), Cost { flops, read: read + bias + written, written });
        }
    }

    #[test]
    fn two_products_of_a_backward_share_their_operand() {
        let (x, d_y, w) = layer(Storage::CPU);
        let d_x = Mat { offset: 1 << 20, ..x };
        let cost = |w: &Linear, d_x, accumulate| {
            let op = Op::MatmulBackward(ops::MatmulBackward { d_y, x, w, d_x });
            op.cost(&Setting { gradients: Write::add_if(accumulate), ..setting(Storage::CPU) })
        };
        let sizes = [ROWS * OUT, ROWS * IN, OUT * IN, OUT].map(|n| 4 * n as u64);
        let ([of_y, of_x, of_w, of_bias], product) = (sizes, 2 * (ROWS * IN * OUT) as u64);
        let all = cost(&w, InputGrad::Plain(d_x), false);
        let (read, written) = (of_y + of_x + of_w, of_w + of_bias + of_x);
        assert_eq!(all, Cost { flops: 2 * product, read, written });
        // Later micro-batches add to the gradients.
        let more = cost(&w, InputGrad::Plain(d_x), true);
        assert_eq!(more, Cost { read: read + of_w + of_bias, ..all });
        let frozen = Linear { d_weight: None, d_bias: None, ..w };
        let input = cost(&frozen, InputGrad::Plain(d_x), false);
        assert_eq!(input, Cost { flops: product, read: of_y + of_w, written: of_x });
        assert_eq!(cost(&frozen, InputGrad::None, false), Cost::default());
    }

    #[test]
    fn the_floor_is_what_takes_longer() {
        let cost = Cost { flops: 600, read: 30, written: 10 };
        assert_eq!((cost.floor(100.0, 10.0), cost.floor(1000.0, 10.0)), (6.0, 4.0));
    }
}
