//! NBD servers, as guards: nbdkit with its filters, and qemu-nbd.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::command::run;
use super::place::Place;
use super::wait;

/// Where a server listens.
#[derive(Clone, Debug)]
enum At {
    Socket(PathBuf),
    Port(SocketAddr),
}

/// A running server. Ended when it is dropped.
pub struct Server {
    program: String,
    arguments: Vec<String>,
    at: At,
    child: Option<Child>,
}

impl Server {
    /// `nbdkit ARGUMENTS` at a socket called `name` in `place`.
    #[track_caller]
    pub fn nbdkit(place: &Place, name: &str, arguments: &[&str]) -> Self {
        let socket = place.at(name);
        let mut words = vec!["-f".to_owned(), "-U".to_owned(), socket.display().to_string()];
        words.extend(arguments.iter().map(|word| (*word).to_owned()));
        Server::start("nbdkit", words, At::Socket(socket))
    }

    /// `nbdkit ARGUMENTS` in the network namespace `host`, at its `address`.
    #[track_caller]
    pub fn nbdkit_at(host: &str, address: &str, arguments: &[&str]) -> Self {
        // `ip netns exec` would give it a mount namespace too, in which our mounts outlived their unmounting.
        let network = format!("--net=/run/netns/{host}");
        let at = [&network, "nbdkit", "-f", "-i", address, "-p", "10809"];
        let words = at.iter().chain(arguments).map(|word| (*word).to_owned()).collect();
        let address = SocketAddr::new(address.parse().expect("an address"), 10809);
        Server::start("nsenter", words, At::Port(address))
    }

    /// `nbdkit ARGUMENTS` at a free port of this host.
    #[track_caller]
    pub fn nbdkit_tcp(arguments: &[&str]) -> Self {
        Server::nbdkit_on("127.0.0.1", arguments)
    }

    /// `nbdkit ARGUMENTS` at a free port of one address of this host.
    #[track_caller]
    pub fn nbdkit_on(address: &str, arguments: &[&str]) -> Self {
        let port = free_port();
        let mut words = vec!["-f".to_owned(), "-i".to_owned(), address.to_owned(), "-p".to_owned(), port.to_string()];
        words.extend(arguments.iter().map(|word| (*word).to_owned()));
        Server::start("nbdkit", words, At::Port(SocketAddr::new(address.parse().expect("an address"), port)))
    }

    /// A server of `image` that can do as little as there is, and what `abilities` say: filters, and methods of nbdkit's eval plugin.
    #[track_caller]
    pub fn script(place: &Place, name: &str, image: &Path, abilities: &[&str]) -> Self {
        let image = image.display();
        // Methods are the words with a script.
        let (methods, filters): (Vec<&str>, Vec<&str>) =
            abilities.iter().partition(|word| word.contains('=') && !word.starts_with('-'));
        let base = [
            format!("get_size=stat -c %s {image}"),
            format!("pread=dd if={image} skip=$4 count=$3 iflag=skip_bytes,count_bytes bs=1M status=none"),
            format!("pwrite=dd of={image} seek=$4 oflag=seek_bytes iflag=fullblock bs=1M conv=notrunc status=none"),
            "can_write=exit 0".to_owned(),
        ];
        let flush = format!("flush=sync {image}");
        let mut base: Vec<&str> = base.iter().map(String::as_str).collect();
        base.extend(abilities.contains(&"can_flush=exit 0").then_some(flush.as_str()));
        let name_of = |word: &str| word.split('=').next().map(str::to_owned);
        base.retain(|word| methods.iter().all(|other| name_of(other) != name_of(word)));
        Server::nbdkit(place, name, &[filters, vec!["eval"], base, methods].concat())
    }

    /// `qemu-nbd` of an image at a socket called `name` in `place`.
    #[track_caller]
    pub fn qemu(place: &Place, name: &str, format: &str, image: &Path) -> Self {
        let socket = place.at(name);
        let words = ["-t", "-e", "8", "--discard=unmap", "--cache=writeback", "-f", format, "-k"];
        let mut words: Vec<String> = words.map(str::to_owned).to_vec();
        words.extend([socket.display().to_string(), image.display().to_string()]);
        Server::start("qemu-nbd", words, At::Socket(socket))
    }

    /// `qemu-nbd` of an image at a free port of this host, its export called `export`.
    #[track_caller]
    pub fn qemu_tcp(export: &str, format: &str, image: &Path) -> Self {
        let port = free_port();
        let words = ["-t", "-e", "8", "--discard=unmap", "--cache=writeback", "-f", format, "-b", "127.0.0.1", "-x"];
        let mut words: Vec<String> = words.map(str::to_owned).to_vec();
        words.extend([export.to_owned(), "-p".to_owned(), port.to_string(), image.display().to_string()]);
        Server::start("qemu-nbd", words, At::Port((Ipv4Addr::LOCALHOST, port).into()))
    }

    #[track_caller]
    fn start(program: &str, arguments: Vec<String>, at: At) -> Self {
        let mut server = Server { program: program.to_owned(), arguments, at, child: None };
        server.restart();
        server
    }

    /// Starts it, if it does not run, and waits until it listens.
    #[track_caller]
    pub fn restart(&mut self) {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null());
        // They complain of every connection that ends without a word, of the ones below first of all.
        command.stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.program)));
        wait::until("the NBD server to listen", || {
            let child = self.child.as_mut().expect("just started");
            let ended = child.try_wait().expect("wait");
            assert!(ended.is_none(), "{} {:?} has ended: {ended:?}", self.program, self.arguments);
            match &self.at {
                At::Socket(path) => UnixStream::connect(path).is_ok(),
                At::Port(address) => TcpStream::connect(address).is_ok(),
            }
        });
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().expect("it runs").id();
        kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).expect("kill");
    }

    /// Freezes it, and waits until every thread of it stands still: one that is being woken might take one more request.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let pid = self.child.as_ref().expect("it runs").id();
        wait::until("the NBD server to stand still", || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten();
            let mut states = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
            states.all(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
        });
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let At::Socket(path) = &self.at {
            let _ = fs::remove_file(path);
        }
    }

    /// The URI of its default export.
    pub fn uri(&self) -> PathBuf {
        self.export("")
    }

    /// The URI of an export.
    pub fn export(&self, name: &str) -> PathBuf {
        PathBuf::from(match &self.at {
            At::Socket(path) => format!("nbd+unix:///{name}?socket={}", path.display()),
            At::Port(address) => format!("nbd://{address}/{name}"),
        })
    }

    /// The port that it listens at.
    pub fn port(&self) -> u16 {
        match self.at {
            At::Port(address) => address.port(),
            At::Socket(_) => panic!("it listens at a socket"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// Copies an export to a new sparse file, with another program than ours.
#[track_caller]
pub fn copy_out(uri: &Path, file: &Path) -> PathBuf {
    run("nbdcopy", [uri, file]).ok();
    file.to_owned()
}

/// A certificate authority and a server's certificate for `localhost` and `address`, as nbdkit and libnbd look for them.
pub fn certificates(place: &Place, address: &str) -> PathBuf {
    let pki = place.directory("pki");
    let at = |name: &str| pki.join(name).display().to_string();
    fs::write(at("ca.info"), "cn = Test\nca\ncert_signing_key\n").unwrap();
    let names = format!("cn = localhost\ndns_name = localhost\nip_address = {address}\n");
    fs::write(at("server.info"), names + "tls_www_server\nencryption_key\nsigning_key\n").unwrap();
    let tool = |words: &[&str]| run("certtool", words.iter().copied()).ok();
    for key in ["ca-key.pem", "server-key.pem"] {
        tool(&["--generate-privkey", "--key-type=ecdsa", "--outfile", &at(key)]);
    }
    let ca = ["--load-privkey", &at("ca-key.pem"), "--template", &at("ca.info"), "--outfile", &at("ca-cert.pem")];
    tool(&[&["--generate-self-signed"], &ca[..]].concat());
    tool(&[
        "--generate-certificate",
        "--load-ca-certificate",
        &at("ca-cert.pem"),
        "--load-ca-privkey",
        &at("ca-key.pem"),
        "--load-privkey",
        &at("server-key.pem"),
        "--template",
        &at("server.info"),
        "--outfile",
        &at("server-cert.pem"),
    ]);
    pki
}
