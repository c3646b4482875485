//! `livemirror status`: what a mount does, from its server, or from its state where the server is dead.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use super::follow;
use super::interrupt::Interrupt;
use super::output;
use super::place::{self, Found, Mount};
use super::progress::{self, Progress};
use super::units;
use crate::control::backend::{GuestTraffic, MountStatus, VolumeStatus};
use crate::dirty::intent::{JobId, marked_bytes};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::lingering;
use crate::mirror::types::{LastMirror, MirrorResult};
use crate::server::config::MountConfig;
use crate::state::keeper_file;
use crate::state::store::Store;
use crate::state::{MountState, VolumeState};

/// How long a server may take to answer before its state is looked at.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often `--watch` asks.
const EVERY: Duration = Duration::from_millis(200);

/// Shows the disks of a mount and their mirrors: how far, how fast, how long.
///
/// Without an argument, all mounts of this user. Where the server is dead, tells what its state says.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  livemirror status /mnt/vm
  livemirror status /mnt/vm --watch
  livemirror status /mnt/vm --json | jq '.volumes[0].mirror.ready'")]
pub struct Arguments {
    /// A mounted disk or a mountpoint.
    #[arg(value_name = "DISK|MOUNTPOINT")]
    disk: Option<PathBuf>,
    /// Prints one JSON object; an array of them without an argument.
    #[arg(long)]
    json: bool,
    /// Goes on until the mirrors have ended; fails if one failed. With --json, one object on each line.
    #[arg(long, requires = "disk")]
    watch: bool,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no such mount; with `--watch`: a mirror failed.
    pub fn run(self) -> Result<()> {
        let Some(path) = &self.disk else { return all(self.json) };
        let found = place::find(path)?;
        if self.watch {
            return watch(found, self.json);
        }
        let status = narrowed(&found, of(&found)?)?;
        if self.json {
            output::line(format_args!("{}", pretty(&status)?));
        } else {
            output::line(table(&status).trim_end());
        }
        Ok(())
    }
}

fn all(json: bool) -> Result<()> {
    let mut statuses = Vec::new();
    for found in place::all()? {
        match of(&found) {
            Ok(status) => statuses.push(status),
            Err(error) => eprintln!("livemirror: {error}"),
        }
    }
    if json {
        output::line(format_args!("{}", pretty(&statuses)?));
    } else {
        let tables: Vec<String> = statuses.iter().map(table).collect();
        output::line(tables.join("\n").trim_end());
    }
    Ok(())
}

/// What is known of a mount: from its server; where that is dead or hangs, from its state, which is said on standard error.
///
/// # Errors
/// Neither the server nor the state tells anything.
pub fn of(found: &Found) -> Result<MountStatus> {
    let asked = found.connect_within(PATIENCE).and_then(|client| Mount { found: found.clone(), client }.status());
    let error = match asked {
        Ok(status) => return Ok(status),
        Err(error) => error,
    };
    match from_state(found) {
        Ok(status) => {
            eprintln!("livemirror: {error}");
            eprintln!("  hint: {}", what_is_tried(&status));
            Ok(status)
        }
        Err(second) => {
            log::debug!("{second}");
            Err(error)
        }
    }
}

/// The record of a mount.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn recorded(found: &Found) -> Result<MountState> {
    store_and_state(found).map(|(_, state)| state)
}

fn store_and_state(found: &Found) -> Result<(Store, MountState)> {
    let record = found.record()?;
    let owner = found.entry.user_id.unwrap_or_else(|| nix::unistd::geteuid().as_raw());
    let nothing = || Error::new(ErrorKind::NotFound, "there is no state in").on(record.state_dir.display().to_string());
    let store = Store::open_existing(&record.state_dir, owner)?.ok_or_else(nothing)?;
    let state = store.load()?.ok_or_else(nothing)?;
    Ok((store, state))
}

/// What becomes of a mount whose server does not answer.
fn what_is_tried(status: &MountStatus) -> String {
    let killed = status.server_pid.and_then(|server| Some((server, lingering::look(server)?)));
    if let Some((server, left)) = killed {
        let next =
            if status.keeper_pid.is_some() { "the next server starts" } else { "`livemirror mount` can mount again" };
        return format!(
            "server {server} was killed, and {left}; what it was writing may land until then. {next} only after it: whoever uses \
             the disks waits"
        );
    }
    let why = status.last_exit.as_deref().map(|exit| format!(" (the last server {exit})")).unwrap_or_default();
    match (status.server_pid, status.keeper_pid) {
        (None, Some(keeper)) => format!(
            "no server runs{why}; whoever uses the disks waits, and keeper {keeper} starts one every few seconds: repair what is \
             in its way, or `livemirror upgrade`"
        ),
        (None, None) => "neither server nor keeper runs: `livemirror mount` mounts it anew".to_owned(),
        (Some(_), _) => "what follows is what its state says".to_owned(),
    }
}

/// What the state says of a mount; its server is not asked.
///
/// # Errors
/// There is no state, or it cannot be read.
pub fn from_state(found: &Found) -> Result<MountStatus> {
    let record = found.record()?;
    let (store, state) = store_and_state(found)?;
    let pulse = store.pulse().unwrap_or_default();
    let unfinished = |volume: &VolumeState| {
        let record = volume.mirror.as_ref()?;
        let counts = pulse.volumes.get(&volume.name).copied().unwrap_or_default();
        let log = std::fs::read(store.intent_log(&record.job)).unwrap_or_default();
        let marked =
            JobId::from_hex(&record.job).map_or(record.size_bytes, |job| marked_bytes(&log, &job, record.size_bytes));
        // No error of its own: that no server answers is said of the mount.
        Some(record.info(&counts, marked, None))
    };
    let file_mount = is_file_mount(found);
    // It outlives servers, and knows of those that died before they had written anything down.
    let id = MountConfig::mount_id(found.mountpoint());
    let keeper = keeper_file::word(&id, found.entry.user_id).filter(|word| super::unmount::is_alive(word.keeper_pid));
    let server_pid = keeper.as_ref().map_or(Some(record.server_pid), |word| word.server_pid);
    let server_pid = server_pid.filter(|pid| super::unmount::is_alive(*pid));
    let is_dead = server_pid != Some(record.server_pid);
    let volumes = state.volumes.into_iter().map(|mut volume| {
        if is_dead {
            volume.mirror_died();
        }
        volume
    });
    let volumes = volumes.map(|volume| VolumeStatus {
        mirror: unfinished(&volume),
        disk: if file_mount { found.mountpoint().to_owned() } else { found.mountpoint().join(&volume.name) }
            .display()
            .to_string(),
        name: volume.name,
        source: volume.source.display().to_string(),
        format: volume.format.to_string(),
        active: volume.active,
        size_bytes: volume.active_identity.size_bytes,
        guest: GuestTraffic::default(),
        last_mirror: volume.last_mirror,
    });
    Ok(MountStatus {
        mountpoint: found.mountpoint().display().to_string(),
        server_pid,
        keeper_pid: match &keeper {
            Some(word) => Some(word.keeper_pid),
            None => record.keeper_pid.filter(|pid| super::unmount::is_alive(*pid)),
        },
        control: record.control.display().to_string(),
        restarts: keeper.as_ref().map_or(state.restarts, |word| word.restarts),
        last_exit: keeper.map_or(state.last_exit, |word| word.last_exit),
        volumes: volumes.collect(),
    })
}

/// The status, of the one disk that was asked for.
fn narrowed(found: &Found, mut status: MountStatus) -> Result<MountStatus> {
    if found.disk_name.is_some() {
        let disk = found.disk(&status)?;
        status.volumes.retain(|volume| volume.name == disk.status.name);
    }
    Ok(status)
}

fn watch(found: Found, json: bool) -> Result<()> {
    let interrupt = Interrupt::watch()?;
    let mut client = found.connect()?;
    client.set_patience(Duration::from_secs(60));
    let mut mount = Mount { found, client };
    let mut progress = Progress::new();
    let mut before: Option<MountStatus> = None;
    loop {
        let whole = mount.status()?;
        let status = narrowed(&mount.found, whole)?;
        if json {
            let line =
                serde_json::to_string(&status).map_err(|error| Error::new(ErrorKind::Failed, error.to_string()))?;
            // Whoever reads this has gone: so do we.
            if writeln!(std::io::stdout(), "{line}").is_err() {
                return Ok(());
            }
        }
        for volume in &status.volumes {
            match &volume.mirror {
                Some(job) if !json => progress.show(volume, job),
                Some(_) => {}
                None => {
                    let had = before.as_ref().is_some_and(|before| {
                        before.volumes.iter().any(|other| other.name == volume.name && other.mirror.is_some())
                    });
                    if had && !json {
                        progress.say(&format!("{}: {}", volume.name, outcome(volume.last_mirror.as_ref())));
                    }
                    if had && volume.last_mirror.as_ref().is_some_and(|last| last.result == MirrorResult::Failed) {
                        progress.end();
                        let disk =
                            mount.found.disk(&MountStatus { volumes: vec![volume.clone()], ..status.clone() })?;
                        return Err(follow::ended_early(&disk, volume.last_mirror.as_ref()));
                    }
                }
            }
        }
        if status.volumes.iter().all(|volume| volume.mirror.is_none()) {
            progress.end();
            if before.is_none() && !json {
                output::line(table(&status).trim_end());
            }
            return Ok(());
        }
        if interrupt.came() {
            return Ok(());
        }
        before = Some(status);
        std::thread::sleep(if json { Duration::from_secs(1) } else { EVERY });
    }
}

fn pretty(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Error::new(ErrorKind::Failed, error.to_string()))
}

fn outcome(last: Option<&LastMirror>) -> String {
    let Some(last) = last else { return "no mirror".to_owned() };
    let pause = last.pause_ms.map(|pause| format!(", writes waited {pause:.1} ms")).unwrap_or_default();
    let error = last.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
    match last.result {
        MirrorResult::Completed => format!("cut over to {}{pause}", last.target),
        MirrorResult::Finished if last.consistent => format!("{} is a consistent copy", last.target),
        MirrorResult::Finished => format!("{} has what was written since its mirror began", last.target),
        MirrorResult::Cancelled => format!("mirror to {} cancelled", last.target),
        MirrorResult::Failed => format!("mirror to {} failed{error}", last.target),
    }
}

fn table(status: &MountStatus) -> String {
    let mut lines = Vec::new();
    let server = match status.server_pid {
        Some(pid) => format!("server {pid}"),
        None => "no server".to_owned(),
    };
    let keeper = status.keeper_pid.map(|pid| format!(", keeper {pid}")).unwrap_or_default();
    let restarts = if status.restarts > 0 { format!(", restarted {} times", status.restarts) } else { String::new() };
    lines.push(format!("{}  ({server}{keeper}{restarts})", status.mountpoint));
    if let Some(exit) = &status.last_exit {
        lines.push(format!("  last server    {exit}"));
    }
    for volume in &status.volumes {
        lines.push(format!("  {}  {}", volume.disk, units::size(volume.size_bytes)));
        lines.push(format!("    on           {} ({})", volume.active, volume.format));
        if volume.active != volume.source {
            lines.push(format!("    mounted from {}", volume.source));
        }
        let guest = volume.guest;
        lines.push(format!(
            "    guest        {} read, {} written",
            units::size(guest.read_bytes),
            units::size(guest.written_bytes)
        ));
        if let Some(job) = &volume.mirror {
            lines.push(format!("    mirror       to {}", job.target));
            lines.push(format!("                 {}", progress::describe(job)));
            lines.push(format!(
                "                 allocated: source {}, target {}",
                units::size(job.source_allocated_bytes),
                units::size(job.target_allocated_bytes)
            ));
            if job.shared_bytes > 0 {
                lines.push(format!(
                    "                 shares {} with the source: no second copy (see --no-reflink)",
                    units::size(job.shared_bytes)
                ));
            }
            if let Some(error) = &job.last_error {
                lines.push(format!("                 last error: {error}"));
            }
        }
        if let Some(last) = &volume.last_mirror {
            lines.push(format!("    last mirror  {} ({})", outcome(Some(last)), last.ended));
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// True if the mount's root is the disk itself. Told by the directory entry that the mount lies over: the root itself is not to
/// be looked at.
fn is_file_mount(found: &Found) -> bool {
    use std::os::unix::ffi::OsStrExt;

    use nix::dir::{Dir, Type};
    use nix::fcntl::OFlag;
    use nix::sys::stat::Mode;

    let (Some(parent), Some(name)) = (found.mountpoint().parent(), found.mountpoint().file_name()) else {
        return false;
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut directory) = Dir::open(parent, flags, Mode::empty()) else { return false };
    let is_it = |entry: &nix::dir::Entry| entry.file_name().to_bytes() == name.as_bytes();
    directory.iter().flatten().find(is_it).is_some_and(|entry| entry.file_type() == Some(Type::File))
}
