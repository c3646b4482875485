//! Job events on their way to the clients: made into QMP once, then put into the outbox of every connection that has
//! negotiated. Runs on the jobs' threads: it never waits and never calls back.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::outbox::Outbox;
use super::wire;
use crate::mirror::types::{ErrorAction, JobEvent, JobProgress, Operation};
use crate::sync::{Arc, Mutex};

/// One connection, as those see it that put something into it.
pub(super) struct Peer {
    pub(super) outbox: Outbox,
    /// To cut the connection with; the reader and the writer have descriptors of their own.
    pub(super) stream: UnixStream,
}

impl Peer {
    /// Ends the connection at once, whatever it is doing.
    pub(super) fn cut(&self) {
        self.outbox.give_up();
        // Fails only if the other end went first.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The connections that want events.
#[derive(Default)]
pub(super) struct Audience(Mutex<Vec<Arc<Peer>>>);

impl Audience {
    pub(super) fn join(&self, peer: &Arc<Peer>) {
        self.0.lock().push(Arc::clone(peer));
    }

    pub(super) fn leave(&self, peer: &Arc<Peer>) {
        self.0.lock().retain(|other| !Arc::ptr_eq(other, peer));
    }

    /// Tells everybody. A client that has stopped reading is cut off.
    pub(super) fn tell(&self, event: &JobEvent) {
        let peers = self.0.lock();
        if peers.is_empty() {
            return;
        }
        let line = wire::encode(&to_json(event));
        for peer in peers.iter() {
            if !peer.outbox.event(line.clone()) {
                log::warn!("control: a client does not read its events; its connection is closed");
                let _ = peer.stream.shutdown(Shutdown::Both);
            }
        }
    }
}

/// The event as QMP shows it, stamped with the time of this call.
pub(super) fn to_json(event: &JobEvent) -> Value {
    let (name, data) = match event {
        JobEvent::StatusChange { job_id, status } => ("JOB_STATUS_CHANGE", json!({ "status": status, "id": job_id })),
        JobEvent::Ready(progress) => ("BLOCK_JOB_READY", progress_json(progress)),
        JobEvent::Pending { job_id } => ("BLOCK_JOB_PENDING", json!({ "type": "mirror", "id": job_id })),
        JobEvent::Completed(progress, error) => {
            let mut data = progress_json(progress);
            if let Some(error) = error {
                data["error"] = error.as_str().into();
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Cancelled(progress) => ("BLOCK_JOB_CANCELLED", progress_json(progress)),
        JobEvent::Error { job_id, operation, action } => {
            let operation = match operation {
                Operation::Read => "read",
                Operation::Write => "write",
            };
            let action = match action {
                ErrorAction::Report => "report",
                ErrorAction::Ignore => "ignore",
                ErrorAction::Stop => "stop",
            };
            ("BLOCK_JOB_ERROR", json!({ "device": job_id, "operation": operation, "action": action }))
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        "event": name,
        "data": data,
    })
}

fn progress_json(progress: &JobProgress) -> Value {
    json!({
        "device": progress.job_id,
        "len": progress.len,
        "offset": progress.offset,
        "speed": progress.speed,
        "type": "mirror",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::types::JobStatus;

    fn shape(event: &JobEvent) -> (String, Value) {
        let json = to_json(event);
        assert!(json["timestamp"]["seconds"].as_u64() > Some(1_600_000_000));
        assert!(json["timestamp"]["microseconds"].as_u64() < Some(1_000_000));
        (json["event"].as_str().unwrap().to_owned(), json["data"].clone())
    }

    #[test]
    fn events_have_qemu_shapes() {
        let progress = JobProgress { job_id: "j".into(), len: 8, offset: 4, speed: 2 };
        let numbers = json!({"device": "j", "len": 8, "offset": 4, "speed": 2, "type": "mirror"});
        let mut failed = numbers.clone();
        failed["error"] = "Input/output error".into();
        for (event, name, data) in [
            (
                JobEvent::StatusChange { job_id: "j".into(), status: JobStatus::Running },
                "JOB_STATUS_CHANGE",
                json!({"status": "running", "id": "j"}),
            ),
            (JobEvent::Ready(progress.clone()), "BLOCK_JOB_READY", numbers.clone()),
            (JobEvent::Pending { job_id: "j".into() }, "BLOCK_JOB_PENDING", json!({"type": "mirror", "id": "j"})),
            (JobEvent::Completed(progress.clone(), None), "BLOCK_JOB_COMPLETED", numbers.clone()),
            (JobEvent::Completed(progress.clone(), Some("Input/output error".into())), "BLOCK_JOB_COMPLETED", failed),
            (JobEvent::Cancelled(progress), "BLOCK_JOB_CANCELLED", numbers),
            (
                JobEvent::Error { job_id: "j".into(), operation: Operation::Write, action: ErrorAction::Stop },
                "BLOCK_JOB_ERROR",
                json!({"device": "j", "operation": "write", "action": "stop"}),
            ),
        ] {
            assert_eq!(shape(&event), (name.to_owned(), data));
        }
    }
}
