//! livemirror: virtual disks that move while they are in use.
//!
//! A mount presents a disk's image as a plain file, through FUSE. Whatever uses that file (a virtual machine, a loop device, a
//! database) is the *guest*. A background *mirror* copies the image to a *target* while the guest goes on; when the two have
//! converged, a *cutover* makes the target the disk, and the guest does not notice.
//!
//! # The words
//!
//! | word | meaning |
//! |---|---|
//! | image | a place where a disk's bytes live: a raw or qcow2 file, a block device or an NBD export |
//! | volume | a live disk that a mount presents; it has one *active* image and, during a mirror, a *target* |
//! | extent | a byte range with one status: data, zero (allocated), hole. An image that cannot tell is all data |
//! | granule | the unit of dirty tracking, 64 KiB unless told otherwise |
//! | dirty map | one bit for each granule: set = the target may differ from the source here |
//! | intent log | its durable, coarse shadow: one bit for each *region* of 1 MiB or more |
//! | block | a part of a granule, a page at least: which of them were written is known where granules were copied before |
//! | claim | granules that a copier took from the dirty map (bits cleared) and has not finished |
//! | hold | bytes that a synchronous guest write keeps to itself while it goes to both images |
//! | copy mode | `background`: the guest waits for the source only; `write-blocking`: for both; `auto`: the job chooses |
//! | ready | a flush of the target succeeded that began while nothing was dirty or in flight |
//! | in sync | nothing dirty and nothing in flight at this moment |
//! | barrier | the short moment in which guest writes wait |
//! | keeper | the small process that owns the FUSE connection, parks descriptors and outlives the server; one for a mount |
//! | server | the process that answers requests and runs the mirrors |
//!
//! # The rooms, and how data flows through them
//!
//! ```text
//!   guest                                     livemirror mirror / status / cutover ...
//!     │ read, write, fallocate, fsync             │ QMP on a unix socket
//!   [fuse] ── translate, call, reply            [control] ── client in [cli]
//!     │                                           │
//!   [volume] ── barrier, active image ────────  [server] ── opens images, keeps the record, starts jobs
//!     │   └─ mark ─> [dirty] <─ claim ─ [mirror] ─┘
//!     │                                   │
//!   [image] source                      [image] target          [state] what survives a restart
//! ```
//!
//! - [`image`] knows nobody. [`volume`] knows images and the dirty map. [`mirror`] knows volumes. [`control`] asks a
//!   [`control::backend::Backend`], which [`server`] is. [`fuse`] is the only room that knows the FUSE library.
//! - `sync` is where all locks, threads and the clock come from, so that a model checker can replace them; `sys` holds every
//!   `unsafe` block.
//! - `simulation` (tests only) is a machine that crashes: servers live and die on it, seed by seed, and the rules are checked at
//!   nearly every instant.
//!
//! ## Processes
//!
//! ```text
//! livemirror mount ──> keeper (mounts, keeps /dev/fuse and the parked descriptors)
//!                        └──> server (threads: session, control, and for each job supervisor, scanner, copiers)
//! ```
//!
//! Every start of a server is a *resume* of a live connection, the first one too: one code path. A server that dies is reaped and
//! replaced; the kernel sends the requests again that it had not answered. An upgrade is the same on purpose, with another program, and
//! the keeper then replaces itself too. A keeper that dies is replaced by the server, which has a duplicate of all that it kept. Under
//! a service manager with a store of descriptors (systemd) that store has all of it too, and the next start of the service goes on with
//! the mount, whatever became of the processes of the last one. A request that makes servers crash is found out by a page of memory
//! that they share, in which each thread notes what it works on. See [`fuse::session`] and [`fuse::keeper`].
//!
//! ## A guest write
//!
//! ```text
//! background:      enter the barrier ─> intent durable ─> source ─> mark ─> leave ─> reply
//! write-blocking:  enter ─> intent durable ─> hold the range ─> clear what is covered ─> source ∥ target ─> release ─> leave ─> reply
//! ```
//!
//! The intent is durable already for all but the first write to a region in a while: see [`dirty::intent`].
//!
//! ## The copy, and the cutover
//!
//! ```text
//! budget ─> claim (bits cleared) ─> extents ─> read, leave out zero blocks, write | free ─> finish, or drop (marked again)
//!
//! flush targets, record aside ─> wait until near ─> raise all barriers ─> drain ─> flush ─> ONE rename ─> mark old sources
//!                                                                        ─> switch ─> lower
//! ```
//!
//! # Lock order
//!
//! Outer before inner; nobody takes a lock to the left of one that it has.
//!
//! ```text
//! starting (server) < cutovers (one at a time in a mount) < barriers, in mount order < resizing (volume)
//!   < hold or claim (dirty map's busy set, never while waiting for another) < flushing (target) < stripes (image)
//! ledger's saving < ledger's record
//! leaves, under which nothing else is taken: job state, job's live images, pacer, event listeners, intent log
//! ```
//!
//! Who waits for whom: a guest's write waits for the barrier, or inside it for the intent log's thread, which waits for its disk
//! only, and for holds and claims, never longer than the set bound for either. A claim waits for nobody. The barrier waits for guest writes inside it. So there is no circle.
//!
//! # Rules that never break, and where they are kept
//!
//! The numbers are those that comments name.
//!
//! | | rule | kept by |
//! |---|---|---|
//! | 1 | no silent difference | [`volume`] marks after each change, failed or not; a dropped claim or hold marks again |
//! | 2 | intent before write, and its end | [`dirty::IntentLog`]: [`volume`] enters it before each change; a bit ends after flushes of both images |
//! | 3 | clear before read, one copier at a time | [`dirty::DirtyMap::claim`]; the copier asks for extents after it |
//! | 4 | tracking before the first look | [`mirror::start`], under the barrier |
//! | 5 | acknowledged is kept | the cutover drains and flushes under the barrier; replies leave nothing only in memory; what no flush has proven an NBD server gets again ([`image::nbd`]) |
//! | 6 | the guest comes first | a guest waits for a target at most `--max-guest-delay`; target errors are the job's |
//! | 7 | flush means flush | `fsync` and O_DSYNC writes flush the active image, and the target in write-blocking mode |
//! | 8 | thin stays thin | holes are not copied, zero blocks are left out, guests' discards reach the target |
//! | 9 | one writer per image | QEMU's byte-range locks, a fence of our own, O_EXCL on devices ([`image`]); NBD has none ([`image::nbd`]) |
//! | 10 | after a cutover the old source is stale | marks on the images ([`state::marks`]), checked at each mount |
//! | 11 | a resumed mirror trusts its map only for the very same, untouched pair | [`state::pair`]; looked at by [`server`] before anybody uses the images |
//! | 12 | errors are named | [`error::Error`]: what, on which image, where, why, what to do |
//! | 13 | memory and queues are bounded | the target queue, the control socket's outbox, the copiers' buffers |
//! | 14 | nothing lands late | a target write that was given up on keeps its hold and its bytes until it has returned; the end of an NBD connection is read before the next one writes |
//! | 15 | one commit point | one atomic rename of the mount's record ([`state::store`]) decides which images are active |
//!
//! `tests/mutants.sh` removes, one after the other, the lines that keep these rules, and shows the test that then fails; its last
//! result is in `tests/mutants/RESULT.md`.

#![cfg_attr(all(test, shuttle), allow(dead_code, reason = "the simulation puts other things in the place of some"))]

pub mod cli;
pub mod control;
pub mod dirty;
pub mod error;
pub mod fuse;
pub mod image;
pub mod mirror;
pub mod range;
pub mod server;
#[cfg(all(test, shuttle))]
mod simulation;
pub mod state;
mod sync;
pub mod sys;
pub mod volume;
