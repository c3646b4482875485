//! The simulated file system of the state directory: names and blocks behind a volatile cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::dice::Dice;
use super::volatile::Volatile;

const BLOCK_BYTES: usize = 512;

/// What goes wrong with it, so many operations of that kind from now.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Faults {
    /// A record cannot be written aside.
    pub(super) stage: Option<u32>,
    /// A rename says that it failed, whether it was made or not.
    pub(super) rename: Option<(u32, bool)>,
    /// The same with the next rename that makes a cutover.
    pub(super) cutover: Option<bool>,
    pub(super) log_write: Option<u32>,
    pub(super) log_sync: Option<u32>,
    /// The log's fdatasync takes so many seconds.
    pub(super) log_stall: Option<(u32, u64)>,
}

impl Faults {
    /// Counts one operation; true: it is this one that fails.
    pub(super) fn due(counter: &mut Option<u32>) -> bool {
        match counter {
            Some(0) => {
                *counter = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Files {
    names: BTreeMap<PathBuf, Volatile<Option<usize>>>,
    files: Vec<Vec<Volatile<Vec<u8>>>>,
    pub(super) faults: Faults,
}

impl Files {
    /// A new file under that name, in place of what was there.
    pub(super) fn create(&mut self, path: &Path) -> usize {
        self.files.push(Vec::new());
        let file = self.files.len() - 1;
        self.name(path, Some(file));
        file
    }

    pub(super) fn find(&self, path: &Path) -> Option<usize> {
        self.names.get(path).and_then(|name| *name.latest())
    }

    pub(super) fn name(&mut self, path: &Path, file: Option<usize>) {
        self.names.entry(path.to_owned()).or_insert_with(|| Volatile::new(None)).write(file);
    }

    pub(super) fn read(&self, file: usize) -> Vec<u8> {
        self.files[file].iter().flat_map(|block| block.latest().iter().copied()).collect()
    }

    pub(super) fn write(&mut self, file: usize, offset: usize, bytes: &[u8]) {
        for (at, block) in (offset / BLOCK_BYTES..).zip(bytes.chunks(BLOCK_BYTES)) {
            while self.files[file].len() <= at {
                self.files[file].push(Volatile::new(Vec::new()));
            }
            self.files[file][at].write(block.to_vec());
        }
    }

    pub(super) fn begin_sync(&self, file: usize) -> Vec<u64> {
        self.files[file].iter().map(Volatile::begin_flush).collect()
    }

    pub(super) fn end_sync(&mut self, file: usize, begun: &[u64], succeeded: bool) {
        for (block, begun) in self.files[file].iter_mut().zip(begun) {
            if succeeded { block.flushed(*begun) } else { block.flush_failed(*begun) }
        }
    }

    /// The names of a directory become durable.
    pub(super) fn sync_names(&mut self, directory: &Path) {
        let inside = self.names.iter_mut().filter(|(path, _)| path.parent() == Some(directory));
        inside.for_each(|(_, name)| name.flush());
    }

    pub(super) fn names(&self, directory: &Path) -> Vec<String> {
        let there = self.names.iter().filter(|(_, name)| name.latest().is_some());
        let inside = there.filter(|(path, _)| path.parent() == Some(directory));
        inside.filter_map(|(path, _)| Some(path.file_name()?.to_str()?.to_owned())).collect()
    }

    /// The files that a power cut may leave under that name; without one, the one that is there.
    pub(super) fn candidates(&self, path: &Path, power_cut: bool) -> Vec<Option<usize>> {
        match self.names.get(path) {
            Some(name) if power_cut => name.candidates().copied().collect(),
            Some(name) => vec![*name.latest()],
            None => vec![None],
        }
    }

    /// What a power cut may leave of a file's first block; without one, what is there.
    pub(super) fn first_blocks(&self, file: usize, power_cut: bool) -> Vec<&[u8]> {
        match self.files[file].first() {
            Some(block) if power_cut => block.candidates().map(Vec::as_slice).collect(),
            Some(block) => vec![block.latest()],
            None => vec![&[]],
        }
    }

    /// The machine's power is cut. A block may be left torn.
    pub(super) fn power_cut(&mut self, dice: &mut Dice) {
        self.names.values_mut().for_each(|name| name.cut(dice));
        for block in self.files.iter_mut().flatten().filter(|block| !block.is_settled()) {
            if dice.percent(20) {
                let (old, new) = (block.candidates().next().cloned().unwrap_or_default(), block.latest().clone());
                let at = dice.below(BLOCK_BYTES as u64 + 1) as usize;
                let torn = new.iter().take(at).chain(old.iter().skip(at)).copied().collect();
                block.set(torn);
            } else {
                block.cut(dice);
            }
        }
        self.faults = Faults::default();
    }
}
