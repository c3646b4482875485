//! The rules, as they can be seen from outside: what a recovery would find at this instant, for every granule, and what a commit
//! commits to.

use std::collections::BTreeSet;

use super::disk::{SECTOR_BYTES, Tag};
use super::host::{Host, STATE_DIRECTORY};
use crate::dirty::intent::{JobId, recover};
use crate::mirror::types::MirrorResult;
use crate::state::{MirrorRecord, MountState, PairMark, VolumeState};

/// Were the server killed at this instant, or the power cut: is each granule that may differ dirty in what recovery reads back
/// (rules 1 and 2), does each record that it may find name images that have all that guests were promised (rules 5, 7 and 15)?
pub(super) fn recovery(host: &Host, power_cut: bool) {
    for record in host.records(power_cut).into_iter().flatten() {
        for (volume, state) in record.volumes.iter().enumerate() {
            promises(host, volume, state, power_cut);
            if let Some(mirror) = &state.mirror {
                differences(host, state, mirror, power_cut);
            }
        }
    }
}

/// Rules 5, 7, 15: the image that a record calls active.
fn promises(host: &Host, volume: usize, state: &VolumeState, power_cut: bool) {
    let Some(disk) = host.find_disk(&state.active) else { panic!("rule 15: the record names {}", state.active) };
    let oracle = &host.oracles[volume];
    for sector in oracle.sectors() {
        let disk = &host.disks[disk];
        let checked = match power_cut {
            true => disk.candidates(sector).try_for_each(|tag| oracle.check_left(sector, tag)),
            false => oracle.check_read(sector, disk.read(sector), u64::MAX),
        };
        if let Err(why) = checked {
            let rule = if power_cut { "rule 7" } else { "rule 5" };
            panic!("{rule}: {} on {}: {why}", state.name, state.active);
        }
    }
}

/// Rules 1 and 2: the images of an unfinished mirror that would be trusted.
fn differences(host: &Host, state: &VolumeState, mirror: &MirrorRecord, power_cut: bool) {
    if mirror.compare.is_some() || host.foreign.contains(&mirror.job) {
        return;
    }
    let (Some(source), Some(target)) = (host.find_disk(&state.active), host.find_disk(&mirror.options.target)) else {
        return;
    };
    let paired = |disk, marked| may_be_paired(host, disk, mirror, marked, power_cut);
    if !paired(source, mirror.source_marked) || !paired(target, mirror.target_marked) {
        return;
    }
    let unmarked = unmarked_regions(host, mirror, power_cut);
    if unmarked.is_empty() {
        return;
    }
    let region_sectors = (mirror.size_bytes.div_ceil(512 << 10).next_power_of_two().max(1 << 20)) / SECTOR_BYTES;
    let (source, target) = (&host.disks[source], &host.disks[target]);
    let sectors = unmarked.iter().flat_map(|region| region * region_sectors..(region + 1) * region_sectors);
    for sector in sectors.take_while(|sector| sector * SECTOR_BYTES < mirror.size_bytes) {
        let region = sector / region_sectors;
        let read = source.read(sector);
        let is = |tag: Tag| tag == read;
        let alike = match power_cut {
            true => source.candidates(sector).all(is) && target.candidates(sector).all(is),
            false => is(target.read(sector)),
        };
        assert!(
            alike && source.arriving(sector).chain(target.arriving(sector)).all(is),
            "rule 1: {} and {} may differ in sector {sector} ({:x?} and {:x?}, arriving {:x?} and {:x?}), and region {region} is \
             not marked {}",
            source.name,
            target.name,
            source.candidates(sector).collect::<Vec<_>>(),
            target.candidates(sector).collect::<Vec<_>>(),
            source.arriving(sector).collect::<Vec<_>>(),
            target.arriving(sector).collect::<Vec<_>>(),
            if power_cut { "after a power cut" } else { "after a kill" },
        );
    }
}

fn may_be_paired(host: &Host, disk: usize, mirror: &MirrorRecord, marked: bool, power_cut: bool) -> bool {
    let held = host.disks[disk].attributes.get("user.livemirror.pair");
    let fits = |value: Option<&Vec<u8>>| {
        let mark: Option<PairMark> = value.and_then(|bytes| serde_json::from_slice(bytes).ok());
        mirror.mismatch(marked, mark.as_ref()).is_none()
    };
    match held {
        None => fits(None),
        Some(held) if power_cut => held.candidates().any(|value| fits(value.as_ref())),
        Some(held) => fits(held.latest().as_ref()),
    }
}

/// Regions that are not marked in some log that recovery may find.
fn unmarked_regions(host: &Host, mirror: &MirrorRecord, power_cut: bool) -> BTreeSet<u64> {
    let Some(job) = JobId::from_hex(&mirror.job) else { return BTreeSet::new() };
    let path = std::path::Path::new(STATE_DIRECTORY).join(format!("intent-{}", mirror.job));
    let mut unmarked = BTreeSet::new();
    for file in host.files.candidates(&path, power_cut).into_iter().flatten() {
        for block in host.files.first_blocks(file, power_cut) {
            let (words, recovery) = recover(block, &job, mirror.size_bytes);
            let clear = |region: &u32| words[*region as usize / 64] >> (region % 64) & 1 == 0;
            unmarked.extend((0..recovery.regions).filter(clear).map(u64::from));
        }
    }
    unmarked
}

/// A record is put in place: where it makes a target the disk, or calls it a copy, the target has all of the source, durably; and a
/// mirror that goes on has noticed what others did.
pub(super) fn commit(host: &mut Host, old: Option<&MountState>, new: &MountState) {
    for state in &new.volumes {
        let Some(before) = old.and_then(|old| old.volume(&state.name)) else { continue };
        if before.superseded.iter().any(|former| former.path == state.active) {
            // Undecided: any record that is written meanwhile has the old image, and both have all that guests wrote.
            continue;
        }
        if before.active != state.active {
            host.count("cutover");
            assert!(state.generation > before.generation, "rule 10: the generation is not raised");
            let former = state.superseded.iter().any(|former| former.path == before.active);
            assert!(former, "rule 10: {} is not superseded by {}", before.active, state.active);
            same(host, &before.active, &state.active);
        } else if let (Some(mirror), None, Some(last)) = (&before.mirror, &state.mirror, &state.last_mirror) {
            // Not what the record says of a mirror before one that did not start.
            if last.result == MirrorResult::Finished && last.target == mirror.options.target {
                same(host, &state.active, &mirror.options.target);
            }
        }
        if let Some(mirror) = &state.mirror {
            // It is raised when it goes on, and when it is left: after both images were looked at.
            let known = before.mirror.as_ref().filter(|known| known.job == mirror.job);
            if known.is_some_and(|known| mirror.generation > known.generation) {
                match &mirror.compare {
                    Some(_) => {
                        if host.foreign.remove(&mirror.job) {
                            host.count("foreign change noticed");
                        }
                    }
                    None => assert!(
                        !host.foreign.contains(&mirror.job),
                        "rule 11: the mirror of {} goes on, and a foreign change was not noticed",
                        state.name
                    ),
                }
            }
        }
    }
}

fn same(host: &Host, source: &str, target: &str) {
    let find = |name| host.find_disk(name).map(|disk| &host.disks[disk]);
    let (Some(source), Some(target)) = (find(source), find(target)) else { panic!("rule 15: an image is not there") };
    let used: BTreeSet<u64> = source.used().chain(target.used()).collect();
    for sector in used {
        let (has, left) = (source.read(sector), target.candidates(sector).collect::<Vec<_>>());
        let mut found = left.iter().copied().chain(target.arriving(sector));
        assert!(
            found.all(|tag| tag == has),
            "rules 5 and 7: at the commit {} has {has:x} in sector {sector}, and {} may have {left:x?}",
            source.name,
            target.name,
        );
    }
}

/// Rule 7: a guest's flush has returned while guests wait for both images: what was written before is durable in the target too.
pub(super) fn flushed_to_both(host: &Host, volume: usize, sector: u64, begun: u64) {
    let Some(record) = host.record() else { return };
    let state = &record.volumes[volume];
    let Some(mirror) = &state.mirror else { return };
    if !host.ready.contains(&mirror.options.job_id) {
        return;
    }
    let find = |name: &str| host.find_disk(name).map(|disk| &host.disks[disk]);
    let (Some(source), Some(target)) = (find(&state.active), find(&mirror.options.target)) else { return };
    if !host.oracles[volume].settled_before(begun).contains(&sector) {
        return;
    }
    let (has, left) = (source.read(sector), target.candidates(sector).collect::<Vec<_>>());
    assert!(
        left.iter().all(|tag| *tag == has),
        "rule 7: a flush in write-blocking mode has returned, {} has {has:x} in sector {sector}, and {} may have {left:x?}",
        source.name,
        target.name,
    );
}
