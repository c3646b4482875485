//! What a service manager keeps of a mount while no process of it lives: the descriptors, each under a name, and the keeper's table,
//! in memory, which says what they are.
//!
//! ```text
//! keeper: everything that it has, at every change ---> descriptors, table     (SIGTERM, SIGKILL: nothing is lost)
//! next keeper: started with them (LISTEN_FDS) -------> the same table as at an upgrade, with names for numbers: goes on
//! ```
//!
//! What is not kept any more goes first: a manager does not keep an open file twice, under whichever name, and a server parks again
//! what it was handed. Then come new descriptors, then the table that names them. A table may so name something that is gone, for
//! one moment, and nothing that is something else: a keeper that finds that does without. It is written in place, into memory that the manager holds open: two halves in turn, each with a checksum, so that a
//! keeper that is killed while it writes leaves the half before.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::manager::Manager;

/// In front of every name.
const PREFIX: &str = "livemirror-";
/// The table's name.
pub(super) const TABLE: &str = "livemirror-table";

/// Bytes of a half: 24 of head (length, sequence, checksum), then the table.
const HALF_BYTES: u64 = 1 << 20;
const HEAD_BYTES: u64 = 24;

/// One descriptor of a keeper's.
pub(super) struct Item<'a> {
    /// What it is, in a word, for who looks at the store.
    pub(super) kind: &'static str,
    /// The same as long as it is the same one, and never that of another.
    pub(super) id: String,
    pub(super) descriptor: BorrowedFd<'a>,
}

impl<'a> Item<'a> {
    /// `kind` and `what` together tell it from others: its number does so only until that is used again.
    pub(super) fn new(kind: &'static str, what: &str, descriptor: BorrowedFd<'a>) -> Item<'a> {
        Item { kind, id: format!("{} {kind} {what}", descriptor.as_raw_fd()), descriptor }
    }
}

/// See the module.
pub(super) struct Store {
    memory: Memory,
    /// The manager has the table.
    handed: bool,
    /// All that there is was sent, and nothing failed since.
    complete: bool,
    entries: Vec<Entry>,
    next: RawFd,
}

/// A descriptor that the manager keeps.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Entry {
    id: String,
    /// What the table calls it.
    key: RawFd,
    name: String,
}

/// The number in the name of a descriptor of ours.
pub(super) fn key_of(name: &str) -> Option<RawFd> {
    name.strip_prefix(PREFIX)?.rsplit_once('-')?.1.parse().ok()
}

impl Store {
    /// An empty one.
    ///
    /// # Errors
    /// No memory or no descriptors are left.
    pub(super) fn new() -> Result<Store> {
        Ok(Store { memory: Memory::create()?, handed: false, complete: false, entries: Vec::new(), next: 1 })
    }

    /// The one whose table is `memory`; `entries` is what is known to be in it.
    pub(super) fn known(memory: OwnedFd, entries: Vec<Entry>, next: RawFd) -> Store {
        Store { memory: Memory::of(memory), handed: true, complete: false, entries, next }
    }

    /// For a keeper that has taken `names` by their keys: `items` is what it has now, `keys` tells which number is which.
    /// What nobody has taken is let go.
    pub(super) fn taken(
        memory: OwnedFd,
        names: &BTreeMap<RawFd, String>,
        items: &[Item<'_>],
        keys: &BTreeMap<RawFd, RawFd>,
        manager: &Manager,
    ) -> Store {
        let entry = |item: &Item<'_>| {
            let key = *keys.get(&item.descriptor.as_raw_fd())?;
            Some(Entry { id: item.id.clone(), key, name: names.get(&key)?.clone() })
        };
        let entries: Vec<Entry> = items.iter().filter_map(entry).collect();
        for (_, name) in names.iter().filter(|(key, _)| !entries.iter().any(|entry| entry.key == **key)) {
            manager.forget(name);
        }
        Store::known(memory, entries, names.keys().max().map_or(1, |key| key + 1))
    }

    /// The table's memory, and what is in the store, for a keeper that replaces itself.
    pub(super) fn parts(&self) -> (&File, &[Entry], RawFd) {
        (&self.memory.file, &self.entries, self.next)
    }

    /// True if the manager was handed all that there is, and the table of it.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Lets `manager` have exactly `items`, and a table that `write` makes with their keys (by the numbers of the descriptors).
    pub(super) fn keep(
        &mut self,
        manager: &Manager,
        items: &[Item<'_>],
        write: impl FnOnce(&BTreeMap<RawFd, RawFd>) -> Vec<u8>,
    ) {
        self.complete = false;
        self.entries.retain(|entry| {
            let used = items.iter().any(|item| item.id == entry.id);
            if !used {
                manager.forget(&entry.name);
            }
            used
        });
        let mut keys = BTreeMap::new();
        let mut failed = |error: &Error| log::warn!("the service manager cannot be given what it is to keep: {error}");
        for item in items {
            let known = self.entries.iter().find(|entry| entry.id == item.id).map(|entry| entry.key);
            let key = known.or_else(|| {
                let key = self.next;
                let name = format!("{PREFIX}{}-{key}", item.kind);
                // What fails is tried again at the next change; the table does not name it.
                manager.keep(&name, item.descriptor).inspect_err(&mut failed).ok()?;
                self.next += 1;
                self.entries.push(Entry { id: item.id.clone(), key, name });
                Some(key)
            });
            if let Some(key) = key {
                keys.insert(item.descriptor.as_raw_fd(), key);
            }
        }
        if let Err(error) = self.memory.write(&write(&keys)) {
            return failed(&error);
        }
        if !self.handed {
            self.handed = manager.keep(TABLE, self.memory.file.as_fd()).inspect_err(&mut failed).is_ok();
        }
        self.complete = self.handed && items.iter().all(|item| keys.contains_key(&item.descriptor.as_raw_fd()));
    }

    /// Lets the manager close everything: the mount has ended.
    pub(super) fn empty(&mut self, manager: &Manager) {
        for entry in self.entries.drain(..) {
            manager.forget(&entry.name);
        }
        manager.forget(TABLE);
    }
}

/// The table's memory.
struct Memory {
    file: File,
    sequence: u64,
}

impl Memory {
    fn create() -> Result<Memory> {
        Ok(Memory { file: memfd_create("table", MFdFlags::MFD_CLOEXEC)?.into(), sequence: 0 })
    }

    fn of(memory: OwnedFd) -> Memory {
        let file = File::from(memory);
        let sequence = newest(&file).map_or(0, |(sequence, _)| sequence);
        Memory { file, sequence }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 > HALF_BYTES - HEAD_BYTES {
            return Err(Error::from_raw_os_error(libc::EFBIG));
        }
        let sequence = self.sequence + 1;
        let at = sequence % 2 * HALF_BYTES;
        self.file.write_all_at(bytes, at + HEAD_BYTES)?;
        let head = [bytes.len() as u64, sequence, xxh3_64_with_seed(bytes, sequence)];
        self.file.write_all_at(head.map(u64::to_le_bytes).as_flattened(), at)?;
        self.sequence = sequence;
        Ok(())
    }
}

/// The last table that was written wholly.
pub(super) fn read(memory: impl AsFd) -> Option<Vec<u8>> {
    let file = File::from(memory.as_fd().try_clone_to_owned().ok()?);
    newest(&file).map(|(_, bytes)| bytes)
}

fn newest(file: &File) -> Option<(u64, Vec<u8>)> {
    let half = |number: u64| {
        let mut head = [[0; 8]; 3];
        file.read_exact_at(head.as_flattened_mut(), number * HALF_BYTES).ok()?;
        let [len, sequence, sum] = head.map(u64::from_le_bytes);
        let mut bytes = vec![0; usize::try_from(len).ok().filter(|_| len <= HALF_BYTES - HEAD_BYTES)?];
        file.read_exact_at(&mut bytes, number * HALF_BYTES + HEAD_BYTES).ok()?;
        (sum == xxh3_64_with_seed(&bytes, sequence) && sequence % 2 == number && sequence > 0)
            .then_some((sequence, bytes))
    };
    [half(0), half(1)].into_iter().flatten().max_by_key(|(sequence, _)| *sequence)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_table_half_written_is_the_one_before() {
        let mut memory = Memory::create().unwrap();
        assert_eq!(read(&memory.file), None);
        for text in ["one", "another", "the third"] {
            memory.write(text.as_bytes()).unwrap();
            assert_eq!(read(&memory.file).unwrap(), text.as_bytes());
        }
        // The fourth: killed before its head was written, then in the middle of it.
        memory.file.write_all_at(b"four", HEAD_BYTES).unwrap();
        assert_eq!(read(&memory.file).unwrap(), b"the third");
        memory.file.write_all_at(&4_u64.to_le_bytes(), 0).unwrap();
        assert_eq!(read(&memory.file).unwrap(), b"the third");
        let again = Memory::of(memory.file.try_clone().unwrap().into());
        assert_eq!(again.sequence, 3);
        assert!(memory.write(&vec![0; 2 << 20]).is_err());
    }

    /// What is not sent is not kept, however little: a mount may be left to the manager only if it has all.
    #[test]
    fn complete_is_what_was_wholly_sent() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let manager = Manager::of(ours);
        let files = [(); 2].map(|()| File::open("/dev/null").unwrap());
        let items = |count: usize| -> Vec<Item<'_>> {
            files[..count].iter().map(|file| Item::new("image", "", file.as_fd())).collect()
        };
        let mut store = Store::new().unwrap();
        assert!(!store.is_complete());
        store.keep(&manager, &items(1), |_| b"one".to_vec());
        assert!(store.is_complete());
        // It does not read any more, until nothing fits in.
        while manager.keep("filler", files[0].as_fd()).is_ok() {}
        store.keep(&manager, &items(2), |_| b"two".to_vec());
        assert!(!store.is_complete());
        theirs.set_nonblocking(true).unwrap();
        while theirs.recv(&mut [0; 4096]).is_ok() {}
        store.keep(&manager, &items(2), |_| b"two".to_vec());
        assert!(store.is_complete(), "what had failed was sent again");
        store.keep(&manager, &items(2), |_| vec![0; 2 << 20]);
        assert!(!store.is_complete(), "the table is not of now");
        drop(theirs);
        let mut gone = Store::new().unwrap();
        gone.keep(&manager, &items(2), |_| b"two".to_vec());
        assert!(!gone.is_complete());
    }

    #[test]
    fn names_carry_keys() {
        assert_eq!(key_of("livemirror-image-17"), Some(17));
        assert_eq!([TABLE, "image-17", "livemirror-17", "livemirror-image-x"].map(key_of), [None; 4]);
    }
}
