//! Small models for tests of weights files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use image::{Rgb, RgbImage};
use serde_json::Value;
use vitrum::vit::ParamLayout;
use vitrum::vit::config::ModelConfig;
use vitrum::weights::safetensors::{View, write};
use vitrum::weights::{self, CheckpointMeta, Tensor, Tensors};

use super::scratch;

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A folder of its own for each test.
#[track_caller]
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

/// A model under timm's names, with nothing in its metadata.
pub fn bare(dir: &Path, config: &ModelConfig, change: &dyn Fn(&mut Tensors)) -> PathBuf {
    let mut tensors = sample(config);
    change(&mut tensors);
    let path = dir.join("model.safetensors");
    let views = tensors.iter().map(|(n, t)| View::f32(n, &t.shape, &t.values)).collect();
    write(&path, &BTreeMap::new(), views).unwrap();
    path
}

pub fn picture(dir: &Path) -> String {
    let path = dir.join("picture.png");
    RgbImage::from_fn(24, 20, |x, y| Rgb([(x * 9) as u8, (y * 11) as u8, (x * y) as u8]))
        .save(&path)
        .unwrap();
    path.display().to_string()
}

/// The settings of a hint, as a shell would read them.
pub fn settings_of(hint: &str) -> Vec<String> {
    let typed = hint.split("--set ").skip(1).map(|rest| match rest.strip_prefix('\'') {
        Some(quoted) => quoted.split('\'').next().unwrap(),
        None => rest.split([' ', '`', ',']).next().unwrap(),
    });
    typed.flat_map(|setting| ["--set".to_string(), setting.to_string()]).collect()
}
