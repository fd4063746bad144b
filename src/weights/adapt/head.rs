//! Replaces the classifier for other classes, and the representation layer before it.

use std::collections::HashMap;

use super::{AdaptTarget, HeadPolicy, RepLayer};
use crate::error::{Error, Result};
use crate::fail;
use crate::weights::{ModelFile, Tensor};

/// Where the rows of the new head come from.
enum Rows {
    AsTheyAre,
    /// For each new class, the index of the old one, if the file has it.
    ByName(Vec<Option<usize>>),
    Zero,
}

/// Replaces head and representation layer as `target` says.
pub(super) fn replace(file: &mut ModelFile, target: &AdaptTarget, notes: &mut Vec<String>) -> Result<()> {
    let old = file.config.classes;
    let classes = match (target.classes, &target.class_names) {
        (Some(classes), Some(names)) if classes != names.len() => {
            return Err(Error::usage(format!("{} class names for {classes} classes", names.len())));
        }
        (Some(0), _) => return Err(Error::usage("`model.classes` is 0")),
        (Some(classes), _) => classes,
        (None, Some(names)) => names.len(),
        (None, None) if old == 0 => {
            return Err(Error::new("it has no head, and the number of classes is not given")
                .hint("give the data set, or `--set model.classes=N`"));
        }
        (None, None) => old,
    };
    let drop_rep = |rows: &Rows| match target.rep_layer {
        _ if file.config.rep_size == 0 => false,
        RepLayer::Keep => false,
        RepLayer::Drop => true,
        RepLayer::Auto => matches!(rows, Rows::Zero),
    };
    let mut rows = choose_rows(file, target, classes)?;
    let drop_rep = drop_rep(&rows);
    if drop_rep && !matches!(rows, Rows::Zero) {
        if target.head == HeadPolicy::Keep {
            return Err(Error::new("the head needs the representation layer, which is to be dropped")
                .hint("keep both or neither: `--head reset` starts a new head"));
        }
        rows = Rows::Zero;
    }

    if drop_rep {
        notes.push(format!("representation layer of {} dropped", file.config.rep_size));
        ["pre_logits.weight", "pre_logits.bias"].iter().for_each(|name| file.tensors.remove(name));
        file.config.rep_size = 0;
    }
    match &rows {
        Rows::AsTheyAre => notes.push(format!("head kept: {classes} classes")),
        Rows::Zero if old == 0 => notes.push(format!("head added: {classes} classes, all zero")),
        Rows::Zero => notes.push(format!("head of {old} classes replaced: {classes} classes, all zero")),
        Rows::ByName(sources) => {
            let found = sources.iter().flatten().count();
            notes.push(format!("head: {found} of {classes} classes kept by name, the others start at zero"));
        }
    }
    let features = if file.config.rep_size > 0 { file.config.rep_size } else { file.config.width };
    let heads = if file.config.extra_tokens == 2 { &["head", "head_dist"][..] } else { &["head"] };
    for head in heads {
        for (leaf, shape) in [("weight", vec![classes, features]), ("bias", vec![classes])] {
            let name = format!("{head}.{leaf}");
            let values = match &rows {
                Rows::AsTheyAre => continue,
                Rows::Zero => vec![0.0; shape.iter().product()],
                Rows::ByName(sources) => {
                    pick(&file.tensors.values(&name)?, sources, shape[1..].iter().product())
                }
            };
            file.tensors.insert(&name, Tensor::new(shape, values));
        }
    }
    if !matches!(rows, Rows::AsTheyAre) {
        file.config.head_bias = 0.0;
    }
    file.config.classes = classes;
    match &target.class_names {
        Some(names) => file.meta.classes = Some(names.clone()),
        // Names of other classes would be wrong, even if there happen to be as many.
        None if matches!(rows, Rows::Zero) => file.meta.classes = None,
        None => {}
    }
    Ok(())
}

fn choose_rows(file: &ModelFile, target: &AdaptTarget, classes: usize) -> Result<Rows> {
    let old = file.config.classes;
    if target.head == HeadPolicy::Reset {
        return Ok(Rows::Zero);
    }
    if target.head == HeadPolicy::Keep && classes != old {
        return Err(Error::new(format!("its head has {old} classes, but {classes} are needed"))
            .hint("use `--head auto`, which starts a new head where the classes differ"));
    }
    let (Some(theirs), Some(ours)) = (&file.meta.classes, &target.class_names) else {
        return Ok(if classes == old { Rows::AsTheyAre } else { Rows::Zero });
    };
    if theirs == ours {
        return Ok(Rows::AsTheyAre);
    }
    let place: HashMap<&str, usize> = theirs.iter().enumerate().map(|(i, n)| (n.as_str(), i)).collect();
    let sources: Vec<Option<usize>> = ours.iter().map(|name| place.get(name.as_str()).copied()).collect();
    if target.head == HeadPolicy::Keep
        && let Some((missing, _)) = ours.iter().zip(&sources).find(|(_, source)| source.is_none())
    {
        fail!("its head has no class `{missing}`");
    }
    Ok(if sources.iter().any(Option::is_some) { Rows::ByName(sources) } else { Rows::Zero })
}

/// Rows of `cols` values from the rows that `sources` gives; zeros for rows without a source.
fn pick(values: &[f32], sources: &[Option<usize>], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; sources.len() * cols];
    for (row, source) in out.chunks_mut(cols).zip(sources) {
        if let Some(source) = source {
            row.copy_from_slice(&values[source * cols..][..cols]);
        }
    }
    out
}
