//! `mirror --sync`: the base that source and target have in common, where only what lies above it is mirrored.

use std::path::Path;

use crate::error::{Error, Result};
use crate::image::{BackingFile, Image, is_image_at, is_same_file};
use crate::mirror::types::{MirrorOptions, SyncMode};
use crate::sync::Arc;

/// Finds the base in the chain of `source`. Returns the options with all of it told, and how many layers lie above it: 0 if the
/// whole disk is mirrored, which a source without backing file is in any case (QEMU has it so).
///
/// # Errors
/// `base` makes no sense, or is not beneath the source.
pub(super) fn find(source: &dyn Image, options: MirrorOptions) -> Result<(MirrorOptions, u32)> {
    if options.sync != SyncMode::Top {
        return match &options.base {
            None => Ok((options, 0)),
            Some(base) => {
                let what = "only a mirror of what lies above it (--sync top) has a base:";
                Err(Error::usage(what).on(base.clone()).advise("add --sync top, or leave the base away"))
            }
        };
    }
    let mut beneath = layers(source).zip(1..);
    let found = match &options.base {
        None => match beneath.next() {
            Some(found) => found,
            None => {
                log::info!("{}: it has no backing file, all of it is mirrored", source.name());
                return Ok((MirrorOptions { sync: SyncMode::Full, ..options }, 0));
            }
        },
        Some(base) => {
            let at_base = |layer: &dyn Image| is_image_at(layer, Path::new(base));
            let mut found = None;
            for (layer, above) in beneath {
                if at_base(layer)? {
                    found = Some((layer, above));
                    break;
                }
            }
            found.ok_or_else(|| not_beneath(source, base))?
        }
    };
    let (base, above) = found;
    let mut options = MirrorOptions { base: Some(base.name().to_owned()), ..options };
    if !options.existing {
        let backing = BackingFile { file: base.name().to_owned(), format: Some(base.format()) };
        options.layout.backing.get_or_insert(backing);
    }
    Ok((options, above))
}

/// Checks that what the source shows of its base, beneath `above` layers, is what the target shows too.
///
/// # Errors
/// Wrong usage: the target has another backing file, or none.
pub(super) fn check_target(source: &dyn Image, above: u32, target: &dyn Image) -> Result<()> {
    let Some(base) = above.checked_sub(1).and_then(|above| layers(source).nth(above as usize)) else { return Ok(()) };
    let refused = |what: String| {
        let advice = format!("it must be a qcow2 file with the backing file {} ({})", base.name(), base.format());
        Err(Error::usage(format!("the target of a mirror of the top {what}:")).on(target.name()).advise(advice))
    };
    match target.backing() {
        None => refused(format!("has no backing file, and not {}", base.name())),
        Some(backing) if !is_same_file(&**backing, base)? => {
            refused(format!("has the backing file {}, and not {}", backing.name(), base.name()))
        }
        Some(backing) if backing.format() != base.format() => {
            refused(format!("takes its backing file for {}, and not for {}", backing.format(), base.format()))
        }
        Some(_) => Ok(()),
    }
}

/// What lies beneath `image`, from above.
fn layers(image: &dyn Image) -> impl Iterator<Item = &dyn Image> {
    std::iter::successors(image.backing(), |layer| layer.backing()).map(|layer: &Arc<dyn Image>| &**layer)
}

fn not_beneath(source: &dyn Image, base: &str) -> Error {
    let names: Vec<&str> = layers(source).map(|layer| layer.name()).collect();
    let what = format!("the base is not a backing file of the source ({}):", source.name());
    Error::usage(what).on(base).advise(match names.is_empty() {
        true => "the source has no backing file".to_owned(),
        false => format!("beneath it lie {}", names.join(", ")),
    })
}
