//! The units and the largest sizes of a block device's requests, as the kernel tells them.
//!
//! They are in sysfs, for a partition in its disk's directory; how far a partition's start is from a whole granule is its own. Where there is no
//! sysfs the block sizes are asked of the device, and the rest is tried.
//!
//! ```text
//! device    |  granule  |  granule  |  granule  |        what is given back: whole granules
//! partition      |......|  granule  |  granule  |        its first one begins at its `discard_alignment`
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::users::sysfs;
use crate::range::ByteRange;
use crate::sys::files;

/// The most that is zeroed by one system call, which may take as long as writing it: other writes wait meanwhile.
const STEP_BYTES_MAX: u64 = 16 << 20;
/// ... where the kernel is known to write the zeroes itself.
const WRITTEN_STEP_BYTES_MAX: u64 = 1 << 20;

/// Limits of one device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceLimits {
    /// The unit of requests.
    pub(super) logical_block: u64,
    /// The unit in which the device writes; what is less it reads first.
    pub(super) physical_block: u64,
    /// Direct requests are made from memory aligned to this.
    pub(super) memory: u64,
    /// The unit in which space is given back, and where the first one begins.
    granule: u64,
    granule_offset: u64,
    /// The most that one discard takes; 0: it has none, `None`: not known.
    discard_max: Option<u64>,
    /// The most that the device zeroes by one command of its own; 0: it has none, `None`: not known.
    zeroing_max: Option<u64>,
}

impl DeviceLimits {
    /// What is told of the open `device`.
    ///
    /// # Errors
    /// ENOTTY if it is not a block device.
    pub(super) fn of(device: &File) -> io::Result<Self> {
        let logical = files::logical_block_size(device)?.into();
        let physical = files::physical_block_size(device).map_or(logical, u64::from);
        let own = std::fs::canonicalize(sysfs(device.metadata()?.rdev()));
        Ok(own.map_or_else(|_| Self::unknown(logical, physical), |own| Self::told(&own, logical, physical)))
    }

    fn unknown(logical: u64, physical: u64) -> Self {
        DeviceLimits {
            logical_block: logical,
            physical_block: physical.max(logical),
            memory: logical,
            granule: physical.max(logical),
            granule_offset: 0,
            discard_max: None,
            zeroing_max: None,
        }
    }

    /// What is told in the directory `own` of sysfs.
    fn told(own: &Path, logical: u64, physical: u64) -> Self {
        let partition = own.join("partition").exists();
        let disk = if partition { own.parent().unwrap_or(own) } else { own };
        let number = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let queue = |name: &str| number(&disk.join("queue").join(name));
        let unknown = Self::unknown(logical, physical);
        let granule = queue("discard_granularity").filter(|granule| granule.is_power_of_two());
        let granule = granule.unwrap_or(0).max(unknown.logical_block);
        let zeroing_max = queue("write_zeroes_max_bytes");
        // Newer kernels tell apart what also gives space back.
        let unmapping_max = queue("write_zeroes_unmap_max_bytes").filter(|max| *max > 0);
        DeviceLimits {
            // A mask: 511 is whole blocks of 512 bytes.
            memory: queue("dma_alignment").map_or(unknown.memory, |mask| (mask + 1).next_power_of_two()),
            granule,
            granule_offset: number(&own.join("discard_alignment")).map_or(0, |offset| offset % granule),
            discard_max: match (queue("discard_max_bytes"), zeroing_max) {
                // Giving space back so that it reads as zeroes takes both.
                (Some(max), zeroing) if max > 0 => {
                    Some([zeroing, unmapping_max].into_iter().flatten().fold(max, u64::min))
                }
                (max, _) => max,
            },
            zeroing_max,
            ..unknown
        }
    }

    /// False: the device gives no space back.
    pub(super) fn can_discard(&self) -> bool {
        self.discard_max != Some(0)
    }

    /// The part of `range` that is zeroed by commands: whole blocks of the device. Empty, but at its start, if there are none.
    pub(super) fn blocks(&self, range: ByteRange) -> ByteRange {
        within(range, 0, self.physical_block)
    }

    /// The part of `range` that can be given back: whole granules. Empty, but at its start, if there are none.
    pub(super) fn granules(&self, range: ByteRange) -> ByteRange {
        within(range, self.granule_offset, self.granule)
    }

    /// So much is zeroed by one system call.
    pub(super) fn zeroing_step(&self) -> u64 {
        match self.zeroing_max {
            Some(0) => WRITTEN_STEP_BYTES_MAX.max(self.physical_block),
            max => step(max, self.physical_block),
        }
    }

    /// So much is given back by one system call.
    pub(super) fn discard_step(&self) -> u64 {
        step(self.discard_max, self.granule)
    }
}

fn step(max: Option<u64>, unit: u64) -> u64 {
    let most = max.unwrap_or(u64::MAX).min(STEP_BYTES_MAX);
    (most - most % unit).max(unit)
}

/// The units, which begin at `offset`, that are wholly in `range`.
fn within(range: ByteRange, offset: u64, unit: u64) -> ByteRange {
    let up = |at: u64| {
        at.checked_sub(offset).map_or(Some(offset), |at| at.checked_next_multiple_of(unit)?.checked_add(offset))
    };
    let end = range.end().checked_sub(offset).map_or(0, |end| end - end % unit + offset);
    match up(range.start()) {
        Some(start) if start < end => ByteRange::from_bounds(start, end),
        _ => ByteRange::new(range.start(), 0),
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    /// A directory as sysfs has it, with a partition.
    fn told(files: &[(&str, &str)]) -> (DeviceLimits, DeviceLimits) {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path();
        for name in ["queue", "sdx1"] {
            std::fs::create_dir(disk.join(name)).unwrap();
        }
        std::fs::write(disk.join("sdx1/partition"), "1\n").unwrap();
        for (name, value) in files {
            std::fs::write(disk.join(name), format!("{value}\n")).unwrap();
        }
        (DeviceLimits::told(disk, 512, 4096), DeviceLimits::told(&disk.join("sdx1"), 512, 4096))
    }

    #[test]
    fn a_partition_has_its_disks_limits_and_a_start_of_its_own() {
        let (disk, partition) = told(&[
            ("queue/discard_granularity", "65536"),
            ("queue/discard_max_bytes", "1000000"),
            ("queue/write_zeroes_max_bytes", "4000000"),
            ("queue/dma_alignment", "3"),
            ("discard_alignment", "0"),
            ("sdx1/discard_alignment", "16384"),
        ]);
        assert_eq!((disk.logical_block, disk.physical_block, disk.memory), (512, 4096, 4));
        assert_eq!(DeviceLimits { granule_offset: 0, ..partition }, disk);
        let range = ByteRange::from_bounds(1000, 300_000);
        assert_eq!(disk.granules(range), ByteRange::from_bounds(65_536, 262_144));
        assert_eq!(partition.granules(range), ByteRange::from_bounds(16_384, 278_528));
        assert_eq!(partition.granules(ByteRange::from_bounds(0, 70_000)), ByteRange::new(0, 0));
        assert_eq!(partition.granules(ByteRange::from_bounds(0, 10)), ByteRange::new(0, 0));
        assert_eq!(partition.blocks(range), ByteRange::from_bounds(4096, 299_008));
        assert_eq!((disk.discard_step(), disk.zeroing_step()), (15 * 65_536, 3_997_696));
        assert!(disk.can_discard());
    }

    #[test]
    fn a_device_that_cannot_zero_gives_nothing_back_and_is_written_in_small_steps() {
        let (disk, _) = told(&[
            ("queue/discard_granularity", "4096"),
            ("queue/discard_max_bytes", "4294966784"),
            ("queue/write_zeroes_max_bytes", "0"),
        ]);
        assert!(!disk.can_discard());
        assert_eq!(disk.zeroing_step(), 1 << 20);
        let (disk, _) = told(&[("queue/discard_max_bytes", "0"), ("queue/write_zeroes_max_bytes", "4294966784")]);
        assert!(!disk.can_discard());
        assert_eq!(disk.zeroing_step(), 16 << 20);
    }

    #[test]
    fn what_is_not_told_is_tried() {
        let (disk, _) = told(&[]);
        assert!(disk.can_discard());
        assert_eq!((disk.zeroing_step(), disk.discard_step(), disk.memory), (16 << 20, 16 << 20, 512));
        assert_eq!(disk.granules(ByteRange::from_bounds(100, 5000)), ByteRange::from_bounds(512, 4608));
    }
}
