//! The CPU: every operation of [`Backend`] over buffers in main memory, in f32, on all cores.
//!
//! This file turns handles into matrices, checks that their shapes fit, and calls one kernel per operation. Kernels
//! split rows over threads in ways that never change a bit of the result, and run for the widest instruction set that
//! the machine has ([`compute::Isa`]).

mod activation;
mod arenas;
pub mod attention;
pub mod compute;
mod embed;
pub mod gemm;
mod layernorm;
mod loss;
pub mod main_memory;
pub mod math;
mod patchify;
mod pool;
pub mod probe_attention;
mod residual;
mod round;
mod rowwise;
pub mod simd;
mod sums;
#[cfg(test)]
mod testbed;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod update;
pub mod view;

use arenas::{Access, Arenas};
use compute::{Compute, Isa};
use gemm::Dropout;

use super::mask::BoundMask;
use super::rounded;
use super::sample_metric::{LOSS, TOP1, TOP5};
use super::{
    Arena, Backend, Body, Branch, Embed, Epilogue, Gelu, Heads, HostMemory, InputGrad, Join, Linear, Loss,
    Mask, Mat, MemoryPlan, Micro, Norm, Normalise, PatchGrid, Pool, Precision, Rule, Slot, SlotLayout, Stats,
    StepKeys, StepReport, Storage, Update,
};
use crate::backend::batch::PlainMemory;
use crate::error::{Error, Result};

/// The CPU as a device.
pub struct CpuBackend {
    compute: Compute,
    arenas: Arenas,
    slot: Option<Slot>,
    keys: StepKeys,
    micro: Micro,
    /// Sums over the samples reported so far, in the columns of `samples`.
    sums: [f64; 3],
    outcome: update::Outcome,
}

impl CpuBackend {
    /// The instruction set is the machine's best, or what `VITRUM_ISA` asks for; `threads = 0` takes one per core.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self::with(Compute::new(Isa::from_env()?, threads)?))
    }

    /// A backend that computes in a given way.
    pub fn with(compute: Compute) -> Self {
        Self {
            compute,
            arenas: Arenas::empty(),
            slot: None,
            keys: StepKeys { seed: 0, step: 0 },
            micro: Micro { first: 0, samples: 0, global_first: 0, accumulate: false, mean_over: 1 },
            sums: [0.0; 3],
            outcome: update::Outcome { grad_norm: 0.0, skipped: false },
        }
    }

    fn bind(&self, mask: Mask) -> BoundMask {
        BoundMask::new(mask, self.keys, self.micro)
    }

    /// A mask over the rows of a dense layer's output; `None` draws nothing.
    fn dropout(&self, mask: Mask, rows: usize) -> Option<Dropout> {
        let mask = self.bind(mask);
        (!mask.is_none()).then(|| {
            assert_eq!(
                rows % self.micro.samples,
                0,
                "dropout: {rows} rows of {} samples",
                self.micro.samples
            );
            Dropout { mask, rows_per_sample: rows / self.micro.samples }
        })
    }

    fn embed_shape(&self, embed: &Embed) -> embed::Shape {
        assert!(embed.extra <= 2 && embed.extra < embed.tokens, "embed: too many extra tokens");
        embed::Shape {
            tokens: embed.tokens,
            extra: embed.extra,
            posemb_first: embed.posemb_first,
            dropout: self.bind(embed.dropout),
        }
    }
}

/// Borrows what a branch reads.
fn residual<'a>(
    access: &mut Access<'a>,
    branch: &Branch,
    bind: impl Fn(Mask) -> BoundMask,
) -> residual::Residual<'a> {
    same_shape("residual", branch.base, branch.branch);
    assert_eq!(branch.base.rows % branch.tokens, 0, "residual: rows are whole samples");
    residual::Residual {
        base: access.read(branch.base),
        branch: access.read(branch.branch),
        layer_scale: branch.layer_scale.map(|(scale, _)| vector(access, scale, branch.base.cols)),
        dropout: bind(branch.dropout),
        drop_path: bind(branch.drop_path),
        tokens: branch.tokens,
    }
}

/// A parameter vector of `len` values.
fn vector<'a>(access: &mut Access<'a>, mat: Mat, len: usize) -> &'a [f32] {
    assert_eq!((mat.rows, mat.cols), (1, len), "{mat} is no vector of {len}");
    access.read_flat(mat)
}

/// The gradient of a parameter vector, if it is trained.
fn vector_grad<'a>(access: &mut Access<'a>, mat: Option<Mat>, len: usize) -> Option<&'a mut [f32]> {
    mat.map(|mat| {
        assert_eq!((mat.rows, mat.cols), (1, len), "{mat} is no vector of {len}");
        access.write_flat(mat)
    })
}

fn same_shape(what: &str, a: Mat, b: Mat) {
    assert_eq!((a.rows, a.cols), (b.rows, b.cols), "{what}: {a} and {b} differ in shape");
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        let threads = self.compute.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu, {threads} thread{plural}, {}", self.compute.isa.name())
    }

    // Memory ----------------------------------------------------------------------------------------------------

    fn storage(&self) -> Storage {
        Storage::CPU
    }

    fn precision(&self) -> Precision {
        Precision::F32
    }

    fn free_memory(&self) -> Result<usize> {
        let memory = main_memory::MainMemory::now()
            .ok_or_else(|| Error::new("/proc/meminfo does not say how much memory is available"))?;
        Ok(memory.available as usize)
    }

    fn allocate(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.arenas = Arenas::new(plan)?;
        Ok(())
    }

    fn allocated_bytes(&self) -> usize {
        self.arenas.total_bytes()
    }

    fn write(&mut self, at: Mat, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), at.rows * at.cols, "write: {} values into {at}", values.len());
        let mut rows = Access::new(&mut self.arenas).write(at);
        for (r, values) in values.chunks_exact(at.cols.max(1)).enumerate() {
            rows.row(r).copy_from_slice(values);
        }
        Ok(())
    }

    fn read(&mut self, at: Mat, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), at.rows * at.cols, "read: {at} into {} values", values.len());
        let rows = Access::new(&mut self.arenas).read(at);
        for (r, values) in values.chunks_exact_mut(at.cols.max(1)).enumerate() {
            values.copy_from_slice(rows.row(r));
        }
        Ok(())
    }

    fn read_arena(&mut self, arena: Arena) -> Result<Vec<u8>> {
        Ok(self.arenas.bytes(arena).to_vec())
    }

    fn write_arena(&mut self, arena: Arena, bytes: &[u8]) -> Result<()> {
        let to = self.arenas.bytes_mut(arena);
        assert_eq!(to.len(), bytes.len(), "write_arena: {arena:?} has another size");
        to.copy_from_slice(bytes);
        Ok(())
    }

    fn swap_ema(&mut self) -> Result<()> {
        self.arenas.swap(Arena::Params, Arena::Ema);
        Ok(())
    }

    // Choices ---------------------------------------------------------------------------------------------------

    fn algorithms(&self) -> Vec<String> {
        Vec::new()
    }

    fn prefer_algorithms(&mut self, algorithms: &[String]) -> Result<(), String> {
        match algorithms.first().filter(|word| word.starts_with(rounded::VARIABLE)) {
            Some(rounds) => Err(format!("this is a run without {rounds}")),
            None => Ok(()),
        }
    }

    // Batches ---------------------------------------------------------------------------------------------------

    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        let memory: Box<dyn HostMemory> = Box::new(PlainMemory::new(layout.bytes())?);
        Ok(Slot::new(memory, layout))
    }

    fn bind_batch(&mut self, slot: Slot) -> Result<Option<Slot>> {
        Ok(self.slot.replace(slot))
    }

    fn unbind_batch(&mut self) -> Option<Slot> {
        self.slot.take()
    }

    // The step --------------------------------------------------------------------------------------------------

    fn begin_step(&mut self, keys: StepKeys) -> Result<()> {
        self.keys = keys;
        Ok(())
    }

    fn begin_micro(&mut self, micro: Micro) -> Result<()> {
        assert!(micro.samples > 0 && micro.mean_over > 0, "a micro-batch without samples");
        self.micro = micro;
        Ok(())
    }

    fn step(&mut self, body: Body, update: Option<&Update>) -> Result<()> {
        body(self)?;
        update.map_or(Ok(()), |update| self.update(update))
    }

    fn steps_ahead(&self) -> u64 {
        0
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    // Patch embedding -------------------------------------------------------------------------------------------

    fn patchify(&mut self, grid: PatchGrid, normalise: Normalise, patches: Mat) -> Result<()> {
        let slot = self.slot.as_ref().expect("patchify: no batch is bound");
        let Micro { first, samples, .. } = self.micro;
        assert_eq!(slot.layout().image, grid.image, "patchify: the batch has another image size");
        assert!(first + samples <= slot.layout().samples, "patchify: micro-batch outside the batch");
        let expected = (samples * grid.tokens(), grid.patch_len());
        assert_eq!((patches.rows, patches.cols), expected, "patchify: {patches} has the wrong shape");

        let patches = Access::new(&mut self.arenas).write(patches);
        patchify::patchify(&self.compute, grid, normalise, &patchify::Pictures::new(slot), first, patches);
        Ok(())
    }

    fn embed(&mut self, embed: &Embed, x: Mat) -> Result<()> {
        let shape = self.embed_shape(embed);
        let posemb = embed.posemb.0;
        assert_eq!(x.rows % embed.tokens, 0, "embed: rows are whole samples");
        assert_eq!(
            (posemb.rows, posemb.cols),
            (embed.tokens - embed.posemb_first, x.cols),
            "embed: positions"
        );

        let mut a = Access::new(&mut self.arenas);
        let bias = vector(&mut a, embed.bias.0, x.cols);
        let extra = embed.extra_tokens.map(|token| token.map(|(value, _)| vector(&mut a, value, x.cols)));
        let (posemb, x) = (a.read(posemb), a.write(x));
        embed::forward(&self.compute, shape, bias, extra, posemb, x);
        Ok(())
    }

    fn embed_backward(&mut self, embed: &Embed, d_x: Mat, d_y: Mat) -> Result<()> {
        assert_eq!(d_x, d_y, "embed_backward: the CPU works in place");
        let shape = self.embed_shape(embed);
        assert_eq!(d_x.rows % embed.tokens, 0, "embed_backward: rows are whole samples");

        let mut a = Access::new(&mut self.arenas);
        let d_bias = vector_grad(&mut a, embed.bias.1, d_x.cols);
        let d_extra =
            embed.extra_tokens.map(|token| vector_grad(&mut a, token.and_then(|(_, d)| d), d_x.cols));
        let d_posemb = embed.posemb.1.map(|d| a.write(d));
        let d_x = a.write(d_x);
        let accumulate = self.micro.accumulate;
        embed::backward(&self.compute, shape, d_x, d_bias, d_extra, d_posemb, accumulate);
        Ok(())
    }

    // Dense layers ----------------------------------------------------------------------------------------------

    fn matmul(&mut self, x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) -> Result<()> {
        let (out, input) = (w.weight.rows, w.weight.cols);
        assert_eq!((x.cols, y.cols, x.rows), (input, out, y.rows), "matmul: {x} · {}ᵀ → {y}", w.weight);
        let drop = |mask| self.dropout(mask, y.rows);
        let dropout = if let Epilogue::BiasGelu { dropout, .. } = epilogue { drop(dropout) } else { None };

        let mut a = Access::new(&mut self.arenas);
        let (x, weight) = (a.read(x), a.read(w.weight));
        let y_rows = a.write(y);
        let epilogue = match epilogue {
            Epilogue::None => gemm::Epilogue::None,
            Epilogue::Bias => gemm::Epilogue::Bias(vector(&mut a, w.bias, out)),
            Epilogue::BiasResidual(residual) => {
                same_shape("matmul", residual, y);
                let bias = vector(&mut a, w.bias, out);
                let residual = if residual == y {
                    gemm::Residual::InPlace
                } else {
                    gemm::Residual::From(a.read(residual))
                };
                gemm::Epilogue::BiasResidual { bias, residual }
            }
            Epilogue::BiasGelu { pre, form, .. } => {
                if let Some(pre) = pre {
                    same_shape("matmul", pre, y);
                }
                gemm::Epilogue::BiasGelu {
                    bias: vector(&mut a, w.bias, out),
                    pre: pre.map(|pre| a.write(pre)),
                    form,
                    dropout,
                }
            }
            Epilogue::BiasTanh => gemm::Epilogue::BiasTanh(vector(&mut a, w.bias, out)),
        };
        gemm::matmul(&self.compute, x, weight, epilogue, y_rows);
        Ok(())
    }

    fn matmul_backward(&mut self, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()> {
        let (out, input) = (w.weight.rows, w.weight.cols);
        assert_eq!(
            (d_y.cols, x.cols, x.rows),
            (out, input, d_y.rows),
            "matmul_backward: {d_y}, {x}, {}",
            w.weight
        );
        let (c, accumulate) = (&self.compute, self.micro.accumulate);

        if w.d_weight.is_some() || w.d_bias.is_some() {
            let mut a = Access::new(&mut self.arenas);
            let (d_y, x) = (a.read(d_y), a.read(x));
            if let Some(d_bias) = vector_grad(&mut a, w.d_bias, out) {
                gemm::column_sums(c, d_y, accumulate, d_bias);
            }
            if let Some(d_weight) = w.d_weight {
                same_shape("matmul_backward", d_weight, w.weight);
                gemm::weight_grad(c, d_y, x, accumulate, a.write(d_weight));
            }
        }

        // After the weights' gradients, because `d_x` may take the place of `x`.
        let dropout = match d_x {
            InputGrad::Gelu { dropout, .. } => self.dropout(dropout, d_y.rows),
            _ => None,
        };
        let mut a = Access::new(&mut self.arenas);
        let (d_y, weight) = (a.read(d_y), a.read(w.weight));
        let (epilogue, d_x) = match d_x {
            InputGrad::None => return Ok(()),
            InputGrad::Plain(d_x) => (gemm::InputEpilogue::Plain, d_x),
            InputGrad::Add(d_x) => (gemm::InputEpilogue::Add, d_x),
            InputGrad::Gelu { d_pre, pre, form, .. } => {
                same_shape("matmul_backward", d_pre, pre);
                (gemm::InputEpilogue::Gelu { pre: a.read(pre), form, dropout }, d_pre)
            }
            InputGrad::Tanh { d, y } => {
                same_shape("matmul_backward", d, y);
                (gemm::InputEpilogue::Tanh { y: a.read(y) }, d)
            }
        };
        assert_eq!((d_x.rows, d_x.cols), (x.rows, input), "matmul_backward: {d_x} is no gradient of {x}");
        gemm::input_grad(&self.compute, d_y, weight, epilogue, a.write(d_x));
        Ok(())
    }

    fn gelu(&mut self, pre: Mat, form: Gelu, dropout: Mask, y: Mat) -> Result<()> {
        same_shape("gelu", pre, y);
        let dropout = self.dropout(dropout, y.rows);
        let mut a = Access::new(&mut self.arenas);
        let pre = a.read(pre);
        activation::gelu(&self.compute, pre, form, dropout, a.write(y));
        Ok(())
    }

    // LayerNorm and the residual stream -------------------------------------------------------------------------

    fn layernorm(&mut self, join: &Join, norm: &Norm, y: Mat, stats: Stats) -> Result<()> {
        same_shape("layernorm", join.sum(), y);
        assert_eq!(
            (stats.mean.rows, stats.rstd.rows),
            (y.rows, y.rows),
            "layernorm: one mean, one rstd per row"
        );
        let (keys, micro) = (self.keys, self.micro);
        let bind = |mask| BoundMask::new(mask, keys, micro);

        let mut a = Access::new(&mut self.arenas);
        let input = match join {
            Join::Ready(sum) => layernorm::Input::Ready(a.read(*sum)),
            Join::Branch { sum, branch } => {
                same_shape("layernorm", *sum, branch.base);
                layernorm::Input::Join { residual: residual(&mut a, branch, bind), sum: a.write(*sum) }
            }
        };
        let (gamma, beta) = (vector(&mut a, norm.gamma, y.cols), vector(&mut a, norm.beta, y.cols));
        let (mean, rstd) = (a.write_flat(stats.mean), a.write_flat(stats.rstd));
        layernorm::forward(&self.compute, input, gamma, beta, norm.eps, a.write(y), mean, rstd);
        Ok(())
    }

    fn layernorm_backward(
        &mut self,
        d_y: Mat,
        join: &Join,
        norm: &Norm,
        stats: Stats,
        d_sum: Mat,
        fresh: bool,
        d_branch: Mat,
        _d_bias: Option<Mat>,
    ) -> Result<()> {
        same_shape("layernorm_backward", d_y, join.sum());
        same_shape("layernorm_backward", d_y, d_sum);
        let (keys, micro) = (self.keys, self.micro);
        let bind = |mask| BoundMask::new(mask, keys, micro);

        let mut a = Access::new(&mut self.arenas);
        let saved = layernorm::Saved {
            x: a.read(join.sum()),
            gamma: vector(&mut a, norm.gamma, d_y.cols),
            mean: a.read_flat(stats.mean),
            rstd: a.read_flat(stats.rstd),
        };
        let branch = match join {
            Join::Ready(_) => None,
            Join::Branch { branch, .. } => {
                same_shape("layernorm_backward", d_branch, branch.branch);
                let d_scale = branch.layer_scale.and_then(|(_, d)| d);
                Some(layernorm::BranchGrad {
                    residual: residual(&mut a, branch, bind),
                    d_branch: a.write(d_branch),
                    d_layer_scale: vector_grad(&mut a, d_scale, d_y.cols),
                })
            }
        };
        let d_norm = [norm.d_gamma, norm.d_beta].map(|d| vector_grad(&mut a, d, d_y.cols));
        let (d_y, d_sum) = (a.read(d_y), a.write(d_sum));
        let c = &self.compute;
        layernorm::backward(c, d_y, saved, d_sum, fresh, branch, d_norm, micro.accumulate);
        Ok(())
    }

    fn residual(&mut self, join: &Join) -> Result<()> {
        let Join::Branch { sum, branch } = join else { return Ok(()) };
        same_shape("residual", *sum, branch.base);
        let (keys, micro) = (self.keys, self.micro);
        let mut a = Access::new(&mut self.arenas);
        let branch_rows = residual(&mut a, branch, |mask| BoundMask::new(mask, keys, micro));
        residual::forward(&self.compute, &branch_rows, a.write(*sum));
        Ok(())
    }

    fn residual_backward(
        &mut self,
        join: &Join,
        d_sum: Mat,
        d_branch: Mat,
        _d_bias: Option<Mat>,
    ) -> Result<()> {
        let Join::Branch { branch, .. } = join else { return Ok(()) };
        same_shape("residual_backward", d_sum, branch.branch);
        same_shape("residual_backward", d_branch, branch.branch);
        let (keys, micro) = (self.keys, self.micro);
        let mut a = Access::new(&mut self.arenas);
        let rows = residual(&mut a, branch, |mask| BoundMask::new(mask, keys, micro));
        let d_scale = vector_grad(&mut a, branch.layer_scale.and_then(|(_, d)| d), d_sum.cols);
        let (d_sum, d_branch) = (a.read(d_sum), a.write(d_branch));
        let c = &self.compute;
        residual::backward(c, &rows, d_sum, d_branch, d_scale, micro.accumulate);
        Ok(())
    }

    // Attention -------------------------------------------------------------------------------------------------

    fn attention(&mut self, heads: Heads, qkv: Mat, o: Mat, lse: Mat, dropout: Mask) -> Result<()> {
        check_heads(heads, 3, qkv, o);
        let dropout = Some(self.bind(dropout)).filter(|mask| !mask.is_none());
        let mut a = Access::new(&mut self.arenas);
        let (qkv, o, lse) = (a.read(qkv), a.write(o), a.write_flat(lse));
        attention::forward(&self.compute, heads, qkv, o, lse, dropout);
        Ok(())
    }

    fn attention_backward(
        &mut self,
        heads: Heads,
        qkv: Mat,
        o: Mat,
        lse: Mat,
        dropout: Mask,
        d_o: Mat,
        d_qkv: Mat,
        _d_bias: Option<Mat>,
    ) -> Result<()> {
        check_heads(heads, 3, qkv, o);
        check_heads(heads, 3, d_qkv, d_o);
        let dropout = Some(self.bind(dropout)).filter(|mask| !mask.is_none());
        let mut a = Access::new(&mut self.arenas);
        let (qkv, o, lse) = (a.read(qkv), a.read(o), a.read_flat(lse));
        let (d_o, d_qkv) = (a.read(d_o), a.write(d_qkv));
        attention::backward(&self.compute, heads, qkv, o, lse, dropout, d_o, d_qkv);
        Ok(())
    }

    fn probe_attention(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        o: Mat,
        dropout: Mask,
    ) -> Result<()> {
        check_probe(heads, q, kv, o);
        let dropout = Some(self.bind(dropout)).filter(|mask| !mask.is_none());
        let mut a = Access::new(&mut self.arenas);
        let (q, kv) = (a.read(q), a.read(kv));
        let (p, o) = (a.write_flat(p), a.write(o));
        probe_attention::forward(&self.compute, heads, q, kv, p, o, dropout);
        Ok(())
    }

    fn probe_attention_backward(
        &mut self,
        heads: Heads,
        q: Mat,
        kv: Mat,
        p: Mat,
        dropout: Mask,
        d_o: Mat,
        d_q: Mat,
        d_kv: Mat,
    ) -> Result<()> {
        check_probe(heads, q, kv, d_o);
        check_probe(heads, d_q, d_kv, d_o);
        let dropout = Some(self.bind(dropout)).filter(|mask| !mask.is_none());
        let mut a = Access::new(&mut self.arenas);
        let (q, kv, p, d_o) = (a.read(q), a.read(kv), a.read_flat(p), a.read(d_o));
        let (d_q, d_kv) = (a.write(d_q), a.write(d_kv));
        probe_attention::backward(&self.compute, heads, q, kv, p, dropout, d_o, d_q, d_kv);
        Ok(())
    }

    // Head ------------------------------------------------------------------------------------------------------

    fn pool(&mut self, pool: Pool, x: Mat, y: Mat) -> Result<()> {
        check_pool(pool, x, y);
        let mut a = Access::new(&mut self.arenas);
        pool::forward(&self.compute, pool, a.read(x), a.write(y));
        Ok(())
    }

    fn pool_backward(&mut self, pool: Pool, d_y: Mat, d_x: Mat, fresh: bool) -> Result<()> {
        check_pool(pool, d_x, d_y);
        let mut a = Access::new(&mut self.arenas);
        pool::backward(&self.compute, pool, a.read(d_y), a.write(d_x), fresh);
        Ok(())
    }

    fn scale(&mut self, x: Mat, factor: f32) -> Result<()> {
        let x = Access::new(&mut self.arenas).write(x);
        self.compute.for_each_item(x.blocks(sums::CHUNK), |(_, mut x)| {
            (0..x.rows).for_each(|r| x.row(r).iter_mut().for_each(|x| *x *= factor));
        });
        Ok(())
    }

    fn loss(&mut self, loss: Loss, logits: Mat, d_logits: Mat, samples: Mat) -> Result<()> {
        let slot = self.slot.as_ref().expect("loss: no batch is bound");
        let Micro { first, samples: count, mean_over, .. } = self.micro;
        same_shape("loss", logits, d_logits);
        assert_eq!((logits.rows, samples.rows, samples.cols), (count, count, 3), "loss: one row per sample");
        assert!(first + count <= slot.layout().samples, "loss: micro-batch outside the batch");

        let mut a = Access::new(&mut self.arenas);
        let weights = loss.class_weights.map(|weights| {
            assert_eq!((weights.rows, weights.cols), (1, logits.cols), "loss: one weight for each class");
            a.read_flat(weights)
        });
        let targets = loss::Targets::new(slot, logits.cols, weights)?;
        let source = if logits == d_logits { None } else { Some(a.read(logits)) };
        let (d_logits, samples) = (a.write(d_logits), a.write(samples));
        let scale = 1.0 / mean_over as f64;
        loss::forward_backward(&self.compute, loss, &targets, first, scale, source, d_logits, samples);
        Ok(())
    }

    // Update ----------------------------------------------------------------------------------------------------

    fn begin_report(&mut self) -> Result<()> {
        self.sums = [0.0; 3];
        self.outcome = update::Outcome { grad_norm: 0.0, skipped: false };
        Ok(())
    }

    fn add_to_report(&mut self, samples: Mat) -> Result<()> {
        let samples = Access::new(&mut self.arenas).read(samples);
        for r in 0..samples.rows {
            for (sum, value) in self.sums.iter_mut().zip(samples.row(r)) {
                *sum += f64::from(*value);
            }
        }
        Ok(())
    }

    fn update(&mut self, update: &Update) -> Result<()> {
        let loss_is_finite = self.sums[LOSS].is_finite();
        let arenas = self.arenas.for_update();
        let bf16 = match update.rule {
            Rule::Sgd { bf16, .. } | Rule::Adam { bf16, .. } => bf16,
            Rule::Lion { bf16, .. } | Rule::Adafactor { bf16, .. } => bf16,
        };
        let buffers = update::Buffers {
            params: arenas.params,
            grads: arenas.grads,
            moment1: if bf16 {
                update::Moment1::Bf16(bytemuck::cast_slice_mut(arenas.moment1))
            } else {
                update::Moment1::F32(bytemuck::cast_slice_mut(arenas.moment1))
            },
            moment2: arenas.moment2,
            ema: update.ema_decay.map(|_| arenas.ema),
        };
        self.outcome = update::update(&self.compute, update, buffers, loss_is_finite);
        Ok(())
    }

    fn report(&mut self) -> Result<StepReport> {
        let mean = self.sums.map(|sum| sum / self.micro.mean_over as f64);
        Ok(StepReport {
            loss: mean[LOSS],
            top1: mean[TOP1],
            top5: mean[TOP5],
            grad_norm: self.outcome.grad_norm,
            skipped: self.outcome.skipped,
        })
    }
}

/// Shapes of an attention with `parts` packed matrices per row.
fn check_heads(heads: Heads, parts: usize, packed: Mat, o: Mat) {
    let width = heads.heads * heads.head_size;
    assert_eq!(
        (packed.cols, o.cols, packed.rows),
        (parts * width, width, o.rows),
        "attention: {packed}, {o}"
    );
    assert_eq!(o.rows % heads.tokens, 0, "attention: rows are whole samples");
}

fn check_probe(heads: Heads, q: Mat, kv: Mat, o: Mat) {
    let width = heads.heads * heads.head_size;
    assert_eq!((q.cols, kv.cols, o.cols), (width, 2 * width, width), "probe_attention: {q}, {kv}, {o}");
    assert!(q.rows == 1 || q.rows == o.rows, "probe_attention: {q} is neither one query nor one per sample");
    assert_eq!(kv.rows, o.rows * heads.tokens, "probe_attention: rows are whole samples");
}

fn check_pool(pool: Pool, x: Mat, y: Mat) {
    let (Pool::Token { tokens, .. } | Pool::Mean { tokens, .. }) = pool;
    assert_eq!((x.rows, x.cols), (y.rows * tokens, y.cols), "pool: {x} → {y}");
}
