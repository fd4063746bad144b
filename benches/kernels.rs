//! The CPU kernels at the shapes of ViT-Ti and ViT-S, in FLOP per second (`elem/s` is FLOP/s), compared with
//! crate `gemm` with its epilogues as separate passes over blocks of rows, on the same pool.
//!
//!     cargo bench -p vitrum-benches --bench kernels -- ti16_224/fc1
//!
//! `VITRUM_ISA` chooses the instruction set of our kernels, `VITRUM_THREADS` the threads of both (default:
//! one per core). Each product is first compared with crate `gemm`: a wrong kernel is not timed. `peak` is
//! the rate of the processor's fused multiply-adds on one thread; multiplied by the threads, it is the
//! ceiling.

use std::hint::black_box;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use vitrum::backend::cpu::compute::{Compute, Isa};
use vitrum::backend::cpu::gemm::{self, Epilogue, InputEpilogue, Residual};
use vitrum::backend::cpu::math::{self, Function};
use vitrum::backend::cpu::view::{Rows, RowsMut};
use vitrum::backend::cpu::{attention, query_attention};
use vitrum::backend::{Gelu, Heads};

struct Shape {
    name: &'static str,
    images: usize,
    tokens: usize,
    width: usize,
    mlp: usize,
    heads: usize,
}

/// ViT-Ti/4 at 32 px, ViT-Ti/16 and ViT-S/16 at 224 px, and the demo's model.
const SHAPES: [Shape; 4] = [
    Shape { name: "ti4_32", images: 64, tokens: 65, width: 192, mlp: 768, heads: 3 },
    Shape { name: "ti16_224", images: 16, tokens: 197, width: 192, mlp: 768, heads: 3 },
    Shape { name: "s16_224", images: 8, tokens: 197, width: 384, mlp: 1536, heads: 6 },
    Shape { name: "demo", images: 128, tokens: 16, width: 128, mlp: 512, heads: 4 },
];

fn compute() -> Compute {
    let threads = std::env::var("VITRUM_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(0);
    Compute::new(Isa::from_env().expect("VITRUM_ISA"), threads).expect("threads")
}

/// Uniform in [-1, 1).
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1u32 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    let error: f64 = ours.iter().zip(theirs).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    let norm: f64 = theirs.iter().map(|b| (*b as f64).powi(2)).sum();
    assert!((error / norm).sqrt() < 1e-5, "{what}: differs from crate `gemm` by {:e}", (error / norm).sqrt());
}

/// A dense matrix, or its transpose, as crate `gemm` sees it: pointer, row stride, column stride.
#[derive(Clone, Copy)]
struct Strided<'a> {
    data: &'a [f32],
    row: isize,
    col: isize,
}

impl<'a> Strided<'a> {
    fn new(data: &'a [f32], cols: usize) -> Self {
        Self { data, row: cols as isize, col: 1 }
    }
    fn transposed(self) -> Self {
        Self { row: self.col, col: self.row, ..self }
    }
}

/// `y[m, n] (+)= a·b` by crate `gemm`: one single-threaded call per block of rows of y, then `after` over that block.
fn yardstick(
    c: &Compute,
    (m, n, k): (usize, usize, usize),
    a: Strided,
    b: Strided,
    y: &mut [f32],
    accumulate: bool,
    after: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    assert!(a.data.len() == m * k && b.data.len() == k * n && y.len() == m * n);
    let blocks = RowsMut::dense(y, m, n).blocks(m.div_ceil(c.threads()));
    c.for_each_item(blocks, |(start, block)| {
        // SAFETY: by the assert the three matrices hold all elements; the blocks of y are disjoint.
        unsafe {
            ::gemm::gemm(
                block.rows,
                n,
                k,
                block.data.as_mut_ptr(),
                1,
                n as isize,
                accumulate,
                a.data.as_ptr().offset(start as isize * a.row),
                a.col,
                a.row,
                b.data.as_ptr(),
                b.col,
                b.row,
                1.0,
                1.0,
                false,
                false,
                false,
                ::gemm::Parallelism::None,
            );
        }
        after(start * n, block.data);
    });
}

fn add_bias(bias: &[f32], y: &mut [f32]) {
    for row in y.chunks_exact_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

fn timed(group: &mut BenchmarkGroup<WallTime>, name: String, work: u64, mut f: impl FnMut()) {
    group.throughput(Throughput::Elements(work));
    group.bench_function(name, |b| b.iter(&mut f));
}

fn dense_layers(criterion: &mut Criterion) {
    let c = compute();
    for shape in &SHAPES {
        let (r, d) = (shape.images * shape.tokens, shape.width);
        let mut group = criterion.benchmark_group(shape.name);
        for (layer, k, n) in [("qkv", d, 3 * d), ("proj", d, d), ("fc1", d, shape.mlp), ("fc2", shape.mlp, d)]
        {
            let (x, w, bias, d_y) = (numbers(1, r * k), numbers(2, n * k), numbers(3, n), numbers(4, r * n));
            let (xs, ws, d_ys) = (Strided::new(&x, k), Strided::new(&w, k), Strided::new(&d_y, n));
            let (rows, weight, grad) =
                (Rows::dense(&x, r, k), Rows::dense(&w, n, k), Rows::dense(&d_y, r, n));
            let flops = 2 * (r * k * n) as u64;
            let (mut y, mut pre, mut other) = (vec![0.0; r * n], vec![0.0; r * n], vec![0.0; r * n]);
            let (mut d_x, mut d_w) = (vec![0.0; r * k], vec![0.0; n * k]);
            let name = |what: &str| format!("{layer}/{what}");

            // Forward, with the epilogue that this layer has in a block.
            let g = &mut group;
            match layer {
                "fc1" => {
                    let mut ours = |y: &mut [f32], form| {
                        let pre = RowsMut::dense(&mut pre, r, n);
                        let epilogue =
                            Epilogue::BiasGelu { bias: &bias, pre: Some(pre), form, dropout: None };
                        gemm::matmul(&c, rows, weight, epilogue, RowsMut::dense(y, r, n));
                    };
                    // The crate's pre-activation has to be kept too.
                    let theirs = |kept: &mut [f32], y: &mut [f32]| {
                        yardstick(&c, (r, n, k), xs, ws.transposed(), kept, false, |_, block| {
                            add_bias(&bias, block)
                        });
                        let blocks = RowsMut::dense(y, r, n).blocks(r.div_ceil(c.threads()));
                        c.for_each_item(blocks, |(start, block)| {
                            let from = &kept[start * n..start * n + block.data.len()];
                            block.data.copy_from_slice(from);
                            math::map(c.isa, Function::Gelu(Gelu::Tanh), block.data);
                        });
                    };
                    ours(&mut y, Gelu::Tanh);
                    let mut kept = vec![0.0; r * n];
                    theirs(&mut kept, &mut other);
                    assert_close(&y, &other, "fc1");
                    timed(g, name("forward+gelu_tanh"), flops, || ours(black_box(&mut y), Gelu::Tanh));
                    timed(g, name("forward+gelu_erf"), flops, || ours(black_box(&mut y), Gelu::Erf));
                    timed(g, name("gemm forward, gelu_tanh"), flops, || {
                        theirs(&mut kept, black_box(&mut other))
                    });
                }
                "proj" | "fc2" => {
                    let residual = Epilogue::BiasResidual { bias: &bias, residual: Residual::InPlace };
                    gemm::matmul(&c, rows, weight, residual, RowsMut::dense(&mut y, r, n));
                    yardstick(&c, (r, n, k), xs, ws.transposed(), &mut other, true, |_, b| {
                        add_bias(&bias, b)
                    });
                    assert_close(&y, &other, layer);
                    timed(g, name("forward+residual"), flops, || {
                        let residual = Epilogue::BiasResidual { bias: &bias, residual: Residual::InPlace };
                        gemm::matmul(&c, rows, weight, residual, RowsMut::dense(black_box(&mut y), r, n));
                    });
                    timed(g, name("gemm forward, residual"), flops, || {
                        let y = black_box(&mut other);
                        yardstick(&c, (r, n, k), xs, ws.transposed(), y, true, |_, b| add_bias(&bias, b));
                    });
                }
                _ => {
                    gemm::matmul(&c, rows, weight, Epilogue::Bias(&bias), RowsMut::dense(&mut y, r, n));
                    yardstick(&c, (r, n, k), xs, ws.transposed(), &mut other, false, |_, b| {
                        add_bias(&bias, b)
                    });
                    assert_close(&y, &other, layer);
                    timed(g, name("forward+bias"), flops, || {
                        let y = RowsMut::dense(black_box(&mut y), r, n);
                        gemm::matmul(&c, rows, weight, Epilogue::Bias(&bias), y);
                    });
                    timed(g, name("gemm forward, bias"), flops, || {
                        let y = black_box(&mut other);
                        yardstick(&c, (r, n, k), xs, ws.transposed(), y, false, |_, b| add_bias(&bias, b));
                    });
                }
            }

            // The gradient of the input; fc2's input is a GELU.
            let form = Gelu::Tanh;
            let epilogue = match layer {
                "fc2" => InputEpilogue::Gelu { pre: rows, form, dropout: None },
                _ => InputEpilogue::Plain,
            };
            let mut slopes = vec![0.0; r * k];
            let mut theirs = |d_x: &mut [f32]| {
                yardstick(&c, (r, k, n), d_ys, ws, d_x, false, |_, _| ());
                if layer == "fc2" {
                    slopes.copy_from_slice(&x);
                    let blocks = RowsMut::dense(&mut slopes, r, k).blocks(r.div_ceil(c.threads()));
                    c.for_each_item(blocks, |(_, b)| math::map(c.isa, Function::GeluSlope(form), b.data));
                    d_x.iter_mut().zip(&slopes).for_each(|(d, s)| *d *= s);
                }
            };
            let mut wanted = vec![0.0; r * k];
            gemm::input_grad(&c, grad, weight, epilogue, RowsMut::dense(&mut d_x, r, k));
            theirs(&mut wanted);
            assert_close(&d_x, &wanted, "input gradient");
            timed(g, name("input_grad"), flops, || {
                gemm::input_grad(&c, grad, weight, epilogue, RowsMut::dense(black_box(&mut d_x), r, k))
            });
            timed(g, name("gemm input_grad"), flops, || theirs(black_box(&mut wanted)));

            // The gradients of weight and bias.
            let mut wanted = vec![0.0; n * k];
            let theirs = |d_w: &mut [f32]| {
                yardstick(&c, (n, k, r), d_ys.transposed(), xs, d_w, false, |_, _| ());
            };
            gemm::weight_grad(&c, grad, rows, false, RowsMut::dense(&mut d_w, n, k));
            theirs(&mut wanted);
            assert_close(&d_w, &wanted, "weight gradient");
            timed(g, name("weight_grad"), flops, || {
                gemm::weight_grad(&c, grad, rows, false, RowsMut::dense(black_box(&mut d_w), n, k))
            });
            timed(g, name("gemm weight_grad"), flops, || theirs(black_box(&mut wanted)));
            let mut sums = vec![0.0; n];
            timed(g, name("bias_grad"), (r * n) as u64, || {
                gemm::column_sums(&c, grad, false, black_box(&mut sums))
            });
        }
        group.finish();
    }
}

fn attentions(criterion: &mut Criterion) {
    let c = compute();
    for shape in &SHAPES {
        let (b, t, d, h) = (shape.images, shape.tokens, shape.width, shape.heads);
        let heads = Heads { tokens: t, heads: h, head_size: d / h };
        let r = b * t;
        let mut group = criterion.benchmark_group(shape.name);
        let (qkv, d_o) = (numbers(5, r * 3 * d), numbers(6, r * d));
        let qkv = Rows::dense(&qkv, r, 3 * d);
        let (mut o, mut lse, mut d_qkv) = (vec![0.0; r * d], vec![0.0; b * h * t], vec![0.0; r * 3 * d]);
        // Two products forward, five backward.
        let product = 2 * (b * t * t * d) as u64;
        attention::forward(&c, heads, qkv, RowsMut::dense(&mut o, r, d), &mut lse, None);
        let mean_lse = lse.iter().sum::<f32>() / lse.len() as f32;
        assert!((mean_lse - (t as f32).ln()).abs() < 2.0, "mean lse {mean_lse} of {t} tokens");
        timed(&mut group, "attention/forward".into(), 2 * product, || {
            let o = RowsMut::dense(black_box(&mut o), r, d);
            attention::forward(&c, heads, qkv, o, &mut lse, None)
        });
        timed(&mut group, "attention/backward".into(), 5 * product, || {
            let (o, d_o) = (Rows::dense(&o, r, d), Rows::dense(&d_o, r, d));
            let d_qkv = RowsMut::dense(black_box(&mut d_qkv), r, 3 * d);
            attention::backward(&c, heads, qkv, o, &lse, None, d_o, d_qkv)
        });
        let (q, kv) = (numbers(7, d), numbers(8, r * 2 * d));
        let q = Rows::dense(&q, 1, d);
        let (mut p, mut o) = (vec![0.0; b * h * t], vec![0.0; b * d]);
        timed(&mut group, "query_attention/forward".into(), 4 * (r * d) as u64, || {
            let o = RowsMut::dense(black_box(&mut o), b, d);
            query_attention::forward(&c, heads, q, Rows::dense(&kv, r, 2 * d), &mut p, o, None)
        });
        group.finish();
    }
}

/// The ceiling: twelve independent chains of fused multiply-adds on one thread.
fn peak(criterion: &mut Criterion) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn chains(steps: usize) -> f32 {
        use std::arch::x86_64::*;
        let mut sums = [_mm256_set1_ps(0.5); 12];
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        _mm256_cvtss_f32(sums.into_iter().fold(a, |x, y| _mm256_add_ps(x, y)))
    }
    #[cfg(target_arch = "x86_64")]
    if Isa::best() >= Isa::Avx2 {
        let steps = 100_000;
        let mut group = criterion.benchmark_group("peak");
        // SAFETY: AVX2 and FMA are there.
        timed(&mut group, "avx2, 1 thread".into(), (steps * 12 * 16) as u64, || unsafe {
            black_box(chains(steps));
        });
        group.finish();
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = criterion;
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(1))
}

criterion_group! { name = kernels; config = config(); targets = peak, dense_layers, attentions }
criterion_main!(kernels);
