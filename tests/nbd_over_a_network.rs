//! A disk moves to another host, over NBD with TLS, while the link between the two is cut and mended: the other host is a network
//! namespace of its own. Needs root, and a kernel that lets network namespaces be made.

mod common;

use std::path::Path;
use std::time::Duration;

use common::command::is_root;
use common::host::Host;
use common::mounted::{Mount, Mounted};
use common::nbd::{Server, certificates};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::{random, wait};

const SIZE: u64 = 64 << 20;
/// How long the link is cut.
const CUT: Duration = Duration::from_secs(1);

#[test]
fn a_disk_moves_to_another_host_while_the_link_is_cut() {
    if !is_root("a network namespace") {
        return;
    }
    let Some(host) = Host::new() else { return };
    let (seed, place) = (random::seed(), Place::in_memory());
    let (a, b) = (place.sparse("a.img", SIZE), place.sparse("b.img", SIZE));
    let pki = certificates(&place, &host.address());
    let tls = format!("--tls-certificates={}", pki.display());
    let file = b.display().to_string();
    let mut server = Server::nbdkit_at(&host.name, &host.address(), &["--tls=require", &tls, "file", &file]);
    let uri = format!("nbds://{}:{}/?tls-certificates={}", host.address(), server.port(), pki.display());
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);

    let mounted = Mount::of(&place, [&a]).start();
    let habits = Habits { depth: 4, rest: Duration::from_millis(1), ..Habits::default() };
    let load = Load::start(&mounted.first_disk(), &table, habits, seed);
    mounted.mirror(Path::new(&uri), &["--speed", "16M"]);
    // In the middle of the copy: the guest does not notice.
    mounted.wait_for("the copy to begin", |volumes| volumes[0]["mirror"]["copied_bytes"].as_u64() > Some(0));
    host.cut();
    load.wait_for_more(300);
    std::thread::sleep(CUT);
    host.mend();
    load.wait_for_more(100);
    // The other host drops the connections while the link is cut, as one that is restarted does.
    lose_connections(&host, &mut server, || load.wait_for_more(300));
    wait_for_connection(&mounted, 1);
    assert_eq!(mounted.job()["ready"], false, "it was in the middle of the copy");
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    mounted.cutover();
    load.wait_for_more(100);
    // Under the disk itself: the guest waits, and goes on.
    host.cut();
    std::thread::sleep(CUT);
    host.mend();
    load.wait_for_more(100);
    lose_connections(&host, &mut server, || std::thread::sleep(CUT));
    load.wait_for_more(100);
    wait_for_connection(&mounted, 2);
    load.stop();
    mounted.unmount();
    table.assert_on(&b);
}

/// Cuts the link, and mends it when the server has been started again and `meanwhile` is over: nobody has told us that the connections are gone.
fn lose_connections(host: &Host, server: &mut Server, meanwhile: impl FnOnce()) {
    host.cut();
    server.kill();
    meanwhile();
    host.mend();
    server.restart();
}

/// Waits until TLS connections were made anew so many times.
fn wait_for_connection(mounted: &Mounted, times: usize) {
    wait::until("the connection", || mounted.log().matches("connected again after").count() >= times);
}
