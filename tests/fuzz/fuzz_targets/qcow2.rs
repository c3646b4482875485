//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz qcow2`: a qcow2 file of any bytes.
#![no_main]

use livemirror::error::ErrorKind;
use livemirror::image::{CacheMode, ExtentStatus, Format, Image, OpenOptions, open};
use livemirror::range::ByteRange;

#[path = "../qcow2_checks.rs"]
mod qcow2_checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    qcow2_checks::check(input, place.path());
});
