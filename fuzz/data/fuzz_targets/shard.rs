//! Any bytes as a shard: an error, or a shard whose every record can be taken.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vitrum::data::shard::Shard;

fn take_all(bytes: Vec<u8>) {
    if let Ok(shard) = Shard::from_bytes(bytes, 10) {
        for i in 0..shard.len() {
            let _ = (shard.record(i), shard.name(i));
            assert!(shard.labels(i).iter().all(|label| *label < 10));
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    take_all(bytes.to_vec());
    // The header alone, with its length put right: a fuzzer seldom finds both.
    let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
    framed.extend(bytes);
    framed.extend([0; 256]);
    take_all(framed);
});
