//! `livemirror unmount`: ends a mount, and waits until its server has ended too.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::interrupt::Interrupt;
use super::output;
use super::place::{self, Found};
use super::status;
use super::units;
use crate::control::backend::MountStatus;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mount::{How, Point};
use crate::fuse::{holders, lingering, mountpoint};

/// How long the processes may take to end after the unmount.
const FAREWELL: Duration = Duration::from_secs(60);
/// How long they may take after `--abort`.
const SHORT_FAREWELL: Duration = Duration::from_secs(5);
/// How long a process that ends by itself may wait for the kernel to let go of its requests, before that is told.
const LINGERS: Duration = Duration::from_secs(3);
/// How long a server may take to answer to `--abort`.
const IMPATIENCE: Duration = Duration::from_secs(5);

/// Unmounts cleanly: everything is flushed and saved, and the server has ended, when this returns.
///
/// If a disk is in use, names the processes that hold it and changes nothing (exit code 3). A mirror that is unfinished goes on with
/// the next mount there.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  livemirror unmount /mnt/vm
  livemirror unmount /mnt/vm --wait 1min")]
pub struct Arguments {
    /// Where the disks are mounted.
    mountpoint: PathBuf,
    /// How long to wait for the disks not to be in use.
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration, default_value = "0s", hide_default_value = true)]
    wait: Duration,
    /// Ends the connection even while the disks are in use: whoever uses them gets errors.
    #[arg(long)]
    abort: bool,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// `NotNow`: the disks are in use. It is no mount of ours.
    pub fn run(self) -> Result<()> {
        let found = place::find(&self.mountpoint)?;
        if found.disk_name.is_some() {
            return Err(Error::usage("a disk cannot be unmounted by itself:")
                .on(self.mountpoint.display().to_string())
                .advise(format!("unmount all disks there: livemirror unmount {}", found.mountpoint().display())));
        }
        let interrupt = Interrupt::watch()?;
        let deadline = Instant::now() + self.wait;
        // A shell may well stand in the mountpoint; this command itself need not be one of those who hold it.
        let _ = std::env::set_current_dir("/");
        if self.abort {
            warn_holders(&found);
        }
        let moved = moved_disks(&found);
        loop {
            match unmount(&found, self.abort) {
                Ok(()) => {
                    for line in &moved {
                        output::line(line);
                    }
                    return Ok(());
                }
                Err(error) if error.kind() != ErrorKind::NotNow || interrupt.came() || Instant::now() >= deadline => {
                    return Err(error);
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

/// Of each disk that does not live on its source any more: where it is from now on. Above all where the mount lay over the
/// old image itself, which shows again after the unmount.
fn moved_disks(found: &Found) -> Vec<String> {
    let Ok(status) = status::from_state(found) else { return Vec::new() };
    let moved = status.volumes.into_iter().filter(|volume| volume.active != volume.source);
    moved.map(|volume| format!("{} is out of date: use {} from now on", volume.source, volume.active)).collect()
}

fn warn_holders(found: &Found) {
    let holders = holders::holders(&found.entry);
    if !holders.is_empty() {
        eprintln!("livemirror: these lose the disk now: {}", holders::describe(&holders));
    }
}

/// Unmounts and waits until server and keeper have ended. A mount without a server is only taken away.
///
/// # Errors
/// `NotNow`: the disks are in use.
pub fn unmount(found: &Found, abort: bool) -> Result<()> {
    if !mountpoint::is_alive(&found.entry) {
        // Nobody is there to be asked: only the mount is left.
        return mountpoint::clean(found.entry.clone());
    }
    let pids = match ask(found, abort) {
        Ok(pids) => pids,
        // The server may be gone before its answer was read.
        Err(error) if !found.is_mounted() => {
            log::debug!("{error}");
            recorded(found)
        }
        Err(error) if abort => {
            log::warn!("{error}");
            let pids = recorded(found);
            Point::of(found.entry.clone())?.unmount(How::Abort)?;
            pids
        }
        // It died just now.
        Err(_) if !mountpoint::is_alive(&found.entry) => return mountpoint::clean(found.entry.clone()),
        Err(error) => return Err(error),
    };
    let patience = if abort { SHORT_FAREWELL } else { FAREWELL };
    let deadline = Instant::now() + patience;
    let mut lingers_since = None;
    while found.is_mounted() || pids.iter().any(|pid| is_alive(*pid)) {
        let lingering = pids.iter().find_map(|pid| Some((pid, lingering::look(*pid)?)));
        if let Some((pid, left)) = lingering.filter(|_| !found.is_mounted()) {
            if lingers_since.get_or_insert_with(Instant::now).elapsed() >= LINGERS {
                let text = format!(
                    "unmounted, and all that could be saved is; but process {pid} has not ended, since {left}:"
                );
                return Err(Error::new(ErrorKind::Failed, text).on(found.mountpoint().display().to_string()).advise(
                    "until then its images stay in use; the next mount there goes on with what is unfinished",
                ));
            }
        } else {
            lingers_since = None;
        }
        if Instant::now() > deadline {
            let left: Vec<String> = pids.iter().filter(|pid| is_alive(**pid)).map(u32::to_string).collect();
            let text = format!("unmounted, but not all has ended within {patience:?} (process {}):", left.join(", "));
            let error = Error::new(ErrorKind::Failed, text).on(found.mountpoint().display().to_string());
            return Err(error.advise("see the log: an image may hang, and is in use as long as the process lives"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Lets the server unmount. Returns the processes that end now.
fn ask(found: &Found, abort: bool) -> Result<Vec<u32>> {
    // Whoever aborts does not want to wait for a server that hangs.
    let mut client = if abort { found.connect_within(IMPATIENCE)? } else { found.connect()? };
    let status: MountStatus = client.call("livemirror-status", json!({}))?;
    if !abort {
        client.set_patience(FAREWELL);
    }
    client.execute("livemirror-unmount", json!({ "abort": abort }))?;
    Ok([status.server_pid, status.keeper_pid].into_iter().flatten().collect())
}

/// The processes of the mount, as its server wrote them down.
fn recorded(found: &Found) -> Vec<u32> {
    let record = found.record().ok();
    record.map_or_else(Vec::new, |record| std::iter::once(record.server_pid).chain(record.keeper_pid).collect())
}

/// True if the process runs; one that only waits to be reaped does not. It does as long as one thread of it does: a killed one
/// may have to wait for a device that does not answer.
pub fn is_alive(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut states = threads.filter_map(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
        // The name, in parentheses, may hold anything.
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next())
    });
    states.any(|state| !matches!(state, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    #[test]
    fn processes_that_run_are_told_from_those_that_do_not() {
        assert!(super::is_alive(std::process::id()));
        assert!(!super::is_alive(u32::MAX));
    }
}
