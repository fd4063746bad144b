//! Any bytes as a tar archive and as manifests of each form: an error or a list, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vitrum::data::source::Source;

fuzz_target!(|bytes: &[u8]| {
    let temp = tempfile::tempdir().expect("a temporary folder");
    for name in ["a.tar", "a.csv", "a.tsv", "a.jsonl"] {
        let path = temp.path().join(name);
        let mut content = bytes.to_vec();
        if name == "a.tar" && content.len() > 262 {
            // Past the first look at what a file is.
            content[257..262].copy_from_slice(b"ustar");
        }
        std::fs::write(&path, content).expect("a temporary file");
        let _ = Source::open(&path);
    }
});
