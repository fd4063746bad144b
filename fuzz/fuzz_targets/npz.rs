//! Any bytes as an `.npz`: an error or a model, never a panic, never more memory than the bytes justify.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The first bytes say what a file is; so every input reaches this reader.
    let mut archive = b"PK".to_vec();
    archive.extend(bytes.get(2..).unwrap_or_default());
    let _ = vitrum::weights::check_bytes(&archive, Path::new("fuzz.npz"));
});
