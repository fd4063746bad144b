//! Models of the HuggingFace hub by their names (`google/vit-base-patch16-224`), from the hub's cache on this
//! machine. Nothing is downloaded.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The folder of the hub model that `path` names, or `None` if it is not such a name or is an existing path.
///
/// Errors
/// The model is not in the cache; the hint fetches it.
pub(super) fn resolve(path: &Path) -> Result<Option<PathBuf>> {
    let Some(name) = path.to_str().filter(|_| is_name(path)) else {
        return Ok(None);
    };
    let cache = cache();
    let model = cache.join(format!("models--{}", name.replace('/', "--")));
    let revision = std::fs::read_to_string(model.join("refs/main")).ok();
    let snapshot = revision.map(|revision| model.join("snapshots").join(revision.trim()));
    match snapshot.filter(|folder| folder.is_dir()) {
        Some(folder) => Ok(Some(folder)),
        None => Err(Error::new(format!(
            "{name}: no such file or folder, nor a model of that name in {}",
            cache.display()
        ))
        .hint(format!("`hf download {name}` fetches it from the HuggingFace hub"))),
    }
}

/// Whether `path` is a model's name on the hub, and no file here has that name.
pub(super) fn is_name(path: &Path) -> bool {
    !path.exists() && path.to_str().is_some_and(is_hub_name)
}

/// `OWNER/MODEL`, with the characters that the hub allows; file names are excluded.
fn is_hub_name(name: &str) -> bool {
    let plain = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let is_file = [".safetensors", ".npz", ".bin", ".pth", ".pt", ".json", ".toml", ".tar"]
        .iter()
        .any(|end| name.ends_with(end));
    let mut parts = name.split('/');
    let (owner, model, more) = (parts.next(), parts.next(), parts.next());
    // If the first part is a folder here, this is a mistyped path.
    !is_file
        && more.is_none()
        && model.is_some_and(plain)
        && owner.is_some_and(|owner| plain(owner) && !Path::new(owner).exists())
}

/// Where the hub's own tools keep their downloads.
fn cache() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || variable("HOME").unwrap_or_default().join(".cache");
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| variable("HF_HOME").map(|home| home.join("hub")))
        .unwrap_or_else(|| variable("XDG_CACHE_HOME").unwrap_or_else(home).join("huggingface/hub"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_the_hub_is_told_from_a_path() {
        assert!(
            is_hub_name("google/vit-base-patch16-224")
                && is_hub_name("timm/vit_tiny_patch16_224.augreg_in21k")
        );
        for other in
            ["B/16.npz", "runs/a/b", "/google/vit", "google", "./a/b", "src/vit", "a/model.safetensors", "a/"]
        {
            assert!(!is_hub_name(other), "{other}");
        }
    }
}
