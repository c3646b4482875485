//! A small QMP client: one socket, one command at a time, events kept in their order.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::wait::HANG;

/// A connection to a control socket.
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// What the server said first.
    pub greeting: Value,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects and reads the greeting.
    #[track_caller]
    pub fn greeted(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        stream.set_read_timeout(Some(HANG)).expect("a timeout");
        stream.set_write_timeout(Some(HANG)).expect("a timeout");
        let reader = BufReader::new(stream.try_clone().expect("dup"));
        let mut client = Qmp { stream, reader, greeting: Value::Null, events: VecDeque::new() };
        client.greeting = client.message();
        client
    }

    /// Connects and negotiates: commands and events from now on.
    #[track_caller]
    pub fn connect(socket: &Path) -> Self {
        let mut client = Qmp::greeted(socket);
        assert_eq!(client.execute("qmp_capabilities", json!({})), Ok(json!({})));
        client
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("send");
    }

    /// The next message, whatever it is. Each is one line of ASCII that ends with CRLF.
    #[track_caller]
    pub fn message(&mut self) -> Value {
        let mut line = Vec::new();
        self.reader.read_until(b'\n', &mut line).expect("a message");
        assert!(!line.is_empty(), "the server closed the connection");
        assert!(line.ends_with(b"\r\n"), "not ended by CRLF: {}", String::from_utf8_lossy(&line));
        assert!(line.is_ascii(), "not ASCII: {}", String::from_utf8_lossy(&line));
        serde_json::from_slice(&line).expect("JSON")
    }

    /// The next answer; events before it are kept.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        loop {
            let message = self.message();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    /// Runs a command: its return value or its error, as (class, desc).
    #[track_caller]
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)> {
        self.send(format!("{}\r\n", json!({"execute": command, "arguments": arguments})));
        let answer = self.answer();
        match (answer.get("return"), answer.get("error")) {
            (Some(value), None) => Ok(value.clone()),
            (None, Some(error)) => {
                let text =
                    |name: &str| error[name].as_str().unwrap_or_else(|| panic!("no {name}: {answer}")).to_owned();
                Err((text("class"), text("desc")))
            }
            _ => panic!("neither return nor error: {answer}"),
        }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, arguments).unwrap_or_else(|(class, desc)| panic!("{command}: {class}: {desc}"))
    }

    /// Runs a command that must fail; (class, desc).
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value) -> (String, String) {
        self.execute(command, arguments).expect_err("it should be refused")
    }

    /// The next event, kept or to come.
    #[track_caller]
    pub fn event(&mut self) -> Value {
        let event = self.events.pop_front().unwrap_or_else(|| self.message());
        assert!(event.get("event").is_some(), "an answer that nobody asked for: {event}");
        for part in ["seconds", "microseconds"] {
            assert!(event["timestamp"][part].is_i64(), "no {part}: {event}");
        }
        event
    }

    /// Events up to and with the one that is `last`, in short: `running`, `BLOCK_JOB_READY`, ...
    #[track_caller]
    pub fn events_to(&mut self, last: &str) -> Vec<String> {
        let mut seen = Vec::new();
        while seen.last().is_none_or(|name| name != last) {
            let event = self.event();
            seen.push(match event["event"].as_str() {
                Some("JOB_STATUS_CHANGE") => event["data"]["status"].as_str().expect("a status").to_owned(),
                Some(name) => name.to_owned(),
                None => panic!("no name: {event}"),
            });
        }
        seen
    }
}
