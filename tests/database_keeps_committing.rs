//! SQLite in WAL mode commits without pause while its disk moves from A to B and on to C. Afterwards, on C itself: the
//! database passes its integrity check, and every transaction whose commit was acknowledged is there.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use common::block_device::{FileSystem, LoopDevice};
use common::command::{is_root, long, run};
use common::mounted::Mount;
use common::place::Place;
use common::wait;

/// A `sqlite3` that commits one numbered transaction after another; each number it prints is a commit that was acknowledged.
struct Database {
    child: Child,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    feeder: Option<JoinHandle<()>>,
}

const SCHEMA: &str = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=50;
    CREATE TABLE entries (number INTEGER PRIMARY KEY, content BLOB, sum TEXT);
    CREATE INDEX entries_sum ON entries (sum);";

impl Database {
    fn start(file: &Path) -> Self {
        run("sqlite3", [file.to_str().expect("UTF-8"), SCHEMA]).ok();
        let mut child = Command::new("sqlite3")
            .args([Path::new("-batch"), Path::new("-bail"), file])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sqlite3");
        let mut input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (stop, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let feeder = std::thread::spawn({
            let (stop, committed) = (Arc::clone(&stop), Arc::clone(&committed));
            move || {
                let _ = writeln!(input, "PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=50;");
                let _ = output.next();
                for number in 1.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let transaction = format!(
                        "BEGIN; INSERT INTO entries VALUES ({number}, randomblob(3000), hex(randomblob(16)));
                         UPDATE entries SET content = randomblob(2000) WHERE number = {number} / 2; COMMIT; SELECT {number};"
                    );
                    let answer =
                        writeln!(input, "{transaction}").ok().and_then(|()| output.next()).and_then(Result::ok);
                    if answer.as_deref() != Some(&*number.to_string()) {
                        return;
                    }
                    committed.store(number, Ordering::SeqCst);
                }
            }
        });
        Database { child, stop, committed, feeder: Some(feeder) }
    }

    fn wait_for_more(&self, count: u64) {
        let goal = self.committed.load(Ordering::SeqCst) + count;
        let ended = || self.feeder.as_ref().is_none_or(JoinHandle::is_finished);
        wait::until("the database to go on committing", || self.committed.load(Ordering::SeqCst) >= goal || ended());
        assert!(!ended(), "sqlite3 failed to commit");
    }

    /// Ends it; the number of transactions that were acknowledged.
    fn stop(mut self) -> u64 {
        self.end();
        self.committed.load(Ordering::SeqCst)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(feeder) = self.feeder.take() {
            let _ = feeder.join();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.end();
    }
}

#[test]
fn over_two_moves() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::on_disk();
    let size = 96 << 20;
    let [a, b, c] = [place.sparse("a.img", size), place.at("b.img"), place.at("c.img")];
    let mounted = Mount::of(&place, [&a]).start();
    let device = LoopDevice::over(&mounted.disk("a.img"));
    let filesystem = FileSystem::new_ext4(&device.path, &place.at("live"));
    let database = Database::start(&filesystem.path.join("data.db"));
    let commits = if long() { 2_000 } else { 150 };
    for target in [&b, &c] {
        database.wait_for_more(commits);
        mounted.mirror(target, &[]);
        database.wait_for_more(commits);
        mounted.wait_ready();
        mounted.cutover();
        database.wait_for_more(commits);
    }
    let committed = database.stop();
    filesystem.unmount();
    device.detach();
    mounted.unmount();

    let device = LoopDevice::over(&c);
    let name = device.path.to_str().expect("UTF-8").to_owned();
    run("fsck.ext4", ["-f", "-n", &name]).ok();
    let filesystem = FileSystem::mount(&[&name], &place.at("checked"));
    let file = filesystem.path.join("data.db");
    let ask = |question: &str| run("sqlite3", [file.to_str().expect("UTF-8"), question]).ok().stdout.trim().to_owned();
    assert_eq!(ask("PRAGMA integrity_check"), "ok");
    assert_eq!(ask("SELECT count(*), max(number) FROM entries"), format!("{committed}|{committed}"));
    filesystem.unmount();
    device.detach();
}
