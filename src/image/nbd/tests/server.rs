//! An NBD server that a test can make do what real ones do only when they must: lose its cache, fall silent, close when it likes.
//!
//! It speaks the newstyle handshake and simple replies, carries requests out one after the other for each connection, and
//! has a volatile cache, which [`Server::kill`] loses.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Bits of the transmission flags.
pub(super) const FLUSH: u16 = 4;
pub(super) const FUA: u16 = 8;
pub(super) const TRIM: u16 = 32;
pub(super) const ZEROES: u16 = 64;
pub(super) const MULTI_CONN: u16 = 256;

/// A request, as it was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u32,
}

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const FLUSHED: u16 = 3;
pub(super) const ZEROED: u16 = 6;

#[derive(Debug, Default)]
struct World {
    durable: Vec<u8>,
    cache: Vec<u8>,
    flags: u16,
    seen: Vec<Seen>,
    accepted: usize,
    /// Requests of this kind wait, before they are carried out.
    held: Option<u16>,
    waiting: usize,
    failing: Option<(u16, u32)>,
    fails_once: bool,
    /// Each takes so long, one after the other on a connection.
    delay: Duration,
    sockets: Vec<UnixStream>,
    dead: bool,
}

#[derive(Debug, Default)]
struct Shared {
    world: Mutex<World>,
    changed: Condvar,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Server {
    shared: Arc<Shared>,
    directory: tempfile::TempDir,
    listening: Option<JoinHandle<()>>,
}

impl Server {
    /// Exports `size` zeroes, with the abilities of `flags`.
    pub(super) fn new(size: usize, flags: u16) -> Self {
        let world = World { durable: vec![0; size], cache: vec![0; size], flags, ..World::default() };
        let shared = Arc::new(Shared { world: Mutex::new(world), changed: Condvar::new() });
        let mut server = Server { shared, directory: tempfile::tempdir().unwrap(), listening: None };
        server.listen();
        server
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path().display())
    }

    fn listen(&mut self) {
        let listener = UnixListener::bind(self.path()).unwrap();
        let shared = self.shared.clone();
        self.listening = Some(std::thread::spawn(move || {
            for socket in listener.incoming() {
                let socket = socket.unwrap();
                let mut world = shared.world.lock();
                if world.dead {
                    break;
                }
                world.accepted += 1;
                world.sockets.push(socket.try_clone().unwrap());
                drop(world);
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let again = socket.try_clone().unwrap();
                    let _ = serve(socket, &shared);
                    // There is another clone, by which a kill finds it.
                    let _ = again.shutdown(std::net::Shutdown::Both);
                });
            }
        }));
    }

    /// Dies, with everything that was not flushed.
    pub(super) fn kill(&mut self) {
        let mut world = self.shared.world.lock();
        world.dead = true;
        world.cache = world.durable.clone();
        world.held = None;
        for socket in world.sockets.drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        drop(world);
        self.shared.changed.notify_all();
        let _ = UnixStream::connect(self.path());
        if let Some(listening) = self.listening.take() {
            listening.join().unwrap();
        }
        let _ = std::fs::remove_file(self.path());
    }

    /// Starts again.
    pub(super) fn restart(&mut self) {
        self.shared.world.lock().dead = false;
        self.listen();
    }

    /// From now on requests of `kind` wait until [`Server::release`].
    pub(super) fn hold(&self, kind: u16) {
        self.shared.world.lock().held = Some(kind);
    }

    pub(super) fn release(&self) {
        self.shared.world.lock().held = None;
        self.shared.changed.notify_all();
    }

    /// Waits until so many requests are held.
    pub(super) fn wait_for_held(&self, count: usize) {
        let mut world = self.shared.world.lock();
        while world.waiting < count {
            self.shared.changed.wait(&mut world);
        }
    }

    /// Requests of `kind` are answered with an error number; `None`: they are not any more.
    pub(super) fn fail(&self, failing: Option<(u16, u32)>) {
        let mut world = self.shared.world.lock();
        (world.failing, world.fails_once) = (failing, false);
    }

    /// The next request of `kind` is answered with an error number.
    pub(super) fn fail_once(&self, kind: u16, number: u32) {
        let mut world = self.shared.world.lock();
        (world.failing, world.fails_once) = (Some((kind, number)), true);
    }

    /// From now on every request takes so long.
    pub(super) fn slow_down(&self, delay: Duration) {
        self.shared.world.lock().delay = delay;
    }

    /// The export gets another size, for connections to come.
    pub(super) fn resize(&self, size: usize) {
        let mut world = self.shared.world.lock();
        world.durable.resize(size, 0);
        world.cache.resize(size, 0);
    }

    /// It can do this, and no more, on connections to come.
    pub(super) fn change_flags(&self, flags: u16) {
        self.shared.world.lock().flags = flags;
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.shared.world.lock().seen.clone()
    }

    pub(super) fn accepted(&self) -> usize {
        self.shared.world.lock().accepted
    }

    /// What it holds, cache included.
    pub(super) fn content(&self) -> Vec<u8> {
        self.shared.world.lock().cache.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn number<const N: usize>(socket: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn serve(mut socket: UnixStream, shared: &Shared) -> std::io::Result<()> {
    socket.write_all(b"NBDMAGICIHAVEOPT")?;
    // Fixed newstyle, no zeroes.
    socket.write_all(&3_u16.to_be_bytes())?;
    number::<4>(&mut socket)?;
    loop {
        number::<8>(&mut socket)?;
        let option = number::<4>(&mut socket)?;
        let len = u32::from_be_bytes(number(&mut socket)?) as usize;
        let mut data = vec![0; len];
        socket.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(option);
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            socket.write_all(&bytes)
        };
        // NBD_OPT_GO; everything else is not supported.
        if option != 7_u32.to_be_bytes() {
            reply(0x8000_0001, &[])?;
            continue;
        }
        let (size, flags) = {
            let world = shared.world.lock();
            (world.cache.len() as u64, world.flags | 1)
        };
        let mut export = vec![0, 0];
        export.extend(size.to_be_bytes());
        export.extend(flags.to_be_bytes());
        reply(3, &export)?;
        // Block sizes: 512, 4096, 32 MiB.
        let mut blocks = vec![0, 3];
        [512_u32, 4096, 32 << 20].iter().for_each(|size| blocks.extend(size.to_be_bytes()));
        reply(3, &blocks)?;
        reply(1, &[])?;
        break;
    }
    loop {
        number::<4>(&mut socket)?;
        let flags = u16::from_be_bytes(number(&mut socket)?);
        let kind = u16::from_be_bytes(number(&mut socket)?);
        let cookie: [u8; 8] = number(&mut socket)?;
        let offset = u64::from_be_bytes(number(&mut socket)?);
        let len = u32::from_be_bytes(number(&mut socket)?);
        // NBD_CMD_DISC.
        if kind == 2 {
            return Ok(());
        }
        let mut payload = vec![0; if kind == WRITE { len as usize } else { 0 }];
        socket.read_exact(&mut payload)?;
        let (error, data) = carry_out(shared, Seen { kind, flags, offset, len }, &payload);
        let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(cookie);
        bytes.extend(data);
        socket.write_all(&bytes)?;
    }
}

fn carry_out(shared: &Shared, request: Seen, payload: &[u8]) -> (u32, Vec<u8>) {
    let delay = shared.world.lock().delay;
    std::thread::sleep(delay);
    let mut world = shared.world.lock();
    world.seen.push(request);
    world.waiting += 1;
    shared.changed.notify_all();
    while world.held == Some(request.kind) {
        shared.changed.wait(&mut world);
    }
    world.waiting -= 1;
    if let Some((_, error)) = world.failing.filter(|(kind, _)| *kind == request.kind) {
        if world.fails_once {
            world.failing = None;
        }
        return (error, Vec::new());
    }
    if world.dead {
        return (108, Vec::new());
    }
    let place = request.offset as usize..request.offset as usize + request.len as usize;
    let aligned = request.kind == FLUSHED || (request.offset % 512 == 0 && request.len % 512 == 0);
    if !aligned && place.end != world.cache.len() {
        return (22, Vec::new());
    }
    let mut data = Vec::new();
    match request.kind {
        READ => data.extend(&world.cache[place.clone()]),
        WRITE => world.cache[place.clone()].copy_from_slice(payload),
        FLUSHED => world.durable = world.cache.clone(),
        // Trim: what is read afterwards is not defined. Write zeroes.
        4 => world.cache[place.clone()].fill(0xEE),
        ZEROED => world.cache[place.clone()].fill(0),
        _ => return (22, Vec::new()),
    }
    if request.flags & 1 != 0 {
        let bytes = world.cache[place.clone()].to_vec();
        world.durable[place].copy_from_slice(&bytes);
    }
    (0, data)
}
