//! One connection to an NBD server: a libnbd handle and the one thread that uses it.
//!
//! ```text
//! callers ──Call──> queue ──> thread: start, poll, notify ──> answers
//!                                │ the connection ends (by the server, by close, by cut)
//!                                └─> half-close ─> read its end ─> what is unanswered is Ended ─> on_end
//! ```
//!
//! The thread gives no request up: who waits gives up waiting. A silent connection is never replaced by another one while its server may
//! still work on what it was sent; it ends when its server says so, or dies.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::call::{Answer, Call, Reply};
use super::ends::{Ended, OpenEnd, User};
use crate::error::Error;
use crate::sync::{Arc, Instant, Mutex};
use crate::sys::libnbd::{Finished, Handle, Library, Outcome, Refusal};

/// Where the server tells nothing else (the protocol's advice to clients).
const BLOCK_BYTES_MIN: u64 = 512;
/// The largest request, if the server allows it.
const REQUEST_BYTES_MAX: u64 = 8 << 20;

/// What a server says of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) size_bytes: u64,
    /// Requests are multiples of this.
    pub(super) block_bytes: u64,
    /// Reads and writes are no larger; a multiple of the block.
    pub(super) request_bytes_max: u64,
    pub(super) read_only: bool,
    pub(super) can_flush: bool,
    pub(super) can_fua: bool,
    pub(super) can_zero: bool,
    pub(super) can_trim: bool,
    pub(super) can_status: bool,
    pub(super) multi_conn: bool,
}

impl Export {
    fn of(handle: &Handle) -> Result<Self, Refusal> {
        let (least, most) = handle.block_sizes();
        let block_bytes = least.filter(|size| size.is_power_of_two()).unwrap_or(BLOCK_BYTES_MIN);
        let most = most.unwrap_or(REQUEST_BYTES_MAX).min(REQUEST_BYTES_MAX);
        Ok(Export {
            size_bytes: handle.size_bytes()?,
            block_bytes,
            request_bytes_max: (most - most % block_bytes).max(block_bytes),
            read_only: handle.is_read_only(),
            can_flush: handle.can_flush(),
            can_fua: handle.can_fua(),
            can_zero: handle.can_zero(),
            can_trim: handle.can_trim(),
            can_status: handle.can_status(),
            multi_conn: handle.can_multi_conn(),
        })
    }

    /// Every write is durable when it is answered: the server has no flush, but this.
    pub(super) fn writes_through(&self) -> bool {
        !self.can_flush && self.can_fua
    }

    /// Changes are kept until a flush has proven them durable.
    pub(super) fn keeps(&self) -> bool {
        self.can_flush
    }
}

/// How a connection ended.
#[derive(Debug)]
pub(super) struct End {
    /// In the words of libnbd, or ours.
    pub(super) reason: String,
    /// Changes were under way, and nobody knows what the server may still do with them.
    pub(super) unknown: bool,
    /// The connection, parked until whoever comes next has all that it may have lost. `None`: its end was not read.
    pub(super) ended: Option<Ended>,
}

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum NoConnection {
    /// It may come yet.
    Yet(String),
    /// There must be none.
    Refused(Error),
}

impl From<String> for NoConnection {
    fn from(reason: String) -> Self {
        NoConnection::Yet(reason)
    }
}

impl std::fmt::Display for NoConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NoConnection::Yet(reason) => f.write_str(reason),
            NoConnection::Refused(error) => error.fmt(f),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) export: Export,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    wake: UnixStream,
}

#[derive(Debug, Default)]
struct Queue {
    calls: VecDeque<Arc<Call>>,
    wish: Wish,
    /// How many were given and are not answered.
    load: usize,
    ended: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Wish {
    #[default]
    Serve,
    /// End after what is under way.
    Close,
    /// End now.
    Cut,
}

impl Connection {
    /// Connects `user` to `uri` until `deadline`. `on_end` hears of the end, once, on the connection's thread.
    ///
    /// # Errors
    /// There is no connection; another image has this export.
    pub(super) fn open(
        library: &'static Library,
        uri: &str,
        user: User,
        deadline: Instant,
        on_end: impl FnOnce(End) + Send + 'static,
    ) -> Result<Self, NoConnection> {
        let (sender, finished) = channel();
        let mut handle = Handle::new(library, sender).map_err(|refusal| refusal.text)?;
        let words = CString::new(uri).map_err(|error| error.to_string())?;
        handle.connect(&words).map_err(|refusal| refusal.text)?;
        let mut reason = None;
        while !handle.is_ready() {
            if handle.has_ended() {
                return Err(reason.unwrap_or_else(|| "the server closed the connection".to_owned()).into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("the server does not answer".to_owned().into());
            }
            // Each address of a host has a socket of its own.
            let socket = handle.socket().map_err(|error| error.to_string())?;
            step(&mut handle, socket.as_fd(), None, Some(left), &mut |_, refusal| {
                if let Some(refusal) = refusal {
                    reason.get_or_insert(refusal.text);
                }
            });
        }
        let export = Export::of(&handle).map_err(|refusal| refusal.text)?;
        let socket = handle.socket().map_err(|error| error.to_string())?;
        let (wake, woken) = UnixStream::pair().map_err(|error| error.to_string())?;
        for end in [&wake, &woken] {
            end.set_nonblocking(true).map_err(|error| error.to_string())?;
        }
        let shared = Arc::new(Shared { queue: Mutex::default(), wake });
        let end = OpenEnd::new(uri, socket, user).map_err(NoConnection::Refused)?;
        let driver = Driver { handle, end, finished, woken, shared: shared.clone(), running: BTreeMap::new(), next: 0 };
        let spawned = std::thread::Builder::new().name("nbd".into()).spawn(move || driver.run(on_end));
        spawned.map_err(|error| error.to_string())?;
        Ok(Connection { export, shared })
    }

    /// Hands `call` to the server.
    pub(super) fn submit(&self, call: Arc<Call>) {
        let mut queue = self.shared.queue.lock();
        if queue.ended {
            drop(queue);
            return call.answer(Answer::Ended);
        }
        queue.load += 1;
        queue.calls.push_back(call);
        drop(queue);
        self.shared.wake_up();
    }

    /// How many requests it has to do.
    pub(super) fn load(&self) -> usize {
        self.shared.queue.lock().load
    }

    /// Ends it after what is under way.
    pub(super) fn close(&self) {
        self.end(Wish::Close);
    }

    /// Ends it now: what is under way may or may not have been done when its end is read.
    pub(super) fn cut(&self) {
        self.end(Wish::Cut);
    }

    fn end(&self, wish: Wish) {
        let mut queue = self.shared.queue.lock();
        if queue.wish != Wish::Cut {
            queue.wish = wish;
        }
        drop(queue);
        self.shared.wake_up();
    }
}

impl Shared {
    fn wake_up(&self) {
        // A full pipe wakes as well.
        let _ = (&self.wake).write(&[0]);
    }
}

/// Waits for what the handle waits for, up to `limit` (`None`: as long as it takes), and lets it go on. `hear` is told what the kernel says
/// of the socket before the library can read an error off it, and then what the library refuses.
fn step(
    handle: &mut Handle,
    socket: BorrowedFd<'_>,
    woken: Option<&UnixStream>,
    limit: Option<Duration>,
    hear: &mut dyn FnMut(PollFlags, Option<Refusal>),
) {
    let (read, write) = handle.direction();
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::POLLIN, read);
    wanted.set(PollFlags::POLLOUT, write);
    let mut polled = vec![PollFd::new(socket, wanted)];
    polled.extend(woken.map(|woken| PollFd::new(woken.as_fd(), PollFlags::POLLIN)));
    let limit = limit.map_or(PollTimeout::NONE, |limit| {
        PollTimeout::try_from(limit.min(Duration::from_secs(60)) + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    });
    let _ = poll(&mut polled, limit);
    let events = polled[0].revents().unwrap_or(PollFlags::empty());
    if polled.get(1).and_then(PollFd::any).unwrap_or(false) {
        let mut drained = [0; 64];
        while woken.is_some_and(|mut woken| woken.read(&mut drained).is_ok_and(|len| len == drained.len())) {}
    }
    hear(events, None);
    let trouble = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    let result = if read && events.intersects(PollFlags::POLLIN | trouble) {
        handle.notify_read()
    } else if events.intersects(PollFlags::POLLOUT | trouble) {
        handle.notify_write()
    } else {
        Ok(())
    };
    if let Err(refusal) = result {
        hear(PollFlags::empty(), Some(refusal));
    }
}

/// What the thread has heard of its connection's end.
#[derive(Default)]
struct Heard {
    /// In the words of libnbd, or ours.
    reason: Option<String>,
    /// The kernel's error number.
    fault: Option<Errno>,
}

impl Heard {
    fn note(&mut self, end: &OpenEnd, events: PollFlags, refusal: Option<Refusal>) {
        // It says so once: to us, or to the library in the moment after poll(2).
        if events.contains(PollFlags::POLLERR) {
            self.fault = self.fault.or_else(|| end.fault());
        }
        if let Some(Refusal { text, errno }) = refusal {
            self.fault = self.fault.or(Some(Errno::from_raw(errno)).filter(|errno| gave_up(*errno)));
            self.reason.get_or_insert(text);
        }
    }
}

/// True for what the kernel says of a connection that it ends without a word of the other end.
fn gave_up(errno: Errno) -> bool {
    use Errno::{ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH, ETIMEDOUT};
    matches!(errno, ETIMEDOUT | EHOSTUNREACH | EHOSTDOWN | ENETUNREACH | ENETDOWN | ECONNABORTED)
}

/// The thread's side.
struct Driver {
    handle: Handle,
    end: OpenEnd,
    finished: Receiver<Finished>,
    woken: UnixStream,
    shared: Arc<Shared>,
    running: BTreeMap<u64, Arc<Call>>,
    next: u64,
}

impl Driver {
    fn run(mut self, on_end: impl FnOnce(End)) {
        let mut heard = Heard::default();
        let mut said = false;
        while !self.handle.has_ended() {
            let (calls, wish) = {
                let mut queue = self.shared.queue.lock();
                // One that is about to end takes no more: who waits there gets another one.
                let calls = if queue.wish == Wish::Serve { std::mem::take(&mut queue.calls) } else { VecDeque::new() };
                (calls, queue.wish)
            };
            for call in calls {
                self.start(call, &mut heard);
            }
            match wish {
                Wish::Cut => {
                    heard.reason.get_or_insert_with(|| "it was given up".to_owned());
                    break;
                }
                Wish::Close if !said => {
                    said = true;
                    heard.reason.get_or_insert_with(|| "it was closed".to_owned());
                    if self.handle.disconnect().is_err() {
                        break;
                    }
                }
                _ => (),
            }
            self.hand_out(&mut heard);
            if !self.handle.has_ended() {
                let Driver { handle, end, woken, .. } = &mut self;
                step(handle, end.socket(), Some(woken), None, &mut |events, refusal| heard.note(end, events, refusal));
                self.hand_out(&mut heard);
            }
        }
        self.finish(heard, on_end);
    }

    fn start(&mut self, call: Arc<Call>, heard: &mut Heard) {
        let id = self.next;
        self.next += 1;
        if let Err(refusal) = self.handle.start(id, &call.command) {
            if !self.handle.has_ended() {
                // It comes out of the channel too, under a number that nobody knows.
                self.shared.queue.lock().load -= 1;
                return call.answer(Answer::Refused(refusal.text));
            }
            heard.note(&self.end, PollFlags::empty(), Some(refusal));
        }
        self.running.insert(id, call);
    }

    /// Answers what the library has finished.
    fn hand_out(&mut self, heard: &mut Heard) {
        for finished in self.finished.try_iter().collect::<Vec<_>>() {
            self.settle(finished, heard);
        }
    }

    /// An answer of the server's goes to its caller. What the end of the connection has cut off stays: it is answered when that end was read.
    fn settle(&mut self, finished: Finished, heard: &mut Heard) {
        let answer = match finished.outcome {
            Outcome::Done => Answer::Done(Reply { bytes: finished.bytes, extents: finished.extents }),
            // The library's word for the end of the connection, and the server's.
            Outcome::Failed(errno @ (libc::ENOTCONN | libc::ESHUTDOWN)) => {
                if errno == libc::ESHUTDOWN && !self.handle.has_ended() {
                    // It is about to go. What it has refused is asked again of the next one.
                    let mut queue = self.shared.queue.lock();
                    if queue.wish == Wish::Serve {
                        queue.wish = Wish::Close;
                        drop(queue);
                        heard.reason.get_or_insert_with(|| "the server is shutting down".to_owned());
                        self.shared.wake_up();
                    }
                }
                return;
            }
            Outcome::Unanswered => return,
            Outcome::Failed(errno) => Answer::Failed(errno),
        };
        if let Some(call) = self.running.remove(&finished.id) {
            self.shared.queue.lock().load -= 1;
            call.answer(answer);
        }
    }

    fn finish(self, heard: Heard, on_end: impl FnOnce(End)) {
        let Driver { handle, end, finished, shared, mut running, .. } = self;
        // Closing gives all operations back; the duplicate keeps the socket open.
        drop(handle);
        for finished in finished.try_iter() {
            let answer = match finished.outcome {
                Outcome::Done => Answer::Done(Reply { bytes: finished.bytes, extents: finished.extents }),
                Outcome::Failed(libc::ENOTCONN | libc::ESHUTDOWN) | Outcome::Unanswered => continue,
                Outcome::Failed(errno) => Answer::Failed(errno),
            };
            if let Some(call) = running.remove(&finished.id) {
                call.answer(answer);
            }
        }
        let read = end.read(heard.fault);
        let unknown = read.is_err() && running.values().any(|call| call.changes());
        // Where nothing was under way nothing can land late, whatever became of the connection.
        let ended = (!unknown).then(|| end.forget());
        let answer = if unknown { Answer::Lost } else { Answer::Ended };
        let waiting = {
            let mut queue = shared.queue.lock();
            queue.ended = true;
            std::mem::take(&mut queue.calls)
        };
        let reason = heard.reason.unwrap_or_else(|| "the server closed the connection".to_owned());
        let reason = match read {
            Ok(_) => reason,
            Err(error) => format!("{reason}, and its end cannot be read ({error})"),
        };
        on_end(End { reason, unknown, ended });
        for call in running.into_values() {
            call.answer(answer.clone());
            if unknown {
                // Its range stays held for as long as this process lives.
                std::mem::forget(call);
            }
        }
        for call in waiting {
            call.answer(Answer::Ended);
        }
    }
}
