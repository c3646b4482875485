//! NBD URIs: which words are one, and what they say. The rest is libnbd's to read.
//!
//! ```text
//! nbd://HOST[:PORT]/EXPORT                 nbds://... the same with TLS
//! nbd+unix:///EXPORT?socket=/PATH          nbds+unix:///...
//!   &tls-certificates=/DIR  &tls-psk-file=/FILE
//! ```

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};

const SCHEMES: &[&str] = &["nbd://", "nbds://", "nbd+unix://", "nbds+unix://", "nbd+vsock://", "nbds+vsock://"];
/// Parameters that name files: the server of a mount has another current directory than the user.
const FILES: &[&str] = &["socket", "tls-certificates", "tls-psk-file"];
/// Where a server listens if no port is named.
const PORT: u32 = 10809;
/// The name of a disk whose export has none that a file could have.
const NAMELESS: &str = "nbd.img";

/// True if `place` is an NBD URI and not the path of a file.
pub fn is_uri(place: &Path) -> bool {
    place.to_str().is_some_and(|text| SCHEMES.iter().any(|scheme| text.starts_with(scheme)))
}

/// Authority and path, and what follows the question mark.
fn parts(uri: &str) -> (&str, &str) {
    let rest = uri.split_once("://").map_or("", |(_, rest)| rest);
    let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
    rest.split_once('?').unwrap_or((rest, ""))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn parameter(uri: &str, wanted: &str) -> Option<String> {
    let mut pairs = parts(uri).1.split(['&', ';']).filter_map(|pair| pair.split_once('='));
    pairs.find(|(name, _)| *name == wanted).map(|(_, value)| decoded(value))
}

/// The socket that the server listens at, if the URI names one in the file system.
pub fn unix_socket(uri: &str) -> Option<PathBuf> {
    parameter(uri, "socket").map(PathBuf::from)
}

/// The name of the export, as the server hears it.
pub(super) fn export_name(uri: &str) -> String {
    decoded(parts(uri).0.split_once('/').map_or("", |(_, export)| export))
}

/// The export that a URI means, in one spelling: with or without TLS, the default port, capitals in a host's name and
/// escapes make no other one, nor do parameters but the socket. Other names of one host, or of one export, are not known here.
pub fn key(uri: &str) -> String {
    let scheme = uri.split("://").next().unwrap_or_default();
    let kind = scheme.split_once('+').map_or("tcp", |(_, kind)| kind);
    let authority = parts(uri).0.split('/').next().unwrap_or_default();
    let server = if kind == "unix" {
        let socket = unix_socket(uri).unwrap_or_default();
        socket.components().collect::<PathBuf>().display().to_string()
    } else {
        let host = authority.rsplit('@').next().unwrap_or_default();
        // The colons of an address in brackets are none before a port.
        let (host, port) = match host.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, port),
            _ => (host, ""),
        };
        let port = port.parse().unwrap_or(PORT);
        let host = decoded(host).to_ascii_lowercase();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let host = bare.parse::<IpAddr>().map_or(bare.to_owned(), |address| address.to_canonical().to_string());
        format!("{}:{port}", host.trim_end_matches('.'))
    };
    format!("{kind} {server} {}", export_name(uri))
}

/// True if both are NBD URIs of one export.
pub fn same_export(one: &str, other: &str) -> bool {
    is_uri(Path::new(one)) && is_uri(Path::new(other)) && key(one) == key(other)
}

/// What a disk is called that lies there: the last part of the export's name.
pub fn disk_name(uri: &str) -> String {
    let name = export_name(uri);
    let last = name.rsplit('/').find(|part| !part.is_empty()).unwrap_or(NAMELESS);
    let well_formed = last != "." && last != ".." && !last.contains('\0') && last.len() <= 255;
    if well_formed { last.to_owned() } else { NAMELESS.to_owned() }
}

/// Checks what would otherwise fail far from the user, or mean something else there.
///
/// # Errors
/// A file in it has a relative name; a socket is missing.
pub fn check(uri: &str) -> Result<()> {
    let wrong = |what: String, advice: &str| Err(Error::usage(what).on(uri).advise(advice));
    if uri.contains('\0') {
        return wrong("there is a NUL in the URI".to_owned(), "leave it away");
    }
    for name in FILES {
        if parameter(uri, name).is_some_and(|path| !Path::new(&path).is_absolute()) {
            return wrong(format!("{name}= must be an absolute path in"), "write it with a / first");
        }
    }
    if uri.split("://").next().is_some_and(|scheme| scheme.ends_with("+unix")) && unix_socket(uri).is_none() {
        return wrong("no socket= is named in".to_owned(), "nbd+unix:///EXPORT?socket=/PATH");
    }
    Ok(())
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn only_nbd_uris_are_uris() {
        for uri in ["nbd://host", "nbds://host:10809/x", "nbd+unix:///?socket=/s", "nbds+unix:///x?socket=/s"] {
            assert!(is_uri(Path::new(uri)), "{uri}");
        }
        for path in ["/nbd://host", "nbd", "nbd:/x", "http://host/x", "disk.img"] {
            assert!(!is_uri(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn a_disk_is_called_after_its_export() {
        for (uri, name) in [
            ("nbd://host:10809/os", "os"),
            ("nbd://host/pool/os.img", "os.img"),
            ("nbd://host", NAMELESS),
            ("nbd://host/", NAMELESS),
            ("nbd://host/..", NAMELESS),
            ("nbd+unix:///my%20disk?socket=/run/nbd.sock", "my disk"),
            ("nbd+unix:///?socket=/run/nbd.sock", NAMELESS),
            ("nbd://[::1]:10809/a%2Fb", "b"),
        ] {
            assert_eq!(disk_name(uri), name, "{uri}");
        }
    }

    #[test]
    fn one_export_has_one_key_however_it_is_spelled() {
        for (one, other) in [
            ("nbd://h/x", "nbd://h:10809/x"),
            ("nbd://h/x", "nbds://H.:/%78?tls-certificates=/etc/pki"),
            ("nbd://h", "nbd://h/"),
            ("nbd://h/x", "nbds://somebody@h/x#part"),
            ("nbd://[::1]:10809/a%2Fb", "nbd://[0:0::1]/a/b"),
            ("nbd://127.0.0.1/x", "nbd://[::ffff:127.0.0.1]/x"),
            ("nbd+unix:///x?socket=/run/s", "nbds+unix:///x?tls-psk-file=/k&socket=%2Frun//s"),
        ] {
            assert!(same_export(one, other), "{one} {other}: {} {}", key(one), key(other));
        }
        for (one, other) in [
            ("nbd://h/x", "nbd://h/X"),
            ("nbd://h/x", "nbd://h:10810/x"),
            ("nbd://h/x", "nbd://i/x"),
            ("nbd://h/x", "nbd+vsock://h/x"),
            ("nbd+unix:///x?socket=/run/s", "nbd+unix:///x?socket=/run/t"),
            ("/disk.img", "/disk.img"),
        ] {
            assert!(!same_export(one, other), "{one} {other}");
        }
    }

    #[test]
    fn files_are_named_by_absolute_paths() {
        check("nbds://host/x?tls-certificates=/etc/pki").unwrap();
        check("nbd+unix:///?socket=%2Frun%2Fnbd.sock").unwrap();
        assert_eq!(unix_socket("nbd+unix:///x?tls-psk-file=/k&socket=/a%20b"), Some("/a b".into()));
        for uri in ["nbd+unix:///", "nbd+unix:///x?socket=s", "nbds://host?tls-psk-file=keys", "nbd://a\0b"] {
            assert_eq!(check(uri).unwrap_err().exit_code(), 2, "{uri}");
        }
    }
}
