//! Backing files: a qcow2 file names the image that has what it does not have itself, which may be a qcow2 file again.
//!
//! A file that comes from elsewhere must not make us read what its owner could not, nor for ever:
//! - no layer comes twice, and there is a bound on their number;
//! - a backing file that the owner of the file above may not read, or may not get to, is refused (where that owner is neither we nor
//!   root). It is looked up once, and what was found is what is checked and opened: whoever puts a symbolic link there
//!   meanwhile changes nothing. Mode, owner and group count, lists of access and further groups of the owner do not;
//! - a format that is not told is taken from name and content, and where the two disagree nothing is guessed.
//!
//! Backing files are opened read-only, and locked as readers: others may read them meanwhile, nobody may write them.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::header::Header;
use crate::error::{Error, ErrorKind, Result};
use crate::image::open::{OpenOptions, Opened, Role, open_layer, open_path_only, reopened};
use crate::image::{Format, Image, own_mount};
use crate::sync::Arc;

/// As many layers are opened.
const LAYERS_MAX: usize = 64;

/// The layers above the one that is being opened, by device and inode.
#[derive(Debug, Default)]
pub(in crate::image) struct Chain {
    above: Vec<(u64, u64)>,
}

impl Chain {
    /// The layer that is being opened; the top one is 1.
    pub(super) fn depth(&self) -> u64 {
        self.above.len() as u64 + 1
    }

    /// Opens what `header`, read from `opened`, names as its backing file.
    pub(super) fn open_backing(
        &self,
        opened: &Opened,
        header: &Header,
        options: &OpenOptions,
    ) -> Result<Option<Arc<dyn Image>>> {
        let Some(written) = &header.backing_name else { return Ok(None) };
        let name = opened.path.display().to_string();
        let format = backing_format(header, &name)?;
        let path = backing_path(&opened.path, written)?;
        // A server must never touch its own mounts.
        own_mount::refuse_inside(&path)?;
        let failed = |error: std::io::Error| Error::io("cannot look at", &error).on(&*name);
        let own = opened.path_only.metadata().map_err(failed)?;
        let mut above = self.above.clone();
        above.push((own.dev(), own.ino()));
        let found = open_path_only(&path).and_then(|found| Ok((found.metadata()?, found)));
        let (there, found) = found.map_err(|error| {
            Error::io("cannot open the backing file", &error)
                .on(path.display().to_string())
                .advise(format!("{name} has '{written}' as its backing file, relative to its own directory"))
        })?;
        if above.contains(&(there.dev(), there.ino())) {
            let what = "the chain of backing files leads in a circle:";
            return Err(Error::new(ErrorKind::Corrupt, what).on(path.display().to_string()));
        }
        if above.len() > LAYERS_MAX {
            let what = format!("there are more than {LAYERS_MAX} backing files:");
            return Err(Error::new(ErrorKind::Unsupported, what)
                .on(name)
                .advise("commit some of them: qemu-img commit"));
        }
        // Where it is, after all links.
        let place = std::fs::read_link(reopened(&found)).map_err(failed)?;
        if !may_lead_to(&own, &there, &place) {
            let what = "its owner may not read the backing file that it names:";
            return Err(Error::new(ErrorKind::Usage, what).on(name).advise(format!(
                "if {} is right, let the image's owner read it, and enter its directories",
                path.display()
            )));
        }
        let role = if options.role == Role::Observer { Role::Observer } else { Role::Backing };
        let options = OpenOptions { format, writable: false, role, descriptor: None, ..*options };
        let image = open_layer(&path, Some(found), &options, &Chain { above })?;
        log::info!("{name}: its backing file is {} ({})", image.name(), image.format());
        Ok(Some(image))
    }
}

fn backing_format(header: &Header, name: &str) -> Result<Option<Format>> {
    match header.backing_format.as_deref() {
        None | Some("") => Ok(None),
        Some("raw" | "file" | "host_device") => Ok(Some(Format::Raw)),
        Some("qcow2") => Ok(Some(Format::Qcow2)),
        Some(other) => {
            let what = format!("backing files of the format '{other}' are not supported:");
            Err(Error::new(ErrorKind::Unsupported, what)
                .on(name)
                .advise("convert the chain: qemu-img convert -O qcow2"))
        }
    }
}

/// The backing file's path: what is written, relative to the directory of the file that it is written in.
pub(in crate::image) fn backing_path(above: &Path, written: &str) -> Result<PathBuf> {
    let file = written.strip_prefix("file:").unwrap_or(written);
    let scheme = file.split('/').next().filter(|first| first.contains(':'));
    if let Some(scheme) = scheme {
        let what = format!("backing files that are no local files ({scheme}) are not supported:");
        return Err(Error::new(ErrorKind::Unsupported, what).on(above.display().to_string()));
    }
    Ok(above.parent().unwrap_or(Path::new("/")).join(file))
}

/// True if whoever owns `above` could read `there`, which is at `place`, without our help, or is trusted.
fn may_lead_to(above: &Metadata, there: &Metadata, place: &Path) -> bool {
    let trusted = above.uid() == 0 || above.uid() == nix::unistd::geteuid().as_raw();
    let enters = |directory: &Path| std::fs::metadata(directory).is_ok_and(|meta| may(above, &meta, 0o1));
    trusted || (may(above, there, 0o4) && place.ancestors().skip(1).all(enters))
}

/// True if the mode of `there` allows `what` (a bit for others) to owner or group of `above`.
fn may(above: &Metadata, there: &Metadata, what: u32) -> bool {
    (there.uid() == above.uid() && there.mode() & what << 6 != 0)
        || (there.gid() == above.gid() && there.mode() & what << 3 != 0)
        || there.mode() & what != 0
}
