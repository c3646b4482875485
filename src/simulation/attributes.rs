//! What the simulated file system keeps beside an image's bytes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::host::{disk_of, host};
use super::schedule::pause;
use super::volatile::Volatile;
use crate::state::Observation;

pub(crate) fn path(image: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", image.as_raw_fd())
}

pub(crate) fn get(image: BorrowedFd<'_>, name: &str) -> io::Result<Option<Vec<u8>>> {
    let disk = disk_of(image);
    Ok(host(|host| host.disks[disk].attributes.get(name).and_then(|value| value.latest().clone())))
}

pub(crate) fn set(image: BorrowedFd<'_>, name: &str, value: &[u8]) -> io::Result<()> {
    change(disk_of(image), name, Some(value.to_vec()));
    Ok(())
}

pub(crate) fn remove(image: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    change(disk_of(image), name, None);
    Ok(())
}

fn change(disk: usize, name: &str, value: Option<Vec<u8>>) {
    pause();
    host(|host| {
        host.note(&format!("disk {disk}: {name} {}", value.is_some()));
        let now = host.wall_ns();
        host.disks[disk].changed_ns = now;
        let attributes = &mut host.disks[disk].attributes;
        attributes.entry(name.to_owned()).or_insert_with(|| Volatile::new(None)).write(value);
        host.check_now();
    });
    pause();
}

/// fsync: content, attributes and times.
pub(crate) fn sync(image: BorrowedFd<'_>) -> io::Result<()> {
    let disk = disk_of(image);
    pause();
    let (sectors, attributes) = host(|host| {
        let disk = &host.disks[disk];
        let attributes: Vec<_> =
            disk.attributes.iter().map(|(name, held)| (name.clone(), held.begin_flush())).collect();
        (disk.begin_flush(), attributes)
    });
    pause();
    host(|host| {
        host.disks[disk].end_flush(&sectors, true);
        for (name, begun) in attributes {
            if let Some(held) = host.disks[disk].attributes.get_mut(&name) {
                held.flushed(begun);
            }
        }
    });
    Ok(())
}

pub(crate) fn observe(image: BorrowedFd<'_>) -> io::Result<Option<Observation>> {
    let disk = disk_of(image);
    Ok(host(|host| {
        let disk = &host.disks[disk];
        Some(Observation { size_bytes: disk.size_bytes, mtime_ns: disk.changed_ns, ctime_ns: disk.changed_ns })
    }))
}
