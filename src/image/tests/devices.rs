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
        self.add_partition_at(2048)
    }

    /// ... of 4 MiB, from the sector `start` on.
    fn add_partition_at(&self, start: u64) -> Option<PathBuf> {
        let output = Command::new("addpart").arg(&self.path).args(["1", &start.to_string(), "8192"]).output().ok()?;
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
    attach_with(&[], backing)
}

fn attach_with(options: &[&str], backing: &Path) -> Option<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    // Two that look for a free device at once may find the same one.
    (0..10).find_map(|_| {
        let output = Command::new("losetup").args(options).args(["--find", "--show"]).arg(backing).output().ok()?;
        output.status.success().then(|| PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    })
}

/// Runs a command of a test that undoes itself at the end.
struct Undone(Vec<String>);

impl Undone {
    fn after(command: &[&str], undo: &[&str]) -> Option<Undone> {
        let done = Command::new(command[0]).args(&command[1..]).output().ok()?;
        done.status.success().then(|| Undone(undo.iter().map(|word| (*word).to_owned()).collect()))
    }
}

impl Drop for Undone {
    fn drop(&mut self) {
        let _ = Command::new(&self.0[0]).args(&self.0[1..]).output();
    }
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

#[test]
fn a_device_is_refused_whatever_uses_a_part_of_it() {
    let Some(device) = LoopDevice::new(16 << 20) else { return };
    let Some(partition) = device.add_partition() else { return };
    let (whole, part) = (device.path().to_str().unwrap(), partition.to_str().unwrap());
    let mountpoint = tempfile::tempdir().unwrap();
    let place = mountpoint.path().to_str().unwrap();
    let refused = |what: &str| {
        for path in [device.path(), &partition] {
            for writable in [true, false] {
                let error = open(path, &OpenOptions { writable, ..OpenOptions::default() }).expect_err(what);
                assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
                assert!(error.to_string().contains(what), "{what}: {error}");
            }
        }
    };
    if Command::new("mkfs.ext4").args(["-q", part]).status().is_ok_and(|made| made.success()) {
        let _mounted = Undone::after(&["mount", part, place], &["umount", place]).expect("mount");
        refused(&format!("mounted on {place}"));
    }
    if Command::new("mkswap").arg(part).output().is_ok_and(|made| made.status.success()) {
        if let Some(_swap) = Undone::after(&["swapon", part], &["swapoff", part]) {
            refused(&format!("swap ({part})"));
        }
    }
    for beneath in [whole, part] {
        let upper = attach(Path::new(beneath)).expect("losetup");
        let name = upper.file_name().unwrap().to_str().unwrap();
        let _attached = Undone(vec!["losetup".into(), "-d".into(), upper.to_str().unwrap().into()]);
        refused(&format!("used by {name}"));
    }
    // A device lets go of what is beneath it a moment after it was told to.
    super::super::lock::patiently(std::time::Duration::from_secs(20), || {
        Ok::<_, Error>(open(&partition, &options(CacheMode::None)).ok())
    })
    .unwrap()
    .expect("nobody uses it any more");
}

#[test]
fn a_partition_that_begins_within_a_granule_is_zeroed_exactly() {
    let Some(device) = LoopDevice::new(16 << 20) else { return };
    let Some(partition) = device.add_partition_at(2049) else { return };
    {
        let whole = open(device.path(), &options(CacheMode::None)).unwrap();
        whole.write_at(0, &vec![7; 16 << 20]).unwrap();
    }
    let image = open(&partition, &options(CacheMode::None)).unwrap();
    assert_eq!(image.size_bytes(), 4 << 20);
    assert!(image.properties().thin_zeroing);
    let range = ByteRange::from_bounds(100, (4 << 20) - 700);
    image.discard(range).unwrap();
    let mut seen = vec![1; 4 << 20];
    image.read_at(0, &mut seen).unwrap();
    let inside = |at: usize| (range.start()..range.end()).contains(&(at as u64));
    assert!(seen.iter().enumerate().all(|(at, &byte)| byte == if inside(at) { 0 } else { 7 }));
    image.flush().unwrap();
    drop(image);
    let on_disk = std::fs::read(device.backing()).unwrap();
    let start = 2049 * 512;
    assert!(on_disk[..start].iter().chain(&on_disk[start + (4 << 20)..]).all(|&byte| byte == 7), "its neighbours");
    assert!(on_disk[start..start + (4 << 20)] == seen);
    use std::os::unix::fs::MetadataExt;
    assert!(std::fs::metadata(device.backing()).unwrap().blocks() * 512 < (13 << 20), "space was given back");
}

/// Blocks of 4 KiB, and a file system beneath that can neither zero nor punch.
#[test]
fn a_device_with_large_blocks_that_cannot_zero_is_written_with_zeroes() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().to_str().unwrap();
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let Some(_mounted) = Undone::after(&["mount", "-t", "ramfs", "none", place], &["umount", place]) else { return };
    let backing = directory.path().join("backing");
    file_of(&backing, 4 << 20);
    let Some(path) = attach_with(&["--sector-size", "4096"], &backing) else { return };
    let _attached = Undone(vec!["losetup".into(), "-d".into(), path.to_str().unwrap().into()]);
    for cache in MODES {
        let image = open(&path, &options(cache)).unwrap();
        assert_eq!(image.properties().request_alignment, if cache == CacheMode::None { 4096 } else { 1 });
        assert!(!image.properties().thin_zeroing, "it tells that it cannot");
        image.write_at(0, &vec![7; 4 << 20]).unwrap();
        let range = ByteRange::from_bounds(1000, 3_900_000);
        assert_eq!(image.discard(range).unwrap_err().kind(), ErrorKind::Unsupported);
        image.write_zeroes(range).unwrap();
        let mut seen = vec![1; 4 << 20];
        image.read_at(0, &mut seen).unwrap();
        assert!(seen.iter().enumerate().all(|(at, &byte)| byte == if (1000..3_900_000).contains(&at) { 0 } else { 7 }));
    }
}

#[test]
fn a_qcow2_file_on_a_device_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    drop(create(&path, 1 << 20, None, &Layout::default(), &options(CacheMode::Writeback)).unwrap());
    let Some(device) = LoopDevice::new(4 << 20) else { return };
    let file = std::fs::read(&path).unwrap();
    let raw = OpenOptions { format: Some(Format::Raw), ..options(CacheMode::Writeback) };
    open(device.path(), &raw).unwrap().write_at(0, &file).unwrap();
    let qcow2 = OpenOptions { format: Some(Format::Qcow2), ..options(CacheMode::Writeback) };
    let error = open(device.path(), &qcow2).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("on a block device"), "{error}");
    assert!(error.to_string().contains(device.path().to_str().unwrap()), "{error}");
    assert!(error.advice().unwrap().contains("--format raw"), "{error}");
    open(device.path(), &raw).expect("the device itself is served");
}
