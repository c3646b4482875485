//! The way to an export: its connections, made anew when they are lost.
//!
//! ```text
//!             up ──── a connection ends ────> down ──── all ends read ────> connecting, later and later
//!              ^                                                               │
//!              └────── what was kept is sent again, in its order <── connected ┘
//! ```
//!
//! - A request waits for its answer [`Patience::answer`], and while there is no connection [`Patience::reconnect`]: then it fails, and the
//!   guest or the mirror hears of it. Nothing waits for ever. Connecting goes on all the same.
//! - One connection that ends takes the others with it: the server may have died, and only one that has everything that was kept
//!   may be read. Nobody reads or writes between.
//! - No connection is made before the ends of all before it were read (rule 14). If the kernel gave one up on which changes were under
//!   way, that can never be: the link stays **broken**, and every request fails, until the disk is mounted again.

mod mend;

use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use super::call::{Answer, Call, Reply};
use super::change::{Carrier, Change, Trouble, carry_out};
use super::connection::{Connection, End, Export, NoConnection};
use super::ends::{Ended, User};
use super::kept::Kept;
use super::left_behind::LeftBehind;
use super::ranges::{Held, Ranges};
use crate::sync::{Arc, Condvar, Instant, Mutex, wait_until};
use crate::sys::libnbd::{Command, Library};

/// Connections where the server allows several.
const CONNECTIONS: usize = 4;
/// The first wait between two attempts to connect; doubles up to [`BACK_OFF_MAX`].
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
const BACK_OFF_MAX: Duration = Duration::from_secs(2);
/// How often a waiting request looks whether it was given up, or the link is broken.
pub(super) const GIVE_UP_POLL: Duration = Duration::from_millis(200);

/// How long a server is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// While there is no connection. 0: not at all.
    pub(super) reconnect: Duration,
    /// For the answer to one request.
    pub(super) answer: Duration,
    /// For the answer to a flush, which may have much to write.
    pub(super) flush: Duration,
    /// For a connection.
    pub(super) connect: Duration,
}

impl Patience {
    /// What follows from `--reconnect`.
    pub(super) fn new(reconnect: Duration) -> Self {
        let answer = reconnect.max(Duration::from_secs(60));
        Patience { reconnect, answer, flush: answer * 5, connect: Duration::from_secs(10) }
    }
}

/// See the module.
pub(super) struct Link {
    uri: String,
    user: User,
    library: &'static Library,
    patience: Patience,
    writable: bool,
    /// Held for the first connections, so that later ones can be told from others: what the server must still offer.
    first: Export,
    state: Mutex<State>,
    changed: Condvar,
    kept: Kept,
    pub(super) left_behind: LeftBehind,
    pub(super) ranges: Arc<Ranges>,
    given_up: AtomicU64,
}

struct State {
    phase: Phase,
    connections: Vec<Arc<Connection>>,
    /// Of the connections of this generation, so many were made and so many have ended.
    made: usize,
    ended: usize,
    generation: u64,
    export: Export,
    /// How long servers that had come back were busy with what was sent again: no request's time runs then.
    busy: Duration,
    /// One that was lost, until the next ones have what it may have lost.
    lost: Option<Ended>,
}

enum Phase {
    Up,
    Down {
        since: Instant,
        /// The last sign of life, and so many answers to what was sent again: only more than ever before count as one.
        alive: Instant,
        answers: u64,
        reason: String,
    },
    /// For good.
    Broken(String),
    Closed,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Link {
    /// Connects `user` for the first time. `unproven`: a server of ours may have left changes there that nobody has flushed.
    ///
    /// # Errors
    /// There is no connection; another image has this export.
    pub(super) fn open(
        library: &'static Library,
        uri: &str,
        user: User,
        patience: Patience,
        writable: bool,
        unproven: bool,
    ) -> Result<Arc<Self>, NoConnection> {
        // The first connection says what there is. Should it end before the link is there, that is noticed then.
        let slot: Arc<Mutex<(Weak<Link>, Option<End>)>> = Arc::default();
        let deadline = Instant::now() + patience.connect;
        let early = slot.clone();
        let on_end = move |end| {
            let mut slot = early.lock();
            match slot.0.upgrade() {
                Some(link) => link.note_end(0, end),
                None => slot.1 = Some(end),
            }
        };
        let first = Connection::open(library, uri, user, deadline, on_end)?;
        let export = first.export.clone();
        let export_keeps = export.keeps();
        let link = Arc::new(Link {
            uri: uri.to_owned(),
            user,
            library,
            patience,
            writable,
            first: export.clone(),
            state: Mutex::new(State {
                phase: Phase::Up,
                connections: vec![Arc::new(first)],
                made: 1,
                ended: 0,
                generation: 0,
                export,
                busy: Duration::ZERO,
                lost: None,
            }),
            changed: Condvar::new(),
            kept: Kept::default(),
            left_behind: LeftBehind::new(uri, unproven && export_keeps),
            ranges: Arc::default(),
            given_up: AtomicU64::new(0),
        });
        {
            let mut slot = slot.lock();
            slot.0 = Arc::downgrade(&link);
            if let Some(end) = slot.1.take() {
                link.note_end(0, end);
            }
        }
        let failed = |error: std::io::Error| error.to_string();
        link.add_connections(0);
        let mender = link.clone();
        let spawned = std::thread::Builder::new().name("nbd-link".into()).spawn(move || mender.mend());
        spawned.map_err(failed)?;
        Ok(link)
    }

    /// What the server says of the export now.
    pub(super) fn export(&self) -> Export {
        self.state.lock().export.clone()
    }

    fn connect(self: &Arc<Self>, generation: u64) -> Result<Arc<Connection>, NoConnection> {
        let link = Arc::downgrade(self);
        let deadline = Instant::now() + self.patience.connect;
        let on_end = move |end| {
            if let Some(link) = link.upgrade() {
                link.note_end(generation, end);
            }
        };
        let connection = Connection::open(self.library, &self.uri, self.user, deadline, on_end)?;
        self.state.lock().made += 1;
        Ok(Arc::new(connection))
    }

    /// Makes the other connections, where the server allows several. Fewer will do.
    fn add_connections(self: &Arc<Self>, generation: u64) {
        let several = self.state.lock().export.multi_conn;
        for _ in 1..if several { CONNECTIONS } else { 1 } {
            match self.connect(generation) {
                Ok(connection) => self.state.lock().connections.push(connection),
                Err(reason) => {
                    log::debug!("{}: no further connection: {reason}", self.uri);
                    break;
                }
            }
        }
    }

    fn note_end(&self, generation: u64, mut end: End) {
        let mut state = self.state.lock();
        debug_assert_eq!(state.generation, generation, "a connection outlived its generation");
        state.ended += 1;
        match &state.phase {
            Phase::Closed | Phase::Broken(_) => (),
            _ if end.unknown => {
                log::error!(
                    "{}: the connection is lost: {}; what was under way may still be done",
                    self.uri,
                    end.reason
                );
                let advice =
                    "what was under way may still be done there: restart that server, then mount the disk again";
                state.phase = Phase::Broken(format!("{}; {advice}", end.reason));
            }
            Phase::Up => {
                log::warn!("{}: the connection is lost: {}", self.uri, end.reason);
                state.lost = self.left_behind.connection_ended(&end.reason, end.ended.take());
                let since = Instant::now();
                state.phase = Phase::Down { since, alive: since, answers: 0, reason: end.reason };
            }
            Phase::Down { .. } => (),
        }
        self.changed.notify_all();
    }

    /// Why there will never be a connection again.
    pub(super) fn broken(&self) -> Option<String> {
        match &self.state.lock().phase {
            Phase::Broken(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    /// How long servers that had come back were busy with what was sent again.
    pub(super) fn busy(&self) -> Duration {
        self.state.lock().busy
    }

    /// The least busy connection.
    fn connection(&self, time: &Time) -> Result<Arc<Connection>, Trouble> {
        let mut state = self.state.lock();
        loop {
            // Nothing of it is under way here: it was not sent yet, or the end of what it was sent over was read.
            if self.given_up.load(SeqCst) != time.epoch {
                return Err(Trouble::GivenUp);
            }
            match &state.phase {
                Phase::Up => {
                    let best = state.connections.iter().min_by_key(|connection| connection.load());
                    return best.cloned().ok_or_else(|| Trouble::Lost("there is none".to_owned()));
                }
                Phase::Down { alive, reason, .. } => {
                    let until = time.end(state.busy).min(*alive + self.patience.reconnect);
                    if Instant::now() >= until {
                        return Err(Trouble::Lost(reason.clone()));
                    }
                    wait_until(&self.changed, &mut state, Some(until));
                }
                Phase::Broken(reason) => return Err(Trouble::Lost(reason.clone())),
                Phase::Closed => return Err(Trouble::Lost("it was closed".to_owned())),
            }
        }
    }

    /// Carries out requests; `hold` is the range of a change.
    pub(super) fn run(&self, commands: Vec<Command>, hold: Option<&Arc<Held>>) -> Result<Vec<Reply>, Trouble> {
        let result = self.try_run(commands, hold);
        if let (Err(Trouble::Silent | Trouble::GivenUp | Trouble::Lost(_)), Some(hold)) = (&result, hold) {
            hold.abandon();
        }
        result
    }

    fn try_run(&self, commands: Vec<Command>, hold: Option<&Arc<Held>>) -> Result<Vec<Reply>, Trouble> {
        let slow = commands.iter().any(|command| matches!(command, Command::Flush));
        let answer = if slow { self.patience.flush } else { self.patience.answer };
        let deadline = Instant::now() + answer + self.patience.reconnect;
        let time = Time { epoch: self.given_up.load(SeqCst), deadline, busy: self.busy() };
        let submit = |command: &Command| -> Result<Arc<Call>, Trouble> {
            let call = Call::new(command.clone(), hold.cloned());
            self.connection(&time)?.submit(call.clone());
            Ok(call)
        };
        let calls = commands.iter().map(submit).collect::<Vec<_>>();
        let mut replies = Vec::with_capacity(calls.len());
        // Every call is waited for, also after one has failed: what is under way when this returns is abandoned, or nothing.
        let mut trouble = None;
        for (command, call) in commands.iter().zip(calls) {
            let mut call = call;
            let outcome = loop {
                let last = time.end(self.busy());
                match call.and_then(|call| self.wait(&call, last.min(Instant::now() + answer), time.epoch)) {
                    Ok(Answer::Done(reply)) => break Ok(reply),
                    Ok(Answer::Failed(errno)) => break Err(Trouble::Server(errno)),
                    Ok(Answer::Refused(text)) => break Err(Trouble::Refused(text)),
                    Ok(Answer::Lost) => break Err(Trouble::Lost("its end cannot be read".to_owned())),
                    Ok(Answer::Ended) => call = submit(command),
                    Err(trouble) => break Err(trouble),
                }
            };
            match outcome {
                Ok(reply) => replies.push(reply),
                // The last word on what is under way counts more than an error number.
                Err(Trouble::Silent) => trouble = Some(Trouble::Silent),
                Err(error) => drop(trouble.get_or_insert(error)),
            }
        }
        trouble.map_or(Ok(replies), Err)
    }

    fn wait(&self, call: &Call, deadline: Instant, epoch: u64) -> Result<Answer, Trouble> {
        loop {
            if let Some(answer) = call.wait(deadline.min(Instant::now() + GIVE_UP_POLL)) {
                return Ok(answer);
            }
            if self.given_up.load(SeqCst) != epoch {
                return Err(Trouble::GivenUp);
            }
            if let Some(reason) = self.broken() {
                return Err(Trouble::Lost(reason));
            }
            if Instant::now() >= deadline {
                return Err(Trouble::Silent);
            }
        }
    }

    /// Makes a change, whose range is held, and keeps it until a flush has proven it.
    pub(super) fn change(&self, change: &Change, hold: &Arc<Held>) -> Result<(), Trouble> {
        let export = self.export();
        let kept = export.keeps().then(|| self.kept.begin(change.clone()));
        let result = carry_out(&export, change, &mut Together { link: self, hold });
        if let Some(number) = kept {
            match result {
                Ok(()) => self.kept.acknowledge(number),
                Err(_) => self.kept.forget(number),
            }
        }
        result
    }

    /// True if a change of so many bytes can be kept without a flush before.
    pub(super) fn has_room_for(&self, bytes: u64) -> bool {
        self.kept.has_room_for(bytes)
    }

    /// Flushes. What the server itself says of it settles what was kept: it is durable, or the server has lost it.
    pub(super) fn flush(&self) -> Result<(), Trouble> {
        if !self.export().keeps() {
            return Ok(());
        }
        let _one = self.left_behind.prove();
        let covered = self.kept.acknowledged();
        let result = self.run(vec![Command::Flush], None).map(drop);
        match &result {
            Ok(()) => self.left_behind.proven(),
            Err(trouble @ (Trouble::Server(_) | Trouble::Refused(_))) => {
                self.left_behind.refused(trouble.error("cannot flush", &self.uri));
            }
            Err(_) => return result,
        }
        self.kept.settle(&covered);
        result
    }

    /// A server of ours that used this export before has died: what it left is flushed, by a thread of its own. No start waits for it.
    /// `away`: what tells that the NBD server went away meanwhile.
    pub(super) fn take_over(self: &Arc<Self>, away: Option<Vec<Ended>>) {
        if !self.export().keeps() {
            return;
        }
        if let Some(ended) = away {
            self.left_behind.went_away(ended);
        }
        let link = self.clone();
        let flush = move || match link.flush() {
            Ok(()) => log::debug!("{}: what the server before had written is durable", link.uri),
            Err(trouble) => {
                log::error!("{}: what the server before had written cannot be flushed: {trouble}", link.uri);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("nbd-flush".into()).stack_size(256 << 10).spawn(flush) {
            // The guest's own flush will do.
            log::error!("cannot start a thread: {error}");
        }
    }

    /// Ends what is under way: its callers are told at once, the server's end of it is waited for.
    pub(super) fn give_up(&self) {
        self.given_up.fetch_add(1, SeqCst);
        let connections = self.state.lock().connections.clone();
        connections.iter().for_each(|connection| connection.cut());
        // Also who waits for a server that is away: nobody else would wake them before their time is up.
        self.changed.notify_all();
    }

    /// Ends the link. Connections end after what is under way, on threads of their own.
    pub(super) fn close(&self) {
        let connections = {
            let mut state = self.state.lock();
            state.phase = Phase::Closed;
            state.lost = None;
            std::mem::take(&mut state.connections)
        };
        self.changed.notify_all();
        connections.iter().for_each(|connection| connection.close());
    }
}

/// Requests of a caller, over all connections, again after each loss.
struct Together<'a> {
    link: &'a Link,
    hold: &'a Arc<Held>,
}

impl Carrier for Together<'_> {
    fn run(&mut self, commands: Vec<Command>) -> Result<Vec<Reply>, Trouble> {
        self.link.run(commands, Some(self.hold))
    }
}

/// How long a request may take.
struct Time {
    /// When it began: how often the image had given up.
    epoch: u64,
    /// Its end, had no server been busy with what was sent again.
    deadline: Instant,
    /// How long servers had been so when it began.
    busy: Duration,
}

impl Time {
    fn end(&self, busy: Duration) -> Instant {
        self.deadline + busy.saturating_sub(self.busy)
    }
}
