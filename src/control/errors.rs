//! Errors as QMP carries them, and back.
//!
//! QEMU's clients look at `class` and `desc`. Ours find the kind and the advice of the [`Error`] in a member of its own.

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind};

/// QEMU's error classes, as far as they occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Generic,
    CommandNotFound,
    DeviceNotActive,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Class::Generic => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
        }
    }
}

/// An error on its way to a client.
#[derive(Clone, Debug)]
pub(super) struct QmpError {
    class: Class,
    error: Error,
}

impl QmpError {
    /// An error in QEMU's words.
    pub(super) fn new(class: Class, kind: ErrorKind, desc: impl Into<String>) -> Self {
        QmpError { class, error: Error::new(kind, desc) }
    }

    /// A request that makes no sense.
    pub(super) fn usage(desc: impl Into<String>) -> Self {
        QmpError::new(Class::Generic, ErrorKind::Usage, desc)
    }

    /// The member `error` of the answer.
    pub(super) fn to_json(&self) -> Value {
        let mut ours = Map::new();
        ours.insert("kind".to_owned(), kind_name(self.error.kind()).into());
        if let Some(advice) = self.error.advice() {
            ours.insert("advice".to_owned(), advice.into());
        }
        json!({ "class": self.class.name(), "desc": self.error.to_string(), "livemirror": ours })
    }

    #[cfg(test)]
    pub(super) fn desc(&self) -> String {
        self.error.to_string()
    }
}

impl From<Error> for QmpError {
    fn from(error: Error) -> Self {
        QmpError { class: Class::Generic, error }
    }
}

/// The [`Error`] that an answer's member `error` stands for. Any server's will do: what is missing is `Failed` without advice.
pub(super) fn from_json(error: &Value) -> Error {
    let desc = error["desc"].as_str().unwrap_or("the server answered with an error that has no description");
    let ours = &error["livemirror"];
    let kind = ours["kind"].as_str().map_or(ErrorKind::Failed, kind_from_name);
    let made = Error::new(kind, desc);
    match ours["advice"].as_str() {
        Some(advice) => made.advise(advice),
        None => made,
    }
}

fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Usage => "usage",
        ErrorKind::NotNow => "not-now",
        ErrorKind::Locked => "locked",
        ErrorKind::Superseded => "superseded",
        ErrorKind::NotFound => "not-found",
        ErrorKind::Exists => "exists",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::NoSpace => "no-space",
        ErrorKind::ReadOnly => "read-only",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Different => "different",
        ErrorKind::Failed => "failed",
    }
}

fn kind_from_name(name: &str) -> ErrorKind {
    [
        ErrorKind::Usage,
        ErrorKind::NotNow,
        ErrorKind::Locked,
        ErrorKind::Superseded,
        ErrorKind::NotFound,
        ErrorKind::Exists,
        ErrorKind::Unsupported,
        ErrorKind::NoSpace,
        ErrorKind::ReadOnly,
        ErrorKind::Corrupt,
        ErrorKind::Different,
    ]
    .into_iter()
    .find(|&kind| kind_name(kind) == name)
    .unwrap_or(ErrorKind::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_and_advice_survive_the_socket() {
        let error = Error::not_now("the mirror is not ready").on("os.img").advise("wait");
        let back = from_json(&QmpError::from(error).to_json());
        assert_eq!(back.to_string(), "the mirror is not ready os.img");
        assert_eq!((back.kind(), back.advice()), (ErrorKind::NotNow, Some("wait")));
        assert_eq!(from_json(&json!({"class": "GenericError", "desc": "x"})).kind(), ErrorKind::Failed);
    }
}
