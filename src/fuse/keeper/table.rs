//! A keeper replaces itself by another program (execve), and stays the same process: what it keeps stays open, and a table of it,
//! in memory that both see, says which descriptor is what.
//!
//! ```text
//! old program: table written, descriptors kept over the exec --> internal-keeper resume TABLE PREVIOUS
//! new program: reads the table, goes on                     or: cannot --> PREVIOUS internal-keeper resume TABLE
//! ```
//!
//! The signals stay blocked over the exec, so none is lost; children stay children.
//!
//! A service manager's store (`store`) holds the same table for a keeper that is started anew: with keys in the place of numbers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::service::Service;
use super::store::{Entry, Item, Store};
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
pub(super) struct Table {
    format: u32,
    pub(super) config: MountConfig,
    program: PathBuf,
    negotiated: Negotiated,
    pub(super) connection: RawFd,
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
    /// It was started by a service manager, with this command line.
    #[serde(default)]
    pub(super) service: Option<Vec<String>>,
    /// The memory of the manager's table, what the manager keeps, and the next key.
    #[serde(default)]
    store: Option<(RawFd, Vec<Entry>, RawFd)>,
}

#[derive(Serialize, Deserialize)]
struct TableServer {
    pid: u32,
    process: RawFd,
    is_child: bool,
    /// `None`: its other end is closed.
    link: Option<RawFd>,
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
            let mut keeper = resume(table, &mut |number| {
                take_inherited(number).map_err(|error| Error::io("cannot go on as a keeper", &error))
            })?;
            keeper.go_on()
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
    parse(&text)
}

/// # Errors
/// It is not one that this program understands.
pub(super) fn parse(text: &[u8]) -> Result<Table> {
    let failed = |error: std::io::Error| Error::io("cannot read what the keeper before kept", &error);
    let table: Table = serde_json::from_slice(text).map_err(|error| failed(error.into()))?;
    if table.format != FORMAT {
        let text = format!("the keeper before left a table of format {}, and this is {FORMAT}", table.format);
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    Ok(table)
}

/// The keeper that `table` describes; `take` gives what stands behind a number in it.
pub(super) fn resume(table: Table, take: &mut dyn FnMut(RawFd) -> Result<OwnedFd>) -> Result<Keeper<'static>> {
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
        let link = match server.link {
            Some(number) => Link::from_descriptor(take(number)?),
            None => Link::pair()?.0,
        };
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
    keeper.flights = table.flights.map(&mut *take).transpose()?;
    if let Some((path, number)) = table.file {
        keeper.file = KeeperFile::inherited(path, take(number)?);
    }
    (keeper.ready, keeper.restarts, keeper.last_exit) = (true, table.restarts, table.last_exit);
    if let Some(words) = table.service {
        let store = match table.store {
            Some((memory, entries, next)) => Some(Store::known(take(memory)?, entries, next)),
            None => None,
        };
        keeper.service = Service::again(words, store);
    }
    if let Some(upgrade) = table.upgrade {
        keeper.end_upgrade(upgrade);
    }
    Ok(keeper)
}

impl Table {
    /// The table for a store that has `keys` in the place of these numbers. What has none is not in the store.
    pub(super) fn with_keys(mut self, keys: &BTreeMap<RawFd, RawFd>) -> Table {
        let key = |number: RawFd| keys.get(&number).copied();
        self.connection = key(self.connection).unwrap_or(-1);
        self.point.0 = key(self.point.0).unwrap_or(-1);
        self.parked.retain_mut(|(_, _, number)| key(*number).map(|key| *number = key).is_some());
        self.flights = self.flights.and_then(key);
        self.file = self.file.and_then(|(path, number)| Some((path, key(number)?)));
        self.server = self.server.and_then(|server| {
            // Whoever takes this over is not its parent, and cannot talk to it.
            Some(TableServer {
                process: key(server.process)?,
                is_child: false,
                link: None,
                silent: true,
                pid: server.pid,
            })
        });
        self.store = None;
        self
    }

    /// Leaves out what the store has lost, as far as a keeper can do without. False: it cannot.
    pub(super) fn leave_out(&mut self, is_there: impl Fn(RawFd) -> bool) -> bool {
        self.parked.retain(|(_, _, key)| is_there(*key));
        self.flights = self.flights.filter(|key| is_there(*key));
        self.file = self.file.take().filter(|(_, key)| is_there(*key));
        self.server = self.server.take().filter(|server| is_there(server.process));
        is_there(self.connection) && is_there(self.point.0)
    }
}

impl Keeper<'_> {
    /// Keeps the mount until it ends.
    pub(super) fn go_on(&mut self) -> Result<()> {
        let result = self.watch();
        self.leave(&result);
        result
    }

    /// Replaces this program by the one whose server has just been tried; `upgrade` is what will be reported then. Returns why
    /// that cannot be.
    pub(super) fn replace_program(&mut self, upgrade: &Upgrade) -> Error {
        let failed = |error: std::io::Error| Error::io("cannot replace the keeper's program", &error);
        let this = match File::open(THIS_PROGRAM) {
            Ok(this) => this,
            Err(error) => return failed(error),
        };
        let Some((table, items)) = self.table(Some(upgrade)) else { return Error::not_now("nothing is mounted") };
        let mut kept: Vec<_> = items.iter().map(|item| item.descriptor).collect();
        kept.extend(self.server.as_ref().map(|server| server.link.as_fd()));
        let store = self.service.as_ref().and_then(|service| service.store.as_ref());
        kept.extend(store.map(|store| store.parts().0.as_fd()));
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

    /// What is kept, as numbers and as descriptors; the latter without the link to the server.
    pub(super) fn table(&self, upgrade: Option<&Upgrade>) -> Option<(Table, Vec<Item<'_>>)> {
        let kept = self.kept.as_ref()?;
        let (parent, name) = kept.point.parts();
        let mut items = vec![Item::new("connection", "", kept.fd.as_fd()), Item::new("directory", "", parent.as_fd())];
        let parked = self.parked.iter();
        items.extend(
            parked.map(|(volume, role, descriptor)| {
                Item::new("image", &format!("{role:?} {volume}"), descriptor.as_fd())
            }),
        );
        items.extend(
            self.server
                .as_ref()
                .map(|server| Item::new("server", &server.process.pid.to_string(), server.process.descriptor.as_fd())),
        );
        items.extend(self.flights.as_ref().map(|page| Item::new("requests", "", page.as_fd())));
        items.extend(self.file.as_ref().map(|file| Item::new("lock", "", file.lock().as_fd())));
        let server = self.server.as_ref().map(|server| TableServer {
            pid: server.process.pid,
            process: server.process.descriptor.as_raw_fd(),
            is_child: server.process.is_child,
            link: Some(server.link.as_fd().as_raw_fd()),
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
            upgrade: upgrade.cloned(),
            service: self.service.as_ref().map(|service| service.words.clone()),
            store: self.service.as_ref().and_then(|service| service.store.as_ref()).map(|store| {
                let (memory, entries, next) = store.parts();
                (memory.as_raw_fd(), entries.to_vec(), next)
            }),
        };
        Some((table, items))
    }
}
