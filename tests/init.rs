//! Every initialisation, tensor by tensor, against the law that its code base draws from.
//!
//! Bits are not comparable between generators; distributions are. Each tensor's values over several seeds must pass a
//! Kolmogorov-Smirnov test against the expected law, which sees a wrong mean, width or shape; bounded laws must also
//! keep their bounds.

use vitrum::vit::config::{InitScheme, MlpKind, ModelConfig, PoolKind, Posemb, PosembJoin};
use vitrum::vit::params::{Param, ParamKind, ParamLayout, initial_values, sincos2d};

#[derive(Clone, Copy, Debug)]
enum Law {
    Constant(f64),
    /// Standard deviation.
    Normal(f64),
    /// On [-a, a].
    Uniform(f64),
    /// Variance 1/fan_in after truncation at two standard deviations of the normal law it comes from.
    LecunNormal {
        fan_in: f64,
    },
}

/// Deviation of the normal law that has deviation 1 once it is cut at ±2.
const TRUNCATED: f64 = 0.879_625_661_034_239_8;

impl Law {
    fn cdf(self, x: f64) -> f64 {
        match self {
            Law::Constant(c) => f64::from(x >= c),
            Law::Normal(std) => phi(x / std),
            Law::Uniform(a) => ((x + a) / (2.0 * a)).clamp(0.0, 1.0),
            Law::LecunNormal { fan_in } => {
                let z = (x * TRUNCATED * fan_in.sqrt()).clamp(-2.0, 2.0);
                (phi(z) - phi(-2.0)) / (phi(2.0) - phi(-2.0))
            }
        }
    }

    /// No value lies beyond.
    fn bound(self) -> f64 {
        match self {
            Law::Constant(c) => c.abs(),
            Law::Normal(_) => f64::INFINITY,
            Law::Uniform(a) => a,
            Law::LecunNormal { fan_in } => 2.0 / (TRUNCATED * fan_in.sqrt()),
        }
    }

    fn std(self) -> f64 {
        match self {
            Law::Constant(_) => 0.0,
            Law::Normal(std) => std,
            Law::Uniform(a) => a / 3f64.sqrt(),
            Law::LecunNormal { fan_in } => 1.0 / fan_in.sqrt(),
        }
    }
}

/// The normal distribution function, by a series that is exact to double precision for |x| < 6.
fn phi(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return f64::from(x > 0.0);
    }
    let (mut term, mut sum, mut k) = (x, x, 1.0);
    while term.abs() > 1e-17 {
        k += 2.0;
        term *= x * x / k;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

/// What each code base draws, with D width, M mlp, R representation, C classes.
fn law(c: &ModelConfig, p: &Param) -> Law {
    use InitScheme::*;
    use ParamKind::*;
    let (d, m, r, classes) = (c.width as f64, c.mlp as f64, c.rep_size as f64, c.classes as f64);
    let patch = (c.patch.0 * c.patch.1 * 3) as f64;
    let features = if c.rep_size > 0 { r } else { d };
    let xavier = |i: f64, o: f64| Law::Uniform((6.0 / (i + o)).sqrt());
    let zero = Law::Constant(0.0);
    let jax = matches!(c.init, VitJax | BigVision);
    let timm_jax = matches!(c.init, TimmJax | TimmJaxNlhb);
    match p.kind {
        NormGamma => Law::Constant(1.0),
        NormBeta | AttentionInBias | AttentionOutBias | RepBias => zero,
        LayerScale => Law::Constant(f64::from(c.layer_scale)),
        PatchKernel if jax || timm_jax => Law::LecunNormal { fan_in: patch },
        PatchBias if jax || timm_jax => zero,
        PatchKernel | PatchBias => Law::Uniform(patch.powf(-0.5)),
        ExtraToken => match c.init {
            VitJax | BigVision => zero,
            Deit3 => Law::Normal(0.02),
            _ => Law::Normal(1e-6),
        },
        Registers if jax || c.init == Deit3 => Law::Normal(0.02),
        Registers => Law::Normal(1e-6),
        PosEmbed => Law::Normal(if c.init == BigVision { d.powf(-0.5) } else { 0.02 }),
        MapProbe if jax => xavier(1.0, d),
        MapProbe => Law::Normal(d.powf(-0.5)),
        AttentionIn { parts } => match c.init {
            VitJax | BigVision | TimmMoco => xavier(d, d),
            TimmJax | TimmJaxNlhb => xavier(d, parts as f64 * d),
            _ => Law::Normal(0.02),
        },
        AttentionOut if jax || timm_jax || c.init == TimmMoco => xavier(d, d),
        MlpKernel if jax || timm_jax || c.init == TimmMoco => xavier(d, m),
        AttentionOut | MlpKernel => Law::Normal(0.02),
        MlpBias if jax || timm_jax => Law::Normal(1e-6),
        MlpBias => zero,
        RepKernel => Law::LecunNormal { fan_in: d },
        HeadKernel => match c.init {
            VitJax | BigVision | TimmJax | TimmJaxNlhb => zero,
            TimmMoco => xavier(features, classes),
            _ => Law::Normal(0.02),
        },
        HeadBias if c.init == TimmJaxNlhb => Law::Constant(-classes.ln()),
        HeadBias => Law::Constant(f64::from(c.head_bias)),
        GatedKernel | GatedBias => unreachable!("a law for each half: see below"),
        SincosTable | RopeTable | NoBias => unreachable!("no parameter"),
    }
}

const SCHEMES: [InitScheme; 7] = [
    InitScheme::VitJax,
    InitScheme::BigVision,
    InitScheme::Timm,
    InitScheme::TimmJax,
    InitScheme::TimmJaxNlhb,
    InitScheme::TimmMoco,
    InitScheme::Deit3,
];

/// One model with every kind of tensor but the distillation token, one with that.
fn models(init: InitScheme) -> [ModelConfig; 2] {
    let mut base = ModelConfig::variant("mu/8", 32, 30).unwrap();
    (base.width, base.heads, base.mlp, base.depth) = (48, 3, 80, 2);
    (base.init, base.layer_scale, base.head_bias) = (init, 1e-4, -2.5);
    let map = ModelConfig { pool: PoolKind::Map, rep_size: 56, registers: 4, ..base.clone() };
    [map, ModelConfig { extra_tokens: 2, patch: (4, 8), ..base }]
}

#[test]
fn every_tensor_follows_its_law() {
    for config in SCHEMES.into_iter().flat_map(models) {
        config.validate().unwrap();
        let layout = ParamLayout::new(&config, |_| false);
        for (index, p) in layout.params.iter().enumerate() {
            let law = law(&config, p);
            // The parts of a fused projection are drawn alike: each is looked at on its own.
            let parts = if let ParamKind::AttentionIn { parts } = p.kind { parts } else { 1 };
            for part in 0..parts {
                let len = p.len() / parts;
                let seeds = 20_000_usize.div_ceil(len) as u64;
                let values: Vec<f64> = (0..seeds)
                    .flat_map(|seed| initial_values(&config, p, index, seed)[part * len..][..len].to_vec())
                    .map(f64::from)
                    .collect();
                assert_follows(&format!("{:?} {} part {part}", config.init, p.name), values, law);
            }
        }
    }
}

#[track_caller]
fn assert_follows(name: &str, mut values: Vec<f64>, law: Law) {
    let n = values.len() as f64;
    if let Law::Constant(c) = law {
        assert!(
            values.iter().all(|v| (v - c).abs() <= 1e-6 * c.abs()),
            "{name}: {} instead of {c}",
            values[0]
        );
        return;
    }
    let mean = values.iter().sum::<f64>() / n;
    let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
    assert!(mean.abs() < 5.0 * law.std() / n.sqrt(), "{name}: mean {mean} with deviation {std}");
    // A normal law's deviation is known to σ/√(2n); the others' better.
    assert!((std / law.std() - 1.0).abs() < 5.0 / (2.0 * n).sqrt(), "{name}: {std} instead of {law:?}");

    values.sort_by(f64::total_cmp);
    let extreme = values[0].abs().max(values[values.len() - 1].abs());
    assert!(extreme <= law.bound() * (1.0 + 1e-6), "{name}: {extreme} is beyond {law:?}");
    let distance = values.iter().enumerate().map(|(i, v)| {
        let cdf = law.cdf(*v);
        (cdf - i as f64 / n).abs().max((cdf - (i + 1) as f64 / n).abs())
    });
    let distance = distance.fold(0.0, f64::max);
    // Beyond 2.4/√n with probability 2·exp(-2·2.4²) = 2e-5; some 500 tensors are tested, with fixed seeds.
    assert!(distance * n.sqrt() < 2.4, "{name}: {:.2} from {law:?}", distance * n.sqrt());
}

#[test]
fn tensors_and_seeds_do_not_share_values() {
    let [config, _] = models(InitScheme::TimmMoco);
    let layout = ParamLayout::new(&config, |_| false);
    let draw = |name: &str, seed: u64| {
        let index = layout.params.iter().position(|p| p.name == name).unwrap();
        initial_values(&config, &layout.params[index], index, seed)
    };
    let a = draw("blocks.0.attn.qkv.weight", 1);
    assert_eq!(a, draw("blocks.0.attn.qkv.weight", 1));
    for b in [draw("blocks.1.attn.qkv.weight", 1), draw("blocks.0.attn.qkv.weight", 2)] {
        let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
        assert!(same < 3, "{same} of {} values are equal", a.len());
        let correlation: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
            / a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
        assert!(correlation.abs() < 5.0 / (a.len() as f64).sqrt(), "correlation {correlation}");
    }
    let third = a.len() / 3;
    assert_ne!(a[..third], a[third..2 * third]);
}

#[test]
fn an_original_head_bias_makes_the_first_sigmoid_loss_small() {
    let mut config = ModelConfig::variant("mu/16", 32, 21_843).unwrap();
    config.head_bias = -10.0;
    let layout = ParamLayout::new(&config, |_| false);
    let index = layout.params.iter().position(|p| p.name == "head.bias").unwrap();
    let bias = initial_values(&config, &layout.params[index], index, 0);
    let loss: f64 = bias.iter().map(|b| f64::from(*b).exp().ln_1p()).sum::<f64>() + 10.0;
    assert!((loss - 10.99).abs() < 0.005, "{loss}");
}

/// big_vision's `posemb_sincos_2d`.
#[test]
fn the_fixed_position_table_has_the_values_of_big_vision() {
    let fixed = |width, image: (usize, usize)| {
        let mut config = ModelConfig::variant("S/16", 224, 10).unwrap();
        (config.width, config.image) = (width, image);
        (config.posemb, config.posemb_join) = (Posemb::Sincos2d, PosembJoin::Before);
        sincos2d(&config)
    };
    let near = |a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} instead of {b:?}");
    };
    let table = fixed(8, (32, 48));
    assert_eq!(table.len(), 6 * 8);
    near(&table[..8], &[0., 0., 1., 1., 0., 0., 1., 1.]);
    near(&table[8..16], &[0.841471, 0.0001, 0.5403023, 1., 0., 0., 1., 1.]);
    near(&table[40..], &[0.9092974, 0.0002, -0.4161468, 1., 0.841471, 0.0001, 0.5403023, 1.]);

    let s16 = fixed(384, (224, 224));
    let sum: f64 = s16.iter().map(|v| f64::from(*v)).sum();
    let squares: f64 = s16.iter().map(|v| f64::from(*v).powi(2)).sum();
    assert!((sum - 34_742.76).abs() < 0.01, "{sum}");
    assert!((squares - 37_632.0).abs() < 0.01, "{squares}");
    near(&s16[100 * 384..][..3], &[0.9092974, 0.9702815, 0.9970614]);
}

#[test]
fn every_gate_of_a_swiglu_starts_at_silu_of_one() {
    for init in SCHEMES {
        let config = ModelConfig { mlp_kind: MlpKind::Swiglu, ..models(init)[1].clone() };
        let layout = ParamLayout::new(&config, |_| false);
        let values = |name: &str| {
            let index = layout.params.iter().position(|p| p.name == name).unwrap();
            initial_values(&config, &layout.params[index], index, 3)
                .into_iter()
                .map(f64::from)
                .collect::<Vec<_>>()
        };
        let bias = values("blocks.0.mlp.fc1.bias");
        assert_eq!(bias, [vec![1.0; config.mlp], vec![0.0; config.mlp]].concat());
        let (d, m) = (config.width as f64, config.mlp as f64);
        let weight = values("blocks.0.mlp.fc1.weight");
        let (gates, up) = weight.split_at(weight.len() / 2);
        assert_follows("gates", gates.to_vec(), Law::Normal(1e-6));
        let law = match init {
            InitScheme::Timm | InitScheme::TimmMoco | InitScheme::Deit3 => Law::Normal(0.02),
            _ => Law::Uniform((6.0 / (d + m)).sqrt()),
        };
        assert_follows("values", up.to_vec(), law);
    }
}
