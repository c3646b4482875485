//! Who uses a block device, as far as the system tells: for the message when it is busy.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind};

/// The refusal of the device `number`, called `name`, which somebody holds.
pub(super) fn busy(name: &str, number: u64) -> Error {
    let what = match user_of(number) {
        Some(user) => format!("the device is {user}:"),
        None => "the device is in use (mounted, swap, RAID, LVM or another livemirror):".to_owned(),
    };
    Error::new(ErrorKind::Locked, what).on(name).advise("end its use, or take another device")
}

/// The directory that sysfs has for a device number.
pub(super) fn sysfs(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number)))
}

/// The device number in a file of sysfs such as `dev`.
pub(super) fn number_in(file: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// `mounted on /x` and the like, for the device or one of its partitions.
fn user_of(number: u64) -> Option<String> {
    let own = sysfs(number);
    let mut numbers = vec![number];
    for entry in std::fs::read_dir(&own).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            numbers.extend(number_in(&entry.path().join("dev")));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines() {
        // mount id, parent, major:minor, root, mount point (proc(5)).
        let mut fields = line.split(' ').skip(2);
        let (Some(device), Some(place)) = (fields.next(), fields.nth(1)) else { continue };
        if numbers.iter().any(|number| device == format!("{}:{}", libc::major(*number), libc::minor(*number))) {
            return Some(format!("mounted on {place}"));
        }
    }
    for number in numbers {
        let holder = std::fs::read_dir(sysfs(number).join("holders")).ok().and_then(|mut entries| entries.next());
        if let Some(Ok(holder)) = holder {
            return Some(format!("used by {}", holder.file_name().to_string_lossy()));
        }
    }
    None
}
