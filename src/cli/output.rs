//! Standard output that may be a closed pipe (`livemirror status | head -1`): no reason to fail, least of all half-way.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

/// Prints a line to standard output. Nobody listening is fine; any other error is told.
pub fn line(text: impl Display) {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("livemirror: cannot write to standard output: {error}");
        }
        _ => {}
    }
}
