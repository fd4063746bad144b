//! From the bound batch to tokens, and back to the gradients of what was added.

use super::{vector, vector_grad};
use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::{CpuBackend, embed, patchify};
use crate::backend::{Embed, Micro, ops};
use crate::error::Result;

pub(super) fn patchify(cpu: &mut CpuBackend, op: &ops::Patchify) -> Result<()> {
    let ops::Patchify { grid, normalise, patches } = *op;
    let slot = cpu.slot.as_ref().expect("patchify: no batch is bound");
    let Micro { first, samples, .. } = cpu.micro;
    assert_eq!(slot.layout().image, grid.image, "patchify: the batch has another image size");
    assert!(first + samples <= slot.layout().samples, "patchify: micro-batch outside the batch");
    let expected = (samples * grid.tokens(), grid.patch_len());
    assert_eq!((patches.rows, patches.cols), expected, "patchify: {patches} has the wrong shape");

    let patches = Access::new(&mut cpu.arenas).write(patches);
    patchify::patchify(&cpu.compute, grid, normalise, &patchify::Pictures::new(slot), first, patches);
    Ok(())
}

fn embed_shape(cpu: &CpuBackend, embed: &Embed) -> embed::Shape {
    let extra: usize = embed.extra_tokens.iter().flatten().map(|(tokens, _)| tokens.rows).sum();
    assert!(embed.extra == extra && extra < embed.tokens, "embed: {extra} extra tokens");
    embed::Shape {
        tokens: embed.tokens,
        extra: embed.extra,
        posemb_first: embed.posemb_first,
        dropout: cpu.bind(embed.dropout),
    }
}

pub(super) fn embed(cpu: &mut CpuBackend, op: &ops::Embed) -> Result<()> {
    let ops::Embed { embed, x } = *op;
    let shape = embed_shape(cpu, embed);
    let posemb = embed.posemb.0;
    assert_eq!(x.rows % embed.tokens, 0, "embed: rows are whole samples");
    assert_eq!((posemb.rows, posemb.cols), (embed.tokens - embed.posemb_first, x.cols), "embed: positions");

    let mut a = Access::new(&mut cpu.arenas);
    let bias = vector(&mut a, embed.bias.0, x.cols);
    let mut extra = Vec::with_capacity(embed.extra);
    for (tokens, _) in embed.extra_tokens.iter().flatten() {
        assert_eq!(tokens.cols, x.cols, "embed: {tokens} are no tokens of {x}");
        let rows = a.read(*tokens);
        extra.extend((0..tokens.rows).map(|row| rows.row(row)));
    }
    let (posemb, x) = (a.read(posemb), a.write(x));
    embed::forward(&cpu.compute, shape, bias, &extra, posemb, x);
    Ok(())
}

pub(super) fn embed_backward(cpu: &mut CpuBackend, op: &ops::EmbedBackward) -> Result<()> {
    let ops::EmbedBackward { embed, d_x, d_y } = *op;
    assert_eq!(d_x, d_y, "embed_backward: the CPU works in place");
    let shape = embed_shape(cpu, embed);
    assert_eq!(d_x.rows % embed.tokens, 0, "embed_backward: rows are whole samples");

    let mut a = Access::new(&mut cpu.arenas);
    let d_bias = vector_grad(&mut a, embed.bias.1, d_x.cols);
    let (mut d_extra, mut first) = (Vec::new(), 0);
    for (tokens, d) in embed.extra_tokens.iter().flatten() {
        d_extra.extend(d.map(|d| (first, a.write(d))));
        first += tokens.rows;
    }
    let d_posemb = embed.posemb.1.map(|d| a.write(d));
    let d_x = a.write(d_x);
    let accumulate = cpu.micro.gradients.adds();
    embed::backward(&cpu.compute, shape, d_x, d_bias, d_extra, d_posemb, accumulate);
    Ok(())
}
