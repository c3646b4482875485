//! The host of an NBD server falls silent for so long that the kernel gives the connection up: what it was sent may still be done there, so
//! nothing is written past it. This program runs in a network namespace whose kernel gives up soon. Needs root.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::command::{is_root, run};
use common::host::Host;
use common::mounted::Mount;
use common::nbd::{Server, certificates};
use common::place::Place;
use common::wait;

const SIZE: u64 = 8 << 20;

/// Bytes that wait to be read by who listens at `port` of this host.
fn unread(port: u16) -> u64 {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let local = format!(":{port:04X}");
    let sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = sockets.filter(|fields| fields.len() > 4 && fields[1].ends_with(&local) && fields[3] == "01");
    ours.map(|fields| u64::from_str_radix(fields[4].split(':').nth(1).unwrap(), 16).unwrap()).sum()
}

fn block(image: &Path, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    File::open(image).unwrap().read_exact_at(&mut bytes, number * 4096).unwrap();
    bytes
}

fn a_silent_host(place: &Place, host: &Host, name: &str, server: &Server, uri: &str, image: &Path) {
    let mount = || Mount::of(place, [uri]).named(name).in_network(&host.name).with(["--reconnect", "1s"]).start();
    let mounted = mount();
    let disk = File::options().read(true).write(true).open(mounted.first_disk()).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    server.freeze();
    std::thread::scope(|scope| {
        let before = unread(server.port());
        let arrived = scope.spawn(|| disk.write_all_at(&[2; 4096], 0));
        wait::until("the write to reach the host", || unread(server.port()) >= before + 4096);
        host.cut();
        let unheard = scope.spawn(|| disk.write_all_at(&[3; 4096], 4096));
        for write in [unheard, arrived] {
            assert_eq!(write.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
        }
    });
    assert!(mounted.log().contains("what was under way may still be done"), "{}", mounted.log());
    // The host is back, and does what it was sent.
    host.mend();
    server.thaw();
    wait::until("the late write", || block(image, 0) == [2; 4096]);
    for number in [0, 1, 100] {
        assert_eq!(disk.write_all_at(&[4; 4096], number * 4096).unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    drop(disk);
    mounted.unmount();
    let mounted = mount();
    let disk = File::options().read(true).write(true).open(mounted.first_disk()).unwrap();
    disk.write_all_at(&[5; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    mounted.unmount();
    assert!(block(image, 0) == [5; 4096] && block(image, 100) == [0; 4096]);
}

#[test]
fn what_a_silent_host_was_sent_is_never_overtaken() {
    if !is_root("a network namespace") {
        return;
    }
    let Some(host) = Host::new() else { return };
    run("ip", ["netns", "exec", &host.name, "sysctl", "-q", "-w", "net.ipv4.tcp_retries2=2"]).ok();
    let place = Place::in_memory();
    let address = host.our_address();
    let (a, b) = (place.sparse("a.img", SIZE), place.sparse("b.img", SIZE));
    let plain = Server::nbdkit_on(&address, &["file", a.to_str().unwrap()]);
    a_silent_host(&place, &host, "plain", &plain, plain.uri().to_str().unwrap(), &a);
    let pki = certificates(&place, &address);
    let tls = format!("--tls-certificates={}", pki.display());
    let secret = Server::nbdkit_on(&address, &["--tls=require", &tls, "file", b.to_str().unwrap()]);
    let uri = format!("nbds://{address}:{}/?tls-certificates={}", secret.port(), pki.display());
    a_silent_host(&place, &host, "tls", &secret, &uri, &b);
}

/// Nothing is on its way to it that it could refuse: only who asks is told.
#[test]
fn a_host_that_has_forgotten_the_connection_is_noticed() {
    if !is_root("a network namespace") {
        return;
    }
    let Some(host) = Host::new() else { return };
    let place = Place::in_memory();
    let image = place.sparse("a.img", SIZE);
    let words = ["--filter=multi-conn", "file", image.to_str().unwrap(), "multi-conn-mode=disable"];
    let mut server = Server::nbdkit_on(&host.our_address(), &words);
    let mounted = Mount::of(&place, [server.uri()]).in_network(&host.name).start();
    let disk = File::options().read(true).write(true).open(mounted.first_disk()).unwrap();
    disk.write_all_at(&[1; 4096], 0).unwrap();
    disk.sync_all().unwrap();
    server.freeze();
    std::thread::scope(|scope| {
        let before = unread(server.port());
        let guest = scope.spawn(|| disk.write_all_at(&[2; 4096], 4096));
        wait::until("the write to reach the host", || unread(server.port()) >= before + 4096);
        // It dies with what it has not read; that it says so is lost.
        host.cut();
        server.kill();
        host.mend();
        server.restart();
        guest.join().unwrap().unwrap();
    });
    drop(disk);
    mounted.unmount();
    assert!(block(&image, 0) == [1; 4096] && block(&image, 1) == [2; 4096]);
}
