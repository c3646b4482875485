//! qcow2 images, held against QEMU's own tools: what they see must be what we wrote, at any instant.

use super::model::{SIZE_MAX, Step, apply, check_extents, read_all, step};
use super::*;
use proptest::prelude::*;
use std::process::{Command, Output};

/// Runs a program of QEMU's; its output, if there is such a program.
pub(super) fn qemu(program: &str, arguments: &[&str]) -> Option<Output> {
    Command::new(program).args(arguments).output().ok()
}

pub(super) fn qemu_img(arguments: &[&str]) -> Option<()> {
    let output = qemu("qemu-img", arguments)?;
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Some(())
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A new file, made by qemu-img; `None` without it.
pub(super) fn new_file(path: &Path, options: &str, size_bytes: u64) -> Option<()> {
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(path), &size_bytes.to_string()])
}

/// What `qemu-img check` says: no errors, and no leaked clusters either, unless they may be there.
pub(super) fn check_file(path: &Path, leaks: bool) {
    let output = qemu("qemu-img", &["check", "-f", "qcow2", text(path)]).unwrap();
    let code = output.status.code().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(code == 0 || (leaks && code == 3), "qemu-img check ends with {code}:\n{said}");
}

/// The disk in the file is what the vector says, for QEMU.
pub(super) fn compare(path: &Path, model: &[u8]) {
    let raw = path.with_extension("model");
    std::fs::write(&raw, model).unwrap();
    let output = qemu("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", text(path), text(&raw)]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

pub(super) fn open_qcow2(path: &Path, cache: CacheMode) -> Arc<dyn Image> {
    open(path, &options(cache)).unwrap()
}

/// As a SIGKILL at this moment would leave it.
fn killed_now(path: &Path) -> std::path::PathBuf {
    let copy = path.with_extension("killed.qcow2");
    std::fs::copy(path, &copy).unwrap();
    copy
}

fn whole_sectors(size: u64) -> u64 {
    size.next_multiple_of(512)
}

const KINDS: [&str; 6] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=2M",
    "cluster_size=1k,compat=0.10",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_behaves_like_a_vector_and_qemu_agrees_whenever_we_die(
        kind in 0..KINDS.len(),
        size in 1..SIZE_MAX,
        steps in proptest::collection::vec(step(), 1..25),
        kill in 0..25_usize,
    ) {
        let directory = quick_directory();
        let path = directory.path().join("disk.qcow2");
        let size = whole_sectors(size);
        if new_file(&path, KINDS[kind], size).is_none() {
            return Ok(());
        }
        let image = open_qcow2(&path, CacheMode::Writeback);
        let mut model = vec![0; usize::try_from(size).unwrap()];
        for (number, step) in steps.iter().enumerate() {
            let step = match step {
                Step::Resize(size) => Step::Resize(whole_sectors(*size)),
                other => other.clone(),
            };
            apply(&*image, &mut model, &step);
            if number == kill {
                let killed = killed_now(&path);
                check_file(&killed, true);
                compare(&killed, &model);
            }
        }
        prop_assert!(read_all(&*image) == model);
        check_extents(&*image, &model);
        drop(image);
        check_file(&path, false);
        compare(&path, &model);
    }

    #[test]
    fn a_chain_behaves_like_a_vector_and_qemu_agrees_whenever_we_die(
        kind in 0..KINDS.len(),
        size in 1..SIZE_MAX,
        below in (1..SIZE_MAX, 1..SIZE_MAX),
        steps in proptest::collection::vec(step(), 1..25),
        kill in 0..25_usize,
    ) {
        let directory = quick_directory();
        let at = |name: &str| directory.path().join(name);
        let (size, base, middle) = (whole_sectors(size), whole_sectors(below.0), whole_sectors(below.1));
        // A raw base with holes, and a qcow2 file over it that has some of it; both may be shorter or longer than the top.
        let mut model: Vec<u8> = (0..base).map(|at| if at / 5000 % 3 == 1 { 0 } else { (at % 251) as u8 | 1 }).collect();
        std::fs::write(at("base.img"), &model).unwrap();
        let options = format!("{},backing_file=base.img,backing_fmt=raw", "cluster_size=4k");
        if new_file(&at("middle.qcow2"), &options, middle).is_none() {
            return Ok(());
        }
        model.resize(usize::try_from(middle).unwrap(), 0);
        {
            let image = open_qcow2(&at("middle.qcow2"), CacheMode::Writeback);
            apply(&*image, &mut model, &Step::Write(10_000, 20_000, 7));
            apply(&*image, &mut model, &Step::Zero(50_000, 30_000));
        }
        let options = format!("{},backing_file=middle.qcow2,backing_fmt=qcow2", KINDS[kind]);
        new_file(&at("top.qcow2"), &options, size).unwrap();
        model.resize(usize::try_from(size).unwrap(), 0);
        let image = open_qcow2(&at("top.qcow2"), CacheMode::Writeback);
        prop_assert!(read_all(&*image) == model);
        for (number, step) in steps.iter().enumerate() {
            apply(&*image, &mut model, step);
            if number == kill {
                let killed = killed_now(&at("top.qcow2"));
                check_file(&killed, true);
                compare(&killed, &model);
            }
        }
        prop_assert!(read_all(&*image) == model);
        check_extents(&*image, &model);
        drop(image);
        for name in ["top.qcow2", "middle.qcow2"] {
            check_file(&at(name), false);
        }
        compare(&at("top.qcow2"), &model);
    }
}

#[test]
fn direct_io_serves_the_same_disk() {
    for directory in directories() {
        let path = directory.path().join("disk.qcow2");
        if new_file(&path, "cluster_size=4k", 1 << 20).is_none() {
            return;
        }
        let Some(image) = try_open(&path, CacheMode::None) else { continue };
        let mut model = vec![0; 1 << 20];
        for (offset, len) in [(0, 4096), (5000, 100), (8192, 70_000), (1_000_001, 48_575), (512, 512)] {
            apply(&*image, &mut model, &Step::Write(offset, len, 3));
        }
        apply(&*image, &mut model, &Step::Discard(20_000, 30_000));
        apply(&*image, &mut model, &Step::Flush);
        apply(&*image, &mut model, &Step::Write(30_000, 100, 9));
        assert!(read_all(&*image) == model);
        let killed = killed_now(&path);
        check_file(&killed, true);
        compare(&killed, &model);
        drop(image);
        check_file(&path, false);
        compare(&path, &model);
        let closed = std::fs::metadata(&path).unwrap();
        drop(open_qcow2(&path, CacheMode::None));
        let opened = std::fs::metadata(&path).unwrap();
        assert_eq!(closed.len(), opened.len(), "opening it changes nothing");
        assert_eq!(closed.modified().unwrap(), opened.modified().unwrap(), "opening it changes nothing");

        new_file(&path, "cluster_size=512", 1 << 20).unwrap();
        let error = open(&path, &options(CacheMode::None)).unwrap_err();
        assert!(error.to_string().contains("cache=none needs clusters of 4096 bytes"), "{error}");
    }
}

#[test]
fn discarded_space_is_given_back_and_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=64k", 64 << 20).is_none() {
        return;
    }
    let image = open_qcow2(&path, CacheMode::Writeback);
    let empty = image.allocated_bytes().unwrap();
    image.write_at(0, &vec![5; 16 << 20]).unwrap();
    image.flush().unwrap();
    assert!(image.allocated_bytes().unwrap() >= empty + (16 << 20));
    image.discard(ByteRange::new(0, 16 << 20)).unwrap();
    image.flush().unwrap();
    let l2_table = 64 << 10;
    assert!(image.allocated_bytes().unwrap() <= empty + l2_table, "{}", image.allocated_bytes().unwrap());
    for round in 0..20 {
        image.write_at(0, &vec![round; 16 << 20]).unwrap();
        image.discard(ByteRange::new(0, 16 << 20)).unwrap();
        image.flush().unwrap();
    }
    image.write_at(0, &vec![77; 16 << 20]).unwrap();
    drop(image);
    assert!(std::fs::metadata(&path).unwrap().len() < 160 << 20, "the file grows with every round");
    check_file(&path, false);
}

#[test]
fn many_writers_of_one_cluster_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("base.img"), vec![0xBB; 4 << 20]).unwrap();
    for (name, more) in [("alone.qcow2", ""), ("over.qcow2", ",backing_file=base.img,backing_fmt=raw")] {
        if new_file(&at(name), &format!("cluster_size=64k{more}"), 4 << 20).is_none() {
            return;
        }
        let image = open_qcow2(&at(name), CacheMode::Writeback);
        let mut model = vec![if more.is_empty() { 0 } else { 0xBB_u8 }; 4 << 20];
        let len = 1024;
        std::thread::scope(|scope| {
            for writer in 0..4_u8 {
                let image = &*image;
                scope.spawn(move || {
                    for place in (usize::from(writer)..(4 << 20) / len).step_by(4).take(600) {
                        let data = vec![writer + 1; len];
                        image.write_at((place * len) as u64, &data).unwrap();
                        let mut seen = vec![0; len];
                        image.read_at((place * len) as u64, &mut seen).unwrap();
                        assert!(seen == data);
                    }
                });
            }
            scope.spawn(|| (0..5).for_each(|_| image.flush().unwrap()));
        });
        for writer in 0..4_usize {
            for place in (writer..(4 << 20) / len).step_by(4).take(600) {
                model[place * len..(place + 1) * len].fill(u8::try_from(writer + 1).unwrap());
            }
        }
        assert!(read_all(&*image) == model);
        drop(image);
        check_file(&at(name), false);
        compare(&at(name), &model);
    }
}

#[test]
fn a_cluster_is_not_given_away_under_a_reader() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=64k", 8 << 20).is_none() {
        return;
    }
    let image = open_qcow2(&path, CacheMode::Writeback);
    let gate = super::super::gate::Gate::new();
    let place = ByteRange::new(0, 64 << 10);
    image.write_at(0, &vec![1; 64 << 10]).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let gate = gate.clone();
            super::super::qcow2::journal::before_reading(move || gate.pass());
            let mut seen = vec![9; 64 << 10];
            image.read_at(0, &mut seen).unwrap();
            seen
        });
        gate.wait_for_arrivals(1);
        // The reader knows the cluster and has not read it yet.
        let other = scope.spawn(|| {
            image.discard(place).unwrap();
            image.flush().unwrap();
        });
        // Long enough for it to be freed, if nothing kept it.
        std::thread::sleep(std::time::Duration::from_millis(300));
        gate.open();
        assert!(reader.join().unwrap().iter().all(|&byte| byte == 1), "the cluster was freed under the reader");
        other.join().unwrap();
    });
}

#[test]
fn what_free_clusters_held_is_never_seen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=64k", 8 << 20).is_none() {
        return;
    }
    // As a program leaves it that frees clusters and does not punch them.
    let mut file = std::fs::read(&path).unwrap();
    file.resize(file.len() + (4 << 20), 0xEE);
    std::fs::write(&path, file).unwrap();
    let image = open_qcow2(&path, CacheMode::Writeback);
    let mut model = vec![0; 8 << 20];
    for step in [Step::Write(100, 512, 3), Step::Write(70_000, 1, 4), Step::Write(900_000, 70_000, 5)] {
        apply(&*image, &mut model, &step);
    }
    assert!(read_all(&*image) == model);
    drop(image);
    check_file(&path, false);
    compare(&path, &model);
}

#[test]
fn a_snapshot_in_the_file_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=4k", 1 << 20).is_none() {
        return;
    }
    let mut model = vec![0; 1 << 20];
    {
        let image = open_qcow2(&path, CacheMode::Writeback);
        apply(&*image, &mut model, &Step::Write(0, 300_000, 5));
    }
    let then = model.clone();
    qemu_img(&["snapshot", "-c", "then", text(&path)]).unwrap();
    let image = open_qcow2(&path, CacheMode::Writeback);
    for step in [
        Step::Write(100_000, 5000, 6),
        Step::Discard(8192, 50_000),
        Step::Flush,
        Step::Write(10_000, 300, 8),
        Step::Zero(200_100, 20_000),
        Step::Write(600_000, 100, 1),
    ] {
        apply(&*image, &mut model, &step);
    }
    assert_eq!(image.resize(2 << 20).unwrap_err().kind(), ErrorKind::Unsupported);
    let killed = killed_now(&path);
    check_file(&killed, true);
    compare(&killed, &model);
    drop(image);
    check_file(&path, false);
    compare(&path, &model);
    qemu_img(&["snapshot", "-a", "then", text(&path)]).unwrap();
    compare(&path, &then);
    qemu_img(&["snapshot", "-d", "then", text(&path)]).unwrap();
    check_file(&path, false);
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut model: Vec<u8> = (0..2_000_000_u32).map(|at| (at / 300 % 17) as u8).collect();
    model.resize(2_000_384, 0);
    std::fs::write(at("raw.img"), &model).unwrap();
    let (raw, path) = (at("raw.img"), at("disk.qcow2"));
    if qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", text(&raw), text(&path)]).is_none() {
        return;
    }
    let image = open_qcow2(&path, CacheMode::Writeback);
    assert!(read_all(&*image) == model);
    for step in
        [Step::Write(70_000, 100, 3), Step::Write(131_072, 65_536, 4), Step::Zero(300_000, 400_000), Step::Flush]
    {
        apply(&*image, &mut model, &step);
    }
    assert!(read_all(&*image) == model);
    drop(image);
    check_file(&path, false);
    compare(&path, &model);
}

#[test]
fn bitmaps_of_qemu_are_invalid_once_we_wrote() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=64k", 1 << 20).is_none() {
        return;
    }
    qemu_img(&["bitmap", "--add", text(&path), "backup"]).unwrap();
    let says = || {
        let output = qemu("qemu-img", &["info", "--output=json", text(&path)]).unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(says().contains("\"backup\"") && !says().contains("in-use"));
    drop(open(&path, &OpenOptions::default()).unwrap());
    let before = std::fs::read(&path).unwrap();
    drop(open(&path, &OpenOptions::default()).unwrap());
    assert!(before == std::fs::read(&path).unwrap(), "a reader changes nothing");
    assert_eq!(before[88..96], [0, 0, 0, 0, 0, 0, 0, 1], "valid until now");
    open_qcow2(&path, CacheMode::Writeback).write_at(0, &[1]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap()[88..96], [0; 8]);
    check_file(&path, true);
}

#[test]
fn a_created_file_is_one_that_qemu_would_make() {
    let directory = tempfile::tempdir().unwrap();
    if qemu("qemu-img", &["--version"]).is_none() {
        return;
    }
    for size in [0, 1, 512, (1 << 20) + 100, 5 << 30, 5 << 40] {
        let path = directory.path().join("new.qcow2");
        let image = create(&path, size, None, &Layout::default(), &options(CacheMode::Writeback)).unwrap();
        assert_eq!((image.format(), image.size_bytes()), (Format::Qcow2, whole_sectors(size)));
        assert_eq!(image.properties().cluster_bytes, Some(64 << 10));
        if size > 0 {
            assert_eq!(image.extent_at(0).status, ExtentStatus::Hole);
            image.write_at(size - 1, &[7]).unwrap();
        }
        drop(image);
        check_file(&path, false);
        let info = qemu("qemu-img", &["info", "--output=json", text(&path)]).unwrap();
        assert!(String::from_utf8_lossy(&info.stdout).contains(&format!("\"virtual-size\": {}", whole_sectors(size))));
        std::fs::remove_file(&path).unwrap();
    }
    let error =
        create(&directory.path().join("new.qcow2"), 1 << 62, None, &Layout::default(), &options(CacheMode::Writeback))
            .unwrap_err();
    assert!(error.to_string().contains("cannot hold") && !directory.path().join("new.qcow2").exists());
}

#[test]
fn growing_a_file_past_its_refcount_table_keeps_it_sound() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    // One cluster of 512 bytes holds 64 entries of the refcount table: 64 blocks of 256 clusters each, 8 MiB.
    if new_file(&path, "cluster_size=512", 24 << 20).is_none() {
        return;
    }
    let image = open_qcow2(&path, CacheMode::Writeback);
    for place in 0..20_u64 {
        image.write_at(place << 20, &vec![u8::try_from(place + 1).unwrap(); 1 << 20]).unwrap();
    }
    let killed = killed_now(&path);
    check_file(&killed, true);
    let mut model = vec![0; 24 << 20];
    for place in 0..20_usize {
        model[place << 20..(place + 1) << 20].fill(u8::try_from(place + 1).unwrap());
    }
    compare(&killed, &model);
    drop(image);
    check_file(&path, false);
    compare(&path, &model);
}

#[test]
fn qemu_may_look_at_our_file_but_not_write_it_nor_what_is_beneath() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("base.img"), vec![1; 1 << 20]).unwrap();
    if new_file(&at("top.qcow2"), "backing_file=base.img,backing_fmt=raw", 1 << 20).is_none() {
        return;
    }
    let write = |name: &str, format: &str| {
        let output = qemu("qemu-io", &["-f", format, "-c", "write 0 512", text(&at(name))]).unwrap();
        output.status.success()
    };
    let image = open_qcow2(&at("top.qcow2"), CacheMode::Writeback);
    assert!(!write("top.qcow2", "qcow2") && !write("base.img", "raw"));
    assert_eq!(open(&at("base.img"), &options(CacheMode::Writeback)).unwrap_err().kind(), ErrorKind::Locked);
    assert!(qemu("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512", text(&at("base.img"))]).unwrap().status.success());
    assert!(qemu("qemu-img", &["info", "-U", text(&at("top.qcow2"))]).unwrap().status.success());
    drop(image);
    assert!(write("top.qcow2", "qcow2"));
}
