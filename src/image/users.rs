//! Who uses a block device, as far as the system tells: for the message when it is busy.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::files;

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

/// The device, its partitions, and the disk that it is a partition of: all that a user of one of them may hold.
fn related(number: u64) -> Vec<u64> {
    let own = sysfs(number);
    let mut numbers = vec![number];
    for entry in std::fs::read_dir(&own).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            numbers.extend(number_in(&entry.path().join("dev")));
        }
    }
    if own.join("partition").exists() {
        let disk = std::fs::canonicalize(&own).ok().and_then(|own| number_in(&own.parent()?.join("dev")));
        numbers.extend(disk);
    }
    numbers
}

/// `mounted on /x` and the like, for the device, one of its partitions, or its disk.
fn user_of(number: u64) -> Option<String> {
    let numbers = related(number);
    mounted_on(&numbers).or_else(|| swap_on(&numbers)).or_else(|| held_by(&numbers))
}

fn mounted_on(numbers: &[u64]) -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().find_map(|line| {
        // mount id, parent, major:minor, root, mount point, ..., "-", type, source (proc(5)).
        let mut fields = line.split(' ').skip(2);
        let (device, place) = (fields.next()?, fields.nth(1)?);
        let source = fields.skip_while(|field| *field != "-").nth(2).unwrap_or_default();
        let is_named = |number: &u64| device == format!("{}:{}", libc::major(*number), libc::minor(*number));
        // Btrfs shows a number of its own.
        let found = numbers.iter().any(is_named) || node(source).is_some_and(|number| numbers.contains(&number));
        found.then(|| format!("mounted on {place}"))
    })
}

fn swap_on(numbers: &[u64]) -> Option<String> {
    let areas = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut paths = areas.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    paths.find(|path| node(path).is_some_and(|number| numbers.contains(&number))).map(|path| format!("swap ({path})"))
}

fn held_by(numbers: &[u64]) -> Option<String> {
    numbers.iter().find_map(|number| {
        let holder = std::fs::read_dir(sysfs(*number).join("holders")).ok()?.next()?.ok()?;
        Some(format!("used by {}", holder.file_name().to_string_lossy()))
    })
}

/// The number of the device at `path`, in /dev: nothing else is looked at, a mount of ours least of all.
fn node(path: &str) -> Option<u64> {
    let meta = path.starts_with("/dev/").then(|| std::fs::metadata(path).ok()).flatten()?;
    meta.file_type().is_block_device().then(|| meta.rdev())
}

/// Refuses the device `number`, called `name`, if a loop device lies over it, over a partition of it, or over its disk. Unlike all other
/// users a loop device does not hold what is beneath it.
///
/// # Errors
/// [`ErrorKind::Locked`], naming the loop device.
pub(super) fn refuse_loop_over(name: &str, number: u64) -> Result<()> {
    let numbers = related(number);
    for entry in std::fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        if !entry.path().join("loop/backing_file").exists() {
            continue;
        }
        let backing = File::open(Path::new("/dev").join(entry.file_name())).and_then(files::loop_backing);
        if matches!(backing, Ok(files::LoopBacking::Device { number }) if numbers.contains(&number)) {
            let what = format!("the device is used by {}:", entry.file_name().to_string_lossy());
            return Err(Error::new(ErrorKind::Locked, what)
                .on(name)
                .advise("detach it (losetup -d), or take another device"));
        }
    }
    Ok(())
}
