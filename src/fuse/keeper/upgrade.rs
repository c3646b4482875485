//! The upgrade: the program that is on disk now takes the place of the one that runs, under a live mount.
//!
//! ```text
//! asking:   does the new program run at all?          no: nothing was touched
//! ending:   the server is killed and reaped
//! trying:   a server of the new program               dies, or does not come up in time: going back
//! proving:  it answers a request of ours              dies: going back
//! then this process becomes the new program, too (`table`), and the server stays
//!
//! going back: a server of this program, the last good one: /proc/self/exe, whatever has become of its file
//! ```

use std::fs::File;
use std::io::Read;
use std::io::Seek;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

use super::helper::{Helper, Purpose};
use super::{Keeper, VERSION};
use crate::error::{Error, Result};
use crate::fuse::helpers;
use crate::state::keeper_file::Upgrade;

/// How long a new server may take until it serves: longer than it waits for locks of the one before.
const SERVES_WITHIN: Duration = Duration::from_secs(30);
/// No version is longer.
const VERSION_BYTES_MAX: u64 = 100;

pub(super) struct Upgrading {
    stage: Stage,
    report: Upgrade,
    /// When the server before was ended.
    ended: Option<Instant>,
}

enum Stage {
    Asking,
    Ending,
    Trying { until: Instant },
    Proving,
    GoingBack,
}

impl Upgrading {
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Trying { until } => Some(until),
            _ => None,
        }
    }
}

impl Keeper<'_> {
    pub(super) fn start_upgrade(&mut self) {
        if !self.ready || self.aborted || self.upgrading.is_some() {
            return;
        }
        let number = self.upgrade.as_ref().map_or(0, |upgrade| upgrade.number) + 1;
        let report = Upgrade { number, from: VERSION.into(), ..Upgrade::default() };
        self.upgrading = Some(Upgrading { stage: Stage::Asking, report, ended: None });
        if let Err(error) = self.ask_version() {
            self.give_up(&error.to_string());
        }
    }

    fn ask_version(&mut self) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("cannot run", &error).on(self.program.display().to_string());
        if self.helper.is_some() {
            return Err(Error::not_now("the mount is about to end"));
        }
        if self.kept.as_ref().is_none_or(|kept| !kept.negotiated.has_resend()) {
            return Err(Error::not_now("this kernel (before 6.9) cannot hand requests to another server"));
        }
        let said: File = memfd_create("version", MFdFlags::MFD_CLOEXEC).map_err(|errno| failed(errno.into()))?.into();
        let command = helpers::version_command(&self.program, said.try_clone().map_err(failed)?);
        self.helper = Some(Helper::start(Purpose::Version(said), command).map_err(failed)?);
        Ok(())
    }

    /// The new program was asked for its version.
    pub(super) fn on_version(&mut self, output: &Output, mut said: File) {
        let mut version = String::new();
        let read = said.rewind().and_then(|()| said.take(VERSION_BYTES_MAX).read_to_string(&mut version));
        let version = version.trim();
        let Some(upgrading) = &mut self.upgrading else { return };
        if !output.status.success() || read.is_err() || version.is_empty() {
            let program = self.program.display();
            return self.give_up(&format!("{program} does not run: {} when asked for its version", output.status));
        }
        log::info!("upgrade from {VERSION} to {version}");
        upgrading.report.to = Some(version.to_owned());
        upgrading.ended = Some(Instant::now());
        upgrading.stage = Stage::Ending;
        match &self.server {
            // Its requests go to the next one.
            Some(server) => server.process.signal(Signal::SIGKILL),
            None => self.try_new_server(),
        }
    }

    /// The server has ended. False: that is not the upgrade's business.
    pub(super) fn goes_on_with_upgrade(&mut self, exit: &str) -> bool {
        let Some(upgrading) = &self.upgrading else { return false };
        match upgrading.stage {
            Stage::Asking => return false,
            Stage::Ending => {
                self.last_exit = Some("was ended for an upgrade".into());
                self.try_new_server();
            }
            Stage::Trying { .. } | Stage::Proving => self.go_back(&format!("the new server {exit}")),
            Stage::GoingBack => {
                self.finish_upgrade();
                return false;
            }
        }
        true
    }

    fn try_new_server(&mut self) {
        let until = Instant::now() + SERVES_WITHIN;
        if let Some(upgrading) = &mut self.upgrading {
            upgrading.stage = Stage::Trying { until };
        }
        self.restart_at = None;
        let program = self.program.clone();
        if let Err(error) = self.start_server_of(&program) {
            self.go_back(&error.to_string());
        }
    }

    fn go_back(&mut self, why: &str) {
        log::error!("{why}: going back to {VERSION}");
        self.last_exit = Some(why.to_owned());
        if let Some(upgrading) = &mut self.upgrading {
            upgrading.stage = Stage::GoingBack;
            upgrading.report.error = Some(why.to_owned());
        }
        self.restart_at = Some(Instant::now());
    }

    /// Ends a new server that takes too long.
    pub(super) fn see_to_upgrade(&mut self) {
        let late = self.upgrading.as_ref().and_then(Upgrading::deadline).is_some_and(|until| until <= Instant::now());
        if let (true, Some(server), Some(upgrading)) = (late, &self.server, &mut self.upgrading) {
            log::error!("the new server does not serve within {SERVES_WITHIN:?}");
            upgrading.stage = Stage::Proving;
            server.process.signal(Signal::SIGKILL);
        }
    }

    pub(super) fn on_serving_in_upgrade(&mut self, paths: &[PathBuf]) {
        let Some(upgrading) = &mut self.upgrading else { return };
        if upgrading.report.pause_ms.is_none() {
            let pause = upgrading.ended.map(|ended| ended.elapsed().as_millis());
            upgrading.report.pause_ms = pause.and_then(|pause| u64::try_from(pause).ok());
        }
        match upgrading.stage {
            Stage::GoingBack => self.finish_upgrade(),
            Stage::Trying { .. } => {
                upgrading.stage = Stage::Proving;
                let started = match self.helper {
                    None => Helper::start(Purpose::Prove, helpers::check_command(paths)).map(Some),
                    // The mount is being ended: whether it answers does not matter any more.
                    Some(_) => Ok(None),
                };
                match started {
                    Ok(Some(helper)) => self.helper = Some(helper),
                    Ok(None) => self.finish_upgrade(),
                    Err(error) => {
                        log::warn!("{}", Error::io("cannot start the check of the new server", &error));
                        self.become_new();
                    }
                }
            }
            _ => {}
        }
    }

    /// The new server was asked something. If it has died of it, that shows next; if it hangs on an image, so would any.
    pub(super) fn on_proven(&mut self) {
        let lives =
            !self.leaving && self.server.as_ref().is_some_and(|server| matches!(server.process.try_reap(), Ok(None)));
        if lives && self.upgrading.as_ref().is_some_and(|upgrading| matches!(upgrading.stage, Stage::Proving)) {
            self.become_new();
        }
    }

    /// Lets the new program take this one's place. Returns if it cannot be.
    fn become_new(&mut self) {
        let Some(upgrading) = self.upgrading.take() else { return };
        let mut report = upgrading.report;
        let error = self.replace_program(&report);
        report.error = Some(format!("the new server serves, but the keeper stays what it was: {error}"));
        self.end_upgrade(report);
    }

    fn give_up(&mut self, why: &str) {
        if let Some(upgrading) = &mut self.upgrading {
            upgrading.report.error = Some(why.to_owned());
        }
        self.finish_upgrade();
    }

    fn finish_upgrade(&mut self) {
        if let Some(upgrading) = self.upgrading.take() {
            self.end_upgrade(upgrading.report);
        }
    }

    /// Reports it.
    pub(super) fn end_upgrade(&mut self, report: Upgrade) {
        match (&report.error, &report.to) {
            (Some(error), _) => log::error!("upgrade failed: {error}"),
            (None, to) => log::warn!("upgraded from {} to {}", report.from, to.as_deref().unwrap_or("?")),
        }
        self.upgrade = Some(report);
        self.say();
    }
}
