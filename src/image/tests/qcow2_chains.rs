//! Chains of backing files: what is told of them, and what is refused.

use super::qcow2::{check_file, compare, new_file, open_qcow2, qemu, qemu_img, text};
use super::*;

fn statuses(image: &dyn Image) -> Vec<(u64, u64, ExtentStatus)> {
    let mut found: Vec<(u64, u64, ExtentStatus)> = Vec::new();
    let mut at = 0;
    while at < image.size_bytes() {
        let extent = image.extent_at(at);
        match found.last_mut() {
            Some(last) if last.2 == extent.status => last.1 = extent.range.end(),
            _ => found.push((at, extent.range.end(), extent.status)),
        }
        at = extent.range.end();
    }
    found
}

const K: u64 = 1 << 10;

#[test]
fn the_first_layer_that_has_it_answers_and_a_short_base_ends_in_zeroes() {
    use ExtentStatus::{Data, Hole};
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    // The base: 256K data, a hole of 256K, 128K data; and it is shorter than what lies over it.
    file_of(&at("base.img"), 640 * K);
    {
        let base = open(&at("base.img"), &options(CacheMode::Writeback)).unwrap();
        base.write_at(0, &vec![1; 256 << 10]).unwrap();
        base.write_at(512 * K, &vec![2; 128 << 10]).unwrap();
    }
    if new_file(&at("top.qcow2"), "cluster_size=64k,backing_file=base.img,backing_fmt=raw", 1 << 20).is_none() {
        return;
    }
    let image = open_qcow2(&at("top.qcow2"), CacheMode::Writeback);
    assert_eq!(
        statuses(&*image),
        [(0, 256 * K, Data), (256 * K, 512 * K, Hole), (512 * K, 640 * K, Data), (640 * K, 1024 * K, Hole)]
    );
    // Zeroes over data are told as such, data over a hole as well.
    image.discard(ByteRange::new(64 * K, 64 * K)).unwrap();
    image.write_at(320 * K, &vec![3; 64 << 10]).unwrap();
    assert_eq!(
        statuses(&*image),
        [
            (0, 64 * K, Data),
            (64 * K, 128 * K, Hole),
            (128 * K, 256 * K, Data),
            (256 * K, 320 * K, Hole),
            (320 * K, 384 * K, Data),
            (384 * K, 512 * K, Hole),
            (512 * K, 640 * K, Data),
            (640 * K, 1024 * K, Hole)
        ]
    );
    let mut seen = vec![9; 64 << 10];
    image.read_at(64 * K, &mut seen).unwrap();
    assert!(seen.iter().all(|&byte| byte == 0), "a discard never shows what is behind");
    // What reads as zeroes already takes nothing.
    let before = image.allocated_bytes().unwrap();
    image.write_zeroes(ByteRange::new(256 * K, 64 * K)).unwrap();
    image.discard(ByteRange::new(700 * K, 300 * K)).unwrap();
    image.flush().unwrap();
    assert_eq!(image.allocated_bytes().unwrap(), before);
    drop(image);
    check_file(&at("top.qcow2"), false);
}

#[test]
fn allocated_clusters_without_data_below_are_zeroes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "preallocation=metadata", 4 << 20).is_none() {
        return;
    }
    // The last clusters lie past the end of the file.
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len - (1 << 20)).unwrap();
    let image = open_qcow2(&path, CacheMode::Writeback);
    assert_eq!(statuses(&*image), [(0, 4 << 20, ExtentStatus::Zero)]);
    image.write_at(2 << 20, &vec![1; 64 << 10]).unwrap();
    image.write_at((4 << 20) - 512, &[2; 512]).unwrap();
    let data: Vec<_> = statuses(&*image).into_iter().filter(|one| one.2 == ExtentStatus::Data).collect();
    assert_eq!(data[0], (2 << 20, (2 << 20) + (64 << 10), ExtentStatus::Data));
    assert!(data.len() == 2 && data[1].1 == 4 << 20);
    let mut model = vec![0; 4 << 20];
    model[2 << 20..(2 << 20) + (64 << 10)].fill(1);
    model[(4 << 20) - 512..].fill(2);
    drop(image);
    check_file(&path, false);
    compare(&path, &model);
}

#[test]
fn a_chain_of_ten_is_read_through() {
    let directory = tempfile::tempdir().unwrap();
    let sub = directory.path().join("sub");
    std::fs::create_dir(&sub).unwrap();
    let base = directory.path().join("layer0.img");
    let mut model = vec![0xF0_u8; 1 << 20];
    std::fs::write(&base, &model).unwrap();
    let mut below = "../layer0.img".to_owned();
    let mut format = "raw";
    for layer in 1..=10_usize {
        let path = sub.join(format!("layer{layer}.qcow2"));
        let options = format!("cluster_size=64k,backing_file={below},backing_fmt={format}");
        if new_file(&path, &options, 1 << 20).is_none() {
            return;
        }
        let image = open_qcow2(&path, CacheMode::Writeback);
        let place = layer * (64 << 10) + 100;
        image.write_at(place as u64, &[u8::try_from(layer).unwrap(); 1000]).unwrap();
        model[place..place + 1000].fill(u8::try_from(layer).unwrap());
        (below, format) = (format!("layer{layer}.qcow2"), "qcow2");
    }
    let top = sub.join("layer10.qcow2");
    let image = open(&top, &OpenOptions::default()).unwrap();
    let mut seen = vec![0; 1 << 20];
    image.read_at(0, &mut seen).unwrap();
    assert!(seen == model);
    let layers = std::iter::successors(Some(&image), |image| image.backing()).count();
    assert_eq!(layers, 11);
    drop(image);
    compare(&top, &model);
}

fn refused(path: &Path) -> Error {
    let before = std::fs::read(path).unwrap();
    let error = open(path, &options(CacheMode::Writeback)).unwrap_err();
    assert!(before == std::fs::read(path).unwrap(), "refused after it was touched: {error}");
    error
}

#[test]
fn chains_that_lead_nowhere_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for name in ["a.qcow2", "b.qcow2", "self.qcow2", "gone.qcow2", "nbd.qcow2", "vmdk.qcow2", "json.qcow2"] {
        if new_file(&at(name), "cluster_size=64k", 1 << 20).is_none() {
            return;
        }
    }
    let rebase = |name: &str, backing: &str, format: &str| {
        qemu_img(&["rebase", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing, text(&at(name))]);
    };
    rebase("a.qcow2", "b.qcow2", "qcow2");
    rebase("b.qcow2", "a.qcow2", "qcow2");
    rebase("self.qcow2", "self.qcow2", "qcow2");
    rebase("gone.qcow2", "missing.img", "raw");
    rebase("nbd.qcow2", "nbd://localhost/x", "raw");
    rebase("json.qcow2", "json:{\"driver\":\"raw\",\"file.filename\":\"/etc/hostname\"}", "raw");
    rebase("vmdk.qcow2", "b.qcow2", "vmdk");
    for (name, kind, says) in [
        ("a.qcow2", ErrorKind::Corrupt, "in a circle"),
        ("self.qcow2", ErrorKind::Corrupt, "in a circle"),
        ("gone.qcow2", ErrorKind::NotFound, "missing.img"),
        ("nbd.qcow2", ErrorKind::Unsupported, "no local files"),
        ("json.qcow2", ErrorKind::Unsupported, "no local files"),
        ("vmdk.qcow2", ErrorKind::Unsupported, "'vmdk'"),
    ] {
        let error = refused(&at(name));
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains(says), "{name}: {error}");
    }
}

#[test]
fn a_backing_format_that_is_not_told_is_not_guessed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    // Raw bytes of a guest that look like a qcow2 file.
    if new_file(&at("base.img"), "cluster_size=64k", 1 << 20).is_none() {
        return;
    }
    new_file(&at("top.qcow2"), "cluster_size=64k", 1 << 20).unwrap();
    let name = b"base.img";
    let mut bytes = std::fs::read(at("top.qcow2")).unwrap();
    let place = 1024_usize;
    bytes[8..16].copy_from_slice(&(place as u64).to_be_bytes());
    bytes[16..20].copy_from_slice(&8_u32.to_be_bytes());
    bytes[place..place + 8].copy_from_slice(name);
    std::fs::write(at("top.qcow2"), bytes).unwrap();
    let error = refused(&at("top.qcow2"));
    assert!(error.kind() == ErrorKind::Usage && error.to_string().contains("base.img"), "{error}");
    std::fs::write(at("base.img"), vec![5; 1 << 20]).unwrap();
    let mut seen = [0; 100];
    open(&at("top.qcow2"), &OpenOptions::default()).unwrap().read_at(0, &mut seen).unwrap();
    assert_eq!(seen, [5; 100]);
}

#[test]
fn an_image_does_not_lead_to_what_its_owner_may_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    if !nix::unistd::geteuid().is_root() || qemu("qemu-img", &["--version"]).is_none() {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(at("secret"), vec![5; 1 << 20]).unwrap();
    let secret = at("secret").display().to_string();
    new_file(&at("top.qcow2"), &format!("backing_file={secret},backing_fmt=raw"), 1 << 20).unwrap();
    std::fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o600)).unwrap();
    open(&at("top.qcow2"), &OpenOptions::default()).unwrap();
    std::os::unix::fs::chown(at("top.qcow2"), Some(12_345), Some(12_345)).unwrap();
    let error = refused(&at("top.qcow2"));
    assert!(error.to_string().contains("its owner may not read"), "{error}");
    std::fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let error = refused(&at("top.qcow2"));
    assert!(error.to_string().contains("its owner may not read"), "it may not enter the directory: {error}");
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o711)).unwrap();
    open(&at("top.qcow2"), &OpenOptions::default()).unwrap();
}

/// The parts of the disk in which the uppermost `layers` layers have nothing, in KiB.
fn shown_beneath(image: &dyn Image, layers: u32) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < image.size_bytes() {
        let shown = image.shows_beneath(layers, ByteRange::from_bounds(at, image.size_bytes()));
        match found.last_mut() {
            _ if shown.is_empty() => at += K,
            Some(last) if last.1 * K == at => last.1 = shown.end() / K,
            _ => found.push((at / K, shown.end() / K)),
        }
        at = at.max(shown.end());
    }
    found
}

#[test]
fn what_lies_beneath_shows_where_no_layer_above_it_has_anything() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("base.img"), vec![7; 1 << 20]).unwrap();
    // The middle ends before the base does: past its end the disk is zero, and the base does not show.
    if new_file(&at("middle.qcow2"), "cluster_size=4k,backing_file=base.img,backing_fmt=raw", 512 * K).is_none() {
        return;
    }
    new_file(&at("top.qcow2"), "backing_file=middle.qcow2,backing_fmt=qcow2", 1 << 20).unwrap();
    open_qcow2(&at("middle.qcow2"), CacheMode::Writeback).write_at(132 * K, &[1; 4096]).unwrap();
    let image = open_qcow2(&at("top.qcow2"), CacheMode::Writeback);
    image.write_at(70 * K, &[2]).unwrap();
    image.discard(ByteRange::new(256 * K, 64 * K)).unwrap();
    assert_eq!(shown_beneath(&*image, 1), [(0, 64), (128, 256), (320, 1024)]);
    assert_eq!(shown_beneath(&*image, 2), [(0, 64), (128, 132), (136, 256), (320, 512)]);
    assert_eq!(shown_beneath(&*image, 0), [], "nothing lies above itself");
    assert_eq!(shown_beneath(&*image, 3), [], "nothing lies beneath the last");
    let mut past = [9; 512];
    image.read_at(600 * K, &mut past).unwrap();
    assert_eq!(past, [0; 512]);
    let base = open(&at("base.img"), &OpenOptions::default()).unwrap();
    assert_eq!(shown_beneath(&*base, 1), []);
}

#[test]
fn a_disk_with_a_backing_file_keeps_its_size() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    std::fs::write(directory.path().join("base.img"), vec![5; 1 << 20]).unwrap();
    if new_file(&path, "backing_file=base.img,backing_fmt=raw", 1 << 20).is_none() {
        return;
    }
    let image = open_qcow2(&path, CacheMode::Writeback);
    assert!(!image.properties().resizable);
    for size in [2 << 20, 1 << 19] {
        let error = image.resize(size).unwrap_err();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("with a backing file"), "{error}");
    }
    assert_eq!(image.size_bytes(), 1 << 20);
}
