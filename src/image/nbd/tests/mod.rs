//! NBD images against a server that dies, falls silent and forgets at the worst moments.

mod server;

use std::path::Path;
use std::time::{Duration, Instant};

use self::server::{FLUSH, FLUSHED, FUA, MULTI_CONN, READ, Seen, Server, TRIM, WRITE, ZEROED, ZEROES};
use super::image::NbdImage;
use super::kept::KEPT_BYTES_MAX;
use super::link::Patience;
use crate::image::tests::model;
use crate::image::{Image, OpenOptions};
use crate::range::ByteRange;
use crate::sync::Arc;
use crate::sys::libnbd;
use proptest::prelude::*;

const SIZE: usize = 1 << 20;
/// Longer than anything takes that is not stuck, on a busy machine too.
const LONG: Duration = Duration::from_secs(60);
/// Long enough for something to happen that must not; a test that waits it out proves little by itself.
const MOMENT: Duration = Duration::from_millis(100);

fn patience(reconnect: Duration, answer: Duration) -> Patience {
    Patience { reconnect, answer, flush: answer, connect: LONG }
}

/// The server's export as an image; `None` where the library is not installed.
fn open(server: &Server, patience: Patience) -> Option<NbdImage> {
    match libnbd::library() {
        Ok(library) => Some(NbdImage::open(library, &server.uri(), patience, true, false, false).unwrap()),
        Err(why) => {
            eprintln!("SKIPPED: {why}");
            None
        }
    }
}

fn patient(server: &Server) -> Option<NbdImage> {
    open(server, patience(LONG, LONG))
}

fn writes(seen: &[Seen]) -> usize {
    seen.iter().filter(|seen| seen.kind == WRITE).count()
}

fn read(image: &NbdImage, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xAA; len];
    image.read_at(offset, &mut bytes).unwrap();
    bytes
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "hangs: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_a_server_lost_in_its_death_it_gets_again_in_order() {
    for flags in [FLUSH | ZEROES, FLUSH | ZEROES | MULTI_CONN, FLUSH] {
        let mut server = Server::new(SIZE, flags);
        let Some(image) = patient(&server) else { return };
        image.write_at(0, &[1; 8192]).unwrap();
        image.flush().unwrap();
        let flushed = writes(&server.seen());
        // Overlapping, unaligned, zeroes over data and data over zeroes.
        image.write_at(4096, &[2; 4096]).unwrap();
        image.write_at(5000, &[3; 100]).unwrap();
        image.write_zeroes(ByteRange::new(6000, 3000)).unwrap();
        image.write_at(7000, &[4; 10]).unwrap();
        let before = server.content();
        server.kill();
        assert!(server.content() != before, "this server forgets what was not flushed");
        server.restart();
        assert_eq!(read(&image, 5000, 100), [3; 100]);
        assert!(server.content() == before, "with flags {flags}");
        // The flushed one was not sent again.
        let first = Seen { kind: WRITE, flags: 0, offset: 0, len: 8192 };
        assert_eq!(server.seen().iter().filter(|seen| **seen == first).count(), flushed);
        // A second death, after a flush: nothing is left to be sent.
        image.flush().unwrap();
        let sent = writes(&server.seen());
        server.kill();
        server.restart();
        assert_eq!(read(&image, 7000, 10), [4; 10]);
        assert_eq!(writes(&server.seen()), sent);
        assert!(server.content() == before);
    }
}

#[test]
fn zeroes_that_a_server_does_not_make_are_written_to_it_and_so_again() {
    let mut server = Server::new(SIZE, FLUSH | ZEROES);
    let Some(image) = patient(&server) else { return };
    image.write_at(0, &[1; 65536]).unwrap();
    image.flush().unwrap();
    // It says that it can, and then that it cannot (ENOTSUP).
    server.fail(Some((ZEROED, 95)));
    image.write_zeroes(ByteRange::new(4096, 8192)).unwrap();
    image.discard(ByteRange::new(32768, 4096)).unwrap();
    let before = server.content();
    assert!(before[4096..12288] == [0; 8192] && before[32768..36864] == [0; 4096]);
    server.kill();
    server.restart();
    assert_eq!(read(&image, 4096, 8192), [0; 8192]);
    assert!(server.content() == before);
    image.flush().unwrap();
}

#[test]
fn a_server_that_takes_long_to_be_brought_up_to_date_is_waited_for() {
    let reconnect = Duration::from_secs(3);
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = open(&server, patience(reconnect, reconnect)) else { return };
    let count = 200_u64;
    (0..count).for_each(|number| image.write_at(number * 512, &[number as u8; 512]).unwrap());
    // And one over many others, which must come after them.
    image.write_at(0, &[0xFF; 8192]).unwrap();
    let before = server.content();
    server.kill();
    server.slow_down(Duration::from_millis(50));
    server.restart();
    // In all it takes longer than a request waits for its server, and than the request itself may take.
    assert_eq!(read(&image, 8192, 512), [16; 512]);
    assert!(server.content() == before);
}

#[test]
fn a_write_that_a_server_had_not_answered_is_sent_to_the_next_one() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = patient(&server) else { return };
    server.hold(WRITE);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| image.write_at(512, &[7; 512]));
        server.wait_for_held(1);
        server.kill();
        std::thread::sleep(MOMENT);
        assert!(!writer.is_finished(), "it waits for the connection");
        server.restart();
        writer.join().unwrap().unwrap();
    });
    assert_eq!(read(&image, 512, 512), [7; 512]);
    assert_eq!(server.content()[512..1024], [7; 512]);
}

#[test]
fn what_is_kept_is_bounded_by_flushes() {
    let server = Server::new(SIZE, FLUSH);
    let Some(image) = patient(&server) else { return };
    let piece = vec![5; SIZE];
    let pieces = KEPT_BYTES_MAX / SIZE as u64 + 1;
    (0..pieces).for_each(|_| image.write_at(0, &piece).unwrap());
    let flushes = |server: &Server| server.seen().iter().filter(|seen| seen.kind == FLUSHED).count();
    assert_eq!(flushes(&server), 1);
    // One that fails concerns what was written before: the next flush of the user's says so, once.
    server.fail(Some((FLUSHED, 5)));
    (0..pieces).for_each(|_| image.write_at(0, &piece).unwrap());
    server.fail(None);
    assert_eq!(image.flush().unwrap_err().errno(), libc::EIO);
    image.flush().unwrap();
}

#[test]
fn without_a_flush_every_write_is_made_durable() {
    let mut server = Server::new(SIZE, FUA | ZEROES);
    let Some(image) = patient(&server) else { return };
    image.write_at(0, &[1; 4096]).unwrap();
    image.write_zeroes(ByteRange::new(1024, 1024)).unwrap();
    image.flush().unwrap();
    assert!(server.seen().iter().all(|seen| seen.kind == READ || seen.flags & 1 != 0), "{:?}", server.seen());
    let before = server.content();
    server.kill();
    server.restart();
    assert_eq!(read(&image, 0, 1024), [1; 1024]);
    assert!(server.content() == before);
}

#[test]
fn a_silent_server_hangs_nobody_and_nothing_lands_late() {
    let server = Server::new(SIZE, FLUSH | MULTI_CONN);
    let Some(image) = open(&server, patience(Duration::ZERO, Duration::from_millis(300))) else { return };
    image.write_at(8192, &[1; 4096]).unwrap();
    server.hold(WRITE);
    let error = image.write_at(0, &[2; 4096]).unwrap_err();
    assert!(error.to_string().contains(&server.uri()) && error.to_string().contains("does not answer"), "{error}");
    // It may still be done. Nobody writes there, nobody believes what is read there, no flush says that all is well.
    let held = server.seen().len();
    image.write_at(1024, &[3; 10]).unwrap_err();
    image.read_at(0, &mut [0; 512]).unwrap_err();
    image.flush().unwrap_err();
    assert_eq!(server.seen().len(), held, "nothing of that went to the server");
    assert_eq!(read(&image, 8192, 4096), [1; 4096], "elsewhere nothing is the matter");
    server.release();
    eventually("the range to be free again", || image.write_at(1024, &[3; 10]).is_ok());
    let mut expected = vec![2; 4096];
    expected[1024..1034].fill(3);
    assert_eq!(read(&image, 0, 4096), expected);
    image.flush().unwrap();
    assert_eq!(server.accepted(), 4, "the connections were never replaced");
}

#[test]
fn the_next_connection_waits_until_the_end_of_the_last_one_was_read() {
    let server = Server::new(SIZE, FLUSH);
    let Some(image) = patient(&server) else { return };
    let image = Arc::new(image);
    server.hold(WRITE);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| image.write_at(0, &[1; 512]));
        server.wait_for_held(1);
        image.give_up();
        let error = writer.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("given up"), "{error}");
        let reader = scope.spawn(|| read(&image, 512, 512));
        let other = scope.spawn(|| image.write_at(0, &[2; 512]));
        std::thread::sleep(MOMENT);
        // The server still has the write in its hands: another connection could overtake it.
        assert_eq!(server.accepted(), 1);
        assert!(!reader.is_finished() && !other.is_finished());
        server.release();
        assert_eq!(reader.join().unwrap(), [0; 512]);
        other.join().unwrap().unwrap();
    });
    assert_eq!(server.accepted(), 2);
    assert_eq!(read(&image, 0, 512), [2; 512], "the write that was given up did not land late");
}

#[test]
fn who_waits_for_a_server_that_is_away_is_released_when_the_image_gives_up() {
    let forever = Duration::from_secs(24 * 3600);
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = open(&server, patience(forever, forever)) else { return };
    let image = Arc::new(image);
    image.write_at(0, &[1; 512]).unwrap();
    // One request is lost with the connection and waits to be sent again, others never were.
    server.hold(WRITE);
    let waiting = Arc::new(());
    let begin = |offset: u64| {
        let (image, waiting) = (image.clone(), waiting.clone());
        std::thread::spawn(move || {
            let result = image.write_at(offset, &[2; 512]);
            drop(waiting);
            result
        })
    };
    let sent = begin(0);
    server.wait_for_held(1);
    server.kill();
    let others = [begin(512), begin(4096)];
    std::thread::sleep(MOMENT);
    assert_eq!(Arc::strong_count(&waiting), 4, "they wait for the server");
    // Who comes a moment later waits anew: given up again and again until all were told.
    eventually("the requests to be given up", || {
        image.give_up();
        Arc::strong_count(&waiting) == 1
    });
    for writer in [sent].into_iter().chain(others) {
        let error = writer.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("given up"), "{error}");
    }
    // Nothing of them is under way, so their ranges are free; what was acknowledged is sent again, what was given up on is not.
    server.restart();
    assert_eq!(read(&image, 0, 1024), [[1; 512], [0; 512]].concat());
    image.write_at(0, &[3; 8192]).unwrap();
    image.flush().unwrap();
    assert_eq!(server.content()[..8192], [3; 8192]);
}

#[test]
fn an_image_that_was_dropped_frees_its_export_when_its_server_is_done() {
    let server = Server::new(SIZE, FLUSH);
    let Some(image) = open(&server, patience(LONG, Duration::from_millis(200))) else { return };
    server.hold(WRITE);
    image.write_at(0, &[1; 512]).unwrap_err();
    drop(image);
    assert!(super::ends::wait_for_all(&server.uri(), MOMENT).is_err());
    server.release();
    super::ends::wait_for_all(&server.uri(), LONG).unwrap();
    assert_eq!(server.content()[..512], [1; 512]);
}

#[test]
fn requests_wait_for_the_connection_as_long_as_they_were_told() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = open(&server, patience(Duration::from_millis(300), LONG)) else { return };
    image.write_at(0, &[1; 512]).unwrap();
    server.kill();
    let start = Instant::now();
    let error = image.write_at(512, &[2; 512]).unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(250), "it gave up after {:?}", start.elapsed());
    assert!(error.to_string().contains("no connection to the NBD server"), "{error}");
    image.read_at(0, &mut [0; 512]).unwrap_err();
    image.flush().unwrap_err();
    server.restart();
    eventually("the connection to come back", || image.read_at(0, &mut [0; 512]).is_ok());
    // The first was acknowledged, the second failed.
    assert_eq!(read(&image, 0, 1024), [[1; 512], [0; 512]].concat());
    image.flush().unwrap();
}

#[test]
fn another_export_in_its_place_is_refused() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = open(&server, patience(Duration::from_secs(2), LONG)) else { return };
    server.kill();
    server.resize(SIZE / 2);
    server.restart();
    let error = image.write_at(0, &[1; 512]).unwrap_err();
    assert!(error.to_string().contains("524288 bytes now, and had 1048576"), "{error}");
    server.kill();
    server.resize(SIZE);
    server.restart();
    eventually("the right one to be taken", || image.write_at(0, &[1; 512]).is_ok());
}

/// An image of an export that another one has written to, and left without a flush.
fn heir(server: &Server) -> Option<NbdImage> {
    let image = patient(server)?;
    image.write_at(0, &[1; 4096]).unwrap();
    drop(image);
    Some(next(server))
}

/// An image of an export that was used before, when the connections of that one have ended.
fn next(server: &Server) -> NbdImage {
    super::ends::wait_for_all(&server.uri(), LONG).unwrap();
    NbdImage::open(libnbd::library().unwrap(), &server.uri(), patience(LONG, LONG), true, false, true).unwrap()
}

#[test]
fn what_a_server_of_ours_left_unflushed_is_flushed_by_the_next_one() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = heir(&server) else { return };
    image.take_over(None);
    eventually("the flush", || server.seen().iter().any(|seen| seen.kind == FLUSHED));
    // It was answered before anything else is, on this connection.
    assert_eq!(read(&image, 0, 512), [1; 512]);
    server.kill();
    server.restart();
    image.flush().unwrap();
    assert_eq!(server.content()[..4096], [1; 4096]);
}

#[test]
fn what_is_lost_before_that_flush_is_told_by_the_guests_next_one_and_once() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = heir(&server) else { return };
    server.hold(FLUSHED);
    image.take_over(None);
    server.wait_for_held(1);
    server.kill();
    server.restart();
    let error = image.flush().unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
    assert!(error.to_string().contains("may be lost") && error.to_string().contains(&server.uri()), "{error}");
    image.flush().unwrap();
    // A flush that fails where nobody waits for it is told as well.
    drop(image);
    let image = next(&server);
    server.fail(Some((FLUSHED, 5)));
    let before = server.seen().len();
    image.take_over(None);
    eventually("the flush", || server.seen().len() > before);
    assert_eq!(read(&image, 0, 512), [0; 512]);
    server.fail(None);
    eventually("the failure to be told", || image.flush().is_err());
    image.flush().unwrap();
}

#[test]
fn another_export_that_was_there_for_a_while_takes_nothing_of_what_is_to_be_told() {
    let Ok(_) = libnbd::library() else { return };
    let mut server = Server::new(SIZE, FLUSH);
    let uri = server.uri();
    // It was over when it was inherited.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(theirs);
    super::inherit(&format!("nbd 0.0 {uri}"), ours.into()).unwrap();
    server.resize(SIZE / 2);
    let options = OpenOptions { writable: true, insist: Some(SIZE as u64), reconnect: LONG, ..OpenOptions::default() };
    let image = super::open(Path::new(&uri), &options).unwrap();
    server.kill();
    server.resize(SIZE);
    server.restart();
    eventually("the right one", || image.read_at(0, &mut [0; 512]).is_ok());
    let error = image.flush().unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
    image.flush().unwrap();
}

#[test]
fn a_connection_that_ends_before_the_first_flush_is_asked_for_is_not_forgotten() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = heir(&server) else { return };
    server.kill();
    server.restart();
    // It is noticed before the request is carried out.
    read(&image, 0, 512);
    image.take_over(None);
    let error = image.flush().unwrap_err();
    assert!(error.to_string().contains("may be lost"), "{error}");
    image.flush().unwrap();
}

/// Its error is told once, and to whichever flush comes first.
#[test]
fn the_guests_flush_waits_for_the_one_with_which_a_server_begins() {
    let server = Server::new(SIZE, FLUSH | MULTI_CONN);
    let Some(image) = heir(&server) else { return };
    server.hold(FLUSHED);
    image.take_over(None);
    server.wait_for_held(1);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| image.flush());
        std::thread::sleep(MOMENT);
        let sent = server.seen().iter().filter(|seen| seen.kind == FLUSHED).count();
        server.fail_once(FLUSHED, 5);
        server.release();
        let flushed = guest.join().unwrap();
        assert_eq!(sent, 1);
        let error = flushed.unwrap_err();
        assert!(error.to_string().contains("may be lost"), "{error}");
    });
    image.flush().unwrap();
}

#[test]
fn an_export_owes_until_a_guest_was_told() {
    let mut server = Server::new(SIZE, FLUSH);
    let Some(image) = patient(&server) else { return };
    let is_owed = |image: &NbdImage| image.owes().is_some();
    image.write_at(0, &[1; 512]).unwrap();
    server.fail_once(FLUSHED, 5);
    assert_eq!(image.flush().unwrap_err().errno(), libc::EIO);
    // Whoever that was: it is reported once, and owed all the same.
    image.flush().unwrap();
    assert!(is_owed(&image) && is_owed(&image));
    // One that came since was not reported yet.
    server.fail_once(FLUSHED, 28);
    // More than is kept without a flush.
    (0..=KEPT_BYTES_MAX / SIZE as u64).for_each(|_| image.write_at(0, &vec![5; SIZE]).unwrap());
    image.told();
    assert!(is_owed(&image));
    assert_eq!(image.flush().unwrap_err().errno(), libc::ENOSPC);
    image.told();
    assert!(!is_owed(&image));
    // What a lost connection has lost is sent again: nothing is owed.
    image.write_at(0, &[1; 512]).unwrap();
    server.kill();
    server.restart();
    image.flush().unwrap();
    assert!(!is_owed(&image));
}

#[test]
fn where_nothing_is_ever_durable_nothing_is_written() {
    let Ok(_) = libnbd::library() else { return };
    let server = Server::new(SIZE, ZEROES);
    let uri = server.uri();
    let options = |writable| OpenOptions { writable, ..OpenOptions::default() };
    let error = super::open(Path::new(&uri), &options(true)).unwrap_err();
    assert_eq!(error.kind(), crate::error::ErrorKind::Unsupported);
    assert!(error.to_string().contains(&uri) && error.to_string().contains("neither flush nor FUA"), "{error}");
    super::open(Path::new(&uri), &options(false)).unwrap();
}

#[test]
fn a_server_that_can_make_less_durable_than_before_is_refused() {
    for (before, after) in [(FUA, 0), (FLUSH, 0), (FLUSH, FUA)] {
        let mut server = Server::new(SIZE, before);
        let Some(image) = open(&server, patience(Duration::from_millis(300), LONG)) else { return };
        image.write_at(0, &[1; 512]).unwrap();
        server.kill();
        server.change_flags(after);
        server.restart();
        let error = image.write_at(0, &[2; 512]).unwrap_err();
        assert!(error.to_string().contains("can do less"), "{before} {after}: {error}");
        server.kill();
        server.change_flags(before | FLUSH | FUA);
        server.restart();
        eventually("the right one to be taken", || image.write_at(0, &[3; 512]).is_ok());
        image.flush().unwrap();
    }
}

#[test]
fn a_trim_is_never_taken_for_zeroes() {
    let server = Server::new(SIZE, FLUSH | TRIM);
    let Some(image) = patient(&server) else { return };
    image.write_at(0, &[1; 65536]).unwrap();
    // This server tells no extents: it cannot be known what a trim leaves.
    assert_eq!(image.discard(ByteRange::new(0, 65536)).unwrap_err().kind(), crate::error::ErrorKind::Unsupported);
    assert!(!image.properties().thin_zeroing);
    image.write_zeroes(ByteRange::new(100, 65000)).unwrap();
    assert_eq!(read(&image, 0, 101), [vec![1; 100], vec![0]].concat());
    assert_eq!(read(&image, 65099, 2), [0, 1]);
}

#[test]
fn errors_of_the_server_are_named_and_end_nothing() {
    let server = Server::new(SIZE, FLUSH);
    let Some(image) = patient(&server) else { return };
    server.fail(Some((WRITE, 28)));
    let error = image.write_at(4096, &[1; 512]).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (crate::error::ErrorKind::NoSpace, libc::ENOSPC));
    assert_eq!(error.range(), Some(ByteRange::new(4096, 512)));
    server.fail(None);
    image.write_at(4096, &[1; 512]).unwrap();
    assert_eq!(server.accepted(), 1);
}

#[test]
fn overlapping_writes_of_many_lose_nothing() {
    let server = Server::new(SIZE, FLUSH | MULTI_CONN);
    let Some(image) = patient(&server) else { return };
    let image = &image;
    std::thread::scope(|scope| {
        for writer in 0..4_u8 {
            // Each has its own 100 bytes of every 400, in blocks that it shares with the others.
            scope.spawn(move || {
                for round in 1..=5 {
                    for place in 0..20 {
                        image.write_at(place * 400 + u64::from(writer) * 100, &[writer * 10 + round; 100]).unwrap();
                    }
                }
            });
        }
    });
    for (place, byte) in read(image, 0, 8000).into_iter().enumerate() {
        assert_eq!(usize::from(byte), place / 100 % 4 * 10 + 5, "byte {place}");
    }
}

#[test]
fn the_message_says_which_package_is_missing() {
    let why = libnbd::Library::load("libnbd-that-nobody-has.so.0").err().unwrap();
    let error = super::missing("nbd://host/disk", &why);
    assert!(error.to_string().contains("nbd://host/disk") && error.to_string().contains("libnbd"), "{error}");
    assert!(error.advice().unwrap().contains("libnbd0"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn exports_behave_like_a_vector(
        size in 1..model::SIZE_MAX,
        steps in proptest::collection::vec(model::step(), 1..25),
        abilities in prop::sample::select(vec![FLUSH, FLUSH | ZEROES, FLUSH | ZEROES | MULTI_CONN, FUA | ZEROES]),
    ) {
        let server = Server::new(size as usize, abilities);
        let Some(image) = patient(&server) else { return Ok(()) };
        model::check_against_model(&image, &steps);
        prop_assert!(server.content() == model::read_all(&image));
    }

    #[test]
    fn servers_that_die_at_any_moment_are_brought_up_to_date(
        size in 1..model::SIZE_MAX,
        steps in proptest::collection::vec(model::step(), 1..25),
        deaths in prop::collection::vec(any::<bool>(), 25),
    ) {
        let mut server = Server::new(size as usize, FLUSH | ZEROES);
        let Some(image) = patient(&server) else { return Ok(()) };
        let mut expected = vec![0; size as usize];
        for (step, dies) in steps.iter().zip(deaths) {
            model::apply(&image, &mut expected, step);
            if dies {
                server.kill();
                server.restart();
            }
        }
        prop_assert!(model::read_all(&image) == expected, "after {steps:?}");
    }
}
