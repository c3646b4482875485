//! The server's life: open, mount, serve, leave.
//!
//! ```text
//! start message ──> open and lock the images ──> record ──> park ──> connection ──> control socket ──> session ──> serving
//!                                                                                          leave <── unmounted
//! ```
//!
//! Every server starts this way; the first one finds nothing parked and has the keeper mount. What fails before the mount
//! leaves nothing behind.

use std::os::fd::{BorrowedFd, OwnedFd};

use signal_hook::consts::{SIGINT, SIGTERM};

use super::backend::Server;
use super::config::MountConfig;
use super::departure::Departure;
use super::elsewhere::{TakenOver, take_over};
use super::ledger::Ledger;
use super::opening::{OpenedVolume, open_again, open_first};
use super::pairing::look_at_source;
use super::parking::parking_name;
use super::phases::Phases;
use crate::control::device_names;
use crate::control::server::ControlServer;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::{Disks, KeeperLink, ServingSession, Start};
use crate::image::{DescriptorRole, nbd};
use crate::state::runtime::withdraw;
use crate::state::{Marks, MountState, RuntimeRecord, RuntimeVolume, Store};
use crate::sync::Arc;
use crate::volume::{Volume, VolumeOptions};

/// Runs a server; its standard input is the link to the keeper. Returns the exit code: 0 after a clean end.
pub fn main() -> u8 {
    // Not "exe": it was started by way of /proc/self/exe.
    let _ = std::fs::write("/proc/self/comm", "livemirror");
    let link = match KeeperLink::from_stdin() {
        Ok(link) => Arc::new(link),
        Err(error) => {
            log::error!("{error}");
            return 1;
        }
    };
    match serve(&link) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error}");
            link.failed(&error);
            error.exit_code().max(1)
        }
    }
}

fn serve(link: &Arc<KeeperLink>) -> Result<()> {
    let mut phases = Phases::new();
    let start = link.receive_start()?;
    let (config, first, may_leave) = (start.config.clone(), start.first, start.kept_by_manager);
    phases.end("told");
    let Prepared { ledger, opened, new_state, taken_over } = prepare(link, start)?;
    phases.end("images open");
    let mut targets = Vec::new();
    let mut volumes = Vec::new();
    for mut one in opened {
        targets.push(one.parked_target.take());
        volumes.push(volume(&config, one));
    }
    let brought_mirrors = !taken_over.is_empty();
    let mut taken_over = first.then_some(taken_over);
    let begun = Begun { may_leave, taken_over: &mut taken_over, phases };
    let result = run(link, &config, ledger.clone(), volumes, targets, begun);
    // A mirror that is known here only now must not be forgotten with a mount that fails late.
    let keeps_mirrors = brought_mirrors && taken_over.is_none();
    if let Some(taken_over) = taken_over {
        taken_over.give_back(&ledger);
    }
    if result.is_err() && new_state && !keeps_mirrors {
        // Nothing was ever mounted there: no trace stays.
        let _ = Store::open_existing(&config.state_dir, nix::unistd::geteuid().as_raw())
            .map(|store| store.map(|store| store.remove()));
        let _ = std::fs::remove_dir(&config.state_dir);
    }
    result
}

/// How a server has begun.
struct Begun<'a> {
    /// The mount can do without a server for a while.
    may_leave: bool,
    /// Of the first server of a mount; taken once it serves.
    taken_over: &'a mut Option<TakenOver>,
    phases: Phases,
}

/// What is opened and recorded before anything is mounted.
pub(super) struct Prepared {
    pub(super) ledger: Arc<Ledger>,
    pub(super) opened: Vec<OpenedVolume>,
    /// There was no record before, and nothing is mounted yet.
    pub(super) new_state: bool,
    pub(super) taken_over: TakenOver,
}

/// Opens everything and writes the record.
pub(super) fn prepare(link: &Arc<KeeperLink>, start: Start) -> Result<Prepared> {
    let Start { config, parked, restarts, last_exit, first, .. } = start;
    let parked = take_connections(link, parked);
    let marks = Marks::new()?;
    let owner = nix::unistd::geteuid().as_raw();
    let store = Store::open_existing(&config.state_dir, owner)?;
    let claimed = store.map(Store::claim).transpose()?;
    let recorded = match claimed.as_ref().map(Store::load) {
        Some(Err(error)) if error.kind() == ErrorKind::Corrupt && first && config.force => {
            log::warn!("{error}; mounted all the same");
            None
        }
        Some(Err(error)) if error.kind() == ErrorKind::Corrupt && first => {
            let advice = "which image is active is not guessed: if the one that you name is, pass --force";
            return Err(error.advise(advice));
        }
        Some(recorded) => recorded?,
        None => None,
    };
    let mut opened = Vec::new();
    let mut parked = parked;
    for volume in &config.volumes {
        opened.push(match (first, recorded.as_ref().and_then(|state| state.volume(&volume.name))) {
            (false, Some(state)) => open_again(&config, state, take_parked(&mut parked, &state.active))?,
            (false, None) => {
                return Err(Error::new(ErrorKind::Corrupt, "the record of the mount does not know").on(&volume.name));
            }
            (true, _) => open_first(&config, volume, recorded.as_ref(), &marks)?,
        });
    }
    let store = match claimed {
        Some(store) => store,
        None => Store::open(&config.state_dir)?.claim()?,
    };
    let new_state = first && recorded.is_none();
    let mut taken_over = TakenOver::default();
    if !config.read_only {
        if first {
            taken_over = take_over(&mut opened, &store, &marks, config.force).inspect_err(|_| {
                if new_state {
                    let _ = std::fs::remove_dir(&config.state_dir);
                }
            })?;
        }
        look_at_pairs(&mut opened, &store, &marks);
    }
    let state = MountState {
        mountpoint: config.mountpoint.clone(),
        restarts,
        last_exit,
        volumes: opened.iter().map(|one| one.state.clone()).collect(),
    };
    if first {
        store.remove_leftovers();
    }
    let ledger = Ledger::new(store, marks, link.clone(), state);
    match ledger.change(|_| ()) {
        Err(error) if first => {
            if new_state {
                ledger.store.remove_intent_logs_but(&[]);
                let _ = std::fs::remove_dir(&config.state_dir);
            }
            return Err(error.advise("the state directory must be writable, see --state-dir"));
        }
        // Guests wait: what the last server wrote is there, and this one tries again with the next change.
        Err(error) => log::error!("{error}; serving all the same"),
        Ok(()) => (),
    }
    for one in &opened {
        ledger.parking.park(&*one.image);
    }
    // What is parked beyond the images and the targets of unfinished mirrors is used by nobody any more.
    let targets: Vec<_> = opened.iter().map(|one| one.target_name().map(str::to_owned)).collect();
    for (one, target) in opened.iter_mut().zip(&targets) {
        one.parked_target = target.as_ref().and_then(|target| take_parked(&mut parked, target));
    }
    for (name, _, _) in parked {
        ledger.parking.inherit(&name, |image| {
            opened.iter().any(|one| one.image.name() == image) || targets.iter().flatten().any(|target| target == image)
        });
    }
    Ok(Prepared { ledger, opened, new_state, taken_over })
}

/// Whether sources of unfinished mirrors are as they were left: looked at before anybody uses them (rule 11).
fn look_at_pairs(opened: &mut [OpenedVolume], store: &Store, marks: &Marks) {
    let pulse_ns = store.pulse().map(|pulse| pulse.when_ns);
    for one in opened {
        if let Some(record) = &mut one.state.mirror {
            record.source_stamp = record.source_stamp.after_death(pulse_ns);
            record.target_stamp = record.target_stamp.after_death(pulse_ns);
            look_at_source(record, &*one.image, marks, one.held);
        }
    }
}

/// Has the sockets of NBD connections kept from now on, and takes over those of the server before: no image of theirs is opened
/// before their ends were read (rule 14). Returns the rest.
fn take_connections(
    link: &Arc<KeeperLink>,
    parked: Vec<(String, DescriptorRole, OwnedFd)>,
) -> Vec<(String, DescriptorRole, OwnedFd)> {
    nbd::park_with(Arc::new(Sockets(link.clone())));
    let take = |(name, role, descriptor): (String, DescriptorRole, OwnedFd)| match role {
        DescriptorRole::Connection => nbd::inherit(&name, descriptor).err().map(|descriptor| (name, role, descriptor)),
        _ => Some((name, role, descriptor)),
    };
    parked.into_iter().filter_map(take).collect()
}

/// The keeper, as NBD images know it.
struct Sockets(Arc<KeeperLink>);

impl nbd::Parking for Sockets {
    fn park(&self, name: &str, socket: BorrowedFd<'_>) {
        if let Err(error) = self.0.park(name, DescriptorRole::Connection, socket) {
            log::warn!("{error}");
        }
    }

    fn unpark(&self, name: &str) {
        if let Err(error) = self.0.unpark(name, DescriptorRole::Connection) {
            log::warn!("{error}");
        }
    }
}

fn take_parked(parked: &mut Vec<(String, DescriptorRole, OwnedFd)>, image: &str) -> Option<OwnedFd> {
    let name = parking_name(image);
    let at = parked.iter().position(|(other, role, _)| *other == name && *role == DescriptorRole::Locked)?;
    Some(parked.swap_remove(at).2)
}

pub(super) fn volume(config: &MountConfig, opened: OpenedVolume) -> Arc<Volume> {
    let OpenedVolume { image, state, .. } = opened;
    let options = VolumeOptions {
        name: state.name,
        id: state.id,
        read_only: config.read_only,
        growable: config.growable,
        shown: state.shown.unwrap_or_default(),
    };
    let size_bytes = state.size_bytes.map_or(image.size_bytes(), |size| size.min(image.size_bytes()));
    Arc::new(Volume::new(options, image).with_size(size_bytes))
}

fn run(
    link: &Arc<KeeperLink>,
    config: &MountConfig,
    ledger: Arc<Ledger>,
    volumes: Vec<Arc<Volume>>,
    targets: Vec<Option<OwnedFd>>,
    begun: Begun<'_>,
) -> Result<()> {
    let Begun { may_leave, taken_over, mut phases } = begun;
    let server = Server::new(config.clone(), volumes.clone(), ledger, Departure::new(link.clone()));
    if !config.read_only {
        server.find_unfinished(targets, taken_over.is_some());
        phases.end("mirrors found");
    }
    let control = ControlServer::start(&config.control, server.clone())?;
    let connection = link.opened()?;
    phases.end("connected");
    let disks = Disks { layout: config.layout, volumes: volumes.clone() };
    let may_leave = may_leave && connection.negotiated.has_resend();
    if let Some(taken_over) = taken_over.take() {
        taken_over.forget_elsewhere(&server.ledger, &volumes);
    }
    let session = ServingSession::start(connection, disks, threads())?;
    phases.end("serving");
    log::debug!("started in {phases}");
    start_departure(&server, may_leave)?;
    publish(&server);
    let published = server.clone();
    link.watch(move || publish(&published));
    link.serving(&server.disks())?;
    log::info!("serving {}", config.mountpoint.display());
    if !config.read_only {
        volumes.iter().for_each(|volume| server.ledger.renew_mark(volume));
        renew_former_marks(&server.ledger, volumes.clone());
        server.go_on()?;
    }

    let ended = session.wait();
    server.heartbeat.end();
    server.flush_all();
    if ended.is_ok() {
        settle(&volumes);
        server.suspend_jobs();
    }
    if ended.is_ok() {
        clean_up(config, &volumes);
    }
    control.shutdown();
    ended
}

/// From a thread of its own: an image that a disk has left may hang by now.
fn renew_former_marks(ledger: &Arc<Ledger>, volumes: Vec<Arc<Volume>>) {
    let ledger = ledger.clone();
    let renew = move || volumes.iter().for_each(|volume| ledger.renew_former_mark(volume));
    if let Err(error) = std::thread::Builder::new().name("marks".into()).spawn(renew) {
        log::warn!("cannot start a thread: {error}");
    }
}

/// No guest comes any more. Before the state records how the images are left.
fn settle(volumes: &[Arc<Volume>]) {
    for volume in volumes {
        if let Err(error) = volume.active().settle() {
            log::warn!("{error}");
        }
    }
}

/// What a mount that has ended leaves: nothing but its record, and a word on where the disks are.
pub(super) fn clean_up(config: &MountConfig, volumes: &[Arc<Volume>]) {
    let mount_id = MountConfig::mount_id(&config.mountpoint);
    for result in [withdraw(&mount_id), config.pidfile.as_ref().map_or(Ok(()), remove_pidfile)] {
        if let Err(error) = result {
            log::warn!("{error}");
        }
    }
    tell_the_way(config, volumes);
}

/// Enough for the disks' queues without a crowd on few processors.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(4, |cores| (cores.get() * 2).clamp(4, 16))
}

/// Signals and `quit` end the mount from a thread that may wait. `may_leave`: SIGTERM means to leave without unmounting.
fn start_departure(server: &Arc<Server>, may_leave: bool) -> Result<()> {
    let failed = |error: std::io::Error| Error::io("cannot watch for signals", &error);
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).map_err(failed)?;
    let asked = server.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            signals.forever().for_each(|signal| match signal {
                SIGTERM if may_leave => asked.departure.ask_to_leave(),
                _ => asked.departure.ask(),
            });
        })
        .map_err(failed)?;
    let leaving = server.clone();
    std::thread::Builder::new()
        .name("departure".into())
        .spawn(move || leaving.departure.run(&leaving))
        .map_err(failed)?;
    Ok(())
}

/// Lets the command line find this server. Without it the disks still serve.
fn publish(server: &Server) {
    let config = &server.config;
    let devices = device_names(server.volumes.iter().map(|volume| volume.name()));
    let volumes = config.volumes.iter().zip(devices).map(|(volume, device)| RuntimeVolume {
        name: volume.name.clone(),
        source: volume.source.clone(),
        device,
    });
    let record = RuntimeRecord {
        mountpoint: config.mountpoint.clone(),
        server_pid: std::process::id(),
        keeper_pid: Some(server.departure.keeper_pid()),
        control: config.control.clone(),
        state_dir: config.state_dir.clone(),
        volumes: volumes.collect(),
        started: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
    };
    if let Err(error) = record.publish(&MountConfig::mount_id(&config.mountpoint)) {
        log::error!("{error}");
    }
    if let Some(pidfile) = &config.pidfile {
        if let Err(error) = std::fs::write(pidfile, format!("{}\n", std::process::id())) {
            log::error!("cannot write {}: {error}", pidfile.display());
        }
    }
}

fn remove_pidfile(path: &std::path::PathBuf) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("cannot remove", &error).on(path.display().to_string()))
        }
        _ => Ok(()),
    }
}

/// A disk that was cut over is somewhere else from now on, above all where the mount lay over the old image itself.
fn tell_the_way(config: &MountConfig, volumes: &[Arc<Volume>]) {
    for (configured, volume) in config.volumes.iter().zip(volumes) {
        let active = volume.active();
        if active.name() != configured.source.display().to_string() {
            log::warn!("{}: the disk is {} from now on", configured.source.display(), active.name());
        }
    }
}
