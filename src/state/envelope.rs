//! The format of every file in the state: one header line, then JSON.
//!
//! ```text
//! livemirror <kind> <version> <crc32c of the JSON, 8 hex digits> <length of the JSON in bytes>\n
//! { ... exactly so many bytes, and then the end of the file ... }
//! ```
//!
//! A file that deviates by one bit or one byte is [`ErrorKind::Corrupt`]: never trusted, and never a panic. A version that is not
//! known is refused as well, and says so.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};

/// What kind of file it is, and its version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) name: &'static str,
    pub(super) version: u32,
}

impl Kind {
    fn header(self, checksum: u32, len: usize) -> String {
        format!("livemirror {} {} {checksum:08x} {len}\n", self.name, self.version)
    }

    /// The bytes of a file that holds `value`.
    pub(super) fn encode<T: Serialize>(self, value: &T) -> Result<Vec<u8>> {
        let body = serde_json::to_vec_pretty(value).map_err(|error| {
            Error::new(ErrorKind::Failed, format!("cannot write down the {}: {error}", self.name))
                .advise("paths that are not valid UTF-8 cannot be recorded")
        })?;
        let mut bytes = self.header(crc32c::crc32c(&body), body.len()).into_bytes();
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// What the file `path` with these bytes holds.
    pub(super) fn decode<T: DeserializeOwned>(self, bytes: &[u8], path: &Path) -> Result<T> {
        let damaged = |why: &str| {
            Err(Error::new(ErrorKind::Corrupt, format!("damaged {} ({why}):", self.name))
                .on(path.display().to_string())
                .advise("it is not used; move it away if what it says is known otherwise"))
        };
        let Some(line_end) = bytes.iter().take(200).position(|&byte| byte == b'\n') else {
            return damaged("no header");
        };
        let (header, body) = bytes.split_at(line_end + 1);
        // Any header but the one that these bytes would get is wrong: so no field of it needs a parser.
        if header != self.header(crc32c::crc32c(body), body.len()).as_bytes() {
            return match self.version_in(header) {
                Some(version) if version > self.version => damaged(&format!("version {version} is not known here")),
                _ => damaged("the checksum does not match"),
            };
        }
        serde_json::from_slice(body).or_else(|error| damaged(&error.to_string()))
    }

    fn version_in(self, header: &[u8]) -> Option<u32> {
        let mut words = std::str::from_utf8(header).ok()?.split(' ');
        (words.next()? == "livemirror" && words.next()? == self.name).then(|| words.next()?.parse().ok())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { name: "test", version: 3 };

    fn decode(bytes: &[u8]) -> Result<Vec<String>> {
        KIND.decode(bytes, Path::new("/state/file"))
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_noticed() {
        let value = vec!["/a/disk.img".to_owned(), "0123456789abcdef".to_owned()];
        let bytes = KIND.encode(&value).unwrap();
        assert_eq!(decode(&bytes).unwrap(), value);
        for len in 0..bytes.len() {
            assert_eq!(decode(&bytes[..len]).unwrap_err().kind(), ErrorKind::Corrupt, "cut at {len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged).unwrap_err().kind(), ErrorKind::Corrupt, "bit {bit}");
        }
        let mut longer = bytes;
        longer.push(b' ');
        assert_eq!(decode(&longer).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_later_version_is_named() {
        let bytes = Kind { version: 4, ..KIND }.encode(&["x"]).unwrap();
        let error = decode(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "damaged test (version 4 is not known here): /state/file");
        let bytes = Kind { name: "other", version: 3 }.encode(&["x"]).unwrap();
        assert_eq!(decode(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
