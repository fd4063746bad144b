//! Any bytes as a safetensors file: an error or a model, never a panic, never more memory than the bytes justify.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = vitrum::weights::check_bytes(bytes, Path::new("fuzz.safetensors"));
    // The header alone, with its length put right: a fuzzer seldom finds both.
    let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
    framed.extend(bytes);
    framed.extend([0; 64]);
    let _ = vitrum::weights::check_bytes(&framed, Path::new("fuzz.safetensors"));
});
