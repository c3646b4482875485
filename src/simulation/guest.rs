//! Guests: tasks that write, zero, discard, flush and read the same few places, and hold the disks to what was promised.
//!
//! A guest outlives a server that is killed: what it has asked for and was not answered is asked again of the next one, as the kernel
//! does. A power cut ends it, and a clean stop waits for it.

use std::time::Duration;

use super::disk::{SECTOR_BYTES, Tag};
use super::host::{Host, host};
use crate::range::ByteRange;
use crate::sync::{Arc, thread};
use crate::volume::Volume;

/// What a guest has asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    volume: usize,
    what: What,
    first: u64,
    count: u64,
    tag: Tag,
    /// When it was asked for first.
    begun: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Write,
    WriteDurably,
    Zero,
    Discard,
    Flush,
    Read,
}

/// Sectors of a region of the intent log.
const REGION_SECTORS: u64 = (1 << 20) / SECTOR_BYTES;
/// Places in a region that guests use: its start, around the end of a granule, and its end with the start of the next.
const PLACES: [u64; 6] = [0, 2, 13, 16, 100, REGION_SECTORS - 5];

/// The life of guest `number`, until guests are told to stop.
pub(super) fn run(number: usize, busy: bool) {
    let me = usize::from(shuttle::thread::current().id());
    let volumes = host(|host| {
        host.guests.insert(me);
        host.life.as_ref().expect("a server lives").volumes().to_vec()
    });
    if let Some(request) = host(|host| host.asked[number]) {
        serve(number, &volumes, request);
    }
    loop {
        let (stop, idle) = host(|host| {
            let idle = match host.dice.below(20) {
                _ if busy => 0,
                0 => host.dice.below(45_000),
                1..4 => host.dice.below(3000),
                _ => 0,
            };
            (host.guests_stop, idle)
        });
        if stop {
            break;
        }
        if idle > 0 {
            thread::sleep(Duration::from_millis(idle));
        }
        let request = host(|host| ask(host, number));
        serve(number, &volumes, request);
    }
    host(|host| {
        host.guests.remove(&me);
        host.guests_gone += 1;
    });
}

fn ask(host: &mut Host, number: usize) -> Request {
    let volume = host.dice.below(host.oracles.len() as u64) as usize;
    let what = match host.dice.below(100) {
        0..55 => What::Write,
        55..63 => What::WriteDurably,
        63..69 => What::Zero,
        69..77 => What::Discard,
        77..88 => What::Flush,
        _ => What::Read,
    };
    let disk_sectors = super::story::DISK_BYTES / SECTOR_BYTES;
    let place = host.dice.pick(&PLACES) + host.dice.below(4);
    let first = host.dice.below(super::story::DISK_BYTES >> 20) * REGION_SECTORS + place;
    let longest = if host.dice.percent(5) { 40 } else { 5 };
    let count = (1 + host.dice.below(longest)).min(disk_sectors - first);
    let tag = if matches!(what, What::Write | What::WriteDurably) { host.new_tag() } else { 0 };
    let oracle = &mut host.oracles[volume];
    let begun = oracle.now();
    if !matches!(what, What::Flush | What::Read) {
        oracle.begin_write(first, count, tag, begun);
    }
    let request = Request { volume, what, first, count, tag, begun };
    host.asked[number] = Some(request);
    host.note(&format!("guest {number}: {what:?} {tag:x} at {first}, {count} sectors of disk {volume}"));
    request
}

/// Has the volume carry it out, and notes the answer.
fn serve(number: usize, volumes: &[Arc<Volume>], request: Request) {
    let Request { volume, what, first, count, tag, begun } = request;
    let disk = &volumes[volume];
    let range = ByteRange::new(first * SECTOR_BYTES, count * SECTOR_BYTES);
    let unharmed = harm();
    let both = if what == What::Flush && goes_to_both(disk) { quiet_sectors(disk, volume, begun) } else { Vec::new() };
    let result = match what {
        What::Write | What::WriteDurably => {
            let bytes = tag.to_le_bytes().repeat(range.len() as usize / 8);
            disk.write(range.start(), &bytes, what == What::WriteDurably).map(|_| ())
        }
        What::Zero => disk.zero_range(range, true),
        What::Discard => disk.punch_hole(range),
        What::Flush => disk.flush(),
        What::Read => {
            let mut bytes = vec![0; range.len() as usize];
            let result = disk.read(range.start(), &mut bytes).map(|_| ());
            if result.is_ok() {
                host(|host| check_read(host, &request, &bytes));
            }
            result
        }
    };
    host(|host| {
        host.note(&format!("guest {number}: answered {}", result.is_ok()));
        if result.is_err() {
            host.count("error of a guest");
        }
        let oracle = &mut host.oracles[volume];
        match what {
            What::Write | What::Zero | What::Discard => oracle.end_write(first, count, begun, result.is_ok()),
            What::WriteDurably => {
                oracle.end_write(first, count, begun, result.is_ok());
                let ended = oracle.now();
                oracle.end_flush_of(first, count, tag, begun.min(ended), result.is_ok());
            }
            What::Flush => oracle.end_flush(begun, result.is_ok()),
            What::Read => (),
        }
        if result.is_err() && matches!(what, What::Flush | What::WriteDurably) {
            host.unheard[volume] = false;
        }
        host.asked[number] = None;
        if what == What::Flush {
            let oldest = host.asked.iter().flatten().map(|request| request.begun).min().unwrap_or(u64::MAX);
            host.oracles[volume].forget(oldest);
        }
        host.check_now();
    });
    if !both.is_empty() && result.is_ok() && unharmed == harm() && goes_to_both(disk) {
        let still = quiet_sectors(disk, volume, begun);
        host(|host| {
            host.count("flush of both");
            both.iter().filter(|sector| still.contains(sector)).for_each(|sector| {
                super::checks::flushed_to_both(host, volume, *sector, begun);
            });
        });
    }
}

/// Written sectors in which nothing is under way, dirty or claimed.
fn quiet_sectors(disk: &Volume, volume: usize, begun: u64) -> Vec<u64> {
    let Some(map) = disk.tracking().map(|tracking| tracking.map().clone()) else { return Vec::new() };
    let mut sectors = host(|host| host.oracles[volume].settled_before(begun));
    sectors.retain(|sector| map.is_quiet(ByteRange::new(sector * SECTOR_BYTES, SECTOR_BYTES)));
    sectors
}

/// How often anything failed so far.
fn harm() -> u64 {
    host(|host| ["failed flush", "lost connection", "fault"].iter().filter_map(|what| host.counts.get(what)).sum())
}

fn goes_to_both(disk: &Volume) -> bool {
    disk.tracking().is_some_and(|tracking| tracking.is_synchronous())
}

pub(super) fn check_read(host: &Host, request: &Request, bytes: &[u8]) {
    for (sector, bytes) in (request.first..).zip(bytes.chunks(SECTOR_BYTES as usize)) {
        let tag = Tag::from_le_bytes(bytes[..8].try_into().unwrap());
        if let Err(why) = host.oracles[request.volume].check_read(sector, tag, request.begun) {
            panic!("rule 5: disk {}: {why}", request.volume);
        }
    }
}
