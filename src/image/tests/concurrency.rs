//! Many writers at once.

use super::*;

/// Writers that share every block, each with bytes of its own: none may lose another's.
fn interleave(image: &dyn Image, offset: u64, len: usize, writers: usize, rounds: u8) {
    std::thread::scope(|scope| {
        for writer in 0..writers {
            scope.spawn(move || {
                for round in 1..=rounds {
                    for place in (writer * 100..len).step_by(writers * 100) {
                        let data = [round ^ u8::try_from(writer).unwrap(); 100];
                        image.write_at(offset + place as u64, &data[..100.min(len - place)]).unwrap();
                    }
                }
            });
        }
    });
    let mut seen = vec![0; len];
    image.read_at(offset, &mut seen).unwrap();
    for (place, byte) in seen.into_iter().enumerate() {
        let writer = u8::try_from(place / 100 % writers).unwrap();
        assert_eq!(byte, rounds ^ writer, "byte {place} of writer {writer}");
    }
}

#[test]
fn parallel_writes_within_one_block_lose_nothing() {
    for directory in directories() {
        for cache in MODES {
            // The end lies within a block: the last writes go to the tail.
            let path = directory.path().join("disk.img");
            file_of(&path, 200_000 + 77);
            let Some(image) = try_open(&path, cache) else { continue };
            interleave(&*image, 65_536 - 1000, 4000, 4, 12);
            interleave(&*image, 200_077 - 3900, 3900, 4, 3);
            interleave(&*image, 196_608 - 1950, 3900, 4, 3);
        }
    }
}

#[test]
fn parallel_writes_within_one_block_of_a_device_lose_nothing() {
    let Some(device) = devices::LoopDevice::new(1 << 20) else { return };
    for cache in MODES {
        interleave(&*try_open(device.path(), cache).unwrap(), 65_536 - 1000, 4000, 4, 8);
    }
}

#[test]
fn zeroes_and_discards_beside_partial_writes_lose_nothing() {
    for directory in directories() {
        for cache in MODES {
            let path = directory.path().join("disk.img");
            file_of(&path, 1 << 20);
            let Some(image) = try_open(&path, cache) else { continue };
            let image = &*image;
            // One writes 100 bytes of a block over and over, the other zeroes its rest.
            std::thread::scope(|scope| {
                scope.spawn(|| (1..=200_u8).for_each(|round| image.write_at(8192 + 50, &[round; 100]).unwrap()));
                scope.spawn(|| {
                    for round in 0..100 {
                        let range = ByteRange::new(8192 + 150, 300);
                        image.write_at(range.start(), &[9; 300]).unwrap();
                        if round % 2 == 0 { image.write_zeroes(range).unwrap() } else { image.discard(range).unwrap() }
                    }
                });
            });
            let mut seen = [1; 512];
            image.read_at(8192, &mut seen).unwrap();
            assert!(seen[50..150].iter().all(|&byte| byte == 200) && seen[150..450].iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn a_file_that_shrinks_and_grows_under_writers_is_never_extended_by_them() {
    for directory in directories() {
        for cache in MODES {
            let path = directory.path().join("disk.img");
            file_of(&path, 500_000);
            let Some(image) = try_open(&path, cache) else { continue };
            let image = &*image;
            std::thread::scope(|scope| {
                for seed in 0..3_u64 {
                    scope.spawn(move || {
                        for round in 0..300_u64 {
                            let offset = (round * 7919 + seed * 104_729) % 499_000;
                            if let Err(error) = image.write_at(offset, &[1; 999]) {
                                assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
                            }
                            let mut seen = [0; 700];
                            if let Err(error) = image.read_at(offset, &mut seen) {
                                assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
                            }
                        }
                    });
                }
                scope.spawn(|| {
                    for size in [100_001, 500_000, 65_536, 300_333, 4096, 123_457] {
                        std::thread::sleep(std::time::Duration::from_millis(3));
                        image.resize(size).unwrap();
                        assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
                    }
                });
            });
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 123_457);
        }
    }
}
