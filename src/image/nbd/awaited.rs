//! An export whose server does not answer when a server of ours takes a live mount over: guests wait for it, the mount's other disks do not.
//!
//! ```text
//! a thread: ends of the last server's connections read ─> connected ─> checked ─> there ── from then on it is the export's own image
//! requests: wait for that as long as they would for a connection that was lost, then fail; later ones fail at once until it is there
//! ```

use std::time::{Duration, SystemTime};

use super::image::{self, NbdImage};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Attributes, Extent, ExtentStatus, Format, Identity, Image, Properties, Room};
use crate::range::ByteRange;
use crate::sync::{Arc, Condvar, Instant, Mutex, OnceLock, wait_until};

/// So long the start of a server waits for the servers of all its exports, which it opens one after the other.
const PROMPT: Duration = Duration::from_secs(1);
/// So long it waits for each at least.
const PROMPT_LEAST: Duration = Duration::from_millis(100);
/// When it began to wait for the first.
static FIRST_BEGUN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
/// How often a server that must come back is tried, at most. So long an attempt waits for the end of the last server's connections.
pub(super) const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// How long nobody waits for that end then. It is to be followed by a connection as soon as can be: that there is none is how a server is
/// known to have gone away.
const END_MISSED: Duration = Duration::from_millis(20);

/// Until when an export is waited for that is being opened since `begun`.
fn prompt_until(first_begun: Instant, begun: Instant) -> Instant {
    (first_begun + PROMPT).max(begun + PROMPT_LEAST)
}

/// See the module.
#[derive(Debug)]
pub(super) struct AwaitedImage {
    name: String,
    size_bytes: u64,
    writable: bool,
    since: SystemTime,
    /// Until then requests wait.
    deadline: Instant,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    image: OnceLock<Arc<NbdImage>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Why it is not there.
    why: Option<String>,
    /// How often its requests were given up.
    given_up: u64,
    closed: bool,
}

/// Opens `name`, of `size_bytes`, by as many calls of `attempt` as it takes: for a moment here, then on a thread of its own.
///
/// # Errors
/// No thread can be started.
pub(super) fn open(
    name: &str,
    size_bytes: u64,
    writable: bool,
    reconnect: Duration,
    attempt: impl Fn() -> Result<NbdImage> + Send + 'static,
) -> Result<Arc<dyn Image>> {
    let shared = Arc::new(Shared::default());
    let (tried, shown) = (shared.clone(), name.to_owned());
    let spawned = std::thread::Builder::new().name("nbd-open".into()).spawn(move || tried.run(&shown, attempt));
    spawned.map_err(|error| Error::io("cannot start a thread", &error).on(name))?;
    let begun = Instant::now();
    let until = prompt_until(*FIRST_BEGUN.get_or_init(|| begun), begun);
    let mut state = shared.state.lock();
    while shared.image.get().is_none() && wait_until(&shared.changed, &mut state, Some(until)) {}
    drop(state);
    if let Some(image) = shared.image.get() {
        return Ok(image.clone());
    }
    log::warn!("{name}: its server does not answer: guests of this disk wait for it");
    let (since, deadline) = (SystemTime::now(), begun + reconnect);
    Ok(Arc::new(AwaitedImage { name: name.to_owned(), size_bytes, writable, since, deadline, shared }))
}

impl Shared {
    fn run(&self, name: &str, attempt: impl Fn() -> Result<NbdImage>) {
        loop {
            let begun = Instant::now();
            let result = attempt();
            let mut state = self.state.lock();
            if state.closed {
                return;
            }
            match result {
                Ok(image) => {
                    log::info!("{name}: connected");
                    let _ = self.image.set(Arc::new(image));
                    self.changed.notify_all();
                    return;
                }
                Err(error) => {
                    let why = error.to_string();
                    if state.why.as_ref() != Some(&why) {
                        log::warn!("{why}");
                        state.why = Some(why);
                    }
                }
            }
            let until = (begun + AGAIN_AFTER).max(Instant::now() + END_MISSED);
            while !state.closed && wait_until(&self.changed, &mut state, Some(until)) {}
        }
    }
}

impl AwaitedImage {
    fn get(&self) -> Option<&NbdImage> {
        self.shared.image.get().map(|image| &**image)
    }

    /// The image, as soon as it is there.
    fn image(&self, what: &str, range: ByteRange) -> Result<&NbdImage> {
        let mut state = self.shared.state.lock();
        let given_up = state.given_up;
        loop {
            if let Some(image) = self.get() {
                return Ok(image);
            }
            if state.given_up != given_up || Instant::now() >= self.deadline {
                break;
            }
            wait_until(&self.shared.changed, &mut state, Some(self.deadline));
        }
        let why = state.why.as_deref().unwrap_or("it does not answer");
        let error = Error::new(ErrorKind::Failed, format!("cannot {what} (no connection to the NBD server: {why})"));
        let error = error.on(&*self.name);
        Err(if range.is_empty() { error } else { error.at(range) })
    }
}

impl Image for AwaitedImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Before it is there: what most servers can.
    fn properties(&self) -> Properties {
        let likely = Properties {
            request_alignment: 4096,
            cluster_bytes: None,
            thin_zeroing: true,
            writable: self.writable,
            resizable: false,
        };
        self.get().map_or(likely, Image::properties)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.image("read", ByteRange::new(offset, buffer.len() as u64))?.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.image("write", ByteRange::new(offset, data.len() as u64))?.write_at(offset, data)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.image("write zeroes", range)?.write_zeroes(range)
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        self.image("discard", range)?.discard(range)
    }

    fn allocate(&self, range: ByteRange) -> Result<()> {
        self.image("allocate", range)?.allocate(range)
    }

    fn flush(&self) -> Result<()> {
        self.image("flush", ByteRange::new(0, 0))?.flush()
    }

    fn owes(&self) -> Option<Error> {
        self.get().and_then(Image::owes)
    }

    fn told(&self) {
        if let Some(image) = self.get() {
            image.told();
        }
    }

    /// All data, as long as nobody can be asked.
    fn extent_at(&self, offset: u64) -> Extent {
        let whole = Extent { range: ByteRange::from_bounds(offset, self.size_bytes), status: ExtentStatus::Data };
        self.get().map_or(whole, |image| image.extent_at(offset))
    }

    fn extent_within(&self, range: ByteRange) -> Extent {
        match self.get() {
            Some(image) => image.extent_within(range),
            None => self.extent_at(range.start()),
        }
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.size_bytes)
    }

    fn resize(&self, size_bytes: u64) -> Result<()> {
        self.image("resize", ByteRange::new(0, 0))?.resize(size_bytes)
    }

    fn attributes(&self) -> Result<Attributes> {
        Ok(image::attributes(self.since))
    }

    fn room(&self) -> Result<Room> {
        Ok(image::room(self.size_bytes))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(image::identity(&self.name, self.size_bytes))
    }

    fn give_up(&self) {
        self.shared.state.lock().given_up += 1;
        self.shared.changed.notify_all();
        if let Some(image) = self.get() {
            image.give_up();
        }
    }
}

impl Drop for AwaitedImage {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn many_that_are_silent_hold_a_start_hardly_longer_than_one() {
        let first = Instant::now();
        let last = (0..20).fold(first, |begun, _| prompt_until(first, begun));
        assert!(last <= first + PROMPT + 20 * PROMPT_LEAST);
        assert_eq!(prompt_until(first, first), first + PROMPT, "one alone is waited for as long as ever");
    }
}
