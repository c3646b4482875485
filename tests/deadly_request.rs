//! A request that kills every server that touches it gets EIO, alone: the guest's other requests wait, and none of them fails.
//!
//! The killer is strace, which sends a signal to whoever writes to one of the two images.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::aligned::Aligned;
use common::mounted::{Mount, Mounted};
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;
use common::wait;

const SIZE: u64 = 32 << 20;

/// Kills servers of a mount, the next ones too, with `signal` when they write to `image`, at most `times` each.
struct Killer(Child);

impl Killer {
    fn of(mounted: &Mounted, image: &Path, signal: &str) -> Killer {
        let [server, keeper] = ["server_pid", "keeper_pid"].map(|which| mounted.pid(which).to_string());
        let mut strace = Command::new("strace");
        strace.args(["-f", "-q", "-o", "/dev/null", "-e", "trace=pwrite64", "-e"]);
        strace
            .arg(format!("inject=pwrite64:signal={signal}"))
            .arg("-P")
            .arg(image)
            .args(["-p", &keeper, "-p", &server]);
        let child = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace");
        wait::until("strace to attach", || is_traced(&keeper) && is_traced(&server));
        Killer(child)
    }
}

impl Drop for Killer {
    fn drop(&mut self) {
        // The kernel lets go of what it traces. Told to end, it would wait for a keeper that waits in vfork(2) for a child that is stopped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All threads of a process are traced.
fn is_traced(pid: &str) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut states = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    states.all(|state| !state.contains("TracerPid:\t0\n"))
}

struct Story {
    place: Place,
    mounted: Mounted,
    table: Arc<Table>,
    load: Load,
    deadly: PathBuf,
}

impl Story {
    /// `None`: there is no strace.
    fn start() -> Option<Story> {
        if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
            eprintln!("SKIPPED: strace is needed");
            return None;
        }
        let place = Place::in_memory();
        let seed = random::seed();
        let [image, deadly] = [place.sparse("a.img", SIZE), place.sparse("b.img", SIZE)];
        let table = Table::new(seed, SIZE);
        pattern::fill(&image, &table);
        let mounted = Mount::of(&place, [&image, &deadly]).start();
        let load = Load::start(&mounted.disk("a.img"), &table, Habits { depth: 8, ..Habits::default() }, seed);
        load.wait_for_more(100);
        Some(Story { place, mounted, table, load, deadly })
    }

    fn write(&self, block: u64) -> std::io::Result<()> {
        let disk = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(self.mounted.disk("b.img"))?;
        let mut bytes = Aligned::zeroed(4096);
        bytes.fill(u8::try_from(block).expect("small"));
        disk.write_all_at(&bytes, block * 4096)
    }

    fn end(mut self) {
        self.load.wait_for_more(100);
        println!("the longest request took {:?}", self.load.stop());
        self.table.assert_on(&self.mounted.disk("a.img"));
        self.mounted.note_processes();
        self.mounted.unmount();
        self.table.assert_on(&self.place.at("a.img"));
    }
}

#[test]
fn gets_eio_alone() {
    let Some(story) = Story::start() else { return };
    let killer = Killer::of(&story.mounted, &story.deadly, "ABRT");
    let error = story.write(3).expect_err("it kills every server");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    drop(killer);
    let status = story.mounted.status();
    assert_eq!(status["restarts"], 3, "{status}");
    let log = story.mounted.log();
    let line = log.lines().find(|line| line.contains(": EIO")).expect("the log tells of it");
    assert!(line.contains("write") && line.contains("offset 12288 (4096 bytes)"), "{line}");
    story.write(3).expect("the disk itself is well");
    assert!(fs::read(&story.deadly).expect("read")[12_288..16_384].iter().all(|byte| *byte == 3));
    story.end();
}

#[test]
fn each_of_several_gets_eio() {
    let Some(story) = Story::start() else { return };
    let killer = Killer::of(&story.mounted, &story.deadly, "ABRT");
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..=3)
            .map(|block| {
                scope.spawn({
                    let story = &story;
                    move || story.write(block)
                })
            })
            .collect();
        for writer in writers {
            let error = writer.join().expect("a writer").expect_err("it kills every server");
            assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        }
    });
    drop(killer);
    story.end();
}

/// The operator's kill -9, or the kernel's for want of memory, is not the request's doing: it is never given up.
#[test]
fn a_request_that_is_always_killed_from_outside_waits() {
    let Some(story) = Story::start() else { return };
    let killer = Killer::of(&story.mounted, &story.deadly, "KILL");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| story.write(3));
        wait::until("the fifth server to be killed", || {
            story.mounted.log().matches("was killed by SIGKILL").count() >= 5
        });
        assert!(!writer.is_finished());
        drop(killer);
        writer.join().expect("a writer").expect("no error");
    });
    story.end();
}
