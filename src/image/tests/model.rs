//! Random requests against a vector of bytes. proptest prints the seed and the shortest sequence that fails.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
pub(in crate::image) enum Step {
    Write(u64, usize, u8),
    Zero(u64, usize),
    Discard(u64, usize),
    Allocate(u64, usize),
    Resize(u64),
    Flush,
}

pub(in crate::image) const SIZE_MAX: u64 = 300_000;

fn place() -> impl Strategy<Value = (u64, usize)> {
    let offset = prop_oneof![0..SIZE_MAX, (0..SIZE_MAX / 512).prop_map(|block| block * 512)];
    let len = prop_oneof![0..600_usize, 0..70_000_usize, (0..40_usize).prop_map(|blocks| blocks * 512)];
    (offset, len)
}

pub(in crate::image) fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (place(), any::<u8>()).prop_map(|((offset, len), byte)| Step::Write(offset, len, byte)),
        2 => place().prop_map(|(offset, len)| Step::Zero(offset, len)),
        2 => place().prop_map(|(offset, len)| Step::Discard(offset, len)),
        1 => place().prop_map(|(offset, len)| Step::Allocate(offset, len)),
        1 => (1..SIZE_MAX).prop_map(Step::Resize),
        1 => Just(Step::Flush),
    ]
}

pub(super) fn clip(offset: u64, len: usize, size: usize) -> ByteRange {
    ByteRange::new(offset.min(size as u64), len as u64).intersect(ByteRange::new(0, size as u64))
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

fn tolerate(result: Result<()>) {
    if let Err(error) = result {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

pub(in crate::image) fn apply(image: &dyn Image, model: &mut Vec<u8>, step: &Step) {
    match *step {
        Step::Write(offset, len, seed) => {
            let range = clip(offset, len, model.len());
            let data: Vec<u8> = (0..range.len()).map(|at| (at % 251) as u8 ^ seed).collect();
            image.write_at(range.start(), &data).unwrap();
            if !range.is_empty() {
                model[span(range)].copy_from_slice(&data);
            }
        }
        Step::Zero(offset, len) => {
            let range = clip(offset, len, model.len());
            image.write_zeroes(range).unwrap();
            if !range.is_empty() {
                model[span(range)].fill(0);
            }
        }
        Step::Discard(offset, len) => {
            let range = clip(offset, len, model.len());
            match image.discard(range) {
                Ok(()) if !range.is_empty() => model[span(range)].fill(0),
                result => tolerate(result),
            }
        }
        Step::Allocate(offset, len) => tolerate(image.allocate(clip(offset, len, model.len()))),
        Step::Resize(size) => match image.resize(size) {
            Ok(()) => model.resize(usize::try_from(size).unwrap(), 0),
            result => tolerate(result),
        },
        Step::Flush => image.flush().unwrap(),
    }
}

/// Everything, in pieces whose ends and memory are aligned to nothing.
pub(in crate::image) fn read_all(image: &dyn Image) -> Vec<u8> {
    let mut bytes = vec![0xEE; usize::try_from(image.size_bytes()).unwrap() + 1];
    let end = bytes.len();
    let mut offset = 0;
    for chunk in bytes[1..end].chunks_mut(33_333) {
        image.read_at(offset, chunk).unwrap();
        offset += chunk.len() as u64;
    }
    bytes.split_off(1)
}

/// Extents cover the image without a gap, and what is no data reads as zeroes.
pub(super) fn check_extents(image: &dyn Image, model: &[u8]) {
    let mut offset = 0;
    while offset < image.size_bytes() {
        let extent = image.extent_at(offset);
        assert_eq!(extent.range.start(), offset);
        assert!(!extent.range.is_empty() && extent.range.end() <= image.size_bytes());
        assert!(extent.status == ExtentStatus::Data || model[span(extent.range)].iter().all(|&byte| byte == 0));
        offset = extent.range.end();
    }
}

pub(in crate::image) fn check_against_model(image: &dyn Image, steps: &[Step]) {
    let mut model = vec![0; usize::try_from(image.size_bytes()).unwrap()];
    for step in steps {
        apply(image, &mut model, step);
        assert_eq!(image.size_bytes(), model.len() as u64);
    }
    assert!(read_all(image) == model, "the bytes differ after {steps:?}");
    check_extents(image, &model);
    let beyond = image.size_bytes();
    assert_eq!(image.write_at(beyond, &[1]).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(image.read_at(beyond, &mut [1]).unwrap_err().kind(), ErrorKind::Usage);
}

fn check_file(directory: &Path, cache: CacheMode, size: u64, steps: &[Step]) {
    let path = directory.join("disk.img");
    file_of(&path, size);
    let Some(image) = try_open(&path, cache) else { return };
    check_against_model(&*image, steps);
    // Another program, which goes through the page cache, sees the same, and no tail was extended.
    let seen = std::fs::read(&path).unwrap();
    assert!(seen == read_all(&*image));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_behave_like_a_vector(size in 1..SIZE_MAX, steps in proptest::collection::vec(step(), 1..25)) {
        for directory in directories() {
            for cache in MODES {
                check_file(directory.path(), cache, size, &steps);
            }
        }
    }

    #[test]
    fn memory_behaves_like_a_vector(size in 1..SIZE_MAX, steps in proptest::collection::vec(step(), 1..40)) {
        check_against_model(&*memory::MemoryImage::new("m", size), &steps);
    }

    #[test]
    fn devices_behave_like_a_vector(steps in proptest::collection::vec(step(), 1..25)) {
        let Some(device) = devices::LoopDevice::new(1 << 20) else { return Ok(()) };
        for cache in MODES {
            device.zero();
            check_against_model(&*try_open(device.path(), cache).unwrap(), &steps);
        }
    }
}
