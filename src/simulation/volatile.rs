//! One thing that a disk keeps behind a cache that forgets: a sector, a name, an attribute.
//!
//! ```text
//! versions:   [ durable | written | written | ... | latest ]       what is read is the latest; a power cut leaves any of them
//! flush:      the latest that was there when it began, and all after it, stay
//! failed:     what was there is clean for the cache, and perhaps on the disk: no later flush writes it (Linux says it once)
//! ```

use super::dice::Dice;

#[derive(Clone, Debug)]
struct Version<T> {
    value: T,
    lost: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Volatile<T> {
    versions: Vec<Version<T>>,
    /// How many versions there were before those.
    before: u64,
}

impl<T: Clone + PartialEq> Volatile<T> {
    pub(super) fn new(durable: T) -> Self {
        Volatile { versions: vec![Version { value: durable, lost: false }], before: 0 }
    }

    pub(super) fn latest(&self) -> &T {
        &self.versions[self.versions.len() - 1].value
    }

    pub(super) fn write(&mut self, value: T) {
        self.versions.push(Version { value, lost: false });
    }

    /// True if a power cut leaves what is read.
    pub(super) fn is_settled(&self) -> bool {
        self.versions.len() == 1
    }

    /// What a power cut may leave.
    pub(super) fn candidates(&self) -> impl Iterator<Item = &T> {
        self.versions.iter().map(|version| &version.value)
    }

    /// A flush begins: what it covers.
    pub(super) fn begin_flush(&self) -> u64 {
        self.before + self.versions.len() as u64
    }

    fn covered(&self, begun: u64) -> usize {
        begun.saturating_sub(self.before).min(self.versions.len() as u64) as usize
    }

    pub(super) fn flushed(&mut self, begun: u64) {
        let proven = (0..self.covered(begun)).rev().find(|at| !self.versions[*at].lost).unwrap_or(0);
        self.versions.drain(..proven);
        self.before += proven as u64;
    }

    pub(super) fn flush_failed(&mut self, begun: u64) {
        for at in 1..self.covered(begun) {
            self.versions[at].lost = true;
        }
    }

    /// A flush of this alone that takes no time.
    pub(super) fn flush(&mut self) {
        self.flushed(self.begin_flush());
    }

    /// The power is cut. What is left is on the disk.
    pub(super) fn cut(&mut self, dice: &mut Dice) {
        let left = dice.below(self.versions.len() as u64) as usize;
        self.set(self.versions[left].value.clone());
    }

    /// The cache drops what it takes for clean. True if what is read may be another thing now: a flush of it had failed.
    pub(super) fn drop_clean(&mut self, dice: &mut Dice) -> bool {
        let lost = self.versions[self.versions.len() - 1].lost;
        if lost {
            self.cut(dice);
        }
        lost
    }

    /// On the disk, whatever was there.
    pub(super) fn set(&mut self, value: T) {
        *self = Volatile { before: self.begin_flush(), ..Volatile::new(value) };
    }
}
