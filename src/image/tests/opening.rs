//! What may be opened and created, and what is said otherwise.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn kind_of(path: &Path) -> ErrorKind {
    let error = open(path, &options(CacheMode::Writeback)).unwrap_err();
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    error.kind()
}

#[test]
fn only_files_and_devices_are_images() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(kind_of(&directory.path().join("missing.img")), ErrorKind::NotFound);
    assert_eq!(kind_of(directory.path()), ErrorKind::Usage);
    assert_eq!(kind_of(Path::new("/dev/null")), ErrorKind::Usage);
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(kind_of(&fifo), ErrorKind::Usage);
}

#[test]
fn a_qcow2_header_is_the_disks_own_only_if_the_user_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::write(&path, b"QFI\xfb\0\0\0\x03 and so on").unwrap();
    assert_eq!(kind_of(&path), ErrorKind::Usage);
    let raw = OpenOptions { format: Some(Format::Raw), ..options(CacheMode::Writeback) };
    assert_eq!(open(&path, &raw).unwrap().format(), Format::Raw);
}

#[test]
fn a_read_only_image_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    file_of(&path, 5000);
    for cache in MODES {
        let image = open(&path, &OpenOptions { cache, ..OpenOptions::default() }).unwrap();
        assert!(!image.properties().writable);
        image.read_at(1, &mut [0; 4999]).unwrap();
        let range = ByteRange::new(0, 4096);
        let refused = [
            image.write_at(0, &[1]),
            image.write_zeroes(range),
            image.discard(range),
            image.allocate(range),
            image.resize(1),
        ];
        for result in refused {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), vec![0; 5000]);
}

#[test]
fn a_created_image_is_like_its_source_and_all_hole() {
    for directory in directories() {
        for cache in MODES {
            let path = directory.path().join("new.img");
            let now = std::time::SystemTime::now();
            let like = Attributes { mode: 0o664, uid: 12, gid: 34, modified: now, changed: now, accessed: now };
            let options = OpenOptions { role: Role::Target, ..options(cache) };
            let created = create(&path, (8 << 30) + 1, Some(&like), &Layout::default(), &options);
            if cache == CacheMode::None && created.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported) {
                assert!(!path.exists());
                continue;
            }
            let image = created.unwrap();
            assert_eq!(image.size_bytes(), (8 << 30) + 1);
            assert_eq!(image.allocated_bytes().unwrap(), 0);
            let meta = std::fs::metadata(&path).unwrap();
            assert_eq!(meta.permissions().mode() & 0o7777, 0o664);
            if nix::unistd::geteuid().is_root() {
                assert_eq!((meta.uid(), meta.gid()), (12, 34));
            }
            sync_parent_directory(&path).unwrap();
            assert_eq!(create(&path, 1, None, &Layout::default(), &options).unwrap_err().kind(), ErrorKind::Exists);
            drop(image);
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn a_failed_creation_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new.img");
    let error = create(&path, u64::MAX / 2, None, &Layout::default(), &options(CacheMode::Writeback)).unwrap_err();
    assert!(error.to_string().contains("new.img"), "{error}");
    assert!(!path.exists());
    let path = directory.path().join("missing/new.img");
    assert_eq!(
        create(&path, 1, None, &Layout::default(), &options(CacheMode::Writeback)).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn errors_name_the_image_and_the_offset() {
    for directory in directories() {
        for cache in MODES {
            let path = directory.path().join("disk.img");
            file_of(&path, 1 << 20);
            let Some(image) = try_open(&path, cache) else { continue };
            // Somebody cuts the file behind our back.
            file_of(&path, 0);
            let error = image.read_at(8192, &mut [0; 4096]).unwrap_err();
            assert_eq!(error.range(), Some(ByteRange::new(8192, 4096)), "{error}");
            assert!(error.to_string().contains("disk.img at offset 8192 (4096 bytes)"), "{error}");
        }
    }
}
