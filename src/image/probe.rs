//! Which format an image has, told by its name and by its content. Where the two disagree nothing is guessed: raw bytes
//! belong to the guest, who could write a qcow2 header into them and make us read another file through it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Format;
use crate::error::{Error, ErrorKind, Result};

/// First bytes of a qcow2 file (and of its predecessor).
const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";

/// True if an image that begins so is a qcow2 file, or one of its predecessor.
pub(super) fn is_qcow(magic: [u8; 4]) -> bool {
    magic == QCOW_MAGIC
}

/// The format that a file's name promises: by its extension, raw for everything unknown.
pub fn format_of_name(path: &Path) -> Format {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some(extension) if ["qcow2", "qcow"].iter().any(|known| extension.eq_ignore_ascii_case(known)) => Format::Qcow2,
        _ => Format::Raw,
    }
}

/// The format that a file's content looks like: raw for everything that is not known.
///
/// # Errors
/// When it cannot be read.
pub fn format_of_content(file: &File) -> std::io::Result<Format> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if is_qcow(magic) => Ok(Format::Qcow2),
        Ok(()) => Ok(Format::Raw),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(Format::Raw),
        Err(error) => Err(error),
    }
}

/// The format to use for `file` at `path`, where the user asked for `wanted`.
///
/// # Errors
/// When name and content disagree, and when the content is not what was asked for.
pub(super) fn decide(path: &Path, file: &File, wanted: Option<Format>) -> Result<Format> {
    let name = path.display().to_string();
    if wanted == Some(Format::Raw) {
        return Ok(Format::Raw);
    }
    let found = format_of_content(file).map_err(|error| Error::io("cannot read", &error).on(&name))?;
    match (wanted.unwrap_or_else(|| format_of_name(path)), found) {
        (Format::Raw, Format::Raw) => Ok(Format::Raw),
        (Format::Qcow2, Format::Qcow2) => Ok(Format::Qcow2),
        (Format::Raw, _) => {
            let what = "the name promises raw bytes, but there is a qcow2 header in";
            Err(Error::new(ErrorKind::Usage, what)
                .on(name)
                .advise("pass --format raw if these bytes are the disk itself; if the disk is inside, convert it: qemu-img convert -O raw"))
        }
        (Format::Qcow2, _) if wanted.is_some() => {
            Err(Error::new(ErrorKind::Usage, "there is no qcow2 header in").on(name).advise("pass --format raw"))
        }
        (Format::Qcow2, _) => {
            let what = "the name promises qcow2, but there is no qcow2 header in";
            Err(Error::new(ErrorKind::Usage, what)
                .on(name)
                .advise("pass --format raw if these bytes are the disk itself"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn decide_for(name: &str, content: &[u8], wanted: Option<Format>) -> Result<Format> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        decide(Path::new(name), &file, wanted)
    }

    #[test]
    fn name_and_content_agree_or_nothing_is_guessed() {
        assert_eq!(decide_for("disk.img", b"", None).unwrap(), Format::Raw);
        assert_eq!(decide_for("disk", b"some bytes", None).unwrap(), Format::Raw);
        let error = decide_for("disk.img", b"QFI\xfb\0\0\0\x03", None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.advice().unwrap().contains("--format"));
        let error = decide_for("disk.qcow2", b"some bytes", None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.advice().unwrap().contains("--format raw"));
    }

    #[test]
    fn what_the_user_says_counts() {
        let header = b"QFI\xfb\0\0\0\x03";
        assert_eq!(decide_for("disk.img", header, Some(Format::Raw)).unwrap(), Format::Raw);
        assert_eq!(decide_for("disk.qcow2", b"bytes", Some(Format::Raw)).unwrap(), Format::Raw);
        assert_eq!(decide_for("disk.img", b"bytes", Some(Format::Qcow2)).unwrap_err().kind(), ErrorKind::Usage);
        assert_eq!(decide_for("disk.img", header, Some(Format::Qcow2)).unwrap(), Format::Qcow2);
        assert_eq!(decide_for("disk.QCOW2", header, None).unwrap(), Format::Qcow2);
    }
}
