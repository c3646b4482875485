//! A server without keeper, kernel and control socket: for the simulation, which is all three. What it does is what `run` does.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use super::backend::Server;
use super::config::MountConfig;
use super::departure::Departure;
use super::parking::parking_name;
use super::run::{self, Prepared};
use crate::control::backend::Backend;
use crate::error::Result;
use crate::fuse::{KeeperLink, Start};
use crate::image::DescriptorRole;
use crate::sync::Arc;
use crate::volume::Volume;

/// A server from its start to whatever ends it.
pub(crate) struct Life(Arc<Server>);

impl Life {
    /// Opens everything, writes the record and sees to it that guests' changes are marked: guests may come when it returns. `parked`:
    /// the images that a keeper has kept locked; `first`: there is no keeper that has any.
    ///
    /// # Errors
    /// As for a mount.
    pub(crate) fn start(config: &MountConfig, first: bool, parked: Vec<(String, OwnedFd)>) -> Result<Life> {
        let link = link();
        let parked = parked.into_iter().map(|(image, fd)| (parking_name(&image), DescriptorRole::Locked, fd));
        let start = Start {
            config: config.clone(),
            parked: parked.collect(),
            restarts: 0,
            last_exit: None,
            first,
            keeper_pid: 1,
            kept_by_manager: false,
        };
        let Prepared { ledger, opened, taken_over, .. } = run::prepare(&link, start)?;
        let (mut targets, mut volumes) = (Vec::new(), Vec::new());
        for mut one in opened {
            targets.push(one.parked_target.take());
            volumes.push(run::volume(config, one));
        }
        let server = Server::new(config.clone(), volumes, ledger, Departure::new(link));
        server.find_unfinished(targets, first);
        taken_over.forget_elsewhere(&server.ledger, &server.volumes);
        Ok(Life(server))
    }

    /// What comes once the disks are served: marks, and the mirrors that were left unfinished.
    ///
    /// # Errors
    /// There can be no thread.
    pub(crate) fn go_on(&self) -> Result<()> {
        for volume in &self.0.volumes {
            self.0.ledger.renew_mark(volume);
            self.0.ledger.renew_former_mark(volume);
        }
        self.0.go_on()
    }

    pub(crate) fn volumes(&self) -> &[Arc<Volume>] {
        &self.0.volumes
    }

    /// What the control socket asks.
    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.0
    }

    /// The end of a mount that nobody uses any more.
    pub(crate) fn leave(&self) {
        self.0.heartbeat.end();
        self.0.flush_all();
        self.0.suspend_jobs();
    }
}

/// A link to nobody, one for the whole process: a life that is cut off gives nothing back.
fn link() -> Arc<KeeperLink> {
    static LINK: OnceLock<Arc<KeeperLink>> = OnceLock::new();
    LINK.get_or_init(|| Arc::new(KeeperLink::for_tests().expect("a socket").0)).clone()
}
