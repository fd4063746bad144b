//! The backend as its callers see it: memory, dense layers and attention through the trait, reports and updates.

use super::testbed::*;
use super::*;
use crate::backend::{
    Device, DeviceOptions, Dtype, Epilogue, Gelu, GroupScalars, Heads, InputGrad, Linear, Loss, LossKind,
    Pixels, Rule, Segment, TargetKind, Write, mask::BoundMask, select,
};

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// `x·wᵀ + b` in f64.
fn dense(x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    let width = w.len() / b.len();
    let row = |x: &[f64]| -> Vec<f64> {
        let outs = w.chunks(width).zip(b);
        outs.map(|(w, b)| b + x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>()).collect()
    };
    x.chunks(width).flat_map(row).collect()
}

fn weighted(values: &[f64], weights: &[f32]) -> f64 {
    values.iter().zip(weights).map(|(v, w)| v * f64::from(*w)).sum()
}

#[test]
fn the_device_of_the_command_line_opens_and_describes_itself() {
    let backend = select(Device::Cpu, &DeviceOptions::threads(2)).unwrap();
    assert!(backend.describe().starts_with("cpu, 2 threads, "), "{}", backend.describe());
}

#[test]
fn memory_is_what_was_planned_and_padding_is_left_alone() {
    let mut plan = MemoryPlan::new(Storage::CPU);
    plan.activation("a", 3, 5);
    plan.set_bytes(Arena::Params, 512);
    plan.set_bytes(Arena::Ema, 512);
    let mut backend = CpuBackend::new(1).unwrap();
    assert_eq!(backend.allocated_bytes(), 0);
    backend.allocate(&plan).unwrap();
    assert_eq!(backend.allocated_bytes(), plan.total_bytes());

    let padded = Mat { arena: Arena::Params, offset: 256, rows: 3, cols: 5, ld: 8, dtype: Dtype::F32 };
    backend.write_arena(Arena::Params, &[0x40; 512]).unwrap();
    let values: Vec<f32> = (0..15).map(|v| v as f32).collect();
    backend.write(padded, &values).unwrap();
    assert_eq!(take(&mut backend, padded), values);
    let bytes = backend.read_arena(Arena::Params).unwrap();
    assert_eq!(bytes[256 + 5 * 4..256 + 8 * 4], [0x40; 12]);
    assert_eq!(bytes[256 + 8 * 4..256 + 9 * 4], 5.0f32.to_ne_bytes());

    backend.swap_ema().unwrap();
    assert_eq!(backend.read_arena(Arena::Ema).unwrap(), bytes);
    assert_eq!(backend.read_arena(Arena::Params).unwrap(), [0; 512]);
}

#[test]
fn a_plan_too_large_for_the_machine_is_an_error() {
    let mut plan = MemoryPlan::new(Storage::CPU);
    plan.set_bytes(Arena::Params, 1 << 60);
    let error = CpuBackend::new(1).unwrap().allocate(&plan).unwrap_err();
    assert!(error.message().starts_with("Params: no memory for"), "{error}");
}

#[test]
fn dense_layers_are_those_of_the_reference() {
    let Some(file) = Reference::open("kernels/linear.safetensors") else { return };
    for i in (0..).take_while(|i| file.has(&format!("m{i}.x"))) {
        let get = |name: &str| file.f32(&format!("m{i}.{name}"));
        let transposed = |values: Vec<f64>, rows: usize, cols: usize| -> Vec<f64> {
            (0..rows * cols).map(|i| values[i % cols * rows + i / cols]).collect()
        };
        let (x, w) = (file.shape(&format!("m{i}.x")), file.shape(&format!("m{i}.w")));
        let (rows, input, out) = (x[0], w[0], w[1]);
        let weight: Vec<f32> =
            transposed(file.f64(&format!("m{i}.w")), out, input).iter().map(|v| *v as f32).collect();
        let mut b = Testbed::new(rows);
        let linear = Linear {
            weight: b.put(out, input, &weight),
            bias: b.put(1, out, &get("b")),
            d_weight: Some(b.room(out, input)),
            d_bias: Some(b.room(1, out)),
        };
        let (x, d_y) = (b.put(rows, input, &get("x")), b.put(rows, out, &get("dy")));
        let (y, d_x) = (b.room(rows, out), b.room(rows, input));
        let run = |k: &mut CpuBackend| {
            k.matmul(x, &linear, Epilogue::Bias, y).unwrap();
            k.matmul_backward(d_y, x, &linear, InputGrad::Plain(d_x)).unwrap();
        };
        b.everywhere(&[y, d_x, linear.d_weight.unwrap(), linear.d_bias.unwrap()], run, |r| {
            let expected = |name: &str| file.f64(&format!("m{i}.linear.{name}"));
            assert_close("y", &r[0], &expected("y"), 1e-6);
            assert_close("dx", &r[1], &expected("dx"), 1e-6);
            assert_close("dw", &r[2], &transposed(expected("dw"), out, input), 1e-6);
            assert_close("db", &r[3], &expected("db"), 1e-6);
        });
        let pre = b.room(rows, out);
        let gelu = Epilogue::BiasGelu { pre: Some(pre), form: Gelu::Tanh, dropout: Mask::NONE };
        b.everywhere(
            &[y],
            |k| k.matmul(x, &linear, gelu, y).unwrap(),
            |r| {
                assert_close("gelu", &r[0], &file.f64(&format!("m{i}.linear_gelu.y")), 1e-6);
            },
        );
    }
}

#[test]
fn an_mlp_with_dropout_and_a_residual_has_the_slopes_of_the_f64_function() {
    let (samples, tokens, width, hidden) = (3, 5, 48, 21);
    let rows = samples * tokens;
    let mut b = Testbed::new(samples);
    b.micro.first = 1;
    let layer = |b: &mut Testbed, tag: u64, out: usize, input: usize| {
        let (w, bias) = (normal(tag, out * input, 0.2), normal(tag + 1, out, 0.2));
        let linear = Linear {
            weight: b.put(out, input, &w),
            bias: b.put(1, out, &bias),
            d_weight: Some(b.room(out, input)),
            d_bias: Some(b.room(1, out)),
        };
        (linear, wide(&w), wide(&bias), bias)
    };
    let (fc1, w1, b1, bias1) = layer(&mut b, 1, hidden, width);
    let (fc2, w2, b2, bias2) = layer(&mut b, 3, width, hidden);
    let (x, d_y) = (normal(5, rows * width, 1.0), normal(6, rows * width, 1.0));
    let (x_mat, d_y_mat) = (b.put(rows, width, &x), b.put(rows, width, &d_y));
    let in_place = b.put(rows, width, &x);
    let (pre, act, y) = (b.room(rows, hidden), b.room(rows, hidden), b.room(rows, width));
    let (d_pre, d_x) = (b.room(rows, hidden), b.put(rows, width, &d_y));
    let dropout = Mask { rate: 0.25, site: 6 };
    let form = Gelu::Tanh;
    let run = |k: &mut CpuBackend| {
        k.matmul(x_mat, &fc1, Epilogue::BiasGelu { pre: Some(pre), form, dropout }, act).unwrap();
        k.matmul(act, &fc2, Epilogue::BiasResidual(x_mat), y).unwrap();
        k.matmul(act, &fc2, Epilogue::BiasResidual(in_place), in_place).unwrap();
        k.matmul_backward(d_y_mat, act, &fc2, InputGrad::Gelu { d_pre, pre, form, dropout }).unwrap();
        k.matmul_backward(d_pre, x_mat, &fc1, InputGrad::Add(d_x)).unwrap();
    };
    let grads = [fc1.d_bias, fc2.d_bias].map(Option::unwrap);
    b.everywhere(&[y, in_place, d_x, grads[0], grads[1]], run, |r| {
        let mask = BoundMask::new(dropout, b.keys, b.micro);
        let f = |x: &[f64], b1: &[f64], b2: &[f64]| -> Vec<f64> {
            let mut act = dense(x, &w1, b1);
            for (i, a) in act.iter_mut().enumerate() {
                let (row, column) = (i / hidden, i % hidden);
                let element = row % tokens * hidden + column;
                *a = gelu_tanh(*a) * f64::from(mask.factor(row / tokens, element));
            }
            dense(&act, &w2, b2).iter().zip(x).map(|(y, x)| y + x).collect()
        };
        let x64 = wide(&x);
        assert_close("y", &r[0], &f(&x64, &b1, &b2), 1e-6);
        assert_close("y in place", &r[1], &f(&x64, &b1, &b2), 1e-6);
        assert_gradient("d_x", &x, &r[2], |x| weighted(&f(x, &b1, &b2), &d_y));
        assert_gradient("d_bias1", &bias1, &r[3], |b1| weighted(&f(&x64, b1, &b2), &d_y));
        assert_gradient("d_bias2", &bias2, &r[4], |b2| weighted(&f(&x64, &b1, b2), &d_y));
    });
}

#[test]
fn a_tanh_layer_has_the_slopes_of_the_f64_function() {
    let (rows, width, out) = (7, 12, 5);
    let mut b = Testbed::new(rows);
    let (w, bias) = (normal(1, out * width, 0.3), normal(2, out, 0.3));
    let linear = Linear {
        weight: b.put(out, width, &w),
        bias: b.put(1, out, &bias),
        d_weight: Some(b.room(out, width)),
        d_bias: None,
    };
    // The next layer is the identity, so that the gradient of its input is this layer's output gradient.
    let eye: Vec<f32> = (0..out * out).map(|i| f32::from(u8::from(i / out == i % out))).collect();
    let (weight, zero) = (b.put(out, out, &eye), b.put(1, out, &[0.0; 5]));
    let head = Linear { weight, bias: zero, d_weight: None, d_bias: None };
    let (x, d_y) = (normal(3, rows * width, 1.0), normal(4, rows * out, 1.0));
    let (x_mat, d_y_mat) = (b.put(rows, width, &x), b.put(rows, out, &d_y));
    let (y, d, d_x) = (b.room(rows, out), b.room(rows, out), b.room(rows, width));
    let run = |k: &mut CpuBackend| {
        k.matmul(x_mat, &linear, Epilogue::BiasTanh, y).unwrap();
        k.matmul_backward(d_y_mat, y, &head, InputGrad::Tanh { d, y }).unwrap();
        k.matmul_backward(d, x_mat, &linear, InputGrad::Plain(d_x)).unwrap();
    };
    b.everywhere(&[d_x, linear.d_weight.unwrap()], run, |r| {
        let f = |x: &[f64], w: &[f64]| {
            let y: Vec<f64> = dense(x, w, &wide(&bias)).iter().map(|y| y.tanh()).collect();
            weighted(&y, &d_y)
        };
        let (x64, w64) = (wide(&x), wide(&w));
        assert_gradient("d_x", &x, &r[0], |x| f(x, &w64));
        assert_gradient("d_weight", &w, &r[1], |w| f(&x64, w));
    });
}

/// One head's softmax attention of row `q` over `k`, `v` in f64; `keep` multiplies the probabilities.
fn attend(q: &[f64], k: &[&[f64]], v: &[&[f64]], keep: impl Fn(usize) -> f64) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let e: Vec<f64> = k.iter().map(|k| (dot(q, k) / (q.len() as f64).sqrt()).exp()).collect();
    let sum: f64 = e.iter().sum();
    (0..q.len()).map(|d| (0..k.len()).map(|j| e[j] / sum * keep(j) * v[j][d]).sum()).collect()
}

#[test]
fn attention_has_the_slopes_of_the_f64_function_with_dropout_too() {
    for (samples, tokens, heads, size, rate) in [(2, 5, 3, 5, 0.0), (3, 1, 2, 8, 0.2), (2, 17, 2, 16, 0.2)] {
        let (rows, width) = (samples * tokens, heads * size);
        let mut b = Testbed::new(samples);
        let dropout = Mask { rate, site: 2 };
        let shape = Heads { tokens, heads, head_size: size };
        let (qkv, d_o) = (normal(1, rows * 3 * width, 1.0), normal(2, rows * width, 1.0));
        let (qkv_mat, d_o_mat) = (b.put(rows, 3 * width, &qkv), b.put(rows, width, &d_o));
        let (o, lse) = (b.room(rows, width), b.room(samples * heads, tokens));
        let d_qkv = b.room(rows, 3 * width);
        let run = |k: &mut CpuBackend| {
            k.attention(shape, qkv_mat, o, lse, dropout).unwrap();
            k.attention_backward(shape, qkv_mat, o, lse, dropout, d_o_mat, d_qkv, None).unwrap();
        };
        b.everywhere(&[o, d_qkv], run, |r| {
            let mask = BoundMask::new(dropout, b.keys, b.micro);
            let f = |qkv: &[f64]| -> Vec<f64> {
                let part = |row: usize, which: usize, head: usize| {
                    &qkv[(row * 3 + which) * width + head * size..][..size]
                };
                let mut o = vec![0.0; rows * width];
                for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
                    let (sample, query) = (row / tokens, row % tokens);
                    let keys = sample * tokens..(sample + 1) * tokens;
                    let k: Vec<&[f64]> = keys.clone().map(|j| part(j, 1, head)).collect();
                    let v: Vec<&[f64]> = keys.map(|j| part(j, 2, head)).collect();
                    let keep = |j| f64::from(mask.factor(sample, (head * tokens + query) * tokens + j));
                    let out = attend(part(row, 0, head), &k, &v, keep);
                    o[row * width + head * size..][..size].copy_from_slice(&out);
                }
                o
            };
            assert_close("o", &r[0], &f(&wide(&qkv)), 2e-6);
            assert_gradient("d_qkv", &qkv, &r[1], |qkv| weighted(&f(qkv), &d_o));
        });
    }
}

#[test]
fn query_attention_has_the_slopes_of_the_f64_function() {
    let (samples, tokens, heads, size) = (3, 7, 2, 6);
    let width = heads * size;
    let mut b = Testbed::new(samples);
    let shape = Heads { tokens, heads, head_size: size };
    let (q, kv) = (normal(1, width, 1.0), normal(2, samples * tokens * 2 * width, 1.0));
    let d_o = normal(3, samples * width, 1.0);
    let (q_mat, kv_mat) = (b.put(1, width, &q), b.put(samples * tokens, 2 * width, &kv));
    let (p, o) = (b.room(samples * heads, tokens), b.room(samples, width));
    let (d_o_mat, d_q) = (b.put(samples, width, &d_o), b.room(1, width));
    let d_kv = b.room(samples * tokens, 2 * width);
    let run = |k: &mut CpuBackend| {
        k.query_attention(shape, q_mat, kv_mat, p, o, Mask::NONE).unwrap();
        k.query_attention_backward(shape, q_mat, kv_mat, p, Mask::NONE, d_o_mat, d_q, d_kv).unwrap();
    };
    b.everywhere(&[o, d_q, d_kv], run, |r| {
        let f = |q: &[f64], kv: &[f64]| -> Vec<f64> {
            let head = |sample: usize, head: usize| {
                let part = |j: usize, which: usize| {
                    &kv[((sample * tokens + j) * 2 + which) * width + head * size..][..size]
                };
                let k: Vec<&[f64]> = (0..tokens).map(|j| part(j, 0)).collect();
                let v: Vec<&[f64]> = (0..tokens).map(|j| part(j, 1)).collect();
                attend(&q[head * size..][..size], &k, &v, |_| 1.0)
            };
            (0..samples * heads).flat_map(|i| head(i / heads, i % heads)).collect()
        };
        let (q64, kv64) = (wide(&q), wide(&kv));
        assert_close("o", &r[0], &f(&q64, &kv64), 2e-6);
        assert_gradient("d_q", &q, &r[1], |q| weighted(&f(q, &kv64), &d_o));
        assert_gradient("d_kv", &kv, &r[2], |kv| weighted(&f(&q64, kv), &d_o));
    });
}

#[test]
fn scale_multiplies_and_spares_the_padding() {
    let mut b = Testbed::new(1);
    let all = b.put(70, 8, &normal(1, 560, 1.0));
    let part = Mat { cols: 5, ..all };
    b.everywhere(
        &[all],
        |k| k.scale(part, 0.25).unwrap(),
        |r| {
            let expected = |(i, v): (usize, f32)| if i % 8 < 5 { 0.25 * v } else { v };
            assert!(r[0].iter().copied().eq(normal(1, 560, 1.0).into_iter().enumerate().map(expected)));
        },
    );
}

/// A backend with four parameters, their gradients, SGD's momentum, and logits for three samples.
fn small_step() -> (CpuBackend, Mat, Mat, [Mat; 2]) {
    let mut plan = MemoryPlan::new(Storage::CPU);
    for arena in [Arena::Params, Arena::Grads, Arena::Moment1] {
        plan.set_bytes(arena, 256);
    }
    let (logits, samples) = (plan.activation("z", 3, 2), plan.activation("s", 3, 3));
    let mut backend = CpuBackend::new(1).unwrap();
    backend.allocate(&plan).unwrap();
    let vector = |arena| Mat { arena, offset: 0, rows: 1, cols: 4, ld: 4, dtype: Dtype::F32 };
    backend.write(vector(Arena::Params), &[1.0; 4]).unwrap();
    backend.write(vector(Arena::Grads), &[3.0, 0.0, 4.0, 0.0]).unwrap();

    let layout = SlotLayout { samples: 3, image: (1, 1), pixels: Pixels::U8, targets: TargetKind::Labels };
    let mut slot = backend.new_slot(layout).unwrap();
    slot.labels_mut().copy_from_slice(&[0, 1, 1]);
    backend.bind_batch(slot).unwrap();
    let micro = Micro { first: 0, samples: 3, global_first: 0, gradients: Write::Assign, mean_over: 3 };
    backend.begin_micro(micro).unwrap();
    (backend, logits, samples, [vector(Arena::Params), vector(Arena::Grads)])
}

fn one_update(backend: &mut CpuBackend, logits: Mat, samples: Mat) -> StepReport {
    let loss = Loss::plain(LossKind::Softmax);
    let segment = Segment { name: "w".into(), param: 0, grad: 0, len: 64, group: 0, factor: None };
    let update = Update {
        rule: Rule::Sgd { momentum: 0.9, nesterov: false, bf16: false },
        segments: &[segment],
        groups: &[GroupScalars { lr: 0.5, decay: 0.0 }],
        t: 1,
        clip: None,
        clip_torch: false,
        limits: crate::backend::Limits::NONE,
        ema_decay: None,
    };
    backend.begin_report().unwrap();
    backend.loss(loss, logits, logits, samples).unwrap();
    backend.add_to_report(samples).unwrap();
    backend.update(&update).unwrap();
    backend.report().unwrap()
}

#[test]
fn a_step_reports_means_over_the_batch_and_moves_the_weights() {
    let (mut backend, logits, samples, [params, _]) = small_step();
    backend.write(logits, &[2.0, 0.0, 2.0, 0.0, 0.0, 1.0]).unwrap();
    let report = one_update(&mut backend, logits, samples);
    let losses = [(1.0 + (-2f64).exp()).ln(), (1.0 + 2f64.exp()).ln(), (1.0 + (-1f64).exp()).ln()];
    assert!((report.loss - losses.iter().sum::<f64>() / 3.0).abs() < 1e-6, "{report:?}");
    assert!((report.top1 - 2.0 / 3.0).abs() < 1e-12 && report.top5 == 1.0, "{report:?}");
    assert!((report.grad_norm - 5.0).abs() < 1e-12 && !report.skipped, "{report:?}");
    assert_eq!(take(&mut backend, params), [-0.5, 1.0, -1.0, 1.0]);
}

#[test]
fn a_step_without_a_finite_loss_or_norm_changes_nothing() {
    let (mut backend, logits, samples, [params, grads]) = small_step();
    backend.write(logits, &[2.0, 0.0, f32::NAN, 0.0, 0.0, 1.0]).unwrap();
    let report = one_update(&mut backend, logits, samples);
    assert!(report.skipped && report.loss.is_nan() && report.grad_norm == 5.0, "{report:?}");
    assert_eq!(take(&mut backend, params), [1.0; 4]);

    backend.write(logits, &[0.0; 6]).unwrap();
    backend.write(grads, &[1.0, f32::INFINITY, 0.0, 0.0]).unwrap();
    let report = one_update(&mut backend, logits, samples);
    assert!(report.skipped && report.loss.is_finite(), "{report:?}");
    assert_eq!(take(&mut backend, params), [1.0; 4]);
}
