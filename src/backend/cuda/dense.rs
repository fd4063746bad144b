//! Dense layers: cuBLASLt products with fused epilogues, or our kernels after a plain product, whichever is
//! faster.
//!
//! In bf16 the forward pass can fuse bias, residual and the tanh form of GELU; the backward pass can fuse
//! GELU's derivative and the bias gradient. Each also exists as a separate kernel, and the GPU decides which
//! is faster ([`super::ways`]). The erf form and dropout inside the MLP always use our kernels. In f32 only
//! the bias is fused: cuBLASLt's fused GELU is an approximation too coarse for f32.

use super::Cuda;
use super::blas::{Fused, Matrix, Operands, Shape};
use super::driver::Address;
use super::launch::{
    BiasArgs, BiasGeluArgs, BiasResidualArgs, BiasTanhArgs, GeluBackwardArgs, MaskArgs, SwigluArgs,
    SwigluBackwardArgs, TanhBackwardArgs, variant,
};
use super::product;
use super::sums;
use super::ways::{Way, in_the_fastest_way};
use crate::backend::{Dtype, Epilogue, Gelu, InputGrad, Linear, Mask, Mat, ops};
use crate::error::Result;

impl Cuda {
    /// A mask over the samples of the micro-batch.
    pub(super) fn mask(&self, mask: Mask) -> MaskArgs {
        MaskArgs::new(mask, &self.micro)
    }

    /// Rows per sample, given `rows` rows in the micro-batch.
    pub(super) fn rows_per_sample(&self, rows: usize) -> u32 {
        (rows / self.micro.samples).max(1) as u32
    }
}

/// Blocks of 256 threads for an elementwise kernel: eight values per thread.
pub(super) fn elementwise_grid(rows: usize, cols: usize) -> [u32; 3] {
    [(rows * cols.div_ceil(8)).div_ceil(256) as u32, 1, 1]
}

/// A row-major matrix as cuBLASLt sees it.
fn column_major(mat: Mat) -> Matrix {
    // A single row has no stride, but the library expects a valid one.
    let ld = if mat.rows <= 1 { mat.cols.next_multiple_of(8) } else { mat.ld };
    Matrix { rows: mat.cols, cols: mat.rows, ld, dtype: mat.dtype }
}

fn form_code(form: Gelu) -> u32 {
    match form {
        Gelu::Tanh => 0,
        Gelu::Erf => 1,
        Gelu::Quick => 2,
    }
}

/// Operands of one product, in row-major terms.
#[derive(Clone, Copy)]
struct Product {
    shape: Shape,
    operands: Operands,
}

impl Product {
    /// `y = x·Wᵀ`
    fn forward(cuda: &Cuda, x: Mat, weight: Mat, y: Mat) -> Self {
        Self::new(cuda, (weight, true), (x, false), y)
    }

    /// `d_x = d_y·W`
    fn input_grad(cuda: &Cuda, d_y: Mat, weight: Mat, d_x: Mat) -> Self {
        Self::new(cuda, (weight, false), (d_y, false), d_x)
    }

    /// `d_W = d_yᵀ·x`
    fn weight_grad(cuda: &Cuda, d_y: Mat, x: Mat, d_weight: Mat) -> Self {
        Self::new(cuda, (x, false), (d_y, true), d_weight)
    }

    fn new(cuda: &Cuda, (a, transpose_a): (Mat, bool), (b, transpose_b): (Mat, bool), d: Mat) -> Self {
        let (a, b) = (cuda.operand(a), cuda.operand(b));
        let address = cuda.at(d);
        let shape = Shape {
            transpose_a,
            transpose_b,
            a: column_major(a),
            b: column_major(b),
            d: column_major(d),
            add_c: false,
            fused: Fused::Nothing,
            aux_ld: 0,
        };
        let operands = Operands { a: cuda.at(a), b: cuda.at(b), c: address, d: address, bias: 0, aux: 0 };
        Self { shape, operands }
    }

    /// `+ C`, which has D's layout.
    fn add(mut self, c: Address) -> Self {
        self.shape.add_c = true;
        self.operands.c = c;
        self
    }

    fn fuse(mut self, fused: Fused, bias: Address) -> Self {
        self.shape.fused = fused;
        self.operands.bias = bias;
        self
    }

    fn aux(mut self, cuda: &Cuda, aux: Mat) -> Self {
        self.shape.aux_ld = column_major(aux).ld;
        self.operands.aux = cuda.at(aux);
        self
    }

    /// False where cuBLASLt has no such epilogue for these operands. A bias off a 16-byte boundary (part of a
    /// layer of odd width) is never passed to it: its requirements there are not documented.
    fn try_run(&self, cuda: &mut Cuda) -> Result<bool> {
        if !self.operands.bias.is_multiple_of(16) {
            return Ok(false);
        }
        let workspace = cuda.arena(crate::backend::Arena::Workspace).address;
        cuda.blas.run(&self.shape, &self.operands, workspace)
    }

    /// A product without an epilogue: by cuBLASLt, or by our kernel if cuBLASLt refuses it, for example with
    /// one row.
    fn run(&self, cuda: &mut Cuda) -> Result<()> {
        match self.try_run(cuda)? {
            true => Ok(()),
            false => product::product(cuda, &self.shape, &self.operands),
        }
    }

    /// What a second run would find changed: a D that is added to.
    fn changed(&self) -> Vec<(Address, usize)> {
        let in_place = self.shape.add_c && self.operands.c == self.operands.d;
        if in_place { vec![(self.operands.d, self.shape.d.span())] } else { Vec::new() }
    }
}

/// The names of ways: an epilogue of the product; a plain product and our kernels; a plain product where an
/// earlier operation has done the rest.
const FUSED: &str = "fused";
const APART: &str = "apart";
const BESIDE: &str = "beside";

/// Does a product with its epilogue, or `apart`, whichever is faster here.
fn fused_or_apart(cuda: &mut Cuda, fused: &Product, apart: &dyn Fn(&mut Cuda) -> Result<()>) -> Result<()> {
    let ways =
        [Way::new(FUSED, |cuda| fused.try_run(cuda)), Way::new(APART, |cuda| apart(cuda).map(|()| true))];
    in_the_fastest_way(cuda, &fused.shape, &fused.changed(), &ways).map(|_| ())
}

pub(super) fn matmul(cuda: &mut Cuda, op: &ops::Matmul) -> Result<()> {
    let ops::Matmul { x, w, epilogue, y } = *op;
    let product = Product::forward(cuda, x, w.weight, y);
    // The library reads a bias in D's type.
    let bias = cuda.at(if y.dtype == Dtype::F32 { w.bias } else { cuda.operand(w.bias) });
    match epilogue {
        Epilogue::None => product.run(cuda),
        Epilogue::Bias => {
            if !product.fuse(Fused::Bias, bias).try_run(cuda)? {
                product.run(cuda)?;
                add_bias(cuda, w.bias, y)?;
            }
            Ok(())
        }
        Epilogue::BiasResidual(residual) => {
            let added = product.add(cuda.at(residual));
            let apart = |cuda: &mut Cuda| {
                // A separate product would overwrite a residual in place.
                if residual == y {
                    added.run(cuda)?;
                    return add_bias(cuda, w.bias, y);
                }
                product.run(cuda)?;
                bias_residual(cuda, y, w.bias, residual, y)
            };
            // C shares D's layout, so another leading dimension needs the other way.
            match residual.ld == y.ld && residual.dtype == y.dtype {
                true => fused_or_apart(cuda, &added.fuse(Fused::Bias, bias), &apart),
                false => apart(cuda),
            }
        }
        Epilogue::BiasGelu { pre, form, dropout } => {
            let z = pre.unwrap_or(y);
            let apart = |cuda: &mut Cuda| {
                Product::forward(cuda, x, w.weight, z).run(cuda)?;
                bias_gelu(cuda, z, Some(w.bias), pre, form, dropout, y)
            };
            let fused = match pre {
                Some(pre) => product.fuse(Fused::BiasGelu, bias).aux(cuda, pre),
                None => product.fuse(Fused::BiasGeluAlone, bias),
            };
            match y.dtype == Dtype::Bf16 && form == Gelu::Tanh && dropout.rate == 0.0 {
                true => fused_or_apart(cuda, &fused, &apart),
                false => apart(cuda),
            }
        }
        Epilogue::BiasTanh => {
            product.run(cuda)?;
            bias_tanh(cuda, w.bias, y)
        }
    }
}

pub(super) fn matmul_backward(cuda: &mut Cuda, op: &ops::MatmulBackward) -> Result<()> {
    let ops::MatmulBackward { d_y, x, w, d_x } = *op;
    weight_and_bias_grad(cuda, d_y, x, w)?;
    // After the weights' gradients, because `d_x` may overwrite `x`.
    match d_x {
        InputGrad::None => Ok(()),
        InputGrad::Plain(d_x) => Product::input_grad(cuda, d_y, w.weight, d_x).run(cuda),
        InputGrad::Add(d_x) => Product::input_grad(cuda, d_y, w.weight, d_x).add(cuda.at(d_x)).run(cuda),
        InputGrad::Gelu { d_pre, pre, form, dropout } => {
            let product = Product::input_grad(cuda, d_y, w.weight, d_pre);
            let apart = |cuda: &mut Cuda| {
                product.run(cuda)?;
                gelu_backward(cuda, d_pre, pre, form, dropout)
            };
            match d_pre.dtype == Dtype::Bf16 && form == Gelu::Tanh && dropout.rate == 0.0 {
                true => fused_or_apart(cuda, &product.fuse(Fused::GeluGrad, 0).aux(cuda, pre), &apart),
                false => apart(cuda),
            }
        }
        InputGrad::Tanh { d, y } => {
            Product::input_grad(cuda, d_y, w.weight, d).run(cuda)?;
            tanh_backward(cuda, d, y)
        }
    }
}

/// The gradients of weight and bias, if they are trained and the bias gradient was not made with `d_y`.
fn weight_and_bias_grad(cuda: &mut Cuda, d_y: Mat, x: Mat, w: &Linear) -> Result<()> {
    let made = cuda.take_made_bias(d_y, w);
    let Some(d_weight) = w.d_weight else {
        let wanted = w.d_bias.filter(|_| made.is_none());
        return wanted.map_or(Ok(()), |d_bias| sums::column_sums(cuda, d_y, d_bias));
    };
    let accumulate = cuda.micro.gradients.adds();
    let product = Product::weight_grad(cuda, d_y, x, d_weight);
    let product = if accumulate { product.add(cuda.at(d_weight)) } else { product };
    let Some(d_bias) = w.d_bias else { return product.run(cuda) };

    // The first micro-batch of a step chooses; the others repeat its choice.
    if accumulate && made.is_some() {
        return product.run(cuda);
    }
    let fused = product.fuse(Fused::BiasGrad, cuda.at(d_bias));
    let beside = made
        .map(|price| Way { elsewhere: price, ..Way::new(BESIDE, |cuda| product.run(cuda).map(|()| true)) });
    // By rule, before the fused one: that epilogue may keep the library from splitting the sum over all rows,
    // and without a split there is little parallelism.
    let apart = Way::new(APART, |cuda| {
        product.run(cuda)?;
        sums::column_sums(cuda, d_y, d_bias).map(|()| true)
    });
    // The fused epilogue writes the gradient and cannot add to it.
    let may_fuse = !accumulate && d_y.dtype == Dtype::Bf16;
    let fused_way = may_fuse.then(|| Way::new(FUSED, |cuda| fused.try_run(cuda)));
    let ways: Vec<Way> = beside.into_iter().chain([apart]).chain(fused_way).collect();
    let mut changed = product.changed();
    // Timing must restore this gradient: it may hold values already.
    changed.push((cuda.at(d_bias), d_bias.span_bytes()));
    let at = in_the_fastest_way(cuda, &fused.shape, &changed, &ways)?;
    if made.is_some() && ways[at].name != BESIDE {
        cuda.bias_sums.leave_to_product(d_bias);
    }
    Ok(())
}

// Our kernels around a plain product (kernels/activation.cu, kernels/column_sums.cu) ---------------------------------

fn add_bias(cuda: &Cuda, bias: Mat, y: Mat) -> Result<()> {
    let args = BiasArgs { bias: cuda.at(bias), y: cuda.view(y) };
    cuda.launch(variant!(y.dtype, "bias"), elementwise_grid(y.rows, y.cols), 0, &args)
}

fn bias_residual(cuda: &Cuda, z: Mat, bias: Mat, residual: Mat, y: Mat) -> Result<()> {
    let args = BiasResidualArgs {
        z: cuda.view(z),
        bias: cuda.at(bias),
        residual: cuda.view(residual),
        y: cuda.view(y),
    };
    cuda.launch(variant!(y.dtype, "bias_residual"), elementwise_grid(y.rows, y.cols), 0, &args)
}

pub(super) fn gelu(cuda: &mut Cuda, op: &ops::Gelu) -> Result<()> {
    bias_gelu(cuda, op.pre, None, None, op.form, op.dropout, op.y)
}

/// `z` holds `pre`, or the product without its bias: then the sum is stored in `pre`, if it is kept.
fn bias_gelu(
    cuda: &Cuda,
    z: Mat,
    bias: Option<Mat>,
    pre: Option<Mat>,
    form: Gelu,
    dropout: Mask,
    y: Mat,
) -> Result<()> {
    let args = BiasGeluArgs {
        params: cuda.step_params.address(),
        dropout: cuda.mask(dropout),
        rows_per_sample: cuda.rows_per_sample(y.rows),
        form: form_code(form),
        z: cuda.view(z),
        bias: cuda.at_or_null(bias),
        pre: cuda.view_or_none(pre),
        y: cuda.view(y),
    };
    cuda.launch(variant!(y.dtype, "bias_gelu"), elementwise_grid(y.rows, y.cols), 0, &args)
}

fn gelu_backward(cuda: &Cuda, d: Mat, pre: Mat, form: Gelu, dropout: Mask) -> Result<()> {
    let args = GeluBackwardArgs {
        params: cuda.step_params.address(),
        dropout: cuda.mask(dropout),
        rows_per_sample: cuda.rows_per_sample(d.rows),
        form: form_code(form),
        d: cuda.view(d),
        pre: cuda.view(pre),
    };
    cuda.launch(variant!(d.dtype, "gelu_backward"), elementwise_grid(d.rows, d.cols), 0, &args)
}

pub(super) fn swiglu(cuda: &mut Cuda, op: &ops::Swiglu) -> Result<()> {
    let ops::Swiglu { pre, dropout, y } = *op;
    assert_eq!((pre.rows, pre.cols), (y.rows, 2 * y.cols), "swiglu: {pre} → {y}");
    let args = SwigluArgs {
        params: cuda.step_params.address(),
        dropout: cuda.mask(dropout),
        rows_per_sample: cuda.rows_per_sample(y.rows),
        pre: cuda.view(pre),
        y: cuda.view(y),
    };
    cuda.launch(variant!(y.dtype, "swiglu"), elementwise_grid(y.rows, y.cols), 0, &args)
}

/// The bias gradient is left to the product, which sums the rows of its `d_y` itself.
pub(super) fn swiglu_backward(cuda: &mut Cuda, op: &ops::SwigluBackward) -> Result<()> {
    let ops::SwigluBackward { d_y, pre, dropout, d_pre, d_bias: _ } = *op;
    assert_eq!((pre.rows, pre.cols), (d_pre.rows, d_pre.cols), "swiglu_backward: {pre} and {d_pre} differ");
    assert_eq!((pre.rows, pre.cols), (d_y.rows, 2 * d_y.cols), "swiglu_backward: {d_y} of {pre}");
    let args = SwigluBackwardArgs {
        params: cuda.step_params.address(),
        dropout: cuda.mask(dropout),
        rows_per_sample: cuda.rows_per_sample(d_y.rows),
        d_y: cuda.view(d_y),
        pre: cuda.view(pre),
        d_pre: cuda.view(d_pre),
    };
    cuda.launch(variant!(d_y.dtype, "swiglu_backward"), elementwise_grid(d_y.rows, d_y.cols), 0, &args)
}

/// In place: `y` holds the product.
fn bias_tanh(cuda: &Cuda, bias: Mat, y: Mat) -> Result<()> {
    let args = BiasTanhArgs { z: cuda.view(y), bias: cuda.at(bias), y: cuda.view(y) };
    cuda.launch(variant!(y.dtype, "bias_tanh"), elementwise_grid(y.rows, y.cols), 0, &args)
}

fn tanh_backward(cuda: &Cuda, d: Mat, y: Mat) -> Result<()> {
    let args = TanhBackwardArgs { d: cuda.view(d), y: cuda.view(y) };
    cuda.launch(variant!(d.dtype, "tanh_backward"), elementwise_grid(d.rows, d.cols), 0, &args)
}
