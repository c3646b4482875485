//! `livemirror mount`: from what the user says to a [`MountConfig`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::options::MountOptions;
use super::output;
use super::place;
use super::units;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::{launch, mountpoint};
use crate::image::nbd::{RECONNECT_DEFAULT, uri};
use crate::image::{Format, format_of_name};
use crate::server::config::{Layout, MountConfig, VolumeConfig};
use crate::state::paths;

/// Mounts disks as plain files.
///
/// SOURCE is a raw image, a qcow2 file (with its backing files), a block device or an NBD URI. Returns when the disks can be used, and
/// prints their paths.
///
/// MOUNTPOINT is an empty directory, in which each disk is a file named after its SOURCE; or a regular file, SOURCE itself
/// included, which becomes the disk.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "livemirror mount [OPTIONS] SOURCE... MOUNTPOINT\n       livemirror mount [OPTIONS] --volume name=N,source=S... MOUNTPOINT",
    after_help = "Mount options (-o), as on the command line or in /etc/fstab:
  ro, rw, allow_other, growable, follow, force, foreground, cache=none|writeback, format=raw|qcow2, name=FILE,
  reconnect=DURATION, state_dir=DIR, control=SOCKET, log_file=FILE, pidfile=FILE; nosuid, nodev, noexec, noatime and their like go to the
  kernel; those of fstab (_netdev, nofail, noauto, user, x-*) are passed over.

Examples:
  livemirror mount disk.img /mnt/vm              /mnt/vm/disk.img is the disk
  livemirror mount disk.img disk.img             the disk takes the place of its own image
  livemirror mount a.img b.img /mnt/vm           two disks, which can be cut over at one instant
  livemirror mount --allow-other -o cache=none /dev/vg0/os /mnt/vm
  livemirror mount nbd://host/os /mnt/vm         also nbds:// (TLS) and nbd+unix:///os?socket=/run/nbd.sock

As a systemd service: see livemirror@.service. With --foreground, Type=notify and FileDescriptorStoreMax= the mount outlives a
restart of the service: SIGTERM leaves it for the next start (exit code 75), SIGINT unmounts."
)]
pub struct Arguments {
    /// One or more sources, then the mountpoint.
    #[arg(value_name = "SOURCE... MOUNTPOINT", num_args = 1.., required = true)]
    paths: Vec<PathBuf>,
    /// The sources' format; otherwise as name and content say. Where the two disagree, nothing is guessed.
    #[arg(long, value_parser = parse_format)]
    format: Option<Format>,
    /// The disk's file name in the mount (with one SOURCE).
    #[arg(long, value_name = "FILE")]
    name: Option<String>,
    /// A further disk, with a name and a format of its own. Can be given again.
    #[arg(long, value_name = "name=N,source=S,format=F")]
    volume: Vec<String>,
    /// Nobody can write to the disks.
    #[arg(long)]
    read_only: bool,
    /// Programs may change the disk's size.
    #[arg(long)]
    growable: bool,
    /// Other users may use the disks, as far as their file modes allow (needs user_allow_other in /etc/fuse.conf).
    #[arg(long)]
    allow_other: bool,
    /// Mount options, see below. Can be given again.
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stays in the foreground and logs to standard error.
    #[arg(long)]
    foreground: bool,
    /// Writes the server's process id to FILE.
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Where the control socket (QMP) is made.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Where the state of this mount is kept.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where the server logs to; otherwise the journal under systemd, else a file in the state.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// NBD: how long reads and writes wait while the connection to the server is lost, before they fail. What waits for the answer of
    /// a server that is silent fails after as long, and a minute at least [default: 1min].
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    reconnect: Option<Duration>,
    /// Where SOURCE was left by a cutover, mounts the image that the disk lives on now.
    #[arg(long)]
    follow: bool,
    /// Mounts a SOURCE that was left by a cutover all the same, out of date as it is; also where the record of
    /// the last mount is damaged and SOURCE is known to be the right image.
    #[arg(long, conflicts_with = "follow")]
    force: bool,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever kept the disks from being mounted; then nothing is left behind.
    pub fn run(self) -> Result<()> {
        if let Some(left) = launch::find_kept()? {
            return left.go_on();
        }
        let config = self.config()?;
        if config.foreground {
            return launch::run_foreground(&config, print);
        }
        print(&launch::launch(&config)?);
        Ok(())
    }

    fn config(mut self) -> Result<MountConfig> {
        let mut options = MountOptions::default();
        for list in &self.options {
            options.add(list)?;
        }
        let target = self.paths.pop().ok_or_else(|| Error::usage("no MOUNTPOINT was given"))?;
        let format = self.format.or(options.format);
        let volumes = volumes(&self.paths, format, self.name.or(options.name), &self.volume)?;
        let mountpoint = mountpoint_path(&target)?;
        let layout = mountpoint::inspect(&mountpoint)?;
        if layout == Layout::File && volumes.len() > 1 {
            return Err(Error::usage(format!("{} disks cannot be mounted over the one file", volumes.len()))
                .on(target.display().to_string())
                .advise("give a directory as MOUNTPOINT"));
        }
        let follow = self.follow || options.follow;
        let force = self.force || options.force;
        if follow && force {
            return Err(Error::usage("follow and force (-o) exclude each other"));
        }
        for path in volumes.iter().map(|volume| &volume.source).chain([&mountpoint]) {
            written_down(path)?;
        }
        let id = MountConfig::mount_id(&mountpoint);
        let absolute = |path: Option<PathBuf>| path.map(|path| place::absolute(&path)).transpose();
        let config = MountConfig {
            layout,
            volumes,
            read_only: self.read_only || options.read_only == Some(true),
            growable: self.growable || options.growable,
            allow_other: self.allow_other || options.allow_other,
            cache: options.cache.unwrap_or_default(),
            reconnect: self.reconnect.or(options.reconnect).unwrap_or(RECONNECT_DEFAULT),
            follow,
            force,
            control: match absolute(self.control.or(options.control))? {
                Some(path) => path,
                None => paths::control_socket(&id)?,
            },
            state_dir: match absolute(self.state_dir.or(options.state_dir))? {
                Some(path) => path,
                None => paths::state_dir(&id)?,
            },
            log_file: absolute(self.log_file.or(options.log_file))?,
            pidfile: absolute(self.pidfile.or(options.pidfile))?,
            foreground: self.foreground || options.foreground,
            kernel_options: options.kernel,
            mountpoint,
        };
        let named = [
            ("--control", Some(&config.control)),
            ("--state-dir", Some(&config.state_dir)),
            ("--log-file", config.log_file.as_ref()),
            ("--pidfile", config.pidfile.as_ref()),
        ];
        for (option, path) in named.into_iter().filter_map(|(option, path)| Some((option, path?))) {
            check_own_file(option, path, &config)?;
        }
        Ok(config)
    }
}

/// State and messages are JSON.
fn written_down(path: &Path) -> Result<()> {
    if path.to_str().is_some() {
        return Ok(());
    }
    Err(Error::usage("a path that is not UTF-8 cannot be mounted:")
        .on(path.display().to_string())
        .advise("use another name, or a symbolic link that has one"))
}

/// Refuses a file of our own that would be written over a disk's image, or be hidden beneath the mount.
fn check_own_file(option: &str, path: &Path, config: &MountConfig) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    written_down(path)?;
    let refused = |what: &str| {
        Err(Error::usage(format!("{option} {what}")).on(path.display().to_string()).advise("name another place"))
    };
    if let Ok(there) = std::fs::metadata(path) {
        let number = (there.dev(), there.ino());
        let is_it = |image: &Path| std::fs::metadata(image).is_ok_and(|image| (image.dev(), image.ino()) == number);
        if config.volumes.iter().any(|volume| is_it(&volume.source)) {
            return refused("names the image of a disk:");
        }
    }
    // The directory's own path, as the mountpoint's: without symbolic links.
    let resolved =
        path.ancestors().find_map(|known| Some(known.canonicalize().ok()?.join(path.strip_prefix(known).ok()?)));
    if resolved.is_some_and(|path| path.starts_with(&config.mountpoint)) {
        return refused("lies in the mountpoint:");
    }
    Ok(())
}

fn print(paths: &[PathBuf]) {
    for path in paths {
        output::line(path.display());
    }
}

fn parse_format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err("expected raw or qcow2".to_owned()),
    }
}

/// The mountpoint without symbolic links, as the mount table will show it: its parent is resolved, it itself is not looked
/// at, as it may be a stale mount.
fn mountpoint_path(path: &Path) -> Result<PathBuf> {
    use crate::fuse::mountinfo::{MountTable, Place};
    Ok(match MountTable::read()?.locate(path)? {
        Place::Elsewhere(path) => path,
        Place::Ours(entry, rest) if rest.as_os_str().is_empty() => entry.mountpoint,
        Place::Ours(entry, rest) => entry.mountpoint.join(rest),
    })
}

/// The disks in the order in which they were given, SOURCEs first.
fn volumes(
    sources: &[PathBuf],
    format: Option<Format>,
    name: Option<String>,
    described: &[String],
) -> Result<Vec<VolumeConfig>> {
    if name.is_some() && sources.len() != 1 {
        return Err(Error::usage(format!("--name names one disk, and there are {} SOURCEs", sources.len()))
            .advise("name each with --volume name=N,source=S"));
    }
    let mut volumes: Vec<VolumeConfig> = Vec::new();
    for source in sources {
        let name = name.clone().map_or_else(|| default_name(source, format), Ok)?;
        volumes.push(VolumeConfig { name, source: place::absolute(source)?, format });
    }
    for text in described {
        volumes.push(volume(text, format)?);
    }
    if volumes.is_empty() {
        return Err(Error::usage("no SOURCE was given").advise("livemirror mount SOURCE... MOUNTPOINT"));
    }
    for (index, volume) in volumes.iter().enumerate() {
        check_name(&volume.name)?;
        if let Some(other) = volumes[..index].iter().find(|other| other.name == volume.name) {
            return Err(Error::usage(format!(
                "two disks are called '{}': {} and {}",
                volume.name,
                other.source.display(),
                volume.source.display()
            ))
            .advise(format!("name one of them: --volume name=OTHER,source={}", volume.source.display())));
        }
    }
    Ok(volumes)
}

/// `name=N,source=S,format=F`. A comma in a value is doubled, as QEMU has it.
fn volume(text: &str, format: Option<Format>) -> Result<VolumeConfig> {
    let wrong =
        |what: String| Error::usage(what).on(format!("(--volume {text})")).advise("--volume name=N,source=S,format=F");
    let (mut name, mut source, mut format) = (None, None, format);
    for part in text.replace(",,", "\0").split(',') {
        let part = part.replace('\0', ",");
        match part.split_once('=') {
            Some(("name", value)) => name = Some(value.to_owned()),
            Some(("source", value)) => source = Some(PathBuf::from(value)),
            Some(("format", value)) => {
                format = Some(parse_format(value).map_err(|why| wrong(format!("{part}: {why}")))?)
            }
            _ => return Err(wrong(format!("'{part}' is none of name=, source=, format="))),
        }
    }
    let source = source.ok_or_else(|| wrong("source= is missing".to_owned()))?;
    let name = name.map_or_else(|| default_name(&source, format), Ok)?;
    Ok(VolumeConfig { name, source: place::absolute(&source)?, format })
}

/// The source's file name; `NAME.img` for a qcow2 file, as the mount holds raw bytes; of an NBD URI the export's name.
fn default_name(source: &Path, format: Option<Format>) -> Result<String> {
    if let Some(uri) = source.to_str().filter(|_| uri::is_uri(source)) {
        uri::check(uri)?;
        return Ok(uri::disk_name(uri));
    }
    let qcow2 = match format {
        Some(format) => format == Format::Qcow2,
        None => format_of_name(source) == Format::Qcow2,
    };
    let named = source.file_name().map(|name| {
        let name = Path::new(name);
        if qcow2 { name.with_extension("img") } else { name.to_owned() }
    });
    let named = named.ok_or_else(|| Error::usage("the source has no file name:").on(source.display().to_string()))?;
    named.into_os_string().into_string().map_err(|name| {
        Error::usage("the source's name is not UTF-8:")
            .on(name.to_string_lossy())
            .advise("give the disk a name with --volume name=N,source=S")
    })
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) || name.len() > 255 {
        return Err(Error::new(ErrorKind::Usage, format!("'{name}' cannot be a file name (--name, --volume)")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sources: &[&str], described: &[&str]) -> Result<Vec<String>> {
        let sources: Vec<PathBuf> = sources.iter().map(PathBuf::from).collect();
        let described: Vec<String> = described.iter().map(|text| (*text).to_owned()).collect();
        Ok(volumes(&sources, None, None, &described)?.into_iter().map(|volume| volume.name).collect())
    }

    #[test]
    fn disks_are_named_after_their_sources() {
        assert_eq!(names(&["/a/os.img", "/dev/vg0/data", "/a/x.qcow2"], &[]).unwrap(), ["os.img", "data", "x.img"]);
        assert_eq!(names(&["nbd://host/os", "nbd+unix:///?socket=/s"], &[]).unwrap(), ["os", "nbd.img"]);
        assert_eq!(names(&["/a/os.img"], &["source=/b/os.img,name=second"]).unwrap(), ["os.img", "second"]);
        assert_eq!(names(&[], &["source=/a,,b.img"]).unwrap(), ["a,b.img"]);
    }

    #[test]
    fn what_cannot_be_is_refused_as_wrong_usage() {
        let text = |result: Result<Vec<String>>| {
            let error = result.unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        assert_eq!(
            text(names(&["/a/os.img", "/b/os.img"], &[])),
            "two disks are called 'os.img': /a/os.img and /b/os.img"
        );
        assert_eq!(text(names(&[], &[])), "no SOURCE was given");
        assert!(text(names(&[], &["name=x"])).starts_with("source= is missing"));
        assert!(text(names(&[], &["source=/a,format=vmdk"])).contains("format=vmdk"));
        assert!(text(names(&[], &["source=/a,name=x/y"])).starts_with("'x/y' cannot be a file name"));
        assert!(
            text(volumes(&["/a".into(), "/b".into()], None, Some("x".into()), &[]).map(|_| vec![])).contains("--name")
        );
    }
}
