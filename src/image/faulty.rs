//! An image that misbehaves on demand: errors, delays, half-done writes, and gates that hold a request until a test lets it go.
//!
//! [`FaultyImage`] wraps another image and passes everything through, except where a [`Fault`] says otherwise. A fault
//! applies to one kind of operation, in a range, from its n-th occurrence on, a number of times. All faults that match a request apply, in
//! the order in which they were added, until one of them fails it.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use super::{Attributes, CopyOffer, DescriptorRole, Extent, ExtentStatus, Format, Identity, Image, Properties, Room};
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};

pub use super::gate::Gate;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is named after the method of Image that it stands for")]
pub enum Operation {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Allocate,
    Flush,
    Extent,
    Resize,
    CopyRange,
}

const OPERATIONS: usize = Operation::CopyRange as usize + 1;

/// What happens to a request that matches.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Nothing is done; the request fails with this errno. A failed [`Operation::Extent`] is an answer of `Data`.
    Fail(i32),
    /// The first `bytes` of a read or write are done, then it fails. Other operations are done whole, then fail.
    FailAfter {
        /// How much is done.
        bytes: usize,
        /// The errno.
        errno: i32,
    },
    /// The request waits this long first.
    Delay(Duration),
    /// The request waits at the gate before anything is done.
    Before(Arc<Gate>),
    /// The request is done, then waits at the gate before it returns.
    After(Arc<Gate>),
}

/// Which requests misbehave, and how.
#[derive(Clone, Debug)]
pub struct Fault {
    operation: Operation,
    range: ByteRange,
    skip: u64,
    times: u64,
    effect: Effect,
}

impl Fault {
    /// Applies to every request of that kind, anywhere, for ever.
    pub fn new(operation: Operation, effect: Effect) -> Self {
        Fault { operation, range: ByteRange::from_bounds(0, u64::MAX), skip: 0, times: u64::MAX, effect }
    }

    /// Only to requests that overlap `range`. Flush and resize have no range and match always.
    #[must_use]
    pub fn within(mut self, range: ByteRange) -> Self {
        self.range = range;
        self
    }

    /// Not to the first `count` that match.
    #[must_use]
    pub fn after(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }

    /// To `count` requests at most.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.times = count;
        self
    }

    fn matches(&mut self, operation: Operation, range: Option<ByteRange>) -> bool {
        if self.operation != operation || range.is_some_and(|range| !range.overlaps(self.range)) || self.times == 0 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times -= 1;
        true
    }
}

/// See the module.
#[derive(Debug)]
pub struct FaultyImage {
    inner: Arc<dyn Image>,
    faults: Mutex<Vec<Fault>>,
    counts: [AtomicU64; OPERATIONS],
    given_up: AtomicU64,
    owed: Mutex<Option<Error>>,
}

/// What is left to do for a request once delays and gates are passed.
#[derive(Default)]
struct Plan {
    done_before_failing: usize,
    errno: Option<i32>,
    leave_through: Vec<Arc<Gate>>,
}

impl FaultyImage {
    /// Wraps `inner`, without any fault yet.
    pub fn new(inner: Arc<dyn Image>) -> Arc<Self> {
        Arc::new(FaultyImage {
            inner,
            faults: Mutex::new(Vec::new()),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            given_up: AtomicU64::new(0),
            owed: Mutex::new(None),
        })
    }

    /// What was written may be gone: flushes fail with `error` until a guest was told.
    pub fn lose(&self, error: Error) {
        *self.owed.lock() = Some(error);
    }

    /// Adds a fault.
    pub fn add(&self, fault: Fault) {
        self.faults.lock().push(fault);
    }

    /// Removes all faults. Requests that wait at a gate go on waiting.
    pub fn clear(&self) {
        self.faults.lock().clear();
    }

    /// How many requests of that kind were made, failed ones included.
    pub fn count(&self, operation: Operation) -> u64 {
        self.counts[operation as usize].load(Ordering::Relaxed)
    }

    /// How many times [`Image::give_up`] was called.
    pub fn given_up(&self) -> u64 {
        self.given_up.load(Ordering::Relaxed)
    }

    fn plan(&self, operation: Operation, range: Option<ByteRange>) -> Plan {
        self.counts[operation as usize].fetch_add(1, Ordering::Relaxed);
        let mut matching = Vec::new();
        for fault in self.faults.lock().iter_mut() {
            if fault.matches(operation, range) {
                let fails = matches!(fault.effect, Effect::Fail(_) | Effect::FailAfter { .. });
                matching.push(fault.effect.clone());
                if fails {
                    break;
                }
            }
        }
        let mut plan = Plan::default();
        for effect in matching {
            match effect {
                Effect::Delay(time) => std::thread::sleep(time),
                Effect::Before(gate) => gate.pass(),
                Effect::After(gate) => plan.leave_through.push(gate),
                Effect::Fail(errno) => plan.errno = Some(errno),
                Effect::FailAfter { bytes, errno } => {
                    plan.done_before_failing = bytes;
                    plan.errno = Some(errno);
                }
            }
        }
        plan
    }

    /// Does `whole`, or, if it is to fail, `part` with the number of bytes to do before.
    fn run<T>(
        &self,
        operation: Operation,
        range: Option<ByteRange>,
        part: impl FnOnce(usize),
        whole: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let plan = self.plan(operation, range);
        let result = match plan.errno {
            None => whole(),
            Some(errno) => {
                if plan.done_before_failing > 0 {
                    part(plan.done_before_failing);
                }
                let what = format!("cannot do (injected) {operation:?} on");
                let error = Error::io(what, &std::io::Error::from_raw_os_error(errno)).on(self.name());
                Err(range.map_or(error.clone(), |range| error.at(range)))
            }
        };
        for gate in plan.leave_through {
            gate.pass();
        }
        result
    }
}

impl Image for FaultyImage {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn format(&self) -> Format {
        self.inner.format()
    }

    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn properties(&self) -> Properties {
        self.inner.properties()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let plan = self.plan(Operation::Read, Some(range));
        let result = match plan.errno {
            None => self.inner.read_at(offset, buffer),
            Some(errno) => {
                let bytes = plan.done_before_failing.min(buffer.len());
                let _ = self.inner.read_at(offset, &mut buffer[..bytes]);
                Err(Error::io("cannot read (injected)", &std::io::Error::from_raw_os_error(errno))
                    .on(self.name())
                    .at(range))
            }
        };
        plan.leave_through.iter().for_each(|gate| gate.pass());
        result
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        let part = |bytes: usize| drop(self.inner.write_at(offset, &data[..bytes.min(data.len())]));
        self.run(Operation::Write, Some(range), part, || self.inner.write_at(offset, data))
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let part = |_| drop(self.inner.write_zeroes(range));
        self.run(Operation::WriteZeroes, Some(range), part, || self.inner.write_zeroes(range))
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        let part = |_| drop(self.inner.discard(range));
        self.run(Operation::Discard, Some(range), part, || self.inner.discard(range))
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        let part = |_| drop(self.inner.allocate(range));
        self.run(Operation::Allocate, Some(range), part, || self.inner.allocate(range))
    }

    fn flush(&self) -> Result<()> {
        let flushed = self.run(Operation::Flush, None, |_| drop(self.inner.flush()), || self.inner.flush());
        self.owes().map_or(flushed, Err)
    }

    fn owes(&self) -> Option<Error> {
        self.owed.lock().clone()
    }

    fn told(&self) {
        *self.owed.lock() = None;
    }

    fn extent_at(&self, offset: u64) -> Extent {
        let answer =
            self.run(Operation::Extent, Some(ByteRange::new(offset, 1)), |_| (), || Ok(self.inner.extent_at(offset)));
        answer.unwrap_or_else(|_| {
            let range = ByteRange::from_bounds(offset, self.size_bytes());
            Extent { range, status: ExtentStatus::Data }
        })
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        let part = |_| drop(self.inner.resize(size_bytes));
        self.run(Operation::Resize, None, part, || self.inner.resize(size_bytes))
    }

    fn attributes(&self) -> Result<Attributes> {
        self.inner.attributes()
    }

    fn room(&self) -> Result<Room> {
        self.inner.room()
    }

    fn identity(&self) -> Result<Identity> {
        self.inner.identity()
    }

    fn copy_range_from(&self, source: &dyn Image, range: ByteRange) -> Result<CopyOffer> {
        let part = |_| drop(self.inner.copy_range_from(source, range));
        self.run(Operation::CopyRange, Some(range), part, || self.inner.copy_range_from(source, range))
    }

    fn give_up(&self) {
        self.given_up.fetch_add(1, Ordering::Relaxed);
        self.inner.give_up();
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.inner.backing()
    }

    fn shows_beneath(&self, layers: u32, range: ByteRange) -> ByteRange {
        self.inner.shows_beneath(layers, range)
    }

    fn settle(&self) -> Result<()> {
        self.inner.settle()
    }

    fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        self.inner.descriptors()
    }

    fn path(&self) -> Option<PathBuf> {
        self.inner.path()
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryImage;
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn faults_are_bounded_by_range_skip_and_count() {
        let memory = MemoryImage::new("m", 8192);
        let image = FaultyImage::new(memory.clone());
        let fault = Fault::new(Operation::Write, Effect::FailAfter { bytes: 3, errno: libc::ENOSPC });
        image.add(fault.within(ByteRange::new(4096, 1)).after(1).times(1));
        image.write_at(0, &[1; 8]).unwrap();
        image.write_at(4096, &[1; 8]).unwrap();
        assert_eq!(image.write_at(4096, &[2; 8]).unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(memory.bytes()[4096..4104], [2, 2, 2, 1, 1, 1, 1, 1]);
        image.write_at(4096, &[3; 8]).unwrap();
        assert_eq!(image.count(Operation::Write), 4);
    }

    #[test]
    fn a_gate_holds_a_request_that_is_done_until_it_opens() {
        let memory = MemoryImage::new("m", 4096);
        let image = FaultyImage::new(memory.clone());
        let gate = Gate::new();
        image.add(Fault::new(Operation::Write, Effect::After(gate.clone())));
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| image.write_at(0, &[9]));
            gate.wait_for_arrivals(1);
            assert_eq!(memory.bytes()[0], 9);
            assert!(!writer.is_finished());
            gate.open();
            writer.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_failed_look_at_the_extents_is_data() {
        let image = FaultyImage::new(MemoryImage::new("m", 4096));
        image.add(Fault::new(Operation::Extent, Effect::Fail(libc::EIO)).times(1));
        assert_eq!(image.extent_at(0).status, ExtentStatus::Data);
        assert_eq!(image.extent_at(0).status, ExtentStatus::Hole);
    }
}
