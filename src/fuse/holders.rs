//! Who keeps a mount busy. Everything is read from /proc and /sys; nothing is opened or examined through the mount.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::control::backend::Holder;
use crate::fuse::mountinfo::{MountEntry, MountTable, lies_in, unescape};

/// Every holder of `mount` that this user may see: open files, current and root directories, executables and mapped files
/// of processes; loop devices, swap areas and further mounts inside the kernel. Each process shows once per path.
/// `nfsd` shows nowhere; it is named when nothing else is found and its threads run.
pub fn holders(mount: &MountEntry) -> Vec<Holder> {
    let mut found = BTreeSet::new();
    for process in numbered("/proc") {
        process_holds(process, mount, &mut found);
    }
    let mut holders: Vec<Holder> = found
        .into_iter()
        .map(|(pid, path)| Holder { pid: Some(pid), name: command_name(pid), path: Some(path) })
        .collect();
    kernel_holds(mount, &mut holders);
    if holders.is_empty() && Path::new("/proc/fs/nfsd/threads").exists() {
        holders.push(Holder { pid: None, name: "perhaps the NFS server".into(), path: None });
    }
    holders
}

/// Holders as one line of a message: `qemu-system-x86 (pid 4711), loop device /dev/loop0`.
pub fn describe(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "a process that this user may not see".into();
    }
    let mut names: Vec<String> = holders
        .iter()
        .map(|holder| match holder.pid {
            Some(pid) => format!("{} (pid {pid})", holder.name),
            None => holder.name.clone(),
        })
        .collect();
    names.dedup();
    names.join(", ")
}

/// True if some process has the connection of `mount` open: then a server or a keeper lives. `None` if this cannot be told
/// (kernels before 6.11 do not name the connection in fdinfo).
pub fn connection_is_kept(mount: &MountEntry) -> Option<bool> {
    let mut told = false;
    for process in numbered("/proc") {
        for connection in connections(process) {
            told = true;
            if connection == u64::from(mount.minor) {
                return Some(true);
            }
        }
    }
    // No connection at all is open, and the kernel may be one that does not tell: look at its version.
    (told || kernel_tells()).then_some(false)
}

/// The first process that has the connection of `mount` open.
pub fn keeper_of_connection(mount: &MountEntry) -> Option<u32> {
    numbered("/proc").into_iter().find(|process| connections(*process).any(|one| one == u64::from(mount.minor)))
}

/// True unless `process` is seen not to have the connection of `mount` open.
pub fn may_keep(process: u32, mount: &MountEntry) -> bool {
    let mut connections = connections(process).peekable();
    (connections.peek().is_none() && !kernel_tells()) || connections.any(|one| one == u64::from(mount.minor))
}

/// The FUSE connections that a process has open, as far as the kernel tells.
fn connections(process: u32) -> impl Iterator<Item = u64> {
    links(process).filter(|(link, _)| link.as_bytes() == b"/dev/fuse").filter_map(|(_, info)| {
        let info = fs::read_to_string(info).unwrap_or_default();
        info_field(&info, "fuse_connection:")
    })
}

fn kernel_tells() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 11)
}

fn numbered(directory: &str) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Where the descriptors of a process are listed, and their numbers. Those of one that was killed while a thread of it hangs in the
/// kernel show with that thread only: its first thread has ended.
fn descriptors(process: u32) -> (String, Vec<u32>) {
    let listed = |directory: String| {
        let numbers = numbered(&format!("{directory}/fd"));
        (directory, numbers)
    };
    let of_process = listed(format!("/proc/{process}"));
    if !of_process.1.is_empty() {
        return of_process;
    }
    let threads = numbered(&format!("/proc/{process}/task")).into_iter();
    let mut of_threads = threads.map(|thread| listed(format!("/proc/{process}/task/{thread}")));
    of_threads.find(|(_, numbers)| !numbers.is_empty()).unwrap_or(of_process)
}

/// Of each descriptor of a process what it points to, and what the kernel tells of it.
fn links(process: u32) -> impl Iterator<Item = (std::ffi::OsString, String)> {
    let (directory, numbers) = descriptors(process);
    numbers.into_iter().filter_map(move |number| {
        let link = fs::read_link(format!("{directory}/fd/{number}")).ok()?;
        Some((link.into_os_string(), format!("{directory}/fdinfo/{number}")))
    })
}

fn info_field(info: &str, name: &str) -> Option<u64> {
    info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

fn command_name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    if name.trim().is_empty() { "a process".into() } else { name.trim().into() }
}

fn process_holds(pid: u32, mount: &MountEntry, found: &mut BTreeSet<(u32, String)>) {
    let shown = |link: &OsStr| link.to_string_lossy().into_owned();
    let (directory, numbers) = descriptors(pid);
    for number in numbers {
        let info = fs::read_to_string(format!("{directory}/fdinfo/{number}")).unwrap_or_default();
        if info_field(&info, "mnt_id:") == Some(mount.mount_id) {
            let link = fs::read_link(format!("{directory}/fd/{number}")).unwrap_or_else(|_| mount.mountpoint.clone());
            found.insert((pid, shown(link.as_os_str())));
        }
    }
    for name in ["cwd", "root", "exe"] {
        if let Ok(link) = fs::read_link(format!("/proc/{pid}/{name}")) {
            if lies_in(link.as_os_str(), &mount.mountpoint) {
                found.insert((pid, shown(link.as_os_str())));
            }
        }
    }
    // A mapping outlives its descriptor: `start-end perms offset major:minor inode path`, device numbers in hex.
    let device = format!("{:02x}:{:02x}", mount.major, mount.minor);
    for line in fs::read(format!("/proc/{pid}/maps")).unwrap_or_default().split(|byte| *byte == b'\n') {
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        if fields.nth(3) == Some(device.as_bytes()) {
            let path = fields.nth(1).unwrap_or_default().trim_ascii();
            found.insert((pid, shown(&unescape(path))));
        }
    }
}

fn kernel_holds(mount: &MountEntry, holders: &mut Vec<Holder>) {
    let mut push = |name: String, path: &OsStr| {
        holders.push(Holder { pid: None, name, path: Some(path.to_string_lossy().into_owned()) });
    };
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
        let file = OsStr::from_bytes(file.trim_ascii_end());
        if !file.is_empty() && lies_in(file, &mount.mountpoint) {
            push(format!("loop device /dev/{}", device.file_name().to_string_lossy()), file);
        }
    }
    for line in fs::read("/proc/swaps").unwrap_or_default().split(|byte| *byte == b'\n').skip(1) {
        let area = unescape(line.split(|byte| *byte == b' ').next().unwrap_or_default());
        if !area.is_empty() && lies_in(&area, &mount.mountpoint) {
            push(format!("swap area {}", area.to_string_lossy()), &area);
        }
    }
    for entry in MountTable::read().iter().flat_map(|table| table.entries()) {
        if entry.mount_id != mount.mount_id && entry.parent_id == mount.mount_id {
            push(format!("mount {}", entry.mountpoint.display()), entry.mountpoint.as_os_str());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_holds_the_file_system_of_its_temporary_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = fs::canonicalize(file.path()).unwrap();
        let table = MountTable::read().unwrap();
        let around = table.entries().iter().filter(|entry| path.starts_with(&entry.mountpoint));
        let mount = around.max_by_key(|entry| entry.mountpoint.as_os_str().len()).unwrap();
        let mut found = BTreeSet::new();
        process_holds(std::process::id(), mount, &mut found);
        assert!(found.contains(&(std::process::id(), path.display().to_string())), "{found:?}");
    }

    #[test]
    fn messages_name_each_holder() {
        let qemu = Holder { pid: Some(7), name: "qemu".into(), path: None };
        let device = Holder { pid: None, name: "loop device /dev/loop0".into(), path: None };
        assert_eq!(describe(&[qemu.clone(), qemu, device]), "qemu (pid 7), loop device /dev/loop0");
    }
}
