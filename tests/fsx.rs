//! Random operations against a model, in the manner of `fsx`: reads, writes, punches, zeroed ranges, preallocation, truncates
//! on a growable disk, shared mappings, syncs; aligned or not, direct or not. It goes on across two mirrors and two cutovers,
//! and in the end the image itself must hold what the model holds. The seed is printed; a failure shows the last operations.

mod common;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use common::aligned::Aligned;
use common::command::long;
use common::mmap::SharedMap;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::random::{self, Random};
use common::space::{FallocateFlags, KEEP, PREALLOCATE, PUNCH, ZERO, allocate};

const SIZE_MAX: u64 = 3 << 20;
const PAGE: u64 = 4096;

struct Tester {
    files: [File; 2],
    growable: bool,
    /// A mirror may refuse that the size changes while it runs.
    mirroring: bool,
    model: Vec<u8>,
    random: Random,
    history: VecDeque<String>,
    count: u64,
    refusals: u64,
}

impl Tester {
    fn new(disk: &Path, model: Vec<u8>, growable: bool, seed: u64) -> Self {
        let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(disk).expect("open");
        Tester {
            files: [open(0), open(libc::O_DIRECT)],
            growable,
            mirroring: false,
            model,
            random: Random::new(seed, 0),
            history: VecDeque::new(),
            count: 0,
            refusals: 0,
        }
    }

    fn run(&mut self, operations: u64) {
        for _ in 0..operations {
            self.count += 1;
            self.step();
            if self.count % 300 == 0 {
                self.check_all();
            }
        }
    }

    fn step(&mut self) {
        match self.random.below(if self.growable { 24 } else { 21 }) {
            0..6 => self.read(),
            6..12 => self.write(),
            12..14 => self.zero("punch", PUNCH),
            14..16 => self.zero("zero", ZERO | KEEP),
            16 => self.preallocate(),
            17..19 => self.map(),
            19 => self.files[0].sync_data().expect("fdatasync"),
            20 => self.files[1].sync_all().expect("fsync"),
            21..23 => self.truncate(),
            _ => self.append(),
        }
    }

    fn file(&mut self) -> usize {
        self.random.below(2) as usize
    }

    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    fn note(&mut self, what: String) {
        self.history.push_back(format!("{}: {what} (size {})", self.count, self.model.len()));
        if self.history.len() > 25 {
            self.history.pop_front();
        }
    }

    #[track_caller]
    fn fail(&self, what: &str) -> ! {
        let history: Vec<&str> = self.history.iter().map(String::as_str).collect();
        panic!("{what}\nthe last operations:\n{}", history.join("\n"))
    }

    /// A range that starts in the disk or at its end, often aligned, often small, and may reach past the end.
    fn range(&mut self) -> (u64, u64) {
        let unit = [1, 1, 512, PAGE, 65_536][self.random.below(5) as usize];
        let len_max = [100, 5_000, 70_000, 300_000][self.random.below(4) as usize];
        let start = self.random.between(0, self.size()) / unit * unit;
        let len = (self.random.between(1, len_max)).next_multiple_of(unit);
        (start, len.min(SIZE_MAX - start.min(SIZE_MAX - 1)).max(1))
    }

    fn read(&mut self) {
        let ((start, len), file) = (self.range(), self.file());
        self.note(format!("read {start}+{len} through {file}"));
        let mut bytes = Aligned::zeroed(len as usize);
        let read =
            self.files[file].read_at(&mut bytes, start).unwrap_or_else(|error| self.fail(&format!("read: {error}")));
        let wanted = &self.model[start as usize..(start + len).min(self.size()) as usize];
        if read != wanted.len() {
            self.fail(&format!("read returned {read} bytes, not {}", wanted.len()));
        }
        if let Some(first) = (0..read).find(|&at| bytes[at] != wanted[at]) {
            let (found, wanted) = (bytes[first], wanted[first]);
            self.fail(&format!("byte {} is {found:#x}, not {wanted:#x}", start + first as u64));
        }
    }

    fn write(&mut self) {
        let ((start, len), file) = (self.range(), self.file());
        let len = if self.growable { len } else { len.min(self.size() - start) };
        let mut bytes = Aligned::zeroed(len as usize);
        if !self.random.one_in(10) {
            self.random.fill(&mut bytes);
        }
        self.note(format!("write {start}+{len} through {file}"));
        self.write_at(file, start, &bytes);
    }

    fn append(&mut self) {
        let len = self.random.between(1, 20_000).min(SIZE_MAX.saturating_sub(self.size()));
        let bytes = Aligned::copy_of(&self.random.bytes(len as usize));
        self.note(format!("append {len}"));
        self.write_at(0, self.size(), &bytes);
    }

    fn write_at(&mut self, file: usize, start: u64, bytes: &[u8]) {
        let end = start + bytes.len() as u64;
        match self.files[file].write_at(bytes, start) {
            Ok(written) if written == bytes.len() => {
                let size = self.size().max(if bytes.is_empty() { 0 } else { end });
                self.model.resize(size as usize, 0);
                self.model[start as usize..end as usize].copy_from_slice(bytes);
            }
            Ok(written) if end > self.size() => self.adopt(start, &bytes[..written], "short write"),
            Ok(written) => self.fail(&format!("wrote {written} of {} bytes", bytes.len())),
            Err(error) if end > self.size() => self.adopt(start, bytes, &error.to_string()),
            Err(error) => self.fail(&format!("write: {error}")),
        }
    }

    /// A write past the end was refused, as a mirror may do: what was there before the end is the old or the new byte.
    fn adopt(&mut self, start: u64, bytes: &[u8], error: &str) {
        if !self.mirroring {
            self.fail(&format!("a write past the end: {error}"));
        }
        self.refusals += 1;
        self.check_size();
        let end = (start + bytes.len() as u64).min(self.size());
        let mut found = vec![0; end.saturating_sub(start) as usize];
        self.files[0].read_exact_at(&mut found, start).expect("read");
        for (at, &byte) in found.iter().enumerate() {
            let old = &mut self.model[start as usize + at];
            if byte != *old && byte != bytes[at] {
                self.fail(&format!("after a refused write, byte {} is neither old nor new", start + at as u64));
            }
            *old = byte;
        }
    }

    fn zero(&mut self, name: &str, mode: FallocateFlags) {
        let ((start, len), file) = (self.range(), self.file());
        self.note(format!("{name} {start}+{len}"));
        if let Err(error) = allocate(&self.files[file], mode, start, len) {
            self.fail(&format!("{name}: {error}"));
        }
        let end = (start + len).min(self.size());
        self.model[start as usize..end as usize].fill(0);
    }

    fn preallocate(&mut self) {
        let (start, len) = self.range();
        let keep = !self.growable || self.random.one_in(2);
        let len = if self.growable { len } else { len.min(self.size() - start).max(1) };
        self.note(format!("preallocate {start}+{len} keep size {keep}"));
        let mode = if keep { KEEP } else { PREALLOCATE };
        let result = allocate(&self.files[0], mode, start, len);
        let end = start + len;
        match result {
            Ok(()) if !keep => self.model.resize(self.size().max(end) as usize, 0),
            Ok(()) => (),
            Err(_) if end > self.size() && (self.mirroring || !self.growable) => self.refusals += 1,
            Err(error) => self.fail(&format!("preallocate: {error}")),
        }
        self.check_size();
    }

    fn truncate(&mut self) {
        let size = self.random.between(1, SIZE_MAX);
        self.note(format!("truncate to {size}"));
        let file = self.file();
        match self.files[file].set_len(size) {
            Ok(()) => self.model.resize(size as usize, 0),
            Err(_) if self.mirroring => self.refusals += 1,
            Err(error) => self.fail(&format!("truncate: {error}")),
        }
        self.check_size();
    }

    fn map(&mut self) {
        let (start, len) = self.range();
        let end = (start + len).min(self.size());
        if end <= start {
            return;
        }
        let base = start / PAGE * PAGE;
        let write = self.random.one_in(2);
        self.note(format!("map {start}+{}, write {write}", end - start));
        let map = SharedMap::new(&self.files[0], base, (end - base) as usize);
        let map = map.unwrap_or_else(|error| self.fail(&format!("mmap: {error}")));
        let at = (start - base) as usize;
        if write {
            let bytes = self.random.bytes((end - start) as usize);
            map.write(at, &bytes);
            self.model[start as usize..end as usize].copy_from_slice(&bytes);
            if self.random.one_in(2) {
                map.sync().unwrap_or_else(|error| self.fail(&format!("msync: {error}")));
            }
        } else {
            let mut bytes = vec![0; (end - start) as usize];
            map.read(at, &mut bytes);
            if bytes != self.model[start as usize..end as usize] {
                self.fail("a mapping shows other bytes");
            }
        }
    }

    fn check_size(&self) {
        let size = self.files[0].metadata().expect("fstat").len();
        if size != self.size() {
            self.fail(&format!("the size is {size}, not {}", self.size()));
        }
    }

    fn check_all(&mut self) {
        self.note("check all".to_owned());
        self.check_size();
        let mut bytes = vec![0; self.model.len()];
        self.files[0].read_exact_at(&mut bytes, 0).expect("read");
        self.compare(&bytes, "the disk");
    }

    #[track_caller]
    fn compare(&self, bytes: &[u8], what: &str) {
        if bytes.len() != self.model.len() {
            self.fail(&format!("{what} has {} bytes, not {}", bytes.len(), self.model.len()));
        }
        if let Some(first) = (0..bytes.len()).find(|&at| bytes[at] != self.model[at]) {
            self.fail(&format!("{what}: byte {first} is {:#x}, not {:#x}", bytes[first], self.model[first]));
        }
    }
}

/// Runs a command while the tester goes on, and then a little longer.
fn meanwhile(tester: &mut Tester, operations: u64, command: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let command = scope.spawn(command);
        while !command.is_finished() {
            tester.run(5);
        }
        command.join().expect("the command");
    });
    tester.run(operations);
}

fn across_two_moves(place: &Place, size: u64, options: &[&str], mirror_options: &[&str]) -> io::Result<()> {
    let seed = random::seed();
    let operations = if long() { 20_000 } else { 1_500 };
    let a = place.random("a.img", size, seed);
    let model = std::fs::read(&a)?;
    let mounted = Mount::of(place, [&a]).with(options.iter().copied()).start();
    let mut tester = Tester::new(&mounted.disk("a.img"), model, options.contains(&"--growable"), seed);
    tester.run(operations);
    let mut last = a;
    for name in ["b.img", "c.img"] {
        let target = place.at(name);
        one_move(&mounted, &mut tester, &target, mirror_options, operations);
        last = target;
    }
    tester.check_all();
    println!("{} operations, {} of them refused while a mirror ran", tester.count, tester.refusals);
    tester.files = [File::open("/dev/null")?, File::open("/dev/null")?];
    mounted.unmount();
    tester.compare(&std::fs::read(last)?, "the image");
    Ok(())
}

fn one_move(mounted: &Mounted, tester: &mut Tester, target: &Path, options: &[&str], operations: u64) {
    tester.mirroring = true;
    meanwhile(tester, operations, || mounted.mirror(target, options));
    meanwhile(tester, operations, || mounted.wait_ready());
    meanwhile(tester, 0, || mounted.cutover());
    tester.mirroring = false;
    tester.run(operations);
}

#[test]
fn a_fixed_disk() -> io::Result<()> {
    across_two_moves(&Place::in_memory(), 2 << 20, &[], &["--granularity", "4K"])
}

#[test]
fn a_growable_disk() -> io::Result<()> {
    across_two_moves(&Place::in_memory(), 1_234_567, &["--growable"], &[])
}

#[test]
fn a_growable_disk_with_direct_io_to_the_images() -> io::Result<()> {
    across_two_moves(&Place::on_disk(), 1_234_567, &["--growable", "-o", "cache=none"], &["--granularity", "512"])
}

#[test]
fn a_fixed_disk_of_odd_size_in_write_blocking_mode() -> io::Result<()> {
    across_two_moves(&Place::on_disk(), 1_234_567, &["-o", "cache=none"], &["--copy-mode", "write-blocking"])
}

#[test]
fn a_growable_disk_in_write_blocking_mode() -> io::Result<()> {
    across_two_moves(&Place::in_memory(), 99_999, &["--growable"], &["--copy-mode", "write-blocking"])
}

/// The model itself, tried on a plain file; and on one that loses a byte.
#[test]
fn the_model_is_right_about_plain_files_and_notices_damage() -> io::Result<()> {
    let (place, seed) = (Place::on_disk(), random::seed());
    let path = place.random("plain", 1_234_560 / PAGE * PAGE, seed);
    let mut tester = Tester::new(&path, std::fs::read(&path)?, true, seed);
    // A plain file takes only aligned direct requests, other than a disk in a mount.
    tester.files[1] = OpenOptions::new().read(true).write(true).open(&path)?;
    tester.run(3_000);
    let middle = tester.size() / 2;
    tester.files[0].write_all_at(&[!tester.model[middle as usize]], middle)?;
    let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| tester.check_all()));
    assert!(noticed.is_err());
    Ok(())
}
