//! What a newcomer runs first: the demo, and the scripts in examples/. They end well and leave nothing behind.

mod common;

use std::path::Path;
use std::process::Command;

use common::command::{self, is_root, livemirror};
use common::leftovers;
use common::place::Place;

#[test]
fn the_demo_loses_nothing_and_cleans_up() {
    let place = Place::on_disk();
    let mut demo = Command::new(command::binary());
    demo.arg("demo").env("TMPDIR", place.path());
    let done = command::finish(demo).ok();
    assert!(!done.stdout.is_empty());
    println!("{}", done.stdout);
    leftovers::assert_none(place.path(), place.path());
    assert_eq!(place.inventory(), Vec::<String>::new(), "files left behind");
}

#[test]
fn help_names_every_verb() {
    let help = livemirror(["--help"]).ok().stdout;
    let verbs = [
        "mount", "mirror", "status", "cutover", "finish", "cancel", "pause", "resume", "set", "move", "verify",
        "unmount", "list", "demo",
    ];
    for verb in verbs {
        assert!(help.contains(verb), "--help does not name {verb}");
        assert!(livemirror([verb, "--help"]).ok().stdout.contains("Usage"), "{verb} --help");
    }
    assert!(livemirror(["--version"]).ok().stdout.contains(env!("CARGO_PKG_VERSION")));
}

fn example(name: &str) {
    if !is_root("mounting in the examples") {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = Place::on_disk();
    let mut script = Command::new("bash");
    script.arg(root.join("examples").join(name)).current_dir(root);
    script.env("LIVEMIRROR", command::binary()).env("TMPDIR", place.path());
    let done = command::finish(script).ok();
    println!("{}", done.stdout);
    leftovers::assert_none(place.path(), place.path());
}

#[test]
fn the_life_cycle_example() {
    example("lifecycle.sh");
}

/// Skips itself, saying so, where QEMU is not installed.
#[test]
fn the_virtual_machine_example() {
    example("vm.sh");
}
