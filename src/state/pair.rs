//! Whether source and target of an unfinished mirror are still the very same pair, and untouched (rule 11).
//!
//! Three things speak for it, and all must: both images' identities; one **generation** in the record and in the attribute
//! `user.livemirror.pair` of both images, raised at every start, resume and clean stop; and what the file system says of each image's
//! last change. After a clean stop that is exactly what was recorded ([`Stamp::Exact`]). After an unclean one the last change
//! is not later than the server's last [`Pulse`](super::Pulse) plus [`SLACK`]: whoever wrote to the bare image since, above all a
//! virtual machine that was started on it, is later.
//!
//! Where a change by others cannot be excluded (a block device has no such times) nothing is trusted: everything is compared.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::attributes;
use crate::error::{Error, Result};
use crate::sync::SystemTime;

/// A pulse is written at most once a second, and the kernel's time stamps lag by a tick: a change of our own may be as much later.
pub const SLACK: Duration = Duration::from_secs(3);

/// What the file system says of an image. Times in nanoseconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Last change of the content.
    pub mtime_ns: i64,
    /// Last change of content or attributes. Nobody can set it.
    pub ctime_ns: i64,
}

/// What was recorded of an image's last change by us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stamp {
    /// A server uses it, or died using it: the last pulse tells.
    Running,
    /// It was left so.
    Exact(Observation),
    /// A server died using it, and this was its last pulse, in nanoseconds since the epoch.
    Until(i64),
    /// Its file system tells nothing.
    Unknown,
}

/// What ties two images together: written into the attribute `user.livemirror.pair` of both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairMark {
    /// The job's random id.
    pub job: String,
    /// Raised at every start, resume and clean stop.
    pub generation: u64,
    /// The state directory that knows the mirror: the image may be mounted at another place.
    #[serde(default)]
    pub state_dir: Option<PathBuf>,
}

impl Observation {
    /// Looks at an open image; `None` for what has no times of its own (a block device).
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(image: BorrowedFd<'_>) -> Result<Option<Observation>> {
        attributes::observe(image).map_err(|error| Error::io("cannot look at an image", &error))
    }
}

impl Stamp {
    /// What to record of an image that is left as it is.
    pub fn exact(observed: Option<Observation>) -> Stamp {
        observed.map_or(Stamp::Unknown, Stamp::Exact)
    }

    /// What it means now that another server has started: a death is dated.
    #[must_use]
    pub fn after_death(self, pulse_ns: Option<i64>) -> Stamp {
        match (self, pulse_ns) {
            (Stamp::Running, Some(pulse)) => Stamp::Until(pulse),
            (Stamp::Running, None) => Stamp::Unknown,
            (other, _) => other,
        }
    }

    /// Why it cannot be excluded that somebody else changed the image since; `None`: it can.
    pub fn suspicion(self, observed: Option<&Observation>) -> Option<String> {
        let Some(observed) = observed else {
            return Some("its file system does not tell when it was changed last".to_owned());
        };
        match self {
            Stamp::Exact(recorded) if recorded == *observed => None,
            Stamp::Exact(recorded) if recorded.size_bytes != observed.size_bytes => {
                let (then, now) = (recorded.size_bytes, observed.size_bytes);
                Some(format!("it has {now} bytes and was left with {then}"))
            }
            Stamp::Exact(recorded) => Some(format!(
                "it was changed at {}, after it was left at {}",
                shown(observed.ctime_ns.max(observed.mtime_ns)),
                shown(recorded.ctime_ns)
            )),
            Stamp::Until(pulse) => {
                let latest = pulse.saturating_add(i64::try_from(SLACK.as_nanos()).unwrap_or(i64::MAX));
                (observed.ctime_ns > latest).then(|| {
                    format!("it was changed at {}, the server died at about {}", shown(observed.ctime_ns), shown(pulse))
                })
            }
            Stamp::Running | Stamp::Unknown => Some("when the last server used it last is not known".to_owned()),
        }
    }
}

/// Now, in nanoseconds since the epoch, by the clock that files are stamped with.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

fn shown(ns: i64) -> String {
    let time = std::time::UNIX_EPOCH + Duration::from_nanos(ns.max(0).unsigned_abs());
    humantime::format_rfc3339_millis(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: Observation = Observation { size_bytes: 100, mtime_ns: 5_000_000_000, ctime_ns: 6_000_000_000 };

    #[test]
    fn after_a_clean_stop_everything_must_be_as_it_was() {
        let stamp = Stamp::exact(Some(THEN));
        assert_eq!(stamp.suspicion(Some(&THEN)), None);
        for changed in [
            Observation { size_bytes: 101, ..THEN },
            Observation { mtime_ns: THEN.mtime_ns - 1, ..THEN },
            Observation { ctime_ns: THEN.ctime_ns + 1, ..THEN },
        ] {
            assert!(stamp.suspicion(Some(&changed)).is_some(), "{changed:?}");
        }
        assert!(stamp.suspicion(None).is_some(), "an image that became a device");
    }

    #[test]
    fn after_a_death_the_last_pulse_counts() {
        let stamp = Stamp::Running.after_death(Some(THEN.ctime_ns - 1_000_000_000));
        assert_eq!(stamp.suspicion(Some(&THEN)), None, "a change of our own between two pulses");
        let slack = i64::try_from(SLACK.as_nanos()).unwrap();
        let later = Observation { ctime_ns: THEN.ctime_ns + slack, ..THEN };
        assert!(stamp.suspicion(Some(&later)).is_some());
        // A second death in a row dates nothing anew.
        assert_eq!(stamp.after_death(Some(i64::MAX)), stamp);
        assert!(Stamp::Running.after_death(None).suspicion(Some(&THEN)).is_some(), "a death without any pulse");
        assert!(Stamp::exact(None).suspicion(None).is_some(), "devices are compared");
    }
}
