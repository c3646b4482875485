//! Block devices, by the example of loop devices. Needs root; passes without a word where there are none.

use super::*;
use std::path::PathBuf;
use std::process::Command;

/// A loop device over a file in a temporary directory. Detached at the end, also of a test that fails.
pub(crate) struct LoopDevice {
    path: PathBuf,
    backing: PathBuf,
    _directory: tempfile::TempDir,
}

impl LoopDevice {
    pub(crate) fn new(size_bytes: u64) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let backing = directory.path().join("backing");
        file_of(&backing, size_bytes);
        let path = attach(&backing)?;
        Some(LoopDevice { path, backing, _directory: directory })
    }

    /// Tells the kernel of a partition, which needs no table: the path of its node.
    pub(crate) fn add_partition(&self) -> Option<PathBuf> {
        let output = Command::new("addpart").arg(&self.path).args(["1", "2048", "8192"]).output().ok()?;
        let node = PathBuf::from(format!("{}p1", self.path.display()));
        (output.status.success() && node.exists()).then_some(node)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn backing(&self) -> &Path {
        &self.backing
    }

    pub(crate) fn zero(&self) {
        let image = open(&self.path, &options(CacheMode::Writeback)).unwrap();
        image.write_zeroes(ByteRange::new(0, image.size_bytes())).unwrap();
    }
}

fn attach(backing: &Path) -> Option<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    // Two that look for a free device at once may find the same one.
    (0..10).find_map(|_| {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(backing).output().ok()?;
        output.status.success().then(|| PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    })
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("delpart").arg(&self.path).arg("1").output();
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

#[test]
fn a_device_tells_its_size_also_when_read_only() {
    let Some(device) = LoopDevice::new(3 << 20) else { return };
    for cache in MODES {
        let image = open(device.path(), &OpenOptions { cache, ..OpenOptions::default() }).unwrap();
        assert_eq!(image.size_bytes(), 3 << 20);
        image.read_at((3 << 20) - 100, &mut [0; 100]).unwrap();
    }
}

#[test]
fn a_device_is_all_data_and_of_fixed_size() {
    let Some(device) = LoopDevice::new(1 << 20) else { return };
    let image = open(device.path(), &options(CacheMode::None)).unwrap();
    assert_eq!(image.extent_at(5), Extent { range: ByteRange::from_bounds(5, 1 << 20), status: ExtentStatus::Data });
    assert_eq!(image.resize(2 << 20).unwrap_err().kind(), ErrorKind::Unsupported);
    let properties = image.properties();
    assert!(!properties.resizable && properties.writable && properties.request_alignment >= 512);
    assert_eq!(image.identity().unwrap().inode, 0);
    image.flush().unwrap();
}

#[test]
fn a_device_has_one_user() {
    let Some(device) = LoopDevice::new(1 << 20) else { return };
    let image = open(device.path(), &options(CacheMode::Writeback)).unwrap();
    assert_eq!(open(device.path(), &options(CacheMode::None)).unwrap_err().kind(), ErrorKind::Locked);
    let parked = image.descriptors()[0].1.try_clone_to_owned().unwrap();
    drop(image);
    assert_eq!(open(device.path(), &options(CacheMode::None)).unwrap_err().kind(), ErrorKind::Locked);
    let again = open(device.path(), &OpenOptions { descriptor: Some(parked), ..options(CacheMode::None) }).unwrap();
    again.write_at(100, b"again").unwrap();
}

#[test]
fn a_mounted_device_is_refused_with_its_mountpoint() {
    let Some(device) = LoopDevice::new(16 << 20) else { return };
    let Ok(made) = Command::new("mkfs.ext4").arg("-q").arg(device.path()).status() else { return };
    assert!(made.success());
    let mountpoint = tempfile::tempdir().unwrap();
    if !Command::new("mount").args([device.path(), mountpoint.path()]).status().unwrap().success() {
        return;
    }
    let result = open(device.path(), &options(CacheMode::Writeback));
    assert!(Command::new("umount").arg(mountpoint.path()).status().unwrap().success());
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains(&format!("mounted on {}", mountpoint.path().display())), "{error}");
}

#[test]
fn zeroing_a_device_reaches_what_is_still_in_the_page_cache() {
    let Some(device) = LoopDevice::new(1 << 20) else { return };
    for cache in MODES {
        for discard in [false, true] {
            let image = open(device.path(), &options(cache)).unwrap();
            image.write_at(0, &vec![7; 1 << 20]).unwrap();
            let range = ByteRange::from_bounds(1000, 900_000);
            if discard {
                image.discard(range).unwrap()
            } else {
                image.write_zeroes(range).unwrap()
            }
            let mut seen = vec![1; 1 << 20];
            image.read_at(0, &mut seen).unwrap();
            assert!(
                seen.iter().enumerate().all(|(at, &byte)| byte == if (1000..900_000).contains(&at) { 0 } else { 7 })
            );
            image.flush().unwrap();
            drop(image);
            let on_disk = std::fs::read(device.backing()).unwrap();
            assert!(on_disk == seen);
        }
    }
}
