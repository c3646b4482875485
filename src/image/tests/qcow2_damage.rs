//! Files that are refused, and damaged ones: an error is named, nothing hangs, nothing large is allocated, nothing is written.

use super::qcow2::{new_file, text};
use super::*;
use proptest::prelude::*;

pub(super) fn patched(path: &Path, at: usize, bytes: &[u8]) {
    let mut file = std::fs::read(path).unwrap();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    std::fs::write(path, file).unwrap();
}

fn refused(path: &Path, writable: bool) -> Error {
    let before = std::fs::read(path).unwrap();
    let error = open(path, &OpenOptions { writable, ..OpenOptions::default() }).unwrap_err();
    assert!(before == std::fs::read(path).unwrap(), "refused after it was touched: {error}");
    assert!(error.to_string().contains(text(path)), "{error}");
    error
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    for (options, says) in [
        ("compression_type=zstd", "zstd"),
        ("extended_l2=on", "extended L2"),
        ("data_file=data.raw", "external data file"),
        ("encrypt.format=luks,encrypt.key-secret=s", "encrypted"),
    ] {
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if options.starts_with("encrypt") {
            arguments.extend(["--object", "secret,id=s,data=x"]);
        }
        arguments.extend([text(&path), "1M"]);
        let mut command = std::process::Command::new("qemu-img");
        // The data file is made where qemu-img runs.
        let Ok(output) = command.args(arguments).current_dir(directory.path()).output() else { return };
        if !output.status.success() {
            // This qemu-img was built without it.
            continue;
        }
        for writable in [true, false] {
            let error = refused(&path, writable);
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(says), "{options}: {error}");
        }
    }
}

#[test]
fn bits_that_say_that_it_is_not_sound_are_heeded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let make = |incompatible: u64| {
        new_file(&path, "cluster_size=64k", 1 << 20)?;
        patched(&path, 72, &incompatible.to_be_bytes());
        Some(())
    };
    if make(1).is_none() {
        return;
    }
    let error = refused(&path, true);
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("lazy_refcounts"), "{error}");
    open(&path, &OpenOptions::default()).unwrap();
    make(2).unwrap();
    for writable in [true, false] {
        let error = refused(&path, writable);
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("marked as corrupt"), "{error}");
    }
    make(1 << 7).unwrap();
    let error = refused(&path, false);
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("number 7"), "{error}");
}

#[test]
fn absurd_headers_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let patches: [(&str, usize, &[u8]); 12] = [
        ("version", 4, &9_u32.to_be_bytes()),
        ("backing name", 8, &[0xFF; 12]),
        ("cluster bits", 20, &63_u32.to_be_bytes()),
        ("size 2^63", 24, &(1_u64 << 63).to_be_bytes()),
        ("size 2^62", 24, &(1_u64 << 62).to_be_bytes()),
        ("L1 entries", 36, &u32::MAX.to_be_bytes()),
        ("L1 entries in bounds", 36, &(4_u32 << 20).to_be_bytes()),
        ("L1 place", 40, &(1_u64 << 60).to_be_bytes()),
        ("refcount table place", 48, &(1_u64 << 60).to_be_bytes()),
        ("refcount table size", 56, &u32::MAX.to_be_bytes()),
        ("refcount order", 96, &77_u32.to_be_bytes()),
        ("header length", 100, &u32::MAX.to_be_bytes()),
    ];
    for (what, at, bytes) in patches {
        if new_file(&path, "cluster_size=64k", 1 << 20).is_none() {
            return;
        }
        patched(&path, at, bytes);
        let error = refused(&path, true);
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{what}: {error}");
    }
    std::fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
    assert_eq!(refused(&path, true).kind(), ErrorKind::Corrupt);
}

#[test]
fn data_where_metadata_is_and_is_not_there_is_an_error_and_no_panic() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=64k,preallocation=metadata", 1 << 20).is_none() {
        return;
    }
    let file = std::fs::read(&path).unwrap();
    let number = |at: usize| u64::from_be_bytes(file[at..at + 8].try_into().unwrap());
    let l1 = usize::try_from(number(40)).unwrap();
    let l2 = usize::try_from(number(l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    let copied = 1_u64 << 63;
    for (what, place) in [("the header", 0), ("the L1 table", l1 as u64), ("the refcount table", number(48))] {
        if place == 0 {
            continue;
        }
        patched(&path, l2, &(place | copied).to_be_bytes());
        let image = open(&path, &options(CacheMode::Writeback)).unwrap();
        let error = image.write_at(0, &[1; 512]).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("overlap"), "{what}: {error}");
        assert_eq!(image.extent_at(0).status, ExtentStatus::Data);
    }
    patched(&path, l2, &(copied | 0x1200).to_be_bytes());
    let image = open(&path, &options(CacheMode::Writeback)).unwrap();
    assert_eq!(image.read_at(0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
    drop(image);
    // Far past the end of any file.
    patched(&path, l2, &(copied | 0x00ff_ffff_ffff_0000).to_be_bytes());
    let image = open(&path, &options(CacheMode::Writeback)).unwrap();
    image.read_at(0, &mut [0; 512]).unwrap();
    image.write_at(0, &[1; 512]).unwrap_err();
    drop(image);
    patched(&path, l1, &(copied | 0x00ff_ffff_ffff_0000).to_be_bytes());
    let image = open(&path, &options(CacheMode::Writeback)).unwrap();
    assert_eq!(image.read_at(0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Corrupt);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_metadata_never_panics(changes in proptest::collection::vec((0..0x5_0000_usize, any::<u8>(), any::<bool>()), 1..8)) {
        static SOUND: std::sync::OnceLock<Option<Vec<u8>>> = std::sync::OnceLock::new();
        let sound = SOUND.get_or_init(|| {
            let directory = quick_directory();
            let path = directory.path().join("disk.qcow2");
            new_file(&path, "cluster_size=4k", 1 << 20)?;
            let image = open(&path, &options(CacheMode::Writeback)).unwrap();
            image.write_at(5000, &[1; 40_000]).unwrap();
            drop(image);
            Some(std::fs::read(&path).unwrap())
        });
        let Some(sound) = sound else { return Ok(()) };
        let mut bytes = sound.clone();
        for (at, byte, in_header) in changes {
            // Half of them in the header, the others anywhere in the tables.
            let at = if in_header { at % 112 } else { at % bytes.len() };
            bytes[at] = byte;
        }
        let directory = quick_directory();
        let path = directory.path().join("disk.qcow2");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(image) = open(&path, &OpenOptions { format: Some(Format::Qcow2), ..options(CacheMode::Writeback) }) {
            let len = image.size_bytes().min(1 << 20);
            let mut buffer = vec![0; usize::try_from(len).unwrap()];
            let _ = image.read_at(0, &mut buffer);
            let _ = image.write_at(0, &buffer[..buffer.len().min(10_000)]);
            let _ = image.discard(ByteRange::new(0, len));
            if len > 0 {
                let _ = image.extent_at(len - 1);
            }
            let _ = image.flush();
        }
    }
}
