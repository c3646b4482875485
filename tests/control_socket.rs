//! The control socket speaks QMP as QEMU does: greeting, negotiation, the life of a mirror job with its states, verbs and
//! events in QEMU's order, errors in its words. Rubbish gets an error and harms nobody.

mod common;

use std::path::PathBuf;

use serde_json::{Value, json};

use common::compare;
use common::mounted::{Mount, Mounted};
use common::place::Place;
use common::qmp::Qmp;
use common::wait;

struct Disk {
    mounted: Mounted,
    qmp: Qmp,
    image: PathBuf,
    target: PathBuf,
    place: Place,
}

/// A mounted disk, named `disk.img` in QMP too, with a client that has negotiated.
fn disk() -> Disk {
    let place = Place::in_memory();
    let image = place.random("disk.img", 4 << 20, 1);
    let mounted = Mount::of(&place, [&image]).start();
    let qmp = Qmp::connect(&mounted.control);
    Disk { qmp, target: place.at("target.img"), image, mounted, place }
}

impl Disk {
    /// Starts a mirror with further arguments.
    fn mirror(&mut self, more: Value) {
        let mut arguments =
            json!({"device": "disk.img", "target": self.target.to_str(), "format": "raw", "sync": "full"});
        let Value::Object(more) = more else { panic!("an object") };
        arguments.as_object_mut().expect("an object").extend(more);
        self.qmp.ok("drive-mirror", arguments);
    }

    fn done(self) {
        drop(self.qmp);
        self.mounted.unmount();
    }
}

const START: [&str; 2] = ["created", "running"];

#[test]
fn greeting_and_negotiation() {
    let disk = disk();
    let mut client = Qmp::greeted(&disk.mounted.control);
    let version = &client.greeting["QMP"]["version"];
    assert_eq!((version["qemu"]["major"].as_i64(), version["qemu"]["minor"].as_i64()), (Some(10), Some(0)));
    assert!(version["package"].as_str().is_some_and(|package| package.contains("livemirror")), "{version}");
    assert!(client.greeting["QMP"]["capabilities"].is_array());
    let (class, desc) = client.refused("query-jobs", json!({}));
    assert_eq!(class, "CommandNotFound");
    assert_eq!(desc, "Expecting capabilities negotiation with 'qmp_capabilities'");
    client.send("{\"execute\": \"qmp_capabilities\", \"id\": {\"any\": [1, \"value\"]}}\r\n");
    assert_eq!(client.answer(), json!({"return": {}, "id": {"any": [1, "value"]}}));
    let (class, desc) = client.refused("qmp_capabilities", json!({}));
    assert_eq!((&*class, &*desc), ("CommandNotFound", "Capabilities negotiation is already complete, command ignored"));
    let version = client.ok("query-version", json!({}));
    assert_eq!(version["qemu"]["major"], 10);
    let commands = client.ok("query-commands", json!({})).to_string();
    for name in ["drive-mirror", "block-job-complete", "job-dismiss", "query-block", "quit"] {
        assert!(commands.contains(&format!("\"{name}\"")), "{name} is missing");
    }
    drop(client);
    disk.done();
}

#[test]
fn a_mirror_from_start_to_cutover() {
    let mut disk = disk();
    disk.mirror(json!({"job-id": "move"}));
    assert_eq!(disk.qmp.events_to("BLOCK_JOB_READY"), [&START[..], &["ready", "BLOCK_JOB_READY"]].concat());
    let jobs = disk.qmp.ok("query-block-jobs", json!({}));
    let job = &jobs[0];
    for (name, value) in [
        ("device", json!("move")),
        ("type", json!("mirror")),
        ("status", json!("ready")),
        ("ready", json!(true)),
        ("paused", json!(false)),
        ("io-status", json!("ok")),
        ("speed", json!(0)),
        ("auto-finalize", json!(true)),
        ("auto-dismiss", json!(true)),
        ("len", json!(4 << 20)),
        ("offset", json!(4 << 20)),
    ] {
        assert_eq!(job[name], value, "{name} of {job}");
    }
    let jobs = disk.qmp.ok("query-jobs", json!({}));
    assert_eq!((&jobs[0]["id"], &jobs[0]["status"]), (&json!("move"), &json!("ready")));
    disk.qmp.ok("block-job-complete", json!({"device": "move"}));
    assert_eq!(disk.qmp.events_to("null"), ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
    assert_eq!(disk.qmp.ok("query-jobs", json!({})), json!([]));
    assert_eq!(disk.mounted.active(), disk.target);
    let block = disk.qmp.ok("query-block", json!({}));
    assert!(block[0]["device"] == "disk.img" && block.to_string().contains("target.img"), "{block}");
    let (image, target) = (disk.image.clone(), disk.target.clone());
    let Disk { qmp, mounted, place: _place, .. } = disk;
    drop(qmp);
    mounted.unmount();
    compare::assert_same_content(&image, &target);
}

#[test]
fn finalize_and_dismiss_by_hand() {
    let mut disk = disk();
    disk.mirror(json!({"job-id": "j", "auto-finalize": false, "auto-dismiss": false}));
    disk.qmp.events_to("BLOCK_JOB_READY");
    disk.qmp.ok("job-complete", json!({"id": "j"}));
    assert_eq!(disk.qmp.events_to("BLOCK_JOB_PENDING"), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
    assert_eq!(disk.mounted.active(), disk.image, "nothing is switched before finalize");
    disk.qmp.ok("job-finalize", json!({"id": "j"}));
    assert_eq!(disk.qmp.events_to("concluded"), ["BLOCK_JOB_COMPLETED", "concluded"]);
    assert_eq!(disk.mounted.active(), disk.target);
    assert_eq!(disk.qmp.ok("query-jobs", json!({}))[0]["status"], "concluded");
    let (_, desc) = disk.qmp.refused("job-complete", json!({"id": "j"}));
    assert_eq!(desc, "Job 'j' in state 'concluded' cannot accept command verb 'complete'");
    disk.qmp.ok("job-dismiss", json!({"id": "j"}));
    assert_eq!(disk.qmp.events_to("null"), ["null"]);
    disk.done();
}

#[test]
fn cancelled_before_and_after_ready() {
    let mut disk = disk();
    disk.mirror(json!({"speed": 65_536}));
    disk.qmp.events_to("running");
    disk.qmp.ok("block-job-cancel", json!({"device": "disk.img"}));
    assert_eq!(disk.qmp.events_to("null"), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);

    let _ = std::fs::remove_file(&disk.target);
    disk.mirror(json!({}));
    disk.qmp.events_to("BLOCK_JOB_READY");
    disk.qmp.ok("block-job-cancel", json!({"device": "disk.img"}));
    let soft = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"];
    assert_eq!(disk.qmp.events_to("null"), soft, "a soft cancel of a ready job ends with a copy");
    assert_eq!(disk.mounted.active(), disk.image);
    compare::assert_same_content(&disk.image, &disk.target);

    disk.mirror(json!({"mode": "existing"}));
    disk.qmp.events_to("BLOCK_JOB_READY");
    disk.qmp.ok("block-job-cancel", json!({"device": "disk.img", "force": true}));
    assert_eq!(disk.qmp.events_to("null"), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    disk.done();
}

#[test]
fn pause_resume_speed_and_change() {
    let mut disk = disk();
    disk.mirror(json!({"job-id": "j", "speed": 65_536}));
    disk.qmp.events_to("running");
    disk.qmp.ok("job-pause", json!({"id": "j"}));
    assert_eq!(disk.qmp.events_to("paused"), ["paused"]);
    assert_eq!(disk.qmp.refused("job-pause", json!({"id": "j"})).1, "Job is already paused");
    let (_, desc) = disk.qmp.refused("block-job-cancel", json!({"device": "j"}));
    assert_eq!(desc, "The block job for device 'j' is currently paused");
    disk.qmp.ok("block-job-set-speed", json!({"device": "j", "speed": 1 << 30}));
    disk.qmp.ok("job-resume", json!({"id": "j"}));
    let events = disk.qmp.events_to("BLOCK_JOB_READY");
    assert_eq!(events, ["running", "ready", "BLOCK_JOB_READY"]);
    let (_, desc) = disk.qmp.refused("job-resume", json!({"id": "j"}));
    assert_eq!(desc, "Can't resume a job that was not paused");
    disk.qmp.ok("block-job-pause", json!({"device": "j"}));
    assert_eq!(disk.qmp.events_to("standby"), ["standby"]);
    disk.qmp.ok("block-job-resume", json!({"device": "j"}));
    assert_eq!(disk.qmp.events_to("ready"), ["ready"]);
    for mode in ["write-blocking", "background"] {
        disk.qmp.ok("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": mode}));
        wait::until("the copy mode to change", || disk.mounted.job()["copy_mode"] == mode);
    }
    assert_eq!(disk.qmp.ok("query-block-jobs", json!({}))[0]["speed"], 1 << 30);
    disk.qmp.ok("job-cancel", json!({"id": "j"}));
    assert_eq!(disk.qmp.events_to("null"), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    disk.done();
}

#[test]
fn errors_in_qemus_words() {
    let mut disk = disk();
    let target = disk.target.to_str().expect("UTF-8").to_owned();
    let with = |name: &str, value: Value| {
        let mut arguments = json!({"device": "disk.img", "target": target, "sync": "full"});
        arguments[name] = value;
        arguments
    };
    for (command, arguments, class, desc) in [
        ("nosuch", json!({}), "CommandNotFound", "The command nosuch has not been found"),
        ("job-pause", json!({}), "GenericError", "Parameter 'id' is missing"),
        ("job-pause", json!({"id": "j", "zz": 1}), "GenericError", "Parameter 'zz' is unexpected"),
        ("job-pause", json!({"id": 1}), "GenericError", "Invalid parameter type for 'id', expected: string"),
        ("job-pause", json!({"id": "zz"}), "GenericError", "Job not found"),
        ("block-job-pause", json!({"device": "zz"}), "DeviceNotActive", "Block job 'zz' not found"),
        ("drive-mirror", with("sync", json!("wat")), "GenericError", "Parameter 'sync' does not accept value 'wat'"),
        ("drive-mirror", with("job-id", json!("bad id!")), "GenericError", "Invalid job ID 'bad id!'"),
        (
            "drive-mirror",
            with("granularity", json!(1000)),
            "GenericError",
            "Parameter 'granularity' expects a power of 2",
        ),
        (
            "drive-mirror",
            with("granularity", json!(256)),
            "GenericError",
            "Parameter 'granularity' expects a value in range [512B, 64MB]",
        ),
        ("drive-mirror", with("speed", json!(-1)), "GenericError", "Parameter 'speed' expects a non-negative value"),
    ] {
        assert_eq!(disk.qmp.refused(command, arguments.clone()), (class.into(), desc.into()), "{command} {arguments}");
    }
    let (_, desc) = disk.qmp.refused("drive-mirror", with("device", json!("nope")));
    assert!(desc.contains("nope"), "{desc}");
    assert!(!disk.target.exists(), "a refused mirror leaves its target behind");
    disk.mirror(json!({"job-id": "j", "speed": 65_536}));
    let (_, desc) = disk.qmp.refused("job-complete", json!({"id": "j"}));
    assert_eq!(desc, "Job 'j' in state 'running' cannot accept command verb 'complete'");
    let second = json!({"device": "disk.img", "target": "/dev/shm/never-made.img", "sync": "full", "job-id": "k"});
    disk.qmp.refused("drive-mirror", second);
    disk.qmp.ok("job-cancel", json!({"id": "j"}));
    disk.qmp.events_to("null");
    disk.done();
}

#[test]
fn rubbish_gets_an_error_and_harms_nobody() {
    let mut disk = disk();
    let mut client = Qmp::connect(&disk.mounted.control);
    for (input, desc) in [
        ("[1]\n", "QMP input must be a JSON object"),
        ("{}\n", "QMP input lacks member 'execute'"),
        ("{\"execute\": 1}\n", "QMP input member 'execute' must be a string"),
        ("{\"execute\": \"query-jobs\", \"arguments\": []}\n", "QMP input member 'arguments' must be an object"),
        ("{\"execute\": \"query-jobs\", \"bogus\": 1}\n", "QMP input member 'bogus' is unexpected"),
    ] {
        client.send(input);
        let error = client.answer()["error"].clone();
        assert_eq!((&error["class"], &error["desc"]), (&json!("GenericError"), &json!(desc)), "{input}");
    }
    client.send("{\"execute\": nonsense}\n");
    assert_eq!(client.answer()["error"]["class"], "GenericError");
    client.send(b"\xff");
    client.send("{'execute': 'query-jobs', 'id': 'single quotes'}{\"execute\":\"query-version\",\"id\":2}");
    let mut ids = Vec::new();
    while ids.last() != Some(&json!(2)) {
        ids.push(client.answer()["id"].clone());
    }
    assert!(ids.contains(&json!("single quotes")), "two commands in one packet: {ids:?}");

    let mut noise = Qmp::greeted(&disk.mounted.control);
    noise.send(vec![b'['; 100_000]);
    let mut silent = Qmp::greeted(&disk.mounted.control);
    silent.send("{\"execute\": \"qmp_cap");
    assert_eq!(disk.qmp.ok("query-jobs", json!({})), json!([]), "the other clients go on");
    drop((noise, silent, client));
    assert!(std::fs::read(disk.mounted.first_disk()).expect("read") == std::fs::read(&disk.image).expect("read"));
    disk.done();
}

#[test]
fn a_second_client_sees_the_same_events() {
    let mut disk = disk();
    let mut second = Qmp::connect(&disk.mounted.control);
    let mut deaf = Qmp::greeted(&disk.mounted.control);
    disk.mirror(json!({}));
    for client in [&mut disk.qmp, &mut second] {
        assert_eq!(client.events_to("BLOCK_JOB_READY"), [&START[..], &["ready", "BLOCK_JOB_READY"]].concat());
    }
    second.ok("block-job-complete", json!({"device": "disk.img"}));
    assert_eq!(disk.qmp.events_to("null"), second.events_to("null"));
    deaf.send("{\"execute\": \"qmp_capabilities\"}\n");
    assert_eq!(deaf.message(), json!({"return": {}}), "no events before negotiation");
    drop((second, deaf));
    disk.done();
}
