//! Compares resizing with the original programs, and tests heads.

use super::super::safetensors::SafeTensors;
use super::super::tests::{assert_same, reference, sample, tiny};
use super::super::{
    CheckpointMeta, ModelOverrides, Numbering, Tensors, load_into, open, save, to_flax_tensors,
};
use super::*;
use crate::vit::config::{ModelConfig, PoolKind};
use crate::vit::params::ParamLayout;

#[track_caller]
fn assert_near(name: &str, got: &[f32], expected: &[f32], bound: f64) {
    assert_eq!(got.len(), expected.len(), "{name}");
    let (mut difference, mut norm, mut worst, mut largest) = (0.0, 0.0, 0f64, 0f64);
    for (a, b) in got.iter().zip(expected) {
        let d = f64::from(*a) - f64::from(*b);
        (difference, norm) = (difference + d * d, norm + f64::from(*b).powi(2));
        (worst, largest) = (worst.max(d.abs()), largest.max(f64::from(b.abs())));
    }
    let relative = (difference / norm).sqrt();
    assert!(relative <= bound && worst <= 10.0 * bound * largest, "{name}: {relative:e}, worst {worst:e}");
}

/// `14` or `4x6`.
fn grid(text: &str) -> (usize, usize) {
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    (height.parse().unwrap(), width.parse().unwrap())
}

/// The method and the tolerance for a reference tensor, by the end of its name.
fn way(name: &str) -> Option<(&str, PosembDialect, f64)> {
    [
        (".tok.vit_jax", PosembDialect::VitJax, 1e-6),
        (".timm.bicubic_aa", PosembDialect::Timm, 5e-6),
        (".timm.bicubic", PosembDialect::Hf, 5e-6),
        (".hf.bicubic", PosembDialect::Hf, 5e-6),
    ]
    .into_iter()
    .find_map(|(end, dialect, bound)| Some((name.strip_suffix(end)?, dialect, bound)))
}

#[test]
fn position_embeddings_and_kernels_are_resized_as_the_originals_do() {
    let Some(dir) = reference() else { return };
    let squares = SafeTensors::open(&dir.join("posemb/vit_jax.safetensors")).unwrap();
    let torch = SafeTensors::open(&dir.join("posemb/timm_hf.safetensors")).unwrap();
    let input = |stem: &str| {
        let name = [format!("{stem}.tok.in"), format!("{stem}.in")];
        let found = name.iter().find_map(|n| squares.tensor(n).or_else(|_| torch.tensor(n)).ok());
        found.unwrap_or_else(|| panic!("no input for {stem}"))
    };
    let mut seen = 0;
    for file in [&squares, &torch] {
        for name in file.names() {
            let Some((stem, dialect, bound)) = way(name) else { continue };
            let expected = file.tensor(name).unwrap();
            let (from, to) = stem.trim_start_matches("patch").split_once("to").unwrap();
            let (from, to) = (grid(from), grid(to));
            let got = if stem.starts_with("patch") {
                resize_kernel(&input(stem), to, dialect.kernels())
            } else {
                let input = input(stem);
                let rows = input.shape[1] - from.0 * from.1;
                resize_positions(&input, rows, from, to, dialect.positions())
            };
            assert_eq!(got.shape, expected.shape, "{name}");
            assert_near(name, &got.values, &expected.values, bound);
            seen += 1;
        }
    }
    assert!(seen >= 16, "only {seen} of the reference tensors were compared");
}

#[test]
fn loading_for_fine_tuning_gives_vit_jaxs_parameters() {
    let Some(dir) = reference() else { return };
    let pretrained = open(&dir.join("posemb/finetune_pretrained.npz"), &ModelOverrides::default()).unwrap();
    let after = SafeTensors::open(&dir.join("posemb/finetune_after_load.safetensors")).unwrap();
    let rep = pretrained.config.rep_size;
    assert!(rep > 0);
    let classes = after.shape("head/bias").unwrap()[0];
    let images = after.shape("images_u8").unwrap().to_vec();
    let target =
        AdaptTarget { image: Some((images[1], images[2])), classes: Some(classes), ..Default::default() };
    let (adapted, notes) = adapt(pretrained, &target).unwrap();
    assert_eq!(
        notes,
        [
            "position embedding resized from 4x4 to 6x6 patches as `vit_jax` does it: linear, corners aligned",
            &format!("representation layer of {rep} dropped"),
            "head of 21 classes replaced: 5 classes, all zero",
        ]
    );
    let flax =
        to_flax_tensors(&adapted.config, Numbering::Published, &adapted.tensors.all().unwrap()).unwrap();
    for name in after.names().filter(|n| !["images_u8", "features"].contains(n)) {
        let expected = after.tensor(name).unwrap();
        let got = flax.get(name).unwrap_or_else(|| panic!("no `{name}`"));
        if name.ends_with("pos_embedding") {
            assert_near(name, &got.values, &expected.values, 1e-6);
        } else {
            assert_eq!(*got, expected, "{name}");
        }
    }
    assert_eq!(flax.len() + 2, after.names().count());
}

/// A file of `config`, with class names or without.
fn file(dir: &tempfile::TempDir, config: &ModelConfig, names: Option<&[&str]>) -> (ModelFile, Tensors) {
    let path = dir.path().join("m.safetensors");
    let tensors = sample(config);
    let classes = names.map(|n| n.iter().map(|n| n.to_string()).collect());
    save(&path, config, &tensors, &CheckpointMeta { classes, ..Default::default() }).unwrap();
    (open(&path, &ModelOverrides::default()).unwrap(), tensors)
}

fn names(names: &[&str]) -> Option<Vec<String>> {
    Some(names.iter().map(|n| n.to_string()).collect())
}

/// The result is a complete model.
#[track_caller]
fn assert_whole(file: &ModelFile) {
    load_into(file, &ParamLayout::new(&file.config, |_| false), |_, _| Ok(())).unwrap();
}

#[test]
fn nothing_changes_where_nothing_has_to() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig { rep_size: 5, ..tiny() };
    let (before, tensors) = file(&dir, &config, Some(&["a", "b", "c"]));
    let target = AdaptTarget {
        image: Some((16, 16)),
        patch: Some((4, 4)),
        classes: Some(3),
        class_names: names(&["a", "b", "c"]),
        ..Default::default()
    };
    let (after, notes) = adapt(before, &target).unwrap();
    assert_eq!(notes, ["head kept: 3 classes"]);
    assert_same(&after.tensors.all().unwrap(), &tensors);
    assert_eq!(after.config, config);
}

#[test]
fn heads_are_kept_by_name_by_number_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig { rep_size: 5, ..tiny() };
    let adapted = |of: Option<&[&str]>, target: AdaptTarget| {
        let (file, tensors) = file(&dir, &config, of);
        adapt(file, &target).map(|(file, _)| {
            assert_whole(&file);
            (file, tensors)
        })
    };
    let of = Some(&["a", "b", "c"][..]);

    // By name: c and a are found, d starts at zero, and the rows' representation layer is kept.
    let by_name = AdaptTarget { class_names: names(&["c", "d", "a", "e"]), ..Default::default() };
    let (file, tensors) = adapted(of, by_name.clone()).unwrap();
    let (old, new) = (&tensors["head.weight"].values, &file.tensors.values("head.weight").unwrap());
    assert_eq!(
        (&new[..5], &new[5..10], &new[10..15], &new[15..]),
        (&old[10..], &[0.0; 5][..], &old[..5], &[0.0; 5][..])
    );
    assert_eq!(file.tensors.values("head.bias").unwrap()[2], tensors["head.bias"].values[0]);
    assert_eq!((file.config.classes, file.config.rep_size), (4, 5));
    assert_eq!(file.meta.classes, by_name.class_names);

    // No name in common, or no names and a different number: a new head without the representation layer.
    for (of, target) in [
        (of, AdaptTarget { class_names: names(&["x", "y", "z"]), ..Default::default() }),
        (None, AdaptTarget { classes: Some(7), ..Default::default() }),
        (of, AdaptTarget { head: HeadPolicy::Reset, ..Default::default() }),
    ] {
        let (file, _) = adapted(of, target.clone()).unwrap();
        assert!(file.tensors.values("head.weight").unwrap().iter().all(|v| *v == 0.0));
        assert_eq!((file.config.rep_size, file.tensors.contains("pre_logits.bias")), (0, false));
        assert_eq!(file.tensors.shape("head.weight").unwrap(), [target.classes.unwrap_or(3), 12]);
        assert_eq!(file.meta.classes, target.class_names);
    }

    // Kept on request, or refused.
    let keep = AdaptTarget { head: HeadPolicy::Keep, ..Default::default() };
    let (file, tensors) =
        adapted(None, AdaptTarget { class_names: names(&["p", "q", "r"]), ..keep.clone() }).unwrap();
    assert_same(&file.tensors.all().unwrap(), &tensors);
    assert_eq!(file.meta.classes, names(&["p", "q", "r"]));
    for (target, says) in [
        (AdaptTarget { classes: Some(4), ..keep.clone() }, "its head has 3 classes, but 4 are needed"),
        (AdaptTarget { class_names: names(&["a", "b", "x"]), ..keep.clone() }, "its head has no class `x`"),
        (AdaptTarget { rep_layer: RepLayer::Drop, ..keep }, "the head needs the representation layer"),
    ] {
        let error = adapted(of, target).map(|_| ()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.message().contains(says) && error.message().contains("m.safetensors"), "{error}");
    }
    let kept_rep = AdaptTarget { head: HeadPolicy::Reset, rep_layer: RepLayer::Keep, ..Default::default() };
    let (file, _) = adapted(of, kept_rep).unwrap();
    assert_eq!((file.config.rep_size, file.tensors.shape("head.weight").unwrap()), (5, &[3, 5][..]));
}

#[test]
fn a_distilled_model_gets_two_new_heads() {
    let dir = tempfile::tempdir().unwrap();
    let (file, _) = file(&dir, &ModelConfig { extra_tokens: 2, ..tiny() }, None);
    let target = AdaptTarget { image: Some((24, 16)), classes: Some(9), ..Default::default() };
    let (file, _) = adapt(file, &target).unwrap();
    assert_whole(&file);
    assert_eq!(file.tensors.get("head_dist.bias").unwrap(), Tensor::new([9], vec![0.0; 9]));
    assert_eq!(file.tensors.shape("pos_embed").unwrap(), [1, 2 + 24, 12]);
}

#[test]
fn any_grid_and_patch_gives_a_whole_model_whose_extra_rows_are_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let after = ModelConfig { image: (16, 24), ..tiny() };
    let before = ModelConfig { posemb_join: PosembJoin::Before, ..after.clone() };
    let none = ModelConfig { pool: PoolKind::Gap, extra_tokens: 0, ..after.clone() };
    let fixed = ModelConfig { posemb: Posemb::Sincos2d, ..before.clone() };
    for config in [after, before, none, fixed] {
        let rows = config.posemb_rows() - config.patch_grid().patches();
        for posemb in ["auto", "vit_jax", "big_vision", "scipy_zoom_exact", "timm", "timm_npz", "hf"] {
            let posemb: PosembDialect = serde_json::from_value(posemb.into()).unwrap();
            for (image, patch) in [((40, 16), (4, 4)), ((32, 40), (8, 5)), ((4, 4), (4, 4))] {
                let (file, tensors) = file(&dir, &config, None);
                let target =
                    AdaptTarget { image: Some(image), patch: Some(patch), posemb, ..Default::default() };
                let (file, notes) = adapt(file, &target).unwrap();
                assert_whole(&file);
                assert_eq!((file.config.image, file.config.patch), (image, patch));
                let resized = notes.iter().any(|n| n.contains("position embedding resized"));
                assert_eq!(resized, config.posemb == Posemb::Learned);
                if resized {
                    let rows = ..rows * config.width;
                    assert_eq!(
                        file.tensors.values("pos_embed").unwrap()[rows],
                        tensors["pos_embed"].values[rows]
                    );
                }
            }
        }
    }
    let (file, _) = file(&dir, &tiny(), None);
    let error = adapt(file, &AdaptTarget { image: Some((18, 16)), ..Default::default() }).map(|_| ());
    assert_eq!(error.unwrap_err().exit_code(), 2);
}
