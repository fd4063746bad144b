//! Files and folders among pictures that are not pictures: those of systems and programs, and other files.
//! They are left out of a listing, and one line counts and names them.

use std::path::Path;

use crate::data::decode::Format;

/// Folders that systems and file servers create.
const FOLDERS: [&str; 8] = [
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "__pycache__",
    "lost+found",
    "@Recently-Snapshot",
];

/// The file that marks a folder as a run directory.
pub(super) const RECIPE: &str = "recipe.toml";

/// File extensions of pictures. A file with one that is not a picture, or in an unsupported format, is a bad
/// record.
const PICTURES: [&str; 15] = [
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif",
    "ppm",
];

/// The extension of a name in lower case, or "".
pub(super) fn ending(name: &str) -> String {
    Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

/// Whether a file's name says that it is a picture.
pub(super) fn is_named_picture(name: &str) -> bool {
    PICTURES.contains(&ending(name).as_str())
}

/// Whether a file is a picture: by its name, else by its first bytes.
pub(super) fn is_picture(name: &str, head: impl FnOnce() -> Vec<u8>) -> bool {
    is_named_picture(name) || Format::of(&head()).is_ok()
}

/// A name of a file or folder that is never data, wherever it is.
pub(super) fn is_junk(name: &str) -> bool {
    name.starts_with('.') || FOLDERS.contains(&name)
}

/// Whether any component of a path is such a name.
pub(super) fn is_junk_path(path: &str) -> bool {
    path.split('/').any(is_junk)
}

/// `` `a`, `b`, `c` and 4 more ``
pub(in crate::data) fn named<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|n| format!("`{}`", n.as_ref())).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// `1 record`, `2 records`
pub(in crate::data) fn count(n: usize, what: &str) -> String {
    match (n, what.strip_suffix("ss")) {
        (1, _) => format!("1 {what}"),
        (_, Some(_)) => format!("{n} {what}es"),
        _ => format!("{n} {what}s"),
    }
}
