//! The timed cases: every operation of a training step at the sizes of the named models, with its kernels'
//! minimum traffic.
//!
//! For an operation of one kernel that is the operation's minimum cost ([`crate::backend::cost`]). Several
//! kernels pass partial sums to one another; their traffic is the formula in the head of each `kernels/*.cu`:
//! every operand read once, every result written once, including partial sums. `docs/kernel-table.md`
//! compares it with counts on the stand-in GPU.

use crate::backend::cuda::driver::Launched;
use crate::backend::{
    Arena, Backend, Branch, Cost, Dtype, Embed, Epilogue, Gelu, GroupScalars, Heads, InputGrad, Join, Linear,
    Loss, LossKind, Mask, Mat, MemoryPlan, Norm, Normalise, PatchGrid, Pixels, Pool, Rope, RopePairs, Rule,
    Segment, SlotLayout, Stats, TargetKind, Update, Write,
};
use crate::error::Result;

use super::products::products;
use super::sizes::{Model, Sizes};

/// The minimum bytes that any implementation of a kernel moves.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Traffic {
    pub read: usize,
    pub written: usize,
}

pub(super) fn traffic(read: usize, written: usize) -> Traffic {
    Traffic { read, written }
}

/// An operation to run.
pub(super) type Run = Box<dyn Fn(&mut dyn Backend) -> Result<()>>;

/// An operation whose operands have been placed.
pub(super) struct Placed {
    /// Runs once before, to give the operands meaningful values.
    pub(super) before: Option<Run>,
    pub(super) run: Run,
}

impl Placed {
    pub(super) fn new(run: impl Fn(&mut dyn Backend) -> Result<()> + 'static) -> Self {
        Self { before: None, run: Box::new(run) }
    }

    fn after(self, before: impl Fn(&mut dyn Backend) -> Result<()> + 'static) -> Self {
        Self { before: Some(Box::new(before)), ..self }
    }
}

type Place = Box<dyn Fn(&mut Room) -> Placed>;
/// The minimum traffic of each of our kernels, from the launches and the operation's minimum cost.
type Least = Box<dyn Fn(&[Launched], Cost) -> Vec<Traffic>>;

/// One line of the benchmark.
pub(super) struct Case {
    pub(super) operation: &'static str,
    pub(super) shape: String,
    /// A matrix product. It is not among the launches: those are our kernels beside it, if the chosen way has
    /// any.
    pub(super) product: bool,
    /// The launches are the same each time, so the work can be recorded.
    pub(super) recorded: bool,
    /// The layout of the batch to bind.
    pub(super) batch: Option<SlotLayout>,
    pub(super) samples: usize,
    pub(super) least: Least,
    pub(super) place: Place,
}

impl Case {
    pub(super) fn new(
        operation: &'static str,
        shape: String,
        samples: usize,
        least: impl Fn(&[Launched], Cost) -> Vec<Traffic> + 'static,
        place: impl Fn(&mut Room) -> Placed + 'static,
    ) -> Self {
        let (least, place) = (Box::new(least), Box::new(place));
        Self { operation, shape, product: false, recorded: true, batch: None, samples, least, place }
    }

    pub(super) fn product(self) -> Self {
        Self { product: true, ..self }
    }

    fn batch(self, batch: SlotLayout) -> Self {
        Self { batch: Some(batch), ..self }
    }

    pub(super) fn title(&self) -> String {
        format!("{} {}", self.operation, self.shape)
    }
}

/// The memory in which operands are placed.
pub(super) struct Room {
    pub(super) plan: MemoryPlan,
}

impl Room {
    pub(super) fn activation(&mut self, rows: usize, cols: usize) -> Mat {
        self.plan.activation("operand", rows, cols)
    }

    /// A matrix of the residual stream.
    pub(super) fn stream(&mut self, rows: usize, cols: usize, stream: Dtype) -> Mat {
        if stream == Dtype::F32 { self.f32(rows, cols) } else { self.activation(rows, cols) }
    }

    fn f32(&mut self, rows: usize, cols: usize) -> Mat {
        self.plan.statistics("operand", rows, cols)
    }

    fn param(&mut self, rows: usize, cols: usize) -> Mat {
        self.flat(Arena::Params, rows, cols)
    }

    fn grad(&mut self, rows: usize, cols: usize) -> Option<Mat> {
        Some(self.flat(Arena::Grads, rows, cols))
    }

    /// A dense f32 matrix in a flat arena.
    fn flat(&mut self, arena: Arena, rows: usize, cols: usize) -> Mat {
        let offset = self.plan.bytes(arena);
        let ld = if rows == 1 { cols } else { cols.next_multiple_of(8) };
        self.plan.set_bytes(arena, (offset + 4 * rows * ld).next_multiple_of(256));
        Mat { arena, offset, rows, cols, ld, dtype: Dtype::F32 }
    }

    fn norm(&mut self, width: usize, trained: bool) -> Norm {
        let (gamma, beta) = (self.param(1, width), self.param(1, width));
        let mut grad = || if trained { self.grad(1, width) } else { None };
        Norm { gamma, beta, d_gamma: grad(), d_beta: grad(), eps: 1e-6 }
    }

    fn stats(&mut self, rows: usize) -> Stats {
        Stats { mean: self.f32(rows, 1), rstd: self.f32(rows, 1) }
    }

    pub(super) fn linear(&mut self, out: usize, input: usize, trained: bool) -> Linear {
        let (weight, bias) = (self.param(out, input), self.param(1, out));
        let (d_weight, d_bias) =
            if trained { (self.grad(out, input), self.grad(1, out)) } else { (None, None) };
        Linear { weight, bias, d_weight, d_bias }
    }
}

/// Bytes of a bf16 matrix.
pub(super) fn half(rows: usize, cols: usize) -> usize {
    2 * rows * cols
}

/// The traffic of an operation of one kernel.
fn whole(_: &[Launched], cost: Cost) -> Vec<Traffic> {
    vec![traffic(cost.read as usize, cost.written as usize)]
}

/// The traffic of `sum_partials` after a kernel that wrote `count` partial sums of `columns` columns, `sums`
/// times.
pub(super) fn sum_partials(count: usize, sums: usize, columns: usize) -> Traffic {
    traffic(4 * count * sums * columns, 4 * sums * columns)
}

/// All cases, in the order of a step.
pub(super) fn cases(sizes: &Sizes) -> Vec<Case> {
    let mut cases = Vec::new();
    for model in &sizes.models {
        let images = (sizes.rows / model.tokens()).max(1);
        if model.image == 224 {
            cases.extend(stem(model, images));
            for stream in [Dtype::Bf16, Dtype::F32] {
                cases.extend(embeds(model, images, stream));
                cases.extend(norms(model, images, stream));
            }
            if sizes.products.contains(&model.name) {
                cases.extend(products(model, images));
            }
        }
        cases.extend(attentions(model, if sizes.all_images { images } else { 1 }));
        cases.extend(class_attentions(model, images));
        if model.name == "B/16" {
            cases.extend(elementwise(model, images, sizes.all_images));
            cases.extend(head(model, images));
        }
    }
    cases.push(loss(sizes.samples, 1000));
    cases.push(loss(sizes.samples, 21_843));
    cases.push(adamw(sizes.params));
    cases
}

fn slot(samples: usize, side: usize) -> SlotLayout {
    SlotLayout { samples, image: (side, side), pixels: Pixels::U8, targets: TargetKind::Labels }
}

fn stem(model: &Model, images: usize) -> Option<Case> {
    let grid = PatchGrid { image: (model.image, model.image), patch: (model.patch, model.patch), extra: 1 };
    let (rows, run) = (images * model.tokens(), grid.patch_len());
    let shape = format!("{images} images, patch {}", model.patch);
    let place = move |room: &mut Room| {
        let patches = room.activation(rows, run);
        Placed::new(move |b| b.patchify(grid, Normalise::INCEPTION, patches))
    };
    let case = Case::new("patchify", shape, images, whole, place).batch(slot(images, model.image));
    // The other models have the same pixels as one of these two.
    Some(case).filter(|_| ["B/16", "H/14"].contains(&model.name))
}

/// `[rows, d]` of a model, and the type of its residual stream if it differs from the other activations.
fn shape_with(model: &Model, rows: usize, stream: Dtype) -> String {
    let note = if stream == Dtype::F32 { ", stream f32" } else { "" };
    format!("{} [{rows}, {}]{note}", model.name, model.width)
}

fn embeds(model: &Model, images: usize, stream: Dtype) -> Vec<Case> {
    let (t, d) = (model.tokens(), model.width);
    let rows = images * t;
    if model.name != "B/16" && model.name != "S/16" {
        return Vec::new();
    }
    let parameters = move |room: &mut Room, trained: bool| {
        let mut pair = |rows| {
            let param = room.param(rows, d);
            (param, if trained { room.grad(rows, d) } else { None })
        };
        let (bias, class, posemb) = (pair(1), pair(1), pair(t));
        let extra_tokens = [Some(class), None, None];
        Embed { tokens: t, extra: 1, bias, extra_tokens, posemb, posemb_first: 0, dropout: Mask::NONE }
    };
    let shape = shape_with(model, rows, stream);
    let joined = stream.bytes() * rows * d;
    vec![
        Case::new("embed", shape.clone(), images, whole, move |room| {
            let (embed, x) = (parameters(room, false), room.stream(rows, d, stream));
            Placed::new(move |b| b.embed(&embed, x))
        }),
        Case::new(
            "embed_backward",
            shape,
            images,
            move |launches, _| {
                let slices = launches[0].grid[1] as usize;
                let partials = 4 * slices * t * d;
                vec![
                    traffic(joined, partials),
                    // Slice 0 adds the partial sums, besides the gradients of the positions and the class
                    // token.
                    traffic(partials, 4 * (2 * t + 1) * d),
                    sum_partials(t - 1, 1, d),
                ]
            },
            move |room| {
                let (embed, d_x) = (parameters(room, true), room.stream(rows, d, stream));
                let d_y = if stream == Dtype::F32 { room.activation(rows, d) } else { d_x };
                Placed::new(move |b| b.embed_backward(&embed, d_x, d_y))
            },
        ),
    ]
}

fn norms(model: &Model, images: usize, stream: Dtype) -> Vec<Case> {
    let (t, d) = (model.tokens(), model.width);
    let rows = images * t;
    let shape = shape_with(model, rows, stream);
    // The first kernel writes partial sums instead of the gradients of γ and β.
    let backward = move |launches: &[Launched], cost: Cost, sums: usize| {
        let blocks = launches[0].grid[0] as usize;
        let partials = 4 * sums * blocks * d;
        let written = cost.written as usize - 2 * 4 * d + partials;
        vec![traffic(cost.read as usize, written), sum_partials(blocks, sums, d)]
    };
    let size = Stretch { rows, d, tokens: t, stream };
    vec![
        Case::new("layernorm", shape.clone(), images, whole, move |room| forward_norm(room, size, false)),
        Case::new("layernorm, join", shape.clone(), images, whole, move |room| {
            forward_norm(room, size, true)
        }),
        Case::new(
            "layernorm_backward",
            shape.clone(),
            images,
            move |launches, cost| backward(launches, cost, 2),
            move |room| backward_norm(room, size, false, false),
        ),
        Case::new(
            "layernorm_backward, join",
            shape.clone(),
            images,
            move |launches, cost| backward(launches, cost, 2),
            move |room| backward_norm(room, size, true, false),
        ),
        Case::new(
            "layernorm_backward, bias",
            shape.clone(),
            images,
            move |launches, cost| backward(launches, cost, 3),
            move |room| backward_norm(room, size, false, true),
        ),
        Case::new(
            "layernorm_backward, join, bias",
            shape,
            images,
            move |launches, cost| backward(launches, cost, 3),
            move |room| backward_norm(room, size, true, true),
        ),
    ]
}

/// `[rows, d]` of the residual stream.
#[derive(Clone, Copy)]
struct Stretch {
    rows: usize,
    d: usize,
    tokens: usize,
    stream: Dtype,
}

impl Stretch {
    fn part(self, room: &mut Room) -> Mat {
        room.stream(self.rows, self.d, self.stream)
    }

    fn join(self, room: &mut Room, is_branch: bool) -> Join {
        let sum = self.part(room);
        if !is_branch {
            return Join::Ready(sum);
        }
        let (base, branch) = (self.part(room), room.activation(self.rows, self.d));
        let (none, tokens) = (Mask::NONE, self.tokens);
        let branch = Branch { base, branch, layer_scale: None, dropout: none, drop_path: none, tokens };
        Join::Branch { sum, branch }
    }
}

fn forward_norm(room: &mut Room, size: Stretch, is_branch: bool) -> Placed {
    let (join, y) = (size.join(room, is_branch), room.activation(size.rows, size.d));
    let (norm, stats) = (room.norm(size.d, false), room.stats(size.rows));
    Placed::new(move |b| b.layernorm(&join, &norm, y, stats))
}

fn backward_norm(room: &mut Room, size: Stretch, is_branch: bool, is_biased: bool) -> Placed {
    let (join, d_sum) = (size.join(room, is_branch), size.part(room));
    let [y, d_y, d_branch] = [0; 3].map(|_| room.activation(size.rows, size.d));
    // There is no separate gradient for a branch.
    let d_branch = if is_branch || size.stream == Dtype::F32 { d_branch } else { d_sum };
    let (norm, stats) = (room.norm(size.d, true), room.stats(size.rows));
    let d_bias = if is_biased { room.grad(1, size.d) } else { None };
    let run = Placed::new(move |b| {
        b.layernorm_backward(d_y, &join, &norm, stats, d_sum, Write::Add, d_branch, d_bias)
    });
    run.after(move |b| b.layernorm(&join, &norm, y, stats))
}

fn attentions(model: &Model, images: usize) -> Vec<Case> {
    let heads = Heads { tokens: model.tokens(), heads: model.heads, head_size: model.width / model.heads };
    let Heads { tokens: t, heads: h, head_size } = heads;
    let (rows, d, lse) = (images * t, model.width, 4 * images * h * t);
    let x = half(rows, d);
    let shape = format!("{} [{rows}, {d}], {t} tokens, {h} heads of {head_size}", model.name);
    let place = move |room: &mut Room| {
        let (qkv, o) = (room.activation(rows, 3 * d), room.activation(rows, d));
        (qkv, o, room.f32(images * h, t))
    };
    let backward = |is_biased: bool| {
        Case::new(
            if is_biased { "attention_backward, bias" } else { "attention_backward" },
            shape.clone(),
            images,
            // One kernel, or one that owns queries and passes δ to one that owns keys. A bias adds its sums.
            move |launches, cost| {
                let parts = launches[0].grid[0] as usize / h;
                let sums = if is_biased { 4 * parts * d } else { 0 };
                let mut least = match launches.len() - usize::from(is_biased) {
                    1 => vec![traffic(cost.read as usize, cost.written as usize + 3 * sums)],
                    _ => {
                        vec![traffic(5 * x + lse, x + lse + sums), traffic(4 * x + 2 * lse, 2 * x + 2 * sums)]
                    }
                };
                least.extend(is_biased.then(|| sum_partials(parts, 1, 3 * d)));
                least
            },
            move |room| {
                let (qkv, o, lse) = place(room);
                let (d_o, d_qkv) = (room.activation(rows, d), room.activation(rows, 3 * d));
                let d_bias = if is_biased { room.grad(1, 3 * d) } else { None };
                let run = Placed::new(move |b| {
                    b.attention_backward(heads, qkv, o, lse, Mask::NONE, d_o, d_qkv, d_bias)
                });
                run.after(move |b| b.attention(heads, qkv, o, lse, Mask::NONE))
            },
        )
    };
    vec![
        Case::new("attention", shape.clone(), images, whole, move |room| {
            let (qkv, o, lse) = place(room);
            Placed::new(move |b| b.attention(heads, qkv, o, lse, Mask::NONE))
        }),
        backward(false),
        backward(true),
    ]
}

/// Attention of the pruned last block: one query per image, the class token's.
fn class_attentions(model: &Model, images: usize) -> Vec<Case> {
    let heads = Heads { tokens: model.tokens(), heads: model.heads, head_size: model.width / model.heads };
    let (t, h, d) = (heads.tokens, heads.heads, model.width);
    let shape = format!("{} [{}, {d}], {t} tokens, {h} heads, class token", model.name, images * t);
    let place = move |room: &mut Room| {
        let (q, kv) = (room.activation(images, d), room.activation(images * t, 2 * d));
        (q, kv, room.f32(images * h, t), room.activation(images, d))
    };
    vec![
        Case::new("query_attention", shape.clone(), images, whole, move |room| {
            let (q, kv, p, o) = place(room);
            Placed::new(move |b| b.query_attention(heads, q, kv, p, o, Mask::NONE))
        }),
        Case::new("query_attention_backward", shape, images, whole, move |room| {
            let (q, kv, p, o) = place(room);
            let (d_o, d_q, d_kv) =
                (room.activation(images, d), room.activation(images, d), room.activation(images * t, 2 * d));
            let run =
                Placed::new(move |b| b.query_attention_backward(heads, q, kv, p, Mask::NONE, d_o, d_q, d_kv));
            run.after(move |b| b.query_attention(heads, q, kv, p, o, Mask::NONE))
        }),
    ]
}

/// Our kernels beside a product, for epilogues that cuBLASLt does not fuse.
fn elementwise(model: &Model, images: usize, all_images: bool) -> Vec<Case> {
    let (rows, d, m) = (images * model.tokens(), model.width, 4 * model.width);
    let hidden = half(rows, m);
    let mut cases = vec![
        Case::new("gelu", format!("{} [{rows}, {m}]", model.name), images, whole, move |room| {
            let (pre, y) = (room.activation(rows, m), room.activation(rows, m));
            Placed::new(move |b| b.gelu(pre, Gelu::Tanh, Mask::NONE, y))
        }),
        Case::new("swiglu", format!("{} [{rows}, {m}]", model.name), images, whole, move |room| {
            let (pre, y) = (room.activation(rows, 2 * m), room.activation(rows, m));
            Placed::new(move |b| b.swiglu(pre, Mask::NONE, y))
        }),
        Case::new("swiglu_backward", format!("{} [{rows}, {m}]", model.name), images, whole, move |room| {
            let (d_y, pre, d_pre) =
                (room.activation(rows, m), room.activation(rows, 2 * m), room.activation(rows, 2 * m));
            Placed::new(move |b| b.swiglu_backward(d_y, pre, Mask::NONE, d_pre, None))
        }),
        Case::new("rotate", format!("{} [{rows}, {}]", model.name, 2 * d), images, whole, move |room| {
            let (tokens, head_size) = (rows / images, 64);
            let heads = Heads { tokens, heads: d / head_size, head_size };
            let rope = Rope { table: room.param(tokens - 1, head_size), pairs: RopePairs::Half };
            let x = room.activation(rows, 2 * d);
            Placed::new(move |b| b.rotate(&rope, heads, x, false))
        }),
        Case::new(
            "bias gradient",
            format!("{} [{rows}, {m}]", model.name),
            images,
            move |launches, _| {
                let slices = launches[0].grid[1] as usize;
                vec![traffic(hidden, 4 * slices * m), sum_partials(slices, 1, m)]
            },
            move |room| {
                let (d_y, x) = (room.activation(rows, m), room.activation(rows, d));
                let w = Linear { d_weight: None, ..room.linear(m, d, true) };
                Placed::new(move |b| b.matmul_backward(d_y, x, &w, InputGrad::None))
            },
        ),
    ];
    // A few rows are enough on the host, where the product beside the kernel is slow.
    let rows = if all_images { rows } else { model.tokens() };
    let hidden = half(rows, m);
    let shape = format!("{} [{rows}, {m}], erf", model.name);
    let images = rows / model.tokens();
    cases.push(
        Case::new(
            "fc1, gelu",
            shape.clone(),
            images,
            move |_, _| vec![traffic(hidden + 4 * m, 2 * hidden)],
            move |room| {
                let (x, pre, y) =
                    (room.activation(rows, d), room.activation(rows, m), room.activation(rows, m));
                let w = room.linear(m, d, false);
                let epilogue = Epilogue::BiasGelu { pre: Some(pre), form: Gelu::Erf, dropout: Mask::NONE };
                Placed::new(move |b| b.matmul(x, &w, epilogue, y))
            },
        )
        .product(),
    );
    cases.push(
        Case::new(
            "fc2 input gradient, gelu",
            shape,
            images,
            move |_, _| vec![traffic(2 * hidden, hidden)],
            move |room| {
                let (d_y, x) = (room.activation(rows, d), room.activation(rows, m));
                let (pre, d_pre) = (room.activation(rows, m), room.activation(rows, m));
                let w = room.linear(d, m, false);
                let grad = InputGrad::Gelu { d_pre, pre, form: Gelu::Erf, dropout: Mask::NONE };
                Placed::new(move |b| b.matmul_backward(d_y, x, &w, grad))
            },
        )
        .product(),
    );
    cases
}

fn head(model: &Model, images: usize) -> Vec<Case> {
    let (t, d) = (model.tokens(), model.width);
    let rows = images * t;
    let pool = Pool::Token { tokens: t, index: 0 };
    let shape = format!("{} [{rows}, {d}]", model.name);
    vec![
        Case::new("pool", shape.clone(), images, whole, move |room| {
            let (x, y) = (room.activation(rows, d), room.activation(images, d));
            Placed::new(move |b| b.pool(pool, x, y))
        }),
        Case::new("pool_backward", shape, images, whole, move |room| {
            let (d_y, d_x) = (room.activation(images, d), room.activation(rows, d));
            Placed::new(move |b| b.pool_backward(pool, d_y, d_x, Write::Assign))
        }),
    ]
}

fn loss(samples: usize, classes: usize) -> Case {
    Case::new("loss", format!("[{samples}, {classes}]"), samples, whole, move |room| {
        let (z, d_z) = (room.activation(samples, classes), room.activation(samples, classes));
        let metrics = room.f32(samples, 3);
        let loss = Loss { label_smoothing: 0.1, ..Loss::plain(LossKind::Softmax) };
        Placed::new(move |b| b.loss(loss, z, d_z, metrics))
    })
    .batch(slot(samples, 8))
}

/// Norm, clip and AdamW over the parameters of a model, with their bf16 copy.
fn adamw(params: usize) -> Case {
    let params = params.next_multiple_of(64);
    let least = move |launches: &[Launched], cost: Cost| {
        let partials = 8 * launches.first().map_or(0, |norm| norm.grid[0] as usize);
        // First the norm of the gradients.
        let update = traffic(cost.read as usize - 4 * params, cost.written as usize);
        vec![traffic(4 * params, partials), traffic(partials, 0), update]
    };
    let place = move |room: &mut Room| {
        for arena in [Arena::Params, Arena::Grads, Arena::Moment1, Arena::Moment2] {
            room.plan.set_bytes(arena, 4 * params);
        }
        let segments =
            vec![Segment { name: "all".into(), param: 0, grad: 0, len: params, group: 0, factor: None }];
        let run = Placed::new(move |b| {
            b.update(&Update {
                rule: Rule::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, bf16: false },
                segments: &segments,
                groups: &[GroupScalars { lr: 1e-6, decay: 1e-8 }],
                t: 1,
                clip: Some(1.0),
                clip_torch: false,
                limits: crate::backend::Limits::NONE,
                ema_decay: None,
            })
        });
        run.after(|b| b.begin_report())
    };
    let case = Case::new("update", format!("AdamW, {params} parameters"), 1, least, place);
    Case { recorded: false, ..case }
}
