//! How far a mirror is: a bar on a terminal, a line now and then elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::units;
use crate::control::backend::VolumeStatus;
use crate::mirror::types::{CopyMode, JobInfo, JobStatus};

/// How often a line is printed where there is no terminal, at most.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Shows the progress of one disk's mirror: a bar on standard error if that is a terminal, else lines on standard output.
pub struct Progress {
    bar: ProgressBar,
    plain: bool,
    last_line: String,
    last_time: Option<Instant>,
}

impl Progress {
    /// Nothing is shown before the first [`Progress::show`].
    pub fn new() -> Progress {
        let plain = !console_is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template("{prefix}  [{bar:30}] {msg}").map(|style| style.progress_chars("=> "));
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Progress { bar, plain, last_line: String::new(), last_time: None }
    }

    /// Shows where the mirror of `volume` is now.
    pub fn show(&mut self, volume: &VolumeStatus, job: &JobInfo) {
        if !self.plain {
            self.bar.set_prefix(volume.name.clone());
            self.bar.set_length(job.data_bytes.max(1));
            self.bar.set_position(job.copied_bytes.min(job.data_bytes));
            self.bar.set_message(describe(job));
            return;
        }
        let line = format!("{}: {}", volume.name, describe(job));
        let state_changed = self.last_line.split(',').next() != line.split(',').next();
        let due = self.last_time.is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if line != self.last_line && (due || state_changed) {
            plain(&line);
            self.last_line = line;
            self.last_time = Some(Instant::now());
        }
    }

    /// Says something without tearing the bar.
    pub fn say(&self, line: &str) {
        if self.plain {
            plain(line);
        } else {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// Progress is what the command has to say; standard error is kept for what went wrong.
fn plain(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn console_is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}

/// One line about a mirror: `running, 45 % of 3.2 GiB, 512 MiB/s, 12s left`. The state comes first.
pub fn describe(job: &JobInfo) -> String {
    let mut parts = vec![state_word(job).to_owned()];
    if job.ready {
        if job.in_sync {
            parts.push("in sync".to_owned());
        } else {
            parts.push(format!("{} behind", units::size(job.dirty_bytes + job.in_flight_bytes)));
        }
        parts.push(format!("{} copied", units::size(job.copied_bytes)));
    } else {
        // The last percent is not done while anything is dirty.
        let whole = job.data_bytes.max(job.copied_bytes + u64::from(!job.in_sync));
        parts.push(format!("{} of {}", units::percent(job.copied_bytes, whole), units::size(job.data_bytes)));
        parts.push(units::rate(job.drain_bytes_per_second));
        if let Some(eta) = job.eta_seconds {
            parts.push(format!("{} left", units::seconds(eta)));
        } else if job.dirty_bytes_per_second > job.drain_bytes_per_second && job.state == JobStatus::Running {
            parts.push(format!("the guest writes faster ({})", units::rate(job.dirty_bytes_per_second)));
        }
    }
    if job.speed > 0 {
        parts.push(format!("limit {}", units::rate(job.speed)));
    }
    if let (Some(bound), Some(p99)) = (job.guest_first_us, job.guest_p99_us) {
        let yields = if job.own_speed > 0 && p99 * 10 > bound * 7 { ", yields" } else { "" };
        let short = |micros| units::duration(Duration::from_micros(micros));
        parts.push(format!("guest's p99 {} of {}{yields}", short(p99), short(bound)));
    }
    if let (Some(time), false) = (&job.finish_by, job.ready) {
        let word = if job.in_time == Some(false) { "late for" } else { "to be ready by" };
        parts.push(format!("{word} {}", units::local(time)));
    }
    if job.copy_mode == CopyMode::WriteBlocking {
        parts.push("write-blocking".to_owned());
    }
    parts.join(", ")
}

fn state_word(job: &JobInfo) -> &'static str {
    match job.state {
        JobStatus::Created => "created",
        JobStatus::Running => "running",
        JobStatus::Paused => "paused",
        JobStatus::Ready => "ready",
        JobStatus::Standby => "standby",
        JobStatus::Waiting => "waiting",
        JobStatus::Pending => "pending",
        JobStatus::Aborting => "aborting",
        JobStatus::Concluded => "concluded",
        JobStatus::Null => "gone",
    }
}
