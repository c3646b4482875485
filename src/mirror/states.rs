//! QEMU's job life cycle: which state may follow which, and which verb is allowed where (QAPI `JobStatus`, `JobVerb`).

use super::types::{JobStatus, JobVerb};
use crate::error::{Error, ErrorKind, Result};

impl JobStatus {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            JobStatus::Created => "created",
            JobStatus::Running => "running",
            JobStatus::Paused => "paused",
            JobStatus::Ready => "ready",
            JobStatus::Standby => "standby",
            JobStatus::Waiting => "waiting",
            JobStatus::Pending => "pending",
            JobStatus::Aborting => "aborting",
            JobStatus::Concluded => "concluded",
            JobStatus::Null => "null",
        }
    }

    /// True if a job may go from this state to `next`.
    pub fn may_become(self, next: JobStatus) -> bool {
        use JobStatus::*;
        matches!(
            (self, next),
            (Created, Running | Aborting | Null)
                | (Running, Paused | Ready | Waiting | Aborting)
                | (Paused, Running)
                | (Ready, Standby | Waiting | Aborting)
                | (Standby, Ready)
                | (Waiting, Pending | Aborting)
                | (Pending, Aborting | Concluded)
                | (Aborting, Concluded)
                | (Concluded, Null)
        )
    }

    /// True if `verb` may be applied in this state.
    pub fn allows(self, verb: JobVerb) -> bool {
        use JobStatus::*;
        match verb {
            JobVerb::Cancel => !matches!(self, Aborting | Concluded | Null),
            JobVerb::Pause | JobVerb::Resume | JobVerb::SetSpeed | JobVerb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            JobVerb::Complete => matches!(self, Ready | Standby),
            JobVerb::Finalize => self == Pending,
            JobVerb::Dismiss => self == Concluded,
        }
    }
}

impl JobVerb {
    /// The word in messages.
    pub fn word(self) -> &'static str {
        match self {
            JobVerb::Cancel => "cancel",
            JobVerb::Pause => "pause",
            JobVerb::Resume => "resume",
            JobVerb::SetSpeed => "set-speed",
            JobVerb::Complete => "complete",
            JobVerb::Finalize => "finalize",
            JobVerb::Dismiss => "dismiss",
            JobVerb::Change => "change",
        }
    }
}

/// Checks that `verb` may be applied to job `id` in `status`.
///
/// # Errors
/// In QEMU's words; `NotNow`, since another state may allow it.
pub fn check_verb(id: &str, status: JobStatus, verb: JobVerb) -> Result<()> {
    if status.allows(verb) {
        return Ok(());
    }
    let text = format!("Job '{id}' in state '{}' cannot accept command verb '{}'", status.word(), verb.word());
    Err(Error::new(ErrorKind::NotNow, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_verb_is_refused_in_qemus_words() {
        let error = check_verb("j", JobStatus::Running, JobVerb::Complete).unwrap_err();
        assert_eq!(error.to_string(), "Job 'j' in state 'running' cannot accept command verb 'complete'");
        assert!(check_verb("j", JobStatus::Standby, JobVerb::Complete).is_ok());
        assert!(check_verb("j", JobStatus::Aborting, JobVerb::Cancel).is_err());
    }
}
