//! The matrix: a disk on each kind of image moves under load to each kind of target, goes on being written to there, and is compared byte
//! for byte by QEMU's own tools; how much room it takes is compared too. The table is printed at the end.

mod common;

use std::path::{Path, PathBuf};

use common::block_device::LoopDevice;
use common::command::{is_root, long};
use common::compare::allocated_bytes;
use common::mounted::Mount;
use common::nbd::{Server, copy_out};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::qcow2::{check, qemu_img};
use common::random;

const MIB: u64 = 1 << 20;
/// Of which the guest uses half.
const SIZE: u64 = 16 * MIB;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

const SOURCES: [&str; 5] = ["raw", "qcow2", "qcow2 on two", "loop device", "NBD"];
const TARGETS: [&str; 5] = ["raw", "qcow2", "loop device", "NBD, memory", "NBD, qcow2"];

/// An image, and whatever serves it meanwhile.
struct Kept {
    /// As it is mounted, or given as a target.
    at: PathBuf,
    /// The file that takes up room, where there is one, and its format.
    file: Option<(PathBuf, &'static str)>,
    device: Option<LoopDevice>,
    server: Option<Server>,
}

fn kept(at: PathBuf, file: Option<(PathBuf, &'static str)>) -> Kept {
    Kept { at, file, device: None, server: None }
}

/// A disk with the table's blocks in its first half, on an image of that kind.
fn source(kind: &str, place: &Place, table: &Table) -> Kept {
    let raw = place.sparse("a.img", SIZE);
    pattern::fill(&raw, table);
    let qcow2 = place.at("a.qcow2");
    let over = |backing: &str, format: &str, path: &Path| {
        let options = format!("backing_file={backing},backing_fmt={format}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, text(path)]);
    };
    match kind {
        "raw" => kept(raw.clone(), Some((raw, "raw"))),
        "qcow2" => {
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&qcow2)]);
            kept(qcow2.clone(), Some((qcow2, "qcow2")))
        }
        "qcow2 on two" => {
            over("a.img", "raw", &place.at("middle.qcow2"));
            over("middle.qcow2", "qcow2", &qcow2);
            kept(qcow2.clone(), Some((qcow2, "qcow2")))
        }
        "loop device" => {
            let device = LoopDevice::over(&raw);
            Kept { device: Some(device), ..kept(PathBuf::new(), Some((raw, "raw"))) }.on_its_device()
        }
        _ => {
            let server = Server::qemu(place, "source.sock", "raw", &raw);
            Kept { server: Some(server), ..kept(PathBuf::new(), Some((raw, "raw"))) }.on_its_server()
        }
    }
}

/// A target of that kind, there already or to be made.
fn target(kind: &str, place: &Place) -> Kept {
    let size = SIZE.to_string();
    match kind {
        "raw" => kept(place.at("b.img"), Some((place.at("b.img"), "raw"))),
        "qcow2" => kept(place.at("b.qcow2"), Some((place.at("b.qcow2"), "qcow2"))),
        "loop device" => {
            let file = place.sparse("b-on-loop.img", SIZE);
            let device = LoopDevice::over(&file);
            Kept { device: Some(device), ..kept(PathBuf::new(), Some((file, "raw"))) }.on_its_device()
        }
        "NBD, memory" => {
            let server = Server::nbdkit(place, "target.sock", &["memory", &size]);
            Kept { server: Some(server), ..kept(PathBuf::new(), None) }.on_its_server()
        }
        _ => {
            let file = place.at("b-on-nbd.qcow2");
            qemu_img(&["create", "-q", "-f", "qcow2", text(&file), &size]);
            let server = Server::qemu(place, "target.sock", "qcow2", &file);
            Kept { server: Some(server), ..kept(PathBuf::new(), Some((file, "qcow2"))) }.on_its_server()
        }
    }
}

impl Kept {
    fn on_its_device(mut self) -> Self {
        self.at = self.device.as_ref().expect("a device").path.clone();
        self
    }

    fn on_its_server(mut self) -> Self {
        self.at = self.server.as_ref().expect("a server").uri();
        self
    }

    /// Ends what serves it. What it holds, as raw bytes, by another program than ours; and the room it takes.
    fn close(self, place: &Place) -> (PathBuf, Option<u64>) {
        let raw = place.at("by-others.img");
        if let Some(device) = self.device {
            device.detach();
        }
        let Some((file, format)) = self.file else {
            return (copy_out(&self.at, &raw), None);
        };
        drop(self.server);
        if format == "qcow2" {
            check(&file, false);
        }
        qemu_img(&["convert", "-f", format, "-O", "raw", text(&file), text(&raw)]);
        (raw, Some(allocated_bytes(&file)))
    }
}

/// One cell. Returns how much room the target takes.
fn moves(from: &str, to: &str, seed: u64) -> Option<u64> {
    let place = Place::in_memory();
    let table = Table::new(seed, SIZE / 2);
    let (a, b) = (source(from, &place, &table), target(to, &place));
    let mounted = Mount::of(&place, [&a.at]).start();
    let disk = mounted.first_disk();
    let habits = Habits { depth: 4, rest: std::time::Duration::from_micros(500), ..Habits::default() };
    let load = Load::start(&disk, &table, habits, seed);
    load.wait_for_more(30);
    let exists = to != "raw" && to != "qcow2";
    mounted.mirror(&b.at, if exists { &["--existing"] } else { &[] });
    mounted.wait_ready();
    load.wait_for_more(30);
    mounted.cutover();
    assert_eq!(mounted.active(), b.at, "{from} to {to}");
    load.wait_for_more(30);
    load.stop();
    table.assert_on(&disk);
    let shown = place.at("as-mounted.img");
    std::fs::copy(&disk, &shown).expect("copy");
    let source_room = allocated_bytes(&place.at("a.img"));
    mounted.unmount();
    let (raw, room) = b.close(&place);
    table.assert_on(&raw);
    // All of it: the half that nobody wrote is zeroes there too.
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "raw", text(&shown), text(&raw)]);
    let rest = std::fs::read(&raw).expect("read").split_off((SIZE / 2) as usize);
    assert!(rest.len() as u64 == SIZE / 2 && rest.iter().all(|&byte| byte == 0), "{from} to {to}: what nobody wrote");
    if let (Some((file, "qcow2")), None) = (&a.file, &a.server) {
        check(file, false);
    }
    if let Some(room) = room {
        // Half of it was never written. What a target has beyond the source is metadata, and blocks that are larger.
        assert!(room <= source_room + 2 * MIB, "{from} to {to}: {room} bytes for {source_room} of the source");
    }
    room
}

#[test]
fn under_load() {
    if !is_root("loop devices") {
        return;
    }
    let seed = random::seed();
    let mut rows = Vec::new();
    for (row, from) in SOURCES.into_iter().enumerate() {
        // The quick set takes each source to two targets, and so each target from two sources; the long one takes all.
        let chosen = |column: usize| long() || [row, (row + 2) % 5].contains(&column);
        let cells = TARGETS.into_iter().enumerate().map(|(column, to)| match chosen(column) {
            true => moves(from, to, seed + (row * 5 + column) as u64)
                .map_or("same".to_owned(), |room| format!("same, {} KiB", room >> 10)),
            false => "-".to_owned(),
        });
        rows.push(format!("| {from} | {} |", cells.collect::<Vec<_>>().join(" | ")));
    }
    println!("| from \\ to | {} |\n|---|{}", TARGETS.join(" | "), "---|".repeat(TARGETS.len()));
    println!("{}", rows.join("\n"));
}
