//! Loop devices and file systems on them, as guards.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::command::{Done, finish_within, run};
use super::wait;

/// A loop device over a file.
pub struct LoopDevice {
    /// `/dev/loopN`.
    pub path: PathBuf,
    attached: bool,
    partitions: u32,
}

impl LoopDevice {
    /// Attaches a free loop device to `file`.
    #[track_caller]
    pub fn over(file: &Path) -> Self {
        let done = run("losetup", [Path::new("--find"), Path::new("--show"), file]).ok();
        LoopDevice { path: PathBuf::from(done.stdout.trim()), attached: true, partitions: 0 }
    }

    /// Attaches the loop device `path` to `file`; `None` if it is in use.
    pub fn at(path: &Path, file: &Path) -> Option<Self> {
        let done = run("losetup", [path, file]);
        (done.code == Some(0)).then(|| LoopDevice { path: path.to_owned(), attached: true, partitions: 0 })
    }

    /// Tells the kernel of one more partition, which needs no table: its node.
    #[track_caller]
    pub fn add_partition(&mut self, start_bytes: u64, len_bytes: u64) -> PathBuf {
        let path = self.path.to_str().expect("UTF-8").to_owned();
        self.partitions += 1;
        let number = self.partitions.to_string();
        run("addpart", [&path, &number, &(start_bytes / 512).to_string(), &(len_bytes / 512).to_string()]).ok();
        let node = PathBuf::from(format!("{path}p{number}"));
        wait::until("the partition's node", || node.exists());
        node
    }

    fn delete_partitions(&self) {
        for number in 1..=self.partitions {
            let mut command = Command::new("delpart");
            command.arg(&self.path).arg(number.to_string());
            let _ = finish_within(command, Duration::from_secs(20));
        }
    }

    /// Detaches it and waits until the kernel has let go of the file.
    #[track_caller]
    pub fn detach(mut self) {
        self.attached = false;
        self.delete_partitions();
        run("losetup", [Path::new("-d"), &self.path]).ok();
        let backing = self.backing();
        wait::until("the loop device to let go of its file", || !backing.exists());
    }

    fn backing(&self) -> PathBuf {
        Path::new("/sys/block").join(self.path.file_name().expect("a name")).join("loop/backing_file")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.attached {
            self.delete_partitions();
            let mut command = Command::new("losetup");
            command.arg("-d").arg(&self.path);
            let _ = finish_within(command, Duration::from_secs(20));
            let backing = self.backing();
            wait::within(Duration::from_secs(10), || !backing.exists());
        }
    }
}

/// A mounted file system (not one of ours).
pub struct FileSystem {
    /// Where.
    pub path: PathBuf,
    mounted: bool,
}

impl FileSystem {
    /// Mounts with `mount ARGUMENTS DIRECTORY`, creating the directory.
    #[track_caller]
    pub fn mount(arguments: &[&str], directory: &Path) -> Self {
        fs::create_dir_all(directory).expect("mkdir");
        run("mount", arguments.iter().copied().chain([directory.to_str().expect("UTF-8")])).ok();
        FileSystem { path: directory.to_owned(), mounted: true }
    }

    /// Makes an ext4 file system on `device` and mounts it.
    #[track_caller]
    pub fn new_ext4(device: &Path, directory: &Path) -> Self {
        let device = device.to_str().expect("UTF-8");
        run("mkfs.ext4", ["-q", "-F", device]).ok();
        FileSystem::mount(&["-t", "ext4", device], directory)
    }

    /// Unmounts it.
    #[track_caller]
    pub fn unmount(mut self) {
        // A child that another test has just started has this one's open files until it has become what it is to be.
        let busy = |done: &Done| done.code == Some(32) && done.stderr.contains("busy");
        let done = wait::until_some("nobody to use the file system", || {
            Some(run("umount", [&self.path])).filter(|done| !busy(done))
        });
        done.ok();
        self.mounted = false;
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if self.mounted {
            let mut command = Command::new("umount");
            command.arg("-l").arg(&self.path);
            let _ = finish_within(command, Duration::from_secs(20));
        }
    }
}
