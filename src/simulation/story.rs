//! What happens in one seed, told by the operator: servers start and end, mirrors run, things fail; at the end everything works again, all
//! mirrors converge, and every byte is looked at.
//!
//! ```text
//! life 1 ──> killed | keeper killed too | power cut | stopped ──> late writes land, somebody else changes an image ──> life 2 ...
//!   └─ guests, mirrors, cutovers, faults                                     ... ──> the last life: no faults, converge, compare
//! ```

use std::path::PathBuf;
use std::time::Duration;

use super::disk::SECTOR_BYTES;
use super::guest;
use super::host::{Host, STATE_DIRECTORY, host, replace_host};
use super::operations::{administer, alive, boot, converge};
use super::{checks, schedule};
use crate::image::CacheMode;
use crate::image::nbd::RECONNECT_DEFAULT;
use crate::mirror::types::{CopyMode, ErrorPolicy, MirrorOptions};
use crate::range::Granularity;
use crate::server::config::{Layout, MountConfig, VolumeConfig};
use crate::sync::{Arc, thread, virtual_time};

/// Four regions of the intent log.
pub(super) const DISK_BYTES: u64 = 4 << 20;

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The server alone; a keeper starts the next one.
    Killed,
    /// Server and keeper.
    BothKilled,
    PowerCut,
    Stopped,
}

/// What the operator knows.
struct Story {
    volumes: usize,
    guests: usize,
    config: MountConfig,
    life: u32,
    /// How the last life ended.
    before: Option<End>,
    targets: u64,
}

/// Plays one seed.
pub(super) fn play(seed: u64, tells: bool) {
    schedule::begin();
    let mut dice = super::dice::Dice::new(seed);
    let volumes = if dice.percent(75) { 1 } else { 2 };
    let guests = 1 + dice.below(3) as usize;
    replace_host(Some(Host::new(dice.next(), volumes, guests, tells)));
    let mut story = Story::new(volumes, guests);
    story.make_disks();
    let lives = 1 + host(|host| host.dice.below(3));
    for _ in 0..lives {
        story.live();
    }
    story.live_happily();
    schedule::finish();
}

impl Story {
    fn new(volumes: usize, guests: usize) -> Story {
        let volume = |number: usize| VolumeConfig {
            name: format!("disk{number}"),
            source: PathBuf::from(format!("/simulated-source-{number}.img")),
            format: None,
        };
        let config = MountConfig {
            mountpoint: "/simulated/mount".into(),
            layout: Layout::Directory,
            volumes: (0..volumes).map(volume).collect(),
            read_only: false,
            growable: false,
            allow_other: false,
            cache: CacheMode::Writeback,
            reconnect: RECONNECT_DEFAULT,
            follow: false,
            force: false,
            control: "/simulated/control".into(),
            state_dir: STATE_DIRECTORY.into(),
            log_file: None,
            pidfile: None,
            foreground: true,
            kernel_options: Vec::new(),
        };
        Story { volumes, guests, config, life: 0, before: None, targets: 0 }
    }

    /// The sources, with something on them.
    fn make_disks(&self) {
        host(|host| {
            for (number, volume) in self.config.volumes.iter().enumerate() {
                let disk = host.create_disk(&volume.source.display().to_string(), DISK_BYTES);
                for _ in 0..host.dice.below(6) {
                    let first = host.dice.below(DISK_BYTES / SECTOR_BYTES - 8);
                    let tag = host.new_tag();
                    for sector in first..first + 1 + host.dice.below(8) {
                        host.disks[disk].set(sector, tag);
                        host.oracles[number].settle(sector, tag);
                    }
                }
            }
        });
    }

    /// One life that ends badly, most of the time.
    fn live(&mut self) {
        let end = host(|host| match host.dice.below(10) {
            0..4 => End::PowerCut,
            4..7 => End::Killed,
            7 => End::BothKilled,
            _ => End::Stopped,
        });
        let busy = host(|host| host.dice.percent(50));
        self.start(busy, true);
        let steps = host(|host| {
            let most = host.dice.pick(&[1500, 6000, 20_000]);
            host.dice.below(most)
        });
        // Again and again, since most images come later.
        for _ in 0..4 {
            self.arm();
            schedule::wait(steps / 4);
        }
        self.end(end);
        self.meanwhile();
    }

    /// Starts a server, in a task of its life, and what uses it.
    fn start(&mut self, busy: bool, mirrors: bool) {
        self.life += 1;
        let life = self.life;
        let (config, before, guests) = (self.config.clone(), self.before, self.guests);
        let options: Vec<MirrorOptions> = (0..self.volumes).map(|volume| self.mirror_options(volume)).collect();
        host(|host| {
            host.guests_stop = false;
            host.guests_gone = 0;
            host.guests.clear();
            host.note(&format!("life {life} begins after {before:?}"));
        });
        schedule::spawn(life, move || {
            if let Err(error) = boot(config, before) {
                panic!("life {life} cannot start: {error}");
            }
            for number in 0..guests {
                drop(thread::spawn(move || guest::run(number, busy)));
            }
            alive().go_on().unwrap();
            if mirrors {
                administer(&options);
            }
        });
    }

    fn mirror_options(&mut self, volume: usize) -> MirrorOptions {
        self.targets += 1;
        let target = format!("/simulated-target-{volume}-{}.img", self.targets);
        let mut options = MirrorOptions::new(format!("job{volume}"), target);
        host(|host| {
            let dice = &mut host.dice;
            options.copy_mode = dice.pick(&[CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto]);
            options.granularity = dice.pick(&[None, Granularity::new(4 << 10), Granularity::new(16 << 10)]);
            options.buffer_bytes = dice.pick(&[64 << 10, 2 << 20]);
            options.on_target_error =
                dice.pick(&[ErrorPolicy::Ignore, ErrorPolicy::Ignore, ErrorPolicy::Stop, ErrorPolicy::Report]);
            options.on_source_error = dice.pick(&[ErrorPolicy::Ignore, ErrorPolicy::Report]);
        });
        options
    }

    /// Things will fail.
    fn arm(&self) {
        host(|host| {
            let many = host.dice.below(3);
            for _ in 0..many {
                let after = host.dice.below(60) as u32;
                let errno = host.dice.pick(&[0, libc::EIO, libc::ENOSPC]);
                match host.dice.below(12) {
                    0..6 if !host.disks.is_empty() => {
                        let latest = host.disks.len() - 1;
                        let disk =
                            if host.dice.percent(60) { latest } else { host.dice.below(latest as u64 + 1) as usize };
                        let is_target = host.disks[disk].name.contains("target");
                        let kind = host.dice.below(if is_target { 5 } else { 4 });
                        let faults = &mut host.disks[disk].faults;
                        match kind {
                            0 => faults.read = Some((after, errno)),
                            1 => faults.write = Some((after, errno)),
                            2 | 3 => faults.flush = Some((after / 8, if errno == 0 { 0 } else { libc::EIO })),
                            _ => faults.connection = Some(after),
                        }
                    }
                    6 | 7 => {
                        let made = host.dice.percent(50);
                        host.files.faults.rename = Some((after / 12, made));
                    }
                    8 => host.files.faults.stage = Some(after / 12),
                    9 => host.files.faults.log_sync = Some(after / 8),
                    10 => host.files.faults.log_write = Some(after / 8),
                    _ => {
                        let seconds = host.dice.below(6);
                        host.files.faults.log_stall = Some((after / 8, seconds));
                    }
                }
                host.count("fault");
            }
            if host.dice.percent(15) {
                host.files.faults.cutover = Some(host.dice.percent(50));
            }
            // A target that takes long, longer than guests wait for it.
            let latest = host.disks.len() - 1;
            if host.disks[latest].name.contains("target") && host.dice.percent(30) {
                host.disks[latest].faults.write = Some((host.dice.below(6) as u32, 0));
            }
        });
    }

    fn end(&mut self, end: End) {
        if end == End::Stopped {
            host(|host| host.guests_stop = true);
            // A server that has not begun to serve has no guests that could leave.
            if host(|host| host.life.is_some()) {
                self.wait_until("the guests leave", |story, host| host.guests_gone == story.guests);
                self.leave();
            }
        }
        let mounted = host(|host| host.life.is_some());
        host(|host| {
            host.note(&format!("life {} ends: {end:?}", self.life));
            checks::recovery(host, end == End::PowerCut);
            // What a cut-off life has is never given back.
            std::mem::forget(host.life.take());
            host.count(match end {
                End::Killed => "kill",
                End::BothKilled => "kill of both",
                End::PowerCut => "power cut",
                End::Stopped => "stop",
            });
        });
        schedule::cut_off(self.life);
        // A server that dies before there is a mount has no successor of the keeper's.
        self.before = Some(if end == End::Killed && !mounted { End::BothKilled } else { end });
    }

    /// A clean stop. Sometimes somebody loses patience: then it is a kill in the middle of it.
    fn leave(&mut self) {
        let left = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let done = left.clone();
        schedule::spawn(self.life, move || {
            if let Some(life) = host(|host| host.life.clone()) {
                life.leave();
                std::mem::forget(life);
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let patience = host(|host| if host.dice.percent(80) { u64::MAX } else { host.dice.below(3000) });
        let mut waited = 0;
        while !left.load(std::sync::atomic::Ordering::SeqCst) && waited < patience {
            schedule::wait(100);
            waited += 100;
        }
    }

    /// What happens while no server runs.
    fn meanwhile(&mut self) {
        let Some(end) = self.before else { return };
        host(|host| {
            let host = &mut *host;
            if end == End::PowerCut {
                for disk in &mut host.disks {
                    disk.power_cut(&mut host.dice);
                }
                host.files.power_cut(&mut host.dice);
                self.look(host);
            } else {
                // A stated limit: the failure of a flush that no guest has heard of is forgotten with the server that met it.
                for (oracle, unheard) in host.oracles.iter_mut().zip(&mut host.unheard) {
                    if std::mem::take(unheard) {
                        oracle.end_flush(0, false);
                    }
                }
                // What a failed flush has left nobody can know who comes later: the cache takes it for clean. Here it is found
                // out at the end of the server that was told.
                self.drop_clean(host);
                // Each of them has returned before the next server has the image.
                for disk in 0..host.disks.len() {
                    if host.dice.percent(70) {
                        host.land_all(disk);
                    }
                    host.disks[disk].faults = super::disk::Faults::default();
                    host.disks[disk].locked_by = None;
                }
                host.files.faults = super::files::Faults::default();
            }
            if end != End::Killed {
                // Without a keeper the connection is gone, and so is what was asked: after what had been sent has landed.
                host.oracles.iter_mut().for_each(super::oracle::Oracle::give_up);
                host.asked.iter_mut().for_each(|asked| *asked = None);
            }
        });
        virtual_time::pass(Duration::from_millis(host(|host| host.dice.below(2000))));
        if end != End::Killed && host(|host| host.dice.percent(30)) {
            self.meddle();
        }
    }

    fn drop_clean(&self, host: &mut Host) {
        let record = host.record();
        for disk in 0..host.disks.len() {
            let dropped = host.disks[disk].drop_clean(&mut host.dice);
            let active = |volume: &crate::state::VolumeState| volume.active == host.disks[disk].name;
            let Some(volume) = record.as_ref().and_then(|record| record.volumes.iter().position(active)) else {
                continue;
            };
            for sector in dropped {
                let tag = host.disks[disk].read(sector);
                if let Err(why) = host.oracles[volume].check_left(sector, tag) {
                    panic!("rule 7: {}: {why}", host.disks[disk].name);
                }
                host.oracles[volume].settle_left(sector, tag);
            }
        }
    }

    /// What the power cut has left is what there is from now on.
    fn look(&self, host: &mut Host) {
        let Some(record) = host.record() else { return };
        for (volume, state) in record.volumes.iter().enumerate() {
            let Some(disk) = host.find_disk(&state.active) else { continue };
            let sectors: Vec<u64> = host.oracles[volume].sectors().collect();
            for sector in sectors {
                let tag = host.disks[disk].read(sector);
                if let Err(why) = host.oracles[volume].check_left(sector, tag) {
                    panic!("rule 7: {}: {why}", state.name);
                }
                host.oracles[volume].settle(sector, tag);
            }
        }
    }

    /// Somebody else starts a machine on one of the images.
    fn meddle(&self) {
        virtual_time::pass(Duration::from_secs(10));
        host(|host| {
            let Some(record) = host.record() else { return };
            for (volume, state) in record.volumes.iter().enumerate() {
                let Some(mirror) = &state.mirror else { continue };
                let source = host.dice.percent(50);
                let name = if source { &state.active } else { &mirror.options.target };
                let Some(disk) = host.find_disk(name) else { continue };
                if !host.disks[disk].flights.is_empty() || host.dice.percent(30) {
                    continue;
                }
                host.note(&format!("somebody else writes to {name}"));
                host.count("foreign change");
                for _ in 0..=host.dice.below(3) {
                    let first = host.dice.below(DISK_BYTES / SECTOR_BYTES - 2);
                    let tag = host.new_tag();
                    for sector in first..first + 2 {
                        host.disks[disk].set(sector, tag);
                        if source {
                            host.oracles[volume].settle(sector, tag);
                        }
                    }
                }
                host.disks[disk].changed_ns = host.wall_ns();
                if mirror.compare.is_none() {
                    host.foreign.insert(mirror.job.clone());
                }
            }
        });
    }

    /// Waits for something of the machine, for as long as anything happens at all.
    fn wait_until(&self, what: &str, condition: impl Fn(&Story, &Host) -> bool) {
        for _ in 0..20_000 {
            if host(|host| condition(self, host)) {
                return;
            }
            schedule::wait(100);
        }
        panic!("never: {what}");
    }

    /// The last life: nothing fails, and everything comes to its end.
    fn live_happily(&mut self) {
        self.start(true, false);
        schedule::wait(2000);
        host(|host| host.guests_stop = true);
        self.wait_until("the guests leave", |story, host| host.guests_gone == story.guests);
        let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let told = done.clone();
        let options: Vec<MirrorOptions> = (0..self.volumes).map(|volume| self.mirror_options(volume)).collect();
        schedule::spawn(self.life, move || {
            converge(&options);
            told.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        self.wait_until("all mirrors converge", |_, _| done.load(std::sync::atomic::Ordering::SeqCst));
        host(|host| {
            checks::recovery(host, true);
            checks::recovery(host, false);
            std::mem::forget(host.life.take());
        });
    }
}
