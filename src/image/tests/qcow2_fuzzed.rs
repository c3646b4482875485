//! The fuzzer's corpus of qcow2 files, and files that differ from one of it by a bit.

use super::qcow2::{new_file, qemu, qemu_img, text};
use super::*;
use std::path::PathBuf;

#[path = "../../../tests/fuzz/qcow2_checks.rs"]
mod qcow2_checks;

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/qcow2")
}

fn seeds() -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<_> = std::fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn the_corpus_of_the_fuzzer_is_served_or_refused() {
    let directory = quick_directory();
    let seeds = seeds();
    assert!(seeds.len() >= 10, "{seeds:?}");
    for (path, input) in &seeds {
        println!("{}", path.display());
        for options in [0, 1] {
            let mut input = input.clone();
            input[0] = options;
            qcow2_checks::check(&input, directory.path());
        }
    }
}

/// In the header, and in all tables: files of the corpus are a few clusters of 512 bytes.
#[test]
fn one_bit_that_is_flipped_anywhere_does_no_harm() {
    let directory = quick_directory();
    for (path, input) in seeds() {
        println!("{}", path.display());
        for at in (9..input.len().min(9 + 6 * 512)).filter(|at| *at < 9 + 112 || input[*at] != 0) {
            let mut flipped = input.clone();
            flipped[at] ^= 1 << (at % 8);
            flipped[0] = 1;
            qcow2_checks::check(&flipped, directory.path());
        }
    }
}

/// Writes the corpus that the fuzzer starts from.
#[test]
#[ignore = "writes into the tree"]
fn write_the_corpus() {
    let directory = quick_directory();
    let at = |name: &str| directory.path().join(name);
    let small = "cluster_size=512";
    std::fs::create_dir_all(corpus()).unwrap();
    let put = |name: &str, file: &[u8]| {
        // What was reserved and not used is a hole at the end.
        let len = file.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1).next_multiple_of(512);
        let file = &file[..len.min(file.len())];
        let bytes: Vec<u8> = [1].into_iter().chain(3_u64.to_le_bytes()).chain(file.iter().copied()).collect();
        std::fs::write(corpus().join(name), bytes).unwrap();
    };
    let made = |options: &str, written: bool| {
        let path = at("disk.qcow2");
        std::fs::write(at("base.img"), vec![0xb5; 1 << 20]).unwrap();
        new_file(&path, options, 64 << 10).expect("qemu-img");
        if written {
            // By QEMU, which takes no more than it needs: the files stay small.
            let commands = ["-c", "write -q -P 1 1k 1k", "-c", "write -q -P 2 40k 700", "-c", "discard -q 1k 512"];
            let arguments = [&["-f", "qcow2"], &commands[..], &[text(&path)]].concat();
            assert!(qemu("qemu-io", &arguments).unwrap().status.success());
        }
        std::fs::read(path).unwrap()
    };
    let sound = made(small, true);
    put("no_bytes", b"");
    put("header_only", &sound[..512]);
    put("new", &made(small, false));
    put("written", &sound);
    put("version_2", &made("cluster_size=512,compat=0.10", true));
    put("over_a_base", &made("cluster_size=512,backing_file=base.img,backing_fmt=raw", true));
    put("narrow_refcounts", &made("cluster_size=512,refcount_bits=1", true));
    put("wide_refcounts", &made("cluster_size=512,refcount_bits=64", true));
    qemu_img(&["snapshot", "-q", "-c", "one", text(&at("disk.qcow2"))]).unwrap();
    put("with_a_snapshot", &std::fs::read(at("disk.qcow2")).unwrap());
    let (raw, packed) = (at("raw"), at("packed.qcow2"));
    std::fs::write(&raw, [b'x'; 4096]).unwrap();
    qemu_img(&["convert", "-c", "-O", "qcow2", "-o", small, text(&raw), text(&packed)]).unwrap();
    put("compressed", &std::fs::read(&packed).unwrap());
    made("cluster_size=512", true);
    qemu_img(&["rebase", "-q", "-u", "-F", "qcow2", "-b", "disk.qcow2", text(&at("disk.qcow2"))]).unwrap();
    put("over_itself", &std::fs::read(at("disk.qcow2")).unwrap());
    made("cluster_size=512", true);
    qemu_img(&["rebase", "-q", "-u", "-F", "raw", "-b", "/etc/hostname", text(&at("disk.qcow2"))]).unwrap();
    put("over_what_is_elsewhere", &std::fs::read(at("disk.qcow2")).unwrap());
    let mut huge = sound.clone();
    huge[24..32].copy_from_slice(&(1_u64 << 63).to_be_bytes());
    put("of_2_to_the_63_bytes", &huge);
}
