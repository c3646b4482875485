//! From a message to its answer: the request's shape, the negotiation, the table of commands.
//!
//! Order of a command's events and its return, as QEMU has it: the events that a new job, `finalize` and `dismiss` cause
//! come before the return; those of the verbs that a job obeys later (`complete`, `cancel`, `pause`, ...) come after it.
//! The latter are executed with the connection's events held back.
//!
//! No command runs out of band: `exec-oob` is understood once its capability is enabled, and answered with QEMU's refusal.

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::backend::Backend;
use super::errors::{Class, QmpError};
use super::{jobs, livemirror, queries};
use crate::error::ErrorKind;

pub(super) type Answer = std::result::Result<Value, QmpError>;

/// When a command's return goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// As soon as it is executed; events may come first.
    AsItHappens,
    /// Before the events of what it sets off.
    ReturnFirst,
}

/// One command.
pub(super) struct Command {
    name: &'static str,
    pub(super) order: Order,
    run: fn(&dyn Backend, Arguments) -> Answer,
}

const fn plain(name: &'static str, run: fn(&dyn Backend, Arguments) -> Answer) -> Command {
    Command { name, order: Order::AsItHappens, run }
}

const fn verb(name: &'static str, run: fn(&dyn Backend, Arguments) -> Answer) -> Command {
    Command { name, order: Order::ReturnFirst, run }
}

/// Every command but `qmp_capabilities` and `quit`, which concern the connection.
static COMMANDS: &[Command] = &[
    plain("query-version", queries::version),
    plain("query-commands", queries::commands),
    plain("query-jobs", queries::jobs),
    plain("query-block-jobs", queries::block_jobs),
    plain("query-block", queries::block),
    plain("drive-mirror", jobs::drive_mirror),
    verb("block-job-set-speed", jobs::block_job_set_speed),
    verb("block-job-pause", jobs::block_job_pause),
    verb("block-job-resume", jobs::block_job_resume),
    verb("block-job-cancel", jobs::block_job_cancel),
    verb("block-job-complete", jobs::block_job_complete),
    verb("block-job-change", jobs::block_job_change),
    plain("block-job-finalize", jobs::finalize),
    plain("block-job-dismiss", jobs::dismiss),
    verb("job-pause", jobs::job_pause),
    verb("job-resume", jobs::job_resume),
    verb("job-cancel", jobs::job_cancel),
    verb("job-complete", jobs::job_complete),
    plain("job-finalize", jobs::finalize),
    plain("job-dismiss", jobs::dismiss),
    plain("livemirror-status", livemirror::status),
    plain("livemirror-mirror", livemirror::mirror),
    plain("livemirror-cutover", livemirror::cutover),
    plain("livemirror-verify", livemirror::verify),
    verb("livemirror-finish", livemirror::finish),
    verb("livemirror-set-pace", livemirror::set_pace),
    verb("livemirror-cancel", livemirror::cancel),
    plain("livemirror-unmount", livemirror::unmount),
    plain("livemirror-holders", livemirror::holders),
];

/// The names of all commands.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    ["qmp_capabilities", "quit"].into_iter().chain(COMMANDS.iter().map(|command| command.name))
}

/// What a connection has agreed to so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Session {
    negotiated: bool,
    oob: bool,
}

/// What a request asks for, its shape having been checked.
pub(super) enum Task {
    /// Answer, and send events from now on.
    Negotiated,
    /// Answer, then let the mount end.
    Quit,
    /// Execute.
    Run(&'static Command, Arguments),
}

impl Command {
    pub(super) fn run(&self, backend: &dyn Backend, arguments: Arguments) -> Answer {
        (self.run)(backend, arguments)
    }
}

impl Session {
    /// Checks a request and finds its command. Its errors are QEMU's, in QEMU's order.
    pub(super) fn understand(&mut self, message: Value) -> std::result::Result<Task, QmpError> {
        let Value::Object(members) = message else {
            return Err(QmpError::usage("QMP input must be a JSON object"));
        };
        let Request { name, out_of_band, arguments } = self.request(members)?;
        let mut arguments = Arguments::new(arguments);
        if name == "qmp_capabilities" {
            return self.negotiate(arguments);
        }
        if !self.negotiated {
            return Err(not_found("Expecting capabilities negotiation with 'qmp_capabilities'"));
        }
        let known = names().any(|known| known == name);
        if known && out_of_band {
            return Err(QmpError::usage(format!("The command {name} does not support OOB")));
        }
        if name == "quit" {
            arguments.finish()?;
            return Ok(Task::Quit);
        }
        match COMMANDS.iter().find(|command| command.name == name) {
            Some(command) => Ok(Task::Run(command, std::mem::replace(&mut arguments, Arguments::new(Map::new())))),
            None => Err(not_found(format!("The command {name} has not been found"))),
        }
    }

    fn request(self, members: Map<String, Value>) -> std::result::Result<Request, QmpError> {
        let mut request = Request { name: String::new(), out_of_band: false, arguments: Map::new() };
        let mut named = false;
        for (member, value) in members {
            match (member.as_str(), value) {
                ("id", _) => {}
                ("arguments", Value::Object(arguments)) => request.arguments = arguments,
                ("arguments", _) => return Err(QmpError::usage("QMP input member 'arguments' must be an object")),
                ("execute", value) | ("exec-oob", value) if member == "execute" || self.oob => {
                    let Value::String(name) = value else {
                        return Err(QmpError::usage(format!("QMP input member '{member}' must be a string")));
                    };
                    if named {
                        return Err(QmpError::usage("QMP input member 'exec-oob' clashes with member 'execute'"));
                    }
                    named = true;
                    request.name = name;
                    request.out_of_band = member == "exec-oob";
                }
                _ => return Err(QmpError::usage(format!("QMP input member '{member}' is unexpected"))),
            }
        }
        if named { Ok(request) } else { Err(QmpError::usage("QMP input lacks member 'execute'")) }
    }

    fn negotiate(&mut self, mut arguments: Arguments) -> std::result::Result<Task, QmpError> {
        if self.negotiated {
            return Err(not_found("Capabilities negotiation is already complete, command ignored"));
        }
        let wanted = arguments.strings("enable")?.unwrap_or_default();
        for (index, capability) in wanted.iter().enumerate() {
            super::arguments::find(&format!("enable[{index}]"), capability, &[("oob", ())])?;
        }
        arguments.finish()?;
        *self = Session { negotiated: true, oob: !wanted.is_empty() };
        Ok(Task::Negotiated)
    }
}

struct Request {
    name: String,
    out_of_band: bool,
    arguments: Map<String, Value>,
}

fn not_found(desc: impl Into<String>) -> QmpError {
    QmpError::new(Class::CommandNotFound, ErrorKind::Usage, desc)
}

/// The answer as a message, with the request's `id` if it had one.
pub(super) fn reply(answer: Answer, id: Option<Value>) -> Value {
    let mut message = match answer {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": error.to_json() }),
    };
    if let Some(id) = id {
        message["id"] = id;
    }
    message
}

/// What a client reads first.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": queries::version_json(), "capabilities": ["oob"] } })
}
