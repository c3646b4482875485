//! What is known of connections that have ended, and of those who used them.

use super::*;
use std::io::{Read, Write};
use std::net::TcpListener;

#[test]
fn an_export_is_not_opened_before_the_end_of_the_connection_before_was_read() {
    let uri = "nbd://ends.test/one";
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let end = OpenEnd::new(uri, ours.into(), User::new(false)).unwrap();
    let name = end.name.clone();
    assert_eq!(wait_for_all(uri, Duration::ZERO).unwrap_err().kind(), ErrorKind::Locked);
    wait_for_all("nbd://ends.test/other", Duration::ZERO).unwrap();
    let spelled = "nbds://Ends.test:10809/%6Fne";
    assert_eq!(wait_for_all(spelled, Duration::ZERO).unwrap_err().kind(), ErrorKind::Locked);
    // This process dies; another one takes the parked socket over.
    let OpenEnd { socket, .. } = end;
    OPEN.lock().retain(|entry| entry.name != name);
    inherit(&name, socket).unwrap();
    // The server reads all that was sent, works on it, and answers: only then is the export free.
    let mut rest = Vec::new();
    theirs.read_to_end(&mut rest).unwrap();
    assert!(wait_for_all(uri, Duration::ZERO).is_err(), "half-closed, but its end was not read");
    theirs.write_all(&[0; 100]).unwrap();
    drop(theirs);
    wait_for_all(uri, Duration::from_secs(60)).unwrap();
    let (other, _end) = UnixStream::pair().unwrap();
    assert!(inherit("image /disk.img", other.into()).is_err());
}

#[test]
fn a_connection_that_was_over_when_it_was_inherited_is_told_of_once() {
    let uri = "nbd://ends.test/over";
    let inherited = |number: u32| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (format!("{NAME}{number}.0 {uri}"), OwnedFd::from(ours), theirs)
    };
    let (name, ours, theirs) = inherited(1);
    inherit(&name, ours).unwrap();
    drop(theirs);
    wait_for_all(uri, Duration::from_secs(60)).unwrap();
    assert!(take_over(uri).is_none(), "its end came after it was inherited");
    let (name, ours, mut theirs) = inherited(2);
    theirs.write_all(&[0; 100]).unwrap();
    drop(theirs);
    inherit(&name, ours).unwrap();
    wait_for_all(uri, Duration::from_secs(60)).unwrap();
    assert!(take_over("nbd://ends.test/another").is_none());
    assert_eq!(take_over(uri).unwrap().len(), 1);
    assert!(take_over(uri).is_none());
}

#[test]
fn a_server_that_dies_after_its_connection_was_inherited_is_told_of_once() {
    let uri = "nbd://ends.test/dies";
    let (ours, theirs) = UnixStream::pair().unwrap();
    (&ours).write_all(&[0; 100]).unwrap();
    inherit(&format!("{NAME}3.0 {uri}"), ours.into()).unwrap();
    // Without a look at what it was sent: the kernel says so.
    drop(theirs);
    wait_for_all(uri, Duration::from_secs(60)).unwrap();
    assert_eq!(take_over(uri).unwrap().len(), 1);
    assert!(take_over(uri).is_none());
    // One that is not there, however often that is seen.
    note_away(uri);
    note_away(uri);
    assert!(take_over("nbd://ends.test/another").is_none());
    assert_eq!(take_over(uri).unwrap().len(), 1);
    assert!(take_over(uri).is_none());
}

/// A connection that the kernel gives up: its other end takes nothing.
fn given_up(uri: &str) -> (OpenEnd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    setsockopt(&ours, sockopt::TcpUserTimeout, &100).unwrap();
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 64 << 10]).is_ok() {}
    let end = OpenEnd::new(uri, ours.into(), User::new(false)).unwrap();
    let mut polled = [PollFd::new(end.socket(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::NONE).unwrap();
    (end, theirs)
}

#[test]
fn a_connection_that_the_kernel_gave_up_has_no_end() {
    let uri = "nbd://ends.test/given-up";
    let (end, _theirs) = given_up(uri);
    assert_eq!(end.read(None).unwrap_err().raw_os_error(), Some(libc::ETIMEDOUT));
    assert_eq!(wait_for_all(uri, Duration::ZERO).unwrap_err().kind(), ErrorKind::Locked);
    drop(end.forget());
    wait_for_all(uri, Duration::ZERO).unwrap();
    // Whoever used it was told before: from then on it looks like any other end.
    let (end, _theirs) = given_up(uri);
    let fault = end.fault();
    assert_eq!(fault, Some(Errno::ETIMEDOUT));
    assert_eq!(recv(end.socket.as_raw_fd(), &mut [0; 10], MsgFlags::MSG_DONTWAIT), Ok(0));
    assert_eq!(end.read(fault).unwrap_err().raw_os_error(), Some(libc::ETIMEDOUT));
    end.read(Some(Errno::ECONNRESET)).unwrap();
    drop(end.forget());
}

#[test]
fn an_export_is_known_by_who_answers() {
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let connect = |host: &str| OwnedFd::from(TcpStream::connect((host, port)).unwrap());
    let uri = |host: &str, export: &str| format!("nbd://{host}:{port}/{export}");
    let (one, two) = (User::new(false), User::new(false));
    let first = OpenEnd::new(&uri("localhost", "a"), connect("127.0.0.1"), one).unwrap();
    let second = OpenEnd::new(&uri("localhost", "a"), connect("127.0.0.1"), one).unwrap();
    for host in ["127.0.0.1", "127.0.0.2", "::1"] {
        let error = OpenEnd::new(&uri("other.test", "a"), connect(host), two).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        let text = error.to_string();
        assert!(text.contains(&uri("localhost", "a")) && text.contains(&uri("other.test", "a")), "{text}");
    }
    let other = OpenEnd::new(&uri("other.test", "b"), connect("127.0.0.1"), two).unwrap();
    let observer = OpenEnd::new(&uri("other.test", "a"), connect("127.0.0.1"), User::new(true)).unwrap();
    drop(listener);
    for end in [first, second, other, observer] {
        end.read(None).unwrap();
        drop(end.forget());
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    OpenEnd::new(&uri("other.test", "a"), socket.into(), two).unwrap();
}
