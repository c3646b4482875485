//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz recover`: an intent log of any bytes.
#![no_main]

use livemirror::dirty::intent::{JobId, recover};

#[path = "../checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::check(input));
