//! What the intent log costs a guest, end to end below the kernel: two threads write 4 KiB at random in a hot set of 1 GiB of a 100 GiB disk
//! while it is mirrored, with the log and without, in turns. Both images are raw files in memory, the log is on the disk of the temporary
//! directory. There is no way to run a mount without the log, so this is the volume and the job themselves, without FUSE: on a mount
//! each write costs more, and the log's share is smaller. `cargo bench --bench mirror_cost`

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use livemirror::dirty::IntentLog;
use livemirror::dirty::intent::{Forget, JobId, Settings};
use livemirror::error::{Error, Result};
use livemirror::image::{Layout, OpenOptions, Role, create};
use livemirror::mirror::cutover::{Committer, Cutovers, Ending, PreparedRecord, Switch};
use livemirror::mirror::job::{Job, JobObserver};
use livemirror::mirror::types::{CancelMode, CopyMode, JobStatus, LastMirror, MirrorOptions};
use livemirror::mirror::{Setting, start};
use livemirror::volume::{ShownAttributes, Volume, VolumeOptions};

const DISK_BYTES: u64 = 100 << 30;
const HOT_BYTES: u64 = 1 << 30;
const BLOCK: usize = 4096;
const WRITERS: u64 = 2;
const MEASURED: Duration = Duration::from_secs(4);
const PAIRS: usize = 5;

/// There is no state: the job never ends in a cutover.
struct Nothing;

impl Committer for Nothing {
    fn prepare(&self, _: &[Switch], _: Ending) -> Result<Box<dyn PreparedRecord>> {
        Err(Error::not_now("no cutover here"))
    }
    fn supersede(&self, _: &[Switch]) {}
    fn settle(&self, _: &[Switch], _: bool) -> Result<()> {
        Ok(())
    }
    fn switched(&self, _: &[Switch]) {}
}

impl JobObserver for Nothing {
    fn ended(&self, _: &Job, _: &LastMirror) {}
    fn gone(&self, _: &Job) {}
}

impl Forget for Nothing {
    fn forget(&self, error: &Error) {
        panic!("the log broke: {error}");
    }
}

/// Random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % end
    }
}

fn write_for(volume: &Volume, time: Duration) -> f64 {
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for writer in 1..=WRITERS {
            let (stop, writes) = (&stop, &writes);
            scope.spawn(move || {
                let mut random = Random(writer);
                let mut count = 0;
                while !stop.load(Relaxed) {
                    let block = random.below(HOT_BYTES / BLOCK as u64);
                    volume.write(block * BLOCK as u64, &[writer as u8; BLOCK], false).expect("write");
                    count += 1;
                }
                writes.fetch_add(count, Relaxed);
            });
        }
        std::thread::sleep(time);
        stop.store(true, Relaxed);
    });
    writes.load(Relaxed) as f64 / start.elapsed().as_secs_f64()
}

/// Writes a second, and the fdatasyncs of the log for the first write in each of its regions.
fn run(memory: &Path, with_log: bool) -> (f64, u64) {
    let directory = tempfile::tempdir_in(memory).expect("a directory");
    let state = tempfile::tempdir().expect("a directory");
    let open = |name: &str, role| {
        let options = OpenOptions { writable: true, role, ..OpenOptions::default() };
        create(&directory.path().join(name), DISK_BYTES, None, &Layout::default(), &options).expect("an image")
    };
    let options = VolumeOptions {
        name: "disk".into(),
        id: "id".into(),
        read_only: false,
        growable: false,
        shown: ShownAttributes::default(),
    };
    let volume = Arc::new(Volume::new(options, open("a.img", Role::Source)));
    for at in (0..HOT_BYTES).step_by(1 << 20) {
        volume.write(at, &vec![9; 1 << 20], false).expect("write");
    }
    let log = with_log.then(|| {
        let settings = Settings::new(Duration::from_secs(60), Arc::new(Nothing));
        let path = state.path().join("intent");
        Arc::new(IntentLog::create(&path, JobId([7; 16]), DISK_BYTES, settings).expect("a log"))
    });
    let target = directory.path().join("b.img").display().to_string();
    let options = MirrorOptions { copy_mode: CopyMode::Background, ..MirrorOptions::new("bench", target) };
    let setting = Setting {
        volume: volume.clone(),
        target: open("b.img", Role::Target),
        created_target: true,
        layers: 0,
        intent: log.clone(),
        resumed: None,
        events: Arc::default(),
        cutovers: Cutovers::new(Arc::new(Nothing)),
        observer: Arc::new(Nothing),
    };
    let job = start(options, setting, |_| ()).expect("a job");
    while job.status() != JobStatus::Ready || log.as_ref().is_some_and(|log| log.marked_bytes() > 0) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let before = log.as_ref().map_or(0, |log| log.syncs());
    // The first write in each region, by guests that come together as a queue's depth does.
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                while let at @ 0..HOT_BYTES = next.fetch_add(1 << 20, Relaxed) {
                    volume.write(at, &[1; BLOCK], false).expect("write");
                }
            });
        }
    });
    let syncs = log.as_ref().map_or(0, |log| log.syncs()) - before;
    let rate = write_for(&volume, MEASURED);
    job.cancel(CancelMode::Force, true).expect("cancel");
    job.wait_ended(None);
    if let Some(log) = log {
        log.close();
    }
    (rate, syncs)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    // `cargo test --benches` runs it too, without this word.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let memory = Path::new("/dev/shm");
    let mut rates = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        // In turns, which of the two goes first too.
        let first_has_it = pair % 2 == 0;
        let both = [run(memory, first_has_it), run(memory, !first_has_it)];
        let (with, without) = if first_has_it { (both[0], both[1]) } else { (both[1], both[0]) };
        println!(
            "with the log {:.0} writes/s ({} fdatasyncs for {} first writes), without {:.0}: {:.3}",
            with.0,
            with.1,
            HOT_BYTES >> 20,
            without.0,
            with.0 / without.0
        );
        rates.0.push(with.0);
        rates.1.push(without.0);
    }
    let ratios = rates.0.iter().zip(&rates.1).map(|(with, without)| with / without).collect();
    println!("medians: {:.0} with, {:.0} without, ratio {:.3}", median(rates.0), median(rates.1), median(ratios));
}
