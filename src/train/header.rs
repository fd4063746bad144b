//! The lines about a model and its memory, for run headers and plans.

use crate::backend::MemoryPlan;
use crate::report::format;
use crate::vit::{Param, Vit};

/// Lines that describe the model. `is_new`: it is initialised, not read from a file.
pub fn model_lines(model: &Vit, is_new: bool) -> Vec<String> {
    let c = &model.config;
    let trained: usize = model.layout.params.iter().filter(|p| p.grad_offset.is_some()).map(Param::len).sum();
    let frozen = match trained < model.layout.count() {
        true => format!(", {:.2} M of them trained", trained as f64 / 1e6),
        false => String::new(),
    };
    let mut lines = vec![
        format!(
            "model    ViT width {} depth {} heads {} mlp {} patch {}x{}, {} tokens, pool {}, {:.2} M parameters{frozen}",
            c.width,
            c.depth,
            c.heads,
            c.mlp,
            c.patch.0,
            c.patch.1,
            c.tokens(),
            format!("{:?}", c.pool).to_lowercase(),
            model.layout.count() as f64 / 1e6
        ),
        format!(
            "         gelu {}, ln_eps {:e}, {}{:.3} GFLOP per image to train",
            format!("{:?}", c.gelu).to_lowercase(),
            c.ln_eps,
            if is_new { format!("init {}, ", word(&c.init)) } else { String::new() },
            c.train_flops() as f64 / 1e9
        ),
    ];
    if let Some(line) = last_block_line(model) {
        lines.push(format!("         {line}"));
    }
    lines
}

/// An enum's value as recipes write it.
pub(super) fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(String::from)).unwrap_or_default()
}

/// A line that says how the last block is pruned, if it is.
pub fn last_block_line(model: &Vit) -> Option<String> {
    let share = model.flops_done(true) as f64 / model.config.train_flops() as f64;
    model
        .pruned
        .then(|| format!("last block: class token only, {} of the operations", format::percent(share)))
}

/// Lines with the memory that the run allocates.
pub fn memory_lines(plan: &MemoryPlan) -> Vec<String> {
    use crate::backend::Arena::*;
    let size = |bytes: usize| format::bytes(bytes as u64);
    let exchange = match plan.bytes(Exchange) {
        0 => String::new(),
        bytes => format!(", chunks and exchange {}", size(bytes)),
    };
    let line = format!(
        "memory   {}: parameters {}, gradients {}, optimiser {}, ema {}, activations {}{exchange}",
        size(plan.total_bytes()),
        size(plan.bytes(Params)),
        size(plan.bytes(Grads)),
        size(plan.bytes(Moment1) + plan.bytes(Moment2)),
        size(plan.bytes(Ema)),
        size(plan.bytes(Activations)),
    );
    let of_checkpoints =
        format!("         and {} of main memory to write checkpoints from", size(plan.snapshot_bytes()));
    if !plan.storage().has_device_memory() {
        return vec![line, of_checkpoints];
    }
    let of_device = format!(
        "         only on a GPU: bf16 copy {}, batches {}, update tables {}, workspace {}",
        size(plan.bytes(Working)),
        size(plan.bytes(Batches)),
        size(plan.bytes(Update)),
        size(plan.bytes(Workspace)),
    );
    vec![line, of_device, of_checkpoints]
}
