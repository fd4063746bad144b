//! Lines for people on stderr, data on stdout. Only this file prints.
//!
//! A closed terminal, a full disk under `2>` and a pipe without a reader never stop a command or a run. Names
//! from files and archives cannot control the terminal: characters that move the cursor, change colours or
//! change the direction of writing are escaped.

use std::borrow::Cow;
use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{At, Result};

static SHOWN: AtomicBool = AtomicBool::new(false);

/// Shows notes, warnings and progress on stderr from now on. The library is silent until a program asks for them,
/// as the command line does first of all.
pub fn show_messages() {
    SHOWN.store(true, Ordering::Relaxed);
}

/// Shows nothing from now on: another process speaks for this one.
pub(crate) fn hide_messages() {
    SHOWN.store(false, Ordering::Relaxed);
}

/// Whether lines and progress for people are shown.
pub(crate) fn shows_messages() -> bool {
    SHOWN.load(Ordering::Relaxed)
}

/// Prints a line for people on stderr, if they are shown.
pub fn say(text: &str) {
    if shows_messages() {
        let _ = writeln!(std::io::stderr(), "{}", visible(text));
    }
}

/// `note: text`
pub fn note(text: &str) {
    say(&format!("note: {text}"));
}

/// `warning: text`
pub fn warn(text: &str) {
    say(&format!("warning: {text}"));
}

/// Writes data to stdout with a newline at the end. If the reader has gone (`vitrum ... | head`), the process
/// exits with 0 and prints nothing.
///
/// # Errors
/// Stdout cannot be written for another reason, such as a full disk.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let end = if text.ends_with('\n') { "" } else { "\n" };
    match write!(out, "{}{end}", visible(text)).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        written => written.at("stdout"),
    }
}

/// Prints one JSON object on stdout, for `--json`.
///
/// # Errors
/// Those of [`print()`].
pub fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&serde_json::to_string_pretty(value).expect("a JSON value can be written"))
}

/// Columns of the terminal that stdout is, from 60 to 120; 100 where it is none.
pub fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
    size.map_or(100, |size| usize::from(size.ws_col)).clamp(60, 120)
}

/// `text` in lines of at most `columns` characters, broken between words. A longer word has a line of its own.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is a line");
        let used = line.chars().count();
        if used > 0 && used + 1 + word.chars().count() > columns {
            lines.push(word.into());
        } else {
            let space = if used > 0 { " " } else { "" };
            line.push_str(&format!("{space}{word}"));
        }
    }
    lines
}

/// The text with control characters escaped, except newlines and tabs: ESC becomes `\u{1b}`.
pub fn visible(text: &str) -> Cow<'_, str> {
    spelled_out(text, |c| is_obeyed(c) && !matches!(c, '\n' | '\t'))
}

/// A name from a file, safe to print within a line: newlines and tabs are escaped as well.
pub fn one_line(name: &str) -> Cow<'_, str> {
    spelled_out(name, is_obeyed)
}

fn spelled_out(text: &str, is_unwanted: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_unwanted) {
        return Cow::Borrowed(text);
    }
    let shown = |c: char| if is_unwanted(c) { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(shown).collect())
}

/// Control characters, line and paragraph separators, and characters that change the writing direction
/// (Unicode 9, Bidi_Control).
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_move_the_cursor_or_turn_the_text() {
        assert_eq!(visible("cat\n\tÄ 猫"), "cat\n\tÄ 猫");
        assert_eq!(visible("a\u{1b}[2Jb\rc\u{9b}d\u{7f}"), "a\\u{1b}[2Jb\\rc\\u{9b}d\\u{7f}");
        assert_eq!(visible("gpj.\u{202e}exe"), "gpj.\\u{202e}exe");
        assert_eq!(one_line("a\nb\tc"), "a\\nb\\tc");
        assert!(matches!(one_line("plain"), Cow::Borrowed(_)));
    }
}
