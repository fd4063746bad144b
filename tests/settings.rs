//! `docs/settings.md` is what `vitrum settings --markdown` prints.

use std::fs;
use std::path::Path;

use vitrum::cli::settings::page;
use vitrum::recipe::sections;

#[test]
fn the_page_of_settings_is_what_the_program_prints() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/settings.md");
    let found = fs::read_to_string(&path).unwrap();
    let differs = found.lines().zip(page(&sections()).lines()).position(|(a, b)| a != b);
    assert!(
        found == page(&sections()),
        "docs/settings.md differs (line {differs:?}): write it with `vitrum settings --markdown > docs/settings.md`"
    );
}
