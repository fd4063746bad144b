//! Small models for tests of weights files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use vitrum::vit::ParamLayout;
use vitrum::vit::config::ModelConfig;
use vitrum::weights::{self, CheckpointMeta, Tensor, Tensors};

use super::scratch;

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A folder of its own for each test.
pub fn folder(name: &str) -> PathBuf {
    let dir = scratch().join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn bits(tensors: &Tensors) -> BTreeMap<&str, (&[usize], Vec<u32>)> {
    let one = |t: &Tensor| t.values.iter().map(|v| v.to_bits()).collect();
    tensors.iter().map(|(n, t)| (n.as_str(), (t.shape.as_slice(), one(t)))).collect()
}

#[track_caller]
pub fn assert_same(a: &Tensors, b: &Tensors) {
    let (a, b) = (bits(a), bits(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in a {
        assert!(tensor == b[name], "`{name}` differs");
    }
}

pub fn tiny() -> ModelConfig {
    let mut config = ModelConfig::variant("testing/4", 16, 3).unwrap();
    (config.width, config.heads, config.mlp, config.depth) = (12, 3, 20, 2);
    config
}

/// A model whose values are all different.
pub fn sample(config: &ModelConfig) -> Tensors {
    let mut state = 7u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let layout = ParamLayout::new(config, |_| false);
    layout
        .parameters()
        .filter(|p| !p.is_empty())
        .map(|p| (p.name.clone(), Tensor::new(p.shape.clone(), (0..p.len()).map(|_| next()).collect())))
        .collect()
}

pub fn saved(dir: &Path, config: &ModelConfig) -> (PathBuf, Tensors) {
    let (path, tensors) = (dir.join("own.safetensors"), sample(config));
    weights::save(&path, config, &tensors, &CheckpointMeta::default()).unwrap();
    (path, tensors)
}
