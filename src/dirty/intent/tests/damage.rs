//! Logs that were found damaged: what is recovered is never less than what was written.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::dirty::intent::format::{SECTOR_BYTES, SECTORS_MAX};
use crate::dirty::intent::simulated::JOB;

#[path = "../../../../tests/fuzz/checks.rs"]
mod checks;

/// Three sectors, the last of them not full, and its last word neither.
const REGIONS: u64 = 9001;
const SIZE: u64 = REGIONS * REGION - 4096;

/// A log of the disk with every region marked for which `is_marked` says so.
fn log_of(job: &JobId, size_bytes: u64, is_marked: impl Fn(u64) -> bool) -> Vec<u8> {
    let layout = Layout::new(size_bytes);
    let word = |at: usize| (0..64).filter(|bit| is_marked(at as u64 * 64 + bit)).fold(0, |word, bit| word | 1 << bit);
    (0..layout.sectors()).flat_map(|sector| encode(layout, job, sector, layout.words_of(sector).map(word))).collect()
}

fn every_third(region: u64) -> bool {
    region % 3 == 0
}

fn is_marked(bits: &[u64], region: u64) -> bool {
    bits[usize::try_from(region / 64).unwrap()] >> (region % 64) & 1 == 1
}

fn assert_superset(bits: &[u64], truth: impl Fn(u64) -> bool) {
    let missing = (0..REGIONS).find(|&region| truth(region) && !is_marked(bits, region));
    assert_eq!(missing, None, "a region that was marked is not");
}

#[test]
fn the_format_is_as_it_is_described() {
    let bytes = log_of(&JOB, SIZE, |region| region == 0 || region == 10 || region == 3648);
    assert_eq!(bytes.len(), 3 * 512);
    let second = &bytes[512..1024];
    assert_eq!(second[..16], *b"lm-intnt\x01\0\0\0\x01\0\0\0");
    assert_eq!(second[16..32], JOB.0);
    assert_eq!(second[32..40], SIZE.to_le_bytes());
    assert_eq!(second[40..48], (1_u64 << 20).to_le_bytes());
    assert_eq!((bytes[48], bytes[49], second[48]), (1, 4, 1));
    assert_eq!(second[504..508], [0; 4]);
    assert_eq!(second[508..], crc32c::crc32c(&second[..508]).to_le_bytes());
    assert_eq!(u32::from_le_bytes(bytes[508..512].try_into().unwrap()), 0x9cac_7fa6, "of version 1, for ever");
}

#[test]
fn regions_grow_with_the_disk() {
    let layout = |size| (Layout::new(size).region_bytes(), Layout::new(size).regions(), Layout::new(size).sectors());
    assert_eq!(layout(0), (1 << 20, 0, 1));
    assert_eq!(layout(1), (1 << 20, 1, 1));
    assert_eq!(layout(512 << 30), (1 << 20, 512 << 10, SECTORS_MAX));
    assert_eq!(layout((512 << 30) + 1), (2 << 20, (256 << 10) + 1, 72));
    assert_eq!(layout(16 << 40), (32 << 20, 512 << 10, SECTORS_MAX));
    assert_eq!(layout(u64::MAX), (1 << 45, 512 << 10, SECTORS_MAX));
}

#[test]
fn a_log_that_is_cut_anywhere_says_no_less() {
    let bytes = log_of(&JOB, SIZE, every_third);
    for len in 0..=bytes.len() {
        let (bits, found) = recover(&bytes[..len], &JOB, SIZE);
        assert_superset(&bits, every_third);
        let whole = len / SECTOR_BYTES;
        assert_eq!(found.missing_sectors as usize, 3 - whole);
        assert_eq!(found.bad_sectors(), found.missing_sectors);
        assert_eq!(found.presumed_regions as usize, [9001, 9001 - 3648, 9001 - 2 * 3648, 0][whole]);
        let of_sector = |sector: usize| sector as u64 * 3648..((sector as u64 + 1) * 3648).min(REGIONS);
        let exact = (0..whole).flat_map(of_sector).all(|region| is_marked(&bits, region) == every_third(region));
        assert!(exact && (whole..3).flat_map(of_sector).all(|region| is_marked(&bits, region)));
    }
    // Longer is no worse.
    let longer: Vec<u8> = bytes.iter().copied().chain([7; 700]).collect();
    assert_eq!(recover(&longer, &JOB, SIZE), recover(&bytes, &JOB, SIZE));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = log_of(&JOB, 700 * REGION, every_third);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let found = recover(&damaged, &JOB, 700 * REGION).1;
        assert_eq!((found.bad_sectors(), found.marked_regions), (1, 700), "bit {bit}");
    }
}

#[test]
fn a_log_of_something_else_is_not_believed() {
    let none = |_| false;
    let found = |bytes: &[u8]| {
        let (bits, found) = recover(bytes, &JOB, SIZE);
        assert_superset(&bits, |_| true);
        assert_eq!(found.presumed_regions, 9001);
        (found.damaged_sectors, found.unknown_sectors, found.foreign_sectors)
    };
    assert_eq!(found(&log_of(&JobId([1; 16]), SIZE, none)), (0, 0, 3), "another job");
    assert_eq!(found(&log_of(&JOB, SIZE - 1, none)), (0, 0, 3), "another size");
    let mut later = log_of(&JOB, SIZE, none);
    for sector in later.chunks_exact_mut(512) {
        sector[8] = 2;
    }
    assert_eq!(found(&later), (0, 3, 0), "a later version whose checksum is elsewhere");
    for sector in later.chunks_exact_mut(512) {
        let checksum = crc32c::crc32c(&sector[..508]);
        sector[508..].copy_from_slice(&checksum.to_le_bytes());
    }
    assert_eq!(found(&later), (0, 3, 0), "a later version");
    let mut turned = log_of(&JOB, SIZE, none);
    turned.rotate_left(512);
    assert_eq!(found(&turned), (3, 0, 0), "sectors in the wrong place");
    assert_eq!(found(&[0; 3 * 512]), (3, 0, 0), "zeroes");
    let text = recover(&turned, &JOB, SIZE).1.to_string();
    assert_eq!(text, "9001 of 9001 regions marked, 9001 of them because of 3 bad sectors of 3 (3 damaged)");
}

/// One way in which bytes go wrong.
#[derive(Clone, Debug)]
enum Damage {
    Flip { bit: usize },
    Zero { start: usize, len: usize },
    Copy { from: usize, to: usize, len: usize },
    Cut { len: usize },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = || 0..3 * SECTOR_BYTES;
    prop_oneof![
        4 => (0..3 * SECTOR_BYTES * 8).prop_map(|bit| Damage::Flip { bit }),
        1 => (at(), 1..700_usize).prop_map(|(start, len)| Damage::Zero { start, len }),
        1 => (at(), at(), 1..700_usize).prop_map(|(from, to, len)| Damage::Copy { from, to, len }),
        1 => (0..3_usize, 0..3_usize).prop_map(|(from, to)| Damage::Copy { from: from * 512, to: to * 512, len: 512 }),
        1 => at().prop_map(|len| Damage::Cut { len }),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let old = bytes.clone();
    match *damage {
        Damage::Flip { bit } => bytes.iter_mut().skip(bit / 8).take(1).for_each(|byte| *byte ^= 1 << (bit % 8)),
        Damage::Zero { start, len } => bytes.iter_mut().skip(start).take(len).for_each(|byte| *byte = 0),
        Damage::Copy { from, to, len } => {
            bytes.iter_mut().skip(to).zip(old.iter().skip(from)).take(len).for_each(|(place, byte)| *place = *byte);
        }
        Damage::Cut { len } => bytes.truncate(len),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_to_it_a_log_says_no_less(
        truth in prop::collection::vec(any::<u64>(), 141),
        damages in prop::collection::vec(damage(), 0..6),
    ) {
        let truth = |region: u64| region < REGIONS && is_marked(&truth, region);
        let mut bytes = log_of(&JOB, SIZE, truth);
        for damage in &damages {
            apply(&mut bytes, damage);
        }
        let (bits, found) = recover(&bytes, &JOB, SIZE);
        assert_superset(&bits, truth);
        if found.is_whole() {
            prop_assert!((0..REGIONS).all(|region| is_marked(&bits, region) == truth(region)));
        }
    }

    #[test]
    fn any_bytes_are_read_without_a_crash(
        bytes in prop::collection::vec(any::<u8>(), 0..1200),
        size in prop_oneof![20 => 0..4 * SIZE, 1 => any::<u64>()],
    ) {
        let input: Vec<u8> = [3].into_iter().chain(size.to_le_bytes()).chain(bytes).collect();
        checks::check(&input);
    }
}

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/recover")
}

#[test]
fn the_corpus_of_the_fuzzer_is_read() {
    let files: Vec<_> = std::fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 8, "{files:?}");
    for file in files {
        checks::check(&std::fs::read(&file).unwrap());
    }
}

/// Writes the corpus that the fuzzer starts from.
#[test]
#[ignore = "writes into the tree"]
fn write_the_corpus() {
    let job = checks::JOB;
    let whole = log_of(&job, SIZE, every_third);
    let flipped = whole.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == 700)).collect();
    let mut later = whole.clone();
    later[8] = 2;
    let seeds: [(&str, u8, u64, Vec<u8>); 9] = [
        ("empty", 0, 0, Vec::new()),
        ("no_regions", 0, 0, log_of(&job, 0, every_third)),
        ("one_region", 1, 1, log_of(&job, 1, every_third)),
        ("whole", 0, SIZE, whole.clone()),
        ("whole_and_bits_flipped", 101, SIZE, whole.clone()),
        ("cut", 0, SIZE, whole[..1000].to_vec()),
        ("flipped", 0, SIZE, flipped),
        ("later_version", 1, SIZE, later),
        ("another_size", 1, SIZE + 1, whole),
    ];
    std::fs::create_dir_all(corpus()).unwrap();
    for (name, options, size, log) in seeds {
        let bytes: Vec<u8> = [options].into_iter().chain(size.to_le_bytes()).chain(log).collect();
        std::fs::write(corpus().join(name), bytes).unwrap();
    }
}
