//! Writes a few validation pictures as files into the run directory, so that the user can try `predict` on
//! them.

use std::path::{Path, PathBuf};

use crate::data::decode::Format;
use crate::data::picture::View;
use crate::data::{Dataset, encode_png};
use crate::files;

use crate::data::shard::Record;

/// How many pictures are written, each of another class.
const MOST: usize = 4;
/// Larger files are not written. Bytes.
const LARGEST: usize = 4 << 20;

/// Writes one picture of each of the first classes in `data` to `out/samples`, as `CLASS.EXT`, and returns
/// the files. Skips pictures that cannot be written: the run has already succeeded.
pub fn write(data: &Dataset, out: &Path) -> Vec<PathBuf> {
    let folder = out.join("samples");
    let mut seen = Vec::new();
    let mut written = Vec::new();
    for index in 0..data.len() {
        let label = data.label(index);
        if seen.contains(&label) {
            continue;
        }
        seen.push(label);
        let Some((bytes, end)) = picture_file(data, index) else { continue };
        let name = data.classes().get(label).map_or_else(|| label.to_string(), |name| file_name(name));
        let file = folder.join(format!("{name}.{end}"));
        let is_written = files::create_dir(&folder)
            .and_then(|()| files::write_atomic(&file, |to| std::io::Write::write_all(to, &bytes)))
            .is_ok();
        if is_written {
            written.push(file);
        }
        if seen.len() == MOST {
            break;
        }
    }
    written
}

/// The bytes of a picture file and its extension.
fn picture_file(data: &Dataset, index: usize) -> Option<(Vec<u8>, &'static str)> {
    let (bytes, end) = match data.record(index).ok()? {
        Record::Raw { pixels, height, width } => (encode_png(View::new(&pixels, height, width)).ok()?, "png"),
        Record::Encoded(bytes) => {
            let end = match Format::of(&bytes).ok()? {
                Format::Jpeg => "jpg",
                Format::Png => "png",
                Format::WebP => "webp",
                Format::Gif => "gif",
                Format::Bmp => "bmp",
                Format::Tiff => "tif",
            };
            (bytes.into_owned(), end)
        }
    };
    (bytes.len() <= LARGEST).then_some((bytes, end))
}

/// A file name from a class's name.
fn file_name(class: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || matches!(c, '-' | '_') { c } else { '_' };
    class.chars().take(64).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_may_be_called_anything() {
        assert_eq!(file_name("golden retriever/../x"), "golden_retriever____x");
        assert_eq!(file_name("Käse-1"), "Käse-1");
    }
}
