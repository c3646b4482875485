//! NBD exports as sources and as targets: over sockets and TCP, of servers that can do more or less, and that fail, freeze, die and
//! come back. The guest never notices a target; what was acknowledged is there; what cannot be done is named.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::command::run;
use common::compare::{allocated_bytes, assert_same_content};
use common::mortal;
use common::mounted::{Mount, Mounted};
use common::nbd::{Server, certificates, copy_out};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::{random, wait};
use nix::sys::signal::Signal;

const SIZE: u64 = 32 << 20;

/// A load that leaves the machine some time to copy.
fn habits() -> Habits {
    Habits { depth: 4, rest: std::time::Duration::from_millis(1), ..Habits::default() }
}

/// Mirrors to `target` and cuts over while `load` goes on.
#[track_caller]
fn move_under(load: &Load, mounted: &Mounted, target: &Path, options: &[&str]) {
    load.wait_for_more(50);
    mounted.mirror(target, options);
    load.wait_for_more(50);
    mounted.wait_ready();
    mounted.cutover();
    assert_eq!(mounted.active(), target);
    load.wait_for_more(50);
}

fn disk_of(mounted: &Mounted) -> std::path::PathBuf {
    mounted.first_disk()
}

#[test]
fn a_disk_moves_over_nbd_and_back_under_load() {
    let (seed, place) = (random::seed(), Place::in_memory());
    let (a, b, c, d) =
        (place.sparse("a.img", SIZE), place.at("b.qcow2"), place.sparse("c.img", SIZE), place.at("d.img"));
    run("qemu-img", ["create", "-q", "-f", "qcow2", b.to_str().unwrap(), "32M"]).ok();
    let memory = Server::nbdkit(&place, "memory.sock", &["memory", "32M"]);
    let qcow2 = Server::qemu_tcp("deep/disk", "qcow2", &b);
    let raw = Server::qemu(&place, "c.sock", "raw", &c);
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);

    let mounted = Mount::of(&place, [&a]).start();
    let load = Load::start(&disk_of(&mounted), &table, habits(), seed);
    move_under(&load, &mounted, &memory.uri(), &[]);
    move_under(&load, &mounted, &qcow2.export("deep/disk"), &["--copy-mode", "write-blocking"]);
    move_under(&load, &mounted, &raw.uri(), &["--copy-mode", "background"]);
    load.stop();
    mounted.unmount();
    table.assert_on(&copy_out(&raw.uri(), &place.at("copy.img")));

    // The other way round: NBD is what is mounted.
    let mounted = Mount::of(&place, [raw.uri()]).named("again").start();
    assert_eq!(disk_of(&mounted).file_name().unwrap(), "nbd.img");
    table.assert_on(&disk_of(&mounted));
    let load = Load::start(&disk_of(&mounted), &table, habits(), seed + 1);
    move_under(&load, &mounted, &d, &[]);
    load.stop();
    mounted.unmount();
    table.assert_on(&d);
    drop(qcow2);
    run("qemu-img", ["check", "-q", b.to_str().unwrap()]).ok();
}

/// Data here and there; the rest is a hole.
fn sparse_source(place: &Place, name: &str, size: u64) -> std::path::PathBuf {
    let path = place.sparse(name, size);
    let file = File::options().write(true).open(&path).unwrap();
    for at in (0..size).step_by(16 << 20) {
        file.write_all_at(&[0x5A; 100 << 10], at + 4096).unwrap();
    }
    path
}

#[test]
fn thin_stays_thin_over_nbd() {
    let place = Place::on_disk();
    let (size, a, c) = (256 << 20, place.at("a.img"), place.at("c.img"));
    sparse_source(&place, "a.img", size);
    let stale = place.random("b.img", size, 3);
    let server = Server::qemu(&place, "b.sock", "raw", &stale);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&server.uri(), &[]);
    mounted.wait_ready();
    mounted.cutover();
    // What the target held before is gone, and takes no room.
    assert_same_content(&a, &stale);
    let block = 64 << 10;
    let most = allocated_bytes(&a) + 2 * block * (size / (16 << 20));
    assert!(allocated_bytes(&stale) <= most, "{} of {most}", allocated_bytes(&stale));
    // A guest's discard reaches the server.
    let disk = File::options().write(true).open(disk_of(&mounted)).unwrap();
    common::space::allocate(&disk, common::space::PUNCH, 0, 1 << 20).unwrap();
    let before = allocated_bytes(&stale);
    assert!(before < most - (64 << 10), "a discarded range takes no room");
    drop(disk);
    mounted.mirror(&c, &[]);
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert_same_content(&stale, &c);
    assert!(allocated_bytes(&c) <= before, "{} > {before}", allocated_bytes(&c));
}

#[test]
fn servers_that_can_do_less_get_the_same_bytes() {
    let place = Place::in_memory();
    let size = 32_u64 << 20;
    let source = sparse_source(&place, "a.img", size);
    let filtered = |words: &[&'static str]| (words.to_vec(), false);
    let scripted = |words: &[&'static str]| (words.to_vec(), true);
    let kinds = [
        filtered(&["--filter=nozero"]),
        filtered(&["--filter=noextents"]),
        filtered(&["--filter=nozero", "--filter=noextents"]),
        filtered(&["--filter=fua", "fuamode=emulate"]),
        filtered(&["--filter=fua"]),
        filtered(&["--filter=multi-conn", "multi-conn-mode=disable", "--no-sr"]),
        filtered(&[
            "--filter=blocksize-policy",
            "blocksize-minimum=4096",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ]),
        filtered(&["--filter=noparallel", "--filter=delay", "rdelay=1ms", "wdelay=1ms"]),
        // Neither trim nor extents nor several connections; then no zeroing either; then no FUA, or FUA and no flush.
        scripted(&["can_flush=exit 0"]),
        scripted(&["can_flush=exit 0", "--filter=nozero"]),
        scripted(&["can_flush=exit 0", "can_fua=echo none"]),
        scripted(&["can_fua=echo native"]),
    ];
    let mounted = Mount::of(&place, [&source]).start();
    let disk = disk_of(&mounted);
    for (number, (words, is_script)) in kinds.into_iter().enumerate() {
        // The target is full of something else.
        let file = place.random(&format!("{number}.img"), size, number as u64);
        let socket = format!("{number}.sock");
        let server = if is_script {
            Server::script(&place, &socket, &file, &words)
        } else {
            let (filters, parameters): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| word.starts_with('-'));
            let path = file.display().to_string();
            Server::nbdkit(&place, &socket, &[filters, vec!["file", &path], parameters].concat())
        };
        mounted.mirror(&server.uri(), &[]);
        mounted.wait_ready();
        mounted.cutover();
        // It goes on as the disk: unaligned writes, zeroes and a discard.
        let guest = File::options().read(true).write(true).open(&disk).unwrap();
        guest.write_all_at(&[number as u8 + 1; 777], 8000).unwrap();
        common::space::allocate(&guest, common::space::ZERO, 9_000, 5_000).unwrap();
        common::space::allocate(&guest, common::space::PUNCH, 20_000, 50_000).unwrap();
        guest.sync_all().unwrap();
        assert_same_content(&file, &disk);
        // And as the source of the next move, which is compared in the next turn.
        let back = place.at(&format!("back-{number}.img"));
        mounted.mirror(&back, &[]);
        mounted.wait_ready();
        mounted.cutover();
        assert_same_content(&file, &back);
        fs::remove_file(&file).unwrap();
    }
    mounted.unmount();
}

#[test]
fn what_cannot_be_opened_is_named() {
    let place = Place::in_memory();
    let source = place.sparse("a.img", 4 << 20);
    let small = Server::nbdkit(&place, "small.sock", &["memory", "2M"]);
    let read_only = Server::nbdkit(&place, "read-only.sock", &["-r", "memory", "4M"]);
    let header = place.at("header.qcow2");
    run("qemu-img", ["create", "-q", "-f", "qcow2", header.to_str().unwrap(), "8M"]).ok();
    let qcow2 = Server::nbdkit(&place, "header.sock", &["file", header.to_str().unwrap()]);
    let nobody = format!("nbd+unix:///?socket={}", place.at("nobody.sock").display());

    let refusal = |uri: &Path| Mount::of(&place, [uri]).named("no").attempt().refuses_naming(&[uri.to_str().unwrap()]);
    assert_eq!(refusal(Path::new(&nobody)).code, Some(1));
    refusal(&read_only.uri());
    refusal(Path::new("nbd+unix:///?socket=relative.sock"));
    assert!(refusal(&qcow2.uri()).complaint().contains("qcow2 header"));
    Mount::of(&place, [read_only.uri()]).named("ro").with(["--read-only"]).start().unmount();
    Mount::of(&place, [qcow2.uri()]).named("raw").with(["--format", "raw"]).start().unmount();

    let mounted = Mount::of(&place, [&source]).start();
    for (uri, what) in [(small.uri(), "too small"), (read_only.uri(), "read-only"), (nobody.into(), "cannot connect")] {
        let refused = mounted.verb("mirror", [uri.as_os_str()]).refuses_naming(&[uri.to_str().unwrap()]);
        assert!(refused.complaint().contains(what), "{refused}");
    }
    // In this mount: the server would wait for itself.
    let inside = format!("nbd+unix:///?socket={}", mounted.disk("x.sock").display());
    assert!(mounted.verb("mirror", [inside]).refuses_naming(&[]).complaint().contains("livemirror mount"));
    assert!(mounted.job().is_null());
    mounted.unmount();
}

#[test]
fn one_export_is_one_image_by_every_name() {
    let place = Place::in_memory();
    let source = place.sparse("a.img", 4 << 20);
    let [one, other] = [("one", "b.img"), ("other", "c.img")]
        .map(|(export, name)| (Server::qemu_tcp(export, "raw", &place.sparse(name, 4 << 20)), export));
    let one_uri = one.0.export(one.1);
    let spelled = |host: &str| format!("nbd://{host}:{}/%6Fne?", one.0.port());
    let mounted = Mount::of(&place, [&one_uri, &other.0.export(other.1), &source]).start();
    for target in [spelled("127.0.0.1"), spelled("LOCALHOST")] {
        for disk in ["one", "other", "a.img"] {
            let refused = mounted
                .verb_on(&mounted.disk(disk), "mirror", [&target])
                .refuses_naming(&[&target, one_uri.to_str().unwrap()]);
            assert!(refused.complaint().contains("export"), "{refused}");
        }
    }
    assert!(mounted.job().is_null());
    mounted.unmount();
}

#[test]
fn a_target_that_freezes_or_dies_is_no_matter_of_the_guest() {
    let (seed, place) = (random::seed(), Place::in_memory());
    let (a, b) = (place.sparse("a.img", SIZE), place.sparse("b.img", SIZE));
    let mut server = Server::qemu(&place, "b.sock", "raw", &b);
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [&a]).start();
    let load = Load::start(&disk_of(&mounted), &table, habits(), seed);
    mounted.mirror(&server.uri(), &["--copy-mode", "write-blocking", "--max-guest-delay", "50ms"]);
    mounted.wait_ready();
    server.freeze();
    load.wait_for_more(200);
    server.thaw();
    load.wait_for_more(50);
    server.kill();
    load.wait_for_more(200);
    server.restart();
    load.wait_for_more(50);
    mounted.cutover();
    load.wait_for_more(50);
    load.stop();
    mounted.unmount();
    server.kill();
    table.assert_on(&b);
}

#[test]
fn a_target_that_stays_away_fails_the_mirror_with_its_name() {
    let place = Place::in_memory();
    let source = place.random("a.img", 8 << 20, 1);
    let mut server = Server::nbdkit(&place, "b.sock", &["memory", "8M"]);
    let mounted = Mount::of(&place, [&source]).start();
    mounted.mirror(&server.uri(), &["--reconnect", "100ms"]);
    mounted.wait_ready();
    server.kill();
    let disk = File::options().write(true).open(disk_of(&mounted)).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    mounted.wait_for("the mirror to fail", |volumes| volumes[0]["mirror"].is_null());
    let last = mounted.volume()["last_mirror"].clone();
    assert_eq!(last["result"], "failed");
    assert!(last["error"].as_str().unwrap().contains(server.uri().to_str().unwrap()), "{last}");
    disk.write_all_at(&[2; 4096], 0).unwrap();
    drop(disk);
    mounted.unmount();
}

#[test]
fn a_full_target_pauses_and_goes_on() {
    let place = Place::in_memory();
    let source = place.random("a.img", 8 << 20, 1);
    let full = place.file("full", b"");
    let trigger = format!("error-file={}", full.display());
    let server = Server::nbdkit(
        &place,
        "b.sock",
        &["--filter=error", "memory", "8M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", &trigger],
    );
    let mounted = Mount::of(&place, [&source]).start();
    mounted.mirror(&server.uri(), &[]);
    mounted.wait_for("the pause", |volumes| volumes[0]["mirror"]["io_status"] == "nospace");
    fs::remove_file(&full).unwrap();
    mounted.verb("resume", [""; 0]).ok();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert_same_content(&copy_out(&server.uri(), &place.at("copy.img")), &source);
}

#[test]
fn a_source_whose_server_dies_and_comes_back_loses_nothing() {
    let (seed, place) = (random::seed(), Place::in_memory());
    let image = place.sparse("a.img", SIZE);
    let mut server = Server::qemu(&place, "a.sock", "raw", &image);
    let table = Table::new(seed, SIZE);
    pattern::fill(&image, &table);
    let mounted = Mount::of(&place, [server.uri()]).start();
    let load = Load::start(&disk_of(&mounted), &table, habits(), seed);
    for _ in 0..3 {
        load.wait_for_more(100);
        server.kill();
        server.restart();
        load.wait_for_more(50);
        server.freeze();
        server.thaw();
    }
    load.stop();
    mounted.unmount();
    server.kill();
    table.assert_on(&image);
}

#[test]
fn requests_of_a_dead_source_fail_in_time_and_it_may_come_back() {
    let place = Place::in_memory();
    let image = place.random("a.img", 4 << 20, 5);
    let mut server = Server::qemu(&place, "a.sock", "raw", &image);
    let mounted = Mount::of(&place, [server.uri()]).with(["--reconnect", "200ms"]).start();
    let disk = File::options().read(true).write(true).open(disk_of(&mounted)).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    server.kill();
    assert_eq!(disk.write_all_at(&[2; 4096], 4096).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(disk.read_exact_at(&mut [0; 4096], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    server.restart();
    wait::until("the disk to answer again", || disk.read_exact_at(&mut [0; 4096], 0).is_ok());
    disk.write_all_at(&[3; 4096], 8192).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    mounted.unmount();
    let seen = fs::read(&image).unwrap();
    assert!(seen[..4096] == [1; 4096] && seen[8192..12288] == [3; 4096]);
}

#[test]
fn a_killed_server_of_ours_leaves_nothing_under_way() {
    let (seed, place) = (random::seed(), Place::in_memory());
    let (a, b) = (place.sparse("a.img", SIZE), place.sparse("b.img", SIZE));
    let servers = [Server::qemu(&place, "a.sock", "raw", &a), Server::qemu(&place, "b.sock", "raw", &b)];
    let table = Table::new(seed, SIZE);
    let mut mounted = Mount::of(&place, [servers[0].uri()]).start();
    let load = Load::start(&disk_of(&mounted), &table, habits(), seed);
    mounted.mirror(&servers[1].uri(), &[]);
    for _ in 0..3 {
        load.wait_for_more(100);
        mortal::strike(mounted.keeper_pid, Signal::SIGKILL);
    }
    load.wait_for_more(100);
    // Nobody can say that nobody else wrote there.
    mounted.wait_ready();
    assert!(mounted.log().contains("everything is compared"), "{}", mounted.log());
    assert!(mounted.log().contains("the connection of the server before has ended"), "{}", mounted.log());
    mounted.cutover();
    load.wait_for_more(50);
    load.stop();
    mounted.note_processes();
    mounted.unmount();
    drop(servers);
    table.assert_on(&b);
}

#[test]
fn an_unfinished_mirror_waits_for_its_server() {
    let place = Place::in_memory();
    let source = place.random("a.img", 8 << 20, 1);
    let image = place.sparse("b.img", 8 << 20);
    let mut server = Server::qemu(&place, "b.sock", "raw", &image);
    let mounted = Mount::of(&place, [&source]).start();
    mounted.mirror(&server.uri(), &[]);
    mounted.wait_ready();
    mounted.unmount();
    server.kill();
    let mounted = Mount::of(&place, [&source]).start();
    mounted.wait_for("the pause", |volumes| {
        volumes[0]["mirror"]["last_error"].as_str().is_some_and(|error| error.contains("cannot connect"))
    });
    // Somebody changed it meanwhile: everything is compared.
    File::options().write(true).open(&image).unwrap().write_all_at(&[9; 70_000], 1 << 20).unwrap();
    server.restart();
    mounted.verb("resume", [""; 0]).ok();
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    assert_same_content(&image, &source);
}

#[test]
fn an_image_that_was_left_is_stale_on_either_side() {
    let place = Place::on_disk();
    let source = place.random("a.img", 4 << 20, 1);
    let server = Server::nbdkit(&place, "b.sock", &["memory", "4M"]);
    let uri = server.uri();
    let mounted = Mount::of(&place, [&source]).start();
    mounted.mirror(&uri, &[]);
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    Mount::of(&place, [&source]).attempt().refuses_naming(&[source.to_str().unwrap(), uri.to_str().unwrap()]);
    let mounted = Mount::of(&place, [&source]).with(["--follow"]).start();
    assert_eq!(mounted.active(), uri);
    // The way back.
    mounted.mirror(&source, &["--existing"]);
    mounted.wait_ready();
    mounted.cutover();
    assert_eq!(mounted.active(), source);
    mounted.unmount();
    Mount::of(&place, [&uri]).attempt().refuses_naming(&[uri.to_str().unwrap(), source.to_str().unwrap()]);
    Mount::of(&place, [&source]).start().unmount();
}

#[test]
fn with_tls_and_certificates() {
    let place = Place::in_memory();
    let pki = certificates(&place, "127.0.0.1");
    let source = place.random("a.img", 4 << 20, 7);
    let certificates = format!("--tls-certificates={}", pki.display());
    let server = Server::nbdkit_tcp(&["--tls=require", &certificates, "memory", "4M"]);
    let uri = format!("nbds://localhost:{}/?tls-certificates={}", server.port(), pki.display());
    let mounted = Mount::of(&place, [&source]).start();
    let refused = mounted.verb("mirror", [server.uri().as_os_str()]).refuses_naming(&["nbd://"]);
    assert!(refused.complaint().contains("TLS") || refused.complaint().contains("tls"), "{refused}");
    mounted.mirror(Path::new(&uri), &[]);
    mounted.wait_ready();
    mounted.cutover();
    assert_same_content(&disk_of(&mounted), &source);
    mounted.unmount();
    let mounted = Mount::of(&place, [&uri]).named("tls").start();
    assert_same_content(&disk_of(&mounted), &source);
    mounted.unmount();
}
