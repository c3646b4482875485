//! What the kernel knows of a TCP connection.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// From linux/tcp_states.h: the connection is gone.
const TCP_CLOSE: u8 = 7;

/// True if the kernel has given the connection up by itself: nothing of it is left, and the last that was sent, or asked for, was
/// not answered. False for a socket that is no TCP connection.
///
/// # Errors
/// It is no socket.
pub fn was_given_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    // `struct tcp_info` begins so, and the kernel writes no more than there is room for (tcp(7)): state, congestion state,
    // retransmissions and probes without an answer.
    let mut info = [0_u8; 4];
    let mut len = libc::socklen_t::try_from(info.len()).expect("four");
    let place: *mut c_void = info.as_mut_ptr().cast();
    // SAFETY: the socket is open as long as it is borrowed; the kernel writes at most `len` bytes, which are there.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut len) };
    if result == 0 {
        let [state, _, retransmits, probes] = info;
        return Ok(state == TCP_CLOSE && (retransmits, probes) != (0, 0));
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOPROTOOPT)) => Ok(false),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn connections_that_were_closed_or_reset_were_not_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!was_given_up(ours.as_fd()).unwrap());
        drop(listener.accept().unwrap());
        drop(listener);
        assert!(!was_given_up(ours.as_fd()).unwrap());
        let (unix, _other) = UnixStream::pair().unwrap();
        assert!(!was_given_up(unix.as_fd()).unwrap());
        assert!(was_given_up(File::open("/dev/null").unwrap().as_fd()).is_err());
    }
}
