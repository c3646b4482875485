//! `livemirror mirror`: starts the mirror of a disk.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::follow::{self, Waited};
use super::interrupt::Interrupt;
use super::output;
use super::place::{self, Disk, Mount};
use super::progress::Progress;
use super::units;
use crate::control::backend::MirrorPlan;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mountinfo::{MountTable, Place};
use crate::image::nbd::uri;
use crate::mirror::micros;

/// Starts a mirror: TARGET becomes, and stays, the same as the disk while the guest goes on.
///
/// Returns once every write is tracked. `livemirror cutover` then moves the guest to TARGET, `livemirror finish` ends with a
/// consistent copy.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  livemirror mirror /mnt/vm/os.img /new/os.img
  livemirror mirror /mnt/vm /new/ --speed 200M --wait
  livemirror mirror /mnt/vm /new/ --finish-by 06:00 --guest-first 10ms
  livemirror mirror /mnt/vm/os.img /dev/vg0/os --existing
  livemirror mirror /mnt/vm/os.img /new/os.qcow2 --sync top
  livemirror mirror /mnt/vm/os.img nbd://newhost/os --reconnect 10min
  livemirror mirror /mnt/vm/os.img 'nbd+unix:///os?socket=/run/rbd.sock'")]
pub struct Arguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
    /// The new image; a directory stands for the source's name in it. An NBD URI: what the server exports there.
    target: PathBuf,
    #[command(flatten)]
    options: MirrorArguments,
    /// Shows how much would be copied, whether it has room, and how long it may take; changes nothing.
    #[arg(long)]
    dry_run: bool,
    /// Shows the progress until the mirror is ready. Ctrl-C ends the waiting, not the mirror.
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
}

/// What a mirror can be told, by `mirror` and by `move`.
#[derive(Debug, clap::Args)]
pub struct MirrorArguments {
    /// The target's format; otherwise as its name says.
    #[arg(long, value_parser = ["raw", "qcow2"])]
    format: Option<String>,
    /// full: the whole disk. top: what the disk's qcow2 file has above its backing file, into a qcow2 file with the same one.
    /// none: only what the guest writes from now on; such a target is no copy, and there is no cutover to it.
    #[arg(long, value_parser = ["full", "top", "none"], default_value = "full")]
    sync: String,
    /// With --sync top: the image of the disk's chain above which everything is copied; TARGET has it as its backing file
    /// [default: the backing file of the disk].
    #[arg(long, value_name = "IMAGE")]
    base: Option<PathBuf>,
    /// The clusters of a qcow2 file that is created, a power of two from 512 to 2M [default: 64K].
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    cluster_size: Option<u64>,
    /// The version of a qcow2 file that is created, as qemu-img calls it [default: 1.1].
    #[arg(long, value_parser = ["0.10", "1.1"])]
    compat: Option<String>,
    /// The backing file of a qcow2 file that is created, as it is written there: a relative path starts at TARGET's directory.
    #[arg(long, value_name = "IMAGE")]
    backing_file: Option<String>,
    /// Its format [default: as its name and content say].
    #[arg(long, value_parser = ["raw", "qcow2"], requires = "backing_file")]
    backing_format: Option<String>,
    /// Whether the target goes through the host's page cache, now and as the disk [default: as the mount has it (-o cache=...)].
    #[arg(long, value_name = "MODE", value_parser = ["none", "writeback"])]
    target_cache: Option<String>,
    /// background: the guest waits for the source only. write-blocking: it waits for both images. auto: the mirror chooses.
    #[arg(long, value_parser = ["auto", "background", "write-blocking"], default_value = "auto")]
    copy_mode: String,
    /// The unit in which changes are tracked, a power of two from 512 to 64M [default: 64K].
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    granularity: Option<u64>,
    /// The most that is copied each second; 0 is no limit.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "0")]
    speed: u64,
    /// The copy yields so that 99 of 100 reads and writes of the guest take no longer than this, as far as that is the copy's doing.
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    guest_first: Option<Duration>,
    /// As slow as will do to be ready by then: in 2h, at 22:30, at "2026-01-31 06:00". Says so at once if it cannot be.
    #[arg(long, value_name = "TIME", value_parser = units::parse_moment)]
    finish_by: Option<units::Moment>,
    /// Memory for copies in flight.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "16M")]
    buffer: u64,
    /// What a read error of the source does: report ends the mirror, stop pauses it, enospc pauses it if there is no room.
    #[arg(long, value_name = "POLICY", value_parser = ["report", "ignore", "stop", "enospc"], default_value = "report")]
    on_source_error: String,
    /// What a write error of the target does.
    #[arg(long, value_name = "POLICY", value_parser = ["report", "ignore", "stop", "enospc"], default_value = "enospc")]
    on_target_error: String,
    /// Writes into a TARGET that is there already (block devices always are; an NBD export needs no --existing). Its content is lost.
    #[arg(long)]
    existing: bool,
    /// The longest that a request of the guest waits for the target; past it the target gets the change later.
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration, default_value = "2s")]
    max_guest_delay: Duration,
    /// NBD targets: how long a copy waits while the connection is lost, before that is an error of the target's
    /// [default: as the mount was told].
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    reconnect: Option<Duration>,
    /// Copies the data also where TARGET could share the source's blocks (on one XFS or btrfs): a second copy, on its own blocks.
    #[arg(long)]
    no_reflink: bool,
    /// Forgets a mirror of this disk that is unfinished, and starts from the beginning.
    #[arg(long)]
    restart: bool,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// The mirror cannot start; with `--wait`: it failed, or an error stopped it.
    pub fn run(self) -> Result<()> {
        let mut mount = Mount::open(&self.disk)?;
        let disk = mount.disk()?;
        let target = target_path(&self.target, &disk)?;
        if self.dry_run {
            let mut request = self.options.request(&disk, &target)?;
            request.insert("dry-run".to_owned(), true.into());
            let plan: MirrorPlan = mount.client.call("livemirror-mirror", request.into())?;
            print_plan(&disk, &plan);
            return Ok(());
        }
        let interrupt = Interrupt::watch()?;
        self.options.start(&mut mount, &disk, &target)?;
        if !self.wait {
            output::line(format_args!("mirroring {} to {target}", disk.status.disk));
            if self.options.finish_by.is_some() {
                follow::warn_if_late(&mut mount)?;
            }
            return Ok(());
        }
        let mut progress = Progress::new();
        let waited = follow::until_ready(&mut mount, &disk, &interrupt, &mut progress, None)?;
        progress.end();
        match waited {
            Waited::Ready => output::line(format_args!("{target} is in step with {}", disk.status.disk)),
            Waited::Interrupted => {
                output::line(format_args!(
                    "the mirror goes on; see it with `livemirror status {} --watch`",
                    disk.status.disk
                ));
            }
        }
        Ok(())
    }
}

impl MirrorArguments {
    /// For a verb that ends with a cutover.
    ///
    /// # Errors
    /// The target would not have all of the disk.
    pub fn check_whole(&self) -> Result<()> {
        match self.sync.as_str() {
            "none" => {
                Err(Error::usage("no disk moves to a target that has only what is written from now on (--sync none)")
                    .advise("--sync full or top"))
            }
            _ => Ok(()),
        }
    }

    /// Starts the mirror.
    ///
    /// # Errors
    /// It cannot start.
    pub fn start(&self, mount: &mut Mount, disk: &Disk, target: &str) -> Result<()> {
        let mut request = self.request(disk, target)?;
        match &disk.status.mirror {
            Some(job) if self.restart => {
                mount.client.execute("livemirror-cancel", json!({ "device": disk.device, "keep": true }))?;
                follow::until_gone(mount, disk)?;
                // What the forgotten one has made of its target may be written over.
                let left = job.target == target && Path::new(target).exists();
                request.insert("existing".to_owned(), (self.existing || left).into());
            }
            Some(job) => {
                let what = format!("a mirror to {} runs already:", job.target);
                return Err(Error::new(ErrorKind::Exists, what).on(disk.status.disk.clone()).advise(format!(
                    "`livemirror cancel {}` ends it, --restart forgets it and begins anew",
                    disk.status.disk
                )));
            }
            None => (),
        }
        mount.client.execute("livemirror-mirror", request.into()).map(drop)
    }

    fn request(&self, disk: &Disk, target: &str) -> Result<Map<String, Value>> {
        let mut request = Map::new();
        let mut put = |name: &str, value: Value| request.insert(name.to_owned(), value);
        put("device", disk.device.as_str().into());
        put("target", target.into());
        put("copy-mode", self.copy_mode.as_str().into());
        put("speed", signed(self.speed, "--speed")?);
        put("buf-size", signed(self.buffer, "--buffer")?);
        put("on-source-error", self.on_source_error.as_str().into());
        put("on-target-error", self.on_target_error.as_str().into());
        put("existing", self.existing.into());
        let delay_ms = u64::try_from(self.max_guest_delay.as_millis()).unwrap_or(u64::MAX);
        put("max-guest-delay-ms", signed(delay_ms, "--max-guest-delay")?);
        if let Some(reconnect) = self.reconnect {
            let reconnect_ms = u64::try_from(reconnect.as_millis()).unwrap_or(u64::MAX);
            put("reconnect-ms", signed(reconnect_ms, "--reconnect")?);
        }
        if let Some(bound) = self.guest_first {
            put("guest-first-us", signed(micros(bound), "--guest-first")?);
        }
        if let Some(moment) = self.finish_by {
            put("finish-by-ms", signed(units::epoch_ms(moment), "--finish-by")?);
        }
        put("reflink", (!self.no_reflink).into());
        if let Some(cache) = &self.target_cache {
            put("target-cache", cache.as_str().into());
        }
        if let Some(format) = &self.format {
            put("format", format.as_str().into());
        }
        put("sync", self.sync.as_str().into());
        if let Some(base) = &self.base {
            put("base", utf8(place::absolute(base)?)?.into());
        }
        if let Some(bytes) = self.cluster_size {
            put("cluster-size", signed(bytes, "--cluster-size")?);
        }
        if let Some(compat) = &self.compat {
            put("version", if compat == "0.10" { "v2" } else { "v3" }.into());
        }
        if let Some(file) = &self.backing_file {
            put("backing-file", file.as_str().into());
        }
        if let Some(format) = &self.backing_format {
            put("backing-fmt", format.as_str().into());
        }
        if let Some(bytes) = self.granularity {
            if crate::range::Granularity::new(bytes).is_none() {
                return Err(Error::usage(format!(
                    "the granularity {bytes} (--granularity) is not a power of two from 512 to 64M"
                ))
                .advise("64K is a good one for most disks"));
            }
            put("granularity", bytes.into());
        }
        Ok(request)
    }
}

/// The protocol's numbers are signed.
fn signed(bytes: u64, option: &str) -> Result<Value> {
    i64::try_from(bytes).map(Value::from).map_err(|_| Error::usage(format!("the value of {option} is too large")))
}

/// TARGET as the server gets it: absolute, and a file where a directory was given.
///
/// # Errors
/// It lies in a mount of ours, or is not UTF-8.
pub fn target_path(target: &Path, disk: &Disk) -> Result<String> {
    let shown = target.display().to_string();
    let mut path = place::absolute(target)?;
    if !uri::is_uri(target) {
        if let Place::Ours(entry, _) = MountTable::read()?.locate(&path)? {
            return Err(Error::new(ErrorKind::Unsupported, format!("the target {shown} lies in the livemirror mount"))
                .on(entry.mountpoint.display().to_string())
                .advise("name a file outside of it: a disk cannot be mirrored into itself"));
        }
        // Not in a mount of ours: it may be looked at.
        if path.is_dir() {
            let name = Path::new(&disk.status.source).file_name().unwrap_or(disk.status.name.as_ref());
            path.push(name);
        } else if shown.ends_with('/') {
            return Err(Error::new(ErrorKind::NotFound, "there is no directory")
                .on(shown)
                .advise("make it, or leave the / away"));
        }
    }
    utf8(path)
}

fn utf8(path: PathBuf) -> Result<String> {
    path.into_os_string()
        .into_string()
        .map_err(|path| Error::new(ErrorKind::Unsupported, "the name is not UTF-8:").on(path.to_string_lossy()))
}

fn print_plan(disk: &Disk, plan: &MirrorPlan) {
    output::line(format_args!("disk      {} ({})", disk.status.disk, units::size(plan.size_bytes)));
    output::line(format_args!("target    {}", plan.target));
    output::line(format_args!("to copy   {}", units::size(plan.data_bytes)));
    match plan.available_bytes {
        Some(room) if room < plan.data_bytes => {
            output::line(format_args!(
                "room      {}: {} too little",
                units::size(room),
                units::size(plan.data_bytes - room)
            ));
        }
        Some(room) => output::line(format_args!("room      {}", units::size(room))),
        None => output::line(format_args!("room      not known")),
    }
    output::line(format_args!("method    {}", plan.method));
    match plan.expected_seconds {
        Some(seconds) => output::line(format_args!("time      about {}", units::seconds(seconds))),
        None => output::line(format_args!("time      not known")),
    }
}
