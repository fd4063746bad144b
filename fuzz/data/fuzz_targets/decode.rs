//! Any bytes as a picture: pixels or an error, never a panic; a window of it has the window's size.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vitrum::data::decode::{self, Decoder};
use vitrum::data::picture::Window;

fuzz_target!(|bytes: &[u8]| {
    // Large claims are honest only if the file is large; the limit of the program is higher than a fuzzer's patience.
    if decode::header(bytes).is_ok_and(|h| h.height * h.width > 1 << 20) {
        return;
    }
    let mut decoder = Decoder::default();
    let _ = decoder.decode(bytes).map(|view| view.size());
    let choose = |(height, width): (usize, usize)| {
        let (h, w) = (height.div_ceil(2), width.div_ceil(3));
        Window { y: height - h, x: (width - w) / 2, height: h, width: w }
    };
    let mut chosen = None;
    if let Ok(view) = decoder.window(bytes, |of| *chosen.insert(choose(of))) {
        let window = chosen.expect("a decoder asks for a window");
        assert_eq!(view.size(), (window.height, window.width));
    }
});
