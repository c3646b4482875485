//! The command line: one module for each verb, all behind [`Cli`].
//!
//! A verb talks to a mount through its control socket only (`place` finds it); `mount`, `list` and what concerns a dead
//! server cannot. Nothing here looks at or below a mount of ours. An error ends the process with its kind's exit code, after
//! one line that says what was wrong and one that says what to do ([`report`]).

mod adjust;
mod cutover;
mod demo;
mod finish;
mod follow;
mod generate;
mod interrupt;
mod list;
mod mirror;
mod mount;
mod options;
mod output;
mod place;
mod progress;
mod relocate;
mod status;
mod units;
mod unmount;
mod upgrade;
mod verify;

use clap::{Parser, Subcommand};

use crate::error::{Error, Result};

/// Mounts a virtual disk as a plain file and moves it to another place while a virtual machine, a database or any other
/// program keeps using it.
#[derive(Debug, Parser)]
#[command(name = "livemirror", version, arg_required_else_help = true, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const AFTER_HELP: &str = "DISK is the path of a mounted disk, or the mountpoint where only one disk is mounted there.
SIZE is in bytes, or has K, M, G or T (powers of 1024). DURATION is 50ms, 2s, 1h.

Example:
  livemirror mount disk.img /mnt/vm          a VM or a database uses /mnt/vm/disk.img
  livemirror mirror /mnt/vm /new/disk.img    a mirror starts; the guest goes on
  livemirror status /mnt/vm --watch          how far, how fast, how long
  livemirror cutover /mnt/vm                 the guest lives on /new/disk.img now
  livemirror unmount /mnt/vm

Exit codes: 0 done; 1 failed; 2 wrong usage; 3 not now (not ready, timed out, busy), nothing changed; 4 images differ.
LIVEMIRROR_LOG=debug shows more.";

#[derive(Debug, Subcommand)]
enum Verb {
    Mount(mount::Arguments),
    Mirror(mirror::Arguments),
    Status(status::Arguments),
    Cutover(cutover::Arguments),
    Finish(finish::FinishArguments),
    Cancel(finish::CancelArguments),
    Pause(adjust::PauseArguments),
    Resume(adjust::ResumeArguments),
    Set(adjust::SetArguments),
    Move(relocate::Arguments),
    Verify(verify::Arguments),
    #[command(visible_alias = "umount")]
    Unmount(unmount::Arguments),
    Upgrade(upgrade::Arguments),
    List(list::Arguments),
    Demo(demo::Arguments),
    /// Writes man pages and completions, for packages.
    #[command(subcommand, hide = true)]
    Generate(generate::Arguments),
}

impl Cli {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever went wrong; see [`Error::exit_code`] for what the process ends with.
    pub fn run(self) -> Result<()> {
        match self.verb {
            Verb::Mount(arguments) => arguments.run(),
            Verb::Mirror(arguments) => arguments.run(),
            Verb::Status(arguments) => arguments.run(),
            Verb::Cutover(arguments) => arguments.run(),
            Verb::Finish(arguments) => arguments.run(),
            Verb::Cancel(arguments) => arguments.run(),
            Verb::Pause(arguments) => arguments.run(),
            Verb::Resume(arguments) => arguments.run(),
            Verb::Set(arguments) => arguments.run(),
            Verb::Move(arguments) => arguments.run(),
            Verb::Verify(arguments) => arguments.run(),
            Verb::Unmount(arguments) => arguments.run(),
            Verb::Upgrade(arguments) => arguments.run(),
            Verb::List(arguments) => arguments.run(),
            Verb::Demo(arguments) => arguments.run(),
            Verb::Generate(arguments) => arguments.run(),
        }
    }
}

/// Prints an error as every verb does: what was wrong, then what to do about it.
pub fn report(error: &Error) {
    eprintln!("livemirror: {error}");
    if let Some(advice) = error.advice() {
        eprintln!("  hint: {advice}");
    }
}

#[cfg(test)]
mod waiting_tests;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_and_option_is_explained() {
        for verb in Cli::command().get_subcommands() {
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
            for argument in verb.get_arguments().filter(|argument| argument.get_id() != "help") {
                assert!(argument.get_help().is_some(), "{} {}", verb.get_name(), argument.get_id());
            }
        }
    }

    #[test]
    fn command_lines_of_the_design_are_understood() {
        for line in [
            "mount a.img b.img /mnt/vm --format raw --read-only --growable --allow-other -o ro,cache=none --foreground",
            "mount --volume name=a,source=/b,format=raw --volume source=/c /mnt/vm --pidfile p --control c --state-dir s",
            "mount a.img /mnt/vm --log-file l --follow",
            "mirror /mnt/vm /new --format raw --copy-mode write-blocking --granularity 64K --speed 1G --buffer 32M --wait",
            "mirror /mnt/vm /new --on-source-error stop --on-target-error ignore --existing --restart --dry-run --no-reflink",
            "status",
            "status /mnt/vm --json --watch",
            "cutover /mnt/vm --max-pause 20ms --timeout 1h",
            "finish /mnt/vm",
            "cancel /mnt/vm --keep",
            "pause /mnt/vm",
            "resume /mnt/vm",
            "set /mnt/vm --speed 0 --copy-mode auto",
            "move /mnt/vm /new",
            "verify /mnt/vm",
            "unmount /mnt/vm --wait 1min --abort",
            "upgrade /mnt/vm --force",
            "list --json",
            "demo --dir /var/tmp",
        ] {
            let words = std::iter::once("livemirror").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
        for line in ["mount", "mirror /mnt/vm", "set /mnt/vm", "bogus", "mirror /a /b --speed fast", "status --watch"] {
            let error = Cli::try_parse_from(std::iter::once("livemirror").chain(line.split(' '))).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
