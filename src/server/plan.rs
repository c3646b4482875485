//! `mirror --dry-run`: what a mirror would read, where it would go, and how long it would take. Nothing is changed.

use std::path::Path;
use std::time::{Duration, Instant};

use super::scope;
use super::target::{Place, check};
use crate::control::backend::MirrorPlan;
use crate::error::Result;
use crate::image::{ExtentStatus, Image};
use crate::mirror::types::{MirrorOptions, SyncMode};
use crate::range::ByteRange;
use crate::sync::Arc;
use crate::volume::Volume;

/// So much is read to guess the source's speed, or what can be read in [`SAMPLE_TIME`].
const SAMPLE_BYTES: u64 = 64 << 20;
const SAMPLE_TIME: Duration = Duration::from_millis(500);
const SAMPLE_PIECE: u64 = 1 << 20;

/// # Errors
/// As for the mirror itself, as far as can be told without opening the target.
pub(super) fn plan(
    volume: &Volume,
    volumes: &[Arc<Volume>],
    state_dir: &Path,
    options: &MirrorOptions,
) -> Result<MirrorPlan> {
    let source = volume.active();
    let (options, above_base) = scope::find(&*source, options.clone())?;
    let options = &options;
    let place = check(volumes, state_dir, options)?;
    let (data_bytes, read_per_second) = match options.sync {
        SyncMode::None => (0, None),
        SyncMode::Full | SyncMode::Top => measure(&*source, above_base, volume.size_bytes()),
    };
    let path = Path::new(&options.target);
    let directory = if matches!(place, Place::Free) { path.parent().unwrap_or(path) } else { path };
    let available_bytes =
        nix::sys::statvfs::statvfs(directory).ok().map(|fs| fs.blocks_available() * fs.fragment_size());
    let method = match place {
        Place::Free => "created sparse; data is copied, holes stay holes",
        Place::Taken => "data is copied into what is there, holes are freed or zeroed",
    };
    let method = match options.reflink && may_share(&*source, directory) {
        true => format!("{method}; the data's blocks are shared with the source (no second copy, see --no-reflink)"),
        false => method.to_owned(),
    };
    let speed = match (options.speed_bytes_per_second, read_per_second) {
        (0, measured) => measured,
        (limit, None) => Some(limit),
        (limit, Some(measured)) => Some(limit.min(measured)),
    };
    Ok(MirrorPlan {
        target: options.target.clone(),
        data_bytes,
        size_bytes: volume.size_bytes(),
        available_bytes,
        method,
        expected_seconds: speed.filter(|speed| *speed > 0).map(|speed| data_bytes.div_ceil(speed)),
    })
}

/// True if the source lies on the same file system as `directory`, of a kind that shares blocks.
fn may_share(source: &dyn Image, directory: &Path) -> bool {
    use nix::sys::statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, statfs};
    let device = |path: &Path| nix::sys::stat::stat(path).map(|status| status.st_dev);
    let same = |path: &Path| device(path).is_ok_and(|source| device(directory) == Ok(source));
    let kind = statfs(directory).map(|fs| fs.filesystem_type());
    source.path().is_some_and(|path| same(&path)) && matches!(kind, Ok(BTRFS_SUPER_MAGIC | XFS_SUPER_MAGIC))
}

/// Counts the data of `image` (0 layers above a base: all of it) and reads a sample of it; returns bytes of data, and bytes per second if any was read.
fn measure(image: &dyn Image, above_base: u32, size_bytes: u64) -> (u64, Option<u64>) {
    let mut data_bytes = 0;
    let mut sampled = 0;
    let mut took = Duration::ZERO;
    let mut buffer = vec![0; SAMPLE_PIECE as usize];
    let mut at = 0;
    while at < size_bytes {
        let beneath = image.shows_beneath(above_base, ByteRange::from_bounds(at, size_bytes));
        if !beneath.is_empty() {
            at = beneath.end();
            continue;
        }
        let extent = image.extent_at(at);
        let end = extent.range.end().clamp(at + 1, size_bytes);
        if extent.status == ExtentStatus::Data {
            data_bytes += end - at;
            let mut place = at;
            while place < end && sampled < SAMPLE_BYTES && took < SAMPLE_TIME {
                let piece = (end - place).min(SAMPLE_PIECE);
                let start = Instant::now();
                if image.read_at(place, &mut buffer[..piece as usize]).is_err() {
                    break;
                }
                took += start.elapsed();
                sampled += piece;
                place += piece;
            }
        }
        at = end;
    }
    let rate = (sampled > 0 && !took.is_zero()).then(|| (sampled as f64 / took.as_secs_f64()) as u64);
    (data_bytes, rate)
}
