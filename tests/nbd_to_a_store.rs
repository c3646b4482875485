//! A disk moves, in use, to what an NBD server stands in front of: an object store (nbdkit's S3 plugin), another NBD server; and back. The
//! S3 part needs the Debian packages nbdkit-plugin-python and python3-boto3, and `moto_server` (PyPI: moto[server]), and skips itself,
//! saying so, where one is missing.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::command::run;
use common::compare::assert_same_content;
use common::mounted::Mount;
use common::nbd::{Server, copy_out, free_port};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::{random, wait};

const SIZE: u64 = 8 << 20;

/// Moves a disk to `target` and back under load.
fn there_and_back(place: &Place, target: &Path) {
    let seed = random::seed();
    let (a, b) = (place.sparse("a.img", SIZE), place.at("b.img"));
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    let mounted = Mount::of(place, [&a]).start();
    let habits = Habits { depth: 2, rest: Duration::from_millis(5), ..Habits::small() };
    let load = Load::start(&mounted.first_disk(), &table, habits, seed);
    load.wait_for_more(20);
    mounted.mirror(target, &[]);
    mounted.wait_ready();
    mounted.cutover();
    assert_eq!(mounted.active(), target);
    load.wait_for_more(20);
    load.stop();
    let copy = copy_out(target, &place.at("copy.img"));
    assert_same_content(&mounted.first_disk(), &copy);
    table.assert_on(&copy);
    mounted.mirror(&b, &[]);
    mounted.wait_ready();
    mounted.cutover();
    mounted.unmount();
    table.assert_on(&b);
}

/// An object store in memory, with a bucket `disks`.
struct Store {
    child: Child,
    endpoint: String,
}

impl Store {
    /// `None`: something is missing here.
    fn start() -> Option<Self> {
        let plugin = run("nbdkit", ["S3", "--dump-plugin"]);
        let server = run("sh", ["-c", "command -v moto_server && command -v curl"]);
        if plugin.code != Some(0) || server.code != Some(0) {
            eprintln!("SKIPPED: nbdkit's S3 plugin, moto_server or curl is missing");
            return None;
        }
        let port = free_port();
        let mut command = Command::new("moto_server");
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("moto_server");
        let store = Store { child, endpoint: format!("http://127.0.0.1:{port}") };
        let bucket = format!("{}/disks", store.endpoint);
        wait::until("the store", || run("curl", ["-s", "-f", "-X", "PUT", &bucket]).code == Some(0));
        Some(store)
    }

    /// What it has in the bucket, in XML.
    fn list(&self) -> String {
        run("curl", ["-s", "-f", &format!("{}/disks", self.endpoint)]).ok().stdout
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_disk_moves_into_an_object_store_and_back() {
    let Some(store) = Store::start() else { return };
    let place = Place::in_memory();
    let (endpoint, size) = (format!("endpoint-url={}", store.endpoint), format!("size={SIZE}"));
    let words =
        ["S3", "access-key=test", "secret-key=test", &endpoint, "bucket=disks", "key=vm1", &size, "object-size=64K"];
    let server = Server::nbdkit(&place, "s3.sock", &words);
    there_and_back(&place, &server.uri());
    assert!(store.list().contains("vm1"), "the disk was there: {}", store.list());
}

#[test]
fn a_disk_moves_through_a_gateway_to_another_server_and_back() {
    let place = Place::in_memory();
    let image = place.sparse("far.img", SIZE);
    let far = Server::qemu(&place, "far.sock", "raw", &image);
    let uri = far.uri();
    let near = Server::nbdkit(&place, "near.sock", &["nbd", uri.to_str().unwrap()]);
    there_and_back(&place, &near.uri());
}
