//! LayerNorm and the residual stream.

use super::{same_shape, vector, vector_grad};
use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::{CpuBackend, layernorm, residual};
use crate::backend::mask::BoundMask;
use crate::backend::{Branch, Join, Mask, ops};
use crate::error::Result;

/// Borrows what a branch reads.
fn read_branch<'a>(
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

pub(super) fn layernorm(cpu: &mut CpuBackend, op: &ops::LayerNorm) -> Result<()> {
    let ops::LayerNorm { join, norm, y, stats } = *op;
    same_shape("layernorm", join.sum(), y);
    assert_eq!((stats.mean.rows, stats.rstd.rows), (y.rows, y.rows), "layernorm: one mean, one rstd per row");
    let (keys, micro) = (cpu.keys, cpu.micro);
    let bind = |mask| BoundMask::new(mask, keys, micro);

    let mut a = Access::new(&mut cpu.arenas);
    let input = match join {
        Join::Ready(sum) => layernorm::Input::Ready(a.read(*sum)),
        Join::Branch { sum, branch } => {
            same_shape("layernorm", *sum, branch.base);
            layernorm::Input::Join { residual: read_branch(&mut a, branch, bind), sum: a.write(*sum) }
        }
    };
    let (gamma, beta) = (vector(&mut a, norm.gamma, y.cols), vector(&mut a, norm.beta, y.cols));
    let (mean, rstd) = (a.write_flat(stats.mean), a.write_flat(stats.rstd));
    layernorm::forward(&cpu.compute, input, gamma, beta, norm.eps, a.write(y), mean, rstd);
    Ok(())
}

pub(super) fn layernorm_backward(cpu: &mut CpuBackend, op: &ops::LayerNormBackward) -> Result<()> {
    let ops::LayerNormBackward { d_y, join, norm, stats, d_sum, write, d_branch, d_bias: _ } = *op;
    same_shape("layernorm_backward", d_y, join.sum());
    same_shape("layernorm_backward", d_y, d_sum);
    let (keys, micro) = (cpu.keys, cpu.micro);
    let bind = |mask| BoundMask::new(mask, keys, micro);

    let mut a = Access::new(&mut cpu.arenas);
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
                residual: read_branch(&mut a, branch, bind),
                d_branch: a.write(d_branch),
                d_layer_scale: vector_grad(&mut a, d_scale, d_y.cols),
            })
        }
    };
    let d_norm = [norm.d_gamma, norm.d_beta].map(|d| vector_grad(&mut a, d, d_y.cols));
    let (d_y, d_sum) = (a.read(d_y), a.write(d_sum));
    let c = &cpu.compute;
    layernorm::backward(c, d_y, saved, d_sum, !write.adds(), branch, d_norm, micro.gradients.adds());
    Ok(())
}

pub(super) fn residual(cpu: &mut CpuBackend, op: &ops::Residual) -> Result<()> {
    let ops::Residual { join } = *op;
    let Join::Branch { sum, branch } = join else { return Ok(()) };
    same_shape("residual", *sum, branch.base);
    let (keys, micro) = (cpu.keys, cpu.micro);
    let mut a = Access::new(&mut cpu.arenas);
    let branch_rows = read_branch(&mut a, branch, |mask| BoundMask::new(mask, keys, micro));
    residual::forward(&cpu.compute, &branch_rows, a.write(*sum));
    Ok(())
}

pub(super) fn residual_backward(cpu: &mut CpuBackend, op: &ops::ResidualBackward) -> Result<()> {
    let ops::ResidualBackward { join, d_sum, d_branch, d_bias: _ } = *op;
    let Join::Branch { branch, .. } = join else { return Ok(()) };
    same_shape("residual_backward", d_sum, branch.branch);
    same_shape("residual_backward", d_branch, branch.branch);
    let (keys, micro) = (cpu.keys, cpu.micro);
    let mut a = Access::new(&mut cpu.arenas);
    let rows = read_branch(&mut a, branch, |mask| BoundMask::new(mask, keys, micro));
    let d_scale = vector_grad(&mut a, branch.layer_scale.and_then(|(_, d)| d), d_sum.cols);
    let (d_sum, d_branch) = (a.read(d_sum), a.write(d_branch));
    let c = &cpu.compute;
    residual::backward(c, &rows, d_sum, d_branch, d_scale, micro.gradients.adds());
    Ok(())
}
