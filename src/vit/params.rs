//! The parameters of a model: names, shapes, places in the flat buffers, initial values.
//!
//! Names and file shapes are timm's. In memory a tensor is a row-major matrix whose rows are padded to
//! [`ROW_ALIGN`] elements and whose start is aligned to [`TENSOR_ALIGN`] bytes. Padding is zero and stays
//! zero. The order is stem, blocks, head, so that "everything below block k" is a prefix.

use std::borrow::Cow;

use crate::backend::memory::{Arena, Dtype, Mat, ROW_ALIGN, TENSOR_ALIGN};
use crate::rng::{Domain, Stream};

use super::config::{InitScheme, MlpKind, ModelConfig, NormPlace, PoolKind, Posemb, QkvBias, RopeKind};
use super::rope;

/// The role of a tensor. It decides the initial values and how optimisers group the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// `patch_embed.proj.weight`
    PatchKernel,
    /// `patch_embed.proj.bias`
    PatchBias,
    /// Class and distillation tokens.
    ExtraToken,
    /// Register tokens.
    Registers,
    /// The learned position embedding.
    PosEmbed,
    /// The fixed sincos2d table. It is stored with the parameters, but is not one.
    SincosTable,
    /// The fixed table of rotary positions. It is stored with the parameters, but is not one.
    RopeTable,
    /// Scale of a LayerNorm.
    NormGamma,
    /// Shift of a LayerNorm.
    NormBeta,
    /// Fused q, k, v (or k, v) projection; its parts are initialised separately. `parts` is 3, 2 or 1.
    AttentionIn {
        /// How many projections are fused.
        parts: usize,
    },
    /// Bias of the fused projection.
    AttentionInBias,
    /// Zeros in place of a bias that the model lacks. They are stored with the parameters but are not parameters, so that
    /// the passes need no special case.
    NoBias,
    /// Weight of the projection after an attention.
    AttentionOut,
    /// Bias of the projection after an attention.
    AttentionOutBias,
    /// Weight of a dense layer of an MLP.
    MlpKernel,
    /// Bias of a dense layer of an MLP.
    MlpBias,
    /// Weight of the first layer of a SwiGLU: gates, then values.
    GatedKernel,
    /// Bias of the first layer of a SwiGLU.
    GatedBias,
    /// Factors of a LayerScale.
    LayerScale,
    /// The learned query of a MAP head.
    MapProbe,
    /// Weight of the tanh layer before the head.
    RepKernel,
    /// Bias of the tanh layer before the head.
    RepBias,
    /// Weight of the classifier.
    HeadKernel,
    /// Bias of the classifier.
    HeadBias,
}

impl ParamKind {
    /// Whether it is a `kernel` in flax's sense, which big_vision and timm decay (big_vision: `.*/kernel`).
    pub fn is_kernel(self) -> bool {
        use ParamKind::*;
        matches!(
            self,
            PatchKernel
                | AttentionIn { .. }
                | AttentionOut
                | MlpKernel
                | GatedKernel
                | RepKernel
                | HeadKernel
        )
    }

    /// Whether it is part of the classifier, which gets the base learning rate.
    pub fn is_head(self) -> bool {
        use ParamKind::*;
        matches!(self, HeadKernel | HeadBias | RepKernel | RepBias)
    }
}

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    /// timm's name, as in files.
    pub name: String,
    /// Shape in files.
    pub shape: Vec<usize>,
    /// The role of the tensor.
    pub kind: ParamKind,
    /// 0: stem; 1..=L: blocks; L+1: final norm, pooling and head.
    pub depth: usize,
    /// Rows in memory.
    pub rows: usize,
    /// Values per row.
    pub cols: usize,
    /// Elements from one row to the next; `cols <= ld`.
    pub ld: usize,
    /// Whether it lies directly after the tensor before it, so that both are one row.
    pub joined: bool,
    /// Element offset in [`Arena::Params`].
    pub offset: usize,
    /// Element offset in [`Arena::Grads`]; `None` if frozen or not a parameter.
    pub grad_offset: Option<usize>,
}

impl Param {
    /// Number of elements in the flat buffers, with row padding.
    pub fn padded_len(&self) -> usize {
        self.rows * self.ld
    }

    /// Number of values, without padding.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is stored in checkpoints and counted as a parameter.
    pub fn is_parameter(&self) -> bool {
        !matches!(self.kind, ParamKind::SincosTable | ParamKind::RopeTable | ParamKind::NoBias)
    }

    /// Its place in memory, f32 `[rows, cols]`.
    pub fn mat(&self) -> Mat {
        self.mat_in(Arena::Params, self.offset)
    }

    /// The place of its gradient; `None` if it has none.
    pub fn grad(&self) -> Option<Mat> {
        self.grad_offset.map(|offset| self.mat_in(Arena::Grads, offset))
    }

    /// The same place in the EMA of the weights.
    pub fn ema(&self) -> Mat {
        self.mat_in(Arena::Ema, self.offset)
    }

    fn mat_in(&self, arena: Arena, offset: usize) -> Mat {
        Mat { arena, offset: offset * 4, rows: self.rows, cols: self.cols, ld: self.ld, dtype: Dtype::F32 }
    }

    /// Whether files hold its values in the order of memory.
    pub fn keeps_order(&self) -> bool {
        self.kind != ParamKind::PatchKernel
    }

    /// Values in file order (dense, `shape`) → values in memory order (dense, `rows × cols`).
    pub fn from_file_order<'a>(&self, values: &'a [f32]) -> Cow<'a, [f32]> {
        assert_eq!(values.len(), self.len(), "{}: wrong number of values", self.name);
        match (self.kind, self.shape.as_slice()) {
            (ParamKind::PatchKernel, &[d, c, ph, pw]) => permute(values, [d, c, ph, pw], [0, 2, 3, 1]).into(),
            _ => values.into(),
        }
    }

    /// The inverse of [`Param::from_file_order`].
    pub fn to_file_order(&self, values: &[f32]) -> Vec<f32> {
        assert_eq!(values.len(), self.len(), "{}: wrong number of values", self.name);
        match (self.kind, self.shape.as_slice()) {
            (ParamKind::PatchKernel, &[d, c, ph, pw]) => permute(values, [d, ph, pw, c], [0, 3, 1, 2]),
            _ => values.to_vec(),
        }
    }
}

/// Transposes a dense 4-D array: axis i of the result is axis `axes[i]` of the input.
fn permute(values: &[f32], shape: [usize; 4], axes: [usize; 4]) -> Vec<f32> {
    let mut strides = [1; 4];
    for i in (0..3).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    let [n0, n1, n2, n3] = axes.map(|a| shape[a]);
    let [s0, s1, s2, s3] = axes.map(|a| strides[a]);
    let mut out = Vec::with_capacity(values.len());
    for i0 in 0..n0 {
        for i1 in 0..n1 {
            for i2 in 0..n2 {
                for i3 in 0..n3 {
                    out.push(values[i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3]);
                }
            }
        }
    }
    out
}

/// All tensors of a model, in the order of the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamLayout {
    /// The tensors, fixed tables and zeros for missing biases among them.
    pub params: Vec<Param>,
    /// Elements of [`Arena::Params`].
    pub param_elements: usize,
    /// Elements of [`Arena::Grads`].
    pub grad_elements: usize,
}

impl ParamLayout {
    /// Lays out a model; `frozen` says which parameters get no gradient and no moments.
    pub fn new(config: &ModelConfig, frozen: impl Fn(&Param) -> bool) -> Self {
        let mut b = Builder { params: Vec::new(), depth: 0 };
        b.model(config);
        let mut layout = Self { params: b.params, param_elements: 0, grad_elements: 0 };
        let align = TENSOR_ALIGN / 4;
        // Tensors of one row have their gradients in one row too, with a gap for what is not trained.
        for row in layout.params.chunk_by_mut(|_, next| next.joined) {
            let (mut len, mut trained) = (0, false);
            for p in row.iter_mut() {
                p.offset = layout.param_elements + len;
                if p.is_parameter() && !frozen(p) {
                    p.grad_offset = Some(layout.grad_elements + len);
                    trained = true;
                }
                len += p.padded_len();
            }
            layout.param_elements += len.next_multiple_of(align);
            layout.grad_elements += if trained { len.next_multiple_of(align) } else { 0 };
        }
        layout
    }

    /// The tensor called `name`. Panics if there is none: names come from this layout.
    pub fn get(&self, name: &str) -> &Param {
        self.find(name).unwrap_or_else(|| panic!("the model has no parameter `{name}`"))
    }

    /// The bias of layer `name` as one row, and its gradient if any part of it is trained.
    pub(super) fn bias(&self, name: &str) -> (Mat, Option<Mat>) {
        if let Some(bias) = self.find(&format!("{name}.bias")) {
            return (bias.mat(), bias.grad());
        }
        // q and v have tensors of their own, with zeros for k between them.
        let layer = name.strip_suffix("qkv").unwrap_or_else(|| panic!("the layer `{name}` has no bias"));
        let [q, v] = ["q_bias", "v_bias"].map(|part| self.get(&format!("{layer}{part}")));
        let whole = |part: Mat| Mat { cols: 3 * part.cols, ld: 3 * part.cols, ..part };
        let first = q.grad_offset.or(v.grad_offset.map(|grad| grad - (v.offset - q.offset)));
        (whole(q.mat()), first.map(|first| whole(q.mat_in(Arena::Grads, first))))
    }

    /// The tensor called `name`, if there is one.
    pub fn find(&self, name: &str) -> Option<&Param> {
        self.params.iter().find(|p| p.name == name)
    }

    /// The stored parameters: all tensors except fixed tables and zeros for missing biases.
    pub fn parameters(&self) -> impl Iterator<Item = &Param> {
        self.params.iter().filter(|p| p.is_parameter())
    }

    /// Number of parameters, as papers count them.
    pub fn count(&self) -> usize {
        self.parameters().map(Param::len).sum()
    }

    /// The first gradient of this [`Param::depth`] and those above it. Their gradients are the rest of the
    /// buffer.
    pub fn gradients_from(&self, depth: usize) -> usize {
        let offsets = self.params.iter().filter(|p| p.depth >= depth).filter_map(|p| p.grad_offset);
        offsets.min().unwrap_or(self.grad_elements)
    }

    /// The lowest [`Param::depth`] that is trained; the backward pass ends there. `None` if nothing is
    /// trained.
    pub fn first_trainable_depth(&self) -> Option<usize> {
        self.params.iter().filter(|p| p.grad_offset.is_some()).map(|p| p.depth).min()
    }
}

struct Builder {
    params: Vec<Param>,
    depth: usize,
}

impl Builder {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], kind: ParamKind) {
        let cols = match kind {
            ParamKind::PatchKernel => shape[1] * shape[2] * shape[3],
            _ => *shape.last().expect("a tensor has a shape"),
        };
        // A head with no classes has no values.
        let rows = shape.iter().product::<usize>() / cols.max(1);
        self.params.push(Param {
            name: name.into(),
            shape: shape.to_vec(),
            kind,
            depth: self.depth,
            rows,
            cols,
            ld: cols.next_multiple_of(ROW_ALIGN),
            joined: false,
            offset: 0,
            grad_offset: None,
        });
    }

    /// A tensor in the row of the one before it.
    fn join(&mut self, name: String, shape: &[usize], kind: ParamKind) {
        self.add(name, shape, kind);
        self.params.last_mut().expect("one was added").joined = true;
    }

    /// Weight and biases of q, k and v.
    fn qkv(&mut self, name: &str, d: usize, bias: QkvBias) {
        use ParamKind::*;
        self.add(format!("{name}.qkv.weight"), &[3 * d, d], AttentionIn { parts: 3 });
        match bias {
            QkvBias::All => self.add(format!("{name}.qkv.bias"), &[3 * d], AttentionInBias),
            QkvBias::None => self.add(format!("{name}.qkv.bias"), &[3 * d], NoBias),
            QkvBias::Qv => {
                self.add(format!("{name}.q_bias"), &[d], AttentionInBias);
                self.join(format!("{name}.k_bias"), &[d], NoBias);
                self.join(format!("{name}.v_bias"), &[d], AttentionInBias);
            }
        }
    }

    fn linear(&mut self, name: &str, out: usize, input: usize, kernel: ParamKind, bias: ParamKind) {
        self.add(format!("{name}.weight"), &[out, input], kernel);
        self.add(format!("{name}.bias"), &[out], bias);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.add(format!("{name}.weight"), &[width], ParamKind::NormGamma);
        self.add(format!("{name}.bias"), &[width], ParamKind::NormBeta);
    }

    fn model(&mut self, c: &ModelConfig) {
        use ParamKind::*;
        let (d, m) = (c.width, c.mlp);
        for name in ["cls_token", "dist_token"].into_iter().take(c.extra_tokens) {
            self.add(name, &[1, 1, d], ExtraToken);
        }
        if c.registers > 0 {
            self.add("reg_token", &[1, c.registers, d], Registers);
        }
        match c.posemb {
            Posemb::Learned => self.add("pos_embed", &[1, c.posemb_rows(), d], PosEmbed),
            Posemb::Sincos2d => self.add("pos_embed", &[1, c.posemb_rows(), d], SincosTable),
            Posemb::None => {}
        }
        if c.rope != RopeKind::None {
            self.add("rope", &[c.patch_grid().patches(), c.head_size()], RopeTable);
        }
        self.add("patch_embed.proj.weight", &[d, 3, c.patch.0, c.patch.1], PatchKernel);
        self.add("patch_embed.proj.bias", &[d], if c.patch_bias { PatchBias } else { NoBias });
        if c.norm_pre {
            self.norm("norm_pre", d);
        }
        let fc1 = match c.mlp_kind {
            MlpKind::Dense => (MlpKernel, MlpBias),
            MlpKind::Swiglu => (GatedKernel, GatedBias),
        };
        for i in 0..c.depth {
            self.depth = i + 1;
            self.norm(&format!("blocks.{i}.norm1"), d);
            self.qkv(&format!("blocks.{i}.attn"), d, c.qkv_bias);
            self.linear(&format!("blocks.{i}.attn.proj"), d, d, AttentionOut, AttentionOutBias);
            if c.layer_scale > 0.0 {
                self.add(format!("blocks.{i}.ls1.gamma"), &[d], LayerScale);
            }
            self.norm(&format!("blocks.{i}.norm2"), d);
            self.linear(&format!("blocks.{i}.mlp.fc1"), c.fc1_width(), d, fc1.0, fc1.1);
            if c.mlp_norm {
                self.norm(&format!("blocks.{i}.mlp.norm"), m);
            }
            self.linear(&format!("blocks.{i}.mlp.fc2"), d, m, MlpKernel, MlpBias);
            if c.layer_scale > 0.0 {
                self.add(format!("blocks.{i}.ls2.gamma"), &[d], LayerScale);
            }
        }
        self.depth = c.depth + 1;
        // timm calls the norm `fc_norm` after the pooling. For the class token, both places give the same
        // function.
        let after = c.norm == NormPlace::After && c.pool == PoolKind::Gap;
        if c.norm != NormPlace::None {
            self.norm(if after { "fc_norm" } else { "norm" }, d);
        }
        if c.pool == PoolKind::Map {
            self.add("attn_pool.latent", &[1, 1, d], MapProbe);
            self.linear("attn_pool.q", d, d, AttentionIn { parts: 1 }, AttentionInBias);
            self.linear("attn_pool.kv", 2 * d, d, AttentionIn { parts: 2 }, AttentionInBias);
            self.linear("attn_pool.proj", d, d, AttentionOut, AttentionOutBias);
            self.norm("attn_pool.norm", d);
            self.linear("attn_pool.mlp.fc1", m, d, MlpKernel, MlpBias);
            self.linear("attn_pool.mlp.fc2", d, m, MlpKernel, MlpBias);
        }
        let features = if c.rep_size > 0 {
            self.linear("pre_logits", c.rep_size, c.pooled_width(), RepKernel, RepBias);
            c.rep_size
        } else {
            c.pooled_width()
        };
        self.linear("head", c.classes, features, HeadKernel, HeadBias);
        if c.extra_tokens == 2 {
            self.linear("head_dist", c.classes, features, HeadKernel, HeadBias);
        }
    }
}

/// The initial values of one tensor, dense in memory order. They depend only on the seed, the tensor's index
/// and its shape, not on the rest of the model.
pub fn initial_values(config: &ModelConfig, param: &Param, index: usize, seed: u64) -> Vec<f32> {
    use InitScheme::*;
    use ParamKind::*;
    let mut s = Stream::new(seed, Domain::Init, index as u64, 0);
    let n = param.len();
    let (fan_in, fan_out) = (param.cols as f64, param.rows as f64);
    let scheme = config.init;
    let jax = matches!(scheme, VitJax | BigVision);
    let timm_jax = matches!(scheme, TimmJax | TimmJaxNlhb);
    let constant = |v: f32| vec![v; n];
    let zero = || vec![0.0; n];

    match param.kind {
        NormGamma => constant(1.0),
        NormBeta | AttentionInBias | NoBias | AttentionOutBias => zero(),
        LayerScale => constant(config.layer_scale),
        SincosTable => sincos2d(config),
        RopeTable => rope::table(config),
        PatchKernel if jax || timm_jax => lecun_normal(&mut s, n, fan_in),
        PatchKernel => uniform(&mut s, n, 1.0 / fan_in.sqrt()),
        PatchBias if jax || timm_jax => zero(),
        PatchBias => uniform(&mut s, n, 1.0 / (config.patch_grid().patch_len() as f64).sqrt()),
        ExtraToken if jax => zero(),
        ExtraToken if scheme == Deit3 => normal(&mut s, n, 0.02),
        ExtraToken => normal(&mut s, n, 1e-6),
        // Registers that start equal would stay equal.
        Registers if jax || scheme == Deit3 => normal(&mut s, n, 0.02),
        Registers => normal(&mut s, n, 1e-6),
        PosEmbed if scheme == BigVision => normal(&mut s, n, 1.0 / (config.width as f64).sqrt()),
        PosEmbed => normal(&mut s, n, 0.02),
        MapProbe if jax => uniform(&mut s, n, (6.0 / (1.0 + fan_in)).sqrt()),
        MapProbe => normal(&mut s, n, 1.0 / fan_in.sqrt()),
        // In flax, q, k and v are separate matrices. timm's `jax` mode uses the fused one (narrower by √2).
        AttentionIn { parts } if jax || scheme == TimmMoco => {
            uniform(&mut s, n, (6.0 / (fan_in + fan_out / parts as f64)).sqrt())
        }
        AttentionIn { .. } | AttentionOut | MlpKernel if jax || timm_jax => {
            xavier(&mut s, n, fan_in, fan_out)
        }
        AttentionOut | MlpKernel | HeadKernel if scheme == TimmMoco => xavier(&mut s, n, fan_in, fan_out),
        AttentionIn { .. } | AttentionOut | MlpKernel => normal(&mut s, n, 0.02),
        // timm's rule: every gate starts at the same value, silu(1).
        GatedKernel => {
            let mut values = normal(&mut s, n / 2, 1e-6);
            values.extend(match jax || timm_jax {
                true => xavier(&mut s, n / 2, fan_in, fan_out / 2.0),
                false => normal(&mut s, n / 2, 0.02),
            });
            values
        }
        GatedBias => {
            let mut values = constant(1.0);
            values[n / 2..].fill(0.0);
            values
        }
        MlpBias if jax || timm_jax => normal(&mut s, n, 1e-6),
        MlpBias => zero(),
        RepKernel => lecun_normal(&mut s, n, fan_in),
        RepBias => zero(),
        HeadKernel if jax || timm_jax => zero(),
        HeadKernel => normal(&mut s, n, 0.02),
        HeadBias if scheme == TimmJaxNlhb => constant(-(config.classes as f32).ln()),
        HeadBias => constant(config.head_bias),
    }
}

/// Normal truncated at two standard deviations and widened to variance `1/fan_in` (flax's `lecun_normal`).
fn lecun_normal(s: &mut Stream, n: usize, fan_in: f64) -> Vec<f32> {
    let std = (1.0 / fan_in).sqrt() / 0.879_625_661_034_239_8;
    let mut draw = || loop {
        let x = s.normal();
        if x.abs() <= 2.0 {
            return (x * std) as f32;
        }
    };
    (0..n).map(|_| draw()).collect()
}

fn normal(s: &mut Stream, n: usize, std: f64) -> Vec<f32> {
    (0..n).map(|_| (s.normal() * std) as f32).collect()
}

fn uniform(s: &mut Stream, n: usize, bound: f64) -> Vec<f32> {
    (0..n).map(|_| ((2.0 * s.uniform_f64() - 1.0) * bound) as f32).collect()
}

/// Glorot and Bengio 2010.
fn xavier(s: &mut Stream, n: usize, fan_in: f64, fan_out: f64) -> Vec<f32> {
    uniform(s, n, (6.0 / (fan_in + fan_out)).sqrt())
}

/// big_vision's fixed position table, `[N, D]`: `[sin(xω) | cos(xω) | sin(yω) | cos(yω)]` with
/// `ω_j = 10000^(-j / (D/4 - 1))`.
pub fn sincos2d(config: &ModelConfig) -> Vec<f32> {
    let (rows, cols) = config.patch_grid().grid();
    let quarter = config.width / 4;
    let omega: Vec<f64> =
        (0..quarter).map(|j| 10_000f64.powf(-(j as f64) / (quarter as f64 - 1.0).max(1.0))).collect();
    let mut out = Vec::with_capacity(rows * cols * config.width);
    for y in 0..rows {
        for x in 0..cols {
            for position in [x as f64, y as f64] {
                out.extend(omega.iter().map(|w| (position * w).sin() as f32));
                out.extend(omega.iter().map(|w| (position * w).cos() as f32));
            }
        }
    }
    out
}
