//! Bias gradients that a device computes together with the matrix that their product reads. The model says
//! which product that is: tested for every architecture, with frozen parameters and recomputation. And the
//! GPU's results, on the stand-in.

use crate::support;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use support::{command, finish, path, run_on_gpu, stand_in, train};
use vitrum::backend::cpu::CpuBackend;
use vitrum::backend::{
    Arena, Backend, Body, InputGrad, Linear, Loss, LossKind, Mat, MemoryPlan, Micro, Normalise, Op, Pixels,
    Precision, Recompute, Slot, SlotLayout, StepKeys, StepReport, Storage, TargetKind, Update, Write, ops,
};
use vitrum::error::Result;
use vitrum::rng::{Domain, Stream};
use vitrum::vit::config::{DropPathMode, NormPlace, PoolKind, QkvBias};
use vitrum::vit::{LastBlock, Mode, ModelConfig, Param, Vit};
use vitrum::weights::safetensors::SafeTensors;

/// The CPU, which computes such gradients in the product; or computes them early, and leaves them out of the
/// product.
struct Device {
    cpu: CpuBackend,
    is_early: bool,
    /// The matrix and the gradient that the next product must have.
    made: Option<(Mat, Mat)>,
    count: usize,
}

impl Device {
    fn make(&mut self, d_y: Mat, d_bias: Option<Mat>) -> Result<()> {
        let Some(d_bias) = d_bias.filter(|_| self.is_early) else { return Ok(()) };
        assert_eq!(self.made.replace((d_y, d_bias)), None, "two matrices before a product");
        self.count += 1;
        // A product that computes only the bias gradient.
        let one_column = |of: Mat, rows: usize| Mat { rows, cols: 1, ..of };
        let weight = Mat { arena: Arena::Params, offset: 0, ld: 1, ..one_column(d_y, d_y.cols) };
        let layer = Linear { weight, bias: d_bias, d_weight: None, d_bias: Some(d_bias) };
        self.cpu.matmul_backward(d_y, one_column(d_y, d_y.rows), &layer, InputGrad::None)
    }
}

/// Methods that pass their arguments on.
macro_rules! pass_on {
    ($($name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?;)*) => {
        $(fn $name(&mut self, $($arg: $type),*) -> pass_on!(@ $($out)?) { self.cpu.$name($($arg),*) })*
    };
    (@) => { Result<()> };
    (@ $out:ty) => { $out };
}

impl Backend for Device {
    fn execute(&mut self, op: &Op) -> Result<()> {
        if let Op::MatmulBackward(op) = op
            && let Some(made) = self.made.take()
        {
            let announced = op.w.d_bias.map(|d_bias| (op.d_y, d_bias));
            assert_eq!(Some(made), announced, "another product was announced");
            let w = &Linear { d_bias: None, ..*op.w };
            return self.cpu.execute(&Op::MatmulBackward(ops::MatmulBackward { w, ..*op }));
        }
        self.cpu.execute(op)?;
        match op {
            Op::LayerNormBackward(op) => self.make(op.d_branch, op.d_bias),
            Op::ResidualBackward(op) => self.make(op.d_branch, op.d_bias),
            Op::AttentionBackward(op) => self.make(op.d_qkv, op.d_bias),
            _ => Ok(()),
        }
    }

    fn describe(&self) -> String {
        self.cpu.describe()
    }
    fn storage(&self) -> Storage {
        self.cpu.storage()
    }
    fn precision(&self) -> Precision {
        self.cpu.precision()
    }
    fn free_memory(&self) -> Result<usize> {
        self.cpu.free_memory()
    }
    fn allocated_bytes(&self) -> usize {
        self.cpu.allocated_bytes()
    }
    fn algorithms(&self) -> Vec<String> {
        self.cpu.algorithms()
    }
    fn new_slot(&self, layout: SlotLayout) -> Result<Slot> {
        self.cpu.new_slot(layout)
    }
    fn steps_ahead(&self) -> u64 {
        self.cpu.steps_ahead()
    }
    pass_on! {
        allocate(plan: &MemoryPlan);
        write(at: Mat, values: &[f32]);
        read(at: Mat, values: &mut [f32]);
        read_arena(arena: Arena) -> Result<Vec<u8>>;
        write_arena(arena: Arena, bytes: &[u8]);
        swap_ema();
        prefer_algorithms(algorithms: &[String]) -> Result<(), String>;
        bind_batch(slot: Slot) -> Result<Option<Slot>>;
        unbind_batch() -> Option<Slot>;
        begin_step(keys: StepKeys);
        begin_micro(micro: Micro);
        step(body: Body, update: Option<&Update>);
        synchronize();
        report() -> Result<StepReport>;
    }
}

const BATCH: usize = 4;
const MICRO_BATCH: usize = 2;

/// All gradients of a batch in two parts, and how many bias gradients were made early.
fn gradients(model: &Vit, is_early: bool) -> (Vec<(String, Vec<f32>)>, usize) {
    let mut b = Device { cpu: CpuBackend::new(2).unwrap(), is_early, made: None, count: 0 };
    b.allocate(&model.plan()).unwrap();
    let mut s = Stream::new(3, Domain::Init, 99, 0);
    model.init(&mut b, 1).unwrap();
    // Away from zero, so that every path carries a gradient.
    for p in model.layout.parameters() {
        let mut values = vec![0.0; p.len()];
        b.read(p.mat(), &mut values).unwrap();
        values.iter_mut().for_each(|v| *v += 0.15 * s.normal() as f32);
        b.write(p.mat(), &values).unwrap();
    }
    let (image, classes) = (model.config.image, model.config.classes);
    let layout = SlotLayout { samples: BATCH, image, pixels: Pixels::U8, targets: TargetKind::Labels };
    let mut slot = b.new_slot(layout).unwrap();
    slot.images_u8_mut().iter_mut().for_each(|p| *p = s.next_u32() as u8);
    slot.labels_mut().iter_mut().for_each(|l| *l = s.below(classes) as i32);
    b.bind_batch(slot).unwrap();
    b.begin_step(StepKeys { seed: 7, step: 11 }).unwrap();
    b.begin_report().unwrap();
    for first in (0..BATCH).step_by(MICRO_BATCH) {
        let (samples, accumulate) = (MICRO_BATCH, first > 0);
        b.begin_micro(Micro {
            first,
            samples,
            global_first: 0,
            gradients: Write::add_if(accumulate),
            mean_over: BATCH,
        })
        .unwrap();
        model.forward(&mut b, true).unwrap();
        model.loss(&mut b, Loss { label_smoothing: 0.1, ..Loss::plain(LossKind::Softmax) }).unwrap();
        model.backward(&mut b, true).unwrap();
        assert_eq!(b.made, None, "no product came");
    }
    let read = |p: &Param| {
        let gradient = p.grad()?;
        let mut values = vec![0.0; p.len()];
        b.read(gradient, &mut values).unwrap();
        Some((p.name.clone(), values))
    };
    (model.layout.parameters().filter_map(read).collect(), b.count)
}

/// Whether the matrix that gives this bias its gradient is made by the backward of LayerNorm or attention.
fn is_announced(model: &Vit, name: &str) -> bool {
    let last = format!("blocks.{}.", model.config.depth - 1);
    match name.split_once('.') {
        Some(("attn_pool", rest)) => rest == "proj.bias",
        Some(("blocks", rest)) if rest.ends_with("attn.qkv.bias") => {
            // A pruned block has a separate query, and its gradients come from another kernel.
            !(model.pruned && name.starts_with(&last))
        }
        Some(("blocks", rest)) => rest.ends_with("attn.proj.bias") || rest.ends_with("mlp.fc2.bias"),
        _ => false,
    }
}

#[test]
fn gradients_have_the_same_bits_wherever_those_of_biases_are_made() {
    let mut token = ModelConfig::variant("testing/4", 8, 5).unwrap();
    (token.width, token.heads, token.mlp, token.depth) = (24, 3, 20, 3);
    (token.pool, token.extra_tokens, token.norm) = (PoolKind::Token, 1, NormPlace::Before);
    let gap = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, ..token.clone() };
    let masked = |config: &ModelConfig| ModelConfig {
        dropout: 0.1,
        attention_dropout: 0.1,
        drop_path: 0.3,
        drop_path_mode: DropPathMode::Constant,
        ..config.clone()
    };
    let configs = [
        ("class token", token.clone()),
        ("class token, masked", masked(&token)),
        ("class token, layer scale", ModelConfig { layer_scale: 0.4, ..masked(&token) }),
        ("class token, one block", ModelConfig { depth: 1, ..token.clone() }),
        ("no bias of qkv", ModelConfig { qkv_bias: QkvBias::None, ..token.clone() }),
        ("distillation", ModelConfig { extra_tokens: 2, ..token.clone() }),
        ("gap", gap.clone()),
        ("gap, masked", masked(&gap)),
        ("gap, fc_norm", ModelConfig { norm: NormPlace::After, layer_scale: 0.4, ..gap.clone() }),
        ("map", ModelConfig { pool: PoolKind::Map, ..gap.clone() }),
        ("map, layer scale", ModelConfig { pool: PoolKind::Map, layer_scale: 0.4, ..masked(&gap) }),
    ];
    let frozen: [&[&str]; 5] = [
        &[],
        &["patch_embed", "cls_token", "pos_embed", "blocks.0."],
        &["blocks.1.attn.qkv", "blocks.1.norm2", "blocks.2.mlp.fc2.bias", "attn_pool.proj.weight"],
        &["blocks.0.mlp.fc2", "blocks.0.attn.proj.bias", "blocks.1.norm1", "blocks.2.ls"],
        &["patch_embed", "cls_token", "pos_embed", "blocks."],
    ];
    for (what, config) in configs {
        config.validate().unwrap();
        for last_block in [LastBlock::Pruned, LastBlock::Whole] {
            for recompute in [Recompute::None, Recompute::LnGelu, Recompute::Block] {
                for frozen in frozen {
                    let storage = Storage { recompute, ..Storage::CPU };
                    let is_frozen = |p: &Param| frozen.iter().any(|f| p.name.starts_with(f));
                    let (normalise, mode) = (Normalise::INCEPTION, Mode::Train);
                    let config = config.clone();
                    let model =
                        Vit::new(config, normalise, MICRO_BATCH, mode, storage, last_block, is_frozen);
                    let what = format!("{what}, {last_block:?}, {recompute:?}, without {frozen:?}");
                    let ((late, none), (early, count)) = (gradients(&model, false), gradients(&model, true));
                    let announced = late.iter().filter(|(name, _)| is_announced(&model, name)).count();
                    assert_eq!((none, count), (0, announced * BATCH / MICRO_BATCH), "{what}: made early");
                    for ((name, late), (_, early)) in late.iter().zip(&early) {
                        assert!(late == early, "{what}: `{name}` is another");
                    }
                }
            }
        }
    }
}

/// One step of plain descent in two micro-batches, so that the change of a bias is its gradient: 16 tokens,
/// width 64, depth 2.
fn one_step(out: &str, more: &[&str]) -> Vec<String> {
    let size =
        ["model.width=64", "model.heads=2", "model.init=deit3", "train.batch=4", "train.micro_batch=2"];
    let rule = ["optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip=0", "optim.ema=0"];
    let pace =
        ["optim.lr=1", "schedule.warmup=0", "train.steps=1", "train.log_every=1", "train.eval_every=1"];
    let all: Vec<&str> = size.iter().chain(&rule).chain(&pace).chain(more).copied().collect();
    train(out, &all)
}

/// The biases at the end of a run.
fn biases(run: &str) -> BTreeMap<String, Vec<f32>> {
    let file = SafeTensors::open(&Path::new(run).join("checkpoints/last/model.safetensors")).unwrap();
    let biases = file.names().filter(|name| name.ends_with(".bias"));
    biases.map(|name| (name.to_owned(), file.values(name).unwrap().into_owned())).collect()
}

#[test]
fn biases_move_on_a_gpu_as_on_the_cpu() {
    let Some(folder) = stand_in() else { return };
    let token = ["model.pool=token", "model.posemb=learned", "model.posemb_join=after"];
    let plain = ["model.dropout=0", "model.attention_dropout=0", "model.drop_path=0"];
    let cases = [
        ("gap", vec![]),
        ("plain", plain.to_vec()),
        ("token", [&token[..], &plain, &["train.recompute=block"]].concat()),
        ("token-masked", token.to_vec()),
        ("scaled", vec!["model.layer_scale=0.5", "train.recompute=ln+gelu"]),
        ("map", [&plain[..], &["model.pool=map"]].concat()),
        ("frozen", vec!["optim.freeze_blocks=1"]),
    ];
    for (name, more) in cases {
        let on_cpu = path(&format!("cpu-{name}"));
        finish(command(&one_step(&on_cpu, &[&["--device", "cpu"][..], &more].concat()))).ok();
        let wanted = biases(&on_cpu);
        for residual in ["train.residual=bf16", "train.residual=f32"] {
            let out = path(&format!("cuda-{name}-{residual}"));
            let device = ["--device", "cuda", "train.precision=bf16", "train.deterministic=true", residual];
            let args = one_step(&out, &[&device[..], &more].concat());
            let done = run_on_gpu(&folder, "checks=on", &args).ok();
            assert!(!done.stderr.contains("stand-in GPU:"), "{}", done.stderr);
            let got = biases(&out);
            assert_eq!(got.len(), wanted.len());
            for (bias, wanted) in &wanted {
                let norm =
                    |of: &mut dyn Iterator<Item = f32>| of.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                let apart = norm(&mut got[bias].iter().zip(wanted).map(|(a, b)| a - b));
                let size = norm(&mut wanted.iter().copied());
                assert!(apart <= 0.03 * size, "{name}, {residual}: `{bias}` is {apart:e} from {size:e}");
            }
        }
    }
}

#[test]
fn biases_are_summed_by_the_kernels_that_read_their_rows() {
    let Some(folder) = stand_in() else { return };
    let counters = path("counters.jsonl");
    let launches = |name: &str, more: &[&str]| -> BTreeMap<String, usize> {
        let device = ["--device", "cuda", "train.precision=bf16", "train.deterministic=true"];
        let args = one_step(&path(name), &[&device[..], more].concat());
        run_on_gpu(&folder, &format!("checks=off,counters={counters}"), &args).ok();
        let mut launches = BTreeMap::new();
        for line in std::fs::read_to_string(&counters).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            *launches.entry(line["kernel"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        std::fs::remove_file(&counters).unwrap();
        launches
    };
    // In each of two micro-batches: fc2 of the last block in the tail; fc2 of the block below and both proj
    // in the blocks. The first LayerNorm of the model has no product below it.
    let (biased, not) = ("layernorm_backward_bias_bf16_1", "layernorm_backward_bf16_1");
    let plain = launches("counted", &["model.dropout=0", "model.attention_dropout=0", "model.drop_path=0"]);
    assert_eq!((plain.get(biased), plain.get(not)), (Some(&8), Some(&2)), "{plain:?}");
    let masked = launches("counted-masked", &[]);
    let biased = "layernorm_backward_join_bias_bf16_1";
    assert_eq!((masked.get(biased), masked.get(not)), (Some(&8), Some(&2)), "{masked:?}");
    for launches in [&plain, &masked] {
        let alone = launches.keys().find(|kernel| kernel.starts_with("residual_backward"));
        assert_eq!(alone, None, "nothing is handed on by itself");
    }
}
