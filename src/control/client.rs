//! The talking end of the control socket.
//!
//! Each call has a deadline, as the server may hang on a dead disk: the caller hears of it instead of hanging too.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::errors;
use super::wire::{self, Decoder, Incoming};
use crate::error::{Error, ErrorKind, Result};

/// How long a server may take to greet and to answer, unless [`Client::set_patience`] says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Events that are kept while an answer is awaited; older ones are dropped.
const EVENTS_MAX: usize = 10_000;

/// The longest answer that is taken: the status of a mount with thousands of volumes.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// An event of the server.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, `BLOCK_JOB_READY` for example.
    pub name: String,
    /// Its data, null if it has none.
    pub data: Value,
}

/// A connection that has been negotiated.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    decoder: Decoder,
    arrived: VecDeque<Value>,
    events: VecDeque<Event>,
    greeting: Value,
    next_id: u64,
    patience: Duration,
}

impl Client {
    /// Connects, reads the greeting and negotiates.
    ///
    /// # Errors
    /// `NotFound`: nothing listens there, the server is dead or was never started. `NotNow`: it does not answer.
    pub fn connect(path: &Path) -> Result<Client> {
        Client::connect_within(path, PATIENCE)
    }

    /// As [`Client::connect`], for a server that must answer within `patience`; calls then have as long.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Client> {
        let stream = connect_stream(path).map_err(|error| {
            let kind = match error.kind() {
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Failed,
            };
            let reason = if kind == ErrorKind::NotFound {
                "no server answers on the control socket".to_owned()
            } else {
                Error::io("cannot connect to the control socket", &error).to_string()
            };
            Error::new(kind, reason).on(path.display().to_string())
        })?;
        let mut client = Client {
            stream,
            path: path.to_owned(),
            decoder: Decoder::with_limit(ANSWER_BYTES_MAX),
            arrived: VecDeque::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
            next_id: 1,
            patience,
        };
        let deadline = Instant::now() + patience;
        let first = client.receive(Some(deadline))?.ok_or_else(|| client.silent())?;
        if let Some(error) = first.get("error") {
            return Err(errors::from_json(error));
        }
        client.greeting = first.get("QMP").cloned().ok_or_else(|| client.strange())?;
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// How long a call may take from now on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// What the server said first: `version` and `capabilities`.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Executes a command; `arguments` is an object. Events that arrive meanwhile are kept for [`Client::next_event`].
    ///
    /// # Errors
    /// What the server answered, with its kind and advice. `NotNow`: no answer in time. `Failed`: the connection broke.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if arguments.as_object().is_some_and(|members| !members.is_empty()) {
            request["arguments"] = arguments;
        }
        self.stream.write_all(&wire::encode(&request)).map_err(|error| self.broken(&error))?;
        let deadline = Instant::now() + self.patience;
        loop {
            let mut message = self.receive(Some(deadline))?.ok_or_else(|| self.silent())?;
            if message.get("event").is_some() {
                self.keep_event(message);
            } else if message.get("id").and_then(Value::as_u64) != Some(id) {
                // The answer to an earlier call that was not waited for to the end.
                log::debug!("control: late answer {message}");
            } else if let Some(error) = message.get("error") {
                return Err(errors::from_json(error));
            } else {
                return message.get_mut("return").map(Value::take).ok_or_else(|| self.strange());
            }
        }
    }

    /// As [`Client::execute`], with the answer read as a `T`.
    ///
    /// # Errors
    /// As [`Client::execute`]; also when the answer is no `T`.
    pub fn call<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        let answer = self.execute(command, arguments)?;
        serde_json::from_value(answer).map_err(|error| {
            let error =
                Error::new(ErrorKind::Failed, format!("the server's answer to {command} was not understood: {error}"));
            error.advise("command and server may be of different versions")
        })
    }

    /// The next event, waited for as long as `timeout`; `None` when there was none.
    ///
    /// # Errors
    /// The connection broke.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive(Some(deadline))? {
                None => return Ok(None),
                Some(message) if message.get("event").is_some() => self.keep_event(message),
                Some(message) => log::debug!("control: late answer {message}"),
            }
        }
    }

    fn keep_event(&mut self, mut message: Value) {
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        let data = message.get_mut("data").map_or(Value::Null, Value::take);
        let name = message["event"].as_str().unwrap_or_default().to_owned();
        self.events.push_back(Event { name, data });
    }

    /// The next message; `None` when the deadline has passed.
    fn receive(&mut self, deadline: Option<Instant>) -> Result<Option<Value>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(message) = self.arrived.pop_front() {
                return Ok(Some(message));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.stream.set_read_timeout(left).map_err(|error| self.broken(&error))?;
            let count = match self.stream.read(&mut buffer) {
                Ok(0) => return Err(self.broken(&io::Error::from_raw_os_error(libc::ECONNRESET))),
                Ok(count) => count,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Err(self.broken(&error)),
            };
            let mut strange = false;
            let arrived = &mut self.arrived;
            self.decoder.push(&buffer[..count], |incoming| match incoming {
                Incoming::Message(message) => arrived.push_back(message),
                Incoming::Rubbish(_) => strange = true,
            });
            if strange {
                return Err(self.strange());
            }
        }
    }

    fn broken(&self, error: &io::Error) -> Error {
        Error::io("lost the connection to the server on", error).on(self.path.display().to_string())
    }

    fn silent(&self) -> Error {
        Error::not_now(format!("the server does not answer within {} s on", self.patience.as_secs_f64()))
            .on(self.path.display().to_string())
            .advise("it may hang on one of its images; `livemirror status` shows its pid and what the state says")
    }

    fn strange(&self) -> Error {
        Error::new(ErrorKind::Failed, "no QMP server listens on").on(self.path.display().to_string())
    }
}

/// Connects to a socket whose path may be longer than an address has room for.
pub(super) fn connect_stream(path: &Path) -> io::Result<UnixStream> {
    match (path.parent(), path.file_name()) {
        (Some(directory), Some(name)) if path.as_os_str().len() > 100 => {
            let opened = std::fs::File::open(directory)?;
            UnixStream::connect(PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd())).join(name))
        }
        _ => UnixStream::connect(path),
    }
}
