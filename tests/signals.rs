//! Signals, in a process of their own: listening changes what they do to it.

use signal_hook::consts::SIGTERM;
use signal_hook::low_level::raise;
use vitrum::signals;

#[test]
fn a_first_signal_is_noted_and_does_not_end_the_process() {
    assert_eq!(signals::pending(), None);
    signals::install().unwrap();
    signals::install().unwrap();
    assert_eq!(signals::pending(), None);
    raise(SIGTERM).unwrap();
    assert_eq!(signals::pending(), Some(SIGTERM));
}
