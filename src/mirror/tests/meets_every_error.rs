//! Every error, at every operation, of either image, under every policy, in both copy modes: what the guest sees of it (nothing of the
//! target's, its own of the source's), what the job does, what is said, and that both images are equal once the cause is gone.

use std::time::Instant;

use super::super::types::{
    CopyMode, ErrorAction, ErrorPolicy, IoStatus, MirrorOptions, MirrorResult, Operation as Side,
};
use super::*;
use crate::image::faulty::{Effect, Fault, FaultyImage, Gate, Operation};
use crate::image::memory::MemoryOptions;
use crate::range::ByteRange;

const ERRNOS: [i32; 6] = [libc::EIO, libc::ENOSPC, libc::EROFS, libc::ENXIO, libc::ENODEV, libc::ETIMEDOUT];
const POLICIES: [ErrorPolicy; 4] = [ErrorPolicy::Report, ErrorPolicy::Ignore, ErrorPolicy::Stop, ErrorPolicy::Enospc];
/// What a mirror asks of its target.
const CHANGES: [Operation; 4] = [Operation::Write, Operation::WriteZeroes, Operation::Discard, Operation::Flush];
const SIZE: u64 = 1 << 20;
/// Events under `ignore` are at least so far apart.
const EVENT_EVERY_MS: u128 = 500;

/// Two images of different content, a volume on one, a job to the other.
struct Pair {
    world: World,
    volume: Arc<Volume>,
    source: Arc<FaultyImage>,
    target: Arc<FaultyImage>,
}

impl Pair {
    /// The source has data, a hole, data; the target is full of old data. `can_discard`: the target.
    fn new(can_discard: bool) -> Pair {
        let source = MemoryImage::new("source", SIZE);
        source.write_at(0, &vec![5; SIZE as usize / 2]).unwrap();
        source.write_at(SIZE / 4 * 3, &vec![6; SIZE as usize / 4]).unwrap();
        let options = MemoryOptions { can_discard, ..MemoryOptions::default() };
        let target = MemoryImage::with_options("target", SIZE, options);
        target.write_at(0, &vec![9; SIZE as usize]).unwrap();
        let (source, target) = (FaultyImage::new(source), FaultyImage::new(target));
        Pair { world: World::new(), volume: volume("disk", source.clone()), source, target }
    }

    fn start(&self, policy: ErrorPolicy, copy_mode: CopyMode) -> Arc<Job> {
        let options = MirrorOptions {
            on_source_error: policy,
            on_target_error: policy,
            copy_mode,
            ..MirrorOptions::new("j", "target")
        };
        self.world.mirror_onto(&self.volume, self.target.clone(), false, options)
    }

    /// One request of a guest, which changes what it has not changed before, or flushes.
    fn guest(&self, operation: Operation) -> Result<()> {
        let range = ByteRange::new(SIZE / 4, 8192);
        match operation {
            Operation::Write => self.volume.write(range.start(), &[7; 8192], false).map(drop),
            Operation::WriteZeroes => self.volume.zero_range(range, true),
            Operation::Discard => self.volume.punch_hole(range),
            Operation::Flush => self.volume.flush(),
            Operation::Allocate => self.volume.allocate(range, true),
            Operation::Read => self.volume.read(range.start(), &mut [0; 8192]).map(drop),
            other => panic!("no guest asks for {other:?}"),
        }
    }

    /// Nothing that the target does fails any request of a guest.
    fn guest_goes_on(&self) {
        for operation in CHANGES.into_iter().chain([Operation::Read]) {
            self.guest(operation).unwrap();
        }
    }

    fn errors(&self) -> Vec<(Side, ErrorAction)> {
        let heard = self.world.heard.lock();
        let errors = heard.iter().filter_map(|event| match event {
            JobEvent::Error { operation, action, .. } => Some((*operation, *action)),
            _ => None,
        });
        errors.collect()
    }

    /// The job gets on by itself from here: both images become equal, and the target the disk.
    fn converges(&self, job: &Arc<Job>, case: &str) {
        wait_for(&format!("ready again, {case}"), || job.status() == JobStatus::Ready && job.info().in_sync);
        assert_eq!(job.info().io_status, IoStatus::Ok, "{case}");
        self.world.cut_over(std::slice::from_ref(job));
        assert_eq!(self.volume.active().name(), "target", "{case}");
        assert!(read_all(&*self.source) == read_all(&*self.target), "the images differ: {case}");
    }
}

/// QEMU's table.
fn action_of(policy: ErrorPolicy, errno: i32) -> ErrorAction {
    match policy {
        ErrorPolicy::Ignore => ErrorAction::Ignore,
        ErrorPolicy::Stop => ErrorAction::Stop,
        ErrorPolicy::Enospc if errno == libc::ENOSPC => ErrorAction::Stop,
        ErrorPolicy::Report | ErrorPolicy::Enospc => ErrorAction::Report,
    }
}

fn assert_named(said: Option<String>, image: &str, operation: Operation, errno: i32, case: &str) {
    let said = said.unwrap_or_else(|| panic!("no error: {case}"));
    let why = std::io::Error::from_raw_os_error(errno).to_string();
    let why = why.split(" (os error").next().unwrap();
    assert!(said.contains(image) && said.contains(why), "{said:?} does not name {image} and {why:?}: {case}");
    assert!(said.contains("offset") || operation == Operation::Flush, "{said:?} names no place: {case}");
}

/// The job has met `errno` at `operation` of `image`, which does not work yet.
fn job_follows_its_policy(
    pair: &Pair,
    job: &Arc<Job>,
    image: &Arc<FaultyImage>,
    (operation, errno, policy): (Operation, i32, ErrorPolicy),
    case: &str,
) {
    let side = if image.name() == "source" { Side::Read } else { Side::Write };
    let action = action_of(policy, errno);
    // What the source does to the guest is not the job's affair.
    let goes_on = || {
        if side == Side::Write {
            pair.guest_goes_on();
        }
    };
    let started = Instant::now();
    wait_for(&format!("an event, {case}"), || !pair.errors().is_empty());
    assert_eq!(pair.errors()[0], (side, action), "{case}");
    match action {
        ErrorAction::Report => {
            assert!(job.wait_ended(None));
            let outcome = job.outcome().unwrap();
            assert_eq!((outcome.result, outcome.consistent), (MirrorResult::Failed, false), "{case}");
            assert_named(outcome.error, image.name(), operation, errno, case);
            assert!(pair.volume.tracking().is_none(), "{case}");
            assert_eq!(pair.volume.active().name(), "source", "{case}");
            goes_on();
            assert_eq!(pair.errors().len(), 1, "{case}");
        }
        ErrorAction::Stop => {
            let paused = || matches!(job.status(), JobStatus::Paused | JobStatus::Standby);
            wait_for(&format!("a pause, {case}"), paused);
            let info = job.info();
            let status = if errno == libc::ENOSPC { IoStatus::Nospace } else { IoStatus::Failed };
            assert_eq!(info.io_status, status, "{case}");
            assert_named(info.last_error, image.name(), operation, errno, case);
            goes_on();
            assert!(paused() && pair.errors().len() == 1, "{case}");
            image.clear();
            job.resume().unwrap();
            pair.converges(job, case);
        }
        ErrorAction::Ignore => {
            assert_named(job.info().last_error, image.name(), operation, errno, case);
            goes_on();
            let status = job.status();
            assert!(matches!(status, JobStatus::Running | JobStatus::Ready), "{status:?}: {case}");
            if errno == libc::EIO {
                // Long enough for some attempts. The slower they come, the fewer events are due.
                std::thread::sleep(Duration::from_millis(900));
            }
            let most = 1 + started.elapsed().as_millis() / EVENT_EVERY_MS + 1;
            let count = pair.errors().len();
            assert!(count as u128 <= most, "{count} events, at most {most} were due: {case}");
            image.clear();
            pair.converges(job, case);
        }
    }
}

/// Does `each` for all cases, some at a time: most wait for a back-off to end.
fn for_each<T: Send + Sync + std::fmt::Debug>(cases: Vec<T>, each: impl Fn(&T, &str) + Sync) {
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, SeqCst) as usize) {
                    each(case, &format!("{case:?}"));
                }
            });
        }
    });
}

/// All combinations of operation, errno (of a whole or, where there is such a thing, of a short request) and policy.
fn cases(operations: &[Operation]) -> Vec<(Operation, i32, bool, ErrorPolicy)> {
    let mut cases = Vec::new();
    for &operation in operations {
        for errno in ERRNOS {
            for short in [false, true] {
                cases.extend(POLICIES.map(|policy| (operation, errno, short, policy)));
            }
        }
    }
    // A flush has no middle.
    cases.retain(|(operation, _, short, _)| !short || *operation != Operation::Flush);
    cases
}

fn fault(operation: Operation, errno: i32, short: bool) -> Fault {
    let effect = if short { Effect::FailAfter { bytes: 512, errno } } else { Effect::Fail(errno) };
    Fault::new(operation, effect)
}

#[test]
fn of_the_target_while_it_is_copied() {
    for_each(cases(&CHANGES), |&(operation, errno, short, policy), case| {
        let pair = Pair::new(operation != Operation::WriteZeroes);
        pair.target.add(fault(operation, errno, short));
        let job = pair.start(policy, CopyMode::Background);
        job_follows_its_policy(&pair, &job, &pair.target, (operation, errno, policy), case);
    });
}

#[test]
fn of_the_target_while_guests_wait_for_it() {
    for_each(cases(&CHANGES), |&(operation, errno, short, policy), case| {
        let pair = Pair::new(true);
        let job = pair.start(policy, CopyMode::WriteBlocking);
        wait_for("ready", || job.status() == JobStatus::Ready);
        pair.target.add(fault(operation, errno, short));
        pair.guest(operation).unwrap();
        job_follows_its_policy(&pair, &job, &pair.target, (operation, errno, policy), case);
    });
}

#[test]
fn of_the_source_while_it_is_copied() {
    let modes = [CopyMode::Background, CopyMode::WriteBlocking];
    let all = cases(&[Operation::Read]).into_iter().flat_map(|case| modes.map(|mode| (case, mode)));
    for_each(all.collect(), |&((operation, errno, short, policy), mode), case| {
        let pair = Pair::new(true);
        pair.source.add(fault(operation, errno, short));
        let job = pair.start(policy, mode);
        job_follows_its_policy(&pair, &job, &pair.source, (operation, errno, policy), case);
    });
}

/// The errno of the guest's own request is the guest's. The job learns nothing of it, and copies what the request has left.
#[test]
fn of_the_source_under_a_guest() {
    let operations = [CHANGES.as_slice(), &[Operation::Read, Operation::Allocate]].concat();
    let modes = [CopyMode::Background, CopyMode::WriteBlocking];
    // The policy would be the job's: one is as good as another.
    let all = cases(&operations).into_iter().filter(|(.., policy)| *policy == ErrorPolicy::Report);
    let all = all.flat_map(|case| modes.map(|mode| (case, mode)));
    for_each(all.collect(), |&((operation, errno, short, policy), mode), case| {
        let pair = Pair::new(true);
        let job = pair.start(policy, mode);
        wait_for("ready", || job.status() == JobStatus::Ready);
        pair.source.add(fault(operation, errno, short).times(1));
        let error = pair.guest(operation).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}: {case}");
        assert_named(Some(error.to_string()), "source", operation, errno, case);
        pair.guest(operation).unwrap();
        assert_eq!(pair.errors(), [], "{case}");
        pair.converges(&job, case);
    });
}

/// A source that cannot tell what it holds is all data.
#[test]
fn of_the_source_where_it_is_asked_for_extents() {
    for_each(ERRNOS.to_vec(), |&errno, case| {
        let pair = Pair::new(true);
        pair.source.add(fault(Operation::Extent, errno, false));
        let job = pair.start(ErrorPolicy::Report, CopyMode::Background);
        wait_for("ready", || job.status() == JobStatus::Ready);
        pair.guest_goes_on();
        assert_eq!(pair.errors(), [], "{case}");
        pair.converges(&job, case);
    });
}

/// A target that does not answer, before or after it has done what it was asked: the guest waits as long as it was told to.
#[test]
fn of_a_target_that_hangs_under_a_guest() {
    let cases = CHANGES.into_iter().flat_map(|operation| [false, true].map(|done| (operation, done)));
    for_each(cases.collect(), |&(operation, done), case| {
        let pair = Pair::new(true);
        let options = MirrorOptions {
            copy_mode: CopyMode::WriteBlocking,
            max_guest_delay: Duration::from_millis(20),
            ..MirrorOptions::new("j", "target")
        };
        let job = pair.world.mirror_onto(&pair.volume, pair.target.clone(), false, options);
        wait_for("ready", || job.status() == JobStatus::Ready);
        let gate = Gate::new();
        let effect = if done { Effect::After(gate.clone()) } else { Effect::Before(gate.clone()) };
        pair.target.add(Fault::new(operation, effect).times(1));
        pair.guest(operation).unwrap();
        gate.wait_for_arrivals(1);
        pair.guest_goes_on();
        let info = job.info();
        assert!(info.last_error.is_some_and(|said| said.contains("kept a guest waiting")), "{case}");
        assert!(!info.in_sync || operation == Operation::Flush, "what was given up on counts as in flight: {case}");
        gate.open();
        pair.converges(&job, case);
    });
}
