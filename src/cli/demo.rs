//! `livemirror demo`: the whole story on a temporary disk.

mod pattern;
mod stage;
mod writers;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use self::pattern::{DISK_BYTES, SLOTS, Table, verify};
use self::stage::Stage;
use self::writers::Writers;
use super::cutover::cut_over;
use super::follow::{self, Waited};
use super::interrupt::Interrupt;
use super::output;
use super::place::Mount;
use super::progress::Progress;
use super::units;
use crate::error::{Error, ErrorKind, Result};

/// The demo gives up after this time; 20 seconds with the cleaning up.
const LIMIT: Duration = Duration::from_secs(18);
/// How long the guest writes before, between and after.
const SCENE: Duration = Duration::from_millis(800);

/// Shows the whole story on a temporary disk, in seconds; needs no set-up.
///
/// Makes a sparse disk, mounts it, writes to it without pause, mirrors it, cuts over under that load, unmounts, and verifies
/// every block on the new image itself. Nothing is left behind.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Where to make the temporary directory (300 MiB are needed) [default: $TMPDIR, else /tmp].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Tells what happens, with the time since the start.
struct Teller(Instant);

impl Teller {
    fn say(&self, line: &str) {
        output::line(format_args!("{:6.2} s  {line}", self.0.elapsed().as_secs_f64()));
    }
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// Something went wrong, or was lost.
    pub fn run(self) -> Result<()> {
        let interrupt = Interrupt::watch()?;
        let base = super::place::absolute(&self.dir.unwrap_or_else(std::env::temp_dir))?;
        let base =
            base.canonicalize().map_err(|error| Error::io("cannot use", &error).on(base.display().to_string()))?;
        let stage = Stage::new(&base)?;
        show(&stage, &interrupt)
    }
}

fn show(stage: &Stage, interrupt: &Interrupt) -> Result<()> {
    let teller = Teller(Instant::now());
    let deadline = teller.0 + LIMIT;
    let (old, new) = (stage.path("old/disk.img"), stage.path("new/disk.img"));

    pattern::create(&old)?;
    let allocated_before = allocated(&old)?;
    teller.say(&format!("made     {}: {}, {}", old.display(), units::size(DISK_BYTES), allocation(allocated_before)));
    let disk_path = stage.mount(&old)?;
    teller.say(&format!("mounted  {}", disk_path.display()));

    let table = Arc::new(Table::new());
    let writers = Writers::start(&disk_path, &table)?;
    let started = Instant::now();
    wait(SCENE, &writers, interrupt)?;
    let calm = writers.longest();
    teller.say(&format!("guest    writes without pause: {} a second", per_second(writers.writes(), started.elapsed())));

    let mut mount = Mount::open(&disk_path)?;
    let disk = mount.disk()?;
    let mirroring = Instant::now();
    let target = new.display().to_string();
    mount.client.execute("livemirror-mirror", json!({ "device": disk.device, "target": target }))?;
    teller.say(&format!("mirror   to {target}"));
    let disk = mount.disk()?;
    let mut progress = Progress::new();
    if follow::until_ready(&mut mount, &disk, interrupt, &mut progress, Some(deadline))? == Waited::Interrupted {
        return Err(interrupted());
    }
    progress.end();
    let took = mirroring.elapsed();
    let copied = mount.disk()?.status.mirror.map_or(0, |job| job.copied_bytes);
    teller.say(&format!(
        "ready    {} copied in {:.2} s, {}; longest write meanwhile {}",
        units::size(copied),
        took.as_secs_f64(),
        units::rate(per_second(copied, took)),
        milliseconds(writers.longest())
    ));

    wait(SCENE / 2, &writers, interrupt)?;
    writers.longest();
    let left = deadline.saturating_duration_since(Instant::now());
    let reports = cut_over(&mut mount, std::slice::from_ref(&disk), Duration::from_millis(50), Some(left), interrupt)?;
    drop(mount);
    let pause_ms = reports.first().map_or(0.0, |report| report.pause_ms);
    let stall = writers.longest();
    teller.say(&format!(
        "cutover  under that load: the barrier held for {pause_ms:.2} ms, longest write {}",
        milliseconds(stall)
    ));

    wait(SCENE, &writers, interrupt)?;
    let (writes, ran) = (writers.writes(), started.elapsed());
    let after = writers.longest();
    writers.stop()?;
    teller.say(&format!("guest    stopped after {writes} writes, {} a second", per_second(writes, ran)));
    stage.unmount()?;
    teller.say("unmounted");

    let found = verify(&new, &table)?;
    if found.current != SLOTS {
        return Err(Error::new(
            ErrorKind::Failed,
            format!("{} blocks of the new image are out of date and {} are wrong", found.older, found.wrong),
        )
        .on(target));
    }
    let left_behind = verify(&old, &table)?;
    teller.say(&format!("verified every block of {target}: all {} blocks hold their last write", found.current));
    output::line("");
    output::line(format_args!(
        "allocated        old image {}, new image {}",
        units::size(allocated(&old)?),
        units::size(allocated(&new)?)
    ));
    output::line(format_args!(
        "left behind      {} blocks of the old image are out of date: the guest lived on the new one",
        left_behind.older
    ));
    output::line(format_args!(
        "longest write    {} before, {} at the cutover, {} after",
        milliseconds(calm),
        milliseconds(stall),
        milliseconds(after)
    ));
    output::line(format_args!("nothing was lost"));
    Ok(())
}

/// Lets the guest write for a while.
fn wait(duration: Duration, writers: &Writers, interrupt: &Interrupt) -> Result<()> {
    let until = Instant::now() + duration;
    while Instant::now() < until {
        if interrupt.came() {
            return Err(interrupted());
        }
        if writers.have_failed() {
            return Err(Error::new(ErrorKind::Failed, "a write of the guest failed"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn interrupted() -> Error {
    Error::not_now("interrupted: everything is cleaned up")
}

fn allocated(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path);
    metadata
        .map(|metadata| metadata.blocks() * 512)
        .map_err(|error| Error::io("cannot look at", &error).on(path.display().to_string()))
}

fn allocation(bytes: u64) -> String {
    format!("{} of it allocated", units::size(bytes))
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

fn per_second(count: u64, time: Duration) -> u64 {
    let milliseconds = time.as_millis().max(1);
    u64::try_from(u128::from(count) * 1000 / milliseconds).unwrap_or(u64::MAX)
}
