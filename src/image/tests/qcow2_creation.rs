//! New qcow2 files, laid out as they are told.

use super::qcow2::{check_file, compare, new_file, qemu, text};
use super::*;

fn info(path: &Path) -> serde_json::Value {
    let output = qemu("qemu-img", &["info", "--output=json", text(path)]).unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn over(file: &str, format: Option<Format>) -> Option<BackingFile> {
    Some(BackingFile { file: file.to_owned(), format })
}

fn attempt(path: &Path, size_bytes: u64, layout: &Layout) -> Result<Arc<dyn Image>> {
    create(path, size_bytes, None, layout, &options(CacheMode::Writeback))
}

#[test]
fn clusters_version_and_backing_file_are_as_told_and_used_so() {
    const SIZE: u64 = 6 << 20;
    let directory = quick_directory();
    let at = |name: &str| directory.path().join(name);
    if new_file(&at("base.qcow2"), "cluster_size=4k", SIZE / 2).is_none() {
        return;
    }
    let old: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8 + 1).collect();
    std::fs::write(at("base.img"), &old).unwrap();
    open(&at("base.qcow2"), &options(CacheMode::Writeback)).unwrap().write_at(0, &old[..SIZE as usize / 2]).unwrap();
    let backings = [
        (None, 0),
        (over("base.img", None), SIZE),
        (over(text(&at("base.img")), Some(Format::Raw)), SIZE),
        (over("base.qcow2", None), SIZE / 2),
    ];
    for cluster_bytes in [None, Some(512), Some(4096), Some(1 << 20), Some(2 << 20)] {
        for version in [Version::V2, Version::V3] {
            for (backing, shown) in &backings {
                let layout = Layout { cluster_bytes, version, backing: backing.clone() };
                let path = at("new.qcow2");
                let image = attempt(&path, SIZE, &layout).unwrap();
                let mut model = old.clone();
                model[*shown as usize..].fill(0);
                let mut change = |range: std::ops::Range<u64>, byte: u8| {
                    model[range.start as usize..range.end as usize].fill(byte);
                    match byte {
                        0 => image.write_zeroes(ByteRange::from_bounds(range.start, range.end)).unwrap(),
                        _ => image.write_at(range.start, &vec![byte; (range.end - range.start) as usize]).unwrap(),
                    }
                };
                change(1000..70_000, 0xee);
                change(2 << 20..(3 << 20) + 1, 0);
                change(SIZE - 5000..SIZE, 0xdd);
                change(40_000..50_000, 0);
                image.flush().unwrap();
                drop(image);
                check_file(&path, false);
                compare(&path, &model);
                let info = info(&path);
                let said = &info["format-specific"]["data"];
                assert_eq!(info["cluster-size"], cluster_bytes.unwrap_or(64 << 10), "{layout:?}");
                assert_eq!(said["compat"], if version == Version::V2 { "0.10" } else { "1.1" }, "{layout:?}");
                match backing {
                    None => assert!(info.get("backing-filename").is_none()),
                    Some(backing) => {
                        assert_eq!(info["backing-filename"], *backing.file);
                        let format = if *shown == SIZE { "raw" } else { "qcow2" };
                        assert_eq!(info["backing-filename-format"], format, "told, whether we were or not");
                    }
                }
                std::fs::remove_file(&path).unwrap();
            }
        }
    }
}

#[test]
fn what_cannot_be_laid_out_is_refused_by_name_and_leaves_nothing() {
    let directory = quick_directory();
    let at = |name: &str| directory.path().join(name);
    file_of(&at("base.img"), 1 << 20);
    // Whoever made this disk would choose what lies beneath a disk of ours.
    std::fs::write(at("doubtful.img"), b"QFI\xfb\0\0\0\x03 and so on").unwrap();
    let long = "x".repeat(600);
    let cluster = |bytes| Layout { cluster_bytes: Some(bytes), ..Layout::default() };
    let backing = |file: &str, format| Layout { backing: over(file, format), ..Layout::default() };
    let refused = [
        ("new.qcow2", cluster(256), "clusters of 256 bytes"),
        ("new.qcow2", cluster(4 << 20), "clusters of 4194304 bytes"),
        ("new.qcow2", cluster(3000), "clusters of 3000 bytes"),
        ("new.qcow2", cluster(0), "clusters of 0 bytes"),
        ("new.qcow2", backing("missing.img", None), "missing.img"),
        ("new.qcow2", backing("missing.img", Some(Format::Raw)), "missing.img"),
        ("new.qcow2", backing("doubtful.img", None), "doubtful.img"),
        ("new.qcow2", backing("nbd://host/disk", None), "no local files"),
        ("new.qcow2", backing("new.qcow2", Some(Format::Qcow2)), "circle"),
        ("new.qcow2", Layout { cluster_bytes: Some(512), ..backing(&long, Some(Format::Raw)) }, "too small"),
        ("new.img", cluster(4096), "a raw image"),
        ("new.img", Layout { version: Version::V2, ..Layout::default() }, "a raw image"),
        ("new.img", backing("base.img", None), "a raw image"),
    ];
    for (name, layout, says) in refused {
        let error = attempt(&at(name), 1 << 20, &layout).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(text(directory.path())), "{layout:?}: {error}");
        assert!(!at(name).exists(), "{layout:?}");
    }
    // 32 MiB of L1 table, at tables of 64 entries each.
    let error = attempt(&at("new.qcow2"), (128 << 30) + 512, &cluster(512)).unwrap_err().to_string();
    assert!(error.contains("cannot hold") && error.contains("clusters of 512"), "{error}");
    drop(attempt(&at("new.qcow2"), 128 << 30, &cluster(512)).unwrap());
    if qemu("qemu-img", &["--version"]).is_some() {
        check_file(&at("new.qcow2"), false);
    }
}
