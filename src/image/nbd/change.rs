//! What a change of an export means in requests, by what the server can do.
//!
//! ```text
//! Write           pieces of the largest request
//! Zero, kept      WRITE_ZEROES with NO_HOLE, else zeroes are written
//! Zero, freed     WRITE_ZEROES, else TRIM and a look: what does not read as zeroes for sure is written; else zeroes are written
//! ```
//!
//! A trim alone promises nothing about what is read afterwards.

use super::buffers::Data;
use super::call::Reply;
use super::connection::Export;
use crate::range::ByteRange;
use crate::sync::{Arc, OnceLock};
use crate::sys::libnbd::{Command, STATE_ZERO};

/// So much is zeroed by one request, which may take as long as writing it.
const ZERO_BYTES_MAX: u64 = 64 << 20;
/// So much is written by one request where nothing better works.
const ZEROES_BYTES: u64 = 1 << 20;
/// As many requests of one change are under way at once.
const AT_ONCE: usize = 8;

/// A change of an export; a range is whole blocks.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// New bytes.
    Write {
        /// Where.
        offset: u64,
        /// The bytes.
        data: Arc<Data>,
    },
    /// Zeroes.
    Zero {
        /// Where.
        range: ByteRange,
        /// They stay allocated.
        keep: bool,
    },
}

impl Change {
    /// Where.
    pub(super) fn range(&self) -> ByteRange {
        match self {
            Change::Write { offset, data } => ByteRange::new(*offset, data.len() as u64),
            Change::Zero { range, .. } => *range,
        }
    }

    /// Bytes that it holds in memory.
    pub(super) fn memory_bytes(&self) -> u64 {
        match self {
            Change::Write { data, .. } => data.len() as u64,
            Change::Zero { .. } => 0,
        }
    }
}

/// Why a request was not done.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    /// The server said no.
    Server(i32),
    /// Said by libnbd, or by us.
    Refused(String),
    /// There was no connection for too long.
    Lost(String),
    /// The server did not answer in time. What it may still do is waited for before anything else is done there.
    Silent,
    /// The image was told to give up.
    GivenUp,
}

/// Carries out several requests at once, in any order.
pub(super) trait Carrier {
    /// # Errors
    /// The first request that was not done; the others have been answered too, or are abandoned.
    fn run(&mut self, commands: Vec<Command>) -> Result<Vec<Reply>, Trouble>;
}

/// Makes `change` on `export`, by way of `carrier`.
pub(super) fn carry_out(export: &Export, change: &Change, carrier: &mut dyn Carrier) -> Result<(), Trouble> {
    match change {
        Change::Write { offset, data } => {
            let fua = export.writes_through();
            let parts = ByteRange::new(0, data.len() as u64).pieces(export.request_bytes_max);
            let command = |part: ByteRange| Command::Write {
                offset: offset + part.start(),
                data: data.clone(),
                part: in_memory(part),
                fua,
            };
            carrier.run(parts.map(command).collect()).map(drop)
        }
        Change::Zero { range, keep } => zero(export, *range, *keep, carrier),
    }
}

fn in_memory(range: ByteRange) -> std::ops::Range<usize> {
    let number = |bytes: u64| usize::try_from(bytes).expect("bytes in memory");
    number(range.start())..number(range.end())
}

fn zero(export: &Export, range: ByteRange, keep: bool, carrier: &mut dyn Carrier) -> Result<(), Trouble> {
    let fua = export.writes_through();
    if export.can_zero {
        for piece in range.pieces(ZERO_BYTES_MAX) {
            let command = Command::Zero { offset: piece.start(), len: piece.len(), keep, fua };
            match carrier.run(vec![command]) {
                Ok(_) => (),
                Err(Trouble::Server(libc::EOPNOTSUPP)) => write_zeroes(export, piece, carrier)?,
                Err(trouble) => return Err(trouble),
            }
        }
        return Ok(());
    }
    if keep || !export.can_trim || !export.can_status {
        return write_zeroes(export, range, carrier);
    }
    for piece in range.pieces(ZERO_BYTES_MAX) {
        carrier.run(vec![Command::Trim { offset: piece.start(), len: piece.len(), fua }])?;
        let mut at = piece.start();
        while at < piece.end() {
            let looked = carrier.run(vec![Command::Status { offset: at, len: piece.end() - at }])?;
            let extents = looked.into_iter().flat_map(|reply| reply.extents);
            let before = at;
            for (len, flags) in extents {
                let extent = ByteRange::new(at, len.into()).intersect(piece);
                if flags & STATE_ZERO == 0 {
                    write_zeroes(export, extent, carrier)?;
                }
                at = extent.end();
            }
            if at == before {
                // It does not tell.
                write_zeroes(export, ByteRange::from_bounds(at, piece.end()), carrier)?;
                at = piece.end();
            }
        }
    }
    Ok(())
}

fn write_zeroes(export: &Export, range: ByteRange, carrier: &mut dyn Carrier) -> Result<(), Trouble> {
    static ZEROES: OnceLock<Arc<Vec<u8>>> = OnceLock::new();
    let zeroes = ZEROES.get_or_init(|| Arc::new(vec![0; in_memory(ByteRange::new(0, ZEROES_BYTES)).end]));
    let fua = export.writes_through();
    let command = |piece: ByteRange| {
        let part = in_memory(ByteRange::new(0, piece.len()));
        Command::Write { offset: piece.start(), data: zeroes.clone(), part, fua }
    };
    let mut commands = range.pieces(ZEROES_BYTES.min(export.request_bytes_max)).map(command).peekable();
    while commands.peek().is_some() {
        carrier.run(commands.by_ref().take(AT_ONCE).collect())?;
    }
    Ok(())
}
