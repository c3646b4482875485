//! SQLite that commits all the time, in WAL mode.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::command::run;
use super::wait;

/// A `sqlite3` that commits one numbered transaction after another; each number it prints is a commit that was acknowledged.
pub struct Database {
    child: Child,
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicU64>,
    feeder: Option<JoinHandle<()>>,
}

const SCHEMA: &str = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=50;
    CREATE TABLE entries (number INTEGER PRIMARY KEY, content BLOB, sum TEXT);
    CREATE INDEX entries_sum ON entries (sum);";

impl Database {
    /// Makes the database and starts.
    pub fn start(file: &Path) -> Self {
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

    /// Waits until `count` more transactions were committed.
    #[track_caller]
    pub fn wait_for_more(&self, count: u64) {
        let goal = self.committed.load(Ordering::SeqCst) + count;
        let ended = || self.feeder.as_ref().is_none_or(JoinHandle::is_finished);
        wait::until("the database to go on committing", || self.committed.load(Ordering::SeqCst) >= goal || ended());
        assert!(!ended(), "sqlite3 failed to commit");
    }

    /// Ends it; the number of transactions that were acknowledged.
    pub fn stop(mut self) -> u64 {
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

/// Panics unless the database is whole and holds exactly the first `committed` transactions.
#[track_caller]
pub fn assert_holds(file: &Path, committed: u64) {
    let ask = |question: &str| run("sqlite3", [file.to_str().expect("UTF-8"), question]).ok().stdout.trim().to_owned();
    assert_eq!(ask("PRAGMA integrity_check"), "ok");
    assert_eq!(ask("SELECT count(*), max(number) FROM entries"), format!("{committed}|{committed}"));
}
