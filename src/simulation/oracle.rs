//! What guests may expect of one disk, sector by sector (rules 5 and 7).
//!
//! Each write of a sector is an entry. One that was acknowledged takes the place of all that had ended before it began; a read returns
//! one that nothing had taken the place of when the read began. What a flush has covered is not forgotten by a power cut.

use super::disk::Tag;

#[derive(Clone, Debug)]
struct Entry {
    tag: Tag,
    begun: u64,
    /// When it was answered.
    ended: Option<u64>,
    acknowledged: bool,
    /// A flush has promised it.
    durable: bool,
    /// A flush that covered it has failed, and said so.
    forsaken: bool,
    /// Since when another one is in its place.
    replaced: Option<u64>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Oracle {
    /// No entry: never written, and zeroes.
    sectors: Vec<Vec<Entry>>,
    clock: u64,
}

impl Oracle {
    /// What is on a new disk.
    pub(super) fn settle(&mut self, sector: u64, tag: Tag) {
        let entry =
            Entry { tag, begun: 0, ended: Some(0), acknowledged: true, durable: true, forsaken: false, replaced: None };
        *self.entries(sector) = vec![entry];
    }

    /// After a flush that failed there is `tag` on the disk. What is under way may still come.
    pub(super) fn settle_left(&mut self, sector: u64, tag: Tag) {
        let under_way: Vec<Entry> =
            self.entries(sector).iter().filter(|entry| entry.ended.is_none()).cloned().collect();
        self.settle(sector, tag);
        self.entries(sector).extend(under_way);
    }

    /// A moment of its own.
    pub(super) fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn entries(&mut self, sector: u64) -> &mut Vec<Entry> {
        if self.sectors.len() <= sector as usize {
            self.sectors.resize(sector as usize + 1, Vec::new());
        }
        &mut self.sectors[sector as usize]
    }

    fn known(&self, sector: u64) -> Option<&[Entry]> {
        self.sectors.get(sector as usize).map(Vec::as_slice).filter(|entries| !entries.is_empty())
    }

    /// Those that were ever written.
    pub(super) fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        (0..).zip(&self.sectors).filter(|(_, entries)| !entries.is_empty()).map(|(sector, _)| sector)
    }

    pub(super) fn begin_write(&mut self, first: u64, count: u64, tag: Tag, begun: u64) {
        for sector in first..first + count {
            if self.known(sector).is_none() {
                self.settle(sector, 0);
            }
            let entry =
                Entry { tag, begun, ended: None, acknowledged: false, durable: false, forsaken: false, replaced: None };
            self.entries(sector).push(entry);
        }
    }

    /// The write that began at `begun` has been answered. Not told by its tag: all zeroes have one.
    pub(super) fn end_write(&mut self, first: u64, count: u64, begun: u64, acknowledged: bool) {
        let now = self.now();
        for sector in first..first + count {
            let entries = self.entries(sector);
            let Some(entry) = entries.iter_mut().rev().find(|entry| entry.begun == begun && entry.ended.is_none())
            else {
                continue;
            };
            entry.ended = Some(now);
            entry.acknowledged = acknowledged;
            if acknowledged {
                let before = |entry: &&mut Entry| entry.ended.is_some_and(|ended| ended < begun);
                for entry in entries.iter_mut().filter(before) {
                    entry.replaced.get_or_insert(now);
                }
            }
        }
    }

    /// A read that began at `begun` has returned `tag`.
    pub(super) fn check_read(&self, sector: u64, tag: Tag, begun: u64) -> Result<(), String> {
        let Some(entries) = self.known(sector) else {
            return if tag == 0 { Ok(()) } else { Err(format!("sector {sector} reads {tag:x} and was never written")) };
        };
        let fits = |entry: &Entry| entry.tag == tag && entry.replaced.is_none_or(|replaced| replaced >= begun);
        if entries.iter().any(fits) {
            return Ok(());
        }
        Err(format!("sector {sector} reads {tag:x}, not {}", Self::show(entries)))
    }

    /// A flush that began at `begun` has ended: what was acknowledged before is promised, or is not any more.
    pub(super) fn end_flush(&mut self, begun: u64, succeeded: bool) {
        for entry in self.sectors.iter_mut().flatten() {
            match succeeded {
                true => {
                    let covered = entry.acknowledged && entry.ended.is_some_and(|ended| ended < begun);
                    entry.durable |= covered && !entry.forsaken;
                }
                false => entry.forsaken = true,
            }
        }
    }

    /// Forgets what neither a power cut nor a read that is under way since `oldest` can find.
    pub(super) fn forget(&mut self, oldest: u64) {
        for entries in self.sectors.iter_mut().filter(|entries| entries.len() > 1) {
            let newest = entries.iter().filter(|entry| entry.durable).map(|entry| entry.begun).max().unwrap_or(0);
            let outdone = |entry: &Entry| entry.ended.is_some_and(|ended| ended < newest);
            entries.retain(|entry| !outdone(entry) || entry.replaced.is_none_or(|replaced| replaced >= oldest));
        }
    }

    /// A write that was to be durable has been answered.
    pub(super) fn end_flush_of(&mut self, first: u64, count: u64, tag: Tag, begun: u64, succeeded: bool) {
        if !succeeded {
            return self.end_flush(begun, false);
        }
        for sector in first..first + count {
            for entry in self.entries(sector) {
                let before = entry.tag == tag || entry.ended.is_some_and(|ended| ended < begun);
                entry.durable |= entry.acknowledged && !entry.forsaken && before;
            }
        }
    }

    /// Sectors in which nothing was under way since `begun`.
    pub(super) fn settled_before(&self, begun: u64) -> Vec<u64> {
        let settled = |entries: &[Entry]| entries.iter().all(|entry| entry.ended.is_some_and(|ended| ended < begun));
        self.sectors().filter(|sector| self.known(*sector).is_some_and(settled)).collect()
    }

    /// Whether a power cut may leave `tag` there.
    pub(super) fn check_left(&self, sector: u64, tag: Tag) -> Result<(), String> {
        let Some(entries) = self.known(sector) else {
            return if tag == 0 { Ok(()) } else { Err(format!("sector {sector} has {tag:x} and was never written")) };
        };
        let newest = entries.iter().filter(|entry| entry.durable).map(|entry| entry.begun).max().unwrap_or(0);
        let outdone = |entry: &Entry| entry.ended.is_some_and(|ended| ended < newest);
        if entries.iter().any(|entry| entry.tag == tag && !outdone(entry)) {
            return Ok(());
        }
        Err(format!("a power cut leaves {tag:x} in sector {sector}, where {} were written", Self::show(entries)))
    }

    /// The guests are gone: what was not answered never will be.
    pub(super) fn give_up(&mut self) {
        let now = self.now();
        for entry in self.sectors.iter_mut().flatten() {
            entry.ended.get_or_insert(now);
        }
    }

    fn show(entries: &[Entry]) -> String {
        let show = |entry: &Entry| {
            let flags = [(entry.durable, "durable"), (entry.forsaken, "forsaken"), (!entry.acknowledged, "unanswered")];
            let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| format!(" {flag}")).collect();
            format!(
                "{:x} ({}..{}{flags})",
                entry.tag,
                entry.begun,
                entry.ended.map_or(String::new(), |at| at.to_string())
            )
        };
        entries.iter().map(show).collect::<Vec<_>>().join(", ")
    }
}
