//! A server whose keeper has died makes itself a new one: this is the new one's beginning.
//!
//! ```text
//! server: starts internal-keeper adopt, sends Adopt (with the connection), Process, Flights, Park ... --> lock taken
//!         <------------------------------------------------------------------------------------- Adopted
//! ```
//!
//! From then on it is a keeper like any other, but for one thing: that server is not its child but its parent, so that it sees
//! when that ends, but not how.

use std::time::Instant;

use super::{Keeper, Kept};
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::link::{Adoption, Link, ToKeeper, ToServer};
use crate::fuse::mount::Point;
use crate::fuse::server_process::{Process, Server};
use crate::fuse::waiting::Waiting;
use crate::server::config::MountConfig;
use crate::state::keeper_file::KeeperFile;

/// The verb's argument.
pub(super) const WORD: &str = "adopt";

/// Verb `internal-keeper adopt`: the server's link is its standard input.
pub(super) fn main() -> Result<()> {
    let link = Link::from_stdin()?;
    let _ = nix::unistd::setsid();
    let unexpected = || Error::new(ErrorKind::Failed, "the server does not hand over what a keeper needs");
    let Some((ToKeeper::Adopt(adoption), Some(connection))) = link.receive()? else { return Err(unexpected()) };
    let Some((ToKeeper::Process, Some(process))) = link.receive()? else { return Err(unexpected()) };
    let Some((ToKeeper::Flights, flights)) = link.receive()? else { return Err(unexpected()) };
    let Adoption { config, negotiated, restarts, last_exit, parked, server_pid } = *adoption;
    // Where another keeper lives nothing is touched.
    let file = KeeperFile::claim(&MountConfig::mount_id(&config.mountpoint))?;
    let mut keeper = Keeper::new(config, Waiting::Nobody, None)?;
    keeper.file = file;
    keeper.flights = flights;
    for _ in 0..parked {
        match link.receive()? {
            Some((ToKeeper::Park { volume, role }, Some(descriptor))) => keeper.parked.push((volume, role, descriptor)),
            _ => return Err(unexpected()),
        }
    }
    let gone = || Error::new(ErrorKind::NotFound, "there is no mount any more at");
    let mountpoint = &keeper.config.mountpoint;
    let point = Point::find(mountpoint)?.ok_or_else(|| gone().on(mountpoint.display().to_string()))?;
    keeper.kept = Some(Kept { fd: connection, negotiated, point });
    (keeper.ready, keeper.restarts, keeper.last_exit) = (true, restarts, last_exit);
    link.send(&ToServer::Adopted, None)?;
    let process = Process { pid: server_pid, descriptor: process, is_child: false };
    keeper.server =
        Some(Server { answered: true, serving_since: Some(Instant::now()), ..Server::known(process, link) });
    keeper.say();
    let result = keeper.watch();
    keeper.leave(&result);
    result
}
