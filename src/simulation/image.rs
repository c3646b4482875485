//! Simulated images behind the [`Image`] trait: each request is under way for a while, and other tasks go on meanwhile.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use super::disk::{Faults, SECTOR_BYTES, Tag};
use super::files;
use super::host::{descriptor, host};
use super::schedule::{life, pause};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{
    Attributes, DescriptorRole, Extent, ExtentStatus, Format, Identity, Image, Layout, OpenOptions, Properties, Role,
    Room, check_bounds,
};
use crate::range::ByteRange;
use crate::sync::{Arc, thread};

#[derive(Debug)]
struct SimulatedImage {
    disk: usize,
    life: u32,
    name: String,
    size_bytes: u64,
    writable: bool,
    locks: bool,
}

/// The image of that name.
///
/// # Errors
/// There is none; somebody else has locked it.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>> {
    pause();
    let name = path.display().to_string();
    let life = life();
    let locks = options.role != Role::Observer && options.writable;
    let opened = host(|host| {
        let Some(disk) = host.find_disk(&name) else {
            return Err(Error::new(ErrorKind::NotFound, "there is no such image:").on(&name));
        };
        if locks {
            if host.disks[disk].locked_by.is_some_and(|by| by == life) {
                return Err(Error::new(ErrorKind::Locked, "the image is in use:").on(&name));
            }
            // The fence: the last request of the server before it has returned.
            host.land_all(disk);
            host.disks[disk].locked_by = Some(life);
        }
        Ok((disk, host.disks[disk].size_bytes))
    });
    let (disk, size_bytes) = opened?;
    Ok(Arc::new(SimulatedImage { disk, life, name, size_bytes, writable: options.writable, locks }))
}

/// A new image, all of it a hole.
///
/// # Errors
/// As [`open`].
pub fn create(
    path: &Path,
    size_bytes: u64,
    _like: Option<&Attributes>,
    _layout: &Layout,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>> {
    host(|host| host.create_disk(&path.display().to_string(), size_bytes));
    open(path, options)
}

/// The names of images are durable at once.
///
/// # Errors
/// None.
#[allow(clippy::unnecessary_wraps, reason = "as the real one")]
pub fn sync_parent_directory(_path: &Path) -> Result<()> {
    Ok(())
}

impl Drop for SimulatedImage {
    fn drop(&mut self) {
        if self.locks {
            host(|host| {
                let locked_by = &mut host.disks[self.disk].locked_by;
                *locked_by = locked_by.filter(|by| *by != self.life);
            });
        }
    }
}

fn sectors(range: ByteRange) -> (u64, u64) {
    assert!(range.start() % SECTOR_BYTES == 0 && range.end() % SECTOR_BYTES == 0, "{range:?}");
    (range.start() / SECTOR_BYTES, range.len() / SECTOR_BYTES)
}

impl SimulatedImage {
    fn error(&self, what: &str, range: Option<ByteRange>, errno: i32) -> Error {
        let error = Error::io(what, &std::io::Error::from_raw_os_error(errno)).on(&self.name);
        range.into_iter().fold(error, Error::at)
    }

    /// A request that was under way when the connection was lost fails, however late it was answered.
    fn losses(&self) -> u64 {
        host(|host| host.disks[self.disk].losses)
    }

    /// Counts a request; what comes of it.
    fn fault(&self, which: fn(&mut Faults) -> &mut Option<(u32, i32)>, connected: bool) -> Option<i32> {
        let errno = host(|host| {
            // What fails of a target: two failures at once, of the record and of what it may name, nobody survives.
            let undecided = host.records(true).len() > 1 && host.may_be_active(self.disk);
            if undecided {
                return None;
            }
            let connected = connected && !host.may_be_active(self.disk);
            let faults = &mut host.disks[self.disk].faults;
            if connected && files::Faults::due(&mut faults.connection) {
                faults.lost = true;
                host.lose_connection(self.disk);
            }
            let faults = &mut host.disks[self.disk].faults;
            if faults.lost {
                return Some(libc::EIO);
            }
            match which(faults) {
                Some((0, errno)) => {
                    let errno = *errno;
                    *which(faults) = None;
                    Some(errno)
                }
                Some((left, _)) => {
                    *left -= 1;
                    None
                }
                None => None,
            }
        });
        if errno == Some(0) {
            let millis = host(|host| {
                host.note(&format!("disk {}: takes long", self.disk));
                // Some so long that a region cools meanwhile.
                let longest = host.dice.pick(&[3000, 6000, 60_000]);
                host.dice.below(longest)
            });
            thread::sleep(Duration::from_millis(millis));
            return None;
        }
        errno
    }

    fn change(&self, what: &str, range: ByteRange, tags: Vec<Tag>) -> Result<()> {
        check_bounds(self, what, range)?;
        assert!(self.writable, "{}: opened to be looked at", self.name);
        let (first, count) = sectors(range);
        let losses = self.losses();
        let number = host(|host| host.take_off(self.disk, self.life, first, tags));
        pause();
        let fault = self.fault(|faults| &mut faults.write, true);
        pause();
        // In two parts: others see the first without the second.
        let part = host(|host| host.dice.below(count + 1));
        host(|host| host.touch_down(self.disk, number, part, fault.is_some()));
        pause();
        host(|host| host.touch_down(self.disk, number, count, fault.is_some()));
        if host(|host| host.dice.below(4) == 0) {
            pause();
        }
        host(|host| host.land_at_last(self.disk, number));
        pause();
        let fault = fault.or((self.losses() != losses).then_some(libc::EIO));
        fault.map_or(Ok(()), |errno| Err(self.error(what, Some(range), errno)))
    }
}

impl Image for SimulatedImage {
    fn name(&self) -> &str {
        &self.name
    }

    fn format(&self) -> Format {
        Format::Raw
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn properties(&self) -> Properties {
        Properties {
            request_alignment: SECTOR_BYTES,
            cluster_bytes: Some(SECTOR_BYTES),
            thin_zeroing: host(|host| host.disks[self.disk].thin),
            writable: self.writable,
            resizable: false,
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        check_bounds(self, "read", range)?;
        pause();
        if let Some(errno) = self.fault(|faults| &mut faults.read, false) {
            return Err(self.error("cannot read", Some(range), errno));
        }
        let (first, count) = sectors(range);
        let part = host(|host| host.dice.below(count + 1));
        let mut read = |sectors: std::ops::Range<u64>| {
            host(|host| {
                for at in sectors {
                    let tag = host.disks[self.disk].read(first + at);
                    let place = (at * SECTOR_BYTES) as usize;
                    for word in buffer[place..place + SECTOR_BYTES as usize].chunks_mut(8) {
                        word.copy_from_slice(&tag.to_le_bytes());
                    }
                }
            });
        };
        read(0..part);
        pause();
        read(part..count);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let tag = |sector: &[u8]| {
            let tag = Tag::from_le_bytes(sector[..8].try_into().unwrap());
            assert!(sector.chunks(8).all(|word| word == tag.to_le_bytes()), "what is written is not of one write");
            tag
        };
        let tags = data.chunks(SECTOR_BYTES as usize).map(tag).collect();
        self.change("cannot write", ByteRange::new(offset, data.len() as u64), tags)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        self.change("cannot write zeroes to", range, vec![0; (range.len() / SECTOR_BYTES) as usize])
    }

    fn discard(&self, range: ByteRange) -> Result<()> {
        if !self.properties().thin_zeroing {
            return Err(Error::new(ErrorKind::Unsupported, "cannot discard").on(&self.name).at(range));
        }
        self.change("cannot discard", range, vec![0; (range.len() / SECTOR_BYTES) as usize])
    }

    fn allocate(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        pause();
        let losses = self.losses();
        let begun = host(|host| host.disks[self.disk].begin_flush());
        pause();
        let fault = self.fault(|faults| &mut faults.flush, true);
        let fault = fault.or((self.losses() != losses).then_some(libc::EIO));
        host(|host| host.end_flush(self.disk, &begun, fault.is_none()));
        pause();
        fault.map_or(Ok(()), |errno| Err(self.error("cannot flush", None, errno)))
    }

    fn extent_at(&self, offset: u64) -> Extent {
        pause();
        host(|host| {
            let disk = &host.disks[self.disk];
            let first = offset / SECTOR_BYTES;
            let (status, end) = match disk.next_data(first) {
                Some(found) if found == first => {
                    let holds = |sector: &u64| *sector * SECTOR_BYTES < self.size_bytes && disk.read(*sector) != 0;
                    (ExtentStatus::Data, (first..).find(|sector| !holds(sector)).unwrap_or(first))
                }
                next => (ExtentStatus::Hole, next.unwrap_or(self.size_bytes / SECTOR_BYTES)),
            };
            Extent { range: ByteRange::from_bounds(offset, (end * SECTOR_BYTES).min(self.size_bytes)), status }
        })
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(0)
    }

    fn resize(&self, _size_bytes: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "cannot resize").on(&self.name))
    }

    fn attributes(&self) -> Result<Attributes> {
        let then = std::time::UNIX_EPOCH;
        Ok(Attributes { mode: 0o600, uid: 0, gid: 0, modified: then, changed: then, accessed: then })
    }

    fn room(&self) -> Result<Room> {
        Ok(Room { available_bytes: 1 << 40, free_bytes: 1 << 40, total_bytes: 1 << 40 })
    }

    fn identity(&self) -> Result<Identity> {
        Ok(host(|host| {
            let disk = &host.disks[self.disk];
            let id = disk.attributes.get("user.livemirror.id").and_then(|id| id.latest().clone());
            Identity {
                id: id.and_then(|id| String::from_utf8(id).ok()),
                device: 1,
                inode: disk.number,
                birth_ns: Some(disk.number),
                size_bytes: disk.size_bytes,
            }
        }))
    }

    fn descriptors(&self) -> Vec<(DescriptorRole, BorrowedFd<'_>)> {
        vec![(DescriptorRole::Locked, descriptor(self.disk))]
    }
}
