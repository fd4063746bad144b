//! Any bytes as a picture: pixels or an error, never a panic; a window of it has the window's size at every
//! scale.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vitrum::data::decode::{self, Decoder};
use vitrum::data::picture::{Scale, Wanted, Window};

fuzz_target!(|bytes: &[u8]| {
    // Large claims are honest only if the file is large; the limit of the program is higher than a fuzzer's patience.
    if decode::header(bytes).is_ok_and(|h| h.height * h.width > 1 << 20) {
        return;
    }
    let mut decoder = Decoder::default();
    let _ = decoder.decode(bytes).map(|view| view.size());
    let Ok(header) = decode::header(bytes) else { return };
    let (h, w) = (header.height.div_ceil(2), header.width.div_ceil(3));
    let window = Window { y: header.height - h, x: (header.width - w) / 2, height: h, width: w };
    for scale in [Scale::Full, Scale::Half, Scale::Quarter, Scale::Eighth] {
        if let Ok(part) = decoder.part(bytes, |_| Wanted { window, scale }) {
            let pixels = part.view.size();
            let sizes = [Scale::Full, scale].map(|s| s.window(window)).map(|w| (w.height, w.width));
            assert!(sizes.contains(&pixels), "{pixels:?}, not one of {sizes:?}");
        }
    }
});
