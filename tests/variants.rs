//! Parameters and multiply-adds of every named variant, as the papers' code counts them, and as the operations of a pass
//! come to them.

use vitrum::backend::dry_run::DryRun;
use vitrum::backend::timed::Timed;
use vitrum::backend::{Normalise, Precision, Storage};
use vitrum::vit::config::{ModelConfig, PoolKind, VARIANTS};
use vitrum::vit::params::{ParamKind, ParamLayout};
use vitrum::vit::{LastBlock, Mode, Vit};

fn count(config: &ModelConfig) -> usize {
    ParamLayout::new(config, |_| false).count()
}

fn backbone(config: &ModelConfig) -> usize {
    let layout = ParamLayout::new(config, |_| false);
    let head = |kind: ParamKind| matches!(kind, ParamKind::HeadKernel | ParamKind::HeadBias);
    layout.parameters().filter(|p| !head(p.kind)).map(|p| p.len()).sum()
}

/// 1000 classes, class token, learned positions, no representation layer. The counts at 224 are the constants of
/// google-research/vision_transformer's model test; the others follow from its shapes.
const AT_224: [(&str, usize, usize, usize, f64); 16] = [
    // variant, parameters, without the head, with 21,843 classes, GMAC
    ("testing/16", 21_390, 10_390, 250_663, 0.002),
    ("mu/16", 76_712, 43_712, 764_531, 0.010),
    ("Ti/16", 5_717_416, 5_524_416, 9_740_115, 1.254),
    ("S/32", 22_878_952, 22_493_952, 30_903_507, 1.143),
    ("S/16", 22_050_664, 21_665_664, 30_075_219, 4.599),
    ("M/16", 38_837_736, 38_324_736, 49_530_195, 7.991),
    ("B/32", 88_224_232, 87_455_232, 104_252_499, 4.409),
    ("B/16", 86_567_656, 85_798_656, 102_595_923, 17.564),
    ("B/8", 86_576_872, 85_807_872, 102_605_139, 78.148),
    ("L/32", 306_535_400, 305_510_400, 327_899_475, 15.378),
    ("L/16", 304_326_632, 303_301_632, 325_690_707, 61.555),
    ("So400m/14", 413_597_656, 412_444_656, 437_629_635, 109.9),
    ("H/14", 632_045_800, 630_764_800, 658_745_683, 167.295),
    ("g/14", 1_012_611_432, 1_011_202_432, 1_041_979_219, 267.031),
    ("G/14", 1_844_440_680, 1_842_775_680, 1_879_144_275, 483.748),
    ("e/14", 3_807_214_312, 0, 0, 990.7),
];

/// At 384 pixels; patches of 14 take 378.
const AT_384: [(&str, usize, usize, f64); 14] = [
    ("testing/16", 384, 25_190, 0.011),
    ("mu/16", 384, 88_872, 0.043),
    ("Ti/16", 384, 5_790_376, 4.682),
    ("S/32", 384, 22_915_432, 3.443),
    ("S/16", 384, 22_196_584, 15.490),
    ("M/16", 384, 39_032_296, 26.099),
    ("B/32", 384, 88_297_192, 13.044),
    ("B/16", 384, 86_859_496, 55.484),
    ("B/8", 384, 87_744_232, 294.045),
    ("L/32", 384, 306_632_680, 45.276),
    ("L/16", 384, 304_715_752, 191.066),
    ("H/14", 378, 0, 503.5),
    ("g/14", 378, 0, 797.4),
    ("G/14", 378, 0, 1429.2),
];

/// Equal to the last digit that the table gives.
#[track_caller]
fn assert_gmac(name: &str, config: &ModelConfig, expected: f64, text: &str) {
    let decimals = text.split_once('.').map_or(0, |(_, d)| d.len()) as i32;
    let half = 0.5 * 10f64.powi(-decimals);
    let gmac = config.forward_macs() as f64 / 1e9;
    assert!((gmac - expected).abs() <= half * 1.000_001, "{name}: {gmac} GMAC, the table says {expected}");
}

#[test]
fn every_variant_has_the_published_number_of_parameters() {
    for (name, params, without_head, with_21843, gmac) in AT_224 {
        let model = |classes| ModelConfig::variant(name, 224, classes).unwrap();
        assert_eq!(count(&model(1000)), params, "{name}");
        if without_head > 0 {
            assert_eq!(backbone(&model(1000)), without_head, "{name}");
            assert_eq!(count(&model(21_843)), with_21843, "{name}");
        }
        let text =
            if gmac > 500.0 || name == "So400m/14" { format!("{gmac:.1}") } else { format!("{gmac:.3}") };
        assert_gmac(name, &model(1000), gmac, &text);
    }
    for (name, image, params, gmac) in AT_384 {
        let model = ModelConfig::variant(name, image, 1000).unwrap();
        if params > 0 {
            assert_eq!(count(&model), params, "{name} at {image}");
        }
        let text = if image == 378 { format!("{gmac:.1}") } else { format!("{gmac:.3}") };
        assert_gmac(name, &model, gmac, &text);
    }
}

#[test]
fn mean_pooling_has_no_class_token() {
    for (name, params) in [("S/16", 22_049_896), ("B/16", 86_566_120)] {
        let token = ModelConfig::variant(name, 224, 1000).unwrap();
        assert_eq!(count(&ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, ..token }), params, "{name}");
    }
}

/// The original ImageNet-21k files have a representation layer as wide as the model; the AugReg files have none.
#[test]
fn published_file_sizes_are_those_of_the_parameters() {
    let b16 = ModelConfig::variant("B/16", 224, 21_843).unwrap();
    let mebibytes = |c: &ModelConfig| count(c) as f64 * 4.0 / 1024.0 / 1024.0;
    assert!((mebibytes(&b16) - 391.37).abs() < 0.01);
    assert!((mebibytes(&ModelConfig { rep_size: 768, ..b16 }) - 393.62).abs() < 0.01);
}

/// `block = 4D + 4(D² + D) + (DM + M) + (MD + D)`, for the variants that no table counts.
#[test]
fn the_closed_form_holds_for_every_variant() {
    for v in VARIANTS {
        let config = ModelConfig::variant(&format!("{}/14", v.name), 224, 10).unwrap();
        let (d, m) = (v.width, v.mlp);
        let block = 4 * d + 4 * (d * d + d) + (d * m + m) + (m * d + d);
        let expected = (14 * 14 * 3 * d + d) + 257 * d + d + v.depth * block + 2 * d + (d * 10 + 10);
        assert_eq!(count(&config), expected, "{}", v.name);
        config.validate().unwrap();
    }
}

/// FLOPs that the operations of a forward and of a backward pass come to, for a batch of 3.
fn flops_of_passes(model: &Vit) -> [u64; 2] {
    let mut counted = Timed::new(Box::new(DryRun::new(Storage::CPU, Precision::F32)));
    let times = counted.times();
    let sum = || times.operations().iter().map(|timing| timing.cost.flops).sum();
    model.forward(&mut counted, true).unwrap();
    let forward = sum();
    times.reset();
    model.backward(&mut counted, true).unwrap();
    [forward, sum()]
}

#[test]
fn operations_come_to_what_is_counted_of_the_model() {
    let token = ModelConfig::variant("Ti/16", 32, 10).unwrap();
    let cases = [
        token.clone(),
        ModelConfig { extra_tokens: 2, ..token.clone() },
        ModelConfig { rep_size: 24, ..token.clone() },
        ModelConfig { dropout: 0.1, layer_scale: 0.1, drop_path: 0.1, ..token.clone() },
        ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, ..token.clone() },
        ModelConfig { pool: PoolKind::Map, extra_tokens: 0, ..token },
    ];
    let batch = 3;
    for config in cases {
        for last_block in [LastBlock::Whole, LastBlock::Pruned] {
            let (normalise, mode) = (Normalise::INCEPTION, Mode::Train);
            let model = Vit::new(config.clone(), normalise, batch, mode, Storage::CPU, last_block, |_| false);
            let [b, t, d, patch] =
                [batch, config.tokens(), config.width, config.patch_grid().patch_len()].map(|n| n as u64);
            // Rows of extra tokens go through the patch embedding too; all images share a MAP head's query.
            let mut expected = b * model.flops_done(false) + 2 * b * config.extra_tokens as u64 * patch * d;
            if config.pool == PoolKind::Map {
                expected -= 2 * (b - 1) * d * d;
            }
            let [forward, backward] = flops_of_passes(&model);
            assert_eq!(forward, expected, "{config:?}");
            // Two products for one, save that pixels have no gradient, and that attention does one of its own once more.
            let blocks = (config.depth - usize::from(model.pruned)) as u64;
            assert_eq!(
                backward,
                2 * forward - 2 * b * t * patch * d + 2 * b * blocks * t * t * d,
                "{config:?}"
            );
        }
    }
}
