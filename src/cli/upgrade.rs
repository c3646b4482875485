//! `livemirror upgrade`: lets the program that is on disk now take the place of the one that serves a mount.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::output;
use super::place::{self, Found};
use super::status;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::holders;
use crate::server::config::MountConfig;
use crate::state::keeper_file::{self, KeeperWord, Upgrade};

/// Longer than a keeper takes, with all the time that it gives a new server.
const PATIENCE: Duration = Duration::from_secs(120);

/// Replaces the running program by the one on disk now, while the disks are in use.
///
/// Install the new program over the old one (by renaming it into place) first. Whoever uses the disks sees a short stall. If the new
/// program does not run, or its server dies before it has answered anything, the one before goes on (exit code 1).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  livemirror upgrade /mnt/vm
  kill -HUP $(livemirror status /mnt/vm --json | jq .keeper_pid)      the same, without the report")]
pub struct Arguments {
    /// Where the disks are mounted.
    mountpoint: PathBuf,
    /// Even while a mirror runs that cannot be resumed: it ends as failed.
    #[arg(long)]
    force: bool,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// The new program does not work; there is no keeper; a mirror that cannot be resumed runs (`NotNow`).
    pub fn run(self) -> Result<()> {
        let found = place::find(&self.mountpoint)?;
        if !self.force {
            refuse_mirrors(&found)?;
        }
        let before = keeper(&found)?;
        let number = before.upgrade.as_ref().map_or(0, |upgrade| upgrade.number);
        let failed = |errno: nix::errno::Errno| Error::io("cannot signal the keeper, process", &errno.into());
        let pid = i32::try_from(before.keeper_pid).unwrap_or(0);
        kill(Pid::from_raw(pid), Signal::SIGHUP).map_err(|errno| failed(errno).on(pid.to_string()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let word = word(&found);
            let upgrade = word.as_ref().and_then(|word| Some((word, word.upgrade.as_ref()?)));
            if let Some((word, upgrade)) = upgrade.filter(|(_, upgrade)| upgrade.number > number) {
                return report(&found, word, upgrade);
            }
            if word.as_ref().is_none_or(|word| word.keeper_pid != before.keeper_pid) {
                return Err(Error::new(ErrorKind::Failed, "the keeper died meanwhile; see the log of the mount at")
                    .on(found.mountpoint().display().to_string())
                    .advise(format!("`livemirror status {}` tells what serves now", found.mountpoint().display())));
            }
            if Instant::now() > deadline {
                return Err(Error::not_now(format!(
                    "no end of the upgrade is seen within {PATIENCE:?}; see the log of"
                ))
                .on(found.mountpoint().display().to_string()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn word(found: &Found) -> Option<KeeperWord> {
    keeper_file::word(&MountConfig::mount_id(found.mountpoint()), found.entry.user_id)
}

/// The keeper, seen to be alive.
fn keeper(found: &Found) -> Result<KeeperWord> {
    let shown = || found.mountpoint().display().to_string();
    let word = word(found).filter(|word| holders::may_keep(word.keeper_pid, &found.entry)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "no keeper is known for the mount")
            .on(shown())
            .advise("was it mounted by another user? Otherwise unmount and mount it again")
    })?;
    if has_terminal(word.keeper_pid) {
        return Err(Error::not_now("it runs in the foreground of a terminal, where SIGHUP would end the mount")
            .on(shown())
            .advise("end it there, and mount with the new program"));
    }
    Ok(word)
}

/// True if the process has a controlling terminal: the seventh field of its `stat`, the fifth after the name.
fn has_terminal(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let terminal = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(4));
    terminal.is_some_and(|number| number != "0")
}

/// A mirror outlives its server if its intent log could be kept.
fn refuse_mirrors(found: &Found) -> Result<()> {
    // Without a server there is no mirror.
    let Ok(state) = status::recorded(found) else { return Ok(()) };
    match state.volumes.iter().find(|volume| volume.mirror_target.is_some() && volume.mirror.is_none()) {
        Some(volume) => Err(Error::not_now("a mirror runs that cannot be resumed, and would end as failed:")
            .on(found.mountpoint().join(&volume.name).display().to_string())
            .advise("cut over, finish or cancel it first, or pass --force")),
        None => Ok(()),
    }
}

fn report(found: &Found, word: &KeeperWord, upgrade: &Upgrade) -> Result<()> {
    let shown = found.mountpoint().display();
    let serves = match word.server_pid {
        Some(pid) => format!("server {pid}"),
        None => "no server".to_owned(),
    };
    let pause = upgrade.pause_ms.map_or(String::new(), |pause| format!(", requests waited up to {pause} ms"));
    if let Some(error) = &upgrade.error {
        let text = format!("{error}: {} goes on ({serves}, keeper {}{pause})", upgrade.from, word.keeper_pid);
        return Err(Error::new(ErrorKind::Failed, text)
            .advise("install a program that works, then `livemirror upgrade` again; the log of the mount says more"));
    }
    let to = upgrade.to.as_deref().unwrap_or("?");
    output::line(format_args!(
        "{shown}: upgraded from {} to {to} ({serves}, keeper {}{pause})",
        upgrade.from, word.keeper_pid
    ));
    Ok(())
}
