//! The control socket as a client meets it: a real unix socket, with a mount behind it that is not there.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::Client;
use super::fake::Fake;
use super::server::{CONNECTIONS_MAX, ControlServer};
use crate::error::ErrorKind;
use crate::mirror::types::{JobEvent, JobStatus};
use crate::sync::Arc;

struct Mount {
    fake: Arc<Fake>,
    server: ControlServer,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn mount() -> Mount {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let fake = Fake::new();
    let server = ControlServer::start(&path, fake.clone()).unwrap();
    Mount { fake, server, path, _directory: directory }
}

impl Mount {
    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut raw = Raw { lines: BufReader::new(stream) };
        assert_eq!(raw.line()["QMP"]["version"]["qemu"], json!({"micro": 0, "minor": 0, "major": 10}));
        raw
    }

    fn negotiated(&self) -> Raw {
        let mut raw = self.raw();
        assert_eq!(raw.ask(json!({"execute": "qmp_capabilities"})), json!({"return": {}}));
        raw
    }

    fn mirror(&self, raw: &mut Raw, more: Value) -> Value {
        let mut arguments = json!({"device": "os.img", "target": "/new/os.img", "sync": "full", "job-id": "j"});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        raw.ask(json!({"execute": "drive-mirror", "arguments": arguments}))
    }
}

struct Raw {
    lines: BufReader<UnixStream>,
}

impl Raw {
    fn send(&mut self, bytes: &[u8]) {
        self.lines.get_mut().write_all(bytes).unwrap();
    }

    /// The next line, events included.
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n") && line.is_ascii(), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    fn ended(&mut self) -> bool {
        let mut rest = Vec::new();
        !matches!(self.lines.read_to_end(&mut rest), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }

    fn answer(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
        }
    }

    fn ask(&mut self, request: Value) -> Value {
        self.send(request.to_string().as_bytes());
        self.answer()
    }

    fn refusal(&mut self, request: &str) -> (String, String) {
        self.send(request.as_bytes());
        self.send(b"\n");
        let error = self.answer()["error"].clone();
        (error["class"].as_str().unwrap().to_owned(), error["desc"].as_str().unwrap().to_owned())
    }

    /// Names of what comes until `count` lines are there: states and events by name, answers as `return` or `error`.
    fn story(&mut self, count: usize) -> Vec<String> {
        let tell = |line: Value| match line["event"].as_str() {
            Some("JOB_STATUS_CHANGE") => line["data"]["status"].as_str().unwrap().to_owned(),
            Some(event) => event.to_owned(),
            None => line.as_object().unwrap().keys().next().unwrap().clone(),
        };
        (0..count).map(|_| tell(self.line())).collect()
    }
}

fn generic(desc: &str) -> (String, String) {
    ("GenericError".to_owned(), desc.to_owned())
}

fn command_not_found(desc: &str) -> (String, String) {
    ("CommandNotFound".to_owned(), desc.to_owned())
}

#[test]
fn negotiation_is_as_in_qemu() {
    let mount = mount();
    let mut raw = mount.raw();
    let expecting = command_not_found("Expecting capabilities negotiation with 'qmp_capabilities'");
    assert_eq!(raw.refusal(r#"{"execute": "query-jobs"}"#), expecting);
    assert_eq!(raw.refusal(r#"{"execute": "nosuch"}"#), expecting);
    assert_eq!(
        raw.refusal(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["bogus"]}}"#),
        generic("Parameter 'enable[0]' does not accept value 'bogus'")
    );
    assert_eq!(
        raw.ask(json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "a"})),
        json!({"return": {}, "id": "a"})
    );
    assert_eq!(
        raw.refusal(r#"{"execute": "qmp_capabilities"}"#),
        command_not_found("Capabilities negotiation is already complete, command ignored")
    );
    assert_eq!(raw.refusal(r#"{"exec-oob": "query-jobs"}"#), generic("The command query-jobs does not support OOB"));
    assert_eq!(raw.refusal(r#"{"exec-oob": "zz"}"#), command_not_found("The command zz has not been found"));
    let mut raw = mount.negotiated();
    assert_eq!(raw.refusal(r#"{"exec-oob": "query-jobs"}"#), generic("QMP input member 'exec-oob' is unexpected"));
}

#[test]
fn input_errors_are_in_qemu_words() {
    let mount = mount();
    let mut raw = mount.negotiated();
    for (request, expected) in [
        ("[1]", generic("QMP input must be a JSON object")),
        ("{}", generic("QMP input lacks member 'execute'")),
        (r#"{"execute":1}"#, generic("QMP input member 'execute' must be a string")),
        (r#"{"execute":"x","arguments":[]}"#, generic("QMP input member 'arguments' must be an object")),
        (r#"{"execute":"query-jobs","bogus":1}"#, generic("QMP input member 'bogus' is unexpected")),
        (r#"{"execute": }"#, generic("JSON parse error, expecting value")),
        (r#"{"execute":"nosuch"}"#, command_not_found("The command nosuch has not been found")),
        (r#"{'execute':'job-pause'}"#, generic("Parameter 'id' is missing")),
        (r#"{"execute":"query-jobs","arguments":{"zz":1}}"#, generic("Parameter 'zz' is unexpected")),
        (
            r#"{"execute":"job-pause","arguments":{"id":1}}"#,
            generic("Invalid parameter type for 'id', expected: string"),
        ),
        (r#"{"execute":"job-pause","arguments":{"id":"zz"}}"#, generic("Job not found")),
        (
            r#"{"execute":"block-job-pause","arguments":{"device":"zz"}}"#,
            ("DeviceNotActive".to_owned(), "Block job 'zz' not found".to_owned()),
        ),
    ] {
        assert_eq!(raw.refusal(request), expected, "{request}");
    }
    assert_eq!(raw.ask(json!({"execute": "zz", "id": {"any": [1]}}))["id"], json!({"any": [1]}));
    assert_eq!(raw.ask(json!({"execute": "query-jobs", "id": null})), json!({"return": [], "id": null}));
}

#[test]
fn what_a_new_mirror_is_told_is_checked_in_qemu_words() {
    let mount = mount();
    let mut raw = mount.negotiated();
    for (more, expected) in [
        (json!({"device": "nope"}), "Cannot find device='nope' nor node-name='nope'"),
        (json!({"sync": "wat"}), "Parameter 'sync' does not accept value 'wat'"),
        (json!({"granularity": 256}), "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        (json!({"granularity": 134217728}), "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        (json!({"granularity": 3072}), "Parameter 'granularity' expects a power of 2"),
        (json!({"granularity": 1_u64 << 40}), "Parameter 'granularity' expects uint32_t"),
        (json!({"granularity": "x"}), "Parameter 'granularity' expects uint64"),
        (json!({"speed": -1}), "Parameter 'speed' expects a non-negative value"),
        (json!({"buf-size": -1}), "Invalid parameter 'buf-size'"),
        (json!({"job-id": "bad id!"}), "Invalid job ID 'bad id!'"),
        (json!({"job-id": ""}), "Invalid job ID ''"),
        (json!({"replaces": "nope"}), "Failed to find node with node-name='nope'"),
        (json!({"copy-mode": "wat"}), "Parameter 'copy-mode' does not accept value 'wat'"),
        (json!({"mode": "wat"}), "Parameter 'mode' does not accept value 'wat'"),
        (json!({"format": "vmdk"}), "Unknown driver 'vmdk'"),
        (json!({"zz": 1}), "Parameter 'zz' is unexpected"),
        (json!({"sync": "incremental"}), "Parameter 'sync' must be 'full', 'top' or 'none': livemirror has no bitmaps"),
        (json!({"target": "disk.img"}), "the target must be an absolute path, not 'disk.img'"),
    ] {
        let answer = mount.mirror(&mut raw, more.clone());
        assert_eq!(answer["error"]["desc"], expected, "{more}");
        assert_eq!(answer["error"]["class"], "GenericError", "{more}");
    }
    assert!(!mount.fake.called("mirror"), "nothing wrong reached the mount");
    assert_eq!(mount.mirror(&mut raw, json!({})), json!({"return": {}}));
    assert_eq!(mount.mirror(&mut raw, json!({}))["error"]["desc"], "Job ID 'j' already in use");
    let second = mount.mirror(&mut raw, json!({"job-id": "k"}));
    assert_eq!(second["error"]["desc"], "Need a root block node");
    assert_eq!(second["error"]["livemirror"], json!({"kind": "exists", "advice": "cancel the other mirror"}));
    let resumed = raw.refusal(r#"{"execute":"job-resume","arguments":{"id":"j"}}"#);
    assert_eq!(resumed, generic("Can't resume a job that was not paused"));
    let completed = raw.refusal(r#"{"execute":"job-complete","arguments":{"id":"j"}}"#);
    assert_eq!(completed, generic("Job 'j' in state 'running' cannot accept command verb 'complete'"));
}

#[test]
fn queries_have_qemu_shapes() {
    let mount = mount();
    let mut raw = mount.negotiated();
    mount.mirror(&mut raw, json!({"speed": 65536, "auto-dismiss": false}));
    mount.fake.make_ready("j");
    assert_eq!(
        raw.ask(json!({"execute": "query-jobs"}))["return"],
        json!([{"current-progress": 8388608, "status": "ready", "total-progress": 8388608, "type": "mirror", "id": "j"}])
    );
    assert_eq!(
        raw.ask(json!({"execute": "query-block-jobs"}))["return"],
        json!([{"auto-finalize": true, "io-status": "ok", "device": "j", "auto-dismiss": false, "busy": false,
            "len": 8388608, "offset": 8388608, "status": "ready", "paused": false, "speed": 65536, "ready": true,
            "type": "mirror", "actively-synced": false}])
    );
    let blocks = raw.ask(json!({"execute": "query-block"}));
    assert_eq!(blocks["return"][1]["device"], "disk-1.img");
    assert_eq!(blocks["return"][1]["inserted"]["file"], "/images/1.img");
    let version = raw.ask(json!({"execute": "query-version"}));
    assert_eq!(version["return"]["package"], concat!("livemirror ", env!("CARGO_PKG_VERSION")));
    let commands = raw.ask(json!({"execute": "query-commands"}));
    for name in ["quit", "qmp_capabilities", "drive-mirror", "block-job-change", "livemirror-status"] {
        assert!(commands["return"].as_array().unwrap().contains(&json!({ "name": name })), "{name}");
    }
}

#[test]
fn events_and_returns_come_in_qemu_order() {
    let mount = mount();
    let mut raw = mount.negotiated();
    let mirror = |id: &str, more: &str| {
        format!(
            r#"{{"execute":"drive-mirror","arguments":{{"device":"os.img","target":"/n","sync":"full","job-id":"{id}"{more}}}}}"#
        )
    };
    raw.send(mirror("a", "").as_bytes());
    assert_eq!(raw.story(3), ["created", "running", "return"]);
    mount.fake.make_ready("a");
    assert_eq!(raw.story(2), ["ready", "BLOCK_JOB_READY"]);
    raw.send(br#"{"execute":"job-complete","arguments":{"id":"a"}}"#);
    assert_eq!(raw.story(6), ["return", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);

    raw.send(mirror("b", r#","auto-finalize":false,"auto-dismiss":false"#).as_bytes());
    raw.story(3);
    mount.fake.make_ready("b");
    raw.story(2);
    raw.send(br#"{"execute":"block-job-complete","arguments":{"device":"b"}}"#);
    assert_eq!(raw.story(4), ["return", "waiting", "pending", "BLOCK_JOB_PENDING"]);
    raw.send(br#"{"execute":"job-finalize","arguments":{"id":"b"}}"#);
    assert_eq!(raw.story(3), ["BLOCK_JOB_COMPLETED", "concluded", "return"]);
    raw.send(br#"{"execute":"job-dismiss","arguments":{"id":"b"}}"#);
    assert_eq!(raw.story(2), ["null", "return"]);

    raw.send(mirror("c", "").as_bytes());
    raw.story(3);
    raw.send(br#"{"execute":"job-cancel","arguments":{"id":"c"}}"#);
    assert_eq!(raw.story(5), ["return", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);

    raw.send(mirror("d", "").as_bytes());
    raw.story(3);
    mount.fake.make_ready("d");
    raw.story(2);
    raw.send(br#"{"execute":"block-job-cancel","arguments":{"device":"d"}}"#);
    assert_eq!(raw.story(6), ["return", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
    assert!(!mount.fake.called("cancelled Force keep=false"), "QMP never removes a target");
}

#[test]
fn two_clients_hear_of_the_same_job_and_one_without_negotiation_hears_nothing() {
    let mount = mount();
    let (mut first, mut second, mut silent) = (mount.negotiated(), mount.negotiated(), mount.raw());
    // The second has joined the audience once it has answered something after its negotiation.
    second.ask(json!({"execute": "query-jobs"}));
    mount.mirror(&mut first, json!({}));
    assert_eq!(second.story(2), ["created", "running"]);
    let pause = json!({"execute": "job-pause", "arguments": {"id": "j"}});
    assert_eq!(second.ask(pause.clone()), json!({"return": {}}));
    assert_eq!(second.story(1), ["paused"]);
    assert_eq!(first.story(1), ["paused"]);
    assert_eq!(first.ask(pause)["error"]["desc"], "Job is already paused");
    silent.send(br#"{"execute":"query-jobs"}"#);
    assert_eq!(silent.story(1), ["error"]);
}

#[test]
fn rubbish_gets_an_error_and_harms_nobody() {
    let mount = mount();
    let mut good = mount.negotiated();
    let mut bad = mount.negotiated();
    bad.send(b"GET / HTTP/1.1\r\n");
    assert!(bad.line()["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"));
    bad.send(b"{\"execute\": \"query\xff");
    bad.answer();
    bad.send(b"\x00\x01\x02\n{'execute': 'query-jobs', 'id': 7}");
    while bad.answer() != json!({"return": [], "id": 7}) {}
    // A client that sends for ever and reads nothing is not read from any more; the others do not notice.
    let flood = UnixStream::connect(&mount.path).unwrap();
    flood.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let junk = b"{}".repeat(10_000);
    while (&flood).write_all(&junk).is_ok() {}
    assert_eq!(good.ask(json!({"execute": "query-jobs"})), json!({"return": []}));
}

#[test]
fn a_client_that_reads_no_events_is_cut_off_and_holds_up_nobody() {
    let mount = mount();
    let mut slow = mount.negotiated();
    slow.ask(json!({"execute": "query-jobs"}));
    let mut good = mount.negotiated();
    good.ask(json!({"execute": "query-jobs"}));
    let started = Instant::now();
    for _ in 0..100 {
        for _ in 0..200 {
            mount.fake.emit(&JobEvent::StatusChange { job_id: "j".into(), status: JobStatus::Running });
        }
        good.story(200);
    }
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(slow.ended(), "its connection was closed");
    assert_eq!(good.ask(json!({"execute": "query-jobs"})), json!({"return": []}));
}

#[test]
fn connections_are_bounded() {
    let mount = mount();
    let mut all: Vec<Raw> = (0..CONNECTIONS_MAX).map(|_| mount.raw()).collect();
    let error = Client::connect(&mount.path).unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::NotNow, "too many connections to this control socket")
    );
    all.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    while Client::connect(&mount.path).is_err() {
        assert!(Instant::now() < deadline, "the place of one that left is not given to another");
    }
}

#[test]
fn the_socket_is_for_its_owner_and_goes_with_the_server() {
    let mount = mount();
    assert_eq!(std::fs::symlink_metadata(&mount.path).unwrap().permissions().mode() & 0o777, 0o600);
    let taken = ControlServer::start(&mount.path, Fake::new()).err().unwrap();
    assert_eq!(taken.kind(), ErrorKind::Exists);
    let mut raw = mount.negotiated();
    mount.server.shutdown();
    assert!(raw.ended());
    assert!(!mount.path.exists());
    assert_eq!(mount.fake.listeners(), 0);
    assert_eq!(Client::connect(&mount.path).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_dead_servers_socket_is_replaced_and_a_long_path_is_no_obstacle() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("d".repeat(100));
    std::fs::create_dir(&deep).unwrap();
    let path = deep.join("control.sock");
    let left = directory.path().join("x.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    std::fs::rename(&left, &path).unwrap();
    let server = ControlServer::start(&path, Fake::new()).unwrap();
    Client::connect(&path).unwrap();
    drop(server);
    std::fs::write(&path, "not a socket").unwrap();
    assert_eq!(ControlServer::start(&path, Fake::new()).err().unwrap().kind(), ErrorKind::Exists);
}

#[test]
fn answers_under_way_get_out_before_the_server_ends() {
    let mount = mount();
    *mount.fake.cutover_takes.lock() = Duration::from_millis(300);
    let mut raw = mount.negotiated();
    raw.send(br#"{"execute":"livemirror-cutover","arguments":{"devices":["os.img"],"patience-ms":300}}"#);
    while !mount.fake.called("CutoverRequest") {
        std::thread::yield_now();
    }
    mount.server.shutdown();
    assert_eq!(raw.line()["error"]["livemirror"], json!({"kind": "not-now", "advice": "try again"}));
    assert!(raw.ended());
}

#[test]
fn the_client_gets_values_errors_and_events() {
    let mount = mount();
    let mut client = Client::connect(&mount.path).unwrap();
    let status: super::backend::MountStatus = client.call("livemirror-status", json!({})).unwrap();
    assert_eq!(status.volumes[1].name, "1.img");
    let error = client.execute("livemirror-finish", json!({"device": "os.img"})).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ErrorKind::NotFound, "os.img has no mirror"));
    assert!(error.advice().is_some());

    let layout = json!({"device": "disk-1.img", "target": "/n", "sync": "top", "base": "/b", "cluster-size": 4096,
        "version": "v2", "backing-file": "/b", "backing-fmt": "raw"});
    client.execute("livemirror-mirror", layout).unwrap();
    let told = "sync: Top, base: Some(\"/b\"), layout: Layout { cluster_bytes: Some(4096), version: V2, \
        backing: Some(BackingFile { file: \"/b\", format: Some(Raw) }) }";
    let called = mount.fake.calls.lock()[0].clone();
    assert!(called.contains(told), "{called}");
    for (wrong, says) in [
        (json!({"sync": "bitmap"}), "livemirror has no bitmaps"),
        (json!({"version": "v4"}), "does not accept value 'v4'"),
        (json!({"backing-fmt": "raw"}), "'backing-fmt' needs 'backing-file'"),
    ] {
        let mut arguments = json!({"device": "disk-1.img", "target": "/n"});
        arguments.as_object_mut().unwrap().extend(wrong.as_object().unwrap().clone());
        let error = client.execute("livemirror-mirror", arguments).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(mount.fake.called("mirror disk-1.img MirrorOptions { job_id: \"disk-1.img\""));
    assert!(mount.fake.calls.lock()[0].contains("copy_mode: Auto"));
    let created = client.next_event(Duration::from_secs(10)).unwrap().unwrap();
    assert_eq!((created.name.as_str(), &created.data["status"]), ("JOB_STATUS_CHANGE", &json!("created")));
    assert!(client.next_event(Duration::from_secs(10)).unwrap().is_some());
    assert_eq!(client.next_event(Duration::from_millis(20)).unwrap(), None);

    let finish = client.execute("livemirror-finish", json!({"device": "disk-1.img"})).unwrap_err();
    assert_eq!(finish.exit_code(), 3);
    client.execute("block-job-set-speed", json!({"device": "disk-1.img", "speed": 5})).unwrap();
    client.execute("block-job-change", json!({"id": "disk-1.img", "type": "mirror", "copy-mode": "auto"})).unwrap();
    assert!(mount.fake.called("speed 5") && mount.fake.called("mode Auto"));
    client.execute("livemirror-cancel", json!({"device": "disk-1.img"})).unwrap();
    assert!(mount.fake.called("cancelled Force keep=false"));
    let holders: Vec<super::backend::Holder> = client.call("livemirror-holders", json!({})).unwrap();
    assert_eq!(holders[0].name, "qemu");
    client.execute("quit", json!({})).unwrap();
    client.execute("livemirror-unmount", json!({"abort": true})).unwrap();
    assert!(mount.fake.called("quit") && mount.fake.called("unmount true"));
}

#[test]
fn a_server_that_hangs_is_told_apart_from_one_that_is_dead() {
    let mount = mount();
    *mount.fake.cutover_takes.lock() = Duration::from_secs(1);
    let mut client = Client::connect(&mount.path).unwrap();
    client.set_patience(Duration::from_millis(50));
    assert_eq!(client.execute("livemirror-cutover", json!({})).unwrap_err().kind(), ErrorKind::NotNow);
    // The late answer is not taken for that of the next call.
    client.set_patience(Duration::from_secs(20));
    assert_eq!(client.execute("query-jobs", json!({})).unwrap(), json!([]));
}
