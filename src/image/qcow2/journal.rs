//! For tests: what was done to the file, in order, so that a part of it can be taken away, as a power cut does; and a place to stop a
//! read at, and syncs and writes of metadata that fail.

use std::cell::{Cell, RefCell};

use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

/// A change of the file, or the point up to which all changes are durable.
#[derive(Clone, Debug)]
pub(in crate::image) enum Event {
    Write { offset: u64, bytes: Vec<u8> },
    Zero(ByteRange),
    Len(u64),
    Synced,
}

thread_local! {
    static EVENTS: RefCell<Option<Vec<Event>>> = const { RefCell::new(None) };
}

thread_local! {
    static BEFORE_READING: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// What this thread does once, when it knows where in the file its next read will be.
pub(in crate::image) fn before_reading(then: impl FnOnce() + 'static) {
    BEFORE_READING.with(|place| *place.borrow_mut() = Some(Box::new(then)));
}

pub(super) fn reads_now() {
    if let Some(then) = BEFORE_READING.with(|place| place.borrow_mut().take()) {
        then();
    }
}

/// Begins to note what this thread does.
pub(in crate::image) fn start() {
    EVENTS.with(|events| *events.borrow_mut() = Some(Vec::new()));
}

/// How much was noted so far.
pub(in crate::image) fn len() -> usize {
    EVENTS.with(|events| events.borrow().as_ref().map_or(0, Vec::len))
}

/// All that was noted so far.
pub(in crate::image) fn so_far() -> Vec<Event> {
    EVENTS.with(|events| events.borrow().clone()).unwrap_or_default()
}

/// Ends it.
pub(in crate::image) fn take() -> Vec<Event> {
    EVENTS.with(|events| events.borrow_mut().take()).unwrap_or_default()
}

pub(super) fn note(event: impl FnOnce() -> Event) {
    EVENTS.with(|events| {
        if let Some(events) = &mut *events.borrow_mut() {
            events.push(event());
        }
    });
}

thread_local! {
    static SYNC_FAILS: Cell<Option<usize>> = const { Cell::new(None) };
    static WRITE_FAILS: Cell<Option<(usize, i32)>> = const { Cell::new(None) };
}

/// The next sync that this thread runs fails.
pub(in crate::image) fn fail_next_sync() {
    fail_sync(0);
}

/// The sync that this thread runs after `before` other ones fails.
pub(in crate::image) fn fail_sync(before: usize) {
    SYNC_FAILS.set(Some(before));
}

pub(super) fn sync_fails() -> Result<()> {
    let Some(before) = SYNC_FAILS.get() else { return Ok(()) };
    SYNC_FAILS.set(before.checked_sub(1));
    if before == 0 { Err(Error::new(ErrorKind::Failed, "a sync fails")) } else { Ok(()) }
}

/// The next write of metadata by this thread that is `len` bytes long fails with `errno`.
pub(in crate::image) fn fail_next_write(len: usize, errno: i32) {
    WRITE_FAILS.set(Some((len, errno)));
}

pub(super) fn write_fails(len: usize) -> Option<i32> {
    let (_, errno) = WRITE_FAILS.get().filter(|(wanted, _)| *wanted == len)?;
    WRITE_FAILS.set(None);
    Some(errno)
}
