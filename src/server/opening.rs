//! Which image each disk of a mount lives on (rule 10).
//!
//! The source that the user names may have been superseded by a cutover: its own mark says so, or the record of the last mount
//! there, if a crash came between the two. Marks carry a generation, the highest wins: an image that points to a successor
//! which points back with a higher one is the active image again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::config::{MountConfig, VolumeConfig};
use super::elsewhere::left_elsewhere;
use crate::error::{Error, ErrorKind, Result};
use crate::image::nbd::uri;
use crate::image::{DescriptorRole, Format, Identity, Image, OpenOptions, Role, open};
use crate::state::{FormerImage, Mark, Marks, MountState, VolumeState, random_id};
use crate::sync::Arc;

/// As many successors are followed.
const STEPS_MAX: usize = 32;

/// A disk's image, open and locked, and what the state says of it.
pub(super) struct OpenedVolume {
    pub(super) image: Arc<dyn Image>,
    pub(super) state: VolumeState,
    /// The keeper has kept the image locked since the last server used it.
    pub(super) held: bool,
    /// The locked descriptor of the target of an unfinished mirror, where the keeper has kept it.
    pub(super) parked_target: Option<OwnedFd>,
}

impl OpenedVolume {
    /// What the target of an unfinished mirror is called.
    pub(super) fn target_name(&self) -> Option<&str> {
        self.state.mirror.as_ref().map(|record| record.options.target.as_str())
    }
}

/// The descriptor that carries an image's locks, if it has descriptors.
pub(super) fn locked_descriptor(image: &dyn Image) -> Option<BorrowedFd<'_>> {
    image.descriptors().into_iter().find(|(role, _)| *role == DescriptorRole::Locked).map(|(_, descriptor)| descriptor)
}

/// Opens what `volume` names, or its successor where `--follow` allows it.
///
/// # Errors
/// The image cannot be opened; it was superseded and neither `--follow` nor `--force` was given.
pub(super) fn open_first(
    config: &MountConfig,
    volume: &VolumeConfig,
    recorded: Option<&MountState>,
    marks: &Marks,
) -> Result<OpenedVolume> {
    let mut path = volume.source.clone();
    let mut format = volume.format;
    let mut generation = 0;
    for _ in 0..STEPS_MAX {
        let options = OpenOptions {
            format: format.or_else(|| recorded_format(&path, recorded, marks)),
            writable: !config.read_only,
            cache: config.cache,
            role: Role::Source,
            descriptor: None,
            reconnect: config.reconnect,
            insist: None,
        };
        let image = open(&path, &options)?;
        refuse_hidden_layers(config, &*image)?;
        let left = left_elsewhere(&*image, &config.state_dir, marks)?;
        let mark = newest_mark(&*image, recorded, left, marks)?.filter(|mark| mark.generation > generation);
        let Some(mark) = mark else {
            return settle_on(config, volume, image, recorded, marks, generation);
        };
        if config.force {
            log::warn!("{}: mounted all the same, though superseded by {}", image.name(), mark.successor);
            if let Some(descriptor) = locked_descriptor(&*image) {
                // It leads to the record that says so.
                marks.clear_pair(descriptor)?;
            }
            return settle_on(config, volume, image, recorded, marks, mark.generation);
        }
        if is_active_again(&*image, &mark, marks) {
            return settle_on(config, volume, image, recorded, marks, mark.generation);
        }
        if !config.follow {
            return Err(superseded(&path, &mark));
        }
        drop(image);
        check_successor(&mark, marks)?;
        log::info!("{}: superseded, following to {}", path.display(), mark.successor);
        generation = mark.generation;
        format = mark.successor_format;
        path = PathBuf::from(&mark.successor);
    }
    let what = "its successors lead in a circle or too far:";
    Err(Error::new(ErrorKind::Superseded, what).on(volume.source.display().to_string()))
}

/// The format that the record of the last mount knows of the image at `path`, if it is that very image: a guest may since have
/// written onto its raw disk what looks like another format.
fn recorded_format(path: &Path, recorded: Option<&MountState>, marks: &Marks) -> Option<Format> {
    let known = recorded?.volumes.iter().find(|volume| Path::new(&volume.active) == path)?;
    let (identity, _) = mark_of(path, marks)?;
    is_same(&identity, &known.active_identity).then_some(known.format)
}

/// A backing file beneath the mountpoint could not be opened again by the next server: it would wait for itself.
fn refuse_hidden_layers(config: &MountConfig, image: &dyn Image) -> Result<()> {
    for layer in std::iter::successors(image.backing(), |layer| layer.backing()) {
        let path = layer.path().and_then(|path| path.canonicalize().ok());
        if path.is_some_and(|path| path.starts_with(&config.mountpoint)) {
            return Err(Error::usage("the mount would hide a backing file of the disk:")
                .on(layer.name())
                .advise("mount somewhere else"));
        }
    }
    Ok(())
}

/// Opens the recorded active image again, for a server that takes over a live mount.
///
/// # Errors
/// The image cannot be opened.
pub(super) fn open_again(config: &MountConfig, state: &VolumeState, parked: Option<OwnedFd>) -> Result<OpenedVolume> {
    let held = parked.is_some();
    let options = OpenOptions {
        format: Some(state.format),
        writable: !config.read_only,
        cache: state.cache.unwrap_or(config.cache),
        role: Role::Source,
        descriptor: parked,
        reconnect: config.reconnect,
        insist: Some(state.active_identity.size_bytes),
    };
    let image = open(Path::new(&state.active), &options)?;
    if !is_same(&image.identity()?, &state.active_identity) {
        let what = "what lies there now is not the image that the disk was on:";
        return Err(Error::new(ErrorKind::Corrupt, what).on(&*state.active).advise("put the right image there"));
    }
    let mut state = state.clone();
    state.mirror_died();
    Ok(OpenedVolume { image, state, held, parked_target: None })
}

/// Marks an image that a volume has left, if it is still at its path and no newer mark says more.
pub(super) fn mark_former(former: &FormerImage, volume: &VolumeState, marks: &Marks) -> Result<()> {
    if uri::is_uri(Path::new(&former.path)) {
        // It cannot be marked: only the record knows. No server that may be gone is waited for.
        return Ok(());
    }
    let Some((identity, mark)) = mark_of(Path::new(&former.path), marks) else { return Ok(()) };
    if !is_same(&identity, &former.identity) || mark.is_some_and(|mark| mark.generation >= former.generation) {
        return Ok(());
    }
    let options = OpenOptions { role: Role::Observer, format: Some(Format::Raw), ..OpenOptions::default() };
    let image = open(Path::new(&former.path), &options)?;
    let mark = Mark {
        volume: volume.id.clone(),
        generation: former.generation,
        successor: volume.active.clone(),
        successor_identity: volume.active_identity.clone(),
        successor_format: Some(volume.format),
        when: "a cutover that a crash cut short".to_owned(),
    };
    locked_descriptor(&*image).map_or(Ok(()), |descriptor| marks.supersede(descriptor, &identity, &mark))
}

fn superseded(path: &Path, mark: &Mark) -> Error {
    let what = format!("superseded by {} (cut over at {}):", mark.successor, mark.when);
    Error::new(ErrorKind::Superseded, what).on(path.display().to_string()).advise(format!(
        "mount {} instead, or pass --follow; --force mounts the old image all the same",
        mark.successor
    ))
}

/// The image's own mark or, if newer, what the record of the last mount says of it, or that of another (`elsewhere`).
fn newest_mark(
    image: &dyn Image,
    recorded: Option<&MountState>,
    elsewhere: Option<Mark>,
    marks: &Marks,
) -> Result<Option<Mark>> {
    let identity = image.identity()?;
    let own = match locked_descriptor(image) {
        Some(descriptor) => marks.read_mark(descriptor, &identity)?,
        None => None,
    };
    // An image that the record knows to be active since is not superseded: a crash kept its mark from being removed.
    let active = recorded.and_then(|state| state.volumes.iter().find(|one| is_same(&one.active_identity, &identity)));
    let own = own.filter(|mark: &Mark| active.is_none_or(|active| mark.generation >= active.generation));
    // One that is as new as that of another record was mounted by force.
    let elsewhere = elsewhere.filter(|mark| active.is_none_or(|active| mark.generation > active.generation));
    let from_record =
        recorded.and_then(|state| state.volumes.iter().find_map(|volume| recorded_mark(volume, &identity)));
    // Of two that say the same, the image's own knows when.
    Ok([from_record, elsewhere, own].into_iter().flatten().max_by_key(|mark| mark.generation))
}

pub(super) fn recorded_mark(volume: &VolumeState, identity: &Identity) -> Option<Mark> {
    let left = volume.superseded.iter().find(|former| is_same(&former.identity, identity))?;
    Some(Mark {
        volume: volume.id.clone(),
        generation: left.generation,
        successor: volume.active.clone(),
        successor_identity: volume.active_identity.clone(),
        successor_format: Some(volume.format),
        when: "the last mount there".to_owned(),
    })
}

/// Random ids decide where both have one; else everything that a file system tells, size aside (it may have grown).
pub(super) fn is_same(one: &Identity, other: &Identity) -> bool {
    match (&one.id, &other.id) {
        (Some(one), Some(other)) => one == other,
        _ => (one.device, one.inode, one.birth_ns) == (other.device, other.inode, other.birth_ns),
    }
}

/// True if the successor was itself superseded by this image, later.
fn is_active_again(image: &dyn Image, mark: &Mark, marks: &Marks) -> bool {
    let Ok(identity) = image.identity() else { return false };
    let later = mark_of(Path::new(&mark.successor), marks);
    later.is_some_and(|(_, later)| {
        later.is_some_and(|later| later.generation > mark.generation && is_same(&later.successor_identity, &identity))
    })
}

/// Looks at an image without locking it: its identity and its mark.
fn mark_of(path: &Path, marks: &Marks) -> Option<(Identity, Option<Mark>)> {
    let options = OpenOptions { role: Role::Observer, format: Some(Format::Raw), ..OpenOptions::default() };
    let image = open(path, &options).ok()?;
    let identity = image.identity().ok()?;
    // NBD exports carry none.
    let mark = match locked_descriptor(&*image) {
        Some(descriptor) => marks.read_mark(descriptor, &identity).ok()?,
        None => None,
    };
    Some((identity, mark))
}

/// A successor is followed only if it is the image that the mark was written for.
fn check_successor(mark: &Mark, marks: &Marks) -> Result<()> {
    let Some((identity, _)) = mark_of(Path::new(&mark.successor), marks) else {
        let what = "the successor cannot be opened:";
        return Err(Error::new(ErrorKind::Superseded, what).on(&*mark.successor).advise("is its file system mounted?"));
    };
    if is_same(&identity, &mark.successor_identity) {
        return Ok(());
    }
    let what = "what lies there now is not the image that the disk was cut over to:";
    Err(Error::new(ErrorKind::Superseded, what).on(&*mark.successor).advise("mount the right image by its own path"))
}

fn settle_on(
    config: &MountConfig,
    volume: &VolumeConfig,
    image: Arc<dyn Image>,
    recorded: Option<&MountState>,
    marks: &Marks,
    generation: u64,
) -> Result<OpenedVolume> {
    let identity = image.identity()?;
    let known =
        recorded.and_then(|state| state.volumes.iter().find(|known| is_same(&known.active_identity, &identity)));
    if !config.read_only {
        if let Some(descriptor) = locked_descriptor(&*image) {
            // Its mark, if it has one, goes only when the disk is served.
            match known.and_then(|known| known.active_identity.id.as_deref()).filter(|_| identity.id.is_none()) {
                // A power cut has taken the id. With another one it would no longer be the image that the record knows.
                Some(id) => marks.write_id(descriptor.as_fd(), id)?,
                None => marks.ensure_id(descriptor.as_fd())?,
            };
        }
    }
    let identity = image.identity()?;
    let former: Vec<FormerImage> = known.map(|known| known.superseded.clone()).unwrap_or_default();
    let mut state = VolumeState {
        id: match (known, &identity.id) {
            (Some(known), _) => known.id.clone(),
            (None, Some(id)) => id.clone(),
            (None, None) => random_id()?,
        },
        name: volume.name.clone(),
        source: volume.source.clone(),
        format: image.format(),
        active: image.name().to_owned(),
        cache: None,
        size_bytes: known.and_then(|known| known.size_bytes),
        generation: known.map_or(0, |known| known.generation).max(generation),
        superseded: former.into_iter().filter(|former| !is_same(&former.identity, &identity)).collect(),
        active_identity: identity,
        shown: known.and_then(|known| known.shown),
        last_mirror: known.and_then(|known| known.last_mirror.clone()),
        mirror_target: known.and_then(|known| known.mirror_target.clone()),
        mirror: known.and_then(|known| known.mirror.clone()),
    };
    state.mirror_died();
    Ok(OpenedVolume { image, state, held: false, parked_target: None })
}
