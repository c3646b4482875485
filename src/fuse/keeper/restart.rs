//! A keeper that finds itself started with what one before it has left with the service manager (sd_listen_fds(3)): it goes on with
//! that mount.
//!
//! ```text
//! table, connection alive: the same keeper, in another process. A server of the last one that still runs is ended, and is
//!                          waited for like any other: only then is there the next one (rule 14)
//! connection ended:        all is let go; whoever called mounts anew
//! no table, and alive:     nothing is touched, an error: guests wait for somebody who understands it
//! ```

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;

use super::manager::{Manager, has_store};
use super::service::{Service, command_line};
use super::store::{self, Store, TABLE, key_of};
use super::table::{self, Table};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::session::connection_ended;
use crate::state::keeper_file::KeeperFile;
use crate::sys::descriptor::take_inherited;

/// The number of the first descriptor that a service manager hands over.
const FIRST: RawFd = 3;

/// What was found in the store: a mount that lives.
pub struct Left {
    manager: Manager,
    table: Table,
    memory: OwnedFd,
    names: BTreeMap<RawFd, String>,
    descriptors: BTreeMap<RawFd, OwnedFd>,
}

/// Takes what the service manager hands over. Before anything else is opened. `None`: there is no mount that lives.
///
/// # Errors
/// There is one, but it is not told which.
pub fn find() -> Result<Option<Left>> {
    let Some(manager) = Manager::from_environment().filter(|_| has_store()) else { return Ok(None) };
    let handed = inherited();
    let mut memory = None;
    let (mut names, mut descriptors) = (BTreeMap::new(), BTreeMap::new());
    let mut connections = Vec::new();
    for (name, descriptor) in handed {
        match key_of(&name) {
            _ if name == TABLE => memory = Some(descriptor),
            Some(key) => {
                if name.contains("-connection-") {
                    connections.push(key);
                }
                names.insert(key, name);
                descriptors.insert(key, descriptor);
            }
            None => log::warn!("the service manager hands over '{name}', which is none of ours: it is not used"),
        }
    }
    if names.is_empty() && memory.is_none() {
        return Ok(None);
    }
    let table = memory.as_ref().and_then(store::read).map(|text| table::parse(&text));
    let lives = |key: &RawFd| descriptors.get(key).is_some_and(|connection| !connection_ended(connection));
    let unknown = |why: String| {
        Error::new(ErrorKind::Corrupt, format!("the service manager keeps a mount that cannot be gone on with: {why}"))
            .advise(
                "the program that made it may be able to; stopping the service, then starting it, gives that mount up",
            )
    };
    match (table, memory) {
        (Some(Ok(mut table)), Some(memory)) if lives(&table.connection) => {
            if !table.leave_out(|key| descriptors.contains_key(&key)) {
                return Err(unknown("the descriptor of the mountpoint's directory is missing".to_owned()));
            }
            Ok(Some(Left { manager, table, memory, names, descriptors }))
        }
        (Some(Err(error)), _) if connections.iter().any(lives) => Err(unknown(error.to_string())),
        (None, _) if connections.iter().any(lives) => Err(unknown("its table is missing or damaged".to_owned())),
        (_, memory) => {
            log::warn!("the mount that the service manager kept has ended");
            drop((descriptors, memory));
            for name in names.values().map(String::as_str).chain([TABLE]) {
                manager.forget(name);
            }
            // What it holds locks the images.
            manager.settle();
            Ok(None)
        }
    }
}

/// The descriptors that this very process was started with, each with its name.
fn inherited() -> Vec<(String, OwnedFd)> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.trim().parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    let numbers = (FIRST..).take(number("LISTEN_FDS").unwrap_or(0) as usize);
    numbers.zip(names).filter_map(|(number, name)| Some((name, take_inherited(number).ok()?))).collect()
}

impl Left {
    /// Becomes the keeper of that mount, in this process. Returns when it has ended, or was left for the next one.
    ///
    /// # Errors
    /// Whatever made it end.
    pub fn go_on(self) -> Result<()> {
        let Left { manager, mut table, memory, names, mut descriptors } = self;
        let words = command_line();
        let before = table.service.replace(words.clone()).unwrap_or_default();
        // Its own is made below.
        table.service = None;
        let mut keys = BTreeMap::new();
        let mut keeper = table::resume(table, &mut |key| {
            let missing = || Error::new(ErrorKind::Corrupt, "the service manager has lost a descriptor of the mount");
            let descriptor = descriptors.remove(&key).ok_or_else(missing)?;
            keys.insert(descriptor.as_raw_fd(), key);
            Ok(descriptor)
        })?;
        drop(descriptors);
        if before != words {
            let point = keeper.config.mountpoint.display();
            log::warn!("{point} stays as it was mounted, by `livemirror {}`:", before.join(" "));
            log::warn!("the new command line counts once the service was stopped and started again");
        }
        // Of this start, not of the one before.
        keeper.program = super::own_file();
        if keeper.file.is_none() {
            keeper.file = KeeperFile::claim(&crate::server::config::MountConfig::mount_id(&keeper.config.mountpoint))?;
        }
        let store = keeper.table(None).map(|(_, items)| Store::taken(memory, &names, &items, &keys, &manager));
        let service = Service::of(manager, store, words, false);
        service.take_time();
        keeper.service = Some(service);
        match &keeper.server {
            Some(server) => server.process.signal(Signal::SIGKILL),
            None => keeper.restart_at = Some(std::time::Instant::now()),
        }
        log::info!("going on with {}", keeper.config.mountpoint.display());
        keeper.say();
        keeper.go_on()
    }
}
