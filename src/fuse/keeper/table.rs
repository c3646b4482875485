//! A keeper replaces itself by another program (execve), and stays the same process: what it keeps stays open, and a table of it,
//! in memory that both see, says which descriptor is what.
//!
//! ```text
//! old program: table written, descriptors kept over the exec --> internal-keeper resume TABLE PREVIOUS
//! new program: reads the table, goes on                     or: cannot --> PREVIOUS internal-keeper resume TABLE
//! ```
//!
//! The signals stay blocked over the exec, so none is lost; children stay children.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::{Keeper, Kept, THIS_PROGRAM};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::VERB_KEEPER;
use crate::fuse::init::Negotiated;
use crate::fuse::link::Link;
use crate::fuse::mount::Point;
use crate::fuse::mountinfo::MountEntry;
use crate::fuse::server_process::{Process, Server};
use crate::fuse::waiting::Waiting;
use crate::image::DescriptorRole;
use crate::server::config::MountConfig;
use crate::state::keeper_file::{KeeperFile, Upgrade};
use crate::sys::descriptor::{keep_over_exec, take_inherited};

/// The verb's argument; the numbers of the table's descriptor and of the program before follow.
pub(super) const WORD: &str = "resume";
/// Of the table. What is added later has a default.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Table {
    format: u32,
    config: MountConfig,
    program: PathBuf,
    negotiated: Negotiated,
    connection: RawFd,
    point: (RawFd, OsString, MountEntry),
    parked: Vec<(String, DescriptorRole, RawFd)>,
    server: Option<TableServer>,
    #[serde(default)]
    flights: Option<RawFd>,
    file: Option<(PathBuf, RawFd)>,
    restarts: u64,
    last_exit: Option<String>,
    /// What the upgrade will have been if this program can go on.
    upgrade: Option<Upgrade>,
}

#[derive(Serialize, Deserialize)]
struct TableServer {
    pid: u32,
    process: RawFd,
    is_child: bool,
    link: RawFd,
    silent: bool,
}

/// Verb `internal-keeper resume`.
pub(super) fn main(numbers: &[&str]) -> Result<()> {
    let numbers: Vec<RawFd> = numbers.iter().filter_map(|number| number.parse().ok()).collect();
    let inherited = |at: usize| {
        let number = numbers.get(at).copied().unwrap_or(-1);
        take_inherited(number).map_err(|error| Error::io("cannot go on as a keeper", &error))
    };
    let memory = inherited(0)?;
    let previous = inherited(1);
    match (read(&memory), previous) {
        (Ok(mut table), previous) => {
            if let (Err(_), Some(upgrade)) = (previous, &mut table.upgrade) {
                upgrade.error = Some("the new server serves, but the new program could not become the keeper".into());
            }
            resume(table)
        }
        (Err(error), Ok(previous)) => {
            log::error!("{error}: the keeper stays what it was");
            let _ = keep_over_exec(&memory, true);
            let program = PathBuf::from(format!("/proc/self/fd/{}", previous.as_raw_fd()));
            let failed = resuming(&program, &[memory.as_raw_fd()]).exec();
            Err(Error::io("cannot go back to the program before", &failed))
        }
        (Err(error), Err(_)) => Err(error),
    }
}

fn resuming(program: &Path, numbers: &[RawFd]) -> Command {
    let mut command = Command::new(program);
    command.arg0("livemirror").arg(VERB_KEEPER).arg(WORD).args(numbers.iter().map(RawFd::to_string));
    command
}

fn read(memory: &OwnedFd) -> Result<Table> {
    let failed = |error: std::io::Error| Error::io("cannot read what the keeper before kept", &error);
    let mut file = File::from(memory.try_clone().map_err(failed)?);
    let mut text = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut text)).map_err(failed)?;
    let table: Table = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
    if table.format != FORMAT {
        let text = format!("the keeper before left a table of format {}, and this is {FORMAT}", table.format);
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(table)
}

fn resume(table: Table) -> Result<()> {
    let take = |number| take_inherited(number).map_err(|error| Error::io("cannot go on as a keeper", &error));
    let mut keeper = Keeper::new(table.config, Waiting::Nobody, Some(table.program))?;
    for (volume, role, number) in table.parked {
        keeper.parked.push((volume, role, take(number)?));
    }
    let (parent, name, entry) = table.point;
    keeper.kept = Some(Kept {
        fd: take(table.connection)?,
        negotiated: table.negotiated,
        point: Point::from_parts(take(parent)?, name, entry),
    });
    if let Some(server) = table.server {
        let process = Process { pid: server.pid, descriptor: take(server.process)?, is_child: server.is_child };
        let link = Link::from_descriptor(take(server.link)?);
        // Only one that had answered was ever handed on.
        let proven = Server {
            silent: server.silent,
            answered: true,
            serving_since: Some(Instant::now()),
            ..Server::known(process, link)
        };
        keeper.server = Some(proven);
    }
    // A keeper without it had none for a reason.
    keeper.flights = table.flights.map(take).transpose()?;
    if let Some((path, number)) = table.file {
        keeper.file = KeeperFile::inherited(path, take(number)?);
    }
    (keeper.ready, keeper.restarts, keeper.last_exit) = (true, table.restarts, table.last_exit);
    if let Some(upgrade) = table.upgrade {
        keeper.end_upgrade(upgrade);
    }
    let result = keeper.watch();
    keeper.leave(&result);
    result
}

impl Keeper<'_> {
    /// Replaces this program by the one whose server has just been tried; `upgrade` is what will be reported then. Returns why
    /// that cannot be.
    pub(super) fn replace_program(&mut self, upgrade: &Upgrade) -> Error {
        let failed = |error: std::io::Error| Error::io("cannot replace the keeper's program", &error);
        let this = match File::open(THIS_PROGRAM) {
            Ok(this) => this,
            Err(error) => return failed(error),
        };
        let Some((table, mut kept)) = self.table(upgrade) else { return Error::not_now("nothing is mounted") };
        let memory = memfd_create("keeper", MFdFlags::MFD_CLOEXEC).map_err(std::io::Error::from).map(File::from);
        let written = memory.and_then(|mut memory| {
            memory.write_all(&serde_json::to_vec(&table)?)?;
            Ok(memory)
        });
        let memory = match written {
            Ok(memory) => memory,
            Err(error) => return failed(error),
        };
        kept.extend([memory.as_fd(), this.as_fd()]);
        let all = kept.iter().try_for_each(|descriptor| keep_over_exec(descriptor, true));
        let error = match all {
            Ok(()) => resuming(&self.program, &[memory.as_raw_fd(), this.as_raw_fd()]).exec(),
            Err(error) => error,
        };
        for descriptor in &kept {
            let _ = keep_over_exec(descriptor, false);
        }
        failed(error)
    }

    /// What is kept, as numbers and as descriptors.
    fn table(&self, upgrade: &Upgrade) -> Option<(Table, Vec<BorrowedFd<'_>>)> {
        let kept = self.kept.as_ref()?;
        let (parent, name) = kept.point.parts();
        let mut descriptors = vec![kept.fd.as_fd(), parent.as_fd()];
        descriptors.extend(self.parked.iter().map(|(_, _, descriptor)| descriptor.as_fd()));
        if let Some(server) = &self.server {
            descriptors.extend([server.process.descriptor.as_fd(), server.link.as_fd()]);
        }
        descriptors.extend(self.flights.as_ref().map(AsFd::as_fd));
        descriptors.extend(self.file.as_ref().map(|file| file.lock().as_fd()));
        let server = self.server.as_ref().map(|server| TableServer {
            pid: server.process.pid,
            process: server.process.descriptor.as_raw_fd(),
            is_child: server.process.is_child,
            link: server.link.as_fd().as_raw_fd(),
            silent: server.silent,
        });
        let parked =
            self.parked.iter().map(|(volume, role, descriptor)| (volume.clone(), *role, descriptor.as_raw_fd()));
        let table = Table {
            format: FORMAT,
            config: self.config.clone(),
            program: self.program.clone(),
            negotiated: kept.negotiated,
            connection: kept.fd.as_raw_fd(),
            point: (parent.as_raw_fd(), name.to_owned(), kept.point.entry.clone()),
            parked: parked.collect(),
            server,
            flights: self.flights.as_ref().map(AsRawFd::as_raw_fd),
            file: self.file.as_ref().map(|file| (file.path().to_owned(), file.lock().as_raw_fd())),
            restarts: self.restarts,
            last_exit: self.last_exit.clone(),
            upgrade: Some(upgrade.clone()),
        };
        Some((table, descriptors))
    }
}
