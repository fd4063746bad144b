//! WebDataset's naming in archives: the files of a sample share their folder and their name up to its first
//! dot. The class is in the member `cls`, as a number or a name, or in `json` under `label`, `cls` or
//! `class`.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::fail;

use super::archive::{Archive, Member};
use super::listing::Listing;
use super::strays::{self, count, named};
use super::{Item, Place, Store};

const LABELS: [&str; 3] = ["label", "cls", "class"];

/// Files that share a key.
#[derive(Default)]
struct Sample<'a> {
    picture: Option<&'a Member>,
    label: Option<String>,
    /// From `json`, for samples without `cls`.
    json_label: Option<String>,
    /// Other files.
    rest: Vec<&'a str>,
}

/// Key and extension of a member: `a/b.c/0001.left.jpg` is `left.jpg` of `a/b.c/0001`.
fn key(name: &str) -> Option<(&str, &str)> {
    let folder_end = name.rfind('/').map_or(0, |i| i + 1);
    let dot = name[folder_end..].find('.')?;
    Some((&name[..folder_end + dot], &name[folder_end + dot + 1..]))
}

fn last_part(ending: &str) -> String {
    ending.rsplit('.').next().unwrap_or_default().to_ascii_lowercase()
}

fn is_picture(ending: &str) -> bool {
    let last = last_part(ending);
    strays::is_named_picture(&format!("x.{last}")) || last == "img" || last == "image"
}

fn text<'a>(member: &Member, archive: &Archive, store: &'a Store) -> &'a [u8] {
    &store.maps[archive.map][member.offset..member.offset + member.len]
}

/// Whether an archive has labels beside its pictures.
pub(super) fn is_sample_list(archive: &Archive, store: &Store) -> bool {
    let ending = |member: &Member| key(&member.name).map(|(_, ending)| last_part(ending)).unwrap_or_default();
    let of_json = |member: &&Member| ending(member) == "json";
    archive.members.iter().any(|member| ending(member) == "cls")
        || archive.members.iter().find(of_json).is_some_and(|m| json_label(text(m, archive, store)).is_some())
}

fn json_label(bytes: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(bytes).ok()?;
    LABELS.iter().find_map(|name| match value.get(*name)? {
        Value::String(text) => Some(text.trim().to_owned()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    })
}

/// Lists the samples of all archives. Archives named like a split belong to that split.
pub(super) fn list(archives: &[Archive], store: &Store, is_alone: bool, listing: &mut Listing) -> Result<()> {
    let (mut others, mut without) = (Vec::new(), Vec::new());
    for archive in archives {
        let split = if is_alone { None } else { archive.split() };
        for (key, sample) in samples(archive, store, &mut others)? {
            let name = format!("{}:{key}", archive.name);
            let Some(picture) = sample.picture else {
                match sample.label.or(sample.json_label) {
                    Some(_) => without.push(name),
                    None => others.extend(sample.rest.iter().map(|rest| format!("{}:{rest}", archive.name))),
                }
                continue;
            };
            let Some(text) = sample.label.or(sample.json_label) else {
                fail!(
                    "{}: sample `{name}` has no `cls` member, and no `label` in a `json` one",
                    store.path.display()
                );
            };
            let label = listing.label(&text);
            let place = Place::Member { archive: archive.map, offset: picture.offset, len: picture.len };
            listing.push(split, Item::new(name, label, place));
        }
    }
    listing.note(&others, "file", "neither pictures nor labels");
    if !without.is_empty() {
        let note =
            format!("{} without a picture left out: {}", count(without.len(), "sample"), named(&without));
        listing.notes.push(note);
    }
    Ok(())
}

fn samples<'a>(
    archive: &'a Archive,
    store: &Store,
    others: &mut Vec<String>,
) -> Result<BTreeMap<&'a str, Sample<'a>>> {
    let mut samples: BTreeMap<&str, Sample> = BTreeMap::new();
    for member in &archive.members {
        let Some((key, ending)) = key(&member.name).filter(|_| !strays::is_junk_path(&member.name)) else {
            others.push(format!("{}:{}", archive.name, member.name));
            continue;
        };
        let sample = samples.entry(key).or_default();
        if is_picture(ending) {
            if let Some(other) = sample.picture.replace(member) {
                let both = match other.name == member.name {
                    true => format!("two members `{}` are", member.name),
                    false => format!("`{}` and `{}` are both", other.name, member.name),
                };
                let sample = format!("{}:{key}", archive.name);
                return Err(Error::new(format!(
                    "{}: {both} the picture of sample `{sample}`",
                    store.path.display()
                ))
                .hint(
                    "a sample's name ends at the first dot: give each picture a name of its own before it",
                ));
            }
        } else if last_part(ending) == "cls" {
            let bytes = text(member, archive, store);
            let label = std::str::from_utf8(&bytes[..bytes.len().min(256)]).unwrap_or("").trim().to_owned();
            if label.is_empty() {
                fail!("{}: `{}` holds no label", archive.name, member.name);
            }
            if let Some(other) = sample.label.replace(label) {
                fail!(
                    "{}: sample `{key}` has the label `{other}` and another in `{}`",
                    archive.name,
                    member.name
                );
            }
        } else if last_part(ending) == "json" {
            sample.json_label = json_label(text(member, archive, store)).or(sample.json_label.take());
        } else {
            sample.rest.push(&member.name);
        }
    }
    Ok(samples)
}
