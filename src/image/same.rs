//! Is one image another one by some other name? (rule 9)
//!
//! Names prove nothing, so what lies beneath is compared: every file and device rests on others, down to a real disk.
//!
//! ```text
//! partition -> disk        loop device -> its file       LVM, RAID, crypt -> their devices        file -> its file system's device
//! ```
//!
//! Two images are the same if one of them is found in the chain beneath the other. Two files of one file system are not:
//! only their chains meet. Files beneath a loop device are known by number, they are never looked at: one may lie on a mount of
//! ours, whose server might be the one who asks.

use std::collections::BTreeSet;
use std::fs::{File, Metadata};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::nbd::uri;
use super::users::{number_in, sysfs};
use super::{DescriptorRole, Image};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::files;

/// A file or device, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Layer {
    File { device: u64, inode: u64 },
    Device(u64),
}

impl Layer {
    fn of(meta: &Metadata) -> Layer {
        if meta.file_type().is_block_device() {
            Layer::Device(meta.rdev())
        } else {
            Layer::File { device: meta.dev(), inode: meta.ino() }
        }
    }

    /// What it rests on directly, as far as the system tells.
    fn beneath(self) -> Vec<Layer> {
        match self {
            // Devices without a disk (tmpfs, NFS, btrfs) have no directory in sysfs, and nothing beneath.
            Layer::File { device, .. } => sysfs(device).exists().then_some(Layer::Device(device)).into_iter().collect(),
            Layer::Device(number) => beneath_device(number),
        }
    }
}

fn beneath_device(number: u64) -> Vec<Layer> {
    let Ok(directory) = std::fs::canonicalize(sysfs(number)) else { return Vec::new() };
    let mut found = Vec::new();
    if directory.join("partition").exists() {
        found.extend(directory.parent().and_then(|disk| number_in(&disk.join("dev"))).map(Layer::Device));
    }
    for entry in std::fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten() {
        found.extend(number_in(&entry.path().join("dev")).map(Layer::Device));
    }
    if directory.join("loop").exists() {
        found.extend(loop_backing(&directory));
    }
    found
}

/// The file beneath the loop device that has this directory in sysfs: asked of the device, or, where that may not be
/// opened, by the path that sysfs tells.
fn loop_backing(directory: &Path) -> Option<Layer> {
    let node = Path::new("/dev").join(directory.file_name()?);
    if let Ok(backing) = File::open(node).and_then(files::loop_backing) {
        return Some(match backing {
            files::LoopBacking::File { device, inode } => Layer::File { device, inode },
            files::LoopBacking::Device { number } => Layer::Device(number),
        });
    }
    let path = std::fs::read_to_string(directory.join("loop/backing_file")).ok()?;
    let path = Path::new(path.trim_end_matches('\n'));
    if super::own_mount::find(path).is_some() {
        return None;
    }
    std::fs::metadata(path).ok().map(|meta| Layer::of(&meta))
}

/// `top` and all that is beneath it.
fn chain(top: Layer) -> BTreeSet<Layer> {
    let mut found = BTreeSet::from([top]);
    let mut rest = vec![top];
    while let Some(layer) = rest.pop() {
        rest.extend(layer.beneath().into_iter().filter(|layer| found.insert(*layer)));
    }
    found
}

fn are_same(one: Layer, other: Layer) -> bool {
    one == other || chain(one).contains(&other) || chain(other).contains(&one)
}

/// What an open image is.
fn layer_of_image(image: &dyn Image) -> Result<Option<Layer>> {
    let descriptors = image.descriptors();
    let Some((_, descriptor)) = descriptors.iter().find(|(role, _)| *role == DescriptorRole::Path) else {
        return Ok(None);
    };
    // The descriptor, not the path: a disk may be mounted over the path by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd()));
    look(&path, image.name())
}

/// What is at `path`; `None` if there is nothing.
fn look(path: &Path, name: &str) -> Result<Option<Layer>> {
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    match opened.and_then(|file| file.metadata()) {
        Ok(meta) => Ok(Some(Layer::of(&meta))),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(Error::io("cannot look at", &error).on(name)),
    }
}

/// True if what is at `path` is `image`, by this or any other name, or one of them is beneath the other: a partition, a loop
/// device, the disk that holds the file. False if nothing is there. Must not be asked of a path in a mount of ours.
///
/// # Errors
/// When `path` cannot be looked at.
pub fn same_image(image: &dyn Image, path: &Path) -> Result<bool> {
    let (Some(one), Some(other)) = (layer_of_image(image)?, look(path, &path.display().to_string())?) else {
        return Ok(false);
    };
    Ok(are_same(one, other))
}

/// True if `path` leads to the very file or device of `image`. False also where that has none. Must not be asked of a path in a mount of ours.
///
/// # Errors
/// When `path` cannot be looked at.
pub fn is_image_at(image: &dyn Image, path: &Path) -> Result<bool> {
    let opened = layer_of_image(image)?;
    Ok(opened.is_some() && opened == look(path, &path.display().to_string())?)
}

/// True if both images are in the very same file or device.
///
/// # Errors
/// When one of them cannot be looked at.
pub fn is_same_file(one: &dyn Image, other: &dyn Image) -> Result<bool> {
    let opened = layer_of_image(one)?;
    Ok(opened.is_some() && opened == layer_of_image(other)?)
}

/// Refuses a `path` on a disk of ours: in a file system, say, on a loop device on a mounted disk. What is written there waits
/// for guests' writes, which would then wait for it.
///
/// # Errors
/// Wrong usage, naming the path.
pub fn refuse_on_own_disk(path: &Path) -> Result<()> {
    let own = super::own_mount::devices();
    let found = path.ancestors().find_map(|place| look(place, "").ok().flatten());
    let rests_on_own = |layer: &Layer| matches!(layer, Layer::File { device, .. } if own.contains(device));
    if !found.is_some_and(|found| chain(found).iter().any(rests_on_own)) {
        return Ok(());
    }
    Err(Error::usage("this lies on a disk that livemirror serves:")
        .on(path.display().to_string())
        .advise("name a place outside of it"))
}

/// Refuses a mirror's target at `path` that is `source` itself or one of its backing files, or lies in a mount of ours.
///
/// # Errors
/// Wrong usage, naming the target.
pub fn refuse_same(source: &dyn Image, path: &Path) -> Result<()> {
    if let Some(uri) = path.to_str().filter(|_| uri::is_uri(path)) {
        // Who answers is compared when it is opened.
        let images = std::iter::successors(Some(source), |image| image.backing().map(|layer| &**layer));
        let Some(image) = images.into_iter().find(|image| uri::same_export(image.name(), uri)) else { return Ok(()) };
        let what = format!("the target is the same NBD export as the source ({}):", image.name());
        return Err(Error::usage(what).on(uri).advise("name another export"));
    }
    super::own_mount::refuse_inside(path)?;
    for layer in std::iter::successors(source.backing(), |layer| layer.backing()) {
        if same_image(&**layer, path)? {
            let what = format!("the target is a backing file of the source ({}):", source.name());
            return Err(Error::usage(what).on(path.display().to_string()).advise("name another file or device"));
        }
    }
    if !same_image(source, path)? {
        return Ok(());
    }
    let what = format!("the target is the source itself ({}), or a part or holder of it:", source.name());
    Err(Error::usage(what).on(path.display().to_string()).advise("name another file or device"))
}

/// Checks that the path of a file or device still leads to what was opened. An image that was removed meanwhile lives only as
/// long as somebody has it open: no disk may be moved to it.
///
/// # Errors
/// It was removed, renamed or replaced, or a mount hides it.
pub fn check_in_place(image: &dyn Image) -> Result<()> {
    let (Some(path), Some(opened)) = (image.path(), layer_of_image(image)?) else { return Ok(()) };
    if super::own_mount::find(&path).is_none() && look(&path, image.name())? == Some(opened) {
        return Ok(());
    }
    let error = Error::new(ErrorKind::Failed, "the target was removed, renamed or hidden meanwhile:").on(image.name());
    Err(error.advise("put it back where it was, or give the mirror up with 'livemirror cancel'"))
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::super::tests::LoopDevice;
    use super::super::{CacheMode, OpenOptions, open};
    use super::*;
    use std::os::unix::fs::symlink;

    fn opened(path: &Path) -> std::sync::Arc<dyn Image> {
        open(path, &OpenOptions { writable: true, cache: CacheMode::Writeback, ..OpenOptions::default() }).unwrap()
    }

    #[test]
    fn a_file_is_itself_by_every_name_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("disk.img"), [0; 4096]).unwrap();
        std::fs::copy(at("disk.img"), at("other.img")).unwrap();
        symlink("disk.img", at("symlink.img")).unwrap();
        std::fs::hard_link(at("disk.img"), at("link.img")).unwrap();
        let image = opened(&at("disk.img"));
        for name in ["disk.img", "symlink.img", "link.img"] {
            assert!(same_image(&*image, &at(name)).unwrap(), "{name}");
            assert!(refuse_same(&*image, &at(name)).unwrap_err().to_string().contains(name));
        }
        for name in ["other.img", "missing.img", "missing/disk.img"] {
            assert!(!same_image(&*image, &at(name)).unwrap(), "{name}");
            refuse_same(&*image, &at(name)).unwrap();
        }
        check_in_place(&*image).unwrap();
        // What is at the path by now does not matter, what was opened does.
        std::fs::rename(at("disk.img"), at("moved.img")).unwrap();
        assert!(same_image(&*image, &at("moved.img")).unwrap() && !same_image(&*image, &at("disk.img")).unwrap());
        assert!(check_in_place(&*image).unwrap_err().to_string().contains("disk.img"));
        std::fs::copy(at("moved.img"), at("disk.img")).unwrap();
        check_in_place(&*image).unwrap_err();
        std::fs::rename(at("moved.img"), at("disk.img")).unwrap();
        check_in_place(&*image).unwrap();
    }

    #[test]
    fn a_loop_device_is_its_file_and_a_file_is_on_its_disk() {
        let Some(device) = LoopDevice::new(1 << 20) else { return };
        assert!(same_image(&*opened(device.backing()), device.path()).unwrap());
        assert!(same_image(&*opened(device.path()), device.backing()).unwrap());
        assert!(same_image(&*opened(device.path()), device.path()).unwrap());
        let Some(other) = LoopDevice::new(1 << 20) else { return };
        assert!(!same_image(&*opened(device.path()), other.path()).unwrap());
        assert!(!same_image(&*opened(device.path()), other.backing()).unwrap());
        // The device that the backing file's own file system is on.
        let meta = std::fs::metadata(device.backing()).unwrap();
        let top = Layer::Device(std::fs::metadata(device.path()).unwrap().rdev());
        if sysfs(meta.dev()).exists() {
            assert!(are_same(top, Layer::Device(meta.dev())));
        }
    }

    #[test]
    fn a_partition_is_its_disk() {
        let Some(device) = LoopDevice::new(16 << 20) else { return };
        let Some(partition) = device.add_partition() else { return };
        assert!(same_image(&*opened(device.path()), &partition).unwrap());
        assert!(same_image(&*opened(&partition), device.path()).unwrap());
        assert!(same_image(&*opened(device.backing()), &partition).unwrap());
    }
}
