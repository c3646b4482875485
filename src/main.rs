//! Parse, start logging, dispatch, exit code; nothing else.

use std::process::ExitCode;

use clap::Parser;
use livemirror::cli::{self, Cli};
use livemirror::fuse;
use livemirror::sys::process;

fn main() -> ExitCode {
    // Some programs ignore it and pass that on: then no child's end can be waited for.
    process::reset_child_signal();
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let verb = words.first().and_then(|verb| verb.to_str()).unwrap_or_default();
    // What runs unattended logs its doings; a command says only what its user must know.
    let unattended = verb.starts_with("internal-") || (verb == "mount" && std::env::var_os("NOTIFY_SOCKET").is_some());
    let level = if unattended { "info" } else { "error" };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("LIVEMIRROR_LOG", level)).init();
    if verb == fuse::VERB_SERVER {
        // Threads that hang in an image may be left; and a session, where it failed.
        process::leave(livemirror::server::main());
    }
    if let Some(code) = words.get(1..).and_then(|arguments| fuse::run_internal_verb(verb, arguments)) {
        return ExitCode::from(code);
    }
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            cli::report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
