//! Whatever a guest has open stays as it was over a cutover: handles, mappings, locks, inode numbers, sizes, and what the disk
//! shows of modes and owners. It also stays so when the old image is removed.

mod common;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use common::mmap::SharedMap;
use common::mounted::Mount;
use common::place::Place;
use common::random::Random;

#[test]
fn handles_and_mappings_go_on_over_two_cutovers() -> io::Result<()> {
    let place = Place::on_disk();
    let image = place.random("a.img", 2 << 20, 1);
    let mut model = std::fs::read(&image)?;
    let mounted = Mount::of(&place, [&image]).start();
    let path = mounted.disk("a.img");
    let reader = File::open(&path)?;
    let writer = OpenOptions::new().write(true).open(&path)?;
    let directory = File::open(&mounted.mountpoint)?;
    let map = SharedMap::new(&OpenOptions::new().read(true).write(true).open(&path)?, 0, 1 << 20)?;
    let before = reader.metadata()?;
    let mut random = Random::new(2, 2);

    for (round, name) in ["b.img", "c.img"].iter().enumerate() {
        map.write(round * 4096 + 5, b"before the mirror");
        model[round * 4096 + 5..][..17].copy_from_slice(b"before the mirror");
        mounted.mirror(&place.at(name), &[]);
        mounted.wait_ready();
        let bytes = random.bytes(10_000);
        writer.write_all_at(&bytes, 500_000)?;
        model[500_000..510_000].copy_from_slice(&bytes);
        mounted.cutover();
        map.write(round * 4096 + 1_000, b"after the cutover");
        model[round * 4096 + 1_000..][..17].copy_from_slice(b"after the cutover");
        let bytes = random.bytes(10_000);
        writer.write_all_at(&bytes, 1_500_001)?;
        model[1_500_001..1_510_001].copy_from_slice(&bytes);
        let mut found = vec![0; model.len()];
        reader.read_exact_at(&mut found, 0)?;
        assert!(found == model, "an old handle reads what was written since");
        let after = reader.metadata()?;
        for same in [MetadataExt::ino, MetadataExt::dev, MetadataExt::size] {
            assert_eq!(same(&after), same(&before));
        }
        assert_eq!((after.mode(), after.uid(), after.gid()), (before.mode(), before.uid(), before.gid()));
        assert_eq!(std::fs::metadata(&path)?.ino(), before.ino());
        if round == 0 {
            std::fs::remove_file(&image)?;
        }
    }
    map.sync()?;
    writer.sync_all()?;
    drop((map, reader, writer, directory));
    mounted.unmount();
    assert!(std::fs::read(place.at("c.img"))? == model);
    Ok(())
}

#[test]
fn the_target_gets_the_images_mode() -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::on_disk();
    let image = place.random("a.img", 1 << 20, 1);
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o604))?;
    let mounted = Mount::of(&place, [&image]).start();
    let directory = place.directory("other");
    mounted.mirror(&directory, &[]);
    mounted.cutover();
    assert_eq!(mounted.active(), directory.join("a.img"), "a directory as target: the source's name in it");
    mounted.unmount();
    assert_eq!(std::fs::metadata(directory.join("a.img"))?.mode() & 0o777, 0o604);
    Ok(())
}

#[test]
fn nothing_touches_the_old_image_after_the_cutover() -> io::Result<()> {
    let place = Place::on_disk();
    let (image, target) = (place.random("a.img", 1 << 20, 1), place.at("b.img"));
    let mounted = Mount::of(&place, [&image]).start();
    mounted.mirror(&target, &[]);
    mounted.cutover();
    let frozen = (std::fs::read(&image)?, std::fs::metadata(&image)?.mtime_nsec());
    let disk = OpenOptions::new().write(true).open(mounted.disk("a.img"))?;
    disk.write_all_at(&[1; 300_000], 100)?;
    disk.sync_all()?;
    drop(disk);
    mounted.unmount();
    assert!((std::fs::read(&image)?, std::fs::metadata(&image)?.mtime_nsec()) == frozen);
    Ok(())
}
