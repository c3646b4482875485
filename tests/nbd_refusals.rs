//! NBD servers that refuse: a connection, plain text, a request; and one that is frozen for half a minute. What cannot be opened is named,
//! and a guest does not fail for what passes.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use common::command;
use common::compare::assert_same_content;
use common::mounted::Mount;
use common::nbd::{Server, certificates, free_port};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;

const SIZE: u64 = 4 << 20;

#[test]
fn who_refuses_is_named_as_source_and_as_target() {
    let place = Place::in_memory();
    let local = place.sparse("a.img", SIZE);
    let image = place.sparse("b.img", SIZE);
    let pki = certificates(&place, "127.0.0.1");
    let tls = format!("--tls-certificates={}", pki.display());
    let secret = Server::nbdkit_tcp(&["--tls=require", &tls, "memory", "4M"]);
    let open = Server::nbdkit_tcp(&["memory", "4M"]);
    let closed = Server::nbdkit_tcp(&["--filter=ip", "memory", "4M", "deny=all"]);
    let forgets = Server::script(&place, "b.sock", &image, &[]);
    let read_only = Server::nbdkit(&place, "c.sock", &["-r", "memory", "4M"]);
    let elsewhere = Place::in_memory();
    let strangers = certificates(&elsewhere, "127.0.0.1");

    let nobody = format!("nbd://127.0.0.1:{}/", free_port());
    let text = |server: &Server| server.uri().to_str().unwrap().to_owned();
    let nbds =
        |server: &Server, pki: &Path| format!("nbds://localhost:{}/?tls-certificates={}", server.port(), pki.display());
    let cases = [
        (nobody, "refused"),
        (text(&secret), "TLS"),
        (nbds(&open, &pki), "TLS"),
        (nbds(&secret, &strangers), "certificate"),
        (text(&closed), "cannot connect"),
        (text(&forgets), "neither flush nor FUA"),
        (text(&read_only), "read-only"),
    ];
    let mounted = Mount::of(&place, [&local]).start();
    for (uri, word) in &cases {
        let source = Mount::of(&place, [uri]).named("no").attempt();
        let target = mounted.verb("mirror", [uri]);
        for refused in [source, target] {
            let refused = refused.refuses_naming(&[uri]);
            assert!(refused.complaint().to_lowercase().contains(&word.to_lowercase()), "{word}: {refused}");
        }
    }
    // Where nothing can be made durable it can be read all the same.
    Mount::of(&elsewhere, [forgets.uri()]).with(["--read-only"]).start().unmount();
    assert!(mounted.job().is_null());
    mounted.unmount();
}

#[test]
fn a_server_that_is_shutting_down_is_waited_for() {
    let place = Place::in_memory();
    let refusing = place.at("refusing");
    let image = place.random("a.img", SIZE, 1);
    let trigger = format!("error-file={}", refusing.display());
    let words = ["--filter=error", "file", image.to_str().unwrap(), "error=ESHUTDOWN", "error-rate=100%", &trigger];
    let server = Server::nbdkit(&place, "a.sock", &words);
    let mounted = Mount::of(&place, [server.uri()]).start();
    let disk = File::options().read(true).write(true).open(mounted.first_disk()).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    place.file("refusing", b"");
    std::thread::scope(|scope| {
        let guests = [0, 1].map(|number| {
            let disk = &disk;
            scope.spawn(move || {
                disk.write_all_at(&[2; 4096], 4096 + number * 4096)?;
                disk.read_exact_at(&mut [0; 4096], number * 4096)
            })
        });
        common::wait::until("the server's refusal", || mounted.log().contains("the server is shutting down"));
        assert!(guests.iter().all(|guest| !guest.is_finished()), "they wait");
        fs::remove_file(&refusing).unwrap();
        guests.into_iter().for_each(|guest| guest.join().unwrap().unwrap());
    });
    disk.sync_all().unwrap();
    // As the target of a mirror, of a guest that does not wait for it.
    drop(disk);
    mounted.unmount();
    let local = place.random("b.img", SIZE, 2);
    let other = Mount::of(&place, [&local]).named("other").start();
    let guest = File::options().write(true).open(other.first_disk()).unwrap();
    other.mirror(&server.uri(), &["--speed", "1M"]);
    place.file("refusing", b"");
    guest.write_all_at(&[3; 8192], 0).unwrap();
    common::wait::until("the server's refusal", || other.log().contains("the server is shutting down"));
    fs::remove_file(&refusing).unwrap();
    other.wait_ready();
    other.cutover();
    guest.write_all_at(&[4; 8192], 8192).unwrap();
    drop(guest);
    let disk = other.first_disk();
    assert_same_content(&disk, &image);
    other.unmount();
}

#[test]
fn a_server_that_is_frozen_for_a_while_fails_nobody() {
    // Half a minute in the long set.
    let frozen = Duration::from_secs(if command::long() { 30 } else { 2 });
    let (seed, place) = (random::seed(), Place::in_memory());
    let size = 32 << 20;
    let (a, b) = (place.sparse("a.img", size), place.sparse("b.img", size));
    let servers = [Server::qemu(&place, "a.sock", "raw", &a), Server::qemu(&place, "b.sock", "raw", &b)];
    let table = Table::new(seed, size);
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [servers[0].uri()]).start();
    let habits = Habits { depth: 4, rest: Duration::from_millis(1), ..Habits::default() };
    let load = Load::start(&mounted.first_disk(), &table, habits, seed);
    load.wait_for_more(50);
    // The disk itself: its guest waits.
    servers[0].freeze();
    std::thread::sleep(frozen);
    servers[0].thaw();
    load.wait_for_more(50);
    // The target: the guest goes on meanwhile.
    mounted.mirror(&servers[1].uri(), &["--copy-mode", "write-blocking", "--max-guest-delay", "50ms"]);
    mounted.wait_ready();
    servers[1].freeze();
    load.wait_for_more(100);
    std::thread::sleep(frozen);
    load.wait_for_more(100);
    servers[1].thaw();
    mounted.wait_ready();
    mounted.cutover();
    load.wait_for_more(50);
    load.stop();
    mounted.unmount();
    drop(servers);
    table.assert_on(&b);
}
