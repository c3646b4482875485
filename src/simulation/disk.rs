//! A simulated image's store: sectors behind a volatile cache, attributes, times, and the writes that are under way.
//!
//! What a sector holds is one number, its *tag*: 0 for zeroes, else that of the write that it comes from.

use std::collections::{BTreeMap, BTreeSet};

use super::dice::Dice;
use super::volatile::Volatile;

/// What is written wholly or not at all, and allocated.
pub(super) const SECTOR_BYTES: u64 = 4096;

pub(super) type Tag = u64;

/// What goes wrong with it, and when.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// So many requests from now, and with what errno: 0: it only takes long.
    pub(super) read: Option<(u32, i32)>,
    pub(super) write: Option<(u32, i32)>,
    pub(super) flush: Option<(u32, i32)>,
    /// The connection is lost with a write or flush that many requests from now, and with it what was not flushed.
    pub(super) connection: Option<u32>,
    /// The connection is lost: everything fails until a flush has said so.
    pub(super) lost: bool,
}

/// A write that is under way.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    pub(super) number: u64,
    pub(super) life: u32,
    pub(super) first: u64,
    /// Sectors that are in the cache.
    pub(super) done: u64,
    /// Those that are not yet.
    pub(super) tags: Vec<Tag>,
}

/// See the module.
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) size_bytes: u64,
    /// Those that were ever written.
    sectors: Vec<Option<Volatile<Tag>>>,
    unsettled: BTreeSet<u64>,
    pub(super) attributes: BTreeMap<String, Volatile<Option<Vec<u8>>>>,
    pub(super) changed_ns: i64,
    /// Which file it is.
    pub(super) number: u64,
    /// It can free what it zeroes.
    pub(super) thin: bool,
    pub(super) locked_by: Option<u32>,
    pub(super) flights: Vec<Flight>,
    pub(super) faults: Faults,
    /// How often the connection was lost.
    pub(super) losses: u64,
}

impl Disk {
    pub(super) fn new(name: String, size_bytes: u64, number: u64, changed_ns: i64, thin: bool) -> Disk {
        Disk {
            name,
            size_bytes,
            sectors: vec![None; (size_bytes / SECTOR_BYTES) as usize],
            unsettled: BTreeSet::new(),
            attributes: BTreeMap::new(),
            changed_ns,
            number,
            thin,
            locked_by: None,
            flights: Vec::new(),
            faults: Faults::default(),
            losses: 0,
        }
    }

    pub(super) fn read(&self, sector: u64) -> Tag {
        self.sectors[sector as usize].as_ref().map_or(0, |held| *held.latest())
    }

    pub(super) fn write(&mut self, sector: u64, tag: Tag) {
        self.sectors[sector as usize].get_or_insert_with(|| Volatile::new(0)).write(tag);
        self.unsettled.insert(sector);
    }

    /// On the disk, whoever did it.
    pub(super) fn set(&mut self, sector: u64, tag: Tag) {
        self.sectors[sector as usize].get_or_insert_with(|| Volatile::new(0)).set(tag);
        self.unsettled.remove(&sector);
    }

    /// Sectors that were ever written.
    pub(super) fn used(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.sectors).filter(|(_, held)| held.is_some()).map(|(sector, _)| sector)
    }

    /// What a power cut may leave there.
    pub(super) fn candidates(&self, sector: u64) -> impl Iterator<Item = Tag> + '_ {
        let held = self.sectors[sector as usize].as_ref();
        held.map_or(Some(0), |_| None).into_iter().chain(held.into_iter().flat_map(|held| held.candidates().copied()))
    }

    /// What writes under way may bring there yet.
    pub(super) fn arriving(&self, sector: u64) -> impl Iterator<Item = Tag> + '_ {
        self.flights.iter().filter_map(move |flight| {
            let at = sector.checked_sub(flight.first + flight.done)?;
            flight.tags.get(at as usize).copied()
        })
    }

    /// The first sector from `from` on that does not read as zeroes.
    pub(super) fn next_data(&self, from: u64) -> Option<u64> {
        let held = self.sectors.get(from as usize..)?;
        held.iter().position(|held| held.as_ref().is_some_and(|held| *held.latest() != 0)).map(|at| from + at as u64)
    }

    pub(super) fn begin_flush(&self) -> Vec<(u64, u64)> {
        let begun = |sector: &u64| Some((*sector, self.sectors[*sector as usize].as_ref()?.begin_flush()));
        self.unsettled.iter().filter_map(begun).collect()
    }

    pub(super) fn end_flush(&mut self, begun: &[(u64, u64)], succeeded: bool) {
        for (sector, begun) in begun {
            let Some(held) = &mut self.sectors[*sector as usize] else { continue };
            if succeeded {
                held.flushed(*begun)
            } else {
                held.flush_failed(*begun)
            }
            if held.is_settled() {
                self.unsettled.remove(sector);
            }
        }
    }

    /// The end of a write that nobody waits for any more: some of it, or all, or nothing.
    pub(super) fn land(&mut self, flight: usize, dice: &mut Dice) {
        let flight = self.flights.swap_remove(flight);
        let how = dice.below(4);
        let cut = dice.below(flight.tags.len() as u64 + 1);
        for (at, tag) in (0..).zip(flight.tags) {
            if how == 0 || (how == 1 && at < cut) || (how == 2 && dice.percent(50)) {
                self.write(flight.first + flight.done + at, tag);
            }
        }
    }

    /// The cache forgets.
    pub(super) fn cut(&mut self, dice: &mut Dice) {
        for sector in std::mem::take(&mut self.unsettled) {
            if let Some(held) = &mut self.sectors[sector as usize] {
                held.cut(dice);
            }
        }
    }

    /// The cache drops what it takes for clean; returns where something else may be read now.
    pub(super) fn drop_clean(&mut self, dice: &mut Dice) -> Vec<u64> {
        let sectors: Vec<u64> = self.unsettled.iter().copied().collect();
        let mut dropped = Vec::new();
        for sector in sectors {
            if self.sectors[sector as usize].as_mut().is_some_and(|held| held.drop_clean(dice)) {
                self.unsettled.remove(&sector);
                dropped.push(sector);
            }
        }
        dropped
    }

    /// The machine's power is cut.
    pub(super) fn power_cut(&mut self, dice: &mut Dice) {
        while !self.flights.is_empty() {
            self.land(0, dice);
        }
        self.cut(dice);
        self.attributes.values_mut().for_each(|attribute| attribute.cut(dice));
        self.locked_by = None;
        self.faults = Faults::default();
    }
}
