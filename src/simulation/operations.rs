//! What is done within a life: a server is started as its keeper or a user would, mirrors are started and told things, and in the last
//! life everything is brought to its end.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::checks;
use super::disk::SECTOR_BYTES;
use super::host::{descriptor, host};
use super::story::End;
use crate::control::backend::{Backend, CutoverRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::types::{CancelMode, CopyMode, JobEvent, JobInfo, JobStatus, MirrorOptions};
use crate::server::config::MountConfig;
use crate::server::simulated::Life;
use crate::sync::{Arc, thread};

/// The server that lives.
pub(super) fn alive() -> Arc<Life> {
    host(|host| host.life.clone()).expect("a server lives")
}

/// Starts a server as a keeper or a user would.
pub(super) fn boot(mut config: MountConfig, before: Option<End>) -> Result<()> {
    let first = before != Some(End::Killed) || host(|host| host.record().is_none());
    let parked = if first { Vec::new() } else { parked() };
    let superseded = host(|host| {
        let record = host.record();
        let names = |record: std::rc::Rc<crate::state::MountState>| {
            record.volumes.iter().map(|volume| volume.active != volume.source.display().to_string()).collect::<Vec<_>>()
        };
        record.map(names).unwrap_or_default().contains(&true)
    });
    if first && superseded {
        // Rule 10: the old image is refused, and followed only when told so.
        match Life::start(&config, first, Vec::new()) {
            Err(error) if error.kind() == ErrorKind::Superseded => host(|host| host.count("refused as superseded")),
            Err(error) => return Err(error),
            Ok(_) => panic!("rule 10: a superseded image was mounted as if nothing had happened"),
        }
        config.follow = true;
    }
    let life = loop {
        match Life::start(&config, first, parked_again(&parked)) {
            Ok(life) => break life,
            // Its state's disk fails at this moment.
            Err(error) if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Failed) => {
                host(|host| host.note(&format!("cannot start: {error}")));
                thread::sleep(Duration::from_secs(1));
            }
            Err(error) => return Err(error),
        }
    };
    life.backend().subscribe(Box::new(|event| match event {
        JobEvent::Ready(progress) => host(|host| _ = host.ready.insert(progress.job_id.clone())),
        JobEvent::StatusChange { job_id, status: JobStatus::Created } => host(|host| _ = host.ready.remove(job_id)),
        _ => (),
    }));
    host(|host| {
        host.ready.clear();
        let record = host.record();
        for (volume, state) in life.volumes().iter().zip(record.iter().flat_map(|record| &record.volumes)) {
            assert_eq!(
                volume.active().name(),
                state.active,
                "rule 15: the server serves another image than the record names"
            );
        }
        host.life = Some(Arc::new(life));
        checks::recovery(host, false);
        checks::recovery(host, true);
    });
    Ok(())
}

/// What the keeper has parked.
fn parked() -> Vec<(String, usize)> {
    host(|host| {
        let Some(record) = host.record() else { return Vec::new() };
        let names = record.volumes.iter().flat_map(|volume| {
            let target = volume.mirror.as_ref().map(|mirror| mirror.options.target.clone());
            [Some(volume.active.clone()), target].into_iter().flatten()
        });
        let disks = names.filter_map(|name| host.find_disk(&name).map(|disk| (name, disk)));
        // The keeper has what a server of its own has opened, and no other.
        disks.filter(|(_, disk)| host.disks[*disk].locked_by.is_some()).collect()
    })
}

fn parked_again(parked: &[(String, usize)]) -> Vec<(String, OwnedFd)> {
    parked
        .iter()
        .map(|(name, disk)| (name.clone(), descriptor(*disk).try_clone_to_owned().expect("a descriptor")))
        .collect()
}

/// What users do to the mirrors of a mount.
pub(super) fn administer(options: &[MirrorOptions]) {
    let life = alive();
    let backend = life.backend();
    let sleep = |most: u64| thread::sleep(Duration::from_millis(host(|host| host.dice.below(most))));
    let mut started = vec![false; options.len()];
    loop {
        sleep(4000);
        let what = host(|host| host.dice.below(12));
        let volume = host(|host| host.dice.below(options.len() as u64)) as usize;
        let device = &backend.devices()[volume];
        let id = &options[volume].job_id;
        let result: Result<()> = match what {
            0..4 if !started[volume] => {
                let result = backend.start_mirror(device, options[volume].clone());
                started[volume] = result.is_ok();
                if result.is_ok() {
                    host(|host| host.count("mirror"));
                }
                result
            }
            0..7 => {
                let max_pause = Duration::from_millis(host(|host| host.dice.pick(&[50, 500, 5000])));
                let request = CutoverRequest { devices: Vec::new(), max_pause, patience: Duration::from_millis(500) };
                backend.cutover(&request).map(|_| ())
            }
            7 => backend.pause(id),
            8 | 9 => backend.resume(id),
            10 => {
                let mode =
                    host(|host| host.dice.pick(&[CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto]));
                backend.set_copy_mode(id, mode)
            }
            _ => match host(|host| host.dice.below(6)) {
                0 => backend.cancel(id, CancelMode::Force, true),
                1 => backend.cancel(id, CancelMode::Soft, true),
                _ => backend.complete(id),
            },
        };
        host(|host| {
            host.note(&format!(
                "operation {what}: {}",
                result.map_or_else(|error| error.to_string(), |()| "done".into())
            ))
        });
    }
}

/// Brings every mirror to its end, starts one where none is left, and looks at every byte.
pub(super) fn converge(options: &[MirrorOptions]) {
    let life = alive();
    let backend = life.backend();
    for (volume, options) in life.volumes().iter().zip(options) {
        let mirrored = |backend: &dyn Backend| backend.jobs().iter().any(|job| job.job_id == options.job_id);
        let start = |options: &MirrorOptions| {
            let options = MirrorOptions { copy_mode: CopyMode::Background, ..options.clone() };
            let device =
                &backend.devices()[life.volumes().iter().position(|other| Arc::ptr_eq(other, volume)).unwrap()];
            backend.start_mirror(device, options).unwrap();
        };
        if !mirrored(backend) {
            start(options);
        }
        while mirrored(backend) {
            let paused = |job: &JobInfo| job.paused || matches!(job.state, JobStatus::Paused | JobStatus::Standby);
            for job in backend.jobs().iter().filter(|job| paused(job)) {
                // One that waits for its target is looked after anyway.
                drop(backend.resume(&job.job_id));
            }
            let request = CutoverRequest {
                devices: Vec::new(),
                max_pause: Duration::from_secs(30),
                patience: Duration::from_secs(5),
            };
            let result = backend.cutover(&request);
            host(|host| {
                host.note(&format!(
                    "the last cutover: {}",
                    result.as_ref().map_or_else(Error::to_string, |_| "done".into())
                ))
            });
            thread::sleep(Duration::from_millis(500));
        }
    }
    for (number, volume) in life.volumes().iter().enumerate() {
        let begun = host(|host| host.oracles[number].now());
        let sectors: Vec<u64> = host(|host| host.oracles[number].sectors().collect());
        for sector in sectors {
            let mut bytes = [0; SECTOR_BYTES as usize];
            volume.read(sector * SECTOR_BYTES, &mut bytes).unwrap();
            let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            if let Err(why) = host(|host| host.oracles[number].check_read(sector, tag, begun)) {
                panic!("rule 5: at the end: {why}");
            }
        }
    }
    std::mem::forget(life);
}
