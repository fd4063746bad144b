//! Attention, that of a single query, and rotary positions.

use crate::backend::cpu::arenas::Access;
use crate::backend::cpu::{CpuBackend, attention, query_attention, rope};
use crate::backend::{Heads, Mat, ops};
use crate::error::Result;

pub(super) fn rotate(cpu: &mut CpuBackend, op: &ops::Rotate) -> Result<()> {
    let ops::Rotate { rope, heads, x, back } = *op;
    let (table, width) = (rope.table, heads.heads * heads.head_size);
    assert_eq!((table.cols, x.cols % width), (heads.head_size, 0), "rotate: {table} for {x}");
    assert!(x.rows % heads.tokens == 0 && table.rows <= heads.tokens, "rotate: rows are whole samples");
    assert_eq!(heads.head_size % 2, 0, "rotate: elements are pairs");
    let mut a = Access::new(&mut cpu.arenas);
    let (table, x) = (a.read(table), a.write(x));
    rope::rotate(&cpu.compute, table, rope.pairs, heads, x, back);
    Ok(())
}

pub(super) fn attention(cpu: &mut CpuBackend, op: &ops::Attention) -> Result<()> {
    let ops::Attention { heads, qkv, o, lse, dropout } = *op;
    check_heads(heads, 3, qkv, o);
    let dropout = Some(cpu.bind(dropout)).filter(|mask| !mask.is_none());
    let mut a = Access::new(&mut cpu.arenas);
    let (qkv, o, lse) = (a.read(qkv), a.write(o), a.write_flat(lse));
    attention::forward(&cpu.compute, heads, qkv, o, lse, dropout);
    Ok(())
}

pub(super) fn attention_backward(cpu: &mut CpuBackend, op: &ops::AttentionBackward) -> Result<()> {
    let ops::AttentionBackward { heads, qkv, o, lse, dropout, d_o, d_qkv, d_bias: _ } = *op;
    check_heads(heads, 3, qkv, o);
    check_heads(heads, 3, d_qkv, d_o);
    let dropout = Some(cpu.bind(dropout)).filter(|mask| !mask.is_none());
    let mut a = Access::new(&mut cpu.arenas);
    let (qkv, o, lse) = (a.read(qkv), a.read(o), a.read_flat(lse));
    let (d_o, d_qkv) = (a.read(d_o), a.write(d_qkv));
    attention::backward(&cpu.compute, heads, qkv, o, lse, dropout, d_o, d_qkv);
    Ok(())
}

pub(super) fn query_attention(cpu: &mut CpuBackend, op: &ops::QueryAttention) -> Result<()> {
    let ops::QueryAttention { heads, q, kv, p, o, dropout } = *op;
    check_probe(heads, q, kv, o);
    let dropout = Some(cpu.bind(dropout)).filter(|mask| !mask.is_none());
    let mut a = Access::new(&mut cpu.arenas);
    let (q, kv) = (a.read(q), a.read(kv));
    let (p, o) = (a.write_flat(p), a.write(o));
    query_attention::forward(&cpu.compute, heads, q, kv, p, o, dropout);
    Ok(())
}

pub(super) fn query_attention_backward(cpu: &mut CpuBackend, op: &ops::QueryAttentionBackward) -> Result<()> {
    let ops::QueryAttentionBackward { heads, q, kv, p, dropout, d_o, d_q, d_kv } = *op;
    check_probe(heads, q, kv, d_o);
    check_probe(heads, d_q, d_kv, d_o);
    let dropout = Some(cpu.bind(dropout)).filter(|mask| !mask.is_none());
    let mut a = Access::new(&mut cpu.arenas);
    let (q, kv, p, d_o) = (a.read(q), a.read(kv), a.read_flat(p), a.read(d_o));
    let (d_q, d_kv) = (a.write(d_q), a.write(d_kv));
    query_attention::backward(&cpu.compute, heads, q, kv, p, dropout, d_o, d_q, d_kv);
    Ok(())
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
    assert_eq!((q.cols, kv.cols, o.cols), (width, 2 * width, width), "query_attention: {q}, {kv}, {o}");
    assert!(q.rows == 1 || q.rows == o.rows, "query_attention: {q} is neither one query nor one per sample");
    assert_eq!(kv.rows, o.rows * heads.tokens, "query_attention: rows are whole samples");
}
