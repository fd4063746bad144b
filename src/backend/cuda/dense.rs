//! Dense layers: cuBLASLt products with fused epilogues where it has them, own kernels after a plain product where not.
//!
//! In bf16 the forward fuses bias, residual and the tanh form of GELU, the backward GELU's derivative and the bias gradient.
//! The erf form and dropout inside the MLP take one own kernel. In f32 only the bias is fused: the fused GELU of cuBLASLt is an
//! approximation that f32 would notice.

use super::Cuda;
use super::blas::{Fused, Matrix, Operands, Shape};
use super::driver::Address;
use super::launch::{MaskArgs, launch, variant};
use super::sums;
use crate::backend::{Dtype, Epilogue, Gelu, InputGrad, Linear, Mask, Mat};
use crate::error::{Error, Result};

impl Cuda {
    /// A mask over the samples of the micro-batch.
    pub(super) fn mask(&self, mask: Mask) -> MaskArgs {
        MaskArgs::new(mask, &self.micro)
    }

    /// Rows of one sample among `rows` rows of the micro-batch.
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
    // One row has no distance to a next one; the library wants one that fits.
    let ld = if mat.rows <= 1 { mat.cols.next_multiple_of(8) } else { mat.ld };
    Matrix { rows: mat.cols, cols: mat.rows, ld, dtype: mat.dtype }
}

fn form_code(form: Gelu) -> u32 {
    match form {
        Gelu::Tanh => 0,
        Gelu::Erf => 1,
    }
}

/// Operands of one product in row-major words.
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

    /// False where cuBLASLt has no such epilogue for these operands. Nothing is asked of it with a bias off a 16-byte
    /// boundary, as a part of a layer of odd width has it: what it wants there is not documented.
    fn try_run(&self, cuda: &mut Cuda) -> Result<bool> {
        if !self.operands.bias.is_multiple_of(16) {
            return Ok(false);
        }
        let workspace = cuda.arena(crate::backend::Arena::Workspace).address;
        cuda.blas.run(&self.shape, &self.operands, workspace)
    }

    fn run(&self, cuda: &mut Cuda) -> Result<()> {
        if self.try_run(cuda)? {
            return Ok(());
        }
        Err(Error::new(format!("cuBLASLt {} has no algorithm for {:?}", cuda.blas.version(), self.shape))
            .hint("use a newer cuBLASLt, or `--device cpu`"))
    }
}

/// [`crate::backend::Backend::matmul`]
pub(super) fn matmul(cuda: &mut Cuda, x: Mat, w: &Linear, epilogue: Epilogue, y: Mat) -> Result<()> {
    let product = Product::forward(cuda, x, w.weight, y);
    // The library reads a bias in D's type.
    let bias = cuda.at(if y.dtype == Dtype::F32 { w.bias } else { cuda.operand(w.bias) });
    match epilogue {
        Epilogue::None => product.run(cuda),
        Epilogue::Bias => {
            if !product.fuse(Fused::Bias, bias).try_run(cuda)? {
                Product::forward(cuda, x, w.weight, y).run(cuda)?;
                add_bias(cuda, w.bias, y)?;
            }
            Ok(())
        }
        Epilogue::BiasResidual(residual) => {
            // C shares D's layout: another leading dimension goes another way.
            let same = residual.ld == y.ld && residual.dtype == y.dtype;
            if same && product.add(cuda.at(residual)).fuse(Fused::Bias, bias).try_run(cuda)? {
                return Ok(());
            }
            // The product needs a place of its own where the residual is y.
            assert_ne!(residual, y, "a residual in place needs a fused epilogue");
            Product::forward(cuda, x, w.weight, y).run(cuda)?;
            bias_residual(cuda, y, w.bias, residual, y)
        }
        Epilogue::BiasGelu { pre, form, dropout } => {
            let fusable = y.dtype == Dtype::Bf16 && form == Gelu::Tanh && dropout.rate == 0.0;
            let fused = match pre {
                Some(pre) => product.fuse(Fused::BiasGelu, bias).aux(cuda, pre),
                None => product.fuse(Fused::BiasGeluAlone, bias),
            };
            if fusable && fused.try_run(cuda)? {
                return Ok(());
            }
            let z = pre.unwrap_or(y);
            Product::forward(cuda, x, w.weight, z).run(cuda)?;
            bias_gelu(cuda, z, Some(w.bias), pre, form, dropout, y)
        }
        Epilogue::BiasTanh => {
            product.run(cuda)?;
            bias_tanh(cuda, w.bias, y)
        }
    }
}

/// [`crate::backend::Backend::matmul_backward`]
pub(super) fn matmul_backward(cuda: &mut Cuda, d_y: Mat, x: Mat, w: &Linear, d_x: InputGrad) -> Result<()> {
    let w = &cuda.without_made_bias(d_y, w);
    let accumulate = cuda.micro.accumulate;
    let mut bias_is_done = false;
    if let Some(d_weight) = w.d_weight {
        let add = |product: Product, cuda: &Cuda| {
            if accumulate { product.add(cuda.at(d_weight)) } else { product }
        };
        // The fused bias gradient is written, never added to.
        let d_bias = w.d_bias.filter(|_| !accumulate && d_y.dtype == Dtype::Bf16);
        if let Some(d_bias) = d_bias {
            let product = Product::weight_grad(cuda, d_y, x, d_weight).fuse(Fused::BiasGrad, cuda.at(d_bias));
            bias_is_done = product.try_run(cuda)?;
        }
        if !bias_is_done {
            add(Product::weight_grad(cuda, d_y, x, d_weight), cuda).run(cuda)?;
        }
    }
    if let Some(d_bias) = w.d_bias.filter(|_| !bias_is_done) {
        sums::column_sums(cuda, d_y, d_bias)?;
    }

    // After the weights' gradients, because `d_x` may take the place of `x`.
    match d_x {
        InputGrad::None => Ok(()),
        InputGrad::Plain(d_x) => Product::input_grad(cuda, d_y, w.weight, d_x).run(cuda),
        InputGrad::Add(d_x) => Product::input_grad(cuda, d_y, w.weight, d_x).add(cuda.at(d_x)).run(cuda),
        InputGrad::Gelu { d_pre, pre, form, dropout } => {
            let fusable = d_pre.dtype == Dtype::Bf16 && form == Gelu::Tanh && dropout.rate == 0.0;
            let product = Product::input_grad(cuda, d_y, w.weight, d_pre);
            if fusable && product.fuse(Fused::GeluGrad, 0).aux(cuda, pre).try_run(cuda)? {
                return Ok(());
            }
            Product::input_grad(cuda, d_y, w.weight, d_pre).run(cuda)?;
            gelu_backward(cuda, d_pre, pre, form, dropout)
        }
        InputGrad::Tanh { d, y } => {
            Product::input_grad(cuda, d_y, w.weight, d).run(cuda)?;
            tanh_backward(cuda, d, y)
        }
    }
}

// Own kernels around a plain product (kernels/activation.cu, kernels/column_sums.cu) ---------------------------------

fn add_bias(cuda: &Cuda, bias: Mat, y: Mat) -> Result<()> {
    let name = variant!(y.dtype, "bias");
    let (grid, bias, at) = (elementwise_grid(y.rows, y.cols), cuda.at(bias), cuda.at(y));
    launch!(cuda, name, grid, 256, 0, bias, at, y.ld as u32, y.rows as u32, y.cols as u32)
}

fn bias_residual(cuda: &Cuda, z: Mat, bias: Mat, residual: Mat, y: Mat) -> Result<()> {
    launch!(
        cuda,
        variant!(y.dtype, "bias_residual"),
        elementwise_grid(y.rows, y.cols),
        256,
        0,
        cuda.at(z),
        z.ld as u32,
        cuda.at(bias),
        cuda.at(residual),
        residual.ld as u32,
        cuda.at(y),
        y.ld as u32,
        y.rows as u32,
        y.cols as u32,
    )
}

/// [`crate::backend::Backend::gelu`]
pub(super) fn gelu(cuda: &Cuda, pre: Mat, form: Gelu, dropout: Mask, y: Mat) -> Result<()> {
    bias_gelu(cuda, pre, None, None, form, dropout, y)
}

/// `z` holds `pre`, or the product without its bias: then `pre` is where the sum is kept, if it is.
fn bias_gelu(
    cuda: &Cuda,
    z: Mat,
    bias: Option<Mat>,
    pre: Option<Mat>,
    form: Gelu,
    dropout: Mask,
    y: Mat,
) -> Result<()> {
    launch!(
        cuda,
        variant!(y.dtype, "bias_gelu"),
        elementwise_grid(y.rows, y.cols),
        256,
        0,
        cuda.cells.address(),
        cuda.mask(dropout),
        cuda.rows_per_sample(y.rows),
        cuda.at(z),
        z.ld as u32,
        cuda.at_or_null(bias),
        form_code(form),
        cuda.at_or_null(pre),
        pre.map_or(0, |pre| pre.ld as u32),
        cuda.at(y),
        y.ld as u32,
        y.rows as u32,
        y.cols as u32,
    )
}

fn gelu_backward(cuda: &Cuda, d: Mat, pre: Mat, form: Gelu, dropout: Mask) -> Result<()> {
    launch!(
        cuda,
        variant!(d.dtype, "gelu_backward"),
        elementwise_grid(d.rows, d.cols),
        256,
        0,
        cuda.cells.address(),
        cuda.mask(dropout),
        cuda.rows_per_sample(d.rows),
        cuda.at(d),
        d.ld as u32,
        cuda.at(pre),
        pre.ld as u32,
        form_code(form),
        d.rows as u32,
        d.cols as u32,
    )
}

fn bias_tanh(cuda: &Cuda, bias: Mat, y: Mat) -> Result<()> {
    let name = variant!(y.dtype, "bias_tanh");
    let (grid, bias, at, ld) = (elementwise_grid(y.rows, y.cols), cuda.at(bias), cuda.at(y), y.ld as u32);
    launch!(cuda, name, grid, 256, 0, at, ld, bias, at, ld, y.rows as u32, y.cols as u32)
}

fn tanh_backward(cuda: &Cuda, d: Mat, y: Mat) -> Result<()> {
    let name = variant!(d.dtype, "tanh_backward");
    let (grid, at, of) = (elementwise_grid(d.rows, d.cols), cuda.at(d), cuda.at(y));
    launch!(cuda, name, grid, 256, 0, at, d.ld as u32, of, y.ld as u32, d.rows as u32, d.cols as u32)
}
