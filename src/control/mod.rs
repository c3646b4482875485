//! The control socket: QMP, as QEMU speaks it, and the client that the command line uses.
//!
//! ```text
//! bytes -> wire -> commands -> (arguments, jobs, queries, livemirror) -> Backend
//!            ^                                                             |
//!          outbox <- events <----------------------------------------------+
//! ```
//!
//! A volume is the device that [`device_names`] makes of its file name. Commands of our own start with `livemirror-`.
//! Invariants:
//! - nothing that a client sends, or leaves unread, ends or blocks anything but its own connection;
//! - every queue is bounded: replies wait for room (the client is then not read from), events never wait: a client that
//!   does not read them is cut off;
//! - events reach a client in the order in which the backend emitted them, and not before the return of the command that
//!   caused them where QEMU has that order (see [`commands`]).
//!
//! An error of ours has, beside QEMU's `class` and `desc`, the member `"livemirror": {"kind": ..., "advice": ...}`, from
//! which [`client::Client`] makes the same [`crate::error::Error`] again. QEMU's clients pass over it.

mod arguments;
pub mod backend;
pub mod client;
pub mod commands;
mod connection;
mod errors;
mod events;
mod jobs;
mod livemirror;
mod outbox;
mod queries;
pub mod server;
pub mod wire;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

/// A well-formed QMP device name for a volume of that file name: a letter first, then letters, digits, `-`, `.`, `_`.
/// Other characters become `-`; a name that does not start with a letter gets `disk-` in front.
pub fn device_name(file_name: &str) -> String {
    let tame: String =
        file_name.chars().map(|c| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '-' }).collect();
    if tame.starts_with(|c: char| c.is_ascii_alphabetic()) { tame } else { format!("disk-{tame}") }
}

/// The device names of a mount's volumes, in mount order: [`device_name`] of each, made unique with `-2`, `-3`, ...
pub fn device_names<'a>(file_names: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for file_name in file_names {
        let plain = device_name(file_name);
        let mut name = plain.clone();
        let mut number = 2;
        while names.contains(&name) {
            name = format!("{plain}-{number}");
            number += 1;
        }
        names.push(name);
    }
    names
}

/// True for what QEMU accepts as an id: a letter, then letters, digits, `-`, `.`, `_`.
pub fn is_well_formed_id(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

#[cfg(test)]
mod name_tests {
    use super::*;

    #[test]
    fn device_names_are_well_formed_and_unique() {
        assert_eq!(device_name("os.img"), "os.img");
        assert_eq!(device_name("my disk.img"), "my-disk.img");
        assert_eq!(device_name("0.img"), "disk-0.img");
        assert_eq!(device_name(""), "disk-");
        assert_eq!(device_name("größe"), "gr--e");
        assert_eq!(device_names(["a b", "a-b", "c", "a b"]), ["a-b", "a-b-2", "c", "a-b-3"]);
        assert!(device_names(["", "1", "ä"]).iter().all(|name| is_well_formed_id(name)));
        assert!(!is_well_formed_id("bad id!") && !is_well_formed_id(""));
    }
}
