//! An NBD export as an image.

use std::time::{Duration, SystemTime};

use super::buffers::Buffers;
use super::change::{Change, Trouble};
use super::connection::NoConnection;
use super::ends::{Ended, User};
use super::extents::{self, Extents};
use super::link::{GIVE_UP_POLL, Link, Patience};
use super::ranges::Held;
use super::uri;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Attributes, Extent, ExtentStatus, Format, Identity, Image, Properties, Room, check_bounds};
use crate::range::ByteRange;
use crate::sync::{Arc, Instant, Mutex};
use crate::sys::libnbd::{Command, Library};

/// See the module. Dropped, it ends its connections after what is under way.
#[derive(Debug)]
pub(super) struct NbdImage {
    uri: String,
    link: Arc<Link>,
    patience: Patience,
    writable: bool,
    size_bytes: u64,
    extents: Extents,
    buffers: Arc<Buffers>,
    /// Nothing else is known of the image's times.
    opened: SystemTime,
    /// One forced flush at a time.
    forced: Mutex<()>,
}

impl NbdImage {
    /// Connects to `uri`; `observes`: whoever else has it open; `unproven`: as in [`Link::open`].
    pub(super) fn open(
        library: &'static Library,
        uri: &str,
        patience: Patience,
        writable: bool,
        observes: bool,
        unproven: bool,
    ) -> std::result::Result<Self, NoConnection> {
        let link = Link::open(library, uri, User::new(observes), patience, writable, unproven)?;
        let size_bytes = link.export().size_bytes;
        let (extents, opened, forced) = (Extents::default(), SystemTime::now(), Mutex::new(()));
        let (uri, buffers) = (uri.to_owned(), Arc::default());
        Ok(NbdImage { uri, link, patience, writable, size_bytes, extents, buffers, opened, forced })
    }

    /// A server of ours that used this export has died; `away`: what tells that the NBD server went away since.
    pub(super) fn take_over(&self, away: Option<Vec<Ended>>) {
        self.link.take_over(away);
    }

    /// True if the server refuses writes.
    pub(super) fn is_read_only(&self) -> bool {
        self.link.export().read_only
    }

    /// True if a write can be made durable at all.
    pub(super) fn can_be_durable(&self) -> bool {
        let export = self.link.export();
        export.keeps() || export.writes_through()
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.patience.answer + self.patience.reconnect
    }

    /// Waits until the deadline of a request, which a server that is being brought up to date puts off.
    fn within<T>(&self, mut wait: impl FnMut(Instant) -> Option<T>) -> std::result::Result<T, Trouble> {
        let (mut deadline, mut busy) = (self.deadline(), self.link.busy());
        loop {
            if let Some(done) = wait(deadline.min(Instant::now() + GIVE_UP_POLL)) {
                return Ok(done);
            }
            if let Some(reason) = self.link.broken() {
                return Err(Trouble::Lost(reason));
            }
            let more = self.link.busy().saturating_sub(busy);
            if more.is_zero() && Instant::now() >= deadline {
                return Err(Trouble::Silent);
            }
            deadline += more;
            busy += more;
        }
    }

    fn settled(&self, range: ByteRange) -> std::result::Result<(), Trouble> {
        self.within(|deadline| self.link.ranges.wait_for_abandoned(range, deadline).then_some(()))
    }

    fn failed(&self, what: &str, range: ByteRange, trouble: &Trouble) -> Error {
        let error = trouble.error(what, &self.uri);
        if range.is_empty() { error } else { error.at(range) }
    }

    /// `range` in whole blocks, no further than the end.
    fn blocks(&self, range: ByteRange) -> ByteRange {
        range.align_out(self.link.export().block_bytes).intersect(ByteRange::new(0, self.size_bytes))
    }

    /// Fills `buffer`, which is as long as `blocks`.
    fn read_blocks(&self, blocks: ByteRange, buffer: &mut [u8]) -> std::result::Result<(), Trouble> {
        let commands = blocks.pieces(self.link.export().request_bytes_max).map(|piece| Command::Read {
            offset: piece.start(),
            len: length(piece),
            memory: self.buffers.clone(),
        });
        let mut rest = buffer;
        for reply in self.link.run(commands.collect(), None)? {
            let (head, tail) = rest.split_at_mut(reply.bytes.len());
            head.copy_from_slice(&reply.bytes);
            self.buffers.give(reply.bytes);
            rest = tail;
        }
        Ok(())
    }

    /// Holds `range` for a change with so many bytes, with room to keep it.
    fn begin(&self, what: &str, range: ByteRange, bytes: u64) -> Result<Arc<Held>> {
        check_bounds(self, what, range)?;
        if !self.writable {
            let what = format!("cannot {what}: opened read-only:");
            return Err(Error::new(ErrorKind::ReadOnly, what).on(&*self.uri).at(range));
        }
        self.make_room(bytes)?;
        let held = self.within(|deadline| self.link.ranges.hold(self.blocks(range), deadline));
        held.map_err(|trouble| self.failed(&format!("cannot {what}"), range, &trouble))
    }

    /// Flushes until a change of so many bytes can be kept (rule 13).
    fn make_room(&self, bytes: u64) -> Result<()> {
        if self.link.has_room_for(bytes) {
            return Ok(());
        }
        let _one = self.forced.lock();
        if self.link.has_room_for(bytes) {
            return Ok(());
        }
        match self.link.flush() {
            Ok(()) => Ok(()),
            Err(trouble) => {
                let error = self.failed("cannot flush", ByteRange::new(0, 0), &trouble);
                log::error!("{error}");
                // What the server says of its flush concerns writes before this one, and the next flush says so; without an answer this
                // one has no room.
                match trouble {
                    Trouble::Server(_) | Trouble::Refused(_) => Ok(()),
                    _ => Err(error),
                }
            }
        }
    }

    fn change(&self, what: &str, range: ByteRange, change: &Change, held: &Arc<Held>) -> Result<()> {
        self.extents.forget(range);
        let result = self.link.change(change, held);
        self.extents.forget(range);
        result.map_err(|trouble| self.failed(&format!("cannot {what}"), range, &trouble))
    }

    fn zero(&self, what: &str, range: ByteRange, keep: bool) -> Result<()> {
        check_bounds(self, what, range)?;
        let block = self.link.export().block_bytes;
        // What is no whole block is written, the image's last one aside.
        let whole = ByteRange::from_bounds(
            range.start().next_multiple_of(block),
            match range.end() {
                end if end == self.size_bytes => end,
                end => end - end % block,
            },
        );
        if whole.is_empty() {
            return self.write_at(range.start(), &vec![0; length(range)]);
        }
        for edge in
            [ByteRange::from_bounds(range.start(), whole.start()), ByteRange::from_bounds(whole.end(), range.end())]
        {
            if !edge.is_empty() {
                self.write_at(edge.start(), &vec![0; length(edge)])?;
            }
        }
        let held = self.begin(what, whole, 0)?;
        self.change(what, whole, &Change::Zero { range: whole, keep }, &held)
    }

    fn extent_ahead(&self, offset: u64, ahead: u64) -> Extent {
        let rest = ByteRange::from_bounds(offset, self.size_bytes);
        let known = self.extents.at(offset).or_else(|| self.look(rest.split(ahead).0));
        let whole = Extent { range: rest, status: ExtentStatus::Data };
        known.map_or(whole, |found| Extent { range: found.range.intersect(rest), status: found.status })
    }

    /// Asks about `range`; nothing if the server does not tell, or what is told may be no longer true in a moment.
    fn look(&self, range: ByteRange) -> Option<Extent> {
        let range = self.blocks(range);
        let settled = self.link.ranges.wait_for_abandoned(range, Instant::now());
        if !self.link.export().can_status || range.is_empty() || !settled {
            return None;
        }
        let question = self.extents.ask(range);
        let command = Command::Status { offset: range.start(), len: range.len() };
        let answer = match self.link.run(vec![command], None) {
            Ok(mut replies) => replies.pop().map(|reply| reply.extents).unwrap_or_default(),
            Err(trouble) => {
                log::debug!("{}", self.failed("cannot ask for the extents of", range, &trouble));
                Vec::new()
            }
        };
        let found = extents::from_answer(range, &answer, self.size_bytes);
        let first = found.first().copied();
        self.extents.learn(question, found);
        first
    }
}

fn length(range: ByteRange) -> usize {
    usize::try_from(range.len()).expect("a range in memory")
}

/// The protocol knows none: the disk is its user's alone, and as old as this image.
pub(super) fn attributes(opened: SystemTime) -> Attributes {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    Attributes { mode: 0o600, uid, gid, modified: opened, changed: opened, accessed: opened }
}

/// There is room for exactly what fits the export.
pub(super) fn room(size_bytes: u64) -> Room {
    Room { available_bytes: size_bytes, free_bytes: size_bytes, total_bytes: size_bytes }
}

/// Its URI is all that is known of it, however it is spelled.
pub(super) fn identity(uri: &str, size_bytes: u64) -> Identity {
    let id = format!("nbd-{:016x}", xxhash_rust::xxh3::xxh3_64(uri::key(uri).as_bytes()));
    Identity { id: Some(id), device: 0, inode: 0, birth_ns: None, size_bytes }
}

impl Image for NbdImage {
    fn name(&self) -> &str {
        &self.uri
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn properties(&self) -> Properties {
        let export = self.link.export();
        Properties {
            request_alignment: export.block_bytes,
            cluster_bytes: None,
            thin_zeroing: export.can_zero || (export.can_trim && export.can_status),
            writable: self.writable,
            resizable: false,
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        check_bounds(self, "read", range)?;
        let blocks = self.blocks(range);
        let failed = |trouble| self.failed("cannot read", range, &trouble);
        self.settled(blocks).map_err(failed)?;
        if blocks == range {
            return self.read_blocks(blocks, buffer).map_err(failed);
        }
        let mut bytes = vec![0; length(blocks)];
        self.read_blocks(blocks, &mut bytes).map_err(failed)?;
        let skip = length(ByteRange::from_bounds(blocks.start(), range.start()));
        buffer.copy_from_slice(&bytes[skip..skip + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, data.len() as u64);
        if data.is_empty() {
            return check_bounds(self, "write", range);
        }
        let held = self.begin("write", range, range.len())?;
        let blocks = self.blocks(range);
        let data = if blocks == range {
            self.buffers.copy(data)
        } else {
            let mut bytes = vec![0; length(blocks)];
            let read = self.read_blocks(blocks, &mut bytes);
            read.map_err(|trouble| self.failed("cannot read around", range, &trouble))?;
            let skip = length(ByteRange::from_bounds(blocks.start(), range.start()));
            bytes[skip..skip + data.len()].copy_from_slice(data);
            self.buffers.data(bytes)
        };
        self.change("write", range, &Change::Write { offset: blocks.start(), data }, &held)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.zero("write zeroes", range, true)
    }

    /// WRITE_ZEROES that may punch, or a trim and a look. Never a trim alone: that promises no zeroes.
    fn discard(&self, range: ByteRange) -> Result<()> {
        if !self.properties().thin_zeroing {
            let what = "the NBD server cannot free space and leave zeroes:";
            return Err(Error::new(ErrorKind::Unsupported, what).on(&*self.uri).at(range));
        }
        self.zero("discard", range, false)
    }

    /// No request of NBD's allocates. Who writes there hears whether there is room.
    fn allocate(&self, range: ByteRange) -> Result<()> {
        check_bounds(self, "allocate", range)?;
        let what = "an NBD server cannot allocate room ahead:";
        Err(Error::new(ErrorKind::Unsupported, what).on(&*self.uri).at(range))
    }

    fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let nothing = ByteRange::new(0, 0);
        let failed = |trouble| self.failed("cannot flush", nothing, &trouble);
        self.settled(ByteRange::new(0, self.size_bytes)).map_err(failed)?;
        let flushed = self.link.flush().map_err(failed);
        self.buffers.trim();
        // One that is under way may meet what this one does not.
        drop(self.forced.lock());
        match self.link.left_behind.report() {
            Some(owed) => Err(owed),
            None => flushed,
        }
    }

    fn owes(&self) -> Option<Error> {
        self.link.left_behind.owes()
    }

    fn told(&self) {
        self.link.left_behind.told();
    }

    fn extent_at(&self, offset: u64) -> Extent {
        self.extent_ahead(offset, extents::AHEAD_BYTES)
    }

    fn extent_within(&self, range: ByteRange) -> Extent {
        self.extent_ahead(range.start(), range.len().max(extents::AHEAD_LITTLE_BYTES))
    }

    /// A server does not tell: its size.
    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.size_bytes)
    }

    fn resize(&self, _size_bytes: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "an NBD export has a fixed size: cannot resize").on(&*self.uri))
    }

    fn attributes(&self) -> Result<Attributes> {
        Ok(attributes(self.opened))
    }

    fn room(&self) -> Result<Room> {
        Ok(room(self.size_bytes))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(identity(&self.uri, self.size_bytes))
    }

    fn give_up(&self) {
        self.link.give_up();
    }
}

impl Drop for NbdImage {
    fn drop(&mut self) {
        self.link.close();
    }
}

impl Trouble {
    /// As the error of `what`, which was attempted on the export of `uri`.
    pub(super) fn error(&self, what: &str, uri: &str) -> Error {
        match self {
            Trouble::Server(errno) => Error::io(what, &std::io::Error::from_raw_os_error(*errno)).on(uri),
            _ => Error::new(ErrorKind::Failed, format!("{what} ({self})")).on(uri),
        }
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Server(errno) => write!(f, "the server answered: {}", std::io::Error::from_raw_os_error(*errno)),
            Trouble::Refused(text) => f.write_str(text),
            Trouble::Lost(reason) => write!(f, "no connection to the NBD server: {reason}"),
            Trouble::Silent => f.write_str("the NBD server does not answer"),
            Trouble::GivenUp => f.write_str("given up"),
        }
    }
}

/// How long a request to an NBD server waits while the connection is lost, where nothing else is told.
pub const RECONNECT_DEFAULT: Duration = Duration::from_secs(60);
