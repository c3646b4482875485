//! Parse, start logging, dispatch, exit code; nothing else.

fn main() {}
