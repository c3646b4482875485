//! What must hold of a qcow2 file, whatever its bytes are. Shared by the fuzzer and by an ordinary test of its corpus.

use std::path::Path;

use super::{ByteRange, CacheMode, ExtentStatus, Format, Image, OpenOptions, open};

/// What is looked at of a disk, which may claim to be of any size.
const LOOKED_AT_BYTES: u64 = 1 << 20;
const SECTOR_BYTES: u64 = 512;
/// So many extents are asked for.
const EXTENTS_MAX: usize = 4096;

/// `input`: one byte of options, where to write (8 bytes), and then the file. Option 1: it is opened for writing. Its directory has
/// `base.img`, of one MiB. `place`: an empty directory.
pub fn check(input: &[u8], place: &Path) {
    let Some((&[options, ref at @ ..], file)) = input.split_first_chunk::<9>() else { return };
    let writable = options & 1 == 1;
    let path = place.join("disk.qcow2");
    std::fs::write(&path, file).expect("write");
    std::fs::write(place.join("base.img"), vec![0xb5; 1 << 20]).expect("write");
    let open_it = |writable| {
        let options = OpenOptions {
            format: Some(Format::Qcow2),
            writable,
            cache: CacheMode::Writeback,
            ..OpenOptions::default()
        };
        open(&path, &options)
    };
    let image = match open_it(writable) {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(std::fs::read(&path).expect("read"), file, "what is refused is not changed");
            return;
        }
    };
    let size_bytes = image.size_bytes();
    assert!(i64::try_from(size_bytes).is_ok() && image.properties().cluster_bytes.is_some_and(u64::is_power_of_two));
    let disk = ByteRange::new(0, size_bytes);
    for start in [0, size_bytes / 2, size_bytes.saturating_sub(LOOKED_AT_BYTES)] {
        look(&*image, ByteRange::new(start, LOOKED_AT_BYTES).intersect(disk));
    }
    image.read_at(size_bytes, &mut [0]).expect_err("past the end");
    if !writable {
        drop(image);
        assert_eq!(std::fs::read(&path).expect("read"), file, "a reader changes nothing");
        return;
    }
    let sectors = size_bytes / SECTOR_BYTES;
    if sectors > 0 {
        // One sector is in one cluster, of whatever size: whatever else the tables make of that one, it is what was written last.
        let offset = u64::from_le_bytes(*at) % sectors * SECTOR_BYTES;
        let sector = ByteRange::new(offset, SECTOR_BYTES);
        let mut seen = [0; SECTOR_BYTES as usize];
        if image.write_at(offset, &[0x5c; SECTOR_BYTES as usize]).is_ok() {
            image.read_at(offset, &mut seen).expect("what was acknowledged is there");
            assert!(seen.iter().all(|&byte| byte == 0x5c), "an acknowledged write is gone");
        }
        if image.write_zeroes(sector).is_ok() {
            image.read_at(offset, &mut seen).expect("what was acknowledged is there");
            assert!(seen.iter().all(|&byte| byte == 0), "zeroes are not zero");
        }
        let _ = image.write_at(offset, &vec![1; (size_bytes - offset).min(100_000) as usize]);
        let _ = image.discard(ByteRange::new(offset, LOOKED_AT_BYTES).intersect(disk));
        look(&*image, ByteRange::new(offset, LOOKED_AT_BYTES).intersect(disk));
    }
    let _ = image.flush();
    drop(image);
    // Whatever became of it, the next look does not crash.
    if let Ok(image) = open_it(false) {
        look(&*image, ByteRange::new(0, LOOKED_AT_BYTES).intersect(ByteRange::new(0, image.size_bytes())));
    }
}

/// Extents follow each other, and where they say zero there is nothing else.
fn look(image: &dyn Image, range: ByteRange) {
    let mut at = range.start();
    let mut buffer = vec![0; 64 << 10];
    for _ in 0..EXTENTS_MAX {
        if at >= range.end() {
            break;
        }
        let extent = image.extent_at(at);
        assert!(extent.range.start() == at && !extent.range.is_empty() && extent.range.end() <= image.size_bytes());
        let within = image.extent_within(ByteRange::from_bounds(at, range.end()));
        assert!(within.range.start() == at && !within.range.is_empty());
        let beneath = image.shows_beneath(1, ByteRange::from_bounds(at, range.end()));
        assert!(beneath.start() == at && beneath.end() <= range.end());
        let part = extent.range.intersect(range).split(buffer.len() as u64).0;
        let bytes = &mut buffer[..part.len() as usize];
        let read = image.read_at(at, bytes);
        if extent.status != ExtentStatus::Data && read.is_ok() {
            assert!(bytes.iter().all(|&byte| byte == 0), "{extent:?} is not zero");
        }
        at = extent.range.end();
    }
}
