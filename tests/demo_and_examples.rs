//! What a newcomer runs first: the demo, the scripts in examples/ and the comparison in benches/. They end well and leave nothing behind.

mod common;

use std::path::Path;
use std::process::Command;

use common::command::{self, is_root, livemirror, long};
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

/// Skips itself, saying so, where nbdkit's S3 plugin or an object store to try it with is not installed.
#[test]
fn the_object_store_example() {
    example("s3.sh");
}

/// Skips itself, saying so, where QEMU is not installed.
#[test]
fn the_virtual_machine_example() {
    example("vm.sh");
}

/// The lines of the tables that a section of the comparison prints, cut into cells; everything small and measured once.
fn compared(place: &Place, memory: &Place, arguments: &[&str], settings: &[(&str, &str)]) -> Vec<Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut script = Command::new("bash");
    script.arg(root.join("benches/side_by_side.sh")).args(["--quick", "--no-install"]).args(arguments);
    script
        .env("LIVEMIRROR", command::binary())
        .env("NULL_VOLUME", place.at("not-built"))
        .envs(settings.iter().copied());
    script.env("DIR_DISK", place.path()).env("DIR_MEMORY", memory.path()).env("CHARTS", place.at("charts"));
    let done = command::finish(script).ok();
    println!("{}", done.stdout);
    leftovers::assert_none(place.path(), place.path());
    leftovers::assert_none(memory.path(), memory.path());
    assert_eq!(memory.inventory(), Vec::<String>::new(), "files left behind");
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    done.stdout.lines().filter(|line| line.starts_with('|')).map(cells).collect()
}

/// The figure in the column `title` of the row `name`.
#[track_caller]
fn figure(table: &[Vec<String>], name: &str, title: &str) -> f64 {
    let row = table.iter().position(|row| row[0] == name).unwrap_or_else(|| panic!("no row {name:?} in {table:?}"));
    let column = table[..row].iter().rev().find_map(|row| row.iter().position(|cell| cell == title));
    let cell = &table[row][column.unwrap_or_else(|| panic!("no column {title:?} in {table:?}"))];
    let number = cell.split(' ').next().unwrap_or_default().replace(',', "");
    number.parse().unwrap_or_else(|_| panic!("no figure in {cell:?}, row {name:?}, column {title:?}"))
}

#[test]
fn the_comparison_has_a_figure_for_each_row() {
    if !is_root("mounting in the comparison") {
        return;
    }
    let (place, memory) = (Place::on_disk(), Place::in_memory());
    let settings = [("ROWS", "4k-d1$"), ("SUBJECTS", "plain|null|idle|mirroring")];
    let guest = compared(&place, &memory, &["guest-memory"], &settings);
    for column in ["plain file", "livemirror idle", "while mirroring"] {
        for row in ["randread-4k-d1", "randwrite-4k-d1"] {
            assert!(figure(&guest, row, column) > 0.0);
        }
    }
    assert!(guest.iter().any(|row| row.contains(&"not built".to_owned())), "the null volume is missing: {guest:?}");
    let mirror = compared(&place, &memory, &["mirror-memory"], &[]);
    for column in ["dd bs=1M", "best of the three", "livemirror mirror"] {
        assert!(figure(&mirror, "mirror of 64 MiB, s", column) > 0.0);
    }
}

#[test]
fn the_comparison_draws_its_charts() {
    if !long() || !is_root("mounting in the comparison") {
        return;
    }
    let (place, memory) = (Place::on_disk(), Place::in_memory());
    let table = compared(&place, &memory, &["charts", "cost"], &[]);
    assert!(figure(&table, "livemirror, auto", "dirty at the end, MiB") >= 0.0);
    assert!(figure(&table, "resident, idle, MiB", "16 TiB") > 1.0);
    for (name, series) in [("guest_latency.svg", 3), ("dirty_bytes.svg", 2)] {
        let chart = std::fs::read_to_string(place.at("charts").join(name)).expect("a chart");
        assert!(chart.starts_with("<svg") && chart.trim_end().ends_with("</svg>"), "{name}: {chart}");
        assert!(chart.matches("<polyline").count() >= series, "{name}: {chart}");
    }
}
