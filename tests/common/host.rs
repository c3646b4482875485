//! Another host: a network namespace of its own. Needs root, and a kernel that lets network namespaces be made.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::command::run;

/// A network namespace, and a link to it. Taken down when it is dropped.
pub struct Host {
    /// What `ip netns` calls it.
    pub name: String,
    link: String,
    net: u8,
}

impl Host {
    /// `None`: this kernel, or this container, does not allow it.
    pub fn new() -> Option<Self> {
        // Some tests of one process may have one each.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = (std::process::id() + 100 * NEXT.fetch_add(1, Relaxed)) % 60_000;
        let net = u8::try_from(number % 250).expect("less than 250") + 1;
        let host = Host { name: format!("lm{number}"), link: format!("lm{number}"), net };
        let peer = format!("{}p", host.link);
        let (ours, theirs) = (format!("10.213.{net}.1/30"), format!("10.213.{net}.2/30"));
        let name = host.name.as_str();
        let words: [&[&str]; 6] = [
            &["netns", "add", name],
            &["link", "add", &host.link, "type", "veth", "peer", "name", &peer, "netns", name],
            &["address", "add", &ours, "dev", &host.link],
            &["link", "set", &host.link, "up"],
            &["-n", name, "address", "add", &theirs, "dev", &peer],
            &["-n", name, "link", "set", &peer, "up"],
        ];
        for words in words {
            let done = run("ip", words.iter().copied());
            if done.code != Some(0) {
                eprintln!("SKIPPED: no network namespace can be made here: {done}");
                return None;
            }
        }
        Some(host)
    }

    /// Its address.
    pub fn address(&self) -> String {
        format!("10.213.{}.2", self.net)
    }

    /// The address of this host, as it is seen from there.
    pub fn our_address(&self) -> String {
        format!("10.213.{}.1", self.net)
    }

    /// Cuts the link.
    pub fn cut(&self) {
        run("ip", ["link", "set", &self.link, "down"]).ok();
    }

    /// Mends it.
    pub fn mend(&self) {
        run("ip", ["link", "set", &self.link, "up"]).ok();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The link goes with it.
        let _ = run("ip", ["netns", "del", &self.name]);
        let _ = run("ip", ["link", "del", &self.link]);
    }
}
