//! Allocation: holes stay holes, space comes back, attributes and room are told.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn sparse(directory: &Path, cache: CacheMode) -> Option<Arc<dyn Image>> {
    let path = directory.join("disk.img");
    file_of(&path, 64 << 20);
    try_open(&path, cache)
}

#[test]
fn extents_are_told_from_any_offset() {
    for directory in directories() {
        for cache in MODES {
            let Some(image) = sparse(directory.path(), cache) else { continue };
            image.write_at(1 << 20, &vec![5; 128 << 10]).unwrap();
            image.flush().unwrap();
            let hole = image.extent_at(12_345);
            assert_eq!(hole, Extent { range: ByteRange::from_bounds(12_345, 1 << 20), status: ExtentStatus::Hole });
            let data = image.extent_at((1 << 20) + 7);
            assert_eq!(data.status, ExtentStatus::Data);
            assert_eq!(data.range, ByteRange::from_bounds((1 << 20) + 7, (1 << 20) + (128 << 10)));
            let last = image.extent_at((64 << 20) - 1);
            assert_eq!(last, Extent { range: ByteRange::new((64 << 20) - 1, 1), status: ExtentStatus::Hole });
        }
    }
}

#[test]
fn discards_give_space_back_also_in_the_last_block() {
    for directory in directories() {
        for cache in MODES {
            let path = directory.path().join("disk.img");
            file_of(&path, (1 << 20) + 100);
            let Some(image) = try_open(&path, cache) else { continue };
            let empty = image.allocated_bytes().unwrap();
            image.write_at(0, &vec![1; (1 << 20) + 100]).unwrap();
            image.flush().unwrap();
            assert!(image.allocated_bytes().unwrap() >= 1 << 20);
            image.discard(ByteRange::new(0, (1 << 20) + 100)).unwrap();
            image.flush().unwrap();
            assert_eq!(image.allocated_bytes().unwrap(), empty);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), (1 << 20) + 100);
            assert!(image.properties().thin_zeroing);
        }
    }
}

#[test]
fn allocated_and_zeroed_space_stays_allocated() {
    for directory in directories() {
        for cache in MODES {
            let Some(image) = sparse(directory.path(), cache) else { continue };
            let range = ByteRange::new(4 << 20, 1 << 20);
            image.allocate(range).unwrap();
            assert!(image.allocated_bytes().unwrap() >= 1 << 20);
            image.write_at(range.start(), &vec![1; 1 << 20]).unwrap();
            image.write_zeroes(range).unwrap();
            image.flush().unwrap();
            assert!(image.allocated_bytes().unwrap() >= 1 << 20);
            let mut seen = vec![1; 1 << 20];
            image.read_at(range.start(), &mut seen).unwrap();
            assert!(seen.iter().all(|&byte| byte == 0));
        }
    }
}

/// A ramfs: no direct I/O, no fallocate, no holes, no extended attributes. Needs root.
struct RamFs(tempfile::TempDir);

impl RamFs {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        let none: Option<&str> = None;
        nix::mount::mount(none, directory.path(), Some("ramfs"), flags, none).ok()?;
        Some(RamFs(directory))
    }
}

impl Drop for RamFs {
    fn drop(&mut self) {
        let _ = nix::mount::umount(self.0.path());
    }
}

#[test]
fn a_file_system_that_can_do_nothing_special_is_written_the_plain_way() {
    let Some(ramfs) = RamFs::mount() else { return };
    let path = ramfs.0.path().join("disk.img");
    file_of(&path, 200_000);
    let error = open(&path, &options(CacheMode::None)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("cache=none") && error.to_string().contains("disk.img"), "{error}");

    let image = open(&path, &options(CacheMode::Writeback)).unwrap();
    image.write_at(0, &[3; 200_000]).unwrap();
    for _ in 0..2 {
        assert_eq!(image.discard(ByteRange::new(0, 4096)).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(image.allocate(ByteRange::new(0, 4096)).unwrap_err().kind(), ErrorKind::Unsupported);
    }
    assert!(!image.properties().thin_zeroing);
    image.write_zeroes(ByteRange::from_bounds(100, 199_900)).unwrap();
    let seen = std::fs::read(&path).unwrap();
    assert!(seen.iter().enumerate().all(|(at, &byte)| byte == if (100..199_900).contains(&at) { 0 } else { 3 }));
    assert_eq!(image.extent_at(7), Extent { range: ByteRange::from_bounds(7, 200_000), status: ExtentStatus::Data });
    assert_eq!(image.identity().unwrap().id, None);
}

#[test]
fn attributes_room_and_identity_are_those_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    file_of(&path, 5000);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let image = open(&path, &options(CacheMode::Writeback)).unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    let attributes = image.attributes().unwrap();
    assert_eq!((attributes.mode, attributes.uid, attributes.gid), (0o640, meta.uid(), meta.gid()));
    assert_eq!(attributes.modified, meta.modified().unwrap());
    let room = image.room().unwrap();
    assert!(room.available_bytes <= room.free_bytes && room.free_bytes <= room.total_bytes && room.total_bytes > 0);
    let identity = image.identity().unwrap();
    assert_eq!((identity.device, identity.inode, identity.size_bytes), (meta.dev(), meta.ino(), 5000));
    assert_eq!(image.path().unwrap(), path);
    assert_eq!(image.descriptors().len(), 2);
}
