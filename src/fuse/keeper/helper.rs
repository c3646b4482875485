//! The keeper's one helper process: whatever may have to wait for a server, or run a program that is not known to work.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use super::Keeper;
use crate::error::{Error, Result};
use crate::fuse::fusermount;
use crate::fuse::helpers;
use crate::fuse::link::{ToServer, WireError};
use crate::fuse::mount::How;
use crate::fuse::waiting::Waiting;

/// How long a helper that nobody waits for may take before it is killed.
const LIMIT: Duration = Duration::from_secs(10);

pub(super) enum Purpose {
    /// The disks of a new mount.
    Check(Vec<PathBuf>),
    Unmount(How),
    /// Of an upgrade: whether the new program runs. It writes its version here: into memory, not a pipe, which something that it
    /// leaves behind might keep open.
    Version(File),
    /// Of an upgrade: whether the new server answers.
    Prove,
}

pub(super) struct Helper {
    purpose: Purpose,
    child: Child,
    /// When it is killed.
    pub(super) deadline: Option<Instant>,
}

impl Helper {
    pub(super) fn start(purpose: Purpose, mut command: Command) -> std::io::Result<Helper> {
        let deadline = matches!(purpose, Purpose::Version(_) | Purpose::Prove).then(|| Instant::now() + LIMIT);
        Ok(Helper { purpose, child: command.spawn()?, deadline })
    }

    /// Without waiting for it: it may wait for a server.
    pub(super) fn abandon(mut self) {
        let _ = self.child.kill();
    }

    /// At the end of the keeper.
    pub(super) fn dismiss(mut self, at_once: bool) {
        if at_once || self.deadline.is_some() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Keeper<'_> {
    pub(super) fn start_check(&mut self, paths: Vec<PathBuf>) -> Result<()> {
        let command = helpers::check_command(&paths);
        let check = Helper::start(Purpose::Check(paths), command);
        self.helper = Some(check.map_err(|error| Error::io("cannot start the check of the new disks", &error))?);
        Ok(())
    }

    pub(super) fn start_unmount(&mut self, how: How) {
        let command = match (&self.kept, &self.helper) {
            (Some(kept), None) => kept.point.unmount_command(how),
            _ => Err(Error::not_now("the mount is busy with its own start, upgrade or end")),
        };
        let started = command.and_then(|command| {
            Helper::start(Purpose::Unmount(how), command).map_err(|error| fusermount::cannot_run(&error))
        });
        match started {
            Ok(helper) => self.helper = Some(helper),
            Err(error) => self.tell_server(&ToServer::Unmounted(Some(WireError::from(&error))), None),
        }
    }

    pub(super) fn reap_helper(&mut self) -> Result<()> {
        let Some(helper) = &mut self.helper else { return Ok(()) };
        if helper.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            helper.deadline = None;
            let _ = helper.child.kill();
        }
        if !matches!(helper.child.try_wait(), Ok(Some(_))) {
            return Ok(());
        }
        let Some(Helper { purpose, child, .. }) = self.helper.take() else { return Ok(()) };
        // It is dead: this reads what it wrote and does not wait.
        let output = child.wait_with_output().map_err(|error| Error::io("cannot wait for a helper process", &error))?;
        match purpose {
            Purpose::Check(paths) => return self.on_checked(paths, &output),
            Purpose::Unmount(how) => self.on_unmounted(how, &output),
            Purpose::Version(said) => self.on_version(&output, said),
            Purpose::Prove => self.on_proven(),
        }
        Ok(())
    }

    fn on_checked(&mut self, paths: Vec<PathBuf>, output: &Output) -> Result<()> {
        if output.status.success() {
            self.ready = true;
            std::mem::replace(&mut self.waiting, Waiting::Nobody).tell_ready(paths);
            self.say();
            return Ok(());
        }
        let errno = std::io::Error::from_raw_os_error(output.status.code().unwrap_or(libc::EIO));
        let path = paths.first().map(|path| path.display().to_string()).unwrap_or_default();
        Err(Error::io("the new disk does not answer:", &errno).on(path))
    }

    fn on_unmounted(&mut self, how: How, output: &Output) {
        let result = self.kept.as_ref().map_or(Ok(()), |kept| kept.point.unmount_result(output));
        self.aborted |= how == How::Abort && result.is_ok();
        let error = result.err().map(|error| WireError::from(&error));
        self.tell_server(&ToServer::Unmounted(error), None);
    }
}
