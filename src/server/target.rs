//! The target of a mirror: checked, then created or opened. What fails leaves nothing behind.

use std::path::Path;

use super::config::MountConfig;
use super::scope;
use crate::error::{Error, ErrorKind, Result};
use crate::image::nbd::uri;
use crate::image::{
    Image, Layout, OpenOptions, Role, create, open, own_mount, refuse_on_own_disk, refuse_same, sync_parent_directory,
};
use crate::mirror::types::MirrorOptions;
use crate::sync::Arc;
use crate::volume::Volume;

/// An open, locked target.
pub(super) struct Target {
    pub(super) image: Arc<dyn Image>,
    /// Made just now: all holes.
    pub(super) created: bool,
}

/// What is at the target's path, as far as can be told without opening it.
pub(super) enum Place {
    /// Nothing: to be created.
    Free,
    /// A file or device to be written into.
    Taken,
}

/// Checks everything about the target that needs no opening.
///
/// # Errors
/// The first thing that is wrong with it.
pub(super) fn check(volumes: &[Arc<Volume>], state_dir: &Path, options: &MirrorOptions) -> Result<Place> {
    let path = Path::new(&options.target);
    let remote = uri::is_uri(path);
    if !path.is_absolute() && !remote {
        return Err(Error::usage("the target must be an absolute path:").on(&*options.target));
    }
    refuse_own(volumes, path)?;
    // A write of the record under the barrier must not wait for that very barrier.
    refuse_on_own_disk(state_dir)?;
    for volume in volumes {
        if volume.active().name() == options.target {
            // Moved away under us: what is at the path now is another file, but one name for two images is one too few.
            return Err(Error::usage("the disk's image was opened by this path:")
                .on(&*options.target)
                .advise("name another file"));
        }
    }
    if remote {
        // Nothing can be created there: an export is written into, always.
        uri::check(&options.target)?;
        return Ok(Place::Taken);
    }
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {
            Err(Error::usage("the target is a directory:").on(&*options.target).advise("name a file in it"))
        }
        Ok(_) if options.existing => Ok(Place::Taken),
        Ok(_) => Err(Error::new(ErrorKind::Exists, "the target exists already:")
            .on(&*options.target)
            .advise("--existing writes into it; what it holds is then lost")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let directory = path.parent().unwrap_or(Path::new("/"));
            if !directory.is_dir() {
                let what = "the target's directory does not exist:";
                return Err(Error::new(ErrorKind::NotFound, what)
                    .on(directory.display().to_string())
                    .advise("create it, or mount its file system"));
            }
            if options.existing {
                return Err(Error::new(ErrorKind::NotFound, "there is no such target:")
                    .on(&*options.target)
                    .advise("without --existing it is created"));
            }
            Ok(Place::Free)
        }
        Err(error) => Err(Error::io("cannot look at the target", &error).on(&*options.target)),
    }
}

/// Refuses a target that is a source, or lies on a disk or in a mount of ours. Of an NBD URI the socket is looked at, and what
/// export it means.
///
/// # Errors
/// Wrong usage, naming the target.
pub(super) fn refuse_own(volumes: &[Arc<Volume>], path: &Path) -> Result<()> {
    if uri::is_uri(path) {
        let socket = path.to_str().and_then(uri::unix_socket);
        socket.map_or(Ok(()), |socket| own_mount::refuse_inside(&socket))?;
    } else {
        own_mount::refuse_inside(path)?;
        refuse_on_own_disk(path)?;
    }
    volumes.iter().try_for_each(|volume| refuse_same(&*volume.active(), path))
}

/// Creates or opens the target of a mirror of `volume`.
///
/// # Errors
/// As [`check`]; it cannot be created, opened or locked; it is smaller than the disk; it does not have the base that it should.
pub(super) fn prepare(
    volume: &Volume,
    volumes: &[Arc<Volume>],
    options: &MirrorOptions,
    above_base: u32,
    config: &MountConfig,
) -> Result<Target> {
    let path = Path::new(&options.target);
    let open_options = OpenOptions {
        format: options.format,
        writable: true,
        cache: options.target_cache.unwrap_or(config.cache),
        role: Role::Target,
        descriptor: None,
        reconnect: options.reconnect.unwrap_or(config.reconnect),
        insist: None,
    };
    match check(volumes, &config.state_dir, options)? {
        Place::Taken => {
            if options.layout != Layout::default() {
                let what = "clusters, version and backing file can only be told of a target that is created:";
                return Err(Error::usage(what).on(&*options.target).advise("leave them away, or name a new file"));
            }
            let image = open(path, &open_options)?;
            if image.size_bytes() < volume.size_bytes() {
                let what = format!(
                    "the target is too small ({} bytes, the disk has {}):",
                    image.size_bytes(),
                    volume.size_bytes()
                );
                return Err(Error::usage(what).on(&*options.target).advise("make it as large as the disk"));
            }
            scope::check_target(&*volume.active(), above_base, &*image)?;
            Ok(Target { image, created: false })
        }
        Place::Free => {
            let like = volume.active().attributes().ok();
            let image = create(path, volume.size_bytes(), like.as_ref(), &options.layout, &open_options)?;
            let checked = scope::check_target(&*volume.active(), above_base, &*image);
            if let Err(error) = checked.and_then(|()| sync_parent_directory(path)) {
                discard(&Target { image, created: true });
                return Err(error);
            }
            Ok(Target { image, created: true })
        }
    }
}

/// Removes a target that was created for a job that did not start.
pub(super) fn discard(target: &Target) {
    if let (true, Some(path)) = (target.created, target.image.path()) {
        if let Err(error) = std::fs::remove_file(&path) {
            log::warn!("cannot remove {}: {error}", path.display());
        }
    }
}
