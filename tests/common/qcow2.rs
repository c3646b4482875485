//! qcow2 files as QEMU's own tool makes and sees them.

use std::path::Path;

use super::command::run;

/// Runs `qemu-img ARGUMENTS`.
#[track_caller]
pub fn qemu_img(arguments: &[&str]) {
    run("qemu-img", arguments).ok();
}

/// No errors; and no leaked clusters, unless somebody was killed (`leaks`).
#[track_caller]
pub fn check(image: &Path, leaks: bool) {
    let done = run("qemu-img", ["check", "-f", "qcow2", image.to_str().expect("UTF-8")]);
    assert!(done.code == Some(0) || (leaks && done.code == Some(3)), "{done}");
}
