//! What the state directory and the intent log ask of the simulated file system: each call takes a while, and may fail.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::Faults;
use super::host::{Host, STATE_DIRECTORY, host};
use super::schedule::pause;
use crate::sync::thread;

pub(crate) fn exists(path: &Path) -> bool {
    path == Path::new(STATE_DIRECTORY)
}

pub(crate) fn find(path: &Path) -> Option<usize> {
    host(|host| host.files.find(path))
}

pub(crate) fn read(path: &Path) -> Option<Vec<u8>> {
    pause();
    host(|host| host.files.find(path).map(|file| host.files.read(file)))
}

pub(crate) fn names(directory: &Path) -> Vec<String> {
    host(|host| host.files.names(directory))
}

pub(crate) fn create(path: &Path) -> usize {
    pause();
    host(|host| host.files.create(path))
}

pub(crate) fn remove(path: &Path) {
    pause();
    host(|host| {
        host.note(&format!("remove {}", path.display()));
        host.files.name(path, None);
    });
    pause();
    sync_names(path);
}

pub(crate) fn sync_names(path: &Path) {
    host(|host| path.parent().into_iter().for_each(|directory| host.files.sync_names(directory)));
}

/// Writes a file aside, durably. `None`: it cannot be written.
pub(crate) fn stage(bytes: &[u8]) -> Option<usize> {
    pause();
    if host(|host| Faults::due(&mut host.files.faults.stage)) {
        return None;
    }
    let file = host(|host| {
        let aside = PathBuf::from(format!("/simulated/aside/{}", host.new_tag()));
        let file = host.files.create(&aside);
        host.files.write(file, 0, bytes);
        file
    });
    pause();
    host(|host| {
        let begun = host.files.begin_sync(file);
        host.files.end_sync(file, &begun, true);
    });
    pause();
    Some(file)
}

/// Puts a staged file in place, durably. False: nobody knows.
pub(crate) fn rename(file: usize, path: &Path) -> bool {
    pause();
    let fails = host(|host| match &mut host.files.faults.rename {
        Some((0, made)) => {
            let made = *made;
            host.files.faults.rename = None;
            host.count("undecided rename");
            Some(made)
        }
        Some((left, _)) => {
            *left -= 1;
            None
        }
        None => None,
    });
    let fails = fails.or_else(|| {
        host(|host| {
            host.files.faults.cutover?;
            if path != Host::record_path() || !host.makes_cutover(file) {
                return None;
            }
            host.count("undecided cutover");
            host.files.faults.cutover.take()
        })
    });
    if fails != Some(false) {
        host(|host| {
            host.note(&format!("rename to {}", path.display()));
            if path == Host::record_path() { host.place_record(file) } else { host.files.name(path, Some(file)) }
        });
    }
    pause();
    if fails.is_some() {
        return false;
    }
    sync_names(path);
    host(Host::check_now);
    pause();
    true
}

/// Puts a file in place that is not durable.
pub(crate) fn replace(path: &Path, bytes: &[u8]) {
    pause();
    host(|host| {
        let file = host.files.create(path);
        host.files.write(file, 0, bytes);
    });
    pause();
}

pub(crate) fn write_log(file: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
    pause();
    let fails = host(|host| {
        host.note(&format!("log {file}: write"));
        host.files.write(file, offset as usize, bytes);
        host.check_now();
        Faults::due(&mut host.files.faults.log_write)
    });
    pause();
    if fails { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
}

pub(crate) fn sync_log(file: usize) -> io::Result<()> {
    pause();
    let begun = host(|host| host.files.begin_sync(file));
    let stalls = host(|host| match &mut host.files.faults.log_stall {
        Some((0, seconds)) => {
            let seconds = *seconds;
            host.files.faults.log_stall = None;
            Some(seconds)
        }
        Some((left, _)) => {
            *left -= 1;
            None
        }
        None => None,
    });
    stalls.inspect(|seconds| thread::sleep(Duration::from_secs(*seconds)));
    pause();
    let fails = host(|host| {
        let fails = Faults::due(&mut host.files.faults.log_sync);
        host.note(&format!("log {file}: synced: {}", !fails));
        host.files.end_sync(file, &begun, !fails);
        host.check_now();
        fails
    });
    pause();
    if fails { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
}
