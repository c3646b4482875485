//! A file workload whose end state is known: files that threads create, overwrite, extend, truncate, rename and remove, each
//! remembered with its content.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::random::Random;
use super::wait;

/// What a directory tree should hold: file names and contents.
pub type Manifest = BTreeMap<PathBuf, Vec<u8>>;

/// The most that one thread keeps in files.
const FILES_MAX: usize = 24;
const FILE_BYTES_MAX: u64 = 200_000;

/// Threads that work on files below a directory, each in a subdirectory of its own.
pub struct Workload {
    stop: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<Manifest>>>,
}

impl Workload {
    /// Starts `threads` threads.
    pub fn start(root: &Path, threads: u64, seed: u64) -> Self {
        let (stop, steps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let start = |number| {
            let directory = root.join(format!("thread-{number}"));
            let (stop, steps) = (Arc::clone(&stop), Arc::clone(&steps));
            std::thread::spawn(move || {
                fs::create_dir(&directory)?;
                let mut worker =
                    Worker { directory, files: Manifest::new(), random: Random::new(seed, number), next: 0 };
                while !stop.load(Ordering::SeqCst) {
                    worker.step()?;
                    steps.fetch_add(1, Ordering::SeqCst);
                }
                Ok(worker.files)
            })
        };
        let threads = (0..threads).map(start).collect();
        Workload { stop, steps, threads }
    }

    /// Waits until `count` more operations were done.
    #[track_caller]
    pub fn wait_for_more(&self, count: u64) {
        let goal = self.steps.load(Ordering::SeqCst) + count;
        let failed = || self.threads.iter().any(JoinHandle::is_finished);
        wait::until("the file workload to go on", || self.steps.load(Ordering::SeqCst) >= goal || failed());
        assert!(!failed(), "the file workload failed; Workload::stop says why");
    }

    /// Stops it; what the files should be now, by absolute path.
    #[track_caller]
    pub fn stop(mut self) -> Manifest {
        let mut all = Manifest::new();
        for result in self.join() {
            all.append(&mut result.expect("the file workload"));
        }
        all
    }

    fn join(&mut self) -> Vec<io::Result<Manifest>> {
        self.stop.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut self.threads).into_iter();
        threads.map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))).collect()
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.join();
    }
}

struct Worker {
    directory: PathBuf,
    files: Manifest,
    random: Random,
    next: u64,
}

impl Worker {
    fn step(&mut self) -> io::Result<()> {
        if self.files.is_empty() || (self.files.len() < FILES_MAX && self.random.one_in(4)) {
            return self.create();
        }
        let index = self.random.below(self.files.len() as u64) as usize;
        let path = self.files.keys().nth(index).cloned().unwrap_or_default();
        match self.random.below(8) {
            0 => {
                fs::remove_file(&path)?;
                self.files.remove(&path);
            }
            1 => {
                let new = self.name();
                fs::rename(&path, &new)?;
                if let Some(content) = self.files.remove(&path) {
                    self.files.insert(new, content);
                }
            }
            2 => {
                let len = self.random.below(FILE_BYTES_MAX);
                OpenOptions::new().write(true).open(&path)?.set_len(len)?;
                self.content(&path).resize(len as usize, 0);
            }
            3 => {
                let read = fs::read(&path)?;
                if read != *self.content(&path) {
                    return Err(io::Error::other(format!("{} is not what was written", path.display())));
                }
            }
            _ => self.overwrite(&path)?,
        }
        Ok(())
    }

    fn content(&mut self, path: &Path) -> &mut Vec<u8> {
        self.files.entry(path.to_owned()).or_default()
    }

    fn name(&mut self) -> PathBuf {
        self.next += 1;
        self.directory.join(format!("file-{}", self.next))
    }

    fn create(&mut self) -> io::Result<()> {
        let path = self.name();
        let len = self.random.below(FILE_BYTES_MAX) as usize;
        let content = self.random.bytes(len);
        let file = File::create_new(&path)?;
        file.write_all_at(&content, 0)?;
        if self.random.one_in(3) {
            file.sync_all()?;
        }
        self.files.insert(path, content);
        Ok(())
    }

    fn overwrite(&mut self, path: &Path) -> io::Result<()> {
        let at = self.random.below(FILE_BYTES_MAX / 2) as usize;
        let len = self.random.below(FILE_BYTES_MAX / 2) as usize;
        let bytes = self.random.bytes(len);
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(&bytes, at as u64)?;
        if self.random.one_in(3) {
            file.sync_data()?;
        }
        let content = self.content(path);
        if len > 0 {
            content.resize(content.len().max(at + len), 0);
            content[at..at + len].copy_from_slice(&bytes);
        }
        Ok(())
    }
}

/// Panics unless the files below `new_root` are those of `manifest`, which was made below `old_root`: no more, no fewer.
#[track_caller]
pub fn assert_files(manifest: &Manifest, old_root: &Path, new_root: &Path) {
    let mut found = Vec::new();
    for directory in fs::read_dir(new_root).expect("readdir").flatten().map(|entry| entry.path()) {
        if directory.file_name().is_some_and(|name| name != "lost+found") {
            found.extend(fs::read_dir(&directory).expect("readdir").flatten().map(|entry| entry.path()));
        }
    }
    found.sort();
    let moved = |path: &PathBuf| new_root.join(path.strip_prefix(old_root).expect("below the old root"));
    let mut wanted: Vec<PathBuf> = manifest.keys().map(moved).collect();
    wanted.sort();
    assert_eq!(found, wanted, "other files than those that were made");
    for (path, content) in manifest {
        assert!(fs::read(moved(path)).expect("read") == *content, "{} has other content", path.display());
    }
}
