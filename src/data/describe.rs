//! What `vitrum inspect` says about a data set.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::Result;

use super::dataset::{Manifest, Split};
use super::place::Place;
use super::{demo, source};

/// Describes a packed data set, a folder of such, a source of pictures, or `demo`: form, classes, sizes,
/// samples of each class. Fails if `path` is none of these.
pub fn describe(path: &Path) -> Result<Value> {
    let place = Place::find(&path.display().to_string())?;
    let mut about = json!({ "kind": "dataset" });
    match &place {
        Place::Demo(variant) => {
            about["format"] = variant.name().into();
            about["image"] = json!([demo::SIDE, demo::SIDE]);
            about["train"] = json!({ "records": demo::len(Split::Train) });
            about["val"] = json!({ "records": demo::len(Split::Val) });
            about["classes"] = json!(demo::CLASSES);
        }
        Place::Packed(dir) => merge(&mut about, packed(&place, dir, Split::Train)?),
        Place::PackedSplit { parts, .. } => {
            for (split, dir) in parts {
                about[split.name()] = packed(&place, dir, *split)?;
            }
        }
        Place::Unpacked(source) => {
            about["format"] = source.store.kind().into();
            for (split, items) in source.lists() {
                match split {
                    None => merge(&mut about, listed(source, items)),
                    Some(split) => about[split.name()] = listed(source, items),
                }
            }
            if !source.notes().is_empty() {
                about["notes"] = json!(source.notes());
            }
            about["classes"] = json!(source.classes);
        }
        Place::Mixture(_, parts) => {
            let dataset = place.open(Split::Train)?;
            about["format"] = "mixture".into();
            about["records"] = dataset.len().into();
            about["weights"] = json!(parts.iter().map(|(_, weight)| weight).collect::<Vec<_>>());
            about["classes"] = json!(dataset.classes());
        }
    }
    Ok(about)
}

fn packed(place: &Place, dir: &Path, split: Split) -> Result<Value> {
    let manifest = Manifest::read(dir)?;
    let dataset = place.open(split)?;
    Ok(json!({
        "format": manifest.format,
        "image": manifest.image,
        "records": manifest.records,
        "skipped": manifest.skipped,
        "shards": manifest.shards.len(),
        "bytes": dataset.byte_len(),
        "records_per_class": dataset.class_counts(),
        "classes": manifest.classes,
    }))
}

fn listed(source: &source::Source, items: &[source::Item]) -> Value {
    let mut per_class = vec![0usize; source.classes.len()];
    items.iter().flat_map(|item| item.labels()).for_each(|label| per_class[label] += 1);
    json!({ "records": items.len(), "records_per_class": per_class })
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
